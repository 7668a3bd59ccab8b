"""Quantised products against float64 and int64; what they cost; chips without the dtype."""

import pytest
import torch

from course_lib import npu
from course_lib.npu import torch_npu

M, K, N = 8, 32, 12
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def put(*tensors):
    return [None if t is None else t.to("npu") for t in tensors]


A, B8, SCALE, ROWS = int8(M, K), int8(K, N), torch.rand(N) * 0.01, torch.rand(M) * 0.1
WHOLE, FLOAT = torch.randint(-9999, 9999, (N,), dtype=torch.int32), torch.randn(N)
QUANTISED = {
    "a column scale": (SCALE, None, None), "one scale": (SCALE[:1], None, None), "a row scale": (SCALE, ROWS, None),
    "whole bias": (SCALE, None, WHOLE), "float bias": (SCALE, ROWS, FLOAT),
}  # fmt: skip


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("name", QUANTISED)
def test_int8_product(name, dtype):
    scale, rows, bias = QUANTISED[name]
    total = (A.long() @ B8.long() + (WHOLE if bias is WHOLE else 0)).double()
    want = total * scale.double() * (1 if rows is None else rows.double()[:, None]) + (FLOAT.double() if bias is FLOAT else 0)
    a, b, s, r, c = put(A, B8, scale, rows, bias)
    got = torch_npu.npu_quant_matmul(a, b, s, pertoken_scale=r, bias=c, output_dtype=dtype).cpu()
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=UNIT[dtype] + 4 * 2**-24, atol=4 * 2**-24 * want.abs().max().item())


def test_int8_results():
    a, b, s = put(A, B8, SCALE)
    assert torch.equal(torch_npu.npu_quant_matmul(a, b, s, output_dtype=torch.int32).cpu().long(), A.long() @ B8.long())
    want = ((A.long() @ B8.long()).float() * SCALE + 3).round().clamp(-128, 127)
    assert torch.equal(torch_npu.npu_quant_matmul(a, b, s, offset=torch.tensor([3.0], device="npu")).cpu().float(), want)
    batch = torch_npu.npu_quant_matmul(torch.stack([a, a]), torch.stack([b, b]), s, output_dtype=torch.int32)
    assert torch.equal(batch[1].cpu().long(), A.long() @ B8.long())


@pytest.mark.parametrize("first", FP8)
@pytest.mark.parametrize("second", FP8)
def test_fp8_product(first, second):
    a, b = torch.randn(M, K).to(first), torch.randn(K, N).to(second)
    want = a.double() @ b.double() * SCALE.double() * ROWS.double()[:, None]
    x, w, s, r = put(a, b, SCALE, ROWS)
    got = torch_npu.npu_quant_matmul(x, w, s, pertoken_scale=r, output_dtype=torch.bfloat16).cpu()
    torch.testing.assert_close(got.double(), want, rtol=2**-8 * 1.01, atol=1e-6)


def test_scaled_mm():
    a, b = torch.randn(16, 32).to(FP8[0]), torch.randn(48, 32).to(FP8[0]).t()
    x, w = put(a, b)
    scales = [torch.tensor(v, device="npu") for v in (2.0, 0.25)]
    with npu.ledger() as ledger:
        got = torch._scaled_mm(x, w, *scales, out_dtype=torch.bfloat16)
    torch.testing.assert_close(got.cpu().double(), a.double() @ b.double() * 0.5, rtol=2**-8 * 1.01, atol=1e-6)
    (record,) = ledger.records
    assert (record.cost.cube_flops, record.cost.bytes) == (2 * 16 * 32 * 48, 16 * 32 + 48 * 32 + 8 + 2 * 16 * 48)


def test_int_mm():
    a, b = put(A, B8)
    with npu.ledger() as ledger:
        got = torch._int_mm(a, b)
    assert torch.equal(got.cpu().long(), A.long() @ B8.long())
    assert (ledger.records[0].cost.cube_flops, ledger.records[0].cost.bytes) == (2 * M * K * N, M * K + K * N + 4 * M * N)


def test_int8_weights_alone():
    """The product is in the dtype of x; weights move as int8, and the vector unit widens them and scales the result."""
    x, scale = torch.randn(M, K), torch.rand(N)
    weights = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    x8, w8, s8 = put(x, weights, scale)
    with npu.ledger() as ledger:
        got = torch._weight_int8pack_mm(x8, w8, s8)
    torch.testing.assert_close(got.cpu(), x @ (weights.float() * scale[:, None]).t(), rtol=1e-4, atol=1e-3)
    paid = ledger.records[0].cost
    assert (paid.cube_flops, paid.vector_flops) == (2 * M * K * N, N * K + M * N)
    assert paid.bytes == 4 * M * K + K * N + 4 * N + 4 * M * N


