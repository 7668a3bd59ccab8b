"""What collectives cost: against formulas worked by hand, bounds that no algorithm beats, and every kind of group."""

import random
import timeit

import pytest

from course_lib.chip import SpecError, SystemSpec, UnknownFigure, load_system, systems
from course_lib.chip.collectives import KINDS, gamma, group, link, transfer

PS = 1e12
MB, GB = 10**6, 10**9
NODES = {"mini-node": 4, "atlas-800t-a2": 8, "cloudmatrix384": 48, "dgx-h100": 8, "dgx-a100": 8, "h800-cluster": 8}


@pytest.fixture(params=NODES)
def system(request: pytest.FixtureRequest) -> SystemSpec:
    return load_system(request.param).having(nodes=NODES[request.param])


@pytest.fixture
def a2() -> SystemSpec:
    return load_system("atlas-800t-a2").having(nodes=8)


def algo(name: str, inside: str = "NA") -> str:
    return f"level0:{inside};level1:{name}"


# -- formulas by hand ---------------------------------------------------------------------------------------


def test_mesh_on_links_of_their_own(a2: SystemSpec) -> None:
    """Eight chips, each with 56 GB/s to each other; α = 1.2 µs."""
    n, beta, alpha = 256 * MB, 1 / 56e9, 1.2e-6
    found = transfer(a2, "all_gather", n, range(8))
    assert found.ps == round((alpha + n / 8 * beta) * PS) and found.algorithm == "mesh" and found.steps == 1
    reduced = 7 / 8 * n * gamma(a2.chip)
    found = transfer(a2, "all_reduce", n, range(8))
    assert found.ps == round((2 * alpha + 2 * n / 8 * beta + reduced) * PS) and found.bound == "HCCS"
    assert transfer(a2, "reduce_scatter", n, range(8)).ps == round((alpha + n / 8 * beta + reduced) * PS)
    assert transfer(a2, "send", n, (0, 5)).ps == round((alpha + n * beta) * PS), "one peer has one link"


def test_few_chips_of_a_mesh_are_slower_than_all(a2: SystemSpec) -> None:
    """Two chips share one link of 56 GB/s, eight use all seven: the same tensor takes four times as long."""
    pair, all_eight = (transfer(a2, "all_gather", GB, range(p)).ps for p in (2, 8))
    assert pair / all_eight == pytest.approx(4, rel=0.001)


def test_ring_between_nodes(a2: SystemSpec) -> None:
    """One rank in each of 8 nodes: RoCE only. 2 (p − 1) α + 2 (p − 1) / p nβ + (p − 1) / p nγ."""
    n, p, ranks = 64 * MB, 8, range(0, 64, 8)
    alpha, beta = 5.6e-6, 1 / (0.84 * 25e9)
    expected = 2 * (p - 1) * alpha + 2 * (p - 1) / p * n * beta + (p - 1) / p * n * gamma(a2.chip)
    found = transfer(a2, "all_reduce", n, ranks, algo("ring"))
    assert found.ps == round(expected * PS) and (found.algorithm, found.steps) == ("ring", 14)
    assert found.out_bytes == round(2 * 7 / 8 * n) and found.up_bytes == 0
    fewer = expected - 2 * (7 - 3) * alpha
    for name in ("NHR", "H-D_R", "NB"):
        assert transfer(a2, "all_reduce", n, ranks, algo(name)).ps == round(fewer * PS), name
    assert transfer(a2, "all_reduce", n, ranks).algorithm == "NHR", (
        "as HCCL chooses: fewest steps, ring before NHR before H-D_R"
    )
    assert transfer(a2, "all_reduce", n, range(0, 16, 8)).algorithm == "ring"


