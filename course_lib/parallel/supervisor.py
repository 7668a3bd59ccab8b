"""A supervisor: it runs the trainer on several ranks, and when one of them dies starts all again from the checkpoint.

Nothing else is needed, because the trainer's checkpoints are exact and atomic: a run whose ranks were killed ends with
the weights of the undisturbed run, to the bit. ``elastic`` goes on with fewer ranks and the same global batch; then sums
are made in another order, and weights agree to rounding errors only.

    kills = random_kills(steps=30, ranks=4, number=3, seed=0)
    outcome = supervise(Settings(preset="micro", steps=30), folder, ranks=4, kills=kills)
    print("\\n".join(map(str, outcome.events)))
"""

import hashlib
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from course_lib.llm import checkpoint
from course_lib.llm.corpus import Batches, Corpus
from course_lib.llm.trainer import Settings, Trainer
from course_lib.parallel import RankError, data, launch

MOMENTS = ("step", "save")
PATIENCE = 3  # failures in a row without a new checkpoint; then it is no accident


@dataclass(frozen=True)
class Kill:
    """A rank dies in a step (from 1), between its backward and its update; or rank 0 while it saves after that step."""

    step: int
    rank: int
    moment: str = "step"

    def __post_init__(self) -> None:
        if self.moment not in MOMENTS:
            raise ValueError(f"moment is {self.moment!r}; use one of {', '.join(MOMENTS)}")
        if self.moment == "save" and self.rank:
            raise ValueError(f"rank {self.rank} saves nothing; only rank 0 can be killed while it does")


@dataclass(frozen=True)
class Event:
    """What the supervisor saw: started, killed, failed (by itself) or finished, in which step, on how many ranks."""

    kind: str
    step: int  # steps that are done and safe; of a planned kill the step in which it struck
    ranks: int
    rank: int | None = None  # the one that died
    moment: str = ""

    def __str__(self) -> str:
        if self.kind == "started":
            return f"started   {self.ranks} ranks after step {self.step}"
        if self.kind == "finished":
            return f"finished  {self.ranks} ranks after step {self.step}"
        where = {"step": f"in step {self.step}", "save": f"while it saved step {self.step}"}
        return f"{self.kind:9} rank {self.rank} {where.get(self.moment, f'after step {self.step}')}"


