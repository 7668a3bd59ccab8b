"""Activations three ways: closed form, what the device's allocator holds, and the storages that autograd saves."""

import gc
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from course_lib import npu, plan
from course_lib.llm import model as llm
from course_lib.llm.config import PRESETS, Config, preset
from course_lib.plan import activations, memory

DTYPES = {4: torch.float32, 2: torch.bfloat16}
DENSE = ["micro", "tiny", "small"]


def saved_by(made: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes of every storage that autograd saves, once, without parameters, buffers and inputs."""
    storages: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = made(*inputs)
    for t in (*made.parameters(), *made.buffers(), *inputs):
        storages.pop(t.untyped_storage()._cdata, None)
    out.sum().backward()  # lets go of them
    return sum(storages.values())


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 8), (3, 33), (2, 64)])
def test_what_autograd_saves_of_the_courses_model(name: str, element: int, batch: int, tokens: int) -> None:
    made = llm.Transformer(preset(name, 512)).to(DTYPES[element]).to("npu")
    rows = torch.zeros(batch, tokens, dtype=torch.long, device="npu")
    found = saved_by(made, rows, rows)
    assert found == activations.total(activations.of_model(plan.load_model(f"course-{name}"), batch, tokens, element))


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-v3")])
@pytest.mark.parametrize("element", DTYPES)
def test_latent_attention_and_experts(name: str, element: int) -> None:
    """Logits only, for the loss would bring in multi-token prediction."""
    npu.use("ascend-910b2")
    model = plan.load_model(f"course-{name}")
    made = llm.Transformer(preset(name, 512)).to(DTYPES[element]).to("npu")
    ends = activations.of_ends(model, 2, 48, element)
    loss = ends["log-probabilities"] + ends["sum of the targets' weights"]
    found = saved_by(made, torch.zeros(2, 48, dtype=torch.long, device="npu"))
    assert found == activations.total(activations.of_model(model, 2, 48, element)) - loss


def unfused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: None) -> torch.Tensor:
    """Attention as written on the blackboard, (B, H, T, K) each."""
    T = q.shape[2]
    future = torch.full((T, T), -torch.inf, device=q.device, dtype=q.dtype).triu(1)
    return (q @ k.mT * q.shape[-1] ** -0.5 + future).softmax(-1) @ v


@pytest.mark.parametrize("element", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), [(3, 33), (2, 64)])
def test_without_flash_attention(element: int, batch: int, tokens: int, monkeypatch) -> None:
    """The probabilities are kept, T × T for each head; with as many key heads as query heads, which need no repetition."""
    monkeypatch.setattr(sys.modules[llm.Attention.__module__], "attend", unfused)
    config = replace(preset("tiny", 512), kv_heads=4)
    made = llm.Transformer(config).to(DTYPES[element]).to("npu")
    rows = torch.zeros(batch, tokens, dtype=torch.long, device="npu")
    model = replace(plan.load_model("course-tiny"), kv_heads=4)
    found = saved_by(made, rows, rows)
    assert found == activations.total(activations.of_model(model, batch, tokens, element, "plain"))


def blockwise(made: llm.Transformer, level: str, monkeypatch) -> llm.Transformer:
    """The model with the checkpointing that ``level`` names, by PyTorch's own function."""
    if level == "full":
        plain = llm.Block.forward
        monkeypatch.setattr(llm.Block, "forward", lambda *args: checkpoint(plain, *args, use_reentrant=False))
    if level == "selective":
        attend, home = llm.attend, sys.modules[llm.Attention.__module__]
        monkeypatch.setattr(home, "attend", lambda *args: checkpoint(attend, *args, use_reentrant=False))
    return made


@pytest.mark.parametrize("level", activations.CHECKPOINTING)
@pytest.mark.parametrize("element", DTYPES)
def test_what_the_device_holds_after_forward(level: str, element: int, monkeypatch) -> None:
    model, config = plan.load_model("course-tiny"), preset("tiny", 512)
    gc.collect()
    npu.use("ascend-910b2")  # on mini blocks would also be kept whole where little is left of them
    made = blockwise(llm.Transformer(config).to(DTYPES[element]).to("npu"), level, monkeypatch)
    rows = torch.zeros(4, 96, dtype=torch.long, device="npu")
    before = torch.npu.memory_allocated()
    weights = memory.parameters_rounded(model, element)
    tables = 2 * memory.rounded(element * config.context * config.head_width // 2)
    assert before == weights + tables + memory.rounded(8 * 4 * 96)
    loss = made(rows, rows)
    assert torch.npu.memory_allocated() - before == memory.activations_rounded(
        model, 4, 96, element, checkpointing=level
    ) + memory.rounded(element)
    del loss


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "llama-2-70b"])
def test_large_models_without_numbers(name: str, shape_only) -> None:
    model = plan.load_model(name)
    config = Config(
        model.vocab_size, model.context, model.width, model.layers, model.heads, model.kv_heads, model.feed_forward,
        model.tied,
    )  # fmt: skip
    with torch.device("meta"):
        made = llm.Transformer(config).to(torch.bfloat16)
    made.to_empty(device="npu")
    rows = torch.zeros(2, 2048, dtype=torch.long, device="npu")
    before, blocks = requested(), torch.npu.memory_allocated()
    loss = made(rows, rows)
    assert requested() - before - 2 == activations.total(activations.of_model(model, 2, 2048))
    held = torch.npu.memory_allocated() - blocks
    assert (
        1 <= held / memory.activations_rounded(model, 2, 2048, 2) < 1.03
    )  # a large block is kept whole if less than 1 MiB is left of it
    del loss