def test_halving_and_doubling_without_a_power_of_two(a2: SystemSpec) -> None:
    """Five nodes: one merges into another, four halve and double, one is told (HCCL's RHD.md)."""
    n, alpha, beta, c = 64 * MB, 5.6e-6, 1 / (0.84 * 25e9), gamma(a2.chip)
    ranks = range(0, 40, 8)
    expected = (2 * 2 + 2) * alpha + (2 * 3 / 4 + 2) * n * beta + (3 / 4 + 1) * n * c
    assert transfer(a2, "all_reduce", n, ranks, algo("H-D_R")).ps == round(expected * PS)
    pieces = 3 + 2  # ⌈5/2⌉ + ⌈5/4⌉ fifths
    expected = (1 + 2 + 1) * alpha + (1 + pieces / 5 + 1 / 5) * n * beta
    assert transfer(a2, "all_gather", n, ranks, algo("H-D_R")).ps == round(expected * PS)
    assert transfer(a2, "all_reduce", n, ranks).algorithm == "NHR", "which needs no power of two"


def test_hierarchy(a2: SystemSpec) -> None:
    """Two nodes of eight, each chip's eighth between them: inside, between, inside."""
    n, inside, between, c = 4 * MB, 1 / 56e9, 1 / (0.84 * 25e9), gamma(a2.chip)
    expected = 2 * 1.2e-6 + 2 * n / 8 * inside + 7 / 8 * n * c
    expected += 2 * 5.6e-6 + 2 / 2 * n / 8 * between + 1 / 2 * n / 8 * c
    found = transfer(a2, "all_reduce", n, range(16))
    assert found.ps == round(expected * PS) and found.algorithm == "mesh + ring"
    assert found.out_bytes == n // 8


def test_pipeline(a2: SystemSpec) -> None:
    """From 1 MiB a rank all-reduce is pipelined, from 32 KiB its halves: HCCL's thresholds."""
    n = 512 * MB
    block = n / 32
    slow, fast = 5.6e-6 + block / (0.84 * 25e9), 1.2e-6 + block / 56e9
    for kind, rounds, least in (("all_gather", 1, 2**15), ("reduce_scatter", 1, 2**15), ("all_reduce", 2, 2**20)):
        reduced = 31 / 32 * n * gamma(a2.chip) * (kind != "all_gather")
        assert transfer(a2, kind, n, range(32)).ps == round((rounds * (3 * max(slow, fast) + fast) + reduced) * PS)
        assert transfer(a2, kind, 32 * least, range(32)).algorithm == "pipeline"
        assert "mesh + " in transfer(a2, kind, 32 * least - 1, range(32)).algorithm
    assert transfer(a2, "all_reduce", 8, range(32), algo("pipeline")).algorithm == "pipeline"
    assert transfer(a2, "broadcast", n, range(32), algo("pipeline")).algorithm == "mesh + H-D_R", "which has none"


def test_unified_bus_reaches_all_nodes() -> None:
    cloud = load_system("cloudmatrix384")
    near, far = (transfer(cloud, "send", GB, (0, to)) for to in (15, 767))
    assert near.ps == round((1.2e-6 + 1 / (0.852 * 196)) * PS) and far.ps == round((1.9e-6 + 1 / (0.837 * 196)) * PS)
    assert far.bound == "UB" and transfer(cloud, "all_reduce", GB, range(768)).out_bytes == 0
    two = cloud.having(nodes=96)
    found = transfer(two, "all_reduce", GB, range(1536), "level0:NA;level1:ring;level2:NB")
    assert found.out_bytes > 0 and found.algorithm == "ring + NB", "ring over the nodes on UB, NB between supernodes"
    assert transfer(two, "all_reduce", GB, (0, 768), algo("NHR")).bound == "RoCE"


