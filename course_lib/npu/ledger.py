"""The ledger: what ran on the device, what it cost, and what it was for.

    with npu.ledger() as ledger:
        loss = model(x); loss.backward(); optimizer.step()
    ledger.table(by="phase")       # a DataFrame: calls, FLOPs, bytes, time, what bound it
    ledger.totals()                # FLOPs, bytes, time, utilisation, intensity, energy, peak memory
    ledger.memory_at_peak()        # bytes by category: weights, gradients, optimizer state, activations, …

All times are emulated and all counts are integers, so two runs of a program give the same ledger, byte for byte.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from course_lib.chip.cost import Cost
from course_lib.npu import real, runtime
from course_lib.npu.clock import PS_PER_S, Timeline
from course_lib.npu.memory import Block
from course_lib.npu.where import category_of, where

PHASES = ("forward", "recompute", "backward", "optimizer", "prefill", "decode", "other", "communication", "waiting")
BY = ("phase", "module", "op", "bound")


class Record(NamedTuple):
    """One operator: where it came from, when it ran (picoseconds of emulated time), what it cost."""

    op: str
    phase: str
    module: str
    shapes: tuple
    device: int
    stream: int
    launched: int
    start: int
    cost: Cost


class MemoryChange(NamedTuple):
    """Bytes taken (positive) or given back on a device at a time of the host's clock."""

    at: int
    change: int
    held: runtime.Held
    device: int


@dataclass(frozen=True)
class Utilisation:
    """A utilisation and what it means: ``value`` 0 to 1, which FLOPs are counted, which peak divides."""

    value: float | None
    convention: str
    peak: str

    def __str__(self) -> str:
        shown = "unknown" if self.value is None else f"{100 * self.value:.1f} %"
        return f"{shown} ({self.convention}; {self.peak})"


@dataclass(frozen=True)
class Totals:
    """Sums over a ledger. Times in seconds of emulated time, energy in joules (None: no published power)."""

    calls: int
    cube_flops: int
    vector_flops: int
    bytes: int
    elapsed_s: float
    busy_s: float
    energy_j: float | None
    peak_memory: int

    @property
    def flops(self) -> int:
        return self.cube_flops + self.vector_flops

    @property
    def intensity(self) -> float:
        """FLOPs for each byte moved between memory and chip."""
        return self.flops / self.bytes if self.bytes else 0.0


