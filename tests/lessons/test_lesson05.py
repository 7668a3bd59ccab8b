"""Lesson 05's published figures: each from a source, of a model and chip that the course knows, and no two at odds."""

import tomllib

import pytest

from course_lib import data, plan
from course_lib.chip import load_chip
from course_lib.chip.figures import TAGS

PUBLISHED = tomllib.loads(data.path("published", "inference.toml").read_text(encoding="utf-8"))
ROWS = [*PUBLISHED["prefill"], *PUBLISHED["decode"]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_rows_name_what_there_is(row: dict) -> None:
    assert load_chip(row["chip"]).peak(row["dtype"]) and plan.load_model(row["model"])
    assert row["source"] and row["tag"] in TAGS


def test_tokens_per_second_are_batch_over_tpot() -> None:
    for row in PUBLISHED["decode"]:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["tpot"], rel=0.001)


def test_parts_are_shares_and_seconds() -> None:
    accepted, parts = PUBLISHED["accepted"], PUBLISHED["measured"]
    assert 0 < accepted["low"] < accepted["high"] < 1 and 0 < parts["mla_share"] < 1
    layers = plan.load_model("deepseek-v3").layers
    assert layers * (parts["dispatch"] + parts["combine"]) + parts["launch"] < PUBLISHED["decode"][0]["tpot"]
