"""What a token's FLOPs are spent on, model by model, and how far off 2N is as the context grows.

token_flops({"GPT-2, 1,024 tokens": (flops.forward(gpt2, 1, 1024), 1024)})
"""

from collections.abc import Sequence

import numpy

from course_lib.show import style
from course_lib.show.units import quantity, three_digits

# What an operator of course_lib.plan.flops belongs to; any other is a feed-forward matrix.
PARTS = {"embedding": "lookup", "scores": "attention: queries × keys", "mix values": "attention: queries × keys"}
PARTS |= dict.fromkeys(
    ("query", "key", "value", "output", "query down", "query up", "latent down", "latent up"), "attention: weights"
)
PARTS["unembedding"] = "unembedding"
LOOKS = {
    "attention: weights": (style.BLUE, ""), "attention: queries × keys": (style.ORANGE, "//"),
    "feed-forward": (style.GREEN, ".."), "unembedding": (style.PURPLE, "xx"),
}  # fmt: skip
NARROW = 0.07  # a piece below this share of its bar has no room for its percentage


def by_part(flops: dict[str, float]) -> dict[str, float]:
    """FLOPs by operator, summed into the four parts of `LOOKS`."""
    out = dict.fromkeys(LOOKS, 0)
    for name, value in flops.items():
        if value:
            out[PARTS.get(name, "feed-forward")] += value
    return out


def token_flops(
    rows: dict[str, tuple[dict[str, float], int]], title: str = "What one token's FLOPs are spent on, forward"
) -> None:
    """A bar to 100 % for each model, cut by part: name → (FLOPs by operator, tokens that they are for)."""
    shares = {}
    with style.figure(height=0.72 * len(rows) + 1.9) as (_, ax):
        for place, (name, (flops, tokens)) in enumerate(rows.items()):
            parts, left = by_part(flops), 0.0
            total = sum(parts.values())
            shares[name] = ({part: value / total for part, value in parts.items()}, total / tokens)
            for part, (colour, hatch) in LOOKS.items():
                share = parts[part] / total
                ax.barh(place, 100 * share, left=100 * left, color=colour, hatch=hatch, edgecolor="white", height=0.7,
                        label=part if place == 0 else None)  # fmt: skip
                if share >= NARROW:
                    box = {"facecolor": colour, "edgecolor": "none", "pad": 2}
                    ax.text(100 * (left + share / 2), place, f"{share:.0%}", ha="center", va="center",
                            color=style.ink(colour), bbox=box)  # fmt: skip
                left += share
            ax.text(101, place, quantity(total / tokens, "FLOP"), va="center")
        ax.set_yticks(range(len(rows)), list(rows))
        ax.invert_yaxis()
        ax.set(xlim=(0, 100), xlabel="share of the FLOPs (%); at the right, FLOPs per token", title=title)
        ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.85 / len(rows)))
        style.finish(_shares_in_words(shares))


def _shares_in_words(shares: dict[str, tuple[dict[str, float], float]]) -> str:
    words = [
        f"{name}: {quantity(each, 'FLOP')} per token, "
        + ", ".join(f"{part} {share:.0%}" for part, share in parts.items())
        for name, (parts, each) in shares.items()
    ]
    return ";\n".join(words) + "."


def error_of_2n(
    contexts: Sequence[int], errors: dict[str, Sequence[float]], ends: dict[str, int] | None = None,
    title: str = "How far off 2N is",
) -> None:  # fmt: skip
    """Relative error of 2N (0.1: 10 % too high) over the context, a line for each name.

    `ends`: the longest context that a model was made for, marked on its line.
    """
    ends, said = ends or {}, []
    with style.figure(height=4.8) as (_, ax):
        for place, (name, values) in enumerate(errors.items()):
            colour = style.COLOURS[place]
            ax.plot(contexts, [100 * v for v in values], color=colour, linestyle=style.LINES[place % 4], label=name)
            if name in ends:
                at = numpy.interp(numpy.log(ends[name]), numpy.log(contexts), values).item()
                ax.plot([ends[name]], [100 * at], marker=style.MARKERS[place], markersize=11, color=colour,
                        linestyle="none")  # fmt: skip
                said.append(f"{name} {_signed(at)} at its {ends[name]:,} tokens")
        ax.axhline(0, color="black", linewidth=1)
        ax.axhspan(-10, 10, color=style.GREY, alpha=0.25)
        ax.text(contexts[-1] / 1.1, 9, "within 10 %", ha="right", va="top")
        ax.set(xscale="log", xlim=(contexts[0], contexts[-1]), ylim=(-100, 25), title=title)
        ax.set(xlabel="tokens in the sequence", ylabel="error of 2N (%)")
        ticks = [t for t in (100, 1_000, 10_000, 100_000, 1_000_000) if contexts[0] <= t <= contexts[-1]]
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
        ax.legend(loc="lower left")
        style.finish(f"Error of 2N, forward, marked where each model's context ends: {'; '.join(said)}.")


def _signed(share: float) -> str:
    sign = "+" if share > 0 else "−"
    return f"{sign}{three_digits(abs(100 * share))} %"
