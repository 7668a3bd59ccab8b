"""Solutions of lesson 06: the schedule, the utilisation, and the price of a tile that is not full."""

import math


def learning_rate(step: int, steps: int, warmup: int, top: float) -> float:
    """Of step 1, 2, …: linear up to `top` in `warmup` steps, then half a cosine down to a tenth at the last."""
    if step <= warmup:
        return top * step / warmup
    progress = (step - warmup) / (steps - warmup)
    return top * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def mfu_causal(tokens_per_second: float, weights: int, layers: int, width: int, context: int, peak: float) -> float:
    """MFU by the convention 6N+attention causal: 6N + 6·L·D·(T+1) FLOPs a token, over the peak."""
    return tokens_per_second * (6 * weights + 6 * layers * width * (context + 1)) / peak


def tile_efficiency(m: int, k: int, n: int, tile: int) -> float:
    """Share of the cube's work on (m, k) @ (k, n) that is not padding, where it works in cubes of side `tile`."""
    padded = 1
    for side in (m, k, n):
        padded *= math.ceil(side / tile) * tile
    return m * k * n / padded
