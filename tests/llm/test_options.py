"""What each option of training does to loss, memory and time on the emulated chip; its runs resume to the bit."""

import dataclasses
import gc
import json
from typing import NamedTuple

import pytest
import torch

from course_lib import npu
from course_lib.llm import corpus, generate, precision, train
from course_lib.llm.trainer import Settings, Trainer, make_optimizer

TEXT = corpus.stories(200)
MICRO = {"preset": "micro", "tokenizer": "char", "steps": 10, "warmup": 3, "batch": 4}
OPTIONS = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "fp8": {"precision": "fp8"},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "muon": {"optimizer": "muon"},
    "accumulate": {"batch": 2, "accumulate": 4},
    "lora": {"lora": 4},
}


class Measured(NamedTuple):
    losses: list[float]
    state: int  # bytes of weights and optimizer state
    activations: int  # bytes at the peak, beyond the state
    seconds: float
    cube_flops: int
    phases: dict


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a run of preset tiny, for LoRA to begin with."""
    folder = tmp_path_factory.mktemp("base")
    run = Trainer(Settings(preset="tiny", batch=2, steps=2), text=TEXT)
    list(run.run())
    run.save(folder)
    return folder


@pytest.fixture(scope="module")
def measured(base):
    """Preset tiny on chip mini: the third step of each option."""
    torch.set_num_threads(1)

    def one(**changes) -> Measured:
        gc.collect()
        npu.use("mini")
        start = {"start": str(base)} if "lora" in changes else {}
        run = Trainer(Settings(**{"preset": "tiny", "steps": 3, "warmup": 2} | changes | start), "npu", TEXT)
        history = list(run.run(2))
        state = torch.npu.memory_allocated()
        torch.npu.reset_peak_memory_stats()
        with npu.ledger() as ledger:
            history += list(run.run())
        phases = ledger.table("phase")["cube_flops"].to_dict()
        return Measured(
            [step.loss for step in history], state, torch.npu.max_memory_allocated() - state,
            history[-1].seconds, sum(phases.values()), phases,
        )  # fmt: skip

    return {name: one(**changes) for name, changes in OPTIONS.items() if name != "fp16"}  # slow on many CPUs


def test_losses_agree(measured):
    plain = measured["float32"].losses
    for name, near in [("selective", 1e-6), ("full", 1e-6), ("accumulate", 1e-4), ("bf16", 4e-3)]:
        assert measured[name].losses == pytest.approx(plain, rel=near), name
    assert measured["fp8"].losses == pytest.approx(plain, rel=1e-2)


def test_recomputing_trades_time_for_memory(measured):
    none, selective, full = (measured[name] for name in ("float32", "selective", "full"))
    assert none.activations > 1.3 * selective.activations > 1.3 * 1.5 * full.activations
    assert none.seconds < selective.seconds < full.seconds < 1.35 * none.seconds
    assert none.state == selective.state == full.state
    assert selective.cube_flops == none.cube_flops and "recompute" not in none.phases
    tokens, unembedding, down = 8 * 128, 128 * 512, 4 * 352 * 128  # nobody needs what a layer's last product made
    assert full.phases["recompute"] == none.phases["forward"] - 2 * tokens * (unembedding + down)
    assert full.cube_flops == none.cube_flops + full.phases["recompute"]


def test_bf16_saves_memory_and_time(measured):
    plain, bf16, fp8 = (measured[name] for name in ("float32", "bf16", "fp8"))
    assert bf16.activations < 0.65 * plain.activations  # not half: residual stream and loss stay in float32
    assert bf16.seconds < 0.7 * plain.seconds < fp8.seconds  # to find and apply a scale takes five operators, not fused
    assert fp8.activations < bf16.activations
    assert plain.cube_flops == bf16.cube_flops == fp8.cube_flops
    assert plain.state == bf16.state == fp8.state  # master weights


def test_muon_has_one_number_of_state_per_weight(measured, base):
    model, _ = generate.restore(base)
    inner = sum(p.numel() for block in model.blocks for p in block.parameters() if p.dim() == 2)
    saved = measured["float32"].state - measured["muon"].state
    assert 4 * inner <= saved <= 4 * inner + 40 * 512  # and AdamW's step counts, in blocks of 512 bytes
    assert measured["muon"].losses != measured["float32"].losses and measured["float32"].phases["optimizer"] == 0
    shapes = [sorted(p.shape) for block in model.blocks for p in block.parameters() if p.dim() == 2]
    newton_schulz = sum(5 * (4 * n * n * m + 2 * n**3) for n, m in shapes)
    assert measured["muon"].phases["optimizer"] == newton_schulz


def test_accumulation_saves_memory(measured):
    assert measured["accumulate"].activations < 0.35 * measured["float32"].activations
    assert measured["accumulate"].seconds > measured["float32"].seconds


def test_lora_leaves_out_gradients_and_optimizer_state(measured, base):
    model, _ = generate.restore(base)
    weights = 4 * model.num_parameters()
    assert measured["float32"].state > 3 * weights
    assert weights < measured["lora"].state < 1.3 * weights
    assert measured["lora"].phases["backward"] < 0.8 * measured["float32"].phases["backward"]


# -- fp16 ---------------------------------------------------------------------------------------------------


def test_fp16_on_the_device_is_fp16_on_the_cpu():
    npu.use("mini")
    losses = [
        [step.loss for step in Trainer(Settings(**{**MICRO, "precision": "fp16"}), device, TEXT).run(3)]
        for device in ("cpu", "npu")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("scaling", [True, False])
def test_fp16_learns_nothing_without_loss_scaling(scaling):
    """Each pass is one of 65536, as in a step of 16 million tokens: its gradients are below 2⁻²⁴, and become zero."""
    settings = {**MICRO, "precision": "fp16", "loss_scaling": scaling, "weight_decay": 0.0, "learning_rate": 1e-2}
    run = Trainer(Settings(**settings), text=TEXT)
    losses, zeros = [], 0.0
    for _ in range(12):
        tokens, targets = run.batches.draw()
        with precision.autocast("fp16", run.device):
            loss = run.model(tokens, targets)
        run.scaler.scale(loss / 65536).backward()
        run.scaler.unscale_(run.optimizer)
        gradients = [65536 * p.grad for p in run.model.parameters()]
        zeros = sum(int((g == 0).sum()) for g in gradients) / run.model.num_parameters()
        for p, g in zip(run.model.parameters(), gradients):
            p.grad = g  # the other 65535 passes, alike
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        losses.append(loss.item())
    assert (losses[-1] < losses[0] - 0.5) == scaling
    assert (zeros < 0.01) if scaling else (zeros > 0.9)


def test_a_step_that_overflows_is_left_out_and_the_scale_halved():
    run = Trainer(Settings(**{**MICRO, "precision": "fp16"}), text=TEXT)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = [p.clone() for p in run.model.parameters()]
    run.step(1)
    assert run.scaler.get_scale() == 2.0**39 and all(a.equal(b) for a, b in zip(before, run.model.parameters()))


# -- checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    run = Trainer(Settings(**{**MICRO, "steps": 1}), text=TEXT)
    list(run.run())
    run.save(folder)
    return folder


@pytest.mark.parametrize("name", [*OPTIONS, "v3", "v3 muon", "fp16 muon"])
def test_resumed_runs_are_bit_equal(name, tmp_path, small):
    changes = {
        "lora": {"lora": 4, "start": str(small)},
        "v3": {"preset": "micro-v3"},
        "v3 muon": {"preset": "micro-v3", "optimizer": "muon", "recompute": "selective"},
        "fp16 muon": {"precision": "fp16", "optimizer": "muon"},
    }
    settings = Settings(**MICRO | changes.get(name, OPTIONS.get(name)))
    straight, first, second = (Trainer(settings, text=TEXT) for _ in range(3))
    list(straight.run())
    list(first.run(4))
    first.save(tmp_path)
    second.resume(tmp_path)
    list(second.run())
    assert second.losses == straight.losses and second.losses[-1] < second.losses[0]
    for (key, a), b in zip(straight.model.state_dict().items(), second.model.state_dict().values()):
        assert a.equal(b), key
    second.save(tmp_path)
    restored, _ = generate.restore(tmp_path)
    x, _ = second.batches.draw()
    if name not in ("fp8", "lora"):
        assert restored(x).equal(second.model(x))
    torch.testing.assert_close(restored(x), second.model(x), atol=0.3 if name == "fp8" else 1e-5, rtol=1e-4)


def test_checkpoints_from_before_the_options_still_resume(tmp_path, small):
    file = small / "checkpoint.json"
    record = json.loads(file.read_text())
    old = {key: value for key, value in record.items() if key != "scaler"}
    new = ("optimizer", "precision", "loss_scaling", "recompute", "start", "lora")
    old["settings"] = {key: value for key, value in record["settings"].items() if key not in new}
    old["config"] = {k: v for k, v in record["config"].items() if k not in ("latent", "experts", "mtp")}
    (tmp_path / record["tensors"]).write_bytes((small / record["tensors"]).read_bytes())
    (tmp_path / "checkpoint.json").write_text(json.dumps(old))
    run = Trainer(Settings(**MICRO), text=TEXT)
    run.resume(tmp_path)
    assert run.done == 1
    with pytest.raises(ValueError, match="has precision float32, this run bf16; give the same"):
        Trainer(Settings(**{**MICRO, "precision": "bf16"}), text=TEXT).resume(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "sgd"], "unknown optimizer 'sgd'; expected one of adamw, muon"),
        (["--precision", "int4"], "unknown precision 'int4'; expected one of float32, bf16, fp16, fp8"),
        (["--recompute", "half"], "unknown recompute 'half'; expected one of none, selective, full"),
        (["--no-loss-scaling"], "only fp16 has loss scaling to leave out, found precision float32"),
        (["--lora", "4"], "LoRA adds to a trained model; name the folder of its run with start"),
        (["--lora", "-1", "--start", "x"], "expected a LoRA rank of at least 1, or 0"),
        (["--start", "nowhere"], "no checkpoint in nowhere"),
    ],
)
def test_bad_options_are_told_in_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as left:
        train.main(["--out", str(tmp_path / "run"), *arguments])
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and message in error


def test_a_start_of_another_shape_or_a_rank_too_large_is_refused(small):
    with pytest.raises(ValueError, match="has a model of another shape; give its preset"):
        Trainer(Settings(preset="tiny", start=str(small)), text=TEXT)
    with pytest.raises(ValueError, match="expected a LoRA rank of 1 to 15 for .*, found 16"):
        Trainer(Settings(**MICRO, start=str(small), lora=16), text=TEXT)


def test_every_weight_is_in_one_group_of_one_optimizer():
    run = Trainer(Settings(**{**MICRO, "preset": "micro-v3"}), text=TEXT)
    for optimizer in ("adamw", "muon"):
        made = make_optimizer(run.model, dataclasses.replace(run.settings, optimizer=optimizer))
        found = [id(p) for group in made.param_groups for p in group["params"]]
        assert sorted(found) == sorted(id(p) for p in run.model.parameters())
