"""Memory of every pipeline rank under a layout, by class, and which rank needs most.

Weights, gradients and states follow memory.py (ZeRO divides them over the ranks that share them: CP × DP, for routed
experts those over EP); activations follow activations.py, times the micro-batches in flight: under 1F1B rank r holds
p − r of them, so the first rank needs most, unless the logits of the last weigh more.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np

from course_lib.plan import activations, memory
from course_lib.plan.layers import count
from course_lib.plan.model import Model
from course_lib.plan.share import Shape, kind_of, parameters

CLASSES = ("weights", "gradients", "optimizer states", "activations", "logits", "communicators")
BUFFER = 200 * 2**20  # bytes per communicator: HCCL_BUFFSIZE's default; taken for NCCL's too (A: of like size)
LOGITS = 6  # bytes per logit at the peak: itself, its log-probability, its gradient, in 16 bits each
COPIES = ("silu(gate)", "output input", "router input")  # kept by PyTorch's autograd, not by fused kernels
CHEAP = ("norm result", "product", "expert results")  # kept by none that recomputes cheap operators
EIGHT = (
    "dispatched tokens",
    "experts gate",
    "experts up",
    "shared experts gate",
    "shared experts up",
)  # kept in 8 bits


def in_flight(schedule: str, p: int, v: int, m: np.ndarray) -> np.ndarray:
    """Micro-batches of all its stages that each rank holds at most, (len(m), p); fractions are chunks of them."""
    r, m = np.arange(p), np.asarray(m, dtype=float)[:, None]
    most = {
        "GPipe": np.full(p, np.inf),
        "Interleaved1F1B": (2 * (p - r - 1) + (v - 1) * p + 1) / v,  # arXiv:2205.05198, section 4.2.3
        "InterleavedZeroBubble": (2 * (p - r - 1) + (v - 1) * p + 1) / v,
        "ZBVZeroBubble": np.full(p, p),
        "DualPipe": np.full(p, p + 1),  # DeepSeek-V3, table 2
        "DualPipeV": np.full(p, p + 1),
    }.get(schedule, p - r)
    return np.minimum(most if v > 1 or schedule not in ("Interleaved1F1B", "InterleavedZeroBubble") else p - r, m)


def states(
    dense: np.ndarray, routed: np.ndarray, precision: str, ranks: np.ndarray, ep: np.ndarray, zero: np.ndarray
) -> dict:
    """Bytes of weights, gradients and states; ``ranks``: CP × DP, over which ZeRO divides."""
    outside = memory.states(dense, precision, ranks, zero)
    inside = memory.states(routed, precision, ranks // ep, zero)
    return {name: outside[name] + inside[name] for name in outside}


@lru_cache(maxsize=8192)
def kept(model: Model, index: int, shape: Shape, recompute: str) -> tuple[float, float]:
    """Bytes of activations that one layer keeps of one micro-batch, and those that come back while it is recomputed."""
    parts = _of_layer(model, index, shape)
    whole = sum(parts.values())
    if recompute == "full":
        stays = next(iter(parts.values()))  # the layer's input
    elif recompute == "selective":
        stays = sum(_of_layer(model, index, shape, "selective").values())
    elif recompute == "cheap":
        gone = CHEAP + (("query", "key", "value") if model.latent else ())
        stays = sum(value for name, value in parts.items() if not name.endswith(gone) or name == "query latent")
    else:
        stays = whole
    return stays, whole - stays


@lru_cache(maxsize=8192)
def _of_layer(model: Model, index: int, shape: Shape, level: str = "none") -> dict[str, float]:
    layer = min(index, model.layers - 1)
    whole = replace(model, compressed=None, indexer=None) if model.compressed else model
    rows = (shape.micro_batch, shape.context, 2, shape.attention)
    parts = activations.of_layer(whole, *rows, level, layer, shape.tp, shape.sp)
    if c := model.compressed:
        tokens = 2 * shape.micro_batch * shape.context
        parts["query latent"] = tokens * c.query_rank
        parts["output groups"] = tokens * c.output_groups * c.output_rank / shape.tp
        parts["streams"] = tokens * 2 * (model.streams - 1) * model.width
    if shape.kernels == "fused" and model.gated:
        parts = {name: value for name, value in parts.items() if not name.endswith(COPIES)}
    if shape.gemm.startswith("float8"):
        parts = {name: value / (2 if name in EIGHT else 1) for name, value in parts.items()}
    return {name: value / shape.cp for name, value in parts.items()}


def ends(model: Model, tp: int, alone: bool = False) -> tuple[float, float]:
    """Parameters of the embedding and of what follows the layers, on one rank; ``alone``: both are on the same rank.

    A tied table is held once then; in a pipeline the last stage has a copy.
    """
    n, table = count(model), model.vocab_size * model.width
    head = 0 if model.tied and alone else table / tp
    return (table + n.positions) / tp, head + (1 if model.gated else 2) * model.width


def of_kinds(model: Model, places: tuple[int, ...], tp: int, ep: int, alone: bool = False) -> np.ndarray:
    """Parameters outside and inside the routed experts, of a layer at each of these places and of the two ends, (2, K)."""
    inside = [parameters(model, index, tp, ep) for index in places]
    first, last = ends(model, tp, alone)
    return np.array([[*(d for d, _ in inside), first, last], [*(r for _, r in inside), 0.0, 0.0]])


@lru_cache(maxsize=256)
def kinds(model: Model) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A place of each kind of layer, and for each layer (those of multi-token prediction last) which kind it is."""
    names = [kind_of(model, index).kind for index in range(model.layers + model.mtp)]
    distinct = list(dict.fromkeys(names))
    return tuple(names.index(name) for name in distinct), tuple(distinct.index(name) for name in names)
