"""Pipelines: every schedule trains to the losses and weights of one device, in the time that its replay says."""

from itertools import pairwise, product

import pytest
import torch
import torch.distributed as dist

from course_lib.llm.model import Transformer
from course_lib.parallel import launch
from course_lib.parallel.pipeline import ByHand, Pipeline, check, clip_grad_norm, pipeline
from course_lib.parallel.stages import Stage, cut
from course_lib.parallel.tables import SCHEDULES, per_rank, placement, table
from course_lib.plan.timetable import replay
from course_lib.show.ranks import ACTION, spans
from tests.parallel.same import CLIP, ROWS, Run, adamw, alone, assert_same, batches, shape

CONFIG = shape("micro", layers=8, tied=False)  # on 4 ranks at most 8 stages
STEPS = 2
SYSTEM = {"cpu": {}, "npu": {"system": "mini-node"}}
HANDS = {"by hand, naive": 1, "by hand, GPipe": 4}  # micro-batches


def make(name: str, device: torch.device, microbatches: int = ROWS) -> ByHand | Pipeline:
    model = Transformer(CONFIG)
    if name in HANDS:
        return ByHand(model, ROWS, HANDS[name], device)
    return pipeline(name, model, ROWS, microbatches, device)


def train(name: str, device: str) -> Run:
    """On each rank: the mean loss of each step, and the weights of all stages."""
    device = torch.empty(0, device=device).device  # with the number of this rank's
    pipe, losses = make(name, device), []
    optimizer = adamw(pipe.parameters())
    for tokens, targets in batches(CONFIG, STEPS):
        loss = pipe.step(tokens.to(device), targets.to(device))
        clip_grad_norm(pipe.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(None if loss is None else loss.item())
    return gathered(losses, pipe.stages if hasattr(pipe, "stages") else [pipe.stage])


def gathered(losses: list[float | None], stages: list[Stage]) -> Run:
    """Losses from the rank that has them, weights from the rank of their stage."""
    mine = {name: p.detach().cpu() for stage in stages for name, p in stage.named_parameters()}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (losses, mine))
    found = [theirs for theirs, _ in everyone if theirs[0] is not None]
    assert len(found) == 1, "the loss is on one rank, that of the last stage"
    return Run(found[0], {name: p for _, weights in everyone for name, p in weights.items()})


def train_all(names: tuple[str, ...], device: str) -> dict[str, Run]:
    return {name: train(name, device) for name in names}


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_same_loss(ranks: int, device: str) -> None:
    expected = alone(CONFIG, steps=STEPS)
    for found in launch(train_all, (*HANDS, *SCHEDULES), device, ranks=ranks, device=device, **SYSTEM[device]):
        for name in (*HANDS, *SCHEDULES):
            assert_same(found[name], expected)


# -- emulated time ------------------------------------------------------------------------------------

FOUR = 4  # ranks


def watched(names: tuple[str, ...]) -> dict[str, list]:
    """On each rank: the ledger's records of one step under each schedule, after one to warm up."""
    from course_lib import npu

    device, records = torch.empty(0, device="npu").device, {}
    (first, second) = [[part.to(device) for part in batch] for batch in batches(CONFIG, 2)]
    for name in names:
        pipe = make(name, device)
        pipe.step(*first)
        for p in pipe.parameters():
            p.grad = None
        dist.barrier(device_ids=[device.index])
        with npu.ledger() as ledger:
            pipe.watch = ledger.phase
            pipe.step(*second)
        records[name] = ledger.records
    return records


@pytest.fixture(scope="module")
def emulated() -> list[dict[str, list]]:
    return launch(watched, (*HANDS, *SCHEDULES), ranks=FOUR, system="mini-node")


def actions(ranks: list[list]) -> dict[str, tuple[int, int]]:
    """When each action of a pipeline begins and ends, in picoseconds."""
    found: dict[str, tuple[int, int]] = {}
    for span in (span for records in ranks for span in spans(records) if ACTION.fullmatch(span.name)):
        start, end = found.get(span.name, (span.start, span.end))
        found[span.name] = min(start, span.start), max(end, span.end)
    return found


def durations(found: dict[str, tuple[int, int]]) -> dict[str, list[float]]:
    """Mean time of F, B, I and W in each stage; of a whole backward where none was, that of its halves."""
    times: dict[tuple[str, int], list[int]] = {}
    for name, (start, end) in found.items():
        stage, kind, _ = ACTION.fullmatch(name).groups()
        times.setdefault((kind, int(stage)), []).append(end - start)
    stages = range(1 + max(stage for _, stage in times))
    mean = {kind: [sum(t := times.get((kind, s), [0])) / len(t) for s in stages] for kind in "FBIW"}
    mean["B"] = [b or i + w for b, i, w in zip(mean["B"], mean["I"], mean["W"], strict=True)]
    return mean


