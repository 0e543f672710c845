"""A compiled step: takes steps, and predicts a step that is about to be taken eagerly."""

from __future__ import annotations

__all__ = ["Compiled", "Prediction"]

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi.compiling.recording import StepRecord
from pyro_vi.compiling.stepper import Stepper


class Compiled:
    """A recorded step as a compiled function.

    To take steps, call `fill` and `function.step` for each, then `function.finish`, read `status`,
    and call `finish` with the number of those that stand. `run` takes one.

    Args:
        svi: whose step it is.
        step: the record.
        function: the record, compiled: a `Function` or a `Graph`.

    Attributes:
        status: the numbers of each step, (steps, 5); see `StepRecord.status`.
        update: the optimizers' step; None if the record ends with the gradients.
    """

    def __init__(self, svi: Stepper, step: StepRecord, function: Any) -> None:
        self._svi, self._step, self.function = svi, step, function
        self.update = step.update
        self.status = function.view(step.status)
        self._numbers = None if step.numbers is None else function.view(step.numbers)
        device = step.parameters[0].device
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        record = step.record
        written = {ref.storage for op in record.ops for ref in op.writes()}
        changed = sorted(written - set(step.per_step))
        outer = [(i, t) for i in changed if (t := record.storages[i].tensor) is not None]
        self._changed = [tensor for _, tensor in outer]
        self._is_shared = [i not in step.private for i, _ in outer]  # with eager steps

    def set_numbers(self, steps: int = 1) -> None:
        """Sets the optimizers' numbers of the next steps."""
        if self._numbers is not None and self.update is not None:
            self.update.write_numbers(self._numbers, steps)

    def fill(self, step: int, batch: Sequence[Tensor]) -> None:
        """Gives a step its batch, and the numbers that are set before it."""
        if self._step.batch:  # else every step has the same
            for index, value in zip(self._step.batch, batch, strict=True):
                self.function.give(index, step, value)
        for index, tensor in self._step.scheduled:
            self.function.give(index, step, tensor)

    def set_rates(self, step: int) -> None:
        """Sets the learning rates of a step to the present ones."""
        if self._numbers is not None and self.update is not None:
            self._numbers[step, ::3] = self.update.rates()

    def run(self, batch: Sequence[Tensor]) -> list[float]:
        """One step; its row of `status`."""
        self.set_numbers()
        self.fill(0, batch)
        self.function.step(0)
        self.function.finish(1)
        row: list[float] = self.status[0].tolist()
        return row

    def finish(self, steps: int = 1) -> None:
        """Does in Python what steps do besides the record."""
        if self.update is not None:
            self.update.advance(steps)
        elif steps:
            for parameter, gradient in self._step.gradients:
                parameter.grad = gradient.clone()
            self._svi._update(self._step.parameters)

    def advance_schedule(self) -> None:
        """Steps the learning rate's schedule, unless `finish` does so with the optimizer."""
        if self.update is not None:
            self._svi._advance_schedule()

    def states(self) -> list[Tensor]:
        """Where the random generators are."""
        return [generator.get_state() for generator in self._generators]

    def rewind(self, states: Sequence[Tensor]) -> None:
        """Takes the generators back."""
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)

    def restorer(self, states: Sequence[Tensor] = ()) -> Callable[[], None]:
        """Takes everything that a step changes back to what it is now.

        Args:
            states: of the random generators to go back to; by default the present ones.
        """
        states, schedule = states or self.states(), self._svi._schedule_state()
        before = [tensor.clone() for tensor in self._changed]
        counts = self.update.counts() if self.update is not None else []

        def restore() -> None:
            for tensor, value in zip(self._changed, before, strict=True):
                tensor.copy_(value)
            self.rewind(states)
            self._svi._load_schedule(schedule)
            if self.update is not None:
                self.update.set_counts(counts)

        return restore

    def predict(self, batch: Sequence[Tensor]) -> Prediction:
        """What a step that is about to be taken comes to; changes nothing."""
        before, restore = [tensor.clone() for tensor in self._changed], self.restorer()
        try:
            row = self.run(batch)
            after = [tensor.clone() for tensor in self._changed]
            drawn = self.states()
            gradients = [gradient.clone() for _, gradient in self._step.gradients]
        finally:
            restore()
        changes = [
            change
            for change, shared in zip(
                zip(self._changed, before, after, strict=True), self._is_shared, strict=True
            )
            if shared
        ]
        return Prediction(self, self._step, row, changes, drawn, gradients)


