"""Every test starts on one device of chip mini, with its clock at zero and its memory empty."""

import gc

import pytest
import torch

from course_lib import npu
from course_lib.npu import runtime


@pytest.fixture(autouse=True)
def mini():
    if runtime.live:  # tensors that the last test left in cycles, or in a traceback
        gc.collect()
    npu.use("mini")
    torch.manual_seed(0)
