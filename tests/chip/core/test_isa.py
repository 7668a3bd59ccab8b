"""Moves and products: every path, every dtype of the cube, on chips with and without it; what is refused."""

from collections.abc import Callable

import numpy as np
import pytest

from course_lib.chip.core import IllegalPath, WrongOperand, launch, tensor
from course_lib.chip.core.numbers import decode, encode
from course_lib.chip.spec import ChipSpec

A2, A5 = "ascend-910b2", "ascend-950dt"


def product(core: object, a: object, b: object, out: object, bias: object = None, **options: bool) -> None:
    """out = a @ b in one go."""
    (m, k), n = a.shape, b.shape[1]
    l1 = [core.LocalTensor("L1", t.shape, t.dtype) for t in (a, b)]
    l0 = core.LocalTensor("L0A", (m, k), a.dtype), core.LocalTensor("L0B", (k, n), b.dtype)
    c = core.LocalTensor("L0C", (m, n), "int32" if a.dtype == "int8" else "float32")
    table = None
    core.DataCopy(l1[0], a)
    core.DataCopy(l1[1], b)
    if bias is not None:
        row, table = core.LocalTensor("L1", (16, n), bias.dtype), core.LocalTensor("BT", n, bias.dtype)
        core.DataCopy(row, bias)
    core.PipeBarrier("ALL")
    core.LoadData(l0[0], l1[0])
    core.LoadData(l0[1], l1[1])
    if bias is not None:
        core.DataCopy(table, row[:16])
    core.PipeBarrier("ALL")
    core.Mmad(c, *l0, bias=table)
    core.PipeBarrier("ALL")
    core.Fixpipe(out, c, **options)


def numbers(random: np.random.Generator, shape: tuple, dtype: str) -> np.ndarray:
    if dtype == "int8":
        return random.integers(-128, 128, shape).astype(np.int8)
    return decode(encode(random.standard_normal(shape).astype(np.float32), dtype), dtype)


@pytest.mark.parametrize(
    ("chip", "dtype"),
    [(A2, "float16"), (A2, "bfloat16"), (A2, "float32"), (A2, "int8"), (A5, "float8_e4m3fn"), (A5, "float8_e5m2"), (A5, "bfloat16")],
)
def test_products(chip: str, dtype: str, random: np.random.Generator) -> None:
    a, b = numbers(random, (64, 96), dtype), numbers(random, (96, 32), dtype)
    out = tensor(np.zeros((64, 32)), "int32" if dtype == "int8" else "float32")
    launch(product, chip, tensor(a, dtype), tensor(b, dtype), out)
    want = a.astype(np.float64) @ b.astype(np.float64)
    if dtype == "int8":
        np.testing.assert_array_equal(out.numpy(), want)
    else:
        np.testing.assert_allclose(out.numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_fixpipe_rounds_and_clips(target: str, random: np.random.Generator) -> None:
    a, b = numbers(random, (16, 16), "float16"), numbers(random, (16, 16), "float16")
    out = tensor(np.zeros((16, 16)), target)
    launch(lambda core, *given: product(core, *given, relu=True), A2, tensor(a, "float16"), tensor(b, "float16"), out)
    want = decode(encode(np.maximum(a @ b, 0), target), target)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-2 if target != "float32" else 1e-6)


def test_the_sum_is_kept_in_float32(aic: Callable) -> None:
    """4096 + 1 + … + 1 stays 4096 in float16, and does not here."""
    a, b, out = np.ones((16, 256), np.float16), np.ones((256, 16), np.float16), np.zeros((16, 16), np.float32)
    a[:, 0] = 4096
    aic(product, a, b, out)
    assert (out == 4096 + 255).all()


def test_mmad_adds_up(aic: Callable) -> None:
    def kernel(core: object, a: object, out: object) -> None:
        l1, l0a, l0b = (core.LocalTensor(name, (16, 16), "float16") for name in ("L1", "L0A", "L0B"))
        c = core.LocalTensor("L0C", (16, 16), "float32")
        core.DataCopy(l1, a)
        core.PipeBarrier("ALL")
        core.LoadData(l0a, l1)
        core.LoadData(l0b, l1)
        core.PipeBarrier("ALL")
        for i in range(5):
            core.Mmad(c, l0a, l0b, init=i == 0)
        core.PipeBarrier("ALL")
        core.Fixpipe(out, c)

    out = np.zeros((16, 16), np.float32)
    aic(kernel, np.eye(16, dtype=np.float16), out)
    np.testing.assert_array_equal(out, 5 * np.eye(16))


