"""Combinations of parallel schemes train as one device does, and say what does not fit together."""

import dataclasses
from functools import cache

import pytest
import torch
import torch.distributed as dist

from course_lib.llm.config import Config
from course_lib.parallel import launch
from course_lib.parallel.mesh import Combined, Layout, pieces
from tests.parallel import test_expert
from tests.parallel.same import CLIP, ROWS, Run, adamw, alone, assert_same, batches, close, shape, whole

GQA = shape("micro", layers=4, tied=False, heads=4, kv_heads=2)
V3 = shape("micro-v3", layers=4, mtp=0)
LAYOUTS = {
    "DP2 TP2 PP2": (GQA, Layout(dp=2, tp=2, pp=2), {"microbatches": 2}),
    "DP2 TP2 with accumulation": (GQA, Layout(dp=2, tp=2), {"microbatches": 2}),
    "DP2 PP2 interleaved": (GQA, Layout(dp=2, pp=2), {"microbatches": 4, "schedule": "Interleaved1F1B"}),
    "DP4 EP2": (test_expert.config(), Layout(dp=4, ep=2), {}),
    "DP4 EP4": (test_expert.config(), Layout(dp=4, ep=4), {"way": "gather"}),
    "DP2 EP1": (test_expert.config(), Layout(dp=2), {}),
    "DP2 EP2 PP2": (V3, Layout(dp=2, ep=2, pp=2), {"microbatches": 2}),
}
CASES = [(name, "cpu") for name in LAYOUTS] + [("DP2 TP2 PP2", "npu"), ("DP4 EP2", "npu")]


@cache
def expected(config: Config) -> Run:
    """One device, which balances its experts if it has any."""
    return test_expert.alone(config)[0] if config.experts else alone(config)


def here(device: str) -> torch.device:
    """This rank's own device."""
    return torch.device(device, *([] if device == "cpu" else [torch.get_device_module(device).current_device()]))


def train(config: Config, layout: Layout, device: str, options: dict) -> Run:
    """The run of one rank, with the weights that it has."""
    trainer = Combined(config, layout, ROWS, here(device), adamw, clip=CLIP, **options)
    losses = [trainer.step(*rows).item() for rows in batches(config)]
    return Run(losses, {name: weight for stage in trainer.part.stages for name, weight in whole(stage).items()})


@pytest.mark.parametrize("name, device", CASES)
def test_same_losses_and_weights_as_one_device(name: str, device: str) -> None:
    config, layout, options = LAYOUTS[name]
    runs = launch(train, config, layout, device, options, ranks=layout.ranks, device=device)
    wanted, found = expected(config), {}
    for rank, run in enumerate(runs):
        close(run.losses, wanted.losses, f"rank {rank}: losses")
        for weight, value in run.weights.items():
            close(value, wanted.weights[weight], f"rank {rank}: {weight}")
        found |= run.weights
    assert found.keys() == wanted.weights.keys()  # all stages together have the whole model
    assert all(len(run.weights) < len(found) for run in runs) == (layout.pp > 1)


def norms(config: Config, layout: Layout) -> tuple[float, int]:
    """Norm of the first step's gradient over all ranks, and how many numbers this rank keeps."""
    trainer = Combined(config, layout, ROWS, "cpu", adamw, clip=1e9)
    found = []
    trainer.optimizer.register_step_pre_hook(lambda *_: found.append(trainer.norm.item()))
    trainer.step(*batches(config)[0])
    return found[0], sum(p.numel() // pieces(p) for p in trainer.parameters())
