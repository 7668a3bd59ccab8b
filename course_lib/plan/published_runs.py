"""Published runs beside what the planner says of them: how far a plan can be trusted.

``data/published/runs.csv`` has the rows with their sources, and what was assumed where a run leaves it open. Nothing in
a plan is a free utilisation, except what `CALIBRATED` names; the rows that set such a constant say so and do not enter
the median.

    python -m course_lib.plan.published_runs > docs/runs.md
"""

import csv
import statistics
import tomllib
from dataclasses import dataclass, replace
from functools import cache

from course_lib import data
from course_lib.chip import SystemSpec, load_chip, load_system
from course_lib.plan import flops, inference
from course_lib.plan.layout import Layout
from course_lib.plan.model import Model, load_model
from course_lib.plan.step import Step, plan

TERA = 1e12
NODES = {"a100-80gb": "dgx-a100", "h100": "dgx-h100", "h800": "h800-cluster", "ascend-910b": "atlas-800t-a2",
         "ascend-910b3": "atlas-800t-a2", "ascend-910c": "cloudmatrix384"}  # fmt: skip
NAMES = {"llama3-405b-8k": "llama-3-405b", "deepseek-v3": "deepseek-v3", "modellink-llama2-7b": "llama-2-7b",
         "modellink-llama2-13b": "llama-2-13b", "modellink-llama2-70b": "llama-2-70b"}  # fmt: skip
RECOMPUTED = {"full": "full", "selective+sp": "selective", "mla-up+norm": "cheap", "none": "none", "": "none"}
DUALPIPE = {"overlap_ep": True, "comm_cores": 20, "copies": 4}  # arXiv:2412.19437, sections 3.2.2 and 3.2.1
CALIBRATED = {
    "a100-80gb": ("korthikanti-22b-full", "korthikanti-22b-selective")
}  # one node, no pipeline: kernels and NVLink
PACE = {"a100-80gb": 0.826}
PREFILL_TOKENS, CONTEXT = 16384, 4096  # of one package at once, arXiv:2506.12708


