"""Checks whether a record still stands for a step.

A record is valid for one kind of batch: shapes and dtypes of its tensors, its other arguments by
value, and the handlers and settings around the step (`batch_key`). Outside of `fit`, a user may
change anything between two steps. So `Guards` compares these by identity before each step:

- the parts of the modules (parameters, buffers, submodules, hooks) and whether they train;
- which parameters train, and where they and all other tensors of the record lie;
- the parameters in Pyro's store;
- the loss and its options;
- the optimizer, its state and its options.

By contract, everything else in a user's Python is a constant of the record.
"""

from __future__ import annotations

__all__ = ["Guards", "RefusedBatch", "batch_key"]

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, call, itemgetter
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as tree
from torch.utils._device import DeviceContext

from pyro_vi.compiling.stepper import Stepper
from pyro_vi.compiling.update import HOOKS_OF_ALL

if TYPE_CHECKING:
    from pyro_vi.compiling.recording import StepRecord


class Guards:
    """Compares what a step depends on with what it was when the step was recorded.

    Args:
        svi: whose step it is.
        modules: those that the programs reach.
        step: its record.
    """

    def __init__(self, svi: Stepper, modules: Sequence[nn.Module], step: StepRecord) -> None:
        own = [one for m in modules for one in (*m.parameters(False), *m.buffers(False))]
        tensors = list({id(one): one for one in (*step.parameters, *step.held(), *own)}.values())
        trained = [one for one in tensors if one.requires_grad or isinstance(one, nn.Parameter)]
        parts = [vars(module)[name] for module in modules for name in _PARTS]
        given = svi.elbo_terms._given if svi.elbo_terms is not None else svi.loss
        optimizers = step.update.optimizers if step.update is not None else []
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        hooks = [*HOOKS_OF_ALL, *(hook for one in optimizers for hook in _HOOKS(one))]
        options = [itemgetter(*sorted(group.keys() - {"params", "lr"})) for group in groups]
        self._looks: dict[str, Callable[[], list[Any]]] = {
            "the model, the guide, the loss or the optimizer": lambda: [
                *map(id, (svi.model, svi.guide, svi.loss, svi.loss_and_grads, svi.optim))
            ],
            "a parameter, a buffer, a hook or another part of a module": lambda: [
                *map(id, chain.from_iterable(map(dict.values, parts)))
            ],
            "the mode of a module (train or eval)": lambda: [*map(_TRAINING, modules)],
            "a parameter in Pyro's store": lambda: [
                *map(id, pyro.get_param_store()._params.values())
            ],
            "whether a tensor has a gradient": lambda: [*map(_REQUIRES, trained)],
            "the place of a tensor in memory": lambda: [*map(Tensor.data_ptr, tensors)],
            "an option of the loss": lambda: [*map(id, vars(given).values())],
            "the state of the optimizer": lambda: [*map(id, map(_STATE, optimizers))],
            "an option of the optimizer": lambda: [*map(call, options, groups)],
            "a hook of an optimizer": lambda: [*map(len, hooks)],
            "whether an unused parameter has a gradient": lambda: [
                p.grad is None for p in step.unused
            ],
        }
        self._known = {name: look() for name, look in self._looks.items()}
        # Objects that are compared by identity stay alive, so that no new object has the same.
        self._alive = [vars(svi).copy(), list(map(dict.copy, parts)), vars(given).copy()]

    def changed(self) -> str | None:
        """The first thing that has changed, in words; None if nothing has."""
        for name, look in self._looks.items():
            if look() != self._known[name]:
                return name
        return None


_PARTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_TRAINING, _REQUIRES = attrgetter("training"), attrgetter("requires_grad")
_STATE = attrgetter("state")
_HOOKS = attrgetter("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class RefusedBatch(str):
    """The reason why no record is valid for a batch."""


def batch_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """The kind of a batch, for which a record is valid, and the batch's tensors.

    Returns:
        The kind as a hashable key: a `RefusedBatch` if no record can be made, and None if steps
            under the present settings are not counted.
    """
    if not torch.is_grad_enabled() or torch.is_anomaly_enabled():
        return None, []
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None, []
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return RefusedBatch("autocast around a step: put it around the network (Autocast)"), []
    if torch._C._len_torch_dispatch_stack():
        return RefusedBatch("a mode of torch's around a step, which sees every operation"), []
    if _PYRO_STACK and any(type(one).__hash__ is None for one in _PYRO_STACK):
        return RefusedBatch("a handler around a step that cannot be told from others (no hash)"), []
    modes = [
        torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())
    ]
    modes = [one.device if isinstance(one, DeviceContext) else one for one in modes]
    settings = (torch.get_default_dtype(), Distribution._validate_args, *modes, *_PYRO_STACK)
    leaves: Sequence[Any] = args
    spec = None
    if kwargs or any(type(leaf) is not Tensor for leaf in args):
        leaves, spec = tree.tree_flatten((args, kwargs))
    batch: list[Tensor] = []
    key: list[Any] = [settings, spec]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if leaf.layout is not torch.strided or leaf.requires_grad or type(leaf) not in _PLAIN:
                return RefusedBatch("an argument that is no plain tensor, or has a gradient"), []
            key.append((leaf.shape, leaf.dtype, leaf.device))
            batch.append(leaf)
        elif isinstance(leaf, (bool, int, float, str, type(None), torch.dtype, torch.device)):
            key.append((type(leaf), repr(leaf)))
        elif isinstance(leaf, nn.Module):
            key.append(leaf)
        else:
            return RefusedBatch(f"an argument of type {type(leaf).__name__}"), []
    return tuple(key), batch


_PLAIN = (Tensor, nn.Parameter)
