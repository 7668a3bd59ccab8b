"""The device tensor: real numbers in host memory, and a price for everything that is done with them.

PyTorch sends every operator on an ``NpuTensor`` to ``__torch_dispatch__``, below autograd. There

1. the arguments are unwrapped to the host tensors that hold the numbers,
2. the operator runs on them, by PyTorch's own CPU kernels,
3. its results are wrapped, and new storages take device memory,
4. the clock is charged: the operator's Work, priced by ``chip.cost``, is launched on the current stream.

Views cost nothing. Copies between host and device, and operators whose result the host must see
(``.item()``, ``nonzero``), make the host wait; they have their own rules in ``transfer.py``. Prices: ``price.py``.
"""

import re
from typing import Any

import torch

from course_lib.npu import ops, runtime
from course_lib.npu.generator import draw
from course_lib.npu.price import Form, charge, form_of, price
from course_lib.npu.work import POOLS, base_name

FREE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "detach", "alias", "lift", "lift_fresh", "_unsafe_view", "_reshape_alias", "set", "resize", "record_stream", "_has_compatible_shallow_copy_type", "is_same_size"}
PLAIN = {int, float, bool, type(None), torch.dtype, str}
NO_LAYOUT = "npu: tensors with layout {} are not supported; use dense tensors, or keep this one on the cpu"
NOTHING: dict = {}  # keyword arguments, where there are none
HOST = -1  # in place of a device index: the result is to lie in host memory
NEEDS_ARGUMENTS = POOLS | {"index_put", "_index_put_impl", "convolution", "convolution_backward", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}


class NpuTensor(torch.Tensor):
    """A tensor on an emulated device. ``_inner`` is the host tensor with its numbers, ``_held`` its memory."""

    _inner: torch.Tensor
    _held: runtime.Held
    _form: Form

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        if len(types) > 1 and any(kind.__name__ == "AsyncCollectiveTensor" for kind in types):
            return NotImplemented  # it waits for its collective, and comes again with the result
        info = _infos.get(id(func)) or _learn(func)
        return info.handler(info, args, kwargs or NOTHING)

    # -- what a tensor does outside of operators --

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        shape_only = self._inner.device.type == "meta"
        text = f"tensor(..., size={tuple(self.shape)}, dtype={self.dtype})" if shape_only else repr(self.detach().cpu())
        grad = f", grad_fn=<{type(self.grad_fn).__name__}>" if self.grad_fn else ", requires_grad=True" if self.requires_grad else ""
        prefix = "Parameter containing:\n" if getattr(self, "_is_param", False) else ""
        return f"{prefix}{text[:-1]}, device='{self.device}'{grad})"

    def __reduce_ex__(self, protocol: int) -> tuple:
        storage = torch.storage.TypedStorage(wrap_storage=self.untyped_storage(), dtype=self.dtype, _internal=True)
        inner = self._inner
        data = (storage, inner.storage_offset(), tuple(inner.shape), inner.stride(), self.requires_grad, {})
        if getattr(self, "_is_param", False):
            plain = _Plain(data[:4] + (False, {}))
            return torch._utils._rebuild_parameter, (plain, self.requires_grad, {})
        return torch._utils._rebuild_tensor_v2, data

    def __deepcopy__(self, memo: dict) -> "NpuTensor":
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol at the moment.")
        with torch.no_grad():
            copy = self.detach().clone(memory_format=torch.preserve_format)
        copy.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True
        if self.grad is not None:
            copy.grad = self.grad.__deepcopy__(memo)
        memo[id(self)] = copy
        return copy

    @property
    def data(self) -> "NpuTensor":
        """The same memory, without history; assigning a device tensor takes over its memory."""
        return _data.__get__(self)

    @data.setter
    def data(self, other: torch.Tensor) -> None:
        if not isinstance(other, NpuTensor):
            raise RuntimeError(f"cannot assign a tensor on {other.device} to .data of a tensor on {self.device}; move it first with .to({str(self.device)!r})")
        _data.__set__(self, other)
        self._inner, self._held, self._form = other._inner, other._held, other._form

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._inner.untyped_storage()

    def data_ptr(self) -> int:
        return self._inner.data_ptr()

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()


_data = torch._C.TensorBase.data


class _Plain:
    """Pickles as an ordinary device tensor: what ``_rebuild_parameter`` takes."""

    def __init__(self, data: tuple) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: int) -> tuple:
        return torch._utils._rebuild_tensor_v2, self.data


