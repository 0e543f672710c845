"""Where Pyro programs keep what they read by name.

A number in a closure, a layer in a global, an option in an attribute: a program finds it there in
every run, and could find something else the next time. `holdings` lists the places: of all that the
programs lead to, those that the code that ran (`pyro_vi.calls`) names.
"""

from __future__ import annotations

__all__ = ["ABSENT", "Holdings", "check_repeatable", "holdings"]

import builtins
import dis
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import _lru_cache_wrapper, partial
from operator import attrgetter, methodcaller
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_vi.calls import Calls
from pyro_vi.capture import Uncapturable
from pyro_vi.reach import CONTAINERS, content, is_library, is_namespace, loaded, namespaces, reached

# What may read attributes that no code names; what shows all globals.
_AT_LARGE = set("AttributeError asdict astuple attrgetter dir vars".split())
_EVERYTHING = set("eval exec globals locals".split())
_NOISE = set("CACHE NOP PRECALL PUSH_NULL".split())
# An object, a name, and perhaps another value, as what getattr is called with.
_BY_NAME = re.compile(
    r"(LOAD_(?:FAST|DEREF|GLOBAL) (?:LOAD_ATTR )*)LOAD_CONST (?:LOAD_(?:FAST|DEREF|CONST) )?CALL"
)
_INTERNALS = set(vars(PyroModule()))  # of every module, whatever its class
_PLAIN = {nn.Module, PyroModule, object}
_ITEMS = 10_000  # of a container or an array that are looked at in every step


def holdings(programs: Iterable[Any], calls: Calls) -> Holdings:
    """Where programs keep what they read, as far as it can be followed.

    Args:
        programs: callables and modules.
        calls: of runs of them.

    Raises:
        Uncapturable: what they read cannot be listed: `globals()`, an iterator.
    """
    found = Holdings(calls.codes)
    found.follow([*programs, *calls.functions(), *calls.objects()])
    return found


