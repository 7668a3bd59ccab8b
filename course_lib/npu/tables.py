"""Ledger records as tables. Sums are over integers, so a table is the same on every machine."""

from collections import Counter, defaultdict

import pandas

from course_lib.npu.ledger import PHASES, Record


def group_of(record: Record, by: str, depth: int | None) -> str:
    """The row that a record belongs to."""
    if by == "module":
        names = record.module.split(".")
        return ".".join(names[:depth]) or "(outside)"
    return record.cost.bound if by == "bound" else getattr(record, by)


def table(records: list[Record], by: str, depth: int | None) -> pandas.DataFrame:
    """One row a group; phases in the order of a step, everything else by time, longest first."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[group_of(record, by, depth)].append(record)
    busy = sum(r.cost.ps for r in records)
    rows = {name: _row(members, busy) for name, members in groups.items()}
    frame = pandas.DataFrame.from_dict(rows, orient="index", columns=["calls", "cube_flops", "vector_flops", "bytes", "time_us", "share", "intensity", "bound"])
    frame.index.name = by
    if by == "phase":
        order = sorted(rows, key=lambda name: (PHASES.index(name) if name in PHASES else len(PHASES), name))
        return frame.loc[order]
    return frame.sort_values("time_us", ascending=False, kind="stable")


def _row(records: list[Record], busy: int) -> list:
    costs = [r.cost for r in records]
    cube, vector = sum(c.cube_flops for c in costs), sum(c.vector_flops for c in costs)
    moved, ps = sum(c.bytes for c in costs), sum(c.ps for c in costs)
    bounds: Counter = Counter()
    for c in costs:
        bounds[c.bound] += c.ps
    intensity = (cube + vector) / moved if moved else 0.0
    return [len(costs), cube, vector, moved, ps / 10**6, ps / busy if busy else 0.0, intensity, min(bounds, key=lambda b: (-bounds[b], b))]