def test_all_to_all(a2: SystemSpec) -> None:
    n, rate = 128 * MB, 0.84 * 25e9
    assert transfer(a2, "all_to_all", n, range(8)).ps == round((1.2e-6 + n / 8 / 56e9) * PS)
    both = 1.2e-6 + n / 8 / 56e9 + 5.6e-6 + 3 / 4 * n / rate
    assert transfer(a2, "all_to_all", n, range(32)).ps == round(both * PS), "inside, then between"
    pairwise = transfer(a2, "all_to_all", n, range(32), algo("pairwise"))
    assert pairwise.ps == round((both + 2 * 5.6e-6) * PS) and pairwise.algorithm == "mesh + pairwise"
    h800 = load_system("h800-cluster")
    direct = transfer(h800, "all_to_all", n, range(32))
    assert direct.ps == round((3.7e-6 + 24 / 32 * n / 40e9) * PS) and direct.algorithm == "direct"
    assert direct.up_bytes == 7 * n // 32 and direct.up_ps == round(7 * n / 32 / 160e9 * PS), "both links at once"


# -- what holds for all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_more_takes_longer(system: SystemSpec, kind: str) -> None:
    for ranks in (
        ((0, 1), (0, system.chips - 1))
        if kind == "send"
        else (range(8), range(0, system.chips, 16), range(system.chips))
    ):
        for algorithm in (None, algo("ring"), algo("H-D_R"), algo("pipeline"), algo("pairwise")):
            times = [transfer(system, kind, n, ranks, algorithm).ps for n in (0, 1, 10**3, 10**6, 10**9, 10**12)]
            assert times == sorted(times) and times[0] > 0


def test_no_all_reduce_beats_its_ports(system: SystemSpec) -> None:
    """2 (p − 1) / p of the tensor has to leave a chip, and what it sends takes its ports their time."""
    rng = random.Random(1)
    for _ in range(200):
        p, n = rng.randrange(2, 65), rng.randrange(1, 10**10)
        ranks = tuple(rng.sample(range(system.chips), min(p, system.chips)))
        for kind in ("all_reduce", "reduce_scatter", "all_gather"):
            found = transfer(system, kind, n, ranks)
            ports = sum(link(system, key, near=True).port for key in ("scale_up", "scale_out"))
            least = (2 if kind == "all_reduce" else 1) * (len(ranks) - 1) / len(ranks) * n / ports
            assert found.ps >= round(least * PS)
            assert found.ps >= max(found.up_ps, found.out_ps)


def test_an_all_reduce_is_the_sum_of_its_halves(system: SystemSpec) -> None:
    """On one link, and in the pipeline. HCCL's hierarchy sends less between nodes than its halves would."""
    for ranks in (range(2), range(8), range(0, system.chips, system.reach), range(system.chips)):
        for n in (0, 10**5, 10**7, 10**10):
            whole, *halves = (
                transfer(system, kind, n, ranks).ps for kind in ("all_reduce", "reduce_scatter", "all_gather")
            )
            if len(ranks) <= 8 or n == 10**10:
                assert abs(whole - sum(halves)) <= 2


def test_random_ranks(system: SystemSpec) -> None:
    """Order does not matter, and a group says the same as its mirror image."""
    rng = random.Random(2)
    for _ in range(100):
        ranks = rng.sample(range(system.chips), rng.randrange(2, 33))
        kind, n = rng.choice(KINDS[:-2]), rng.randrange(10**9)
        found = transfer(system, kind, n, ranks)
        assert found == transfer(system, kind, n, tuple(sorted(ranks)))
        assert found == transfer(system, kind, n, tuple(system.chips - 1 - rank for rank in ranks))
        assert isinstance(found.ps, int) and found.ps > 0 and found.steps > 0 and found.algorithm


