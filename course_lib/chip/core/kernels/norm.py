"""Layer norm and RMS norm of every row: (x − mean) / sqrt(variance + eps) · weight + bias, and x / rms · weight.

    run = launch(layer_norm, "ascend-910b2", x, weight, bias, out, unit="AIV", blocks=48)

x and out are (rows, cols) float32 in GM, weight and bias (cols); cols is a multiple of 8. Weight and bias are fetched
once and stay in UB, so a row costs its own bytes in and out and nothing else. RMS norm leaves out the mean: one
reduction and one pass over the row less, which is why large language models took to it (arXiv 1910.07467).
"""

from collections.abc import Callable

from course_lib.chip.core.buffers import BLOCK, GlobalTensor, LocalTensor
from course_lib.chip.core.isa import Core
from course_lib.chip.core.kernels.tiles import mine, pieces

COLUMN = BLOCK // 4


def layer_norm(
    core: Core, x: GlobalTensor, weight: GlobalTensor, bias: GlobalTensor, out: GlobalTensor, eps: float = 1e-5, rows: int = 8
) -> None:
    """Mean, variance of what is left, scale, shift; ``rows`` rows in one instruction."""

    def normalise(part: LocalTensor, square: LocalTensor, number: LocalTensor, column: LocalTensor) -> None:
        cols = part.shape[1]
        core.WholeReduceSum(number, part)
        core.Muls(number, number, 1 / cols)  # mean
        core.Brcb(column, number)
        core.Sub(part, part, column)
        _divide_by_rms(core, part, square, number, column, eps)

    _rows(core, x, [weight, bias], out, rows, normalise)


def rms_norm(core: Core, x: GlobalTensor, weight: GlobalTensor, out: GlobalTensor, eps: float = 1e-6, rows: int = 8) -> None:
    """Only the scale: root mean square of the row, and weight."""

    def normalise(part: LocalTensor, square: LocalTensor, number: LocalTensor, column: LocalTensor) -> None:
        _divide_by_rms(core, part, square, number, column, eps)

    _rows(core, x, [weight], out, rows, normalise)


def _divide_by_rms(
    core: Core, part: LocalTensor, square: LocalTensor, number: LocalTensor, column: LocalTensor, eps: float
) -> None:
    core.Mul(square, part, part)
    core.WholeReduceSum(number, square)
    core.Muls(number, number, 1 / part.shape[1])
    core.Adds(number, number, eps)
    core.Sqrt(number, number)
    core.Brcb(column, number)
    core.Div(part, part, column)


def _rows(core: Core, x: GlobalTensor, parameters: list[GlobalTensor], out: GlobalTensor, rows: int, normalise: Callable) -> None:
    """Fetch ``rows`` rows, normalise them, weight each by the parameters (the first multiplies), write them out."""
    cols, dtype = x.shape[1], x.dtype
    table = [core.LocalTensor("UB", (rows, cols), dtype) for _ in range(2)]
    square = core.LocalTensor("UB", (rows, cols), dtype)
    number = core.LocalTensor("UB", -(-rows // COLUMN) * COLUMN, dtype)
    column = core.LocalTensor("UB", (rows, COLUMN), dtype)
    kept = [core.LocalTensor("UB", (1, cols), dtype) for _ in parameters]
    for place, parameter in zip(kept, parameters):
        core.DataCopy(place.as_shape(cols), parameter)
    core.Duplicate(number, 1.0)  # it may be longer than there are rows
    for half in (0, 1):
        core.SetFlag("MTE3_MTE2", half)
    for turn, (row, n) in enumerate(mine(core, list(pieces(x.shape[0], rows)))):
        half = turn % 2
        part = table[half][:n]
        core.WaitFlag("MTE3_MTE2", half)
        core.DataCopy(part, x[row : row + n])
        core.SetFlag("MTE2_V", half)
        core.WaitFlag("MTE2_V", half)
        normalise(part, square[:n], number, column[:n])
        for r in range(n):
            core.Mul(part[r : r + 1], part[r : r + 1], kept[0])
            if len(kept) == 2:
                core.Add(part[r : r + 1], part[r : r + 1], kept[1])
        core.SetFlag("V_MTE3", half)
        core.WaitFlag("V_MTE3", half)
        core.DataCopy(out[row : row + n], part)
        core.SetFlag("MTE3_MTE2", half)
    for half in (0, 1):
        core.WaitFlag("MTE3_MTE2", half)
