"""Checks of lesson 02's exercises."""

from collections.abc import Callable

import torch

from course_lib import npu
from course_lib.chip import load_chip
from course_lib.lessons.check import Case, judge
from course_lib.lessons.solutions import lesson02 as solution

ADAMW = 28  # bytes per parameter in mixed precision


def check_backward_flops(function: Callable[[int, int, int, bool, bool], int]) -> bool:
    """Against the formula, and the ledger for the first case."""
    cases = []
    for m, k, n in ((64, 32, 16), (1024, 128, 352)):
        for of_input, of_weight in ((True, False), (True, True), (False, True), (False, False)):
            right, once = solution.backward_flops(m, k, n, of_input, of_weight), 2 * m * k * n
            mistakes = {
                2 * right: "each gradient is one product, not two",
                2 * once: "only what is wanted: one product for the input, one for the weight",
                3 * once: "that is the whole step; the forward pass is not part of backward",
                right // 2: "a multiply-add is 2 FLOPs",
                once: "one product for each gradient that is wanted, and none for none",
            }
            arguments = (m, k, n, of_input, of_weight)
            cases.append(Case(arguments, right, {found: hint for found, hint in mistakes.items() if found != right}))
    x = torch.empty(64, 32, device="npu", requires_grad=True)
    w = torch.empty(32, 16, device="npu", requires_grad=True)
    with npu.ledger() as ledger:
        y = x @ w
        y.backward(torch.empty_like(y))
    counted = sum(r.cost.cube_flops for r in ledger.records if r.phase == "backward")
    good = f"the ledger counts {counted:,} FLOP"
    return judge("backward_flops", function, cases, "FLOP", "an integer count of FLOPs", good)


def check_adamw_seconds(function: Callable[[int, float], float]) -> bool:
    """Llama-2-7B on the 910B2 first."""
    bandwidth, cases = float(load_chip("ascend-910b2").memory_bandwidth), []
    for parameters, rate in ((6_738_415_616, bandwidth), (1_000_000, 1e9)):
        hints = {
            14: "half of it: what is read has to be written back, except the gradient, and the weight besides",
            16: "those are the bytes that are kept; count what is read and what is written",
            32: "the gradient is read and not written back, the bfloat16 weight written and not read",
            26: "the weight in bfloat16 is written, and the gradient in bfloat16 read, 2 bytes each",
            12: "master and moments only, and only one way",
            24: "master and moments go both ways; add the gradient that is read and the weight that is written",
            20: "moments are float32 too, 4 bytes each",
            8 * ADAMW: "bytes, not bits",
        }
        mistakes = {per * parameters / rate: hint for per, hint in hints.items()}
        cases.append(Case((parameters, rate), ADAMW * parameters / rate, mistakes))
    good = "a step of 4,096 tokens at the cube's peak takes about four times that"
    return judge("adamw_seconds", function, cases, "s", "seconds, as a float", good, tolerance=1e-6)


def check_tokens_per_step(function: Callable[[float, float, float], float]) -> bool:
    """A tenth and a hundredth of the step on the 910B2, then round numbers."""
    chip, cases = load_chip("ascend-910b2"), []
    peak, bandwidth = float(chip.peak("bfloat16")), float(chip.memory_bandwidth)
    for share, rate, memory in ((0.1, peak, bandwidth), (0.01, peak, bandwidth), (0.5, 6e12, 28e9)):
        right = solution.tokens_per_step(share, rate, memory)
        mistakes = {
            right / (1 - share): "share is of the whole step, optimizer included, not of the rest",
            right * (share / (1 - share)) ** 2: "upside down: a smaller share needs more tokens",
            right * 3: "training takes 6 FLOPs per parameter and token, not 2",
            right / 2: "28 bytes per parameter: read and written",
            right * 16 / 28: "28 bytes per parameter move; 16 are kept",
        }
        cases.append(
            Case((share, rate, memory), right, {k: v for k, v in mistakes.items() if abs(k / right - 1) > 1e-9})
        )
    return judge(
        "tokens_per_step", function, cases, "", "a number of tokens", "whatever the size of the model", tolerance=1e-6
    )


def check_training_days(function: Callable[[float, float, int, float, float], float]) -> bool:
    """GPT-3 on 1,024 A100 first, then DeepSeek-V3's active parameters, then one chip."""
    cases = []
    for parameters, tokens, chips, peak, mfu in (
        (174.6e9, 300e9, 1024, 312e12, 0.45), (36.6e9, 14.8e12, 2048, 990e12, 0.35), (1e9, 20e9, 1, 1e14, 0.5),
    ):  # fmt: skip
        right = solution.training_days(parameters, tokens, chips, peak, mfu)
        mistakes = {
            right / 3: "that is inference of the same tokens; training takes 6N",
            right * 4 / 3: "8N is with recomputation, and an MFU does not count that",
            right * mfu: "at the full peak; only `mfu` of it is reached",
            right * mfu**2: "divide by the utilisation: a lower one takes longer",
            right * 86400: "those are seconds",
            right * 24: "those are hours",
            right * chips: "all chips work at the same time",
        }
        arguments = (parameters, tokens, chips, peak, mfu)
        cases.append(Case(arguments, right, {k: v for k, v in mistakes.items() if k != right}))
    good = "for GPT-3, a month on a thousand chips"
    return judge("training_days", function, cases, "", "a number of days", good, tolerance=1e-6)
