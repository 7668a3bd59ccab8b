"""Run a function of a notebook as many ranks of torch.distributed: one process each, on this machine.

    losses = launch(train, config, ranks=4, system="mini-node")     # what train(config) returned, by rank

A forkserver with torch loaded stays behind and makes the next launch quick; it ends with this process.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any

import torch.distributed as dist

from course_lib.parallel import portable, rank
from course_lib.parallel.failures import failed, first_failure, overdue, told

PRELOAD = """
    torch torch.distributed torch._dynamo torch.nn.parallel torch.distributed.fsdp torch.distributed.tensor.parallel
    torch.distributed.pipelining torch.distributed.checkpoint.state_dict course_lib.llm.trainer course_lib.parallel.rank
""".split()
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
GRACE, PATIENCE = 0.3, 3  # seconds for other ends to become known, after a failure and after a lost connection
_starting = threading.Lock()


def launch(fn: Callable[..., Any], *args: Any, ranks: int = 4, system: str | None = None, device: str = "npu",
           numerics: bool = True, timeout: float = 120) -> list[Any]:  # fmt: skip
    """What ``fn(*args)`` returns in each of ``ranks`` processes, by rank; tensors come back on the cpu (on meta, without numerics).

    Each is set up as by torchrun: environment, device, process group (hccl on npu, gloo on cpu). ``system`` is a name in
    data/systems or a file; ``numerics=False`` computes shapes and emulated times only; ``timeout`` is in seconds of this
    machine. What the ranks print is shown at the end, rank by rank. RankError names the first rank that failed and has
    its traceback; all others are stopped. TypeError where something that ``fn`` needs cannot go to another process.
    """
    if "RANK" in os.environ:
        raise RuntimeError("this process is a rank already (RANK is set); call the function itself")
    if not isinstance(ranks, int) or ranks < 1 or not timeout > 0:
        raise ValueError(
            f"ranks={ranks!r}, timeout={timeout!r}: expected a whole number of ranks and some seconds, both above 0"
        )
    options = {"device": device, "system": system, "numerics": numerics}
    rank.emulation(**options)
    call = portable.dumps((fn, args), "(fn, args)")
    with _store() as port, tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "call").write_bytes(call)
        try:
            with _processes(ranks, folder, port, options, timeout) as processes:
                ended = _wait(processes, folder, timeout)
                if len(ended) < ranks and not failed(ended, folder):
                    raise overdue(ended, ranks, folder, timeout)
        finally:
            _show(folder, ranks)
        if failed(ended, folder):
            error, cause = first_failure(ended, ranks, folder)
            raise error from cause
        return [_result(folder, at) for at in range(ranks)]


def _result(folder: Path, at: int) -> Any:
    try:
        return pickle.loads((folder / f"result{at}").read_bytes())
    except Exception as error:
        advice = "return numbers and tensors, or import here what the ranks import"
        raise TypeError(f"what rank {at} returned cannot be read in this process: {error}; {advice}") from error


# -- starting and stopping ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _store() -> Iterator[int]:
    """The port of a store in this process, where the ranks find each other: like torchrun's, but heard here only."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    try:
        yield port
    finally:
        del store  # or the traceback of what was raised keeps it


def _environment(at: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    own = {"RANK": at, "LOCAL_RANK": at, "ROLE_RANK": at, "GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "WORLD_SIZE": ranks,
           "LOCAL_WORLD_SIZE": ranks, "ROLE_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
           "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0}  # fmt: skip
    return dict(os.environ) | {name: str(value) for name, value in own.items()}


@contextlib.contextmanager
def _processes(ranks: int, folder: Path, port: int, options: dict[str, Any], timeout: float) -> Iterator[list[Any]]:
    """A process for each rank, all of them gone afterwards, with their own children."""
    context = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload(PRELOAD)
    processes = []
    try:
        for at in range(ranks):
            (folder / f"stacks{at}").touch()
            arguments = (at, folder, _environment(at, ranks, port), options, timeout)
            processes.append(context.Process(target=rank.run, args=arguments, name=f"rank {at}"))
            with _quiet_start():
                processes[-1].start()
        yield processes
    finally:
        for process in processes:
            _kill(process)


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Hide this program's main module, which multiprocessing would run again in the new process."""
    with _starting:
        main, level = sys.modules["__main__"], os.environ.get("TORCH_CPP_LOG_LEVEL")
        hidden = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
        main.__spec__ = None
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it once, when the forkserver imports it
        try:
            if METHOD == "forkserver":
                _start_server()
            yield
        finally:
            vars(main).update(hidden)
            if level is None:
                del os.environ["TORCH_CPP_LOG_LEVEL"]


def _start_server() -> None:
    """The forkserver, if there is none yet; Ctrl-C, which a terminal sends to all, is for this process alone."""
    resource_tracker.ensure_running()  # which would unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _kill(process: Any) -> None:
    if process.pid is None:
        return
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


# -- watching -------------------------------------------------------------------------------------------------------


def _wait(processes: list[Any], folder: Path, timeout: float) -> dict[int, int]:
    """Exit code by rank, in the order of their ends: of all ranks, or of those that ended until one failed or time ran out."""
    ended, deadline = {}, time.monotonic() + timeout
    while len(ended) < len(processes) and time.monotonic() < deadline:
        running = {process.sentinel: at for at, process in enumerate(processes) if at not in ended}
        for sentinel in connection.wait(list(running), deadline - time.monotonic()):
            at = running[sentinel]
            processes[at].join()
            ended[at] = processes[at].exitcode
        if ranks := failed(ended, folder):  # of a lost connection there is a cause: another rank's end
            only_lost = all(failure and failure.lost for failure in told(ranks, folder).values())
            deadline = min(deadline, time.monotonic() + (PATIENCE if only_lost else GRACE))
    return ended


def _show(folder: Path, ranks: int) -> None:
    """Print what the ranks printed, rank by rank."""
    for name in ("stdout", "stderr"):
        files = [folder / f"{name}{at}" for at in range(ranks)]
        texts = [file.read_text(encoding="utf-8", errors="replace") if file.exists() else "" for file in files]
        said = {at: text.splitlines() for at, text in enumerate(texts) if text}
        for at, lines in said.items():
            for line in lines:
                print(line if len(said) == 1 else f"[rank {at}] {line}", file=getattr(sys, name))
