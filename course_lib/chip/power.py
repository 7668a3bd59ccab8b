"""Power and energy, as far as anybody has published them: of one operation, and of a chip against its clock.

A chip's dynamic power goes as f·V²: the clock, and the square of the voltage that it needs. The measured chip holds its
voltage up to 1.3 GHz and raises it in a straight line from there, so that its last 500 MHz are the dear ones. Nothing is
published of energy per byte, so energy per operator is time × mean power (`Cost.energy_pj`), or unknown.

    python -m course_lib.chip.power
"""

import tomllib
from functools import cache

from course_lib import data
from course_lib.chip.cost import Cost
from course_lib.chip.figures import UnknownFigure
from course_lib.chip.spec import ChipSpec

MHZ = 10**6


@cache
def measured() -> dict:
    """The rows of ``data/published/dvfs.toml``."""
    return tomllib.loads(data.path("published", "dvfs.toml").read_text(encoding="utf-8"))


def voltage(clock: float) -> float:
    """Volts at ``clock`` in Hz. Raises UnknownFigure outside the clocks that were measured, 1.0 to 1.8 GHz."""
    clocks, curve = measured()["clock"], measured()["voltage"]
    mhz = clock / MHZ
    if not clocks["least"] <= mhz <= clocks["most"]:
        raise UnknownFigure(
            f"the voltage at {mhz:,.0f} MHz is unknown: measured from {clocks['least']} to {clocks['most']}"
        )
    rise = max(0.0, mhz - curve["knee"]) / (clocks["most"] - curve["knee"])
    return (curve["low"] + rise * (curve["high"] - curve["low"])) / 1000


def core_power(clock: float) -> float:
    """W of the AI cores in training at ``clock`` in Hz: f·V², through the measured power at the full clock."""
    most = measured()["clock"]["most"] * MHZ
    return measured()["training"][0]["aicore"] * (clock / most) * (voltage(clock) / voltage(most)) ** 2


def chip_power(clock: float) -> float:
    """W of the whole chip in training when only the AI cores change their clock, in Hz; the rest keeps its power."""
    full = measured()["training"][0]
    return full["soc"] - full["aicore"] + core_power(clock)


def at_clock(spec: ChipSpec, clock: float) -> ChipSpec:
    """``spec`` with its cores at ``clock`` in Hz, while HBM, L2 and the network to the cores keep their pace.

    Assumed, for the network of the Ascend 910 has a clock of its own (2 GHz beside cores at 1), and because inference at
    1.3 of 1.8 GHz was measured only 2.5 % slower. So ports deliver more bytes in each, longer, cycle of the core.
    """
    stretch = spec.require("cube_clock") / clock
    ports = [f"paths.{name}" for name in ("gm_read", "gm_write", "l2_read", "l2_write")]
    wider = {key.replace(".", "__"): spec.require(key) * stretch for key in ports if key in spec.figures}
    return spec.having(f"{spec.title} at {clock / 1e9:g} GHz", cube__clock=round(clock), **wider)


def arithmetic_pj(spec: ChipSpec, paid: Cost) -> float:
    """Picojoules of an operator's arithmetic alone: FLOPs × published energy per FLOP, moving data left out.

    Raises UnknownFigure where nobody has published it, which is every chip but the Ascend 910A.
    """
    cube, vector = spec.require("energy.cube"), spec.require("energy.vector")
    return (paid.cube_flops * cube + paid.vector_flops * vector) * 1e12


def table() -> str:
    """The measured points beside f·V², as Markdown."""
    clocks = measured()["clock"]
    lines = ["| clock, MHz | voltage, V | AI cores, W | chip, W |", "|---:|---:|---:|---:|"]
    for mhz in range(clocks["least"], clocks["most"] + 1, clocks["step"]):
        hz = mhz * MHZ
        lines.append(f"| {mhz} | {voltage(hz):.3f} | {core_power(hz):.1f} | {chip_power(hz):.1f} |")
    point = measured()["inference"]
    saved = 1 - chip_power(point["clock"] * MHZ) / chip_power(clocks["most"] * MHZ)
    lines += [
        "",
        f"At {point['clock']} MHz f·V² saves {saved:.1%} of the chip's power; measured in inference: {point['soc_saving']:.1%}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
