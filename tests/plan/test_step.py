"""A step: its operators against the emulated device, its sums against closed forms, memory against published figures."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

from course_lib import chip, npu, plan
from course_lib.chip import load_system
from course_lib.llm.config import Config, Experts, Latent
from course_lib.llm.model import Transformer
from course_lib.plan import flops, footprint, schedule, share
from course_lib.plan.layout import Layout, LayoutError
from course_lib.plan.step import PARTS, plan_many
from course_lib.plan.step import plan as plan_step

NODE = load_system("atlas-800t-a2")
CLUSTER = load_system("h800-cluster")
LLAMA, V3 = plan.load_model("llama-2-7b"), plan.load_model("deepseek-v3")
TRAINED = Layout(
    dp=128, pp=16, ep=64, global_batch=15360, schedule="DualPipe", overlap_ep=True, recompute="cheap", copies=4
)  # fmt: skip

# -- against the emulated device --------------------------------------------------------------------------------


def config_of(model: plan.Model, count: int, context: int, dense: bool) -> Config:
    """The course's model in the shape of a planned one, with ``count`` layers."""
    a, e = model.latent, model.experts
    more = {"latent": Latent(a.query_rank, a.rank, a.nope, a.rope, a.value)} if a else {}
    if e:
        more["experts"] = Experts(e.routed, e.active, e.shared, e.width, first_dense=count if dense else 0)
    return Config(
        vocab_size=model.vocab_size, context=context, width=model.width, layers=count, heads=model.heads,
        kv_heads=model.kv_heads, feed_forward=model.feed_forward, tied=False, **more,
    )  # fmt: skip


