"""What a kernel writes down: instructions, each into the queue of the pipe that will carry it out.

A kernel is a Python function whose first argument is a `Core`. It runs once per core and only records; nothing is
computed or timed yet, so a kernel cannot look at results. The scalar unit issues one instruction per cycle in program
order; from there each pipe goes through its own queue in order, beside the others. That is why flags are needed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from course_lib.chip.core.buffers import Buffer, GlobalTensor, LocalTensor, buffers
from course_lib.chip.core.errors import FlagError, IllegalPath
from course_lib.chip.core.hazards import Region
from course_lib.chip.core.rules import CUBE_BUFFERS, CUBE_PIPES, VECTOR_BUFFERS, VECTOR_PIPES, Rules

EVENT_IDS = 8  # per pair of pipes
CROSS_CORE_IDS = 8  # 8 to 10 are the hardware's own
AIC, AIV = "AIC", "AIV"


@dataclass(slots=True, eq=False)
class Instruction:
    """One entry of a pipe's queue. ``kind``: "work", "set", "wait", "barrier", "barrier all", "cross set", "cross wait"."""

    name: str
    kind: str = "work"
    cycles: int = 0  # the pipe is taken
    latency: int = 0  # from then until the result is there; the pipe goes on meanwhile
    reads: tuple[Region, ...] = ()
    writes: tuple[Region, ...] = ()
    gm: GlobalTensor | None = None  # the one side of a transfer from or to GM
    stores: bool = False  # to GM; else from there, with cycles that depend on what lies in L2
    stops: bool = False  # the scalar unit, until it is done
    action: Callable[[], None] | None = None  # the arithmetic
    flops: int = 0
    flag: tuple = ()


@dataclass
class Queue:
    """A pipe's instructions in order, and the cycle in which each was issued."""

    instructions: list[Instruction] = field(default_factory=list)
    issued: list[int] = field(default_factory=list)


