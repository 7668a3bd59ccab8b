"""Device memory of a model: weights, gradients, optimizer state, KV cache; what the allocator adds; what ZeRO divides.

Training keeps the first two of these, inference weights and the third:

* weights, gradients and optimizer state: a fixed number of bytes per parameter, by `PRECISIONS`; ZeRO divides them;
* activations: grow with the tokens of a step, see activations.py;
* the KV cache of inference: grows with the tokens of the context, by the kind of attention.

    >>> from course_lib.plan import load_model
    >>> kv_per_token(load_model("deepseek-v3")), kv_per_token(load_model("llama-3-405b"))
    (70272, 516096)
    >>> [round(total(states(7.5e9, "bfloat16, ZeRO", ranks=64, stage=s)) / 1e9, 1) for s in (0, 1, 2, 3)]
    [120.0, 31.4, 16.6, 1.9]
"""

from dataclasses import dataclass

import numpy as np

from course_lib.plan import activations
from course_lib.plan.activations import Bytes, total
from course_lib.plan.layers import Number, count, exact, layers, least, most
from course_lib.plan.model import INDEXED, Model

BLOCK = 512  # bytes: the allocator rounds each tensor up to whole blocks (torch_npu NPUCachingAllocator.cpp)


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter of weights, gradients and optimizer state (master copy and moments)."""

    weights: int
    gradients: int
    states: int
    source: str


PRECISIONS = {
    "float32": Precision(4, 4, 8, "AdamW: two moments"),
    "bfloat16": Precision(2, 2, 4, "all in bfloat16, as a model that was moved to it trains; loses small updates"),
    "bfloat16, ZeRO": Precision(2, 2, 12, "arXiv 1910.02054, section 3.1: K = 12, float32 weights and moments"),
    "bfloat16, Megatron": Precision(
        2, 4, 12, "arXiv 2205.05198, figure 1: 18 bytes per parameter, gradients in float32"
    ),
    "inference": Precision(2, 0, 0, "16-bit weights"),
}


def precision_of(name: str) -> Precision:
    """The entry of `PRECISIONS`; ValueError for another name."""
    if name not in PRECISIONS:
        raise ValueError(f"precision is {name!r}; use one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def states(parameters: Number, precision: str = "bfloat16, ZeRO", ranks: Number = 1, stage: Number = 0) -> Bytes:
    """Bytes per rank of weights, gradients and optimizer states under ZeRO ``stage`` 0 to 3 over ``ranks``.

    Stage 1 divides the optimizer states, 2 also the gradients, 3 also the weights (arXiv:1910.02054, section 3).
    ValueError for an unknown precision or stage.
    """
    p, N, P, z = precision_of(precision), exact(parameters), exact(ranks), exact(stage)
    if np.any((np.asarray(stage) < 0) | (np.asarray(stage) > 3)):
        raise ValueError(f"ZeRO stage is {stage}; use 0, 1, 2 or 3")
    sizes = (("weights", p.weights, 3), ("gradients", p.gradients, 2), ("optimizer states", p.states, 1))
    return {name: _divided(size * N, P, z >= divided) for name, size, divided in sizes}


def training(
    model: Model, batch: Number, tokens: Number, precision: str = "float32", attention: str | None = None,
    checkpointing: str = "none",
) -> Bytes:  # fmt: skip
    """Bytes by category on one device at the end of forward: weights and states, gradients, kept activations.

    A lower bound on the peak: see `peak`.
    """
    element = precision_of(precision).weights
    kept = activations.of_model(model, batch, tokens, element, attention, checkpointing)
    return states(count(model).total, precision) | {"activations": total(kept)}


def peak(
    model: Model, batch: Number, tokens: Number, precision: str = "float32", attention: str | None = None,
    checkpointing: str = "none", gradients_held: bool = False,
) -> Number:  # fmt: skip
    """Bytes at the peak of a training step on one device: the highest of four moments, for models of dense layers.

    * backward of the loss: activations, and two more tensors (B·T, V), the gradients before and after log-softmax;
    * backward of the last layer: what checkpointing had dropped of it is back, beside gradients in its feed-forward;
    * backward of the first layer: other activations are gone, and nearly all gradients are there;
    * the optimizer's step: weights, gradients and states, no activations.
    ``gradients_held``: they are there from the start (accumulation); without it each is made in backward.
    """
    parts = training(model, batch, tokens, precision, attention, checkpointing)
    p, B, T = precision_of(precision), exact(batch), exact(tokens)
    resident, all_gradients = parts["weights"] + parts["optimizer states"], parts["gradients"]
    shape = (model, B, T, p.weights, attention)
    scores = p.weights * model.vocab_size * B * T
    inside = p.weights * (2 * model.feed_forward + model.width) * B * T  # gradients of two factors and of the residual
    table, layer = model.vocab_size * model.width, layers(model)[0]
    last = first = all_gradients
    if not gradients_held:
        last = p.gradients * (table + model.width * model.feed_forward)
        to_come = layer.parameters - model.width * model.feed_forward + table * (not model.tied)
        first = all_gradients - p.gradients * to_come
    moments = (
        parts["activations"] + 2 * scores + (all_gradients if gradients_held else 0),
        parts["activations"] - scores + activations.transient(*shape, checkpointing) + inside + last,
        total(activations.of_layer(*shape)) + inside + first,
        all_gradients,
    )
    highest = moments[0]
    for moment in moments[1:]:
        highest = most(highest, moment)
    return resident + highest


# -- KV cache -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CacheFormat:
    """Bytes of a cache: of an element, of an element that carries position, and of scales and indexer key per entry."""

    element: float
    rotary: float
    scales: int = 0
    index: float | None = None  # bytes of an indexer's key; None: its width in ``element`` bytes
    source: str = ""


FORMATS = {
    "bfloat16": CacheFormat(2, 2),
    "float32": CacheFormat(4, 4),
    "int8": CacheFormat(1, 1),
    "V3.2": CacheFormat(
        1, 2, 16, 132, "deepseek-ai/FlashMLA README: 512 FP8 + 16 of scales + 64 BF16; indexer 128 + 4"
    ),
    "V4": CacheFormat(1, 2, 0, 64, "arXiv 2606.19348: rotary part BF16, rest FP8, indexer FP4"),
}


def kv_per_token(model: Model, form: str = "bfloat16") -> int | float:
    """Bytes that one more token adds to the cache, in all layers (compressed attention: on average, beyond its window).

    Elements per layer: 2·G·K for MHA (G = H), GQA and MQA (G = 1); rank + rope for MLA (DeepSeek-V2, arXiv:2405.04434,
    table 1); for compressed attention an entry per ratio tokens.
    """
    f, index = _format(form), _index_bytes(model, form)
    if model.compressed:
        return sum(
            layer_count * (_entry(model, f) + (index if ratio == INDEXED else 0)) / ratio
            for ratio, layer_count in _ratios(model).items() if ratio
        )  # fmt: skip
    return model.layers * (_entry(model, f) + index)


def kv_cache(model: Model, batch: Number = 1, context: Number = 1, form: str = "bfloat16") -> Number:
    """Bytes of the cache of ``batch`` sequences of ``context`` S tokens; compressed attention adds its window."""
    B, S, f = exact(batch), exact(context), _format(form)
    if not model.compressed:
        return B * S * kv_per_token(model, form)
    window = model.layers * least(S, model.compressed.window) * _entry(model, f)
    entries = sum(
        layer_count * (S // ratio) * (_entry(model, f) + (_index_bytes(model, form) if ratio == INDEXED else 0))
        for ratio, layer_count in _ratios(model).items() if ratio
    )  # fmt: skip
    return B * (window + entries)


def kv_read(model: Model, context: Number, form: str = "bfloat16") -> Number:
    """Bytes of one sequence's cache of ``context`` S tokens that one query reads: sparse attention skips entries.

    An indexer reads the keys of all entries, attention the entries that it has chosen.
    """
    S, entry, index = exact(context), _entry(model, _format(form)), _index_bytes(model, form)
    out = 0
    for layer in layers(model, absorbed=True):
        by_name = {core.name: core for core in layer.cores}
        chosen = entry * sum(keys.full(1, S) for keys in by_name["scores"].keys)
        looked = (
            index * sum(keys.full(1, S) for keys in by_name["indexer scores"].keys)
            if "indexer scores" in by_name
            else 0
        )
        out = out + layer.count * (chosen + looked)
    return out


def _entry(model: Model, f: CacheFormat) -> int | float:
    """Bytes of one cache entry of one layer, without an indexer's key."""
    if model.latent:
        return model.latent.rank * f.element + model.latent.rope * f.rotary + f.scales
    if model.compressed:
        rope = model.compressed.rope
        return (model.head_width - rope) * f.element + rope * f.rotary + f.scales
    return 2 * model.kv_heads * model.head_width * f.element + f.scales


