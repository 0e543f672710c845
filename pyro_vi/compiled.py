"""A step of an SVI as a graph (`pyro_vi.capture`).

What is recorded is the eager step itself, Pyro's ELBO over the programs' own run, and the formula
of the optimizer (`pyro_vi.optimizers.Update`). Any optimizer without one stays outside, and takes
the graph's gradients.

The graph works on copies of the parameters, the buffers and the optimizer's state, and writes them
back at its end; with a guard only if loss and gradients are finite, so that the last finite ones
survive.
"""

from __future__ import annotations

__all__ = ["Proof", "Recorded", "record"]

import math
from collections.abc import Callable, Sequence
from numbers import Number
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.infer.util import zero_grads
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as tree

from pyro_vi.calls import Calls
from pyro_vi.capture import Graph, PyrosQuestions, Uncapturable, capture, first_line
from pyro_vi.elbo import assumptions
from pyro_vi.holdings import Holdings
from pyro_vi.kept import Kept
from pyro_vi.optimizers import OneOptimizer, Update, update_of
from pyro_vi.program import modules_of, substituted
from pyro_vi.reach import is_namespace, objects
from pyro_vi.watch import Watch, is_remade

if TYPE_CHECKING:
    from pyro_vi.svi import SVI


class Recorded:
    """A recorded step, as a function of the batch.

    Nothing is updated in a step that is not sound; with a guard neither in one that is not finite.
    Then nor is it in those after it, until they are taken back: so that steps may be read late.

    Args:
        step: what was recorded.
        graph: the record.
        watch: says what has changed since, so that the record is no good.

    Attributes:
        may_be_late: whether a step can be finished before it is known what it found.
    """

    def __init__(self, step: _Step, graph: Graph, watch: Watch) -> None:
        self._step, self._graph, self._watch = step, graph, watch
        self._update = step.update
        self._generators = step.generators()
        self._gradients: Sequence[Tensor] = ()
        self._bound = [(vars(holder), name) for holder, name, _ in step.bound]
        self._left = _Left(step.parameters)
        self.may_be_late = step.update is not None
        self._scheduler = step.optim.scheduler if isinstance(step.optim, OneOptimizer) else None

    def stale(self) -> str | None:
        """Says what has changed since, so that the record is no good; None if nothing has."""
        if (changed := self._watch.stale()) is not None:
            return changed
        if self._update is not None and not self._update.counts.follow():
            return _APART
        return None

    def is_alone(self) -> bool:
        """Whether a step's gradients are its own: Pyro adds them to what parameters have."""
        return self._left.is_zero()

    def resync(self) -> str | None:
        """After an eager step: reads the optimizer's counts again; says why they are no good."""
        return None if self._update is None or self._update.counts.resync() else _APART

    def compile(self, batch: Sequence[Tensor]) -> None:
        """Hands it to Inductor, after a step that proved it, and holds what comes against it."""
        self._graph.compile(batch)
        if not self.predict(batch).is_one:
            raise Uncapturable("what Inductor made of the record has another loss")

    def __call__(self, batch: Sequence[Tensor]) -> Tensor:
        """Takes a step, all of it that is in the graph.

        Returns:
            (5,), float64: the loss, reconstruction and KL as `Told.terms` has them, and whether the
            step was finite (with a guard the gradients too) and sound, as 0 or 1.
        """
        if self._update is not None:
            self._update.rates.follow()
        try:
            status, *found = self._graph(batch)
        except Exception:  # such as an index out of bounds; an eager step says of what
            return torch.tensor([math.nan, math.nan, math.nan, 0, 0], dtype=torch.float64)
        self._found, self._gradients = found[: len(self._bound)], found[len(self._bound) :]
        return status

    def finish(self) -> None:
        """Does the rest of a step that updates, what is not in the graph."""
        for (held, name), value in zip(self._bound, self._found, strict=True):
            held[name] = value
        if self._update is None:
            self._step.update_outside(self._gradients)
            return
        self._update.lead()
        self._update.counts.own()
        if self._scheduler is not None:
            self._scheduler.step()

    def rewinder(self) -> Callable[[], None]:
        """Takes random numbers and schedules back to where they are now, for steps that failed."""
        states = [generator.get_state() for generator in self._generators]
        schedule = {**self._scheduler.state_dict()} if self._scheduler is not None else {}
        rewind_update = self._update.rewinder() if self._update is not None else None

        def rewind() -> None:
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
            if self._scheduler is not None:
                self._scheduler.load_state_dict(schedule)
            if rewind_update is not None:
                rewind_update()
            self._step.alive.fill_(True)

        return rewind

    def predict(self, batch: Sequence[Tensor]) -> Proof:
        """What the record makes of a step that is about to be taken eagerly; changes nothing."""
        rewind = self.rewinder()
        if self._update is not None:
            self._update.rates.follow()
        before = [tensor.detach().clone() for tensor in self._step.held]
        held, others = ([tensor.clone() for tensor in before] for _ in range(2))
        try:
            status, *found = self._graph.interpret(held, batch)
            drawn = [generator.get_state() for generator in self._generators]
            rewind()
            compiled, *_ = self._graph.interpret(others, batch, as_compiled=True) or [status]
        finally:
            rewind()
        return Proof(self._step, before, held, status, compiled, found[len(self._bound) :], drawn)


