"""The matmul ladder: every step agrees with NumPy on any shape and dtype, and is faster than the one before."""

from collections.abc import Callable

import numpy as np
import pytest

from course_lib.chip.core import BufferOverflow, Run, empty, launch, tensor
from course_lib.chip.core.kernels.matmul import double_buffered, k_split, matmul, naive, row_major, tiled
from course_lib.chip.core.kernels.tiles import Tile, largest, order

A2, A5 = "ascend-910b2", "ascend-950dt"
ONE_CORE, ALL_CORES = (naive, tiled, double_buffered, k_split), (row_major, matmul)
SHAPES = [(128, 128, 128), (1, 1, 1), (100, 70, 50), (300, 520, 290), (33, 1000, 17), (16, 16, 600)]
DTYPES = [
    (A2, "float16", "float32"), (A2, "bfloat16", "bfloat16"), (A2, "float32", "float16"), (A2, "int8", "int32"),
    (A5, "float8_e4m3fn", "bfloat16"), (A5, "float8_e5m2", "float32"), (A5, "float16", "float16"),
]  # fmt: skip
SMALL = Tile(32, 32, 48, 64, accumulators=2)


def numbers(random: np.random.Generator, shape: tuple, dtype: str) -> object:
    if dtype == "int8":
        return tensor(random.integers(-128, 128, shape).astype(np.int8))
    return tensor(random.standard_normal(shape).astype(np.float32), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("chip", "dtype", "result"), DTYPES)
def test_agrees_with_numpy(chip: str, dtype: str, result: str, shape: tuple, random: np.random.Generator) -> None:
    m, k, n = shape
    a, b = numbers(random, (m, k), dtype), numbers(random, (k, n), dtype)
    want = a.numpy().astype(np.float64) @ b.numpy().astype(np.float64)
    error = {"float32": 2e-6, "int32": 0, "float16": 1e-3, "bfloat16": 8e-3}[result] * max(1, np.abs(want).max())
    for kernel in (*ONE_CORE[1:], *ALL_CORES, *([naive] if m * k * n < 10**6 else [])):
        out = tensor(np.zeros((m, n)), result)
        launch(kernel, chip, a, b, out, blocks=3 if kernel in ALL_CORES else 1)
        np.testing.assert_allclose(out.numpy(), want, atol=error, rtol=0, err_msg=kernel.__name__)


@pytest.mark.parametrize("tile", [SMALL, Tile(16, 16, 16, 16), Tile(64, 48, 32, 144), Tile(128, 128, 128, 128, accumulators=2)], ids=str)
def test_any_tile(tile: Tile, random: np.random.Generator) -> None:
    a, b = numbers(random, (150, 170), "float16"), numbers(random, (170, 130), "float16")
    want = a.numpy().astype(np.float64) @ b.numpy().astype(np.float64)
    for kernel in (naive, double_buffered, k_split):
        out = np.zeros((150, 130), np.float32)
        launch(kernel, A2, a, b, out, tile)
        np.testing.assert_allclose(out, want, atol=1e-3)
    for group in (1, 2, 3, 100):
        out = np.zeros((150, 130), np.float32)
        launch(matmul, A2, a, b, out, tile, group, blocks=24)
        np.testing.assert_allclose(out, want, atol=1e-3)


def test_a_tile_that_does_not_fit() -> None:
    with pytest.raises(BufferOverflow, match="L0B holds 65536 B"):
        launch(k_split, A2, *(empty(512, 512) for _ in range(3)), Tile(128, 128, 256, 256))


def timed(kernel: Callable, n: int, *more: object, chip: str = A2, blocks: int = 1) -> Run:
    return launch(kernel, chip, empty(n, n), empty(n, n), empty(n, n, dtype="float32"), *more, blocks=blocks)


def test_each_step_is_faster() -> None:
    cycles = [timed(kernel, 256).cycles for kernel in ONE_CORE[:3]]
    assert cycles[0] > 30 * cycles[1]
    cycles = [timed(kernel, 1024).cycles for kernel in ONE_CORE[1:3]] + [timed(matmul, 1024, blocks=8).cycles]
    assert cycles[0] > 2 * cycles[1] > 12 * cycles[2]


def test_tiles_of_16_spend_their_time_waiting() -> None:
    run = timed(naive, 128)
    assert max(run.busy.values()) < 0.1


def test_k_split_hides_the_latency_of_gm() -> None:
    """With tiles so small that a transfer is shorter than the latency; with the largest, GM was hidden already."""
    small = [timed(kernel, 512, Tile(64, 32, 64, 256)).cycles for kernel in (double_buffered, k_split)]
    large = [timed(kernel, 2048).cycles for kernel in (double_buffered, k_split)]
    assert small[0] > 1.4 * small[1]
    assert 0.95 * large[0] < large[1] < large[0]


def test_a_second_accumulator_hides_the_way_out() -> None:
    cycles = [timed(k_split, 512, Tile(128, 64, 128, 256, accumulators)).cycles for accumulators in (1, 2)]
    assert cycles[1] < cycles[0]


def test_cores_share_the_work() -> None:
    one, many = timed(k_split, 2048), timed(matmul, 2048, blocks=16)
    assert 10 < one.cycles / many.cycles < 17
    assert many.flops == one.flops == 2 * 2048**3


def test_a_result_is_the_same_on_any_number_of_cores(random: np.random.Generator) -> None:
    a, b = random.standard_normal((2, 300, 300)).astype(np.float16)
    results = []
    for blocks in (1, 5, 24):
        results.append(np.zeros((300, 300), np.float32))
        launch(matmul, A2, a, b, results[-1], blocks=blocks)
    assert all(np.array_equal(results[0], other) for other in results)


def test_the_order_of_tiles() -> None:
    assert order(2, 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert order(3, 2, group=2) == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    for rows, cols, group in ((5, 7, 3), (1, 1, 4), (8, 2, 100)):
        tiles = order(rows, cols, group)
        assert sorted(tiles) == [(r, c) for r in range(rows) for c in range(cols)]


def test_the_largest_tile_fills_l0_twice_over() -> None:
    for dtype, size in (("float16", 2), ("float32", 4), ("int8", 1)):
        tile = largest(dtype)
        assert 2 * tile.k * tile.n * size == 64 * 1024
        assert tile.m * tile.n * 4 == 128 * 1024
