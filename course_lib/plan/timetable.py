"""A pipeline's timetable: when each rank does what, from a schedule's table and the time that each action takes.

The tables are PyTorch's own (`course_lib.parallel.tables.table`). A rank does its actions in the table's order, each as
soon as what it needs is there: the activations of the stage before, the gradients of the stage after.

    >>> one_by_one = [[("F", 0, 0), ("B", 0, 0)], [("F", 1, 0), ("B", 1, 0)]]
    >>> when = replay(one_by_one, forward=1, backward=2)
    >>> when.makespan, when.idle, when.bubble
    (6, (3, 3), (0.5, 0.5))

Times are in whatever unit the durations have; integers (picoseconds) stay integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Time = int | float
Action = tuple  # (kind, stage, micro-batch), or a tuple of such
HALVES = {"F": "F", "B": "B", "I": "B", "W": "W"}  # what is there when an action is done: I serves as B does


class Bar(NamedTuple):
    """One action: what, when. ``kind`` F, B, I or W, or SEND_F, SEND_B for a message (``stage`` sends it)."""

    kind: str
    stage: int
    microbatch: int
    start: Time
    end: Time


@dataclass(frozen=True)
class Timetable:
    """What each rank does when. ``messages`` are under the rank that receives them, and overlap ``ranks``' computing."""

    ranks: tuple[tuple[Bar, ...], ...]
    messages: tuple[tuple[Bar, ...], ...]
    busy: tuple[Time, ...]  # computing, by rank
    vpp: int  # stages on each rank

    @property
    def makespan(self) -> Time:
        """From the start of the step to the end of its last action."""
        return max(bars[-1].end for bars in self.ranks)

    @property
    def idle(self) -> tuple[Time, ...]:
        """Time in which each rank does not compute."""
        return tuple(self.makespan - busy for busy in self.busy)

    @property
    def bubble(self) -> tuple[float, ...]:
        """`idle` of each rank as a fraction of the total time."""
        return tuple(idle / self.makespan for idle in self.idle)

    @property
    def live(self) -> tuple[int, ...]:
        """The most micro-batches whose activations each rank holds at once, in one of its stages each.

        Held from a forward to the end of the backward, its weights' half included. Divided by ``vpp``: in units of
        a micro-batch's activations in all stages of a rank.
        """
        return tuple(_most_live(bars) for bars in self.ranks)


def replay(
    table: Sequence[Sequence[Action]],
    forward: Time | Sequence[Time] = 1,
    backward: Time | Sequence[Time] = 2,
    weight: Time | Sequence[Time] | None = None,
    inputs: Time | Sequence[Time] | None = None,
    transfer: Time | Sequence[Time] = 0,
    overlapped: Time | None = None,
) -> Timetable:
    """The timetable of ``table``, a row of actions for each rank.

    Durations are of one micro-batch in one stage, one for all or one for each stage: ``forward``, whole ``backward``, and
    its halves ``weight`` (default: half) and ``inputs`` (default: the rest). ``transfer`` is of a message from a stage to
    the next, or back. In a table without messages they set off when their sender is done; in one with messages when both
    sides have come to them. ``overlapped`` is how long a forward beside a backward takes (default: one after the other).

    ValueError where the table stops, for a rank waits for what never comes.
    """
    stages = 1 + max(one[1] for row in table for action in row for one in _parts(action))
    W = _each(weight, stages) if weight is not None else [whole / 2 for whole in _each(backward, stages)]
    B = _each(backward, stages)
    halves = [b - w for b, w in zip(B, W, strict=True)] if inputs is None else _each(inputs, stages)
    times = {"F": _each(forward, stages), "B": B, "I": halves, "W": W}
    run = _Run(table, stages, times, _each(transfer, stages, gaps=True), overlapped)
    while sum(run.advance(rank) for rank in range(len(table))):
        pass
    if stuck := run.stuck():
        raise ValueError(f"the table stops: {stuck} waits for what no rank does before it")
    return Timetable(
        *(tuple(tuple(row) for row in rows) for rows in (run.bars, run.messages)), tuple(run.busy), stages // len(table)
    )


