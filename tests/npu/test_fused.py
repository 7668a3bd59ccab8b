"""Fused operators against unfused PyTorch in float64: values, gradients, one launch each, FLOPs and bytes by hand."""

import pytest
import torch
import torch.nn.functional as F

from course_lib import npu
from course_lib.npu import torch_npu

N, D, V = 6, 8, 5


def rms(x, gamma, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gamma


def turned(x, cos, sin, interleave):
    a, b = (x[..., ::2], x[..., 1::2]) if interleave else x.chunk(2, -1)
    other = torch.stack((-b, a), -1).flatten(-2) if interleave else torch.cat((-b, a), -1)
    return x * cos + other * sin


def swiglu(x, dim):
    a, b = x.chunk(2, dim)
    return F.silu(a) * b


def geglu(x, how, left):
    a, b = x.chunk(2, -1)
    gate, up = (a, b) if left else (b, a)
    return up * F.gelu(gate, approximate=how)


TARGET, MASK = torch.tensor([1, 4, 0, -100, 2, 2]), torch.rand(N, V, generator=torch.Generator().manual_seed(3)) < 0.3
CASES = {
    # fused call, reference, shapes of the differentiable inputs
    "rms_norm": (lambda x, g: torch_npu.npu_rms_norm(x, g)[0], rms, [(N, D), (D,)]),
    "add_rms_norm": (lambda a, b, g: torch_npu.npu_add_rms_norm(a, b, g)[0], lambda a, b, g: rms(a + b, g), [(2, N, D), (2, N, D), (D,)]),
    "add_rms_norm x": (lambda a, b, g: torch_npu.npu_add_rms_norm(a, b, g)[2] + 0 * g, lambda a, b, g: a + b + 0 * g, [(N, D), (N, D), (D,)]),
    "add_rms_norm both": (lambda a, b, g: sum(torch_npu.npu_add_rms_norm(a, b, g)[::2]), lambda a, b, g: rms(a + b, g) + a + b, [(N, D), (N, D), (D,)]),
    "swiglu": (lambda x: torch_npu.npu_swiglu(x), lambda x: swiglu(x, -1), [(3, N, D)]),
    "swiglu dim": (lambda x: torch_npu.npu_swiglu(x, dim=1), lambda x: swiglu(x, 1), [(3, N, D)]),
    "geglu": (lambda x: torch_npu.npu_geglu(x)[0], lambda x: geglu(x, "tanh", False), [(N, D)]),
    "geglu erf left": (lambda x: torch_npu.npu_geglu(x, approximate=0, activate_left=True)[0], lambda x: geglu(x, "none", True), [(N, D)]),
    "rotary": (lambda *a: torch_npu.npu_rotary_mul(*a), lambda *a: turned(*a, False), [(2, 3, N, D), (1, 1, N, D), (1, 1, N, D)]),
    "rotary interleave": (lambda *a: torch_npu.npu_rotary_mul(*a, rotary_mode="interleave"), lambda *a: turned(*a, True), [(2, N, 3, D), (1, N, 1, D), (1, N, 1, D)]),
    "masked softmax": (lambda x: torch_npu.npu_scaled_masked_softmax(x, MASK.to(x.device), 0.5), lambda x: ((x * 0.5).masked_fill(MASK, -10000.0)).softmax(-1), [(N, V)]),
    "cross entropy": (lambda x: torch_npu.npu_cross_entropy_loss(x, TARGET.to(x.device))[0], lambda x: F.cross_entropy(x, TARGET), [(N, V)]),
    "cross entropy none": (lambda x: torch_npu.npu_cross_entropy_loss(x, TARGET.to(x.device), reduction="none")[0], lambda x: F.cross_entropy(x, TARGET, reduction="none"), [(N, V)]),
}  # fmt: skip
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 1.5])
for how in ("mean", "sum", "none"):
    CASES[f"cross entropy smooth {how}"] = (
        lambda x, how=how: torch_npu.npu_cross_entropy_loss(x, TARGET.to(x.device), WEIGHT.to(x.device), how, label_smoothing=0.2)[0],
        lambda x, how=how: F.cross_entropy(x, TARGET, WEIGHT.double(), reduction=how, label_smoothing=0.2), [(N, V)],
    )  # fmt: skip


