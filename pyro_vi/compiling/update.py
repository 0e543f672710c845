"""The steps of torch's optimizers as formulas of tensors.

A compiled step cannot call an optimizer, which is Python. It has the formulas of Adam, AdamW, SGD
and Pyro's ClippedAdam instead, on the optimizers' own state. What an optimizer computes in Python
are three numbers: the learning rate, and Adam's corrections of the bias. They are inputs of the
record.

Other optimizers stay outside of the record, which then ends with the gradients.
"""

from __future__ import annotations

__all__ = ["HOOKS_OF_ALL", "Update", "update_of"]

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as optimizers

Numbers = Sequence[Any]  # of a step: the rate, 1 / (1 - beta_1^n), the root of 1 - beta_2^n


class Update:
    """The step of torch optimizers on some of their parameters.

    Args:
        optimizers: whose formulas and state it has.
        parameters: those that it moves; their state exists.
        clips: Pyro's clipping functions, by the identity of a parameter.

    Attributes:
        state: the tensors of the optimizers' state that a step changes.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], parameters: Sequence[Tensor], clips: dict[int, Any]
    ) -> None:
        self.optimizers = list(dict.fromkeys(optimizers))
        self._clips = clips
        used = set(map(id, parameters))
        every = [
            (_FORMULAS[type(optimizer)], group, p, optimizer.state.get(p, {}))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in used
        ]
        groups = {id(group): group for _, group, _, _ in every}.values()
        self._decaying = [group for group in groups if group.get("lrd", 1.0) != 1.0]
        device = parameters[0].device if parameters else torch.device("cpu")
        states = [state for *_, state in every]
        named = [item for state in states for item in state.items() if isinstance(item[1], Tensor)]
        self._steps = [one for name, one in named if name == "step" and one.device == device]
        self.state = [one for name, one in named if name != "step"] + self._steps
        inside = set(map(id, self._steps))
        self._outside = [s for s in states if "step" in s and id(s["step"]) not in inside]
        # Parameters of a group that have taken equally many steps share their numbers.
        rows: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._moves: list[tuple[Tensor, Any, dict[str, Any], dict[str, Any], int]] = []
        for formula, group, p, state in every:
            key = (id(group), float(state.get("step", 0)))
            rows.setdefault(key, (group, state))
            self._moves.append((p, formula, group, state, list(rows).index(key)))
        self._rows = list(rows.values())

    def state_of(self, parameter: Tensor) -> list[Tensor]:
        """The tensors of the optimizer's state that belong to a parameter."""
        states = [state for p, _, _, state, _ in self._moves if p is parameter]
        return [one for state in states for one in state.values() if isinstance(one, Tensor)]

    def rates(self) -> list[float]:
        """The learning rate of the next step, by row."""
        return [group["lr"] * group.get("lrd", 1.0) for group, _ in self._rows]

    def numbers(self, steps: int = 1) -> npt.NDArray[np.float64]:
        """The numbers of the next steps at the present rates: (steps, 3 * rows)."""
        found = np.empty((steps, 3 * len(self._rows)))
        self.write_numbers(found, steps)
        return found

    def write_numbers(self, target: Any, steps: int) -> None:
        """Writes `numbers` into the first rows of an array."""
        for i, ((group, state), rate) in enumerate(zip(self._rows, self.rates(), strict=True)):
            decay = group.get("lrd", 1.0)
            if decay == 1.0:
                target[:steps, 3 * i] = rate
            else:  # one by one, as the optimizer rounds
                target[:steps, 3 * i] = [*accumulate([rate, *[decay] * (steps - 1)], mul)]
            betas = group.get("betas")
            corrections = _corrections(betas, int(state["step"]), steps) if betas else 1.0
            target[:steps, 3 * i + 1 : 3 * i + 3] = corrections

    def apply(self, numbers: Tensor | None = None) -> None:
        """Moves the parameters that have a gradient, and their state, in place.

        Args:
            numbers: of the step, as a tensor that is read anew; by default those of `numbers`.
        """
        with torch.no_grad():
            found = self.numbers()[0].tolist() if numbers is None else numbers
            for step in self._steps:
                step.add_(1)
            for p, formula, group, state, row in self._moves:
                if p.grad is not None:
                    if (clip := self._clips.get(id(p))) is not None:
                        clip(p)
                    formula(p, p.grad, found[3 * row : 3 * row + 3], group, state)

    def counts(self) -> list[Any]:
        """What `advance` changes."""
        return [*(_copied(s["step"]) for s in self._outside), *(g["lr"] for g in self._decaying)]

    def set_counts(self, counts: Sequence[Any]) -> None:
        """Takes back what `advance` changed."""
        values = iter(counts)
        for state in self._outside:
            if isinstance(state["step"], Tensor):
                state["step"].copy_(next(values))
            else:
                state["step"] = next(values)
        for group in self._decaying:
            group["lr"] = next(values)

    def advance(self, steps: int) -> None:
        """Counts steps that have been applied where no tensor does: see `apply`."""
        for state in self._outside:
            state["step"] += steps
        for group in self._decaying * steps:  # one by one, as the optimizer rounds
            group["lr"] *= group["lrd"]


def _corrections(betas: Any, taken: int, steps: int) -> npt.NDArray[np.float64]:
    """Adam's corrections in the steps after some: (steps, 2)."""
    chunk, start = divmod(taken, _CHUNK)
    found = _table(*betas, chunk)[start : start + steps]
    if len(found) == steps:
        return found
    return np.concatenate([found, _corrections(betas, taken + len(found), steps - len(found))])


