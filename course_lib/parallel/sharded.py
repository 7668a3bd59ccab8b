"""ZeRO: data parallelism in which no rank keeps all of the training state (Rajbhandari et al. 2019, arXiv:1910.02054).

    stage   sharded besides              by hand (naive)                                   by PyTorch
    1       optimizer state              each rank steps the weights it owns, broadcasts   ZeroRedundancyOptimizer
    2       gradients                    each gradient is reduced to its owner only        fully_shard, weights kept
    3       weights                      a layer's are gathered when it computes           fully_shard

By hand each transfer is waited for. `fully_shard` (FSDP2) gathers the next layer while one computes, and sends gradients
off beside backward; what it calls ZeRO-2 gathers in forward and keeps the weights until backward has used them.

P ranks, n numbers.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from course_lib.parallel.data import average


class Owned:
    """Stages 1 and 2 by hand: `make(parameters)` gives the optimizer of the weights that this rank owns."""

    def __init__(self, model: nn.Module, make: Callable[[list[Tensor]], Optimizer], stage: int = 1,
                 group: dist.ProcessGroup | None = None) -> None:  # fmt: skip
        self.model, self.stage, self.group, self.rank = model, stage, group, dist.get_rank(group)
        self.parameters = list(model.parameters())
        owners = deal([p.numel() for p in self.parameters], dist.get_world_size(group))
        self.owner = dict(zip(self.parameters, owners))
        self.optimizer = make([p for p in self.parameters if self.owner[p] == self.rank])

        for p in self.parameters if stage == 2 else ():
            p.register_post_accumulate_grad_hook(self.give)

    def reduce(self) -> None:
        """Between backward and step: in stage 1, average all gradients on all ranks; in stage 2 backward has."""
        if self.stage == 1:
            average(self.model, self.group)

    @torch.no_grad()
    def give(self, p: Tensor) -> None:
        """Called by backward when the gradient of `p` is there: its owner gets the average, the others forget it."""
        owner = self.owner[p]
        dist.reduce(p.grad, group=self.group, group_dst=owner)
        p.grad = p.grad / dist.get_world_size(self.group) if owner == self.rank else None

    def clip(self, most: float) -> None:
        """As of one device: in stage 1 each rank has all gradients, in stage 2 only those that no other has."""
        if self.stage == 1:
            nn.utils.clip_grad_norm_(self.parameters, most)
        else:
            clip_parts(self.parameters, most, self.group)

    @torch.no_grad()
    def step(self) -> None:
        """Step what this rank owns; then each owner sends its weights to all."""
        self.optimizer.step()
        for p in self.parameters:
            dist.broadcast(p.detach(), group=self.group, group_src=self.owner[p])
            p.grad = None


class Unit:
    """Stage 3 by hand: one module's weights are views into one flat tensor, whole only while the module computes.

    `shard` (n/P,) is what stays, and what the optimizer steps. Backward finds the weights where forward had them, for
    their storage is emptied and filled rather than replaced; so what autograd saved is right again. The `last` unit
    stays whole after forward, as backward begins with it.
    """

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter], last: bool, group: dist.ProcessGroup | None
                 ) -> None:  # fmt: skip
        self.parameters, self.group = parameters, group
        P, sizes = dist.get_world_size(group), [p.numel() for p in parameters]
        self.n = sum(sizes)
        self.flat = parameters[0].new_zeros(-(-self.n // P) * P)  # (n,), up to a multiple of P
        for p, part in zip(parameters, self.flat[: self.n].split(sizes)):
            p.data = part.copy_(p.detach().flatten()).view_as(p)
            p.register_post_accumulate_grad_hook(self.collect)
        self.shard = nn.Parameter(self.flat.chunk(P)[dist.get_rank(group)].clone())  # (n/P,)
        self.bytes, self.came = self.flat.untyped_storage().nbytes(), 0
        module.register_forward_pre_hook(self.gather)
        if not last:
            module.register_forward_hook(self.release)
            module.register_full_backward_pre_hook(self.gather)
        self.release()

    @torch.no_grad()
    def gather(self, *_: object) -> None:
        """Make the weights whole."""
        if not self.flat.untyped_storage().nbytes():
            self.flat.untyped_storage().resize_(self.bytes)
            dist.all_gather(
                list(self.flat.chunk(dist.get_world_size(self.group))), self.shard.detach(), group=self.group
            )

    def release(self, *_: object) -> None:
        """Keep this rank's part alone."""
        self.flat.untyped_storage().resize_(0)

    @torch.no_grad()
    def collect(self, p: Tensor) -> None:
        """Called by backward for each gradient: at the last one they are averaged, each rank has its part, weights go."""
        self.came += 1
        if self.came < len(self.parameters):
            return
        P = dist.get_world_size(self.group)
        gradients = F.pad(torch.cat([q.grad.flatten() for q in self.parameters]), (0, len(self.flat) - self.n))  # (n,)
        self.shard.grad = torch.empty_like(self.shard)  # (n/P,)
        dist.reduce_scatter(self.shard.grad, list(gradients.chunk(P)), group=self.group)
        self.shard.grad /= P
        self.came = 0
        for q in self.parameters:
            q.grad = None
        self.release()


