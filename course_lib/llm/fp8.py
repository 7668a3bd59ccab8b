"""Matrix products of fp8 numbers with a scale per block, forward and backward (DeepSeek-V3, arXiv:2412.19437, 3.3).

e4m3 has 3 bits after the point and reaches from 2⁻⁹ to 448. One scale for a tensor would lose all that is 10⁵ times
smaller than its outlier. So every 128 numbers along the sum, of one token, have a scale of their own, which brings the
largest to 448; of weights every block of 128 × 128 has one. Each 128-long part of the sum is multiplied in fp8, and the
parts, scaled, are added in float32.

    forward                y = x wᵀ     x by 1 × 128, w by 128 × 128
    backward to the input  dx = dy w    dy by 1 × 128, the same w
    backward to the weight dw = dyᵀ x   both by 128 tokens × 1: x, kept in fp8, is scaled anew

A chip that is good at this finds and applies the scales in one fused operator; here that takes five. On cuda
`torch._scaled_mm` gives float32 of rows with scales on Hopper only, with CUDA 12.9 or newer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.llm.layers import exchange

TILE = 128
FP8, LARGEST = torch.float8_e4m3fn, 448.0

Quantised = tuple[Tensor, Tensor]  # numbers (M, C) in fp8, and a scale for each row and 128 columns, (M, C/128)


def quantise(x: Tensor, rows: int = 1) -> Quantised:
    """x (M, C) in fp8, by blocks of `rows` × 128."""
    M, C = x.shape
    largest = F.max_pool2d(x.detach().abs()[None], (min(rows, M), min(TILE, C)), ceil_mode=True)[0]  # (M/rows, C/128)
    scale = (largest.float() / LARGEST).clamp(min=1e-20).repeat_interleave(min(rows, M), 0)[:M]  # (M, C/128)
    return (x / spread(scale, C)).to(FP8, memory_format=torch.contiguous_format), scale


def spread(scale: Tensor, C: int) -> Tensor:
    """A scale for each column: (M, C) of (M, C/128)."""
    return scale.repeat_interleave(min(TILE, C), 1)[:, :C]


def dequantise(x: Quantised) -> Tensor:
    """The numbers in float32, (M, C)."""
    return x[0].float() * spread(x[1], x[0].shape[1])


def product(a: Quantised, b: Quantised) -> Tensor:
    """a (M, C) times bᵀ of b (N, C), in float32: (M, N)."""
    parts = zip(a[0].split(TILE, 1), a[1].split(1, 1), b[0].split(TILE, 1), b[1].split(1, 1))
    y = None
    for x, x_scale, w, w_scale in parts:  # (M, c), (M, 1), (N, c), (N, 1)
        scales = {"scale_a": x_scale.contiguous(), "scale_b": w_scale.contiguous().t()}
        part = torch._scaled_mm(x, w.t(), **scales, out_dtype=torch.float32)  # (M, N)
        y = part if y is None else y + part
    return y


class Product(torch.autograd.Function):
    """x (M, C) times wᵀ of w (N, C), by blocks of fp8, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        small_x, small_w = quantise(x), quantise(w, TILE)
        ctx.save_for_backward(*small_x, *small_w)
        ctx.dtype = x.dtype
        return product(small_x, small_w).to(dtype)  # (M, N)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, x_scale, w, w_scale = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            over = w_scale[::TILE].t().repeat_interleave(TILE, 0)[: w.shape[1]]  # (C, N/128), the scales of wᵀ
            dx = product(quantise(dy), (w.t().contiguous(), over)).to(ctx.dtype)  # (M, C)
        if ctx.needs_input_grad[1]:
            dw = product(quantise(dy.t()), quantise(dequantise((x, x_scale)).t()))  # (N, C)
        return dx, dw, None


class Fp8Linear(nn.Module):
    """A linear layer without bias whose three products are in fp8; its result has autocast's dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.in_features % 16 or linear.out_features % 16:
            raise ValueError(f"fp8 products want widths in multiples of 16, found {linear}; use another precision")
        self.weight = linear.weight  # (N, C)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            y = Product.apply(x.flatten(0, -2), self.weight, dtype)  # (M, N)
        return y.unflatten(0, x.shape[:-1])  # (…, N)


def convert(model: nn.Module) -> None:
    """Let all linear layers but the unembedding multiply in fp8; routed experts and the router stay as they are."""
    exchange(model, Fp8Linear)
