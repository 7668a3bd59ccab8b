"""Solutions of lesson 13: failures of a cluster, Young's interval, goodput to first order, spares."""

from math import exp, sqrt


def mean_hours(chips: int, seen_chips: int, seen_hours: float, seen_failures: int) -> float:
    """Hours between failures on ``chips``, from a run that was seen: as many failures per chip and hour."""
    return seen_chips * seen_hours / seen_failures / chips


def interval_minutes(size: float, bandwidth: float, mtbf: float) -> float:
    """Young's interval in minutes: checkpoint in bytes, bandwidth in B/s, mean time between failures in hours."""
    stall = size / bandwidth / 60
    return sqrt(2 * stall * mtbf * 60)


def goodput(interval: float, stall: float, mtbf: float, down: float) -> float:
    """Useful share of the time, to first order; all in hours. A failure takes half an interval and ``down`` hours."""
    return 1 - stall / interval - (interval / 2 + down) / mtbf


def spares(per_hour: float, repair: float, assurance: float) -> int:
    """The fewest spare hosts that are enough with probability ``assurance``: hosts in repair are Poisson-distributed."""
    mean = per_hour * repair
    count, chance = 0, exp(-mean)
    total = chance
    while total < assurance:
        count += 1
        chance *= mean / count
        total += chance
    return count
