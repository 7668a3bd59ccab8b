"""The training loop: AdamW or Muon, warm-up and cosine, clipping, accumulation, and a clock on the device.

What a run may do otherwise has a file each: number formats (precision.py, fp8.py), gradient checkpointing
(recompute.py), Muon (muon.py), fine-tuning of small additions (lora.py).

>>> trainer = Trainer(Settings(preset="micro", tokenizer="char", steps=20))
>>> history = list(trainer.run())
>>> trainer.validate() > trainer.floor
True
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from course_lib.llm import checkpoint, corpus, fp8, generate, lora, precision, recompute, tokenizer
from course_lib.llm.config import preset
from course_lib.llm.corpus import END, Batches, Corpus
from course_lib.llm.device import mark, peak_flops, seconds_between
from course_lib.llm.model import Transformer
from course_lib.llm.muon import Muon

OPTIMIZERS = ("adamw", "muon")
VALIDATION_ROWS = 400  # the first rows of the validation text; stories have fewer


@dataclass(frozen=True)
class Settings:
    """All that decides a run's losses, apart from the corpus text itself."""

    preset: str = "tiny"
    corpus: str = "stories"
    tokenizer: str = "bpe512"
    steps: int = 300
    batch: int = 8  # rows of the preset's context in one forward pass
    accumulate: int = 1  # forward and backward passes per step
    learning_rate: float = 3e-3  # the highest, after the warm-up
    warmup: int = 20  # steps
    weight_decay: float = 0.1  # on matrices only
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of weights and of batches
    optimizer: str = "adamw"  # or muon, for the matrices of the layers
    precision: str = "float32"  # or bf16, fp16, fp8
    loss_scaling: bool = True  # in fp16; without it small gradients become zero
    recompute: str = "none"  # gradient checkpointing: selective or full
    start: str = ""  # folder of a run whose weights and tokenizer to begin with: fine-tuning
    lora: int = 0  # rank of the additions to be trained in place of the weights; 0: the weights

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, found {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"expected a learning rate above 0, found {self.learning_rate}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; expected one of {', '.join(OPTIMIZERS)}")
        precision.check(self.precision)
        recompute.check(self.recompute)
        if not self.loss_scaling and self.precision != "fp16":
            raise ValueError(f"only fp16 has loss scaling to leave out, found precision {self.precision}")
        if self.lora and not self.start:
            raise ValueError("LoRA adds to a trained model; name the folder of its run with start")
        if self.lora < 0:
            raise ValueError(f"expected a LoRA rank of at least 1, or 0 to train the weights, found {self.lora}")


@dataclass(frozen=True)
class Step:
    """One optimizer step: number from 1, mean training loss in nats per token, tokens, seconds on the device."""

    number: int
    loss: float
    tokens: int
    seconds: float


def rate(step: int, settings: Settings) -> float:
    """Learning rate of step 1, 2, …: linear from 0 in `warmup` steps, then half a cosine down to a tenth."""
    top, warmup = settings.learning_rate, min(settings.warmup, settings.steps)
    if step <= warmup:
        return top * step / warmup
    progress = (step - warmup) / (settings.steps - warmup)
    return top * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model: Transformer, settings: Settings) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' gains alone; fused, one operator for all weights of a group.

    With Muon the matrices of the layers have a group of their own; embedding and unembedding stay with AdamW.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in trained if p.dim() >= 2 and "embedding" not in name and settings.optimizer == "muon"]
    matrices = [p for _, p in trained if p.dim() >= 2 and not any(p is other for other in inner)]
    gains = [p for _, p in trained if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    if inner:
        groups.append({"params": inner, "weight_decay": settings.weight_decay, "momentum": 0.95})
        return Muon([group for group in groups if group["params"]], settings.learning_rate, betas=(0.9, 0.95))
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)


