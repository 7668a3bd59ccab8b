"""Products of small numbers: int8 and fp8 factors, sums in int32 and fp32, scales applied once at the end.

    q, s = npu_dynamic_quant(x)                                             # int8 (M, K), one scale a row
    y = npu_quant_matmul(q, w8, w_scale, pertoken_scale=s, output_dtype=torch.bfloat16)

y = (Σ q·w + bias) · w_scale · s, rounded once. ``torch._scaled_mm`` and ``torch._int_mm`` run on the device as they are.
None of these has a gradient. A chip without the dtype on its cube refuses, as it does any product.
"""

from typing import Any

import torch
from torch import Tensor

from course_lib.chip.cost import Matmul, Work
from course_lib.npu.fused import define, refuse, wide
from course_lib.npu.work import distinct, dtype_name

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
OUTPUTS = (torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32)


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in int32 of int8 factors and in float32 of fp8 ones."""
    if a.dtype in FP8:
        return a.float() @ b.float()
    if a.dim() == b.dim() == 2:
        return torch._int_mm(a, b)
    return torch.matmul(a.int(), b.int())


def _quant_matmul(a: Tensor, b: Tensor, scale: Tensor, offset: Tensor | None, rows: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    total = _exact(a, b)
    early = bias is not None and not bias.is_floating_point()  # an int32 bias joins the int32 sum
    total = total + bias if early else total
    if dtype == torch.int32:
        return total
    y = total.float() * scale.float()
    y = y if rows is None else y * rows[..., None]
    if bias is not None and not early:
        y = y + bias
    if dtype == torch.int8:
        return (y if offset is None else y + offset).round().clamp(-128, 127).to(dtype)
    return y.to(dtype)


def _product(a: Tensor, b: Tensor) -> Matmul:
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]).numel()
    return Matmul(batch, a.shape[-2], a.shape[-1], b.shape[-1], dtype_name(a.dtype))


def _quant_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    """Per result: conversion, scale; one more for each of row scale, bias, offset."""
    reads = [a for a in args if isinstance(a, Tensor)]
    return Work(matmuls=(_product(*args[:2]),), vector_flops=len(reads[1:]) * outs[0].numel(), bytes_read=distinct(reads), bytes_written=distinct(outs))


quant_matmul = define(
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, Tensor? offset, Tensor? pertoken_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    _quant_matmul, _quant_work,
)  # fmt: skip


def npu_quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, *, offset: Tensor | None = None, pertoken_scale: Tensor | None = None, bias: Tensor | None = None,
    output_dtype: torch.dtype | None = None, x1_dtype: Any = None, x2_dtype: Any = None, pertoken_scale_dtype: Any = None,
    scale_dtype: Any = None, group_sizes: Any = None, y_scale: Any = None,
) -> Tensor:  # fmt: skip
    """x1 (…, M, K) @ x2 (…, K, N), int8 or fp8, times scale (1,) or (N,) and pertoken_scale (M,); int8 if no dtype is asked for."""
    name, dtype = "npu_quant_matmul", output_dtype or torch.int8
    refuse(name, "4-bit and block-scaled formats are not emulated", x1_dtype=x1_dtype, x2_dtype=x2_dtype, pertoken_scale_dtype=pertoken_scale_dtype,
           scale_dtype=scale_dtype, group_sizes=group_sizes, y_scale=y_scale)  # fmt: skip
    if scale.dtype not in (torch.float32, torch.bfloat16):
        raise NotImplementedError(f"torch_npu.{name}(scale=a tensor of {scale.dtype}): packed scales of npu_trans_quant_param are not emulated; pass float32 or bfloat16")
    same = x1.dtype == x2.dtype == torch.int8 or (x1.dtype in FP8 and x2.dtype in FP8)
    if not same or dtype not in OUTPUTS or (x1.dtype in FP8 and dtype in (torch.int8, torch.int32)):
        raise TypeError(f"{name}: factors {x1.dtype} and {x2.dtype} to {dtype}; it takes int8 or fp8 factors, and gives float16, bfloat16, float32 or, of int8, int8 and int32")
    return quant_matmul(x1, x2, scale, offset, pertoken_scale, bias, dtype)


# -- quantising -----------------------------------------------------------------------------------------


def _dynamic_quant(x: Tensor, smooth: Tensor | None, dtype: torch.dtype, over: list[int], largest: float) -> tuple[Tensor, Tensor]:
    x = wide(x) if smooth is None else wide(x) * smooth
    scale = x.abs().amax(over, keepdim=True) / largest
    y = x / scale.where(scale > 0, 1.0)
    return (y.round() if dtype == torch.int8 else y).to(dtype), scale.flatten() if len(over) == x.dim() else scale.squeeze(over[0])


def _quantise_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    """Per element: absolute value, maximum, quotient, rounding; one more to smooth."""
    reads = [a for a in args if isinstance(a, Tensor)]
    return Work(vector_flops=(3 + len(reads)) * args[0].numel(), vector_dtype=dtype_name(args[0].dtype), bytes_read=distinct(reads), bytes_written=distinct(outs))


dynamic_quant = define("npu_dynamic_quant(Tensor x, Tensor? smooth_scales, ScalarType dtype, int[] over, float largest) -> (Tensor, Tensor)", _dynamic_quant, _quantise_work)


def npu_dynamic_quant(
    input: Tensor, *, smooth_scales: Tensor | None = None, group_index: Tensor | None = None, dst_type: torch.dtype | None = None,
    quant_mode: str = "pertoken", dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x / scale in int8 or fp8, scale) with scale = max|x| / largest value, by row, by column or of the whole."""
    refuse("npu_dynamic_quant", group_index=group_index, dst_type_max=dst_type_max or None)
    dtype, modes = dst_type or torch.int8, {"pertoken": [-1], "perchannel": [-2], "pertensor": list(range(input.dim()))}
    if dtype not in LARGEST:
        raise NotImplementedError(f"torch_npu.npu_dynamic_quant(dst_type={dtype}): the emulation has int8, float8_e4m3fn and float8_e5m2")
    if quant_mode not in modes:
        raise ValueError(f"npu_dynamic_quant: quant_mode is {quant_mode!r}; expected one of {', '.join(modes)}")
    return dynamic_quant(input, smooth_scales, dtype, modes[quant_mode], LARGEST[dtype])


