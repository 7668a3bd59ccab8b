"""Fused operators at the end of a training step: masked softmax, cross-entropy, AdamW."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.chip.cost import Work
from course_lib.npu.fused import define, elementwise, keep, refuse, wide
from course_lib.npu.work import ADAMW, distinct, dtype_name

# -- softmax and cross-entropy ------------------------------------------------------------------------

MASKED = -10000.0  # what CANN's kernel writes where the mask is set


def _masked_softmax(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.softmax((wide(x) * scale).masked_fill_(mask, MASKED), -1).to(x.dtype)


def _masked_softmax_backward(grad: Tensor, y: Tensor, mask: Tensor, scale: float) -> Tensor:
    grad, y_ = wide(grad), wide(y)
    return (y_ * (grad - (grad * y_).sum(-1, keepdim=True)) * scale).masked_fill_(mask, 0).to(y.dtype)


masked_softmax_backward = define("npu_scaled_masked_softmax_backward(Tensor dy, Tensor y, Tensor mask, float scale) -> Tensor", _masked_softmax_backward, elementwise(5))
masked_softmax = define(
    "npu_scaled_masked_softmax(Tensor x, Tensor mask, float scale) -> Tensor", _masked_softmax, elementwise(6),
    lambda ctx, grad: (masked_softmax_backward(grad, *reversed(ctx.saved_tensors), *ctx.numbers), None, None), keep(1, results=(0,)),
)  # fmt: skip


def npu_scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float = 1.0, fixed_triu_mask: bool = False) -> Tensor:
    """softmax(x · scale) over the last dimension; where ``mask`` is True the score counts as −10000."""
    refuse("npu_scaled_masked_softmax", "a reserved argument; pass the triangle as mask", fixed_triu_mask=fixed_triu_mask or None)
    return masked_softmax(x, mask, scale)


REDUCTIONS = ("none", "mean", "sum")


def _shares(target: Tensor, weight: Tensor | None, ignore: int, reduction: str) -> tuple[Tensor, Tensor]:
    """(the target class of each row, its factor in the loss: weight, 0 if ignored, divided for the mean)."""
    counts = target != ignore
    safe = target.where(counts, 0)
    share = counts.float() if weight is None else weight.float()[safe] * counts
    return safe, (share / share.sum() if reduction == "mean" else share)


def _smooth(weight: Tensor | None, classes: int, device: torch.device) -> Tensor:
    return torch.ones(classes, device=device) if weight is None else weight.float()


def _cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore: int, smoothing: float) -> tuple[Tensor, Tensor]:
    scores = torch.log_softmax(wide(x), -1)
    loss = F.nll_loss(scores, target, None if weight is None else wide(weight), ignore_index=ignore, reduction=reduction)
    if smoothing:
        counts, all_classes = (target != ignore).float(), _smooth(weight, x.shape[1], x.device)
        spread = -(scores * all_classes).sum(1) * counts / x.shape[1]
        total = {"none": lambda: spread, "sum": spread.sum, "mean": lambda: spread.sum() / _shares(target, weight, ignore, "sum")[1].sum()}
        loss = (1 - smoothing) * loss + smoothing * total[reduction]()
    return loss.to(x.dtype), scores.to(x.dtype)


def _cross_entropy_backward(grad: Tensor, scores: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore: int, smoothing: float) -> Tensor:
    N, V = scores.shape
    safe, share = _shares(target, weight, ignore, reduction)
    pull = torch.zeros_like(wide(scores)).scatter_(1, safe[:, None], ((1 - smoothing) * share)[:, None])  # −∂loss/∂log p, (N, V)
    if smoothing:
        counts = (target != ignore).float()
        norm = _shares(target, weight, ignore, "sum")[1].sum() if reduction == "mean" else 1.0
        pull += (smoothing / V * counts / norm)[:, None] * _smooth(weight, V, scores.device)
    rows = wide(grad)[:, None] if reduction == "none" else wide(grad)
    return (rows * (wide(scores).exp() * pull.sum(1, keepdim=True) - pull)).to(scores.dtype)


def _cross_entropy_grads(ctx: Any, grad: Tensor, _: None) -> tuple:
    target, weight, scores = ctx.saved_tensors
    reduction, ignore, smoothing = ctx.numbers[-3:]
    return cross_entropy_backward(grad, scores, target, weight, reduction, ignore, smoothing), None, None, None, None, None


# Per score. Forward: log-softmax 5. Backward: exp, product, difference, product with the row's gradient.
cross_entropy_backward = define(
    "npu_cross_entropy_loss_backward(Tensor grad, Tensor log_prob, Tensor target, Tensor? weight, str reduction, int ignore_index, float label_smoothing) -> Tensor",
    _cross_entropy_backward, elementwise(4),
)  # fmt: skip
cross_entropy = define(
    "npu_cross_entropy_loss(Tensor x, Tensor target, Tensor? weight, str reduction, int ignore_index, float label_smoothing) -> (Tensor, Tensor)",
    _cross_entropy, elementwise(5, of=1), _cross_entropy_grads, keep(1, 2, results=(1,), constant=(1,)),
)  # fmt: skip


def npu_cross_entropy_loss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100,
    label_smoothing: float = 0.0, lse_square_scale_for_zloss: float = 0.0, return_zloss: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, log p, zloss, lse) of scores (N, V) and classes (N,); the last two are empty: the z-loss is not emulated."""
    refuse("npu_cross_entropy_loss", "the z-loss is not emulated; add it from the scores",
           lse_square_scale_for_zloss=lse_square_scale_for_zloss or None, return_zloss=return_zloss or None)  # fmt: skip
    if input.dim() != 2 or reduction not in REDUCTIONS:
        raise ValueError(f"npu_cross_entropy_loss: expected scores (N, V) and reduction in {REDUCTIONS}, got {tuple(input.shape)} and {reduction!r}")
    loss, scores = cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)
    return loss, scores, input.new_empty(0), input.new_empty(0)


