"""What a stored notebook must look like, rule by rule.

A notebook's stored outputs are its test: nbval runs every cell again and compares. That only works if there are
outputs, and only such as repeat on every machine. `findings` gives one line per broken rule; `compared_cells` counts
what nbval has to compare.

    python -m course_lib.lessons.notebooks notebooks/00_first_flight.ipynb    # run, normalise, store, and check
"""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import reads_json, writes_json  # as they are; nbformat.read would mend them in silence

MAX_BYTES = 500_000
MAX_LINES = 20  # of a code cell
ALLOWED_TAGS = {"nbval-ignore-output", "raises-exception"}
NOT_COMPARED = {"image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json"}  # by nbval

PATH = re.compile(r"(?<![\w.:/<>)\]}~*$|-])/[A-Za-z_][\w.-]*/[\w.-]|\b[A-Z]:\\\w")
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")
PROGRESS = re.compile(r"\d%\||\bit/s\b|\bs/it\b|\r")
HOST_TIME = re.compile(r"Wall time:|CPU times:|per loop \(mean|\b\d{4}-\d\d-\d\d[ T]\d\d:\d\d")
TIMERS = re.compile(
    r"^\s*%%?time(it)?\b|\btime\.(time|monotonic|process_time)(_ns)?\(|\bperf_counter(_ns)?\(|\bdatetime\.(now|today)\(",
    re.MULTILINE,
)
WARNING = re.compile(r"\b\w*Warning:")
NBVAL_COMMENT = re.compile(r"^\s*#+\s*(NBVAL_|PYTEST_VALIDATE_)", re.MULTILINE)
IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\][(\[]|<img\b(?P<tag>[^>]*)>", re.IGNORECASE)
ALT = re.compile(r"""\balt\s*=\s*["']\s*[^"'\s]""", re.IGNORECASE)


def canonical(nb: NotebookNode) -> str:
    """The one text that a notebook is stored as."""
    return writes_json(nb) + "\n"


def findings(file: Path) -> list[str]:
    """One line for each rule that a notebook breaks; none when it is well."""
    text = file.read_text(encoding="utf-8")
    nb = reads_json(text)
    found = [finding for rule in RULES for finding in rule(nb)]
    if text != canonical(nb):
        found.append("the file is not in canonical format")
    if len(text.encode()) >= MAX_BYTES:
        found.append(f"the file has {len(text.encode()):,} bytes; {MAX_BYTES:,} is too many")
    return found


def compared_cells(nb: NotebookNode) -> int:
    """How many cells have outputs that nbval compares; a figure alone is none."""
    return sum(_is_compared(cell) for cell in _code(nb))


def _code(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _where(nb: NotebookNode, cell: NotebookNode) -> str:
    """A cell's place, counted from 1 over all cells, and its first line."""
    place = next(i for i, other in enumerate(nb.cells, 1) if other is cell)
    return f"cell {place} ({cell.source.strip().split(chr(10))[0][:40]!r})"


def _is_figure(output: NotebookNode) -> bool:
    return "image/png" in output.get("data", {})


def _is_compared(cell: NotebookNode) -> bool:
    if "nbval-ignore-output" in _tags(cell):
        return False
    return any(
        output.output_type in ("stream", "error") or (not _is_figure(output) and set(output.data) - NOT_COMPARED)
        for output in cell.outputs
    )


def _texts(output: NotebookNode) -> Iterator[str]:
    """Every piece of text in an output, as the reader sees it."""
    yield output.get("text", "")
    yield output.get("evalue", "")
    yield from output.get("traceback", [])
    yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def kernel_is_python3(nb: NotebookNode) -> Iterator[str]:
    """The kernelspec is python3, and no editor has left metadata of its own."""
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernelspec is not python3"
    if extra := set(nb.metadata) - {"kernelspec", "language_info"}:
        yield f"the notebook has metadata {sorted(extra)}"
    for cell in nb.cells:
        if extra := set(cell.metadata) - {"tags"}:
            yield f"{_where(nb, cell)} has metadata {sorted(extra)}"


def is_valid(nb: NotebookNode) -> Iterator[str]:
    """The notebook is valid nbformat 4.5: every cell has an id of its own."""
    if (nb.nbformat, nb.nbformat_minor) != (4, 5):
        yield f"the format is {nb.nbformat}.{nb.nbformat_minor}, not 4.5"
        return
    if len({cell.get("id") for cell in nb.cells}) < len(nb.cells):
        yield "cell ids are missing or occur twice"
        return
    try:
        nbformat.validate(nb)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {str(error).splitlines()[0]}"


def ran_in_order(nb: NotebookNode) -> Iterator[str]:
    """Execution counts run 1…n without gaps."""
    counts = [cell.execution_count for cell in _code(nb)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}, not 1…{len(counts)}"


def compares_something(nb: NotebookNode) -> Iterator[str]:
    """At least one stored output is compared; stripped outputs would pass in silence."""
    if compared_cells(nb) == 0:
        yield "no cell has a stored output that nbval compares"


def outputs_repeat(nb: NotebookNode) -> Iterator[str]:
    """No output holds what differs from run to run or machine to machine."""
    unwanted = {"an address": ADDRESS, "a progress bar": PROGRESS, "host time": HOST_TIME, "a warning": WARNING}
    for cell in _code(nb):
        for output in cell.outputs:
            for name, pattern in unwanted.items():
                if any(pattern.search(text) for text in _texts(output)):
                    yield f"{_where(nb, cell)} has {name} in its output"
            if output.get("name") == "stderr":
                yield f"{_where(nb, cell)} has output on stderr"
            if output.output_type == "error" and "raises-exception" not in _tags(cell):
                yield f"{_where(nb, cell)} ended in {output.ename}"


def no_absolute_paths(nb: NotebookNode) -> Iterator[str]:
    """Neither source nor output names a place on one machine."""
    for cell in nb.cells:
        texts = [cell.source, *(text for output in cell.get("outputs", []) for text in _texts(output))]
        for found in filter(None, map(PATH.search, texts)):
            yield f"{_where(nb, cell)} has the absolute path {found.group()}…"


def no_host_timers(nb: NotebookNode) -> Iterator[str]:
    """Time is computed on the emulated clock, never measured on the host's."""
    for cell in _code(nb):
        if found := TIMERS.search(cell.source):
            yield f"{_where(nb, cell)} measures host time: {found.group().strip()}"


def tags_are_answered(nb: NotebookNode) -> Iterator[str]:
    """Only the two tags that lift the comparison, and after each a cell that asserts what is claimed."""
    code = _code(nb)
    for cell, following in zip(code, [*code[1:], None], strict=True):
        if extra := set(_tags(cell)) - ALLOWED_TAGS:
            yield f"{_where(nb, cell)} has tags {sorted(extra)}"
        if _tags(cell) and not (following and re.search(r"^\s*assert\b", following.source, re.MULTILINE)):
            yield f"{_where(nb, cell)} is tagged {_tags(cell)[0]}, and no assert follows in the next code cell"


def no_nbval_comments(nb: NotebookNode) -> Iterator[str]:
    """Exceptions to the comparison are tags, never comments."""
    for cell in _code(nb):
        if found := NBVAL_COMMENT.search(cell.source):
            yield f"{_where(nb, cell)} has the comment {found.group().strip()}…; use a cell tag"


def cells_are_short(nb: NotebookNode) -> Iterator[str]:
    """One idea a cell, and no trailing semicolon: under nbval it does not hide the output."""
    for cell in _code(nb):
        lines = cell.source.rstrip().split("\n")
        if len(lines) > MAX_LINES:
            yield f"{_where(nb, cell)} has {len(lines)} lines; {MAX_LINES} is the most"
        if lines[-1].endswith(";"):
            yield f"{_where(nb, cell)} ends with a semicolon; assign to _ or end with plt.show()"


def headings_step_down(nb: NotebookNode) -> Iterator[str]:
    """One H1, the first heading, and no level is skipped on the way down."""
    levels = [len(heading) for heading in _headings(nb)]
    if levels.count(1) != 1 or levels[0] != 1:
        yield f"{levels.count(1)} headings of level 1; exactly one, and it comes first"
    for above, below in zip(levels, levels[1:], strict=False):
        if below > above + 1:
            yield f"a heading of level {below} follows one of level {above}"


def _headings(nb: NotebookNode) -> list[str]:
    prose = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    prose = re.sub(r"^(```|~~~).*?^\1", "", prose, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^(#{1,6})\s", prose, re.MULTILINE)


def images_have_alt_text(nb: NotebookNode) -> Iterator[str]:
    """Whoever cannot see an image can read it."""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for image in IMAGE.finditer(cell.source):
                if not (image["alt"] or "").strip() and not ALT.search(image["tag"] or ""):
                    yield f"{_where(nb, cell)} has an image without alt text"


def figures_have_a_sentence(nb: NotebookNode) -> Iterator[str]:
    """A computed sentence in the same or the next code cell says what a figure shows; nbval compares that."""
    code = _code(nb)
    for cell, following in zip(code, [*code[1:], None], strict=True):
        candidates = [near for near in (cell, following) if near and _is_compared(near)]
        spoken = any(output.get("text", "").strip() for near in candidates for output in near.outputs)
        if any(map(_is_figure, cell.outputs)) and not spoken:
            yield f"{_where(nb, cell)} has a figure that no printed text follows"


RULES = (
    is_valid,
    kernel_is_python3,
    ran_in_order,
    compares_something,
    outputs_repeat,
    no_absolute_paths,
    no_host_timers,
    tags_are_answered,
    no_nbval_comments,
    cells_are_short,
    headings_step_down,
    images_have_alt_text,
    figures_have_a_sentence,
)
