"""ZeRO-1 with main weights trains as one device does; in bfloat16 it keeps what bfloat16 weights would lose."""

import pytest
import torch

from course_lib.llm.config import Config
from course_lib.parallel import launch
from course_lib.parallel.mesh import Combined, Layout
from tests.parallel import test_mesh
from tests.parallel.same import CLIP, ROWS, Run, adamw, batches, close, shape

GQA = test_mesh.GQA
CASES = {
    "DP4": (GQA, Layout(dp=4), {}), "DP2 TP2 with accumulation": (GQA, Layout(dp=2, tp=2), {"microbatches": 2}),
    "TP2 PP2 SP": (GQA, Layout(tp=2, pp=2), {"microbatches": 2}),
    "DP4 EP2": (test_mesh.LAYOUTS["DP4 EP2"][0], Layout(dp=4, ep=2), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_same_losses_and_weights_as_one_device(name: str) -> None:
    config, layout, options = CASES[name]
    runs = launch(test_mesh.train, config, layout, "cpu", options | {"zero": 1}, ranks=layout.ranks, device="cpu")
    wanted, norm = test_mesh.expected(config), test_mesh.first_norm(config)
    for rank, (run, its_norm) in enumerate(runs):
        close([its_norm], [norm], f"rank {rank}: norm")
        close(run.losses, wanted.losses, f"rank {rank}: losses")
        for weight, value in run.weights.items():
            close(value, wanted.weights[weight], f"rank {rank}: {weight}")


def small_steps(config: Config, zero: int) -> tuple[float, int, int]:
    """How far a weight of bfloat16 goes in steps too small for it, all in one direction; and the numbers of state on a rank."""
    trainer = Combined(config, Layout(dp=2), ROWS, "cpu", lambda p: adamw(p, lr=1e-4, weight_decay=0.0), clip=CLIP,
                       dtype=torch.bfloat16, zero=zero)  # fmt: skip
    gain = trainer.part.stages[0].norm.weight
    for step in batches(config, steps=1) * 20:
        trainer.step(*step)
    state = sum(v.numel() for s in trainer.optimizer.state.values() for v in s.values() if v.dim())
    return (gain.detach().float() - 1).abs().max().item(), state, sum(p.numel() for p in trainer.parameters())


def test_small_steps_add_up_and_state_is_divided() -> None:
    """Steps of 1e-4 are below half of bfloat16's 2⁻⁷ from 1 on: without main weights a gain of 1 rises never."""
    config = shape("micro")
    (near, _, _), (far, state, held) = (launch(small_steps, config, zero, ranks=2, device="cpu")[0] for zero in (0, 1))
    assert near <= 20 * 2**-9 / 8 and far > 0
    assert state == held // 2 * 2  # two moments of half of the numbers
