"""The pipes of a core while a kernel runs: one row each, a bar for each instruction. And the matmul ladder.

run = launch(double_buffered, "ascend-910b2", a, b, out)
pipes(run)                                # all of it, on the first core
pipes(run, window=(2000, 6000))           # cycles
pipes(run, cores=["AIC0", "AIV0.1"])      # some cores of several
ladder({"naive": 0.004, "tiled": 0.28})   # shares of the cube's peak, step by step
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from course_lib.chip.core import Event, Run
from course_lib.show import style
from course_lib.show.units import quantity, three_digits

FLOW = ("MTE2", "MTE1", "M", "V", "FIX", "MTE3", "S")  # from top to bottom, as data pass through them
DOES = {
    "MTE2": "fetch", "MTE1": "extract", "M": "cube", "V": "vector", "FIX": "store", "MTE3": "store", "S": "scalar",
}  # fmt: skip
KINDS = {
    "DataCopy": (style.SKY, "\\\\"), "LoadData": (style.GREEN, ".."), "Mmad": (style.ORANGE, "//"),
    "Fixpipe": (style.PURPLE, "xx"), "arithmetic": (style.BLUE, ""), "Exp, Div, Sqrt": (style.VERMILION, "++"),
    "reduction": (style.YELLOW, "oo"), "Cast, Duplicate": (style.GREY, "--"),
}  # fmt: skip
SLOW = ("Exp", "Ln", "Div", "Sqrt", "Rsqrt", "Reciprocal")
CONVERTING = ("Cast", "Duplicate", "Brcb")
BINDS = 2 / 3  # busy at least this share of the time, a pipe is what the others wait for
HATCHED = 600  # bars of one kind in one row; with more, hatches are only grey haze
THIN = 0.006  # of the width, mean of a row: white edges would eat up such bars
MANY = 250  # thin bars in one row, which then blend into a tint
TICKS = 7
ROOM = 0.0165  # of the width, per letter: a bar that is narrower carries no name
COLUMNS = 4  # of the legend


@dataclass(frozen=True)
class Lane:
    """One row: the events of one pipe of one core within the window, and the share of it that they fill."""

    core: str
    pipe: str
    events: list[Event]
    share: float


def pipes(
    run: Run, cores: str | Sequence[str] | None = None, window: tuple[int, int] | None = None, title: str | None = None
) -> None:
    """A timeline of each pipe of ``cores`` (one name or several; default: the first), in cycles and µs.

    At the right the share of the time shown in which each pipe was at work; the title names the one that binds.
    """
    start, end = window or (0, run.cycles)
    shown = lanes(run, cores, start, end)
    several = len({lane.core for lane in shown}) > 1
    with style.figure(height=1.75 + 0.5 * len(shown)) as (fig, ax):
        kinds = [kind for place, lane in enumerate(shown) for kind in _draw(ax, place, lane, end - start)]
        names = [f"{lane.core} {lane.pipe}" if several else f"{lane.pipe}  {DOES[lane.pipe]}" for lane in shown]
        ax.set_yticks(range(len(shown)), names)
        ax.set(xlim=(start, end), ylim=(len(shown) - 0.5, -0.85), xlabel="cycles")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        ax.xaxis.set_major_locator(MaxNLocator(TICKS, min_n_ticks=3))
        us = 1e6 / run.chip.require("cube_clock")
        above = ax.secondary_xaxis("top", functions=(lambda cycle: cycle * us, lambda t: t / us))
        above.tick_params(pad=1)
        ax.text(-0.04, 1.035, "µs", transform=ax.transAxes, ha="right", va="bottom")
        above.xaxis.set_major_locator(MaxNLocator(TICKS, min_n_ticks=3))
        above.spines["top"].set_visible(True)
        _shares(ax, shown)
        ax.set_title(title or f"{run.kernel}: {verdict(shown)}")
        _legend(fig, list(dict.fromkeys(kinds)))
        style.finish(sentence(run, shown, start, end))


def ladder(shares: dict[str, float], title: str = "What each step buys") -> None:
    """A bar for each kernel, first to last: its share of the cube's peak, and the factor by which it rose."""
    with style.figure(height=1.3 + 0.5 * len(shares)) as (_, ax):
        ax.barh(range(len(shares)), [100 * share for share in shares.values()], height=0.7, color=style.ORANGE,
                hatch="//", edgecolor="white")  # fmt: skip
        for place, (share, factor) in enumerate(zip(shares.values(), factors(shares), strict=True)):
            rise = f"   × {three_digits(factor)}" if factor > 1 else ""
            ax.text(100 * share + 1, place, f"{quantity(share, '%')}{rise}", va="center")
        ax.axvline(100, color=style.BLACK, linestyle="--", linewidth=1.5)
        ax.set_yticks(range(len(shares)), list(shares))
        ax.set(xlim=(0, 101), ylim=(len(shares) - 0.5, -0.5), xlabel="share of the cube's peak (%)", title=title)
        steps = "; ".join(
            f"{name} {quantity(share, '%')}" + (f" (× {three_digits(factor)})" if factor > 1 else "")
            for (name, share), factor in zip(shares.items(), factors(shares), strict=True)
        )
        style.finish(f"Share of the cube's peak, and the rise over the step before: {steps}.")


def factors(shares: dict[str, float]) -> list[float]:
    """How many times each share is the one before; 1 for the first."""
    values = list(shares.values())
    return [1.0, *(after / before for before, after in pairwise(values))]


