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
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pyro.infer.util import zero_grads
from pyro.poutine.messenger import Messenger
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
from pyro_vi.watch import Watch, is_remade, tensors_in

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
        self._left = _Left(step)
        self._memory = _memory([*step.parameters, *step.buffers])
        self.may_be_late = step.update is not None
        self._scheduler = step.optim.scheduler if isinstance(step.optim, OneOptimizer) else None

    def stale(self) -> str | None:
        """Says what has changed since, so that the record is no good; None if nothing has."""
        if (changed := self._watch.stale()) is not None:
            return changed
        if self._update is not None and not self._update.counts.follow():
            return _APART
        return self._left.look()

    def is_alone(self, batch: Sequence[Tensor]) -> bool:
        """Whether a step's gradients and memory are its own.

        Pyro adds its gradients to what parameters have; and a batch may be a view of a parameter.
        """
        return self._left.is_zero and self._memory.isdisjoint(_memory(batch))

    def resync(self) -> str | None:
        """After an eager step: reads the optimizer's counts again; says why they are no good."""
        return None if self._update is None or self._update.counts.resync() else _APART

    def compile(self, batch: Sequence[Tensor]) -> None:
        """Hands it to Inductor, after a step that proved it, and holds what comes against it."""
        self._graph.compile(batch)
        if (differs := self.predict(batch).compiled_differs()) is not None:
            raise Uncapturable(f"what Inductor made of the record has another {differs}")

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
            self._left.take()  # which are zeros
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
        outcomes = []
        for as_compiled in (False, True):
            held = [tensor.clone() for tensor in before]
            try:
                found = self._graph.interpret(held, batch, as_compiled=as_compiled)
                drawn = [generator.get_state() for generator in self._generators]
            finally:
                rewind()
            if found is not None:
                status, *others = found
                gradients = others[len(self._bound) :]
                outcomes.append(_Outcome(status.cpu(), held, gradients, drawn))
        return Proof(self._step, before, outcomes)


_APART = "parameters took steps apart"
_GRADIENT, _VERSION = attrgetter("grad"), attrgetter("_version")


class _Left:
    """The gradients that parameters have between steps: zeros, if nobody adds to them.

    Attributes:
        is_zero: whether nobody has.
    """

    def __init__(self, step: _Step) -> None:
        self._parameters, self._uses, self._had = step.parameters, step.uses, step.had
        self._known: list[Any] = []
        self._some: list[Tensor] = []
        self._versions: list[int] = []
        self.is_zero = False

    def look(self) -> str | None:
        """Says what makes the record no good; reads the gradients that it has not seen so."""
        now = list(map(_GRADIENT, self._parameters))
        if len(now) == len(self._known) and all(map(is_, now, self._known)):
            if list(map(_VERSION, self._some)) == self._versions:
                return None
        self.is_zero = True
        for i, gradient in enumerate(now):
            if gradient is not None:
                is_plain = gradient.layout is torch.strided
                self.is_zero = self.is_zero and is_plain and not bool(gradient.any())
            if self._uses[i] and gradient is None:  # which a step leaves as zeros
                self._parameters[i].grad = torch.zeros_like(self._parameters[i])
            if not self._uses[i] and (gradient is not None) != self._had[i]:  # momentum moves it
                self._known = []
                one = "no gradient" if gradient is None else "a gradient, and had none"
                return f"a parameter that a step does not use has now {one}"
        self.take()
        return None

    def take(self) -> None:
        """Takes the gradients that there are now for seen."""
        self._known = list(map(_GRADIENT, self._parameters))
        self._some = [one for one in self._known if one is not None]
        self._versions = list(map(_VERSION, self._some))


class _Outcome(NamedTuple):
    """What a record makes of a step.

    Attributes:
        status, gradients: as it returns them.
        after: the tensors that it holds.
        drawn: where the generators are then.
    """

    status: Tensor
    after: Sequence[Tensor]
    gradients: Sequence[Tensor]
    drawn: Sequence[Tensor]


