"""What each rank does when: one row for each, computing above, communication below, waiting where nothing is drawn.

    over_ranks(replay(table("1F1B", 4, 8), forward=1, backward=2))       # plan.timetable: computed
    over_ranks(launch(train, ranks=4))                                  # real: train returns ledger.records
    over_ranks([[Span("2F0", 0, 7, "F"), …], …])

A pipeline's bars carry their micro-batch; the names of its records are its actions where the ledger's ``phase`` watched
(`parallel.pipeline.Pipeline.watch`). Bars of a rank's further stages are lighter.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from course_lib.npu.ledger import Record
from course_lib.npu.overlap import length, union
from course_lib.plan.timetable import Timetable
from course_lib.show import style
from course_lib.show.units import quantity, three_digits

PS = 1e-12
KINDS = {
    "F": (*style.PHASES["forward"], "forward"), "B": (*style.PHASES["backward"], "backward"),
    "I": (style.PURPLE, "\\\\", "backward, inputs"), "W": (style.YELLOW, "oo", "backward, weights"),
    "communication": (style.VERMILION, "++", "communication"),
}  # fmt: skip
ACTION = re.compile(r"(\d+)([FBIW])(\d+)")  # stage, kind, micro-batch
PHASES = {"forward": "F", "backward": "B"}  # of a ledger, where nobody watched
NOT_COMPUTING = ("communication", "waiting")
CLOSED = 1 / 1000  # of the width: narrower gaps between operators of one phase cannot be seen
ROOM = 0.006, 0.01  # of the width, for a bar's number and for each of its digits
SCALES = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


class Span(NamedTuple):
    """A bar: ``kind`` F, B, I, W, a phase of the ledger, or communication; ``start`` and ``end`` in the row's unit."""

    name: str
    start: float
    end: float
    kind: str


class Shares(NamedTuple):
    """Of a rank's time: computing, waiting for communication that is under way, waiting for others; they sum to 1."""

    computing: float
    communicating: float
    waiting: float


def over_ranks(
    ranks: Timetable | Sequence[Sequence[Span | Record]], title: str | None = None, unit: float | None = None
) -> None:
    """The timeline of all ranks, and what it says in words.

    ``ranks`` is a timetable, or for each rank the ledger's records or spans. ``unit`` is how many seconds one unit of
    time is; a ledger's are picoseconds, a timetable's are of no unit unless given.
    """
    rows, unit = rows_of(ranks), PS if unit is None and _recorded(ranks) else unit
    start, end = bounds(rows)
    scale, name = _axis(end - start, unit)
    with style.figure(height=1.9 + 0.55 * len(rows)) as (fig, ax):
        kinds: dict[str, None] = {}
        for place, row in enumerate(rows):
            own = min((int(m[1]) for one in row if (m := ACTION.fullmatch(one.name))), default=0)
            beside = Counter((one.start, one.end) for one in row if ACTION.fullmatch(one.name))
            for one in row:
                _draw(ax, place, one, (start, end), scale, own, beside[one.start, one.end] > 1)
                kinds[one.kind] = None
        ax.set_yticks(range(len(rows)), [f"rank {place}" for place in range(len(rows))])
        ax.set(xlim=(0, (end - start) * scale), ylim=(len(rows) - 0.5, -0.5), xlabel=name)
        ax.xaxis.set_major_locator(MaxNLocator(7))
        _shares(ax, rows)
        ax.set_title(title or "What each rank does")
        _legend(fig, list(kinds))
        style.finish(sentence(rows, unit))


def rows_of(ranks: Timetable | Sequence[Sequence[Span | Record]]) -> list[list[Span]]:
    """Spans of each rank. Raises ValueError where there is nothing to draw."""
    if isinstance(ranks, Timetable):
        rows = [
            [Span(f"{b.stage}{b.kind}{b.microbatch}", b.start, b.end, b.kind) for b in bars]
            + [
                Span(f"{m.stage}{m.kind}{m.microbatch}", m.start, m.end, "communication")
                for m in messages
                if m.end > m.start
            ]
            for bars, messages in zip(ranks.ranks, ranks.messages, strict=True)
        ]
    elif _recorded(ranks):
        width = _width(ranks)
        rows = [spans(records, width * CLOSED) for records in ranks]
    else:
        rows = [[Span(*one) for one in row] for row in ranks]
    if not any(one.end > one.start for row in rows for one in row):
        raise ValueError("nothing to draw: expected at least one rank with a span that lasts")
    return rows


def spans(records: Iterable[Record], closed: float = 0) -> list[Span]:
    """A ledger's records as bars: those of one phase that follow each other, gaps up to ``closed``, are one."""
    found: list[Span] = []
    records = sorted((r for r in records if r.phase != "waiting" and r.cost.ps), key=lambda r: (_lane(r), r.start))
    for r in records:
        last, end = (found[-1] if found else None), r.start + r.cost.ps
        name = r.op if r.phase == "communication" else r.phase
        if last and (last.kind == "communication") == _lane(r) and last.name == name and r.start <= last.end + closed:
            found[-1] = last._replace(end=max(end, last.end))
        else:
            action = ACTION.fullmatch(r.phase)
            found.append(Span(name, r.start, end, action[2] if action else PHASES.get(r.phase, r.phase)))
    return found


