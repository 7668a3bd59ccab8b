"""What an operator asks of the chip: FLOPs on cube and vector units, bytes read and written.

Every count follows from shapes alone, by the formulas below; ``chip.cost`` turns it into time.

* **Cube**: a product of an (M, K) by a (K, N) matrix is 2·M·K·N FLOPs. Linear layers, convolutions and
  attention are written as such products.
* **Vector**: operations per element (``PER_OUTPUT``, ``PER_INPUT``), one for each arithmetic instruction
  that the textbook formula needs; exp, log, sqrt and reciprocal count as one, as the vector unit has them.
  A multiplication and the addition after it are two instructions: ``chip.cost`` grants no fused multiply-add.
* **Bytes**: each element that must be read is read once and each result is written once. An expanded
  tensor is read once, a table only where it is looked up, a buffer that is only overwritten is not read.
  ``zeros_like(x)`` and its like are charged with reading ``x`` too, of which a kernel needs the shape only: an upper
  bound that is kept because the stored figures of the lessons contain it.
"""

import math

import torch

from course_lib.chip.cost import Matmul, Work
from course_lib.chip.figures import DTYPES

# Vector operations per element of the result. Not named: 1.
PER_OUTPUT = {
    "sigmoid": 3, "tanh": 5, "silu": 4, "gelu": 8, "softplus": 3, "elu": 3, "erf": 5,  # silu: neg, exp, add, div
    "sigmoid_backward": 3, "tanh_backward": 3, "silu_backward": 7, "gelu_backward": 12, "threshold_backward": 1,
    "_softmax": 5, "_safe_softmax": 5, "_log_softmax": 5,  # max, subtract, exp, sum, divide (or log and subtract)
    "_softmax_backward_data": 4, "_log_softmax_backward_data": 4,  # y·(g − Σ g·y)
    "_fused_rms_norm": 4, "_fused_rms_norm_backward": 8,  # square, mean, scale, gain
    "_thnn_fused_lstm_cell": 35, "_thnn_fused_lstm_cell_backward_impl": 8, "_thnn_fused_gru_cell": 24, "_thnn_fused_gru_cell_backward": 7,
    "native_layer_norm": 8, "native_layer_norm_backward": 14, "native_batch_norm": 8, "native_batch_norm_backward": 14,
    "addcmul": 3, "addcdiv": 3, "lerp": 3, "pow": 1, "native_dropout": 3, "remainder": 3, "fmod": 3, "cumsum": 1,
}
# Vector operations per element of the first input (reductions). Not named: see PER_OUTPUT.
PER_INPUT = {
    "sum": 1, "mean": 1, "max": 1, "min": 1, "amax": 1, "amin": 1, "prod": 1, "argmax": 1, "argmin": 1, "any": 1, "all": 1,
    "var": 3, "var_mean": 3, "std": 3, "norm": 2, "linalg_vector_norm": 2, "_foreach_norm": 2, "logsumexp": 3,
    "topk": 1, "sort": 1, "nll_loss_forward": 0, "equal": 1, "count_nonzero": 1,
}
# Only moves data: no arithmetic.
MOVES = {
    "copy", "clone", "_to_copy", "contiguous", "cat", "stack", "fill", "zero", "ones_like", "zeros_like", "full_like", "full",
    "embedding", "index", "index_select", "gather", "take", "masked_select", "nonzero", "repeat", "roll", "flip", "tril", "triu",
    "constant_pad_nd", "slice_backward", "select_backward", "nll_loss_backward", "arange", "eye", "linspace",
    "_foreach_zero", "_foreach_copy", "set", "resize", "masked_fill", "_unsafe_index", "new_zeros", "new_ones", "new_full", "scalar_tensor",
    "slice_scatter", "select_scatter", "_local_scalar_dense", "isin",
}
LOOKUPS = {"embedding", "index", "index_select", "gather", "take", "_unsafe_index"}  # read only what they return
SCATTERS = {"index_put", "_index_put_impl", "scatter", "scatter_add", "index_add", "index_copy", "scatter_reduce"}  # touch only what they get
ADDS = {"scatter_add", "index_add", "scatter_reduce"}  # … and add it to what is there
POOLS = {"max_pool2d_with_indices", "avg_pool2d", "max_pool3d_with_indices", "avg_pool3d"}  # one operation per element of a window
# AdamW per parameter: decay 1; m 3; v 4; root, bias and ε 3; quotient, step and subtraction 3.
ADAMW = 14
# Flash attention per (query, key) pair. Forward: scale, max, subtract, exp, sum. Backward: scale, subtract, exp, subtract, multiply.
ATTENTION = 5


