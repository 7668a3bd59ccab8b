"""Fused operators: one kernel where PyTorch's own decomposition would launch many.

* ``F.scaled_dot_product_attention`` is flash attention: its memory grows with T, not T², and nothing is
  computed above the diagonal. See fused_attention.py for what PyTorch's kernel cannot do.
* ``F.rms_norm`` is one kernel forward and one backward, ``npu_rms_norm`` on a real NPU.
* ``F.linear`` stays whole, see linear.py.
* The cells of LSTM and GRU are one kernel a step besides their products.
* SiLU's backward is one kernel; without a word from the device PyTorch would take it apart.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """``F.scaled_dot_product_attention``: query (B, H, T, K), key and value (B, H or groups, S, K).

    PyTorch's flash kernel where it applies, else ``npu_fusion_attention``: dropout, values of another width, three or
    five dimensions, any strides, any mask. Without either, unfused: a mask with a gradient, batches to be expanded.
    """
    if not _flash_fits(query, key, value, attn_mask, is_causal, enable_gqa):
        return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    plain = query.dim() == 4 and dropout_p == 0.0 and query.shape[-1] == value.shape[-1]
    if plain and (attn_mask is None or attn_mask.dim() in (2, 4)) and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    from course_lib.npu import fused_attention

    return fused_attention.scaled_dot_product(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _flash_fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, grouped: bool) -> bool:
    """Whether scores need not be kept; everything that PyTorch refuses is left to the unfused form to refuse."""
    if q.dim() < 3 or not q.dim() == k.dim() == v.dim() or not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        return False
    if mask is not None and (causal or mask.requires_grad or (mask.dtype not in (torch.bool, q.dtype))):
        return False
    (*batch, heads, T, K), (*batch_k, groups, S, K_k), (*batch_v, groups_v, S_v, _) = q.shape, k.shape, v.shape
    same = batch == batch_k == batch_v and groups == groups_v and S == S_v and K == K_k
    return same and T > 0 and S > 0 and (heads == groups or (grouped and groups > 0 and heads % groups == 0)) and q.numel() > 0 and v.numel() > 0


def rms_norm(x, normalized_shape, weight=None, eps=None):
    """``F.rms_norm`` over the last dimensions of x (…, D), by the fused kernel."""
    return aten._fused_rms_norm(x, normalized_shape, weight, eps)[0]


# -- kernels on host tensors, where the CPU has none of its own ------------------------------------


def rms_norm_forward(x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """(y, 1/rms) of x (…, D): y = x / sqrt(mean(x²) + ε) · weight, in float32 inside."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    inverse = wide.square().mean(dims, keepdim=True).add_(eps).rsqrt_()
    y = wide * inverse
    return (y if weight is None else y.mul_(weight)).to(x.dtype), inverse


def rms_norm_backward(grad: Tensor, x: Tensor, normalized_shape: list[int], inverse: Tensor, weight: Tensor | None, output_mask: list[bool]) -> tuple:
    """Gradients of x and weight. With n = x/rms and g = grad·weight: dx = (g − n·mean(g·n)) / rms, dweight = Σ grad·n."""
    dims = tuple(range(x.dim() - len(normalized_shape), x.dim()))
    rows = tuple(range(x.dim() - len(normalized_shape)))
    wide = inverse.dtype
    normed = x.to(wide) * inverse
    g = grad.to(wide)
    grad_weight = None
    if output_mask[1] and weight is not None:
        product = g * normed
        grad_weight = (product.sum(rows) if rows else product).to(weight.dtype)
    if not output_mask[0]:
        return None, grad_weight
    g = g if weight is None else g * weight
    projection = (g * normed).mean(dims, keepdim=True)
    return g.sub(normed.mul_(projection)).mul_(inverse).to(x.dtype), grad_weight


