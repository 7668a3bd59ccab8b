"""What a collective costs on one link, and on two in turn: closed forms in α (latency), β (1 / bandwidth) and γ (reduction).

n bytes, p ranks, one step: α + bytes sent / bandwidth; a byte that is reduced costs γ more. Formulas: HCCL user guide,
coll_algo_intro (Mesh, Ring, NHR, RHD, Pipeline). All take numbers or NumPy arrays, element by element.

    reduce-scatter by mesh      α + n/p·β + (p−1)/p·nγ
    by ring                     (p−1)α + (p−1)/p·n(β+γ)
    by NHR, NB, H-D_R at 2^k    ⌈log₂ p⌉α + (p−1)/p·n(β+γ)

All-gather, scatter and gather are the same without γ. An all-reduce is reduce-scatter and all-gather, a broadcast scatter
and all-gather, a reduce reduce-scatter and gather. In a mesh each peer has a link of its own: β is that of a peer, or of
the port shared by p − 1. Elsewhere a chip sends to one peer at a time.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import numpy as np

Number = int | float | np.ndarray
Names = tuple[int, int]  # codes of the algorithms asked for, inside and between nodes; 0: none
NAMES = ("", "mesh", "ring", "NHR", "H-D_R", "NB", "pipeline", "pairwise", "direct")  # a code is a place in this list
MESH, RING, NHR, HD, NB, PIPELINE, PAIRWISE, DIRECT = range(1, 9)
BETWEEN = 16  # algorithm = code inside + 16 × code between
POWERS = 2 ** np.arange(40)
SCATTERED = ("reduce_scatter", "all_gather", "all_reduce")  # HCCL prices NHR for these, and has a pipeline


class Link(NamedTuple):
    """A link as the formulas see it: seconds and achieved B/s; ``peer`` is the most that one pair gets."""

    name: str
    mesh: bool
    ring: bool
    alpha: float
    port: float
    peer: float
    out: bool


class Terms(NamedTuple):
    """Where the seconds go (their sum is the duration), what passes the busiest chip's ports, and by which algorithm."""

    latency: Number = 0.0
    up: Number = 0.0
    out: Number = 0.0
    reduction: Number = 0.0
    up_bytes: Number = 0.0
    out_bytes: Number = 0.0
    steps: Number = 0
    algorithm: Number = 0

    @property
    def seconds(self) -> Number:
        return self.latency + self.up + self.out + self.reduction


