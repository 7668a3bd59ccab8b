"""When things happen: cycles by hand, pipes beside each other, flags, barriers, the scalar unit, deadlocks, repeatability."""

from collections.abc import Callable
from math import ceil

import numpy as np
import pytest

from course_lib.chip.core import CoreError, Deadlock, FlagError, empty, launch
from course_lib.chip.core.rules import davinci
from course_lib.chip.spec import load_chip

A2 = "ascend-910b2"
FIGURE = davinci().value
HALF = 8192  # elements of float16: 16 KiB


def tables(core: object, count: int, n: int = HALF) -> list:
    return [core.LocalTensor("UB", n, "float16") for _ in range(count)]


def vector_cycles(name: str, size: int) -> int:
    """Latency, and 256 B repeats at half of the 256 B per cycle of an A2's data sheet."""
    return FIGURE(f"latency.{name}") + ceil(size / 256) * 2 - 1


# -- single instructions, by hand -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "latency", "sources"),
    [("Add", "add", 2), ("Mul", "mul", 2), ("Div", "div", 2), ("Exp", "exp", 1), ("Sqrt", "sqrt", 1), ("Max", "max", 2), ("Rsqrt", "rsqrt", 1)],
)
def test_a_vector_instruction(name: str, latency: str, sources: int, aiv: Callable) -> None:
    def kernel(core: object) -> None:
        a, b = tables(core, 2)
        core.Duplicate(a, 1.0)
        getattr(core, name)(b, *[a] * sources)

    run = aiv(kernel)
    first, second = run.events
    assert second.end - second.start == vector_cycles(latency, 2 * HALF)
    assert (first.end - first.start, second.start) == (vector_cycles("adds", 2 * HALF), first.end)
    assert run.cycles == second.end


def test_rows_of_a_reduction_start_repeats_of_their_own(aiv: Callable) -> None:
    def kernel(core: object) -> None:
        a, b = core.LocalTensor("UB", (10, 24), "float32"), core.LocalTensor("UB", 16, "float32")
        core.Duplicate(a, 1.0)
        core.WholeReduceSum(b, a)

    assert [e.end - e.start for e in aiv(kernel).events][1] == FIGURE("latency.reduce_sum") + 10 * 2 - 1


def test_a_transfer_out_of_hbm_and_then_out_of_l2(aiv: Callable) -> None:
    """16 KiB at 32 B per cycle, and again at 80 % of 110; the result is there a latency after the last byte."""
    chip = load_chip(A2)
    read = chip.require("paths.l2_read") * FIGURE("efficiency.l2_read")

    def kernel(core: object, x: object) -> None:
        a, b = tables(core, 2)
        core.DataCopy(a, x)
        core.DataCopy(b, x)

    run = aiv(kernel, empty(HALF))
    miss, hit = ceil(2 * HALF / 32), ceil(2 * HALF / read)
    assert [(e.start, e.end) for e in run.events] == [(0, miss), (miss, miss + hit)]
    late = FIGURE("latency.to_ub") + FIGURE("latency.l2_miss")
    assert run.cycles == max(miss + late, miss + hit + FIGURE("latency.to_ub"))
    assert (run.hbm_bytes, run.hit_rate) == (2 * HALF, 0.5)


