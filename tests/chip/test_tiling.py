"""The closed form of a product's time against the core engine, which runs the same program instruction by instruction."""

import random
import statistics

import pytest

from course_lib.chip.core import Run, empty, launch
from course_lib.chip.core.isa import Core
from course_lib.chip.core.kernels.matmul import k_split, matmul, tiles_of
from course_lib.chip.core.kernels.tiles import Tile, mine
from course_lib.chip.sharing import sectors, sharing
from course_lib.chip.spec import load_chip
from course_lib.chip.tiling import Tiling, tiling

CHIPS = ("ascend-910b2", "ascend-910c-die", "ascend-950dt", "mini")
DTYPES = ("float16", "bfloat16", "float32", "int8")
WITHIN = 0.10
RARELY = 0.16  # which core asks L2 first can be a matter of a few cycles; about 1 shape in 100 is off by more than WITHIN
MOST = {"mini": 4e6}  # multiplications; the small tiles of `mini` take the engine long


def drawn(seed: int, count: int, most: float = 3e8) -> list[tuple[str, int, int, int, str]]:
    """(chip, m, k, n, dtype), sides log-uniform between 16 and 4096."""
    rng, shapes = random.Random(seed), []
    while len(shapes) < count:
        chip, dtype, sides = rng.choice(CHIPS), rng.choice(DTYPES), [int(2 ** rng.uniform(4, 12)) for _ in range(3)]
        if sides[0] * sides[1] * sides[2] <= MOST.get(chip, most):
            shapes.append((chip, *sides, dtype))
    return shapes


def batched(core: Core, a: object, b: object, out: object, tile: Tile, group: int, batch: int) -> None:
    """``batch`` products of matrices that lie below each other in a, b and out: one list of tiles for all of them."""
    parts = []
    for i in range(batch):
        one = (stacked[i * rows : (i + 1) * rows] for stacked, rows in ((t, t.shape[0] // batch) for t in (a, b, out)))
        parts += tiles_of(*one, tile, group)
    k_split(core, a, b, out, tile, mine(core, parts))


def engine(found: Tiling, chip: str, batch: int, m: int, k: int, n: int, dtype: str) -> Run:
    tile = Tile(found.m, found.k, found.n, found.k * found.steps)
    blocks = min(load_chip(chip).cube_cores, batch * -(-m // found.m) * -(-n // found.n))
    out = "bfloat16" if dtype == "int8" else dtype
    operands = empty(batch * m, k, dtype=dtype), empty(batch * k, n, dtype=dtype), empty(batch * m, n, dtype=out)
    if batch == 1:
        return launch(matmul, chip, *operands, tile, found.group, blocks=blocks, check=False)
    return launch(batched, chip, *operands, tile, found.group, batch, blocks=blocks, check=False)


def ratio(chip: str, m: int, k: int, n: int, dtype: str, batch: int = 1) -> float:
    """Cycles of the closed form over those of the engine."""
    found = tiling(load_chip(chip), batch, m, k, n, dtype)
    return found.cycles / engine(found, chip, batch, m, k, n, dtype).cycles


def test_products_of_any_shape() -> None:
    shapes = drawn(4, 48)
    ratios = {shape: ratio(*shape) for shape in shapes}
    wrong = {shape: found for shape, found in ratios.items() if abs(found - 1) > WITHIN}
    assert len(wrong) <= 1 and all(abs(found - 1) <= RARELY for found in wrong.values()), wrong
    assert abs(statistics.median(ratios.values()) - 1) < 0.02


@pytest.mark.parametrize("shape", [("ascend-910c-die", 1536, 1536, 1536), ("ascend-950dt", 2048, 1024, 1536), ("mini", 512, 128, 352)])
def test_large_products(shape: tuple) -> None:
    assert ratio(*shape, "bfloat16") == pytest.approx(1, abs=WITHIN)


@pytest.mark.parametrize("batch, m, k, n", [(32, 128, 128, 128), (48, 1, 128, 512), (7, 200, 64, 300), (100, 64, 512, 64), (3, 512, 128, 512)])
@pytest.mark.parametrize("chip", ["ascend-910b2", "ascend-950dt"])
def test_batches(chip: str, batch: int, m: int, k: int, n: int) -> None:
    assert ratio(chip, m, k, n, "bfloat16", batch) == pytest.approx(1, abs=RARELY)


def test_the_tile_fits_twice() -> None:
    for chip, m, k, n, dtype in drawn(6, 60, 1e12):
        spec, size = load_chip(chip), {"float32": 4, "int8": 1}.get(dtype, 2)
        t = tiling(spec, 1, m, k, n, dtype)
        assert 2 * t.m * t.k * size <= spec.require("buffers.l0a") and 2 * t.k * t.n * size <= spec.require("buffers.l0b")
        assert 4 * t.m * t.n <= spec.require("buffers.l0c")
        assert 2 * (t.m + t.n) * t.k * t.steps * size <= spec.require("buffers.l1")


def test_square_groups_share_most() -> None:
    shape, tile = (4096, 4096, 4096), (256, 128)
    shared = sharing(2, 192 << 20, 24, 1, shape, tile)
    assert shared.high * shared.wide == 24 and shared.high < shared.wide, "tiles are twice as high as wide"
    assert sum(shared.first) + sum(shared.later) == 2 * 2 * 4096**2, "L2 holds both, so each byte comes once"
    tight = sharing(2, 8 << 20, 24, 1, shape, tile)
    assert sum(tight.first) + sum(tight.later) > 2 * 2 * 4096**2


def test_neighbours_share_sectors() -> None:
    aligned, across = (sharing(2, 192 << 20, 24, 1, (16, 512, 480), (16, tn)) for tn in (64, 48))
    assert (aligned.new, aligned.sole) == (1, 1)
    assert across.new == pytest.approx(96 / 192) and across.sole == 0, "96 B begin in every third of 128 B"
    assert (sectors(100), sectors(128), sectors(130)) == (100, 128, 256)
