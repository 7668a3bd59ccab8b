"""Figures: each draws, and prints the sentence that says the same. Units: three digits and the right prefix."""

import doctest
import subprocess
import sys

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt

from course_lib import npu, show
from course_lib.show import style, units


@pytest.fixture(scope="module")
def step() -> npu.Ledger:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.SiLU(), torch.nn.Linear(256, 64)).to("npu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(512, 64, device="npu")
    for _ in range(2):
        ledger = npu.ledger()
        with ledger:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return ledger


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1_234_000_000, "FLOP", "1.23 GFLOP"), (999.96, "FLOP/s", "1.00 kFLOP/s"), (512, "FLOP", "512 FLOP"),
        (4.5 * 2**20, "B", "4.50 MiB"), (1023, "B", "1,023 B"), (46e9, "B/s", "46.0 GB/s"), (12.34e-6, "s", "12.3 µs"),
        (0.027241, "s", "27.2 ms"), (90, "s", "90 s"), (0, "s", "0 s"), (0.7655, "%", "76.5 %"), (3.0, "", "3.00"),
        (1_000_000, "", "1,000,000"), (0.00012, "", "0.00012"), (37_592.0, "tokens/s", "37.6 ktokens/s"),
    ],
)  # fmt: skip
def test_quantity(value: float, unit: str, text: str) -> None:
    assert show.quantity(value, unit) == text


def test_phase_bars(step, capsys) -> None:
    show.phase_bars(step)
    said = capsys.readouterr().out
    assert all(phase in said for phase in ("forward", "backward", "optimizer"))
    bars = plt.gca().containers
    assert {bar.get_facecolor() for bar in bars[0]} and plt.gca().get_xlabel() == "share of the whole (%)"


def test_memory_over_step(step, capsys) -> None:
    show.memory_over_step(step, capacity=64 * 2**20)
    said = capsys.readouterr().out
    assert "MiB" in said and "weights" in said and "activations" in said
    assert "(µs)" in plt.gca().get_xlabel() and "(MiB)" in plt.gca().get_ylabel()


def test_timeline(capsys) -> None:
    x = torch.empty(256, 256, device="npu")
    with npu.ledger() as ledger:
        for _ in range(5):
            x @ x
    show.timeline(ledger)
    assert "launched all 5 operators" in capsys.readouterr().out


def test_loss_curve(capsys) -> None:
    show.loss_curve([6.24, 3.0, 1.0, 0.4], floor=0.24, validation=0.31, uniform=6.238)
    assert "within 0.1 nats per token of the floor of 0.240" in capsys.readouterr().out


def test_loss_far_from_its_floor(capsys) -> None:
    show.loss_curve([9.0, 8.0], floor=0.24, validation=8.0)
    assert "far above the floor" in capsys.readouterr().out


def test_utilisation_curve(capsys) -> None:
    show.utilisation_curve({"6N": [0.7, 0.71], "6N+attention causal": [0.76, 0.77]}, "float32 cube peak")
    said = capsys.readouterr().out
    assert "6N 70.0 % to 71.0 %" in said and "float32 cube peak" in said


def test_time_budget(capsys) -> None:
    show.time_budget({"cube": 8e-3, "memory": 2e-3}, 10e-3)
    assert "cube 80.0 %; memory 20.0 %" in capsys.readouterr().out


def test_batch_choices(capsys) -> None:
    show.batch_choices(
        [("1 row", 0.6, 2**24), ("8 rows", 0.77, 2**25)], 2**26, "6N+attention causal; float32 cube peak"
    )
    assert "8 rows: 77.0 % and 32.0 MiB" in capsys.readouterr().out


def test_grey_says_the_same() -> None:
    for meanings in (style.PHASES, style.MEMORY):
        assert (
            len({hatch for _, hatch in meanings.values()})
            == len({colour for colour, _ in meanings.values()})
            == len(meanings)
        )
    assert matplotlib.rcParams["font.size"] != style.LOOK["font.size"], "the look stays inside the figures"


def test_names() -> None:
    assert all(callable(getattr(show, name)) for name in show.__all__) and dir(show) == sorted(show.__all__)
    with pytest.raises(AttributeError, match="there are"):
        show.pie


def test_importing_the_lessons_is_light() -> None:
    """The notebooks' tools and every test's start import it."""
    code = (
        "import sys, course_lib.lessons; print(*{'torch', 'matplotlib', 'pandas', 'course_lib.npu'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_examples() -> None:
    for module in (show, units):
        failed, tried = doctest.testmod(module)
        assert tried and not failed
