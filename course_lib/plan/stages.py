"""Which layers lie on which pipeline rank.

L layers (with those of multi-token prediction) fill p·v stages evenly; where one or two places stay empty, the last and
the first stage have one layer less, for they have the unembedding and the embedding. Llama 3's 126 layers on 16 stages,
Pangu Ultra's 94 on 48 and DeepSeek-V3's 61 + 1 on 16 are cut so.

    >>> from course_lib.plan import load_model
    >>> [int(n) for n in on_ranks(load_model("llama-3-405b"), 16, 1, "1F1B")[:, 0]][:3]
    [7, 8, 8]
"""

from functools import lru_cache

import numpy as np

from course_lib.plan.footprint import kinds
from course_lib.plan.model import Model

BOTH_WAYS = "DualPipe"  # rank r has stage r, and stage p − 1 − r for the micro-batches that come from the other end
AS_A_V = ("ZBVZeroBubble", "DualPipeV")  # rank r has stages r and 2p − 1 − r


def on_stages(model: Model, stages: int) -> np.ndarray:
    """Layers by kind on each stage, and the two ends as two more kinds, (stages, K + 2)."""
    places, order = kinds(model)
    K, each = len(places), -(-len(order) // stages)
    empty = each * stages - len(order)
    sizes = np.full(stages, each)
    sizes[-1] -= empty >= 1
    sizes[0] -= empty >= 2
    table = np.zeros((stages, K + 2))
    for stage, (end, size) in enumerate(zip(np.cumsum(sizes), sizes)):
        for kind in order[end - size : end]:
            table[stage, kind] += 1
    table[0, K], table[-1, K + 1] = 1, 1
    return table


@lru_cache(maxsize=1024)
def on_ranks(model: Model, pp: int, vpp: int, schedule: str) -> np.ndarray:
    """Layers by kind that each rank works through for one micro-batch, (pp, K + 2); of DualPipe on average."""
    table = on_stages(model, pp * vpp)
    if schedule == BOTH_WAYS and pp > 1:
        return (table + table[::-1]) / 2
    if schedule in AS_A_V and vpp == 2:
        return table[:pp] + table[pp:][::-1]
    return table.reshape(vpp, pp, -1).sum(0)


def copies(schedule: str, pp: int) -> int:
    """How many times the weights are held: DualPipe's ranks have two stages each, of as many stages as ranks."""
    return 2 if schedule == BOTH_WAYS and pp > 1 else 1