_APART = "parameters took steps apart"
_GRADIENT, _VERSION = attrgetter("grad"), attrgetter("_version")


class _Left:
    """The gradients that steps leave, which are zero if nobody adds to them."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._known: list[Tensor | None] = []
        self._some: list[Tensor] = []
        self._versions: list[int] = []

    def is_zero(self) -> bool:
        """Whether nobody has; looks at the numbers of those that it has not seen so."""
        now = list(map(_GRADIENT, self._parameters))
        if len(now) == len(self._known) and all(map(is_, now, self._known)):
            if list(map(_VERSION, self._some)) == self._versions:
                return True
        some = [gradient for gradient in now if gradient is not None]
        if any(one.layout is not torch.strided or bool(one.any()) for one in some):
            return False
        self._known, self._some, self._versions = now, some, list(map(_VERSION, some))
        return True


class Proof:
    """A step as its record predicts it, to be held against the eager one.

    Args:
        step: what was recorded.
        before, after: the tensors that it holds, at the step's beginning and predicted end.
        status, gradients: as the record returns them.
        compiled: the status as its compiled form returns it, where there is one.
        drawn: where the generators are then.

    Attributes:
        is_sound: whether what the record takes for granted holds in it.
    """

    def __init__(
        self,
        step: _Step,
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        status: Tensor,
        compiled: Tensor,
        gradients: Sequence[Tensor],
        drawn: Sequence[Tensor],
    ) -> None:
        self._step, self._before, self._after, self._drawn = step, before, after, drawn
        self._status, self._compiled, self._gradients = status.cpu(), compiled.cpu(), gradients
        self.is_sound = bool(status[4])
        self._differs = ""
        # Losses are one within a thousand roundings of their terms.
        eps = torch.finfo(step.parameters[0].dtype).eps
        self._rounding = 1000 * eps * self._status[:3].abs().sum().nan_to_num(0.0)

    @property
    def is_one(self) -> bool:
        """Whether the compiled form has the loss of the record."""
        return not self.is_sound or self._is_loss(self._compiled[0], self._status[0])

    def _is_loss(self, found: Tensor, loss: Tensor) -> bool:
        return not (found - loss).abs() > self._rounding

    def compare(self, loss: Any, parameters: Sequence[Tensor]) -> None:
        """Looks at an evaluated step: its loss, and its gradients if they are the record's last."""
        loss = torch.as_tensor(loss, dtype=torch.float64).detach().cpu()
        dtype = self._step.parameters[0].dtype
        if list(map(id, parameters)) != list(map(id, self._step.parameters)):
            self._differs = "parameters"
        for found in (self._status[0], self._compiled[0]):
            if self.is_sound and not self._differs and not self._is_loss(found, loss):
                self._differs = f"loss, {float(loss):g} and {float(found):g},"
        for parameter, gradient in zip(parameters, self._gradients, strict=False):
            if parameter.grad is not None and not _alike(gradient, parameter.grad, dtype):
                self._differs = self._differs or "gradient"

    def differs(self) -> str | None:
        """After the step: in what it is another one than was predicted; None if in nothing."""
        if not self.is_sound:
            return "mask, scale, constraint or support, or a NaN for a loss,"
        step = self._step
        if self._status[3] and not self._differs:
            step.adopt_buffers()
            for tensor, before, after in zip(step.held, self._before, self._after, strict=True):
                if id(tensor) not in step.own and not _alike(after, tensor, tensor.dtype, before):
                    self._differs = "update"
        drawn = [generator.get_state() for generator in step.generators()]
        if any(not torch.equal(a, b) for a, b in zip(drawn, self._drawn, strict=True)):
            self._differs = self._differs or "number of draws"
        return self._differs or None


