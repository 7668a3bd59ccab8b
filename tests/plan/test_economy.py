"""Ranges, money and energy of a run, and the clock: against published sums and against arithmetic by hand."""

import pytest

from course_lib import chip, plan
from course_lib.chip import Matmul, Work, cost, power
from course_lib.chip.figures import TAGS
from course_lib.plan import economy
from course_lib.plan.economy import Range

A = Range(2, 4, "J", "V", "one")
B = Range(1, 3, "", "T", "two")


# -- ranges -------------------------------------------------------------------------------------------------


def test_arithmetic_carries_both_ends() -> None:
    assert (A + B) == Range(3, 7, "J", "D", "one; two")
    assert (A * B) == Range(2, 12, "J", "D", "one; two")
    assert (A / B) == Range(2 / 3, 4, "J", "D", "one; two")
    assert (3 * A) == (A * 3) == Range(6, 12, "J", "D", "one")
    assert sum([A, A]) == Range(4, 8, "J", "D", "one")


def test_every_pair_of_inside_values_lies_inside_the_result() -> None:
    negative = Range(-2, 5)
    for a in (2, 2.5, 4):
        for b in (-2, 0, 1, 5):
            assert a * b in A * negative and a + b in A + negative
        for b in (1, 2, 3):
            assert a / b in A / B


def test_an_assumption_makes_the_answer_an_assumption() -> None:
    assert (A * Range(1, 2, tag="A", source="guessed")).tag == "A"
    assert (A * 2).tag == "D"


def test_impossible_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="exchange them"):
        Range(2, 1)
    with pytest.raises(ValueError, match="from low to high"):
        Range(float("nan"), 1)
    with pytest.raises(ZeroDivisionError, match="zero lies"):
        A / Range(-1, 1)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (Range(5.576e6, 5.576e6, "USD"), "5.58 M USD"),
        (Range(1.234, 1.2341, "J"), "1.23 J"),
        (Range(0.9e12, 2e12, "J"), "0.9 to 2 TJ"),
        (Range(0.0021, 0.004, "J"), "2.1 to 4 mJ"),
        (Range(0.5, 0.9), "0.5 to 0.9"),
        (Range(0, 0, "J"), "0 J"),
    ],
)
def test_in_words(one: Range, said: str) -> None:
    assert str(one) == said


# -- what is published --------------------------------------------------------------------------------------


def test_the_rent_of_deepseek_v3() -> None:
    """arXiv 2412.19437 table 1: 2.788 million H800 hours at 2 dollars make 5.576 million."""
    told = economy.published()["published"]["deepseek-v3"]
    paid = economy.cost(told["chip_hours"] * 3600, 1, "h800")
    assert paid.low == paid.high == pytest.approx(told["usd"])
    assert economy.cost(told["chip_hours"] * 3600 / 2048, 2048, "h800").mid == pytest.approx(told["usd"])


def test_every_range_has_a_source_and_a_tag() -> None:
    def ranges(table: dict, path: str = "") -> list[str]:
        if "low" in table:
            return [path]
        return [
            found for key, value in table.items() if isinstance(value, dict) for found in ranges(value, f"{path}.{key}")
        ]

    keys = [path[1:] for path in ranges(economy.published())]
    assert len(keys) == 8
    for key in keys:
        one = economy.known(key)
        assert one.source and one.unit and one.tag in TAGS


def test_what_is_not_published_stays_unknown() -> None:
    assert economy.known("price.ascend-910c") is None
    assert economy.cost(3600, 1, "ascend-910c") is None
    assert economy.watts("atlas-800t-a2") is None and economy.energy(3600, 8, "atlas-800t-a2") is None
    assert economy.electricity(None) is None and economy.per_token(None, 10) is None


def test_energy_of_a_day_on_a_supernode() -> None:
    """559 kW at most, 768 dies; a day of all of them, at the machines and at the meter."""
    day = economy.energy(86400, 768, "cloudmatrix384", site=False)
    assert day.high == pytest.approx(559e3 * 86400) and day.low == pytest.approx(0.63 * day.high)
    site = economy.energy(86400, 768, "cloudmatrix384")
    assert site.low == pytest.approx(1.07 * day.low) and site.high == pytest.approx(1.58 * day.high)
    assert economy.watts("cloudmatrix384", 2).high == pytest.approx(559e3 / 384)


