"""Figures and tables that read from the back row and in grey. Each prints a computed sentence that says the same in words.

    >>> from course_lib import show
    >>> show.quantity(1_234_000_000, "FLOP")
    '1.23 GFLOP'
"""

from course_lib.show.memory import memory_over_step
from course_lib.show.phases import phase_bars
from course_lib.show.timeline import timeline
from course_lib.show.training import batch_choices, loss_curve, time_budget, utilisation_curve
from course_lib.show.units import quantity

__all__ = [
    "batch_choices", "loss_curve", "memory_over_step", "phase_bars", "quantity", "time_budget", "timeline", "utilisation_curve",
]  # fmt: skip
