"""Where Pyro programs keep what they read by name.

A number in a closure, a layer in a global, an option in an attribute: a program finds it there in
every run, and could find something else the next time. `holdings` lists the places: of all that the
programs lead to, those that the code that ran (`pyro_vi.calls`) names.
"""

from __future__ import annotations

__all__ = ["ABSENT", "CACHED", "Holdings", "Place"]

import builtins
import ctypes
import dis
import gc
import io
import os
import random
import re
import weakref
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from functools import _lru_cache_wrapper, cache, partial
from operator import attrgetter, methodcaller
from types import (
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.utils.data import Dataset

from pyro_vi.calls import Calls
from pyro_vi.capture import Uncapturable
from pyro_vi.reach import CONTAINERS, codes, content, is_library, is_namespace, loaded, namespaces

# What may read attributes that no code names; what shows all globals.
_AT_LARGE = set("AttributeError asdict astuple attrgetter dir vars".split())
_EVERYTHING = set("eval exec globals locals".split())
_NOISE = set("CACHE NOP PRECALL PUSH_NULL".split())
# An object, a name, and perhaps another value, as what getattr is called with.
_BY_NAME = re.compile(
    r"(LOAD_(?:FAST|DEREF|GLOBAL) (?:LOAD_ATTR )*)LOAD_CONST (?:LOAD_(?:FAST|DEREF|CONST) )?CALL"
)
_INTERNALS = set(vars(PyroModule()))  # of every module, whatever its class
# Classes of libraries that read nothing of what a class made from them keeps.
_PLAIN = {nn.Module, PyroModule, Dataset}
CACHED = frozenset({"_cached_x_y"})  # the last pair of a transform
_NUMBERS = (bool, int, float, str, type(None))
_PLAIN_MODULES = {"abc", "builtins", "enum", "typing"}
_HOLDERS = ("collections", "torch.utils.data")  # whose objects keep what is a user's
_CHANCE: tuple[type, ...] = (random.Random, np.random.Generator, np.random.RandomState)
_CHANCE += (np.random.BitGenerator, torch.Generator)
_DEFAULTS: list[Any] = [vars(random)["_inst"], vars(np.random.mtrand)["_rand"]]
_DEFAULTS += [torch.default_generator]
_BYTES = (array, bytearray, ctypes.Array, ctypes._SimpleCData)
_ITEMS = 10_000  # of all containers, or an array, that are looked at in every step


class Place(NamedTuple):
    """Where something is kept.

    Attributes:
        name: what it is called.
        get, key: what is there is get(key).
        put: puts something there; ABSENT takes away what is.
        item: its key there, if `key` is a dictionary.
    """

    name: str
    get: Callable[[Any], Any]
    key: Any
    put: Callable[[Any], object]
    item: Any = None


class _Absent:
    """What stands for an attribute that is not there."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


class Holdings:
    """Where programs keep what they read by name, and could find something else the next time.

    Args:
        programs: callables, modules and handlers.
        calls: of runs of them.

    Raises:
        Uncapturable: what they read cannot be listed, such as `globals()`, or goes on from run to
            run by itself, such as an iterator.

    Attributes:
        places: cells of closures, globals that the code which ran loads, attributes that it names,
            code and defaults of functions, slots.
        containers: a readable name, a dictionary, list or set, and those of its keys that nobody
            reads.
        owners: objects with attributes.
        arrays: a readable name, and an array, of NumPy or of bytes.
        caches: attributes of distributions and handlers, which keep what they have computed there.
    """

    def __init__(self, programs: Iterable[Any], calls: Calls) -> None:
        self._ran = {id(code): code for code, _ in calls.codes}
        self._names = _named(self._ran.values())
        own = [one for one in calls.codes if "site-packages" not in one[0].co_filename]
        found = {name for code, _ in own for name in loaded(code)}
        if everything := sorted(found & _EVERYTHING):
            raise Uncapturable(f"{everything[0]}() in the programs, which may read anything")
        asked = {name for code, space in own for name in _asked(code, space)}
        self._at_large = bool(found & _AT_LARGE or None in asked)
        self._asked = {name for name in asked if name is not None}
        values, before = [*programs, *calls.functions(), *calls.objects()], -1
        while len(self._names) > before:  # some objects name attributes, too
            before = len(self._names)
            self._walk(values)

    def _walk(self, values: Sequence[Any]) -> None:
        self.places: list[Place] = []
        self.containers: list[tuple[str, Any, set[str]]] = []
        self.owners: list[Any] = []
        self.arrays: list[tuple[str, Any]] = []
        self.caches: list[dict[str, Any]] = []
        self._known: set[Any] = set()
        self._items = 0
        self._waiting = [("an argument", value) for value in reversed(values)]
        while self._waiting:
            name, value = self._waiting.pop()
            if self._is_new(id(value)):
                self._open(name, value)

    def _open(self, name: str, value: Any) -> None:
        kind = type(value)
        if isinstance(value, Tensor):
            self._attributes(value, self._names.intersection(vars(value)))
        elif isinstance(value, FunctionType):
            if id(value.__code__) in self._ran:
                self._function(value)
            elif not is_namespace(value.__globals__.get("__name__")):  # around a user's, perhaps
                self._waiting += [(name, content(cell)) for cell in value.__closure__ or ()]
        elif isinstance(value, MethodType):
            self._waiting += [(name, value.__self__), (name, value.__func__)]
        elif isinstance(value, BuiltinMethodType):
            self._waiting.append((name, value.__self__))
        elif isinstance(value, partial):
            called = getattr(value.func, "__name__", name)
            self._container(f"a partial of {called}", value.keywords)
            self._waiting += [(name, one) for one in (value.func, *value.args)]
        elif isinstance(value, type):
            self._classes(value)
        elif isinstance(value, (attrgetter, methodcaller)):
            texts = _strings(value.__reduce__()[1])
            self._names |= {name for text in texts for name in text.split(".")}
        elif isinstance(value, ModuleType):
            if value is os:
                self._waiting.append(("os.environ", os.environ))
            if is_namespace(value.__name__):
                held = self._names.intersection(vars(value)) | self._asked
                self._attributes(value, held)
        elif value is os.environ:
            self._environment()
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._check(name, value, value.size)
            self.arrays.append((name, value))
        elif isinstance(value, _BYTES):
            self._check(name, value, len(bytes(value)))
            self.arrays.append((name, value))
        elif isinstance(value, CONTAINERS):
            self._container(name, value)
            if is_namespace(kind.__module__):
                self._object(value)
        elif isinstance(value, io.IOBase):
            pass  # a log
        elif isinstance(value, _CHANCE) or hasattr(kind, "__next__"):
            if all(value is not one for one in _DEFAULTS):  # which are looked at while recording
                raise Uncapturable(
                    f"{name!r} is a {kind.__name__}, which goes on from step to step"
                )
        elif isinstance(value, weakref.ref):
            self._waiting.append((name, value()))
        elif isinstance(value, (_lru_cache_wrapper, MappingProxyType)):
            if isinstance(inner := getattr(value, "__wrapped__", None), FunctionType):
                self._function(inner)  # which may not have run
            self._waiting += [(name, one) for one in gc.get_referents(value)]
        elif isinstance(value, (Distribution, Messenger, Transform)):
            self.caches.append(vars(value))
            self._attributes(value, [one for one in vars(value) if one[:1] != "_"])
            if is_namespace(kind.__module__):
                self._classes(kind)
                self._attributes(value, self._read(value))
        else:
            if kind.__module__.startswith("pyro_vi."):  # what it keeps is its own business
                self._waiting += _items(getattr(value, "__dict__", {}))
            self._object(value)

    def _function(self, function: FunctionType) -> None:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            self._place(name, content, cell, partial(_fill, cell))
        for path, space, names in namespaces(function):
            for name in names:
                if name in space or not hasattr(builtins, name):
                    self._item(f"{path}.{name}" if path else name, space, name)
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            put = partial(setattr, function, name)
            self._place(f"{function.__name__}.{name}", attrgetter(name), function, put)
        self._container(function.__name__, vars(function))

    def _environment(self) -> None:
        """Its variables: those that are set, and those that code may ask for; torch sets others."""
        held = vars(os.environ)["_data"]
        asked = {os.environ.encodekey(name) for name in self._names if name.isupper()}
        for key in sorted({*held, *asked}):
            self._item(f"os.environ[{os.fsdecode(key)!r}]", held, key)

    def _module(self, module: nn.Module) -> None:
        kind, held = type(module), vars(module)
        self._classes(kind)
        self.owners.append(module)
        if _libraries(kind):
            self._container(kind.__name__, held, self._unread(module))
        else:
            self._attributes(module, self._read(module) | _INTERNALS.intersection(held))

    def _object(self, value: Any) -> None:
        kind, held = type(value), getattr(value, "__dict__", None)
        is_users = not is_library(kind.__module__, "pyro_vi")
        self._classes(kind)
        if type(held) is dict:
            self.owners.append(value)
            if (is_users and _libraries(kind)) or kind.__module__.startswith(_HOLDERS):
                self._container(kind.__name__, held, self._unread(value))
            elif is_users and self._at_large:
                self._container(kind.__name__, held)
            elif is_users:
                self._attributes(value, self._read(value))
            else:
                self._attributes(value, self._names.intersection(held) | self._asked)
        for one in kind.__mro__ if is_users else ():
            for slot in _slots(one):
                put = partial(_put_attribute, value, slot)
                self._place(f"{kind.__name__}.{slot}", partial(_attribute, value), slot, put)

    def _read(self, value: Any) -> set[str]:
        """The attributes of an object that code names, and those that it asks for."""
        return self._names.intersection([*vars(value), *dir(type(value))]) | self._asked

    def _unread(self, value: Any) -> Set[str]:
        """The attributes of an object that nobody reads, such as the counter of a loop outside."""
        unread = CACHED
        if isinstance(value, AutoGuide):  # of which copying takes the model, and it needs none
            unread |= {"_model"}
        names = _names_of(cast(Hashable, type(value)))
        if self._at_large or names is None:
            return unread
        plain = {name for name, held in vars(value).items() if isinstance(held, _NUMBERS)}
        return (plain - names - self._read(value) - _INTERNALS) | unread

    def _classes(self, kind: type) -> None:
        """What a class of a user's keeps, those that it inherits from, and those that make them."""
        for one in kind.__mro__:
            if is_namespace(one.__module__):
                for name in sorted(self._names.intersection(dir(kind)) | self._asked):
                    if self._is_new((one, name)):
                        put = partial(_put_attribute, one, name)
                        self._item(f"{one.__name__}.{name}", vars(one), name, put)
        if is_namespace(type(kind).__module__):
            self._classes(type(kind))

    def _attributes(self, value: Any, names: Iterable[str]) -> None:
        for name in sorted(names):
            if self._is_new((id(value), name)):
                kind = value if isinstance(value, ModuleType) else type(value)
                self._item(f"{kind.__name__}.{name}", vars(value), name)

    def _container(self, name: str, container: Any, unread: Iterable[str] = ()) -> None:
        if not isinstance(container, (tuple, frozenset)):
            self.containers.append((name, container, set(unread)))
        found = _items(container)
        self._items += len(found)
        self._check(name, container, self._items)
        self._waiting += [(f"{name}.{key}", value) for key, value in found]
        if isinstance(container, dict):
            self._waiting += [(name, key) for key in dict.keys(container) if type(key) is not str]

    def _item(
        self, name: str, held: Any, key: Any, put: Callable[[Any], object] | None = None
    ) -> None:
        put = put or partial(_put, held, key)
        self._place(name, methodcaller("get", key, ABSENT), held, put, key)

    def _place(
        self,
        name: str,
        get: Callable[[Any], Any],
        key: Any,
        put: Callable[[Any], object],
        item: Any = None,
    ) -> None:
        self.places.append(Place(name, get, key, put, item))
        self._waiting.append((name, get(key)))

    def _is_new(self, key: Any) -> bool:
        before = len(self._known)
        self._known.add(key)
        return len(self._known) > before

    def _check(self, name: str, held: Any, items: int) -> None:
        if items > _ITEMS:
            raise Uncapturable(
                f"{items} items in what the programs read, with {name!r}, a"
                f" {type(held).__name__}, which may change unseen: make it a tensor"
            )


def _items(container: Any) -> list[tuple[str, Any]]:
    if isinstance(container, dict):
        return [(str(key), value) for key, value in dict.items(container)]
    return [(str(i), value) for i, value in enumerate(container)]


def _strings(constants: Iterable[Any]) -> Iterator[str]:
    for one in constants:
        if isinstance(one, str):
            yield one
        elif isinstance(one, tuple):  # such as the names of a pattern
            yield from _strings(one)


def _put(held: dict[Any, Any], key: Any, value: Any) -> None:
    if value is ABSENT:
        held.pop(key, None)
    else:
        held[key] = value


def _put_attribute(value: Any, name: str, held: Any) -> None:
    if held is ABSENT:
        delattr(value, name)
    else:
        setattr(value, name, held)


def _fill(cell: CellType, value: Any) -> None:
    cell.cell_contents = value


def _named(codes: Iterable[CodeType]) -> set[str]:
    """The names in code, and what may be one: its strings."""
    found = {name for code in codes for name in (code.co_name, *code.co_names)}
    return found | {text for code in codes for text in _strings(code.co_consts)}


def _libraries(kind: type) -> list[type]:
    """The classes of libraries that it is made from, and that read what it keeps."""
    others = [one for one in kind.__mro__ if not is_namespace(one.__module__)]
    return [one for one in others if one not in _PLAIN and one.__module__ not in _PLAIN_MODULES]


@cache
def _names_of(kind: Any) -> frozenset[str] | None:
    """What the code of its libraries' classes names; None if that may be anything."""
    members = [value for one in _libraries(kind) for value in vars(one).values()]
    members = [getattr(one, "fget", None) or getattr(one, "__func__", one) for one in members]
    functions = [one for one in members if isinstance(one, FunctionType)]
    for one in functions:
        if None in _asked(one.__code__, one.__globals__):
            return None
    return frozenset(_named(code for one in functions for code in codes(one.__code__)))


def _asked(code: CodeType, space: Mapping[str, Any]) -> Iterator[str | None]:
    """What code gives getattr and hasattr for a name; None for one that is made in the run.

    Of a library's module (`getattr(dist, name)`) nothing is asked that could be another.
    """
    instructions = [one for one in dis.get_instructions(code) if one.opname not in _NOISE]
    for i, one in enumerate(instructions):
        if one.opname == "LOAD_GLOBAL" and one.argval in ("getattr", "hasattr"):
            after = instructions[i + 1 :]
            of = space.get(after[0].argval) if after[0].opname == "LOAD_GLOBAL" else None
            if isinstance(of, ModuleType) and not is_namespace(of.__name__):
                continue
            found = _BY_NAME.match(" ".join(each.opname for each in after))
            name = after[found[1].count(" ")].argval if found is not None else None
            yield name if isinstance(name, str) else None
        elif one.argval == "__dict__":
            yield None


def _slots(kind: type) -> list[str]:
    """The attributes of a class that have a slot, by the names that they go by outside."""
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    private = f"_{kind.__name__.lstrip('_')}"
    names = [f"{private}{n}" if n[:2] == "__" and n[-2:] != "__" else n for n in names]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, ABSENT)
