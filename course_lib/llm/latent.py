"""Multi-head latent attention: keys and values of all heads come from one short latent per token (arXiv:2405.04434).

    latent c = norm(down x)             C numbers a token, which the cache holds, with
    rotary key r = rotate(...)          R numbers a token, one for all heads (position cannot pass through a product)
    keys [up_k c, r], values up_v c     H heads of N + R and of V

Two ways to the same result. Expanded: make keys and values of all tokens, then attend; right for training and prefill.
Absorbed: q·(up_k c) = (up_kᵀ q)·c, so queries go down to the latent, attend to the cache as it is, as H heads that
share one key, and the result comes up through up_v; right for decoding, where expanding would make all S keys anew.

Letters as in layers.py; C rank of the latent, N width without rotation, R width with rotation.
"""

import torch
from torch import Tensor, nn

from course_lib.llm.cache import Cache, PagedCache
from course_lib.llm.config import Config
from course_lib.llm.layers import attend, rotate


class LatentAttention(nn.Module):
    """Causal self-attention through a latent; `absorb` True or False takes one of the two ways always."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, H, m = config.width, config.heads, config.latent
        self.query_down = nn.Linear(D, m.query_rank, bias=False)
        self.query_norm = nn.RMSNorm(m.query_rank, eps=config.norm_eps)
        self.query_up = nn.Linear(m.query_rank, H * (m.nope + m.rope), bias=False)
        self.down = nn.Linear(D, m.rank + m.rope, bias=False)
        self.norm = nn.RMSNorm(m.rank, eps=config.norm_eps)
        self.up = nn.Linear(m.rank, H * (m.nope + m.value), bias=False)
        self.output = nn.Linear(H * m.value, D, bias=False)
        self.absorb: bool | None = None  # None: where tokens are cached

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | PagedCache | None = None) -> Tensor:
        B, T = x.shape[:2]
        H, m = self.config.heads, self.config.latent
        q = self.query_up(self.query_norm(self.query_down(x))).view(B, T, H, -1).transpose(1, 2)  # (B, H, T, N+R)
        still, turned = q.split((m.nope, m.rope), dim=-1)  # (B, H, T, N), (B, H, T, R)
        turned = rotate(turned, cos, sin)  # (B, H, T, R)
        latent, key = self.down(x).split((m.rank, m.rope), dim=-1)  # (B, T, C), (B, T, R)
        entry = torch.cat((self.norm(latent)[:, None], rotate(key[:, None], cos, sin)), dim=-1)  # (B, 1, T, C+R)
        if cache is not None:
            entry, _ = cache.extend(self.layer, entry)  # (B, 1, S, C+R)
        absorb = entry.shape[2] > T if self.absorb is None else self.absorb
        mask = cache.mask if cache else None
        y = (self.absorbed if absorb else self.expanded)(still, turned, entry, mask)  # (B, H, T, V)
        return self.output(y.transpose(1, 2).reshape(B, T, H * m.value))  # (B, T, D)

    def expanded(self, still: Tensor, turned: Tensor, entry: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values of every head, then attention: (B, H, T, V)."""
        B, _, S, _ = entry.shape
        H, m = self.config.heads, self.config.latent
        latent, key = entry.split((m.rank, m.rope), dim=-1)  # (B, 1, S, C), (B, 1, S, R)
        up = self.up(latent[:, 0]).view(B, S, H, -1).transpose(1, 2)  # (B, H, S, N+V)
        k = torch.cat((up[..., : m.nope], key.expand(B, H, S, m.rope)), dim=-1)  # (B, H, S, N+R)
        return attend(torch.cat((still, turned), dim=-1), k, up[..., m.nope :], mask)  # (B, H, T, V)

    def absorbed(self, still: Tensor, turned: Tensor, entry: Tensor, mask: Tensor | None) -> Tensor:
        """Queries against the latents themselves: (B, H, T, V)."""
        H, m = self.config.heads, self.config.latent
        key, value = self.up.weight.view(H, m.nope + m.value, m.rank).split((m.nope, m.value), dim=1)  # (H, ·, C) each
        q = torch.cat((torch.einsum("bhtn,hnc->bhtc", still, key), turned), dim=-1)  # (B, H, T, C+R)
        y = attend(q, entry, entry[..., : m.rank], mask, scale=(m.nope + m.rope) ** -0.5)  # (B, H, T, C)
        return torch.einsum("bhtc,hvc->bhtv", y, value)  # (B, H, T, V)
