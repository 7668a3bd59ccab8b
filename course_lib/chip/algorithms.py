"""HCCL_ALGO: which algorithm the user asks a collective to use inside a node, between nodes, between supernodes.

The value is what HCCL documents: ``level0:NA;level1:NHR`` for all operators, or ``allreduce=level0:NA;level1:ring/…`` one by
one. Level1 is between the nodes of one scale-up network, or of all where a node has its own; level2 is between supernodes.
HCCL chooses by itself what is not named, and where a name does not fit the operator.
"""

from functools import lru_cache

from course_lib.chip.links import NAMES
from course_lib.chip.spec import SystemSpec

KINDS = (
    "all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "gather", "scatter", "all_to_all", "send",
    "barrier",
)  # fmt: skip
OPERATORS = {  # HCCL_ALGO's names
    "allreduce": "all_reduce", "reducescatter": "reduce_scatter", "allgather": "all_gather", "broadcast": "broadcast",
    "reduce": "reduce", "scatter": "scatter", "alltoall": "all_to_all",
}  # fmt: skip
LEVELS = {
    "level0": ("NA", "mesh", "ring", "NHR", "H-D_R", "NB"),  # HCCL takes NA only; the others are for experiments here
    "level1": ("ring", "H-D_R", "NHR", "NB", "pipeline", "pairwise"),
    "level2": ("ring", "H-D_R", "NHR", "NB", "pipeline", "pairwise"),
}

Named = tuple[int, int, int]  # codes: inside a node, between nodes of one scale-up network, between such networks


@lru_cache(maxsize=1024)
def named_algorithms(system: SystemSpec, kind: str, algorithm: str | None) -> Named:
    """The algorithms that ``algorithm`` names for ``kind``, as codes of links.NAMES; 0 where HCCL chooses.

    Raises ValueError for an unknown kind or a malformed value.
    """
    if kind not in KINDS:
        raise ValueError(f"no collective named {kind!r}; there are {', '.join(KINDS)}")
    levels = parse(algorithm).get(kind, {}) if algorithm else {}
    inside, nodes = levels.get("level0", "NA"), levels.get("level1", "")
    networks = levels.get("level2", "") if system.reach > system.chips_per_node else nodes
    between = (name if (name == "pairwise") == (kind == "all_to_all") else "" for name in (nodes, networks))
    return NAMES.index(inside.removesuffix("NA")), *map(NAMES.index, between)


@lru_cache(maxsize=256)
def parse(algorithm: str) -> dict[str, dict[str, str]]:
    """{kind: {"level0": …, "level1": …}} of a value of HCCL_ALGO; raises ValueError where it is malformed.

    >>> parse("allreduce=level0:NA;level1:NHR/alltoall=level0:NA;level1:pairwise")["all_to_all"]["level1"]
    'pairwise'
    """
    if "=" not in algorithm:
        return dict.fromkeys(KINDS, _levels(algorithm))
    found = {}
    for part in algorithm.split("/"):
        operator, _, levels = part.partition("=")
        kind = OPERATORS.get(operator)
        if kind is None or kind in found:
            raise ValueError(
                f"HCCL_ALGO: {part!r} in {algorithm!r}: expected each operator once, of {', '.join(OPERATORS)}"
            )
        found[kind] = _levels(levels)
    return found


def _levels(text: str) -> dict[str, str]:
    found = {}
    for part in text.split(";"):
        level, _, name = part.partition(":")
        if level in found or name not in LEVELS.get(level, ()):
            raise ValueError(
                f"HCCL_ALGO: {part!r} in {text!r}: expected level0:NA;level1:<algorithm>, "
                f"the algorithm one of {', '.join(LEVELS['level1'])} (NHR_V1 and AHC are not modelled)"
            )
        found[level] = name
    return found
