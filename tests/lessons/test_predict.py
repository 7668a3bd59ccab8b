"""Predictions: three numbers, and nothing that a reader writes makes a lesson fail."""

import doctest

import pytest

import course_lib.lessons
from course_lib.lessons import compare, predict


def test_three_numbers(capsys) -> None:
    compare(predict("peak memory", 2**20, "B"), 4 * 2**20, closed_form=2**22)
    assert capsys.readouterr().out.splitlines() == [
        "predicted  peak memory: 1.00 MiB",
        "peak memory",
        "  measured         4.00 MiB",
        "  your prediction  1.00 MiB  0.25 × measured: off by a factor of 4",
        "  closed form      4.00 MiB  1 × measured: exact",
    ]


@pytest.mark.parametrize("value", [None, 0, -1, 1e30, float("nan"), float("inf"), "many", True, [3]])
def test_nothing_fails_on_a_readers_number(value: object, capsys) -> None:
    compare(predict("tokens per second", value, "tokens/s"), 1000)
    assert "measured" in capsys.readouterr().out


def test_without_a_prediction(capsys) -> None:
    compare(predict("ratio", None), 3.0)
    assert "your prediction  none" in capsys.readouterr().out


def test_only_counts(capsys) -> None:
    compare("FLOPs of a step", 3000, "FLOP", closed_form=2900)
    out = capsys.readouterr().out
    assert "prediction" not in out and "closed form  2.90 kFLOP  0.967 × measured: low by 3.3 %" in out


def test_example() -> None:
    failed, tried = doctest.testmod(course_lib.lessons)
    assert tried == 3 and failed == 0
