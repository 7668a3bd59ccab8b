"""Environment variables of torch_npu: what the emulation obeys, what it warns of, and what is malformed.

Obeyed, each time that ``npu.use()`` sets up the devices, and so at the import:

* ``ASCEND_RT_VISIBLE_DEVICES=0,1``: at most so many devices, numbered from 0 again.
* ``ASCEND_LAUNCH_BLOCKING=1``: the host waits for each operator before it launches the next.
* ``PYTORCH_NPU_ALLOC_CONF``: ``max_split_size_mb`` (blocks from that size on are not cut; like the segment sizes it shrinks
  with the chip's memory), ``garbage_collection_threshold`` (unused segments go back before that share of the memory is
  passed), ``per_process_memory_fraction``.
* ``HCCL_ALGO=level0:NA;level1:ring``: the algorithm between nodes, see chip/collectives.py.
* ``HCCL_BUFFSIZE=200``: MB of device memory that each communicator takes; it too shrinks with the chip's memory.
* ``TORCH_NPU_DISABLED_WARNING=1``: no warnings from here.

Any other variable of torch_npu that is set, and asks for something that the emulation does not do anyway, is named in one
warning: it has no effect. A value that torch_npu would not take either raises ValueError. Where software lies and what is
logged (``ASCEND_HOME_PATH``, ``ASCEND_GLOBAL_LOG_LEVEL``, …) is no matter of the emulation's.
"""

import os
import warnings
from dataclasses import dataclass

from course_lib.npu.clock import Host, Timeline
from course_lib.npu.memory import MIB, CachingAllocator, scale_of