class Recorder:
    """What AIC and AIV have in common: buffers, queues, flags."""

    def __init__(self, rules: Rules, unit: str, block: int, blocks: int, sub_block: int, numerics: bool, fused: bool) -> None:
        self.rules, self.spec, self.unit, self.numerics = rules, rules.spec, unit, numerics
        self._block, self._blocks, self._sub_block = block, blocks, sub_block
        pipes = CUBE_PIPES if unit == AIC else VECTOR_PIPES
        names = CUBE_BUFFERS if unit == AIC else VECTOR_BUFFERS
        if fused:
            pipes, names = (*CUBE_PIPES, "V", "MTE3"), CUBE_BUFFERS + VECTOR_BUFFERS
        names = tuple(name for name in names if self.spec.figures.value(f"buffers.{name.lower()}") is not None)
        self.buffers: dict[str, Buffer] = buffers(self.spec, names, numerics)
        self.queues: dict[str, Queue] = {pipe: Queue() for pipe in pipes}
        self.issue, self.stops = 0, []  # stops: issue cycles after which the scalar unit waits for a flag
        self.siblings: list[Recorder] = [self]  # of the same AI core
        self._known: dict[tuple, Instruction] = {}

    @property
    def label(self) -> str:
        """Its name in messages and traces: "AIC", or one of several as "AIC3", the AIVs of AI core 3 as "AIV3.0"."""
        if len(self.siblings) > 1:
            return f"{self.unit}{self._block}" + (f".{self._sub_block}" if self.unit == AIV else "")
        return f"{self.unit}{self._block}" if self._blocks > 1 else self.unit

    def GetBlockIdx(self) -> int:
        """Number of this core, from 0; AIVs of one AI core share it in a MIX kernel."""
        return self._block

    def GetBlockNum(self) -> int:
        """How many cores run this kernel."""
        return self._blocks

    def GetSubBlockIdx(self) -> int:
        """Which of its AI core's AIVs this is, in a MIX kernel."""
        return self._sub_block

    def LocalTensor(self, buffer: str, shape: tuple[int, ...] | int, dtype: str, address: int | None = None, sub_block: int = 0) -> LocalTensor:
        """A vector or matrix in one of the core's buffers, after those already there, or at ``address`` in bytes.

        Outside UB, shapes are rounded up to whole fractals. On chips with the wires for it, in a MIX kernel, an AIC may
        name the UB of its own AIV ``sub_block``, and an AIV the L1 of its AIC; both name one place by one ``address``.
        Raises BufferOverflow, Misaligned, IllegalPath.
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        there = self.buffers
        if buffer not in there and buffer in ("UB", "L1") and (len(self.siblings) > 1 or self._wired(buffer)):
            there = self._across(buffer, 1 + sub_block if buffer == "UB" else 0)
        if buffer not in there:
            kind = {**dict.fromkeys(CUBE_BUFFERS, AIC), **dict.fromkeys(VECTOR_BUFFERS, AIV)}.get(buffer, self.unit)
            cure = "" if kind == self.unit else f"; an {kind} has it: launch(…, unit={kind!r}), or 'MIX' for both"
            raise IllegalPath(f"an {self.unit} of {self.spec.title} has no {buffer}; its buffers are {', '.join(there)}{cure}")
        return there[buffer].allocate(shape, dtype, address)

    def _wired(self, buffer: str) -> bool:
        """Does a wire lead from this kind of core to ``buffer`` of the other?"""
        return self.spec.figures.value("paths.l0c_ub" if buffer == "UB" else "paths.ub_l1") is not None

    def _across(self, buffer: str, sibling: int) -> dict[str, Buffer]:
        """The buffers of another core of this AI core, to which a wire must lead."""
        self.rules.path(*(("L0C", "UB") if buffer == "UB" else ("UB", "L1")))
        if not 0 <= sibling < len(self.siblings):
            raise IllegalPath(f"{self.label} reaches no {buffer} here: it has {len(self.siblings) - 1} other cores beside it; launch with unit MIX")
        return self.siblings[sibling].buffers

    # -- order between pipes ------------------------------------------------------------------------

    def SetFlag(self, event: str, event_id: int = 0) -> None:
        """Queued on the first pipe of ``event`` ("MTE2_V"): set once all before it on that pipe is done."""
        first, _ = self._event(event, event_id)
        self._flag(first, "set", f"SetFlag({event}, {event_id})", (event, event_id))

    def WaitFlag(self, event: str, event_id: int = 0) -> None:
        """Queued on the second pipe of ``event``: it goes on once the flag is set, and clears it."""
        _, second = self._event(event, event_id)
        self._flag(second, "wait", f"WaitFlag({event}, {event_id})", (event, event_id))

    def PipeBarrier(self, pipe: str = "ALL") -> None:
        """The pipe, or each pipe, goes on when all before is done."""
        if pipe != "ALL":
            self._flag(self._pipe(pipe), "barrier", f"PipeBarrier({pipe})", ())
            return
        for each in self.queues:
            self._flag(each, "barrier all", "PipeBarrier(ALL)", ())
        self.stops.append(self.issue)

    def CrossCoreSetFlag(self, mode: int, pipe: str, flag_id: int) -> None:
        """Set for other cores once all before on ``pipe`` is done.

        ``mode`` 0: among all cores of this kind; 1: among the AIVs of one AI core; 2: from an AIC to its AIVs, or from
        both AIVs to their AIC. A flag may be set 15 times ahead of its waits.
        """
        if mode not in (0, 1, 2):
            raise FlagError(f"CrossCoreSetFlag has the modes 0, 1 and 2, not {mode!r}")
        self._flag(self._pipe(pipe), "cross set", f"CrossCoreSetFlag({mode}, {pipe}, {flag_id})", (mode, self._cross(flag_id)))

    def CrossCoreWaitFlag(self, flag_id: int, pipe: str = "S") -> None:
        """``pipe`` goes on once every core that is to set the flag has set it once more; S holds back all pipes."""
        self._flag(self._pipe(pipe), "cross wait", f"CrossCoreWaitFlag({flag_id})", (self._cross(flag_id),))

    def _flag(self, pipe: str, kind: str, name: str, flag: tuple) -> None:
        key = (name, pipe)
        known = self._known.get(key)
        if known is None:
            stops = pipe == "S" and kind in ("wait", "cross wait", "barrier all")
            known = self._known[key] = Instruction(name, kind, flag=flag, stops=stops)
        self._queue(pipe, known)
        if known.stops and kind != "barrier all":
            self.stops.append(self.issue)

    def _event(self, event: str, event_id: int) -> tuple[str, str]:
        first, _, second = event.partition("_")
        if first == second or first not in self.queues or second not in self.queues:
            raise FlagError(f"{event!r} is no event of an {self.unit}: name two of its pipes, as in MTE2_{'M' if 'M' in self.queues else 'V'}; it has {', '.join(self.queues)}")
        if not (isinstance(event_id, int) and 0 <= event_id < EVENT_IDS):
            raise FlagError(f"{event} has the ids 0 to {EVENT_IDS - 1}, not {event_id!r}")
        return first, second

    def _pipe(self, pipe: str) -> str:
        if pipe not in self.queues:
            raise FlagError(f"an {self.unit} of {self.spec.title} has no pipe {pipe!r}; it has {', '.join(self.queues)}")
        return pipe

    def _cross(self, flag_id: int) -> int:
        if not (isinstance(flag_id, int) and 0 <= flag_id < CROSS_CORE_IDS):
            raise FlagError(f"cross-core flags have the ids 0 to {CROSS_CORE_IDS - 1}, not {flag_id!r}")
        return flag_id

    # -- recording ----------------------------------------------------------------------------------

    def _queue(self, pipe: str, instruction: Instruction) -> None:
        queue = self.queues[pipe]
        queue.instructions.append(instruction)
        queue.issued.append(self.issue)
        self.issue += 1

    def _issue(self, pipe: str, key: tuple, make: Callable[[], Instruction]) -> None:
        """Queue what is known under ``key``, so that a loop checks and prices each distinct instruction once."""
        known = self._known.get(key)
        if known is None:
            if pipe not in self.queues:
                raise IllegalPath(f"{key[0]} runs on pipe {pipe}, and an {self.unit} of {self.spec.title} has {', '.join(self.queues)}")
            known = self._known[key] = make()
        self._queue(pipe, known)
