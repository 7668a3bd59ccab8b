"""Text to train on: generated stories with a known entropy, real text that Python ships, or a file of your own.

    stories      tiny stories from data/corpus/stories.grammar; the same bytes everywhere; the entropy is known exactly
    reference    the Python language reference inside CPython (pydoc_data.topics); it differs between Python versions
    <file>       any UTF-8 text

A training curve on `stories` has a floor to approach: no model can have a lower loss than the entropy, on average.
"""

import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from course_lib import data
from course_lib.llm.grammar import Grammar
from course_lib.llm.tokenizer import Tokenizer

END = "\n"  # ends each story
IGNORE = -100  # a target that does not count, as torch.nn.functional.cross_entropy has it


@dataclass(frozen=True)
class Corpus:
    """Training text, validation text (the last twentieth), and the grammar that made them, where one did."""

    name: str
    train: str
    validation: str
    grammar: Grammar | None = None

    def entropy_per_token(self, tokenizer: Tokenizer) -> float | None:
        """The floor of the loss in nats per token: H(story) / E[tokens per story], but for rounding; None if unknown.

        By the law of large numbers no model's loss per token over whole stories can stay below it.
        """
        if self.grammar is None:
            return None
        return self.grammar.entropy / float(self.grammar.expected_tokens(lambda text: len(tokenizer.encode(text))))

    def validation_surprise(self, tokenizer: Tokenizer) -> float | None:
        """What the grammar itself, the best of all models, loses on this very validation text, in nats per token."""
        if self.grammar is None:
            return None
        nats = 0.0
        for story in self.validation.splitlines():
            probability = self.grammar.probability(next(self.grammar.derivations(story)))
            nats += math.log(probability.denominator) - math.log(probability.numerator)
        return nats / len(tokenizer.encode(self.validation))

    def tokens(self, part: str, tokenizer: Tokenizer) -> Tensor:
        """Part "train" or "validation" as int64 token numbers, (tokens,); stories get an END before the first."""
        text = getattr(self, part)
        return torch.tensor(tokenizer.encode(END + text if self.grammar else text), dtype=torch.int64)

    def end(self, tokenizer: Tokenizer) -> int | None:
        """The token that ends a story; None where the text has no such parts."""
        return tokenizer.encode(END)[0] if self.grammar else None


@cache
def grammar() -> Grammar:
    """The grammar of the stories."""
    return Grammar.read(data.path("corpus", "stories.grammar"))


def stories(count: int = 6000, seed: int = 0) -> Corpus:
    """`count` stories of about 310 characters, one a line; the same seed gives the same bytes on every platform."""
    if count < 20:
        raise ValueError(f"expected at least 20 stories, to split off a twentieth, found {count}")
    generator = random.Random(seed)
    lines = [grammar().sample(generator)[0] + END for _ in range(count)]
    held = count // 20
    return Corpus("stories", "".join(lines[:-held]), "".join(lines[-held:]), grammar())


def reference() -> Corpus:
    """The Python language reference as this Python has it, topics in alphabetical order. Another Python, other text."""
    from pydoc_data.topics import topics

    return split("reference", "\n".join(topics[name] for name in sorted(topics)))


def read(file: Path) -> Corpus:
    """A file of your own; ValueError names the file, what is wrong with it, and what to do."""
    file = Path(file)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"{file}: {what}; expected a UTF-8 text file, or one of the corpora stories, reference")
    raw = file.read_bytes()
    if not raw.strip():
        raise ValueError(f"{file}: is empty; expected UTF-8 text, some thousand characters of it; choose another file")
    if b"\0" in raw:
        raise ValueError(
            f"{file}: is binary (it has a zero byte); expected UTF-8 text; convert it, or choose another file"
        )
    try:
        return split(str(file), raw.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        hint = f"iconv -f latin1 -t utf-8 {file}"
        raise ValueError(
            f"{file}: is not UTF-8 (byte {error.start}); expected UTF-8 text; convert it, for example by {hint}"
        ) from None


def split(name: str, text: str) -> Corpus:
    """The last twentieth of `text` is for validation."""
    cut = len(text) - len(text) // 20
    return Corpus(name, text[:cut], text[cut:])


def load(name: str) -> Corpus:
    """The corpus "stories" or "reference", or else the file of that name."""
    return {"stories": stories, "reference": reference}.get(name, lambda: read(Path(name)))()


class Batches:
    """An endless, seeded supply of training batches, drawn on the CPU and so the same for every device.

    Each row is `context` tokens from a random place. In stories that place is the end of a story, so that a row begins
    with a story and the model sees all that the story's words depend on.
    """

    def __init__(self, name: str, tokens: Tensor, context: int, batch: int, seed: int, end: int | None = None) -> None:
        if batch < 1:
            raise ValueError(f"expected a batch of at least 1 row, found {batch}")
        check_length(name, tokens, context)
        self.tokens, self.context, self.batch = tokens, context, batch
        places = len(tokens) - context  # a row needs context + 1 tokens
        self.starts = torch.arange(places) if end is None else (tokens[:places] == end).nonzero().flatten()  # (places,)
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 (B, T) each, on the CPU; the targets are the inputs moved on by one token."""
        picked = self.starts[torch.randint(len(self.starts), (self.batch,), generator=self.generator)]  # (B,)
        rows = self.tokens[picked[:, None] + torch.arange(self.context + 1)]  # (B, T+1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # (B, T) each


def check_length(name: str, tokens: Tensor, context: int) -> None:
    """ValueError unless there are enough tokens for one row."""
    if len(tokens) < context + 2:
        raise ValueError(
            f"{name}: is too short: {len(tokens)} tokens, expected at least {context + 2} for a context of {context};"
            " use more text, or a preset with a smaller context"
        )


def rows(tokens: Tensor, context: int, end: int | None = None) -> tuple[Tensor, Tensor]:
    """All `tokens` but the first as targets, each once: inputs and targets (rows, context).

    A row is cut after the last whole story that fits, so that no story is judged without its beginning; what is left of
    the row has targets that do not count. Only a story longer than the context is cut in the middle.
    """
    spans, start = [], 0
    while start < len(tokens) - 1:
        stop = min(start + context, len(tokens) - 1)
        ends = (tokens[start + 1 : stop + 1] == end).nonzero() if end is not None else ()
        stop = start + 1 + int(ends[-1]) if len(ends) else stop
        spans.append((start, stop))
        start = stop
    inputs = torch.zeros(len(spans), context, dtype=torch.int64)
    targets = torch.full((len(spans), context), IGNORE)
    for row, (start, stop) in enumerate(spans):
        inputs[row, : stop - start] = tokens[start:stop]
        targets[row, : stop - start] = tokens[start + 1 : stop + 1]
    return inputs, targets
