"""Text to token numbers and back: one per character, or byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909).

Both are deterministic, and decode(encode(text)) == text. The byte-pair encoding starts from the 256 bytes, so it knows
any text, and it never joins letters across the beginning of a word (the pre-tokenizer of GPT-2), so that the number of
tokens of a text is the sum over its words.

    >>> tokenizer = train("bpe300", "a dog and a cat and a dog")
    >>> tokenizer.decode(tokenizer.encode("a big dog"))
    'a big dog'
"""

import json
import re
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

BYTES = 256  # the smallest byte-level vocabulary


class CharTokenizer:
    """One token per character of the text that it was made from, numbered in the order of Unicode."""

    name = "char"

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._number = {character: i for i, character in enumerate(characters)}
        self.size = len(characters)  # V

    def encode(self, text: str) -> list[int]:
        """Token numbers of `text`; ValueError names a character that the vocabulary lacks."""
        try:
            return [self._number[character] for character in text]
        except KeyError as error:
            raise ValueError(
                f"character {error.args[0]!r} is not among the {self.size} of this char tokenizer; use a bpe one"
            ) from None

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.characters[token] for token in tokens)

    def save(self, file: Path) -> None:
        _write(file, {"kind": "char", "characters": self.characters})


class BPETokenizer:
    """Byte-level byte-pair encoding, by the `tokenizers` library."""

    def __init__(self, inner: tokenizers.Tokenizer, name: str) -> None:
        self._inner, self.name = inner, name
        self.size = inner.get_vocab_size()  # V; less than was asked for where the text has too few pairs to join

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self._inner.decode(tokens, skip_special_tokens=False)

    def save(self, file: Path) -> None:
        _write(file, {"kind": "bpe", "name": self.name, "tokenizer": json.loads(self._inner.to_str())})


Tokenizer = CharTokenizer | BPETokenizer


def train(name: str, text: str) -> Tokenizer:
    """The tokenizer called "char" or "bpe<V>" (as "bpe512"), learned from `text`; ValueError for any other name."""
    if name == "char":
        return CharTokenizer("".join(sorted(set(text))))
    match = re.fullmatch(r"bpe(\d+)", name)
    if not match or int(match[1]) < BYTES:
        raise ValueError(
            f"unknown tokenizer {name!r}; expected char, or bpe and a vocabulary size of at least {BYTES}, as bpe512"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=int(match[1]), initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(text.splitlines(keepends=True), trainer)
    return BPETokenizer(inner, name)


def load(file: Path) -> Tokenizer:
    """A tokenizer that `save` wrote; ValueError if the file holds something else."""
    try:
        record = json.loads(Path(file).read_text(encoding="utf-8"))
        if record["kind"] == "char":
            return CharTokenizer(record["characters"])
        return BPETokenizer(tokenizers.Tokenizer.from_str(json.dumps(record["tokenizer"])), record["name"])
    except Exception as error:  # noqa: BLE001, for the library raises plain Exception
        raise ValueError(f"{file}: expected a tokenizer saved by course_lib.llm.tokenizer ({error})") from None


def _write(file: Path, record: dict) -> None:
    Path(file).write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
