"""A layer of experts by fused operators equals the loop over experts; each operator alone; what it costs."""

import pytest
import torch

from course_lib import npu
from course_lib.npu import torch_npu

N, k, E, D, F = 10, 2, 3, 6, 8


def loop(x, router, w, b):
    """Each token through its k likeliest experts, weighted."""
    p, experts = (x @ router).softmax(-1).topk(k, -1)
    out = torch.zeros(x.shape[0], w.shape[-1], dtype=x.dtype)
    for n in range(x.shape[0]):
        for j in range(k):
            out[n] = out[n] + p[n, j] * (x[n] @ w[experts[n, j]] + b[experts[n, j]])
    return out


def fused(x, router, w, b, type=0):
    p, experts, _ = torch_npu.npu_moe_gating_top_k_softmax(x @ router, k=k)
    rows, where = torch_npu.npu_moe_token_permute(x, experts)
    counts = torch.bincount(experts.flatten().long(), minlength=E)
    ends = counts if type else counts.cumsum(0)
    rows = torch_npu.npu_grouped_matmul([rows], [w], bias=[b], group_list=ends, split_item=2, group_type=0, group_list_type=type)[0]
    return torch_npu.npu_moe_token_unpermute(rows, where, probs=p)


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("type", [0, 1])
def test_experts(device, type):
    tensors = [torch.randn(s) for s in ((N, D), (D, E), (E, D, F), (E, F))]
    mine, oracle = [t.to(device).requires_grad_() for t in tensors], [t.double().requires_grad_() for t in tensors]
    got, want = fused(*mine, type=type), loop(*oracle)
    pull = torch.randn(want.shape)
    grads, expected = torch.autograd.grad(got, mine, pull.to(got)), torch.autograd.grad(want, oracle, pull.double())
    for g, w in zip([got, *grads], [want, *expected], strict=True):
        torch.testing.assert_close(g.detach().cpu().double(), w.detach(), rtol=1e-5, atol=1e-5)


def test_gate():
    x = torch.randn(2, 3, E)
    p, experts, rows = torch_npu.npu_moe_gating_top_k_softmax(x.to("npu"), k=2)
    want = x.softmax(-1).topk(2)
    torch.testing.assert_close(p.cpu(), want.values)
    assert torch.equal(experts.cpu().long(), want.indices) and experts.dtype == rows.dtype == torch.int32
    assert rows.cpu().reshape(6, 2).tolist() == [[i, i + 6] for i in range(6)]


def test_permute_and_back():
    tokens, experts = torch.arange(8.0).view(4, 2), torch.tensor([[2, 0], [1, 0], [2, 1], [0, 1]], dtype=torch.int32)
    rows, where = torch_npu.npu_moe_token_permute(tokens.to("npu"), experts.to("npu"))
    order = torch.argsort(experts.flatten(), stable=True)
    assert torch.equal(rows.cpu(), tokens[order // 2])
    assert where.cpu().tolist() == torch.argsort(order).tolist() and where.dtype == torch.int32
    assert torch.equal(torch_npu.npu_moe_token_unpermute(rows, where, probs=torch.full((4, 2), 0.5, device="npu")).cpu(), tokens)
    one, there = torch_npu.npu_moe_token_permute(tokens.to("npu"), experts[:, 0].to("npu"))
    assert torch.equal(torch_npu.npu_moe_token_unpermute(one, there).cpu(), tokens)


def test_dropped_rows_have_no_gradient():
    tokens, experts = torch.randn(4, 2, device="npu", requires_grad=True), torch.tensor([2, 0, 1, 0], device="npu")
    rows, _ = torch_npu.npu_moe_token_permute(tokens, experts, num_out_tokens=3)
    rows.sum().backward()
    assert tokens.grad.cpu().tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]


def test_groups_of_the_inner_dimension():
    x, dy, ends = torch.randn(N, D), torch.randn(N, F), torch.tensor([4, 4, N])
    got = torch_npu.npu_grouped_matmul([x.to("npu").T], [dy.to("npu")], group_list=ends.to("npu"), split_item=3, group_type=2)[0].cpu()
    want = torch.stack([x[a:b].T @ dy[a:b] for a, b in ((0, 4), (4, 4), (4, N))])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [12, 10])
