"""Flash attention over packed sequences, without a batch dimension and without padding: the TND layout.

    tokens   a a a b b c c c c      query (T, H, K), key (S, G, K), value (S, G, W)
    q_ends   3, 5, 9                where each sequence ends, on the host, so that the cost is known at the launch

Each sequence sees itself only: the work is the sum over sequences, with nothing spent on padding. Forward and backward
are one launch each. A token behind the last sequence has a result and a gradient of zero.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from course_lib.chip.cost import Work
from course_lib.npu.fused import define, keep
from course_lib.npu.fused_attention import LANES, flash_backward_kernel, flash_kernel, products, visible_pairs
from course_lib.npu.work import distinct, dtype_name, flash_work, tensors_in


def spans(q_ends: list[int], kv_ends: list[int]) -> Iterator[tuple[slice, slice]]:
    """The tokens of query and key of each sequence that has any; zeros at the end stand for sequences left out."""
    for q0, q1, k0, k1 in zip([0, *q_ends], q_ends, [0, *kv_ends], kv_ends):
        if q1 > q0 and k1 > k0:
            yield slice(q0, q1), slice(k0, k1)


def band_of(t: int, s: int, left: int, right: int, from_the_end: bool) -> tuple[int, int]:
    """(left, right) counted from the first query and key, of a band that may be counted ``from_the_end`` of both."""
    shift = s - t if from_the_end else 0
    return left - shift, right + shift


def _rows(t: Tensor, span: slice) -> Tensor:
    """(1, H, t, K) of the tokens in ``span``; a view."""
    return t[span].transpose(0, 1)[None]


def _mask_of(mask: Tensor | None, q: slice, kv: slice) -> Tensor | None:
    """The corner of a mask (longest query, longest key) that a sequence needs."""
    return None if mask is None else mask[: q.stop - q.start, : kv.stop - kv.start]


def _each(q_ends: list[int], kv_ends: list[int], seed: Tensor | None, left: int, right: int, from_the_end: bool) -> Iterator[tuple]:
    """(tokens of query, of key, seed, left, right) of each sequence."""
    for i, (q, kv) in enumerate(spans(q_ends, kv_ends)):
        yield q, kv, None if seed is None else seed + i, *band_of(q.stop - q.start, kv.stop - kv.start, left, right, from_the_end)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: Tensor | None, q_ends: list[int], kv_ends: list[int],
    share: float, scale: float, left: int, right: int, from_the_end: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out (T, H, W), m and sum (T, H, 8))."""
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    top, total = (q.new_zeros(*q.shape[:2], LANES, dtype=torch.promote_types(q.dtype, torch.float32)) for _ in range(2))
    if q.device.type == "meta":
        return out, top, total
    for at, kv, drawn, low, high in _each(q_ends, kv_ends, seed, left, right, from_the_end):
        found = flash_kernel(_rows(q, at), _rows(k, kv), _rows(v, kv), None, _mask_of(mask, at, kv), drawn, [0, 1, 2, 3], share, scale, 1.0, low, high)
        for whole, part in zip((out, top, total), found):
            whole[at] = part[0].transpose(0, 1)
    return out, top, total


def _packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, top: Tensor, total: Tensor, seed: Tensor | None,
    q_ends: list[int], kv_ends: list[int], share: float, scale: float, left: int, right: int, from_the_end: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    results = tuple(torch.zeros_like(t) for t in (q, k, v))
    if q.device.type == "meta":
        return results
    for at, kv, drawn, low, high in _each(q_ends, kv_ends, seed, left, right, from_the_end):
        saved = (_rows(t, at) for t in (out, top, total))
        found = flash_backward_kernel(_rows(grad, at), _rows(q, at), _rows(k, kv), _rows(v, kv), None, _mask_of(mask, at, kv), *saved, drawn, share, scale, 1.0, low, high)
        for whole, part, span in zip(results, found, (at, kv, kv)):
            whole[span] = part[0].transpose(0, 1)
    return results


def _work(q: Tensor, k: Tensor, v: Tensor, numbers: tuple, counts: tuple[int, int], reads: list, outs: list) -> Work:
    """``counts``: products of width K and of width W for each pair; sequences of the same lengths are one batch."""
    q_ends, kv_ends, _, _, *band = numbers
    matmuls, pairs = (), 0
    for (t, s), times in Counter((a.stop - a.start, b.stop - b.start) for a, b in spans(q_ends, kv_ends)).items():
        seen, batch = visible_pairs(t, s, *band_of(t, s, *band)), times * q.shape[1]
        pairs += batch * seen
        for width, count in zip((q.shape[-1], v.shape[-1]), counts):
            matmuls += products(batch, t, seen, width, dtype_name(q.dtype)) * count
    return flash_work(matmuls, pairs, distinct(reads), distinct(outs), backward=sum(counts) > 2)


def _grads(ctx: Any, grad: Tensor, *_: None) -> tuple:
    q, k, v, mask, seed, out, top, total = ctx.saved_tensors
    return *packed_backward(grad, q, k, v, mask, out, top, total, seed, *ctx.numbers[-7:]), *(None,) * 9


packed_backward = define(
    "npu_fusion_attention_packed_grad(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor softmax_max, Tensor softmax_sum, "
    "Tensor? seed, int[] q_ends, int[] kv_ends, float keep, float scale, int left, int right, bool from_the_end) -> (Tensor, Tensor, Tensor)",
    _packed_backward, lambda a, k, o: _work(*a[1:4], a[9:16], (3, 2), tensors_in(a[:8]), o),
)  # fmt: skip
packed = define(
    "npu_fusion_attention_packed(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed, int[] q_ends, int[] kv_ends, float keep, float scale, "
    "int left, int right, bool from_the_end) -> (Tensor, Tensor, Tensor)",
    _packed, lambda a, k, o: _work(*a[:3], a[5:12], (1, 1), tensors_in(a[:4]), o), _grads, keep(0, 1, 2, 3, 4, results=(0, 1, 2), constant=(1, 2)),
)  # fmt: skip
