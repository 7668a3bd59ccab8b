"""The timeline over ranks: from a computed timetable, from a ledger's records, from spans; and what it says."""

from collections import Counter

import pytest
from matplotlib import pyplot as plt

from course_lib import npu
from course_lib.chip.cost import Cost
from course_lib.npu.ledger import Record
from course_lib.parallel.tables import table
from course_lib.plan.timetable import replay
from course_lib.show import ranks
from course_lib.show.ranks import Shares, Span, over_ranks, rows_of, shares, spans


def record(phase: str, start: int, ps: int, op: str = "mm") -> Record:
    return Record(op, phase, "", (), 0, 0, 0, start, Cost(ps, "cube", 0, 0, 0, 0, 0, 0, 0, 0, None, 0))


def bars() -> Counter:
    """How many bars of each width the figure has."""
    return Counter(round(patch.get_width(), 6) for patch in plt.gca().patches)


def test_a_timetable(capsys) -> None:
    when = replay(table("1F1B", 4, 8), forward=1, backward=2)
    over_ranks(when, title="1F1B")
    ax = plt.gca()
    assert bars() == {1: 32, 2: 32}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert ax.get_title(loc="left") == "1F1B" and ax.get_xlim() == (0, when.makespan)
    assert [text.get_text() for text in ax.texts].count("73%") == 4  # 24 of 33
    said = capsys.readouterr().out
    assert said == (
        "4 ranks, 33.0 units: on average 72.7 % computing, 0.0 % waiting for communication under way, "
        "27.3 % waiting for other ranks. All compute equally long.\n"
    )


def test_shares_are_those_of_the_timetable() -> None:
    when = replay(table("GPipe", 3, 4, communication=True), [1, 2, 1], 3, transfer=0.5)
    for row, bubble in zip(rows_of(when), when.bubble, strict=True):
        assert 1 - shares(row, 0, when.makespan).computing == pytest.approx(bubble)


def test_a_message_beside_computing_is_not_waited_for() -> None:
    row = [Span("0F0", 0, 4, "F"), Span("send", 2, 5, "communication"), Span("0B0", 8, 10, "B")]
    assert shares(row, 0, 10) == Shares(0.6, 0.1, pytest.approx(0.3))


def test_numbers_where_there_is_room_and_later_stages_lighter() -> None:
    over_ranks(replay(table("Interleaved1F1B", 2, 4, vpp=2), 1, 2))
    ax = plt.gca()
    assert Counter(text.get_text() for text in ax.texts)["0"] == 8  # F and B of micro-batch 0 in four stages
    assert len({patch.get_facecolor() for patch in ax.patches}) == 4
    plt.close("all")
    over_ranks(replay(table("1F1B", 2, 64), 1, 2))
    assert not any(text.get_text().isdigit() for text in plt.gca().texts)


def test_overlapped_ones_lie_one_above_the_other() -> None:
    over_ranks(replay(table("DualPipeV", 2, 4), 1, 2, overlapped=2.5))
    low, full = (sum(patch.get_height() == pytest.approx(h) for patch in plt.gca().patches) for h in (0.32, 0.64))
    pairs = sum(isinstance(action[0], tuple) for row in table("DualPipeV", 2, 4) for action in row)
    assert low == 2 * pairs and full > 0


def test_records_of_one_phase_are_one_bar_and_waiting_none() -> None:
    found = spans(
        [
            record("0F0", 0, 10), record("0F0", 10, 5), record("communication", 4, 9, "send"), record("0F1", 15, 5),
            record("waiting", 20, 30, "wait"), record("0F1", 50, 5), record("optimizer", 56, 4), record("backward", 70, 9),
        ],
        closed=2,
    )  # fmt: skip
    assert found == [
        Span("0F0", 0, 15, "F"), Span("0F1", 15, 20, "F"), Span("0F1", 50, 55, "F"), Span("optimizer", 56, 60, "optimizer"),
        Span("backward", 70, 79, "B"), Span("send", 4, 13, "communication"),
    ]  # fmt: skip


def test_a_ledger_in_seconds(capsys) -> None:
    over_ranks([[record("forward", 10**9, 2 * 10**9)], [record("backward", 3 * 10**9, 10**9), record("x", 0, 0)]])
    assert plt.gca().get_xlabel() == "emulated time (ms)" and bars() == {2: 1, 1: 1}
    said = capsys.readouterr().out
    assert said.startswith("2 ranks, 3.00 ms: on average 50.0 % computing")
    assert said.endswith("Rank 1 computes least (33.3 %), rank 0 most (66.7 %).\n")


def test_a_real_ledger() -> None:
    import torch

    with npu.ledger() as ledger, ledger.phase("0F3"):
        x = torch.ones(64, 64, device="npu")
        (x @ x).sum().item()
    over_ranks([ledger.records])
    assert "3" in [text.get_text() for text in plt.gca().texts]


def test_nothing_to_draw_is_refused() -> None:
    for nothing in ([], [[]], [[Span("0F0", 1, 1, "F")]]):
        with pytest.raises(ValueError, match="nothing to draw"):
            over_ranks(nothing)


def test_every_kind_has_a_colour_and_a_hatch_of_its_own() -> None:
    looks = [look[:2] for look in ranks.KINDS.values()]
    assert len({colour for colour, _ in looks}) == len({hatch for _, hatch in looks}) == len(looks)