def touched(t: torch.Tensor) -> int:
    """Bytes of distinct elements of ``t``: a dimension with stride 0 is one element."""
    count = math.prod(n for n, s in zip(t.shape, t.stride()) if s != 0) if t.numel() else 0
    return min(count * t.element_size(), t.untyped_storage().nbytes())


def distinct(tensors: list[torch.Tensor]) -> int:
    """Bytes touched by all of ``tensors`` together, each view of each storage once."""
    per_storage: dict[int, dict] = {}
    for t in tensors:
        views = per_storage.setdefault(t.untyped_storage()._cdata, {"whole": t.untyped_storage().nbytes()})
        views[t.storage_offset(), t.shape, t.stride()] = touched(t)
    return sum(min(v.pop("whole"), sum(v.values())) for v in per_storage.values())


def work(func: torch._ops.OpOverload, args: tuple, kwargs: dict, outs: list[torch.Tensor]) -> Work:
    """The Work of one call of ``func`` on host tensors ``args`` that gave ``outs`` (all of them, also written arguments)."""
    name = base_name(func)
    if name in SPECIAL:
        return SPECIAL[name](args, kwargs, outs)
    reads, writes = _operands(func, args, kwargs)
    writes = writes or outs
    if name in _MATMULS:
        return _matmul_work(name, args, outs, reads, writes)
    read = sum(touched(t) for t in outs) + distinct(reads[1:]) if name in LOOKUPS else distinct(reads)
    written = distinct(writes)
    if name in SCATTERS:
        return _scatter(func, name, args, kwargs, reads, outs)
    flops = _vector_flops(name, reads, outs or writes)
    if name in POOLS:
        flops *= math.prod(args[1])
    dtype = dtype_name((reads or outs)[0].dtype) if reads or outs else "float32"
    return Work(vector_flops=flops, vector_dtype=dtype, bytes_read=read, bytes_written=written)


def base_name(func: torch._ops.OpOverload) -> str:
    """``aten::add_.Tensor`` → ``add``: the name under which the tables above know an operator."""
    name = func._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors in an argument: itself, or those in its list."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for t in value if isinstance(t, torch.Tensor)] if isinstance(value, (list, tuple)) else []


_OVERWRITE = {"copy", "fill", "zero", "normal", "uniform", "random", "bernoulli", "exponential", "_foreach_zero", "_foreach_copy", "log_normal", "cauchy", "geometric"}


def _operands(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> tuple[list, list]:
    """(read, written) tensor arguments, by the schema's own marks."""
    reads, writes, overwrites = [], [], base_name(func) in _OVERWRITE
    for i, arg in enumerate(func._schema.arguments):
        found = tensors_in(args[i] if i < len(args) else kwargs.get(arg.name))
        written = arg.alias_info is not None and arg.alias_info.is_write
        writes += found if written else []
        if not written or not (arg.is_out or overwrites):
            reads += found
    return reads, writes


def _vector_flops(name: str, reads: list, outs: list) -> int:
    short = name.removeprefix("_foreach_")
    if short in MOVES or name in MOVES:
        return 0
    if name in PER_INPUT or short in PER_INPUT:
        per, over = PER_INPUT.get(name, PER_INPUT.get(short)), reads if name.startswith("_foreach") else reads[:1]
    else:
        per, over = PER_OUTPUT.get(short, 1), outs if name.startswith("_foreach") else outs[:1]
    return per * sum(t.numel() for t in over)


def _scatter(func: torch._ops.OpOverload, name: str, args: tuple, kwargs: dict, reads: list, outs: list) -> Work:
    """Elements put at indices: in place only they are touched, else the whole is copied as well."""
    target, count = args[0], _places(name, args)
    adds = name in ADDS or (args[3] if len(args) > 3 else kwargs.get("accumulate")) is True
    read, written = distinct(reads), distinct(outs)
    if func._schema.name.endswith("_"):
        written = count * target.element_size()
        read = distinct(reads[1:]) + (written if adds else 0)
    return Work(vector_flops=count if adds else 0, vector_dtype=dtype_name(target.dtype), bytes_read=read, bytes_written=written)


def _places(name: str, args: tuple) -> int:
    """How many elements are put. A mask may choose any of those it covers, so it counts as all."""
    target = args[0]
    if "index_put" in name:
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype == torch.bool for i in indices):
            return target.numel()
        kept = math.prod(n for n, i in zip(target.shape, [*args[1], *[None] * target.dim()]) if i is None)
        return kept * math.prod(torch.broadcast_shapes(*[i.shape for i in indices]))
    if name in ("index_add", "index_copy"):
        return args[3].numel()
    return args[2].numel()  # scatter: one for each index


# -- products of matrices -----------------------------------------------------------------------------


