"""One AI core, instruction by instruction: buffers of real bytes, pipes that run beside each other, flags, cycles.

    from course_lib.chip.core import launch
    run = launch(kernel, "ascend-910b2", x, y, out, unit="AIV")
"""

from course_lib.chip.core.buffers import GlobalTensor, LocalTensor, empty, tensor
from course_lib.chip.core.errors import (
    BufferOverflow,
    CoreError,
    DataRace,
    Deadlock,
    FlagError,
    IllegalPath,
    Misaligned,
    ReadBeforeWrite,
    WrongOperand,
)  # fmt: skip
from course_lib.chip.core.isa import Core
from course_lib.chip.core.launch import Event, Run, launch

__all__ = [
    "BufferOverflow", "Core", "CoreError", "DataRace", "Deadlock", "Event", "FlagError", "GlobalTensor", "IllegalPath",
    "LocalTensor", "Misaligned", "ReadBeforeWrite", "Run", "WrongOperand", "empty", "launch", "tensor",
]  # fmt: skip
