"""What a Pyro program can reach, wherever it keeps it: modules, and the settings that it reads.

A program is a module, or a function, a method, a partial (Pyro's handlers are partials) or an
object that leads to modules: by its attributes, closure, arguments, containers, or the globals that
its code names. All of these are followed; library code is not.
"""

from __future__ import annotations

__all__ = ["may_ask_modules", "objects", "reach", "setting", "settings"]

import dis
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

_DEPTH = 12  # how far to look for modules behind a program
_LIBRARIES = set(
    "arviz builtins collections functools logging matplotlib numpy pandas pyro scipy sklearn"
    " threading torch tqdm weakref xarray zuko".split()
)  # their objects and functions lead to no module of a user's
_SETTINGS = (bool, int, float, str, Tensor, list, tuple, np.ndarray, np.generic)
_MODULE_INTERNALS = set(vars(nn.Module()))


def reach(
    program: Any, name: str, *, seen: Mapping[int, nn.Module], closed: type
) -> dict[str, nn.Module]:
    """The root modules that a program can reach and `seen` lacks, by a readable path.

    Args:
        program: the callable.
        name: what its path begins with.
        seen: modules that are known already, by identity.
        closed: a type whose instances are not looked into.
    """
    found: dict[str, nn.Module] = {}
    known = set(seen)
    visited: set[int] = set()

    def visit(value: Any, path: str, depth: int = 0) -> None:
        if (
            id(value) in visited
            or depth > _DEPTH
            or isinstance(value, (closed, Tensor, ModuleType, type))
        ):
            return
        visited.add(id(value))
        if isinstance(value, nn.Module) and id(value) not in known:
            while path in found:
                path += "'"
            found[path] = value
            known.update(id(module) for module in value.modules())
        for inner, held in _held_by(value):
            visit(held, f"{path}.{inner}" if inner else path, depth + 1)

    visit(program, name)
    # A root found early may sit inside one found later: name each tree once, by its topmost root.
    below = {id(m) for root in found.values() for m in root.modules() if m is not root}
    return {path: module for path, module in found.items() if id(module) not in below}


def settings(*programs: Any) -> list[tuple[str, Any, Any, Any]]:
    """Numbers, strings, tensors, arrays, lists and tuples that programs read by name.

    They are looked for in closures, defaults, globals that the code loads, attributes of modules,
    of a user's objects and their classes, dictionaries, and the arguments of partials.

    Returns:
        Of each a readable name, the cell, mapping or function that holds it, its key there, and the
        value. `setting` reads it again.
    """
    found = []
    for value in _reached(programs):
        for name, holder, key in _places(value):
            held = setting(holder, key)
            if isinstance(held, type) and not _is_library(held.__module__, "pyro_vi"):
                for inner in vars(held):
                    if isinstance(vars(held)[inner], _SETTINGS):
                        found.append((f"{name}.{inner}", vars(held), inner, vars(held)[inner]))
            elif isinstance(held, _SETTINGS):
                found.append((name, holder, key, held))
    return found


def setting(holder: Any, key: Any) -> Any:
    """What a cell (no key), a mapping, or a function (an attribute) holds now."""
    if key is None:
        return _content(holder)
    if isinstance(holder, FunctionType):
        return getattr(holder, key)
    return holder.get(key)


def objects(*programs: Any) -> list[Any]:
    """The instances of a user's own classes that programs reach, modules left out."""
    return [
        value
        for value in _reached(programs)
        if type(getattr(value, "__dict__", None)) is dict
        and not isinstance(value, (nn.Module, FunctionType, MethodType, partial))
        and not isinstance(value, SimpleNamespace)  # whose dictionary cannot be exchanged
        and not _is_library(type(value).__module__, "pyro_vi")
    ]


def _reached(programs: Iterable[Any]) -> Iterator[Any]:
    visited: set[int] = set()
    waiting = [(program, 0) for program in programs]
    while waiting:
        value, depth = waiting.pop()
        if id(value) in visited or depth > _DEPTH or isinstance(value, (Tensor, ModuleType, type)):
            continue
        visited.add(id(value))
        yield value
        waiting += [(held, depth + 1) for _, held in _held_by(value)]


