"""Data parallelism trains as one device; the ring sums; buckets fill in order, accumulate, and say what is missing."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from course_lib.llm.config import Config
from course_lib.llm.model import Transformer
from course_lib.parallel import launch
from course_lib.parallel.data import MB, WAYS, Buckets, average, fill, mean, replicate, ring_all_reduce, share
from tests.parallel.same import CLIP, Run, adamw, alone, assert_same, batches, close, shape, whole

CASES = [("cpu", 4), ("npu", 2)]  # device, ranks
SMALL = 16e3 / MB  # 16 kB: several buckets for the micro model


def train(config: Config, way: str, device: str, clip_first: bool = False) -> Run:
    """Rank r starts from seed r: the first rank's weights must reach the others."""
    model = Transformer(config, seed=dist.get_rank()).to(device)
    called, finish = replicate(model, way, SMALL)
    optimizer, losses = adamw(model.parameters()), []
    for tokens, targets in batches(config):
        loss = called(share(tokens).to(device), share(targets).to(device))  # scalar
        loss.backward()
        if clip_first:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        finish()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss).item())
    return Run(losses, whole(model))


def ring(device: str) -> list[torch.Tensor]:
    """Sums by ring of sizes that divide and do not, one below the number of ranks; and over a part of the ranks."""
    rank, P = dist.get_rank(), dist.get_world_size()
    sums = [ring_all_reduce(torch.arange(n).float().to(device) + 100 * rank).cpu() for n in (4 * P, 4 * P + 3, P - 1)]
    last = dist.new_group([P - 2, P - 1])
    if rank >= P - 2:
        sums.append(ring_all_reduce(torch.full((5,), float(rank), device=device), last).cpu())
    return sums


def accumulate(config: Config, device: str) -> list[dict[str, torch.Tensor]]:
    """Gradients of two passes, averaged naively and by buckets."""
    found = []
    (tokens, targets), (more, further), *_ = batches(config)
    for bucketed in (False, True):
        model = Transformer(config).to(device)
        buckets = Buckets(model, SMALL) if bucketed else None
        for last, (x, y) in enumerate(((tokens, targets), (more, further))):
            if buckets:
                buckets.travel = bool(last)
            model(share(x).to(device), share(y).to(device)).backward()
        buckets.wait() if buckets else average(model)
        found.append({name: p.grad.cpu().clone() for name, p in model.named_parameters()})
    return found


def everything(config: Config, device: str) -> dict:
    """All that is asked of a rank, in one launch."""
    runs = {way: train(config, way, device) for way in WAYS}
    return runs | {"clipped first": train(config, "naive", device, True), "ring": ring(device),
                   "accumulated": accumulate(config, device)}  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=str)
def found(request: pytest.FixtureRequest) -> list[dict]:
    device, ranks = request.param
    return launch(everything, shape(), device, ranks=ranks, device=device, timeout=60)


@pytest.mark.parametrize("way", WAYS)
def test_same_as_one_device(found: list[dict], way: str) -> None:
    assert_same([rank[way] for rank in found], alone(shape()))


def test_the_proof_can_fail(found: list[dict]) -> None:
    """Clipping each rank's gradient before the average is a real mistake, and moves weights by far more."""
    with pytest.raises(AssertionError, match="rank 0: losses differ by .*e-0[123]"):
        assert_same([rank["clipped first"] for rank in found], alone(shape()))


def test_ring_all_reduce(found: list[dict]) -> None:
    P = len(found)
    for rank, result in enumerate(found):
        for n, total in zip((4 * P, 4 * P + 3, P - 1), result["ring"]):
            assert torch.equal(total, P * torch.arange(n).float() + 100 * P * (P - 1) / 2), (rank, n)
        if rank >= P - 2:
            assert torch.equal(result["ring"][3], torch.full((5,), 2.0 * P - 3))


def test_accumulated_gradients_travel_once(found: list[dict]) -> None:
    model = Transformer(shape())
    for tokens, targets in batches(shape(), steps=2):
        model(tokens, targets).backward()
    for rank, result in enumerate(found):
        for name, p in model.named_parameters():
            for gradients in result["accumulated"]:
                close(gradients[name], p.grad, f"rank {rank}: gradient of {name}")


def test_buckets_fill_to_their_size() -> None:
    tensors = [torch.zeros(n) for n in (10, 10, 30, 5, 5)]  # 40, 40, 120, 20 and 20 bytes
    assert [[len(t) for t in bucket] for bucket in fill(tensors, 80)] == [[10, 10], [30], [5, 5]]
    assert len(fill(Transformer(shape()).parameters(), SMALL * MB)) > 3


def lone(rows: int, fault: str) -> None:
    """On one rank: a batch that does not divide, a weight without gradient, a way that there is not."""
    if fault == "way":
        replicate(nn.Linear(2, 2), "none")
    if fault == "rows":
        share(torch.zeros(rows, 2))
    model = nn.Linear(2, 2)
    buckets = Buckets(model)
    model.weight.sum().backward()
    buckets.wait()


@pytest.mark.parametrize(
    ("fault", "message"),
    [("rows", "3 rows do not divide among 2 ranks"), ("gradient", "1 weights got no gradient"), ("way", "naive, bucketed")],
)  # fmt: skip
def test_mistakes_are_told(fault: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        launch(lone, 3, fault, ranks=2, device="cpu", timeout=30)
