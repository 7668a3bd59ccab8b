"""Gradient checkpointing: forget activations in forward, compute them again in backward (arXiv:1604.06174).

none        all that backward needs is kept
selective   of each layer the results of matrix products and of attention are kept; norms, rotary embedding and
            SwiGLU, which are cheap to compute and large to keep, run again (after arXiv:2205.05198)
full        of each layer only its input is kept; all of it runs again, a third of the step's products once more
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

HOW = ("none", "selective", "full")

_NAMES = (
    "mm addmm bmm linear _grouped_mm _scaled_mm _scaled_dot_product_flash_attention_for_cpu"
    " _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"
    " _scaled_dot_product_fused_attention_overrideable"
)
PRODUCTS = {getattr(torch.ops.aten, name).default for name in _NAMES.split() if hasattr(torch.ops.aten, name)}


def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what a product made; compute again what anything else did."""
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def check(how: str) -> None:
    """ValueError for a way that there is not."""
    if how not in HOW:
        raise ValueError(f"unknown recompute {how!r}; expected one of {', '.join(HOW)}")


def apply(model: nn.Module, how: str) -> None:
    """Let the layers of `model` run under gradient checkpointing from now on."""
    check(how)
    if how == "none":
        return
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if how == "selective" else {}
    for block in [*model.blocks, *([model.ahead.block] if model.ahead else [])]:
        block.forward = partial(run, block.forward, kept)


def run(forward: Any, kept: dict, *args: Any) -> torch.Tensor:
    """One layer, with its activations forgotten where gradients are recorded."""
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kept)
