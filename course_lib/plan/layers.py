"""What a model is made of: in each layer weight matrices, and the products of queries with keys and values.

Everything in this package follows from two kinds of product. A token meets each `Matrix` once (its chosen experts
only), whatever the context: 2 FLOPs for each weight. In a `Core` each query meets each key that it sees, and no weight
is involved. Parameters, FLOPs and bytes are sums over these lists.

    >>> from course_lib.plan import load_model
    >>> count(load_model("llama-2-7b")).total
    6738415616
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from course_lib.plan.model import INDEXED, Model

Number = int | float | np.ndarray


def exact(x: object) -> Number:
    """A count as this package calculates with it.

    A Python number stays one: whole numbers are exact at any size. An array becomes float64, exact up to 2^53 and to 16
    digits beyond, where 64-bit integers would overflow in silence (a run of 10^25 FLOPs).
    """
    if isinstance(x, (int, float)):
        return x
    array = np.asarray(x)
    return array.item() if array.ndim == 0 else array.astype(np.float64)


def least(a: Number, b: Number) -> Number:
    """The smaller one, element by element where one is an array."""
    return np.minimum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else min(a, b)


def most(a: Number, b: Number) -> Number:
    """The larger one, element by element where one is an array."""
    return np.maximum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else max(a, b)


@dataclass(frozen=True)
class Matrix:
    """A weight (inputs, outputs), of which ``stored`` copies exist; a token is multiplied by ``active`` of them."""

    name: str
    inputs: int
    outputs: int
    stored: int = 1
    active: int = 1
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Stored numbers, with the bias."""
        return self.stored * self.outputs * (self.inputs + self.bias)

    @property
    def multiplying(self) -> int:
        """Weights that one token is multiplied with; without the bias, which is added."""
        return self.active * self.inputs * self.outputs