@dataclass(frozen=True)
class Outcome:
    """Mean losses of all steps, final weights by name (on the cpu), and what happened on the way."""

    losses: tuple[float, ...]
    weights: dict[str, Tensor]
    events: tuple[Event, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the weights: equal where all bits are."""
        return digest(self.weights)


def random_kills(steps: int, ranks: int, number: int, seed: int = 0) -> tuple[Kill, ...]:
    """Kills of random ranks in different random steps, in order; the same on every machine."""
    if not 0 <= number < steps:
        raise ValueError(f"{number} kills in {steps} steps; at most one in each, and none in the first")
    draw = random.Random(seed)
    return tuple(Kill(step, draw.randrange(ranks)) for step in sorted(draw.sample(range(2, steps + 1), number)))


def supervise(
    settings: Settings, folder: Path, ranks: int = 4, kills: Sequence[Kill] = (), every: int = 5,
    elastic: bool = False, text: Corpus | None = None, device: str = "cpu", system: str | None = None,
    timeout: float = 120,
) -> Outcome:  # fmt: skip
    """Train to the last step of ``settings``, whatever happens to its ranks; ``settings.batch`` is that of all ranks.

    A checkpoint is written into ``folder`` after each ``every`` steps; a folder that holds one is gone on from. RankError
    where ranks fail `PATIENCE` times in a row without a new checkpoint, ValueError for what cannot be.
    """
    _check(settings, ranks, kills, every)
    events, planned, futile = [], sorted(kills, key=lambda kill: kill.step), 0
    while True:
        before = done(folder)
        events.append(Event("started", before, ranks))
        kill = planned[0] if planned else None
        try:
            results = launch(
                train, settings, str(folder), every, kill, text, device, ranks=ranks, device=device, system=system,
                timeout=timeout,
            )  # fmt: skip
        except RankError as error:
            if kill and error.rank == kill.rank and "SIGKILL" in str(error):
                events.append(Event("killed", kill.step, ranks, kill.rank, kill.moment))
                planned.pop(0)
            else:
                events.append(Event("failed", done(folder), ranks, error.rank))
                futile = futile + 1 if done(folder) == before else 1
                if futile >= PATIENCE:
                    raise
            ranks = fewer(ranks, settings.batch) if elastic else ranks
            continue
        losses, weights, _ = results[0]
        if len({found for _, _, found in results}) > 1:
            raise RuntimeError("the ranks ended with different weights; one of them computes wrongly")
        events.append(Event("finished", len(losses), ranks))
        return Outcome(tuple(losses), weights, tuple(events))


def done(folder: Path) -> int:
    """Steps that are safe in the checkpoint of ``folder``."""
    return checkpoint.load(folder)[0]["step"] if (Path(folder) / checkpoint.RECORD).is_file() else 0


def fewer(ranks: int, batch: int) -> int:
    """The largest number of ranks below ``ranks`` that divides the batch; one rank stays one."""
    return max((n for n in range(1, ranks) if batch % n == 0), default=1)


def digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names and bits, in the order of names."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _check(settings: Settings, ranks: int, kills: Sequence[Kill], every: int) -> None:
    if every < 1:
        raise ValueError(f"a checkpoint after every {every} steps; expected at least 1")
    if ranks < 1 or settings.batch % ranks:
        raise ValueError(f"a batch of {settings.batch} rows does not divide among {ranks} ranks")
    for kill in kills:
        if not (1 <= kill.step <= settings.steps and 0 <= kill.rank < ranks):
            raise ValueError(f"{kill} never happens in {settings.steps} steps on {ranks} ranks")
        if kill.moment == "save" and kill.step % every and kill.step != settings.steps:
            raise ValueError(f"{kill}: nothing is saved after step {kill.step}, but after every {every}")


# -- on each rank -----------------------------------------------------------------------------------------------


def train(
    settings: Settings, folder: str, every: int, kill: Kill | None, text: Corpus | None, device: str
) -> tuple[list[float], dict[str, Tensor], str]:  # fmt: skip
    """What a rank does: resume, train, save; and die where ``kill`` says so. Gives losses, rank 0's weights, a digest."""
    trainer, rank = Trainer(settings, device, text), dist.get_rank()
    if trainer.model.experts():
        raise ValueError(
            "the supervisor averages gradients only; experts also balance their loads: take a dense preset"
        )
    share(trainer)
    if (Path(folder) / checkpoint.RECORD).is_file():
        trainer.resume(Path(folder))
    if kill and kill.rank == rank:
        arm(trainer, kill)
    while trainer.done < settings.steps:
        list(trainer.run(1, every=1))
        if rank == 0 and (trainer.done % every == 0 or trainer.done == settings.steps):
            trainer.save(Path(folder))
    weights = {name: tensor.detach().cpu() for name, tensor in checkpoint.kept(trainer.model).items()}
    return trainer.losses, weights if rank == 0 else {}, digest(weights)


@dataclass
class Share:
    """This rank's rows of each batch that all ranks draw alike."""

    whole: Batches

    @property
    def generator(self) -> torch.Generator:
        return self.whole.generator

    def draw(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B/P, T) each."""
        return tuple(data.share(rows) for rows in self.whole.draw())


def share(trainer: Trainer) -> None:
    """Naive data parallelism within the trainer's own step: its rows are shared, each gradient and loss averaged."""
    trainer.batches = Share(trainer.batches)
    for p in trainer.model.parameters():
        p.register_hook(data.mean)
    alone = trainer.step
    trainer.step = lambda number: data.mean(alone(number))


def arm(trainer: Trainer, kill: Kill) -> None:
    """Have this process die in the given step, without a word, as of a power cut."""
    replace = checkpoint.replace

    def before_update(*_: object) -> None:
        if trainer.done + 1 == kill.step:
            die()

    def cut_off(file: Path, content: bytes) -> None:
        if trainer.done == kill.step and Path(file).name == checkpoint.RECORD:
            die()  # the tensors are written, the commit is not
        replace(file, content)

    if kill.moment == "step":
        trainer.optimizer.register_step_pre_hook(before_update)
    else:
        checkpoint.replace = cut_off


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