class Proof:
    """A step as its record predicts it, to be held against the eager one.

    Args:
        step: what was recorded.
        before: the tensors that it holds, at the step's beginning.
        outcomes: of the record, and of its compiled form where there is one.

    Attributes:
        is_sound: whether what the record takes for granted holds in it.
    """

    def __init__(self, step: _Step, before: Sequence[Tensor], outcomes: Sequence[_Outcome]) -> None:
        self._step, self._before, self._outcomes = step, before, outcomes
        self._status = outcomes[0].status
        self.is_sound = bool(self._status[4])
        self._differs = ""
        # Losses are one within a thousand roundings of their terms.
        eps = torch.finfo(step.parameters[0].dtype).eps
        self._rounding = 1000 * eps * self._status[:3].abs().sum().nan_to_num(0.0)

    def compiled_differs(self) -> str | None:
        """In what the compiled form is another than the record; None if in nothing.

        Their updates are not compared: where a gradient is nothing but rounding, Adam makes a step
        of it.
        """
        record, *others = self._outcomes
        for compiled in others:
            if self.is_sound and not self._is_loss(compiled.status[0], record.status[0]):
                return "loss"
            if not _are_equal(compiled.drawn, record.drawn):
                return _DRAWS
        return None

    def _is_loss(self, found: Tensor, loss: Tensor) -> bool:
        return not (found - loss).abs() > self._rounding

    def compare(self, loss: Any, parameters: Sequence[Tensor]) -> None:
        """Looks at an evaluated step: its loss, and its gradients if they are the record's last."""
        loss = torch.as_tensor(loss, dtype=torch.float64).detach().cpu()
        step = self._step
        if list(map(id, parameters)) != list(map(id, step.parameters)):
            self._differs = "parameters"
        for found in [outcome.status[0] for outcome in self._outcomes]:
            if self.is_sound and not self._differs and not self._is_loss(found, loss):
                self._differs = f"loss, {float(loss):g} and {float(found):g},"
        for parameter, gradient in zip(step.graded(), self._outcomes[0].gradients, strict=False):
            if parameter.grad is None or not _alike(gradient, parameter.grad, parameter.dtype):
                self._differs = self._differs or "gradient"

    def differs(self) -> str | None:
        """After the step: in what it is another one than was predicted; None if in nothing."""
        if not self.is_sound:
            return "mask, scale, constraint or support, or a NaN for a loss,"
        step = self._step
        if self._status[3] and not self._differs:
            step.adopt_buffers()
            after = self._outcomes[0].after
            for tensor, before, found in zip(step.held, self._before, after, strict=True):
                if id(tensor) not in step.own and not _alike(found, tensor, tensor.dtype, before):
                    self._differs = "update"
        drawn = [generator.get_state() for generator in step.generators()]
        if not all(_are_equal(drawn, outcome.drawn) for outcome in self._outcomes):
            self._differs = self._differs or _DRAWS
        return self._differs or None


_DRAWS = "number of draws"


