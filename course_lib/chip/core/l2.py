"""The L2 cache that all cores share: what of a transfer from global memory (GM) is in it, and what has to come from HBM.

It keeps pieces of 16 rows of one 512-byte line (of a vector: 8 KiB), and throws out the piece that was used longest
ago. Inside a piece it knows which sectors are there: 128 bytes of a row each, so that a tile 128 bytes wide does not
bring its neighbours along.
"""

from collections import OrderedDict

from course_lib.chip.core.buffers import LINE_BYTES, GlobalTensor
from course_lib.chip.core.hazards import Region
from course_lib.chip.figures import DTYPES

ROWS, SECTOR = 16, 128  # of a piece: rows, and bytes of a sector
SECTORS = LINE_BYTES // SECTOR
Piece = tuple[int, int]  # number, mask of sectors: bit 4·row + sector


class L2:
    """``capacity`` bytes, empty. ``hits`` and ``bytes`` add up what `read` was asked for; both in bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used, self.hits, self.bytes = capacity, 0, 0, 0
        self.there: OrderedDict[int, int] = OrderedDict()  # piece → mask; the one used longest ago first
        self.dirty: dict[int, int] = {}  # piece → mask of sectors that were written
        self.numbers: dict[tuple, int] = {}
        self.sizes: list[int] = []
        self.known: dict[Region, tuple[list[Piece], int, int]] = {}  # region → its pieces, sectors, bytes of a sector

    def read(self, source: GlobalTensor, region: Region) -> tuple[int, int]:
        """(bytes of ``source`` that were there, bytes that HBM has to deliver); afterwards all is there."""
        pieces, sectors, sector = self.known.get(region) or self._pieces(source, region)
        there, missed = self.there, 0
        for piece, mask in pieces:
            old = there.get(piece)
            if old is None:
                missed += mask.bit_count()
                self._keep(piece, mask)
            else:
                there.move_to_end(piece)
                if old & mask != mask:
                    missed += (mask & ~old).bit_count()
                    there[piece] = old | mask
        hit = source.bytes - source.bytes * missed // sectors
        self.hits, self.bytes = self.hits + hit, self.bytes + source.bytes
        return hit, missed * sector

    def write(self, target: GlobalTensor, region: Region) -> int:
        """``target`` stays until it is thrown out. Bytes to write back, without what waits for that already."""
        there, dirty, more = self.there, self.dirty, 0
        pieces, _, sector = self.known.get(region) or self._pieces(target, region)
        for piece, mask in pieces:
            before = dirty.get(piece, 0)
            more += (mask & ~before).bit_count()
            dirty[piece] = before | mask
            old = there.get(piece)
            if old is None:
                self._keep(piece, mask)
            else:
                there.move_to_end(piece)
                there[piece] = old | mask
        return more * sector

    def _keep(self, piece: int, mask: int) -> None:
        self.there[piece] = mask
        self.used += self.sizes[piece]
        while self.used > self.capacity:
            oldest, _ = self.there.popitem(last=False)
            self.used -= self.sizes[oldest]
            self.dirty.pop(oldest, None)

    def _pieces(self, tensor: GlobalTensor, region: Region) -> tuple[list[Piece], int, int]:
        """The pieces that ``tensor``, a rectangle of a matrix or a part of a vector, touches."""
        r0, r1, c0, c1 = tensor.rectangle()
        size = DTYPES[tensor.dtype]
        row_bytes = tensor.whole.shape[-1] * size
        first, last = c0 * size // SECTOR, -(-c1 * size // SECTOR)
        width = SECTORS if len(tensor.whole.shape) == 2 else SECTORS * ROWS  # a vector lies as if it were one long line
        columns = [(line, _bits(first, last, line * width, width)) for line in range(first // width, -(-last // width))]
        masks = {}
        for band in range(r0 // ROWS, -(-r1 // ROWS)):
            rows = _bits(r0, r1, band * ROWS, ROWS)
            pattern = sum(1 << SECTORS * row for row in range(ROWS) if rows >> row & 1)
            masks |= {(id(tensor.whole), band, line): sectors * pattern for line, sectors in columns}
        piece_bytes = ROWS * min(LINE_BYTES, row_bytes)
        pieces = [(self._number(key, piece_bytes), mask) for key, mask in masks.items()]
        found = pieces, sum(mask.bit_count() for mask in masks.values()), min(SECTOR, row_bytes)
        self.known[region] = found
        return found

    def _number(self, key: tuple, size: int) -> int:
        number = self.numbers.setdefault(key, len(self.sizes))
        if number == len(self.sizes):
            self.sizes.append(size)
        return number


def _bits(first: int, last: int, start: int, width: int) -> int:
    """The mask of those of the ``width`` places after ``start`` that lie in first … last − 1."""
    low, high = max(first - start, 0), min(last - start, width)
    return (1 << high) - (1 << low)
