"""Mixture of experts: the gate, tokens sorted by expert, one product for all experts, tokens put back.

    y, experts, _ = npu_moe_gating_top_k_softmax(x @ gate, k=2)             # (N, k) weights and experts
    rows, order = npu_moe_token_permute(x, experts)                         # (N·k, D), the rows of an expert together
    rows = npu_grouped_matmul([rows], [w], group_list=ends, group_type=0, split_item=3)[0]
    x = npu_moe_token_unpermute(rows, order, probs=y)                       # (N, D)
"""

from typing import Any

import torch
from torch import Tensor

from course_lib.chip.cost import Work
from course_lib.npu.fused import define, keep, refuse, wide
from course_lib.npu.work import distinct, dtype_name, even_groups, touched

# -- grouped product ----------------------------------------------------------------------------------


def _ends(groups: Tensor, counts: bool) -> list[int]:
    """Where each group ends; ``groups`` on the host has the counts or, as by default, the ends themselves."""
    if groups.device.type == "meta":
        raise NotImplementedError("npu_grouped_matmul: without numerics the rows of each expert are unknown")
    return (groups.cumsum(0) if counts else groups).tolist()


def _rows_of(x: Tensor, groups: Tensor, counts: bool) -> list[slice]:
    ends = _ends(groups, counts)
    if ends and ends[-1] > x.shape[0] or any(a > b for a, b in zip([0, *ends], ends)):
        raise ValueError(f"npu_grouped_matmul: group_list {groups.tolist()} does not divide {x.shape[0]} rows; it holds {'counts' if counts else 'ends'} (group_list_type={int(counts)})")
    return [slice(a, b) for a, b in zip([0, *ends], ends)]


def _grouped(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Tensor, counts: bool) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[-1])
    if x.device.type == "meta":
        return out
    for e, rows in enumerate(_rows_of(x, groups, counts)):
        product = wide(x[rows]) @ wide(weight[e])
        out[rows] = product if bias is None else product + bias[e]
    return out


def _grouped_weight(x: Tensor, grad: Tensor, groups: Tensor, counts: bool) -> Tensor:
    out = x.new_zeros(groups.shape[0], x.shape[1], grad.shape[1])
    if x.device.type == "meta":
        return out
    for e, rows in enumerate(_rows_of(x, groups, counts)):
        out[e] = wide(x[rows]).T @ wide(grad[rows])
    return out


def _grouped_bias(grad: Tensor, groups: Tensor, counts: bool) -> Tensor:
    out = grad.new_zeros(groups.shape[0], grad.shape[1])
    if grad.device.type == "meta":
        return out
    for e, rows in enumerate(_rows_of(grad, groups, counts)):
        out[e] = wide(grad[rows]).sum(0)
    return out


def _grouped_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    x, weight, bias, groups = args[:4]
    matmuls = even_groups(*x.shape[:1], weight.shape[0], *weight.shape[1:], dtype_name(x.dtype))
    reads = [t for t in (x, weight, bias, groups) if t is not None]
    adds = 0 if bias is None else outs[0].numel()
    return Work(matmuls=tuple(matmuls), vector_flops=adds, bytes_read=distinct(reads), bytes_written=distinct(outs))


def _weight_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    x, grad = args[:2]
    E, K, N = outs[0].shape
    matmuls = [m.__class__(m.batch, K, m.m, N, m.dtype) for m in even_groups(x.shape[0], E, K, N, dtype_name(x.dtype))]
    return Work(matmuls=tuple(matmuls), bytes_read=distinct([*args[:3]]), bytes_written=distinct(outs))


def _sum_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    return Work(vector_flops=args[0].numel(), vector_dtype=dtype_name(args[0].dtype), bytes_read=distinct([*args[:2]]), bytes_written=distinct(outs))


def _grouped_grads(ctx: Any, grad: Tensor) -> tuple:
    x, weight, bias, groups = ctx.saved_tensors
    counts, (dx, dw, db) = ctx.numbers[-1], ctx.needs_input_grad[:3]
    return (
        grouped(grad, weight.mT, None, groups, counts) if dx else None,
        grouped_weight(x, grad, groups, counts) if dw else None,
        grouped_bias(grad, groups, counts) if db else None, None, None,
    )  # fmt: skip


grouped_weight = define("npu_grouped_matmul_weight(Tensor x, Tensor dy, Tensor group_list, bool counts) -> Tensor", _grouped_weight, _weight_work)
grouped_bias = define("npu_grouped_matmul_bias(Tensor dy, Tensor group_list, bool counts) -> Tensor", _grouped_bias, _sum_work)
grouped = define(
    "npu_grouped_matmul(Tensor x, Tensor weight, Tensor? bias, Tensor group_list, bool counts) -> Tensor",
    _grouped, _grouped_work, _grouped_grads, keep(0, 1, 2, 3),
)  # fmt: skip


