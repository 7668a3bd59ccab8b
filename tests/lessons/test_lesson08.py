"""The checks of lesson 08: on their solutions, on untouched stubs, on the mistakes that readers make."""

from math import floor, log2

import pytest
import torch

from course_lib.lessons.check.lesson08 import (
    WRONG,
    check_least_update,
    check_loss_scale,
    check_quantise_blocks,
    check_to_bfloat16,
)
from course_lib.lessons.solutions import lesson08

CHECKS = {
    check_to_bfloat16: lesson08.to_bfloat16,
    check_least_update: lesson08.least_update,
    check_loss_scale: lesson08.loss_scale,
    check_quantise_blocks: lesson08.quantise_blocks,
}


def step(x: float, bits: int = 7) -> float:
    return 2.0 ** (floor(log2(x)) - bits)


MISTAKES = [
    (check_to_bfloat16, lambda x: floor(x / step(x)) * step(x), "cuts the bits off"),
    (check_to_bfloat16, lambda x: (floor(x / step(x)) + 1) * step(x), "always goes up"),
    (check_to_bfloat16, lambda x: floor(x / step(x) + 0.5) * step(x), "from halfway"),
    (check_to_bfloat16, lambda x: round(x * 128) / 128, "doubles with each power of two"),
    (check_to_bfloat16, lambda x: round(x / step(x, 8)) * step(x, 8), "one more"),
    (check_to_bfloat16, lambda x: round(x / step(x, 10)) * step(x, 10), "float16"),
    (check_to_bfloat16, lambda x: round(x / step(x)), "multiply by the spacing"),
    (check_to_bfloat16, lambda x: x, "x itself"),
    (check_least_update, lambda w: step(w), "half of it"),
    (check_least_update, lambda w: step(w, 9), "not a quarter"),
    (check_least_update, lambda w: step(w, 11), "float16"),
    (check_least_update, lambda w: step(w, 24), "float32"),
    (check_least_update, lambda w: 2.0**-8, "follows the weight's exponent"),
    (check_least_update, lambda w: w * 2**-8, "round log2"),
    (check_loss_scale, lambda g: 2 * lesson08.loss_scale(g), "to spare"),
    (check_loss_scale, lambda g: 65504 / g, "a power of two"),
    (check_loss_scale, lambda g: floor(log2(32752 / g)), "the exponent"),
    (check_loss_scale, lambda g: 1 / lesson08.loss_scale(g), "upside down"),
    *[(check_quantise_blocks, wrong, hint) for hint, wrong in WRONG.items()],
    (check_quantise_blocks, lambda x, block: lesson08.quantise_blocks(x, block).view(-1, block), "of the shape of x"),
    (check_quantise_blocks, lambda x, block: 1.0, "float; expected a tensor"),
    (check_quantise_blocks, lambda x, block: x.view(3, -1), "raised RuntimeError"),
    (
        check_quantise_blocks,
        lambda x, block: 2 * lesson08.quantise_blocks(x, block),
        "no mistake that this check knows",
    ),
]


def test_rounding_is_torchs() -> None:
    for x in torch.exp2(torch.linspace(-20, 20, 2001, dtype=torch.float64)).tolist():
        assert lesson08.to_bfloat16(x) == torch.tensor(x, dtype=torch.float64).to(torch.bfloat16).item()


@pytest.mark.parametrize("weight", [1.0, 0.02, 0.09, 0.75, 300.0])
def test_an_update_below_the_least_vanishes(weight: float) -> None:
    held = torch.tensor(lesson08.to_bfloat16(weight), dtype=torch.bfloat16)
    least = lesson08.least_update(weight)
    assert (held.double() + 0.99 * least).to(torch.bfloat16) == held
    assert (held.double() + 1.01 * least).to(torch.bfloat16) > held
