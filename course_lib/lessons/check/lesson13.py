"""Checks of lesson 13's exercises."""

from collections.abc import Callable
from math import ceil, sqrt

from course_lib.lessons.check import Case, judge
from course_lib.lessons.solutions import lesson13 as solution


def check_mean_hours(function: Callable[[int, int, float, int], float]) -> bool:
    """Llama 3's failures on 2,048 chips and on one; MegaScale's on its own cluster size."""
    cases = []
    for chips, seen, hours, failures in (
        (2048, 16384, 1296.0, 419),
        (1, 16384, 1296.0, 419),
        (100_000, 10_000, 500.0, 100),
    ):
        right = solution.mean_hours(chips, seen, hours, failures)
        mistakes = {
            hours / failures: "that is on the cluster that was seen; another number of chips fails more or less often",
            hours / failures * chips / seen: "more chips fail more often: the time between failures gets shorter",
            1 / right: "that is a rate, failures per hour; the time between them is asked for",
            seen * hours / failures: "that is for one chip; divide by the chips of the cluster",
            right * 24: "hours are asked for: the hours that were seen need no factor",
            right / 24: "hours are asked for, not days",
        }
        arguments = (chips, seen, hours, failures)
        cases.append(Case(arguments, right, {value: hint for value, hint in mistakes.items() if value != right}))
    good = "DeepSeek-V3 was trained on as many"
    return judge("mean_hours", function, cases, "", "hours", good)


def check_interval_minutes(function: Callable[[float, float, float], float]) -> bool:
    """Llama 3 405B at 2 TB/s; a storage ten times slower; a small cluster."""
    cases = []
    for size, bandwidth, mtbf in ((5.68e12, 2e12, 3.09), (5.68e12, 2e11, 3.09), (1e12, 1e10, 49.0)):
        right = solution.interval_minutes(size, bandwidth, mtbf)
        seconds = size / bandwidth
        mistakes = {
            right / sqrt(2): "there is a 2 under the root: a failure throws away half an interval on average",
            right * 60: "minutes are asked for, not seconds",
            right / 60: "minutes are asked for, not hours",
            sqrt(2 * seconds / 60 * mtbf): "the stall is in minutes, the mean time between failures in hours",
            sqrt(2 * seconds * mtbf * 60): "the stall is in seconds, the mean time between failures in minutes",
            2 * seconds / 60 * mtbf * 60: "take the root",
            sqrt(2 / seconds * mtbf): "bytes over bytes per second, not the other way round",
        }
        wrong = {value: hint for value, hint in mistakes.items() if value != right}
        cases.append(Case((size, bandwidth, mtbf), right, wrong))
    return judge("interval_minutes", function, cases, "", "minutes", "the lesson's interval", tolerance=1e-6)


def check_goodput(function: Callable[[float, float, float, float], float]) -> bool:
    """Near the best interval, far above it, with a slow restart."""
    cases = []
    for interval, stall, mtbf, down in ((0.07, 0.0008, 3.09, 0.22), (0.5, 0.0008, 3.09, 0.22), (0.2, 0.01, 12.0, 1.25)):
        right = solution.goodput(interval, stall, mtbf, down)
        writing, half, gone = stall / interval, interval / 2 / mtbf, down / mtbf
        mistakes = {
            1
            - writing
            - 2 * half
            - gone: "a failure comes anywhere in an interval: it throws away half of one on average",
            1 - writing - half: "after each failure the run also stands still until it is detected and restarted",
            1 - half - gone: "each interval also pays for its checkpoint",
            1 - right: "that is the share that is lost",
            100 * right: "a share from 0 to 1, not a percentage",
            1 - writing - interval / 2 - down: "hours per failure; divide by the hours between failures",
            1 - stall - half - gone: "a stall for each interval: its share is stall over interval",
        }
        wrong = {value: hint for value, hint in mistakes.items() if value != right}
        cases.append(Case((interval, stall, mtbf, down), right, wrong))
    good = "the simulation, with its planned stops, is a point lower"
    return judge("goodput", function, cases, "%", "a share from 0 to 1", good, tolerance=1e-6)


def check_spares(function: Callable[[float, float, float], float]) -> bool:
    """Llama 3's broken hosts with repair in a day, in four hours; a small cluster; hardly any failures."""
    cases = []
    for per_hour, repair, assurance in ((0.3, 24.0, 0.99), (0.3, 4.0, 0.99), (0.3, 24.0, 0.5), (0.001, 24.0, 0.9)):
        right = solution.spares(per_hour, repair, assurance)
        mean = per_hour * repair
        mistakes = {
            ceil(mean): "that is enough on average only; half of the time more are broken",
            round(mean): "that is enough on average only; half of the time more are broken",
            right + 1: "one fewer is enough already: 0 spares are the first to try",
            right - 1: "with that many the chance is still below what is asked for",
            solution.spares(per_hour, 1.0, assurance): "hosts stay away as long as a repair takes, not for one hour",
        }
        wrong = {value: hint for value, hint in mistakes.items() if value != right}
        cases.append(Case((per_hour, repair, assurance), right, wrong))
    return judge("spares", function, cases, "", "a whole number of hosts", "of 2,048 that work")
