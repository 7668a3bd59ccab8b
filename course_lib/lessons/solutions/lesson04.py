"""Solutions of lesson 04: where a roofline bends, what it says of a product, and what tiles and waves take off it."""

import math


def ridge_point(cores: int, clock: float, macs: int, bandwidth: float) -> float:
    """FLOP per byte from which on the cube limits: its FLOP/s over the memory's B/s; `macs` per core and cycle."""
    return cores * clock * 2 * macs / bandwidth


def product_seconds(m: int, k: int, n: int, size: int, peak: float, bandwidth: float) -> float:
    """Least time of (m, k) @ (k, n), elements of `size` bytes: as long as the slower of cube and memory."""
    return max(2 * m * k * n / peak, size * (m * k + k * n + m * n) / bandwidth)


def rows_to_fill(peak: float, bandwidth: float, size: int) -> float:
    """Rows from which on using a weight takes longer than reading it: 2 FLOP a row against `size` bytes."""
    return size * peak / (2 * bandwidth)


def idle_share(m: int, n: int, tile_m: int, tile_n: int, cores: int) -> float:
    """Share of the cores' time without a tile, when an (m, n) result is cut into tiles, one a core and wave."""
    tiles = math.ceil(m / tile_m) * math.ceil(n / tile_n)
    return 1 - tiles / (math.ceil(tiles / cores) * cores)
