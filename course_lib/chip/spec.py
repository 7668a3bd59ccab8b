"""The hardware on paper: what one chip can do, what joins several, and where each figure comes from.

`load_chip` reads ``data/chips/<name>.toml``, `load_system` reads ``data/systems/<name>.toml``; both also take the path
of a file of your own. All values are SI. A figure that no source gives is None; `ChipSpec.require` raises
`UnknownFigure` instead. Peaks are derived from cores × clock × tile where these are known, for published peaks mix two
conventions: cube only, and cube + vector (376 = 353.9 + 22.1 TFLOP/s on the Ascend 910B2).

    python -m course_lib.chip ascend-910b2
"""

from dataclasses import dataclass, replace
from pathlib import Path

from course_lib import data
from course_lib.chip.figures import (
    DIMENSIONS,
    DTYPES,
    Figure,
    Figures,
    SpecError,
    UnknownFigure,
    read_figures,
    read_text,
    read_toml,
)

COUNTS = ("cube", "cube+vector")
TOPOLOGIES = ("full mesh", "switch", "fat tree", "ring")
CHIP_KEYS: dict[str, str] = {
    "cube.cores": "count",
    "cube.clock": "frequency",
    **{f"cube.tile.{dtype}": "tile" for dtype in DTYPES},  # [M, K, N]: MACs per core and cycle
    "vector.cores": "count",
    "vector.clock": "frequency",
    "vector.width": "bytes per cycle",  # per core
    "vector.flop_per_lane": "FLOP per lane",  # per cycle; 2 counts a fused multiply-add as two
    "vector.dtypes": "dtypes",  # those with arithmetic of their own
    "memory.capacity": "bytes",
    "memory.bandwidth": "bandwidth",
    "memory.l2_capacity": "bytes",
    "memory.l2_bandwidth": "bandwidth",
    **{f"buffers.{name}": "bytes" for name in ("l0a", "l0b", "l0c", "l1", "ub", "bt", "fixpipe")},
    **{
        f"paths.{path}": "bytes per cycle"  # per core
        for path in (
            "gm_read", "gm_write", "l2_read", "l2_write", "l1_l0a", "l1_l0b", "l1_ub", "ub_l1", "l0c_ub", "ub_l2",
            "ub_gm",
        )
    },
    "launch.host": "time",  # the host enqueues one operator
    "launch.device": "time",  # the chip starts one kernel
    "efficiency.matmul": "ratio",  # of the peak, in large products
    "efficiency.memory_read": "ratio",  # of the bandwidth, in long reads
    "efficiency.memory_copy": "ratio",  # of the bandwidth, bytes read and written both counted
    "host_link.bandwidth": "bandwidth",  # one direction
    "energy.cube": "energy",  # per FLOP
    "energy.vector": "energy",
    "power.tdp": "power",
    "power.idle": "power",
    "power.busy": "power",  # mean while training
    **{f"peak.{counts}.{dtype}": "rate" for counts in ("cube", "vector", "cube+vector") for dtype in DTYPES},
}  # fmt: skip
SYSTEM_KEYS = {"chips_per_node": "count", "nodes": "count", "power.total": "power"}
LINK_KEYS = {
    "bandwidth": "bandwidth",
    "peer_bandwidth": "bandwidth",
    "latency": "time",
    "efficiency": "ratio",  # of the bandwidths, in long transfers
    "domain": "count",  # devices that the link reaches; chips_per_node where the file gives none
    "near.latency": "time",  # between devices of one node, where the link reaches further
    "near.efficiency": "ratio",
}


def _known(key: str, meaning: str) -> property:
    """An attribute that reads one figure: its value in SI, or None when unknown."""
    return property(lambda self: self.figures.value(key), doc=f"{meaning}; None when unknown.")


