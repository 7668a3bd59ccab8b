"""Fused operators of serving: feed-forward in one launch, routing of tokens to experts, caches of latent attention.

None has a gradient. Expert numbers and cache positions are numbers on the device: the cost follows from shapes, but for
``npu_ffn``, whose ``expert_tokens`` are on the host.
"""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.chip.cost import Matmul, Work
from course_lib.npu.fused import define, elementwise, refuse, wide
from course_lib.npu.work import distinct, dtype_name

# -- feed-forward ---------------------------------------------------------------------------------------


def fast_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"fastgelu": (fast_gelu, 5), "gelu": (F.gelu, 8), "relu": (F.relu, 1), "silu": (F.silu, 4)}  # and operations per element
GATED = ("geglu", "swiglu", "reglu")


def _ffn(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, activation: str, tokens: list[int] | None) -> Tensor:
    if tokens is None:
        return _feed(x, w1, w2, b1, b2, activation)
    if x.device.type == "meta":
        return x.new_empty(x.shape[0], w2.shape[-1])
    parts = x.split(tokens)
    return torch.cat([_feed(part, w1[e], w2[e], *(None if b is None else b[e] for b in (b1, b2)), activation) for e, part in enumerate(parts)])


def _feed(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, activation: str) -> Tensor:
    """Sums in float32; the inner result is rounded to x's dtype, in which the cube takes it."""
    inner = wide(x) @ wide(w1)
    inner = ACTIVATIONS[activation][0](inner if b1 is None else inner + b1).to(x.dtype)
    out = wide(inner) @ wide(w2)
    return (out if b2 is None else out + b2).to(x.dtype)


def _ffn_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    """Weights are read for the experts that have tokens."""
    x, w1, w2, b1, b2, activation, tokens = args
    rows, (inner, width), dtype = x.shape[:-1].numel(), (w1.shape[-1], w2.shape[-1]), dtype_name(x.dtype)
    groups = Counter(n for n in ([rows] if tokens is None else tokens) if n)
    matmuls = tuple(Matmul(times, m, k, n, dtype) for m, times in groups.items() for k, n in ((x.shape[-1], inner), (inner, width)))
    weights = [t for t in (w1, w2, b1, b2) if t is not None]
    share = 1 if tokens is None else w1.shape[0]
    read = distinct([x]) + distinct(weights) // share * groups.total()
    adds = (b1 is not None) * inner + (b2 is not None) * width
    flops = rows * (ACTIVATIONS[activation][1] * inner + adds)
    return Work(matmuls=matmuls, vector_flops=flops, vector_dtype=dtype, bytes_read=read, bytes_written=distinct(outs))


gelu_fast = define("npu_fast_gelu(Tensor x) -> Tensor", lambda x: fast_gelu(wide(x)).to(x.dtype), elementwise(5))


