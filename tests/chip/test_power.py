"""Power against clock and energy per operation: the published points, by hand."""

import pytest

from course_lib.chip import UnknownFigure, load_chip, power
from course_lib.chip.cost import Matmul, Work, cost


def test_voltage_is_flat_and_then_a_line() -> None:
    assert power.voltage(1.0e9) == power.voltage(1.3e9) == 0.745
    assert power.voltage(1.8e9) == 0.820
    assert power.voltage(1.55e9) == pytest.approx((0.745 + 0.820) / 2)


@pytest.mark.parametrize("clock", [0.9e9, 1.9e9])
def test_unmeasured_clocks_are_unknown(clock: float) -> None:
    with pytest.raises(UnknownFigure, match="1000 to 1800"):
        power.voltage(clock)


def test_full_clock_has_the_measured_power() -> None:
    assert power.core_power(1.8e9) == pytest.approx(45.92)
    assert power.chip_power(1.8e9) == pytest.approx(250.04)


def test_half_of_f_v_squared_by_hand() -> None:
    assert power.core_power(1.0e9) == pytest.approx(45.92 * (1.0 / 1.8) * (0.745 / 0.820) ** 2)


def test_power_rises_faster_than_the_clock() -> None:
    assert power.core_power(1.8e9) / power.core_power(1.3e9) > 1.8 / 1.3


def test_what_slowing_down_saves_is_of_the_measured_order() -> None:
    """f·V² at one clock for all saves less than what operators with clocks of their own saved at equal speed."""
    rows = power.measured()["training"]
    assert [row["soc"] for row in rows] == sorted((row["soc"] for row in rows), reverse=True)
    slowest = rows[-1]
    assert power.core_power(1.3e9) < slowest["aicore"] < power.core_power(1.5e9)


def test_arithmetic_energy_where_published() -> None:
    old = load_chip("ascend-910a")
    paid = cost(old, Work((Matmul(1, 256, 256, 256, "float16"),), vector_flops=1000, vector_dtype="float16"))
    assert power.arithmetic_pj(old, paid) == pytest.approx(2 * 256**3 * 0.39 + 1000 * 1.8)
    with pytest.raises(UnknownFigure, match=r"energy\.cube of Ascend 910B2 is unknown"):
        power.arithmetic_pj(load_chip("ascend-910b2"), paid)


def test_table_shows_ours_beside_the_measured() -> None:
    last = power.table().splitlines()[-1]
    assert "saves 7.4%" in last and "measured in inference: 11.3%" in last
