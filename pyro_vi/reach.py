"""What a Pyro program can reach, wherever it keeps it: modules, and the settings that it reads.

A program is a module, or a function, a method, a partial (Pyro's handlers are partials) or an
object that leads to modules: by its attributes, closure, arguments, containers, or the globals that
its code names. All of these are followed; library code is not.
"""

from __future__ import annotations

__all__ = ["Holdings", "holdings", "may_ask_modules", "objects", "reach"]

import dis
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

_DEPTH = 12  # how far to look for modules behind a program
_LIBRARIES = set(
    "arviz builtins collections functools logging matplotlib numpy pandas pyro scipy sklearn"
    " threading torch tqdm weakref xarray zuko".split()
)  # their objects and functions lead to no module of a user's
_CONTAINERS = (dict, list, tuple, set, deque)
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


class Holdings(NamedTuple):
    """Where programs keep what they read by name, and could find something else the next time.

    Attributes:
        places: a readable name, a function of a key, and the key: cells of closures, globals that
            the code loads, code and defaults of functions, slots.
        containers: a readable name, and a mapping, list or set: attributes of modules, of a user's
            objects and their classes, dictionaries and the like.
        owners: objects with attributes.
        arrays: a readable name, and an array of NumPy.
    """

    places: list[tuple[str, Callable[[Any], Any], Any]]
    containers: list[tuple[str, Any]]
    owners: list[Any]
    arrays: list[tuple[str, Any]]


def holdings(*programs: Any) -> Holdings:
    """Where programs keep what they read, as far as it can be followed."""
    found = Holdings([], [], [], [])
    known: set[int] = set()

    def contains(name: str, container: Any) -> None:
        if id(container) not in known:
            known.add(id(container))
            found.containers.append((name, container))

    def owns(value: Any, name: str) -> None:
        if id(value) not in known:
            known.add(id(value))
            found.owners.append(value)
            contains(name, vars(value))

    def classes(kind: type) -> None:
        for one in kind.__mro__:
            if not _is_library(one.__module__, "pyro_vi") and id(one) not in known:
                known.add(id(one))
                found.containers.append((one.__name__, vars(one)))

    reached, names = _followed(programs)
    for name, value, ours in reached:
        if isinstance(value, FunctionType):
            if not _is_library(value.__module__, "pyro_vi"):
                found.places.extend(_places(value))
                contains(value.__name__, vars(value))
        elif isinstance(value, nn.Module):
            for module in value.modules():
                owns(module, type(module).__name__)
                classes(type(module))
                for inner in vars(module).values():
                    if isinstance(inner, dict):
                        contains(type(module).__name__, inner)
        elif isinstance(value, partial):
            contains(name, value.keywords)
        elif isinstance(value, type):
            classes(value)
        elif isinstance(value, _CONTAINERS):
            if not ours and not isinstance(value, tuple):
                contains(name, value)
        elif isinstance(value, (np.ndarray, np.generic)):
            found.arrays.append((name, value))
        elif not _is_library(type(value).__module__, "pyro_vi"):
            if _is_users(value):
                kind, held = type(value).__name__, vars(value)
                if names & _AT_LARGE:
                    owns(value, kind)
                else:
                    read = sorted(names & {*held, *dir(type(value))})
                    found.owners.append(value)
                    found.places.extend((f"{kind}.{one}", held.get, one) for one in read)
            classes(type(value))
            for one in type(value).__mro__:
                for slot in _slots(one):
                    found.places.append((slot, partial(_attribute, value), slot))
    return found


def _followed(programs: Iterable[Any]) -> tuple[list[tuple[str, Any, bool]], set[str]]:
    """What programs lead to, through methods of a user's too; and all names in their code.

    Of a user's objects, only what the code names: a trainer that is the model too counts its steps.
    """
    roots, names = list(programs), set[str]()
    while True:
        reached = list(_reached(roots, None if names & _AT_LARGE else names))
        known = {id(value) for _, value, _ in reached}
        functions = [value for _, value, _ in reached if isinstance(value, FunctionType)]
        codes = [one.__code__ for one in functions if not _is_library(one.__module__, "pyro_vi")]
        before, names = names, {name for code in codes for name in _mentioned(code)}
        kinds = {one for _, value, _ in reached for one in _kinds(value)}
        methods = [
            method
            for kind in kinds
            for name, held in vars(kind).items()
            if name in names or (name.startswith("__") and name not in _MAKERS)
            for method in _functions(held)
            if id(method) not in known
        ]
        if not methods and names == before:
            return reached, names
        roots += methods


