"""What a step needs at its peak, one bar for each way to run it; and bytes over the length of the context.

peak_bars({"nothing done": (ledger.memory_at_peak(), seconds)}, capacity)
bytes_over_context(contexts, {"flash attention": sizes}, measured, capacity)
"""

from collections.abc import Mapping, Sequence

from course_lib.show import style
from course_lib.show.units import quantity

MIB = 2**20
OTHER = "other"


def in_order(parts: Mapping[str, int]) -> dict[str, int]:
    """Categories from the longest-lived to the shortest-lived, those without a colour of their own as "other"."""
    out = {name: parts.get(name, 0) for name in style.MEMORY if name != OTHER}
    return out | {OTHER: sum(size for name, size in parts.items() if name not in out)}


def peak_bars(
    ways: Mapping[str, tuple[Mapping[str, int], float]], capacity: int, title: str = "Peak of one step"
) -> None:
    """A bar for each way to run a step, stacked by category, with its seconds at the end; the capacity dashed."""
    with style.figure(height=2.2 + 0.45 * len(ways)) as (figure, ax):
        for place, (parts, seconds) in enumerate(ways.values()):
            at = 0.0
            for name, size in in_order(parts).items():
                colour, hatch = style.look_of(name, style.MEMORY)
                ax.barh(place, size / MIB, left=at, color=colour, hatch=hatch, edgecolor="white", height=0.7,
                        label=name if place == 0 else None)  # fmt: skip
                at += size / MIB
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the dashed line
            ax.text(at + 0.9, place, quantity(seconds, "s"), va="center", bbox=paper)
        widest = max(sum(parts.values()) for parts, _ in ways.values()) / MIB
        ax.axvline(capacity / MIB, color="black", linestyle="--", linewidth=1.5)
        ax.text(capacity / MIB, -0.55, f"capacity {quantity(capacity, 'B')} ", ha="right", va="bottom")
        ax.set_yticks(range(len(ways)), list(ways))
        ax.set(ylim=(len(ways) - 0.5, -1.15), xlim=(0, 1.16 * max(widest, capacity / MIB)))
        ax.set(xlabel="allocated at the peak (MiB)", title=title)
        figure.legend(ncols=6, loc="outside lower center", columnspacing=1.0, handlelength=1.6)
        style.finish(peak_sentence(ways, capacity))


def peak_sentence(ways: Mapping[str, tuple[Mapping[str, int], float]], capacity: int) -> str:
    """Each way's peak and seconds, and which of them are above the capacity."""
    sizes = {name: sum(parts.values()) for name, (parts, _) in ways.items()}
    said = [f"{name} {quantity(sizes[name], 'B')} and {quantity(seconds, 's')}" for name, (_, seconds) in ways.items()]
    above = [name for name, size in sizes.items() if size > capacity]
    limit = f"Above the chip's {quantity(capacity, 'B')}"
    return f"Peak and time: {'; '.join(said)}.\n{limit}: {', '.join(above) or 'none'}."


def bytes_over_context(
    contexts: Sequence[int], closed: Mapping[str, Sequence[float]], measured: Mapping[str, Mapping[int, int]],
    capacity: int, title: str = "Kept for one sequence, by its length",
) -> None:  # fmt: skip
    """A line for each closed form over the ``contexts``, markers where it was ``measured``; logarithmic axes."""
    with style.figure(height=4.8) as (_, ax):
        for place, (name, sizes) in enumerate(closed.items()):
            look = {"color": style.COLOURS[place], "linestyle": style.LINES[place]}
            ax.plot(contexts, [size / MIB for size in sizes], label=name, **look)
            found = measured.get(name, {})
            ax.plot([*found], [size / MIB for size in found.values()], style.MARKERS[place], color=style.COLOURS[place])
        ax.axhline(capacity / MIB, color="black", linestyle="--", linewidth=1.5)
        ax.text(contexts[0], 1.08 * capacity / MIB, f"capacity {quantity(capacity, 'B')}", va="bottom")
        ax.set(xscale="log", yscale="log", xlabel="tokens T of the sequence", ylabel="MiB", title=title)
        ax.set_xticks(contexts, [f"{T:,}" for T in contexts])
        low = min(min(sizes) for sizes in closed.values()) / MIB
        ticks = [10**power for power in range(-3, 6) if low / 10 < 10**power < 20 * capacity / MIB]
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        heading = "line: formula\nmarker: measured"
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 0.9), title=heading, alignment="left")
        style.finish(context_sentence(contexts, closed, capacity))


def context_sentence(contexts: Sequence[int], closed: Mapping[str, Sequence[float]], capacity: int) -> str:
    """Each line at its ends, how it grows at the last doubling, and where it passes the capacity."""
    said = []
    for name, sizes in closed.items():
        past = next((T for T, size in zip(contexts, sizes) if size > capacity), None)
        where = f"above the capacity from {past:,} tokens" if past else "never above the capacity"
        ends = f"{quantity(sizes[0], 'B')} to {quantity(sizes[-1], 'B')}"
        said.append(f"{name} {ends}, at the last doubling × {sizes[-1] / sizes[-2]:.2f}, {where}")
    return f"From {contexts[0]:,} to {contexts[-1]:,} tokens: {'; '.join(said)}."
