"""What the exercises' checks share: call the reader's function, and print a verdict that never raises.

An untouched stub gives None and is "not attempted yet". A wrong answer is told what is off, what kind of number is
expected, and a hint that fits the mistake, where the mistake is known; never the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real

from course_lib.show.units import quantity


@dataclass(frozen=True)
class Case:
    """Arguments, the right result, and results of known mistakes with a hint for each."""

    arguments: tuple
    expected: float
    mistakes: dict[float, str] = field(default_factory=dict)


def judge(
    name: str,
    function: Callable,
    cases: Sequence[Case],
    unit: str = "",
    kind: str = "a number",
    good: str = "",
    tolerance: float = 1e-9,
) -> bool:
    """Try `function` on each case and print the verdict; True if all are right.

    `kind` says what sort of number is expected; `good` follows the verdict on a right answer.
    """
    for case in cases:
        call = f"{name}({', '.join(map(_short, case.arguments))})"
        try:
            found = function(*case.arguments)
        except Exception as error:  # the reader's own: told, not raised
            print(f"{name}: not right yet. {call} raised {type(error).__name__}: {error}")
            return False
        if untouched(found):
            print(f"{name}: not attempted yet")
            return False
        if isinstance(found, bool) or not isinstance(found, Real):
            print(f"{name}: not right yet. {call} gave a {type(found).__name__}; expected {kind}")
            return False
        if not _near(found, case.expected, tolerance):
            print(
                f"{name}: not right yet. {call} gave {quantity(found, unit)}, {_distance(found, case.expected)};"
                f" expected {kind}"
            )
            print(f"  hint: {_hint(found, case)}")
            return False
    shown = quantity(cases[0].expected, unit)
    print(f"{name}: right. {name}({', '.join(map(_short, cases[0].arguments))}) = {shown}{'; ' + good if good else ''}")
    return True


def untouched(found: object) -> bool:
    """Whether a stub gave this: nothing, or the dots that stood in it."""
    return found is None or found is NotImplemented or found is ...


def _near(found: float, expected: float, tolerance: float) -> bool:
    return abs(found - expected) <= tolerance * max(abs(expected), 1e-300)


def _distance(found: float, expected: float) -> str:
    if not expected or not found or found / expected < 0:
        return (
            "which has the wrong sign"
            if found and expected
            else "which should not be zero"
            if expected
            else "which should be zero"
        )
    ratio = found / expected
    if 0.8 < ratio < 1.25:
        return f"{100 * abs(ratio - 1):.2g} % too {'much' if ratio > 1 else 'little'}"
    return f"{max(ratio, 1 / ratio):.3g} times too {'much' if ratio > 1 else 'little'}"


def _hint(found: float, case: Case) -> str:
    for mistaken, hint in case.mistakes.items():
        if _near(found, mistaken, 1e-6):
            return hint
    return "no mistake that this check knows; work the smallest case by hand, then open the hint above"


def _short(value: object) -> str:
    return (
        f"{value:_}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{value:.6g}"
        if isinstance(value, float)
        else str(value)
    )
