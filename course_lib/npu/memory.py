"""Device memory: a caching allocator with the block and segment rules of torch_npu, and its statistics.

The allocator hands out *addresses*, not bytes: the numbers of a tensor lie in host memory, the
allocator keeps account of the device memory that they would need. A block lives as long as the
storage of its tensor. What is asked for and given back is only noted, in order, and settled when a
figure is asked for or memory might run out: in one go it costs a fraction of what it would between
two operators, whose numbers have driven all this out of the processor's cache. Freed blocks stay reserved in their segment, are merged with free neighbours
and reused, best fit first; segments go back to the device only when an allocation would fail or on
``empty_cache()``.

Constants (torch_npu ``NPUCachingAllocator.cpp``): blocks are rounded to 512 B; requests of at most
1 MiB come from 2 MiB segments, requests under 10 MiB from 20 MiB segments, larger ones get a segment
of their own rounded to 2 MiB. They fit a chip with 64 GiB. On a smaller emulated chip they shrink
with its memory (by a power of two), so that fragmentation keeps its share: see ``scale_of``.
"""

import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator

import torch

from course_lib.npu.books import Books
from course_lib.npu.snapshot import History

KIB, MIB, GIB = 2**10, 2**20, 2**30
MIN_BLOCK = 512


def scale_of(capacity: int) -> int:
    """By what power of two the segment constants shrink on a chip with ``capacity`` bytes (1 from 64 GiB on)."""
    scale = 1
    while capacity * scale < 64 * GIB and scale < 1024:
        scale *= 2
    return scale


def format_size(size: int) -> str:
    """A byte count as torch_npu prints it: bytes, KiB, MiB or GiB with two decimals."""
    for unit, name in ((KIB, "bytes"), (MIB, "KiB"), (GIB, "MiB")):
        if size <= unit:
            return f"{size} bytes" if name == "bytes" else f"{size / (unit // KIB):.2f} {name}"
    return f"{size / GIB:.2f} GiB"


class Block:
    """A piece of a segment, linked with its neighbours, and what was asked for it and granted. Before it is placed it has no segment."""

    __slots__ = ("requested", "granted", "segment", "address", "size", "used", "prev", "next")

    def __init__(self, requested: int = 0) -> None:
        self.requested, self.granted = requested, 0
        self.segment: Segment | None = None

    def at(self, segment: "Segment", address: int, size: int) -> "Block":
        self.segment, self.address, self.size = segment, address, size
        self.used, self.prev, self.next = False, None, None
        return self

    def replace(self, hole: "Block") -> None:
        """Take the place of ``hole``."""
        self.segment, self.address, self.size = hole.segment, hole.address, hole.size
        self.prev, self.next = hole.prev, hole.next
        if self.prev is None:
            self.segment.first = self
        else:
            self.prev.next = self
        if self.next is not None:
            self.next.prev = self

    @property
    def offset(self) -> int:
        return self.address - self.segment.address


class Segment:
    """A contiguous piece taken from the device; ``pool`` is "small" or "large"."""

    __slots__ = ("address", "size", "pool", "first")

    def __init__(self, address: int, size: int, pool: str) -> None:
        self.address, self.size, self.pool = address, size, pool
        self.first = Block().at(self, address, size)

    def blocks(self) -> Iterator[Block]:
        """What it is cut into, by address."""
        block: Block | None = self.first
        while block is not None:
            yield block
            block = block.next


_EMPTY = Segment(0, 0, "small")


