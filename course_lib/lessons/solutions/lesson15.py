"""Solutions of lesson 15: the silicon of a chip, the cores that a power budget feeds, and the memory that a job wants."""


def die_area(
    cores: int, core_mm2: float, l2_mib: float, mib_mm2: float, stacks: int, stack_mm2: float, surroundings: float
) -> float:
    """mm²: cores, L2 and interfaces to HBM, all of it times what surrounds them."""
    return (cores * core_mm2 + l2_mib * mib_mm2 + stacks * stack_mm2) * surroundings


def cores_within(
    watts: float, idle: float, hbm: float, core: float, ghz: float, volts: float, volts_at_1: float
) -> int:
    """Cores at ``ghz`` and ``volts`` that fit beside idle and HBM; a core takes ``core`` W at 1 GHz and ``volts_at_1``."""
    each = core * ghz * (volts / volts_at_1) ** 2
    return max(0, int((watts - idle - hbm) // each))


def best_stacks(
    flops: float, moved: float, watts: float, core: float, core_rate: float, stack: float, stack_rate: float
) -> int:
    """Stacks of HBM, 1 to 6, that make a job shortest when all other power feeds whole cores; of equals the fewest."""

    def seconds(stacks: int) -> float:
        cores = int((watts - stacks * stack) // core)
        return max(flops / (cores * core_rate), moved / (stacks * stack_rate)) if cores > 0 else float("inf")

    return min(range(1, 7), key=seconds)
