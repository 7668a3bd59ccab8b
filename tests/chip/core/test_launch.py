"""Launching: arguments, numbers of cores, chips that lack figures, what a run tells, traces, host time."""

import json
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from course_lib.chip.core import IllegalPath, Misaligned, WrongOperand, empty, launch, tensor
from course_lib.chip.core.kernels.elementwise import add
from course_lib.chip.core.kernels.matmul import k_split, matmul
from course_lib.chip.figures import UnknownFigure

A2 = "ascend-910b2"


def scale(core: object, x: object, factor: float = 2.0) -> None:
    """x = factor · x in place."""
    a = core.LocalTensor("UB", x.shape, x.dtype)
    core.DataCopy(a, x)
    core.PipeBarrier("ALL")
    core.Muls(a, a, factor)
    core.PipeBarrier("ALL")
    core.DataCopy(x, a)


def test_arrays_get_the_results_and_tensors_too() -> None:
    x, y = np.ones(16, np.float32), tensor(np.ones(16), "float16", name="y")
    launch(scale, A2, x, unit="AIV")
    launch(scale, A2, y, 3.0, unit="AIV")
    launch(scale, A2, y, 3.0, unit="AIV")
    assert (x == 2).all()
    assert (y.numpy() == 9).all()


def test_an_array_given_twice_is_one_tensor() -> None:
    x = np.ones(64, np.float32)
    run = launch(partial(add, size=64), A2, x, x, x, unit="AIV")
    assert (x == 2).all()
    assert run.arguments[0] is run.arguments[2]
    assert run.kernel == "add"


def test_only_timing_leaves_values_alone() -> None:
    x = np.ones(16, np.float32)
    run = launch(scale, A2, x, unit="AIV", numerics=False)
    assert (x == 1).all()
    assert run.cycles == launch(scale, A2, x, unit="AIV").cycles == launch(scale, A2, empty(16, dtype="float32"), unit="AIV").cycles
    with pytest.raises(WrongOperand, match="numerics=True needs values"):
        launch(scale, A2, empty(16), unit="AIV", numerics=True)


def test_a_failed_launch_changes_nothing() -> None:
    x = np.ones(16, np.float32)

    def kernel(core: object, x: object) -> None:
        scale(core, x)
        core.SetFlag("V_MTE2")

    with pytest.raises(Exception, match="still set"):
        launch(kernel, A2, x, unit="AIV")
    assert (x == 1).all()


@pytest.mark.parametrize(("unit", "blocks"), [("AIC", 25), ("AIV", 49), ("MIX", 25), ("AIC", 0), ("AIV", 1.5)])
def test_how_many_cores_there_are(unit: str, blocks: object) -> None:
    with pytest.raises(WrongOperand, match=f"Ascend 910B2 has (24|48) cores of kind {unit}; blocks is {blocks}"):
        launch(lambda core: None, A2, unit=unit, blocks=blocks)


def test_other_bad_arguments() -> None:
    with pytest.raises(WrongOperand, match="unit is 'AIX'; use AIC, AIV or MIX"):
        launch(lambda core: None, A2, unit="AIX")
    with pytest.raises(WrongOperand, match="not empty"):
        launch(scale, A2, np.zeros(0, np.float32), unit="AIV")
    with pytest.raises(WrongOperand, match="no values of dtype 'float64'"):
        launch(scale, A2, np.zeros(16), unit="AIV")


@pytest.mark.parametrize("chip", ["ascend-310", "ascend-310p", "ascend-910a", "h100"])
def test_chips_that_lack_figures_say_so(chip: str) -> None:
    with pytest.raises(UnknownFigure, match="is unknown: no source gives it"):
        launch(lambda core: None, chip)


def test_more_cores_than_tiles() -> None:
    a, b, out = np.ones((16, 16), np.float16), np.ones((16, 16), np.float16), np.zeros((16, 16), np.float32)
    launch(matmul, A2, a, b, out, blocks=24)
    assert (out == 16).all()


def test_numbers_of_cores() -> None:
    seen = []
    launch(lambda core: seen.append((core.label, core.GetBlockIdx(), core.GetBlockNum(), core.GetSubBlockIdx())), A2, unit="MIX", blocks=2)
    assert seen == [("AIC0", 0, 2, 0), ("AIV0.0", 0, 2, 0), ("AIV0.1", 0, 2, 1), ("AIC1", 1, 2, 0), ("AIV1.0", 1, 2, 0), ("AIV1.1", 1, 2, 1)]


