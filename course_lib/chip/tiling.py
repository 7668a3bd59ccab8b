"""How a chip cuts a matrix product into tiles, and how many cycles that takes: the core's pipeline as a closed form.

A core holds one tile (m, n) of the result in L0C and walks along K. While the cube works on one step, MTE1 extracts the
next from L1 and MTE2 loads a later one from L2 or HBM, so a tile takes as long as the busiest of the three:

    tile = max(steps × cube + drain, steps × extract, steps × load)

where ``drain`` empties L0C, on which the cube waits. Waves of tiles, one per core, follow each other; the last may leave
cores idle. What a wave loads for the first time comes from HBM, which all cores share; the rest from L2. The tile is
the one of a few hundred candidates that takes fewest cycles. tests/chip/test_tiling.py holds the form to the core
engine (``course_lib.chip.core``), which goes through the same program instruction by instruction.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, isqrt

from course_lib.chip.core.buffers import LINE_BYTES
from course_lib.chip.core.rules import THOUSANDTHS, Rules, rules
from course_lib.chip.figures import DTYPES
from course_lib.chip.spec import ChipSpec

FRACTAL = 16  # rows; 32 B of columns
PRICED = 12  # candidates that are looked at closely
MOST_STEPS = 4  # L0 steps in one L1 stage; more only lengthen the first load


@dataclass(frozen=True, slots=True)
class Tiling:
    """A tile (m, k, n) of L0, ``steps`` of them along K in one L1 stage, ``group`` rows of tiles in one column's turn.

    ``cycles`` of the whole product, ``cube_cycles`` of a core's cube; ``bound``: "cube", "L1", "L2" or "memory".
    """

    m: int
    k: int
    n: int
    steps: int
    group: int
    waves: int
    cycles: int
    cube_cycles: int
    bound: str


@lru_cache(maxsize=100_000)
def tiling(spec: ChipSpec, batch: int, m: int, k: int, n: int, dtype: str) -> Tiling:
    """The best tiling of ``batch`` products (m, k) @ (k, n). Raises UnknownFigure where the chip lacks a core's figures."""
    case = _Case(rules(spec), spec, batch, m, k, n, dtype)
    best = min((case.price(tm, tn) for tm, tn in case.candidates()), key=lambda t: (t.cycles, -t.m * t.n))
    return best


