"""A language model on paper: its shape, read from a file with HuggingFace's field names.

``data/models/<name>.json`` holds ``title``, ``source``, the model's ``config`` as its ``config.json`` has it, and the
``published`` figures that our own are compared with. A plain HuggingFace ``config.json`` can be read by its path, too.
A field that is missing or not known is an error: a field that is overlooked is a model of another size.

Letters: B batch, T tokens, S tokens in the context, D width, H heads, G key/value heads, K head width, F feed-forward
width, V vocabulary, E experts, L layers.

    python -m course_lib.plan llama-2-7b
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from course_lib import data

REQUIRED = object()
INDEXED = 4  # tokens per entry of V4's compressed sparse attention, the kind with an indexer and overlapping entries
NULLABLE = ("n_inner", "q_lora_rank", "head_dim")


class ModelError(ValueError):
    """A model's file, or a name for one, that cannot be used; says which file and key, and what to do."""


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values come from one latent per token."""

    query_rank: int | None  # of the queries' latent; None: queries come straight from the width
    rank: int  # of the latent of keys and values, which is what the cache holds
    nope: int  # width of a query or key head without rotation
    rope: int  # width with rotation; this part of a key is shared by all heads
    value: int  # width of a value head


@dataclass(frozen=True)
class Indexer:
    """The lightning indexer of DeepSeek-V3.2 and V4: small heads that choose ``most`` keys for each query."""

    heads: int
    width: int
    most: int


@dataclass(frozen=True)
class Compressed:
    """Attention of DeepSeek-V4: a window of tokens, and beyond it one entry for several tokens, key and value in one.

    ``ratios``: tokens per entry in each layer; 0: window only; 4: an indexer chooses entries (CSA); more: a query sees
    all entries (HCA).
    """

    query_rank: int
    rope: int
    output_groups: int
    output_rank: int
    window: int
    ratios: tuple[int, ...]


@dataclass(frozen=True)
class Experts:
    """Mixture of experts: ``active`` of ``routed`` experts and all ``shared`` ones, each of ``width`` F, per token."""

    routed: int
    active: int
    shared: int
    width: int
    first_dense: int  # that many layers in front have a dense feed-forward


@dataclass(frozen=True)
class Model:
    """The shape of a decoder-only transformer; letters as above."""

    name: str
    title: str
    source: str
    width: int  # D
    layers: int  # L
    heads: int  # H
    kv_heads: int  # G
    head_width: int  # K
    feed_forward: int  # F of dense layers; 0 where all have experts
    vocab_size: int  # V
    context: int  # the longest T
    tied: bool  # one table is embedding and unembedding
    gated: bool = (
        True  # SwiGLU with three matrices and RMSNorm; else GELU with two, LayerNorm, biases, learned positions
    )
    qkv_bias: bool = False
    latent: Latent | None = None
    indexer: Indexer | None = None
    compressed: Compressed | None = None
    experts: Experts | None = None
    mtp: int = 0  # depth of multi-token prediction: further layers, which inference may leave out
    streams: int = 1  # copies of the residual stream (hyper-connections)


# -- fields by model_type: name and default -----------------------------------------------------------------

_LLAMA = {
    "hidden_size": REQUIRED, "intermediate_size": REQUIRED, "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED, "num_key_value_heads": REQUIRED, "vocab_size": REQUIRED,
    "max_position_embeddings": REQUIRED, "tie_word_embeddings": False, "head_dim": None, "attention_bias": False,
}  # fmt: skip
_EXPERTS = {
    "n_routed_experts": REQUIRED, "num_experts_per_tok": REQUIRED, "n_shared_experts": REQUIRED,
    "moe_intermediate_size": REQUIRED, "num_nextn_predict_layers": 0,
}  # fmt: skip
_INDEXER = {"index_n_heads": REQUIRED, "index_head_dim": REQUIRED, "index_topk": REQUIRED}
_V3 = {
    **{key: default for key, default in _LLAMA.items() if key != "head_dim"}, **_EXPERTS,
    "q_lora_rank": None, "kv_lora_rank": REQUIRED, "qk_nope_head_dim": REQUIRED, "qk_rope_head_dim": REQUIRED,
    "v_head_dim": REQUIRED, "first_k_dense_replace": 0, "moe_layer_freq": 1,
}  # fmt: skip
_V4 = {
    **{key: default for key, default in _LLAMA.items() if key != "intermediate_size"}, **_EXPERTS, **_INDEXER,
    "head_dim": REQUIRED, "q_lora_rank": REQUIRED, "qk_rope_head_dim": REQUIRED, "o_groups": REQUIRED,
    "o_lora_rank": REQUIRED, "sliding_window": REQUIRED, "compress_ratios": REQUIRED, "hc_mult": REQUIRED,
}  # fmt: skip
FIELDS: dict[str, dict[str, object]] = {
    "gpt2": {
        "n_embd": REQUIRED, "n_layer": REQUIRED, "n_head": REQUIRED, "n_positions": REQUIRED, "vocab_size": REQUIRED,
        "n_inner": None, "tie_word_embeddings": True,
    },
    "llama": _LLAMA, "qwen2": _LLAMA, "deepseek_v3": _V3, "deepseek_v32": _V3 | _INDEXER, "deepseek_v4": _V4,
}  # fmt: skip
NO_SHAPE = {  # fields of a config.json that change neither a matrix nor the tokens it meets
    "architectures", "attn_pdrop", "resid_pdrop", "embd_pdrop", "activation_function", "layer_norm_epsilon", "n_ctx",
    "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act",
    "rms_norm_eps", "rope_theta", "rope_scaling", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "pretraining_tp", "mlp_bias", "n_group", "topk_group", "topk_method", "scoring_func", "norm_topk_prob",
    "routed_scaling_factor", "aux_loss_alpha", "seq_aux", "ep_size", "max_window_layers", "use_sliding_window",
    "swiglu_limit", "num_hash_layers", "compress_rope_theta", "hc_eps", "hc_sinkhorn_iters", "expert_dtype",
    "quantization_config", "auto_map", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "task_specific_params",
}  # fmt: skip


def models() -> list[str]:
    """Names of the models in ``data/models``, sorted."""
    return sorted(file.stem for file in data.path("models").glob("*.json"))


def load_model(name_or_path: str | Path) -> Model:
    """The model of this name, or in this .json file; raises ModelError naming file and key, or the names there are."""
    file = _file(name_or_path)
    raw = _read(file)
    config = raw.get("config", raw)
    if not isinstance(config, dict):
        raise ModelError(f'{file}: config: expected the fields of a config.json, {{"model_type": …}}, found {config!r}')
    kind = config.get("model_type")
    if kind not in FIELDS:
        raise ModelError(f"{file}: model_type: expected one of {', '.join(FIELDS)}, found {kind!r}; write which it is")
    fields = _fields(file, {key: value for key, value in config.items() if key != "model_type"}, FIELDS[kind])
    shape = _gpt2(fields) if kind == "gpt2" else _llama(file, kind, fields)
    source = raw.get("source") if "config" in raw else str(file)
    if not isinstance(source, str) or not source.strip():
        raise ModelError(f"{file}: source: missing; say where the shape comes from")
    return Model(name=file.stem, title=raw.get("title", file.stem), source=source, **shape)


def published(name_or_path: str | Path) -> dict[str, dict]:
    """Published figures of a model: {figure: {"printed": "671B", "source": …}}; with "missed" where ours differs."""
    return _read(_file(name_or_path)).get("published", {})


def _file(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, Path) or name_or_path.endswith(".json"):
        return Path(name_or_path)
    if name_or_path not in models():
        there = ", ".join(models())
        raise ModelError(f"no model named {name_or_path!r}; there are {there}, or give the path of a .json file")
    return data.path("models", f"{name_or_path}.json")


def _read(file: Path) -> dict:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); give a known name or the path of a .json file") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}: not valid JSON ({error}); correct that line") from None
    if not isinstance(raw, dict):
        raise ModelError(f'{file}: expected an object {{"model_type": …}}, found a {type(raw).__name__}')
    return raw


def _fields(file: Path, config: dict, known: dict[str, object]) -> dict:
    """All of the known fields, each with its value or default; raises ModelError for others, and for what cannot be."""
    for key in config.keys() - known.keys() - NO_SHAPE:
        near = difflib.get_close_matches(key, known, 1)
        meant = f"did you mean {near[0]}? Correct it" if near else "remove it, if it changes no shape"
        raise ModelError(f"{file}: {key}: unknown field; {meant}; known are {', '.join(known)}")
    missing = [key for key, default in known.items() if default is REQUIRED and key not in config]
    if missing:
        raise ModelError(f"{file}: {missing[0]}: missing; write it as the model's config.json on HuggingFace has it")
    return {key: _value(file, key, config.get(key, default), default) for key, default in known.items()}


def _value(file: Path, key: str, value: object, default: object) -> object:
    if key in NULLABLE and value is None:
        return None
    if isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif key == "compress_ratios":
        fits, wanted = (
            isinstance(value, list) and all(type(n) is int and n >= 0 for n in value),
            "a list of whole numbers",
        )
    else:
        least = 0 if default == 0 or key == "n_shared_experts" else 1
        fits, wanted = type(value) is int and value >= least, f"a whole number of at least {least}"
    if not fits:
        raise ModelError(f"{file}: {key}: expected {wanted}, found {value!r}; correct it")
    return value


# -- from fields to shapes ----------------------------------------------------------------------------------


def _gpt2(f: dict) -> dict:
    D, H = f["n_embd"], f["n_head"]
    return {
        "width": D, "layers": f["n_layer"], "heads": H, "kv_heads": H, "head_width": D // H,
        "feed_forward": f["n_inner"] or 4 * D, "vocab_size": f["vocab_size"], "context": f["n_positions"],
        "tied": f["tie_word_embeddings"], "gated": False, "qkv_bias": True,
    }  # fmt: skip


def _llama(file: Path, kind: str, f: dict) -> dict:
    D, H = f["hidden_size"], f["num_attention_heads"]
    if f["attention_bias"]:
        raise ModelError(f"{file}: attention_bias: biases of all four projections are not modelled; write false")
    if not f.get("head_dim") and "kv_lora_rank" not in f and D % H:
        raise ModelError(f"{file}: head_dim: missing, and hidden_size {D} is no multiple of {H} heads; write it")
    shape = {
        "width": D, "layers": f["num_hidden_layers"], "heads": H, "kv_heads": f["num_key_value_heads"],
        "head_width": f.get("head_dim") or D // H, "feed_forward": f.get("intermediate_size", 0),
        "vocab_size": f["vocab_size"],
        "context": f["max_position_embeddings"], "tied": f["tie_word_embeddings"], "qkv_bias": kind == "qwen2",
    }  # fmt: skip
    if H % shape["kv_heads"]:
        raise ModelError(f"{file}: num_key_value_heads: {H} heads are no multiple of {shape['kv_heads']}; correct it")
    return shape | (_deepseek(file, kind, f, shape) if kind.startswith("deepseek") else {})


def _deepseek(file: Path, kind: str, f: dict, shape: dict) -> dict:
    L = shape["layers"]
    if f.get("moe_layer_freq", 1) != 1:
        raise ModelError(
            f"{file}: moe_layer_freq: only 1 is modelled, experts in every layer; found {f['moe_layer_freq']}"
        )
    experts = Experts(
        f["n_routed_experts"], f["num_experts_per_tok"], f["n_shared_experts"], f["moe_intermediate_size"],
        f.get("first_k_dense_replace", 0),
    )  # fmt: skip
    more: dict = {"experts": experts, "mtp": f["num_nextn_predict_layers"]}
    if "index_topk" in f:
        more["indexer"] = Indexer(f["index_n_heads"], f["index_head_dim"], f["index_topk"])
    if kind != "deepseek_v4":
        latent = Latent(
            f["q_lora_rank"], f["kv_lora_rank"], f["qk_nope_head_dim"], f["qk_rope_head_dim"], f["v_head_dim"]
        )
        return more | {"latent": latent, "head_width": latent.nope + latent.rope}
    ratios = tuple(f["compress_ratios"])
    if len(ratios) < L:
        raise ModelError(f"{file}: compress_ratios: {len(ratios)} entries for {L} layers; write one for each")
    compressed = Compressed(
        f["q_lora_rank"], f["qk_rope_head_dim"], f["o_groups"], f["o_lora_rank"], f["sliding_window"], ratios[:L]
    )
    return more | {"compressed": compressed, "streams": f["hc_mult"]}
