"""Attention of inference against the textbook formula, sequence by sequence: layouts, lengths, pages, latent heads, cost."""

import pytest
import torch

from course_lib import npu
from course_lib.npu import torch_npu
from course_lib.npu.work import ATTENTION

B, H, G, T, S, K, W, R, BLOCK = 3, 4, 2, 5, 12, 8, 6, 4, 4
FAR = 2**31 - 1
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
T_OF, S_OF = [5, 2, 4], [12, 7, 9]
WHOLE = lambda t, s: torch.zeros(t, s, dtype=torch.bool)  # noqa: E731
LOWER = lambda t, s: torch.ones(t, s, dtype=torch.bool).triu(1 + s - t)  # noqa: E731


def textbook(q, k, v, lengths=None, kv_lengths=None, hides=WHOLE, scale=0.3, pse=None):
    """(out, lse) of (B, H, T, K) in float64, zero behind the lengths."""
    q, k, v = (t.double() for t in (q, k, v))
    out, lse = q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full((*q.shape[:3], 1), float("-inf"))
    for b in range(q.shape[0]):
        t, s = (lengths or [q.shape[2]] * B)[b], (kv_lengths or [k.shape[2]] * B)[b]
        keys, values = (x[b, :, :s].repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (k, v))
        scores = q[b, :, :t] @ keys.mT * scale + (0 if pse is None else pse.double()[b, :, :t, :s])
        scores = scores.masked_fill(hides(t, s), float("-inf"))
        out[b, :, :t], lse[b, :, :t, 0] = torch.nan_to_num(scores.softmax(-1)) @ values, scores.logsumexp(-1)
    return out, lse


def inputs(t=T, dtype=torch.float32, groups=G):
    return [torch.randn(s).to(dtype) for s in ((B, H, t, K), (B, groups, S, K), (B, groups, S, W))]


def to_layout(t, layout):
    t = t if layout == "BNSD" else t.transpose(1, 2)
    return (t.flatten(-2) if layout == "BSH" else t).contiguous()


def close(got, want, tolerance=2e-6):
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=tolerance)


def on(device, arguments):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND"])
def test_prompt_in_every_layout(layout, device):
    tensors = inputs()
    given, result = layout.split("_")[0], layout.split("_")[-1]
    got = torch_npu.npu_prompt_flash_attention(*[to_layout(t, given).to(device) for t in tensors], num_heads=H, num_key_value_heads=G, scale_value=0.3,
                                               input_layout=layout, actual_seq_lengths=T_OF, actual_seq_lengths_kv=S_OF)  # fmt: skip
    assert got.is_contiguous()
    close(got, to_layout(textbook(*tensors, T_OF, S_OF)[0], result))


DENSE = torch.rand(B, T, S, generator=torch.Generator().manual_seed(2)) < 0.3
MODES = {
    "no mask, no band": (dict(pre_tokens=1, next_tokens=0), WHOLE),
    "mask of all": (dict(atten_mask=DENSE[0], next_tokens=FAR), lambda t, s: DENSE[0, :t, :s]),
    "mask and band": (dict(atten_mask=torch.zeros(T, S, dtype=torch.bool), pre_tokens=2), lambda t, s: ~torch.ones(t, s, dtype=torch.bool).tril().triu(-2)),
    "upper left": (dict(atten_mask=CAUSAL, sparse_mode=2), lambda t, s: torch.ones(t, s, dtype=torch.bool).triu(1)),
    "lower right": (dict(atten_mask=CAUSAL, sparse_mode=3), LOWER),
    "band": (dict(atten_mask=CAUSAL, sparse_mode=4, pre_tokens=3, next_tokens=1), lambda t, s: ~torch.ones(t, s, dtype=torch.bool).tril(1 + s - t).triu(s - t - 3)),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["npu_prompt_flash_attention", "npu_fused_infer_attention_score"])
def test_sparse_modes(mode, name):
    arguments, hides = MODES[mode]
    arguments = on("npu", {"next_tokens": 0} | arguments)
    tensors, common = inputs(), dict(num_heads=H, num_key_value_heads=G, input_layout="BNSD", actual_seq_lengths=T_OF, actual_seq_lengths_kv=S_OF)
    scale = {"scale" if "fused" in name else "scale_value": 0.3}
    got = getattr(torch_npu, name)(*[t.to("npu") for t in tensors], **common, **scale, **arguments)
    close(got[0] if isinstance(got, tuple) else got, textbook(*tensors, T_OF, S_OF, hides)[0])