def test_int8_weights_are_faster_where_reading_them_is_all():
    """One row on the 910B2 in bfloat16: HBM has half to read, and the widened weights go to the cube through L2."""
    spec, size = npu.use("ascend-910b2", numerics=False), 4096
    try:
        x, w = torch.empty(1, size, dtype=torch.bfloat16, device="npu"), torch.empty(size, size, dtype=torch.int8, device="npu")
        with npu.ledger() as ledger:
            torch._weight_int8pack_mm(x, w, torch.empty(size, dtype=torch.bfloat16, device="npu"))
            x @ torch.empty(size, size, dtype=torch.bfloat16, device="npu")
    finally:
        del x, w
        npu.use()
    small, wide = (next(r.cost for r in ledger.records if r.op == op) for op in ("_weight_int8pack_mm", "mm"))
    assert wide.bound == "memory" and small.memory_ps >= size * size * 1e12 / spec.memory_bandwidth
    assert 1.2 < (wide.ps - wide.launch_ps) / (small.ps - small.launch_ps) < 2


@pytest.mark.parametrize("mode, dims", [("pertoken", (-1,)), ("perchannel", (-2,)), ("pertensor", (0, 1, 2))])
@pytest.mark.parametrize("dtype, largest", [(torch.int8, 127), (FP8[0], 448), (FP8[1], 57344)])
def test_dynamic_quant(mode, dims, dtype, largest):
    x = torch.randn(3, M, K)
    x[0, 0] = 0
    q, scale = torch_npu.npu_dynamic_quant(x.to("npu"), dst_type=dtype, quant_mode=mode)
    want = x.abs().amax(dims, keepdim=True) / largest
    assert q.dtype == dtype and scale.dtype == torch.float32
    assert torch.equal(scale.cpu(), want.flatten() if mode == "pertensor" else want.squeeze(dims[0]))
    half_step = {torch.int8: 0.5, FP8[0]: 448 * 2**-4, FP8[1]: 57344 * 2**-3}[dtype]
    assert ((q.cpu().double() * want - x).abs() <= half_step * want * 1.001).all()


def test_dynamic_quant_smooths():
    x, smooth = torch.randn(M, K), torch.rand(K)
    q, scale = torch_npu.npu_dynamic_quant(*put(x), smooth_scales=smooth.to("npu"))
    want, factor = torch_npu.npu_dynamic_quant(x * smooth)  # on cpu: the reference
    assert torch.equal(q.cpu(), want) and torch.equal(scale.cpu(), factor)


