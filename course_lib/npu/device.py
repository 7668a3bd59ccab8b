"""``torch.npu``: the names that torch_npu gives a program, on the emulated device.

This module itself is registered as ``torch.npu``. Memory figures are those of the emulated chip's
allocator; times are emulated. ``attach()`` makes PyTorch know the device.
"""

import importlib
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch.utils import backend_registration

from course_lib.npu import backward, linear, ops, runtime, transfer
from course_lib.npu.memory import format_size
from course_lib.npu.streams import Event, Stream, _index, current_stream, default_stream, set_stream, stream
from course_lib.npu.tensor import NpuTensor

__all__ = ["Event", "Stream", "current_stream", "default_stream", "set_stream", "stream"]
_initialized = True  # checkpointing asks before it keeps the state of the random numbers
_kept: list = []  # torch.library registrations live as long as their objects


class Properties(NamedTuple):
    """What ``get_device_properties`` tells; ``peak_flops`` (FLOP/s of the cube by dtype) is the emulation's own addition."""

    name: str
    total_memory: int
    cube_core_num: int | None
    vector_core_num: int | None
    L2_cache_size: int | None
    multi_processor_count: int | None
    peak_flops: dict[str, float]

    def __repr__(self) -> str:
        l2 = "unknown" if self.L2_cache_size is None else f"{self.L2_cache_size // 2**20}MB"
        return (
            f"_NPUDeviceProperties(name='{self.name}', total_memory={self.total_memory // 2**20}MB, "
            f"cube_core_num={self.cube_core_num}, vector_core_num={self.vector_core_num}, L2_cache_size={l2})"
        )


# -- which device -------------------------------------------------------------------------------------


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def init() -> None:
    """Nothing to do: the emulated device is there from the import on."""


def device_count() -> int:
    return len(runtime.devices)


def current_device() -> int:
    return runtime.current


def set_device(device: Any) -> None:
    """Let ``"npu"`` without an index mean this device from now on."""
    runtime.current = _index(device)


class device:
    """``with torch.npu.device(1):`` work inside goes to that device; a negative index changes nothing."""

    def __init__(self, device: Any) -> None:
        self.index = runtime.current if isinstance(device, int) and device < 0 else _index(device)

    def __enter__(self) -> None:
        self.outer, runtime.current = runtime.current, self.index

    def __exit__(self, *exc: object) -> None:
        runtime.current = self.outer


class device_of(device):
    """``with torch.npu.device_of(tensor):`` the tensor's device; no change for a tensor elsewhere."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor.device.index if tensor.device.type == "npu" else -1)


def _exchange_device(index: int) -> int:
    outer = runtime.current
    if index >= 0:
        runtime.current = _index(index)
    return outer


_maybe_exchange_device = _exchange_device


def synchronize(device: Any = None) -> None:
    """The host waits until the device has done everything it was given."""
    runtime.devices[_index(device)].synchronize()


def get_device_name(device: Any = None) -> str:
    return runtime.devices[_index(device)].spec.title


def get_device_capability(device: Any = None) -> None:
    """None, as on a real NPU: it has no compute capability."""
    return None


def get_device_properties(device: Any = None) -> Properties:
    """Figures of the chip; None stands for unknown."""
    spec = runtime.devices[_index(device)].spec
    dtypes = ("float32", "float16", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
    peaks = {d: p for d in dtypes if (p := spec.peak(d, counts="cube"))}
    return Properties(spec.title, int(spec.memory_bytes), spec.cube_cores, spec.vector_cores, spec.l2_bytes, spec.cube_cores, peaks)


def can_device_access_peer(device: Any, peer: Any) -> bool:
    return _index(device) != _index(peer)


# -- memory -------------------------------------------------------------------------------------------


def _memory(device: Any) -> Any:
    return runtime.devices[_index(device)].memory


def memory_stats(device: Any = None) -> dict[str, int]:
    """The allocator's statistics under torch_npu's keys."""
    return _memory(device).stats()


def _stat(name: str, which: str, device: Any) -> int:
    return _memory(device).read(name, which)


def memory_allocated(device: Any = None) -> int:
    """Bytes in blocks that live storages hold (each rounded up to 512)."""
    return _stat("allocated_bytes", "current", device)


def max_memory_allocated(device: Any = None) -> int:
    return _stat("allocated_bytes", "peak", device)


def memory_reserved(device: Any = None) -> int:
    """Bytes in segments that the allocator has taken from the device."""
    return _stat("reserved_bytes", "current", device)


def max_memory_reserved(device: Any = None) -> int:
    return _stat("reserved_bytes", "peak", device)


def reset_peak_memory_stats(device: Any = None) -> None:
    _memory(device).reset_peak()


def reset_accumulated_memory_stats(device: Any = None) -> None:
    _memory(device).reset_accumulated()


def empty_cache() -> None:
    """Give reserved segments that hold nothing back to the device, on every device."""
    for d in runtime.devices:
        d.memory.empty_cache()


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """(free, total) bytes of device memory, as the driver sees it: reserved is not free."""
    return _memory(device).capacity - memory_reserved(device), _memory(device).capacity


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    """Let the program have only this part (0 to 1) of the memory."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    memory = _memory(device)
    memory.limit = int(memory.capacity * fraction)


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    """A readable table of ``memory_stats``; ``abbreviated`` leaves out the split by pool."""
    stats, index = memory_stats(device), _index(device)
    rows = [("Allocated memory", "allocated_bytes"), ("Active memory", "active_bytes"), ("Requested memory", "requested_bytes"),
            ("Reserved memory", "reserved_bytes"), ("Non-releasable memory", "inactive_split_bytes"),
            ("Allocations", "allocation"), ("Segments", "segment"), ("Non-releasable allocs", "inactive_split")]  # fmt: skip
    line = "|" + "-" * 83 + "|"
    out = [line, f"|{f'NPU memory summary, device {index}: {get_device_name(index)}':^83}|",
           "|" + "OOMs: {num_ooms}   retries after freeing the cache: {num_alloc_retries}".format(**stats).center(83) + "|", line,
           f"| {'':<24}| {'now':>12} | {'peak':>12} | {'allocated':>12} | {'freed':>10} |", line]  # fmt: skip
    for label, name in rows:
        for pool in ("all",) if abbreviated else ("all", "large_pool", "small_pool"):
            values = [stats[f"{name}.{pool}.{k}"] for k in ("current", "peak", "allocated", "freed")]
            shown = [format_size(v) if name.endswith("bytes") else str(v) for v in values]
            title = label if pool == "all" else "    " + pool.replace("_", " ")
            out.append(f"| {title:<24}| {shown[0]:>12} | {shown[1]:>12} | {shown[2]:>12} | {shown[3]:>10} |")
    return "\n".join([*out, line])