@lru_cache(maxsize=64)
def _table(first: float, second: float, chunk: int) -> npt.NDArray[np.float64]:
    """The same, in tables that do not depend on how many steps are taken at once."""
    n = np.arange(chunk * _CHUNK + 1, (chunk + 1) * _CHUNK + 1, dtype=np.float64)
    return np.stack([1 / (1 - first**n), np.sqrt(1 - second**n)], axis=1)


_CHUNK = 1_024


def _copied(count: Any) -> Any:
    return count.clone() if isinstance(count, Tensor) else count


def make_state(optimizer: Optimizer) -> None:
    """Gives parameters with a gradient the state that their optimizer begins with."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None or optimizer.state.get(p):
                continue
            if isinstance(optimizer, SGD):
                if group["momentum"] != 0:
                    optimizer.state[p]["momentum_buffer"] = None
                continue
            state = optimizer.state[p]
            state["step"] = 0 if isinstance(optimizer, ClippedAdam) else torch.tensor(0.0)
            names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])]
            for name in names:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)


def _sgd(p: Tensor, g: Tensor, numbers: Numbers, group: Any, state: Any) -> None:
    gradient = -g if group["maximize"] else g
    if group["weight_decay"] != 0:
        gradient = gradient.add(p, alpha=group["weight_decay"])
    if group["momentum"] != 0:
        buffer = state["momentum_buffer"]
        if buffer is None:
            buffer = state["momentum_buffer"] = gradient.detach().clone()
        else:
            buffer.mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        gradient = gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer
    rate = numbers[0]
    if isinstance(rate, Tensor):
        p.sub_(rate * gradient)
    else:
        p.add_(gradient, alpha=-rate)


def _clipped_adam(p: Tensor, g: Tensor, numbers: Numbers, group: Any, state: Any) -> None:
    gradient = g.clamp(-group["clip_norm"], group["clip_norm"])
    first, second = group["betas"]
    if group["weight_decay"] != 0:
        gradient = gradient + group["weight_decay"] * p
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.mul_(first).add_(gradient, alpha=1 - first)
    centred = gradient - mean if group["centered_variance"] else gradient
    square.mul_(second).addcmul_(centred, centred, value=1 - second)
    rate, size, root = numbers[0], numbers[1], numbers[2]
    p.sub_(rate * root * size * mean / (square.sqrt() + group["eps"]))


def _adam(p: Tensor, g: Tensor, numbers: Numbers, group: Any, state: Any) -> None:
    gradient = -g if group["maximize"] else g
    first, second = group["betas"]
    rate, size, root = numbers[0], numbers[1], numbers[2]
    if group["weight_decay"] != 0 and group["decoupled_weight_decay"]:
        p.mul_(1 - rate * group["weight_decay"])
    elif group["weight_decay"] != 0:
        gradient = gradient.add(p, alpha=group["weight_decay"])
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - first)
    square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
    if group["amsgrad"]:
        largest = state["max_exp_avg_sq"]
        torch.maximum(largest, square, out=largest)
        square = largest
    below = (square.sqrt() / root).add_(group["eps"])
    if isinstance(rate, Tensor):
        p.sub_(rate * size * mean / below)
    else:
        p.addcdiv_(mean, below, value=-rate * size)


HOOKS_OF_ALL = (optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks)
_FORMULAS: dict[type, Callable[..., None]] = {
    Adam: _adam,
    AdamW: _adam,
    SGD: _sgd,
    ClippedAdam: _clipped_adam,
}


def has_formula(optimizer: Any) -> bool:
    """Whether an optimizer's step is known as a formula, and nothing hooks into it."""
    if type(optimizer) not in _FORMULAS:
        return False
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    groups = optimizer.param_groups
    odd = any(g.get("differentiable") or isinstance(g["lr"], Tensor) for g in groups)
    fused = any(g.get("fused") or g.get("capturable") for g in groups)
    is_complex = any(p.is_complex() for g in groups for p in g["params"])
    return not (odd or fused or is_complex or any(HOOKS_OF_ALL))


def update_of(optim: PyroOptim, parameters: Sequence[Tensor]) -> Update | None:
    """The step of the parameters' optimizers; None if one is not known as a formula."""
    clips: dict[int, Any] = {}
    if (one := getattr(optim, "torch_optimizer", None)) is not None:
        found: list[Any] = [one]
    elif type(optim).__call__ in (PyroOptim.__call__, PyroLRScheduler.__call__):
        objects = [optim.optim_objs.get(p) for p in parameters]
        found = [getattr(one, "optimizer", one) for one in objects]  # behind a scheduler
        clips = {id(p): clip for p, clip in optim.grad_clip.items() if clip is not None}
        if type(optim)._get_grad_clip is not PyroOptim._get_grad_clip:  # anybody's code
            return None
    else:
        return None
    if not all(map(has_formula, found)):
        return None
    ready = {
        id(p)
        for optimizer in found
        for group in optimizer.param_groups
        for p in group["params"]
        if _has_state(optimizer, group, p)
    }
    return Update(found, [p for p in parameters if id(p) in ready], clips)


def _has_state(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> bool:
    """Whether a parameter has had a gradient, and so all the state that a step changes."""
    state = optimizer.state.get(p, {})
    if isinstance(optimizer, SGD):
        return group["momentum"] == 0 or state.get("momentum_buffer") is not None
    return bool(state)
