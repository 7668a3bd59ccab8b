"""Parts of PyTorch that have no form on this device, or another one than elsewhere: nested, lazy, DataParallel, host scalars.

* Nested tensors, lazy modules and ``nn.DataParallel`` raise NotImplementedError with the reason and a way round, where
  PyTorch would fail later with something obscure.
* ``ctc_loss`` wants its lengths as numbers, and ``_foreach_addcdiv_`` its factors on the host (as a compiled optimizer step
  gives them), though all other operands lie on the device.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, UninitializedTensorMixin

from course_lib.npu.tensor import HANDLERS, NpuTensor, run

aten = torch.ops.aten
NESTED = "nested tensors have no form on the emulated npu: pad them (torch.nested.to_padded_tensor on the cpu), or pack the sequences and give npu_fusion_attention their ends (TND)"
LAZY = "a module that does not know its shapes yet cannot be on npu: run one batch through it on the cpu, then .to('npu')"
SCATTERED = "nn.DataParallel copies model and batch between devices with functions that PyTorch has for CUDA only; use DistributedDataParallel"


def _on_npu(value: Any) -> bool:
    """Whether a device, a tensor, or one in a list is the npu's."""
    if isinstance(value, (list, tuple)):
        return any(map(_on_npu, value))
    if isinstance(value, Tensor):
        return value.device.type == "npu"
    return isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "npu"


def _guarded(function: Callable, reason: str) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(map(_on_npu, (*args, *kwargs.values()))):
            raise NotImplementedError(reason)
        return function(*args, **kwargs)

    return call


def _refusing(reason: str) -> Callable:
    def call(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(reason)

    return call


def _no_nested() -> torch.library.Library:
    from torch.nested._internal.nested_tensor import NestedTensor

    NestedTensor.__new__ = _guarded(NestedTensor.__new__, NESTED)
    for name in ("nested_tensor", "as_nested_tensor", "nested_tensor_from_jagged"):
        setattr(torch.nested, name, _guarded(getattr(torch.nested, name), NESTED))
    library = torch.library.Library("_", "IMPL")
    library.fallback(_refusing(NESTED), "NestedTensorPrivateUse1")
    return library


def _no_lazy() -> None:
    for kind in (UninitializedParameter, UninitializedBuffer):
        kind.__new__ = _guarded(kind.__new__, LAZY)
    theirs = UninitializedTensorMixin.__torch_function__.__func__

    def checked(cls: type, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = theirs(cls, func, types, args, kwargs)
        if type(result) is NpuTensor:
            raise NotImplementedError(LAZY)
        return result

    UninitializedTensorMixin.__torch_function__ = classmethod(checked)


def _ctc_loss(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """``ctc_loss`` with its lengths as tensors, on the host or not: the kernel is launched with numbers."""
    return aten.ctc_loss.IntList(log_probs, targets, input_lengths.tolist(), target_lengths.tolist(), *rest, **kwargs)


def _host_factors(info: Any, args: tuple, kwargs: dict) -> Any:
    """``_foreach_addcdiv_(…, tensor of factors)``: PyTorch wants that tensor on the host."""
    factors = args[3]
    if isinstance(factors, NpuTensor):
        return run(info, args, kwargs)
    name = info.func._schema.name.split("::")[1]
    return getattr(aten, name).ScalarList(*args[:3], factors.tolist())


def attach() -> list:
    _no_lazy()
    for name in ("_scatter", "_gather", "_broadcast_coalesced"):
        if not hasattr(torch._C, name):
            setattr(torch._C, name, _refusing(SCATTERED))
    library = torch.library.Library("aten", "IMPL")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("ctc_loss.Tensor", _ctc_loss, key)
    for name in ("_foreach_addcdiv_", "_foreach_addcmul_", "_foreach_addcdiv", "_foreach_addcmul"):
        HANDLERS[getattr(aten, name).Tensor] = _host_factors
    return [_no_nested(), library]