def test_uneven_nodes_lie_between_even_ones(a2: SystemSpec) -> None:
    """Eight ranks in one node and four in the next carry four parts between them; half full nodes carry as many.

    But for reduce-scatter and all-gather, where HCCL sends all between even nodes, to keep blocks contiguous.
    """
    for kind in ("all_reduce", "broadcast", "reduce", "scatter", "gather", "all_to_all"):
        uneven = transfer(a2, kind, GB, range(12))
        half = transfer(a2, kind, GB, (*range(4), *range(8, 12)), algo("NHR"))
        assert half.out_ps / 2.1 < uneven.out_ps < 2.1 * half.out_ps and uneven.ps > 0, kind
    alone = transfer(a2, "all_reduce", GB, range(9))
    assert alone.bound == "RoCE" and alone.out_bytes == GB, "the lone rank's card takes the whole tensor there and back"


def test_a_barrier_is_an_all_reduce_of_nothing(system: SystemSpec) -> None:
    ranks = range(system.chips)
    assert transfer(system, "barrier", 10**9, ranks).ps == transfer(system, "all_reduce", 0, ranks).ps
    assert transfer(system, "barrier", 0, ranks).bound == "latency"


def test_one_rank_alone(system: SystemSpec) -> None:
    for kind in KINDS:
        assert transfer(system, kind, GB, (3,)).ps == 0
    assert transfer(system, "all_to_all", 0, (3,), sizes=((5,),)).ps == 0


