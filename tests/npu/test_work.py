"""FLOPs and bytes of every class of operators, by hand and against PyTorch's own counter."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from course_lib import npu
from course_lib.npu import runtime
from course_lib.npu.work import ADAMW, attention_pairs, product

I64 = torch.int64


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="npu")


def run(program) -> npu.Ledger:
    with npu.ledger() as ledger:
        program()
    return ledger


def last(program):
    """The last operator that ``program`` launched."""
    return run(program).records[-1]


def counts(program) -> tuple[int, int, int]:
    """(cube FLOPs, vector operations, bytes) of the last operator."""
    paid = last(program).cost
    return paid.cube_flops, paid.vector_flops, paid.bytes


# -- products ----------------------------------------------------------------------------------------

M, K, N, B = 64, 32, 16, 3
A, W, V = (M, K), (K, N), (K,)
PRODUCTS = {
    "mm": (lambda: zeros(*A) @ zeros(*W), 2 * M * K * N, 0, M * K + K * N + M * N),
    "addmm": (lambda: torch.addmm(zeros(N), zeros(*A), zeros(*W)), 2 * M * K * N, M * N, N + M * K + K * N + M * N),
    "bmm": (lambda: torch.bmm(zeros(B, *A), zeros(B, *W)), 2 * B * M * K * N, 0, B * (M * K + K * N + M * N)),
    "baddbmm": (lambda: torch.baddbmm(zeros(B, M, N), zeros(B, *A), zeros(B, *W)), 2 * B * M * K * N, B * M * N, B * (M * K + K * N + 2 * M * N)),
    "mv": (lambda: zeros(*A) @ zeros(*V), 2 * M * K, 0, M * K + K + M),
    "dot": (lambda: zeros(K) @ zeros(K), 2 * K, 0, 2 * K + 1),
    "linear": (lambda: F.linear(zeros(B, M, K), zeros(N, K), zeros(N)), 2 * B * M * K * N, B * M * N, B * M * K + N * K + N + B * M * N),
    "linear without bias": (lambda: F.linear(zeros(M, K), zeros(N, K)), 2 * M * K * N, 0, M * K + N * K + M * N),
    "a matrix with itself": (lambda: (lambda x: x @ x)(zeros(M, M)), 2 * M**3, 0, 2 * M * M),
    "einsum": (lambda: torch.einsum("mk,kn->mn", zeros(*A), zeros(*W)), 2 * M * K * N, 0, M * K + K * N + M * N),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name) -> None:
    program, cube, vector, elements = PRODUCTS[name]
    assert counts(program) == (cube, vector, 4 * elements)


def test_smaller_dtypes_move_fewer_bytes() -> None:
    assert counts(lambda: zeros(*A, dtype=torch.bfloat16) @ zeros(*W, dtype=torch.bfloat16)) == (2 * M * K * N, 0, 2 * (M * K + K * N + M * N))
    assert counts(lambda: zeros(*A, dtype=torch.int8) @ zeros(*W, dtype=torch.int8)) == (2 * M * K * N, 0, M * K + K * N + M * N)
    assert counts(lambda: zeros(*A, dtype=torch.complex64) @ zeros(*W, dtype=torch.complex64))[0] == 8 * M * K * N, "four real products"


CONVOLUTIONS = {  # (x, weight, options, cube FLOPs)
    "plain": (F.conv2d, (2, 4, 8, 8), (6, 4, 3, 3), {}, 2 * (2 * 6 * 6) * (4 * 9) * 6),
    "groups": (F.conv2d, (2, 4, 8, 8), (6, 2, 3, 3), {"groups": 2}, 2 * (2 * 6 * 6) * (2 * 9) * 6),
    "stride and padding": (F.conv2d, (2, 4, 8, 8), (6, 4, 3, 3), {"stride": 2, "padding": 1}, 2 * (2 * 4 * 4) * (4 * 9) * 6),
    "one dimension": (F.conv1d, (2, 4, 8), (6, 4, 3), {}, 2 * (2 * 6) * (4 * 3) * 6),
    "transposed": (F.conv_transpose2d, (2, 4, 8, 8), (4, 3, 3, 3), {"groups": 2}, 2 * (2 * 8 * 8) * (3 * 9) * 4),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name) -> None:
    function, x, weight, options, flops = CONVOLUTIONS[name]
    x, weight = zeros(*x).requires_grad_(), zeros(*weight).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ledger = run(lambda: function(x, weight, **options).sum().backward())
    forward, backward = (next(r for r in ledger.records if r.op == name) for name in ("convolution", "convolution_backward"))
    out = function(x, weight, **options)
    assert forward.cost.cube_flops == flops and forward.cost.bytes == 4 * (x.numel() + weight.numel() + out.numel())
    assert backward.cost.cube_flops == 2 * flops, "one product for the input, one for the weight"
    if "groups" not in options:  # which the counter forgets in the gradient of the weight
        assert counter.get_total_flops() == 3 * flops


def test_a_bias_of_a_convolution_is_one_addition_a_pixel() -> None:
    assert counts(lambda: F.conv2d(zeros(1, 2, 5, 5), zeros(3, 2, 3, 3), zeros(3)))[1] == 3 * 3 * 3


class Gram(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, x.mT).softmax(-1) @ x


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False)), (5, 7, 8)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, stride=2)), (2, 8, 6, 6)),
    "gru": (lambda: nn.GRU(8, 4, num_layers=2), (5, 2, 8)),
    "bilinear": (lambda: Gram(), (3, 5, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_agree_with_pytorchs_counter(name) -> None:
    build, shape = MODELS[name]
    model, x = build(), torch.zeros(shape, requires_grad=True)
    there, y = build().to("npu"), torch.zeros(shape, device="npu", requires_grad=True)

    def step(model: nn.Module, x: torch.Tensor) -> None:
        out = model(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step(model, x)
    assert run(lambda: step(there, y)).totals().cube_flops == counter.get_total_flops() > 0


# -- attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, S", [(1, 1), (2, 2), (7, 7), (64, 64), (5, 9), (9, 5), (1, 8), (8, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_of_queries_and_keys(T: int, S: int, causal: bool) -> None:
    needed = sum(1 for t in range(T) for s in range(S) if not causal or s <= t)
    rows, columns = attention_pairs(T, S, causal)
    assert needed <= rows * columns < needed + T, "whole rows, so that it stays a product"
    if T == S:
        assert rows * columns == needed


def attend(T: int, S: int, H: int = 4, groups: int = 4, causal: bool = False, grad: bool = False):
    q = torch.randn(2, H, T, 8, device="npu", requires_grad=grad)
    k, v = (torch.randn(2, groups, S, 8, device="npu", requires_grad=grad) for _ in range(2))
    return run(lambda: (lambda y: y.sum().backward() if grad else y)(F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=groups != H)))


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("causal, pairs", [(False, 16 * 16), (True, 16 * 17 // 2)])
def test_attention_forward_and_backward(causal, pairs, groups) -> None:
    product = 2 * 2 * 4 * pairs * 8  # 2 · B · H · pairs · K
    forward, *_, backward = (r for r in attend(16, 16, groups=groups, causal=causal, grad=True).records if "attention" in r.op)
    assert forward.cost.cube_flops == 2 * product, "QKᵀ and PV"
    assert backward.cost.cube_flops == 5 * product, "QKᵀ again, dV, dP, dQ, dK"
    assert forward.cost.vector_flops == backward.cost.vector_flops == 5 * 2 * 4 * pairs


def test_attention_moves_no_scores() -> None:
    q, kv, statistics = 2 * 4 * 16 * 8, 2 * 2 * 16 * 8, 2 * 4 * 16
    assert attend(16, 16, groups=2).records[0].cost.bytes == 4 * (q + 2 * kv + q + statistics)


def test_decoding_reads_the_whole_cache_for_one_query() -> None:
    paid = attend(1, 16).records[0].cost
    assert paid.cube_flops == 2 * 2 * 2 * 4 * 1 * 16 * 8
    assert paid.bytes == 4 * (2 * 64 + 2 * 2 * 4 * 16 * 8 + 2 * 4)


def test_attention_memory_is_linear_in_tokens() -> None:
    def peak(T: int) -> int:
        torch.npu.reset_peak_memory_stats()
        before = torch.npu.memory_allocated()
        attend(T, T, causal=True, grad=True)
        return torch.npu.max_memory_allocated() - before

    assert peak(512) == pytest.approx(2 * peak(256), rel=0.05)


# -- elementwise, reductions, normalisation ------------------------------------------------------------

n = 64 * 32
ELEMENTWISE = {
    "add a number": (lambda x: x + 1, n, 2 * n),
    "add": (lambda x: x + zeros(64, 32), n, 3 * n),
    "with itself": (lambda x: x * x, n, 2 * n),
    "with its own view": (lambda x: x[:10] * x[:10], 320, 2 * 320),
    "with another part of itself": (lambda x: x[:10] * x[10:20], 320, 3 * 320),
    "in place": (lambda x: x.add_(1), n, 2 * n),
    "in place with itself": (lambda x: x.add_(x), n, 2 * n),
    "into out": (lambda x: torch.add(x, x, out=torch.empty_like(x)), n, 2 * n),
    "with a row": (lambda x: x + zeros(32), n, 2 * n + 32),
    "with an expanded row": (lambda x: x + zeros(1, 32).expand(64, 32), n, 2 * n + 32),
    "an expanded row alone": (lambda x: zeros(1, 32).expand(64, 32) * 2, n, n + 32),
    "with a host scalar": (lambda x: x * torch.tensor(2.0), n, 2 * n),
    "exp": (lambda x: x.exp(), n, 2 * n),
    "sigmoid": (lambda x: x.sigmoid(), 3 * n, 2 * n),
    "silu": (lambda x: F.silu(x), 4 * n, 2 * n),
    "addcmul": (lambda x: torch.addcmul(x, x, x), 3 * n, 2 * n),
    "sum": (lambda x: x.sum(), n, n + 1),
    "mean over a dimension": (lambda x: x.mean(1), n, n + 64),
    "norm": (lambda x: x.norm(), 2 * n, n + 1),
    "var": (lambda x: x.var(0), 3 * n, n + 32),
    "softmax": (lambda x: x.softmax(-1), 5 * n, 2 * n),
    "layer norm": (lambda x: F.layer_norm(x, (32,)), 8 * n, 2 * n + 2 * 64),
    "rms norm": (lambda x: F.rms_norm(x, (32,), zeros(32)), 4 * n, 2 * n + 32 + 64),
    "copy": (lambda x: x.clone(), 0, 2 * n),
    "overwrite": (lambda x: x.zero_(), 0, n),
    "copy into": (lambda x: x.copy_(zeros(64, 32)), 0, 2 * n),
    "transpose for real": (lambda x: x.t().contiguous(), 0, 2 * n),
    "cat": (lambda x: torch.cat([x, x]), 0, 3 * n),
    "triu": (lambda x: x.triu(), 0, 2 * n),
    "random": (lambda x: x.uniform_(), n, n),
    "several at once": (lambda x: torch._foreach_add_([x, zeros(10)], 1.0), n + 10, 2 * (n + 10)),
    "several norms": (lambda x: torch._foreach_norm([x, zeros(10)]), 2 * (n + 10), n + 10 + 2),
    "nothing": (lambda x: zeros(0, 3) + 1, 0, 0),
    "max pool": (lambda x: F.max_pool2d(zeros(1, 1, 8, 8), 3, stride=1), 9 * 36, 64 + 36 + 2 * 36),  # indices are int64
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_vector_operators(name) -> None:
    program, vector, elements = ELEMENTWISE[name]
    x = zeros(64, 32)
    assert counts(lambda: program(x)) == (0, vector, 4 * elements)


def test_what_is_remembered_of_one_call_does_not_price_another() -> None:
    x = zeros(64, 32)
    pairs = [(lambda: x[:10] * x[:10], lambda: x[:10] * x[10:20]), (lambda: x * 2.0, lambda: x * torch.tensor(2.0)), (lambda: x * x, lambda: x * zeros(64, 32))]
    for first, second in pairs:
        one = counts(first), counts(second)
        npu.use("mini")
        assert (counts(second), counts(first)) == one[::-1]


def test_casts_move_both_sizes() -> None:
    x = zeros(64, 32)
    assert counts(lambda: x.half()) == (0, 0, 6 * n)
    assert counts(lambda: x > 0) == (0, n, 5 * n)


# -- tables and indices --------------------------------------------------------------------------------

ids = 5
LOOKUPS = {
    "embedding": (lambda t, i: F.embedding(i, t), 0, 8 * ids + 2 * 32 * ids),
    "index": (lambda t, i: t[i], 0, 8 * ids + 2 * 32 * ids),
    "index_select": (lambda t, i: t.index_select(0, i), 0, 8 * ids + 2 * 32 * ids),
    "gather": (lambda t, i: t.gather(0, i[:, None].expand(-1, 8)), 0, 8 * ids + 2 * 32 * ids),
    "put": (lambda t, i: t.index_put_((i,), zeros(ids, 8)), 0, 8 * ids + 2 * 32 * ids),
    "put a number": (lambda t, i: t.__setitem__(i, 1.0), 0, 8 * ids + 4 + 32 * ids),
    "put columns": (lambda t, i: t.__setitem__((slice(None), i), 1.0), 0, 8 * ids + 4 + 4 * 1000 * ids),
    "add to rows": (lambda t, i: t.index_add_(0, i, zeros(ids, 8)), 8 * ids, 8 * ids + 3 * 32 * ids),
    "put and add": (lambda t, i: t.index_put_((i,), zeros(ids, 8), accumulate=True), 8 * ids, 8 * ids + 3 * 32 * ids),
    "add to rows of a copy": (lambda t, i: t.index_add(0, i, zeros(ids, 8)), 8 * ids, 8 * ids + 32 * ids + 2 * 32_000),
    "backward of embedding": (lambda t, i: torch.ops.aten.embedding_dense_backward(zeros(ids, 8), i, 1000, -1, False), 8 * ids, 8 * ids + 32 * ids + 32_000),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_tables_are_touched_only_where_they_are_looked_up(name) -> None:
    program, vector, nbytes = LOOKUPS[name]
    table, index = zeros(1000, 8), torch.zeros(ids, dtype=I64, device="npu")
    assert counts(lambda: program(table, index)) == (0, vector, nbytes)


def test_cross_entropy() -> None:
    scores, target = zeros(6, 100).requires_grad_(), torch.zeros(6, dtype=I64, device="npu")
    ledger = run(lambda: F.cross_entropy(scores, target).backward())
    paid = {r.op: (r.cost.vector_flops, r.cost.bytes) for r in ledger.records}
    assert paid["_log_softmax"] == (5 * 600, 2 * 2400)
    assert paid["nll_loss_forward"] == (6, 6 * 4 + 6 * 8 + 2 * 4), "one score of each row; loss and weight"
    assert paid["nll_loss_backward"][0] == 0 and paid["_log_softmax_backward_data"][0] == 4 * 600


# -- optimizers and transfers --------------------------------------------------------------------------


def test_fused_adamw_is_one_kernel_over_all_states() -> None:
    model = nn.Linear(10, 20).to("npu")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(zeros(1, 10)).sum().backward()
    optimizer.step()
    paid = last(optimizer.step)
    N = 220
    assert paid.op == "_fused_adamw" and paid.cost.vector_flops == ADAMW * N
    assert paid.cost.bytes == 4 * (4 * N + 3 * N), "reads weights, gradients and two moments; writes all but gradients"


def test_foreach_adamw_costs_more_traffic_than_fused() -> None:
    def step_bytes(**options: bool) -> int:
        model = nn.Linear(32, 32).to("npu")
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        model(zeros(1, 32)).sum().backward()
        optimizer.step()
        return run(optimizer.step).totals().bytes

    assert step_bytes(foreach=True) > 2.5 * step_bytes(fused=True)


def test_transfers_use_the_link_and_not_the_memory() -> None:
    npu.use("mini")
    x = zeros(1000)
    for program, op in ((lambda: x.cpu(), "copy_device_to_host"), (lambda: torch.zeros(1000).to("npu"), "copy_host_to_device")):
        record = last(program)
        assert record.op == op and record.cost.bytes == 0 and record.cost.host_link_ps > 0
    assert last(lambda: x[0].item()).op == "item"


def test_what_is_remembered_holds_no_tensors() -> None:
    def program() -> None:
        x, i = zeros(8, 4), torch.zeros(2, dtype=I64, device="npu")
        x[i] = 1.0
        F.conv2d(zeros(1, 1, 4, 4), zeros(1, 1, 2, 2))
        attend(4, 4, causal=True, grad=True)

    def state() -> tuple[int, int]:
        gc.collect()
        return torch.npu.memory_allocated(), len(runtime.devices[0].costs)

    program()
    once = state()
    program()
    assert state() == once


def test_float4_lies_two_to_an_element() -> None:
    packed = product(1, 8, 16, 8, torch.float4_e2m1fn_x2)
    assert packed.k == 2 * product(1, 8, 16, 8, torch.bfloat16).k
