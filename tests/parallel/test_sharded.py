"""ZeRO by hand and by PyTorch trains as one device, in the bytes per rank that each stage should need."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from course_lib.llm.config import Config
from course_lib.llm.model import Transformer
from course_lib.parallel import launch
from course_lib.parallel.data import mean, share
from course_lib.parallel.sharded import Owned, Unit, clip_parts, deal, held, owned_by_torch, shard, shard_by_hand
from tests.parallel.same import ADAMW, CLIP, Run, adamw, alone, assert_same, batches, shape, whole

CASES = [("cpu", 4), ("npu", 2)]  # device, ranks
WAYS = ("1 by hand", "2 by hand", "3 by hand", "1", "2", "3")


class Scheme(NamedTuple):
    """What training needs of a way: the model to call, what the rank keeps, and three steps after backward."""

    called: nn.Module
    kept: list[Tensor]
    optimizer: torch.optim.Optimizer
    reduce: Callable[[], None]
    clip: Callable[[], object]
    step: Callable[[], None]
    units: Sequence[Unit] = ()


def scheme(model: Transformer, way: str, device: str) -> Scheme:
    weights = list(model.parameters())
    if way in ("1 by hand", "2 by hand"):
        owned = Owned(model, adamw, stage=int(way[0]))
        return Scheme(model, weights, owned.optimizer, owned.reduce, partial(owned.clip, CLIP), owned.step)
    if way == "3 by hand":
        units = shard_by_hand(model)
        shards = [unit.shard for unit in units]
        optimizer = adamw(shards)
        return Scheme(model, shards, optimizer, nothing, partial(clip_parts, shards, CLIP), optimizer.step, units)
    if way == "1":
        optimizer = owned_by_torch(model, torch.optim.AdamW, **ADAMW)
        clip = partial(nn.utils.clip_grad_norm_, weights, CLIP)
        return Scheme(DistributedDataParallel(model), weights, optimizer.optim, nothing, clip, optimizer.step)
    dtype = torch.bfloat16 if "bf16" in way else None
    shard(model, init_device_mesh(device, (dist.get_world_size(),)), int(way[0]), dtype)
    weights = list(model.parameters())
    optimizer = adamw(weights)
    return Scheme(model, weights, optimizer, nothing, partial(nn.utils.clip_grad_norm_, weights, CLIP), optimizer.step)


def nothing() -> None:
    """Backward has reduced the gradients."""


def train(config: Config, way: str, device: str) -> tuple[Run, dict[str, int]]:
    """The run, and bytes that the rank holds before the last step, and of weights after its forward."""
    model = Transformer(config).to(device)
    s, losses = scheme(model, way, device), []
    for tokens, targets in batches(config):
        loss = s.called(share(tokens).to(device), share(targets).to(device))  # scalar
        after_forward = held(model.parameters(), s.optimizer)["weights"]
        loss.backward()
        s.reduce()
        s.clip()
        kept = held(s.kept, s.optimizer) | {"after forward": after_forward}
        s.step()
        for p in s.kept:
            p.grad = None
        losses.append(mean(loss).item())
    if s.units:
        assert held(model.parameters(), s.optimizer)["weights"] == 0, "whole weights are left between steps"
    for unit in s.units:
        unit.gather()
    return Run(losses, whole(model)), kept


def everything(config: Config, device: str) -> dict[str, tuple[Run, dict[str, int]]]:
    return {way: train(config, way, device) for way in (*WAYS, "2 in bf16")}


@pytest.fixture(scope="module", params=CASES, ids=str)
def found(request: pytest.FixtureRequest) -> list[dict]:
    device, ranks = request.param
    return launch(everything, shape(), device, ranks=ranks, device=device, timeout=90)


@pytest.mark.parametrize("way", WAYS)
def test_same_as_one_device(found: list[dict], way: str) -> None:
    assert_same([rank[way][0] for rank in found], alone(shape()))


SHARDED = {  # of weights, gradients, optimizer state: between backward and step
    "1 by hand": {"optimizer"}, "2 by hand": {"gradients", "optimizer"}, "1": {"optimizer"},
    "3 by hand": {"weights", "gradients", "optimizer"}, "2": {"weights", "gradients", "optimizer"},
    "3": {"weights", "gradients", "optimizer"},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_bytes_per_rank(found: list[dict], way: str) -> None:
    """4 bytes a weight, 4 its gradient, 8 AdamW's two moments: each whole, or a P-th of it.

    Stages 1 and 2 by hand and ZeroRedundancyOptimizer deal out whole tensors, and are as even as these allow.
    """
    P, n = len(found), Transformer(shape()).num_parameters()
    largest = max(p.numel() for p in Transformer(shape()).parameters())
    for kind, width in (("weights", 4), ("gradients", 4), ("optimizer", 8)):
        ranks = [rank[way][1][kind] / width for rank in found]
        if kind not in SHARDED[way]:
            assert ranks == [n] * P, kind
            continue
        assert n <= sum(ranks) <= 1.01 * n, kind  # padding: less than P numbers a unit
        assert max(ranks) <= (1.01 * n / P if "weights" in SHARDED[way] else n / P + largest), kind


@pytest.mark.parametrize("way", WAYS)
def test_weights_between_forward_and_backward(found: list[dict], way: str) -> None:
    """In stage 3 the layers' weights are gone again, by PyTorch down to a P-th; else all are whole."""
    P, model = len(found), Transformer(shape())
    n, inside = model.num_parameters(), sum(p.numel() for p in model.blocks.parameters())
    expected = {"3 by hand": n - inside, "3": n - inside + inside // P}.get(way, n)
    assert [rank[way][1]["after forward"] for rank in found] == [4 * expected] * P


def test_blocks_in_bf16(found: list[dict]) -> None:
    """Half the bytes of the blocks' weights are gathered; losses near 4 agree to the 8 bits of bf16, and not to more."""
    model, expected = Transformer(shape()), alone(shape()).losses
    n, inside = model.num_parameters(), sum(p.numel() for p in model.blocks.parameters())
    for rank in found:
        run, kept = rank["2 in bf16"]
        assert kept["after forward"] == 4 * (n - inside) + 2 * inside
        assert kept["weights"] == rank["2"][1]["weights"], "the weights themselves are in float32"
        assert 1e-5 < max(abs(a - b) for a, b in zip(run.losses, expected)) < 4 * 2**-8


def test_dealing_is_even() -> None:
    assert deal([5, 1, 4, 2], 2) == [0, 0, 1, 1]
    assert deal([3], 2) == [0]


def test_a_stage_that_fully_shard_has_not() -> None:
    with pytest.raises(ValueError, match="not stage 1"):
        shard(nn.Linear(2, 2), None, stage=1)
