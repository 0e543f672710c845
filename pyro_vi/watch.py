"""Whether what a step was recorded from is still what it was.

A record sees what changes in place. What is bound to another object, or set to another number,
after it was recorded, it cannot see: so that is looked at before every step, wherever programs,
modules, store and optimizer keep it. What nobody can find are objects behind library code.

It is done before every compiled step, of which the smallest take 100 microseconds: so first what
is there is held against what was, by identity, in loops that are not Python's. Only where that
finds a difference is it asked which, and whether the values are equal all the same.
"""

from __future__ import annotations

__all__ = ["watch"]

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import call, is_
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
from torch import Tensor, nn

from pyro_vi.optimizers import Update
from pyro_vi.reach import setting, settings

if TYPE_CHECKING:
    from pyro_vi.svi import SVI

_ITEMS = 100  # of a list or an array that are looked at


def watch(
    svi: SVI,
    modules: Iterable[nn.Module],
    parameters: Sequence[Tensor],
    update: Update | None,
    read: Sequence[Tensor],
) -> Callable[[], str | None]:
    """Says what is something else than now, in words; None while all is the same.

    Args:
        svi: whose programs, loss and optimizer they are.
        modules: those that the programs reach.
        parameters: those that are trained.
        update: the optimizers' step, if it is in the graph.
        read: other tensors that the programs read.
    """
    modules = list(modules)
    store = pyro.get_param_store()
    trained = {id(p) for p in parameters}
    named = [(name, p) for name, p in store._params.items() if id(p) in trained]
    names, owners = [name for name, _ in named], [p for _, p in named]
    owned = [(module, one, list(one.values())) for module in modules for one in _registers(module)]
    registers = [register for _, register, _ in owned]
    registered = list(chain.from_iterable(register.values() for register in registers))
    tensors = list({id(t): t for t in (*registered, *parameters) if isinstance(t, Tensor)}.values())
    marks = list(map(_marks, tensors))
    settled, loose = _Places(), []
    for words, holder, key, value in _places(svi, modules, parameters, update):
        settled.add(words, holder, key, value)
    seen = {id(tensor) for tensor in read}
    for name, holder, key, value in settings(svi.model, svi.guide):
        words = (
            f"{name!r} has another value (make it a tensor and fill_ it, or give it to the step)"
        )
        if id(value) in seen or _is_settled(value):
            settled.add(words, holder, key, value)
        elif not isinstance(value, Tensor):
            loose.append((words, holder, key, _copy(value, seen)))

    def stale() -> str | None:
        if (changed := settled.changed()) is not None:
            return changed
        if not all(map(is_, map(store._params.get, names), owners)):
            others = [name for name, p in named if store._params.get(name) is not p]
            return f"parameter {others[0]!r} is another one"
        now = chain.from_iterable([register.values() for register in registers])
        if sum(map(len, registers)) != len(registered) or not all(map(is_, now, registered)):
            return f"a parameter, buffer, part or hook of {_exchanged(owned)} is another"
        if list(map(_marks, tensors)) != marks:
            return "a parameter or buffer was frozen, thawed, moved or hooked"
        for words, holder, key, value in loose:
            if _copy(setting(holder, key), seen) != value:
                return words
        return None

    return stale


class _Places:
    """What stands in places, objects that do not change themselves."""

    def __init__(self) -> None:
        self._words: list[str] = []
        self._get: list[Callable[[Any], Any]] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []

    def add(self, words: str, holder: Any, key: Any, value: Any) -> None:
        """A place, which `setting` reads, what is there, and what to say if it is another value."""
        self._words.append(words)
        self._get.append(holder.get if hasattr(holder, "get") else partial(setting, holder))
        self._keys.append(key)
        self._values.append(value)

    def changed(self) -> str | None:
        """The words of a place where another value is; None if there is none."""
        if all(map(is_, map(call, self._get, self._keys), self._values)):
            return None
        for i, (get, key, value) in enumerate(
            zip(self._get, self._keys, self._values, strict=True)
        ):
            now = get(key)
            if now is not value:
                if not _is_settled(now) or repr(now) != repr(value):  # 1.0 and 1, 0.0 and -0.0
                    return self._words[i]
                self._values[i] = now  # equal, and found at once from now on
        return None


def _places(
    svi: SVI,
    modules: Iterable[nn.Module],
    parameters: Iterable[Tensor],
    update: Update | None,
) -> Iterator[tuple[str, Any, Any, Any]]:
    """What the loss, the optimizer and the modules are set to: words, holder, key and value."""
    for name in ("model", "guide", "optim", "loss_and_grads"):
        yield "the model, guide, loss or optimizer is another one", vars(svi), name, vars(svi)[name]
    assert svi.told is not None
    given = vars(svi.told._given)
    for name, value in given.items():
        yield "the loss has other settings", given, name, value
    for module in modules:
        words = f"{type(module).__name__} is in another mode"
        yield words, vars(module), "training", module.training
    for optimizer in update.optimizers if update is not None else ():
        own = vars(optimizer)
        yield "the optimizer's state was loaded", own, "state", own["state"]
        for group in optimizer.param_groups:
            for name, value in group.items():
                if name not in ("params", "lr"):
                    yield f"the optimizer has another {name!r}", group, name, value
    objects = getattr(svi.optim, "optim_objs", {})
    for parameter in parameters:
        yield "the optimizer was reset", objects, parameter, objects.get(parameter)


def _registers(module: nn.Module) -> list[Mapping[Any, Any]]:
    """Where a module keeps parameters, buffers, parts and hooks."""
    return [
        *(module._parameters, module._buffers, module._modules),
        *(module._forward_hooks, module._forward_pre_hooks, module._backward_hooks),
    ]


def _exchanged(owned: Iterable[tuple[nn.Module, Mapping[Any, Any], list[Any]]]) -> str:
    """The module that holds something else than it did."""
    return next(
        type(module).__name__
        for module, register, held in owned
        if len(register) != len(held) or not all(map(is_, register.values(), held))
    )


def _marks(tensor: Tensor) -> tuple[bool, int, bool]:
    """What says that a tensor trains, where it lies, and whether it is hooked."""
    return tensor.requires_grad, tensor.data_ptr(), bool(tensor._backward_hooks)


def _is_settled(value: Any) -> bool:
    """Whether it does not change itself."""
    if isinstance(value, tuple):
        return all(map(_is_settled, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def _copy(value: Any, read: set[int]) -> Any:
    """What to compare a setting with later; of tensors their identity, if they were read."""
    if isinstance(value, Tensor):
        return id(value) if id(value) in read else None
    if isinstance(value, (list, tuple)):
        return tuple(_copy(item, read) for item in value[:_ITEMS])
    if isinstance(value, (np.ndarray, np.generic)):
        if value.size > _ITEMS:
            return id(value)
        return value.dtype.str, value.shape, value.tobytes()
    return value if isinstance(value, (bool, int, float, str)) else None
