"""How much of what a matmul fetches is in L2: a function of tile, order and number of cores, without timing anything.

    hit_rate(load_chip("ascend-910b2"), 16384, 16384, 16384, Tile(128, 64, 256, 256), group=4)

Where all cores are equally fast, they go through their tiles in step: wave by wave, and within a wave along k. So it is
enough to follow L2 in that order; the engine's own cache does it, for sizes of which a full run would take too long.
"""

from course_lib.chip.core.buffers import GlobalTensor, empty
from course_lib.chip.core.kernels.tiles import Tile, order, pieces
from course_lib.chip.core.l2 import L2
from course_lib.chip.spec import ChipSpec


def hit_rate(
    chip: ChipSpec, m: int, k: int, n: int, tile: Tile, group: int = 1, cores: int = 24, dtype: str = "float16"
) -> float:
    """Share of the bytes that (m, k) @ (k, n) fetches from GM that are in L2; ``tile`` and ``group`` as in `matmul`."""
    a, b, out = empty(m, k, dtype=dtype), empty(k, n, dtype=dtype), empty(m, n, dtype=dtype)
    l2 = L2(chip.require("l2_bytes"))
    tiles = [(row * tile.m, col * tile.n) for row, col in order(-(-m // tile.m), -(-n // tile.n), group)]
    steps = list(pieces(k, tile.l1_k))
    for first in range(0, len(tiles), cores):
        wave = tiles[first : first + cores]
        for start, depth in steps:
            for i, j in wave:
                _read(l2, a[i : i + tile.m, start : start + depth])
                _read(l2, b[start : start + depth, j : j + tile.n])
        for i, j in wave:
            part = out[i : i + tile.m, j : j + tile.n]
            l2.write(part, part.region())
    return l2.hits / l2.bytes


def _read(l2: L2, part: GlobalTensor) -> None:
    l2.read(part, part.region())
