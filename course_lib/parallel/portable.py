"""Functions and classes of a notebook cell as bytes: their code, what it closes over, and the globals that it names.

``pickle`` writes a function as the name of a module and its own; for a cell (module ``__main__``), a lambda or a function
inside another there is nothing to import in another process. Such a function goes as its code here, a class as its
attributes, with what they need and nothing else of the namespace. Sent back, either is the original again.
"""

import dataclasses
import dis
import enum
import functools
import importlib
import io
import linecache
import marshal
import operator
import os
import pickle
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch

# Attributes that the new class makes for itself
OWN = (
    "__dict__",
    "__weakref__",
    "__annotations__",
    "_abc_impl",
    "_backward_cls",
    "__annotate_func__",
    "__annotations_cache__",
)
SENTINELS = {id(value): name for name, value in vars(dataclasses).items() if type(value).__module__ == "dataclasses"}
_originals: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # key → what this process has sent
_received: dict[int, tuple[Any, int]] = {}  # id → what this process was sent (kept alive, for the id), and its key


def dumps(obj: Any, name: str, to_cpu: bool = False) -> bytes:
    """``obj`` as bytes for ``pickle.loads``; TypeError says which part of it, called ``name``, cannot go.

    Tensors on a device are copied to the cpu where ``to_cpu``, else refused.
    """
    try:
        return _dumps(obj, to_cpu)
    except Exception as error:
        culprit, part, cause = _culprit(obj, name, to_cpu, set()) or (name, obj, error)
        reason = str(cause) if isinstance(cause, NotPortable) else f"{cause}; make it inside the function"
        raise TypeError(f"{culprit}, a {type(part).__name__}, cannot go to another process: {reason}") from None


class NotPortable(TypeError):
    """What cannot go to another process, and what to do."""


def _dumps(obj: Any, to_cpu: bool) -> bytes:
    file = io.BytesIO()
    Pickler(file, to_cpu).dump(obj)
    return file.getvalue()


class Pickler(pickle.Pickler):
    """The pickler of Python, which also takes what has no importable name."""

    def __init__(self, file: io.BytesIO, to_cpu: bool) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.to_cpu, self.copies = to_cpu, []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (types.FunctionType, type)) and id(obj) in _received:
            return _original, (_received[id(obj)][1],)
        if isinstance(obj, types.FunctionType):
            return NotImplemented if has_import(obj) else _reduce_function(obj)
        if isinstance(obj, type):
            return NotImplemented if obj.__module__ == "builtins" or has_import(obj) else _reduce_class(obj)
        if isinstance(obj, torch.Tensor) and obj.device.type != "cpu":
            return self._reduce_tensor(obj)
        if id(obj) in SENTINELS:
            return getattr, (dataclasses, SENTINELS[id(obj)])
        reduce = REDUCERS.get(type(obj))
        return reduce(obj) if reduce else NotImplemented

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        if hasattr(tensor, "full_tensor"):
            raise NotPortable("a DTensor is spread over ranks; use its full_tensor() or to_local()")
        if not self.to_cpu:
            raise NotPortable(f"it lies on {tensor.device}, which each rank has for itself; pass x.cpu()")
        copy = tensor.detach().cpu()
        if isinstance(tensor, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, tensor.requires_grad)
        self.copies.append(copy)  # pickle knows objects by their id: it may not be given to another
        return copy.__reduce_ex__(self.proto if hasattr(self, "proto") else pickle.HIGHEST_PROTOCOL)


# -- what needs no sending ------------------------------------------------------------------------------------------


def has_import(obj: Any) -> bool:
    """Whether another process finds this function or class by its module and name."""
    module = obj.__module__
    if module in (None, "__main__") or not _importable(module):
        return False
    try:
        return operator.attrgetter(obj.__qualname__)(sys.modules[module]) is obj
    except (KeyError, AttributeError):
        return False


@functools.cache
def _importable(module: str) -> bool:
    top = module.partition(".")[0]
    return module in sys.modules and any(finder.find_spec(top, None) for finder in sys.meta_path)


# -- writing --------------------------------------------------------------------------------------------------------


def global_names(code: types.CodeType) -> set[str]:
    """The globals that a code names, with those of the functions and classes inside it."""
    names = {
        step.argval for step in dis.get_instructions(code) if "GLOBAL" in step.opname or step.opname == "LOAD_NAME"
    }
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return names.union(*map(global_names, inner))


def _needs(function: types.FunctionType) -> dict[str, Any]:
    """The globals of its module that ``function`` names; none where the module can be imported."""
    space = function.__globals__
    if space["__name__"] != "__main__" and _importable(space["__name__"]):
        return {}
    return {name: space[name] for name in sorted(global_names(function.__code__)) if name in space}


def _submodules(function: types.FunctionType, modules: list[Any]) -> list[str]:
    """Modules such as ``torch.distributed.fsdp`` where the function has only ``torch`` and attributes of it."""
    used = set(function.__code__.co_names).union(*(set(c.co_names) for c in _codes(function.__code__)))
    roots = tuple(f"{module.__name__}." for module in modules if isinstance(module, types.ModuleType))
    return sorted(
        name for name in sys.modules if roots and name.startswith(roots) and used.issuperset(name.split(".")[1:])
    )


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield const
            yield from _codes(const)


