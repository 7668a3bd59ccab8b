"""Where numbers lie: global memory (GM) and the core's buffers L1, L0A, L0B, L0C, UB and BT.

A buffer is real bytes, handed out from its start, and can be opened at any time. What the cube reads is not stored row
by row but in fractals, blocks of 16 rows × 32 bytes that one cycle consumes whole:

    GM, UB   ND   rows one after another
    L1, L0C  zN   fractals column of fractals by column of fractals          [cols/C0][rows][C0]
    L0A      zZ   fractals row of fractals by row of fractals                [rows/16][cols/C0][16][C0]
    L0B      nZ   as zZ, each fractal transposed: a (k, n) matrix lies as    [k/C0][n/16][16 n][C0 k]

C0 is 32 bytes' worth of elements: 16 of float16, 8 of float32, 32 of int8; in L0C it is 16.
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from course_lib.chip.core.errors import BufferOverflow, Misaligned, WrongOperand
from course_lib.chip.core.hazards import Region, Space
from course_lib.chip.core.numbers import STORED, decode, encode
from course_lib.chip.figures import DTYPES
from course_lib.chip.spec import ChipSpec

BLOCK = 32  # bytes: UB's and L1's unit of address
ROWS = 16  # of a fractal
LINE_BYTES = 512  # of the L2
LAYOUTS = {"UB": "ND", "L1": "zN", "L0A": "zZ", "L0B": "nZ", "L0C": "zN", "BT": "ND"}


@dataclass(frozen=True)
class _Memory:
    """Global memory by name, for messages about instructions that do not reach it."""

    name: str = "GM"


class GlobalTensor:
    """A matrix (rows, cols) or vector (n) in global memory, or a rectangle of one. Slicing gives the rectangle.

    ``values``: what `tensor` made it of, stored as ``dtype``; None in programs that are only timed.
    """

    buffer = _Memory()

    def __init__(self, shape: tuple[int, ...], dtype: str, stored: np.ndarray | None = None, name: str = "") -> None:
        if len(shape) not in (1, 2) or min(shape) < 1:
            which = f"{name}: " if name else ""
            raise WrongOperand(f"{which}a tensor in GM is a vector or a matrix and not empty; found the shape {shape}")
        self.shape, self.dtype, self.stored, self.name = tuple(shape), dtype, stored, name
        self.whole, self.origin = self, (0, 0)
        self.bytes = prod(self.shape) * DTYPES[dtype]
        self.space = Space()
        self.written = False  # by the program, at any time

    def __getitem__(self, index: object) -> "GlobalTensor":
        starts, shape = _ranges(index, self.shape)
        part = object.__new__(GlobalTensor)
        part.shape, part.dtype, part.name, part.whole = shape, self.dtype, self.name, self.whole
        row, col = (starts[0], starts[1]) if len(starts) == 2 else (0, starts[0])
        part.origin = (self.origin[0] + row, self.origin[1] + col)
        part.bytes = prod(shape) * DTYPES[self.dtype]
        part.stored = None if self.stored is None else self.stored[tuple(slice(s, s + n) for s, n in zip(starts, shape))]
        return part

    @property
    def T(self) -> None:
        raise WrongOperand("GM has no transposed view: LoadData(…, transpose=True) transposes on the way to L0")

    def numpy(self) -> np.ndarray:
        """The values as float32, or int32 for integers. Raises WrongOperand where there are none."""
        if self.stored is None:
            raise WrongOperand("this program was only timed (numerics=False), so its tensors hold no values")
        return decode(self.stored, self.dtype)

    def rectangle(self) -> tuple[int, int, int, int]:
        """First and last + 1 row and column within the whole tensor; a vector is one row."""
        rows, cols = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        row, col = self.origin
        return row, row + rows, col, col + cols

    def region(self) -> Region:
        return self.whole.space.region(self, 0, 0, 0, *self.rectangle())

    def __str__(self) -> str:
        r0, r1, c0, c1 = self.rectangle()
        return f"{self.name or 'GM'}[{f'{r0}:{r1}, ' if len(self.whole.shape) == 2 else ''}{c0}:{c1}]"


def tensor(values: np.ndarray, dtype: str | None = None, name: str = "") -> GlobalTensor:
    """``values``, a vector or a matrix, in global memory, rounded to ``dtype`` (that of ``values`` if not given)."""
    values = np.asarray(values)
    dtype = dtype or values.dtype.name
    if dtype not in STORED:
        which = f"{name}: " if name else ""
        raise WrongOperand(
            f"{which}no values of dtype {dtype!r} in GM; convert, as in values.astype(np.float32), to one of "
            f"{', '.join(STORED)}, or time without values"
        )
    return GlobalTensor(values.shape, dtype, np.ascontiguousarray(encode(values, dtype)), name)


def empty(*shape: int, dtype: str = "float16", name: str = "") -> GlobalTensor:
    """A tensor in global memory that has a shape and no values, for programs that are only timed."""
    if dtype not in DTYPES:
        raise WrongOperand(f"no dtype named {dtype!r}; use one of {', '.join(DTYPES)}")
    return GlobalTensor(shape, dtype, None, name)


class Buffer:
    """One of a core's buffers: ``capacity`` bytes, handed out in order by `allocate`."""

    def __init__(self, name: str, capacity: int, numerics: bool) -> None:
        self.name, self.capacity, self.used = name, capacity, 0
        self.memory = np.zeros(capacity, np.uint8) if numerics else None
        self.space = Space()
        self.tensors = 0

    def allocate(self, shape: tuple[int, ...], dtype: str, address: int | None) -> "LocalTensor":
        start = self.used if address is None else address
        made = LocalTensor(self, start, shape, dtype, self.tensors)
        if start < 0 or start % made.alignment:
            raise Misaligned(f"{self.name}: address {start} is no multiple of {made.alignment} B from 0 on; round it up")
        if start + made.bytes > self.capacity:
            raise BufferOverflow(
                f"{self.name} holds {self.capacity} B: {start} are taken, and {dtype} {_by(made.shape)} needs "
                f"{made.bytes}, {start + made.bytes - self.capacity} too many; use a smaller tile or fewer buffers"
            )
        self.used, self.tensors = max(self.used, start + made.bytes), self.tensors + 1
        return made