def lanes(run: Run, cores: str | Sequence[str] | None, start: int, end: int) -> list[Lane]:
    """The rows of the timeline. Raises ValueError for a core that the run does not have, or an empty window."""
    if not start < end:
        raise ValueError(f"the window {start} to {end} is empty; give (first cycle, last cycle)")
    pairs = {(event.core, event.pipe) for event in run.events}
    there = sorted({core for core, _ in pairs}, key=lambda core: [int(n) for n in re.findall(r"\d+", core)])
    wanted = there[:1] if cores is None else [cores] if isinstance(cores, str) else list(cores)
    if unknown := [core for core in wanted if core not in there]:
        raise ValueError(
            f"the run has no core {unknown[0]!r}; it has {', '.join(there[:8])}{' …' if there[8:] else ''}"
        )
    found = {(core, pipe): [] for core in wanted for pipe in FLOW if (core, pipe) in pairs}
    for event in run.events:
        if event.start < end and event.end > start and (event.core, event.pipe) in found:
            found[event.core, event.pipe].append(event)
    return [
        Lane(*key, events, sum(min(e.end, end) - max(e.start, start) for e in events) / (end - start))
        for key, events in found.items()
    ]


def verdict(shown: list[Lane]) -> str:
    """Which pipe binds, or that none does."""
    most = max(shown, key=lambda lane: lane.share)
    name = most.pipe if len({lane.core for lane in shown}) == 1 else f"{most.core} {most.pipe}"
    if most.share < BINDS:
        return f"the pipes wait for each other; busiest: {name}, {quantity(most.share, '%')}"
    return f"{name} binds, busy {quantity(most.share, '%')}"


def sentence(run: Run, shown: list[Lane], start: int, end: int) -> str:
    """What the figure says: how long, how busy each pipe, and which one binds."""
    several = len({lane.core for lane in shown}) > 1
    busy = ", ".join(f"{lane.core + ' ' if several else ''}{lane.pipe} {quantity(lane.share, '%')}" for lane in shown)
    seconds = (end - start) / run.chip.require("cube_clock")
    what = f"{run.kernel}, {end - start:,} cycles ({quantity(seconds, 's')})"
    whole = (start, end) == (0, run.cycles)
    where = "" if whole else f" from cycle {start:,} of {run.cycles:,}"
    return f"{what}{where}: {busy}; {verdict(shown)}."


def kind_of(event: Event) -> str:
    """The kind of instruction that colour and hatch stand for."""
    if event.name in KINDS:
        return event.name
    if event.name in CONVERTING:
        return "Cast, Duplicate"
    return "Exp, Div, Sqrt" if event.name in SLOW else "reduction" if "Reduce" in event.name else "arithmetic"


def _draw(ax: Axes, place: int, lane: Lane, width: int) -> list[str]:
    """The bars of one row, one collection for each kind; names where there is room. Gives the kinds."""
    by_kind: dict[str, list[Event]] = {}
    for event in lane.events:
        by_kind.setdefault(kind_of(event), []).append(event)
    thin = lane.share / max(1, len(lane.events)) < THIN
    for kind, events in by_kind.items():
        colour, hatch = KINDS[kind]
        hatch = hatch if len(events) <= HATCHED else ""
        edges = {"edgecolor": "white", "linewidth": 1}
        if thin:
            edges = {"linewidth": 0, "snap": False} if len(events) > MANY else {"edgecolor": colour, "linewidth": 0.7}
        ax.broken_barh(_spans(events, joined=thin), (place - 0.36, 0.72), facecolor=colour, hatch=hatch, **edges)
        for event in events:
            if (event.end - event.start) / width > ROOM * (len(event.name) + 1):
                box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
                ax.text((event.start + event.end) / 2, place, event.name, ha="center", va="center", fontsize=12,
                        color=style.ink(colour), bbox=box, clip_on=True)  # fmt: skip
    return list(by_kind)


def _spans(events: list[Event], joined: bool) -> list[tuple[int, int]]:
    """(start, length) of the bars; ``joined``: one for those that touch."""
    spans: list[tuple[int, int]] = []
    for event in events:
        if joined and spans and event.start <= sum(spans[-1]):
            spans[-1] = (spans[-1][0], event.end - spans[-1][0])
        else:
            spans.append((event.start, event.end - event.start))
    return spans


def _shares(ax: Axes, shown: list[Lane]) -> None:
    """Utilisation at the right of each row, the largest in bold, as is its pipe's name."""
    most = max(shown, key=lambda lane: lane.share)
    for place, (lane, label) in enumerate(zip(shown, ax.get_yticklabels(), strict=True)):
        weight = "bold" if lane is most else "normal"
        label.set_fontweight(weight)
        ax.text(1.012, place, f"{lane.share:.0%}", transform=ax.get_yaxis_transform(), va="center", fontweight=weight)
    ax.text(1.012, -0.6, "busy", transform=ax.get_yaxis_transform(), va="center", fontsize=12)


def _legend(fig: Figure, kinds: list[str]) -> None:
    marks = [Patch(facecolor=KINDS[k][0], hatch=KINDS[k][1], edgecolor="white", label=k) for k in KINDS if k in kinds]
    fig.legend(
        handles=marks, ncols=min(COLUMNS, len(marks)), loc="outside lower center", handlelength=2.2, columnspacing=1.4
    )
