"""Compiled steps of an SVI: recorded, proven, and taken.

The life of a record: some eager steps come first, so that all that is lazy has been made. The next
step is recorded while it is taken (`record_step`), and compiled. The one after it is taken both
ways, from one state and with the same random numbers; if losses, parameters and all else that a
step changes come out alike, compiled steps are used from then on. Audits, which take a step both
ways again, come after 1, 2, 4, 8... uses.
"""

from __future__ import annotations

__all__ = ["Compiled", "Compiler", "Proof"]

import logging
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.infer.util import zero_grads
from torch import Tensor
from torch.distributions import Distribution
from torch.utils import _pytree as tree

from pyro_vi.compiling.backends import compile_step
from pyro_vi.compiling.clean import clean, commit, conditions_hold
from pyro_vi.compiling.guards import Guards, Strange, batch_key
from pyro_vi.compiling.leftovers import difference, held_values
from pyro_vi.compiling.tape import CONSTANT, HELD, Op, Record, Ref, Storage, Tape, Unrecordable
from pyro_vi.compiling.update import Update, update_of
from pyro_vi.program import modules_of

if TYPE_CHECKING:
    from pyro_vi.svi import SVI

_log = logging.getLogger(__name__)
_aten = torch.ops.aten

_MOST = 4  # records of an SVI
_KINDS = 100  # kinds of batches that are counted
_OTHER = 100  # eager steps of another kind of batch than the first recorded one
_UNSOUND = 3  # steps in a row whose conditions did not hold, before a record is dropped


class Compiled:
    """A step as a compiled function.

    Nothing is updated by a step whose conditions do not hold or, with a guard, that is not finite;
    nor by those after it, until `revive`.

    Args:
        svi: whose step it is.
        record: the step, clean.
        function: the record, compiled (`pyro_vi.compiling.backends`).
        places: the storages of what differs from step to step.
        update: the optimizers' step; None if the record ends with the gradients.

    Attributes:
        by: what compiled it, in words.
    """

    def __init__(self, svi: SVI, record: Record, function: Any, places: _Places) -> None:
        self.svi, self.record, self.function, self._places = svi, record, function, places
        self.update = places.update
        self.by: str = function.by
        device = record.storages[places.status].device
        self.generators = [torch.default_generator]
        if device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[device.index or 0])
        own = {places.status, *places.per_step}
        self._changed = sorted(
            {ref.storage for op in record.ops for ref in op.writes()}
            & {i for i, s in enumerate(record.storages) if not s.is_inner}
        )
        self._changed = [i for i in self._changed if i not in own]
        self._numbers = function.view(places.numbers) if places.numbers is not None else None
        self._scheduled = [(function.view(i), t) for i, t in places.scheduled]
        self.status = function.view(places.status)

    def fill(self, step: int, batch: Sequence[Tensor]) -> None:
        """Gives a step its batch, and the weights that are scheduled."""
        if self._places.batch:  # else every step has the same
            for index, value in zip(self._places.batch, batch, strict=True):
                self.function.give(index, step, value)
        for view, tensor in self._scheduled:
            view[step] = tensor.item()

    def set_numbers(self, steps: int = 1) -> None:
        """Sets the optimizers' numbers of the next steps."""
        if self._numbers is not None and self.update is not None:
            for i, rows in enumerate(self.update.numbers(steps)):
                self._numbers[i] = rows[0] if len(rows) == 1 else [x for row in rows for x in row]

    def set_rates(self, step: int) -> None:
        """Sets the learning rates of a step to the present ones."""
        if self._numbers is not None and self.update is not None:
            self._numbers[step, ::3] = self.update.rates()

    def run(self, batch: Sequence[Tensor]) -> list[float]:
        """One step; its loss, reconstruction, KL, and whether it was finite and sound.

        What a step does besides the record is left to `finish`.
        """
        self.set_numbers()
        self.fill(0, batch)
        self.function.step(0)
        self.function.finish(1)
        row: list[float] = self.status[0].tolist()
        return row

    def finish(self, steps: int = 1) -> None:
        """After steps that updated: counts them; lets an optimizer step that is not recorded."""
        if self.update is not None:
            self.update.advance(steps)
        if self.update is not None or not steps:
            return
        for parameter, gradient in self._places.gradients:
            parameter.grad = gradient.clone()
        self.svi._update(self._places.parameters)

    def suspend(self) -> None:
        """Lets steps update nothing until `revive`."""
        self._places.alive.fill_(False)

    def revive(self) -> None:
        """Lets steps update again after one that did not."""
        self._places.alive.fill_(True)

    def states(self) -> list[Tensor]:
        """Where the random generators are."""
        return [generator.get_state() for generator in self.generators]

    def rewind(self, states: Sequence[Tensor]) -> None:
        """Takes the generators back."""
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    def restorer(self) -> Callable[[], None]:
        """Takes everything that a step changes back to where it is now."""
        states = self.states()
        tensors = [t for i in self._changed if (t := self.record.storages[i].tensor) is not None]
        before = [tensor.clone() for tensor in tensors]
        schedule = self.svi._schedule_state()
        count = self.update.counts() if self.update is not None else None

        def restore() -> None:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            self.rewind(states)
            self.svi._load_schedule(schedule)
            if self.update is not None and count is not None:
                self.update.set_counts(count)

        return restore

    def predict(self, batch: Sequence[Tensor]) -> Proof:
        """What the compiled function makes of a step that is about to be taken; changes nothing."""
        restore = self.restorer()
        tensors = [t for i in self._changed if (t := self.record.storages[i].tensor) is not None]
        before = [one.clone() for one in tensors]
        try:
            row = self.run(batch)
            after, drawn = [one.clone() for one in tensors], self.states()
        finally:
            restore()
        gradients = [gradient.clone() for _, gradient in self._places.gradients]
        compared = [i not in self._places.own for i in self._changed]
        return Proof(self, row, tensors, before, after, drawn, gradients, compared)


