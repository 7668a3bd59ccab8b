"""FLOPs three ways: closed form, the emulated device's ledger, and PyTorch's own counter; and the published ones."""

import json
import sys

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from course_lib import npu, plan
from course_lib.llm import model as llm
from course_lib.llm.config import PRESETS, Config, preset
from course_lib.plan import flops

LARGE = ["llama-2-7b", "llama-2-70b", "llama-3-8b", "llama-3-405b"]


def config_of(model: plan.Model) -> Config:
    """The course's own model in another one's shape."""
    return Config(
        model.vocab_size, model.context, model.width, model.layers, model.heads, model.kv_heads, model.feed_forward,
        model.tied,
    )  # fmt: skip


def without_numbers(model: plan.Model) -> llm.Transformer:
    with torch.device("meta"):
        made = llm.Transformer(config_of(model))
    return made.to_empty(device="npu")


def train(made: llm.Transformer, batch: int, tokens: int) -> npu.Ledger:
    rows = torch.zeros(batch, tokens, dtype=torch.long, device="npu")
    with npu.ledger() as ledger:
        made(rows, rows).backward()
    return ledger


def cube(ledger: npu.Ledger, phase: str, op: str = "") -> int:
    return sum(r.cost.cube_flops for r in ledger.records if r.phase == phase and op in r.op)


# -- the ledger ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["micro", "tiny", "small"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 5), (2, 64)])
def test_training_of_the_courses_model(name: str, batch: int, tokens: int) -> None:
    model = plan.load_model(f"course-{name}")
    ledger = train(llm.Transformer(preset(name, 512)).to("npu"), batch, tokens)
    forward, backward = flops.forward(model, batch, tokens), flops.backward(model, batch, tokens)
    assert cube(ledger, "forward") == flops.total(forward)
    assert cube(ledger, "backward") == flops.total(backward)
    assert cube(ledger, "forward", "attention") == forward["scores"] + forward["mix values"]
    assert cube(ledger, "backward", "attention") == backward["scores"] + backward["mix values"]


@pytest.mark.parametrize("name", LARGE)
def test_training_of_large_models_without_numbers(name: str, shape_only) -> None:
    model = plan.load_model(name)
    ledger = train(without_numbers(model), 1, min(model.context, 8192))
    settings = (model, 1, min(model.context, 8192))
    assert cube(ledger, "forward") == flops.total(flops.forward(*settings))
    assert cube(ledger, "backward") == flops.total(flops.backward(*settings))
    assert ledger.totals().cube_flops == flops.executed(*settings)


def test_each_operator_of_a_layer_alone() -> None:
    model, made = plan.load_model("course-tiny"), llm.Transformer(preset("tiny", 512)).to("npu")
    ledger, forward = train(made, 2, 64), flops.forward(model, 2, 64)
    for name in ("query", "key", "value", "output", "gate", "up", "down", "unembedding"):
        records = [r for r in ledger.records if r.phase == "forward" and r.module.endswith("." + name)]
        assert sum(r.cost.cube_flops for r in records) == forward[name], name
    assert forward["embedding"] == cube(ledger, "forward", "embedding") == 0


@pytest.mark.parametrize("early_stop", [False, True])
def test_full_checkpointing(monkeypatch, early_stop: bool) -> None:
    model, plain = plan.load_model("course-tiny"), llm.Block.forward
    monkeypatch.setattr(llm.Block, "forward", lambda *args: checkpoint(plain, *args, use_reentrant=False))
    with set_checkpoint_early_stop(early_stop):
        ledger = train(llm.Transformer(preset("tiny", 512)).to("npu"), 2, 64)
    again = flops.recompute(model, 2, 64, "full")
    spared = again["down"] if early_stop else 0
    assert cube(ledger, "recompute") + cube(ledger, "backward") == (
        flops.total(again) - spared + flops.total(flops.backward(model, 2, 64))
    )
    assert cube(ledger, "forward") == flops.total(flops.forward(model, 2, 64))


