"""Torch optimizers under Pyro.

`OneOptimizer` lets any torch optimizer serve as a Pyro optimizer, as one instance for all
parameters: Pyro makes one instance a tensor, which is slow and cannot clip by the global norm.

`updates_of` gives the step of Adam, AdamW, SGD and Pyro's ClippedAdam as tensors alone, so that it
can be recorded. Learning rates are tensors too, which follow the optimizer's, so that a schedule
changes no record.
"""

from __future__ import annotations

__all__ = ["OneOptimizer", "Rate", "Update", "updates_of"]

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


class OneOptimizer(PyroOptim):
    """A torch optimizer over all parameters at once, as a Pyro optimizer.

    Args:
        make: parameters -> torch optimizer, such as `partial(torch.optim.Adam, lr=1e-3)`.
        schedule: optimizer -> learning-rate scheduler, stepped after every update.
        clip_norm: the largest global norm of the gradient.

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
        self._schedule, self._clip_norm = schedule, clip_norm
        self._optimizer: Optimizer | None = None
        self._scheduler: LRScheduler | None = None
        self._known: dict[Tensor, None] = {}

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        params = list(params)
        if new := [p for p in params if p not in self._known]:
            self._add(new)
        assert self._optimizer is not None
        used = set(params)
        for parameter in self._known:  # not even momentum moves what a step did not use
            if parameter not in used:
                parameter.grad = None
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self._clip_norm)
        self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()

    def _add(self, new: list[Tensor]) -> None:
        self._known.update(dict.fromkeys(new))
        if self._scheduler is not None:
            raise ValueError(
                f"{len(new)} parameters appeared after the first step, and the learning-rate"
                " schedule was made for those before: use every parameter in every step, or no"
                " schedule"
            )
        if self._optimizer is not None:
            self._optimizer.add_param_group({"params": new})
            return
        self._optimizer = self.pt_optim_constructor(new)
        if not isinstance(self._optimizer, Optimizer):
            raise TypeError(
                "expected a callable that makes a torch optimizer from parameters, such as"
                f" functools.partial(torch.optim.Adam, lr=1e-3); it made {self._optimizer!r}"
            )
        if isinstance(self._optimizer, torch.optim.LBFGS):
            raise TypeError("expected an optimizer that steps without a closure, got LBFGS")
        if self._schedule is not None:
            self._scheduler = self._schedule(self._optimizer)
            if isinstance(self._scheduler, ReduceLROnPlateau):
                raise TypeError(
                    "expected a schedule of the step alone, and ReduceLROnPlateau needs a metric"
                )

    def get_state(self) -> dict[str, Any]:
        """The torch optimizer's state, and the scheduler's."""
        return {
            name: holder.state_dict()
            for name, holder in (("optimizer", self._optimizer), ("scheduler", self._scheduler))
            if holder is not None
        }


class Rate:
    """The learning rate of a group, as a tensor that follows it."""

    def __init__(self, group: dict[str, Any], like: Tensor) -> None:
        self.group, self._last = group, math.nan
        self._decay = group.get("lrd", 1.0)  # ClippedAdam's own schedule
        self.tensor = torch.zeros((), dtype=torch.float64, device=like.device)

    def follow(self) -> None:
        """Sets the tensor to the rate of the next step."""
        rate = self.group["lr"] * self._decay
        if rate != self._last:
            self._last = rate
            self.tensor.fill_(rate)

    def decay(self) -> None:
        """Sets the group's rate to that of the last step."""
        self.group["lr"] = self._last


