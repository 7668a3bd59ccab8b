"""The profiler: ``torch_npu.profiler`` on emulated time. It selects steps of a program and draws what the ledger recorded.

    from course_lib.npu import profiler             # where real hardware has: from torch_npu import profiler

    with profiler.profile(
        schedule=profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=profiler.tensorboard_trace_handler("runs/trace"),   # open it at ui.perfetto.dev
        record_shapes=True, profile_memory=True, with_flops=True,
    ) as prof:
        for batch in batches:
            train(batch), prof.step()
    print(prof.key_averages())

All times here are emulated. A recording starts with the host waiting for its devices, as on a real NPU, so that earlier
work does not run on its time. A warm-up changes nothing: an emulated chip is never cold.

**torch.profiler.profile**, PyTorch's own, also runs, with ``activities=[CPU, PrivateUse1]`` too. It measures **real
time of this machine's host**: what Python and the CPU kernels that compute the numbers took. It shows

* each operator by its aten name, then ``PythonSubclass`` (the emulation), then the CPU kernel, often of the same
  name: so calls and ``with_flops`` of an operator count twice where it reaches the emulation under its own name;
* ``record_function`` ranges, shapes, Python stacks and modules, as for any program;
* memory as CPU memory, for that is where the numbers lie; ``export_memory_timeline(device="npu:0")`` is empty.

It cannot show device time, streams or device memory (its "NPU" columns stay away): they come from an activity
profiler, device stubs and an allocator, which only C++ can register. Hence PrivateUse1 without CPU is an empty trace,
and ``torch.autograd.profiler.profile(use_device="npu", use_kineto=False)`` warns at every operator.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Self

from torch.autograd.profiler import record_function
from torch.profiler import ProfilerAction

from course_lib.npu import real, runtime, trace
from course_lib.npu.ledger import Ledger
from course_lib.npu.streams import _index

__all__ = [
    "AiCMetrics", "ExportType", "ProfilerAction", "ProfilerActivity", "ProfilerLevel", "_ExperimentalConfig",
    "profile", "schedule", "supported_activities", "tensorboard_trace_handler",
]  # fmt: skip
RECORDING = (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)


ProfilerActivity = Enum("ProfilerActivity", "CPU NPU")  # the host's launches and ranges; the devices' streams and counters


def supported_activities() -> set[ProfilerActivity]:
    return set(ProfilerActivity)


def _activities(given: Iterable | None) -> set[ProfilerActivity]:
    """Ours or PyTorch's own; nothing given means everything."""
    wanted = {getattr(a, "name", a) for a in given or ProfilerActivity}
    if not wanted <= {"CPU", "NPU", "PrivateUse1"}:
        raise ValueError(f"profile(activities={given!r}): expected some of ProfilerActivity.CPU, ProfilerActivity.NPU")
    return {ProfilerActivity.CPU if name == "CPU" else ProfilerActivity.NPU for name in wanted}


ProfilerLevel = Enum("ProfilerLevel", "Level_none Level0 Level1 Level2")
ExportType = Enum("ExportType", "Text Db")
AiCMetrics = Enum("AiCMetrics", "AiCoreNone PipeUtilization ArithmeticUtilization Memory MemoryL0 MemoryUB ResourceConflictRatio L2Cache MemoryAccess")
_MISSING = {  # option → why it means nothing here
    "l2_cache": "operators are priced without an L2 cache",
    **dict.fromkeys(("msprof_tx", "mstx", "mstx_domain_include", "mstx_domain_exclude"), "there is no msprof; name a range with torch.profiler.record_function"),
    **dict.fromkeys(("record_op_args", "op_attr"), "there are no compiled operators to tune"),
    **dict.fromkeys(("gc_detect_threshold", "host_sys"), "it observes the real host, and time here is computed, never measured"),
    **dict.fromkeys(("sys_io", "sys_interconnection"), "there is no such hardware to sample"),
}


