"""Checkpoints of one layout resume on another to the bit; a save that is cut off leaves the one before."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from course_lib.llm.checkpoint import RECORD
from course_lib.llm.config import Config
from course_lib.llm.model import Transformer
from course_lib.parallel import RankError, launch
from course_lib.parallel.mesh import Combined, Layout
from course_lib.parallel.sharded import shard
from course_lib.parallel.sharded_checkpoint import committed, load, save, state
from tests.parallel.same import CLIP, ROWS, Run, adamw, assert_same, batches, shape, whole
from tests.parallel.test_expert import backward
from tests.parallel.test_mesh import expected, here

GQA = shape("micro", layers=4, tied=False, heads=4, kv_heads=2)
V3 = shape("micro-v3")
BREAK = 2  # steps before the checkpoint


class Sharded:
    """FSDP in the shape of a `Combined`."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.P, self.rank = dist.get_world_size(), dist.get_rank()
        self.model = shard(Transformer(config).to(device), init_device_mesh(device.type, (self.P,)))
        self.optimizer = adamw(self.model.parameters())

    def step(self, *rows: Tensor) -> Tensor:
        x, y = (part.chunk(self.P)[self.rank].to(self.model.norm.weight.device) for part in rows)
        loss = self.model(x, y)  # scalar
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = loss.detach() / self.P
        dist.all_reduce(loss)
        return loss


def make(config: Config, layout: Layout | str, device: str) -> tuple[Sharded | Combined, list[torch.nn.Module]]:
    """What trains `config` on these ranks, and the modules that it trains."""
    if layout == "fsdp":
        trainer = Sharded(config, here(device))
        return trainer, [trainer.model]
    trainer = Combined(config, layout, ROWS, here(device), adamw, clip=CLIP, microbatches=2 if layout.pp > 1 else 1)
    return trainer, trainer.part.stages


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are on one device, on the cpu."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().clone() for name, t in tensors.items()
    }


def begin(config: Config, layout: Layout | str, device: str, folder: Path) -> dict[str, Tensor]:
    """Train and save; what was saved of this rank's names, whole."""
    trainer, (module,) = make(config, layout, device)
    losses = [trainer.step(*rows).item() for rows in batches(config)[:BREAK]]
    tensors = state(module, trainer.optimizer)
    save(folder, {"step": BREAK, "losses": losses}, tensors)
    return full(tensors)


def resume(config: Config, layout: Layout | str, device: str, folder: Path) -> tuple[dict[str, Tensor], Run]:
    """Load and train on; what was loaded, whole, and the whole run."""
    trainer, (module,) = make(config, layout, device)
    tensors = state(module, trainer.optimizer)
    losses = load(folder, tensors)["losses"]
    loaded = full(tensors)
    losses += [trainer.step(*rows).item() for rows in batches(config)[BREAK:]]
    return loaded, Run(losses, whole(module))


def ranks(layout: Layout | str) -> int:
    return 4 if layout == "fsdp" else layout.ranks


MOVES = [  # from a layout to another, and each time also to one device without a process group
    (GQA, "fsdp", Layout(pp=2), "cpu"),
    (GQA, Layout(dp=2, tp=2), "fsdp", "cpu"),
    (V3, Layout(dp=4, ep=4), Layout(dp=2, ep=2), "cpu"),
    (GQA, "fsdp", Layout(dp=2), "npu"),
]


@pytest.mark.parametrize("config, before, after, device", MOVES)
def test_another_layout_goes_on_to_the_bit(config, before, after, device, tmp_path):
    saved, found, wanted = {}, set(), expected(config)
    for part in launch(begin, config, before, device, tmp_path, ranks=ranks(before), device=device):
        saved |= part
    for loaded, run in [
        alone(config, tmp_path),
        *launch(resume, config, after, device, tmp_path, ranks=ranks(after), device=device),
    ]:
        found |= loaded.keys()
        for name, t in loaded.items():
            assert torch.equal(t, saved[name]), name
        assert_same(run, wanted._replace(weights={name: wanted.weights[name] for name in run.weights}))
    assert found == saved.keys()


