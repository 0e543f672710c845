"""Which steps of an SVI are compiled.

Two eager steps come first, so that all that is lazy has been made. The next is recorded while it is
taken, and compiled. The one after it is taken both ways, from one state and with the same random
numbers. If losses, parameters and all else that a step changes are alike, compiled steps are used
from then on. An audit takes a step both ways again, after 1, 2, 4, 8... uses, and takes it back.
"""

from __future__ import annotations

__all__ = ["Compiler"]

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro.infer.util import zero_grads
from torch import Tensor

from pyro_vi.compiling.backends import compile_step
from pyro_vi.compiling.compiled import Compiled
from pyro_vi.compiling.guards import Guards, RefusedBatch, batch_key
from pyro_vi.compiling.leftovers import difference, held_values
from pyro_vi.compiling.recording import Recording
from pyro_vi.compiling.stepper import Stepper
from pyro_vi.compiling.tape import Unrecordable

_EAGER_STEPS = 2  # eager steps of a kind of batch before its record
_EAGER_STEPS_OF_OTHERS = 100  # the same, once there is a record of another kind
_MOST_RECORDS = 4  # of an SVI
_MOST_KINDS = 100  # kinds of batches that are counted
_MOST_UNSOUND = 3  # steps whose conditions did not hold, after which the records are dropped,
_SHARE = 10  # if they are more than one in so many
_MOST_EAGER_STEPS = 5_000  # eager steps before a record, at most, after records were dropped


@dataclass
class _Kind:
    """A kind of batch: its eager steps and its uses so far, and its record."""

    seen: int = 0
    uses: int = 0
    compiled: Compiled | None = None
    guards: Guards | None = None
    is_proven: bool = False
    refused: str = ""


