"""What a model's shape says; with a system also how a step of training goes there, or which layout is best.

python -m course_lib.plan deepseek-v3 4096
python -m course_lib.plan llama-2-70b --system atlas-800t-a2 --chips 32 --tp 8 --pp 4 --sp --global-batch 1024
python -m course_lib.plan deepseek-v3 --system h800-cluster --chips 2048 --gemm float8_e4m3fn --global-batch 15360 --search
"""

import argparse
import math
import sys

from course_lib.chip import SpecError, SystemSpec, UnknownFigure, UnsupportedDtype, load_system, systems
from course_lib.plan import flops, memory
from course_lib.plan.layers import count, layers
from course_lib.plan.layout import Layout, LayoutError
from course_lib.plan.model import Model, ModelError, load_model, models
from course_lib.plan.search import search
from course_lib.plan.step import Step, plan

GIB, MOST = 2**30, 4096
BATCH = 16e6  # tokens of a step where no batch is given: as of Llama 3 and, about, of others at that size


def lines(model: Model, context: int) -> list[str]:
    """Parameters, layers, FLOPs by operator and convention, and the cache, for sequences of ``context`` tokens."""
    n = count(model)
    errors = (100 * flops.error(model, context, which) for which in ("multiplying", "all"))
    rows = [
        ("parameters", f"{n.total:,}" + (f", and {n.mtp:,} of multi-token prediction" if n.mtp else "")),
        ("active per token", f"{n.active:,}"),
        ("N, multiplying", f"{n.multiplying:,}"),
    ]
    rows += [("layers", f"{layer.count} × {layer.kind}, {layer.parameters:,} each") for layer in layers(model)]
    for name, value in flops.forward(model, 1, context).items():
        rows.append((f"forward, {name}", f"{value / context / 1e6:,.3f} MFLOP per token"))
    for name in flops.CONVENTIONS:
        rows.append((f"training, {name}", f"{flops.per_token(model, name, context) / 1e9:,.3f} GFLOP per token"))
    rows.append(("error of 6N", "{:.1f} % with N, {:.1f} % with all active parameters".format(*errors)))
    rows.append(("KV cache, bfloat16", f"{memory.kv_per_token(model):,.0f} B per token"))
    title = f"{model.title}, sequences of {context} tokens ({model.source})"
    return [title, *(f"{key:34} {text}" for key, text in rows)]


def of_step(step: Step, tokens: float | None) -> list[str]:
    """The step by part, memory by class, utilisation, and the time and energy for so many tokens."""
    rows = [
        (
            "step",
            f"{step.seconds:,.3f} s, {step.tokens:,} tokens, {step.tokens_per_s:,.0f} tokens/s; bound by {step.bound}",
        )
    ]
    rows += [
        (f"  {name}", f"{value:,.3f} s  {value / step.seconds:6.1%}") for name, value in step.parts.items() if value
    ]
    capacity = step.chip.require("memory_bytes")
    rows.append(("memory of the fullest rank", f"{step.held / GIB:,.1f} of {capacity / GIB:,.1f} GiB"
                 + ("" if step.fits else ": does not fit")))  # fmt: skip
    rows += [(f"  {name}", f"{value / GIB:,.2f} GiB") for name, value in step.memory.items() if value]
    rows += [("MFU", str(step.mfu())), ("HFU", str(step.hfu()))]
    if tokens:
        energy = step.energy(tokens)
        days, hours = step.days(tokens), step.chip_seconds(tokens) / 3600
        unknown = "unknown: no source gives this chip's power while training"
        rows.append((f"{tokens:,.4g} tokens", f"{days:,.1f} days without a failure, {hours:,.0f} chip hours"))
        rows.append(("energy of the chips", unknown if energy is None else f"{energy / 3.6e9:,.0f} MWh"))
    return [f"{step.model.title} on {step.system.title}: {step.layout}", *(f"{key:34} {text}" for key, text in rows)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m course_lib.plan", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a name or the path of a .json file; without it, the names there are")
    parser.add_argument("context", nargs="?", type=int, help="tokens of a sequence")
    parser.add_argument("--system", help=f"one of {', '.join(systems())}, or the path of a .toml file")
    parser.add_argument("--chips", type=int, help="how many of its chips")
    for name in ("tp", "cp", "pp", "vpp", "ep", "micro-batch"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--dp", type=int, help="what the other degrees leave of the chips, where not given")
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--global-batch", type=int, help="sequences of a step")
    parser.add_argument("--sp", action="store_true", help="sequence parallelism over TP")
    for name, default in (("recompute", "none"), ("schedule", "1F1B"), ("gemm", "bfloat16"), ("kernels", "fused")):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--overlap-ep", action="store_true", help="hide the all-to-all of experts (DualPipe)")
    parser.add_argument("--tokens", type=float, help="of the whole training")
    parser.add_argument("--search", action="store_true", help="find the best layouts instead")
    return parser


def _system(given: argparse.Namespace) -> SystemSpec:
    found = load_system(given.system)
    if given.chips is None:
        return found
    if given.chips % found.chips_per_node and given.chips > found.chips_per_node:
        raise LayoutError(
            f"chips: {given.chips} are not whole nodes of {found.chips_per_node}; give a multiple of that"
        )
    few = {"chips_per_node": given.chips} if given.chips < found.chips_per_node else {}
    title = found.title if given.chips == found.chips else f"{given.chips} × {found.chip}, linked as {found.name}"
    return found.having(title=title, nodes=max(1, given.chips // found.chips_per_node), **few)


def _layout(given: argparse.Namespace, system: SystemSpec, context: int) -> Layout:
    split = given.tp * given.cp * given.pp
    dp = given.dp or max(1, system.chips // max(1, split))
    batch = given.global_batch or max(1, round(BATCH / context / dp / given.micro_batch)) * dp * given.micro_batch
    return Layout(
        dp=dp, tp=given.tp, cp=given.cp, pp=given.pp, vpp=given.vpp, ep=given.ep, zero=given.zero,
        micro_batch=given.micro_batch, global_batch=batch, sp=given.sp, recompute=given.recompute,
        schedule=given.schedule, gemm=given.gemm, kernels=given.kernels, overlap_ep=given.overlap_ep,
    )  # fmt: skip


def main(arguments: list[str]) -> str:
    """The report, or without arguments the models there are; raises ModelError, SpecError, LayoutError, UnknownFigure."""
    given = _parser().parse_args(arguments)
    if given.model is None:
        return "\n".join(models())
    model = load_model(given.model)
    context = given.context or min(model.context, MOST)
    if given.system is None:
        return "\n".join(lines(model, context))
    system = _system(given)
    if given.search:
        batch = given.global_batch or 2 ** round(math.log2(BATCH / context))
        return search(model, system, context, batch, given.gemm, kernels=given.kernels).table(10)
    return "\n".join(of_step(plan(model, system, _layout(given, system, context), context), given.tokens))


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except (ModelError, SpecError, LayoutError, UnknownFigure, UnsupportedDtype, ValueError) as error:
        sys.exit(str(error))
