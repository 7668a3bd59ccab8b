"""What a function needs of its namespace: the globals that its code names, and what another process can import itself."""

import dis
import functools
import operator
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch


def has_import(obj: Any) -> bool:
    """Whether another process finds this function or class by its module and name."""
    module = obj.__module__
    if module in (None, "__main__") or not importable(module):
        return False
    try:
        return operator.attrgetter(obj.__qualname__)(sys.modules[module]) is obj
    except (KeyError, AttributeError):
        return False


@functools.cache
def importable(module: str) -> bool:
    """Whether a loaded module's package is found again, as one made by hand or by a test runner may not be."""
    top = module.partition(".")[0]
    return module in sys.modules and any(finder.find_spec(top, None) for finder in sys.meta_path)


def named_globals(function: types.FunctionType) -> dict[str, Any]:
    """The globals of its module that ``function`` names; none where the module can be imported."""
    space = function.__globals__
    if space["__name__"] != "__main__" and importable(space["__name__"]):
        return {}
    names = {
        step.argval for code in _codes(function.__code__) for step in dis.get_instructions(code) if _is_global(step)
    }
    return {name: space[name] for name in sorted(names) if name in space}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code and those of the functions and classes inside it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _is_global(step: dis.Instruction) -> bool:
    return "GLOBAL" in step.opname or step.opname == "LOAD_NAME"  # the latter in bodies of classes


def submodules(function: types.FunctionType) -> list[str]:
    """Modules such as ``torch.distributed.fsdp`` where the function names ``torch`` and takes attributes of it."""
    used = {name for code in _codes(function.__code__) for name in code.co_names}
    modules = (value for value in named_globals(function).values() if isinstance(value, types.ModuleType))
    roots = tuple(f"{module.__name__}." for module in modules)
    return sorted(name for name in sys.modules if name.startswith(roots) and used.issuperset(name.split(".")[1:]))


def filled(function: types.FunctionType) -> dict[str, tuple[types.CellType, Any]]:
    """The cells of what ``function`` closes over that have a content, with it, by the variable's name."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found


def parts(obj: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What ``obj``, called ``name``, consists of, each with what to call it."""
    if isinstance(obj, types.FunctionType):
        held = named_globals(obj) | {variable: content for variable, (_, content) in filled(obj).items()}
        yield from ((f"variable {variable} in {obj.__qualname__}", value) for variable, value in held.items())
        yield from ((f"default {at} of {obj.__qualname__}", value) for at, value in enumerate(obj.__defaults__ or ()))
    elif isinstance(obj, types.MethodType):
        yield from ((f"{name}.__self__", obj.__self__), (name, obj.__func__))
    elif isinstance(obj, functools.partial):
        yield from ((name, obj.func), *parts(obj.args, name), *parts(obj.keywords, name))
    elif isinstance(obj, dict):
        yield from ((f"{name}[{key!r}]", value) for key, value in obj.items())
    elif isinstance(obj, (list, tuple, set)):
        yield from ((f"{name}[{at}]", value) for at, value in enumerate(obj))
    elif hasattr(obj, "__dict__") and not isinstance(obj, torch.Tensor):
        yield from ((f"{name}.{attribute}", value) for attribute, value in vars(obj).items() if attribute != "__dict__")
        if not isinstance(obj, type):
            yield f"class {type(obj).__name__}", type(obj)