class Info:
    """What is known of an operator before it runs; made once, on its first call."""

    __slots__ = ("func", "name", "kernel", "free", "in_place", "outs", "random", "takes_generator", "waits", "needs_arguments", "handler")

    def __init__(self, func: torch._ops.OpOverload) -> None:
        schema = func._schema
        self.func, self.name = func, base_name(func)
        self.kernel = ops.KERNELS.get(func) or ops.BINDINGS.get(func, func._op)  # func(…) is func._op(…) with one more call
        written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        self.free = self.name in FREE or func.is_view
        self.in_place = bool(written) and not written[0].is_out and len(schema.returns) == 1 and schema.returns[0].alias_info is not None
        self.outs = [a.name for a in written if a.is_out]
        self.random = torch.Tag.nondeterministic_seeded in func.tags
        self.takes_generator = any(a.name == "generator" and a.kwarg_only for a in schema.arguments)
        self.waits = torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags
        self.needs_arguments = self.name in NEEDS_ARGUMENTS
        self.handler = _handler(func, self.name)


_infos: dict[int, Info] = {}  # by id: to hash an operator itself is a call of Python
HANDLERS: dict[torch._ops.OpOverload, Any] = {}  # operators with rules of their own, see transfer.py


def _learn(func: torch._ops.OpOverload) -> Info:
    info = _infos[id(func)] = Info(func)
    return info


def _handler(func: torch._ops.OpOverload, name: str) -> Any:
    """The rule by which ``func`` is carried out."""
    if func in HANDLERS:
        return HANDLERS[func]
    if func not in ops.WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return by_parts
    return look if func.is_view or name == "_unsafe_view" else run


def by_parts(info: Info, args: tuple, kwargs: dict) -> Any:
    """An operator that PyTorch has not taken apart yet, as in ``torch.inference_mode()``."""
    return ops.OWN.get(info.func, info.func.decompose)(*args, **kwargs)


def run(info: Info, args: tuple, kwargs: dict) -> Any:
    """Run an operator that stays on one device: compute, wrap, charge."""
    seen: list[NpuTensor] = []
    host_args = _unwrap(args, seen)
    host_kwargs, index = _unwrap_kwargs(kwargs, seen) if kwargs else (NOTHING, None)
    index = _one_device(seen, index)
    if index == HOST:  # zeros_like(x, device="cpu")
        return info.func(*host_args, **host_kwargs)
    if info.in_place or info.outs:
        _refuse_foreign(info, args, kwargs, seen)
    device = runtime.devices[index]
    result = _compute(info, host_args, host_kwargs, device)
    if type(result) is torch.Tensor and not (info.in_place or info.outs):
        out = wrap(result, index)
        forms = out._form
    else:
        out, forms = _wrap_result(info, result, args, kwargs, index)
    if not info.free:
        charge(info.name, device, price(info, device, seen, forms, host_args, host_kwargs, result), seen)
        if info.waits:
            device.current.wait()
    return out


def look(info: Info, args: tuple, kwargs: dict) -> NpuTensor | list[NpuTensor]:
    """A view, or several (``split``): another shape for the same memory. Nothing is launched."""
    base = args[0]
    if _inference() and not base.is_inference():  # a view of an ordinary tensor is one
        with torch.inference_mode(False):
            return look(info, args, kwargs)
    inner = info.kernel(base._inner, *args[1:], **kwargs)
    return _view(inner, base._held) if type(inner) is torch.Tensor else [_view(i, base._held) for i in inner]


_inference = torch._C.is_inference_mode_enabled


# -- arguments ----------------------------------------------------------------------------------------


def _unwrap(args: Any, seen: list[NpuTensor]) -> list:
    """Arguments with host tensors in place of device tensors, which are noted in ``seen``."""
    out = []
    for a in args:
        kind = type(a)
        if kind is NpuTensor:
            seen.append(a)
            a = a._inner
        elif kind in PLAIN:
            pass
        elif kind is list or kind is tuple:
            if a and not isinstance(a[0], (int, float)):
                a = kind(_unwrap(a, seen))
        elif isinstance(a, torch.Tensor):
            a = _foreign(a, seen)
        elif kind is torch.device:
            a = _host_device(a)
        out.append(a)
    return out


def _unwrap_kwargs(kwargs: dict, seen: list[NpuTensor]) -> tuple[dict, int | None]:
    """(keyword arguments for the host, index of the device that was asked for or HOST)."""
    index = None
    device = kwargs.get("device")
    if device is not None:
        device = torch.device(device)
        index = runtime.device(device.index).index if device.type == "npu" else HOST
    return {k: v for k, v in zip(kwargs, _unwrap(kwargs.values(), seen)) if k != "pin_memory"}, index


def _host_device(device: torch.device) -> torch.device:
    return runtime.backing if device.type == "npu" else device


