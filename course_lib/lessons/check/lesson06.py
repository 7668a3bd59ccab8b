"""Checks of lesson 06's exercises."""

import math
from collections.abc import Callable

from course_lib.lessons.check import Case, judge
from course_lib.lessons.solutions import lesson06 as solution

STEPS, WARMUP, TOP = 200, 20, 5e-3


def check_learning_rate(function: Callable[[int, int, int, float], float]) -> bool:
    """At the first step, in the warm-up, at its end, half-way down, and at the last step."""
    cases = []
    for step in (110, 1, 10, 20, 21, 200):
        progress = (step - WARMUP) / (STEPS - WARMUP)
        mistakes = {
            TOP * (1 + math.cos(math.pi * progress)) / 2: "the cosine is to end at a tenth of the top, not at zero",
            TOP * (0.1 + 0.9 * (1 + math.cos(math.pi * step / STEPS)) / 2): "the cosine begins where the warm-up ends",
            TOP * (step - 1) / WARMUP: "steps count from 1, and the first must already learn: its rate is not zero",
            TOP
            * (0.1 + 0.9 * (1 + math.cos(2 * math.pi * progress)) / 2): "half a cosine: its argument runs from 0 to π",
            TOP * (0.1 + 0.9 * (1 - progress)): "that is a straight line down; the cosine is slow at both ends",
            TOP: "after the warm-up the rate falls",
        }
        right = solution.learning_rate(step, STEPS, WARMUP, TOP)
        cases.append(Case((step, STEPS, WARMUP, TOP), right, {k: v for k, v in mistakes.items() if k != right}))
    return judge("learning_rate", function, cases, "", "a float", "it is the schedule that trained the model above")


def check_mfu(function: Callable[..., float]) -> bool:
    """On preset tiny on mini, and on Llama-2-7B on an Ascend 910B3."""
    cases = []
    shapes = ((37_592.0, 802_816, 4, 128, 128, 256e9), (4_672.0, 6_607_077_376, 32, 4_096, 4_096, 313e12))
    for rate, weights, layers, width, context, peak in shapes:
        right = solution.mfu_causal(rate, weights, layers, width, context, peak)
        attention = 6 * layers * width * (context + 1)
        mistakes = {
            rate * 6 * weights / peak: "that is the convention 6N; the products of attention are missing",
            rate * 2 * weights / peak: "that is the forward pass only, 2N; training has a backward pass of twice that",
            rate * (2 * weights + attention / 3) / peak: "that is the forward pass only; backward is twice that",
            rate
            * (6 * weights + 2 * attention * context / (context + 1))
            / peak: "that is 6N+attention full; a causal token sees no later keys",
            rate * (6 * weights + 2 * attention) / peak: "a causal token sees (T+1)/2 keys on average, not all",
            100 * right: "a utilisation is a fraction from 0 to 1, not a percentage",
            1 / right: "upside down: FLOP/s that were used, over FLOP/s that there are",
        }
        cases.append(Case((rate, weights, layers, width, context, peak), right, mistakes))
    return judge(
        "mfu_causal", function, cases, "%", "a fraction from 0 to 1", "convention 6N+attention causal", tolerance=1e-6
    )


def check_tile_efficiency(function: Callable[[int, int, int, int], float]) -> bool:
    """Full tiles, one column too many, and a vector."""
    cases = []
    for m, k, n, tile in (
        (1024, 128, 17, 16),
        (1024, 128, 352, 16),
        (1, 128, 512, 16),
        (15, 15, 15, 16),
        (17, 17, 17, 4),
    ):
        right = solution.tile_efficiency(m, k, n, tile)
        whole = (m // tile) * (k // tile) * (n // tile) * tile**3
        mistakes = {
            1 / right: "upside down: useful work over work done",
            whole / (m * k * n): "a tile that is begun is paid in full: round up, not down",
            100 * right: "a fraction from 0 to 1, not a percentage",
            1.0: "some of the last tiles are only partly filled",
            n / (math.ceil(n / tile) * tile): "all three sides are cut into tiles, not only n",
            m * k * n / tile**3: "that is how many tiles' worth of work there is; divide by the tiles that run",
        }
        cases.append(Case((m, k, n, tile), right, {k_: v for k_, v in mistakes.items() if k_ != right}))
    return judge("tile_efficiency", function, cases, "%", "a fraction from 0 to 1", "17 columns cost as much as 32")
