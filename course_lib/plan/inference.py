"""A pass of inference over many ranks, each with its share of the experts: prefill and decode of large deployments.

run.py has phases on one chip. Here attention runs on every rank for its own sequences, routed experts are spread over
``ep`` ranks, and tokens go to them and back (all-to-all) in every layer. Two half batches take turns, so that one's
communication runs beside the other's products, as CloudMatrix384 and DeepSeek run it: a pass takes the longer of both.
In decoding each half reads all weights.
Left out: uneven experts, the scheduler.

    >>> from course_lib.chip import load_system
    >>> from course_lib.plan import load_model
    >>> made = decode(load_model("deepseek-v3"), load_system("cloudmatrix384"), ep=320, sequences=48, context=4096)
    >>> made.seconds == max(made.compute, made.exchange) + made.launch
    True
"""

from dataclasses import dataclass, replace

from course_lib.chip import ChipSpec, Matmul, SystemSpec, Work, cost, load_chip
from course_lib.plan import share
from course_lib.plan.communication import seconds as collective
from course_lib.plan.layers import Layer, layers, mtp_layer
from course_lib.plan.model import Model
from course_lib.plan.operators import SOFTMAX
from course_lib.plan.share import ATTENTION, PICO, Shape

HALVES = 2


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass on one rank, and the tokens that it reads (prefill) or gives (decode)."""

    compute: float
    exchange: float  # all-to-all, both directions, of all layers
    launch: float
    tokens: float

    @property
    def seconds(self) -> float:
        """Of the pass, communication beside computation."""
        return max(self.compute, self.exchange) + self.launch

    @property
    def tokens_per_s(self) -> float:
        """Of one rank."""
        return self.tokens / self.seconds


def prefill(model: Model, system: SystemSpec, ep: int, prompts: int, context: int, gemm: str = "int8") -> Pass:
    """``prompts`` of ``context`` tokens on each rank, products with weights in ``gemm``."""
    shape, chip = Shape(ep=ep, micro_batch=prompts, context=context, gemm=gemm), load_chip(system.chip)
    tables = [share.seconds(chip, share.operators(model, index, shape))[0] for index in range(model.layers)]
    inside = sum(table[:3].sum() for table in tables)
    launch = sum(table[3] for table in tables)
    return Pass(inside, _exchange(model, system, ep, prompts * context, model.layers), launch, prompts * context)


def decode(
    model: Model, system: SystemSpec, ep: int, sequences: int, context: int, gemm: str = "int8", drafts: int = 0,
    accepted: float = 0.0, launch: float = 0.0,
) -> Pass:  # fmt: skip
    """One step of ``sequences`` on each rank; ``drafts`` of multi-token prediction, of which a share is ``accepted``.

    ``launch``: seconds to start the whole graph; its operators then start by themselves. For latent attention.
    """
    half = sequences / HALVES
    if half != int(half):
        raise ValueError(f"sequences is {sequences}; two half batches take turns, so it has to be even")
    chip, rows = load_chip(system.chip), int(half) * (1 + drafts)
    kinds = [*((layer, layer.count) for layer in layers(model, absorbed=True))]
    kinds += [(mtp_layer(model, absorbed=True), drafts)] if drafts else []
    shape = Shape(micro_batch=rows, context=1, gemm=gemm)
    products = 0
    for layer, count in kinds:
        local = [
            replace(m, stored=max(1, m.stored // ep)) if m.name.startswith("expert") else m for m in layer.matrices
        ]
        made = [op for matrix in local for op in share.product(matrix, shape) if op.phase == "forward"]
        products += count * sum(_busy(chip, op.work) for op in made)
    small = sum(_busy(chip, op.work) * op.times for index in range(model.layers + model.mtp * drafts)
                for op in share.operators(model, index, shape) if op.phase == "forward" and op.group == "vector")  # fmt: skip
    head = [op for op in share.last(model, shape) if op.phase == "forward" and op.group == "matmul"]
    products += sum(_busy(chip, op.work) for op in head) * (1 + drafts) / (1 + model.mtp)
    attention = sum(count * _busy(chip, _latent(layer, int(half), 1 + drafts, context)) for layer, count in kinds)
    exchange = HALVES * _exchange(model, system, ep, rows, model.layers + drafts)
    return Pass(HALVES * (products + attention + small) / PICO, exchange, launch, sequences * (1 + drafts * accepted))


def _latent(layer: Layer, B: int, T: int, S: int) -> Work:
    """Attention on the latents: all heads of a sequence meet the same keys, which are its values too."""
    scores, mix = (next(core for core in layer.cores if core.name == name) for name in ("scores", "mix values"))
    rows, met = scores.heads * T, S + T
    products = (Matmul(B, rows, scores.width, met, ATTENTION), Matmul(B, rows, met, mix.width, ATTENTION))
    read, written = 2 * B * (met * scores.width + rows * scores.width), 2 * B * rows * mix.width
    return Work(
        products, SOFTMAX * B * rows * met, "float32", read, written, exchanged=share.EXCHANGED * B * rows * met
    )


def _busy(chip: ChipSpec, work: Work) -> int:
    paid = cost(chip, work)
    return paid.ps - paid.launch_ps


def _exchange(model: Model, system: SystemSpec, ep: int, rows: int, count: int) -> float:
    """To the experts in 8 bits, back in 16, in every layer that has them."""
    sent = rows * model.width * model.experts.active
    return (count - model.experts.first_dense) * sum(
        collective(system, "all_to_all", size * sent, ep) for size in (1, 2)
    )
