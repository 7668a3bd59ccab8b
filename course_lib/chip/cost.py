"""What one operator costs on a chip: picoseconds, and the resource that bounds it.

Cube, vector, memory and host link work at the same time, so an operator takes ``launch + max(product, vector, memory,
host link)`` and is bound by the largest; by "launch" where that exceeds them all. Where each part comes from:

* **Product.** On a chip whose core is known (buffers, paths: Ascend A2 and later, and `mini`) the pipeline of its cores
  as a closed form, see `tiling`: tiles in L0C, waves over cores, loads from L2 and HBM, emptying L0C. It is bound by
  "cube", "L1", "L2" or "memory". Of Ascend before A2 only the cube is known: one of its tiles per core and cycle. Other
  chips (NVIDIA's) go by tiles of the result in waves over their cores, at the share of the peak that is measured for
  large products; where not even that is known, at the published peak, which is the least it can take.
* **Vector.** An elementwise operation is one instruction per 256 bytes. The rate in data sheets counts a fused
  multiply-add as two; only products are made of those, so half of it is what other operations can get.
* **Exchange.** What cube and vector unit hand each other passes the port through which the products load too, or a wire
  where the chip has one. Its time adds to the products'. Operands and results of such products stay in L2.
* **Memory.** Reading goes at the width of the cores' ports or of HBM, whichever is less; a byte written holds HBM longer
  than one read, for HBM turns round between them: by as much as makes a copy reach its measured share. On a chip whose
  core is known, an operator without products also takes its first load and its last store, see `_Rates.stream_ps`.

``vector_flops`` count arithmetic operations in products and elsewhere, so that in a table they add up. Results are
whole picoseconds, rounded up, and the same on every machine.
"""

from dataclasses import dataclass
from math import ceil
from operator import itemgetter

from course_lib.chip.core.rules import THOUSANDTHS, Rules, rules
from course_lib.chip.figures import DTYPES, UnknownFigure
from course_lib.chip.spec import ChipSpec
from course_lib.chip.tiling import tiling

PICO = 10**12
MICRO = 10**6
FLOP_PER_INSTRUCTION = 2  # of a vector lane in published rates, which are of fused multiply-adds
THREAD_BLOCKS = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128))  # tiles of the result on chips that go by waves
MOST, MOST_CHIPS = 100_000, 256  # remembered costs of one chip, and chips
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

    ``vector_flops`` are operations outside products, each an instruction of its own on a vector lane. ``exchanged``:
    bytes that cube and vector unit hand each other within the operator, as attention does; they never reach HBM.
    """

    matmuls: tuple[Matmul, ...] = ()
    vector_flops: int = 0
    vector_dtype: str = "float32"
    bytes_read: int = 0
    bytes_written: int = 0
    link_bytes: int = 0
    exchanged: int = 0


@dataclass(frozen=True, slots=True)
class Cost:
    """What an operator took. ``ps``, the whole duration on the chip, includes the launch; the parts overlap.

    ``cube_flops`` counts 2·m·k·n without padding; a product that ran on the vector cores is in ``vector_flops``.
    ``cube_ps`` is how long the cube itself was at work, ``product_ps`` how long the products took, loads included.
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
    product_ps: int


def cost(spec: ChipSpec, work: Work) -> Cost:
    """The cost of ``work`` on ``spec``.

    Raises UnsupportedDtype for a product in a dtype the chip lacks, UnknownFigure where the chip's file lacks a rate.
    """
    rates = _RATES.get(id(spec)) or _remember(spec)
    known = rates.costs.get(work)
    if known is None:
        known = rates.costs[work] = _reckon(rates, work)
        if len(rates.costs) > MOST:
            rates.costs.clear()
    return known


