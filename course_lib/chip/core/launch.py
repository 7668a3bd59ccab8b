"""`launch` runs a kernel on the emulated cores of a chip and returns what happened: a `Run`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path

import numpy as np

from course_lib.chip.core.buffers import GlobalTensor, empty, tensor
from course_lib.chip.core.engine import Engine
from course_lib.chip.core.errors import IllegalPath, WrongOperand
from course_lib.chip.core.hazards import Space
from course_lib.chip.core.isa import Core
from course_lib.chip.core.program import AIC, AIV
from course_lib.chip.core.rules import Rules, rules
from course_lib.chip.spec import ChipSpec, load_chip

PICO = 10**12
MIX = "MIX"


@dataclass(frozen=True)
class Event:
    """One instruction on one pipe: it held the pipe from cycle ``start`` to ``end``."""

    core: str
    pipe: str
    name: str
    start: int
    end: int
    flops: int


@dataclass(frozen=True, eq=False)
class Run:
    """A kernel's run on ``cores`` cores. ``cycles`` of the cube's clock, until the last result is in HBM."""

    chip: ChipSpec
    kernel: str
    cores: int
    cycles: int
    hbm_bytes: int
    l2_hits: int  # bytes fetched that were in L2
    l2_bytes: int  # bytes fetched
    arguments: tuple[GlobalTensor | object, ...]
    buffers: dict[str, dict]  # core → name → Buffer, as they were left
    _events: list
    _pipes: list[tuple[str, str]]

    @property
    def ps(self) -> int:
        """Picoseconds, rounded up."""
        return -(-self.cycles * PICO // self.chip.require("cube_clock"))

    @cached_property
    def flops(self) -> int:
        """FLOPs of all cores: 2·m·k·n per Mmad as it ran, padding included, and 1 per element of a vector operation."""
        return sum(instruction.flops for _, instruction, _, _ in self._events)

    @property
    def hit_rate(self) -> float | None:
        """Share of the bytes fetched from GM that were in L2; None when nothing was fetched."""
        return self.l2_hits / self.l2_bytes if self.l2_bytes else None

    @cached_property
    def events(self) -> list[Event]:
        """Every instruction that took time, by start."""
        made = [Event(*self._pipes[p], i.name, start, end, i.flops) for p, i, start, end in self._events]
        return sorted(made, key=lambda event: (event.start, event.core, event.pipe))

    @cached_property
    def busy(self) -> dict[str, float]:
        """Share of the run in which each pipe was at work, mean over the cores that have it; the longest first."""
        taken, there = {}, {}
        for _, pipe in self._pipes:
            there[pipe] = there.get(pipe, 0) + 1
        for p, _, start, end in self._events:
            pipe = self._pipes[p][1]
            taken[pipe] = taken.get(pipe, 0) + end - start
        shares = {pipe: taken[pipe] / there[pipe] / self.cycles for pipe in taken}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    @property
    def bound(self) -> str:
        """The pipe that was busy longest."""
        return next(iter(self.busy), "S")

    def export_chrome_trace(self, path: str | Path) -> None:
        """Write a trace that Perfetto and chrome://tracing open: a process per core, a track per pipe; µs of chip time."""
        us = 1e6 / self.chip.require("cube_clock")
        cores = list(dict.fromkeys(core for core, _ in self._pipes))
        records = [{"ph": "M", "name": "process_name", "pid": cores.index(core), "args": {"name": core}} for core in cores]
        for number, (core, pipe) in enumerate(self._pipes):
            track = {"pid": cores.index(core), "tid": number}
            records.append({"ph": "M", "name": "thread_name", **track, "args": {"name": pipe}})
        for p, instruction, start, end in self._events:
            track = {"pid": cores.index(self._pipes[p][0]), "tid": p}
            cycles = {"start cycle": start, "cycles": end - start}
            records.append({"ph": "X", "name": instruction.name, **track, "ts": start * us, "dur": (end - start) * us, "args": cycles})
        Path(path).write_text(json.dumps({"traceEvents": records, "displayTimeUnit": "ns"}), encoding="utf-8")

    def __str__(self) -> str:
        busy = ", ".join(f"{pipe} {share:.1%}" for pipe, share in self.busy.items())
        return f"{self.kernel} on {self.cores} × {self.chip.title}: {self.cycles:,} cycles, {self.ps / 1e6:,.2f} µs; busy: {busy}"


