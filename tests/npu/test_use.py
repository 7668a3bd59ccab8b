"""Which chip, how many devices, and moving from one to the other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from course_lib import data, npu
from course_lib.chip.figures import SpecError
from course_lib.chip.spec import load_chip
from course_lib.npu import runtime


def test_by_name_path_and_spec(tmp_path: Path) -> None:
    assert npu.use("ascend-910b2").name == "ascend-910b2"
    assert "910B2" in torch.npu.get_device_name()
    copy = tmp_path / "mine.toml"
    copy.write_text(data.path("chips", "mini.toml").read_text(encoding="utf-8").replace('name = "mini"', 'name = "mine"', 1), encoding="utf-8")
    assert npu.use(copy).name == npu.use(str(copy)).name == "mine"
    assert npu.use(load_chip("ascend-910b4")).name == "ascend-910b4"


@pytest.mark.parametrize("environment, name", [({}, "mini"), ({"COURSE_CHIP": "ascend-910b3"}, "ascend-910b3")])
def test_by_the_environment(environment, name) -> None:
    script = "import torch\nfrom course_lib.npu import runtime\nprint(runtime.devices[0].spec.name)"
    env = {k: v for k, v in os.environ.items() if k != "COURSE_CHIP"} | environment
    assert subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60).stdout == name + "\n"


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"chip": "ascend-911"}, SpecError, "no chip named 'ascend-911'; there are .*mini"),
        ({"chip": "nowhere.toml"}, SpecError, "nowhere.toml: cannot be read"),
        ({"chip": 7}, TypeError, r"use\(7\): expected the name of a chip"),
        ({"count": 0}, ValueError, r"use\(count=0\): the number of devices must be a whole number from 1 on"),
        ({"count": 1.5}, ValueError, "count=1.5"),
        ({"count": True}, ValueError, "count=True"),
    ],
)
def test_what_cannot_be_used(arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        npu.use(**arguments)
    assert runtime.devices[0].spec.name == "mini" and torch.npu.device_count() == 1


def test_devices_are_told_apart() -> None:
    npu.use("mini", count=3)
    assert torch.npu.device_count() == 3
    x = torch.ones(2, device="npu:2")
    assert (x * 2).device == torch.zeros_like(x).device == x.clone().device == torch.device("npu:2")
    assert x.to("npu").device == torch.device("npu:0")
    with torch.npu.device(1):
        assert torch.ones(1, device="npu").device.index == torch.npu.current_device() == 1
    with torch.npu.device_of(x):
        assert torch.npu.current_device() == 2
    torch.npu.set_device("npu:1")
    assert torch.ones(1, device="npu").device.index == 1
    with pytest.raises(RuntimeError, match="found at least two devices, npu:2 and npu:0"):
        x + torch.ones(2, device="npu:0")
    with pytest.raises(RuntimeError, match="invalid device ordinal 3; this process has 3"):
        torch.npu.set_device(3)
    with pytest.raises(ValueError, match="expected an npu device, got cpu"):
        torch.npu.set_device("cpu")


def test_live_tensors_move_to_the_new_chip() -> None:
    x = torch.arange(1000.0, device="npu")
    before = torch.npu.memory_allocated()
    npu.use("ascend-910b2")
    assert torch.npu.memory_allocated() == before and torch.npu.mem_get_info()[1] == 64 * 2**30
    assert (x + 1).sum().item() == 500_500
    del x
    assert torch.npu.memory_allocated() == before - 4096


def test_a_chip_that_is_too_small_is_not_taken(tmp_path: Path) -> None:
    npu.use("ascend-910b2")
    x = torch.zeros(100 * 2**20, dtype=torch.int8, device="npu")
    with pytest.raises(torch.OutOfMemoryError):
        npu.use("mini")
    assert runtime.devices[0].spec.name == "ascend-910b2" and (x[:3] + 1).tolist() == [1, 1, 1]


def test_fewer_devices_than_tensors_live_on() -> None:
    npu.use("mini", count=2)
    x = torch.ones(2, device="npu:1")
    with pytest.raises(RuntimeError, match=r"use\(count=1\): tensors still live on npu:1; delete them first"):
        npu.use("mini")
    assert x.sum().item() == 2


def test_not_inside_a_ledger() -> None:
    with npu.ledger(), pytest.raises(RuntimeError, match="leave the ledger first"):
        npu.use("mini")


def test_clocks_start_at_zero_and_seeds_stay() -> None:
    torch.manual_seed(7)
    torch.ones(100, device="npu").sum().item()
    assert runtime.host.now > 0
    npu.use("mini")
    assert runtime.host.now == 0 and torch.npu.initial_seed() == 7


def test_properties() -> None:
    npu.use("ascend-910b2")
    properties = torch.npu.get_device_properties()
    assert properties.total_memory == 64 * 2**30 and properties.cube_core_num == 24 and properties.vector_core_num == 48
    assert "total_memory=65536MB, cube_core_num=24" in repr(properties)
    assert torch.npu.is_bf16_supported() and torch.npu.is_available()
    npu.use("ascend-910a")
    assert not torch.npu.is_bf16_supported()
