"""One rank stands for thousands: a program runs as one rank of a job that no machine here could hold.

    seconds = alone(step, config, ranks=2048, rank=5, system="h800-cluster")

The program is told, as by torchrun, that it is rank 5 of 2,048. Its process group is PyTorch's "fake": the other ranks
are taken to do the same at the same time, so collectives take what the links of the system make them take, and nobody is
late. Tensors have shapes and no numbers. What other ranks do at *other* times, as the stages of a pipeline, one rank
cannot know: it computes its own actions without the bubble, which `plan.timetable` finds from their durations.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from course_lib.llm.device import open_device
from course_lib.parallel import rank as one_rank
from course_lib.parallel.launch import launch


def alone(fn: Callable[..., Any], *args: Any, ranks: int, rank: int = 0, system: str | None = None,
          timeout: float = 300) -> Any:  # fmt: skip
    """What ``fn(*args)`` returns on ``rank`` of ``ranks``, in a process of its own, without numbers.

    ``system`` and ``timeout`` as `launch` has them; the system grows by nodes to as many ranks. ValueError for a rank
    that there is not; RankError, with the traceback, for what ``fn`` raises.
    """
    if not isinstance(ranks, int) or not isinstance(rank, int) or not 0 <= rank < ranks:
        raise ValueError(f"rank={rank!r} of ranks={ranks!r}: expected whole numbers, the rank from 0 to ranks - 1")
    one_rank.emulation("npu", system, numerics=False)
    return launch(_run, fn, args, ranks, rank, system, ranks=1, device="cpu", timeout=timeout)[0]


def _run(fn: Callable[..., Any], args: tuple, ranks: int, rank: int, system: str | None) -> Any:
    dist.destroy_process_group()  # that of launch
    with one_of(ranks, rank, system):
        try:
            return fn(*args)
        except Exception as error:
            error.add_note(f"this was rank {rank} of {ranks}, alone")
            raise


@contextlib.contextmanager
def one_of(ranks: int, rank: int, system: str | None = None) -> Iterator[torch.device]:
    """This process as ``rank`` of ``ranks``, without numbers; gives its device. The emulated npu must not be loaded yet."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers "fake" too

    wanted = one_rank.emulation("npu", system, numerics=False) | {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"
    }  # fmt: skip
    if hasattr(torch, "npu"):
        raise RuntimeError(
            "the device npu is loaded already, with numbers; use alone(), which has a process of its own"
        )
    os.environ.update(wanted)
    device = open_device("npu:0")
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield device
    finally:
        dist.destroy_process_group()
        gc.collect()
