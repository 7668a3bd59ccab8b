"""A training run: loss against its floor, utilisation over the run, where a step's time goes, what a batch costs."""

from collections.abc import Sequence

import numpy

from course_lib.show import style
from course_lib.show.units import quantity

STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def loss_curve(
    losses: Sequence[float],
    floor: float,
    validation: float,
    uniform: float | None = None,
    title: str = "Loss against its floor",
) -> None:
    """Training loss by step on logarithmic axes, the entropy below it, and the validation loss at the end.

    `uniform` is the loss of a model that knows nothing, ln V.
    """
    steps = range(1, len(losses) + 1)
    with style.figure(height=4.6) as (_, ax):
        ax.plot(steps, losses, color=style.BLUE, label="training loss")
        ax.plot(
            [len(losses)],
            [validation],
            marker="D",
            markersize=11,
            linestyle="none",
            color=style.ORANGE,
            label="validation loss at the end",
        )
        if uniform:
            ax.axhline(uniform, color=style.GREY, linestyle=":", label="knows nothing: ln V")
        ax.axhline(floor, color="black", linestyle="--", label="floor: entropy of the text")
        ax.fill_between([1, len(losses)], 0.01, floor, color=style.GREY, alpha=0.25, hatch="//", edgecolor="white")
        ax.set(
            xscale="log", yscale="log", xlim=(1, 1.1 * len(losses)), ylim=(0.7 * floor, 1.4 * max(losses)), title=title
        )
        ax.set(xlabel="step", ylabel="loss (nats per token)")
        ticks = [t for t in (0.2, 0.5, 1, 2, 5) if t > 0.7 * floor]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
        ax.set_xticks(
            places := [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if t <= len(losses)], [str(t) for t in places]
        )
        ax.minorticks_off()
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 0.12))
        style.finish(loss_sentence(losses, floor, validation))


def loss_sentence(losses: Sequence[float], floor: float, validation: float) -> str:
    """In words; rounded so far that it reads the same on every machine."""
    gap = next((step for step in STEPS if validation - floor <= step), None)
    near = f"within {gap:g} nats per token of" if gap else "far above"
    begins = f"The loss starts at {losses[0]:.1f} nats per token"
    return f"{begins}; after {len(losses)} steps the validation loss is {near} the floor of {floor:.3f}."


def utilisation_curve(
    by_convention: dict[str, Sequence[float]], peak: str, title: str = "Utilisation over the run"
) -> None:
    """Utilisation (0 to 1) of each step, a line for each named convention; `peak` says what divides."""
    with style.figure(height=4.4) as (_, ax):
        for place, (name, values) in enumerate(by_convention.items()):
            steps = range(1, len(values) + 1)
            ax.plot(steps, [100 * v for v in values], color=style.COLOURS[place], linestyle=style.LINES[place % 4],
                    marker=style.MARKERS[place], markevery=(5 * place, max(1, len(values) // 8)),
                    label=f"MFU, {name}")  # fmt: skip
        ax.axhline(100, color="black", linewidth=1.5)
        ax.text(1, 98, peak, va="top")
        ax.set(xlim=(1, len(values)), ylim=(0, 105), xlabel="step", ylabel="share of peak (%)", title=title)
        ax.legend(loc="lower left")
        parts = [
            f"{name} {quantity(min(values), '%')} to {quantity(max(values), '%')}"
            for name, values in by_convention.items()
        ]
        style.finish(f"MFU over {len(values)} steps, of the {peak}, lowest to highest step: {'; '.join(parts)}.")


def time_budget(parts: dict[str, float], unit_total: float, title: str = "Where one training step's time goes") -> None:
    """One falling staircase: from the whole step down to what is left, a bar for each part (seconds)."""
    with style.figure(height=0.62 * len(parts) + 1.5) as (_, ax):
        left = 0.0
        for place, (name, seconds) in enumerate(parts.items()):
            share = 100 * seconds / unit_total
            ax.barh(
                place,
                share,
                left=left,
                color=style.COLOURS[place % 8],
                hatch=style.HATCHES[place % 8],
                edgecolor="white",
                height=0.75,
            )
            beside = left + share + 1 if left < 60 else left - 1
            ax.text(
                beside,
                place,
                f"{share:.1f} %  {quantity(seconds, 's')}",
                va="center",
                ha="left" if left < 60 else "right",
            )
            left += share
        ax.set_yticks(range(len(parts)), list(parts))
        ax.invert_yaxis()
        ax.set(xlim=(0, 100 if left > 85 else 105), xlabel="share of the step (%)", title=title)
        shares = "; ".join(f"{name} {quantity(s / unit_total, '%')}" for name, s in parts.items())
        style.finish(f"Of a step of {quantity(unit_total, 's')}: {shares}.")


def batch_choices(
    rows: Sequence[tuple[str, float, int]],
    capacity: int,
    convention: str,
    title: str = "What a larger batch buys, and what it costs",
) -> None:
    """Utilisation and peak memory side by side for some ways to make a step: (name, MFU, peak bytes)."""
    names = [name for name, _, _ in rows]
    with style.figure(rows=1, ncols=2, height=0.55 * len(rows) + 1.7, sharey=True) as (fig, (left, right)):
        places = numpy.arange(len(rows))
        left.barh(places, [100 * u for _, u, _ in rows], color=style.BLUE, edgecolor="white")
        right.barh(places, [m / 2**20 for _, _, m in rows], color=style.SKY, hatch="\\\\", edgecolor="white")
        right.axvline(capacity / 2**20, color="black", linestyle="--", linewidth=1.5)
        for place, (_, share, held) in zip(places, rows):
            left.text(100 * share - 1.5, place, quantity(share, "%"), ha="right", va="center", color="white")
            right.text(
                held / 2**20 - 1.5,
                place,
                f"{held / 2**20:.0f}",
                ha="right",
                va="center",
                bbox={"facecolor": style.SKY, "edgecolor": "none", "pad": 2},
            )
        left.set_yticks(places, names)
        left.invert_yaxis()
        left.set(xlim=(0, 100), xlabel=f"MFU (%)\n{convention}")
        right.set(xlim=(0, 1.08 * capacity / 2**20), xlabel="peak memory (MiB)\ndashed: the chip's capacity")
        fig.suptitle(title, fontweight="bold", x=0.01, ha="left", fontsize=15)
        parts = "; ".join(f"{name}: {quantity(share, '%')} and {quantity(held, 'B')}" for name, share, held in rows)
        style.finish(f"MFU ({convention}) and peak memory. {parts}.")
