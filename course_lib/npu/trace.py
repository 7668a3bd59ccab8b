"""What a ledger recorded, drawn: a timeline for ui.perfetto.dev, memory over time, sums by operator, stacks.

The timeline is in Chrome's trace format. Its times are microseconds of emulated time since the ledger's opening:

* process "host", one track: what the program names with ``record_function``, and below it one slice for each
  launch, as long as a launch takes the host; an arrow leads from it to the operator on the device;
* a process for each device, one track for each stream, with its operators from start to end;
* counters for each device: allocated bytes by category, at the host's time, because the host's allocator hands
  them out; and for how much of each window (about 200 in all) cube, vector, memory and host link were busy.

Every number comes from the ledger's integers, so a program gives the same file, byte for byte, on every machine.
"""

import gzip
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from course_lib.chip.cost import Cost
from course_lib.npu import runtime
from course_lib.npu.clock import PS_PER_S
from course_lib.npu.ledger import Ledger, Record

PS_PER_US = 10**6
HOST = 1000  # process id of the host's track; devices have their own index
WINDOWS = 200  # at most, in a timeline
PARTS = ("cube", "vector", "memory", "host_link")


class Span(NamedTuple):
    """A stretch of the host's emulated time (picoseconds) that the program has given a name."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Show:
    """What a timeline shows besides names, times, phases, bytes and bounds: the switches of ``profile(…)``."""

    host: bool = True
    device: bool = True
    shapes: bool = True
    flops: bool = True
    modules: bool = True
    memory: bool = True
    metrics: str = "AiCoreNone"  # a key of METRICS


@dataclass(frozen=True)
class Recording:
    """A ledger and what was noted beside it: named spans, and the Python stack of each record (or nothing)."""

    ledger: Ledger
    spans: Sequence[Span] = ()
    stacks: Sequence[tuple[str, ...]] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


# -- timeline -----------------------------------------------------------------------------------------


def chrome_trace(recording: Ledger | Recording, show: Show = Show()) -> dict[str, Any]:
    """The timeline as a dictionary for ``write_json``."""
    r = Recording(recording) if isinstance(recording, Ledger) else recording
    events = [*_names(r.ledger, show)]
    if show.host:
        spans = list(reversed(r.spans))  # noted as they ended: inside out
        spans.sort(key=lambda s: (s.begin, -s.end))
        events += [_span(s, r.ledger.began) for s in spans]
    for number, record in enumerate(r.ledger.records):
        events += _operator(number, record, r, show)
    if show.device:
        events += _counters(r.ledger, show)
    about = {"time": "emulated", "chip": r.ledger._spec.name, **r.metadata}
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}


def us(ps: int) -> float:
    """Picoseconds as microseconds that a reader who cuts them to whole nanoseconds, as Perfetto does, cuts rightly."""
    value = ps / PS_PER_US
    return value if int(value * 1000.0) == ps // 1000 else math.nextafter(value, math.inf)


def _names(ledger: Ledger, show: Show) -> Iterator[dict]:
    """What the processes and tracks are called, and their order."""

    def name(pid: int, kind: str, text: str, place: int, tid: int = 0) -> Iterator[dict]:
        yield {"ph": "M", "pid": pid, "tid": tid, "name": f"{kind}_name", "args": {"name": text}}
        yield {"ph": "M", "pid": pid, "tid": tid, "name": f"{kind}_sort_index", "args": {"sort_index": place}}

    if show.host:
        yield from name(HOST, "process", "host", -1)
        yield from name(HOST, "thread", "launches", 0)
    if show.device:
        for device in _devices(ledger):
            yield from name(device, "process", f"npu:{device} {ledger._spec.name}", device)
        for device, stream in sorted({(r.device, r.stream) for r in ledger.records}):
            yield from name(device, "thread", runtime.devices[device].label(stream), stream, stream)


def _devices(ledger: Ledger) -> list[int]:
    return sorted({r.device for r in ledger.records} | {m.device for m in ledger.memory})


def _span(s: Span, began: int) -> dict:
    """In whole nanoseconds, so that what lies within it does not reach out of it where a reader cuts times."""
    begin, end = (ps // 1000 * 1000 for ps in (s.begin - began, s.end - began))
    return {"ph": "X", "pid": HOST, "tid": 0, "name": s.name, "cat": "user_annotation", "ts": us(begin), "dur": us(end - begin)}


def _operator(number: int, r: Record, recording: Recording, show: Show) -> Iterator[dict]:
    """The launch on the host, the operator on its stream, and the arrow between them."""
    began = recording.ledger.began
    launch_ps = round(recording.ledger._spec.require("launch_host") * PS_PER_S)
    host = {"pid": HOST, "tid": 0, "ts": us(r.launched - launch_ps - began)}
    device = {"pid": r.device, "tid": r.stream, "ts": us(r.start - began)}
    arrow = {"cat": "launch", "name": "launch", "id": number}
    stack = {"stack": "; ".join(recording.stacks[number])} if recording.stacks else {}
    if show.host:
        yield {"ph": "X", "name": r.op, "cat": "launch", **host, "dur": us(launch_ps), "args": stack}
    if show.host and show.device:
        yield {"ph": "s", **host, **arrow}
        yield {"ph": "f", "bp": "e", **device, **arrow}
    if show.device:
        yield {"ph": "X", "name": r.op, "cat": r.phase, **device, "dur": us(r.cost.ps), "args": _about(r, show)}


def _about(r: Record, show: Show) -> dict:
    about: dict[str, Any] = {"phase": r.phase, "bound": r.cost.bound, "bytes": r.cost.bytes}
    if show.modules:
        about["module"] = r.module
    if show.shapes:
        about["shapes"] = str([tuple(s) for s in r.shapes])
    if show.flops:
        about |= {"cube_flops": r.cost.cube_flops, "vector_flops": r.cost.vector_flops}
    return about | METRICS[show.metrics](r.cost)


METRICS: dict[str, Callable[[Cost], dict]] = {  # as the AiCMetrics of profiler.py are called
    "AiCoreNone": lambda c: {},
    "PipeUtilization": lambda c: {f"{part}_ratio": getattr(c, f"{part}_ps") / c.ps for part in (*PARTS, "launch")},
    "ArithmeticUtilization": lambda c: {f"{part}_flop_per_s": getattr(c, f"{part}_flops") * PS_PER_S / c.ps for part in ("cube", "vector")},
    "Memory": lambda c: {"memory_bytes_per_s": c.bytes * PS_PER_S / c.ps},
}


# -- counters -----------------------------------------------------------------------------------------


def _counters(ledger: Ledger, show: Show) -> Iterator[dict]:
    for device in _devices(ledger):
        if show.memory:
            yield from _memory(ledger, device)
        records = [r for r in ledger.records if r.device == device]
        for part in PARTS:
            last = None
            for at, share in busy_share(records, part, ledger.began, ledger.elapsed_ps):
                if share != last:
                    yield {"ph": "C", "pid": device, "name": f"{part.replace('_', ' ')} busy, %", "ts": us(at), "args": {"share": 100 * share}}
                last = share


def _memory(ledger: Ledger, device: int) -> Iterator[dict]:
    for at, held in ledger.memory_over_time(device):
        counter = {"ph": "C", "pid": device, "ts": us(at)}
        yield {**counter, "name": "allocated bytes", "args": {"total": sum(held.values())}}
        yield {**counter, "name": "allocated bytes by category", "args": held}


def busy_share(records: Iterable[Record], part: str, began: int, elapsed: int) -> Iterator[tuple[int, float]]:
    """(picoseconds since ``began``, share 0 to 1 of the window that starts there) and a last zero."""
    length = window_ps(elapsed)
    busy = [0] * -(-elapsed // length)
    for start, end in busy_times(records, part):
        for w in range((start - began) // length, (end - 1 - began) // length + 1):
            left = began + w * length
            busy[w] += min(end, left + length) - max(start, left)
    for w, ps in enumerate(busy):
        yield w * length, ps / min(length, elapsed - w * length)
    yield elapsed, 0.0


def busy_times(records: Iterable[Record], part: str) -> list[tuple[int, int]]:
    """When a part of the chip worked: disjoint (start, end) in picoseconds.

    An operator's parts all begin when its launch on the device is over. Streams share one chip, so that what two of
    them do at once counts once.
    """
    begins = ((r.start + r.cost.launch_ps, getattr(r.cost, f"{part}_ps")) for r in records)
    times, reached = [], 0
    for start, end in sorted((begin, begin + ps) for begin, ps in begins):
        if end > max(start, reached):
            times.append((max(start, reached), end))
            reached = end
    return times


def window_ps(elapsed: int) -> int:
    """The shortest of 1, 2, 5, 10, 20, 50, … picoseconds of which at most WINDOWS cover ``elapsed``."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power * WINDOWS >= elapsed:
                return step * power
        power *= 10


