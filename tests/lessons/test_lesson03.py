"""Lesson 03's checks: on the solutions, on untouched stubs, on kernels that are wrong in the usual ways."""

import math

import pytest

from course_lib.chip.core import Core, GlobalTensor
from course_lib.lessons.check.lesson03 import check_choose_tile, check_mmad_cycles, check_summed, check_update
from course_lib.lessons.solutions import lesson03

CHECKS = {
    check_mmad_cycles: lesson03.mmad_cycles,
    check_summed: lesson03.repaired,
    check_update: lesson03.update,
    check_choose_tile: lesson03.choose_tile,
}


def test_the_broken_kernel_is_not_attempted_and_says_what_it_lacks(capsys) -> None:
    assert not check_summed(lesson03.broken)
    said = capsys.readouterr().out
    assert "not attempted yet" in said and "DataRace" in said and 'SetFlag("MTE1_MTE2", id)' in said


def summed(core: Core, a: GlobalTensor, b: GlobalTensor, out: GlobalTensor, init=None, free: str = "ALL") -> None:
    """The kernel of exercise 2 with a barrier in place of flags."""
    a1, b1 = core.LocalTensor("L1", (128, 64), "float16"), core.LocalTensor("L1", (64, 256), "float16")
    a0, b0 = core.LocalTensor("L0A", (128, 64), "float16"), core.LocalTensor("L0B", (64, 256), "float16")
    c0 = core.LocalTensor("L0C", (128, 256), "float32")
    for k in range(0, a.shape[1], 64):
        core.DataCopy(a1, a[:, k : k + 64])
        core.DataCopy(b1, b[k : k + 64])
        core.SetFlag("MTE2_MTE1")
        core.WaitFlag("MTE2_MTE1")
        core.LoadData(a0, a1)
        core.LoadData(b0, b1)
        core.SetFlag("MTE1_M")
        core.WaitFlag("MTE1_M")
        core.Mmad(c0, a0, b0, init=k == 0 if init is None else init)
        core.PipeBarrier(free)
    core.SetFlag("M_FIX")
    core.WaitFlag("M_FIX")
    core.Fixpipe(out, c0)


def test_a_barrier_is_a_repair_too(capsys) -> None:
    assert check_summed(summed)


def test_sums_started_anew_are_told(capsys) -> None:
    assert not check_summed(lambda *arguments: summed(*arguments, init=True))
    assert "only the last step" in capsys.readouterr().out


def test_a_barrier_of_one_pipe_is_too_little(capsys) -> None:
    assert not check_summed(lambda *arguments: summed(*arguments, free="M"))
    said = capsys.readouterr().out
    assert "not right yet" in said or "not attempted yet" in said


def update(core: Core, w: GlobalTensor, g: GlobalTensor, alpha: float = -0.1, last: int = 0, flags: bool = True,
           shared: bool = False) -> None:  # fmt: skip
    """Exercise 3 with what readers change."""
    size = lesson03.PIECE
    weight, gradient = ([core.LocalTensor("UB", size, "float32") for _ in range(2)] for _ in range(2))
    ids = (0, 0) if shared else (0, 1)
    for half in set(ids) if flags else ():
        core.SetFlag("MTE3_MTE2", half)
    for turn, start in enumerate(range(0, w.shape[0] - last * size, size)):
        half, event = turn % 2, ids[turn % 2]
        if flags:
            core.WaitFlag("MTE3_MTE2", event)
        core.DataCopy(weight[half], w[start : start + size])
        core.DataCopy(gradient[half], g[start : start + size])
        core.SetFlag("MTE2_V", event)
        core.WaitFlag("MTE2_V", event)
        core.Axpy(weight[half], gradient[half], alpha)
        core.SetFlag("V_MTE3", event)
        core.WaitFlag("V_MTE3", event)
        core.DataCopy(w[start : start + size], weight[half])
        if flags:
            core.SetFlag("MTE3_MTE2", event)
    for half in set(ids) if flags else ():
        core.WaitFlag("MTE3_MTE2", half)


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (lesson03.update_one_piece, "each pipe still waits for the others"),
        (lambda core, w, g: update(core, w, g, shared=True), "times as long as two halves"),
        (lambda core, w, g: update(core, w, g, flags=False), "DataRace"),
        (lambda core, w, g: update(core, w, g, alpha=1.0), "ALPHA is missing"),
        (lambda core, w, g: update(core, w, g, alpha=0.1), "the sign of ALPHA"),
        (lambda core, w, g: update(core, w, g, last=1), "% of the numbers are right"),
        (lambda core, w, g: update(core, w, g, nothing=1), "it raised TypeError"),
        (lambda core, w, g: core.LocalTensor("UB", 10**6, "float32"), "BufferOverflow"),
        (lambda core, w, g: core.SetFlag("MTE2_V"), "FlagError"),
    ],
)
def test_mistaken_update_is_told(mistake, hint: str, capsys) -> None:
    assert not check_update(mistake)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (lambda m, k, n, tile, latency: 1, "no mistake that this check knows"),
        (lambda m, k, n, tile, latency: math.prod((m, k, n)) // math.prod(tile), "fill first"),
        (lambda m, k, n, tile, latency: m * k * n + latency, "a whole small product"),
        (lambda m, k, n, tile, latency: m * k * n / math.prod(tile) + latency, "round each side up"),
        (lambda m, k, n, tile, latency: -(-m // 16) * -(-k // 16) * -(-n // 16) + 7, "not always 16 deep"),
    ],
)
def test_mistaken_cycles_are_told(mistake, hint: str, capsys) -> None:
    assert not check_mmad_cycles(mistake)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (lambda a, b, c: (128, 64, 256), "they are float32"),
        (lambda a, b, c: (128, 256, 128), "do not fit L0A and L0B"),
        (lambda a, b, c: (64, 64, 128), "as much as need be"),
        (lambda a, b, c: (100, 64, 100), "fractals of 16"),
        (lambda a, b, c: (128.0, 64, 128), "three positive whole numbers"),
        (lambda a, b, c: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_mistaken_tile_is_told(mistake, hint: str, capsys) -> None:
    assert not check_choose_tile(mistake)
    assert hint in capsys.readouterr().out


def test_the_usual_tile_of_the_910b2_is_near_enough() -> None:
    sizes = {2**16: (128, 64, 128), 2**17: (128, 64, 256), 2**18: (256, 64, 256)}
    assert check_choose_tile(lambda a, b, c: sizes[c])