@dataclass(frozen=True)
class _ExperimentalConfig:
    """torch_npu's further options. From Level1 on, ``aic_metrics`` adds figures to each operator in the timeline:
    PipeUtilization (share of its time for which each part of the chip worked), ArithmeticUtilization (FLOP/s), Memory
    (bytes/s). What an emulation cannot know raises NotImplementedError and says why; ``data_simplification`` has no effect.
    """

    profiler_level: Any = ProfilerLevel.Level0
    aic_metrics: Any = AiCMetrics.PipeUtilization
    l2_cache: bool = False
    msprof_tx: bool = False
    mstx: bool = False
    data_simplification: bool = True
    record_op_args: bool = False
    op_attr: bool = False
    gc_detect_threshold: float | None = None
    export_type: Any = ExportType.Text
    host_sys: Any = None
    mstx_domain_include: Any = None
    mstx_domain_exclude: Any = None
    sys_io: bool = False
    sys_interconnection: bool = False

    def __post_init__(self) -> None:
        for name, reason in _MISSING.items():
            value = getattr(self, name)
            if value is not None and value is not False and value != []:
                raise NotImplementedError(f"_ExperimentalConfig({name}={value!r}): {reason}")
        kinds = self.export_type if isinstance(self.export_type, (list, tuple)) else [self.export_type]
        for value, kind in ((self.profiler_level, ProfilerLevel), (self.aic_metrics, AiCMetrics), *((k, ExportType) for k in kinds)):
            if not isinstance(value, kind):
                raise TypeError(f"_ExperimentalConfig: {value!r} is no {kind.__name__}; expected one of {', '.join(kind.__members__)}")
        if ExportType.Db in kinds:
            raise NotImplementedError("_ExperimentalConfig(export_type=ExportType.Db): timelines are JSON, which Perfetto opens; use ExportType.Text")
        if self.aic_metrics.name not in trace.METRICS:
            raise NotImplementedError(f"_ExperimentalConfig(aic_metrics=AiCMetrics.{self.aic_metrics.name}): operators are priced by rates of whole units, without the inside of a core")

    @property
    def metrics(self) -> str:
        """A key of ``trace.METRICS``."""
        return self.aic_metrics.name if self.profiler_level in (ProfilerLevel.Level1, ProfilerLevel.Level2) else "AiCoreNone"