# Names of code that may read attributes without naming them; and of methods that no step calls.
_AT_LARGE = set(
    "AttributeError __dict__ asdict astuple attrgetter dir eval exec getattr globals hasattr locals"
    " vars".split()
)
_MAKERS = {"__init__", "__init_subclass__", "__new__", "__repr__", "__setstate__"}


def _kinds(value: Any) -> Iterator[type]:
    """The user's own classes of an object, or of a module's parts."""
    ones = value.modules() if isinstance(value, nn.Module) else (value,)
    for one in ones:
        for kind in (one if isinstance(one, type) else type(one)).__mro__:
            if not _is_library(kind.__module__, "pyro_vi"):
                yield kind


def _functions(held: Any) -> list[FunctionType]:
    """The function of what a class holds as a method or a property."""
    if isinstance(held, (staticmethod, classmethod)):
        held = held.__func__
    elif isinstance(held, property):
        held = held.fget
    elif isinstance(held, cached_property):
        held = held.func
    return [held] if isinstance(held, FunctionType) else []


def _mentioned(code: CodeType) -> Iterator[str]:
    """The names in a function's code, and its strings."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _mentioned(constant)


def _places(function: FunctionType) -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """What a function reads by name, besides its own attributes."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, partial(_content_of, cell), None
    everything = function.__globals__
    for name in _globals(function.__code__):
        module = everything.get(name)
        if isinstance(module, ModuleType) and _is_library(module.__name__, "pyro_vi"):
            continue
        yield name, everything.get, name
        if isinstance(module, ModuleType):
            for inner in _names(function.__code__):
                if inner in vars(module):
                    yield f"{name}.{inner}", vars(module).get, inner
    for name in ("__code__", "__defaults__", "__kwdefaults__"):
        yield f"{function.__name__}.{name}", partial(_attribute, function), name


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, None)


def _content_of(cell: CellType, key: None) -> Any:
    return _content(cell)


def objects(*programs: Any) -> list[Any]:
    """The instances of a user's own classes that programs reach, modules left out."""
    return [
        value
        for _, value, _ in _reached(programs)
        if _is_users(value)
        and not isinstance(value, SimpleNamespace)  # whose dictionary cannot be exchanged
    ]


def _is_users(value: Any) -> bool:
    """Whether it is an object of a user's own class, and no module."""
    return (
        type(getattr(value, "__dict__", None)) is dict
        and not isinstance(value, (nn.Module, FunctionType, MethodType, partial))
        and not _is_library(type(value).__module__, "pyro_vi")
    )


def _reached(
    programs: Iterable[Any], names: set[str] | None = None
) -> Iterator[tuple[str, Any, bool]]:
    """What programs lead to, each once; through a user's objects only by names, if they are given.

    Returns:
        The last name that leads there, what it is, and whether it is an object of this package that
        is no module, or a container of one: what those keep is their own business.
    """
    visited: set[int] = set()
    waiting = [("", program, False) for program in programs]
    for _ in range(_DEPTH + 1):
        deeper = []
        for name, value, ours in waiting:
            if id(value) in visited or isinstance(value, (Tensor, ModuleType)):
                continue
            visited.add(id(value))
            if not isinstance(value, _CONTAINERS):
                ours = type(value).__module__.startswith("pyro_vi.")
                ours = ours and not isinstance(value, nn.Module)
            yield name, value, ours
            if not isinstance(value, type):
                read = names if _is_users(value) else None
                deeper += [
                    (inner, held, ours)
                    for inner, held in _held_by(value)
                    if read is None or not inner or inner in read
                ]
        waiting = deeper


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
    elif isinstance(value, (list, tuple, set, deque)):
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
