"""``torch.npu``'s random numbers, and ``torch.Generator(device="npu")``.

PyTorch makes generators in C++ and has no hook for a device written in Python. So ``attach()`` puts a stand-in in place
of the name ``torch.Generator``: called for an npu it makes ours, for any other device PyTorch's own; it is nothing's
type, and ``isinstance(g, torch.Generator)`` answers for PyTorch's class as before.

To PyTorch's C++ ours is a generator of the CPU. ``torch.rand(3, generator=ours)`` and the other factories, on the host,
raise as on a real device. ``host_tensor.normal_(generator=ours)`` cannot be told from PyTorch's own, and draws.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from course_lib.npu import runtime
from course_lib.npu.generator import Generator, ours
from course_lib.npu.streams import _index

_Theirs = torch._C.Generator


class _StandIn(type):
    def __call__(cls, device: Any = "cpu") -> torch._C.Generator:
        place = torch.device(device)
        return Generator(runtime.device(place.index).index) if place.type == "npu" else _Theirs(device)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _Theirs)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, _Theirs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(_Theirs, name)


FACTORIES = "rand.generator randn.generator randint.generator randint.low_generator randperm.generator".split()


def attach() -> list[torch.library.Library]:
    torch.Generator = _StandIn("Generator", (), {"__doc__": _Theirs.__doc__, "__module__": "torch"})
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch's own choice of a device is taken over
        for name in FACTORIES:
            packet, _, overload = name.partition(".")
            library.impl(name, _drawn_where_it_belongs(getattr(getattr(torch.ops.aten, packet), overload)), "BackendSelect", allow_override=True)
    return [library]


def _drawn_where_it_belongs(func: torch._ops.OpOverload) -> Callable:
    """A factory that is given a generator: on the device that was asked for, unless the generator is another's."""

    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        place = kwargs.get("device") or torch.device("cpu")
        if place.type == "cpu" and ours(kwargs.get("generator")):
            raise RuntimeError("Expected a 'cpu' device type for generator but found 'npu'")
        key = torch._C._dispatch_key_parse(torch._C._dispatch_key_for_device(place.type))
        return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)

    return factory


def _generator(device: Any) -> Generator:
    return runtime.devices[_index(device)].generator


def default_generators() -> tuple[Generator, ...]:
    """The generator of each device; ``torch.npu.default_generators`` without the call."""
    return tuple(d.generator for d in runtime.devices)


def manual_seed(seed: int) -> None:
    """Seed the current device's random numbers."""
    _generator(None).manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed every device; ``torch.manual_seed`` calls this."""
    for generator in default_generators():
        generator.manual_seed(int(seed))


def seed() -> None:
    """A fresh seed for the current device."""
    _generator(None).seed()


def seed_all() -> None:
    """One fresh seed for every device."""
    manual_seed_all(default_generators()[0].seed())


def initial_seed() -> int:
    return _generator(None).initial_seed()


def get_rng_state(device: Any = "npu") -> torch.Tensor:
    """16 bytes: the seed and the offset."""
    return _generator(device).get_state()


def set_rng_state(state: torch.Tensor, device: Any = "npu") -> None:
    _generator(device).set_state(state.cpu())


def get_rng_state_all() -> list[torch.Tensor]:
    return [generator.get_state() for generator in default_generators()]


def set_rng_state_all(states: Iterable[torch.Tensor]) -> None:
    for index, state in enumerate(states):
        set_rng_state(state, index)
