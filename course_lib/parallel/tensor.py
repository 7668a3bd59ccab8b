"""Tensor parallelism: each rank computes with a part of every matrix, whole heads and whole columns of the feed-forward.

    query, key, value, gate, up     split by columns: x whole, a part of the result's features on each rank
    output, down                    split by rows: a part of the features in, partial sums of the whole result out

So a layer needs two sums over ranks in forward and two in backward (Megatron-LM, arXiv:1909.08053).

    split_by_hand   naive: two autograd functions, f before columns and g after rows; each product has its own f
    split           DTensor: one transfer for the products that share an input; embedding and unembedding by vocabulary,
                    the loss on parts of the logits; with `sequence`, norms and residual stream by tokens, a sum then
                    being a reduce-scatter before them and an all-gather behind (arXiv:2205.05198)

B batch, T tokens, D width, F features in, P ranks.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from course_lib.llm.config import Config
from course_lib.llm.model import Transformer

COLUMNS = ("query", "key", "value", "gate", "up")
ROWS = ("output", "down")


class Copy(torch.autograd.Function):
    """f: what is on every rank goes into parts; backward sums what the parts' gradients say about it."""

    @staticmethod
    def forward(context: object, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        context.group = group
        return x.view_as(x)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=context.group)
        return gradient, None


class Sum(torch.autograd.Function):
    """g: partial results become the whole one on every rank; backward gives each its gradient as it is."""

    @staticmethod
    def forward(context: object, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class ColumnLinear(nn.Module):
    """A linear layer of which this rank has a P-th of the outputs: `weight` (out/P, in)."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.group, self.weight = group, part(linear.weight, 0, group)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(Copy.apply(x, self.group), self.weight)  # (B, T, out/P)


class RowLinear(nn.Module):
    """A linear layer of which this rank has a P-th of the inputs: `weight` (out, in/P)."""

    def __init__(self, linear: nn.Linear, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.group, self.weight = group, part(linear.weight, 1, group)

    def forward(self, x: Tensor) -> Tensor:
        return Sum.apply(F.linear(x, self.weight), self.group)  # (B, T, out)


def part(weight: Tensor, dim: int, group: dist.ProcessGroup | None) -> nn.Parameter:
    """This rank's P-th of a weight along `dim`."""
    return nn.Parameter(weight.detach().chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].clone())


def split_by_hand(model: Transformer, group: dist.ProcessGroup | None = None) -> None:
    """Naive: split the matrices of all layers; embedding, unembedding and norms stay whole on every rank."""
    check(model.config, dist.get_world_size(group))
    for module in model.blocks.modules():
        for names, kind in ((COLUMNS, ColumnLinear), (ROWS, RowLinear)):
            for name in names:
                if isinstance(getattr(module, name, None), nn.Linear):
                    setattr(module, name, kind(getattr(module, name), group))


@torch.no_grad()
def clip_split(model: nn.Module, most: float, group: dist.ProcessGroup | None = None) -> None:
    """Clip the gradients of a model split by hand: squares of parts are summed over ranks, those of whole weights not."""
    parts = {m.weight for m in model.modules() if isinstance(m, (ColumnLinear, RowLinear))}
    squares = {
        inside: [p.grad.square().sum() for p in model.parameters() if (p in parts) == inside]
        for inside in (True, False)
    }
    total = torch.stack(squares[True]).sum()  # scalar
    dist.all_reduce(total, group=group)
    norm = (total + torch.stack(squares[False]).sum()).sqrt()
    for p in model.parameters():
        p.grad.mul_((most / (norm + 1e-6)).clamp(max=1.0))


def split(model: Transformer, mesh: DeviceMesh, sequence: bool = True) -> None:
    """Split a model over `mesh` by DTensor; every weight becomes one.

    with loss_parallel():  # of torch.distributed.tensor.parallel: logits stay in parts, backward too
        model(tokens, targets).backward()
    """
    check(model.config, mesh.size())
    stream = Shard(1) if sequence else Replicate()  # of the residual stream (B, T, D)
    norm = SequenceParallel() if sequence else Everywhere()
    columns, rows = ColwiseParallel(), RowwiseParallel(output_layouts=stream)
    layer = {"attention_norm": norm, "feed_forward_norm": norm}
    layer |= {"attention": gather(stream, 3), "feed_forward": gather(stream, 0)}
    layer |= {f"attention.{name}": columns for name in ("query", "key", "value")} | {"attention.output": rows}
    layer |= {"feed_forward.gate": columns, "feed_forward.up": columns, "feed_forward.down": rows}
    for block in model.blocks:
        parallelize_module(block, mesh, layer)
    tied = model.unembedding.weight is model.embedding.weight
    embed = RowwiseParallel(input_layouts=Replicate(), output_layouts=stream)
    logits = ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False)  # (B, T, V/P)
    parallelize_module(model, mesh, {"embedding": embed, "norm": norm, "unembedding": logits})
    if tied:
        model.unembedding.weight = model.embedding.weight


def gather(stream: Placement, others: int) -> PrepareModuleInput:
    """Make a module's first input whole, once for all products that read it; it has `others` besides."""
    rest = (None,) * others
    return PrepareModuleInput(input_layouts=(stream, *rest), desired_input_layouts=(Replicate(), *rest))


class Everywhere(ParallelStyle):
    """A module that every rank computes in full, with weights that are DTensors like all others."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(*inputs, mesh, [Replicate()], run_check=False)

        return distribute_module(module, mesh, None, enter, lambda module, output, mesh: output.to_local())


def check(config: Config, P: int) -> None:
    """ValueError where a model does not divide among P ranks."""
    if config.latent or config.experts or config.mtp:
        raise ValueError("tensor parallelism here splits grouped-query attention and SwiGLU; take a preset without -v3")
    counts = {name: getattr(config, name) for name in ("heads", "kv_heads", "feed_forward", "vocab_size", "context")}
    odd = [f"{name} {count}" for name, count in counts.items() if count % P]
    if odd:
        raise ValueError(f"{', '.join(odd)}: expected multiples of {P} ranks")
