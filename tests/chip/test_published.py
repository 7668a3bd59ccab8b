"""The world table: our figures beside measured kernels, and what may be claimed of them."""

import re
from pathlib import Path

import pytest

from course_lib import data
from course_lib.chip import load_chip, published
from course_lib.chip.core.rules import davinci

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> tuple[published.Row, ...]:
    return published.rows()


def test_predictions_hit_the_target(rows: tuple[published.Row, ...]) -> None:
    predicted = [row for row in rows if not row.calibrated]
    assert len(predicted) > 20
    assert published.median_error(rows) < 0.15
    assert all(abs(row.error) < 0.35 for row in predicted)


def test_a_large_miss_has_its_reason(rows: tuple[published.Row, ...]) -> None:
    for row in rows:
        assert bool(row.reason) == (abs(row.error) > 0.15), f"{row.name}: {row.error:+.1%}"


def test_calibrated_rows_are_met(rows: tuple[published.Row, ...]) -> None:
    """Each by its constant; the A3 GEMM has two constants for its time and three shares, and is met by all about."""
    for row in rows:
        assert not row.calibrated or abs(row.error) < (0.03 if "6144" in row.name else 0.02), row.name


def test_every_calibrated_constant_names_its_row(rows: tuple[published.Row, ...]) -> None:
    """Tag C is on the constants that the rows name, and on no others."""
    named = " ".join(row.calibrated for row in rows)
    for key, figure in davinci().items():
        assert (figure.tag == "C") == (key in named), key
    for file in data.path("chips").glob("*.toml"):
        for key, figure in load_chip(file.stem).figures.items():
            assert figure.tag != "C" or f"{key} in data/chips/{file.name}" in named, (file.name, key)


def test_the_page_in_docs_is_this_table(rows: tuple[published.Row, ...]) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert published.table(rows) in page
    assert page == published.page(), "run python -m course_lib.chip.published > docs/kernels.md"


def test_collectives_are_computed_and_a_large_miss_has_its_reason() -> None:
    found = published.collectives()
    assert len(found) > 40 and not any(row.calibrated for row in found), "what became a link's figure is no row"
    for row in found:
        assert bool(row.reason) == (abs(row.error) > 0.15), f"{row.name}: {row.error:+.1%}"
        assert row.ours > 0 and row.source
    exchanges = published.collectives("H800, DeepEP low latency")
    assert all(abs(row.error) < 0.07 for row in exchanges if int(row.name.split("EP")[-1]) >= 32)
    assert all(abs(row.error) < 0.1 for row in published.collectives("8 × "))


def test_two_calls_of_one_row_agree() -> None:
    """A row is what the model says of its payload: 128 tokens to 8 experts each, between 4 nodes of 8."""
    from course_lib.chip.collectives import transfer
    from course_lib.chip.spec import load_system

    (row,) = published.collectives("H800, DeepEP low latency, dispatch, EP32")
    ps = transfer(load_system("h800-cluster"), "all_to_all", 128 * 8 * 7392, range(32)).ps
    assert row.ours == pytest.approx(ps * 1e-6)


def test_some_rows_without_computing_all() -> None:
    (row,) = published.rows("910B4, copy")
    assert re.search(r"hbm_copy", row.calibrated) and row.ours == pytest.approx(row.measured, rel=1e-3)
