"""Who may import whom: the arrows of the design, read from the source; and what every module must have.

lessons → show → plan → chip        parallel → llm → torch
          show → npu  → chip        npu → torch
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "course_lib"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 350

MAY_IMPORT = {  # part of course_lib → other parts; `data` only says where the data folder is
    "": set(),
    "data": set(),
    "chip": {"data"},
    "plan": {"chip", "data"},
    "npu": {"chip", "data"},
    "show": {"plan", "npu", "chip", "data"},
    "llm": {"data"},
    "parallel": {"llm", "data"},
    "lessons": {"show", "plan", "npu", "chip", "llm", "parallel", "data"},
}
WITHOUT_TORCH = {"", "data", "chip", "plan"}
EXCEPTIONS = {("llm/device.py", "course_lib.npu")}  # by name, at run time: the line that a script adds


def imports(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """Every module that a source of ``package`` imports, anywhere in it, and whether by name at run time."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module
            yield base, False
            if base == "course_lib":
                yield from ((f"{base}.{alias.name}", False) for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__", "run_module"):
            yield from ((arg.value, True) for arg in node.args if isinstance(getattr(arg, "value", None), str))


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def offences(file: Path, package: Path = PACKAGE) -> list[str]:
    """The imports of one file that go against the arrows."""
    place = file.relative_to(package)
    part = place.parts[0].removesuffix(".py").replace("__init__", "")
    name = ".".join(["course_lib", *place.parts[:-1]])
    assert part in MAY_IMPORT, f"course_lib/{part} is not in the design; say in MAY_IMPORT whom it may import"
    found = []
    for module, dynamic in imports(file.read_text(encoding="utf-8"), name):
        top, _, rest = module.partition(".")
        target = rest.split(".")[0] if top == "course_lib" else None
        allowed = target in (None, "", part, *MAY_IMPORT[part]) or target not in MAY_IMPORT
        if top in ("torch", "torch_npu") and part in WITHOUT_TORCH:
            allowed = False
        if not allowed and not (dynamic and (place.as_posix(), module) in EXCEPTIONS):
            found.append(f"course_lib/{place.as_posix()} imports {module}")
    return found


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_module(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    assert offences(file) == []
    assert ast.get_docstring(ast.parse(source)), "no module docstring"
    assert len(source.splitlines()) <= MAX_LINES, f"more than {MAX_LINES} lines"


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("chip/cost.py", "import torch"),
        ("plan/flops.py", "def f():\n    from torch import nn"),
        ("plan/flops.py", "from course_lib.npu.clock import Clock"),
        ("npu/ops.py", "from course_lib import llm"),
        ("npu/ops.py", "from ..llm import model"),
        ("llm/train.py", "import course_lib.npu"),
        ("llm/train.py", "import importlib\nimportlib.import_module('course_lib.npu')"),
        ("llm/device.py", "import course_lib.npu"),
        ("llm/device.py", "__import__('course_lib.chip')"),
        ("parallel/data.py", "from course_lib.show import figure"),
        ("data.py", "from course_lib.chip import load_chip"),
        ("__init__.py", "from . import npu"),
    ],
)
def test_an_offender_is_found(place: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(line)
    assert len(offences(file, tmp_path)) == 1


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("llm/device.py", "from importlib import import_module\nimport_module('course_lib.npu')"),
        ("parallel/data.py", "import torch\nfrom course_lib.llm.model import Model\nfrom . import launch"),
        ("npu/ops.py", "import torch\nfrom course_lib.chip import cost\nfrom .clock import Clock"),
        ("chip/spec.py", "import numpy\nfrom course_lib import data"),
    ],
)
def test_what_is_allowed_is_not_reported(place: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(line)
    assert offences(file, tmp_path) == []
