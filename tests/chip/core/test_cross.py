"""Flags between cores: modes 0, 1 and 2, counting to 15, who is lacking, and order through GM."""

from collections.abc import Callable

import numpy as np
import pytest

from course_lib.chip.core import DataRace, Deadlock, FlagError, launch

A2 = "ascend-910b2"
N = 256


def put(core: object, out: object, value: float) -> object:
    """A table filled with ``value``, ready to be written out by MTE3."""
    table = core.LocalTensor("UB", N, "float32")
    core.Duplicate(table, value)
    core.SetFlag("V_MTE3", 7)
    core.WaitFlag("V_MTE3", 7)
    core.DataCopy(out, table)
    return table


def neighbours(core: object, between: object, out: object, flag: bool = True) -> None:
    """Mode 0: each core writes its number, all wait for all, each reads its neighbour's."""
    me, count = core.GetBlockIdx(), core.GetBlockNum()
    put(core, between[me * N : (me + 1) * N], float(me))
    if flag:
        core.CrossCoreSetFlag(0, "MTE3", 3)
        core.CrossCoreWaitFlag(3, "MTE2")
    table, other = core.LocalTensor("UB", N, "float32"), (me + 1) % count
    core.DataCopy(table, between[other * N : (other + 1) * N])
    core.SetFlag("MTE2_MTE3")
    core.WaitFlag("MTE2_MTE3")
    core.DataCopy(out[me * N : (me + 1) * N], table)


@pytest.mark.parametrize("cores", [1, 2, 5, 48])
def test_mode_0_among_all_cores_of_a_kind(cores: int) -> None:
    out = np.zeros(cores * N, np.float32)
    launch(neighbours, A2, np.zeros(cores * N, np.float32), out, unit="AIV", blocks=cores)
    np.testing.assert_array_equal(out.reshape(cores, N)[:, 0], (np.arange(cores) + 1) % cores)


def test_without_it_cores_race_through_gm() -> None:
    given = np.zeros(2 * N, np.float32), np.zeros(2 * N, np.float32), False
    with pytest.raises(DataRace, match=r"reads GM0\[.* while DataCopy on AIV[01] MTE3 may still be writing it; add CrossCoreSetFlag on AIV[01] MTE3"):
        launch(neighbours, A2, *given, unit="AIV", blocks=2)


def test_mode_1_between_the_aivs_of_one_ai_core() -> None:
    def kernel(core: object, out: object) -> None:
        if core.unit == "AIC":
            return
        row = 2 * core.GetBlockIdx()
        if core.GetSubBlockIdx() == 0:
            put(core, out[row * N : (row + 1) * N], 5.0)
        core.CrossCoreSetFlag(1, "MTE3", 0)
        core.CrossCoreWaitFlag(0, "MTE2")
        if core.GetSubBlockIdx() == 1:
            table = core.LocalTensor("UB", N, "float32")
            core.DataCopy(table, out[row * N : (row + 1) * N])
            core.SetFlag("MTE2_MTE3")
            core.WaitFlag("MTE2_MTE3")
            core.DataCopy(out[(row + 1) * N : (row + 2) * N], table)

    out = np.zeros(3 * 2 * N, np.float32)
    launch(kernel, A2, out, unit="MIX", blocks=3)
    assert (out == 5).all()


def test_mode_2_there_and_back() -> None:
    """Both AIVs write a half, the AIC multiplies, both AIVs read; the scalar unit of the AIC does the waiting."""

    def kernel(core: object, half: object, out: object) -> None:
        if core.unit == "AIV":
            me = core.GetSubBlockIdx()
            table = core.LocalTensor("UB", (8, 16), "float16")
            core.Duplicate(table, 1.0 + me)
            core.SetFlag("V_MTE3")
            core.WaitFlag("V_MTE3")
            core.DataCopy(half[8 * me : 8 * me + 8], table)
            core.CrossCoreSetFlag(2, "MTE3", 0)
            core.CrossCoreWaitFlag(1)
            return
        l1, a, b = (core.LocalTensor(name, (16, 16), "float16") for name in ("L1", "L0A", "L0B"))
        c = core.LocalTensor("L0C", (16, 16), "float32")
        core.CrossCoreWaitFlag(0)
        core.DataCopy(l1, half)
        core.PipeBarrier("ALL")
        core.LoadData(a, l1)
        core.LoadData(b, l1)
        core.PipeBarrier("ALL")
        core.Mmad(c, a, b)
        core.PipeBarrier("ALL")
        core.Fixpipe(out, c)
        core.CrossCoreSetFlag(2, "FIX", 1)

    out = np.zeros((16, 16), np.float32)
    launch(kernel, A2, np.zeros((16, 16), np.float16), out, unit="MIX")
    x = np.repeat([1.0, 2.0], 8)[:, None] * np.ones(16)
    np.testing.assert_array_equal(out, x @ x)


