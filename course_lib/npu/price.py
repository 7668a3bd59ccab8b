"""What an operator costs, and the charge: launched on the clock, told to the ledgers.

Costs are remembered by operator, shapes and dtypes, for a program repeats itself at every step.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch

from course_lib.chip.cost import Cost, UnsupportedDtype, Work, cost
from course_lib.npu import runtime
from course_lib.npu.work import tensors_in, work


def charge(name: str, device: runtime.Device, priced: tuple[Cost, tuple], tensors: list[torch.Tensor]) -> None:
    """Launch work of this price and shapes, done on ``tensors``, on the device's current stream; tell the ledgers."""
    price, shapes = priced
    stream = device.current
    start = stream.launch(price.ps)
    for ledger in runtime.ledgers:
        ledger.record(name, shapes, tensors, device, stream, start, price)


class Form:
    """Shape, strides and dtype of a tensor. There is one object for each, so that it is found in a table by its identity."""

    __slots__ = ("shape", "stride", "dtype", "complex")

    def __init__(self, shape: tuple, stride: tuple, dtype: torch.dtype) -> None:
        self.shape, self.stride, self.dtype, self.complex = shape, stride, dtype, dtype.is_complex


_forms: dict[tuple, Form] = {}
_form_of, _held_of = attrgetter("_form"), attrgetter("_held")


def form_of(t: torch.Tensor) -> Form:
    key = t.shape, t.stride(), t.dtype
    form = _forms.get(key)
    if form is None:
        form = _forms[key] = Form(*key)
    return form


def price(info: Any, device: runtime.Device, seen: list[Any], forms: tuple, args: list, kwargs: dict, result: Any) -> tuple[Cost, tuple]:
    """Cost and shapes of one call of the operator ``info`` (see tensor.py) on ``seen`` with results of these ``forms``.

    Remembered by operator, shapes, strides, dtypes and which arguments share a storage.
    """
    shared = None
    if len(seen) > 1 and len(set(map(id, map(_held_of, seen)))) < len(seen):
        shared = _shared(seen)
    numbers = _numbers((args, list(kwargs.values()))) if info.needs_arguments else None
    key = (info, tuple(map(_form_of, seen)), forms, shared, numbers)
    return device.costs.get(key) or _reckon(info, device, key, seen, args, kwargs, result)


def _shared(seen: list[Any]) -> tuple:
    """Which of ``seen`` lie in one storage, and where."""
    blocks = [id(t._held) for t in seen]
    return (*map(blocks.index, blocks), *[t._inner.storage_offset() for t in seen])


def _reckon(info: Any, device: runtime.Device, key: tuple, seen: list[Any], args: list, kwargs: dict, result: Any) -> tuple[Cost, tuple]:
    def reckon() -> Work:
        outs = tensors_in(result) or [t for name in info.outs for t in tensors_in(kwargs[name])]
        there = {id(t._inner) for t in seen}
        on_device = [None if isinstance(a, torch.Tensor) and id(a) not in there else a for a in args]  # without the host's scalars
        return work(info.func, tuple(on_device), kwargs, outs)

    return price_of(device, key, reckon, seen)


def _numbers(value: Any) -> Any:
    """Arguments without their tensors, to be remembered with the shapes where the cost depends on them."""
    if isinstance(value, (list, tuple)):
        return tuple([_numbers(v) for v in value])
    return value if isinstance(value, (bool, int, float, type(None))) else ...


def price_of(device: runtime.Device, key: tuple, reckon: Callable[[], Work], tensors: list[torch.Tensor]) -> tuple[Cost, tuple]:
    """What is known under ``key``, or the cost of the work that ``reckon`` gives and the shapes of ``tensors``."""
    found = device.costs.get(key)
    if found is None:
        try:
            reckoned = cost(device.spec, reckon())
        except UnsupportedDtype as error:
            name = key[0] if isinstance(key[0], str) else key[0].name
            raise ChipLacksDtype(f"{name} on npu:{device.index}: {error}") from None
        found = device.costs[key] = reckoned, tuple(tuple(t.shape) for t in tensors)
    return found


class ChipLacksDtype(UnsupportedDtype, NotImplementedError):
    """An operator in a dtype in which the chip has no arithmetic."""
