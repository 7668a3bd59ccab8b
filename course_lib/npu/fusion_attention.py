"""``npu_fusion_attention`` and its second version: attention of training, by layout, mask and sparse mode.

    out = npu_fusion_attention(q, k, v, heads, "BNSD", scale=K**-0.5, atten_mask=ones_above_the_diagonal, sparse_mode=2)[0]
    out = npu_fusion_attention(q, k, v, heads, "TND", scale=K**-0.5, actual_seq_qlen=ends, actual_seq_kvlen=ends)[0]

Layouts name the dimensions: B batch, S tokens, N heads, D head width, H = N·D; T the tokens of all sequences together.
``atten_mask`` is True (1) where a key is *not* seen, the opposite of PyTorch's. Note ``scale=1``: pass 1/√D.
The kernels are in ``fused_attention`` and ``fused_packed``. A position bias ``pse`` joins the scores before they are
scaled, scale · (Q·Kᵀ + pse), or with pse_type 0 of the second version after: scale · Q·Kᵀ + pse.
"""

from typing import Any

from torch import Tensor

from course_lib.npu import runtime
from course_lib.npu.fused import refuse
from course_lib.npu.fused_attention import EVERYWHERE, draw_seed, flash
from course_lib.npu.fused_packed import packed, spans

ORDERS = {"BNSD": [0, 1, 2, 3], "BSND": [0, 2, 1, 3], "BSH": [0, 2, 1, 3], "SBH": [2, 0, 1, 3]}  # in memory, of (B, N, S, D)
COMPRESSED = (2048, 2048)  # the shape of the mask that stands for a causal one of any size
Results = tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]


def heads_apart(t: Tensor, layout: str, heads: int) -> Tensor:
    """A view (B, N, S, D) of ``t``."""
    if layout in ("BSH", "SBH"):
        t = t.unflatten(-1, (heads, -1))
    order = ORDERS[layout]
    return t.permute([order.index(i) for i in range(4)])


def band(name: str, sparse_mode: int, mask: Tensor | None, before: int, after: int) -> tuple[Tensor | None, int, int, bool]:
    """(mask to apply, left, right, whether counted from the end) of a sparse mode.

    2 is causal from the first query and key, 3 from the last, 4 a band counted from the last.
    """
    if sparse_mode in (0, 1):
        return (mask, before, after, False) if sparse_mode == 0 and mask is not None else (mask, EVERYWHERE, EVERYWHERE, False)
    if sparse_mode not in (2, 3, 4):
        raise NotImplementedError(f"torch_npu.{name}(sparse_mode={sparse_mode}): the emulation has 0 to 4; prefixes and blocks cut across sequences are not emulated")
    if mask is None or tuple(mask.shape[-2:]) != COMPRESSED:
        found = "none" if mask is None else f"one of shape {tuple(mask.shape)}"
        raise ValueError(f"{name}(sparse_mode={sparse_mode}) wants atten_mask of shape (2048, 2048), ones above the diagonal, whatever T is; got {found}")
    return None, *{2: (EVERYWHERE, 0, False), 3: (EVERYWHERE, 0, True), 4: (before, after, True)}[sparse_mode]


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None, padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0, pre_tockens: int = EVERYWHERE, next_tockens: int = EVERYWHERE,
    inner_precise: int = 0, prefix: list | None = None, actual_seq_qlen: list | None = None, actual_seq_kvlen: list | None = None,
    sparse_mode: int = 0, gen_mask_parallel: bool = True, sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None,
    dropout_mask: Tensor | None = None, seed: int = 0, offset: int = 0,
) -> Results:  # fmt: skip
    """(out in the query's layout, softmax max and sum (B, N, S, 8), an empty tensor, seed, offset, numbers drawn).

    In layout TND the sums are (T, N, 8), and the two lists say where each sequence ends.
    """
    name = "npu_fusion_attention"
    refuse(name, "torch_npu itself does not use it", padding_mask=padding_mask)
    refuse(name, "prefixes, sinks and masks of dropout made outside are not emulated", prefix=prefix, sink=sink, dropout_mask=dropout_mask)
    if softmax_layout not in ("", "TND"):
        raise ValueError(f"{name}: softmax_layout is {softmax_layout!r}; expected '' or 'TND'")
    share = (keep_prob, scale, scale, seed, offset)
    return _attention(name, query, key, value, head_num, input_layout, pse, band(name, sparse_mode, atten_mask, pre_tockens, next_tockens), share, actual_seq_qlen, actual_seq_kvlen)


def npu_fusion_attention_v2(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *, pse: Tensor | None = None, padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None, query_rope: Tensor | None = None, key_rope: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tokens: int = EVERYWHERE, next_tokens: int = EVERYWHERE, inner_precise: int = 0, prefix: list | None = None,
    actual_seq_qlen: list | None = None, actual_seq_kvlen: list | None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, pse_type: int = 1, q_start_idx: list | None = None, kv_start_idx: list | None = None, softmax_layout: str = "",
    sink: Tensor | None = None, dropout_mask: Tensor | None = None, seed: int = 0, offset: int = 0,
) -> Results:  # fmt: skip
    """``npu_fusion_attention`` with named arguments and ``pse_type``: the bias joins before (1) or after (0) the scaling."""
    name = "npu_fusion_attention_v2"
    refuse(name, "torch_npu itself does not use it", padding_mask=padding_mask)
    refuse(name, "concatenate it to query and key: torch.cat([query, query_rope], -1)", query_rope=query_rope, key_rope=key_rope)
    refuse(name, "prefixes, sinks and masks of dropout made outside are not emulated", prefix=prefix, sink=sink, dropout_mask=dropout_mask)
    refuse(name, "a bias that the kernel makes itself (ALiBi) is not emulated; pass it as pse", pse_type=None if pse_type in (0, 1) else pse_type,
           q_start_idx=q_start_idx, kv_start_idx=kv_start_idx)  # fmt: skip
    if softmax_layout not in ("", "TND"):
        raise ValueError(f"{name}: softmax_layout is {softmax_layout!r}; expected '' or 'TND'")
    share = (keep_prob, scale, scale if pse_type else 1.0, seed, offset)
    return _attention(name, query, key, value, head_num, input_layout, pse, band(name, sparse_mode, atten_mask, pre_tokens, next_tokens), share, actual_seq_qlen, actual_seq_kvlen)


