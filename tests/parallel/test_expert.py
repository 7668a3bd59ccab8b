"""Experts on 2 and 4 ranks train as on one device; capacity, balance and gradients against the same by hand."""

import dataclasses
import math
from functools import cache

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from course_lib.llm.config import Config
from course_lib.llm.model import Transformer
from course_lib.parallel import launch
from course_lib.parallel.expert import Balance, is_expert, measure, shard_experts, slots
from course_lib.parallel.mesh import Layout, add_up, clip_gradients
from tests.parallel.same import CLIP, Run, adamw, assert_same, batches, close, shape, whole

WAYS = {"gather": 1.0, "exchange": 1.0, "capacity": 4.0}  # with capacity for every token: 4 = E/k
DEVICES = ["cpu"]


@cache
def config() -> Config:
    """Experts with a bias that moves fast enough to change choices within the test, and a loss of balance."""
    v3 = shape("micro-v3")
    return dataclasses.replace(v3, experts=dataclasses.replace(v3.experts, bias_speed=0.02, sequence_loss=0.01))


def backward(model: Transformer, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss, and its gradients with those of the losses beside it."""
    loss = model(tokens, targets)  # scalar
    (loss if model.aside is None else loss + model.aside).backward()
    return loss.detach()


@cache
def alone(config: Config) -> tuple[Run, list[torch.Tensor]]:
    """One device: the run, and each layer's choices (N, k) in each step."""
    model = Transformer(config)
    optimizer, losses, choices = adamw(model.parameters()), [], []
    for tokens, targets in batches(config):
        losses.append(backward(model, tokens, targets).item())
        choices += [part.chosen for part in model.experts()]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        for part in model.experts():
            part.balance()
    return Run(losses, whole(model)), choices


def train(way: str, factor: float, device: str) -> tuple[Run, list[torch.Tensor], dict, list[Balance]]:
    """The same on this rank: run, choices of this rank's tokens, first step's gradients, first step's balance."""
    P, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mesh = init_device_mesh(device, (P,), mesh_dim_names=("ep",))
    model = Transformer(config())
    shard_experts(model, mesh, way, factor)
    model.to(device)
    dense, routed = ([p for p in model.parameters() if is_expert(p) is which] for which in (False, True))
    optimizer = adamw([{"params": dense}, {"params": routed}])
    losses, choices, gradients = [], [], None
    for rows in batches(config()):
        loss = backward(model, *(part.chunk(P)[rank].to(device) for part in rows)) / P
        choices += [part.chosen.cpu() for part in model.experts()]
        add_up(dense, mesh.get_group(), P)
        for p in routed:  # each on one rank only
            p.grad.to_local().div_(P)
        if gradients is None:
            gradients = {
                name: (p.grad.full_tensor() if is_expert(p) else p.grad).cpu().clone()
                for name, p in model.named_parameters()
            }
            balances = [measure(part) for part in model.experts()]
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        clip_gradients(model.parameters(), CLIP, Layout(dp=P, ep=P))
        optimizer.step()
        optimizer.zero_grad()
        for part in model.experts():
            part.balance()
    return Run(losses, whole(model)), choices, gradients, balances


def train_all(device: str) -> dict:
    """All ways, in one process for each rank."""
    return {way: train(way, factor, device) for way, factor in WAYS.items()}


@pytest.fixture(scope="module", params=[(2, "cpu"), (4, "cpu")], ids=str)
def runs(request: pytest.FixtureRequest) -> list[dict]:
    P, device = request.param
    return launch(train_all, device, ranks=P, device=device)


@pytest.mark.parametrize("way", WAYS)
def test_same_losses_and_weights_as_one_device(runs, way):
    expected, choices = alone(config())
    assert_same([rank[way][0] for rank in runs], expected)
    for call, wanted in enumerate(choices):  # no token went elsewhere, so nothing hides in the tolerance
        assert torch.equal(torch.cat([rank[way][1][call] for rank in runs]), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_one_device_and_not_a_multiple(runs, way):
    model = Transformer(config())
    backward(model, *batches(config())[0])
    for name, p in model.named_parameters():
        for rank in runs:
            close(rank[way][2][name], p.grad, name, 1e-6)
    assert min(p.grad.abs().max() for p in model.parameters()) > 1e-4  # far above what `close` lets pass


def test_balance_is_that_of_all_tokens(runs):
    for call, chosen in enumerate(alone(config())[1][:2]):
        load = torch.bincount(chosen.flatten(), minlength=8).double()
        ranks = load.view(len(runs), -1).sum(1)
        for rank in runs:
            found = list(rank["exchange"][3][call])
            assert found == pytest.approx([(load.max() / load.mean()).item(), (ranks.max() / ranks.mean()).item(), 0.0])


def test_the_bias_moves_choices_within_the_test():
    """Else the runs would agree although nobody added up the ranks' loads."""
    still = dataclasses.replace(config(), experts=dataclasses.replace(config().experts, bias_speed=0.0))
    model, optimizer = Transformer(still), None
    optimizer = adamw(model.parameters())
    for rows in batches(still):
        backward(model, *rows)
        last = [part.chosen for part in model.experts()]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(last, alone(config())[1][-2:]))


# -- capacity -----------------------------------------------------------------------------------------


def test_slots_token_by_token():
    chosen = torch.randint(6, (20, 2), generator=torch.Generator().manual_seed(0))
    for C in (1, 3, 40):
        filled, wanted = [0] * 6, []
        for e in chosen.flatten().tolist():
            wanted.append(e * C + filled[e] if filled[e] < C else 6 * C)
            filled[e] += 1
        assert slots(chosen, 6, C).tolist() == wanted


def crowded(device: str) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor]:
    """A layer whose bias sends every token to experts 0 and 1: result of capacity, its choices, dropped; of exchange."""
    P, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mesh = init_device_mesh(device, (P,), mesh_dim_names=("ep",))
    x = torch.randn(P, 3, 4, 32, generator=torch.Generator().manual_seed(1))[rank].to(device)  # (B, T, D)
    results = []
    for way in ("capacity", "exchange"):
        model = Transformer(config())
        part = model.blocks[1].feed_forward
        part.router.bias[:2] += 10
        shard_experts(model, mesh, way, factor=1.0)
        model.to(device)
        results.append(part(x))
        results[-1].square().sum().backward()
        if way == "capacity":
            chosen, balance = part.chosen, measure(part)
    gradient = part.gate.grad.to_local()
    return *(y.detach().cpu() for y in results), chosen.cpu(), balance, gradient.cpu()