def both(*parts: Terms) -> Terms:
    """One after the other; the algorithm is that of the last part that names one, inside and between alike."""
    sums = [sum(column) for column in zip(*(part[:-1] for part in parts))]
    inside = reduce(np.maximum, (part.algorithm % BETWEEN for part in parts))
    between = reduce(np.maximum, (part.algorithm // BETWEEN for part in parts))
    return Terms(*sums, inside + BETWEEN * between)


def pick(mask: np.ndarray, yes: Terms, no: Terms) -> Terms:
    """``yes`` where the mask is true, else ``no``."""
    return Terms(*(np.where(mask, a, b) for a, b in zip(yes, no)))


def quickest(options: list[Terms]) -> Terms:
    """The option of least time, the first of equals."""
    best = options[0]
    for option in options[1:]:
        best = pick(option.seconds < best.seconds, option, best)
    return best


def log_steps(p: Number) -> np.ndarray:
    """⌈log₂ p⌉."""
    return np.searchsorted(POWERS, p)


def _terms(link: Link, code: int, steps: Number, seconds: Number, sent: Number, reduction: Number = 0.0) -> Terms:
    if link.out:
        return Terms(link.alpha * steps, 0.0, seconds, reduction, 0.0, sent, steps, code * BETWEEN)
    return Terms(link.alpha * steps, seconds, 0.0, reduction, sent, 0.0, steps, code)


# -- one link: p ranks, n bytes -------------------------------------------------------------------------------


def mesh(kind: str, n: Number, p: Number, link: Link, gamma: float, code: int = MESH) -> Terms:
    """All peers at once."""
    some = np.asarray(p) > 1
    rate = np.minimum(link.peer, link.port / np.maximum(np.asarray(p) - 1, 1))
    once, share = some * (n / p) / rate, (p - 1) / p * n
    rounds = 2 if kind in ("all_reduce", "broadcast", "reduce") else 1
    reduced = share if kind in ("all_reduce", "reduce_scatter", "reduce") else 0
    return _terms(link, code, rounds * some, rounds * once, rounds * share, gamma * reduced)


def by_steps(kind: str, n: Number, p: Number, link: Link, gamma: float, code: int, steps: Number) -> Terms:
    """One peer at a time, each step on what the steps before have left or gathered."""
    rounds = 2 if kind in ("all_reduce", "broadcast", "reduce") else 1
    share = (p - 1) / p * n
    reduced = share if kind in ("all_reduce", "reduce_scatter", "reduce") else 0
    rate = min(link.peer, link.port)
    return _terms(link, code, rounds * steps, rounds * share / rate, rounds * share, gamma * reduced)


def ring(kind: str, n: Number, p: Number, link: Link, gamma: float) -> Terms:
    """Each passes on what it has received."""
    return by_steps(kind, n, p, link, gamma, RING, np.asarray(p) - 1)


def nhr(kind: str, n: Number, p: Number, link: Link, gamma: float, code: int = NHR) -> Terms:
    """Nonuniform hierarchical ring: log₂ p steps for any p. Nonuniform Bruck has the same cost."""
    return by_steps(kind, n, p, link, gamma, code, log_steps(p))


def halving(kind: str, n: Number, p: Number, link: Link, gamma: float) -> Terms:
    """Recursive halving and doubling; with p no power of two, the ranks beyond 2^k first merge into others."""
    even = by_steps(kind, n, p, link, gamma, HD, log_steps(p))
    if kind in ("scatter", "gather"):
        return even
    k = np.searchsorted(POWERS, p, side="right") - 1
    block = POWERS[k]
    steps, sent, reduced = _merged(kind, n, np.asarray(p), k, (block - 1) / block)
    odd = _terms(link, HD, steps, sent / min(link.peer, link.port), sent, gamma * reduced)
    return pick(block == p, even, odd)


def _merged(kind: str, n: Number, p: np.ndarray, k: np.ndarray, share: np.ndarray) -> tuple[Number, Number, Number]:
    """Steps, bytes sent and bytes reduced of halving and doubling where p is no power of two."""
    if kind in ("reduce_scatter", "all_gather"):
        pieces = sum(np.where(i <= k, -(-p // POWERS[i]), 0) for i in range(1, int(k.max()) + 1))
        return k + 2, n + (pieces + 1) * n / p, (n + pieces * n / p) * (kind == "reduce_scatter")
    last = 2 if kind == "all_reduce" else 1
    return 2 * k + last, (2 * share + last) * n, (share + 1) * n * (kind in ("all_reduce", "reduce"))


STEPPED: dict[int, Callable[..., Terms]] = {
    RING: ring, NHR: nhr, HD: halving, NB: lambda *given: nhr(*given, code=NB),
}  # fmt: skip


def one_link(kind: str, n: Number, p: Number, link: Link, gamma: float, named: int = 0) -> Terms:
    """The algorithm ``named``, or as HCCL chooses by itself: mesh where each peer has its link, else the quickest."""
    if kind == "all_to_all":
        return _exchange(n, p, link, named)
    named = RING if link.ring else named
    if named in STEPPED:
        return STEPPED[named](kind, n, p, link, gamma)
    if link.mesh or named == MESH:
        return mesh(kind, n, p, link, gamma)
    codes = (RING, NHR, HD) if kind in SCATTERED else (RING, HD)
    return quickest([STEPPED[code](kind, n, p, link, gamma) for code in codes])


def _exchange(n: Number, p: Number, link: Link, named: int) -> Terms:
    """All-to-all: to all at once, to one after the other, or round a ring, where parts pass p / 2 ranks on average."""
    if link.ring:
        sent = (p - 1) * n / 2
        return _terms(link, RING, np.asarray(p) - 1, sent / min(link.peer, link.port), sent)
    if named == PAIRWISE:
        return by_steps("all_to_all", n, p, link, 0, PAIRWISE, np.asarray(p) - 1)
    return mesh("all_to_all", n, p, link, 0, MESH if link.mesh else DIRECT)


# -- two links: N nodes of m ranks, the smallest of l -----------------------------------------------------------------


def two_links(
    kind: str, n: Number, p: Number, N: Number, m: Number, up: Link, out: Link, gamma: float, named: Names = (0, 0)
) -> Terms:
    """Nodes of equally many ranks: inside and between in turn, or both links at once (pipeline, direct).

    HCCL's thresholds are fixed, so where they change the algorithm, more bytes may take less time.
    """
    if kind == "all_to_all" and not (up.mesh or up.ring):
        return apart(n, p, m, m, up, out, named[1])
    first, middle, last = stages(kind, n, n / m, n / N)
    parts = [one_link(*first, m, up, gamma, named[0])] if first else []
    parts += [one_link(*middle, N, out, gamma, named[1])]
    parts += [one_link(*last, m, up, gamma, named[0])] if last else []
    staged = both(*parts)
    if kind not in SCATTERED or up.ring or (named != (0, 0) and named[1] != PIPELINE):
        return staged
    least = 2**20 if kind == "all_reduce" else 2**15  # HCCL's thresholds, bytes of one rank's share
    return pick((n / p >= least) | (named[1] == PIPELINE), pipeline(kind, n, p, N, m, up, out, gamma), staged)


def stages(kind: str, n: Number, lane: Number, node: Number) -> tuple:
    """What is done inside, between, inside: kinds and bytes. HCCL's order keeps each rank's blocks contiguous."""
    return {
        "all_reduce": (("reduce_scatter", n), ("all_reduce", lane), ("all_gather", n)),
        "broadcast": (("scatter", n), ("broadcast", lane), ("all_gather", n)),
        "reduce": (("reduce_scatter", n), ("reduce", lane), ("gather", n)),
        "reduce_scatter": ((), ("reduce_scatter", n), ("reduce_scatter", node)),
        "all_gather": (("all_gather", node), ("all_gather", n), ()),
        "scatter": ((), ("scatter", n), ("scatter", node)),
        "gather": (("gather", node), ("gather", n), ()),
        "all_to_all": (("all_to_all", n), ("all_to_all", n), ()),
    }[kind]


def pipeline(kind: str, n: Number, p: Number, N: Number, m: Number, up: Link, out: Link, gamma: float) -> Terms:
    """A ring between nodes; what has arrived goes round inside while the next is on its way.

    The guide's formula leaves reduction out; here it counts as in all others, or else two nodes could beat one.
    """
    block = n / p
    inside = block / np.minimum(up.peer, up.port / np.maximum(np.asarray(m) - 1, 1))
    between = block / min(out.peer, out.port)
    slower = between + out.alpha >= inside + up.alpha
    rounds, hops = (2 if kind == "all_reduce" else 1), N - 1
    return Terms(
        rounds * (hops * np.where(slower, out.alpha, up.alpha) + up.alpha),
        rounds * (np.where(slower, 0, hops * inside) + inside),
        rounds * np.where(slower, hops * between, 0),
        gamma * (p - 1) * block * (kind != "all_gather"),
        rounds * (m - 1) * N * block,
        rounds * hops * block,
        rounds * N,
        PIPELINE * BETWEEN,
    )


def apart(n: Number, p: Number, most: Number, least: Number, up: Link, out: Link, named: int = 0) -> Terms:
    """All-to-all straight to every rank, on both links at once; pairwise: one rank after the other."""
    inside, between = (most - 1) / p * n, (p - least) / p * n
    up_s, out_s = np.maximum(inside / up.port, n / p / up.peer * (np.asarray(most) > 1)), between / out.port
    if named == PAIRWISE:  # in each step some pair is of two nodes
        steps, rate = p - 1, min(out.peer, out.port, up.peer, up.port)
        return Terms(
            steps * max(up.alpha, out.alpha), 0.0, steps * n / p / rate, 0.0, inside, between, steps, PAIRWISE * BETWEEN
        )
    outer = out_s + out.alpha >= up_s + up.alpha
    times = np.where(outer, out.alpha, up.alpha), np.where(outer, 0, up_s), np.where(outer, out_s, 0)
    return Terms(*times, 0.0 * up_s, inside, between, 1, DIRECT * BETWEEN)


def uneven(
    kind: str, n: Number, p: Number, N: Number, m: Number, l: Number, up: Link, out: Link, gamma: float,
    named: Names = (0, 0),
) -> Terms:  # fmt: skip
    """Nodes of different sizes, m at most and l at least: l ranks of each node carry what goes between."""
    if kind == "all_to_all":
        return apart(n, p, m, l, up, out, named[1])
    named = named[1]
    reduces = kind in ("all_reduce", "reduce", "reduce_scatter")
    gathers = kind in ("all_reduce", "broadcast", "all_gather")
    if kind in ("scatter", "gather"):
        return both(one_link(kind, n, N, out, gamma, named), _lanes(n * m / p, m, l, up, 0))
    first = _lanes(n if kind != "all_gather" else n * m / p, m, l, up, gamma * reduces)
    last = _lanes(n if gathers else n * m / p, m, l, up, 0)
    return both(first, one_link(kind, n / l, N, out, gamma, named), last)


def _lanes(n: Number, m: Number, l: Number, up: Link, gamma: Number) -> Terms:
    """Between all m ranks of a node and l of them, a part of n / l each."""
    part = n / l
    passed = (m - 1) * part
    seconds = np.maximum(part / up.peer, passed / up.port) * (np.asarray(m) > 1)
    return _terms(up, MESH if up.mesh else DIRECT, np.asarray(m) > 1, seconds, passed, gamma * passed)
