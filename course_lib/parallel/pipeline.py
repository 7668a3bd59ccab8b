"""Pipeline parallelism: the model cut into stages of layers; micro-batches follow each other through the stages.

Naive (`ByHand`): all forwards, then all backwards, each message sent and received by hand. With one micro-batch the
other ranks idle; with m of them it is GPipe. Real (`pipeline`): the same stages under a schedule of PyTorch's, by name.

    pipe = pipeline("1F1B", Transformer(config), rows=8, microbatches=4, device=device)  # on each rank
    optimizer = torch.optim.AdamW(pipe.parameters())
    loss = pipe.step(tokens, targets)  # gradients are there; the loss on the rank with the last stage, None elsewhere
    clip_grad_norm(pipe.parameters(), 1.0)
    optimizer.step()

What each rank does under a schedule is in tables.py. Shapes: B rows of one micro-batch, T tokens, D width,
V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from course_lib.llm.model import Transformer
from course_lib.parallel.stages import Stage, cut, loss_of, place
from course_lib.parallel.tables import SINGLE, per_rank, placement


class Watched(PipelineStage):
    """PyTorch's stage, whose actions are named to whoever watches: "2F0", "2B0", or its halves "2I0" and "2W0"."""

    pipeline: "Pipeline"
    latest = 0  # micro-batch of the last forward: the loss that follows belongs to it

    def watch(self, kind: str, number: int) -> AbstractContextManager:
        return self.pipeline.watch(f"{self.stage_index}{kind}{number}")

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.latest = fwd_chunk_id
        with self.watch("F", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, **kwargs: Any) -> Any:
        with self.watch("B" if full_backward else "I", bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, loss, full_backward, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, **kwargs: Any) -> Any:
        with self.watch("W", bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, **kwargs)

    def _warmup_forward_vote(self, *args: Any, **kwargs: Any) -> Tensor:
        """Shapes are told, on every rank: no need to vote by messages on whether to find them out."""
        return torch.ones((), dtype=torch.int32, device="cpu")

    _warmup_backward_result = _warmup_forward_vote

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        with self.watch("F", self.latest):
            return loss_of(logits, targets)


@dataclass
class Pipeline:
    """The stages of this rank and the schedule that runs them.

    ``watch(name)`` is entered around each action; `npu.ledger().phase` makes the ledger tell them apart.
    """

    stages: list[Stage]
    schedule: schedules._PipelineSchedule
    watch: Callable[[str], AbstractContextManager] = nullcontext

    def parameters(self) -> Iterator[nn.Parameter]:
        return chain.from_iterable(stage.parameters() for stage in self.stages)

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor | None:
        """Gradients of the mean loss of all rows (rows, T). The loss where the last stage is, None on other ranks."""
        first, last = self.stages[0].embedding is not None, self.stages[-1].unembedding is not None
        losses: list[Tensor] = []
        inputs, target = ((tokens,) if first else ()), (targets if last else None)
        self.schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        return torch.stack(losses).mean().detach() if losses else None


