"""A ledger as a timeline in Chrome's trace format, for ui.perfetto.dev: one track for the host's launches,
one for each stream, a counter of allocated memory by category."""

from typing import Any

from course_lib.npu.ledger import Ledger, Record

PS_PER_US = 10**6
HOST = 1000  # process id of the host's track; devices have their own index


def chrome_trace(ledger: Ledger) -> dict[str, Any]:
    """The trace as a dictionary; ``json.dump`` it. Times are microseconds of emulated time since the ledger's opening."""
    began = ledger._began
    events: list[dict] = [{"ph": "M", "pid": HOST, "name": "process_name", "args": {"name": "host"}}]
    for device in sorted({r.device for r in ledger.records}):
        events.append({"ph": "M", "pid": device, "name": "process_name", "args": {"name": f"npu:{device} {ledger._spec.name}"}})
    for number, record in enumerate(ledger.records):
        events += _operator(number, record, began)
    for device in sorted({m.device for m in ledger.memory}):
        for at, held in ledger.memory_over_time(device):
            events.append({"ph": "C", "pid": device, "name": "allocated bytes", "ts": at / PS_PER_US, "args": held})
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"time": "emulated", "chip": ledger._spec.name}}


def _operator(number: int, r: Record, began: int) -> list[dict]:
    """The operator on its stream, its launch on the host, and the arrow between them."""
    start, launched = (r.start - began) / PS_PER_US, (r.launched - began) / PS_PER_US
    about = {"phase": r.phase, "module": r.module, "shapes": str([tuple(s) for s in r.shapes]), "bound": r.cost.bound,
             "cube_flops": r.cost.cube_flops, "vector_flops": r.cost.vector_flops, "bytes": r.cost.bytes}  # fmt: skip
    flow = {"cat": "launch", "name": "launch", "id": number}
    return [
        {"ph": "X", "pid": r.device, "tid": r.stream, "name": r.op, "cat": r.phase, "ts": start, "dur": r.cost.ps / PS_PER_US, "args": about},
        {"ph": "i", "pid": HOST, "tid": 0, "name": r.op, "s": "t", "ts": launched},
        {"ph": "s", "pid": HOST, "tid": 0, "ts": launched, **flow},
        {"ph": "f", "bp": "e", "pid": r.device, "tid": r.stream, "ts": start, **flow},
    ]
