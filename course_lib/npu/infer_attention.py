"""Attention of inference, over a cache of keys and values: a whole prompt, one token at a time, or pages of the cache.

    out = npu_prompt_flash_attention(q, k, v, num_heads=H, input_layout="BNSD", scale_value=K**-0.5, actual_seq_lengths=[5, 9])
    out = npu_incre_flash_attention(q, cache_k, cache_v, num_heads=H, num_key_value_heads=G, actual_seq_lengths=lengths,
                                    block_table=pages, block_size=128)
    out, lse = npu_fused_infer_attention_score(…)                           # either of them, and packed sequences (TND)

Lengths are numbers on the host, so the cost is that of the tokens that are there, not of the padding: each key and value
that a sequence may see is read once, for all query heads of its group together. A page (a block of ``block_size`` tokens)
is found by ``block_table``, sequence by sequence. Where keys and values are one tensor, as in latent attention, it is read
once. Nothing is kept for a backward; ``pse_shift`` joins the scores after they are scaled; the mask is True where a key is
*not* seen. Results behind a sequence's length are zero.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.chip.cost import Matmul, Work
from course_lib.npu.fused import define, refuse
from course_lib.npu.fused_attention import EVERYWHERE, NOT_THERE, flash_kernel, products, visible_pairs
from course_lib.npu.fused_packed import band_of
from course_lib.npu.fusion_attention import ORDERS, band, heads_apart
from course_lib.npu.work import dtype_name, flash_work, touched

QUANTISED = "quantised caches and results are not emulated"
LAYOUTS = {"BSH": "BSH", "BSND": "BSND", "BNSD": "BNSD", "BNSD_BSND": "BSND"}  # of the query → of the result
IN_PLACE = [0, 1, 2, 3]


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence: its batch entry and tokens among the queries, and its batch entry (row of pages) and tokens among the keys."""

    batch: int
    start: int
    end: int
    kv_batch: int
    kv_start: int
    kv_end: int

    @property
    def sizes(self) -> tuple[int, int]:
        return self.end - self.start, self.kv_end - self.kv_start


def sequences(flat: list[int]) -> Iterator[Span]:
    """Those that have queries and keys; an operator's arguments hold them as one list of numbers, six each."""
    for at in range(0, len(flat), 6):
        sequence = Span(*flat[at : at + 6])
        if all(sequence.sizes):
            yield sequence


# -- kernel and cost ----------------------------------------------------------------------------------


def _found(cache: Tensor, pages: Tensor | None, s: Span) -> Tensor:
    """Keys or values (1, G, s, K) of a sequence."""
    if pages is None:
        return cache[s.kv_batch : s.kv_batch + 1, :, s.kv_start : s.kv_end]
    blocks = pages[s.kv_batch, : -(-s.kv_end // cache.shape[2])].long()
    return cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, : s.kv_end]


def _part(t: Tensor | None, s: Span) -> Tensor | None:
    """What a mask or bias (B or 1, …, T, S) says to a sequence."""
    return None if t is None else t[s.batch if t.shape[0] > 1 else 0][None, :, : s.sizes[0], : s.sizes[1]]


def _infer(
    q: Tensor, k: Tensor, v: Tensor, pse: Tensor | None, mask: Tensor | None, q_rope: Tensor | None, k_rope: Tensor | None, pages: Tensor | None,
    flat: list[int], order: list[int], scale: float, left: int, right: int, from_the_end: bool, lse: bool, packed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (B, N, T, W), log of the sum of exp(score) (B, N, T, 1) in float32, or [0.0])."""
    B, N, T, _ = q.shape
    sizes = (B, N, T, v.shape[-1])
    out = q.new_zeros([sizes[i] for i in order]).permute([order.index(i) for i in range(4)])
    logs = q.new_full((B, T, N, 1) if packed else (B, N, T, 1), NOT_THERE, dtype=torch.float32)
    logs = logs.transpose(1, 2) if packed else logs
    if q.device.type != "meta":
        for s in sequences(flat):
            queries, keys = q[s.batch : s.batch + 1, :, s.start : s.end], _found(k, pages, s)
            if q_rope is not None:
                queries = torch.cat([queries, q_rope[s.batch : s.batch + 1, :, s.start : s.end]], -1)
                keys = torch.cat([keys, _found(k_rope, pages, s)], -1)
            band = band_of(*s.sizes, left, right, from_the_end)
            got, top, total = flash_kernel(queries, keys, _found(v, pages, s), _part(pse, s), _part(mask, s), None, IN_PLACE, 1.0, scale, 1.0, *band)
            out[s.batch, :, s.start : s.end] = got[0]
            logs[s.batch, :, s.start : s.end] = (total[0, ..., :1].log() + top[0, ..., :1]).float()
    return out, logs if lse else q.new_zeros(1, dtype=torch.float32)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one and the same memory."""
    there = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in (a, b)]
    return there[0] == there[1]


