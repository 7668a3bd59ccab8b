"""Where host and device meet: copies between them, factories, and reading a value.

A copy is launched like an operator and moves over the host link. Unless it is ``non_blocking``, the host
waits for it, and so for all that the stream had to do before; so it does when a value is read with ``.item()``.
"""

from typing import Any

import torch

from course_lib.chip.cost import Work, cost
from course_lib.npu import runtime
from course_lib.npu.price import charge, price_of
from course_lib.npu.tensor import HANDLERS, Info, NpuTensor, adopt, run, wrap

aten = torch.ops.aten


def handler(func: torch._ops.OpOverload) -> Any:
    """Register a rule for ``func`` on device tensors."""

    def register(rule: Any) -> Any:
        HANDLERS[func] = rule
        return rule

    return register


def move(name: str, device: runtime.Device, inner: torch.Tensor, wait: bool) -> None:
    """Charge the transfer of ``inner`` over the host link of ``device``; the host waits if it needs the bytes."""
    nbytes = inner.numel() * inner.element_size()
    price = cost(device.spec, Work(link_bytes=nbytes))
    charge(name, device, (price, (tuple(inner.shape),)), [inner])
    if wait:
        device.current.wait()


def _has_numbers(source: NpuTensor, what: str) -> None:
    if source._inner.device.type == "meta":
        raise runtime.NeedsValues(what)


def between(source: NpuTensor, target: runtime.Device) -> None:
    """Charge a copy from one device to another; both streams are busy with it, through host memory."""
    origin = runtime.devices[source._held.index]
    move("copy_device_to_device", origin, source._inner, wait=False)
    target.current.ready = max(target.current.ready, origin.current.ready)
    move("copy_device_to_device", target, source._inner, wait=False)


@handler(aten._to_copy.default)
def _to_copy(info: Info, args: tuple, kwargs: dict) -> Any:
    """``.to(device, dtype)``: a cast stays on the device, anything else crosses the host link."""
    source, wait = args[0], not kwargs.get("non_blocking")
    origin = source._held.index if isinstance(source, NpuTensor) else None
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else source.device
    target = runtime.destination(device.index) if device.type == "npu" else None
    if origin == target:
        return run(info, args, {**kwargs, "device": torch.device("npu", target)} if "device" in kwargs else kwargs)
    host = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "pin_memory")}
    if origin is None:
        out = wrap(aten._to_copy.default(source, **host, device=runtime.backing), target)
        move("copy_host_to_device", runtime.devices[target], out._inner, wait)
        return out
    if target is None:
        _has_numbers(source, "a copy to the host")
        move("copy_device_to_host", runtime.devices[origin], source._inner, wait)
        return aten._to_copy.default(source._inner, **host, device=device)
    between(source, runtime.devices[target])
    return wrap(aten._to_copy.default(source._inner, **host), target)


@handler(aten.copy_.default)
def _copy_(info: Info, args: tuple, kwargs: dict) -> Any:
    """``target.copy_(source)`` in every direction."""
    target, source = args[:2]
    wait = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if not isinstance(target, NpuTensor):
        _has_numbers(source, "a copy to the host")
        move("copy_device_to_host", runtime.devices[source._held.index], source._inner, wait)
        target.copy_(source._inner)
    elif not isinstance(source, NpuTensor):
        target._inner.copy_(source)
        move("copy_host_to_device", runtime.devices[target._held.index], target._inner, wait)
    elif source._held.index != target._held.index:
        between(source, runtime.devices[target._held.index])
        target._inner.copy_(source._inner)
    else:
        return run(info, args, kwargs)
    return target


@handler(aten._copy_from.default)
def _copy_from(info: Info, args: tuple, kwargs: dict) -> Any:
    return _copy_(info, (args[1], args[0], *args[2:]), kwargs)


@handler(aten._local_scalar_dense.default)
def _local_scalar_dense(info: Info, args: tuple, kwargs: dict) -> Any:
    """``.item()``: a few bytes cross the link, and the host waits for them."""
    _has_numbers(args[0], ".item()")
    move("item", runtime.devices[args[0]._held.index], args[0]._inner, wait=True)
    return args[0]._inner.item()


@handler(aten.set_.source_Storage_storage_offset)
def _set_(info: Info, args: tuple, kwargs: dict) -> Any:
    """``tensor.set_(storage, …)``, as ``torch.load`` uses it: the wrapper takes over the storage."""
    target, storage = args[0], args[1]
    inner = torch.empty(0, dtype=target.dtype).set_(storage, *args[2:])
    adopt(target, inner)
    return target


@handler(aten.index.Tensor)
@handler(aten.index_put_.default)
@handler(aten.index_put.default)
@handler(aten._index_put_impl_.default)
def _index(info: Info, args: tuple, kwargs: dict) -> Any:
    """``x[i]`` and ``x[i] = y``: here, and only here, PyTorch lets indices on the host in; they are moved."""
    if isinstance(args[0], NpuTensor):
        indices = [i if i is None or isinstance(i, NpuTensor) else i.to(args[0].device) for i in args[1]]
        args = (args[0], indices, *args[2:])
    return run(info, args, kwargs)


@handler(aten._pack_padded_sequence.default)
def _pack(info: Info, args: tuple, kwargs: dict) -> tuple[NpuTensor, torch.Tensor]:
    """``pack_padded_sequence``: the lengths, and the batch sizes made of them, stay on the host."""
    padded, device = args[0], runtime.devices[args[0]._held.index]
    packed, batch_sizes = info.func(padded._inner, *args[1:], **kwargs)
    nbytes = packed.numel() * packed.element_size()
    out = wrap(packed, device.index)
    charge(info.name, device, price_of(device, (info.name, nbytes), lambda: Work(bytes_read=nbytes, bytes_written=nbytes), [padded]), [padded])
    return out, batch_sizes


def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    """``host_tensor.pin_memory()``, as a DataLoader asks for: a copy; the emulated link does not tell them apart."""
    return tensor.clone()


def factory(func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Operators that reach the device without a device tensor: ``torch.empty(…, device="npu")`` and its like."""
    return NpuTensor.__torch_dispatch__(func, (), args, kwargs)


def register() -> list[torch.library.Library]:
    """Connect the factories with PyTorch's dispatcher; the libraries must be kept alive."""
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(factory, "PrivateUse1")
    # Where PyTorch calls with the Python key off (``torch.tensor(…, device="npu")``) the fallback is not enough.
    explicit = torch.library.Library("aten", "IMPL")
    for name, func in (
        ("empty.memory_format", aten.empty.memory_format), ("empty_strided", aten.empty_strided.default),
        ("copy_", aten.copy_.default), ("_to_copy", aten._to_copy.default), ("_copy_from", aten._copy_from.default),
        ("_local_scalar_dense", aten._local_scalar_dense.default),
    ):
        explicit.impl(name, kernel(func), "PrivateUse1")
    explicit.impl("_pin_memory", pin_memory, "CPU")
    return [everything, explicit]


def kernel(func: torch._ops.OpOverload) -> Any:
    """A device kernel for ``func`` that PyTorch's dispatcher can call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return factory(func, *args, **kwargs)

    return call
