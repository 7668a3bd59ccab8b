"""Random numbers of the device: seeds, states, generators; independent of what the host draws."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from course_lib import npu

F = torch.nn.functional
SHAPE = (16,)
# Every way to draw: with the device's own generator, or with one given
WAYS = {
    "randn": lambda **g: torch.randn(SHAPE, device="npu", **g),
    "rand": lambda **g: torch.rand(SHAPE, device="npu", **g),
    "randint": lambda **g: torch.randint(9, SHAPE, device="npu", **g),
    "randperm": lambda **g: torch.randperm(16, device="npu", **g),
    "normal_": lambda **g: torch.empty(SHAPE, device="npu").normal_(**g),
    "uniform_": lambda **g: torch.empty(SHAPE, device="npu").uniform_(**g),
    "exponential_": lambda **g: torch.empty(SHAPE, device="npu").exponential_(**g),
    "bernoulli": lambda **g: torch.full(SHAPE, 0.5, device="npu").bernoulli(**g),
    "multinomial": lambda **g: torch.ones(SHAPE, device="npu").multinomial(4, **g),
    "poisson": lambda **g: torch.poisson(torch.full(SHAPE, 9.0, device="npu"), **g),
    "normal of means": lambda **g: torch.normal(torch.zeros(SHAPE, device="npu"), 1.0, **g),
}
WITHOUT_GENERATOR = {
    "rand_like": lambda: torch.rand_like(torch.empty(SHAPE, device="npu")),
    "dropout": lambda: F.dropout(torch.ones(SHAPE, device="npu")),
    "alpha_dropout": lambda: F.alpha_dropout(torch.ones(SHAPE, device="npu"), 0.5, training=True),
    "rrelu": lambda: F.rrelu(-torch.ones(SHAPE, device="npu"), training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(torch.ones(SHAPE, device="npu")),
    "attention": lambda: F.scaled_dot_product_attention(*[torch.ones(1, 1, 4, 4, device="npu")] * 3, dropout_p=0.5),
    "trunc_normal_": lambda: torch.nn.init.trunc_normal_(torch.empty(SHAPE, device="npu")),
}


@pytest.mark.parametrize("way", WAYS | WITHOUT_GENERATOR)
def test_seeded_and_independent_of_the_host(way: str) -> None:
    draw = (WAYS | WITHOUT_GENERATOR)[way]
    torch.manual_seed(3)
    first, second = draw().cpu(), draw().cpu()
    host = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), host)  # the device's draws did not move the host's
    again, torch_state = draw().cpu(), torch.get_rng_state()
    torch.rand(100)
    assert torch.equal(again, first) and torch.equal(draw().cpu(), second)
    assert not torch.equal(first, second)
    torch.set_rng_state(torch_state)


@pytest.mark.parametrize("way", WAYS)
def test_a_generator_of_the_device(way: str) -> None:
    generator = torch.Generator(device="npu").manual_seed(5)
    own = torch.npu.get_rng_state()
    first = WAYS[way](generator=generator)
    assert torch.equal(torch.npu.get_rng_state(), own) and generator.get_offset() > 0
    generator.manual_seed(5)
    assert torch.equal(WAYS[way](generator=generator).cpu(), first.cpu())
    torch.npu.manual_seed(5)
    assert torch.equal(WAYS[way]().cpu(), first.cpu())
    with pytest.raises(RuntimeError, match="Expected a 'npu' device type for generator but found 'cpu'"):
        WAYS[way](generator=torch.Generator())


def test_generators_are_torchs() -> None:
    npu.use("mini", count=2)
    g = torch.Generator(device="npu:1")
    assert isinstance(g, torch.Generator) and isinstance(torch.Generator(), torch.Generator) and isinstance(torch.default_generator, torch.Generator)
    assert not isinstance(1, torch.Generator) and issubclass(type(g), torch.Generator)
    assert g.device == torch.device("npu:1") and torch.Generator("npu").device.index == 0 and torch.Generator().device.type == "cpu"
    assert g.manual_seed(7) is g and g.initial_seed() == 7
    assert g.seed() == g.initial_seed() != 7
    assert [d.device.index for d in torch.npu.default_generators] == [0, 1]
    for other in (copy.deepcopy(g), pickle.loads(pickle.dumps(g)), g.clone_state()):
        assert other.device == g.device and torch.equal(other.get_state(), g.get_state())


def test_states() -> None:
    torch.manual_seed(-1)
    assert torch.npu.initial_seed() == torch.initial_seed() == 2**64 - 1
    torch.rand(5, device="npu")
    state, states = torch.npu.get_rng_state(), torch.npu.get_rng_state_all()
    assert state.numel() == 16 and len(states) == 1  # seed and offset, as on real accelerators
    x = torch.rand(5, device="npu").cpu()
    torch.npu.set_rng_state(state)
    y = torch.rand(5, device="npu").cpu()
    torch.npu.set_rng_state_all(states)
    assert torch.equal(x, y) and torch.equal(x, torch.rand(5, device="npu").cpu())
    for wrong, error in ((torch.zeros(3, dtype=torch.uint8), "wrong size"), (torch.zeros(16), "ByteTensor")):
        with pytest.raises((RuntimeError, TypeError), match=error):
            torch.npu.set_rng_state(wrong)


def test_seeds_of_several_devices() -> None:
    npu.use("mini", count=2)
    torch.manual_seed(1)
    a, b = torch.rand(4, device="npu:0").cpu(), torch.rand(4, device="npu:1").cpu()
    assert torch.equal(a, b) and torch.equal(a, (torch.manual_seed(1), torch.rand(4))[1])
    with torch.npu.device(1):
        torch.npu.manual_seed(2)
    assert [g.initial_seed() for g in torch.npu.default_generators] == [1, 2]
    torch.npu.seed_all()
    assert len({g.initial_seed() for g in torch.npu.default_generators}) == 1


def test_fork_rng() -> None:
    npu.use("mini", count=2)
    before = torch.npu.get_rng_state_all()
    with torch.random.fork_rng(devices=[0, 1], device_type="npu"):
        torch.manual_seed(9)
        torch.rand(3, device="npu:1")
    assert all(map(torch.equal, before, torch.npu.get_rng_state_all()))


def test_draws_do_not_repeat() -> None:
    """The engine is seeded anew for each draw: neighbouring draws must not look alike."""
    x = torch.stack([torch.rand(4, device="npu").cpu() for _ in range(2000)])  # (draws, 4)
    assert len(x.unique(dim=0)) == 2000
    assert abs(x.mean() - 0.5) < 0.02 and torch.corrcoef(x.T).triu(1).abs().max() < 0.1
    assert abs(torch.corrcoef(torch.stack([x[:-1, 0], x[1:, 0]]))[0, 1]) < 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_its_dropout(reentrant: bool) -> None:
    def gradients(block) -> list[torch.Tensor]:
        torch.manual_seed(0)
        linear = torch.nn.Linear(8, 8, device="npu")
        x = torch.ones(4, 8, device="npu", requires_grad=True)
        h = block(lambda t: F.dropout(linear(t), 0.5), block(lambda t: F.dropout(linear(t), 0.3), x))
        h.sum().backward()
        return [linear.weight.grad.cpu(), x.grad.cpu(), torch.rand(3, device="npu").cpu()]

    plain = gradients(lambda f, t: f(t))
    again = gradients(lambda f, t: checkpoint(f, t, use_reentrant=reentrant))
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b)


FACTORIES = {
    "rand": lambda **k: torch.rand(3, **k), "randn": lambda **k: torch.randn(3, **k), "randperm": lambda **k: torch.randperm(3, **k),
    "randint": lambda **k: torch.randint(9, (3,), **k), "randint from": lambda **k: torch.randint(2, 9, (3,), **k),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTORIES)
def test_a_generator_draws_on_its_own_device_only(name: str) -> None:
    npu.use("mini", count=2)
    draw, generator = FACTORIES[name], torch.Generator("npu").manual_seed(3)
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'npu'"):
        draw(generator=generator)
    with pytest.raises(RuntimeError, match="Expected a 'npu:1' generator device but found 'npu:0'"):
        draw(generator=generator, device="npu:1")
    with pytest.raises(RuntimeError, match="Expected a 'npu' device type for generator but found 'cpu'"):
        draw(generator=torch.Generator(), device="npu")
    host, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert torch.equal(draw(generator=host), draw(generator=again, dtype=None, requires_grad=False))
    assert torch.equal(draw(generator=generator, device="npu").cpu(), draw(generator=torch.Generator().manual_seed(3)))
    assert draw(generator=host, device="meta").device.type == "meta"
