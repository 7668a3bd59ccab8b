"""Training beside inference: the same tokens in one forward pass and in one whole step.

step_beside_inference(inference, training)
"""

from course_lib.npu.ledger import Ledger
from course_lib.show import style
from course_lib.show.phases import MEASURES, shares
from course_lib.show.units import quantity, three_digits

NARROW = 0.1  # a piece below this share of its panel has no room for its number
KEPT = ("weights", "gradients", "optimizer state", "activations")


def memory(ledger: Ledger) -> dict[str, int]:
    """Bytes at the peak by category, those of `KEPT` always; what is in none of these counts as "other"."""
    held = ledger.memory_at_peak()
    out = {name: held.pop(name, 0) for name in KEPT}
    return out | {"other": sum(held.values())}


def step_beside_inference(
    inference: Ledger, training: Ledger, title: str = "The same tokens, in units of their inference"
) -> None:
    """Left: time, FLOPs and bytes of a step by phase, with inference as 1. Right: memory at the peak of both."""
    base, table = shares(inference).sum(), shares(training)
    ratios = table / base
    with style.figure(height=5.0, ncols=2, width_ratios=(3, 2)) as (figure, (left, right)):
        longest = ratios.sum().max()
        for place, (name, _) in enumerate(MEASURES):
            _stack(left, place, ratios[name].to_dict(), style.PHASES, NARROW * longest)
            total = ratios[name].sum()
            left.text(total + 0.02 * longest, place, f"{total:.2f}", va="center", weight="bold")
        left.axvline(1, color="black", linestyle="--", linewidth=1.5)
        left.text(1.04, -0.62, "inference", va="center")
        left.set_yticks(range(len(MEASURES)), [name for name, _ in MEASURES])
        left.set(xlim=(0, 1.16 * longest), ylim=(len(MEASURES) - 0.5, -0.85), xlabel="× inference")
        held = {"inference": memory(inference), "training": memory(training)}
        most = max(sum(one.values()) for one in held.values())
        scale, unit = _scale(most)
        seen = [name for name in held["training"] if any(one[name] for one in held.values())]
        for place, one in enumerate(held.values()):
            _stack(right, place, {name: one[name] / scale for name in seen}, style.MEMORY)
            total = sum(one.values()) / scale
            right.text(total + 0.02 * most / scale, place, three_digits(total), va="center", weight="bold")
        right.set_yticks(range(2), list(held))
        right.set(xlim=(0, 1.2 * most / scale), ylim=(1.5, -0.85), xlabel=f"memory at the peak ({unit})")
        for ax, anchor in ((left, 0.5), (right, 0.35)):
            ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(anchor, -0.2))
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=15)
        style.finish(_in_words(ratios, held))


def _stack(ax: object, place: int, parts: dict[str, float], meanings: dict, numbered: float = float("inf")) -> None:
    """One bar, cut into `parts`, those of `numbered` and more with their number; the first bar labels the legend."""
    at = 0.0
    for name, value in parts.items():
        colour, hatch = style.look_of(name, meanings)
        ax.barh(place, value, left=at, color=colour, hatch=hatch, edgecolor="white", height=0.65,
                label=name if place == 0 else None)  # fmt: skip
        if value >= numbered:
            box = {"facecolor": colour, "edgecolor": "none", "pad": 2}
            ax.text(at + value / 2, place, three_digits(value), ha="center", va="center", color=style.ink(colour),
                    bbox=box)  # fmt: skip
        at += value


def _scale(size: int) -> tuple[int, str]:
    return (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")


def _in_words(ratios: object, held: dict[str, dict[str, int]]) -> str:
    parts = [
        f"{name} {ratios[name].sum():.2f} × ("
        + ", ".join(f"{phase} {three_digits(value)}" for phase, value in ratios[name].items()) + ")"
        for name, _ in MEASURES
    ]  # fmt: skip
    stocks = [
        f"{name} {quantity(sum(one.values()), 'B')} ("
        + ", ".join(f"{part} {quantity(size, 'B')}" for part, size in one.items() if size >= 0.005 * sum(one.values()))
        + ")"
        for name, one in held.items()
    ]
    return f"Step over inference: {'; '.join(parts)}.\nMemory at the peak: {'; '.join(stocks)}."
