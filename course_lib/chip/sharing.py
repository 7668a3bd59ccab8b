"""What the cores of a matrix product fetch from HBM and what they find in L2, because another core was there first.

The cores take the tiles of the result in groups of rows: down the rows of a group, then on to the next column. At one
time ``wide`` of them need the same tile of A and ``high`` the same tile of B. The first to ask waits for HBM, the others
find it in L2. L2 goes by sectors, so neighbours in a row of B share those that both have a part of.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, isqrt

from course_lib.chip.core.l2 import SECTOR

Pair = tuple[int, int]  # of A, of B


@dataclass(slots=True)
class Sharing:
    """``group`` rows of tiles make a group; ``wide`` cores share a tile of A, ``high`` one of B. Bytes are HBM's.

    Of the sectors of B that a tile touches, ``new`` is the share that no tile before it has fetched, ``sole`` the share
    that no neighbour touches.
    """

    group: int
    high: int
    wide: int
    first: Pair  # bytes for the tiles that all cores begin with
    later: Pair  # and for all others
    new: float
    sole: float


def sharing(size: int, l2: int, cores: int, batch: int, shape: tuple[int, int, int], tile: Pair) -> Sharing:
    """The group that leaves least for HBM, for ``batch`` products (m, k) @ (k, n) of ``size`` bytes an element."""
    (m, k, n), (tm, tn) = shape, tile
    rows, cols, row = -(-m // tm), -(-n // tn), sectors(k * size)
    tiles = batch * rows * cols
    within = min(cores, rows * cols)  # cores at work on one product
    layers = min(cores, tiles) // within
    whole = batch * m * row, batch * k * sectors(n * size)
    fits = sum(whole) <= l2
    best, least = None, 0
    for group in _groups(min(cores, tiles) * tn * k * size // (tm * row), rows, cores, fits):
        wide = min(cols, -(-within // group))
        high = min(rows, -(-within // wide))
        first = min(whole[0], layers * high * tm * row), min(whole[1], layers * wide * tn * k * size)
        if fits:
            total = whole
        elif sum(first) <= l2:
            total = whole[0], whole[1] * -(-rows // group)  # the group's rows of A stay while it walks over B
        else:
            waves = -(-tiles // cores)
            total = waves * first[0], waves * first[1]
        if best is None or sum(total) < least:
            least, best = sum(total), (group, high, wide, first, (max(0, total[0] - first[0]), max(0, total[1] - first[1])))
    width = tn * size
    common = gcd(width, SECTOR)  # a tile touches (width + SECTOR − common) / SECTOR sectors on average
    shared = cols > 1 and common < SECTOR
    new, sole = (width, max(0, width - SECTOR + common)) if shared else (1, 1)
    touched = width + SECTOR - common if shared else 1
    return Sharing(*best, new / touched, sole / touched)


def _groups(square: int, rows: int, cores: int, fits: bool) -> Iterator[int]:
    """Heights of a group to try: that with about as many bytes of A as of B; others too where L2 does not hold the matrices."""
    even = isqrt(max(1, square))
    for group in (even,) if fits else (1, even, 2 * even, cores):
        yield max(1, min(group, rows, cores))


def sectors(width: int) -> int:
    """Bytes that HBM delivers for a row of ``width`` bytes."""
    return width if width < SECTOR else -(-width // SECTOR) * SECTOR
