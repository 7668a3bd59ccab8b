"""Lesson 13: checks on solutions, on untouched stubs and on mistakes; the exercises beside the simulation."""

from math import ceil, sqrt

import pytest

from course_lib.lessons.check import lesson13 as check
from course_lib.lessons.solutions import lesson13 as solution
from course_lib.plan.checkpoints import expected, young
from course_lib.plan.failures import Failures

CHECKS = {
    check.check_mean_hours: solution.mean_hours,
    check.check_interval_minutes: solution.interval_minutes,
    check.check_goodput: solution.goodput,
    check.check_spares: solution.spares,
}
MISTAKES = [
    (check.check_mean_hours, lambda c, s, h, f: h / f, "another number of chips"),
    (check.check_mean_hours, lambda c, s, h, f: h / f * c / s, "gets shorter"),
    (check.check_mean_hours, lambda c, s, h, f: f * c / (s * h), "that is a rate"),
    (check.check_mean_hours, lambda c, s, h, f: s * h / f, "for one chip"),
    (check.check_mean_hours, lambda c, s, h, f: s * h / f / c / 24, "not days"),
    (check.check_interval_minutes, lambda s, b, m: sqrt(s / b / 60 * m * 60), "half an interval"),
    (check.check_interval_minutes, lambda s, b, m: sqrt(2 * s / b * m * 3600), "not seconds"),
    (check.check_interval_minutes, lambda s, b, m: sqrt(2 * s / b / 3600 * m), "not hours"),
    (check.check_interval_minutes, lambda s, b, m: sqrt(2 * b / s * m), "not the other way round"),
    (check.check_interval_minutes, lambda s, b, m: 2 * s / b * m, "take the root"),
    (check.check_goodput, lambda i, s, m, d: 1 - s / i - (i + d) / m, "half of one on average"),
    (check.check_goodput, lambda i, s, m, d: 1 - s / i - i / 2 / m, "until it is detected"),
    (check.check_goodput, lambda i, s, m, d: 1 - (i / 2 + d) / m, "pays for its checkpoint"),
    (check.check_goodput, lambda i, s, m, d: s / i + (i / 2 + d) / m, "share that is lost"),
    (check.check_goodput, lambda i, s, m, d: 100 * solution.goodput(i, s, m, d), "not a percentage"),
    (check.check_spares, lambda n, r, a: ceil(n * r), "on average only"),
    (check.check_spares, lambda n, r, a: solution.spares(n, r, a) + 1, "one fewer"),
    (check.check_spares, lambda n, r, a: solution.spares(n, r, a) - 1, "still below"),
    (check.check_spares, lambda n, r, a: solution.spares(n, 1.0, a), "as long as a repair"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_solution_is_right(check, capsys) -> None:
    assert check(CHECKS[check])
    assert ": right. " in capsys.readouterr().out


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_stub_is_not_attempted(check, capsys) -> None:
    assert not check(lambda *arguments: None)
    assert capsys.readouterr().out.strip().endswith("not attempted yet")


@pytest.mark.parametrize(("check", "mistake", "hint"), MISTAKES)
def test_mistake_is_told(check, mistake, hint: str, capsys) -> None:
    assert not check(mistake)
    said = capsys.readouterr().out
    assert "not right yet" in said and hint in said


def test_the_exercises_are_the_lessons_formulas() -> None:
    llama = Failures.load("llama-3")
    assert solution.mean_hours(2048, 16384, 1296, 419) == pytest.approx(llama.mtbf(2048))
    assert solution.interval_minutes(5.68e12, 2e12, 3.09) == pytest.approx(60 * young(2.84 / 3600, 3.09))


@pytest.mark.parametrize(("interval", "down"), [(0.07, 0.22), (0.2, 0.05)])
def test_first_order_is_near_the_exact_goodput(interval: float, down: float) -> None:
    """To second order in what is lost: (down/M)² and the like."""
    lost = 1 - solution.goodput(interval, 0.0008, 3.09, down)
    assert abs(1 - lost - expected(interval, 0.0008, 3.09, down)) < lost**2


def test_spares_are_the_poisson_quantile() -> None:
    """With mean 1: P(0) = 0.368, P(≤ 1) = 0.736, P(≤ 2) = 0.920."""
    assert [solution.spares(0.25, 4.0, p) for p in (0.3, 0.7, 0.9)] == [0, 1, 2]
