"""``torch.npu``'s memory functions: what the emulated chip's allocator knows, under torch_npu's names."""

import pickle
import warnings
from typing import Any

from course_lib.npu import runtime, snapshot
from course_lib.npu.memory import Block, CachingAllocator, format_size
from course_lib.npu.streams import Stream, _index


def _memory(device: Any) -> CachingAllocator:
    return runtime.devices[_index(device)].memory


def memory_stats(device: Any = None) -> dict[str, int]:
    """The allocator's statistics under torch_npu's keys."""
    return _memory(device).stats()


def memory_stats_as_nested_dict(device: Any = None) -> dict[str, Any]:
    """The same, a dictionary for each dot in a key."""
    nested: dict[str, Any] = {}
    for key, value in memory_stats(device).items():
        *path, last = key.split(".")
        place = nested
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return nested


def memory_allocated(device: Any = None) -> int:
    """Bytes in blocks that live storages hold (each rounded up to 512)."""
    return _memory(device).read("allocated_bytes", "current")


def max_memory_allocated(device: Any = None) -> int:
    return _memory(device).read("allocated_bytes", "peak")


def memory_reserved(device: Any = None) -> int:
    """Bytes in segments that the allocator has taken from the device."""
    return _memory(device).read("reserved_bytes", "current")


def max_memory_reserved(device: Any = None) -> int:
    return _memory(device).read("reserved_bytes", "peak")


def memory_cached(device: Any = None) -> int:
    _renamed("memory_cached", "memory_reserved")
    return memory_reserved(device)


def max_memory_cached(device: Any = None) -> int:
    _renamed("max_memory_cached", "max_memory_reserved")
    return max_memory_reserved(device)


def reset_peak_memory_stats(device: Any = None) -> None:
    _memory(device).reset_peak()


def reset_max_memory_allocated(device: Any = None) -> None:
    _renamed("reset_max_memory_allocated", "reset_peak_memory_stats")
    reset_peak_memory_stats(device)


def reset_max_memory_cached(device: Any = None) -> None:
    _renamed("reset_max_memory_cached", "reset_peak_memory_stats")
    reset_peak_memory_stats(device)


def _renamed(old: str, new: str) -> None:
    warnings.warn(f"torch.npu.{old} has been renamed to torch.npu.{new}", FutureWarning, stacklevel=3)


def reset_accumulated_memory_stats(device: Any = None) -> None:
    _memory(device).reset_accumulated()


def empty_cache() -> None:
    """Give reserved segments that hold nothing back to the device, on every device."""
    for d in runtime.devices:
        d.memory.empty_cache()


def empty_virt_addr_cache() -> None:
    """Nothing to do: the emulated allocator has no expandable segments, so it keeps no virtual addresses."""


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """(free, total) bytes of device memory, as the driver sees it: reserved is not free."""
    return (own := _memory(device)).capacity - own.outside - memory_reserved(device), own.capacity


def get_per_process_memory_fraction(device: Any = None) -> float:
    memory = _memory(device)
    return memory.limit / memory.capacity


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    """Let the program have only this part (0 to 1) of the memory."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    memory = _memory(device)
    memory.limit = min(int(memory.capacity * fraction), memory.capacity - memory.outside)


def get_allocator_backend() -> str:
    return "native"


_handed_out: dict[int, tuple[CachingAllocator, Block]] = {}


def caching_allocator_alloc(size: int, device: Any = None, stream: Stream | None = None) -> int:
    """Take ``size`` bytes of device memory; returns their emulated address, for ``caching_allocator_delete``."""
    memory = _memory(device)
    block = memory.allocate(size)
    _handed_out[block.address] = memory, block
    return block.address


def caching_allocator_delete(mem_ptr: int) -> None:
    if mem_ptr not in _handed_out:
        raise RuntimeError(f"caching_allocator_delete({mem_ptr}): not an address that caching_allocator_alloc gave")
    memory, block = _handed_out.pop(mem_ptr)
    memory.free(block)


# -- snapshots ----------------------------------------------------------------------------------------


def memory_snapshot() -> list[dict]:
    """Every segment of every device with its blocks; what is "inactive" between live blocks is fragmentation."""
    return [segment for d in runtime.devices for segment in snapshot.segments(d.memory)]


def _record_memory_history(
    enabled: str | None = "all", context: str | None = "all", stacks: str = "all", max_entries: int = 2**31 - 1, device: Any = None, clear_history: bool = False
) -> None:
    """Keep what the allocators do, for ``_snapshot``; None ends it. The stacks are Python's."""
    for d in runtime.devices:
        old = d.memory.history
        d.memory.settle()  # what was freed before is no part of it
        if enabled is None:
            d.memory.history = None
        elif old is None or clear_history:
            length = max_entries if enabled == "all" else 0
            d.memory.history = snapshot.History(lambda: runtime.host.now // 10**6, context is not None, length)


def _snapshot(device: Any = None) -> dict:
    """Segments and history, as ``torch.cuda.memory._snapshot`` gives them. Times are emulated microseconds."""
    wanted = runtime.devices if device is None else [runtime.devices[_index(device)]]
    traces = [list(d.memory.history.events) if d in wanted and d.memory.history else [] for d in runtime.devices]
    settings = {"expandable_segments": False, "garbage_collection_threshold": 0.0, "max_split_size": -1}
    return {"segments": [s for d in wanted for s in snapshot.segments(d.memory)], "device_traces": traces, "allocator_settings": settings, "external_annotations": []}


def _dump_snapshot(filename: str = "dump_snapshot.pickle") -> None:
    """``_snapshot`` in a file that pytorch.org/memory_viz opens."""
    with open(filename, "wb") as file:
        pickle.dump(_snapshot(), file)


# -- a table ------------------------------------------------------------------------------------------


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    """A readable table of ``memory_stats``; ``abbreviated`` leaves out the split by pool."""
    stats, index = memory_stats(device), _index(device)
    rows = [("Allocated memory", "allocated_bytes"), ("Active memory", "active_bytes"), ("Requested memory", "requested_bytes"),
            ("Reserved memory", "reserved_bytes"), ("Non-releasable memory", "inactive_split_bytes"),
            ("Allocations", "allocation"), ("Segments", "segment"), ("Non-releasable allocs", "inactive_split")]  # fmt: skip
    line = "|" + "-" * 83 + "|"
    out = [line, f"|{f'NPU memory summary, device {index}: {runtime.devices[index].spec.title}':^83}|",
           "|" + "OOMs: {num_ooms}   retries after freeing the cache: {num_alloc_retries}".format(**stats).center(83) + "|", line,
           f"| {'':<24}| {'now':>12} | {'peak':>12} | {'allocated':>12} | {'freed':>10} |", line]  # fmt: skip
    for label, name in rows:
        for pool in ("all",) if abbreviated else ("all", "large_pool", "small_pool"):
            values = [stats[f"{name}.{pool}.{k}"] for k in ("current", "peak", "allocated", "freed")]
            shown = [format_size(v) if name.endswith("bytes") else str(v) for v in values]
            title = label if pool == "all" else "    " + pool.replace("_", " ")
            out.append(f"| {title:<24}| {shown[0]:>12} | {shown[1]:>12} | {shown[2]:>12} | {shown[3]:>10} |")
    return "\n".join([*out, line])