@dataclass(frozen=True)
class Keys:
    """How many keys query p = 1, 2, … sees: one for each ``stride`` tokens so far, at most ``most`` of them."""

    stride: int = 1
    most: int | None = None

    def causal(self, T: Number, S: Number) -> Number:
        """(query, key) pairs of the last T of S tokens, none looking ahead."""
        return self._until(S) - self._until(S - T)

    def full(self, T: Number, S: Number) -> Number:
        """Pairs if each of T queries saw the keys of all S tokens."""
        seen = S // self.stride
        return T * (seen if self.most is None else least(seen, self.most))

    def _until(self, n: Number) -> Number:
        """Σ min(⌊p / stride⌋, most) over p = 1 … n."""
        whole = n if self.most is None else least(n, self.stride * self.most - 1)
        q = whole // self.stride
        growing = self.stride * (q * (q - 1) // 2) + q * (whole - self.stride * q + 1)
        return growing if self.most is None else growing + self.most * (n - whole)


ALL = Keys()


@dataclass(frozen=True)
class Core:
    """A product without weights: per pair of a query and a key it sees, ``heads`` times ``width`` multiply-adds.

    ``kv_heads`` of the other factor are stored; ``joint``: keys and values are one tensor.
    """

    name: str
    heads: int
    width: int
    keys: tuple[Keys, ...] = (ALL,)
    kv_heads: int = 1
    joint: bool = False

    def pairs(self, T: Number, S: Number, attention: str) -> Number:
        """(query, key) pairs of T new tokens among S, "causal" or "full"."""
        return sum(getattr(keys, attention)(T, S) for keys in self.keys)


@dataclass(frozen=True)
class Layer:
    """``count`` layers of one kind: their matrices, their cores, and ``gains``, parameters that are in no matrix."""

    kind: str
    count: int
    matrices: tuple[Matrix, ...]
    cores: tuple[Core, ...]
    gains: int

    @property
    def parameters(self) -> int:
        """Of one of these layers."""
        return sum(m.parameters for m in self.matrices) + self.gains

    @property
    def multiplying(self) -> int:
        """Weights that one token is multiplied with in one of these layers."""
        return sum(m.multiplying for m in self.matrices)


@lru_cache(maxsize=256)
def layers(model: Model, absorbed: bool = False) -> tuple[Layer, ...]:
    """The layers of ``model``, equal ones counted together, without multi-token prediction.

    ``absorbed``: latent attention as it decodes, on the latents themselves: the matrix that would expand each cached
    key is applied to the query instead, so all heads share keys of rank + rope and values of rank numbers.
    """
    kinds: dict[Layer, int] = {}
    for index in range(model.layers):
        layer = _layer(model, index, absorbed)
        kinds[layer] = kinds.get(layer, 0) + 1
    return tuple(replace(layer, count=count) for layer, count in kinds.items())


@lru_cache(maxsize=256)
def mtp_layer(model: Model, absorbed: bool = False) -> Layer | None:
    """One depth of multi-token prediction: a layer, and a matrix that joins hidden state and next embedding; or None.

    Embedding and unembedding are those of the model (DeepSeek-V3, arXiv:2412.19437, section 2.2). V4's has the window
    only, and joins with two matrices (D, D), which is the same number of weights.
    """
    if not model.mtp:
        return None
    last = (
        replace(model, compressed=replace(model.compressed, ratios=(0,) * model.layers)) if model.compressed else model
    )
    layer = _layer(last, model.layers - 1, absorbed)
    join = Matrix("mtp projection", 2 * model.width, model.width)
    return replace(layer, kind="mtp", matrices=(join, *layer.matrices), gains=layer.gains + 3 * model.width)


def unembedding(model: Model) -> Matrix:
    """The product that gives logits; it stores nothing of its own where the table is tied to the embedding."""
    return Matrix("unembedding", model.width, model.vocab_size, stored=0 if model.tied else 1)


@dataclass(frozen=True)
class Count:
    """Parameters of a model, by the questions that are asked about them. ``mtp`` is in none of the others."""

    total: int  # all, without multi-token prediction
    embedding: int  # the table that tokens are looked up in; a lookup multiplies nothing
    positions: int  # learned position embeddings
    unembedding: int  # 0 where it is tied to the embedding
    active: int  # what one token needs, without the two lookups: what vendors print beside the total
    multiplying: int  # N: weights in matrices that one token is multiplied with; the unembedding counts, tied or not
    mtp: int  # all depths of multi-token prediction

    @property
    def without_embeddings(self) -> int:
        """In layers and final norm only: N of Kaplan et al. 2020, arXiv:2001.08361."""
        return self.total - self.embedding - self.positions - self.unembedding


@lru_cache(maxsize=256)
def count(model: Model) -> Count:
    """Parameters of ``model``; see `Count`."""
    D, head, kinds = model.width, unembedding(model), layers(model)
    final = D if model.gated else 2 * D
    table, positions = model.vocab_size * D, 0 if model.gated else model.context * D
    inside = sum(layer.count * layer.parameters for layer in kinds) + final
    idle = sum(layer.count * (m.stored - m.active) * m.inputs * m.outputs for layer in kinds for m in layer.matrices)
    extra = mtp_layer(model)
    return Count(
        total=inside + table + positions + head.parameters,
        embedding=table,
        positions=positions,
        unembedding=head.parameters,
        active=inside - idle + head.multiplying,
        multiplying=sum(layer.count * layer.multiplying for layer in kinds) + head.multiplying,
        mtp=model.mtp * extra.parameters if extra else 0,
    )


# -- one layer ----------------------------------------------------------------------------------------------


def _layer(model: Model, index: int, absorbed: bool) -> Layer:
    D = model.width
    if model.compressed:
        attention, cores, gains = _compressed(model, model.compressed.ratios[index])
        kind = {0: "window"}.get(ratio := model.compressed.ratios[index], f"compressed {ratio}")
    elif model.latent:
        (attention, cores, gains), kind = _latent(model, absorbed), "latent"
    else:
        (attention, cores, gains), kind = _heads(model), "attention"
    experts = model.experts is not None and index >= model.experts.first_dense
    feed_forward = _experts(model) if experts else _dense(model)
    bias_of_choice = model.experts.routed if experts else 0
    norms = 2 * D if model.gated else 4 * D
    joined = (*attention, *feed_forward, *_hyper(model))
    gains += norms + bias_of_choice + (2 * (model.streams * (model.streams + 2) + 3) if model.streams > 1 else 0)
    return Layer(f"{kind} + {'experts' if experts else 'dense'}", 1, joined, tuple(cores), gains)


def _heads(model: Model) -> tuple[list[Matrix], list[Core], int]:
    """Multi-head, grouped-query or multi-query attention: H query heads, G key/value heads, head width K."""
    D, H, G, K, bias = model.width, model.heads, model.kv_heads, model.head_width, model.qkv_bias
    matrices = [
        Matrix("query", D, H * K, bias=bias), Matrix("key", D, G * K, bias=bias), Matrix("value", D, G * K, bias=bias),
        Matrix("output", H * K, D, bias=not model.gated),
    ]  # fmt: skip
    return matrices, [Core("scores", H, K, kv_heads=G), Core("mix values", H, K, kv_heads=G)], 0


def _latent(model: Model, absorbed: bool) -> tuple[list[Matrix], list[Core], int]:
    D, H, a = model.width, model.heads, model.latent
    keys = (Keys(most=model.indexer.most),) if model.indexer else (ALL,)
    query = [Matrix("query", D, H * (a.nope + a.rope))]
    if a.query_rank:
        query = [Matrix("query down", D, a.query_rank), Matrix("query up", a.query_rank, H * (a.nope + a.rope))]
    matrices = [
        *query, Matrix("latent down", D, a.rank + a.rope), Matrix("latent up", a.rank, H * (a.nope + a.value)),
        Matrix("output", H * a.value, D),
    ]  # fmt: skip
    widths = (a.rank + a.rope, a.rank) if absorbed else (a.nope + a.rope, a.value)
    shared = 1 if absorbed else H
    cores = [Core(name, H, width, keys, shared, absorbed) for name, width in zip(("scores", "mix values"), widths)]
    gains = (a.query_rank or 0) + a.rank
    if model.indexer:
        i = model.indexer
        inputs = a.query_rank or D
        matrices += [
            Matrix("indexer query", inputs, i.heads * i.width), Matrix("indexer key", D, i.width),
            Matrix("indexer weights", D, i.heads),
        ]  # fmt: skip
        cores.append(Core("indexer scores", i.heads, i.width))
        gains += 2 * i.width  # LayerNorm of the keys
    return matrices, cores, gains


def _compressed(model: Model, ratio: int) -> tuple[list[Matrix], list[Core], int]:
    """DeepSeek-V4's attention, shapes as in the checkpoint: wq_a, wq_b, wkv, wo_a, wo_b, compressor, indexer."""
    D, H, K, c, i = model.width, model.heads, model.head_width, model.compressed, model.indexer
    group = H * K // c.output_groups
    matrices = [
        Matrix("query down", D, c.query_rank), Matrix("query up", c.query_rank, H * K), Matrix("latent down", D, K),
        Matrix("output groups", group, c.output_rank, stored=c.output_groups, active=c.output_groups),
        Matrix("output", c.output_groups * c.output_rank, D),
    ]  # fmt: skip
    keys, cores, gains = [Keys(most=c.window)], [], c.query_rank + K + H  # two norms, one sink per head
    indexed = ratio == INDEXED
    if ratio:
        overlap = 2 if indexed else 1  # CSA's entries overlap: two branches
        matrices += [Matrix("compressor", D, overlap * K), Matrix("compressor gate", D, overlap * K)]
        keys.append(Keys(ratio, i.most if indexed else None))
        gains += K
    if indexed:
        matrices += [
            Matrix("indexer query", c.query_rank, i.heads * i.width), Matrix("indexer weights", D, i.heads),
            Matrix("indexer compressor", D, 2 * i.width), Matrix("indexer compressor gate", D, 2 * i.width),
        ]  # fmt: skip
        cores.append(Core("indexer scores", i.heads, i.width, (Keys(ratio),)))
        gains += i.width
    seen = tuple(keys)
    return matrices, [*(Core(name, H, K, seen, 1, True) for name in ("scores", "mix values")), *cores], gains


def _dense(model: Model) -> Iterator[Matrix]:
    D, F, bias = model.width, model.feed_forward, not model.gated
    if model.gated:
        yield Matrix("gate", D, F)
    yield Matrix("up", D, F, bias=bias)
    yield Matrix("down", F, D, bias=bias)


def _experts(model: Model) -> Iterator[Matrix]:
    D, e = model.width, model.experts
    yield Matrix("router", D, e.routed)
    for name, inputs, outputs in (("gate", D, e.width), ("up", D, e.width), ("down", e.width, D)):
        yield Matrix(f"expert {name}", inputs, outputs, stored=e.routed, active=e.active)
        if e.shared:
            yield Matrix(f"shared {name}", inputs, outputs, stored=e.shared, active=e.shared)


def _hyper(model: Model) -> Iterator[Matrix]:
    """Hyper-connections: n streams in, n + n + n² mixing weights out, before attention and before the experts."""
    n = model.streams
    if n > 1:
        yield Matrix("hyper-connections", n * model.width, n * (n + 2), stored=2, active=2)
