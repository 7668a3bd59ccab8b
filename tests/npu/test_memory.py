"""The caching allocator: its rules by hand, its statistics by a recount, its errors by their words."""

import gc
import random
import threading

import pytest
import torch

from course_lib import npu
from course_lib.npu import runtime
from course_lib.npu.memory import GIB, KIB, MIB, CachingAllocator, format_size, scale_of

BIG = 64 * GIB  # a chip on which the constants are torch_npu's own


def allocated(memory: CachingAllocator) -> int:
    return memory.read("allocated_bytes", "current")


@pytest.mark.parametrize(
    "nbytes, block, segment",
    [
        (1, 512, 2 * MIB), (512, 512, 2 * MIB), (513, 1024, 2 * MIB), (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB), (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB, 12 * MIB), (GIB + 1, GIB + 512, GIB + 2 * MIB),
    ],
)  # fmt: skip
def test_rounding_and_segments(nbytes: int, block: int, segment: int) -> None:
    memory = CachingAllocator(BIG)
    given = memory.allocate(nbytes)
    assert given.size == block
    assert memory.read("reserved_bytes", "current") == segment and memory.read("requested_bytes", "current") == nbytes


def test_nothing_takes_nothing() -> None:
    memory = CachingAllocator(BIG)
    memory.free(memory.allocate(0))
    assert not any(memory.stats()[key] for key in ("allocation.all.allocated", "segment.all.allocated"))


def test_pools_do_not_mix() -> None:
    memory = CachingAllocator(BIG)
    small, large = memory.allocate(512), memory.allocate(2 * MIB)
    assert (small.segment.pool, large.segment.pool) == ("small", "large")
    stats = memory.stats()
    assert stats["allocated_bytes.small_pool.current"] == 512
    assert stats["allocated_bytes.large_pool.current"] == 2 * MIB
    assert stats["segment.all.current"] == 2


def test_a_segment_is_split_and_merged() -> None:
    memory = CachingAllocator(BIG)
    a, b, c = (memory.allocate(512) for _ in range(3))
    assert [x.offset for x in (a, b, c)] == [0, 512, 1024]
    assert memory.read("inactive_split", "current") == 1 and memory.read("inactive_split_bytes", "current") == 2 * MIB - 1536
    memory.free(a), memory.free(c)  # a apart; c joins the rest
    assert memory.read("inactive_split", "current") == 2
    memory.free(b)  # joins both sides: the segment is whole
    assert memory.read("inactive_split", "current") == memory.read("inactive_split_bytes", "current") == 0
    assert memory.allocate(2 * MIB - MIB).offset == 0


def test_best_fit_and_reuse() -> None:
    memory = CachingAllocator(BIG)
    sizes = (4 * KIB, 2 * KIB, 8 * KIB)
    holes = []
    for size in sizes:
        holes.append(memory.allocate(size))
        memory.allocate(512)  # keeps the holes apart
    for hole in holes:
        memory.free(hole)
    assert memory.allocate(1536).address == holes[1].address, "the smallest hole that fits"
    assert memory.allocate(4 * KIB).address == holes[0].address
    assert memory.read("segment", "current") == 1


def test_the_rest_of_a_large_block_is_kept_apart_only_above_a_mebibyte() -> None:
    memory = CachingAllocator(BIG)
    memory.free(memory.allocate(12 * MIB))
    assert memory.allocate(11 * MIB).size == 12 * MIB
    memory = CachingAllocator(BIG)
    memory.free(memory.allocate(12 * MIB))
    assert memory.allocate(10 * MIB).size == 10 * MIB


