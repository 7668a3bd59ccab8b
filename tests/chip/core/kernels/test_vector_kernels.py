"""Kernels of the vector cores agree with NumPy, on any number of cores; the fast one is the faster one."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from course_lib.chip.core import empty, launch
from course_lib.chip.core.kernels.adamw import adamw
from course_lib.chip.core.kernels.elementwise import add, add_naive
from course_lib.chip.core.kernels.norm import layer_norm, rms_norm
from course_lib.chip.core.kernels.softmax import softmax, softmax_naive

A2 = "ascend-910b2"
CORES = [1, 3, 48]
SHAPES = [(1, 8), (5, 64), (37, 1000), (100, 512)]


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("n", [1, 17, 8192, 100_003])
@pytest.mark.parametrize("kernel", [add_naive, add])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int32"])
def test_addition(kernel: Callable, n: int, cores: int, dtype: str, random: np.random.Generator) -> None:
    x, y = (random.standard_normal((2, n)) * 100).astype(dtype)
    out = np.zeros_like(x)
    launch(kernel, A2, x, y, out, unit="AIV", blocks=cores)
    np.testing.assert_array_equal(out, x + y)


def test_double_buffering_hides_all_but_the_fetches() -> None:
    naive, fast = (launch(kernel, A2, *(empty(1 << 20) for _ in range(3)), unit="AIV") for kernel in (add_naive, add))
    assert naive.cycles > 1.5 * fast.cycles
    assert fast.busy["MTE2"] > 0.99
    assert fast.hbm_bytes == naive.hbm_bytes == 3 * 2 << 20


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [softmax_naive, softmax])
def test_softmax(kernel: Callable, shape: tuple, cores: int, random: np.random.Generator) -> None:
    x = (random.standard_normal(shape) * 100).astype(np.float32)
    out = np.zeros_like(x)
    launch(kernel, A2, x, out, unit="AIV", blocks=cores)
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    np.testing.assert_allclose(out, e / e.sum(1, keepdims=True), atol=1e-6)


def test_many_rows_in_one_instruction_are_faster() -> None:
    naive, fast = (launch(k, A2, empty(512, 256, dtype="float32"), empty(512, 256, dtype="float32"), unit="AIV") for k in (softmax_naive, softmax))
    assert naive.cycles > 1.5 * fast.cycles


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(shape: tuple, cores: int, random: np.random.Generator) -> None:
    x = (random.standard_normal(shape) * 3 + 1).astype(np.float32)
    weight, bias = random.standard_normal((2, shape[1])).astype(np.float32)
    exact, out = x.astype(np.float64), np.zeros_like(x)
    launch(layer_norm, A2, x, weight, bias, out, unit="AIV", blocks=cores)
    want = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(out, want, atol=1e-5, rtol=1e-5)
    launch(rms_norm, A2, x, weight, out, unit="AIV", blocks=cores)
    want = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(out, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("n", [1, 100, 4096, 10_001])
def test_adamw(n: int, cores: int, random: np.random.Generator) -> None:
    given = random.standard_normal((4, n)).astype(np.float32)
    p, g, m, v = given[0].copy(), given[1].copy(), np.zeros(n, np.float32), np.zeros(n, np.float32)
    exact = [x.astype(np.float64) for x in (p, m, v)]
    for step in (1, 2, 3):
        launch(partial(adamw, step=step, lr=1e-2, decay=0.1), A2, p, g, m, v, unit="AIV", blocks=cores)
        exact = reference(*exact, g.astype(np.float64), step, 1e-2, 0.1)
        for got, want in zip((p, m, v), exact):
            np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-6)
    np.testing.assert_array_equal(g, given[1])


def reference(p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, t: int, lr: float, decay: float) -> list:
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    update = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return [p * (1 - lr * decay) - lr * update, m, v]


def test_adamw_moves_28_bytes_an_element_and_is_bound_by_them() -> None:
    n = 1 << 20
    run = launch(adamw, A2, *(empty(n, dtype="float32") for _ in range(4)), unit="AIV", blocks=48)
    assert run.hbm_bytes == 28 * n
    assert run.cycles > 28 * n / (1.6e12 / 1.8e9)
