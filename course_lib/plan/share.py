"""One rank's share of a layer: its operators at the shapes that TP, CP and EP leave, forward and backward, and their time.

Column-parallel matrices lose outputs, row-parallel ones inputs, experts copies (Megatron, arXiv:1909.08053); the rest
every rank has whole. Each operator is priced by the chip's own cost model, so nothing here assumes a utilisation.

    >>> from course_lib import chip, plan
    >>> made = operators(plan.load_model("llama-2-7b"), 0, Shape(tp=8, context=4096))
    >>> [op.name for op in made if op.phase == "forward" and op.group == "matmul"]
    ['query, key, value', 'output', 'gate, up', 'down']
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from course_lib.chip import ChipSpec, Cost, Matmul, Work, cost
from course_lib.chip.figures import DTYPES
from course_lib.plan import elementwise
from course_lib.plan.layers import Core, Layer, Matrix, layers, mtp_layer, unembedding
from course_lib.plan.model import Model
from course_lib.plan.operators import SOFTMAX, pairs_as_products

PICO = 1e12
PHASES = ("forward", "input", "weight", "again cheap", "again selective", "again full")  # backward: input and weight
GROUPS = ("matmul", "attention", "vector", "launch")
PHASE = {name: place for place, name in enumerate(PHASES)}
GROUP = {name: place for place, name in enumerate(GROUPS)}
COLUMN = {"query", "key", "value", "query up", "latent up", "gate", "up", "expert gate", "expert up", "shared gate",
          "shared up", "unembedding"}  # fmt: skip
ROW = {"output", "down", "expert down", "shared down"}
IN_16_BITS = {
    "router",
    "unembedding",
    "hyper-connections",
    "compressor gate",
    "indexer weights",
}  # whatever the GEMMs are in
MERGED = (("query", "key", "value"), ("query down", "latent down"), ("gate", "up"), ("expert gate", "expert up"),
          ("shared gate", "shared up"))  # fmt: skip
EXPANDED = ("query up", "latent up")  # what recompute "cheap" repeats of the products
ATTENTION = "bfloat16"
EXCHANGED = 6  # bytes per pair between cube and vector unit in forward: a score in float32, a weight in 16 bits


@dataclass(frozen=True)
class Shape:
    """What the price of a layer on one rank depends on; ``context`` T in tokens, ``micro_batch`` in sequences."""

    tp: int = 1
    cp: int = 1
    ep: int = 1
    micro_batch: int = 1
    sp: bool = False
    context: int = 4096
    gemm: str = "bfloat16"
    kernels: str = "fused"
    attention: str | None = None

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.micro_batch * self.context // self.cp

    @property
    def rows_outside(self) -> int:
        """Tokens outside the tensor-parallel parts: sequence parallelism divides them."""
        return -(-self.rows // (self.tp if self.sp else 1))


@dataclass(frozen=True)
class Operator:
    """``times`` calls of ``work`` in ``phase``: "forward", "input" or "weight" (the halves of backward)."""

    name: str
    group: str
    phase: str
    work: Work
    times: int = 1
    cheap: bool = False  # recompute "cheap" repeats it
    core: bool = False  # recompute "selective" does


@lru_cache(maxsize=256)
def kind_of(model: Model, index: int) -> Layer:
    """The layer at a place, counted from 0; beyond the last those of multi-token prediction."""
    if index >= model.layers:
        return mtp_layer(model)
    change: dict = {"layers": 1}
    if model.experts:
        change["experts"] = replace(model.experts, first_dense=int(index < model.experts.first_dense))
    if model.compressed:
        change["compressed"] = replace(model.compressed, ratios=(model.compressed.ratios[index],))
    return layers(replace(model, **change))[0]


def operators(model: Model, index: int, shape: Shape) -> list[Operator]:
    """All operators of one layer for one micro-batch, in forward and backward."""
    layer = kind_of(model, index)
    experts = any(m.stored > m.active for m in layer.matrices)
    made = [op for matrix in _local(layer, shape) for op in product(matrix, shape)]
    made += _attention(layer, model, shape)
    for phase, passes in (("forward", elementwise.forward), ("input", elementwise.backward)):
        made += [_pass(one, phase, shape) for one in passes(model, experts, shape.kernels)]
    if DTYPES[shape.gemm] == 1:
        made += _casts(_local(layer, shape), shape)
    return made


def first(model: Model, shape: Shape) -> list[Operator]:
    """Before the layers: the look-up of tokens, whose gradient goes through the whole table."""
    D, rows = model.width, shape.rows_outside
    table = 2 * model.vocab_size * D // shape.tp
    return [
        Operator("embedding", "vector", "forward", Work(bytes_read=2 * rows * D, bytes_written=2 * rows * D)),
        Operator("embedding", "vector", "weight", Work(bytes_read=2 * rows * D, bytes_written=table)),
    ]


def last(model: Model, shape: Shape) -> list[Operator]:
    """After the layers: final norm, unembedding and loss, whose logits TP divides; once more for each further token."""
    times = 1 + model.mtp
    head = replace(unembedding(model), stored=1, outputs=-(-model.vocab_size // shape.tp))
    D, rows, logits = model.width, shape.rows_outside, shape.rows * head.outputs
    loss = ((2 * logits, 2 * logits), (6 * logits, 4 * logits))  # log-softmax; its gradient, from one at the targets
    made = [replace(op, times=times) for op in product(head, shape)]
    made += [
        Operator(
            "final norm", "vector", "forward", Work((), 4 * rows * D, "bfloat16", 2 * rows * D, 2 * rows * D), times
        ),
        Operator(
            "final norm", "vector", "input", Work((), 8 * rows * D, "bfloat16", 4 * rows * D, 2 * rows * D), times
        ),
    ]
    for phase, (read, written) in zip(("forward", "input"), loss):
        made.append(Operator("loss", "vector", phase, Work((), 5 * logits, "bfloat16", read, written), times))
    return made


def priced(chip: ChipSpec, made: list[Operator]) -> list[tuple[Operator, Cost]]:
    """Each operator with what one call costs."""
    return [(op, cost(chip, op.work)) for op in made]


def seconds(chip: ChipSpec, made: list[Operator]) -> np.ndarray:
    """Seconds by phase and group, (6, 4) as in `PHASES` and `GROUPS`; the last three phases are of recomputation."""
    table = np.zeros((len(PHASES), len(GROUPS)))
    for op, paid in priced(chip, made):
        phases = [PHASE[op.phase]]
        if op.phase == "forward":
            phases += [PHASE["again full"]] + [PHASE["again cheap"]] * op.cheap + [PHASE["again selective"]] * op.core
        busy, launch, group = op.times * (paid.ps - paid.launch_ps), op.times * paid.launch_ps, GROUP[op.group]
        for phase in phases:
            table[phase, group] += busy / PICO
            table[phase, GROUP["launch"]] += launch / PICO
    return table


def parameters(model: Model, index: int, tp: int, ep: int) -> tuple[float, float]:
    """Of one layer on one rank: parameters outside and inside the routed experts."""
    layer = kind_of(model, index)
    local = divided(layer, tp, ep)
    routed = sum(m.parameters for m in local if m.name.startswith("expert"))
    return sum(m.parameters for m in local) - routed + layer.gains, routed


# -- matrices -------------------------------------------------------------------------------------------------


def _local(layer: Layer, shape: Shape) -> tuple[Matrix, ...]:
    """The matrices as one rank has them; fused kernels take those together that share their input."""
    return divided(layer, shape.tp, shape.ep, shape.kernels == "fused")


@lru_cache(maxsize=4096)
def divided(layer: Layer, tp: int, ep: int, merge: bool = False) -> tuple[Matrix, ...]:
    """The matrices of one of ``tp`` × ``ep`` ranks; ``merge``: those that share their input become one."""
    found = {matrix.name: _divided(matrix, tp, ep) for matrix in layer.matrices}
    for names in MERGED if merge else ():
        parts = [found[name] for name in names if name in found]
        if len(parts) == len(names):
            joined = replace(parts[0], name=", ".join(names), outputs=sum(part.outputs for part in parts))
            at = list(found).index(names[0])
            rest = [matrix for name, matrix in found.items() if name not in names]
            found = {matrix.name: matrix for matrix in (*rest[:at], joined, *rest[at:])}
    return tuple(found.values())


def _divided(matrix: Matrix, tp: int, ep: int) -> Matrix:
    name = matrix.name
    if name.startswith("expert"):
        matrix = replace(matrix, stored=matrix.stored // ep)
    if name == "output groups" and matrix.stored % tp == 0:
        return replace(matrix, stored=matrix.stored // tp, active=matrix.active // tp)
    if name in COLUMN:
        return replace(matrix, outputs=-(-matrix.outputs // tp))
    return replace(matrix, inputs=-(-matrix.inputs // tp)) if name in ROW else matrix


def product(matrix: Matrix, shape: Shape) -> Iterator[Operator]:
    """Forward, gradient of the input, gradient of the weight: each as many products as copies are in use."""
    plain = matrix.name.split(", ")[0] in IN_16_BITS
    dtype = ("float32" if matrix.name == "router" and shape.kernels == "eager" else ATTENTION) if plain else shape.gemm
    # stored: of routed experts those of this rank, which get the tokens of all ep ranks, an equal share each
    tokens, size, copies = shape.rows * matrix.active, DTYPES[dtype], max(1, matrix.stored)
    if matrix.stored == matrix.active or not matrix.stored:
        copies = max(1, matrix.active)
    used = min(copies, tokens)
    each = -(-tokens // used)
    i, o = matrix.inputs, matrix.outputs
    sets = [(tokens // each, each)] + ([(1, tokens % each)] if tokens % each else [])
    out, weight = max(size, 2), used * i * o
    shared = shape.rows if matrix.active == 1 or matrix.stored == matrix.active else tokens  # rows that are read
    name, cheap = matrix.name, matrix.name in EXPANDED
    kept = 8 if shape.kernels == "fused" else 2  # gradients are added to a sum in float32, or written
    kept_read, kept_written = (4, 4) if kept == 8 else (0, out)
    work = {
        "forward": ([(n, r, i, o) for n, r in sets], size * (shared * i + weight), out * tokens * o),
        "input": ([(n, r, o, i) for n, r in sets], size * (tokens * o + weight), out * shared * i),
        "weight": ([(n, o, r, i) for n, r in sets], size * (tokens * o + shared * i) + kept_read * weight,
                   kept_written * weight),
    }  # fmt: skip
    for phase, (products, read, written) in work.items():
        made = Work(tuple(Matmul(*p, dtype) for p in products), 0, dtype, int(read), int(written))
        yield Operator(name, "matmul", phase, made, cheap=cheap)


def _casts(matrices: tuple[Matrix, ...], shape: Shape) -> list[Operator]:
    """Products in 8 bits: inputs are cast before, gradients twice (along and across the tokens), kept inputs turned."""
    made = []
    for m in matrices:
        if m.name.split(", ")[0] not in IN_16_BITS:
            tokens = shape.rows * m.active
            rows = shape.rows if m.active == 1 or m.stored == m.active else tokens
            n, g = rows * m.inputs, tokens * m.outputs
            for phase, read, written in (("forward", 2 * n, n), ("input", 2 * g, 2 * g), ("weight", n, n)):
                work = Work((), n if phase != "input" else 2 * g, "float32", read, written)
                made.append(Operator(f"cast for {m.name}", "vector", phase, work))
    return made


# -- attention and the rest -----------------------------------------------------------------------------------


def _attention(layer: Layer, model: Model, shape: Shape) -> Iterator[Operator]:
    cores = {core.name: core for core in layer.cores}
    divided = [replace(core, heads=-(-core.heads // shape.tp), kv_heads=max(1, core.kv_heads // shape.tp))
               for core in (cores["scores"], cores["mix values"])]  # fmt: skip
    plain = (shape.attention or ("flash" if model.gated else "plain")) == "plain"
    yield from (_plain if plain else _flash)(*divided, shape)
    if "indexer scores" in cores:
        indexer = replace(cores["indexer scores"], heads=-(-cores["indexer scores"].heads // shape.tp))
        yield from (replace(op, name="indexer scores") for op in _flash(indexer, None, shape))


def _flash(scores: Core, mix: Core | None, shape: Shape) -> Iterator[Operator]:
    """Scores stay on the chip; backward computes them again: three products of the first kind, two of the second."""
    B, T, S, size = shape.micro_batch, shape.context // shape.cp, shape.context, DTYPES[ATTENTION]
    pairs = -(-int(scores.pairs(S, S, "causal")) // shape.cp)
    each, mixed = scores.width, mix.width if mix else 0
    keys = sum(min(S, k.full(1, S)) if k.stride > 1 else S for k in scores.keys)
    shared = scores.kv_heads * (each + (mixed if mix and not scores.joint else 0))
    inside, results = size * B * (T * scores.heads * each + keys * shared), size * B * T * scores.heads * (mixed or 1)
    total = B * scores.heads * pairs
    for phase, widths, read, written in (
        ("forward", [each, mixed], inside, results + 4 * B * T * scores.heads),
        ("input", [each] * 3 + [mixed] * 2, inside + 2 * results, inside),
    ):
        products = tuple(
            m for width in widths if width for m in pairs_as_products(B * scores.heads, T, pairs, width, ATTENTION)
        )
        there = EXCHANGED * (1 if phase == "forward" else 2) * total
        work = Work(products, SOFTMAX * total, "float32", int(read), int(written), exchanged=int(there))
        yield Operator("attention", "attention", phase, work, core=True)


def _plain(scores: Core, mix: Core, shape: Shape) -> Iterator[Operator]:
    """Every score is computed, the masked ones too, and kept in memory; softmax and dropout pass over them."""
    B, T, S, H = shape.micro_batch, shape.context // shape.cp, shape.context, scores.heads
    pairs, D = B * H * T * S, B * T * H * scores.width
    product = {
        "scores": [("forward", (T, scores.width, S), 4 * D, 2 * pairs), ("input", (T, S, scores.width), 2 * pairs + 2 * D, 2 * D),
                   ("input", (S, T, scores.width), 2 * pairs + 2 * D, 2 * D)],
        "mix values": [("forward", (T, S, mix.width), 2 * pairs + 2 * D, 2 * D), ("input", (T, mix.width, S), 4 * D, 2 * pairs),
                       ("input", (S, T, mix.width), 2 * pairs + 2 * D, 2 * D)],
    }  # fmt: skip
    for name, calls in product.items():
        for phase, sizes, read, written in calls:
            work = Work((Matmul(B * H, *sizes, ATTENTION),), 0, ATTENTION, read, written)
            yield Operator(name, "attention", phase, work, core=True)
    for name, phase, read, written, flops in (
        ("softmax", "forward", 2, 2, 5), ("softmax dropout", "forward", 2, 3, 2),
        ("softmax", "input", 4, 2, 4), ("softmax dropout", "input", 3, 2, 2),
    ):  # fmt: skip
        work = Work((), flops * pairs, "float32", read * pairs, written * pairs)
        yield Operator(name, "attention", phase, work, core=True)


def _pass(one: elementwise.Pass, phase: str, shape: Shape) -> Operator:
    rows = shape.rows / shape.tp if one.split else shape.rows_outside
    work = Work((), int(rows * one.flops), "bfloat16", int(rows * one.read), int(rows * one.written))
    return Operator(one.name, "vector", phase, work, one.times, cheap=one.cheap)
