"""Device memory: a caching allocator with the block and segment rules of torch_npu, and its statistics.

The allocator hands out *addresses*, not bytes: the numbers of a tensor lie in host memory, the
allocator keeps account of the device memory that they would need. A block lives as long as the
storage of its tensor. Freed blocks stay reserved in their segment, are merged with free neighbours
and reused, best fit first; segments go back to the device only when an allocation would fail or on
``empty_cache()``.

Constants (torch_npu ``NPUCachingAllocator.cpp``): blocks are rounded to 512 B; requests of at most
1 MiB come from 2 MiB segments, requests under 10 MiB from 20 MiB segments, larger ones get a segment
of their own rounded to 2 MiB. They fit a chip with 64 GiB. On a smaller emulated chip they shrink
with its memory (by a power of two), so that fragmentation keeps its share: see ``scale_of``.
"""

import bisect
import itertools
import threading

import torch

KIB, MIB, GIB = 2**10, 2**20, 2**30
MIN_BLOCK = 512
_ids = itertools.count(1)


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


class Stat:
    """A figure with its present value, peak, and the sums of what was added and taken."""

    __slots__ = ("current", "peak", "allocated", "freed")

    def __init__(self) -> None:
        self.current = self.peak = self.allocated = self.freed = 0

    def add(self, n: int) -> None:
        self.current += n
        self.allocated += n
        if self.current > self.peak:
            self.peak = self.current

    def take(self, n: int) -> None:
        self.current -= n
        self.freed += n


class Block:
    """A piece of a segment. ``requested`` bytes are used of ``size``; neighbours are linked for merging."""

    __slots__ = ("id", "segment", "offset", "size", "requested", "used", "prev", "next")

    def __init__(self, segment: "Segment", offset: int, size: int) -> None:
        self.id = next(_ids)
        self.segment, self.offset, self.size = segment, offset, size
        self.requested, self.used = 0, False
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def address(self) -> int:
        return self.segment.address + self.offset

    def key(self) -> tuple[int, int]:
        return self.size, self.address


class Segment:
    """A contiguous piece taken from the device; ``pool`` is "small" or "large"."""

    __slots__ = ("address", "size", "pool")

    def __init__(self, address: int, size: int, pool: str) -> None:
        self.address, self.size, self.pool = address, size, pool


_EMPTY = Segment(0, 0, "small")


