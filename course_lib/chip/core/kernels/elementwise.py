"""Vector addition twice: out = x + y, a piece of UB at a time, and then with two pieces so that no pipe waits.

    run = launch(add, "ascend-910b2", x, y, out, unit="AIV", blocks=48)

Both take ``(core, x, y, out, size)``: vectors (n) in GM of one dtype that the vector unit has, n being any number, of
which every core takes each GetBlockNum()-th piece of ``size`` elements (a multiple of 32 B). Adding is cheap and
bytes are dear: three bytes pass through the core's port for each byte that is added, so at best MTE2 is always busy.
"""

from course_lib.chip.core.buffers import BLOCK, GlobalTensor
from course_lib.chip.core.isa import Core
from course_lib.chip.core.kernels.tiles import mine, pieces, up
from course_lib.chip.figures import DTYPES


def add_naive(core: Core, x: GlobalTensor, y: GlobalTensor, out: GlobalTensor, size: int = 8192) -> None:
    """In, add, out, one after another: each pipe waits for the one before, and the first one for the last."""
    left, right, total = (core.LocalTensor("UB", size, x.dtype) for _ in range(3))
    core.SetFlag("MTE3_MTE2")
    for start, n in mine(core, list(pieces(x.shape[0], size))):
        whole = up(n, BLOCK // DTYPES[x.dtype])
        core.WaitFlag("MTE3_MTE2")
        core.DataCopy(left[:whole], x[start : start + n])
        core.DataCopy(right[:whole], y[start : start + n])
        core.SetFlag("MTE2_V")
        core.WaitFlag("MTE2_V")
        core.Add(total[:whole], left[:whole], right[:whole])
        core.SetFlag("V_MTE3")
        core.WaitFlag("V_MTE3")
        core.DataCopy(out[start : start + n], total[:whole])
        core.SetFlag("MTE3_MTE2")  # all of UB is free again
    core.WaitFlag("MTE3_MTE2")


def add(core: Core, x: GlobalTensor, y: GlobalTensor, out: GlobalTensor, size: int = 8192) -> None:
    """Two halves, used in turn, and a flag for each: while one is added, the other is fetched, a third written out.

    "V_MTE2" says that the inputs of a half are used up, "MTE3_V" that its sum has been written out.
    """
    left, right, total = ([core.LocalTensor("UB", size, x.dtype) for _ in range(2)] for _ in range(3))
    for half in (0, 1):
        core.SetFlag("V_MTE2", half)
        core.SetFlag("MTE3_V", half)
    for turn, (start, n) in enumerate(mine(core, list(pieces(x.shape[0], size)))):
        half, whole = turn % 2, up(n, BLOCK // DTYPES[x.dtype])
        core.WaitFlag("V_MTE2", half)
        core.DataCopy(left[half][:whole], x[start : start + n])
        core.DataCopy(right[half][:whole], y[start : start + n])
        core.SetFlag("MTE2_V", half)
        core.WaitFlag("MTE2_V", half)
        core.WaitFlag("MTE3_V", half)
        core.Add(total[half][:whole], left[half][:whole], right[half][:whole])
        core.SetFlag("V_MTE2", half)
        core.SetFlag("V_MTE3", half)
        core.WaitFlag("V_MTE3", half)
        core.DataCopy(out[start : start + n], total[half][:whole])
        core.SetFlag("MTE3_V", half)
    for half in (0, 1):
        core.WaitFlag("V_MTE2", half)
        core.WaitFlag("MTE3_V", half)
