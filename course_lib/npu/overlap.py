"""How much of the communication is hidden behind compute, and how long a rank waits for others: from a ledger's records."""

from collections.abc import Iterable
from typing import NamedTuple

from course_lib.npu.clock import PS_PER_S

Span = tuple[int, int]  # from, to: picoseconds


class Communication(NamedTuple):
    """Seconds of emulated time on one device; what overlaps counts once.

    ``total``: collectives under way. ``exposed``: of these, with nothing computing beside them. ``waiting``: this rank is
    there, the last one is not yet, and nothing computes meanwhile. ``sent`` has the total by kind of collective.
    """

    total: float
    exposed: float
    waiting: float
    sent: dict[str, float]


def communication(records: list, device: int) -> Communication:
    """Sums over a ledger's records, see Ledger.communication."""
    mine = [r for r in records if r.device == device]
    spans = {kind: union(span(r) for r in mine if r.phase == kind) for kind in ("communication", "waiting")}
    compute = union(span(r) for r in mine if r.phase not in spans)
    transfers, waiting = spans["communication"], spans["waiting"]
    kinds = sorted({r.op for r in mine if r.phase == "communication"})
    by_kind = {kind: length(union(span(r) for r in mine if r.op == kind and r.phase == "communication")) / PS_PER_S for kind in kinds}
    alone = length(without(transfers, compute))
    idle = length(without(without(waiting, transfers), compute))
    return Communication(length(transfers) / PS_PER_S, alone / PS_PER_S, idle / PS_PER_S, by_kind)


def span(record: object) -> Span:
    return record.start, record.start + record.cost.ps


def union(spans: Iterable[Span]) -> list[Span]:
    """The same times as spans that do not overlap, in order."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        elif end > start:
            out.append((start, end))
    return out


def without(spans: list[Span], others: list[Span]) -> list[Span]:
    """What of ``spans`` lies in none of ``others``; both as ``union`` gives them."""
    out, i = [], 0
    for start, end in spans:
        while i and others[i - 1][1] > start:
            i -= 1
        while i < len(others) and others[i][1] <= start:
            i += 1
        j = i
        while j < len(others) and others[j][0] < end:
            if others[j][0] > start:
                out.append((start, others[j][0]))
            start = max(start, others[j][1])
            j += 1
        if start < end:
            out.append((start, end))
    return out


def length(spans: list[Span]) -> int:
    """Picoseconds in all."""
    return sum(end - start for start, end in spans)
