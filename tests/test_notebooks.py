"""Every notebook, run again under strict nbval, measured and checked; and proof that this can fail.

A notebook runs in a pytest of its own, so that the time and the memory of all its processes can be told apart.
Seconds allowed: 60, or what the environment variable NOTEBOOK_SECONDS says, for a machine slower than two cores.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from course_lib.chip import load_chip
from course_lib.lessons.lint import canonical, compared_cells, findings
from course_lib.lessons.notebooks import normalise, quiet_environment, read

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = float(os.environ.get("NOTEBOOK_SECONDS", 60))
BYTES = 2 * 10**9
HANGS = 300  # seconds after which a run is stopped


@dataclass
class Run:
    """One notebook under nbval: its exit status and report, its time, its memory, the processes it left behind."""

    status: int
    report: str
    seconds: float
    peak_bytes: int
    left_behind: list[str]


def _memory(process: psutil.Process) -> int:
    """Bytes of one process; pages that several processes share are divided among them where the system can tell."""
    try:
        info = process.memory_full_info() if sys.platform == "linux" else process.memory_info()
        return getattr(info, "pss", info.rss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _tree(root: psutil.Process) -> set[psutil.Process]:
    try:
        return {root, *root.children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def run_nbval(file: Path, scratch: Path, data: Path | None = None) -> Run:
    """Run one notebook under strict nbval; with ``data``, on that data folder."""
    environment = quiet_environment(scratch) | ({"COURSE_DATA": str(data)} if data else {})
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    quiet = ["-q", "--color=no", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull]
    command = [sys.executable, "-m", "pytest", "--nbval", *quiet, "--rootdir", str(file.parent), str(file)]
    report, start, peak = scratch / f"{file.stem}.log", time.monotonic(), 0
    with report.open("w") as log:
        process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=file.parent)
        seen = _tree(process)
        while process.poll() is None and time.monotonic() - start < HANGS:
            tree = _tree(process)
            seen |= tree
            peak = max(peak, sum(map(_memory, tree)))
            time.sleep(0.2)
    seconds = time.monotonic() - start
    left = _stop(seen | _started_in(environment))
    status = process.wait()
    return Run(status, report.read_text(errors="replace"), seconds, peak, left)


def _started_in(environment: dict[str, str]) -> set[psutil.Process]:
    """The processes that inherited a run's environment, even those that left its tree: its IPYTHONDIR is unique."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("IPYTHONDIR") == environment["IPYTHONDIR"]:
                found.add(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def _stop(processes: set[psutil.Process]) -> list[str]:
    """Wait a little for processes to end, end those that do not, and give their command lines."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    left = []
    for process in alive:
        try:
            left.append(" ".join(process.cmdline())[:120])
            process.kill()
        except psutil.NoSuchProcess:
            pass
    return left


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook(notebook: Path, tmp_path: Path, record_property) -> None:
    compared = compared_cells(read(notebook))
    run = run_nbval(notebook, tmp_path)
    figures = f"{run.seconds:6.1f} s {run.peak_bytes / 1e6:6.0f} MB {compared:4} cells compared"
    record_property("notebook", f"{notebook.name:44}{figures}")
    if run.status:
        pytest.fail(run.report, pytrace=False)
    assert not run.left_behind, "the notebook leaves processes behind"
    assert run.seconds < SECONDS, f"{figures}; {SECONDS:g} s is the most"
    assert run.peak_bytes < BYTES, f"{figures}; 2000 MB is the most"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_stored_form(file: Path) -> None:
    assert findings(file) == []


def _small_notebook(folder: Path, printed: dict[str, str]) -> Path:
    """A notebook of these sources, stored with what each is to print."""
    folder.mkdir(exist_ok=True)
    cells = []
    for count, (source, text) in enumerate(printed.items(), 1):
        outputs = [new_output("stream", text=text + "\n")] if text else []
        cells.append(new_code_cell(source, outputs=outputs, execution_count=count))
    file = folder / "small.ipynb"
    file.write_text(canonical(normalise(new_notebook(cells=cells, nbformat_minor=5))), encoding="utf-8")
    return file


def _halve_bandwidth(data: Path) -> None:
    """Halve the memory bandwidth of the chip `mini` in a copy of the data folder."""
    chip = data / "chips" / "mini.toml"
    line = re.compile(r"(\[memory\].*?^bandwidth = \{ value = )([\d.]+)", re.MULTILINE | re.DOTALL)
    text, count = line.subn(lambda found: f"{found[1]}{float(found[2]) / 2:g}", chip.read_text(encoding="utf-8"))
    assert count == 1, "data/chips/mini.toml has no [memory] bandwidth to halve"
    chip.write_text(text, encoding="utf-8")


@pytest.fixture
def copied_data(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "data", tmp_path / "data"))


def test_a_changed_chip_is_reported(tmp_path: Path, copied_data: Path) -> None:
    show = "from course_lib.chip import load_chip\n\nprint(load_chip('mini').memory_bandwidth)"
    file = _small_notebook(tmp_path / "notebooks", {show: str(load_chip("mini").memory_bandwidth)})
    unchanged = run_nbval(file, tmp_path, copied_data)
    _halve_bandwidth(copied_data)
    changed = run_nbval(file, tmp_path, copied_data)
    assert (unchanged.status, changed.status) == (0, 1), unchanged.report + changed.report
    assert "Cell outputs differ" in changed.report


def test_a_changed_chip_is_reported_by_lesson_00(tmp_path: Path, copied_data: Path) -> None:
    lessons = [file for file in NOTEBOOKS if file.name.startswith("00_")]
    assert lessons, "notebooks/00_*.ipynb does not exist yet"
    (tmp_path / "notebooks").mkdir()
    _halve_bandwidth(copied_data)
    changed = run_nbval(Path(shutil.copy(lessons[0], tmp_path / "notebooks")), tmp_path, copied_data)
    assert changed.status == 1, changed.report
    assert "Cell outputs differ" in changed.report


def test_time_memory_and_processes_are_measured(tmp_path: Path) -> None:
    greedy = "import time\n\nblock = bytearray(500_000_000)\ntime.sleep(2)\nprint(len(block))"
    leave = "import subprocess\n\n_ = subprocess.Popen(['sleep', '60'], start_new_session=True)"
    run = run_nbval(_small_notebook(tmp_path, {greedy: "500000000", leave: ""}), tmp_path)
    assert run.status == 0, run.report
    assert run.seconds > 2
    assert 500e6 < run.peak_bytes < 1000e6
    assert run.left_behind == ["sleep 60"]


def test_what_reaches_stderr_is_reported(tmp_path: Path) -> None:
    file = _small_notebook(tmp_path, {"import warnings\n\nprint(1)\nwarnings.warn('new')": "1"})
    run = run_nbval(file, tmp_path)
    assert run.status == 1 and "stderr" in run.report, run.report
