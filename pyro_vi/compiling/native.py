"""Records as C functions, called on tensors."""

from __future__ import annotations

__all__ = ["Function"]

import ctypes
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pyro_vi.compiling.build import CALL, build
from pyro_vi.compiling.clean import merge_draws
from pyro_vi.compiling.emit import Unemittable
from pyro_vi.compiling.operations import emit
from pyro_vi.compiling.tape import UNSET, Op, Record, Ref, refs_in

_aten = torch.ops.aten


class Function:
    """A record as a C function that repeats it.

    Before each repetition call `step`, after the values that differ in it were given with `give`;
    and `finish` after the last one.

    Args:
        record: a clean record.
        steps: the most repetitions of a call.
        per_step: storages that have other values in each repetition.
        largest: the most multiplications and additions of a repetition.
        stops: whether the outputs of the record are truth values, and a repetition in which one of
            them is false is the last one of its call.

    Attributes:
        by: what compiled it, in words.
        cost: about how many multiplications and additions a repetition takes.
        draws_ahead: whether `step` draws random numbers, and runs nothing.
        can_draw_all: whether `draw_all` may take the place of `step` for all repetitions.

    Raises:
        Unemittable: the record has memory of a kind that C code does not handle.
        CannotCompile: the compiler failed.
    """

    by = "the C compiler"

    def __init__(
        self,
        record: Record,
        *,
        steps: int = 1,
        per_step: Sequence[int] = (),
        largest: float = math.inf,
        stops: bool = False,
    ) -> None:
        self.record = record = merge_draws(record)
        self.steps = steps
        draws = [op for op in record.ops if op.is_random]
        self.draws_ahead = _are_independent(record)
        if not self.draws_ahead:
            draws = []
        drawn = [op.outs[0].storage for op in draws]
        emitter = emit(record, [*per_step, *drawn])
        for ref in record.outputs if stops else ():
            emitter.code([f"if (!{emitter.at(ref)}) return 1;"], [ref], [])
        self._source = emitter.source()
        self.cost = self._source.cost
        if self.cost > largest:
            raise Unemittable(f"a step of about {self.cost:,} multiplications and additions")
        self._run = build(self._source.text)
        self._rows: dict[int, Tensor] = {}
        for index in (*per_step, *drawn):  # rows of a draw do not touch: see `draw_all`
            size, dtype = record.storages[index].size, record.storages[index].dtype
            self._rows[index] = torch.zeros(steps, size + (index in drawn), dtype=dtype)[:, :size]
        self._given: dict[int, Tensor] = {}
        self._order = {index: i for i, index in enumerate(self._source.outer)}
        held = [self._flat(index, 0) for index in self._source.outer]
        size = max(1, len(held))
        self._addresses = (ctypes.c_void_p * size)(*[tensor.data_ptr() for tensor in held])
        rows = [self._rows.get(index) for index in self._source.outer]
        strides = [0 if r is None else r.stride(0) * r.element_size() for r in rows]
        self._strides = (ctypes.c_long * size)(*strides)
        self._work = torch.zeros(self._source.work + 64, dtype=torch.uint8)
        self._work = self._work[-self._work.data_ptr() % 64 :]
        self._address = self._work.data_ptr()
        self._first = self._done = 0  # repetitions: of the present call, and before it
        self._error: BaseException | None = None
        self._call = CALL(self._torch_runs)
        self._prepared: dict[tuple[int, int], Callable[[], None]] = {}
        self._draws = [[f for op in draws for f in self._fills(op, i)] for i in range(steps)]
        is_one = len(draws) == 1 and draws[0].is_merged
        self._all = self._rows[drawn[0]] if is_one else torch.empty(0)
        self.can_draw_all = is_one or not self.draws_ahead

    def view(self, index: int) -> Any:
        """The values of a storage in each repetition, as an array (steps, elements)."""
        return self._rows[index].numpy()

    def give(self, index: int, step: int, value: Tensor) -> None:
        """Gives a repetition the values of a storage."""
        if self.steps == 1 and value.is_contiguous():
            place, address = self._order[index], value.data_ptr()
            if self._addresses[place] != address:
                self._given[index], self._addresses[place] = value, address
                self._prepared.clear()
            return
        self._rows[index][step].view(value.shape).copy_(value)
        if self._given.pop(index, None) is not None:
            self._prepared.clear()
            self._addresses[self._order[index]] = self._rows[index].data_ptr()

    def draw_all(self, count: int) -> None:
        """Draws the random numbers of the first repetitions.

        They are one tensor that is not contiguous, for which torch draws one number after the
        other, as it does for tensors of fewer than 16 elements. Numbers that depend on the run are
        drawn in `finish`.
        """
        if not self.draws_ahead:
            return
        if count == 1:  # which is contiguous
            self.step(0)
        else:
            self._all[:count].normal_()

    def step(self, step: int) -> None:
        """Draws the random numbers of a repetition, or runs it where they depend on the run."""
        if self.draws_ahead:
            for draw in self._draws[step]:
                draw()
        else:
            self._run_from(step, 1)
            self._done = step + 1

    def finish(self, count: int) -> None:
        """Runs the first repetitions, as far as `step` did not."""
        done, self._done = self._done, 0
        if count > done:
            self._run_from(done, count - done)

    def output(self, ref: Ref, step: int = 0) -> Tensor:
        """What lies in a place of the record."""
        flat = self._flat(ref.storage, step)
        return flat.as_strided(ref.shape, ref.stride, flat.storage_offset() + ref.offset)

    def _run_from(self, first: int, count: int) -> None:
        addresses = self._addresses
        if first:
            moved = [a + first * s for a, s in zip(addresses, self._strides, strict=True)]
            addresses = (ctypes.c_void_p * len(moved))(*moved)
        self._first = first
        with torch.no_grad() if self._source.calls else nullcontext():
            self._run(addresses, self._strides, self._address, count, self._call)
        if self._error is not None:
            error, self._error, self._done = self._error, None, 0
            raise error

    def _flat(self, index: int, step: int) -> Tensor:
        """A storage as it is in a repetition."""
        storage = self.record.storages[index]
        if index in self._given:
            return self._given[index].view(-1)
        if index in self._rows:
            return self._rows[index][step]
        if storage.tensor is not None:
            return storage.tensor
        place = self._source.places[index]
        size = storage.size * torch.empty((), dtype=storage.dtype).element_size()
        return self._work[place : place + size].view(storage.dtype)

    def _torch_runs(self, index: int, step: int) -> int:
        """Runs an operation that has no form in C; 1 if it failed."""
        try:
            key = (index, self._first + step)
            if key not in self._prepared:
                self._prepared[key] = self._prepare(*key)
            self._prepared[key]()
        except BaseException as error:
            self._error = error
            return 1
        return 0

    def _prepare(self, index: int, step: int) -> Callable[[], None]:
        """What runs an operation in a repetition."""
        op = self._source.calls[index]
        func, args = op.func, self._filled(op.args, step)
        kwargs = {name: self._filled(value, step) for name, value in op.kwargs.items()}
        places = [self.output(ref, step) for ref in op.outs]

        def run() -> None:
            found = func(*args, **kwargs)
            results = found if isinstance(found, (tuple, list)) else [found]
            tensors = [one for one in results if isinstance(one, Tensor)]
            for place, result in zip(places, tensors, strict=True):
                if result.data_ptr() != place.data_ptr():
                    place.copy_(result)

        return run

    def _filled(self, value: Any, step: int) -> Any:
        if isinstance(value, Ref):
            return self.output(value, step)
        if isinstance(value, (list, tuple)):
            return [self._filled(one, step) for one in value]
        return value

    def _fills(self, op: Op, step: int) -> list[Callable[[], Any]]:
        """What draws an operation's random numbers into their place."""
        out = self.output(op.outs[0], step)
        if op.is_merged:
            return [part.normal_ for part in out.split(15)]
        if op.func is _aten.randperm.default:
            return [lambda: torch.randperm(op.args[0], out=out)]
        if op.func._schema.is_mutable:
            args = [out, *self._filled(op.args[1:], step)]
            return [lambda: op.func(*args, **op.kwargs)]
        args = self._filled(op.args, step)
        return [lambda: out.copy_(op.func(*args, **op.kwargs))]


def _are_independent(record: Record) -> bool:
    """Whether what is drawn depends on nothing that the record computes.

    Then all numbers can be drawn before the run. Otherwise each is drawn in its turn.
    """
    written: set[int] = set()
    for op in record.ops:
        if op.is_random:
            operands = op.args[1:] if op.func._schema.is_mutable else op.args
            reads = [*refs_in(operands), *refs_in(tuple(op.kwargs.values()))]
            (first, *others) = op.outs
            is_whole = first.numel == record.storages[first.storage].size
            computed = any(record.storages[ref.storage].is_inner for ref in reads)
            if others or computed or not is_whole or first.storage in written:
                return False
        if not op.is_view and op.func not in UNSET:
            written |= {ref.storage for ref in op.writes()}
    return True