def device_ms(config: Config) -> tuple[float, float]:
    """Emulated milliseconds of forward and of backward, one sequence, bfloat16, shapes only."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device="npu").to(torch.bfloat16)
    tokens = torch.zeros(1, config.context, dtype=torch.long, device="npu")
    with npu.ledger() as ledger:
        loss = model(tokens, tokens)
        there = len(ledger.records)
        loss.backward()
    times = [record.cost.ps / 1e9 for record in ledger.records]
    return sum(times[:there]), sum(times[there:])


@pytest.mark.parametrize(
    ("name", "on", "context", "dense"),
    [
        ("llama-2-7b", "ascend-910b3", 4096, False), ("llama-2-70b", "ascend-910b3", 4096, False),
        ("llama-3-405b", "ascend-910b2", 8192, False), ("deepseek-v3", "ascend-910c-die", 4096, False),
        ("deepseek-v3", "ascend-910c-die", 4096, True),
    ],
)  # fmt: skip
def test_a_layer_takes_what_the_device_charges(name: str, on: str, context: int, dense: bool) -> None:
    """Forward and backward of a layer, and of what is around it, within 3 % of shape-only execution on one rank."""
    model = plan.load_model(name)
    if model.experts:  # so many as fit on one die
        model = replace(model, experts=replace(model.experts, routed=64))
    npu.use(on, numerics=False)
    try:
        one, two = (device_ms(config_of(model, count, context, dense)) for count in (1, 2))
    finally:
        gc.collect()
        npu.use("mini")
    shape = share.Shape(context=context, kernels="eager")
    layer = 1e3 * share.seconds(chip.load_chip(on), share.operators(model, 0 if dense else 3, shape))
    ends = share.first(model, shape) + share.last(replace(model, mtp=0), shape)
    around = 1e3 * share.seconds(chip.load_chip(on), ends)
    assert layer[0].sum() == pytest.approx(two[0] - one[0], rel=0.03)
    assert layer[1:3].sum() == pytest.approx(two[1] - one[1], rel=0.03)
    assert around[0].sum() == pytest.approx(2 * one[0] - two[0], rel=0.03)
    assert around[1:3].sum() == pytest.approx(2 * one[1] - two[1], rel=0.03)


def device_step(config: Config) -> float:
    """Emulated seconds of a training step with clipping and AdamW, shapes only."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device="npu").to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.zeros(1, config.context, dtype=torch.long, device="npu")
    for _ in range(2):
        with npu.ledger() as ledger:
            model(tokens, tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return sum(record.cost.ps for record in ledger.records) / 1e12


def test_a_whole_step_takes_what_the_device_charges() -> None:
    """Forward, backward, clipping and AdamW of eight layers of Llama 2 7B on one chip, within 3 %."""
    model = replace(LLAMA, layers=8)
    npu.use("ascend-910b3", numerics=False)
    try:
        charged = device_step(config_of(model, 8, 4096, False))
    finally:
        gc.collect()
        npu.use("mini")
    alone = NODE.having(chip="ascend-910b3", chips_per_node=1)
    ours = plan_step(model, alone, Layout(global_batch=1, kernels="eager", precision="bfloat16"), 4096)
    assert ours.seconds == pytest.approx(charged, rel=0.03)


# -- against closed forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-2-70b", "deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash"])
@pytest.mark.parametrize(
    "shape", [share.Shape(), share.Shape(tp=8, sp=True), share.Shape(ep=16), share.Shape(cp=2, tp=2, ep=4)]
)
def test_the_ranks_do_the_work_of_the_whole(name: str, shape: share.Shape) -> None:
    """Products of all TP × CP ranks together are those of the whole layer; ranks of EP each have tokens of their own."""
    model = plan.load_model(name)
    index = model.layers - 1
    layer = share.kind_of(model, index)
    whole = flops.of_layer(layer, shape.micro_batch, shape.context)
    found: dict[str, int] = {}
    for op in share.operators(model, index, shape):
        if op.phase == "forward" and op.work.matmuls:
            done = sum(2 * m.batch * m.m * m.k * m.n for m in op.work.matmuls)
            found[op.name] = found.get(op.name, 0) + done * shape.tp * shape.cp
    split = {name for matrix in layer.matrices for name in [matrix.name] if name in share.COLUMN | share.ROW}
    ours = sum(value for name, value in found.items() if set(name.split(", ")) <= split)
    assert ours == pytest.approx(sum(whole[name] for name in split), rel=1e-9)
    attention = found["attention"] + found.get("indexer scores", 0)
    assert attention == pytest.approx(sum(whole[core.name] for core in layer.cores), rel=1e-3)


@pytest.mark.parametrize("name", ["llama-2-70b", "deepseek-v3", "deepseek-v4-pro", "gpt3-175b", "gpt2"])
def test_the_ranks_hold_all_parameters(name: str) -> None:
    model = plan.load_model(name)
    n = plan.count(model)
    places, order = footprint.kinds(model)
    table = footprint.of_kinds(model, places, tp=1, ep=4 if model.experts else 1, alone=True)
    dense, routed = (sum(row[kind] for kind in order) + row[-2:].sum() for row in table)
    assert dense + routed * (4 if model.experts else 1) == n.total + n.mtp


def test_one_and_many_agree() -> None:
    many = Layout(
        dp=np.array([128, 64, 128, 32]), pp=np.array([16, 16, 16, 16]), tp=np.array([1, 2, 1, 4]), ep=np.array([64, 32, 8, 32]),
        zero=np.array([1, 3, 2, 0]), sp=np.array([False, True, False, True]), global_batch=15360,
        recompute=np.array(["cheap", "full", "none", "selective"]), schedule=np.array(["DualPipe", "1F1B", "1F1B", "1F1B"]),
    )  # fmt: skip
    found = plan_many(V3, CLUSTER, many, 4096)
    assert list(found.bound) == [found[i].bound for i in range(4)]
    for index in range(4):
        alone = plan_step(V3, CLUSTER, many[index], 4096)
        assert alone.parts == pytest.approx(found[index].parts) and alone.memory == pytest.approx(found[index].memory)
        assert set(alone.parts) == set(PARTS) and min(alone.parts.values()) >= 0
    with pytest.raises(LayoutError, match="takes one layout, found 4"):
        plan_step(V3, CLUSTER, many, 4096)


def test_the_bubble_is_that_of_the_schedule() -> None:
    """Where nothing is communicated, its share of the step is the closed form's: 30.4 % and 6.8 % of Pangu Ultra."""
    model = replace(plan.load_model("llama-2-70b"), layers=96, kv_heads=64)
    fast = load_system("dgx-h100").having(
        nodes=1, scale_up__bandwidth=1e15, scale_up__peer_bandwidth=1e15, scale_up__latency=1e-12
    )
    shares = []
    for name, vpp in (("1F1B", 1), ("Interleaved1F1B", 6)):
        step = plan_step(model, fast, Layout(pp=8, vpp=vpp, schedule=name, global_batch=16), 4096)
        shares.append(step.parts["bubble"] / (step.seconds - step.parts["optimizer"]))
        expected = schedule.of_total(schedule.bubble(name, 8, vpp, 16))
        assert shares[-1] == pytest.approx(expected, rel=0.05)  # the last rank has the unembedding besides
    assert [round(share, 2) for share in shares] == [0.3, 0.07]


# -- what each choice changes --------------------------------------------------------------------------------------------


def test_hidden_experts_cost_less_and_two_stages_hold_more() -> None:
    hidden = plan_step(V3, CLUSTER, TRAINED, 4096)
    shown = plan_step(V3, CLUSTER, replace(TRAINED, overlap_ep=False), 4096)
    single = plan_step(V3, CLUSTER, replace(TRAINED, schedule="1F1B", overlap_ep=False), 4096)
    assert hidden.parts["EP"] < 0.2 * shown.parts["EP"]
    assert hidden.memory["weights"] > 1.6 * single.memory["weights"]
    assert hidden.parts["bubble"] < single.parts["bubble"]


def test_eight_bits_halve_the_products_and_not_the_attention() -> None:
    sixteen = plan_step(V3, CLUSTER, TRAINED, 4096)
    eight = plan_step(V3, CLUSTER, replace(TRAINED, gemm="float8_e4m3fn"), 4096)
    assert 0.45 < eight.parts["matmul"] / sixteen.parts["matmul"] < 0.75  # the unembedding stays in 16
    assert eight.parts["attention"] == sixteen.parts["attention"]
    assert eight.parts["vector"] > sixteen.parts["vector"]  # casts


def test_zero_divides_memory_and_asks_for_links() -> None:
    stages = [plan_step(LLAMA, NODE.having(nodes=8), Layout(dp=64, zero=z, global_batch=256), 4096) for z in range(4)]
    held = [step.held for step in stages]
    assert held == sorted(held, reverse=True)
    assert stages[1].memory["optimizer states"] == pytest.approx(stages[0].memory["optimizer states"] / 64)
    assert stages[3].memory["weights"] == pytest.approx(stages[0].memory["weights"] / 64)
    assert stages[1].parts["optimizer"] < stages[0].parts["optimizer"] / 32


def test_tensor_parallelism_beyond_a_node_is_slow() -> None:
    model = plan.load_model("llama-2-70b")
    inside, beyond = (
        plan_step(model, NODE.having(nodes=4), Layout(tp=tp, dp=32 // tp, sp=True, global_batch=32), 4096)
        for tp in (8, 16)
    )
    assert beyond.parts["TP"] / 16 > 1.5 * inside.parts["TP"] / 8  # of a micro-batch
    assert beyond.seconds > 1.1 * inside.seconds


def test_recomputation_takes_time_and_gives_memory() -> None:
    made = {
        level: plan_step(LLAMA, NODE, Layout(dp=8, global_batch=8, recompute=level), 4096)
        for level in ("none", "cheap", "full")
    }
    assert made["none"].seconds < made["cheap"].seconds < made["full"].seconds
    assert made["none"].memory["activations"] > made["cheap"].memory["activations"] > made["full"].memory["activations"]
    work = [flops.executed(LLAMA, 1, 4096, level) for level in ("none", "full")]
    ratio = (made["full"].parts["matmul"] + made["full"].parts["attention"]) / (
        made["none"].parts["matmul"] + made["none"].parts["attention"]
    )
    assert ratio == pytest.approx(work[1] / work[0], rel=0.05)


@pytest.mark.parametrize(
    "change", [{"comm_cores": 132}, {"gemm_share": 0.5}, {"gemm": "float8_e4m3fn", "gemm_share": 1.5}]
)
def test_cores_and_shares_that_cannot_be(change: dict) -> None:
    with pytest.raises(LayoutError, match="comm_cores: 132|gemm_share is"):
        plan_step(V3, CLUSTER, replace(TRAINED, **change), 4096)


# -- memory against published figures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recompute", "sp", "printed"), [("none", False, 59.25), ("selective", True, 9.56)])
def test_activations_of_22b(recompute: str, sp: bool, printed: float) -> None:
    """arXiv 2205.05198, figure 1: GiB of activations of 22 B on 8 A100, micro-batches of 4."""
    model = replace(plan.load_model("gpt3-175b"), width=6144, layers=48, heads=64, kv_heads=64, head_width=96,
                    feed_forward=4 * 6144, vocab_size=51200)  # fmt: skip
    shape = share.Shape(tp=8, micro_batch=4, context=2048, sp=sp)
    stays, _ = footprint.kept(model, 0, shape, recompute)
    assert 48 * stays / 2**30 == pytest.approx(printed, rel=0.01)


def test_in_flight_is_that_of_the_papers() -> None:
    """arXiv 2205.05198, section 4.2.3: 1F1B holds p, interleaving p·(1 + (p − 1)/(p·v)); DualPipe p + 1."""
    m = np.array([64])
    assert footprint.in_flight("1F1B", 8, 1, m)[0].tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
    assert footprint.in_flight("Interleaved1F1B", 8, 3, m)[0, 0] == pytest.approx(8 * (1 + 7 / 24))
    assert footprint.in_flight("DualPipe", 16, 1, m)[0].tolist() == [17] * 16
    assert footprint.in_flight("GPipe", 8, 1, m)[0].tolist() == [64] * 8


# -- what a step says ------------------------------------------------------------------------------------------------------


def test_days_energy_and_utilisation() -> None:
    step = plan_step(LLAMA, NODE, Layout(dp=8, global_batch=64), 4096)
    assert step.days(1e12) == pytest.approx(1e12 / step.tokens_per_s / 86400)
    assert step.chip_seconds(1e12) == pytest.approx(step.days(1e12) * 86400 * 8)
    assert step.energy(1e12) == step.chip_seconds(1e12) * chip.load_chip("ascend-910b2").busy_power
    assert plan_step(V3, CLUSTER, TRAINED, 4096).energy(1e12) is None  # nobody has published the H800's
    assert step.mfu().value == pytest.approx(
        flops.per_token(LLAMA, "6N+attention causal", 4096)
        * step.tokens_per_s
        / 8
        / chip.load_chip("ascend-910b2").peak("bfloat16")
    )
    assert step.hfu().value > step.mfu().value
