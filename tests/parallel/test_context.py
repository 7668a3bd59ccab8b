"""Context parallelism trains as one device, in both orders; attention and its gradients by themselves; the balance."""

import itertools
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from course_lib.llm.cache import Cache
from course_lib.llm.config import Config
from course_lib.llm.layers import attend
from course_lib.llm.model import Transformer
from course_lib.parallel import launch
from course_lib.parallel.context import WAYS, Order, pairs, pieces, split_context
from course_lib.parallel.data import average, mean
from tests.parallel.same import CLIP, Run, adamw, alone, assert_same, batches, close, shape, whole

CASES = [("cpu", 4), ("npu", 2)]  # device, ranks
ALL = list(itertools.product(WAYS, (False, True)))
NAMES = [f"{way}-{'zigzag' if zigzag else 'in order'}" for way, zigzag in ALL]


def train(config: Config, way: str, zigzag: bool, device: str) -> Run:
    model = Transformer(config).to(device)
    order = split_context(model, way, zigzag)
    optimizer, losses = adamw(model.parameters()), []
    for tokens, targets in batches(config):
        loss = model(order.part(tokens).to(device), order.part(targets).to(device))  # scalar
        loss.backward()
        average(model)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean(loss).item())
    return Run(losses, whole(model))


def example(heads: int, kv_heads: int) -> list[Tensor]:
    """q, k, v and a gradient of the result, of 2 sequences of 48 tokens with heads of width 8."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, h, 48, 8, generator=generator) for h in (heads, kv_heads, kv_heads, heads)]


def attention(way: str, zigzag: bool, device: str, heads: int, kv_heads: int) -> list[Tensor]:
    """This rank's parts of the result and of the gradients of q, k and v."""
    order = Order(zigzag)
    q, k, v, gradient = (order.part(x, 2).to(device) for x in example(heads, kv_heads))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = WAYS[way](order, *leaves)
    out.backward(gradient)
    return [x.detach().cpu() for x in (out, *(leaf.grad for leaf in leaves))]


def mistakes(device: str) -> list[str]:
    model = Transformer(shape()).to(device)
    order, said = split_context(model), []
    tokens = torch.zeros(1, 64, dtype=torch.int64, device=device)
    for call in (
        lambda: order.part(tokens[:, :63]),
        lambda: model(tokens),
        lambda: model(order.part(tokens), cache=Cache(model.config, 1, device)),
        lambda: split_context(model, "tree"),
        lambda: split_context(Transformer(shape("micro-v3"))),
    ):
        with pytest.raises(ValueError) as error:
            call()
        said.append(str(error.value))
    return said


def everything(device: str) -> dict:
    found = {f"train {way} {zigzag}": train(shape(), way, zigzag, device) for way, zigzag in ALL}
    for (way, zigzag), heads in itertools.product(ALL, ((4, 4), (4, 2))):
        found[f"attention {way} {zigzag} {heads}"] = attention(way, zigzag, device, *heads)
    return found | {"mistakes": mistakes(device), "rank": dist.get_rank()}


@pytest.fixture(scope="module", params=CASES, ids=str)
def found(request: pytest.FixtureRequest) -> list[dict]:
    device, ranks = request.param
    return launch(everything, device, ranks=ranks, device=device, timeout=90)


@pytest.mark.parametrize(("way", "zigzag"), ALL, ids=NAMES)
def test_same_as_one_device(found: list[dict], way: str, zigzag: bool) -> None:
    assert_same([rank[f"train {way} {zigzag}"] for rank in found], alone(shape()))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["as many keys", "shared keys"])
@pytest.mark.parametrize(("way", "zigzag"), ALL, ids=NAMES)
def test_attention_and_its_gradients(found: list[dict], way: str, zigzag: bool, heads: tuple[int, int]) -> None:
    q, k, v, gradient = example(*heads)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    out.backward(gradient)
    expected = [out.detach(), *(leaf.grad for leaf in leaves)]
    P = len(found)
    for rank, result in enumerate(found):
        for name, one, other in zip(("out", "dq", "dk", "dv"), result[f"attention {way} {zigzag} {heads}"], expected):
            cut = other.chunk(P * len(pieces(P, zigzag)[0]), 2)
            close(one, torch.cat([cut[i] for i in pieces(P, zigzag)[rank]], 2), f"rank {rank}: {name}")


def test_mistakes_are_told(found: list[dict]) -> None:
    for rank in found:
        said = rank["mistakes"]
        assert "63 tokens do not divide into" in said[0]
        assert "do not fit into the context of 64" in said[1]
        assert "has no cache" in said[2] and "gather, ring" in said[3] and "without -v3" in said[4]


@pytest.mark.parametrize(("T", "P"), [(48, 2), (48, 4), (64, 8)])
def test_pairs_counted_one_by_one(T: int, P: int) -> None:
    for zigzag in (False, True):
        cut = torch.arange(T).chunk(P * len(pieces(P, zigzag)[0]))
        by_hand = [sum(int(token) + 1 for i in mine for token in cut[i]) for mine in pieces(P, zigzag)]
        assert pairs(T, P, zigzag) == by_hand
        assert sum(by_hand) == T * (T + 1) // 2


def test_balance() -> None:
    """In order the last rank has almost 2 - 1/P times the mean; in zig-zag order all have the same."""
    for P in (2, 4, 8):
        in_order, zigzag = pairs(4096, P, False), pairs(4096, P, True)
        assert len(set(zigzag)) == 1
        assert float(Fraction(max(in_order) * P, sum(in_order))) == pytest.approx(2 - 1 / P, rel=1e-3)
