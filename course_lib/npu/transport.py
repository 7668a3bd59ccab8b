"""How real numbers get from rank to rank: gloo carries bytes between processes, and sums are formed here, in the order of ranks.

A sum of floating-point numbers depends on its order. Formed in the order of ranks it is the same on every rank and in
every run, and the same whether a gradient travels alone, in a bucket, or in shards; only the number of ranks changes it.
16- and 8-bit floats are added in float32 and rounded once, so a result is no worse than the best that a chip could do.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

SMALL = 2**16  # bytes: up to here all ranks send all numbers to all, which is one step
REDUCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "SUM": torch.add, "AVG": torch.add, "PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum,
    "BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor,
}  # fmt: skip


def bytes_of(t: torch.Tensor) -> torch.Tensor:
    """The numbers of ``t`` as one row of bytes; a view where ``t`` is contiguous."""
    return t.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def fill(t: torch.Tensor, row: torch.Tensor) -> None:
    """Write a row of bytes, or of numbers of its dtype, into ``t``."""
    t.copy_((row.view(t.dtype) if row.dtype == torch.uint8 else row).reshape(t.shape))


class Transport:
    """Collectives on host tensors over a gloo backend of ``size`` ranks, of which this is ``rank``."""

    def __init__(self, gloo: Any, rank: int, size: int) -> None:
        self.gloo, self.rank, self.size = gloo, rank, size

    # -- bytes --

    def gather_rows(self, row: torch.Tensor) -> torch.Tensor:
        """(P, n) of a row (n,) of every rank."""
        out = torch.empty(self.size * row.numel(), dtype=row.dtype)
        if row.numel():
            self.gloo._allgather_base(out, row, c10d.AllgatherOptions()).wait()
        return out.view(self.size, -1)

    def exchange(self, numbers: list[int]) -> list[list[int]]:
        """What every rank says, by rank."""
        return self.gather_rows(torch.tensor(numbers, dtype=torch.int64)).tolist()

    def swap_rows(self, row: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """All-to-all of bytes: ``sent[i]`` of them go to rank i, ``received[i]`` come from it."""
        out = torch.empty(sum(received), dtype=torch.uint8)
        self.gloo.alltoall_base(out, row, received, sent, c10d.AllToAllOptions()).wait()
        return out

    # -- collectives --

    def all_reduce(self, t: torch.Tensor, op: str) -> None:
        """``t`` becomes the reduction over all ranks."""
        if t.numel() * t.element_size() * self.size <= SMALL:
            parts = self.gather_rows(bytes_of(t))
            fill(t, self._reduced([p.view(t.dtype) for p in parts], op))
            return
        each = -(-t.numel() // self.size)
        padded = torch.zeros(each * self.size, dtype=t.dtype)
        padded[: t.numel()] = t.reshape(-1)
        whole = self.gather_rows(bytes_of(self._reduced(self._chunks(padded), op))).view(-1)
        fill(t, whole[: t.numel() * t.element_size()])

    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor, op: str) -> None:
        """``out`` becomes this rank's part of the reduction of ``t`` (P equal parts)."""
        fill(out, self._reduced(self._chunks(t), op))

    def all_gather(self, outs: list[torch.Tensor], t: torch.Tensor) -> None:
        """``outs[i]`` becomes the ``t`` of rank i; they may differ in size."""
        sizes = [o.numel() * o.element_size() for o in outs]
        row = torch.zeros(max(sizes), dtype=torch.uint8)
        row[: sizes[self.rank]] = bytes_of(t)
        for out, size, got in zip(outs, sizes, self.gather_rows(row)):
            fill(out, got[:size])

    def all_to_all(self, outs: list[torch.Tensor], ins: list[torch.Tensor]) -> None:
        """``ins[i]`` goes to rank i, ``outs[i]`` comes from it."""
        rows = [bytes_of(t) for t in ins]
        received = [o.numel() * o.element_size() for o in outs]
        got = self.swap_rows(torch.cat(rows), [r.numel() for r in rows], received)
        for out, part in zip(outs, got.split(received)):
            fill(out, part)

    def broadcast(self, t: torch.Tensor, root: int) -> None:
        options = c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        row = bytes_of(t).clone()
        if row.numel():
            self.gloo.broadcast([row], options).wait()
        fill(t, row)

    def send(self, t: torch.Tensor, to: int, tag: int) -> Any:
        """gloo's handle of a send under way; whoever waits for it must hold it and the bytes."""
        row = bytes_of(t).clone()
        return self.gloo.send([row], to, tag), row

    def receive(self, row: torch.Tensor, source: int, tag: int) -> Any:
        return self.gloo.recv([row], source, tag), row

    # -- inside --

    def _chunks(self, t: torch.Tensor) -> list[torch.Tensor]:
        """This rank's part of ``t`` (P equal parts) as each rank has it."""
        row = bytes_of(t)
        each = row.numel() // self.size
        return [p.view(t.dtype) for p in self.swap_rows(row, [each] * self.size, [each] * self.size).view(self.size, -1)]

    def _reduced(self, parts: list[torch.Tensor], op: str) -> torch.Tensor:
        kind = parts[0].dtype
        wide = torch.float32 if kind.is_floating_point and kind.itemsize < 4 else torch.uint8 if kind == torch.bool else kind
        total = reduce(REDUCTIONS[op], [p.to(wide) for p in parts])
        return (total / self.size if op == "AVG" else total).to(kind)
