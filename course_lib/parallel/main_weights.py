"""ZeRO-1 in mixed precision: every rank computes with all weights in 16 bits, and steps its part of them in float32.

Gradients of all micro-batches are added up in float32. Then each rank of a group gets the sum, over the ranks, of its
part of them (reduce-scatter), steps that part of the *main* weights, in float32 with their optimizer state, and all
get the new weights in their own dtype (all-gather). As Megatron-LM does it, whose distributed optimizer this is in
small; optimizer state is divided by the ranks that have the same weights (arXiv:1910.02054, section 5.1).

n numbers of all weights on a rank, P ranks that share them, each with n/P of the main weights.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

# Named anew in PyTorch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Divided:
    """Weights that the same ranks share: gradients of all (n,), main weights and their gradients of this rank (n/P,).

    Gradients are divided by `over`; `copies` ranks outside of the group have the same part as this one.
    """

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup, over: int, copies: float) -> None:
        self.parameters, self.group, self.over, self.copies = parameters, group, over, copies
        self.weights = [local(p.detach()) for p in parameters]
        self.sizes, self.P = [w.numel() for w in self.weights], group.size()
        n = -(-sum(self.sizes) // self.P) * self.P
        self.gradients = torch.zeros(n, dtype=torch.float32, device=self.weights[0].device)  # (n,)
        self.main = nn.Parameter(self.flat().chunk(self.P)[group.rank()].float())  # (n/P,)
        self.places = dict(zip(parameters, self.gradients[: sum(self.sizes)].split(self.sizes), strict=True))
        self.partial: dict[nn.Parameter, dist.ProcessGroup] = {}  # summed over ranks of another group first
        for p in parameters:
            p.register_post_accumulate_grad_hook(self.collect)

    def flat(self) -> Tensor:
        """All weights in one row, up to a multiple of P: (n,)."""
        row = torch.cat([w.flatten() for w in self.weights])
        return F.pad(row, (0, len(self.gradients) - len(row)))

    @torch.no_grad()
    def collect(self, p: nn.Parameter) -> None:
        """Called by backward for each gradient of a micro-batch."""
        gradient, p.grad = p.grad, None
        if isinstance(p, DTensor) and gradient.placements != p.placements:
            if p.placements == (Replicate(),):
                self.partial[p] = p.device_mesh.get_group()  # parts of a sum, which wait for the last micro-batch
            else:
                gradient = gradient.redistribute(placements=p.placements)
        self.places[p].add_(local(gradient).flatten())

    @torch.no_grad()
    def reduce(self) -> None:
        """This rank's part of the gradients, summed over the ranks."""
        for group in set(self.partial.values()):
            parts = [self.places[p] for p in self.partial if self.partial[p] is group]
            total = torch.cat(parts)
            dist.all_reduce(total, group=group)
            torch._foreach_copy_(parts, list(total.split([len(part) for part in parts])))
        self.main.grad = torch.empty_like(self.main)  # (n/P,)
        reduce_scatter(self.main.grad, self.gradients, group=self.group)
        self.main.grad /= self.over

    @torch.no_grad()
    def spread(self) -> None:
        """The stepped weights to all ranks; the gradients begin anew."""
        mine = self.main.detach().to(self.weights[0].dtype)
        row = mine.new_empty(len(self.gradients))  # (n,)
        all_gather(row, mine, group=self.group)
        rows = row[: sum(self.sizes)].split(self.sizes)
        torch._foreach_copy_(self.weights, [r.view_as(w) for r, w in zip(rows, self.weights, strict=True)])
        self.gradients.zero_()
        self.main.grad = None


class MainWeights:
    """All of a rank's weights, `Divided` by who shares them, and the `optimizer` of its parts."""

    def __init__(self, parts: list[Divided], optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        self.parts = parts
        self.optimizer = optimizer([part.main for part in parts])

    @torch.no_grad()
    def update(self, clip: float) -> Tensor:
        """Reduce, clip to norm `clip` of the whole model, step, gather; the norm before, a scalar."""
        for part in self.parts:
            part.reduce()
        total = sum(torch.linalg.vector_norm(part.main.grad) ** 2 / part.copies for part in self.parts)  # scalar
        dist.all_reduce(total)
        norm = total.sqrt()
        for part in self.parts:
            part.main.grad.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        for part in self.parts:
            part.spread()
        return norm


def by_owners(
    parameters: Iterable[nn.Parameter], groups: Callable[[nn.Parameter], dist.ProcessGroup], ranks: int, over: int
) -> list[Divided]:
    """The weights by the group that shares them and the pieces they are in; `ranks` hold the same layers."""
    found: dict[tuple, list[nn.Parameter]] = {}
    for p in dict.fromkeys(parameters):
        found.setdefault((groups(p), pieces(p)), []).append(p)
    return [Divided(ps, group, over, ranks / n / group.size()) for (group, n), ps in found.items()]


def pieces(p: Tensor) -> int:
    """Into how many pieces a weight is cut, each on other ranks."""
    placements = getattr(p, "placements", ())
    return math.prod(p.device_mesh.size(i) for i, placement in enumerate(placements) if placement.is_shard())


def local(x: Tensor) -> Tensor:
    """What this rank holds of x; the tensor itself where that is all of it."""
    return x.to_local() if isinstance(x, DTensor) else x