@dataclass
class _Places:
    """Where the parts of a recorded step lie."""

    parameters: list[Tensor]
    update: Update | None
    alive: Tensor
    status: int
    batch: list[int]
    numbers: int | None
    scheduled: list[tuple[int, Tensor]]
    gradients: list[tuple[Tensor, Tensor]]
    own: set[int]  # outer storages that an eager step does not change

    @property
    def per_step(self) -> list[int]:
        """The storages that have other values in every step."""
        numbers = [] if self.numbers is None else [self.numbers]
        return [self.status, *self.batch, *numbers, *(index for index, _ in self.scheduled)]


class Proof:
    """A step as its compiled form predicts it, to be compared with the eager one."""

    def __init__(
        self,
        compiled: Compiled,
        row: list[float],
        tensors: Sequence[Tensor],
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        drawn: Sequence[Tensor],
        gradients: Sequence[Tensor],
        compared: Sequence[bool],
    ) -> None:
        self._compiled, self._row, self._drawn = compiled, row, drawn
        self._changes = [
            change
            for change, wanted in zip(
                zip(tensors, before, after, strict=True), compared, strict=True
            )
            if wanted
        ]
        self._gradients = gradients
        self.is_sound = bool(row[4])
        self._differs = ""

    def compare(self, loss: Any, parameters: Sequence[Tensor]) -> None:
        """Looks at an evaluated step: its loss, and its gradients if the record ends with them."""
        places = self._compiled._places
        if list(map(id, parameters)) != list(map(id, places.parameters)):
            self._differs = "parameters"
        elif self.is_sound:
            found, loss = self._row[0], float(loss)
            dtype = places.parameters[0].dtype
            rounding = 1000 * torch.finfo(dtype).eps
            rounding *= sum(abs(one) for one in self._row[:3] if math.isfinite(one))
            if not (found == loss or abs(found - loss) <= rounding or loss != loss):
                self._differs = f"loss, {loss:g} and {found:g},"
        for (parameter, _), found_one in zip(places.gradients, self._gradients, strict=True):
            if parameter.grad is None or not _alike(found_one, parameter.grad, None):
                self._differs = self._differs or "gradient"

    def differs(self) -> str | None:
        """After the step: in what it is another one than was predicted; None if in nothing."""
        if not self.is_sound:
            return "mask, scale, constraint or support, or a NaN for a loss,"
        for tensor, before, after in self._changes:
            if self._row[3] and not _alike(after, tensor, before):
                self._differs = self._differs or "update"
        if not all(map(torch.equal, self._compiled.states(), self._drawn)):
            self._differs = self._differs or "number of draws"
        return self._differs or None


