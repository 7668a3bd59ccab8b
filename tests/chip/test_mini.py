"""The wind-tunnel rule: chip `mini` keeps the dimensionless numbers of a real run (see data/chips/mini.toml)."""

from dataclasses import dataclass

import pytest

from course_lib.chip.cost import Matmul, Work, cost
from course_lib.chip.spec import ChipSpec, LinkSpec, load_chip, load_system

TOLERANCE = 0.15


@dataclass(frozen=True)
class Run:
    """A training run as far as the numbers need it: T tokens per step, widths D and F, on one of 8 chips."""

    chip: ChipSpec
    link: LinkSpec
    parameters: float
    T: int
    D: int
    F: int
    dtype: str
    size: int  # bytes per element
    shards: int  # chips over which states are spread

    @property
    def operands(self) -> int:
        return self.size * (self.T * self.D + self.D * self.F + self.T * self.F)

    @property
    def gemm_s(self) -> float:
        return 2 * self.T * self.D * self.F / self.chip.peak(self.dtype)

    @property
    def states(self) -> float:
        return 16 * self.parameters / self.shards


def run(system: str, *rest: object) -> Run:
    node = load_system(system)
    return Run(load_chip(node.chip), node.scale_up, *rest)


REAL = run("atlas-800t-a2", 6.74e9, 4096, 4096, 11008, "bfloat16", 2, 8)
MINI = run("mini-node", 0.75e6, 1024, 128, 352, "float32", 4, 1)


def intensity_over_ridge(r: Run) -> float:
    return (2 * r.T * r.D * r.F / r.operands) / (r.chip.peak(r.dtype) / r.chip.memory_bandwidth)


def launch_over_gemm(r: Run) -> float:
    return r.chip.launch_device / r.gemm_s


def states_over_memory(r: Run) -> float:
    return r.states / r.chip.memory_bytes


def operands_over_l2(r: Run) -> float:
    return r.operands / r.chip.l2_bytes


def l2_over_memory_bandwidth(r: Run) -> float:
    return r.chip.l2_bandwidth / r.chip.memory_bandwidth


def vector_over_memory_time(r: Run) -> float:
    """Of an elementwise operator that reads and writes one element per FLOP."""
    return (1 / r.chip.vector_rate(r.dtype)) / (2 * r.size / r.chip.memory_bandwidth)


def offload_over_step(r: Run) -> float:
    return (r.states / r.chip.host_bandwidth) / (6 * r.parameters * r.T / r.chip.peak(r.dtype))


def communication_over_computation(r: Run) -> float:
    """Sharded data parallelism: 3 transfers of all parameters per step against 6 FLOP per parameter and token."""
    return (3 * r.size / r.link.bandwidth) / (6 * r.T / r.chip.peak(r.dtype))


def cube_over_gemm(r: Run) -> float:
    """Share of the product's time in which the cube is at work."""
    paid = cost(r.chip, Work((Matmul(1, r.T, r.D, r.F, r.dtype),), bytes_read=r.operands))
    return paid.cube_ps / (paid.ps - paid.launch_ps)


NUMBERS = [
    intensity_over_ridge, launch_over_gemm, states_over_memory, operands_over_l2, l2_over_memory_bandwidth,
    vector_over_memory_time, offload_over_step, communication_over_computation, cube_over_gemm,
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.__name__)
def test_kept(number) -> None:
    assert number(MINI) == pytest.approx(number(REAL), rel=TOLERANCE)


def test_also_in_bfloat16() -> None:
    half = run("mini-node", 0.75e6, 1024, 128, 352, "bfloat16", 2, 1)
    for number in (intensity_over_ridge, vector_over_memory_time, communication_over_computation):
        assert number(half) == pytest.approx(number(MINI)), number.__name__


def test_the_file_states_what_is_not_kept() -> None:
    def tensor_parallel(r: Run) -> float:  # activations of T × D against 2 × T × D × F FLOP
        return (r.size / r.link.bandwidth) / (r.F / r.chip.peak(r.dtype))

    assert tensor_parallel(MINI) / tensor_parallel(REAL) == pytest.approx(8, rel=TOLERANCE)
    assert REAL.chip.vector_rate("bfloat16") / REAL.chip.peak("bfloat16") == pytest.approx(1 / 32)


def test_latency_over_gemm() -> None:
    cloud = load_system("cloudmatrix384").scale_up.figures["latency"]
    assert "1.2 inside a node" in cloud.source, "mini-node scales that figure"
    assert MINI.link.latency / MINI.gemm_s == pytest.approx(1.2e-6 / REAL.gemm_s, rel=TOLERANCE)


def test_the_two_runs_are_bound_alike() -> None:
    for r in (REAL, MINI):
        gemm = Work((Matmul(1, r.T, r.D, r.F, r.dtype),), bytes_read=r.operands)
        elements = r.T * r.F
        gelu = Work((), 8 * elements, r.dtype, r.size * elements, r.size * elements)
        assert cost(r.chip, gemm).bound in ("L1", "L2"), "the cube waits for operands, see `cube_over_gemm`"
        assert cost(r.chip, gelu).bound == "memory"
        assert cost(r.chip, Work((), 100, r.dtype, 400, 400)).bound == "launch"


def test_the_host_is_never_what_bounds() -> None:
    assert MINI.chip.launch_host <= MINI.chip.launch_device
