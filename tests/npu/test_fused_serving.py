"""Fused operators of serving, each against plain PyTorch, and its cost against a count by hand."""

import pytest
import torch
import torch.nn.functional as F

from course_lib import npu
from course_lib.npu import torch_npu

N, D, E, HIDDEN = 6, 8, 4, 16


def on(*tensors):
    return [t.to("npu") for t in tensors]


def cost_of(call):
    with npu.ledger() as ledger:
        call()
    (record,) = ledger.records
    return record.cost


PLAIN = {"fastgelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu, "relu": F.relu, "silu": F.silu}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", PLAIN)
def test_feed_forward(activation, dtype):
    x, w1, w2, b1, b2 = (torch.randn(s).to(dtype) for s in ((2, N, D), (D, HIDDEN), (HIDDEN, D), (HIDDEN,), (D,)))
    got = torch_npu.npu_ffn(*on(x, w1, w2), activation, bias1=b1.to("npu"), bias2=b2.to("npu"))
    want = PLAIN[activation](x.double() @ w1.double() + b1.double()) @ w2.double() + b2.double()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(got.cpu().double(), want, rtol=tolerance, atol=tolerance * 5)
    assert got.dtype == dtype
    torch.testing.assert_close(torch_npu.npu_fast_gelu(x.to("npu")).cpu().float(), PLAIN["fastgelu"](x.float()), rtol=1e-2, atol=1e-2)


def test_feed_forward_of_experts():
    x, w1, w2 = (torch.randn(s) for s in ((N, D), (E, D, HIDDEN), (E, HIDDEN, D)))
    tokens, experts = [1, 3, 0, 2], [0, 1, 1, 1, 3, 3]
    mine = on(x, w1, w2)
    want = torch.stack([F.relu(x[i] @ w1[e]) @ w2[e] for i, e in enumerate(experts)])
    torch.testing.assert_close(torch_npu.npu_ffn(*mine, "relu", expert_tokens=tokens).cpu(), want)
    cost = cost_of(lambda: torch_npu.npu_ffn(*mine, "relu", expert_tokens=tokens))
    assert cost.cube_flops == 2 * 2 * N * D * HIDDEN and cost.vector_flops == N * HIDDEN
    assert cost.bytes == 4 * (2 * N * D + 3 * 2 * D * HIDDEN)  # the weights of three experts


def deepseek(x, k, bias, groups, of, factor):
    """The gate as DeepSeek-V3 publishes it."""
    scores = x.sigmoid()
    choice = (scores + bias).view(N, of, -1)
    best = choice.topk(2, -1)[0].sum(-1).topk(groups, -1)[1]
    mask = torch.zeros(N, of).scatter_(1, best, 1).unsqueeze(-1).expand_as(choice).reshape(N, -1)
    experts = choice.reshape(N, -1).masked_fill(~mask.bool(), float("-inf")).topk(k, -1)[1]
    weights = scores.gather(1, experts)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * factor, experts


def test_the_gate():
    x, bias = torch.randn(N, 16), torch.randn(16)
    y, experts, scores = torch_npu.npu_moe_gating_top_k(*on(x), 3, bias=bias.to("npu"), k_group=2, group_count=4, group_select_mode=1, norm_type=1, routed_scaling_factor=2.5)
    want, chosen = deepseek(x, 3, bias, 2, 4, 2.5)
    torch.testing.assert_close(y.cpu(), want)
    assert torch.equal(experts.cpu(), chosen.int()) and experts.dtype == torch.int32
    torch.testing.assert_close(scores.cpu(), x.sigmoid())
    y, experts, _ = torch_npu.npu_moe_gating_top_k(*on(x), 3)
    want, chosen = x.softmax(-1).topk(3)
    torch.testing.assert_close(y.cpu(), want)
    cost = cost_of(lambda x=x.to("npu"): torch_npu.npu_moe_gating_top_k(x, 3))
    assert cost.vector_flops == 6 * x.numel() and cost.bytes == 4 * (2 * x.numel() + 2 * 3 * N)


