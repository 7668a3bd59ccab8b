"""How a chip cuts a matrix product into tiles, and how many cycles that takes.

A core holds one tile (m, n) of the result in L0C and walks along k. Large tiles load less: 2·m·n·k FLOP need (m + n)·k
elements. But L0 and L1 have to hold two parts of A and B, one in use and one on its way; and tiles come in waves, one
tile per core, of which the last may leave cores idle. So candidates are priced, each by the core's pipeline as a closed
form (see `pipeline`), and the fastest is taken, of equals the largest. tests/chip/test_tiling.py holds the form to the core engine (``course_lib.chip.core``), which goes
through the same program instruction by instruction.
"""

from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from course_lib.chip.core.rules import Rules, rules
from course_lib.chip.figures import DTYPES
from course_lib.chip.pipeline import Pipeline, Walk
from course_lib.chip.sharing import sharing
from course_lib.chip.spec import ChipSpec

FRACTAL = 16  # rows; 32 B of columns
PRICED = 12  # candidates that are looked at closely
MOST_STEPS = 4  # L0 steps in one L1 stage; more only lengthen the first load
SIDES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 16)


@dataclass(frozen=True, slots=True)
class Tiling:
    """A tile (m, n) of the result, worked on in steps of ``k``, of which L1 takes ``steps`` at a time (a stage).

    ``group``: rows of tiles that are taken together, column by column (see `sharing`). ``waves``: tiles that a core does
    one after another. ``cycles``: the whole product, from the first load to the last byte in HBM. ``cube_cycles``: how
    long a core's cube works in that time. ``bound``: "cube", "L1", "L2" or "memory", whichever takes longest.
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
def tiling(spec: ChipSpec, batch: int, m: int, k: int, n: int, dtype: str, on_chip: bool = False) -> Tiling:
    """The best tiling of ``batch`` products (m, k) @ (k, n). Raises UnknownFigure where the chip lacks a core's figures.

    ``on_chip``: a step of a fused operator, whose operands and result are in L2; HBM is not asked.
    """
    case = _Case(_on_chip(spec) if on_chip else rules(spec), spec, batch, m, k, n, dtype)
    return min((case.price(tm, tn) for tm, tn in case.candidates()), key=lambda t: (t.cycles, -t.m * t.n))


@lru_cache(maxsize=64)
def _on_chip(spec: ChipSpec) -> Rules:
    """The rules of ``spec`` when everything is in L2."""
    how = copy(rules(spec))
    how.gm_read, how.hbm_byte = how.l2_read, 0
    return how


class _Case:
    """One product on one chip."""

    def __init__(self, how: Rules, spec: ChipSpec, batch: int, m: int, k: int, n: int, dtype: str) -> None:
        self.how, self.batch, self.m, self.k, self.n = how, batch, m, k, n
        self.size, self.cores = DTYPES[dtype], spec.cube_cores
        self.out_size = self.size if self.size > 1 else 2
        self.unit = max(FRACTAL, 32 // self.size)  # of k and n, in whole fractals
        self.tile = spec.cube_tile(dtype)
        if dtype.endswith("_x2"):  # two elements in a byte: count the bytes
            self.k, self.tile = -(-k // 2), (self.tile[0], self.tile[1] // 2, self.tile[2])
        self.macs = 1 / (self.tile[0] * self.tile[1] * self.tile[2])
        self.l0a, self.l0b, self.l0c, self.l1 = (spec.require(f"buffers.{name}") for name in ("l0a", "l0b", "l0c", "l1"))
        large = 1 << 20  # bytes, so that rounding to whole cycles does not show
        self.a_extract, self.b_extract = (how.extract(name, large) * self.size / large for name in ("L0A", "L0B"))

    def candidates(self) -> list[tuple[int, int]]:
        """The most promising tiles (m, n) that fit L0C, L0A and L0B: even shares of m and n, so that edges are nearly full."""
        rows, cols = _shares(self.m, self.cores, FRACTAL), _shares(self.n, self.cores, self.unit)
        side = min(self.l0a, self.l0b) // (2 * self.unit * self.size)  # two of one step have to fit
        fitting = [(tm, tn) for tm in rows for tn in cols if tm * tn * 4 <= self.l0c and tm <= side and tn <= side]
        return sorted(fitting, key=self._roughly)[:PRICED]

    def _roughly(self, tile: tuple[int, int]) -> float:
        """Cycles per unit of k when all goes well, by which candidates are chosen."""
        tm, tn = tile
        waves = -(-self.batch * -(-self.m // tm) * -(-self.n // tn) // self.cores)
        extract, load = tm * self.a_extract + tn * self.b_extract, (tm + tn) * self.size / self.how.l2_read
        return waves * max(tm * tn * self.macs, extract, load)

    def price(self, tm: int, tn: int) -> Tiling:
        """The tiling with this tile, and its time."""
        deepest = min(self.l0a // (2 * tm * self.size), self.l0b // (2 * tn * self.size), _up(self.k, self.unit))
        tk = max(self.unit, 1 << (deepest.bit_length() - 1))
        count = -(-self.k // tk)
        steps = max(1, min(MOST_STEPS, count, self.l1 // (2 * (tm + tn) * tk * self.size)))
        rows = -(-self.m // tm)
        tiles = self.batch * rows * -(-self.n // tn)
        waves = -(-tiles // self.cores)
        shared = sharing(self.size, self.how.l2_bytes, self.cores, self.batch, (self.m, self.k, self.n), (tm, tn))
        walk, edge = self._walk(tm, min(tm, self.m), tk, tn, steps), self.m % tm
        short = self._walk(_up(edge, FRACTAL), edge, tk, tn, steps) if edge and shared.high == rows > 1 else None
        line = Pipeline(
            self.how, walk, waves, shared, max(1, tiles - self.cores), self.batch * self.m * self.n * self.out_size,
            short, edge / tm, min(1, self.n / tn - 1),
        )  # fmt: skip
        cycles, bound = line.longest()
        cube = walk.whole * walk.cube + walk.last_cube - count * self.how.latency["cube"]
        return Tiling(tm, tk, tn, steps, shared.group, waves, ceil(cycles), waves * cube, "L2" if bound == "turn" else bound)

    def _walk(self, tm: int, there: int, tk: int, tn: int, steps: int) -> Walk:
        """A tile of ``tm`` rows, of which ``there`` are in the matrix."""
        count, wide = -(-self.k // tk), min(tn, self.n)
        stages = -(-count // steps)
        whole, last = self._step(tm, tk, tn), self._step(tm, _up(self.k - (count - 1) * tk, self.unit), tn)
        drain = self.how.store("L0C", there * wide * self.out_size) + self.how.latency["from_l0c"]
        before = count - 1 - (stages - 1) * steps
        part = min(1, steps * tk / self.k)
        return Walk(there * self.k * self.size, wide * self.k * self.size, stages, part, steps, before, *whole, *last, drain)

    def _step(self, tm: int, depth: int, tn: int) -> tuple[int, int]:
        """Cycles of MTE1 and of the cube for one step along k."""
        m, k, n = self.tile
        extract = ceil(tm * depth * self.a_extract) + ceil(tn * depth * self.b_extract)
        return extract, -(-tm // m) * -(-depth // k) * -(-tn // n) + self.how.latency["cube"]


def _shares(length: int, cores: int, unit: int) -> list[int]:
    """Even shares of a dimension in whole fractals, of about the lengths in SIDES, or one for each core."""
    return sorted({_up(-(-length // -(-length // side)), unit) for side in (*SIDES, -(-length // cores))}, reverse=True)


def _up(length: int, unit: int) -> int:
    return -(-length // unit) * unit