def test_every_system_has_what_it_needs() -> None:
    for name in systems():
        more = load_system(name)
        more = more.having(nodes=2 * -(-more.reach // more.chips_per_node))
        assert (
            transfer(more, "all_reduce", GB, range(more.chips)).ps > transfer(more, "all_reduce", GB, range(8)).ps > 0
        )


def test_known_ones_are_quick(a2: SystemSpec) -> None:
    ranks = tuple(range(64))
    transfer(a2, "all_reduce", GB, ranks)
    each = min(timeit.repeat(lambda: transfer(a2, "all_reduce", GB, ranks), number=100, repeat=5)) / 100
    assert each < 20e-6


# -- unequal parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [None, algo("pairwise")])
def test_equal_parts_as_sizes(system: SystemSpec, algorithm: str | None) -> None:
    for ranks in (range(4), range(0, system.chips, system.chips // 4), range(2 * system.chips_per_node), range(12)):
        p = len(ranks)
        sizes = tuple((MB,) * p for _ in range(p))
        assert transfer(system, "all_to_all", 0, ranks, algorithm, sizes) == transfer(
            system, "all_to_all", p * MB, ranks, algorithm
        )


def test_the_largest_part_decides(a2: SystemSpec) -> None:
    """Rank 0 sends 70 MB to rank 1 and a tenth to the others: the pair's link binds; on a switch, the port."""
    sizes = [[0] * 8 for _ in range(8)]
    sizes[0] = [10**9, 70 * MB, *(7 * MB for _ in range(6))]
    sizes = tuple(map(tuple, sizes))
    assert transfer(a2, "all_to_all", 0, range(8), None, sizes).ps == round((1.2e-6 + 70e6 / 56e9) * PS)
    found = transfer(load_system("h800-cluster"), "all_to_all", 0, range(8), None, sizes)
    assert found.ps == round((3.33e-6 + 112e6 / 160e9) * PS) and found.up_bytes == 112 * MB
    swapped = tuple(zip(*sizes))
    assert transfer(a2, "all_to_all", 0, range(8), None, swapped).ps == round((1.2e-6 + 70e6 / 56e9) * PS), "receiving"


def test_sizes_follow_their_ranks() -> None:
    """The same parts between the same chips, listed in another order."""
    rng = random.Random(3)
    for name in ("atlas-800t-a2", "h800-cluster"):
        system = load_system(name).having(nodes=4)
        for _ in range(20):
            ranks = rng.sample(range(system.chips), 16)
            sizes = {(a, b): rng.randrange(MB) for a in ranks for b in ranks}
            times = set()
            for order in (ranks, sorted(ranks), ranks[::-1]):
                rows = tuple(tuple(sizes[a, b] for b in order) for a in order)
                times.add(transfer(system, "all_to_all", 0, order, None, rows).out_bytes)
            assert len(times) == 1


# -- wrong questions ------------------------------------------------------------------------------------------


def test_errors_say_what_to_do(a2: SystemSpec) -> None:
    with pytest.raises(SpecError, match=r"rank 64: .*has 64 chips, 0 to 63; system.having\(nodes=9\) has enough"):
        transfer(a2, "all_reduce", 1, (0, 64))
    with pytest.raises(SpecError, match="rank -1"):
        transfer(a2, "all_reduce", 1, (-1, 0))
    for ranks in ((), (1, 1)):
        with pytest.raises(ValueError, match="expected at least one, and none twice"):
            transfer(a2, "all_reduce", 1, ranks)
    with pytest.raises(ValueError, match="no collective named 'allreduce'; there are all_reduce"):
        transfer(a2, "allreduce", 1, (0, 1))
    with pytest.raises(ValueError, match="-1 bytes"):
        transfer(a2, "all_reduce", -1, (0, 1))
    with pytest.raises(ValueError, match="send has two ranks"):
        transfer(a2, "send", 1, (0, 1, 2))
    for sizes in (((1,),), ((1, 2), (3,)), ((1, 2), (3, -4))):
        with pytest.raises(ValueError, match="expected 2 rows of 2 byte counts"):
            transfer(a2, "all_to_all", 1, (0, 1), None, sizes)
    with pytest.raises(ValueError, match="sizes go with all_to_all"):
        transfer(a2, "all_reduce", 1, (0, 1), None, ((1, 1), (1, 1)))


def test_an_unknown_link_is_not_guessed(a2: SystemSpec) -> None:
    from dataclasses import replace

    from course_lib.chip.figures import Figures

    figures = {key: figure for key, figure in a2.scale_out.figures.items() if key != "latency"}
    silent = replace(a2, scale_out=replace(a2.scale_out, figures=Figures(figures)))
    assert transfer(silent, "all_reduce", 1, range(8)).ps == transfer(a2, "all_reduce", 1, range(8)).ps
    with pytest.raises(UnknownFigure, match=r"scale_out.latency of .* unknown.*having\(scale_out__latency=…\)"):
        transfer(silent, "all_reduce", 1, (0, 8))
    assert transfer(silent.having(scale_out__latency=5.6e-6), "all_reduce", 1, (0, 8)) == transfer(
        a2, "all_reduce", 1, (0, 8)
    )
    with pytest.raises(UnknownFigure, match=r"has no \[scale_out\]"):
        transfer(replace(a2, scale_out=None), "all_reduce", 1, (0, 8))


def test_groups() -> None:
    cloud = load_system("cloudmatrix384").having(nodes=96)
    found = group(cloud, (0, 5, 15, 767, 768))
    assert (found.p, found.N, found.m, found.l, found.near) == (5, 2, 4, 1, False)
    assert group(cloud, (0, 15, 768)).near and group(cloud, range(0, 1536, 16)).m == 48


def test_a_ring_of_chips(a2: SystemSpec) -> None:
    """Wired in a ring, all goes round: an all-to-all part passes p / 2 chips on average."""
    from dataclasses import replace

    wired = replace(a2, scale_up=replace(a2.scale_up, topology="ring"))
    n, p = 64 * MB, 8
    assert transfer(wired, "all_gather", n, range(p)).ps == round((7 * 1.2e-6 + 7 / 8 * n / 56e9) * PS)
    found = transfer(wired, "all_to_all", n, range(p))
    assert found.ps == round((7 * 1.2e-6 + n * 7 / 2 / 56e9) * PS)
    for ranks in (range(8), range(16)):
        sizes = ((n // len(ranks),) * len(ranks),) * len(ranks)
        assert transfer(wired, "all_to_all", 0, ranks, None, sizes) == transfer(wired, "all_to_all", n, ranks)
    assert "pipeline" not in transfer(wired, "all_reduce", GB, range(64)).algorithm
