"""The transformer against formulas written out by hand."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch

from course_lib.llm.config import PRESETS, Config, preset
from course_lib.llm.model import CONVENTIONS, Cache, Transformer, attend, rotary_table, rotate

MICRO = preset("micro", vocab_size=50)


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(1))


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(QKᵀ/√K) V with later keys left out, head by head, each query head with the keys of its group."""
    _, H, T, K = q.shape
    S, share = k.shape[2], H // k.shape[1]
    out = torch.empty_like(q)
    for head in range(H):
        scores = q[:, head] @ k[:, head // share].transpose(1, 2) / math.sqrt(K)  # (B, T, S)
        for row in range(T):
            scores[:, row, S - T + row + 1 :] = -math.inf
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)  # (B, T, S)
        out[:, head] = weights @ v[:, head // share]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length, total", [(7, 7), (1, 7), (3, 7), (1, 1)])
def test_attention_is_the_softmax_formula(groups, length, total):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, length, 8, generator=generator)
    k, v = torch.randn(2, 2, groups, total, 8, generator=generator)
    torch.testing.assert_close(attend(q, k, v), softmax_attention(q, k, v))


def test_grouped_query_attention_is_attention_with_repeated_heads():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8, generator=generator), *torch.randn(2, 2, 2, 9, 8, generator=generator)
    torch.testing.assert_close(attend(q, k, v), attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


def test_rotary_scores_depend_on_the_distance_only_and_lengths_are_kept():
    cos, sin = rotary_table(32, 8, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 32, 8)
    turned_q, turned_k = rotate(q, cos, sin)[0, 0], rotate(k, cos, sin)[0, 0]  # (T, K)
    scores = turned_q @ turned_k.T  # (T, T)
    for distance in range(-31, 32):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned_q.norm(dim=-1), q[0, 0].norm(dim=-1))
    assert turned_q[0].equal(q[0, 0, 0])  # position 0 is not turned


def test_rotary_turns_a_pair_by_its_angle():
    cos, sin = rotary_table(3, 2, 10_000.0)
    turned = rotate(torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2), cos, sin)[0, 0, 2]
    torch.testing.assert_close(turned, torch.tensor([math.cos(2), math.sin(2)]))


def test_parameters_counted_by_hand():
    V, D, L, F = 512, 128, 4, 352
    layer = D * 128 + 2 * D * 64 + 128 * D + 3 * D * F
    model = Transformer(preset("tiny", V))
    assert model.num_parameters() == L * (layer + 2 * D) + D + 2 * V * D
    assert model.num_multiplying() == L * layer + V * D == 802_816
    tied = Transformer(dataclasses.replace(model.config, tied=True))
    assert tied.num_parameters() == model.num_parameters() - V * D
    assert tied.num_multiplying() == model.num_multiplying()


def test_flops_per_token_counted_by_hand():
    model, D, L, T = Transformer(preset("tiny", 512)), 128, 4, 128
    forward = 2 * model.num_multiplying() * T
    pairs = {"6N": 0, "6N+attention causal": T * (T + 1) // 2, "6N+attention full": T * T}
    for convention in CONVENTIONS:
        attention = L * pairs[convention] * 2 * 2 * D  # a multiply-add per width for QKᵀ and one for the values
        assert model.flops_per_token(convention) * T == 3 * (forward + attention)
    assert model.flops_per_token("6N", context=64) == 6 * model.num_multiplying()
    with pytest.raises(ValueError, match="6N\\+attention causal"):
        model.flops_per_token("8N")


def test_causal():
    model, x = Transformer(MICRO), tokens()
    y = x.clone()
    y[:, 10:] = 0
    torch.testing.assert_close(model(x)[:, :10], model(y)[:, :10])


@pytest.mark.parametrize("name", PRESETS)
def test_cached_logits_equal_uncached(name):
    model, x = Transformer(preset(name, 50)), tokens()
    cache = Cache(model.config, 2)
    with torch.no_grad():
        parts = [model(x[:, a:b], cache=cache) for a, b in [(0, 7), (7, 12), (12, 13), (13, 14), (14, 20)]]
        torch.testing.assert_close(torch.cat(parts, 1), model(x), atol=1e-4, rtol=1e-4)
    assert cache.length == 20


def test_loss_is_the_mean_of_minus_log_probability_and_skips_ignored():
    model, x = Transformer(MICRO), tokens()
    targets = tokens().roll(1, 1)
    targets[0, :15] = -100
    logp = model(x).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(model(x, targets), -logp[targets >= 0].mean())


def test_first_loss_is_near_ln_v_for_each_preset():
    for name in PRESETS:
        loss = Transformer(preset(name, 50))(tokens(), tokens().roll(1, 1)).item()
        assert abs(loss - math.log(50)) < 0.15


def test_same_seed_same_weights_in_another_process_and_for_another_default_device():
    code = (
        "import torch; from course_lib.llm.model import Transformer; from course_lib.llm.config import preset\n"
        "torch.manual_seed(7); m = Transformer(preset('micro', 50), 3)\n"
        "print(m.blocks[1].feed_forward.down.weight.sum().item().hex())"
    )
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.strip()
    assert Transformer(MICRO, 3).blocks[1].feed_forward.down.weight.sum().item().hex() == there
    assert not Transformer(MICRO, 3).embedding.weight.equal(Transformer(MICRO, 4).embedding.weight)
    with torch.device("meta"):
        assert Transformer(MICRO).num_parameters() == Transformer(MICRO).num_parameters()


def test_errors():
    with pytest.raises(ValueError, match="unknown preset 'huge'; expected one of micro, tiny, small"):
        preset("huge", 50)
    with pytest.raises(ValueError, match="65 tokens do not fit into the context of 64"):
        Transformer(MICRO)(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="kv_heads"):
        dataclasses.replace(MICRO, kv_heads=3)
    with pytest.raises(ValueError, match="even head width"):
        Config(50, 64, 33, 2, 2, 1, 96, True)
