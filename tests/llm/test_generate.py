"""Generation with and without a cache, greedy and drawn, one row and many."""

import pytest
import torch

from course_lib.llm import corpus, tokenizer
from course_lib.llm.config import preset
from course_lib.llm.generate import choose, generate, main, restore, write
from course_lib.llm.model import Transformer
from course_lib.llm.trainer import Settings, Trainer

PROMPT = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6], [1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model():
    return Transformer(preset("micro", 50), seed=1)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5, "seed": 3}])
def test_same_tokens_with_and_without_cache(model, how):
    cached, plain = generate(model, PROMPT, 40, **how), generate(model, PROMPT, 40, cached=False, **how)
    assert cached.equal(plain) and cached.shape == (3, 44) and cached[:, :4].equal(PROMPT)


def test_greedy_takes_the_likeliest_and_rows_do_not_mix(model):
    out = generate(model, PROMPT, 20)
    assert model(out)[:, 3:-1].argmax(-1).equal(out[:, 4:])
    for row in range(3):
        assert generate(model, PROMPT[row : row + 1], 20)[0].equal(out[row])


def test_seeded(model):
    first = generate(model, PROMPT, 20, temperature=1.0, seed=5)
    assert first.equal(generate(model, PROMPT, 20, temperature=1.0, seed=5))
    assert not first.equal(generate(model, PROMPT, 20, temperature=1.0, seed=6))


def test_draws_follow_the_softmax_and_top_k_bounds_them():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(20_000, 4)
    drawn = choose(logits, 0.5, None, torch.Generator().manual_seed(0)).flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(drawn, (logits[0] / 0.5).softmax(0), atol=0.01, rtol=0)
    assert set(choose(logits, 2.0, 2, torch.Generator()).flatten().tolist()) == {1, 2}
    assert choose(logits, 1.0, 1, torch.Generator()).equal(choose(logits, 0.0, None, torch.Generator()))


def test_up_to_the_context_and_not_beyond(model):
    assert generate(model, PROMPT, 60).shape == (3, 64)
    with pytest.raises(ValueError, match="prompt of 4 and 61 new tokens exceed the context of 64 tokens"):
        generate(model, PROMPT, 61)


@pytest.mark.parametrize(
    "how, message",
    [({"temperature": -1.0}, "temperature of 0"), ({"temperature": 1.0, "top_k": 0}, "top_k of at least 1")],
)
def test_bad_arguments(model, how, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, 2, **how)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, PROMPT[:, :0], 2)


def test_write_continues_text(model):
    letters = tokenizer.train("char", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX")
    assert letters.size == 50
    text = write(model, letters, "abc", 10)
    assert text.startswith("abc") and len(text) == 13


def test_text_from_a_checkpoint(tmp_path, capsys):
    run = Trainer(Settings(preset="micro", tokenizer="bpe300", steps=2), text=corpus.stories(100))
    list(run.run())
    run.save(tmp_path)
    restored, words = restore(tmp_path)
    assert restored(PROMPT).equal(run.model(PROMPT)) and words.encode("Once") == run.tokenizer.encode("Once")
    assert main([str(tmp_path), "--prompt", "Once", "--tokens", "5"]) == 0
    assert capsys.readouterr().out == write(run.model, run.tokenizer, "Once", 5, 0.8).strip() + "\n"
    assert main([str(tmp_path), "--tokens", "5", "--int8"]) == 0 and capsys.readouterr().out
    for arguments, message in [
        (["nowhere"], "no checkpoint in nowhere"),
        ([str(tmp_path), "--tokens", "99"], "exceed the context of 64"),
    ]:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.count("\n") == 1 and message in error
