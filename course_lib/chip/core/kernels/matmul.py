"""The matmul ladder: out = a @ b six times, each step faster than the one before, and what it changed in its docstring.

    naive            one 16 × 16 × 16 fractal at a time, all pipes wait for each other
    tiled            tiles that fill L0
    double_buffered  flags instead of barriers, and two halves of each buffer: pipes work beside each other
    k_split          L1 holds several steps along k, so that transfers from GM are long
    row_major        all cores, each taking the next tile of a row
    matmul           all cores, in an order that finds its operands in L2

All take ``(core, a, b, out, tile)``: a (M, K), b (K, N) of one dtype, out (M, N) of any, in any sizes; sums are float32,
or int32 for int8. Where M, K or N is no multiple of the tile, the last tile is smaller, rounded up to whole fractals.
"""

from course_lib.chip.core.buffers import GlobalTensor, LocalTensor
from course_lib.chip.core.isa import ACCUMULATES, Core
from course_lib.chip.core.kernels.tiles import Tile, fractal, largest, mine, order, pieces, up

FRACTALS = Tile(16, 16, 16, 16)


def naive(core: Core, a: GlobalTensor, b: GlobalTensor, out: GlobalTensor, tile: Tile = FRACTALS) -> None:
    """The smallest tile, and after every step a barrier: only one pipe is ever at work, on 512 bytes."""
    l1_a, l1_b, l0_a, l0_b, l0_c = _buffers(core, a.dtype, tile, halves=1, l1_k=tile.k)
    for i, j in _corners(a, b, tile):
        for k, depth in pieces(a.shape[1], tile.k):
            m, n, deep = _sizes(a, b, tile, i, j, depth)
            core.DataCopy(l1_a[0][:m, :deep], a[i : i + tile.m, k : k + depth])
            core.DataCopy(l1_b[0][:deep, :n], b[k : k + depth, j : j + tile.n])
            core.PipeBarrier("ALL")
            core.LoadData(l0_a[0].as_shape(m, deep), l1_a[0][:m, :deep])
            core.LoadData(l0_b[0].as_shape(deep, n), l1_b[0][:deep, :n])
            core.PipeBarrier("ALL")
            core.Mmad(l0_c[0].as_shape(m, n), l0_a[0].as_shape(m, deep), l0_b[0].as_shape(deep, n), init=k == 0)
            core.PipeBarrier("ALL")
        core.Fixpipe(out[i : i + tile.m, j : j + tile.n], l0_c[0].as_shape(m, n))
        core.PipeBarrier("ALL")


def tiled(core: Core, a: GlobalTensor, b: GlobalTensor, out: GlobalTensor, tile: Tile | None = None) -> None:
    """`naive` line by line, with tiles that fill L0: an element of a is now fetched N / 256 times instead of N / 16."""
    naive(core, a, b, out, tile or largest(a.dtype))


def double_buffered(core: Core, a: GlobalTensor, b: GlobalTensor, out: GlobalTensor, tile: Tile | None = None) -> None:
    """Flags instead of barriers, and L1, L0A and L0B in two halves: while one is used, the other is filled.

    Each half has two flags: "it is full", from the pipe that fills it, and "it is free", back from the one that empties
    it. All halves start free.
    """
    tile = tile or largest(a.dtype)
    l1_a, l1_b, l0_a, l0_b, l0_c = _buffers(core, a.dtype, tile, halves=2, l1_k=tile.k)
    frees = {"MTE1_MTE2": 2, "M_MTE1": 2, "FIX_M": 1}
    _set(core, frees)
    half = 0
    for i, j in _corners(a, b, tile):
        core.WaitFlag("FIX_M", 0)
        for k, depth in pieces(a.shape[1], tile.k):
            m, n, deep = _sizes(a, b, tile, i, j, depth)
            core.WaitFlag("MTE1_MTE2", half)  # L1 is free
            core.DataCopy(l1_a[half][:m, :deep], a[i : i + tile.m, k : k + depth])
            core.DataCopy(l1_b[half][:deep, :n], b[k : k + depth, j : j + tile.n])
            core.SetFlag("MTE2_MTE1", half)
            core.WaitFlag("MTE2_MTE1", half)  # L1 is full
            core.WaitFlag("M_MTE1", half)  # L0 is free
            core.LoadData(l0_a[half].as_shape(m, deep), l1_a[half][:m, :deep])
            core.LoadData(l0_b[half].as_shape(deep, n), l1_b[half][:deep, :n])
            core.SetFlag("MTE1_MTE2", half)
            core.SetFlag("MTE1_M", half)
            core.WaitFlag("MTE1_M", half)  # L0 is full
            core.Mmad(l0_c[0].as_shape(m, n), l0_a[half].as_shape(m, deep), l0_b[half].as_shape(deep, n), init=k == 0)
            core.SetFlag("M_MTE1", half)
            half = 1 - half
        core.SetFlag("M_FIX", 0)
        core.WaitFlag("M_FIX", 0)
        core.Fixpipe(out[i : i + tile.m, j : j + tile.n], l0_c[0].as_shape(m, n))
        core.SetFlag("FIX_M", 0)
    _wait(core, frees)


