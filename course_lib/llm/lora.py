"""LoRA: fine-tune a small addition to each frozen matrix (arXiv:2106.09685).

    y = W x + (α/r) B (A x)     W frozen; A (r, C) random, B (N, r) zero at first, so that training starts at the model

Gradients and optimizer state exist for A and B only. Activations and time hardly shrink: backward still runs through
all layers, and only the product that would make W's gradient is left out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.llm.layers import exchange

ALPHA = 16.0


class LoRALinear(nn.Module):
    """A frozen linear layer without bias and its trained addition of a low rank."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        if not 1 <= rank < min(linear.weight.shape):
            raise ValueError(f"expected a LoRA rank of 1 to {min(linear.weight.shape) - 1} for {linear}, found {rank}")
        self.base, self.scale = linear, ALPHA / rank
        device, C, N = linear.weight.device, linear.in_features, linear.out_features
        down = torch.randn(rank, C, generator=generator, device="cpu") * C**-0.5
        self.lower = nn.Parameter(down.to(device))  # (r, C)
        self.upper = nn.Parameter(torch.zeros(N, rank, device=device))  # (N, r)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.lower), self.upper)  # (…, N)

    @property
    def weight(self) -> Tensor:
        """The matrix (N, C) that base and addition make together."""
        return self.base.weight + self.scale * self.upper @ self.lower


def adapt(model: nn.Module, rank: int, seed: int = 0) -> None:
    """Freeze `model` and give each linear layer but the unembedding an addition of `rank`."""
    model.requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(seed)
    exchange(model, lambda linear: LoRALinear(linear, rank, generator))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add what was trained to the matrices, and make them plain linear layers again: no further cost in inference."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LoRALinear):
                child.base.weight.copy_(child.weight)
                setattr(parent, name, child.base)
    model.requires_grad_(True)