# -- memory, stacks, files ----------------------------------------------------------------------------


def memory_timeline(ledger: Ledger, device: int) -> dict[str, Any]:
    """Columns: microseconds, and for each category the bytes that are allocated from then on."""
    history = ledger.memory_over_time(device)
    categories = sorted({name for _, held in history for name in held})
    held = {name: [now.get(name, 0) for _, now in history] for name in categories}
    return {"device": f"npu:{device}", "time": "emulated", "times_us": [us(at) for at, _ in history], "bytes": held}


class StackLedger(Ledger):
    """A ledger that also notes from where in the program each operator was launched."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: list[tuple[str, ...]] = []

    def record(self, *args: Any) -> None:
        super().record(*args)
        self.stacks.append(program_stack())


_NOT_THE_PROGRAM = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<frozen")


def program_stack() -> tuple[str, ...]:
    """The program's own frames, outermost first, as "train.py(12): step": without PyTorch's and the emulation's."""
    frame, found = sys._getframe(1), []
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_NOT_THE_PROGRAM):
            found.append(f"{os.path.basename(code.co_filename)}({frame.f_lineno}): {code.co_name}")
        frame = frame.f_back
    return tuple(reversed(found))


def collapsed_stacks(recording: Recording, host: bool) -> str:
    """Lines "outer;inner;operator picoseconds" for flame graphs: time of launching (host) or of running (device)."""
    launch_ps = round(recording.ledger._spec.require("launch_host") * PS_PER_S)
    sums: Counter = Counter()
    for record, stack in zip(recording.ledger.records, recording.stacks):
        sums[";".join([*stack, record.op])] += launch_ps if host else record.cost.ps
    return "".join(f"{stack} {ps}\n" for stack, ps in sums.items())


