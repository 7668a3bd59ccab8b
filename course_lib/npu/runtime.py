"""The emulated machine's state: which chip, how many devices, whose turn it is.

Everything that must be found from the operator hot path lives here: ``devices`` (each with its
memory, streams and random generator), ``current`` (the device index that ``"npu"`` without an index
means), ``ledgers`` (those that listen), and ``live`` (each device storage and the block it holds).
"""

import os
import weakref
from pathlib import Path

import torch

from course_lib.chip.spec import ChipSpec, SystemSpec, load_chip, load_system, systems
from course_lib.npu import environment, real
from course_lib.npu.clock import PS_PER_S, Host, Timeline
from course_lib.npu.generator import Generator
from course_lib.npu.links import Port
from course_lib.npu.memory import Block

DEFAULT_CHIP = "mini"


class NeedsValues(RuntimeError):
    """Something asked for a number in shape-only mode, where there are only shapes."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} needs numbers, and in shape-only mode (npu.use(…, numerics=False)) there are only shapes. "
            "Leave it out, or run a smaller model with numerics=True."
        )


class Device:
    """One emulated chip: its figures, memory, streams and random numbers."""

    def __init__(self, index: int, spec: ChipSpec, host: Host, settings: environment.Settings) -> None:
        self.index, self.spec, self.host, self.settings = index, spec, host, settings
        self.torch_device = torch.device("npu", index)
        self.memory = settings.allocator(int(spec.require("memory_bytes")), index)
        self.launch_ps = round(spec.require("launch_host") * PS_PER_S)
        self.streams: list[Timeline] = []
        self.default = self.current = self.new_stream()
        self.generator = Generator(index)
        self.costs: dict = {}  # (operator, shapes, dtypes) → Cost, filled by price.py
        self.ports = Port(), Port()  # links out of the chip: scale-up, scale-out
        self.wires: dict[str, Timeline] = {}  # streams of communicators, by group, see hccl.py
        self.messages: dict[tuple, list] = {}  # sent or to be received, by group and way, until their time is known

    def new_stream(self) -> Timeline:
        self.streams.append(self.settings.timeline(len(self.streams), self.host, self.launch_ps))
        return self.streams[-1]

    def label(self, stream: int) -> str:
        """A stream's name in print: by its number, and what it is for."""
        wire = next((f" (hccl, group {group})" for group, timeline in self.wires.items() if timeline.id == stream), "")
        return f"stream {stream}{' (default)' if stream == 0 else wire}"

    def synchronize(self) -> None:
        """The host waits for every stream of this device."""
        for queue in self.messages.values():
            while queue:
                queue[0].resolve()
        self.host.wait_until(max(s.ready for s in self.streams))


class Held(weakref.ref):
    """A device storage and the block of device memory that it holds for as long as it lives."""

    __slots__ = ("key", "block", "index", "device", "category")  # category: "weights", "activations", …, see where.py


def _release(held: Held) -> None:
    live.pop(held.key, None)
    block = held.block
    if block.requested:
        devices[held.index].memory.free(block)
        for ledger in ledgers:
            ledger.memory_changed(held, -1, block)


class NpuStorage(torch.UntypedStorage):
    """Storage of a device tensor: the bytes lie in host memory, ``device`` says where they count."""

    @property
    def device(self) -> torch.device:
        held = live.get(self._cdata)
        return torch.device("npu", held.index if held else self.__dict__.get("_npu_index", current))

    def resize_(self, size: int) -> "NpuStorage":
        super().resize_(size)
        if (held := live.get(self._cdata)) is not None:
            follow(held, self)
        return self

    def cpu(self) -> torch.UntypedStorage:
        return torch.UntypedStorage(self.nbytes()).copy_(self, False)


def hold(storage: torch.UntypedStorage, index: int) -> Held:
    """The device memory of ``storage``, taken now if it is new; raises torch.OutOfMemoryError."""
    key = storage._cdata
    return live.get(key) or _take(storage, key, index)


def _take(storage: torch.UntypedStorage, key: int, index: int) -> Held:
    device, nbytes = devices[index], storage.nbytes()
    block = device.memory.promise(nbytes)
    held = live[key] = Held(storage, _release)
    held.key, held.block, held.index, held.device, held.category = key, block, index, device.torch_device, None
    storage.__class__ = NpuStorage
    if nbytes:
        for ledger in ledgers:
            ledger.memory_changed(held, 1, block)
    return held


def follow(held: Held, storage: torch.UntypedStorage) -> None:
    """Let the device memory of ``storage`` follow its size, which has changed: another block, as on a real device."""
    size = storage.nbytes()
    if size == held.block.requested:
        return
    memory, old = devices[held.index].memory, held.block
    memory.settle()
    if size < old.requested:  # the old goes first; growing copies, so that both live for a moment
        memory.free(old)
        held.block = memory.allocate(size)
    else:
        held.block = memory.allocate(size)
        memory.free(old)
    change, more = Block(), held.block.granted - old.granted
    change.granted = abs(more)
    for ledger in ledgers:
        ledger.memory_changed(held, 1 if more > 0 else -1, change)


