"""Fused operators under torch_npu's names: how one is defined, then norms, activations, rotary embedding.

Each is one kernel, so one launch in the ledger and no intermediate tensor in device memory. An operator here is

* a *kernel* on host tensors, in plain PyTorch, which runs the same on ``cpu``: there it is the reference;
* its *Work*: FLOPs and bytes by hand, entered in ``work.SPECIAL`` under the operator's name;
* a backward operator, again one launch, joined to it by ``torch.library.register_autograd``.

Half-precision inputs are widened to float32 inside and rounded once at the end, as the vector unit does.
Programs call the functions by way of ``course_lib.npu.torch_npu``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.chip.cost import Work
from course_lib.npu import ops
from course_lib.npu.tensor import NEEDS_ARGUMENTS
from course_lib.npu.work import SPECIAL, distinct, dtype_name, tensors_in

library = torch.library.Library("npu", "DEF")
Save = Callable[[Any, tuple, Any], None]


def define(schema: str, kernel: Callable, work: Callable, backward: Callable | None = None, save: Save | None = None) -> Callable:
    """The operator ``npu::schema``, differentiable if ``backward`` is given; ``save`` keeps what that needs."""
    name = schema[: schema.index("(")]
    library.define(schema)
    library.impl(name, kernel, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.npu, name).default
    ops.KERNELS[operator] = kernel
    SPECIAL[name] = work
    NEEDS_ARGUMENTS.add(name)
    if not operator._schema.is_mutable:
        torch.library.register_autograd(f"npu::{name}", backward or _no_gradient(name), setup_context=save, lib=library)
    return operator


def _no_gradient(name: str) -> Callable:
    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{name} is not differentiable; use it under torch.no_grad(), or detach its inputs")

    return backward


def keep(*which: int, results: tuple[int, ...] = (), constant: tuple[int, ...] = ()) -> Save:
    """Save the inputs ``which`` and the results ``results`` for backward, mark results ``constant``, keep all numbers.

    In backward: ``ctx.saved_tensors`` in that order, and ``ctx.numbers``, the inputs that are not tensors.
    """

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        if constant:
            ctx.mark_non_differentiable(*[output[i] for i in constant])
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*[inputs[i] for i in which], *[outputs[i] for i in results])
        ctx.numbers = tuple(a for a in inputs if not isinstance(a, Tensor))

    return setup


def elementwise(per_output: int, of: int = 0) -> Callable:
    """Work of a kernel with ``per_output`` vector operations per element of result ``of``; all tensors read once."""

    def work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
        reads = [t for a in (*args, *kwargs.values()) for t in tensors_in(a)]
        dtype = dtype_name(reads[0].dtype)
        return Work(vector_flops=per_output * outs[of].numel(), vector_dtype=dtype, bytes_read=distinct(reads), bytes_written=distinct(outs))

    return work


def refuse(function: str, reason: str = "the emulation does not have it", **arguments: Any) -> None:
    """NotImplementedError for the first of ``arguments`` that is set."""
    for name, value in arguments.items():
        if value is not None:
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"torch_npu.{function}({name}={shown}): {reason}")


def wide(t: Tensor) -> Tensor:
    """``t`` as the vector unit computes with it: float32, or float64."""
    return t if t.dtype == torch.float64 else t.float()


def _reduce(grad: Tensor, like: Tensor) -> Tensor:
    """Sum a gradient over what ``like`` was broadcast along."""
    return grad.sum_to_size(like.shape).to(like.dtype)


# -- norms --------------------------------------------------------------------------------------------


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return ops.rms_norm_forward(x, list(gamma.shape), gamma, epsilon)


def _rms_norm_backward(grad: Tensor, x: Tensor, gamma: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rms_norm_backward(grad, x, list(gamma.shape), inverse, gamma, [True, True])


rms_norm_backward = define("npu_rms_norm_backward(Tensor dy, Tensor x, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)", _rms_norm_backward, elementwise(8))
rms_norm = define(
    "npu_rms_norm(Tensor x, Tensor gamma, float epsilon) -> (Tensor, Tensor)", _rms_norm, elementwise(4),
    lambda ctx, grad, _: (*rms_norm_backward(grad, *ctx.saved_tensors), None), keep(0, 1, results=(1,), constant=(1,)),
)  # fmt: skip


def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    """(y, 1/rms): y = x / sqrt(mean(x²) + ε) · γ over the last dimensions, those of γ."""
    return rms_norm(self, gamma, epsilon)


def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x1 + x2
    return (*_rms_norm(x, gamma, epsilon), x)


def _add_rms_norm_backward(grad: Tensor | None, grad_x: Tensor | None, x: Tensor, gamma: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    grad = torch.zeros_like(x) if grad is None else grad
    dx, dgamma = _rms_norm_backward(grad, x, gamma, inverse)
    return (dx if grad_x is None else dx + grad_x), dgamma


def _add_rms_norm_grads(ctx: Any, grad: Tensor | None, _: None, grad_x: Tensor | None) -> tuple:
    gamma, x, inverse = ctx.saved_tensors
    dx, dgamma = add_rms_norm_backward(grad, grad_x, x, gamma, inverse)
    return dx, dx, dgamma, None


add_rms_norm_backward = define(
    "npu_add_rms_norm_backward(Tensor? dy, Tensor? dx, Tensor x, Tensor gamma, Tensor rstd) -> (Tensor, Tensor)", _add_rms_norm_backward, elementwise(9)
)
add_rms_norm = define(
    "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon) -> (Tensor, Tensor, Tensor)", _add_rms_norm, elementwise(5),
    _add_rms_norm_grads, keep(2, results=(2, 1), constant=(1,)),
)  # fmt: skip


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor, Tensor]:
    """(y, 1/rms, x) with x = x1 + x2 and y its RMS norm: a residual connection and the norm after it."""
    if x1.shape != x2.shape:
        raise ValueError(f"npu_add_rms_norm: x1 has shape {tuple(x1.shape)} and x2 {tuple(x2.shape)}; the kernel adds equal shapes only")
    return add_rms_norm(x1, x2, gamma, epsilon)


# -- gated activations --------------------------------------------------------------------------------


def _swiglu(x: Tensor, dim: int) -> Tensor:
    gate, up = wide(x).chunk(2, dim)
    return (F.silu(gate) * up).to(x.dtype)


def _swiglu_backward(grad: Tensor, x: Tensor, dim: int) -> Tensor:
    gate, up = wide(x).chunk(2, dim)
    grad, sigma = wide(grad), torch.sigmoid(gate)
    return torch.cat([grad * up * sigma * (1 + gate * (1 - sigma)), grad * gate * sigma], dim).to(x.dtype)


# Per pair of inputs. Forward: silu 4, product 1. Backward: silu's 7 with σ, g·up 1, gate·σ 1, g·silu 1, over two results.
swiglu_backward = define("npu_swiglu_backward(Tensor dy, Tensor x, int dim) -> Tensor", _swiglu_backward, elementwise(5))
swiglu = define(
    "npu_swiglu(Tensor x, int dim) -> Tensor", _swiglu, elementwise(5),
    lambda ctx, grad: (swiglu_backward(grad, *ctx.saved_tensors, *ctx.numbers), None), keep(0),
)  # fmt: skip


def npu_swiglu(self: Tensor, dim: int = -1) -> Tensor:
    """silu(a) · b of the two halves a, b of x along ``dim``."""
    _even("npu_swiglu", self, dim)
    return swiglu(self, dim)


def _geglu(x: Tensor, dim: int, approximate: int, left: bool) -> tuple[Tensor, Tensor]:
    first, second = wide(x).chunk(2, dim)
    gate, up = (first, second) if left else (second, first)
    gelu = F.gelu(gate, approximate="tanh" if approximate else "none")
    return (up * gelu).to(x.dtype), gelu.to(x.dtype)


def _geglu_backward(grad: Tensor, x: Tensor, dim: int, approximate: int, left: bool) -> Tensor:
    first, second = wide(x).chunk(2, dim)
    gate, up = (first, second) if left else (second, first)
    how, grad = "tanh" if approximate else "none", wide(grad)
    gate_grad = torch.ops.aten.gelu_backward(grad * up, gate, approximate=how)
    up_grad = grad * F.gelu(gate, approximate=how)
    return torch.cat([gate_grad, up_grad] if left else [up_grad, gate_grad], dim).to(x.dtype)


# Per pair of inputs. Forward: gelu 8, product 1. Backward: gelu's 12, gelu again 8, two products, over two results.
geglu_backward = define("npu_geglu_grad(Tensor dy, Tensor x, int dim, int approximate, bool left) -> Tensor", _geglu_backward, elementwise(11))
geglu = define(
    "npu_geglu(Tensor x, int dim, int approximate, bool activate_left) -> (Tensor, Tensor)", _geglu, elementwise(9),
    lambda ctx, grad, _: (geglu_backward(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None), keep(0, constant=(1,)),
)  # fmt: skip


def npu_geglu(self: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False) -> tuple[Tensor, Tensor]:
    """(a · gelu(b), gelu(b)) of the halves a, b of x; the left half is activated if asked. ``approximate``: 1 tanh, 0 erf."""
    _even("npu_geglu", self, dim)
    return geglu(self, dim, approximate, activate_left)


def _even(function: str, x: Tensor, dim: int) -> None:
    if x.shape[dim] % 2:
        raise ValueError(f"{function}: dimension {dim} of the input has {x.shape[dim]} elements; it must be even to be halved")


# -- rotary position embedding ------------------------------------------------------------------------


def _turn(x: Tensor, mode: str, back: bool = False) -> Tensor:
    """x turned by 90°: pairs (a, b) become (−b, a), or (b, −a) if ``back``."""
    a, b = x.chunk(2, -1) if mode == "half" else (x[..., ::2], x[..., 1::2])
    a, b = (b, -a) if back else (-b, a)
    return torch.cat((a, b), -1) if mode == "half" else torch.stack((a, b), -1).flatten(-2)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    x_ = wide(x)
    return (x_ * cos + _turn(x_, mode) * sin).to(x.dtype)


def _rotary_backward(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, mode: str, angles: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad, x_ = wide(grad), wide(x)
    dx = (grad * cos + _turn(grad * sin, mode, back=True)).to(x.dtype)
    if not angles:
        return dx, cos.new_empty(0), sin.new_empty(0)
    return dx, _reduce(grad * x_, cos), _reduce(grad * _turn(x_, mode), sin)


def _rotary_grads(ctx: Any, grad: Tensor) -> tuple:
    angles = any(ctx.needs_input_grad[1:3])
    dx, dcos, dsin = rotary_backward(grad, *ctx.saved_tensors, *ctx.numbers, angles)
    return (dx, dcos, dsin, None) if angles else (dx, None, None, None)


# Per element: two products and a sum; backward the same, and as many again for the angles' gradients if wanted
rotary_backward = define(
    "npu_rotary_mul_backward(Tensor dy, Tensor x, Tensor r1, Tensor r2, str mode, bool angles) -> (Tensor, Tensor, Tensor)", _rotary_backward,
    lambda a, k, o: elementwise(7 if a[5] else 3)((a if a[5] else (a[0], *a[2:]))[:4], k, o),
)  # fmt: skip
rotary = define("npu_rotary_mul(Tensor x, Tensor r1, Tensor r2, str mode) -> Tensor", _rotary, elementwise(3), _rotary_grads, keep(0, 1, 2))


def npu_rotary_mul(self: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    """x · r1 + turned(x) · r2 with r1 = cos, r2 = sin: pairs (i, i + K/2) in mode "half", (2i, 2i + 1) in "interleave"."""
    refuse("npu_rotary_mul", "a matrix of one's own for the rotation; rotary_mode has the two that models use", rotate=rotate)
    if rotary_mode not in ("half", "interleave"):
        raise ValueError(f"npu_rotary_mul: rotary_mode is {rotary_mode!r}; expected 'half' or 'interleave'")
    _even("npu_rotary_mul", self, -1)
    return rotary(self, r1, r2, rotary_mode)
