"""The L2 cache: sectors, lines, capacity, and what is thrown out."""

from course_lib.chip.core import empty
from course_lib.chip.core.l2 import L2

KIB = 1024


def read(cache: L2, part: object) -> tuple[int, int]:
    return cache.read(part, part.region())


def test_first_from_hbm_then_from_l2() -> None:
    cache, x = L2(1024 * KIB), empty(128, 256)
    assert read(cache, x) == (0, 64 * KIB)
    assert read(cache, x) == (64 * KIB, 0)
    assert read(cache, x[16:32, 64:128]) == (2 * KIB, 0)
    assert (cache.hits, cache.bytes) == (66 * KIB, 130 * KIB)


def test_a_narrow_tile_does_not_bring_its_neighbours_along() -> None:
    cache, x = L2(1024 * KIB), empty(128, 256)
    assert [read(cache, x[:, k : k + 64])[0] for k in (0, 64, 128, 192)] == [0] * 4
    assert [read(cache, x[row : row + 1])[0] for row in range(16)] == [512] * 16


def test_less_than_a_sector_brings_a_whole_one() -> None:
    cache, x = L2(1024 * KIB), empty(16, 256)
    assert read(cache, x[:, :16]) == (0, 2 * KIB)
    assert read(cache, x[:, 16:64]) == (1536, 0)


def test_vectors() -> None:
    cache, x = L2(64 * KIB), empty(16 * KIB, dtype="float32")
    assert read(cache, x[: 8 * KIB]) == (0, 32 * KIB)
    assert read(cache, x[4 * KIB : 12 * KIB]) == (16 * KIB, 16 * KIB)
    assert read(cache, x[:8 * KIB]) == (32 * KIB, 0)
    assert cache.used == 48 * KIB


def test_what_was_used_longest_ago_goes() -> None:
    cache, x = L2(64 * KIB), empty(12, 8 * KIB, dtype="int8")
    x = empty(24 * KIB, dtype="float32")  # 96 KiB
    for part in (x[: 8 * KIB], x[8 * KIB : 16 * KIB]):
        read(cache, part)
    assert read(cache, x[: 8 * KIB]) == (32 * KIB, 0)
    assert read(cache, x[16 * KIB :]) == (0, 32 * KIB)
    assert read(cache, x[: 8 * KIB]) == (32 * KIB, 0)
    assert read(cache, x[8 * KIB : 16 * KIB]) == (0, 32 * KIB)
    assert cache.used == 64 * KIB


def test_what_is_written_is_there() -> None:
    cache, x = L2(1024 * KIB), empty(128, 256)
    part = x[:64]
    cache.write(part, part.region())
    assert read(cache, x) == (32 * KIB, 32 * KIB)


def test_rows_of_odd_length() -> None:
    cache, x = L2(1024 * KIB), empty(33, 17)
    hit, fetched = read(cache, x)
    assert (hit, fetched) == (0, 33 * 34)
    assert read(cache, x) == (33 * 34, 0)


def test_a_chip_without_l2_misses_always() -> None:
    cache, x = L2(0), empty(16, 256)
    assert [read(cache, x)[0] for _ in range(2)] == [0, 0]
