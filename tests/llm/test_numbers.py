"""The parts behind the options, each by itself: fp8 blocks, int8 weights, Muon, LoRA, gradient checkpointing."""

import copy
import gc

import pytest
import torch

from course_lib import npu
from course_lib.llm import fp8, int8, lora, muon, recompute
from course_lib.llm.config import preset
from course_lib.llm.generate import generate
from course_lib.llm.model import Transformer

PROMPT = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens() -> torch.Tensor:
    return torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(1))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("rows, width", [(64, 352), (200, 128), (16, 32), (300, 256)])
@pytest.mark.parametrize("block", [1, 128])
def test_each_block_is_scaled_to_its_largest(rows, width, block):
    x = drawn(rows, width)
    small, scale = fp8.quantise(x, block)
    assert small.dtype == torch.float8_e4m3fn and scale.shape == (rows, -(-width // 128))
    for a in range(0, rows, block):
        for b in range(0, width, 128):
            part = x[a : a + block, b : b + 128]
            assert (scale[a : a + block, b // 128] * 448).max().item() == pytest.approx(part.abs().max().item())
    relative = (fp8.dequantise((small, scale)) - x).abs() / x.abs()
    assert relative[x.abs() > 0.1].max() < 2**-4  # half of the last of three bits


def test_an_outlier_costs_its_own_block_only():
    x = drawn(4, 256)
    x[0, 0] = 1e6
    by_blocks = fp8.dequantise(fp8.quantise(x))
    one_scale = (x / (1e6 / 448)).to(torch.float8_e4m3fn).float() * (1e6 / 448)
    assert error(by_blocks[:, 128:], x[:, 128:]) < 0.03 and error(by_blocks[1:], x[1:]) < 0.03
    assert error(one_scale[1:], x[1:]) > 0.5  # all else is lost


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_products_are_those_of_the_rounded_factors(device):
    if device == "npu":
        npu.use("mini")
    a, b = fp8.quantise(drawn(48, 352).to(device)), fp8.quantise(drawn(96, 352).to(device), 128)
    torch.testing.assert_close(fp8.product(a, b), fp8.dequantise(a) @ fp8.dequantise(b).T, atol=1e-4, rtol=1e-5)


def test_gradients_of_fp8_are_near():
    linear = torch.nn.Linear(256, 192, bias=False)
    x = drawn(160, 256)
    weights = torch.linspace(1e-6, 1e-3, 192)  # gradients of very different size
    found, wanted = [], []
    for layer, out in ((fp8.Fp8Linear(copy.deepcopy(linear)), found), (linear, wanted)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * weights).square().sum().backward()
        out += [y.detach(), leaf.grad, layer.weight.grad]
    for a, b in zip(found, wanted):
        assert 0.001 < error(a, b) < 0.06 and a.dtype == torch.float32


def test_fp8_widths():
    with pytest.raises(ValueError, match="fp8 products want widths in multiples of 16"):
        fp8.Fp8Linear(torch.nn.Linear(24, 16, bias=False))


@pytest.mark.parametrize("name", ["micro", "micro-v3"])
def test_int8_weights_make_nearly_the_same_logits(name):
    model = Transformer(preset(name, 50), seed=1)
    small = copy.deepcopy(model)
    int8.quantise_weights(small)
    logits = model(PROMPT)
    assert 0 < error(small(PROMPT), logits) < 0.05
    assert generate(small, PROMPT, 20).equal(generate(small, PROMPT, 20, cached=False))  # absorbed too
    linear = model.blocks[0].feed_forward.down
    made = small.blocks[0].feed_forward.down
    assert made.numbers.dtype == torch.int8 and (made.weight - linear.weight).abs().max() <= made.scale.max() * 0.51
    x = drawn(3, 96)
    torch.testing.assert_close(made(x), x @ made.weight.T, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_int8_lowers_memory():
    npu.use("mini")
    model = Transformer(preset("small", 512)).to("npu")
    before = torch.npu.memory_allocated()
    int8.quantise_weights(model)
    assert torch.npu.memory_allocated() < 0.35 * before


@pytest.mark.parametrize("chip, share", [("ascend-910b2", 0.9), ("h100", 0.6)])
@torch.no_grad()
def test_int8_lowers_the_time_to_decode_where_weights_are_large(chip, share):
    """A feed-forward matrix of an 8 B model, one row of bf16; shapes only."""
    gc.collect()
    npu.use(chip, numerics=False)
    with torch.device("npu"):
        linear = torch.nn.Linear(4096, 14336, bias=False, dtype=torch.bfloat16)
        x, small = torch.empty(1, 4096, dtype=torch.bfloat16), int8.Int8Linear(linear)
    seconds = []
    for layer in (linear, small):
        with npu.ledger() as ledger:
            layer(x)
        seconds.append(ledger.table("op")["time_us"].sum())
    assert 0.4 * seconds[0] < seconds[1] < share * seconds[0]
    del linear, x, small, layer
    gc.collect()
    npu.use("mini")


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (3, 40, 24)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    values = torch.linalg.svdvals(muon.orthogonal(drawn(*shape)).float())
    assert values.min() > 0.3 and values.max() < 1.3  # the coefficients trade nearness for speed
    u, _, v = torch.linalg.svd(drawn(*shape), full_matrices=False)
    assert torch.cosine_similarity(muon.orthogonal(drawn(*shape)).float().flatten(), (u @ v).flatten(), 0) > 0.95


def test_muon_is_pytorchs_muon():
    weight = torch.nn.Parameter(drawn(48, 32))
    other, several = (torch.nn.Parameter(t) for t in (weight.detach().clone(), drawn(2, 48, 32)))
    several.data[0] = weight.data
    group = {"params": [weight, several], "momentum": 0.95, "weight_decay": 0.1}
    ours = muon.Muon([group], lr=0.01, betas=(0.9, 0.95))
    theirs = torch.optim.Muon([other], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    start = weight.detach().clone()
    for step in range(3):
        gradient = torch.randn(48, 32, generator=torch.Generator().manual_seed(step))
        weight.grad, other.grad, several.grad = gradient.clone(), gradient.clone(), gradient.expand(2, 48, 32).clone()
        ours.step()
        theirs.step()
    assert error(weight.data - start, other.data - start) < 0.02  # bf16 products in another order
    torch.testing.assert_close(several.data[0], weight.data, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("name", ["micro", "micro-v3"])
def test_lora_starts_at_the_model_trains_little_and_merges(name):
    model = Transformer(preset(name, 50), seed=1)
    plain = copy.deepcopy(model)
    lora.adapt(model, 4)
    assert model(PROMPT).equal(plain(PROMPT))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 0.4 * plain.num_parameters() and all(4 in p.shape for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        model(tokens()[:, :-1], tokens()[:, 1:]).backward()
        optimizer.step()
    for key, value in plain.state_dict().items():
        kept = key.replace(".weight", ".base.weight")
        here = model.state_dict()[kept if kept in model.state_dict() else key]
        assert here.equal(value) or "router.load" in key
    changed = model(PROMPT)
    assert error(changed, plain(PROMPT)) > 0.01
    absorbed = generate(model, PROMPT, 10)
    lora.merge(model)
    torch.testing.assert_close(model(PROMPT), changed, atol=1e-4, rtol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters()) and generate(model, PROMPT, 10).equal(absorbed)


@pytest.mark.parametrize("name", ["micro", "micro-v3"])
@pytest.mark.parametrize("how", recompute.HOW)
def test_recomputing_changes_no_gradient(name, how):
    plain, model = (Transformer(preset(name, 50), seed=1) for _ in range(2))
    recompute.apply(model, how)
    for each in (plain, model):
        loss = each(tokens()[:, :-1], tokens()[:, 1:])
        (loss if each.aside is None else loss + each.aside).backward()
    for (key, a), b in zip(plain.named_parameters(), model.parameters()):
        assert a.grad.equal(b.grad), key
    for a, b in zip(plain.experts(), model.experts()):
        assert a.router.load.equal(b.router.load)  # counted once
    assert generate(model, PROMPT, 5).equal(generate(plain, PROMPT, 5))
