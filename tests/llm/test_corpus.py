"""Stories: the same bytes, the exact floor. Files: clear errors. Batches and rows: what they hold."""

import hashlib

import pytest
import torch

from course_lib.llm import corpus, tokenizer
from course_lib.llm.corpus import END, IGNORE, Batches, rows


@pytest.fixture(scope="module")
def stories():
    return corpus.stories(1000)


def test_stories_are_the_same_bytes_everywhere(stories):
    digest = hashlib.sha256((stories.train + stories.validation).encode()).hexdigest()
    assert digest == "9449304b5171191caf1fcea188c51b26b0f8f003238481571405ff784c277f5e"
    assert corpus.stories(100, seed=1).train != corpus.stories(100, seed=2).train
    assert corpus.stories(1000).train == stories.train


def test_split_and_alphabet(stories):
    assert stories.train.count(END) == 950 and stories.validation.count(END) == 50
    assert stories.train.isascii()
    words = {word.strip('.,!?"') for word in stories.train.split()}
    assert 100 <= len(words) <= 200


def test_names_are_consistent(stories):
    heroes = {"Lily", "Tom", "Mia", "Ben", "Anna", "Sam"}
    for story in stories.train.splitlines():
        assert len(heroes & {word.strip('.,!?"') for word in story.split()}) == 1


@pytest.mark.parametrize("name", ["char", "bpe300", "bpe512"])
def test_the_floor_agrees_with_the_grammars_own_loss_and_mean_length(name, stories):
    made = tokenizer.train(name, stories.train)
    expected = stories.grammar.expected_tokens(lambda text: len(made.encode(text)))
    assert float(expected) == pytest.approx(len(made.encode(stories.train)) / 950, rel=0.005)
    assert stories.entropy_per_token(made) == pytest.approx(stories.grammar.entropy / float(expected))
    assert stories.validation_surprise(made) == pytest.approx(stories.entropy_per_token(made), rel=0.05)


def test_entropy_of_text_without_a_grammar_is_unknown():
    text = corpus.split("x", "abc" * 100)
    assert text.entropy_per_token(tokenizer.train("char", "abc")) is None


def test_reference_is_the_text_of_this_python():
    from pydoc_data.topics import topics

    text = corpus.load("reference")
    assert len(text.train + text.validation) > 300_000
    assert topics["assert"] in text.train + text.validation


def test_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeffGrüße!\r\n".encode() * 40)
    text = corpus.load(str(file))
    assert (text.train + text.validation).startswith("Grüße!\n") and len(text.validation) == len(
        text.train + text.validation
    ) // 20


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty; expected UTF-8 text"),
        (b" \n\n ", "is empty; expected UTF-8 text"),
        (b"ab\0cd", "is binary .* expected UTF-8 text; convert it"),
        ("Grüße".encode("latin1"), r"is not UTF-8 \(byte 2\); expected UTF-8 text; convert it, for example by iconv"),
    ],
)
def test_unusable_files(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match="bad.txt: " + message):
        corpus.load(str(tmp_path / "bad.txt"))


def test_missing_file_folder_and_too_few(tmp_path):
    with pytest.raises(
        ValueError, match="no.txt: does not exist; expected a UTF-8 text file, or one of the corpora stories, reference"
    ):
        corpus.load(str(tmp_path / "no.txt"))
    with pytest.raises(ValueError, match="is a folder"):
        corpus.load(str(tmp_path))
    with pytest.raises(ValueError, match="at least 20 stories"):
        corpus.stories(5)
    with pytest.raises(
        ValueError, match="mine: is too short: 9 tokens, expected at least 10 for a context of 8; use more text"
    ):
        Batches("mine", torch.arange(9), 8, 4, 0)
    with pytest.raises(ValueError, match="batch of at least 1 row, found 0"):
        Batches("mine", torch.arange(90), 8, 0, 0)


def test_batches_are_seeded_windows():
    batches = Batches("count", torch.arange(1000), 8, 4, seed=3)
    x, y = batches.draw()
    assert x.shape == y.shape == (4, 8) and x.dtype == torch.int64
    assert (y == x + 1).all() and (x.diff() == 1).all()
    again = Batches("count", torch.arange(1000), 8, 4, seed=3)
    assert again.draw()[0].equal(x) and not batches.draw()[0].equal(x)
    assert Batches("count", torch.arange(10), 8, 64, seed=0).draw()[1].max() == 9  # the last token is reached


def test_batches_of_stories_begin_with_a_story(stories):
    made = tokenizer.train("bpe512", stories.train)
    tokens, end = stories.tokens("train", made), stories.end(made)
    x, y = Batches("stories", tokens, 128, 16, 0, end).draw()
    assert (x[:, 0] == end).all()
    openings = [made.decode(row.tolist()) for row in y]
    assert all(text.startswith(("Once upon", "There was", "This is")) for text in openings)


def test_rows_hold_each_target_once_and_whole_stories(stories):
    made = tokenizer.train("bpe512", stories.train)
    tokens, end = stories.tokens("validation", made), stories.end(made)
    x, y = rows(tokens, 128, end)
    assert y[y != IGNORE].equal(tokens[1:])
    assert (x[:, 0] == end).all()
    for inputs, targets in zip(x, y):
        counted = (targets != IGNORE).sum()
        assert targets[counted - 1] == end and inputs[1:counted].equal(targets[: counted - 1])


def test_rows_of_a_text_without_parts_and_of_a_story_too_long():
    x, y = rows(torch.arange(20), 8)
    assert y.tolist() == [[*range(1, 9)], [*range(9, 17)], [17, 18, 19] + 5 * [IGNORE]]
    assert x[:2].tolist() == [[*range(8)], [*range(8, 16)]]
    _, y = rows(torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 0]), 4, end=0)
    assert y.tolist() == [[1, 2, 3, 4], [5, 0, 1, 0]]