def _quantise(x: Tensor, scales: Tensor, zero: Tensor | None, dtype: torch.dtype, divide: bool) -> Tensor:
    y = wide(x) / scales.float() if divide else wide(x) * scales.float()
    limits = torch.iinfo(dtype)
    return (y if zero is None else y + zero.float()).round().clamp(limits.min, limits.max).to(dtype)


def _given_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    """Per element: scale, rounding; one more for a zero point."""
    reads = [t for t in args[:3] if t is not None]
    return Work(vector_flops=len(reads) * args[0].numel(), vector_dtype=dtype_name(args[0].dtype), bytes_read=distinct(reads), bytes_written=distinct(outs))


quantise = define("npu_quantize(Tensor x, Tensor scales, Tensor? zero_points, ScalarType dtype, bool divide) -> Tensor", _quantise, _given_work)
QUANTISED = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.int8: torch.int8, torch.uint8: torch.uint8, torch.int32: torch.int32}


def npu_quantize(input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: torch.dtype, axis: int = 1, div_mode: bool = True) -> Tensor:
    """x / scales + zero_points, or x · scales + zero_points without ``div_mode``, rounded, in int8, uint8 or int32.

    One scale, or one for each place along ``axis``; without ``div_mode`` an axis other than −2 means the last.
    """
    name = "npu_quantize"
    if dtype not in QUANTISED:
        raise NotImplementedError(f"torch_npu.{name}(dtype={dtype}): the emulation has qint8, quint8 and int32")
    axis = axis if div_mode or axis == -2 else -1
    shape = [1] * input.dim()
    shape[axis] = -1
    scales, zero_points = (t if t is None or t.dim() != 1 else t.view(shape) for t in (scales, zero_points))
    if scales.dim() > input.dim() or any(s not in (1, n) for s, n in zip(reversed(scales.shape), reversed(input.shape))):
        raise ValueError(f"{name}: scales {tuple(scales.shape)} for axis {axis} of an input {tuple(input.shape)}")
    return quantise(input, scales, zero_points, QUANTISED[dtype], div_mode)


def _dequant_swiglu(x: Tensor, weight_scale: Tensor | None, row_scale: Tensor | None, smooth: Tensor | None, left: bool) -> tuple[Tensor, Tensor]:
    y = x.float() if weight_scale is None else x.float() * weight_scale
    y = y if row_scale is None else y * row_scale.view(-1, 1)
    a, b = y.chunk(2, -1)
    out = torch.nn.functional.silu(a) * b if left else torch.nn.functional.silu(b) * a
    return _dynamic_quant(out, smooth, torch.int8, [-1], LARGEST[torch.int8])


