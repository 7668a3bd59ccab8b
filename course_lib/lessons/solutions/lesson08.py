"""Solutions of lesson 08: rounding to bfloat16, the update that vanishes, a loss scale, a scale per block."""

from math import floor, log2

import torch
from torch import Tensor

FP8, LARGEST = torch.float8_e4m3fn, 448.0


def to_bfloat16(x: float) -> float:
    """The bfloat16 nearest to ``x`` > 0, a normal number; halfway the one whose last bit is 0."""
    step = 2.0 ** (floor(log2(x)) - 7)  # from one bfloat16 to the next
    return round(x / step) * step  # Python rounds halves to even


def least_update(weight: float) -> float:
    """What must at least be added to a bfloat16 ``weight`` > 0 to change it: half of its spacing."""
    return 2.0 ** (floor(log2(weight)) - 8)


def loss_scale(largest: float) -> float:
    """The largest power of two that leaves the ``largest`` gradient below 65,504, with a factor of 2 to spare."""
    return 2.0 ** floor(log2(65504 / 2 / largest))


def quantise_blocks(x: Tensor, block: int) -> Tensor:
    """``x`` (n,) in e4m3 and back, with one scale for each ``block`` numbers, which brings their largest to 448."""
    parts = x.view(-1, block)  # (n/block, block)
    scale = parts.abs().amax(dim=1, keepdim=True) / LARGEST  # (n/block, 1)
    return ((parts / scale).to(FP8).float() * scale).view(-1)