class _Case:
    """One product on one chip."""

    def __init__(self, how: Rules, spec: ChipSpec, batch: int, m: int, k: int, n: int, dtype: str) -> None:
        self.how, self.batch, self.m, self.k, self.n, self.dtype = how, batch, m, k, n, dtype
        self.size, self.cores = DTYPES[dtype], spec.cube_cores
        self.out_size = self.size if self.size > 1 else 2
        self.unit = max(FRACTAL, 32 // self.size)  # of k, in whole fractals
        tile = spec.cube_tile(dtype)
        self.macs = 1 / (tile[0] * tile[1] * tile[2])
        self.a_width, self.b_width = (how.extract(name, 1 << 20) * self.size / (1 << 20) for name in ("L0A", "L0B"))
        self.l0a, self.l0b, self.l0c, self.l1 = (spec.require(f"buffers.{name}") for name in ("l0a", "l0b", "l0c", "l1"))

    def candidates(self) -> list[tuple[int, int]]:
        """Tiles (m, n) that fit L0C, each the even share of its dimension, so that edge tiles are nearly full."""
        rows, cols = _shares(self.m, self.cores, FRACTAL), _shares(self.n, self.cores, self.unit)
        fitting = [(tm, tn) for tm in rows for tn in cols if tm * tn * 4 <= self.l0c]
        fitting = [(tm, tn) for tm, tn in fitting if 2 * max(tm, tn) * self.unit * self.size <= min(self.l0a, self.l0b)]
        return sorted(fitting, key=self._roughly)[:PRICED]

    def _roughly(self, tile: tuple[int, int]) -> float:
        """Cycles per unit of K when all goes well, by which candidates are chosen."""
        tm, tn = tile
        waves = -(-self.batch * -(-self.m // tm) * -(-self.n // tn) // self.cores)
        return waves * max(tm * tn * self.macs, (tm * self.a_width + tn * self.b_width), (tm + tn) * self.size / self.how.l2_read)

    def price(self, tm: int, tn: int) -> Tiling:
        how, size = self.how, self.size
        deepest = min(self.l0a // (2 * tm * size), self.l0b // (2 * tn * size), _up(self.k, self.unit))
        tk = max(self.unit, 1 << (deepest.bit_length() - 1))
        count = -(-self.k // tk)
        steps = max(1, min(MOST_STEPS, count, self.l1 // (2 * (tm + tn) * tk * size)))
        cube, extract = self._along_k(tm, tk, tn)
        drain = how.store("L0C", tm * tn * self.out_size) + how.latency["from_l0c"]
        rows, cols = -(-self.m // tm), -(-self.n // tn)
        tiles = self.batch * rows * cols
        waves = -(-tiles // self.cores)
        group, first, later = self._traffic(tm, tn, rows, cols, min(tiles, self.cores), waves)
        a_bytes, b_bytes = (min(side, length) * self.k * size for side, length in ((tm, self.m), (tn, self.n)))
        new = _first_of_line(min(tn, self.n) * size) if cols > 1 else 1  # of what a core loads of B and nobody before it
        loaded, at_once = a_bytes + b_bytes, min(tiles, self.cores)  # by one core for one tile
        part = min(steps, count) / count
        fresh = part * (max(a_bytes, b_bytes * new) if rows > 1 and cols > 1 else a_bytes + b_bytes * new)
        cycles, parts = 0, {"cube": cube + drain, "L1": extract}
        for (from_a, from_b), times, early in ((first, 1, fresh), (later, waves - 1, 0)):
            if times:
                missed = max(early, min(loaded, (from_a + from_b * new) / at_once))  # of what the slowest core loads
                load = ceil((loaded - missed) / how.l2_read + missed / how.gm_read)
                now = {**parts, "L2": load, "memory": how.hbm(from_a + from_b, 0) // THOUSANDTHS}
                cycles += times * max(now.values())
                bound = max(now, key=now.get)
        stage = ceil(fresh / how.gm_read + (part * loaded - fresh) / how.l2_read)
        cycles += how.latency["to_l1"] + how.latency["l2_miss"]
        if bound == "cube":
            cycles += stage + extract // count
        elif bound == "L1":
            cycles += stage + cube // count + drain
        else:
            cycles += min(steps, count) * max(cube, extract) // count + drain
        out = self.batch * self.m * self.n * self.out_size
        cycles += max(0, how.hbm(0, out // waves) // THOUSANDTHS - drain)  # the last wave's results on their way to HBM
        hbm = how.hbm(sum(first) + sum(later) * (waves - 1), out) // THOUSANDTHS
        if hbm > cycles:
            cycles, bound = hbm, "memory"
        return Tiling(tm, tk, tn, steps, group, waves, cycles, waves * (cube - count * how.latency["cube"]), bound)

    def _along_k(self, tm: int, tk: int, tn: int) -> tuple[int, int]:
        """Cycles of the cube and of MTE1 for one tile; the last step along K may be shallower."""
        how, size, (full, rest) = self.how, self.size, divmod(self.k, tk)
        cube = extract = 0
        for depth, times in ((tk, full), (_up(rest, self.unit), 1)):
            if depth and times:
                cube += times * how.mmad(tm, depth, tn, self.dtype)
                extract += times * (how.extract("L0A", tm * depth * size) + how.extract("L0B", depth * tn * size))
        return cube, extract

    def _traffic(self, tm: int, tn: int, rows: int, cols: int, cores: int, waves: int) -> tuple[int, tuple, tuple]:
        """(group, (bytes of A, of B) from HBM in the first wave, in each later one), with the tiles in groups of rows.

        In a group, neighbouring cores take the tiles of one column, then of the next: a wave covers ``group`` rows and
        cores / group columns. The group's rows of A stay in L2 while it walks over B.
        """
        l2, a_row, b_col = self.how.l2_bytes, tm * self.k * self.size, tn * self.k * self.size
        whole_a, whole_b = (self.batch * length * self.k * self.size for length in (self.m, self.n))
        fits = whole_a + whole_b <= l2
        best = None
        even = isqrt(max(1, cores * b_col // a_row))
        for high in {max(1, min(even, rows, cores))} if fits else {min(g, rows) for g in (1, even, 2 * even, cores) if g}:
            wide = min(cols, -(-cores // high))
            layers = max(1, cores // (high * wide))  # of a batch, in one wave
            first = min(whole_a, layers * high * a_row), min(whole_b, layers * wide * b_col)
            if fits:
                total = whole_a, whole_b
            elif sum(first) <= l2:
                total = whole_a, whole_b * -(-rows // high)
            else:
                total = waves * first[0], waves * first[1]
            if best is None or sum(total) < best[0]:
                later = tuple(max(0, t - f) // (waves - 1) if waves > 1 else 0 for t, f in zip(total, first))
                best = sum(total), high, first, later
        return best[1:]


def _first_of_line(width: int) -> float:
    """Share of a row of ``width`` bytes that its tile is the first to ask L2 for; lines at its ends belong to two tiles."""
    if width % LINE_BYTES == 0:
        return 1
    return width / (width + LINE_BYTES) if width < LINE_BYTES else 1 - LINE_BYTES / 2 / width


SIDES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 16)


def _shares(length: int, cores: int, unit: int) -> list[int]:
    """Even shares of a dimension in whole fractals, of about the lengths in SIDES, or one for each core."""
    return sorted({_up(-(-length // -(-length // side)), unit) for side in (*SIDES, -(-length // cores))}, reverse=True)


def _up(length: int, unit: int) -> int:
    return -(-length // unit) * unit
