"""Parallel schemes combined on one DeviceMesh: from the sizes of DP, TP, PP and EP to a trained step.

    layout = Layout(dp=2, tp=2, pp=2)                       # 8 ranks
    trainer = Combined(config, layout, rows=8, device=device, optimizer=torch.optim.AdamW)
    loss = trainer.step(tokens, targets)                    # all 8 rows on every rank, which takes its own

The mesh has dimensions pp, replica, ep, tp, the last between neighbours. Replicas times EP make DP: ranks that share
experts have tokens of their own, so in all that is not routed they are data-parallel. A gradient is the sum over the
ranks that hold the same piece of a weight, divided by DP, as the loss is the mean over all tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from course_lib.llm.config import Config
from course_lib.llm.experts import Experts
from course_lib.llm.model import Transformer
from course_lib.llm.recompute import apply
from course_lib.parallel.expert import data_group, is_expert, shard_experts
from course_lib.parallel.main_weights import Divided, MainWeights, by_owners, local, pieces
from course_lib.parallel.pipeline import pipeline
from course_lib.parallel.stages import place
from course_lib.parallel.tensor import split


@dataclass(frozen=True)
class Layout:
    """How many ranks share what: `dp` the rows, `tp` each layer, `pp` the layers; `ep` of the `dp` share experts."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if min(self.dp, self.tp, self.pp, self.ep) < 1 or self.dp % self.ep:
            raise ValueError(f"expected sizes of at least 1, and dp a multiple of ep, found {self}")

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    def mesh(self, device: torch.device | str) -> DeviceMesh:
        """All ranks as (pp, replica, ep, tp); ValueError where their number is another."""
        if dist.get_world_size() != self.ranks:
            raise ValueError(f"{self} is {self.ranks} ranks; there are {dist.get_world_size()}")
        shape = (self.pp, self.dp // self.ep, self.ep, self.tp)
        return init_device_mesh(torch.device(device).type, shape, mesh_dim_names=("pp", "replica", "ep", "tp"))


class Combined:
    """A model laid out over all ranks, its optimizer, and the step that trains it.

    `rows` are all rows of a step, of which each of the DP ranks takes its part, in `microbatches`. `sequence`: with TP
    the residual stream is split by tokens. `dtype`: of the weights, None for float32; `zero` 1 keeps main weights in
    float32 besides, each rank its part (main_weights.py). `recompute` as llm.recompute has it, `way` and `factor` as
    expert.py. `shapes`: weights have no numbers, and only those of this rank are ever made: for shape-only execution.
    """

    def __init__(
        self, config: Config, layout: Layout, rows: int, device: torch.device | str,
        optimizer: Callable[..., torch.optim.Optimizer], seed: int = 0, microbatches: int = 1, schedule: str = "1F1B",
        vpp: int | None = None, way: str = "exchange", factor: float = 1.25, clip: float = 1.0, sequence: bool = True,
        dtype: torch.dtype | None = None, recompute: str = "none", zero: int = 0, shapes: bool = False,
    ) -> None:  # fmt: skip
        if zero not in (0, 1):
            raise ValueError(f"zero={zero}: expected 0, or 1 for main weights and optimizer state divided over DP")
        if rows % (layout.dp * microbatches):
            raise ValueError(
                f"{rows} rows do not divide into {microbatches} micro-batches on each of {layout.dp} ranks"
            )
        self.layout, self.device, self.clip = layout, device, clip
        mesh = layout.mesh(device)
        both = mesh["replica", "ep"]
        self.data, self.replicas = data_group(both), mesh.get_group("replica")
        with torch.device("meta") if shapes else nullcontext():
            model = Transformer(config, seed).to(dtype)
        apply(model, recompute)
        shard_experts(model, both, way, factor)
        if layout.tp > 1:
            split(model if shapes else model.to(device), mesh["tp"], sequence)
        if layout.pp > 1:
            mine = rows // layout.dp
            streams = layout.tp if sequence else 1
            self.part = pipeline(
                schedule, model, mine, microbatches, device, vpp, mesh.get_group("pp"), streams=streams
            )
            for experts in self.experts():  # the whole model does so itself
                experts.register_forward_hook(lambda experts, *_: experts.count())
        else:
            self.part = Undivided(place(model, device), microbatches)
        self.main = MainWeights(self.shared(microbatches), optimizer) if zero else None
        self.optimizer = self.main.optimizer if self.main else optimizer(groups(self.parameters()))

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's weights, those of the routed experts with the rest."""
        return self.part.parameters()

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Train on all rows (rows, T) of a step; the mean loss of all, a scalar, on every rank."""
        mine = (part.chunk(self.layout.dp)[self.data.rank()].to(self.device) for part in (tokens, targets))
        with loss_parallel():  # of logits split by TP
            loss = self.part.step(*mine)
        self.update()
        for experts in self.experts():
            experts.balance()
        return mean(loss, self.layout, self.device)

    def update(self) -> None:
        """Step the weights by the gradients of all ranks."""
        if self.main:
            self.norm = self.main.update(self.clip)  # scalar, before clipping
            return
        self.reduce()
        self.norm = clip_gradients(self.parameters(), self.clip, self.layout)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def shared(self, microbatches: int) -> list[Divided]:
        """Weights by the ranks that have the same: ZeRO-1's groups.

        A schedule divides gradients by the micro-batches when all are there; main weights have taken them away by then.
        """
        stage, dp = self.layout.dp * self.layout.tp, self.layout.dp
        over = dp * (microbatches if self.layout.pp > 1 else 1)
        return by_owners(self.parameters(), lambda p: self.replicas if is_expert(p) else self.data, stage, over)

    def reduce(self) -> None:
        """Gradients of the mean over all tokens, from those of this rank's."""
        parameters = list(self.parameters())
        for p in parameters:
            if isinstance(p, DTensor) and p.grad.placements != p.placements:  # parts of a sum over TP
                p.grad = p.grad.redistribute(placements=p.placements)
        add_up([p for p in parameters if not is_expert(p)], self.data, self.layout.dp)
        add_up([p for p in parameters if is_expert(p)], self.replicas, self.layout.dp)

    def experts(self) -> list[Experts]:
        """The mixtures of experts on this rank."""
        return [m for stage in self.part.stages for m in stage.modules() if isinstance(m, Experts)]


class Undivided:
    """All layers on one rank, as a Pipeline of one stage would run them, and with the losses beside the model's own."""

    def __init__(self, model: Transformer, microbatches: int) -> None:
        self.stages, self.microbatches = [model], microbatches
        self.watch: Callable[[str], AbstractContextManager] = nullcontext  # as in `Pipeline`

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.stages[0].parameters()

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Gradients of the mean loss of all rows (rows, T), and that loss."""
        (model,), m, losses = self.stages, self.microbatches, []
        for number, (x, y) in enumerate(zip(tokens.chunk(m), targets.chunk(m), strict=True)):
            with self.watch(f"0F{number}"):
                loss = model(x, y) / m  # scalar
            with self.watch(f"0B{number}"):
                (loss if model.aside is None else loss + model.aside / m).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()


def groups(parameters: Iterable[Tensor]) -> list[dict[str, list[Tensor]]]:
    """Groups for an optimizer, whose operators on many weights at once take those of one mesh at a time."""
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for p in parameters:
        by_mesh.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return [{"params": members} for members in by_mesh.values()]


@torch.no_grad()
def add_up(parameters: Iterable[Tensor], group: dist.ProcessGroup, over: int) -> None:
    """Gradients summed over the ranks of `group` and divided by `over`, in one all-reduce."""
    gradients = [local(p.grad) for p in parameters]
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients]) / over  # (numbers in all,)
    if group.size() > 1:
        dist.all_reduce(flat, group=group)
    for g, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(total.view_as(g))


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], most: float, layout: Layout) -> Tensor:
    """Scale gradients down to norm `most` of the whole model; gives the norm before, a scalar.

    Every rank adds the squares of what it holds, each divided by the number of ranks of its stage that hold the same.
    """
    parameters, stage = list(parameters), layout.dp * layout.tp
    total = sum(local(p.grad).square().sum() * (pieces(p) / stage) for p in parameters)  # scalar
    dist.all_reduce(total)
    norm = total.sqrt()
    for p in parameters:
        local(p.grad).mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def mean(loss: Tensor | None, layout: Layout, device: torch.device | str) -> Tensor:
    """The mean over all rows, on every rank; `loss` is None but on the ranks with the last layer."""
    share = torch.zeros((), device=device) if loss is None else local(loss) / (layout.dp * layout.tp)  # scalar
    dist.all_reduce(share)
    return share
