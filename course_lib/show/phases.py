"""Where a step's time, FLOPs and bytes go: one bar each, cut by phase.

phase_bars(ledger)
"""

import pandas

from course_lib.npu.ledger import Ledger
from course_lib.show import style
from course_lib.show.units import quantity

MEASURES = (("time", "s"), ("FLOPs", "FLOP"), ("bytes", "B"))
NARROW = 0.055  # a piece below this share of its bar has no room for its percentage


def shares(ledger: Ledger) -> pandas.DataFrame:
    """Time (s), FLOPs and bytes by phase; phases without any are left out."""
    table = ledger.table(by="phase")
    flops = table.cube_flops + table.vector_flops
    return pandas.DataFrame({"time": table.time_us / 1e6, "FLOPs": flops, "bytes": table.bytes})


def phase_bars(ledger: Ledger, title: str = "One training step by phase") -> None:
    """Three bars to 100 %, time, FLOPs and bytes, each cut by phase and labelled with its total."""
    table = shares(ledger)
    with style.figure(height=4.0) as (_, ax):
        for place, (name, unit) in enumerate(MEASURES):
            left, total = 0.0, table[name].sum()
            for phase in table.index:
                colour, hatch = style.look_of(phase, style.PHASES)
                share = table[name][phase] / total
                ax.barh(place, 100 * share, left=100 * left, color=colour, hatch=hatch, edgecolor="white", height=0.7,
                        label=phase if place == 0 else None)  # fmt: skip
                if share >= NARROW:
                    box = {"facecolor": colour, "edgecolor": "none", "pad": 2}
                    ax.text(
                        100 * (left + share / 2),
                        place,
                        f"{share:.0%}",
                        ha="center",
                        va="center",
                        color=style.ink(colour),
                        bbox=box,
                    )
                left += share
            ax.text(101, place, quantity(total.item(), unit), va="center")
        ax.set_yticks(range(len(MEASURES)), [name for name, _ in MEASURES])
        ax.invert_yaxis()
        ax.set(xlim=(0, 100), xlabel="share of the whole (%)", title=title)
        ax.legend(ncols=len(table), loc="upper center", bbox_to_anchor=(0.5, -0.22))
        style.finish(sentence(table))


def sentence(table: pandas.DataFrame) -> str:
    """What the bars say: each phase's share of time, FLOPs and bytes."""
    parts = [
        f"{phase} {quantity(row.time, '%')} of the time, {quantity(row.FLOPs, '%')} of the FLOPs,"
        f" {quantity(row.bytes, '%')} of the bytes"
        for phase, row in (table / table.sum()).iterrows()
    ]
    return "By phase: " + "; ".join(parts) + "."