@pytest.mark.parametrize("shape", [(B, T, S), (B, 1, T, S), (B, 1, T, S + 4)])
def test_a_mask_of_each_sequence(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., :S] = DENSE if len(shape) == 3 else DENSE[:, None]
    tensors, at = inputs(), iter(range(B))
    want = textbook(*tensors, hides=lambda t, s: DENSE[next(at), :t, :s])[0]
    got = torch_npu.npu_prompt_flash_attention(*[t.to("npu") for t in tensors], num_heads=H, num_key_value_heads=G, scale_value=0.3, input_layout="BNSD",
                                               atten_mask=mask.to("npu"), next_tokens=FAR)  # fmt: skip
    close(got, want)


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
@pytest.mark.parametrize("mask", [None, (B, S), (B, 1, S), (B, 1, 1, S)])
def test_one_token_at_a_time(layout, mask):
    tensors, arguments = inputs(t=1), {}
    hidden = DENSE[:, 0]
    at = iter(range(B))
    hides = WHOLE if mask is None else lambda t, s: hidden[next(at), None, :s]
    if mask:
        arguments["atten_mask"] = hidden.view(mask).to("npu")
    got = torch_npu.npu_incre_flash_attention(*[to_layout(t, layout).to("npu") for t in tensors], num_heads=H, num_key_value_heads=G, scale_value=0.3,
                                              input_layout=layout, actual_seq_lengths=S_OF, **arguments)  # fmt: skip
    close(got, to_layout(textbook(*tensors, kv_lengths=S_OF, hides=hides)[0], layout))


def test_a_bias_and_lengths_given_once():
    tensors, pse = inputs(), torch.randn(B, H, T, S)
    got = torch_npu.npu_prompt_flash_attention(*[t.to("npu") for t in tensors], num_heads=H, num_key_value_heads=G, scale_value=0.3, input_layout="BNSD",
                                               pse_shift=pse.to("npu"), actual_seq_lengths_kv=torch.tensor([9]))  # fmt: skip
    close(got, textbook(*tensors, kv_lengths=[9] * B, pse=pse)[0])


def paged(cache, flat):
    """(pages, table) of a cache (B, G, S, K), the pages in disorder."""
    pages = cache.unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(0, 1)  # (B·S/BLOCK, G, BLOCK, K)
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(1))
    table = order.argsort().view(B, -1).int()
    pages = pages[order]
    return (pages.transpose(1, 2).flatten(-2) if flat else pages).contiguous(), table


@pytest.mark.parametrize("flat", [True, False])
def test_pages(flat):
    q, k, v = inputs(t=1)
    (pages_k, table), (pages_v, _) = paged(k, flat), paged(v, flat)
    want = textbook(q, k, v, kv_lengths=S_OF)[0]
    common = dict(num_heads=H, num_key_value_heads=G, input_layout="BNSD", block_table=table.to("npu"), block_size=BLOCK)
    tensors = [t.to("npu") for t in (q, pages_k, pages_v)]
    close(torch_npu.npu_incre_flash_attention(*tensors, scale_value=0.3, actual_seq_lengths=S_OF, **common), want)
    close(torch_npu.npu_fused_infer_attention_score(*tensors, scale=0.3, actual_seq_lengths_kv=S_OF, **common)[0], want)


@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH"])
def test_log_of_the_sum(layout):
    tensors = inputs()
    got, lse = torch_npu.npu_fused_infer_attention_score(*[to_layout(t, layout).to("npu") for t in tensors], num_heads=H, num_key_value_heads=G, scale=0.3,
                                                         input_layout=layout, softmax_lse_flag=True, actual_seq_lengths=T_OF)  # fmt: skip
    want, logs = textbook(*tensors, lengths=T_OF)
    close(got, to_layout(want, layout))
    close(lse, logs)
    assert torch_npu.npu_fused_infer_attention_score(*tensors, num_heads=H, num_key_value_heads=G, input_layout="BNSD")[1].tolist() == [0.0]