def test_a_bias_joins_every_row(random: np.random.Generator) -> None:
    a, b = numbers(random, (32, 32), "float16"), numbers(random, (32, 64), "float16")
    bias = random.standard_normal((1, 64)).astype(np.float32)
    out = np.zeros((32, 64), np.float32)
    launch(product, A2, tensor(a, "float16"), tensor(b, "float16"), out, bias)
    np.testing.assert_allclose(out, a @ b + bias, rtol=1e-5, atol=1e-5)


def test_results_go_on_to_l1(aic: Callable, random: np.random.Generator) -> None:
    """(a @ a) @ a, rounded to float16 in between, never leaving the core."""
    a, out = random.standard_normal((32, 32)).astype(np.float16), np.zeros((32, 32), np.float32)

    def kernel(core: object, a: object, out: object) -> None:
        l1, between = (core.LocalTensor("L1", (32, 32), "float16") for _ in range(2))
        l0a, l0b = core.LocalTensor("L0A", (32, 32), "float16"), core.LocalTensor("L0B", (32, 32), "float16")
        c = core.LocalTensor("L0C", (32, 32), "float32")
        core.DataCopy(l1, a)
        for left in (l1, between):
            core.PipeBarrier("ALL")
            core.LoadData(l0a, left)
            core.LoadData(l0b, l1)
            core.PipeBarrier("ALL")
            core.Mmad(c, l0a, l0b)
            core.PipeBarrier("ALL")
            core.Fixpipe(between if left is l1 else out, c)

    aic(kernel, a, out)
    exact = a.astype(np.float32)
    between = (exact @ exact).astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(out, between @ exact, rtol=1e-5, atol=1e-3)


def to_ub(core: object, a: object, out: object) -> None:
    """On a 950: a @ a, from L0C straight into the UB of AIV 0, which adds one and writes it out."""
    shape = a.shape
    if core.unit == "AIC":
        there = core.LocalTensor("UB", shape, "float32", address=0, sub_block=0)
        l1, l0a, l0b = (core.LocalTensor(name, shape, a.dtype) for name in ("L1", "L0A", "L0B"))
        c = core.LocalTensor("L0C", shape, "float32")
        core.DataCopy(l1, a)
        core.PipeBarrier("ALL")
        core.LoadData(l0a, l1)
        core.LoadData(l0b, l1)
        core.PipeBarrier("ALL")
        core.Mmad(c, l0a, l0b)
        core.PipeBarrier("ALL")
        core.Fixpipe(there, c)
        core.CrossCoreSetFlag(2, "FIX", 0)
        return
    core.CrossCoreWaitFlag(0, "V")
    if core.GetSubBlockIdx() == 0:
        ub = core.LocalTensor("UB", shape, "float32", address=0)
        more = core.LocalTensor("UB", shape, "float32")
        core.Adds(more, ub, 1.0)
        core.PipeBarrier("ALL")
        core.DataCopy(out, more)


def test_l0c_reaches_ub_on_the_950_and_not_on_a2(random: np.random.Generator) -> None:
    a, out = random.standard_normal((32, 32)).astype(np.float16), np.zeros((32, 32), np.float32)
    launch(to_ub, A5, a, out, unit="MIX")
    np.testing.assert_allclose(out, a.astype(np.float32) @ a.astype(np.float32) + 1, rtol=1e-5, atol=1e-4)
    with pytest.raises(IllegalPath, match="Ascend 910B2 has no path L0C→UB; go through GM. Its paths are GM→L1, "):
        launch(to_ub, A2, a, out, unit="MIX")


