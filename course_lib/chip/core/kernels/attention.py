"""Flash attention forward: softmax(q kᵀ · scale) v without the matrix of scores, on one AIC and its two AIVs at a time.

    run = launch(attention, "ascend-910b2", q, k, v, out, *workspace(24, head=128), unit="MIX", blocks=24)

The cube makes a block of scores, the vector cores turn it into probabilities, the cube multiplies those with v. On A2
and A3 no wire joins L0C and UB, so blocks pass through GM (in fact through L2), announced by cross-core flags:

    AIC  scores = q kᵀ   → SCORES →  AIV  probs = e^(scores − max)   → PROBS →  AIC  probs v   → VALUES →  AIV  add up

A row's maximum is known only at its end. Until then what was added up with an old maximum is corrected by
e^(old − new) when a larger one comes (arXiv 1805.02867, arXiv 2205.14135). Cube and vector would wait for each other
at each block; so the cube makes scores ``ahead`` blocks before their probabilities are due.
"""

from dataclasses import dataclass

import numpy as np

from course_lib.chip.core.buffers import GlobalTensor, LocalTensor
from course_lib.chip.core.isa import Core
from course_lib.chip.core.kernels.tiles import mine, pieces

SCORES, PROBS, VALUES = 0, 1, 2  # cross-core flags: such a block lies in GM
LEAST = -1e30  # instead of −∞, of which e^(−∞ − −∞) would be no number


@dataclass(frozen=True)
class Plan:
    """What AIC and AIVs agree on. ``blocks``: (first query, queries, key blocks as (first, size)) of this core."""

    blocks: list[tuple[int, int, list[tuple[int, int]]]]
    block: int
    ahead: int
    scale: float


def workspace(cores: int, head: int, block: int = 128, ahead: int = 2, dtype: str = "float16") -> tuple[np.ndarray, ...]:
    """Scores, probabilities and products of ``cores`` AI cores in GM, (cores · (ahead + 1) · block, block or head)."""
    rows = cores * (ahead + 1) * block
    return np.zeros((rows, block), np.float32), np.zeros((rows, block), dtype), np.zeros((rows, head), np.float32)


def attention(
    core: Core, q: GlobalTensor, k: GlobalTensor, v: GlobalTensor, out: GlobalTensor, scores: GlobalTensor,
    probs: GlobalTensor, values: GlobalTensor, mask: GlobalTensor | None = None, block: int = 128, ahead: int = 2,
) -> None:  # fmt: skip
    """One head: q (Tq, K), k and v (Tk, K) float16, out (Tq, K) float32; Tq, Tk, K multiples of 16, K at most 128.

    ``mask`` (block, block) float32 makes it causal: it is added to blocks on the diagonal (0 where a query sees the
    key, −10^30 where not), and blocks beyond are left out. ``ahead=0`` is the naive order: cube and vector in turn.
    """
    queries = mine(core, list(pieces(q.shape[0], block)))
    keys = list(pieces(k.shape[0], block))
    blocks = [(i, m, [(j, n) for j, n in keys if mask is None or j <= i]) for i, m in queries]
    plan = Plan(blocks, block, ahead, q.shape[1] ** -0.5)
    if core.unit == "AIC":
        _cube(core, q, k, v, scores, probs, values, plan)
    else:
        _vector(core, out, scores, probs, values, mask, plan)


def _slot(core: Core, plan: Plan, j: int) -> int:
    """First row in the workspace of this core's key block number ``j``."""
    return (core.GetBlockIdx() * (plan.ahead + 1) + j % (plan.ahead + 1)) * plan.block


# -- the cube: scores and products -----------------------------------------------------------------


def _cube(core: Core, q: GlobalTensor, k: GlobalTensor, v: GlobalTensor, scores: GlobalTensor, probs: GlobalTensor,
          values: GlobalTensor, plan: Plan) -> None:  # fmt: skip
    head, size = q.shape[1], plan.block
    product = _Product(core, q.dtype, size, head)
    query = core.LocalTensor("L1", (size, head), q.dtype)
    core.SetFlag("MTE1_MTE2", 2)
    for i, m, keys in plan.blocks:
        core.WaitFlag("MTE1_MTE2", 2)
        core.DataCopy(query[:m], q[i : i + m])
        core.SetFlag("MTE2_MTE1", 2)
        core.WaitFlag("MTE2_MTE1", 2)
        for step in range(len(keys) + plan.ahead):
            if step < len(keys):
                (j, n), row = keys[step], _slot(core, plan, step)
                product(query[:m], k[j : j + n], scores[row : row + m, :n], SCORES, transpose=True)
            if step >= plan.ahead:
                (j, n), row = keys[step - plan.ahead], _slot(core, plan, step - plan.ahead)
                product(probs[row : row + m, :n], v[j : j + n], values[row : row + m], VALUES, transpose=False)
        core.SetFlag("MTE1_MTE2", 2)
    core.WaitFlag("MTE1_MTE2", 2)
    product.end()