def _alike(found: Tensor, expected: Tensor, before: Tensor | None) -> bool:
    """Whether two tensors, or their changes, are equal but for rounding."""
    if not expected.dtype.is_floating_point:
        return torch.equal(found, expected)
    eps = torch.finfo(expected.dtype).eps
    found, expected = found.detach().double(), expected.detach().double()
    change = expected if before is None else expected - before.double()
    bound = 10 * eps**0.5 * change.norm() + 100 * eps * expected.norm()
    return bool((found - expected).norm() <= bound) or bool(expected.isnan().any())


@dataclass
class _Kind:
    """A kind of batch: its eager steps and uses so far, and its record."""

    seen: int = 0
    uses: int = 0
    compiled: Compiled | None = None
    guards: Guards | None = None
    is_proven: bool = False
    refused: str | None = None


class Compiler:
    """The compiled steps of an SVI, one record for each kind of batch.

    Args:
        svi: whose steps they are.
        after: eager steps before the first is recorded.
        is_owner: whether nobody but `svi` runs between two steps, as in `fit`. Then the tensors
            that the programs hold are fixed, and nothing is looked at between steps.
        is_guarded: whether nothing is updated by a step whose loss or gradients are not finite.
        is_slow: whether a record may be compiled that takes seconds to compile.
        steps: the most steps of a call.
        announce: called before seconds of compilation.
    """

    def __init__(
        self,
        svi: SVI,
        *,
        after: int,
        is_owner: bool = False,
        is_guarded: bool = False,
        is_slow: bool = True,
        steps: int = 1,
        announce: Callable[[], object] | None = None,
    ) -> None:
        self.svi, self.after, self.steps = svi, after, steps
        self._is_owner, self._is_guarded, self._is_slow = is_owner, is_guarded, is_slow
        self._announce = announce
        self._kinds: dict[Any, _Kind] = {}
        self._log: list[str] = []
        self._held: dict[str, Any] = {}
        self._unsound = 0
        self._is_crowded = False

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or on disk: nothing is recorded yet."""
        return {**vars(self), "_kinds": {}, "_announce": None}

    def states(self) -> list[Tensor]:
        """Where the random generators of the compiled steps are."""
        for kind in self._kinds.values():
            if kind.compiled is not None:
                return kind.compiled.states()
        return []

    def explain(self) -> str:
        """What was compiled and what was not, and why, a line each."""
        return "\n".join(self._log) or "no step was recorded yet: the first ones are eager"

    def note(self, text: str) -> None:
        """Adds a line to what `explain` says."""
        self._log.append(text)

    def forget(self) -> None:
        """Drops every record, so that steps are recorded anew."""
        self._kinds = {}
        self.note("the records were dropped on request")

    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Compiled, list[Tensor]] | None:
        """The compiled step for a batch, and the batch's tensors; None if it is to be eager."""
        key, batch = batch_key(args, kwargs)
        kind = self._kinds.get(key)
        if kind is None or not kind.is_proven or kind.compiled is None:
            return None
        if kind.guards is not None and (changed := kind.guards.changed()) is not None:
            self.drop(f"{changed} changed")
            return None
        kind.uses += 1
        if kind.uses > 1 and kind.uses.bit_count() == 1:
            self._audit(kind, kind.compiled, args, kwargs, batch)
        return None if kind.refused else (kind.compiled, batch)

    def was_unsound(self) -> None:
        """Counts a compiled step whose conditions did not hold."""
        self._unsound += 1
        if self._unsound == _UNSOUND:
            self._unsound = 0
            self.drop(
                "losses are NaN, parameters and values are outside of their constraints and"
                " supports, or masks and scales that were alike in model and guide are not always"
            )

    def drop(self, why: str) -> None:
        """Drops all records, with a warning."""
        self._kinds = {key: kind for key, kind in self._kinds.items() if kind.refused}
        self.after = min(10 * self.after, 5_000)  # it may well happen again
        message = f"the compiled step is dropped, and the next {self.after} steps are eager: {why}"
        self.note(message)
        warnings.warn(message, stacklevel=5)

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes a step that is not compiled, by the SVI's own methods; returns its loss.

        It is recorded, or compared with its compiled form, if it is time.
        """
        key, batch = batch_key(args, kwargs)
        kind = self._kind(key)
        if kind is None:
            loss, parameters = self.svi._evaluated(args, kwargs)
            self.svi._update(parameters)
            return loss
        kind.seen += 1
        if isinstance(key, Strange):
            self._refuse(kind, str(key))
        if kind.compiled is not None and not kind.is_proven:
            return self._prove(kind, args, kwargs, batch)
        if kind.refused is None and kind.compiled is None and kind.seen > self._due():
            return self._recorded(kind, args, kwargs)
        loss, parameters = self.svi._evaluated(args, kwargs)
        self.svi._update(parameters)
        if self._is_owner and kind.refused is None:
            self._compare_leftovers(kind)
        return loss

    def _compare_leftovers(self, kind: _Kind) -> None:
        """Refuses a record if a step leaves something behind."""
        if kind.seen == self.after - 1:
            self._held = held_values(self.svi.model, self.svi.guide)
        elif kind.seen == self.after and self._held:
            path = difference(self._held, held_values(self.svi.model, self.svi.guide))
            if path is not None:
                self._refuse(
                    kind,
                    f"a step changes {path}, and a compiled one would not: what is counted or kept"
                    " in Python has to be a tensor, changed in place",
                )
            self._held = {}

    def _kind(self, key: Any) -> _Kind | None:
        if key is not None and key not in self._kinds:
            if len(self._kinds) >= _KINDS:
                kept = [(k, v) for k, v in self._kinds.items() if v.refused or v.compiled]
                self._kinds = dict(kept)
                if not self._is_crowded:
                    self._is_crowded = True
                    warnings.warn(
                        f"most steps stay eager: {_KINDS} kinds of batches so far, by shapes, by"
                        " numbers among the arguments, or by handlers around a step (a number that"
                        " changes from step to step should be a tensor)",
                        stacklevel=5,
                    )
            if len(self._kinds) < _KINDS:
                self._kinds[key] = _Kind()
        return self._kinds.get(key)

    def _due(self) -> float:
        """How many eager steps of a kind come before its record."""
        others = sum(one.compiled is not None for one in self._kinds.values())
        if others >= _MOST:
            return math.inf
        return max(self.after, _OTHER) if others else self.after

    def _refuse(self, kind: _Kind, why: str) -> None:
        if kind.refused is None:
            kind.refused, kind.compiled, kind.is_proven = why, None, False
            self.note(f"steps stay eager: {why}")
            if self._is_slow:  # else nobody waits for compiled steps
                warnings.warn(f"steps stay eager: {why}", stacklevel=6)

    def _prove(
        self, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any], batch: list[Tensor]
    ) -> Any:
        """Takes the step after the recorded one both ways."""
        assert kind.compiled is not None
        if kind.guards is not None and (changed := kind.guards.changed()) is not None:
            self.drop(f"{changed} changed")
            return self.take(args, kwargs)
        loss, differs = self._both_ways(kind.compiled, args, kwargs, batch)
        if differs:
            self._refuse(kind, f"the step after the recorded one {differs}")
        elif kind.refused is None:
            kind.is_proven = True
            self.note(f"steps are compiled after {kind.seen} eager ones, by {kind.compiled.by}")
        return loss

    def _audit(
        self,
        kind: _Kind,
        compiled: Compiled,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch: list[Tensor],
    ) -> None:
        """Takes a step both ways, and takes it back: so audits change no run."""
        self._unsound = 0
        if compiled.update is None:  # what its optimizer keeps cannot be taken back
            return
        restore = compiled.restorer()
        try:
            _, differs = self._both_ways(compiled, args, kwargs, batch)
        except (FloatingPointError, ValueError, RuntimeError):  # the step itself says it again
            differs = ""
        finally:
            restore()
        if differs:
            self._refuse(
                kind,
                f"after {kind.uses - 1} uses of the compiled step, one {differs}, and those before"
                " may be wrong too",
            )

    def _both_ways(
        self,
        compiled: Compiled,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch: list[Tensor],
    ) -> tuple[Any, str]:
        """An eager step; its loss, and in what the compiled one is another, in words."""
        proof, failed = None, ""
        try:
            proof = compiled.predict(batch)
        except Exception as error:  # the eager step says more, if it fails too
            failed = f"ended with {type(error).__name__}: {error}"
        loss, parameters = self.svi._evaluated(args, kwargs)
        if proof is not None:
            proof.compare(loss, parameters)
        self.svi._update(parameters)
        if proof is None or (differs := proof.differs()) is None:
            return loss, failed
        return loss, (
            f"has another {differs} than its compiled form: the programs read something that"
            " changes unseen"
        )

    def _recorded(self, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes a step while it is recorded."""
        svi = self.svi
        python, numpys = random.getstate(), np.random.get_state()[1:3]
        step = _Recording(svi, args, kwargs, self._is_owner, self._is_guarded)
        loss = step.take()
        try:
            same = random.getstate() == python and all(
                map(np.array_equal, numpys, np.random.get_state()[1:3])
            )
            if not same:
                raise Unrecordable(
                    "random numbers of Python or NumPy, which a record would repeat: draw torch's"
                )
            record, places = step.finish()
            function, why = compile_step(
                record, places.per_step, self.steps if places.update is not None else 1,
                is_slow=self._is_slow, announce=self._announce,
            )  # fmt: skip
            if function is None:
                self._refuse(kind, why)
                return loss
            kind.compiled = Compiled(svi, record, function, places)
            if not self._is_owner:
                held = [
                    s.tensor
                    for i, s in enumerate(record.storages)
                    if s.tensor is not None and i not in places.own and i not in places.per_step
                ]
                tensors = [*places.parameters, *(one for one in held if one is not None)]
                kind.guards = Guards(svi, step.modules, tensors, places.update)
        except Unrecordable as error:
            self._refuse(kind, str(error))
        return loss


