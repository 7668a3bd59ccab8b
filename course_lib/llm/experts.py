"""Mixture of experts: each token goes through a few of many small feed-forwards (DeepSeek-V3, arXiv:2412.19437, 2.1.2).

A gate gives each token a score per expert, by a sigmoid. The highest scores plus a bias choose; the scores alone, made
to sum to 1, weigh. The bias is not trained: after each step it rises for experts with fewer tokens than the mean and
falls for the others, which balances them without a loss that pulls on the weights (`Experts.balance`).

Tokens are sorted by expert, so that one grouped product serves all experts. N tokens, k experts per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.llm.config import Config
from course_lib.llm.layers import FeedForward, narrow

grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since PyTorch 2.10


class Router(nn.Module):
    """Which experts a token goes to, and with what weight. In float32 also under autocast: ties would move tokens."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.shape = config.experts
        self.weight = nn.Parameter(torch.empty(self.shape.routed, config.width))  # (E, D)
        self.register_buffer("bias", torch.zeros(self.shape.routed))  # (E,)
        self.register_buffer("load", torch.zeros(self.shape.routed))  # (E,), tokens since the last `balance`

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of tokens x (N, D): chosen experts and their weights, (N, k) each, and all scores (N, E)."""
        e = self.shape
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()  # (N, E)
        chosen = self.allowed(scores.detach() + self.bias).topk(e.active, dim=-1).indices  # (N, k)
        weights = scores.gather(1, chosen)  # (N, k)
        return chosen, e.route_scale * weights / weights.sum(-1, keepdim=True), scores

    def allowed(self, biased: Tensor) -> Tensor:
        """Biased scores (N, E) with -inf outside of the best groups; a group counts as much as its two best experts."""
        e = self.shape
        if e.groups == e.top_groups:
            return biased
        grouped = biased.view(len(biased), e.groups, -1)  # (N, groups, E/groups)
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)  # (N, groups)
        inside = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(e.top_groups).indices, True)
        return grouped.masked_fill(~inside[..., None], float("-inf")).flatten(1)  # (N, E)


class Experts(nn.Module):
    """The routed experts that `Router` chooses, and the shared ones, as one wider feed-forward for every token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        e, D = config.experts, config.width
        self.shape = e
        self.router = Router(config)
        self.gate = nn.Parameter(torch.empty(e.routed, D, e.width))  # (E, D, F)
        self.up = nn.Parameter(torch.empty(e.routed, D, e.width))  # (E, D, F)
        self.down = nn.Parameter(torch.empty(e.routed, e.width, D))  # (E, F, D)
        self.shared = FeedForward(D, e.shared * e.width) if e.shared else None

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        tokens = x.reshape(B * T, D)  # (N, D)
        self.chosen, weights, scores = self.router(tokens)  # (N, k), (N, k), (N, E)
        self.scores = scores.view(B, T, -1) if self.shape.sequence_loss else None  # (B, T, E)
        y = self.routed(tokens, self.chosen, weights).view(B, T, D)  # (B, T, D)
        return y if self.shared is None else y + self.shared(x)  # (B, T, D)

    def routed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum over the k experts of each token, weighted: (N, D)."""
        N, k = chosen.shape
        order = chosen.flatten().argsort(stable=True)  # (N·k,), by expert
        ends = count(chosen, self.shape.routed).cumsum(0).to(torch.int32)  # (E,), where each expert's tokens end
        sorted_x = x[order // k]  # (N·k, D)
        hidden = F.silu(grouped(sorted_x, self.gate, ends)) * grouped(sorted_x, self.up, ends)  # (N·k, F)
        y = grouped(hidden, self.down, ends)[order.argsort()].view(N, k, -1)  # (N, k, D), by token again
        return (y * weights[..., None].to(y.dtype)).sum(1)  # (N, D)

    def count(self) -> None:
        """Note how many tokens each expert had in the last forward pass."""
        self.router.load += count(self.chosen, self.shape.routed)  # (E,)

    @torch.no_grad()
    def balance(self) -> None:
        """Move the bias one step towards an even load, and count anew."""
        load = self.router.load  # (E,)
        self.router.bias += self.shape.bias_speed * (load.mean() - load).sign()  # (E,)
        load.zero_()
        self.chosen = self.scores = None

    def unevenness(self) -> Tensor:
        """Sequence-wise balance loss of the last forward pass, before its weight: 1 where a sequence loads all evenly.

        Σ_e f_e·P_e, averaged over sequences: f_e = E/(k·T) × tokens of expert e, P_e = mean share of its score.
        """
        B, T, E = self.scores.shape
        k = self.shape.active
        hits = torch.zeros_like(self.scores).scatter(2, self.chosen.view(B, T, k), 1.0)  # (B, T, E)
        share = self.scores / self.scores.sum(-1, keepdim=True)  # (B, T, E)
        return (hits.mean(1) * (E / k) * share.mean(1)).sum(-1).mean()  # scalar


def count(chosen: Tensor, E: int) -> Tensor:
    """Tokens of each expert, (E,)."""
    ones = torch.ones(chosen.numel(), device=chosen.device)  # (N·k,)
    return torch.zeros(E, device=chosen.device).scatter_add_(0, chosen.flatten(), ones)  # (E,)


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (M, D), sorted by expert, times each row's expert's matrix of `weight` (E, D, F): (M, F)."""
    return grouped_mm(narrow(x), narrow(weight), offs=ends)  # (M, F)
