"""Time: how long training and inference take on a chip, and how well they use it.

Two ways to a time. `prefill`, `decode` and `serve` take the larger of FLOPs over peak and bytes over bandwidth, once
for the products with weights and once for attention: closed forms over arrays, optimistic by construction, for nothing
is launched, padded or communicated; ``efficiency`` scales peak and bandwidth. For one configuration operators.py asks
the device's own cost model instead, tiles and launches included. `training_time` takes a utilisation that was measured.

A utilisation always says which FLOPs it counts and which peak divides it: the same run of DeepSeek-V3 is 43.8 % with
the full square of attention and 39.1 % with the causal half.

    >>> from course_lib import chip, plan
    >>> v3, h800 = plan.load_model("deepseek-v3"), chip.load_chip("h800")
    >>> print(mfu(v3, 272.80e9 / 86400, 2048, h800, "6N+attention causal", context=4096))
    39.0 % (6N+attention causal; bfloat16 cube peak 990 TFLOP/s × 2048)
"""

from dataclasses import dataclass

import numpy as np

from course_lib.chip import ChipSpec, UnknownFigure
from course_lib.plan import flops, memory
from course_lib.plan.layers import Number, count, exact, layers, most
from course_lib.plan.model import Model

ADAMW_BYTES = {
    "float32": 28,
    "bfloat16": 14,
    "bfloat16, ZeRO": 28,
    "bfloat16, Megatron": 30,
}  # read and written each step


@dataclass(frozen=True)
class Utilisation:
    """FLOPs over what the peak could do, 0 to 1 (None: peak unknown), with the convention and the peak by name."""

    value: Number | None
    convention: str
    peak: str

    def __str__(self) -> str:
        if self.value is None:
            shown = "unknown"
        else:
            shown = " ".join(f"{100 * one:.1f}" for one in np.atleast_1d(self.value)) + " %"
        return f"{shown} ({self.convention}; {self.peak})"


@dataclass(frozen=True)
class Phase:
    """A pass over the model on one chip: FLOPs, bytes of device memory, seconds; ``compute`` of it bound by FLOPs."""

    name: str
    flops: Number
    bytes: Number
    seconds: Number
    compute: Number

    @property
    def intensity(self) -> Number:
        """FLOPs per byte."""
        return self.flops / self.bytes

    @property
    def bound(self) -> str | np.ndarray:
        """ "cube" where more than half of the time goes to arithmetic, else "memory"."""
        answer = np.where(np.asarray(self.compute) > np.asarray(self.seconds) / 2, "cube", "memory")
        return str(answer) if answer.ndim == 0 else answer


@dataclass(frozen=True)
class Serving:
    """Requests in batches: seconds to the first token (TTFT), per further token (TPOT), and tokens/s of the chip."""

    ttft: Number
    tpot: Number
    tokens_per_s: Number  # generated tokens of all requests over the time of the batch, its prompts included
    fits: bool | np.ndarray  # weights and cache in the chip's memory


# -- utilisation and training time --------------------------------------------------------------------------


def mfu(
    model: Model, tokens_per_s: Number, chips: Number, chip: ChipSpec | float, convention: str,
    context: Number | None = None, dtype: str = "bfloat16", counts: str = "cube", forward_only: bool = False,
) -> Utilisation:  # fmt: skip
    """Model FLOPs utilisation at ``tokens_per_s`` on all ``chips`` together; recomputation does not count.

    ``chip``: a ChipSpec, or a peak in FLOP/s. ``forward_only``: of inference, a third of the convention's FLOPs.
    """
    each = flops.per_token(model, convention, context) / (3 if forward_only else 1)
    return _utilisation(each * exact(tokens_per_s), chips, chip, convention, dtype, counts)


def hfu(
    model: Model, tokens_per_s: Number, chips: Number, chip: ChipSpec | float, checkpointing: str,
    context: Number | None = None, dtype: str = "bfloat16", counts: str = "cube", flash: bool = True,
) -> Utilisation:  # fmt: skip
    """Hardware FLOPs utilisation: all that is executed counts, also recomputation and flash attention's scores."""
    T = exact(model.context if context is None else context)
    each = flops.executed(model, 1, T, checkpointing, flash=flash) / T
    label = f"executed, checkpointing {checkpointing}{', flash attention' * flash}"
    return _utilisation(each * exact(tokens_per_s), chips, chip, label, dtype, counts)