def test_selective_checkpointing(monkeypatch) -> None:
    model, plain = plan.load_model("course-tiny"), llm.attend
    home = sys.modules[llm.Attention.__module__]
    monkeypatch.setattr(home, "attend", lambda *args: checkpoint(plain, *args, use_reentrant=False))
    with set_checkpoint_early_stop(False):
        ledger = train(llm.Transformer(preset("tiny", 512)).to("npu"), 2, 64)
    assert ledger.totals().cube_flops == flops.executed(model, 2, 64, "selective")


def test_frozen_weights_halve_the_backward() -> None:
    """Of all but the embedding, which needs a gradient for there to be a backward at all."""
    model, made = plan.load_model("course-tiny"), llm.Transformer(preset("tiny", 512)).to("npu")
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.startswith("embedding"))
    ledger = train(made, 2, 64)
    assert cube(ledger, "backward") == flops.total(flops.backward(model, 2, 64, trained=False))


@torch.no_grad()
def test_prefill_and_decode_with_a_cache() -> None:
    model, made = plan.load_model("course-tiny"), llm.Transformer(preset("tiny", 512)).to("npu")
    cache = llm.Cache(made.config, batch=3, device="npu")
    rows = torch.zeros(3, 20, dtype=torch.long, device="npu")
    with npu.ledger() as ledger:
        made(rows, cache=cache)
    assert ledger.totals().cube_flops == flops.total(flops.forward(model, 3, 20))
    with npu.ledger() as ledger:
        made(rows[:, :1], cache=cache)
    assert ledger.totals().cube_flops == flops.total(flops.forward(model, 3, 1, context=21))


@torch.no_grad()
def test_decode_of_a_large_model_without_numbers(shape_only) -> None:
    model = plan.load_model("llama-3-8b")
    made = without_numbers(model)
    cache = llm.Cache(made.config, batch=16, device="npu")
    rows = torch.zeros(16, 4096, dtype=torch.long, device="npu")
    made(rows[:, :4095], cache=cache)
    with npu.ledger() as ledger:
        made(rows[:, 4095:], cache=cache)
    assert ledger.totals().cube_flops == flops.total(flops.forward(model, 16, 1, context=4096))


V3 = [name for name in PRESETS if name.endswith("-v3")]  # latent attention, experts, multi-token prediction


@pytest.mark.parametrize("name", V3)
def test_the_courses_model_with_latent_attention_and_experts(name: str) -> None:
    """Logits only: the loss would add multi-token prediction, of one token less."""
    model, made = plan.load_model(f"course-{name}"), llm.Transformer(preset(name, 512)).to("npu")
    with npu.ledger() as ledger:
        made(torch.zeros(2, 48, dtype=torch.long, device="npu")).sum().backward()
    assert cube(ledger, "forward") == flops.total(flops.forward(model, 2, 48))
    assert cube(ledger, "backward") == flops.total(flops.backward(model, 2, 48))
    n, buffers = plan.count(model), sum(b.numel() for key, b in made.named_buffers() if key.endswith("router.bias"))
    assert n.total + n.mtp == made.num_parameters() + buffers
    for convention in llm.CONVENTIONS:
        assert flops.per_token(model, convention, 63, mtp=True) == made.flops_per_token(convention, 63)


# -- PyTorch's counter --------------------------------------------------------------------------------------


def count_by_pytorch(made: torch.nn.Module, rows: torch.Tensor) -> tuple[int, int]:
    with FlopCounterMode(display=False) as forward:
        logits = made(rows).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", ["gpt2", "llama-2-7b", "llama-3-8b", "qwen2.5-72b"])
