"""Emulated time: one host clock, and streams on which a device works through what the host has launched.

Time is an integer count of picoseconds. It is computed from costs, never measured, so a program has
the same times on every machine. The device is asynchronous: launching an operator costs the host its
launch time and puts the operator at the end of a stream; the operator starts when host and stream are
both there. The host learns what the device has done only by waiting (``synchronize``, ``.item()``).
"""

PS_PER_MS = 10**9
PS_PER_S = 10**12


class Host:
    """The host's clock: ``now`` in picoseconds since the device was taken into use."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0

    def wait_until(self, ps: int) -> None:
        if ps > self.now:
            self.now = ps


class Timeline:
    """One in-order queue of a device: ``ready`` is when it will have done all that it was given so far."""

    __slots__ = ("id", "host", "launch_ps", "ready")

    def __init__(self, id: int, host: Host, launch_ps: int) -> None:
        self.id, self.host, self.launch_ps, self.ready = id, host, launch_ps, 0

    def launch(self, ps: int) -> int:
        """Append work of ``ps`` picoseconds; returns its start. The host pays ``launch_ps`` first."""
        host = self.host
        host.now += self.launch_ps
        start = host.now if host.now > self.ready else self.ready
        self.ready = start + ps
        return start

    def mark(self) -> int:
        """When a marker appended now would be reached (picoseconds)."""
        return max(self.host.now, self.ready)

    def wait(self) -> None:
        """The host waits until everything on this stream is done."""
        self.host.wait_until(self.ready)
