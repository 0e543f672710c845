"""Records the tensor operations of one real run of a function.

`Tape` is a dispatch mode of torch. While it is active, the function runs as it always does, on real
tensors, and the tape writes down every operation that reaches torch's dispatcher. Nothing is
simulated: when the run is over, its results are those of an eager run.

The record describes memory, not Python objects. Each operand is a `Ref`: a storage, an offset, a
shape, strides and a dtype. So a view is only another `Ref` into the same storage, and two names of
one tensor are one place in memory.

Each storage has a level, which says what its values depend on:

- `CONSTANT`: on Python values alone, such as `torch.zeros(3)` or `torch.tensor(2.0)`;
- `HELD`: on tensors that the function reads but was not given, such as data in a closure;
- `VARYING`: on the inputs, on random draws, or on what these have changed.

The tape does not record operations whose operands are all of a level that it may take as fixed.
It keeps their results instead.
"""

from __future__ import annotations

__all__ = [
    "CONSTANT",
    "HELD",
    "UNSET",
    "VARYING",
    "Op",
    "Record",
    "Ref",
    "Storage",
    "Tape",
    "Unrecordable",
    "is_recording",
]

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CONSTANT, HELD, VARYING = range(3)

_aten = torch.ops.aten
_recording: ContextVar[bool] = ContextVar("recording", default=False)


def is_recording() -> bool:
    """Whether a `Tape` is recording in this thread."""
    return _recording.get()


class Unrecordable(Exception):
    """A function that no record stands for; the message says why, and where."""


class Ref(NamedTuple):
    """A tensor as a place in memory.

    Attributes:
        storage: the index of its storage in the record.
        offset: of its first element, counted in elements.
        shape, stride: as of a tensor.
        dtype: of its elements.
    """

    storage: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """The number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass
class Storage:
    """A piece of memory that operations read and write.

    Attributes:
        size: in elements.
        tensor: what lies there from outside of the record, as a flat tensor; None for memory that
            the operations make.
        origin: that tensor as the function reads it.
        level: what its values depend on.
        is_result: whether it is the result of operations that were not recorded.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    tensor: Tensor | None = None
    level: int = VARYING
    is_result: bool = False
    origin: Tensor | None = None

    @property
    def is_inner(self) -> bool:
        """Whether the operations of the record make it."""
        return self.tensor is None


@dataclass
class Op:
    """One operation.

    Attributes:
        func: the overload, such as `torch.ops.aten.add.Tensor`.
        args, kwargs: as it was called, with a `Ref` for each tensor.
        outs: the tensors that it returned.
        positions: of these among all that it returned, of which some may be None.
        is_view: whether it only makes another view of its first operand.
        is_random: whether it draws from torch's generator.
        is_merged: whether it draws one number after the other; see `clean.merge_draws`.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[Ref, ...]
    is_view: bool = False
    is_random: bool = False
    is_merged: bool = False
    positions: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The operation's name without its namespace and overload."""
        return str(self.func._schema.name).partition("::")[2]

    def reads(self) -> Iterator[Ref]:
        """Every operand, among them those that are written."""
        yield from refs_in(self.args)
        yield from refs_in(tuple(self.kwargs.values()))

    def writes(self) -> Iterator[Ref]:
        """What it changes in place, or makes."""
        for i, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = self.args[i] if i < len(self.args) else self.kwargs.get(argument.name)
                yield from refs_in((given,))
        if not self.is_view:
            yield from self.outs


