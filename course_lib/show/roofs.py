"""The roofline: what operators could reach by their FLOPs per byte, and what they do reach; and a rate against a size.

    roofline(chip, ledger, dtype="bfloat16")
    rate_over(sides, rates, {"cube": peak}, "side n of the product")
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy
from matplotlib import ticker

from course_lib.chip import ChipSpec, Matmul, UnknownFigure, Work, cost
from course_lib.chip.figures import DTYPES
from course_lib.npu.ledger import Ledger, Record
from course_lib.show import style
from course_lib.show.units import LARGE, quantity, three_digits

PS_PER_S = 10**12
SIDE = 8192  # of a product so large that nothing but its tiles counts
PLENTY = 10**10  # operations, so many that a launch does not count
VISIBLE = 0.001  # share of the time below which a point is left out
NAMED = 0.01  # share below which it has no name
SMALLEST, LARGEST = 70, 1500  # area of a point, in square points, at no share of the time and at all of it
LINE = 24  # points from one label to the next
BOUNDS = {
    "cube": (style.BLUE, "s"), "L1": (style.GREEN, "D"), "L2": (style.SKY, "P"), "memory": (style.ORANGE, "o"),
    "vector": (style.PURPLE, "^"), "launch": (style.VERMILION, "X"), "host link": (style.GREY, "v"),
}  # fmt: skip
FAMILIES = {
    "linear": "products", "mm": "products", "addmm": "products", "bmm": "products", "scaled_dot": "attention",
    "fused_rms_norm": "norms", "fused_adamw": "AdamW", "log_softmax": "loss", "nll_loss": "loss", "silu": "SiLU",
    "mul": "mul, add", "add": "mul, add", "sub": "mul, add", "neg": "mul, add",
}  # fmt: skip


@dataclass(frozen=True)
class Roofs:
    """A chip's ceilings for products in ``dtype``. Raises UnknownFigure where nobody has published what one needs."""

    spec: ChipSpec
    dtype: str

    @cached_property
    def cube(self) -> int:
        """FLOP/s of the cube, cores × clock × tile."""
        peak = self.spec.peak(self.dtype)
        if peak is None:
            raise UnknownFigure(f"the cube's peak of {self.spec.title} in {self.dtype} is unknown: no source gives it")
        return peak

    @cached_property
    def memory(self) -> int:
        """B/s of device memory, as published."""
        return self.spec.require("memory_bandwidth")

    @property
    def l2(self) -> int | None:
        """B/s read from L2; None: unknown."""
        return self.spec.l2_bandwidth

    @property
    def ridge(self) -> float:
        """FLOP per byte of device memory from which on the cube could be busy all the time."""
        return self.cube / self.memory

    @cached_property
    def tiles(self) -> float:
        """FLOP/s that a large product sustains, tiles and waves counted."""
        size = DTYPES[self.dtype]
        moved = {"bytes_read": int(2 * size * SIDE**2), "bytes_written": int(size * SIDE**2)}
        return 2 * SIDE**3 * PS_PER_S / cost(self.spec, Work((Matmul(1, SIDE, SIDE, SIDE, self.dtype),), **moved)).ps

    @cached_property
    def vector(self) -> float | None:
        """Operations/s on the vector cores outside products; None: unknown."""
        try:
            work = Work(vector_flops=PLENTY, vector_dtype=self.dtype)
            return PLENTY * PS_PER_S / cost(self.spec, work).vector_ps
        except UnknownFigure:
            return None


@dataclass(frozen=True)
class Point:
    """Operators of one kind: FLOP per byte, FLOP/s, their share of the time, what bounds most of it."""

    name: str
    intensity: float
    rate: float
    share: float
    bound: str

    @property
    def drawn(self) -> bool:
        """Whether it has a place on logarithmic axes, and a share of the time that is worth a mark."""
        return self.intensity > 0 and self.rate > 0 and self.share >= VISIBLE


