"""The best layouts of a model on a system: every combination of degrees that can be, priced, those that fit kept.

Nothing is pruned by rule of thumb: a layout drops out because it cannot be (layout.refused says why) or because it does
not fit into memory. Of the rest the fastest are shown, each with what it spends its time on.

    >>> from course_lib.chip import load_system
    >>> from course_lib.plan import load_model
    >>> found = search(load_model("llama-2-7b"), load_system("atlas-800t-a2"), 4096, global_batch=64)
    >>> found.tried, int(found.steps.layout.tp[found.order[0]])
    (1764, 1)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from course_lib.chip import SystemSpec
from course_lib.plan.layout import Layout, refused
from course_lib.plan.model import Model
from course_lib.plan.step import PARTS, Step, plan_many

POWERS = tuple(2**n for n in range(14))
ONE_STAGE = ("1F1B", "InterleavedZeroBubble")
PARTS_OF_LINKS = ("TP", "CP", "EP", "PP", "DP")


@dataclass(frozen=True)
class Found:
    """Of ``tried`` layouts: ``refusals`` by code of layout.RULES, ``steps`` of those that can be, ``order`` the best that fit."""

    tried: int
    refusals: dict[int, int]
    steps: Step
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def best(self, count: int = 5) -> list[Step]:
        """The fastest that fit, one by one."""
        return [self.steps[int(place)] for place in self.order[:count]]

    def table(self, count: int = 5) -> str:
        """The fastest as lines: seconds, MFU, memory, the three largest parts besides products, what binds."""
        can = len(self.steps.seconds)
        refusals, full = self.tried - can, can - len(self)
        lines = [f"{self.tried:,} layouts: {refusals:,} cannot be, {full:,} do not fit, {len(self):,} are left"]
        return "\n".join(lines + [line(step) for step in self.best(count)])


def search(
    model: Model, system: SystemSpec, context: int, global_batch: int, gemm: str = "bfloat16",
    tp: Sequence[int] = (1, 2, 4, 8, 16), cp: Sequence[int] = (1, 2, 4), vpp: Sequence[int] = (1, 2, 4),
    micro_batch: Sequence[int] = (1, 2, 4), zero: Sequence[int] = (0, 1, 2, 3),
    recompute: Sequence[str] = ("none", "cheap", "full"), **fixed: object,
) -> Found:  # fmt: skip
    """All layouts of ``system.chips`` chips over these degrees; PP and EP over all powers of two, DP is what remains.

    Schedules: 1F1B and zero bubble, interleaved where vpp > 1, DualPipe with its overlap for models with experts.
    ``fixed``: other fields of Layout. LayoutError for a word that Layout has not.
    """
    made = candidates(model, system, global_batch, tp, cp, vpp, micro_batch, zero, recompute, gemm=gemm, **fixed)
    codes = refused(made, model, system, context)
    steps = plan_many(model, system, made[np.flatnonzero(codes == 0)], context)
    fits = np.flatnonzero(steps.fits)
    counted = {int(code): int((codes == code).sum()) for code in np.unique(codes) if code}
    return Found(len(made), counted, steps, fits[np.argsort(steps.seconds[fits], kind="stable")])


def candidates(
    model: Model, system: SystemSpec, global_batch: int, tp: Sequence[int], cp: Sequence[int], vpp: Sequence[int],
    micro_batch: Sequence[int], zero: Sequence[int], recompute: Sequence[str], **fixed: object,
) -> Layout:  # fmt: skip
    """The grid of layouts, refused ones among them; DP is the chips that TP, CP and PP leave."""
    chips = system.chips
    pp = [p for p in POWERS if p <= min(chips, model.layers + model.mtp)]
    ep = [e for e in POWERS if model.experts and e <= model.experts.routed] or [1]
    ways = [("1F1B", 1), ("InterleavedZeroBubble", 1)] + [("Interleaved1F1B", v) for v in vpp if v > 1]
    ways += [("DualPipe", 1)] if model.experts else []
    axes = (tp, cp, pp, range(len(ways)), ep, micro_batch, zero, range(len(recompute)))
    columns = [axis.ravel() for axis in np.meshgrid(*[np.asarray(axis) for axis in axes], indexing="ij")]
    keep = (chips % (columns[0] * columns[1] * columns[2]) == 0) & ((columns[2] > 1) | (columns[3] == 0))
    t, c, p, way, e, b, z, again = (column[keep] for column in columns)
    names, chunks = np.array([name for name, _ in ways]), np.array([v for _, v in ways])
    return Layout(
        dp=chips // (t * c * p), tp=t, cp=c, pp=p, vpp=chunks[way], ep=e, zero=z, micro_batch=b, global_batch=global_batch,
        sp=t > 1, recompute=np.array(recompute)[again], schedule=names[way], overlap_ep=names[way] == "DualPipe", **fixed,
    )  # fmt: skip


def binds(step: Step) -> str:
    """What to work on: the part that takes most besides products, and memory where more than nine tenths are taken."""
    rest = {name: step.parts[name] for name in PARTS if name != "matmul"}
    name = max(rest, key=rest.get)
    link = "link of " if name in PARTS_OF_LINKS else ""
    full = step.held / step.chip.require("memory_bytes")
    return f"{link}{name}" + (f", memory {full:.0%} full" if full > 0.9 else "")


def line(step: Step) -> str:
    """One layout and its step."""
    mfu = step.mfu().value
    shares = sorted(((value / step.seconds, name) for name, value in step.parts.items()), reverse=True)[:4]
    spent = ", ".join(f"{name} {share:.0%}" for share, name in shares if share >= 0.005)
    unknown = "unknown" if mfu is None else f"{mfu:.1%}"
    return f"{step.seconds:8.3f} s  MFU {unknown}  {step.held / 2**30:5.1f} GiB  {step.layout}: {spent}; binds: {binds(step)}"
