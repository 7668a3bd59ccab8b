"""An NPU of your own: from its parameters to silicon, to power, and to a chip that the cost model can price.

Silicon is the sum of the parts whose size is published (cube, vector and scalar unit, SRAM, links) or assumed within a
range (the interface to HBM), times one factor for what surrounds them: network, control, video, spare room. That factor
is calibrated on the Ascend 910 alone; two other dies are predictions (`dies`). Power is what all parts take when all are
busy, by the same table of the 910 at f·V², plus what the die takes when idle; nothing in it is calibrated.

A `Design` may hold one chip or arrays of them: `area` and `power` then are arrays too.

    >>> print(f"{float(area(Design())):.0f} mm², {float(watts(Design())):.0f} W")
    651 mm², 413 W
"""

import tomllib
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product

import numpy as np

from course_lib import data
from course_lib.chip import ChipSpec, load_chip, power
from course_lib.chip.figures import Figures
from course_lib.plan.economy import Range, known

KIB, MIB, GIGA, BITS, PICO = 2**10, 2**20, 1e9, 8, 1e-12
MACS = 16 * 16 * 16  # of the published cube
PORT = 16  # bytes: widths of a core's port to HBM come in such steps
BASE = "ascend-910b2"  # what a design does not choose, it has from here: widths of L2's ports, launch, vector lanes
OWN = ("power.", "peak.", "energy.")  # figures of BASE that a design does not take over
Parts = dict[str, np.ndarray]


@dataclass(frozen=True)
class Design:
    """One NPU, or as many as the arrays are long. The defaults are the Ascend 910B2's.

    ``tile``: multiply-adds of a cube per cycle, M × K × N. KiB of ``l0`` (of L0A and of L0B), ``l0c`` and ``l1`` in a
    core, of ``ub`` for each of its ``vectors`` vector units; MiB of ``l2``; B/s of ``link`` out of the chip, and of all
    its ``stacks`` of HBM together (None: as published for HBM2E, each 400 GB/s). ValueError for what cannot be.
    """

    cores: int = 24
    tile: tuple[int, int, int] = (16, 16, 16)
    clock: float = 1.8e9
    l0: int = 64
    l0c: int = 128
    l1: int = 512
    ub: int = 192
    vectors: int = 2
    l2: int = 192
    stacks: int = 4
    link: float = 392e9
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        for name, value in self._columns().items():
            least = 0 if name in ("l0", "l0c", "l1", "ub", "l2", "link") else 1
            if np.min(value, initial=least) < least:
                raise ValueError(f"{name} of a design is {value}; expected at least {least}")

    @property
    def macs(self) -> int:
        """Multiply-adds of one cube per cycle."""
        return self.tile[0] * self.tile[1] * self.tile[2]

    @property
    def peak(self) -> float:
        """FLOP/s of all cubes in bfloat16."""
        return 2 * self.macs * self.cores * self.clock

    @property
    def memory_bandwidth(self) -> float:
        """B/s of HBM."""
        return self.stacks * table()["stack"]["bandwidth"] if self.bandwidth is None else self.bandwidth

    @property
    def memory(self) -> int:
        """Bytes of HBM."""
        return self.stacks * table()["stack"]["capacity"]

    def __len__(self) -> int:
        return max(np.size(value) for value in self._columns().values())

    def __getitem__(self, chosen: int | np.ndarray) -> "Design":
        """The design at a place, or those at several; of a single design itself."""
        columns = {name: np.broadcast_to(value, len(self))[chosen] for name, value in self._columns().items()}
        if np.ndim(chosen) == 0:
            columns = {name: value.item() for name, value in columns.items()}
        tile = tuple(columns.pop(f"tile{side}") for side in range(3))
        return replace(self, tile=tile, **columns)

    def _columns(self) -> dict[str, object]:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "tile"}
        sides = {f"tile{side}": size for side, size in enumerate(self.tile)}
        return {name: value for name, value in (own | sides).items() if value is not None}


