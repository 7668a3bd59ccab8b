"""Flash attention: scores live on the chip, never in device memory, forward or backward.

Query (B, H, T, K), key (B, G, S, K), value (B, G, S, W), with G dividing H: query head h meets key head h // (H/G).
Forward keeps of each row of scores its maximum m and the sum of exp(score − m); backward computes the scores again,
5 products for the forward's 2. So memory grows with T and S, not with T·S.

Query i sees the keys j with i − left ≤ j ≤ i + right; what lies outside costs nothing. Causal attention is right = 0.

A position bias joins the scores after they are scaled; ``pse_scale`` times it.

The numbers are computed in blocks of rows. Scores and sums are float32; probabilities are rounded to the inputs' dtype
before they meet the values, for the cube takes both factors in one dtype; each result is rounded once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from course_lib.chip.cost import Matmul, Work
from course_lib.npu import runtime
from course_lib.npu.fused import define, keep, wide
from course_lib.npu.work import distinct, dtype_name, flash_work, tensors_in

EVERYWHERE = 2**31 - 1  # torch_npu's "no limit" for pre_tockens and next_tockens
LANES = 8  # m and the sum are stored 8 times, a 32-byte block, as the vector unit reads them
BLOCK = 2**21  # scores at once in host memory
NOT_THERE = float("-inf")

# -- which scores there are ---------------------------------------------------------------------------


def visible_pairs(T: int, S: int, left: int, right: int) -> int:
    """How many (query, key) pairs the band holds: Σ over i of the keys from i − left to i + right within 0 … S − 1."""
    def under(limit: int) -> int:  # Σ over i < T of the keys j ≤ i + limit
        first, full = max(0, -limit), min(T, max(0, S - 1 - limit))  # from `first` on there are some, from `full` on all
        growing = max(0, full - first)
        return growing * (2 * (first + limit + 1) + growing - 1) // 2 + (T - max(full, first)) * S if first < T else 0

    return max(0, under(right) - under(-left - 1))


def products(batch: int, T: int, pairs: int, K: int, dtype: str) -> tuple[Matmul, ...]:
    """``batch`` products of T rows with ``pairs`` results each: exactly 2·pairs·K FLOPs."""
    for rows in (T, T // 2):
        if rows and pairs % rows == 0:
            return (Matmul(batch, rows, K, pairs // rows, dtype),)
    return (Matmul(batch, T, K, pairs // T, dtype), Matmul(batch, pairs % T, K, 1, dtype))


class Scores:
    """Blocks of rows of the scores of one call, on host tensors."""

    def __init__(self, q: Tensor, k: Tensor, pse: Tensor | None, mask: Tensor | None, seed: Tensor | None, numbers: tuple) -> None:
        self.keep, self.scale, self.pse_scale, self.left, self.right = numbers
        (self.B, self.H, self.T, _), self.G, self.S = q.shape, k.shape[1], k.shape[2]
        self.shape = (self.B, self.H, self.T, self.S)
        self.q, self.k = wide(q), wide(k)
        self.pse, self.mask = (None if t is None else t.expand(self.shape) for t in (pse, mask))
        self.drawn = None
        if seed is not None:  # the numbers that PyTorch's own dropout of the scores would draw
            generator = torch.Generator().manual_seed(int(seed))
            self.drawn = torch.empty(self.shape, dtype=torch.bool).bernoulli_(self.keep, generator=generator)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of scores that are seen."""
        step = max(1, BLOCK // max(1, self.B * self.H * self.S))
        for t in range(0, self.T, step):
            end = min(t + step, self.T)
            low, high = max(0, t - self.left), min(self.S, end + self.right)
            if low < high:
                yield slice(t, end), slice(low, high)

    def grouped(self, x: Tensor) -> Tensor:
        """(B, H, rows, …) → (B, G, H/G · rows, …): the query heads of a group below each other."""
        return x.reshape(self.B, self.G, -1, x.shape[-1])

    def of(self, rows: slice, columns: slice) -> Tensor:
        s = (self.grouped(self.q[:, :, rows]) @ self.k[:, :, columns].mT).view(self.B, self.H, -1, columns.stop - columns.start)
        s *= self.scale
        if self.pse is not None:
            s.add_(self.pse[:, :, rows, columns], alpha=self.pse_scale)
        if self.mask is not None:
            s.masked_fill_(self.mask[:, :, rows, columns].bool(), NOT_THERE)
        i, j = torch.arange(rows.start, rows.stop)[:, None], torch.arange(columns.start, columns.stop)
        if columns.stop - 1 > rows.start + self.right or columns.start < rows.stop - 1 - self.left:
            s.masked_fill_((j > i + self.right) | (j < i - self.left), NOT_THERE)
        return s

    def dropped(self, p: Tensor, rows: slice, columns: slice) -> Tensor:
        return p if self.drawn is None else p * self.drawn[:, :, rows, columns] / self.keep


# -- kernels ------------------------------------------------------------------------------------------


def flash_kernel(
    q: Tensor, k: Tensor, v: Tensor, pse: Tensor | None, mask: Tensor | None, seed: Tensor | None, order: list[int],
    keep: float, scale: float, pse_scale: float, left: int, right: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out (B, H, T, W), m, sum); ``order`` is that of the result's dimensions in memory."""
    B, H, T, _ = q.shape
    sizes = (B, H, T, v.shape[-1])
    out = q.new_zeros([sizes[i] for i in order]).permute([order.index(i) for i in range(4)])
    top, total = (torch.zeros(B, H, T, LANES, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32)) for _ in range(2))
    if q.device.type == "meta":
        return out, top, total
    scores, v_ = Scores(q, k, pse, mask, seed, (keep, scale, pse_scale, left, right)), wide(v)
    for rows, columns in scores.blocks():
        s = scores.of(rows, columns)
        m = s.amax(-1, keepdim=True)
        m.masked_fill_(m == NOT_THERE, 0)  # a row that sees nothing: its result is zero
        p = s.sub_(m).exp_()
        total[:, :, rows], top[:, :, rows] = p.sum(-1, keepdim=True), m
        p = wide(scores.dropped(p, rows, columns).to(q.dtype))
        product = (scores.grouped(p) @ v_[:, :, columns]).view(B, H, -1, v.shape[-1])
        out[:, :, rows] = (product / total[:, :, rows, :1].clamp_min(torch.finfo(total.dtype).tiny)).to(q.dtype)
    return out, top, total


