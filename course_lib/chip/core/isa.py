"""The instructions of an AI core that move data and multiply matrices, named as in Ascend C; `vector.py` has the rest.

    GM → L1, UB      DataCopy   MTE2    into L1 on the way from rows (ND) to fractals (NZ)
    L1 → L0A, L0B    LoadData   MTE1    transposing if asked
    L1 → BT          DataCopy   MTE1    a bias
    cube             Mmad       M       L0C = (L0C +) L0A @ L0B, accumulated in float32 or int32
    L0C → GM, L1     Fixpipe    FIX     from fractals to rows, converted and clipped on the way
    UB → GM          DataCopy   MTE3

Every instruction takes the destination first, checks shapes, dtypes and path when it is recorded, does its arithmetic
for real, and takes the cycles that `rules.py` gives.
"""

from functools import partial

import numpy as np

from course_lib.chip.core.buffers import ROWS, GlobalTensor, LocalTensor
from course_lib.chip.core.errors import IllegalPath, WrongOperand
from course_lib.chip.core.hazards import Region
from course_lib.chip.core.numbers import STORED, decode, encode
from course_lib.chip.core.program import Instruction
from course_lib.chip.core.vector import VectorUnit

ACCUMULATES = {"int8": "int32"}  # everything else in float32


class Core(VectorUnit):
    """One AIC or AIV (or, on chips before A2, one fused core) that a kernel gives instructions to."""

    def DataCopy(self, dst: LocalTensor | GlobalTensor, src: LocalTensor | GlobalTensor) -> None:
        """Copy between GM and L1 or UB, or from L1 to BT. What the source lacks of a larger L1 or UB tile becomes 0."""
        if isinstance(src, GlobalTensor) and isinstance(dst, LocalTensor):
            self._fetch(dst, src)
        elif isinstance(dst, GlobalTensor) and isinstance(src, LocalTensor):
            self._store("DataCopy", dst, src)
        elif isinstance(dst, LocalTensor) and isinstance(src, LocalTensor):
            pipe = self.rules.path(src.buffer.name, dst.buffer.name)
            if src.buffer.name == "L0C":
                raise IllegalPath("L0C is emptied by Fixpipe, not by DataCopy")
            self._issue(pipe, ("DataCopy", dst, src), lambda: self._move("DataCopy", dst, src))
        else:
            found = " to ".join("GM" if isinstance(t, GlobalTensor) else type(t).__name__ for t in (src, dst))
            raise IllegalPath(f"DataCopy needs a tensor in one of the core's buffers on one side, and GM→GM goes through UB; found {found}")

    def LoadData(self, dst: LocalTensor, src: LocalTensor, transpose: bool = False) -> None:
        """A tile from L1 to L0A or L0B, fractals rearranged; ``transpose``: ``src`` is (cols, rows) of ``dst``."""
        self._issue("MTE1", ("LoadData", dst, src, transpose), lambda: self._load(dst, src, transpose))

    def Mmad(self, dst: LocalTensor, a: LocalTensor, b: LocalTensor, init: bool = True, bias: LocalTensor | None = None) -> None:
        """``dst`` (m, n) in L0C = ``a`` (m, k) in L0A @ ``b`` (k, n) in L0B, added to what is there unless ``init``.

        With ``init``, ``bias`` (n) in BT is added to every row. Sums are float32, int32 for int8.
        """
        self._issue("M", ("Mmad", dst, a, b, init, bias), lambda: self._mmad(dst, a, b, init, bias))

    def Fixpipe(self, dst: GlobalTensor | LocalTensor, src: LocalTensor, relu: bool = False) -> None:
        """``src`` in L0C to GM, L1, or UB where the chip has that path; rounded to the dtype of ``dst`` on the way.

        A ``dst`` in GM may be smaller than the tile, at the edge of a matrix; the rest is dropped.
        """
        if isinstance(dst, GlobalTensor):
            self._store("Fixpipe", dst, src, relu)
        else:
            self.rules.path(src.buffer.name, dst.buffer.name)
            self._issue("FIX", ("Fixpipe", dst, src, relu), lambda: self._move("Fixpipe", dst, src, relu))

    # -- how each is checked and priced -------------------------------------------------------------

    def _fetch(self, dst: LocalTensor, src: GlobalTensor) -> None:
        pipe, region = self.rules.path("GM", dst.buffer.name), src.region()
        self._issue(pipe, ("DataCopy", dst, region), lambda: self._fetched(dst, src, region))

    def _fetched(self, dst: LocalTensor, src: GlobalTensor, region: Region) -> Instruction:
        self._same_dtype("DataCopy", dst, src)
        if len(src.shape) != len(dst.shape) or any(s > d for s, d in zip(src.shape, dst.shape)):
            raise WrongOperand(f"DataCopy: {src} is {src.shape} and does not fit into {dst} of {dst.shape}")
        latency = self.rules.latency["to_ub" if dst.buffer.name == "UB" else "to_l1"]
        action = partial(_copy_in, dst, src) if self.numerics else None
        return Instruction("DataCopy", "work", 0, latency, (region,), (dst.region,), gm=src, action=action)

    def _store(self, name: str, dst: GlobalTensor, src: LocalTensor, relu: bool = False) -> None:
        pipe, region = self.rules.path(src.buffer.name, "GM"), dst.region()
        dst.whole.written = True
        self._issue(pipe, (name, region, src, relu), lambda: self._stored(name, dst, src, relu, region))

    def _stored(self, name: str, dst: GlobalTensor, src: LocalTensor, relu: bool, region: Region) -> Instruction:
        source = src.buffer.name
        if (name == "Fixpipe") != (source == "L0C"):
            raise IllegalPath(f"{name} does not empty {source}: Fixpipe empties L0C, DataCopy the others")
        if name == "DataCopy":
            self._same_dtype(name, dst, src)
        if len(src.shape) != len(dst.shape) or any(d > s for s, d in zip(src.shape, dst.shape)):
            raise WrongOperand(f"{name}: {src} of {src.shape} does not fill {dst} of {dst.shape}")
        latency = self.rules.latency["from_l0c" if source == "L0C" else "to_ub"]
        action = partial(_copy_out, dst, src, relu) if self.numerics else None
        cycles = self.rules.store(source, dst.bytes)
        return Instruction(name, "work", cycles, latency, (src.region,), (region,), gm=dst, stores=True, action=action)

    def _move(self, name: str, dst: LocalTensor, src: LocalTensor, relu: bool = False) -> Instruction:
        source, target = src.buffer.name, dst.buffer.name
        if name == "DataCopy":
            self._same_dtype(name, dst, src)
        same_shape = dst.shape == src.shape or (target == "BT" and dst.rect[3] == src.shape[-1])
        if not same_shape and not (source == "L0C" and all(d <= s for d, s in zip(dst.shape, src.shape))):
            raise WrongOperand(f"{name}: {src} is {src.shape} and {dst} is {dst.shape}; they must be equal")
        cycles = self.rules.extract(target, dst.bytes) if source == "L1" else self.rules.move(source, target, dst.bytes)
        latency = self.rules.latency["from_l0c"] if source == "L0C" else 0
        action = partial(_copy_across, dst, src, relu) if self.numerics else None
        return Instruction(name, "work", cycles, latency, (src.region,), (dst.region,), action=action)

    def _load(self, dst: LocalTensor, src: LocalTensor, transpose: bool) -> Instruction:
        if src.buffer.name != "L1" or dst.buffer.name not in ("L0A", "L0B"):
            raise IllegalPath(f"LoadData goes from L1 to L0A or L0B, not from {src.buffer.name} to {dst.buffer.name}")
        self._same_dtype("LoadData", dst, src)
        shape = src.shape[::-1] if transpose else src.shape
        if shape != dst.shape:
            hint = "" if transpose or src.shape[::-1] != dst.shape else "; did you mean transpose=True?"
            raise WrongOperand(f"LoadData: {src} gives {shape} and {dst} is {dst.shape}{hint}")
        action = partial(_rearrange, dst, src, transpose) if self.numerics else None
        return Instruction("LoadData", "work", self.rules.extract(dst.buffer.name, dst.bytes), 0, (src.region,), (dst.region,), action=action)

    def _mmad(self, dst: LocalTensor, a: LocalTensor, b: LocalTensor, init: bool, bias: LocalTensor | None) -> Instruction:
        places = (dst.buffer.name, a.buffer.name, b.buffer.name)
        if places != ("L0C", "L0A", "L0B"):
            raise IllegalPath(f"Mmad takes its operands from L0A and L0B and adds up in L0C; found {', '.join(places)}")
        self._same_dtype("Mmad", a, b)
        (m, k), n = a.shape, b.shape[1]
        if b.shape[0] != k or dst.shape != (m, n):
            raise WrongOperand(f"Mmad: {a.shape} @ {b.shape} is not {dst.shape}")
        if dst.dtype != ACCUMULATES.get(a.dtype, "float32"):
            raise WrongOperand(f"Mmad of {a.dtype} adds up in {ACCUMULATES.get(a.dtype, 'float32')}, and L0C holds {dst.dtype}")
        if bias is not None and (not init or bias.buffer.name != "BT" or bias.shape != (n,)):
            raise WrongOperand(f"Mmad: a bias is ({n},) in BT and needs init=True; found {bias.shape} in {bias.buffer.name}")
        reads = (a.region, b.region, *(() if init else (dst.region,)), *(() if bias is None else (bias.region,)))
        action = partial(_multiply, dst, a, b, init, bias) if self.numerics else None
        return Instruction("Mmad", "work", self.rules.mmad(m, k, n, a.dtype), 0, reads, (dst.region,), action=action, flops=2 * m * k * n)

    def _same_dtype(self, name: str, one: LocalTensor | GlobalTensor, other: LocalTensor | GlobalTensor) -> None:
        if one.dtype != other.dtype:
            raise WrongOperand(f"{name} does not convert: {one} is {one.dtype} and {other} is {other.dtype}")


