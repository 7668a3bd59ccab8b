"""Published models as the course's own program builds them: the shape from ``data/models``, all else as in `Config`.

    >>> published("llama-3-70b").width
    8192

Built in shape-only mode such a model needs no memory and no time: ``with torch.device("npu"): Transformer(published(…))``
after ``npu.use("ascend-910b2", numerics=False)``.
"""

import json

from course_lib import data
from course_lib.llm.config import Config, Experts, Latent

KINDS = ("llama", "deepseek_v3")


def published(name: str, context: int | None = None, mtp: int = 0) -> Config:
    """The Config of a model in data/models; ``context`` T, by default its own; ``mtp``: layers that predict further tokens.

    ValueError where there is no such model, or the course's program cannot build one of its kind.
    """
    files = {file.stem: file for file in data.path("models").glob("*.json")}
    if name not in files:
        raise ValueError(f"no model {name!r} in data/models; there are {', '.join(sorted(files))}")
    c = json.loads(files[name].read_text(encoding="utf-8"))["config"]
    if c["model_type"] not in KINDS:
        raise ValueError(
            f"{name} is of the kind {c['model_type']!r}; the course's program builds {' and '.join(KINDS)}"
        )
    latent = experts = None
    if c["model_type"] == "deepseek_v3":
        latent = Latent(
            c["q_lora_rank"], c["kv_lora_rank"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        )
        experts = Experts(
            c["n_routed_experts"], c["num_experts_per_tok"], c["n_shared_experts"], c["moe_intermediate_size"], c["first_k_dense_replace"],
            c.get("n_group", 1), c.get("topk_group", 1),
        )  # fmt: skip
    return Config(
        vocab_size=c["vocab_size"], context=context or c["max_position_embeddings"], width=c["hidden_size"],
        layers=c["num_hidden_layers"], heads=c["num_attention_heads"], kv_heads=c["num_key_value_heads"],
        feed_forward=c["intermediate_size"], tied=c.get("tie_word_embeddings", False), latent=latent, experts=experts, mtp=mtp,
    )  # fmt: skip
