"""What a collective costs on a system: which ranks share which link, which algorithm runs, and how long it takes.

A group inside one scale-up network stays on it. A group with one rank a node goes over the scale-out link. Any other
works in turn inside the nodes and between them. Inside, ranks with a link to each peer use all at once (mesh); behind a
switch the quickest of ring, NHR and H-D_R runs. Between nodes HCCL_ALGO says which, or HCCL's own rule, taken from its
source (coll_alg_operator.cc): pipeline from 32 KiB a rank (all-reduce: 1 MiB), else the cheapest, ring before NHR
before H-D_R where they cost the same. HCCL keeps the pipeline for meshes, with RDMA Lite and HCCL_DETERMINISTIC off; here
it also serves nodes with a switch, as NCCL's rings keep both links busy too. Formulas are in links.py.

Who reduces: the memory of the chip that receives, while data arrive (HCCL's inline reduce). γ is what it costs there to
read a byte of the sum and write it.

    >>> from course_lib.chip import load_system
    >>> transfer(load_system("atlas-800t-a2"), "all_reduce", 2**30, tuple(range(8))).algorithm
    'mesh'
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from course_lib.chip.algorithms import KINDS, Named, named_algorithms
from course_lib.chip.cost import Work, cost
from course_lib.chip.exchange import unequal
from course_lib.chip.figures import SpecError, UnknownFigure
from course_lib.chip.links import BETWEEN, DIRECT, NAMES, PAIRWISE, Link, Terms, one_link, two_links, uneven
from course_lib.chip.spec import LinkSpec, SystemSpec, load_chip

__all__ = ["KINDS", "Group", "Transfer", "closed", "gamma", "group", "link", "transfer"]

PICO = 1e12


@dataclass(frozen=True, slots=True)
class Transfer:
    """One collective. Times in picoseconds, bytes in one direction; ports are those of the most loaded chip."""

    ps: int  # from when the last rank has arrived; latency included
    algorithm: str  # "mesh", "ring", "NHR"; "mesh + NHR": inside + between nodes
    bound: str  # where most of the time goes: a link's name, "latency" or "reduction"
    up_ps: int  # the scale-up port is busy
    out_ps: int  # the scale-out port is busy
    up_bytes: int
    out_bytes: int
    steps: int


@dataclass(frozen=True, slots=True)
class Group:
    """p ranks in N scale-up networks, m in the fullest and l in the emptiest; ``near``: each part lies within one node."""

    p: int
    N: int
    m: int
    l: int
    near: bool


def transfer(
    system: SystemSpec, kind: str, nbytes: int, ranks: Sequence[int], algorithm: str | None = None,
    sizes: tuple[tuple[int, ...], ...] | None = None,
) -> Transfer:  # fmt: skip
    """The time of a collective of ``ranks`` (global; a tuple or a range) and how it uses the busiest chip's ports.

    ``nbytes`` as torch counts: the tensor; of reduce-scatter, all-to-all and scatter a rank's (the root's) whole input,
    of all-gather and gather its whole output; of send the message, with ranks (source, destination). ``sizes``: bytes
    of an unequal all-to-all from the i-th to the j-th member. ``algorithm``: a value of HCCL_ALGO.
    Raises ValueError for an unknown kind or a malformed argument, SpecError for a rank that the system has not,
    UnknownFigure where the system's file lacks a link's latency or bandwidth.
    """
    ranks = tuple(ranks) if isinstance(ranks, list) else ranks
    if sizes is not None:
        return _unequal(system, kind, tuple(ranks), algorithm, sizes)
    if nbytes < 0:
        raise ValueError(f"{nbytes} bytes; a transfer has 0 or more")
    return _closed(system, kind, nbytes, group(system, ranks), algorithm)


@lru_cache(maxsize=4096)
def group(system: SystemSpec, ranks: Sequence[int]) -> Group:
    """How the ranks lie in the system. Raises SpecError for a rank beyond its chips, ValueError for one that is twice in."""
    if not ranks or len(set(ranks)) != len(ranks):
        raise ValueError(f"ranks {ranks}: expected at least one, and none twice")
    if min(ranks) < 0 or max(ranks) >= system.chips:
        wrong = min(ranks) if min(ranks) < 0 else max(ranks)
        raise SpecError(
            f"rank {wrong}: {system.title} has {system.chips} chips, 0 to {system.chips - 1}; "
            f"system.having(nodes={max(ranks) // system.chips_per_node + 1}) has enough"
        )
    parts: dict[int, list[int]] = {}
    for rank in ranks:
        parts.setdefault(rank // system.reach, []).append(rank)
    held = [len(part) for part in parts.values()]
    near = all(min(part) // system.chips_per_node == max(part) // system.chips_per_node for part in parts.values())
    return Group(len(ranks), len(parts), max(held), min(held), near)


@lru_cache(maxsize=65536)
def _closed(system: SystemSpec, kind: str, nbytes: int, g: Group, algorithm: str | None) -> Transfer:
    named = named_algorithms(system, kind, algorithm)
    if kind == "send" and g.p > 2:
        raise ValueError(f"send has two ranks, source and destination, not {g.p}")
    if g.p == 1:
        return Transfer(0, "", "latency", 0, 0, 0, 0, 0)
    up, out = _links(system, g)
    return _transfer(closed(kind, nbytes, g.p, g.N, g.m, g.l, up, out, gamma(system.chip), named, g.near), up, out)


def closed(
    kind: str, n: int, p: int, N: int, m: int, l: int, up: Link | None, out: Link | None, gamma: float, named: Named,
    near: bool,
) -> Terms:  # fmt: skip
    """The closed form that fits where p ranks lie: in N networks, m in the fullest and l in the emptiest.

    All counts may be arrays, so long as every element has the same case: one network, one rank in each, as many, or not.
    """
    names = named[0] if near else named[1], named[2]
    if kind == "barrier":
        kind, n = "all_reduce", 0
    if kind == "send":
        found = one_link("all_to_all", 2 * n, 2, up or out, gamma, PAIRWISE)
        return found._replace(algorithm=DIRECT * (BETWEEN if up is None else 1))
    if out is None or up is None:
        return one_link(kind, n, p, up or out, gamma, names[out is not None])
    if np.all(l == m):
        return two_links(kind, n, p, N, m, up, out, gamma, names)
    return uneven(kind, n, p, N, m, l, up, out, gamma, names)


@lru_cache(maxsize=4096)
def _unequal(system: SystemSpec, kind: str, ranks: tuple[int, ...], algorithm: str | None, sizes: tuple) -> Transfer:
    if kind != "all_to_all":
        raise ValueError(f"sizes go with all_to_all, not with {kind}")
    if len(sizes) != len(ranks) or any(len(row) != len(ranks) or min(row) < 0 for row in sizes):
        raise ValueError(
            f"sizes: expected {len(ranks)} rows of {len(ranks)} byte counts of 0 or more, as there are ranks"
        )
    g, named = group(system, ranks), named_algorithms(system, kind, algorithm)
    if g.p == 1:
        return Transfer(0, "", "latency", 0, 0, 0, 0, 0)
    up, out = _links(system, g)
    parts = [rank // system.reach for rank in ranks]
    return _transfer(unequal(sizes, parts, up, out, (named[0] if g.near else named[1], named[2])), up, out)


def _links(system: SystemSpec, g: Group) -> tuple[Link | None, Link | None]:
    """The links that the group uses."""
    return link(system, "scale_up", g.near) if g.m > 1 else None, link(system, "scale_out") if g.N > 1 else None


def _transfer(found: Terms, up: Link | None, out: Link | None) -> Transfer:
    code = int(found.algorithm)
    names = [NAMES[part] for part in (code % BETWEEN, code // BETWEEN) if part]
    parts = {
        "latency": float(found.latency),
        "reduction": float(found.reduction),
        up.name if up else "": float(found.up),
        out.name if out else "": float(found.out),
    }
    busy = [
        round(float(sent) / at.port * PICO) if at else 0 for at, sent in ((up, found.up_bytes), (out, found.out_bytes))
    ]
    sent = round(float(found.up_bytes)), round(float(found.out_bytes))
    return Transfer(
        round(float(found.seconds) * PICO), " + ".join(names), max(parts, key=parts.get), *busy, *sent, int(found.steps)
    )


# -- what the system's file says ------------------------------------------------------------------------


@lru_cache(maxsize=256)
def link(system: SystemSpec, key: str, near: bool = False) -> Link:
    """A link as the formulas need it: ``near`` takes the figures inside one node, where the file has them apart."""
    spec: LinkSpec | None = getattr(system, key)
    if spec is None:
        raise UnknownFigure(f"{system.title} has no [{key}]: these ranks cannot reach each other; add it to its file")
    alpha, share = (spec.figures.value("near." + name) if near else None for name in ("latency", "efficiency"))
    alpha, share = alpha or _known(system, key, "latency"), share or spec.efficiency or 1
    port = share * _known(system, key, "bandwidth")
    peer = share * (spec.peer_bandwidth or spec.bandwidth)
    return Link(spec.name, spec.topology == "full mesh", spec.topology == "ring", alpha, port, peer, key == "scale_out")


def _known(system: SystemSpec, key: str, name: str) -> float:
    value = getattr(getattr(system, key), name)
    if value is None:
        raise UnknownFigure(
            f"{key}.{name} of {system.title} is unknown: no source gives it. "
            f"To assume one: system.having({key}__{name}=…), in SI"
        )
    return value


@lru_cache(maxsize=64)
def gamma(chip: str) -> float:
    """Seconds to reduce a byte: one is read, one is written in the chip's memory. Of no use to whom nothing is reduced."""
    return cost(load_chip(chip), Work(bytes_read=10**9, bytes_written=10**9)).memory_ps / 10**9 / PICO
