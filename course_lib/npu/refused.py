"""Names of ``torch.npu`` and torch_npu that an emulation cannot honour. Each is there, and says why it does not work when it is used."""

from typing import Any

_GRAPHS = "an emulated device captures no graphs: each operator computes when it is called. Launch cost is in the clock; leave the capture out"
_POOLS = "the emulated allocator has one pool of small and one of large blocks, and they cannot be replaced"
_FOREIGN = "there is no driver whose handles could be taken in"
_FLAG = "the emulated chip saturates to inf and nan, as an Ascend from the 910B on does, and has no overflow flag: look at the tensor with torch.isfinite"
_CORES = "costs are those of the whole chip; for one with fewer cores give npu.use() a ChipSpec with other figures"
_HARDWARE = "there is no hardware to act on"
_TYPED = "legacy typed tensors and storages have no emulated form; use torch.tensor(…, dtype=…, device='npu')"
_HOST = "host memory is not emulated, only the device's"

REASONS = {
    "utilization": "the emulation has no sampling period in which to look; `with npu.ledger() as ledger` tells what share of the time each unit was busy",
    "set_aoe": "there are no kernels that could be tuned",
    "get_npu_overflow_flag": _FLAG, "clear_npu_overflow_flag": _FLAG,
    "set_device_limit": _CORES, "set_stream_limit": _CORES, "reset_stream_limit": _CORES, "get_stream_limit": _CORES,
    "set_sync_debug_mode": "use the ledger, whose records name each operator that waits", "get_sync_debug_mode": "use the ledger, whose records name each operator that waits",
    "ExternalStream": _FOREIGN, "ExternalEvent": _FOREIGN, "npurt": _FOREIGN, "current_blas_handle": _FOREIGN, "ipc_collect": "emulated devices share no memory between processes",
    "init_dump": _HARDWARE, "set_dump": _HARDWARE, "finalize_dump": _HARDWARE, "stress_detect": _HARDWARE, "stop_device": _HARDWARE, "restart_device": _HARDWARE,
    "check_uce_in_memory": _HARDWARE, "set_op_timeout_ms": _HARDWARE, "obfuscation_initialize": _HARDWARE, "obfuscation_finalize": _HARDWARE, "obfuscation_calculate": _HARDWARE,
    **dict.fromkeys(("MemPool", "use_mem_pool", "NPUPluggableAllocator", "change_current_allocator"), _POOLS),
    **dict.fromkeys(("host_empty_cache", "host_memory_stats", "host_memory_stats_as_nested_dict", "reset_accumulated_host_memory_stats", "reset_peak_host_memory_stats"), _HOST),
    **dict.fromkeys(("NPUGraph", "graph", "graph_pool_handle", "make_graphed_callables", "graph_task_group_begin", "graph_task_group_end", "graph_task_update_begin",
                     "graph_task_update_end", "NpuGraphOpHandler", "register_npu_graph_handler", "super_kernel_scope_begin", "super_kernel_scope_end"), _GRAPHS),
    **{f"{kind}{what}": _TYPED for kind in ("Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short", "BFloat16") for what in ("Tensor", "Storage")},
}  # fmt: skip


class _Refusal(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"torch.npu.{cls.__name__}: {REASONS[cls.__name__]}")


# Classes, so that ``isinstance(x, torch.npu.NPUGraph)`` still has an answer: no
NAMES = {name: _Refusal(name, (), {"__doc__": reason, "__module__": "torch.npu"}) for name, reason in REASONS.items()}


def _waits(name: str) -> Any:
    def collective(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"torch_npu.{name}: computing and communicating in one kernel, in overlapping pieces, is not emulated; use the product and the collective of torch.distributed one after the other")

    return collective


# Fused operators that compute and communicate
COLLECTIVES = {name: _waits(name) for name in ("npu_mm_all_reduce_base", "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base", "npu_moe_distribute_dispatch", "npu_moe_distribute_combine")}
