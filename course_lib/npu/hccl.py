"""The "hccl" process group: PyTorch's collectives on emulated links.

    dist.init_process_group("hccl")        # after: from course_lib import npu

Real numbers travel between the processes over gloo (transport.py). Emulated time is agreed upon beside them: before each
collective the ranks tell each other when they could begin, what they are about to do, and what else is under way on their
links. So all know when the last one is there, what it takes (chip/collectives.py, by the system's topology and
``HCCL_ALGO``), how others slow it down (links.py), and whether all mean the same operation: if not, each says who differs.

A collective is launched by the host like any operator. It starts when its inputs are ready on every rank, runs on a
stream of its communicator, beside whatever the device computes, and ``wait()`` lets the current stream wait for it. The time
from a rank's being there to the last one's is recorded as waiting.

With the "fake" process group one rank stands for thousands: all others are taken to do the same at the same time.
"""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from course_lib.chip.collectives import KINDS, Transfer, transfer
from course_lib.chip.cost import Cost
from course_lib.npu import links, runtime
from course_lib.npu.memory import MIB, scale_of
from course_lib.npu.transport import REDUCTIONS, Transport

DTYPES = sorted((t for t in vars(torch).values() if isinstance(t, torch.dtype)), key=str)
OPS = ("", *REDUCTIONS)
_groups: dict[str, "Communicator"] = {}


class CollectiveMismatch(RuntimeError):
    """The ranks of a group do not call the same collective."""


class Call(NamedTuple):
    """What a rank is about to do: ``nbytes`` as chip.collectives counts them, ``sent[i]`` of them for the i-th rank."""

    kind: str
    nbytes: int
    numel: int
    dtype: torch.dtype
    op: str = ""
    root: int = 0
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()

    def numbers(self) -> list[int]:
        return [KINDS.index(self.kind), OPS.index(self.op), DTYPES.index(self.dtype), self.numel, self.root]

    @staticmethod
    def read(numbers: list[int]) -> str:
        """In words, of ``numbers()``."""
        kind, op, dtype, numel, root = numbers
        what = f"{KINDS[kind]} of {numel} × {str(DTYPES[dtype]).removeprefix('torch.')}"
        return what + (f", {OPS[op]}" if op else "") + (f", root {root}" if KINDS[kind] in ("broadcast", "reduce", "gather", "scatter") else "")


class Work(dist.Work):
    """A collective under way; it ends at ``end`` picoseconds of emulated time."""

    def __init__(self, end: int, results: list[torch.Tensor]) -> None:
        super().__init__()
        self.end, self.results = end, results

    def wait(self, timeout: Any = None) -> bool:
        """The current stream goes on when the collective is done. The host does not wait."""
        stream = runtime.devices[runtime.current].current
        stream.ready = max(stream.ready, self.end)
        if self in _under_way:
            _under_way.discard(self)
            _waited_for.append(self)
            self.results = []  # it lives on, its tensors need not
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        """Has the host seen its end? Asking costs a launch, so that a polling loop ends."""
        device = runtime.devices[runtime.current]
        device.host.now += device.launch_ps
        return device.host.now >= self.end

    def is_success(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> list[torch.Tensor]:
        return self.results

    def get_future(self) -> torch.futures.Future:
        """A future with the results. Whoever takes it in backward, as DDP does, waits for it at the end of backward."""
        if torch._C._current_graph_task_id() != -1:
            torch.autograd.Variable._execution_engine.queue_callback(self.wait)
        else:
            self.wait()
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self.results)
        return future


# To PyTorch's C++ a work is its Python half, which must not die before: so it lives on, and for a while after its wait
_under_way: set[Work] = set()
_waited_for: deque[Work] = deque(maxlen=256)


