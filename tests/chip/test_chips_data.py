"""The shipped chip and system files: every figure sourced, and consistent with what is published."""

from pathlib import Path

import pytest

from course_lib.chip.figures import TAGS
from course_lib.chip.spec import chips, load_chip, load_system, systems

CHIPS = [
    "a100", "ascend-310", "ascend-310p", "ascend-910a", "ascend-910b1", "ascend-910b2", "ascend-910b3", "ascend-910b4",
    "ascend-910c", "ascend-910c-die", "ascend-950dt", "ascend-950pr", "b200", "h100", "h200", "h800", "mini",
]  # fmt: skip
T = 1e12


def test_all_are_there() -> None:
    assert chips() == CHIPS
    assert systems() == [
        "atlas-800t-a2", "atlas-950-superpod", "cloudmatrix384", "dgx-a100", "dgx-h100", "h800-cluster", "mini-node"
    ]  # fmt: skip


@pytest.mark.parametrize("name", CHIPS)
def test_every_figure_has_a_source(name: str) -> None:
    chip = load_chip(name)
    assert chip.name == name and chip.title and chip.vendor and len(chip.figures) > 10
    for key, figure in chip.figures.items():
        assert figure.tag in TAGS and len(figure.source) >= 4, key
        assert figure.tag != "A" or figure.source.startswith(("of ", "chosen", "derived", "mean", "low end")), key


@pytest.mark.parametrize("name", CHIPS)
def test_what_the_device_needs_is_known(name: str) -> None:
    chip = load_chip(name)
    for figure in ("launch_host", "launch_device"):
        assert chip.require(figure) > 0
    assert chip.peak("float16") and chip.vector_rate("float32")
    if name != "ascend-310":  # nobody has published its memory
        assert chip.memory_bytes and chip.memory_bandwidth and chip.host_bandwidth


# dtype, convention, TFLOP/s, tolerance; the figures of shared/facts/chips.md
PEAKS = [
    ("ascend-910b2", "bfloat16", "cube", 353.9, 0.001),
    ("ascend-910b2", "bfloat16", "cube+vector", 376.0, 0.001),
    ("ascend-910b2", "int8", "cube", 707.8, 0.001),
    ("ascend-910b1", "float16", "cube+vector", 386.5, 0.001),
    ("ascend-910b1", "int8", "cube", 727.4, 0.001),
    ("ascend-910b3", "bfloat16", "cube+vector", 313, 0.002),
    ("ascend-910b3", "int8", "cube", 589.8, 0.001),
    ("ascend-910b4", "float16", "cube+vector", 280, 0.01),
    ("ascend-910b4", "float32", "cube+vector", 75, 0.02),
    ("ascend-910c", "bfloat16", "cube+vector", 752, 0.001),
    ("ascend-910c", "bfloat16", "cube", 707.4, 0.001),  # denominator of AMLA, arXiv 2509.25224
    ("ascend-910c-die", "bfloat16", "cube+vector", 376, 0.001),
    ("ascend-910a", "float16", "cube", 262.1, 0.001),  # 256 are quoted
    ("ascend-310", "int8", "cube", 22, 0.02),  # as the Atlas 200 module; 16 first published
    ("ascend-310p", "int8", "cube", 140, 0.01),
    ("ascend-950pr", "bfloat16", "cube", 432, 0.002),
    ("ascend-950pr", "bfloat16", "cube+vector", 486, 0.002),
    ("ascend-950pr", "tf32", "cube+vector", 243, 0.002),
    ("ascend-950pr", "float8_e4m3fn", "cube", 865, 0.001),
    ("ascend-950pr", "float8_e4m3fn", "cube+vector", 919, 0.001),
    ("ascend-950dt", "float4_e2m1fn_x2", "cube", 1730, 0.001),
    ("ascend-950dt", "float4_e2m1fn_x2", "cube+vector", 1784, 0.001),
    ("a100", "bfloat16", "cube", 312, 0),
    ("a100", "tf32", "cube", 156, 0),
    ("h100", "float16", "cube", 989, 0),
    ("h100", "float8_e4m3fn", "cube", 1979, 0),
    ("h800", "bfloat16", "cube", 990, 0),
    ("h200", "bfloat16", "cube", 989, 0),
    ("b200", "bfloat16", "cube", 2250, 0),
]


