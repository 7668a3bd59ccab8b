"""Checks of lesson 15's exercises."""

from collections.abc import Callable
from math import ceil

from course_lib.lessons.check import Case, judge
from course_lib.lessons.solutions import lesson15 as solution

DIES = ((32, 4.29, 32, 0.6, 4, 10.0, 2.27), (24, 4.7, 192, 0.6, 4, 10.0, 2.27), (12, 5.0, 32, 0.64, 6, 15.0, 2.0))
BUDGETS = (
    (385.0, 101.0, 83.0, 4.05, 1.8, 0.820, 0.745), (206.0, 48.0, 41.0, 4.05, 1.3, 0.745, 0.745),
    (310.0, 71.0, 62.0, 3.59, 1.5, 0.775, 0.745), (100.0, 60.0, 62.0, 3.59, 1.0, 0.745, 0.745),
)  # fmt: skip
RATES = (160.0, 5.3, 1.06e13, 24.0, 4e11)  # watts, core, its FLOP/s, stack, its B/s
SPLITS = ((5e12, 3.0e10), (2.1e11, 3.04e10), (1.74e14, 1.4e11), (2.0e12, 3.0e10))


def check_die_area(function: Callable[..., float]) -> bool:
    """The 910 and the 910B2, about, and a chip with much memory."""
    cases = []
    for given in DIES:
        cores, core, l2, mib, stacks, stack, around = given
        right, bare = solution.die_area(*given), cores * core + l2 * mib + stacks * stack
        mistakes = {
            bare: "that is the parts alone; network, control and the rest surround them",
            bare + around: "the surroundings are a factor, not mm²",
            cores * core * around + l2 * mib + stacks * stack: "the factor holds for all parts, L2 and HBM too",
            (core + l2 * mib + stacks * stack) * around: "that is one core",
            (cores * (core + l2 * mib) + stacks * stack) * around: "all cores share one L2",
            (cores * core + l2 + stacks * stack) * around: "L2 is in MiB: times the mm² of one",
            (cores * core + l2 * mib) * around: "each stack of HBM has an interface on the die",
            bare / around: "the die is larger than its parts",
        }
        cases.append(Case(given, right, {value: hint for value, hint in mistakes.items() if value != right}))
    return judge(
        "die_area", function, cases, "", "mm², as a float", "without links; the Ascend 910 measures 456", tolerance=1e-6
    )


def check_cores_within(function: Callable[..., int]) -> bool:
    """The 910B2's budget, half of it at a slow clock, one between, and one that memory alone exceeds."""
    cases = []
    for given in BUDGETS:
        watts, idle, hbm, core, ghz, volts, low = given
        right, left, squared = solution.cores_within(*given), watts - idle - hbm, (volts / low) ** 2
        mistakes = {
            int(left // (core * ghz)): "a higher clock also needs a higher voltage, and power goes with its square",
            int(left // (core * ghz * volts / low)): "power goes with the square of the voltage",
            int(left // (core * squared)): "a core at a higher clock takes more power: `core` is at 1 GHz",
            int(left // (core * ghz / squared)): "the voltage ratio is upside down",
            int(left // (core * ghz * volts**2)): "`core` is the power at volts_at_1: take the ratio of voltages",
            int((watts - hbm) // (core * ghz * squared)): "an idle die takes power, too",
            int((watts - idle) // (core * ghz * squared)): "HBM takes power, too",
            int(watts // (core * ghz * squared)): "idle die and HBM take their share first",
            left / (core * ghz * squared): "whole cores: round down",
            ceil(left / (core * ghz * squared)): "whole cores: round down, the last one does not fit",
            int(left // (core * ghz * squared)): "where idle die and HBM alone exceed the budget, the answer is 0",
        }
        cases.append(Case(given, right, {value: hint for value, hint in mistakes.items() if value != right}))
    good = "a 910B2 has 24 of them lit"
    return judge("cores_within", function, cases, "", "a whole number of cores", good)


def check_best_stacks(function: Callable[..., int]) -> bool:
    """A job between, decode, training, and one near decode."""
    cases = []
    for job in SPLITS:
        right = solution.best_stacks(*job, *RATES)
        mistakes = {
            max(_parts(right, *job)): "that is the time; the question is how many stacks",
            _cores(right): "those are the cores that are left; the question is how many stacks",
            _shortest_sum(*job): "cube and memory work at the same time: the longer one counts",
            6: "each stack takes power from the cores: with so many the cube needs longer than memory",
            1: "with one stack the cube waits for memory",
        }
        wrong = {value: hint for value, hint in mistakes.items() if value != right}
        cases.append(Case((*job, *RATES), right, wrong))
    good = "as many stacks as cores stay busy with"
    return judge("best_stacks", function, cases, "", "a whole number from 1 to 6", good)


def _cores(stacks: int) -> int:
    watts, core, _, stack, _ = RATES
    return int((watts - stacks * stack) // core)


def _parts(stacks: int, flops: float, moved: float) -> tuple[float, float]:
    """Seconds of the cube and of memory."""
    return flops / (_cores(stacks) * RATES[2]), moved / (stacks * RATES[4])


def _shortest_sum(flops: float, moved: float) -> int:
    return min(range(1, 7), key=lambda stacks: sum(_parts(stacks, flops, moved)))
