"""Train from the command line:

    python -m course_lib.llm.train --device npu --chip mini --preset tiny --corpus stories

Ctrl-C writes a checkpoint; the same command with --resume goes on from it.
"""

import argparse
import math
import signal
import sys
from pathlib import Path
from typing import NoReturn, Self

import torch
from tqdm import tqdm

from course_lib.llm import precision, recompute
from course_lib.llm.checkpoint import RECORD
from course_lib.llm.config import PRESETS
from course_lib.llm.device import clock, open_device
from course_lib.llm.trainer import OPTIMIZERS, Settings, Step, Trainer

__all__ = ["Settings", "Step", "Trainer", "main"]


CONVENTION = "6N+attention causal"


class Parser(argparse.ArgumentParser):
    """An argument parser that tells an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser() -> Parser:
    d = Settings()
    parser = Parser(prog="python -m course_lib.llm.train", description="Train a small language model.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or npu (default %(default)s)")
    parser.add_argument("--chip", help="model of the emulated npu, a name in data/chips")
    parser.add_argument("--preset", default=d.preset, help=f"{', '.join(PRESETS)} (default %(default)s)")
    parser.add_argument(
        "--corpus", default=d.corpus, help="stories, reference, or a UTF-8 text file (default %(default)s)"
    )
    parser.add_argument(
        "--tokenizer", default=d.tokenizer, help="char, or bpe and its vocabulary size (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=d.steps, help="steps in all, with those before --resume (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=d.batch, help="rows in one forward pass (default %(default)s)")
    parser.add_argument(
        "--accumulate", type=int, default=d.accumulate, help="forward passes per step (default %(default)s)"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=d.learning_rate, help="the highest (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=d.seed, help="of weights and batches (default %(default)s)")
    parser.add_argument("--optimizer", default=d.optimizer, help=f"{', '.join(OPTIMIZERS)} (default %(default)s)")
    parser.add_argument(
        "--precision", default=d.precision, help=f"{', '.join(precision.AUTOCAST)} (default %(default)s)"
    )
    parser.add_argument(
        "--no-loss-scaling", dest="loss_scaling", action="store_false", help="in fp16: leave small gradients to vanish"
    )
    parser.add_argument(
        "--recompute", default=d.recompute, help=f"activations: {', '.join(recompute.HOW)} (default %(default)s)"
    )
    parser.add_argument("--start", default="", help="folder of a run to begin with: its weights, and its tokenizer")
    parser.add_argument("--lora", type=int, default=0, help="rank of additions to train in place of the weights")
    parser.add_argument("--out", type=Path, help="folder for the checkpoint (default runs/PRESET-CORPUS)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser


def prepare(args: argparse.Namespace) -> Trainer:
    """The trainer that the arguments describe; ValueError for what cannot be."""
    if args.save_every < 1:
        raise ValueError(f"expected save-every of at least 1, found {args.save_every}")
    args.out = args.out or Path("runs") / f"{args.preset}-{Path(args.corpus).stem}"
    if not args.resume and (args.out / RECORD).exists():
        raise ValueError(f"{args.out} holds a checkpoint already; go on from it with --resume, or choose another --out")
    if args.resume and not (args.out / RECORD).exists():
        raise ValueError(
            f"no checkpoint to resume in {args.out}; expected {args.out / RECORD}; leave out --resume to begin"
        )
    fields = {name: getattr(args, name) for name in Settings.__dataclass_fields__ if hasattr(args, name)}
    settings = Settings(**fields)
    trainer = Trainer(settings, open_device(args.device, args.chip))
    if args.resume:
        trainer.resume(args.out)
        if trainer.done >= settings.steps:
            raise ValueError(
                f"the checkpoint in {args.out} has {trainer.done} steps already; expected --steps above that,"
                f" found {settings.steps}"
            )
    return trainer


def utilisation(trainer: Trainer, history: list[Step]) -> str:
    """Throughput and MFU over these steps, with clock, convention and peak."""
    tokens, seconds = sum(step.tokens for step in history), sum(step.seconds for step in history)
    mfu = trainer.mfu(tokens, seconds, CONVENTION)
    told = "MFU unknown" if mfu is None else f"MFU {mfu:.1%} ({CONVENTION}, {trainer.peak_dtype} cube peak)"
    return f"{tokens / seconds:,.0f} tokens/s ({clock(trainer.device)}) · {told}"


class Interrupt:
    """Within it the first Ctrl-C only sets `asked`, as steps in flight end before a checkpoint. The second stops."""

    def __enter__(self) -> Self:
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)


def train(trainer: Trainer, out: Path, save_every: int) -> list[Step]:
    """Run to the last step or to Ctrl-C, with a progress bar; the last checkpoint is of the last step made."""
    history: list[Step] = []
    saved, last = trainer.done, trainer.settings.steps
    with tqdm(total=last, initial=saved, unit="step") as bar, Interrupt() as interrupt:
        for step in trainer.run():
            history.append(step)
            bar.update()
            if step.number < trainer.done or not math.isfinite(step.loss):
                continue  # the state is that of step trainer.done, the last of a group that the host has read
            bar.set_postfix_str(f"loss {step.loss:.3f} · {utilisation(trainer, history[-10:])}")
            if trainer.done - saved >= save_every or trainer.done == last or interrupt.asked:
                trainer.save(out)
                saved = trainer.done
            if interrupt.asked:
                break
    return history


def report(trainer: Trainer, history: list[Step], out: Path) -> None:
    """Print what was reached."""
    loss, floor = trainer.validate(), trainer.floor
    print(
        f"steps       {trainer.done} of {trainer.tokens_per_step:,} tokens, "
        f"{trainer.model.num_parameters():,} parameters"
    )
    print(f"loss        {history[-1].loss:.3f} in training, {loss:.3f} in validation (nats per token)")
    if floor is None:
        print("floor       unknown: the entropy of this corpus is not known")
    else:
        print(f"floor       {floor:.3f} (entropy of the corpus); the validation loss is {loss - floor:.3f} above it")
    print(f"throughput  {utilisation(trainer, history)}")
    print(f"checkpoint  {out}")
    print(f"sample      {trainer.sample()}")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status, and leaves with status 2 and one line where an argument is wrong."""
    torch.set_num_threads(1)  # faster for models this small, and repeats to the bit
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        trainer = prepare(args)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    try:
        history = train(trainer, args.out, args.save_every)
    except FloatingPointError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    if trainer.done < trainer.settings.steps:
        print(
            f"interrupted after {trainer.done} steps; the same command with --resume goes on from {args.out}",
            file=sys.stderr,
        )
        return 130
    report(trainer, history, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
