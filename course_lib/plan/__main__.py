"""Prints what a model's shape says, for sequences of a length: ``python -m course_lib.plan deepseek-v3 4096``."""

import sys

from course_lib.plan import flops, memory
from course_lib.plan.layers import count, layers
from course_lib.plan.model import Model, ModelError, load_model, models


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


def main(arguments: list[str]) -> str:
    """The report on a model's name or path, or without arguments the names there are; raises ModelError."""
    if not arguments:
        return "\n".join(models())
    model = load_model(arguments[0])
    return "\n".join(lines(model, int(arguments[1]) if arguments[1:] else min(model.context, 4096)))


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except ModelError as error:
        sys.exit(str(error))
