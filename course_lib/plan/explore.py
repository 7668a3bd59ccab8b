"""Search among thousands of designs: how fast each does a job, what binds it, and which ones nobody beats.

A `Job` is a list of operators, with the bytes that it keeps in HBM and those that it sends out of the chip. Its time on a
design is the device's own cost model, operator by operator (`course_lib.chip.cost`); sending overlaps with computing, so
the longer counts. No design is faster than FLOPs over peak and bytes over bandwidth: that `bound` takes microseconds for
thousands of designs, and lets `best` and `front` price only those that could still win. The answer is the same as if all
had been priced.

    >>> from course_lib.plan import load_model
    >>> from course_lib.plan.design import Design, grid
    >>> job = decode(load_model("llama-2-7b"), batch=16, context=2048)
    >>> designs = within(grid(cores=[8, 16, 24], stacks=[2, 4, 6]), [job], mm2=660, w=420)
    >>> best(job, designs).design.stacks
    6
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from course_lib.chip import ChipSpec, Matmul, Work, cost
from course_lib.chip.figures import DTYPES
from course_lib.plan import activations, memory
from course_lib.plan.design import KIB, Design, area, base, chip, port, watts
from course_lib.plan.layers import count
from course_lib.plan.model import Model
from course_lib.plan.operators import operators
from course_lib.plan.run import ADAMW_BYTES

PICO = 1e-12
PRECISION = "bfloat16, ZeRO"
SUMS = 4  # bytes of a sum in L0C


@dataclass(frozen=True)
class Job:
    """``works``: operators and how often each runs; ``held``: bytes in HBM; ``sent``: bytes out of the chip."""

    name: str
    works: tuple[tuple[Work, int], ...]
    held: float
    sent: float = 0


@dataclass(frozen=True)
class Outcome:
    """A job on a chip: seconds, and the share of them that each resource binds ("cube", "L2", "memory", …, "links")."""

    seconds: float
    shares: dict[str, float]

    @property
    def bound(self) -> str:
        """What binds most of the time."""
        return max(self.shares, key=self.shares.get)


@dataclass(frozen=True)
class Found:
    """One design and what it makes of each job."""

    design: Design
    outcomes: tuple[Outcome, ...]

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each job."""
        return tuple(one.seconds for one in self.outcomes)


# -- jobs ---------------------------------------------------------------------------------------------------


def prefill(model: Model, batch: int, tokens: int) -> Job:
    """Reading ``batch`` prompts of ``tokens``; weights in bfloat16 and the cache are held."""
    works = _forward(model, batch, tokens, tokens)
    return Job(f"prefill, {batch} × {tokens:,} tokens", works, memory.total(memory.inference(model, batch, tokens)))


def decode(model: Model, batch: int, context: int) -> Job:
    """One more token for each of ``batch`` readers with ``context`` tokens behind them."""
    held = memory.total(memory.inference(model, batch, context))
    return Job(f"decode, {batch} readers, {context:,} tokens", _forward(model, batch, 1, context), held)


def train(model: Model, batch: int, tokens: int, chips: int) -> Job:
    """One step of ``chips`` chips on ``batch`` × ``tokens`` tokens each, all states sharded (ZeRO stage 3, FSDP).

    Backward multiplies twice for each product of forward; flash attention's has five products for two. Weights are
    gathered twice and gradients reduced once, (P − 1)/P of 2 bytes each time. AdamW moves its shard once.
    """
    forward = [(op.work, op.layers) for op in operators(model, batch, tokens)]
    backward = [(one, layers) for work, layers in forward for one in _backward(work)]
    n, p = count(model).total, memory.precision_of(PRECISION)
    half = ADAMW_BYTES[PRECISION] // 2 * n // chips
    works = _counted([*forward, *backward, (Work(bytes_read=half, bytes_written=half), 1)])
    kept = activations.total(activations.of_model(model, batch, tokens, p.weights))
    held = memory.total(memory.states(n, PRECISION, chips, 3)) + kept
    return Job(f"training, {batch} × {tokens:,} tokens a chip, {chips} chips", works, held, 6 * n * (chips - 1) / chips)


def _forward(model: Model, batch: int, tokens: int, context: int) -> tuple[tuple[Work, int], ...]:
    return _counted((op.work, op.layers) for op in operators(model, batch, tokens, context, absorbed=tokens == 1))


def _counted(works: Iterable[tuple[Work, int]]) -> tuple[tuple[Work, int], ...]:
    """Equal operators together: query and output of a layer, say."""
    found = Counter()
    for work, times in works:
        found[work] += times
    return tuple(found.items())


