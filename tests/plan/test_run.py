"""Time: published utilisations, single operators as the ledger has them, rooflines, speed of the closed forms."""

import time

import numpy as np
import pytest
import torch

from course_lib import chip, npu, plan
from course_lib.llm import model as llm
from course_lib.llm.config import preset
from course_lib.plan import flops, memory, operators, run

# -- single operators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "tokens"), [(2, 64), (1, 7)])
def test_operators_are_those_of_the_ledger(batch: int, tokens: int) -> None:
    """The products of a forward pass: FLOPs, bytes and picoseconds, each as the device charges it."""
    npu.use("ascend-910b2")
    made = llm.Transformer(preset("tiny", 512)).to("npu")
    rows = torch.zeros(batch, tokens, dtype=torch.long, device="npu")
    with torch.no_grad(), npu.ledger() as ledger:
        made(rows)
    settings = {"batch": batch, "tokens": tokens, "dtype": "float32"}
    priced = operators.priced(plan.load_model("course-tiny"), chip.load_chip("ascend-910b2"), **settings)
    ours = sorted(
        (r.cost.cube_flops, r.cost.bytes, r.cost.ps) for r in priced for _ in range(r.layers) if r.name != "attention"
    )
    assert ours == sorted((r.cost.cube_flops, r.cost.bytes, r.cost.ps) for r in ledger.records if r.op == "linear")
    attention = [r.cost for r in ledger.records if "attention" in r.op]
    found = [r.cost for r in priced if r.name == "attention"]
    assert found[0].cube_flops == attention[0].cube_flops and found[0].vector_flops == attention[0].vector_flops
    statistics = 4 * batch * tokens * 4  # forward also writes a row's log-sum, which backward needs
    assert attention[0].bytes - found[0].bytes == statistics


@pytest.mark.parametrize("name", ["llama-2-7b", "deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash", "gpt2"])
@pytest.mark.parametrize(("tokens", "context"), [(256, 256), (1, 4096)])
def test_operators_add_up_to_the_closed_form(name: str, tokens: int, context: int) -> None:
    model = plan.load_model(name)
    found = 0
    for op in operators.operators(model, 4, tokens, context, absorbed=True):
        found += op.layers * sum(2 * m.batch * m.m * m.k * m.n for m in op.work.matmuls)
    assert found == flops.total(flops.forward(model, 4, tokens, context, absorbed=True))


def test_decode_is_bound_by_memory_and_prefill_by_the_cube() -> None:
    model, ascend = plan.load_model("llama-2-7b"), chip.load_chip("ascend-910b2")
    decode = operators.priced(model, ascend, batch=1, tokens=1, context=4096)
    assert {row.cost.bound for row in decode if row.name not in ("attention",)} == {"memory"}
    assert run.decode(model, ascend, 1, 4096).bound == "memory"
    assert run.prefill(model, ascend, 1, 4096).bound == "cube"


# -- published utilisations ---------------------------------------------------------------------------------


def test_mfu_of_palm() -> None:
    """arXiv 2204.02311, section 4.1: 46.2 % at 238.3 thousand tokens/s on 6144 TPU v4 of 275 TFLOP/s."""
    palm = plan.load_model("palm-540b")
    found = run.mfu(palm, 238.3e3, 6144, 275e12, "6N+attention full", 2048)
    assert round(100 * found.value, 1) == 46.2
    assert round(100 * run.mfu(palm, 238.3e3, 6144, 275e12, "6N", 2048).value, 1) == 45.7


@pytest.mark.parametrize(("convention", "printed"), [("6N+attention causal", 38.94), ("6N+attention full", 43.73)])
def test_mfu_of_deepseek_v3(convention: str, printed: float) -> None:
    """arXiv 2505.09343, table 4: 272.80 billion tokens a day on 2048 H800, of the BF16 peak. Ours are 0.3 % above.

    The FLOPs per token that the table implies are 249.7 and 280.2 billion, ours 250.5 and 281.2. Leaving out the router
    would give 249.8 and 280.5, within the rounding of the table; nothing was adjusted.
    """
    v3 = plan.load_model("deepseek-v3")
    found = run.mfu(v3, 272.80e9 / 86400, 2048, 385e12 / 0.3894, convention, 4096)
    assert 100 * found.value == pytest.approx(printed, rel=0.004)
    assert str(found).endswith(f"% ({convention}; bfloat16 cube peak 988.7 TFLOP/s × 2048)")


def test_training_time_of_deepseek_v3() -> None:
    """180 thousand H800 hours per 10^12 tokens, 3.7 days on 2048 (arXiv 2412.19437), at the MFU of the later paper."""
    v3 = plan.load_model("deepseek-v3")
    seconds = run.training_time(v3, 1e12, 2048, 385e12 / 0.3894, 0.3894, "6N+attention causal", 4096)
    assert seconds * 2048 / 3600 == pytest.approx(180e3, rel=0.01)
    assert round(seconds / 86400, 1) == 3.7
    assert run.tokens_per_second(v3, 2048, 385e12 / 0.3894, 0.3894, "6N+attention causal", 4096) == pytest.approx(
        1e12 / seconds
    )