def refs_in(value: Any) -> Iterator[Ref]:
    """The operands among the arguments of an operation."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from refs_in(one)


@dataclass
class Record:
    """Operations in their order, and the memory that they work on.

    Attributes:
        inputs: storages of the tensors that the function was given.
        outputs: what the record returns.
        conditions: what the run asked of tensors and every run must answer likewise: a truth value
            as a `Ref`, and the answer.
    """

    storages: list[Storage] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[Ref] = field(default_factory=list)
    conditions: list[tuple[Ref, bool]] = field(default_factory=list)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Ref:
        """New inner memory for a contiguous tensor."""
        stride, size = [], 1
        for length in reversed(shape):
            stride.append(size)
            size *= max(length, 1)
        self.storages.append(Storage(size, dtype, device))
        return Ref(len(self.storages) - 1, 0, tuple(shape), tuple(reversed(stride)), dtype)

    def emit(
        self, func: Any, *args: Any, shape: Sequence[int] = (), dtype: torch.dtype = torch.bool
    ) -> Ref:
        """Adds an operation whose result has a shape and a dtype."""
        device = next(self.storages[ref.storage].device for ref in refs_in(args))
        out = self.allocate(shape, dtype, device)
        self.ops.append(Op(func, args, {}, (out,)))
        return out

    def write(self, target: Ref, value: Ref) -> None:
        """Adds a copy of `value` into `target`."""
        self.ops.append(Op(_aten.copy_.default, (target, value), {}, (target,)))


class Tape(TorchDispatchMode):
    """Records what runs in its context.

    A function that cannot be recorded still runs to its end; then `finish` raises `Unrecordable`.

    Args:
        inputs: tensors that may have other values in every run.
        fixed: the level up to which values never change between runs: `CONSTANT`, or `HELD` if
            nobody changes the tensors that the function holds.

    Example:
        >>> x = torch.ones(3)
        >>> tape = Tape([x])
        >>> with tape.recording():
        ...     y = 2 * x.exp().view(3, 1)
        >>> record = tape.finish([y])
        >>> [op.name for op in record.ops]
        ['exp', 'view', 'mul']
    """

    def __init__(self, inputs: Iterable[Tensor], *, fixed: int = CONSTANT) -> None:
        super().__init__()
        self.record = Record()
        self._fixed = fixed
        self._places: dict[int, int] = {}  # of storages, by their address
        self._alive: list[Tensor] = []  # so that no address is used twice
        self._refused: str | None = None
        self._is_paused = False
        for tensor in inputs:
            index = self._known(tensor)
            if index is None:
                index = self._add(tensor, VARYING, is_outer=True)
                self.record.inputs.append(index)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records what runs in the context."""
        token = _recording.set(True)
        try:
            with ExitStack() as stack:
                stack.enter_context(_ValueQuestions(self))
                stack.enter_context(self)
                yield
        finally:
            _recording.reset(token)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Records nothing of what runs inside, such as a look at a value."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def refuse(self, reason: str) -> None:
        """Says why there will be no record; the first reason counts."""
        self._refused = self._refused or reason

    def ref(self, tensor: Tensor) -> Ref:
        """Where a tensor lies; one that the tape has not met is taken as held."""
        if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
            self.refuse(f"a tensor that is not dense ({tensor.layout})")
            tensor = torch.empty(())
        index = self._known(tensor)
        if index is None:
            index = self._add(tensor, HELD, is_outer=True)
        return _place(tensor, index)

    def finish(self, outputs: Sequence[Tensor | Ref]) -> Record:
        """The record.

        Raises:
            Unrecordable: the run did something that a record cannot repeat.
        """
        self.record.outputs = [one if isinstance(one, Ref) else self.ref(one) for one in outputs]
        if self._refused is not None:
            raise Unrecordable(self._refused)
        return self.record

    def read(self, tensor: Tensor) -> None:
        """Refuses a record that depends on the values of a tensor, unless they are fixed."""
        if not self._is_paused:
            ref = self.ref(tensor)
            if self.record.storages[ref.storage].level > self._fixed:
                self.refuse(f"a tensor was read as a list or an array{_line()}")

    def index(self, tensor: Tensor) -> int | None:
        """The storage of a tensor in the record; None if the tape has not met it."""
        return self._known(tensor)

    def _known(self, tensor: Tensor) -> int | None:
        return self._places.get(_address(tensor))

    def _add(self, tensor: Tensor, level: int, *, is_outer: bool) -> int:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        flat = torch.as_strided(tensor.detach(), (size,), (1,), 0) if is_outer else None
        index = len(self.record.storages)
        origin = tensor if is_outer else None
        self.record.storages.append(
            Storage(size, tensor.dtype, tensor.device, flat, level, origin=origin)
        )
        self._places[_address(tensor)] = index
        self._alive.append(tensor)
        return index

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if any(issubclass(kind, Tensor) and kind not in _PLAIN for kind in types):
            self.refuse(f"a tensor of type {types[0].__name__}{_line()}")
            return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return self._asked(args[0])
        if torch.Tag.inplace_view in func.tags and func not in _RESIZING:
            return func(*args, **kwargs)  # such as `squeeze_`, which changes nothing in memory
        if func is _aten.native_batch_norm.default and args[3] is not None:
            func = _aten._native_batch_norm_legit.default  # which says what it changes
        elif func is _aten._efficientzerotensor.default:
            func = _aten.zeros.default  # which has memory
        elif func in _UNDECLARED_WRITES:
            self.refuse(f"{func} changes its arguments{_line()}")
        if func in (_aten.equal.default, _aten.allclose.default):
            if self._compared(func, args, kwargs):
                return func(*args, **kwargs)
        if func is _aten.lift_fresh.default and not self._is_known(args[0]):
            self._add(args[0], CONSTANT, is_outer=True)  # a literal
        func, args = self._filled_by_mask(func, args, kwargs)
        args, kwargs = self._with_fixed_masks(func, args, kwargs)
        refs, named = self._refs(args), {key: self._refs(one) for key, one in kwargs.items()}
        operands = [*refs_in(refs), *refs_in(tuple(named.values()))]
        levels = [self.record.storages[ref.storage].level for ref in operands]
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        level = VARYING if is_random else max(levels, default=CONSTANT)
        tags = func.tags
        if level > self._fixed and (
            torch.Tag.data_dependent_output in tags
            or (torch.Tag.dynamic_output_shape in tags and func is not _aten.index.Tensor)
        ):
            self.refuse(f"{func} depends on the values of a tensor{_line()}")
        writes = func._schema.is_mutable
        if writes:
            self._will_write(func, args, refs, level)
            refs, named = self._refs(args), {key: self._refs(one) for key, one in kwargs.items()}
        out = func(*args, **kwargs)
        outs = [one for one in (out if isinstance(out, (list, tuple)) else [out])]
        tensors = [one for one in outs if isinstance(one, Tensor)]
        if any(one.layout is not torch.strided for one in tensors):
            self.refuse(f"a tensor that is not dense{_line()}")
            return out
        is_view = not writes and bool(tensors) and all(map(self._is_known, tensors))
        if level <= self._fixed and not writes and not is_view:
            for tensor in tensors:
                if not self._is_known(tensor):
                    is_garbage = func in UNSET
                    self._add(tensor, VARYING if is_garbage else level, is_outer=not is_garbage)
                    self.record.storages[-1].is_result = not is_garbage
            return out
        for tensor in tensors:
            if not self._is_known(tensor):
                self._add(tensor, VARYING, is_outer=False)
        places = tuple(_place(one, self._known(one) or 0) for one in tensors)
        self._alive += tensors
        positions = tuple(i for i, one in enumerate(outs) if isinstance(one, Tensor))
        op = Op(func, refs, named, places, is_view, is_random, positions=positions)
        self.record.ops.append(op)
        return out

    def _is_known(self, tensor: Tensor) -> bool:
        return _address(tensor) in self._places

    def _refs(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._refs, value))
        if isinstance(value, torch.Generator):
            self.refuse(f"a generator of the programs' own{_line()}")
        return value

    def _will_write(self, func: Any, args: Any, refs: Any, level: int) -> None:
        """Before an operation writes: memory whose values were taken as fixed becomes varying."""
        if func in _RESIZING:
            self.refuse(f"{func} changes where a tensor lies{_line()}")
        for ref in Op(func, refs, {}, (), is_view=True).writes():
            storage = self.record.storages[ref.storage]
            if storage.level <= self._fixed and not storage.is_result:
                self.refuse(f"a tensor that the programs hold is changed in place{_line()}")
            elif storage.level <= self._fixed and storage.tensor is not None:
                # Reads so far are of the values before the write, and every run begins with them.
                before = storage.tensor.clone()
                address = _address(storage.tensor)
                storage.tensor = before
                fresh = self.record.allocate((storage.size,), storage.dtype, storage.device)
                self._places[address] = fresh.storage
                self.record.write(fresh, fresh._replace(storage=ref.storage))
            elif storage.level < VARYING:
                storage.level = VARYING

    def _filled_by_mask(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """An assignment of one number where a mask is true, as the operation that fills it in."""
        fill = _FILLS.get(func)
        if fill is None or len(args[1]) != 1 or args[2].numel() != 1 or len(args) > 3 or kwargs:
            return func, args
        (mask,) = args[1]
        if mask is None or mask.dtype is not torch.bool:
            return func, args
        mask = mask.view(*mask.shape, *[1] * (args[0].dim() - mask.dim()))
        return fill, (args[0], mask, args[2].view(()))

    def _with_fixed_masks(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """An index by a mask, as an index by the positions at which a fixed mask is true."""
        if func not in _INDEXED:
            return args, kwargs
        found: list[Any] = []
        for index in args[1]:
            if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            if self.record.storages[self.ref(index).storage].level > self._fixed:
                self.refuse(f"an index by a mask that is not fixed{_line()}")
                return args, kwargs
            with self.paused():
                places = index.nonzero(as_tuple=True)
            for place in places:
                self._add(place, CONSTANT, is_outer=True)
            found += places
        return (args[0], found, *args[2:]), kwargs

    def _compared(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether a comparison of all elements is a check; then every run has to answer it so."""
        frame = _asking(sys._getframe(2))
        module = frame.f_globals.get("__name__", "") if frame is not None else ""
        if not module.startswith(_CHECKING):
            return False
        one, other, *options = args
        if one.shape == other.shape:
            by = _aten.eq.Tensor if func is _aten.equal.default else _aten.isclose.default
            pair, shape = (self.ref(one), self.ref(other)), tuple(one.shape)
            same = self.record.emit(by, *pair, *options, *kwargs.values(), shape=shape)
            every = self.record.emit(_aten.all.default, same)
            self.record.conditions.append((every, func(*args, **kwargs)))
        return True

    def _asked(self, tensor: Tensor) -> Any:
        """Answers a question for the value of a tensor of one element."""
        value = _aten._local_scalar_dense.default(tensor)
        ref = self.ref(tensor)
        if self.record.storages[ref.storage].level <= self._fixed:
            return value
        frame = _asking(sys._getframe(2))
        module = frame.f_globals.get("__name__", "") if frame is not None else ""
        if module in _WARNING:
            return value
        if isinstance(value, bool) and module.startswith(_CHECKING):
            if frame is None or not _fails_by_nan_alone(frame):
                self.record.conditions.append((ref, value))
        else:
            self.refuse(
                f"a tensor was asked for its value (item, float, a branch, a shape){_line()}"
            )
        return value


# torch wraps the method in a function whose first call imports torch's compiler, in 1.2 seconds.
setattr(Tape, "__torch_dispatch__", vars(Tape)["__torch_dispatch__"].__wrapped__)  # noqa: B010

_PLAIN = (Tensor, torch.nn.Parameter)
# Operations that allocate memory and leave it unset.
UNSET = {_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default} | {
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
# Operations that change running statistics, which their schema does not declare.
_UNDECLARED_WRITES = {_aten.cudnn_batch_norm.default, _aten.miopen_batch_norm.default}
_RESIZING = {_aten.resize_.default, *(getattr(_aten.set_, name) for name in _aten.set_.overloads())}
_FILLS = {
    _aten.index_put.default: _aten.masked_fill.Tensor,
    _aten.index_put_.default: _aten.masked_fill_.Tensor,
}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default} | {
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}
# Modules in which Python asks for a truth value to raise an error, not to choose a branch.
_CHECKING = (
    "torch.distributions.distribution",
    "torch.distributions.constraints",
    "torch.distributions.geometric",
    "pyro.distributions.von_mises_3d",
    "pyro.poutine.scale_messenger",
    "pyro_vi.",
)
_WARNING = {"pyro.util"}


def _address(tensor: Tensor) -> int:
    """Where a tensor's storage lies; tensors without elements lie apart from all others."""
    return tensor.untyped_storage().data_ptr() or -id(tensor)


def _place(tensor: Tensor, storage: int) -> Ref:
    return Ref(
        storage,
        int(tensor.storage_offset()),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def _asking(frame: FrameType | None) -> FrameType | None:
    """The Python frame that asked for a value: not one of a function mode."""
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame


def _fails_by_nan_alone(frame: FrameType) -> bool:
    """Whether a check of a distribution is one for NaN, which the loss shows too."""
    checked: Any = frame.f_locals.get("constraint", frame.f_locals.get("support"))
    while hasattr(checked, "base_constraint"):
        checked = checked.base_constraint
    return checked is constraints.real


class _ValueQuestions(TorchFunctionMode):
    """Intercepts reads of values that torch's dispatcher does not see.

    Pyro's ELBOs convert losses to numbers; here they stay tensors, so that they are recorded. Lists
    and NumPy arrays are made without the dispatcher.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.item:
            asking = sys._getframe(1).f_globals.get("__name__", "")
            if asking in _ELBOS:
                return args[0].detach()
        if func in _ARRAYS and args and isinstance(args[0], Tensor):
            self._tape.read(args[0])
        return func(*args, **(kwargs or {}))


_ARRAYS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}
_ELBOS = {"pyro.infer.util"} | {
    f"pyro.infer.{kind}_elbo" for kind in ("trace", "trace_mean_field", "renyi")
}


def _line() -> str:
    """Where in a user's code the run is: the last line that is not a library's.

    If there is none, the library's function.
    """
    place = ""
    for frame, number in traceback.walk_stack(sys._getframe(1)):
        name, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        if not name or file.startswith("<frozen"):  # of imports
            continue
        if not f"{name}.".startswith(_LIBRARIES):
            return f" ({file}:{number})"
        if not place and name.startswith(("pyro.", "torch.distributions")):
            place = f" (in {name}.{frame.f_code.co_qualname})"
    return place


_LIBRARIES = ("torch.", "pyro.", "pyro_vi.", "zuko.")
