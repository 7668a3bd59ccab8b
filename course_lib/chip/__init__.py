"""The hardware on paper: figures with their sources, and what an operator costs. NumPy only, never torch."""

from course_lib.chip.cost import Cost, Matmul, UnsupportedDtype, Work, cost
from course_lib.chip.figures import Figure, SpecError, UnknownFigure
from course_lib.chip.spec import ChipSpec, LinkSpec, SystemSpec, chips, load_chip, load_system, systems

__all__ = [
    "ChipSpec", "Cost", "Figure", "LinkSpec", "Matmul", "SpecError", "SystemSpec", "UnknownFigure", "UnsupportedDtype",
    "Work", "chips", "cost", "load_chip", "load_system", "systems",
]  # fmt: skip
