"""One training step under a layout: where the time goes, and what the fullest rank holds; one layout or 10⁵ at once.

A rank works through m micro-batches of its layers, each at the price of the chip's cost model (share.py); between them
it waits for others: tensor and context parallelism and experts in every layer, the neighbours of the pipeline, and once
a step the gradients of all copies. `plan` adds this up for the slowest rank:

    step = m·(forward + backward + exposed communication) + bubble + exposed gradients + optimizer

What is hidden: the ring of context parallelism behind attention; gradients behind the last backward, gathered weights
behind the first forward; under ``overlap_ep`` the all-to-all of one micro-batch behind the products of another. All
else is exposed. Links are priced by communication.py, bubbles by schedule.py.

    >>> from course_lib.chip import load_system
    >>> from course_lib.plan import load_model
    >>> node = load_system("atlas-800t-a2")
    >>> made = plan(load_model("llama-2-7b"), node, Layout(dp=8, global_batch=64, recompute="full"), 4096)
    >>> made.bound, sorted(made.parts)
    ('matmul', ['CP', 'DP', 'EP', 'PP', 'TP', 'attention', 'bubble', 'launch', 'matmul', 'optimizer', 'vector'])
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from course_lib.chip import ChipSpec, SystemSpec, Work, cost, load_chip
from course_lib.plan import footprint, prices, run, schedule, share, stages
from course_lib.plan.communication import seconds as collective
from course_lib.plan.layers import Number
from course_lib.plan.layout import Layout, LayoutError, check
from course_lib.plan.memory import precision_of
from course_lib.plan.model import Model
from course_lib.plan.run import ADAMW_BYTES

COMPUTE = ("matmul", "attention", "vector", "launch")
PARTS = (*COMPUTE, "TP", "CP", "EP", "PP", "DP", "bubble", "optimizer")
PICO = 1e12
ADAMW = 14  # vector operations per parameter, as the device counts them
CLIPPING = 3  # passes over the gradients: their norm, then each is read and written
TWO_WAY = ("DualPipe", "DualPipeV")
DAY = 86400


@dataclass(frozen=True)
class Step:
    """Seconds by part (the sum is the step), bytes by class on the fullest rank; numbers, or arrays over layouts."""

    model: Model
    system: SystemSpec
    layout: Layout
    context: int
    parts: dict[str, Number]
    memory: dict[str, Number]

    @property
    def seconds(self) -> Number:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def chip(self) -> ChipSpec:
        """The chip, all cores of it."""
        return load_chip(self.system.chip)

    @property
    def tokens(self) -> Number:
        """Of one step."""
        return self.layout.global_batch * self.context

    @property
    def tokens_per_s(self) -> Number:
        """Of all chips together."""
        return self.tokens / self.seconds

    @property
    def held(self) -> Number:
        """Bytes on the fullest rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool | np.ndarray:
        """Whether that is there; UnknownFigure where the chip's memory is unknown."""
        return self.held <= self.chip.require("memory_bytes")

    @property
    def bound(self) -> str | np.ndarray:
        """The part that takes most."""
        found = np.array(PARTS)[np.argmax(np.stack([np.atleast_1d(self.parts[name]) for name in PARTS]), axis=0)]
        return str(found[0]) if np.ndim(self.seconds) == 0 else found

    def mfu(
        self, convention: str = "6N+attention causal", dtype: str = "bfloat16", counts: str = "cube"
    ) -> run.Utilisation:
        """Model FLOPs utilisation, by a named convention and peak."""
        return run.mfu(
            self.model, self.tokens_per_s, self.system.chips, self.chip, convention, self.context, dtype, counts
        )

    def hfu(self, dtype: str = "bfloat16", counts: str = "cube") -> run.Utilisation:
        """Hardware FLOPs utilisation of one layout: recomputation counts; "cheap" repeats no product that is counted."""
        again = {"cheap": "none"}.get(self.layout.recompute, self.layout.recompute)
        rest = (self.context, dtype, counts, self.layout.attention != "plain" and self.model.gated)
        return run.hfu(self.model, self.tokens_per_s, self.system.chips, self.chip, again, *rest)

    def days(self, tokens: Number) -> Number:
        """To train on that many tokens, nothing ever failing."""
        return tokens / self.tokens_per_s / DAY

    def chip_seconds(self, tokens: Number) -> Number:
        """Chips × seconds for that many tokens, from which energy and cost follow."""
        return self.days(tokens) * DAY * self.system.chips

    def energy(self, tokens: Number) -> Number | None:
        """Joules of all chips at their mean power while training; None where nobody has published that power."""
        power = self.chip.busy_power
        return None if power is None else self.chip_seconds(tokens) * power

    def __getitem__(self, which: int) -> "Step":
        """One of many."""
        part, memory = ({k: float(v[which]) for k, v in of.items()} for of in (self.parts, self.memory))
        return replace(self, layout=self.layout[which], parts=part, memory=memory)


