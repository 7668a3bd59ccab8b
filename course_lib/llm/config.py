"""The dial: one preset name decides the whole shape of the model.

>>> preset("tiny", vocab_size=512).head_width
32
>>> preset("tiny-v3", vocab_size=512).cached_per_token  # numbers in each layer: the latent and one rotary key
48
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Latent:
    """Widths of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), as in latent.py."""

    query_rank: int  # of the queries' latent
    rank: int  # C, of the latent of keys and values, which the cache holds
    nope: int  # N, width of a query or key head that is not rotated
    rope: int  # R, width that is rotated; that part of a key is shared by all heads
    value: int  # width of a value head

    def __post_init__(self) -> None:
        if self.rope % 2 or min(self.query_rank, self.rank, self.nope, self.rope, self.value) < 1:
            raise ValueError(f"expected positive widths and an even rope, found {self}")


@dataclass(frozen=True)
class Experts:
    """Mixture of experts in every layer but the first few, as in experts.py (DeepSeek-V3, arXiv:2412.19437)."""

    routed: int  # E
    active: int  # of the routed ones, per token
    shared: int  # experts that see every token
    width: int  # F of one expert
    first_dense: int = 1  # layers in front with a dense feed-forward
    groups: int = 1  # the routed ones are in that many groups, and
    top_groups: int = 1  # a token's experts are all in that many of them
    route_scale: float = 1.0  # factor of what the routed experts add
    bias_speed: float = 0.001  # step of the bias that balances without a loss; V3: 0.001
    sequence_loss: float = 0.0  # weight of the sequence-wise balance loss; V3: 0.0001

    def __post_init__(self) -> None:
        if self.routed % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ValueError(f"{self.routed} routed experts must be a multiple of the groups, top_groups among them")
        most = self.routed // self.groups * self.top_groups
        if not 1 <= self.active <= most:
            raise ValueError(f"expected 1 to {most} active experts, found {self.active}")


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
    latent: Latent | None = None  # multi-head latent attention in place of grouped-query attention
    experts: Experts | None = None  # in place of most layers' feed-forward
    mtp: int = 0  # 1: a further layer predicts the token after the next

    def __post_init__(self) -> None:
        for name, kind in (("latent", Latent), ("experts", Experts)):
            if isinstance(getattr(self, name), dict):  # as a checkpoint's record has it
                object.__setattr__(self, name, kind(**getattr(self, name)))
        if not self.latent and (self.width % self.heads or self.width // self.heads % 2):
            raise ValueError(f"width {self.width} must be heads {self.heads} times an even head width")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.mtp not in (0, 1):
            raise ValueError(f"expected mtp of 0, or 1 for one further token, found {self.mtp}")

    @property
    def head_width(self) -> int:
        """K of queries and keys: D / H, or of latent attention N + R."""
        return self.latent.nope + self.latent.rope if self.latent else self.width // self.heads

    @property
    def value_width(self) -> int:
        """K of values."""
        return self.latent.value if self.latent else self.head_width

    @property
    def rotary_width(self) -> int:
        """How much of a head is rotated."""
        return self.latent.rope if self.latent else self.head_width

    @property
    def cached_per_token(self) -> int:
        """Numbers that one layer's cache holds for one token."""
        return self.latent.rank + self.latent.rope if self.latent else 2 * self.kv_heads * self.head_width


PRESETS: dict[str, dict] = {
    "micro": {"context": 64, "width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "feed_forward": 96, "tied": True},
    "tiny": {"context": 128, "width": 128, "layers": 4, "heads": 4, "kv_heads": 2, "feed_forward": 352, "tied": False},
    "small": {"context": 256, "width": 256, "layers": 6, "heads": 8, "kv_heads": 4, "feed_forward": 704, "tied": False},
    "micro-v3": {
        "context": 64, "width": 32, "layers": 2, "heads": 2, "kv_heads": 2, "feed_forward": 96, "tied": False, "mtp": 1,
        "latent": Latent(query_rank=16, rank=16, nope=16, rope=16, value=16),
        "experts": Experts(routed=8, active=2, shared=1, width=32, groups=4, top_groups=2),
    },
    "tiny-v3": {
        "context": 128, "width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "feed_forward": 352, "tied": False,
        "mtp": 1, "latent": Latent(query_rank=64, rank=32, nope=32, rope=16, value=32),
        "experts": Experts(routed=8, active=2, shared=1, width=112, groups=4, top_groups=2),
    },
}  # fmt: skip


def preset(name: str, vocab_size: int) -> Config:
    """The configuration called `name`, for `vocab_size` tokens; ValueError names the presets there are."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return Config(vocab_size=vocab_size, **PRESETS[name])
