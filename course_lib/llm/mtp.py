"""Multi-token prediction: one further layer predicts the token after the next (DeepSeek-V3, arXiv:2412.19437, 2.2).

At position i it joins what the model made of tokens 0 to i with the embedding of token i+1, and predicts token i+2;
embedding and unembedding are the model's own. In training it is a second loss; in generation it drafts a token ahead,
which the model then checks (speculate.py).
"""

import torch
from torch import Tensor, nn

from course_lib.llm.cache import Cache, PagedCache
from course_lib.llm.config import Config

WEIGHT = 0.3  # of its loss beside the model's own; V3 had 0.3 for the first 10 T tokens


class Ahead(nn.Module):
    """The further layer; `block` is one more of the model's own."""

    def __init__(self, config: Config, block: nn.Module) -> None:
        super().__init__()
        self.hidden_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.embedding_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.join = nn.Linear(2 * config.width, config.width, bias=False)
        self.block = block
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)

    def forward(
        self, hidden: Tensor, embedded: Tensor, cos: Tensor, sin: Tensor, cache: Cache | PagedCache | None = None
    ) -> Tensor:
        """Of hidden (B, T, D) and the next tokens' embeddings (B, T, D): what the unembedding reads, (B, T, D)."""
        both = torch.cat((self.hidden_norm(hidden), self.embedding_norm(embedded)), dim=-1)  # (B, T, 2·D)
        return self.norm(self.block(self.join(both), cos, sin, cache))  # (B, T, D)
