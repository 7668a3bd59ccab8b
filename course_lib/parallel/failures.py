"""Which rank failed first, and of what: from the exit codes, in their order, and from what the ranks wrote."""

import contextlib
import pickle
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

RANK_FILE = str(Path(__file__).with_name("rank.py"))


class RankError(RuntimeError):
    """A rank failed; ``rank`` is its number (the first, of those that did not end in time)."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class Failure(NamedTuple):
    """What a rank raised: whether for a lost connection, when, as a line, as a traceback, and pickled if that is possible."""

    lost: bool
    when: float
    what: str
    text: str
    cause: bytes | None


def failed(ended: dict[int, int], folder: Path) -> list[int]:
    """Of the ranks that ended (with their exit codes), those that left no result."""
    return [at for at, code in ended.items() if code or not (folder / f"result{at}").exists()]


def told(ranks: list[int], folder: Path) -> dict[int, Failure | None]:
    """What each rank wrote of its failure, if it did."""
    files = {at: folder / f"failure{at}" for at in ranks}
    return {at: pickle.loads(file.read_bytes()) if file.exists() else None for at, file in files.items()}


def first_failure(ended: dict[int, int], ranks: int, folder: Path) -> tuple[RankError, Exception | None]:
    """The error of the rank that failed first, and the exception that it raised.

    A rank that died without a word comes before those that lost it. An abort may itself follow from another's error.
    """
    failures = told(failed(ended, folder), folder)
    raised = {at: failure for at, failure in failures.items() if failure}
    silent = [at for at in failures if at not in raised]
    order = [at for at in silent if ended[at] != -signal.SIGABRT]
    order += sorted((at for at in raised if not raised[at].lost), key=lambda at: raised[at].when)
    order += [at for at in silent if at not in order] + sorted(raised, key=lambda at: raised[at].when)
    if order[0] in silent:
        how = _end(ended[order[0]])
        return RankError(f"rank {order[0]} of {ranks} {how}; the other ranks were stopped", order[0]), None
    at = min(
        at for at in raised if raised[at].what == raised[order[0]].what
    )  # the same in many ranks: named by the lowest
    done, hint = [at for at in ended if at not in failures], ""
    if raised[at].lost and done:
        hint = f"\n({_names(done)} had returned: does every rank call the same collectives?)"
    message = f"rank {at} of {ranks} {raised[at].what}{hint}\n\nIn rank {at}:\n{raised[at].text}"
    return RankError(message, at), _exception(raised[at].cause)


def _names(numbers: list[int]) -> str:
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, sorted(numbers)))


def _end(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code} before its function returned"


def _exception(pickled: bytes | None) -> Exception | None:
    with contextlib.suppress(Exception):  # as of a class that takes other arguments than its message
        error = pickle.loads(pickled)
        return error if isinstance(error, Exception) else None
    return None


def overdue(ended: dict[int, int], ranks: int, folder: Path, timeout: float) -> RankError:
    """Who was still running after ``timeout`` seconds, and where."""
    running = [at for at in range(ranks) if at not in ended]
    patience = time.monotonic() + 1
    while time.monotonic() < patience and not all((folder / f"stacks{at}").stat().st_size for at in running):
        time.sleep(0.02)
    where = "\n".join(f"rank {at} was in\n{_stack((folder / f'stacks{at}').read_text())}" for at in running)
    return RankError(f"{_names(running)} of {ranks} still running after {timeout:g} s; stopped\n\n{where}", running[0])


def _stack(dump: str) -> str:
    """The main thread's frames, innermost first, between the call of the function and its end."""
    main = re.split(r"^(?:Current )?[Tt]hread 0x.*\n", dump, flags=re.MULTILINE)[-1]
    return main.split(f'  File "{RANK_FILE}"')[0] or main
