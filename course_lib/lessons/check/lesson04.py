"""Checks of lesson 04's exercises."""

from collections.abc import Callable
from math import ceil

from course_lib.chip import load_chip
from course_lib.lessons.check import Case, judge
from course_lib.lessons.solutions import lesson04 as solution

CHIPS = ("ascend-910b2", "ascend-950dt", "mini")
WIDTHS = (("ascend-910b2", "bfloat16", 2), ("ascend-910b2", "float32", 4), ("ascend-950dt", "float8_e4m3fn", 1))
RESULTS = ((1792, 1792), (1536, 1536), (2049, 2048), (512, 512))
TILE, CORES = (128, 256), 24


def check_ridge_point(function: Callable[[int, float, int, float], float]) -> bool:
    """On two chips in bfloat16, and on mini."""
    cases = []
    for name in CHIPS:
        chip = load_chip(name)
        m, k, n = chip.cube_tile("bfloat16")
        cores, clock, macs, bandwidth = chip.cube_cores, float(chip.cube_clock), m * k * n, float(chip.memory_bandwidth)
        right = solution.ridge_point(cores, clock, macs, bandwidth)
        mistakes = {
            right / 2: "a multiply-accumulate is two operations",
            right / cores: "all cores work at the same time",
            right / 2 / cores: "all cores work at the same time, and a multiply-accumulate is two operations",
            1 / right: "upside down: FLOP/s over B/s leaves FLOP/B",
            cores * clock * 2 * macs: "that is the cube's FLOP/s; how many bytes arrive in the same second?",
            right * 1e12: "the bandwidth is in B/s, not in TB/s",
            2 * right: "two operations each, not four",
        }
        cases.append(Case((cores, clock, macs, bandwidth), right, mistakes))
    return judge("ridge_point", function, cases, "", "FLOP per byte", "an Ascend 910B2 in bfloat16", tolerance=1e-6)


def check_product_seconds(function: Callable[..., float]) -> bool:
    """A product of matrices, one with a single row, one with a long inner side, one that is mostly result."""
    chip, cases = load_chip("ascend-910b2"), []
    peak, bandwidth = float(chip.peak("bfloat16")), float(chip.memory_bandwidth)
    for m, k, n in ((1, 4096, 4096), (4096, 4096, 4096), (64, 16_384, 64), (4096, 32, 4096)):
        flops, moved = 2 * m * k * n, 2 * (m * k + k * n + m * n)
        right = solution.product_seconds(m, k, n, 2, peak, bandwidth)
        mistakes = {
            flops / peak: "the bytes have to arrive, too: the slower of the two decides",
            moved / bandwidth: "the cube needs its time, too: the slower of the two decides",
            flops / peak + moved / bandwidth: "cube and memory work at the same time: not the sum",
            max(flops / 2 / peak, moved / bandwidth): "a multiply-add is two operations",
            max(flops / peak, 2 * (m * k + k * n) / bandwidth): "the result has to be written, too",
            max(flops / peak, moved / 2 / bandwidth): "the bandwidth is in bytes; an element has `size` of them",
        }
        wrong = {value: hint for value, hint in mistakes.items() if value != right}
        cases.append(Case((m, k, n, 2, peak, bandwidth), right, wrong))
    return judge("product_seconds", function, cases, "s", "seconds, as a float", "bound by memory", tolerance=1e-6)


def check_rows_to_fill(function: Callable[[float, float, int], float]) -> bool:
    """In bfloat16 and float32 on the 910B2, in float8 on the 950DT."""
    cases = []
    for name, dtype, size in WIDTHS:
        chip = load_chip(name)
        peak, bandwidth = float(chip.peak(dtype)), float(chip.memory_bandwidth)
        right = solution.rows_to_fill(peak, bandwidth, size)
        mistakes = {
            peak / bandwidth: "that is the ridge in FLOP/B; how many FLOP does a row do with a weight of `size` bytes?",
            2 * right: "one row does two operations with each weight",
            peak / bandwidth / 2: "a weight has `size` bytes",
            2 * peak / (size * bandwidth): "upside down: wider weights take longer to read, so they need more rows",
            peak / (size * bandwidth): "wider weights take longer to read: multiply by their size",
            1 / right: "upside down",
        }
        wrong = {value: hint for value, hint in mistakes.items() if abs(value / right - 1) > 1e-9}
        cases.append(Case((peak, bandwidth, size), right, wrong))
    return judge("rows_to_fill", function, cases, "", "a number of rows", "an Ascend 910B2 in bfloat16", tolerance=1e-6)


def check_idle_share(function: Callable[..., float]) -> bool:
    """A last wave that is nearly empty, one that is full, a product that needs only a part of the cores."""
    cases = []
    (tall, wide), cores = TILE, CORES
    for m, n in RESULTS:
        tiles = ceil(m / tall) * ceil(n / wide)
        waves = ceil(tiles / cores)
        right = solution.idle_share(m, n, tall, wide, cores)
        mistakes = {
            1 - right: "that is the share that works",
            100 * right: "a fraction from 0 to 1, not a percentage",
            1 - tiles % cores / cores: "that is the last wave alone; the others were full",
            tiles / cores - tiles // cores: "that is how full the last wave is",
            1 - (m // tall) * (n // wide) / (waves * cores): "a tile that is begun takes a core all the same: round up",
            1 - m * n / (tall * wide) / (waves * cores): "count tiles, not areas: one that is begun takes a core",
            float(waves * cores - tiles): "that is how many places stay empty; of how many?",
        }
        wrong = {value: hint for value, hint in mistakes.items() if abs(value - right) > 1e-6}
        cases.append(Case((m, n, tall, wide, cores), right, wrong))
    good = "98 tiles in 5 waves of 24 cores"
    return judge("idle_share", function, cases, "%", "a fraction from 0 to 1", good, tolerance=1e-6)
