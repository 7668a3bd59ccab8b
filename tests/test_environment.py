"""One environment by every route: pip, conda and the lock agree; and set-up keeps its word when it cannot finish."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAME = {"torch": "pytorch-cpu"}  # all others have one name in both worlds
OF_TORCH = ("nvidia-", "cuda-", "triton")  # CUDA libraries that torch pins itself

DIRECT = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]


def locked() -> dict[str, str]:
    """Name → version of each line of the lock."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)(; .+)?", line) for line in lines]
    wrong = [line for line, pin in zip(lines, pins, strict=True) if pin is None]
    assert not wrong, f"not name==version: {wrong}"  # also no local version such as +cpu, no address
    return {canonicalize_name(pin[1]): pin[2] for pin in pins}


def test_conda_and_pip_name_the_same_packages_and_bounds() -> None:
    entries = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    conda = [Requirement(entry) for entry in entries if isinstance(entry, str)]
    ours = {CONDA_NAME.get(need.name, need.name): need.specifier for need in DIRECT}
    ours |= {"python": SpecifierSet(PROJECT["requires-python"]), "pip": SpecifierSet()}
    assert {need.name: need.specifier for need in conda} == ours
    assert [entry for entry in entries if not isinstance(entry, str)] == [{"pip": ["-e ."]}]


def test_every_dependency_is_bounded_below_and_above() -> None:
    for need in DIRECT:
        assert {part.operator for part in need.specifier} == {">=", "<"}, need


def test_the_lock_lies_within_the_bounds() -> None:
    pins = locked()
    outside = {need.name: pins.get(need.name) for need in DIRECT if pins.get(need.name, "0") not in need.specifier}
    assert not outside


def test_the_lock_is_complete() -> None:
    pins, missing, waiting, seen = locked(), set(), list(DIRECT), set()
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if name.startswith(OF_TORCH):
            continue
        if name not in pins:
            missing.add(name)
        for extra in {"", *need.extras} - {extra for done, extra in seen if done == name}:
            seen.add((name, extra))
            needs = map(Requirement, metadata.requires(name) or [])
            waiting += [each for each in needs if not each.marker or each.marker.evaluate({"extra": extra})]
    assert not missing


def test_the_lock_admits_the_oldest_python() -> None:
    oldest = min(SpecifierSet(PROJECT["requires-python"]), key=lambda part: part.version).version + ".0"
    refusing = []
    for name, version in locked().items():
        if not (found := list(metadata.distributions(name=name))) or found[0].version != version:
            continue
        needs = found[0].metadata.get("Requires-Python")
        if needs and oldest not in SpecifierSet(needs):
            refusing.append(f"{name} {version} needs Python {needs}")
    assert not refusing


def test_no_package_index_is_named() -> None:
    for name in ("Makefile", "requirements.lock", "environment.yml", "pyproject.toml", ".ci/run"):
        assert "://" not in (ROOT / name).read_text(encoding="utf-8"), name


def test_ci_runs_what_a_reader_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What set-up reads, in a folder with a space in its name."""
    folder = tmp_path / "my clone"
    (folder / "notebooks").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def fake_python(folder: Path, venv: str) -> str:
    """A Python that is new enough and answers ``-m venv`` with a shell command."""
    file = folder / "fake python"
    file.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{venv}\n')
    file.chmod(0o755)
    return f"PYTHON={file}"


def test_an_old_python_gets_one_clear_line(clone: Path) -> None:
    run = make(clone, "lab", "PYTHON=false")
    assert run.returncode == 2
    assert "needs Python 3.11 or newer" in run.stderr.splitlines()[0]
    assert not (clone / ".venv").exists()


def test_an_interrupted_set_up_is_not_believed_complete(clone: Path) -> None:
    half = 'mkdir -p "$3/bin" && printf "#!/bin/sh\\nexit 3\\n" > "$3/bin/python" && chmod +x "$3/bin/python"'
    for _ in range(2):  # the second time as the first: .venv is there, but set-up starts over
        run = make(clone, "test", fake_python(clone, half))
        assert run.returncode == 2
        assert "-m venv" in run.stdout and "-m pytest" not in run.stdout
        assert (clone / ".venv" / "bin" / "python").exists()
        assert not (clone / ".venv" / ".ready").exists()


def test_set_up_is_done_once_and_from_any_folder(clone: Path) -> None:
    whole = 'mkdir -p "$3/bin" && printf "#!/bin/sh\\nexit 0\\n" > "$3/bin/python" && chmod +x "$3/bin/python"'
    python = fake_python(clone, whole)
    assert "-m venv" in make(clone / "notebooks", "-f", "../Makefile", "test", python).stdout
    for arguments in ((), ("-C", ".."), ("-f", "../Makefile")):
        again = make(clone / "notebooks" if arguments else clone, *arguments, "test", python)
        assert again.returncode == 0 and "-m pytest" in again.stdout, again.stderr
        assert "-m venv" not in again.stdout
    (clone / "requirements.lock").touch()
    assert "-m venv" in make(clone, "test", python).stdout
    assert "--index-url" in make(clone, "test", python, "TORCH_INDEX=elsewhere").stdout
    moved = clone.rename(clone.with_name("moved"))
    assert "-m venv" in make(moved, "test", fake_python(moved, whole)).stdout


def test_an_environment_of_ones_own_is_left_alone(clone: Path) -> None:
    (clone / ".venv").mkdir()
    run = make(clone, "lab", fake_python(clone, "exit 0"))
    assert run.returncode == 2 and "Move it away" in run.stderr
    assert (clone / ".venv").exists()


def test_the_data_folder_can_be_chosen(tmp_path: Path) -> None:
    def where(chosen: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from course_lib import data; print(data.path('chips'))"]
        environment = os.environ | {"COURSE_DATA": str(chosen)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    (tmp_path / "chips").mkdir()
    assert where(tmp_path).stdout.strip() == str(tmp_path.resolve() / "chips")
    assert "which is not a folder" in where(tmp_path / "missing").stderr
    assert "no chips in the course's data folder" in where(tmp_path / "chips").stderr