def _reduce_function(function: types.FunctionType) -> tuple:
    _originals[id(function)] = function
    code, cells = function.__code__, function.__closure__ or ()
    needs = _needs(function)
    state = {
        "cells": [(cell, cell.cell_contents) for cell in cells if not _empty(cell)],
        "globals": needs,
        "source": None
        if os.path.exists(code.co_filename)
        else (code.co_filename, linecache.getlines(code.co_filename)),
        "dict": {
            name: getattr(function, name)
            for name in ("__defaults__", "__kwdefaults__", "__doc__", "__qualname__", "__module__")
        }
        | vars(function),
    }
    shell = (
        id(function),
        marshal.dumps(code),
        function.__globals__["__name__"],
        function.__name__,
        cells,
        _submodules(function, list(needs.values())),
    )
    return _function, shell, state, None, None, _fill_function


def _empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _reduce_class(cls: type) -> tuple:
    _originals[id(cls)] = cls
    members = (types.MemberDescriptorType, types.GetSetDescriptorType)
    state = {name: value for name, value in vars(cls).items() if name not in OWN and not isinstance(value, members)}
    first = {
        name: state.pop(name) for name in ("__module__", "__qualname__", "__slots__", "__orig_bases__") if name in state
    }
    if issubclass(cls, enum.Enum):
        first |= {name: member.value for name, member in cls.__members__.items()}
        state = {
            name: value
            for name, value in state.items()
            if isinstance(value, types.FunctionType) and not name.startswith("_")
        }
    return _class, (id(cls), type(cls), cls.__name__, cls.__bases__, first), state, None, None, _fill_class


REDUCERS = {
    types.ModuleType: lambda module: (importlib.import_module, (module.__name__,)),
    types.CellType: lambda cell: (_cell, ()),
    types.MappingProxyType: lambda proxy: (_proxy, (dict(proxy),)),
    staticmethod: lambda method: (staticmethod, (method.__func__,)),
    classmethod: lambda method: (classmethod, (method.__func__,)),
    property: lambda p: (property, (p.fget, p.fset, p.fdel, p.__doc__)),
    functools.cached_property: lambda p: (functools.cached_property, (p.func,)),
    functools._lru_cache_wrapper: lambda f: (_cached, (f.__wrapped__, f.cache_parameters())),
}


# -- reading --------------------------------------------------------------------------------------------------------


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
    return vars(sys.modules[name])


def _function(key: int, code: bytes, space: str, name: str, cells: tuple, modules: list[str]) -> types.FunctionType:
    for module in modules:
        importlib.import_module(module)
    made = types.FunctionType(marshal.loads(code), _space(space), name, None, tuple(cells))
    _received[id(made)] = made, key
    return made


def _fill_function(function: types.FunctionType, state: dict[str, Any]) -> None:
    for cell, value in state["cells"]:
        cell.cell_contents = value
    for name, value in state["globals"].items():
        function.__globals__.setdefault(name, value)
    for name, value in state["dict"].items():
        setattr(function, name, value)
    if state["source"]:
        name, lines = state["source"]
        linecache.cache[name] = (sum(map(len, lines)), None, lines, name)


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


# -- finding what cannot go -----------------------------------------------------------------------------------------


def _culprit(obj: Any, name: str, to_cpu: bool, seen: set[int]) -> tuple[str, Any, Exception] | None:
    """The innermost part of ``obj`` that cannot go: its name, itself and why."""
    try:
        _dumps(obj, to_cpu)
        return None
    except Exception as error:
        cause = error
    seen.add(id(obj))
    inner = (_culprit(part, label, to_cpu, seen) for label, part in _parts(obj, name) if id(part) not in seen)
    return next(filter(None, inner), (name, obj, cause))


def _parts(obj: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(obj, types.FunctionType):
        where = f"in {obj.__qualname__}"
        yield from ((f"variable {label} {where}", value) for label, value in _needs(obj).items())
        cells = zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=True)
        yield from ((f"variable {label} {where}", cell.cell_contents) for label, cell in cells if not _empty(cell))
        yield from ((f"default {at} of {obj.__qualname__}", value) for at, value in enumerate(obj.__defaults__ or ()))
    elif isinstance(obj, types.MethodType):
        yield from ((f"{name}.__self__", obj.__self__), (name, obj.__func__))
    elif isinstance(obj, functools.partial):
        yield from _parts((obj.func, obj.args, obj.keywords), name)
    elif isinstance(obj, dict):
        yield from ((f"{name}[{key!r}]", value) for key, value in obj.items())
    elif isinstance(obj, (list, tuple, set)):
        yield from ((f"{name}[{at}]", value) for at, value in enumerate(obj))
    elif isinstance(obj, type) or hasattr(obj, "__dict__"):
        yield from ((f"{name}.{label}", value) for label, value in vars(obj).items() if label not in OWN)
        if not isinstance(obj, type):
            yield f"class {type(obj).__name__}", type(obj)