def grid(**choices: list) -> Design:
    """All combinations of ``choices``, as one Design of arrays: ``grid(cores=[16, 24], stacks=[2, 4, 8])``.

    ``tile`` takes triples. TypeError for what a design does not have.
    """
    if unknown := choices.keys() - {field.name for field in fields(Design)}:
        raise TypeError(f"a design has no {', '.join(sorted(unknown))}; see the fields of Design")
    rows = list(product(*choices.values()))
    columns = {name: [row[place] for row in rows] for place, name in enumerate(choices)}
    tile = tuple(np.array(columns.pop("tile")).T) if "tile" in columns else Design.tile
    return Design(tile=tile, **{name: np.array(values) for name, values in columns.items()})


# -- silicon and power --------------------------------------------------------------------------------------


@cache
def table() -> dict:
    """The tables of ``data/published/area.toml``."""
    return tomllib.loads(data.path("published", "area.toml").read_text(encoding="utf-8"))


def constants(point: str = "mid") -> dict[str, float]:
    """mm² of each part, at the "mid", "low" or "high" end of its range."""
    core, read = table()["core"], table()
    ranges = {name: Range(**core[name]) for name in core} | {
        name: Range(**read[name]) for name in ("sram", "hbm", "link")
    }
    return {name: getattr(one, point) for name, one in ranges.items()}


def parts(design: Design, each: dict[str, float] | None = None) -> Parts:
    """mm² by part ("vector" with the scalar unit, "HBM" its interface), what surrounds them last; ``each``: other `constants` than those in the middle."""
    each = each or constants()
    bare = _bare(design, each)
    return bare | {"surroundings": sum(bare.values()) * (_surroundings(tuple(each.items())) - 1)}


def area(design: Design, each: dict[str, float] | None = None) -> np.ndarray:
    """mm² of the whole die."""
    return sum(parts(design, each).values())


def area_range(design: Design) -> Range:
    """mm² of one die over all corners of the constants; in each corner the Ascend 910 has its true size."""
    found = [float(area(design, each)) for each in corners()]
    return Range(min(found), max(found), "mm²", "A", "data/published/area.toml")


def corners() -> list[dict[str, float]]:
    """The `constants` at every combination of the ends of their ranges."""
    low, high = constants("low"), constants("high")
    ends = [dict.fromkeys((low[name], high[name])) for name in low]
    return [dict(zip(low, values, strict=True)) for values in product(*ends)]


def watts(design: Design, mm2: np.ndarray | None = None) -> np.ndarray:
    """W with everything busy at once, which no program does; ``mm2``: of the die, if other than `area`."""
    return sum(watts_by_part(design, mm2).values())


def watts_by_part(design: Design, mm2: np.ndarray | None = None) -> Parts:
    """W by part: cubes and vector units at f·V², HBM and links by their bits, the idle die."""
    busy = {name: Range(**one).mid for name, one in table()["power"].items()}
    pace = design.clock / GIGA * _voltage_squared(design.clock)
    return {
        "cube": busy["cube"] * design.cores * design.macs / MACS * pace,
        "vector": busy["vector"] * design.cores * design.vectors * pace,
        "HBM": known("energy.hbm").mid * PICO * BITS * design.memory_bandwidth,
        "links": known("energy.link").mid * PICO * BITS * design.link,
        "idle": busy["idle"] * (area(design) if mm2 is None else mm2),
    }


def _bare(design: Design, each: dict[str, float]) -> Parts:
    cores = design.cores
    buffers = 2 * design.l0 + design.l0c + design.l1 + design.ub * design.vectors
    return {
        "cube": each["cube"] * cores * design.macs / MACS,
        "vector": cores * (each["vector"] * design.vectors + each["scalar"]),
        "buffers": each["sram"] * cores * buffers * KIB / MIB,
        "L2": each["sram"] * design.l2,
        "HBM": each["hbm"] * design.stacks,
        "links": each["link"] * BITS * design.link / GIGA,
    }


@cache
def _surroundings(each: tuple[tuple[str, float], ...]) -> float:
    """The calibrated die over the sum of its parts."""
    row = next(row for row in table()["die"] if "calibrated" in row)
    return row["mm2"] / sum(_bare(_of(row), dict(each)).values())