SWITCH = ("0", "1")
# What a variable may be (None: anything), and the values that ask for what the emulation does anyway
WITHOUT_EFFECT: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...]]] = {
    "TASK_QUEUE_ENABLE": (("0", "1", "2"), ("1",)), "COMBINED_ENABLE": (SWITCH, ("0",)), "CPU_AFFINITY_CONF": (None, ("0",)), "STREAMS_PER_DEVICE": (("8", "32"), ()),
    "ACL_OP_COMPILER_CACHE_MODE": (("disable", "enable", "force"), ("disable",)), "ACL_OP_COMPILER_CACHE_DIR": (None, ()), "ACL_STREAM_TIMEOUT": (None, ()),
    "INF_NAN_MODE_ENABLE": (SWITCH, ("1",)), "INF_NAN_MODE_FORCE_DISABLE": (SWITCH, ("0",)), "NPU_ASD_ENABLE": (("0", "1", "2", "3"), ("0",)), "NPU_ASD_CONFIG": (None, ()),
    "PYTORCH_NO_NPU_MEMORY_CACHING": (SWITCH, ("0",)), "MULTI_STREAM_MEMORY_REUSE": (("0", "1", "2"), ()), "OOM_SNAPSHOT_ENABLE": (("0", "1", "2"), ("0",)),
    "OOM_SNAPSHOT_PATH": (None, ()), "TORCH_NPU_DEVICE_CAPABILITY": (None, ()), "TORCH_NPU_LOGS": (None, ()),
    **{f"HCCL_{name}": (None, ()) for name in (
        "CONNECT_TIMEOUT", "EXEC_TIMEOUT", "EVENT_TIMEOUT", "RDMA_TC", "RDMA_SL", "RDMA_RETRY_CNT", "IF_BASE_PORT", "DESYNC_DEBUG",
        "INTRA_PCIE_ENABLE", "INTRA_ROCE_ENABLE", "OP_EXPANSION_MODE",
    )},
    "HCCL_DETERMINISTIC": (("true", "false", "strict"), ("true", "strict")), "HCCL_ASYNC_ERROR_HANDLING": (SWITCH, ("1",)), "HCCL_BLOCKING_WAIT": (SWITCH, ("0",)),
    "P2P_HCCL_BUFFSIZE": (None, ()), "RANK_TABLE_FILE": (None, ()),
}  # fmt: skip
ALLOC_KEYS = """
    expandable_segments garbage_collection_threshold max_split_size_mb large_segment_size_mb segment_size_mb max_non_split_rounding_mb
    base_addr_aligned_kb page_size multi_stream_lazy_reclaim per_process_memory_fraction throw_on_npumalloc_oom release_lock_on_npumalloc
    pin_memory_expandable_segments
""".split()
_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment asks of the devices."""

    visible: int | None = None
    blocking: bool = False
    max_split_mb: int | None = None
    threshold: float = 1.0
    fraction: float = 1.0
    algorithm: str | None = None
    buffer_mb: int = 200

    def count(self, count: int) -> int:
        """How many of ``count`` devices there are."""
        return count if self.visible is None else min(count, self.visible)

    def allocator(self, capacity: int, index: int) -> CachingAllocator:
        memory = CachingAllocator(capacity, index)
        if self.max_split_mb or self.threshold < 1:
            memory = Configured(capacity, index, self.max_split_mb, self.threshold)
        memory.limit = int(capacity * self.fraction)
        return memory

    def timeline(self, id: int, host: Host, launch_ps: int) -> Timeline:
        return (Blocking if self.blocking else Timeline)(id, host, launch_ps)


class Blocking(Timeline):
    """A stream on which the host waits for each operator."""

    __slots__ = ()

    def launch(self, ps: int) -> int:
        start = super().launch(ps)
        self.wait()
        return start


class Configured(CachingAllocator):
    """The allocator where large blocks are not cut, or unused segments go back early.

    Segments from ``max_split`` bytes on serve one request each, which may not be smaller by a segment or more. They wait
    in a list of their own.
    """

    def __init__(self, capacity: int, index: int, max_split_mb: int | None, threshold: float) -> None:
        super().__init__(capacity, index)
        self.max_split = max_split_mb * MIB // scale_of(capacity) if max_split_mb else capacity + 1
        self.threshold = threshold
        self._free["oversize"] = []

    def _grow(self, pool: str, size: int) -> object:
        for at, (found, _, block) in enumerate(self._free["oversize"]):
            if size >= self.max_split and size <= found < size + self.large_segment:
                del self._free["oversize"][at]
                return block
        if self.reserved + size > self.threshold * self.limit:
            self._release_segments()
        return super()._grow(pool, size)

    def _cut(self, block: object, size: int, pool: str) -> tuple[int, int]:
        return (0, 0) if block.segment.size >= self.max_split else super()._cut(block, size, pool)

    def _join(self, block: object, free: list) -> tuple[int, int]:
        return super()._join(block, self._free["oversize"] if block.segment.size >= self.max_split else free)

    def _count_segment(self, pool: str, segments: int, nbytes: int) -> None:
        super()._count_segment("large" if pool == "oversize" else pool, segments, nbytes)

    def stats(self) -> dict[str, int]:
        return super().stats() | ({"max_split_size": self.max_split} if self.max_split <= self.capacity else {})


# -- reading ------------------------------------------------------------------------------------------


def read() -> Settings:
    """What the environment says now; ValueError names a malformed variable."""
    found = _alloc_conf()
    _warn(found)
    return Settings(_visible(), _choice("ASCEND_LAUNCH_BLOCKING", SWITCH) == "1", found.get("max_split_size_mb"),
                    found.get("garbage_collection_threshold", 1.0), found.get("per_process_memory_fraction", 1.0),
                    os.environ.get("HCCL_ALGO"), _number(f"HCCL_BUFFSIZE={(mb := os.environ.get('HCCL_BUFFSIZE', '200'))}", mb, int, 0, float("inf")))  # fmt: skip


def _choice(name: str, allowed: tuple[str, ...] | None) -> str | None:
    value = os.environ.get(name)
    if value is not None and allowed and value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    return value


def _visible() -> int | None:
    value = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if value is None:
        return None
    indices = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in indices) or len(set(indices)) < len(indices):
        raise ValueError(f"ASCEND_RT_VISIBLE_DEVICES={value!r}: expected different device numbers with commas between them, such as 0,1,2; unset it for all devices")
    return len(indices)


def _alloc_conf() -> dict[str, int | float | str]:
    """``PYTORCH_NPU_ALLOC_CONF=name:value,…`` as a dict; what is obeyed as a number."""
    name, found = "PYTORCH_NPU_ALLOC_CONF", {}
    for part in filter(None, os.environ.get(name, "").replace(" ", "").split(",")):
        key, colon, value = part.partition(":")
        if not colon or not (key in ALLOC_KEYS or key.startswith("pinned_")):
            raise ValueError(f"{name}: {part!r} is not one of its options, name:value, with the names {', '.join(ALLOC_KEYS)}, pinned_…")
        found[key] = value
    for key, kind, low, high in (
        ("max_split_size_mb", int, 20, float("inf")), ("garbage_collection_threshold", float, 0, 1), ("per_process_memory_fraction", float, 0, 1),
    ):  # fmt: skip
        if key in found:
            found[key] = _number(f"{name}={key}:{found[key]}", found[key], kind, low, high)
    for key in ("expandable_segments", "multi_stream_lazy_reclaim", "throw_on_npumalloc_oom", "release_lock_on_npumalloc", "pin_memory_expandable_segments"):
        if found.get(key, "True") not in ("True", "False"):
            raise ValueError(f"{name}={key}:{found[key]}: expected True or False")
    return found


def _number(shown: str, text: str, kind: type, low: float, high: float) -> float:
    """A number above ``low`` and below ``high``; the fraction may be 1."""
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{shown}: expected {'a whole number' if kind is int else 'a number'}") from None
    if not low < value <= high or ("threshold" in shown and value == high):
        raise ValueError(f"{shown}: expected more than {low}" + (f" and {'less than' if 'threshold' in shown else 'at most'} {high}" if high < float("inf") else ""))
    return value


def _warn(alloc: dict[str, int | float | str]) -> None:
    """Name the variables that are set and have no effect, each once in a process."""
    idle = [f"{name}={value}" for name, (allowed, anyway) in WITHOUT_EFFECT.items() if (value := _choice(name, allowed)) is not None and value not in anyway]
    obeyed = ("max_split_size_mb", "garbage_collection_threshold", "per_process_memory_fraction")
    idle += [f"PYTORCH_NPU_ALLOC_CONF={key}:{value}" for key, value in alloc.items() if key not in obeyed and value != "False"]
    fresh = [text for text in idle if text not in _warned]
    _warned.update(fresh)
    if fresh and _choice("TORCH_NPU_DISABLED_WARNING", SWITCH) != "1":
        warnings.warn(f"set, and without effect on the emulated npu: {', '.join(fresh)} (see course_lib/npu/environment.py)", stacklevel=2)