def _alike(
    found: Tensor, expected: Tensor, dtype: torch.dtype, before: Tensor | None = None
) -> bool:
    """Whether two tensors, or their changes, are one but for rounding."""
    if not dtype.is_floating_point:
        return torch.equal(found, expected)
    with torch.no_grad():
        found, expected = found.double(), expected.double()
        change = expected if before is None else expected - before
        eps = torch.finfo(dtype).eps
        bound = 10 * eps**0.5 * change.norm() + 100 * eps * expected.norm()
        return bool((found - expected).norm() <= bound) or bool(expected.isnan().any())


def record(
    svi: SVI,
    calls: Calls,
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
        calls: in eager steps.
        parameters: the unconstrained parameters of the last eager step.
        args, kwargs: a batch.
        scale: a factor for the gradients.
        guard: whether nothing is updated from a step on whose loss or gradients are not finite.

    Raises:
        Uncapturable: see `pyro_vi.capture`.
    """
    try:
        return _record(_Step(svi, parameters, args, kwargs, scale=scale, guard=guard), calls)
    except Uncapturable:
        raise
    except Exception as error:  # of a user's objects, which may raise anything, or of torch
        raise Uncapturable(f"recording ended with {first_line(error)}") from error


def _record(step: _Step, calls: Calls) -> Recorded:
    svi, validates = step.svi, Distribution._validate_args
    assert svi.told is not None
    found = Holdings([svi.model, svi.guide, *step.modules, *_PYRO_STACK], calls)
    kept, terms = Kept(found), dict(vars(svi.told))  # its terms are of the last eager step
    failed: Exception | None = None
    try:
        graph = capture(step, step.held, step.batch)
    except Exception as error:
        failed = error
    finally:
        svi.told.__dict__.update(terms)
        Distribution.set_default_validate_args(validates)  # which Pyro's context sets to Pyro's
        left = kept.restore()
    if left is not None:  # which may be why it failed
        raise Uncapturable(f"a run of the programs leaves something in {left!r}") from failed
    if failed is not None:
        raise failed
    for value, what in step.lost:
        if not isinstance(value, Tensor | None) or any(value is read for read in graph.constants):
            raise Uncapturable(f"{what}, and the next may read it")
    read = [*step.parameters, *step.buffers, *graph.constants]
    if any(one.layout is not torch.strided for one in read):
        raise Uncapturable("a tensor that is sparse")
    return Recorded(step, graph, Watch(svi, found, step.parameters, step.update, read, step.remade))


class _Step:
    """A step as a function of tensors: `held`, and those of a batch.

    Attributes:
        held: parameters, buffers, the optimizer's state, its rates and counts, and `alive`.
        own: those that are the record's alone, and the parameters where an optimizer that is not
            in it moves them, by identity.
        batch: the tensors of the batch that it is recorded with.
        lost: what a module bound to itself in a run, and a graph would not: the object before, and
            words.
        bound: the tensors among that, which the graph returns: of whom, and what they are called.
        remade: attributes and items that a run binds anew to objects of the same kind, such as
            those tensors, or an autoguide's plates: the dictionary, by its identity, and the key.
    """

    def __init__(
        self,
        svi: SVI,
        parameters: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        scale: float,
        guard: bool,
    ) -> None:
        self.svi, self.optim, self.parameters = svi, svi.optim, list(parameters)
        self._scale, self._guard = scale, guard
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
            raise Uncapturable("hooks on parameters, which a graph would not call")
        # What a step did not use has a gradient of zero if it had one before: momentum moves it.
        self._moves = [p.grad is not None for p in parameters]
        self._leaves, self._spec = tree.tree_flatten((args, kwargs))
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.batch = [self._leaves[place] for place in self._places]
        if any(one.requires_grad or one.layout is not torch.strided for one in self.batch):
            raise Uncapturable("an argument that is no plain tensor, or has a gradient")
        self.modules = modules_of(svi.model, svi.guide, *self._leaves)
        self._objects = objects(svi.model, svi.guide)
        self._places_of = _buffers(self.modules)
        self.buffers = [buffer for _, _, buffer in self._places_of]
        self.update = update_of(svi.optim, parameters)
        self._state, following = [], []
        if self.update is not None:
            self._state = self.update.tensors
            following = [self.update.rates.tensor, self.update.counts.tensor]
        self.alive = torch.ones((), dtype=torch.bool, device=parameters[0].device)
        self.held = [*parameters, *self.buffers, *self._state, *following, self.alive]
        outside = parameters if self.update is None else ()
        self.own = {id(tensor) for tensor in (*following, self.alive, *outside)}
        self._validates = Distribution._validate_args
        self.lost: list[tuple[Any, str]] = []
        self.bound: list[tuple[Any, str, Tensor]] = []
        self.remade: set[tuple[int, Any]] = set()
        shared = {_storage(tensor) for tensor in (*parameters, *self.buffers)}
        if any(_storage(tensor) in shared for tensor in self.batch):
            raise Uncapturable("an argument that is a parameter or a buffer of the programs")

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        now = dict(zip(map(id, self.held), tensors, strict=False))
        fresh = {id(tensor): now[id(tensor)].clone() for tensor in (*self.buffers, *self._state)}
        moved = {id(p): _leaf(now[id(p)], p) for p in self.parameters}
        loss, conditions, others = self._evaluate({**fresh, **moved}, tensors[len(self.held) :])
        if self._validates and not self._guard:  # an eager step says what made it one
            conditions.append(~loss.isnan())
        with torch.no_grad():
            gradients = {
                id(p): leaf.grad * self._scale if leaf.grad is not None else torch.zeros_like(leaf)
                for p, leaf, moves in zip(self.parameters, moved.values(), self._moves, strict=True)
                if leaf.grad is not None or moves
            }
            finite = loss.isfinite()
            if self._guard:
                norm = torch.nn.utils.get_total_norm(list(gradients.values()))
                finite = finite & norm.isfinite()
            sound = torch.ones_like(finite)
            for condition in conditions:  # in one kernel, which torch.stack would not be
                sound = sound & condition
            if self.update is not None:
                fresh |= {key: leaf.detach().clone() for key, leaf in moved.items()}
                self._move(self.update, fresh, gradients, now)
            else:  # what the programs themselves have set
                fresh |= {key: leaf.detach() for key, leaf in moved.items()}
            alive = now[id(self.alive)]
            keep = alive & finite & sound if self._guard else sound
            for key, new in (fresh | others).items():
                guarded = self._guard or conditions
                now[key].copy_(torch.where(keep, new, now[key]) if guarded else new)
            if self._guard:
                alive.copy_(keep)
            status = self._status(loss, finite, sound)
            bound = [tensor for _, _, tensor in self.bound]
            if self.update is not None:
                return status, *bound
            zeros = {id(p): torch.zeros_like(now[id(p)]) for p in self.parameters}
        return status, *bound, *(zeros | gradients).values()

    def _evaluate(
        self, memo: dict[int, Tensor], batch: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], dict[int, Tensor]]:
        """The loss with gradients, what was taken for granted, and buffers that are others then."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, batch, strict=True):
            leaves[place] = tensor
        args, kwargs = tree.tree_unflatten(leaves, self._spec)
        svi, keys = self.svi, {id(tensor): key for key, tensor in memo.items()}
        assert svi.told is not None
        svi.told.forget()
        self.lost, self.bound = [], []
        others, spaces = {}, {id(one): vars(one) for one in (*self.modules, *self._objects)}
        with (
            substituted([*self.modules, *self._objects], memo) as rebound,
            assumptions(validate=self._validates) as assumed,
            PyrosQuestions(),
            torch.enable_grad(),
        ):
            loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
            for holder, attribute, item, before, after in rebound():
                if not isinstance(after, (Number, str, np.ndarray, Tensor)):
                    if is_remade(before, after):
                        space = spaces[id(holder)]
                        self.remade.add(
                            (id(space), attribute) if item is None else (id(space[attribute]), item)
                        )
                    continue
                if id(before) in keys and isinstance(after, Tensor) and after.shape == before.shape:
                    others[keys[id(before)]] = after.detach()
                    continue
                what = f"{type(holder).__name__} sets its {attribute!r} in a run"
                if item is None and isinstance(after, Tensor):
                    self.bound.append((holder, attribute, after.detach().clone()))
                    self.remade.add((id(spaces[id(holder)]), attribute))
                    self.lost.append((before, what))
                else:
                    is_own = is_namespace(type(holder).__module__) and attribute not in _TORCHS
                    self.lost.append((object() if is_own else before, what))
        return torch.as_tensor(loss).detach(), [torch.as_tensor(a).all() for a in assumed], others

    def _move(
        self,
        update: Update,
        fresh: dict[int, Tensor],
        gradients: dict[int, Tensor],
        now: dict[int, Tensor],
    ) -> None:
        """Moves the fresh parameters, and the optimizer's state."""
        for key, gradient in gradients.items():
            fresh[key].grad = gradient.clone()
        if isinstance(self.optim, OneOptimizer) and self.optim.clip_norm is not None:
            clipped = [fresh[key] for key in gradients]
            torch.nn.utils.clip_grad_norm_(clipped, self.optim.clip_norm)
        update.apply(fresh, now)

    def _status(self, loss: Tensor, finite: Tensor, sound: Tensor) -> Tensor:
        assert self.svi.told is not None
        parts = (loss, *self.svi.told.terms(loss), finite, sound)
        place = torch.arange(len(parts), device=loss.device)
        status = torch.zeros(len(parts), dtype=torch.float64, device=loss.device)
        for i, part in enumerate(parts):  # in one kernel, which torch.stack would not be
            status = torch.where(place == i, part.to(status), status)
        return status

    def adopt_buffers(self) -> None:
        """Puts held buffers where an eager step has bound new ones, with their values."""
        for module, name, held in self._places_of:
            if (current := module._buffers[name]) is not held and current is not None:
                held.copy_(current)
                module._buffers[name] = held

    def update_outside(self, gradients: Sequence[Tensor]) -> None:
        """Lets an optimizer that is not in the graph step."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optim(self.parameters)
        zero_grads(self.parameters)

    def generators(self) -> list[torch.Generator]:
        """Where draws may come from."""
        device = self.alive.device
        if device.type != "cuda":
            return [torch.default_generator]
        return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]


_TORCHS = {*vars(nn.Module()), "_cached_x_y"}  # what torch keeps in objects of a user's


def _leaf(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy that has a gradient; that of a module's parameter passes for one, as Pyro asks."""
    leaf = value.clone().requires_grad_()
    if isinstance(parameter, nn.Parameter):
        leaf._is_param = True
    return leaf


def _buffers(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """Every buffer once, with a module that has it and its name there."""
    found = {id(b): (m, n, b) for m in modules for n, b in m._buffers.items() if b is not None}
    return list(found.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
