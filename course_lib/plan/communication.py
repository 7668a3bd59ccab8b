"""Communication: how long a collective takes and what it sends, for whole arrays of sizes and groups at once.

The closed forms are those of chip/links.py, which the emulator's collectives use too; here the groups are regular: P
ranks 0, s, 2s, …, as the dimensions of a device mesh lay them out. A tensor-parallel group has stride 1, a
data-parallel one the stride of all that lies inside it.

    >>> from course_lib.chip import load_system
    >>> a2 = load_system("atlas-800t-a2").having(nodes=2)
    >>> bool(seconds(a2, "all_reduce", 2**28, 8) < seconds(a2, "all_reduce", 2**28, 8, stride=2))
    True
"""

import numpy as np

from course_lib.chip import SpecError, SystemSpec
from course_lib.chip.algorithms import KINDS, Named, named_algorithms
from course_lib.chip.collectives import closed, gamma, link
from course_lib.chip.links import Terms
from course_lib.plan.layers import Number

SENT = {  # bytes that leave a chip, of n bytes among P, where each sends the least that the collective needs
    "all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "all_to_all": 1, "broadcast": 2, "reduce": 2, "scatter": 1,
    "gather": 1,
}  # fmt: skip


def seconds(
    system: SystemSpec, kind: str, nbytes: Number, members: Number, stride: Number = 1, algorithm: str | None = None
) -> Number:
    """Seconds that a collective of ``members`` ranks ``stride`` apart takes; arrays broadcast.

    ``nbytes`` and ``algorithm`` as chip.collectives.transfer has them, which gives the same to a picosecond. Send goes
    from rank 0 to rank ``stride``, with 2 members. Raises ValueError for an unknown kind, fewer than 1 member, or a
    stride that puts unlike numbers of ranks in the nodes; SpecError where the system has too few chips.
    """
    named = named_algorithms(system, kind, algorithm)
    given = np.broadcast_arrays(np.asarray(nbytes, dtype=float), np.asarray(members), np.asarray(stride))
    shape = given[0].shape
    n, P, s = (np.atleast_1d(part).ravel() for part in given)
    _check(system, kind, n, P, s)
    m = np.minimum(P, np.maximum(1, system.reach // s))
    N = -(-P // m)
    near = (np.minimum(m, P) - 1) * s < system.chips_per_node
    found = np.zeros(n.shape)
    for part, is_near in _alike(P, m, N, near):
        terms = _closed(system, kind, is_near, named, n[part], P[part], N[part], m[part])
        found[part] = terms.seconds
    return found.reshape(shape) if shape else float(found[0])


def volume(kind: str, nbytes: Number, members: Number) -> Number:
    """Bytes that leave a chip, at the least: 2(P − 1)/P of the tensor in an all-reduce, half of it in either part.

    Of a broadcast it is the root's, by scatter and all-gather; of a gather what arrives at the root. A barrier has none.
    """
    if kind not in KINDS:
        raise ValueError(f"no collective named {kind!r}; there are {', '.join(KINDS)}")
    P = np.asarray(members)
    if kind == "send":
        return nbytes * np.where(P > 1, 1, 0)[()]
    return SENT.get(kind, 0) * ((P - 1) / P)[()] * nbytes


def _alike(P: np.ndarray, m: np.ndarray, N: np.ndarray, near: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """The elements by the links that they use and how: each lot has one closed form."""
    lot = np.select([P == 1, (N == 1) & near, N == 1, m == 1, P == N * m], [0, 1, 2, 3, 4], 5) + 10 * near
    return [(lot == code, code >= 10) for code in np.unique(lot) if code % 10]


def _closed(
    system: SystemSpec, kind: str, near: bool, named: Named, n: np.ndarray, P: np.ndarray, N: np.ndarray, m: np.ndarray
) -> Terms:
    up = link(system, "scale_up", near) if m[0] > 1 else None
    out = link(system, "scale_out") if N[0] > 1 else None
    least = P - (N - 1) * m
    return closed(kind, n, P, N, m, least, up, out, gamma(system.chip), named, near)


def _check(system: SystemSpec, kind: str, n: np.ndarray, P: np.ndarray, s: np.ndarray) -> None:
    if (P < 1).any() or (s < 1).any() or (n < 0).any():
        raise ValueError(f"members and stride are 1 or more, bytes 0 or more; found {P.min()}, {s.min()}, {n.min()}")
    if kind == "send" and (P > 2).any():
        raise ValueError(f"send has two ranks, source and destination, not {P.max()}")
    odd = (P > 1) & (s < system.reach) & (system.reach % s != 0) & ((P - 1) * s >= system.reach)
    if odd.any():
        raise ValueError(f"stride {s[odd][0]}: expected one that divides {system.reach}, or is at least as large")
    last = ((P - 1) * s).max(initial=0)
    if last >= system.chips:
        raise SpecError(
            f"rank {last}: {system.title} has {system.chips} chips; "
            f"system.having(nodes={last // system.chips_per_node + 1}) has enough"
        )
