"""torch.autocast("npu") and GradScaler: the operator lists of CUDA, and the numbers of the CPU."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from course_lib.npu import amp

F = torch.nn.functional
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def test_the_lists_are_pytorchs_for_cuda() -> None:
    theirs = {name.removeprefix("aten::") for name in torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")}
    theirs = {name for name in theirs if "cudnn" not in name and "::" not in name}
    assert set(amp.kernels()) == theirs


def like(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.rand(*shape, device="npu").to(dtype)


LOW = {
    "mm": lambda d: like(3, 3, dtype=d) @ like(3, 3), "bmm": lambda d: torch.bmm(like(2, 3, 3, dtype=d), like(2, 3, 3)), "addmm": lambda d: torch.addmm(like(3), like(3, 3), like(3, 3, dtype=d)),
    "linear": lambda d: F.linear(like(2, 3, dtype=d), like(3, 3), like(3)), "conv1d": lambda d: F.conv1d(like(1, 3, 5, dtype=d), like(2, 3, 2)),
    "conv2d": lambda d: F.conv2d(like(1, 3, 5, 5, dtype=d), like(2, 3, 2, 2)), "conv_transpose2d": lambda d: F.conv_transpose2d(like(1, 3, 5, 5, dtype=d), like(3, 2, 2, 2)),
    "einsum": lambda d: torch.einsum("ij,jk->ik", like(3, 3, dtype=d), like(3, 3)), "mv": lambda d: torch.mv(like(3, 3, dtype=d), like(3)), "prelu": lambda d: F.prelu(like(3, dtype=d), like(1)),
    "attention": lambda d: F.scaled_dot_product_attention(like(1, 1, 4, 4, dtype=d), like(1, 1, 4, 4), like(1, 1, 4, 4)), "multi_dot": lambda d: torch.linalg.multi_dot([like(3, 3, dtype=d), like(3, 3)]),
    "gru_cell": lambda d: torch.nn.GRUCell(3, 3, device="npu")(like(2, 3, dtype=d)),
}  # fmt: skip
FLOAT = {
    "softmax": lambda d: like(3, 3, dtype=d).softmax(-1), "log_softmax": lambda d: like(3, 3, dtype=d).log_softmax(-1), "sum": lambda d: like(3, dtype=d).sum(),
    "sum of rows": lambda d: like(3, 3, dtype=d).sum(0), "prod": lambda d: like(3, dtype=d).prod(), "cumsum": lambda d: like(3, dtype=d).cumsum(0), "exp": lambda d: like(3, dtype=d).exp(),
    "log": lambda d: like(3, dtype=d).log(), "pow": lambda d: like(3, dtype=d) ** 3, "pow of 2": lambda d: 2.0 ** like(3, dtype=d), "rsqrt": lambda d: like(3, dtype=d).rsqrt(),
    "norm": lambda d: like(3, dtype=d).norm(), "norm of rows": lambda d: torch.norm(like(3, 3, dtype=d), 2, 1), "vector_norm": lambda d: torch.linalg.vector_norm(like(3, dtype=d)),
    "layer_norm": lambda d: F.layer_norm(like(2, 3, dtype=d), (3,), like(3), like(3)), "group_norm": lambda d: F.group_norm(like(2, 4, 3, dtype=d), 2),
    "cross_entropy": lambda d: F.cross_entropy(like(3, 3, dtype=d), torch.tensor([0, 1, 2], device="npu")), "nll_loss": lambda d: F.nll_loss(like(3, 3, dtype=d), torch.tensor([0, 1, 2], device="npu")),
    "mse_loss": lambda d: F.mse_loss(like(3, dtype=d), like(3)), "bce_with_logits": lambda d: F.binary_cross_entropy_with_logits(like(3, dtype=d), like(3)),
    "cosine_similarity": lambda d: F.cosine_similarity(like(2, 3, dtype=d), like(2, 3)), "cdist": lambda d: torch.cdist(like(2, 3, dtype=d), like(2, 3)), "logsumexp": lambda d: like(3, dtype=d).logsumexp(0),
    "softplus": lambda d: F.softplus(like(3, dtype=d)), "interpolate": lambda d: F.interpolate(like(1, 1, 4, 4, dtype=d), scale_factor=2, mode="bilinear"),
}  # fmt: skip
WIDE = {
    "addcmul": lambda d: torch.addcmul(like(3, dtype=d), like(3, dtype=d), like(3)), "addcdiv": lambda d: torch.addcdiv(like(3, dtype=d), like(3, dtype=d), like(3)),
    "atan2": lambda d: torch.atan2(like(3, dtype=d), like(3)), "cross": lambda d: torch.cross(like(3, dtype=d), like(3), dim=0),
    "dot": lambda d: torch.dot(like(3, dtype=d), like(3)), "tensordot": lambda d: torch.tensordot(like(3, 3, dtype=d), like(3, 3), 1), "bilinear": lambda d: F.bilinear(like(2, 3, dtype=d), like(2, 3), like(2, 3, 3)),
    "index_put": lambda d: like(3).index_put((torch.tensor([0], device="npu"),), like(1, dtype=d)), "scatter_add": lambda d: like(3).scatter_add(0, torch.tensor([0], device="npu"), like(1, dtype=d)),
    "grid_sample": lambda d: F.grid_sample(like(1, 1, 4, 4, dtype=d), like(1, 2, 2, 2), align_corners=False), "cat": lambda d: torch.cat([like(3, dtype=d), like(3)]), "stack": lambda d: torch.stack([like(3, dtype=d), like(3)]),
}  # fmt: skip


@pytest.mark.parametrize("low", [BF16, F16])
def test_dtypes(low: torch.dtype) -> None:
    found, wanted = {}, {}
    with torch.autocast("npu", dtype=low):
        for cases, result in ((LOW, low), (FLOAT, F32), (WIDE, F32)):
            found |= {(name, d): call(d).dtype for name, call in cases.items() for d in (low, F32)}
            wanted |= {(name, d): result for name in cases for d in (low, F32)}
    assert found == wanted


def test_what_is_not_listed_keeps_its_dtype() -> None:
    with torch.autocast("npu", dtype=BF16):
        assert (like(3, dtype=BF16) + like(3, dtype=BF16)).dtype is BF16 and F.gelu(like(3)).dtype is F32
        assert like(3, dtype=BF16).sum(dtype=BF16).dtype is BF16  # an explicit dtype wins
        assert like(3, dtype=torch.float64).exp().dtype is torch.float64  # float64 is left alone
        assert (torch.ones(3, dtype=torch.int64, device="npu").sum()).dtype is torch.int64
        with pytest.raises(RuntimeError, match="Unexpected floating ScalarType"):
            torch.dot(like(3, dtype=F16), like(3, dtype=F16))
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(like(3), like(3))
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is F32  # the host has its own autocast


def test_switches() -> None:
    assert torch.get_autocast_dtype("npu") is F16 and not torch.is_autocast_enabled("npu")
    with torch.autocast("npu"):
        assert (like(2, 2) @ like(2, 2)).dtype is F16 and torch.npu.is_autocast_enabled()
        with torch.autocast("npu", dtype=BF16):
            assert (like(2, 2) @ like(2, 2)).dtype is BF16 and torch.npu.get_autocast_dtype() is BF16
            with torch.autocast("npu", enabled=False):
                assert (like(2, 2) @ like(2, 2)).dtype is F32 and not torch.is_autocast_enabled("npu")
            assert torch.is_autocast_enabled("npu")
        assert (like(2, 2) @ like(2, 2)).dtype is F16
    with torch.npu.amp.autocast(dtype=BF16):
        assert (like(2, 2) @ like(2, 2)).dtype is BF16
    with pytest.warns(UserWarning, match="only supports dtypes"), torch.autocast("npu", dtype=torch.float64):
        assert (like(2, 2) @ like(2, 2)).dtype is F32


def test_a_weight_is_cast_once() -> None:
    weight, x = torch.nn.Parameter(like(256, 256)), like(4, 256, dtype=BF16)
    with torch.autocast("npu", dtype=BF16):
        before = torch.npu.memory_allocated()
        first = F.linear(x, weight)
        cast = torch.npu.memory_allocated() - before - first.numel() * 2
        assert cast == weight.numel() * 2  # the copy stays
        with torch.no_grad():
            assert not F.linear(x, weight).requires_grad
        second = F.linear(x, weight)
    del first, second
    assert torch.npu.memory_allocated() == before  # and goes with the region
    with torch.autocast("npu", dtype=BF16, cache_enabled=False):
        y = F.linear(x, weight)
    assert not amp._casts
    y.sum().backward()
    assert weight.grad.dtype is F32


def test_weights_that_have_changed_are_cast_anew() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2, device="npu"))
    for value in (1.0, 2.0):
        with torch.no_grad():
            weight.fill_(value)
        with torch.autocast("npu", dtype=BF16):
            assert (torch.ones(2, 2, device="npu") @ weight).tolist() == [[2 * value] * 2] * 2


# -- whole steps, against the CPU ----------------------------------------------------------------------


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 8))


def step(device: str, run=lambda m, x: m(x)) -> tuple[float, list[torch.Tensor]]:
    m, x, y = model().to(device), torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).to(device), torch.arange(6).to(device)
    with torch.autocast(device, dtype=BF16):
        loss = F.cross_entropy(run(m, x), y)
    loss.backward()
    return loss.item(), [p.grad.cpu() for p in m.parameters()]


@pytest.mark.parametrize("run", [lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=False), lambda m, x: torch.compile(m, backend="eager")(x)], ids=["plain", "checkpoint", "compile"])
def test_a_step_gives_the_cpus_numbers(run) -> None:
    loss, gradients = step("npu", run)
    expected, expected_gradients = step("cpu")
    assert loss == pytest.approx(expected, abs=0.02)
    for a, b in zip(gradients, expected_gradients):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.05)


def test_checkpointing_changes_nothing() -> None:
    (loss, gradients), (again, gradients_again) = step("npu"), step("npu", lambda m, x: checkpoint(m, x, use_reentrant=False))
    assert loss == again
    for a, b in zip(gradients, gradients_again):
        assert torch.equal(a, b)


def test_recurrent_and_attention_layers() -> None:
    with torch.autocast("npu", dtype=BF16):
        for layer in (torch.nn.LSTM(4, 4), torch.nn.GRU(4, 4)):
            assert layer.to("npu")(like(3, 2, 4))[0].dtype is BF16
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).to("npu")
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                assert layer(like(2, 3, 8)).dtype is F32


def test_custom_functions() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="npu", cast_inputs=F32)
        def forward(ctx, x):
            assert x.dtype is F32 and not torch.is_autocast_enabled("npu")
            return x @ x

        @staticmethod
        @torch.amp.custom_bwd(device_type="npu")
        def backward(ctx, grad):
            assert not torch.is_autocast_enabled("npu")
            return grad @ grad

    x = like(2, 2, dtype=F16).requires_grad_()
    with torch.autocast("npu", dtype=F16):
        y = Double.apply(x)
    y.sum().backward()
    assert y.dtype is F32 and x.grad.dtype is F16


# -- GradScaler ---------------------------------------------------------------------------------------


def scaled(device: str, fused: bool = False) -> list[tuple[float, float]]:
    """(loss, scale) by step; the gradients of step 2 are infinite, those of step 4 are nan."""
    m = model().to(device)
    optimizer = torch.optim.AdamW(m.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8, growth_interval=2)
    out, data = [], torch.Generator().manual_seed(1)
    for i in range(7):
        x = torch.randn(6, 16, generator=data).to(device)
        loss = m(x).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss * {2: float("inf"), 4: float("nan")}.get(i, 1.0)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        out.append((loss.item(), scaler.get_scale()))
        state = scaler.state_dict()
        scaler = torch.amp.GradScaler(device, init_scale=2.0**8, growth_interval=2)
        scaler.load_state_dict(state)
    return out


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_skips_grows_and_backs_off(fused: bool) -> None:
    ours, cpus = scaled("npu", fused), scaled("cpu")
    assert [scale for _, scale in ours] == [scale for _, scale in cpus] == [256, 512, 256, 256, 128, 128, 256]
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in cpus], rel=1e-4)


def test_scaler_of_older_programs() -> None:
    scaler = torch.npu.amp.GradScaler(init_scale=4.0)
    assert scaler.scale(torch.ones((), device="npu")).item() == 4.0 and isinstance(scaler, torch.amp.GradScaler)
