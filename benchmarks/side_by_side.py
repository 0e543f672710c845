"""Steps of several programs timed in turn, on one thread.

A contender has `per_step(count)`: the seconds of a step, over about `count` steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol
from unittest import mock

import pyro
from pyro.params.param_store import ParamStoreDict

import pyro_vi
from pyro_vi.inference import BLOCK, SVITrainer, fitting


class Contender(Protocol):
    def per_step(self, count: int) -> float: ...


class Plain:
    """A step that is a call."""

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step

    def per_step(self, count: int) -> float:
        started = perf_counter()
        for _ in range(count):
            self._step()
        return (perf_counter() - started) / count


class Own:
    """A step of an SVI, in a parameter store of its own.

    In one store, programs that share names share parameters: Pyro hands the second the first's, and
    its optimizer its own, which then have no gradient and do not move.

    Args:
        svi: whose step it is.
        args: of the step.
    """

    def __init__(self, svi: Any, *args: Any) -> None:
        self.svi, self.args = svi, args
        self._own = vars(ParamStoreDict())

    @contextmanager
    def store(self) -> Iterator[None]:
        """Within it, the parameter store is this one's; its `scope` would copy what is in it."""
        held = vars(pyro.get_param_store())
        before = dict(held)
        held.update(self._own)
        try:
            yield
        finally:
            self._own = dict(held)
            held.update(before)

    def __call__(self) -> object:
        return self.svi.step(*self.args)

    def per_step(self, count: int) -> float:
        with self.store():
            return Plain(self).per_step(count)


class InFit:
    """The steps inside of `pyro_vi.fit`, timed where its loop asks the trainer for the next ones.

    So everything counts that a running fit does: the steps, what is kept of them, the audits, the
    progress. A call is a fit of its own; its eager steps, its compilation and its first block of
    compiled steps are not counted.

    Args:
        model, guide, data: of the fit.
        least: how many steps are timed, at least.
        options: of the fit.

    Attributes:
        first: seconds of recording, compiling and proving the step, of the first fit.
        steady: seconds of a step by block, but of blocks that begin with an audit.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        data: Any,
        *,
        least: int,
        **options: Any,
    ) -> None:
        self._programs, self._least, self._options = (model, guide, data), least, options
        self.first, self.steady = 0.0, list[float]()

    def per_step(self, count: int) -> float:
        marks: list[tuple[float, int, int]] = []

        class Timed(SVITrainer):
            def take(self, limit: int) -> int:
                compiler = self._compiler
                uses = max((k.uses for k in compiler._kinds.values()), default=0) if compiler else 0
                marks.append((perf_counter(), self.taken, uses))
                return super().take(limit)

        steps = 4 + BLOCK * (2 + max(self._least, count) // BLOCK)  # one block first, and one last
        with mock.patch.object(fitting, "SVITrainer", Timed):
            fitted = pyro_vi.fit(
                *self._programs, steps=steps, progress=False, compile=True, **self._options
            )
        begun = next((i for i, mark in enumerate(marks) if mark[2]), None)
        if begun is None:
            raise RuntimeError(f"no compiled steps in this fit: {fitted.compiled}")
        self.first = self.first or marks[begun - 1][0] - marks[begun - 3][0]
        for (t, taken, uses), (later, then, now) in pairwise(marks[begun:]):
            if now.bit_count() != 1 and now > uses:
                self.steady.append((later - t) / (then - taken))
        return (marks[-1][0] - marks[begun][0]) / (marks[-1][1] - marks[begun][1])


def microseconds(contenders: Mapping[str, Contender], rounds: int) -> dict[str, float]:
    """A step's by name: medians of interleaved blocks of at least 50 ms.

    What is timed to find the size of the blocks is at least some hundred steps of a small program,
    so that most audits of an SVI lie before the blocks.
    """
    counts = {}
    for name, one in contenders.items():
        one.per_step(40)  # the fifth of an SVI is compiled, and audits are frequent at first
        counts[name] = 4
        while counts[name] * one.per_step(counts[name]) < 0.05:
            counts[name] *= 4
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, one in contenders.items():
            found[name].append(1e6 * one.per_step(counts[name]))
    return {name: statistics.median(values) for name, values in found.items()}
