"""Run the notebooks again and store them: one canonical text, so that two runs give the same bytes.

Cell ids are kept, execution times and editors' metadata dropped, tracebacks cut to their last line. A notebook in which
a cell fails is not stored. `KERNEL_ENV` is what makes the figures repeat; ``--kernel`` registers the kernel `python3`
with it in this environment, so that a reader sees what the tests see.

    python -m course_lib.lessons.notebooks                            # all of them; `make notebooks`
    python -m course_lib.lessons.notebooks notebooks/00_*.ipynb
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import reads_json

from course_lib.lessons.lint import canonical, compared_cells, findings

FOLDER = Path(__file__).parents[2] / "notebooks"
CELL_TIMEOUT = 300  # seconds
KERNEL_ENV = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"),
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "TOKENIZERS_PARALLELISM": "false",  # else a warning about forks
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else a warning about the debugger
}
CHOICES = ("COURSE_CHIP", "COURSE_DATA")  # a reader's own; stored notebooks show the default


def register_kernel() -> None:
    """Put the kernel `python3` into this environment, where it goes before any of the user's or the machine's."""
    from ipykernel.kernelspec import install
    from matplotlib import font_manager  # its first import takes seconds and says so; better here than in a lesson

    assert font_manager
    install(prefix=sys.prefix, env=KERNEL_ENV)


def quiet_environment(scratch: Path) -> dict[str, str]:
    """The environment in which notebooks are stored and tested: nothing of the user's own configuration."""
    kept = {name: value for name, value in os.environ.items() if name not in CHOICES}
    own = {"IPYTHONDIR": str(scratch), "JUPYTER_RUNTIME_DIR": str(scratch), "JUPYTER_PREFER_ENV_PATH": "1"}
    return kept | KERNEL_ENV | own


def read(file: Path) -> NotebookNode:
    """A notebook as nbformat 4.5, with an id for every cell that has none of its own."""
    nb = reads_json(file.read_text(encoding="utf-8"))
    nb.nbformat, nb.nbformat_minor = 4, 5
    seen: set[str] = set()
    for place, cell in enumerate(nb.cells):
        if cell.get("id") in seen | {None}:
            cell.id = hashlib.sha256(f"{place}\n{cell.source}".encode()).hexdigest()[:8]
        seen.add(cell.id)
    return nb


def normalise(nb: NotebookNode) -> NotebookNode:
    """Drop from an executed notebook, in place, everything that is not the lesson."""
    nb.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in nb.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
            if output.output_type == "error":  # nbval does not compare it, and it is full of paths
                output.traceback = [f"{output.ename}: {output.evalue}"]
    return nb


def store(file: Path) -> list[str]:
    """Run one notebook and write it back; gives what is wrong with it. If a cell fails, the file stays as it was."""
    nb = read(file)
    try:
        NotebookClient(
            nb,
            timeout=CELL_TIMEOUT,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],  # of the kernel itself
            resources={"metadata": {"path": str(file.parent)}},
        ).execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [f"not stored: {str(error).strip()}"]
    text = canonical(normalise(nb))
    if text != file.read_text(encoding="utf-8"):
        file.write_text(text, encoding="utf-8", newline="\n")
    return findings(file)


def main() -> int:
    """Store the notebooks named on the command line; returns 1 when anything is wrong with one."""
    parser = argparse.ArgumentParser(prog="python -m course_lib.lessons.notebooks")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--kernel", action="store_true", help="only register the kernel python3 in this environment")
    options = parser.parse_args()
    if options.kernel:
        register_kernel()
        return 0
    if missing := [str(file) for file in options.notebooks if not file.is_file()]:
        parser.error(f"no notebook {', '.join(missing)}")
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        environment = quiet_environment(Path(scratch))
        os.environ.clear()
        os.environ.update(environment)
        for file in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
            start = time.perf_counter()
            problems = store(file.resolve())
            seconds = time.perf_counter() - start
            print(f"{file.name:40} {seconds:6.1f} s  {compared_cells(read(file)):3} cells compared", flush=True)
            for problem in problems:
                print(f"    {problem}", flush=True)
            wrong += len(problems)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