def write_json(content: Any, path: str) -> None:
    """Write JSON, compressed where the name ends in .gz; the same content gives the same bytes."""
    text = json.dumps(content, separators=(",", ":")).encode()
    with open(path, "wb") as file:
        file.write(gzip.compress(text, mtime=0) if str(path).endswith(".gz") else text)


# -- averages -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Average:
    """All calls of one operator (on inputs of one shape, if so asked). Times are emulated: exact in ``device_time_ps``."""

    key: str
    count: int
    device_time_ps: int
    cube_flops: int
    vector_flops: int
    bytes: int
    bound: str
    input_shapes: tuple = ()

    @property
    def flops(self) -> int:
        return self.cube_flops + self.vector_flops

    @property
    def device_time_total(self) -> float:
        """Microseconds."""
        return self.device_time_ps / PS_PER_US

    @property
    def device_time(self) -> float:
        """Microseconds a call."""
        return self.device_time_total / self.count

    self_device_time_total = npu_time_total = self_npu_time_total = device_time_total


SORTS = ("device_time_total", "self_device_time_total", "npu_time_total", "self_npu_time_total", "device_time", "count", "flops", "bytes")


class Averages(list):
    """Rows of ``Average``, longest first; ``print`` shows the table."""

    def table(self, sort_by: str | None = "device_time_total", row_limit: int = 100) -> str:
        """Text with emulated device time (µs), FLOPs, bytes of device memory, and what bounds most of the time."""
        if sort_by is not None and sort_by not in SORTS:
            raise ValueError(f"table(sort_by={sort_by!r}): expected one of {', '.join(SORTS)}; the host's own time is not measured here, see torch.profiler")
        rows = sorted(self, key=lambda a: -getattr(a, sort_by)) if sort_by else list(self)
        busy = sum(a.device_time_ps for a in self) or 1
        cells = [["Name", "NPU time, us", "NPU %", "us a call", "Calls", "FLOPs", "Bytes", "Bound", "Input shapes"]]
        cells += [_cells(a, busy) for a in rows[: row_limit if row_limit >= 0 else None]]
        return _text(cells) + f"\nNPU time total: {sum(a.device_time_ps for a in self) / PS_PER_US:,.3f} us (emulated)"

    __str__ = table


def averages(records: Iterable[Record], by_shape: bool = False) -> Averages:
    """Sums by operator; ``by_shape`` keeps inputs of different shapes apart."""
    groups: dict[tuple, list[Cost]] = defaultdict(list)
    for r in records:
        groups[r.op, r.shapes if by_shape else ()].append(r.cost)
    rows = (_average(op, shapes, costs) for (op, shapes), costs in groups.items())
    return Averages(sorted(rows, key=lambda a: -a.device_time_ps))


def _average(op: str, shapes: tuple, costs: list[Cost]) -> Average:
    bounds: Counter = Counter()
    for c in costs:
        bounds[c.bound] += c.ps
    total = [sum(getattr(c, name) for c in costs) for name in ("ps", "cube_flops", "vector_flops", "bytes")]
    return Average(op, len(costs), *total, min(bounds, key=lambda b: (-bounds[b], b)), shapes)


def _cells(a: Average, busy: int) -> list[str]:
    shapes = str([tuple(s) for s in a.input_shapes]) if a.input_shapes else ""
    share = f"{100 * a.device_time_ps / busy:.1f} %"
    return [a.key, f"{a.device_time_total:,.3f}", share, f"{a.device_time:,.3f}", f"{a.count:,}", f"{a.flops:,}", f"{a.bytes:,}", a.bound, shapes]


def _text(cells: list[list[str]]) -> str:
    """Columns as wide as they need; names and the last two to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = "<>>>>>><<"
    return "\n".join("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths)).rstrip() for row in cells)
