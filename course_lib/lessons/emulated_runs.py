"""Published runs by execution: the course's program on the chips and in the layout of each, beside plan and publication.

    python -m course_lib.lessons.emulated_runs modellink-llama2-7b deepseek-v3

Three figures for each run. *Published*. *Planned* as the run was: fused kernels, its own number formats and overlaps.
And the step of the course's program by shape-only execution, which is PyTorch operator by operator, in bfloat16, with
nothing hidden: slower, and by how much is known, for the plan of that very program stands beside it. Where the program's
activations do not fit without recomputation, it recomputes whole layers.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from course_lib.chip import Work, cost, load_chip
from course_lib.lessons.emulated import Job, Step, step
from course_lib.llm.config import Config
from course_lib.llm.published import published
from course_lib.parallel import mesh
from course_lib.plan import footprint, published_runs, share
from course_lib.plan import step as planner
from course_lib.plan.communication import seconds as collective
from course_lib.plan.layout import Layout
from course_lib.plan.model import Model
from course_lib.plan.stages import on_ranks

HALF, SINGLE, PICO, GIB = 2, 4, 1e-12, 2**30
DENSE = ("modellink-llama2-7b", "modellink-llama2-13b", "modellink-llama2-70b", "pangu-ultra-135b", "llama3-405b-8k")
RUNS = (*DENSE, "deepseek-v3")
RECOMPUTE_ALL = ("llama3-405b-8k", "deepseek-v3")  # else the program's activations do not fit


@dataclass(frozen=True)
class Row:
    """A run: published, planned as it was, and the program's step, planned and emulated; in the publication's ``unit``."""

    name: str
    chips: str
    unit: str
    published: float
    planned: float
    program_planned: float
    emulated: float
    step: Step

    @property
    def error(self) -> float:
        """Of the plan of the program, against its emulation: of seconds."""
        ratio = self.program_planned / self.emulated
        return (ratio if self.unit == "s" else 1 / ratio) - 1


def job(name: str) -> Job:
    """A published run as the course's program does it; ValueError for one that it cannot build."""
    row, model = _row(name), planned_model(name)
    seq, n = int(row["seq"]), lambda key: int(row[key] or 1)
    layout = mesh.Layout(dp=n("dp"), tp=n("tp"), pp=n("pp"), ep=n("ep"))
    schedule = {"DualPipe": "1F1B"}.get(row["schedule"], row["schedule"])  # PyTorch has DualPipeV alone
    return Job(
        config_of(name, model, seq), layout, published_runs.system_of(row), n("global_batch"), n("micro_batch"), schedule,
        n("vpp"), row["sp"] == "1", "full" if name in RECOMPUTE_ALL else "none",
    )  # fmt: skip


def _row(name: str) -> dict:
    if name not in RUNS:
        raise ValueError(f"no run {name!r} that the course's program can do; expected one of {', '.join(RUNS)}")
    return next(row for row in published_runs.entries() if row["run"] == name)


def planned_model(name: str) -> Model:
    """The model of a run; a layer of multi-token prediction counts as one more of the others, as in the program."""
    model = published_runs.model_of(_row(name))
    return replace(model, layers=model.layers + model.mtp, mtp=0)


def config_of(name: str, model: Model, seq: int) -> Config:
    """The same for the program."""
    if model.experts:
        return replace(published(published_runs.NAMES[name], seq), layers=model.layers)
    return Config(
        vocab_size=model.vocab_size, context=seq, width=model.width, layers=model.layers, heads=model.heads,
        kv_heads=model.kv_heads, feed_forward=model.feed_forward, tied=False,
    )  # fmt: skip


# -- the plan of the program ---------------------------------------------------------------------------------------------


def layout_of(job: Job) -> Layout:
    """The planner's layout of a job: eager kernels, ZeRO-1, nothing hidden."""
    lay = job.layout
    return Layout(
        dp=lay.dp, tp=lay.tp, pp=lay.pp, ep=lay.ep, vpp=job.vpp, zero=1, micro_batch=job.micro_batch,
        global_batch=job.rows, sp=job.sequence and lay.tp > 1, recompute=job.recompute, schedule=job.schedule,
        overlap_dp=False, kernels="eager",
    )  # fmt: skip


def planned(job: Job, model: Model) -> dict[str, float]:
    """Seconds of a job's step by part: the planner's, and what the program does `beyond` them."""
    made = planner.plan(model, job.system, layout_of(job), job.config.context)
    return {name: float(value) for name, value in made.parts.items()} | beyond(job, model)