class CachingAllocator:
    """The memory of one emulated device: ``allocate`` and ``free`` blocks, read ``stats``."""

    def __init__(self, capacity: int, index: int = 0) -> None:
        self.capacity, self.index, self.limit = capacity, index, capacity
        scale = scale_of(capacity)
        self.small_limit, self.small_segment = MIB // scale, 2 * MIB // scale
        self.large_limit, self.large_segment = 10 * MIB // scale, 20 * MIB // scale
        self._free: dict[str, list[tuple[tuple[int, int], Block]]] = {"small": [], "large": []}
        self._lock = threading.Lock()
        self._pending: list[Block] = []
        self._next_address = MIN_BLOCK
        self.segments: dict[int, Segment] = {}
        self.retries = self.ooms = 0
        names = ("allocation", "allocated_bytes", "requested_bytes", "segment", "reserved_bytes", "inactive_split", "inactive_split_bytes")
        self.stat = {(n, p): Stat() for n in names for p in ("all", "small", "large")}

    # -- the two calls that the device makes -------------------------------------------------------

    def allocate(self, nbytes: int) -> Block:
        """A block for ``nbytes``; raises torch.OutOfMemoryError with torch_npu's wording."""
        if nbytes == 0:
            return Block(_EMPTY, 0, 0)
        with self._lock:
            self._drain()
            size = -(-nbytes // MIN_BLOCK) * MIN_BLOCK
            pool = "small" if size <= self.small_limit else "large"
            block = self._best_fit(pool, size) or self._grow(pool, size) or self._retry(pool, size)
            if block is None:
                self.ooms += 1
                raise torch.OutOfMemoryError(self._complaint(nbytes))
            self._split(block, size)
            block.used, block.requested = True, nbytes
            self._count(pool, block, True)
        return block

    def free(self, block: Block) -> None:
        """Give a block back. Safe from a finalizer that runs at any moment, also inside ``allocate``."""
        if block.size == 0:
            return
        self._pending.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def empty_cache(self) -> None:
        """Give every segment that holds no block in use back to the device."""
        with self._lock:
            self._drain()
            self._release_segments()

    # -- inside ------------------------------------------------------------------------------------

    def _drain(self) -> None:
        while self._pending:
            block = self._pending.pop()
            block.used = False
            self._count(block.segment.pool, block, False)
            self._merge(block)

    def _best_fit(self, pool: str, size: int) -> Block | None:
        free = self._free[pool]
        at = bisect.bisect_left(free, ((size, 0),))
        if at == len(free):
            return None
        block = free.pop(at)[1]
        self._split_stat(block, -1)
        return block

    def _grow(self, pool: str, size: int) -> Block | None:
        if pool == "small":
            need = self.small_segment
        elif size < self.large_limit:
            need = self.large_segment
        else:
            need = -(-size // self.small_segment) * self.small_segment
        if self.stat["reserved_bytes", "all"].current + need > self.limit:
            return None
        segment = Segment(self._next_address, need, pool)
        self._next_address += need
        self.segments[segment.address] = segment
        for p in ("all", pool):
            self.stat["segment", p].add(1)
            self.stat["reserved_bytes", p].add(need)
        return Block(segment, 0, need)

    def _retry(self, pool: str, size: int) -> Block | None:
        self.retries += 1
        self._release_segments()
        return self._grow(pool, size)

    def _split(self, block: Block, size: int) -> None:
        rest = block.size - size
        if rest < MIN_BLOCK or (block.segment.pool == "large" and rest <= self.small_limit):
            return
        tail = Block(block.segment, block.offset + size, rest)
        tail.prev, tail.next, block.size = block, block.next, size
        if tail.next:
            tail.next.prev = tail
        block.next = tail
        self._insert(tail)

    def _merge(self, block: Block) -> None:
        for other in (block.prev, block.next):
            if other is None or other.used:
                continue
            self._remove(other)
            first, second = (other, block) if other is block.prev else (block, other)
            first.size += second.size
            first.next = second.next
            if second.next:
                second.next.prev = first
            block = first
        self._insert(block)

    def _insert(self, block: Block) -> None:
        bisect.insort(self._free[block.segment.pool], (block.key(), block))
        self._split_stat(block, 1)

    def _remove(self, block: Block) -> None:
        free = self._free[block.segment.pool]
        del free[bisect.bisect_left(free, (block.key(),))]
        self._split_stat(block, -1)

    def _split_stat(self, block: Block, sign: int) -> None:
        if block.prev is None and block.next is None:
            return
        for p in ("all", block.segment.pool):
            for name, n in (("inactive_split", 1), ("inactive_split_bytes", block.size)):
                stat = self.stat[name, p]
                stat.add(n) if sign > 0 else stat.take(n)

    def _count(self, pool: str, block: Block, up: bool) -> None:
        for name, n in (("allocation", 1), ("allocated_bytes", block.size), ("requested_bytes", block.requested)):
            for p in ("all", pool):
                stat = self.stat[name, p]
                stat.add(n) if up else stat.take(n)

    def _release_segments(self) -> None:
        for pool, free in self._free.items():
            whole = [b for _, b in free if b.size == b.segment.size]
            self._free[pool] = [(k, b) for k, b in free if b.size != b.segment.size]
            for block in whole:
                del self.segments[block.segment.address]
                for p in ("all", pool):
                    self.stat["segment", p].take(1)
                    self.stat["reserved_bytes", p].take(block.size)

    def _complaint(self, nbytes: int) -> str:
        allocated = format_size(self.stat["allocated_bytes", "all"].current)
        reserved = self.stat["reserved_bytes", "all"].current
        allowed = f"{format_size(self.limit)} allowed; " if self.limit < self.capacity else ""
        return (
            f"NPU out of memory. Tried to allocate {format_size(nbytes)} (NPU {self.index}; "
            f"{format_size(self.capacity)} total capacity; {allocated} already allocated; {allocated} current active; "
            f"{format_size(self.capacity - reserved)} free; {allowed}{format_size(reserved)} reserved in total by PyTorch)."
            "If reserved memory is >> allocated memory try setting max_split_size_mb to avoid fragmentation."
        )

    # -- reading -----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Count what finalizers have handed back since."""
        with self._lock:
            self._drain()

    def stats(self) -> dict[str, int]:
        """Statistics under torch_npu's keys: ``allocated_bytes.all.peak``, ``segment.large_pool.current``, …"""
        self.settle()
        out = {}
        alias = {"active": "allocation", "active_bytes": "allocated_bytes"}
        for name in sorted({n for n, _ in self.stat} | set(alias)):
            for pool, label in (("all", "all"), ("large", "large_pool"), ("small", "small_pool")):
                stat = self.stat[alias.get(name, name), pool]
                out.update({f"{name}.{label}.{k}": getattr(stat, k) for k in Stat.__slots__})
        return out | {
            "num_alloc_retries": self.retries, "num_ooms": self.ooms, "num_oom_rejections": 0,
            "max_split_size": -1, "oversize_allocations": 0, "oversize_segments": 0,
        }

    def reset_peak(self) -> None:
        """Peaks start again from the present values."""
        self.settle()
        for stat in self.stat.values():
            stat.peak = stat.current

    def reset_accumulated(self) -> None:
        """The sums of what was allocated and freed, and the counts of failures, start again from zero."""
        self.settle()
        for stat in self.stat.values():
            stat.allocated = stat.freed = 0
        self.retries = self.ooms = 0
