"""The ledger: phases and modules found by themselves, sums that agree, memory by category against a hand count."""

import json
from collections import Counter, defaultdict

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_hooks
from torch.optim import optimizer as optim_hooks
from torch.utils.checkpoint import checkpoint

from course_lib import npu
from course_lib.npu.where import where

KIB = 1024


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 64, bias=False)).to("npu")
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: int = 128, clip: bool = True) -> None:
    x = torch.randn(rows, 64).to("npu")
    loss = model(x).square().mean()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def ledger() -> npu.Ledger:
    model, optimizer = make()
    step(model, optimizer)
    torch.npu.reset_peak_memory_stats()
    with npu.ledger() as ledger:
        step(model, optimizer)
    ledger.torch_peak = torch.npu.max_memory_allocated()
    return ledger


def phases(ledger: npu.Ledger) -> dict[str, set[str]]:
    found = defaultdict(set)
    for record in ledger.records:
        found[record.op].add(record.phase)
    return found


# -- phases and modules --------------------------------------------------------------------------------


def test_phases_are_found(ledger) -> None:
    of = phases(ledger)
    assert of["copy_host_to_device"] == of["_foreach_norm"] == of["_foreach_mul"] == {"other"}, "clipping is neither backward nor optimizer"
    assert of["linear"] == of["relu"] == {"forward"} and of["mean"] == {"forward"}, "the loss is made outside a module"
    assert of["linear_backward_weight"] == of["threshold_backward"] == of["mul"] - {"other"} == {"backward"}
    assert of["_fused_adamw"] == {"optimizer"}


def test_modules_are_found_in_both_directions(ledger) -> None:
    of = defaultdict(set)
    for r in ledger.records:
        of[r.module].add((r.phase, r.op))
    assert of["Sequential.0"] == {("forward", "linear"), ("backward", "linear_backward_weight")}
    assert of["Sequential.1"] == {("forward", "relu"), ("backward", "threshold_backward")}
    assert of["Sequential.2"] == {("forward", "linear"), ("backward", "linear_backward_weight"), ("backward", "linear_backward_input")}
    assert set(of) == {"", "Sequential.0", "Sequential.1", "Sequential.2"}


def test_recomputation_is_a_phase_of_its_own() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).to("npu")
    x = torch.ones(4, 8, device="npu", requires_grad=True)
    for reentrant in (False, True):
        with npu.ledger() as ledger:
            checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        ran = [(r.op, r.phase, r.module) for r in ledger.records if r.op in ("linear", "tanh", "tanh_backward")]
        assert ran == [
            ("linear", "forward", "Sequential.0"), ("tanh", "forward", "Sequential.1"),
            ("linear", "recompute", "Sequential.0"), ("tanh", "recompute", "Sequential.1"), ("tanh_backward", "backward", "Sequential.1"),
        ]  # fmt: skip


def test_own_phases_come_first() -> None:
    model, _ = make()
    with npu.ledger() as ledger, torch.no_grad():
        with ledger.phase("prefill"):
            model(torch.ones(16, 64, device="npu"))
            with ledger.phase("inner"):
                torch.ones(1, device="npu")
        with ledger.phase("decode"):
            model(torch.ones(1, 64, device="npu"))
        torch.ones(1, device="npu")
    assert list(ledger.table("phase").index) == ["prefill", "decode", "other", "inner"]
    with pytest.raises(ValueError, match=r"phase\(''\): expected a name"), ledger.phase(""):
        pass


def test_a_phase_ends_with_an_error() -> None:
    with npu.ledger() as ledger:
        with pytest.raises(KeyError), ledger.phase("mine"):
            raise KeyError
        torch.ones(1, device="npu")
    assert ledger.records[-1].phase == "other"


def test_a_module_that_fails_is_left() -> None:
    model, _ = make()
    with npu.ledger() as ledger:
        with pytest.raises(RuntimeError):
            model(torch.ones(3, 5, device="npu"))
        torch.ones(1, device="npu")
    assert (ledger.records[-1].module, ledger.records[-1].phase) == ("", "other")


def test_shared_modules_and_functions_inside() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.block(x).exp())

    model = Twice().to("npu")
    with npu.ledger() as ledger:
        model(torch.ones(2, 4, device="npu")).sum().backward()
    assert [r.module for r in ledger.records if r.op == "linear"] == ["Twice.block"] * 2
    assert [r.module for r in ledger.records if r.op == "exp"] == ["Twice"]
    assert {r.module for r in ledger.records if r.op == "linear_backward_weight"} == {"Twice.block"}


