"""Operators on the vector cores, and attention: `cost` against kernels on the core engine; and how fast `cost` is."""

import random
import time
from collections.abc import Callable
from functools import partial
from math import ceil

import pytest

from course_lib.chip.core import GlobalTensor, Run, empty, launch
from course_lib.chip.core.isa import Core
from course_lib.chip.core.kernels.adamw import adamw
from course_lib.chip.core.kernels.attention import attention
from course_lib.chip.core.kernels.elementwise import add
from course_lib.chip.core.kernels.norm import rms_norm
from course_lib.chip.core.kernels.softmax import softmax
from course_lib.chip.core.kernels.tiles import mine, pieces, up
from course_lib.chip.cost import Matmul, Work, cost
from course_lib.chip.spec import ChipSpec, load_chip

CHIPS = ("ascend-910b2", "ascend-950dt")
WITHIN = 0.10
LARGE = 8  # pieces of work for each core, from which on start-up inside the kernel hardly counts
Case = tuple[Callable, list[GlobalTensor], int, Work]  # kernel, its tensors, pieces, what `cost` is told


def moved(core: Core, source: Callable, out: GlobalTensor, size: int) -> None:
    """Through UB in two halves: ``source(start, n)`` yields (first row in the piece, rows of GM)."""
    shape = (size,) if len(out.shape) == 1 else (size, out.shape[1])
    halves = [core.LocalTensor("UB", shape, out.dtype) for _ in range(2)]
    for half in (0, 1):
        core.SetFlag("MTE3_MTE2", half)
    for turn, (start, n) in enumerate(mine(core, list(pieces(out.shape[0], size)))):
        half, whole = turn % 2, up(n) if len(shape) == 1 else n
        core.WaitFlag("MTE3_MTE2", half)
        for at, rows in source(start, n):
            core.DataCopy(halves[half][at : at + up(n)] if len(shape) == 1 else halves[half][at : at + rows.shape[0]], rows)
        core.SetFlag("MTE2_MTE3", half)
        core.WaitFlag("MTE2_MTE3", half)
        core.DataCopy(out[start : start + n], halves[half][:whole])
        core.SetFlag("MTE3_MTE2", half)
    for half in (0, 1):
        core.WaitFlag("MTE3_MTE2", half)


def copy(core: Core, x: GlobalTensor, out: GlobalTensor, size: int) -> None:
    moved(core, lambda start, n: [(0, x[start : start + n])], out, size)


def gather(core: Core, table: GlobalTensor, out: GlobalTensor, ids: list[int], size: int) -> None:
    moved(core, lambda start, n: [(i, table[ids[start + i] : ids[start + i] + 1]) for i in range(n)], out, size)


def share(n: int, cores: int, most: int) -> int:
    """Elements of a piece: all cores get as many pieces, of at most ``most``."""
    each = ceil(n / cores)
    return up(ceil(each / ceil(each / most)))