def shares(row: Sequence[Span], start: float, end: float) -> Shares:
    """How one rank spends the time from ``start`` to ``end``."""
    computing = length(union((s.start, s.end) for s in row if s.kind not in NOT_COMPUTING))
    either = length(union((s.start, s.end) for s in row if s.kind != "waiting"))
    whole = end - start
    return Shares(computing / whole, (either - computing) / whole, 1 - either / whole)


def bounds(rows: Sequence[Sequence[Span]]) -> tuple[float, float]:
    """From the first start to the last end."""
    return min(one.start for row in rows for one in row), max(one.end for row in rows for one in row)


def sentence(rows: Sequence[Sequence[Span]], unit: float | None = None) -> str:
    """What the figure says: how long it takes, what ranks do in it on average, and which one waits most."""
    start, end = bounds(rows)
    each = [shares(row, start, end) for row in rows]
    mean = [quantity(sum(of) / len(each), "%") for of in zip(*each, strict=True)]
    idle = [1 - one.computing for one in each]
    most, least = (pick(range(len(idle)), key=lambda rank: idle[rank]) for pick in (max, min))
    long = f"{three_digits(end - start)} units" if unit is None else quantity((end - start) * unit, "s")
    least_busy, most_busy = (quantity(each[rank].computing, "%") for rank in (most, least))
    spread = f"Rank {most} computes least ({least_busy}), rank {least} most ({most_busy})."
    return (
        f"{len(rows)} ranks, {long}: on average {mean[0]} computing, {mean[1]} waiting for communication under way, "
        f"{mean[2]} waiting for other ranks. {spread if least_busy != most_busy else 'All compute equally long.'}"
    )


def _recorded(ranks: Timetable | Sequence[Sequence[Span | Record]]) -> bool:
    return not isinstance(ranks, Timetable) and any(isinstance(one, Record) for row in ranks for one in row[:1])


def _width(ranks: Sequence[Sequence[Record]]) -> float:
    times = [t for row in ranks for r in row for t in (r.start, r.start + r.cost.ps)]
    return max(times) - min(times)


def _lane(record: Record) -> bool:
    return record.phase == "communication"


def _axis(length: float, unit: float | None) -> tuple[float, str]:
    """Factor from the rows' unit to the axis's, and its name."""
    if unit is None:
        return 1, "time (in the unit of the durations)"
    size, name = next((pair for pair in SCALES if length * unit >= 3 * pair[0]), SCALES[-1])
    return unit / size, f"emulated time ({name})"


def _draw(ax: Axes, place: int, one: Span, window: tuple[float, float], scale: float, own: int, beside: bool) -> None:
    """A bar, with its micro-batch where there is room; ``own`` is the first of the rank's stages.

    ``beside``: a forward and a backward overlap, one above the other.
    """
    colour, hatch = KINDS[one.kind][:2] if one.kind in KINDS else style.look_of(one.kind, style.PHASES)
    action, low = ACTION.fullmatch(one.name), one.kind == "communication"
    if action and int(action[1]) != own:
        colour = to_hex([0.5 + part / 2 for part in to_rgb(colour)])
    left, width = (one.start - window[0]) * scale, (one.end - one.start) * scale
    middle, height = (place + 0.34, 0.16) if low else (place - 0.08, 0.64)
    if beside:
        middle, height = middle + (-0.16 if one.kind == "F" else 0.16), 0.32
    ax.barh(middle, width, left=left, height=height, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
    if action and (one.end - one.start) / (window[1] - window[0]) > ROOM[0] + ROOM[1] * len(action[3]):
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1}
        ax.text(left + width / 2, middle, action[3], ha="center", va="center", fontsize=11, bbox=box,
                color=style.ink(colour), clip_on=True)  # fmt: skip


def _shares(ax: Axes, rows: Sequence[Sequence[Span]]) -> None:
    """How much of the time each rank computes, at the right of its row."""
    for place, row in enumerate(rows):
        text = f"{shares(row, *bounds(rows)).computing:.0%}"
        ax.text(1.012, place, text, transform=ax.get_yaxis_transform(), va="center")
    ax.text(1.012, -0.62, "busy", transform=ax.get_yaxis_transform(), va="center", fontsize=12)


def _legend(fig: Figure, kinds: Sequence[str]) -> None:
    marks = []
    for kind in sorted(kinds, key=lambda k: list(KINDS).index(k) if k in KINDS else -1):
        colour, hatch, label = KINDS[kind] if kind in KINDS else (*style.look_of(kind, style.PHASES), kind)
        marks.append(Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=label))
    fig.legend(handles=marks, ncols=min(4, len(marks)), loc="outside lower center", handlelength=2, columnspacing=1.2)