def npu_fast_gelu(self: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), GELU to two digits."""
    return gelu_fast(self)


ffn = define("npu_ffn(Tensor x, Tensor weight1, Tensor weight2, Tensor? bias1, Tensor? bias2, str activation, int[]? tokens) -> Tensor", _ffn, _ffn_work)


def npu_ffn(
    x: Tensor, weight1: Tensor, weight2: Tensor, activation: str, *, expert_tokens: list[int] | None = None, expert_tokens_index: list[int] | None = None,
    bias1: Tensor | None = None, bias2: Tensor | None = None, scale: Any = None, offset: Any = None, deq_scale1: Any = None, deq_scale2: Any = None,
    antiquant_scale1: Any = None, antiquant_scale2: Any = None, antiquant_offset1: Any = None, antiquant_offset2: Any = None,
    inner_precise: int | None = None, output_dtype: Any = None,
) -> Tensor:  # fmt: skip
    """activation(x W1 + b1) W2 + b2 of x (…, K1), W1 (K1, N1), W2 (N1, K1); with ``expert_tokens``, weights (E, …) by rows."""
    name = "npu_ffn"
    refuse(name, "quantised weights are not emulated", scale=scale, offset=offset, deq_scale1=deq_scale1, deq_scale2=deq_scale2, antiquant_scale1=antiquant_scale1,
           antiquant_scale2=antiquant_scale2, antiquant_offset1=antiquant_offset1, antiquant_offset2=antiquant_offset2, output_dtype=output_dtype)  # fmt: skip
    refuse(name, "give the counts, as expert_tokens", expert_tokens_index=expert_tokens_index)
    refuse(name, "use npu_swiglu or npu_geglu between two products", activation=activation if activation in GATED else None)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    counts = None if expert_tokens is None else [int(n) for n in expert_tokens]
    dims = 2 if counts is None else 3
    fits = weight1.dim() == weight2.dim() == dims and x.shape[-1] == weight1.shape[-2] and weight1.shape[-1] == weight2.shape[-2]
    if not fits or (counts is not None and (x.dim() != 2 or weight1.shape[0] != len(counts) or sum(counts) != x.shape[0])):
        raise ValueError(f"{name}: x {tuple(x.shape)}, weights {tuple(weight1.shape)} and {tuple(weight2.shape)} and expert_tokens={expert_tokens} do not fit together")
    return ffn(x, weight1, weight2, bias1, bias2, activation, counts)


# -- experts ----------------------------------------------------------------------------------------------


def _gate(x: Tensor, bias: Tensor | None, k: int, groups: int, of_groups: int, by_two: bool, share: bool, sigmoid: bool, factor: float, eps: float) -> tuple[Tensor, ...]:
    norm = torch.sigmoid(wide(x)) if sigmoid else torch.softmax(wide(x), -1)
    chosen_by = norm if bias is None else norm + bias
    if of_groups > 1:
        apart = chosen_by.unflatten(-1, (of_groups, -1))  # (N, groups, E/groups)
        best = (apart.topk(2, -1).values.sum(-1) if by_two else apart.amax(-1)).topk(groups, -1).indices
        kept = torch.zeros_like(apart[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        chosen_by = apart.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    experts = chosen_by.topk(k, -1).indices
    y = norm.gather(-1, experts)
    y = y / (y.sum(-1, keepdim=True) + eps) if share else y
    return (y * factor).to(x.dtype), experts.int(), norm.float()


def _gate_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    """Per score: softmax 5 or sigmoid 3, selection 1, one more each for a bias and for groups."""
    x, bias, _, _, of_groups, _, _, sigmoid, *_ = args
    per = (3 if sigmoid else 5) + 1 + (bias is not None) + (of_groups > 1)
    return Work(vector_flops=per * x.numel(), vector_dtype=dtype_name(x.dtype), bytes_read=distinct([t for t in (x, bias) if t is not None]), bytes_written=distinct(outs))


gate = define(
    "npu_moe_gating_top_k(Tensor x, Tensor? bias, int k, int groups, int of_groups, bool by_two, bool share, bool sigmoid, float factor, float eps) -> (Tensor, Tensor, Tensor)",
    _gate, _gate_work,
)  # fmt: skip


def npu_moe_gating_top_k(
    x: Tensor, k: int, *, bias: Tensor | None = None, input_ids: Any = None, tid2eid: Any = None, k_group: int = 1, group_count: int = 1,
    group_select_mode: int = 0, renorm: int = 0, norm_type: int = 0, out_flag: bool = False, routed_scaling_factor: float = 1.0, eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(weights (N, k), experts (N, k), all scores (N, E) in float32): the gate of DeepSeek-V3.

    Scores are softmax (norm_type 0) or sigmoid (1) of x (N, E). ``bias`` takes part in the choice only. Of ``group_count``
    groups ``k_group`` are kept, by their best expert (group_select_mode 0) or the sum of their two best (1). Weights of
    sigmoid, or with ``renorm``, are divided by their sum. Scores are there whatever ``out_flag``.
    """
    name = "npu_moe_gating_top_k"
    refuse(name, "experts by token number are not emulated", input_ids=input_ids, tid2eid=tid2eid)
    if norm_type not in (0, 1) or group_select_mode not in (0, 1):
        raise NotImplementedError(f"torch_npu.{name}(norm_type={norm_type}, group_select_mode={group_select_mode}): the emulation has 0 and 1")
    E = x.shape[-1]
    if x.dim() != 2 or E % group_count or not 1 <= k_group <= group_count or not 1 <= k <= E // group_count * k_group or (bias is not None and bias.shape != (E,)):
        raise ValueError(f"{name}: x (N, E) {tuple(x.shape)}, k={k} of {k_group} of {group_count} groups and bias {None if bias is None else tuple(bias.shape)} do not fit together")
    return gate(x, bias, k, k_group, group_count, group_select_mode == 1, norm_type == 1 or renorm == 1, norm_type == 1, routed_scaling_factor, eps)


def _init_routing(x: Tensor, experts: Tensor, scale: Tensor | None, first: int, last: int, running: bool, scatter: bool) -> tuple[Tensor, ...]:
    flat, count = experts.reshape(-1), experts.numel()
    there = (flat >= first) & (flat < last)
    order = torch.argsort(torch.where(there, flat, last), stable=True)  # experts elsewhere go behind
    source = order // experts.shape[1]
    where = torch.where(there, torch.argsort(order, stable=True), -1)
    by_rank = torch.arange(count, device=x.device)
    index = torch.where(by_rank < there.sum(), order, -1) if scatter else where
    counts = torch.zeros(last - first + 1, dtype=torch.int64, device=x.device).scatter_add_(0, torch.where(there, flat - first, last - first).long(), torch.ones_like(flat, dtype=torch.int64))[:-1]
    scales = torch.zeros(count, device=x.device) if scale is None else scale[source]
    return x[source], index.int(), counts.cumsum(0) if running else counts, scales


