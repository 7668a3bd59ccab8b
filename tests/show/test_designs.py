"""Figures of designs: fronts, bars of silicon and power, the clock of least energy; each with its sentence."""

import matplotlib
import pytest
from matplotlib import pyplot as plt

from course_lib import plan
from course_lib.chip import load_chip
from course_lib.plan import economy, explore
from course_lib.plan.design import Design, area, grid, watts
from course_lib.show import designs

LLAMA = plan.load_model("llama-2-7b")
JOBS = (explore.decode(LLAMA, 16, 2048), explore.train(LLAMA, 1, 4096, 64))
WRITER, LEARNER = (
    Design(cores=12, clock=1.5e9, l0c=256, l2=32, link=50e9),
    Design(cores=20, clock=1.3e9, l0c=256, l2=32, stacks=2, link=50e9),
)


def test_trade_in_words(capsys) -> None:
    made = grid(cores=[12, 20], clock=[1.3e9], l0c=[256], l2=[32], stacks=[2, 4], link=[50e9])
    found = explore.front(JOBS, made)
    designs.trade({"small": found}, {"910B2": explore.price(Design(), JOBS)})
    said = capsys.readouterr().out.strip().split("\n")
    assert said[0].startswith(f"small, {len(found)} designs: from decode step ") and "training step" in said[0]
    assert said[1] == "910B2: decode step 22.5 ms, training step 694 ms."
    ax = plt.gca()
    assert ax.get_xlabel() == "decode step (ms)" and ax.get_ylabel() == "training step (ms)"
    assert len({line.get_marker() for line in ax.get_lines()}) == 2


def test_budget_in_words_and_bars(capsys) -> None:
    designs.budget({"decode": WRITER, "training": LEARNER})
    said = capsys.readouterr().out.strip().split("\n")
    assert said[0].startswith(f"decode: {float(area(WRITER)):.0f} mm² (cube 11%") and "HBM 40%" in said[0]
    assert "idle" in said[1] and said[1].endswith(").")
    for ax, size in zip(plt.gcf().axes, (area, watts), strict=True):
        ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
        assert max(ends) == pytest.approx(max(float(size(one)) for one in (WRITER, LEARNER)))
    hatches = {bar.get_hatch() for bar in plt.gcf().axes[0].patches}
    assert len(hatches) == 7  # parts can be told apart in grey


def test_clocks_in_words(capsys) -> None:
    spec = load_chip("ascend-910b2")
    designs.clocks(
        {
            "decode": economy.over_clocks(LLAMA, spec, 16, 1, context=2048),
            "prefill": economy.over_clocks(LLAMA, spec, 1, 4096),
        }
    )
    said = capsys.readouterr().out.strip().split("\n")
    assert (
        said[0]
        == "decode: least energy at 1 GHz, 9.9% less than at 1.8 GHz for 0.0% more time; at 1 GHz 0.901 times as much;"
    )
    assert said[1].startswith("prefill: least energy at 1.6 GHz, 1.9% less")


def test_nothing_leaves_the_picture(tmp_path) -> None:
    designs.budget({"for decode": WRITER, "for training": LEARNER, "910B2": Design()})
    figure = plt.gcf()
    figure.savefig(tmp_path / "budget.png")
    texts = [text for ax in figure.axes for text in ax.texts if isinstance(text, matplotlib.text.Text)]
    assert texts and all(
        figure.bbox.contains(*corner) for text in texts for corner in text.get_window_extent().corners()
    )


def test_a_design_in_words() -> None:
    assert designs.in_words(WRITER).startswith("12 cores at 1.5 GHz, 4 stacks of HBM, 2")
    assert " of 32 × 16 × 32 " in designs.in_words(Design(tile=(32, 16, 32), stacks=1)) + " "
