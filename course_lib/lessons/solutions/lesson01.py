"""Solutions of lesson 01: attention's FLOPs, the weights that multiply, a layer of experts, FLOPs per byte."""


def attention_flops(tokens: int, heads: int, head_width: int) -> int:
    """Scores and mixed values of one layer, causal: T·(T+1)/2 pairs in each head, two products of 2·K FLOPs a pair."""
    pairs = tokens * (tokens + 1) // 2
    return 2 * 2 * heads * head_width * pairs


def multiplying(
    layers: int, width: int, heads: int, kv_heads: int, head_width: int, feed_forward: int, vocabulary: int
) -> int:
    """N of a Llama: query, output, key, value; gate, up, down; and the unembedding once."""
    attention = 2 * width * heads * head_width + 2 * width * kv_heads * head_width
    return layers * (attention + 3 * width * feed_forward) + vocabulary * width


def expert_flops(width: int, expert_width: int, routed: int, chosen: int, shared: int) -> int:
    """FLOPs per token of one layer of experts: those that the token uses, and the router's score for each routed one."""
    return 2 * ((chosen + shared) * 3 * width * expert_width + routed * width)


def intensity(tokens: int, inputs: int, outputs: int, size: int) -> float:
    """FLOPs per byte of (tokens, inputs) @ (inputs, outputs): both factors read, the result written."""
    moved = size * (tokens * inputs + inputs * outputs + tokens * outputs)
    return 2 * tokens * inputs * outputs / moved
