"""Checks of lesson 03's exercises; kernels are run on the emulated Ascend 910B2, with all its checks."""

from collections.abc import Callable

import numpy as np

from course_lib.chip.core import CoreError, Run, launch
from course_lib.lessons.check import Case, judge
from course_lib.lessons.solutions import lesson03 as solution

CHIP = "ascend-910b2"
HALF, SUMS = 2, 4  # bytes of float16, and of a sum in L0C
NEAR = 1.05  # times the least traffic is near enough
SLOWER = 1.15  # times the solution's cycles are near enough


def check_mmad_cycles(function: Callable[[int, int, int, tuple, int], int]) -> bool:
    """Full tiles, one row, sides that do not come out even, and a cube that is deeper along k."""
    cases = []
    for m, k, n, tile in (
        (128, 64, 256, (16, 16, 16)),
        (1, 64, 256, (16, 16, 16)),
        (100, 40, 72, (16, 16, 16)),
        (128, 64, 256, (16, 32, 16)),
        (33, 33, 33, (16, 4, 16)),
    ):
        right = solution.mmad_cycles(m, k, n, tile, 7)
        mistakes = {
            right - 7: "the pipeline has to fill first: the latency is paid once per instruction",
            (right - 7) * 8: "the latency is paid once per instruction, not once per product",
            m * k * n / (tile[0] * tile[1] * tile[2]) + 7: "a tile that is begun is paid in full: round each side up",
            (m // tile[0]) * (k // tile[1]) * (n // tile[2]) + 7: "round up, not down",
            m * k * n + 7: "each cycle does a whole small product, not one multiplication",
            2 * (right - 7) + 7: "a multiplication and its addition are one step here",
        }
        mistakes |= {-(-m // 16) * -(-k // 16) * -(-n // 16) + 7: "the cube's tile is not always 16 deep: use `tile`"}
        cases.append(Case((m, k, n, tile, 7), right, {x: hint for x, hint in mistakes.items() if x != right}))
    return judge("mmad_cycles", function, cases, "", "a whole number", "one row costs as much as sixteen")


def check_summed(function: Callable) -> bool:
    """out = a @ b over four steps of k, and over seven, with no race and nothing left set."""
    cycles = []
    for depth in (256, 448):
        rng = np.random.default_rng(depth)
        a, b = (rng.standard_normal(shape).astype(np.float16) for shape in ((128, depth), (depth, 256)))
        out = np.zeros((128, 256), np.float32)
        run = _launched("summed", function, solution.broken, "AIC", a, b, out)
        if run is None:
            return False
        right = a.astype(np.float32) @ b.astype(np.float32)
        if not np.allclose(out, right, atol=1e-2):
            last = a[:, -64:].astype(np.float32) @ b[-64:].astype(np.float32)
            only = "only the last step of k is in `out`: init clears the sums, and is True for k == 0 only"
            _wrong(
                "summed",
                only if np.allclose(out, last, atol=1e-2) else "the sums differ from NumPy's; is all of k in them?",
            )
            return False
        cycles.append(run.cycles)
    print(f"summed: right. No race, and the sums are NumPy's; {cycles[0]:,} cycles for 4 steps, {cycles[1]:,} for 7")
    return True


def check_update(function: Callable) -> bool:
    """Numbers first, then time: eight pieces, then three."""
    for pieces in (8, 3):
        n = pieces * solution.PIECE
        w, g = np.random.default_rng(pieces).standard_normal((2, n)).astype(np.float32)
        before, right = w.copy(), w + np.float32(solution.ALPHA) * g
        run = _launched("update", function, None, "AIV", w, g)
        if run is None:
            return False
        if not np.allclose(w, right, atol=1e-6):
            _wrong("update", _about_numbers(w, before, g, right))
            return False
        if pieces == 8:
            cycles, serial, best = run.cycles, *(_cycles(k, n) for k in (solution.update_one_piece, solution.update))
            if cycles > SLOWER * best:
                waits = "; each pipe still waits for the others" if cycles > 0.95 * serial else ""
                slow = f"the numbers are right, but it takes {cycles / best:.2f} times as long as two halves do{waits}"
                _wrong(
                    "update", f"{slow}. While one half is updated, the other is to be filled: each needs its own flags"
                )
                return False
    print(f"update: right. {cycles:,} cycles; one piece at a time takes {serial / cycles:.2f} times as long")
    return True


def check_choose_tile(function: Callable[[int, int, int], tuple[int, int, int]]) -> bool:
    """L0C of half the size, of the 910B2's, and of the 950's."""
    for l0c in (2**16, 2**17, 2**18):
        try:
            found = function(2**16, 2**16, l0c)
        except Exception as error:  # the reader's own: told, not raised
            _wrong("choose_tile", f"it raised {type(error).__name__}: {error}")
            return False
        if found is None or found is ...:
            print("choose_tile: not attempted yet")
            return False
        trouble = _about_tile(found, l0c)
        if trouble:
            _wrong("choose_tile", f"with {l0c // 1024} KiB of L0C it gave {found}: {trouble}")
            return False
    m, k, n = function(2**16, 2**16, 2**16)
    fetched = HALF * k * (m + n) // 1024
    print(
        f"choose_tile: right. Half the L0C, {m} × {k} × {n}: {fetched} KiB per {m * k * n // 4096} cycles of the cube"
    )
    return True


def _about_tile(found: object, l0c: int) -> str:
    """What is wrong with a tile, or nothing."""
    if not (isinstance(found, tuple) and len(found) == 3 and all(isinstance(side, int) and side > 0 for side in found)):
        return "expected three positive whole numbers (m, k, n)"
    m, k, n = found
    if any(side % 16 for side in found):
        return "all sides are made of fractals of 16"
    if SUMS * m * n > l0c:
        return f"its sums need {SUMS * m * n // 1024} KiB: they are float32, whatever the factors are"
    if 2 * HALF * k * max(m, n) > 2**16:
        return "two halves of it do not fit L0A and L0B; take a smaller k"
    best_m, _, best_n = solution.choose_tile(2**16, 2**16, l0c)
    traffic, least = 1 / m + 1 / n, 1 / best_m + 1 / best_n
    if traffic > NEAR * least:
        return f"it fetches {traffic / least:.2f} times as much as need be: bytes over FLOPs go as 1/m + 1/n"
    return ""


def _about_numbers(w: np.ndarray, before: np.ndarray, g: np.ndarray, right: np.ndarray) -> str:
    """What the wrong numbers of an update look like."""
    for looks, hint in (
        (before, "w is as it was before: is it copied back?"),
        (before + g, "that is w + g; ALPHA is missing"),
        (before - np.float32(solution.ALPHA) * g, "the sign of ALPHA is turned"),
    ):
        if np.allclose(w, looks, atol=1e-6):
            return hint
    share = np.isclose(w, right, atol=1e-6).mean()
    return f"{share:.0%} of the numbers are right; which pieces are missing, or updated twice?"


def _launched(name: str, kernel: Callable, untouched: Callable | None, unit: str, *arrays: np.ndarray) -> Run | None:
    """The run of a kernel; None, and told why, where it does not run, or is still what the lesson gives."""
    try:
        run = launch(kernel, CHIP, *arrays, unit=unit)
    except CoreError as error:
        text = f"{type(error).__name__}: {error}"
        if untouched and text == _stops(untouched, unit, *arrays):
            print(f"{name}: not attempted yet; as it stands it stops with\n  {text}")
        else:
            _wrong(name, text)
        return None
    except Exception as error:  # the reader's own: told, not raised
        _wrong(name, f"it raised {type(error).__name__}: {error}")
        return None
    if not run.events:
        print(f"{name}: not attempted yet")
        return None
    return run


def _stops(kernel: Callable, unit: str, *arrays: np.ndarray) -> str:
    """The error that a kernel stops with."""
    try:
        launch(kernel, CHIP, *arrays, unit=unit)
    except CoreError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _cycles(kernel: Callable, n: int) -> int:
    return launch(kernel, CHIP, np.zeros(n, np.float32), np.zeros(n, np.float32), unit="AIV").cycles


def _wrong(name: str, why: str) -> None:
    print(f"{name}: not right yet. {why}")