def _reckon(rates: "_Rates", work: Work) -> Cost:
    cube_flops, vector_flops, moved = 0, work.vector_flops, work.bytes_read + work.bytes_written
    cube_ps = product_ps = longest = 0
    vector_ps = rates.vector_ps(vector_flops, work.vector_dtype) if vector_flops else 0
    limit = "cube"
    for product in work.matmuls:
        flops, done = 2 * product.batch * product.m * product.k * product.n, rates.product(product, work.exchanged > 0)
        if done.on_vector:
            vector_flops, vector_ps = vector_flops + flops, vector_ps + done.ps
            continue
        cube_flops, cube_ps, product_ps = cube_flops + flops, cube_ps + done.cube_ps, product_ps + done.ps
        if done.ps > longest:
            longest, limit = done.ps, done.bound
    if work.exchanged:
        exchange_ps = rates.exchange_ps(work.exchanged)
        product_ps, limit = product_ps + exchange_ps, "L2" if exchange_ps > product_ps else limit
    memory_ps = rates.memory_ps(work.bytes_read, work.bytes_written) if moved else 0
    host_link_ps = -(-work.link_bytes * PICO // rates.spec.require("host_bandwidth")) if work.link_bytes else 0
    parts = ((product_ps, limit), (vector_ps, "vector"), (memory_ps, "memory"), (host_link_ps, "host link"))
    busy_ps, bound = max(parts, key=_time)
    if moved and not work.matmuls and rates.core:
        busy_ps = max(busy_ps, rates.stream_ps(work.bytes_read, work.bytes_written, vector_ps))
    ps = rates.launch_ps + busy_ps
    return Cost(
        ps, "launch" if rates.launch_ps > busy_ps else bound, cube_flops, vector_flops, moved, cube_ps, vector_ps,
        memory_ps, host_link_ps, rates.launch_ps, rates.energy_pj(ps), product_ps,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Product:
    """One product: how long it takes, how long the cube itself works, what bounds it."""

    ps: int
    cube_ps: int
    bound: str
    on_vector: bool = False


class _Rates:
    """The chip's figures, looked up once; by its core where that is known."""

    def __init__(self, spec: ChipSpec) -> None:
        self.spec = spec
        self.costs: dict[Work, Cost] = {}
        self.launch_ps = round(spec.require("launch_device") * PICO)
        self.core = _core(spec)
        value = spec.figures.value
        self._microwatts = None if spec.busy_power is None else round(spec.busy_power * MICRO)
        self._read_share, self._copy_share = value("efficiency.memory_read") or 1, value("efficiency.memory_copy") or 1
        self._write_weight = 2 / self._copy_share - 1 / self._read_share  # copies then reach their measured share
        self.store = min(self.core.l2_write, spec.require("paths.ub_gm")) if self.core else 0
        self._vector: dict[str, int] = {}
        self._how: dict[str, tuple[str, int | tuple[int, int, int]]] = {}

    def energy_pj(self, ps: int) -> int | None:
        """Mean power while training × time, for W × ps = pJ."""
        return None if self._microwatts is None else -(-ps * self._microwatts // MICRO)

    def memory_ps(self, read: int, written: int) -> int:
        """Time of HBM, and of the cores' ports to it, for bytes that stream through."""
        if self.core:
            cores, how = self.spec.cube_cores, self.core
            cycles = max(read / (how.gm_read * cores), how.hbm(read, written) / THOUSANDTHS)
            return ceil(cycles * PICO / how.clock)
        bandwidth = self.spec.require("memory_bandwidth")
        return ceil((read / self._read_share + written * self._write_weight) * PICO / bandwidth)

    def stream_ps(self, read: int, written: int, vector_ps: int) -> int:
        """Time until the last result of an operator on the vector cores is in HBM, first loads and last stores included.

        Work goes through UB in pieces, of which two are there at a time. A piece is loaded, comes a latency later, is
        worked on and written out; while pieces overlap, the first one's loading and the last one's storing do not.
        """
        spec, how = self.spec, self.core
        cycle = PICO / how.clock
        pieces = ceil(2 * (read + written) / (spec.vector_cores * spec.require("buffers.ub")))
        turns = pieces * (spec.vector_cores // spec.cube_cores)  # at the port that the AIVs of one AI core share
        load, store = (size / (width * spec.cube_cores) * cycle for size, width in ((read, how.gm_read), (written, self.store)))
        come = (how.latency["to_ub"] + how.latency["l2_miss"]) * cycle if read else 0
        first, last = vector_ps / pieces + come, store / turns + how.latency["to_ub"] * cycle
        return ceil(max(
            max(load, self.hbm_ps(read, 0)) + first + max(last, self.hbm_ps(0, written / turns)),
            load / turns + come + vector_ps + last,
            load / turns + first + self.hbm_ps(read - read / turns, written),
        ))  # fmt: skip

    def hbm_ps(self, read: float, written: float) -> float:
        """Time of HBM alone."""
        return self.core.hbm(int(read), int(written)) / THOUSANDTHS * PICO / self.core.clock

    def exchange_ps(self, exchanged: int) -> int:
        """Time for bytes from cube to vector unit or back: by their own path where there is one, else through L2."""
        if self.core is None:
            return 0
        direct = self.spec.figures.value("paths.l0c_ub")
        width = direct or 1 / (1 / self.core.l2_write + 1 / self.core.l2_read) * 2
        return ceil(exchanged * PICO / (width * self.spec.cube_cores * self.core.clock))

    def vector_ps(self, operations: int, dtype: str) -> int:
        """Time of the vector cores for operations that are no fused multiply-adds."""
        return -(-FLOP_PER_INSTRUCTION * operations * PICO // self.vector(dtype))

    def vector(self, dtype: str) -> int:
        """FLOP/s of the vector cores in fused multiply-adds, as far as UB feeds them; UnknownFigure if not derivable."""
        if dtype not in self._vector:
            rate = self.spec.vector_rate(dtype)
            if rate is None:
                raise UnknownFigure(f"the vector rate of {self.spec.title} in {dtype} is unknown: no source gives it")
            self._vector[dtype] = int(rate * self.core.figure("vector.share")) if self.core else rate
        return self._vector[dtype]

    def product(self, product: Matmul, on_chip: bool = False) -> _Product:
        """One product, by whatever is known of the chip; ``on_chip`` if its operands and result stay in L2."""
        batch, m, k, n = product.batch, product.m, product.k, product.n
        how, figure = self.how(product.dtype)
        if not (batch and m and k and n):
            return _Product(0, 0, "cube", how == "vector")
        if how == "core":
            done = tiling(self.spec, batch, m, k, n, product.dtype, on_chip)
            clock = self.core.clock
            return _Product(ceil(done.cycles * PICO / clock), ceil(done.cube_cycles * PICO / clock), done.bound)
        if how == "waves":
            return self._waves(product, figure)
        if how == "tile":
            tile_m, tile_k, tile_n = figure
            tiles = batch * -(-m // tile_m) * -(-n // tile_n)
            cycles = -(-tiles // self.spec.cube_cores) * -(-k // tile_k)
            ps = -(-cycles * PICO // self.spec.cube_clock)
            return _Product(ps, ps, "cube")
        ps = -(-2 * batch * m * k * n * PICO // figure)
        return _Product(ps, ps, "cube", how == "vector")

    def _waves(self, product: Matmul, peak: int) -> _Product:
        """Tiles in waves over the cores, at the measured share of the peak."""
        spec = self.spec
        rate = peak * spec.require("efficiency.matmul") / spec.cube_cores
        waves = min(
            -(-product.batch * -(-product.m // tm) * -(-product.n // tn) // spec.cube_cores) * tm * tn
            for tm, tn in THREAD_BLOCKS
        )
        flops = 2 * product.batch * product.m * product.k * product.n
        ps = ceil(2 * waves * product.k / rate * PICO)
        return _Product(ps, ceil(flops * PICO / peak), "cube")

    def how(self, dtype: str) -> tuple[str, int | tuple[int, int, int]]:
        """How a product in ``dtype`` runs.

        ("core", tile), ("waves", FLOP/s), ("tile", (M, K, N)), ("peak", FLOP/s of the cube) or ("vector", FLOP/s): a
        dtype that the cube lacks goes to the vector cores, if these have it: float32 on the 310, the 910A and, without
        TF32, NVIDIA's chips.
        """
        if dtype not in self._how:
            self._how[dtype] = self._choose(dtype)
        return self._how[dtype]

    def _choose(self, dtype: str) -> tuple[str, int | tuple[int, int, int]]:
        spec = self.spec
        tile, peak = spec.cube_tile(dtype), spec.peak(dtype)
        if tile and self.core:
            return "core", tile
        if tile and spec.cube_cores and spec.cube_clock:
            return "tile", tile
        if peak:
            share = spec.figures.value("efficiency.matmul")
            return ("waves", peak) if spec.cube_cores and share else ("peak", int(peak * (share or 1)))
        if spec.vector_has(dtype):
            return "vector", self.vector(dtype)
        there = [other for other in DTYPES if spec.peak(other) or spec.vector_has(other)]
        raise UnsupportedDtype(
            f"{spec.title} has no matrix product in {dtype}, neither on its cube nor on its vector cores; "
            f"use one of {', '.join(there)}"
        )


def _remember(spec: ChipSpec) -> _Rates:
    """The rates of ``spec``, which is kept, so that its id stays its own."""
    if len(_RATES) > MOST_CHIPS:
        _RATES.clear()
    rates = _RATES[id(spec)] = _Rates(spec)
    return rates


_RATES: dict[int, _Rates] = {}  # by the chip's id: hashing a chip, or comparing two, takes longer than all else here


def _core(spec: ChipSpec) -> Rules | None:
    """The rules of its core, or None where the chip's file does not give enough of it."""
    try:
        for name in ("l0a", "l0b", "l0c", "l1", "ub"):
            spec.require(f"buffers.{name}")
        return rules(spec) if spec.l2_bytes else None
    except UnknownFigure:
        return None
