"""The cube's rule: fp16 and bf16 factors, sums in fp32, one rounding. Every product against float64 within that bound."""

import pytest
import torch
import torch.nn.functional as F

HALF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SINGLE = 2.0**-24


def within(got: torch.Tensor, exact: torch.Tensor, total: torch.Tensor, terms: int) -> None:
    """|error| ≤ u·|c| + γ·Σ|a·b|: one rounding to the result's dtype, and a sum of ``terms`` in float32."""
    unit, tiny = HALF[got.dtype], torch.finfo(got.dtype).smallest_normal
    error = (got.detach().cpu().double() - exact).abs()
    bound = unit * exact.abs() + (1 + unit) * terms * SINGLE * total + tiny * unit
    assert (error <= bound).all(), f"{(error / bound).max():.2f} times the bound"


def hand_over(dtype, *shapes):
    return [torch.randn(s).to(dtype) for s in shapes]


M, K, N, B = 17, 1024, 12, 5
PRODUCTS = {
    # operator, shapes, terms in a sum
    "mm": (torch.mm, [(M, K), (K, N)], K),
    "mm of transposed": (lambda a, b: torch.mm(a.t(), b.t()), [(K, M), (N, K)], K),
    "one row": (torch.mm, [(1, K), (K, N)], K),
    "small": (torch.mm, [(5, 7), (7, 3)], 7),
    "bmm": (torch.bmm, [(B, M, K), (B, K, N)], K),
    "matmul": (torch.matmul, [(B, 1, M, K), (2, K, N)], K),
    "mv": (torch.mv, [(M, K), (K,)], K),
    "dot": (torch.dot, [(K,), (K,)], K),
    "addmm": (torch.addmm, [(M, N), (M, K), (K, N)], K + 1),
    "addmm of a row": (torch.addmm, [(N,), (M, K), (K, N)], K + 1),
    "addmv": (torch.addmv, [(M,), (M, K), (K,)], K + 1),
    "baddbmm": (torch.baddbmm, [(B, M, N), (B, M, K), (B, K, N)], K + 1),
    "addbmm": (torch.addbmm, [(M, N), (B, M, K), (B, K, N)], B * K + 1),
    "addbmm in place": (lambda c, a, b: c.clone().addbmm_(a, b), [(M, N), (B, M, K), (B, K, N)], B * K + 1),
    "linear": (F.linear, [(M, K), (N, K)], K),
    "linear with bias": (F.linear, [(B, M, K), (N, K), (N,)], K + 1),
    "einsum": (lambda a, b: torch.einsum("bik,bkj->ij", a, b), [(B, M, K), (B, K, N)], B * K),
    "conv1d": (F.conv1d, [(2, 32, 20), (8, 32, 5), (8,)], 161),
    "conv2d": (F.conv2d, [(2, 16, 9, 9), (8, 16, 3, 3), (8,)], 145),
    "conv2d in groups": (lambda *a: F.conv2d(*a, groups=4), [(2, 16, 9, 9), (8, 4, 3, 3), (8,)], 37),
    "conv2d by channel": (lambda *a: F.conv2d(*a, groups=16), [(2, 16, 12, 12), (16, 1, 5, 5), (16,)], 26),
    "conv_transpose2d": (F.conv_transpose2d, [(2, 16, 9, 9), (16, 8, 3, 3), (8,)], 145),
    "conv3d": (F.conv3d, [(1, 8, 5, 5, 5), (4, 8, 3, 3, 3), (4,)], 217),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_rounded_once(name, dtype):
    call, shapes, terms = PRODUCTS[name]
    tensors = hand_over(dtype, *shapes)
    got = call(*[t.to("npu") for t in tensors])
    assert got.dtype == dtype
    within(got, call(*[t.double() for t in tensors]), call(*[t.double().abs() for t in tensors]), terms)


SUMS = {"linear with bias": M * B, "conv1d": 64, "conv2d": 98, "conv2d in groups": 98, "conv2d by channel": 128, "conv_transpose2d": 242, "conv3d": 108, "mm": K, "addbmm": K}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", SUMS)
def test_gradients_are_rounded_once(name, dtype):
    call, shapes, _ = PRODUCTS[name]
    tensors = hand_over(dtype, *shapes)

    def gradients(inputs, pull):
        inputs = [t.requires_grad_() for t in inputs]
        return torch.autograd.grad(call(*inputs), inputs, pull)

    pull = torch.randn(call(*tensors).shape).to(dtype)
    got = gradients([t.to("npu") for t in tensors], pull.to("npu"))
    exact = gradients([t.double() for t in tensors], pull.double())
    total = gradients([t.double().abs() for t in tensors], pull.double().abs())
    for g, e, t in zip(got, exact, total, strict=True):
        within(g, e, t, max(SUMS[name], 2 * K))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [32, 16])  # PyTorch's flash kernel, and ours
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_rounded_once_at_each_product(dtype, width, causal):
    """The result: probabilities rounded, then the result. Gradients: in the norm within a few roundings, however long T is."""
    T, unit = 1500, HALF[dtype]
    tensors = hand_over(dtype, (1, 2, T, 32), (1, 2, T, 32), (1, 2, T, width))
    pull = torch.randn(1, 2, T, width).to(dtype)
    mine, oracle = [t.to("npu").requires_grad_() for t in tensors], [t.double().requires_grad_() for t in tensors]
    got, exact = (F.scaled_dot_product_attention(*ts, is_causal=causal) for ts in (mine, oracle))
    absolute = F.scaled_dot_product_attention(*[t.detach() for t in oracle[:2]], oracle[2].detach().abs(), is_causal=causal)
    error = (got.detach().cpu().double() - exact.detach()).abs()
    assert (error <= unit * exact.detach().abs() + 2.1 * unit * absolute + 1e-5).all()
    grads, expected = torch.autograd.grad(got, mine, pull.to("npu")), torch.autograd.grad(exact, oracle, pull.double())
    for g, e in zip(grads, expected, strict=True):
        assert (g.cpu().double() - e).norm() <= unit * e.norm()  # uniform rounding errors have norm u/√3; a few of them add up to less than u


def test_float32_is_left_alone():
    c, a, b = hand_over(torch.float32, (M, N), (B, M, K), (B, K, N))
    assert torch.equal(torch.addbmm(*[t.to("npu") for t in (c, a, b)]).cpu(), torch.addbmm(c, a, b))


def test_int8_sums_in_int32():
    a, b = torch.full((17, 4096), 127, dtype=torch.int8), torch.full((4096, 8), -128, dtype=torch.int8)
    got = torch._int_mm(a.to("npu"), b.to("npu"))
    assert got.dtype == torch.int32 and (got.cpu() == -127 * 128 * 4096).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_sums_in_fp32(dtype):
    a, b = torch.randn(16, K).to(dtype), torch.randn(32, K).to(torch.float8_e4m3fn).t()
    one = torch.tensor(1.0, device="npu")
    got = torch._scaled_mm(a.to("npu"), b.to("npu"), one, one, out_dtype=torch.bfloat16)
    within(got, a.double() @ b.double(), a.double().abs() @ b.double().abs(), K)
