"""Each test finds the emulated device fresh, and leaves it as a chip with numbers."""

import gc
from collections.abc import Iterator

import pytest
import torch

from course_lib import npu
from course_lib.npu import runtime


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    back_to_mini()
    torch.manual_seed(0)
    yield
    back_to_mini()


def back_to_mini() -> None:
    if runtime.live:  # tensors in cycles, or in a traceback
        gc.collect()
    npu.use("mini")


@pytest.fixture
def shape_only() -> Iterator[None]:
    """A chip with room for any model, that computes no numbers."""
    npu.use("ascend-910b2", numerics=False)
    memory = runtime.devices[0].memory
    memory.capacity = memory.limit = 2**44
    yield