def _index_bytes(model: Model, form: str) -> int | float:
    if model.indexer is None:
        return 0
    f = _format(form)
    return model.indexer.width * f.element if f.index is None else f.index


def _ratios(model: Model) -> dict[int, int]:
    """Compression ratio → number of layers."""
    ratios = model.compressed.ratios
    return {ratio: ratios.count(ratio) for ratio in sorted(set(ratios))}


def _format(form: str) -> CacheFormat:
    if form not in FORMATS:
        raise ValueError(f"cache format is {form!r}; use one of {', '.join(FORMATS)}")
    return FORMATS[form]


# -- inference, allocator -----------------------------------------------------------------------------------


def inference(
    model: Model, batch: Number, context: Number, weight_bytes: float = 2, form: str = "bfloat16", mtp: bool = False
) -> Bytes:
    """Bytes of serving: weights at ``weight_bytes`` each, cache of ``batch`` sequences of ``context`` tokens."""
    n = count(model)
    return {
        "weights": (n.total + (n.mtp if mtp else 0)) * weight_bytes,
        "KV cache": kv_cache(model, batch, context, form),
    }


def batch_limit(
    model: Model,
    capacity: Number,
    context: Number,
    weight_bytes: float = 2,
    form: str = "bfloat16",
    reserve: float = 0.0,
) -> Number:
    """How many sequences of ``context`` tokens fit into ``capacity`` bytes beside the weights; 0 where these do not.

    ``reserve``: the share of the capacity that is kept for activations and the runtime.
    """
    room = exact(capacity) * (1 - reserve) - count(model).total * weight_bytes
    return most(room // kv_cache(model, 1, context, form), 0)


def rounded(nbytes: Number) -> Number:
    """Bytes that the allocator takes for a tensor: whole blocks of 512. On average half a block is lost per tensor."""
    return -(-exact(nbytes) // BLOCK) * BLOCK


def activations_rounded(
    model: Model,
    batch: Number,
    tokens: Number,
    element: int = 4,
    attention: str | None = None,
    checkpointing: str = "none",
) -> Number:
    """Bytes that the allocator takes for what forward keeps, each tensor rounded; for models of equal layers."""
    layer = activations.of_layer(model, batch, tokens, element, attention, checkpointing)
    ends = activations.of_ends(model, batch, tokens, element)
    return model.layers * sum(map(rounded, layer.values())) + sum(map(rounded, ends.values()))


def parameters_rounded(model: Model, element: int = 4) -> Number:
    """Bytes that the allocator takes for all weights, one tensor for each matrix, bias-free; for plain gated models.

    ValueError for other models: how they cut their weights into tensors is not in their shape.
    """
    if not model.gated or model.latent or model.compressed or model.experts or model.qkv_bias:
        raise ValueError(f"{model.title}: how the weights are cut into tensors is not modelled; use rounded()")
    D, tables = model.width, 1 if model.tied else 2
    of_layer = sum(rounded(element * m.parameters) for m in layers(model)[0].matrices) + 2 * rounded(element * D)
    return model.layers * of_layer + tables * rounded(element * model.vocab_size * D) + rounded(element * D)


def _divided(whole: Number, ranks: Number, divide: bool | np.ndarray) -> Number:
    """``whole`` over ``ranks`` where ``divide`` says so."""
    if isinstance(divide, np.ndarray):
        return np.where(divide, whole / ranks, whole)
    return whole / ranks if divide else whole
