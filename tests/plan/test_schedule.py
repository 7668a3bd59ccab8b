"""Bubbles: closed forms against the replay of PyTorch's tables, where they hold and where not; published figures."""

from itertools import pairwise, product

import numpy as np
import pytest

from course_lib.parallel.tables import SCHEDULES, per_rank, table
from course_lib.plan.schedule import bubble, idle, of_ideal, of_total, possible
from course_lib.plan.timetable import replay

LOOPED = ("Interleaved1F1B", "InterleavedZeroBubble")
CASES = [(name, v) for name in SCHEDULES for v in ((1, 2, 3) if name in LOOPED else (per_rank(name),))]


def waits(name: str, p: int, v: int, m: int, F: int, I: int, W: int) -> int:
    """Idle time of the rank that waits most, by replay; F, I and W of a rank for one micro-batch in all its stages."""
    vpp = v if name in LOOPED else None
    return max(replay(table(name, p, m, vpp), F, I + W, W).idle)  # of one stage: v times less than of a rank


def times(name: str) -> list[tuple[int, int, int]]:
    """Durations (F, I, W) of one stage for which the closed form claims to be exact."""
    every = list(product((1, 2, 3), repeat=3))
    if name == "ZBVZeroBubble":
        return [(F, I, W) for F, I, W in every if I >= F and I >= W]
    return [(F, I, W) for F, I, W in every if F == I >= W] if name == "DualPipeV" else every


@pytest.mark.parametrize(("name", "v"), CASES)
def test_formula_is_replay(name: str, v: int) -> None:
    for p, (F, I, W) in product((1, 2, 4, 5), times(name)):
        for m in [m for m in (2 * p, 3 * p) if possible(name, p, v, m)]:
            assert waits(name, p, v, m, F, I, W) == idle(name, p, v, v * F, v * (I + W), v * W), (p, m, F, I, W)


@pytest.mark.parametrize(("name", "v"), CASES)
def test_possible_is_what_pytorch_makes_and_the_formula_says(name: str, v: int) -> None:
    F, I, W = 2, 2, 1
    for p, m in product((1, 2, 3, 4), range(1, 15)):
        try:
            as_said = waits(name, p, v, m, F, I, W) == idle(name, p, v, v * F, v * (I + W), v * W)
        except ValueError:
            as_said = False
        assert as_said == possible(name, p, v, m), (p, m)


def test_both_conventions_and_arrays() -> None:
    p, m = np.array([2, 4, 8]), np.array([[8], [64]])
    assert np.array_equal(bubble("1F1B", p, 1, m), (p - 1) / m)
    assert np.allclose(of_total(bubble("GPipe", p, 1, m)), (p - 1) / (m + p - 1))
    assert np.array_equal(bubble("Interleaved1F1B", p, 3, m), (p - 1) / (3 * m))
    assert np.allclose(of_ideal(of_total(bubble("ZBVZeroBubble", p, 2, m))), bubble("ZBVZeroBubble", p, 2, m))
    assert np.array_equal(possible("1F1B", p, 1, m), m >= p)
    when = replay(table("1F1B", 8, 16), 1, 2)
    assert when.bubble == (of_total(bubble("1F1B", 8, 1, 16)),) * 8  # the replay's is of the total time


def test_deepseeks_table() -> None:
    """DeepSeek-V3's report, table 2, with PP = 8 stages: of DualPipe on 8 ranks, of DualPipeV on 4."""
    F, B, W, both = 3.0, 5.0, 2.0, 7.0
    assert idle("1F1B", 8, 1, F, B, W) == 7 * (F + B)
    assert idle("InterleavedZeroBubble", 8, 1, F, B, W) == 7 * (F + B - 2 * W)
    assert idle("DualPipe", 8, 1, F, B, W, both) == 3 * (both + B - 3 * W)
    assert idle("DualPipeV", 4, 2, 2 * F, 2 * B, 2 * W, 2 * both) == 3 * (both + B - 3 * W)
    assert idle("DualPipe", 2, 1) == idle("GPipe", 1, 1) == 0


