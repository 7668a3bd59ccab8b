"""A step on thousands of chips by execution: the course's own program, run as one rank of each kind, and put together.

    job = Job(published("llama-2-70b", 4096), Layout(tp=8, pp=4), load_system("atlas-800t-a2").having(nodes=4), rows=1024)
    print(step(job).seconds, step(job).memory)

Ranks of a pipeline differ by their stages: which layers, and the embedding or the loss. One rank of each kind runs a few
micro-batches, shape-only, alone (course_lib.parallel.alone); its ledger gives how long it needs for each action, what
of its communication nothing hides, and what memory it takes. How the stages wait for each other follows from the
schedule's own table (plan.timetable) with all micro-batches; after the last, all reduce gradients and step.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import TYPE_CHECKING, NamedTuple

from course_lib.chip.spec import SystemSpec
from course_lib.llm.config import Config
from course_lib.parallel import tables
from course_lib.parallel.alone import alone
from course_lib.parallel.mesh import Layout
from course_lib.parallel.stages import cut
from course_lib.plan.timetable import replay

if TYPE_CHECKING:
    from course_lib.npu import Ledger

PS = 1e-12
AT_ONCE = 2  # ranks that run at the same time on this machine
Mark = tuple[str, int, int]  # an action, such as "0F3", and from when to when: picoseconds


@dataclass(frozen=True)
class Job:
    """A training run: `config` in `layout` on chips of `system`, steps of `rows` sequences of its context.

    ``micro_batch`` in sequences; ``schedule`` and ``vpp`` where there is a pipeline; ``sequence`` and ``recompute`` as
    `parallel.mesh.Combined` has them. Weights are bfloat16, main weights float32 and divided by ZeRO-1, experts even.
    """

    config: Config
    layout: Layout
    system: SystemSpec
    rows: int
    micro_batch: int = 1
    schedule: str = "1F1B"
    vpp: int = 1
    sequence: bool = True
    recompute: str = "none"

    @property
    def microbatches(self) -> int:
        """m, of each pipeline in one step."""
        return self.rows // (self.layout.dp * self.micro_batch)

    @property
    def few(self) -> int:
        """As many as fill the pipeline, so that a rank holds the most activations that it ever does."""
        return min(self.microbatches, 2 if self.layout.pp == 1 else self.layout.pp * (1 if self.vpp == 1 else 2))

    @property
    def looped(self) -> int | None:
        """``vpp`` as the schedules' tables want it."""
        return None if self.schedule in tables.SINGLE else self.vpp

    def places(self) -> list[list[int]]:
        """The stages of each rank of a pipeline."""
        return tables.placement(self.schedule, self.layout.pp, self.looped) if self.layout.pp > 1 else [[0]]


class Rank(NamedTuple):
    """What one rank measured, in picoseconds: of a micro-batch by stage, of a message, and from the last action on.

    ``exposed``: of these, those in which it only communicated, by collective, of a micro-batch in all its stages, and
    ("after") behind the last. ``memory``: bytes by class when most were held, and what communicators took.
    """

    forward: dict[int, int]
    backward: dict[int, int]
    message: int
    after: int
    exposed: dict[str, int]
    memory: dict[str, int]


@dataclass(frozen=True)
class Step:
    """A step put together: ``seconds`` of all, of them in the pipeline's bubble on the busiest rank, and after the last action.

    ``exposed``: seconds in which the busiest rank only communicated. ``memory``: bytes by class on the fullest rank.
    """

    job: Job
    seconds: float
    bubble: float
    after: float
    exposed: dict[str, float]
    memory: dict[str, int]

    @property
    def tokens_per_s(self) -> float:
        """Of all chips together."""
        return self.job.rows * self.job.config.context / self.seconds

    @property
    def held(self) -> int:
        """Bytes on the fullest rank."""
        return sum(self.memory.values())


# -- one rank ----------------------------------------------------------------------------------------------------------


def measure(job: Job) -> Rank:
    """On a rank, alone: one step of a few micro-batches."""
    import torch

    from course_lib import npu
    from course_lib.npu import runtime
    from course_lib.parallel.mesh import Combined

    npu.use(system=job.system, numerics=False)
    device, rows = runtime.devices[0], job.layout.dp * job.micro_batch * job.few
    trainer = Combined(
        job.config, job.layout, rows, "npu", lambda parts: torch.optim.AdamW(parts, fused=True), microbatches=job.few,
        schedule=job.schedule, vpp=job.looped, way="capacity", factor=1.0, sequence=job.sequence,
        dtype=torch.bfloat16, recompute=job.recompute, zero=1, shapes=True,
    )  # fmt: skip
    marks: list[Mark] = []

    @contextmanager
    def watch(name: str) -> Iterator[None]:
        start = device.current.mark()
        yield
        marks.append((name, start, device.current.mark()))

    trainer.part.watch = watch
    tokens = torch.zeros(rows, job.config.context, dtype=torch.int64, device="meta")
    with npu.ledger() as ledger:
        trainer.step(tokens, tokens)
        device.synchronize()
        end = device.current.mark()
    buffers = {"communicators": device.memory.outside}
    return _summary(ledger, marks, end, job.few, ledger.memory_at_peak() | buffers)


