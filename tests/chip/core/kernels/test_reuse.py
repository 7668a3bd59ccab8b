"""Following L2 alone agrees with the full run, and with what was measured on an Ascend 910B2."""

from pathlib import Path

import pytest

from course_lib import data
from course_lib.chip import load_chip
from course_lib.chip.core import empty, launch
from course_lib.chip.core.kernels.matmul import matmul
from course_lib.chip.core.kernels.reuse import hit_rate
from course_lib.chip.core.kernels.tiles import Tile

TILE = Tile(128, 64, 256, 256)


@pytest.mark.parametrize("group", [1, 4])
def test_as_the_full_run(group: int) -> None:
    n = 2048
    run = launch(matmul, "ascend-910b2", empty(n, n), empty(n, n), empty(n, n), TILE, group, blocks=24)
    assert hit_rate(load_chip("ascend-910b2"), n, n, n, TILE, group) == pytest.approx(run.hit_rate, abs=0.002)


def test_what_fits_is_fetched_from_hbm_once() -> None:
    """4096: 97.88 % were measured (PTO-DSL). A matrix is fetched 16 times, the other 32 times, and each misses once."""
    assert hit_rate(load_chip("ascend-910b2"), 4096, 4096, 4096, TILE) == pytest.approx(1 - 2 / 48)


def test_what_does_not_fit_needs_a_good_order(tmp_path: Path) -> None:
    """A quarter of 16384 along k on a quarter of the cache, and an eighth along m: 30.9 % and 93.72 % were measured."""
    text = data.path("chips", "ascend-910b2.toml").read_text(encoding="utf-8")
    file = tmp_path / "quarter.toml"
    file.write_text(text.replace("l2_capacity = { value = 192", "l2_capacity = { value = 48"), encoding="utf-8")
    plain, grouped = (hit_rate(load_chip(file), 2048, 4096, 16384, TILE, group) for group in (1, 8))
    assert plain < 0.45
    assert grouped > 0.85
