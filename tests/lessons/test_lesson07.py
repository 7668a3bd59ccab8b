"""Lesson 07: checks on solutions and on mistakes; published memory beside the closed forms."""

import math
import tomllib
from dataclasses import replace

import pytest

from course_lib import data, plan
from course_lib.lessons.check import lesson07 as check
from course_lib.lessons.solutions import lesson07 as solution
from course_lib.plan import activations, memory

GIB = 2**30
CHECKS = {
    check.check_rows_that_fit: solution.rows_that_fit,
    check.check_checkpointed_bytes: solution.checkpointed_bytes,
    check.check_score_bytes: solution.score_bytes,
    check.check_sharded_bytes: solution.sharded_bytes,
}
MISTAKES = [
    (check.check_rows_that_fit, lambda c, n, r, a: (c - (16 if a else 12) * n) / r, "round down"),
    (check.check_rows_that_fit, lambda c, n, r, a: c // r, "before the first row"),
    (check.check_rows_that_fit, lambda c, n, r, a: (c - 4 * n) // r, "moments"),
    (check.check_rows_that_fit, lambda c, n, r, a: (c - 16 * n) // r, "gradients lie there"),  # always held
    (check.check_rows_that_fit, lambda c, n, r, a: (c - 12 * n) // r, "gradients lie there"),  # never held
    (check.check_checkpointed_bytes, lambda L, s, b, i: L * b + s * i, "not those of all layers"),
    (check.check_checkpointed_bytes, lambda L, s, b, i: math.ceil(L / s) * b + i, "come back at once"),
    (check.check_checkpointed_bytes, lambda L, s, b, i: L // s * b + s * i, "may be shorter"),
    (check.check_checkpointed_bytes, lambda L, s, b, i: math.ceil(L / s) * b, "beside what is kept"),
    (check.check_score_bytes, lambda B, H, T, L, e: B * H * T * L * e, "T² of them"),
    (check.check_score_bytes, lambda B, H, T, L, e: B * T * T * L * e, "each head"),
    (check.check_score_bytes, lambda B, H, T, L, e: B * H * T * T * e, "in each layer"),
    (check.check_score_bytes, lambda B, H, T, L, e: B * H * T * T * L, "bytes are asked for"),
    (check.check_score_bytes, lambda B, H, T, L, e: B * H * T * (T + 1) // 2 * L * e, "above the diagonal"),
    (check.check_sharded_bytes, lambda n, P, s: 16 * n / P, "stage 1 shares"),
    (check.check_sharded_bytes, lambda n, P, s: 16 * n, "nothing is shared"),
    (check.check_sharded_bytes, lambda n, P, s: n * (2 / P + 2 / P + 8 / P), "times too little"),
]  # fmt: skip


def test_the_rows_of_the_exercise_are_the_lessons() -> None:
    """`per_row` is activations and the two temporaries of the loss, by the closed forms."""
    tiny = plan.load_model("course-tiny")
    row = activations.total(activations.of_model(tiny, 8, 128, 4)) // 8 + 2 * 4 * tiny.vocab_size * 128
    assert row == 5_911_040 and plan.count(tiny).total == check.PARAMETERS
    fits = [rows for rows in range(1, 20) if memory.peak(tiny, rows, 128) <= check.MINI]
    assert max(fits) == solution.rows_that_fit(check.MINI, check.PARAMETERS, row, False)


def test_the_best_segment_is_the_root() -> None:
    assert min(range(1, 65), key=lambda s: solution.checkpointed_bytes(64, s, 1, 1)) == 8


@pytest.mark.parametrize("stage", range(4))
def test_sharded_states_are_those_of_plan(stage: int) -> None:
    found = memory.total(memory.states(7.5e9, "bfloat16, ZeRO", ranks=64, stage=stage))
    assert found == pytest.approx(solution.sharded_bytes(7.5e9, 64, stage))


def test_scores_are_those_of_plan() -> None:
    layer = activations.of_layer(plan.load_model("course-tiny"), 8, 128, 4, "plain")
    assert 4 * layer["attention probabilities"] == solution.score_bytes(8, 4, 128, 4, 4)


def published() -> dict:
    return tomllib.loads(data.path("published", "memory.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("run", published()["parts"], ids=lambda run: run["name"])
def test_published_parts(run) -> None:
    """States of the layers at 18 bytes a parameter, and the formulas of arXiv:2205.05198, within 0.1 %."""
    D, L, H, t = (run[name] for name in ("width", "layers", "heads", "tensor"))
    gpt3 = plan.load_model("gpt3-175b")
    gpt = replace(gpt3, width=D, layers=L, heads=H, kv_heads=H, head_width=D // H, feed_forward=4 * D)
    held = activations.layers_held(L, run["pipeline"], run["virtual"])
    none = activations.of_layer(gpt, run["batch"], run["context"], tensor=t)
    kept = activations.of_layer(
        gpt, run["batch"], run["context"], checkpointing="selective", tensor=t, sequence_parallel=True
    )
    assert 18 * 12 * L * D * D / t / run["pipeline"] / GIB == pytest.approx(run["states"], rel=1e-3)
    assert held * activations.total(none) / GIB == pytest.approx(run["none"], rel=1e-3)
    assert held * activations.total(kept) / GIB == pytest.approx(run["selective"], rel=1e-3)


@pytest.mark.parametrize("run", published()["sharded"], ids=lambda run: run["name"])
def test_published_sharing(run) -> None:
    """Measured: what 120 more chips take off each of the first 8."""
    n = plan.count(plan.load_model(run["model"])).total
    saved = [memory.total(memory.states(n, "float32", run[ranks], 3)) / GIB for ranks in ("few", "many")]
    assert saved[0] - saved[1] == pytest.approx(run["memory_few"] - run["memory_many"], rel=0.1)
