"""Number formats on one ruler: how far each reaches, how fine it is; and where a tensor's numbers lie on it.

formats()                                          # the ruler
magnitudes({"gradients": gradients}, "float16")    # what becomes zero, what loses bits, what is kept
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2

import numpy

from course_lib.show import style

PARTS = (("sign", "black", ""), ("exponent: how far", style.ORANGE, "//"), ("mantissa: how fine", style.BLUE, ""))


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: one sign bit, and so many of exponent and mantissa.

    `top` says what the highest exponent is for: "infinity" (IEEE 754: infinity and NaN only), "nan" (numbers, but for
    one code), "numbers".
    """

    name: str
    exponent: int
    mantissa: int
    top: str = "infinity"

    @property
    def bits(self) -> int:
        """Of one number."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is subtracted from the exponent's bits."""
        return 2 ** (self.exponent - 1) - 1

    @property
    def largest(self) -> float:
        """The largest number that is no infinity."""
        last = 2.0**-self.mantissa  # of the mantissa's bits
        if self.top == "infinity":
            return (2 - last) * 2.0**self.bias
        return (2 - (2 if self.top == "nan" else 1) * last) * 2.0 ** (self.bias + 1)

    @property
    def smallest_normal(self) -> float:
        """From here on upwards all mantissa bits count."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest number above zero, a subnormal; half of it and less becomes zero."""
        return self.smallest_normal * 2.0**-self.mantissa

    @property
    def spacing(self) -> float:
        """From 1 to the next number."""
        return 2.0**-self.mantissa


FORMATS = {
    each.name: each
    for each in (
        Format("float32", 8, 23), Format("bfloat16", 8, 7), Format("float16", 5, 10), Format("float8_e5m2", 5, 2),
        Format("float8_e4m3fn", 4, 3, "nan"), Format("float4_e2m1fn", 2, 1, "numbers"),
    )
}  # fmt: skip


def formats(names: Sequence[str] = tuple(FORMATS), title: str = "What a number can say") -> None:
    """Left the bits of each format; right what it reaches, from its smallest number to its largest."""
    chosen = [FORMATS[name] for name in names]
    with style.figure(height=0.62 * len(chosen) + 2.2, ncols=2, width_ratios=(2, 3), sharey=True) as (fig, axes):
        left, right = axes
        for place, each in enumerate(chosen):
            _bits(left, place, each)
            _reach(right, place, each)
        left.set_yticks(range(len(chosen)), [each.name for each in chosen])
        left.set(xlim=(-0.4, 33), ylim=(len(chosen) - 0.4, -0.6), xlabel="bits", xticks=[0, 8, 16, 32])
        left.spines["left"].set_visible(False)
        left.tick_params(axis="y", length=0)
        places = (-120, -60, 0, 60, 120)
        right.set_xticks(places, [f"$2^{{{place}}}$" for place in places])
        right.set(xlim=(-182, 176), xlabel="size of the number")
        right.spines["left"].set_visible(False)
        right.tick_params(axis="y", length=0)
        right.axvline(0, color="black", linewidth=1, zorder=0)
        handles, labels = left.get_legend_handles_labels()
        more = right.get_legend_handles_labels()
        fig.legend(handles + more[0], labels + more[1], ncols=3, loc="outside lower center")
        fig.suptitle(title, x=0.01, ha="left", weight="bold", size=15)
        style.finish(in_words(chosen))


def _bits(ax: object, place: int, each: Format) -> None:
    """One box for each of sign, exponent and mantissa, as long as its bits are many."""
    at = 0
    for (name, colour, hatch), width in zip(PARTS, (1, each.exponent, each.mantissa)):
        label = name if place == 0 else None
        ax.barh(place, width, left=at, color=colour, hatch=hatch, edgecolor="white", height=0.62, label=label)
        if width > 1:
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1}
            ax.text(at + width / 2, place, str(width), ha="center", va="center", color=style.ink(colour), size=12,
                    bbox=box)  # fmt: skip
        at += width


def _reach(ax: object, place: int, each: Format) -> None:
    """A bar over the exponents; thinner where subnormal numbers lose one bit after the other."""
    low, normal, high = log2(each.smallest), log2(each.smallest_normal), log2(each.largest)
    ax.barh(place, high - normal, left=normal, color=style.GREEN, edgecolor="white", height=0.62,
            label="all bits" if place == 0 else None)  # fmt: skip
    ax.barh(place, normal - low, left=low, color=style.YELLOW, hatch="..", edgecolor="black", linewidth=0.8,
            height=0.36, label="subnormal: fewer bits" if place == 0 else None)  # fmt: skip
    ax.text(low - 4, place, f"$2^{{{low:.0f}}}$", ha="right", va="center", size=12)
    top = f"{each.largest:,.0f}" if each.largest < 1e6 else f"$2^{{{high:.0f}}}$"
    ax.text(high + 4, place, top, ha="left", va="center", size=12)