def _voltage_squared(clock: float | np.ndarray) -> np.ndarray:
    """V² over that at 1 GHz. UnknownFigure beyond the clocks that were measured."""
    clocks, place = np.unique(clock, return_inverse=True)
    return np.array([(power.voltage(f) / power.voltage(GIGA)) ** 2 for f in clocks])[place].reshape(np.shape(clock))


# -- against dies that exist --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Die:
    """A published die beside ours: mm² and W; ``calibrated``: the area has set a constant, so it is no prediction."""

    name: str
    design: Design
    mm2: float
    ours: Range
    watts: Range
    our_watts: float
    calibrated: bool

    @property
    def error(self) -> float:
        """Relative error of our area, in the middle of the constants."""
        return self.ours.mid / self.mm2 - 1

    @property
    def watts_error(self) -> float:
        """Relative error of our power beyond what is quoted; 0 inside."""
        nearest = min(max(self.our_watts, self.watts.low), self.watts.high)
        return self.our_watts / nearest - 1


def dies() -> list[Die]:
    """The dies of ``data/published/area.toml``, computed."""
    return [_die(row) for row in table()["die"]]


def _die(row: dict) -> Die:
    whole, lit = _of(row), replace(_of(row), **row.get("lit", {}))
    middle, ends = float(area(whole)), area_range(whole)
    quoted = Range(*row["watts"], "W", "T", row["source"])
    return Die(row["name"], whole, row["mm2"], ends, quoted, float(watts(lit, middle)), "calibrated" in row)


def _of(row: dict) -> Design:
    own = {field.name: row[field.name] for field in fields(Design) if field.name in row}
    return Design(**own | {"tile": tuple(row["tile"])})


# -- a chip that can be priced ------------------------------------------------------------------------------


def port(design: Design) -> np.ndarray:
    """B/cycle between a core and HBM: its share of the bandwidth, to the nearest 16, no wider than its port to L2.

    That gives the published widths of 910B2 and 950DT, and 32 in place of 31 for the 950PR.
    """
    share = np.rint(design.memory_bandwidth / (design.cores * design.clock) / PORT) * PORT
    return np.clip(share, PORT, base().require("paths.l2_read"))


@cache
def base() -> ChipSpec:
    """The chip that a design has the rest from, read once."""
    return load_chip(BASE)


def chip(design: Design, title: str = "A design") -> ChipSpec:
    """One design as a chip of the cost model, by `ChipSpec.having`; what it does not choose is the 910B2's.

    Wires from L1 to L0A and L0B are as wide as the tile's sides ask for; for a core's port to HBM see `port`.
    """
    rest, (m, k, n) = base(), design.tile
    wide, l2 = int(port(design)), rest.require("paths.l2_read")
    sizes = {"l0a": design.l0, "l0b": design.l0, "l0c": design.l0c, "l1": design.l1, "ub": design.ub}
    spec = rest.having(
        title,
        cube__cores=design.cores, cube__clock=round(design.clock), vector__cores=design.cores * design.vectors,
        memory__capacity=design.memory, memory__bandwidth=round(design.memory_bandwidth),
        memory__l2_capacity=design.l2 * MIB, memory__l2_bandwidth=round(design.cores * l2 * design.clock),
        paths__gm_read=wide, paths__gm_write=wide,
        paths__l1_l0a=rest.require("paths.l1_l0a") * m * k // 256,
        paths__l1_l0b=rest.require("paths.l1_l0b") * k * n // 256,
        cube__tile__int8=(m, 2 * k, n), cube__tile__float32=(m, max(1, k // 4), n),
        **{f"cube__tile__{dtype}": (m, k, n) for dtype in ("float16", "bfloat16")},
        **{f"buffers__{name}": size * KIB for name, size in sizes.items()},
    )  # fmt: skip
    return replace(spec, figures=Figures({key: one for key, one in spec.figures.items() if not key.startswith(OWN)}))
