"""Expert parallelism: each rank keeps a few of the routed experts, and tokens travel to them and back by all-to-all.

    gather     naive: every rank sees all tokens and computes its experts for each, chosen or not; results are summed
    exchange   each token goes only to the ranks of its experts; ranks tell each other first how many come
    capacity   the same with room for a fixed number of tokens for each expert: more are dropped, fewer leave padding.
               Shapes then depend on no value, and ranks need not tell each other anything (GShard, arXiv:2006.16668)

What is not routed (router, shared experts, attention) is replicated, and each rank has tokens of its own. Gradients of
the mean over all tokens are sums divided by the number of all ranks: of a replicated weight the sum over all ranks, of
an expert's only over those that hold the same expert, for what it learns from other tokens came by all-to-all.

N tokens on a rank, k experts for each, E experts, P ranks in the group that shares them, C the capacity.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from course_lib.llm.experts import Experts, count, grouped


class Balance(NamedTuple):
    """How evenly a layer's last tokens fell: highest over mean load of experts and of ranks, and the share dropped."""

    experts: float
    ranks: float
    dropped: float


class LocalExperts(Experts):
    """Routed experts of which this rank holds E/P; `gate`, `up` and `down` are DTensors of all, sharded by expert."""

    mesh: DeviceMesh  # of P ranks, which share the experts
    group: dist.ProcessGroup  # the same ranks
    data: dist.ProcessGroup  # all ranks with tokens of the same step
    factor: float  # capacity over the mean number of tokens for an expert
    dropped: Tensor | float = 0.0  # share of choices without room in the last forward pass

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's part of gate and up (E/P, D, F), and of down (E/P, F, D)."""
        return self.gate.to_local(), self.up.to_local(), self.down.to_local()

    @torch.no_grad()
    def balance(self) -> None:
        """As of one device: the load is that of all ranks' tokens."""
        dist.all_reduce(self.router.load, group=self.data)
        super().balance()


class Gather(LocalExperts):
    """Naive: N·P·E/P products of a token with an expert on each rank, where k·N would do."""

    def routed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate, up, down = self.weights()
        share = x.new_zeros(len(x), self.shape.routed).scatter(1, chosen, weights.to(x.dtype))  # (N, E)
        x, share = (whole(t, self.mesh, Shard(0)) for t in (x, share))  # (P·N, D), (P·N, E)
        mine = share.chunk(self.group.size(), dim=1)[self.group.rank()]  # (P·N, E/P)
        y = (F.silu(x @ gate) * (x @ up)) @ down  # (E/P, P·N, D)
        y = whole((y * mine.mT[..., None]).sum(0), self.mesh, Partial())  # (P·N, D)
        return y.chunk(self.group.size())[self.group.rank()]  # (N, D)


