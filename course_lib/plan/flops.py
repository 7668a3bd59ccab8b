"""FLOPs of a language model, by operator: forward, backward, recomputation; and what 2N and 6N leave out.

A multiply-add is 2 FLOPs. Only products of matrices are counted, as the cube executes them and as every published MFU
does: embedding lookups are named with 0, and norms, activations, softmax and mixing of residual streams are left out
(they run on the vector cores). Attention is counted by a convention: "causal" counts
the pairs in which a query sees a key at or before its own place, T·(T+1)/2 of T², "full" counts all T².

* forward: 2 per weight and token, and 2 products per query-key pair (scores, mix of values).
* backward: twice that, one product for the input and one for the weight; only the first where the weight is frozen.
  Flash attention keeps no scores and computes them again, a fifth product: executed, but in no model-FLOPs convention.
* recompute: the forward of what checkpointing has thrown away.

All functions take arrays for batch, tokens and context, and give exact integers for Python integers.

    >>> from course_lib.plan import load_model
    >>> llama = load_model("llama-2-7b")
    >>> per_token(llama, "6N+attention causal", 4096)
    42864476160
    >>> error(llama, 4096), error(llama, 4096, "all")     # 2N with the N that multiplies, and with the N of the name
    (-0.0751..., -0.0567...)
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np

from course_lib.plan.layers import Core, Layer, Number, count, exact, layers, mtp_layer, unembedding
from course_lib.plan.model import Model

ATTENTION = ("causal", "full")
CONVENTIONS = {"6N": None, "6N+attention causal": "causal", "6N+attention full": "full"}
CHECKPOINTING = ("none", "selective", "full")
WEIGHTS = ("multiplying", "all", "without embeddings")
Flops = dict[str, Number]  # by operator


def forward(
    model: Model, batch: Number = 1, tokens: Number = 1, context: Number | None = None, attention: str = "causal",
    logits: str = "all", absorbed: bool = False, mtp: bool = False,
) -> Flops:  # fmt: skip
    """FLOPs by operator of a forward pass over ``tokens`` T new tokens of each of ``batch`` sequences.

    ``context`` S counts all tokens of a sequence so far (default T: nothing is cached). ``logits``: "all", or "last" as
    a prompt needs them. ``absorbed``: latent attention on the latents; without it, cached latents are expanded again in
    each step. ``mtp``: with the layers of multi-token prediction. ValueError for another word.
    """
    _one_of("attention", attention, ATTENTION)
    _one_of("logits", logits, ("all", "last"))
    B, T = exact(batch), exact(tokens)
    S = T if context is None else exact(context)
    if np.any(np.asarray(S) < np.asarray(T)):
        raise ValueError(
            f"context is {context} for {tokens} new tokens, which it counts as well; give at least as many"
        )
    out: Flops = {"embedding": 0}
    for layer in _layers(model, absorbed, mtp):
        _add(out, layer, B, T, S, attention, expanded=0 if absorbed else S)
    head = 2 * B * (T if logits == "all" else 1) * unembedding(model).multiplying
    out["unembedding"] = head * (1 + (model.mtp if mtp else 0))
    return out


def of_layer(
    layer: Layer, batch: Number = 1, tokens: Number = 1, context: Number | None = None, attention: str = "causal"
) -> Flops:
    """FLOPs by operator of a forward pass through one layer of this kind; arguments as in `forward`."""
    _one_of("attention", attention, ATTENTION)
    T = exact(tokens)
    out: Flops = {}
    _add(out, replace(layer, count=1), exact(batch), T, T if context is None else exact(context), attention, expanded=0)
    return out


def backward(
    model: Model, batch: Number = 1, tokens: Number = 1, attention: str = "causal", flash: bool = True,
    trained: bool = True, mtp: bool = False,
) -> Flops:  # fmt: skip
    """FLOPs by operator that backward executes after a forward over ``tokens`` T of each of ``batch`` sequences.

    ``flash``: the scores are computed once more. ``trained=False``: weights are frozen, as under adapters, and cost
    half.
    """
    cores = {core.name for layer in _layers(model, False, mtp) for core in layer.cores}
    flops = forward(model, batch, tokens, attention=attention, mtp=mtp)
    out = {name: value * (2 if trained or name in cores else 1) for name, value in flops.items()}
    if flash:
        out["scores"] = out["scores"] + flops["scores"]
    return out


def recompute(
    model: Model, batch: Number = 1, tokens: Number = 1, checkpointing: str = "none", attention: str = "causal",
    mtp: bool = False,
) -> Flops:  # fmt: skip
    """FLOPs by operator that backward executes once more: of none, of the attention core, or of whole layers.

    "full" repeats whole layers; PyTorch's checkpoint stops early and spares a layer's last product ("down").
    """
    _one_of("checkpointing", checkpointing, CHECKPOINTING)
    kinds = _layers(model, False, mtp)
    again = {core.name for layer in kinds for core in layer.cores} if checkpointing != "none" else set()
    if checkpointing == "full":
        again |= {matrix.name for layer in kinds for matrix in layer.matrices}
    flops = forward(model, batch, tokens, attention=attention, mtp=mtp)
    return {name: value for name, value in flops.items() if name in again}


def total(flops: Flops) -> Number:
    """The sum over operators."""
    return sum(flops.values())


def executed(
    model: Model, batch: Number = 1, tokens: Number = 1, checkpointing: str = "none", attention: str = "causal",
    flash: bool = True, mtp: bool = False,
) -> Number:  # fmt: skip
    """FLOPs of one training pass as executed (the numerator of HFU): forward, recomputation, backward."""
    kept = (model, batch, tokens)
    parts = (
        forward(*kept, attention=attention, mtp=mtp), recompute(*kept, checkpointing, attention, mtp),
        backward(*kept, attention, flash, mtp=mtp),
    )  # fmt: skip
    return sum(total(part) for part in parts)


def per_token(model: Model, convention: str, context: Number | None = None, mtp: bool = False) -> Number:
    """Model FLOPs to train on one token of a sequence of ``context`` T, by a named convention (the numerator of MFU).

    "6N": N weights that multiply (active ones; unembedding, not embedding) make 2 FLOPs forward and 4 backward.
    "6N+attention full": also three times two products with all T keys: 12·L·D·T for MHA (PaLM, arXiv:2204.02311,
    appendix B). "6N+attention causal": with the (T+1)/2 keys that a token sees on average: 6·L·D·(T+1). ValueError for
    another convention.
    """
    _one_of("convention", convention, tuple(CONVENTIONS))
    T = exact(model.context if context is None else context)
    attention = CONVENTIONS[convention]
    kinds = _layers(model, False, mtp)
    weights = sum(layer.count * layer.multiplying for layer in kinds)
    weights += unembedding(model).multiplying * (1 + (model.mtp if mtp else 0))
    if attention is None:
        return 6 * weights
    cores = 6 * sum(layer.count * _core(core, T, T, attention) for layer in kinds for core in layer.cores)
    return 6 * weights + (cores // T if isinstance(cores, int) and cores % T == 0 else cores / T)


def weights(model: Model, which: str = "multiplying") -> int:
    """The N of 2N and 6N, active experts only: "multiplying", "all" (also lookups and gains), "without embeddings"."""
    _one_of("which", which, WEIGHTS)
    n = count(model)
    lookups = n.embedding * (not model.tied) + n.positions
    head = unembedding(model).multiplying
    return {"multiplying": n.multiplying, "all": n.active + lookups, "without embeddings": n.active - head}[which]


def error(model: Model, context: Number | None = None, which: str = "multiplying", attention: str = "causal") -> Number:
    """Relative error of 2N for a forward, and so of 6N for training, at sequences of ``context`` T: 2N·T / FLOPs − 1.

    Negative where attention is left out; positive where N counts weights that multiply nothing.
    """
    T = exact(model.context if context is None else context)
    return 2 * weights(model, which) * T / total(forward(model, 1, T, attention=attention)) - 1


# -- inside -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _layers(model: Model, absorbed: bool, mtp: bool) -> tuple[Layer, ...]:
    extra = mtp_layer(model, absorbed) if mtp else None
    return (*layers(model, absorbed), *(() if extra is None else (extra,) * model.mtp))


def _add(out: Flops, layer: Layer, B: Number, T: Number, S: Number, attention: str, expanded: Number) -> None:
    """Add the FLOPs of all ``layer.count`` layers; "latent up" expands ``expanded`` tokens, or T new ones if 0."""
    for matrix in layer.matrices:
        times = expanded if matrix.name == "latent up" and not _is_zero(expanded) else T
        out[matrix.name] = out.get(matrix.name, 0) + 2 * layer.count * matrix.multiplying * B * times
    for core in layer.cores:
        out[core.name] = out.get(core.name, 0) + 2 * layer.count * B * _core(core, T, S, attention)


def _core(core: Core, T: Number, S: Number, attention: str) -> Number:
    """Multiply-adds of one core over T new tokens among S."""
    return core.heads * core.width * core.pairs(T, S, attention)


def _is_zero(x: Number) -> bool:
    return isinstance(x, int) and x == 0


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(choices)}")