def test_cached_segments_are_given_back_before_failing() -> None:
    memory = CachingAllocator(BIG)
    memory.limit = 40 * MIB
    memory.free(memory.allocate(30 * MIB))
    assert memory.read("reserved_bytes", "current") == 30 * MIB
    block = memory.allocate(36 * MIB)
    assert (memory.retries, memory.read("reserved_bytes", "current")) == (1, 36 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        memory.allocate(5 * MIB)
    assert (memory.retries, memory.ooms) == (2, 1)
    memory.free(block)
    memory.allocate(5 * MIB)


def test_empty_cache_keeps_segments_in_use() -> None:
    memory = CachingAllocator(BIG)
    kept, gone = memory.allocate(512), memory.allocate(30 * MIB)
    memory.free(gone)
    memory.empty_cache()
    assert memory.read("reserved_bytes", "current") == 2 * MIB and list(memory.segments.values()) == [kept.segment]


@pytest.mark.parametrize("capacity, scale", [(80 * GIB, 1), (64 * GIB, 1), (32 * GIB, 2), (64 * MIB, 1024), (MIB, 1024)])
def test_constants_shrink_with_the_chip(capacity: int, scale: int) -> None:
    assert scale_of(capacity) == scale
    assert CachingAllocator(capacity).large_segment == 20 * MIB // scale


@pytest.mark.parametrize("size, text", [(512, "512 bytes"), (1024, "1024 bytes"), (1536, "1.50 KiB"), (MIB, "1024.00 KiB"), (5 * MIB, "5.00 MiB"), (3 * GIB // 2, "1.50 GiB")])
def test_sizes_in_words(size: int, text: str) -> None:
    assert format_size(size) == text


def test_out_of_memory_in_torch_npus_words() -> None:
    memory = CachingAllocator(64 * GIB, index=3)
    memory.allocate(30 * MIB)
    with pytest.raises(torch.OutOfMemoryError) as error:
        memory.allocate(100 * GIB)
    assert str(error.value) == (
        "NPU out of memory. Tried to allocate 100.00 GiB (NPU 3; 64.00 GiB total capacity; 30.00 MiB already allocated; "
        "30.00 MiB current active; 63.97 GiB free; 30.00 MiB reserved in total by PyTorch)."
        "If reserved memory is >> allocated memory try setting max_split_size_mb to avoid fragmentation."
    )
    memory.limit = 32 * GIB
    with pytest.raises(torch.OutOfMemoryError, match=r"free; 32.00 GiB allowed; 30.00 MiB reserved"):
        memory.allocate(33 * GIB)


KEYS = {
    f"{figure}.{pool}.{which}"
    for figure in ("allocation", "segment", "active", "inactive_split", "allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes")
    for pool in ("all", "large_pool", "small_pool")
    for which in ("current", "peak", "allocated", "freed")
} | {"num_alloc_retries", "num_ooms", "num_oom_rejections", "max_split_size", "oversize_allocations", "oversize_segments"}


def test_statistics_have_torch_npus_keys() -> None:
    found = set(torch.npu.memory_stats())
    assert KEYS <= found
    assert all(key.startswith("requested_bytes.") for key in found - KEYS), "PyTorch's own further figure"


def recount(memory: CachingAllocator, used: list) -> dict[str, int]:
    """The statistics, counted again from blocks and segments; fails if these do not tile."""
    memory.settle()
    free = [(size, block) for pool in memory._free.values() for size, _, block in pool]
    assert all(size == block.size and not block.used for size, block in free)
    blocks = sorted([*used, *(block for _, block in free)], key=lambda b: b.address)
    at = {s.address: s.address for s in memory.segments.values()}
    for block in blocks:
        assert block.address == at[block.segment.address], "a gap or an overlap"
        at[block.segment.address] += block.size
    assert all(at[s.address] == s.address + s.size for s in memory.segments.values())
    split = [block for _, block in free if block.size != block.segment.size]
    return {
        "allocation": len(used), "allocated_bytes": sum(b.size for b in used), "requested_bytes": sum(b.requested for b in used),
        "segment": len(memory.segments), "reserved_bytes": sum(s.size for s in memory.segments.values()),
        "inactive_split": len(split), "inactive_split_bytes": sum(b.size for b in split),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_allocations_keeps_the_books(seed: int) -> None:
    rng = random.Random(seed)
    memory = CachingAllocator(64 * MIB)
    used, peaks, added = [], dict.fromkeys(recount(memory, []), 0), 0
    for step in range(1500):
        roll = rng.random()
        if roll < 0.55:
            nbytes = int(2 ** rng.uniform(0, 24))
            try:
                block = memory.allocate(nbytes)
            except torch.OutOfMemoryError:
                assert memory.read("reserved_bytes", "current") + nbytes > memory.capacity - 20 * KIB
                continue
            assert block.requested == nbytes <= block.size and block.size % 512 == 0
            used.append(block)
            added += block.size
        elif used and roll < 0.98:
            memory.free(used.pop(rng.randrange(len(used))))
        else:
            memory.empty_cache()
        now = recount(memory, used)
        peaks = {k: max(v, now[k]) for k, v in peaks.items()}
        if step % 10 == 0:
            assert {k: memory.read(k, "current") for k in now} == now
    assert memory.read("allocated_bytes", "peak") == peaks["allocated_bytes"]
    assert memory.read("allocated_bytes", "allocated") == added
    while used:
        memory.free(used.pop())
    memory.empty_cache()
    stats = memory.stats()
    assert not any(value for key, value in stats.items() if key.endswith(".current"))
    for pool in ("all", "large_pool", "small_pool"):
        assert stats[f"allocated_bytes.{pool}.allocated"] == stats[f"allocated_bytes.{pool}.freed"]
    assert stats["allocated_bytes.all.allocated"] == sum(stats[f"allocated_bytes.{p}.allocated"] for p in ("large_pool", "small_pool"))


@pytest.mark.parametrize("seed", range(3))
def test_what_is_settled_late_is_as_if_settled_at_once(seed: int) -> None:
    rng, late, at_once = random.Random(seed), CachingAllocator(64 * MIB), CachingAllocator(64 * MIB)
    used = []
    for _ in range(3000):
        if used and rng.random() < 0.45:
            a, b = used.pop(rng.randrange(len(used)))
            late.free(a), at_once.free(b), at_once.settle()
        else:
            nbytes, ends = int(2 ** rng.uniform(0, 24)), []
            for take in (late.promise, at_once.allocate):
                try:
                    ends.append(take(nbytes))
                except torch.OutOfMemoryError as error:
                    ends.append(str(error))
            if isinstance(ends[0], str):
                assert ends[0] == ends[1]
            else:
                used.append(ends)
    assert late.stats() == at_once.stats() and late.ooms > 0
    assert [(a.address, a.size) for a, _ in used] == [(b.address, b.size) for _, b in used]


def test_free_may_come_from_a_finalizer_inside_allocate() -> None:
    memory = CachingAllocator(BIG)
    block = memory.allocate(512)
    with memory._lock:  # as when the garbage collector runs while the allocator works
        memory.free(block)
    assert allocated(memory) == 0


def test_threads() -> None:
    memory = CachingAllocator(BIG)

    def work() -> None:
        for n in range(1, 300):
            memory.free(memory.allocate(n * 64))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert allocated(memory) == 0 and memory.read("allocation", "allocated") == 4 * 299


# -- as the program sees it --------------------------------------------------------------------------


@pytest.fixture
def before() -> int:
    gc.collect()
    return torch.npu.memory_allocated()


def test_memory_lives_as_long_as_the_storage(before) -> None:
    x = torch.ones(1000, device="npu")
    view = x.view(10, 100)[1:]
    assert torch.npu.memory_allocated() - before == 4096
    del x
    assert torch.npu.memory_allocated() - before == 4096
    del view
    assert torch.npu.memory_allocated() == before


def test_a_step_leaves_nothing_behind(before) -> None:
    x = torch.randn(64, 64, device="npu", requires_grad=True)
    (x @ x).relu().sum().backward()
    del x
    assert torch.npu.memory_allocated() == before


def test_a_cycle_is_freed_by_the_collector(before) -> None:
    class Node:
        pass

    node = Node()
    node.me, node.tensor = node, torch.ones(1000, device="npu")
    del node
    assert torch.npu.memory_allocated() > before
    gc.collect()
    assert torch.npu.memory_allocated() == before


def test_peaks(before) -> None:
    torch.npu.reset_peak_memory_stats()
    x = torch.ones(25_600, device="npu")
    y = x + 1  # two of 100 KiB
    del x, y
    assert torch.npu.max_memory_allocated() - before == 204_800
    torch.npu.reset_peak_memory_stats()
    assert torch.npu.max_memory_allocated() == torch.npu.memory_allocated() == before
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    assert total == 64 * MIB and total - free == torch.npu.memory_reserved()


def test_accumulated_figures_start_again() -> None:
    torch.ones(100, device="npu")
    torch.npu.reset_accumulated_memory_stats()
    assert torch.npu.memory_stats()["allocation.all.allocated"] == 0
    torch.ones(100, device="npu")
    stats = torch.npu.memory_stats()
    assert stats["allocation.all.allocated"] == stats["allocation.all.freed"] == 1


def test_going_on_after_out_of_memory(before) -> None:
    kept = torch.ones(10 * 2**20 // 4, device="npu")
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 60.00 MiB \(NPU 0; 64.00 MiB total capacity; "):
        torch.empty(60 * 2**20, dtype=torch.int8, device="npu")
    assert torch.npu.memory_allocated() - before == 10 * MIB
    del kept
    assert torch.empty(60 * 2**20, dtype=torch.int8, device="npu").numel() == 60 * 2**20
    assert torch.npu.memory_stats()["num_ooms"] == 1


def test_more_than_the_host_has_is_out_of_memory_of_the_device() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="NPU out of memory. Tried to allocate 4194304.00 GiB"):
        torch.empty(2**50, device="npu")


def test_a_part_of_the_memory() -> None:
    torch.npu.set_per_process_memory_fraction(0.25)
    with pytest.raises(torch.OutOfMemoryError, match="16.00 MiB allowed"):
        torch.empty(20 * 2**20, dtype=torch.int8, device="npu")
    with pytest.raises(ValueError, match="Allowed range: 0~1"):
        torch.npu.set_per_process_memory_fraction(2)


def test_summary_shows_the_figures() -> None:
    kept = torch.ones(2**20, device="npu")
    text = torch.npu.memory_summary()
    assert "NPU memory summary, device 0: mini" in text and "| Allocated memory" in text and "4.00 MiB" in text
    assert len({len(line) for line in text.splitlines()}) == 1
    assert len(torch.npu.memory_summary(abbreviated=True).splitlines()) < len(text.splitlines())
    del kept


def test_each_device_has_its_own() -> None:
    npu.use("mini", count=2)
    x = torch.ones(1000, device="npu:1")
    assert torch.npu.memory_allocated(1) == 4096 and torch.npu.memory_allocated("npu:0") == runtime.devices[0].memory.read("allocated_bytes", "current")
    del x