class LocalTensor:
    """A vector (n) or matrix (rows, cols) in a buffer, rounded up to whole fractals outside UB.

    Slices are views of the same bytes: rows in UB, whole fractals in L1.
    """

    def __init__(self, buffer: Buffer, start: int, shape: tuple[int, ...], dtype: str, parent: int) -> None:
        if dtype not in DTYPES:
            raise WrongOperand(f"no dtype named {dtype!r}; use one of {', '.join(STORED)}")
        self.buffer, self.start, self.dtype, self.parent = buffer, start, dtype, parent
        if dtype not in STORED and (buffer.memory is not None or dtype == "float4_e2m1fn_x2"):
            raise WrongOperand(f"no values of dtype {dtype!r} in {buffer.name}; use one of {', '.join(STORED)}")
        self.size, self.layout = DTYPES[dtype], LAYOUTS[buffer.name]
        self.c0 = 16 if buffer.name == "L0C" else BLOCK // self.size
        self.alignment = BLOCK if self.layout == "ND" else ROWS * self.c0 * self.size
        self.shape = self._rounded(tuple(shape))
        self.bytes = prod(self.shape) * self.size
        self.rect = (0, self.shape[0], 0, self.shape[1]) if len(self.shape) == 2 else (0, 1, 0, self.shape[0])
        self.whole = self.rect[1], self.rect[3]  # rows and columns of the tensor that it is a part of
        self.blocks = self._blocks() if buffer.memory is not None and 0 <= start <= buffer.capacity - self.bytes else None
        self.region = self._region() if start + self.bytes <= buffer.capacity else None
        self._parts: dict[tuple, LocalTensor] = {}

    def _rounded(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) not in (1, 2) or min(shape) < 1:
            raise WrongOperand(f"{self.buffer.name}: a tensor is a vector or a matrix and not empty; found {shape}")
        if self.layout == "ND":
            if shape[-1] * self.size % BLOCK:
                unit = BLOCK // self.size
                raise Misaligned(
                    f"{self.buffer.name}: {shape[-1]} elements of {self.dtype} are no multiple of {BLOCK} B; round up to "
                    f"{-(-shape[-1] // unit) * unit}"
                )
            return shape
        if len(shape) == 1:
            raise WrongOperand(f"{self.buffer.name} holds matrices in fractals; give (rows, cols), not {shape}")
        rows, cols = (self.c0, ROWS) if self.layout == "nZ" else (ROWS, self.c0)
        return -(-shape[0] // rows) * rows, -(-shape[1] // cols) * cols

    def _blocks(self) -> np.ndarray:
        """The bytes in the order in which they lie, with one axis per level of the layout."""
        flat = self.buffer.memory[self.start : self.start + self.bytes].view(STORED[self.dtype])
        if self.layout == "ND":
            return flat.reshape(self.shape)
        rows, cols = self.shape
        if self.layout == "zN":
            return flat.reshape(cols // self.c0, rows, self.c0)
        if self.layout == "zZ":
            return flat.reshape(rows // ROWS, cols // self.c0, ROWS, self.c0)
        return flat.reshape(rows // self.c0, cols // ROWS, ROWS, self.c0)

    def _region(self) -> Region:
        """Its first and last byte, those between rows or columns of fractals included, and its rectangle."""
        r0, r1, c0, c1 = self.rect
        rows, cols = self.whole
        if self.layout == "zN":
            first, last = c0 * rows + r0 * self.c0, (c1 - self.c0) * rows + r1 * self.c0
        elif self.layout == "ND":
            first, last = r0 * cols + c0, (r1 - 1) * cols + c1
        else:
            first, last = 0, rows * cols
        return self.buffer.space.region(self, self.parent, self.start + first * self.size, self.start + last * self.size, *self.rect)

    def matrix(self) -> np.ndarray:
        """The stored values row by row, whatever the layout (a view where NumPy can make one)."""
        if self.layout == "ND":
            return self.blocks
        order = {"zN": (1, 0, 2), "zZ": (0, 2, 1, 3), "nZ": (0, 3, 1, 2)}[self.layout]
        return self.blocks.transpose(order).reshape(self.shape)

    def put(self, matrix: np.ndarray) -> None:
        """Store values given row by row."""
        if self.layout == "ND":
            self.blocks[...] = matrix
            return
        rows, cols = self.shape
        if self.layout == "zN":
            self.blocks[...] = matrix.reshape(rows, cols // self.c0, self.c0).transpose(1, 0, 2)
        elif self.layout == "zZ":
            parts = matrix.reshape(rows // ROWS, ROWS, cols // self.c0, self.c0)
            self.blocks[...] = parts.transpose(0, 2, 1, 3)
        else:
            parts = matrix.reshape(rows // self.c0, self.c0, cols // ROWS, ROWS)
            self.blocks[...] = parts.transpose(0, 2, 3, 1)

    def numpy(self) -> np.ndarray:
        """The values row by row as float32, or int32 for integers."""
        if self.blocks is None:
            raise WrongOperand("this program is only timed (numerics=False), so its buffers hold no values")
        return decode(self.matrix(), self.dtype)

    def as_shape(self, *shape: int) -> "LocalTensor":
        """The same place as a matrix or vector of another shape, laid out anew from the first byte; for edge tiles."""
        if shape == self.shape:
            return self
        if self.rect != (0, self.whole[0], 0, self.whole[1]):
            raise WrongOperand(f"{self} is a slice; take as_shape of the whole tensor")
        part = self._parts.get(("as", *shape))
        if part is None:
            part = LocalTensor(self.buffer, self.start, shape, self.dtype, self.buffer.tensors)
            if part.bytes > self.bytes:
                raise BufferOverflow(f"{self} has {self.bytes} B, and {self.dtype} {_by(part.shape)} needs {part.bytes}")
            self.buffer.tensors += 1
            self._parts["as", *shape] = part
        return part

    def __getitem__(self, index: object) -> "LocalTensor":
        starts, shape = _ranges(index, self.shape)
        key = (*starts, *shape)
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = self._part(starts, shape)
        return part

    def _part(self, starts: tuple[int, ...], shape: tuple[int, ...]) -> "LocalTensor":
        if self.layout not in ("ND", "zN"):
            raise WrongOperand(f"{self.buffer.name} is read whole; slice in L1, before LoadData")
        part = object.__new__(LocalTensor)
        part.__dict__.update(self.__dict__)
        part.shape, part._parts = shape, {}
        part.bytes = prod(shape) * self.size
        if len(shape) == 1:
            starts, shape = (0, *starts), (1, *shape)
        part.rect = (self.rect[0] + starts[0], self.rect[0] + starts[0] + shape[0],
                     self.rect[2] + starts[1], self.rect[2] + starts[1] + shape[1])  # fmt: skip
        part.region = part._region()
        if self.layout == "zN":
            for start, n, unit in zip(starts, shape, (ROWS, self.c0)):
                if start % unit or n % unit:
                    raise Misaligned(f"{self.buffer.name}: {start}:{start + n} is not made of whole fractals of {unit}")
        else:
            self._check_rows(starts, shape)
        if self.blocks is not None:
            part.blocks = self._slice(starts, shape, part.shape)
        return part

    def _check_rows(self, starts: tuple[int, ...], shape: tuple[int, ...]) -> None:
        first, count = starts[1] * self.size, shape[1] * self.size
        if first % BLOCK or count % BLOCK:
            raise Misaligned(f"{self.buffer.name}: bytes {first}:{first + count} of a row are not whole {BLOCK} B blocks")

    def _slice(self, starts: tuple[int, ...], shape: tuple[int, ...], asked: tuple[int, ...]) -> np.ndarray:
        (row, col), (rows, cols) = starts, shape
        if self.layout == "ND":
            return self.blocks[col : col + cols] if len(asked) == 1 else self.blocks[row : row + rows, col : col + cols]
        return self.blocks[col // self.c0 : (col + cols) // self.c0, row : row + rows]

    def __str__(self) -> str:
        r0, r1, c0, c1 = self.rect
        where = f"{c0}:{c1}" if len(self.shape) == 1 else f"{r0}:{r1}, {c0}:{c1}"
        return f"{self.buffer.name}@{self.start}[{where}]"


def buffers(spec: ChipSpec, names: tuple[str, ...], numerics: bool) -> dict[str, Buffer]:
    """The buffers of one core of ``spec``, empty. Raises UnknownFigure where the chip's file lacks a size."""
    return {name: Buffer(name, spec.require(f"buffers.{name.lower()}"), numerics) for name in names}


def _ranges(index: object, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts and lengths of a slice per axis. Raises WrongOperand for anything but slices of step 1 inside the shape."""
    parts = index if type(index) is tuple else (index,)
    if len(parts) > len(shape):
        raise WrongOperand(f"{len(parts)} slices for a tensor of shape {shape}")
    starts, lengths = [], []
    for axis, n in enumerate(shape):
        part = parts[axis] if axis < len(parts) else slice(None)
        if type(part) is not slice or part.step not in (None, 1):
            raise WrongOperand(f"slices are start:stop; found {part!r}")
        start, stop = part.start or 0, n if part.stop is None else min(part.stop, n)
        if not 0 <= start < stop:
            raise WrongOperand(f"the slice {part.start}:{part.stop} lies outside the {n} elements of this axis")
        starts.append(start)
        lengths.append(stop - start)
    return tuple(starts), tuple(lengths)


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