def test_overlap_in_dualpipev_is_that_of_the_rank_that_waits_most() -> None:
    for p, both in ((2, 2.5), (4, 2.5), (4, 2), (8, 2.25)):
        when = replay(table("DualPipeV", p, 4 * p), 1, 2, overlapped=both)
        assert max(when.idle) == idle("DualPipeV", p, 2, 2, 4, 2, 2 * both)


def test_pangu_ultra() -> None:
    """arXiv:2504.07866: "30.45 % to 6.8 %" at PP 8, 2048 sequences over DP 128 and micro-batches of one: m = 16."""
    m = 2048 // 128
    one, six = (of_total(bubble(name, 8, v, m)) for name, v in (("1F1B", 1), ("Interleaved1F1B", 6)))
    assert (one, six) == (7 / 23, pytest.approx(7 / 103))  # of the total time, (p − 1)/(v·m + p − 1)
    assert 100 * one - 30.45 == pytest.approx(-0.0152, abs=1e-4)  # 30.43 %: 0.05 % less than published
    assert 100 * six - 6.8 == pytest.approx(-0.0039, abs=1e-4)  # 6.80 %, the last digit printed
    assert 100 * bubble("1F1B", 8, 1, m) == 43.75  # of the ideal time: not what they publish
    assert replay(table("Interleaved1F1B", 8, m, vpp=6), 1, 2).bubble == (pytest.approx(six),) * 8


def test_zb_v_has_no_bubble_by_its_papers_count() -> None:
    """From each rank's own start to its own end; a step lasts until the last rank is done."""
    when = replay(table("ZBVZeroBubble", 4, 8), 1, 2)
    assert [bars[-1].end - bars[0].start for bars in when.ranks] == [8 * 2 * 3] * 4
    assert when.idle == (3,) * 4


@pytest.mark.parametrize("m", [4, 16])
@pytest.mark.parametrize("place", range(4))
def test_unequal_stages_wait_for_the_slowest(place: int, m: int) -> None:
    """A stage of 4.5 among others of 3: m·4.5, and then GPipe pays each other stage once, wherever the slow one is.

    1F1B pays less the earlier the slow stage is, for its warm-up works while it would wait. The closed form of the mean
    stage says 3.375·(m + p − 1), which is too little as soon as m is large.
    """
    forward = [1.5 if stage == place else 1 for stage in range(4)]
    gpipe, steady = (replay(table(name, 4, m), forward, [2 * f for f in forward]) for name in ("GPipe", "1F1B"))
    assert gpipe.makespan == m * 4.5 + 3 * 3
    assert steady.makespan == m * 4.5 + 4.5 + 1.5 * place
    assert steady.makespan / (3.375 * (m + 3)) > (1.19 if m == 16 else 0.95)
    assert gpipe.busy == tuple(m * 3 * f for f in forward)


def test_a_first_stage_without_gradients_of_inputs_gains_nothing() -> None:
    """PyTorch does all of the first stage's backward in W, for nobody needs its inputs' gradients."""
    halves = [2, 1, 1, 1], [0, 1, 1, 1]
    rows = table("InterleavedZeroBubble", 4, 8, vpp=1)
    assert replay(rows, 1, 2, *halves).makespan == replay(rows, 1, 2).makespan == 27