def product(batch: int, m: int, k: int, n: int, dtype: torch.dtype) -> Matmul:
    """A product (M, K) × (K, N) for each of ``batch``; a complex one is four real ones, and float4 lies two to an element."""
    if dtype == torch.float4_e2m1fn_x2:
        k *= 2
    if dtype.is_complex:
        return Matmul(4 * batch, m, k, n, dtype_name(dtype.to_real()))
    return Matmul(batch, m, k, n, dtype_name(dtype))


def _mm(a: torch.Tensor, b: torch.Tensor) -> Matmul:
    """(M, K) × (K, N), with an optional leading batch."""
    batch = a.shape[0] if a.dim() == 3 else 1
    return product(batch, a.shape[-2], a.shape[-1], b.shape[-1], a.dtype)


def _linear(a: tuple) -> list[Matmul]:
    """(…, K) × (N, K)ᵀ."""
    return [product(1, math.prod(a[0].shape[:-1]), a[0].shape[-1], a[1].shape[0], a[0].dtype)]


_MATMULS = {
    "linear": _linear,
    "mm": lambda a: [_mm(a[0], a[1])],
    "_int_mm": lambda a: [_mm(a[0], a[1])],
    "_weight_int8pack_mm": _linear,  # in the dtype of x
    "_scaled_mm": lambda a: [_mm(a[0], a[1])],
    "_scaled_mm_v2": lambda a: [_mm(a[0], a[1])],
    "_grouped_mm": lambda a: _grouped(a),
    "bmm": lambda a: [_mm(a[0], a[1])],
    "addmm": lambda a: [_mm(a[1], a[2])],
    "baddbmm": lambda a: [_mm(a[1], a[2])],
    "addbmm": lambda a: [_mm(a[1], a[2])],
    "mv": lambda a: [product(1, a[0].shape[0], a[0].shape[1], 1, a[0].dtype)],
    "addmv": lambda a: [product(1, a[1].shape[0], a[1].shape[1], 1, a[1].dtype)],
    "dot": lambda a: [product(1, 1, a[0].shape[0], 1, a[0].dtype)],
    "vdot": lambda a: [product(1, 1, a[0].shape[0], 1, a[0].dtype)],
}


def even_groups(rows: int, groups: int, k: int, n: int, dtype: str) -> list[Matmul]:
    """(rows, K) × (K, N) with another matrix for each of ``groups``. How many rows each has only the numbers tell: an even split."""
    each, more = divmod(rows, groups)
    return [Matmul(b, m, k, n, dtype) for b, m in ((groups - more, each), (more, each + 1)) if b and m]


def _grouped(a: tuple) -> list[Matmul]:
    """``F.grouped_mm``: groups of rows (2-D × 3-D), of columns (3-D × 2-D), of the inner dimension (2-D × 2-D), or a batch."""
    (m, k), n, dtype = a[0].shape[-2:], a[1].shape[-1], dtype_name(a[0].dtype)
    if a[0].dim() == a[1].dim():
        return [_mm(a[0], a[1])]  # the same FLOPs whether the inner dimension is in groups or not
    return even_groups(m, a[1].shape[0], k, n, dtype) if a[0].dim() == 2 else even_groups(n, a[0].shape[0], k, m, dtype)


def _matmul_work(name: str, args: tuple, outs: list, reads: list, writes: list) -> Work:
    """The product, and one vector operation per result where something is added to it."""
    biased = name == "linear" and len(args) > 2 and args[2] is not None
    adds = outs[0].numel() if biased or name.startswith(("add", "badd")) else 0
    widened = 0
    if name == "_weight_int8pack_mm":  # the vector unit widens the weights, hands them to the cube and scales the result
        adds, widened = args[1].numel() + outs[0].numel(), args[1].numel() * args[0].element_size()
    return Work(
        matmuls=tuple(_MATMULS[name](args)), vector_flops=adds, vector_dtype=dtype_name(outs[0].dtype),
        bytes_read=distinct(reads), bytes_written=distinct(writes), exchanged=widened,
    )


def _conv_matmul(x: torch.Tensor, weight: torch.Tensor, y_shape: tuple, groups: int) -> tuple[int, int, int, int]:
    """Convolution as a product: (groups, pixels, Cin/groups·kernel, Cout/groups)."""
    pixels = y_shape[0] * math.prod(y_shape[2:])
    return groups, pixels, math.prod(weight.shape[1:]), y_shape[1] // groups


def _convolution(args: tuple, kwargs: dict, outs: list) -> Work:
    x, weight, bias, groups = args[0], args[1], args[2], args[8]
    transposed = args[6]
    image = x if transposed else outs[0]  # a transposed convolution is the gradient of a plain one
    batch, m, k, n = _conv_matmul(x, weight, image.shape, groups)
    reads = [t for t in (x, weight, bias) if t is not None]
    return Work(matmuls=(product(batch, m, k, n, x.dtype),), vector_flops=outs[0].numel() if bias is not None else 0, vector_dtype=dtype_name(x.dtype), bytes_read=distinct(reads), bytes_written=distinct(outs))