def _are_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


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
        with _uninterrupted():
            return _record(_Step(svi, parameters, args, kwargs, scale=scale, guard=guard), calls)
    except Uncapturable:
        raise
    except Exception as error:  # of a user's objects, which may raise anything, or of torch
        raise Uncapturable(f"recording ended with {first_line(error)}") from error


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Lets Ctrl-C wait: an exception amid torch's tracing in C++ may end the process."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *found: caught.append(found))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[0])


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
    constants = set(map(id, graph.constants))
    for before, what in step.lost:
        if not constants.isdisjoint(map(id, tensors_in(before))):
            raise Uncapturable(f"{what}, and the next reads it")
    if _memory([*step.parameters, *step.state]) & _memory([*step.buffers, *graph.constants]):
        raise Uncapturable("a tensor that the programs read is a view of a parameter")
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
        lost: what an object bound to itself in a run, and a graph would not: what was there before,
            and words.
        bound: the tensors among that, which the graph returns: of whom, and what they are called.
        remade: attributes and items that a run makes anew, such as those tensors, or an
            autoguide's plates: the dictionary, by its identity, and the key.
        had: whether each parameter had a gradient before.
        uses: whether it has one from a step. Where not, zeros that are there are one, which
            momentum makes a move of.
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
        if any(p.is_complex() for p in parameters):
            raise Uncapturable("parameters that are complex")
        self.had = [p.grad is not None for p in parameters]
        self.uses = [False for _ in parameters]
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
        self.state, following = [], []
        if self.update is not None:
            self.state = self.update.tensors
            following = [self.update.rates.tensor, self.update.counts.tensor]
        self.alive = torch.ones((), dtype=torch.bool, device=parameters[0].device)
        self.held = [*parameters, *self.buffers, *self.state, *following, self.alive]
        outside = parameters if self.update is None else ()
        self.own = {id(tensor) for tensor in (*following, self.alive, *outside)}
        self._validates = Distribution._validate_args
        self.lost: list[tuple[Any, str]] = []
        self.bound: list[tuple[Any, str, Tensor]] = []
        self.remade: set[tuple[int, Any]] = set()
        if _memory([*parameters, *self.buffers]) & _memory(self.batch):
            raise Uncapturable("an argument that is a parameter or a buffer of the programs")

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        now = dict(zip(map(id, self.held), tensors, strict=False))
        fresh = {id(tensor): now[id(tensor)].clone() for tensor in (*self.buffers, *self.state)}
        moved = {id(p): _leaf(now[id(p)], p) for p in self.parameters}
        loss, conditions, others = self._evaluate({**fresh, **moved}, tensors[len(self.held) :])
        if self._validates and not self._guard:  # an eager step says what made it one
            conditions.append(~loss.isnan())
        with torch.no_grad():
            self.uses = [leaf.grad is not None for leaf in moved.values()]
            leaves = [moved[id(p)] for p in self.graded()]
            gradients = {
                id(p): leaf.grad * self._scale if leaf.grad is not None else torch.zeros_like(leaf)
                for p, leaf in zip(self.graded(), leaves, strict=True)
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
        return status, *bound, *gradients.values()

    def graded(self) -> list[Tensor]:
        """The parameters that have a gradient in a step, of which the others are left alone."""
        pairs = zip(self.parameters, self.uses, self.had, strict=True)
        return [p for p, is_used, had in pairs if is_used or had]

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
        self.lost, self.bound, self.remade = [], [], set()
        others, spaces = {}, {id(one): vars(one) for one in (*self.modules, *self._objects)}
        with (
            substituted([*self.modules, *self._objects], memo) as rebound,
            assumptions(validate=self._validates) as assumed,
            PyrosQuestions(),
            torch.enable_grad(),
        ):
            loss = svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
            for holder, attribute, item, before, after in rebound():
                what = f"{type(holder).__name__} sets its {attribute!r} in a run"
                space = spaces[id(holder)]
                is_users = is_namespace(type(holder).__module__) and attribute not in _TORCHS
                if id(before) in keys and isinstance(after, Tensor) and after.shape == before.shape:
                    others[keys[id(before)]] = after.detach()
                    continue
                if item is None and isinstance(after, Tensor):
                    self.bound.append((holder, attribute, after.detach().clone()))
                elif is_users and next(tensors_in(after, Messenger), None) is not None:
                    raise Uncapturable(f"{what}, where one may look at it")
                is_tensor = isinstance(after, Tensor) and isinstance(before, Tensor | None)
                if not is_tensor and not is_remade(before, after):
                    raise Uncapturable(f"{what}, and the next may read it")
                self.lost.append((before, what))
                self.remade.add(
                    (id(space), attribute) if item is None else (id(space[attribute]), item)
                )
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
        for parameter, gradient in zip(self.graded(), gradients, strict=True):
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


def _memory(tensors: Iterable[Tensor]) -> set[int]:
    """Where they lie, by their storages; those without elements nowhere."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}
