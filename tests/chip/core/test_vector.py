"""Every vector instruction against NumPy, in each dtype that the unit has; what it refuses; what it takes in cycles."""

from collections.abc import Callable

import numpy as np
import pytest

from course_lib.chip.core import IllegalPath, WrongOperand, launch, tensor
from course_lib.chip.core.numbers import decode, encode

TWO = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide, "Max": np.maximum, "Min": np.minimum}
ONE = {
    "Exp": np.exp, "Ln": np.log, "Sqrt": np.sqrt, "Rsqrt": lambda x: 1 / np.sqrt(x), "Reciprocal": lambda x: 1 / x,
    "Abs": np.abs, "Relu": lambda x: np.maximum(x, 0),
}  # fmt: skip
DTYPES = [("ascend-910b2", "float32"), ("ascend-910b2", "float16"), ("ascend-950dt", "bfloat16")]


def unary(name: str, *more: object) -> Callable:
    """A kernel: out = name(x, …)."""

    def kernel(core: object, x: object, out: object) -> None:
        a, b = core.LocalTensor("UB", x.shape, x.dtype), core.LocalTensor("UB", out.shape, out.dtype)
        core.DataCopy(a, x)
        core.PipeBarrier("ALL")
        getattr(core, name)(b, a, *more)
        core.PipeBarrier("ALL")
        core.DataCopy(out, b)

    return kernel


def binary(name: str) -> Callable:
    def kernel(core: object, x: object, y: object, out: object) -> None:
        a, b, c = (core.LocalTensor("UB", t.shape, t.dtype) for t in (x, y, out))
        core.DataCopy(a, x)
        core.DataCopy(b, y)
        core.PipeBarrier("ALL")
        getattr(core, name)(c, a, b)
        core.PipeBarrier("ALL")
        core.DataCopy(out, c)

    return kernel


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return decode(encode(values, dtype), dtype)


def ran(kernel: Callable, chip: str, dtype: str, *inputs: np.ndarray, shape: tuple | None = None, out: str = "") -> np.ndarray:
    given = [tensor(x, dtype) for x in inputs]
    result = tensor(np.zeros(shape or inputs[0].shape, np.float32), out or dtype)
    launch(kernel, chip, *given, result, unit="AIV")
    return result.numpy()


@pytest.mark.parametrize(("chip", "dtype"), DTYPES)
@pytest.mark.parametrize("name", TWO)
def test_of_two(name: str, chip: str, dtype: str, random: np.random.Generator) -> None:
    x, y = rounded(random.standard_normal((2, 6, 64)).astype(np.float32), dtype)
    np.testing.assert_array_equal(ran(binary(name), chip, dtype, x, y), rounded(TWO[name](x, y), dtype))


@pytest.mark.parametrize(("chip", "dtype"), DTYPES)
@pytest.mark.parametrize("name", ONE)
def test_of_one(name: str, chip: str, dtype: str, random: np.random.Generator) -> None:
    x = rounded(random.uniform(0.1, 5, 256).astype(np.float32) * (-1 if name in ("Abs", "Relu") else 1), dtype)
    np.testing.assert_array_equal(ran(unary(name), chip, dtype, x), rounded(ONE[name](x), dtype))


@pytest.mark.parametrize(("chip", "dtype"), DTYPES)
def test_with_a_scalar(chip: str, dtype: str, random: np.random.Generator) -> None:
    x = rounded(random.standard_normal(128).astype(np.float32), dtype)
    np.testing.assert_array_equal(ran(unary("Adds", 0.1), chip, dtype, x), rounded(x + np.float32(0.1), dtype))
    np.testing.assert_array_equal(ran(unary("Muls", -3.0), chip, dtype, x), rounded(x * np.float32(-3), dtype))


def test_axpy_and_duplicate(aiv: Callable, random: np.random.Generator) -> None:
    x, out = random.standard_normal((2, 64)).astype(np.float32)
    want = np.float32(3) + np.float32(0.5) * x

    def kernel(core: object, x: object, out: object) -> None:
        a, b = core.LocalTensor("UB", 64, "float32"), core.LocalTensor("UB", 64, "float32")
        core.DataCopy(a, x)
        core.Duplicate(b, 3.0)
        core.PipeBarrier("ALL")
        core.Axpy(b, a, 0.5)
        core.PipeBarrier("ALL")
        core.DataCopy(out, b)

    aiv(kernel, x, out)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("name", "function"), [("WholeReduceSum", np.sum), ("WholeReduceMax", np.max)])
def test_reductions(name: str, function: Callable, dtype: str, random: np.random.Generator) -> None:
    x = rounded(random.standard_normal((16, 96)).astype(np.float32), dtype)
    got = ran(unary(name), "ascend-910b2", dtype, x, shape=(16,))
    np.testing.assert_array_equal(got, rounded(function(x, axis=1), dtype))


def test_a_reduction_leaves_what_is_beyond_its_rows() -> None:
    def kernel(core: object, x: object, out: object) -> None:
        a, b = core.LocalTensor("UB", (3, 8), "float32"), core.LocalTensor("UB", 8, "float32")
        core.DataCopy(a, x)
        core.Duplicate(b, 7.0)
        core.PipeBarrier("ALL")
        core.WholeReduceSum(b, a)
        core.PipeBarrier("ALL")
        core.DataCopy(out, b)

    out = np.zeros(8, np.float32)
    launch(kernel, "ascend-910b2", np.ones((3, 8), np.float32), out, unit="AIV")
    assert out.tolist() == [8, 8, 8, 7, 7, 7, 7, 7]