def test_ub_reaches_l1_on_the_950(random: np.random.Generator) -> None:
    """An AIV doubles a matrix and hands it to its AIC, which squares it; GM is not touched in between."""
    x, out = random.standard_normal((32, 32)).astype(np.float16), np.zeros((32, 32), np.float32)

    def kernel(core: object, x: object, out: object) -> None:
        l1 = core.LocalTensor("L1", (32, 32), "float16", address=0)
        if core.unit == "AIC":
            a, b, c = core.LocalTensor("L0A", (32, 32), "float16"), core.LocalTensor("L0B", (32, 32), "float16"), core.LocalTensor("L0C", (32, 32), "float32")
            core.CrossCoreWaitFlag(0, "MTE1")
            core.LoadData(a, l1)
            core.LoadData(b, l1)
            core.PipeBarrier("ALL")
            core.Mmad(c, a, b)
            core.PipeBarrier("ALL")
            core.Fixpipe(out, c)
            return
        if core.GetSubBlockIdx() == 0:
            ub = core.LocalTensor("UB", (32, 32), "float16")
            core.DataCopy(ub, x)
            core.PipeBarrier("ALL")
            core.Muls(ub, ub, 2.0)
            core.PipeBarrier("ALL")
            core.DataCopy(l1, ub)
        core.CrossCoreSetFlag(2, "MTE3", 0)

    launch(kernel, A5, x, out, unit="MIX")
    doubled = 2 * x.astype(np.float32)
    np.testing.assert_allclose(out, doubled @ doubled, rtol=1e-5, atol=1e-3)
    with pytest.raises(IllegalPath, match="AIC reaches no UB here: it has 0 other cores beside it; launch with unit MIX"):
        launch(lambda core: core.LocalTensor("UB", 16, "float16"), A5)


def test_without_the_flag_the_950_reads_too_early(random: np.random.Generator) -> None:
    a, out = random.standard_normal((32, 32)).astype(np.float16), np.zeros((32, 32), np.float32)

    def kernel(core: object, a: object, out: object) -> None:
        core.CrossCoreWaitFlag = lambda *_: None
        core.CrossCoreSetFlag = lambda *_: None
        to_ub(core, a, out)

    with pytest.raises(Exception, match=r"Adds on AIV0.0 V reads UB@0.* while Fixpipe on AIC0 FIX may still be writing it; add CrossCoreSetFlag on AIC0"):
        launch(kernel, A5, a, out, unit="MIX")


def test_a_fused_core_goes_from_cube_to_vector_and_back(fused: ChipSpec, random: np.random.Generator) -> None:
    a, out = random.standard_normal((32, 32)).astype(np.float16), np.zeros((32, 32), np.float32)

    def kernel(core: object, a: object, out: object) -> None:
        l1, l0a, l0b = (core.LocalTensor(name, (32, 32), "float16") for name in ("L1", "L0A", "L0B"))
        c, ub = core.LocalTensor("L0C", (32, 32), "float32"), core.LocalTensor("UB", (32, 32), "float32")
        core.DataCopy(l1, a)
        core.PipeBarrier("ALL")
        core.LoadData(l0a, l1)
        core.LoadData(l0b, l1)
        core.PipeBarrier("ALL")
        core.Mmad(c, l0a, l0b)
        core.SetFlag("M_FIX")
        core.WaitFlag("M_FIX")
        core.Fixpipe(ub, c)
        core.SetFlag("FIX_V")
        core.WaitFlag("FIX_V")
        core.Muls(ub, ub, 2.0)
        core.SetFlag("V_MTE3")
        core.WaitFlag("V_MTE3")
        core.DataCopy(out, ub)

    launch(kernel, fused, a, out, blocks=2, numerics=True, check=False)  # both cores write the same
    launch(kernel, fused, a, out)
    np.testing.assert_allclose(out, 2 * (a.astype(np.float32) @ a.astype(np.float32)), rtol=1e-5, atol=1e-4)
    with pytest.raises(IllegalPath, match="has one core with cube and vector unit; launch with unit AIC"):
        launch(kernel, fused, a, out, unit="MIX")
    with pytest.raises(IllegalPath, match="has no path L0C→GM"):
        launch(product, fused, a, a, out)


