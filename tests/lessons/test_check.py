"""The checks' machinery: a verdict for everything that a reader may write, and no exception."""

import pytest

from course_lib.lessons.check import Case, judge

CASES = [Case((3,), 9.0, {6.0: "squared, not doubled"}), Case((0,), 0.0)]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: None, "not attempted yet"),
        (lambda x: ..., "not attempted yet"),
        (lambda x: x * x, "square: right. square(3) = 9.00"),
        (lambda x: x * 2, "hint: squared, not doubled"),
        (lambda x: x * x + 0.5, "5.6 % too much"),
        (lambda x: 100 * x * x, "100 times too much"),
        (lambda x: -x * x, "wrong sign"),
        (lambda x: x * x or 1, "should be zero"),
        (lambda x: 0, "should not be zero"),
        (lambda x: "9", "gave a str; expected a number"),
        (lambda x: True, "gave a bool"),
        (lambda x: float("nan"), "not right yet"),
        (lambda x: 1 / 0, "raised ZeroDivisionError"),
        (lambda: 9, "raised TypeError"),
    ],
)
def test_verdict(function, said: str, capsys) -> None:
    right = judge("square", function, CASES)
    out = capsys.readouterr().out
    assert said in out
    assert right == ("right." in out)


def test_the_answer_is_not_given_away(capsys) -> None:
    judge("square", lambda x: 5, [Case((3,), 9.0)])
    assert "9" not in capsys.readouterr().out
