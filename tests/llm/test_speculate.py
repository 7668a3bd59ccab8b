"""Prompts of different lengths in one batch, and two tokens a step: the tokens are those of plain greedy decoding."""

import dataclasses

import pytest
import torch

from course_lib.llm.cache import PagedCache
from course_lib.llm.config import preset
from course_lib.llm.generate import generate
from course_lib.llm.model import Transformer
from course_lib.llm.speculate import generate_batch, speculate

PROMPTS = [torch.tensor(p) for p in ([1, 2, 3, 4, 5, 6], [9, 8], [7, 7, 7, 7], [30])]
V3 = preset("micro-v3", 50)


@pytest.fixture(scope="module", params=["micro", "micro-v3"])
def model(request):
    return Transformer(preset(request.param, 50), seed=1)


def alone(model, prompts, new):
    return [generate(model, prompt[None], new)[0].tolist() for prompt in prompts]


@pytest.mark.parametrize("paged", [False, True])
def test_a_batch_makes_what_each_prompt_makes_alone(model, paged):
    cache = PagedCache(model.config, 4, pages=40, page=4) if paged else None
    made = generate_batch(model, PROMPTS, 30, cache=cache)
    assert [row.tolist() for row in made] == alone(model, PROMPTS, 30)


def test_draws_are_seeded(model):
    first, again, other = (generate_batch(model, PROMPTS, 9, 1.0, 10, seed) for seed in (1, 1, 2))
    assert all(a.equal(b) for a, b in zip(first, again)) and not all(a.equal(b) for a, b in zip(first, other))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("new", [1, 2, 31, 58])
def test_speculation_makes_the_tokens_of_greedy_decoding(paged, new):
    """Up to the context; the weights are random, so that nearly all drafts are dropped."""
    model = Transformer(V3, seed=1)
    cache = PagedCache(V3, 4, pages=70, page=4) if paged else None
    made = speculate(model, PROMPTS, new, cache)
    assert [row.tolist() for row in made.rows] == alone(model, PROMPTS, new)
    assert made.steps <= new - 1


def test_a_draft_that_is_right_saves_steps():
    """A model that counts: the next token is the last plus one; so is the draft's."""
    model = Transformer(dataclasses.replace(V3, experts=None), seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(250):
        rows = (torch.randint(50, (16, 1), generator=generator) + torch.arange(33)) % 50
        (model(rows[:, :-1], rows[:, 1:]) + model.aside).backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([20, 21])]
    made = speculate(model, prompts, 21)
    assert [row.tolist() for row in made.rows] == alone(model, prompts, 21)
    assert made.rows[0].tolist() == list(range(3, 27))
    assert made.accepted > 0.9 and made.steps <= 12


def test_errors():
    with pytest.raises(ValueError, match="no layer that predicts a further token; use a preset with mtp"):
        speculate(Transformer(preset("micro", 50)), PROMPTS, 2)
    with pytest.raises(ValueError, match="prompt of 6 and 59 new tokens exceed the context"):
        speculate(Transformer(V3), PROMPTS, 59)
    with pytest.raises(ValueError, match="no page left"):
        generate_batch(Transformer(V3), PROMPTS, 30, cache=PagedCache(V3, 4, pages=8, page=4))
