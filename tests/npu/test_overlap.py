"""Spans of time: against counting moment by moment."""

import random
from types import SimpleNamespace

import pytest

from course_lib.npu.overlap import communication, length, union, without


def moments(spans: list[tuple[int, int]]) -> set[int]:
    return {t for start, end in spans for t in range(start, end)}


@pytest.mark.parametrize("seed", range(40))
def test_against_moments(seed: int) -> None:
    draw = random.Random(seed)
    some, others = ([(a, a + draw.randint(0, 9)) for a in draw.choices(range(60), k=draw.randint(0, 12))] for _ in range(2))
    left = without(union(some), union(others))
    assert moments(union(some)) == moments(some)
    assert moments(left) == moments(some) - moments(others)
    assert length(left) == len(moments(left))  # and so none overlap
    assert left == union(left)


def record(op: str, phase: str, start: int, ps: int, device: int = 0) -> SimpleNamespace:
    return SimpleNamespace(op=op, phase=phase, start=start, device=device, cost=SimpleNamespace(ps=ps))


def test_what_is_exposed() -> None:
    records = [
        record("mm", "backward", 0, 100), record("all_reduce", "communication", 50, 100), record("send", "communication", 120, 60),
        record("wait", "waiting", 90, 40), record("wait", "waiting", 180, 20), record("mm", "backward", 170, 20),
        record("all_reduce", "communication", 0, 1000, device=1),
    ]  # fmt: skip
    got = communication(records, 0)
    assert got.total == pytest.approx(130e-12) and got.exposed == pytest.approx(70e-12)
    assert got.waiting == pytest.approx(10e-12)  # 190 to 200: before that something else ran
    assert got.sent == {"all_reduce": pytest.approx(100e-12), "send": pytest.approx(60e-12)}
