"""Real hardware first: with torch_npu installed, the name "npu" belongs to it."""

import importlib
import importlib.util
import os
import sys
import warnings

import torch


def emulate() -> bool:
    """Shall this process emulate? False, with a warning, where a real torch_npu is installed and not declined."""
    wanted = os.environ.get("COURSE_EMULATE", "") not in ("", "0")
    if importlib.util.find_spec("torch_npu") is None:
        return True
    if not wanted:
        importlib.import_module("torch_npu")
        warnings.warn(
            "torch_npu is installed: device 'npu' is the real NPU and nothing is emulated, so there is no ledger and "
            "time is real time. To emulate, start Python with COURSE_EMULATE=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0.",
            stacklevel=3,
        )
        return False
    if "torch_npu" in sys.modules or torch._C._get_privateuse1_backend_name() == "npu":
        raise ImportError(
            "COURSE_EMULATE is set, but torch_npu has already taken the device name 'npu' (PyTorch loads it with "
            "`import torch`). Start Python with TORCH_DEVICE_BACKEND_AUTOLOAD=0 as well, and do not import torch_npu."
        )
    return True


def refuse(what: str) -> None:
    """Raise where something of the emulation is asked of a real NPU."""
    module = sys.modules.get("course_lib.npu")
    if getattr(module, "EMULATED", True) is False:
        raise RuntimeError(f"{what} belongs to the emulated NPU, and this process uses the real one (torch_npu is installed). Set COURSE_EMULATE=1 TORCH_DEVICE_BACKEND_AUTOLOAD=0 to emulate.")
