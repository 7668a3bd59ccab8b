"""launch: results by rank, output in order, and whatever fails ends in seconds, named, with no process left."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from course_lib.llm.config import preset
from course_lib.llm.model import Transformer
from course_lib.parallel import RankError, launch

ROOT = Path(__file__).parents[2]
SERVERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")


def helpers() -> set[psutil.Process]:
    """Descendants of this process but the forkserver and its tracker, which stay for the next launch."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            is_server = any(name in command for name in SERVERS) and process.parent() == psutil.Process()
        except psutil.NoSuchProcess:
            continue
        if not is_server and process.status() != psutil.STATUS_ZOMBIE:
            found.add(process)
    return found


@pytest.fixture(autouse=True)
def nobody_left() -> Iterator[None]:
    before = helpers()
    yield
    psutil.wait_procs(helpers() - before, timeout=1)
    assert helpers() - before == set()


def everyone(value: int) -> dict[str, object]:
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return {name: os.environ[name] for name in names} | {
        "total": total,
        "threads": torch.get_num_threads(),
        "backend": dist.get_backend(),
    }


def test_results_by_rank_and_the_environment_of_torchrun() -> None:
    results = launch(everyone, 10, ranks=3, device="cpu")
    assert [r["RANK"] for r in results] == [r["LOCAL_RANK"] for r in results] == ["0", "1", "2"]
    for r in results:
        assert (r["WORLD_SIZE"], r["LOCAL_WORLD_SIZE"], r["MASTER_ADDR"]) == ("3", "3", "127.0.0.1")
        assert (r["total"].item(), r["threads"], r["backend"]) == (33, 1, "gloo")
    assert "RANK" not in os.environ


def on_npu(x: torch.Tensor) -> tuple[torch.Tensor, int, str | None]:
    mine = x.to("npu") * (dist.get_rank() + 1)
    dist.all_reduce(mine)
    return mine, torch.npu.current_device(), os.environ.get("COURSE_SYSTEM")


def test_npu_of_a_system_and_tensors_back_on_the_cpu() -> None:
    x = torch.arange(4.0)
    results = launch(on_npu, x, ranks=2, system="mini-node")
    assert [(t.device.type, device, system) for t, device, system in results] == [
        ("cpu", at, "mini-node") for at in (0, 1)
    ]
    assert all(torch.equal(t, 3 * x) for t, _, _ in results)
    without = launch(on_npu, x, ranks=2, system="mini-node", numerics=False)
    assert [(t.device.type, t.shape) for t, _, _ in without] == [("meta", (4,))] * 2


def big_and_workers() -> tuple[torch.Tensor, list[float]]:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    loader = DataLoader(torch.arange(4.0), num_workers=1)
    return torch.ones(2**24), [x.item() for x in loader]


def test_big_results_workers_and_processes_that_a_rank_leaves_behind() -> None:
    for big, loaded in launch(big_and_workers, ranks=2, device="cpu"):
        assert big.sum() == 2**24
        assert loaded == [0, 1, 2, 3]


def test_two_launches_at_a_time() -> None:
    results = {}
    threads = [
        threading.Thread(target=lambda at=at: results.update({at: launch(everyone, at, ranks=2, device="cpu")}))
        for at in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {at: r[1]["total"].item() for at, r in results.items()} == {0: 1, 1: 3}


# -- output ---------------------------------------------------------------------------------------------------------


def speak(speakers: list[int], fails: bool) -> None:
    if dist.get_rank() in speakers:
        time.sleep(0.1 * (2 - dist.get_rank()))
        os.write(1, b"low\n")
        print("high", dist.get_rank())
        print("oh", file=sys.stderr)
    dist.barrier()
    if fails:
        raise ValueError("after all")


def test_output_comes_rank_by_rank(capsys: pytest.CaptureFixture) -> None:
    launch(speak, [0, 1], False, ranks=2, device="cpu")
    out, err = capsys.readouterr()
    assert out == "[rank 0] low\n[rank 0] high 0\n[rank 1] low\n[rank 1] high 1\n"
    assert err == "[rank 0] oh\n[rank 1] oh\n"


def test_one_speaker_needs_no_name_and_is_heard_when_it_fails(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(RankError, match="rank 0 of 2 raised ValueError: after all"):  # both do: the lower one
        launch(speak, [1], True, ranks=2, device="cpu")
    assert capsys.readouterr() == ("low\nhigh 1\n", "oh\n")


# -- failures -------------------------------------------------------------------------------------------------------


class Bad(Exception):
    pass


def failing(how: str) -> None:
    if dist.get_rank() == 1:
        {
            "raise": lambda: (_ for _ in ()).throw(Bad("no good")),
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "abort": os.abort,
            "segfault": lambda: ctypes.string_at(0),
            "sys.exit": lambda: sys.exit(0),
            "os._exit": lambda: os._exit(0),
            "return": lambda: None,
        }[how]()
        return
    if how == "return":
        time.sleep(0.2)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "rank 1 of 3 raised Bad: no good"),
        ("kill", "rank 1 of 3 was killed by SIGKILL"),
        ("abort", "rank 1 of 3 was killed by SIGABRT"),
        ("segfault", "rank 1 of 3 was killed by SIGSEGV"),
        ("sys.exit", "rank 1 of 3 called sys.exit(0)"),
        ("os._exit", "rank 1 of 3 ended with exit code 0 before its function returned"),
        ("return", "(rank 1 had returned: does every rank call the same collectives?)"),
    ],
)
def test_a_failing_rank_is_named_and_stops_all(how: str, message: str) -> None:
    launch(int, ranks=1, device="cpu")  # the forkserver is there
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        launch(failing, how, ranks=3, device="cpu")
    assert time.monotonic() - start < 10
    assert message in str(caught.value)
    if how == "raise":
        assert (caught.value.rank, type(caught.value.__cause__)) == (1, Bad)
        assert "In rank 1:\nTraceback" in str(caught.value)
        assert '"raise": lambda: (_ for _ in ()).throw(Bad("no good"))' in str(caught.value)
        assert "parallel/rank.py" not in str(caught.value)


