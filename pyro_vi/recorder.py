"""Which steps of an SVI are compiled: when a kind of batch gets a graph, and whether it is good.

A kind of batch is what a record is good for: the layouts of its tensors, its other arguments, the
handlers around the step. Each is counted. After some eager steps one is recorded; the next step is
taken both ways, and only if loss, updates and generators come out alike is the record compiled and
used. From then on it is asked before every step whether anything that it was made of is something
else by now (`pyro_vi.watch`). For what is not found by asking, a step is now and then taken both
ways again: the 100th compiled one, the 200th, the 400th and so on, later every 10,000th.
"""

from __future__ import annotations

__all__ = ["Recorder"]

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as tree
from torch.utils._device import DeviceContext

from pyro_vi.calls import Calls
from pyro_vi.capture import Uncapturable, first_line
from pyro_vi.compiled import Proof, Recorded, record
from pyro_vi.watch import LAYOUT

if TYPE_CHECKING:
    from pyro_vi.svi import SVI

_log = logging.getLogger(__name__)

_MOST = 4  # graphs of an SVI
_KINDS = 100  # kinds of batches that are counted
_OTHER = 100  # batches of another kind than the first recorded one, before it is recorded too
_AUDIT = 100  # compiled steps before one is taken both ways again, and then ever twice as many,
_OFTEN = 100  # until it is after every so many times that
_REST = 5_000  # eager steps at most after a change
_UNSOUND = 3  # steps that were not as a record takes for granted, before it is dropped


@dataclass
class _Kind:
    """A kind of batch: its eager and its compiled steps so far, what they called, its record."""

    seen: int = 0
    used: int = 0
    calls: Calls = field(default_factory=Calls)
    recorded: Recorded | None = None
    is_proven: bool = False
    is_refused: bool = False


class Recorder:
    """The recorded steps of an SVI, one for each kind of batch.

    Around an eager step call `before`, evaluate it in `seen`, and call `evaluated` once there are
    gradients, and `after`.

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
        announce: Callable[[], object] | None = None,
    ) -> None:
        self.svi, self._after, self._scale, self._guard = svi, after, scale, guard
        self._announce = announce
        self._kinds: dict[Any, _Kind] = {}
        self._proof: Proof | None = None
        self._failed: Exception | None = None  # of a prediction
        self._unsound = 0
        self._is_crowded = False
        self._now: tuple[Any, list[Tensor]] = (None, [])  # the kind of the batch of an eager step

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or on disk: nothing is recorded yet."""
        nothing: dict[str, Any] = {
            "_kinds": {},
            "_proof": None,
            "_failed": None,
            "_now": (None, []),
        }
        return {**vars(self), **nothing}

    @property
    def recorded(self) -> list[Recorded]:
        """The records that are in use."""
        found = [kind.recorded for kind in self._kinds.values() if kind.is_proven]
        return [one for one in found if one is not None]

    def find(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Recorded, list[Tensor]] | None:
        """The recorded step for a batch, and its tensors; None if the step is to be eager."""
        key, batch = _key(args, kwargs)
        kind = self._kinds.get(key)
        if kind is None or not kind.is_proven or kind.recorded is None:
            return None
        if (change := kind.recorded.stale()) is not None:
            self._drop(change)
            return None
        if not kind.recorded.is_alone(batch):
            return None
        kind.used += 1
        audited, rest = divmod(kind.used, _AUDIT)
        if rest == 0 and (audited.bit_count() == 1 or audited % _OFTEN == 0):
            self._unsound = 0
            return None
        return kind.recorded, batch

    def was_unsound(self) -> None:
        """Counts a recorded step in which what was taken for granted did not hold."""
        self._unsound += 1
        if self._unsound == _UNSOUND:
            self._unsound = 0
            self._drop(
                "losses are NaN, parameters and values are outside of their constraints and"
                " supports, masks and scales that were alike in model and guide are not always, or"
                " compiled steps end with an error"
            )

    def _drop(self, why: str) -> None:
        self._kinds = {key: kind for key, kind in self._kinds.items() if kind.is_refused}
        self._after = min(10 * self._after, _REST)  # it may well happen again
        warnings.warn(
            f"the next {self._after} steps of each kind of batch are not compiled: {why}",
            stacklevel=4,
        )

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before an eager step: predicts it, if a record is to be proven by it."""
        self._proof, self._failed = None, None
        self._now = _key(args, kwargs)
        if (kind := self._kind()) is not None and kind.recorded is not None:
            if (change := kind.recorded.stale()) is not None:
                self._drop(change)
            elif kind.recorded.is_alone(self._now[1]):
                try:
                    self._proof = kind.recorded.predict(self._now[1])
                except Exception as error:  # of which the eager step says more, if it has it too
                    self._failed = error

    def seen(self) -> AbstractContextManager[object]:
        """Around the evaluation of an eager step: sees what it calls, if it is recorded soon."""
        kind = self._kind()
        if kind is None or kind.recorded is not None or kind.seen + 2 < self._due():
            return nullcontext()
        return kind.calls.seen()

    def _kind(self) -> _Kind | None:
        """The kind of an eager step's batch; None if it never gets a record."""
        key, _ = self._now
        if key is not None and key not in self._kinds:
            if len(self._kinds) >= _KINDS:
                self._make_room()
            if len(self._kinds) < _KINDS:
                self._kinds[key] = _Kind()
        kind = self._kinds.get(key)
        return kind if kind is not None and not kind.is_refused else None

    def _make_room(self) -> None:
        """Forgets the kinds that have no record yet."""
        kept = [(k, v) for k, v in self._kinds.items() if v.is_refused or v.recorded is not None]
        self._kinds = dict(kept)
        if not self._is_crowded:
            self._is_crowded = True
            warnings.warn(
                f"most steps stay eager: {_KINDS} kinds of batches so far, by shapes, by numbers"
                " among the arguments, or by handlers around a step (a number that changes from"
                " step to step should be a tensor)",
                stacklevel=5,
            )

    def evaluated(self, loss: Any, parameters: Sequence[Tensor]) -> None:
        """In an eager step, when there are gradients and nothing is updated."""
        if self._proof is not None:
            self._proof.compare(loss, parameters)

    def after(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Sequence[Tensor]
    ) -> None:
        """After an eager step: counts it, and records its kind, or compiles it, if it is time."""
        key, batch = self._now
        if (kind := self._kind()) is None:
            return
        kind.seen += 1
        found = [one.recorded for one in self._kinds.values() if one.recorded is not None]
        for change in [one.resync() for one in found]:
            if change is not None:
                self._drop(change)
                return
        try:
            if self._failed is not None:
                raise Uncapturable(f"the record ended with {first_line(self._failed)}")
            if self._proof is not None and kind.recorded is not None:
                self._prove(kind, self._proof, batch)
            elif kind.recorded is None and kind.seen >= self._due():
                if isinstance(key, _Strange):
                    raise Uncapturable(str(key))
                if not parameters:
                    raise Uncapturable("the programs have no parameters")
                kind.recorded = record(
                    self.svi,
                    kind.calls,
                    parameters,
                    args,
                    kwargs,
                    scale=self._scale,
                    guard=self._guard,
                )
                kind.calls = Calls()
        except Uncapturable as error:
            self._stay(key, str(error))
        finally:
            self._proof = None

    def _prove(self, kind: _Kind, proof: Proof, batch: list[Tensor]) -> None:
        """After a step that was predicted: compiles its record, if it is not yet."""
        assert kind.recorded is not None
        if kind.is_proven and not proof.is_sound:  # which an eager step may well be
            return
        if (differs := proof.differs()) is not None:
            one = "the step after the recorded one"
            if kind.is_proven:
                one = f"after {kind.used} compiled steps, one"
            raise Uncapturable(
                f"{one} has another {differs} than its record: the programs read something that"
                f" changes unseen{', and those before may be wrong too' if kind.is_proven else ''}"
            )
        if kind.is_proven:
            return
        _log.info("compiling a step, which takes seconds")
        if self._announce is not None:
            self._announce()
        kind.recorded.compile(batch)
        kind.is_proven = True

    def _due(self) -> float:
        """How many eager steps of a kind come before its record."""
        others = [one for one in self._kinds.values() if one.recorded is not None]
        if len(others) >= _MOST:
            return math.inf
        return max(self._after, _OTHER) if others else self._after

    def _stay(self, key: Any, why: str) -> None:
        self._kinds[key] = _Kind(is_refused=True)
        warnings.warn(f"steps stay eager: {why}", stacklevel=4)


