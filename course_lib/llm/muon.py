"""Muon: momentum whose matrices are made orthogonal before they are added (arXiv:2502.16982).

A gradient's singular values differ by orders of magnitude, and a step along it moves little but the largest. Muon
(K. Jordan, 2024) replaces U S Vᵀ by about U Vᵀ, so that every direction moves alike. Five Newton–Schulz steps, which
are products of matrices and nothing else, bring all singular values near 1. One number of state per weight, not two.

Only for matrices between layers; embeddings and gains have AdamW. A factor of 0.2·√(larger side) makes a step as large
as AdamW's, so that both have one learning rate and one decay.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of g = U S Vᵀ, of one matrix (N, C) or of several (E, N, C), in bf16."""
    a, b, c = COEFFICIENTS
    wide = g.shape[-2] <= g.shape[-1]
    x = (g if wide else g.mT).bfloat16()  # (…, n, m), n ≤ m
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # singular values up to 1
    for _ in range(steps):
        square = x @ x.mT  # (…, n, n)
        x = a * x + (b * square + c * square @ square) @ x  # s becomes a·s + b·s³ + c·s⁵
    return x if wide else x.mT


class Muon(torch.optim.AdamW):
    """Muon for the groups of parameters that have a "momentum", AdamW for the others."""

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=lr, betas=betas, fused=True)
        self._step_supports_amp_scaling = False  # a loss scaler leaves out a step that overflows

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Matrices first; without their gradients then, what is AdamW's."""
        for group in self.param_groups:
            for p in group["params"] if "momentum" in group else ():
                if p.grad is not None:
                    self.turn(p, group)
                    p.grad = None
        super().step(closure)

    def turn(self, p: Tensor, group: dict) -> None:
        """One step of a matrix, with Nesterov's momentum."""
        state, g = self.state[p], p.grad
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(g, 1 - group["momentum"])
        update = orthogonal(g.lerp(state["momentum"], group["momentum"]))  # (N, C) or (E, N, C)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5)