def late() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    elif dist.get_rank() == 2:
        dist.all_reduce(torch.ones(1))


def test_time_runs_out_and_says_for_whom_and_where() -> None:
    with pytest.raises(RankError, match="ranks 1, 2 of 3 still running after 2 s") as caught:
        launch(late, ranks=3, device="cpu", timeout=2)
    first, second = str(caught.value).split("rank 1 was in\n")[1].split("rank 2 was in\n")
    assert first.strip().endswith("in late")
    assert "in all_reduce" in second
    assert caught.value.rank == 1


def mismatched() -> None:
    x = torch.ones(4, device="npu")
    dist.all_reduce(x) if dist.get_rank() != 1 else dist.broadcast(x, 0)


def test_mismatched_collectives_on_npu_name_the_rank() -> None:
    with pytest.raises(RankError, match="rank 1"):
        launch(mismatched, ranks=3, system="mini-node", timeout=30)


def test_bad_arguments_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (
        ({"ranks": 0}, "expected a whole number of ranks"),
        ({"timeout": 0}, "some seconds"),
        ({"device": "tpu"}, "unknown device 'tpu'; expected npu, cuda, cpu"),
        ({"system": "atlantis"}, "no system 'atlantis'; expected one of .*mini-node"),
        ({"device": "cpu", "system": "mini-node"}, "leave them out for 'cpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            launch(int, **options)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="this process is a rank already"):
        launch(int, device="cpu")


# -- the launching process ------------------------------------------------------------------------------------------


def sleep() -> None:
    if dist.get_rank() == 0:
        os.kill(int(os.environ["LAUNCHER"]), signal.SIGINT)
    time.sleep(60)


def test_an_interrupt_stops_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER", str(os.getpid()))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch(sleep, ranks=2, device="cpu")
    assert time.monotonic() - start < 20


SCRIPT = """
import os, time, torch.distributed as dist
from course_lib.parallel import launch
def wait(folder):
    open(f"{folder}/{dist.get_rank()}-{os.getpid()}", "w").close()
    time.sleep(60)
launch(wait, os.environ["FOLDER"], ranks=2, device="cpu")
"""  # with no guard: a main module that ran again in its ranks would launch without end


def test_ranks_end_with_who_launched_them(tmp_path: Path) -> None:
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    pids.mkdir()
    parent = subprocess.Popen(
        [sys.executable, str(script)], env=os.environ | {"FOLDER": str(pids), "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 60
    while len(list(pids.iterdir())) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert {int(file.name.split("-")[1]) for file in pids.iterdir()} < {child.pid for child in children}
    parent.kill()
    parent.wait()
    assert psutil.wait_procs(children, timeout=10)[1] == []


# -- memory ---------------------------------------------------------------------------------------------------------


def footprint() -> int:
    """Bytes of this process, of shared pages its part, after a step of the course's model."""
    torch.manual_seed(0)
    config = preset("small", vocab_size=512)
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, config.context, dtype=torch.long)).sum().backward()
    optimizer.step()
    dist.barrier()
    size = psutil.Process().memory_full_info().pss
    dist.barrier()
    return size


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PSS is Linux's")
def test_eight_ranks_of_the_model_in_4_gb() -> None:
    assert sum(launch(footprint, ranks=8, device="cpu")) < 4e9
