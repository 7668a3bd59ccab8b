"""The vector instructions, named as in Ascend C: elementwise on UB, reductions along rows, conversions.

They work on repeats of 256 bytes. Arithmetic is in float32 (int32 for integers) and is rounded once, to the dtype of
the destination; an instruction exists only for dtypes that the chip's vector unit has, which on A2 and A3 are float16
and float32 but not bfloat16: `Cast` first.
"""

from collections.abc import Callable
from functools import partial
from numbers import Real

import numpy as np

from course_lib.chip.core.buffers import BLOCK, LocalTensor
from course_lib.chip.core.errors import IllegalPath, WrongOperand
from course_lib.chip.core.numbers import decode, encode
from course_lib.chip.core.program import Instruction, Recorder

Function = Callable[..., np.ndarray]
FLOATS_ONLY = ("Div", "Exp", "Ln", "Sqrt", "Rsqrt", "Reciprocal")


class VectorUnit(Recorder):
    """A core with the vector instructions. Destinations come first; shapes must be equal unless said otherwise."""

    def Add(self, dst: LocalTensor, a: LocalTensor, b: LocalTensor) -> None:
        """``dst = a + b``. As in all instructions on two tensors, ``b`` of a matrix may be (rows, one 32 B block): its
        first column then meets every column of ``a`` (see `Brcb`)."""
        self._vector("Add", "add", np.add, dst, a, b)

    def Sub(self, dst: LocalTensor, a: LocalTensor, b: LocalTensor) -> None:
        """``dst = a - b``."""
        self._vector("Sub", "add", np.subtract, dst, a, b)

    def Mul(self, dst: LocalTensor, a: LocalTensor, b: LocalTensor) -> None:
        """``dst = a * b``."""
        self._vector("Mul", "mul", np.multiply, dst, a, b)

    def Div(self, dst: LocalTensor, a: LocalTensor, b: LocalTensor) -> None:
        """``dst = a / b``."""
        self._vector("Div", "div", np.divide, dst, a, b)

    def Max(self, dst: LocalTensor, a: LocalTensor, b: LocalTensor) -> None:
        """``dst = max(a, b)``."""
        self._vector("Max", "max", np.maximum, dst, a, b)

    def Min(self, dst: LocalTensor, a: LocalTensor, b: LocalTensor) -> None:
        """``dst = min(a, b)``."""
        self._vector("Min", "max", np.minimum, dst, a, b)

    def Adds(self, dst: LocalTensor, a: LocalTensor, scalar: float) -> None:
        """``dst = a + scalar``."""
        self._vector("Adds", "adds", np.add, dst, a, scalar=scalar)

    def Muls(self, dst: LocalTensor, a: LocalTensor, scalar: float) -> None:
        """``dst = a * scalar``."""
        self._vector("Muls", "muls", np.multiply, dst, a, scalar=scalar)

    def Axpy(self, dst: LocalTensor, a: LocalTensor, scalar: float) -> None:
        """``dst = dst + scalar * a``."""
        self._vector("Axpy", "muls", lambda old, new, s: old + s * new, dst, dst, a, scalar=scalar)

    def Exp(self, dst: LocalTensor, a: LocalTensor) -> None:
        """``dst = e^a``."""
        self._vector("Exp", "exp", np.exp, dst, a)

    def Ln(self, dst: LocalTensor, a: LocalTensor) -> None:
        """``dst = ln a``."""
        self._vector("Ln", "exp", np.log, dst, a)

    def Sqrt(self, dst: LocalTensor, a: LocalTensor) -> None:
        """``dst = sqrt(a)``."""
        self._vector("Sqrt", "sqrt", np.sqrt, dst, a)

    def Rsqrt(self, dst: LocalTensor, a: LocalTensor) -> None:
        """``dst = 1 / sqrt(a)``."""
        self._vector("Rsqrt", "rsqrt", lambda x: 1 / np.sqrt(x), dst, a)

    def Reciprocal(self, dst: LocalTensor, a: LocalTensor) -> None:
        """``dst = 1 / a``."""
        self._vector("Reciprocal", "rsqrt", np.reciprocal, dst, a)

    def Abs(self, dst: LocalTensor, a: LocalTensor) -> None:
        """``dst = |a|``."""
        self._vector("Abs", "max", np.abs, dst, a)

    def Relu(self, dst: LocalTensor, a: LocalTensor) -> None:
        """``dst = max(a, 0)``."""
        self._vector("Relu", "max", lambda x: np.maximum(x, 0), dst, a)

    def Cast(self, dst: LocalTensor, a: LocalTensor) -> None:
        """``dst = a`` in the dtype of ``dst``, to nearest, ties to even. Takes as long as the wider of the two."""
        self._vector("Cast", "adds", lambda x: x, dst, a)

    def Duplicate(self, dst: LocalTensor, scalar: float) -> None:
        """Every element of ``dst = scalar``."""
        self._vector("Duplicate", "adds", lambda s: np.full(dst.shape, s), dst, scalar=scalar)

    def WholeReduceSum(self, dst: LocalTensor, a: LocalTensor) -> None:
        """``dst[r]``, a vector, = sum of row r of ``a``; elements of ``dst`` beyond its rows are left alone."""
        self._reduce("WholeReduceSum", "reduce_sum", np.sum, dst, a)

    def WholeReduceMax(self, dst: LocalTensor, a: LocalTensor) -> None:
        """``dst[r]``, a vector, = largest of row r of ``a``."""
        self._reduce("WholeReduceMax", "reduce_max", np.max, dst, a)

    def Brcb(self, dst: LocalTensor, a: LocalTensor) -> None:
        """Row r of ``dst`` (rows, one 32 B block) = element r of the vector ``a``: a column to meet a matrix with."""
        rows, cols = dst.shape if len(dst.shape) == 2 else (0, 0)
        if cols * dst.size != BLOCK or len(a.shape) != 1 or a.shape[0] < rows:
            raise WrongOperand(f"Brcb: makes (rows, {BLOCK // dst.size}) of a vector of at least rows; found {dst.shape} of {a.shape}")
        action = partial(_spread, dst, a) if self.numerics else None
        self._issue("V", ("Brcb", dst, a), lambda: self._instruction("Brcb", "adds", rows * cols, 1, dst, (a,), action))

    def _vector(
        self, name: str, latency: str, function: Function, dst: LocalTensor, *sources: LocalTensor, scalar: float | None = None
    ) -> None:
        key = (name, dst, sources, scalar if scalar else repr(scalar))  # 0.0 and -0.0 are equal, and not the same
        self._issue("V", key, lambda: self._elementwise(name, latency, function, dst, sources, scalar))

    def _elementwise(
        self, name: str, latency: str, function: Function, dst: LocalTensor, sources: tuple[LocalTensor, ...], scalar: float | None
    ) -> Instruction:
        if scalar is not None and not isinstance(scalar, Real):
            raise WrongOperand(f"{name} takes a number last, not {scalar!s}; on two tensors work Add, Sub, Mul, Div, Max, Min")
        for operand in (dst, *sources):
            if isinstance(operand, Real):
                raise WrongOperand(f"{name} works on tensors, and {operand!r} is a number; Adds and Muls take one")
            self._in_ub(name, operand)
        for position, source in enumerate(sources):
            column = position == 1 and len(dst.shape) == 2 and source.shape == (dst.shape[0], BLOCK // source.size)
            if source.shape != dst.shape and not column:
                raise WrongOperand(f"{name}: {source} is {source.shape} and {dst} is {dst.shape}; they must be equal")
            if source.dtype != dst.dtype and name != "Cast":
                raise WrongOperand(f"{name} does not convert: {source} is {source.dtype} and {dst} is {dst.dtype}; Cast first")
        action = partial(_apply, function, dst, sources, scalar) if self.numerics else None
        widest = max((dst, *sources), key=lambda t: t.size)
        return self._instruction(name, latency, int(np.prod(dst.shape)), 1, widest, sources, action, dst)

    def _reduce(self, name: str, latency: str, function: Function, dst: LocalTensor, a: LocalTensor) -> None:
        rows, cols = a.shape if len(a.shape) == 2 else (1, a.shape[0])
        if len(dst.shape) != 1 or dst.shape[0] < rows or dst.dtype != a.dtype:
            raise WrongOperand(f"{name}: needs a vector of at least {rows} {a.dtype}; found {dst.shape} of {dst.dtype}")
        action = partial(_along_rows, function, dst, a) if self.numerics else None
        self._issue("V", (name, dst, a), lambda: self._instruction(name, latency, cols, rows, a, (a,), action, dst))

    def _instruction(
        self, name: str, latency: str, elements: int, rows: int, shape: LocalTensor, sources: tuple[LocalTensor, ...],
        action: Callable | None, dst: LocalTensor | None = None,
    ) -> Instruction:  # fmt: skip
        dst = dst or shape
        for operand in (dst, *sources):
            self._in_ub(name, operand)
            if name != "Cast" and not self.spec.vector_has(operand.dtype):
                raise WrongOperand(f"{name}: the vector unit of {self.spec.title} has no {operand.dtype}; Cast to float32 first")
        if name in FLOATS_ONLY and dst.dtype == "int32":
            raise WrongOperand(f"{name} works on floats, and {dst} is {dst.dtype}; Cast first")
        cycles = self.rules.vector(elements, shape.dtype, latency, rows)
        flops = 0 if name in ("Cast", "Duplicate", "Brcb") else elements * rows
        return Instruction(name, "work", cycles, 0, tuple(s.region for s in sources), (dst.region,), action=action, flops=flops)

    def _in_ub(self, name: str, operand: LocalTensor) -> None:
        if operand.buffer.name != "UB":
            raise IllegalPath(f"{name} works on UB, and {operand} lies in {operand.buffer.name}")


# -- the arithmetic -----------------------------------------------------------------------------------


def _apply(function: Function, dst: LocalTensor, sources: tuple[LocalTensor, ...], scalar: float | None) -> None:
    values = [decode(source.matrix(), source.dtype) for source in sources]
    if len(values) == 2 and values[1].shape != values[0].shape:
        values[1] = values[1][:, :1]
    if scalar is not None:
        values.append(np.float32(scalar) if values and values[0].dtype == np.float32 else scalar)
    with np.errstate(all="ignore"):  # infinities and NaN are results, as on the chip
        dst.put(encode(function(*values), dst.dtype))


def _along_rows(function: Function, dst: LocalTensor, a: LocalTensor) -> None:
    values = decode(a.matrix(), a.dtype).reshape(-1, a.shape[-1])
    dst.blocks[: len(values)] = encode(function(values, axis=1), dst.dtype)


def _spread(dst: LocalTensor, a: LocalTensor) -> None:
    dst.put(np.broadcast_to(a.blocks[: dst.shape[0], None], dst.shape))