@pytest.mark.parametrize("name, dtype, counts, published, tolerance", PEAKS)
def test_peaks(name: str, dtype: str, counts: str, published: float, tolerance: float) -> None:
    assert load_chip(name).peak(dtype, counts) / T == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize("name", CHIPS)
def test_derived_peaks_agree_with_those_in_the_file(name: str) -> None:
    chip = load_chip(name)
    # an older clock; "about 400"; 262 quoted as 256; 1504 counts the vector cores at twice their rate, as float16 × 2
    tolerance = {"ascend-310": 0.4, "ascend-910b1": 0.04, "ascend-910a": 0.03, "ascend-910c": 0.031}.get(name, 0.02)
    for key, figure in chip.figures.items():
        if key.startswith("peak.") and not key.startswith("peak.vector"):
            _, counts, dtype = key.split(".")
            assert chip.peak(dtype, counts) == pytest.approx(figure.value, rel=tolerance), key


def test_vector_rates() -> None:
    assert load_chip("ascend-910b2").vector_rate("float16") / T == pytest.approx(22.1, rel=0.001)
    assert load_chip("ascend-950pr").vector_rate("float32") / T == pytest.approx(27, rel=0.002)
    assert load_chip("ascend-950dt").vector_rate("bfloat16") / T == pytest.approx(54, rel=0.002)
    assert load_chip("ascend-910a").vector_rate("float16") / 32 == 256e9
    assert load_chip("a100").vector_rate("float32") == 19.5 * T


def test_nvidia_peaks_follow_from_multiprocessors_and_clock() -> None:
    for name, flop in (("a100", 2048), ("h100", 4096), ("h200", 4096)):  # dense float16 per multiprocessor and cycle
        chip = load_chip(name)
        assert chip.cube_cores * chip.cube_clock * flop == pytest.approx(chip.peak("float16"), rel=0.01)


def test_what_a_chip_lacks() -> None:
    for name in ("ascend-310", "ascend-310p", "ascend-910a"):
        assert load_chip(name).peak("bfloat16") is None and load_chip(name).peak("float32") is None
    for name in ("ascend-910b2", "a100"):
        assert load_chip(name).peak("float8_e4m3fn") is None
    assert load_chip("h100").peak("float32") is None, "not without TF32"
    assert load_chip("a100").peak("bfloat16", "cube+vector") is None, "not published so"
    assert load_chip("a100").cube_tile("bfloat16") is None and load_chip("b200").l2_bytes is None


@pytest.mark.parametrize("name", systems())
def test_systems(name: str) -> None:
    system = load_system(name)
    assert system.name == name and load_chip(system.chip)
    assert system.scale_up.bandwidth >= system.scale_up.peer_bandwidth
    if system.scale_up.topology == "full mesh":
        assert system.scale_up.bandwidth == (system.chips_per_node - 1) * system.scale_up.peer_bandwidth
    parts = (system, system.scale_up, system.scale_out)
    assert all(figure.source for part in parts for figure in part.figures.values())


def test_cloudmatrix_totals() -> None:
    """300 PFLOP/s and 49.2 TB of HBM at 1229 TB/s (SemiAnalysis) of 384 packages."""
    system = load_system("cloudmatrix384")
    die = load_chip(system.chip)
    assert system.chips == 768 and system.power == 559_000
    assert system.chips * die.memory_bytes == pytest.approx(49.2e12, rel=0.001)
    assert system.chips * die.memory_bandwidth == pytest.approx(1229e12, rel=0.001)
    assert system.chips * die.peak("bfloat16", "cube+vector") == pytest.approx(300e15, rel=0.05)


def test_command_line(capsys: pytest.CaptureFixture) -> None:
    from course_lib.chip.__main__ import main

    assert "memory.bandwidth" in main("ascend-910b2") and "CSET" in main("ascend-910b2")
    assert "scale_up.peer_bandwidth" in main("mini-node")


def test_never_torch() -> None:
    for file in Path(__file__).parents[2].joinpath("course_lib", "chip").glob("*.py"):
        assert "import torch" not in file.read_text(encoding="utf-8"), file
