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
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as tree

from pyro_vi.capture import Graph, PyrosQuestions, Uncapturable, capture
from pyro_vi.elbo import assumptions
from pyro_vi.optimizers import OneOptimizer, Rate, updates_of
from pyro_vi.program import modules_of, substituted
from pyro_vi.reach import settings

if TYPE_CHECKING:
    from pyro_vi.svi import SVI

_MOST = 4  # graphs of an SVI
_KINDS = 1_000  # shapes of batches, or numbers in them, that are counted
_OTHER = 100  # batches of another shape than the first recorded one, before it is recorded too


class Recorder:
    """The recorded steps of an SVI, one for each shape of a batch.

    Args:
        svi: whose steps they are.
        after: eager steps before the first is recorded.
        scale, guard: as `record` takes them.
        announce: called before a step is compiled, which takes seconds.
    """

    def __init__(
        self,
        svi: SVI,
        *,
        after: int,
        scale: float = 1.0,
        guard: bool = False,
        announce: Callable[[], object] = lambda: None,
    ) -> None:
        self._svi, self._after, self._scale, self._guard = svi, after, scale, guard
        self._announce = announce
        self._recorded: dict[Any, Recorded] = {}
        self._seen: dict[Any, int] = {}
        self._refused = False

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Recorded, Any] | None:
        """The recorded step for a batch, and its tensors; None if there is none."""
        if not self._recorded:
            return None
        key, batch = _shape(args, kwargs)
        found = self._recorded.get(key)
        if found is None:
            return None
        if (change := found.stale()) is not None:
            self._recorded.clear()
            self._seen.clear()
            self._after *= 10  # it may well happen again
            warnings.warn(f"steps are eager for a while: {change}", stacklevel=3)
            return None
        return found, batch

    def after_eager(
        self, parameters: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Counts an eager step, and records its kind if it is time."""
        if self._refused or not parameters or len(self._recorded) >= _MOST:
            return
        key, batch = _shape(args, kwargs)
        if key is None:
            return
        if key not in self._seen and len(self._seen) == _KINDS:
            self._refused = True
            warnings.warn(f"steps stay eager: {_KINDS} batches of other shapes", stacklevel=4)
            return
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] < (max(self._after, _OTHER) if self._recorded else self._after):
            return
        self._announce()
        try:
            recorded = record(
                self._svi, parameters, args, kwargs, scale=self._scale, guard=self._guard
            )
            recorded.compile(batch)
        except Uncapturable as error:
            self._refused = True
            warnings.warn(f"steps stay eager: {error}", stacklevel=4)
        else:
            self._recorded[key] = recorded


def _shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """What a record is good for, None if for nothing; and the tensors of a batch."""
    if not kwargs and all(type(one) is Tensor and not one.requires_grad for one in args):
        return tuple(map(_layout, args)), list(args)
    leaves, spec = tree.tree_flatten((args, kwargs))
    batch = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    key = [_layout(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves]
    try:
        hash(tuple(key))
    except TypeError:
        return None, batch
    if any(one.requires_grad for one in batch):
        return None, batch
    return (spec, *key), batch


def _layout(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class Recorded:
    """A recorded step, as a function of the batch.

    Nothing is updated in a step that is not sound; with a guard neither in one that is not finite.
    Then nor is it in those after it, until they are taken back: so that steps may be read late.

    Args:
        graph: what it runs.
        alive: whether steps update, a scalar.
        rates, scheduler: the learning rates in the graph, and what changes them after a step.
        update: takes the gradients, where the optimizer is not in the graph.

    Attributes:
        stale: asks what has changed since it was recorded so that it is no good, in words.
        may_be_late: whether a step can be finished before it is known what it found.
    """

    def __init__(
        self,
        graph: Graph,
        alive: Tensor,
        rates: Sequence[Rate],
        *,
        scheduler: LRScheduler | None,
        update: Callable[[Sequence[Tensor]], None] | None,
        stale: Callable[[], str | None],
    ) -> None:
        self._graph, self._alive, self._rates = graph, alive, rates
        self._scheduler, self._update = scheduler, update
        self._gradients: Sequence[Tensor] = ()
        self.stale, self.may_be_late = stale, update is None

    def compile(self, batch: Sequence[Tensor]) -> None:
        """Hands it to Inductor."""
        self._graph.compile(batch)

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        """Takes a step, all of it that is in the graph.

        Returns:
            (5,), float64: the loss, reconstruction and KL as `Told.terms` has them, and whether the
            step was finite (with a guard the gradients too) and sound, as 0 or 1.
        """
        for rate in self._rates:
            rate.follow()
        status, *self._gradients = self._graph(batch)
        return status

    def finish(self) -> None:
        """Does the rest of a step that updates, what is not in the graph."""
        for rate in self._rates:
            rate.decay()
        if self._update is not None:
            self._update(self._gradients)
        elif self._scheduler is not None:
            self._scheduler.step()

    def rewinder(self) -> Callable[[], None]:
        """Takes random numbers and schedules back to where they are now, for steps that failed."""
        device = self._alive.device
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        states = [generator.get_state() for generator in generators]
        schedule = {**self._scheduler.state_dict()} if self._scheduler is not None else {}
        rates = [rate.group["lr"] for rate in self._rates]

        def rewind() -> None:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            if self._scheduler is not None:
                self._scheduler.load_state_dict(schedule)
            for rate, before in zip(self._rates, rates, strict=True):
                rate.group["lr"] = before
            self._alive.fill_(True)

        return rewind


def record(
    svi: SVI,
    parameters: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    scale: float = 1.0,
    guard: bool = False,
) -> Recorded:
    """Records a step that has been taken eagerly before, so that all it needs is there.

    Args:
        svi: with one of the ELBOs in `pyro_vi.elbo`.
        parameters: the unconstrained parameters of the last eager step.
        args, kwargs: a batch.
        scale: a factor for the gradients.
        guard: whether nothing is updated from a step on whose loss or gradients are not finite.

    Raises:
        Uncapturable: see `pyro_vi.capture`.
    """
    told, optim = svi.told, svi.optim
    assert told is not None
    leaves, spec = tree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    modules = modules_of(svi.model, svi.guide)
    buffers = list(
        {id(b): b for m in modules for b in m._buffers.values() if b is not None}.values()
    )
    updates = updates_of(optim, parameters)
    state = [tensor for update in updates or () for tensor in update.tensors]
    rates = [rate for update in updates or () for rate in update.rates]
    alive = torch.ones((), dtype=torch.bool, device=parameters[0].device)
    held = [*parameters, *buffers, *state, *(rate.tensor for rate in rates), alive]
    clip = getattr(optim, "_clip_norm", None)
    lost: list[tuple[Any, str]] = []

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(map(id, held), tensors, strict=False))
        batch = list(leaves)
        for place, tensor in zip(places, tensors[len(held) :], strict=True):
            batch[place] = tensor
        inner, named = tree.tree_unflatten(batch, spec)
        moved = {id(p): own[id(p)].clone().requires_grad_() for p in parameters}
        fresh = {id(tensor): own[id(tensor)].clone() for tensor in (*buffers, *state)}
        keys = {id(tensor): key for key, tensor in fresh.items()}
        told.forget()
        with (
            substituted(modules, {**fresh, **moved}) as rebound,
            assumptions() as assumed,
            PyrosQuestions(),
            torch.enable_grad(),
        ):
            value = svi.loss_and_grads(svi.model, svi.guide, *inner, **named)
            others = {}
            for module, name, before, after in rebound():
                if id(before) in keys and isinstance(after, Tensor) and after.shape == before.shape:
                    others[keys[id(before)]] = after.detach()
                else:
                    lost.append((before, f"{type(module).__name__} sets its {name!r} in a run"))
        with torch.no_grad():
            gradients = {
                key: leaf.grad * scale for key, leaf in moved.items() if leaf.grad is not None
            }
            value = torch.as_tensor(value).detach()
            finite = value.isfinite()
            if guard:
                norm = torch.nn.utils.get_total_norm(list(gradients.values()))
                finite = finite & norm.isfinite()
            conditions = [torch.as_tensor(condition).all() for condition in assumed]
            sound = torch.stack(conditions).all() if conditions else torch.ones_like(finite)
            if updates is not None:
                fresh |= {key: leaf.detach().clone() for key, leaf in moved.items()}
                for key, gradient in gradients.items():
                    fresh[key].grad = gradient.clone()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_([fresh[key] for key in gradients], clip)
                for update in updates:
                    update.apply(fresh, own)
            changed = fresh | others
            keep = own[id(alive)] & finite & sound if guard else sound
            for key, new in changed.items():
                guarded = guard or conditions
                own[key].copy_(torch.where(keep, new, own[key]) if guarded else new)
            if guard:
                own[id(alive)].copy_(keep)
            parts = (value, *told.terms(value), finite, sound)
            status = torch.stack([part.to(value.device, torch.float64) for part in parts])
        if updates is not None:
            return (status,)
        return status, *(gradients.get(id(p), torch.zeros_like(own[id(p)])) for p in parameters)

    kept = dict(vars(told))  # its terms are of the last eager step
    try:
        graph = capture(step, held, [leaves[place] for place in places])
    finally:
        told.__dict__.update(kept)
    for value, what in lost:
        if not isinstance(value, Tensor | None) or any(value is read for read in graph.constants):
            raise Uncapturable(f"{what}, and the next may read it")

    def update(gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optim(parameters)
        for parameter in parameters:
            parameter.grad = None

    return Recorded(
        *(graph, alive, rates),
        scheduler=optim._scheduler if isinstance(optim, OneOptimizer) else None,
        update=update if updates is None else None,
        stale=_watch(svi, modules, [*parameters, *buffers], graph.constants),
    )


def _watch(
    svi: SVI, modules: Iterable[nn.Module], tensors: Sequence[Tensor], read: Sequence[Tensor]
) -> Callable[[], str | None]:
    """Asks what a record was made of that is something else by now, in words.

    Args:
        svi: whose programs, loss and optimizer they are.
        modules: those that the programs reach; their modes are watched.
        tensors: parameters and buffers, which may be replaced, moved or frozen.
        read: other tensors that were read. Where the programs read one by name, or a number, that
            may be bound anew.
    """
    modules, used = list(modules), {id(tensor) for tensor in tensors}
    owners = [(m, kind) for m in modules for kind in ("_parameters", "_buffers")]
    held = [
        (owner, kind, name, tensor, tensor.requires_grad, tensor.data_ptr())
        for owner, kind in [*owners, (pyro.get_param_store(), "_params")]
        for name, tensor in getattr(owner, kind).items()
        if id(tensor) in used
    ]
    modes = [(module, module.training) for module in modules]
    model, guide, optim, loss = svi.model, svi.guide, svi.optim, svi.loss_and_grads
    named = [
        place
        for place in settings(model, guide)
        if not isinstance(place[-1], Tensor) or any(place[-1] is tensor for tensor in read)
    ]

    def stale() -> str | None:
        if svi.model is not model or svi.guide is not guide:
            return "the model or the guide is another one"
        if svi.optim is not optim or svi.loss_and_grads is not loss:
            return "the loss or the optimizer is another one"
        for owner, kind, name, tensor, trained, place in held:
            if (
                getattr(owner, kind).get(name) is not tensor
                or tensor.requires_grad is not trained
                or tensor.data_ptr() != place
            ):
                return f"{name!r} was replaced, moved or frozen"
        for module, mode in modes:
            if module.training != mode:
                return f"{type(module).__name__} is in another mode"
        for name, holder, key, value in named:
            now = holder.cell_contents if key is None else holder.get(key)
            if now is not value and (isinstance(value, Tensor) or now != value):
                return (
                    f"{name!r} is another value (make it a tensor and fill_ it, or an argument of"
                    " the step)"
                )
        return None

    return stale
