"""The whole model: a decoder-only transformer with RMSNorm, rotary embedding, grouped-query attention and SwiGLU.

Shapes: B batch, T tokens, D width, H heads, G key/value heads, K head width, F feed-forward, V vocabulary, L layers.
With a cache, T counts the new tokens and S all tokens so far.

    >>> from course_lib.llm.config import preset
    >>> Transformer(preset("tiny", vocab_size=512)).num_parameters()
    869504
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.llm.config import Config

CONVENTIONS = ("6N", "6N+attention causal", "6N+attention full")


class Cache:
    """Keys and values of the tokens seen so far: decoding one more token reads them instead of recomputing them.

    Room for `context` tokens is taken at once, as a serving system would: 2·L·B·G·context·K elements.
    """

    def __init__(
        self, config: Config, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        shape = (config.layers, batch, config.kv_heads, config.context, config.head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, G, context, K)
        self.values = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, G, context, K)
        self.length = 0  # tokens seen

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the T new keys and values (B, G, T, K) of `layer`; return all of them so far, (B, G, S, K)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k  # (B, G, T, K)
        self.values[layer, :, :, self.length : end] = v  # (B, G, T, K)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]  # (B, G, S, K) each


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None) -> Tensor:
        B, T = x.shape[:2]
        H, G, K = self.config.heads, self.config.kv_heads, self.config.head_width
        q = rotate(self.query(x).view(B, T, H, K).transpose(1, 2), cos, sin)  # (B, H, T, K)
        k = rotate(self.key(x).view(B, T, G, K).transpose(1, 2), cos, sin)  # (B, G, T, K)
        v = self.value(x).view(B, T, G, K).transpose(1, 2)  # (B, G, T, K)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, G, S, K) each
        y = attend(q, k, v)  # (B, H, T, K)
        return self.output(y.transpose(1, 2).reshape(B, T, H * K))  # (B, T, D)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T of S tokens: q (B, H, T, K), k and v (B, G, S, K), result (B, H, T, K)."""
    T, S, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    mask = None
    if 1 < T < S:  # several new tokens after cached ones: is_causal would align the triangle to the wrong corner
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # (T, S)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=T == S and T > 1, enable_gqa=grouped
    )  # (B, H, T, K)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): a gated feed-forward with three matrices."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.feed_forward, bias=False)
        self.up = nn.Linear(config.width, config.feed_forward, bias=False)
        self.down = nn.Linear(config.feed_forward, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (B, T, F) inside, (B, T, D) out


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised residual stream and added to it."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache)  # (B, T, D)
        return x + self.feed_forward(self.feed_forward_norm(x))  # (B, T, D)


class Transformer(nn.Module):
    """The language model. The same `seed` gives the same weights on every device, for they are drawn on the CPU."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.unembedding = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.unembedding.weight = self.embedding.weight
        cos, sin = rotary_table(config.context, config.head_width, config.rotary_base)
        self.register_buffer("cos", cos, persistent=False)  # (context, K/2)
        self.register_buffer("sin", sin, persistent=False)  # (context, K/2)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Normal weights: a matrix of n inputs has deviation 1/√n, so that its outputs have the size of its inputs.

        The embedding has 1, which starts the residual stream at that size, and the unembedding 0.02, so that the first
        loss is near ln V; one table for both has 0.02. The norms' gains stay 1.
        """
        for_both = self.unembedding.weight is self.embedding.weight
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() < 2 or weight.is_meta:
                continue
            deviation = weight.shape[1] ** -0.5
            if "embedding" in name:
                deviation = 1.0 if name.startswith("embedding") and not for_both else 0.02
            weight.copy_(deviation * torch.randn(weight.shape, generator=generator, device="cpu"))

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) of `tokens` (B, T), or with `targets` (B, T) the mean loss in nats per token, a scalar.

        Targets of -100 do not count. With a `cache` the tokens continue those seen before, which the cache then holds.
        ValueError where the tokens do not fit into the context.
        """
        start, T = (cache.length if cache else 0), tokens.shape[1]
        if start + T > self.config.context:
            raise ValueError(f"{start + T} tokens do not fit into the context of {self.config.context} tokens")
        cos, sin = self.cos[start : start + T], self.sin[start : start + T]  # (T, K/2) each
        x = self.embedding(tokens)  # (B, T, D)
        for block in self.blocks:
            x = block(x, cos, sin, cache)  # (B, T, D)
        if cache is not None:
            cache.length += T
        logits = self.unembedding(self.norm(x))  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B·T, V) and (B·T,) to a scalar

    def num_parameters(self) -> int:
        """All trained numbers; a tied table counts once."""
        return sum(p.numel() for p in self.parameters())

    def num_multiplying(self) -> int:
        """N: the weights that multiply an activation in a matrix product, once per token.

        That is every matrix with the unembedding (a product, tied or not) and without the embedding (a lookup) and
        the norm gains (element by element, not in a matrix product).
        """
        matrices = sum(p.numel() for block in self.blocks for p in block.parameters() if p.dim() == 2)
        return matrices + self.unembedding.weight.numel()

    def flops_per_token(self, convention: str = "6N+attention causal", context: int | None = None) -> int:
        """FLOPs to train on one token at sequence length `context` (default: the model's), by a named convention.

        "6N": each of N weights makes one multiply-add (2 FLOPs) forward and two backward; attention is left out.
        "6N+attention full": also QKᵀ and the product with V, each 2·D FLOPs per key, over all T keys: 6N + 12·L·D·T
        (PaLM, arXiv:2204.02311, appendix B). "6N+attention causal": a token sees itself and what came before it,
        (T+1)/2 keys on average: 6N + 6·L·D·(T+1). A third of each is the forward pass.
        """
        T, L, D = context or self.config.context, self.config.layers, self.config.width
        attention = {"6N": 0, "6N+attention causal": 6 * L * D * (T + 1), "6N+attention full": 12 * L * D * T}
        if convention not in attention:
            raise ValueError(f"unknown FLOP convention {convention!r}; expected one of {', '.join(CONVENTIONS)}")
        return 6 * self.num_multiplying() + attention[convention]
