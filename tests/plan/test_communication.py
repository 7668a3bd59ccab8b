"""plan.communication: the same as the emulator's collectives to a picosecond, for whole arrays."""

import itertools
import time

import numpy as np
import pytest

from course_lib.chip import SpecError, SystemSpec, load_system
from course_lib.chip.collectives import KINDS, transfer
from course_lib.plan.communication import seconds, volume

CHIPS = 1536
SYSTEMS = ("mini-node", "atlas-800t-a2", "cloudmatrix384", "dgx-h100")
ALGORITHMS = (None, "level0:NA;level1:ring", "level0:NA;level1:H-D_R", "level0:NA;level1:pipeline", "level0:ring;level1:NB",
              "level0:NA;level1:pairwise")  # fmt: skip


def large(name: str) -> SystemSpec:
    system = load_system(name)
    return system.having(nodes=CHIPS // system.chips_per_node)


def regular(system: SystemSpec, P: int, stride: int) -> bool:
    """Whether P ranks so far apart lie as the closed forms assume: as many in each network, but for the last."""
    last = (P - 1) * stride
    return last < system.chips and (system.reach % stride == 0 or stride >= system.reach or last < system.reach)


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_the_emulator(name: str, kind: str) -> None:
    system, sizes = large(name), (0, 8, 10**5, 2**20 + 1, 2**25, 10**10)
    for P, stride, algorithm in itertools.product((1, 2, 3, 5, 8, 12, 24, 100, 1024), (1, 2, 4, 8, 16, 24), ALGORITHMS):
        if regular(system, P, stride) and (kind != "send" or P <= 2):
            found = seconds(system, kind, np.array(sizes), P, stride, algorithm)
            ranks = range(0, P * stride, stride)
            assert [round(s * 1e12) for s in found] == [transfer(system, kind, n, ranks, algorithm).ps for n in sizes]


def test_arrays_broadcast() -> None:
    system, n, P = large("atlas-800t-a2"), np.array([[10**3], [10**6], [10**9]]), np.array([1, 2, 8, 64, 100])
    found = seconds(system, "all_reduce", n, P, 2)
    assert found.shape == (3, 5) and (found[:, 0] == 0).all()
    for i, j in np.ndindex(found.shape):
        assert found[i, j] == seconds(system, "all_reduce", int(n[i, 0]), int(P[j]), 2)
    assert isinstance(seconds(system, "all_reduce", 1, 8), float)
    assert seconds(system, "all_reduce", np.array([]), 8).shape == (0,)


def test_more_chips_pay_more_latency() -> None:
    """Ring: 2 (p − 1) α + 2 (p − 1) / p nβ + (p − 1) / p nγ: nothing but latency grows without end."""
    system = large("atlas-800t-a2")
    P = np.arange(2, 192)
    found = seconds(system, "all_reduce", 0, P, 8, "level0:NA;level1:ring")
    np.testing.assert_allclose(found, 2 * (P - 1) * 5.6e-6)
    large_n = seconds(system, "all_gather", 10**10, P, 8, "level0:NA;level1:ring")
    np.testing.assert_allclose(large_n, (P - 1) * 5.6e-6 + (P - 1) / P * 10**10 / 21e9)


def test_the_node_is_where_tensor_parallelism_lives() -> None:
    for name in SYSTEMS[1:]:
        system = large(name)
        inside, across = (seconds(system, "all_reduce", 10**8, 2, stride) for stride in (1, system.reach))
        assert across > 2 * inside, name


def test_volume() -> None:
    P = np.array([1, 2, 4, 8])
    np.testing.assert_allclose(volume("all_reduce", 8.0, P), [0, 8, 12, 14])
    np.testing.assert_allclose(
        volume("reduce_scatter", 8.0, P) + volume("all_gather", 8.0, P), volume("all_reduce", 8.0, P)
    )
    assert volume("all_to_all", 100, 4) == 75 and volume("send", 100, 2) == 100 and volume("barrier", 100, 4) == 0
    assert volume("send", 100, 1) == 0
    with pytest.raises(ValueError, match="no collective named 'allreduce'"):
        volume("allreduce", 1, 2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("send", "barrier")])
def test_volume_is_what_the_emulator_sends(kind: str) -> None:
    system, n = large("atlas-800t-a2"), 10**6
    for P, stride in ((8, 1), (4, 2), (16, 8)):
        found = transfer(system, kind, n, range(0, P * stride, stride))
        assert found.up_bytes + found.out_bytes == round(volume(kind, n, P))


def test_a_hundred_thousand_at_once() -> None:
    system, rng = load_system("atlas-800t-a2").having(nodes=2048), np.random.default_rng(0)
    n, P, stride = rng.integers(0, 2**30, 10**5), rng.integers(1, 1000, 10**5), 2 ** rng.integers(0, 4, 10**5)
    for kind in KINDS[:-2]:
        took = []
        for _ in range(3):
            start = time.process_time()
            seconds(system, kind, n, P, stride)
            took.append(time.process_time() - start)
        assert min(took) < 0.1, kind


def test_wrong_questions() -> None:
    system = load_system("atlas-800t-a2")
    with pytest.raises(SpecError, match=r"rank 14: .* 8 chips; system.having\(nodes=2\)"):
        seconds(system, "all_reduce", 1, 8, 2)
    for members, stride, n in ((0, 1, 1), (2, 0, 1), (2, 1, -1)):
        with pytest.raises(ValueError, match="members and stride are 1 or more, bytes 0 or more"):
            seconds(system, "all_reduce", n, members, stride)
    with pytest.raises(ValueError, match="stride 3: expected one that divides 8"):
        seconds(system.having(nodes=4), "all_reduce", 1, 8, 3)
    with pytest.raises(ValueError, match="send has two ranks"):
        seconds(system, "send", 1, 3)
    with pytest.raises(ValueError, match="no collective named 'sum'"):
        seconds(system, "sum", 1, 3)
    with pytest.raises(ValueError, match="HCCL_ALGO"):
        seconds(system, "all_reduce", 1, 3, 1, "fast")