def family(op: str) -> str:
    """An operator's name as a figure has room for it: what it is, not which of PyTorch's it is."""
    plain = op.lstrip("_")
    return next((name for start, name in FAMILIES.items() if plain.startswith(start)), plain.replace("_", " "))


def points(records: Sequence[Record]) -> list[Point]:
    """One point for each family of operators and resource that bounds them, largest share of the time first."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[family(record.op), record.cost.bound].append(record)
    whole, found = sum(r.cost.ps for r in records), []
    for (name, bound), members in groups.items():
        flops = sum(r.cost.cube_flops + r.cost.vector_flops for r in members)
        moved, ps = sum(r.cost.bytes for r in members), sum(r.cost.ps for r in members)
        found.append(Point(name, flops / moved if moved else 0.0, flops * PS_PER_S / ps, ps / whole, bound))
    return sorted(found, key=lambda point: (-point.share, point.name))


def roofline(
    spec: ChipSpec, ledger: Ledger | None = None, dtype: str = "bfloat16", named: int = 7,
    others: Sequence[ChipSpec] = (), title: str | None = None,
) -> None:  # fmt: skip
    """The chip's roofs, and on them the operators of ``ledger``: marker by what bounds them, area by share of the time.

    The ``named`` largest carry their name. Operators without arithmetic have no place on logarithmic axes; the printed
    sentence has their share. Of ``others`` only memory and cube are drawn.
    """
    roofs, rivals = Roofs(spec, dtype), [Roofs(other, dtype) for other in others]
    placed = points(ledger.records) if ledger else []
    drawn = [point for point in placed if point.drawn]
    low = min([roofs.ridge / 2000, *(point.intensity / 2 for point in drawn)])
    high = max([60 * roofs.ridge, *(40 * point.intensity for point in drawn)])
    floor = min([low * roofs.memory, *(point.rate / 8 for point in drawn)])
    with style.figure(height=5.8) as (fig, ax):
        top = max([12 * roofs.cube] if not rivals else [4 * rival.cube for rival in [roofs, *rivals]])
        ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(floor, top))
        ax.set(xlabel="FLOP per byte of device memory", ylabel="FLOP/s")
        ax.set_title(title or f"Roofline of {spec.title}, {dtype}")
        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _prefixed(value)))
        ax.minorticks_off()
        for place, rival in enumerate(rivals):
            _draw_rival(ax, rival, low, high, place)
        for point in reversed(drawn):
            area = SMALLEST + (LARGEST - SMALLEST) * point.share
            colour, marker = BOUNDS[point.bound]
            ax.scatter(point.intensity, point.rate, area, colour, marker=marker, edgecolor="black", zorder=3)
        _legend(ax, drawn)
        fig.canvas.draw()  # settles where the axes lie, for slanted text and for names that keep apart
        _draw_roofs(ax, roofs, low, high, inner=not rivals)
        _names(ax, [point for point in drawn[:named] if point.share >= NAMED])
        style.finish(sentence(roofs, placed, rivals))


def sentence(roofs: Roofs, placed: Sequence[Point], rivals: Sequence[Roofs] = ()) -> str:
    """What the figure says: the roofs and where they meet, what bounds how much of the time, the largest operators."""
    memory, cube = quantity(roofs.memory, "B/s"), quantity(roofs.cube, "FLOP/s")
    said = [f"{roofs.spec.title} in {roofs.dtype}: memory {memory}, cube {cube}, ridge at {roofs.ridge:,.3g} FLOP/B."]
    said += [f"Large products sustain {quantity(roofs.tiles / roofs.cube, '%')} of the cube."]
    said += [f"{rival.spec.title}: ridge at {rival.ridge:,.3g} FLOP/B." for rival in rivals]
    if placed:
        bounds: dict[str, float] = defaultdict(float)
        for point in placed:
            bounds[point.bound] += point.share
        parts = [f"{name} {quantity(share, '%')}" for name, share in sorted(bounds.items(), key=lambda item: -item[1])]
        largest = [
            f"{point.name} at {three_digits(point.intensity)} FLOP/B and {quantity(point.rate, 'FLOP/s')}"
            for point in [point for point in placed if point.drawn][:3]
        ]
        unplaced = sum(point.share for point in placed if not point.drawn)
        said += [f"Bound by: {', '.join(parts)} of the time.", f"Largest: {'; '.join(largest)}."]
        if unplaced:
            said.append(f"Not drawn, for it has no arithmetic or next to no time: {quantity(unplaced, '%')}.")
    return " ".join(said)


def _prefixed(value: float) -> str:
    """1 T, 10 G, as a tick has room for."""
    step = min(int(numpy.log10(value) + 1e-9) // 3, len(LARGE) - 1) if value >= 1 else 0
    return f"{value / 1000**step:g} {LARGE[step]}".strip()


def _draw_roofs(ax: object, roofs: Roofs, low: float, high: float, inner: bool) -> None:
    """Slope of memory and level of the cube; with ``inner`` also L2, large products and vector cores; each named."""
    bottom = ax.get_ylim()[0]
    ax.plot([low, roofs.ridge, high], [low * roofs.memory, roofs.cube, roofs.cube], color="black", zorder=2)
    _on_slope(ax, roofs.memory, low, f"memory {quantity(roofs.memory, 'B/s')}", above=inner)
    level, below = f"cube {quantity(roofs.cube, 'FLOP/s')}", []
    if inner and roofs.l2:
        ends = (low, roofs.cube / roofs.l2)
        ax.plot(ends, [end * roofs.l2 for end in ends], color=style.SKY, linestyle="-.", zorder=2)
        _on_slope(ax, roofs.l2, low, f"L2 {quantity(roofs.l2, 'B/s')}", above=True)
    if inner and roofs.tiles < 0.98 * roofs.cube:
        ax.plot([roofs.tiles / roofs.memory, high], [roofs.tiles] * 2, color=style.BLUE, linestyle="--", zorder=2)
        below.append(f"dashed: large products {quantity(roofs.tiles, 'FLOP/s')}")
    if inner and roofs.vector:
        ax.plot([roofs.vector / roofs.memory, high], [roofs.vector] * 2, color=style.PURPLE, linestyle=":", zorder=2)
        below.append(f"dotted: vector {quantity(roofs.vector, 'FLOP/s')}")
    level = "\n".join([level, "; ".join(below)]).strip()
    ax.text(high, 2 * roofs.cube if inner else roofs.cube / 1.8, level, ha="right", va="bottom" if inner else "center")
    ax.plot([roofs.ridge] * 2, [bottom, roofs.cube], color=style.GREY, linestyle=":", linewidth=1.5, zorder=1)
    ax.annotate(f"ridge {roofs.ridge:,.3g} FLOP/B", (roofs.ridge, bottom), (5, 5), textcoords="offset points")


def _on_slope(ax: object, bandwidth: float, low: float, text: str, above: bool) -> None:
    """Text along the line of a bandwidth, above or below it."""
    ends = ax.transData.transform([(low, low * bandwidth), (10 * low, 10 * low * bandwidth)])
    angle = numpy.degrees(numpy.arctan2(*(ends[1] - ends[0])[::-1]))
    place, shift, anchor = (1.6 * low, (-2, 3), "bottom") if above else (12 * low, (2, -5), "top")
    ax.annotate(text, (place, place * bandwidth), shift, textcoords="offset points", rotation=angle,
                rotation_mode="anchor", va=anchor)  # fmt: skip


def _draw_rival(ax: object, roofs: Roofs, low: float, high: float, place: int) -> None:
    """Another chip's memory and cube, in a line of its own, with a marker at the ridge and its name."""
    colour, marker, line = style.COLOURS[1 + place], style.MARKERS[1 + place], style.LINES[1 + place % 3]
    levels = [low * roofs.memory, roofs.cube, roofs.cube]
    ax.plot([low, roofs.ridge, high], levels, color=colour, linestyle=line, linewidth=1.8)
    label = f"{roofs.spec.title}, ridge {roofs.ridge:,.3g}"
    ax.plot([roofs.ridge], [roofs.cube], color=colour, marker=marker, markersize=11, linestyle="none", label=label)


