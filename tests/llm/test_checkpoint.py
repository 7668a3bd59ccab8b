"""Checkpoints resume to the bit, and an interrupted write leaves the old one whole."""

import os

import pytest
import torch

from course_lib.llm import checkpoint, corpus
from course_lib.llm.trainer import Settings, Trainer

TEXT = corpus.stories(200)


def trainer(**changes) -> Trainer:
    return Trainer(
        Settings(**{"preset": "micro", "tokenizer": "char", "steps": 20, "warmup": 5, "batch": 4} | changes), text=TEXT
    )


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("stop", [7, 10])
def test_resumed_losses_and_weights_are_bit_equal(tmp_path, accumulate, stop):
    straight, first, second = (trainer(accumulate=accumulate) for _ in range(3))
    list(straight.run())
    list(first.run(stop))
    first.save(tmp_path)
    second.resume(tmp_path)
    assert second.done == stop
    list(second.run())
    assert second.losses == straight.losses and len(straight.losses) == 20
    for a, b in zip(straight.model.parameters(), second.model.parameters()):
        assert a.equal(b)


def test_untied_and_before_the_first_step(tmp_path):
    fresh = trainer(preset="tiny", batch=1)
    fresh.save(tmp_path)
    other = trainer(preset="tiny", batch=1)
    other.model.initialise(9)
    other.resume(tmp_path)
    assert other.done == 0
    assert [s.loss for s in other.run(2)] == [s.loss for s in fresh.run(2)]


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("survived", [0, 1])
def test_interrupted_write_keeps_the_old_checkpoint(tmp_path, monkeypatch, survived):
    """The power fails before the first or before the second of the two files is replaced."""
    run = trainer()
    list(run.run(3))
    run.save(tmp_path)
    list(run.run(3))
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) > survived:
            raise PowerCut
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", failing)
    with pytest.raises(PowerCut):
        run.save(tmp_path)
    monkeypatch.undo()
    old = trainer()
    old.resume(tmp_path)
    assert old.done == 3
    run.save(tmp_path)  # and the next write cleans up
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == ["checkpoint-000006.safetensors"]


def test_round_trip_of_tensors(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    checkpoint.save(tmp_path, {"step": 1}, tensors)
    record, loaded = checkpoint.load(tmp_path)
    assert record["step"] == 1 and loaded["a"].equal(tensors["a"]) and loaded["b"].equal(tensors["b"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, "has seed 0, this run 1; give the same, or another --out"),
        ({"preset": "tiny"}, "has preset micro, this run tiny"),
        ({"batch": 5}, "has batch 4, this run 5"),
        ({"learning_rate": 1e-3}, "has learning_rate 0.003, this run 0.001"),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, message):
    run = trainer()
    run.save(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer(**changes).resume(tmp_path)
    trainer(steps=30).resume(tmp_path)  # more steps are no other run


def test_another_text_is_refused(tmp_path):
    trainer().save(tmp_path)
    other = Trainer(trainer().settings, text=corpus.stories(200, seed=1))
    with pytest.raises(ValueError, match="was trained on another text of the corpus stories"):
        other.resume(tmp_path)


def test_missing_and_damaged(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in .*; expected .*checkpoint.json"):
        checkpoint.load(tmp_path)
    trainer().save(tmp_path)
    (tmp_path / "checkpoint-000000.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="checkpoint.json: damaged checkpoint .*; start again without --resume"):
        checkpoint.load(tmp_path)
    (tmp_path / "checkpoint.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(tmp_path)
