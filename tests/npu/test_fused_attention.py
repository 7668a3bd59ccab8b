"""Flash attention against the textbook formula in float64: layouts, masks, groups, dropout, memory, FLOPs."""

import pytest
import torch
import torch.nn.functional as F

from course_lib import npu
from course_lib.npu import torch_npu
from course_lib.npu.fused_attention import visible_pairs
from course_lib.npu.work import ATTENTION

B, H, G, T, S, K, W = 2, 4, 2, 10, 13, 8, 6
FAR = 2**31 - 1
COMPRESSED = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def textbook(q, k, v, hidden=None, scale=K**-0.5, pse=None):
    """softmax(q·kᵀ·scale + pse)·v of (B, H, T, K); ``hidden`` is True where a key is not seen."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * scale
    scores = scores if pse is None else scores + pse
    p = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
    return torch.nan_to_num(p.softmax(-1)) @ v


def inputs(heads=G, width=W, T=T, S=S, dtype=torch.float32):
    return [torch.randn(s).to(dtype) for s in ((B, H, T, K), (B, heads, S, K), (B, heads, S, width))]


def check(fused, reference, tensors, device="npu", tolerance=2e-6):
    """Values, and gradients for a fixed gradient of the result."""
    mine, oracle = [t.to(device).requires_grad_() for t in tensors], [t.double().requires_grad_() for t in tensors]
    got, want = fused(*mine), reference(*oracle)
    pull = torch.randn(want.shape)
    grads, expected = torch.autograd.grad(got, mine, pull.to(got)), torch.autograd.grad(want, oracle, pull.double())
    for g, w in zip([got.detach(), *grads], [want.detach(), *expected], strict=True):
        torch.testing.assert_close(g.cpu().double(), w, rtol=1e-5, atol=tolerance)


def hidden(left, right, T=T, S=S):
    i, j = torch.arange(T)[:, None], torch.arange(S)
    return (j > i + right) | (j < i - left)


def to_layout(t, layout):
    if layout in ("BSND", "BSH"):
        t = t.transpose(1, 2)
    if layout == "SBH":
        t = t.permute(2, 0, 1, 3)
    return (t.flatten(-2) if layout in ("BSH", "SBH") else t).contiguous()


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH"])
def test_layouts_with_grouped_heads_and_another_width(layout, device):
    def fused(q, k, v):
        out = torch_npu.npu_fusion_attention(*[to_layout(t, layout) for t in (q, k, v)], H, layout, scale=K**-0.5)[0]
        assert out.is_contiguous()
        return out

    check(fused, lambda *a: to_layout(textbook(*a), layout), inputs(), device)


DENSE = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(5)) < 0.4
DENSE[0, 0, 3] = True  # a query that sees nothing
MODES = {
    "mask": (dict(atten_mask=DENSE), DENSE),
    "mask of bytes": (dict(atten_mask=DENSE.byte()), DENSE),
    "mask and band": (dict(atten_mask=DENSE, pre_tockens=4, next_tockens=2), DENSE | hidden(4, 2)),
    "no mask, no band": (dict(pre_tockens=4, next_tockens=2), None),
    "all mask": (dict(atten_mask=DENSE, sparse_mode=1), DENSE),
    "causal upper left": (dict(atten_mask=COMPRESSED, sparse_mode=2, pre_tockens=3), hidden(FAR, 0)),
    "causal lower right": (dict(atten_mask=COMPRESSED, sparse_mode=3), hidden(FAR, S - T)),
    "band": (dict(atten_mask=COMPRESSED, sparse_mode=4, pre_tockens=5, next_tockens=1), hidden(5 - (S - T), 1 + S - T)),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_sparse_modes(mode):
    arguments, mask = MODES[mode]
    on_device = {k: v.to("npu") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    check(lambda *a: torch_npu.npu_fusion_attention(*a, H, "BNSD", scale=0.3, **on_device)[0], lambda *a: textbook(*a, mask, scale=0.3), inputs())


@pytest.mark.parametrize("pse_type", [1, 0])
def test_position_bias_joins_before_or_after_the_scaling(pse_type):
    pse = torch.randn(1, H, T, S)
    bias = pse.double() * (0.3 if pse_type else 1.0)
    calls = [lambda *a: torch_npu.npu_fusion_attention_v2(*a, H, "BNSD", scale=0.3, pse=pse.to("npu"), pse_type=pse_type)[0]]
    if pse_type:
        calls += [lambda *a: torch_npu.npu_fusion_attention(*a, H, "BNSD", scale=0.3, pse=pse.to("npu"))[0]]
    for call in calls:
        check(call, lambda *a: textbook(*a, scale=0.3, pse=bias), inputs())


def test_blocks_of_rows_are_seamless(monkeypatch):
    monkeypatch.setattr("course_lib.npu.fused_attention.BLOCK", B * H * S * 3)
    mask = COMPRESSED.to("npu")
    check(lambda *a: torch_npu.npu_fusion_attention(*a, H, "BNSD", scale=0.3, atten_mask=mask, sparse_mode=4, pre_tockens=4, next_tockens=0)[0],
          lambda *a: textbook(*a, hidden(4 - S + T, S - T), scale=0.3), inputs())  # fmt: skip


def test_all_seven_results():
    q, k, v = inputs()
    out, top, total, empty, seed, offset, drawn = torch_npu.npu_fusion_attention(*[t.to("npu") for t in (q, k, v)], H, "BNSD", scale=0.5)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.5
    m = scores.amax(-1, keepdim=True)
    torch.testing.assert_close(top.cpu().double(), m.expand(B, H, T, 8), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.cpu().double(), (scores - m).exp().sum(-1, keepdim=True).expand(B, H, T, 8), rtol=1e-5, atol=1e-6)
    assert empty.numel() == 0 and (seed, offset, drawn) == (0, 0, 0)


# -- dropout ---------------------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_its_gradient_knows_what_was_dropped():
    q, k, v = (t.to("npu").requires_grad_() for t in inputs(heads=H, width=K, S=T))
    v.data.fill_(1.0)
    torch.manual_seed(7)
    out, *_, seed, offset, drawn = torch_npu.npu_fusion_attention(q, k, v, H, "BNSD", scale=0.0, keep_prob=0.75)
    assert (seed, offset, drawn) == (7, 0, B * H * T * T)
    share = out.detach().cpu()[..., :1]  # (kept keys)/T/0.75 of each query
    assert abs(share.mean() - 1) < 0.1 and share.std() > 0.05
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(grad.cpu().sum(), out.detach().cpu().sum())  # linear in v


def test_dropout_repeats_and_moves_on():
    tensors = [t.to("npu") for t in inputs()]

    def call():
        return torch_npu.npu_fusion_attention(*tensors, H, "BNSD", keep_prob=0.5)[0].cpu()

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(first, call()) and not torch.equal(first, second)


def test_dropout_is_that_of_the_cpu():
    tensors = inputs(heads=H, width=K)
    torch.manual_seed(11)
    expected = F.scaled_dot_product_attention(*tensors, dropout_p=0.3)
    torch.manual_seed(11)
    torch.testing.assert_close(F.scaled_dot_product_attention(*[t.to("npu") for t in tensors], dropout_p=0.3).cpu(), expected)


# -- F.scaled_dot_product_attention ----------------------------------------------------------------------

FLASH, FUSED, UNFUSED = "_scaled_dot_product_flash_attention_for_cpu", "npu_fusion_attention", "bmm"
q4, kv4 = (B, H, T, K), (B, H, S, K)
FUNCTIONAL = {
    # shapes of q, k, v; arguments; the operator that does it
    "plain": ((q4, kv4, kv4), {}, FLASH),
    "causal": ((q4, q4, q4), dict(is_causal=True), FLASH),
    "groups": ((q4, (B, G, S, K), (B, G, S, K)), dict(enable_gqa=True), FLASH),
    "float mask": ((q4, kv4, kv4), dict(attn_mask=torch.randn(T, S)), FLASH),
    "bool mask": ((q4, kv4, kv4), dict(attn_mask=~DENSE), FLASH),
    "three dimensions": ((q4[1:], kv4[1:], kv4[1:]), dict(is_causal=True), FUSED),
    "five dimensions": (((3, *q4), (3, *kv4), (3, *kv4)), dict(attn_mask=~DENSE), FUSED),
    "another width": ((q4, kv4, (B, H, S, W)), dict(is_causal=True), FUSED),
    "groups of another width": ((q4, (B, G, S, K), (B, G, S, W)), dict(enable_gqa=True, scale=0.7), FUSED),
    "mask of three dimensions": ((q4, kv4, kv4), dict(attn_mask=torch.randn(H, T, S)), FUSED),
    "broadcast heads": ((q4, (B, 1, S, K), (B, 1, S, K)), {}, UNFUSED),
    "broadcast batch": ((q4, (1, *kv4[1:]), (1, *kv4[1:])), {}, UNFUSED),
    "two dimensions": (((T, K), (S, K), (S, K)), {}, "mm"),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_attention(name):
    shapes, arguments, operator = FUNCTIONAL[name]
    tensors = [torch.randn(s) for s in shapes]
    on_device = {k: v.to("npu") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    in_double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    with npu.ledger() as ledger:
        check(lambda *a: F.scaled_dot_product_attention(*a, **on_device), lambda *a: F.scaled_dot_product_attention(*a, **in_double), tensors)
    assert operator in [r.op for r in ledger.records]
    fused = [r.op for r in ledger.records if "attention" in r.op]
    assert len(fused) == (0 if operator in (UNFUSED, "mm") else 2)


def test_a_mask_that_learns_takes_the_unfused_path():
    q, k, v = inputs(heads=H, width=K)
    check(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), [q, k, v, torch.randn(T, S)])


def test_any_strides():
    tensors = [t.mT.contiguous().mT for t in inputs(heads=H, width=K)]
    tensors = [t.to("npu") for t in tensors]
    assert tensors[0].stride(-1) != 1
    torch.testing.assert_close(F.scaled_dot_product_attention(*tensors).cpu(), F.scaled_dot_product_attention(*[t.cpu().contiguous() for t in tensors]))


def test_what_pytorch_refuses_is_refused():
    q, k, v = (t.to("npu") for t in inputs(heads=H, width=K))
    with pytest.raises(RuntimeError, match="is_causal"):
        F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(T, S, device="npu"), is_causal=True)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, k[:, :2], v[:, :2])


# -- memory and FLOPs ------------------------------------------------------------------------------------


def peak(T, heads, kind):
    """Bytes that attention forward and backward over T tokens takes at most."""
    mask, before = COMPRESSED.to("npu"), torch.npu.memory_allocated()
    q, k, v = (torch.zeros(1, h, T, 64, device="npu", dtype=torch.float16).requires_grad_() for h in (4, heads, heads))
    with npu.ledger() as ledger:
        if kind == "npu_fusion_attention":
            out = torch_npu.npu_fusion_attention(q, k, v, 4, "BNSD", scale=0.125, atten_mask=mask, sparse_mode=3)[0]
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, dropout_p=0.1 if kind == "dropout" else 0.0)
        out.backward(torch.ones_like(out))
    return ledger.peak_memory() - before


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("kind", ["npu_fusion_attention", "functional", "dropout"])
def test_memory_is_linear_in_T(kind, heads):
    npu.use("ascend-910b2")
    assert peak(1024, heads, kind) == 4 * peak(256, heads, kind)


def test_shapes_follow_without_numbers():
    q, k, v = (t.to("meta").requires_grad_() for t in inputs())
    out, top, *_ = torch_npu.npu_fusion_attention(q, k, v, H, "BNSD", keep_prob=0.9)
    out.sum().backward()
    assert out.shape == (B, H, T, W) and top.shape == (B, H, T, 8) and v.grad.shape == v.shape


PAIRS = {"none": (T * S, {}), "upper": (T * (T + 1) // 2, dict(sparse_mode=2)), "lower": (T * (T + 1) // 2 + T * (S - T), dict(sparse_mode=3)),
         "band": (sum(min(S, i + S - T + 1) - max(0, i + S - T - 5) for i in range(T)), dict(sparse_mode=4, pre_tockens=5, next_tockens=0))}  # fmt: skip


@pytest.mark.parametrize("mode", PAIRS)
def test_flops_and_bytes_by_hand(mode):
    pairs, arguments = PAIRS[mode]
    q, k, v = (t.to("npu").requires_grad_() for t in inputs())
    mask = COMPRESSED.to("npu") if arguments else None
    with npu.ledger() as ledger:
        out = torch_npu.npu_fusion_attention(q, k, v, H, "BNSD", atten_mask=mask, **arguments)[0]
        out.backward(torch.ones_like(out))
    forward, _, backward = ledger.records
    assert (forward.op, backward.op) == ("npu_fusion_attention", "npu_fusion_attention_grad")
    assert forward.cost.cube_flops + backward.cost.cube_flops == 2 * B * H * pairs * (4 * K + 3 * W)
    assert forward.cost.cube_flops == 2 * B * H * pairs * (K + W)
    assert forward.cost.vector_flops == backward.cost.vector_flops == ATTENTION * B * H * pairs
    sums = 2 * B * H * T * 8 * 4
    rows, result = q.nbytes + k.nbytes + v.nbytes, out.nbytes
    assert forward.cost.bytes == rows + result + sums
    assert backward.cost.bytes == 2 * rows + 2 * result + sums


@pytest.mark.parametrize("T, S, left, right", [(5, 5, FAR, 0), (5, 9, 2, 1), (9, 4, FAR, -5), (4, 4, -1, 2), (1, 1, 0, 0), (6, 3, FAR, -9), (7, 7, FAR, FAR)])
def test_pairs_are_counted(T, S, left, right):
    assert visible_pairs(T, S, left, right) == int((~hidden(left, right, T, S)).sum())


REFUSED = {
    "prefix": (NotImplementedError, "prefix=", dict(prefix=[1])),
    "sequences": (NotImplementedError, "actual_seq_qlen=.*TND", dict(actual_seq_qlen=[1])),
    "sink": (NotImplementedError, "sink=", dict(sink=torch.zeros(1))),
    "prefix mode": (NotImplementedError, "sparse_mode=5", dict(sparse_mode=5)),
    "no mask": (ValueError, r"2048, 2048", dict(sparse_mode=2)),
    "layout": (ValueError, "BHSD", dict(input_layout="BHSD")),
    "softmax layout": (ValueError, "NTD", dict(softmax_layout="NTD")),
    "heads": (ValueError, "do not fit", dict(head_num=3)),
}  # fmt: skip
REFUSED_V2 = {
    "rope": (NotImplementedError, "torch.cat", dict(query_rope=torch.zeros(1))),
    "alibi": (NotImplementedError, "pse_type=2", dict(pse_type=2)),
    "start": (NotImplementedError, "q_start_idx=", dict(q_start_idx=[0])),
    "softmax layout": (ValueError, "NTD", dict(softmax_layout="NTD")),
    "heads": (ValueError, "npu_fusion_attention_v2: .*do not fit", dict(head_num=3)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_V2)
def test_what_the_second_version_lacks_says_why(name):
    error, text, arguments = REFUSED_V2[name]
    with pytest.raises(error, match=text):
        torch_npu.npu_fusion_attention_v2(*[t.to("npu") for t in inputs()], **(dict(head_num=H, input_layout="BNSD") | arguments))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_says_why(name):
    error, text, arguments = REFUSED[name]
    with pytest.raises(error, match=text):
        torch_npu.npu_fusion_attention(*[t.to("npu") for t in inputs()], **(dict(head_num=H, input_layout="BNSD") | arguments))


def test_a_bias_with_a_gradient_is_refused():
    q, k, v = (t.to("npu") for t in inputs())
    pse = torch.zeros(1, H, T, S, device="npu", requires_grad=True)
    with pytest.raises(NotImplementedError, match="pse"):
        torch_npu.npu_fusion_attention(q, k, v, H, "BNSD", pse=pse)[0].sum().backward()