def test_huggingfaces_model_under_pytorchs_counter(name: str) -> None:
    """Unfused attention, which computes the full square and keeps the scores; shapes without numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads(plan.model._file(name).read_text())["config"]
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), attn_implementation="eager")
        found = count_by_pytorch(made, torch.zeros(2, 128, dtype=torch.long))
    model = plan.load_model(name)
    assert found[0] == flops.total(flops.forward(model, 2, 128, attention="full"))
    assert found[1] == flops.total(flops.backward(model, 2, 128, "full", flash=False))


SMALL_V3 = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": 24,
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 20, "first_k_dense_replace": 1,
    "vocab_size": 128,
}  # fmt: skip


def small_v3(attention: str, tmp_path) -> tuple[torch.nn.Module, plan.Model]:
    """A small model with DeepSeek-V3's parts, latent attention and experts, by transformers; and its shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = json.loads(plan.model._file("deepseek-v3").read_text())["config"] | SMALL_V3
    (tmp_path / "small.json").write_text(json.dumps(fields))
    config = AutoConfig.for_model(**fields)
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
    return made, plan.load_model(tmp_path / "small.json")


def test_latent_attention_and_experts_under_pytorchs_counter(tmp_path) -> None:
    """Run in full: which expert takes a token does not change the sum."""
    made, model = small_v3("eager", tmp_path)
    found = count_by_pytorch(made, torch.randint(128, (2, 32)))
    assert found[0] == flops.total(flops.forward(model, 2, 32, attention="full"))
    assert found[1] == flops.total(flops.backward(model, 2, 32, "full", flash=False))
    assert plan.count(model).total - sum(p.numel() for p in made.parameters()) == 2 * 16  # the choice's bias, a buffer


@pytest.mark.parametrize(("implementation", "attention", "flash"), [("eager", "full", False), ("sdpa", "causal", True)])
def test_latent_attention_and_experts_on_the_device(implementation, attention, flash, tmp_path) -> None:
    """Unfused attention computes the square; the device's operator the triangle, and its scores again in backward."""
    made, model = small_v3(implementation, tmp_path)
    made, rows = made.to("npu"), torch.randint(128, (2, 32)).to("npu")
    with npu.ledger() as ledger:
        made(rows).logits.sum().backward()
    forward, backward = (cube(ledger, phase) for phase in ("forward", "backward"))
    assert forward == flops.total(flops.forward(model, 2, 32, attention=attention))
    assert backward == flops.total(flops.backward(model, 2, 32, attention, flash))


# -- conventions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["micro", "tiny", "small"])
@pytest.mark.parametrize("convention", llm.CONVENTIONS)
@pytest.mark.parametrize("context", [1, 7, 64])
def test_conventions_are_those_of_the_course(name: str, convention: str, context: int) -> None:
    made = llm.Transformer(preset(name, 512))
    assert flops.per_token(plan.load_model(f"course-{name}"), convention, context) == made.flops_per_token(
        convention, context
    )


def test_conventions_agree_with_the_sum_over_operators() -> None:
    for name in plan.models():
        model = plan.load_model(name)
        for convention, attention in (("6N+attention causal", "causal"), ("6N+attention full", "full")):
            step = 3 * flops.total(flops.forward(model, 1, 512, attention=attention))
            assert flops.per_token(model, convention, 512) * 512 == pytest.approx(step, rel=1e-15)


def test_the_error_of_6n() -> None:
    gpt2, llama = plan.load_model("gpt2"), plan.load_model("llama-3-405b")
    assert flops.error(gpt2, 1) == pytest.approx(-2 * 12 * 2 * 768 / (2 * 123532032 + 4 * 12 * 768), rel=1e-3)
    assert -0.03 < flops.error(llama, 4096) < 0  # attention is a fiftieth
    assert flops.error(llama, 131072) < -0.3  # … and here half
    assert flops.error(plan.load_model("course-tiny"), 128, "all") > flops.error(plan.load_model("course-tiny"), 128)


