"""A probabilistic grammar of tiny stories whose entropy is known exactly.

A story is made by independent draws: first the cast (hero, friend, …), one line each, which then holds for the whole
story; then one line for each rule that the text asks for. Every draw is made with integer weights. So the entropy of
the *draws* is a plain sum, by the chain rule:

    H = Σ over lists  E[draws from the list per story] · H(one draw),     H(weights w, sum W) = ln W − Σ w ln w / W.

The grammar is **unambiguous**: no two sequences of draws make the same text (`ambiguity` proves it by walking all pairs
of derivations side by side). Then text and draws determine each other, and H is also the entropy of the *text*, the
least nats per story that any model of it can reach on average. Were it ambiguous, H would be too large a floor.
"""

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

SLOT = re.compile(r"\{([a-z]+)(?:\.([a-z]+)(\+?))?\}")  # {rule}, {cast.form} or {cast.form+} with a capital
Part = tuple[str, ...]  # ("text", words) · ("rule", name) · ("cast", name, form, "" or "+")
Cast = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Choice:
    """One list of the grammar: integer weights and as many options; an option is text for a rule, forms for a cast."""

    name: str
    weights: tuple[int, ...]
    options: tuple

    @property
    def total(self) -> int:
        return sum(self.weights)

    @property
    def entropy(self) -> float:
        """Of one draw, in nats."""
        return math.log(self.total) - math.fsum(w * math.log(w) for w in self.weights) / self.total

    def probability(self, index: int) -> Fraction:
        return Fraction(self.weights[index], self.total)

    def draw(self, generator: random.Random) -> int:
        """Index of an option, by integers only: the same on every platform and Python version."""
        bits = self.total.bit_length()
        while (ticket := generator.getrandbits(bits)) >= self.total:
            pass
        for index, weight in enumerate(self.weights):
            if ticket < weight:
                return index
            ticket -= weight
        raise AssertionError("a ticket is below the sum of the weights")


def split(text: str) -> tuple[Part, ...]:
    """The parts of a line: literal text and slots in turn."""
    parts, end = [], 0
    for match in SLOT.finditer(text):
        if match.start() > end:
            parts.append(("text", text[end : match.start()]))
        name, form, capital = match.groups()
        parts.append(("cast", name, form, capital) if form else ("rule", name))
        end = match.end()
    return tuple(parts) + ((("text", text[end:]),) if end < len(text) else ())


