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

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as tree
from torch.utils._device import DeviceContext

if TYPE_CHECKING:
    from pyro_vi.compiling.recording import StepRecord
    from pyro_vi.svi import SVI


class Guards:
    """Compares what a step depends on with what it was.

    Args:
        svi: whose step it is.
        modules: those that the programs reach.
        step: its record.
    """

    def __init__(self, svi: SVI, modules: Sequence[nn.Module], step: StepRecord) -> None:
        self._svi, self._modules, update = svi, list(modules), step.update
        self._tensors = [*step.parameters, *step.held()]
        optimizers = update.optimizers if update is not None else []
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._dicts: dict[str, list[dict[Any, Any]]] = {
            "the parts of a module, or a hook": [vars(m)[name] for m in modules for name in _PARTS],
            "the options of the loss": [vars(svi.told._given)] if svi.told is not None else [],
            "the options of the optimizer": [
                {k: v for k, v in vars(o).items() if k in ("state", "param_groups")}
                for o in optimizers
            ],
        }
        self._dicts["the parameters in Pyro's store"] = [pyro.get_param_store()._params]
        self._options = [itemgetter(*sorted(g.keys() - {"params", "lr"})) for g in groups]
        self._groups = groups
        self._every = [d for dicts in self._dicts.values() for d in dicts]
        self._known = self._look()
        self._flags, self._chosen = self._flags_now(), self._chosen_now()
        self._lie = list(map(_ADDRESS, self._tensors))

    def changed(self) -> str | None:
        """What is something else than it was, in words; None while all is the same."""
        now = self._look()
        if len(now) != len(self._known) or not all(map(is_, now, self._known)):
            return self._which(now)
        if self._flags_now() != self._flags:
            return "which modules are in training mode, or which parameters have a gradient,"
        if list(map(_ADDRESS, self._tensors)) != self._lie:
            return "where a parameter, a buffer or another tensor of the programs lies"
        if self._chosen_now() != self._chosen:
            return "an option of the optimizer"
        return None

    def _look(self) -> list[Any]:
        """Everything that is compared by identity."""
        svi = self._svi
        store = pyro.get_param_store()._params
        own = (svi.model, svi.guide, svi.optim, svi.loss, svi.loss_and_grads, store)
        return [*own, *chain.from_iterable(map(dict.values, self._every))]

    def _flags_now(self) -> list[bool]:
        return [*map(_TRAINING, self._modules), *map(_REQUIRES, self._tensors)]

    def _chosen_now(self) -> list[Any]:
        return [get(group) for get, group in zip(self._options, self._groups, strict=True)]

    def _which(self, now: list[Any]) -> str:
        if not all(map(is_, now[:6], self._known)):
            return "the model, the guide, the loss, the optimizer or Pyro's store"
        place = 6
        for name, dicts in self._dicts.items():
            size = sum(map(len, dicts))
            part, before = now[place : place + size], self._known[place : place + size]
            if len(part) != len(before) or not all(map(is_, part, before)):
                return name
            place += size
        return "the number of parameters in Pyro's store, or of parts of a module,"


_PARTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_ADDRESS = Tensor.data_ptr
_TRAINING, _REQUIRES = attrgetter("training"), attrgetter("requires_grad")


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
    modes = [
        torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())
    ]
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