def _foreign(t: torch.Tensor, seen: list[NpuTensor], written: bool = False) -> torch.Tensor:
    """A tensor that is not on the device: PyTorch lets it in only as a zero-dimensional CPU tensor, to be read."""
    if t.dim() == 0 and t.device.type == "cpu" and not written:
        return t
    if t.layout != torch.strided:
        raise NotImplementedError(NO_LAYOUT.format(t.layout))
    index = seen[0]._held.index if seen else runtime.current
    raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, npu:{index} and {t.device}!")


def _refuse_foreign(info: Info, args: tuple, kwargs: dict, seen: list[NpuTensor]) -> None:
    """What is written must lie on the device."""
    for t in args[:1] if info.in_place else _given(info, kwargs):
        if type(t) is not NpuTensor and isinstance(t, torch.Tensor):
            _foreign(t, seen, written=True)


def _one_device(seen: list[NpuTensor], index: int | None) -> int:
    """The device on which all of ``seen`` lie; an explicit ``device=`` argument wins."""
    if not seen or len(runtime.devices) == 1:
        return runtime.current if index is None else index
    first = seen[0]._held.index
    for t in seen:
        if t._held.index != first:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, npu:{first} and npu:{t._held.index}!")
    return first if index is None else index


def _compute(info: Info, args: list, kwargs: dict, device: runtime.Device) -> Any:
    """The operator by the CPU's kernel."""
    try:
        if info.random and runtime.backing.type == "cpu":
            return draw(info.kernel, info.takes_generator, args, kwargs, device.generator)
        return info.kernel(*args, **kwargs)
    except RuntimeError as error:
        if runtime.backing.type == "meta" and isinstance(error, NotImplementedError):
            raise runtime.NeedsValues(info.name) from error
        if "DefaultCPUAllocator" in str(error):  # more than the host has: the device refuses first, if it would
            device.memory.allocate(int(re.search(r"allocate (\d+) bytes", str(error))[1]))
        raise


# -- results ------------------------------------------------------------------------------------------


def wrap(inner: torch.Tensor, index: int) -> NpuTensor:
    """``inner`` as a tensor of device ``index``; a new storage takes device memory."""
    try:
        storage = inner.untyped_storage()
    except NotImplementedError:
        raise NotImplementedError(NO_LAYOUT.format(inner.layout)) from None
    return _view(inner, runtime.hold(storage, index))


def _view(inner: torch.Tensor, held: runtime.Held) -> NpuTensor:
    """``inner``, which lies in the memory ``held``, as a device tensor."""
    form = form_of(inner)
    out = _make(NpuTensor, form.shape, form.stride, inner.storage_offset(), None, form.dtype, _strided, held.device)
    out._inner, out._held, out._form = inner, held, form
    if inner.is_neg() or (form.complex and inner.is_conj()):  # a view with a sign or conjugation still to be done
        torch._C._set_neg(out, inner.is_neg())
        torch._C._set_conj(out, inner.is_conj())
    return out


_make, _strided = torch.Tensor._make_wrapper_subclass, torch.strided


def _wrap_result(info: Info, result: Any, args: tuple, kwargs: dict, index: int) -> tuple[Any, tuple]:
    """(what the caller gets, the forms of new results). Written arguments come back as the objects given."""
    if info.outs:
        given = _given(info, kwargs)
        _refresh(given)
        return (None if result is None else given[0] if len(given) == 1 else given), ()
    if info.in_place:
        _refresh((args[0],))
        return args[0], ()
    if isinstance(result, (list, tuple)):
        wrapped = [wrap(r, index) if isinstance(r, torch.Tensor) else r for r in result]
        return type(result)(wrapped) if type(result) in (list, tuple) else tuple(wrapped), tuple([w._form for w in wrapped if type(w) is NpuTensor])
    return result, ()


def _given(info: Info, kwargs: dict) -> tuple:
    """The tensors to write into that the caller gave, ``out=``; one of them may be a list."""
    return tuple([t for name in info.outs for t in (kwargs[name] if isinstance(kwargs[name], (list, tuple)) else [kwargs[name]])])


def _refresh(written: tuple) -> None:
    """A written tensor may have got another shape (``resize_``, ``out=``): let the wrapper follow."""
    for t in written:
        inner = t._inner
        if t._form is not form_of(inner):
            adopt(t, inner)


def adopt(t: NpuTensor, inner: torch.Tensor) -> None:
    """Make ``t`` stand for ``inner``: shape, strides and memory."""
    fresh = wrap(inner, t._held.index)
    runtime.follow(fresh._held, inner.untyped_storage())
    t.data = fresh
