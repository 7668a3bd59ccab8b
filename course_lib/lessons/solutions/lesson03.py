"""Solutions of lesson 03: the cube's cycles, a product whose buffers are freed, an update in two halves, a tile."""

import math

from course_lib.chip.core import Core, GlobalTensor

PIECE = 4096  # elements of the update's pieces
ALPHA = -0.1


def mmad_cycles(m: int, k: int, n: int, tile: tuple[int, int, int], latency: int) -> int:
    """Cycles of one Mmad of (m, k) @ (k, n), where the cube does a product of ``tile`` = (m, k, n) per cycle."""
    products = math.ceil(m / tile[0]) * math.ceil(k / tile[1]) * math.ceil(n / tile[2])
    return products + latency


def broken(core: Core, a: GlobalTensor, b: GlobalTensor, out: GlobalTensor) -> None:
    """The kernel of the second exercise: out (128, 256) = a (128, K) @ b (K, 256), with flags in one direction only."""
    a1, b1 = core.LocalTensor("L1", (128, 64), "float16"), core.LocalTensor("L1", (64, 256), "float16")
    a0, b0 = core.LocalTensor("L0A", (128, 64), "float16"), core.LocalTensor("L0B", (64, 256), "float16")
    c0 = core.LocalTensor("L0C", (128, 256), "float32")
    for k in range(0, a.shape[1], 64):
        core.DataCopy(a1, a[:, k : k + 64])
        core.DataCopy(b1, b[k : k + 64])
        core.SetFlag("MTE2_MTE1")
        core.WaitFlag("MTE2_MTE1")
        core.LoadData(a0, a1)
        core.LoadData(b0, b1)
        core.SetFlag("MTE1_M")
        core.WaitFlag("MTE1_M")
        core.Mmad(c0, a0, b0, init=k == 0)
    core.SetFlag("M_FIX")
    core.WaitFlag("M_FIX")
    core.Fixpipe(out, c0)


def repaired(core: Core, a: GlobalTensor, b: GlobalTensor, out: GlobalTensor) -> None:
    """`broken`, and for each flag that says "full" one that says "free" again; both start free."""
    a1, b1 = core.LocalTensor("L1", (128, 64), "float16"), core.LocalTensor("L1", (64, 256), "float16")
    a0, b0 = core.LocalTensor("L0A", (128, 64), "float16"), core.LocalTensor("L0B", (64, 256), "float16")
    c0 = core.LocalTensor("L0C", (128, 256), "float32")
    core.SetFlag("MTE1_MTE2")
    core.SetFlag("M_MTE1")
    for k in range(0, a.shape[1], 64):
        core.WaitFlag("MTE1_MTE2")
        core.DataCopy(a1, a[:, k : k + 64])
        core.DataCopy(b1, b[k : k + 64])
        core.SetFlag("MTE2_MTE1")
        core.WaitFlag("MTE2_MTE1")
        core.WaitFlag("M_MTE1")
        core.LoadData(a0, a1)
        core.LoadData(b0, b1)
        core.SetFlag("MTE1_MTE2")
        core.SetFlag("MTE1_M")
        core.WaitFlag("MTE1_M")
        core.Mmad(c0, a0, b0, init=k == 0)
        core.SetFlag("M_MTE1")
    core.WaitFlag("MTE1_MTE2")
    core.WaitFlag("M_MTE1")
    core.SetFlag("M_FIX")
    core.WaitFlag("M_FIX")
    core.Fixpipe(out, c0)


def update_one_piece(core: Core, w: GlobalTensor, g: GlobalTensor) -> None:
    """w += ALPHA · g, one piece of UB at a time: correct, and each pipe waits for the others."""
    weight, gradient = (core.LocalTensor("UB", PIECE, "float32") for _ in range(2))
    core.SetFlag("MTE3_MTE2")
    for start in range(0, w.shape[0], PIECE):
        core.WaitFlag("MTE3_MTE2")
        core.DataCopy(weight, w[start : start + PIECE])
        core.DataCopy(gradient, g[start : start + PIECE])
        core.SetFlag("MTE2_V")
        core.WaitFlag("MTE2_V")
        core.Axpy(weight, gradient, ALPHA)
        core.SetFlag("V_MTE3")
        core.WaitFlag("V_MTE3")
        core.DataCopy(w[start : start + PIECE], weight)
        core.SetFlag("MTE3_MTE2")
    core.WaitFlag("MTE3_MTE2")


def update(core: Core, w: GlobalTensor, g: GlobalTensor) -> None:
    """`update_one_piece` in two halves, each with flags of its own."""
    weight, gradient = ([core.LocalTensor("UB", PIECE, "float32") for _ in range(2)] for _ in range(2))
    for half in (0, 1):
        core.SetFlag("MTE3_MTE2", half)
    for turn, start in enumerate(range(0, w.shape[0], PIECE)):
        half = turn % 2
        core.WaitFlag("MTE3_MTE2", half)
        core.DataCopy(weight[half], w[start : start + PIECE])
        core.DataCopy(gradient[half], g[start : start + PIECE])
        core.SetFlag("MTE2_V", half)
        core.WaitFlag("MTE2_V", half)
        core.Axpy(weight[half], gradient[half], ALPHA)
        core.SetFlag("V_MTE3", half)
        core.WaitFlag("V_MTE3", half)
        core.DataCopy(w[start : start + PIECE], weight[half])
        core.SetFlag("MTE3_MTE2", half)
    for half in (0, 1):
        core.WaitFlag("MTE3_MTE2", half)


def choose_tile(l0a: int, l0b: int, l0c: int) -> tuple[int, int, int]:
    """(m, k, n) in float16 with the least traffic that fits two halves of L0A and L0B and one tile of sums in L0C."""
    fitting = [(m, n) for m in range(16, 1025, 16) for n in range(16, 1025, 16) if 4 * m * n <= l0c]
    fitting = [(m, n) for m, n in fitting if 2 * 16 * 2 * m <= l0a and 2 * 16 * 2 * n <= l0b]
    m, n = min(fitting, key=lambda tile: 1 / tile[0] + 1 / tile[1])
    return m, min(l0a // (4 * m), l0b // (4 * n)) // 16 * 16, n