class Compiler:
    """The compiled steps of an SVI, one record for each kind of batch.

    Args:
        svi: whose steps they are.
        is_owner: whether nobody but `svi` runs between two steps; see `Recording`.
        waits: whether a compiler may be used that takes seconds to minutes. If not, nobody is
            warned of steps that stay eager.
        steps: the most steps of a call.
        announce: called before seconds of compilation.
    """

    def __init__(
        self,
        svi: Stepper,
        *,
        is_owner: bool = False,
        waits: bool = True,
        steps: int = 1,
        announce: Callable[[], object] | None = None,
    ) -> None:
        self.svi, self._steps = svi, steps
        self._is_owner, self._waits, self._announce = is_owner, waits, announce
        self._first = _EAGER_STEPS
        self._kinds: dict[Any, _Kind] = {}
        self._notes: list[str] = []
        self._held: dict[str, Any] = {}
        self._unsound = 0

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or on disk: nothing is recorded yet."""
        return {**vars(self), "_kinds": {}, "_announce": None}

    def explain(self) -> str:
        """What was compiled and what was not, and why, a line each."""
        return "\n".join(self._notes) or "no step was compiled yet: the first ones are eager"

    def forget(self) -> None:
        """Drops every record, so that steps are recorded anew."""
        self._kinds = {}
        self._notes.append("the compiled steps were dropped on request")

    def states(self) -> list[Tensor]:
        """Where the random generators of the compiled steps are."""
        every = [kind.compiled for kind in self._kinds.values() if kind.compiled is not None]
        return every[0].states() if every else []

    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Compiled, list[Tensor]] | None:
        """The compiled step for a batch, and the batch's tensors; None if it is to be eager."""
        key, batch = batch_key(args, kwargs)
        kind = self._kinds.get(key)
        if kind is None or not kind.is_proven or kind.compiled is None or not self._holds(kind):
            return None
        kind.uses += 1
        if kind.uses > 1 and kind.uses.bit_count() == 1:
            self._audit(kind, kind.compiled, args, kwargs, batch)
        return None if kind.refused else (kind.compiled, batch)

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes a step that is not compiled; its loss. If it is time, the step is recorded."""
        key, batch = batch_key(args, kwargs)
        kind = self._kind(key)
        if kind is None:
            return self._eager(args, kwargs)
        kind.seen += 1
        if isinstance(key, RefusedBatch):
            self._refuse(kind, str(key))
        if kind.refused or kind.is_proven or kind.seen <= self._due(kind):
            loss = self._eager(args, kwargs)
            self._compare_leftovers(kind)
            return loss
        if kind.compiled is None:
            return self._record(kind, args, kwargs)
        if not self._holds(kind):
            return self.take(args, kwargs)
        loss, differs = self._both_ways(kind.compiled, args, kwargs, batch)
        if differs:
            self._refuse(kind, f"the step after the recorded one {differs}")
        else:
            kind.is_proven = True
            by = kind.compiled.function.by
            self._notes.append(f"steps are compiled by {by} after {kind.seen} eager ones")
        return loss

    def was_unsound(self) -> None:
        """Counts a compiled step whose conditions did not hold."""
        self._unsound += 1
        uses = sum(kind.uses for kind in self._kinds.values())
        if self._unsound >= _MOST_UNSOUND and _SHARE * self._unsound > uses:
            self._drop(
                "losses are NaN, parameters and values are outside of their constraints and"
                " supports, or masks and scales that were alike in model and guide are not always"
            )

    def _eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loss, parameters = self.svi._evaluated(args, kwargs)
        self.svi._update(parameters)
        return loss

    def _kind(self, key: Any) -> _Kind | None:
        """The kind of a batch; None for one that is not counted."""
        if key is None or (key not in self._kinds and len(self._kinds) > _MOST_KINDS):
            return None
        if len(self._kinds) == _MOST_KINDS and key not in self._kinds:
            self._warn(
                f"most steps stay eager: {_MOST_KINDS} kinds of batches so far, by shapes, by"
                " numbers among the arguments, or by handlers around a step (a number that changes"
                " from step to step should be a tensor)"
            )
        return self._kinds.setdefault(key, _Kind())

    def _due(self, kind: _Kind) -> float:
        """How many eager steps of a kind come before its record."""
        others = [one for one in self._kinds.values() if one.compiled and one is not kind]
        if kind.compiled is None and len(others) >= _MOST_RECORDS:
            return float("inf")
        return (
            max(self._first, _EAGER_STEPS_OF_OTHERS)
            if others and kind.compiled is None
            else self._first
        )

    def _holds(self, kind: _Kind) -> bool:
        """Whether a record still stands for its programs; else all are dropped."""
        changed = kind.guards.changed() if kind.guards is not None else None
        if changed is not None:
            self._drop(f"{changed} changed")
        return changed is None

    def _drop(self, why: str) -> None:
        self._kinds = {key: kind for key, kind in self._kinds.items() if kind.refused}
        self._first, self._unsound = (
            min(10 * self._first, _MOST_EAGER_STEPS),
            0,
        )  # it may well happen again
        self._warn(
            f"the compiled step is dropped, and the next {self._first} steps are eager: {why}"
        )

    def _refuse(self, kind: _Kind, why: str) -> None:
        """Lets the steps of a kind of batch stay eager."""
        if not kind.refused:
            kind.refused, kind.compiled = why, None
            self._warn(f"steps stay eager: {why}")

    def _warn(self, message: str) -> None:
        self._notes.append(message)
        if self._waits:
            warnings.warn(message, stacklevel=6)

    def _compare_leftovers(self, kind: _Kind) -> None:
        """In `fit`, refuses a record if an eager step leaves something behind."""
        if not self._is_owner or kind.refused:
            return
        if kind.seen == self._first - 1:
            self._held = held_values(self.svi.model, self.svi.guide)
        elif kind.seen == self._first:
            path = difference(self._held, held_values(self.svi.model, self.svi.guide))
            if path is not None:
                self._refuse(
                    kind,
                    f"a step changes {path}, and a compiled one would not: what is counted or kept"
                    " in Python has to be a tensor, changed in place",
                )

    def _record(self, kind: _Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Takes a step while it is recorded, and compiles it."""
        recording = Recording(self.svi, args, kwargs, is_owner=self._is_owner)
        loss = recording.take()
        try:
            step = recording.finish()
            steps = self._steps if step.update is not None else 1
            function = compile_step(
                step.record, step.per_step, steps, waits=self._waits, announce=self._announce
            )
            kind.compiled = Compiled(self.svi, step, function)
        except Unrecordable as error:
            self._refuse(kind, str(error))
            return loss
        if not self._is_owner:
            kind.guards = Guards(self.svi, recording.modules, step)
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
        restore, differs = compiled.restorer(), ""
        try:
            _, differs = self._both_ways(compiled, args, kwargs, batch, is_audit=True)
        except (ArithmeticError, ValueError, RuntimeError):  # the step itself says it again
            pass
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
        *,
        is_audit: bool = False,
    ) -> tuple[Any, str]:
        """Takes a step eagerly; its loss, and how the compiled step differs from it, in words."""
        try:
            prediction = compiled.predict(batch)
        except Exception as error:  # the eager step says more, if it fails too
            return self._eager(args, kwargs), f"ended with {type(error).__name__}: {error}"
        loss, parameters = self.svi._evaluated(args, kwargs)
        prediction.compare(loss, parameters)
        if is_audit and compiled.update is None:  # what its optimizer keeps cannot be taken back
            zero_grads(parameters)
        else:
            self.svi._update(parameters)
        differs = prediction.differs()
        if differs is None or (is_audit and not prediction.is_sound):
            return loss, ""
        return loss, (
            f"has another {differs} than its compiled form: the programs read something that"
            " changes unseen"
        )