class Communicator:
    """A process group as the device sees it: who is in it, how numbers travel, and what its collectives cost."""

    def __init__(self, name: str, ranks: list[int], rank: int, gloo: Any) -> None:
        self.name, self.ranks, self.rank, self.sequence = name, tuple(ranks), rank, 0
        self.transport = Transport(gloo, rank, len(ranks)) if gloo is not None else None
        self.known: dict = {}
        self.group: weakref.ref | None = None  # PyTorch's side of it, once seen

    def price(self, kind: str, nbytes: int, ranks: tuple[int, ...] | None = None, sizes: tuple | None = None) -> Transfer:
        key = (kind, nbytes, ranks, sizes)
        if key not in self.known:
            self.known[key] = transfer(runtime.system(), kind, nbytes, ranks or self.ranks, runtime.settings.algorithm, sizes)
        return self.known[key]

    def run(self, call: Call, tensors: list[torch.Tensor], move: Callable[[Transport], None]) -> Work:
        """Carry out a collective: numbers by ``move``, time on the communicator's stream."""
        device = runtime.devices[tensors[0]._held.index if tensors else runtime.current]
        stream = stream_of(device, self.name)
        device.host.now += device.launch_ps
        issued = max(device.host.now, device.current.ready, stream.ready)
        self.sequence += 1
        if self.transport is None or len(self.ranks) == 1:
            price = self.price(call.kind, call.nbytes)
            start, slower = issued, _slower([_state(device, issued)], issued, price)
        else:
            start, slower, price = self._agree(call, issued, device)
        if self.transport is not None and runtime.backing.type == "cpu":
            move(self.transport)
        end = start + price.ps + slower
        _admit(device, start, price)
        return finish(device, stream, call.kind, tensors, (issued, start, end), price)

    def _agree(self, call: Call, issued: int, device: runtime.Device) -> tuple[int, int, Transfer]:
        """(start, picoseconds that other transfers cost it, price), the same on every rank; raises CollectiveMismatch."""
        mine = [self.sequence, *call.numbers(), *_state(device, issued), *(call.sent or [0] * len(self.ranks))]
        rows = self.transport.exchange(mine)
        if any(row[:6] != mine[:6] for row in rows):
            raise CollectiveMismatch(self._complaint(rows))
        if call.received and (sent := tuple(row[7 + 2 * links.MOST + self.rank] for row in rows)) != call.received:
            raise CollectiveMismatch(f"all_to_all on rank {self.ranks[self.rank]}: it expects {list(call.received)} bytes from ranks {list(self.ranks)}, which send it {list(sent)}")
        start = max(row[6] for row in rows)
        states = [row[6 : 7 + 2 * links.MOST] for row in rows]
        sizes = tuple(tuple(row[7 + 2 * links.MOST :]) for row in rows) if call.sent else ()
        uneven = len({n for row in sizes for n in row}) > 1
        price = self.price(call.kind, max(map(sum, sizes)), None, sizes) if uneven else self.price(call.kind, call.nbytes)
        return start, _slower(states, start, price), price

    def _complaint(self, rows: list[list[int]]) -> str:
        said: dict[str, list[int]] = {}
        for rank, row in zip(self.ranks, rows):
            said.setdefault(f"{Call.read(row[1:6])} (collective number {row[0]})", []).append(rank)
        each = "; ".join(f"rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}: {text}" for text, r in said.items())
        return f"the ranks of group {self.name!r} do not call the same collective. {each}. Every rank must call the same ones, in the same order, with equal shapes and dtypes"


# -- time ---------------------------------------------------------------------------------------------


