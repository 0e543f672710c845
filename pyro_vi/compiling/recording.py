"""Records one step of an SVI while it is taken.

The step is a real one: it evaluates the loss and the gradients, and updates the parameters by the
optimizers' formulas. Its record is a transaction: it updates nothing unless all conditions of the
recorded run hold and, in `fit`, the loss and the gradients are finite.
"""

from __future__ import annotations

__all__ = ["Recording", "StepRecord"]

import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pyro.infer.util import zero_grads
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as tree

from pyro_vi.compiling.clean import clean, commit, conditions_hold
from pyro_vi.compiling.stepper import Stepper
from pyro_vi.compiling.tape import CONSTANT, HELD, Op, Record, Ref, Storage, Tape, Unrecordable
from pyro_vi.compiling.update import Update, update_of
from pyro_vi.programs import modules_of

_aten = torch.ops.aten


@dataclass
class StepRecord:
    """A recorded step, and where its parts lie.

    Attributes:
        record: the operations, clean.
        parameters: those that have gradients.
        unused: parameters that have no gradient in the step.
        update: the optimizers' step; None if the record ends with the gradients.
        gradients: then, parameters and the tensors that their gradients are written to.
        status: the storage of five float64 numbers: the loss, reconstruction and KL as `Told.terms`
            has them, whether the step was finite, and whether its conditions held.
        batch: the storages of the batch's tensors; none if every step has the same batch.
        numbers: the storage of the optimizers' numbers, if they are recorded.
        scheduled: numbers that are set before each step: their storages and tensors.
        private: storages that eager steps do not change.
    """

    record: Record
    parameters: list[Tensor]
    update: Update | None
    unused: list[Tensor]
    gradients: list[tuple[Tensor, Tensor]]
    status: int
    batch: list[int]
    numbers: int | None
    scheduled: list[tuple[int, Tensor]]
    private: set[int]

    @property
    def per_step(self) -> list[int]:
        """The storages that have other values in every step."""
        numbers = [] if self.numbers is None else [self.numbers]
        return [self.status, *self.batch, *numbers, *(index for index, _ in self.scheduled)]

    @cached_property
    def eps(self) -> float:
        """The rounding of the coarsest floating dtype that the record computes in."""
        dtypes = {ref.dtype for op in self.record.ops for ref in op.outs}
        dtypes.add(self.parameters[0].dtype)
        return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)

    def held(self) -> list[Tensor]:
        """The tensors from outside that the record reads or changes."""
        own = {*self.private, *self.per_step}
        outer = enumerate(self.record.storages)
        return [s.origin for i, s in outer if s.origin is not None and i not in own]


