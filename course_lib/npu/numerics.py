"""Numerics of the cube: factors in fp16, bf16, fp8 or int8, sums in fp32 or int32, the result rounded once.

So the error of one result c = Σ aᵢ·bᵢ over K terms is at most ``u·|c| + γ·Σ|aᵢ·bᵢ|``: u is half the spacing of the
result's dtype (2⁻¹¹ for fp16, 2⁻⁸ for bf16), γ = K·2⁻²⁴ comes from the sum in fp32. ``tests/npu/test_numerics.py`` checks
every product against float64 with this bound. The products are computed by PyTorch's CPU kernels. What was found of these
(torch 2.13, with oneDNN at four instruction sets and without it):

* ``mm``, ``bmm``, ``addmm``, ``baddbmm``, ``linear``, ``mv``, ``addmv``, ``dot`` in fp16 and bf16 keep the rule, also where a bias
  is added: it goes into the fp32 sum. ``_int_mm`` sums in int32, ``_scaled_mm`` of fp8 in fp32.
* ``addbmm`` rounds after each matrix of the batch: errors 5 (fp16) and 54 (bf16) times the bound over 64 of them.
* Convolutions in fp16: gradients and transposed convolutions add up in fp16, 8 to 48 times the bound.
* Flash attention's backward adds dK and dV up in the dtype of the inputs: 2.8 times the error at T = 2048, growing.

The device computes the last three in float32 and rounds once. Attention's probabilities are rounded to the inputs' dtype
before they meet the values, forward and backward, as on the chip, where the cube takes both factors in one dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from course_lib.npu import ops

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def widened(func: Callable) -> Callable:
    """``func`` with float32 in place of half precision, its results rounded once."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = next(a for a in args if isinstance(a, Tensor)).dtype
        if dtype not in HALF:
            return func(*args, **kwargs)
        result = func(*[_wide(a) for a in args], **{name: _wide(a) for name, a in kwargs.items()})
        return _narrow(result, dtype) if isinstance(result, Tensor) else tuple(_narrow(r, dtype) for r in result)

    return kernel


def _wide(a: Any) -> Any:
    return a.float() if isinstance(a, Tensor) and a.dtype in HALF else a


def _narrow(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def addbmm_(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return self.copy_(addbmm(self, batch1, batch2, beta=beta, alpha=alpha))


addbmm = widened(aten.addbmm.default)


def _mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of truth values as what is added to the scores; the chip's kernel takes either."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def flash(query: Tensor, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu.default(query, *args, attn_mask=_mask(attn_mask, query.dtype), **kwargs)


_flash_backward = widened(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)


def flash_backward(grad: Tensor, query: Tensor, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _flash_backward(grad, query, *args, attn_mask=_mask(attn_mask, query.dtype), **kwargs)


def attach() -> None:
    """Take these kernels in place of the CPU's; before any operator has run."""
    ops.KERNELS.update({
        aten.addbmm.default: addbmm,
        aten.addbmm_.default: addbmm_,
        aten.convolution.default: widened(aten.convolution.default),
        aten.convolution_backward.default: widened(aten.convolution_backward.default),
        aten._scaled_dot_product_flash_attention_for_cpu.default: flash,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: flash_backward,
    })  # fmt: skip
