"""Functions and classes of a notebook cell as bytes: their code, what it closes over, and the globals that it names.

``pickle`` writes a function as the name of a module and its own; for a cell (module ``__main__``), a lambda or a function
inside another there is nothing to import in another process. Such a function goes as its code here, a class as its
attributes, with what they need and nothing else of the namespace. Sent back, either is the original again.
"""

import builtins
import dataclasses
import enum
import functools
import importlib
import io
import linecache
import marshal
import os
import pickle
import sys
import types
import weakref
from typing import Any

import torch

from course_lib.parallel.needs import filled, has_import, named_globals, parts, submodules

# Attributes that a new class makes for itself
OWN = (
    "__dict__",
    "__weakref__",
    "__annotations__",
    "__annotate_func__",
    "__annotations_cache__",
    "_abc_impl",
    "_backward_cls",
)
OWN_ENUM = ("__new__", "_new_member_", "_generate_next_value_")
SENTINELS = {id(value): name for name, value in vars(dataclasses).items() if type(value).__module__ == "dataclasses"}
_originals: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # id → what this process has sent
_received: dict[int, tuple[Any, int]] = {}  # id → what this process was sent (which keeps the id), and its id there


class NotPortable(TypeError):
    """What cannot go to another process, and what to do."""


def dumps(obj: Any, name: str, back: bool = False) -> bytes:
    """``obj`` as bytes for ``pickle.loads``; TypeError says which part of it, called ``name``, cannot go.

    ``back`` is for the way back: what came from there is named, and tensors on a device are copied to the cpu, which
    are refused on the way there (to meta those that have no numbers).
    """
    try:
        return _dumps(obj, back)
    except Exception as error:
        culprit, part, cause = _culprit(obj, name, back, set()) or (name, obj, error)
    advice = "return what can be pickled" if back else "make it inside the function"
    reason = str(cause) if isinstance(cause, NotPortable) else f"{cause}; {advice}"
    raise TypeError(f"{culprit}, a {type(part).__name__}, cannot go to another process: {reason}")


def _dumps(obj: Any, back: bool) -> bytes:
    file = io.BytesIO()
    Pickler(file, back).dump(obj)
    return file.getvalue()


def _culprit(obj: Any, name: str, back: bool, seen: set[int]) -> tuple[str, Any, Exception] | None:
    """The innermost part of ``obj`` that cannot go: its name, itself and why."""
    try:
        _dumps(obj, back)
        return None
    except Exception as error:
        cause = error
    seen.add(id(obj))
    inner = (_culprit(part, label, back, seen) for label, part in parts(obj, name) if id(part) not in seen)
    return next(filter(None, inner), (name, obj, cause))


# -- writing --------------------------------------------------------------------------------------------------------


class Pickler(pickle.Pickler):
    """Python's pickler, which also takes what has no importable name."""

    def __init__(self, file: io.BytesIO, back: bool) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.back, self.copies = back, []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (types.FunctionType, type, functools._lru_cache_wrapper)):
            if self.back and id(obj) in _received:
                return _original, (_received[id(obj)][1],)
            return NotImplemented if obj.__module__ == "builtins" or has_import(obj) else self._by_value(obj)
        if isinstance(obj, torch.Tensor) and obj.device.type not in ("cpu", "meta"):
            return self._tensor(obj)
        if id(obj) in SENTINELS:
            return getattr, (dataclasses, SENTINELS[id(obj)])
        return REDUCERS[type(obj)](obj) if type(obj) in REDUCERS else NotImplemented

    def _by_value(self, obj: Any) -> tuple:
        _originals[id(obj)] = obj
        if isinstance(obj, type):
            return _reduce_class(obj)
        if isinstance(obj, types.FunctionType):
            return _reduce_function(obj)
        return _cached, (obj.__wrapped__, obj.cache_parameters())

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if hasattr(tensor, "full_tensor"):
            raise NotPortable("a DTensor is spread over ranks; use its full_tensor() or to_local()")
        if not self.back:
            raise NotPortable(f"it lies on {tensor.device}, of which each rank has its own; pass x.cpu()")
        if os.environ.get("COURSE_NUMERICS") == "0":  # there are no numbers
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        else:
            copy = tensor.detach().cpu()
        if isinstance(tensor, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, tensor.requires_grad)
        self.copies.append(copy)  # pickle knows objects by their id, which no other may be given meanwhile
        return copy.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _reduce_function(function: types.FunctionType) -> tuple:
    code, source = function.__code__, None
    if not os.path.exists(code.co_filename):  # a cell: its lines are for tracebacks
        source = code.co_filename, linecache.getlines(code.co_filename)
    names = ("__defaults__", "__kwdefaults__", "__doc__", "__qualname__", "__module__")
    attributes = {name: getattr(function, name) for name in names} | vars(function)
    state = list(filled(function).values()), named_globals(function), attributes, source
    shell = (
        id(function),
        marshal.dumps(code),
        function.__globals__["__name__"],
        function.__closure__,
        submodules(function),
    )
    return _function, shell, state, None, None, _fill_function