@dataclass(frozen=True)
class ChipSpec:
    """One chip, as a program sees one device; ``figures`` holds every figure with its tag and source."""

    name: str
    title: str
    vendor: str
    figures: Figures

    cube_cores = _known("cube.cores", "Number of cube cores (AIC; streaming multiprocessors on NVIDIA chips)")
    cube_clock = _known("cube.clock", "Hz")
    vector_cores = _known("vector.cores", "Number of vector cores (AIV)")
    vector_width = _known("vector.width", "Bytes per cycle and vector core")
    memory_bytes = _known("memory.capacity", "Bytes of HBM")
    memory_bandwidth = _known("memory.bandwidth", "B/s between HBM and the chip")
    l2_bytes = _known("memory.l2_capacity", "Bytes of L2")
    l2_bandwidth = _known("memory.l2_bandwidth", "B/s read from L2")
    launch_host = _known("launch.host", "Seconds the host needs to enqueue one operator")
    launch_device = _known("launch.device", "Seconds the chip needs to start one kernel")
    host_bandwidth = _known("host_link.bandwidth", "B/s between host and chip, one direction")
    tdp = _known("power.tdp", "W, thermal design power")
    idle_power = _known("power.idle", "W with nothing running")
    busy_power = _known("power.busy", "W, mean while training")

    def __hash__(self) -> int:
        return hash((self.name, self.figures))

    @property
    def vector_clock(self) -> int | None:
        """Hz; that of the cube where the file gives none of its own."""
        return self.figures.value("vector.clock") or self.cube_clock

    def cube_tile(self, dtype: str) -> tuple[int, int, int] | None:
        """M, K, N of the product that one cube core does per cycle; None: not in this dtype, or unknown."""
        return self.figures.value(f"cube.tile.{_dtype(dtype)}")

    def vector_has(self, dtype: str) -> bool:
        """Whether the vector cores do arithmetic in ``dtype`` itself rather than by way of float32."""
        published = self.figures.value(f"peak.vector.{_dtype(dtype)}") is not None
        return published or dtype in (self.figures.value("vector.dtypes") or ())

    def vector_rate(self, dtype: str) -> int | None:
        """Peak FLOP/s of the vector cores, published or cores × clock × lanes × FLOP per lane; None: unknown.

        A fused multiply-add counts as two, as in published peaks, so times from it are lower bounds. A dtype without
        arithmetic of its own is converted on the way, and runs at the rate of float32, or slower if it is wider.
        """
        own, float32 = (self.figures.value(f"peak.vector.{name}") for name in (_dtype(dtype), "float32"))
        parts = (self.vector_cores, self.vector_clock, self.vector_width, self.figures.value("vector.flop_per_lane"))
        if own is None and float32 is None and None not in parts:
            cores, clock, width, flop = parts
            float32 = cores * clock * (width // DTYPES["float32"]) * flop
        size = DTYPES[dtype] if self.vector_has(dtype) else max(DTYPES["float32"], DTYPES[dtype])
        return own or (float32 and float32 * DTYPES["float32"] // size)

    def peak(self, dtype: str, counts: str = "cube") -> int | None:
        """FLOP/s of dense products in ``dtype``, derived from cores × clock × tile, else as published; None: unknown.

        ``counts``: "cube", or "cube+vector" as most published peaks count; there the vector part is that of float16,
        of float32 for 4-byte dtypes. Raises ValueError for another word.
        """
        if counts not in COUNTS:
            raise ValueError(f"counts is {counts!r}; use one of {', '.join(COUNTS)}")
        tile, published = self.cube_tile(dtype), self.figures.value(f"peak.{counts}.{dtype}")
        if tile is None or self.cube_cores is None or self.cube_clock is None:
            return published
        cube = self.cube_cores * self.cube_clock * 2 * tile[0] * tile[1] * tile[2]
        if counts == "cube":
            return cube
        vector = self.vector_rate("float32" if DTYPES[dtype] == 4 else "float16")
        return published if vector is None else cube + vector

    def require(self, name: str) -> int | float | tuple:
        """The figure of an attribute ("memory_bandwidth") or dotted key ("memory.bandwidth"); raises UnknownFigure."""
        known = name in CHIP_KEYS or isinstance(getattr(ChipSpec, name, None), property)
        if not known:
            raise SpecError(f"{name!r} is no figure of a chip; see course_lib.chip.spec.CHIP_KEYS")
        value = self.figures.value(name) if name in CHIP_KEYS else getattr(self, name)
        if value is None:
            raise UnknownFigure(
                f"{name} of {self.title} is unknown: no source gives it. "
                f"To assume one, copy {self.name}.toml, add it with tag A, and load the copy by its path"
            )
        return value

    def having(self, title: str = "", **figures: float) -> "ChipSpec":
        """The same chip with other figures, in SI, tagged as assumed: ``chip.having(memory__l2_capacity=12 * 2**20)``.

        Two underscores stand for the dot of a key. Raises SpecError for a key that a chip does not have.
        """
        changed = dict(self.figures)
        for name, value in figures.items():
            _change(changed, name.replace("__", "."), value, CHIP_KEYS, self.name)
        return replace(self, title=title or f"{self.title}, changed", figures=Figures(changed))


@dataclass(frozen=True)
class LinkSpec:
    """What joins chips. Bandwidths are of one chip and one direction; None: unknown."""

    name: str
    topology: str
    figures: Figures

    bandwidth = _known("bandwidth", "B/s out of one chip, over all its peers together")
    peer_bandwidth = _known("peer_bandwidth", "B/s from one chip to one other")
    latency = _known("latency", "Seconds from one chip to another for the first byte")
    efficiency = _known("efficiency", "Share of the bandwidths that long transfers reach")
    domain = _known("domain", "Devices that the link reaches, where these are more than a node's")


@dataclass(frozen=True)
class SystemSpec:
    """Chips joined by links; ``chip`` is a name for `load_chip`. Devices are what programs count: dies on the 910C."""

    name: str
    title: str
    chip: str
    scale_up: LinkSpec | None
    scale_out: LinkSpec | None
    figures: Figures

    chips_per_node = _known("chips_per_node", "Devices in one node")
    nodes = _known("nodes", "Nodes")
    power = _known("power.total", "W of the whole system")

    @property
    def chips(self) -> int:
        """Number of devices."""
        return self.chips_per_node * self.nodes

    @property
    def reach(self) -> int:
        """Devices that one scale-up network joins: those of a node, or of many nodes behind common switches."""
        return (self.scale_up and self.scale_up.domain) or self.chips_per_node

    def having(self, title: str = "", chip: str = "", **figures: float) -> "SystemSpec":
        """The same system with another chip or other figures, in SI: ``having(nodes=16, scale_up__bandwidth=4e11)``.

        Two underscores stand for the dot of a key. Raises SpecError for a chip or a key that there is not.
        """
        if chip and chip not in chips():
            raise SpecError(f"no chip named {chip!r}; there are {', '.join(chips())}")
        parts = {"": (self.figures, SYSTEM_KEYS)}
        for key in ("scale_up", "scale_out"):
            link = getattr(self, key)
            parts |= {key + ".": (link.figures, LINK_KEYS)} if link else {}
        changed = {prefix: dict(figures) for prefix, (figures, _) in parts.items()}
        for name, value in figures.items():
            key = name.replace("__", ".")
            prefix = next((prefix for prefix in parts if prefix and key.startswith(prefix)), "")
            _change(changed[prefix], key.removeprefix(prefix), value, parts[prefix][1], self.name)
        links = {
            key: replace(getattr(self, key), figures=Figures(changed[key + "."]))
            for key in ("scale_up", "scale_out")
            if key + "." in changed
        }
        title = title or f"{self.title}, changed"
        return replace(self, title=title, chip=chip or self.chip, figures=Figures(changed[""]), **links)


def _change(figures: dict[str, Figure], key: str, value: float, keys: dict[str, str], name: str) -> None:
    """Puts a chosen figure in place of the file's."""
    if key not in keys:
        kind = {id(CHIP_KEYS): "chip", id(SYSTEM_KEYS): "system"}.get(id(keys), "link")
        raise SpecError(f"{key!r} is no figure of a {kind}; see course_lib.chip.spec.{kind.upper()}_KEYS")
    unit = figures[key].unit if key in figures else next(iter(DIMENSIONS[keys[key]][1]))
    figures[key] = Figure(value, unit, "A", f"chosen in place of that of {name}", f"{value} {unit}".removesuffix(" 1"))


def chips() -> list[str]:
    """Names of the chips in ``data/chips``, sorted."""
    return sorted(file.stem for file in data.path("chips").glob("*.toml"))


def systems() -> list[str]:
    """Names of the systems in ``data/systems``, sorted."""
    return sorted(file.stem for file in data.path("systems").glob("*.toml"))


def load_chip(name_or_path: str | Path) -> ChipSpec:
    """The chip of this name, or in this .toml file. Raises SpecError naming file and key, or the names there are."""
    file = _file(name_or_path, "chips", chips())
    tables = read_toml(file)
    name, title, vendor = (read_text(file, tables, key) for key in ("name", "title", "vendor"))
    return ChipSpec(name, title, vendor, Figures(read_figures(file, tables, CHIP_KEYS)))


def load_system(name_or_path: str | Path) -> SystemSpec:
    """The system of this name, or in this .toml file. Raises SpecError as `load_chip` does."""
    file = _file(name_or_path, "systems", systems())
    tables = read_toml(file)
    name, title = (read_text(file, tables, key) for key in ("name", "title"))
    chip = read_text(file, tables, "chip", tuple(chips()))
    links = [_link(file, tables, key) for key in ("scale_up", "scale_out")]
    figures = Figures(read_figures(file, tables, SYSTEM_KEYS))
    for key in ("chips_per_node", "nodes"):
        if key not in figures:
            raise SpecError(f"{file}: {key}: missing; a system needs it")
    return SystemSpec(name, title, chip, *links, figures)


def _link(file: Path, tables: dict, key: str) -> LinkSpec | None:
    table = tables.pop(key, None)
    if table is None:
        return None
    if not isinstance(table, dict):
        raise SpecError(f"{file}: {key}: expected a table [{key}], found {table!r}")
    name, topology = read_text(file, table, "name"), read_text(file, table, "topology", TOPOLOGIES)
    keys = {f"{key}.{name}": dimension for name, dimension in LINK_KEYS.items()}
    figures = read_figures(file, table, keys, key + ".")
    return LinkSpec(name, topology, Figures({path.removeprefix(key + "."): figure for path, figure in figures.items()}))


def _file(name_or_path: str | Path, kind: str, names: list[str]) -> Path:
    if isinstance(name_or_path, Path) or name_or_path.endswith(".toml"):
        return Path(name_or_path)
    if name_or_path not in names:
        there = ", ".join(names)
        raise SpecError(f"no {kind[:-1]} named {name_or_path!r}; there are {there}, or give the path of a .toml file")
    return data.path(kind, f"{name_or_path}.toml")


def _dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"no dtype named {dtype!r}; use one of {', '.join(DTYPES)}")
    return dtype