def _routing_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    """Sorting and counting, an operation each per index; a row is read as often as it is written."""
    experts, scale = args[1:3]
    read = distinct([outs[0]]) + distinct([t for t in (experts, scale) if t is not None])
    return Work(vector_flops=3 * experts.numel(), vector_dtype="int32", bytes_read=read, bytes_written=distinct(outs))


init_routing = define(
    "npu_moe_init_routing_v2(Tensor x, Tensor expert_idx, Tensor? scale, int first, int last, bool running, bool scatter) -> (Tensor, Tensor, Tensor, Tensor)", _init_routing, _routing_work
)


def npu_moe_init_routing_v2(
    x: Tensor, expert_idx: Tensor, *, scale: Tensor | None = None, offset: Tensor | None = None, active_num: int = -1, expert_capacity: int = -1,
    expert_num: int = -1, drop_pad_mode: int = 0, expert_tokens_num_type: int = 0, expert_tokens_num_flag: bool = False, quant_mode: int = -1,
    active_expert_range: list[int] | tuple = (), row_idx_type: int = 0, x_dtype: Any = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(rows sorted by expert (N·k, D), index, tokens of each expert, scale of each row) of x (N, D) and its experts (N, k).

    ``index`` says where each (token, choice) went (row_idx_type 0), or whence each row came (1); −1 for experts outside the
    range. Tokens are counted (type 1) or their running sum given (0). Rows behind those of the range mean nothing.
    """
    name = "npu_moe_init_routing_v2"
    refuse(name, "rows in int8 are not emulated", quant_mode=None if quant_mode == -1 else quant_mode, offset=offset, x_dtype=x_dtype)
    refuse(name, "all tokens are kept: no capacity, counts or running sums", drop_pad_mode=drop_pad_mode or None, expert_tokens_num_type=expert_tokens_num_type if expert_tokens_num_type not in (0, 1) else None)
    first, last = active_expert_range or (0, expert_num)
    if x.dim() != 2 or expert_idx.dim() != 2 or x.shape[0] != expert_idx.shape[0] or not 0 <= first < last <= expert_num or active_num not in (-1, 0, expert_idx.numel()):
        raise ValueError(f"{name}: x (N, D) {tuple(x.shape)}, expert_idx (N, k) {tuple(expert_idx.shape)}, active_num={active_num}, experts {first} to {last} of expert_num={expert_num} do not fit together")
    return init_routing(x, expert_idx, scale, first, last, expert_tokens_num_type == 0, bool(row_idx_type))


def _re_routing(tokens: Tensor, counts: Tensor, scales: Tensor | None) -> tuple[Tensor, ...]:
    if tokens.device.type == "meta":
        order = torch.empty(tokens.shape[0], dtype=torch.int64, device="meta")
    else:
        expert = torch.arange(counts.shape[1]).repeat(counts.shape[0]).repeat_interleave(counts.reshape(-1).long())
        if len(expert) != tokens.shape[0]:
            raise ValueError(f"npu_moe_re_routing: {tokens.shape[0]} tokens, and expert_token_num_per_rank counts {len(expert)}")
        order = torch.argsort(expert, stable=True)
    return tokens[order], torch.zeros(tokens.shape[0], device=tokens.device) if scales is None else scales[order], order.int(), counts.sum(0).to(counts.dtype)


re_routing = define(
    "npu_moe_re_routing(Tensor tokens, Tensor counts, Tensor? scales) -> (Tensor, Tensor, Tensor, Tensor)", _re_routing,
    lambda a, k, o: Work(vector_flops=a[1].numel(), vector_dtype="int32", bytes_read=distinct([t for t in a if t is not None]), bytes_written=distinct(o)),
)  # fmt: skip


def npu_moe_re_routing(
    tokens: Tensor, expert_token_num_per_rank: Tensor, *, per_token_scales: Tensor | None = None, expert_token_num_type: int = 1, idx_type: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens by expert, their scales, whence each came, tokens of each expert) of tokens (A, D) by rank, then expert (P, E)."""
    refuse("npu_moe_re_routing", "torch_npu itself has the defaults only", expert_token_num_type=None if expert_token_num_type == 1 else expert_token_num_type, idx_type=idx_type or None)
    return re_routing(tokens, expert_token_num_per_rank, per_token_scales)


# -- caches -----------------------------------------------------------------------------------------------


def _nd_update(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return x.index_put(tuple(indices.long().unbind(-1)), updates)


nd_update = define("npu_scatter_nd_update(Tensor x, Tensor indices, Tensor updates) -> Tensor", _nd_update, elementwise(0))


def npu_scatter_nd_update(self: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """A copy of ``self`` with ``updates`` at ``indices`` (…, dimensions): the whole is copied."""
    depth = indices.shape[-1]
    if indices.dim() < 2 or depth > self.dim() or updates.shape != indices.shape[:-1] + self.shape[depth:]:
        raise ValueError(f"npu_scatter_nd_update: self {tuple(self.shape)}, indices {tuple(indices.shape)} and updates {tuple(updates.shape)} do not fit together")
    return nd_update(self, indices, updates)


def _cache_latent(kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor, epsilon: float, paged: bool) -> tuple[Tensor, Tensor]:
    """(rotated (B, 1, T, Dr), normed (B, 1, T, Dc)), and both written into their caches."""
    latent, rope = wide(kv).split([gamma.shape[0], kv.shape[-1] - gamma.shape[0]], -1)
    normed = (latent * (latent.square().mean(-1, keepdim=True) + epsilon).rsqrt() * gamma).to(kv.dtype)
    halves = rope.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # pairs (2i, 2i + 1) become (i, i + Dr/2)
    a, b = halves.chunk(2, -1)
    rotated = (halves * cos + torch.cat([-b, a], -1) * sin).to(kv.dtype)
    if kv.device.type == "meta":
        return rotated, normed
    at = index if paged else index + torch.arange(kv.shape[0])[:, None] * k_cache.shape[2]
    there = index.reshape(-1) >= 0
    for cache, new in ((k_cache, rotated), (ckv_cache, normed)):
        cache.view(-1, cache.shape[-1])[at.reshape(-1)[there]] = new.reshape(-1, new.shape[-1])[there].to(cache.dtype)
    return rotated, normed


def _latent_work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    """Per element: square, mean, scale, gain of the latent part; two products and a sum of the rotated one."""
    kv, gamma = args[:2]
    latent, rope = outs[1].numel(), outs[0].numel()
    written = 2 * (latent + rope) * kv.element_size()  # into the caches, and the results
    return Work(vector_flops=4 * latent + 3 * rope, vector_dtype=dtype_name(kv.dtype), bytes_read=distinct([*args[:5]]), bytes_written=written)


cache_latent = define(
    "npu_kv_rmsnorm_rope_cache(Tensor kv, Tensor gamma, Tensor cos, Tensor sin, Tensor index, Tensor(a!) k_cache, Tensor(b!) ckv_cache, float epsilon, bool paged) -> (Tensor, Tensor)",
    _cache_latent, _latent_work,
)  # fmt: skip


def npu_kv_rmsnorm_rope_cache(
    kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor, *, k_rope_scale: Any = None,
    c_kv_scale: Any = None, k_rope_offset: Any = None, c_kv_offset: Any = None, epsilon: float = 1e-5, cache_mode: str = "Norm", is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(k_cache, ckv_cache, rotated part, normed part) of kv (B, 1, T, Dc + Dr) in latent attention; both caches are written.

    ``index`` (B, T) counts within a sequence's cache (B, 1, length, …) in mode "Norm"; in "PA" and "PA_BNSD" (B·T,) counts
    tokens over all pages (pages, tokens, 1, …). Negative: not written. The parts are as computed, whatever ``is_output_kv``.
    """
    name = "npu_kv_rmsnorm_rope_cache"
    refuse(name, "caches in int8 are not emulated", k_rope_scale=k_rope_scale, c_kv_scale=c_kv_scale, k_rope_offset=k_rope_offset, c_kv_offset=c_kv_offset)
    if cache_mode not in ("Norm", "PA", "PA_BNSD"):
        raise NotImplementedError(f"torch_npu.{name}(cache_mode={cache_mode!r}): the emulation has Norm, PA and PA_BNSD; bytes have one order here, and positions are of tokens")
    rope = kv.shape[-1] - gamma.shape[0]
    fits = kv.dim() == 4 and kv.shape[1] == 1 and k_cache.shape[-1] == cos.shape[-1] == sin.shape[-1] == rope and ckv_cache.shape[-1] == gamma.shape[0]
    if not fits or index.numel() != kv.shape[0] * kv.shape[2] or (cache_mode == "Norm" and (k_cache.shape[0] != kv.shape[0] or index.dim() != 2)):
        raise ValueError(f"{name}: kv {tuple(kv.shape)}, gamma {tuple(gamma.shape)}, index {tuple(index.shape)}, caches {tuple(k_cache.shape)} and {tuple(ckv_cache.shape)} do not fit together")
    with torch.no_grad():
        rotated, normed = cache_latent(kv, gamma, cos, sin, index, k_cache, ckv_cache, epsilon, cache_mode != "Norm")
    return k_cache, ckv_cache, rotated, normed