def _legend(ax: object, drawn: Sequence[Point]) -> None:
    """What the markers mean, below the axes."""
    for bound in [name for name in BOUNDS if name in {point.bound for point in drawn}]:
        colour, marker = BOUNDS[bound]
        ax.scatter([], [], 110, colour, marker=marker, edgecolor="black", label=f"bound by {bound}")
    title = "area and %: share of the time" if drawn else None
    if ax.get_legend_handles_labels()[0]:
        place = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.15)}
        ax.legend(ncols=4, title=title, columnspacing=1, handletextpad=0.2, **place)


def _names(ax: object, named: Sequence[Point]) -> None:
    """Names to the right of their points, from top to bottom, far enough apart, each with a line to its point."""
    taken = float("inf")
    for point in sorted(named, key=lambda point: -point.rate):
        _, y = ax.transData.transform((point.intensity, point.rate)) * 72 / ax.figure.dpi
        taken = min(y - 14, taken - LINE)
        look = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}, "va": "center", "zorder": 4}
        ax.annotate(f"{point.name} {point.share:.0%}", (point.intensity, point.rate), (34, taken - y),
                    textcoords="offset points", arrowprops={"arrowstyle": "-", "shrinkB": 0}, **look)  # fmt: skip


def rate_over(
    sizes: Sequence[float], rates: Mapping[str, Sequence[float]], roofs: Mapping[str, float | Sequence[float]],
    xlabel: str, title: str, marks: Mapping[float, str] | None = None, log: bool = False,
) -> None:  # fmt: skip
    """FLOP/s against a size: a marked line for each of ``rates``, broken ones for ``roofs``; ``marks`` names sizes."""
    with style.figure(height=4.6) as (_, ax):
        for place, (name, values) in enumerate(rates.items()):
            ax.plot(sizes, values, color=style.COLOURS[place], marker=style.MARKERS[place], markersize=5, label=name)
        for place, (name, roof) in enumerate(roofs.items()):
            values = roof if isinstance(roof, Sequence) else [roof] * len(sizes)
            ax.plot(sizes, values, color="black", linestyle=style.LINES[1 + place % 3], linewidth=1.8, label=name)
        for size, text in (marks or {}).items():
            ax.axvline(size, color=style.GREY, linestyle=":", linewidth=1.5)
            ax.annotate(text, (size, 0.4), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points")
        if log:
            ax.set(xscale="log", yscale="log")
            ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
            ax.minorticks_off()
        else:
            ax.set(ylim=(0, None))
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _prefixed(value) if value else "0"))
        ax.set(xlabel=xlabel, ylabel="FLOP/s", title=title)
        ax.legend(loc="lower right")
        style.finish(" ".join(_told(name, sizes, values) for name, values in rates.items()))


def _told(name: str, sizes: Sequence[float], values: Sequence[float]) -> str:
    """One line of `rate_over` in words: its ends, and its steepest fall if it falls."""
    ends = f"{name}: {quantity(values[0], 'FLOP/s')} at {sizes[0]:,}, {quantity(values[-1], 'FLOP/s')} at {sizes[-1]:,}"
    falls = [(after / before, place) for place, (before, after) in enumerate(pairwise(values))]
    worst, place = min(falls, default=(1, 0))
    if worst > 0.99:
        return ends + "."
    return f"{ends}; steepest fall from {sizes[place]:,} to {sizes[place + 1]:,}, by {quantity(1 - worst, '%')}."