def flash_backward_kernel(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pse: Tensor | None, mask: Tensor | None, out: Tensor, top: Tensor, total: Tensor,
    seed: Tensor | None, keep: float, scale: float, pse_scale: float, left: int, right: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK, dV. With dP = dO·Vᵀ and r = Σ P·dP of each row: dS = P·(dP − r), dQ = dS·K, dK = dSᵀ·Q, dV = Pᵀ·dO.

    The chip, which has a part of a row at a time, takes Σ dO·O for r, which is why ``out`` is kept and read. A block here
    has whole rows, and their own sum loses fewer digits where one key has nearly all the weight.
    """
    results = tuple(torch.empty_like(t) for t in (q, k, v))
    if q.device.type == "meta":
        return results
    scores = Scores(q, k, pse, mask, seed, (keep, scale, pse_scale, left, right))
    v_, grad_ = wide(v), wide(grad)
    dq, dk, dv = torch.zeros_like(scores.q), torch.zeros_like(scores.k), torch.zeros_like(v_)
    safe = total[..., :1].clamp_min(torch.finfo(total.dtype).tiny)
    for rows, columns in scores.blocks():
        p = scores.of(rows, columns).sub_(top[:, :, rows, :1]).exp_().div_(safe[:, :, rows])
        g = scores.grouped(grad_[:, :, rows])
        used = scores.grouped(wide(scores.dropped(p, rows, columns).to(q.dtype)))
        dv[:, :, columns] += used.mT @ g
        dp = scores.dropped((g @ v_[:, :, columns].mT).view_as(p), rows, columns)
        ds = scores.grouped(wide((p * (dp - (p * dp).sum(-1, keepdim=True))).to(q.dtype)))
        dq[:, :, rows] = (ds @ scores.k[:, :, columns]).view_as(dq[:, :, rows]) * scale
        dk[:, :, columns] += (ds.mT @ scores.grouped(scores.q[:, :, rows])) * scale
    for result, value in zip(results, (dq, dk, dv)):
        result.copy_(value)
    return results


def _work(q: Tensor, k: Tensor, v: Tensor, band: tuple[int, int], counts: tuple[int, int], reads: list, outs: list) -> Work:
    """``counts``: products of width K and of width W for each pair."""
    B, H, T, K = q.shape
    pairs, dtype = visible_pairs(T, k.shape[2], *band), dtype_name(q.dtype)
    matmuls = products(B * H, T, pairs, K, dtype) * counts[0] + products(B * H, T, pairs, v.shape[-1], dtype) * counts[1]
    return flash_work(matmuls, B * H * pairs, distinct(reads), distinct(outs), backward=sum(counts) > 2)


def _grads(ctx: Any, grad: Tensor, *_: None) -> tuple:
    q, k, v, pse, mask, seed, out, top, total = ctx.saved_tensors
    if ctx.needs_input_grad[3]:
        raise NotImplementedError("npu_fusion_attention: pse has no gradient here; it would take memory for all T·S scores")
    return *flash_backward(grad, q, k, v, pse, mask, out, top, total, seed, *ctx.numbers[-5:]), *(None,) * 9


# S = QKᵀ again and dQ, dK of width K; dP, dV of width W
flash_backward = define(
    "npu_fusion_attention_grad(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor? pse, Tensor? mask, Tensor out, Tensor softmax_max, "
    "Tensor softmax_sum, Tensor? seed, float keep, float scale, float pse_scale, int left, int right) -> (Tensor, Tensor, Tensor)",
    flash_backward_kernel, lambda a, k, o: _work(*a[1:4], a[13:15], (3, 2), [*tensors_in(a[:9])], o),
)  # fmt: skip
flash = define(
    "npu_fusion_attention(Tensor q, Tensor k, Tensor v, Tensor? pse, Tensor? mask, Tensor? seed, int[] order, float keep, float scale, float pse_scale, "
    "int left, int right) -> (Tensor, Tensor, Tensor)",
    flash_kernel, lambda a, k, o: _work(*a[:3], a[10:12], (1, 1), tensors_in(a[:5]), o), _grads, keep(0, 1, 2, 3, 4, 5, results=(0, 1, 2), constant=(1, 2)),
)  # fmt: skip

# -- what PyTorch calls -------------------------------------------------------------------------------


def draw_seed(q: Tensor, numbers: int) -> Tensor:
    """The seed (0-dimensional, on the host) of the next ``numbers`` of the generator of q's device, which moves on."""
    if q.device.type != "npu":
        return torch.randint(2**32, ())
    generator = runtime.devices[q.device.index].generator
    seed = torch.tensor(generator.begin())
    generator.drawn(numbers)
    return seed


def scaled_dot_product(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None) -> Tensor:
    """``F.scaled_dot_product_attention`` where PyTorch's own flash kernel does not fit: (…, H, T, K) with 3 or more dimensions."""
    q, k, v = (t.unsqueeze(0) if t.dim() == 3 else t.flatten(0, -4) for t in (query, key, value))
    pse = mask = None
    if attn_mask is not None:
        full = attn_mask.expand(*query.shape[:-1], key.shape[-2]) if query.dim() > 4 else attn_mask
        full = full.flatten(0, -4) if query.dim() > 4 else full
        pse, mask = (None, full.logical_not()) if full.dtype == torch.bool else (full, None)
    seed = draw_seed(q, q.shape[:-1].numel() * k.shape[2]) if dropout_p else None
    numbers = (1.0 - dropout_p, q.shape[-1] ** -0.5 if scale is None else scale, 1.0, EVERYWHERE, 0 if is_causal else EVERYWHERE)
    return flash(q, k, v, pse, mask, seed, [0, 1, 2, 3], *numbers)[0].view(*query.shape[:-1], value.shape[-1])