def test_the_cube_and_its_loads(aic: Callable) -> None:
    def kernel(core: object, x: object, out: object) -> None:
        l1a, l1b = core.LocalTensor("L1", (128, 64), "float16"), core.LocalTensor("L1", (64, 256), "float16")
        a, b = core.LocalTensor("L0A", (128, 64), "float16"), core.LocalTensor("L0B", (64, 256), "float16")
        c = core.LocalTensor("L0C", (128, 256), "float32")
        core.DataCopy(l1a, x[:128, :64])
        core.DataCopy(l1b, x[:64])
        core.PipeBarrier("ALL")
        core.LoadData(a, l1a)
        core.LoadData(b, l1b)
        core.PipeBarrier("ALL")
        core.Mmad(c, a, b)
        core.PipeBarrier("ALL")
        core.Fixpipe(out, c)

    run = aic(kernel, empty(128, 256), empty(128, 256, dtype="float32"))
    took = {e.name: e.end - e.start for e in run.events}
    loads = [e.end - e.start for e in run.events if e.name == "LoadData"]
    share = FIGURE("efficiency.l1_read")
    assert took["Mmad"] == 8 * 4 * 16 + FIGURE("latency.cube")
    assert loads == [ceil(128 * 64 * 2 / (512 * share)), ceil(64 * 256 * 2 / (256 * share))]
    assert took["Fixpipe"] == ceil(128 * 256 * 4 / 86)
    assert run.cycles == run.events[-1].end + FIGURE("latency.from_l0c")
    assert run.ps == ceil(run.cycles * 10**12 / 1_800_000_000)
    assert run.flops == 2 * 128 * 64 * 256


def test_hbm_is_shared_by_all_cores() -> None:
    """48 AIVs want 16 B per cycle and core from HBM, at 889 B per cycle for all."""
    def kernel(core: object, x: object) -> None:
        (a,) = tables(core, 1)
        start = core.GetBlockIdx() * HALF
        core.DataCopy(a, x[start : start + HALF])

    alone, together = (launch(kernel, A2, empty(48 * HALF), unit="AIV", blocks=n) for n in (1, 48))
    bytes_per_cycle = 1.6e12 / 1.8e9
    assert abs(together.cycles - 48 * 2 * HALF / bytes_per_cycle) < 500
    assert together.cycles > 1.5 * alone.cycles


# -- pipes beside each other --------------------------------------------------------------------------


def copy_add(core: object, x: object, y: object, flag: bool = True) -> None:
    a, b = tables(core, 2)
    core.DataCopy(a, x)
    if flag:
        core.SetFlag("MTE2_V", 3)
        core.WaitFlag("MTE2_V", 3)
    core.Adds(b, a, 1.0)
    core.SetFlag("V_MTE3")
    core.WaitFlag("V_MTE3")
    core.DataCopy(y, b)


def test_a_flag_is_set_when_the_data_is_there(aiv: Callable) -> None:
    run = aiv(copy_add, empty(HALF), empty(HALF))
    copied, added, _ = run.events
    assert added.start == copied.end + FIGURE("latency.to_ub") + FIGURE("latency.l2_miss")


def test_without_a_flag_pipes_run_beside_each_other(aiv: Callable) -> None:
    run = aiv(lambda core, x, y: copy_add(core, x, y, flag=False), empty(HALF), empty(HALF), check=False)
    assert run.events[1].start == 1


def test_a_race_shows_in_the_numbers(aiv: Callable) -> None:
    x, y = np.ones(HALF, np.float16), np.full(HALF, 5, np.float16)
    aiv(lambda core, x, y: copy_add(core, x, y, flag=False), x, y, check=False)
    assert (y == 1).all()  # the zeros that lay there before, and one
    aiv(copy_add, x, y)
    assert (y == 2).all()


@pytest.mark.parametrize("pipe", ["ALL", "V", "MTE2"])
def test_barriers_of_one_pipe_order_nothing_between_pipes(pipe: str, aiv: Callable) -> None:
    def kernel(core: object, x: object) -> None:
        a, b = tables(core, 2)
        core.DataCopy(a, x)
        core.PipeBarrier(pipe)
        core.Adds(b, a, 1.0)

    if pipe == "ALL":
        run = aiv(kernel, empty(HALF))
        assert run.events[1].start >= run.events[0].end + FIGURE("latency.to_ub")
    else:
        with pytest.raises(CoreError, match="Adds on V reads"):
            aiv(kernel, empty(HALF))


