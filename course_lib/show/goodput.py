"""The long run in pictures: 54 days with all that broke, and goodput over the checkpoint interval.

days_of_run(simulate(run, seed=0))
interval_curves(run, hours, seeds, chips=(2048, 8192, 16384))
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy

from course_lib.plan.checkpoints import daly, young
from course_lib.plan.longrun import CATEGORIES, History, Run, sweep
from course_lib.show import style
from course_lib.show.units import quantity

DAY = 24  # hours
POINTS = 600  # of a curve
FLAT = 0.001  # goodput below the best that is as good as the best
LOSSES = {
    "lost": (style.VERMILION, "//"), "checkpoint": (style.BLUE, ""), "detection": (style.ORANGE, ".."),
    "restart": (style.SKY, "xx"), "waiting": (style.PURPLE, "++"), "planned": (style.GREEN, "\\\\"),
    "shrunk": (style.YELLOW, "oo"), "slow hosts": (style.GREY, "--"),
}  # fmt: skip
NAMES = {"lost": "lost work", "checkpoint": "checkpoints", "planned": "planned stops", "shrunk": "fewer replicas"}
KINDS = {"chip": "chips", "host": "hosts", "network": "network", "maintenance": "maintenance", "software": "software",
         "silent": "silent corruption"}  # fmt: skip


def days_of_run(history: History, title: str = "") -> None:
    """Three panels over the days: goodput so far and of each day; a tick for each failure, by kind; hours lost, stacked."""
    times = numpy.linspace(0, history.run.hours, POINTS + 1)
    title = title or f"{history.run.chips:,} chips, {history.run.hours / DAY:.3g} days"
    with style.figure(3, height=8.2, sharex=True, gridspec_kw={"height_ratios": (3, 2, 3)}) as (
        _,
        (top, middle, bottom),
    ):
        _goodput(top, history, times)
        _ticks(middle, history)
        _stack(bottom, history, times)
        top.set_title(title)
        bottom.set(xlim=(0, history.run.hours / DAY), xlabel="day")
        style.finish(days_sentence(history))


def daily(history: History) -> numpy.ndarray:
    """Goodput of each whole day, 0 to 1."""
    useful = history.at(numpy.arange(0, history.run.hours + 1e-9, DAY))["useful"]
    return numpy.diff(useful) / DAY


def days_sentence(history: History) -> str:
    """The figure in words: goodput, failures by kind, and where the hours went."""
    counts = {kind: sum(event.kind == kind for event in history.events) for kind in KINDS}
    failed = ", ".join(f"{KINDS[kind]} {count}" for kind, count in counts.items() if count)
    spent = sorted((hours, name) for name, hours in history.hours.items() if name != "useful" and hours > 0)[::-1]
    gone = ", ".join(f"{NAMES.get(name, name)} {hours:.1f}" for hours, name in spent)
    worst = f"; the worst day {quantity(float(daily(history).min()), '%')}" if history.run.hours >= DAY else ""
    return (
        f"Goodput {quantity(history.goodput, '%')} of {history.run.hours:,.0f} hours{worst}.\n"
        f"{history.failures} failures: {failed or 'none'}.\nHours: {gone or 'none lost'}."
    )


def _goodput(ax: object, history: History, times: numpy.ndarray) -> None:
    each = daily(history)
    if len(each):
        ax.stairs(100 * each, numpy.arange(len(each) + 1), color=style.SKY, fill=True, alpha=0.6, label="of the day")
    so_far = 100 * history.at(times[1:])["useful"] / times[1:]
    ax.plot(times[1:] / DAY, so_far, color=style.BLUE, label="so far")
    low = min([*(100 * each), so_far[-1]])
    ax.set(ylim=(max(0, 10 * (low // 10) - 10), 100), ylabel="goodput (%)")
    ax.legend(loc="lower right", ncols=2)


def _ticks(ax: object, history: History) -> None:
    found = [kind for kind in KINDS if any(event.kind == kind for event in history.events)]
    for row, kind in enumerate(found):
        at = [event.time / DAY for event in history.events if event.kind == kind]
        ax.plot(at, [row] * len(at), "|", color=style.COLOURS[row], markersize=11, markeredgewidth=1.6)
    counts = [sum(event.kind == kind for event in history.events) for kind in found]
    ax.set_yticks(range(len(found)), [f"{KINDS[kind]} ({n})" for kind, n in zip(found, counts)], fontsize=12)
    ax.set(ylim=(len(found) - 0.4, -0.6), ylabel="failures")


def _stack(ax: object, history: History, times: numpy.ndarray) -> None:
    curves = history.at(times)
    names = sorted((n for n in CATEGORIES[1:] if history.hours[n] > 0), key=lambda n: -history.hours[n])
    if names:
        looks = [LOSSES[name] for name in names]
        labels = [NAMES.get(name, name) for name in names]
        pieces = ax.stackplot(times / DAY, [curves[n] for n in names], labels=labels, colors=[c for c, _ in looks])
        for piece, (_, hatch) in zip(pieces, looks):
            piece.set(hatch=hatch, edgecolor="white", linewidth=0.3)
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], labels[::-1], loc="upper left")
    ax.set(ylim=(0, None), ylabel="hours lost")


# -- the interval -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Mean goodput of one cluster over the intervals (hours), its standard error, and the rules' intervals."""

    chips: int
    intervals: numpy.ndarray
    goodput: numpy.ndarray
    error: numpy.ndarray
    young: float
    daly: float

    @property
    def best(self) -> int:
        """Place of the highest mean."""
        return int(self.goodput.argmax())

    @property
    def flat(self) -> tuple[float, float]:
        """The shortest and the longest interval whose goodput is within `FLAT` of the best."""
        good = self.intervals[self.goodput >= self.goodput[self.best] - FLAT]
        return float(good[0]), float(good[-1])

    def at(self, interval: float) -> float:
        """Goodput at an interval, between the simulated ones."""
        return float(numpy.interp(numpy.log(interval), numpy.log(self.intervals), self.goodput))


