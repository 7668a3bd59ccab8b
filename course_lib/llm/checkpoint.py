"""Checkpoints: tensors in safetensors, the rest in a small JSON. A resumed run repeats the straight one to the bit.

`checkpoint.json` is the commit. It names the tensors' file and is replaced last, by one atomic `os.replace`; only then
is the file of the checkpoint before removed. A write that is cut off at any point leaves the old checkpoint whole.
"""

import json
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

RECORD = "checkpoint.json"


def save(folder: Path, record: dict, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` and `record` (JSON-able, with its "step") into `folder` as its one checkpoint."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"checkpoint-{record['step']:06d}.safetensors"
    on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    replace(folder / name, safetensors.torch.save(on_cpu))
    replace(folder / RECORD, json.dumps(record | {"tensors": name}, indent=1).encode())
    for old in folder.glob("checkpoint-*.safetensors"):
        if old.name != name:
            old.unlink()


def load(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Record and tensors (on the CPU) of the checkpoint in `folder`; ValueError if there is none, or it is damaged."""
    file = Path(folder) / RECORD
    if not file.is_file():
        raise ValueError(f"no checkpoint in {folder}; expected {file}, which a run with --out {folder} writes")
    try:
        record = json.loads(file.read_bytes())
        return record, safetensors.torch.load_file(Path(folder) / record["tensors"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file}: damaged checkpoint ({error}); start again without --resume") from None


def replace(file: Path, content: bytes) -> None:
    """Write `content` to `file` all at once: whoever reads it, at any time, finds the old content or the new one."""
    temporary = file.with_name(file.name + ".part")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def pack(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and buffers as "model.<name>", optimizer state as "optimizer.<name>.<key>"; a tied table once."""
    tensors = {f"model.{name}": tensor for name, tensor in kept(model).items()}
    for name, p in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[p].items()}
    return tensors


def kept(model: torch.nn.Module) -> dict[str, Tensor]:
    """What training changes in a model, by name: parameters, and buffers such as the bias that balances experts."""
    names = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in names}


@torch.no_grad()
def unpack(tensors: dict[str, Tensor], model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put what `pack` took back into a model, and an optimizer, of the same shape on any device."""
    for name, tensor in kept(model).items():
        tensor.copy_(tensors[f"model.{name}"])
    if optimizer is not None:
        for name, p in model.named_parameters():
            prefix = f"optimizer.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            optimizer.state[p] = {key: value.to(p.device) for key, value in state.items()}
