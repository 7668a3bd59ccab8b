"""Solutions of lesson 05: how many readers fit, how long each waits for a token, and what drafts are worth."""


def batch_limit(
    capacity: int, weight_bytes: int, layers: int, kv_heads: int, head_width: int, size: int, context: int
) -> int:
    """Whole sequences of ``context`` tokens whose keys and values fit beside the weights; ``size`` bytes an element."""
    per_token = 2 * layers * kv_heads * head_width * size
    return max(0, capacity - weight_bytes) // (context * per_token)


def tpot(
    weights: int, size: int, batch: int, context: int, kv_per_token: int, peak: float, bandwidth: float
) -> float:
    """Least seconds of one decode step: weights read once or used ``batch`` times, then each reader's cache."""
    return max(size * weights / bandwidth, 2 * weights * batch / peak) + batch * context * kv_per_token / bandwidth


def tokens_per_pass(accepted: float, drafts: int) -> float:
    """Mean tokens of a pass: the model's own, and drafts up to the first that it would not have chosen."""
    return sum(accepted**number for number in range(drafts + 1))