class Prediction:
    """A step as its compiled form predicts it, to be compared with the eager one.

    Args:
        row: of its status.
        changes: tensors that a step changes, before it and after it.
        drawn: where the generators are then.
        gradients: those that the record ends with.

    Attributes:
        is_sound: whether the conditions of the record hold.
    """

    def __init__(
        self,
        compiled: Compiled,
        step: StepRecord,
        row: list[float],
        changes: Sequence[tuple[Tensor, Tensor, Tensor]],
        drawn: Sequence[Tensor],
        gradients: Sequence[Tensor],
    ) -> None:
        self._compiled, self._step, self._row = compiled, step, row
        self._changes, self._drawn, self._gradients = changes, drawn, gradients
        self.is_sound = bool(row[4])
        self._differs: str | None = None
        self._noise: dict[int, Tensor] = {}  # by address: elements whose gradient is mere rounding

    def compare(self, loss: Any, parameters: Sequence[Tensor]) -> None:
        """Looks at the evaluated step: its loss, and its gradients if the record ends with them."""
        found, loss = self._row[0], float(loss)
        eps = self._step.eps
        norms = {p: float(p.grad.norm()) for p in parameters if p.grad is not None}
        least = 1000 * eps * max(norms.values(), default=0.0)
        if (update := self._step.update) is not None:
            for p, norm in norms.items():
                assert p.grad is not None
                sizes = p.grad.abs()
                noise = sizes <= (1000 * eps * sizes.max() if norm > least else torch.inf)
                self._noise |= {t.data_ptr(): noise for t in (p, *update.state_of(p))}
        rounding = 1000 * eps * sum(abs(one) for one in self._row[:3] if math.isfinite(one))
        if list(map(id, parameters)) != list(map(id, self._step.parameters)):
            self._differs = "parameters"
        elif not (found == loss or abs(found - loss) <= rounding or loss != loss):
            self._differs = f"loss, {loss:g} and {found:g},"
        for (parameter, _), gradient in zip(self._step.gradients, self._gradients, strict=True):
            if parameter.grad is None or not _is_alike(gradient, parameter.grad, self._step.eps):
                self._differs = self._differs or "gradient"
        if self._step.update is None:  # the record ends here
            self._compare_changes()

    def _compare_changes(self) -> None:
        for now, before, after in self._changes:
            noise = self._noise.get(now.data_ptr())
            if noise is not None and noise.shape == now.shape:
                after, before = (torch.where(noise, now, one) for one in (after, before))
            if self._row[3] and not _is_alike(after, now, self._step.eps, before):
                self._differs = self._differs or "update"

    def differs(self) -> str | None:
        """After the step: in what it is another one than was predicted; None if in nothing."""
        if not self.is_sound:
            return "mask, scale, constraint or support, or a NaN for a loss,"
        if self._step.update is not None:
            self._compare_changes()
        if not all(map(torch.equal, self._compiled.states(), self._drawn)):
            self._differs = self._differs or "number of draws"
        return self._differs


def _is_alike(found: Tensor, expected: Tensor, eps: float, before: Tensor | None = None) -> bool:
    """Whether two tensors, or their changes, are equal but for rounding."""
    if not expected.dtype.is_floating_point:
        return torch.equal(found, expected)
    found, expected = found.detach().double(), expected.detach().double()
    change = expected if before is None else expected - before.double()
    bound = 10 * eps**0.5 * change.norm() + 100 * eps * expected.norm()
    return bool((found - expected).norm() <= bound) or bool(expected.isnan().any())
