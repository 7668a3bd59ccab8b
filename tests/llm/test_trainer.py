"""The loop against itself and by hand: schedule, decay groups, accumulation, repeatability, learning."""

import math

import pytest
import torch

from course_lib.llm import corpus
from course_lib.llm.trainer import Settings, Trainer, make_optimizer, rate

TEXT = corpus.stories(200)
MICRO = {"preset": "micro", "tokenizer": "char", "steps": 20, "warmup": 5, "batch": 4}


def trainer(**changes) -> Trainer:
    return Trainer(Settings(**MICRO | changes), text=TEXT)


def test_schedule_by_hand():
    settings = Settings(steps=110, warmup=10, learning_rate=2.0)
    assert [rate(n, settings) for n in (1, 5, 10)] == [0.2, 1.0, 2.0]
    assert rate(60, settings) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half way down
    assert rate(35, settings) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rate(110, settings) == pytest.approx(0.2)
    assert rate(3, Settings(steps=3, warmup=10, learning_rate=2.0)) == 2.0  # a run shorter than its warm-up


def test_decay_on_matrices_only():
    run = trainer()
    matrices, gains = make_optimizer(run.model, run.settings).param_groups
    assert matrices["weight_decay"] == 0.1 and all(p.dim() == 2 for p in matrices["params"])
    assert gains["weight_decay"] == 0.0 and len(gains["params"]) == 2 * 2 + 1
    assert sum(p.numel() for g in (matrices, gains) for p in g["params"]) == run.model.num_parameters()


def test_accumulation_is_a_larger_batch():
    """Two passes of 4 rows have the loss and the gradient of one pass of the same 8 rows."""
    halves, whole = trainer(accumulate=2), trainer(batch=8)
    rows = [halves.batches.draw() for _ in range(2)]
    whole.batches.draw = lambda: tuple(torch.cat(parts) for parts in zip(*rows))
    queue = iter(rows)
    halves.batches.draw = lambda: next(queue)
    torch.testing.assert_close(halves.step(1), whole.step(1))
    for a, b in zip(halves.optimizer.state.values(), whole.optimizer.state.values()):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], atol=1e-6, rtol=1e-3)


def test_gradients_are_clipped():
    run = trainer(clip=1e-3)
    run.step(1)
    norm = torch.stack([state["exp_avg"].norm() / 0.1 for state in run.optimizer.state.values()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_two_runs_have_the_same_losses_and_the_host_reads_them_in_groups():
    history = list(trainer().run(every=7))
    assert [step.number for step in history] == list(range(1, 21))
    assert [step.loss for step in history] == [step.loss for step in trainer().run(every=1)]
    assert all(step.tokens == 4 * 64 and step.seconds > 0 for step in history)


def test_learning_lowers_the_loss_and_stays_above_the_floor():
    run = trainer(steps=60)
    before = run.validate()
    list(run.run())
    assert run.floor < run.validate() < before - 0.7
    assert before == pytest.approx(math.log(run.tokenizer.size), abs=0.15)


def test_validation_is_the_mean_over_all_targets_whatever_the_batch():
    assert trainer(batch=3).validate() == pytest.approx(trainer(batch=8).validate(), rel=1e-5)


def test_sample_ends_with_the_story_and_takes_a_prompt():
    run = Trainer(Settings(**MICRO | {"tokenizer": "bpe300"}), text=TEXT)
    assert "\n" not in run.sample()
    assert run.sample("Once upon").startswith("Once upon")
    assert run.sample(seed=1) == run.sample(seed=1) != run.sample(seed=2)
    own = Trainer(Settings(**MICRO), text=corpus.split("mine", "my own text. " * 200))
    assert own.sample().startswith("my own tex") and own.floor is None


def test_mfu_divides_by_the_peak_that_the_device_tells(monkeypatch):
    run = trainer()
    assert run.mfu(1000, 1.0) is None  # a cpu tells none
    monkeypatch.setattr("course_lib.llm.trainer.peak_flops", lambda device, dtype: {"float32": 1e9}[dtype])
    assert run.mfu(1000, 2.0, "6N") == pytest.approx(6 * run.model.num_multiplying() * 1000 / 2e9)
    assert run.mfu(1000, 2.0) == pytest.approx(run.model.flops_per_token() * 1000 / 2e9)


def test_a_loss_that_is_no_number_stops_the_run():
    run = trainer()
    run.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 5; lower the learning rate"):
        list(run.run(every=5))


@pytest.mark.parametrize("name", ["steps", "batch", "accumulate"])
def test_bad_settings(name):
    with pytest.raises(ValueError, match=f"expected {name} of at least 1, found 0"):
        Settings(**{name: 0})
    with pytest.raises(ValueError, match="learning rate above 0"):
        Settings(learning_rate=0.0)


def test_a_text_too_short():
    with pytest.raises(ValueError, match="mine: is too short: .* expected at least 66 for a context of 64"):
        Trainer(Settings(**MICRO), text=corpus.split("mine", "short text"))
    with pytest.raises(ValueError, match="mine: is too short to hold back a twentieth for validation; use more text"):
        Trainer(Settings(**MICRO), text=corpus.Corpus("mine", "long text " * 90, "x"))