class _Absent:
    """What stands for an attribute that is not there."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def check_repeatable(programs: Sequence[Any]) -> None:
    """Raises Uncapturable if programs read an iterator, of which every run takes one more."""
    functions = [one for one in reached(programs) if isinstance(one, FunctionType)]
    Holdings([one.__code__ for one in functions]).follow(programs)


class Holdings:
    """Where programs keep what they read by name, and could find something else the next time.

    Args:
        ran: the code of functions that ran.

    Attributes:
        places: a readable name, a function of a key, and the key: cells of closures, globals that
            the code loads, attributes that it names, code and defaults of functions, slots.
        containers: a readable name, and a dictionary, list or set.
        owners: objects with attributes.
        arrays: a readable name, and an array of NumPy.
    """

    def __init__(self, ran: Iterable[CodeType]) -> None:
        self.places: list[tuple[str, Callable[[Any], Any], Any]] = []
        self.containers: list[tuple[str, Any]] = []
        self.owners: list[Any] = []
        self.arrays: list[tuple[str, Any]] = []
        self._ran = {id(code): code for code in ran}
        self._names = {name for code in ran for name in (code.co_name, *code.co_names)}
        self._names |= {text for code in ran for text in _strings(code.co_consts)}
        own = [code for code in ran if "site-packages" not in code.co_filename]
        found = {name for code in own for name in loaded(code)}
        if everything := sorted(found & _EVERYTHING):
            raise Uncapturable(f"{everything[0]}() in the programs, which may read anything")
        asked = {name for code in own for name in _asked(code)}
        self._at_large = bool(found & _AT_LARGE or None in asked)
        self._asked = {name for name in asked if name is not None}
        self._known: set[Any] = set()
        self._waiting: list[tuple[str, Any]] = []

    def follow(self, values: Iterable[Any]) -> None:
        """Finds what values lead to."""
        self._waiting = [("", value) for value in values]
        while self._waiting:
            name, value = self._waiting.pop()
            if not isinstance(value, Tensor) and self._is_new(id(value)):
                self._open(name, value)

    def _open(self, name: str, value: Any) -> None:
        kind = type(value)
        if isinstance(value, FunctionType):
            if id(value.__code__) in self._ran:
                self._function(value)
        elif isinstance(value, MethodType):
            self._waiting += [(name, value.__self__), (name, value.__func__)]
        elif isinstance(value, _lru_cache_wrapper):
            if isinstance(value.__wrapped__, FunctionType):  # which may not have run
                self._function(value.__wrapped__)
        elif isinstance(value, partial):
            called = getattr(value.func, "__name__", name)
            self._container(f"a partial of {called}", value.keywords)
            self._waiting += [(name, one) for one in (value.func, *value.args)]
        elif isinstance(value, type):
            self._classes(value)
        elif isinstance(value, ModuleType):
            if is_namespace(value.__name__):
                self._attributes(value, self._names.intersection(vars(value)))
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._check(name, value, value.size)
            self.arrays.append((name, value))
        elif isinstance(value, CONTAINERS):
            self._container(name, value)
        elif hasattr(kind, "__next__") and kind.__module__ in ("builtins", "itertools"):
            raise Uncapturable(f"{name!r} is a {kind.__name__}, which goes on from step to step")
        elif isinstance(value, (Distribution, Messenger, Transform)):
            self._attributes(value, [one for one in vars(value) if one[:1] != "_"])
        elif kind.__module__.startswith("pyro_vi."):  # what it keeps is its own business
            self._waiting += _items(getattr(value, "__dict__", {}))
        if not isinstance(value, (nn.Module, type)) and not is_library(kind.__module__, "pyro_vi"):
            self._object(value)

    def _function(self, function: FunctionType) -> None:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            self._place(name, content, cell)
        for path, space, names in namespaces(function):
            for name in names:
                if name in space or not hasattr(builtins, name):
                    self._item(f"{path}.{name}" if path else name, space, name)
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self._place(f"{function.__name__}.{name}", attrgetter(name), function)
        self._container(function.__name__, vars(function))

    def _module(self, module: nn.Module) -> None:
        kind, held = type(module), vars(module)
        self._classes(kind)
        self.owners.append(module)
        libraries = {one for one in kind.__mro__ if not is_namespace(one.__module__)}
        if self._at_large or libraries - _PLAIN:  # which read it too
            self._container(kind.__name__, held)
        else:
            self._attributes(module, self._read(module) | _INTERNALS.intersection(held))

    def _object(self, value: Any) -> None:
        kind, held = type(value), getattr(value, "__dict__", None)
        self._classes(kind)
        if type(held) is dict:
            self.owners.append(value)
            if self._at_large:
                self._container(kind.__name__, held)
            else:
                self._attributes(value, self._read(value))
        for one in kind.__mro__:
            for slot in _slots(one):
                self._place(f"{kind.__name__}.{slot}", partial(_attribute, value), slot)

    def _read(self, value: Any) -> set[str]:
        """The attributes of an object that code names, and those that it asks for."""
        return self._names.intersection([*vars(value), *dir(type(value))]) | self._asked

    def _classes(self, kind: type) -> None:
        """What a class of a user's keeps, and those that it inherits from."""
        for one in kind.__mro__:
            if not is_library(one.__module__, "pyro_vi"):
                for name in sorted(self._names.intersection(dir(kind))):
                    if self._is_new((one, name)):
                        self._item(f"{one.__name__}.{name}", vars(one), name)

    def _attributes(self, value: Any, names: Iterable[str]) -> None:
        for name in sorted(names):
            if self._is_new((id(value), name)):
                kind = value if isinstance(value, ModuleType) else type(value)
                self._item(f"{kind.__name__}.{name}", vars(value), name)

    def _container(self, name: str, container: Any) -> None:
        self._check(name, container, len(container))
        if not isinstance(container, tuple):
            self.containers.append((name, container))
        self._waiting += [(f"{name}.{key}", value) for key, value in _items(container)]

    def _item(self, name: str, held: Any, key: str) -> None:
        self._place(name, methodcaller("get", key, ABSENT), held)

    def _place(self, name: str, get: Callable[[Any], Any], key: Any) -> None:
        self.places.append((name, get, key))
        self._waiting.append((name, get(key)))

    def _is_new(self, key: Any) -> bool:
        before = len(self._known)
        self._known.add(key)
        return len(self._known) > before

    def _check(self, name: str, held: Any, items: int) -> None:
        if items > _ITEMS:
            raise Uncapturable(
                f"{name!r}, {items} items in a {type(held).__name__}, which may change unseen:"
                " make it a tensor"
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


def _asked(code: CodeType) -> Iterator[str | None]:
    """What code gives getattr and hasattr for a name; None for one that is made in the run."""
    instructions = [one for one in dis.get_instructions(code) if one.opname not in _NOISE]
    for i, one in enumerate(instructions):
        if one.opname == "LOAD_GLOBAL" and one.argval in ("getattr", "hasattr"):
            after = instructions[i + 1 :]
            found = _BY_NAME.match(" ".join(each.opname for each in after))
            name = after[found[1].count(" ")].argval if found is not None else None
            yield name if isinstance(name, str) else None
        elif one.argval == "__dict__":
            yield None


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, ABSENT)
