"""Activations: what forward keeps for backward, operator by operator, in bytes.

An operator keeps what its backward will multiply with: a product its input (and, without weights, both factors), a norm
its input and one statistic, SwiGLU four tensors of width F. The lists below are those of PyTorch's autograd on the
emulated device for the course's model, held to the byte by tests/plan; for GELU models they are those of Megatron with
dropout, whose sum is s·b·h·(34 + 5·a·s/h) (Korthikanti et al. 2022, arXiv:2205.05198, equation 1).

Checkpointing keeps less. "selective" drops the attention core (scores and all that is T × T), "full" everything but
each layer's input; what is dropped comes back, one layer at a time, in backward: see `transient`.

    >>> from course_lib.plan import load_model
    >>> total(of_layer(load_model("gpt3-175b"), 1, 2048)) == 2048 * 12288 * (34 + 5 * 96 * 2048 / 12288) + 2 * 8 * 2048
    True
"""

from collections.abc import Iterator
from dataclasses import dataclass

from course_lib.plan.layers import Number, exact
from course_lib.plan.model import Model

CHECKPOINTING = ("none", "selective", "full")
STATISTIC = 4  # bytes: a norm's 1/rms or mean, a softmax row's log-sum, always float32
LANES = 8  # npu_fusion_attention stores a row's number eight times, as 32 bytes
INDEX = 8  # bytes of a place in a list, int64
MASK = 1  # byte of a dropout mask's element
Bytes = dict[str, Number]  # by operator


@dataclass(frozen=True)
class Item:
    """One kept tensor: ``elements`` per token, or per query-key pair; ``size`` bytes each, None: of the activations.

    ``core``: inside the attention core. ``split``: tensor parallelism cuts it; the rest only sequence parallelism does.
    """

    name: str
    elements: int
    size: int | None = None
    pairs: bool = False
    fixed: bool = False  # once, however many tokens
    core: bool = False
    split: bool = False

    def bytes(self, batch: Number, tokens: Number, element: int, tensor: Number, sequence_parallel: bool) -> Number:
        """Of one layer, for B sequences of T tokens, on one of ``tensor`` ranks."""
        whole = self.elements * (element if self.size is None else self.size)
        if self.fixed:
            return whole
        whole = whole * batch * tokens * (tokens if self.pairs else 1)
        return _share(whole, tensor) if self.split or sequence_parallel else whole


