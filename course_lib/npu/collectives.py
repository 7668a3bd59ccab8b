"""The operators by which PyTorch communicates, ``c10d::*`` and ``_c10d_functional::*``, on device tensors.

Each says what it is (a `Call`), which bytes travel, and what becomes of them; the rest is the communicator's, see hccl.py.
Functional collectives are the others on fresh tensors; their results are waited for by ``wait_tensor``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from course_lib.npu import runtime
from course_lib.npu.hccl import Call, Communicator, Work, communicator
from course_lib.npu.p2p import receive, send
from course_lib.npu.tensor import HANDLERS, NpuTensor
from course_lib.npu.transport import REDUCTIONS, Transport

OPS = torch.ops.c10d
FUNCTIONAL = torch.ops._c10d_functional
_pending: dict[int, list[Work]] = {}  # functional collectives, by the memory of their result


def handler(*funcs: Any) -> Callable:
    """Register a rule that takes the operator's arguments alone."""

    def register(rule: Callable) -> Callable:
        for func in funcs:
            HANDLERS[func] = lambda info, args, kwargs: rule(*args, **kwargs)
        return rule

    return register


def _op(op: Any) -> str:
    """The reduction's name; NotImplementedError for one that the device has not."""
    name = op.upper() if isinstance(op, str) else c10d.ReduceOp.RedOpType(op.op()).name
    if name not in REDUCTIONS:
        raise NotImplementedError(f"hccl: the reduction {name} is not supported; use one of {', '.join(REDUCTIONS)}")
    return name


