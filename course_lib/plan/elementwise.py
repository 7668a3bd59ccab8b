"""What a layer does beside products: norms, residual sums, rotations, activations, routing; bytes per token of each.

They are bound by memory, so what counts is how often a tensor is read and written, and that depends on the kernels.
"fused": one kernel each for sum + norm, rotation, SwiGLU, bias + GELU, bias + dropout + sum, as Megatron and its
descendants have. "eager": operator by operator, as PyTorch runs the course's model (llm/layers.py, latent.py,
experts.py); held to the emulated device by tests/plan/test_step.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from course_lib.plan.model import Model

HALF, SINGLE, MASK, INDEX = 2, 4, 1, 8  # bytes: of an activation, float32, a dropout mask's element, a place in a list
SILU, SILU_BACKWARD = 4, 7  # vector operations per element, as the device counts them
GELU = 8
NORM, NORM_BACKWARD = 4, 8


@dataclass(frozen=True)
class Pass:
    """One kernel over a token: bytes ``read`` and ``written``, vector operations ``flops``.

    ``split``: TP divides it (by heads or feed-forward); the rest only sequence parallelism divides. ``cheap``: recompute
    "cheap" repeats it. ``times``: how often it is launched.
    """

    name: str
    read: float
    written: float
    flops: float = 0
    split: bool = False
    cheap: bool = False
    times: int = 1


def forward(model: Model, experts: bool, kernels: str) -> Iterator[Pass]:
    """The kernels of one layer's forward pass, per token."""
    if not model.gated:
        return _gelu_forward(model)
    return _eager_forward(model, experts) if kernels == "eager" else _fused_forward(model, experts)


def backward(model: Model, experts: bool, kernels: str) -> Iterator[Pass]:
    """Those of its backward pass."""
    if not model.gated:
        return _gelu_backward(model)
    return _eager_backward(model, experts) if kernels == "eager" else _fused_backward(model, experts)


# -- fused ----------------------------------------------------------------------------------------------------


def _fused_forward(model: Model, experts: bool) -> Iterator[Pass]:
    D, (q, k) = model.width, _rotated(model)
    for name in ("attention norm", "feed-forward norm"):
        yield Pass(f"sum and {name}", 2 * HALF * D, 2 * HALF * D, (NORM + 1) * D, cheap=True)
    yield Pass("rotation", HALF * (q + k), HALF * (q + k), 3 * (q + k), split=True)
    for F in _feed_forwards(model, experts):
        yield Pass("SwiGLU", 2 * HALF * F, HALF * F, (SILU + 1) * F, split=True, cheap=True)
    if experts:
        E, copies = model.experts.routed, model.experts.active
        yield Pass("routing", 2 * SINGLE * E, SINGLE * E + INDEX * copies, 5 * E)
        yield Pass("sort by expert", HALF * copies * D, HALF * copies * D)
        yield Pass("sum of experts", HALF * copies * D, HALF * D, 2 * copies * D)
    yield from _streams(model)


def _fused_backward(model: Model, experts: bool) -> Iterator[Pass]:
    D, (q, k) = model.width, _rotated(model)
    for name in ("attention norm", "feed-forward norm"):
        yield Pass(f"sum and {name}", 3 * HALF * D, HALF * D, (NORM_BACKWARD + 1) * D)
    yield Pass("rotation", HALF * (q + k), HALF * (q + k), 3 * (q + k), split=True)
    for F in _feed_forwards(model, experts):
        yield Pass("SwiGLU", 3 * HALF * F, 2 * HALF * F, (SILU_BACKWARD + 2) * F, split=True)
    if experts:
        E, copies = model.experts.routed, model.experts.active
        yield Pass("routing", 3 * SINGLE * E, SINGLE * E, 5 * E)
        yield Pass("sort by expert", HALF * copies * D, HALF * D, copies * D)
        yield Pass("sum of experts", HALF * (1 + copies) * D, HALF * copies * D, 4 * copies * D)
    yield from _streams(model, 2)


def _streams(model: Model, times: int = 1) -> Iterator[Pass]:
    """Hyper-connections: the n streams are read for the layer's input, and read and written for its result."""
    if n := model.streams - 1:
        wide = HALF * (n + 1) * model.width
        yield Pass("hyper-connections", 4 * wide, 2 * wide, 4 * (n + 1) ** 2 * model.width, times=times)


