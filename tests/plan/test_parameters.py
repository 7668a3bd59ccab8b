"""Parameters three ways: closed form, numel of executed models, and what is published, to the precision printed."""

import json
import re

import pytest
import torch

from course_lib import plan
from course_lib.llm.config import preset
from course_lib.llm.model import Transformer
from course_lib.plan import flops

UNITS = {"": 1, "M": 10**6, "B": 10**9, "T": 10**12}


def within(ours: float, printed: str) -> bool:
    """Whether ``ours`` rounds to what is printed ("671B", "3.14e23", "70272")."""
    mantissa, exponent, unit = re.fullmatch(r"([\d.]+)(?:e(\d+))?([MBT]?)", printed).groups()
    scale = UNITS[unit] * 10 ** int(exponent or 0)
    places = len(mantissa.partition(".")[2])
    return round(ours / scale, places) == float(mantissa)


def ours(figure: str, name: str) -> float:
    model, n = plan.load_model(name), plan.count(plan.load_model(name))
    return {
        "parameters": lambda: n.total,
        "parameters of the paper": lambda: n.total,
        "parameters without embeddings": lambda: n.without_embeddings,
        "active parameters": lambda: n.active,
        "KV bytes per token": lambda: plan.memory.kv_per_token(model),
        "training FLOPs per token": lambda: flops.per_token(model, "6N+attention causal", 4096),
        "training FLOPs": lambda: 6 * n.total * 300e9,
    }[figure]()


PUBLISHED = [(name, figure) for name in plan.models() for figure in plan.published(name)]


@pytest.mark.parametrize(("name", "figure"), PUBLISHED)
def test_published(name: str, figure: str) -> None:
    """To the printed precision; a figure that says why it is missed must really be missed."""
    row = plan.published(name)[figure]
    assert within(ours(figure, name), row["printed"]) == ("missed" not in row)


def test_the_table_is_not_empty() -> None:
    assert len(PUBLISHED) >= 20


@pytest.mark.parametrize(
    ("name", "total", "with_mtp", "active_with_embedding", "active"),
    [
        ("deepseek-v3", 671.03, None, 37.55, 36.62), ("deepseek-v4-pro", 1573.0, 1598.8, 49.8, 48.85),
        ("deepseek-v4-flash", 284.3, 290.9, 13.80, 13.27),
    ],
)  # fmt: skip
def test_counts_from_the_tensors_of_the_checkpoints(name, total, with_mtp, active_with_embedding, active) -> None:
    """Sums over the shapes in the checkpoints' tensor listings, billions; ours differ by less than their rounding."""
    n = plan.count(plan.load_model(name))
    assert n.total / 1e9 == pytest.approx(total, abs=0.06)
    assert with_mtp is None or (n.total + n.mtp) / 1e9 == pytest.approx(with_mtp, abs=0.06)
    assert (n.active + n.embedding) / 1e9 == pytest.approx(active_with_embedding, abs=0.03)
    assert n.active / 1e9 == pytest.approx(active, abs=0.006)


def test_the_indexer_adds_its_share() -> None:
    v3, v32 = (plan.count(plan.load_model(name)).total for name in ("deepseek-v3", "deepseek-v3.2"))
    assert round((v32 - v3) / 1e9, 2) == 0.85


# arXiv 2104.04473, table 1: billions of parameters as printed, layers, width, heads; 51200 tokens, sequences of 2048
NARAYANAN = [
    (1.7, 24, 2304, 24), (3.6, 30, 3072, 32), (7.5, 36, 4096, 32), (39.1, 48, 8192, 64), (76.1, 60, 10240, 80),
    (145.6, 80, 12288, 96), (529.6, 105, 20480, 128),
]  # fmt: skip


def gpt(L: int, h: int, a: int) -> plan.Model:
    return plan.Model(
        "gpt", "gpt", "arXiv 2104.04473, table 1", h, L, a, a, h // a, 4 * h, 51200, 2048, True, False, True
    )


@pytest.mark.parametrize(("printed", "L", "h", "a"), NARAYANAN)
def test_the_models_of_megatrons_table(printed: float, L: int, h: int, a: int) -> None:
    """Parameters as printed; and its FLOPs of an iteration, 96·B·s·l·h²·(1 + s/6h + V/16lh), which count recomputation."""
    model, s, V, B = gpt(L, h, a), 2048, 51200, 512
    assert round(plan.count(model).total / 1e9, 1) == printed
    assert plan.count(model).total == 12 * L * h * h + 13 * L * h + (V + s) * h + 2 * h
    executed = flops.executed(model, B, s, "full", attention="full", flash=False)
    assert executed == 96 * B * s * L * h * h + 16 * B * s * s * L * h + 6 * B * s * h * V


@pytest.mark.parametrize("name", ["micro", "tiny", "small"])
def test_the_courses_model(name: str) -> None:
    model, n = Transformer(preset(name, 512)), plan.count(plan.load_model(f"course-{name}"))
    assert n.total == model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert n.multiplying == model.num_multiplying()


@pytest.mark.parametrize("name", ["gpt2", "gpt3-175b", "llama-2-70b", "llama-3-405b", "qwen2.5-72b", "deepseek-v3"])
def test_huggingfaces_model_has_as_many(name: str) -> None:
    """The same fields, given to transformers, which builds the model without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads(plan.model._file(name).read_text())["config"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    n = plan.count(plan.load_model(name))
    biases_of_choice = sum(b.numel() for key, b in model.named_buffers() if "correction_bias" in key)
    assert n.total == sum(p.numel() for p in model.parameters()) + biases_of_choice
