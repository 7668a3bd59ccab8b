"""AdamW as one kernel: four vectors in, three out, and everything between them in UB.

    run = launch(partial(adamw, step=1), "ascend-910b2", p, g, m, v, unit="AIV", blocks=48)

    m = β1 m + (1 − β1) g          v = β2 v + (1 − β2) g²
    p = p (1 − lr · decay) − lr · (m / (1 − β1^t)) / (sqrt(v / (1 − β2^t)) + eps)

An optimizer step is a dozen vector operations an element. Each as a kernel of its own would carry 8 or 12 bytes an
element through HBM every time; fused, it is 28 bytes once, and memory alone decides how long it takes.
"""

from course_lib.chip.core.buffers import BLOCK, GlobalTensor, LocalTensor
from course_lib.chip.core.isa import Core
from course_lib.chip.core.kernels.tiles import mine, pieces, up


def adamw(
    core: Core, p: GlobalTensor, g: GlobalTensor, m: GlobalTensor, v: GlobalTensor, step: int = 1, lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, decay: float = 0.01, size: int = 4096,
) -> None:  # fmt: skip
    """One step on p, g, m, v, float32 vectors (n) in GM; p, m and v are updated in place. ``step`` counts from 1.

    ``size`` elements at a time, a multiple of 8, in two halves of UB.
    """
    tensors = (p, g, m, v)
    halves = [[core.LocalTensor("UB", size, "float32") for _ in tensors] for _ in range(2)]
    scratch = core.LocalTensor("UB", size, "float32")
    for half in (0, 1):
        core.SetFlag("MTE3_MTE2", half)
    for turn, (start, n) in enumerate(mine(core, list(pieces(p.shape[0], size)))):
        half, whole = turn % 2, up(n, BLOCK // 4)
        parts = [place[:whole] for place in halves[half]]
        core.WaitFlag("MTE3_MTE2", half)
        for part, tensor in zip(parts, tensors):
            core.DataCopy(part, tensor[start : start + n])
        core.SetFlag("MTE2_V", half)
        core.WaitFlag("MTE2_V", half)
        _update(core, *parts, scratch[:whole], step, lr, betas, eps, decay)
        core.SetFlag("V_MTE3", half)
        core.WaitFlag("V_MTE3", half)
        for part, tensor in zip(parts, tensors):
            if tensor is not g:
                core.DataCopy(tensor[start : start + n], part)
        core.SetFlag("MTE3_MTE2", half)
    for half in (0, 1):
        core.WaitFlag("MTE3_MTE2", half)


def _update(
    core: Core, p: LocalTensor, g: LocalTensor, m: LocalTensor, v: LocalTensor, t: LocalTensor, step: int, lr: float,
    betas: tuple[float, float], eps: float, decay: float,
) -> None:  # fmt: skip
    """The formula, in UB; ``t`` is scratch, and g is used up."""
    beta1, beta2 = betas
    core.Muls(m, m, beta1)
    core.Axpy(m, g, 1 - beta1)
    core.Mul(t, g, g)
    core.Muls(v, v, beta2)
    core.Axpy(v, t, 1 - beta2)
    core.Muls(t, v, 1 / (1 - beta2**step))  # the averages start at 0 and are too small by this much
    core.Sqrt(t, t)
    core.Adds(t, t, eps)
    core.Muls(g, m, 1 / (1 - beta1**step))
    core.Div(g, g, t)
    core.Muls(p, p, 1 - lr * decay)
    core.Axpy(p, g, -lr)
