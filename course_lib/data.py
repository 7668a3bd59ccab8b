"""Where the course's own data lies: ``data/`` in a clone, ``course_lib/_data`` in an installed wheel.

The environment variable ``COURSE_DATA`` names another folder of the same layout, for chips and corpora of your own.
"""

import os
from pathlib import Path

_PACKAGED = Path(__file__).parent / "_data"


def _root() -> Path:
    """The folder in use; raises NotADirectoryError when ``COURSE_DATA`` is set and names none."""
    chosen = os.environ.get("COURSE_DATA")
    if not chosen:
        return _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "data"
    if not Path(chosen).is_dir():
        raise NotADirectoryError(f"COURSE_DATA is {chosen!r}, which is not a folder")
    return Path(chosen).resolve()


ROOT = _root()


def path(*parts: str) -> Path:
    """The file or folder ``data/<parts>``; raises FileNotFoundError naming what was looked for."""
    found = ROOT.joinpath(*parts)
    if not found.exists():
        raise FileNotFoundError(f"no {'/'.join(parts)} in the course's data folder {ROOT}; is the clone complete?")
    return found