class Trainer:
    """Model, data and optimizer of one run, on one device.

    `text` takes a Corpus made elsewhere in place of the one that `settings.corpus` names.
    """

    def __init__(self, settings: Settings, device: torch.device | str = "cpu", text: Corpus | None = None) -> None:
        self.settings, self.device = settings, torch.device(device)
        preset(settings.preset, 1)  # an unknown preset is told before the tokenizer is trained
        self.corpus = text or corpus.load(settings.corpus)
        self.model = None
        if settings.start:
            self.model, self.tokenizer = generate.restore(Path(settings.start))
        else:
            self.tokenizer = tokenizer.train(settings.tokenizer, self.corpus.train + self.corpus.validation)
        self.config = preset(settings.preset, self.tokenizer.size)
        self.end = self.corpus.end(self.tokenizer)
        train = self.corpus.tokens("train", self.tokenizer)
        self.batches = Batches(self.corpus.name, train, self.config.context, settings.batch, settings.seed, self.end)
        held = self.corpus.tokens("validation", self.tokenizer)
        if len(held) < 2:
            raise ValueError(f"{self.corpus.name}: is too short to hold back a twentieth for validation; use more text")
        self.validation = corpus.rows(held, self.config.context, self.end)  # inputs, targets (rows, T)
        self.model = self.make_model(self.model).to(self.device)
        self.scaler = precision.make_scaler(settings.precision, settings.loss_scaling, self.device)
        self.optimizer = make_optimizer(self.model, settings)
        self.losses: list[float] = []  # of all steps so far, in nats per token

    def make_model(self, start: Transformer | None) -> Transformer:
        """The model of these settings, on the CPU: new, or with the weights of `start`."""
        settings = self.settings
        if start is not None and start.config != self.config:
            raise ValueError(f"the run in {settings.start} has a model of another shape; give its preset")
        model = start or Transformer(self.config, settings.seed)
        if settings.lora:
            lora.adapt(model, settings.lora, settings.seed)
        if settings.precision == "fp8":
            fp8.convert(model)
        recompute.apply(model, settings.recompute)
        return model

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.losses)

    @property
    def floor(self) -> float | None:
        """Entropy of the corpus in nats per token of this tokenizer; None if unknown."""
        return self.corpus.entropy_per_token(self.tokenizer)

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch * self.settings.accumulate * self.config.context

    def step(self, number: int) -> Tensor:
        """Make step `number`; its loss is a scalar on the device, which the host has not waited for."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(number, self.settings)
        losses = []
        for _ in range(self.settings.accumulate):
            tokens, targets = (rows.to(self.device) for rows in self.batches.draw())  # (B, T) each
            with precision.autocast(self.settings.precision, self.device):
                loss = self.model(tokens, targets) / self.settings.accumulate  # scalar
            aside = self.model.aside  # scalar
            whole = loss if aside is None else loss + aside / self.settings.accumulate  # scalar
            self.scaler.scale(whole).backward()
            losses.append(loss.detach())
        self.scaler.unscale_(self.optimizer)  # the scaler does nothing but in fp16
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        for experts in self.model.experts():
            experts.balance()
        return sum(losses)

    def run(self, steps: int | None = None, every: int = 10) -> Iterator[Step]:
        """Make `steps` steps (default: all that are left), and give each as a Step.

        The host reads losses and times once in `every` steps, so that it does not hold up the device in between.
        FloatingPointError where the loss is no longer a number.
        """
        last = self.settings.steps if steps is None else min(self.done + steps, self.settings.steps)
        while self.done < last:
            numbers = range(self.done + 1, min(self.done + every, last) + 1)
            marks, losses = [mark(self.device)], []
            for number in numbers:
                losses.append(self.step(number))
                marks.append(mark(self.device))
            seconds = [seconds_between(a, b) for a, b in pairwise(marks)]
            group = [Step(n, loss.item(), self.tokens_per_step, s) for n, loss, s in zip(numbers, losses, seconds)]
            self.losses += [step.loss for step in group]
            yield from group
            if not math.isfinite(self.losses[-1]):
                raise FloatingPointError(f"the loss is {self.losses[-1]} at step {self.done}; lower the learning rate")

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation text in nats per token; whole stories count, so the floor is its floor."""
        inputs, targets = (part[:VALIDATION_ROWS].split(self.settings.batch) for part in self.validation)  # (B, T) each
        total, count = 0.0, 0
        for x, y in zip(inputs, targets):
            counted = int((y != corpus.IGNORE).sum())
            with precision.autocast(self.settings.precision, self.device):
                loss = self.model(x.to(self.device), y.to(self.device))  # (B, T) each to a scalar
            total += counted * loss.item()
            count += counted
        return total / count

    def sample(self, prompt: str | None = None, temperature: float = 0.8, seed: int = 0) -> str:
        """Text by the model, up to the end of a story or of the context; it goes on from `prompt`."""
        opening = (END if self.corpus.grammar else self.corpus.train[:10]) if prompt is None else prompt
        if self.corpus.grammar and not opening.startswith(END):
            opening = END + opening  # in training each story comes after the end of another
        new = self.config.context - len(self.tokenizer.encode(opening))
        text = generate.write(self.model, self.tokenizer, opening, new, temperature, seed)
        return text.split(END)[1] if self.corpus.grammar else text

    @property
    def peak_dtype(self) -> str:
        """The dtype whose peak divides: the one that the products are in; for fp8 bfloat16, as DeepSeek-V3 has it."""
        return precision.PEAK[self.settings.precision]

    def mfu(self, tokens: int, seconds: float, convention: str = "6N+attention causal") -> float | None:
        """Model FLOPs utilisation, 0 to 1, by `convention` over the cube's peak in `peak_dtype`; None if unknown."""
        peak = peak_flops(self.device, self.peak_dtype)
        return None if peak is None else tokens * self.model.flops_per_token(convention) / (seconds * peak)

    def record(self) -> dict:
        """What a checkpoint says about the run, and what a resumed run must agree with (apart from `steps`)."""
        digest = hashlib.sha256((self.corpus.train + self.corpus.validation).encode()).hexdigest()
        return {"settings": asdict(self.settings), "config": asdict(self.config), "corpus_sha256": digest}

    def save(self, folder: Path) -> None:
        """Write checkpoint and tokenizer into `folder`."""
        tensors = checkpoint.pack(self.model, self.optimizer) | {"batches": self.batches.generator.get_state()}
        state = {"step": self.done, "losses": self.losses, "scaler": self.scaler.state_dict()}
        checkpoint.save(folder, self.record() | state, tensors)
        self.tokenizer.save(Path(folder) / "tokenizer.json")

    def resume(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`, bit for bit; ValueError if it belongs to a run with other settings."""
        record, tensors = checkpoint.load(folder)
        agree(folder, record, self.record())
        checkpoint.unpack(tensors, self.model, self.optimizer)
        self.batches.generator.set_state(tensors["batches"])
        self.scaler.load_state_dict(record.get("scaler", {}))
        self.losses = record["losses"]


def agree(folder: Path, old: dict, new: dict) -> None:
    """ValueError naming the first thing in which a checkpoint's record differs from the present run's."""
    defaults = asdict(Settings()) | {"latent": None, "experts": None, "mtp": 0}
    for part in ("settings", "config"):
        for key, value in new[part].items():
            found = old.get(part, {}).get(key, defaults.get(key))  # a checkpoint may be older than an option
            if key != "steps" and found != value:
                raise ValueError(
                    f"the checkpoint in {folder} has {key} {found}, this run {value}; give the same, or another --out"
                )
    if old.get("corpus_sha256") != new["corpus_sha256"]:
        name = new["settings"]["corpus"]
        raise ValueError(f"the checkpoint in {folder} was trained on another text of the corpus {name}; give the same")
