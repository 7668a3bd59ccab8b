"""A fast part of PyTorch's own operator samples; all of them: ``make conformance``."""

import gc
from collections.abc import Callable

import pytest
import torch

from course_lib import npu
from tests import conformance

# What a language model is made of, and every operator that has a rule of its own on the device.
OPERATORS = {
    "add", "mul", "div", "sub", "neg", "exp", "rsqrt", "where", "clamp", "mean", "sum", "cumsum", "argmax", "topk", "sort",
    "mm", "bmm", "addmm", "matmul", "einsum", "nn.functional.linear", "nn.functional.embedding", "nn.functional.silu",
    "nn.functional.gelu", "nn.functional.rms_norm", "nn.functional.layer_norm", "nn.functional.scaled_dot_product_attention",
    "nn.functional.cross_entropy", "nn.functional.dropout", "softmax", "log_softmax", "cat", "split", "chunk", "view", "reshape",
    "transpose", "permute", "expand", "as_strided", "index_select", "gather", "scatter", "index_put", "masked_fill", "tril",
    "arange", "empty", "zeros", "ones_like", "new_zeros", "to_sparse", "conj", "fft.fft", "norm", "linalg.vector_norm",
    "nn.functional.conv2d", "nn.functional.conv_transpose2d", "tensor_split", "nonzero", "unique", "copysign", "bernoulli",
}  # fmt: skip


def test_samples_agree_with_the_cpu() -> None:
    gc.collect()
    npu.use("ascend-910b2")
    try:
        report = conformance.run(OPERATORS, every=7)
    finally:
        gc.collect()
        npu.use("mini")
    assert not report.wrong, str(report)
    assert report.agree > 800


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: torch.ones(2), "stayed on cpu"), (lambda: torch.ones(3, device="npu"), "shape"), (lambda: 1.0, "stayed"),
        (lambda: torch.ones(2, device="npu").half(), "dtype"), (lambda: torch.full((2,), 1.01, device="npu"), "values differ"),
        (lambda: torch.ones(2, 2, device="npu")[:, 0], "stride"),
    ],
)  # fmt: skip
def test_the_comparison_can_fail(make: Callable, found: str) -> None:
    assert found in conformance.difference(torch.ones(2), make())


def test_a_wrong_operator_is_reported() -> None:
    report = conformance.Report()
    report.note("mm", torch.int64, NotImplementedError("no int64"))
    report.note("mm", torch.float32, RuntimeError("crash"))
    report.note("add", torch.float32, NotImplementedError("not in the list"))
    assert (report.agree, report.raised.total(), report.wrong.total()) == (0, 1, 2)
