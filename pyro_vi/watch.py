"""Whether what a step was recorded from is still what it was.

A record sees what changes in place in a tensor. What is bound to another object after it was
recorded it cannot see: a number, a function, a layer, a hook, an option of the optimizer. So all
that the code which ran names is looked at before every step, whatever it is, and what store, loss
and optimizer keep. What is not found are objects behind library code.

The smallest steps take 100 microseconds: so what is there is held against what was by identity, in
loops that are not Python's. Only where that finds a difference is it asked which, and whether it
says the same all the same.
"""

from __future__ import annotations

__all__ = ["LAYOUT", "Watch", "is_remade", "is_same", "tensors_in"]

import reprlib
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_vi.holdings import ABSENT, CACHED, Holdings
from pyro_vi.optimizers import HOOKS_OF_ALL, Update
from pyro_vi.reach import CONTAINERS, is_library

if TYPE_CHECKING:
    from pyro_vi.svi import SVI

_END = (object(),)
_ADVICE = "(make it a tensor and fill_ it, or give it to the step)"


class Watch:
    """What is looked at before every step.

    Args:
        svi: whose programs, loss and optimizer they are.
        found: where the programs keep what they read.
        parameters: those that are trained.
        update: the optimizers' step, if it is in the graph.
        read: the tensors that the record reads or changes, besides the optimizers' state.
        remade: entries of dictionaries that a step binds anew to objects of its own: the
            dictionary, by its identity, and the key.
    """

    def __init__(
        self,
        svi: SVI,
        found: Holdings,
        parameters: Sequence[Tensor],
        update: Update | None,
        read: Iterable[Tensor],
        remade: set[tuple[int, Any]],
    ) -> None:
        self._tensors = list({id(tensor): tensor for tensor in read}.values())
        self._memory = [tensor.detach() for tensor in self._tensors]
        stored = set(map(id, pyro.get_param_store()._params.values()))
        self._trainable = [
            one
            for one in self._tensors
            if one.requires_grad or isinstance(one, nn.Parameter) or id(one) in stored
        ]
        known = set(map(id, self._trainable))
        self._plain = [one for one in self._tensors if id(one) not in known]
        # Hooks are added in place.
        self._training = [tuple(map(copy, found)) for found in map(_TRAINING, self._trainable)]
        self._state = update.tensors if update is not None else []
        self._addresses = list(map(Tensor.data_ptr, self._state))
        optimizers = update.optimizers if update is not None else []
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._options = [itemgetter(*sorted(g.keys() - {"params", "lr"})) for g in self._groups]
        self._chosen = list(map(call, self._options, self._groups))
        self._arrays = [(name, array, _bytes(array)) for name, array in found.arrays]
        self._owners = found.owners
        self._spaces = [vars(owner) for owner in found.owners]
        self._types = [type(owner) for owner in found.owners]
        seen = {id(tensor) for tensor in (*self._tensors, *self._state)}
        self._places, self._contents = _Places(seen, remade), _Contents(seen, remade)
        for name, get, key in _outside(svi, parameters, update):
            self._places.add(name, get, key)
        for place in found.places:
            self._places.add(place.name, place.get, place.key, place.item)
        for name, container, ignored in found.containers:
            self._contents.add(name, container, partial(_is_read, ignored))
        for name, container, *keys in _registers(svi, parameters, update):
            self._contents.add(name, container, partial(_is_of, set(map(id, chain(*keys)))))
        self._contents.take()

    def stale(self) -> str | None:
        """Says what is something else than it was, in words; None while all is the same."""
        if (changed := self._places.changed() or self._contents.changed()) is not None:
            return changed
        if not all(map(is_, map(vars, self._owners), self._spaces)):
            return "the attributes of an object were exchanged"
        if not all(map(is_, map(type, self._owners), self._types)):
            return "the class of an object was exchanged"
        if not all(map(Tensor.is_set_to, self._tensors, self._memory)):
            return "a parameter, buffer or tensor lies elsewhere, or otherwise"
        if list(map(Tensor.data_ptr, self._state)) != self._addresses:
            return "the optimizer's state lies elsewhere"
        if list(map(_TRAINING, self._trainable)) != self._training or any(
            map(_NEEDS_GRADIENT, self._plain)
        ):
            return "a parameter, buffer or tensor was frozen, thawed or hooked"
        if list(map(call, self._options, self._groups)) != self._chosen:
            return f"the optimizer's options are others ({self._chosen_anew()})"
        for name, array, before in self._arrays:
            if _bytes(array) != before:
                return f"{name!r} has other numbers {_ADVICE}"
        return None

    def _chosen_anew(self) -> str:
        """Which options are others."""
        found = set[str]()
        for group, get, before in zip(self._groups, self._options, self._chosen, strict=True):
            names = sorted(group.keys() - {"params", "lr"})
            pairs = zip(names, get(group), before, strict=False)
            found |= {name for name, now, old in pairs if now != old}
        return ", ".join(sorted(found))


