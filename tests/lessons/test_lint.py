"""Each lint rule, on a notebook that breaks it and nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course_lib.lessons import lint
from course_lib.lessons.notebooks import normalise


def printed(text: str, name: str = "stdout") -> NotebookNode:
    return new_output("stream", name=name, text=text)


def figure() -> NotebookNode:
    return new_output("display_data", {"image/png": "aGVsbG8=", "text/plain": "<Figure size 640x480 with 1 Axes>"})


def well() -> NotebookNode:
    """A notebook that breaks no rule: a title, a figure with its sentence, a tagged cell with its assert."""
    cells = [
        new_markdown_cell("# Title\n\n![a curve](curve.png)\n\n```python\n# no heading\n```\n\n## Measure: FLOP/s/W"),
        new_code_cell("plt.show()", outputs=[figure()]),
        new_code_cell("print(2)", outputs=[printed("time is 2 ps, 5.0 tokens/s\n")]),
        new_code_cell("1 / 0", outputs=[new_output("error", ename="ZeroDivisionError", evalue="division by zero")]),
        new_code_cell("assert True"),
    ]
    cells[3].metadata.tags = ["raises-exception"]
    for count, cell in enumerate(cells[1:], 1):
        cell.execution_count = count
    return normalise(new_notebook(cells=cells, nbformat_minor=5))


def findings(nb: NotebookNode, tmp_path: Path) -> list[str]:
    file = tmp_path / "lesson.ipynb"
    file.write_text(lint.canonical(nb), encoding="utf-8")
    return lint.findings(file)


def test_a_notebook_that_is_well_has_no_findings(tmp_path: Path) -> None:
    assert findings(well(), tmp_path) == []
    assert lint.compared_cells(well()) == 2  # the printed text and the error; not the figure


def strip(nb: NotebookNode) -> None:
    for cell in nb.cells[1:]:
        cell.outputs = []


def say(text: str, name: str = "stdout") -> Callable[[NotebookNode], None]:
    return lambda nb: nb.cells[4].outputs.append(printed(text, name))


def write(source: str, place: int = 4) -> Callable[[NotebookNode], None]:
    return lambda nb: nb.cells[place].update(source=source)


def prose(text: str) -> Callable[[NotebookNode], None]:
    return lambda nb: nb.cells[0].update(source=nb.cells[0].source + text)


BROKEN: dict[str, Callable[[NotebookNode], object]] = {
    "not 4.5": lambda nb: nb.update(nbformat_minor=4),
    "ids are missing or occur twice": lambda nb: nb.cells[1].update(id=nb.cells[2].id),
    "not a valid notebook": lambda nb: nb.cells[2].outputs[0].pop("name"),
    "kernelspec is not python3": lambda nb: nb.metadata.kernelspec.update(name="course"),
    "notebook has metadata ['widgets']": lambda nb: nb.metadata.update(widgets={}),
    "has metadata ['execution']": lambda nb: nb.cells[1].metadata.update(execution={}),
    "execution counts are [1, 2, 5, 4]": lambda nb: nb.cells[3].update(execution_count=5),
    "no cell has a stored output": strip,
    "an address": say("<Tensor at 0x7f3a2b4c5d6e>"),
    "a progress bar": say(" 40%|####      | 4/10"),
    "host time": say("Wall time: 3 ms"),
    "a warning": say("UserWarning: slow"),
    "on stderr": say("hello", "stderr"),
    "ended in ZeroDivisionError": lambda nb: nb.cells[3].update(metadata={}),
    "absolute path /home/m": say("saved in /home/me/run"),
    "absolute path /Users/m": write("open('/Users/me/run')\nassert True"),
    "measures host time: %time": write("%time f()\nassert True"),
    "measures host time: time.time(": write("start = time.time()\nassert True"),
    "has tags ['skip-execution', 'slow']": lambda nb: nb.cells[3].metadata.tags.extend(["slow", "skip-execution"]),
    "no assert follows": write("print('fine')"),
    "is tagged nbval-ignore-output": lambda nb: nb.cells[4].metadata.update(tags=["nbval-ignore-output"]),
    "has the comment # NBVAL_": write("# NBVAL_IGNORE_OUTPUT\nassert True"),
    "has 21 lines": write("\n".join(["assert True"] * 21)),
    "ends with a semicolon": write("assert True;"),
    "2 headings of level 1": prose("\n# Another"),
    "level 4 follows one of level 2": prose("\n#### Deep"),
    "image without alt text": prose("\n![](curve.png)"),
    "an image without alt": prose('\n<img src="curve.png" alt="">'),
    "figure that no printed text follows": lambda nb: nb.cells[2].metadata.update(tags=["nbval-ignore-output"]),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_rule_is_found(message: str, tmp_path: Path) -> None:
    nb = well()
    BROKEN[message](nb)
    found = findings(nb, tmp_path)
    assert any(message in finding for finding in found), found


def test_every_rule_has_a_notebook_that_breaks_it(tmp_path: Path) -> None:
    for rule in lint.RULES:
        broken = [well() for _ in BROKEN]
        for nb, damage in zip(broken, BROKEN.values(), strict=True):
            damage(nb)
        assert any(list(rule(nb)) for nb in broken), rule.__name__


def test_format_and_size_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "lesson.ipynb"
    file.write_text(lint.canonical(well()).replace("\n ", "\n  "), encoding="utf-8")
    assert lint.findings(file) == ["the file is not in canonical format"]
    nb = well()
    nb.cells[0].source += "x" * 500_000
    assert any("is too many" in finding for finding in findings(nb, tmp_path))
