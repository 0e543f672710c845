"""Whether what a step was recorded from is still what it was.

A record sees what changes in place. What is bound to another object, or set to another number,
after it was recorded, it cannot see: so that is looked at before every step, wherever programs,
modules, store and optimizer keep it. What nobody can find are objects behind library code.
"""

from __future__ import annotations

__all__ = ["watch"]

from collections.abc import Callable, Iterable, Sequence
from operator import is_
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
    updates: Sequence[Update],
    read: Sequence[Tensor],
) -> Callable[[], str | None]:
    """Says what is something else than now, in words; None while all is the same.

    Args:
        svi: whose programs, loss and optimizer they are.
        modules: those that the programs reach.
        parameters: those that are trained.
        updates: the optimizers in the graph.
        read: other tensors that the programs read.
    """
    parts = [svi.model, svi.guide, svi.optim, svi.loss_and_grads]
    kept = [(module, module.training, _hooks(module), _held(module)) for module in modules]
    store = pyro.get_param_store()
    trained = {id(p) for p in parameters}
    named = [(name, p) for name, p in store._params.items() if id(p) in trained]
    tensors = {id(p): p for *_, held in kept for p in held if isinstance(p, Tensor)}
    tensors |= {id(p): p for p in parameters}
    marks = [(p, p.requires_grad, p.data_ptr(), bool(p._backward_hooks)) for p in tensors.values()]
    groups = [
        (group, {**group, "lr": None}) for one in updates for group in one.optimizer.param_groups
    ]
    objects = getattr(svi.optim, "optim_objs", {})
    ones = [(p, objects.get(p)) for p in parameters]
    states = [(update.optimizer, update.optimizer.state) for update in updates]
    assert svi.told is not None
    given = svi.told._given
    options = {**vars(given)}
    seen = {id(tensor) for tensor in read}
    known = [
        (name, holder, key, _copy(value, seen))
        for name, holder, key, value in settings(svi.model, svi.guide)
    ]

    def stale() -> str | None:
        now: Any
        if not all(map(is_, parts, (svi.model, svi.guide, svi.optim, svi.loss_and_grads))):
            return "the model, guide, loss or optimizer is another one"
        for module, mode, hooks, held in kept:
            if module.training is not mode:
                return f"{type(module).__name__} is in another mode"
            now = _held(module)
            if len(now) != len(held) or not all(map(is_, now, held)) or _hooks(module) != hooks:
                return f"a parameter, buffer, part or hook of {type(module).__name__} is another"
        for name, parameter in named:
            if store._params.get(name) is not parameter:
                return f"parameter {name!r} is another one"
        for tensor, trains, place, hooked in marks:
            if (
                tensor.requires_grad is not trains
                or tensor.data_ptr() != place
                or bool(tensor._backward_hooks) is not hooked
            ):
                return "a parameter or buffer was frozen, thawed, moved or hooked"
        for group, before in groups:
            if (now := {**group, "lr": None}) != before:
                changed = [key for key in now if now[key] is not before.get(key)]
                return f"the optimizer has other {' and '.join(map(repr, changed))}"
        if any(objects.get(parameter) is not one for parameter, one in ones):
            return "the optimizer was reset"
        for optimizer, state in states:
            if optimizer.state is not state:
                return "the optimizer's state was loaded"
        if vars(given) != options:
            return "the loss has other settings"
        for name, holder, key, value in known:
            now = setting(holder, key)
            if now is not value and _copy(now, seen) != value:
                return (
                    f"{name!r} has another value (make it a tensor and fill_ it, or give it to the"
                    " step as a tensor)"
                )
        return None

    return stale


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


def _held(module: nn.Module) -> list[Any]:
    return [
        *module._parameters.values(),
        *module._buffers.values(),
        *module._modules.values(),
    ]


def _hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