def _rotated(model: Model) -> tuple[int, int]:
    """Elements of queries and keys that the rotation passes through; latent ones are put together on the way."""
    if model.latent:
        wide = model.heads * (model.latent.nope + model.latent.rope)
        return wide, wide
    if model.compressed:
        return model.heads * model.head_width, model.head_width
    return model.heads * model.head_width, model.kv_heads * model.head_width


def _feed_forwards(model: Model, experts: bool) -> list[int]:
    e = model.experts
    if not experts:
        return [model.feed_forward]
    return [e.active * e.width] + ([e.shared * e.width] if e.shared else [])


# -- GELU models, as Megatron-LM runs them (arXiv:2104.04473, section 4.2) --------------------------------------------


def _gelu_forward(model: Model) -> Iterator[Pass]:
    D, F = model.width, model.feed_forward
    for name in ("attention", "feed-forward"):
        yield Pass(f"{name} norm", HALF * D, HALF * D, 8 * D)
        yield Pass(f"{name} bias, dropout, sum", 2 * HALF * D, (HALF + MASK) * D, 4 * D)
    yield Pass("bias and GELU", HALF * F, HALF * F, (GELU + 1) * F, split=True)


def _gelu_backward(model: Model) -> Iterator[Pass]:
    D, F = model.width, model.feed_forward
    for name in ("attention", "feed-forward"):
        yield Pass(f"{name} norm", 3 * HALF * D, HALF * D, 12 * D)
        yield Pass(f"{name} dropout", (HALF + MASK) * D, HALF * D, 2 * D)
        yield Pass(f"{name} gradient of the bias", HALF * D, 0, D)
    yield Pass("bias and GELU", 2 * HALF * F, HALF * F, 2 * GELU * F, split=True)
    yield Pass("gradients of the biases", HALF * (F + 3 * D), 0, F + 3 * D, split=True)


# -- eager: the course's model ------------------------------------------------------------------------------------------


def _eager_forward(model: Model, experts: bool) -> Iterator[Pass]:
    D, wide = model.width, model.heads * _value_width(model)
    yield Pass("norm", HALF * D, HALF * D, NORM * D, cheap=True, times=2)
    if model.latent:
        yield from _eager_latent(model)
    else:
        for heads in (model.heads, model.kv_heads):
            yield from _turn(heads * model.head_width)
    yield Pass("heads to tokens", HALF * wide, HALF * wide, split=True)
    yield Pass("residual sum", 2 * HALF * D, HALF * D, D, times=2)
    if not experts:
        yield from _eager_swiglu(model.feed_forward)
        return
    e, k = model.experts, model.experts.active
    yield Pass("router's input in float32", HALF * D, SINGLE * D)
    yield Pass("routing", 30 * e.routed, 24 * e.routed, 4 * e.routed, times=20)
    yield Pass("sort by expert", HALF * k * D, HALF * k * D, times=2)
    yield from _eager_swiglu(k * e.width)
    yield Pass("experts' weights", HALF * k * D, HALF * k * D, k * D)
    yield Pass("sum of experts", HALF * k * D, HALF * D, k * D)
    if e.shared:
        yield from _eager_swiglu(e.shared * e.width)
        yield Pass("sum with shared", 2 * HALF * D, HALF * D, D)


def _eager_backward(model: Model, experts: bool) -> Iterator[Pass]:
    D = model.width
    yield Pass("norm", 2 * HALF * D, HALF * D, NORM_BACKWARD * D, times=2)
    if model.latent:
        yield from _eager_latent_backward(model)
        yield Pass("sum of gradients", 2 * HALF * D, HALF * D, D, times=3)
    else:
        for heads in (model.heads, model.kv_heads):
            yield from _turn_back(heads * model.head_width)
        yield Pass("sum of gradients", 2 * HALF * D, HALF * D, D, times=4)
    if not experts:
        yield from _eager_swiglu_backward(model.feed_forward)
        yield Pass("sum of gradients", 2 * HALF * D, HALF * D, D)
        return
    e, k = model.experts, model.experts.active
    yield Pass("sum of gradients", 2 * HALF * D, HALF * D, D, times=3)
    yield Pass("router's input in float32", SINGLE * D, HALF * D)
    yield Pass("routing", 36 * e.routed, 30 * e.routed, 5 * e.routed, times=20)
    yield Pass("weights of experts", HALF * D, HALF * k * D, k * D)
    yield Pass("gradients of weights", HALF * (k + 1) * D, HALF * k * D, k * D)
    yield Pass("gradients of weights, summed", HALF * k * D, 0, k * D)
    yield Pass("zeros", 0, 2 * HALF * k * D)
    yield Pass("back from experts", 2 * HALF * k * D, HALF * k * D, k * D)
    yield from _eager_swiglu_backward(k * e.width)
    yield Pass("sum of gradients of experts", 2 * HALF * k * D, HALF * k * D, k * D)
    yield Pass("zeros", 0, HALF * (k + 1) * D)
    yield Pass("back to tokens", HALF * (k + 1) * D, HALF * D, k * D)
    if e.shared:
        yield from _eager_swiglu_backward(e.shared * e.width)