# -- the arithmetic -----------------------------------------------------------------------------------


def _copy_in(dst: LocalTensor, src: GlobalTensor) -> None:
    if src.shape == dst.shape:
        dst.put(src.stored)
        return
    whole = np.zeros(dst.shape, STORED[dst.dtype])
    whole[tuple(slice(n) for n in src.shape)] = src.stored
    dst.put(whole)


def _copy_out(dst: GlobalTensor, src: LocalTensor, relu: bool) -> None:
    dst.stored[...] = _converted(src, dst.dtype, relu)[tuple(slice(n) for n in dst.shape)]


def _copy_across(dst: LocalTensor, src: LocalTensor, relu: bool) -> None:
    if dst.buffer.name == "BT":
        dst.put(src.matrix().reshape(-1)[: dst.shape[0]])
    else:
        dst.put(_converted(src, dst.dtype, relu)[: dst.shape[0], : dst.shape[1]])


def _converted(src: LocalTensor, dtype: str, relu: bool) -> np.ndarray:
    stored = src.matrix()
    if relu:
        stored = np.maximum(stored, 0)
    if src.dtype == dtype:
        return stored
    values = decode(stored, src.dtype)
    return encode(np.clip(values, -128, 127) if dtype == "int8" else values, dtype)


def _rearrange(dst: LocalTensor, src: LocalTensor, transpose: bool) -> None:
    matrix = src.matrix()
    dst.put(matrix.T if transpose else matrix)


def _multiply(dst: LocalTensor, a: LocalTensor, b: LocalTensor, init: bool, bias: LocalTensor | None) -> None:
    if a.dtype == "int8":  # exact in float64: 2^53 is beyond any sum of products of bytes that fits L0
        product = (a.matrix().astype(np.float64) @ b.matrix().astype(np.float64)).astype(np.int32)
    else:
        rows = decode(a.matrix(), a.dtype).reshape(-1, ROWS, a.shape[1])  # so little at a time that BLAS starts no threads
        product = (rows @ decode(b.matrix(), b.dtype)).reshape(dst.shape)
    if bias is not None:
        product = product + decode(bias.matrix(), bias.dtype)
    dst.put(product if init else dst.matrix() + product)


assert ROWS == 16  # the cube's fractals are square for 16-bit numbers, which is what transposing on the way rests on
