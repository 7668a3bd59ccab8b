"""PyTorch's pipeline schedules as tables: which stages a rank has, and what it does in which order.

    >>> table("1F1B", pp=2, microbatches=3)[0]
    [('F', 0, 0), ('F', 0, 1), ('B', 0, 0), ('F', 0, 2), ('B', 0, 1), ('B', 0, 2)]

Made without a process group, so that `plan.timetable` can replay them for thousands of ranks.
"""

from collections.abc import Iterator
from types import SimpleNamespace

from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._utils import generate_rank_to_stage_mapping

SINGLE = ("GPipe", "1F1B")  # one stage on each rank
LOOPED = ("Interleaved1F1B", "InterleavedZeroBubble")  # any number: rank r has stages r, r + p, r + 2p, …
VEE = ("ZBVZeroBubble", "DualPipeV")  # two: rank r has stages r and 2p − 1 − r
SCHEDULES = SINGLE + LOOPED + VEE

Action = tuple  # (kind, stage, micro-batch); a tuple of actions where several are one


def per_rank(name: str, vpp: int | None = None) -> int:
    """Stages on each rank under a schedule; ``vpp`` matters to the looped ones (default 2). ValueError for others."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; expected one of {', '.join(SCHEDULES)}")
    stages = 1 if name in SINGLE else 2 if name in VEE else vpp or 2
    if vpp not in (None, stages):
        raise ValueError(f"{name} has {stages} stage(s) on each rank; leave out vpp={vpp}")
    return stages


def placement(name: str, pp: int, vpp: int | None = None) -> list[list[int]]:
    """The stages of each rank, in rising order."""
    places = generate_rank_to_stage_mapping(pp, pp * per_rank(name, vpp), "v" if name in VEE else "loop")
    return [places[rank] for rank in range(pp)]


def table(
    name: str, pp: int, microbatches: int, vpp: int | None = None, communication: bool = False
) -> list[list[Action]]:
    """What each rank does, in order, as PyTorch's own schedule says; needs no process group.

    An action is (kind, stage, micro-batch) with kind F, B (backward), or its halves I (gradients of inputs) and W
    (of weights). A tuple of actions is a forward and a backward that may overlap (DualPipeV). With ``communication``
    also SEND_F, RECV_F, SEND_B, RECV_B where they are launched; a tuple of those is launched and waited for at once.
    """
    count = per_rank(name, vpp)
    parts = [SimpleNamespace(num_stages=pp * count, group_size=pp, group_rank=0, stage_index=0, submod=None)] * count
    schedule = schedules.get_schedule_class(name)(parts[0] if name in SINGLE else parts, microbatches)
    single = name in SINGLE
    order = schedule.pipeline_order if single or not communication else schedule.pipeline_order_with_comms
    rows = [[plain(action) for action in order[rank] if action is not None] for rank in range(pp)]
    rows = [[action for action in row if action[0] not in ("UNSHARD", "RESHARD", "REDUCE_GRAD")] for row in rows]
    if not single:
        return rows
    rows = [numbered(row) for row in rows]
    return [list(lowered(row, pp, fused=name == "1F1B")) for row in rows] if communication else rows


def plain(action: schedules._Action) -> Action:
    """PyTorch's action as a tuple."""
    if action.sub_actions:
        return tuple(plain(one) for one in action.sub_actions)
    return action.computation_type.value, action.stage_index, action.microbatch_index


def numbered(row: list[Action]) -> list[Action]:
    """Micro-batches in order: PyTorch's table (not its run) of 1F1B numbers the last rank's forwards from 1, to m."""
    count = {"F": 0, "B": 0}
    result = []
    for kind, stage, _ in row:
        result.append((kind, stage, count[kind]))
        count[kind] += 1
    return result


def lowered(row: list[Action], stages: int, fused: bool) -> Iterator[Action]:
    """A rank's row with its messages, as the loops of ScheduleGPipe and Schedule1F1B launch them.

    Both receive just before they compute. 1F1B sends and receives in one call where it turns from forward to backward
    or back, and waits for both.
    """
    sends: tuple[Action, ...] = ()
    for place, (kind, stage, number) in enumerate(row):
        outer = stage == (0 if kind == "F" else stages - 1)
        receives = () if outer else ((f"RECV_{kind}", stage, number),)
        turns = fused and place > 0 and row[place - 1][0] != kind
        yield from [sends + receives] if turns and sends and receives else sends + receives
        yield (kind, stage, number)
        sends = () if stage == (stages - 1 if kind == "F" else 0) else ((f"SEND_{kind}", stage, number),)
    yield from sends
