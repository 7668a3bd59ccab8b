"""Published runs beside the plan: the claims made of the table, its calibration, and that the page in docs is current."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from course_lib import plan
from course_lib.plan import naive
from course_lib.plan import published_runs as published
from course_lib.plan.step import plan as plan_step

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> tuple[published.Row, ...]:
    return published.rows()


def test_predictions_hit_the_target(rows: tuple[published.Row, ...]) -> None:
    predicted = [row for row in rows if not row.calibrated]
    assert len(predicted) >= 17
    assert published.median_error(rows) < 0.10
    assert all(abs(row.error) < 0.25 or row.reason for row in predicted)
    trained = [row for row in predicted if row.layout.split(",")[0] not in ("prefill", "decode")]
    assert sum(abs(row.error) < 0.12 for row in trained) == len(trained) - 1  # all but DeepSeek-V3


def test_a_large_miss_has_its_reason_and_no_other(rows: tuple[published.Row, ...]) -> None:
    for row in rows:
        assert bool(row.reason) == (abs(row.error) > 0.15), f"{row.name}: {row.error:+.1%}"


def test_the_constant_is_what_its_rows_say() -> None:
    for chip, names in published.CALIBRATED.items():
        assert published.PACE[chip] == pytest.approx(published.calibrated(names), abs=0.001)
        assert len(names) > 1  # tuned to no single row


def test_each_calibrated_row_is_predicted_by_the_others() -> None:
    found = published.left_out()
    assert set(found) == {name for names in published.CALIBRATED.values() for name in names}
    assert all(abs(error) < 0.10 for error in found.values())


def test_all_rows_are_there_as_published() -> None:
    """The first columns are the collected facts, untouched; names, values and sources are filled."""
    with (ROOT / "data" / "published" / "runs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 19 and len({row["run"] for row in rows}) == 19
    for row in rows:
        assert float(row["value"]) > 0 and "arXiv" in row["source"] or "ModelLink" in row["source"]
        assert row["assumed"] and row["metric"] in ("step_s", "tflops_per_chip", "mfu", "tokens_per_s_per_chip")


@pytest.mark.parametrize(
    "name", ["narayanan-1.7b", "narayanan-39.1b", "narayanan-529.6b", "korthikanti-175b-full", "pangu-ultra-135b"]
)
def test_models_of_the_rows_have_their_size(name: str) -> None:
    row = next(row for row in published.entries() if row["run"] == name)
    assert plan.count(published.model_of(row)).total / 1e9 == pytest.approx(float(row["params_b"]), rel=0.01, abs=0.05)


def test_published_runs_fit() -> None:
    """What has been run fits into memory by our account, too."""
    for row in published.entries():
        if row["kind"] == "train" and row["run"] not in NOT_FITTING:
            assert published.step_of(row).fits, row["run"]


NOT_FITTING = ("llama3-405b-8k",)  # FSDP there, ZeRO-1 here


def test_what_an_open_vpp_is_worth() -> None:
    """The row of Llama 3 prints what other stages than one a rank would make of its error."""
    row = next(row for row in published.entries() if row["run"] == "llama3-405b-8k")
    layout, errors = published.layout_of(row), []
    for vpp in (2, 4, 8):
        changed = replace(layout, vpp=vpp, schedule="Interleaved1F1B")
        step = plan_step(published.model_of(row), published.system_of(row), changed, int(row["seq"]))
        errors.append(round(100 * (published.in_measure(row, step) / float(row["value"]) - 1)))
    assert "with 2, 4 or 8 ours would be {}, {} or {} % too high".format(*errors) in row["assumed"]


def test_the_share_of_8_bit_products_is_the_published_one() -> None:
    assert published.products_share() == pytest.approx(0.599, abs=0.001)


def test_the_page_in_docs_is_this_table() -> None:
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    assert page == f"{published.TITLE}\n{published.table()}\n", (
        "run python -m course_lib.plan.published_runs > docs/runs.md"
    )


def test_mistakes_are_large() -> None:
    found = {one.name: one for one in naive.mistakes()}
    assert found["peak of the wrong column"].factor == pytest.approx(4, rel=0.01)
    assert found["latents sized as multi-head"].factor > 50 and found["all experts active"].factor > 15
    assert all(one.factor > 1.5 and one.why for one in found.values())
    assert str(found["all experts active"]).endswith("wrong by a factor of 18")
