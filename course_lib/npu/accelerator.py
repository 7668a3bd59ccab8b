"""``torch.accelerator`` on the emulated device.

Its Python functions ask ``torch._C._accelerator_*``, which ask a device guard in C++; for a device in Python that guard
answers with zeros or an error. Here are the answers; ``attach()`` puts them in place.
"""

from typing import Any

import torch

from course_lib.npu import memory_api, runtime
from course_lib.npu.streams import _index, current_stream, set_stream


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


def attach() -> None:
    for name, answer in ANSWERS.items():
        if hasattr(torch._C, f"_accelerator_{name}"):
            setattr(torch._C, f"_accelerator_{name}", answer)