def test_messages() -> None:
    """Each way through the pipeline pays p − 1 messages; who receives late pays for each micro-batch."""
    p, m, t = 4, 8, 0.25
    free = replay(table("GPipe", p, m), 1, 2).makespan
    assert free == (m + p - 1) * 3
    flowing = replay(table("GPipe", p, m), 1, 2, transfer=t)  # set off when made: beside the next micro-batch
    assert flowing.makespan == free + 2 * (p - 1) * t
    posted = replay(
        table("GPipe", p, m, communication=True), 1, 2, transfer=t
    )  # PyTorch receives just before it computes
    assert posted.makespan == free + 2 * (m + p - 2) * t
    steady = replay(table("1F1B", p, m, communication=True), 1, 2, transfer=t)
    assert steady.makespan > replay(table("1F1B", p, m), 1, 2, transfer=t).makespan > flowing.makespan
    assert all(m.end - m.start == t for row in posted.messages for m in row)
    assert sum(len(row) for row in posted.messages) == 2 * m * (p - 1)
    uneven = replay(table("GPipe", p, m), 1, 2, transfer=[0, 0, 1])
    assert uneven.makespan == free + 2


def test_messages_on_one_way_follow_each_other() -> None:
    when = replay(table("GPipe", 2, 4), 1, 2, transfer=3)
    assert [(m.start, m.end) for m in when.messages[1]] == [(1, 4), (4, 7), (7, 10), (10, 13)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("messages", [False, True])
def test_the_order_is_kept_and_nothing_starts_before_it_can(name: str, messages: bool) -> None:
    p, m = 3, 6
    rows = table(name, p, m, communication=messages)
    when = replay(rows, [1, 3, 2] * per_rank(name), 4, 1, transfer=1)
    ends = {(b.kind, b.stage, b.microbatch): b.end for bars in when.ranks for b in bars}
    last = max(stage for _, stage, _ in ends)
    for row, bars in zip(rows, when.ranks, strict=True):
        flat = [one for action in row for one in (action if isinstance(action[0], tuple) else (action,))]
        assert [b[:3] for b in bars] == [one for one in flat if "_" not in one[0]]
        assert all(a.end <= b.start for a, b in pairwise(bars))
        own = {b.stage for b in bars}
        for b in bars:
            needed = {"F": ("F", b.stage - 1), "W": ("I", b.stage)}.get(b.kind, ("B", b.stage + 1))
            if 0 <= needed[1] <= last:
                kinds = "BI" if needed[0] == "B" else needed[0]
                end = min(ends[k, needed[1], b.microbatch] for k in kinds if (k, needed[1], b.microbatch) in ends)
                assert b.start >= end + (needed[1] not in own)
    assert when.busy == tuple(sum(b.end - b.start for b in bars) for bars in when.ranks)


def test_live_micro_batches() -> None:
    p, m = 4, 12
    live = {name: replay(table(name, p, m), 1, 2).live for name in SCHEDULES}
    assert live["GPipe"] == (m,) * p
    assert live["1F1B"] == (4, 3, 2, 1)  # p − r
    assert live["Interleaved1F1B"] == (11, 9, 7, 5)  # of half a rank's stages each: (v − 1)p + 2(p − r − 1) + 1
    assert max(live["ZBVZeroBubble"]) == 2 * p  # p of whole ranks, as 1F1B's worst
    assert max(live["DualPipeV"]) == 2 * p + 1  # PP + 1 of DeepSeek's table, with PP = 2p stages
    assert max(live["InterleavedZeroBubble"]) <= max(live["Interleaved1F1B"])


def test_whole_numbers_stay_whole() -> None:
    when = replay(table("ZBVZeroBubble", 2, 4), 10**12 + 1, 2 * 10**12, 10**12, 10**12, 10**9)
    assert all(isinstance(t, int) for bars in when.ranks for b in bars for t in (b.start, b.end))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule '1f1b'; expected one of GPipe"):
        idle("1f1b", 4, 1)
    with pytest.raises(ValueError, match=r"rank 0 at \('B', 0, 0\) waits for what no rank does"):
        replay([[("F", 0, 0), ("B", 0, 0)], [("F", 1, 0)]])
    with pytest.raises(ValueError, match="expected one duration, or 2 for 2 stages"):
        replay(table("1F1B", 2, 2), [1, 1, 1])
    with pytest.raises(ValueError, match="or 1 for 2 stages"):
        replay(table("1F1B", 2, 2), transfer=[1, 1])
