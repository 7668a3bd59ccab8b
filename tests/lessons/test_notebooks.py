"""Storing a notebook: the same bytes each time, nothing of the machine, and never one that failed."""

from pathlib import Path

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course_lib.lessons.lint import canonical, compared_cells
from course_lib.lessons.notebooks import read, store


def written(folder: Path, *sources: str) -> Path:
    """A notebook as an editor leaves it: never run, with metadata of its own."""
    cells = [new_markdown_cell("# Title"), *map(new_code_cell, sources)]
    cells[1].metadata.update(collapsed=True, tags=["raises-exception"])
    file = folder / "lesson.ipynb"
    file.write_text(canonical(new_notebook(cells=cells, metadata={"widgets": {}})), encoding="utf-8")
    return file


def test_storing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one_thread = "import os\n\nassert os.environ['OMP_NUM_THREADS'] == '1'\nprint(1)"
    file = written(tmp_path, "raise ValueError('no')", one_thread)
    ids = [cell.id for cell in read(file).cells]
    assert store(file) == []
    first = file.read_bytes()
    assert store(file) == []
    assert file.read_bytes() == first
    assert [cell.id for cell in read(file).cells] == ids
    assert read(file).cells[1].outputs[0].traceback == ["ValueError: no"]
    assert compared_cells(read(file)) == 2


def test_a_notebook_that_fails_stays_as_it_was(tmp_path: Path) -> None:
    file = written(tmp_path, "1", "raise RuntimeError('broken')")
    before = file.read_bytes()
    problems = store(file)
    assert len(problems) == 1 and problems[0].startswith("not stored") and "broken" in problems[0]
    assert file.read_bytes() == before


def test_cells_without_ids_get_repeatable_ones(tmp_path: Path) -> None:
    file = written(tmp_path, "1", "1")
    nb = read(file)
    for cell in nb.cells:
        del cell["id"]
    nb.nbformat_minor = 4
    file.write_text(canonical(nb), encoding="utf-8")
    ids = [cell.id for cell in read(file).cells]
    assert ids == [cell.id for cell in read(file).cells]
    assert len(set(ids)) == 3
