"""Torch optimizers under Pyro.

`OneOptimizer` lets any torch optimizer serve as a Pyro optimizer, as one instance for all
parameters: Pyro makes one instance a tensor, which is slow and cannot clip by the global norm.
Adam, AdamW and SGD are stepped by the formulas of `pyro_vi.compiling.update`, which give the
numbers that theirs give.
"""

from __future__ import annotations

__all__ = ["OneOptimizer"]

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_vi.compiling import Update, has_formula, make_state


class OneOptimizer(PyroOptim):
    """A torch optimizer over all parameters at once, as a Pyro optimizer.

    Args:
        make: parameters -> torch optimizer, such as `partial(torch.optim.Adam, lr=1e-3)`.
        schedule: optimizer -> learning-rate scheduler, stepped after every update.
        clip_norm: the largest global norm of the gradient.

    Attributes:
        torch_optimizer, scheduler: what was made, at the first step; None before.

    Raises:
        TypeError: `make` gives something else than a torch optimizer, or `schedule` one that needs
            a metric.
        ValueError: a parameter that appears after the schedule was made for the others.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> optim = OneOptimizer(partial(torch.optim.SGD, lr=0.5))
        >>> p = torch.tensor([1.0], requires_grad=True)
        >>> p.grad = torch.tensor([1.0])
        >>> optim([p]); p
        tensor([0.5000], requires_grad=True)
    """

    def __init__(
        self,
        make: Callable[[Iterable[Tensor]], Optimizer],
        *,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__(make, {})
        self._schedule, self.clip_norm = schedule, clip_norm
        self.torch_optimizer: Optimizer | None = None
        self.scheduler: LRScheduler | None = None
        self._known: dict[Tensor, None] = {}
        self._waiting: dict[str, Any] = {}
        self._update: Update | None = None
        self._moved: list[Tensor] = []

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        params = list(params)
        if new := [p for p in params if p not in self._known]:
            self._add(new)
        assert self.torch_optimizer is not None
        used = set(params)
        for parameter in self._known:  # not even momentum moves what a step did not use
            if parameter not in used:
                parameter.grad = None
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.clip_norm)
        self._step()
        if self.scheduler is not None:
            self.scheduler.step()

    def _step(self) -> None:
        assert self.torch_optimizer is not None
        if not has_formula(self.torch_optimizer):
            self.torch_optimizer.step()
            return
        make_state(self.torch_optimizer)
        moved = [p for p in self._known if p.grad is not None]
        if self._update is None or list(map(id, moved)) != list(map(id, self._moved)):
            self._update, self._moved = Update([self.torch_optimizer], moved, {}), moved
        self._update.apply()
        self._update.advance(1)
        self.torch_optimizer._opt_called = True  # type: ignore[attr-defined]  # as schedulers ask

    def _add(self, new: list[Tensor]) -> None:
        self._known.update(dict.fromkeys(new))
        if self.scheduler is not None:
            raise ValueError(
                f"{len(new)} parameters appeared after the first step, and the learning-rate"
                " schedule was made for those before: use every parameter in every step, or no"
                " schedule"
            )
        if self.torch_optimizer is not None:
            self.torch_optimizer.add_param_group({"params": new})
            self._update = None
            return
        self.torch_optimizer = _constructor(self.pt_optim_constructor)(new)
        if not isinstance(self.torch_optimizer, Optimizer):
            raise TypeError(
                "expected a callable that makes a torch optimizer from parameters, such as"
                f" functools.partial(torch.optim.Adam, lr=1e-3); it made {self.torch_optimizer!r}"
            )
        if isinstance(self.torch_optimizer, torch.optim.LBFGS):
            raise TypeError("expected an optimizer that steps without a closure, got LBFGS")
        if self._schedule is not None:
            self.scheduler = self._schedule(self.torch_optimizer)
            if isinstance(self.scheduler, ReduceLROnPlateau):
                raise TypeError(
                    "expected a schedule of the step alone, and ReduceLROnPlateau needs a metric"
                )
        self._load()

    def _load(self) -> None:
        for name, holder in (("optimizer", self.torch_optimizer), ("scheduler", self.scheduler)):
            if holder is not None and name in self._waiting:
                holder.load_state_dict(self._waiting.pop(name))
                self._update = None

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Takes what `get_state` gave; before the first step it is kept until then."""
        if strangers := sorted(state_dict.keys() - {"optimizer", "scheduler"}):
            raise ValueError(f"expected the state of one optimizer for all, got keys {strangers}")
        self._waiting = dict(state_dict)
        self._load()

    def get_state(self) -> dict[str, Any]:
        """The torch optimizer's state, and the scheduler's."""
        return {
            name: holder.state_dict()
            for name, holder in (("optimizer", self.torch_optimizer), ("scheduler", self.scheduler))
            if holder is not None
        }


def _constructor(make: Any) -> Any:
    """What makes the optimizer, without the import of torch's compiler where that is possible.

    torch's optimizers import it, in a second or two, when a group of parameters is added. The
    function that adds one has no need of it.
    """
    kind = getattr(make, "func", make)
    if kind not in (Adam, AdamW, SGD):
        return make

    def made(params: Iterable[Tensor]) -> Optimizer:
        options = {"add_param_group": _add_param_group}
        light = type(kind.__name__, (kind,), options)
        optimizer = (partial(light, *make.args, **make.keywords) if kind is not make else light)(
            params
        )
        optimizer.__class__ = kind
        return optimizer

    return made


_add_param_group = getattr(Optimizer.add_param_group, "__wrapped__", Optimizer.add_param_group)
