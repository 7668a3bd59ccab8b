"""The command line on the cpu, as a user types it."""

import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from course_lib.llm import device, train
from course_lib.llm.trainer import Trainer

QUICK = ["--preset", "micro", "--tokenizer", "char", "--batch", "2"]


@pytest.fixture
def story_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return str(file)


def run(*arguments):
    command = [sys.executable, "-m", "course_lib.llm.train", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ, timeout=120)


def test_train_and_resume(tmp_path, story_file):
    out = str(tmp_path / "run")
    common = [*QUICK, "--corpus", story_file, "--out", out]
    first = run(*common, "--steps", "12")
    assert first.returncode == 0, first.stderr
    assert "12/12" in first.stderr and "tokens/s (wall clock)" in first.stderr
    assert (
        "floor       unknown" in first.stdout
        and "MFU unknown" in first.stdout
        and "sample      the quick " in first.stdout
    )
    again = run(*common, "--steps", "15", "--resume")
    assert again.returncode == 0, again.stderr
    assert "steps       15 of 128 tokens" in again.stdout
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint-000015.safetensors",
        "checkpoint.json",
        "tokenizer.json",
    ]


def test_stories_show_the_floor(tmp_path, capsys):
    assert train.main([*QUICK, "--steps", "3", "--out", str(tmp_path)]) == 0
    assert "(entropy of the corpus); the validation loss is" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--preset", "big"], "unknown preset 'big'; expected one of micro, tiny, small"),
        (["--corpus", "no.txt"], "no.txt: does not exist; expected a UTF-8 text file, or one of the corpora"),
        (["--tokenizer", "words"], "unknown tokenizer 'words'; expected char, or bpe"),
        (["--batch", "0"], "expected batch of at least 1, found 0"),
        (["--steps", "0"], "expected steps of at least 1, found 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--save-every", "0"], "expected save-every of at least 1, found 0"),
        (["--learning-rate", "-1"], "expected a learning rate above 0, found -1.0"),
        (["--resume"], "no checkpoint to resume in"),
        (["--device", "tpu"], "unknown device 'tpu'; expected cpu, cuda or npu"),
        (["--chip", "mini"], "a chip is chosen for the device npu only, not for 'cpu'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_bad_arguments_are_told_in_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        train.main(["--out", str(tmp_path / "run"), *arguments])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.count("\n") == 1 and error.startswith("python -m course_lib.llm.train: error: ") and message in error
    assert not (tmp_path / "run").exists()


def test_no_traceback_in_a_real_process(tmp_path):
    done = run("--corpus", str(tmp_path))
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "is a folder" in done.stderr


def test_an_old_checkpoint_is_not_overwritten_and_a_finished_run_not_resumed(tmp_path, story_file, capsys):
    common = [*QUICK, "--corpus", story_file, "--out", str(tmp_path / "run"), "--steps", "3"]
    assert train.main(common) == 0
    for more, message in [
        ([], "holds a checkpoint already"),
        (["--resume"], "has 3 steps already; expected --steps above that, found 3"),
    ]:
        with pytest.raises(SystemExit):
            train.main(common + more)
        assert message in capsys.readouterr().err


def test_interrupt_saves_and_resumes_to_the_bit(tmp_path, story_file, monkeypatch, capsys):
    """Ctrl-C in step 8 waits for the steps in flight, so that weights and step count of the checkpoint agree."""
    common = [*QUICK, "--corpus", story_file, "--steps", "16"]
    assert train.main([*common, "--out", str(tmp_path / "straight")]) == 0
    step, grouped = Trainer.step, Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: grouped(self, every=5))

    def interrupted(self, number):
        if number == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert train.main([*common, "--out", str(tmp_path / "cut")]) == 130
    assert "interrupted after 10 steps; the same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main([*common, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    records = [json.loads((tmp_path / name / "checkpoint.json").read_text()) for name in ("straight", "cut")]
    assert records[0] == records[1]
    tensors = [(tmp_path / name / records[0]["tensors"]).read_bytes() for name in ("straight", "cut")]
    assert tensors[0] == tensors[1]


def test_a_loss_that_is_no_number_is_told_and_not_saved(tmp_path, story_file, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "step", lambda self, number: torch.tensor(math.nan))
    assert train.main([*QUICK, "--corpus", story_file, "--out", str(tmp_path / "run")]) == 1
    assert "error: the loss is nan at step 10; lower the learning rate" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_peak_is_what_the_device_tells_or_unknown(monkeypatch):
    npu = SimpleNamespace(type="npu")
    for told, peak in [
        ({"peak_flops": {"float32": 1e12}}, 1e12),
        ({"peak_flops": {"float16": 1e12}}, None),
        ({}, None),
    ]:
        module = SimpleNamespace(get_device_properties=lambda d, told=told: SimpleNamespace(**told))
        monkeypatch.setattr(device.torch, "get_device_module", lambda d, module=module: module)
        assert device.peak_flops(npu) == peak
    assert device.peak_flops(torch.device("cpu")) is None


def test_the_emulated_npu_learns_the_same_and_tells_its_utilisation(tmp_path, story_file):
    """The same weights, batches and losses as on the cpu."""
    common = [*QUICK, "--corpus", story_file, "--steps", "12", "--out"]
    assert train.main([*common, str(tmp_path / "cpu")]) == 0
    done = run(*common, str(tmp_path / "npu"), "--device", "npu", "--chip", "mini")
    assert done.returncode == 0, done.stderr
    assert "tokens/s (npu events) · MFU " in done.stdout
    assert "% (6N+attention causal, float32 cube peak)" in done.stdout
    losses = [json.loads((tmp_path / out / "checkpoint.json").read_text())["losses"] for out in ("cpu", "npu")]
    assert losses[1] == pytest.approx(losses[0], abs=5e-4)
