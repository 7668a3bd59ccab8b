"""An all-to-all of unequal parts: who waits for whom when the tokens of some experts are more than those of others.

As the closed forms of links.py, with the largest part in place of n / p: the longest transfer on a pair's link, and the
busiest port, sending or receiving, whichever takes longer. Equal parts give exactly what the closed forms give.
"""

import numpy as np

from course_lib.chip.links import BETWEEN, DIRECT, MESH, PAIRWISE, RING, Link, Names, Terms, both


def unequal(
    sizes: tuple[tuple[int, ...], ...], parts: list[int], up: Link | None, out: Link | None, names: Names
) -> Terms:
    """``sizes[i][j]`` bytes go from the i-th rank to the j-th; ``parts[i]`` is the scale-up network of the i-th."""
    order = sorted(range(len(parts)), key=lambda i: (parts[i], i))
    matrix = np.array(sizes, dtype=float)[np.ix_(order, order)]
    np.fill_diagonal(matrix, 0)
    if up is None or out is None:
        return _one(matrix, up or out, names[out is not None])
    part = np.array(parts)[order]
    counts = np.unique(part, return_counts=True)[1]
    if (up.mesh or up.ring) and (counts == counts[0]).all():
        return _staged(matrix.reshape(len(counts), counts[0], len(counts), counts[0]), up, out, names)
    return _apart(matrix, part[:, None] == part, up, out, names[1])


def _staged(sizes: np.ndarray, up: Link, out: Link, names: Names) -> Terms:
    """Inside a node to the chip with the destination's place, then between nodes; (node, place, node, place)."""
    nodes, places = sizes.shape[:2]
    inside = [_one(sizes[node].sum(1), up, names[0]) for node in range(nodes)]
    between = [_one(sizes[:, :, :, place].sum(1), out, names[1]) for place in range(places)]
    return both(*(max(found, key=lambda terms: terms.seconds) for found in (inside, between)))


def _apart(sizes: np.ndarray, same: np.ndarray, up: Link, out: Link, named: int) -> Terms:
    """Straight to every rank, on both links at once."""
    near, far = _one(sizes * same, up, 0), _one(sizes * ~same, out, 0)
    longer, code = max(near, far, key=lambda terms: terms.seconds), DIRECT
    if named == PAIRWISE:
        alpha, rate = max(up.alpha, out.alpha), min(up.peer, up.port, out.peer, out.port)
        longer, code = _one(sizes, out._replace(alpha=alpha, peer=rate), PAIRWISE), PAIRWISE
    return longer._replace(up_bytes=near.up_bytes, out_bytes=far.out_bytes, algorithm=code * BETWEEN)


def _one(sizes: np.ndarray, at: Link, named: int) -> Terms:
    """One link; what a rank keeps does not travel."""
    p = len(sizes)
    sizes = sizes * (1 - np.eye(p))
    busiest = max(sizes.sum(0).max(), sizes.sum(1).max())
    if named == PAIRWISE or at.ring:
        index = np.arange(p)
        busiest_step = [(k if at.ring else 1) * sizes[index, (index + k) % p].max() for k in range(1, p)]
        code, steps, seconds = RING if at.ring else PAIRWISE, p - 1, sum(busiest_step) / min(at.peer, at.port)
        busiest = sum(busiest_step) if at.ring else busiest
    else:
        code, steps = MESH if at.mesh else DIRECT, 1
        seconds = max(sizes.max() / at.peer, busiest / at.port)
    if at.out:
        return Terms(steps * at.alpha, 0.0, seconds, 0.0, 0.0, busiest, steps, code * BETWEEN)
    return Terms(steps * at.alpha, seconds, 0.0, 0.0, busiest, 0.0, steps, code)