def test_a_barrier_drains_its_pipe(aiv: Callable) -> None:
    def kernel(core: object, x: object) -> None:
        a, b = tables(core, 2)
        core.DataCopy(a, x[:HALF])
        core.PipeBarrier("MTE2")
        core.DataCopy(b, x[HALF:])

    first, second = aiv(kernel, empty(2 * HALF)).events
    assert second.start == first.end + FIGURE("latency.to_ub") + FIGURE("latency.l2_miss")


def test_many_barriers_of_all_pipes(aiv: Callable, random: np.random.Generator) -> None:
    x, out = random.standard_normal(64).astype(np.float32), np.zeros(64, np.float32)

    def kernel(core: object, x: object, out: object) -> None:
        a = core.LocalTensor("UB", 64, "float32")
        core.PipeBarrier("ALL")
        core.PipeBarrier("ALL")
        core.DataCopy(a, x)
        for _ in range(10):
            core.PipeBarrier()
            core.Adds(a, a, 1.0)
            core.PipeBarrier("V")
        core.PipeBarrier()
        core.DataCopy(out, a)
        core.PipeBarrier()

    aiv(kernel, x, out)
    np.testing.assert_allclose(out, x + 10, rtol=1e-6)


def test_the_scalar_unit_waits_and_holds_back_what_follows(aiv: Callable) -> None:
    def kernel(core: object, x: object, wait: bool) -> None:
        a, b = tables(core, 2)
        core.DataCopy(a, x)
        core.SetFlag("MTE2_S")
        if wait:
            core.WaitFlag("MTE2_S")
        core.Duplicate(b, 1.0)
        if not wait:
            core.WaitFlag("MTE2_S")

    late, early = aiv(kernel, empty(HALF), True), aiv(kernel, empty(HALF), False)
    arrived = late.events[0].end + FIGURE("latency.to_ub") + FIGURE("latency.l2_miss")
    assert (early.events[1].start, late.events[1].start) == (2, arrived + 1)


def test_several_stops_of_the_scalar_unit(aiv: Callable, random: np.random.Generator) -> None:
    x, out = random.standard_normal(HALF).astype(np.float16), np.zeros(HALF, np.float16)

    def kernel(core: object, x: object, out: object) -> None:
        a, b = tables(core, 2, 1024)
        for i in range(0, HALF, 1024):
            core.DataCopy(a, x[i : i + 1024])
            core.SetFlag("MTE2_S")
            core.WaitFlag("MTE2_S")  # S knows MTE2; V only gets to it through S
            core.SetFlag("S_V")
            core.WaitFlag("S_V")
            core.Muls(b, a, 2.0)
            core.SetFlag("V_S", 1)
            core.WaitFlag("V_S", 1)
            core.SetFlag("S_MTE3")
            core.WaitFlag("S_MTE3")
            core.DataCopy(out[i : i + 1024], b)
            core.PipeBarrier("ALL")

    aiv(kernel, x, out)
    np.testing.assert_array_equal(out, x * np.float16(2))


# -- flags misused ------------------------------------------------------------------------------------


def fails(error: type, text: str, kernel: Callable, unit: str = "AIV", **options: object) -> None:
    with pytest.raises(error, match=text):
        launch(kernel, A2, unit=unit, **options)


def test_unknown_events() -> None:
    fails(FlagError, "'MTE2_M' is no event of an AIV: name two of its pipes, as in MTE2_V; it has S, V, MTE2, MTE3", lambda c: c.SetFlag("MTE2_M"))
    fails(FlagError, "'V_V' is no event", lambda c: c.WaitFlag("V_V"))
    fails(FlagError, "'V' is no event", lambda c: c.WaitFlag("V"))
    fails(FlagError, "MTE2_V has the ids 0 to 7, not 8", lambda c: c.SetFlag("MTE2_V", 8))
    fails(FlagError, "has no pipe 'M'; it has S, V", lambda c: c.PipeBarrier("M"))