def alone(config: Config, folder: Path) -> tuple[dict[str, Tensor], Run]:
    """As `resume`, on one device and without a process group."""
    model = Transformer(config)
    optimizer = adamw(model.parameters())
    tensors = state(model, optimizer)
    losses = load(folder, tensors)["losses"]
    loaded = full(tensors)
    for rows in batches(config)[BREAK:]:
        losses.append(backward(model, *rows).item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        for experts in model.experts():
            experts.balance()
    return loaded, Run(losses, whole(model))


# -- saves that are cut off ---------------------------------------------------------------------------


def cut_off(folder: Path, moment: str) -> None:
    """Save step 1, then die on rank 1 (or 0, for the commit) in the middle of saving step 2."""
    from course_lib.parallel import sharded_checkpoint as module

    tensors = {"a": torch.full((4,), 1.0), "b": torch.full((2,), float(dist.get_rank()))}
    save(folder, {"step": 1}, tensors)
    tensors["a"] += 1
    if moment == "before" and dist.get_rank() == 1:
        os._exit(1)
    if moment == "writing" and dist.get_rank() == 1:
        torch.save = lambda *_, **__: os._exit(1)
        tensors["of rank 1"] = torch.ones(3)
    if moment == "commit" and dist.get_rank() == 0:
        module.replace = lambda *_: os._exit(1)
    save(folder, {"step": 2}, tensors)


@pytest.mark.parametrize("moment", ["before", "writing", "commit"])
def test_a_save_that_is_cut_off_leaves_the_one_before(moment, tmp_path):
    with pytest.raises(RankError):
        launch(cut_off, tmp_path, moment, ranks=2, device="cpu", timeout=30)
    tensors = {"a": torch.zeros(4), "b": torch.zeros(2)}
    assert load(tmp_path, tensors)["step"] == 1
    assert tensors["a"].tolist() == [1.0] * 4
    save(tmp_path, {"step": 2}, {"a": tensors["a"] + 1})  # and the next goes over what is left of it
    assert load(tmp_path, {"a": tensors["a"]})["step"] == 2 and tensors["a"].tolist() == [2.0] * 4
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002"]


def test_the_same_step_again_is_never_written_over_the_good_one(tmp_path):
    a = torch.ones(3)
    for value in (1.0, 2.0, 3.0):
        save(tmp_path, {"step": 7}, {"a": a.fill_(value)})
        a.zero_()
        assert load(tmp_path, {"a": a})["step"] == 7 and a.tolist() == [value] * 3
    assert committed(tmp_path) == "checkpoint-000007"


# -- what is wrong is said ----------------------------------------------------------------------------


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint in .*; expected .*checkpoint.json, which `save` writes last"):
        load(tmp_path, {})


@pytest.mark.parametrize("harm", ["shape", "name", "cut", "gone", "record"])
def test_damage_is_told(harm, tmp_path):
    save(tmp_path, {"step": 1}, {"a": torch.ones(3)})
    wanted = {"shape": {"a": torch.ones(4)}, "name": {"b": torch.ones(3)}}.get(harm, {"a": torch.zeros(3)})
    data = next(tmp_path.glob("checkpoint-*/*.distcp"))
    if harm == "cut":
        data.write_bytes(data.read_bytes()[:20])
    if harm == "gone":
        shutil.rmtree(data.parent)
    if harm == "record":
        (tmp_path / RECORD).write_text(json.dumps({"step": 1})[:-3])
    with pytest.raises(ValueError, match="damaged, or of another model"):
        load(tmp_path, wanted)


def test_the_first_step_of_an_optimizer_is_not_spent_on_its_state():
    model = Transformer(GQA)
    before = whole(model)
    tensors = state(model, adamw(model.parameters()))
    assert all(torch.equal(tensors[f"model.{name}"], weight) for name, weight in before.items())
    assert all(not t.any() for name, t in tensors.items() if name.endswith("exp_avg"))