def training_time(
    model: Model, tokens: Number, chips: Number, chip: ChipSpec | float, utilisation: Number, convention: str,
    context: Number | None = None, dtype: str = "bfloat16", counts: str = "cube",
) -> Number:  # fmt: skip
    """Seconds to train on ``tokens`` at a given MFU; ``convention``, ``dtype`` and ``counts`` are those of the MFU.

    UnknownFigure where the chip's peak is unknown.
    """
    work = flops.per_token(model, convention, context) * exact(tokens)
    return work / (exact(utilisation) * exact(chips) * _peak(chip, dtype, counts))


def tokens_per_second(
    model: Model, chips: Number, chip: ChipSpec | float, utilisation: Number, convention: str,
    context: Number | None = None, dtype: str = "bfloat16", counts: str = "cube",
) -> Number:  # fmt: skip
    """Training tokens/s of all ``chips`` at a given MFU."""
    return 1 / training_time(model, 1, chips, chip, utilisation, convention, context, dtype, counts)


# -- phases on one chip -------------------------------------------------------------------------------------


def prefill(
    model: Model, chip: ChipSpec, batch: Number, prompt: Number, dtype: str = "bfloat16", weight_bytes: float = 2,
    form: str = "bfloat16", efficiency: tuple[Number, Number] = (1.0, 1.0),
) -> Phase:  # fmt: skip
    """All ``prompt`` tokens of ``batch`` sequences at once, logits of the last: its seconds are the TTFT.

    ``dtype``: of the products; ``weight_bytes``: of a stored weight; ``form``: of the cache, see memory.FORMATS;
    ``efficiency``: the shares of peak and of bandwidth that are reached, 1 for a lower bound on the time.
    """
    T = exact(prompt)
    parts = flops.forward(model, batch, T, logits="last")
    written = memory.kv_cache(model, batch, T, form)
    return _phase("prefill", model, chip, parts, exact(batch) * T, written, dtype, weight_bytes, efficiency)


def decode(
    model: Model, chip: ChipSpec, batch: Number, context: Number, dtype: str = "bfloat16", weight_bytes: float = 2,
    form: str = "bfloat16", efficiency: tuple[Number, Number] = (1.0, 1.0), absorbed: bool = True,
) -> Phase:  # fmt: skip
    """One more token for each of ``batch`` sequences of ``context`` S tokens: its seconds are the TPOT.

    The whole cache is read (of sparse attention what it selects, and the indexer's keys). ``absorbed``: see
    flops.forward.
    """
    parts = flops.forward(model, batch, 1, context, absorbed=absorbed)
    read = exact(batch) * memory.kv_read(model, context, form)
    return _phase("decode", model, chip, parts, exact(batch), read, dtype, weight_bytes, efficiency)


