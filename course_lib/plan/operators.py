"""The operators of one forward pass as the chip sees them: products with their shapes, and bytes of device memory.

flops.py gives sums over arrays of configurations; here one configuration is taken apart into the `Work` that
`course_lib.chip.cost.cost` turns into time, so that a table can show what bounds each operator. Bytes are those of a
kernel that reads each operand and writes its result once; attention is flash attention, whose scores stay on the chip.

    >>> from course_lib import chip, plan
    >>> rows = priced(plan.load_model("llama-2-7b"), chip.load_chip("ascend-910b2"), batch=1, tokens=1, context=4096)
    >>> {row.cost.bound for row in rows}
    {'memory'}
"""

from collections.abc import Iterator
from dataclasses import dataclass

from course_lib.chip import ChipSpec, Cost, Matmul, Work, cost
from course_lib.chip.figures import DTYPES
from course_lib.plan.layers import Core, Layer, Matrix, layers, unembedding
from course_lib.plan.model import Model

SOFTMAX = 5  # vector operations per query-key pair: scale, max, subtract, exp, sum


@dataclass(frozen=True)
class Operator:
    """One operator of a layer of ``kind``, of which the model has ``layers``; ``work`` is of one of them."""

    name: str
    kind: str
    layers: int
    work: Work


@dataclass(frozen=True)
class Priced:
    """An operator and what one of its calls costs on a chip; ``layers`` of them run."""

    name: str
    kind: str
    layers: int
    cost: Cost

    @property
    def ps(self) -> int:
        """Picoseconds of all layers."""
        return self.layers * self.cost.ps


def operators(
    model: Model, batch: int = 1, tokens: int = 1, context: int | None = None, dtype: str = "bfloat16",
    absorbed: bool = False,
) -> list[Operator]:  # fmt: skip
    """Matrix products and attention of a forward pass over ``tokens`` T new tokens of each of ``batch`` sequences.

    Causal; ``context`` S counts all tokens of a sequence so far (default T). Whole numbers only. Experts get equal
    shares of the tokens; of experts that none would reach, none is read.
    """
    S = tokens if context is None else context
    kinds = layers(model, absorbed)
    found = [
        Operator(name, layer.kind, layer.count, work)
        for layer in kinds
        for name, work in _works(layer, batch, tokens, S, dtype)
    ]
    return [*found, Operator("unembedding", "end", 1, _product(unembedding(model), batch * tokens, dtype))]


def priced(model: Model, chip: ChipSpec, **configuration: object) -> list[Priced]:
    """What each of the `operators` costs on ``chip``, by the same cost model that the emulated device charges."""
    return [Priced(op.name, op.kind, op.layers, cost(chip, op.work)) for op in operators(model, **configuration)]


def _works(layer: Layer, B: int, T: int, S: int, dtype: str) -> Iterator[tuple[str, Work]]:
    for matrix in layer.matrices:
        yield matrix.name, _product(matrix, B * T, dtype)
    cores = {core.name: core for core in layer.cores}
    yield "attention", _attention(cores["scores"], cores["mix values"], B, T, S, dtype)
    if "indexer scores" in cores:
        yield "indexer scores", _attention(cores["indexer scores"], None, B, T, S, dtype)


def _product(matrix: Matrix, rows: int, dtype: str) -> Work:
    """(rows, inputs) × (inputs, outputs), for each copy that is in use; ``rows`` tokens share the active copies."""
    size, used = DTYPES[dtype], min(matrix.stored or 1, rows * matrix.active)
    each = -(-rows * matrix.active // used)
    full, rest = divmod(rows * matrix.active, each)
    products = [Matmul(full, each, matrix.inputs, matrix.outputs, dtype)]
    if rest:
        products.append(Matmul(1, rest, matrix.inputs, matrix.outputs, dtype))
    entering = rows * matrix.inputs * (1 if matrix.stored == matrix.active == 1 or not matrix.stored else matrix.active)
    read = size * (entering + used * matrix.outputs * (matrix.inputs + matrix.bias))
    leaving = rows * matrix.active * matrix.outputs
    return Work(tuple(products), leaving * matrix.bias, dtype, read, size * leaving)


def _attention(scores: Core, mix: Core | None, B: int, T: int, S: int, dtype: str) -> Work:
    """Flash attention over the pairs that are seen: queries, keys and values in, results out."""
    pairs = scores.pairs(T, S, "causal")
    widths = [scores.width] + ([mix.width] if mix else [])
    products = tuple(m for width in widths for m in pairs_as_products(B * scores.heads, T, pairs, width, dtype))
    size, keys = DTYPES[dtype], sum(k.full(1, S) for k in scores.keys)
    shared = scores.kv_heads * (scores.width + (mix.width if mix and not scores.joint else 0))
    read = size * B * (T * scores.heads * scores.width + keys * shared)
    written = size * B * T * scores.heads * (mix.width if mix else 1)
    return Work(products, SOFTMAX * B * scores.heads * pairs, "float32", read, written)


def pairs_as_products(batch: int, T: int, pairs: int, width: int, dtype: str) -> tuple[Matmul, ...]:
    """``batch`` products with ``pairs`` results of inner dimension ``width``: exactly 2·pairs·width FLOPs each."""
    for rows in (T // 2, T):
        if rows and pairs % rows == 0:
            return (Matmul(batch, rows, width, pairs // rows, dtype),)
    rest = (Matmul(batch, pairs % T, width, 1, dtype),) if pairs % T else ()
    return (*((Matmul(batch, T, width, pairs // T, dtype),) if pairs // T else ()), *rest)
