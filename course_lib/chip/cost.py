"""What one operator costs on a chip: picoseconds, and the resource that bounds it. First version: rates, no pipeline.

Cube, vector, memory and host link work at the same time, so an operator takes ``launch + max(cube, vector, memory,
host link)`` and is bound by the largest; by "launch" where that exceeds them all. Three regimes follow: a large matrix
product is bound by the cube, an elementwise operator by memory, a tiny one by its launch.

The cube works in tiles M × K × N, one per core and cycle. A product that does not fill its last tiles pays for them,
and the last round of tiles may leave cores idle: 17 columns cost as much as 32.

The vector cores' published rate counts a fused multiply-add as two FLOP. Only products of matrices are made of those;
every other vector operation (an addition, an exponential) is one instruction, and half the published rate is what the
cores can do of them. ``vector_flops`` counts arithmetic operations in both cases, so that in a table they add up.

All arithmetic is on integers and rounds up, so that a cost is bit-identical on every machine.
"""

from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter

from course_lib.chip.figures import DTYPES, UnknownFigure
from course_lib.chip.spec import ChipSpec

PICO = 10**12
MICRO = 10**6
FLOP_PER_INSTRUCTION = 2  # of a vector lane in published rates, which are of fused multiply-adds
_time = itemgetter(0)


class UnsupportedDtype(RuntimeError):
    """A matrix product in a dtype in which this chip has no arithmetic."""


@dataclass(frozen=True, slots=True)
class Matmul:
    """``batch`` products (m, k) @ (k, n); ``dtype`` is that of the inputs, by torch's name ("bfloat16"), or "tf32"."""

    batch: int
    m: int
    k: int
    n: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Work:
    """What one operator asks of the chip. Bytes are HBM traffic; ``link_bytes`` go between host and chip.

    ``vector_flops`` are operations outside products, each an instruction of its own on a vector lane.
    """

    matmuls: tuple[Matmul, ...] = ()
    vector_flops: int = 0
    vector_dtype: str = "float32"
    bytes_read: int = 0
    bytes_written: int = 0
    link_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operator took. ``ps``, the whole duration on the chip, includes the launch; the parts overlap.

    ``cube_flops`` counts 2·m·k·n without padding; a product that ran on the vector cores is in ``vector_flops``.
    ``energy_pj`` is duration × the mean power measured while training; None where nobody has published that power.
    """

    ps: int
    bound: str
    cube_flops: int
    vector_flops: int
    bytes: int
    cube_ps: int
    vector_ps: int
    memory_ps: int
    host_link_ps: int
    launch_ps: int
    energy_pj: int | None


def cost(spec: ChipSpec, work: Work) -> Cost:
    """The cost of ``work`` on ``spec``.

    Raises UnsupportedDtype for a product in a dtype the chip lacks, UnknownFigure where the chip's file lacks a rate.
    """
    rates = _rates(spec)
    cube_flops, vector_flops, moved = 0, work.vector_flops, work.bytes_read + work.bytes_written
    cube_ps = memory_ps = host_link_ps = 0
    vector_ps = _ps(FLOP_PER_INSTRUCTION * vector_flops, rates.vector(work.vector_dtype)) if vector_flops else 0
    for product in work.matmuls:
        flops, ps, on_cube = _matmul(rates, product)
        if on_cube:
            cube_flops, cube_ps = cube_flops + flops, cube_ps + ps
        else:
            vector_flops, vector_ps = vector_flops + flops, vector_ps + ps
    if moved:
        memory_ps = _ps(moved, rates.memory or spec.require("memory_bandwidth"))
    if work.link_bytes:
        host_link_ps = _ps(work.link_bytes, spec.require("host_bandwidth"))
    parts = ((cube_ps, "cube"), (vector_ps, "vector"), (memory_ps, "memory"), (host_link_ps, "host link"))
    busy_ps, bound = max(parts, key=_time)
    ps = rates.launch_ps + busy_ps
    return Cost(
        ps, "launch" if rates.launch_ps > busy_ps else bound, cube_flops, vector_flops, moved, cube_ps, vector_ps,
        memory_ps, host_link_ps, rates.launch_ps, rates.energy_pj(ps),
    )  # fmt: skip


def _matmul(rates: "_Rates", product: Matmul) -> tuple[int, int, bool]:
    """FLOPs, picoseconds, and whether the cube did it.

    On the cube by tiles where the chip's tile is known, by its published peak where only that is. A dtype that the cube
    lacks goes to the vector cores, if these have it: float32 on the 310, the 910A and, without TF32, NVIDIA's chips.
    """
    batch, m, k, n = product.batch, product.m, product.k, product.n
    flops = 2 * batch * m * k * n
    how, figure = rates.matmul(product.dtype)
    if how == "tile":
        tile_m, tile_k, tile_n = figure
        tiles = batch * -(-m // tile_m) * -(-n // tile_n)
        cycles = -(-tiles // rates.cube_cores) * -(-k // tile_k)
        return flops, _ps(cycles, rates.cube_clock), True
    return flops, _ps(flops, figure), how == "peak"


def _ps(amount: int, rate: int) -> int:
    """Picoseconds for ``amount`` at ``rate`` per second, rounded up."""
    return -(-amount * PICO // rate)


class _Rates:
    """The chip's figures as integers, looked up once."""

    def __init__(self, spec: ChipSpec) -> None:
        self.spec = spec
        self.launch_ps = round(spec.require("launch_device") * PICO)
        self.memory = spec.memory_bandwidth
        self.cube_cores, self.cube_clock = spec.cube_cores, spec.cube_clock
        self._microwatts = None if spec.busy_power is None else round(spec.busy_power * MICRO)
        self._vector: dict[str, int] = {}
        self._matmul: dict[str, tuple[str, int | tuple[int, int, int]]] = {}

    def energy_pj(self, ps: int) -> int | None:
        """Mean power while training × time, for W × ps = pJ."""
        return None if self._microwatts is None else -(-ps * self._microwatts // MICRO)

    def vector(self, dtype: str) -> int:
        """FLOP/s of the vector cores in fused multiply-adds; UnknownFigure where it cannot be derived."""
        if dtype not in self._vector:
            rate = self.spec.vector_rate(dtype)
            if rate is None:
                raise UnknownFigure(f"the vector rate of {self.spec.title} in {dtype} is unknown: no source gives it")
            self._vector[dtype] = rate
        return self._vector[dtype]

    def matmul(self, dtype: str) -> tuple[str, int | tuple[int, int, int]]:
        """How a product in ``dtype`` runs: ("tile", (M, K, N)), ("peak", FLOP/s of the cube) or ("vector", FLOP/s)."""
        if dtype not in self._matmul:
            self._matmul[dtype] = self._choose(dtype)
        return self._matmul[dtype]

    def _choose(self, dtype: str) -> tuple[str, int | tuple[int, int, int]]:
        spec = self.spec
        tile, peak = spec.cube_tile(dtype), spec.peak(dtype)
        if tile and self.cube_cores and self.cube_clock:
            return "tile", tile
        if peak:
            return "peak", peak
        if spec.vector_has(dtype):
            return "vector", self.vector(dtype)
        there = [other for other in DTYPES if spec.peak(other) or spec.vector_has(other)]
        raise UnsupportedDtype(
            f"{spec.title} has no matrix product in {dtype}, neither on its cube nor on its vector cores; "
            f"use one of {', '.join(there)}"
        )


@lru_cache(maxsize=256)
def _rates(spec: ChipSpec) -> _Rates:
    return _Rates(spec)