def _dequant_swiglu_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    """Per input element: conversion and each scale; per result: silu 4, product 1, quantising 4, one more to smooth."""
    x, weight_scale, row_scale, smooth, _ = args
    reads = [t for t in args[:4] if t is not None]
    flops = (1 + (weight_scale is not None) + (row_scale is not None)) * x.numel() + (9 + (smooth is not None)) * outs[0].numel()
    return Work(vector_flops=flops, bytes_read=distinct(reads), bytes_written=distinct(outs))


dequant_swiglu = define(
    "npu_dequant_swiglu_quant(Tensor x, Tensor? weight_scale, Tensor? row_scale, Tensor? smooth, bool left) -> (Tensor, Tensor)", _dequant_swiglu, _dequant_swiglu_work
)


def npu_dequant_swiglu_quant(
    x: Tensor, *, weight_scale: Tensor | None = None, activation_scale: Tensor | None = None, bias: Tensor | None = None, quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None, group_index: Tensor | None = None, activate_left: bool = False, quant_mode: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(int8 (T, H), one scale a row) of SwiGLU of x (T, 2H) times its scales: between two products in int8.

    The right half is activated unless ``activate_left``. ``quant_scale`` (1, H) multiplies the result before it is quantised.
    """
    name = "npu_dequant_swiglu_quant"
    refuse(name, "scales by group and static ones are not emulated; quant_mode=1 finds a scale for each row", group_index=group_index, bias=bias,
           quant_offset=quant_offset, quant_mode=None if quant_mode == 1 else quant_mode)  # fmt: skip
    if x.dim() != 2 or x.shape[-1] % 2 or (x.dtype == torch.int32 and (weight_scale is None or activation_scale is None)):
        raise ValueError(f"{name}: x of {x.dtype} {tuple(x.shape)}; it wants (T, 2H), and of int32 both weight_scale and activation_scale")
    return dequant_swiglu(x, weight_scale, activation_scale, quant_scale, activate_left)


# -- small weights, wide activations --------------------------------------------------------------------


def _weight_quant(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor | None, bias: Tensor | None, group: int) -> Tensor:
    scale, offset = (t if t is None or not group else t.repeat_interleave(group, 0)[: weight.shape[0]] for t in (scale, offset))
    w = weight.float() if offset is None else weight.float() + offset
    y = wide(x) @ (w * scale).to(x.dtype).float()  # the vector unit widens the weights, the cube takes them in x's dtype
    return (y if bias is None else y + bias).to(x.dtype)


def _weight_quant_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    x, weight, _, offset, bias = args[:5]
    reads = [a for a in args if isinstance(a, Tensor)]
    flops = (2 + (offset is not None)) * weight.numel() + (bias is not None) * outs[0].numel()
    product = Matmul(1, x.shape[:-1].numel(), x.shape[-1], weight.shape[-1], dtype_name(x.dtype))
    return Work(
        matmuls=(product,), vector_flops=flops, vector_dtype=dtype_name(x.dtype), bytes_read=distinct(reads),
        bytes_written=distinct(outs), exchanged=weight.numel() * x.element_size(),  # the widened weights, from vector unit to cube
    )


weight_quant = define(
    "npu_weight_quant_batchmatmul(Tensor x, Tensor weight, Tensor scale, Tensor? offset, Tensor? bias, int group) -> Tensor", _weight_quant, _weight_quant_work
)


def npu_weight_quant_batchmatmul(
    x: Tensor, weight: Tensor, antiquant_scale: Tensor, antiquant_offset: Tensor | None = None, quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None, bias: Tensor | None = None, antiquant_group_size: int = 0, inner_precise: int = 0, weight_dtype: Any = None,
) -> Tensor:  # fmt: skip
    """x (…, K) @ ((weight + offset) · scale) with int8 weights (K, N), scaled by column or by groups of rows; bytes of int8 only."""
    name = "npu_weight_quant_batchmatmul"
    refuse(name, "results in int8 are not emulated", quant_scale=quant_scale, quant_offset=quant_offset)
    refuse(name, "only int8 weights are emulated", weight_dtype=weight_dtype, weight=None if weight.dtype == torch.int8 else weight)
    return weight_quant(x, weight, antiquant_scale, antiquant_offset, bias, antiquant_group_size)
