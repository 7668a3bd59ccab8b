"""A script of the repository gives the same under torchrun as the same function by launch: losses and emulated seconds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from course_lib.parallel import launch, ranks
from tests.programs.distributed import train

ROOT = Path(__file__).parents[2]


def on_npu() -> tuple[list[float], float]:
    return train(torch.device("npu"))


def test_torchrun_and_launch_agree() -> None:
    results = launch(on_npu, ranks=4, system="mini-node")
    losses, seconds = results[0]
    assert [other for other, _ in results] == [losses] * 4
    expected = [*(f"step {step} loss {loss:.6f}" for step, loss in enumerate(losses)), f"{seconds:.12f} s"]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "4", "tests/programs/distributed.py"]
    options = ["--device", "npu", "--system", "mini-node", "--clock"]
    done = subprocess.run([sys.executable, *command, *options], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected


def test_alone_it_is_the_only_rank() -> None:
    with ranks("cpu") as device:
        assert torch.distributed.get_world_size() == 1
        alone, _ = train(device)
    assert not torch.distributed.is_initialized()
    shared = launch(train, torch.device("cpu"), ranks=2, device="cpu")[1][0]
    assert shared == pytest.approx(alone, abs=1e-5)


def test_a_system_comes_too_late_after_the_import() -> None:
    import course_lib.npu  # noqa: F401

    with pytest.raises(
        RuntimeError, match="course_lib.npu is imported already; import it after, or set .*COURSE_SYSTEM"
    ):
        with ranks("npu", system="cloudmatrix384"):
            pass
