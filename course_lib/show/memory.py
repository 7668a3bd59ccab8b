"""What lies in device memory while a step runs, stacked by category.

memory_over_step(ledger, capacity=spec.memory_bytes)
"""

from itertools import groupby

from course_lib.npu.ledger import Ledger
from course_lib.show import style
from course_lib.show.units import quantity

MIB = 2**20
PS_PER_US = 10**6


def categories(ledger: Ledger) -> list[str]:
    """The categories that occur, from the longest-lived at the bottom to the shortest-lived on top."""
    found = {name for _, held in ledger.memory_over_time() for name, size in held.items() if size}
    return [name for name in style.MEMORY if name in found] + sorted(found - set(style.MEMORY))


def memory_over_step(ledger: Ledger, capacity: int | None = None, title: str = "Device memory over one step") -> None:
    """Bytes allocated against the host's clock, stacked by category; the phases above, the chip's capacity dashed."""
    history, names = ledger.memory_over_time(), categories(ledger)
    times = [at / PS_PER_US for at, _ in history]
    levels = [[held.get(name, 0) / MIB for _, held in history] for name in names]
    looks = [style.look_of(name, style.MEMORY) for name in names]
    with style.figure(height=5.0) as (_, ax):
        pieces = ax.stackplot(times, levels, step="post", labels=names, colors=[colour for colour, _ in looks])
        for piece, (_, hatch) in zip(pieces, looks):
            piece.set(hatch=hatch, edgecolor="white", linewidth=0.3)
        top = 1.12 * (capacity / MIB if capacity else ledger.peak_memory() / MIB)
        if capacity:
            ax.axhline(capacity / MIB, color="black", linestyle="--", linewidth=1.5)
            ax.text(times[-1], capacity / MIB, f"capacity {quantity(capacity, 'B')} ", ha="right", va="bottom")
        _mark_phases(ax, ledger, 1.13 * top)
        ax.set(
            xlim=(0, times[-1]),
            ylim=(0, 1.2 * top),
            xlabel="host time when the operator is launched (µs)",
            ylabel="allocated (MiB)",
            title=title,
        )
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.0, 0.95))
        style.finish(sentence(ledger, capacity))


def _mark_phases(ax: object, ledger: Ledger, height: float) -> None:
    """The span of each run of one phase that is long enough to be seen, as a bracket near the top.

    Where phases alternate, as in recomputation, only the first run of each is named, in two rows.
    """
    width = (ledger.records[-1].launched - ledger.records[0].launched) / PS_PER_US
    runs = []
    for phase, run in groupby((r for r in ledger.records if r.phase != "other"), key=lambda r: r.phase):
        launched = [(r.launched - ledger.began) / PS_PER_US for r in run]
        if launched[-1] - launched[0] >= 0.02 * width:
            runs.append((phase, launched[0], launched[-1]))
    phases = list(dict.fromkeys(phase for phase, *_ in runs))
    for place, (phase, begin, end) in enumerate(runs):
        colour, _ = style.look_of(phase, style.PHASES)
        ax.plot([begin, end], [height, height], color=colour, linewidth=8, solid_capstyle="butt")
        if phase not in [earlier for earlier, *_ in runs[:place]]:
            row = phases.index(phase) % 2 if len(runs) > len(phases) else 0
            ax.text((begin + end) / 2, (0.975 - 0.055 * row) * height, phase, ha="center", va="top")


def sentence(ledger: Ledger, capacity: int | None) -> str:
    """What the figure says: the peak and what it is made of."""
    peak, parts = ledger.peak_memory(), ledger.memory_at_peak()
    share = f", {quantity(peak / capacity, '%')} of the chip's {quantity(capacity, 'B')}" if capacity else ""
    made = ", ".join(f"{name} {quantity(size, 'B')}" for name, size in parts.items())
    return f"At the peak {quantity(peak, 'B')} are allocated{share}: {made}."
