"""How many cycles an instruction takes on a chip, and which paths its wires allow.

Widths of buffers and paths are in the chip's own file, latencies and the three calibrated efficiencies in
``data/core/davinci.toml``, each with its source. All results are whole cycles, rounded up.
"""

from functools import lru_cache
from math import ceil

from course_lib import data
from course_lib.chip.core.errors import IllegalPath, WrongOperand
from course_lib.chip.figures import DTYPES, Figures, read_figures, read_toml
from course_lib.chip.spec import ChipSpec

LATENCIES = (
    "add", "mul", "div", "exp", "sqrt", "rsqrt", "adds", "muls", "max", "reduce_sum", "reduce_max", "cube", "to_ub",
    "to_l1", "from_l0c", "l2_miss",
)  # fmt: skip
KEYS = {
    "vector.repeat": "bytes", "vector.share": "ratio",
    **{f"latency.{name}": "cycles" for name in LATENCIES},
    **{f"efficiency.{name}": "ratio" for name in ("l2_read", "l1_read", "hbm_copy")},
}  # fmt: skip
CUBE_PIPES = ("S", "M", "MTE1", "MTE2", "FIX")
VECTOR_PIPES = ("S", "V", "MTE2", "MTE3")
CUBE_BUFFERS = ("L1", "L0A", "L0B", "L0C", "BT")
VECTOR_BUFFERS = ("UB",)
PATHS: dict[tuple[str, str], tuple[str, str]] = {  # from, to → pipe, the chip's figure that allows it
    ("GM", "L1"): ("MTE2", "paths.l2_read"),
    ("GM", "UB"): ("MTE2", "paths.l2_read"),
    ("L1", "L0A"): ("MTE1", "paths.l1_l0a"),
    ("L1", "L0B"): ("MTE1", "paths.l1_l0b"),
    ("L1", "BT"): ("MTE1", "buffers.bt"),
    ("L1", "UB"): ("MTE1", "paths.l1_ub"),
    ("UB", "GM"): ("MTE3", "paths.ub_gm"),
    ("UB", "L1"): ("MTE3", "paths.ub_l1"),
    ("L0C", "GM"): ("FIX", "buffers.fixpipe"),
    ("L0C", "L1"): ("FIX", "buffers.fixpipe"),
    ("L0C", "UB"): ("FIX", "paths.l0c_ub"),
}
THOUSANDTHS = 1000  # of a cycle: the unit in which HBM's bytes are served


@lru_cache
def davinci() -> Figures:
    """The figures of ``data/core/davinci.toml`` by dotted key, with tag and source."""
    file = data.path("core", "davinci.toml")
    return Figures(read_figures(file, read_toml(file), KEYS))


class Rules:
    """The cycle rules of one chip."""

    def __init__(self, spec: ChipSpec) -> None:
        self.spec, self.figure = spec, davinci().value
        self.split = spec.require("vector_cores") != spec.require("cube_cores")  # AIC and AIVs apart: A2 and later
        self.clock = spec.require("cube_clock")
        self.l2_read = spec.require("paths.l2_read") * self.figure("efficiency.l2_read")
        self.l2_write = spec.require("paths.l2_write")
        self.gm_read = min(spec.require("paths.gm_read"), self.l2_read)
        self.latency = {name: self.figure(f"latency.{name}") for name in LATENCIES}
        lanes = spec.require("vector_width") * spec.require("vector.flop_per_lane") // 2  # bytes; of multiply-adds
        self.vector_width, self.repeat = lanes * self.figure("vector.share"), self.figure("vector.repeat")
        self.hbm_byte = THOUSANDTHS * self.clock / spec.require("memory_bandwidth")  # thousandths of a cycle per byte
        self.write_weight = 2 / self.figure("efficiency.hbm_copy") - 1  # copies then reach the measured share of HBM
        self._l1 = {name: spec.figures.value(f"paths.l1_{name.lower()}") for name in ("L0A", "L0B", "UB")}
        self._ub = spec.figures.value("paths.ub_gm")
        self.l2_bytes = spec.l2_bytes or 0

    def path(self, source: str, target: str) -> str:
        """The pipe that moves data from one buffer to another. Raises IllegalPath where the chip has no such wire."""
        pipe, figure = PATHS.get((source, target), ("", ""))
        if figure and self.spec.figures.value(figure) is not None:
            return pipe
        there = ", ".join(f"{a}→{b}" for (a, b), (_, key) in PATHS.items() if self.spec.figures.value(key) is not None)
        through = "; go through GM" if {source, target} & {"UB"} else ""
        raise IllegalPath(f"{self.spec.title} has no path {source}→{target}{through}. Its paths are {there}")

    def mmad(self, m: int, k: int, n: int, dtype: str) -> int:
        """Cycles of the cube for (m, k) @ (k, n). Raises WrongOperand for a dtype that the cube lacks."""
        tile = self.spec.cube_tile(dtype)
        if tile is None:
            raise WrongOperand(f"the cube of {self.spec.title} does not multiply {dtype}")
        return -(-m // tile[0]) * -(-k // tile[1]) * -(-n // tile[2]) + self.latency["cube"]

    def vector(self, elements: int, dtype: str, latency: str, rows: int = 1) -> int:
        """Cycles of a vector instruction on ``rows`` rows of ``elements``; every row starts a repeat of its own."""
        repeats = rows * -(-elements * DTYPES[dtype] // self.repeat)
        return self.latency[latency] + ceil(repeats * self.repeat / self.vector_width) - 1

    def extract(self, target: str, size: int) -> int:
        """Cycles from L1 to L0A, L0B, UB or BT."""
        width = self._l1.get(target) or self._l1["L0B"]
        return ceil(size / (width * self.figure("efficiency.l1_read")))

    def fetch(self, hit: int, miss: int) -> int:
        """Cycles of an AI core's port for bytes out of L2 and out of HBM."""
        return ceil(hit / self.l2_read + miss / self.gm_read)

    def store(self, source: str, size: int) -> int:
        """Cycles of an AI core's port for bytes into L2, from L0C or UB."""
        return ceil(size / (min(self._ub, self.l2_write) if source == "UB" else self.l2_write))

    def move(self, source: str, target: str, size: int) -> int:
        """Cycles inside the core by FixPipe or MTE3: L0C→L1, L0C→UB, UB→L1."""
        figure = {("L0C", "UB"): "paths.l0c_ub", ("UB", "L1"): "paths.ub_l1"}.get((source, target), "paths.l2_write")
        return ceil(size / self.spec.require(figure))

    def hbm(self, read: int, written: int) -> int:
        """Thousandths of a cycle that HBM, shared by all cores, is taken by these bytes."""
        return ceil(self.hbm_byte * (read + self.write_weight * written))


@lru_cache(maxsize=64)
def rules(spec: ChipSpec) -> Rules:
    """The rules of ``spec``. Raises UnknownFigure where its file lacks what a core needs."""
    return Rules(spec)
