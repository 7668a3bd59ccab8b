"""The dial: one preset name decides the whole shape of the model.

>>> preset("tiny", vocab_size=512).head_width
32
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Shape of a decoder-only transformer. Letters as in the comments of model.py."""

    vocab_size: int  # V
    context: int  # largest T
    width: int  # D
    layers: int  # L
    heads: int  # H, query heads
    kv_heads: int  # key and value heads; H / kv_heads query heads share one
    feed_forward: int  # F
    tied: bool  # one table serves as embedding and as unembedding
    rotary_base: float = 10_000.0  # Su et al. 2021, arXiv:2104.09864
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(f"width {self.width} must be heads {self.heads} times an even head width")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")

    @property
    def head_width(self) -> int:
        """K = D / H."""
        return self.width // self.heads


PRESETS: dict[str, dict[str, int | bool]] = {
    "micro": {"context": 64, "width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "feed_forward": 96, "tied": True},
    "tiny": {"context": 128, "width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "feed_forward": 352, "tied": False},
    "small": {"context": 256, "width": 256, "layers": 6, "heads": 8, "kv_heads": 4, "feed_forward": 704, "tied": False},
}


def preset(name: str, vocab_size: int) -> Config:
    """The configuration called `name`, for `vocab_size` tokens; ValueError names the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return Config(vocab_size=vocab_size, **PRESETS[name])