def both_ways(call, inputs: list[torch.Tensor]):
    """(result, gradients) of ``call`` with a fixed gradient of the result."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = call(*inputs)
    pull = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, pull)]


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, device):
    fused, reference, shapes = CASES[name]
    inputs = [torch.randn(s) for s in shapes]
    expected = both_ways(reference, [t.double() for t in inputs])
    for got, want in zip(both_ways(fused, [t.to(device) for t in inputs]), expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=2e-5, atol=2e-6)
        assert got.device.type == device and got.dtype == torch.float32


@pytest.mark.parametrize("name", [n for n in CASES if "cross" not in n])
def test_bfloat16_is_rounded_once(name):
    fused, reference, shapes = CASES[name]
    inputs = [torch.randn(s).bfloat16() for s in shapes]
    want = reference(*[t.double() for t in inputs])
    got = fused(*[t.to("npu") for t in inputs]).cpu()
    assert got.dtype == torch.bfloat16
    roundings = 3 if "add" in name else 1  # the sum is a result too: rounded, then normed; the test itself adds another
    torch.testing.assert_close(got.double(), want, rtol=roundings * 2**-8 * 1.01, atol=2**-12 if roundings == 1 else 2**-5)


def records(call) -> dict[str, tuple[int, int]]:
    """Fused operators launched by ``call``, in order: (vector FLOPs, bytes)."""
    with npu.ledger() as ledger:
        call()
    return {r.op: (r.cost.vector_flops, r.cost.bytes) for r in ledger.records if r.op.startswith("npu_")}


def on_npu(*shapes, dtype=torch.float32):
    return [torch.randn(s, device="npu", dtype=dtype).requires_grad_() for s in shapes]


def step(out: torch.Tensor) -> None:
    out.backward(torch.ones_like(out))


X, W, R = N * D * 4, D * 4, N * 4  # bytes of (N, D), (D,), (N, 1)
LOSS = N * V * 4
LAUNCHES = {
    "rms": (lambda: step(torch_npu.npu_rms_norm(*on_npu((N, D), (D,)))[0]),
            {"npu_rms_norm": (4 * N * D, 2 * X + W + R), "npu_rms_norm_backward": (8 * N * D, 3 * X + 2 * W + R)}),
    "add rms": (lambda: step(torch_npu.npu_add_rms_norm(*on_npu((N, D), (N, D), (D,)))[0]),
                {"npu_add_rms_norm": (5 * N * D, 4 * X + W + R), "npu_add_rms_norm_backward": (9 * N * D, 3 * X + 2 * W + R)}),
    "swiglu": (lambda: step(torch_npu.npu_swiglu(*on_npu((N, D)))),
               {"npu_swiglu": (5 * N * D // 2, X + X // 2), "npu_swiglu_backward": (5 * N * D, 2 * X + X // 2)}),
    "rotary": (lambda: step(torch_npu.npu_rotary_mul(on_npu((N, D))[0], *[t.detach() for t in on_npu((1, D), (1, D))])),
               {"npu_rotary_mul": (3 * N * D, 2 * X + 2 * W), "npu_rotary_mul_backward": (3 * N * D, 2 * X + 2 * W)}),
    "cross entropy": (lambda: torch_npu.npu_cross_entropy_loss(*on_npu((N, V)), TARGET.to("npu"))[0].backward(),
                      {"npu_cross_entropy_loss": (5 * N * V, 2 * LOSS + 8 * N + 4), "npu_cross_entropy_loss_backward": (4 * N * V, 2 * LOSS + 8 * N + 4)}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_one_launch_with_flops_and_bytes_by_hand(name):
    program, expected = LAUNCHES[name]
    assert records(program) == expected


def test_nothing_but_the_fused_launches():
    x, g = on_npu((N, D), (D,))
    with npu.ledger() as ledger:
        step(torch_npu.npu_rms_norm(x, g)[0])
    assert [r.op for r in ledger.records] == ["npu_rms_norm", "ones_like", "npu_rms_norm_backward"]


def test_no_intermediate_in_device_memory():
    rows = 512
    (x,) = on_npu((rows, 2 * rows))
    before = torch.npu.memory_allocated()
    with npu.ledger() as ledger:
        torch_npu.npu_swiglu(x)
    assert ledger.peak_memory() == before + x.nbytes // 2


def test_adamw_equals_pytorchs():
    w, grad = torch.randn(5, 3), torch.randn(5, 3)
    plain = torch.nn.Parameter(w.clone())
    optimizer = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), amsgrad=True)
    p, m, v, vmax = (t.to("npu") for t in (w, torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(5, 3)))
    for t in range(1, 4):
        plain.grad = grad * t
        optimizer.step()
        with npu.ledger() as ledger:
            out = torch_npu.npu_apply_adam_w(0.8 ** (t - 1), 0.9 ** (t - 1), 0.1, 0.2, 0.8, 0.9, 1e-8, (grad * t).to("npu"), vmax, True, False, out=(p, m, v))
        assert out[0] is p and [r.op for r in ledger.records][-1] == "npu_apply_adam_w"
    torch.testing.assert_close(p.cpu(), plain.detach())
    torch_npu.npu_apply_adam_w(0.8, 0.9, 0.1, 0.0, 0.8, 0.9, 1e-8, grad.to("npu"), None, False, True, out=(p, m, v))
    assert (p.cpu() != plain.detach()).any()


REFUSED = {
    "z-loss": (NotImplementedError, "z-loss", lambda x: torch_npu.npu_cross_entropy_loss(x, TARGET.to("npu"), return_zloss=True)),
    "rotate": (NotImplementedError, r"npu_rotary_mul\(rotate=", lambda x: torch_npu.npu_rotary_mul(x, x, x, rotate=x)),
    "triangle": (NotImplementedError, "fixed_triu_mask=True", lambda x: torch_npu.npu_scaled_masked_softmax(x, x > 0, 1.0, True)),
    "odd": (ValueError, "must be even", lambda x: torch_npu.npu_swiglu(x[:, :5])),
    "mode": (ValueError, "quarter", lambda x: torch_npu.npu_rotary_mul(x, x, x, "quarter")),
    "broadcast": (ValueError, "equal shapes", lambda x: torch_npu.npu_add_rms_norm(x, x[:1], x[0])),
    "amsgrad": (ValueError, "max_grad_norm", lambda x: torch_npu.npu_apply_adam_w(1, 1, 1, 1, 1, 1, 1, x, None, True, False, out=(x, x, x))),
    "unknown": (AttributeError, "npu_rms_norm", lambda x: torch_npu.npu_no_such_thing),
    "twice": (NotImplementedError, "not differentiable", lambda x: torch.autograd.grad(torch.autograd.grad(torch_npu.npu_swiglu(x).sum(), x, create_graph=True)[0].sum(), x)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_says_why(name):
    error, text, call = REFUSED[name]
    with pytest.raises(error, match=text):
        call(*on_npu((N, D)))


def test_the_rest_of_the_module():
    x = torch.randn(4, 6, device="npu")
    assert torch_npu.npu is torch.npu
    assert torch_npu.npu_dtype_cast(x, torch.float16).dtype == torch.float16
    assert torch_npu.npu_format_cast(x, 29) is x and torch_npu.get_npu_format(x) == 2
    assert torch_npu.npu_confusion_transpose(x, (1, 0), (3, 8), True).shape == (3, 8)
    assert torch_npu.npu_confusion_transpose(x, (1, 0), (3, 8), False).shape == (8, 3)
    assert torch.equal(torch_npu.npu_linear(x, x).cpu(), F.linear(x.cpu(), x.cpu()))


@pytest.mark.parametrize("name", CASES)
def test_shapes_follow_without_numbers(name):
    fused, reference, shapes = CASES[name]
    inputs = [torch.randn(s) for s in shapes]
    shapes_of = [t.shape for t in both_ways(fused, inputs)]
    assert [t.shape for t in both_ways(fused, [t.to("meta") for t in inputs])] == shapes_of