# -- sums ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["phase", "module", "op", "bound"])
def test_tables_sum_to_the_totals(ledger, by) -> None:
    table, totals = ledger.table(by), ledger.totals()
    assert table.index.name == by and totals.calls == len(ledger.records) > 20
    for column in ("calls", "cube_flops", "vector_flops", "bytes"):
        assert table[column].sum() == getattr(totals, column), column
    assert table["share"].sum() == pytest.approx(1) and table["time_us"].sum() == pytest.approx(totals.busy_s * 1e6)


def test_totals_by_hand(ledger) -> None:
    totals = ledger.totals()
    product = 2 * 128 * 64 * 128
    assert totals.cube_flops == 2 * product + 3 * product, "no gradient of the input is needed"
    assert totals.flops == totals.cube_flops + totals.vector_flops and totals.intensity == totals.flops / totals.bytes
    assert totals.energy_j is None, "nobody has published the power of an invented chip"
    assert totals.elapsed_s >= totals.busy_s > 0


def test_energy_where_the_power_is_known() -> None:
    npu.use("ascend-910b2")
    with npu.ledger() as ledger:
        torch.ones(100, device="npu") + 1
    costs = [r.cost for r in ledger.records]
    assert (ledger.totals().energy_j is None) == any(c.energy_pj is None for c in costs)


def test_depth_cuts_module_paths(ledger) -> None:
    assert set(ledger.table("module", depth=1).index) == {"(outside)", "Sequential"}
    assert set(ledger.table("module").index) == {"(outside)", "Sequential.0", "Sequential.1", "Sequential.2"}
    assert ledger.table("module", depth=1).loc["Sequential", "calls"] == 7


def test_phases_stand_in_the_order_of_a_step_and_the_rest_by_time(ledger) -> None:
    assert list(ledger.table("phase").index) == ["forward", "backward", "optimizer", "other"]
    assert ledger.table("op")["time_us"].is_monotonic_decreasing
    with pytest.raises(ValueError, match=r"table\(by='layer'\): expected one of 'phase', 'module', 'op', 'bound'"):
        ledger.table("layer")


def test_utilisation_says_what_it_means(ledger) -> None:
    totals = ledger.totals()
    hfu = ledger.utilisation()
    assert hfu.value == totals.cube_flops / totals.elapsed_s / 256e9
    assert str(hfu).endswith("% (executed cube FLOPs; float32 cube peak 0.256 TFLOP/s)")
    mfu = ledger.utilisation(model_flops=10**6, convention="6N", dtype="bfloat16")
    assert mfu.value == 10**6 / totals.elapsed_s / 512e9 and (mfu.convention, mfu.peak) == ("6N", "bfloat16 cube peak 0.512 TFLOP/s")
    with pytest.raises(ValueError, match='needs convention="6N"'):
        ledger.utilisation(model_flops=10**6)


def test_utilisation_of_an_unknown_peak_is_unknown() -> None:
    npu.use("ascend-910a")
    with npu.ledger() as ledger:
        torch.ones(4, 4, device="npu", dtype=torch.float16) @ torch.ones(4, 4, device="npu", dtype=torch.float16)
    assert str(ledger.utilisation(dtype="bfloat16")) == "unknown (executed cube FLOPs; bfloat16 cube peak unknown)"


def test_utilisation_of_two_devices() -> None:
    npu.use("mini", count=2)
    x, y = torch.ones(256, 256, device="npu:0"), torch.ones(256, 256, device="npu:1")
    with npu.ledger() as one:
        x @ x
    with npu.ledger() as both:
        x @ x, y @ y
    assert both.utilisation().value == pytest.approx(one.utilisation().value, rel=0.02) and both.utilisation().peak.endswith(" × 2")


def test_elapsed_is_until_the_device_is_done() -> None:
    x = torch.ones(512, 512, device="npu")
    x @ x
    with npu.ledger() as ledger:
        running = ledger.elapsed_ps
        x @ x
    record = ledger.records[0]
    assert running == 0, "what ran before is not on its time"
    assert ledger.elapsed_ps == record.cost.ps + 700_000
    torch.npu.synchronize()
    x @ x
    assert ledger.elapsed_ps == record.cost.ps + 700_000


# -- memory --------------------------------------------------------------------------------------------


