"""Where the model runs, in what any device of PyTorch answers: opening it, timing it, and its peak.

Times are the device's own: its events, and on the cpu, which has none, the wall clock.
"""

import importlib
import os
import time
from typing import Any

import torch


def open_device(name: str, chip: str | None = None) -> torch.device:
    """The device called `name`: "cpu", "cuda", "npu" or one of those with an index, as "npu:0".

    For "npu" a real torch_npu is used where it has been imported; else an emulated chip, the one that `chip` names.
    ValueError where there is no such device, or where `chip` is named for another device.
    """
    kind = name.split(":")[0]
    if chip is not None and kind != "npu":
        raise ValueError(f"a chip is chosen for the device npu only, not for {name!r}; leave out the chip")
    if chip is not None:
        os.environ["COURSE_CHIP"] = chip
    if kind == "npu" and not hasattr(torch, "npu"):
        importlib.import_module("course_lib.npu")
    if kind not in ("cpu", "cuda", "npu"):
        raise ValueError(f"unknown device {name!r}; expected cpu, cuda or npu")
    if kind != "cpu" and not torch.get_device_module(kind).is_available():
        raise ValueError(f"no {kind} device on this machine; expected cpu, or npu for the emulated chip")
    return torch.device(name)


def mark(device: torch.device) -> Any:
    """A point in the device's stream of work (an event), or on the cpu the present time."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.get_device_module(device).Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, stop: Any) -> float:
    """Seconds from one mark to a later one; waits until the device has reached it."""
    if isinstance(start, float):
        return stop - start
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3  # elapsed_time is in milliseconds


def peak_flops(device: torch.device, dtype: str = "float32") -> float | None:
    """FLOP/s of the cube (matrix unit) for `dtype`, from `peak_flops` of the device's properties; None if unknown."""
    if device.type == "cpu":
        return None
    properties = torch.get_device_module(device).get_device_properties(device)
    return (getattr(properties, "peak_flops", None) or {}).get(dtype)


def clock(device: torch.device) -> str:
    """What the times of `device` are, for print."""
    return "wall clock" if device.type == "cpu" else f"{device.type} events"