def _turn(n: float) -> Iterator[Pass]:
    """rotate(): four products, a difference, a sum, put side by side."""
    yield Pass("rotation: product", HALF * n / 2, HALF * n / 2, n / 2, split=True, times=4)
    yield Pass("rotation: sum", HALF * n, HALF * n / 2, n / 2, split=True, times=2)
    yield Pass("rotation: side by side", HALF * n, HALF * n, split=True)


def _turn_back(n: float) -> Iterator[Pass]:
    yield Pass("rotation: product", HALF * n / 2, HALF * n / 2, n / 2, split=True, times=5)
    yield Pass("rotation: sum", HALF * n, HALF * n / 2, n / 2, split=True, times=2)
    yield Pass("rotation: side by side", HALF * n, HALF * n, split=True, times=2)


def _eager_latent(model: Model) -> Iterator[Pass]:
    a, H = model.latent, model.heads
    yield Pass(
        "norm of latent", HALF * (a.query_rank or 0), HALF * (a.query_rank or 0), NORM * (a.query_rank or 0), cheap=True
    )
    yield Pass("norm of latent", HALF * a.rank, HALF * a.rank, NORM * a.rank, cheap=True)
    yield from _turn(H * a.rope)
    yield from _turn(a.rope)
    wide = H * (a.nope + a.rope)
    yield Pass("latents and rotary key", HALF * (a.rank + a.rope), HALF * (a.rank + a.rope))
    yield Pass("key, put together", HALF * H * (a.nope + 2), HALF * wide, split=True)
    yield Pass("query, put together", HALF * wide, HALF * wide, split=True)


def _eager_latent_backward(model: Model) -> Iterator[Pass]:
    a, H = model.latent, model.heads
    rank, wide, expanded = a.query_rank or 0, H * (a.nope + a.rope), H * (a.nope + a.value)
    yield Pass("norm of latent", 2 * HALF * rank, HALF * rank, NORM_BACKWARD * rank)
    yield Pass("norm of latent", 2 * HALF * a.rank, HALF * a.rank, NORM_BACKWARD * a.rank)
    yield from _turn_back(H * a.rope)
    yield from _turn_back(a.rope)
    yield Pass("slices of gradients", HALF * H * a.nope, HALF * expanded, split=True, times=2)
    yield Pass("sum of gradients of latents", 2 * HALF * expanded, HALF * expanded, expanded, split=True)
    yield Pass("tokens to heads", HALF * expanded, HALF * expanded, split=True)
    yield Pass("gradient of query", HALF * wide, HALF * wide, split=True, times=2)
    yield Pass("gradient of rotary key", HALF * H * a.rope, HALF * a.rope, H * a.rope, split=True)


def _eager_swiglu(F: float) -> Iterator[Pass]:
    yield Pass("SiLU", HALF * F, HALF * F, SILU * F, split=True, cheap=True)
    yield Pass("gate · up", 2 * HALF * F, HALF * F, F, split=True, cheap=True)


def _eager_swiglu_backward(F: float) -> Iterator[Pass]:
    yield Pass("gradients of gate and up", 2 * HALF * F, HALF * F, F, split=True, times=2)
    yield Pass("gradient of SiLU", 2 * HALF * F, HALF * F, SILU_BACKWARD * F, split=True)


def _value_width(model: Model) -> int:
    return model.latent.value if model.latent else model.head_width