def pipeline(
    name: str, model: Transformer, rows: int, microbatches: int, device: torch.device | str, vpp: int | None = None,
    group: dist.ProcessGroup | None = None, tokens: int | None = None, streams: int = 1,
) -> Pipeline:  # fmt: skip
    """This rank's part of ``model`` on ``device``, under the schedule called ``name``.

    A step has ``rows`` rows of ``tokens`` tokens (default: the context), cut into ``microbatches``. ``group`` are the
    ranks of the pipeline, default all. Shapes are told to PyTorch beforehand, so that no step is spent to find them.
    Sequence parallelism leaves a rank one of ``streams`` parts of the residual stream, by tokens.
    """
    pp, rank = dist.get_world_size(group), dist.get_rank(group)
    parts = cut(len(model.blocks), pp * per_rank(name, vpp))
    B, T, D, V = check(rows, microbatches), tokens or model.config.context, model.config.width, model.config.vocab_size
    dtype = model.embedding.weight.dtype
    stages, wrapped = [], []
    for index in placement(name, pp, vpp)[rank]:
        stage = place(Stage(model, parts[index], T), device)
        ins = like(B, T, dtype=torch.int64) if stage.embedding is not None else like(B, T // streams, D, dtype=dtype)
        out = like(B, T // streams, D, dtype=dtype) if stage.unembedding is None else like(B, T, V, dtype=dtype)
        stages.append(stage)
        wrapped.append(Watched(stage, index, len(parts), torch.device(device), ins, out, group=group))
    kind = schedules.get_schedule_class(name)
    run = kind(wrapped[0] if name in SINGLE else wrapped, microbatches, loss_fn=wrapped[-1].loss)
    found = Pipeline(stages, run)
    for one in wrapped:
        one.pipeline = found
    return found


def like(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor without storage, as a stage's input or output; of floats, one that has a gradient."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def check(rows: int, microbatches: int) -> int:
    """Rows of one micro-batch; ValueError where they do not divide."""
    if microbatches < 1 or rows % microbatches:
        raise ValueError(f"{rows} rows do not divide into {microbatches} micro-batches of equal size")
    return rows // microbatches


class ByHand:
    """GPipe in twenty lines: one stage on each rank, all forwards, then all backwards, one message at a time."""

    def __init__(
        self, model: Transformer, rows: int, microbatches: int, device: torch.device | str,
        group: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        self.group, self.rank, self.last = group, dist.get_rank(group), dist.get_world_size(group) - 1
        self.stage = Stage(model, cut(len(model.blocks), self.last + 1)[self.rank]).to(device)
        self.microbatches, self.B, self.device = microbatches, check(rows, microbatches), device
        self.width, self.dtype = model.config.width, model.embedding.weight.dtype
        self.watch: Callable[[str], AbstractContextManager] = nullcontext  # as in `Pipeline`

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.stage.parameters()

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor | None:
        """As `Pipeline.step`."""
        rows = zip(tokens.split(self.B), targets.split(self.B), strict=True)
        passes = [self.forward(number, *part) for number, part in enumerate(rows)]
        for number, (x, y) in enumerate(passes):
            grad = None if self.rank == self.last else self.receive(y.shape, self.rank + 1)
            with self.watch(f"{self.rank}B{number}"):
                y.backward(grad)
            if self.rank > 0:
                dist.send(x.grad, group=self.group, group_dst=self.rank - 1)
        return sum(y.detach() for _, y in passes) if self.rank == self.last else None

    def forward(self, number: int, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Input and output of this stage for one micro-batch, the output sent on; of the last stage its share of the loss."""
        x = tokens if self.rank == 0 else self.receive((*tokens.shape, self.width), self.rank - 1).requires_grad_()
        with self.watch(f"{self.rank}F{number}"):
            y = self.stage(x)  # (B, T, D) or (B, T, V)
            if self.rank == self.last:
                return x, loss_of(y, targets) / self.microbatches
        dist.send(y.detach(), group=self.group, group_dst=self.rank + 1)
        return x, y

    def receive(self, shape: tuple[int, ...], rank: int) -> Tensor:
        """A tensor (B, T, D) from another rank of the pipeline."""
        buffer = torch.empty(shape, dtype=self.dtype, device=self.device)
        dist.recv(buffer, group=self.group, group_src=rank)
        return buffer


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], most: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """As `nn.utils.clip_grad_norm_`, where each rank of ``group`` has other parameters: the norm is that of all of them."""
    mine = [p for p in parameters if p.grad is not None]
    square = nn.utils.get_total_norm([p.grad for p in mine]) ** 2  # scalar
    dist.all_reduce(square, group=group)
    nn.utils.clip_grads_with_norm_(mine, most, square.sqrt())
    return square.sqrt()
