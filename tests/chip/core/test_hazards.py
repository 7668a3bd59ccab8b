"""Races are found whatever the timing, and correct programs raise no alarm."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from course_lib.chip.core import DataRace, FlagError, ReadBeforeWrite, launch

A2 = "ascend-910b2"
N = 256


def kernel(body: Callable) -> Callable:
    """A kernel on GM tensors x and y with three tables of N float32 in UB."""

    def run(core: object, x: object, y: object) -> None:
        body(core, x, y, *(core.LocalTensor("UB", N, "float32") for _ in range(3)))

    return run


def ran(body: Callable, unit: str = "AIV", blocks: int = 1, same: bool = False, size: int = N) -> object:
    x = np.arange(size, dtype=np.float32)
    return launch(kernel(body), A2, x, x if same else np.zeros_like(x), unit=unit, blocks=blocks)


def races(text: str, body: Callable, error: type = DataRace, **options: object) -> None:
    with pytest.raises(error, match=text):
        ran(body, **options)


def both(core: object, event: str, event_id: int = 0) -> None:
    core.SetFlag(event, event_id)
    core.WaitFlag(event, event_id)


# -- races ----------------------------------------------------------------------------------------------


def test_read_before_the_producers_flag() -> None:
    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        core.DataCopy(a, x)
        core.Adds(b, a, 1.0)

    races(
        r'Adds on V reads UB@0\[0:256\] while DataCopy on MTE2 may still be writing it; add SetFlag\("MTE2_V", id\) after it '
        r'and WaitFlag\("MTE2_V", id\) before',
        body,
    )


def test_overwritten_while_read() -> None:
    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        core.DataCopy(a, x)
        both(core, "MTE2_V")
        core.Adds(b, a, 1.0)
        core.DataCopy(a, x)

    races(r"DataCopy on MTE2 overwrites UB@0\[0:256\] while Adds on V may still be reading it; .*, or use a second buffer", body)


def test_written_by_two_pipes() -> None:
    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        core.DataCopy(a, x)
        core.Duplicate(a, 1.0)

    races(r'Duplicate on V writes UB@0\[0:256\] while DataCopy on MTE2 may still be writing it; add SetFlag\("MTE2_V"', body)


def test_a_result_written_out_before_it_is_there() -> None:
    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        core.Duplicate(a, 1.0)
        core.DataCopy(y, a)

    races("DataCopy on MTE3 reads UB@0", body)


def test_through_gm() -> None:
    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        core.Duplicate(a, 1.0)
        both(core, "V_MTE3")
        core.DataCopy(y, a)
        core.DataCopy(b, y)

    races(r"DataCopy on MTE2 reads GM1\[0:256\] while DataCopy on MTE3 may still be writing it", body)


def test_through_gm_in_place() -> None:
    """x and y are one array, so they are one tensor."""

    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        core.DataCopy(a, x)
        core.Duplicate(b, 1.0)
        both(core, "V_MTE3")
        core.DataCopy(y, b)

    races("overwrites GM0|reads GM0", body, same=True)
    ran(body)


@pytest.mark.parametrize("who", ["reads", "writes"])
def test_between_cores(who: str) -> None:
    """Core 0 writes what core 1 reads or writes, and no flag can say who comes first."""

    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        if core.GetBlockIdx() == 1 and who == "reads":
            core.DataCopy(b, y[128:])
            return
        core.Duplicate(a, 1.0)
        both(core, "V_MTE3")
        core.DataCopy(y[:160], a[:160])

    races(r"GM1\[.* on AIV[01] MTE[23] .*add CrossCoreSetFlag on AIV[01] MTE[23] after it and CrossCoreWaitFlag on AIV[01]", body, blocks=2)


def test_slices_that_overlap_in_part() -> None:
    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        core.DataCopy(a[:128], x[:128])
        both(core, "MTE2_V")
        core.DataCopy(a[128:], x[128:])
        core.Adds(b[:104], a[:104], 1.0)
        core.Adds(b[104:136], a[104:136], 1.0)

    races(r"Adds on V reads UB@0\[104:136\] while DataCopy on MTE2", body)


@pytest.mark.parametrize(("address", "race"), [(0, True), (512, True), (992, True), (1024, False)])
def test_another_tensor_at_the_same_address(address: int, race: bool) -> None:
    """``a`` takes bytes 0 to 1023."""

    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        other = core.LocalTensor("UB", 64, "float16", address=address)
        core.DataCopy(a, x)
        core.Duplicate(other, 1.0)

    if race:
        races("UB@", body)
    else:
        ran(body)


def test_a_slice_lies_where_it_lies() -> None:
    """Rows 8 to 15 of a table and another tensor at the address of row 8 share bytes; rows 0 to 7 do not."""

    def program(rows: slice) -> Callable:
        def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
            table = core.LocalTensor("UB", (16, 16), "float32", address=0)
            other = core.LocalTensor("UB", 128, "float32", address=512)
            core.DataCopy(other, x[:128])
            core.Duplicate(table[rows], 1.0)

        return body

    ran(program(slice(0, 8)))
    races("UB@", program(slice(8, 16)))


def test_fractals_of_a_slice_of_l1() -> None:
    def program(cols: slice) -> Callable:
        def run(core: object, x: object) -> None:
            l1 = core.LocalTensor("L1", (32, 64), "float16")
            a = core.LocalTensor("L0A", (32, 32), "float16")
            core.DataCopy(l1[:, :32], x[:, :32])
            both(core, "MTE2_MTE1")
            core.DataCopy(l1[:, 32:], x[:, 32:])
            core.LoadData(a, l1[:, cols])

        return run

    x = np.zeros((32, 64), np.float16)
    launch(program(slice(0, 32)), A2, x)
    with pytest.raises(DataRace, match=r"LoadData on MTE1 reads L1@0\[0:32, 16:48\]"):
        launch(program(slice(16, 48)), A2, x)


def test_edge_tiles_share_their_place_with_whole_ones() -> None:
    def run(core: object, x: object) -> None:
        l1, a = core.LocalTensor("L1", (32, 32), "float16"), core.LocalTensor("L0A", (32, 32), "float16")
        b, c = core.LocalTensor("L0B", (32, 32), "float16"), core.LocalTensor("L0C", (32, 32), "float32")
        core.DataCopy(l1, x)
        both(core, "MTE2_MTE1")
        core.LoadData(a, l1)
        core.LoadData(b, l1)
        both(core, "MTE1_M")
        core.Mmad(c, a, b)
        core.LoadData(a.as_shape(16, 16), l1[:16, :16])

    with pytest.raises(DataRace, match=r"LoadData on MTE1 overwrites L0A@0.* while Mmad on M may still be reading it"):
        launch(run, A2, np.zeros((32, 32), np.float16))


@pytest.mark.parametrize(
    ("missing", "then", "first"),
    [("MTE2_V", "Adds on V", "DataCopy on MTE2"), ("V_MTE3", "DataCopy on MTE3", "Adds on V"), ("MTE3_MTE2", "DataCopy on MTE2", "DataCopy on MTE3")],
)
def test_a_loop_without_one_of_its_flags(missing: str, then: str, first: str) -> None:
    """The message names the last use in program order, and the flag that is missing; unchecked, the loop runs."""

    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        for turn in range(3):
            if turn and missing != "MTE3_MTE2":
                both(core, "MTE3_MTE2")
            core.DataCopy(a, x)
            if missing != "MTE2_V":
                both(core, "MTE2_V")
            core.Adds(a, a, 1.0)
            if missing != "V_MTE3":
                both(core, "V_MTE3")
            core.DataCopy(y, a)

    races(rf'^{then} .*UB@0\[0:256\] while {first} may still be (reading|writing) it; add SetFlag\("{missing}", id\)', body)
    x, y = np.arange(N, dtype=np.float32), np.zeros(N, np.float32)
    launch(kernel(body), A2, x, y, unit="AIV", check=False)
    assert (y != x + 1).any()


# -- nothing written yet ----------------------------------------------------------------------------------


def test_read_before_write() -> None:
    races(r"Adds on V reads UB@0\[0:256\], where not everything was written before", lambda core, x, y, a, b, c: core.Adds(b, a, 1.0), ReadBeforeWrite)


def test_read_of_what_is_only_partly_written() -> None:
    def program(stop: int) -> Callable:
        def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
            core.Duplicate(a[:128], 1.0)
            core.Duplicate(a[128:stop], 1.0)
            core.Adds(b, a, 1.0)

        return body

    ran(program(256))
    races("not everything", program(248), ReadBeforeWrite)


def test_the_first_mmad_has_to_begin_anew() -> None:
    def run(core: object, x: object) -> None:
        l1, a = core.LocalTensor("L1", (16, 16), "float16"), core.LocalTensor("L0A", (16, 16), "float16")
        b, c = core.LocalTensor("L0B", (16, 16), "float16"), core.LocalTensor("L0C", (16, 16), "float32")
        core.DataCopy(l1, x)
        core.PipeBarrier()
        core.LoadData(a, l1)
        core.LoadData(b, l1)
        core.PipeBarrier()
        core.Mmad(c, a, b, init=False)

    with pytest.raises(ReadBeforeWrite, match="Mmad on M reads L0C@0.*Mmad with init=True"):
        launch(run, A2, np.zeros((16, 16), np.float16))


# -- no false alarms ----------------------------------------------------------------------------------------


def test_order_passes_on_from_pipe_to_pipe() -> None:
    """MTE2 never waits for V itself, but for MTE3, which has waited for V."""

    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        for _ in range(3):
            core.DataCopy(a, x)
            both(core, "MTE2_V")
            core.Adds(b, a, 1.0)
            both(core, "V_MTE3")
            core.DataCopy(y, b)
            both(core, "MTE3_MTE2")

    ran(body)


def test_one_pipe_orders_itself() -> None:
    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        core.Duplicate(a, 1.0)
        core.Adds(a, a, 1.0)
        core.Mul(a, a, a)

    ran(body)


def test_cores_may_read_the_same_and_write_side_by_side() -> None:
    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        half = core.GetBlockIdx() * 128
        core.DataCopy(a, x)
        both(core, "MTE2_MTE3")
        core.DataCopy(y[half : half + 128], a[:128])

    ran(body, blocks=2)


def test_two_ways_to_the_same_knowledge() -> None:
    """A flag set by S, after S has waited for MTE2, is enough for V."""

    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        core.DataCopy(a, x)
        both(core, "MTE2_S")
        both(core, "S_V")
        core.Adds(b, a, 1.0)

    ran(body)


def test_what_the_scalar_unit_issues_comes_after_what_it_has_waited_for() -> None:

    def body(core: object, x: object, y: object, a: object, b: object, c: object) -> None:
        core.DataCopy(a, x)
        both(core, "MTE2_S")
        core.Adds(b, a, 1.0)

    ran(body)


def test_random_programs_are_clean_with_all_flags_and_not_without_one(random: np.random.Generator) -> None:
    """A chain of steps on one table, each ordered after the last; leave one flag out, and it is found."""
    for _ in range(20):
        steps = [str(random.choice(["MTE2", "V", "MTE3"]))]
        while len(steps) < 12:
            steps.append(str(random.choice([pipe for pipe in ("MTE2", "V", "MTE3") if pipe != steps[-1]])))
        missing = int(random.integers(1, 12))

        def body(core: object, x: object, y: object, a: object, *_: object, steps: list = steps, without: int = -1) -> None:
            core.Duplicate(a, 0.0)
            core.PipeBarrier()
            for number, pipe in enumerate(steps):
                if number not in (0, without):
                    both(core, f"{steps[number - 1]}_{pipe}", number % 8)
                if pipe == "MTE2":
                    core.DataCopy(a, x)
                elif pipe == "V":
                    core.Adds(a, a, 1.0)
                else:
                    core.DataCopy(y, a)

        ran(body)
        with pytest.raises((DataRace, FlagError)):
            ran(partial(body, without=missing))
