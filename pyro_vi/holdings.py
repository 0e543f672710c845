"""Where Pyro programs keep what they read by name.

A number in a closure, a layer in a global, an option in an attribute: a program finds it there in
every run, and could find something else the next time. `holdings` lists the places, as far as the
programs lead to them (`pyro_vi.reach`): through methods and properties that their code names too.
"""

from __future__ import annotations

__all__ = ["Holdings", "holdings"]

import dis
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from pyro_vi.reach import CONTAINERS, codes, content, is_library, is_users, names_in, reached

# Names in code that may read attributes without naming them.
_AT_LARGE = set(
    "AttributeError __dict__ asdict astuple attrgetter dir eval exec getattr globals hasattr locals"
    " vars".split()
)
# Methods that no step calls.
_MAKERS = {"__init__", "__init_subclass__", "__new__", "__repr__", "__setstate__"}


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
            if not is_library(one.__module__, "pyro_vi") and id(one) not in known:
                known.add(id(one))
                found.containers.append((one.__name__, vars(one)))

    values, names = _followed(programs)
    for name, value, ours in values:
        if isinstance(value, FunctionType):
            if not is_library(value.__module__, "pyro_vi"):
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
        elif isinstance(value, CONTAINERS):
            if not ours and not isinstance(value, tuple):
                contains(name, value)
        elif isinstance(value, (np.ndarray, np.generic)):
            found.arrays.append((name, value))
        elif not is_library(type(value).__module__, "pyro_vi"):
            if is_users(value):
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
        values = list(reached(roots, None if names & _AT_LARGE else names))
        known = {id(value) for _, value, _ in values}
        functions = [value for _, value, _ in values if isinstance(value, FunctionType)]
        found = [one.__code__ for one in functions if not is_library(one.__module__, "pyro_vi")]
        before, names = names, set().union(*map(names_in, found), *map(_strings_in, found))
        kinds = {one for _, value, _ in values for one in _kinds(value)}
        methods = [
            method
            for kind in kinds
            for name, held in vars(kind).items()
            if name in names or (name.startswith("__") and name not in _MAKERS)
            for method in _functions(held)
            if id(method) not in known
        ]
        if not methods and names == before:
            return values, names
        roots += methods


def _kinds(value: Any) -> Iterator[type]:
    """The user's own classes of an object, or of a module's parts."""
    ones = value.modules() if isinstance(value, nn.Module) else (value,)
    for one in ones:
        for kind in (one if isinstance(one, type) else type(one)).__mro__:
            if not is_library(kind.__module__, "pyro_vi"):
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


def _strings_in(code: CodeType) -> set[str]:
    """The strings in a function's code, which may name attributes too."""
    return {c for one in codes(code) for c in one.co_consts if isinstance(c, str)}


def _places(function: FunctionType) -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """What a function reads by name, besides its own attributes."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield name, partial(_content_of, cell), None
    everything = function.__globals__
    for name in sorted(_globals(function.__code__)):
        module = everything.get(name)
        if isinstance(module, ModuleType) and is_library(module.__name__, "pyro_vi"):
            continue
        yield name, everything.get, name
        if isinstance(module, ModuleType):
            for inner in sorted(names_in(function.__code__) & vars(module).keys()):
                yield f"{name}.{inner}", vars(module).get, inner
    for name in ("__code__", "__defaults__", "__kwdefaults__"):
        yield f"{function.__name__}.{name}", partial(_attribute, function), name


def _globals(code: CodeType) -> set[str]:
    """The globals that a function loads, and the functions inside it."""
    return {
        instruction.argval
        for one in codes(code)
        for instruction in dis.get_instructions(one)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, None)


def _content_of(cell: CellType, key: None) -> Any:
    return content(cell)
