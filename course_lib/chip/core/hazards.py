"""Who touched which bytes, and was there a flag between? The check that finds races, whatever the timing happened to be.

Each pipe counts its instructions. A pipe knows how far it may rely on each other pipe: a vector of counts, which travels
with a flag from the pipe that sets it to the one that waits for it (a vector clock, as race detectors for threads keep
them). An access races with an earlier one of another pipe if that one's count is beyond what the accessor knows.
"""

import numpy as np

from course_lib.chip.core.errors import DataRace


class Region:
    """A rectangle of bytes that some instruction uses, with its last writer and, per pipe, its last readers."""

    __slots__ = ("overlaps", "readers", "text", "write_count", "write_name", "writer")

    def __init__(self, text: str) -> None:
        self.text = text
        self.overlaps: list[Region] = []  # itself among them
        self.forget()

    def forget(self) -> None:
        """As before the program: nobody has touched it."""
        self.writer, self.write_count, self.write_name = -1, 0, ""
        self.readers: dict[int, tuple[int, str, bool]] = {}


class Space:
    """All regions of one buffer, or of one tensor in GM; equal ones are one object."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.regions: dict[tuple, Region] = {}
        self._bounds = np.empty((16, 7), np.int64)  # parent, first and last byte, first and last row and column

    def region(self, *place: int | str) -> Region:
        """The region of (parent tensor, first byte, last, first row, last, first column, last, text); ends exclusive.

        Parts of one tensor overlap where their rectangles do; different tensors, where their bytes do.
        """
        *key, text = place
        key = tuple(key)
        found = self.regions.get(key)
        if found is None:
            found = Region(text)
            self._join(found, key)
            self.regions[key] = found
        return found

    def _join(self, region: Region, key: tuple[int, ...]) -> None:
        n = len(self.regions)
        if n == len(self._bounds):
            self._bounds = np.concatenate([self._bounds, np.empty_like(self._bounds)])
        self._bounds[n] = key
        parent, first, last, r0, r1, c0, c1 = key
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


def check_read(region: Region, pipe: int, known: list[int], name: str, count: int, names: list[str]) -> bool:
    """``pipe`` reads ``region``; it may rely on the first ``known[p]`` instructions of pipe p. Raises DataRace.

    True when nobody has written there yet: the caller decides whether that is wrong.
    """
    fresh = True
    for other in region.overlaps:
        writer = other.writer
        if writer >= 0:
            fresh = False
            if writer != pipe and other.write_count > known[writer]:
                raise _too_early(name, names[pipe], region, other.write_name, names[writer])
    region.readers[pipe] = (count, name, fresh)
    return fresh


def check_write(region: Region, pipe: int, known: list[int], name: str, count: int, names: list[str]) -> None:
    """``pipe`` writes ``region``. Raises DataRace when another pipe may still be reading or writing it."""
    for other in region.overlaps:
        writer = other.writer
        if writer != pipe and writer >= 0 and other.write_count > known[writer]:
            raise DataRace(
                f"{name} on {names[pipe]} writes {region.text} while {other.write_name} on {names[writer]} may still be "
                f"writing it; {_cure(names[writer], names[pipe])}"
            )
        for reader, (read_count, read_name, fresh) in other.readers.items():
            if reader != pipe and read_count > known[reader]:
                if fresh:
                    raise _too_early(read_name, names[reader], other, name, names[pipe])
                raise DataRace(
                    f"{name} on {names[pipe]} overwrites {region.text} while {read_name} on {names[reader]} may still "
                    f"be reading it; {_cure(names[reader], names[pipe])}, or use a second buffer"
                )
    region.readers.clear()
    region.writer, region.write_count, region.write_name = pipe, count, name


def _too_early(name: str, pipe: str, region: Region, write_name: str, writer: str) -> DataRace:
    return DataRace(
        f"{name} on {pipe} reads {region.text} while {write_name} on {writer} may still be writing it; "
        f"{_cure(writer, pipe)}"
    )


def _cure(first: str, then: str) -> str:
    """What to add between two pipes; names are "MTE2", or "AIV3 MTE2" where a program has several cores."""
    *one, first_pipe = first.split()
    *two, then_pipe = then.split()
    if one != two:
        return f"add CrossCoreSetFlag on {first} after it and CrossCoreWaitFlag on {then} before"
    return f'add SetFlag("{first_pipe}_{then_pipe}", id) after it and WaitFlag("{first_pipe}_{then_pipe}", id) before'
