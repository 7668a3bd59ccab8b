"""Reading chip and system files: what a good one gives, and what a bad one says."""

import copy
import dataclasses
import pickle
from pathlib import Path

import pytest

from course_lib.chip.figures import SpecError, UnknownFigure
from course_lib.chip.spec import ChipSpec, chips, load_chip, load_system, systems

GOOD = """
name = "toy"
title = "Toy"
vendor = "test"
[cube]
cores = { value = 2, unit = "1", tag = "A", source = "test" }
clock = { value = 1.85, unit = "GHz", tag = "A", source = "test" }
[cube.tile]
float16 = { value = [16, 8, 4], unit = "MAC/cycle", tag = "A", source = "test" }
[vector]
cores = { value = 4, unit = "1", tag = "A", source = "test" }
clock = { value = 1000, unit = "MHz", tag = "A", source = "test" }
width = { value = 256, unit = "B/cycle", tag = "A", source = "test" }
flop_per_lane = { value = 2, unit = "FLOP/cycle", tag = "A", source = "test" }
dtypes = { value = ["float16", "float32"], unit = "dtype", tag = "A", source = "test" }
[memory]
capacity = { value = 2, unit = "GiB", tag = "V", source = "test" }
bandwidth = { value = 1.6, unit = "TB/s", tag = "V", source = "page 3" }
[launch]
device = { value = 2.05, unit = "us", tag = "A", source = "test" }
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "toy.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def toy(tmp_path: Path) -> ChipSpec:
    return load_chip(write(tmp_path, GOOD))


def test_values_are_si_and_exact(toy: ChipSpec) -> None:
    assert (toy.name, toy.title, toy.vendor) == ("toy", "Toy", "test")
    assert toy.cube_clock == 1_850_000_000 and isinstance(toy.cube_clock, int)
    assert toy.vector_clock == 1_000_000_000
    assert toy.memory_bytes == 2 * 2**30
    assert toy.memory_bandwidth == 1_600_000_000_000
    assert toy.launch_device == 2.05e-6
    assert toy.cube_tile("float16") == (16, 8, 4)


def test_a_figure_keeps_what_the_file_says(toy: ChipSpec) -> None:
    figure = toy.figures["memory.bandwidth"]
    assert (figure.value, figure.unit, figure.tag, figure.source) == (1_600_000_000_000, "B/s", "V", "page 3")
    assert figure.written == "1.6 TB/s"
    assert toy.figures["cube.tile.float16"].written == "16 × 8 × 4 MAC/cycle"


def test_rates(toy: ChipSpec) -> None:
    assert toy.peak("float16") == 2 * 1_850_000_000 * 2 * 16 * 8 * 4
    assert toy.vector_rate("float16") == 4 * 10**9 * 128 * 2
    assert toy.vector_rate("float32") == 4 * 10**9 * 64 * 2
    assert toy.vector_rate("bfloat16") == toy.vector_rate("int8") == toy.vector_rate("float32"), "by way of float32"
    assert toy.vector_rate("int64") == toy.vector_rate("float32") // 2
    assert toy.peak("float16", "cube+vector") == toy.peak("float16") + toy.vector_rate("float16")
    assert toy.peak("bfloat16") is None


def test_unknown_is_none_and_says_unknown(toy: ChipSpec) -> None:
    assert toy.tdp is None and toy.host_bandwidth is None and toy.cube_tile("int8") is None
    with pytest.raises(UnknownFigure, match="host_bandwidth of Toy is unknown"):
        toy.require("host_bandwidth")
    with pytest.raises(UnknownFigure, match="buffers.l0a of Toy is unknown"):
        toy.require("buffers.l0a")
    assert toy.require("memory_bandwidth") == toy.require("memory.bandwidth") == toy.memory_bandwidth


def test_wrong_questions(toy: ChipSpec) -> None:
    with pytest.raises(SpecError, match="'hbm_bandwidth' is no figure"):
        toy.require("hbm_bandwidth")
    with pytest.raises(ValueError, match="no dtype named 'half'"):
        toy.cube_tile("half")
    with pytest.raises(ValueError, match="cube, cube\\+vector"):
        toy.peak("float16", counts="all")


def test_equal_hashable_frozen_and_picklable(toy: ChipSpec, tmp_path: Path) -> None:
    again = load_chip(write(tmp_path, GOOD))
    faster = load_chip(write(tmp_path, GOOD.replace("1.6", "3.2")))
    assert toy == again and hash(toy) == hash(again) and toy != faster
    assert pickle.loads(pickle.dumps(toy)) == copy.deepcopy(toy) == toy
    with pytest.raises(dataclasses.FrozenInstanceError):
        toy.name = "other"


NEGATIVE = '{ value = -3, unit = "W", tag = "V", source = "test" }'
BAD = {  # what is changed in the good file: (from, to, what the message must say)
    "missing unit": ('value = 1.6, unit = "TB/s"', "value = 1.6", "memory.bandwidth: missing unit"),
    "unknown unit": ('unit = "TB/s"', 'unit = "TBps"', "memory.bandwidth: unknown unit 'TBps'.*TB/s"),
    "unit of something else": ('unit = "TB/s"', 'unit = "GiB"', "memory.bandwidth: unknown unit 'GiB'"),
    "unit no text": ('unit = "TB/s"', "unit = 3", "memory.bandwidth: unknown unit 3"),
    "missing source": (', source = "page 3"', "", "memory.bandwidth: missing source"),
    "empty source": ('"page 3"', '" "', "memory.bandwidth: empty source"),
    "missing tag": ('tag = "V", source = "page 3"', 'source = "page 3"', "memory.bandwidth: missing tag"),
    "unknown tag": ('"V", source = "page 3"', '"X", source = "page 3"', "memory.bandwidth: unknown tag 'X'.*V .publ"),
    "unknown part": ('source = "page 3"', 'source = "page 3", page = 3', "memory.bandwidth: unknown key 'page'"),
    "bare number": ('{ value = 1.6, unit = "TB/s", tag = "V", source = "page 3" }', "1.6", "memory.bandwidth: exp"),
    "unknown key": ("bandwidth =", "bandwith =", "memory.bandwith: unknown key; did you mean memory.bandwidth"),
    "unknown table": ("[memory]", "[hbm]", "hbm: unknown key"),
    "table as value": ("[cube]", "power = 3\n[cube]", "power: expected a table"),
    "text for number": ("value = 1.6", 'value = "1.6"', "memory.bandwidth: impossible value '1.6'"),
    "truth for number": ("value = 1.6", "value = true", "memory.bandwidth: impossible value"),
    "zero": ("value = 1.6", "value = 0", "memory.bandwidth: impossible value 0 TB/s"),
    "negative": ("value = 1.6", "value = -1.6", "memory.bandwidth: impossible value -1.6 TB/s"),
    "far too large": ("value = 1.6", "value = 1e8", "memory.bandwidth: impossible value.*at most 1e\\+16 B/s"),
    "not finite": ("value = 1.6", "value = inf", "memory.bandwidth: impossible value"),
    "not a number": ("value = 1.6", "value = nan", "memory.bandwidth: impossible value"),
    "half a core": ("value = 4, unit", "value = 4.5, unit", "vector.cores: impossible value"),
    "tile of two": ("[16, 8, 4]", "[16, 8]", "cube.tile.float16: impossible value.*three positive whole"),
    "tile with zero": ("[16, 8, 4]", "[16, 8, 0]", "cube.tile.float16: impossible value"),
    "tile a number": ("[16, 8, 4]", "16", "cube.tile.float16: impossible value"),
    "unknown dtype": ("float16 = {", "half = {", "cube.tile.half: unknown key"),
    "unknown vector dtype": ('["float16", "float32"]', '["half"]', "vector.dtypes: impossible value"),
    "negative power": ("[launch]", f"[power]\ntdp = {NEGATIVE}\n[launch]", "power.tdp: impossible value -3 W"),
    "missing title": ('title = "Toy"', "", "title: expected a text"),
    "name no text": ('name = "toy"', "name = 3", "name: expected a text"),
    "not TOML": ("[memory]", "[memory", "not valid TOML"),
    "said twice": ("[memory]", "[cube]", "not valid TOML"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_file_and_key(case: str, tmp_path: Path) -> None:
    old, new, message = BAD[case]
    assert old in GOOD
    with pytest.raises(SpecError, match=f"toy.toml: {message}"):
        load_chip(write(tmp_path, GOOD.replace(old, new, 1)))


def test_names() -> None:
    with pytest.raises(SpecError, match="no chip named 'ascend-910'; there are a100, .*mini"):
        load_chip("ascend-910")
    with pytest.raises(SpecError, match="no system named 'mini'; there are .*mini-node"):
        load_system("mini")
    with pytest.raises(SpecError, match="nowhere.toml: cannot be read"):
        load_chip("nowhere.toml")
    assert load_chip("mini").name == "mini" and "mini" in chips() and "mini-node" in systems()


SYSTEM = """
name = "pair"
title = "Pair"
chip = "mini"
chips_per_node = { value = 2, unit = "1", tag = "A", source = "test" }
nodes = { value = 3, unit = "1", tag = "A", source = "test" }
[scale_up]
name = "wire"
topology = "ring"
bandwidth = { value = 200, unit = "Gb/s", tag = "A", source = "test" }
"""


def test_system(tmp_path: Path) -> None:
    system = load_system(write(tmp_path, SYSTEM))
    assert (system.chip, system.chips_per_node, system.nodes, system.chips) == ("mini", 2, 3, 6)
    assert system.scale_up.bandwidth == 25_000_000_000 and system.scale_up.topology == "ring"
    assert system.scale_up.latency is None and system.scale_out is None and system.power is None
    assert hash(system) == hash(load_system(write(tmp_path, SYSTEM)))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"mini"', '"maxi"', "chip: expected one of a100"),
        ('"ring"', '"star"', "topology: expected one of full mesh"),
        ("nodes = {", "#", "nodes: missing"),
        ("bandwidth =", "bandwith =", "scale_up.bandwith: unknown key; did you mean scale_up.bandwidth"),
        ("[scale_up]", "[scale_sideways]", "scale_sideways: unknown key"),
    ],
)
def test_a_bad_system_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    lines = SYSTEM.replace(old, new, 1).splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    with pytest.raises(SpecError, match=message):
        load_system(write(tmp_path, text))


def test_a_chip_with_another_figure() -> None:
    chip = load_chip("ascend-910b2")
    small = chip.having("910B2, small L2", memory__l2_capacity=12 * 2**20)
    assert (small.l2_bytes, small.title, small.name) == (12 * 2**20, "910B2, small L2", chip.name)
    assert small.figures["memory.l2_capacity"].tag == "A" and small != chip and hash(small) != hash(chip)
    assert chip.l2_bytes == 192 * 2**20 and small.require("buffers.l0c") == chip.require("buffers.l0c")
    with pytest.raises(SpecError, match="memory.l3"):
        chip.having(memory__l3=1)


def test_a_system_with_other_figures() -> None:
    node = load_system("atlas-800t-a2")
    more = node.having("many", nodes=16, chip="ascend-910b3", scale_up__bandwidth=400e9, scale_out__near__latency=1e-6)
    assert (more.title, more.name, more.chips, more.chip) == ("many", node.name, 128, "ascend-910b3")
    assert more.scale_up.bandwidth == 400e9 and more.scale_up.figures["bandwidth"].tag == "A"
    assert more.scale_up.figures["bandwidth"].unit == "B/s" and more.scale_out.figures["near.latency"].unit == "s"
    assert node.chips == 8 and node.scale_up.bandwidth == 392e9 and more != node and hash(more) != hash(node)
    assert node.having(nodes=2) == node.having(nodes=2) and pickle.loads(pickle.dumps(more)) == more
    for key in ("power", "scale_up__width", "scale_sideways__bandwidth"):
        with pytest.raises(SpecError, match=f"{key.split('__')[-1]}' is no figure of a"):
            node.having(**{key: 1})
    with pytest.raises(SpecError, match="no chip named 'h900'; there are a100"):
        node.having(chip="h900")


def test_how_far_scale_up_reaches() -> None:
    assert load_system("atlas-800t-a2").reach == 8
    assert load_system("cloudmatrix384").reach == load_system("cloudmatrix384").having(nodes=96).reach == 768
