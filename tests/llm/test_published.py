"""Published models as the course's program builds them have the parameters that the closed forms say."""

import pytest
import torch

from course_lib.llm.model import Transformer
from course_lib.llm.published import published
from course_lib.plan.layers import count
from course_lib.plan.model import load_model


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-70b", "llama-3-405b", "deepseek-v3"])
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(published(name, context=4096))
    paper = load_model(name)
    routers = sum(router.numel() for router in (p for n, p in model.named_buffers() if n.endswith("bias")))
    assert model.num_parameters() + routers == count(paper).total
    assert model.num_multiplying() == count(paper).multiplying


def test_multi_token_prediction() -> None:
    with torch.device("meta"):
        more = Transformer(published("deepseek-v3", context=4096, mtp=1)).num_parameters()
        plain = Transformer(published("deepseek-v3", context=4096)).num_parameters()
    assert abs(more - plain - count(load_model("deepseek-v3")).mtp) < 10_000  # its norms, and the bias of its router


@pytest.mark.parametrize(
    ("name", "words"),
    [("llama-9", "no model 'llama-9'.*llama-2-7b"), ("gpt2", "the kind 'gpt2'"), ("deepseek-v4-pro", "the kind")],
)
def test_wrong(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        published(name)
