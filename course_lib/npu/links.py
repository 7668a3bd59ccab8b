"""Who uses a chip's links when: transfers under way share a port evenly, and what one takes from others is never forgotten.

A transfer is told, when it starts, when it will be done; that is final, for the program goes on from there. If another
transfer joins it later, the newcomer gets its even share from then on, and so takes longer. The first one has been told
already; the link time that it would have lost stays on the port as work to be done, and delays whoever comes next. So
over a run every byte has its time on every link, and no link carries more than it can.
"""

MOST = 4  # transfers under way that a rank tells the others of; further ones are counted together


def drain(flows: list[int], ps: int) -> list[int]:
    """What is left of ``flows`` (picoseconds of the whole port each, ascending) after ``ps`` of even sharing."""
    flows = list(flows)
    while flows and ps > 0:
        least, many = flows[0], len(flows)
        if least * many > ps:
            return [f - ps // many for f in flows]
        ps -= least * many
        flows = [f - least for f in flows[1:] if f > least]
    return flows


def delay(flows: list[int], work: int) -> int:
    """How much longer a transfer of ``work`` takes beside ``flows``: of each the part that runs while it does."""
    return sum([min(f, work) for f in flows])


class Port:
    """One direction of a chip's links of one kind; ``flows`` are those under way at the time ``at``, ascending."""

    __slots__ = ("at", "flows")

    def __init__(self) -> None:
        self.at, self.flows = 0, []

    def under_way(self, now: int) -> list[int]:
        """What is left at ``now`` of each transfer under way, at most ``MOST`` numbers."""
        left = drain(self.flows, now - self.at) if now > self.at else self.flows
        return left if len(left) <= MOST else sorted([*left[: MOST - 1], sum(left[MOST - 1 :])])

    def admit(self, now: int, work: int) -> None:
        """Another transfer starts at ``now``."""
        if work:
            left = self.under_way(now)
            self.at, self.flows = max(now, self.at), sorted([*left, work])
