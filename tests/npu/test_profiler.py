"""The profiler: which steps it records, what it draws, and that both agree with the ledger and with PyTorch's own."""

import gzip
import json
import warnings
from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from torch.profiler import record_function

from course_lib import npu
from course_lib.npu import profiler, runtime, trace
from course_lib.npu.profiler import ProfilerAction, ProfilerActivity, _ExperimentalConfig

CHIP = "ascend-910b2"
EVERYTHING = {"record_shapes": True, "profile_memory": True, "with_flops": True, "with_modules": True}


@pytest.fixture(autouse=True)
def chip():
    npu.use(CHIP)
    torch.manual_seed(0)


class Program:
    """A small training loop with work on two streams and a named range."""

    def __init__(self) -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)).to("npu")
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.x = torch.randn(512, 256, device="npu")
        self.side = torch.npu.Stream()

    def step(self) -> None:
        with record_function("whole step"):
            with torch.npu.stream(self.side):
                self.x @ self.x.T
            self.model(self.x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def profiled(steps: int = 2, **switches) -> profiler.profile:
    program = Program()
    with profiler.profile(**(switches or EVERYTHING)) as prof:
        for _ in range(steps):
            program.step()
            prof.step()
    return prof


def timeline(prof: profiler.profile, tmp_path, name: str = "trace.json") -> list[dict]:
    prof.export_chrome_trace(str(tmp_path / name))
    return json.loads((tmp_path / name).read_text())["traceEvents"]


# -- which steps --------------------------------------------------------------------------------------

PLANS = [(0, 0, 1, 0, 0, 0), (1, 1, 2, 2, 0, 0), (2, 0, 3, 0, 1, 0), (0, 1, 1, 3, 4, 0), (5, 1, 2, 2, 3, 1), (3, 2, 1, 1, 0, 1)]


@pytest.mark.parametrize("plan", PLANS)
def test_schedule_is_that_of_torch(plan) -> None:
    plan = dict(zip(("wait", "warmup", "active", "repeat", "skip_first", "skip_first_wait"), plan))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.profiler.schedule(**plan)
    ours = profiler.schedule(**plan)
    assert [ours(step) for step in range(40)] == [theirs(step) for step in range(40)]


def test_schedule_by_position_is_that_of_torch_npu() -> None:
    assert [profiler.schedule(1, 2)(step).name for step in range(4)] == ["NONE", "RECORD", "RECORD_AND_SAVE", "NONE"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("steps", [0, 3, 12])
def test_on_trace_ready_comes_when_torch_calls_it(plan, steps) -> None:
    plan = dict(zip(("wait", "warmup", "active", "repeat", "skip_first", "skip_first_wait"), plan))

    def calls(module) -> list[int]:
        found: list[int] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with module.profile(schedule=module.schedule(**plan), on_trace_ready=lambda p: found.append(p.step_num)) as prof:
                for _ in range(steps):
                    prof.step()
        return found

    assert calls(profiler) == calls(torch.profiler)


def test_a_cycle_holds_its_active_steps() -> None:
    program, cycles = Program(), []
    program.step()

    def ready(prof) -> None:
        names = [s.name for s in prof._spans.done if s.name.startswith("ProfilerStep")]
        cycles.append((prof.step_num, names, len(prof.ledger.records)))

    with profiler.profile(schedule=profiler.schedule(wait=1, warmup=1, active=2, repeat=2), on_trace_ready=ready) as prof:
        for _ in range(10):
            program.step()
            prof.step()
    with npu.ledger() as one:
        program.step()
    calls = 2 * one.totals().calls
    assert cycles == [(4, ["ProfilerStep#2", "ProfilerStep#3"], calls), (8, ["ProfilerStep#6", "ProfilerStep#7"], calls)]


def test_nothing_listens_outside_of_active_steps() -> None:
    plain = torch.autograd.profiler.record_function.__enter__
    with profiler.profile(schedule=profiler.schedule(wait=1, active=1, repeat=1)) as prof:
        assert not runtime.ledgers
        prof.step()
        assert runtime.ledgers == [prof.ledger]
        prof.step()
        assert not runtime.ledgers
    assert torch.autograd.profiler.record_function.__enter__ is plain


def test_an_error_ends_the_recording() -> None:
    ready = []
    with pytest.raises(ZeroDivisionError), profiler.profile(on_trace_ready=ready.append) as prof:
        torch.ones(4, device="npu") + 1
        1 / 0
    assert ready == [prof]
    assert not runtime.ledgers


def test_a_handler_that_fails_leaves_nothing_open() -> None:
    with pytest.raises(ZeroDivisionError), profiler.profile(schedule=profiler.schedule(wait=0, active=1), on_trace_ready=lambda p: 1 / 0) as prof:
        prof.step()
    assert not runtime.ledgers


def test_two_profilers_at_once() -> None:
    with profiler.profile() as outer:
        with profiler.profile() as inner, record_function("both"):
            torch.ones(4, device="npu") + 1
        with record_function("outer"):
            torch.ones(4, device="npu") + 1
    assert [[s.name for s in p._spans.done] for p in (outer, inner)] == [["both", "outer"], ["both"]]
    assert len(outer.ledger.records) == 2 * len(inner.ledger.records)


# -- the timeline -------------------------------------------------------------------------------------


def test_slices_lie_on_their_tracks_without_overlap(tmp_path) -> None:
    prof = profiled()
    events = timeline(prof, tmp_path)
    slices = [e for e in events if e["ph"] == "X"]
    assert all(e["ts"] >= 0 and e["dur"] >= 0 and e["name"] for e in slices)
    tracks = defaultdict(list)
    for e in slices:
        if e["cat"] != "user_annotation":
            start = int(e["ts"] * 1000.0)  # as Perfetto reads it: whole nanoseconds
            tracks[e["pid"], e["tid"]].append((start, start + int(e["dur"] * 1000.0)))
    assert set(tracks) == {(trace.HOST, 0), (0, 0), (0, 1)}
    for spans in tracks.values():
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert len(slices) == 2 * len(prof.ledger.records) + len(prof._spans.done)


def test_named_ranges_hold_what_was_launched_in_them(tmp_path) -> None:
    with profiler.profile(schedule=profiler.schedule(wait=0, active=3, repeat=1)) as prof:
        for i in range(3):
            with record_function("outer"), record_function("inner"):
                (torch.ones(333 + i, device="npu") + 1).sum().item()  # the host waits, and leaves the grid of launches
            prof.step()
    host = sorted((e for e in timeline(prof, tmp_path) if e["ph"] == "X" and e["pid"] == trace.HOST), key=lambda e: e["ts"])
    open_slices, depths = [], defaultdict(set)
    for e in host:  # as Perfetto reads it
        start, end = int(e["ts"] * 1000.0), int(e["ts"] * 1000.0) + int(e["dur"] * 1000.0)
        while open_slices and open_slices[-1] <= start:
            open_slices.pop()
        assert not open_slices or end <= open_slices[-1]
        depths[e["name"].split("#")[0]].add(len(open_slices))
        open_slices.append(end)
    assert (depths["ProfilerStep"], depths["outer"], depths["inner"], depths["add"]) == ({0}, {1}, {2}, {3})


def test_tracks_have_names(tmp_path) -> None:
    names = {(e["pid"], e["tid"], e["name"]): e["args"].get("name") for e in timeline(profiled(), tmp_path) if e["ph"] == "M"}
    assert names[trace.HOST, 0, "thread_name"] == "launches"
    assert names[0, 0, "process_name"] == "npu:0 ascend-910b2"
    assert (names[0, 0, "thread_name"], names[0, 1, "thread_name"]) == ("stream 0 (default)", "stream 1")


def test_every_arrow_leads_from_a_launch_to_its_operator(tmp_path) -> None:
    events = timeline(profiled(), tmp_path)
    starts, ends = ({e["id"]: e for e in events if e["ph"] == ph} for ph in "sf")
    assert starts.keys() == ends.keys()
    slices = {(e["pid"], e["tid"], e["ts"], e["name"]) for e in events if e["ph"] == "X"}
    operators = {(e["pid"], e["tid"], e["ts"]): e["name"] for e in events if e["ph"] == "X" and e["cat"] not in ("launch", "user_annotation")}
    for number, end in ends.items():
        name = operators[end["pid"], end["tid"], end["ts"]]
        assert (trace.HOST, 0, starts[number]["ts"], name) in slices
        assert starts[number]["ts"] < end["ts"]


def test_memory_counter_reaches_the_peak(tmp_path) -> None:
    prof = profiled()
    counters = defaultdict(list)
    for e in timeline(prof, tmp_path):
        if e["ph"] == "C":
            counters[e["name"]].append(e["args"])
    assert all(value >= 0 for series in counters.values() for args in series for value in args.values())
    assert max(args["total"] for args in counters["allocated bytes"]) == prof.ledger.peak_memory()
    assert max(sum(args.values()) for args in counters["allocated bytes by category"]) == prof.ledger.peak_memory()


def test_busy_share_counts_every_picosecond_once() -> None:
    ledger = profiled().ledger
    for part in trace.PARTS:
        times = trace.busy_times(ledger.records, part)
        window, shares = trace.window_ps(ledger.elapsed_ps), list(trace.busy_share(ledger.records, part, ledger.began, ledger.elapsed_ps))
        lengths = [min(window, ledger.elapsed_ps - at) for at, _ in shares]
        assert len(shares) <= trace.WINDOWS + 1
        assert all(0 <= share <= 1 for _, share in shares)
        assert sum(s * n for (_, s), n in zip(shares, lengths)) == pytest.approx(sum(end - start for start, end in times))
        assert sum(end - start for start, end in times) <= sum(getattr(r.cost, f"{part}_ps") for r in ledger.records)
    with npu.ledger() as alone:  # one stream: nothing to count once
        x = torch.ones(512, 512, device="npu")
        x @ x @ x
    times = trace.busy_times(alone.records, "cube")
    assert sum(end - start for start, end in times) == sum(r.cost.cube_ps for r in alone.records) > 0


def test_switches_choose_what_is_said(tmp_path) -> None:
    def said(**switches) -> set[str]:
        return {key for e in timeline(profiled(1, **switches), tmp_path) if e["ph"] == "X" for key in e.get("args", {})}

    assert said(with_stack=False) == {"phase", "bound", "bytes"}
    assert said(record_shapes=True) == {"phase", "bound", "bytes", "shapes"}
    assert said(with_flops=True) == {"phase", "bound", "bytes", "cube_flops", "vector_flops"}
    assert said(with_modules=True) == {"phase", "bound", "bytes", "module"}
    pipes = _ExperimentalConfig(profiler_level=profiler.ProfilerLevel.Level1)
    assert "cube_ratio" in said(experimental_config=pipes)
    assert "memory_bytes_per_s" in said(experimental_config=_ExperimentalConfig(profiler.ProfilerLevel.Level2, profiler.AiCMetrics.Memory))
    assert "cube_ratio" not in said(experimental_config=_ExperimentalConfig())


def test_activities_choose_the_tracks(tmp_path) -> None:
    def processes(activity) -> set[int]:
        return {e["pid"] for e in timeline(profiled(1, activities=[activity]), tmp_path)}

    assert processes(ProfilerActivity.CPU) == {trace.HOST}
    assert processes(ProfilerActivity.NPU) == {0}
    assert processes(torch.profiler.ProfilerActivity.PrivateUse1) == {0}


def test_two_runs_give_the_same_bytes(tmp_path) -> None:
    for run in ("one", "two"):
        npu.use(CHIP)
        torch.manual_seed(0)
        prof = profiled()
        prof.export_chrome_trace(str(tmp_path / f"{run}.json"))
        prof.export_chrome_trace(str(tmp_path / f"{run}.json.gz"))
        prof.export_memory_timeline(str(tmp_path / f"{run}.memory.json.gz"))
        del prof
    for name in ("{}.json", "{}.json.gz", "{}.memory.json.gz"):
        assert (tmp_path / name.format("one")).read_bytes() == (tmp_path / name.format("two")).read_bytes()
    assert gzip.decompress((tmp_path / "one.json.gz").read_bytes()) == (tmp_path / "one.json").read_bytes()


def test_time_is_read_in_whole_nanoseconds() -> None:
    for ps in [*range(0, 10**5, 7), *range(0, 10**12, 10**7 + 1000)]:
        assert int(trace.us(ps) * 1000.0) == ps // 1000


def test_metadata_and_trace_id(tmp_path) -> None:
    with profiler.profile(custom_trace_id_callback=lambda: "run 7") as prof:
        torch.ones(4, device="npu") + 1
    prof.add_metadata("note", "first")
    prof.add_metadata_json("size", '{"width": 256}')
    prof.export_chrome_trace(str(tmp_path / "t.json"))
    about = json.loads((tmp_path / "t.json").read_text())["otherData"]
    assert about == {"time": "emulated", "chip": CHIP, "trace_id": "run 7", "note": "first", "size": {"width": 256}}


def test_handler_writes_a_file_for_each_cycle(tmp_path) -> None:
    handler = profiler.tensorboard_trace_handler(str(tmp_path / "new" / "folder"))
    with profiler.profile(schedule=profiler.schedule(wait=1, active=1, repeat=2), on_trace_ready=handler) as prof:
        for _ in range(5):
            torch.ones(4, device="npu") + 1
            prof.step()
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [f.name for f in files] == ["rank0.step2.pt.trace.json", "rank0.step4.pt.trace.json"]
    assert all(json.loads(f.read_text())["traceEvents"] for f in files)


def test_the_ledger_draws_the_same(tmp_path) -> None:
    prof = profiled(1)
    prof.ledger.export_chrome_trace(str(tmp_path / "ledger.json"))
    events = json.loads((tmp_path / "ledger.json").read_text())["traceEvents"]
    assert events == [e for e in timeline(prof, tmp_path) if e.get("cat") != "user_annotation"]


# -- sums, memory, stacks -----------------------------------------------------------------------------


@pytest.mark.parametrize("by_shape", [False, True])
def test_averages_add_up_to_the_ledger(by_shape) -> None:
    prof = profiled()
    rows, totals = prof.key_averages(group_by_input_shape=by_shape), prof.ledger.totals()
    for name, whole in (("count", totals.calls), ("cube_flops", totals.cube_flops), ("vector_flops", totals.vector_flops), ("flops", totals.flops), ("bytes", totals.bytes)):
        assert sum(getattr(a, name) for a in rows) == whole
    assert sum(a.device_time_ps for a in rows) == sum(r.cost.ps for r in prof.ledger.records)
    assert bool(rows[0].input_shapes) is by_shape


def test_table_of_averages() -> None:
    rows = profiled(1).key_averages()
    assert list(rows) == sorted(rows, key=lambda a: -a.device_time_total)
    text = str(rows)
    assert all(word in text for word in ("linear", "FLOPs", "Bytes", "Bound", "memory", "(emulated)"))
    assert len(rows.table(row_limit=2).splitlines()) == 4
    assert rows.table(sort_by="count").splitlines()[1].split()[0] == max(rows, key=lambda a: a.count).key
    with pytest.raises(ValueError, match=r"host's own time is not measured here"):
        rows.table(sort_by="self_cpu_time_total")


def test_memory_timeline(tmp_path) -> None:
    prof = profiled(1)
    prof.export_memory_timeline(str(tmp_path / "memory.json"), device="npu:0")
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["times_us"] == sorted(found["times_us"])
    assert max(map(sum, zip(*found["bytes"].values()))) == prof.ledger.peak_memory()
    assert {"weights", "activations"} <= found["bytes"].keys()


def test_stacks_name_the_program(tmp_path) -> None:
    prof = profiled(1, with_stack=True)
    assert len(prof.ledger.stacks) == len(prof.ledger.records)
    assert all(stack[-1].startswith("test_profiler.py(") and stack[-1].endswith(": step") for stack in prof.ledger.stacks)
    sums = {}
    for metric in ("self_cpu_time_total", "self_npu_time_total"):
        prof.export_stacks(str(tmp_path / "stacks"), metric)
        sums[metric] = sum(int(line.rsplit(" ", 1)[1]) for line in (tmp_path / "stacks").read_text().splitlines())
    assert sums["self_npu_time_total"] == sum(r.cost.ps for r in prof.ledger.records)
    assert sums["self_cpu_time_total"] == len(prof.ledger.records) * runtime.devices[0].launch_ps
    assert any("test_profiler.py" in e.get("args", {}).get("stack", "") for e in timeline(prof, tmp_path))


# -- bad arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: profiler.schedule(wait=-1, active=1), ValueError, "wait=-1"),
        (lambda: profiler.schedule(wait=0, active=0), ValueError, "from 1 on"),
        (lambda: profiler.schedule(wait=0, active=1.5), ValueError, "active=1.5"),
        (lambda: profiler.schedule(wait=0, active=1)(-1), ValueError, "from 0"),
        (lambda: profiler.profile(schedule=3), TypeError, "schedule=3"),
        (lambda: profiler.profile(schedule=lambda step: "RECORD"), ValueError, "expected a ProfilerAction"),
        (lambda: profiler.profile(on_trace_ready="file"), TypeError, "on_trace_ready='file'"),
        (lambda: profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]), ValueError, "ProfilerActivity.NPU"),
        (lambda: profiler.profile(experimental_config=object()), TypeError, "_ExperimentalConfig"),
        (lambda: profiler.profile(execution_trace_observer=object()), NotImplementedError, "torch.profiler.profile"),
        (lambda: profiler.profile().step(), RuntimeError, "outside"),
        (lambda: profiler.profile().stop(), RuntimeError, "without start"),
        (lambda: profiler.profile().key_averages(), RuntimeError, "nothing has been recorded"),
        (lambda: profiler.profile().add_metadata("a", 1), TypeError, "two strings"),
        (lambda: profiler.profile().export_memory_timeline("m.json"), ValueError, "profile_memory=True"),
        (lambda: profiler.profile(profile_memory=True).export_memory_timeline("m.html"), ValueError, "course_lib.show.memory"),
        (lambda: profiler.profile().export_stacks("s"), ValueError, "with_stack=True"),
        (lambda: profiler.tensorboard_trace_handler("d", analyse_flag=False), NotImplementedError, "no raw samples"),
        (lambda: _ExperimentalConfig(l2_cache=True), NotImplementedError, "without an L2 cache"),
        (lambda: _ExperimentalConfig(gc_detect_threshold=0.0), NotImplementedError, "computed, never measured"),
        (lambda: _ExperimentalConfig(export_type=profiler.ExportType.Db), NotImplementedError, "Perfetto"),
        (lambda: _ExperimentalConfig(aic_metrics=profiler.AiCMetrics.MemoryUB), NotImplementedError, "inside of a core"),
        (lambda: _ExperimentalConfig(profiler_level=1), TypeError, "no ProfilerLevel"),
    ],
)  # fmt: skip
def test_bad_arguments_say_why(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()


def test_wrong_schedules_warn() -> None:
    plan = [ProfilerAction.RECORD, ProfilerAction.NONE]
    ready = []
    with pytest.warns(UserWarning, match="RECORD followed by NONE"), profiler.profile(schedule=plan.__getitem__, on_trace_ready=ready.append) as prof:
        prof.step()
    assert ready == []
    with pytest.warns(UserWarning, match="use_cuda"):
        profiler.profile(use_cuda=True)


# -- PyTorch's own profiler ---------------------------------------------------------------------------


def test_torch_profiler_shows_the_operators(tmp_path) -> None:
    program = Program()
    program.step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.PrivateUse1]
    with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True, with_flops=True, with_stack=True, with_modules=True) as prof:
        program.step()
    rows = {a.key: a for a in prof.key_averages()}
    assert {"aten::linear", "aten::relu", "aten::mean", "aten::matmul", "whole step", "Optimizer.step#AdamW.step"} <= rows.keys()
    assert [[512, 256], [512, 256], [512]] in [e.input_shapes[:3] for e in prof.events() if e.name == "aten::linear"]
    assert "aten::linear" in prof.key_averages().table(sort_by="self_device_time_total", row_limit=-1)
    prof.export_chrome_trace(str(tmp_path / "host.json"))
    assert any(e.get("name") == "aten::linear" for e in json.loads((tmp_path / "host.json").read_text())["traceEvents"])


def test_torch_profiler_does_not_change_emulated_time() -> None:
    def elapsed(profile: bool) -> int:
        npu.use(CHIP)
        program = Program()
        with npu.ledger() as ledger, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if profile else warnings.catch_warnings():
            program.step()
        return ledger.elapsed_ps

    assert elapsed(profile=True) == elapsed(profile=False)