def pack(t, lengths):
    return torch.cat([t[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])


@pytest.mark.parametrize("with_pages", [False, True])
def test_packed_sequences(with_pages):
    q, k, v = inputs()
    ends = [torch.tensor(n).cumsum(0).tolist() for n in (T_OF, S_OF)]
    if with_pages:
        (keys, table), (values, _) = paged(k, False), paged(v, False)
        arguments = dict(actual_seq_lengths_kv=S_OF, block_table=table.to("npu"), block_size=BLOCK)
    else:
        keys, values, arguments = pack(k, S_OF), pack(v, S_OF), dict(actual_seq_lengths_kv=ends[1])
    got, lse = torch_npu.npu_fused_infer_attention_score(
        *[t.to("npu") for t in (pack(q, T_OF), keys, values)], num_heads=H, num_key_value_heads=G, scale=0.3, input_layout="TND",
        actual_seq_lengths=ends[0], sparse_mode=3, atten_mask=CAUSAL.to("npu"), softmax_lse_flag=True, **arguments,
    )  # fmt: skip
    want, logs = textbook(q, k, v, T_OF, S_OF, LOWER)
    assert got.is_contiguous()
    close(got, pack(want, T_OF))
    close(lse, pack(logs, T_OF))


def test_latent_attention_reads_its_cache_once():
    q, latent, q_rope, k_rope = (torch.randn(s) for s in ((B, H, 1, K), (B, 1, S, K), (B, H, 1, R), (B, 1, S, R)))
    want = textbook(torch.cat([q, q_rope], -1), torch.cat([latent, k_rope], -1), latent)[0]
    q, latent, q_rope, k_rope = (t.to("npu") for t in (q, latent, q_rope, k_rope))
    with npu.ledger() as ledger:
        got = torch_npu.npu_fused_infer_attention_score(q, latent, latent, query_rope=q_rope, key_rope=k_rope, num_heads=H, num_key_value_heads=1, scale=0.3, input_layout="BNSD")[0]
        torch_npu.npu_fused_infer_attention_score(q, latent, latent.clone(), query_rope=q_rope, key_rope=k_rope, num_heads=H, num_key_value_heads=1, scale=0.3, input_layout="BNSD")
    close(got, want)
    once, _, twice = ledger.records
    assert once.cost.bytes == sum(t.nbytes for t in (q, latent, q_rope, k_rope, got))
    assert twice.cost.bytes == once.cost.bytes + latent.nbytes
    assert once.cost.cube_flops == 2 * B * H * S * (K + R + K)


def test_bfloat16():
    tensors = inputs(dtype=torch.bfloat16)
    got = torch_npu.npu_prompt_flash_attention(*[t.to("npu") for t in tensors], num_heads=H, num_key_value_heads=G, scale_value=0.3, input_layout="BNSD")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.cpu().double(), textbook(*tensors)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["lower right", "no mask, no band", "band"])
def test_prefill_by_hand(mode):
    arguments, hides = MODES[mode]
    q, k, v = (t.to("npu") for t in inputs())
    with npu.ledger() as ledger:
        torch_npu.npu_prompt_flash_attention(q, k, v, num_heads=H, num_key_value_heads=G, input_layout="BNSD", actual_seq_lengths=T_OF, actual_seq_lengths_kv=S_OF, **on("npu", arguments))
    (record,) = [r for r in ledger.records if r.op == "npu_prompt_flash_attention"]
    seen = [~hides(t, s) for t, s in zip(T_OF, S_OF)]
    pairs, keys = sum(int(m.sum()) for m in seen), sum(int(m.any(0).sum()) for m in seen)
    assert record.cost.cube_flops == 2 * H * pairs * (K + W)
    assert record.cost.vector_flops == ATTENTION * H * pairs
    assert record.cost.bytes == 4 * (sum(T_OF) * H * (K + W) + keys * G * (K + W))