def serve(
    model: Model, chip: ChipSpec, batch: Number, prompt: Number, output: Number, dtype: str = "bfloat16",
    weight_bytes: float = 2, form: str = "bfloat16", efficiency: tuple[Number, Number] = (1.0, 1.0),
) -> Serving:  # fmt: skip
    """``batch`` requests of ``prompt`` tokens that get ``output`` tokens each, on one chip, prompts first."""
    B, T, more = exact(batch), exact(prompt), exact(output)
    settings = (dtype, weight_bytes, form, efficiency)
    ttft = prefill(model, chip, B, T, *settings).seconds
    tpot = decode(model, chip, B, T + more // 2, *settings).seconds  # at the mean context
    held = memory.total(memory.inference(model, B, T + more, weight_bytes, form))
    return Serving(ttft, tpot, B * more / (ttft + (more - 1) * tpot), held <= chip.require("memory_bytes"))


def train(
    model: Model, chip: ChipSpec, batch: Number, tokens: Number, precision: str = "bfloat16", dtype: str = "bfloat16",
    checkpointing: str = "none", efficiency: tuple[Number, Number] = (1.0, 1.0),
) -> list[Phase]:  # fmt: skip
    """Forward, recompute, backward and optimizer (AdamW) of one step on one chip.

    Bytes are a lower bound: each weight is read once per pass, what is kept is written in forward and read in backward,
    gradients are written once; the optimizer reads and writes all its states.
    """
    B, T, n, p = exact(batch), exact(tokens), count(model).total, memory.precision_of(precision)
    kept = memory.training(model, B, T, precision, None, checkpointing)["activations"]
    weights, gradients = p.weights * n, p.gradients * n
    passes = [
        ("forward", flops.forward(model, B, T), weights + kept),
        ("recompute", flops.recompute(model, B, T, checkpointing), weights if checkpointing == "full" else 0),
        ("backward", flops.backward(model, B, T), weights + gradients + kept),
        ("optimizer", {}, ADAMW_BYTES[precision] * n),
    ]
    rates = _rates(chip, dtype, efficiency)
    return [_roofline(name, flops.total(parts), nbytes, rates) for name, parts, nbytes in passes]


def experts_read(model: Model, tokens: Number) -> Number:
    """Routed experts of a layer that some of ``tokens`` reaches, if each chooses evenly: E·(1 − (1 − k/E)^tokens)."""
    e = model.experts
    return e.routed * (1 - (1 - e.active / e.routed) ** exact(tokens))


def weights_read(model: Model, tokens: Number) -> Number:
    """Parameters that a forward pass over ``tokens`` reads: all but the embedding, of routed experts those reached."""
    routed = [m for layer in layers(model) for m in layer.matrices * layer.count if m.stored > m.active]
    n = count(model)
    fixed = n.total - n.positions - n.embedding * (not model.tied) - sum(m.parameters for m in routed)
    return fixed + (experts_read(model, tokens) * sum(m.inputs * m.outputs for m in routed) if routed else 0)


# -- inside -------------------------------------------------------------------------------------------------


def _phase(
    name: str, model: Model, chip: ChipSpec, parts: flops.Flops, tokens: Number, cache: Number, dtype: str,
    weight_bytes: float, efficiency: tuple[Number, Number],
) -> Phase:  # fmt: skip
    cores = {core.name for layer in layers(model) for core in layer.cores}
    rates = _rates(chip, dtype, efficiency)
    in_cores = sum(value for part, value in parts.items() if part in cores)
    weights = _roofline(name, flops.total(parts) - in_cores, weight_bytes * weights_read(model, tokens), rates)
    attention = _roofline(name, in_cores, cache, rates)
    both = ((getattr(weights, field), getattr(attention, field)) for field in ("flops", "bytes", "seconds", "compute"))
    return Phase(name, *(a + b for a, b in both))


def _roofline(name: str, work: Number, moved: Number, rates: tuple[Number, Number]) -> Phase:
    """The larger of arithmetic and traffic."""
    arithmetic, traffic = work / rates[0], moved / rates[1]
    seconds = most(arithmetic, traffic)
    return Phase(name, work, moved, seconds, seconds * (arithmetic >= traffic))


def _rates(chip: ChipSpec, dtype: str, efficiency: tuple[Number, Number]) -> tuple[Number, Number]:
    compute, traffic = efficiency
    return _peak(chip, dtype, "cube") * exact(compute), chip.require("memory_bandwidth") * exact(traffic)


def _peak(chip: ChipSpec | float, dtype: str, counts: str) -> Number:
    if not isinstance(chip, ChipSpec):
        return exact(chip)
    peak = chip.peak(dtype, counts=counts)
    if peak is None:
        raise UnknownFigure(
            f"the {counts} peak of {chip.title} in {dtype} is unknown: no source gives it; pass a number"
        )
    return peak


def _utilisation(
    rate: Number, chips: Number, chip: ChipSpec | float, convention: str, dtype: str, counts: str
) -> Utilisation:
    known = chip.peak(dtype, counts=counts) if isinstance(chip, ChipSpec) else exact(chip)
    shown = "unknown" if known is None else " ".join(f"{one / 1e12:.4g}" for one in np.atleast_1d(known)) + " TFLOP/s"
    many = f" × {chips}" if np.ndim(chips) or chips != 1 else ""
    value = None if known is None else rate / (exact(chips) * known)
    return Utilisation(value, convention, f"{dtype} {counts} peak {shown}{many}")