@pytest.mark.parametrize("group", [0, 8])
def test_weight_quant(group):
    x, w, bias = torch.randn(2, M, K).half(), int8(K, N), torch.randn(N).half()
    scale, offset = (torch.rand(K // group, N) if group else torch.rand(N)).half() / 64, (torch.randn(K // group, N) if group else torch.randn(N)).half()
    wide = [t.double().repeat_interleave(group, 0) if group else t.double() for t in (scale, offset)]
    exact = (w.double() + wide[1]) * wide[0]
    want = x.double() @ exact + bias.double()
    with npu.ledger() as ledger:
        got = torch_npu.npu_weight_quant_batchmatmul(*put(x, w, scale, offset), bias=bias.to("npu"), antiquant_group_size=group)
    bound = 2**-11 * (want.abs() + x.double().abs() @ exact.abs()) + 1e-5  # weights and result are rounded to float16
    assert ((got.cpu().double() - want).abs() <= bound).all()
    cost = ledger.records[-1].cost
    assert cost.cube_flops == 2 * 2 * M * K * N
    assert cost.bytes == x.nbytes + K * N + scale.nbytes + offset.nbytes + bias.nbytes + got.nbytes


def test_shapes_follow_without_numbers():
    a, b, s = (t.to("meta") for t in (A, B8, SCALE))
    assert torch_npu.npu_quant_matmul(a, b, s, output_dtype=torch.float16).shape == (M, N)
    assert torch_npu.npu_quant_matmul(a.to(FP8[0]), b.to(FP8[0]), s, output_dtype=torch.float16).shape == (M, N)
    assert [t.shape for t in torch_npu.npu_dynamic_quant(a.float())] == [(M, K), (M,)]
    assert torch_npu.npu_weight_quant_batchmatmul(a.half(), b, s.half()).shape == (M, N)


def test_cost_by_hand():
    a, b, s, r = put(A, B8, SCALE, ROWS)
    with npu.ledger() as ledger:
        torch_npu.npu_quant_matmul(a, b, s, pertoken_scale=r, output_dtype=torch.bfloat16)
        torch_npu.npu_dynamic_quant(torch.zeros(M, K, device="npu"))
    product, _, quantise = ledger.records
    assert (product.op, product.cost.cube_flops, product.cost.vector_flops) == ("npu_quant_matmul", 2 * M * K * N, 3 * M * N)
    assert product.cost.bytes == M * K + K * N + 4 * N + 4 * M + 2 * M * N
    assert (quantise.op, quantise.cost.vector_flops, quantise.cost.bytes) == ("npu_dynamic_quant", 4 * M * K, 4 * M * K + M * K + 4 * M)


def test_a_chip_without_fp8_refuses():
    npu.use("ascend-910b2")
    a, b, s = put(torch.randn(16, 32).to(FP8[0]), torch.randn(32, 16).to(FP8[0]), torch.ones(1))
    with pytest.raises(NotImplementedError, match="Ascend 910B2 has no matrix product in float8_e4m3fn"):
        torch_npu.npu_quant_matmul(a, b, s, output_dtype=torch.bfloat16)
    torch_npu.npu_quant_matmul(*put(A, B8, SCALE), output_dtype=torch.bfloat16)


REFUSED = {
    "packed scale": (NotImplementedError, "packed scales", lambda a, b, s: torch_npu.npu_quant_matmul(a, b, s.long())),
    "four bits": (NotImplementedError, "x2_dtype=", lambda a, b, s: torch_npu.npu_quant_matmul(a, b, s, x2_dtype=torch.int8)),
    "mixed": (TypeError, "int8 or fp8", lambda a, b, s: torch_npu.npu_quant_matmul(a, b.float(), s)),
    "target": (NotImplementedError, "dst_type=", lambda a, b, s: torch_npu.npu_dynamic_quant(s, dst_type=torch.uint8)),
    "mode": (ValueError, "perhaps", lambda a, b, s: torch_npu.npu_dynamic_quant(s, quant_mode="perhaps")),
    "result": (NotImplementedError, "quant_scale=", lambda a, b, s: torch_npu.npu_weight_quant_batchmatmul(s, b, s, quant_scale=s)),
    "weights": (NotImplementedError, r"only int8 weights", lambda a, b, s: torch_npu.npu_weight_quant_batchmatmul(s, s, s)),
    "gradient": (NotImplementedError, "not differentiable", lambda a, b, s: torch_npu.npu_quant_matmul(a, b, s.requires_grad_(), output_dtype=torch.float32).sum().backward()),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_says_why(name):
    error, text, call = REFUSED[name]
    with pytest.raises(error, match=text):
        call(*put(A, B8, SCALE))


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.qint8, -128, 127), (torch.quint8, 0, 255)])
@pytest.mark.parametrize("divide", [True, False])
def test_quantising_by_given_scales(divide, dtype, low, high):
    x, zero = torch.randn(2, 3, 4) * 100, torch.tensor([1.0, 2.0, 3.0])
    scales = torch.tensor([0.5, 1.0, 2.0])
    scales, zero, axis = (scales, zero, 1) if divide else (scales.repeat(2)[:4], zero.repeat(2)[:4], 7)
    by = (lambda t: t[:, None]) if divide else (lambda t: t)
    want = ((x / by(scales) if divide else x * by(scales)) + by(zero)).round().clamp(low, high)
    got = torch_npu.npu_quantize(*[t.to("npu") for t in (x, scales, zero)], dtype, axis=axis, div_mode=divide)
    assert got.dtype in (torch.int8, torch.uint8)
    torch.testing.assert_close(got.cpu().float(), want)
    with pytest.raises(ValueError, match="scales"):
        torch_npu.npu_quantize(x.to("npu"), torch.ones(5, device="npu"), None, dtype)


def test_swiglu_between_products_of_int8():
    x, weight_scale, rows, smooth = torch.randint(-999, 999, (5, 12), dtype=torch.int32), torch.rand(1, 12) / 99, torch.rand(5), torch.rand(1, 6)
    real = x * weight_scale * rows[:, None]
    for left in (True, False):
        a, b = real.chunk(2, -1) if left else reversed(real.chunk(2, -1))
        out = torch.nn.functional.silu(a) * b * smooth
        q, scale = torch_npu.npu_dequant_swiglu_quant(
            x.to("npu"), weight_scale=weight_scale.to("npu"), activation_scale=rows.to("npu"), quant_scale=smooth.to("npu"), activate_left=left, quant_mode=1
        )
        assert q.dtype == torch.int8
        torch.testing.assert_close(scale.cpu(), out.abs().amax(-1) / 127)
        torch.testing.assert_close(q.cpu() * scale.cpu()[:, None], out, rtol=0, atol=scale.max().item() * 0.51)
    with pytest.raises(NotImplementedError, match="quant_mode=0"):
        torch_npu.npu_dequant_swiglu_quant(x.to("npu"))
    with pytest.raises(ValueError, match="both weight_scale and activation_scale"):
        torch_npu.npu_dequant_swiglu_quant(x.to("npu"), quant_mode=1)


def test_what_small_numbers_cost():
    x, scale, x32 = put(torch.randn(4, 8), torch.ones(8), torch.ones(4, 8, dtype=torch.int32))
    with npu.ledger() as ledger:
        torch_npu.npu_quantize(x, scale, None, torch.qint8, axis=1)
        torch_npu.npu_dequant_swiglu_quant(x32, weight_scale=scale, activation_scale=scale[:4], quant_mode=1)
    given, between = [r.cost for r in ledger.records]
    assert given.vector_flops == 2 * 32 and given.bytes == 4 * 32 + 4 * 8 + 32
    assert between.vector_flops == 3 * 32 + 9 * 16 and between.bytes == 4 * 32 + 4 * 8 + 16 + 4 * 4
