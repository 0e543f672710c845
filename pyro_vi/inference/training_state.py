"""What a training loop changes, in one place."""

from __future__ import annotations

__all__ = ["Best", "History", "Terms", "Trainer", "TrainingState"]

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vi.inference.averaging import Average
from pyro_vi.programs import Arguments, Shuffled, State


@dataclass
class Terms:
    """The losses of some steps and their terms, in nats per data point, a number for each step.

    Reconstruction and KL are unweighted; `weights` are the weights of the two.
    """

    losses: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    weights: list[tuple[float, float]] = field(default_factory=list)


class Trainer(Protocol):
    """Takes gradient steps; `pyro_vi.inference.SVITrainer` is the implementation.

    Attributes:
        taken: the number of steps so far; after an error, the number of the step that failed.
        batch: the arguments of the last step.
        last_site: the last site that the last step reached.
    """

    taken: int
    batch: Arguments

    @property
    def last_site(self) -> str: ...

    def take(self, limit: int) -> int:
        """Takes at least one step and at most `limit`; returns how many.

        Raises:
            FloatingPointError: a loss or a gradient that is not finite.
        """
        ...

    def read(self) -> Terms:
        """The terms of the steps since the last call, in order."""
        ...

    def explain(self) -> str:
        """Whether steps were compiled, and by what; or why not."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class History:
    """Numbers of every step, and of every held-out evaluation.

    Attributes:
        losses, reconstruction, kl, weights: of every step; see `Terms`.
        heldout: (step, bound) of every held-out evaluation.
        seconds: spent in gradient steps.
        recent: the bound, smoothed over about twenty steps.
    """

    losses: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    weights: list[tuple[float, float]] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    recent: float = math.nan

    def add(self, terms: Terms) -> None:
        """Appends the terms of some steps."""
        recent = self.recent
        for loss in terms.losses:
            recent = 0.95 * recent - 0.05 * loss if recent == recent else -loss
        self.recent = recent
        self.losses += terms.losses
        self.reconstruction += terms.reconstruction
        self.kl += terms.kl
        self.weights += terms.weights


@dataclass
class Best:
    """The best held-out bound so far.

    Attributes:
        bound: in nats per data point.
        waited: evaluations since then.
        tensors: the parameters and buffers of it; None before the first evaluation.
    """

    bound: float = -math.inf
    waited: int = 0
    tensors: dict[str, Tensor] | None = None


@dataclass
class TrainingState:
    """Everything that a training loop changes.

    Attributes:
        programs: parameters and buffers of model and guide.
        trainer: takes steps; it holds the optimizer and its schedule.
        batches: the order of the data, and the position in it.
        average: the moving average of the parameters, if there is one.
        history: numbers of every step.
        best: the best held-out bound, if parameters of it are kept.
        stopped: why training is over before its last step; empty while it is not.
    """

    programs: State
    trainer: Trainer
    batches: Shuffled
    average: Average | None = None
    history: History = field(default_factory=History)
    best: Best = field(default_factory=Best)
    stopped: str = ""

    @property
    def step(self) -> int:
        """The number of steps so far."""
        return self.trainer.taken

    def averaged(self) -> AbstractContextManager[None]:
        """The moving average in the place of the parameters, inside the context."""
        return nullcontext() if self.average is None else self.average.installed()

    def keep_result(self) -> None:
        """Installs the parameters that the fit ends with: the best ones, or the average."""
        if self.best.tensors is not None:
            self.programs.restore(self.best.tensors)
        elif self.average is not None:
            self.average.install()

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors, numbers, strings, and dicts, lists and tuples of them."""
        average = None if self.average is None else self.average.state_dict()
        return {
            "programs": self.programs.snapshot(),
            "trainer": self.trainer.state_dict(),
            "batches": self.batches.state_dict(),
            "average": average,
            "history": {**vars(self.history)},
            "best": {**vars(self.best)},
            "stopped": self.stopped,
            "generators": _generators(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was called, in a loop with the same options.

        Raises:
            ValueError: the state is of other programs, or of other options.
        """
        if (self.average is None) != (state["average"] is None):
            raise ValueError("expected the state of a fit with the same `average`")
        self.programs.restore(state["programs"])
        self.trainer.load_state_dict(state["trainer"])
        self.batches.load_state_dict(state["batches"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.history = History(**{name: _copied(value) for name, value in state["history"].items()})
        self.best = Best(**state["best"])
        self.stopped = state["stopped"]
        torch.set_rng_state(state["generators"]["cpu"])
        if state["generators"]["cuda"]:
            torch.cuda.set_rng_state_all(state["generators"]["cuda"])


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _generators() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
