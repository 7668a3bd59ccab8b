"""Latency against throughput: what a reader waits for a token, and what the chip makes of all readers together.

frontier({"Ascend 910B2": (batches, seconds_per_token)})
"""

from collections.abc import Mapping, Sequence

import numpy
from matplotlib import ticker

from course_lib.show import style
from course_lib.show.units import quantity, three_digits

BATCHES = (1, 4, 16, 64, 256, 1024)  # each has its slanted line
FULL = "memory is full"


def frontier(
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], bound: float | None = None,
    title: str = "What one reader waits, and what all get",
) -> None:  # fmt: skip
    """Tokens/s of a chip against seconds per token (TPOT), both logarithmic: name → (batches, seconds), rising.

    Points of one batch lie on a slanted line, for throughput is batch over TPOT. Each line ends with its largest batch.
    ``bound``: seconds per token that are allowed, drawn as an upright line.
    """
    found = {name: (numpy.asarray(b), numpy.asarray(s, dtype=float)) for name, (b, s) in lines.items()}
    every = numpy.concatenate([seconds for _, seconds in found.values()])
    rates = numpy.concatenate([batches / seconds for batches, seconds in found.values()])
    low, high = 1e3 * every.min() / 1.5, 1e3 * every.max() * 1.8
    bottom, top = rates.min() / 1.7, rates.max() * 2.2
    with style.figure(height=5.6) as (_, ax):
        _slanted(ax, (low, high), (bottom, top))
        for place, (name, (batches, seconds)) in enumerate(found.items()):
            colour, marker = style.COLOURS[place], style.MARKERS[place]
            ax.plot(1e3 * seconds, batches / seconds, color=colour, linestyle=style.LINES[place % 4], zorder=3)
            at = [i for i, b in enumerate(batches) if b in BATCHES]
            ax.plot(1e3 * seconds[at], (batches / seconds)[at], color=colour, marker=marker, linestyle="none", zorder=4)
            ax.plot([], [], color=colour, marker=marker, linestyle=style.LINES[place % 4], label=name)
            end = (1e3 * seconds[-1], batches[-1] / seconds[-1])
            rim = {"markersize": 14, "markeredgecolor": "black", "markeredgewidth": 2, "zorder": 5}
            ax.plot(*end, color=colour, marker=marker, **rim)
            beside = {"textcoords": "offset points", "va": "center", "weight": "bold", "zorder": 6}
            ax.annotate(f"{batches[-1]:,}", end, (13, -8), **beside)
        if bound:
            ax.axvline(1e3 * bound, color="black", linestyle=":", linewidth=1.8)
            ax.text(1e3 * bound * 1.02, bottom * 1.1, f" {1e3 * bound:g} ms", va="bottom")
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top), title=title)
        ax.set(xlabel="milliseconds per token and reader (TPOT)", ylabel="tokens/s of the chip")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.minorticks_off()
        ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.15), columnspacing=1.2,
                  title=f"black rim and number: the batch at which {FULL}")  # fmt: skip
        style.finish(sentence(found, bound))


def best_within(batches: Sequence[int], seconds: Sequence[float], bound: float) -> int | None:
    """The largest batch whose tokens come within ``bound`` seconds; None where even one reader waits longer."""
    fitting = [int(b) for b, s in zip(batches, seconds, strict=True) if s <= bound]
    return max(fitting, default=None)


def sentence(found: Mapping[str, tuple[Sequence[int], Sequence[float]]], bound: float | None = None) -> str:
    """The figure in words: both ends of each line, and its best batch within the bound."""
    said = []
    for name, (batches, seconds) in found.items():
        ends = [f"{three_digits(b / s)} tokens/s at {quantity(float(s), 's')}" for b, s in
                ((batches[0], seconds[0]), (batches[-1], seconds[-1]))]  # fmt: skip
        one = f"{name}: batch {batches[0]} {ends[0]}, batch {batches[-1]:,} {ends[1]} where {FULL}"
        if bound:
            best = best_within(batches, seconds, bound)
            one += f"; within {1e3 * bound:g} ms " + (f"batch {best:,}" if best else "no batch")
        said.append(one)
    return ";\n".join(said) + "."


def _slanted(ax: object, across: tuple[float, float], up: tuple[float, float]) -> None:
    """A line for each batch: tokens/s = batch / TPOT; its name where it enters the picture from above."""
    for batch in BATCHES:
        start = max(across[0], 1e3 * batch / up[1])
        stop = min(across[1], 1e3 * batch / up[0])
        if start < stop:
            ax.plot([start, stop], [1e3 * batch / start, 1e3 * batch / stop], color=style.GREY, linewidth=1, zorder=1)
            shift = (6, -16) if start > across[0] else (4, 0)
            look = {"textcoords": "offset points", "color": "#555555", "fontsize": 12, "zorder": 2}
            ax.annotate(f"batch {batch:,}", (start, 1e3 * batch / start), shift, **look)
