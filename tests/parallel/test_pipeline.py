"""Pipelines: every schedule trains to the losses and weights of one device; what is refused."""

import pytest
import torch
import torch.distributed as dist

from course_lib.llm.model import Transformer
from course_lib.parallel import launch
from course_lib.parallel.pipeline import ByHand, Pipeline, clip_grad_norm, pipeline
from course_lib.parallel.stages import Stage
from course_lib.parallel.tables import SCHEDULES
from tests.parallel.same import CLIP, ROWS, Run, adamw, alone, assert_same, batches, shape

CONFIG = shape("micro", layers=8, tied=False)
STEPS = 3
SYSTEM = {"cpu": {}, "npu": {"system": "mini-node"}}
HANDS = {"by hand, naive": 1, "by hand, GPipe": 4}  # micro-batches


def make(name: str, device: torch.device, microbatches: int = ROWS) -> ByHand | Pipeline:
    model = Transformer(CONFIG)
    if name in HANDS:
        return ByHand(model, ROWS, HANDS[name], device)
    return pipeline(name, model, ROWS, microbatches, device)


def train(name: str, device: str) -> Run:
    """On each rank: the mean loss of each step, and the weights of all stages."""
    device = torch.empty(0, device=device).device  # with the number of this rank's
    pipe, losses = make(name, device), []
    optimizer = adamw(pipe.parameters())
    for tokens, targets in batches(CONFIG, STEPS):
        loss = pipe.step(tokens.to(device), targets.to(device))
        clip_grad_norm(pipe.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(None if loss is None else loss.item())
    return gathered(losses, pipe.stages if hasattr(pipe, "stages") else [pipe.stage])


def gathered(losses: list[float | None], stages: list[Stage]) -> Run:
    """Losses from the rank that has them, weights from the rank of their stage."""
    mine = {name: p.detach().cpu() for stage in stages for name, p in stage.named_parameters()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (losses, mine))
    found = [theirs for theirs, _ in everyone if theirs[0] is not None]
    assert len(found) == 1, "the loss is on one rank, that of the last stage"
    return Run(found[0], {name: p for _, weights in everyone for name, p in weights.items()})


def train_all(names: tuple[str, ...], device: str) -> dict[str, Run]:
    return {name: train(name, device) for name in names}


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_same_loss(ranks: int, device: str) -> None:
    expected = alone(CONFIG, steps=STEPS)
    for found in launch(train_all, (*HANDS, *SCHEDULES), device, ranks=ranks, device=device, **SYSTEM[device]):
        for name in (*HANDS, *SCHEDULES):
            assert_same(found[name], expected)
