"""Steps of several programs timed in turn, each with a parameter store of its own.

In one store, programs that share names share parameters: Pyro hands the second the first's, and its
optimizer its own, which then have no gradient and do not move.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro


class Own:
    """A step of an SVI, in a parameter store of its own.

    Args:
        svi: whose step it is.
        args: of the step.
    """

    def __init__(self, svi: Any, *args: Any) -> None:
        self.svi, self.args = svi, args
        self._state: Any = {"params": {}, "constraints": {}}

    def store(self) -> AbstractContextManager[Any]:
        """Within it, the parameter store is this one's."""
        return pyro.get_param_store().scope(self._state)

    def __call__(self) -> object:
        return self.svi.step(*self.args)


def microseconds(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """A step's by name: medians of interleaved blocks of some 50 ms."""
    blocks = {
        name: max(1, int(0.05 / (_seconds(step, 3, first=4) / 3))) for name, step in steps.items()
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(1e6 * _seconds(step, blocks[name]) / blocks[name])
    return {name: statistics.median(values) for name, values in found.items()}


def _seconds(step: Callable[[], object], count: int, *, first: int = 0) -> float:
    """What steps take, after the first ones: the fourth of an SVI is compiled, if one is."""
    with step.store() if isinstance(step, Own) else nullcontext():
        for _ in range(first):
            step()
        started = time.perf_counter()
        for _ in range(count):
            step()
        getattr(step, "wait", lambda: None)()
        return time.perf_counter() - started
