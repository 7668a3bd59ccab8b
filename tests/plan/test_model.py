"""Model files: every one loads, says where it comes from, and what is wrong in one is named with file and key."""

import json

import pytest

from course_lib import plan
from course_lib.llm.config import PRESETS, preset
from course_lib.plan.__main__ import main

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("name", plan.models())
def test_every_model_loads(name: str) -> None:
    model = plan.load_model(name)
    assert model.name == name and len(model.source) > 10
    assert sum(layer.count for layer in plan.layers.layers(model)) == model.layers
    for figure in plan.published(name).values():
        assert figure["printed"] and figure["source"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_courses_presets_are_those_of_the_course(name: str) -> None:
    model, config = plan.load_model(f"course-{name}"), preset(name, 512)
    assert (model.width, model.layers, model.heads, model.kv_heads) == (
        config.width, config.layers, config.heads, config.kv_heads,
    )  # fmt: skip
    assert (model.feed_forward, model.vocab_size, model.context) == (config.feed_forward, 512, config.context)
    assert (model.tied, model.head_width) == (config.tied, config.head_width)


def written(tmp_path, **changes) -> str:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({key: value for key, value in (LLAMA | changes).items() if value != "gone"}))
    return str(file)


def test_a_config_json_of_huggingface_is_read_by_its_path(tmp_path) -> None:
    model = plan.load_model(written(tmp_path, torch_dtype="bfloat16", rope_theta=10000.0))
    assert (model.name, model.head_width, model.tied) == ("mine", 16, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "gone"}, r"mine\.json: hidden_size: missing; write it as"),
        ({"hiden_size": 3}, r"mine\.json: hiden_size: unknown field; did you mean hidden_size\? Correct it"),
        ({"moa": 3}, r"mine\.json: moa: unknown field; remove it, if it changes no shape"),
        ({"vocab_size": 0}, r"mine\.json: vocab_size: expected a whole number of at least 1, found 0"),
        ({"vocab_size": True}, "vocab_size: expected a whole number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, found 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 4 heads are no multiple of 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim: missing, and hidden_size 64 is no multiple"),
        ({"model_type": "bert"}, "model_type: expected one of gpt2, llama, .* found 'bert'"),
        ({"attention_bias": True}, "attention_bias: biases of all four projections are not modelled"),
        ({"config": 3}, "config: expected the fields of a config.json"),
        ({"config": LLAMA}, "source: missing; say where the shape comes from"),
    ],
)
def test_what_is_wrong_is_named(changes: dict, message: str, tmp_path) -> None:
    with pytest.raises(plan.ModelError, match=message):
        plan.load_model(written(tmp_path, **changes))


def test_an_unknown_name_names_those_there_are() -> None:
    with pytest.raises(plan.ModelError, match="no model named 'gpt5'; there are course-micro"):
        plan.load_model("gpt5")
    with pytest.raises(plan.ModelError, match="cannot be read"):
        plan.load_model("nowhere.json")


def test_deepseeks_own_refusals(tmp_path) -> None:
    file = plan.model._file("deepseek-v4-flash")
    config = json.loads(file.read_text())["config"]
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(config | {"compress_ratios": [4, 128]}))
    with pytest.raises(plan.ModelError, match="compress_ratios: 2 entries for 43 layers"):
        plan.load_model(mine)


def test_the_command_line() -> None:
    report = main(["llama-2-7b", "2048"])
    assert "6,738,415,616" in report and "sequences of 2048 tokens" in report
    assert main([]).split() == plan.models()
