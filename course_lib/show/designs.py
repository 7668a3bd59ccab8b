"""Designs of chips: which ones nobody beats, where their silicon goes, and what a slower clock saves.

trade({"half a 910B2": explore.front(jobs, designs)}, {"910B2": explore.price(Design(), jobs)})
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy
from matplotlib import ticker

from course_lib.plan.design import Design, area, parts, watts, watts_by_part
from course_lib.plan.economy import Clocked, best_clock
from course_lib.plan.explore import Found
from course_lib.show import style
from course_lib.show.units import quantity

PARTS = {
    "cube": (style.BLUE, ""), "vector": (style.ORANGE, "//"), "buffers": (style.GREEN, ".."), "L2": (style.PURPLE, "xx"),
    "HBM": (style.SKY, "\\\\"), "links": (style.VERMILION, "++"), "surroundings": (style.YELLOW, "oo"),
    "idle": (style.GREY, "--"),
}  # fmt: skip
SHOWN = 0.045  # share of a bar below which its number would not fit
LEGEND = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.15), "columnspacing": 1.2}


def in_words(design: Design) -> str:
    """One design in a line: "12 cores at 1.5 GHz, 4 stacks of HBM, 270 mm², 206 W"."""
    cube = "" if design.tile == Design.tile else " of " + " × ".join(map(str, design.tile))
    size = f"{float(area(design)):.0f} mm², {float(watts(design)):.0f} W"
    stacks = f"{design.stacks} stack{'s' * (design.stacks > 1)} of HBM"
    return f"{design.cores} cores{cube} at {design.clock / 1e9:g} GHz, {stacks}, {size}"


def trade(
    fronts: Mapping[str, Sequence[Found]], points: Mapping[str, Found] | None = None,
    jobs: tuple[str, str] = ("decode step", "training step"), title: str = "Nobody is first in both",
) -> None:  # fmt: skip
    """Two jobs' milliseconds, one on each axis: fronts as lines, single designs as marks with a black rim."""
    with style.figure(height=5.4) as (_, ax):
        for place, (name, found) in enumerate(fronts.items()):
            x, y = (1e3 * numpy.array([one.seconds[job] for one in found]) for job in range(2))
            look = {"color": style.COLOURS[place], "marker": style.MARKERS[place], "linestyle": style.LINES[place % 4]}
            ax.step(x, y, where="post", label=name, zorder=3, **look)
        for place, (name, one) in enumerate((points or {}).items()):
            x, y = (1e3 * seconds for seconds in one.seconds)
            rim = {"markeredgecolor": "black", "markeredgewidth": 2, "markersize": 13, "zorder": 5}
            look = {"color": style.YELLOW, "marker": style.MARKERS[place + len(fronts)]}
            ax.plot(x, y, label=name, linestyle="none", **look, **rim)
        ax.set(xlabel=f"{jobs[0]} (ms)", ylabel=f"{jobs[1]} (ms)", title=title)
        ax.margins(0.08)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.legend(ncols=2, **LEGEND)
        style.finish(_trade_in_words(fronts, points or {}, jobs))


def budget(designs: Mapping[str, Design], title: str = "Where silicon and power go") -> None:
    """Two bars for each design, stacked by part with colour and hatch: mm², and W with everything busy."""
    panels = (("mm² of the die, in 7 nm", parts), ("W with everything busy", watts_by_part))
    with style.figure(2, height=2.6 + 1.15 * len(designs)) as (fig, axes):
        for ax, (label, by_part) in zip(axes, panels, strict=True):
            rows = [{part: float(value) for part, value in by_part(one).items()} for one in designs.values()]
            most = max(sum(row.values()) for row in rows)
            for place, row in enumerate(rows):
                _bar(ax, place, row, SHOWN * most)
            ax.set_yticks(range(len(designs)), list(designs))
            ax.invert_yaxis()
            ax.margins(x=0.09)
            ax.set_xlabel(label)
        axes[0].set_title(title)
        handles = [
            matplotlib.patches.Patch(facecolor=c, hatch=h, edgecolor="white", label=n) for n, (c, h) in PARTS.items()
        ]
        fig.legend(handles=handles, ncols=4, loc="outside lower center")
        style.finish(_budget_in_words(designs))


