"""Flash attention agrees with NumPy; cube and vector cores overlap when the cube works ahead; errors are found."""

from functools import partial

import numpy as np
import pytest

from course_lib.chip.core import CoreError, empty, launch
from course_lib.chip.core.kernels.attention import LEAST, attention, workspace

A2 = "ascend-910b2"


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.T / np.sqrt(q.shape[1])
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape, bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True) @ v


def mask(block: int = 128) -> np.ndarray:
    return np.where(np.tril(np.ones((block, block), bool)), 0, LEAST).astype(np.float32)


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys", "head", "cores"), [(128, 128, 64, 1), (272, 400, 64, 2), (16, 16, 16, 1), (400, 400, 128, 3), (256, 512, 32, 4)])
def test_agrees_with_numpy(queries: int, keys: int, head: int, cores: int, causal: bool, ahead: int, random: np.random.Generator) -> None:
    keys = queries if causal else keys
    q, k, v = ((random.standard_normal((n, head)) * 2).astype(np.float16) for n in (queries, keys, keys))
    out = np.zeros((queries, head), np.float32)
    work = workspace(cores, head, ahead=ahead)
    launch(partial(attention, ahead=ahead), A2, q, k, v, out, *work, *([mask()] if causal else []), unit="MIX", blocks=cores)
    np.testing.assert_allclose(out, reference(q, k, v, causal), atol=3e-3)


def test_large_scores_do_not_overflow(random: np.random.Generator) -> None:
    q, k, v = ((random.standard_normal((256, 64)) * scale).astype(np.float16) for scale in (30, 30, 1))
    out = np.zeros((256, 64), np.float32)
    launch(attention, A2, q, k, v, out, *workspace(1, 64), unit="MIX")
    np.testing.assert_allclose(out, reference(q, k, v, False), atol=3e-3)


def cycles(ahead: int, causal: bool = False, n: int = 1024) -> int:
    given = [empty(n, 128) for _ in range(3)] + [empty(n, 128, dtype="float32")] + list(workspace(2, 128, ahead=ahead))
    kernel = partial(attention, ahead=ahead)
    return launch(kernel, A2, *given, *([mask()] if causal else []), unit="MIX", blocks=2).cycles


def test_working_ahead_overlaps_cube_and_vector() -> None:
    assert cycles(0) > 1.4 * cycles(1) > 1.4 * cycles(2)


def test_causal_leaves_blocks_out() -> None:
    assert 0.5 < cycles(1, causal=True) / cycles(1) < 0.8


def test_without_a_cross_core_flag_it_is_a_race() -> None:
    def kernel(core: object, *given: object) -> None:
        if core.unit == "AIV":
            core.CrossCoreWaitFlag = lambda *_: None
        attention(core, *given)

    given = [empty(256, 64) for _ in range(3)] + [empty(256, 64, dtype="float32")] + list(workspace(1, 64))
    with pytest.raises(CoreError):
        launch(kernel, A2, *given, unit="MIX")