def test_what_a_run_tells() -> None:
    run = launch(k_split, A2, empty(512, 512), empty(512, 512), empty(512, 512, dtype="float32"))
    assert run.bound == "MTE2" == next(iter(run.busy))
    assert set(run.busy) == {"MTE2", "MTE1", "M", "FIX"}
    assert all(0 < share < 1 for share in run.busy.values())
    assert run.flops == 2 * 512**3
    assert run.hbm_bytes == 512 * 512 * (2 + 2 + 4)
    assert run.hit_rate == pytest.approx(1 - 2 / 6)
    assert [event.start for event in run.events] == sorted(event.start for event in run.events)
    assert str(run).startswith(f"k_split on 1 × Ascend 910B2: {run.cycles:,} cycles")


def test_a_trace(tmp_path: Path) -> None:
    run = launch(add, A2, empty(1 << 16), empty(1 << 16), empty(1 << 16), unit="AIV", blocks=2)
    run.export_chrome_trace(tmp_path / "trace.json")
    records = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    processes = {r["pid"]: r["args"]["name"] for r in records if r["name"] == "process_name"}
    threads = {(r["pid"], r["tid"]): r["args"]["name"] for r in records if r["name"] == "thread_name"}
    spans = [r for r in records if r["ph"] == "X"]
    assert list(processes.values()) == ["AIV0", "AIV1"]
    assert sorted(threads.values()) == sorted(2 * ["S", "V", "MTE2", "MTE3"])
    assert len(spans) == len(run.events)
    for span in spans:
        pipe = threads[span["pid"], span["tid"]]
        assert pipe == ("V" if span["name"] == "Add" else pipe)
        assert span["dur"] == pytest.approx(span["args"]["cycles"] / 1800)
    per_track: dict = {}
    for span in spans:
        per_track.setdefault((span["pid"], span["tid"]), []).append((span["args"]["start cycle"], span["args"]["cycles"]))
    for track in per_track.values():
        track.sort()
        assert all(start + cycles <= after for (start, cycles), (after, _) in pairwise(track))


def test_host_time_is_bounded() -> None:
    """Generous: tests/bench_core.py prints the figures."""
    began = time.perf_counter()
    launch(k_split, A2, empty(2048, 2048), empty(2048, 2048), empty(2048, 2048, dtype="float32"))
    a = np.ones((512, 512), np.float16)
    launch(k_split, A2, a, a.copy(), np.zeros((512, 512), np.float32))
    assert time.perf_counter() - began < 20


def test_messages_name_the_argument_and_the_cure() -> None:
    def kernel(core: object, *_: object) -> None:
        core.LocalTensor("UB", 1001, "float32")

    ones = np.ones(16, np.float32)
    for text, error, arguments, options in (
        (r"GM1: no values of dtype 'float64' .*astype\(np.float32\)", WrongOperand, (ones, np.ones(16)), {}),
        (r"GM0: a tensor in GM is a vector or a matrix .*\(2, 2, 2\)", WrongOperand, (np.ones((2, 2, 2), np.float32),), {}),
        (r"blocks is 0, and has to be 1 to 48", WrongOperand, (ones,), {"blocks": 0}),
        (r"1001 elements of float32 .* round up to 1008", Misaligned, (ones,), {}),
        (r"an AIC of Ascend 910B2 has no UB; .* unit='AIV'", IllegalPath, (ones,), {"unit": "AIC"}),
        (r"argument 0 is a Tensor; give a NumPy array", WrongOperand, (torch.ones(16),), {}),
    ):
        with pytest.raises(error, match=text):
            launch(kernel, "ascend-910b2", *arguments, **{"unit": "AIV"} | options)


def test_operands_that_are_no_tensors_in_a_buffer() -> None:
    def program(body: Callable) -> Callable:
        return lambda core, x: body(core, x, core.LocalTensor("UB" if core.unit == "AIV" else "L0A", (16, 16), "float32"))

    for text, unit, body in (
        ("LoadData goes from L1 to L0A or L0B, not from GM to L0A", "AIC", lambda core, x, a: core.LoadData(a, x)),
        ("Mmad takes its operands from .* found L0A, GM, L0A", "AIC", lambda core, x, a: core.Mmad(a, x, a)),
        ("no path GM→L0A", "AIC", lambda core, x, a: core.Fixpipe(a, x)),
        (r"Exp works on UB, and GM0\[.*lies in GM", "AIV", lambda core, x, a: core.Exp(a, x)),
        (r"Adds takes a number last, not UB@0", "AIV", lambda core, x, a: core.Adds(a, a, a)),
        (r"Add works on tensors, and 1.0 is a number; Adds", "AIV", lambda core, x, a: core.Add(a, a, 1.0)),
    ):
        with pytest.raises((IllegalPath, WrongOperand), match=text):
            launch(program(body), "ascend-910b2", np.ones((16, 16), np.float32), unit=unit)