def test_one_launch_with_flops_and_bytes_by_hand(rows):
    x, w = torch.randn(rows, D, device="npu").requires_grad_(), torch.randn(E, D, F, device="npu").requires_grad_()
    ends = torch.tensor([rows // 2, rows // 2, rows], device="npu")
    with npu.ledger() as ledger:
        out = torch_npu.npu_grouped_matmul([x], [w], group_list=ends, split_item=3, group_type=0)[0]
        out.backward(torch.ones_like(out))
    assert [r.op for r in ledger.records] == ["npu_grouped_matmul", "ones_like", "npu_grouped_matmul", "npu_grouped_matmul_weight"]
    flops, moved = 2 * rows * D * F, x.nbytes + w.nbytes + out.nbytes + ends.nbytes
    assert [(r.cost.cube_flops, r.cost.bytes) for r in ledger.records if "grouped" in r.op] == [(flops, moved)] * 3


def test_time_does_not_depend_on_the_split():
    x, w = torch.randn(12, D, device="npu"), torch.randn(E, D, F, device="npu")
    with npu.ledger() as ledger:
        for ends in ([4, 8, 12], [0, 0, 12]):
            torch_npu.npu_grouped_matmul([x], [w], group_list=torch.tensor(ends, device="npu"), split_item=3, group_type=0)
    assert len({r.cost.ps for r in ledger.records if "grouped" in r.op}) == 1


def test_shapes_follow_without_numbers():
    x, w = (torch.empty(s, device="meta", requires_grad=True) for s in ((N, D), (E, D, F)))
    p, experts, _ = torch_npu.npu_moe_gating_top_k_softmax(x[:, :E], k=k)
    rows, where = torch_npu.npu_moe_token_permute(x, experts)
    rows = torch_npu.npu_grouped_matmul([rows], [w], group_list=experts[:E, 0], split_item=3, group_type=0)[0]
    out = torch_npu.npu_moe_token_unpermute(rows, where, probs=p)
    out.sum().backward()
    assert out.shape == (N, F) and x.grad.shape == x.shape and w.grad.shape == w.shape


x, w = torch.zeros(N, D), torch.zeros(E, D, F)
REFUSED = {
    "split_item": (NotImplementedError, "split_item=0", dict(split_item=0)),
    "scale": (NotImplementedError, r"npu_grouped_matmul\(scale=", dict(scale=[x])),
    "act_type": (NotImplementedError, "act_type=1", dict(act_type=1)),
    "group_list": (NotImplementedError, "group_list=None", dict(group_list=None)),
    "ends": (ValueError, "does not divide 10 rows", dict(group_list=[4, 8, 12])),
    "falling": (ValueError, "does not divide", dict(group_list=[4, 2, 10])),
    "groups": (ValueError, "do not fit", dict(group_list=[4, 10])),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_says_why(name):
    error, text, arguments = REFUSED[name]
    with pytest.raises(error, match=text):
        torch_npu.npu_grouped_matmul([x.to("npu")], [w.to("npu")], **(dict(group_list=[4, 8, 10], split_item=3, group_type=0) | arguments))


def test_modes_that_are_reserved():
    with pytest.raises(NotImplementedError, match="padded_mode"):
        torch_npu.npu_moe_token_permute(x, torch.zeros(N, dtype=torch.int64), padded_mode=True)
    with pytest.raises(NotImplementedError, match="finished"):
        torch_npu.npu_moe_gating_top_k_softmax(x, finished=x)
    with pytest.raises(NotImplementedError, match="dropped"):
        torch_npu.npu_moe_token_unpermute(x[:3], torch.zeros(N, dtype=torch.int32))
