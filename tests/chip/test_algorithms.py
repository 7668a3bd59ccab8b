"""HCCL_ALGO: what a value asks for, and what a malformed one says."""

import pytest

from course_lib.chip import SystemSpec, load_system
from course_lib.chip.algorithms import parse
from course_lib.chip.collectives import transfer

GB = 10**9


@pytest.fixture
def a2() -> SystemSpec:
    return load_system("atlas-800t-a2").having(nodes=8)


def algo(name: str) -> str:
    return f"level0:NA;level1:{name}"


def test_per_operator(a2: SystemSpec) -> None:
    value = "allreduce=level0:NA;level1:ring/alltoall=level0:NA;level1:pairwise"
    ranks = range(0, 64, 8)
    assert transfer(a2, "all_reduce", GB, ranks, value).algorithm == "ring"
    assert transfer(a2, "all_to_all", GB, ranks, value).algorithm == "pairwise"
    assert transfer(a2, "all_gather", GB, ranks, value).algorithm == "NHR", "not named: as HCCL chooses"
    assert transfer(a2, "all_reduce", GB, ranks, algo("pairwise")).algorithm == "NHR", "does not fit the operator"
    assert transfer(a2, "all_reduce", GB, range(8), algo("ring")).algorithm == "mesh", "level1 is between nodes"
    assert transfer(a2, "all_reduce", GB, range(8), "level0:ring").algorithm == "ring"
    assert parse("level0:NA;level1:H-D_R")["broadcast"] == {"level0": "NA", "level1": "H-D_R"}


@pytest.mark.parametrize(
    "value",
    ["", "ring", "level1", "level1:", "level1:mesh", "level0:NA;level1:Ring", "level3:ring", "level0:NA,level1:ring",
     "level1:ring;level1:NHR", "level1:NHR_V1", "allreduce=", "allreduce=level1:ring/", "all_reduce=level1:ring",
     "allreduce=level1:ring/allreduce=level1:NHR", "level1:ring/level1:NHR"],
)  # fmt: skip
def test_malformed(a2: SystemSpec, value: str) -> None:
    if value:
        with pytest.raises(ValueError, match="HCCL_ALGO: "):
            transfer(a2, "all_reduce", 1, range(8), value)
    else:
        assert transfer(a2, "all_reduce", 1, range(8), value) == transfer(a2, "all_reduce", 1, range(8)), "not set"
