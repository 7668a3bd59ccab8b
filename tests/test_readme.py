"""What the README says about the clone is so: file tree, course map, links and commands.

The file tree is the block fenced with ```tree: one entry a line, folders end in a slash, two spaces per level. It names
every top-level entry of the repository (but .git*), every folder and module of course_lib down to its second level
(but __init__.py), and nothing that does not exist.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TREE = re.compile(r"^```tree\n(.*?)^```", re.MULTILINE | re.DOTALL)


def tracked() -> list[str]:
    """Every file that git knows; where there is no git, every file of the folders that the README names."""
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode == 0:
        return [name for name in run.stdout.split("\0") if name and (ROOT / name).exists()]
    files = (file for name in tree() if (ROOT / name).is_dir() for file in (ROOT / name).rglob("*"))
    return [file.relative_to(ROOT).as_posix() for file in files if file.is_file()]


def tree(text: str | None = None) -> list[str]:
    """The paths of the README's file tree; those of folders end in a slash."""
    found = TREE.search(README.read_text(encoding="utf-8") if text is None else text)
    assert found, "README.md has no block fenced with ```tree"
    paths, above = [], []
    for line in filter(str.strip, found[1].splitlines()):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], name]
        paths.append("".join(above))
    return paths


def wanted(files: list[str]) -> set[str]:
    """The paths that the file tree must name."""
    names = set()
    for file in files:
        top, *rest = file.split("/")
        if not top.startswith(".git"):
            names.add(f"{top}/" if rest else top)
        if top == "course_lib" and rest[-1].endswith(".py"):
            names.add(f"{top}/{rest[0]}/" if len(rest) > 1 else file)
            names.add("/".join([top, *rest[:2]]) + ("/" if len(rest) > 2 else ""))
    return {name for name in names if not name.endswith("__init__.py")}


def test_the_tree_names_what_exists() -> None:
    wrong = [name for name in tree() if not (ROOT / name).exists() or name.endswith("/") != (ROOT / name).is_dir()]
    assert not wrong, f"README.md's tree names what does not exist: {wrong}"


def test_the_tree_names_everything() -> None:
    missing = sorted(wanted(tracked()) - set(tree()))
    assert not missing, "add to the tree of README.md:\n" + "\n".join(missing)


def test_the_course_map_names_every_notebook() -> None:
    text = README.read_text(encoding="utf-8")
    names = sorted(f"notebooks/{file.name}" for file in (ROOT / "notebooks").glob("*.ipynb"))
    missing = [name for name in names if f"({name})" not in text]
    assert not missing, f"README.md's course map has no link to {missing}"


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", README.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not dead


def test_commands_are_targets_of_the_makefile() -> None:
    code = re.findall(r"`([^`\n]+)`|^(?: {4})?(make .+)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    named = {found[1] for line in code if (found := re.match(r"make ([a-z]+)", "".join(line)))}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"lab", "test"} <= named, "README.md does not give the two commands"
    assert named <= targets, f"README.md names targets that the Makefile lacks: {named - targets}"


def test_the_tree_can_fail() -> None:
    text = "```tree\nREADME.md  this\ncourse_lib/\n  data.py  where\n  chip/\n    spec.py\n```\n"
    assert tree(text)[2:] == ["course_lib/data.py", "course_lib/chip/", "course_lib/chip/spec.py"]
    files = ["README.md", ".gitignore", "course_lib/data.py", "course_lib/chip/spec.py", "course_lib/chip/core/isa.py"]
    assert wanted(files) - set(tree(text)) == {"course_lib/chip/core/"}
    assert "docs/" in wanted([*files, "docs/glossary.md"])