def curve(run: Run, intervals: Sequence[float], seeds: Sequence[int]) -> Curve:
    """One cluster's sweep."""
    found = sweep(run, intervals, seeds)
    error = found.std(axis=1, ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else numpy.zeros(len(found))
    rules = [rule(run.checkpoint.cost, run.failures.mtbf(run.chips)) for rule in (young, daly)]
    return Curve(run.chips, numpy.asarray(intervals, dtype=float), found.mean(axis=1), error, *rules)


def interval_curves(
    run: Run, hours: Sequence[float], seeds: Sequence[int], chips: Sequence[int] = (),
    title: str = "How often to write a checkpoint",
) -> list[Curve]:  # fmt: skip
    """Goodput against the interval for several clusters; Young's and Daly's interval and the simulated best marked."""
    curves = [curve(replace(run, chips=n), hours, seeds) for n in chips or (run.chips,)]
    with style.figure(height=5.2) as (_, ax):
        for place, one in enumerate(curves):
            colour = style.COLOURS[place]
            minutes = 60 * one.intervals
            ax.plot(
                minutes, 100 * one.goodput, color=colour, linestyle=style.LINES[place % 4], label=f"{one.chips:,} chips"
            )
            band = 100 * (one.goodput - 2 * one.error), 100 * (one.goodput + 2 * one.error)
            ax.fill_between(minutes, *band, color=colour, alpha=0.2)
            rim = {"linestyle": "none", "markeredgecolor": "black", "color": colour, "zorder": 4}
            for marker, size, at in (("s", 9, one.young), ("D", 6, one.daly), ("*", 17, one.intervals[one.best])):
                ax.plot(60 * at, 100 * one.at(at), marker=marker, markersize=size, **rim)
        for marker, size, name in (("s", 9, "Young"), ("D", 6, "Daly"), ("*", 17, "simulated best")):
            ax.plot([], [], marker=marker, markersize=size, linestyle="none", color="white", markeredgecolor="black",
                    label=name)  # fmt: skip
        ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if minutes[0] <= t <= minutes[-1]]
        ax.set(xscale="log", xlabel="minutes between checkpoints", ylabel="goodput (%)", title=title)
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.legend(ncols=2, loc="lower center")
        style.finish(intervals_sentence(curves))
    return curves


def intervals_sentence(curves: Sequence[Curve]) -> str:
    """Each curve in words: the rules' intervals and the simulated best, what they give, and how flat the top is."""
    said = []
    for one in curves:
        best, (short, long) = one.intervals[one.best], one.flat
        rules = f"Young {60 * one.young:.1f}, Daly {60 * one.daly:.1f}, simulated best {60 * best:.1f} minutes"
        top = f"goodput {quantity(float(one.goodput[one.best]), '%')}, within 0.1 points of it from {60 * short:.1f} to {60 * long:.1f}"
        said.append(f"{one.chips:,} chips: {rules}; {top}")
    return ";\n".join(said) + "."
