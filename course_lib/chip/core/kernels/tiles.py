"""Tiles: how large a piece of a matrix a core works on at a time, and in which order the cores take the pieces."""

from collections.abc import Iterator
from dataclasses import dataclass

from course_lib.chip.core.isa import Core
from course_lib.chip.figures import DTYPES

FRACTAL = 16  # rows of a fractal


@dataclass(frozen=True)
class Tile:
    """(m, k) @ (k, n) is one `Mmad`; ``l1_k``, a multiple of k, is what L1 holds of both matrices along k.

    ``accumulators``: tiles of m × n in L0C; with two, one is written out while the cube adds up in the other.
    """

    m: int
    k: int
    n: int
    l1_k: int
    accumulators: int = 1


def largest(dtype: str) -> Tile:
    """The tile that fills L0A, L0B and L0C of an Ascend 910B twice over, as most kernels for it use.

    128 × 256 results take all of L0C; 128 B of each row and column of them, twice, take half of L0A and all of L0B.
    """
    size = DTYPES[dtype]
    return Tile(128, 128 // size, 256, 512 // size)


def order(rows: int, cols: int, group: int = 1) -> list[tuple[int, int]]:
    """Tile coordinates (row, col) in the order in which cores take them: down ``group`` rows, then one column on.

    ``group=1`` is row by row. Cores that work at the same time then share one tile row of A, but need as many tile
    columns of B as there are cores. In a group the two are balanced, and both stay in L2.
    """
    tiles = []
    for top in range(0, rows, group):
        band = range(top, min(top + group, rows))
        tiles += [(row, col) for col in range(cols) for row in band]
    return tiles


def mine(core: Core, tiles: list) -> list:
    """This core's share: every GetBlockNum()-th tile, so that neighbours in the order are worked on together."""
    return tiles[core.GetBlockIdx() :: core.GetBlockNum()]


def pieces(length: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, size) of pieces of ``step``; the last may be smaller."""
    for start in range(0, length, step):
        yield start, min(step, length - start)


def up(n: int, unit: int = FRACTAL) -> int:
    """``n`` rounded up to a multiple of ``unit``."""
    return -(-n // unit) * unit


def fractal(dtype: str) -> int:
    """The unit in which a tile's k and n grow: whole fractals in L1 and in L0, so 16, and 32 for one-byte dtypes."""
    return max(FRACTAL, 32 // DTYPES[dtype])
