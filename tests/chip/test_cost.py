"""Costs, checked by hand on a toy chip on which a picosecond is easy to count."""

import dataclasses
from pathlib import Path

import pytest

from course_lib.chip.cost import Matmul, UnsupportedDtype, Work, cost
from course_lib.chip.figures import UnknownFigure
from course_lib.chip.spec import ChipSpec, load_chip

# 2 cube cores of 16 × 16 × 16 at 1 GHz; vector 2 × 8 lanes × 2 at 1 GHz in float32; 1 GB/s; 1 µs start-up; 3 W
TOY = """
name = "toy"
title = "Toy"
vendor = "test"
[cube]
cores = { value = 2, unit = "1", tag = "A", source = "test" }
clock = { value = 1, unit = "GHz", tag = "A", source = "test" }
[cube.tile]
float16 = { value = [16, 16, 16], unit = "MAC/cycle", tag = "A", source = "test" }
int8 = { value = [16, 32, 16], unit = "MAC/cycle", tag = "A", source = "test" }
[vector]
cores = { value = 2, unit = "1", tag = "A", source = "test" }
width = { value = 32, unit = "B/cycle", tag = "A", source = "test" }
flop_per_lane = { value = 2, unit = "FLOP/cycle", tag = "A", source = "test" }
dtypes = { value = ["float16", "float32"], unit = "dtype", tag = "A", source = "test" }
[memory]
bandwidth = { value = 1, unit = "GB/s", tag = "A", source = "test" }
[launch]
device = { value = 1, unit = "us", tag = "A", source = "test" }
[host_link]
bandwidth = { value = 0.5, unit = "GB/s", tag = "A", source = "test" }
[power]
busy = { value = 3.5, unit = "W", tag = "A", source = "test" }
"""
US = 10**6  # picoseconds


@pytest.fixture
def toy(tmp_path: Path) -> ChipSpec:
    (tmp_path / "toy.toml").write_text(TOY, encoding="utf-8")
    return load_chip(tmp_path / "toy.toml")


def product(m: int, k: int, n: int, dtype: str = "float16", batch: int = 1) -> Work:
    return Work(matmuls=(Matmul(batch, m, k, n, dtype),))


def test_cube_by_hand(toy: ChipSpec) -> None:
    # 64 × 64 outputs are 16 tiles, 8 on each core; each needs 1024/16 = 64 cycles of 1 ns
    paid = cost(toy, product(64, 1024, 64))
    assert paid.cube_ps == 8 * 64 * 1000
    assert paid.cube_flops == 2 * 64 * 1024 * 64
    assert paid.ps == paid.launch_ps + paid.cube_ps == US + 512_000


def test_tiles_are_paid_whole(toy: ChipSpec) -> None:
    sixteen, seventeen, thirty_two = (cost(toy, product(32, 256, n)).cube_ps for n in (16, 17, 32))
    assert seventeen == thirty_two == 2 * sixteen
    assert cost(toy, product(32, 257, 16)).cube_ps == 17_000, "K is rounded up too"


def test_the_last_round_leaves_cores_idle(toy: ChipSpec) -> None:
    assert cost(toy, product(16, 256, 16)).cube_ps == cost(toy, product(32, 256, 16)).cube_ps == 16_000
    assert cost(toy, product(48, 256, 16)).cube_ps == 32_000, "3 tiles on 2 cores are 2 rounds"


def test_a_batch_shares_the_cores(toy: ChipSpec) -> None:
    assert cost(toy, product(16, 256, 16, batch=2)).cube_ps == 16_000
    assert cost(toy, product(16, 256, 16, batch=5)).cube_ps == 48_000


def test_products_add_up(toy: ChipSpec) -> None:
    two = Work(matmuls=(Matmul(1, 32, 256, 16, "float16"), Matmul(1, 32, 256, 16, "int8")))
    paid = cost(toy, two)
    assert paid.cube_ps == 16_000 + 8_000, "int8 is twice as deep"
    assert paid.cube_flops == 2 * (2 * 32 * 256 * 16)


