"""``torch.autocast("npu")`` and ``torch.npu.amp``: matrix products in few bits, sums and logarithms in float32.

PyTorch offers every operator to autocast before autograd sees it. Operators of the lists below are called again with
their arguments cast; all others fall through at no cost, and with autocast off none of this runs. The lists are those
of CUDA, which torch_npu follows too (``ATen/autocast_mode.h``; a test holds them against PyTorch's own registration).

A float32 weight is cast once in an autocast region, not once a use: the cache ends with the outermost region.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch

# Cast to the lower precision
LOWER = """
    _convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm
    chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell
    rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention
""".split()
# Cast to float32
FLOAT32 = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
    pow.Scalar softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim
    cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss
    smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss
    multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
    _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d
    upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
    _upsample_bicubic2d_aa
""".split()
# Told to compute in float32, where the caller names no dtype
FLOAT32_BY_DTYPE = """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
""".split()
# Told so by the overload that takes a dtype
FLOAT32_BY_OVERLOAD = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
# Cast to the widest of their arguments. (cat and stack do so by themselves.)
WIDEST = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add".split()
BANNED = "binary_cross_entropy"

aten = torch.ops.aten
_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_casts: dict[tuple, tuple[weakref.ref, torch.Tensor]] = {}  # weights already cast: (id, dtype, grad mode) → (weight, cast)


def _inside() -> Any:
    """What an operator calls is not cast again."""
    return torch._C._ExcludeDispatchKeyGuard(_KEY)


def _eligible(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64 and value.device.type == "npu"


def cast(value: Any, dtype: torch.dtype) -> Any:
    """``value``, or what is in it, in ``dtype``: floating-point tensors on the device, float64 excepted."""
    if isinstance(value, (list, tuple)):
        return type(value)([cast(v, dtype) for v in value])
    if not _eligible(value) or value.dtype is dtype:
        return value
    if value.dtype is torch.float32 and value.requires_grad and value.is_leaf and not value._is_view() and torch.is_autocast_cache_enabled():
        return _cast_once(value, dtype)
    return value.to(dtype)


def _cast_once(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    key = id(weight), dtype, torch.is_grad_enabled()
    found = _casts.get(key)
    if found is None or found[0]() is not weight:
        found = _casts[key] = weakref.ref(weight), weight.to(dtype)
    return found[1]


def clear() -> None:
    """Forget the weights that were cast."""
    _casts.clear()
    _clear_theirs()


_clear_theirs = torch.clear_autocast_cache


# -- what is done with an operator --------------------------------------------------------------------


def lower(func: Callable) -> Callable:
    def in_lower_precision(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("npu")
        with _inside():
            return func(*[cast(a, dtype) for a in args], **{k: cast(v, dtype) for k, v in kwargs.items()})

    return in_lower_precision


def float32(func: Callable) -> Callable:
    def in_float32(*args: Any, **kwargs: Any) -> Any:
        with _inside():
            return func(*[cast(a, torch.float32) for a in args], **{k: cast(v, torch.float32) for k, v in kwargs.items()})

    return in_float32


def float32_by_dtype(func: torch._ops.OpOverload) -> Callable:
    at = next(i for i, a in enumerate(func._schema.arguments) if a.name == "dtype")

    def with_dtype(*args: Any, **kwargs: Any) -> Any:
        given = args[at] if len(args) > at else kwargs.get("dtype")
        if given is None and _eligible(args[0]):
            args, kwargs = args[:at], kwargs | {"dtype": torch.float32}
        with _inside():
            return func(*args, **kwargs)

    return with_dtype


def float32_by_overload(with_dtype: Callable) -> Callable:
    def norm(x: torch.Tensor, p: Any = 2, *rest: Any) -> torch.Tensor:
        if len(rest) == 1:  # keepdim, which comes before dtype
            rest = (*rest, False)
        with _inside():
            return with_dtype(x, p, *rest, dtype=torch.float32 if _eligible(x) else x.dtype)

    return norm


def widest(func: Callable) -> Callable:
    def in_widest(*args: Any, **kwargs: Any) -> Any:
        dtypes = {t.dtype for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else (a,)) if _eligible(t)}
        low = torch.get_autocast_dtype("npu")
        if others := dtypes - {torch.float32, low}:
            raise RuntimeError(f"Unexpected floating ScalarType in at::autocast::prioritize: {others.pop()} in {func}")
        dtype = torch.float32 if torch.float32 in dtypes else low
        with _inside():
            return func(*[cast(a, dtype) for a in args], **{k: cast(v, dtype) for k, v in kwargs.items()})

    return in_widest


def banned(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast: a probability in few bits "
        "rounds to 0 or 1, where the loss is infinite. Give the logits to torch.nn.functional.binary_cross_entropy_with_logits "
        "or torch.nn.BCEWithLogitsLoss instead."
    )


def _overload(name: str) -> torch._ops.OpOverload | None:
    """None if this version of PyTorch does not have it."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet, None), overload or "default", None)


def kernels() -> dict[str, Callable]:
    """What autocast does, by operator."""
    rules = {name: lower for name in LOWER} | {name: float32 for name in FLOAT32}
    rules |= {name: float32_by_dtype for name in FLOAT32_BY_DTYPE} | {name: widest for name in WIDEST}
    out = {name: rule(func) for name, rule in rules.items() if (func := _overload(name))}
    for name, other in FLOAT32_BY_OVERLOAD.items():
        out[name] = float32_by_overload(_overload(other))
    return out | {BANNED: banned}


def attach() -> list[torch.library.Library]:
    """Connect with PyTorch's dispatcher; the libraries must be kept alive."""
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    listed = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels().items():
        listed.impl(name, kernel, "AutocastPrivateUse1")
    torch.clear_autocast_cache = clear  # torch.autocast calls it when the outermost region ends
    return [everything, listed]


# -- torch.npu.amp ------------------------------------------------------------------------------------


class autocast(torch.amp.autocast):
    """``torch.autocast("npu")``, as ``torch.npu.amp.autocast`` in older programs."""

    def __init__(self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True) -> None:
        super().__init__("npu", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler("npu")``, as ``torch.npu.amp.GradScaler`` in older programs."""

    def __init__(self, init_scale: float = 2.0**16, growth_factor: float = 2.0, backoff_factor: float = 0.5, growth_interval: int = 2000, enabled: bool = True) -> None:
        super().__init__("npu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


def is_autocast_enabled() -> bool:
    return torch.is_autocast_enabled("npu")


def set_autocast_enabled(enable: bool) -> None:
    torch.set_autocast_enabled("npu", enable)


def get_autocast_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("npu")


def set_autocast_dtype(dtype: torch.dtype) -> None:
    torch.set_autocast_dtype("npu", dtype)