def _work(args: tuple, kwargs: dict, outs: list[Tensor]) -> Work:
    q, k, v, pse, mask, q_rope, _, pages, flat, _, _, *limits, lse, _ = args
    N, G, W = q.shape[1], k.shape[1], v.shape[-1]
    K = q.shape[-1] + (0 if q_rope is None else q_rope.shape[-1])
    matmuls, pairs, queries, keys, blocks = (), 0, 0, 0, 0
    for (t, s), times in Counter(sequence.sizes for sequence in sequences(flat)).items():
        left, right = band_of(t, s, *limits)
        seen = visible_pairs(t, s, left, right)
        pairs, queries, keys = pairs + times * N * seen, queries + times * t, keys + times * max(0, min(s, t + right) - max(0, -left))
        blocks += 0 if pages is None else times * -(-s // k.shape[2])
        matmuls += _products(times * G, N // G * t, N // G * seen, (K, W), dtype_name(q.dtype))
    read = (queries * N * K + keys * G * (K if _same(k, v) else K + W)) * q.element_size() + 4 * blocks
    read += sum(touched(t) for t in (pse, mask) if t is not None)
    written = queries * N * W * q.element_size() + (queries * N * 4 if lse else 0)
    return flash_work(matmuls, pairs, read, written, backward=False)


def _products(batch: int, rows: int, pairs: int, widths: tuple[int, int], dtype: str) -> tuple[Matmul, ...]:
    """Scores and results; the query heads of a group are rows of one product with its keys."""
    return tuple(m for width in widths if pairs for m in products(batch, rows, pairs, width, dtype))


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? pse, Tensor? mask, Tensor? q_rope, Tensor? k_rope, Tensor? pages, int[] sequences, int[] order, "
    "float scale, int left, int right, bool from_the_end, bool lse, bool packed) -> (Tensor, Tensor)"
)
prompt, increment, either = (define(name + SCHEMA, _infer, _work) for name in ("npu_prompt_flash_attention", "npu_incre_flash_attention", "npu_fused_infer_attention_score"))

# -- what programs call -------------------------------------------------------------------------------

Lengths = Sequence[int] | Tensor | None


def npu_prompt_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, pse_shift: Tensor | None = None,
    actual_seq_lengths: Lengths = None, deq_scale1: Tensor | None = None, quant_scale1: Tensor | None = None, deq_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None, quant_offset2: Tensor | None = None, num_heads: int = 1, scale_value: float = 1.0,
    pre_tokens: int = EVERYWHERE, next_tokens: int = 0, input_layout: str = "BSH", num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Lengths = None, sparse_mode: int = 0,
) -> Tensor:  # fmt: skip
    """Prefill: all queries of a prompt. Without a mask each sees every key: causal is ``sparse_mode=3`` with its mask."""
    name = "npu_prompt_flash_attention"
    refuse(name, "torch_npu itself does not use it", padding_mask=padding_mask)
    refuse(name, QUANTISED, deq_scale1=deq_scale1, quant_scale1=quant_scale1, deq_scale2=deq_scale2, quant_scale2=quant_scale2, quant_offset2=quant_offset2)
    if input_layout not in LAYOUTS:
        raise ValueError(f"{name}: input_layout is {input_layout!r}; expected one of {', '.join(LAYOUTS)}")
    call = _Call(name, prompt, num_heads, num_key_value_heads or num_heads, input_layout, scale_value)
    seen = band(name, sparse_mode, atten_mask, pre_tokens, next_tokens)
    return call(query, key, value, pse_shift, seen, actual_seq_lengths, actual_seq_lengths_kv)[0]


