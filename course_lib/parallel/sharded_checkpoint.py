"""Sharded checkpoints: each rank writes what it holds, and ranks in any other number and layout read what they need.

torch.distributed.checkpoint keeps whole tensors in pieces: a DTensor says which piece a rank holds, and of a replicated
tensor one rank writes. Names are those of the model on one device, so four ranks' checkpoint resumes on two, or on one
without a process group.

As in llm/checkpoint.py the file `checkpoint.json` is the commit. It names the folder of the tensors and is replaced
last, by one atomic `os.replace`; only then is the folder before removed. A save that is cut off at any point, on any
rank, leaves the old checkpoint whole.

    tensors = state(model, optimizer)
    save(folder, {"step": 100}, tensors)       # on every rank
    record = load(folder, tensors)             # into the tensors, and so into model and optimizer
"""

import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from course_lib.llm.checkpoint import RECORD, pack, replace


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state by name: the very tensors, so that what is loaded into them is in place."""
    if not optimizer.state:
        begin(optimizer)
    return pack(model, optimizer)


def begin(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that an optimizer lacks before its first step, by a step of learning rate 0: weights stay."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def save(folder: Path, record: dict, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` and `record` (JSON-able, with its "step") into `folder`; every rank calls it, with its own part.

    The folder must be one that all ranks see. CheckpointException on every rank where one could not write.
    """
    folder, first = Path(folder), rank() == 0
    name = f"checkpoint-{record['step']:06d}"
    if committed(folder) == name:  # the same step again: never over the good one
        name += "-again"
    if first:
        shutil.rmtree(folder / name, ignore_errors=True)  # of a save that was cut off
    wait()
    quietly(dcp.save, tensors, folder / name)
    if first:
        replace(folder / RECORD, json.dumps(record | {"tensors": name}, indent=1).encode())
        for old in folder.glob("checkpoint-*/"):
            if old.name != name:
                shutil.rmtree(old)
    wait()


def load(folder: Path, tensors: dict[str, Tensor]) -> dict:
    """Fill `tensors` from the checkpoint in `folder` and return its record; every rank calls it, with its own part.

    ValueError if there is no checkpoint, it is damaged, or it is of another model.
    """
    file = Path(folder) / RECORD
    if not file.is_file():
        raise ValueError(f"no checkpoint in {folder}; expected {file}, which `save` writes last")
    try:
        record = json.loads(file.read_bytes())
        quietly(dcp.load, tensors, Path(folder) / record["tensors"])
    except (OSError, KeyError, ValueError, RuntimeError, CheckpointException) as error:
        raise ValueError(f"{file}: damaged, or of another model ({reason(error)})") from None
    return record


def committed(folder: Path) -> str | None:
    """Name of the folder of tensors that the commit names; None if there is no commit."""
    file = Path(folder) / RECORD
    return json.loads(file.read_bytes())["tensors"] if file.is_file() else None


def quietly(do: type(dcp.save), tensors: dict[str, Tensor], folder: Path) -> None:
    """Without the warning that there is no process group, where one device is all there is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        do(tensors, checkpoint_id=folder)


def reason(error: BaseException) -> str:
    """The first rank's own error, of those that a CheckpointException gathers."""
    failures = getattr(error, "failures", {})
    return "; ".join(f"rank {r}: {wrapped[0]}" for r, wrapped in list(failures.items())[:1]) or str(error)


def rank() -> int:
    """This process's rank; 0 where there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()