def _gates(of_input: Tensor, of_hidden: Tensor, input_bias: Tensor | None, hidden_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two products of a recurrent cell with their biases, if it has any."""
    if input_bias is None:
        return of_input, of_hidden
    return of_input + input_bias, of_hidden + hidden_bias


def lstm_cell(of_input: Tensor, of_hidden: Tensor, cx: Tensor, input_bias: Tensor | None = None, hidden_bias: Tensor | None = None) -> tuple:
    """(hy, cy, gates) of an LSTM step; the products are (B, 4·H), the gates input, forget, cell, output."""
    a, b = _gates(of_input, of_hidden, input_bias, hidden_bias)
    i, f, g, o = (a + b).chunk(4, 1)  # (B, H) each
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def lstm_cell_backward(grad_hy: Tensor | None, grad_cy: Tensor | None, cx: Tensor, cy: Tensor, gates: Tensor, has_bias: bool) -> tuple:
    """(gradient of the products, of cx, of each bias)."""
    i, f, g, o = gates.chunk(4, 1)
    grad_hy = torch.zeros_like(cy) if grad_hy is None else grad_hy
    tanh = cy.tanh()
    dc = grad_hy * o * (1 - tanh * tanh)
    dc = dc if grad_cy is None else dc + grad_cy
    products = torch.cat([dc * g * i * (1 - i), dc * cx * f * (1 - f), dc * i * (1 - g * g), grad_hy * tanh * o * (1 - o)], 1)
    return products, dc * f, products.sum(0) if has_bias else None


def gru_cell(of_input: Tensor, of_hidden: Tensor, hx: Tensor, input_bias: Tensor | None = None, hidden_bias: Tensor | None = None) -> tuple:
    """(hy, what backward needs) of a GRU step; the products are (B, 3·H), the gates reset, update, new."""
    a, b = _gates(of_input, of_hidden, input_bias, hidden_bias)
    (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)  # (B, H) each
    r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
    n = (an + r * bn).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, bn], 1)


def gru_cell_backward(grad: Tensor, saved: Tensor, has_bias: bool) -> tuple:
    """Gradients of the two products, of hx, and of the two biases."""
    r, z, n, hx, bn = saved.chunk(5, 1)
    dn = grad * (1 - z) * (1 - n * n)
    dz, dr = grad * (hx - n) * z * (1 - z), dn * bn * r * (1 - r)
    of_input, of_hidden = torch.cat([dr, dz, dn], 1), torch.cat([dr, dz, dn * r], 1)
    return of_input, of_hidden, grad * z, of_input.sum(0) if has_bias else None, of_hidden.sum(0) if has_bias else None


def histc(x: Tensor, bins: int = 100, low: float = 0, high: float = 0) -> Tensor:
    """Counts per bin, of integers too: accelerators have that, the CPU has not, and mixtures of experts use it."""
    return torch.histc(x, bins, low, high) if x.is_floating_point() else torch.histc(x.double(), bins, low, high).to(x.dtype)


# Operators with a decomposition of our own
OWN = {aten.scaled_dot_product_attention.default: attention, aten.rms_norm.default: rms_norm}
KERNELS = {
    aten._fused_rms_norm.default: rms_norm_forward, aten._fused_rms_norm_backward.default: rms_norm_backward,
    aten._thnn_fused_lstm_cell.default: lstm_cell, aten._thnn_fused_lstm_cell_backward_impl.default: lstm_cell_backward,
    aten._thnn_fused_gru_cell.default: gru_cell, aten._thnn_fused_gru_cell_backward.default: gru_cell_backward,
    aten.histc.default: histc,
}
# PyTorch's bindings that take the arguments of an operator as they are, and a shorter way to it than the operator's own object
BINDINGS = {
    aten.neg.default: torch.neg, aten.cat.default: torch.cat, aten.clone.default: torch.clone, aten.detach.default: torch.Tensor.detach,
    aten.view.default: torch.Tensor.view, aten._unsafe_view.default: torch.Tensor.view, aten.transpose.int: torch.Tensor.transpose,
    aten.t.default: torch.Tensor.t,
}  # fmt: skip
# Operators that PyTorch takes apart unless the device has a kernel of its own
WHOLE = (aten.linear.default, aten.silu_backward.default, aten.mish_backward.default, aten.native_channel_shuffle.default, aten._fused_rms_norm.default)


def register(explicit) -> list[torch.library.Library]:
    """Take operators over before PyTorch takes them apart; ``explicit(func)`` is a device kernel for ``func``."""
    from course_lib.npu import numerics

    numerics.attach()
    library = torch.library.Library("aten", "IMPL")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        for func, own in OWN.items():
            library.impl(func._schema.name.split("::")[1], own, key)
    for func in WHOLE:
        library.impl(func._schema.name.split("::")[1], explicit(func), "PrivateUse1")
    return [library]