def of_layer(
    model: Model, batch: Number, tokens: Number, element: int = 2, attention: str | None = None,
    checkpointing: str = "none", layer: int = -1, tensor: Number = 1, sequence_parallel: bool = False,
) -> Bytes:  # fmt: skip
    """Bytes that one layer keeps, by operator, for ``batch`` B sequences of ``tokens`` T.

    ``element``: bytes of an activation, 2 or 4. ``attention``: "flash" keeps a row's log-sum, "plain" the T × T scores;
    default: flash for gated models, plain for GELU models, as their formula has it. ``layer``: which one, where they
    differ. Latent attention and experts are those of the course's model: a router in float32, groups not padded.
    ValueError for compressed attention, which is not modelled.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing is {checkpointing!r}; use one of {', '.join(CHECKPOINTING)}")
    B, T, t = exact(batch), exact(tokens), exact(tensor)
    items = list(_items(model, range(model.layers)[layer], attention, element))
    if checkpointing == "full":
        items = items[:1]  # the layer's input
    if checkpointing == "selective":
        items = [item for item in items if not item.core]
    out: Bytes = {}
    for item in items:
        out[item.name] = out.get(item.name, 0) + item.bytes(B, T, element, t, sequence_parallel)
    return out


def of_ends(model: Model, batch: Number, tokens: Number, element: int = 2, tensor: Number = 1) -> Bytes:
    """Bytes kept outside the layers: final norm, and the log-probabilities (V wide) for the backward of the loss."""
    rows, t = exact(batch) * exact(tokens), exact(tensor)
    return {
        "final norm input": element * model.width * rows,
        "final norm statistics": STATISTIC * (1 if model.gated else 2) * rows,
        "final norm result": element * model.width * rows,
        "log-probabilities": _share(element * model.vocab_size * rows, t),
        "sum of the targets' weights": element,
    }


def of_model(
    model: Model, batch: Number, tokens: Number, element: int = 2, attention: str | None = None,
    checkpointing: str = "none", tensor: Number = 1, sequence_parallel: bool = False,
) -> Bytes:  # fmt: skip
    """Bytes that a whole forward pass keeps, by operator. Token numbers, which the caller holds, are not counted."""
    settings = (batch, tokens, element, attention, checkpointing)
    dense = model.experts.first_dense if model.experts else 0
    out: Bytes = {}
    for index, count in ((0, dense), (-1, model.layers - dense)):
        if count:
            for name, value in of_layer(model, *settings, index, tensor, sequence_parallel).items():
                out[name] = out.get(name, 0) + count * value
    return out | of_ends(model, batch, tokens, element, tensor)


def transient(
    model: Model, batch: Number, tokens: Number, element: int = 2, attention: str | None = None,
    checkpointing: str = "none", tensor: Number = 1, sequence_parallel: bool = False,
) -> Number:  # fmt: skip
    """Bytes that come back while backward goes through one checkpointed layer, beside what `of_model` counts."""
    of = [
        total(of_layer(model, batch, tokens, element, attention, level, -1, tensor, sequence_parallel))
        for level in ("none", checkpointing)
    ]
    return of[0] - of[1]


def total(parts: Bytes) -> Number:
    """The sum over operators."""
    return sum(parts.values())


def layers_held(layers: Number, pipeline: Number = 1, virtual: Number = 1) -> Number:
    """Layers' worth of activations on the first of ``pipeline`` p stages under 1F1B, with ``virtual`` v chunks each.

    p micro-batches of L/p layers are in flight, whatever p; interleaving holds L·(1 + (p − 1)/(p·v)) (arXiv:2205.05198,
    section 4.2.3).
    """
    L, p, v = exact(layers), exact(pipeline), exact(virtual)
    more = (v > 1) * (p - 1) / (p * v)
    return L * (1 + more)


# -- what each operator keeps -------------------------------------------------------------------------------


def _items(model: Model, layer: int, attention: str | None, element: int) -> Iterator[Item]:
    if attention not in (None, "flash", "plain"):
        raise ValueError(f"attention is {attention!r}; use 'flash' or 'plain'")
    if model.compressed:
        raise ValueError(
            f"activations of {model.title}: compressed attention is not modelled; parameters, FLOPs and KV are"
        )
    if not model.gated:
        yield from _megatron(model, attention or "plain")
        return
    yield from _norm(model, "attention norm")
    yield from _latent(model) if model.latent else _heads(model)
    wide = model.heads * (model.latent.value if model.latent else model.head_width)
    if (attention or "flash") == "flash":
        unequal = model.latent is not None and model.latent.nope + model.latent.rope != model.latent.value
        statistics = model.heads * (2 * LANES if unequal else 1)  # npu_fusion_attention keeps maximum and sum, by lanes
        yield Item("attention statistics", statistics, STATISTIC, core=True, split=True)
        yield Item(
            "attention result", wide, core=True, split=True
        )  # as flash attention's backward reads it, by heads …
    else:
        yield Item("attention probabilities", model.heads, pairs=True, core=True, split=True)
    yield Item("output input", wide, split=True)  # … and as the next product reads it, by tokens: a copy
    yield from _norm(model, "feed-forward norm")
    sparse = model.experts is not None and layer >= model.experts.first_dense
    yield from _experts(model, element) if sparse else _swiglu("SwiGLU", model.feed_forward)


def _norm(model: Model, name: str) -> Iterator[Item]:
    """RMSNorm keeps its input and 1/rms; its result is the input of the next products, which share it."""
    yield Item(f"{name} input", model.width)
    yield Item(f"{name} statistics", 1, STATISTIC)
    yield Item(f"{name} result", model.width)


def _heads(model: Model) -> Iterator[Item]:
    yield Item("query", model.heads * model.head_width, split=True)
    yield Item("key", model.kv_heads * model.head_width, split=True)
    yield Item("value", model.kv_heads * model.head_width, split=True)


def _latent(model: Model) -> Iterator[Item]:
    a, H = model.latent, model.heads
    if a.query_rank:
        yield Item("query latent", 2 * a.query_rank)  # before and after its norm
        yield Item("latent statistics", 1, STATISTIC)
    yield Item("latent", 2 * (a.rank + a.rope))  # before norm and rotation, and after: what a cache would hold
    yield Item("latent statistics", 1, STATISTIC)
    yield Item("query", H * (a.nope + a.rope), split=True)
    yield Item("key", H * (a.nope + a.rope), split=True)
    yield Item("value", H * (a.nope + a.value), split=True)  # a part of the expanded latents, which live on with it


def _swiglu(name: str, F: int) -> Iterator[Item]:
    yield Item(f"{name} gate", F, split=True)
    yield Item(f"{name} silu(gate)", F, split=True)
    yield Item(f"{name} up", F, split=True)
    yield Item(f"{name} product", F, split=True)


def _experts(model: Model, element: int) -> Iterator[Item]:
    """A router in float32, tokens sorted by expert, grouped products, results put back and weighted."""
    D, e = model.width, model.experts
    if element != STATISTIC:
        yield Item("router input", D, STATISTIC)  # in float32, as its weight, beside the copies in 16 bits
        yield Item("router weight", e.routed * D, STATISTIC, fixed=True)
    yield Item("router scores", e.routed, STATISTIC)
    yield Item("experts' weights", 1 + e.active, STATISTIC)  # each, and their sum, by which they are divided
    yield Item("experts' weights divided", e.active)
    yield Item("experts chosen", e.active, INDEX)
    yield Item("order of tokens", 2 * e.active, INDEX)  # there and back
    yield Item("ends of experts", e.routed, 4, fixed=True)
    yield Item("dispatched tokens", e.active * D, split=True)
    yield from _swiglu("experts", e.active * e.width)
    yield Item("expert results", e.active * D, split=True)  # each is weighted before the sum
    if e.shared:
        yield from _swiglu("shared experts", e.shared * e.width)


def _megatron(model: Model, attention: str) -> Iterator[Item]:
    """LayerNorm, GELU and three dropouts, in the order of section 4.1 of arXiv:2205.05198; statistics are ours."""
    D, H, F, wide = model.width, model.heads, model.feed_forward, model.heads * model.head_width
    yield Item("attention norm input", D)
    yield Item("attention norm statistics", 2, STATISTIC)
    yield Item("attention norm result", D)
    yield Item("query and key", 2 * wide, split=True)
    yield Item("value", wide, split=True)
    if attention == "flash":
        yield Item("attention statistics", H, STATISTIC, core=True, split=True)
    else:
        yield Item("softmax", H, pairs=True, core=True, split=True)
        yield Item("softmax dropout mask", H, MASK, pairs=True, core=True, split=True)
        yield Item("softmax dropout result", H, pairs=True, core=True, split=True)
    yield Item("output input", wide, split=True)
    yield Item("attention dropout mask", D, MASK)
    yield Item("feed-forward norm input", D)
    yield Item("feed-forward norm statistics", 2, STATISTIC)
    yield Item("feed-forward norm result", D)
    yield Item("GELU input", F, split=True)
    yield Item("GELU result", F, split=True)
    yield Item("feed-forward dropout mask", D, MASK)


def _share(whole: Number, ranks: Number) -> Number:
    """``whole`` over ``ranks``; whole numbers stay so where they divide."""
    return whole // ranks if isinstance(whole, int) and isinstance(ranks, int) and whole % ranks == 0 else whole / ranks
