"""Solutions of lesson 02: the backward of a product, AdamW's bytes, tokens for a share, days of a run."""


def backward_flops(m: int, k: int, n: int, of_input: bool, of_weight: bool) -> int:
    """FLOPs of dX (m, n) @ (n, k) and dW (k, m) @ (m, n), those that are wanted."""
    return 2 * m * k * n * (of_input + of_weight)


def adamw_seconds(parameters: int, bandwidth: float) -> float:
    """Seconds at `bandwidth`: per parameter 14 bytes are read (2 + 4 + 4 + 4) and 14 written (4 + 4 + 4 + 2)."""
    return (2 + 4 + 4 + 4 + 4 + 4 + 4 + 2) * parameters / bandwidth


def tokens_per_step(share: float, peak: float, bandwidth: float) -> float:
    """Tokens at which 28·N / bandwidth is `share` of itself and 6·N·tokens / peak; N cancels."""
    optimizer, per_token = 28 / bandwidth, 6 / peak
    return optimizer * (1 - share) / share / per_token


def training_days(parameters: float, tokens: float, chips: int, peak: float, mfu: float) -> float:
    """Days for 6·N·tokens FLOPs at chips · peak · mfu FLOP/s."""
    return 6 * parameters * tokens / (chips * peak * mfu) / 86400