def test_hfu_counts_recomputation() -> None:
    llama = plan.load_model("llama-2-7b")
    mfu = run.mfu(llama, 4000, 1, chip.load_chip("a100"), "6N+attention causal", 4096)
    plain, full = (run.hfu(llama, 4000, 1, chip.load_chip("a100"), level, 4096) for level in ("none", "full"))
    assert mfu.value < plain.value < full.value
    assert full.value / mfu.value == pytest.approx(4 / 3, rel=0.05)
    assert "executed, checkpointing full, flash attention" in str(full)


def test_an_unknown_peak_says_so() -> None:
    llama, unknown = plan.load_model("llama-2-7b"), chip.load_chip("ascend-310")
    assert unknown.peak("bfloat16") is None
    assert str(run.mfu(llama, 1, 1, unknown, "6N")) == "unknown (6N; bfloat16 cube peak unknown)"
    with pytest.raises(chip.UnknownFigure, match="is unknown: no source gives it; pass a number"):
        run.training_time(llama, 1, 1, unknown, 0.4, "6N")


# -- phases -------------------------------------------------------------------------------------------------


def test_prefill_of_llama_2_7b_on_an_a100() -> None:
    """120.5 ms measured with TensorRT-LLM at 2048 tokens (LLM-Viewer issue 4); calculators give 94.5 to 119.4.

    Ours: 89 ms with all of the peak, and 99 to 125 ms operator by operator, with launches and measured shares.
    """
    llama, a100 = plan.load_model("llama-2-7b"), chip.load_chip("a100")
    assert 1e3 * run.prefill(llama, a100, 1, 2048).seconds == pytest.approx(88.5, abs=0.1)
    rows = operators.priced(llama, a100, batch=1, tokens=2048)
    assert 99 < sum(row.ps for row in rows) / 1e9 < 125


def test_decode_reads_weights_and_cache() -> None:
    llama, ascend = plan.load_model("llama-2-7b"), chip.load_chip("ascend-910b2")
    found = run.decode(llama, ascend, np.array([1, 16]), 2048)
    n = plan.count(llama)
    assert found.bytes.tolist() == [2 * (n.total - n.embedding) + B * memory.kv_cache(llama, 1, 2048) for B in (1, 16)]
    assert found.seconds == pytest.approx(found.bytes / ascend.memory_bandwidth)
    assert run.decode(llama, ascend, 1, 2048, efficiency=(1, 0.5)).seconds == pytest.approx(2 * found.seconds[0])


def test_experts_reached() -> None:
    v3 = plan.load_model("deepseek-v3")
    assert run.experts_read(v3, 1) == pytest.approx(8)
    assert run.experts_read(v3, 10_000) == pytest.approx(256)
    n = plan.count(v3)
    assert run.weights_read(v3, 1) == pytest.approx(n.active, rel=1e-6)
    assert run.weights_read(v3, 100_000) == pytest.approx(n.total - n.embedding, rel=1e-6)


def test_serving_trades_latency_for_throughput() -> None:
    llama, ascend = plan.load_model("llama-2-7b"), chip.load_chip("ascend-910b2")
    batches = np.array([1, 4, 16, 64])
    found = run.serve(llama, ascend, batches, 1024, 256)
    assert np.all(np.diff(found.tpot) > 0) and np.all(np.diff(found.tokens_per_s) > 0)
    assert found.fits.tolist() == (batches <= memory.batch_limit(llama, ascend.memory_bytes, 1280)).tolist()


def test_optimizer_bytes_are_those_of_the_ledger() -> None:
    """AdamW in float32: weights, gradients and two moments read, all but the gradients written."""
    made = llm.Transformer(preset("tiny", 512)).to("npu")
    optimizer = torch.optim.AdamW(made.parameters(), fused=True)
    rows = torch.zeros(1, 8, dtype=torch.long, device="npu")
    with npu.ledger() as ledger:
        made(rows, rows).backward()
        optimizer.step()
    found = sum(r.cost.bytes for r in ledger.records if "adamw" in r.op)
    phases = {
        p.name: p for p in run.train(plan.load_model("course-tiny"), chip.load_chip("mini"), 1, 8, "float32", "float32")
    }
    assert found == phases["optimizer"].bytes
    forward = sum(r.cost.cube_flops for r in ledger.records if r.phase == "forward")
    assert phases["forward"].flops == forward


# -- speed --------------------------------------------------------------------------------------------------


def test_a_hundred_thousand_configurations_a_second() -> None:
    """Training and serving of 100,000 configurations each; the bound leaves a slow, shared machine room."""
    n, rng = 100_000, np.random.default_rng(0)
    batch, context, chips = rng.integers(1, 512, n), rng.integers(128, 32768, n), 2 ** rng.integers(0, 12, n)
    llama, ascend = plan.load_model("llama-3-70b"), chip.load_chip("ascend-910b2")
    start = time.perf_counter()
    seconds = run.training_time(llama, 1e12, chips, ascend, 0.4, "6N+attention causal", context)
    peak = memory.peak(llama, batch, context, "bfloat16, ZeRO")
    training = time.perf_counter() - start
    start = time.perf_counter()
    served = run.serve(llama, ascend, batch, context, 256)
    serving = time.perf_counter() - start
    assert len(seconds) == len(peak) == len(served.tpot) == n
    print(f"{n / training:,.0f} training and {n / serving:,.0f} serving configurations a second")
    assert training < 1 and serving < 1