def test_memory_at_peak_by_hand(ledger) -> None:
    # The peak is in the loss's backward: 2y·dy is being made from three buffers of the size of y.
    assert ledger.memory_at_peak() == {
        "optimizer state": 2 * 64 * KIB + 2 * 512,  # two moments of two weights, two counts of steps
        "temporaries": 4 * 32 * KIB,
        "activations": 64 * KIB + 32 * KIB + 2 * 512,  # the second product's input, y, the loss and the 1 it starts from
        "weights": 2 * 32 * KIB,
        "other": 32 * KIB,  # the batch
    }


def test_gradients_by_hand() -> None:
    model, optimizer = make()
    with npu.ledger() as ledger:
        model(torch.ones(1, 64, device="npu")).sum().backward()
        optimizer.step()
    end = ledger.memory_over_time()[-1][1]
    assert end["gradients"] == end["weights"] == 64 * KIB and end["optimizer state"] == 2 * 64 * KIB + 2 * 512


def test_the_peak_is_the_allocators(ledger) -> None:
    assert ledger.peak_memory() == sum(ledger.memory_at_peak().values()) == ledger.totals().peak_memory == ledger.torch_peak
    assert max(sum(now.values()) for _, now in ledger.memory_over_time()) == ledger.peak_memory()


def test_memory_ends_where_it_began(ledger) -> None:
    history = ledger.memory_over_time()
    assert history[-1][1]["weights"] == 64 * KIB and not {k: v for k, v in history[-1][1].items() if v and k not in ("weights", "optimizer state")}
    assert [at for at, _ in history] == sorted(at for at, _ in history)


def test_resizing_is_seen() -> None:
    x = torch.ones(1024, device="npu")
    with npu.ledger() as ledger:
        start = ledger.peak_memory()
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(8192)
    assert ledger.peak_memory() == start + 4096


# -- several, and after -------------------------------------------------------------------------------


def test_nested_ledgers() -> None:
    x = torch.ones(4, device="npu")
    with npu.ledger() as outer:
        x + 1
        with npu.ledger() as inner:
            x * 2
        x - 1
    assert [r.op for r in outer.records] == ["add", "mul", "sub"] and [r.op for r in inner.records] == ["mul"]
    with pytest.raises(RuntimeError, match="this ledger was closed"):
        outer.__enter__()
    with npu.ledger() as open_one, pytest.raises(RuntimeError, match="already open"):
        open_one.__enter__()


def test_nothing_is_left_behind(ledger) -> None:
    assert where.listeners == 0 and not where.names and not where.override
    assert not nn_hooks._global_forward_pre_hooks and not nn_hooks._global_forward_hooks
    assert not optim_hooks._global_optimizer_pre_hooks and not optim_hooks._global_optimizer_post_hooks
    count = len(ledger.records)
    torch.ones(1, device="npu")
    assert len(ledger.records) == count


def test_a_ledger_ends_with_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError), npu.ledger() as ledger:
        torch.ones(1, device="npu")
        torch.ones(2**40, device="npu")
    assert [r.op for r in ledger.records] == ["fill"] and where.listeners == 0


def test_json_has_a_line_for_each_operator(ledger) -> None:
    lines = [json.loads(line) for line in ledger.to_json().splitlines()]
    assert len(lines) == len(ledger.records)
    assert lines[1]["op"] == "linear" and lines[1]["cost"]["cube_flops"] == 2 * 128 * 64 * 128 and lines[1]["shapes"] == [[128, 64], [128, 64]]


def test_the_timeline_is_well_formed(tmp_path) -> None:
    side, x = torch.npu.Stream(), torch.ones(256, 256, device="npu")
    with npu.ledger() as ledger:
        for _ in range(3):
            x @ x
            with torch.npu.stream(side):
                x + 1
    ledger.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    on_device = {track: spans for track, spans in tracks.items() if track[0] == 0}
    assert len(on_device) == 2 and sum(map(len, on_device.values())) == 6
    for spans in on_device.values():
        spans.sort()
        assert all(end <= begin + 1e-6 for (_, end), (begin, _) in zip(spans, spans[1:])), "a stream does one thing at a time"
    flows = Counter((event["ph"], event["id"]) for event in events if event["ph"] in "sf")
    assert flows == Counter({(ph, n): 1 for ph in "sf" for n in {id for _, id in flows}}) and len(flows) == 12
