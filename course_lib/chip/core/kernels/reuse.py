"""How much of what a matmul fetches is in L2: a function of tile, order and number of cores, without timing anything.

    hit_rate(load_chip("ascend-910b2"), 16384, 16384, 16384, Tile(128, 64, 256, 256), group=4)

Where all cores are equally fast, they go through their tiles in step: wave by wave, and within a wave along k. So it is
enough to follow L2 in that order, a whole tile at a time; what several cores of a wave share comes from HBM once.
"""

from collections import OrderedDict
from math import ceil

from course_lib.chip.core.kernels.tiles import Tile, order, pieces
from course_lib.chip.figures import DTYPES
from course_lib.chip.spec import ChipSpec


def hit_rate(
    chip: ChipSpec, m: int, k: int, n: int, tile: Tile, group: int = 1, cores: int = 24, dtype: str = "float16"
) -> float:
    """Share of the bytes that (m, k) @ (k, n) fetches from GM that are in L2; ``tile`` and ``group`` as in `matmul`."""
    l2, size = _Tiles(chip.require("l2_bytes")), DTYPES[dtype]
    tiles = order(ceil(m / tile.m), ceil(n / tile.n), group)
    for first in range(0, len(tiles), cores):
        wave = tiles[first : first + cores]
        rows, cols = dict.fromkeys(row for row, _ in wave), dict.fromkeys(col for _, col in wave)
        for start, depth in pieces(k, tile.l1_k):
            for row in rows:
                l2.read(("a", row, start), min(tile.m, m - row * tile.m) * depth * size)
            for col in cols:
                l2.read(("b", col, start), min(tile.n, n - col * tile.n) * depth * size)
        for row, col in wave:
            l2.keep(("out", row, col), min(tile.m, m - row * tile.m) * min(tile.n, n - col * tile.n) * size)
    columns, lines = ceil(n / tile.n), ceil(m / tile.m)
    return 1 - l2.missed / (k * size * (m * columns + n * lines))


class _Tiles:
    """An L2 of ``capacity`` bytes that keeps whole tiles and throws out the one used longest ago."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used, self.missed = capacity, 0, 0
        self.there: OrderedDict[tuple, int] = OrderedDict()

    def read(self, tile: tuple, size: int) -> None:
        if tile in self.there:
            self.there.move_to_end(tile)
        else:
            self.missed += size
            self.keep(tile, size)

    def keep(self, tile: tuple, size: int) -> None:
        self.there[tile] = size
        self.used += size
        while self.used > self.capacity:
            self.used -= self.there.popitem(last=False)[1]
