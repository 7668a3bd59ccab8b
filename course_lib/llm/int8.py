"""Weights in eight bits for inference: each row of a matrix as int8 numbers and one scale.

Decoding reads every weight for each step, so half the bytes of bf16 (a quarter of float32's) can be as much less time.
Activations keep their dtype; a fused product widens the weights on their way to the cube. What that costs decides how
much is left of the gain: nearly all where it happens beside the cube, less where other cores do it and hand over.

    quantise_weights(model)     # the linear layers but the unembedding; routed experts stay as they are
"""

import torch
from torch import Tensor, nn

from course_lib.llm.layers import exchange


class Int8Linear(nn.Module):
    """A linear layer without bias whose weights are int8; without gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()  # (N, C)
        scale = weight.abs().amax(dim=1).clamp(min=1e-20) / 127  # (N,)
        self.register_buffer("numbers", (weight / scale[:, None]).round().to(torch.int8))  # (N, C)
        self.register_buffer("scale", scale)  # (N,)

    def forward(self, x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x.flatten(0, -2), self.numbers, self.scale.to(x.dtype))  # (M, N)
        return y.unflatten(0, x.shape[:-1])  # (…, N)

    @property
    def weight(self) -> Tensor:
        """The matrix (N, C) that the numbers stand for."""
        return self.numbers * self.scale[:, None]


def quantise_weights(model: nn.Module) -> None:
    """Replace the weights of a model on any device by their int8 form, for inference."""
    exchange(model, Int8Linear)
