"""Memory: ZeRO's worked example, published cache sizes, the ledger's bytes by category, limits of batches."""

import numpy as np
import pytest
import torch

from course_lib import npu, plan
from course_lib.llm import model as llm
from course_lib.llm.config import preset
from course_lib.plan import memory


@pytest.mark.parametrize(("stage", "printed"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zeros_worked_example(stage: int, printed: float) -> None:
    """arXiv 1910.02054, figure 1: 7.5 billion parameters, 64 ranks, K = 12, in GB."""
    found = memory.total(memory.states(7_500_000_000, "bfloat16, ZeRO", ranks=64, stage=stage))
    psi, ranks = 7_500_000_000, 64
    exact = [16 * psi, 4 * psi + 12 * psi / ranks, 2 * psi + 14 * psi / ranks, 16 * psi / ranks]
    assert found == exact[stage]
    assert round(found / 1e9, 1) == printed


def test_bytes_per_parameter() -> None:
    assert {name: memory.total(memory.states(1, name)) for name in memory.PRECISIONS} == {
        "float32": 16, "bfloat16": 8, "bfloat16, ZeRO": 16, "bfloat16, Megatron": 18, "inference": 2,
    }  # fmt: skip


@pytest.mark.parametrize(("element", "precision"), [(4, "float32"), (2, "bfloat16")])
def test_the_ledgers_categories(element: int, precision: str) -> None:
    """Weights, gradients and optimizer states of the course's model after a step, with rounding and rotary tables."""
    npu.use("ascend-910b2")
    model, config = plan.load_model("course-tiny"), preset("tiny", 512)
    made = llm.Transformer(config).to({4: torch.float32, 2: torch.bfloat16}[element]).to("npu")
    optimizer = torch.optim.AdamW(made.parameters(), fused=True)
    rows = torch.zeros(4, 64, dtype=torch.long, device="npu")
    with npu.ledger() as ledger:
        made(rows, rows).backward()
        optimizer.step()
    _, found = ledger.memory_over_time()[-1]
    counts = sum(1 for _ in made.parameters())
    tables = 2 * memory.rounded(element * config.context * config.head_width // 2)
    weights = memory.parameters_rounded(model, element)
    parts = memory.states(plan.count(model).total, precision)
    assert found["weights"] == weights + tables
    assert found["gradients"] == weights
    steps = counts * memory.BLOCK  # AdamW counts its steps in a tensor for each parameter
    assert found["optimizer state"] == 2 * weights + steps
    for name, ours in (("weights", found["weights"] - tables), ("gradients", found["gradients"])):
        assert parts[name] == pytest.approx(ours, rel=0.01)
    assert parts["optimizer states"] == pytest.approx(found["optimizer state"] - steps, rel=0.01)


# -- KV cache -----------------------------------------------------------------------------------------------


def test_elements_per_token_by_kind_of_attention() -> None:
    """DeepSeek-V2, arXiv:2405.04434, table 1: MHA 2·n_h·d_h·l, GQA 2·n_g·d_h·l, MQA 2·d_h·l, MLA (d_c + d_h^R)·l."""
    for name, elements in (
        ("llama-2-7b", 2 * 32 * 128 * 32), ("llama-2-70b", 2 * 8 * 128 * 80), ("palm-540b", 2 * 256 * 118),
        ("deepseek-v3", (512 + 64) * 61),
    ):  # fmt: skip
        assert memory.kv_per_token(plan.load_model(name)) == 2 * elements
        assert memory.kv_per_token(plan.load_model(name), "int8") == elements


@pytest.mark.parametrize("element", [4, 2])
def test_the_courses_cache(element: int) -> None:
    config = preset("tiny", 512)
    cache = llm.Cache(config, batch=3, device="npu", dtype={4: torch.float32, 2: torch.bfloat16}[element])
    found = cache.keys.untyped_storage().nbytes() + cache.values.untyped_storage().nbytes()
    form = {4: "float32", 2: "bfloat16"}[element]
    assert found == memory.kv_cache(plan.load_model("course-tiny"), 3, config.context, form)


@pytest.mark.parametrize(
    ("name", "form", "per_token", "share"),
    [("deepseek-v3.2", "V3.2", 48_068, 100), ("deepseek-v4-pro", "V4", 4_944, 10),
     ("deepseek-v4-flash", "V4", 3_453, 7)],
)  # fmt: skip
def test_cache_at_a_million_tokens(name: str, form: str, per_token: int, share: int) -> None:
    """DeepSeek-V4's report: the caches of V4-Pro and V4-Flash are 10 % and 7 % of V3.2's."""
    tokens = 2**20
    found = memory.kv_cache(plan.load_model(name), 1, tokens, form)
    whole = memory.kv_cache(plan.load_model("deepseek-v3.2"), 1, tokens, "V3.2")
    assert round(found / tokens) == per_token
    assert round(100 * found / whole) == share


@pytest.mark.parametrize("name", ["deepseek-v4-pro", "deepseek-v4-flash"])
def test_against_grouped_queries(name: str) -> None:
    """The same report: about 2 % of a BF16 cache of eight groups of width 128 in as many layers."""
    model = plan.load_model(name)
    grouped = 2**20 * model.layers * 2 * 8 * 128 * 2
    assert round(100 * memory.kv_cache(model, 1, 2**20, "V4") / grouped) == 2


def test_sparse_attention_reads_less_than_it_holds() -> None:
    model = plan.load_model("deepseek-v3.2")
    assert memory.kv_read(model, 1024) == memory.kv_cache(model, 1, 1024)
    at_a_million = memory.kv_read(model, 2**20, "V3.2")
    assert at_a_million == 61 * (2048 * 656 + 2**20 * 132)
    dense = plan.load_model("llama-3-8b")
    assert memory.kv_read(dense, 777) == memory.kv_cache(dense, 1, 777)
    pro = plan.load_model("deepseek-v4-pro")
    assert memory.kv_read(pro, 2**20, "V4") == (61 * 128 * 576 + 30 * (1024 * 576 + 2**18 * 64) + 31 * 2**13 * 576)


# -- limits -------------------------------------------------------------------------------------------------


def test_batch_limit() -> None:
    model, capacity = plan.load_model("llama-2-7b"), 64 * 2**30
    limit = memory.batch_limit(model, capacity, 4096)
    weights = 2 * plan.count(model).total
    assert limit == (capacity - weights) // (4096 * 524288) == 25
    assert weights + memory.kv_cache(model, limit, 4096) <= capacity < weights + memory.kv_cache(model, limit + 1, 4096)
    assert memory.batch_limit(plan.load_model("llama-3-405b"), capacity, 4096) == 0
    contexts = memory.batch_limit(model, capacity, np.array([1024, 4096, 16384]))
    assert contexts.tolist() == [102, 25, 6]


def test_rounding() -> None:
    assert memory.rounded(np.array([1, 512, 513])).tolist() == [512, 512, 1024]
    sizes = [1, 511, 512, 513, 5000, 100_000]
    npu.use("ascend-910b2")
    for size in sizes:
        before = torch.npu.memory_allocated()
        t = torch.empty(size, dtype=torch.uint8, device="npu")
        assert torch.npu.memory_allocated() - before == memory.rounded(size)
        del t


def test_arrays_of_ranks_and_stages() -> None:
    found = memory.total(memory.states(7.5e9, ranks=np.array([64, 64, 1]), stage=np.array([0, 3, 3])))
    assert (found / 1e9).round(3).tolist() == [120.0, 1.875, 120.0]


def test_other_words_are_refused() -> None:
    for call in (
        lambda: memory.states(1, "fp8"), lambda: memory.kv_per_token(plan.load_model("gpt2"), "fp6"),
        lambda: memory.states(1, stage=4), lambda: memory.peak(plan.load_model("gpt2"), 1, 8, "fp8"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="use "):
            call()