def plan(model: Model, system: SystemSpec, layout: Layout, context: int) -> Step:
    """The step of one layout; LayoutError with the reason where it cannot be."""
    if len(layout) != 1:
        raise LayoutError(f"plan takes one layout, found {len(layout)}; use plan_many")
    check(layout, model, system, context)
    found = plan_many(model, system, layout, context)
    return replace(found[0], layout=layout)


def plan_many(model: Model, system: SystemSpec, layout: Layout, context: int) -> Step:
    """The steps of many layouts, all of which can be: see layout.refused. Results are arrays (n,)."""
    wide = layout.many()
    times, kept, again, which = prices.tables(model, system, wide, context)
    parts = {name: np.zeros(len(wide)) for name in PARTS}
    memory = {name: np.zeros(len(wide)) for name in footprint.CLASSES}
    links = prices.links(model, system, wide, context)
    _, names = np.unique(wide.schedule, return_inverse=True)
    keys = (names * 4096 + wide.pp) * 4096 + wide.vpp
    for key in np.unique(keys):
        of = np.flatnonzero(keys == key)
        group = wide[of]
        rank = stages.on_ranks(model, int(group.pp[0]), int(group.vpp[0]), str(group.schedule[0]))
        here = {name: value[of] for name, value in links.items()}
        lines, again_here = times[which[of]], again[which[of]]
        found = _time(model, system, group, rank, lines, here)
        held = _memory(model, group, rank, kept[which[of]], again_here, context)
        for target, values in ((parts, found), (memory, held)):
            for name, value in values.items():
                target[name][of] = value
    return Step(model, system, wide, context, parts, memory)


# -- time ---------------------------------------------------------------------------------------------------------


def _time(model: Model, system: SystemSpec, lay: Layout, rank: np.ndarray, times: np.ndarray, link: dict) -> dict:
    """Seconds by part of layouts that share a pipeline; ``times`` (n, K + 2, 3, groups), ``rank`` (p, K + 2)."""
    m, p, v, name = lay.microbatches, int(lay.pp[0]), int(lay.vpp[0]), str(lay.schedule[0])
    inside = np.array([1.0] * (rank.shape[1] - 2) + [0, 0])
    routed = np.array([_routed(model, index) for index in footprint.kinds(model)[0]] + [0, 0])
    compute = np.einsum("nkfg,rk->nrfg", times, rank)  # seconds by rank, phase, group
    layers, experts = rank @ inside, rank @ routed
    ring = np.maximum(0, link["CP"][:, None, None] * np.array([1, 2]) - times[:, :, :2, 1]) * inside[:, None]
    wait = {  # by rank, forward and backward
        "TP": np.einsum("n,r,f->nrf", link["TP"], layers, [1, 1]) + link["TP"][:, None, None] * [0, 1]
        * layers[:, None] * (lay.recompute == "full")[:, None, None],
        "CP": np.einsum("nkf,rk->nrf", ring, rank),
        "EP": np.einsum("n,r,f->nrf", link["EP"], experts, [1, 1]),
        "PP": np.einsum("n,f->nf", link["PP"], [1, 1])[:, None] * np.full((p, 1), v if p > 1 and name not in TWO_WAY else 0),
    }  # fmt: skip
    phases = compute.sum(3)
    ahead = phases[:, :, 0] + sum(wait[key][:, :, 0] for key in wait)
    back = phases[:, :, 1:].sum(2) + sum(wait[key][:, :, 1] for key in wait)
    a2a = wait["EP"].sum(2)
    busy = ahead + back - a2a
    both = np.where(lay.overlap_ep[:, None], np.maximum(busy, a2a), busy + a2a)  # one forward beside one backward
    slowest = np.argmax(both, axis=1)
    at = np.arange(len(m)), slowest
    alone = np.minimum(m, _alone(name, p))
    out = {group: m * compute[at].sum(1)[:, i] for i, group in enumerate(COMPUTE)}
    out |= {key: m * wait[key][at].sum(1) for key in ("TP", "CP", "PP")}
    hidden = np.where(lay.overlap_ep, m - alone, 0) * (busy + a2a - both)[at]
    out["EP"] = m * a2a[at] - hidden
    mean = [value.mean(1) for value in (ahead, back, phases[:, :, 2], both)]
    out["bubble"] = schedule.idle(name, p, v, *mean) * np.ones(len(m)) if p > 1 else np.zeros(len(m))
    return out | _once(model, system, lay, rank, (ahead[at], back[at]))