class _Run:
    """The state of a replay: how far each rank is, and what is done."""

    def __init__(
        self, table: Sequence[Sequence[Action]], stages: int, times: dict[str, list[Time]], transfer: list[Time],
        overlapped: Time | None,
    ) -> None:  # fmt: skip
        self.table, self.last, self.times, self.transfer = table, stages - 1, times, transfer
        self.overlapped = overlapped
        ranks = range(len(table))
        flat = [(rank, one) for rank in ranks for action in table[rank] for one in _parts(action)]
        self.rank_of = {stage: rank for rank, (_, stage, _) in flat}
        self.explicit = any(kind.startswith("SEND") for _, (kind, _, _) in flat)
        self.place, self.now, self.busy = [0 for _ in ranks], [0 for _ in ranks], [0 for _ in ranks]
        self.bars: list[list[Bar]] = [[] for _ in ranks]
        self.messages: list[list[Bar]] = [[] for _ in ranks]
        self.done: dict[Action, Time] = {}  # end of (F, B or W, stage, micro-batch)
        self.posted: dict[tuple, Time] = {}  # when a side came to a message
        self.arrived: dict[tuple, Time] = {}  # end of a message
        self.way: dict[tuple[int, int], Time] = {}  # from rank to rank: end of the last message

    def advance(self, rank: int) -> bool:
        """Do what a rank can do now; whether that was anything."""
        before = self.place[rank]
        while self.place[rank] < len(self.table[rank]) and self.do(rank, self.table[rank][self.place[rank]]):
            self.place[rank] += 1
        return self.place[rank] > before

    def stuck(self) -> str:
        """The first rank that is not done and its action, or nothing."""
        left = [(r, row[at]) for r, (row, at) in enumerate(zip(self.table, self.place, strict=True)) if at < len(row)]
        return f"rank {left[0][0]} at {left[0][1]}" if left else ""

    def do(self, rank: int, action: Action) -> bool:
        """Carry out an action; False where it has to wait for another rank."""
        parts = _parts(action)
        if "_" in parts[0][0]:
            return self.post(rank, parts)
        needs = [self.ready(rank, part) for part in parts]
        if None in needs:
            return False
        if len(parts) > 1 and self.overlapped is not None:
            start = max(self.now[rank], *needs)
            self.work(rank, parts, start, start + self.overlapped)
        else:
            for part, need in zip(parts, needs, strict=True):
                start = max(self.now[rank], need)
                self.work(rank, [part], start, start + self.times[part[0]][part[1]])
        for kind, stage, number in parts:  # of two that may overlap the results leave together
            self.done[HALVES[kind], stage, number] = self.now[rank]
        return True

    def work(self, rank: int, parts: Sequence[Action], start: Time, end: Time) -> None:
        """Note that a rank computes."""
        self.bars[rank] += [Bar(*part, start, end) for part in parts]
        self.busy[rank] += end - start
        self.now[rank] = end

    def ready(self, rank: int, action: Action) -> Time | None:
        """When what an action needs is there; None while that is not known."""
        kind, stage, number = action
        if kind == "W":
            return self.done.get(("B", stage, number))
        if stage == (0 if kind == "F" else self.last):
            return 0 if kind == "F" else self.done.get(("F", stage, number))
        kind, source = ("F", stage - 1) if kind == "F" else ("B", stage + 1)
        edge = (kind, min(source, stage), number)
        if self.rank_of[source] == rank:
            return self.done.get((kind, source, number))
        if not self.explicit and (kind, source, number) in self.done:
            self.deliver(edge, source, rank, self.done[kind, source, number])
        return self.arrived.get(edge)

    def post(self, rank: int, parts: Sequence[Action]) -> bool:
        """A rank comes to messages; to several at once it stays until they have arrived."""
        edges = []
        for kind, stage, number in parts:
            way, kind = kind.split("_")
            out = (way == "SEND") == (kind == "F")  # over the edge behind this stage, else over the one before it
            edge = (kind, stage if out else stage - 1, number)
            self.posted.setdefault((way, edge), self.now[rank])
            both = [self.posted.get((side, edge)) for side in ("SEND", "RECV")]
            if None not in both and edge not in self.arrived:
                source, to = (edge[1], edge[1] + 1) if kind == "F" else (edge[1] + 1, edge[1])
                self.deliver(edge, source, self.rank_of[to], max(both))
            edges.append(edge)
        if len(parts) == 1:
            return True
        ends = [self.arrived.get(edge) for edge in edges]
        if None in ends:
            return False
        self.now[rank] = max(self.now[rank], *ends)
        return True

    def deliver(self, edge: tuple, source: int, rank: int, start: Time) -> None:
        """A message starts when the one before it on its way is through."""
        if edge not in self.arrived:
            kind, boundary, number = edge
            way = self.rank_of[source], rank
            start = max(start, self.way.get(way, 0))
            self.way[way] = self.arrived[edge] = start + self.transfer[boundary]
            self.messages[rank].append(Bar(f"SEND_{kind}", source, number, start, self.arrived[edge]))


def _parts(action: Action) -> Sequence[Action]:
    return action if isinstance(action[0], tuple) else (action,)


def _each(value: Time | Sequence[Time], stages: int, gaps: bool = False) -> list[Time]:
    """One value for each stage, or for each of the gaps between them."""
    array = np.asarray(value)
    if array.ndim == 0:
        return [array.item()] * stages
    count = stages - 1 if gaps else stages
    if array.shape != (count,):
        raise ValueError(f"expected one duration, or {count} for {stages} stages, found shape {array.shape}")
    return array.tolist()


def _most_live(bars: Sequence[Bar]) -> int:
    now = most = 0
    for bar in bars:
        now += (bar.kind == "F") - (bar.kind in ("B", "W"))
        most = max(most, now)
    return most
