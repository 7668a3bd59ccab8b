"""Your own NPU: silicon and power against three dies, the chip that is priced, and a search that misses nothing."""

import time

import numpy as np
import pytest

from course_lib import plan
from course_lib.chip import UnknownFigure, load_chip
from course_lib.chip.figures import TAGS
from course_lib.plan import design as d
from course_lib.plan import explore
from course_lib.plan.design import Design

LLAMA = plan.load_model("llama-2-7b")
DECODE, TRAIN = explore.decode(LLAMA, 16, 2048), explore.train(LLAMA, 1, 4096, 64)
CLOCKS = [1.0e9, 1.3e9, 1.5e9, 1.8e9]
SMALL = d.grid(
    cores=[8, 12, 16, 20, 24, 40], clock=CLOCKS, l0c=[128, 256], stacks=[2, 3, 4, 6], link=[50e9, 2e11], l2=[32]
)


# -- silicon and power --------------------------------------------------------------------------------------


def test_dies() -> None:
    """One die sets what surrounds the parts; two are predictions: -0.2 % and -13.6 %. Power is predicted for all."""
    old, new, other = d.dies()
    assert old.calibrated and abs(old.error) < 1e-9 and not new.calibrated and not other.calibrated
    assert new.error == pytest.approx(-0.002, abs=0.001) and 665.61 in new.ours
    assert other.error == pytest.approx(-0.136, abs=0.001)
    assert [round(one.watts_error, 3) for one in (old, new, other)] == [-0.161, 0.037, 0.068]


def test_published_parts_of_the_910() -> None:
    """HPCA'21: 32 × (2.57 + 0.70 + 0.04) mm² and 32 × (3.13 + 0.46) W at 1 GHz; 54 MiB of buffers at 0.6 mm² each."""
    made = d.dies()[0].design
    found = d.parts(made)
    assert found["cube"] == pytest.approx(82.24) and found["vector"] == pytest.approx(23.68)
    assert found["buffers"] == pytest.approx(32 * (64 + 64 + 256 + 1024 + 256) / 1024 * (0.5625 + 0.64) / 2)
    busy = d.watts_by_part(made)
    assert busy["cube"] + busy["vector"] == pytest.approx(32 * 3.59)
    assert sum(found.values()) == pytest.approx(456.25) == d.area(made)


def test_every_constant_has_a_source() -> None:
    tables = d.table()
    rows = [*tables["core"].values(), *tables["power"].values(), *(tables[name] for name in ("sram", "hbm", "link"))]
    assert all(row["source"] and row["tag"] in TAGS and row["low"] <= row["high"] for row in rows)
    assert all(row["source"] for row in tables["die"]) and sum("calibrated" in row for row in tables["die"]) == 1


def test_power_goes_with_the_square_of_the_voltage() -> None:
    """Between 1.0 and 1.3 GHz with the clock alone; at 1.8 GHz (820/745)² more for each cycle."""
    low, knee, high = (d.watts_by_part(Design(clock=f * 1e9))["cube"] for f in (1.0, 1.3, 1.8))
    assert knee / low == pytest.approx(1.3) and high / low == pytest.approx(1.8 * (820 / 745) ** 2)
    with pytest.raises(UnknownFigure, match="unknown at|is unknown"):
        d.watts(Design(clock=2.4e9))


def test_the_range_of_an_area_holds_its_middle() -> None:
    for one in (Design(), Design(stacks=6), Design(cores=48, stacks=2, l2=32)):
        found = d.area_range(one)
        assert found.low < float(d.area(one)) < found.high and found.tag == "A"


# -- grids and chips ----------------------------------------------------------------------------------------


def test_grid_is_all_combinations() -> None:
    made = d.grid(cores=[8, 16, 24], tile=[(16, 16, 16), (32, 16, 32)], stacks=[2, 4])
    assert len(made) == 12 and len(Design()) == 1
    singles = [made[i] for i in range(12)]
    assert len(set(singles)) == 12 and singles[3] == Design(cores=8, tile=(32, 16, 32), stacks=4)
    assert d.area(made) == pytest.approx([d.area(one) for one in singles])
    assert d.watts(made) == pytest.approx([d.watts(one) for one in singles])
    assert made[np.array([3, 0])][0] == singles[3]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TypeError, match="a design has no cubes"):
        d.grid(cubes=[1])
    with pytest.raises(ValueError, match="cores of a design is 0; expected at least 1"):
        Design(cores=0)
    with pytest.raises(ValueError, match="link of a design is -1"):
        Design(link=-1)


def test_the_default_is_the_910b2() -> None:
    """Every figure that a design sets is what the 910B2's own file has, but for rounding of the bandwidth."""
    real, ours = load_chip("ascend-910b2"), d.chip(Design())
    for key in ours.figures:
        assert ours.figures.value(key) == real.figures.value(key), key
    assert ours.busy_power is None and ours.figures.value("energy.cube") is None


@pytest.mark.parametrize(("name", "width"), [("ascend-910b2", 32), ("ascend-950dt", 80), ("ascend-950pr", 32)])
def test_ports_to_hbm(name: str, width: int) -> None:
    """The 950PR's is published as 31."""
    spec = load_chip(name)
    made = Design(cores=spec.cube_cores, clock=spec.cube_clock, bandwidth=spec.memory_bandwidth)
    assert d.port(made) == width and abs(spec.require("paths.gm_read") - width) <= 1


# -- jobs ---------------------------------------------------------------------------------------------------


