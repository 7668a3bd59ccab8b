"""Softmax of every row: one row after another, and then many rows in one instruction, as the vector unit likes it.

    run = launch(softmax, "ascend-910b2", x, out, unit="AIV", blocks=48)

Both take ``(core, x, out, …)``: matrices (rows, cols) of float32 in GM. cols is a multiple of 8, so that rows begin at
whole 32 B blocks of UB; it is bounded by UB. ``e^x / sum e^x`` overflows for x above 88; the row's maximum is taken off
first, which changes nothing and makes the largest term e^0.
"""

from course_lib.chip.core.buffers import BLOCK, GlobalTensor, LocalTensor
from course_lib.chip.core.isa import Core
from course_lib.chip.core.kernels.tiles import mine, pieces

COLUMN = BLOCK // 4  # elements of one block: a column that Brcb has made


def softmax_naive(core: Core, x: GlobalTensor, out: GlobalTensor) -> None:
    """One row at a time: each instruction works on a few hundred bytes, and its start-up costs more than its work."""
    softmax(core, x, out, rows=1)


def softmax(core: Core, x: GlobalTensor, out: GlobalTensor, rows: int = 16) -> None:
    """``rows`` rows in one instruction, and two halves of UB, so that vector unit and both transfers overlap.

    `WholeReduceMax` leaves one number per row, and `Brcb` makes of each a 32 B block that meets the whole row again.
    """
    cols = x.shape[1]
    table = [core.LocalTensor("UB", (rows, cols), x.dtype) for _ in range(2)]
    number = core.LocalTensor("UB", max(COLUMN, -(-rows // COLUMN) * COLUMN), x.dtype)
    column = core.LocalTensor("UB", (rows, COLUMN), x.dtype)
    for half in (0, 1):
        core.SetFlag("MTE3_MTE2", half)
    for turn, (row, n) in enumerate(mine(core, list(pieces(x.shape[0], rows)))):
        half = turn % 2
        part, numbers = table[half][:n], column[:n]
        core.WaitFlag("MTE3_MTE2", half)
        core.DataCopy(part, x[row : row + n])
        core.SetFlag("MTE2_V", half)
        core.WaitFlag("MTE2_V", half)
        softmax_rows(core, part, number, numbers)
        core.SetFlag("V_MTE3", half)
        core.WaitFlag("V_MTE3", half)
        core.DataCopy(out[row : row + n], part)
        core.SetFlag("MTE3_MTE2", half)
    for half in (0, 1):
        core.WaitFlag("MTE3_MTE2", half)


def softmax_rows(core: Core, part: LocalTensor, number: LocalTensor, column: LocalTensor) -> None:
    """In place on ``part`` (rows, cols) in UB; ``number`` (at least rows) and ``column`` (rows, 8) are for its use."""
    core.WholeReduceMax(number, part)
    core.Brcb(column, number)
    core.Sub(part, part, column)
    core.Exp(part, part)
    core.WholeReduceSum(number, part)
    core.Brcb(column, number)
    core.Div(part, part, column)