@pytest.mark.parametrize(("dtype", "block"), [("float32", 8), ("float16", 16)])
def test_brcb_makes_a_column_that_meets_every_column(dtype: str, block: int, random: np.random.Generator) -> None:
    x = rounded(random.standard_normal((16, 64)).astype(np.float32), dtype)
    y = rounded(random.standard_normal(16).astype(np.float32), dtype)

    def kernel(core: object, x: object, y: object, out: object) -> None:
        a, b = core.LocalTensor("UB", x.shape, dtype), core.LocalTensor("UB", y.shape, dtype)
        column = core.LocalTensor("UB", (16, block), dtype)
        core.DataCopy(a, x)
        core.DataCopy(b, y)
        core.PipeBarrier("ALL")
        core.Brcb(column, b)
        core.Sub(a, a, column)
        core.PipeBarrier("ALL")
        core.DataCopy(out, a)

    np.testing.assert_array_equal(ran(kernel, "ascend-910b2", dtype, x, y), rounded(x - y[:, None], dtype))


@pytest.mark.parametrize(
    ("source", "target"),
    [("float32", "float16"), ("float16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "int32"), ("int32", "float32")],
)
def test_cast(source: str, target: str, random: np.random.Generator) -> None:
    x = rounded((random.standard_normal(256) * 10).astype(np.float32), source)
    np.testing.assert_array_equal(ran(unary("Cast"), "ascend-910b2", source, x, out=target), rounded(x.astype(np.float32), target))


def test_integers_wrap_around(aiv: Callable) -> None:
    x, out = np.full(8, 2**31 - 1, np.int32), np.zeros(8, np.int32)
    aiv(binary("Add"), x, np.ones(8, np.int32), out)
    assert (out == -(2**31)).all()


def test_infinities_and_nan_are_results(aiv: Callable) -> None:
    x, y, out = np.float32([1, 0, np.inf, np.nan] * 2), np.zeros(8, np.float32), np.zeros(8, np.float32)
    aiv(binary("Div"), x, y, out)
    np.testing.assert_array_equal(out, np.float32([np.inf, np.nan, np.inf, np.nan] * 2))
    half = np.full(16, 60000, np.float16)
    total = np.zeros_like(half)
    aiv(binary("Add"), half, half, total)
    assert np.isinf(total).all()


def test_minus_zero_is_another_scalar(aiv: Callable) -> None:
    def kernel(core: object, out: object) -> None:
        a = core.LocalTensor("UB", 8, "float32")
        core.Duplicate(a, 0.0)
        core.Duplicate(a, -0.0)
        core.PipeBarrier("ALL")
        core.DataCopy(out, a)

    out = np.ones(8, np.float32)
    aiv(kernel, out)
    assert np.signbit(out).all()


def refused(error: type, text: str, action: Callable, chip: str = "ascend-910b2", unit: str = "AIV") -> None:
    with pytest.raises(error, match=text):
        launch(lambda core: action(core, lambda shape, dtype: core.LocalTensor("UB", shape, dtype)), chip, unit=unit)


def test_what_is_refused() -> None:
    refused(WrongOperand, "Add: UB@64.* is .16,. and UB@0.* is .32,.; they must be equal", lambda c, t: c.Add(t(32, "float16"), t(16, "float16"), t(32, "float16")))
    refused(WrongOperand, "Adds does not convert: .* Cast first", lambda c, t: c.Adds(t(32, "float32"), t(32, "float16"), 1.0))
    refused(WrongOperand, "Exp works on floats", lambda c, t: c.Exp(t(8, "int32"), t(8, "int32")))
    refused(WrongOperand, "has no bfloat16; Cast to float32 first", lambda c, t: c.Exp(t(16, "bfloat16"), t(16, "bfloat16")))
    refused(WrongOperand, "needs a vector of at least 16 float32; found .8,.", lambda c, t: c.WholeReduceSum(t(8, "float32"), t((16, 8), "float32")))
    refused(WrongOperand, "Brcb: makes .rows, 8.", lambda c, t: c.Brcb(t((8, 16), "float32"), t(8, "float32")))
    refused(IllegalPath, "Exp runs on pipe V, and an AIC of Ascend 910B2 has S, M, MTE1", lambda c, _: c.Exp(*[c.LocalTensor("L1", (16, 16), "float16")] * 2), unit="AIC")


def test_bfloat16_is_arithmetic_of_the_950_only(random: np.random.Generator) -> None:
    x = rounded(random.standard_normal(64).astype(np.float32), "bfloat16")
    with pytest.raises(WrongOperand, match="Cast to float32 first"):
        ran(unary("Relu"), "ascend-910b2", "bfloat16", x)


def test_flops_are_one_per_element(aiv: Callable) -> None:
    run = aiv(binary("Add"), *np.zeros((3, 100, 8), np.float32))
    assert (run.flops, [event.flops for event in run.events if event.pipe == "V"]) == (800, [800])