class Recording:
    """A step that is taken and recorded at once.

    Args:
        svi: whose step it is; it has taken eager steps before.
        args, kwargs: the batch.
        is_owner: whether nobody but the SVI runs between two steps, as in `fit`. Then the tensors
            that the programs hold are fixed, and steps that are not finite update nothing.

    Attributes:
        modules: those that the programs reach.
    """

    def __init__(
        self, svi: Stepper, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_owner: bool
    ) -> None:
        self._svi, self._is_owner = svi, is_owner
        leaves, spec = tree.tree_flatten((args, kwargs))
        self.modules: list[nn.Module] = modules_of(svi.model, svi.guide, *leaves)
        self._batch: list[Tensor] = []
        if not (is_owner and svi._has_fixed_batch):
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):  # in memory of its own
                    leaves[i] = leaf.detach().clone(memory_format=torch.contiguous_format)
                    self._batch.append(leaves[i])
        self._args, self._kwargs = tree.tree_unflatten(leaves, spec)
        self._parameters = parameters = list(svi._parameters)
        self._had = [p.grad is not None for p in parameters]
        self._update = update_of(svi.optim, parameters)
        self._device = parameters[0].device if parameters else torch.device("cpu")
        self._numbers = torch.empty(0)
        inputs = [*parameters, *svi._varying, *self._batch]
        inputs += [buffer for module in self.modules for buffer in module.buffers(recurse=False)]
        if self._update is not None:
            (numbers,) = self._update.numbers()
            self._numbers = torch.from_numpy(numbers).to(self._device)
            inputs += [*self._update.state, self._numbers]
        self._tape = Tape(inputs, fixed=HELD if is_owner else CONSTANT)
        self._parts: list[Tensor] = []
        self._graded: list[Tensor] = []
        self._unused: list[Tensor] = []
        if not parameters:
            self._tape.refuse("the programs have no parameters")
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
            self._tape.refuse("hooks on parameters, which a record would not call")
        if any(p.is_complex() for p in parameters):
            self._tape.refuse("parameters that are complex")

    def take(self) -> Any:
        """Takes the step; its loss."""
        svi, tape, update = self._svi, self._tape, self._update
        python, arrays = random.getstate(), _numpys_state()
        for p in self._parameters:
            p.grad = None
        with tape.recording():
            loss, parameters = svi._evaluate(*self._args, **self._kwargs)
            if not isinstance(loss, Tensor):
                tape.refuse("a loss that is a number, not a tensor")
            with tape.paused():
                value = float(loss)
                svi._check(value, parameters)
            if list(map(id, parameters)) != list(map(id, self._parameters)):
                tape.refuse("the parameters of two steps are not the same")
            with torch.no_grad():
                self._prepare_gradients(parameters)
                self._parts = self._outcome(torch.as_tensor(loss).detach(), parameters)
                if update is not None:
                    if (clip := getattr(svi.optim, "clip_norm", None)) is not None:
                        torch.nn.utils.clip_grad_norm_(parameters, clip)
                    update.apply(self._numbers)
                    svi._after_update()
        if update is None:
            svi._update(parameters)
        else:
            update.advance(1)
            svi._advance_schedule()
            zero_grads(parameters)
        if random.getstate() != python or _numpys_state() != arrays:
            tape.refuse(
                "random numbers of Python or NumPy, which a record would repeat: draw torch's"
            )
        return value

    def _prepare_gradients(self, parameters: list[Tensor]) -> None:
        """Gives parameters the gradients that the optimizer gets."""
        for p, had in zip(self._parameters, self._had, strict=True):
            if p.grad is None and had:  # by momentum, zeros are a step too
                p.grad = torch.zeros_like(p)
        if self._svi._scale != 1.0:
            for p in parameters:
                p.grad = None if p.grad is None else p.grad * self._svi._scale

    def _outcome(self, loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        """What the record computes besides the update: four numbers, and gradients if need be."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._unused = [p for p in parameters if p.grad is None]
        finite = loss.isfinite()
        if self._is_owner:
            for gradient in gradients:
                finite = finite & torch.linalg.vector_norm(gradient).isfinite()
        elbo = self._svi.elbo_terms
        terms = elbo.terms(loss) if elbo is not None else (loss, loss)
        if self._update is not None:
            return [loss, *terms, finite]
        self._graded = [p for p in parameters if p.grad is not None]
        return [loss, *terms, finite, *gradients]

    def finish(self) -> StepRecord:
        """The record of the step, as a transaction.

        Raises:
            Unrecordable: the step did what a record cannot repeat.
        """
        tape, record = self._tape, self._tape.finish(self._parts)
        finite = record.outputs[3]
        private: set[int] = set()

        def outer(tensor: Tensor) -> Ref:
            flat = tensor.view(-1)
            record.storages.append(Storage(flat.numel(), flat.dtype, flat.device, flat))
            private.add(index := len(record.storages) - 1)
            return Ref(index, 0, tuple(tensor.shape), tensor.stride(), tensor.dtype)

        if any(tape.index(one) in _written(record) for one in self._batch):
            raise Unrecordable("a step changes its argument in place")
        sound = conditions_hold(record, fixed=HELD if self._is_owner else CONSTANT)
        if Distribution._validate_args and not self._is_owner:
            is_nan = record.emit(_aten.isnan.default, record.outputs[0])
            sound = _both(record, sound, record.emit(_aten.logical_not.default, is_nan))
        keep = _both(record, sound, finite if self._is_owner else None)
        if keep is not None:  # TorchInductor calls this operation; else it would compute `keep`
            keep = record.emit(_aten._is_all_true.default, keep)  # anew for each parameter
        pairs = [(tape.index(tensor), copy) for tensor, copy in self._svi._copies()]
        commit(record, keep, {i: outer(copy).storage for i, copy in pairs if i is not None})
        status = outer(torch.zeros(5, dtype=torch.float64, device=self._device))
        for row, part in enumerate([*record.outputs[:4], 1.0 if sound is None else sound]):
            place = Ref(status.storage, row, (), (), torch.float64)
            if isinstance(part, Ref):
                record.write(place, part)
            else:
                record.ops.append(Op(_aten.fill_.Scalar, (place, part), {}, (place,)))
        gradients = [
            (p, torch.zeros_like(p, memory_format=torch.contiguous_format).detach())
            for p in self._graded
        ]
        for (_, gradient), ref in zip(gradients, record.outputs[4:], strict=True):
            record.write(outer(gradient), ref)
        record.outputs = [] if keep is None else [keep]
        return StepRecord(
            record=clean(record),
            parameters=self._parameters,
            update=self._update,
            unused=self._unused,
            gradients=gradients,
            status=status.storage,
            batch=[i for i in map(tape.index, self._batch) if i is not None],
            numbers=None if self._update is None else tape.index(self._numbers),
            scheduled=[
                (at, t) for t in self._svi._scheduled() if (at := tape.index(t)) is not None
            ],
            private=private,
        )


def _numpys_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state(legacy=False)
    return state["has_gauss"], state["state"]["pos"], state["state"]["key"].tobytes()


def _both(record: Record, one: Ref | None, other: Ref | None) -> Ref | None:
    """Adds the conjunction of two truth values; None holds."""
    if one is None or other is None:
        return one or other
    return record.emit(_aten.logical_and.default, one, other)


def _written(record: Record) -> set[int]:
    return {ref.storage for op in record.ops for ref in op.writes()}
