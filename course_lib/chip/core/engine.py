"""Runs what kernels have recorded: when each instruction starts and ends, whether flags order what they must, numbers.

Every pipe goes through its queue in order; flags hold it back. Three things are shared: the port of an AI core to L2
(its AIC's and its AIVs' transfers queue there), L2 itself, and HBM (all cores queue there). A transfer takes its pipe
while its bytes pass; its result is there a latency later, and the pipe meanwhile goes on to its next instruction.

Numbers are computed after the clock is known, in the order in which instructions end. So a missing flag has here the
effect that it has on silicon: what comes too early reads what lay there before.
"""

import heapq
from bisect import bisect_right
from dataclasses import dataclass

from course_lib.chip.core.cross import CrossFlags
from course_lib.chip.core.errors import Deadlock, FlagError, ReadBeforeWrite
from course_lib.chip.core.hazards import Pipe, Region, check_read, check_write
from course_lib.chip.core.l2 import L2
from course_lib.chip.core.program import Instruction, Recorder
from course_lib.chip.core.rules import THOUSANDTHS, Rules


@dataclass(slots=True, eq=False)
class Flag:
    """An event id of one pair of pipes. ``consumed``: how far the waiting pipe was when it last cleared the flag.

    ``more``: further sets before it was cleared, which is an error; they count, so that what lies behind it is found.
    """

    waiter: Pipe
    set_at: int = -1
    known: list[int] | None = None
    more: list[tuple[int, list[int]]] | None = None
    consumed: int = -1
    waiting: bool = False


