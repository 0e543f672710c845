"""What a recorded step is good for, and what is looked at before each.

A record is good for one kind of batch: shapes and dtypes of its tensors, its other arguments by
value, and the handlers and settings around the step (`batch_key`). Outside of `fit`, where a user
may change anything between two steps, `Guards` compares by identity, before each step:

- the parts of the modules (parameters, buffers, submodules, hooks) and whether they train;
- which parameters train, and where they and all other tensors of the record lie;
- the parameters in Pyro's store;
- the loss and its options;
- the optimizer, its state and its options.

What else a user's Python may change is a constant of the record, by contract.
"""

from __future__ import annotations

__all__ = ["Guards", "Strange", "batch_key"]

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as tree
from torch.utils._device import DeviceContext

if TYPE_CHECKING:
    from pyro_vi.compiling.update import Update
    from pyro_vi.svi import SVI


class Guards:
    """Compares what a step depends on with what it was.

    Args:
        svi: whose step it is.
        modules: those that the programs reach.
        tensors: those that the record reads or changes, but for the batch.
        update: the optimizers' step, if the record has it.
    """

    def __init__(
        self,
        svi: SVI,
        modules: Sequence[nn.Module],
        tensors: Sequence[Tensor],
        update: Update | None,
    ) -> None:
        self._svi, self._modules, self._tensors = svi, list(modules), list(tensors)
        self._update = update
        self._parts = [vars(m)[name] for m in modules for name in _PARTS]
        self._looks: dict[str, Callable[[], list[Any]]] = {
            "the parts of a module, or a hook": self._held_by_modules,
            "which modules are in training mode": lambda: list(map(_TRAINING, self._modules)),
            "which parameters have a gradient": lambda: list(map(_REQUIRES, self._tensors)),
            "where a parameter, a buffer or the optimizer's state lies": self._addresses,
            "the parameters in Pyro's store": _stored,
            "the model, the guide, the loss or the optimizer": self._programs,
            "the options of the loss": self._loss_options,
            "the options or the state of the optimizer": self._optimizer_options,
        }
        self._known = {name: look() for name, look in self._looks.items()}

    def changed(self) -> str | None:
        """What is something else than it was, in words; None while all is the same."""
        for name, look in self._looks.items():
            now, before = look(), self._known[name]
            if len(now) != len(before) or not all(map(is_, now, before)):
                if name not in _BY_VALUE or now != before:
                    return name
        return None

    def _held_by_modules(self) -> list[Any]:
        return list(chain.from_iterable(chain(d, d.values()) for d in self._parts))

    def _addresses(self) -> list[Any]:
        return list(map(Tensor.data_ptr, self._tensors))

    def _programs(self) -> list[Any]:
        svi = self._svi
        return [svi.model, svi.guide, svi.optim, svi.loss, svi.loss_and_grads]

    def _loss_options(self) -> list[Any]:
        told = self._svi.told
        return list(vars(told._given).values()) if told is not None else []

    def _optimizer_options(self) -> list[Any]:
        if self._update is None:
            return []
        found: list[Any] = []
        for optimizer in self._update.optimizers:
            found += [optimizer.state, optimizer.param_groups]
            for group in optimizer.param_groups:
                found += [value for name, value in group.items() if name != "lr"]
        return found


_PARTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_BY_VALUE = {
    "where a parameter, a buffer or the optimizer's state lies",
    "the options of the loss",
    "the options or the state of the optimizer",
}
_TRAINING, _REQUIRES = attrgetter("training"), attrgetter("requires_grad")


def _stored() -> list[Any]:
    params = pyro.get_param_store()._params
    return [*params, *params.values()]


class Strange(str):
    """A kind of batch that no record is good for, in words."""


def batch_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """What a record of a step is good for, and the batch's tensors.

    Returns:
        A hashable key, or a `Strange` one. None where a step is not to be counted at all.
    """
    if not torch.is_grad_enabled() or torch.is_anomaly_enabled():
        return None, []
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None, []
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return Strange("autocast around a step: put it around the network (Autocast)"), []
    if torch._C._len_torch_dispatch_stack():
        return Strange("a mode of torch's around a step, which sees every operation"), []
    if _PYRO_STACK and any(type(one).__hash__ is None for one in _PYRO_STACK):
        return Strange("a handler around a step that cannot be told from others (no hash)"), []
    modes = [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    modes = [one.device if isinstance(one, DeviceContext) else one for one in modes]
    settings = (torch.get_default_dtype(), Distribution._validate_args, *modes, *_PYRO_STACK)
    leaves, spec = (args, None) if not kwargs else tree.tree_flatten((args, kwargs))
    if any(type(leaf) is not Tensor for leaf in leaves):
        leaves, spec = tree.tree_flatten((args, kwargs))
    batch: list[Tensor] = []
    key: list[Any] = [settings, spec]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.layout is not torch.strided or leaf.requires_grad or type(leaf) not in _PLAIN:
                return Strange("an argument that is no plain tensor, or has a gradient"), []
            key.append((leaf.shape, leaf.dtype, leaf.device))
            batch.append(leaf)
        elif isinstance(leaf, (bool, int, float, str, type(None), torch.dtype, torch.device)):
            key.append((type(leaf), repr(leaf)))
        elif isinstance(leaf, nn.Module):
            key.append(leaf)
        else:
            return Strange(f"an argument of type {type(leaf).__name__}"), []
    return tuple(key), batch


_PLAIN = (Tensor, nn.Parameter)
