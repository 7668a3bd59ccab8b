"""Each check, on its solution, on an untouched stub, and on the mistakes that readers make."""

import math

import pytest

from course_lib.lessons.check.lesson00 import check_addition_seconds, check_product_flops, check_training_bytes
from course_lib.lessons.check.lesson01 import (
    check_attention_flops,
    check_expert_flops,
    check_intensity,
    check_multiplying,
)  # fmt: skip
from course_lib.lessons.check.lesson02 import (
    check_adamw_seconds,
    check_backward_flops,
    check_tokens_per_step,
    check_training_days,
)
from course_lib.lessons.check.lesson04 import (
    check_idle_share,
    check_product_seconds,
    check_ridge_point,
    check_rows_to_fill,
)
from course_lib.lessons.check.lesson05 import check_batch_limit, check_tokens_per_pass, check_tpot
from course_lib.lessons.check.lesson06 import check_learning_rate, check_mfu, check_tile_efficiency
from course_lib.lessons.solutions import lesson00, lesson01, lesson02, lesson04, lesson05, lesson06
from tests.lessons import test_lesson03, test_lesson07, test_lesson08

CHECKS = {
    check_product_flops: lesson00.product_flops,
    check_addition_seconds: lesson00.addition_seconds,
    check_training_bytes: lesson00.training_bytes,
    check_ridge_point: lesson04.ridge_point,
    check_product_seconds: lesson04.product_seconds,
    check_rows_to_fill: lesson04.rows_to_fill,
    check_idle_share: lesson04.idle_share,
    check_attention_flops: lesson01.attention_flops,
    check_multiplying: lesson01.multiplying,
    check_expert_flops: lesson01.expert_flops,
    check_intensity: lesson01.intensity,
    check_backward_flops: lesson02.backward_flops,
    check_adamw_seconds: lesson02.adamw_seconds,
    check_tokens_per_step: lesson02.tokens_per_step,
    check_training_days: lesson02.training_days,
    check_batch_limit: lesson05.batch_limit,
    check_tpot: lesson05.tpot,
    check_tokens_per_pass: lesson05.tokens_per_pass,
    check_learning_rate: lesson06.learning_rate,
    check_mfu: lesson06.mfu_causal,
    check_tile_efficiency: lesson06.tile_efficiency,
}
MISTAKES = [
    (check_product_flops, lambda m, k, n: m * k * n, "two operations"),  # off by 2
    (check_product_flops, lambda m, k, n: 2 * m * n, "sum over k"),
    (check_product_flops, lambda m, k, n: m * n * (2 * k - 1), "k additions"),
    (check_product_flops, lambda m, k, n: 2 * (m * k + k * n), "numbers read"),
    (check_addition_seconds, lambda e, b, launch: 12 * e / b, "pays its launch"),
    (check_addition_seconds, lambda e, b, launch: launch + 8 * e / b, "three tensors"),
    (check_addition_seconds, lambda e, b, launch: launch + 3 * e / b, "in bytes"),  # units
    (check_addition_seconds, lambda e, b, launch: 1e6 * (launch + 12 * e / b), "times too much"),  # microseconds
    (check_training_bytes, lambda n: 4 * n, "all that inference keeps"),
    (check_training_bytes, lambda n: 8 * n, "AdamW also remembers"),
    (check_training_bytes, lambda n: 12 * n, "the gradient, or one"),  # forgot the gradient
    (check_training_bytes, lambda n: 128 * n, "not bits"),
    (check_ridge_point, lambda c, f, macs, b: c * f * macs / b, "two operations"),
    (check_ridge_point, lambda c, f, macs, b: f * 2 * macs / b, "all cores"),
    (check_ridge_point, lambda c, f, macs, b: b / (c * f * 2 * macs), "upside down"),
    (check_ridge_point, lambda c, f, macs, b: c * f * 2 * macs / (b / 1e12), "not in TB/s"),  # units
    (check_product_seconds, lambda m, k, n, s, p, b: 2 * m * k * n / p, "bytes have to arrive"),
    (check_product_seconds, lambda m, k, n, s, p, b: s * (m * k + k * n + m * n) / b, "the cube needs its time"),
    (
        check_product_seconds,
        lambda m, k, n, s, p, b: 2 * m * k * n / p + s * (m * k + k * n + m * n) / b,
        "at the same time",
    ),
    (check_product_seconds, lambda m, k, n, s, p, b: max(2 * m * k * n / p, s * (m * k + k * n) / b), "written, too"),
    (check_product_seconds, lambda m, k, n, s, p, b: max(2 * m * k * n / p, (m * k + k * n + m * n) / b), "in bytes"),
    (check_rows_to_fill, lambda p, b, s: p / b, "the ridge in FLOP/B"),
    (check_rows_to_fill, lambda p, b, s: s * p / b, "two operations"),
    (check_rows_to_fill, lambda p, b, s: 2 * p / (s * b), "wider weights"),
    (check_idle_share, lambda m, n, a, b, c: 1 - lesson04.idle_share(m, n, a, b, c), "that works"),
    (check_idle_share, lambda m, n, a, b, c: 1 - math.ceil(m / a) * math.ceil(n / b) % c / c, "last wave alone"),
    (check_idle_share, lambda m, n, a, b, c: 100 * lesson04.idle_share(m, n, a, b, c), "not a percentage"),
    (check_idle_share, lambda m, n, a, b, c: 1 - m * n / (a * b * c * math.ceil(m * n / (a * b * c))), "count tiles"),
    (check_attention_flops, lambda T, H, K: 4 * H * K * T * T, "no later keys"),
    (check_attention_flops, lambda T, H, K: 2 * H * K * T * T, "a token also sees itself"),
    (check_attention_flops, lambda T, H, K: 2 * H * K * T * (T - 1), "a token also sees itself"),
    (check_attention_flops, lambda T, H, K: H * K * T * (T + 1), "two products"),
    (check_attention_flops, lambda T, H, K: 2 * K * T * (T + 1), "one head"),
    (check_multiplying, lambda L, D, H, G, K, F, V: lesson01.multiplying(L, D, H, G, K, F, 2 * V), "is a lookup"),
    (
        check_multiplying,
        lambda L, D, H, G, K, F, V: lesson01.multiplying(L, D, H, G, K, F, 0),
        "unembedding multiplies",
    ),
    (check_multiplying, lambda L, D, H, G, K, F, V: lesson01.multiplying(L, D, H, H, K, F, V), "not heads"),
    (check_multiplying, lambda L, D, H, G, K, F, V: L * (4 * D * D + 2 * D * F) + V * D, "gate, up and down"),
    (check_multiplying, lambda L, D, H, G, K, F, V: 2 * lesson01.multiplying(L, D, H, G, K, F, V), "that is FLOPs"),
    (check_expert_flops, lambda D, F, E, k, s: 6 * D * F * (E + s) + 2 * E * D, "a token meets a few"),
    (check_expert_flops, lambda D, F, E, k, s: 6 * D * F * (k + s), "the router is a product"),
    (check_expert_flops, lambda D, F, E, k, s: 6 * D * F * k + 2 * E * D, "for every token"),
    (check_expert_flops, lambda D, F, E, k, s: 4 * D * F * (k + s) + 2 * E * D, "three matrices"),
    (check_intensity, lambda T, m, n, size: T * m * n / size / (T * m + m * n + T * n), "2 FLOPs"),
    (check_intensity, lambda T, m, n, size: 2 * T * m * n / (T * m + m * n + T * n), "not per number"),
    (check_intensity, lambda T, m, n, size: 2 * T / size, "they are bytes too"),
    (check_intensity, lambda T, m, n, size: 2 * T * m * n / size / (T * m + m * n), "has to be written"),
    (check_backward_flops, lambda m, k, n, x, w: 4 * m * k * n, "only what is wanted"),
    (check_backward_flops, lambda m, k, n, x, w: 6 * m * k * n, "the whole step"),
    (check_backward_flops, lambda m, k, n, x, w: 2 * m * k * n, "one product for each gradient"),
    (check_backward_flops, lambda m, k, n, x, w: m * k * n * (x + w), "2 FLOPs"),
    (check_adamw_seconds, lambda n, b: 14 * n / b, "half of it"),
    (check_adamw_seconds, lambda n, b: 16 * n / b, "the bytes that are kept"),
    (check_adamw_seconds, lambda n, b: 24 * n / b, "add the gradient"),
    (check_adamw_seconds, lambda n, b: 8 * 28 * n / b, "not bits"),
    (check_tokens_per_step, lambda s, p, b: 28 * p / b / 6 / s, "of the whole step"),
    (check_tokens_per_step, lambda s, p, b: 28 * p / b / 6 * s / (1 - s), "upside down"),
    (check_tokens_per_step, lambda s, p, b: 28 * p / b / 2 * (1 - s) / s, "not 2"),
    (check_tokens_per_step, lambda s, p, b: 16 * p / b / 6 * (1 - s) / s, "16 are kept"),
    (check_training_days, lambda n, d, c, p, u: 2 * n * d / (c * p * u) / 86400, "inference of the same tokens"),
    (check_training_days, lambda n, d, c, p, u: 6 * n * d / (c * p) / 86400, "at the full peak"),
    (check_training_days, lambda n, d, c, p, u: 6 * n * d / (c * p * u), "those are seconds"),
    (check_training_days, lambda n, d, c, p, u: 6 * n * d / (p * u) / 86400, "at the same time"),
    (check_batch_limit, lambda C, W, L, G, K, s, T: (C - W) // (L * G * K * s * T), "two tensors"),
    (check_batch_limit, lambda C, W, L, G, K, s, T: (C - W) // (2 * G * K * s * T), "every layer"),
    (check_batch_limit, lambda C, W, L, G, K, s, T: (C - W) // (2 * L * G * K * T), "an element has `size`"),
    (check_batch_limit, lambda C, W, L, G, K, s, T: (C - W) // (2 * L * G * K * s), "all tokens of its context"),
    (check_batch_limit, lambda C, W, L, G, K, s, T: C // (2 * L * G * K * s * T), "weights are in that memory"),
    (check_batch_limit, lambda C, W, L, G, K, s, T: (C - W) / (2 * L * G * K * s * T), "round down"),
    (check_batch_limit, lambda C, W, L, G, K, s, T: (C - W) // (2 * L * G * K * s * T), "the answer is 0"),
    (check_tpot, lambda N, s, B, T, kv, p, b: s * N / b + B * T * kv / b, "the cube needs longer"),
    (check_tpot, lambda N, s, B, T, kv, p, b: 2 * N * B / p + B * T * kv / b, "have to be read"),
    (check_tpot, lambda N, s, B, T, kv, p, b: max(s * N / b, 2 * N * B / p), "each reader's cache"),
    (check_tpot, lambda N, s, B, T, kv, p, b: max(s * N / b, 2 * N * B / p) + T * kv / b, "belongs to one reader"),
    (check_tpot, lambda N, s, B, T, kv, p, b: B * (s * N + T * kv) / b, "read once for all readers"),
    (check_tpot, lambda N, s, B, T, kv, p, b: max(s * N / b, 2 * N * B / p) + B * kv / b, "all tokens so far"),
    (check_tpot, lambda N, s, B, T, kv, p, b: s * N / b + 2 * N * B / p + B * T * kv / b, "the longer one"),
    (check_tpot, lambda *given: 1e3 * lesson05.tpot(*given), "not milliseconds"),  # units
    (check_tokens_per_pass, lambda a, n: 1 + n * a, "those before it"),
    (check_tokens_per_pass, lambda a, n: lesson05.tokens_per_pass(a, n) - 1, "the model's own"),
    (check_tokens_per_pass, lambda a, n: 1 + a**n, "if only some"),
    (check_tokens_per_pass, lambda a, n: 1.0 + n, "every draft"),
    (check_learning_rate, lambda s, n, w, top: top, "the rate falls"),
    (
        check_learning_rate,
        lambda s, n, w, top: top * min(s / w, (1 + math.cos(math.pi * (s - w) / (n - w))) / 2),
        "a tenth of the top",
    ),
    (check_mfu, lambda r, N, L, D, T, p: r * 6 * N / p, "attention are missing"),
    (check_mfu, lambda r, N, L, D, T, p: r * 2 * N / p, "forward pass only"),  # forgot backward
    (check_mfu, lambda r, N, L, D, T, p: r * (6 * N + 12 * L * D * T) / p, "6N+attention full"),
    (check_mfu, lambda r, N, L, D, T, p: 100 * lesson06.mfu_causal(r, N, L, D, T, p), "not a percentage"),
    (check_tile_efficiency, lambda m, k, n, t: (m // t) * (k // t) * (n // t) * t**3 / (m * k * n), "round up"),
    (check_tile_efficiency, lambda m, k, n, t: 1 / lesson06.tile_efficiency(m, k, n, t), "upside down"),
    (check_tile_efficiency, lambda m, k, n, t: n / (math.ceil(n / t) * t), "all three sides"),
]


CHECKS |= test_lesson03.CHECKS | test_lesson07.CHECKS | test_lesson08.CHECKS  # lesson 03 tells its mistakes itself
MISTAKES += test_lesson07.MISTAKES + test_lesson08.MISTAKES


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_solution_is_right(check, capsys) -> None:
    assert check(CHECKS[check])
    assert ": right. " in capsys.readouterr().out


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_stub_is_not_attempted(check, capsys) -> None:
    assert not check(lambda *arguments: None)
    assert capsys.readouterr().out.strip().endswith("not attempted yet")


@pytest.mark.parametrize(("check", "mistake", "hint"), MISTAKES)
def test_mistake_is_told(check, mistake, hint: str, capsys) -> None:
    assert not check(mistake)
    said = capsys.readouterr().out
    assert "not right yet" in said and hint in said