def _bar(ax: object, place: int, row: Mapping[str, float], shown: float) -> None:
    """One stacked bar, with the numbers that fit and the sum."""
    left = 0.0
    for part, value in row.items():
        colour, hatch = PARTS[part]
        ax.barh(place, value, left=left, height=0.66, color=colour, hatch=hatch, edgecolor="white")
        if value > shown:
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
            ax.text(
                left + value / 2, place, f"{value:.0f}", ha="center", va="center", color=style.ink(colour), bbox=box
            )
        left += value
    ax.text(left, place, f" {left:.0f}", va="center", weight="bold")


def clocks(curves: Mapping[str, Sequence[Clocked]], title: str = "The clock of least energy") -> None:
    """Energy per token of the whole chip against the clock, over that at the full clock; a ring at the least."""
    with style.figure(height=4.8) as (_, ax):
        for place, (name, curve) in enumerate(curves.items()):
            x = [one.clock / 1e9 for one in curve]
            y = numpy.array([one.joules for one in curve]) / curve[-1].joules
            look = {"color": style.COLOURS[place], "marker": style.MARKERS[place], "linestyle": style.LINES[place % 4]}
            ax.plot(x, y, label=name, **look)
            ax.plot(x[int(y.argmin())], y.min(), "o", markersize=20, fillstyle="none", color="black", markeredgewidth=2)
        ax.axhline(1, color=style.GREY, linewidth=1)
        ax.set(xlabel="clock of the AI cores (GHz)", ylabel="energy per token,\nfull clock = 1", title=title)
        ax.margins(0.08)
        ax.legend(ncols=2, **LEGEND)
        style.finish(_clocks_in_words(curves))


def _trade_in_words(fronts: Mapping, points: Mapping, jobs: tuple[str, str]) -> str:
    said = []
    for name, found in fronts.items():
        ends = [
            f"{jobs[0]} {quantity(one.seconds[0], 's')}, {jobs[1]} {quantity(one.seconds[1], 's')}"
            for one in (found[0], found[-1])
        ]
        said.append(f"{name}, {len(found)} designs: from {ends[0]} to {ends[1]}")
    for name, one in points.items():
        times = ", ".join(f"{job} {quantity(seconds, 's')}" for job, seconds in zip(jobs, one.seconds, strict=True))
        said.append(f"{name}: {times}")
    return ";\n".join(said) + "."


def _budget_in_words(designs: Mapping[str, Design]) -> str:
    said = []
    for name, design in designs.items():
        one = []
        for by_part, unit in ((parts(design), "mm²"), (watts_by_part(design), "W")):
            whole = float(sum(by_part.values()))
            shares = ", ".join(f"{part} {float(value) / whole:.0%}" for part, value in by_part.items())
            one.append(f"{whole:.0f} {unit} ({shares})")
        said.append(f"{name}: {' and '.join(one)}")
    return ";\n".join(said) + "."


def _clocks_in_words(curves: Mapping[str, Sequence[Clocked]]) -> str:
    said = []
    for name, curve in curves.items():
        best, full = best_clock(curve), curve[-1]
        saved, slower = 1 - best.joules / full.joules, best.seconds / full.seconds - 1
        said.append(
            f"{name}: least energy at {best.clock / 1e9:g} GHz, {saved:.1%} less than at {full.clock / 1e9:g} GHz"
            f" for {slower:.1%} more time; at {curve[0].clock / 1e9:g} GHz {curve[0].joules / full.joules:.3g} times as much"
        )
    return ";\n".join(said) + "."
