"""Figures of lessons 01 and 02: what a token's FLOPs are spent on, the error of 2N, a step beside inference."""

import pytest
import torch
from matplotlib import pyplot as plt

from course_lib import npu, plan, show
from course_lib.show import arithmetic


@pytest.mark.parametrize("name", plan.models())
def test_every_operator_has_a_part(name: str) -> None:
    """What is not named is feed-forward, and counts as the model's feed-forward matrices do."""
    model = plan.load_model(name)
    flops = plan.flops.forward(model, 1, 64)
    parts = arithmetic.by_part(flops)
    assert sum(parts.values()) == plan.flops.total(flops)
    gates = sum(v for k, v in flops.items() if k.split()[-1] in ("gate", "up", "down", "router"))
    latent = sum(flops.get(k, 0) for k in ("query down", "query up", "latent down", "latent up"))
    if not model.compressed and not model.indexer:
        assert parts["feed-forward"] == gates - latent


def test_token_flops(capsys) -> None:
    tiny = plan.load_model("course-tiny")
    show.token_flops({"tiny": (plan.flops.forward(tiny, 1, 128), 128)})
    said = capsys.readouterr().out
    assert "tiny: 1.74 MFLOP per token" in said and "unembedding 8%" in said


def test_error_of_2n(capsys) -> None:
    show.error_of_2n([64, 1024, 4096], {"one": [0.0, -0.05, -0.2], "other": [0.1, 0.1, 0.1]}, {"one": 1024})
    said = capsys.readouterr().out
    assert "one −5.00 % at its 1,024 tokens" in said and "other" not in said
    assert len(plt.gca().get_legend().get_texts()) == 2


def test_step_beside_inference(capsys) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.SiLU(), torch.nn.Linear(256, 64)).to("npu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(512, 64, device="npu")
    with npu.ledger() as inference, torch.no_grad():
        model(x)
    with npu.ledger() as training:
        model(x).square().mean().backward()
        optimizer.step()
    show.step_beside_inference(inference, training)
    said = capsys.readouterr().out
    assert "Step over inference: time" in said and "optimizer" in said and "training" in said
    assert said.count("MiB") + said.count("KiB") >= 4
