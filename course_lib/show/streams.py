"""What the host and the device do at the same time: launches above, operators below.

timeline(ledger)
"""

from course_lib.npu.ledger import Ledger
from course_lib.show import style
from course_lib.show.units import quantity

PS_PER_S = 10**12
PS_PER_US = 10**6


def timeline(ledger: Ledger, title: str = "The host runs ahead of the device") -> None:
    """The host's launches and the device's operators on one axis of emulated time, and the last launch named."""
    records, began = ledger.records, ledger.began
    with style.figure(height=3.4) as (_, ax):
        for number, record in enumerate(records):
            start, launched = (record.start - began) / PS_PER_US, (record.launched - began) / PS_PER_US
            colour, hatch = (style.BLUE, "") if number % 2 == 0 else (style.SKY, "\\\\")
            ax.barh(0, record.cost.ps / PS_PER_US, left=start, height=0.6, color=colour, hatch=hatch, edgecolor="white")
            ax.plot([launched], [1], marker="|", markersize=22, markeredgewidth=2, color=style.VERMILION)
        ax.annotate(f"the last of {len(records)} launches", (launched, 1), (0.3, 1), textcoords=("axes fraction", "data"),
                    va="center", arrowprops={"arrowstyle": "->", "linewidth": 1.5})  # fmt: skip
        ax.set_yticks([0, 1], ["device works", "host launches"])
        ax.set(ylim=(-0.6, 1.6), xlabel="emulated time (µs)", title=title)
        ax.set_xlim(left=-0.01 * ledger.elapsed_ps / PS_PER_US)
        style.finish(sentence(ledger))


def sentence(ledger: Ledger) -> str:
    """What the figure says: when the host had launched everything, and when the device was done."""
    launched = (ledger.records[-1].launched - ledger.began) / PS_PER_S
    done = ledger.elapsed_ps / PS_PER_S
    return (
        f"The host had launched all {len(ledger.records)} operators after {quantity(launched, 's')}; "
        f"the device was done after {quantity(done, 's')}, {done / launched:.0f} times as long."
    )