def _routed(model: Model, index: int) -> int:
    return int(any(matrix.stored > matrix.active for matrix in share.kind_of(model, index).matrices))


def _alone(name: str, p: int) -> float:
    """Micro-batches of which forward and backward run without a partner, while the pipeline fills and drains, on average.

    DualPipe: of p/2 steps to fill, 2(p/2 − r − 1) + (r + 1) + … of rank r, counted in DeepSeek's dualpipe.py.
    """
    return 1.5 * p - (p / 2 - 1) / 2 - 1 if name in TWO_WAY and p > 1 else p


def _once(model: Model, system: SystemSpec, lay: Layout, rank: np.ndarray, one: tuple) -> dict:
    """What happens once a step, or with ZeRO-2 and 3 once a micro-batch: gradients, weights, optimizer."""
    dense, routed = _parameters(model, lay, rank * stages.copies(str(lay.schedule[0]), int(lay.pp[0])))
    precision, ranks, zero, m = precision_of(lay.precision), lay.cp * lay.dp, lay.zero, lay.microbatches
    groups = ((dense.max(1), ranks, lay.tp), (routed.max(1), ranks // lay.ep, lay.tp * lay.ep))
    seconds = {kind: sum(collective(system, kind, size * n, members, stride) for n, members, stride in groups)
               for kind, size in (("all_reduce", precision.gradients), ("reduce_scatter", precision.gradients),
                                  ("all_gather", precision.weights))}  # fmt: skip
    ahead, back = (np.where(lay.overlap_dp, value, 0) for value in one)
    reduced = np.where(zero == 0, seconds["all_reduce"], seconds["reduce_scatter"])
    gathered = np.where(zero == 0, 0, seconds["all_gather"])
    late = np.maximum(0, reduced + np.where(zero == 3, gathered, 0) - back) * np.where(zero >= 2, m, 1)
    early = np.maximum(0, gathered - ahead) * np.where(zero == 3, m, 1)
    updated = sum((n / np.where(zero == 0, 1, np.maximum(members, 1))) for n, members, _ in groups)
    return {"DP": late + early, "optimizer": updated * _per_parameter(system.chip, lay.precision)}


@lru_cache(maxsize=64)
def _per_parameter(chip: str, precision: str) -> float:
    """Seconds to clip and update one parameter, of many."""
    p, n = precision_of(precision), 10**9
    written = p.states + p.weights
    work = Work((), ADAMW * n, "float32", (ADAMW_BYTES[precision] - written) * n, written * n)
    clipping = Work(bytes_read=2 * p.gradients * n, bytes_written=(CLIPPING - 2) * p.gradients * n)
    return (cost(load_chip(chip), work).ps + cost(load_chip(chip), clipping).ps) / PICO / n


def _parameters(model: Model, lay: Layout, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters on each rank outside and inside the routed experts, (n, p) each."""
    pairs, which = np.unique(np.stack([lay.tp, lay.ep], 1), axis=0, return_inverse=True)
    table = np.array(
        [footprint.of_kinds(model, footprint.kinds(model)[0], int(t), int(e), len(rank) == 1) for t, e in pairs]
    )
    held = np.einsum("uck,rk->ucr", table, rank)[which.ravel()]
    return held[:, 0], held[:, 1]


# -- memory -------------------------------------------------------------------------------------------------------


def _memory(model: Model, lay: Layout, rank: np.ndarray, kept: np.ndarray, again: np.ndarray, context: int) -> dict:
    """Bytes by class on the rank that holds most."""
    p, v, name, m = int(lay.pp[0]), int(lay.vpp[0]), str(lay.schedule[0]), lay.microbatches
    dense, routed = _parameters(model, lay, rank * stages.copies(name, p))
    over = (lay.cp * lay.dp)[:, None]
    held = footprint.states(
        dense, routed, lay.precision, over, lay.ep[:, None], np.broadcast_to(lay.zero[:, None], dense.shape)
    )
    flight = footprint.in_flight(name, p, v, m) if p > 1 else np.ones((len(m), 1))
    held["activations"] = (kept @ rank.T) * flight + again[:, None]
    logits = footprint.LOGITS * lay.micro_batch * context / lay.cp * model.vocab_size / lay.tp
    held["logits"] = logits[:, None] * (rank[:, -1] > 0)
    groups = 1 + sum((np.asarray(value) > 1).astype(int) for value in (lay.tp, lay.cp, lay.pp, lay.ep, lay.dp))
    held["communicators"] = np.broadcast_to((footprint.BUFFER * groups)[:, None], dense.shape)
    fullest = np.argmax(sum(held.values()), axis=1)
    return {key: np.broadcast_to(value, dense.shape)[np.arange(len(m)), fullest] for key, value in held.items()}