def test_vector_memory_and_host_link_by_hand(toy: ChipSpec) -> None:
    assert cost(toy, Work(vector_flops=16)).vector_ps == 1000, "one instruction on each of 16 lanes"
    assert cost(toy, Work(vector_flops=17)).vector_ps == 1063, "17 / 16 of a cycle is 1062.5 ps, rounded up"
    assert cost(toy, Work(vector_flops=32, vector_dtype="float16")).vector_ps == 1000
    assert cost(toy, Work(vector_flops=16, vector_dtype="bfloat16")).vector_ps == 1000, "by way of float32"
    paid = cost(toy, Work(bytes_read=3000, bytes_written=1000))
    assert (paid.memory_ps, paid.bytes, paid.ps) == (4 * US, 4000, 5 * US)
    assert cost(toy, Work(link_bytes=1000)).host_link_ps == 2 * US


@pytest.mark.parametrize(
    "bound, work",
    [
        ("cube", product(512, 512, 512)),
        ("vector", Work(vector_flops=10**9)),
        ("memory", Work(vector_flops=1000, bytes_read=4000, bytes_written=4000)),
        ("host link", Work(link_bytes=4000, bytes_written=4000)),
        ("launch", product(16, 16, 16)),
        ("launch", Work()),
    ],
)
def test_bound_names_the_largest(bound: str, work: Work, toy: ChipSpec) -> None:
    assert cost(toy, work).bound == bound


def test_units_overlap(toy: ChipSpec) -> None:
    work = dataclasses.replace(product(512, 512, 512), vector_flops=10**6, bytes_read=10**4)
    paid = cost(toy, work)
    assert paid.ps == paid.launch_ps + max(paid.cube_ps, paid.vector_ps, paid.memory_ps)
    assert min(paid.cube_ps, paid.vector_ps, paid.memory_ps) > 0


def test_what_the_cube_lacks_goes_to_the_vector_cores(toy: ChipSpec) -> None:
    paid = cost(toy, product(64, 64, 64, "float32"))
    assert (paid.bound, paid.cube_flops, paid.cube_ps) == ("vector", 0, 0)
    assert paid.vector_flops == 2 * 64**3 and paid.vector_ps == 2 * 64**3 * 1000 // 32, "fused multiply-adds"
    elementwise = cost(toy, Work(vector_flops=2 * 64**3))
    assert elementwise.vector_flops == paid.vector_flops and elementwise.vector_ps == 2 * paid.vector_ps


def test_what_both_lack_is_an_error(toy: ChipSpec) -> None:
    with pytest.raises(UnsupportedDtype, match="Toy has no matrix .* bfloat16.*use one of float32, float16, int8"):
        cost(toy, product(16, 16, 16, "bfloat16"))
    with pytest.raises(UnsupportedDtype, match="Ascend 910 has no matrix product in bfloat16"):
        cost(load_chip("ascend-910a"), product(16, 16, 16, "bfloat16"))


def test_energy_is_power_times_time_or_unknown(toy: ChipSpec) -> None:
    paid = cost(toy, Work(vector_flops=33))
    assert paid.energy_pj == -(-35 * paid.ps // 10) == 3_507_221
    assert cost(load_chip("mini"), Work(vector_flops=33)).energy_pj is None


def test_without_tiles_the_published_peak_counts() -> None:
    paid = cost(load_chip("a100"), product(17, 17, 17, "bfloat16"))
    assert paid.cube_flops == 2 * 17**3 and paid.cube_ps == -(-2 * 17**3 * 10**12 // (312 * 10**12))
    assert cost(load_chip("a100"), product(4096, 4096, 4096, "float32")).bound == "vector", "TF32 is off"
    assert cost(load_chip("a100"), product(4096, 4096, 4096, "tf32")).bound == "cube"


def test_unknown_is_asked_for_only_when_needed() -> None:
    chip = load_chip("ascend-310")
    assert cost(chip, product(256, 256, 256)).bound == "cube"
    with pytest.raises(UnknownFigure, match="memory_bandwidth of Ascend 310 is unknown"):
        cost(chip, Work(bytes_read=1))
    with pytest.raises(UnknownFigure, match="host_bandwidth of Ascend 310 is unknown"):
        cost(chip, Work(link_bytes=1))


def test_everything_is_an_integer(toy: ChipSpec) -> None:
    paid = cost(toy, Work((Matmul(3, 17, 33, 65, "float16"),), 12345, "float32", 6789, 1011, 1213))
    assert {name: type(value) for name, value in dataclasses.asdict(paid).items() if name != "bound"} == {
        field.name: int for field in dataclasses.fields(paid) if field.name != "bound"
    }


def test_equal_work_is_one_key() -> None:
    assert len({product(1, 2, 3), product(1, 2, 3), product(3, 2, 1)}) == 2
