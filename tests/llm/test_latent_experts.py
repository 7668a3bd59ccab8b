"""Latent attention, experts and multi-token prediction against the same things written out by hand."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from course_lib.llm.cache import Cache, PagedCache
from course_lib.llm.config import Config, Experts, Latent, preset
from course_lib.llm.experts import Experts as Mixture
from course_lib.llm.latent import LatentAttention
from course_lib.llm.layers import rotary_table, rotate
from course_lib.llm.model import Transformer
from course_lib.llm.mtp import WEIGHT

V3 = preset("micro-v3", 50)
GQA = preset("micro", 50)
KINDS = {
    "gqa": GQA,
    "mla": dataclasses.replace(V3, experts=None, mtp=0),
    "experts": dataclasses.replace(GQA, experts=V3.experts),
    "v3": V3,
}


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(1))


def test_latent_attention_head_by_head():
    config = KINDS["mla"]
    H, m = config.heads, config.latent
    part = LatentAttention(config, 0)
    x = torch.randn(2, 7, config.width, generator=torch.Generator().manual_seed(0))
    cos, sin = (t[:7] for t in rotary_table(64, m.rope, 10_000.0))
    q = part.query_up(part.query_norm(part.query_down(x))).view(2, 7, H, m.nope + m.rope)
    down = part.down(x)
    up = part.up(part.norm(down[..., : m.rank])).view(2, 7, H, m.nope + m.value)
    r = rotate(down[:, None, :, m.rank :], cos, sin)[:, 0]
    heads = []
    for h in range(H):
        turned = rotate(q[:, :, h, None, m.nope :].transpose(1, 2), cos, sin)[:, 0]
        scores = q[:, :, h, : m.nope] @ up[:, :, h, : m.nope].mT + turned @ r.mT
        scores = (scores / math.sqrt(m.nope + m.rope)).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ up[:, :, h, m.nope :])
    wanted = part.output(torch.cat(heads, -1))
    for absorb in (False, True):
        part.absorb = absorb
        torch.testing.assert_close(part(x, cos, sin), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("absorb", [None, False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_same_logits_with_and_without_cache(kind, absorb, paged):
    config = KINDS[kind]
    if absorb is not None and not config.latent:
        pytest.skip("only latent attention has two forms")
    model, x = Transformer(config, 1), tokens()
    wanted = model(x)
    for part in model.modules():
        if isinstance(part, LatentAttention):
            part.absorb = absorb
    cache = PagedCache(config, 2, pages=16, page=4) if paged else Cache(config, 2)
    with torch.no_grad():
        parts = [model(x[:, a:b], cache=cache) for a, b in [(0, 7), (7, 12), (12, 13), (13, 14), (14, 20)]]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-4, rtol=1e-4)
    assert cache.length == 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("paged", [False, True])
def test_rows_of_different_length_do_not_mix(kind, paged):
    config = KINDS[kind]
    model, x = Transformer(config, 1), tokens(3)
    cache = PagedCache(config, 3, pages=20, page=4) if paged else Cache(config, 3)
    with torch.no_grad():
        model(x[:, :9], cache=cache)
        cache.cut([9, 3, 6])
        step = torch.stack([x[row, n : n + 2] for row, n in enumerate([9, 3, 6])])
        found = model(step, cache=cache)
        for row, n in enumerate([9, 3, 6]):
            torch.testing.assert_close(found[row], model(x[row : row + 1, : n + 2])[0, n:], atol=1e-4, rtol=1e-4)
    assert cache.lengths == [11, 5, 8]


def test_pages_are_taken_as_rows_grow_and_given_back():
    model = Transformer(V3)
    cache = PagedCache(V3, 2, pages=6, page=4)
    with torch.no_grad():
        model(tokens(2, 9), cache=cache)
        assert [len(t) for t in cache.tables] == [3, 3] and not cache.free
        cache.cut([9, 4])
        assert [len(t) for t in cache.tables] == [3, 1] and len(cache.free) == 2
        cache.cut([9, 0])
        assert len(cache.free) == 3
        with pytest.raises(ValueError, match="no page left for 8 more tokens; use a larger pool"):
            cache.cut([9, 9]) or model(tokens(2, 8), cache=cache)


def test_a_latent_cache_holds_one_entry_per_token():
    wide = preset("tiny-v3", 50)
    cache = Cache(wide, 3)
    assert cache.values is None and cache.keys.numel() == 5 * 3 * 128 * wide.cached_per_token
    assert wide.cached_per_token == 48 < preset("tiny", 50).cached_per_token == 128


def by_hand(part: Mixture, x: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert."""
    e, r = part.shape, part.router
    out = torch.zeros_like(x)
    for n, token in enumerate(x):
        score = [float(s) for s in (r.weight @ token).sigmoid()]
        biased = [s + float(b) for s, b in zip(score, r.bias)]
        size = e.routed // e.groups
        strength = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(e.groups)]
        groups = sorted(range(e.groups), key=strength.__getitem__)[-e.top_groups :]
        chosen = sorted((i for i in range(e.routed) if i // size in groups), key=biased.__getitem__)[-e.active :]
        for i in chosen:
            y = (F.silu(token @ part.gate[i]) * (token @ part.up[i])) @ part.down[i]
            out[n] += e.route_scale * score[i] / sum(score[j] for j in chosen) * y
    return out + part.shared(x) if part.shared else out


@pytest.mark.parametrize("groups, top_groups, shared", [(1, 1, 0), (4, 2, 1), (4, 4, 2)])
@torch.no_grad()
def test_experts_one_by_one(groups, top_groups, shared):
    shape = dataclasses.replace(V3.experts, groups=groups, top_groups=top_groups, shared=shared, route_scale=2.5)
    model = Transformer(dataclasses.replace(V3, experts=shape), 3)
    part = model.blocks[1].feed_forward
    part.router.bias += torch.linspace(-0.2, 0.2, 8)
    x = torch.randn(30, V3.width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part(x[None])[0], by_hand(part, x), atol=1e-5, rtol=1e-4)
    assert isinstance(model.blocks[0].feed_forward.gate, torch.nn.Linear)  # the first layer is dense


def test_gradients_of_experts_are_those_of_the_loop():
    part = Transformer(V3, 3).blocks[1].feed_forward
    x = torch.randn(12, V3.width, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(part(x[None]).square().mean(), list(part.parameters()))
    scores = (x @ part.router.weight.T).sigmoid()
    share = torch.zeros_like(scores).scatter(1, part.chosen, scores.gather(1, part.chosen))
    share = share / share.sum(-1, keepdim=True)
    each = torch.stack([(F.silu(x @ g) * (x @ u)) @ d for g, u, d in zip(part.gate, part.up, part.down)], 1)
    wanted = torch.autograd.grad(
        ((share[..., None] * each).sum(1) + part.shared(x)).square().mean(), list(part.parameters())
    )
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_the_bias_evens_the_load_without_a_gradient():
    torch.manual_seed(0)
    shape = dataclasses.replace(V3.experts, groups=1, top_groups=1, bias_speed=0.02)
    part = Transformer(dataclasses.replace(V3, experts=shape), 3).blocks[1].feed_forward
    x = torch.randn(4, 64, V3.width) + 0.7  # tokens that are alike crowd into few experts
    spread = []
    for _ in range(60):
        part(x)
        part.count()
        load = part.router.load
        assert load.sum() == 4 * 64 * 2
        spread.append(float(load.max() / load.mean()))
        part.balance()
    assert spread[0] > 2 and spread[-1] < 1.3 and part.router.load.sum() == 0
    assert not part.router.bias.requires_grad


def test_unevenness_is_one_where_even_and_larger_where_not():
    part = Transformer(V3, 3).blocks[1].feed_forward
    part.scores = torch.full((1, 4, 8), 0.5)
    part.chosen = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    assert part.unevenness().item() == pytest.approx(1.0)
    part.scores[..., :2] = 0.9
    part.chosen = torch.tensor([[0, 1]] * 4)
    assert part.unevenness().item() == pytest.approx(8 / 2 * 2 * 0.9 / (2 * 0.9 + 6 * 0.5))


def test_aside_holds_further_token_and_balance_and_the_loss_does_not():
    config = dataclasses.replace(V3, experts=dataclasses.replace(V3.experts, sequence_loss=0.01))
    model, x = Transformer(config, 1), tokens(2, 21)
    inputs, targets = x[:, :-1], x[:, 1:]
    loss = model(inputs, targets)
    torch.testing.assert_close(loss, F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()))
    further = model.draft(model.body(inputs), targets)[:, :-1]  # all positions; the last has no target
    wanted = WEIGHT * F.cross_entropy(further.flatten(0, 1), targets[:, 1:].flatten())
    model(inputs, targets)
    uneven = sum(part.unevenness() for part in model.experts())
    torch.testing.assert_close(model.aside, wanted + 0.01 * uneven)
    assert Transformer(GQA)(inputs, targets).requires_grad and Transformer(GQA).aside is None
    with pytest.raises(ValueError, match="no layer that predicts a further token"):
        Transformer(GQA).draft(torch.zeros(1, 1, 32), inputs[:1, :1])


def test_active_weights_and_flops():
    V, D, H = 512, 128, 4
    config = preset("tiny-v3", V)
    m, e = config.latent, config.experts
    attention = D * 64 + 64 * H * 48 + D * 48 + 32 * H * (m.nope + m.value) + H * m.value * D
    experts = 3 * (e.active + e.shared) * D * e.width + e.routed * D
    wanted = 5 * attention + 3 * D * 352 + 4 * experts + 2 * D * D + 2 * V * D  # 4 layers and one ahead
    model = Transformer(config)
    assert model.num_multiplying() == wanted
    assert model.flops_per_token("6N+attention full") == 6 * wanted + 6 * 5 * H * (48 + 32) * 128


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Latent(8, 8, 8, 7, 8), "an even rope"),
        (lambda: Experts(8, 2, 1, 32, groups=3), "must be a multiple of the groups"),
        (lambda: Experts(8, 5, 1, 32, groups=4, top_groups=2), "expected 1 to 4 active experts, found 5"),
        (lambda: dataclasses.replace(V3, mtp=2), "expected mtp of 0, or 1"),
    ],
)
def test_bad_shapes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert Config(**dataclasses.asdict(V3)) == V3  # as a checkpoint writes and reads it