def stream_of(device: runtime.Device, name: str, buffer: bool = True) -> Any:
    """The stream on which a communicator's transfers run. Its first use takes the communicator's buffer (``HCCL_BUFFSIZE``)."""
    if name not in device.wires:
        if buffer:
            device.memory.give_away(runtime.settings.buffer_mb * MIB // scale_of(device.memory.capacity), f"the buffer of communicator {name}")
        device.wires[name] = device.new_stream()
    return device.wires[name]


def _state(device: runtime.Device, issued: int) -> list[int]:
    """When this rank is there, and what is under way on its two ports; always as many numbers."""
    flows = [port.under_way(issued) for port in device.ports]
    return [issued, *(n for left in flows for n in [0] * (links.MOST - len(left)) + left)]


def _slower(states: list[list[int]], start: int, price: Transfer) -> int:
    """What sharing costs the transfer: on the port, of any rank, that is busiest."""
    worst = 0
    for issued, *flows in states:
        for left, work in ((flows[: links.MOST], price.up_ps), (flows[links.MOST :], price.out_ps)):
            left = [f for f in left if f]
            if left and work:
                worst = max(worst, links.delay(links.drain(left, start - issued), work))
    return worst


def _admit(device: runtime.Device, start: int, price: Transfer) -> None:
    for port, work in zip(device.ports, (price.up_ps, price.out_ps)):
        port.admit(start, work)


def finish(device: runtime.Device, stream: Any, kind: str, tensors: list[torch.Tensor], times: tuple[int, int, int], price: Transfer, work: Work | None = None) -> Work:
    """Put a transfer of which all is known on its stream and into the ledgers."""
    issued, start, end = times
    stream.ready = end
    if runtime.settings.blocking:
        stream.wait()
    shapes = tuple(tuple(t.shape) for t in tensors)
    for ledger in runtime.ledgers:
        if start > issued:
            ledger.record("wait", shapes, tensors, device, stream, issued, _cost(start - issued, "waiting"), "waiting")
        ledger.record(kind, shapes, tensors, device, stream, start, _cost(end - start, price.bound), "communication")
    work = work or Work(end, tensors)
    work.end = end
    _under_way.add(work)
    return work


def _cost(ps: int, bound: str) -> Cost:
    """The time of a transfer; its energy is not published."""
    return Cost(ps, bound, 0, 0, 0, 0, 0, 0, 0, 0, None, 0)


# -- groups -------------------------------------------------------------------------------------------


def communicator(group: Any) -> Communicator:
    """The communicator of a process group, however it is given: the group, PyTorch's C++ half of it, or its name."""
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)
    elif isinstance(group, torch.ScriptObject):
        group = c10d.ProcessGroup.unbox(group)
    found = _groups.get(group.group_name)
    if found is not None and (dist.get_backend(group) == "fake" if found.group is None else found.group() is not group):
        found = None  # that one was destroyed, and its name is used again
    if found is None:
        if dist.get_backend(group) != "fake":
            raise RuntimeError(f"tensors on npu need the backend \"hccl\" (or \"fake\", for one rank of many), not {dist.get_backend(group)!r}: dist.init_process_group(\"hccl\")")
        found = _join(group.group_name, dist.get_process_group_ranks(group), group.rank(), None)
    if found.group is None:
        found.group = weakref.ref(group)
    return found


def _join(name: str, ranks: list[int], rank: int, gloo: Any) -> Communicator:
    from course_lib.npu import sharding  # noqa: F401, PLC0415, loads DTensor, which only many ranks need

    system = runtime.system()  # raises where none is known
    if max(ranks) >= system.chips:
        raise RuntimeError(f"rank {max(ranks)} has no chip: {system.title} has {system.chips}; npu.use(system=load_system({system.name!r}).having(nodes=…)) gives more")
    found = _groups[name] = Communicator(name, ranks, rank, gloo)
    return found


def create(options: Any, settings: Any = None) -> Any:
    """What ``init_process_group`` and ``new_group`` call: gloo for the numbers, and a communicator for the time."""
    rank, size = options.group_rank, options.group_size
    gloo = c10d.ProcessGroupGloo(options.store, rank, size, timeout=options.timeout)
    _join(options.group_id, list(options.global_ranks_in_group) or list(range(size)), rank, gloo)
    return gloo


def attach() -> None:
    """Make ``init_process_group("hccl")`` work."""
    if "hccl" not in dist.Backend.backend_list:
        dist.Backend.register_backend("hccl", create, extended_api=True, devices=["npu"])
        dist.Backend.backend_capability["fake"].append("npu")  # batch_isend_irecv asks the group for its backend on the device
