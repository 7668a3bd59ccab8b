"""Energy and money of a run, as ranges: what is published, what it leaves open, and what that does to the answer.

A `Range` has a low and a high end and says where they come from; arithmetic carries both ends through, so that an answer
is as wide as what is known. Each quantity enters a formula once, for interval arithmetic takes two occurrences for two
quantities. What no source gives is None, and every function here passes None on.

The second half is about the clock. A chip that waits for memory hardly slows when its cores do, and saves their power; a
chip that computes takes longer, and most of its power does not care how fast the cores are (`over_clocks`, `best_clock`).

    >>> hours = 2.788e6  # DeepSeek-V3, on H800
    >>> print(cost(hours * 3600, 1, "h800"))
    5.58 M USD
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from course_lib import data
from course_lib.chip import ChipSpec, Cost, load_system, power
from course_lib.plan.model import Model
from course_lib.plan.operators import priced

HOUR, PICO, BITS = 3600, 1e-12, 8
KWH = 3.6e6  # J
PREFIXES = (("", 1), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15))
FINE = (("p", 1e-12), ("n", 1e-9), ("µ", 1e-6), ("m", 1e-3))


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high``, in ``unit``; ``tag`` as in chip.figures.TAGS. ValueError where low is above high."""

    low: float
    high: float
    unit: str = ""
    tag: str = "A"
    source: str = ""

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"a range goes from low to high, found {self.low} and {self.high}; exchange them")

    @property
    def mid(self) -> float:
        """Halfway between the ends."""
        return (self.low + self.high) / 2

    @property
    def factor(self) -> float:
        """How many times the low end the high end is."""
        return self.high / self.low

    def to(self, unit: str) -> "Range":
        """The same numbers, called by another unit."""
        return Range(self.low, self.high, unit, self.tag, self.source)

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __add__(self, other: "Range | float") -> "Range":
        o = ranged(other)
        return self._with(o, self.low + o.low, self.high + o.high)

    def __mul__(self, other: "Range | float") -> "Range":
        o = ranged(other)
        ends = [a * b for a in (self.low, self.high) for b in (o.low, o.high)]
        return self._with(o, min(ends), max(ends))

    def __truediv__(self, other: "Range | float") -> "Range":
        o = ranged(other)
        if 0 in o:
            raise ZeroDivisionError(f"division by a range from {o.low} to {o.high}, in which zero lies")
        return self * Range(1 / o.high, 1 / o.low, o.unit, o.tag, o.source)

    __radd__, __rmul__ = __add__, __mul__

    def _with(self, other: "Range", low: float, high: float) -> "Range":
        """A result: an assumption if one of both is, else derived; with the sources of both."""
        tags = {one.tag for one in (self, other) if one.source}
        sources = dict.fromkeys(one.source for one in (self, other) if one.source)
        return Range(low, high, self.unit, "A" if "A" in tags else "D", "; ".join(sources))

    def __str__(self) -> str:
        name, size = _prefix(self.high)
        ends = [f"{end / size:.3g}" for end in dict.fromkeys((self.low, self.high))]
        gap = " " if name and self.unit.startswith("USD") else ""
        return (" to ".join(dict.fromkeys(ends)) + f" {name}{gap}{self.unit}").rstrip()


def ranged(value: "Range | float") -> Range:
    """A number as a range without width or source."""
    return value if isinstance(value, Range) else Range(value, value, tag="D")


@cache
def published() -> dict:
    """The tables of ``data/published/economy.toml``."""
    return tomllib.loads(data.path("published", "economy.toml").read_text(encoding="utf-8"))


def known(key: str) -> Range | None:
    """The range under a dotted key ("price.h100", "pue", "energy.hbm"); None: not published."""
    table = published()
    for part in key.split("."):
        table = table.get(part, {})
    return Range(**table) if "low" in table else None


# -- energy and money of a run ------------------------------------------------------------------------------


def watts(system: str, chips: int = 1) -> Range | None:
    """W of ``chips`` devices' share of a system in training: its published power × `known` "load"; None: unknown."""
    spec = load_system(system)
    if spec.power is None:
        return None
    figure = spec.figures["power.total"]
    most = Range(spec.power, spec.power, "W", figure.tag, figure.source)
    return most * (chips / spec.chips) * known("load")


