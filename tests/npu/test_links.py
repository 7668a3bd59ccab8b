"""Sharing a port: against a simulation in small steps, and the law that no byte's time is lost."""

import random

import pytest

from course_lib.npu.links import MOST, Port, delay, drain


def slowly(flows: list[int], ps: int, step: int = 60) -> list[float]:
    """Even sharing in steps: each of the flows that are left gets its part of each step."""
    left = [float(f) for f in flows]
    for _ in range(ps // step):
        there = [i for i, f in enumerate(left) if f > 0]
        for i in there:
            left[i] = max(0.0, left[i] - step / len(there))
    return sorted(f for f in left if f > 0)


@pytest.mark.parametrize("seed", range(20))
def test_drain_is_even_sharing(seed: int) -> None:
    draw = random.Random(seed)
    flows = sorted(draw.randint(1, 40) * 60 for _ in range(draw.randint(0, 5)))
    ps = draw.randint(0, 80) * 60
    left, expected = drain(flows, ps), slowly(flows, ps)
    assert abs(sum(left) - sum(expected)) <= 60 * max(1, len(flows))
    assert sum(left) >= max(0, sum(flows) - ps)  # no more is done than the port can do
    assert left == sorted(left)


def test_alone_nothing_is_lost() -> None:
    assert drain([100], 30) == [70] and drain([100], 100) == [] and drain([], 5) == []
    assert delay([], 50) == 0


def test_a_newcomer_gets_its_even_share() -> None:
    # 100 are left of another when 60 more come: both run at half speed until the 60 are done
    assert 60 + delay([100], 60) == 120
    # of a short one only its own length is lost
    assert 60 + delay([10], 60) == 70


def test_what_the_first_was_not_told_delays_the_third() -> None:
    port = Port()
    port.admit(0, 100)  # told: done at 100
    port.admit(50, 100)  # 50 are left of the first: told 50 + 100 + 50
    assert port.under_way(50) == [50, 100]
    assert port.under_way(150) == [50]  # both had 50 by 150, the first is through
    assert port.under_way(200) == []  # and all 200 are done at 200, not before


def test_a_port_tells_of_few_transfers_and_forgets_none() -> None:
    port = Port()
    for work in (50, 10, 40, 20, 30, 60):
        port.admit(0, work)
    told = port.under_way(0)
    assert len(told) == MOST and sum(told) == 210 and told == sorted(told)


def test_nothing_to_send_is_no_transfer() -> None:
    port = Port()
    port.admit(5, 0)
    assert port.under_way(5) == []


def test_one_that_comes_earlier_than_those_known_finds_them_all() -> None:
    port = Port()
    port.admit(100, 80)
    assert port.under_way(20) == [80]