def _summary(ledger: "Ledger", marks: list[Mark], end: int, few: int, memory: dict[str, int]) -> Rank:
    spent: Counter[str] = Counter()
    for name, start, stop in marks:
        spent[name] += stop - start
    forward, backward = (
        {stage: median_low(spent[f"{stage}{kind}{number}"] for number in range(few)) for stage in _stages(marks)}
        for kind in "FB"
    )
    after = marks[-1][2]
    exposed = _exposed(ledger.records, marks, after)
    exposed = {kind: ps // (1 if kind == "after" else few) for kind, ps in exposed.items()}
    sends = [record.cost.ps for record in ledger.records if record.op in ("send", "receive")]
    return Rank(forward, backward, median_low(sends) if sends else 0, end - after, exposed, memory)


def _stages(marks: list[Mark]) -> list[int]:
    return sorted({int(name.partition("F")[0]) for name, *_ in marks if "F" in name})


def _exposed(records: list, marks: list[Mark], after: int) -> Counter[str]:
    """Picoseconds by collective in which nothing computes, within the actions; and behind them."""
    from course_lib.npu.overlap import length, span, union, without

    starts, found = [start for _, start, _ in marks], Counter()
    compute = union(span(r) for r in records if r.phase not in ("communication", "waiting"))
    by_kind: dict[str, list] = {}
    for r in records:
        if r.phase == "communication":
            inside = r.start < after and r.start < marks[max(0, bisect_right(starts, r.start) - 1)][2]
            by_kind.setdefault(r.op if inside else "after" if r.start >= after else "between", []).append(span(r))
    by_kind.pop("between", None)  # messages, which the timetable places
    for kind, spans in by_kind.items():
        found[kind] = length(without(union(spans), compute))
    return found


# -- all ranks ---------------------------------------------------------------------------------------------------------


def step(job: Job) -> Step:
    """One rank of each kind measured, and the step that they make."""
    kinds = _kinds(job)
    firsts = {kind: kinds.index(kind) for kind in kinds}
    each = job.layout.dp * job.layout.tp  # ranks of a stage
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = pool.map(lambda at: alone(measure, job, ranks=job.layout.ranks, rank=at * each), firsts.values())
        measured = dict(zip(firsts, runs, strict=True))
    return put_together(job, [measured[kind] for kind in kinds])


def put_together(job: Job, ranks: list[Rank]) -> Step:
    """The step of a pipeline of these ranks; their stages take the places of `job`, whichever they were measured on."""
    m, forward, backward = job.microbatches, {}, {}
    for places, rank in zip(job.places(), ranks, strict=True):
        forward |= dict(zip(places, (rank.forward[stage] for stage in sorted(rank.forward)), strict=True))
        backward |= dict(zip(places, (rank.backward[stage] for stage in sorted(rank.backward)), strict=True))
    if job.layout.pp > 1:
        table = tables.table(job.schedule, job.layout.pp, m, job.looped, communication=True)
        order = sorted(forward)
        times = ([forward[stage] for stage in order], [backward[stage] for stage in order])
        made = replay(table, *times, transfer=max(rank.message for rank in ranks))
        whole, idle = made.makespan, min(made.idle)
    else:
        whole, idle = m * (forward[0] + backward[0]), 0
    busiest = max(ranks, key=lambda rank: sum(rank.forward.values()) + sum(rank.backward.values()))
    after = max(rank.after for rank in ranks)
    exposed = {kind: ps * PS * (1 if kind == "after" else m) for kind, ps in busiest.exposed.items()}
    fullest = max((rank.memory for rank in ranks), key=lambda memory: sum(memory.values()))
    return Step(job, (whole + after) * PS, idle * PS, after * PS, exposed, fullest)


def _kinds(job: Job) -> list[tuple]:
    """For each rank of a pipeline what its stages are made of: ranks of one kind take the same time.

    Under 1F1B and its kin an earlier rank holds more activations; the first of a kind is the fullest.
    """
    dense = job.config.experts.first_dense if job.config.experts else 0
    count = job.layout.pp * (job.vpp if job.layout.pp > 1 else 1)
    parts = cut(job.config.layers, count)
    made = [
        (sum(layer < dense for layer in part), len(part), at == 0, at == count - 1) for at, part in enumerate(parts)
    ]
    return [tuple(made[stage] for stage in places) for places in job.places()]
