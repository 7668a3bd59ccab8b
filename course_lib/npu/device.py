"""``torch.npu``: the names that torch_npu gives a program, on the emulated device.

This module itself is registered as ``torch.npu``. Which device, and what it is, stands here; the rest comes from
``memory_api``, ``streams``, ``rng``, ``amp`` and ``options``. What an emulation cannot honour raises
NotImplementedError with the reason, see ``refused``. ``attach()`` makes PyTorch know the device.
"""

import importlib
import sys
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import torch
from torch.utils import backend_registration

from course_lib.npu import absent, accelerator, amp, backward, compiled, linear, modules, ops, refused, rng, runtime, streams, transfer
from course_lib.npu import memory_api as memory, rng as random  # noqa: F401, the rest of these are torch.npu's names
from course_lib.npu.accelerator import exchange_device as _exchange_device, exchange_device as _maybe_exchange_device  # noqa: F401
from course_lib.npu.amp import get_amp_supported_dtype, get_autocast_dtype, is_autocast_enabled, set_autocast_dtype, set_autocast_enabled  # noqa: F401
from course_lib.npu.memory_api import (  # noqa: F401
    _dump_snapshot, _record_memory_history, _snapshot, caching_allocator_alloc, caching_allocator_delete, empty_cache,
    empty_virt_addr_cache, get_allocator_backend, get_per_process_memory_fraction, max_memory_allocated,
    max_memory_cached, max_memory_reserved, mem_get_info, memory_allocated, memory_cached, memory_reserved,
    memory_snapshot, memory_stats, memory_stats_as_nested_dict, memory_summary, reset_accumulated_memory_stats,
    reset_max_memory_allocated, reset_max_memory_cached, reset_peak_memory_stats, set_per_process_memory_fraction,
)  # fmt: skip
from course_lib.npu.options import (  # noqa: F401
    CubeMathType, config, conv, disable_deterministic_with_backward, enable_deterministic_with_backward,
    get_device_limit, get_mm_bmm_format_nd, is_current_stream_capturing, is_jit_compile_false, matmul, mstx,
    set_compile_mode, set_deterministic_level, set_mm_bmm_format_nd, set_option,
)  # fmt: skip
from course_lib.npu.rng import (  # noqa: F401
    get_rng_state, get_rng_state_all, initial_seed, manual_seed, manual_seed_all, seed, seed_all, set_rng_state,
    set_rng_state_all,
)  # fmt: skip
from course_lib.npu.streams import (  # noqa: F401
    Event, Stream, SyncLaunchStream, _index, current_stream, default_stream, set_stream, stream, stream as StreamContext,
)  # fmt: skip
from course_lib.npu.tensor import HANDLERS, NpuTensor

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


def is_bf16_supported() -> bool:
    return runtime.devices[runtime.current].spec.cube_tile("bfloat16") is not None


def _is_in_bad_fork() -> bool:
    return False


globals().update(refused.NAMES)  # what raises, with its reason


def __getattr__(name: str) -> Any:
    if name == "default_generators":
        return rng.default_generators()
    raise AttributeError(f"module 'torch.npu' has no attribute {name!r}")


# -- making PyTorch know it ---------------------------------------------------------------------------


def attach(module: Any) -> None:
    """Register ``module`` as ``torch.npu`` and the operators with the dispatcher; once in a process."""
    if _kept:
        return
    backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=module, device_guard=backward.Guard())
    backward.attach()
    _kept.extend(transfer.register() + ops.register(transfer.kernel) + amp.attach())
    _kept.extend(rng.attach())
    accelerator.attach()
    compiled.attach()
    _kept.extend(absent.attach())
    HANDLERS[torch.ops.aten.record_stream.default] = _record_stream
    for name in ("amp", "memory", "random", "streams"):
        sys.modules[f"torch.npu.{name}"] = getattr(module, name)
    modules.attach()
    # optimizers choose their multi-tensor form by type, and know only PyTorch's own
    for place in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        importlib.import_module(place)._foreach_supported_types.append(NpuTensor)
    torch.serialization.register_package(5, _storage_place, _storage_to_place)
    ForkingPickler.register(NpuTensor, _not_shared)
    torch.UntypedStorage.__new__ = _new_storage


def _record_stream(info: Any, args: tuple, kwargs: dict) -> None:
    """Nothing to do: numbers are computed when an operator is launched, so a block can be used again at once."""


def _not_shared(tensor: torch.Tensor) -> None:
    raise RuntimeError("a tensor on an emulated npu cannot be shared with another process: send tensor.cpu(), and move it to the npu there (a Dataset read by workers should hold host tensors)")


def _new_storage(cls: type, *args: Any, device: Any = None, **options: Any) -> torch.UntypedStorage:
    """``torch.UntypedStorage(8, device="npu")``: PyTorch would crash, for it knows no allocator of the device's."""
    place = None if device is None else torch.device(device)
    if place is None or place.type != "npu":
        return torch._C.StorageBase.__new__(cls, *args, device=device, **options)
    storage = torch._C.StorageBase.__new__(torch.UntypedStorage, *args, **options)
    runtime.hold(storage, _index(place))
    return storage


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
