"""Checks of lesson 08's exercises."""

from collections.abc import Callable
from math import ceil, floor, log2

import torch
from torch import Tensor

from course_lib.lessons.check import Case, judge, untouched
from course_lib.lessons.solutions import lesson08 as solution
from course_lib.lessons.solutions.lesson08 import FP8, LARGEST


def check_to_bfloat16(function: Callable[[float], float]) -> bool:
    """Up, down, halfway, small and large numbers, and one that rounds up to the next power of two."""
    cases = []
    for x in (20.025, 3.1516, 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 1 / 3, 255.9, 1e-5, 70_000.0):
        right, exponent = solution.to_bfloat16(x), floor(log2(x))
        step = 2.0 ** (exponent - 7)
        mistakes = {
            right - step: "round to the nearest; that cuts the bits off, or goes the wrong way from halfway",
            right + step: "round to the nearest; that always goes up, or goes the wrong way from halfway",
            round(x * 2**7) / 2**7: "the spacing is 2⁻⁷ between 1 and 2 only: it doubles with each power of two",
            round(x / step * 2) * step / 2: "bfloat16 has 7 bits after the point; that is one more",
            round(x / step * 8) * step / 8: "that is float16, with 10 bits after the point; bfloat16 has 7",
            round(x / step): "multiply by the spacing again",
            x: "that is x itself; round it to a multiple of the spacing",
        }
        cases.append(Case((x,), right, {value: hint for value, hint in mistakes.items() if value != right}))
    return judge("to_bfloat16", function, cases, "", "a bfloat16 as a float", "torch rounds to the same number")


def check_least_update(function: Callable[[float], float]) -> bool:
    """A norm's gain, typical weights of a matrix, a large number."""
    cases = []
    for weight in (1.0, 0.02, 0.09, 0.75, 300.0):
        right = solution.least_update(weight)
        mistakes = {
            2 * right: "that is the spacing; half of it is enough to be rounded up",
            right / 2: "half of the spacing, not a quarter",
            right / 8: "that is float16, with 10 bits after the point; bfloat16 has 7",
            right / 2**16: "that is float32, with 23 bits after the point; bfloat16 has 7",
            2.0**-8: "the spacing grows and shrinks with the weight: it follows the weight's exponent",
            weight * 2**-8: "the spacing depends on the exponent alone; round log2 of the weight down",
            2.0 ** (ceil(log2(weight)) - 8): "round log2 of the weight down",
            1 / right: "upside down",
        }
        wrong = {value: hint for value, hint in mistakes.items() if value != right}
        cases.append(Case((weight,), right, wrong))
    good = "a norm's gain of 1 stands still at any smaller learning rate"
    return judge("least_update", function, cases, "", "a number above zero", good, tolerance=1e-6)


def check_loss_scale(function: Callable[[float], float]) -> bool:
    """Small, large and very small gradients."""
    cases = []
    for largest in (0.03, 3.0, 2e-7, 40_000.0):
        right = solution.loss_scale(largest)
        mistakes = {
            2 * right: "leave a factor of 2 to spare: the next batch may have larger gradients",
            right / 2: "twice that would still fit",
            65504 / largest: "a power of two, which changes no mantissa bit; and leave a factor of 2 to spare",
            65504 / 2 / largest: "a power of two, which changes no mantissa bit",
            floor(log2(65504 / 2 / largest)): "that is the exponent",
            1 / right: "upside down: gradients are multiplied by the scale",
            2.0 ** floor(log2(448 / 2 / largest)): "float16 reaches to 65,504; 448 is the largest e4m3",
        }
        wrong = {value: hint for value, hint in mistakes.items() if value != right}
        cases.append(Case((largest,), right, wrong))
    return judge("loss_scale", function, cases, "", "a power of two", "that is 2²⁰", tolerance=1e-9)


WRONG: dict[str, Callable[[Tensor, int], Tensor]] = {
    "one scale for all: an outlier still costs every block; a maximum for each row of x.view(-1, block)":
        lambda x, block: solution.quantise_blocks(x, len(x)),
    "without the sign a maximum misses large negative numbers: take abs() first":
        lambda x, block: _scaled(x, x.view(-1, block).amax(dim=1, keepdim=True) / LARGEST),
    "the largest becomes 1, and the small ones fall below e4m3's smallest; it may become 448":
        lambda x, block: _scaled(x, x.view(-1, block).abs().amax(dim=1, keepdim=True)),
    "the scale is missing: what is above 448 is cut off, or becomes NaN":
        lambda x, block: x.to(FP8).float(),
    "multiply by the scale again at the end":
        lambda x, block: _numbers(x, block).flatten(),
    "these are the numbers as they came: round them to e4m3 in between, with .to(torch.float8_e4m3fn).float()":
        lambda x, block: x.clone(),
}  # fmt: skip


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    parts = x.view(len(scale), -1)
    return ((parts / scale).to(FP8).float() * scale).view(-1)


def _numbers(x: Tensor, block: int) -> Tensor:
    parts = x.view(-1, block)
    return (parts / parts.abs().amax(dim=1, keepdim=True) * LARGEST).to(FP8).float()


def check_quantise_blocks(function: Callable[[Tensor, int], Tensor]) -> bool:
    """256 numbers in blocks of 64 and of 128: a large negative outlier in one block, tiny numbers in another."""
    name = "quantise_blocks"
    for block in (64, 128):
        x = torch.randn(256, generator=torch.Generator().manual_seed(block))
        x[3], x[128:] = -2e6, 1e-4 * x[128:]
        try:
            found = function(x.clone(), block)
        except Exception as error:  # the reader's own: told, not raised
            print(f"{name}: not right yet. It raised {type(error).__name__}: {error}")
            return False
        if untouched(found):
            print(f"{name}: not attempted yet")
            return False
        if not isinstance(found, Tensor) or found.shape != x.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            print(f"{name}: not right yet. It gave {shape}; expected a tensor of the shape of x, {tuple(x.shape)}")
            return False
        right = solution.quantise_blocks(x, block)
        if not torch.allclose(found.float(), right, rtol=1e-5, atol=0):
            known = (
                hint for hint, wrong in WRONG.items() if found.float().allclose(wrong(x, block), equal_nan=True, atol=0)
            )
            print(f"{name}: not right yet. With blocks of {block}, {_share(found, right):.0%} of the numbers are off")
            print(f"  hint: {next(known, 'no mistake that this check knows; print the scales of a small x')}")
            return False
    print(f"{name}: right. The outlier costs its own block, and the others keep an error of at most 1/16")
    return True


def _share(found: Tensor, right: Tensor) -> float:
    return 1 - found.float().isclose(right, rtol=1e-5, atol=0).float().mean().item()
