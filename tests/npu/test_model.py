"""The language model, which knows nothing of the emulation, on the device."""

import pytest
import torch

from course_lib import npu
from course_lib.llm.config import preset
from course_lib.llm.model import Transformer

CONFIG = preset("micro", vocab_size=64)
B, T = 4, CONFIG.context


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CONFIG.vocab_size, (B, T + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def losses(device: str, steps: int = 5) -> list[float]:
    model = Transformer(CONFIG).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=device == "npu")
    tokens, targets = (t.to(device) for t in batch())
    out = []
    for _ in range(steps):
        loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


def test_it_learns_as_on_the_cpu() -> None:
    here, there = losses("cpu"), losses("npu")
    assert here[-1] < here[0] - 0.2
    assert there == pytest.approx(here, rel=1e-4)


@pytest.fixture
def ledger() -> npu.Ledger:
    model = Transformer(CONFIG).to("npu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens, targets = (t.to("npu") for t in batch())
    with npu.ledger() as ledger:
        model(tokens, targets).backward()
        optimizer.step()
    ledger.model = model
    return ledger


def test_forward_flops_are_the_models_own_count(ledger) -> None:
    per_token = ledger.model.flops_per_token("6N+attention causal")
    assert ledger.table("phase").loc["forward", "cube_flops"] * 3 == per_token * B * T


def test_backward_flops_are_twice_the_forwards_and_a_fifth_product_of_attention(ledger) -> None:
    table = ledger.table("phase")
    once_more = sum(r.cost.cube_flops for r in ledger.records if "attention" in r.op and r.phase == "forward") // 2  # QKᵀ
    assert table.loc["backward", "cube_flops"] == 2 * table.loc["forward", "cube_flops"] + once_more


def test_every_block_costs_the_same(ledger) -> None:
    blocks = ledger.table("module", depth=3).filter(like="Transformer.blocks", axis=0)
    assert len(blocks) == CONFIG.layers and blocks["cube_flops"].nunique() == 1