def launch(
    kernel: Callable, chip: ChipSpec | str, *arguments: object, unit: str = AIC, blocks: int = 1, numerics: bool | None = None,
    check: bool = True,
) -> Run:  # fmt: skip
    """Record ``kernel(core, *arguments)`` on ``blocks`` cores, time it, check its flags, and compute.

    NumPy arrays among the arguments become tensors in GM and get the results when the run ends; `tensor` makes one in
    a dtype that NumPy lacks, `empty` one without values. ``unit``: "AIC", "AIV", or "MIX" for AI cores of one AIC and
    its AIVs, where the kernel is recorded once for each and looks at ``core.unit``. ``numerics=False``, or an argument
    without values, only times. ``check=False`` lets data races pass, to be seen in the numbers, and flags that may still
    be set when they are set again.

    Raises CoreError for what a real core would punish, WrongOperand for a bad argument.
    """
    spec = load_chip(chip) if isinstance(chip, str) else chip
    made: dict[int, GlobalTensor] = {}
    given = [_argument(a, i, made) for i, a in enumerate(arguments)]
    tensors = [a for a in given if isinstance(a, GlobalTensor)]
    for each in tensors:
        each.whole.space, each.whole.written = Space(), False
    lacking = any(each.stored is None for each in tensors)
    numerics = not lacking if numerics is None else numerics
    if numerics and lacking:
        raise WrongOperand("numerics=True needs values in every tensor; make them by tensor(array, dtype)")
    how = rules(spec)
    cores, ports = _cores(how, unit, blocks, numerics)
    for core in cores:
        kernel(core, *given)
    engine = Engine(how, cores, ports, check)
    cycles = engine.run()
    for argument, each in zip(arguments, given):
        if isinstance(argument, np.ndarray) and each.written and numerics:
            argument[...] = each.numpy()
    pipes = [(cores[pipe.unit].label, pipe.name) for pipe in engine.pipes]
    left = {core.label: core.buffers for core in cores}
    return Run(
        spec, _name(kernel), blocks, cycles, engine.hbm_bytes, engine.l2.hits, engine.l2.bytes,
        tuple(given), left, engine.events, pipes,
    )  # fmt: skip


def _name(kernel: Callable) -> str:
    """Its own, also behind functools.partial."""
    return getattr(getattr(kernel, "func", kernel), "__name__", "kernel")


def _argument(argument: object, position: int, made: dict[int, GlobalTensor]) -> object:
    """What the kernel is given. An array that comes twice, for a kernel that works in place, is one tensor."""
    if isinstance(argument, np.ndarray):
        if id(argument) not in made:
            made[id(argument)] = tensor(argument, name=f"GM{position}")
        return made[id(argument)]
    if hasattr(argument, "__array__") and not isinstance(argument, (np.generic, GlobalTensor)):
        raise WrongOperand(f"argument {position} is a {type(argument).__name__}; give a NumPy array, tensor(…) or empty(…)")
    if isinstance(argument, GlobalTensor) and not argument.name:
        argument.name = f"GM{position}"
    return argument


def _cores(how: Rules, unit: str, blocks: int, numerics: bool) -> tuple[list[Core], list[int]]:
    """The cores that run the kernel, and the AI core to whose port each belongs."""
    spec = how.spec
    aivs = spec.require("vector_cores") // spec.require("cube_cores") if how.split else 0
    if unit not in (AIC, AIV, MIX):
        raise WrongOperand(f"unit is {unit!r}; use AIC, AIV or MIX")
    most = spec.vector_cores if unit == AIV and how.split else spec.cube_cores
    if not (isinstance(blocks, Integral) and 1 <= blocks <= most):
        raise WrongOperand(f"{spec.title} has {most} cores of kind {unit}; blocks is {blocks!r}, and has to be 1 to {most}")
    if not how.split:
        if unit == MIX:
            raise IllegalPath(f"{spec.title} has one core with cube and vector unit; launch with unit AIC")
        return [Core(how, AIC, b, blocks, 0, numerics, True) for b in range(blocks)], list(range(blocks))
    if unit != MIX:
        made = [Core(how, unit, b, blocks, 0, numerics, False) for b in range(blocks)]
        return made, [b // aivs if unit == AIV else b for b in range(blocks)]
    made, ports = [], []
    for b in range(blocks):
        family = [Core(how, AIC if s == 0 else AIV, b, blocks, max(s - 1, 0), numerics, False) for s in range(1 + aivs)]
        for core in family:
            core.siblings = family
        made += family
        ports += [b] * len(family)
    return made, ports


__all__ = ["Event", "Run", "empty", "launch", "tensor"]