def use(
    chip: str | Path | ChipSpec | None = None, count: int | None = None, numerics: bool | None = None,
    system: str | Path | SystemSpec | None = None,
) -> ChipSpec:  # fmt: skip
    """Put ``count`` devices of ``chip`` under the program and set the clocks to zero.

    With ``numerics=False`` tensors have shapes and no numbers (*shape-only*): a model of any size runs in no memory,
    and what needs a value raises NeedsValues. Build such a model without numbers too: ``with torch.device("npu"):``,
    or on "meta" and then ``to_empty(device="npu")``.

    ``chip`` is a name from ``data/chips`` (or a path, or a ChipSpec); None means the system's, or ``COURSE_CHIP`` or "mini".
    ``system`` says what joins the chips of a distributed program: a name from ``data/systems``, a path or a SystemSpec;
    None means ``COURSE_SYSTEM``, or the first system of such chips. ``count`` is by itself what torchrun says
    (``LOCAL_WORLD_SIZE``), or 1; ``numerics`` is True unless ``COURSE_NUMERICS=0``.
    Tensors that live go on living, on the new chip; torch.OutOfMemoryError if they do not fit there,
    and then the old chip stays.
    """
    global devices, current, host, backing, settings, joined
    real.refuse("use()")
    count = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if count is None else count
    numerics = os.environ.get("COURSE_NUMERICS") != "0" if numerics is None else numerics
    if type(count) is not int or count < 1:
        raise ValueError(f"use(count={count!r}): the number of devices must be a whole number from 1 on")
    if ledgers:
        raise RuntimeError("use() inside `with npu.ledger()`: leave the ledger first, it counts for one chip")
    if not isinstance(chip, (str, Path, ChipSpec, type(None))):
        raise TypeError(f"use({chip!r}): expected the name of a chip, the path of a .toml file or a ChipSpec")
    links = _system(system, chip)
    own = links.chip if links else os.environ.get("COURSE_CHIP") or DEFAULT_CHIP
    spec = chip if isinstance(chip, ChipSpec) else load_chip(chip or own)
    new_settings, new_host = environment.read(), Host()
    fresh = [Device(i, spec, new_host, new_settings) for i in range(new_settings.count(count))]
    new_backing = torch.device("cpu" if numerics else "meta")
    if live and new_backing != backing:
        raise RuntimeError(f"use(numerics={numerics}): {len(live)} storages live on npu, with{'out' if numerics else ''} numbers; delete their tensors first")
    _move_in(fresh)
    backing, settings, joined = new_backing, new_settings, links
    for old, new in zip(devices, fresh):
        new.generator = old.generator
    devices, current, host = fresh, min(current, len(fresh) - 1), new_host
    return spec


def _system(system: str | Path | SystemSpec | None, chip: object) -> SystemSpec | None:
    """The system that is meant; one from the environment only where no chip is named."""
    name = system or (None if chip else os.environ.get("COURSE_SYSTEM"))
    return _large_enough(name if isinstance(name, SystemSpec) else load_system(name)) if name else None


def _large_enough(system: SystemSpec) -> SystemSpec:
    """The same system with as many nodes as torchrun's ``WORLD_SIZE`` needs."""
    nodes = -(-int(os.environ.get("WORLD_SIZE", 1)) // system.chips_per_node)
    return system if nodes <= system.nodes else system.having(nodes=nodes, title=f"{system.title}, {nodes} nodes")


def system() -> SystemSpec:
    """What joins the chips: as ``use`` was told, or the first system of ``data/systems`` that is made of such chips."""
    global joined
    if joined is None:
        name = devices[0].spec.name
        joined = next((_large_enough(s) for s in map(load_system, systems()) if s.chip == name), None)
    if joined is None:
        raise RuntimeError(f"what joins chips of the kind {name!r} is not known: no system in data/systems has them. Name one with npu.use({name!r}, system=…), or COURSE_SYSTEM")
    return joined


def _move_in(fresh: list[Device]) -> None:
    """Take memory on the new devices for every live storage, all or nothing."""
    for device in devices:
        device.memory.settle()
    held = list(live.values())
    outside = sorted({h.index for h in held if h.index >= len(fresh)})
    if outside:
        raise RuntimeError(f"use(count={len(fresh)}): tensors still live on npu:{outside[0]}; delete them first, or ask for more devices")
    blocks = [fresh[h.index].memory.allocate(h.block.requested) for h in held]
    for h, block in zip(held, blocks):
        h.block = block


def device(index: int | None) -> Device:
    """The device with this index (None: the current one); RuntimeError as PyTorch words it if there is none."""
    i = current if index is None else index
    if not 0 <= i < len(devices):
        raise RuntimeError(f"npu: invalid device ordinal {i}; this process has {len(devices)} ({devices[0].spec.name}), see course_lib.npu.use(chip, count=...)")
    return devices[i]


def destination(index: int | None) -> int:
    """Where ``.to("npu")`` leads. PyTorch's C++ asks the device's guard for a missing index, and one in Python answers 0.

    A rank has one device, the current one; the others in its process are those of the other ranks. So there 0 is a
    missing index.
    """
    missing = index == 0 and current != 0 and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    return device(None if missing else index).index


host = Host()
backing = torch.device("cpu")  # where the numbers lie; "meta" when there are none
settings = environment.Settings()
joined: SystemSpec | None = None  # what joins the chips, once known
devices: list[Device] = []
current = 0
live: dict[int, Held] = {}
ledgers: list = []
