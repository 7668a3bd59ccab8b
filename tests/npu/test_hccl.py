"""torch.distributed on emulated links: values against torch on the host, times against the cost model, errors in words."""

import re
from typing import Any

import pytest
import torch

from course_lib.chip import load_system
from course_lib.chip.collectives import transfer
from course_lib.parallel import RankError, launch

RANKS = 4


def given(rank: int, n: int = 24, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What ``rank`` brings; every rank can reckon it, and so the oracle can."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(rank)) * 8
    return x.to(dtype) if dtype.is_floating_point else x.round().to(dtype)


def on_npu(rank: int, **kind: Any) -> torch.Tensor:
    return given(rank, **kind).to("npu")


def collectives() -> dict[str, Any]:
    """Every collective once, on each rank; results on the host."""
    import torch.distributed as dist
    import torch.distributed._functional_collectives as functional

    from course_lib import npu

    rank, world = dist.get_rank(), dist.get_world_size()
    x, out = on_npu(rank), {}

    def note(name: str, value: Any) -> None:
        out[name] = [v.cpu() for v in value] if isinstance(value, (list, tuple)) else value.cpu()

    for op in ("SUM", "AVG", "PRODUCT", "MIN", "MAX"):
        dist.all_reduce(y := x.clone(), op=getattr(dist.ReduceOp, op))
        note(f"all_reduce {op}", y)
    for op in ("BAND", "BOR", "BXOR"):
        dist.all_reduce(y := on_npu(rank, dtype=torch.int32), op=getattr(dist.ReduceOp, op))
        note(f"all_reduce {op}", y)
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.float8_e4m3fn):
        dist.all_reduce(y := on_npu(rank, dtype=dtype))
        note(f"all_reduce {dtype}", y.float() if y.is_floating_point() else y)  # float8 cannot be pickled
    dist.all_reduce(y := on_npu(rank, n=40_001))  # not in one step, and not divisible
    note("all_reduce long", y)
    dist.broadcast(y := x.clone(), src=2)
    note("broadcast", y)
    dist.reduce(y := x.clone(), dst=1)
    note("reduce", y)
    dist.all_gather(ys := [torch.empty_like(x) for _ in range(world)], x)
    note("all_gather", ys)
    dist.all_gather(ys := [torch.empty(i + 1, device="npu") for i in range(world)], on_npu(rank, n=rank + 1))
    note("all_gather unequal", ys)
    dist.all_gather_into_tensor(y := x.new_empty(world * 24), x)
    note("all_gather_into_tensor", y)
    dist.reduce_scatter_tensor(y := x.new_empty(24 // world), x)
    note("reduce_scatter_tensor", y)
    dist.reduce_scatter(y := x.new_empty(24 // world), list(x.chunk(world)))
    note("reduce_scatter", y)
    dist.all_to_all_single(y := torch.empty_like(x), x)
    note("all_to_all_single", y)
    sent = [(rank + i) % world for i in range(world)]  # 0 to 3 rows to each
    received = [(i + rank) % world for i in range(world)]
    dist.all_to_all_single(y := x.new_empty(sum(received)), x[: sum(sent)].clone(), received, sent)
    note("all_to_all_single unequal", y)
    dist.all_to_all(ys := [x.new_empty(n) for n in received], list(x[: sum(sent)].split(sent)))
    note("all_to_all", ys)
    ys = [torch.empty_like(x) for _ in range(world)] if rank == 3 else None
    dist.gather(x, ys, dst=3)
    note("gather", ys or [])
    dist.scatter(y := x.new_empty(24 // world), list(x.chunk(world)) if rank == 0 else None, src=0)
    note("scatter", y)
    with dist._coalescing_manager():
        dist.all_reduce(a := x.clone())
        dist.all_reduce(b := 2 * x)
    note("coalesced", [a, b])
    back = x.new_empty(24)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, (rank + 1) % world), dist.P2POp(dist.irecv, back, (rank - 1) % world)]):
        work.wait()
    note("ring shift", back)
    note("functional all_reduce", functional.all_reduce(x, "avg", dist.group.WORLD) + 0)
    note("functional all_gather", functional.all_gather_tensor(x, 0, dist.group.WORLD) + 0)
    note("functional reduce_scatter", functional.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD) + 0)
    w = x.clone().requires_grad_()
    swapped = functional.all_to_all_single_autograd(w, None, None, dist.group.WORLD)
    (swapped * (rank + 1)).sum().backward()
    note("functional all_to_all", swapped.detach() + 0)
    note("its gradient", w.grad)
    objects: list = [None] * world
    dist.all_gather_object(objects, {"rank": rank})
    out["objects"] = objects
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    dist.all_reduce(y := x.clone(), group=pairs[rank // 2])
    note("sub-group", y)
    dist.barrier()
    assert npu.EMULATED and y.device.type == "npu"
    return out


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return launch(collectives, ranks=RANKS)


def everybody(**kind: Any) -> list[torch.Tensor]:
    return [given(rank, **kind) for rank in range(RANKS)]


def in_order(op: Any, parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = op(total, part)
    return total


def test_reductions(results: list[dict]) -> None:
    xs = everybody()
    expected = {
        "SUM": in_order(torch.add, xs), "AVG": in_order(torch.add, xs) / RANKS, "PRODUCT": in_order(torch.mul, xs),
        "MIN": in_order(torch.minimum, xs), "MAX": in_order(torch.maximum, xs),
    }  # fmt: skip
    whole = everybody(dtype=torch.int32)
    for name, op in (("BAND", torch.bitwise_and), ("BOR", torch.bitwise_or), ("BXOR", torch.bitwise_xor)):
        expected[name] = in_order(op, whole)
    for out in results:
        for name, value in expected.items():
            assert torch.equal(out[f"all_reduce {name}"], value), name
        assert torch.equal(out["all_reduce long"], in_order(torch.add, everybody(n=40_001)))
        assert torch.equal(out["all_reduce torch.int64"], in_order(torch.add, everybody(dtype=torch.int64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_few_bits_are_added_in_float32_and_rounded_once(results: list[dict], dtype: torch.dtype) -> None:
    expected = in_order(torch.add, [x.float() for x in everybody(dtype=dtype)]).to(dtype)
    for out in results:
        assert torch.equal(out[f"all_reduce {dtype}"], expected.float())


def test_moves(results: list[dict]) -> None:
    xs = everybody()
    total, each = in_order(torch.add, xs), 24 // RANKS
    for rank, out in enumerate(results):
        mine = slice(rank * each, (rank + 1) * each)
        received = [(i + rank) % RANKS for i in range(RANKS)]
        starts = [sum((i + j) % RANKS for j in range(rank)) for i in range(RANKS)]
        unequal = [xs[i][starts[i] : starts[i] + received[i]] for i in range(RANKS)]
        expected = {
            "broadcast": xs[2], "all_gather": xs, "all_gather unequal": [given(i, n=i + 1) for i in range(RANKS)],
            "all_gather_into_tensor": torch.cat(xs), "reduce_scatter_tensor": total[mine], "reduce_scatter": total[mine],
            "all_to_all_single": torch.cat([x[mine] for x in xs]), "all_to_all_single unequal": torch.cat(unequal), "all_to_all": unequal,
            "gather": xs if rank == 3 else [], "scatter": xs[0][mine], "coalesced": [total, in_order(torch.add, [2 * x for x in xs])],
            "ring shift": xs[rank - 1], "functional all_reduce": total / RANKS, "functional all_gather": torch.cat(xs),
            "functional reduce_scatter": total[mine], "functional all_to_all": torch.cat([x[mine] for x in xs]),
            "its gradient": torch.arange(1.0, RANKS + 1).repeat_interleave(each),
            "sub-group": xs[rank // 2 * 2] + xs[rank // 2 * 2 + 1], "reduce": total if rank == 1 else None,
        }  # fmt: skip
        for name, value in expected.items():
            torch.testing.assert_close(out[name], value, rtol=0, atol=0) if value is not None else None
        assert out["objects"] == [{"rank": i} for i in range(RANKS)]


# -- time ---------------------------------------------------------------------------------------------


def timed() -> dict[str, Any]:
    """One rank comes late; collectives alone, beside compute, and beside each other."""
    import torch.distributed as dist

    from course_lib import npu

    rank = dist.get_rank()
    x, big = torch.zeros(250_000, device="npu"), torch.randn(512, 512, device="npu")
    other = dist.new_group(list(range(4)))
    dist.all_reduce(x)
    dist.all_reduce(x, group=other)
    dist.barrier()
    out: dict[str, Any] = {}

    def records(ledger: Any) -> list[tuple]:
        return [(r.op, r.phase, r.start, r.cost.ps, r.cost.bound, r.stream) for r in ledger.records]

    with npu.ledger() as ledger:
        if rank == 3:
            for _ in range(4):
                big @ big
        dist.all_reduce(x)
        torch.npu.synchronize()
    out["late"], out["elapsed"] = records(ledger), ledger.elapsed_ps
    out["energy"] = ledger.totals().energy_j
    dist.barrier()
    with npu.ledger() as ledger:
        work = dist.all_reduce(x, async_op=True)
        big @ big
        work.wait()
        x + 1
    out["beside compute"] = records(ledger)
    dist.barrier()
    with npu.ledger() as ledger:
        first = dist.all_reduce(x, async_op=True)
        second = dist.all_reduce(x.clone(), async_op=True, group=other)
        first.wait(), second.wait()
        dist.all_reduce(x[:1000].clone())
    out["two at once"] = records(ledger)
    out["free"] = torch.npu.mem_get_info()[0] + torch.npu.memory_reserved()
    out["total"] = torch.npu.mem_get_info()[1]
    return out


@pytest.fixture(scope="module")
def times() -> list[dict[str, Any]]:
    return launch(timed, ranks=RANKS)


def of(records: list[tuple], name: str) -> list[tuple]:
    return [r for r in records if r[0] == name]


ALONE = transfer(load_system("mini-node"), "all_reduce", 1_000_000, tuple(range(RANKS)))


def test_a_collective_starts_when_the_last_rank_is_there(times: list[dict]) -> None:
    (reference,) = of(times[0]["late"], "all_reduce")
    assert reference[3:5] == (ALONE.ps, "mini link") and reference[1] == "communication"
    for rank, out in enumerate(times):
        (got,) = of(out["late"], "all_reduce")
        assert got == reference  # same start, same duration, to the picosecond
        waits = of(out["late"], "wait")
        assert len(waits) == (rank < 3)
        if rank < 3:
            assert waits[0][1] == waits[0][4] == "waiting" and waits[0][2] + waits[0][3] == got[2]
    (product,) = of(times[3]["late"], "mm")[-1:]
    assert reference[2] >= product[2] + product[3]
    assert times[0]["energy"] is None  # nobody has published what a link takes


def test_compute_goes_on_beside_a_collective_until_it_is_waited_for(times: list[dict]) -> None:
    for out in times:
        (sent,), (product,), (after,) = (of(out["beside compute"], name) for name in ("all_reduce", "mm", "add"))
        assert product[2] < sent[2] + sent[3] and product[5] != sent[5]
        assert after[2] >= sent[2] + sent[3]


def test_two_at_once_share_the_links(times: list[dict]) -> None:
    for out in times:
        first, second, third = of(out["two at once"], "all_reduce")
        assert first == of(times[0]["two at once"], "all_reduce")[0]
        assert first[3] == ALONE.ps
        assert second[2] < first[2] + first[3]
        left = max(0, ALONE.up_ps - (second[2] - first[2]))  # of the first, when the second starts
        assert second[3] == ALONE.ps + min(left, ALONE.up_ps)
        assert third[2] >= max(first[2] + first[3], second[2] + second[3])


def test_each_communicator_takes_a_buffer(times: list[dict]) -> None:
    for out in times:
        assert out["total"] - out["free"] == 2 * (200 * 2**20 // 1024)  # 200 MB, shrunk as the chip's memory is


# -- one rank of many ---------------------------------------------------------------------------------


def test_one_rank_stands_for_all(tmp_path: Any) -> None:
    """In a process of its own: the fake group on a system with a thousand nodes."""
    (got,) = launch(one_of_many, ranks=1, numerics=False)
    system = load_system("atlas-800t-a2").having(nodes=1024)
    assert got == transfer(system, "all_reduce", 4 * 10**6, tuple(range(8192))).ps


def one_of_many() -> int:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from course_lib import npu
    from course_lib.chip import load_system

    dist.destroy_process_group()
    npu.use(system=load_system("atlas-800t-a2").having(nodes=1024), numerics=False)
    dist.init_process_group("fake", rank=5, world_size=8192, store=FakeStore())
    with npu.ledger() as ledger:
        dist.all_reduce(torch.empty(10**6, device="npu"))
    return [r.cost.ps for r in ledger.records if r.op == "all_reduce"][0]


# -- errors -------------------------------------------------------------------------------------------


def mismatch(case: str) -> None:
    import torch.distributed as dist

    rank = dist.get_rank()
    x = torch.zeros(8, device="npu")
    if case == "kind":
        dist.broadcast(x, 0) if rank == 1 else dist.all_reduce(x)
    elif case == "shape":
        dist.all_reduce(x[: 8 - rank].clone())
    elif case == "dtype":
        dist.all_reduce(x.to(torch.int32) if rank else x)
    elif case == "splits":
        dist.all_to_all_single(torch.empty(8 - rank, device="npu"), x, [4, 4 - rank], [4, 4])
    elif case == "message":
        dist.send(x, 1) if rank == 0 else dist.recv(x[:4].clone(), 0)
    elif case == "host":
        dist.all_reduce(torch.zeros(8))
    elif case == "premul":
        dist.all_reduce(x, op=dist._make_nccl_premul_sum(2.0))
    elif case == "any source":
        dist.recv(x)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("kind", "rank 0: all_reduce of 8 × float32, SUM.*rank 1: broadcast of 8 × float32"),
        ("shape", "rank 0: all_reduce of 8 .*rank 1: all_reduce of 7 "),
        ("dtype", "rank 0: .*float32.*rank 1: .*int32"),
        ("splits", r"rank 1: it expects \[16, 12\] bytes.*send it \[16, 16\]"),
        ("message", "send of 8 × float32.*send of 4 × float32"),
        ("premul", "PREMUL_SUM is not supported"),
        ("any source", "needs a source"),
    ],
)
def test_mismatches_are_named(case: str, words: str) -> None:
    with pytest.raises(RankError) as error:
        launch(mismatch, case, ranks=2, timeout=30)
    text = " ".join(str(error.value).split())
    assert re.search(words, text), text


def test_host_tensors_are_refused() -> None:
    with pytest.raises(RankError, match="npu"):
        launch(mismatch, "host", ranks=2, timeout=30)


def places() -> list[str]:
    x = torch.ones(3)
    there = [x.to("npu"), x.npu(), torch.tensor([1.0], device="npu"), torch.zeros(3, device="npu"), torch.nn.Linear(2, 2).to("npu").weight]
    return [str(t.device) for t in [*there, there[1].to("npu"), there[1].to(torch.float16)]]


def test_npu_without_an_index_is_the_ranks_own_device() -> None:
    for rank, devices in enumerate(launch(places, ranks=3)):
        assert devices == [f"npu:{rank}"] * 7
