"""One rank alone: it is told that it is one of thousands, and agrees with the real ranks where there are as many."""

import pytest
import torch
import torch.distributed as dist

from course_lib.parallel import launch
from course_lib.parallel.alone import alone, one_of
from course_lib.parallel.failures import RankError
from course_lib.parallel.mesh import Combined, Layout
from tests.parallel.same import shape
from tests.parallel.test_mesh import here

GQA = shape("micro", layers=4, tied=False, heads=4, kv_heads=2)
MIB = 2**20


def who(nbytes: int) -> tuple[int, int, float, int]:
    """Rank, ranks, seconds of an all-reduce over all of them, and bytes that its communicator took."""
    from course_lib import npu
    from course_lib.npu import runtime

    x = torch.zeros(nbytes // 4, device="npu")
    with npu.ledger() as ledger:
        dist.all_reduce(x)
    return dist.get_rank(), dist.get_world_size(), ledger.communication().exposed, runtime.devices[0].memory.outside


@pytest.mark.parametrize("ranks, rank", [(8, 0), (2048, 5), (16384, 16383)])
def test_one_rank_of_many(ranks: int, rank: int) -> None:
    """All-reduce of 64 MiB: 2·64·(P − 1)/P MiB pass the slowest link, over which that takes 2 to 4 ms."""
    found, among, seconds, taken = alone(who, 64 * MIB, ranks=ranks, rank=rank, system="h800-cluster")
    assert (found, among) == (rank, ranks)
    slowest = 160e9 if ranks == 8 else 40e9
    least = 2 * 64 * MIB * (1 - 1 / 8) / 160e9 if ranks == 8 else 2 * 64 * MIB / 8 / slowest
    assert least < seconds < 4e-3 + least
    assert taken == 200 * MIB  # HCCL_BUFFSIZE


def test_buffer_size_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_BUFFSIZE", "120")
    assert alone(who, MIB, ranks=64, system="atlas-800t-a2")[3] == 120 * MIB


def needs_a_number() -> float:
    return torch.ones(2, device="npu").sum().item()


def test_errors_name_the_rank() -> None:
    with pytest.raises(RankError, match="shape-only") as caught:
        alone(needs_a_number, ranks=2048, rank=7, system="h800-cluster")
    assert "this was rank 7 of 2048, alone" in str(caught.value)
    for ranks, rank in ((4, 4), (4, -1), (0, 0), (4, 1.0)):
        with pytest.raises(ValueError, match="the rank from 0 to ranks - 1"):
            alone(who, MIB, ranks=ranks, rank=rank)
    with pytest.raises(ValueError, match="no system 'moon'"):
        alone(who, MIB, ranks=4, system="moon")


def test_a_loaded_device_is_refused() -> None:
    import course_lib.npu  # noqa: F401

    with pytest.raises(RuntimeError, match="alone"), one_of(2048, 0, "h800-cluster"):
        pass


def elapsed(layout: Layout, zero: int) -> int:
    """Emulated picoseconds of a step; tokens come from the host, as shapes."""
    from course_lib import npu

    trainer = Combined(GQA, layout, 8, here("npu"), torch.optim.AdamW, microbatches=2, zero=zero, shapes=True)
    tokens = torch.zeros(8, GQA.context, dtype=torch.int64, device="meta")
    with npu.ledger() as ledger:
        trainer.step(tokens, tokens)
    return ledger.elapsed_ps


@pytest.mark.parametrize("layout", [Layout(dp=2, tp=2), Layout(dp=4)])
def test_alone_takes_as_long_as_among_others(layout: Layout) -> None:
    """Ranks that do the same at the same time: one alone has the emulated time of four processes, to the picosecond."""
    together = launch(elapsed, layout, 1, ranks=4, system="mini-node", numerics=False)
    assert together == [alone(elapsed, layout, 1, ranks=4, rank=rank, system="mini-node") for rank in (0, 3)] * 2