def energy(seconds: float, chips: int, system: str, site: bool = True) -> Range | None:
    """J that ``chips`` devices of a system take in ``seconds``; ``site``: with cooling and conversion (PUE).

    None where the system's power is unknown.
    """
    drawn = watts(system, chips)
    if drawn is None:
        return None
    return (drawn * seconds * (known("pue") if site else 1)).to("J")


def electricity(joules: Range | None, price: Range | None = None) -> Range | None:
    """USD for so much energy, at ``price`` in USD/kWh or that of data/published/economy.toml."""
    return None if joules is None else (joules / KWH * (price or known("electricity"))).to("USD")


def cost(seconds: float, chips: int, price: Range | str) -> Range | None:
    """USD to rent ``chips`` for ``seconds``; ``price``: in USD/h, or the name of a chip. None: no price published."""
    each = known(f"price.{price}") if isinstance(price, str) else price
    return None if each is None else (each * (seconds / HOUR * chips)).to("USD")


def per_token(total: Range | None, tokens: float) -> Range | None:
    """A total in J or USD for each of ``tokens``."""
    return None if total is None else (total / tokens).to(f"{total.unit}/token")


# -- energy of an operator ----------------------------------------------------------------------------------


def moving(paid: Cost) -> Range:
    """J for an operator's bytes between HBM and the chip."""
    return (known("energy.hbm") * (paid.bytes * BITS * PICO)).to("J")


def arithmetic(spec: ChipSpec, paid: Cost) -> Range | None:
    """J for an operator's arithmetic; published for the Ascend 910 alone, None for all other chips."""
    each = [spec.figures.get(f"energy.{unit}") for unit in ("cube", "vector")]
    if None in each:
        return None
    joules = power.arithmetic_pj(spec, paid) * PICO
    return Range(joules, joules, "J", "D", each[0].source)


def step_energy(model: Model, spec: ChipSpec, **configuration: object) -> dict[str, Range | None]:
    """J of one forward pass by cause, summed over `operators`: "arithmetic" (None: unknown) and "memory"."""
    rows = priced(model, spec, **configuration)
    works = [arithmetic(spec, row.cost) for row in rows]
    sums = None if None in works else sum(one * row.layers for one, row in zip(works, rows, strict=True))
    return {"arithmetic": sums and sums.to("J"), "memory": sum(moving(row.cost) * row.layers for row in rows).to("J")}


# -- the clock ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clocked:
    """One pass at a clock in Hz: seconds, W of the whole chip, and J per token; ``cores`` is the AI cores' part of it."""

    clock: float
    seconds: float
    watts: float
    joules: float
    cores: float


def over_clocks(model: Model, spec: ChipSpec, batch: int = 1, tokens: int = 1, **more: object) -> list[Clocked]:
    """A forward pass over ``batch`` × ``tokens`` tokens, at each clock that was measured, 1.0 to 1.8 GHz in steps.

    Power is f·V² through the published points (`power.chip_power`), as measured in training: nobody has published it
    for passes of one kind. Only the AI cores change their clock, see `power.at_clock`.
    """
    clocks, found = power.measured()["clock"], []
    for mhz in range(clocks["least"], clocks["most"] + 1, clocks["step"]):
        hz = mhz * power.MHZ
        rows = priced(model, power.at_clock(spec, hz), batch=batch, tokens=tokens, **more)
        seconds, drawn = sum(row.ps for row in rows) * PICO, power.chip_power(hz)
        each = seconds / (batch * tokens)
        found.append(Clocked(hz, seconds, drawn, each * drawn, each * power.core_power(hz)))
    return found


def best_clock(curve: Sequence[Clocked], bound: float | None = None, cores: bool = False) -> Clocked | None:
    """The clock of least energy per token among those that need at most ``bound`` seconds; None: no clock does.

    ``cores``: count the energy of the AI cores alone. Of equals the slower one.
    """
    allowed = [one for one in curve if bound is None or one.seconds <= bound]
    return min(allowed, key=lambda one: (one.cores if cores else one.joules, one.clock), default=None)


def _prefix(value: float) -> tuple[str, float]:
    """A prefix and its size, so that ``value`` has one to three digits before the point."""
    if 0 < abs(value) < 0.01:
        return next((one for one in FINE if abs(value) < 1000 * one[1]), PREFIXES[0])
    return next((one for one in reversed(PREFIXES) if abs(value) >= one[1]), PREFIXES[0])