def _places(value: Any) -> Iterator[tuple[str, Any, Any]]:
    """What a function, a partial, a module, a dictionary or a user's object reads by name."""
    if isinstance(value, FunctionType):
        if _is_library(value.__module__):
            return
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield name, cell, None
        for name in _globals(value.__code__):
            yield name, value.__globals__, name
        for name in ("__defaults__", "__kwdefaults__"):
            yield f"{value.__name__}.{name}", value, name
        for name in vars(value):
            yield f"{value.__name__}.{name}", vars(value), name
    elif isinstance(value, partial):
        for name in value.keywords:
            yield name, value.keywords, name
    elif isinstance(value, nn.Module):
        for module in value.modules():
            for name in vars(module):
                if name not in _MODULE_INTERNALS:
                    yield f"{type(module).__name__}.{name}", vars(module), name
    elif type(value) is dict:
        for name in value:
            yield str(name), value, name
    elif hasattr(value, "__dict__") and not _is_library(type(value).__module__, "pyro_vi"):
        for name in (*vars(value), *vars(type(value))):
            holder = vars(value) if name in vars(value) else vars(type(value))
            yield f"{type(value).__name__}.{name}", holder, name


def _globals(code: CodeType) -> Iterator[str]:
    """The globals that a function loads, and the functions inside it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals(constant)


def may_ask_modules(value: Any) -> bool:
    """Whether a distribution may ask modules when it is sampled, or its density computed.

    So it may if it holds one, or if it, or a transform in it, is of a class of neither torch nor
    Pyro, since a method can name any.

    Example:
        >>> import torch
        >>> normal = torch.distributions.Normal(0.0, 1.0)
        >>> flow = torch.distributions.TransformedDistribution(normal, [])
        >>> may_ask_modules(flow)
        False
        >>> flow.transforms.append(nn.Linear(1, 1))
        >>> may_ask_modules(flow)
        True
    """
    visited: set[int] = set()
    found = [value]
    while found:
        value = found.pop()
        if isinstance(value, nn.Module):
            return True
        if id(value) in visited or isinstance(value, (Tensor, ModuleType, type)):
            continue
        visited.add(id(value))
        if isinstance(value, (Distribution, Transform)) and _is_own(type(value)):
            return True
        if isinstance(value, MethodType):
            found += [value.__self__, value.__func__]
        elif isinstance(value, FunctionType):
            found += map(_content, value.__closure__ or ())
        elif isinstance(value, partial):
            found += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, dict):
            found += value.values()
        elif isinstance(value, (list, tuple, set)):
            found += value
        elif hasattr(value, "__dict__"):
            found += vars(value).values()
    return False


def _is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("torch", "pyro")


def _held_by(value: Any) -> Iterator[tuple[str, Any]]:
    """What `value` holds that may be or lead to a module, with the name of each."""
    if isinstance(value, nn.Module):
        for module in value.modules():  # beside submodules: the model that an autoguide holds
            for name, held in vars(module).items():
                if name not in _MODULE_INTERNALS:
                    yield name, held
            yield "", getattr(type(module), "forward", None)
    elif isinstance(value, MethodType):
        yield "", value.__self__
        yield "", value.__func__
    elif isinstance(value, FunctionType):
        if _is_library(value.__module__):
            return
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield name, _content(cell)
        for name in _names(value.__code__):
            yield name, value.__globals__.get(name)
        for held in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            yield "default", held
    elif isinstance(value, partial):
        yield "", value.func
        for held in value.args:
            yield "", held
        yield from value.keywords.items()
    elif isinstance(value, dict):
        for key, held in value.items():
            yield str(key), held
    elif isinstance(value, (list, tuple, set)):
        for index, held in enumerate(value):
            yield str(index), held
    elif hasattr(value, "__dict__") and not _is_library(type(value).__module__):
        yield from list(vars(value).items())
        yield "", vars(type(value)).get("__call__")


def _names(code: CodeType) -> Iterator[str]:
    """The globals and attributes that a function names, and the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _is_library(module: str | None, *others: str) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES.union(others)
