"""``data/published/flops.toml``: every row has a model, a tag and a source, and our closed forms come near it."""

import tomllib

import pytest

from course_lib import data, plan

ROWS = tomllib.loads(data.path("published", "flops.toml").read_text(encoding="utf-8"))
ALL = [(kind, row) for kind, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize(("kind", "row"), ALL, ids=lambda part: part if isinstance(part, str) else part["model"])
def test_rows_are_sourced(kind: str, row: dict) -> None:
    assert row["model"] in plan.models() and row["tag"] in "VP"
    assert row["source"].startswith(("arXiv ", "ModelLink README"))


@pytest.mark.parametrize("row", ROWS["run"], ids=lambda row: row["model"])
def test_runs(row: dict) -> None:
    model = plan.load_model(row["model"])
    assert plan.flops.per_token(model, row["convention"], row["context"]) * row["tokens"] == pytest.approx(
        row["flops"], rel=0.001
    )


@pytest.mark.parametrize("row", ROWS["token"], ids=lambda row: row["model"])
def test_tokens(row: dict) -> None:
    model = plan.load_model(row["model"])
    assert plan.flops.per_token(model, row["convention"], row["context"]) == pytest.approx(row["flops"], rel=0.015)


@pytest.mark.parametrize("row", ROWS["active"], ids=lambda row: row["model"])
def test_active_parameters(row: dict) -> None:
    assert round(plan.count(plan.load_model(row["model"])).active / 1e9) * 1e9 == row["parameters"]


@pytest.mark.parametrize("row", ROWS["mfu"], ids=lambda row: row["model"])
def test_utilisations(row: dict) -> None:
    model = plan.load_model(row["model"])
    found = plan.run.mfu(model, row["tokens_per_s"], row["chips"], row["peak"], row["convention"], row["context"])
    assert found.value == pytest.approx(row["mfu"], rel=0.005)


@pytest.mark.parametrize("row", ROWS["recompute"], ids=lambda row: row["model"])
def test_recomputation(row: dict) -> None:
    model = plan.load_model(row["model"])
    full, selective = (
        plan.flops.executed(model, 1, row["context"], level, attention="full", flash=False)
        for level in ("full", "selective")
    )
    assert full / selective == pytest.approx(row["full"] / row["selective"], rel=0.01)
