"""Ranks that are killed, on purpose and by themselves: the run ends with the weights of the undisturbed one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from course_lib.llm import corpus
from course_lib.llm.trainer import Settings, Trainer
from course_lib.parallel import RankError, supervisor
from course_lib.parallel.supervisor import Kill, Outcome, random_kills, supervise

TEXT = corpus.stories(100)
SETTINGS = Settings(preset="micro", tokenizer="char", steps=12, batch=8, warmup=4)


def supervised(folder: Path, *kills: Kill, **options) -> Outcome:
    return supervise(SETTINGS, folder, **{"ranks": 4, "kills": kills, "text": TEXT} | options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Outcome:
    return supervised(tmp_path_factory.mktemp("run"))


def told(outcome: Outcome) -> list[tuple]:
    return [(event.kind, event.step, event.rank) for event in outcome.events]


def test_four_ranks_train_as_one(undisturbed: Outcome) -> None:
    """Sums are made in another order: losses agree to 1e-5 of a nat, weights to 1e-4."""
    alone = Trainer(SETTINGS, text=TEXT)
    losses = [step.loss for step in alone.run()]
    assert undisturbed.losses == pytest.approx(losses, abs=1e-5)
    for name, p in alone.model.named_parameters():
        assert torch.allclose(undisturbed.weights[name], p, atol=1e-4), name
    assert told(undisturbed) == [("started", 0, None), ("finished", 12, None)]


def test_killed_ranks_leave_no_trace(undisturbed: Outcome, tmp_path) -> None:
    """Twice in the same stretch, in a first and a last step after a checkpoint, and in the middle of a checkpoint."""
    found = supervised(tmp_path, Kill(6, 3), Kill(2, 1), Kill(5, 0, "save"), Kill(10, 2))
    assert found.digest == undisturbed.digest and found.losses == undisturbed.losses
    assert told(found) == [
        ("started", 0, None), ("killed", 2, 1), ("started", 0, None), ("killed", 5, 0), ("started", 0, None),
        ("killed", 6, 3), ("started", 5, None), ("killed", 10, 2), ("started", 5, None), ("finished", 12, None),
    ]  # fmt: skip
    assert str(found.events[3]) == "killed    rank 0 while it saved step 5"
    assert sorted(file.suffix for file in tmp_path.glob("checkpoint*")) == [".json", ".safetensors"]


def test_on_the_emulated_chips(undisturbed: Outcome, tmp_path) -> None:
    """The same code on npu, and the same numbers in every event; two ranks of the emulated node."""
    options = {"ranks": 2, "device": "npu", "system": "mini-node"}
    straight = supervised(tmp_path / "straight", **options)
    found = supervised(tmp_path / "killed", Kill(8, 1), **options)
    assert found.digest == straight.digest
    assert straight.losses == pytest.approx(undisturbed.losses, abs=1e-5)


def test_elastic_goes_on_with_fewer_ranks(undisturbed: Outcome, tmp_path) -> None:
    """After the kill two ranks have four rows each; the same rows in all, so losses agree to 1e-5."""
    found = supervised(tmp_path, Kill(7, 1), elastic=True)
    assert [event.ranks for event in found.events] == [4, 4, 2, 2]
    assert found.losses == pytest.approx(undisturbed.losses, abs=1e-5)
    assert found.losses[:5] == undisturbed.losses[:5]
    for name, weights in undisturbed.weights.items():
        assert torch.allclose(found.weights[name], weights, atol=1e-4), name


def test_a_folder_with_a_checkpoint_is_gone_on_from(undisturbed: Outcome, tmp_path) -> None:
    supervise(replace(SETTINGS, steps=12), tmp_path, 4, every=12, text=TEXT)
    again = supervised(tmp_path)
    assert told(again) == [("started", 12, None), ("finished", 12, None)] and again.digest == undisturbed.digest


def test_a_fault_that_repeats_is_no_accident(tmp_path) -> None:
    """A learning rate that no run survives: three starts, and then the rank's own error."""
    hopeless = replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(RankError, match="FloatingPointError"):
        supervise(hopeless, tmp_path, 2, text=TEXT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 3}, "batch of 8 rows does not divide among 3 ranks"),
        ({"every": 0}, "at least 1"),
        ({"kills": [Kill(13, 0)]}, "never happens in 12 steps"),
        ({"kills": [Kill(3, 4)]}, "on 4 ranks"),
        ({"kills": [Kill(3, 0, "save")]}, "nothing is saved after step 3"),
    ],
)
def test_refused(options, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        supervised(tmp_path, **options)


def test_kills() -> None:
    kills = random_kills(30, 4, 5, seed=1)
    assert kills == random_kills(30, 4, 5, seed=1) != random_kills(30, 4, 5, seed=2)
    assert len({kill.step for kill in kills}) == 5 and all(2 <= k.step <= 30 and 0 <= k.rank < 4 for k in kills)
    with pytest.raises(ValueError, match="rank 1 saves nothing"):
        Kill(5, 1, "save")
    with pytest.raises(ValueError, match="moment is 'noon'"):
        Kill(5, 1, "noon")
    with pytest.raises(ValueError, match="at most one in each"):
        random_kills(3, 2, 3)


def test_fewer_divides_the_batch() -> None:
    assert [supervisor.fewer(n, 12) for n in (8, 6, 4, 3, 2, 1)] == [6, 4, 3, 2, 1, 1]
