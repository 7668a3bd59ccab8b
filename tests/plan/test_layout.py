"""Layouts: what cannot be is refused with its reason, one by one and many at once, and ranks lie as documented."""

from dataclasses import replace

import numpy as np
import pytest

from course_lib import plan
from course_lib.chip import load_system
from course_lib.plan import stages
from course_lib.plan.layers import layers
from course_lib.plan.layout import RULES, Layout, LayoutError, check, refused

V3, LLAMA = plan.load_model("deepseek-v3"), plan.load_model("llama-2-7b")
NODE = load_system("dgx-h100")
CLUSTER = load_system("h800-cluster")
GOOD = Layout(dp=128, pp=16, ep=64, global_batch=15360, schedule="DualPipe")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dp": 0}, "whole numbers of at least 1"),
        ({"zero": 4}, "ZeRO stages 0 to 3"),
        ({"dp": 64}, "dp·tp·cp·pp = 64·1·1·16 makes 1024, DeepSeek's cluster, 2048 × H800 has 2048"),
        ({"tp": 3, "dp": 2048, "pp": 1}, "chips"),
        ({"pp": 32, "dp": 64}, None),  # 62 layers on 32 stages: the ends' places stay empty
        ({"pp": 64, "dp": 32, "ep": 32, "global_batch": 32 * 128}, None),
        ({"pp": 128, "dp": 16}, "layers: 62 on pp·vpp = 128 stages leave more than 2 places empty"),
        ({"ep": 96, "dp": 128}, "experts: 256 are not divisible by ep 96"),
        ({"ep": 256}, "ep: 256 does not divide cp·dp = 128"),
        ({"global_batch": 15361}, "global_batch: 15361 is not divisible by dp·micro_batch = 128·1"),
        ({"global_batch": 128 * 8}, "schedule: DualPipe cannot be with pp 16, vpp 1 and 8 micro-batches"),
        ({"schedule": "Interleaved1F1B", "vpp": 3}, "layers"),
        ({"schedule": "1F1B", "vpp": 2}, "schedule: 1F1B cannot be with pp 16, vpp 2"),
        ({"cp": 3, "dp": 128}, "chips"),
    ],
)
def test_deepseek_v3(change: dict, said: str | None) -> None:
    layout = replace(GOOD, **change)
    if said is None:
        check(layout, V3, CLUSTER, 4096)
        return
    with pytest.raises(LayoutError) as error:
        check(layout, V3, CLUSTER, 4096)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(tp=8, global_batch=8), None),
        (Layout(dp=8, tp=3), "heads: 32 are not divisible by tp 3; use a divisor of 32"),
        (Layout(cp=8, dp=1, global_batch=8), "context: 4088 tokens cannot be cut into 2·cp = 16 equal parts"),
        (Layout(dp=8, ep=2, global_batch=8), "experts: none are not divisible by ep 2"),
    ],
)
def test_a_dense_model(layout: Layout, said: str | None) -> None:
    system = NODE.having(nodes=max(1, layout.chips // 8))
    context = 4088 if said and "context" in said else 4096
    if said is None:
        check(layout, LLAMA, system, context)
        return
    with pytest.raises(LayoutError, match=said.replace("(", r"\(")):
        check(layout, LLAMA, system, context)


def test_groups_that_lie_unevenly_in_nodes_are_refused() -> None:
    model = replace(LLAMA, heads=36, kv_heads=36, feed_forward=36 * 256)
    with pytest.raises(LayoutError, match="lie unevenly in nodes of 8"):
        check(Layout(tp=6, dp=4, global_batch=4), model, NODE.having(nodes=3), 4096)


def test_grouped_heads_and_tensor_parallelism() -> None:
    model = plan.load_model("llama-2-70b")  # 8 key/value heads
    check(Layout(tp=16, global_batch=1), model, NODE.having(nodes=2), 4096)  # each on two ranks
    with pytest.raises(LayoutError, match="kv_heads: 12 and tp 8: neither divides the other"):
        check(Layout(tp=8, global_batch=1), replace(model, heads=24, kv_heads=12), NODE, 4096)


@pytest.mark.parametrize("word", [{"recompute": "some"}, {"schedule": "gpipe"}, {"kernels": "fast"}, {"gemm": "fp8"},
                                  {"precision": "half"}, {"attention": "sparse"}])  # fmt: skip
def test_an_unknown_word_names_those_that_there_are(word: dict) -> None:
    name, value = next(iter(word.items()))
    with pytest.raises(LayoutError, match=f"{name} is '{value}'; use one of .*(none|1F1B|fused|bfloat16|flash)"):
        refused(Layout(**word), LLAMA, NODE, 4096)


def test_many_get_the_code_that_each_gets_alone() -> None:
    rng = np.random.default_rng(0)
    n = 300
    pick = {name: rng.choice(values, n) for name, values in {
        "dp": [1, 2, 4, 8], "tp": [1, 2, 3, 8], "pp": [1, 2, 4], "vpp": [1, 2], "ep": [1, 2], "micro_batch": [1, 2],
        "zero": [0, 1, 5], "schedule": ["1F1B", "Interleaved1F1B"]}.items()}  # fmt: skip
    fitting = rng.random(n) < 0.8
    pick["dp"] = np.where(fitting, np.maximum(1, 24 // (pick["tp"] * pick["pp"])), pick["dp"])
    system = NODE.having(nodes=3)
    many = Layout(global_batch=96, **pick)
    codes = refused(many, LLAMA, system, 4096)
    assert len(many) == n and set(codes) >= {0, 1, 2, 3, 7, 10}
    for index in range(n):
        one = many[index]
        assert refused(one, LLAMA, system, 4096)[0] == codes[index], one
        if codes[index]:
            with pytest.raises(LayoutError) as error:
                check(one, LLAMA, system, 4096)
            assert len(str(error.value)) > 20
    assert codes.max() <= len(RULES)


def test_a_layout_in_one_line() -> None:
    assert str(replace(GOOD, sp=True)) == "PP16 EP64 DP128 ZeRO-1 SP micro-batch 1 DualPipe"
    assert str(Layout(recompute="full")) == "ZeRO-1 micro-batch 1 recompute full"


@pytest.mark.parametrize(("name", "pp", "vpp", "schedule"), [
    ("deepseek-v3", 16, 1, "1F1B"), ("deepseek-v3", 16, 1, "DualPipe"), ("deepseek-v3", 16, 2, "DualPipeV"),
    ("llama-3-405b", 16, 8, "Interleaved1F1B"), ("llama-2-70b", 4, 5, "Interleaved1F1B"), ("deepseek-v4-pro", 31, 2, "ZBVZeroBubble"),
])  # fmt: skip
def test_every_layer_lies_on_some_rank(name: str, pp: int, vpp: int, schedule: str) -> None:
    model = plan.load_model(name)
    held = stages.on_ranks(model, pp, vpp, schedule)
    assert held[:, :-2].sum() == model.layers + model.mtp
    assert held[:, -2].sum() == held[:, -1].sum() == 1
    assert held[:, :-2].sum(0).max() == max(layer.count for layer in layers(model))


def test_ends_have_a_layer_less_where_places_are_empty() -> None:
    counts = stages.on_stages(plan.load_model("llama-3-405b"), 16)[:, 0]
    assert list(counts) == [7] + [8] * 14 + [7]
