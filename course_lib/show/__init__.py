"""Figures that read from the back row and in grey; each prints a computed sentence that says the same in words.

>>> from course_lib import show
>>> show.quantity(1_234_000_000, "FLOP")
'1.23 GFLOP'
"""

from importlib import import_module

PLACES = {
    "batch_choices": "training", "loss_curve": "training", "memory_over_step": "memory", "phase_bars": "phases",
    "error_of_2n": "arithmetic", "frontier": "serving", "step_beside_inference": "beside", "token_flops": "arithmetic",
    "ladder": "cores", "pipes": "cores", "bytes_over_context": "peaks", "peak_bars": "peaks",
    "formats": "ruler", "magnitudes": "ruler",
    "quantity": "units", "rate_over": "roofs", "roofline": "roofs", "time_budget": "training", "timeline": "streams",
    "utilisation_curve": "training",
}  # fmt: skip
__all__ = [*PLACES]


def __getattr__(name: str) -> object:
    """A figure's function, imported when it is first asked for: matplotlib takes a second."""
    if name not in PLACES:
        raise AttributeError(f"module 'course_lib.show' has no attribute {name!r}; there are {', '.join(PLACES)}")
    return getattr(import_module(f"course_lib.show.{PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(PLACES)