def beyond(job: Job, model: Model) -> dict[str, float]:
    """Seconds of a step that the planner's "eager" leaves out, on the rank with most layers, bubble included.

    Gradients of each micro-batch are added to sums in float32. With sequence parallelism, input gradients of products
    that share an input are added before the ranks' sums, not after; and DTensor, which cuts and joins along the tokens,
    copies what it cuts (what it joins too, where there is more than one row). Recomputed layers exchange tokens again,
    and stop when all that backward needs is there: before their last product.
    """
    lay, c, rows = job.layout, job.config, job.micro_batch * job.config.context
    sp, stream = job.sequence and lay.tp > 1, rows * c.width
    places, _ = footprint.kinds(model)
    ranks = on_ranks(model, lay.pp, job.vpp, job.schedule)
    rank = max(ranks, key=lambda row: row[:-2].sum())
    layers, held = rank[:-2].sum(), footprint.of_kinds(model, places, lay.tp, lay.ep, lay.pp == 1).sum(0) @ rank
    found = {"sums of gradients": _copy(job, (HALF + SINGLE) * held, SINGLE * held)}
    if sp:
        rest = stream * (1 - 1 / lay.tp)
        found["input gradients"] = layers * 3 * _copy(job, 2 * HALF * rest, HALF * rest)
        found["cut by tokens"] = layers * (4 if job.micro_batch == 1 else 8) * _copy(job, HALF * stream, HALF * stream)
    if c.experts and job.recompute == "full":
        routed = sum(n for n, place in zip(rank, places, strict=False) if place >= c.experts.first_dense)
        exchange = collective(job.system, "all_to_all", HALF * stream * c.experts.active, lay.ep, lay.tp)
        found["tokens exchanged again"] = routed * 2 * exchange
    if job.recompute == "full":
        found["last product not repeated"] = -layers * _last(job, model)
    times = job.microbatches + (lay.pp - 1) / job.vpp
    return {name: float(seconds * times) for name, seconds in found.items()}


def _last(job: Job, model: Model) -> float:
    """Seconds of the last product of a layer's forward pass and, with TP, of the sum over its parts."""
    lay, rows = job.layout, job.micro_batch * job.config.context
    shape = share.Shape(
        lay.tp, 1, lay.ep, job.micro_batch, job.sequence and lay.tp > 1, job.config.context, kernels="eager"
    )
    made = share.priced(load_chip(job.system.chip), share.operators(model, model.layers - 1, shape))
    product = [paid.ps * PICO for op, paid in made if op.phase == "forward" and op.name in ("down", "shared down")]
    kind = "reduce_scatter" if shape.sp else "all_reduce"
    return sum(product) + collective(job.system, kind, HALF * rows * job.config.width, lay.tp)


def _copy(job: Job, read: float, written: float) -> float:
    """Seconds of a kernel that is bound by memory."""
    return cost(load_chip(job.system.chip), Work(bytes_read=int(read), bytes_written=int(written))).ps * PICO


# -- the table -----------------------------------------------------------------------------------------------------------


@cache
def row(name: str) -> Row:
    """One run, computed: some ten seconds of host time."""
    entry, made = _row(name), job(name)
    found = step(made)
    was = published_runs.in_measure(entry, published_runs.step_of(entry))
    ours = sum(planned(made, planned_model(name)).values())
    chips = f"{entry['chips']} × {entry['chip']}"
    measures = (float(was), _in_measure(entry, made, ours), _in_measure(entry, made, found.seconds))
    return Row(name, chips, entry["unit"], float(entry["value"]), *measures, found)


def _in_measure(entry: dict, made: Job, seconds: float) -> float:
    """A step of so many seconds in the publication's measure."""
    plan = planner.plan(
        published_runs.model_of(entry), made.system, published_runs.layout_of(entry), made.config.context
    )
    scale = seconds / plan.seconds
    value = float(published_runs.in_measure(entry, plan))
    return value * scale if entry["metric"] == "step_s" else value / scale


def table(names: Sequence[str] = RUNS) -> str:
    """The rows as Markdown."""
    lines = ["| run | chips | published | planned as it was | the program, planned | the program, emulated | plan to emulation | GiB on a rank |",
             "|---|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for name in names:
        r = row(name)
        values = " | ".join(
            f"{value:,.4g} {r.unit}" for value in (r.published, r.planned, r.program_planned, r.emulated)
        )
        lines.append(f"| {r.name} | {r.chips} | {values} | {r.error:+.1%} | {r.step.held / GIB:.1f} |")
    return "\n".join(lines)


def to_published() -> list[tuple[str, float]]:
    """DeepSeek-V3's step, from the program's to that of the run: what changes, and seconds of the plan after it."""
    made, model = job("deepseek-v3"), planned_model("deepseek-v3")
    own = published_runs.layout_of(_row("deepseek-v3"))
    changes = (
        ("kernels fused", {"kernels": "fused"}),
        ("MLA up-projections and cheap operators recomputed alone", {"recompute": "cheap"}),
        ("a token sent once to each of 4 nodes", {"copies": own.copies}),
        ("products in FP8", {"gemm": own.gemm, "gemm_share": own.gemm_share}),
        ("DualPipe: all-to-all behind products, 20 of 132 cores for it", {"schedule": own.schedule, "overlap_ep": True, "comm_cores": own.comm_cores}),
        ("gradients sent behind the last backward", {"overlap_dp": True}),
    )  # fmt: skip
    lay = layout_of(made)
    found = [("the program, planned", sum(planned(made, model).values()))]
    for name, change in changes:
        lay = replace(lay, **change)
        found.append((name, float(planner.plan(model, made.system, lay, made.config.context).seconds)))
    last = float(published_runs.step_of(_row("deepseek-v3")).seconds)
    return [*found, ("the further token's own loss, stages as in the run", last)]


if __name__ == "__main__":
    print(table(sys.argv[1:] or RUNS))
    if "deepseek-v3" in (sys.argv[1:] or RUNS):
        print("\nDeepSeek-V3, from this program to that run (seconds of a step, planned):\n")
        print("\n".join(f"- {name}: {seconds:.1f}" for name, seconds in to_published()))
