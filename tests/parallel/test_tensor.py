"""Tensor and sequence parallelism train as one device; shapes that do not divide are told."""

import contextlib
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from course_lib.llm.config import Config
from course_lib.llm.model import Transformer
from course_lib.parallel import launch
from course_lib.parallel.tensor import COLUMNS, ROWS, check, clip_split, split, split_by_hand
from tests.parallel.same import CLIP, Run, adamw, alone, assert_same, batches, shape, whole

CASES = [("cpu", 4), ("npu", 2)]  # device, ranks
WAYS = ("by hand", "tensor", "tensor and sequence")


def config(tied: bool) -> Config:
    """Heads for 4 ranks, two to a key/value head only where there are 2 ranks."""
    return shape(heads=8, kv_heads=4, tied=tied)


def train(config: Config, way: str, device: str) -> Run:
    model = Transformer(config).to(device)
    if way == "by hand":
        split_by_hand(model)
    else:
        split(model, init_device_mesh(device, (dist.get_world_size(),)), sequence="sequence" in way)
    optimizer, losses = adamw(model.parameters()), []
    for tokens, targets in batches(config):
        with contextlib.nullcontext() if way == "by hand" else loss_parallel():
            loss = model(tokens.to(device), targets.to(device))  # scalar
            loss.backward()
        clip_split(model, CLIP) if way == "by hand" else nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.full_tensor() if isinstance(loss, DTensor) else loss).item())
    return Run(losses, whole(model))


def everything(device: str) -> dict:
    return {(way, tied): train(config(tied), way, device) for way in WAYS for tied in (True, False)}


@pytest.fixture(scope="module", params=CASES, ids=str)
def found(request: pytest.FixtureRequest) -> list[dict]:
    device, ranks = request.param
    return launch(everything, device, ranks=ranks, device=device, timeout=90)


def joined(runs: list[Run]) -> list[Run]:
    """Runs with whole weights, of ranks that have parts by columns (outputs) and by rows (inputs)."""
    weights = dict(runs[0].weights)
    for name in weights:
        for kinds, dim in ((COLUMNS, 0), (ROWS, 1)):
            if name.split(".")[-2] in kinds:
                weights[name] = torch.cat([run.weights[name] for run in runs], dim)
    return [Run(run.losses, weights) for run in runs]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("way", WAYS)
def test_same_as_one_device(found: list[dict], way: str, tied: bool) -> None:
    runs = [rank[way, tied] for rank in found]
    assert_same(joined(runs) if way == "by hand" else runs, alone(config(tied)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_whole_weights_stay_equal_by_hand(found: list[dict], tied: bool) -> None:
    """No rank sends the gradients of norms and embedding to another; they are the same to the last bit."""
    first, *others = [rank["by hand", tied].weights for rank in found]
    for name in first:
        if name.split(".")[-2] not in COLUMNS + ROWS:
            assert all(torch.equal(other[name], first[name]) for other in others), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 1}, "kv_heads 1: expected multiples of 4 ranks"),
        ({"heads": 2, "kv_heads": 2, "feed_forward": 98}, "heads 2, kv_heads 2, feed_forward 98"),
    ],
)
def test_shapes_that_do_not_divide(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(config(True), **changes), 4)


def test_latent_attention_and_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="take a preset without -v3"):
        check(shape("micro-v3"), 2)