def _size(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """(bytes, numbers) in all."""
    return sum(t.numel() * t.element_size() for t in tensors), sum(t.numel() for t in tensors)


def _inner(tensors: Sequence[NpuTensor]) -> list[torch.Tensor]:
    for t in tensors:
        if type(t) is not NpuTensor:
            raise RuntimeError(f"hccl: expected tensors on npu, found one on {t.device}; move it there, or give the group a backend for it: init_process_group('cpu:gloo,npu:hccl')")
    return [t._inner for t in tensors]


def _call(kind: str, counted: Sequence[torch.Tensor], op: str = "", root: int = 0, sent: tuple[int, ...] = ()) -> Call:
    return Call(kind, *_size(counted), counted[0].dtype, op, root, sent)


def _boxed(work: Work) -> torch.ScriptObject:
    return c10d.Work.boxed(work)


# -- reductions ---------------------------------------------------------------------------------------


def _all_reduce(tensors: list, group: Any, op: Any) -> Work:
    inner, name = _inner(tensors), _op(op)
    return communicator(group).run(_call("all_reduce", inner, name), tensors, lambda t: [t.all_reduce(i, name) for i in inner])


@handler(OPS.allreduce_.default)
def allreduce_(tensors: list, group: Any, op: Any, *rest: Any, **named: Any) -> tuple:
    return tensors, _boxed(_all_reduce(tensors, group, op))


@handler(OPS.allreduce_coalesced_.default)
def allreduce_coalesced_(tensors: list, group: Any, op: Any, *rest: Any, **named: Any) -> torch.ScriptObject:
    return _boxed(_all_reduce(tensors, group, op))


@handler(OPS.reduce_.default)
def reduce_(tensors: list, group: Any, op: Any, root: int, *rest: Any, **named: Any) -> torch.ScriptObject:
    inner, name, comm = _inner(tensors), _op(op), communicator(group)

    def move(transport: Transport) -> None:
        for i in inner:
            whole = i.clone()
            transport.all_reduce(whole, name)
            if comm.rank == root:
                i.copy_(whole)

    return _boxed(comm.run(_call("reduce", inner, name, root), tensors, move))


def _reduce_scatter(outs: list, ins: list, group: Any, op: Any) -> Work:
    to, of, name = _inner(outs), _inner(ins), _op(op)
    comm = communicator(group)
    for o, i in zip(to, of):
        if o.numel() * len(comm.ranks) != i.numel():
            raise ValueError(f"reduce_scatter: the input has {i.numel()} numbers, expected {len(comm.ranks)} ranks × {o.numel()} of the output")
    return comm.run(_call("reduce_scatter", of, name), outs, lambda t: [t.reduce_scatter(o, i, name) for o, i in zip(to, of)])


@handler(OPS._reduce_scatter_base_.default)
def _reduce_scatter_base_(out: Any, given: Any, group: Any, op: Any, *rest: Any, **named: Any) -> tuple:
    return out, _boxed(_reduce_scatter([out], [given], group, op))


@handler(OPS.reduce_scatter_tensor_coalesced_.default)
def reduce_scatter_tensor_coalesced_(outs: list, ins: list, group: Any, op: Any, *rest: Any, **named: Any) -> torch.ScriptObject:
    return _boxed(_reduce_scatter(outs, ins, group, op))


@handler(OPS.reduce_scatter_.default)
def reduce_scatter_(outs: list, ins: list, group: Any, op: Any, *rest: Any, **named: Any) -> tuple:
    return outs, _boxed(_reduce_scatter(outs, [torch.stack(list(parts)) for parts in ins], group, op))


# -- gathering ----------------------------------------------------------------------------------------


def _all_gather(outs: list[list], ins: list, group: Any, tensors: list) -> Work:
    """``outs[k][i]`` is a host tensor that gets the k-th input of rank i."""
    of, comm = _inner(ins), communicator(group)
    for parts, own in zip(outs, of):
        if len(parts) != len(comm.ranks) or parts[comm.rank].numel() != own.numel():
            raise ValueError(f"all_gather: expected {len(comm.ranks)} outputs, the one of this rank with {own.numel()} numbers; found {[p.numel() for p in parts]}")
    return comm.run(_call("all_gather", [p for parts in outs for p in parts]), tensors, lambda t: [t.all_gather(o, i) for o, i in zip(outs, of)])


def _rows(out: NpuTensor, group: Any, given: NpuTensor) -> list[torch.Tensor]:
    """The parts of ``out``, one for each rank, as views."""
    size = len(communicator(group).ranks)
    if out.numel() != size * given.numel():
        raise ValueError(f"all_gather_into_tensor: the output has {out.numel()} numbers, expected {size} ranks × {given.numel()} of the input")
    return list(_inner([out])[0].view(-1).chunk(size)) if given.numel() else [out._inner.view(-1)] * size


@handler(OPS.allgather_.default)
def allgather_(outs: list, ins: list, group: Any, *rest: Any, **named: Any) -> tuple:
    return outs, _boxed(_all_gather([_inner(parts) for parts in outs], ins, group, ins))


@handler(OPS._allgather_base_.default)
def _allgather_base_(out: Any, given: Any, group: Any, *rest: Any, **named: Any) -> tuple:
    return out, _boxed(_all_gather([_rows(out, group, given)], [given], group, [out]))


@handler(OPS.allgather_into_tensor_coalesced_.default)
def allgather_into_tensor_coalesced_(outs: list, ins: list, group: Any, *rest: Any, **named: Any) -> torch.ScriptObject:
    return _boxed(_all_gather([_rows(o, group, i) for o, i in zip(outs, ins)], ins, group, outs))


@handler(OPS.allgather_coalesced_.default)
def allgather_coalesced_(outs: list, ins: list, group: Any, *rest: Any, **named: Any) -> torch.ScriptObject:
    by_input = [_inner(parts) for parts in zip(*outs)]  # given by rank
    return _boxed(_all_gather(by_input, ins, group, ins))


# -- all-to-all ---------------------------------------------------------------------------------------


def _all_to_all(outs: list[torch.Tensor], ins: list[torch.Tensor], group: Any, tensors: list) -> Work:
    """Of host tensors, one for each rank."""
    comm, sent = communicator(group), tuple(i.numel() * i.element_size() for i in ins)
    received = tuple(o.numel() * o.element_size() for o in outs)
    call = Call("all_to_all", sum(sent), 0, ins[0].dtype, "", 0, sent, received)
    return comm.run(call, tensors, lambda t: t.all_to_all(outs, ins))


@handler(OPS.alltoall_.default)
def alltoall_(outs: list, ins: list, group: Any, *rest: Any, **named: Any) -> tuple:
    return outs, _boxed(_all_to_all(_inner(outs), _inner(ins), group, outs))


@handler(OPS.alltoall_base_.default)
def alltoall_base_(out: Any, given: Any, group: Any, received: list[int], sent: list[int], *rest: Any, **named: Any) -> torch.ScriptObject:
    size = len(communicator(group).ranks)
    parts = []
    for name, t, splits in (("output", out, received), ("input", given, sent)):
        inner = _inner([t])[0]
        if not splits and inner.shape[0] % size:
            raise ValueError(f"all_to_all_single: {name} of {inner.shape[0]} rows does not divide among {size} ranks; give {name}_split_sizes")
        if splits and (len(splits) != size or sum(splits) != inner.shape[0]):
            raise ValueError(f"all_to_all_single: {name}_split_sizes {list(splits)}: expected {size} numbers with the sum {inner.shape[0]}")
        parts.append(list(inner.split(list(splits) if splits else inner.shape[0] // size)) if inner.shape[0] else [inner] * size)
    return _boxed(_all_to_all(*parts, group, [out]))


# -- from one, to one, to nobody ----------------------------------------------------------------------


@handler(OPS.broadcast_.default)
def broadcast_(tensors: list, group: Any, root: int, *rest: Any, **named: Any) -> tuple:
    inner = _inner(tensors)
    return tensors, _boxed(communicator(group).run(_call("broadcast", inner, "", root), tensors, lambda t: [t.broadcast(i, root) for i in inner]))


@handler(OPS.gather_.default)
def gather_(outs: list, ins: list, group: Any, root: int, *rest: Any, **named: Any) -> torch.ScriptObject:
    own, comm = _inner(ins)[0], communicator(group)
    to = _inner(outs[0]) if outs and outs[0] else []

    def move(transport: Transport) -> None:
        everybody = [torch.empty_like(own) for _ in comm.ranks]
        transport.all_gather(everybody, own)
        for out, got in zip(to, everybody):
            out.copy_(got)

    return _boxed(comm.run(_call("gather", [own] * len(comm.ranks), "", root), ins, move))


@handler(OPS.scatter_.default)
def scatter_(outs: list, ins: list, group: Any, root: int, *rest: Any, **named: Any) -> tuple:
    own, comm = _inner(outs)[0], communicator(group)
    of = _inner(ins[0]) if ins and ins[0] else []

    def move(transport: Transport) -> None:
        whole = torch.stack(of) if of else own.new_empty((len(comm.ranks), *own.shape))
        transport.broadcast(whole, root)
        own.copy_(whole[comm.rank])

    return outs, _boxed(comm.run(_call("scatter", [own] * len(comm.ranks), "", root), outs, move))


@handler(OPS.barrier.default, OPS.monitored_barrier_.default)
def barrier(tensor: Any, group: Any, *rest: Any, **named: Any) -> torch.ScriptObject:
    """All ranks are there; unlike the others it holds up the host, as PyTorch's barrier does."""
    work = communicator(group).run(Call("barrier", 0, 0, torch.uint8), [], lambda t: None)
    work.wait()
    runtime.host.wait_until(work.end)
    return _boxed(work)


@handler(OPS.send.default)
def send_(tensors: list, group: Any, to: int, tag: int) -> torch.ScriptObject:
    _inner(tensors)
    return _boxed(send(communicator(group), tensors[0], to, tag))


@handler(OPS.recv_.default)
def recv_(tensors: list, group: Any, source: int, tag: int) -> torch.ScriptObject:
    _inner(tensors)
    return _boxed(receive(communicator(group), tensors[0], source, tag))


@handler(OPS.recv_any_source_.default)
def recv_any_source_(*args: Any) -> None:
    raise NotImplementedError("hccl: recv() needs a source: HCCL, like NCCL, cannot receive from whoever comes first. Give src=")


# -- functional collectives ---------------------------------------------------------------------------


def _later(outs: list[NpuTensor], work: Work) -> list[NpuTensor]:
    for out in outs:
        _pending.setdefault(out._held.key, []).append(work)
    return outs


@handler(FUNCTIONAL.wait_tensor.default)
def wait_tensor(tensor: NpuTensor) -> NpuTensor:
    for work in _pending.pop(tensor._held.key, ()):
        work.wait()
    return tensor


if hasattr(FUNCTIONAL, "_wrap_tensor_autograd"):  # newer PyTorch wraps the results by an operator

    @handler(FUNCTIONAL._wrap_tensor_autograd.default)
    def wrap_tensor(given: NpuTensor) -> AsyncCollectiveTensor:
        return AsyncCollectiveTensor(given)


@handler(FUNCTIONAL.all_reduce.default)
def all_reduce(given: NpuTensor, op: str, group: Any) -> NpuTensor:
    return all_reduce_(given.clone(memory_format=torch.contiguous_format), op, group)


@handler(FUNCTIONAL.all_reduce_.default)
def all_reduce_(given: NpuTensor, op: str, group: Any) -> NpuTensor:
    return _later([given], _all_reduce([given], group, op))[0]


@handler(FUNCTIONAL.all_reduce_coalesced.default)
def all_reduce_coalesced(given: list, op: str, group: Any) -> list:
    return all_reduce_coalesced_([t.clone(memory_format=torch.contiguous_format) for t in given], op, group)


@handler(FUNCTIONAL.all_reduce_coalesced_.default)
def all_reduce_coalesced_(given: list, op: str, group: Any) -> list:
    return _later(given, _all_reduce(given, group, op))


def _grown(t: NpuTensor, rows: int) -> NpuTensor:
    return t.new_empty((rows, *t.shape[1:]))


@handler(FUNCTIONAL.all_gather_into_tensor_coalesced.default)
def all_gather_into_tensor_coalesced(given: list, size: int, group: Any) -> list:
    outs = [_grown(t, t.shape[0] * size) for t in given]
    return _later(outs, _all_gather([_rows(o, group, i) for o, i in zip(outs, given)], given, group, outs))


@handler(FUNCTIONAL.all_gather_into_tensor.default)
def all_gather_into_tensor(given: NpuTensor, size: int, group: Any) -> NpuTensor:
    return all_gather_into_tensor_coalesced([given], size, group)[0]


@handler(FUNCTIONAL.all_gather_into_tensor_out.default)
def all_gather_into_tensor_out(given: NpuTensor, size: int, group: Any, *, out: NpuTensor) -> NpuTensor:
    return _later([out], _all_gather([_rows(out, group, given)], [given], group, [out]))[0]


@handler(FUNCTIONAL.reduce_scatter_tensor_coalesced.default)
def reduce_scatter_tensor_coalesced(given: list, op: str, size: int, group: Any) -> list:
    outs = [_grown(t, t.shape[0] // size) for t in given]
    return _later(outs, _reduce_scatter(outs, given, group, op))


@handler(FUNCTIONAL.reduce_scatter_tensor.default)
def reduce_scatter_tensor(given: NpuTensor, op: str, size: int, group: Any) -> NpuTensor:
    return reduce_scatter_tensor_coalesced([given], op, size, group)[0]


@handler(FUNCTIONAL.reduce_scatter_tensor_out.default)
def reduce_scatter_tensor_out(given: NpuTensor, op: str, size: int, group: Any, *, out: NpuTensor) -> NpuTensor:
    return _later([out], _reduce_scatter([out], [given], group, op))[0]


@handler(FUNCTIONAL.all_to_all_single.default)
def all_to_all_single(given: NpuTensor, received: list[int], sent: list[int], group: Any) -> NpuTensor:
    out = _grown(given, sum(received) if received else given.shape[0])
    to, of = (list(t._inner.split(list(s))) if s else list(t._inner.chunk(len(communicator(group).ranks))) for t, s in ((out, received), (given, sent)))
    return _later([out], _all_to_all(to, of, group, [out]))[0]


@handler(FUNCTIONAL.broadcast.default)
def broadcast(given: NpuTensor, source: int, group: Any) -> NpuTensor:
    return broadcast_in_place(given.clone(memory_format=torch.contiguous_format), source, group)


@handler(FUNCTIONAL.broadcast_.default)
def broadcast_in_place(given: NpuTensor, source: int, group: Any) -> NpuTensor:
    comm: Communicator = communicator(group)
    inner = _inner([given])
    return _later([given], comm.run(_call("broadcast", inner, "", source), [given], lambda t: t.broadcast(inner[0], source)))[0]
