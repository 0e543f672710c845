"""Torch optimizers under Pyro.

`OneOptimizer` lets any torch optimizer serve as a Pyro optimizer, as one instance for all
parameters: Pyro makes one instance a tensor, which is slow and cannot clip by the global norm.

`update_of` gives the step of Adam, AdamW, SGD and Pyro's ClippedAdam as tensors alone, so that it
can be recorded. Learning rates are tensors too, which follow the optimizer's, so that a schedule
changes no record.
"""

from __future__ import annotations

__all__ = ["HOOKS_OF_ALL", "Counts", "OneOptimizer", "Rates", "Update", "update_of"]

import math
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter, mul
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as optimizers
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


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
        self.torch_optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

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
            return
        self.torch_optimizer = self.pt_optim_constructor(new)
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


_LR = itemgetter("lr")


class Rates:
    """The learning rates of the next step as one tensor, which follows the optimizers' own.

    Attributes:
        tensor: (groups,), float64.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], device: torch.device) -> None:
        self._groups, self._given = list(groups), [math.nan] * len(groups)
        self._last = self._given
        self._decays = [group.get("lrd", 1.0) for group in groups]  # ClippedAdam's own schedule
        self._led = [i for i, decay in enumerate(self._decays) if decay != 1.0]
        self.tensor = torch.zeros(len(groups), dtype=torch.float64, device=device)

    def follow(self) -> None:
        """Sets the tensor to the rates of the next step."""
        given = list(map(_LR, self._groups))
        if given != self._given:
            self._given = given
            self._last = rates = list(map(mul, given, self._decays))
            self.tensor.copy_(torch.tensor(rates, dtype=torch.float64))

    def lead(self) -> None:
        """Sets the groups' rates to those of the last step, where a decay is the optimizer's."""
        for i in self._led:
            self._groups[i]["lr"] = self._last[i]

    def set_back(self, rates: Sequence[float]) -> None:
        """Gives the groups their rates of before."""
        for group, rate in zip(self._groups, rates, strict=True):
            group["lr"] = rate

    def given(self) -> list[float]:
        """The groups' rates."""
        return [group["lr"] for group in self._groups]


_VERSION, _STEP = attrgetter("_version"), itemgetter("step")


class Counts:
    """How many steps parameters have taken, and Adam's corrections of the bias at the next.

    Those are tensors of their own, one step ahead: in the formula itself, Inductor would take the
    powers again for every few numbers of a parameter.

    Args:
        states: of parameters that have taken equally many steps, and have equal betas: a row each.
        betas: of each row.

    Attributes:
        tensor: (rows, 3), float64: the number n of the next step, 1 / (1 - beta_1^n), and the root
            of 1 - beta_2^n.
    """

    def __init__(
        self,
        states: Sequence[Sequence[dict[str, Any]]],
        betas: Sequence[tuple[float, float]],
        device: torch.device,
    ) -> None:
        self.states, self._betas = states, list(betas)
        every = [state for row in states for state in row]
        self._steps = [one["step"] for one in every if isinstance(one["step"], Tensor)]
        self._numbered = [one for one in every if not isinstance(one["step"], Tensor)]
        self.tensor = torch.zeros(len(states), 3, dtype=torch.float64, device=device)
        self.resync()

    def resync(self) -> bool:
        """Reads the steps again; False if parameters of a row have not taken equally many."""
        rows = [{float(state["step"]) for state in row} for row in self.states]
        n = torch.tensor([max(row) + 1 for row in rows], dtype=torch.float64)
        self.tensor.copy_(self._corrections(n[:, None]))
        self.own()
        return all(len(row) == 1 for row in rows)

    def own(self) -> None:
        """Takes the steps that there are now for counted here."""
        self._known = self._now()

    def _now(self) -> list[Any]:
        """What is another list where somebody has set a step."""
        return [*map(_VERSION, self._steps), *map(_STEP, self._numbered)]

    def follow(self) -> bool:
        """Reads the steps again if somebody else has set one; False as `resync` has it."""
        return self._now() == self._known or self.resync()

    def _corrections(self, n: Tensor) -> Tensor:
        betas = torch.tensor(self._betas, dtype=torch.float64, device=n.device).reshape(-1, 2)
        place = torch.arange(3, device=n.device)
        size, root = 1 / (1 - betas[:, :1] ** n), (1 - betas[:, 1:] ** n).sqrt()
        return torch.where(place == 0, n, torch.where(place == 1, size, root))

    def ahead(self, tensor: Tensor) -> Tensor:
        """What the tensor is after a step."""
        return self._corrections(tensor[:, :1] + 1)