class Update:
    """A torch optimizer's step on some of its parameters, as tensors alone."""

    def __init__(self, optimizer: Optimizer, used: set[int], clips: dict[int, Any]) -> None:
        self._optimizer, self._clips = optimizer, clips
        self._groups = [
            (group, [p for p in group["params"] if id(p) in used])
            for group in optimizer.param_groups
        ]
        self.rates = [Rate(group, own[0]) for group, own in self._groups if own]
        self._groups = [(group, own) for group, own in self._groups if own]
        for _, own in self._groups:
            for p in own:
                if "step" in (state := optimizer.state.get(p, {})):
                    dtype = torch.float64 if isinstance(optimizer, ClippedAdam) else None
                    state["step"] = torch.as_tensor(state["step"], dtype=dtype).to(p.device)
        self.tensors = [
            value
            for _, own in self._groups
            for p in own
            for value in optimizer.state.get(p, {}).values()
            if isinstance(value, Tensor)
        ]

    def apply(self, fresh: dict[int, Tensor], own: dict[int, Tensor]) -> None:
        """Moves the parameters among the fresh tensors, in place, and their state."""
        for (group, params), rate in zip(self._groups, self.rates, strict=True):
            lr = own[id(rate.tensor)]
            moved = [p for p in params if fresh[id(p)].grad is not None]
            for p in moved:
                if (clip := self._clips.get(id(p))) is not None:
                    clip(fresh[id(p)])
            state = {
                fresh[id(p)]: {
                    key: fresh[id(value)] if isinstance(value, Tensor) else value
                    for key, value in self._optimizer.state.get(p, {}).items()
                }
                for p in moved
            }
            update = _FORMULAS[type(self._optimizer)]
            for p in moved:
                update(fresh[id(p)], lr, group, state[fresh[id(p)]])


def _sgd(p: Tensor, lr: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    assert p.grad is not None
    gradient = -p.grad if group["maximize"] else p.grad
    if group["weight_decay"] != 0:
        gradient = gradient + group["weight_decay"] * p
    if group["momentum"] != 0:
        buffer = state["momentum_buffer"]
        buffer.mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        gradient = gradient + group["momentum"] * buffer if group["nesterov"] else buffer
    p.sub_(lr * gradient)


def _clipped_adam(p: Tensor, lr: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    assert p.grad is not None
    gradient = p.grad.clamp(-group["clip_norm"], group["clip_norm"])
    first, second = group["betas"]
    step = state["step"].add_(1)
    if group["weight_decay"] != 0:
        gradient = gradient + group["weight_decay"] * p
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.mul_(first).add_(gradient, alpha=1 - first)
    centred = gradient - mean if group["centered_variance"] else gradient
    square.mul_(second).addcmul_(centred, centred, value=1 - second)
    size = lr * (1 - second**step).sqrt() / (1 - first**step)
    p.sub_(size * mean / (square.sqrt() + group["eps"]))


def _adam(p: Tensor, lr: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    assert p.grad is not None
    gradient = -p.grad if group["maximize"] else p.grad
    first, second = group["betas"]
    step = state["step"].add_(1).double()  # as the eager step's Python numbers
    if group["weight_decay"] != 0 and group["decoupled_weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    elif group["weight_decay"] != 0:
        gradient = gradient + group["weight_decay"] * p
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    if group["amsgrad"]:
        square = torch.maximum(state["max_exp_avg_sq"], square)
        state["max_exp_avg_sq"].copy_(square)
    root = square.sqrt() / (1 - second**step).sqrt()
    p.sub_(lr / (1 - first**step) * mean / (root + group["eps"]))


_FORMULAS: dict[type, Callable[..., None]] = {
    Adam: _adam,
    AdamW: _adam,
    SGD: _sgd,
    ClippedAdam: _clipped_adam,
}


def updates_of(optim: PyroOptim, parameters: Sequence[Tensor]) -> list[Update] | None:
    """The optimizers of the parameters; None if one of them has no form of tensors alone."""
    clips: dict[int, Any] = {}
    if isinstance(optim, OneOptimizer):
        found = [optim._optimizer] if optim._optimizer is not None else []
    else:
        objects = [optim.optim_objs.get(p) for p in parameters]
        found = [getattr(one, "optimizer", one) for one in objects]  # behind a scheduler
        clips = {id(p): clip for p, clip in optim.grad_clip.items() if clip is not None}
    updates = []
    for optimizer in found:
        if type(optimizer) not in _FORMULAS:
            return None
        for group in optimizer.param_groups:
            if group.get("differentiable") or isinstance(group["lr"], Tensor):
                return None
        updates.append(Update(optimizer, set(map(id, parameters)), clips))
    return updates
