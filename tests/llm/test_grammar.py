"""The entropy of the grammar, three ways: the sum over draws, all stories of a small one, and a Monte-Carlo mean."""

import math
import random
import re
import statistics
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest

from course_lib.llm.corpus import grammar
from course_lib.llm.grammar import Choice, Grammar, split

SMALL = """
cast hero: name he
 2 | Lily | she
 1 | Tom | he
 1 | Ben | he

cast pet: name
 3 | a cat
 1 | a dog

rule story
 3 | {hero.name} had {pet.name}. {end}
 1 | {pet.name+} came to {hero.name} {where}. {hero.he+} ran {where}. {end}

rule where
 1 | in
 2 | up the {hill}

rule hill
 1 | hill
 4 | old tree

rule end
 1 | The end.
 1 | {hero.he+} was glad.
"""


@pytest.fixture
def small(tmp_path):
    return write(tmp_path, SMALL)


def write(folder, text):
    file = folder / "small.grammar"
    file.write_text(text, encoding="utf-8")
    return Grammar.read(file)


def enumerate_stories(g: Grammar) -> dict[str, Fraction]:
    """Every story with its probability, by expanding text from left to right: an independent reading of the grammar."""
    stories: dict[str, Fraction] = Counter()
    for picks in product(*(range(len(c.weights)) for c in g.cast.values())):
        chosen = {name: c.options[i] for (name, c), i in zip(g.cast.items(), picks)}
        weight = math.prod((c.probability(i) for c, i in zip(g.cast.values(), picks)), start=Fraction(1))
        todo = [("{story}", weight)]
        while todo:
            text, p = todo.pop()
            if match := re.search(r"\{([a-z]+)\}", text):
                rule = g.rules[match[1]]
                todo += [(text.replace(match[0], o, 1), p * rule.probability(i)) for i, o in enumerate(rule.options)]
                continue
            for name, form, capital in re.findall(r"\{([a-z]+)\.([a-z]+)(\+?)\}", text):
                word = chosen[name][form]
                text = text.replace(f"{{{name}.{form}{capital}}}", word[0].upper() + word[1:] if capital else word)
            stories[text] += p
    return stories


def test_entropy_by_enumeration(small):
    stories = enumerate_stories(small)
    assert sum(stories.values()) == 1
    assert len(stories) == 3 * 2 * (2 + 3 * 3 * 2)  # unambiguous: as many texts as derivations
    assert small.entropy == pytest.approx(-sum(p * math.log(p) for p in stories.values()), abs=1e-12)


def test_each_story_has_one_derivation_with_its_probability(small):
    for text, p in enumerate_stories(small).items():
        (draws,) = small.derivations(text)
        assert small.probability(draws) == p
    assert not list(small.derivations("Lily had a cow. The end."))
    assert not list(small.derivations("Lily had a cat. He was glad."))


@pytest.mark.parametrize("pattern", [r"(?s).", r" ?\S+|\n", r" ?\w+|\W", r" ?\w{1,3}|\W"])
def test_expected_tokens_by_enumeration(small, pattern):
    """For tokens that do not reach across the beginning of a word: letters, words, marks, threes of letters."""
    count = lambda text: len(re.findall(pattern, text))
    assert small.expected_tokens(count) == sum(p * count(text + "\n") for text, p in enumerate_stories(small).items())


def test_uses_are_expected_numbers_of_draws(small):
    assert small.uses == {"hero": 1, "pet": 1, "story": 1, "where": Fraction(1, 2), "hill": Fraction(1, 3), "end": 1}


def test_entropy_of_one_draw():
    assert Choice("coin", (1, 1), ("a", "b")).entropy == pytest.approx(math.log(2))
    assert Choice("sure", (5,), ("a",)).entropy == pytest.approx(0)
    p = (Fraction(3, 4), Fraction(1, 4))
    assert Choice("bent", (3, 1), ("a", "b")).entropy == pytest.approx(-sum(x * math.log(x) for x in p))


def test_draws_follow_the_weights():
    choice, generator = Choice("die", (1, 2, 5), ("a", "b", "c")), random.Random(0)
    drawn = Counter(choice.draw(generator) for _ in range(8000))
    assert [abs(drawn[i] - expected) < 120 for i, expected in enumerate((1000, 2000, 5000))] == [True] * 3


def test_the_stories_entropy_agrees_with_a_monte_carlo_mean():
    g, generator = grammar(), random.Random(0)
    nats = [-math.log(g.probability(g.sample(generator)[1])) for _ in range(2000)]
    assert abs(statistics.mean(nats) - g.entropy) < 4 * statistics.stdev(nats) / math.sqrt(len(nats))


def test_the_stories_grammar_is_unambiguous_and_parses_its_stories():
    g, generator = grammar(), random.Random(1)
    assert g.ambiguity() is None
    for _ in range(100):
        text, draws = g.sample(generator)
        (parsed,) = g.derivations(text)
        assert sorted(parsed) == sorted(draws)


@pytest.mark.parametrize(
    "old, new",
    [
        (" 1 | The end.", " 1 | The end.\n 1 | The end."),  # the same line twice
        (" 1 | in\n", " 1 | in\n 1 | up the hill\n"),  # the same words by way of another rule
        (" 1 | Tom | he", " 1 | Tom | he\n 1 | Tom | his"),  # two heroes of one name
        ("{pet.name+} came to {hero.name}", "It came to {hero.name}"),  # the pet is drawn and not told
    ],
)
def test_an_ambiguous_grammar_is_refused(tmp_path, old, new):
    with pytest.raises(ValueError, match="small.grammar: ambiguous, so its entropy is not known"):
        write(tmp_path, SMALL.replace(old, new))


def test_ambiguity_across_slots_is_found(tmp_path):
    """a·ab and aa·b make the same text though each rule alone is clear."""
    with pytest.raises(ValueError, match="two derivations agree"):
        write(tmp_path, "rule story\n 1 | {x}{y}\nrule x\n 1 | a\n 1 | aa\nrule y\n 1 | ab\n 1 | b\n")


def test_errors_name_file_and_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"small.grammar, line 2: expected a heading or ' weight \| text', found ' x \| a'"
    ):
        write(tmp_path, "rule story\n x | a\n")
    with pytest.raises(ValueError, match=r"line 2: expected 2 values \(name, he\), found 1"):
        write(tmp_path, "cast hero: name he\n 1 | Lily\n")


def test_split():
    assert split("a {b} {c.d+}!") == (
        ("text", "a "),
        ("rule", "b"),
        ("text", " "),
        ("cast", "c", "d", "+"),
        ("text", "!"),
    )
