"""Who touched which bytes, and was there a flag between? The check that finds races, whatever the timing happened to be.

Each pipe counts its instructions. A pipe knows how far it may rely on each other pipe: a vector of counts, which travels
with a flag from the pipe that sets it to the one that waits for it (a vector clock, as race detectors for threads keep
them). An access races with an earlier one of another pipe if that one's count is beyond what the accessor knows. Pipes
of cores between which no flag can pass, being of different domains, know nothing of each other.
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from course_lib.chip.core.errors import DataRace

if TYPE_CHECKING:
    from course_lib.chip.core.program import Instruction


@dataclass(slots=True, eq=False)
class Pipe:
    """One queue on its way. ``known[slot of p]``: how many instructions of pipe p are done for sure when this goes on."""

    index: int
    unit: int
    name: str
    text: str  # with its core, where there are several
    port: int
    domain: int
    slot: int
    instructions: "list[Instruction]"
    issued: list[int]
    known: list[int]
    family: "dict[str, Pipe]"  # the pipes of its core
    position: int = 0
    stops: int = 0  # of the scalar unit that lie before
    free: int = 0  # cycle in which the next instruction can start
    done: int = 0  # cycle in which all so far are done


class Region:
    """A rectangle of bytes that some instruction uses, with its last writer and, per pipe, its last readers."""

    __slots__ = ("covered", "key", "overlaps", "owner", "readers", "write_count", "write_name", "writer")

    def __init__(self, owner: object, key: tuple[int, ...]) -> None:
        self.owner, self.key = owner, key
        self.overlaps: list[Region] = []  # itself among them
        self.covered = False  # every byte has been written
        self.writer: Pipe | None = None
        self.write_count, self.write_name = 0, ""
        self.readers: dict[Pipe, tuple[int, str, bool]] = {}

    def __str__(self) -> str:
        return str(self.owner)

    def is_covered(self) -> bool:
        """Has every byte been written? What another tensor at the same address has written counts as all of it."""
        parent, _, _, r0, r1, c0, c1 = self.key
        written = [other.key for other in self.overlaps if other.writer is not None]
        if not written:
            return False
        self.covered = any(key[0] != parent for key in written) or _cover(written, (r0, r1, c0, c1))
        return self.covered


class Space:
    """All regions of one buffer, or of one tensor in GM; equal ones are one object."""

    def __init__(self) -> None:
        self.regions: dict[tuple, Region] = {}
        self._bounds = np.empty((16, 7), np.int64)  # parent, first and last byte, first and last row and column

    def region(self, owner: object, *key: int) -> Region:
        """The region of (parent tensor, first byte, last, first row, last, first column, last); ends exclusive.

        Parts of one tensor overlap where their rectangles do; different tensors, where their bytes do. ``owner``: what
        messages name it by.
        """
        found = self.regions.get(key)
        if found is None:
            found = Region(owner, key)
            self._join(found)
            self.regions[key] = found
        return found

    def _join(self, region: Region) -> None:
        n = len(self.regions)
        if n == len(self._bounds):
            self._bounds = np.concatenate([self._bounds, np.empty_like(self._bounds)])
        self._bounds[n] = region.key
        parent, first, last, r0, r1, c0, c1 = region.key
        b = self._bounds[: n + 1].T
        same = (b[0] == parent) & (b[3] < r1) & (r0 < b[4]) & (b[5] < c1) & (c0 < b[6])
        other = (b[0] != parent) & (b[1] < last) & (first < b[2])
        others = list(self.regions.values())
        for i in np.flatnonzero(same | other):
            if i == n:
                region.overlaps.append(region)
            else:
                region.overlaps.append(others[i])
                others[i].overlaps.append(region)


def check_read(region: Region, pipe: Pipe, name: str, count: int) -> bool:
    """``pipe`` reads ``region`` in its instruction number ``count``. Raises DataRace.

    True when some of it has not been written yet: the caller decides whether that is wrong.
    """
    known, domain = pipe.known, pipe.domain
    for other in region.overlaps:
        writer = other.writer
        if writer is None or writer is pipe:
            continue
        if writer.domain != domain or other.write_count > known[writer.slot]:
            write, read = (writer, other.write_count, other.write_name), (pipe, count, name)
            raise _overwritten(region, read, write) if _comes_first(read, write) else _too_early(region, write, read)
    fresh = not (region.covered or region.is_covered())
    region.readers[pipe] = (count, name, fresh)
    return fresh


def check_write(region: Region, pipe: Pipe, name: str, count: int) -> None:
    """``pipe`` writes ``region``. Raises DataRace when another pipe may still be reading or writing it."""
    known, domain, write = pipe.known, pipe.domain, (pipe, count, name)
    for other in region.overlaps:
        writer = other.writer
        if writer is not None and writer is not pipe and (writer.domain != domain or other.write_count > known[writer.slot]):
            raise _overwritten(region, (writer, other.write_count, other.write_name), write)
        for reader, (read_count, read_name, fresh) in other.readers.items():
            if reader is pipe or (reader.domain == domain and read_count <= known[reader.slot]):
                continue
            read = reader, read_count, read_name
            first = _comes_first(write, read) if reader.unit == pipe.unit else fresh
            raise _too_early(other, write, read) if first else _overwritten(region, read, write)
    region.readers.clear()
    region.writer, region.write_count, region.write_name, region.covered = pipe, count, name, True


Access = tuple[Pipe, int, str]  # pipe, number of the instruction on it, name


def _comes_first(one: Access, other: Access) -> bool:
    """In the order of the program, which is what the author has in mind; between cores there is none."""
    return one[0].unit == other[0].unit and one[0].issued[one[1] - 1] < other[0].issued[other[1] - 1]


def _last_before(access: Access, *uses: str) -> Access | None:
    """The last instruction of another pipe, in program order, that ``uses`` ("reads", "writes") what ``access`` uses.

    The one whose flag is missing: it may be yet to come, while an older one was found. None where it is known to be done.
    """
    pipe, count, _ = access
    own, issued, found = _instruction(access), pipe.issued[count - 1], None
    same = {other for region in (own.reads if "reads" not in uses else own.writes) for other in region.overlaps}
    for other in pipe.family.values():
        for position in range(bisect_left(other.issued, issued) - 1, -1, -1):
            instruction = other.instructions[position]
            if not same.isdisjoint(region for use in uses for region in getattr(instruction, use)):
                if found is None or other.issued[position] > found[0].issued[found[1] - 1]:
                    found = other, position + 1, instruction.name
                break
    return None if found is None or found[0] is pipe or found[1] <= pipe.known[found[0].slot] else found


def _too_early(region: Region, write: Access, read: Access) -> DataRace:
    if write[0].unit == read[0].unit:
        write = _last_before(read, "writes") or write
    return DataRace(
        f"{read[2]} on {read[0].text} reads {region} while {write[2]} on {write[0].text} may still be writing it; "
        f"{_cure(write[0], read[0])}"
    )


def _overwritten(region: Region, use: Access, write: Access) -> DataRace:
    """``write`` comes while another pipe may still be using what it writes."""
    if _comes_first(write, use):
        use, write = write, use
    if use[0].unit == write[0].unit:
        use = _last_before(write, "reads", "writes") or use
    start = f"{write[2]} on {write[0].text}"
    if any(other in region.overlaps for other in _instruction(use).reads):
        return DataRace(
            f"{start} overwrites {region} while {use[2]} on {use[0].text} may still be reading it; "
            f"{_cure(use[0], write[0])}, or use a second buffer"
        )
    return DataRace(
        f"{start} writes {region} while {use[2]} on {use[0].text} may still be writing it; {_cure(use[0], write[0])}"
    )


def _instruction(access: Access) -> "Instruction":
    return access[0].instructions[access[1] - 1]


def _cure(first: Pipe, then: Pipe) -> str:
    """What to add between two pipes."""
    if first.unit != then.unit:
        return f"add CrossCoreSetFlag on {first.text} after it and CrossCoreWaitFlag on {then.text} before"
    event = f'"{first.name}_{then.name}", id'
    return f"add SetFlag({event}) after it and WaitFlag({event}) before"


def _cover(parts: list[tuple[int, ...]], whole: tuple[int, int, int, int]) -> bool:
    """Do the rectangles of ``parts`` (keys of regions) together cover ``whole``?"""
    r0, r1, c0, c1 = whole
    boxes = [(max(key[3], r0), min(key[4], r1), max(key[5], c0), min(key[6], c1)) for key in parts]
    rows = sorted({r0, r1, *(edge for box in boxes for edge in box[:2])})
    cols = sorted({c0, c1, *(edge for box in boxes for edge in box[2:])})
    seen = np.zeros((len(rows) - 1, len(cols) - 1), bool)
    for top, bottom, left, right in boxes:
        seen[rows.index(top) : rows.index(bottom), cols.index(left) : cols.index(right)] = True
    return bool(seen.all())
