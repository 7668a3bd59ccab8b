"""Run any PyTorch script with the emulated NPU registered, and print what its operators cost.

    python -m course_lib.npu --chip mini train.py --its --own --arguments

The script is not changed and need not know: where it asks for ``device="npu"`` it gets the emulated chip.
"""

import argparse
import os
import runpy
import sys
from pathlib import Path


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(options, the script's own arguments): everything after the script's name is the script's."""
    parser = argparse.ArgumentParser(prog="python -m course_lib.npu", description="Run a PyTorch script on the emulated NPU and print its ledger.")
    parser.add_argument("--chip", help="a name from data/chips, or the path of a chip file (default: COURSE_CHIP or mini)")
    parser.add_argument("--count", type=int, default=1, help="how many devices (default 1)")
    parser.add_argument("--by", default="phase", choices=("phase", "module", "op", "bound"), help="rows of the table (default phase)")
    parser.add_argument("--trace", metavar="FILE", help="write a timeline for ui.perfetto.dev")
    parser.add_argument("script", help="the Python script to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    options = parser.parse_args(argv)
    if not Path(options.script).is_file():
        parser.error(f"no script at {options.script!r}")
    return options, options.arguments


def summary(ledger: object, by: str) -> str:
    """The table and the totals of a ledger, as text."""
    import pandas

    totals = ledger.totals()
    if not totals.calls:
        return 'No operator ran on the device. Does the script use device="npu"?'
    with pandas.option_context("display.width", 160, "display.max_columns", None, "display.max_rows", None):
        table = ledger.table(by=by).to_string(formatters={"share": "{:.1%}".format, "time_us": "{:,.1f}".format, "intensity": "{:.2f}".format})
    energy = "unknown (no published power for this chip)" if totals.energy_j is None else f"{totals.energy_j:.4g} J"
    memory = ", ".join(f"{name} {size:,}" for name, size in ledger.memory_at_peak().items())
    return "\n".join([
        table, "",
        f"FLOPs            {totals.flops:,} ({totals.cube_flops:,} cube, {totals.vector_flops:,} vector)",
        f"bytes            {totals.bytes:,} ({totals.intensity:.2f} FLOP per byte)",
        f"emulated time    {totals.elapsed_s:.6f} s, of which the device was busy {totals.busy_s:.6f} s",
        f"peak memory      {totals.peak_memory:,} bytes: {memory}",
        f"energy           {energy}",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options, arguments = parse(argv)
    if options.chip:
        os.environ["COURSE_CHIP"] = options.chip
    from course_lib import npu
    from course_lib.chip.spec import SpecError, UnknownFigure

    try:
        spec = npu.use(options.chip, count=options.count)
    except (SpecError, UnknownFigure, ValueError) as error:
        print(f"python -m course_lib.npu: {error}", file=sys.stderr)
        return 2
    sys.argv = [options.script, *arguments]
    sys.path[0] = str(Path(options.script).resolve().parent)
    ledger, status = npu.ledger(), 0
    with ledger:
        try:
            runpy.run_path(options.script, run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
    print(f"\n── {spec.title}, {options.count} × ──\n{summary(ledger, options.by)}")
    if options.trace:
        ledger.export_chrome_trace(options.trace)
        print(f"timeline         {options.trace} (open it at ui.perfetto.dev)")
    return status


if __name__ == "__main__":
    sys.exit(main())