class CachingAllocator:
    """The memory of one emulated device: ``allocate`` and ``free`` blocks, read ``stats``."""

    def __init__(self, capacity: int, index: int = 0) -> None:
        self.capacity, self.index, self._limit = capacity, index, capacity
        self.outside = 0  # bytes of the device that others have: buffers of communicators
        scale = scale_of(capacity)
        self.small_limit, self.small_segment = MIB // scale, 2 * MIB // scale
        self.large_limit, self.large_segment = 10 * MIB // scale, 20 * MIB // scale
        self._least_rest = {"small": MIN_BLOCK, "large": self.small_limit + 1}  # less than this is not cut off
        self._free: dict[str, list[tuple[int, int, Block]]] = {"small": [], "large": []}  # (size, address, block), sorted
        self._lock = threading.Lock()
        self._noted: deque[Block] = deque()  # in order: asked for (no segment yet), or given back
        self._room = 0  # bytes that the blocks noted next may take in the worst case; below 0 it must be settled
        self._next_address = MIN_BLOCK
        self.segments: dict[int, Segment] = {}
        self.retries = self.ooms = 0
        self.reserved = 0
        self.books = Books()
        self.history: History | None = None

    # -- the calls that the device makes -----------------------------------------------------------

    def promise(self, nbytes: int) -> Block:
        """A block for ``nbytes``, placed when next settled; raises torch.OutOfMemoryError with torch_npu's wording."""
        block = Block(nbytes)
        if nbytes == 0:
            return block.at(_EMPTY, 0, 0)
        self._room -= nbytes + self.large_segment  # no block needs a larger new segment
        if self._room >= 0 and not self.history:
            self._noted.append(block)
            return block
        with self._lock:
            self._catch_up()
            self._place(block)
            self._room = self._limit - self.reserved
        return block

    def allocate(self, nbytes: int) -> Block:
        """A block for ``nbytes``, placed now."""
        block = self.promise(nbytes)
        self.settle()
        return block

    def free(self, block: Block) -> None:
        """Give a block back. Safe from a finalizer that runs at any moment, also inside ``settle``."""
        if block.segment is _EMPTY:
            return
        self._noted.append(block)
        if self.history and self._lock.acquire(blocking=False):  # a history notes times
            try:
                self._catch_up()
            finally:
                self._lock.release()

    def settle(self) -> None:
        """Carry out what is noted."""
        with self._lock:
            self._catch_up()

    @property
    def limit(self) -> int:
        """Bytes that may be reserved."""
        return self._limit

    @limit.setter
    def limit(self, nbytes: int) -> None:
        self.settle()
        self._limit = nbytes
        self._room = nbytes - self.reserved

    def give_away(self, nbytes: int, what: str) -> None:
        """Others take ``nbytes`` of the device, and keep them; torch.OutOfMemoryError if so much is not free."""
        with self._lock:
            self._catch_up()
            self._release_segments()
            if self.reserved + nbytes > self._limit:
                raise torch.OutOfMemoryError(f"{what}: {self._complaint(nbytes)}")
            self.outside += nbytes
            self._limit -= nbytes
            self._room = self._limit - self.reserved

    def empty_cache(self) -> None:
        """Give every segment that holds no block in use back to the device."""
        with self._lock:
            self._catch_up()
            self._release_segments()

    # -- inside ------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        while self._noted:
            block = self._noted.popleft()
            if block.segment is None:
                self._place(block)
            else:
                self._take_back(block)
        self._room = self._limit - self.reserved

    def _place(self, block: Block) -> None:
        size = -(-block.requested // MIN_BLOCK) * MIN_BLOCK
        pool = "small" if size <= self.small_limit else "large"
        free = self._free[pool]
        at = bisect_left(free, (size,))
        hole = free.pop(at)[2] if at < len(free) else self._grow(pool, size) or self._retry(pool, size)
        if hole is None:
            self.ooms += 1
            self._note("oom", 0, size)
            raise torch.OutOfMemoryError(self._complaint(block.requested))
        splits, split_bytes = self._cut(hole, size, pool)
        block.replace(hole)
        block.used, block.granted = True, hole.size
        self.books.note((pool == "large", 1, hole.size, block.requested, splits, split_bytes, 0, 0))
        if self.history:
            self._note("alloc", block.address, block.size)

    def _take_back(self, block: Block) -> None:
        pool, size, block.used = block.segment.pool, block.size, False
        if self.history:
            self._note("free_requested", block.address, size)
            self._note("free_completed", block.address, size)
        splits, split_bytes = self._join(block, self._free[pool])
        self.books.note((pool == "large", -1, -size, -block.requested, splits, split_bytes, 0, 0))

    def _grow(self, pool: str, size: int) -> Block | None:
        if pool == "small":
            need = self.small_segment
        elif size < self.large_limit:
            need = self.large_segment
        else:
            need = -(-size // self.small_segment) * self.small_segment
        if self.reserved + need > self._limit:
            return None
        segment = Segment(self._next_address, need, pool)
        self._next_address += need
        self.segments[segment.address] = segment
        self._count_segment(pool, 1, need)
        self._note("segment_alloc", segment.address, need)
        return segment.first

    def _retry(self, pool: str, size: int) -> Block | None:
        self.retries += 1
        self._release_segments()
        return self._grow(pool, size)

    def _cut(self, block: Block, size: int, pool: str) -> tuple[int, int]:
        """Cut a free block to ``size``, unless the rest is too small to be kept apart.

        Returns what that changes in unused pieces of split segments: (pieces, bytes). A whole segment is no piece.
        """
        segment, before = block.segment, block.size
        rest = before - size
        if rest < self._least_rest[pool]:
            return (0, 0) if before == segment.size else (-1, -before)
        tail, after = Block().at(segment, block.address + size, rest), block.next
        tail.prev, tail.next, block.next, block.size = block, after, tail, size
        if after is not None:
            after.prev = tail
        insort(self._free[pool], (rest, tail.address, tail))
        return (1, rest) if before == segment.size else (0, -size)

    def _join(self, block: Block, free: list) -> tuple[int, int]:
        """Put ``block`` among the ``free`` ones, as one with its unused neighbours; returns the change as ``_cut`` does."""
        splits, split_bytes, before, after = 1, block.size, block.prev, block.next
        if after is not None and not after.used:
            del free[bisect_left(free, (after.size, after.address))]
            block.size += after.size
            block.next = after = after.next
            if after is not None:
                after.prev = block
            splits -= 1
        if before is not None and not before.used:
            del free[bisect_left(free, (before.size, before.address))]
            before.size += block.size
            before.next = after
            if after is not None:
                after.prev = before
            block, splits = before, splits - 1
        insort(free, (block.size, block.address, block))
        if block.size == block.segment.size:  # whole again: all its unused pieces are gone
            return splits - 1, split_bytes - block.size
        return splits, split_bytes

    def _count_segment(self, pool: str, segments: int, nbytes: int) -> None:
        self.reserved += nbytes
        self.books.note((pool == "large", 0, 0, 0, 0, 0, segments, nbytes))

    def _release_segments(self) -> None:
        for pool, free in self._free.items():
            whole = [b for _, _, b in free if b.size == b.segment.size]
            self._free[pool] = [entry for entry in free if entry[2].size != entry[2].segment.size]
            for block in whole:
                del self.segments[block.segment.address]
                self._note("segment_free", block.address, block.size)
                self._count_segment(pool, -1, -block.size)

    def _note(self, action: str, address: int, size: int) -> None:
        if self.history:
            self.history.note(action, address, size)

    def _complaint(self, nbytes: int) -> str:
        allocated, reserved = format_size(self.books.read("allocated_bytes", "current")), self.reserved
        allowed = f"{format_size(self._limit)} allowed; " if self._limit < self.capacity - self.outside else ""
        return (
            f"NPU out of memory. Tried to allocate {format_size(nbytes)} (NPU {self.index}; "
            f"{format_size(self.capacity)} total capacity; {allocated} already allocated; {allocated} current active; "
            f"{format_size(self.capacity - self.outside - reserved)} free; {allowed}{format_size(reserved)} reserved in total by PyTorch)."
            "If reserved memory is >> allocated memory try setting max_split_size_mb to avoid fragmentation."
        )

    # -- reading -----------------------------------------------------------------------------------

    def read(self, figure: str, which: str) -> int:
        """One figure over all pools, such as ("allocated_bytes", "peak")."""
        self.settle()
        return self.books.read(figure, which)

    def stats(self) -> dict[str, int]:
        """Statistics under torch_npu's keys: ``allocated_bytes.all.peak``, ``segment.large_pool.current``, …"""
        self.settle()
        out = {}
        alias = {"active": "allocation", "active_bytes": "allocated_bytes"}
        for name in sorted((*Books.FIGURES, *alias)):
            for pool, label in (("all", "all"), ("large", "large_pool"), ("small", "small_pool")):
                for which in ("current", "peak", "allocated", "freed"):
                    out[f"{name}.{label}.{which}"] = self.books.read(alias.get(name, name), which, pool)
        return out | {
            "num_alloc_retries": self.retries, "num_ooms": self.ooms, "num_oom_rejections": 0,
            "max_split_size": -1, "oversize_allocations": 0, "oversize_segments": 0,
        }

    def reset_peak(self) -> None:
        """Peaks start again from the present values."""
        self.settle()
        self.books.reset_peak()

    def reset_accumulated(self) -> None:
        """The sums of what was allocated and freed, and the counts of failures, start again from zero."""
        self.settle()
        self.books.reset_sums()
        self.retries = self.ooms = 0
