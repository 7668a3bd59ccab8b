"""Two repairs at the border between autograd's engine and a device that is written in Python.

* **Errors.** The engine destroys a stream guard while an exception passes. For a Python backend that guard
  calls Python, which fails while a Python error is pending, and the process is terminated. So an
  operator that fails in backward keeps its error here and returns what C++ refuses with an error of its
  own; where ``backward()`` comes back to Python, the first error is raised in its place.
* **Speed.** The engine asks the device guard for its type several times an operator: answer from C.
"""

import itertools
import sys
from typing import Any

import torch
from torch.autograd import graph

_engine_run_backward = graph._engine_run_backward
_kept: list[BaseException] = []
REFUSED = object()  # no tensor, not None: no operator may return this


def keep(error: BaseException) -> object:
    """Called in the ``except`` of the dispatch: keep an error that would pass the engine, raise any other again."""
    below = sys._getframe(1).f_back  # the Python frame that called the operator; none on the engine's own thread
    if torch._C._current_graph_task_id() == -1 or (below is not None and below.f_code is not _engine_run_backward.__code__):
        raise error
    _kept.append(error)
    return REFUSED


def run_backward(*args: Any, **kwargs: Any) -> Any:
    """Autograd's entry, with the error that an operator kept in place of the engine's complaint about it."""
    try:
        return _engine_run_backward(*args, **kwargs)
    except Exception:
        if not _kept:
            raise
        error = _kept[0]
        _kept.clear()
        raise error from None


class Guard(torch._C._acc.DeviceGuard):
    """PyTorch's device guard; ``type_`` is all that it may answer from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.type_ = itertools.repeat(torch._C._autograd.DeviceType.PrivateUse1).__next__


def attach() -> None:
    torch.autograd._engine_run_backward = graph._engine_run_backward = run_backward
