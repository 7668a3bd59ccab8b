"""The proof of a parallel scheme: it trains to the losses and weights of one device, from the same seed and text.

    def rank(config, device):                       # on each rank
        model = ... Transformer(config).to(device) ...
        for tokens, targets in batches(config):     # all rows; a scheme takes its own of them
            ...
        return Run(losses, whole(model))            # the mean loss over all rows

    assert_same(launch(rank, config, device, ranks=4, device=device), alone(config))

Why a tolerance: float32 has 24 bits, and a sum in another order (over ranks, over parts of a matrix) differs in the last
of them, some 1e-7 of its size. The losses are near 4, so they may differ by some 1e-6. AdamW divides the gradient by its
own size, so it steps a weight whose gradient is almost zero as far as any other; its eps of 1e-6, far above the rounding
of gradients (1e-9), keeps that noise out of the weights. A forgotten factor, a lost gradient, or a rank with another
rank's rows moves weights by the order of learning rate × steps, 5e-2: over a thousand tolerances.
"""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from course_lib.llm import corpus, tokenizer
from course_lib.llm.config import Config, preset
from course_lib.llm.corpus import Batches
from course_lib.llm.model import Transformer

STEPS, ROWS = 5, 8
CLIP = 0.5  # below the norm of the first gradients, so that clipping counts
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
TOLERANCE = 2e-5  # absolute, of losses and of weights


class Run(NamedTuple):
    """What training gave: the mean loss of each step in nats per token, and whole weights on the CPU, by name."""

    losses: list[float]
    weights: dict[str, Tensor]


@cache
def text() -> tuple[Tensor, int]:
    """Tokens (characters) of a few stories, and the size of the vocabulary, a multiple of 8 as schemes divide it."""
    stories = corpus.stories(40)
    characters = tokenizer.train("char", stories.train)
    return stories.tokens("train", characters), -(-characters.size // 8) * 8


def shape(name: str = "micro", **changes: int | bool) -> Config:
    """A preset with the vocabulary of `text`, and perhaps with other `layers`, `heads`, `tied` and so on."""
    config = preset(name, text()[1])
    return Config(**vars(config) | changes)


def batches(config: Config, steps: int = STEPS, rows: int = ROWS) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets (rows, T) of each step, on the CPU; the same on every rank."""
    supply = Batches("stories", text()[0], config.context, rows, seed=0)
    return [supply.draw() for _ in range(steps)]


def adamw(parameters: Iterable[Tensor], **changes: float) -> torch.optim.AdamW:
    """The optimizer of all runs."""
    return torch.optim.AdamW(parameters, **ADAMW | changes)


@cache
def alone(config: Config, clip: float = CLIP, steps: int = STEPS, rows: int = ROWS) -> Run:
    """One device, all rows in one pass."""
    model = Transformer(config)
    optimizer, losses = adamw(model.parameters()), []
    for tokens, targets in batches(config, steps, rows):
        loss = model(tokens, targets)  # scalar
        (loss if model.aside is None else loss + model.aside).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Run(losses, whole(model))


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every weight in full, on the CPU, by its name in the model: gathered where it is a DTensor. All ranks call it."""
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu().clone()
        for name, p in model.named_parameters()
    }


def assert_same(found: Run | list[Run], expected: Run, tolerance: float = TOLERANCE) -> None:
    """Losses and weights of each rank are those expected; AssertionError says which rank and weight differ, by how much."""
    for rank, run in enumerate(found if isinstance(found, list) else [found]):
        close(run.losses, expected.losses, f"rank {rank}: losses", tolerance)
        assert run.weights.keys() == expected.weights.keys(), run.weights.keys() ^ expected.weights.keys()
        for name, weight in expected.weights.items():
            close(run.weights[name], weight, f"rank {rank}: {name}", tolerance)


def close(found: Tensor | list[float], expected: Tensor | list[float], what: str, tolerance: float = TOLERANCE) -> None:
    """AssertionError, with `what` and the largest difference, where two differ by more than `tolerance`."""
    found, expected = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    worst = (found - expected).abs().max().item()
    assert worst <= tolerance, f"{what} differ by {worst:.2e}, more than {tolerance:.0e}"
