"""Checkpoints: what one costs, and how often to write one: Young's and Daly's rule, and the exact optimum.

Too often, and the run stands still to write; too rarely, and a failure throws much work away. All times are in hours,
or in any one unit. M is the mean time between failures, τ the interval, δ what one checkpoint costs.

    >>> stall = 2.8 / 3600  # Llama 3 405B: 5.7 TB at 2 TB/s
    >>> [round(60 * rule(stall, 3.09), 2) for rule in (young, daly, optimum)]  # minutes
    [4.16, 4.13, 4.13]
"""

from dataclasses import dataclass
from math import exp, expm1, floor, inf, sqrt

from course_lib.plan.layers import count
from course_lib.plan.memory import precision_of
from course_lib.plan.model import Model

SECONDS = 3600  # in an hour


def young(cost: float, mtbf: float) -> float:
    """Young's interval √(2δM) (Communications of the ACM 17(9), 1974, page 530): good while δ is far below M."""
    return sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """Daly's interval (Future Generation Computer Systems 22, 2006, page 303): two more terms; M where δ is 2M or more."""
    if cost >= 2 * mtbf:
        return mtbf
    small = cost / (2 * mtbf)
    return sqrt(2 * cost * mtbf) * (1 + sqrt(small) / 3 + small / 9) - cost


def optimum(cost: float, mtbf: float) -> float:
    """The interval at which `expected` is highest, by bisection of its derivative: e^((τ+δ)/M) · (1 − τ/M) = 1."""
    low, high = 0.0, mtbf
    if cost <= 0 or mtbf == inf:
        return 0.0 if cost <= 0 else inf
    for _ in range(200):
        middle = (low + high) / 2
        if exp((middle + cost) / mtbf) * (1 - middle / mtbf) > 1:
            low = middle
        else:
            high = middle
    return low


def expected(interval: float, stall: float, mtbf: float, down: float) -> float:
    """Goodput, 0 to 1, of an endless run with synchronous checkpoints; ``down``: hours from a failure to the next step.

    Failures are exponential and may also strike while a run recovers or writes, which then starts anew. Expected time
    per interval is M e^(R/M) (e^((τ+δ)/M) − 1) (Daly 2006, equation 13).
    """
    exponent = (interval + stall) / mtbf
    if exponent > 700:  # e^700 is near the largest float: nothing is ever completed
        return 0.0
    return interval / (mtbf * exp(min(down / mtbf, 700)) * expm1(exponent))


@dataclass(frozen=True)
class Checkpoint:
    """One every ``interval`` hours of running: the run stands still for ``stall``, and it is complete ``write`` later.

    Synchronous: ``write`` is 0. Asynchronous: ``stall`` copies the state to the host, ``write`` brings it to storage
    while the run goes on, slower by ``slowdown`` (0 to 1). The next copy waits until a write is complete.
    """

    interval: float
    stall: float
    write: float = 0.0
    slowdown: float = 0.0

    def __post_init__(self) -> None:
        if not self.interval > 0:
            raise ValueError(f"the interval between checkpoints is {self.interval} h; it is to be above zero")
        if not (0 <= self.stall < inf and 0 <= self.write < inf and 0 <= self.slowdown <= 1):
            raise ValueError(
                f"stall {self.stall} h, write {self.write} h, slowdown {self.slowdown}: times are finite and not"
                " negative, the slowdown is from 0 to 1"
            )

    @classmethod
    def of(
        cls, model: Model, interval: float, bandwidth: float, copy: float | None = None, slowdown: float = 0.0,
        precision: str = "bfloat16, ZeRO",
    ) -> "Checkpoint":  # fmt: skip
        """A model's weights and optimizer states to storage of ``bandwidth`` B/s, of the whole cluster.

        ``copy``: B/s of all chips together to their hosts, for an asynchronous checkpoint.
        """
        size = state_bytes(model, precision)
        if not bandwidth > 0 or (copy is not None and not copy > 0):
            raise ValueError(f"bandwidth {bandwidth} and copy {copy}, both B/s; they are to be above zero")
        if copy is None:
            return cls(interval, size / bandwidth / SECONDS)
        return cls(interval, size / copy / SECONDS, size / bandwidth / SECONDS, slowdown)

    @property
    def cost(self) -> float:
        """Hours of running that one checkpoint costs: its stall, and what the write slows down. The δ of Young."""
        return self.stall + self.slowdown * self.write

    # -- within a stretch of running that began x hours ago ----------------------------------------------------

    @property
    def gap(self) -> float:
        """Hours of running between two copies: the interval, or the write where that takes longer."""
        return max(self.interval, self.write)

    def worked(self, x: float) -> float:
        """Hours of full-speed work in the first x hours: without stalls and what background writes slowed down."""
        if x <= self.gap:
            return x
        cycles = floor(x / (self.gap + self.stall))
        inside = min(x - cycles * (self.gap + self.stall), self.gap)
        behind = cycles * self.gap - self.slowdown * self.write * max(0, cycles - 1)
        return behind + inside - (self.slowdown * min(inside, self.write) if cycles else 0.0)

    def complete(self, x: float) -> int:
        """Checkpoints that are complete after x hours."""
        if x < self.gap + self.stall + self.write:
            return 0
        return floor((x - self.gap - self.stall - self.write) / (self.gap + self.stall)) + 1

    def saved(self, n: int) -> tuple[float, float]:
        """Of the n-th checkpoint, from 1: hours from the start until it was taken, and the work that is in it."""
        if n == 0:
            return 0.0, 0.0
        return (n - 1) * (self.gap + self.stall) + self.gap, n * self.gap - self.slowdown * self.write * (n - 1)


def state_bytes(model: Model, precision: str = "bfloat16, ZeRO") -> int:
    """Bytes of a checkpoint that training can go on from: weights, master weights and moments; gradients are not in it."""
    p = precision_of(precision)
    return count(model).total * (p.weights + p.states)
