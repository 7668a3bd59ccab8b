"""Checks of lesson 05's exercises."""

from collections.abc import Callable

from course_lib import plan
from course_lib.chip import load_chip
from course_lib.lessons.check import Case, judge
from course_lib.lessons.solutions import lesson05 as solution

SERVED = (("llama-2-7b", "ascend-910b2", 4096), ("llama-3-8b", "h100", 8192), ("llama-2-70b", "h100", 1024))
STEPS = (
    ("llama-3-8b", "ascend-910b2", 31, 4096), ("llama-3-8b", "ascend-950dt", 256, 512), ("llama-2-7b", "a100", 1, 1),
)  # fmt: skip


def check_batch_limit(function: Callable[..., int]) -> bool:
    """Two models that fit a chip, and one whose weights alone do not."""
    cases = []
    for name, chip, context in SERVED:
        m, capacity, size = plan.load_model(name), int(load_chip(chip).memory_bytes), 2
        weights = size * plan.count(m).total
        arguments = (capacity, weights, m.layers, m.kv_heads, m.head_width, size, context)
        right, room = solution.batch_limit(*arguments), capacity - weights
        each = size * m.layers * m.kv_heads * m.head_width * context
        mistakes = {
            room // each: "keys and values are two tensors, and an element has `size` bytes",
            room // (2 * each // m.layers): "every layer keeps its own",
            room // (2 * each // context): "each sequence keeps all tokens of its context",
            capacity // (2 * each): "the weights are in that memory, too",
            room / (2 * each): "whole sequences: round down",
            -(-room // (2 * each)): "whole sequences: round down, the last one does not fit",
            room // (2 * each): "where the weights alone do not fit, the answer is 0",
        }
        cases.append(Case(arguments, right, {k: v for k, v in mistakes.items() if k != right}))
    good = "Llama-2-7B on an Ascend 910B2, at 4,096 tokens"
    return judge("batch_limit", function, cases, "", "a whole number of sequences", good)


def check_tpot(function: Callable[..., float]) -> bool:
    """Bound by memory, by arithmetic, and a single reader at the start; against `plan` for the first."""
    cases = []
    for name, chip_name, batch, context in STEPS:
        m, chip, size = plan.load_model(name), load_chip(chip_name), 2
        weights, kv = int(plan.run.weights_read(m, batch)), plan.memory.kv_per_token(m)
        peak, bandwidth = float(chip.peak("bfloat16")), float(chip.memory_bandwidth)
        arguments = (weights, size, batch, context, kv, peak, bandwidth)
        right = solution.tpot(*arguments)
        read, used, cache = size * weights / bandwidth, 2 * weights * batch / peak, batch * context * kv / bandwidth
        mistakes = {
            read + cache: "with many readers the cube needs longer to use the weights than memory to deliver them",
            used + cache: "the weights have to be read, however little is done with them",
            max(read, used): "each reader's cache has to be read as well",
            max(read, used) + cache / batch: "a cache belongs to one reader: nobody shares it",
            batch * read + cache: "the weights are read once for all readers; that is what a batch is for",
            max(read, used) + cache / context: "attention reads the keys and values of all tokens so far",
            read + used + cache: "reading weights and using them overlap: the longer one counts",
            max(read, used / 2) + cache: "a multiply-add is two operations",
            max(read / size, used) + cache: "the bandwidth is in bytes",
            max(read, used) + size * cache: "kv_per_token is in bytes already",
            1e3 * right: "seconds, not milliseconds",
        }
        wrong = {value: hint for value, hint in mistakes.items() if abs(value / right - 1) > 1e-5}
        cases.append(Case(arguments, right, wrong))
    good = "31 readers on an Ascend 910B2 wait that long"
    return judge("tpot", function, cases, "s", "seconds, as a float", good, tolerance=1e-6)


def check_tokens_per_pass(function: Callable[[float, int], float]) -> bool:
    """One draft, several, none, and a draft that is never taken."""
    cases = []
    for accepted, drafts in ((0.85, 1), (0.8, 3), (0.85, 0), (0.0, 2)):
        right = solution.tokens_per_pass(accepted, drafts)
        mistakes = {
            1 + drafts * accepted: "a draft counts only if those before it were taken, too",
            right - 1: "where a draft is refused the pass still gives a token: the model's own",
            1 + accepted**drafts: "if only some of the drafts are taken, these count",
            accepted * (1 + drafts): "the first token needs no draft",
            1.0 + drafts: "that is if every draft were taken",
        }
        wrong = {value: hint for value, hint in mistakes.items() if abs(value - right) > 1e-9}
        cases.append(Case((accepted, drafts), right, wrong))
    good = "one draft, taken as often as DeepSeek-V3 takes its own"
    return judge("tokens_per_pass", function, cases, "", "a mean number of tokens", good)