def npu_incre_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, pse_shift: Tensor | None = None,
    actual_seq_lengths: Lengths = None, antiquant_scale: Tensor | None = None, antiquant_offset: Tensor | None = None, block_table: Tensor | None = None,
    dequant_scale1: Tensor | None = None, quant_scale1: Tensor | None = None, dequant_scale2: Tensor | None = None, quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None, kv_padding_size: Tensor | None = None, num_heads: int = 1, scale_value: float = 1.0,
    input_layout: str = "BSH", num_key_value_heads: int = 0, block_size: int = 0, inner_precise: int = 1,
) -> Tensor:  # fmt: skip
    """Decode: one query a sequence. ``actual_seq_lengths`` are those of the *keys*; with ``block_table`` they are needed."""
    name = "npu_incre_flash_attention"
    refuse(name, "torch_npu itself does not use it", padding_mask=padding_mask)
    refuse(name, QUANTISED, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset, dequant_scale1=dequant_scale1, quant_scale1=quant_scale1,
           dequant_scale2=dequant_scale2, quant_scale2=quant_scale2, quant_offset2=quant_offset2)  # fmt: skip
    refuse(name, "keys padded on the left are not emulated", kv_padding_size=kv_padding_size)
    if input_layout not in ("BSH", "BSND", "BNSD"):
        raise ValueError(f"{name}: input_layout is {input_layout!r}; expected one of BSH, BSND, BNSD")
    call = _Call(name, increment, num_heads, num_key_value_heads or num_heads, input_layout, scale_value)
    tokens = heads_apart(query, input_layout, num_heads).shape[2]
    if tokens != 1:
        raise ValueError(f"{name}: {tokens} queries a sequence; it takes one, npu_prompt_flash_attention takes more")
    return call(query, key, value, pse_shift, band(name, 0, atten_mask, EVERYWHERE, EVERYWHERE), None, actual_seq_lengths, block_table, block_size)[0]