def test_decode_reads_the_tokens_that_are_there_once():
    q, k, v = inputs(t=1)
    (pages_k, table), (pages_v, _) = paged(k, True), paged(v, True)
    tensors = [t.to("npu") for t in (q, pages_k, pages_v)]
    with npu.ledger() as ledger:
        torch_npu.npu_incre_flash_attention(*tensors, num_heads=H, num_key_value_heads=G, input_layout="BNSD", block_table=table.to("npu"), block_size=BLOCK, actual_seq_lengths=S_OF)
    (record,) = [r for r in ledger.records if r.op == "npu_incre_flash_attention"]
    blocks = sum(-(-s // BLOCK) for s in S_OF)
    assert record.cost.bytes == 4 * (B * H * (K + W) + sum(S_OF) * G * (K + W) + blocks)
    assert record.cost.cube_flops == 2 * H * sum(S_OF) * (K + W)


def test_grouped_heads_decode_faster_than_the_cube_could_alone():
    """The query heads of a group share a tile of the cube: eight heads cost what one costs."""
    npu.use("ascend-910b2")
    times = []
    for heads in (1, 8):
        q, kv = torch.zeros(1, heads, 1, 128, device="npu", dtype=torch.float16), torch.zeros(1, 1, 4096, 128, device="npu", dtype=torch.float16)
        with npu.ledger() as ledger:
            torch_npu.npu_incre_flash_attention(q, kv, kv, num_heads=heads, num_key_value_heads=1, input_layout="BNSD")
        times.append(ledger.records[-1].cost.cube_ps)
    assert times[0] == times[1]


def test_shapes_follow_without_numbers():
    q, k, v = (t.to("meta") for t in inputs())
    out, lse = torch_npu.npu_fused_infer_attention_score(q, k, v, num_heads=H, num_key_value_heads=G, input_layout="BNSD_BSND", softmax_lse_flag=True)
    assert out.shape == (B, T, H, W) and lse.shape == (B, H, T, 1)


def test_no_gradient():
    q, k, v = (t.to("npu").requires_grad_() for t in inputs())
    out = torch_npu.npu_prompt_flash_attention(q, k, v, num_heads=H, num_key_value_heads=G, input_layout="BNSD")
    with pytest.raises(NotImplementedError, match="npu_prompt_flash_attention is not differentiable"):
        out.sum().backward()


PFA, IFA, FIA = "npu_prompt_flash_attention", "npu_incre_flash_attention", "npu_fused_infer_attention_score"
TABLE = torch.zeros(B, 3, dtype=torch.int32)
WRONG = {
    "layout": (PFA, ValueError, "TND", dict(input_layout="TND")),
    "other layout": (FIA, NotImplementedError, "NTD", dict(input_layout="NTD")),
    "heads": (PFA, ValueError, "do not fit", dict(num_heads=3)),
    "many queries": (IFA, ValueError, "5 queries a sequence", {}),
    "scales": (FIA, NotImplementedError, "key_antiquant_scale=", dict(key_antiquant_scale=torch.ones(1))),
    "scales of int8": (PFA, NotImplementedError, "deq_scale1=", dict(deq_scale1=torch.ones(1))),
    "prefix": (FIA, NotImplementedError, "key_shared_prefix=", dict(key_shared_prefix=torch.ones(1))),
    "left padding": (FIA, NotImplementedError, "kv_padding_size=", dict(kv_padding_size=torch.ones(1))),
    "half a rope": (FIA, ValueError, "belong together", dict(query_rope=torch.ones(1))),
    "too long": (PFA, ValueError, "room for 5 tokens", dict(actual_seq_lengths=[6])),
    "too few lengths": (PFA, ValueError, "for 3 sequences", dict(actual_seq_lengths=[5, 5])),
    "no length": (FIA, ValueError, "wants the length", dict(block_table=TABLE, block_size=BLOCK)),
    "block size": (FIA, ValueError, "block_size=0", dict(block_table=TABLE, actual_seq_lengths_kv=[2])),
    "mask": (PFA, ValueError, r"\(2, 2\)", dict(atten_mask=torch.zeros(2, 2))),
    "compressed mask": (PFA, ValueError, "2048, 2048", dict(sparse_mode=3)),
    "bias": (PFA, ValueError, "pse_shift of shape", dict(pse_shift=torch.zeros(1, 1, T, S))),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    name, error, text, arguments = WRONG[case]
    given = dict(num_heads=H, num_key_value_heads=G, input_layout="BNSD") | on("npu", arguments)
    with pytest.raises(error, match=text):
        getattr(torch_npu, name)(*[t.to("npu") for t in inputs()], **given)


def test_packed_sequences_want_running_sums():
    q, k, v = (t[0].transpose(0, 1).to("npu") for t in inputs())
    for lengths, text in ((None, "wants actual_seq_lengths"), ([4, 1], "running sum")):
        with pytest.raises(ValueError, match=text):
            torch_npu.npu_fused_infer_attention_score(q, k, v, num_heads=H, num_key_value_heads=G, input_layout="TND", actual_seq_lengths=lengths, actual_seq_lengths_kv=[6, 12])


def test_a_cache_of_int8_is_refused():
    q, k, v = (t.to("npu") for t in inputs(t=1))
    with pytest.raises(NotImplementedError, match="int8.*quantised caches"):
        torch_npu.npu_incre_flash_attention(q, k.char(), v.char(), num_heads=H, num_key_value_heads=G, input_layout="BNSD")
