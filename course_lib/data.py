"""Where the course's own data lies: ``data/`` in a clone, ``course_lib/_data`` in an installed wheel."""

from pathlib import Path

_PACKAGED = Path(__file__).parent / "_data"
ROOT = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "data"


def path(*parts: str) -> Path:
    """The file or folder ``data/<parts>``; raises FileNotFoundError naming what was looked for."""
    found = ROOT.joinpath(*parts)
    if not found.exists():
        raise FileNotFoundError(f"no {'/'.join(parts)} in the course's data folder {ROOT}; is the clone complete?")
    return found
