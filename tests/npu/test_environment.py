"""torch_npu's environment variables: obeyed, warned of, or refused."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from course_lib import npu
from course_lib.npu import environment

MIB = 2**20
MINE = [*environment.WITHOUT_EFFECT, "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_LAUNCH_BLOCKING", "PYTORCH_NPU_ALLOC_CONF", "TORCH_NPU_DISABLED_WARNING"]
ALLOC = "PYTORCH_NPU_ALLOC_CONF"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in MINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_warned", set())
    yield
    monkeypatch.undo()
    npu.use("mini")


@pytest.mark.parametrize(("value", "count", "there"), [("0,1", 8, 2), ("4, 6,7", 8, 3), ("0,1,2", 2, 2), ("3", 1, 1)])
def test_visible_devices_limit_the_count(monkeypatch, value, count, there):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", value)
    npu.use("mini", count=count)
    assert torch.npu.device_count() == there
    with pytest.raises(RuntimeError, match=f"this process has {there}"):
        torch.empty(1, device=f"npu:{there}")


def test_blocking_launches(monkeypatch):
    spent = {}
    for blocking in ("0", "1"):
        monkeypatch.setenv("ASCEND_LAUNCH_BLOCKING", blocking)
        npu.use("mini")
        x = torch.zeros(256, 256, device="npu", dtype=torch.float16)
        with npu.ledger() as ledger:
            for stream in (torch.npu.current_stream(), torch.npu.Stream()):
                with torch.npu.stream(stream):
                    x @ x
                    assert stream.query() == (blocking == "1")
            torch.npu.synchronize()
        first, second = ledger.records
        spent[blocking] = second.launched - first.launched
        assert (spent[blocking] >= first.cost.ps) == (blocking == "1")
    assert spent["1"] > spent["0"]


def block(kib):
    return torch.empty(kib * 1024, device="npu", dtype=torch.int8)


def test_an_oversize_block_is_not_cut(monkeypatch):
    def reserved(conf):  # on chip mini MiB of the option are KiB, as for the segments
        monkeypatch.setenv(ALLOC, conf)
        npu.use("mini")
        block(64)
        small = block(24)
        return torch.npu.memory_reserved() // 1024, torch.npu.memory_stats(), small

    assert reserved("")[0] == 64  # the small one lies in the large one's segment
    total, stats, small = reserved("max_split_size_mb:32")
    assert total == 88 and stats["max_split_size"] == 32 * 1024 and stats["inactive_split.all.current"] == 0
    assert stats["segment.large_pool.current"] == 2
    large = block(60)  # close enough in size: the oversize block serves it
    assert torch.npu.memory_reserved() // 1024 == 88
    del small, large
    torch.npu.empty_cache()
    assert torch.npu.memory_reserved() == torch.npu.memory_allocated() == 0


def test_unused_segments_go_back_early(monkeypatch):
    reserved = []
    for conf in ("", "garbage_collection_threshold:0.5"):
        monkeypatch.setenv(ALLOC, conf)
        npu.use("mini")
        for mib in (10, 12, 14, 16):
            block(mib * 1024)
        reserved.append(torch.npu.memory_reserved() // MIB)
    assert reserved == [52, 30]


def test_a_share_of_the_memory(monkeypatch):
    monkeypatch.setenv(ALLOC, "per_process_memory_fraction:0.25")
    spec = npu.use("mini")
    with pytest.raises(torch.OutOfMemoryError, match="allowed"):
        torch.empty(int(spec.memory_bytes) // 2, device="npu", dtype=torch.int8)


MALFORMED = {
    "ASCEND_RT_VISIBLE_DEVICES": ("", "0,", "a", "-1", "1,1", "0-3"),
    "ASCEND_LAUNCH_BLOCKING": ("yes", "2"),
    "TASK_QUEUE_ENABLE": ("3",),
    ALLOC: ("max_split_size_mb", "max_split_size_mb:x", "max_split_size_mb:20", "max_split_size:64", "garbage_collection_threshold:1.0",
            "garbage_collection_threshold:0", "per_process_memory_fraction:1.5", "expandable_segments:1"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in MALFORMED.items() for value in values])
def test_malformed_values_are_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name}"):
        npu.use("mini")
    assert torch.npu.device_count() == 1  # the devices stay as they were


def test_what_has_no_effect_is_said_once(monkeypatch):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    monkeypatch.setenv(ALLOC, "expandable_segments:True,max_split_size_mb:64")
    with pytest.warns(UserWarning, match="without effect.* TASK_QUEUE_ENABLE=2, PYTORCH_NPU_ALLOC_CONF=expandable_segments:True ") as seen:
        npu.use("mini")
    assert len(seen) == 1 and "max_split" not in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        npu.use("mini")


QUIET = {"TASK_QUEUE_ENABLE": "1", "INF_NAN_MODE_ENABLE": "1", "ASCEND_LAUNCH_BLOCKING": "0", ALLOC: "expandable_segments:False", "ASCEND_HOME_PATH": "/opt/cann"}


def test_no_warning_for_what_is_so_anyway(monkeypatch):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        npu.use("mini")
        monkeypatch.setenv("TASK_QUEUE_ENABLE", "0")
        monkeypatch.setenv("TORCH_NPU_DISABLED_WARNING", "1")
        npu.use("mini")


def run(code, **variables):
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False)


def test_at_the_import():
    done = run("import torch; from course_lib import npu; npu.use('mini', count=4); print(torch.npu.device_count())", ASCEND_RT_VISIBLE_DEVICES="1,2", NPU_ASD_ENABLE="2")
    assert done.stdout.strip() == "2" and "NPU_ASD_ENABLE=2" in done.stderr
    done = run("import course_lib.npu", ASCEND_RT_VISIBLE_DEVICES="first")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("ValueError: ASCEND_RT_VISIBLE_DEVICES='first'")
