"""Caches of keys and values: decoding one more token reads them instead of computing them again.

    Cache        room for the whole context of every row, taken at once
    PagedCache   pages of a few tokens, taken from a common pool as a row grows (Kwon et al. 2023, arXiv:2309.06180)

Rows may differ in length: each has its own in `lengths`. Latent attention keeps one entry per token, a "key" of width
C + R for a single head, of which the values are a part; grouped-query attention keeps G keys and G values of width K.
"""

import torch
from torch import Tensor

from course_lib.llm.config import Config


def entries(config: Config) -> tuple[int, int, bool]:
    """What is kept for a token in one layer: heads, width of each, and whether there are values beside the keys."""
    return (1, config.cached_per_token, False) if config.latent else (config.kv_heads, config.head_width, True)


def positions(lengths: list[int], T: int, device: torch.device | str) -> Tensor:
    """Where T more tokens of each row go: (B, T)."""
    starts = torch.tensor(lengths, device="cpu").to(device)  # (B,)
    return starts[:, None] + torch.arange(T, device=device)  # (B, T)


def visible(places: Tensor, S: int) -> Tensor:
    """Which of S cached tokens each new one at `places` (B, T) sees: those up to itself, (B, 1, T, S)."""
    return torch.arange(S, device=places.device) <= places[:, None, :, None]  # (B, 1, T, S)


class Cache:
    """Room for `context` tokens is taken at once, in every row: L·B·context·(2·G·K) elements, or of latents (C + R)."""

    def __init__(
        self, config: Config, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        heads, width, with_values = entries(config)
        shape = (config.layers + config.mtp, batch, heads, config.context, width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (L, B, G, context, K)
        self.values = torch.zeros(shape, device=device, dtype=dtype) if with_values else None  # (L, B, G, context, K)
        self.lengths = [0] * batch  # tokens seen, by row
        self.mask: Tensor | None = None  # (B, 1, T, S), where rows differ in length

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def place(self, T: int) -> Tensor | None:
        """Make ready for T more tokens in each row; their positions (B, T), or None where all rows are as long."""
        self.mask = self.places = None
        if len(set(self.lengths)) > 1:
            self.places = positions(self.lengths, T, self.keys.device)  # (B, T)
            self.mask = visible(self.places, self.length + T)  # (B, 1, T, S)
        return self.places

    def extend(self, layer: int, k: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Store the T new keys and values (B, G, T, K) of `layer`; return all of them so far, (B, G, S, K)."""
        end = self.length + k.shape[2]
        for store, new in ((self.keys, k), (self.values, v)):
            if store is None:
                continue
            if self.places is None:
                store[layer, :, :, self.length : end] = new  # (B, G, T, K)
            else:
                rows = torch.arange(len(self.lengths), device=k.device)[:, None]  # (B, 1)
                store[layer].transpose(1, 2)[rows, self.places] = new.transpose(1, 2)  # (B, T, G, K)
        values = None if self.values is None else self.values[layer, :, :, :end]  # (B, G, S, K)
        return self.keys[layer, :, :, :end], values  # (B, G, S, K) each

    def advance(self, T: int) -> None:
        """Count the T tokens that have been stored."""
        self.lengths = [length + T for length in self.lengths]

    def cut(self, lengths: list[int], keep: bool = False) -> None:
        """Forget what is beyond these lengths, one for each row; the room stays theirs in any case."""
        self.lengths = list(lengths)


class PagedCache:
    """Pages of `page` tokens from a pool of `pages`; a row takes the next when its last is full, and `cut` gives back.

    Reading gathers a row's pages into one tensor; a serving system has a kernel that reads them where they lie.
    """

    def __init__(
        self, config: Config, batch: int, pages: int, page: int = 16,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        heads, width, with_values = entries(config)
        shape = (config.layers + config.mtp, pages, page, heads, width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (L, pages, page, G, K)
        self.values = torch.zeros(shape, device=device, dtype=dtype) if with_values else None  # (L, pages, page, G, K)
        self.page, self.free = page, list(range(pages))[::-1]
        self.tables: list[list[int]] = [[] for _ in range(batch)]  # the pages of each row, in order
        self.lengths = [0] * batch  # tokens seen, by row
        self.mask: Tensor | None = None  # (B, 1, T, S)

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def place(self, T: int) -> Tensor:
        """Take the pages that T more tokens of each row need; their positions (B, T). ValueError if none are left."""
        for table, length in zip(self.tables, self.lengths):
            while len(table) * self.page < length + T:
                if not self.free:
                    raise ValueError(f"no page left for {T} more tokens; use a larger pool, or fewer or shorter rows")
                table.append(self.free.pop())
        most = max(len(table) for table in self.tables)
        padded = [table + [0] * (most - len(table)) for table in self.tables]
        self.table = torch.tensor(padded, device="cpu").to(self.keys.device)  # (B, most)
        places = positions(self.lengths, T, self.keys.device)  # (B, T)
        self.slots = self.table.gather(1, places // self.page) * self.page + places % self.page  # (B, T)
        self.mask = visible(places, self.length + T)  # (B, 1, T, S)
        return places

    def extend(self, layer: int, k: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Store the T new keys and values (B, G, T, K) of `layer`; return all of them so far, (B, G, S, K)."""
        end = self.length + k.shape[2]
        found = []
        for store, new in ((self.keys, k), (self.values, v)):
            if store is None:
                return found[0], None
            store[layer].flatten(0, 1)[self.slots] = new.transpose(1, 2)  # (B, T, G, K)
            found.append(store[layer][self.table].flatten(1, 2)[:, :end].transpose(1, 2))  # (B, G, S, K)
        return found[0], found[1]  # (B, G, S, K) each

    def advance(self, T: int) -> None:
        """Count the T tokens that have been stored."""
        self.lengths = [length + T for length in self.lengths]

    def cut(self, lengths: list[int], keep: bool = False) -> None:
        """Forget what is beyond these lengths, one for each row; empty pages go back to the pool, or are kept."""
        self.lengths = list(lengths)
        for table, length in zip(self.tables, lengths):
            while not keep and table and (len(table) - 1) * self.page >= length:
                self.free.append(table.pop())