class Update:
    """The step of torch optimizers on some of their parameters, as tensors alone.

    Attributes:
        optimizers: whose formulas and state it has.
        rates: the learning rates of their groups.
        counts: of parameters that have taken equally many steps.
        tensors: their state.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], parameters: Sequence[Tensor], clips: dict[int, Any]
    ) -> None:
        self.optimizers, self._clips = list(dict.fromkeys(optimizers)), clips
        used, device = set(map(id, parameters)), parameters[0].device
        # Of each parameter: its optimizer, its group, and the rows of its rate and its count.
        self._own: list[tuple[Tensor, Optimizer, dict[str, Any], int, int]] = []
        groups: list[dict[str, Any]] = []
        together: dict[Any, list[dict[str, Any]]] = {}
        self.tensors: list[Tensor] = []
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                own = [p for p in group["params"] if id(p) in used]
                for p in own:
                    state = optimizer.state.get(p, {})
                    row = -1
                    if "step" in state:
                        key = (id(optimizer), group["betas"], float(state["step"]))
                        together.setdefault(key, []).append(state)
                        row = list(together).index(key)
                    self._own.append((p, optimizer, group, len(groups), row))
                    self.tensors += [
                        v for v in state.values() if isinstance(v, Tensor) and v.device == p.device
                    ]
                groups += [group] if own else []
        self.rates = Rates(groups, device)
        betas = [betas for _, betas, _ in together]
        self.counts = Counts(list(together.values()), betas, device)
        inside = set(map(id, self.tensors))
        states = [state for row in self.counts.states for state in row]
        self._outside = [state for state in states if id(state["step"]) not in inside]
        self._finished = 0

    def apply(self, fresh: dict[int, Tensor], now: dict[int, Tensor]) -> None:
        """Moves the parameters among the fresh tensors, in place, and their state."""
        rates, counts = now[id(self.rates.tensor)], now[id(self.counts.tensor)]
        for p, optimizer, group, place, row in self._own:
            mine = fresh[id(p)]
            if mine.grad is None:
                continue
            if (clip := self._clips.get(id(p))) is not None:
                clip(mine)
            state = {
                key: fresh[id(value)] if isinstance(value, Tensor) else value
                for key, value in optimizer.state.get(p, {}).items()
                if key != "step" or id(value) in fresh
            }
            if "step" in state:
                state["step"].add_(1)
            if row >= 0:
                state["size"], state["root"] = counts[row, 1], counts[row, 2]
            _FORMULAS[type(optimizer)](mine, rates[place], group, state)
        fresh[id(self.counts.tensor)] = self.counts.ahead(counts)

    def lead(self) -> None:
        """Does what the graph does not: rates, and steps that are numbers or on another device."""
        self._finished += 1
        self.rates.lead()
        for state in self._outside:
            state["step"] += 1

    def rewinder(self) -> Callable[[], None]:
        """Takes back what `lead` and schedules do from now on."""
        rates, finished = self.rates.given(), self._finished

        def rewind() -> None:
            self.rates.set_back(rates)
            for state in self._outside:
                state["step"] -= self._finished - finished
            self._finished = finished

        return rewind


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
    if group["weight_decay"] != 0:
        gradient = gradient + group["weight_decay"] * p
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.mul_(first).add_(gradient, alpha=1 - first)
    centred = gradient - mean if group["centered_variance"] else gradient
    square.mul_(second).addcmul_(centred, centred, value=1 - second)
    size = lr * state["root"] * state["size"]
    p.sub_(size * mean / (square.sqrt() + group["eps"]))


def _adam(p: Tensor, lr: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    assert p.grad is not None
    gradient = -p.grad if group["maximize"] else p.grad
    first, second = group["betas"]
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
    root = square.sqrt() / state["root"]
    p.sub_(lr * state["size"] * mean / (root + group["eps"]))


HOOKS_OF_ALL = (optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks)
_FORMULAS: dict[type, Callable[..., None]] = {
    Adam: _adam,
    AdamW: _adam,
    SGD: _sgd,
    ClippedAdam: _clipped_adam,
}


def update_of(optim: PyroOptim, parameters: Sequence[Tensor]) -> Update | None:
    """The step of the parameters' optimizers; None if one has no form of tensors alone."""
    clips: dict[int, Any] = {}
    if isinstance(optim, OneOptimizer) and type(optim).__call__ is OneOptimizer.__call__:
        found: list[Any] = [optim.torch_optimizer]
    elif type(optim).__call__ in (PyroOptim.__call__, PyroLRScheduler.__call__):
        objects = [optim.optim_objs.get(p) for p in parameters]
        found = [getattr(one, "optimizer", one) for one in objects]  # behind a scheduler
        clips = {id(p): clip for p, clip in optim.grad_clip.items() if clip is not None}
        if type(optim)._get_grad_clip is not PyroOptim._get_grad_clip:  # anybody's code
            return None
    else:
        return None
    for optimizer in found:
        if type(optimizer) not in _FORMULAS or _hooked(optimizer):
            return None
        for group in optimizer.param_groups:
            if group.get("differentiable") or isinstance(group["lr"], Tensor):
                return None
    return Update(found, parameters, clips)


def _hooked(optimizer: Optimizer) -> bool:
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or any(HOOKS_OF_ALL))