def in_words(chosen: Sequence[Format]) -> str:
    """What the ruler shows, a line for each format."""
    lines = []
    for each in chosen:
        top = f"{each.largest:,g}" if each.largest < 1e6 else f"{each.largest:.2g}"
        lines.append(
            f"{each.name} (1 + {each.exponent} + {each.mantissa} bits): from 2^{log2(each.smallest):.0f}, "
            f"with all bits from 2^{log2(each.smallest_normal):.0f}, to {top}; next number after 1: +2^-{each.mantissa}"
        )
    return "\n".join(lines)


def magnitudes(groups: Mapping[str, object], dtype: str, title: str = "", symbol: str = "size") -> None:
    """How often each power of two occurs in each group of numbers, on the ruler of `dtype`."""
    each = FORMATS[dtype]
    tops = [_counts(values) for values in groups.values()]
    low = min([*(min(counts) for counts in tops), log2(each.smallest) - 8]) - 1
    high = max([*(max(counts) for counts in tops), log2(each.largest) + 1]) + 1
    with style.figure(height=4.6) as (_, ax):
        tallest = 0.0
        for place, (name, counts) in enumerate(zip(groups, tops)):
            sizes, total = sorted(counts), sum(counts.values())
            shares = [100 * counts[size] / total for size in sizes]
            tallest = max(tallest, *shares)
            ax.plot(sizes, shares, color=style.COLOURS[place], linestyle=style.LINES[place % 4],
                    marker=style.MARKERS[place], markersize=6, markevery=2, label=name)  # fmt: skip
        zero, normal, top = log2(each.smallest) - 1, log2(each.smallest_normal), log2(each.largest)
        ax.axvspan(low, zero, facecolor=style.GREY, alpha=0.45, hatch="//", edgecolor="white", linewidth=0)
        ax.axvspan(zero, normal, facecolor=style.YELLOW, alpha=0.35, hatch="..", edgecolor="white", linewidth=0)
        ax.axvspan(top, high, facecolor=style.VERMILION, alpha=0.4, hatch="xx", edgecolor="white", linewidth=0)
        ceiling = 1.22 * tallest
        for left, right, said in ((low, zero, "becomes zero"), (zero, normal, "loses bits"), (normal, top, each.name)):
            ax.text((left + right) / 2, 0.96 * ceiling, said, ha="center", va="top", weight="bold",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 2, "alpha": 0.85})  # fmt: skip
        ax.text((top + high) / 2, 0.5 * ceiling, "∞", ha="center", va="center", size=22)
        ticks = range(8 * round(low / 8) + (8 if 8 * round(low / 8) < low else 0), int(high) + 1, 8)
        ax.set_xticks(ticks, [f"$2^{{{tick}}}$" for tick in ticks])
        ax.set(xlim=(low, high), ylim=(0, ceiling), xlabel=symbol, ylabel="share of the numbers (%)", title=title)
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.17), ncols=2)
        style.finish("\n".join(_told(name, values, each) for name, values in groups.items()))


def _counts(values: object) -> dict[int, int]:
    """How many of the numbers above zero have which exponent."""
    sizes = numpy.abs(numpy.asarray(values, dtype=numpy.float64).ravel())
    exponents, counts = numpy.unique(numpy.floor(numpy.log2(sizes[sizes > 0])), return_counts=True)
    return {int(e): int(c) for e, c in zip(exponents, counts)}


def lost(values: object, dtype: str) -> float:
    """The share of the numbers above zero that `dtype` rounds to zero."""
    sizes = numpy.abs(numpy.asarray(values, dtype=numpy.float64).ravel())
    return float((sizes[sizes > 0] <= FORMATS[dtype].smallest / 2).mean())


def _told(name: str, values: object, each: Format) -> str:
    sizes = numpy.abs(numpy.asarray(values, dtype=numpy.float64).ravel())
    sizes = sizes[sizes > 0]
    zero = lost(values, each.name)
    few = float((sizes < each.smallest_normal).mean()) - zero
    over = float((sizes > each.largest).mean())
    return (
        f"{name}: {100 * zero:.1f} % become zero in {each.name}, {100 * few:.1f} % lose bits, "
        f"{100 * over:.1f} % overflow."
    )