def fails(error: type, text: str, kernel: Callable, unit: str = "MIX", blocks: int = 1) -> None:
    with pytest.raises(error, match=text):
        launch(kernel, A2, unit=unit, blocks=blocks)


def test_the_16th_set() -> None:
    def program(times: int, waits: int) -> Callable:
        def kernel(core: object) -> None:
            if core.unit == "AIC":
                for _ in range(times):
                    core.CrossCoreSetFlag(2, "FIX", 4)
            else:
                for _ in range(waits):
                    core.CrossCoreWaitFlag(4, "V")

        return kernel

    launch(program(15, 15), A2, unit="MIX")
    text = r"CrossCoreSetFlag\(2, FIX, 4\) on AIC0 FIX may set the flag for the 16th time without a CrossCoreWaitFlag\(4\) on AIV0.0; a core can count to 15"
    fails(FlagError, text, program(16, 0))
    fails(FlagError, text, program(16, 16))  # that the other side was quick enough is luck


def test_many_sets_with_an_answer_each() -> None:
    def kernel(core: object) -> None:
        for _ in range(40):
            if core.unit == "AIC":
                core.CrossCoreSetFlag(2, "FIX", 0)
                core.CrossCoreWaitFlag(1, "FIX")
            else:
                core.CrossCoreWaitFlag(0, "V")
                core.CrossCoreSetFlag(2, "V", 1)

    launch(kernel, A2, unit="MIX", blocks=2)


def test_left_set_at_the_end() -> None:
    def kernel(core: object) -> None:
        if core.unit == "AIC":
            core.CrossCoreSetFlag(2, "FIX", 4)
        elif core.GetSubBlockIdx() == 0:
            core.CrossCoreWaitFlag(4, "V")

    fails(FlagError, r"the cross-core flag 4 is still set at the end: AIC0 has set it 1 times, AIV0.1 has waited for it 0 times", kernel)


def test_who_is_lacking() -> None:
    def kernel(core: object) -> None:
        if core.unit == "AIC":
            core.CrossCoreWaitFlag(2, "MTE2")
        elif core.GetSubBlockIdx() == 1:
            core.CrossCoreSetFlag(2, "V", 2)

    fails(Deadlock, r"AIC0 MTE2 waits in CrossCoreWaitFlag\(2\): to be set once more by AIV0.0", kernel)
    fails(Deadlock, "AIV waits|to be set once more by some core, and none does", lambda core: core.CrossCoreWaitFlag(2), "AIV")


def test_a_core_that_leaves_out_the_barrier_of_all() -> None:
    def kernel(core: object) -> None:
        if core.GetBlockIdx() != 2:
            core.CrossCoreSetFlag(0, "V", 0)
            core.CrossCoreWaitFlag(0, "V")

    fails(Deadlock, r"AIV0 V waits in CrossCoreWaitFlag\(0\): to be set once more by AIV2", kernel, "AIV", 3)


def test_two_pipes_wait_for_one_flag_in_turn() -> None:
    def kernel(core: object) -> None:
        if core.unit == "AIC":
            core.CrossCoreSetFlag(2, "FIX", 0)
            core.CrossCoreSetFlag(2, "FIX", 0)
        else:
            core.CrossCoreWaitFlag(0, "V")
            core.CrossCoreWaitFlag(0, "MTE2")

    launch(kernel, A2, unit="MIX")


def test_what_is_refused() -> None:
    fails(FlagError, "has the modes 0, 1 and 2, not 3", lambda core: core.CrossCoreSetFlag(3, "FIX", 0))
    fails(FlagError, "cross-core flags have the ids 0 to 7, not 8", lambda core: core.CrossCoreWaitFlag(8))
    fails(FlagError, "an AIV of Ascend 910B2 has no pipe 'FIX'", lambda core: core.CrossCoreSetFlag(2, "FIX", 0), "AIV")
    fails(FlagError, r"CrossCoreSetFlag\(2, FIX, 0\) on AIC reaches no core of the other kind; launch with unit MIX", lambda core: core.CrossCoreSetFlag(2, "FIX", 0), "AIC")