def test_published_cost_per_decoded_token_at_a_million_tokens() -> None:
    """DeepSeek-V4's report: V4-Pro needs 27 % and V4-Flash 10 % of V3.2, in "equivalent FP8" FLOPs, left undefined.

    Raw FLOPs give 26.2 % and 12.1 %. With 2 for attention in BF16, 1 for FP8 and ½ for V4's FP4 indexer, which is our
    assumption, it is 26.5 % and 10.0 %.
    """
    raw, weighted = [], []
    for name, of_indexer in (("deepseek-v3.2", 1), ("deepseek-v4-pro", 0.5), ("deepseek-v4-flash", 0.5)):
        parts = flops.forward(plan.load_model(name), 1, 1, 2**20, absorbed=True)
        core, indexer = parts["scores"] + parts["mix values"], parts["indexer scores"]
        raw.append(flops.total(parts))
        weighted.append(flops.total(parts) + core + (of_indexer - 1) * indexer)
    assert [round(x / 1e9, 1) for x in raw] == [1157.7, 303.2, 140.3]
    assert [round(100 * x / raw[0], 1) for x in raw[1:]] == [26.2, 12.1]
    assert [round(100 * x / weighted[0], 1) for x in weighted[1:]] == [26.5, 10.0]


def test_layers_add_up_to_the_model() -> None:
    for name in plan.models():
        model = plan.load_model(name)
        kinds = plan.layers.layers(model)
        inside = sum(layer.count * flops.total(flops.of_layer(layer, 2, 300)) for layer in kinds)
        whole = flops.forward(model, 2, 300)
        assert inside + whole["unembedding"] == flops.total(whole)


def test_absorbed_latents_decode_without_expanding_the_cache() -> None:
    model = plan.load_model("deepseek-v3")
    plain, absorbed = (flops.forward(model, 1, 1, 4096, absorbed=a) for a in (False, True))
    assert plain["latent up"] == 4096 * absorbed["latent up"]
    assert absorbed["scores"] == plain["scores"] * (512 + 64) // (128 + 64)
    prompt = flops.forward(model, 1, 4096)
    assert prompt["latent up"] == 4096 * absorbed["latent up"]


def test_multi_token_prediction_adds_a_layer_and_another_unembedding() -> None:
    model = plan.load_model("deepseek-v3")
    plain, more = (flops.forward(model, 1, 4096, mtp=mtp) for mtp in (False, True))
    assert more["unembedding"] == 2 * plain["unembedding"]
    assert more["mtp projection"] == 2 * 4096 * 2 * 7168 * 7168
    assert more["expert up"] * 58 == 59 * plain["expert up"]


# -- arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-2-7b", "deepseek-v3.2", "deepseek-v4-pro"])
@pytest.mark.parametrize("attention", flops.ATTENTION)
def test_arrays_give_what_numbers_give(name: str, attention: str) -> None:
    model, batch, tokens, context = plan.load_model(name), [1, 2, 7], [1, 300, 4099], [5000, 300, 9001]
    arrays = flops.forward(model, np.array(batch), np.array(tokens), np.array(context), attention)
    for index, one in enumerate(zip(batch, tokens, context)):
        alone = flops.forward(model, *one, attention)
        assert {key: np.broadcast_to(value, 3)[index] for key, value in arrays.items()} == alone


def test_keys_seen_are_what_counting_gives() -> None:
    for stride, limit in ((1, None), (1, 5), (4, None), (4, 3), (128, None)):
        keys = plan.layers.Keys(stride, limit)
        seen = [min(p // stride, limit or 10**9) for p in range(1, 301)]
        for T, S in ((1, 300), (300, 300), (17, 200), (5, 6)):
            assert keys.causal(T, S) == sum(seen[S - T : S])
            assert keys.full(T, S) == T * seen[S - 1]


def test_other_words_are_refused() -> None:
    model = plan.load_model("gpt2")
    for call in (
        lambda: flops.forward(model, attention="half"), lambda: flops.forward(model, logits="first"),
        lambda: flops.recompute(model, checkpointing="some"), lambda: flops.per_token(model, "8N"),
        lambda: flops.error(model, which="few"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="use one of"):
            call()
    with pytest.raises(ValueError, match="context is 3 for 5 new tokens"):
        flops.forward(model, tokens=5, context=3)
