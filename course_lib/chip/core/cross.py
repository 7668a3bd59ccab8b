"""Flags between cores: a wait goes on when every core of its group has set the flag once more.

A core counts the sets of each of its flags up to 15. Whether a 16th can come before the first wait is decided by what
the setting pipe knows of the waiting one (see `hazards`), not by how the run happened to go.
"""

from course_lib.chip.core.errors import FlagError
from course_lib.chip.core.hazards import Pipe
from course_lib.chip.core.program import AIC, Instruction, Recorder

MOST_SETS = 15  # of a cross-core flag ahead of its waits
Key = tuple[int, int]  # waiting core, flag id


class CrossFlags:
    """All cross-core flags of one run. ``used``: does any program set one?"""

    def __init__(self, cores: list[Recorder], names: list[str]) -> None:
        self.cores, self.names = cores, names
        self.setters: dict[Key, set[int]] = {}  # the cores that all have to set it
        self.sets: dict[tuple[int, int, int], list[tuple[int, list[int]]]] = {}  # core, id, setter → (cycle, known)
        self.waits: dict[Key, list[tuple[Pipe, int]]] = {}
        self.sure: dict[tuple[int, int, int], int] = {}  # waits that a setter knows of
        self.parked: list[Pipe] = []
        self.groups: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        self.used = False
        for unit, core in enumerate(cores):
            flags = {(i.flag, i.name) for queue in core.queues.values() for i in queue.instructions if i.kind == "cross set"}
            for (mode, flag_id), name in flags:
                self._declare(unit, mode, flag_id, name)

    def _declare(self, unit: int, mode: int, flag_id: int, name: str) -> None:
        setting, waiting = self._group(unit, mode)
        if not waiting:
            raise FlagError(f"{name} on {self.names[unit]} reaches no core of the other kind; launch with unit MIX")
        self.used = True
        for target in waiting:
            self.setters.setdefault((target, flag_id), set()).update(setting)

    def _group(self, unit: int, mode: int) -> tuple[list[int], list[int]]:
        """(cores that set such a flag together, cores that it is set for)."""
        found = self.groups.get((unit, mode))
        if found is None:
            me = self.cores[unit]
            family = [i for i, core in enumerate(self.cores) if mode == 0 or core in me.siblings]
            same = [i for i in family if self.cores[i].unit == me.unit]
            other = [i for i in family if (self.cores[i].unit == AIC) != (me.unit == AIC)]
            found = self.groups[unit, mode] = same, other if mode == 2 else same
        return found

    def set(self, pipe: Pipe, instruction: Instruction, at: int) -> None:
        """One more set, from cycle ``at`` on. Raises FlagError when it may be the 16th without a wait."""
        mode, flag_id = instruction.flag
        for target in self._group(pipe.unit, mode)[1]:
            key = (target, flag_id, pipe.unit)
            sets = self.sets.setdefault(key, [])
            sets.append((at, list(pipe.known)))
            if len(sets) - self._surely_waited(key, pipe) > MOST_SETS:
                raise FlagError(
                    f"{instruction.name} on {pipe.text} may set the flag for the {MOST_SETS + 1}th time without a "
                    f"CrossCoreWaitFlag({flag_id}) on {self.names[target]}; a core can count to {MOST_SETS}. Let it wait "
                    f"for a flag from there before it goes on"
                )

    def _surely_waited(self, key: tuple[int, int, int], pipe: Pipe) -> int:
        waits, n = self.waits.get(key[:2], ()), self.sure.get(key, 0)
        while n < len(waits) and waits[n][1] <= pipe.known[waits[n][0].slot]:
            n += 1
        self.sure[key] = n
        return n

    def wait(self, pipe: Pipe, instruction: Instruction, start: int) -> bool:
        """Goes on, or parks the pipe and returns False."""
        key = (pipe.unit, instruction.flag[0])
        if self.lacking(*key):
            self.parked.append(pipe)
            return False
        waits = self.waits.setdefault(key, [])
        sets = [self.sets[*key, setter][len(waits)] for setter in sorted(self.setters[key])]
        pipe.free = max(start, *(at for at, _ in sets))
        for _, known in sets:
            pipe.known[:] = map(max, pipe.known, known)
        waits.append((pipe, pipe.position + 1))
        return True

    def lacking(self, unit: int, flag_id: int) -> list[str]:
        """The cores that have to set the flag once more before ``unit`` can go on."""
        done = len(self.waits.get((unit, flag_id), ()))
        setters = self.setters.get((unit, flag_id))
        if not setters:
            return ["some core, and none does"]
        return [self.names[s] for s in sorted(setters) if len(self.sets.get((unit, flag_id, s), ())) <= done]

    def released(self) -> list[Pipe]:
        """Pipes whose flag may be there now; they look again."""
        ready, self.parked = self.parked, []
        return ready

    def check_end(self) -> None:
        """Raises FlagError where a flag was set more often than waited for: the next kernel would start with it."""
        for (unit, flag_id, setter), sets in self.sets.items():
            waits = len(self.waits.get((unit, flag_id), ()))
            if len(sets) > waits:
                raise FlagError(
                    f"the cross-core flag {flag_id} is still set at the end: {self.names[setter]} has set it {len(sets)} "
                    f"times, {self.names[unit]} has waited for it {waits} times; add CrossCoreWaitFlag({flag_id}) there"
                )