def requested() -> int:
    return torch.npu.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize(
    ("name", "level", "batch"),
    [("micro", "none", 4), ("tiny", "none", 8), ("tiny", "full", 1), ("tiny", "full", 8), ("small", "full", 4)],
)
def test_peak_of_a_training_step(name: str, level: str, batch: int, monkeypatch) -> None:
    """Within 3 %: the formula leaves out small temporaries and rounding."""
    model, config = plan.load_model(f"course-{name}"), preset(name, 512)
    npu.use("ascend-910b2", numerics=False)
    made = blockwise(llm.Transformer(config).to("npu"), level, monkeypatch)
    optimizer = torch.optim.AdamW(made.parameters(), fused=True)
    rows = torch.zeros(batch, config.context, dtype=torch.long, device="npu")
    for _ in range(2):
        torch.npu.reset_peak_memory_stats()
        made(rows, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = torch.npu.max_memory_allocated()
    del made, optimizer, rows
    gc.collect()
    assert memory.peak(model, batch, config.context, checkpointing=level) == pytest.approx(found, rel=0.03)


# -- Korthikanti et al. 2022 --------------------------------------------------------------------------------


def statistics(model: plan.Model, batch: int, tokens: int) -> int:
    """Mean and deviation of the two norms of a layer: kept, but not in the paper's formula."""
    return 2 * 2 * activations.STATISTIC * batch * tokens


@pytest.mark.parametrize(("tensor", "batch", "tokens"), [(1, 1, 2048), (8, 4, 2048), (2, 3, 512)])
def test_the_papers_formulas(tensor: int, batch: int, tokens: int) -> None:
    """Equations 1, 2, 4 and 6 of arXiv:2205.05198."""
    model = plan.load_model("gpt3-175b")
    s, b, h, a, t = tokens, batch, model.width, model.heads, tensor

    def ours(checkpointing: str = "none", sequence_parallel: bool = False) -> float:
        parts = activations.of_layer(
            model, b, s, checkpointing=checkpointing, tensor=t, sequence_parallel=sequence_parallel
        )
        return activations.total(parts) - statistics(model, b, s) / (t if sequence_parallel else 1)

    assert ours() == pytest.approx(s * b * h * (10 + 24 / t + 5 * a * s / (h * t)), rel=1e-15)
    assert ours(sequence_parallel=True) == pytest.approx(s * b * h / t * (34 + 5 * a * s / h), rel=1e-15)
    assert ours("selective", sequence_parallel=True) == pytest.approx(34 * s * b * h / t, rel=1e-15)
    full = activations.total(activations.of_layer(model, b, s, checkpointing="full"))
    assert full == 2 * s * b * h


def test_its_parts() -> None:
    """Attention 11sbh + 5as²b, MLP 19sbh, norms 4sbh (section 4.1)."""
    model, sbh = plan.load_model("gpt3-175b"), 2048 * 12288
    parts = activations.of_layer(model, 1, 2048)
    attention = ("attention norm result", "query and key", "value", "output input", "attention dropout mask")
    assert sum(parts[name] for name in attention) == 11 * sbh
    assert sum(parts[name] for name in parts if name.startswith("softmax")) == 5 * 96 * 2048**2
    mlp = ("feed-forward norm result", "GELU input", "GELU result", "feed-forward dropout mask")
    assert sum(parts[name] for name in mlp) == 19 * sbh
    assert parts["attention norm input"] + parts["feed-forward norm input"] == 4 * sbh
    assert 5 * 96 * 2048 / 12288 == 80  # the paper's example: selective recomputation removes 80 of 114


class MegatronLayer(torch.nn.Module):
    """The layer that the formula describes: three dropouts, GELU, biases; no mask and no scale, which save nothing."""

    def __init__(self, h: int, a: int) -> None:
        super().__init__()
        self.a, linear = a, torch.nn.Linear
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(h) for _ in range(2))
        self.qkv = torch.nn.ModuleList(linear(h, h) for _ in range(3))
        self.out, self.up, self.down = linear(h, h), linear(h, 4 * h), linear(4 * h, h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, h = x.shape
        normed = self.norms[0](x)
        q, k, v = (m(normed).view(b, s, self.a, -1).transpose(1, 2) for m in self.qkv)  # (b, a, s, h/a) each
        q, k, v = (t.reshape(b * self.a, s, -1) for t in (q, k, v))
        p = torch.native_dropout(torch.bmm(q, k.mT).softmax(-1), 0.1, True)[0]  # (b·a, s, s)
        y = torch.bmm(p, v).view(b, self.a, s, -1).transpose(1, 2).reshape(b, s, h)
        x = x + torch.native_dropout(self.out(y), 0.1, True)[0]
        return x + torch.native_dropout(self.down(torch.nn.functional.gelu(self.up(self.norms[1](x)))), 0.1, True)[0]


@pytest.mark.parametrize(("s", "b", "h", "a"), [(16, 2, 32, 4), (64, 3, 48, 2)])
@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_the_papers_layer_executed(s: int, b: int, h: int, a: int, device: str) -> None:
    """sbh(34 + 5as/h) is what autograd saves of that layer in 16 bits, with its input, beside statistics."""
    layer = MegatronLayer(h, a).to(torch.bfloat16).to(device)
    x = torch.zeros(b, s, h, dtype=torch.bfloat16, device=device, requires_grad=True)
    element_of_statistics = layer.norms[0](x).grad_fn._saved_result1.element_size()  # CPU keeps them in 16 bits
    found = saved_by(layer, x) + x.untyped_storage().nbytes()
    assert found - 2 * 2 * b * s * element_of_statistics == s * b * h * (34 + 5 * a * s / h)


# figure 1: GiB per GPU. layers, hidden, heads, micro-batch, tensor, pipeline, interleaved chunks → states, activations
FIGURE_1 = {
    "22B": ((48, 6144, 64, 4, 8, 1, 1), (45.56, 59.25, 9.56)),
    "175B": ((96, 12288, 96, 1, 8, 8, 3), (45.56, 66.84, 12.35)),
}


@pytest.mark.parametrize("name", FIGURE_1)
def test_figure_1(name: str) -> None:
    """Activations exactly; states, too, with the paper's 12·L·h² parameters, and within 5 % with all of the layers."""
    (L, h, a, b, t, p, v), (states, plain, least) = FIGURE_1[name]
    model = plan.Model(
        name,
        name,
        "arXiv 2205.05198, table 3",
        h,
        L,
        a,
        a,
        h // a,
        4 * h,
        51200,
        2048,
        True,
        gated=False,
        qkv_bias=True,
    )
    gib = 2**30
    counted = memory.total(memory.states(12 * L * h * h, "bfloat16, Megatron")) / (t * p)
    assert round(counted / gib, 2) == states
    whole = memory.total(memory.states(plan.count(model).without_embeddings, "bfloat16, Megatron")) / (t * p)
    assert whole / gib == pytest.approx(states, rel=0.05)
    held = activations.layers_held(L, p, v)
    settings = {"tensor": t, "batch": b, "tokens": 2048}
    of_layer = activations.total(activations.of_layer(model, **settings)) - statistics(model, b, 2048)
    assert round(held * of_layer / gib, 2) == plain
    reduced = activations.of_layer(model, checkpointing="selective", sequence_parallel=True, **settings)
    assert round(held * (activations.total(reduced) - statistics(model, b, 2048) / t) / gib, 2) == least
    assert held * activations.total(activations.of_layer(model, **settings)) / gib == pytest.approx(plain, rel=0.05)


def test_what_is_not_modelled_says_so() -> None:
    with pytest.raises(ValueError, match="compressed attention is not modelled"):
        activations.of_layer(plan.load_model("deepseek-v4-flash"), 1, 64)
    with pytest.raises(ValueError, match="use 'flash' or 'plain'"):
        activations.of_layer(plan.load_model("llama-2-7b"), 1, 64, attention="fast")
    with pytest.raises(ValueError, match="use one of none, selective, full"):
        activations.of_layer(plan.load_model("llama-2-7b"), 1, 64, checkpointing="some")
    with pytest.raises(ValueError, match="how the weights are cut"):
        memory.parameters_rounded(plan.load_model("deepseek-v3"))