def test_ub_and_l1_exchange_on_the_950(random: np.random.Generator, fused: ChipSpec) -> None:
    x, out = random.standard_normal((16, 64)).astype(np.float16), np.zeros((16, 64), np.float16)

    def kernel(core: object, x: object, out: object) -> None:
        a, l1, b = (core.LocalTensor(name, (16, 64), "float16") for name in ("UB", "L1", "UB"))
        core.DataCopy(a, x)
        core.PipeBarrier("ALL")
        core.DataCopy(l1, a)
        core.SetFlag("MTE3_MTE1")
        core.WaitFlag("MTE3_MTE1")
        core.DataCopy(b, l1)
        core.SetFlag("MTE1_MTE3")
        core.WaitFlag("MTE1_MTE3")
        core.DataCopy(out, b)

    launch(kernel, fused, x, out)
    np.testing.assert_array_equal(out, x)


def refused(error: type, text: str, action: Callable, unit: str = "AIC", chip: str = A2) -> None:
    x = np.zeros((32, 32), np.float16)
    with pytest.raises(error, match=text):
        launch(lambda core, x, y: action(core, lambda name, dtype="float16", shape=(32, 32): core.LocalTensor(name, shape, dtype), x, y), chip, x, x.copy(), unit=unit)


def test_what_is_refused() -> None:
    refused(IllegalPath, "GM→GM goes through UB", lambda c, t, x, y: c.DataCopy(y, x))
    refused(IllegalPath, "no path L1→GM", lambda c, t, x, y: c.DataCopy(x, t("L1")))
    refused(IllegalPath, "no path GM→L0A", lambda c, t, x, y: c.DataCopy(t("L0A"), x))
    refused(IllegalPath, "no path UB→UB", lambda c, t, x, y: c.DataCopy(t("UB"), t("UB")), "AIV")
    refused(IllegalPath, "L0C is emptied by Fixpipe", lambda c, t, x, y: c.DataCopy(t("L1", "float32"), t("L0C", "float32")))
    refused(IllegalPath, "DataCopy does not empty L0C", lambda c, t, x, y: c.DataCopy(x, t("L0C", "float32")))
    refused(IllegalPath, "Fixpipe does not empty UB", lambda c, t, x, y: c.Fixpipe(x, t("UB")), "AIV")
    refused(IllegalPath, "LoadData goes from L1 to L0A or L0B, not from L0A to L0B", lambda c, t, x, y: c.LoadData(t("L0B"), t("L0A")))
    refused(IllegalPath, "Mmad takes its operands from L0A and L0B and adds up in L0C; found L0C, L0B, L0A", lambda c, t, x, y: c.Mmad(t("L0C", "float32"), t("L0B"), t("L0A")))
    refused(WrongOperand, "DataCopy does not convert", lambda c, t, x, y: c.DataCopy(t("L1", "float32"), x))
    refused(WrongOperand, "does not fit into", lambda c, t, x, y: c.DataCopy(t("L1", shape=(16, 32)), x))
    refused(WrongOperand, "does not fill", lambda c, t, x, y: c.DataCopy(x, t("UB", shape=(16, 32))), "AIV")
    refused(WrongOperand, "did you mean transpose=True", lambda c, t, x, y: c.LoadData(t("L0A", shape=(16, 32)), t("L1", shape=(32, 16))))
    refused(WrongOperand, "Mmad: .32, 32. @ .16, 32. is not", lambda c, t, x, y: c.Mmad(t("L0C", "float32"), t("L0A"), t("L0B", shape=(16, 32))))
    refused(WrongOperand, "adds up in float32, and L0C holds int32", lambda c, t, x, y: c.Mmad(t("L0C", "int32"), t("L0A"), t("L0B")))
    refused(WrongOperand, "Mmad does not convert", lambda c, t, x, y: c.Mmad(t("L0C", "float32"), t("L0A"), t("L0B", "bfloat16")))
    refused(WrongOperand, "the cube of Ascend 910B2 does not multiply float8_e4m3fn", lambda c, t, x, y: c.Mmad(t("L0C", "float32"), *(t(n, "float8_e4m3fn") for n in ("L0A", "L0B"))))
    refused(WrongOperand, "GM has no transposed view", lambda c, t, x, y: x.T)
    refused(WrongOperand, "a bias is .32,. in BT and needs init=True", lambda c, t, x, y: c.Mmad(t("L0C", "float32"), t("L0A"), t("L0B"), bias=t("L1")))
    refused(WrongOperand, "no dtype named|no values of dtype", lambda c, t, x, y: t("L0A", "float4_e2m1fn_x2"), chip=A5)
