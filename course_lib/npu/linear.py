"""``F.linear`` as the device runs it: one product forward; backward one for the input and one for the weight.

PyTorch would take it apart into views and a product, each through Python. Kept whole it costs one call here and
the ledger still shows each launch: ``linear``, ``linear_backward_input``, ``linear_backward_weight``.
"""

from operator import attrgetter

import torch
from torch import Tensor

from course_lib.chip.cost import Matmul, Work
from course_lib.npu import runtime
from course_lib.npu.price import charge, price_of
from course_lib.npu.tensor import HANDLERS, Info, NpuTensor, wrap
from course_lib.npu.work import distinct, dtype_name

aten = torch.ops.aten
_form_of = attrgetter("_form")


def linear_backward(info: Info, args: tuple, kwargs: dict) -> tuple[NpuTensor | None, NpuTensor | None, NpuTensor | None]:
    """Gradients of input (…, K), weight (N, K) and bias (N,) from that of the output (…, N), as ``mask`` asks."""
    x, grad, weight, mask = args
    host_x, host_grad, host_weight = x._inner, grad._inner, weight._inner
    rows_x, rows_grad = host_x.reshape(-1, host_x.shape[-1]), host_grad.reshape(-1, host_grad.shape[-1])  # (M, K), (M, N)
    index = grad._held.index
    dx, dw, db = gradients(rows_x, rows_grad, host_weight, mask)
    if mask[0]:
        dx = wrap(dx.view(host_x.shape), index)
        _charge("linear_backward_input", [grad, weight], (rows_grad, host_weight), dx)
    if mask[1]:
        dw = wrap(dw, index)
        _charge("linear_backward_weight", [grad, x], (rows_grad.t(), rows_x), dw)
    if mask[2]:
        db = wrap(db, index)
        _charge("linear_backward_bias", [grad], (rows_grad,), db)
    return dx, dw, db


def gradients(x: Tensor, grad: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The numbers: of rows x (M, K), their weight (N, K) and the bias, from grad (M, N)."""
    return grad @ weight if mask[0] else None, grad.t() @ x if mask[1] else None, grad.sum(0) if mask[2] else None


def _charge(name: str, tensors: list[NpuTensor], operands: tuple[Tensor, ...], out: NpuTensor) -> None:
    """Launch one product of ``operands`` (or, of one operand, the sum of its rows)."""
    device = runtime.devices[out._held.index]

    def work() -> Work:
        dtype = dtype_name(out.dtype)
        moved = {"bytes_read": distinct([t._inner for t in tensors]), "bytes_written": distinct([out._inner])}
        if len(operands) == 1:
            return Work(vector_flops=operands[0].numel(), vector_dtype=dtype, **moved)
        (m, k), n = operands[0].shape, operands[1].shape[1]
        return Work(matmuls=(Matmul(1, m, k, n, dtype),), **moved)

    charge(name, device, price_of(device, (name, *map(_form_of, tensors)), work, tensors), tensors)


HANDLERS[aten.linear_backward.default] = linear_backward
