"""The parts of a dense layer: rotary embedding, grouped-query attention and SwiGLU.

Shapes: B batch, T tokens, D width, H heads, G key/value heads, K head width, F feed-forward. With a cache, T counts the
new tokens and S all tokens so far.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.llm.cache import Cache, PagedCache
from course_lib.llm.config import Config


def rotary_table(context: int, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position × frequency, each (context, K/2); frequencies base^(-2i/K)."""
    frequency = base ** (-torch.arange(0, head_width, 2, device="cpu").float() / head_width)  # (K/2,)
    angle = torch.outer(torch.arange(context, device="cpu").float(), frequency)  # (context, K/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) of x (B, H, T, K) by its position's angle; cos and sin are (T, K/2)."""
    a, b = x.chunk(2, dim=-1)  # (B, H, T, K/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # (B, H, T, K)


class Attention(nn.Module):
    """Causal self-attention in which H query heads share G key/value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, H, G, K = config.width, config.heads, config.kv_heads, config.head_width
        self.query = nn.Linear(D, H * K, bias=False)
        self.key = nn.Linear(D, G * K, bias=False)
        self.value = nn.Linear(D, G * K, bias=False)
        self.output = nn.Linear(H * K, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | PagedCache | None = None) -> Tensor:
        split = (*x.shape[:2], -1, self.config.head_width)  # as many heads as the matrices have here
        q = rotate(self.query(x).view(split).transpose(1, 2), cos, sin)  # (B, H, T, K)
        k = rotate(self.key(x).view(split).transpose(1, 2), cos, sin)  # (B, G, T, K)
        v = self.value(x).view(split).transpose(1, 2)  # (B, G, T, K)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, G, S, K) each
        y = self.attend(q, k, v, cache.mask if cache else None)  # (B, H, T, K)
        return self.output(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask)  # (B, H, T, K)


def narrow(x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on: cast once, rather than by each product that reads it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Causal attention of the last T of S tokens: q (B, H, T, K), k and v (B, G, S, K), result (B, H, T, K).

    Rows of different length need a `mask` (B, 1, T, S) in place of the triangle. The `scale` is 1/√K if not given.
    """
    T, S, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    causal = T == S and T > 1 and mask is None
    if mask is None and 1 < T < S:  # after cached tokens is_causal would align the triangle to the wrong corner
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # (T, S)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )  # (B, H, T, K)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): a gated feed-forward with three matrices."""

    def __init__(self, width: int, feed_forward: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, feed_forward, bias=False)
        self.up = nn.Linear(width, feed_forward, bias=False)
        self.down = nn.Linear(feed_forward, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (B, T, F) inside, (B, T, D) out


def exchange(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put `make(linear)` in the place of each linear layer but the unembedding."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and parent is not model:
                setattr(parent, name, make(child))