def npu_grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, bias: list[Tensor] | None = None, scale: Any = None, offset: Any = None, antiquant_scale: Any = None,
    antiquant_offset: Any = None, per_token_scale: Any = None, group_list: Tensor | list[int] | None = None, activation_input: Any = None,
    activation_quant_scale: Any = None, activation_quant_offset: Any = None, split_item: int | None = 0, group_type: int | None = None,
    group_list_type: int | None = 0, act_type: int | None = 0, tuning_config: Any = None, output_dtype: torch.dtype | None = None,
    x_dtype: Any = None, weight_dtype: Any = None, scale_dtype: Any = None, per_token_scale_dtype: Any = None,
) -> list[Tensor]:  # fmt: skip
    """Products with another matrix for each group of rows, in one launch.

    ``x=[(M, K)], weight=[(E, K, N)]``: rows in groups, group_type 0. ``group_list`` (E,) has their ends (type 0) or
    counts (type 1). ``x=[(K, M) transposed], weight=[(M, N)]``: group_type 2, the gradient of such weights (E, K, N).
    The emulated time takes the groups as equal, for it may not depend on numbers.
    """
    name = "npu_grouped_matmul"
    refuse(name, "quantised experts are not emulated; see npu_quant_matmul", scale=scale, offset=offset, antiquant_scale=antiquant_scale,
           antiquant_offset=antiquant_offset, per_token_scale=per_token_scale, activation_quant_scale=activation_quant_scale,
           activation_quant_offset=activation_quant_offset, x_dtype=x_dtype, weight_dtype=weight_dtype, scale_dtype=scale_dtype,
           per_token_scale_dtype=per_token_scale_dtype)  # fmt: skip
    refuse(name, activation_input=activation_input, act_type=act_type or None, output_dtype=None if output_dtype in (None, x[0].dtype) else output_dtype)
    refuse(name, "one tensor of rows and one of weights (E, K, N) is what the emulation takes", x=None if len(x) == 1 else len(x), weight=None if len(weight) == 1 else len(weight))
    if group_list is None or split_item not in (2, 3) or group_type not in (0, 2) or group_list_type not in (0, 1):
        raise NotImplementedError(
            f"torch_npu.{name}(group_list={'None' if group_list is None else '…'}, split_item={split_item}, group_type={group_type}, group_list_type={group_list_type}): "
            "the emulation has one result for all groups (split_item 2 or 3), groups of rows (group_type 0) or of the inner dimension (2), ends or counts (0, 1)"
        )
    groups = group_list if isinstance(group_list, Tensor) else torch.tensor(group_list, device=x[0].device)
    if group_type == 2:
        return [grouped_weight(x[0].mT, weight[0], groups, bool(group_list_type))]
    if weight[0].dim() != 3 or weight[0].shape[0] != groups.shape[0] or weight[0].shape[1] != x[0].shape[1]:
        raise ValueError(f"{name}: x (M, K) {tuple(x[0].shape)}, weight (E, K, N) {tuple(weight[0].shape)} and group_list (E,) {tuple(groups.shape)} do not fit together")
    return [grouped(x[0], weight[0], bias[0] if bias else None, groups, bool(group_list_type))]


# -- the gate -----------------------------------------------------------------------------------------


