"""One look for all figures: Okabe–Ito colours, and with each colour a hatch or a marker, so that grey says the same.

Colours: Okabe and Ito, "Color Universal Design" (2008), told apart by all common kinds of colour vision.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, GREY)
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")

# One meaning, one colour and one hatch, in every figure of the course.
PHASES = {
    "forward": (BLUE, ""), "recompute": (PURPLE, "xx"), "backward": (ORANGE, "//"), "optimizer": (GREEN, ".."),
    "prefill": (SKY, "\\\\"), "decode": (VERMILION, "++"), "other": (GREY, "--"),
}  # fmt: skip
MEMORY = {
    "weights": (BLUE, ""), "optimizer state": (GREEN, ".."), "gradients": (ORANGE, "//"), "activations": (SKY, "\\\\"),
    "temporaries": (YELLOW, "oo"), "other": (GREY, "--"),
}  # fmt: skip

LOOK = {
    "figure.figsize": (9, 4.2), "figure.dpi": 100, "savefig.dpi": 100, "figure.constrained_layout.use": True,
    "font.size": 14, "axes.titlesize": 15, "axes.labelsize": 14, "legend.fontsize": 13, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False,
    "lines.linewidth": 2.5, "lines.markersize": 8, "hatch.linewidth": 0.8, "hatch.color": "white",
    "legend.frameon": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
}  # fmt: skip


@contextmanager
def figure(rows: int = 1, width: float = 9, height: float = 4.2, **options: object) -> Iterator[tuple[Figure, object]]:
    """`with figure() as (fig, axes):` a figure in the course's look."""
    with plt.rc_context(LOOK):
        yield plt.subplots(rows, figsize=(width, height), **options)


def look_of(name: str, meanings: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Colour and hatch of a name: its own where it has one, else one that stays the same for the name's place."""
    return meanings.get(name, (COLOURS[len(name) % len(COLOURS)], HATCHES[len(name) % len(HATCHES)]))


def ink(colour: str) -> str:
    """Black or white, whichever reads better on `colour`."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def finish(sentence: str) -> None:
    """Show the figure where the backend can, then print the sentence that says the same."""
    if matplotlib.get_backend().lower() != "agg":  # files only: the figure stays open for savefig
        plt.show()
    print(sentence)
