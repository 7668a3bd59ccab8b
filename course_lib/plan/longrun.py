"""The long run: weeks of training on a cluster that breaks, simulated from event to event; where its hours go.

A run works in stretches. A failure ends a stretch: work since the last complete checkpoint is lost, the failure is
detected, a host is swapped for a spare, the run restarts. Without a spare it waits for the repair, or if it is
``elastic`` goes on with fewer replicas. Silent corruption is found late, and throws away all checkpoints since it began;
slow hosts hold all others up until they are found. Nothing happens between two events, so months take milliseconds.

    >>> from course_lib.plan.failures import Failures, Recovery
    >>> from course_lib.plan.checkpoints import Checkpoint
    >>> run = Run(16384, 54 * 24, Failures.load("llama-3"), Recovery.load("ub-mesh"), Checkpoint(0.1, 0.001), spares=64)
    >>> history = simulate(run, seed=1)
    >>> history.failures, round(history.goodput, 2)
    (438, 0.9)
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import count

import numpy as np

from course_lib.plan.failures import Failure, Failures
from course_lib.plan.history import CATEGORIES, Event, History, Run, Stragglers

__all__ = ["CATEGORIES", "Event", "History", "Run", "Stragglers", "simulate", "struck", "sweep"]


def simulate(run: Run, seed: int = 0) -> History:
    """One run. The same seed strikes at the same hours, whatever is done about it: failures also come at their full rate
    while the run stands still, waits or has shrunk.
    """
    return _Simulation(run, seed).history()


def sweep(run: Run, intervals: Iterable[float], seeds: Iterable[int]) -> np.ndarray:
    """Goodput (intervals, seeds) of checkpoint intervals; all intervals meet the same failures, so they compare well."""
    seeds = list(seeds)
    return np.array([[simulate(run.every(interval), seed).goodput for seed in seeds] for interval in intervals])


def struck(run: Run, seed: int) -> tuple[tuple[float, Failure | None], ...]:
    """Hours and causes of all failures (None: a slow host turns up): Poisson processes, drawn by inverse transform."""
    return _struck(run.failures, run.stragglers.rate if run.stragglers else 0.0, run.chips, run.hours, seed)


@lru_cache(maxsize=64)
def _struck(
    failures: Failures, slow: float, chips: int, hours: float, seed: int
) -> tuple[tuple[float, Failure | None], ...]:
    causes = (*failures.classes, None)
    bounds = np.cumsum([c.rate for c in failures.classes] + [slow]) * chips  # of the causes, failures per hour
    if bounds[-1] == 0:
        return ()
    expected = bounds[-1] * hours
    random, drawn = np.random.default_rng(seed), np.empty((0, 2))
    while True:
        drawn = np.concatenate([drawn, random.random((int(expected + 10 * expected**0.5) + 10, 2))])
        times = np.cumsum(-np.log1p(-drawn[:, 0])) / bounds[-1]
        if times[-1] >= hours:
            places = np.searchsorted(bounds, drawn[:, 1] * bounds[-1], side="right")
            return tuple((float(at), causes[place]) for at, place in zip(times, places) if at < hours)


class _Simulation:
    """The state of a run, which jumps from one event to the next."""

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.seed, self.now = run, seed, 0.0
        self.order = count()
        planned = round(run.failures.planned * run.hours)
        self.queue = [(at, next(self.order), "strike", cause) for at, cause in struck(run, seed)]
        self.queue += [((i + 0.5) * run.hours / planned, next(self.order), "planned", None) for i in range(planned)]
        heapify(self.queue)
        self.broken, self.slow = 0, 0  # hosts out of service; slow hosts in the run
        self.kept = 0.0  # useful hours that are safe, at the start of this stretch
        self.taints: list[tuple[int, float]] = []  # silent corruptions: number, useful hours that are still clean
        self.pending: list[tuple[str, float]] = []  # what stands between now and the next step
        self.totals, self.events = dict.fromkeys(CATEGORIES, 0.0), []
        self.trace: list[tuple[float, ...]] = [(0.0,) * (1 + len(CATEGORIES))]
        self.begin()

    def history(self) -> History:
        while self.now < self.run.hours:
            self.advance()
        if not self.pending:
            self.end(keep=True)
        self.mark()
        trace = np.array(self.trace)
        return History(self.run, self.seed, dict(self.totals), tuple(self.events), trace[:, 0], trace[:, 1:])

    def advance(self) -> None:
        """To the next event, or to the end of what stands still, or of the run."""
        until = min(self.queue[0][0] if self.queue else self.run.hours, self.run.hours)
        if self.pending:
            name, left = self.pending[0]
            name, left = ("waiting", float("inf")) if name == "restart" and not self.enough else (name, left)
            step = min(left, until - self.now)
            self.totals[name] += step
            self.now = until if step < left else self.now + step
            if name != "waiting":
                self.pending[0] = (name, left - step)
            if step == left:
                self.pending.pop(0)
                self.mark()
                if not self.pending:
                    self.begin()
                return
        self.now = until
        if self.queue and self.queue[0][0] <= until < self.run.hours:
            _, _, what, cause = heappop(self.queue)
            getattr(self, what)(cause)

    # -- stretches of work -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Steps are made from now on."""
        self.began, self.running = self.now, self.possible
        self.pieces = [(0.0, self.share, self.pace)]  # from that hour of work on: share of replicas, pace

    def end(self, keep: bool) -> float:
        """Steps stop now. Unless ``keep``, work since the last complete checkpoint is lost: its hours."""
        checkpoint, x = self.run.checkpoint, self.now - self.began
        worked = checkpoint.worked(x)
        taken, safe = (x, worked) if keep else checkpoint.saved(checkpoint.complete(x))
        for name, hours in zip(("useful", "shrunk", "slow hosts"), self.split(safe), strict=True):
            self.totals[name] += hours
        self.kept += self.split(safe)[0]
        self.totals["checkpoint"] += taken - safe
        self.mark(self.began + taken)
        self.totals["lost"] += worked - safe
        self.totals["checkpoint"] += (x - worked) - (taken - safe)
        self.mark()
        return worked - safe

    def split(self, worked: float) -> tuple[float, float, float]:
        """Hours of work of this stretch: useful, given up for missing replicas, given up for slow hosts."""
        useful = missing = slow = 0.0
        ends = [start for start, _, _ in self.pieces[1:]] + [float("inf")]
        for (start, share, pace), stop in zip(self.pieces, ends, strict=True):
            hours = max(0.0, min(stop, worked) - start)
            useful += hours * share * pace
            missing += hours * (1 - share)
            slow += hours * share * (1 - pace)
        return useful, missing, slow

    @property
    def possible(self) -> int:
        """Replicas that the hosts in service can hold."""
        run = self.run
        hosts = -(-run.chips // run.chips_per_node) + run.spares - self.broken
        return min(run.chips // run.replica, max(0, hosts * run.chips_per_node // run.replica))

    @property
    def enough(self) -> bool:
        return self.possible >= (1 if self.run.elastic else self.run.chips // self.run.replica)

    @property
    def share(self) -> float:
        return self.running * self.run.replica / self.run.chips

    @property
    def pace(self) -> float:
        return 1 / (1 + self.run.stragglers.slower) if self.slow else 1.0

    def mark(self, at: float | None = None) -> None:
        """A point of the curves."""
        self.trace.append((self.now if at is None else at, *self.totals.values()))

    # -- events --------------------------------------------------------------------------------------------------

    def strike(self, cause: Failure | None) -> None:
        """A failure, or a slow host."""
        if cause is None:
            self.slow += 1
            self.later(self.run.stragglers.detection, "found_slow", None)
            self.change_pace()
        elif cause.kind == "silent":
            self.later(self.run.silent, "found_silent", (cause, self.clean()))
        else:
            self.crash(cause.kind, cause.name)
            self.lose(cause.nodes)

    def crash(self, kind: str, name: str) -> None:
        """Steps stop, or recovery starts anew."""
        lost = 0.0 if self.pending else self.end(keep=False)
        self.taints = [taint for taint in self.taints if taint[1] < self.kept]  # the others are undone with the work
        self.pending = [("detection", self.run.recovery.detection), ("restart", self.run.recovery.restart)]
        self.events.append(Event(self.now, kind, name, lost))

    def lose(self, nodes: int) -> None:
        """Hosts go out of service until they are repaired."""
        self.broken += nodes
        for _ in range(nodes):
            self.later(self.run.repair, "repair", None)

    def repair(self, _: object) -> None:
        """A host is back: a spare, or a replica more where one is missing."""
        self.broken -= 1
        if not self.pending and self.possible > self.running:
            self.stop("grown", "a replica is back")

    def planned(self, _: object) -> None:
        """Maintenance, after a checkpoint; a run that stands still already does not lose more by it."""
        if not self.pending:
            self.stop("planned", "maintenance")

    def stop(self, kind: str, name: str) -> None:
        """Stop in good order: with a checkpoint, so that no work is lost, not even by a failure while it is written."""
        self.end(keep=True)
        saving = self.run.checkpoint.stall + self.run.checkpoint.write
        downtime = "planned" if kind == "planned" else "restart"
        self.pending = [("checkpoint", saving), (downtime, self.run.recovery.restart)]
        self.events.append(Event(self.now, kind, name))

    def change_pace(self) -> None:
        if not self.pending:
            self.pieces.append((self.run.checkpoint.worked(self.now - self.began), self.share, self.pace))

    def found_slow(self, _: object) -> None:
        """A slow host is known: swap it."""
        self.slow -= 1
        self.lose(1)
        if not self.pending:
            self.stop("slow host", "slow host")

    def clean(self) -> tuple[int, float]:
        """Note that data is corrupt from now on: a number, and the useful hours of the last complete checkpoint.

        A checkpoint that is being written counts as corrupt.
        """
        safe = 0.0
        if not self.pending:
            _, saved = self.run.checkpoint.saved(self.run.checkpoint.complete(self.now - self.began))
            safe = self.split(saved)[0]
        taint = (next(self.order), self.kept + safe)
        self.taints.append(taint)
        return taint

    def found_silent(self, given: tuple[Failure, tuple[int, float]]) -> None:
        """Corruption is noticed: back to the last checkpoint from before it, unless a failure undid it meanwhile."""
        cause, taint = given
        if taint not in self.taints:
            return
        self.lose(cause.nodes)
        self.crash(cause.kind, cause.name)
        if taint in self.taints:
            back = self.kept - taint[1]
            self.totals["useful"] -= back
            self.totals["lost"] += back
            self.kept = taint[1]
            self.events[-1] = replace(self.events[-1], lost=self.events[-1].lost + back)
            self.taints = [other for other in self.taints if other[1] < self.kept]
        self.mark()

    def later(self, hours: float, what: str, given: object) -> None:
        heappush(self.queue, (self.now + hours, next(self.order), what, given))
