"""How often a cluster breaks: published failures by cause, scaled by chips and hours; and how long recovery takes.

A class of failures has a rate per chip and hour, so a cluster's rate is the rate times its chips: this holds for chips,
hosts and cables, and is an assumption for software. Rows and sources: ``data/published/failures.toml``.

    >>> llama = Failures.load("llama-3")
    >>> round(llama.mtbf(16384), 2), round(llama.mtbf(1024))
    (3.09, 49)
"""

import tomllib
from dataclasses import dataclass, replace
from functools import cache

from course_lib import data

KINDS = ("chip", "host", "network", "maintenance", "software", "silent")
MINUTES = 60  # in an hour


@dataclass(frozen=True)
class Failure:
    """One cause: failures per chip and hour, and how many hosts each takes out of service until they are repaired."""

    name: str
    kind: str  # one of KINDS
    rate: float  # per chip and hour
    nodes: int = 1  # hosts out of service; more than one: a failure that strikes neighbours together

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind is {self.kind!r}; use one of {', '.join(KINDS)}")
        if not 0 <= self.rate < float("inf") or self.nodes < 0:
            raise ValueError(f"{self.name}: rate {self.rate} and nodes {self.nodes}; neither may be negative")


@dataclass(frozen=True)
class Failures:
    """All causes of one run, with the source of their rates; ``planned``: interruptions for maintenance per hour."""

    name: str
    classes: tuple[Failure, ...]
    planned: float = 0.0
    source: str = ""

    @classmethod
    def load(cls, name: str) -> "Failures":
        """The failures that were counted in a published run; KeyError names the runs there are."""
        row = published_run(name)
        chip_hours = row["chips"] * row["hours"]
        classes = (Failure(c["name"], c["kind"], c["count"] / chip_hours, c["nodes"]) for c in row["classes"])
        return cls(row["title"], tuple(classes), row["planned"] / row["hours"], row["source"])

    @classmethod
    def every(cls, hours: float, chips: int, kind: str = "chip", nodes: int = 0) -> "Failures":
        """One cause, that strikes a cluster of ``chips`` once in ``hours`` on average."""
        if not hours > 0 or chips < 1:
            raise ValueError(f"a failure every {hours} h on {chips} chips; both are to be above zero")
        return cls(f"every {hours:g} h", (Failure("failure", kind, 1 / (hours * chips), nodes),))

    def scaled(self, factor: float) -> "Failures":
        """The same causes, ``factor`` times as often on each chip."""
        return replace(self, classes=tuple(replace(c, rate=factor * c.rate) for c in self.classes))

    def rate(self, chips: int) -> float:
        """Unplanned failures per hour of ``chips`` together."""
        return chips * sum(c.rate for c in self.classes)

    def mtbf(self, chips: int) -> float:
        """Mean hours between unplanned failures of ``chips`` together; infinite where nothing fails."""
        rate = self.rate(chips)
        return 1 / rate if rate else float("inf")

    def by_kind(self, chips: int) -> dict[str, float]:
        """Failures per hour by kind, in the order of `KINDS`, the kinds that occur."""
        sums = {kind: chips * sum(c.rate for c in self.classes if c.kind == kind) for kind in KINDS}
        return {kind: rate for kind, rate in sums.items() if rate}


@dataclass(frozen=True)
class Recovery:
    """Hours from a failure until it is known and diagnosed, and from there until steps are made again."""

    name: str
    detection: float
    restart: float
    source: str = ""

    def __post_init__(self) -> None:
        if not (0 <= self.detection < float("inf") and 0 <= self.restart < float("inf")):
            raise ValueError(f"detection {self.detection} h and restart {self.restart} h; neither may be negative")

    @classmethod
    def load(cls, name: str) -> "Recovery":
        """A published recovery; KeyError names those there are."""
        row = _named("recovery", name)
        return cls(name, row["detection"] / MINUTES, row["restart"] / MINUTES, row["source"])

    @property
    def hours(self) -> float:
        """Mean time to repair, MTTR: detection and restart."""
        return self.detection + self.restart


def availability(mtbf: float, mttr: float) -> float:
    """Share of time in which a system works: MTBF / (MTBF + MTTR), both in one unit. Lost work is not in it."""
    return mtbf / (mtbf + mttr)


@cache
def published() -> dict:
    """All of ``data/published/failures.toml``."""
    return tomllib.loads(data.path("published", "failures.toml").read_text(encoding="utf-8"))


def published_run(name: str) -> dict:
    """A run's row with its counts; KeyError names those there are."""
    return _named("run", name)


def _named(kind: str, name: str) -> dict:
    rows = {row["name"]: row for row in published()[kind]}
    if name not in rows:
        raise KeyError(f"no {kind} {name!r} in failures.toml; there are {', '.join(rows)}")
    return rows[name]