class Ledger:
    """Records every operator between ``__enter__`` and ``__exit__``; read it during or after.

    Opening it synchronizes, so that work launched before does not run on the ledger's time.
    """

    def __init__(self) -> None:
        # Kept as one long row each: no object is made for an operator, so that Python's garbage collector has nothing to walk.
        self._records: list = []
        self._changes: list = []
        self._unsorted: list[runtime.Held] = []
        self.began = self._ended = 0  # picoseconds of the host's clock: when the ledger was opened, when all in it was done

    def __enter__(self) -> "Ledger":
        if self in runtime.ledgers:
            raise RuntimeError("this ledger is already open; make another one with npu.ledger()")
        if self._ended:
            raise RuntimeError("this ledger was closed, and its times are those of then; make another one with npu.ledger()")
        for device in runtime.devices:
            device.memory.settle()
            device.synchronize()
        self._spec, self._home = runtime.devices[0].spec, runtime.current
        self.began = runtime.host.now
        for held in list(runtime.live.values()):
            self._changes += (self.began, 1, held.block, held, held.index)
        runtime.ledgers.append(self)
        where.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended = self._now()
        where.close()
        runtime.ledgers.remove(self)

    def __hash__(self) -> int:
        return id(self)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Operators inside belong to the phase ``name``, whatever they are."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"phase({name!r}): expected a name, such as 'prefill' or 'decode'")
        where.override.append(name)
        try:
            yield
        finally:
            where.override.pop()

    # -- what the device calls --

    def record(self, op: str, shapes: tuple, tensors: list[torch.Tensor], device: runtime.Device, stream: Timeline, start: int, price: Cost, of: str | None = None) -> None:
        phase, module = where.now(tensors)
        if self._unsorted:
            category = category_of(phase)
            for held in self._unsorted:
                held.category = held.category or category
            self._unsorted.clear()
        self._records += (op, of or phase, module, shapes, device.index, stream.id, stream.host.now, start, price)

    def memory_changed(self, held: runtime.Held, sign: int, block: Block) -> None:
        """``block`` was taken for ``held`` (1) or given back (-1); how large it is may turn out later."""
        if sign > 0 and held.category is None:
            self._unsorted.append(held)  # the operator that took it is recorded next, with its phase
        self._changes += (runtime.host.now, sign, block, held, held.index)

    # -- reading --

    @property
    def records(self) -> list[Record]:
        """Every operator so far, in the order of launch."""
        return [Record(*row) for row in zip(*[iter(self._records)] * len(Record._fields))]

    @property
    def memory(self) -> list[MemoryChange]:
        """What was held when the ledger was opened, then every change since."""
        for device in runtime.devices:
            device.memory.settle()
        rows = zip(*[iter(self._changes)] * 5)
        return [MemoryChange(at, sign * block.granted, held, device) for at, sign, block, held, device in rows if block.granted]

    def _column(self, name: str) -> list:
        return self._records[Record._fields.index(name) :: len(Record._fields)]

    def _now(self) -> int:
        """When the host and all streams will be done."""
        return max([runtime.host.now] + [s.ready for d in runtime.devices for s in d.streams])

    @property
    def elapsed_ps(self) -> int:
        """Picoseconds from the ledger's opening until everything launched in it is done."""
        return (self._ended or self._now()) - self.began

    def table(self, by: str = "phase", depth: int | None = None) -> "pandas.DataFrame":  # noqa: F821
        """Sums by "phase", "module" (its path cut to ``depth`` names), "op" or "bound", as a DataFrame.

        Columns: calls; cube_flops and vector_flops; bytes (of device memory, read and written); time_us (busy);
        share (of busy time); intensity (FLOP per byte); bound (the resource that binds most of the time).
        """
        from course_lib.npu.tables import table

        if by not in BY:
            raise ValueError(f"table(by={by!r}): expected one of {', '.join(map(repr, BY))}")
        return table(self.records, by, depth)

    def communication(self) -> "Communication":  # noqa: F821
        """Seconds of collectives on the device that was current at the opening: in all, exposed, waiting; see overlap.py."""
        from course_lib.npu.overlap import communication

        return communication(self.records, self._home)

    def totals(self) -> Totals:
        costs = self._column("cost")
        known = all(c.energy_pj is not None for c in costs)
        return Totals(
            calls=len(costs),
            cube_flops=sum(c.cube_flops for c in costs),
            vector_flops=sum(c.vector_flops for c in costs),
            bytes=sum(c.bytes for c in costs),
            elapsed_s=self.elapsed_ps / PS_PER_S,
            busy_s=sum(c.ps for c in costs if c.bound != "waiting") / PS_PER_S,
            energy_j=sum(c.energy_pj for c in costs) / 10**12 if known else None,
            peak_memory=self.peak_memory(),
        )

    def utilisation(self, model_flops: int | None = None, convention: str = "executed cube FLOPs", dtype: str = "float32", counts: str = "cube") -> Utilisation:
        """FLOPs divided by what the peak of the devices that worked could do in the elapsed time.

        Without ``model_flops`` the FLOPs are those that the cube executed (HFU: recomputation counts). With
        ``model_flops`` it is an MFU and ``convention`` must name how they were counted: "6N",
        "6N+attention causal" or "6N+attention full". ``counts`` is "cube" or "cube+vector".
        """
        if model_flops is not None and convention == "executed cube FLOPs":
            raise ValueError('utilisation(model_flops=…) needs convention="6N", "6N+attention causal" or "6N+attention full"')
        flops = sum(c.cube_flops for c in self._column("cost")) if model_flops is None else model_flops
        peak = self._spec.peak(dtype, counts=counts)
        devices = len(set(self._column("device"))) or 1
        label = f"{dtype} {counts} peak " + ("unknown" if peak is None else f"{peak / 1e12:.4g} TFLOP/s") + (f" × {devices}" if devices > 1 else "")
        seconds = self.elapsed_ps / PS_PER_S
        return Utilisation(flops / seconds / (peak * devices) if peak and seconds else None, convention, label)

    # -- memory --

    def _replay(self, device: int | None) -> Iterator[tuple[MemoryChange, Counter]]:
        """Each change with the bytes by category that stand after it; None: on the device that was current at the opening."""
        now, device = Counter(), self._home if device is None else device
        for m in self.memory:
            if m.device == device:
                now[m.held.category or "other"] += m.change
                yield m, now

    def peak_memory(self, device: int | None = None) -> int:
        """The most bytes that were allocated at once on a device: None stands for the one that was current at the opening."""
        total, peak, device = 0, 0, self._home if device is None else device
        for m in self.memory:
            total += m.change if m.device == device else 0
            peak = max(peak, total)
        return peak

    def memory_at_peak(self, device: int | None = None) -> dict[str, int]:
        """Bytes by category at the moment when most were allocated; they sum to ``peak_memory``."""
        peak, best = -1, {}
        for _, now in self._replay(device):
            if now.total() > peak:
                peak, best = now.total(), {k: v for k, v in now.items() if v}
        return dict(sorted(best.items(), key=lambda item: (-item[1], item[0])))

    def memory_over_time(self, device: int | None = None) -> list[tuple[int, dict[str, int]]]:
        """(picoseconds since the ledger's opening, bytes by category) after each change."""
        return [(m.at - self.began, dict(now)) for m, now in self._replay(device)]

    # -- export --

    def to_json(self) -> str:
        """All records as JSON lines: the same program gives the same bytes everywhere."""
        lines = [json.dumps({**r._asdict(), "cost": asdict(r.cost)}, sort_keys=True) for r in self.records]
        return "\n".join([*lines, ""])

    def export_chrome_trace(self, path: str) -> None:
        """Write a timeline that Perfetto (ui.perfetto.dev) and chrome://tracing open."""
        from course_lib.npu.trace import chrome_trace, write_json

        write_json(chrome_trace(self), path)


def ledger() -> Ledger:
    """A new ledger, to be used as ``with npu.ledger() as ledger:``."""
    real.refuse("ledger()")
    return Ledger()