class Engine:
    """One run of the programs of all cores. `run` fills ``events``: (pipe, instruction, start, end), in any order."""

    def __init__(self, rules: Rules, cores: list[Recorder], ports: list[int], check: bool) -> None:
        self.rules, self.cores, self.check = rules, cores, check
        self.units = [core.label for core in cores]
        self.cross = CrossFlags(cores, self.units)
        self.pipes: list[Pipe] = []
        self.by_unit = [self._pipes(unit, ports[unit]) for unit in range(len(cores))]
        self.flags: list[dict[tuple, Flag]] = [{} for _ in cores]
        self.barriers: list[list[Pipe]] = [[] for _ in cores]  # pipes that have come to the next PipeBarrier(ALL)
        self.offsets = [[0] for _ in cores]  # cycles by which the scalar unit was held back, per stop
        self.told = [[[]] for _ in cores]  # what it knew then, and with it whatever it issues from there on
        self.held: list[list[Pipe]] = [[] for _ in cores]
        self.read_free = [0] * (max(ports) + 1)
        self.write_free = [0] * (max(ports) + 1)
        self.hbm_free, self.hbm_bytes = 0, 0
        self.owed = 0  # HBM's time for what L2 still has to write back
        self.l2 = L2(rules.l2_bytes)
        self.events: list[tuple[int, Instruction, int, int]] = []
        self.results: list[tuple[int, Instruction]] = []
        self.early: list[tuple[Region, str, str]] = []  # reads of what nobody had written when they were looked at
        self.set_twice: FlagError | None = None  # the first; told when the run is over, for a race tells more
        self.ready: list[tuple[int, int, int]] = []  # (cycle, asked for since, pipe): pipes that may go on

    def _pipes(self, unit: int, port: int) -> dict[str, Pipe]:
        """The pipes of one core. They form a domain of flags, or all do where flags go from core to core."""
        queues, made = self.cores[unit].queues, {}
        everywhere = sum(len(core.queues) for core in self.cores)
        for slot, (name, queue) in enumerate(queues.items()):
            text = f"{self.units[unit]} {name}" if len(self.cores) > 1 else name
            number = len(self.pipes)
            domain, slot, known = (0, number, everywhere) if self.cross.used else (unit, slot, len(queues))
            made[name] = Pipe(number, unit, name, text, port, domain, slot, queue.instructions, queue.issued, [0] * known, made)
            self.pipes.append(made[name])
        return made

    def run(self) -> int:
        """Times everything, then computes. Cycles until the last result is in HBM. Raises CoreError."""
        self.ready = [(0, 0, pipe.index) for pipe in self.pipes if pipe.instructions]
        while self.ready:
            *_, index = heapq.heappop(self.ready)
            self._advance(self.pipes[index])
        self._ended()
        self.results.sort(key=lambda result: result[0])  # and, being stable, as they came where they end together
        for _, instruction in self.results:
            instruction.action()
        done = max((pipe.done for pipe in self.pipes), default=0)
        return max(done, -(-(self.hbm_free + self.owed) // THOUSANDTHS))

    # -- one pipe -----------------------------------------------------------------------------------

    def _advance(self, pipe: Pipe) -> None:
        """As far as it goes: until a flag is missing, or another pipe's turn to use port, L2 and HBM comes first."""
        instructions, issued, unit = pipe.instructions, pipe.issued, pipe.unit
        stops, held, ready, slot = self.cores[unit].stops, self.offsets[unit], self.ready, pipe.slot
        last = len(instructions)
        while pipe.position < last:
            instruction, start = instructions[pipe.position], issued[pipe.position]
            if stops:
                stop = bisect_right(stops, start)
                if stop >= len(held):
                    self.held[unit].append(pipe)
                    return
                start += held[stop]
                if stop > pipe.stops:
                    pipe.stops = stop
                    pipe.known[:] = map(max, pipe.known, self.told[unit][stop])
            start = max(start, pipe.free)
            if instruction.kind == "work":
                if instruction.gm is not None and ready:
                    port = (self.write_free if instruction.stores else self.read_free)[pipe.port]
                    turn = (max(start, port), start, pipe.index)
                    if turn > ready[0]:
                        heapq.heappush(ready, turn)
                        return
                pipe.known[slot] = pipe.position + 1
                self._work(pipe, instruction, start)
            else:
                pipe.known[slot] = pipe.position + 1
                if not self._order(pipe, instruction, start):
                    return
            pipe.position += 1
            if instruction.stops:
                self._go_on(pipe, issued[pipe.position - 1])

    def _wake(self, pipe: Pipe, at: int) -> None:
        heapq.heappush(self.ready, (at, at, pipe.index))

    def _work(self, pipe: Pipe, instruction: Instruction, start: int) -> None:
        if instruction.gm is None:
            end = start + instruction.cycles
            done = end + instruction.latency
        elif instruction.stores:
            end = self._store(pipe, instruction, start)
            done = end + instruction.latency
        else:
            end, latency = self._fetch(pipe, instruction, start)
            done = end + latency
        pipe.free = end
        pipe.done = max(pipe.done, done)
        self.events.append((pipe.index, instruction, start, end))
        if instruction.action is not None:
            self.results.append((pipe.done, instruction))
        if self.check:
            count = pipe.position + 1
            for region in instruction.reads:
                if check_read(region, pipe, instruction.name, count) and (instruction.gm is None or instruction.stores):
                    self.early.append((region, instruction.name, pipe.text))
            for region in instruction.writes:
                check_write(region, pipe, instruction.name, count)

    def _fetch(self, pipe: Pipe, instruction: Instruction, start: int) -> tuple[int, int]:
        """(cycle in which the bytes have passed, latency) of a transfer from GM."""
        source, latency = instruction.gm, instruction.latency
        hit, fetched = self.l2.read(source, instruction.reads[0])
        start = max(start, self.read_free[pipe.port])
        end = start + self.rules.fetch(hit, source.bytes - hit)
        if fetched:
            self.hbm_bytes += fetched
            end = max(end, self._read_hbm(start, fetched))
            latency += self.rules.latency["l2_miss"]
        self.read_free[pipe.port] = end
        return end, latency

    def _store(self, pipe: Pipe, instruction: Instruction, start: int) -> int:
        """Cycle in which the bytes have passed into L2, which writes them back whenever HBM has nothing to read."""
        target = instruction.gm
        back = self.l2.write(target, instruction.writes[0])
        self.hbm_bytes += back
        start = max(start, self.write_free[pipe.port])
        self._idle_hbm(start)
        self.owed += self.rules.hbm(0, back)
        end = self.write_free[pipe.port] = start + instruction.cycles
        return end

    def _read_hbm(self, start: int, size: int) -> int:
        """Cycle in which HBM, which all cores ask in turn, has delivered."""
        self._idle_hbm(start)
        self.hbm_free += self.rules.hbm(size, 0)
        return -(-self.hbm_free // THOUSANDTHS)

    def _idle_hbm(self, until: int) -> None:
        """While nobody reads, HBM takes what L2 has been given."""
        idle = until * THOUSANDTHS - self.hbm_free
        if idle > 0:
            self.owed = max(0, self.owed - idle)
            self.hbm_free += idle

    # -- flags --------------------------------------------------------------------------------------

    def _order(self, pipe: Pipe, instruction: Instruction, start: int) -> bool:
        """Set, wait, or barrier; False when the pipe has to wait."""
        kind = instruction.kind
        if kind == "set":
            self._set(pipe, instruction, max(start, pipe.done))
        elif kind == "wait":
            return self._wait(pipe, instruction, start)
        elif kind == "barrier":
            pipe.free = max(start, pipe.done)
        elif kind == "barrier all":
            return self._barrier(pipe, start)
        elif kind == "cross set":
            self.cross.set(pipe, instruction, max(start, pipe.done))
            for waiting in self.cross.released():
                self._wake(waiting, waiting.free)
        else:
            return self.cross.wait(pipe, instruction, start)
        return True

    def _flag(self, unit: int, flag: tuple) -> Flag:
        found = self.flags[unit].get(flag)
        if found is None:
            found = self.flags[unit][flag] = Flag(self.by_unit[unit][flag[0].partition("_")[2]])
        return found

    def _set(self, pipe: Pipe, instruction: Instruction, at: int) -> None:
        flag = self._flag(pipe.unit, instruction.flag)
        waiter = flag.waiter
        if flag.set_at >= 0 or flag.consumed > pipe.known[waiter.slot]:
            self.set_twice = self.set_twice or self._set_twice(pipe, waiter, instruction)
        if flag.set_at >= 0:
            flag.more = [*(flag.more or ()), (at, pipe.known.copy())]
            return
        flag.set_at, flag.known = at, pipe.known.copy()
        if flag.waiting:
            flag.waiting = False
            self._wake(waiter, at)

    def _set_twice(self, pipe: Pipe, waiter: Pipe, instruction: Instruction) -> FlagError:
        """What to say of a flag that is set where it may still be set. Raises it where the program has no wait between."""
        event, event_id = instruction.flag
        issued = pipe.issued[pipe.position]
        sets = sum(i.kind == "set" and i.flag == instruction.flag for i in pipe.instructions[: pipe.position])
        waits = sum(
            i.kind == "wait" and i.flag == instruction.flag and at < issued for i, at in zip(waiter.instructions, waiter.issued)
        )
        if sets > waits:
            raise FlagError(
                f"{instruction.name} on {pipe.text} sets a flag that is still set: between it and the SetFlag before there is "
                f'no WaitFlag("{event}", {event_id}); add it, leave one SetFlag out, or take another id'
            )
        return FlagError(
            f"{instruction.name} on {pipe.text} sets a flag that may still be set: nothing makes it come after "
            f'{waiter.text} has waited for it; set it back by a flag "{waiter.name}_{pipe.name}", or take another id'
        )

    def _wait(self, pipe: Pipe, instruction: Instruction, start: int) -> bool:
        flag = self._flag(pipe.unit, instruction.flag)
        if flag.set_at < 0:
            flag.waiting = True
            return False
        pipe.free = max(start, flag.set_at)
        pipe.known[:] = map(max, pipe.known, flag.known)
        flag.set_at, flag.consumed = -1, pipe.position + 1
        if flag.more:
            (flag.set_at, flag.known), *flag.more = flag.more
        return True

    def _barrier(self, pipe: Pipe, start: int) -> bool:
        met = self.barriers[pipe.unit]
        met.append(pipe)
        pipe.free = start
        if len(met) < len(self.by_unit[pipe.unit]):
            return False
        at = max(max(p.free, p.done) for p in met)
        known = list(map(max, *(p.known for p in met)))
        self.barriers[pipe.unit] = []
        for each in met:
            each.free, each.known = at, known.copy()
            if each is not pipe:
                each.position += 1
                if each.name == "S":
                    self._go_on(each, each.issued[each.position - 1])
                self._wake(each, at)
        return True

    def _go_on(self, scalar: Pipe, issued: int) -> None:
        """The scalar unit issues again: what follows in program order is late by as much as it waited."""
        self.offsets[scalar.unit].append(max(scalar.free - issued, self.offsets[scalar.unit][-1]))
        self.told[scalar.unit].append(scalar.known.copy())
        for pipe in self.held[scalar.unit]:
            self._wake(pipe, scalar.free)
        self.held[scalar.unit].clear()

    # -- the end ------------------------------------------------------------------------------------

    def _ended(self) -> None:
        if self.check and self.set_twice:
            raise self.set_twice
        waiting = [pipe for pipe in self.pipes if pipe.position < len(pipe.instructions)]
        if waiting:
            lines = [self._why(pipe) for pipe in waiting]
            raise Deadlock("every pipe that is not done waits for a flag:\n  " + "\n  ".join(lines))
        for region, name, pipe in self.early:
            raise ReadBeforeWrite(
                f"{name} on {pipe} reads {region}, where not everything was written before; fill it first, by DataCopy, "
                f"Duplicate, or Mmad with init=True"
            )
        for unit, flags in enumerate(self.flags):
            for (event, event_id), flag in flags.items():
                if flag.set_at >= 0:
                    first = self.by_unit[unit][event.partition("_")[0]].text
                    raise FlagError(
                        f"the flag {event}, {event_id} that {first} has set is still set at the end: add "
                        f'WaitFlag("{event}", {event_id}), or the next kernel starts with it'
                    )
        self.cross.check_end()

    def _why(self, pipe: Pipe) -> str:
        """What a pipe that does not go on waits for, and who would have to do it."""
        instruction = pipe.instructions[pipe.position]
        says = f"{pipe.text} waits in {instruction.name}"
        if instruction.kind == "wait":
            first = self.by_unit[pipe.unit][instruction.flag[0].partition("_")[0]]
            to_come = any(i.kind == "set" and i.flag == instruction.flag for i in first.instructions[first.position :])
            return f"{says}: {first.text} would set it, and waits itself" if to_come else f"{says}: no SetFlag for it is left on {first.text}"
        if instruction.kind == "cross wait":
            return f"{says}: to be set once more by {', '.join(self.cross.lacking(pipe.unit, *instruction.flag))}"
        if instruction.kind == "barrier all":
            return f"{says} for the other pipes"
        return f"{pipe.text} waits to be given {instruction.name}: the scalar unit itself waits"
