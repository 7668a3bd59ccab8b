"""Many chips in ordinary torch.distributed: the same code in a notebook's ranks, under torchrun, and on a cluster."""

from course_lib.parallel.failures import RankError
from course_lib.parallel.launch import launch
from course_lib.parallel.rank import ranks

__all__ = ["RankError", "launch", "ranks"]