class _Product:
    """left @ right (transposed if asked) to GM, with two halves of L1, L0A, L0B and L0C that take turns."""

    def __init__(self, core: Core, dtype: str, block: int, head: int) -> None:
        self.core, self.half, deep = core, 0, max(block, head)
        self.left = [core.LocalTensor("L1", (block, block), dtype) for _ in range(2)]
        self.right = [core.LocalTensor("L1", (block, head), dtype) for _ in range(2)]
        self.l0a = [core.LocalTensor("L0A", (block, deep), dtype) for _ in range(2)]
        self.l0b = [core.LocalTensor("L0B", (deep, deep), dtype) for _ in range(2)]
        self.l0c = [core.LocalTensor("L0C", (block, deep), "float32") for _ in range(2)]
        for half in (0, 1):
            for event in ("MTE1_MTE2", "M_MTE1", "FIX_M"):
                core.SetFlag(event, half)

    def __call__(
        self, left: LocalTensor | GlobalTensor, right: GlobalTensor, out: GlobalTensor, ready: int, transpose: bool
    ) -> None:
        core, half = self.core, self.half
        (m, depth), n = left.shape, right.shape[0] if transpose else right.shape[1]
        core.WaitFlag("MTE1_MTE2", half)
        here = self.right[half][: right.shape[0]]
        core.DataCopy(here, right)
        if isinstance(left, GlobalTensor):
            core.CrossCoreWaitFlag(PROBS, "MTE2")
            core.DataCopy(self.left[half][:m, :depth], left)
            left = self.left[half][:m, :depth]
        core.SetFlag("MTE2_MTE1", half)
        core.WaitFlag("MTE2_MTE1", half)
        core.WaitFlag("M_MTE1", half)
        a, b, c = self.l0a[half].as_shape(m, depth), self.l0b[half].as_shape(depth, n), self.l0c[half].as_shape(m, n)
        core.LoadData(a, left)
        core.LoadData(b, here, transpose=transpose)
        core.SetFlag("MTE1_MTE2", half)
        core.SetFlag("MTE1_M", half)
        core.WaitFlag("MTE1_M", half)
        core.WaitFlag("FIX_M", half)
        core.Mmad(c, a, b)
        core.SetFlag("M_MTE1", half)
        core.SetFlag("M_FIX", half)
        core.WaitFlag("M_FIX", half)
        core.Fixpipe(out, c)
        core.SetFlag("FIX_M", half)
        core.CrossCoreSetFlag(2, "FIX", ready)
        self.half = 1 - half

    def end(self) -> None:
        """Nothing is left set."""
        for half in (0, 1):
            for event in ("MTE1_MTE2", "M_MTE1", "FIX_M"):
                self.core.WaitFlag(event, half)


# -- the vector cores: softmax as the blocks come --------------------------------------------------


def _vector(core: Core, out: GlobalTensor, scores: GlobalTensor, probs: GlobalTensor, values: GlobalTensor,
            mask: GlobalTensor | None, plan: Plan) -> None:  # fmt: skip
    """Each of the two AIVs takes half of the rows of every block."""
    rows = _Rows(core, plan, probs.dtype, out.shape[1], mask)
    for i, m, keys in plan.blocks:
        mine, first = m // 2, core.GetSubBlockIdx() * (m // 2)
        rows.start(mine)
        for step in range(len(keys) + plan.ahead):
            if step < len(keys):
                (j, n), row = keys[step], _slot(core, plan, step) + first
                tile = None if mask is None or j != i else mask[first : first + mine, :n]
                rows.softmax(scores[row : row + mine, :n], tile, probs[row : row + mine, :n], step)
            if step >= plan.ahead:
                row = _slot(core, plan, step - plan.ahead) + first
                rows.add(values[row : row + mine], step - plan.ahead)
        rows.finish(out[i + first : i + first + mine])
    rows.end()


