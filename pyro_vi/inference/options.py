"""The options of `fit`, checked once."""

from __future__ import annotations

__all__ = ["FitOptions"]

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vi.checks import check_count, check_seed, checked_device
from pyro_vi.inference.averaging import check_decay
from pyro_vi.optimizers import OneOptimizer
from pyro_vi.programs import Data

FEW_STEPS = 300  # that pay for half a second of compilation
MANY_STEPS = 5_000  # that pay for a compilation of seconds to minutes


@dataclass(frozen=True)
class FitOptions:
    """What `fit` was told, apart from programs and data; its docstring says what each means.

    Raises:
        TypeError, ValueError: an option that no fit can have, or two that exclude each other.
    """

    loss: ELBO
    optim: PyroOptim | Callable[[Iterable[Tensor]], Optimizer] | None
    steps: int
    batch_size: int | None
    transform: Callable[[Any], Any] | None
    kl_weight: float | Callable[[int], float]
    reconstruction_weight: float | Callable[[int], float]
    schedule: Callable[[Optimizer], LRScheduler] | None
    clip_norm: float | None
    average: float | None
    heldout: Data | None
    heldout_every: int
    patience: int | None
    plate: str
    seed: int
    restarts: int
    prior_only: bool
    device: str | torch.device | None
    compile: bool | Literal["auto"]
    progress: bool | str

    def __post_init__(self) -> None:
        check_count("restart", self.restarts)
        check_decay(self.average)
        self._check_loss()
        if self.steps != 0:
            check_count("step", self.steps)
        self._check_heldout()
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"expected a positive clip_norm, got {self.clip_norm}")
        check_seed(self.seed)
        if self.compile is not True and self.compile is not False and self.compile != "auto":
            raise ValueError(f"expected compile to be True, False or 'auto', got {self.compile!r}")
        checked_device(self.device)

    @property
    def torch_device(self) -> torch.device | None:
        """Where to compute; None to stay where the data are."""
        return checked_device(self.device)

    @property
    def compiles(self) -> bool:
        """Whether steps are to be compiled."""
        return self.compile is True or (self.compile == "auto" and self.steps >= FEW_STEPS)

    @property
    def waits_for_compiler(self) -> bool:
        """Whether a compilation may take seconds to minutes."""
        return self.compile is True or self.steps >= MANY_STEPS

    def make_optimizer(self) -> PyroOptim:
        """A new optimizer, whose state belongs to no parameters yet.

        Raises:
            TypeError, ValueError: `optim` is no optimizer for `fit`; see the message.
        """
        if isinstance(self.optim, PyroOptim):
            if self.schedule is not None or self.clip_norm is not None:
                raise ValueError(
                    "schedule and clip_norm work on a torch optimizer: give"
                    " optim=partial(torch.optim.Adam, lr=...), or a Pyro optimizer that schedules"
                    " (pyro.optim.ExponentialLR) and clips (clip_args) by itself"
                )
            if "Plateau" in getattr(self.optim, "pt_scheduler_constructor", int).__name__:
                raise TypeError(
                    "expected a schedule of the step alone; ReduceLROnPlateau needs a metric"
                )
            fresh = copy(self.optim)  # its state belongs to other parameters
            fresh.optim_objs, fresh.grad_clip = {}, {}
            fresh._state_waiting_to_be_consumed = dict(self.optim._state_waiting_to_be_consumed)
            return _Scheduled(fresh) if isinstance(fresh, PyroLRScheduler) else fresh
        if getattr(self.optim, "__module__", "").startswith("pyro.optim"):
            raise TypeError(
                "expected a Pyro optimizer made with its arguments, such as pyro.optim.Adam({'lr':"
                f" 1e-3}}), got {self.optim!r}"
            )
        if self.optim is not None and not callable(self.optim):
            raise TypeError(
                "expected a Pyro optimizer, or a callable that makes a torch optimizer from"
                f" parameters, got {type(self.optim).__name__}: a torch optimizer is bound to its"
                " parameters, so give functools.partial(torch.optim.Adam, lr=1e-3) instead"
            )
        return OneOptimizer(
            self.optim or partial(torch.optim.Adam, lr=1e-3),
            schedule=self.schedule,
            clip_norm=self.clip_norm,
        )

    def _check_loss(self) -> None:
        loss = self.loss
        if not isinstance(loss, ELBO):
            raise TypeError(
                f"expected one of Pyro's ELBOs as loss, such as Trace_ELBO(), got {loss!r}"
            )
        if type(loss).__name__.startswith("Jit"):
            raise TypeError(
                f"{type(loss).__name__} keeps the programs and scales of its first step: use"
                f" {type(loss).__name__.removeprefix('Jit')}"
            )

    def _check_heldout(self) -> None:
        heldout, patience = self.heldout, self.patience
        if self.heldout_every < 1:
            raise ValueError(f"expected heldout_every of at least 1, got {self.heldout_every}")
        if patience is not None and (heldout is None or patience < 1):
            raise ValueError(
                f"early stopping needs held-out data and a patience of at least 1, got {patience}"
                f"{' without heldout' if heldout is None else ''}"
            )


class _Scheduled(PyroOptim):
    """A Pyro scheduler that is stepped after every update, as `schedule` is."""

    def __init__(self, scheduler: PyroLRScheduler) -> None:
        super().__init__(scheduler.pt_optim_constructor, {})
        self._scheduler = scheduler

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        self._scheduler(params, *args, **kwargs)
        self._scheduler.step()