class _Recording:
    """A step that is taken and recorded at once."""

    def __init__(
        self,
        svi: SVI,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_owner: bool,
        is_guarded: bool,
    ) -> None:
        self._svi, self._is_guarded = svi, is_guarded
        leaves, spec = tree.tree_flatten((args, kwargs))
        self.modules = modules_of(svi.model, svi.guide, *leaves)
        self._batch: list[Tensor] = []
        if not (is_owner and svi._has_fixed_batch):
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    leaves[i] = leaf.detach().clone()
                    self._batch.append(leaves[i])
        self._args, self._kwargs = tree.tree_unflatten(leaves, spec)
        self._parameters = list(svi._parameters)
        self._had = [p.grad is not None for p in self._parameters]
        for p in self._parameters:
            p.grad = None
        self._update = update_of(svi.optim, self._parameters)
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._device = device
        inputs = [*self._parameters, *svi._varying, *self._batch]
        inputs += [b for m in self.modules for b in m.buffers(recurse=False)]
        self._numbers: Tensor | None = None
        if self._update is not None:
            numbers = torch.tensor(self._update.numbers()[0], dtype=torch.float64)
            self._numbers = numbers.reshape(-1, 3).to(device)
            inputs += [*self._update.state, self._numbers]
        self._tape = Tape(inputs, fixed=HELD if is_owner else CONSTANT)
        self._parts: list[Tensor | Ref] = []
        if not self._parameters:
            self._tape.refuse("the programs have no parameters")
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._parameters):
            self._tape.refuse("hooks on parameters, which a record would not call")
        if any(p.is_complex() for p in self._parameters):
            self._tape.refuse("parameters that are complex")

    def take(self) -> Any:
        """Takes the step."""
        svi, tape = self._svi, self._tape
        with tape.recording():
            loss, parameters = svi._evaluate(*self._args, **self._kwargs)
            with tape.paused():
                value = float(loss)
                svi._check(value, parameters)
            if list(map(id, parameters)) != list(map(id, self._parameters)):
                tape.refuse("the parameters of two steps are not the same")
            with torch.no_grad():
                loss = torch.as_tensor(loss).detach()
                for p, had in zip(self._parameters, self._had, strict=True):
                    if p.grad is None and had:
                        p.grad = torch.zeros_like(p)
                gradients = [p.grad for p in parameters if p.grad is not None]
                if svi._scale != 1.0:
                    for p in parameters:
                        p.grad = p.grad * svi._scale if p.grad is not None else None
                    gradients = [p.grad for p in parameters if p.grad is not None]
                finite = loss.isfinite()
                if self._is_guarded:
                    norms = [torch.linalg.vector_norm(one) for one in gradients]
                    for norm in norms:
                        finite = finite & norm.isfinite()
                terms = svi.told.terms(loss) if svi.told is not None else (loss, loss)
                clip = getattr(svi.optim, "clip_norm", None)
                self._gradients = [p for p in parameters if p.grad is not None]
                self._parts = [loss, *terms, finite]
                if self._update is None:
                    self._parts += gradients
                else:
                    if clip is not None:
                        torch.nn.utils.clip_grad_norm_(parameters, clip)
                    assert self._numbers is not None
                    self._update.apply(self._numbers)
                    svi._after_update()
        if self._update is None:
            svi._update(parameters)
        else:
            self._update.advance(1)
            svi._advance_schedule()
            zero_grads(parameters)
        return value

    def finish(self) -> tuple[Record, _Places]:
        """The record of the step, as one that changes nothing unless its conditions hold.

        Raises:
            Unrecordable: the step did what a record cannot repeat.
        """
        svi, tape = self._svi, self._tape
        device = self._device
        record = tape.finish(self._parts)
        alive = torch.ones(1, dtype=torch.bool, device=device)
        own: set[int] = set()

        def outer(tensor: Tensor) -> int:
            record.storages.append(Storage(tensor.numel(), tensor.dtype, device, tensor))
            own.add(len(record.storages) - 1)
            return len(record.storages) - 1

        alive_at = Ref(outer(alive), 0, (), (), torch.bool)
        sound = conditions_hold(record)
        if Distribution._validate_args and not self._is_guarded:
            is_nan = record.emit(_aten.isnan.default, record.outputs[0])
            is_number = record.emit(_aten.logical_not.default, is_nan)
            sound = (
                is_number
                if sound is None
                else record.emit(_aten.logical_and.default, sound, is_number)
            )
        keep = alive_at
        for one in (sound, record.outputs[3] if self._is_guarded else None):
            if one is not None:
                keep = record.emit(_aten.logical_and.default, keep, one)
        copies: dict[int, int] = {}
        for tensor, copy in svi._copies():
            index = tape.index(tensor)
            if index is not None:
                copies[index] = outer(copy.view(-1))
        if any(tape.index(one) in _written(record) for one in self._batch):
            raise Unrecordable("a step changes its argument in place")
        if sound is not None or self._is_guarded:
            commit(record, keep, copies)
        status = torch.zeros(5, dtype=torch.float64, device=device)
        status_at = outer(status)
        parts = [*record.outputs[:4], *([sound] if sound is not None else [])]
        for i, part in enumerate(parts):
            record.write(Ref(status_at, i, (), (), torch.float64), part)
        if sound is None:
            one = Ref(status_at, 4, (), (), torch.float64)
            record.ops.append(Op(_aten.fill_.Scalar, (one, 1.0), {}, (one,)))
        record.write(alive_at, keep)
        gradients = []
        for p, ref in zip(self._gradients, record.outputs[4:], strict=False):
            held = torch.zeros_like(p).detach().contiguous()
            gradients.append((p, held))
            place = Ref(outer(held.view(-1)), 0, tuple(held.shape), held.stride(), held.dtype)
            record.write(place, ref)
        record.outputs = []
        index = tape.index
        places = _Places(
            parameters=self._parameters,
            update=self._update,
            alive=alive,
            status=status_at,
            batch=[i for i in map(index, self._batch) if i is not None],
            numbers=index(self._numbers) if self._numbers is not None else None,
            scheduled=[(i, t) for t in svi._scheduled() if (i := index(t)) is not None],
            gradients=gradients,
            own=own,
        )
        return clean(record), places


def _written(record: Record) -> set[int]:
    return {ref.storage for op in record.ops for ref in op.writes()}