# -- random numbers -----------------------------------------------------------------------------------


def manual_seed(seed: int) -> None:
    """Seed the current device's random numbers."""
    runtime.devices[runtime.current].generator.manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed every device; ``torch.manual_seed`` calls this."""
    for d in runtime.devices:
        d.generator.manual_seed(int(seed))


def initial_seed() -> int:
    return runtime.devices[runtime.current].generator.initial_seed()


def get_rng_state(device: Any = None) -> torch.Tensor:
    return runtime.devices[_index(device)].generator.get_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    runtime.devices[_index(device)].generator.set_state(state.cpu())


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def is_bf16_supported() -> bool:
    return runtime.devices[runtime.current].spec.cube_tile("bfloat16") is not None


def _is_in_bad_fork() -> bool:
    return False


# -- making PyTorch know it ---------------------------------------------------------------------------


def attach(module: Any) -> None:
    """Register ``module`` as ``torch.npu`` and the operators with the dispatcher; once in a process."""
    if _kept:
        return
    backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=module, device_guard=backward.Guard())
    backward.attach()
    _kept.extend(transfer.register() + ops.register(transfer.kernel))
    # module.to("npu") keeps parameter objects, so that tied weights stay tied
    torch.__future__.set_swap_module_params_on_conversion(True)
    # optimizers choose their multi-tensor form by type, and know only PyTorch's own
    for place in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        importlib.import_module(place)._foreach_supported_types.append(NpuTensor)
    torch.serialization.register_package(5, _storage_place, _storage_to_place)
    ForkingPickler.register(NpuTensor, _not_shared)
    torch.UntypedStorage._new_shared = classmethod(_new_shared)


def _not_shared(tensor: torch.Tensor) -> None:
    raise RuntimeError("a tensor on an emulated npu cannot be shared with another process: send tensor.cpu(), and move it to the npu there (a Dataset read by workers should hold host tensors)")


_plain_new_shared = torch.UntypedStorage._new_shared.__func__


def _new_shared(cls: type, size: int, *, device: Any = "cpu") -> torch.UntypedStorage:
    """A storage to be shared; on the device there is none, and PyTorch would crash."""
    return _not_shared(None) if torch.device(device).type == "npu" else _plain_new_shared(cls, size, device=device)


def _storage_place(storage: Any) -> str | None:
    untyped = getattr(storage, "_untyped_storage", storage)
    return str(untyped.device) if isinstance(untyped, runtime.NpuStorage) else None


def _storage_to_place(storage: Any, location: str) -> Any:
    """``torch.load`` of a tensor saved on "npu:0" puts it there again; without such a device, says so."""
    if not location.startswith("npu"):
        return None
    index = _index(torch.device(location))
    storage.__class__ = runtime.NpuStorage
    storage._npu_index = index
    return storage