def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, pse_shift: Tensor | None = None, atten_mask: Tensor | None = None, actual_seq_lengths: Lengths = None,
    actual_seq_lengths_kv: Lengths = None, dequant_scale1: Tensor | None = None, quant_scale1: Tensor | None = None, dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None, quant_offset2: Tensor | None = None, antiquant_scale: Tensor | None = None, antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None, query_padding_size: Tensor | None = None, kv_padding_size: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None, key_antiquant_offset: Tensor | None = None, value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None, key_shared_prefix: Tensor | None = None, value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: Lengths = None, query_rope: Tensor | None = None, key_rope: Tensor | None = None, key_rope_antiquant_scale: Tensor | None = None,
    num_heads: int = 1, scale: float = 1.0, pre_tokens: int = EVERYWHERE, next_tokens: int = EVERYWHERE, input_layout: str = "BSH",
    num_key_value_heads: int = 0, sparse_mode: int = 0, inner_precise: int = 0, block_size: int = 0, antiquant_mode: int = 0,
    softmax_lse_flag: bool = False, key_antiquant_mode: int = 0, value_antiquant_mode: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse): prefill or decode, over batches, packed sequences (TND, with running sums as lengths) or pages.

    ``query_rope`` and ``key_rope`` hold the part of the head width that was rotated, as in latent attention (MLA). One query
    a sequence sees every key, whatever the sparse mode. ``lse`` (B, N, T, 1), in TND (T, N, 1), is [0.0] unless asked for.
    """
    name = "npu_fused_infer_attention_score"
    refuse(name, QUANTISED, dequant_scale1=dequant_scale1, quant_scale1=quant_scale1, dequant_scale2=dequant_scale2, quant_scale2=quant_scale2,
           quant_offset2=quant_offset2, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset, key_antiquant_scale=key_antiquant_scale,
           key_antiquant_offset=key_antiquant_offset, value_antiquant_scale=value_antiquant_scale, value_antiquant_offset=value_antiquant_offset,
           key_rope_antiquant_scale=key_rope_antiquant_scale, antiquant_mode=antiquant_mode or None, key_antiquant_mode=key_antiquant_mode or None,
           value_antiquant_mode=value_antiquant_mode or None)  # fmt: skip
    refuse(name, "padding on the left and a prefix shared by all sequences are not emulated", query_padding_size=query_padding_size, kv_padding_size=kv_padding_size,
           key_shared_prefix=key_shared_prefix, value_shared_prefix=value_shared_prefix, actual_shared_prefix_len=actual_shared_prefix_len)  # fmt: skip
    if input_layout not in (*LAYOUTS, "TND"):
        raise NotImplementedError(f"torch_npu.{name}(input_layout={input_layout!r}): the emulation has {', '.join(LAYOUTS)} and TND")
    if (query_rope is None) != (key_rope is None):
        raise ValueError(f"{name}: query_rope and key_rope belong together")
    call = _Call(name, either, num_heads, num_key_value_heads or num_heads, input_layout, scale, softmax_lse_flag)
    one = input_layout != "TND" and query_rope is None and heads_apart(query, input_layout.split("_")[0], num_heads).shape[2] == 1
    seen = band(name, 0, atten_mask, EVERYWHERE, EVERYWHERE) if one else band(name, sparse_mode, atten_mask, pre_tokens, next_tokens)
    return call(query, key, value, pse_shift, seen, actual_seq_lengths, actual_seq_lengths_kv, block_table, block_size, query_rope, key_rope)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of ``operator``: arguments brought into its form, the result into the caller's layout."""

    name: str
    operator: Callable
    heads: int
    groups: int
    layout: str
    scale: float
    lse: bool = False

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, pse: Tensor | None, seen: tuple, lengths: Lengths, kv_lengths: Lengths,
        pages: Tensor | None = None, block: int = 0, q_rope: Tensor | None = None, k_rope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        packed, (mask, *limits) = self.layout == "TND", seen
        if not query.dtype == key.dtype == value.dtype:
            self._wrong(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; {QUANTISED}", NotImplementedError)
        q, q_rope = self._apart(query, self.heads), self._apart(q_rope, self.heads)
        k, v, k_rope = (self._apart(t, self.groups, pages is not None) for t in (key, value, k_rope))
        self._check(q, k, v, q_rope, k_rope, pages is None)
        flat = self._sequences(q, k, lengths, kv_lengths, pages, block)
        if packed and (mask is not None or pse is not None):
            self._wrong("a mask or bias over packed sequences is not emulated, but for the sparse modes 2 to 4", NotImplementedError)
        longest = max(flat[5::6], default=0)
        mask, pse = self._check_mask(mask, q, longest), None if pse is None else self._check_bias(pse, q, longest)
        order = ORDERS["BSND" if packed else LAYOUTS[self.layout]]
        out, lse = self.operator(q, k, v, pse, mask, q_rope, k_rope, pages, flat, order, self.scale, *limits, self.lse, packed)
        out = out.permute(order)
        out = out[0] if packed else out.flatten(-2) if self.layout == "BSH" else out
        return out, lse[0].transpose(0, 1) if packed and self.lse else lse

    def _apart(self, t: Tensor | None, heads: int, paged: bool = False) -> Tensor | None:
        """A view (B, N, S, D), or of pages (blocks, N, block, D)."""
        if t is None or (paged and t.dim() == 4):
            return t
        if paged:
            return heads_apart(t, "BSH", heads)
        if self.layout == "TND":
            return t.transpose(0, 1)[None]
        return heads_apart(t, self.layout.split("_")[0], heads)

    def _sequences(self, q: Tensor, k: Tensor, lengths: Lengths, kv_lengths: Lengths, pages: Tensor | None, block: int) -> list[int]:
        """Where each sequence lies, six numbers each: see Span."""
        packed, room = self.layout == "TND", k.shape[2] if pages is None else pages.shape[1] * k.shape[2]
        ends = self._listed(lengths, "actual_seq_lengths", None if packed else q.shape[0], q.shape[2], packed)
        count = len(ends)
        queries = zip([0] * count, [0, *ends], ends) if packed else zip(range(count), [0] * count, ends)
        if pages is not None:
            self._check_pages(pages, kv_lengths, k, block, count)
        joined = packed and pages is None
        kv = self._listed(kv_lengths, "the lengths of keys", count, room, joined)
        keys = zip([0] * count, [0, *kv], kv) if joined else zip(range(count), [0] * count, kv)
        return [n for pair in zip(queries, keys) for part in pair for n in part]

    # -- wrong arguments --

    def _wrong(self, text: str, error: type = ValueError) -> None:
        raise error(f"{self.name}: {text}" if error is ValueError else f"torch_npu.{self.name}: {text}")

    def _listed(self, lengths: Lengths, argument: str, count: int | None, room: int, joined: bool) -> list[int]:
        """Lengths as a list: one for all, or one for each of ``count``; running sums if ``joined``. None: all there is ``room`` for."""
        if lengths is None and joined:
            self._wrong(f'input_layout="TND" wants {argument}, the running sum of the lengths')
        listed = [room] if lengths is None else [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        if count is not None and not joined:
            listed = listed * count if len(listed) == 1 else listed[:count]
        falls = joined and any(a > b for a, b in zip([0, *listed], listed))
        if (count is not None and len(listed) != count) or falls or any(not 0 <= n <= room for n in listed):
            self._wrong(f"{argument}={listed} for {len(listed) if count is None else count} sequences with room for {room} tokens{' in all, a running sum' if joined else ''}")
        return listed

    def _check(self, q: Tensor, k: Tensor, v: Tensor, q_rope: Tensor | None, k_rope: Tensor | None, whole: bool) -> None:
        fits = q.shape[1] == self.heads and k.shape[1] == v.shape[1] == self.groups and self.heads % self.groups == 0
        fits = fits and k.shape[0] == v.shape[0] and k.shape[2] == v.shape[2] and q.shape[-1] == k.shape[-1]
        fits = fits and (not whole or q.shape[0] == k.shape[0])
        if q_rope is not None:
            fits = fits and q_rope.shape[:-1] == q.shape[:-1] and k_rope.shape[:-1] == k.shape[:-1] and q_rope.shape[-1] == k_rope.shape[-1]
        if not fits:
            shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v, q_rope, k_rope) if t is not None)
            self._wrong(f"num_heads={self.heads}, num_key_value_heads={self.groups} and tensors of (B, N, S, D) {shapes} do not fit together")

    def _check_pages(self, pages: Tensor, kv_lengths: Lengths, k: Tensor, block: int, count: int) -> None:
        if kv_lengths is None:
            self._wrong("block_table wants the length of each sequence")
        if pages.dim() != 2 or pages.shape[0] != count or pages.dtype != torch.int32 or block != k.shape[2]:
            self._wrong(f"block_table of int32 ({count} sequences, pages), and block_size={block} as in key (pages, {k.shape[2]} tokens); got {pages.dtype} {tuple(pages.shape)}")

    def _check_mask(self, mask: Tensor | None, q: Tensor, longest: int) -> Tensor | None:
        """(B or 1, 1, T, S) of a mask with two to four dimensions; with one query a sequence, two are (B, S)."""
        if mask is None:
            return None
        B, _, T, _ = q.shape
        whole = mask[:, None, None] if mask.dim() == 2 and T == 1 else mask[None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
        if whole.dim() != 4 or whole.shape[0] not in (1, B) or whole.shape[1] != 1 or whole.shape[2] < T or whole.shape[3] < longest:
            self._wrong(f"atten_mask of shape {tuple(mask.shape)} for {B} sequences of {T} queries and {longest} keys")
        return whole

    def _check_bias(self, pse: Tensor, q: Tensor, longest: int) -> Tensor:
        B, N, T, _ = q.shape
        if pse.dim() != 4 or pse.shape[0] not in (1, B) or pse.shape[1] != N or pse.shape[2] < T or pse.shape[3] < longest:
            self._wrong(f"pse_shift of shape {tuple(pse.shape)} for {B} sequences of {N} heads, {T} queries and {longest} keys")
        return pse
