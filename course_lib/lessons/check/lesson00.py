"""Checks of lesson 00's exercises."""

from collections.abc import Callable

import torch

from course_lib import npu
from course_lib.lessons.check import Case, judge
from course_lib.lessons.solutions import lesson00 as solution


def check_product_flops(function: Callable[[int, int, int], int]) -> bool:
    """Against the formula, and the ledger for the first case."""
    cases = []
    for m, k, n in ((64, 32, 16), (1, 128, 512), (1024, 128, 352)):
        right = solution.product_flops(m, k, n)
        mistakes = {
            m * k * n: "a multiply-add is two operations, and each result needs k of them",
            2 * m * n: "each result is a sum over k products, not one product",
            m * n * (2 * k - 1): "count k additions, not k − 1: the accumulator starts at zero",
            2 * (m * k + k * n): "those are the numbers read; count what is done with them",
        }
        cases.append(Case((m, k, n), right, mistakes))
    with npu.ledger() as ledger:
        torch.empty(64, 32, device="npu") @ torch.empty(32, 16, device="npu")
    counted = ledger.totals().cube_flops
    return judge(
        "product_flops", function, cases, "FLOP", "an integer count of FLOPs", f"the ledger counts {counted:,} FLOP"
    )


def check_addition_seconds(function: Callable[[int, float, float], float]) -> bool:
    """Against the formula; the verdict says how long the chip in use really takes."""
    spec = npu.runtime.devices[0].spec
    bandwidth, launch = float(spec.memory_bandwidth), float(spec.launch_device)
    cases = []
    for elements in (1_000_000, 1_000, 65_536):
        mistakes = {
            12 * elements / bandwidth: "each operator also pays its launch once",
            launch + 8 * elements / bandwidth: "the result has to be written too: count three tensors",
            launch + 4 * elements / bandwidth: "count every tensor that is read or written, not one",
            launch + 3 * elements / bandwidth: "the bandwidth is in bytes; how many bytes has a float32?",
            launch + 6 * elements / bandwidth: "float32 has 4 bytes, not 2",
            launch + 96 * elements / bandwidth: "bytes, not bits",
        }
        right = solution.addition_seconds(elements, bandwidth, launch)
        cases.append(Case((elements, bandwidth, launch), right, mistakes))
    a = torch.empty(1_000_000, device="npu")
    with npu.ledger() as ledger:
        a + torch.empty_like(a)
    took = next(r.cost.ps for r in ledger.records if r.op == "add") / 1e12
    verdict = f"at a million elements the device takes {took / cases[0].expected:.2f} times that: memory turns round to write"
    return judge("addition_seconds", function, cases, "s", "seconds, as a float", verdict, tolerance=1e-5)


def check_training_bytes(function: Callable[[int], int]) -> bool:
    """Against the formula; the verdict on 7 billion parameters is in GiB."""
    cases = []
    for parameters in (7_000_000_000, 869_504):
        hints = {
            4: "those are the weights alone, all that inference keeps; what does a step leave for the next?",
            8: "weights and gradients; AdamW also remembers something about each parameter",
            12: "three numbers a parameter; there are four: the gradient, or one of AdamW's two moments?",
            128: "bytes, not bits",
            32: "float32 has 4 bytes, not 8",
        }
        mistakes = {per * parameters: hint for per, hint in hints.items()}
        cases.append(Case((parameters,), solution.training_bytes(parameters), mistakes))
    return judge(
        "training_bytes",
        function,
        cases,
        "B",
        "an integer count of bytes",
        "a chip with 64 GiB holds the 13.0 GiB of bfloat16 weights, but not this",
    )
