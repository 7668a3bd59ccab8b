"""Prints a chip's or a system's figures with their sources: ``python -m course_lib.chip ascend-910b2``."""

import sys

from course_lib.chip.figures import Figures, SpecError
from course_lib.chip.spec import chips, load_chip, load_system, systems


def lines(figures: Figures, prefix: str = "") -> list[str]:
    """One line per figure: key, value as the file has it, tag, source."""
    return [f"{prefix + key:26} {figure.written:24} {figure.tag}  {figure.source}" for key, figure in figures.items()]


def main(name: str) -> str:
    """The table for a chip's or a system's name, or for the path of a chip's file; raises SpecError."""
    if name not in systems():
        chip = load_chip(name)
        return "\n".join([chip.title, *lines(chip.figures)])
    system = load_system(name)
    links = {"scale_up": system.scale_up, "scale_out": system.scale_out}
    table = [line for key, link in links.items() if link for line in lines(link.figures, key + ".")]
    return "\n".join([system.title, *lines(system.figures), *table])


if __name__ == "__main__":
    try:
        print(main(sys.argv[1]) if len(sys.argv) == 2 else "\n".join([*chips(), *systems()]))
    except SpecError as error:
        sys.exit(str(error))
