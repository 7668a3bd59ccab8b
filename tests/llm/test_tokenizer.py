"""Round trips, determinism, and that no token reaches across the beginning of a word."""

import hashlib
import json
import re

import pytest

from course_lib.llm import corpus, tokenizer

ODD = "naïve café — 日本語 🦆\t\r\n  two  spaces\0\x7f don't \n\n end "


@pytest.fixture(scope="module")
def text():
    return corpus.stories(400).train


@pytest.mark.parametrize("name", ["char", "bpe256", "bpe300", "bpe512"])
def test_round_trip_saved_and_loaded(name, text, tmp_path):
    made = tokenizer.train(name, text)
    made.save(tmp_path / "t.json")
    loaded = tokenizer.load(tmp_path / "t.json")
    tokens = made.encode(text)
    assert made.decode(tokens) == text and loaded.encode(text) == tokens and loaded.decode(tokens) == text
    assert (made.name, made.size) == (loaded.name, loaded.size)
    assert max(tokens) < made.size


def test_bpe_knows_any_text(text):
    made = tokenizer.train("bpe400", text)
    assert made.decode(made.encode(ODD)) == ODD
    assert made.encode("") == [] and made.decode([]) == ""


@pytest.mark.parametrize("name", ["char", "bpe300", "bpe512"])
def test_tokens_of_a_story_are_those_of_its_words_added_up(name, text):
    made = tokenizer.train(name, text)
    for story in text.splitlines()[:50]:
        assert len(made.encode(story)) == sum(len(made.encode(chunk)) for chunk in re.split("(?= )", story))
        assert len(made.encode(story + "\n" + story)) == 2 * len(made.encode(story)) + 1


def test_bpe_is_the_same_everywhere(text):
    """Joined pairs do not depend on the order in which words are counted, nor on the version of the library."""
    made = tokenizer.train("bpe512", text)
    assert made.size == 512
    assert hashlib.sha256(json.dumps(made.encode(text)).encode()).hexdigest()[:16] == "709e7359cb23a399"


def test_char_vocabulary_is_sorted():
    made = tokenizer.train("char", "banana\n")
    assert (made.characters, made.encode("ban"), made.size) == ("\nabn", [2, 1, 3], 4)
    with pytest.raises(ValueError, match="character 'x' is not among the 4"):
        made.encode("bax")


@pytest.mark.parametrize("name", ["word", "bpe", "bpe12", "bpe-512", ""])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="unknown tokenizer '.*'; expected char, or bpe"):
        tokenizer.train(name, "abc")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"kind": "bpe"}', '{"kind": "bpe", "name": "b", "tokenizer": {}}']
)
def test_load_of_something_else(content, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match="t.json: expected a tokenizer saved"):
        tokenizer.load(tmp_path / "t.json")
