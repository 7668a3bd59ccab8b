"""The latency–throughput frontier of lesson 05."""

import matplotlib
import numpy
from matplotlib import pyplot as plt

from course_lib import show
from course_lib.show import serving

LINES = {
    "one": (numpy.arange(1, 65), 0.010 + 0.0005 * numpy.arange(1, 65)),
    "other": ([1, 2, 4, 8], [0.030, 0.031, 0.033, 0.037]),
}


def test_frontier_in_words(capsys) -> None:
    show.frontier(LINES, bound=0.02)
    said = capsys.readouterr().out.strip().split("\n")
    assert said[0].startswith("one: batch 1 95.2 tokens/s at 10.5 ms, batch 64 1,524 tokens/s at 42.0 ms")
    assert said[0].endswith("within 20 ms batch 20;") and said[1].endswith("within 20 ms no batch.")


def test_lines_differ_in_grey() -> None:
    """Markers and line styles tell the lines apart; points lie on the slanted lines of their batches."""
    show.frontier(LINES)
    ax = plt.gca()
    labelled = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    assert [line.get_label() for line in labelled] == list(LINES)
    assert len({line.get_marker() for line in labelled}) == len({line.get_linestyle() for line in labelled}) == 2
    marked = [line for line in ax.get_lines() if line.get_linestyle() == "None" and len(line.get_xdata()) > 1]
    batches = [round(x * y / 1e3) for line in marked for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
    assert set(batches) <= set(serving.BATCHES) and batches.count(4) == 2


def test_nothing_leaves_the_picture(tmp_path) -> None:
    show.frontier(LINES, bound=0.02)
    ax, figure = plt.gca(), plt.gcf()
    figure.savefig(tmp_path / "frontier.png")
    frame = figure.bbox
    texts = [text for text in ax.texts if isinstance(text, matplotlib.text.Annotation)]
    assert all(frame.contains(*corner) for text in texts for corner in text.get_window_extent().corners())


def test_best_within() -> None:
    assert serving.best_within(*LINES["one"], 0.02) == 20
    assert serving.best_within(*LINES["other"], 0.02) is None
