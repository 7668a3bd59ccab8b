"""Runs what kernels have recorded: when each instruction starts and ends, whether flags order what they must, numbers.

Every pipe goes through its queue in order; flags hold it back. Three things are shared: the port of an AI core to L2
(its AIC's and its AIVs' transfers queue there), L2 itself, and HBM (all cores queue there). A transfer takes its pipe
while its bytes pass; its result is there a latency later, and the pipe meanwhile goes on to its next instruction.

Numbers are computed after the clock is known, in the order in which instructions end. So a missing flag has here the
effect that it has on silicon: what comes too early reads what lay there before.
"""

import heapq
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count

from course_lib.chip.core.buffers import LINE_BYTES, LINE_ROWS, GlobalTensor
from course_lib.chip.core.errors import Deadlock, FlagError, ReadBeforeWrite
from course_lib.chip.core.hazards import check_read, check_write
from course_lib.chip.core.program import AIC, Instruction, Recorder
from course_lib.chip.core.rules import THOUSANDTHS, Rules

MOST_SETS = 15  # of a cross-core flag ahead of its waits
NEVER = 1 << 62


@dataclass(slots=True, eq=False)
class Pipe:
    """One queue on its way. ``known[p]``: how many instructions of pipe p are done for sure when this one goes on."""

    index: int
    unit: int
    name: str
    port: int
    instructions: list[Instruction]
    issued: list[int]
    known: list[int]
    position: int = 0
    free: int = 0  # cycle in which the next instruction can start
    done: int = 0  # cycle in which all so far are done
    waits: dict = field(default_factory=dict)  # per cross-core flag


@dataclass(slots=True)
class Flag:
    """An event id of one pair of pipes. ``consumed``: how far the waiting pipe was when it last cleared the flag."""

    set_at: int = -1
    known: tuple[int, ...] = ()
    consumed: int = -1
    waiting: Pipe | None = None


