"""Random numbers of a device: a seed and an offset, as on real accelerators.

A draw starts from (seed, offset) and nothing else, then the offset moves on by as many numbers as were drawn. So the
state is 16 bytes: it can be saved, put back, and shifted, as DTensor does to give each shard its own numbers. What the
host drew in between does not matter.

The numbers are those of the CPU's generator, seeded anew for each draw by a permutation of the offset. The first draw
after ``manual_seed(s)`` is the CPU's own first draw after ``manual_seed(s)``; later ones differ, as on any accelerator.
"""

import struct
import weakref
from collections.abc import Callable
from typing import Any

import torch

_LAYOUT = struct.Struct("<Qq")  # seed, offset
_MASK = 2**32 - 1
_by_address: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # PyTorch's dispatcher hands on the C++ half only


class Generator(torch._C.Generator):
    """``torch.Generator`` on a device. To PyTorch's C++ it is a CPU generator, which only ``begin`` gives its seed."""

    def __new__(cls, index: int) -> "Generator":
        return super().__new__(cls)

    def __init__(self, index: int) -> None:
        self.index, self._seed, self._offset = index, super().initial_seed(), 0
        _by_address[self._cdata] = self

    @property
    def device(self) -> torch.device:
        return torch.device("npu", self.index)

    def manual_seed(self, seed: int) -> "Generator":
        super().manual_seed(seed)
        self._seed, self._offset = super().initial_seed(), 0
        return self

    def seed(self) -> int:
        """A seed from the operating system; the only numbers here that do not repeat."""
        self._seed, self._offset = super().seed(), 0
        return self._seed

    def initial_seed(self) -> int:
        return self._seed

    def get_offset(self) -> int:
        return self._offset

    def set_offset(self, offset: int) -> None:
        self._offset = int(offset)

    def get_state(self) -> torch.Tensor:
        """16 bytes: the seed and the offset."""
        return torch.frombuffer(bytearray(_LAYOUT.pack(self._seed, self._offset)), dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> "Generator":
        if state.dtype != torch.uint8 or state.device.type != "cpu":
            raise TypeError("RNG state must be a torch.ByteTensor")
        if state.numel() != _LAYOUT.size:
            raise RuntimeError(f"RNG state is wrong size: npu takes {_LAYOUT.size} bytes (seed, offset), got {state.numel()}")
        self._seed, self._offset = _LAYOUT.unpack(bytes(state.tolist()))
        return self

    def clone_state(self) -> "Generator":
        return Generator(self.index).set_state(self.get_state())

    def __reduce__(self) -> tuple:
        return _again, (self.index, self.get_state())

    # -- drawing --

    def begin(self) -> int:
        """What seeds the draw at this offset: the seed itself at 0, and 2³² different ones after it."""
        h = (self._offset >> 2) & _MASK
        h = (h ^ h >> 16) * 0x85EBCA6B & _MASK  # the finalizer of MurmurHash3, a permutation that leaves 0 in place
        h = (h ^ h >> 13) * 0xC2B2AE35 & _MASK
        return self._seed + (h ^ h >> 16) & _MASK

    def drawn(self, numbers: int) -> None:
        self._offset += numbers + 3 & -4


def _again(index: int, state: torch.Tensor) -> Generator:
    return Generator(index).set_state(state)


_Theirs = torch._C.Generator  # what a generator among the arguments looks like: see _by_address
_seed_engine = _Theirs.manual_seed


def ours(generator: Any) -> Generator | None:
    """The device's generator that PyTorch's dispatcher hands on as a generator of the CPU."""
    return None if generator is None else _by_address.get(generator._cdata)


def draw(kernel: Callable, takes_generator: bool, args: list, kwargs: dict, own: Generator) -> Any:
    """A random operator on host tensors, with numbers from the generator it was given, or the device's ``own``."""
    given = kwargs.get("generator") or next((a for a in args if type(a) is _Theirs), None)
    if given is None:
        generator = own
        if takes_generator:
            kwargs = kwargs | {"generator": own}
    else:
        generator, takes_generator = ours(given), True
        if generator is None:
            raise RuntimeError(f"Expected a 'npu' device type for generator but found '{given.device.type}'")
        if generator.index != own.index:
            raise RuntimeError(f"Expected a 'npu:{own.index}' generator device but found 'npu:{generator.index}'")
    result = _with_its_own(kernel, args, kwargs, generator) if takes_generator else _with_the_hosts(kernel, args, kwargs, generator)
    first = result[0] if isinstance(result, (tuple, list)) else result
    generator.drawn(first.numel())
    return result


def _with_its_own(kernel: Callable, args: list, kwargs: dict, generator: Generator) -> Any:
    _seed_engine(generator, generator.begin())
    return kernel(*args, **kwargs)


def _with_the_hosts(kernel: Callable, args: list, kwargs: dict, generator: Generator) -> Any:
    """For operators that always draw from the host's generator: lend it our seed."""
    host = torch.default_generator
    state = host.get_state()
    host.manual_seed(generator.begin())
    try:
        return kernel(*args, **kwargs)
    finally:
        host.set_state(state)
