"""One environment for all tests, one xdist group per file or notebook, and the notebooks' figures at the end."""

import os

import pytest

from course_lib.lessons.notebooks import CHOICES, KERNEL_ENV

for name in CHOICES:
    os.environ.pop(name, None)
os.environ.update({name: value for name, value in KERNEL_ENV.items() if name != "MPLBACKEND"})
os.environ["MPLBACKEND"] = "agg"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first and each on its own, for they take longest; the tests of any other file stay together."""
    items.sort(key=lambda item: "notebook" not in getattr(item, "fixturenames", ()))
    for item in items:
        group = item.name if "notebook" in getattr(item, "fixturenames", ()) else item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the notebook tests recorded."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    lines = sorted(text for report in reports for name, text in report.user_properties if name == "notebook")
    if lines:
        terminalreporter.section("notebooks")
        terminalreporter.write_line("\n".join(lines))