def _attention(
    name: str, query: Tensor, key: Tensor, value: Tensor, heads: int, layout: str, pse: Tensor | None, seen: tuple, numbers: tuple,
    q_ends: list | None, kv_ends: list | None,
) -> Results:  # fmt: skip
    (mask, left, right, from_the_end), (share, scale, pse_scale, seed, offset) = seen, numbers
    if layout == "TND":
        refuse(name, "a bias over packed sequences is not emulated", pse=pse)
        q_ends, kv_ends = _check_ends(name, query, q_ends, "actual_seq_qlen"), _check_ends(name, key, kv_ends, "actual_seq_kvlen")
        _check(name, *(t.transpose(0, 1)[None] for t in (query, key, value)), heads)
        _check_packed(name, q_ends, kv_ends, mask)
        count = sum(heads * (q.stop - q.start) * (k.stop - k.start) for q, k in spans(q_ends, kv_ends))
        drawn, *state = _draw(query, count, share, seed, offset)
        out, top, total = packed(query, key, value, mask, drawn, q_ends, kv_ends, share, scale, left, right, from_the_end)
        return out, top, total, query.new_empty(0), *state
    refuse(name, f'they belong to input_layout="TND", and this is {layout!r}; use atten_mask for padding', actual_seq_qlen=q_ends, actual_seq_kvlen=kv_ends)
    if layout not in ORDERS:
        raise ValueError(f"{name}: input_layout is {layout!r}; expected one of {', '.join(ORDERS)}, TND")
    q = heads_apart(query, layout, heads)
    groups = heads if layout in ("BNSD", "BSND") else key.shape[-1] // q.shape[-1]
    k, v = heads_apart(key, layout, groups), heads_apart(value, layout, groups)
    _check(name, q, k, v, heads)
    shift = k.shape[2] - q.shape[2] if from_the_end else 0
    drawn, *state = _draw(q, q.shape[:-1].numel() * k.shape[2], share, seed, offset)
    out, top, total = flash(q, k, v, pse, mask, drawn, ORDERS[layout], share, scale, pse_scale, left - shift, right + shift)
    out = out.permute(ORDERS[layout])
    return out.flatten(-2) if layout in ("BSH", "SBH") else out, top, total, query.new_empty(0), *state


def _draw(q: Tensor, count: int, share: float, seed: int, offset: int) -> tuple[Tensor | None, int, int, int]:
    """(what seeds the dropout, the generator's seed and offset before it, how many numbers are drawn)."""
    if share >= 1:
        return None, seed, offset, 0
    if q.device.type == "npu":
        generator = runtime.devices[q.device.index].generator
        seed, offset = generator.initial_seed(), generator.get_offset()
    return draw_seed(q, count), seed, offset, count


# -- wrong arguments ----------------------------------------------------------------------------------


def _check(name: str, q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
    fits = q.shape[1] == heads and k.shape[1] == v.shape[1] and heads % k.shape[1] == 0
    if not fits or k.shape[2] != v.shape[2] or q.shape[-1] != k.shape[-1] or not q.shape[0] == k.shape[0] == v.shape[0]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"{name}: head_num={heads} and query, key, value of (B, N, S, D) {shapes} do not fit together")


def _check_ends(name: str, t: Tensor, ends: Any, argument: str) -> list[int]:
    """Where sequences end, as a list; zeros at its end (sequences left out) are dropped."""
    if ends is None or t.dim() != 3:
        raise ValueError(f'{name}(input_layout="TND") wants (T, N, D) tensors and {argument}, the running sum of the lengths; got a tensor of shape {tuple(t.shape)} and {argument}={ends}')
    ends = [int(e) for e in ends]
    while ends and ends[-1] == 0:
        ends.pop()
    if any(a > b for a, b in zip([0, *ends], ends)) or (ends and ends[-1] > t.shape[0]):
        raise ValueError(f"{name}: {argument}={ends} is no running sum of lengths within {t.shape[0]} tokens")
    return ends


def _check_packed(name: str, q_ends: list[int], kv_ends: list[int], mask: Tensor | None) -> None:
    if len(q_ends) != len(kv_ends):
        raise ValueError(f"{name}: {len(q_ends)} sequences of queries and {len(kv_ends)} of keys")
    longest = tuple(max((b - a for a, b in zip([0, *ends], ends)), default=0) for ends in (q_ends, kv_ends))
    if mask is not None and (mask.dim() != 2 or any(a < b for a, b in zip(mask.shape, longest))):
        raise ValueError(f"{name}: atten_mask over packed sequences is (longest query, longest key), here {longest}; got {tuple(mask.shape)}")
