"""What happens between blocks of steps, as functions of the training state."""

from __future__ import annotations

__all__ = ["Callback", "HeldoutBound", "Patience", "ProgressBar"]

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from pyro_vi.inference.training_state import TrainingState

log = logging.getLogger(__name__)


class Callback(ABC):
    """A function of the training state, called between blocks of steps.

    Attributes:
        every: steps between two calls; 0 for one after each block. After the last step there is a
            call in any case.
        purpose: what it is for, in words that follow "step 3, "; for error messages.
    """

    every: int = 0
    purpose: str = "between two steps"

    @abstractmethod
    def __call__(self, state: TrainingState) -> None:
        """Does it. To end training, set `state.stopped` to the reason."""

    def steps_left(self, step: int) -> int | None:
        """The number of steps after `step` up to the next call; None for any number."""
        return self.every - step % self.every if self.every else None

    def is_due(self, step: int, last: int) -> bool:
        """Whether to call it after `step` steps out of `last`."""
        return not self.every or step % self.every == 0 or step == last


class HeldoutBound(Callback):
    """Appends the bound on held-out data to the history; that of the average, if there is one.

    Args:
        bound: evaluates it, in nats per data point.
        every: steps between evaluations.
    """

    purpose = "in the held-out bound"

    def __init__(self, bound: Callable[[], float], *, every: int) -> None:
        self._bound, self.every = bound, every

    def __call__(self, state: TrainingState) -> None:
        with state.averaged():
            state.history.heldout.append((state.step, self._bound()))


class Patience(Callback):
    """Keeps the parameters of the best held-out bound; ends training if it does not improve.

    It comes after `HeldoutBound` in the list of callbacks.

    Args:
        patience: evaluations without a better bound.
        every: steps between evaluations.
    """

    def __init__(self, patience: int, *, every: int) -> None:
        self._patience, self.every = patience, every

    def __call__(self, state: TrainingState) -> None:
        best, (_, bound) = state.best, state.history.heldout[-1]
        if bound > best.bound:
            best.bound, best.waited = bound, 0
            with state.averaged():
                best.tensors = state.programs.snapshot()
        else:
            best.waited += 1
        if best.waited >= self._patience:
            state.stopped = "no better held-out bound"
            log.info("stopped at step %d: %s", state.step, state.stopped)


class ProgressBar(Callback):
    """Shows the smoothed bound and the number of steps; used as a context manager.

    Args:
        steps: the number of steps of the fit.
        shown: whether to show the bar; a string labels it.
    """

    def __init__(self, steps: int, shown: bool | str) -> None:
        self._steps, self._shown = steps, shown
        self._bar: Any = None

    def start(self) -> None:
        """Shows the bar."""
        label = self._shown if isinstance(self._shown, str) else None
        self._bar = tqdm(total=self._steps, desc=label, disable=not self._shown, unit="step")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, state: TrainingState) -> None:
        self._bar.update(state.step - self._bar.n)
        self._bar.set_postfix_str(f"bound {state.history.recent:.2f} nats", refresh=False)

    def announce_compilation(self) -> None:
        """Says that a step is being compiled, which may take a while."""
        self._bar.set_postfix_str("compiling the step")