def vectors(rng: random.Random, chip: ChipSpec, kernel: Callable, tensors: int, dtype: str, held: int, work: Callable) -> Case:
    n = int(2 ** rng.uniform(8, 24))
    size = share(n, chip.vector_cores, chip.require("buffers.ub") // held // 16 * 16)
    return partial(kernel, size=size), [empty(n, dtype=dtype) for _ in range(tensors)], ceil(n / size), work(n)


def rows_of(rng: random.Random, chip: ChipSpec, kernel: Callable, operations: int, weights: int) -> Case:
    rows, cols = int(2 ** rng.uniform(5, 13)), int(2 ** rng.uniform(6, 11)) // 8 * 8
    each = max(1, min(ceil(rows / chip.vector_cores), 64, chip.require("buffers.ub") // (16 * cols) - 2))
    x, out = empty(rows, cols, dtype="float32"), empty(rows, cols, dtype="float32")
    work = Work((), operations * rows * cols, "float32", 4 * cols * (rows + weights), 4 * rows * cols)
    return partial(kernel, rows=each), [x, *(empty(cols, dtype="float32") for _ in range(weights)), out], ceil(rows / each), work


def lookup(rng: random.Random, chip: ChipSpec) -> Case:
    width, tokens, words = int(2 ** rng.uniform(6, 11)) // 16 * 16, int(2 ** rng.uniform(4, 12)), 4096
    ids = [rng.randrange(words) for _ in range(tokens)]
    size = max(1, min(8, tokens // chip.vector_cores))
    work = Work(bytes_read=len(set(ids)) * width * 2 + 8 * tokens, bytes_written=tokens * width * 2)
    return partial(gather, ids=ids, size=size), [empty(words, width), empty(tokens, width)], ceil(tokens / size), work


CASES: dict[str, Callable[[random.Random, ChipSpec], Case]] = {
    "copy": lambda r, c: vectors(r, c, copy, 2, "float16", 4, lambda n: Work(bytes_read=2 * n, bytes_written=2 * n)),
    "add": lambda r, c: vectors(r, c, add, 3, "float16", 12, lambda n: Work((), n, "float16", 4 * n, 2 * n)),
    "adamw": lambda r, c: vectors(r, c, adamw, 4, "float32", 36, lambda n: Work((), 12 * n, "float32", 16 * n, 12 * n)),
    "softmax": lambda r, c: rows_of(r, c, softmax, 5, 0),
    "rms_norm": lambda r, c: rows_of(r, c, rms_norm, 4, 1),
    "lookup": lookup,
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_vector_operators_of_any_size(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(12):
        chip = load_chip(rng.choice(CHIPS))
        kernel, tensors, count, work = CASES[kind](rng, chip)
        run = launch(kernel, chip, *tensors, unit="AIV", blocks=min(chip.vector_cores, count), check=False)
        paid, found = cost(chip, work), (kind, chip.name, [t.shape for t in tensors], run.cycles)
        assert paid.ps == pytest.approx(run.ps + paid.launch_ps, rel=WITHIN), found
        if count >= LARGE * chip.vector_cores:
            assert paid.ps - paid.launch_ps == pytest.approx(run.ps, rel=WITHIN), found


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("keys, width", [(1024, 128), (2048, 64)])
def test_attention(chip: str, keys: int, width: int) -> None:
    """Scores in float32 to the vector cores and probabilities in float16 back: 6 bytes for each query and key."""
    spec, ahead = load_chip(chip), 2
    queries, rows = spec.cube_cores * 128, spec.cube_cores * (ahead + 1) * 128
    space = empty(rows, 128, dtype="float32"), empty(rows, 128), empty(rows, width, dtype="float32")
    q, k, v, out = empty(queries, width), empty(keys, width), empty(keys, width), empty(queries, width, dtype="float32")
    run: Run = launch(
        partial(attention, ahead=ahead), chip, q, k, v, out, *space, unit="MIX", blocks=spec.cube_cores, check=False
    )
    pairs = queries * keys
    products = (Matmul(1, queries, width, keys, "float16"), Matmul(1, queries, keys, width, "float16"))
    paid = cost(spec, Work(products, 5 * pairs, "float32", q.bytes + k.bytes + v.bytes, out.bytes, exchanged=6 * pairs))
    assert paid.ps - paid.launch_ps == pytest.approx(run.ps, rel=0.15)


def test_cost_is_fast() -> None:
    """Bounds with room for busy machines; ``python tests/bench_core.py`` prints figures."""
    chip, rng = load_chip("ascend-910b2"), random.Random(0)
    works = [Work((Matmul(1, *(rng.randrange(1, 9999) for _ in range(3)), "bfloat16"),), bytes_read=i) for i in range(40)]
    cost(chip, works[0])
    new, known = [], []
    for times in (new, known):
        for work in works[1:]:
            began = time.perf_counter()
            cost(chip, work)
            times.append(time.perf_counter() - began)
    assert min(new) < 3e-3 and min(known) < 10e-6


def test_what_is_known_is_not_reckoned_again() -> None:
    chip, work = load_chip("ascend-910b2"), Work(bytes_read=12345)
    assert cost(chip, work) is cost(chip, Work(bytes_read=12345))
    assert cost(load_chip("ascend-910b2"), work) == cost(chip, work)
