"""Checks of lesson 07's exercises."""

import math
from collections.abc import Callable

from course_lib import plan
from course_lib.lessons.check import Case, judge
from course_lib.lessons.solutions import lesson07 as solution

MINI, PARAMETERS = 64 * 2**20, 869_504


def _case(arguments: tuple, right: float, mistakes: dict[float, str]) -> Case:
    return Case(arguments, right, {value: hint for value, hint in mistakes.items() if value != right})


def check_rows_that_fit(function: Callable[[int, int, int, bool], int]) -> bool:
    """The lesson's own 9 rows, the same with gradients held, and a chip with 64 GiB."""
    cases = []
    for capacity, parameters, per_row, accumulated in (
        (MINI, PARAMETERS, 5_911_040, False), (MINI, PARAMETERS, 5_911_040, True),
        (64 * 2**30, 3_000_000_000, 1_700_000_000, False), (64 * 2**30, 3_000_000_000, 1_700_000_000, True),
    ):  # fmt: skip
        right = solution.rows_that_fit(capacity, parameters, per_row, accumulated)
        other = solution.rows_that_fit(capacity, parameters, per_row, not accumulated)
        room = capacity - (16 if accumulated else 12) * parameters
        mistakes = {
            room / per_row: "a row fits or does not: round down",
            math.ceil(room / per_row): "a row fits or does not: round down, not up",
            capacity // per_row: "weights and moments are there before the first row",
            (capacity - 4 * parameters) // per_row: "AdamW's two moments are there before the first row, too",
            (capacity - 8 * parameters) // per_row: "AdamW has two moments a parameter, 4 bytes each",
            other: "gradients lie there at the peak if those of earlier parts are held, and otherwise not",
        }
        cases.append(_case((capacity, parameters, per_row, accumulated), right, mistakes))
    good = "and by experiment 8, for the ninth finds its room in pieces"
    return judge("rows_that_fit", function, cases, "", "a whole number of rows", good)


def check_checkpointed_bytes(function: Callable[[int, int, int, int], int]) -> bool:
    """Whole segments, segments that do not divide the layers, one layer each, all in one."""
    cases = []
    for layers, segment, boundary, inside in (
        (64, 8, 100, 100), (32, 1, 33_554_432, 630_000_000), (10, 4, 7, 50), (12, 12, 5, 40),
    ):  # fmt: skip
        right = solution.checkpointed_bytes(layers, segment, boundary, inside)
        segments, back = math.ceil(layers / segment), segment * inside
        mistakes = {
            segments * (boundary + back): "one segment at a time comes back, not all",
            segments * boundary + layers * inside: "one segment at a time comes back, not all",
            layers * boundary + back: "only the inputs of segments are kept, not those of all layers",
            segments * boundary + inside: "all layers of one segment come back at once",
            layers // segment * boundary + back: "the last segment may be shorter; its input is kept as well",
            segments * boundary: "in backward one segment comes back, and lies there beside what is kept",
        }
        cases.append(_case((layers, segment, boundary, inside), right, mistakes))
    good = "no other segment does better here: 8 = √64, where a layer's inside is as large as its input"
    return judge("checkpointed_bytes", function, cases, "B", "an integer count of bytes", good)


def check_score_bytes(function: Callable[[int, int, int, int, int], int]) -> bool:
    """Llama-2-7B at its whole context, then the course's `tiny`, then odd numbers."""
    cases = []
    for batch, heads, tokens, layers, size in ((1, 32, 4096, 32, 2), (8, 4, 128, 4, 4), (3, 5, 7, 2, 4)):
        right = solution.score_bytes(batch, heads, tokens, layers, size)
        triangle = batch * heads * layers * size * tokens * (tokens + 1) // 2
        mistakes = {
            right // tokens: "each token has a probability for every token: T² of them",
            right // heads: "each head has probabilities of its own, in each layer",
            right // layers: "each head has probabilities of its own, in each layer",
            right // 2: "unfused code stores the whole square, with the zeros above the diagonal",
            triangle: "unfused code stores the zeros above the diagonal too",
            right // size: "that is how many there are; bytes are asked for",
            8 * right: "bytes, not bits",
        }
        cases.append(_case((batch, heads, tokens, layers, size), right, mistakes))
    rest = plan.activations.total(plan.activations.of_model(plan.load_model("llama-2-7b"), 1, 4096))
    good = f"all else that Llama-2-7B keeps for that sequence is {rest / 2**30:.1f} GiB"
    return judge("score_bytes", function, cases, "B", "an integer count of bytes", good)


def check_sharded_bytes(function: Callable[[int, int, int], float]) -> bool:
    """The four stages of the ZeRO paper's own example, 7.5 billion parameters on 64 chips; then two others."""
    cases = []
    for parameters, ranks, stage in (
        (7_500_000_000, 64, 3), (7_500_000_000, 64, 2), (7_500_000_000, 64, 1), (7_500_000_000, 64, 0), (1_000, 10, 2),
    ):  # fmt: skip
        right = solution.sharded_bytes(parameters, ranks, stage)
        mistakes = {
            16 * parameters / ranks: "stage 1 shares the optimizer's states, 2 also the gradients, 3 also the weights",
            16 * parameters: "nothing is shared here; what does the stage share?",
            parameters * (2 + 2 / ranks + 12): "first of all the optimizer's states are shared: they are the largest",
            parameters * (2 + 12 / ranks): "gradients are 2 bytes a parameter, on this rank or shared",
            parameters * (4 + 4 / ranks + 8 / ranks): "mixed precision: 2 + 2 + 12 bytes, not 4 + 4 + 8",
            parameters * (2 / ranks + 2 + 12 / ranks): "gradients are shared from stage 2 on, weights in stage 3",
            parameters * (4 + 8 / ranks): "12 bytes of states: the float32 weights count with the moments",
        }
        cases.append(_case((parameters, ranks, stage), right, mistakes))
    good = "printed in the ZeRO paper: 1.9 GB, in powers of 1000"
    return judge("sharded_bytes", function, cases, "B", "bytes per rank, as a float", good)