def test_money_for_energy_and_per_token() -> None:
    hour = Range(3.6e6, 7.2e6, "J", "V", "one or two kWh")
    assert str(economy.electricity(hour, Range(0.1, 0.2, "USD/kWh"))) == "0.1 to 0.4 USD"
    each = economy.per_token(hour, 1000)
    assert (each.low, each.high, each.unit) == (3600, 7200, "J/token")
    mine = economy.cost(7200, 3, Range(0.5, 4, "USD/h", "A", "chosen"))
    assert (mine.low, mine.high, mine.tag) == (3, 24, "A")


# -- energy of operators ------------------------------------------------------------------------------------


def test_energy_of_a_product() -> None:
    """2·64³ FLOP at 0.39 pJ on the 910; its bytes at 3.9 to 9 pJ a bit; on other chips the first is unknown."""
    work = Work((Matmul(1, 64, 64, 64, "float16"),), bytes_read=16384, bytes_written=8192)
    old = chip.load_chip("ascend-910a")
    paid = cost(old, work)
    assert economy.arithmetic(old, paid).low == pytest.approx(2 * 64**3 * 0.39e-12)
    moved = economy.moving(paid)
    assert (moved.low, moved.high) == (pytest.approx(24576 * 8 * 3.9e-12), pytest.approx(24576 * 8 * 9e-12))
    assert economy.arithmetic(chip.load_chip("ascend-910b2"), paid) is None


def test_decode_pays_for_bytes_and_prefill_for_arithmetic() -> None:
    llama, old = plan.load_model("llama-2-7b"), chip.load_chip("ascend-910a")
    one = economy.step_energy(llama, old, batch=1, tokens=1, context=2048, dtype="float16")
    many = economy.step_energy(llama, old, batch=1, tokens=2048, dtype="float16")
    assert one["memory"].low > 50 * one["arithmetic"].high and many["arithmetic"].low > 3 * many["memory"].high
    assert economy.step_energy(llama, chip.load_chip("ascend-910b2"), tokens=8)["arithmetic"] is None


# -- the clock ----------------------------------------------------------------------------------------------


def curves() -> tuple[list, list]:
    llama, spec = plan.load_model("llama-2-7b"), chip.load_chip("ascend-910b2")
    decode = economy.over_clocks(llama, spec, batch=16, tokens=1, context=2048)
    return decode, economy.over_clocks(llama, spec, batch=1, tokens=4096)


def test_decode_does_not_slow_and_prefill_does() -> None:
    """Measured in inference at 1.3 of 1.8 GHz: 2.5 % slower, 11 % less power. Decode alone: 0 % and 7 %."""
    decode, prefill = curves()
    by_clock = [{round(one.clock / 1e8): one for one in curve} for curve in (decode, prefill)]
    slow = [curve[13].seconds / curve[18].seconds - 1 for curve in by_clock]
    measured = power.measured()["inference"]["slowdown"]
    assert slow[0] < measured < slow[1] and slow[1] == pytest.approx(0.19, abs=0.02)
    assert 1 - by_clock[0][13].watts / by_clock[0][18].watts == pytest.approx(0.074, abs=0.001)


def test_the_best_clock() -> None:
    """Decode at the slowest; prefill where L2 starts to hold up the cube; for the cores alone slower is cheaper."""
    decode, prefill = curves()
    assert economy.best_clock(decode).clock == 1.0e9
    assert economy.best_clock(prefill).clock == 1.6e9
    assert economy.best_clock(prefill, cores=True).clock == 1.0e9
    bound = prefill[3].seconds
    assert economy.best_clock(prefill, bound, cores=True).clock == prefill[3].clock == 1.3e9
    assert economy.best_clock(prefill, 0.9 * prefill[-1].seconds) is None
    for curve in (decode, prefill):
        best = economy.best_clock(curve)
        assert all(best.joules <= one.joules for one in curve)


def test_a_slower_core_keeps_its_network() -> None:
    spec = chip.load_chip("ascend-910b2")
    slow = power.at_clock(spec, 0.9e9)
    assert slow.cube_clock == spec.cube_clock // 2
    for port in ("gm_read", "l2_read"):
        assert slow.require(f"paths.{port}") == 2 * spec.require(f"paths.{port}")
    assert slow.peak("bfloat16") == spec.peak("bfloat16") // 2 and slow.memory_bandwidth == spec.memory_bandwidth