def _convolution_backward(args: tuple, kwargs: dict, outs: list) -> Work:
    grad, x, weight = args[:3]
    transposed, groups, mask = args[7], args[9], args[10]
    batch, m, k, n = _conv_matmul(x, weight, (x if transposed else grad).shape, groups)
    dtype = dtype_name(x.dtype)
    products = [Matmul(batch, m, n, k, dtype)] * bool(mask[0]) + [Matmul(batch, k, m, n, dtype)] * bool(mask[1])
    return Work(matmuls=tuple(products), vector_flops=grad.numel() if mask[2] else 0, vector_dtype=dtype, bytes_read=distinct([grad, x, weight]), bytes_written=distinct(outs))


# -- attention ----------------------------------------------------------------------------------------


def attention_pairs(T: int, S: int, causal: bool) -> tuple[int, int]:
    """(rows, columns) whose product is the number of (query, key) pairs that are computed.

    Causal attention over T = S tokens needs T·(T+1)/2 of T² pairs: kernels skip what lies above the diagonal.
    """
    if not causal:
        return T, S
    short = min(T, S)
    pairs = short * (short + 1) // 2 + max(T - S, 0) * S
    return (T // 2, pairs // (T // 2)) if T % 2 == 0 and T else (T, -(-pairs // T) if T else 0)


def flash_work(matmuls: tuple[Matmul, ...], pairs: int, read: int, written: int, backward: bool) -> Work:
    """Flash attention over ``pairs`` of queries and keys, all heads together; bytes ``read`` and ``written`` in HBM.

    Scores go from the cube to the vector unit in float32, weights come back in the dtype of the products; in backward
    two matrices each way: scores and their gradient.
    """
    there_and_back = (2 if backward else 1) * (4 + DTYPES[matmuls[0].dtype]) if matmuls else 0
    return Work(matmuls, ATTENTION * pairs, "float32", read, written, exchanged=pairs * there_and_back)


def _attention(args: tuple, kwargs: dict, outs: list, products: int, backward: bool) -> Work:
    q, k, v = (args[1:4] if backward else args[:3])
    causal = bool(args[7] if backward else (args[4] if len(args) > 4 else kwargs.get("is_causal", False)))
    B, H, T, K = q.shape  # grouped heads: each query head still meets every key
    rows, columns = attention_pairs(T, k.shape[2], causal)
    matmul = Matmul(B * H, rows, K, columns, dtype_name(q.dtype))
    mask = tensors_in(kwargs.get("attn_mask"))
    reads = tensors_in(args[:6]) + mask if backward else [q, k, v, *mask]
    return flash_work((matmul,) * products, B * H * rows * columns, distinct(reads), distinct(outs), backward)


# -- optimizers and the rest --------------------------------------------------------------------------


def _fused_adamw(args: tuple, kwargs: dict, outs: list) -> Work:
    params, grads, m, v, vmax = args[:5]
    state = params + m + v + vmax
    return Work(vector_flops=ADAMW * sum(p.numel() for p in params), vector_dtype=dtype_name(params[0].dtype), bytes_read=distinct(state + grads), bytes_written=distinct(state))


def _nll_forward(args: tuple, kwargs: dict, outs: list) -> Work:
    scores, target = args[:2]
    picked = target.numel() * scores.element_size()
    return Work(vector_flops=target.numel(), vector_dtype=dtype_name(scores.dtype), bytes_read=picked + touched(target), bytes_written=distinct(outs))


def _nll_backward(args: tuple, kwargs: dict, outs: list) -> Work:
    return Work(bytes_read=distinct([args[0], args[2]]), bytes_written=distinct(outs))


def _embedding_backward(args: tuple, kwargs: dict, outs: list) -> Work:
    grad, indices = args[:2]
    return Work(vector_flops=grad.numel(), vector_dtype=dtype_name(grad.dtype), bytes_read=distinct([grad, indices]), bytes_written=distinct(outs))


SPECIAL = {
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "_scaled_dot_product_flash_attention_for_cpu": lambda a, k, o: _attention(a, k, o, products=2, backward=False),
    # S = QKᵀ again, dV, dP, dQ, dK: five products, 2.5 times the forward's two
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda a, k, o: _attention(a, k, o, products=5, backward=True),
    "_fused_adamw": _fused_adamw,
    "_fused_adam": _fused_adamw,
    "nll_loss_forward": _nll_forward,
    "nll_loss_backward": _nll_backward,
    "embedding_dense_backward": _embedding_backward,
}