class Exchange(LocalExperts):
    """All-to-all of as many rows as there are: M = Σ over ranks of what they send here; the host waits for counts."""

    def routed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        (N, k), P = chosen.shape, self.group.size()
        order = chosen.flatten().argsort(stable=True)  # (N·k,), by expert, and so by rank
        here = count(chosen, self.shape.routed).long().view(P, -1)  # (P, E/P), what this rank sends
        there = swap(here.flatten(), self.group).view(P, -1)  # (P, E/P), what the others send here
        sent, received = here.sum(1).tolist(), there.sum(1).tolist()
        rows = swap(x[order // k], self.group, received, sent)  # (M, D), by rank, then by expert
        y = swap(self.compute(rows, there), self.group, sent, received)  # (N·k, D)
        y = y[order.argsort()].view(N, k, -1)  # (N, k, D), by token again
        return (y * weights[..., None].to(y.dtype)).sum(1)  # (N, D)

    def compute(self, rows: Tensor, there: Tensor) -> Tensor:
        """Each of the `rows` (M, D) through its expert; `there` (P, E/P) says how many come from where: (M, D)."""
        gate, up, down = self.weights()
        expert = torch.arange(there.shape[1], device=rows.device).repeat(len(there))  # (P·E/P,)
        order = expert.repeat_interleave(there.flatten(), output_size=len(rows)).argsort(stable=True)  # (M,)
        ends = there.sum(0).cumsum(0).to(torch.int32)  # (E/P,)
        rows = rows[order]  # (M, D), by expert
        hidden = F.silu(grouped(rows, gate, ends)) * grouped(rows, up, ends)  # (M, F)
        return grouped(hidden, down, ends)[order.argsort()]  # (M, D)


class Capacity(LocalExperts):
    """All-to-all of equal parts: of each rank C = ⌈factor·k·N/E⌉ rows for each expert. What is dropped adds nothing."""

    def routed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        (N, k), P, E = chosen.shape, self.group.size(), self.shape.routed
        C = math.ceil(self.factor * k * N / E)
        places = slots(chosen, E, C)  # (N·k,), where each goes; E·C: nowhere
        self.dropped = (places == E * C).float().mean()  # scalar
        token = torch.arange(N, device=x.device).repeat_interleave(k)  # (N·k,)
        rows = x.new_zeros(E * C + 1, x.shape[1]).index_copy(0, places, x[token])[:-1]  # (E·C, D)
        rows = swap(rows, self.group).view(P, E // P, C, -1).transpose(0, 1).flatten(1, 2)  # (E/P, P·C, D)
        gate, up, down = self.weights()
        y = (F.silu(rows @ gate) * (rows @ up)) @ down  # (E/P, P·C, D)
        y = swap(y.view(E // P, P, C, -1).transpose(0, 1).flatten(0, 2), self.group)  # (E·C, D)
        y = F.pad(y, (0, 0, 0, 1))[places].view(N, k, -1)  # (N, k, D)
        return (y * weights[..., None].to(y.dtype)).sum(1)  # (N, D)


WAYS = {"gather": Gather, "exchange": Exchange, "capacity": Capacity}


def whole(x: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """What the ranks' x are parts of: all-gather of Shard, all-reduce of Partial. With the sum of gradients."""
    return DTensor.from_local(x, mesh, [placement], run_check=False).full_tensor(grad_placements=[Partial()])


def swap(
    x: Tensor, group: dist.ProcessGroup, received: list[int] | None = None, sent: list[int] | None = None
) -> Tensor:
    """All-to-all: the first `sent[0]` rows of x go to rank 0, and so on; equal parts if not given. With gradient."""
    return collectives.all_to_all_single_autograd(x.contiguous(), received, sent, group)


def slots(chosen: Tensor, E: int, C: int) -> Tensor:
    """Place of each of the choices (N, k) among E·C, C for each expert, filled by token; E·C where it is full: (N·k,)."""
    expert, order = chosen.flatten().sort(stable=True)  # (N·k,) each
    load = count(chosen, E).long()  # (E,)
    before = load.cumsum(0) - load  # (E,), where each expert's choices begin
    place = torch.arange(len(order), device=chosen.device) - before[expert]  # (N·k,), within the expert
    return torch.where(place < C, expert * C + place, E * C)[order.argsort()]  # (N·k,)


def shard_experts(model: nn.Module, mesh: DeviceMesh, way: str = "exchange", factor: float = 1.25) -> None:
    """Let every mixture of experts in `model` keep only this rank's experts, and compute in the given `way`.

    The last dimension of `mesh` shares the experts; one before it holds replicas. ValueError where E is no multiple.
    """
    if way not in WAYS:
        raise ValueError(f"unknown way {way!r}; expected one of {', '.join(WAYS)}")
    for part in [module for module in model.modules() if isinstance(module, Experts)]:
        if part.shape.routed % mesh.size(-1):
            raise ValueError(
                f"{part.shape.routed} routed experts do not divide among {mesh.size(-1)} ranks; give a number of ranks that divides {part.shape.routed}"
            )
        part.__class__ = WAYS[way]  # the same module with other methods, so that names of weights stay
        part.mesh = mesh[mesh.mesh_dim_names[-1]] if mesh.ndim > 1 else mesh
        part.group, part.factor = part.mesh.get_group(), factor
        part.data = data_group(mesh)
        for name in ("gate", "up", "down"):
            local = getattr(part, name).detach().chunk(mesh.size(-1))[mesh.get_local_rank(-1)]
            local = local.clone() if local.is_meta else local.to(device(mesh), copy=True)  # a view would keep them all
            placed = DTensor.from_local(local, mesh, [Replicate()] * (mesh.ndim - 1) + [Shard(0)], run_check=False)
            setattr(part, name, nn.Parameter(placed))


def data_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All ranks of the mesh that `shard_experts` takes: those with tokens of the same step."""
    return (mesh._flatten("dp") if mesh.ndim > 1 else mesh).get_group()


def device(mesh: DeviceMesh) -> torch.device:
    """This rank's device, of the mesh's kind."""
    kind = mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


def is_expert(parameter: Tensor) -> bool:
    """Whether a weight is of routed experts, each (E, ·, ·)."""
    return parameter.dim() == 3


@torch.no_grad()
def measure(part: LocalExperts) -> Balance:
    """Balance of a layer's last forward pass over the ranks that share its experts; the same on all of them."""
    P = part.group.size()
    load = count(part.chosen, part.shape.routed)  # (E,)
    dropped = torch.as_tensor(part.dropped, device=load.device).view(1) / P  # (1,)
    sums = torch.cat((load, dropped))  # (E+1,)
    dist.all_reduce(sums, group=part.group)
    load, ranks = sums[:-1], sums[:-1].view(P, -1).sum(1)  # (E,), (P,)
    return Balance((load.max() / load.mean()).item(), (ranks.max() / ranks.mean()).item(), sums[-1].item())
