"""The long run in pictures: what is drawn is what was simulated, and the sentences say so."""

import matplotlib
import numpy
import pytest
from matplotlib import pyplot as plt

from course_lib.plan.checkpoints import Checkpoint, optimum
from course_lib.plan.failures import Failures, Recovery
from course_lib.plan.longrun import Run, Stragglers, simulate
from course_lib.show import goodput

WEEK = Run(16384, 7 * 24, Failures.load("llama-3"), Recovery.load("megascale"), Checkpoint(0.1, 0.001), spares=64)
HARD = Run(
    128, 500, Failures.every(20.0, 128, "silent", 1), Recovery("", 0.1, 0.2), Checkpoint(0.5, 0.02, 0.2, 0.1), replica=8,
    elastic=True, stragglers=Stragglers(1e-4), silent=3.0,
)  # fmt: skip


def test_days_in_words(capsys) -> None:
    history = simulate(WEEK, 2)
    goodput.days_of_run(history)
    said = capsys.readouterr().out.strip().split("\n")
    assert said[0].startswith(f"Goodput {100 * history.goodput:.1f} % of 168 hours; the worst day")
    assert said[1].startswith(f"{history.failures} failures: chips ")
    assert sum(int(part.rstrip(".").split()[-1]) for part in said[1].split(": ")[1].split(", ")) == history.failures
    assert said[2].startswith(f"Hours: restart {history.hours['restart']:.1f}, detection") and "waiting" not in said[2]


def test_days_are_drawn(capsys) -> None:
    """Ticks: one for each failure, in its row. Stack: its top is all that was not useful. Bars: their mean is goodput."""
    history = simulate(WEEK, 2)
    goodput.days_of_run(history)
    _, ticks, stack = plt.gcf().axes
    assert sum(len(line.get_xdata()) for line in ticks.get_lines()) == history.failures
    assert len({line.get_ydata()[0] for line in ticks.get_lines()}) == len(ticks.get_yticks())
    top = max(vertex[1] for piece in stack.collections for vertex in piece.get_paths()[0].vertices)
    assert top == pytest.approx(WEEK.hours - history.hours["useful"])
    assert goodput.daily(history).mean() == pytest.approx(history.goodput)


def test_parts_of_the_stack_differ_in_grey(capsys) -> None:
    history = simulate(HARD, 1)
    assert {"shrunk", "slow hosts", "lost", "checkpoint", "restart"} <= {k for k, v in history.hours.items() if v > 0}
    goodput.days_of_run(history)
    stack = plt.gcf().axes[2]
    hatches = [piece.get_hatch() for piece in stack.collections]
    assert len(set(hatches)) == len(hatches) > 4
    assert {"fewer replicas", "slow hosts"} <= {text.get_text() for text in stack.get_legend().get_texts()}


def test_a_quiet_run_and_a_short_one(capsys) -> None:
    quiet = Run(8, 12.0, Failures("none", ()), Recovery("", 0, 0), Checkpoint(100, 0), replica=8)
    goodput.days_of_run(simulate(quiet))
    assert capsys.readouterr().out == "Goodput 100.0 % of 12 hours.\n0 failures: none.\nHours: none lost.\n"


def test_intervals(capsys) -> None:
    run = Run(128, 1500, Failures.every(3.0, 128), Recovery("", 0.1, 0.2), Checkpoint(1.0, 0.05), replica=64)
    hours = numpy.geomspace(0.1, 3, 12)
    (small, large) = goodput.interval_curves(run, hours, range(4), chips=(64, 128))
    assert small.goodput[small.best] > large.goodput[large.best] and small.young > large.young
    best = optimum(0.05, 3.0)
    assert large.flat[0] <= large.intervals[large.best] <= large.flat[1] and hours[1] < best < hours[-2]
    assert abs(large.at(best) - large.goodput[large.best]) < 0.01
    said = capsys.readouterr().out
    assert said.startswith("64 chips: Young 46.5, Daly 4") and "\n128 chips: Young 32.9" in said
    lines = [line for line in plt.gca().get_lines() if line.get_label().endswith("chips")]
    assert len({line.get_linestyle() for line in lines}) == 2
    marked = [line for line in plt.gca().get_lines() if line.get_marker() == "s" and len(line.get_xdata())]
    assert [line.get_xdata()[0] for line in marked] == pytest.approx([60 * small.young, 60 * large.young])


def test_nothing_leaves_the_picture(tmp_path, capsys) -> None:
    for place, draw in enumerate(
        (
            lambda: goodput.days_of_run(simulate(WEEK, 2)),
            lambda: goodput.interval_curves(WEEK, [0.05, 0.1, 0.2], range(2)),
        )
    ):
        draw()
        figure = plt.gcf()
        figure.savefig(tmp_path / f"{place}.png")
        texts = [text for ax in figure.axes for text in ax.findobj(matplotlib.text.Text) if text.get_text()]
        assert texts and all(figure.bbox.contains(*corner) for t in texts for corner in t.get_window_extent().corners())