def test_a_wait_without_a_set() -> None:
    fails(Deadlock, r"V waits in WaitFlag\(MTE2_V, 0\): no SetFlag for it is left on MTE2", lambda c: c.WaitFlag("MTE2_V"))


def test_a_deadlock_shows_its_chain() -> None:
    def kernel(core: object) -> None:
        core.WaitFlag("MTE2_V")
        core.SetFlag("V_MTE3")
        core.WaitFlag("V_MTE3")
        core.SetFlag("MTE3_MTE2")
        core.WaitFlag("MTE3_MTE2")
        core.SetFlag("MTE2_V")

    chain = (
        r"V waits in WaitFlag\(MTE2_V, 0\): MTE2 would set it, and waits itself\n"
        r"  MTE2 waits in WaitFlag\(MTE3_MTE2, 0\): MTE3 would set it, and waits itself\n"
        r"  MTE3 waits in WaitFlag\(V_MTE3, 0\): V would set it, and waits itself"
    )
    fails(Deadlock, chain, kernel)


def test_the_scalar_unit_in_a_deadlock() -> None:
    def kernel(core: object) -> None:
        core.WaitFlag("V_S")
        core.Duplicate(core.LocalTensor("UB", 16, "float16"), 0.0)
        core.SetFlag("V_S")

    fails(Deadlock, r"S waits in WaitFlag\(V_S, 0\): V would set it, and waits itself\n  V waits to be given Duplicate", kernel)


def test_a_barrier_in_a_deadlock() -> None:
    def kernel(core: object) -> None:
        core.WaitFlag("MTE2_V")
        core.PipeBarrier("ALL")
        core.SetFlag("MTE2_V")

    fails(Deadlock, r"MTE2 waits in PipeBarrier\(ALL\) for the other pipes", kernel)


def test_a_flag_set_twice() -> None:
    def kernel(core: object) -> None:
        core.SetFlag("MTE2_V", 1)
        core.SetFlag("MTE2_V", 1)

    fails(FlagError, r"SetFlag\(MTE2_V, 1\) on MTE2 sets a flag that is still set: .* no WaitFlag\(\"MTE2_V\", 1\)", kernel)


def test_a_flag_that_only_happens_to_be_cleared_in_time(aiv: Callable) -> None:
    def kernel(core: object, x: object) -> None:
        a, b = tables(core, 2)
        for table in (a, b):
            core.DataCopy(table, x)
            core.SetFlag("MTE2_V")
            core.WaitFlag("MTE2_V")
            core.Adds(table, table, 1.0)

    with pytest.raises(FlagError, match="may still be set"):
        aiv(kernel, empty(HALF))


def test_a_flag_left_set() -> None:
    fails(FlagError, r"the flag V_MTE3, 2 that V has set is still set at the end: add WaitFlag\(\"V_MTE3\", 2\)", lambda c: c.SetFlag("V_MTE3", 2))


# -- always the same ----------------------------------------------------------------------------------


def test_cycles_depend_on_nothing_but_the_program(aiv: Callable, random: np.random.Generator) -> None:
    x, y = random.standard_normal((2, HALF)).astype(np.float16)
    runs = [
        aiv(copy_add, x, y), aiv(copy_add, x, y), aiv(copy_add, x, y, check=False), aiv(copy_add, x, y, numerics=False),
        aiv(copy_add, empty(HALF), empty(HALF)), aiv(copy_add, np.full(HALF, np.nan, np.float16), y),
    ]  # fmt: skip
    assert len({run.cycles for run in runs}) == 1
    assert len({tuple(run.events) for run in runs}) == 1


def test_an_empty_kernel(aiv: Callable) -> None:
    run = aiv(lambda core: None)
    assert (run.cycles, run.ps, run.flops, run.busy, run.bound, run.hit_rate, run.events) == (0, 0, 0, {}, "S", None, [])