class schedule:
    """Which steps to record: after ``skip_first`` steps, cycles of ``wait``, ``warmup`` and ``active`` steps; ``repeat``
    cycles (0: without end). A nonzero ``skip_first_wait`` leaves out the first cycle's wait.

    As in torch.profiler, whose arguments have names only; by position the order is torch_npu's.
    """

    def __init__(self, wait: int, active: int, warmup: int = 0, repeat: int = 0, skip_first: int = 0, skip_first_wait: int = 0) -> None:
        for name, value, least in (("wait", wait, 0), ("active", active, 1), ("warmup", warmup, 0), ("repeat", repeat, 0), ("skip_first", skip_first, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"schedule({name}={value!r}): expected a whole number of steps from {least} on")
        self.rest, self.warm, self.cycle = wait, wait + warmup, wait + warmup + active
        self.repeat, self.skip, self.lead = repeat, skip_first, wait if skip_first_wait else 0

    def __call__(self, step: int) -> ProfilerAction:
        """What to do in step ``step``, counted from 0."""
        if step < 0:
            raise ValueError(f"step {step}: steps are counted from 0")
        cycle, place = divmod(step - self.skip + self.lead, self.cycle)
        if step < self.skip or (self.repeat and cycle >= self.repeat) or place < self.rest:
            return ProfilerAction.NONE
        if place < self.warm:
            return ProfilerAction.WARMUP
        return ProfilerAction.RECORD if place < self.cycle - 1 else ProfilerAction.RECORD_AND_SAVE


_watching: list["Spans"] = []
_plain = record_function.__enter__, record_function.__exit__


class Spans:
    """What ``record_function`` names, in the host's emulated time. Watches only between ``open`` and ``close``."""

    def open(self) -> None:
        self.done: list[trace.Span] = []
        self.running: list[tuple[str, int]] = []
        _watching.append(self)
        record_function.__enter__, record_function.__exit__ = _enter, _exit

    def close(self) -> None:
        while self.running:
            self.end()
        _watching.remove(self)
        if not _watching:
            record_function.__enter__, record_function.__exit__ = _plain

    def begin(self, name: str) -> None:
        self.running.append((name, runtime.host.now))

    def end(self) -> None:
        if self.running:  # else it began before the recording
            self.done.append(trace.Span(*self.running.pop(), runtime.host.now))


def _enter(self: record_function) -> record_function:
    for spans in _watching:
        spans.begin(self.name)
    return _plain[0](self)


def _exit(self: record_function, *exc: Any) -> None:
    for spans in _watching:
        spans.end()
    return _plain[1](self, *exc)


class profile:
    """Records the steps that ``schedule`` chooses (all, without one) and calls ``on_trace_ready(self)`` after each cycle.

    ``activities``: host, devices or both in the timeline. ``record_shapes``, ``with_flops``, ``with_modules``: what the
    timeline says of each operator. ``profile_memory``: counters of allocated bytes. ``with_stack``: where in the program
    each operator was launched. Everything read or exported belongs to the last cycle.
    """

    def __init__(
        self, *, activities: Iterable | None = None, schedule: Callable[[int], ProfilerAction] | None = None,
        on_trace_ready: Callable[["profile"], Any] | None = None, record_shapes: bool = False, profile_memory: bool = False,
        with_stack: bool = False, with_flops: bool = False, with_modules: bool = False,
        experimental_config: _ExperimentalConfig | None = None, execution_trace_observer: None = None,
        custom_trace_id_callback: Callable[[], str] | None = None, use_cuda: None = None,
    ) -> None:  # fmt: skip
        real.refuse("course_lib.npu.profiler")
        for name, value in (("schedule", schedule), ("on_trace_ready", on_trace_ready), ("custom_trace_id_callback", custom_trace_id_callback)):
            if value is not None and not callable(value):
                raise TypeError(f"profile({name}={value!r}): expected a function")
        if not isinstance(experimental_config, (_ExperimentalConfig, type(None))):
            raise TypeError(f"profile(experimental_config={experimental_config!r}): expected profiler._ExperimentalConfig(…)")
        if execution_trace_observer is not None:
            raise NotImplementedError("profile(execution_trace_observer=…): PyTorch's observer of real execution; give it to torch.profiler.profile")
        if use_cuda is not None:
            warnings.warn("profile(use_cuda=…) has no effect: the device is an npu", stacklevel=2)
        wanted = _activities(activities)
        self._show = trace.Show(
            host=ProfilerActivity.CPU in wanted, device=ProfilerActivity.NPU in wanted, shapes=record_shapes, flops=with_flops,
            modules=with_modules, memory=profile_memory, metrics=(experimental_config or _ExperimentalConfig()).metrics,
        )  # fmt: skip
        self.schedule, self.on_trace_ready, self.with_stack = schedule, on_trace_ready, with_stack
        self.trace_id, self._metadata = custom_trace_id_callback, {}
        self.step_num, self.current_action = 0, self._action(0)
        self._spans, self._ledger = Spans(), None
        self._running = self._recording = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        if self._running:
            raise RuntimeError("profiler: start() while it runs; stop() it first")
        self._running = True
        self._go_on(self.current_action)

    def stop(self) -> None:
        """End the recording, if there is one, and hand it to ``on_trace_ready``."""
        if not self._running:
            raise RuntimeError("profiler: stop() without start()")
        self._running = False
        self._go_on(None)

    def step(self) -> None:
        """Say that the next step of the program begins."""
        if not self._running:
            raise RuntimeError("profiler: step() outside of start() and stop()")
        previous, action = self.current_action, self._action(self.step_num + 1)
        self.step_num, self.current_action = self.step_num + 1, action
        if self._recording and self.schedule:
            self._spans.end()
        self._go_on(action, previous)

    def _action(self, step: int) -> ProfilerAction:
        action = self.schedule(step) if self.schedule else ProfilerAction.RECORD
        if action not in (ProfilerAction.NONE, ProfilerAction.WARMUP, *RECORDING):
            raise ValueError(f"profile: the schedule gave {action!r} for step {step}; expected a ProfilerAction")
        return action

    def _go_on(self, action: ProfilerAction | None, previous: ProfilerAction | None = None) -> None:
        """From one step's action to the next's; None is the end."""
        ready = action is None or previous is ProfilerAction.RECORD_AND_SAVE
        if self._recording and (ready or action not in RECORDING):
            self._close()
            if not ready:
                warnings.warn(f"Incorrect schedule: RECORD followed by {action.name}; the cycle ends without on_trace_ready", stacklevel=3)
            elif self.on_trace_ready:
                self.on_trace_ready(self)
        if action in RECORDING:
            if not self._recording:
                self._open()
            if self.schedule:
                self._spans.begin(f"ProfilerStep#{self.step_num}")

    def _open(self) -> None:
        if self.trace_id:
            self._metadata["trace_id"] = self.trace_id()
        self._ledger = trace.StackLedger() if self.with_stack else Ledger()
        self._ledger.__enter__()
        self._spans.open()
        self._recording = True

    def _close(self) -> None:
        self._recording = False
        self._spans.close()
        self._ledger.__exit__(None, None, None)

    @property
    def ledger(self) -> Ledger:
        """The ledger of the last cycle, which answers every further question."""
        if self._ledger is None:
            raise RuntimeError("profiler: nothing has been recorded yet; the schedule records nothing before its first active step")
        return self._ledger

    def key_averages(self, group_by_input_shape: bool = False) -> trace.Averages:
        """Sums by operator: emulated device time, FLOPs, bytes, bound. ``print`` it, or ``.table(sort_by=…)``."""
        return trace.averages(self.ledger.records, group_by_input_shape)

    def add_metadata(self, key: str, value: str) -> None:
        """Text for the timeline's ``otherData``."""
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"add_metadata({key!r}, {value!r}): expected two strings")
        self._metadata[key] = value

    def add_metadata_json(self, key: str, value: str) -> None:
        """The same, with a value in JSON."""
        self.add_metadata(key, value)
        self._metadata[key] = json.loads(value)

    def _all(self) -> trace.Recording:
        return trace.Recording(self.ledger, self._spans.done, getattr(self.ledger, "stacks", ()), self._metadata)

    def export_chrome_trace(self, path: str) -> None:
        """Write the timeline, compressed if the name ends in .gz; ui.perfetto.dev and chrome://tracing open it."""
        trace.write_json(trace.chrome_trace(self._all(), self._show), path)

    def export_memory_timeline(self, path: str, device: str | None = None) -> None:
        """Write allocated bytes by category after each change, as JSON (.json, .json.gz); times in microseconds."""
        if not self._show.memory:
            raise ValueError("export_memory_timeline() needs profile(profile_memory=True)")
        if not str(path).endswith((".json", ".json.gz")) or str(path).endswith(".raw.json.gz"):
            raise ValueError(f"export_memory_timeline({path!r}): expected a name that ends in .json or .json.gz; course_lib.show.memory draws the picture")
        trace.write_json(trace.memory_timeline(self.ledger, _index(device)), path)

    def export_stacks(self, path: str, metric: str = "self_cpu_time_total") -> None:
        """Write lines for a flame graph, in picoseconds: of launching ("self_cpu_time_total") or running ("self_npu_time_total")."""
        if not self.with_stack:
            raise ValueError("export_stacks() needs profile(with_stack=True)")
        if metric not in ("self_cpu_time_total", "self_npu_time_total"):
            raise ValueError(f"export_stacks(metric={metric!r}): expected 'self_cpu_time_total' or 'self_npu_time_total'")
        Path(path).write_text(trace.collapsed_stacks(self._all(), host=metric == "self_cpu_time_total"), encoding="utf-8")


def tensorboard_trace_handler(dir_name: str | None = None, worker_name: str | None = None, analyse_flag: bool = True, async_mode: bool = False) -> Callable[[profile], None]:
    """For ``on_trace_ready``: writes DIR/WORKER.stepN.pt.trace.json, N being the step that comes next.

    The worker is called after its rank; no clock, host or process number gets into the name, so that a second run writes
    the same files. ``analyse_flag=False`` would leave the analysis for later: there is none. ``async_mode`` changes nothing.
    """
    if not analyse_flag:
        raise NotImplementedError("tensorboard_trace_handler(analyse_flag=False): there are no raw samples to be analysed later")
    folder, worker = Path(dir_name or "."), worker_name or f"rank{os.environ.get('RANK', '0')}"

    def write(prof: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        prof.export_chrome_trace(str(folder / f"{worker}.step{prof.step_num}.pt.trace.json"))

    return write
