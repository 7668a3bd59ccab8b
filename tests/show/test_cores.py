"""Timelines of a core's pipes, and the ladder: what they show, what they say, and how long they take to draw."""

import time

import numpy as np
import pytest
from matplotlib import pyplot as plt

from course_lib import show
from course_lib.chip.core import Run, empty, launch
from course_lib.chip.core.kernels.adamw import adamw
from course_lib.chip.core.kernels.attention import attention, workspace
from course_lib.chip.core.kernels.matmul import double_buffered, k_split, tiled
from course_lib.show import cores

CHIP = "ascend-910b2"


def product(kernel, side: int = 256) -> Run:
    return launch(kernel, CHIP, *(empty(side, side) for _ in range(3)))


@pytest.fixture(scope="module")
def mixed() -> Run:
    q, k, v = np.ones((3, 256, 64), np.float16)
    return launch(attention, CHIP, q, k, v, np.zeros((256, 64), np.float32), *workspace(1, 64), unit="MIX")


def test_pipes_that_wait(capsys) -> None:
    run = product(tiled)
    show.pipes(run)
    said = capsys.readouterr().out
    assert f"tiled, {run.cycles:,} cycles" in said and "the pipes wait for each other" in said
    ax = plt.gca()
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "MTE2  fetch",
        "MTE1  extract",
        "M  cube",
        "FIX  store",
    ]
    assert ax.get_xlabel() == "cycles" and "MTE2" in ax.get_title(loc="left")


def test_shares_are_those_of_the_run() -> None:
    run = product(double_buffered)
    shown = cores.lanes(run, None, 0, run.cycles)
    assert {lane.pipe: pytest.approx(lane.share) for lane in shown} == run.busy


def test_the_binding_pipe_is_named(capsys) -> None:
    show.pipes(product(double_buffered, 1024))
    assert "MTE2 binds, busy 9" in capsys.readouterr().out


def test_a_window_counts_only_what_is_in_it(capsys) -> None:
    run = product(tiled)
    first = run.events[0]
    show.pipes(run, window=(0, first.end))
    said = capsys.readouterr().out
    assert f"from cycle 0 of {run.cycles:,}" in said and "MTE2 binds, busy 100.0 %" in said
    assert plt.gca().get_xlim() == (0, first.end)


def test_several_cores(mixed: Run, capsys) -> None:
    there = list(dict.fromkeys(event.core for event in mixed.events))
    show.pipes(mixed, cores=there[:2], title="Cube and vector")
    said = capsys.readouterr().out
    assert all(f"{core} MTE2" in said for core in there[:2])
    assert plt.gca().get_title(loc="left") == "Cube and vector"
    show.pipes(mixed, cores=there[1])
    assert "V  vector" in [label.get_text() for label in plt.gca().get_yticklabels()]


def test_what_is_not_there_is_refused(mixed: Run) -> None:
    with pytest.raises(ValueError, match="no core 'AIC9'; it has"):
        show.pipes(mixed, cores="AIC9")
    with pytest.raises(ValueError, match="is empty"):
        show.pipes(mixed, window=(5, 5))


def test_every_instruction_has_a_kind(mixed: Run) -> None:
    step = launch(adamw, CHIP, *(np.ones(4096, np.float32) for _ in range(4)), unit="AIV")
    kinds = {event.name: cores.kind_of(event) for run in (mixed, step) for event in run.events}
    assert kinds["Mmad"] == "Mmad" and kinds["Axpy"] == "arithmetic" and kinds["Sqrt"] == "Exp, Div, Sqrt"
    assert kinds["WholeReduceMax"] == "reduction" and kinds["Cast"] == "Cast, Duplicate"
    looks = list(cores.KINDS.values())
    assert len({hatch for _, hatch in looks}) == len({colour for colour, _ in looks}) == len(looks)


def test_many_thousand_events_draw_in_a_second() -> None:
    run = launch(k_split, CHIP, empty(1024, 1024), empty(1024, 8192), empty(1024, 8192))
    assert len(run.events) > 10_000
    show.pipes(product(tiled))  # matplotlib's own first figure
    start = time.process_time()
    show.pipes(run)
    plt.gcf().canvas.draw()
    assert time.process_time() - start < 2  # less than half of it on a quiet core


def test_ladder(capsys) -> None:
    show.ladder({"naive": 0.004, "tiled": 0.28, "small L2": 0.14})
    assert capsys.readouterr().out.strip().endswith("naive 0.4 %; tiled 28.0 % (× 70.0); small L2 14.0 %.")
    assert plt.gca().get_xlabel() == "share of the cube's peak (%)"
