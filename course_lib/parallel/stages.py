"""A Transformer cut into stages for pipeline parallelism: some layers each, the ends with the embeddings.

    >>> cut(layers=10, stages=4)
    [range(0, 3), range(3, 6), range(6, 8), range(8, 10)]

Shapes: B batch, T tokens, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.llm.model import Transformer


class Stage(nn.Module):
    """Some layers of a Transformer, with its embedding before the first and its norm and unembedding after the last.

    Parameters have the names that they have in the whole model.
    """

    def __init__(self, model: Transformer, layers: range, tokens: int | None = None) -> None:
        super().__init__()
        self.tokens = tokens  # T, where the residual stream has only this rank's part of them
        refuse(model)
        count = len(model.blocks)
        self.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in layers})
        self.embedding = model.embedding if layers.start == 0 else None
        self.norm = model.norm if layers.stop == count else None
        self.unembedding = model.unembedding if layers.stop == count else None
        self.register_buffer("cos", model.cos, persistent=False)  # (context, K/2)
        self.register_buffer("sin", model.sin, persistent=False)  # (context, K/2)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T) or the residual stream (B, T, D) to the residual stream, or after the last layer logits (B, T, V)."""
        T = self.tokens or x.shape[1]
        x = x if self.embedding is None else self.embedding(x)  # (B, T, D)
        for block in self.blocks.values():
            x = block(x, self.cos[:T], self.sin[:T])  # (B, T, D)
        return x if self.unembedding is None else self.unembedding(self.norm(x))  # (B, T, V)


def place(module: nn.Module, device: torch.device | str) -> nn.Module:
    """The module on the device; one on "meta" gets weights there without values, as shape-only execution wants them."""
    meta = any(p.is_meta for p in module.parameters())
    return module.to_empty(device=device) if meta else module.to(device)


def refuse(model: Transformer) -> None:
    """ValueError for a model that does not fall into stages."""
    config = model.config
    if config.tied:
        raise ValueError("a tied table would lie on the first and the last stage; train with tied=False")
    if config.mtp or (config.experts and config.experts.sequence_loss):
        raise ValueError("losses beside the model's own (mtp, sequence_loss) need the whole model; set them to 0")


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in nats per token of logits (B, T, V) and targets (B, T), as in the whole model: a scalar."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def cut(layers: int, stages: int) -> list[range]:
    """The layers of each stage, as even as can be, the longer ones first; ValueError where a stage would be empty."""
    if not 1 <= stages <= layers:
        raise ValueError(f"{layers} layers do not make {stages} stages; expected 1 to {layers} stages")
    ends = [layers * (stage + 1) // stages for stage in range(stages)]
    sizes = sorted((b - a for a, b in zip([0, *ends], ends, strict=False)), reverse=True)
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
