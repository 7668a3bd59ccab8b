"""Repairs at the border between autograd's engine and a device that is written in Python.

* **Errors.** While an exception passes, the engine destroys a stream guard, and for a Python backend that guard
  asks Python for the device's type. No Python function can run while a Python error is pending: the answer
  fails, and the process is terminated. So the guard first takes the pending error away and keeps it here;
  where ``backward()`` comes back to Python, it is raised in place of the engine's complaint that it is gone.
* **Devices.** The engine has as many device threads as the guard has devices, and a Python guard has one. So
  ``backward()`` runs on the thread that called it, which has room for any device (and switches no threads).
* **Ctrl-C.** Asking the guard is a place where Python looks for signals, and an error there is fatal too.
* **Speed.** The engine asks for the type several times an operator: the answer comes from a generator, not a call.
"""

import itertools
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import graph

_engine_run_backward = graph._engine_run_backward
_set_threads, _has_threads = torch._C._set_multithreading_enabled, torch._C._is_multithreading_enabled
_kept: dict[int, BaseException] = {}  # by thread


def run_backward(*args: Any, **kwargs: Any) -> Any:
    """Autograd's entry: on this thread, and with the error that the guard kept."""
    threads = _has_threads()
    _set_threads(False)
    try:
        with CtrlC():
            return _engine_run_backward(*args, **kwargs)
    except SystemError:  # "returned NULL without setting an exception"
        error = _kept.pop(threading.get_ident(), None)
        if error is None:
            raise
    finally:
        _set_threads(threads)
    try:
        raise error
    finally:
        del error  # or its traceback would hold this frame, and so itself, and all tensors on its way


class CtrlC:
    """Ctrl-C while the engine runs waits until it is done (the second one does not): it may not come in the guard."""

    def __enter__(self) -> None:
        self.waiting, handler = [], signal.getsignal(signal.SIGINT)
        self.outer = handler if callable(handler) and threading.current_thread() is threading.main_thread() else None
        if self.outer:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, *what: Any) -> None:
        if self.waiting:
            self.outer(*what)
        self.waiting.append(what)

    def __exit__(self, *exc: object) -> None:
        if self.outer:
            signal.signal(signal.SIGINT, self.outer)
            if self.waiting:
                self.outer(*self.waiting[0])


def answers() -> Iterator[Any]:
    """The device's type, again and again; keeps the error that is pending when it is asked for.

    ``next`` is called from C, which checks that a call leaves no error behind: so a pending one comes up as a
    SystemError caused by it. And ``yield from`` is where Python does not stop for Ctrl-C or another thread.
    """
    device_type = itertools.repeat(torch._C._autograd.DeviceType.PrivateUse1)
    checked = map(next, itertools.repeat(device_type))
    while True:
        try:
            yield from checked
        except SystemError as found:
            _kept[threading.get_ident()] = found.__cause__ or found


class Guard(torch._C._acc.DeviceGuard):
    """PyTorch's device guard; ``type_`` is all that it may answer from Python."""

    type_ = None  # looked up before the instance's own: a name missing here would clear a pending error

    def __init__(self) -> None:
        super().__init__()
        self.type_ = answers().__next__


def attach() -> None:
    torch.autograd._engine_run_backward = graph._engine_run_backward = run_backward