@pytest.mark.parametrize("span", [(0, E), (1, 3)])
def test_routing(span):
    x, experts = torch.randn(N, D), torch.randint(0, E, (N, 2), dtype=torch.int32)
    mine = on(x, experts)
    arguments = dict(expert_num=E, active_num=2 * N, expert_tokens_num_flag=True, active_expert_range=list(span))
    rows, index, counts, _ = torch_npu.npu_moe_init_routing_v2(*mine, expert_tokens_num_type=1, **arguments)
    there = [(e, i) for e in range(*span) for i in range(2 * N) if experts.flatten()[i] == e]
    torch.testing.assert_close(rows.cpu()[: len(there)], x[[i // 2 for _, i in there]])
    assert counts.tolist() == [sum(e == other for e, _ in there) for other in range(*span)]
    assert [index[i].item() for _, i in there] == list(range(len(there))) and (index == -1).sum() == 2 * N - len(there)
    _, source, running, _ = torch_npu.npu_moe_init_routing_v2(*mine, row_idx_type=1, expert_tokens_num_type=0, **arguments)
    assert source.tolist() == [i for _, i in there] + [-1] * (2 * N - len(there)) and running.tolist() == counts.cumsum(0).tolist()
    if span == (0, E):  # and back, by the operator that torch_npu has for it
        torch.testing.assert_close(torch_npu.npu_moe_token_unpermute(rows, index, probs=torch.full((N, 2), 0.5, device="npu")).cpu(), x)


def test_rows_of_other_ranks_by_expert():
    counts = torch.tensor([[1, 2], [3, 0], [1, 1]])  # (ranks, experts)
    tokens, scales = torch.randn(8, D), torch.rand(8)
    got = torch_npu.npu_moe_re_routing(*on(tokens, counts), per_token_scales=scales.to("npu"))
    order = [0, 3, 4, 5, 6, 1, 2, 7]
    for g, want in zip(got, (tokens[order], scales[order], torch.tensor(order, dtype=torch.int32), torch.tensor([5, 3])), strict=True):
        torch.testing.assert_close(g.cpu(), want)


def test_update_at_indices():
    x, updates, indices = torch.randn(4, 5, 6), torch.randn(3, 6), torch.tensor([[0, 1], [3, 4], [2, 2]])
    want = x.clone()
    want[indices[:, 0], indices[:, 1]] = updates
    mine = on(x, indices, updates)
    assert torch.equal(torch_npu.npu_scatter_nd_update(*mine).cpu(), want)
    assert torch.equal(mine[0].cpu(), x)
    assert cost_of(lambda: torch_npu.npu_scatter_nd_update(*mine)).bytes == 2 * x.nbytes + updates.nbytes + indices.nbytes


@pytest.mark.parametrize("mode", ["Norm", "PA_BNSD"])
def test_the_cache_of_latent_attention(mode):
    B, T, latent, rope = 2, 3, 8, 4
    kv, gamma, angle = torch.randn(B, 1, T, latent + rope), torch.randn(latent), torch.randn(B, 1, T, rope)
    caches = [torch.zeros((B, 1, 5, w) if mode == "Norm" else (4, 5, 1, w)) for w in (rope, latent)]
    index = torch.tensor([[1, 0, 4], [2, -1, 3]]) if mode == "Norm" else torch.tensor([7, 0, 19, 3, -1, 11])
    mine = on(kv, gamma, angle.cos(), angle.sin(), index, *caches)
    k_cache, ckv_cache, rotated, normed = torch_npu.npu_kv_rmsnorm_rope_cache(*mine, cache_mode=mode, is_output_kv=True)
    assert k_cache is mine[5] and ckv_cache is mine[6]
    x, k = kv.split([latent, rope], -1)
    k = torch.cat([k[..., ::2], k[..., 1::2]], -1)
    want = F.rms_norm(x, (latent,), gamma, 1e-5), k * angle.cos() + torch.cat([-k[..., rope // 2 :], k[..., : rope // 2]], -1) * angle.sin()
    torch.testing.assert_close(normed.cpu(), want[0])
    torch.testing.assert_close(rotated.cpu(), want[1])
    for cache, new in ((k_cache, want[1]), (ckv_cache, want[0])):
        expected = torch.zeros(cache.shape).flatten(0, 2)
        for i, at in enumerate(index.flatten().tolist()):
            if at >= 0:
                expected[at + (i // T * 5 if mode == "Norm" else 0)] = new.reshape(-1, new.shape[-1])[i]
        torch.testing.assert_close(cache.cpu().flatten(0, 2), expected)


@pytest.mark.parametrize("name", ["npu_mm_all_reduce_base", "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base", "npu_moe_distribute_dispatch", "npu_moe_distribute_combine"])
def test_fused_collectives_are_refused(name):
    with pytest.raises(NotImplementedError, match=f"{name}: .*one after the other"):
        getattr(torch_npu, name)(torch.ones(2, 2, device="npu"), torch.ones(2, 2, device="npu"), "hcom")


x, w = torch.ones(N, D), torch.ones(D, D)
WRONG = {
    "gated": (NotImplementedError, "npu_swiglu", lambda: torch_npu.npu_ffn(x, w, w, "swiglu")),
    "activation": (ValueError, "'tanh'", lambda: torch_npu.npu_ffn(x, w, w, "tanh")),
    "experts": (ValueError, "do not fit", lambda: torch_npu.npu_ffn(x, w, w, "relu", expert_tokens=[N])),
    "scales": (NotImplementedError, "deq_scale1=", lambda: torch_npu.npu_ffn(x, w, w, "relu", deq_scale1=w)),
    "groups": (ValueError, "k=5 of 1 of 2 groups", lambda: torch_npu.npu_moe_gating_top_k(x, 5, group_count=2)),
    "norm": (NotImplementedError, "norm_type=2", lambda: torch_npu.npu_moe_gating_top_k(x, 1, norm_type=2)),
    "rows in int8": (NotImplementedError, "quant_mode=1", lambda: torch_npu.npu_moe_init_routing_v2(x, x.int(), quant_mode=1)),
    "range": (ValueError, "experts 2 to 9", lambda: torch_npu.npu_moe_init_routing_v2(x, x.int(), expert_num=4, active_expert_range=[2, 9], expert_tokens_num_type=1)),
    "updates": (ValueError, "do not fit", lambda: torch_npu.npu_scatter_nd_update(x, torch.zeros(2, 1, dtype=torch.int64), w)),
    "cache": (NotImplementedError, "PA_NZ", lambda: torch_npu.npu_kv_rmsnorm_rope_cache(x, x, x, x, x, x, x, cache_mode="PA_NZ")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    error, text, call = WRONG[case]
    with pytest.raises(error, match=text):
        call()


def test_no_gradient():
    with pytest.raises(NotImplementedError, match="npu_ffn is not differentiable"):
        torch_npu.npu_ffn(*[t.to("npu").requires_grad_() for t in (x, w, w)], "relu").sum().backward()