class Grammar:
    """Lists by name: `cast` (drawn once per story) and `rules` (drawn at each mention), starting from rule `story`."""

    def __init__(self, cast: dict[str, Choice], rules: dict[str, Choice]) -> None:
        self.cast, self.rules = cast, rules
        self.parts = {name: tuple(split(text) for text in rule.options) for name, rule in rules.items()}

    @classmethod
    def read(cls, file: Path) -> "Grammar":
        """Read the format that data/corpus/stories.grammar explains; ValueError names file and line."""
        cast: dict[str, list] = {}
        rules: dict[str, list] = {}
        lines: list = []
        forms: list[str] | None = None
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            if heading := re.fullmatch(r"cast ([a-z]+): ([a-z ]+)", line):
                lines, forms = cast.setdefault(heading[1], []), heading[2].split()
            elif heading := re.fullmatch(r"rule ([a-z]+)", line):
                lines, forms = rules.setdefault(heading[1], []), None
            elif not (option := re.fullmatch(r"\s+([1-9]\d*) \| (.+)", line)):
                raise ValueError(f"{file}, line {number}: expected a heading or ' weight | text', found {line!r}")
            elif forms is None:
                lines.append((int(option[1]), option[2].strip()))
            else:
                values = [value.strip() for value in option[2].split("|")]
                if len(values) != len(forms):
                    raise ValueError(
                        f"{file}, line {number}: expected {len(forms)} values ({', '.join(forms)}), found {len(values)}"
                    )
                lines.append((int(option[1]), dict(zip(forms, values))))
        made = [{n: Choice(n, *map(tuple, zip(*options))) for n, options in group.items()} for group in (cast, rules)]
        grammar = cls(*made)
        if found := grammar.ambiguity():
            raise ValueError(f"{file}: ambiguous, so its entropy is not known: {found}")
        return grammar

    def sample(self, generator: random.Random) -> tuple[str, list[tuple[str, int]]]:
        """One story and its draws: (list, index of the option)."""
        draws = [(name, choice.draw(generator)) for name, choice in self.cast.items()]
        chosen = {name: self.cast[name].options[index] for name, index in draws}
        text, stack = [], [("rule", "story")]
        while stack:
            part = stack.pop()
            if part[0] == "rule":
                draws.append((part[1], self.rules[part[1]].draw(generator)))
                stack.extend(reversed(self.parts[part[1]][draws[-1][1]]))
            else:
                text.append(spell(part, chosen))
        return "".join(text), draws

    def probability(self, draws: list[tuple[str, int]]) -> Fraction:
        """Of these draws: the product of their probabilities, exactly."""
        return math.prod((self.choice(name).probability(index) for name, index in draws), start=Fraction(1))

    @cached_property
    def uses(self) -> dict[str, Fraction]:
        """Expected draws from each list per story: 1 for the cast; for a rule, summed over what mentions it."""
        uses = {name: Fraction(1) for name in self.cast} | {name: Fraction(0) for name in self.rules}
        self._add_uses("story", Fraction(1), uses)
        return uses

    def _add_uses(self, rule: str, times: Fraction, uses: dict[str, Fraction]) -> None:
        uses[rule] += times
        for index, parts in enumerate(self.parts[rule]):
            for part in parts:
                if part[0] == "rule":
                    self._add_uses(part[1], times * self.rules[rule].probability(index), uses)

    @cached_property
    def entropy(self) -> float:
        """H of one story, in nats."""
        return math.fsum(float(times) * self.choice(name).entropy for name, times in self.uses.items())

    def choice(self, name: str) -> Choice:
        """The list called `name`, of cast or rules."""
        return self.cast[name] if name in self.cast else self.rules[name]

    def expected_tokens(self, count: Callable[[str], int]) -> Fraction:
        """E[tokens per story], exactly, with the "\\n" that ends it; `count` tells how many tokens a piece of text has.

        It needs a tokenizer that never joins letters across the beginning of a word, that is before a space: then the
        tokens of a story are those of its chunks (" looked", " Lily.") added up, and expectation is additive.
        """
        return count("\n") + sum(weight * count(chunk) for chunk, weight in self.expected_chunks.items())

    @cached_property
    def expected_chunks(self) -> dict[str, Fraction]:
        """How often each chunk (a word, the space before it, the marks after it) occurs in a story on average, exactly.

        The text is walked from left to right with the probability of each beginning of the chunk that is still open. A
        chunk may mention one list of the cast, not two forms of the same: those would not be independent.
        """
        chunks: dict[str, Fraction] = {}
        for last, probability in self._close_chunks(("rule", "story"), {"": Fraction(1)}, chunks).items():
            chunks[last] = chunks.get(last, 0) + probability
        return chunks

    def _close_chunks(
        self, part: Part, opened: dict[str, Fraction], chunks: dict[str, Fraction]
    ) -> dict[str, Fraction]:
        """Add the chunks that `part` completes after each `opened` beginning to `chunks`; return the new beginnings."""
        after: dict[str, Fraction] = {}
        if part[0] == "rule":
            rule = self.rules[part[1]]
            for index, parts in enumerate(self.parts[part[1]]):
                inner = {text: p * rule.probability(index) for text, p in opened.items()}
                for step in parts:
                    inner = self._close_chunks(step, inner, chunks)
                for text, p in inner.items():
                    after[text] = after.get(text, 0) + p
            return after
        for word, chance in self._words(part).items():
            for text, p in opened.items():
                *closed, last = re.split("(?= )", text + word)
                for chunk in filter(None, closed):
                    chunks[chunk] = chunks.get(chunk, 0) + p * chance
                after[last] = after.get(last, 0) + p * chance
        return after

    def _words(self, part: Part) -> dict[str, Fraction]:
        """What a literal or a mention of the cast can say, with the probability of each."""
        if part[0] == "text":
            return {part[1]: Fraction(1)}
        words: dict[str, Fraction] = {}
        choice = self.cast[part[1]]
        for index, forms in enumerate(choice.options):
            word = spell(part, {part[1]: forms})
            words[word] = words.get(word, 0) + choice.probability(index)
        return words

    def derivations(self, text: str) -> Iterator[list[tuple[str, int]]]:
        """All sequences of draws that make `text`, found by trying; a story has one, any other text none."""
        todo = [((("rule", "story"), ()), text, {}, [])]
        while todo:
            stack, rest, bound, draws = todo.pop()
            if not stack:
                if not rest:
                    yield sorted(bound.items()) + draws
                continue
            part, stack = stack
            if part[0] == "rule":
                for index, parts in enumerate(self.parts[part[1]]):
                    todo.append((push(parts, stack), rest, bound, draws + [(part[1], index)]))
            elif part[0] == "text":
                if rest.startswith(part[1]):
                    todo.append((stack, rest[len(part[1]) :], bound, draws))
            else:
                for index, forms in enumerate(self.cast[part[1]].options):
                    word = spell(part, {part[1]: forms})
                    if bound.get(part[1], index) == index and rest.startswith(word):
                        todo.append((stack, rest[len(word) :], bound | {part[1]: index}, draws))

    def ambiguity(self) -> str | None:
        """Why the grammar may be ambiguous, or None if it is proved not to be.

        Two derivations of one text would start together, part at some draw, spell the same letters, and come together
        again, at the end of the story at the latest. So all pairs that have parted and spell the same are followed;
        none may come together. Each mention of the cast counts as free here, which only adds derivations; that the draw of
        the cast itself is known needs its first form, different in each line, in every story.
        """
        for name, choice in self.cast.items():
            if len({next(iter(forms.values())) for forms in choice.options}) < len(choice.options):
                return f"two lines of cast {name} have the same first form"
            if not self._always_mentions("story", name):
                return f"a story may leave out the first form of cast {name}"
        start = (("rule", "story"), ())
        seen, todo = {(start, start)}, [(start, start)]
        while todo:
            left, right = todo.pop()
            first, second = self._letters(left), self._letters(right)
            for i, (letter, after) in enumerate(first):
                for j, (other, beside) in enumerate(second):
                    if letter != other or (left == right and j < i):
                        continue
                    if after == beside and not (left == right and i == j):
                        return f"two derivations agree up to {letter!r}, before {after!r}"
                    if (after, beside) not in seen and letter:
                        seen.add((after, beside))
                        todo.append((after, beside))
        return None

    def _always_mentions(self, rule: str, name: str) -> bool:
        wanted = ("cast", name, next(iter(self.cast[name].options[0])))
        return all(
            any(part[:3] == wanted or part[0] == "rule" and self._always_mentions(part[1], name) for part in parts)
            for parts in self.parts[rule]
        )

    def _letters(self, stack: tuple) -> list[tuple[str, tuple]]:
        """Each way to spell one more letter from a stack of parts, and the stack after it; ("", ()) at the end."""
        if not stack:
            return [("", ())]
        part, rest = stack
        if part[0] == "rule":
            return [way for parts in self.parts[part[1]] for way in self._letters(push(parts, rest))]
        return [(word[0], push((("text", word[1:]),), rest) if word[1:] else rest) for word in self._words(part)]


def push(parts: tuple[Part, ...], stack: tuple) -> tuple:
    """A stack (first, (second, …)) with `parts` laid on it."""
    for part in reversed(parts):
        stack = (part, stack)
    return stack


def spell(part: Part, chosen: Cast) -> str:
    """The text of a literal or of a mention of the cast."""
    if part[0] == "text":
        return part[1]
    word = chosen[part[1]][part[2]]
    return word[0].upper() + word[1:] if part[3] else word
