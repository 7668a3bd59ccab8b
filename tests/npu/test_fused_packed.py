"""Attention over packed sequences: each against the textbook formula on its own, and the cost against a count by hand."""

import pytest
import torch

from course_lib import npu
from course_lib.npu import torch_npu
from course_lib.npu.work import ATTENTION

H, G, K, W = 4, 2, 8, 6
Q, KV = [3, 5, 0, 5], [4, 5, 0, 9]  # lengths; two sequences are empty
FAR = 2**31 - 1
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
DENSE = torch.rand(5, 9, generator=torch.Generator().manual_seed(3)) < 0.3


def ends(lengths):
    return torch.tensor(lengths).cumsum(0).tolist()


def hidden(t, s, left, right):
    i, j = torch.arange(t)[:, None], torch.arange(s)
    return (j > i + right) | (j < i - left)


def textbook(q, k, v, hides, scale):
    """Sequence after sequence, (t, H, K) each."""
    out = []
    for a, b, c in zip(q.split(Q), k.split(KV), v.split(KV)):
        b, c = (t.transpose(0, 1).repeat_interleave(H // G, 0) for t in (b, c))
        scores = (a.transpose(0, 1) @ b.mT * scale).masked_fill(hides(a.shape[0], b.shape[1]), float("-inf"))
        out.append((torch.nan_to_num(scores.softmax(-1)) @ c).transpose(0, 1))
    return torch.cat(out)


MODES = {
    "whole": ({}, lambda t, s: hidden(t, s, FAR, FAR)),
    "mask": (dict(atten_mask=DENSE), lambda t, s: DENSE[:t, :s]),
    "upper left": (dict(atten_mask=CAUSAL, sparse_mode=2), lambda t, s: hidden(t, s, FAR, 0)),
    "lower right": (dict(atten_mask=CAUSAL, sparse_mode=3), lambda t, s: hidden(t, s, FAR, s - t)),
    "band": (dict(atten_mask=CAUSAL, sparse_mode=4, pre_tockens=2, next_tockens=1), lambda t, s: hidden(t, s, 2 - (s - t), 1 + s - t)),
}  # fmt: skip


def inputs(dtype=torch.float32, extra=0):
    return [torch.randn(s).to(dtype) for s in ((sum(Q) + extra, H, K), (sum(KV), G, K), (sum(KV), G, W))]


def attend(*tensors, **arguments):
    arguments = {k: v.to(tensors[0].device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    return torch_npu.npu_fusion_attention(*tensors, H, "TND", scale=0.3, actual_seq_qlen=ends(Q), actual_seq_kvlen=ends(KV), **arguments)


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("mode", MODES)
def test_each_sequence_by_itself(mode, device):
    arguments, hides = MODES[mode]
    tensors = inputs()
    mine, oracle = [t.to(device).requires_grad_() for t in tensors], [t.double().requires_grad_() for t in tensors]
    got, want = attend(*mine, **arguments)[0], textbook(*oracle, hides, 0.3)
    pull = torch.randn(want.shape)
    grads, expected = torch.autograd.grad(got, mine, pull.to(device)), torch.autograd.grad(want, oracle, pull.double())
    for g, w in zip([got, *grads], [want, *expected], strict=True):
        torch.testing.assert_close(g.detach().cpu().double(), w.detach(), rtol=1e-5, atol=2e-6)


def test_in_bfloat16():
    tensors = inputs(torch.bfloat16)
    want = textbook(*[t.double() for t in tensors], MODES["lower right"][1], 0.3)
    got = attend(*[t.to("npu") for t in tensors], **MODES["lower right"][0])[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-2, atol=1e-2)


def test_sequences_left_out_are_zero():
    q, k, v = (t.to("npu").requires_grad_() for t in inputs(extra=2))
    out, top, total, *_ = torch_npu.npu_fusion_attention_v2(q, k, v, H, "TND", actual_seq_qlen=[3, 8, 0], actual_seq_kvlen=[4, 9, 0], softmax_layout="TND")
    assert out.shape == (15, H, W) and top.shape == total.shape == (15, H, 8)
    out.sum().backward()
    assert out[8:].abs().sum() == 0 and q.grad[8:].abs().sum() == 0 and v.grad[9:].abs().sum() == 0
    assert out[:8].abs().sum() > 0 and v.grad[:9].abs().sum() > 0


def test_dropout_repeats_and_its_gradient_knows_it():
    q, k, v = (t.to("npu").requires_grad_() for t in inputs())
    outs = []
    for _ in range(2):
        torch.manual_seed(4)
        out, *_, seed, offset, drawn = attend(q, k, v, keep_prob=0.7)
        assert (seed, offset, drawn) == (4, 0, H * sum(a * b for a, b in zip(Q, KV)))
        outs.append(out.detach().cpu())
    assert torch.equal(*outs) and not torch.equal(outs[0], attend(q, k, v)[0].detach().cpu())
    (grad,) = torch.autograd.grad(out, v, torch.ones_like(out))
    torch.testing.assert_close((grad * v).sum().item(), out.sum().item())  # linear in v


@pytest.mark.parametrize("mode", MODES)
def test_flops_and_bytes_by_hand(mode):
    arguments, hides = MODES[mode]
    pairs = sum(int((~(hidden(t, s, FAR, FAR) if mode == "mask" else hides(t, s))).sum()) for t, s in zip(Q, KV))
    q, k, v = (t.to("npu").requires_grad_() for t in inputs())
    arguments = {k: v.to("npu") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with npu.ledger() as ledger:
        out = attend(q, k, v, **arguments)[0]
        out.backward(torch.ones_like(out))
    forward, _, backward = ledger.records
    assert (forward.op, backward.op) == ("npu_fusion_attention_packed", "npu_fusion_attention_packed_grad")
    assert forward.cost.cube_flops == 2 * H * pairs * (K + W)
    assert backward.cost.cube_flops == 2 * H * pairs * (3 * K + 2 * W)
    assert forward.cost.vector_flops == backward.cost.vector_flops == ATTENTION * H * pairs
    sums, rows = 2 * sum(Q) * H * 8 * 4, q.nbytes + k.nbytes + v.nbytes
    mask = DENSE.numel() if mode == "mask" else 0
    assert forward.cost.bytes == rows + out.nbytes + sums + mask
    assert backward.cost.bytes == 2 * rows + 2 * out.nbytes + sums + mask


def test_shapes_follow_without_numbers():
    q, k, v = (t.to("meta").requires_grad_() for t in inputs())
    out, top, *_ = attend(q, k, v)
    out.sum().backward()
    assert out.shape == (sum(Q), H, W) and top.shape == (sum(Q), H, 8) and v.grad.shape == v.shape


WRONG = {
    "no ends": (ValueError, "running sum", dict(actual_seq_qlen=None)),
    "lengths for ends": (ValueError, "no running sum", dict(actual_seq_qlen=[3, 2, 1])),
    "too many tokens": (ValueError, "within 13 tokens", dict(actual_seq_qlen=[3, 99])),
    "other count": (ValueError, "1 sequences of queries and 4 of keys", dict(actual_seq_qlen=[3])),
    "small mask": (ValueError, r"here \(5, 9\)", dict(atten_mask=torch.zeros(5, 5, dtype=torch.bool))),
    "bias": (NotImplementedError, "pse=", dict(pse=torch.zeros(1))),
    "outside": (NotImplementedError, "sparse_mode=7", dict(sparse_mode=7, atten_mask=CAUSAL)),
    "heads": (ValueError, "do not fit", dict(head_num=3)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    error, text, arguments = WRONG[name]
    given = dict(head_num=H, input_layout="TND", actual_seq_qlen=ends(Q), actual_seq_kvlen=ends(KV)) | arguments
    with pytest.raises(error, match=text):
        torch_npu.npu_fusion_attention(*[t.to("npu") for t in inputs()], **given)
