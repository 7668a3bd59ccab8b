"""Chips and small helpers for the core's tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from course_lib import data
from course_lib.chip.core import Run, launch
from course_lib.chip.spec import ChipSpec, load_chip

A2, A5 = "ascend-910b2", "ascend-950dt"


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def aiv() -> Callable[..., Run]:
    """Run a kernel on one AIV of an A2."""

    def run(kernel: Callable, *arguments: object, chip: object = A2, **options: object) -> Run:
        return launch(kernel, chip, *arguments, unit="AIV", **options)

    return run


@pytest.fixture
def aic() -> Callable[..., Run]:
    """Run a kernel on one AIC of an A2."""

    def run(kernel: Callable, *arguments: object, chip: object = A2, **options: object) -> Run:
        return launch(kernel, chip, *arguments, unit="AIC", **options)

    return run


@pytest.fixture
def fused(tmp_path: Path) -> ChipSpec:
    """An Ascend 310, whose core is cube and vector in one, with the figures that are unknown assumed."""
    text = data.path("chips", "ascend-310.toml").read_text(encoding="utf-8")
    assumed = ', tag = "A", source = "for this test" }\n'
    text = text.replace("[memory]\n", '[memory]\nbandwidth = { value = 50, unit = "GB/s"' + assumed)
    text = text.replace("[paths]\n", '[paths]\nub_gm = { value = 64, unit = "B/cycle"' + assumed)
    file = tmp_path / "fused.toml"
    file.write_text(text, encoding="utf-8")
    return load_chip(file)