@pytest.fixture(scope="module", params=DEVICES)
def crowd(request: pytest.FixtureRequest) -> list[tuple]:
    return launch(crowded, request.param, ranks=2, device=request.param)


def test_what_does_not_fit_adds_nothing(crowd):
    part = Transformer(config()).blocks[1].feed_forward
    part.router.bias[:2] += 10
    C = math.ceil(12 * 2 / 8)  # 12 tokens, 2 experts each, 8 experts: 3 fit into each expert, and 9 of 12 do not
    x = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(1))
    for rank, (y, _, chosen, balance, _) in enumerate(crowd):
        assert set(chosen.flatten().tolist()) == {0, 1}
        assert list(balance) == pytest.approx([4.0, 2.0, 0.75])
        wanted = part(x[rank])
        torch.testing.assert_close(y.view(12, 32)[:C], wanted.view(12, 32)[:C])
        torch.testing.assert_close(y.view(12, 32)[C:], part.shared(x[rank]).view(12, 32)[C:])


def test_a_rank_may_get_no_token_at_all(crowd):
    part = Transformer(config()).blocks[1].feed_forward
    part.router.bias[:2] += 10
    x = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(1))
    for rank, (_, y, *_) in enumerate(crowd):
        torch.testing.assert_close(y, part(x[rank]))
    assert crowd[0][4].abs().max() > 0 and crowd[1][4].abs().max() == 0  # gradients of experts 0 to 3, and of 4 to 7


# -- refusals -----------------------------------------------------------------------------------------


def refused(device: str) -> list[str]:
    mesh, messages = init_device_mesh(device, (3,), mesh_dim_names=("ep",)), []
    for way in ("exchange", "scatter"):
        with pytest.raises(ValueError) as caught:
            shard_experts(Transformer(config()), mesh, way)
        messages.append(str(caught.value))
    return messages


def test_what_is_wrong_is_said():
    for indivisible, unknown in launch(refused, "cpu", ranks=3):
        assert indivisible == "8 routed experts do not divide among 3 ranks; give a number of ranks that divides 8"
        assert unknown == "unknown way 'scatter'; expected one of gather, exchange, capacity"
