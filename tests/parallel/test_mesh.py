"""Combinations of parallel schemes train as one device does, and say what does not fit together."""

import math
from functools import cache

import pytest
import torch
from torch import nn

from course_lib.llm.config import Config
from course_lib.llm.model import Transformer
from course_lib.parallel import launch
from course_lib.parallel.mesh import Combined, Layout
from tests.parallel import test_expert
from tests.parallel.same import CLIP, ROWS, Run, adamw, alone, batches, close, shape, whole

GQA = shape("micro", layers=4, tied=False, heads=4, kv_heads=2)
V3 = shape("micro-v3", layers=4, mtp=0)
LAYOUTS = {
    "DP2 TP2 PP2": (GQA, Layout(dp=2, tp=2, pp=2), {"microbatches": 2}),
    "DP2 with accumulation": (GQA, Layout(dp=2), {"microbatches": 2}),
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


def train(config: Config, layout: Layout, device: str, options: dict) -> tuple[Run, float]:
    """The run of one rank, with the weights that it has; and the first gradient's norm."""
    trainer = Combined(config, layout, ROWS, here(device), adamw, clip=CLIP, **options)
    losses, norms = [], []
    for rows in batches(config):
        losses.append(trainer.step(*rows).item())
        norms.append(trainer.norm.item())
    return Run(losses, {name: weight for stage in trainer.part.stages for name, weight in whole(stage).items()}), norms[
        0
    ]


@pytest.mark.parametrize("name, device", CASES)
def test_same_losses_weights_and_gradient_as_one_device(name: str, device: str) -> None:
    config, layout, options = LAYOUTS[name]
    runs = launch(train, config, layout, device, options, ranks=layout.ranks, device=device)
    wanted, found, norm = expected(config), {}, first_norm(config)
    assert norm > CLIP  # clipping and AdamW would hide a gradient that is a multiple of the right one
    for rank, (run, its_norm) in enumerate(runs):
        close(run.losses, wanted.losses, f"rank {rank}: losses")
        close([its_norm], [norm], f"rank {rank}: norm")
        for weight, value in run.weights.items():
            close(value, wanted.weights[weight], f"rank {rank}: {weight}")
        found |= run.weights
    assert found.keys() == wanted.weights.keys()  # all stages together have the whole model
    assert all(len(run.weights) < len(found) for run, _ in runs) == (layout.pp > 1)


@cache
def first_norm(config: Config) -> float:
    """Norm of the first step's gradient on one device."""
    model = Transformer(config)
    test_expert.backward(model, *batches(config)[0])
    return nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()


# -- what does not fit is said ------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"dp": 3, "ep": 2}, {"tp": 0}, {"ep": 2}], ids=str)
def test_sizes_that_are_no_layout(sizes: dict) -> None:
    with pytest.raises(ValueError, match=r"expected sizes of at least 1, and dp a multiple of ep, found Layout\("):
        Layout(**sizes)


def refused() -> list[str]:
    messages = []
    for config, layout, rows, options in (
        (GQA, Layout(dp=4), ROWS, {}),
        (GQA, Layout(dp=2), 6, {"microbatches": 2}),
        (test_expert.config(), Layout(pp=2), ROWS, {}),
        (test_expert.config(), Layout(tp=2), ROWS, {}),
    ):
        with pytest.raises(ValueError) as caught:
            Combined(config, layout, rows, "cpu", adamw, **options)
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_together_is_said() -> None:
    for number, rows, mtp, tp in launch(refused, ranks=2, device="cpu"):
        assert number == "Layout(dp=4, tp=1, pp=1, ep=1) is 4 ranks; there are 2"
        assert rows == "6 rows do not divide into 2 micro-batches on each of 2 ranks"
        assert mtp.startswith("losses beside the model's own (mtp, sequence_loss) need the whole model")
        assert tp.startswith("tensor parallelism here splits grouped-query attention and SwiGLU")