def _backward(work: Work) -> list[Work]:
    """The operators of backward: gradients of input and weight, or of attention in one kernel."""
    read, written = work.bytes_read, work.bytes_written
    if len(work.matmuls) > 1 and work.vector_flops:
        products = (*work.matmuls, *work.matmuls, work.matmuls[0])
        return [Work(products, work.vector_flops, work.vector_dtype, read + 2 * written, read)]
    found = []
    for one in work.matmuls:
        b, m, k, n = one.batch, one.m, one.k, one.n
        for shape in ((b, m, n, k), (b, k, m, n)):
            found.append(Work((Matmul(*shape, one.dtype),), 0, work.vector_dtype, (read + written) // 2, read // 2))
    return found


# -- time ---------------------------------------------------------------------------------------------------


def run(job: Job, spec: ChipSpec, link: float) -> Outcome:
    """``job`` on a chip with ``link`` B/s to the others, by the cost model."""
    paid = [(cost(spec, work), times) for work, times in job.works]
    computing = sum(one.ps * times for one, times in paid) * PICO
    sending = job.sent / link
    if sending > computing:
        return Outcome(sending, {"links": 1.0})
    shares = Counter()
    for one, times in paid:
        shares[one.bound] += one.ps * times * PICO / computing
    return Outcome(computing, dict(shares.most_common()))


def price(design: Design, jobs: Sequence[Job]) -> Found:
    """One design on each job."""
    spec = chip(design)
    return Found(design, tuple(run(job, spec, design.link) for job in jobs))


def bound(job: Job, designs: Design) -> np.ndarray:
    """Seconds that no design beats: for each operator the longest of arithmetic, HBM, the cores' ports to HBM, and L2.

    Through the ports to L2 goes what tiles ask for: a tile of m × n sums takes m + n numbers for m·n multiply-adds, which
    is least for a square that fills L0C.
    """
    cycles = designs.cores * designs.clock
    side, l2 = np.sqrt(designs.l0c * KIB / SUMS), base().require("paths.l2_read") * cycles
    total = np.zeros(len(designs))
    for work, times in job.works:
        macs = sum(one.batch * one.m * one.k * one.n for one in work.matmuls)
        fetched = sum(2 * DTYPES[one.dtype] * one.batch * one.m * one.k * one.n for one in work.matmuls)
        needs = [2 * macs / designs.peak, (work.bytes_read + work.bytes_written) / designs.memory_bandwidth]
        needs += [work.bytes_read / (port(designs) * cycles), fetched / side / l2]
        total += times * np.max(np.broadcast_arrays(*needs), axis=0)
    return np.maximum(total, job.sent / designs.link)


# -- search -------------------------------------------------------------------------------------------------


def within(designs: Design, jobs: Sequence[Job], mm2: float, w: float, each: dict[str, float] | None = None) -> Design:
    """Those with at most ``mm2`` of silicon and ``w`` watts whose memory holds every job. ValueError if there are none.

    ``each``: what silicon costs, if not the middle of `design.constants`.
    """
    held, sizes = max(job.held for job in jobs), area(designs, each)
    fitting = (sizes <= mm2) & (watts(designs, sizes) <= w) & (designs.memory >= held)
    if not np.any(fitting):
        raise ValueError(f"none of {len(designs)} designs has {held / 1e9:.0f} GB within {mm2:.0f} mm² and {w:.0f} W")
    return designs[np.flatnonzero(np.broadcast_to(fitting, len(designs)))]


def best(job: Job, designs: Design) -> Found:
    """The fastest design for one job; of equals the smallest."""
    least, sizes = bound(job, designs), np.broadcast_to(area(designs), len(designs))
    winner, shortest = None, (np.inf, np.inf)
    for place in np.lexsort((sizes, least)):
        if least[place] > shortest[0]:
            break
        found = price(designs[int(place)], [job])
        if (found.seconds[0], sizes[place]) < shortest:
            winner, shortest = found, (found.seconds[0], sizes[place])
    return winner


def front(jobs: Sequence[Job], designs: Design, silicon: bool = False) -> list[Found]:
    """The designs that no other beats in all jobs, by rising time of the first; ``silicon``: nor in area.

    With one job and ``silicon`` it is the curve of what a job's time costs in mm².
    """
    sizes = np.broadcast_to(area(designs), len(designs))
    least, there = np.stack([*(bound(job, designs) for job in jobs), *[sizes] * silicon], axis=1), {}
    for place in np.lexsort((sizes, least.prod(axis=1))):
        reached, found = _priced_while_it_could_win(designs, int(place), jobs, least[place].copy(), there)
        if found:
            there = {one: kept for one, kept in there.items() if not beats(reached, one)} | {reached: found}
    return [there[one] for one in sorted(there)]


def _priced_while_it_could_win(
    designs: Design, place: int, jobs: Sequence[Job], reached: np.ndarray, there: dict[tuple, Found]
) -> tuple[tuple, Found | None]:
    """What one design reaches, job by job in place of its bounds, until one of ``there`` beats it (then None)."""
    outcomes, spec, design = [], None, None
    for place_of_job, job in enumerate((*jobs, None)):
        if any(beats(one, reached) for one in there):
            return (), None
        if job:
            design = design or designs[place]
            spec = spec or chip(design)
            outcomes.append(run(job, spec, design.link))
            reached[place_of_job] = outcomes[-1].seconds
    return tuple(reached.tolist()), Found(design, tuple(outcomes))


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """At least as good in everything."""
    return all(a <= b for a, b in zip(one, other, strict=True))
