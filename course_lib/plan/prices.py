"""What enters a step: prices of layers by their shape on one rank, activations they keep, seconds of each link.

Ten thousand layouts share a few hundred local shapes, for the degrees of DP, PP and ZeRO do not change a layer. So the
cost model is asked once for each shape, and everything else is arithmetic on arrays over layouts.
"""

from functools import lru_cache

import numpy as np

from course_lib.chip import ChipSpec, SystemSpec, load_chip
from course_lib.chip.figures import DTYPES
from course_lib.plan import footprint, share
from course_lib.plan.communication import seconds as collective
from course_lib.plan.layout import Layout, LayoutError
from course_lib.plan.model import Model
from course_lib.plan.share import Shape

HALF = 2  # bytes of an activation that is sent


def shape_of(layout: Layout, context: int) -> Shape:
    """What one layout leaves on a rank."""
    lay = layout
    return Shape(
        int(lay.tp), int(lay.cp), int(lay.ep), int(lay.micro_batch), bool(lay.sp), context, lay.gemm, lay.kernels,
        lay.attention,
    )  # fmt: skip


@lru_cache(maxsize=64)
def chip_of(name: str, taken: int, gemm: str, gemm_share: float | None) -> ChipSpec:
    """The chip without the cores that serve communication, its 8-bit products at their own share of the peak.

    LayoutError where it has not as many cores, or where the share is meant for products in 16 bits.
    """
    chip = load_chip(name)
    if not taken and gemm_share is None:
        return chip
    if gemm_share is not None and (DTYPES[gemm] != 1 or not 0 < gemm_share <= 1):
        raise LayoutError(
            f"gemm_share is {gemm_share} for {gemm}; it is a share of the peak, 0 to 1, of 8-bit products"
        )
    cores = chip.require("cube_cores")
    if taken >= cores:
        raise LayoutError(f"comm_cores: {taken} of {chip.title}'s {cores} cores leave none for products; take fewer")
    left = (cores - taken) / cores
    rates = {key: figure.value * left for key, figure in chip.figures.items() if key.startswith("peak.")}
    if gemm_share is not None:
        rates[f"peak.cube.{gemm}"] *= gemm_share / chip.require("efficiency.matmul")
    changed = {key.replace(".", "__"): value for key, value in rates.items()}
    return chip.having(title=f"{chip.title}, {cores - taken} cores", cube__cores=cores - taken, **changed)


@lru_cache(maxsize=65536)
def priced(model: Model, spec: ChipSpec, shape: Shape) -> np.ndarray:
    """Seconds of each kind of layer and the two ends, (K + 2, phases, groups)."""
    inside = [share.operators(model, index, shape) for index in footprint.kinds(model)[0]]
    return np.stack(
        [share.seconds(spec, made) for made in (*inside, share.first(model, shape), share.last(model, shape))]
    )


def tables(model: Model, system: SystemSpec, wide: Layout, context: int) -> tuple:
    """By distinct local shape and recomputation: seconds forward, input, weight (n, K + 2, 3, groups), and bytes kept."""
    columns = (wide.tp, wide.cp, wide.ep, wide.micro_batch, wide.sp, np.unique(wide.recompute, return_inverse=True)[1])
    _, index, which = np.unique(np.stack(columns, 1), axis=0, return_index=True, return_inverse=True)
    times, kept, again = [], [], []
    some = wide[index]
    for one in (some[i] for i in range(len(index))):
        shape = shape_of(one, context)
        table = priced(model, chip_of(system.chip, one.comm_cores, one.gemm, one.gemm_share), shape) / one.pace
        repeated = table[:, share.PHASES.index(f"again {one.recompute}")] if one.recompute != "none" else 0
        times.append(np.stack([table[:, 0], table[:, 1] + repeated, table[:, 2]], 1))
        layers = [footprint.kept(model, place, shape, one.recompute) for place in footprint.kinds(model)[0]]
        kept.append([*(stays for stays, _ in layers), 2 * HALF * shape.rows * model.width / shape.tp**shape.sp, 0.0])
        again.append(max(gone for _, gone in layers))
    return np.array(times), np.array(kept), np.array(again), which.ravel()


def links(model: Model, system: SystemSpec, wide: Layout, context: int) -> dict[str, np.ndarray]:
    """Seconds of communication of one layer in forward ("TP", "EP", "CP"), and of one hand-over of the pipeline."""
    rows, D, tp, cp = wide.micro_batch * context / wide.cp, model.width, wide.tp, wide.cp
    stream = HALF * rows * D
    both = collective(system, "all_gather", stream, tp) + collective(system, "reduce_scatter", stream, tp)
    each = np.where(wide.sp, both, collective(system, "all_reduce", stream, tp))
    keys = HALF * rows * sum(_passed(model)) / np.minimum(tp, model.kv_heads)
    out = {"TP": 2 * each, "CP": (cp - 1) * collective(system, "send", keys, np.minimum(cp, 2), tp)}
    if model.experts:
        copies = wide.copies or model.experts.active
        sent = rows * D * copies / np.where(wide.sp, tp, 1)
        dispatched, combined = max(1, DTYPES[wide.gemm] if DTYPES[wide.gemm] == 1 else HALF), HALF
        out["EP"] = sum(collective(system, "all_to_all", size * sent, wide.ep, tp) for size in (dispatched, combined))
    else:
        out["EP"] = np.zeros(len(wide))
    out["PP"] = collective(system, "send", stream / tp, np.minimum(wide.pp, 2), tp * cp * wide.dp)
    return out


def _passed(model: Model) -> tuple[int, ...]:
    """Elements per token that context parallelism passes on: keys and values, or the latent of both."""
    if model.latent:
        return (model.latent.rank, model.latent.rope)
    return (model.head_width,) if model.compressed else (2 * model.kv_heads * model.head_width,)
