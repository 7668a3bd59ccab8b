"""Bubbles: closed forms against the replay of PyTorch's tables, where they hold and where not; published figures."""

from itertools import product

import pytest

from course_lib.parallel.tables import SCHEDULES, per_rank, table
from course_lib.plan.schedule import bubble, idle, of_ideal, of_total, possible
from course_lib.plan.timetable import replay

LOOPED = ("Interleaved1F1B", "InterleavedZeroBubble")
CASES = [(name, v) for name in SCHEDULES for v in ((1, 2, 3) if name in LOOPED else (per_rank(name),))]


def waits(name: str, p: int, v: int, m: int, F: int, I: int, W: int) -> int:
    """Idle time of the rank that waits most, by replay; F, I and W of a rank for one micro-batch in all its stages."""
    vpp = v if name in LOOPED else None
    return max(replay(table(name, p, m, vpp), F, I + W, W).idle)  # of one stage: v times less than of a rank


def times(name: str) -> list[tuple[int, int, int]]:
    """Durations (F, I, W) of one stage for which the closed form claims to be exact."""
    every = list(product((1, 2, 3), repeat=3))
    if name == "ZBVZeroBubble":
        return [(F, I, W) for F, I, W in every if I >= F and I >= W]
    return [(F, I, W) for F, I, W in every if F == I >= W] if name == "DualPipeV" else every


@pytest.mark.parametrize(("name", "v"), CASES)
def test_formula_is_replay(name: str, v: int) -> None:
    for p, (F, I, W) in product((1, 2, 4, 5), times(name)):
        for m in [m for m in (2 * p, 3 * p) if possible(name, p, v, m)]:
            assert waits(name, p, v, m, F, I, W) == idle(name, p, v, v * F, v * (I + W), v * W), (p, m, F, I, W)


@pytest.mark.parametrize(("name", "v"), CASES)
def test_possible_is_what_pytorch_makes_and_the_formula_says(name: str, v: int) -> None:
    F, I, W = 2, 2, 1
    for p, m in product((1, 2, 3, 4), range(1, 15)):
        try:
            as_said = waits(name, p, v, m, F, I, W) == idle(name, p, v, v * F, v * (I + W), v * W)
        except ValueError:
            as_said = False
        assert as_said == possible(name, p, v, m), (p, m)
