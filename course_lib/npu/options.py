"""``torch.npu``'s switches. Those that choose between ways to the same result are accepted and change nothing here.

``torch.npu.matmul.allow_hf32`` and ``torch.npu.conv.allow_hf32`` are permissions, and the emulation never makes use of
them: float32 products are computed, and charged, in float32.
"""

from collections.abc import Callable
from contextlib import ContextDecorator
from enum import IntEnum
from itertools import count
from typing import Any

from course_lib.npu import runtime
from course_lib.npu.streams import _index


class CubeMathType(IntEnum):
    """What a kernel may do with float32 operands of the cube."""

    KEEP_DTYPE = 0
    ALLOW_FP32_DOWN_PRECISION = 1
    USE_FP16 = 2
    USE_HF32 = 3


class _Switches:
    """Named values that may be set; a name that is not among them is a mistake."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in vars(self):
            raise AttributeError(f"no such option: {name}; there are {', '.join(vars(self))}")
        vars(self)[name] = value


config = _Switches(allow_internal_format=False)
matmul = _Switches(allow_hf32=False, cube_math_type=CubeMathType.KEEP_DTYPE)
conv = _Switches(allow_hf32=True)
_jit_compile = False
_nd_format = True

CHOICES = {
    "ACL_PRECISION_MODE": ("allow_fp32_to_fp16", "must_keep_origin_dtype"),
    "ACL_OP_SELECT_IMPL_MODE": ("high_performance", "high_precision"),
    "ACL_OP_DEBUG_LEVEL": ("0", "1", "2", "3", "4"),
    "ACL_OP_COMPILER_CACHE_MODE": ("disable", "enable", "force"),
    "MM_BMM_ND_ENABLE": ("enable", "disable"),
}


def set_option(option: dict) -> None:
    """Options of the CANN compiler: values are checked, and ``MM_BMM_ND_ENABLE`` kept. There is no compiler to obey."""
    if not isinstance(option, dict):
        raise TypeError("npu option must be a dict.")
    for name, value in option.items():
        if name in CHOICES and str(value) not in CHOICES[name]:
            raise ValueError(f"value of {name} should be in {list(CHOICES[name])} but got {value}")
    if "MM_BMM_ND_ENABLE" in option:
        set_mm_bmm_format_nd(option["MM_BMM_ND_ENABLE"] == "enable")


def set_compile_mode(jit_compile: bool = False) -> None:
    """Kept for ``is_jit_compile_false``. Nothing is compiled."""
    global _jit_compile
    _jit_compile = bool(jit_compile)


def is_jit_compile_false() -> bool:
    return not _jit_compile


def set_mm_bmm_format_nd(is_nd: bool = True) -> None:
    """Kept: the memory format of a product changes neither its result nor its emulated time."""
    global _nd_format
    _nd_format = bool(is_nd)


def get_mm_bmm_format_nd() -> bool:
    return _nd_format


def set_deterministic_level(level: int) -> None:
    """Accepted: the emulation is deterministic at every level."""


def enable_deterministic_with_backward(tensor: Any) -> Any:
    return tensor


def disable_deterministic_with_backward(tensor: Any) -> Any:
    return tensor


def get_device_limit(device: Any = None) -> dict[str, int | None]:
    """The cores of the chip: all may be used."""
    spec = runtime.devices[_index(device)].spec
    return {"cube_core_num": spec.cube_cores, "vector_core_num": spec.vector_cores}


def is_current_stream_capturing() -> bool:
    return False


_ranges = count(1)


class mstx(ContextDecorator):
    """Marks for Ascend's profiler. Accepted, and not shown: mark regions with ``torch.profiler.record_function``."""

    @staticmethod
    def mark(message: str, stream: Any = None, domain: str = "default") -> None:
        pass

    @staticmethod
    def range_start(message: str, stream: Any = None, domain: str = "default") -> int:
        return next(_ranges)

    @staticmethod
    def range_end(range_id: int, domain: str = "default") -> None:
        pass

    @staticmethod
    def mstx_range(message: str, stream: Any = None, domain: str = "default") -> Callable:
        return lambda function: function