def entries() -> list[dict]:
    """The rows of the file, each a dict of text."""
    with data.path("published", "runs.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def model_of(row: dict) -> Model:
    """The model of a row: from its file, or from the row's own columns."""
    if row["run"] in NAMES or row["model"] == "deepseek-v3":
        return load_model(NAMES.get(row["run"], "deepseek-v3"))
    gpt, n = row["model"] == "gpt", lambda key: int(row[key])
    return Model(
        name=row["run"], title=f"{row['model']} {row['params_b']}B", source=row["source"], width=n("hidden"),
        layers=n("layers"), heads=n("heads"), kv_heads=n("kv_heads"), head_width=n("hidden") // n("heads"),
        feed_forward=n("ffn"), vocab_size=n("vocab"), context=n("seq"), tied=gpt, gated=not gpt, qkv_bias=gpt,
    )  # fmt: skip


def system_of(row: dict) -> SystemSpec:
    """As many chips as the run had, of its kind."""
    found = load_system(NODES[row["chip"]])
    if row["chip"] == "ascend-910b3":
        found = found.having(chip="ascend-910b3")
    return found.having(nodes=-(-int(row["chips"]) // found.chips_per_node))


def layout_of(row: dict, pace: float | None = None) -> Layout:
    """The layout of a row; what it leaves open is in its column ``assumed``."""
    n, old = (lambda key: int(row[key] or 1)), row["model"] == "gpt"
    made = Layout(
        dp=n("dp"), tp=n("tp"), cp=n("cp"), pp=n("pp"), vpp=n("vpp"), ep=n("ep"), micro_batch=n("micro_batch"),
        global_batch=n("global_batch"), zero=int(row["zero"]), sp=row["sp"] == "1", recompute=RECOMPUTED[row["recompute"]],
        schedule=row["schedule"], gemm=row["gemm"], overlap_dp=not old,
        pace=PACE.get(row["chip"], 1.0) if pace is None else pace,
    )  # fmt: skip
    return replace(made, **DUALPIPE, gemm_share=products_share()) if row["schedule"] == "DualPipe" else made


def step_of(row: dict, pace: float | None = None) -> Step:
    """The plan of a training row."""
    return plan(model_of(row), system_of(row), layout_of(row, pace), int(row["seq"]))


@cache
def products_share() -> float:
    """Share of the H800's peak that 8-bit products of DeepSeek-V3's shapes reach together, as published one by one."""
    text = data.path("published", "products.toml").read_text(encoding="utf-8")
    flops, seconds = 0.0, 0.0
    for product in tomllib.loads(text)["product"]:
        _, n, k = product["shape"]
        flops, seconds = flops + product["products"] * n * k, seconds + product["products"] * n * k / product["tflops"]
    return flops / seconds * TERA / load_chip("h800").peak("float8_e4m3fn")


# -- what a plan says in the row's own measure ----------------------------------------------------------------------


def in_measure(row: dict, step: Step) -> float:
    """Seconds, TFLOP/s of a chip, MFU, or tokens/s of a chip, as the row counts."""
    if row["metric"] == "step_s":
        return step.seconds
    if row["metric"] == "tokens_per_s_per_chip":
        return step.tokens_per_s / step.system.chips
    if row["metric"] == "mfu":
        return step.mfu("6N+attention causal").value
    model, T = step.model, step.context
    each = flops.per_token(model, "6N+attention causal", T)
    if row["model"] == "gpt":  # arXiv:2104.04473, equation 3: full recomputation, all pairs
        l, h = model.layers, model.width
        each = 96 * l * h**2 * (1 + T / (6 * h) + model.vocab_size / (16 * l * h))
    return each * step.tokens_per_s / step.system.chips / TERA


def served(row: dict) -> float:
    """Tokens/s of a package of two dies, of an inference row."""
    system, model, dies = load_system(NODES[row["chip"]]), model_of(row), 2
    if row["kind"] == "prefill":
        prompts = PREFILL_TOKENS // (dies * CONTEXT)
        return dies * inference.prefill(model, system, int(row["ep"]), prompts, CONTEXT, row["gemm"]).tokens_per_s
    given = tomllib.loads(data.path("published", "inference.toml").read_text(encoding="utf-8"))
    accepted = (given["accepted"]["low"] + given["accepted"]["high"]) / 2
    sequences, launch = int(row["global_batch"]) // dies, given["measured"]["launch"]
    return (
        dies
        * inference.decode(
            model, system, int(row["ep"]), sequences, CONTEXT, row["gemm"], 1, accepted, launch
        ).tokens_per_s
    )


# -- calibration -----------------------------------------------------------------------------------------------------


def pace_of(row: dict) -> float:
    """The pace at which the plan of a training row meets its measurement; the step is a falling function of it."""
    low, high, rising = 0.2, 2.0, row["metric"] != "step_s"
    for _ in range(40):
        middle = (low + high) / 2
        too_fast = (in_measure(row, step_of(row, middle)) > float(row["value"])) == rising
        low, high = (low, middle) if too_fast else (middle, high)
    return (low + high) / 2


def calibrated(names: tuple[str, ...]) -> float:
    """The pace that fits these rows: the mean of those that meet each."""
    return statistics.fmean(pace_of(row) for row in entries() if row["run"] in names)


@cache
def left_out() -> dict[str, float]:
    """For each row that set the pace: its error when only the others set it."""
    found = {}
    for names in CALIBRATED.values():
        for row in entries():
            if row["run"] in names:
                pace = calibrated(tuple(name for name in names if name != row["run"]))
                found[row["run"]] = in_measure(row, step_of(row, pace)) / float(row["value"]) - 1
    return found


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One published run and ours, in ``unit``; ``calibrated``: it set a constant; ``assumed``: what it leaves open."""

    name: str
    chips: str
    layout: str
    measured: float
    ours: float
    unit: str
    calibrated: bool
    assumed: str
    reason: str
    source: str

    @property
    def error(self) -> float:
        """Relative, positive where we say more."""
        return self.ours / self.measured - 1


@cache
def rows() -> tuple[Row, ...]:
    """All rows, computed."""
    return tuple(_row(entry) for entry in entries())


def _row(entry: dict) -> Row:
    train = entry["kind"] == "train"
    ours = in_measure(entry, step_of(entry)) if train else served(entry)
    layout = str(layout_of(entry)) if train else f"{entry['kind']}, EP{entry['ep']}"
    return Row(
        entry["run"], f"{entry['chips']} × {entry['chip']}", layout, float(entry["value"]), float(ours), entry["unit"],
        any(entry["run"] in names for names in CALIBRATED.values()), entry["assumed"], entry["reason"], entry["source"],
    )  # fmt: skip


def median_error(of: tuple[Row, ...] | None = None) -> float:
    """Median of |error| over the rows that set no constant."""
    return statistics.median(abs(row.error) for row in of or rows() if not row.calibrated)


def table() -> str:
    """The rows as Markdown; below the calibrated constant, the median and the worst, and why large ones miss."""
    lines = ["| run | chips | layout | measured | ours | error | assumed where the source is silent |",
             "|---|---|---|---:|---:|---:|---|"]  # fmt: skip
    for row in rows():
        mark = "; calibrated" if row.calibrated else ""
        lines.append(f"| {row.name} | {row.chips} | {row.layout} | {row.measured:,.4g} {row.unit} | {row.ours:,.4g} {row.unit} "
                     f"| {row.error:+.1%}{mark} | {row.assumed} |")  # fmt: skip
    predicted = [row for row in rows() if not row.calibrated]
    worst = max(predicted, key=lambda row: abs(row.error))
    lines += [
        "",
        f"{len(predicted)} predictions: median error {median_error():.1%}, worst {worst.error:+.1%} ({worst.name}).",
        "",
    ]
    for chip, names in CALIBRATED.items():
        errors = ", ".join(f"{name} {left_out()[name]:+.1%}" for name in names)
        lines.append(f"Calibrated: on {chip}, kernels of 2021 and 2022 run at {PACE[chip]:.3f} of the cost model's pace, from "
                     f"{' and '.join(names)}. Each predicted from the other: {errors}.")  # fmt: skip
    lines += ["", "Why some miss by more than 15 %:", ""]
    return "\n".join(lines + [f"- **{row.name}**: {row.reason}" for row in rows() if row.reason])


TITLE = "# Published runs beside the plan\n\nMade by `python -m course_lib.plan.published_runs`; sources are in `data/published/runs.csv`.\n"

if __name__ == "__main__":
    print(TITLE, table(), sep="\n")
