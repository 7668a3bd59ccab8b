"""``torch.accelerator`` on the emulated device; ``torch.Stream("npu")`` and ``torch.Event("npu")``, which go with it.

Its Python functions ask ``torch._C._accelerator_*``, which ask a device guard in C++; for a device in Python that guard
answers with zeros or an error. Here are the answers; ``attach()`` puts them in place. So it does with stand-ins for
the names ``torch.Stream`` and ``torch.Event``: called for an npu they make ours, which know emulated time.
"""

from typing import Any

import torch

from course_lib.npu import memory_api, runtime
from course_lib.npu.streams import _NPU, Event, Stream, _index, current_stream, set_stream


def exchange_device(index: int) -> int:
    """Make ``index`` the current device, unless it is negative; returns the one before."""
    outer = runtime.current
    if index >= 0:
        runtime.current = _index(index)
    return outer


def synchronize(index: int | None = None) -> None:
    runtime.devices[_index(index)].synchronize()


def capability(index: int | None = None) -> dict[str, Any]:
    """Dtypes in which tensors can be made and converted: all that PyTorch's CPU kernels know."""
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
    others = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128)
    return {"supported_dtypes": {*floats, *others}}


ANSWERS = {
    "getDeviceIndex": lambda: runtime.current,
    "setDeviceIndex": exchange_device,
    "exchangeDevice": exchange_device,
    "maybeExchangeDevice": exchange_device,
    "getStream": current_stream,
    "setStream": set_stream,
    "synchronizeDevice": synchronize,
    "getDeviceCapability": capability,
    "isAllocatorInitialized": lambda: True,
    "emptyCache": memory_api.empty_cache,
    "emptyHostCache": lambda: None,
    "getDeviceStats": memory_api.memory_stats_as_nested_dict,
    "resetAccumulatedStats": memory_api.reset_accumulated_memory_stats,
    "resetPeakStats": memory_api.reset_peak_memory_stats,
    "getMemoryInfo": memory_api.mem_get_info,
}


class _StandIn(type):
    """A name in place of PyTorch's class ``theirs``; nothing's type, and ``isinstance`` answers for ``theirs`` as before."""

    theirs: type
    ours: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """The device is the first argument or named; without one it is the accelerator, so an npu."""
        device = args[0] if args else kwargs.get("device", kwargs.get("device_type", "npu"))
        if device == _NPU if "device_type" in kwargs else torch.device("npu" if device is None else device).type == "npu":
            return cls.ours(*args, **kwargs) if cls.ours is Stream else cls.ours(**{k: v for k, v in kwargs.items() if k != "device"})
        return cls.theirs(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.theirs)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, cls.theirs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.theirs, name)


def attach() -> None:
    for name, answer in ANSWERS.items():
        if hasattr(torch._C, f"_accelerator_{name}"):
            setattr(torch._C, f"_accelerator_{name}", answer)
    for theirs, ours in ((torch.Stream, Stream), (torch.Event, Event)):
        name = theirs.__name__
        setattr(torch, name, _StandIn(name, (), {"theirs": theirs, "ours": ours, "__doc__": theirs.__doc__, "__module__": "torch"}))
