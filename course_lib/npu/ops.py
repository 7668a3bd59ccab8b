"""Fused operators: one kernel where PyTorch's own decomposition would launch many.

So far attention. ``F.scaled_dot_product_attention`` on the device is flash attention: its memory grows
with T, not T², and above the diagonal nothing is computed. The rest follows with the fused operators of torch_npu.
"""

import torch

aten = torch.ops.aten


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """``F.scaled_dot_product_attention``: query (B, H, T, K), key and value (B, H or groups, S, K)."""
    fits = query.dim() == 4 and dropout_p == 0.0 and query.shape[-1] == value.shape[-1] and query.is_floating_point()
    if not fits:
        return _by_parts(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _by_parts(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """The same by matmul, softmax, matmul, where flash attention does not apply."""
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


def register() -> list[torch.library.Library]:
    """Take ``scaled_dot_product_attention`` over before PyTorch takes it apart."""
    library = torch.library.Library("aten", "IMPL")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        library.impl("scaled_dot_product_attention", attention, key)
    return [library]
