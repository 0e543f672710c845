"""Steps of an SVI as graphs (`pyro_vi.capture`).

What is recorded is the eager step itself, Pyro's ELBO over the programs' own run, and the formula
of the optimizer (Adam, AdamW, SGD, Pyro's ClippedAdam), whose learning rate may change. Any other
optimizer stays outside, and takes the graph's gradients.

The graph works on copies of the parameters and of the optimizer's state and writes them back at its
end; with a guard only if loss and gradients are finite, so that the last finite ones survive.
"""

from __future__ import annotations

__all__ = ["Recorded", "Recorder", "record"]

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils import _pytree as tree

from pyro_vi.capture import Graph, Losses, Uncapturable, capture
from pyro_vi.elbo import Told, assumptions
from pyro_vi.program import modules_of, substituted
from pyro_vi.svi import OneOptimizer

Evaluate = Callable[..., Any]  # loss_and_grads of (model, guide, *args, **kwargs)


class Recorder:
    """The recorded steps of an SVI, one for each shape of a batch.

    Args:
        svi: whose steps they are; its `told` and `optim` too.
        after: eager steps before the first is recorded; None for none.
        scale, guard: as `record` takes them.
        own: whether nobody else can change the programs meanwhile.
        announce: called before a step is compiled, which takes seconds.
    """

    def __init__(
        self,
        svi: Any,
        *,
        after: int | None,
        scale: float = 1.0,
        guard: bool = False,
        own: bool = False,
        announce: Callable[[], object] = lambda: None,
    ) -> None:
        self._svi, self._after, self._scale, self._guard = svi, after, scale, guard
        self._own, self._announce = own, announce
        self._recorded: dict[Any, Recorded] = {}
        self._seen: dict[Any, int] = {}
        self._held: list[tuple[Any, str, str, Tensor]] = []
        self._modes: list[tuple[nn.Module, bool]] = []

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Recorded, Any] | None:
        """The recorded step for a batch, and its tensors; None if there is none."""
        if not self._recorded:
            return None
        key, batch = _shape(args, kwargs)
        found = self._recorded.get(key)
        if found is None:
            return None
        if not self._own and self._changed():
            self._recorded.clear()
            self._seen.clear()
            return None
        return found, batch

    def _changed(self) -> bool:
        """Whether a parameter was replaced or frozen, or a module's mode set."""
        return any(
            getattr(owner, kind).get(name) is not tensor or not tensor.requires_grad
            for owner, kind, name, tensor in self._held
        ) or any(module.training != mode for module, mode in self._modes)

    def after_eager(
        self, parameters: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Counts an eager step, and records its kind if it is time."""
        if self._after is None or len(self._recorded) >= _MOST:
            return
        key, batch = _shape(args, kwargs)
        if key is None:
            return
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] < (max(self._after, _OTHER) if self._recorded else self._after):
            return
        svi = self._svi
        self._announce()
        try:
            recorded = record(
                *(svi.model, svi.guide, svi.loss_and_grads, svi.told, svi.optim),
                *(parameters, args, kwargs),
                scale=self._scale,
                guard=self._guard,
            )
            recorded.compile(batch)
        except Uncapturable as error:
            self._after = None
            warnings.warn(f"steps stay eager: {error}", stacklevel=4)
            return
        self._recorded[key] = recorded
        if not self._own:
            self._held = _places(svi.model, svi.guide, parameters)
            self._modes = [(m, m.training) for m in modules_of(svi.model, svi.guide)]


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """What a record is good for, and the tensors of a batch."""
    if not kwargs and all(type(one) is Tensor and not one.requires_grad for one in args):
        return tuple((one.shape, one.dtype, one.device) for one in args), list(args)
    leaves, spec = tree.tree_flatten((args, kwargs))
    batch = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    key = [
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves
    ]
    try:
        hash(tuple(key))
    except TypeError:
        return None, batch
    if any(one.requires_grad for one in batch):
        return None, batch
    return (spec, *key), batch


def _places(
    model: Callable[..., Any], guide: Callable[..., Any], parameters: Sequence[Tensor]
) -> list[tuple[Any, str, str, Tensor]]:
    """Where the parameters are kept: an owner, its dictionary, a key, and the tensor there."""
    used = _ids(parameters)
    owners = [(module, "_parameters") for module in modules_of(model, guide)]
    return [
        (owner, kind, name, tensor)
        for owner, kind in [*owners, (pyro.get_param_store(), "_params")]
        for name, tensor in getattr(owner, kind).items()
        if id(tensor) in used
    ]


_MOST = 4  # graphs of an SVI
_OTHER = 100  # batches of another shape than the first recorded one, before it is recorded too


class Recorded:
    """A recorded step, as a function of the batch.

    Attributes:
        reconstruction, kl: of the last step, as `Told` has them; scalars.
        finite: whether the last step's loss and gradients were; a scalar.
        sound: whether what the record assumes did hold in the last step; a scalar. If not, nothing
            was updated.
    """

    def __init__(
        self,
        graph: Graph,
        held: Sequence[Tensor],
        rates: Sequence[_Rate],
        outside: Callable[[Sequence[Tensor]], None],
        guard: bool,
    ) -> None:
        self._guard = guard
        self._graph, self._rates, self._outside = graph, rates, outside
        self._held = [tensor.detach() for tensor in held]  # the same memory
        self.reconstruction = self.kl = self.finite = self.sound = torch.zeros(())

    def compile(self, batch: Sequence[Tensor]) -> None:
        """Hands it to Inductor."""
        self._graph.compile([*self._held, *(tensor.detach() for tensor in batch)])

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        """Takes a step; returns the loss."""
        for rate in self._rates:
            rate.follow()
        found = self._graph([*self._held, *batch])
        loss, self.reconstruction, self.kl, self.finite, self.sound, *gradients = found
        if self.sound and (self.finite or not self._guard):
            self._outside(gradients)
        return loss


def record(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    loss: Evaluate,
    told: Told | None,
    optim: PyroOptim,
    parameters: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    scale: float = 1.0,
    guard: bool = False,
) -> Recorded:
    """Records a step that has been taken eagerly before, so that all it needs is there.

    Args:
        model, guide: the programs.
        loss: an ELBO's `loss_and_grads`.
        told: that ELBO, where its terms are told apart.
        optim: what updates the parameters.
        parameters: the unconstrained parameters of the last eager step.
        args, kwargs: a batch.
        scale: a factor for the gradients.
        guard: whether the update is left out where loss or gradients are not finite.

    Raises:
        Uncapturable: see `pyro_vi.capture`.
    """
    leaves, spec = tree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    modules = modules_of(model, guide)
    buffers = list(
        {id(b): b for m in modules for b in m._buffers.values() if b is not None}.values()
    )
    updates = _updates(optim, parameters)
    state = [tensor for update in updates or () for tensor in update.tensors]
    rates = [rate for update in updates or () for rate in update.rates]
    held = [*parameters, *buffers, *state, *(rate.tensor for rate in rates)]
    clip = getattr(optim, "_clip_norm", None)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(map(id, held), tensors, strict=False))
        moved = {id(p): own[id(p)].clone().requires_grad_() for p in parameters}
        batch = list(leaves)
        for place, tensor in zip(places, tensors[len(held) :], strict=True):
            batch[place] = tensor
        inner, named = tree.tree_unflatten(batch, spec)
        if told is not None:
            told.forget()
        memo = {**{id(b): own[id(b)] for b in buffers}, **moved}
        with (
            substituted(modules, memo),
            assumptions() as assumed,
            Losses(),
            torch.enable_grad(),
        ):
            value = loss(model, guide, *inner, **named)
        with torch.no_grad():
            gradients = {
                key: leaf.grad * scale if scale != 1.0 else leaf.grad
                for key, leaf in moved.items()
                if leaf.grad is not None
            }
            value = torch.as_tensor(value).detach()
            parts = told.terms(value) if told is not None else (value, value)
            norm = torch.nn.utils.get_total_norm(list(gradients.values()))
            finite = value.isfinite() & norm.isfinite()
            sound = (
                torch.stack([torch.as_tensor(a).all() for a in assumed]).all() if assumed else None
            )
            if updates is None:
                sound = torch.ones_like(finite) if sound is None else sound
                zeros = (gradients.get(id(p), own[id(p)] * 0) for p in parameters)
                return value, *parts, finite, sound, *zeros
            fresh = {
                key: tensor.clone() for key, tensor in own.items() if key in _ids(parameters, state)
            }
            for key, gradient in gradients.items():
                fresh[key].grad = gradient.clone()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([fresh[key] for key in gradients], clip)
            for update in updates:
                update.apply(fresh, own)
            keep = sound if not guard else finite if sound is None else finite & sound
            for key, new in fresh.items():
                new.grad = None
                own[key].copy_(new if keep is None else torch.where(keep, new, own[key]))
        return value, *parts, finite, torch.ones_like(finite) if sound is None else sound

    kept = dict(vars(told)) if told is not None else {}  # its terms are of the last eager step
    try:
        graph = capture(step, [*held, *(leaves[place] for place in places)])
    finally:
        if told is not None:
            told.__dict__.update(kept)

    def outside(gradients: Sequence[Tensor]) -> None:
        if updates is None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optim(parameters)
            for parameter in parameters:
                parameter.grad = None
        elif (scheduler := getattr(optim, "_scheduler", None)) is not None:
            scheduler.step()

    return Recorded(graph, held, rates, outside, guard)


def _ids(*groups: Iterable[Tensor]) -> set[int]:
    return {id(tensor) for group in groups for tensor in group}


class _Rate:
    """The learning rate of a group, as a tensor that follows it."""

    def __init__(self, group: dict[str, Any], like: Tensor) -> None:
        self._group, self._last = group, float(group["lr"])
        self.tensor = torch.tensor(self._last, dtype=torch.float64, device=like.device)

    def follow(self) -> None:
        if "lrd" in self._group:  # ClippedAdam's own schedule
            self._group["lr"] *= self._group["lrd"]
        if self._group["lr"] != self._last:
            self._last = self._group["lr"]
            self.tensor.fill_(self._last)


class _Update:
    """A torch optimizer's step on some of its parameters, as tensors alone."""

    def __init__(self, optimizer: Optimizer, used: set[int], clips: dict[int, Any]) -> None:
        self._optimizer, self._clips = optimizer, clips
        self._groups = [
            (group, [p for p in group["params"] if id(p) in used])
            for group in optimizer.param_groups
        ]
        self.rates = [_Rate(group, own[0]) for group, own in self._groups if own]
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


def _updates(optim: PyroOptim, parameters: Sequence[Tensor]) -> list[_Update] | None:
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
            stateful = type(optimizer) is not SGD or group["momentum"] != 0
            if group.get("differentiable") or isinstance(group["lr"], Tensor):
                return None
            if stateful and any(not optimizer.state.get(p) for p in group["params"]):
                return None  # without a gradient so far
        updates.append(_Update(optimizer, _ids(parameters), clips))
    return updates
