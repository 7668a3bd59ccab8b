"""The allocator's statistics: a journal of changes, which come twice an operator, and sums, made when asked for."""

import numpy as np


class Books:
    """Each figure has, for all pools and for each, its present value, its peak, and the sums of what was added and taken."""

    FIGURES = ("allocation", "allocated_bytes", "requested_bytes", "inactive_split", "inactive_split_bytes", "segment", "reserved_bytes")
    POOLS = ("all", "small", "large")

    def __init__(self) -> None:
        self.journal: list[int] = []  # rows one after the other, no object for each: 1 if large, change of each figure
        shape = (len(self.POOLS), len(self.FIGURES))
        self.current, self.peak, self.allocated, self.freed = (np.zeros(shape, np.int64) for _ in range(4))

    def note(self, row: tuple[int, ...]) -> None:
        self.journal += row
        if len(self.journal) >= 1 << 16:
            self.add_up()

    def add_up(self) -> None:
        """Bring the sums up to date with the journal."""
        if not self.journal:
            return
        journal, self.journal = self.journal, []
        rows = np.array(journal, np.int64).reshape(-1, 1 + len(self.FIGURES))
        large = rows[:, 0] == 1
        for pool, here in enumerate((np.ones_like(large), ~large, large)):
            changes = rows[here, 1:]
            if len(changes):
                course = self.current[pool] + changes.cumsum(0)
                self.peak[pool] = np.maximum(self.peak[pool], course.max(0))
                self.current[pool] = course[-1]
                self.allocated[pool] += changes.clip(min=0).sum(0)
                self.freed[pool] -= changes.clip(max=0).sum(0)

    def read(self, figure: str, which: str, pool: str = "all") -> int:
        """``which`` is "current", "peak", "allocated" (the sum of what was added) or "freed" (of what was taken)."""
        self.add_up()
        return int(getattr(self, which)[self.POOLS.index(pool), self.FIGURES.index(figure)])

    def reset_peak(self) -> None:
        self.add_up()
        self.peak = self.current.copy()

    def reset_sums(self) -> None:
        self.add_up()
        self.allocated[:], self.freed[:] = 0, 0
