"""Solutions of lesson 00: what a product costs, what an addition costs, what training keeps in memory."""


def product_flops(m: int, k: int, n: int) -> int:
    """FLOPs of (m, k) @ (k, n): each of m·n results is a sum of k products, a multiplication and an addition each."""
    return 2 * m * k * n


def addition_seconds(elements: int, bandwidth: float, launch: float) -> float:
    """Seconds of `a + b` in float32, bound by memory: two tensors read, one written, 4 bytes an element."""
    return launch + 3 * 4 * elements / bandwidth


def training_bytes(parameters: int) -> int:
    """Bytes that training in float32 with AdamW keeps for the parameters: weight, gradient, and two moments."""
    return 4 * (1 + 1 + 2) * parameters