def test_jobs_count_what_the_closed_forms_count() -> None:
    """FLOPs of decode, prefill, and of training three times forward, with attention's five products for two."""
    for job, tokens, context in ((DECODE, 1, 2048), (explore.prefill(LLAMA, 1, 512), 512, 512)):
        batch = 16 if tokens == 1 else 1
        assert _flops(job) == plan.flops.total(plan.flops.forward(LLAMA, batch, tokens, context, absorbed=tokens == 1))
    parts = plan.flops.forward(LLAMA, 1, 4096)
    attention = parts["scores"] + parts["mix values"]
    assert _flops(TRAIN) == 3 * (plan.flops.total(parts) - attention) + 3.5 * attention
    assert TRAIN.sent == pytest.approx(6 * plan.count(LLAMA).total * 63 / 64)
    assert DECODE.held == 2 * plan.count(LLAMA).total + plan.memory.kv_cache(LLAMA, 16, 2048)


def _flops(job: explore.Job) -> int:
    return sum(2 * m.batch * m.m * m.k * m.n * times for work, times in job.works for m in work.matmuls)


def test_time_is_the_cost_models() -> None:
    """A decode step, operator by operator, as plan.operators prices it on the same chip."""
    spec = load_chip("ascend-910b2")
    rows = plan.operators.priced(LLAMA, spec, batch=16, tokens=1, context=2048)
    found = explore.price(Design(), [DECODE]).outcomes[0]
    assert found.seconds == pytest.approx(sum(row.ps for row in rows) / 1e12)
    assert found.bound == "memory" and sum(found.shares.values()) == pytest.approx(1)


def test_links_bind_when_sending_takes_longer() -> None:
    slow, fast = (explore.price(Design(link=rate), [TRAIN]).outcomes[0] for rate in (20e9, 400e9))
    assert slow.bound == "links" and slow.seconds == pytest.approx(TRAIN.sent / 20e9)
    assert fast.bound != "links" and fast.seconds < slow.seconds


# -- search -------------------------------------------------------------------------------------------------


def test_no_design_is_faster_than_its_bound() -> None:
    for job in (DECODE, TRAIN):
        least = explore.bound(job, SMALL)
        for place in range(0, len(SMALL), 5):
            assert least[place] <= explore.price(SMALL[place], [job]).seconds[0] * (1 + 1e-9)


@pytest.mark.parametrize("silicon", [False, True])
def test_front_is_that_of_pricing_all(silicon: bool) -> None:
    jobs = [DECODE] if silicon else [DECODE, TRAIN]
    inside = explore.within(SMALL, jobs, 330, 210)
    every = [explore.price(inside[i], jobs) for i in range(len(inside))]
    points = [(*one.seconds, *([float(d.area(one.design))] * silicon)) for one in every]
    kept = {p for p in points if not any(explore.beats(q, p) and q != p for q in points)}
    found = explore.front(jobs, inside, silicon)
    assert {(*one.seconds, *([float(d.area(one.design))] * silicon)) for one in found} == kept
    assert [one.seconds for one in found] == sorted(one.seconds for one in found) and len(found) > 1


def test_best_is_the_fastest_and_then_the_smallest() -> None:
    inside = explore.within(SMALL, [TRAIN], 500, 400)
    every = [(explore.price(inside[i], [TRAIN]).seconds[0], float(d.area(inside[i]))) for i in range(len(inside))]
    found = explore.best(TRAIN, inside)
    assert (found.seconds[0], float(d.area(found.design))) == min(every)


def test_within_keeps_to_its_budget() -> None:
    inside = explore.within(SMALL, [DECODE, TRAIN], 330, 210)
    assert np.all(d.area(inside) <= 330) and np.all(d.watts(inside) <= 210)
    assert np.all(inside.memory >= DECODE.held) and 0 < len(inside) < len(SMALL)
    with pytest.raises(ValueError, match="none of 384 designs has 31 GB within 100 mm² and 50 W"):
        explore.within(SMALL, [DECODE], 100, 50)


def test_the_best_for_one_is_not_the_best_for_the_other() -> None:
    """On half the silicon and power of a 910B2: memory for decode; more, slower cores for training."""
    whole = Design()
    half = explore.within(SMALL, [DECODE, TRAIN], float(d.area(whole)) / 2, float(d.watts(whole)) / 2)
    writer, learner = explore.best(DECODE, half).design, explore.best(TRAIN, half).design
    assert writer.stacks > learner.stacks and writer.peak < learner.peak
    crossed = [explore.price(one, [DECODE, TRAIN]).seconds for one in (writer, learner)]
    assert crossed[0][0] < 0.75 * crossed[1][0] and crossed[1][1] < 0.95 * crossed[0][1]


def test_thousands_in_seconds() -> None:
    """Silicon, power and bounds of all; the cost model for those that could win. The bound leaves room for a slow machine."""
    sizes = {"clock": CLOCKS, "l0c": [128, 256], "l2": [32, 96, 192], "stacks": [2, 3, 4, 5, 6]}
    made = d.grid(cores=list(range(6, 50, 2)), **sizes, link=[50e9, 100e9, 200e9])
    start = time.perf_counter()
    found = explore.front([DECODE, TRAIN], explore.within(made, [DECODE, TRAIN], 326, 207))
    took = time.perf_counter() - start
    print(f"{len(made):,} designs, {len(found)} on the front, {took:.2f} s")
    assert len(made) == 7920 and len(found) >= 4 and took < 20