def k_split(
    core: Core, a: GlobalTensor, b: GlobalTensor, out: GlobalTensor, tile: Tile | None = None, parts: list | None = None
) -> None:
    """L1 is larger than L0: it now holds ``tile.l1_k`` along k, which L0 takes in steps of ``tile.k``.

    A longer transfer hides the latency of GM behind itself, which matters as long as one step along k is the shorter of
    the two. ``parts``: (rows of a, columns of b, tile of out) to make, one after another; all of out, if None.
    """
    tile = tile or largest(a.dtype)
    l1_a, l1_b, l0_a, l0_b, l0_c = _buffers(core, a.dtype, tile, halves=2, l1_k=tile.l1_k)
    frees = {"MTE1_MTE2": 2, "M_MTE1": 2, "FIX_M": tile.accumulators}
    _set(core, frees)
    half = l0 = acc = 0
    for left, right, result in tiles_of(a, b, out, tile) if parts is None else parts:
        m, n = up(left.shape[0]), up(right.shape[1], fractal(a.dtype))
        core.WaitFlag("FIX_M", acc)
        for k, depth in pieces(left.shape[1], tile.l1_k):
            deep = up(depth, fractal(a.dtype))
            core.WaitFlag("MTE1_MTE2", half)
            core.DataCopy(l1_a[half][:m, :deep], left[:, k : k + depth])
            core.DataCopy(l1_b[half][:deep, :n], right[k : k + depth])
            core.SetFlag("MTE2_MTE1", half)
            core.WaitFlag("MTE2_MTE1", half)
            for at, size in pieces(deep, tile.k):
                core.WaitFlag("M_MTE1", l0)
                x, y = l0_a[l0].as_shape(m, size), l0_b[l0].as_shape(size, n)
                core.LoadData(x, l1_a[half][:m, at : at + size])
                core.LoadData(y, l1_b[half][at : at + size, :n])
                core.SetFlag("MTE1_M", l0)
                core.WaitFlag("MTE1_M", l0)
                core.Mmad(l0_c[acc].as_shape(m, n), x, y, init=k + at == 0)
                core.SetFlag("M_MTE1", l0)
                l0 = 1 - l0
            core.SetFlag("MTE1_MTE2", half)
            half = 1 - half
        core.SetFlag("M_FIX", acc)
        core.WaitFlag("M_FIX", acc)
        core.Fixpipe(result, l0_c[acc].as_shape(m, n))
        core.SetFlag("FIX_M", acc)
        acc = (acc + 1) % tile.accumulators
    _wait(core, frees)


def row_major(core: Core, a: GlobalTensor, b: GlobalTensor, out: GlobalTensor, tile: Tile | None = None) -> None:
    """`k_split` on several cores, each of which takes the next tile of a row: a row of tiles shares a, none shares b."""
    matmul(core, a, b, out, tile, group=1)


def matmul(
    core: Core, a: GlobalTensor, b: GlobalTensor, out: GlobalTensor, tile: Tile | None = None, group: int = 4
) -> None:
    """`k_split` on several cores, in an order that goes down ``group`` tile rows before it moves a column on.

    What the cores fetch at one time is then nearer to a square of tiles, which has the least edge: more of it is in L2.
    """
    tile = tile or largest(a.dtype)
    k_split(core, a, b, out, tile, mine(core, tiles_of(a, b, out, tile, group)))


# -- what the steps have in common --------------------------------------------------------------------


def _buffers(core: Core, dtype: str, tile: Tile, halves: int, l1_k: int) -> list[list[LocalTensor]]:
    """L1 for a and b, L0A, L0B, in ``halves``; and L0C."""
    unit, sums = fractal(dtype), ACCUMULATES.get(dtype, "float32")
    places = [
        ("L1", (tile.m, up(l1_k, unit)), dtype, halves),
        ("L1", (up(l1_k, unit), up(tile.n, unit)), dtype, halves),
        ("L0A", (tile.m, up(tile.k, unit)), dtype, halves),
        ("L0B", (up(tile.k, unit), up(tile.n, unit)), dtype, halves),
        ("L0C", (tile.m, up(tile.n, unit)), sums, tile.accumulators),
    ]
    return [[core.LocalTensor(name, shape, dtype) for _ in range(count)] for name, shape, dtype, count in places]


def _corners(a: GlobalTensor, b: GlobalTensor, tile: Tile, group: int = 1) -> list[tuple[int, int]]:
    """First row and column of every tile of the result, in order."""
    rows, cols = -(-a.shape[0] // tile.m), -(-b.shape[1] // tile.n)
    return [(row * tile.m, col * tile.n) for row, col in order(rows, cols, group)]


def tiles_of(
    a: GlobalTensor, b: GlobalTensor, out: GlobalTensor, tile: Tile, group: int = 1
) -> list[tuple[GlobalTensor, GlobalTensor, GlobalTensor]]:
    """(rows of a, columns of b, tile of out) for every tile of the result, in order."""
    corners = _corners(a, b, tile, group)
    return [(a[i : i + tile.m], b[:, j : j + tile.n], out[i : i + tile.m, j : j + tile.n]) for i, j in corners]


def _sizes(a: GlobalTensor, b: GlobalTensor, tile: Tile, i: int, j: int, depth: int) -> tuple[int, int, int]:
    """Rows, columns and depth of the tile at (i, j), in whole fractals."""
    unit = fractal(a.dtype)
    return up(min(tile.m, a.shape[0] - i)), up(min(tile.n, b.shape[1] - j), unit), up(depth, unit)


def _set(core: Core, flags: dict[str, int]) -> None:
    """Everything starts free."""
    for event, count in flags.items():
        for event_id in range(count):
            core.SetFlag(event, event_id)


def _wait(core: Core, flags: dict[str, int]) -> None:
    """Nothing is left set for the next kernel."""
    for event, count in flags.items():
        for event_id in range(count):
            core.WaitFlag(event, event_id)
