"""One rank of torch.distributed: its device and its process group, under ``launch``, under ``torchrun``, or alone.

with ranks(device="npu", system="mini-node") as device:      # torchrun --nproc-per-node 4 script.py
    model = DistributedDataParallel(Model(config).to(device))
"""

import contextlib
import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from course_lib import data
from course_lib.llm.device import open_device
from course_lib.parallel import portable
from course_lib.parallel.failures import Failure

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
EMULATOR = "course_lib.npu"


@contextlib.contextmanager
def ranks(device: str = "npu", system: str | None = None, numerics: bool = True) -> Iterator[torch.device]:
    """This process as a rank, as the environment of torchrun says; without that, as the only rank. Gives its device.

    ``system`` (a name in data/systems, or a file) and ``numerics`` (False: shapes and times only) are for the emulated
    npu, and have to be said before it is imported.
    """
    wanted = emulation(device, system, numerics)
    if EMULATOR in sys.modules and wanted.items() - os.environ.items():
        raise RuntimeError(f"{EMULATOR} is imported already; import it after, or set {wanted} in the environment")
    os.environ.update(wanted)
    alone = "RANK" not in os.environ
    local = 0 if alone else int(os.environ["LOCAL_RANK"])
    if alone or os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        stay_on_this_machine()
    opened = open_device(device)
    torch.set_num_threads(1)
    if device != "cpu":
        opened = torch.device(device, local)
        torch.get_device_module(opened).set_device(local)
    store = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    dist.init_process_group(BACKENDS[device], **store)
    try:
        yield opened
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # models in cycles still hold the group, whose threads may not outlive the interpreter


def emulation(device: str, system: str | None, numerics: bool) -> dict[str, str]:
    """The environment that the emulated npu reads at its import; ValueError where it would not be obeyed."""
    if device not in BACKENDS:
        raise ValueError(f"unknown device {device!r}; expected {', '.join(BACKENDS)}")
    if device != "npu" and (system is not None or not numerics):
        raise ValueError(f"system and numerics are for the emulated npu; leave them out for {device!r}")
    found = {} if numerics else {"COURSE_NUMERICS": "0"}
    return found | ({"COURSE_SYSTEM": _system(system)} if system else {})


def _system(name: str) -> str:
    names = sorted(file.stem for file in data.path("systems").glob("*.toml"))
    if name not in names and not Path(name).is_file():
        raise ValueError(
            f"no system {name!r}; expected one of {', '.join(names)}, or a file like data/systems/{names[0]}.toml"
        )
    return name if name in names else str(Path(name).resolve())


def stay_on_this_machine() -> None:
    """gloo binds to the loopback interface: no name to look up, no network needed, and it does not talk of it."""
    loopback = (
        [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")] if hasattr(socket, "if_nameindex") else []
    )
    for name in loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("GLOO_LOG_LEVEL", "ERROR")


# -- a process of launch --------------------------------------------------------------------------------------------


def run(rank: int, folder: Path, environment: dict[str, str], options: dict[str, Any], timeout: float) -> None:
    """Be ``rank``: read the call from ``folder``, write there what it prints, returns or raises, and end."""
    if not folder.exists():  # launch was interrupted meanwhile
        os._exit(1)
    _detach(folder, rank, timeout)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        with ranks(**options):
            try:
                fn, args = pickle.loads((folder / "call").read_bytes())
                result = portable.dumps(fn(*args), "the result", back=True)
            except BaseException as error:
                _fail(error, folder, rank)
        _write(folder / f"result{rank}", result)
    except BaseException as error:
        _fail(error, folder, rank)
    _end(0)


def _detach(folder: Path, rank: int, timeout: float) -> None:
    """Output into files; its own session, without Ctrl-C; stacks after ``timeout`` seconds; an end when the parent ends."""
    gc.freeze()  # what the forkserver loaded is shared memory, until a collection writes its marks there
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number, (name, stream) in enumerate((("stdout", sys.stdout), ("stderr", sys.stderr)), start=1):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    stacks = open(folder / f"stacks{rank}", "w")  # noqa: SIM115 - open until the process ends
    faulthandler.dump_traceback_later(timeout, file=stacks)
    run.stacks = stacks
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """Wait for the end of the process that launched this one, and end too."""
    connection.wait([multiprocessing.parent_process().sentinel])
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _fail(error: BaseException, folder: Path, rank: int) -> None:
    """Write what was raised, with its time, and end without a word to other ranks, whose own errors come later."""
    when, trace = time.monotonic(), error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename in (__file__, portable.__file__, contextlib.__file__):
        trace = trace.tb_next
    text = "".join(traceback.format_exception(type(error), error, trace))
    cause = None
    with contextlib.suppress(Exception):  # then the text is all
        cause = portable.dumps(error.with_traceback(None), "the exception", back=True)
    what = f"called sys.exit({error.code!r})" if isinstance(error, SystemExit) else f"raised {_name(error)}"
    lost = isinstance(error, RuntimeError) and "onnection" in what  # another rank's end is why
    _write(folder / f"failure{rank}", pickle.dumps(Failure(lost, when, what, text, cause)))
    _end(1)


def _name(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _write(file: Path, content: bytes) -> None:
    """All of it or nothing."""
    part = file.with_suffix(".part")
    part.write_bytes(content)
    part.replace(file)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