class _Strange(str):
    """A kind of batch that no record is good for, in words."""


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """What a record is good for, None where a step is not to be counted; and a batch's tensors."""
    if not torch.is_grad_enabled() or torch.is_anomaly_enabled():
        return None, []
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None, []
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return _Strange("autocast around a step: put it around the network (Autocast)"), []
    if torch._C._len_torch_dispatch_stack():
        return _Strange("a mode of torch's around a step, which sees every operation"), []
    around = (torch.get_default_dtype(), Distribution._validate_args, *_modes(), *_PYRO_STACK)
    if _PYRO_STACK and any(type(one).__hash__ is None for one in _PYRO_STACK):
        return _Strange("a handler around a step that cannot be told from others (no hash)"), []
    if not kwargs and all(type(one) is Tensor for one in args) and _are_plain(args):
        distinct = len(set(map(id, args)))
        return (around, distinct, *map(LAYOUT, args), *map(Tensor.stride, args)), list(args)
    leaves, spec = tree.tree_flatten((args, kwargs))
    batch: list[Tensor] = []
    key: list[Any] = [around, spec]
    for leaf in leaves:
        if isinstance(leaf, Tensor) and _are_plain([leaf]):
            key.append((type(leaf), LAYOUT(leaf), leaf.stride()))
            batch.append(leaf)
        elif isinstance(leaf, (bool, int, float, str, type(None), torch.dtype, torch.device)):
            key.append((type(leaf), repr(leaf)))
        elif isinstance(leaf, nn.Module):  # what it keeps is watched
            key.append(leaf)
        else:
            kind = "tensor that is not plain" if isinstance(leaf, Tensor) else type(leaf).__name__
            return _Strange(f"an argument of type {kind}"), []
    return (*key, len(set(map(id, batch)))), batch


def _modes() -> list[Any]:
    """Torch's own handlers around a step; what is default, such as the device, is one of them."""
    count = torch._C._len_torch_function_stack()
    modes = [torch._C._get_function_stack_at(i) for i in range(count)]
    return [one.device if isinstance(one, DeviceContext) else one for one in modes]


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether they are what their shapes and strides say: dense, not nested, no conjugates."""
    if not _PLAIN.issuperset(map(_FORMAT, tensors)):
        return False
    return not any(map(Tensor.is_neg, tensors)) and not any(map(Tensor.is_conj, tensors))


_FORMAT, _PLAIN = attrgetter("is_nested", "layout"), {(False, torch.strided)}