def _gate(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    y, experts = torch.softmax(wide(x), -1).topk(k, -1)
    rows = x.shape[:-1].numel()
    row = torch.arange(rows * k, dtype=torch.int32, device=x.device).view(k, rows).T.reshape(y.shape)
    return y.to(x.dtype), experts.int(), row


def _gate_backward(grad: Tensor, x: Tensor, experts: Tensor) -> Tensor:
    p = torch.softmax(wide(x), -1)
    spread = torch.zeros_like(p).scatter_(-1, experts.long(), wide(grad))
    return (p * (spread - (spread * p).sum(-1, keepdim=True))).to(x.dtype)


def _of_scores(per_score: int) -> Any:
    def work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
        reads = [a for a in args if isinstance(a, Tensor)]
        scores = reads[-2] if len(reads) > 1 else reads[0]  # x
        return Work(vector_flops=per_score * scores.numel(), vector_dtype=dtype_name(scores.dtype), bytes_read=distinct(reads), bytes_written=distinct(outs))

    return work


# Per score. Forward: softmax 5, selection 1. Backward: softmax again 5, then y·(g − Σ g·y), 4.
gate_backward = define("npu_moe_gating_top_k_softmax_backward(Tensor dy, Tensor x, Tensor experts) -> Tensor", _gate_backward, _of_scores(9))
gate = define(
    "npu_moe_gating_top_k_softmax(Tensor x, int k) -> (Tensor, Tensor, Tensor)", _gate, _of_scores(6),
    lambda ctx, grad, *_: (gate_backward(grad, *ctx.saved_tensors), None), keep(0, results=(1,), constant=(1, 2)),
)  # fmt: skip


def npu_moe_gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(the k largest of softmax(x) (…, k), their experts, j·rows + i for choice j of row i), of scores x (…, E)."""
    refuse("npu_moe_gating_top_k_softmax", finished=finished)
    return gate(x, k)


# -- tokens to their experts and back -----------------------------------------------------------------


def _permute(tokens: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    order = torch.argsort(experts.reshape(-1), stable=True)
    return tokens[order[:count] // (experts.numel() // experts.shape[0])], torch.argsort(order, stable=True).int()


def _permute_backward(grad: Tensor, where: Tensor, rows: int) -> Tensor:
    """Each token's gradient is the sum over its copies; those beyond ``num_out_tokens`` were dropped."""
    there = where < grad.shape[0]
    copies = wide(grad)[where.where(there, 0).long()] * there[:, None]
    return copies.view(rows, -1, grad.shape[-1]).sum(1).to(grad.dtype)


def _unpermute(rows: Tensor, where: Tensor, probs: Tensor | None) -> Tensor:
    picked = wide(rows)[where.long()].view(*(probs.shape if probs is not None else (-1, 1)), rows.shape[-1])  # (N, k, D)
    return (picked if probs is None else picked * probs[..., None]).sum(1).to(rows.dtype)


def _unpermute_backward(grad: Tensor, rows: Tensor, where: Tensor, probs: Tensor | None) -> tuple[Tensor, Tensor]:
    N, D = grad.shape
    spread = wide(grad)[:, None] if probs is None else wide(grad)[:, None] * probs[..., None]  # (N, k, D)
    out = torch.zeros_like(rows)
    out[where.long()] = spread.reshape(-1, D).to(rows.dtype)
    if probs is None:
        return out, rows.new_empty(0)
    return out, (wide(rows)[where.long()].view(*probs.shape, D) * wide(grad)[:, None]).sum(-1).to(probs.dtype)


def _moves(per_element: int, of: int) -> Any:
    """Work of moving rows: ``per_element`` operations per element of argument ``of``, every tensor read and written once."""

    def work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
        reads = [a for a in args if isinstance(a, Tensor)]
        rows = args[of]
        return Work(vector_flops=per_element * rows.numel(), vector_dtype=dtype_name(rows.dtype), bytes_read=distinct(reads), bytes_written=distinct(outs))

    return work


def _permute_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    """Sorting counts 1 per index, as ``sort`` does; a row is read as often as it is written."""
    experts = args[1]
    return Work(vector_flops=2 * experts.numel(), vector_dtype="int32", bytes_read=touched(outs[0]) + touched(experts), bytes_written=distinct(outs))


permute_backward = define("npu_moe_token_permute_grad(Tensor dy, Tensor sorted_indices, int rows) -> Tensor", _permute_backward, _moves(1, 0))
permute = define(
    "npu_moe_token_permute(Tensor tokens, Tensor indices, int count) -> (Tensor, Tensor)", _permute, _permute_work,
    lambda ctx, grad, _: (permute_backward(grad, ctx.saved_tensors[1], ctx.saved_tensors[0].shape[0]), None, None), keep(1, results=(1,), constant=(1,)),
)  # fmt: skip
unpermute_backward = define(
    "npu_moe_token_unpermute_grad(Tensor dy, Tensor rows, Tensor sorted_indices, Tensor? probs) -> (Tensor, Tensor)", _unpermute_backward,
    lambda a, k, o: _moves(1 if a[3] is None else 3, 1)(a if a[3] is not None else (a[0], o[0], a[2]), k, o),
)  # fmt: skip


def _unpermute_grads(ctx: Any, grad: Tensor) -> tuple:
    drows, dprobs = unpermute_backward(grad, *ctx.saved_tensors)
    return drows, None, None if ctx.saved_tensors[2] is None else dprobs


unpermute = define(
    "npu_moe_token_unpermute(Tensor rows, Tensor sorted_indices, Tensor? probs) -> Tensor", _unpermute,
    lambda a, k, o: _moves(1 if a[2] is None else 2, 0)(a, k, o), _unpermute_grads, keep(0, 1, 2),
)  # fmt: skip


def npu_moe_token_permute(tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False) -> tuple[Tensor, Tensor]:
    """(rows sorted by expert, where each (token, choice) went), of tokens (N, D) and their experts (N,) or (N, k)."""
    refuse("npu_moe_token_permute", "a mode that torch_npu itself does not have yet", padded_mode=padded_mode or None)
    return permute(tokens, indices, num_out_tokens if num_out_tokens else indices.numel())


def npu_moe_token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False, restore_shape: Any = None
) -> Tensor:
    """Tokens (N, D) from rows sorted by expert: the sum over choices, weighted by ``probs`` (N, k)."""
    refuse("npu_moe_token_unpermute", "a mode that torch_npu itself does not have yet", padded_mode=padded_mode or None, restore_shape=restore_shape)
    if permuted_tokens.shape[0] != sorted_indices.numel():
        raise NotImplementedError(f"torch_npu.npu_moe_token_unpermute: {permuted_tokens.shape[0]} rows for {sorted_indices.numel()} indices: rows that num_out_tokens dropped cannot be put back here")
    return unpermute(permuted_tokens, sorted_indices, probs)