def message(ranks: list[list]) -> int:
    """Picoseconds of a message that shares its link with no other: the shortest."""
    return min(r.cost.ps for records in ranks for r in records if r.phase == "communication" and r.op == "send")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_step_takes_what_the_replay_says(name: str, emulated: list[dict[str, list]]) -> None:
    """Within 2 %, with the ledger's own durations and PyTorch's table, its messages where PyTorch launches them."""
    ranks = [records[name] for records in emulated]
    found = actions(ranks)
    step = max(end for _, end in found.values()) - min(start for start, _ in found.values())
    times = durations(found)
    rows = table(name, FOUR, ROWS, communication=True)
    when = replay(rows, times["F"], times["B"], times["W"], times["I"], message(ranks))
    assert step == pytest.approx(when.makespan, rel=0.02)
    free = replay(rows, times["F"], times["B"], times["W"], times["I"])
    assert step > 1.02 * free.makespan  # messages cost something here


def test_a_receive_launched_late_hides_no_message(emulated: list[dict[str, list]]) -> None:
    """Were messages to set off when they are made, GPipe would hide most of them beside the next micro-batch.

    PyTorch's GPipe launches a receive after the computing before it, so sender and receiver meet only then.
    """
    ranks = [records["GPipe"] for records in emulated]
    found = actions(ranks)
    step = max(end for _, end in found.values()) - min(start for start, _ in found.values())
    times = durations(found)
    flowing = replay(table("GPipe", FOUR, ROWS), times["F"], times["B"], transfer=message(ranks))
    assert step > 1.05 * flowing.makespan


def test_the_naive_pipeline_computes_on_one_rank_at_a_time(emulated: list[dict[str, list]]) -> None:
    found = sorted(actions([records["by hand, naive"] for records in emulated]).values())
    assert len(found) == 2 * FOUR and all(end <= start for (_, end), (start, _) in pairwise(found))


def test_shapes_alone_take_the_same_time(emulated: list[dict[str, list]]) -> None:
    shapes = launch(watched, ("1F1B",), ranks=FOUR, system="mini-node", numerics=False)
    with_numbers, without = (
        {name: end - start for name, (start, end) in actions([records["1F1B"] for records in ranks]).items()}
        for ranks in (emulated, shapes)
    )
    assert with_numbers == without


# -- tables and refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("messages", [False, True])
def test_every_stage_does_everything_once(name: str, messages: bool) -> None:
    p, m = 3, 6
    seen = []
    for rank, row in enumerate(table(name, p, m, communication=messages)):
        flat = [one for action in row for one in (action if isinstance(action[0], tuple) else (action,))]
        assert {stage for _, stage, _ in flat} == set(placement(name, p)[rank])
        seen += flat
    assert len(seen) == len(set(seen))
    stages, numbers = range(p * per_rank(name)), range(m)
    for stage, number in product(stages, numbers):
        assert ("F", stage, number) in seen
        assert (("B", stage, number) in seen) != (("I", stage, number) in seen and ("W", stage, number) in seen)
    sends = {one for one in seen if one[0].startswith("SEND")}
    assert len(sends) == len([one for one in seen if one[0].startswith("RECV")]) == (crossings(name, p) * m * messages)


def crossings(name: str, p: int) -> int:
    """Messages of one micro-batch, both ways: between stages that lie on different ranks."""
    rank_of = {stage: rank for rank, stages in enumerate(placement(name, p)) for stage in stages}
    return 2 * sum(rank_of[stage] != rank_of[stage + 1] for stage in range(len(rank_of) - 1))


def test_placement() -> None:
    assert placement("1F1B", 3) == [[0], [1], [2]]
    assert placement("Interleaved1F1B", 2, 3) == [[0, 2, 4], [1, 3, 5]]
    assert placement("ZBVZeroBubble", 3) == placement("DualPipeV", 3) == [[0, 5], [1, 4], [2, 3]]


def test_stages_hold_the_whole_model_once() -> None:
    model = Transformer(CONFIG)
    for count in (1, 3, 8):
        parts = cut(8, count)
        assert [layer for part in parts for layer in part] == list(range(8))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        names = [name for part in parts for name, _ in Stage(model, part).named_parameters()]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    x = batches(CONFIG, 1)[0][0]
    for part in cut(8, 3):
        x = Stage(model, part)(x)
    assert torch.equal(x, model(batches(CONFIG, 1)[0][0]))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule '1f1b'; expected one of GPipe, 1F1B"):
        table("1f1b", 2, 4)
    with pytest.raises(ValueError, match="1F1B has 1 stage"):
        table("1F1B", 2, 4, vpp=2)
    with pytest.raises(ValueError, match="8 layers do not make 9 stages"):
        cut(8, 9)
    with pytest.raises(ValueError, match="train with tied=False"):
        Stage(Transformer(shape("micro")), range(2))
    with pytest.raises(ValueError, match="losses beside the model's own"):
        Stage(Transformer(shape("micro-v3")), range(2))
    with pytest.raises(ValueError, match="8 rows do not divide into 3 micro-batches"):
        check(8, 3)
