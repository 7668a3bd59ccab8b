"""The whole model: a decoder-only transformer with grouped-query or latent attention, and SwiGLU or experts.

The layers' parts are in layers.py (grouped-query attention, SwiGLU), latent.py and experts.py; `Config` says which.
Shapes: B batch, T tokens, D width, H heads, G key/value heads, K head width, F feed-forward, V vocabulary, L layers.
With a cache, T counts the new tokens and S all tokens so far.

    >>> from course_lib.llm.config import preset
    >>> Transformer(preset("tiny", vocab_size=512)).num_parameters()
    869504
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.llm import mtp
from course_lib.llm.cache import Cache, PagedCache
from course_lib.llm.config import Config
from course_lib.llm.experts import Experts
from course_lib.llm.latent import LatentAttention
from course_lib.llm.layers import Attention, FeedForward, attend, narrow, rotary_table, rotate

__all__ = ["CONVENTIONS", "Block", "Cache", "PagedCache", "Transformer", "attend", "rotary_table", "rotate"]

CONVENTIONS = ("6N", "6N+attention causal", "6N+attention full")


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised residual stream and added to it."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = (LatentAttention if config.latent else Attention)(config, layer)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        with_experts = config.experts and layer >= config.experts.first_dense
        self.feed_forward = Experts(config) if with_experts else FeedForward(config.width, config.feed_forward)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | PagedCache | None = None) -> Tensor:
        x = x + self.attention(narrow(self.attention_norm(x)), cos, sin, cache)  # (B, T, D)
        return x + self.feed_forward(narrow(self.feed_forward_norm(x)))  # (B, T, D)


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
        cos, sin = rotary_table(config.context, config.rotary_width, config.rotary_base)
        self.register_buffer("cos", cos, persistent=False)  # (context, K/2)
        self.register_buffer("sin", sin, persistent=False)  # (context, K/2)
        self.ahead = mtp.Ahead(config, Block(config, config.layers)) if config.mtp else None
        self.aside: Tensor | None = None  # losses beside the model's own, of the last forward pass with targets
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

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | PagedCache | None = None) -> Tensor:
        """Logits (B, T, V) of `tokens` (B, T), or with `targets` (B, T) the mean loss in nats per token, a scalar.

        Targets of -100 do not count. With a `cache` the tokens continue those seen before, which the cache then holds.
        ValueError where the tokens do not fit into the context. While gradients are recorded, `aside` is the sum of the
        losses of multi-token prediction and of balance between experts, for training to add; None if there are none.
        """
        hidden = self.body(tokens, cache)  # (B, T, D)
        logits = self.unembedding(self.norm(hidden))  # (B, T, V)
        if targets is None:
            return logits
        if torch.is_grad_enabled():
            self.aside = self.asides(hidden, targets)  # scalar
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B·T, V) and (B·T,) to a scalar

    def body(self, tokens: Tensor, cache: Cache | PagedCache | None = None) -> Tensor:
        """The residual stream (B, T, D) of `tokens` (B, T) after the last layer, before the final norm."""
        cos, sin = self.angles(tokens.shape[1], cache)
        x = self.embedding(tokens)  # (B, T, D)
        for block in self.blocks:
            x = block(x, cos, sin, cache)  # (B, T, D)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    def draft(self, hidden: Tensor, following: Tensor, cache: Cache | PagedCache | None = None) -> Tensor:
        """Logits (B, T, V) of the token after the next, of `body`'s result (B, T, D) and the next tokens (B, T).

        The further layer has its own part of the cache, which must stand where the `hidden` begin.
        """
        if self.ahead is None:
            raise ValueError("this model has no layer that predicts a further token; use a preset with mtp, as tiny-v3")
        cos, sin = self.angles(hidden.shape[1], cache)
        read = self.ahead(hidden, self.embedding(following), cos, sin, cache)  # (B, T, D)
        if cache is not None:
            cache.advance(hidden.shape[1])
        return self.unembedding(read)  # (B, T, V)

    def angles(self, T: int, cache: Cache | PagedCache | None) -> tuple[Tensor, Tensor]:
        """Cosine and sine for the next T positions, (T, K/2) each; (B, 1, T, K/2) where rows differ in length."""
        start = cache.length if cache else 0
        if start + T > self.config.context:
            raise ValueError(f"{start + T} tokens do not fit into the context of {self.config.context} tokens")
        places = cache.place(T) if cache else None  # (B, T)
        if places is None:
            return self.cos[start : start + T], self.sin[start : start + T]  # (T, K/2) each
        return self.cos[places][:, None], self.sin[places][:, None]  # (B, 1, T, K/2) each

    def asides(self, hidden: Tensor, targets: Tensor) -> Tensor | None:
        """The weighted losses beside the model's own; on the way the experts count their tokens."""
        losses = []
        if self.ahead is not None:  # position i knows target i and predicts target i+1
            logits = self.draft(hidden[:, :-1], targets[:, :-1].clamp(min=0))  # (B, T-1, V)
            losses.append(mtp.WEIGHT * F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten()))
        for part in self.experts():
            part.count()
            if part.shape.sequence_loss:
                losses.append(part.shape.sequence_loss * part.unevenness())
        return sum(losses[1:], losses[0]) if losses else None  # scalar

    def experts(self) -> list[Experts]:
        """The mixtures of experts of all layers."""
        return [module for module in self.modules() if isinstance(module, Experts)]

    def num_parameters(self) -> int:
        """All trained numbers; a tied table counts once."""
        return sum(p.numel() for p in self.parameters())

    def num_multiplying(self) -> int:
        """N: the weights that multiply an activation in a matrix product, once per token.

        That is every matrix with the unembedding (a product, tied or not) and without the embedding (a lookup) and
        the norm gains (element by element, not in a matrix product). Of routed experts only the active ones count. A
        layer that predicts a further token counts with its own pass through the unembedding.
        """
        layers = [*self.blocks, self.ahead] if self.ahead else self.blocks
        weights = [p for layer in layers for p in layer.parameters()]
        count = sum(p.numel() for p in weights if p.dim() == 2)
        experts = sum(p.numel() for p in weights if p.dim() == 3)  # (E, ·, ·) each
        if experts:
            count += experts * self.config.experts.active // self.config.experts.routed
        return count + (1 + self.config.mtp) * self.unembedding.weight.numel()

    def flops_per_token(self, convention: str = "6N+attention causal", context: int | None = None) -> int:
        """FLOPs to train on one token at sequence length `context` (default: the model's), by a named convention.

        "6N": each of N weights makes one multiply-add (2 FLOPs) forward and two backward; attention is left out.
        "6N+attention full": also QKᵀ and the product with V, each 2·D FLOPs per key, over all T keys: 6N + 12·L·D·T
        (PaLM, arXiv:2204.02311, appendix B). "6N+attention causal": a token sees itself and what came before it,
        (T+1)/2 keys on average: 6N + 6·L·D·(T+1). A third of each is the forward pass. Where heads have other widths
        than D/H, as with latents, 2·D is the sum of the widths of queries and values.
        """
        c, T = self.config, context or self.config.context
        per_key = 6 * (c.layers + c.mtp) * c.heads * (c.head_width + c.value_width)  # 12·L·D where both widths are D/H
        attention = {"6N": 0, "6N+attention causal": per_key * (T + 1) // 2, "6N+attention full": per_key * T}
        if convention not in attention:
            raise ValueError(f"unknown FLOP convention {convention!r}; expected one of {', '.join(CONVENTIONS)}")
        return 6 * self.num_multiplying() + attention[convention]
