"""Combinations of parallel schemes train as one device does, and say what does not fit together."""

import dataclasses

import pytest
import torch

from course_lib.llm.config import Config
from course_lib.parallel import launch
from course_lib.parallel.mesh import Combined, Layout
from tests.parallel.same import CLIP, ROWS, Run, adamw, alone, assert_same, batches, shape, whole
from tests.parallel.test_expert import alone as alone_balanced
from tests.parallel.test_expert import config as balanced


def train(config: Config, layout: Layout, device: str, **options: str | int) -> Run:
    """The run of one rank, with the weights of its own stage only."""
    trainer = Combined(config, layout, ROWS, device, adamw, clip=CLIP, **options)
    losses = [trainer.step(*rows).item() for rows in batches(config)]
    return Run(losses, {name: weight for stage in trainer.part.stages for name, weight in whole(stage).items()})


def train_k(config, layout, device, options):
    return train(config, layout, device, **options)
