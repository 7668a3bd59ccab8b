"""A run that breaks: what is run on which cluster, and the history of how it went. longrun.py makes the one of the other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from course_lib.plan.checkpoints import Checkpoint
from course_lib.plan.failures import Failures, Recovery, published

CATEGORIES = (
    "useful", "lost", "checkpoint", "detection", "restart", "waiting", "planned", "shrunk", "slow hosts",
)  # fmt: skip
MOST_EVENTS = 10**6


@dataclass(frozen=True)
class Stragglers:
    """Slow hosts: how many turn up per chip and hour, how much longer they take, hours until one is found."""

    rate: float
    slower: float = 0.10  # arXiv:2402.15627, section 6.3
    detection: float = 24.0

    def __post_init__(self) -> None:
        if not (0 <= self.rate < float("inf") and self.slower >= 0 and self.detection >= 0):
            raise ValueError(
                f"slow hosts: rate {self.rate}, slower {self.slower}, detection {self.detection} h; none may be negative"
            )


@dataclass(frozen=True)
class Run:
    """A training run of ``hours`` on ``chips``, and the cluster that it runs on; times in hours.

    ``spares``: hosts that stand by. ``replica``: chips that hold one copy of the model, and stop together when
    ``elastic`` leaves out replicas; their step then takes longer, for the global batch stays. ``repair``: until a host
    is back. ``silent``: until corrupted data is noticed. Both are assumptions (see failures.toml).
    """

    chips: int
    hours: float
    failures: Failures
    recovery: Recovery
    checkpoint: Checkpoint
    spares: int = 0
    elastic: bool = False
    replica: int = 128
    chips_per_node: int = 8
    stragglers: Stragglers | None = None
    repair: float = published()["assumed"]["repair"]
    silent: float = published()["assumed"]["silent"]

    def __post_init__(self) -> None:
        if self.chips < 1 or not 0 < self.hours < float("inf"):
            raise ValueError(f"{self.chips} chips for {self.hours} h; both are to be above zero, and finite")
        if self.chips % self.replica:
            raise ValueError(f"{self.chips} chips do not divide into replicas of {self.replica}; give another replica")
        if self.spares < 0 or self.chips_per_node < 1 or not self.repair > 0 or self.silent < 0:
            raise ValueError(
                f"spares {self.spares}, chips_per_node {self.chips_per_node}, repair {self.repair} h, silent"
                f" {self.silent} h; spares and silent may be 0, the others are above it"
            )
        slow = self.stragglers.rate if self.stragglers else 0.0
        expected = self.hours * (self.failures.rate(self.chips) + slow * self.chips)
        if expected > MOST_EVENTS:
            raise ValueError(f"{expected:.2g} failures are expected; at most {MOST_EVENTS:,}: simulate fewer hours")

    def every(self, interval: float) -> "Run":
        """The same run with another checkpoint interval."""
        return replace(self, checkpoint=replace(self.checkpoint, interval=interval))


@dataclass(frozen=True)
class Event:
    """What happened at ``time``, in hours from the start: its kind, its cause, and hours of work that it threw away."""

    time: float
    kind: str  # a kind of failure, or repair, planned, grown, slow host, corrupted
    name: str
    lost: float = 0.0


@dataclass(frozen=True)
class History:
    """How a run went: hours by category, which sum to the run's, and everything that happened.

    ``times`` (n,) and ``curves`` (n, categories): the hours of each category until then. A rollback past a silent
    corruption takes useful hours away again.
    """

    run: Run
    seed: int
    hours: dict[str, float]
    events: tuple[Event, ...]
    times: np.ndarray
    curves: np.ndarray

    @property
    def goodput(self) -> float:
        """Useful hours over all hours, 0 to 1: "effective training time"."""
        return self.hours["useful"] / self.run.hours

    @property
    def lost(self) -> float:
        """Hours of work that were thrown away."""
        return self.hours["lost"]

    @property
    def failures(self) -> int:
        """Unplanned failures that stopped the run or were found in it."""
        kinds = {failure.kind for failure in self.run.failures.classes}
        return sum(event.kind in kinds for event in self.events)

    def at(self, times: Sequence[float]) -> dict[str, np.ndarray]:
        """Hours by category from the start until each of ``times``."""
        return {name: np.interp(times, self.times, self.curves[:, i]) for i, name in enumerate(CATEGORIES)}
