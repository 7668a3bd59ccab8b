"""Checks of lesson 01's exercises."""

from collections.abc import Callable

from course_lib import plan
from course_lib.lessons.check import Case, judge
from course_lib.lessons.solutions import lesson01 as solution


def check_attention_flops(function: Callable[[int, int, int], int]) -> bool:
    """Against the formula; the first case is a layer of the course's own `tiny`."""
    cases = []
    for tokens, heads, width in ((128, 4, 32), (1, 32, 128), (4096, 32, 128), (7, 3, 5)):
        right = solution.attention_flops(tokens, heads, width)
        full = 4 * heads * width * tokens**2
        mistakes = {
            full: "that is all T² pairs; a causal token sees no later keys",
            full // 2: "nearly: a token also sees itself, so it is not T²/2 pairs",
            2 * heads * width * tokens * (tokens - 1): "a token also sees itself",
            right // 2: "two products, scores and mixed values; or a multiply-add counted as one FLOP",
            right // 4: "a multiply-add is 2 FLOPs, and there are two products",
            right // heads: "that is one head",
            4 * heads * width * tokens: "each query meets one key after another, not a single one",
        }
        cases.append(Case((tokens, heads, width), right, {k: v for k, v in mistakes.items() if k != right}))
    counted = plan.flops.forward(plan.load_model("course-tiny"), 1, 128)
    good = f"four such layers are the {counted['scores'] + counted['mix values']:,} that the ledger counted"
    return judge("attention_flops", function, cases, "FLOP", "an integer count of FLOPs", good)


def check_multiplying(function: Callable[..., int]) -> bool:
    """Llama-2-7B, Llama-2-70B with its shared key/value heads, and `tiny`, against `plan`."""
    cases = []
    for name in ("llama-2-7b", "llama-2-70b", "course-tiny"):
        m = plan.load_model(name)
        D, H, G, K, F, V = m.width, m.heads, m.kv_heads, m.head_width, m.feed_forward, m.vocab_size
        right, table = plan.count(m).multiplying, V * D
        layer = (right - table) // m.layers
        mistakes = {
            right + table: "the embedding is a lookup: of the two tables only the unembedding multiplies",
            plan.count(m).total: "the embedding is a lookup, and the norms' gains are in no product of matrices",
            right - table: "the unembedding multiplies too",
            right - m.layers * D * F: "the feed-forward is gated: gate, up and down",
            right + m.layers * 2 * D * (H - G) * K: "keys and values have kv_heads heads, not heads",
            right - m.layers * D * H * K: "after attention the heads are mixed by one more matrix, the output",
            layer + table: "that is one layer",
            2 * right: "that is FLOPs; weights are asked for",
        }
        arguments = (m.layers, D, H, G, K, F, V)
        cases.append(Case(arguments, right, {k: v for k, v in mistakes.items() if k != right}))
    kind, good = "an integer count of weights", "times 2 it is the forward pass of Llama-2-7B without attention"
    return judge("multiplying", function, cases, "", kind, good)


def check_expert_flops(function: Callable[[int, int, int, int, int], int]) -> bool:
    """DeepSeek-V3's layer first, then DeepSeek-V4-Pro's, then one without a shared expert."""
    cases = []
    for width, inner, routed, chosen, shared in (
        (7168, 2048, 256, 8, 1), (7168, 3072, 384, 6, 1), (64, 32, 8, 2, 0),
    ):  # fmt: skip
        right = solution.expert_flops(width, inner, routed, chosen, shared)
        expert, router = 6 * width * inner, 2 * routed * width
        mistakes = {
            (routed + shared) * expert + router: "those are all experts that are stored; a token meets a few of them",
            (routed + shared) * expert: "those are all experts that are stored; a token meets a few of them",
            (chosen + shared) * expert: "the router is a product too: one score for each routed expert",
            chosen * expert + router: "the shared experts work for every token",
            (chosen + shared) * expert + 2 * chosen * width: "the router scores all routed experts, to choose some",
            (chosen + shared) * expert * 2 // 3 + router: "an expert is gated: three matrices",
            right // 2: "a multiply-add is 2 FLOPs",
        }
        arguments = (width, inner, routed, chosen, shared)
        cases.append(Case(arguments, right, {k: v for k, v in mistakes.items() if k != right}))
    dense = 6 * 7168 * 2048 * 257
    good = f"a dense layer of the same parameters would take {dense / cases[0].expected:.0f} times that"
    return judge("expert_flops", function, cases, "FLOP", "an integer count of FLOPs per token", good)


def check_intensity(function: Callable[[int, int, int, int], float]) -> bool:
    """One token, a batch, and the largest product of Llama-2-7B's prompt."""
    cases = []
    for tokens, inputs, outputs, size in (
        (1, 4096, 11008, 2), (256, 4096, 11008, 2), (4096, 4096, 11008, 2), (8, 4, 2, 4),
    ):  # fmt: skip
        right = solution.intensity(tokens, inputs, outputs, size)
        flops, weights = 2 * tokens * inputs * outputs, inputs * outputs
        numbers = tokens * inputs + weights + tokens * outputs
        mistakes = {
            right / 2: "a multiply-add is 2 FLOPs",
            flops / numbers: "per byte, not per number",
            flops / (size * weights): "tokens go in and results come out: they are bytes too",
            flops / (size * (weights + tokens * inputs)): "the result has to be written",
            1 / right: "upside down: FLOPs over bytes",
        }
        cases.append(Case((tokens, inputs, outputs, size), right, mistakes))
    kind, good = "FLOPs per byte, a float", "in bfloat16 one token does one FLOP per byte, 4,096 tokens do 1,725"
    return judge("intensity", function, cases, "", kind, good, tolerance=1e-6)