# -- AdamW --------------------------------------------------------------------------------------------


def _adamw(
    var: Tensor, m: Tensor, v: Tensor, grad: Tensor, vmax: Tensor | None, power1: float, power2: float, lr: float, decay: float,
    beta1: float, beta2: float, epsilon: float, maximize: bool,
) -> None:  # fmt: skip
    grad = -grad.to(var.dtype) if maximize else grad.to(var.dtype)
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    second = v if vmax is None else torch.maximum(vmax, v, out=vmax)
    denominator = (second / (1 - power2 * beta2)).sqrt_().add_(epsilon)
    var.mul_(1 - lr * decay).addcdiv_(m, denominator, value=-lr / (1 - power1 * beta1))


def _adamw_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    state = [t for t in (*args[:3], args[4]) if t is not None]
    flops = (ADAMW + (args[4] is not None)) * args[0].numel()
    return Work(vector_flops=flops, vector_dtype=dtype_name(args[0].dtype), bytes_read=distinct([*state, args[3]]), bytes_written=distinct(state))


adamw = define(
    "npu_apply_adam_w(Tensor(a!) var, Tensor(b!) m, Tensor(c!) v, Tensor grad, Tensor(d!)? vmax, float power1, float power2, float lr, "
    "float weight_decay, float beta1, float beta2, float epsilon, bool maximize) -> ()", _adamw, _adamw_work,
)  # fmt: skip


def npu_apply_adam_w(
    beta1_power: float, beta2_power: float, lr: float, weight_decay: float, beta1: float, beta2: float, epsilon: float, grad: Tensor,
    max_grad_norm: Tensor | None, amsgrad: bool | None, maximize: bool | None, *, out: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One AdamW step on ``out`` = (parameter, m, v), in place. The powers are those before the step: β^(t−1).

    ``max_grad_norm`` is CANN's name for the running maximum of v that amsgrad divides by.
    """
    if amsgrad and max_grad_norm is None:
        raise ValueError("npu_apply_adam_w: amsgrad needs max_grad_norm, the running maximum of v")
    with torch.no_grad():
        adamw(*out, grad, max_grad_norm if amsgrad else None, beta1_power, beta2_power, lr, weight_decay, beta1, beta2, epsilon, bool(maximize))
    return out