class Engine:
    """One run of the programs of all cores. `run` fills ``events``: (pipe, instruction, start, end), in any order."""

    def __init__(self, rules: Rules, cores: list[Recorder], ports: list[int], check: bool) -> None:
        self.rules, self.cores, self.check = rules, cores, check
        names = [pipe for core in cores for pipe in core.queues]
        self.pipes: list[Pipe] = []
        for unit, core in enumerate(cores):
            for name, queue in core.queues.items():
                known = [0] * len(names)
                self.pipes.append(Pipe(len(self.pipes), unit, name, ports[unit], queue.instructions, queue.issued, known))
        several = len(cores) > 1
        self.names = [f"{core.unit}{unit} {name}" if several else name for unit, core in enumerate(cores) for name in core.queues]
        self.by_unit = [{p.name: p for p in self.pipes if p.unit == unit} for unit in range(len(cores))]
        self.flags: list[dict[tuple, Flag]] = [{} for _ in cores]
        self.cross = _CrossFlags(cores)
        self.barriers: dict[tuple, list[Pipe]] = {}
        self.offsets = [[0] for _ in cores]  # cycles by which the scalar unit was held back, per stop
        self.held: list[list[Pipe]] = [[] for _ in cores]
        self.read_free = [0] * (max(ports) + 1)
        self.write_free = [0] * (max(ports) + 1)
        self.hbm_free, self.hbm_bytes, self.l2_hits, self.l2_bytes = 0, 0, 0, 0
        self.lines: OrderedDict[tuple, None] = OrderedDict()
        self.most_lines = rules.l2_bytes // (LINE_ROWS * LINE_BYTES)
        self.events: list[tuple[int, Instruction, int, int]] = []
        self.results: list[tuple[int, int, Instruction]] = []
        self.early: list[tuple] = []  # reads of what nobody had written when they were looked at
        self.ready: list[tuple[int, int]] = []
        self.order = count()

    def run(self) -> int:
        """Times everything, then computes. Cycles until the last result is in HBM. Raises CoreError."""
        self.ready = [(0, pipe.index) for pipe in self.pipes if pipe.instructions]
        while self.ready:
            _, index = heapq.heappop(self.ready)
            self._advance(self.pipes[index])
        self._ended()
        for _, _, instruction in sorted(self.results, key=lambda result: result[:2]):
            instruction.action()
        done = max((pipe.done for pipe in self.pipes), default=0)
        return max(done, -(-self.hbm_free // THOUSANDTHS))

    # -- one pipe -----------------------------------------------------------------------------------

    def _advance(self, pipe: Pipe) -> None:
        """As far as it goes: until a flag is missing, or its next transfer comes after one of another pipe."""
        instructions, issued, stops, held = pipe.instructions, pipe.issued, self.cores[pipe.unit].stops, self.offsets[pipe.unit]
        last = len(instructions)
        while pipe.position < last:
            instruction, start = instructions[pipe.position], issued[pipe.position]
            if stops:
                stop = bisect_right(stops, start)
                if stop >= len(held):
                    self.held[pipe.unit].append(pipe)
                    return
                start += held[stop]
            start = max(start, pipe.free)
            if instruction.kind == "work":
                if (instruction.fetches or instruction.stores) and self.ready and start > self.ready[0][0]:
                    heapq.heappush(self.ready, (start, pipe.index))
                    return
                self._work(pipe, instruction, start)
            elif not self._order(pipe, instruction, start):
                return
            pipe.position += 1
            if stops and pipe.name == "S" and instruction.kind in ("wait", "cross wait", "barrier all"):
                self._go_on(pipe, issued[pipe.position - 1])

    def _work(self, pipe: Pipe, instruction: Instruction, start: int) -> None:
        cycles, latency = instruction.cycles, instruction.latency
        if instruction.fetches is not None:
            end, missed = self._fetch(pipe, instruction.fetches, start)
            latency += missed
        elif instruction.stores is not None:
            end = self._store(pipe, instruction.stores, start, cycles)
        else:
            end = start + cycles
        pipe.free = end
        pipe.done = max(pipe.done, end + latency)
        self.events.append((pipe.index, instruction, start, end))
        if instruction.action is not None:
            self.results.append((pipe.done, next(self.order), instruction))
        if self.check:
            self._check(pipe, instruction)

    def _fetch(self, pipe: Pipe, source: GlobalTensor, start: int) -> tuple[int, int]:
        """(cycle in which the bytes have passed, additional latency) of a transfer from GM."""
        touched, missed = 0, 0
        for line in source.lines():
            touched += 1
            if line in self.lines:
                self.lines.move_to_end(line)
            else:
                missed += 1
                self._keep(line)
        miss = source.bytes * missed // touched
        hit = source.bytes - miss
        self.l2_hits, self.l2_bytes, self.hbm_bytes = self.l2_hits + hit, self.l2_bytes + source.bytes, self.hbm_bytes + miss
        start = max(start, self.read_free[pipe.port])
        end = start + self.rules.fetch(hit, miss)
        if miss:
            end = max(end, self._hbm(start, miss, 0))
        self.read_free[pipe.port] = end
        return end, self.rules.latency["l2_miss"] if miss else 0

    def _store(self, pipe: Pipe, target: GlobalTensor, start: int, cycles: int) -> int:
        """Cycle in which the bytes have passed into L2; HBM takes them from there, whenever it is free."""
        for line in target.lines():
            self._keep(line)
        self.hbm_bytes += target.bytes
        start = max(start, self.write_free[pipe.port])
        self._hbm(start, 0, target.bytes)
        end = self.write_free[pipe.port] = start + cycles
        return end

    def _keep(self, line: tuple) -> None:
        self.lines[line] = None
        self.lines.move_to_end(line)
        if len(self.lines) > self.most_lines:
            self.lines.popitem(last=False)

    def _hbm(self, start: int, read: int, written: int) -> int:
        self.hbm_free = max(self.hbm_free, start * THOUSANDTHS) + self.rules.hbm(read, written)
        return -(-self.hbm_free // THOUSANDTHS)

    def _check(self, pipe: Pipe, instruction: Instruction) -> None:
        known, done = pipe.known, pipe.position + 1
        known[pipe.index] = done
        for region in instruction.reads:
            fresh = check_read(region, pipe.index, known, instruction.name, done, self.names)
            if fresh and instruction.fetches is None:
                self.early.append((region, instruction.name, self.names[pipe.index]))
        for region in instruction.writes:
            check_write(region, pipe.index, known, instruction.name, done, self.names)

    # -- flags --------------------------------------------------------------------------------------

    def _order(self, pipe: Pipe, instruction: Instruction, start: int) -> bool:
        """Set, wait, or barrier; False when the pipe has to wait."""
        kind = instruction.kind
        pipe.known[pipe.index] = pipe.position + 1
        if kind == "set":
            self._set(pipe, instruction, max(start, pipe.done))
        elif kind == "wait":
            return self._wait(pipe, instruction, start)
        elif kind == "barrier":
            pipe.free = max(start, pipe.done)
        elif kind == "barrier all":
            return self._barrier(pipe, instruction.flag, start)
        elif kind == "cross set":
            self.cross.set(pipe, instruction, max(start, pipe.done), self.names)
            for waiting in self.cross.released():
                heapq.heappush(self.ready, (waiting.free, waiting.index))
        else:
            return self.cross.wait(pipe, instruction, start)
        return True

    def _set(self, pipe: Pipe, instruction: Instruction, at: int) -> None:
        flag = self.flags[pipe.unit].setdefault(instruction.flag, Flag())
        waiter = self.by_unit[pipe.unit][instruction.flag[0].partition("_")[2]]
        if flag.set_at >= 0 or flag.consumed > pipe.known[waiter.index]:
            raise FlagError(
                f"{instruction.name} on {self.names[pipe.index]} sets a flag that may still be set: nothing makes it "
                f"come after {self.names[waiter.index]} has waited for it; set it back by a flag "
                f'"{waiter.name}_{pipe.name}", or take another id'
            )
        flag.set_at, flag.known = at, tuple(pipe.known)
        if flag.waiting is not None:
            heapq.heappush(self.ready, (at, flag.waiting.index))
            flag.waiting = None

    def _wait(self, pipe: Pipe, instruction: Instruction, start: int) -> bool:
        flag = self.flags[pipe.unit].setdefault(instruction.flag, Flag())
        if flag.set_at < 0:
            flag.waiting = pipe
            return False
        pipe.free = max(start, flag.set_at)
        pipe.known[:] = map(max, pipe.known, flag.known)
        flag.set_at, flag.consumed = -1, pipe.position + 1
        return True

    def _barrier(self, pipe: Pipe, number: tuple, start: int) -> bool:
        met = self.barriers.setdefault((pipe.unit, *number), [])
        met.append(pipe)
        pipe.free = start
        if len(met) < len(self.by_unit[pipe.unit]):
            return False
        at = max(max(p.free, p.done) for p in met)
        known = list(map(max, *(p.known for p in met)))
        for each in met:
            each.free, each.known = at, list(known)
            if each is not pipe:
                each.position += 1
                if each.name == "S":
                    self._go_on(each, each.issued[each.position - 1])
                heapq.heappush(self.ready, (at, each.index))
        return True

    def _go_on(self, scalar: Pipe, issued: int) -> None:
        """The scalar unit issues again: what follows in program order is late by as much as it waited."""
        self.offsets[scalar.unit].append(max(scalar.free - issued, self.offsets[scalar.unit][-1]))
        for pipe in self.held[scalar.unit]:
            heapq.heappush(self.ready, (scalar.free, pipe.index))
        self.held[scalar.unit].clear()

    # -- the end ------------------------------------------------------------------------------------

    def _ended(self) -> None:
        waiting = [pipe for pipe in self.pipes if pipe.position < len(pipe.instructions)]
        if waiting:
            lines = [self._why(pipe) for pipe in waiting]
            raise Deadlock("every pipe that is not done waits for a flag:\n  " + "\n  ".join(lines))
        for unit, flags in enumerate(self.flags):
            for (event, event_id), flag in flags.items():
                if flag.set_at >= 0:
                    first = self.names[self.by_unit[unit][event.partition("_")[0]].index]
                    raise FlagError(
                        f"the flag {event}, {event_id} that {first} has set is still set at the end: add "
                        f'WaitFlag("{event}", {event_id}), or the next kernel starts with it'
                    )
        for region, name, pipe in self.early if self.check else ():
            raise ReadBeforeWrite(f"{name} on {pipe} reads {region.text}, where nothing was written before")

    def _why(self, pipe: Pipe) -> str:
        """What a pipe that does not go on waits for, and who would have to do it."""
        instruction, name = pipe.instructions[pipe.position], self.names[pipe.index]
        if instruction.kind == "wait":
            first = self.by_unit[pipe.unit][instruction.flag[0].partition("_")[0]]
            to_come = any(i.kind == "set" and i.flag == instruction.flag for i in first.instructions[first.position :])
            who = f"{self.names[first.index]} would set it, and waits itself" if to_come else f"no SetFlag for it is left on {self.names[first.index]}"
            return f"{name} waits in {instruction.name}: {who}"
        if instruction.kind == "cross wait":
            return f"{name} waits in {instruction.name}: not every core that is to set it has done so once more"
        if instruction.kind == "barrier all":
            return f"{name} waits in PipeBarrier(ALL) for the other pipes"
        return f"{name} waits to be given {instruction.name}: the scalar unit itself waits"


class _CrossFlags:
    """Flags between cores: a wait goes on when every core of its group has set the flag once more."""

    def __init__(self, cores: list[Recorder]) -> None:
        self.cores = cores
        self.setters: dict[tuple[int, int], set[int]] = {}  # (waiting core, flag id) → cores
        self.sets: dict[tuple[int, int, int], list[tuple[int, tuple]]] = {}  # and setting core → (cycle, known)
        self.waits: dict[tuple[int, int], int] = {}
        self.parked: dict[tuple[int, int], Pipe] = {}
        for unit, core in enumerate(cores):
            for queue in core.queues.values():
                for instruction in queue.instructions:
                    if instruction.kind == "cross set":
                        mode, flag_id = instruction.flag
                        for target in self._targets(unit, mode):
                            self.setters.setdefault((target, flag_id), set()).add(unit)

    def _targets(self, unit: int, mode: int) -> list[int]:
        me = self.cores[unit]
        if mode == 0:
            return [i for i, core in enumerate(self.cores) if core.unit == me.unit]
        family = [self.cores.index(core) for core in me.siblings]
        if mode == 1:
            return [i for i in family if self.cores[i].unit == me.unit]
        return [i for i in family if (self.cores[i].unit == AIC) != (me.unit == AIC)]

    def set(self, pipe: Pipe, instruction: Instruction, at: int, names: list[str]) -> None:
        mode, flag_id = instruction.flag
        for target in self._targets(pipe.unit, mode):
            sets = self.sets.setdefault((target, flag_id, pipe.unit), [])
            sets.append((at, tuple(pipe.known)))
            if len(sets) - self.waits.get((target, flag_id), 0) > MOST_SETS:
                raise FlagError(
                    f"{instruction.name} on {names[pipe.index]} sets the flag for the {MOST_SETS + 1}th time without a "
                    f"CrossCoreWaitFlag({flag_id}) on the other side; a core can count to {MOST_SETS}"
                )

    def wait(self, pipe: Pipe, instruction: Instruction, start: int) -> bool:
        key = (pipe.unit, instruction.flag[0])
        done, setters = self.waits.get(key, 0), self.setters.get(key, set())
        sets = [self.sets.get((*key, setter), ()) for setter in setters]
        if not sets or any(len(each) <= done for each in sets):
            self.parked[key] = pipe
            return False
        pipe.free = max(start, *(each[done][0] for each in sets))
        for each in sets:
            pipe.known[:] = map(max, pipe.known, each[done][1])
        self.waits[key] = done + 1
        return True

    def released(self) -> list[Pipe]:
        """Pipes whose flag may be there now; they look again."""
        ready = list(self.parked.values())
        self.parked.clear()
        return ready
