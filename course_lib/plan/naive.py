"""How calculators go wrong: the naive way beside ours, and the factor between them.

Each function makes one mistake that public calculators, notebooks and press articles make, and nothing else: the peak of
another column of the data sheet, attention left out, all experts counted as active, latent attention sized as
multi-head, states not divided by ZeRO, attention scores left out of memory. `mistakes` has one example of each.

    >>> for one in mistakes()[:2]:
    ...     print(one)
    peak of the wrong column: 15.7 days, ours 62.8 days: wrong by a factor of 4
    attention left out: 1.99 s, ours 6.54 s: wrong by a factor of 3.3
"""

from dataclasses import dataclass, replace

from course_lib.chip import ChipSpec, load_chip
from course_lib.plan import activations, flops, memory, run
from course_lib.plan.layers import count
from course_lib.plan.model import Model, load_model

DAY, GB, MILLI = 86400, 1e9, 1e3
SPARSE = 2  # data sheets print peaks "with sparsity", twice those of dense products


@dataclass(frozen=True)
class Mistake:
    """The same quantity the naive way and ours, in ``unit``; ``why`` says what was overlooked."""

    name: str
    naive: float
    ours: float
    unit: str
    why: str

    @property
    def factor(self) -> float:
        """How far off, at least 1."""
        return max(self.naive / self.ours, self.ours / self.naive)

    def __str__(self) -> str:
        values = f"{self.naive:.3g} {self.unit}, ours {self.ours:.3g} {self.unit}"
        return f"{self.name}: {values}: wrong by a factor of {self.factor:.2g}"


def wrong_column(model: Model, tokens: float, chips: int, chip: ChipSpec, utilisation: float) -> Mistake:
    """Training time by the peak of 8-bit products with sparsity, for a run in bfloat16."""
    right = run.training_time(model, tokens, chips, chip, utilisation, "6N")
    wrong = run.training_time(model, tokens, chips, chip.peak("float8_e4m3fn") * SPARSE, utilisation, "6N")
    why = "the data sheet's largest figure is of 8 bits with sparsity; dense products in bfloat16 have a quarter"
    return Mistake("peak of the wrong column", wrong / DAY, right / DAY, "days", why)


def without_attention(model: Model, chip: ChipSpec, prompt: int) -> Mistake:
    """Prefill as 2N FLOPs a token over the peak, whatever the prompt."""
    wrong = 2 * count(model).multiplying * prompt / chip.peak("bfloat16")
    right = flops.total(flops.forward(model, 1, prompt)) / chip.peak("bfloat16")
    return Mistake(
        "attention left out", wrong, right, "s", f"2N has no attention, which grows with the square of {prompt:,}"
    )


def all_experts(model: Model) -> Mistake:
    """Training FLOPs per token with all parameters as N."""
    right = flops.per_token(model, "6N", 1) / GB
    return Mistake(
        "all experts active", 6 * count(model).total / GB, right, "GFLOP/token", "a token meets few of the experts"
    )


def multi_head(model: Model) -> Mistake:
    """The cache of latent attention as if all heads kept their keys and values."""
    a = model.latent
    wrong = 2 * model.layers * model.heads * (a.nope + a.rope + a.value)
    why = "one latent and one rotary key serve all heads"
    return Mistake("latents sized as multi-head", wrong / MILLI, memory.kv_per_token(model) / MILLI, "kB/token", why)


def not_divided(model: Model, ranks: int, stage: int = 2) -> Mistake:
    """Training states of a rank under ZeRO, gradients and states taken whole."""
    n = count(model).total
    right = memory.total(memory.states(n, "bfloat16, ZeRO", ranks, stage))
    wrong = right + sum(memory.states(n, "bfloat16, ZeRO")[name] * (1 - 1 / ranks) for name in ("gradients",))
    return Mistake(
        "gradients not divided", wrong / GB, right / GB, "GB", f"stage {stage} divides gradients over {ranks} ranks"
    )


def without_scores(model: Model, micro_batch: int, context: int, tensor: int) -> Mistake:
    """Activations of plain attention without its T × T scores (5·a·s/h of 34 + 5·a·s/h)."""
    right = activations.total(activations.of_model(model, micro_batch, context, 2, "plain", tensor=tensor))
    wrong = activations.total(activations.of_model(model, micro_batch, context, 2, "flash", tensor=tensor))
    return Mistake(
        "attention scores left out", wrong / GB, right / GB, "GB", "softmax, its mask and its dropout are T × T"
    )


def mistakes() -> tuple[Mistake, ...]:
    """One example of each."""
    llama, v3, h100 = load_model("llama-3-405b"), load_model("deepseek-v3"), load_chip("h100")
    long = 131072
    return (
        wrong_column(llama, 15.6e12, 16384, h100, 0.43),
        without_attention(load_model("llama-3-8b"), h100, long),
        all_experts(v3),
        multi_head(v3),
        not_divided(load_model("llama-2-70b"), 64),
        without_scores(replace(load_model("gpt3-175b"), vocab_size=51200), 1, 2048, 8),
    )