def shard_by_hand(model: nn.Module, group: dist.ProcessGroup | None = None) -> list[Unit]:
    """Stage 3 by hand: one unit for each of the model's `blocks`, and one for all other weights."""
    inside = [list(block.parameters()) for block in model.blocks]
    rest = [p for p in model.parameters() if not any(p is q for block in inside for q in block)]
    return [*(Unit(b, ps, False, group) for b, ps in zip(model.blocks, inside)), Unit(model, rest, True, group)]


def shard(model: nn.Module, mesh: DeviceMesh, stage: int = 3, dtype: torch.dtype | None = None) -> nn.Module:
    """Stages 2 and 3 by PyTorch: FSDP2 over each of the model's `blocks`, and over the rest.

    With a `dtype`, as bfloat16, the blocks' weights are gathered and multiplied in it; the residual stream, the loss and
    sums of gradients stay in float32. ValueError for other stages.
    """
    if stage not in (2, 3):
        raise ValueError(f"fully_shard makes ZeRO-2 and ZeRO-3, not stage {stage}; for 1 take owned_by_torch")
    policy = MixedPrecisionPolicy(dtype, torch.float32, torch.float32) if dtype else MixedPrecisionPolicy()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=stage == 3, mp_policy=policy)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)  # backward begins with the rest


def owned_by_torch(model: nn.Module, kind: type[Optimizer], group: dist.ProcessGroup | None = None, **settings: object
                   ) -> ZeroRedundancyOptimizer:  # fmt: skip
    """Stage 1 by PyTorch, to go with DDP: an optimizer of `kind` that steps a share and broadcasts it."""
    return ZeroRedundancyOptimizer(model.parameters(), kind, process_group=group, **settings)


def deal(sizes: list[int], P: int) -> list[int]:
    """A rank for each size, so that the ranks' sums are near each other: the largest first, to who has least."""
    held, ranks = [0] * P, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        ranks[place] = held.index(min(held))
        held[ranks[place]] += sizes[place]
    return ranks


@torch.no_grad()
def clip_parts(parameters: Iterable[Tensor], most: float, group: dist.ProcessGroup | None = None) -> None:
    """Clip gradients of which each rank has other parts: their squares are summed over the ranks."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.stack([g.square().sum() for g in gradients]).sum()  # scalar; a rank has at least one
    dist.all_reduce(total, group=group)
    for g in gradients:
        g.mul_((most / (total.sqrt() + 1e-6)).clamp(max=1.0))


def held(parameters: Iterable[Tensor], optimizer: Optimizer) -> dict[str, int]:
    """Bytes that this rank keeps between backward and step: weights, gradients, optimizer state (its matrices)."""
    parameters = list(parameters)
    state = [value for p in parameters for value in optimizer.state.get(p, {}).values() if value.dim()]
    kinds = {"weights": parameters, "gradients": [p.grad for p in parameters if p.grad is not None], "optimizer": state}
    return {kind: sum(size(t) for t in tensors) for kind, tensors in kinds.items()}


def size(t: Tensor) -> int:
    """Bytes of a tensor on this rank; none where its storage has been emptied."""
    local = t.to_local() if isinstance(t, DTensor) else t
    return local.numel() * local.element_size() if local.untyped_storage().nbytes() else 0
