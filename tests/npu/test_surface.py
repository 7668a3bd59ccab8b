"""torch.npu: every name of torch_npu's surface is there, and works or says why not; mixing devices; torch.accelerator."""

import pickle
import re

import pytest
import torch

from course_lib import npu
from course_lib.npu import refused

# facts/torch_npu.md, 7.2
NAMES = """
is_available is_initialized init device_count set_device current_device device device_of synchronize get_device_name
get_device_properties get_device_capability can_device_access_peer utilization mem_get_info manual_seed manual_seed_all
seed seed_all initial_seed get_rng_state set_rng_state get_rng_state_all set_rng_state_all
memory_allocated max_memory_allocated memory_reserved max_memory_reserved memory_cached max_memory_cached
reset_peak_memory_stats reset_max_memory_allocated reset_max_memory_cached reset_accumulated_memory_stats memory_stats
memory_stats_as_nested_dict memory_summary memory_snapshot empty_cache empty_virt_addr_cache
get_per_process_memory_fraction set_per_process_memory_fraction caching_allocator_alloc caching_allocator_delete MemPool
use_mem_pool NPUPluggableAllocator change_current_allocator get_allocator_backend _record_memory_history _snapshot
_dump_snapshot
Stream Event stream set_stream current_stream default_stream SyncLaunchStream ExternalStream ExternalEvent
NPUGraph graph graph_pool_handle is_current_stream_capturing make_graphed_callables graph_task_group_begin
graph_task_group_end graph_task_update_begin graph_task_update_end
is_bf16_supported get_amp_supported_dtype is_autocast_enabled set_autocast_enabled get_autocast_dtype set_autocast_dtype
set_option CubeMathType set_compile_mode is_jit_compile_false set_mm_bmm_format_nd get_mm_bmm_format_nd set_aoe matmul
conv config get_npu_overflow_flag clear_npu_overflow_flag set_deterministic_level set_device_limit get_device_limit
set_stream_limit get_stream_limit reset_stream_limit mstx
""".split()
METHODS = {
    "Stream": "wait_event wait_stream record_event query synchronize set_data_preprocess_stream priority device",
    "Event": "record wait query elapsed_time recorded_time synchronize ipc_handle",
}
# What is called with these arguments works; names that stand in ``refused`` raise; the others have tests of their own
CALLS = {
    "set_device": (0,), "device": (0,), "device_of": (torch.ones(1),), "can_device_access_peer": (0, 0), "manual_seed": (1,), "manual_seed_all": (1,),
    "set_rng_state": None, "set_rng_state_all": ([],), "set_per_process_memory_fraction": (1.0,), "caching_allocator_alloc": (1,), "caching_allocator_delete": None,
    "_dump_snapshot": None, "stream": (None,), "set_stream": None, "set_autocast_enabled": (False,), "set_autocast_dtype": (torch.float16,),
    "set_option": ({"ACL_OP_SELECT_IMPL_MODE": "high_precision"},), "CubeMathType": (0,), "matmul": None, "conv": None, "config": None, "set_deterministic_level": (1,),
    "_record_memory_history": (None,),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*has been renamed:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_each_name_works_or_says_why(name: str) -> None:
    thing = getattr(torch.npu, name)
    if name in refused.REASONS:
        with pytest.raises(NotImplementedError, match=re.escape(f"torch.npu.{name}: ") + ".{20}"):
            thing()
    elif (arguments := CALLS.get(name, ())) is not None:
        thing(*arguments)


@pytest.mark.parametrize("kind", METHODS)
def test_methods(kind: str) -> None:
    assert [name for name in METHODS[kind].split() if not hasattr(getattr(torch.npu, kind)(), name)] == []


def test_streams_and_events_are_pytorchs() -> None:
    stream, event = torch.npu.Stream(priority=-1), torch.npu.Event(enable_timing=True)
    assert isinstance(stream, torch.Stream) and isinstance(event, torch.Event) and stream.priority == -1
    assert torch.npu.Stream(stream_id=stream.stream_id, device_index=0, device_type=stream.device_type) == stream
    torch.ones(2, device="npu").record_stream(stream)
    event.record(stream)
    assert event.recorded_time() >= 0
    for refused_call in (event.ipc_handle, lambda: torch.npu.Event(interprocess=True)):
        with pytest.raises(NotImplementedError, match="between processes"):
            refused_call()


def test_options_that_are_kept() -> None:
    torch.npu.set_compile_mode(jit_compile=True)
    assert not torch.npu.is_jit_compile_false()
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.set_option({"MM_BMM_ND_ENABLE": "disable"})
    assert torch.npu.is_jit_compile_false() and not torch.npu.get_mm_bmm_format_nd()
    torch.npu.set_mm_bmm_format_nd(True)
    torch.npu.config.allow_internal_format = False
    torch.npu.matmul.allow_hf32 = False
    with pytest.raises(AttributeError, match="no such option: alow_hf32"):
        torch.npu.conv.alow_hf32 = True
    with pytest.raises(ValueError, match="high_precision"):
        torch.npu.set_option({"ACL_OP_SELECT_IMPL_MODE": "fast"})


# -- memory -------------------------------------------------------------------------------------------


def test_nested_statistics() -> None:
    kept, flat, nested = torch.ones(1000, device="npu"), torch.npu.memory_stats(), torch.npu.memory_stats_as_nested_dict()
    assert nested["allocated_bytes"]["all"]["current"] == flat["allocated_bytes.all.current"] == 4096
    assert nested["num_ooms"] == 0
    del kept


def test_memory_by_hand() -> None:
    before = torch.npu.memory_allocated()
    address = torch.npu.caching_allocator_alloc(1000)
    assert torch.npu.memory_allocated() == before + 1024
    torch.npu.caching_allocator_delete(address)
    assert torch.npu.memory_allocated() == before
    with pytest.raises(RuntimeError, match="not an address"):
        torch.npu.caching_allocator_delete(address)


def test_fragmentation_is_seen() -> None:
    tensors = [torch.ones(512, device="npu") for _ in range(8)]  # one segment of 20 KiB
    del tensors[1::2]
    snapshot = torch.npu.memory_snapshot()
    for segment in snapshot:  # blocks cover their segment without a gap
        at = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == at
            at += block["size"]
        assert at == segment["address"] + segment["total_size"]
    (segment,) = [s for s in snapshot if s["active_size"]]
    assert [b["state"] for b in segment["blocks"]] == ["active_allocated", "inactive"] * 4
    assert segment["allocated_size"] == 4 * 2048 == torch.npu.memory_allocated()
    assert sum(s["total_size"] for s in snapshot) == torch.npu.memory_reserved()
    assert sum(b["size"] for b in segment["blocks"] if b["state"] == "inactive") == torch.npu.memory_stats()["inactive_split_bytes.all.current"]


def test_history_for_pytorchs_viewer(tmp_path) -> None:
    from torch.cuda import _memory_viz

    torch.npu._record_memory_history()
    x = torch.ones(1000, device="npu")
    y = x + x
    del x
    torch.npu._dump_snapshot(str(tmp_path / "dump.pickle"))
    torch.npu._record_memory_history(None)
    snapshot = pickle.loads((tmp_path / "dump.pickle").read_bytes())
    (events,) = snapshot["device_traces"]
    assert [e["action"] for e in events] == ["segment_alloc", "alloc", "alloc", "free_requested", "free_completed"]
    assert events[1]["size"] == 4096 and events[1]["frames"][0]["name"] == "test_history_for_pytorchs_viewer"
    (live,) = [b for s in snapshot["segments"] for b in s["blocks"] if b["state"] == "active_allocated"]
    assert live["requested_size"] == 4000 and live["frames"]
    for reading in (_memory_viz.segsum, _memory_viz.trace, _memory_viz.trace_plot, _memory_viz.segment_plot):
        assert len(reading(snapshot)) > 100
    del y


# -- torch.accelerator --------------------------------------------------------------------------------


def test_accelerator() -> None:
    npu.use("mini", count=2)
    accelerator = torch.accelerator
    assert accelerator.current_accelerator().type == "npu" and accelerator.is_available() and accelerator.device_count() == 2
    with accelerator.device_index(1):
        assert accelerator.current_device_index() == torch.npu.current_device() == 1
        assert torch.ones(1, device="npu").device.index == 1
    assert accelerator.current_device_index() == 0
    stream = torch.npu.Stream()
    accelerator.set_stream(stream)
    assert accelerator.current_stream() == stream == torch.npu.current_stream()
    x = torch.ones(64, 64, device="npu")
    x @ x
    assert not stream.query()
    accelerator.synchronize()
    assert stream.query()
    if hasattr(accelerator, "memory_allocated"):
        assert accelerator.memory_allocated() == torch.npu.memory_allocated() > 0
        assert accelerator.memory_stats() == torch.npu.memory_stats()
        accelerator.empty_cache()


# -- devices that do not go together ------------------------------------------------------------------

MIXED = {
    "host last": lambda x, h: x + h, "host first": lambda x, h: h @ x, "list": lambda x, h: torch.cat([x, h]), "keyword": lambda x, h: torch.add(x, x, out=h),
    "condition": lambda x, h: torch.where(h > 0, x, x), "foreach": lambda x, h: torch._foreach_add([x], [h]), "linear": lambda x, h: torch.nn.functional.linear(x, h),
    "loss": lambda x, h: torch.nn.functional.mse_loss(x, h), "written": lambda x, h: h.add_(x), "written scalar": lambda x, h: h.sum().add_(x.sum()),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_mixing_devices(case: str) -> None:
    x, h = torch.ones(3, 3, device="npu"), torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two devices, npu:0 and cpu!"):
        MIXED[case](x, h)
    assert torch.equal(h, torch.ones(3, 3))


def test_two_npus() -> None:
    npu.use("mini", count=2)
    with pytest.raises(RuntimeError, match="at least two devices, npu:1 and npu:0!"):
        torch.ones(3, device="npu:1") + torch.ones(3, device="npu:0")
    with pytest.raises(RuntimeError, match="at least two devices, npu:1 and cpu!"):
        torch.ones(3, device="npu:1") + torch.ones(3)


def test_a_scalar_on_the_host_is_let_in() -> None:
    x, two = torch.ones(3, device="npu"), torch.tensor(2.0)
    for y in (x * two, two * x, x.clone().mul_(two), torch.where(x > 0, two, x), x.clamp(min=two)):
        assert y.device.type == "npu" and y.tolist() == [2.0, 2.0, 2.0]


OUTSIDE = {
    "factory": lambda: torch.empty(1, device="npu:2"), "to": lambda: torch.ones(1).to("npu:2"), "set_device": lambda: torch.npu.set_device(2),
    "properties": lambda: torch.npu.get_device_properties("npu:2"), "stream": lambda: torch.npu.Stream("npu:2"), "generator": lambda: torch.Generator(device="npu:2"),
    "accelerator": lambda: torch.accelerator.set_device_index(2), "memory": lambda: torch.npu.memory_allocated(2),
}  # fmt: skip


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_device_that_is_not_there(case: str) -> None:
    npu.use("mini", count=2)
    with pytest.raises(RuntimeError, match="invalid device ordinal 2; this process has 2 .*use.*count="):
        OUTSIDE[case]()


def test_arithmetic_that_the_chip_lacks() -> None:
    x = torch.ones(2, 2, dtype=torch.float64, device="npu")
    assert (x + x).dtype is torch.float64
    for call, name in ((lambda: x @ x, "mm"), (lambda: torch.nn.functional.linear(x, x), "linear")):
        with pytest.raises(NotImplementedError, match=f"^{name} on npu:0: mini .* has no matrix product in float64"):
            call()


def test_compile_leaves_the_device_alone() -> None:
    def work(x: torch.Tensor) -> torch.Tensor:
        side = torch.npu.Stream()
        with torch.npu.stream(side), torch.autocast("npu", dtype=torch.bfloat16):
            y = torch.nn.functional.dropout(x @ x)
        torch.npu.current_stream().wait_stream(side)
        return y

    x, out = torch.ones(4, 4, device="npu"), []
    for f in (work, torch.compile(work, backend="eager")):
        torch.manual_seed(0)
        out.append(f(x).cpu())
    assert torch.equal(*out)
