"""The checks of lesson 15: on their solutions, on untouched stubs, on the mistakes that readers make."""

from math import ceil

import pytest

from course_lib.lessons.check.lesson15 import check_best_stacks, check_cores_within, check_die_area
from course_lib.lessons.solutions import lesson15
from course_lib.plan import design

CHECKS = {
    check_die_area: lesson15.die_area,
    check_cores_within: lesson15.cores_within,
    check_best_stacks: lesson15.best_stacks,
}


def cores(stacks: int, watts: float, core: float, stack: float) -> int:
    return int((watts - stacks * stack) // core)


def by_sum(f: float, b: float, w: float, c: float, cr: float, s: float, sr: float) -> int:
    return min(range(1, 7), key=lambda n: f / (cores(n, w, c, s) * cr) + b / (n * sr))


MISTAKES = [
    (check_die_area, lambda n, c, l2, m, s, h, k: n * c + l2 * m + s * h, "the parts alone"),
    (check_die_area, lambda n, c, l2, m, s, h, k: n * c + l2 * m + s * h + k, "a factor, not mm²"),
    (check_die_area, lambda n, c, l2, m, s, h, k: n * c * k + l2 * m + s * h, "for all parts"),
    (check_die_area, lambda n, c, l2, m, s, h, k: (c + l2 * m + s * h) * k, "one core"),
    (check_die_area, lambda n, c, l2, m, s, h, k: (n * (c + l2 * m) + s * h) * k, "share one L2"),
    (check_die_area, lambda n, c, l2, m, s, h, k: (n * c + l2 + s * h) * k, "the mm² of one"),
    (check_die_area, lambda n, c, l2, m, s, h, k: (n * c + l2 * m) * k, "has an interface"),
    (check_die_area, lambda n, c, l2, m, s, h, k: (n * c + l2 * m + s * h) / k, "larger than its parts"),
    (check_cores_within, lambda w, i, h, c, f, v, u: (w - i - h) // (c * f), "needs a higher voltage"),
    (check_cores_within, lambda w, i, h, c, f, v, u: (w - i - h) // (c * f * v / u), "square of the voltage"),
    (check_cores_within, lambda w, i, h, c, f, v, u: (w - i - h) // (c * (v / u) ** 2), "`core` is at 1 GHz"),
    (check_cores_within, lambda w, i, h, c, f, v, u: (w - i - h) // (c * f * (u / v) ** 2), "upside down"),
    (check_cores_within, lambda w, i, h, c, f, v, u: (w - i - h) // (c * f * v**2), "ratio of voltages"),
    (check_cores_within, lambda w, i, h, c, f, v, u: (w - h) // (c * f * (v / u) ** 2), "an idle die"),
    (check_cores_within, lambda w, i, h, c, f, v, u: (w - i) // (c * f * (v / u) ** 2), "HBM takes power"),
    (check_cores_within, lambda w, i, h, c, f, v, u: w // (c * f * (v / u) ** 2), "take their share first"),
    (check_cores_within, lambda w, i, h, c, f, v, u: (w - i - h) / (c * f * (v / u) ** 2), "round down"),
    (check_cores_within, lambda w, i, h, c, f, v, u: ceil((w - i - h) / (c * f * (v / u) ** 2)), "does not fit"),
    (check_cores_within, lambda w, i, h, c, f, v, u: (w - i - h) // (c * f * (v / u) ** 2), "the answer is 0"),
    (check_best_stacks, lambda *given: 6, "takes power from the cores"),
    (check_best_stacks, lambda *given: 1, "waits for memory"),
    (check_best_stacks, by_sum, "at the same time"),
    (check_best_stacks, lambda f, b, w, c, cr, s, sr: cores(3, w, c, s), "the cores that are left"),
    (
        check_best_stacks,
        lambda f, b, w, c, cr, s, sr: max(f / (cores(3, w, c, s) * cr), b / (3 * sr)),
        "that is the time",
    ),
    (check_best_stacks, lambda *given: 2, "no mistake that this check knows"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_solution_is_right(check, capsys) -> None:
    assert check(CHECKS[check])
    assert ": right. " in capsys.readouterr().out


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_stub_is_not_attempted(check, capsys) -> None:
    assert not check(lambda *arguments: None)
    assert capsys.readouterr().out.strip().endswith("not attempted yet")


@pytest.mark.parametrize(("check", "mistake", "hint"), MISTAKES)
def test_mistake_is_told(check, mistake, hint: str, capsys) -> None:
    assert not check(mistake)
    said = capsys.readouterr().out
    assert "not right yet" in said and hint in said


def test_exercises_agree_with_the_library() -> None:
    """Area of a design without links, and the cores that a budget feeds beside what else takes power."""
    each, made = design.constants(), design.Design(link=0)
    core = each["cube"] + 2 * each["vector"] + each["scalar"] + (64 + 64 + 128 + 512 + 384) / 1024 * each["sram"]
    around = sum(design.parts(made).values()) / sum(
        v for part, v in design.parts(made).items() if part != "surroundings"
    )
    ours = lesson15.die_area(24, core, 192, each["sram"], 4, each["hbm"], around)
    assert ours == pytest.approx(float(design.area(made)))
    power = design.watts_by_part(made)
    found = lesson15.cores_within(
        sum(power.values()) + 0.01, power["idle"], power["HBM"], 3.13 + 2 * 0.46, 1.8, 0.820, 0.745
    )
    assert found == made.cores