def _reduce_class(cls: type) -> tuple:
    members = (types.MemberDescriptorType, types.GetSetDescriptorType)
    state = {name: value for name, value in vars(cls).items() if name not in OWN and not isinstance(value, members)}
    names = ("__module__", "__qualname__", "__slots__", "__orig_bases__")
    first = {name: state.pop(name) for name in names if name in state}
    if issubclass(cls, enum.Enum):
        methods = (types.FunctionType, classmethod, staticmethod)
        state = {name: value for name, value in state.items() if isinstance(value, methods) and name not in OWN_ENUM}
        first |= {name: member.value for name, member in cls.__members__.items()}
    return _class, (id(cls), type(cls), cls.__name__, cls.__bases__, first), state, None, None, _fill_class


REDUCERS = {
    types.ModuleType: lambda module: (importlib.import_module, (module.__name__,)),
    types.CellType: lambda cell: (_cell, ()),  # its content comes with the function, for it may be the function
    types.MappingProxyType: lambda proxy: (_proxy, (dict(proxy),)),
    staticmethod: lambda method: (staticmethod, (method.__func__,)),
    classmethod: lambda method: (classmethod, (method.__func__,)),
    property: lambda p: (property, (p.fget, p.fset, p.fdel, p.__doc__)),
    functools.cached_property: lambda p: (functools.cached_property, (p.func,)),
}

# -- reading: first the shell, which others may refer to, then its content ------------------------------------------


def _original(key: int) -> Any:
    return _originals[key]


def _cell() -> types.CellType:
    return types.CellType()


def _proxy(content: dict) -> types.MappingProxyType:
    return types.MappingProxyType(content)


def _cached(function: Any, parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


def _space(name: str) -> dict[str, Any]:
    """The globals of the module called ``name``: imported, or one made for what is sent."""
    if name not in sys.modules:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).setdefault("__builtins__", builtins)  # as import does, and C code expects
    return vars(sys.modules[name])


def _function(key: int, code: bytes, space: str, cells: tuple | None, modules: list[str]) -> types.FunctionType:
    for module in modules:
        importlib.import_module(module)
    made = types.FunctionType(marshal.loads(code), _space(space), None, None, cells)
    _received[id(made)] = made, key
    return made


def _fill_function(function: types.FunctionType, state: tuple) -> None:
    cells, needed, attributes, source = state
    for cell, content in cells:
        cell.cell_contents = content
    for name, value in needed.items():
        function.__globals__.setdefault(name, value)
    for name, value in attributes.items():
        setattr(function, name, value)
    if source:
        linecache.cache[source[0]] = (sum(map(len, source[1])), None, source[1], source[0])


def _class(key: int, kind: type, name: str, bases: tuple[type, ...], first: dict[str, Any]) -> type:
    space = kind.__prepare__(name, bases)
    for attribute, value in first.items():
        space[attribute] = value
    made = kind(name, bases, space)
    _received[id(made)] = made, key
    return made


def _fill_class(cls: type, state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(cls, name, value)
        if hasattr(type(value), "__set_name__"):
            value.__set_name__(cls, name)