class _Places:
    """What stands in places.

    Args:
        read: tensors that matter, by identity.
        remade: see `Watch`.
    """

    def __init__(self, read: set[int], remade: set[tuple[int, Any]]) -> None:
        self._read, self._remade = read, remade
        self._own: list[bool] = []
        self._names: list[str] = []
        self._get: list[Callable[[Any], Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []

    def add(self, name: str, get: Callable[[Any], Any], key: Any, item: Any = None) -> None:
        """A place: what it is called, how to read it, and its key if `key` is a dictionary."""
        self._own.append((id(key), item) in self._remade)
        self._names.append(name)
        self._get.append(get)
        self._keys.append(key)
        self._values.append(get(key))

    def changed(self) -> str | None:
        """Says in words of one place that something else is there; None if there is none."""
        if all(map(is_, map(call, self._get, self._keys), self._values)):
            return None
        for i, (get, key) in enumerate(zip(self._get, self._keys, strict=True)):
            now = get(key)
            if now is not self._values[i]:
                if _matters(self._values[i], now, self._read, is_own=self._own[i]):
                    return _words(self._names[i], self._values[i], now)
                self._values[i] = now  # found at once from now on
        return None


class _Contents:
    """What mappings, lists and sets hold.

    Args:
        read: tensors that matter, by identity.
        remade: see `Watch`.
    """

    def __init__(self, read: set[int], remade: set[tuple[int, Any]]) -> None:
        self._read, self._remade = read, remade
        self._names: list[str] = []
        self._containers: list[Any] = []
        self._matter: list[Callable[[Any], bool]] = []
        self._entries: list[list[Any]] = []

    def add(self, name: str, container: Any, matters: Callable[[Any], bool]) -> None:
        """A container, what it is called, and which of its keys matter."""
        self._names.append(name)
        self._containers.append(container)
        self._matter.append(matters)
        self._entries.append(_entries(container, matters))

    def take(self) -> None:
        """Takes what is there now for what was there."""
        self._empty = [one for one in self._containers if not one]
        some = [one for one in self._containers if one]
        views = [dict.values(one) for one in some if isinstance(one, dict)]  # they are live
        self._some = [*some, *views]
        self._held = list(self._all())

    def _all(self) -> Iterator[Any]:
        """All keys, items and values, and an end, so that another number of them is another end."""
        return chain(chain.from_iterable(self._some), _END)

    def changed(self) -> str | None:
        """Says in words what one holds and did not, or held and does not; None if there is none."""
        if not any(self._empty) and all(map(is_, self._all(), self._held)):
            return None
        for i, (name, container) in enumerate(zip(self._names, self._containers, strict=True)):
            now, before = _entries(container, self._matter[i]), self._entries[i]
            if len(now) != len(before):
                others = {key for key, _ in now} ^ {key for key, _ in before}
                named = f": {reprlib.repr(min(others, key=str))}" if others - {None} else ""
                return f"{name!r} has {len(now)} entries, and had {len(before)}{named}"
            for place, ((key, value), (old_key, old)) in enumerate(zip(now, before, strict=True)):
                if _matters(old_key, key, self._read):
                    return f"{name!r} has other entries"
                item = key if isinstance(container, dict) else place
                is_own = (id(container), item) in self._remade
                if _matters(old, value, self._read, is_own=is_own):
                    own = f"{name}.{key}" if isinstance(key, str) else name
                    return _words(own, old, value)
            self._entries[i] = now
        self.take()
        return None


def _entries(container: Any, matters: Callable[[Any], bool]) -> list[tuple[Any, Any]]:
    """Keys and values; the items of a list or a set are its values."""
    if not isinstance(container, dict):
        return [(None, item) for item in container]
    is_ordered = isinstance(container, OrderedDict)  # which has an order of its own
    items: Callable[[Any], Iterable[Any]] = OrderedDict.items if is_ordered else dict.items
    return [one for one in items(container) if matters(one[0])]


def _is_read(unread: set[str], key: Any) -> bool:
    return key not in unread


def _is_of(ids: set[int], key: Any) -> bool:
    return not ids or id(key) in ids


def _matters(old: Any, new: Any, read: set[int], *, is_own: bool = False) -> bool:
    """Whether a program could tell one from the other; of a tensor, it may read the shape alone."""
    if is_own:
        return type(old) is not type(new)
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old is not new and (id(old) in read or LAYOUT(old) != LAYOUT(new))
    return not is_same(old, new)


def is_same(old: Any, new: Any) -> bool:
    """Whether they are one object or value; 1 and 1.0 are two, as 0.0 and -0.0."""
    return old is new or (_is_plain(old) and _is_plain(new) and repr(old) == repr(new))


def is_remade(old: Any, new: Any, within: frozenset[int] = frozenset()) -> bool:
    """Whether one is the other made anew: a program could tell them apart by tensors alone.

    Args:
        within: what they are parts of, by identity.
    """
    if is_same(old, new) or id(old) in within:
        return True
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape
    if type(old) is not type(new):
        return False
    parts, others = _parts(old), _parts(new)
    if parts is None or others is None or len(parts) != len(others):
        return False
    return all(map(partial(is_remade, within=within | {id(old)}), parts, others))


def tensors_in(value: Any, *but: type, within: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """The tensors that a value leads to, except for those behind some kinds of objects."""
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, but) and id(value) not in within:
        for part in _parts(value) or ():
            yield from tensors_in(part, *but, within=within | {id(value)})


def _parts(value: Any) -> list[Any] | None:
    """What a container, or an object of a library, is made of; None if that is not known."""
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
    if isinstance(value, CONTAINERS):
        return list(value)
    if isinstance(value, partial):
        return [value.func, *value.args, value.keywords]
    if isinstance(value, weakref.ref):
        return [value()]
    held = getattr(value, "__dict__", None)
    if isinstance(value, (Tensor, FunctionType, nn.Module, np.generic)) or type(held) is not dict:
        return None
    if not is_library(type(value).__module__):
        return None
    return _parts({name: part for name, part in held.items() if name not in CACHED})


def _words(name: str, old: Any, new: Any) -> str:
    if _is_plain(old) and _is_plain(new):
        said = f"{name!r} is {reprlib.repr(new)}, and was {reprlib.repr(old)}"
        return f"{said} {_ADVICE}" if type(new) in (int, float) else said
    return f"{name!r} is another one"


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is ABSENT or isinstance(value, _PLAIN)


_PLAIN = (bool, int, float, str, bytes, type(None), torch.device)


def _outside(
    svi: SVI, parameters: Iterable[Tensor], update: Update | None
) -> Iterator[tuple[str, Callable[[Any], Any], Any]]:
    """Places of the step that are not the programs'."""
    own = vars(svi)
    for name in ("model", "guide", "optim", "loss_and_grads"):
        yield name, own.get, name
    for name, (module, path, _) in pyro.settings._REGISTRY.items():
        if not name.startswith("validate"):  # which another kind of batch is made by
            yield f"pyro.settings' {name}", attrgetter(path), sys.modules[module]
    store = pyro.get_param_store()
    trained = {id(p) for p in parameters}
    for name, p in store._params.items():
        if id(p) in trained:
            yield f"{name} of the store", partial(_stored, store), name
    for optimizer in update.optimizers if update is not None else ():
        for name in ("state", "param_groups"):
            yield f"the optimizer's {name}", vars(optimizer).get, name
        for state in [optimizer.state[p] for p in parameters if p in optimizer.state]:
            for name in [name for name, value in state.items() if isinstance(value, Tensor)]:
                yield f"the optimizer's {name}", state.get, name


def _stored(store: Any, name: str) -> Any:
    return store._params.get(name)


def _registers(
    svi: SVI, parameters: Sequence[Tensor], update: Update | None
) -> Iterator[tuple[Any, ...]]:
    """Containers of the step that are not the programs'; and the keys that matter, if not all."""
    assert svi.told is not None
    yield "the loss", vars(svi.told._given)
    yield "the optimizer", vars(svi.optim)
    for name in ("optim_objs", "grad_clip"):
        yield "a parameter's optimizer", getattr(svi.optim, name, {}), parameters
    for optimizer in update.optimizers if update is not None else ():
        yield "the optimizer's state", optimizer.state, parameters
        yield "the optimizer's param_groups", optimizer.param_groups
        yield "the optimizer's hooks", optimizer._optimizer_step_pre_hooks
        yield "the optimizer's hooks", optimizer._optimizer_step_post_hooks
    for register in HOOKS_OF_ALL:
        yield "hooks of all optimizers", register
    for name, register in vars(torch.nn.modules.module).items():
        if name.startswith("_global_") and isinstance(register, dict):
            yield "hooks of all modules", register


_NEEDS_GRADIENT = attrgetter("requires_grad")
LAYOUT = attrgetter("shape", "dtype", "device", "layout", "requires_grad")
_TRAINING = attrgetter("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")


def _bytes(array: Any) -> tuple[Any, ...]:
    if not isinstance(array, (np.ndarray, np.generic)):
        return (bytes(array),)
    return array.dtype.str, array.shape, array.tobytes()
