"""Solutions of lesson 07: rows that fit, checkpointed segments, the scores of attention, and states that are shared."""

import math


def rows_that_fit(capacity: int, parameters: int, per_row: int, accumulated: bool) -> int:
    """Most rows of a float32 step with AdamW; gradients lie there at the peak only where they are ``accumulated``."""
    states = (16 if accumulated else 12) * parameters
    return (capacity - states) // per_row


def checkpointed_bytes(layers: int, segment: int, boundary: int, inside: int) -> int:
    """Activations at the peak where the inputs of segments are kept, and one segment's inside comes back at a time."""
    return math.ceil(layers / segment) * boundary + segment * inside


def score_bytes(batch: int, heads: int, tokens: int, layers: int, size: int) -> int:
    """Bytes of the T × T probabilities that unfused attention keeps, in all layers."""
    return batch * heads * tokens**2 * layers * size


def sharded_bytes(parameters: int, ranks: int, stage: int) -> float:
    """Weights, gradients and optimizer states of mixed precision per rank under ZeRO: 2 + 2 + 12 bytes a parameter."""
    shares = [ranks if stage >= divided else 1 for divided in (3, 2, 1)]
    return parameters * (2 / shares[0] + 2 / shares[1] + 12 / shares[2])