class _Rows:
    """Some rows of queries: their running maximum and sum, and what has been added up of v."""

    def __init__(self, core: Core, plan: Plan, dtype: str, head: int, mask: GlobalTensor | None) -> None:
        half, self.core, self.plan = plan.block // 2, core, plan
        self.scores = core.LocalTensor("UB", (half, plan.block), "float32")
        self.mask = None if mask is None else core.LocalTensor("UB", (half, plan.block), "float32")
        self.probs = core.LocalTensor("UB", (half, plan.block), dtype)
        self.result = core.LocalTensor("UB", (half, head), "float32")
        self.values = core.LocalTensor("UB", (half, head), "float32")
        self.column = core.LocalTensor("UB", (half, 8), "float32")
        self.old, self.new, self.total, self.sum = (core.LocalTensor("UB", half, "float32") for _ in range(4))
        self.shrink = [core.LocalTensor("UB", half, "float32") for _ in range(plan.ahead + 1)]
        core.SetFlag("V_MTE2", 0)  # scores and mask are free
        core.SetFlag("V_MTE2", 1)  # values are free
        core.SetFlag("MTE3_V", 0)  # probs are free
        core.SetFlag("MTE3_V", 1)  # result is free

    def start(self, rows: int) -> None:
        """``rows`` rows of queries, of which nothing is known yet."""
        self.rows = rows
        self.core.WaitFlag("MTE3_V", 1)
        self.core.Duplicate(self.old, LEAST)
        self.core.Duplicate(self.new, LEAST)
        self.core.Duplicate(self.total, 0.0)
        self.core.Duplicate(self.sum, 0.0)
        self.core.Duplicate(self.result, 0.0)

    def softmax(self, source: GlobalTensor, mask: GlobalTensor | None, target: GlobalTensor, number: int) -> None:
        """probs = e^(scores − new maximum), and how much the new maximum shrinks what was added up before."""
        core, shape = self.core, source.shape
        scores, probs, column = self.scores.as_shape(*shape), self.probs.as_shape(*shape), self.column[: self.rows]
        shrink = self.shrink[number % len(self.shrink)]
        core.WaitFlag("V_MTE2", 0)
        if mask is not None:
            core.DataCopy(self.mask.as_shape(*shape), mask)
        core.CrossCoreWaitFlag(SCORES, "MTE2")
        core.DataCopy(scores, source)
        core.SetFlag("MTE2_V", 0)
        core.WaitFlag("MTE2_V", 0)
        core.Muls(scores, scores, self.plan.scale)
        if mask is not None:
            core.Add(scores, scores, self.mask.as_shape(*shape))
        core.WholeReduceMax(self.new, scores)
        core.Max(self.new, self.new, self.old)
        core.Brcb(column, self.new)
        core.Sub(scores, scores, column)
        core.Exp(scores, scores)
        core.WaitFlag("MTE3_V", 0)
        core.Cast(probs, scores)
        core.SetFlag("V_MTE3", 0)
        core.WholeReduceSum(self.sum, scores)
        core.SetFlag("V_MTE2", 0)
        core.Sub(shrink, self.old, self.new)
        core.Exp(shrink, shrink)
        core.Mul(self.total, self.total, shrink)
        core.Add(self.total, self.total, self.sum)
        core.Adds(self.old, self.new, 0.0)
        core.WaitFlag("V_MTE3", 0)
        core.DataCopy(target, probs)
        core.SetFlag("MTE3_V", 0)
        core.CrossCoreSetFlag(2, "MTE3", PROBS)

    def add(self, source: GlobalTensor, number: int) -> None:
        """result = result · shrink + probs v."""
        core, column = self.core, self.column[: self.rows]
        values, result = self.values[: self.rows], self.result[: self.rows]
        core.WaitFlag("V_MTE2", 1)
        core.CrossCoreWaitFlag(VALUES, "MTE2")
        core.DataCopy(values, source)
        core.SetFlag("MTE2_V", 1)
        core.WaitFlag("MTE2_V", 1)
        core.Brcb(column, self.shrink[number % len(self.shrink)])
        core.Mul(result, result, column)
        core.Add(result, result, values)
        core.SetFlag("V_MTE2", 1)

    def finish(self, target: GlobalTensor) -> None:
        """Divide by the sum, and write out."""
        core, result, column = self.core, self.result[: self.rows], self.column[: self.rows]
        core.Brcb(column, self.total)
        core.Div(result, result, column)
        core.SetFlag("V_MTE3", 1)
        core.WaitFlag("V_MTE3", 1)
        core.DataCopy(target, result)
        core.SetFlag("MTE3_V", 1)

    def end(self) -> None:
        """Nothing is left set."""
        for event in ("V_MTE2", "MTE3_V"):
            for event_id in (0, 1):
                self.core.WaitFlag(event, event_id)
