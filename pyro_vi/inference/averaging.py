"""An exponential moving average of parameters, which smooths the last steps' noise away.

    average <- d_k average + (1 - d_k) parameter,    d_k = min(decay, (1 + k) / (10 + k))

after step k = 0, 1, ...: the first averages forget their start faster. Polyak and Juditsky, 1992,
Acceleration of Stochastic Approximation by Averaging; the warm-up is that of TensorFlow's
ExponentialMovingAverage.
"""

from __future__ import annotations

__all__ = ["Average", "check_decay"]

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_vi.compiling import is_recording


class Average:
    """The average of some tensors over the steps of a fit.

    Args:
        tensors: parameters by name, which an optimizer changes in place.
        decay: from 0 (no average) to below 1.

    Attributes:
        weight: of the tensors in the next average, 1 - d_k.

    Example:
        >>> weight = torch.zeros(())
        >>> average = Average({"w": weight}, decay=0.9)
        >>> _ = weight.fill_(1.0)
        >>> average.update()
        >>> with average.installed():
        ...     float(weight)  # (1 - 0.1) of the way after the first step
        0.8999999761581421
        >>> float(weight)
        1.0
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, decay: float) -> None:
        self._tensors = dict(tensors)
        self._averages = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._decay = decay
        device = next(iter(self._averages.values())).device if self._averages else None
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.at(0)

    def at(self, step: int) -> None:
        """Sets the weight to that after a step, from 0 on."""
        self._step = step
        self._number = 1 - min(self._decay, (1 + step) / (10 + step))
        self.weight.fill_(self._number)

    def update(self) -> None:
        """Takes the tensors' present values into the average."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                average = self._averages[name]
                if is_recording():  # which reads the tensor anew in every step
                    average.add_(self.weight * (tensor - average))
                else:
                    average.lerp_(tensor, self._number)
        if not is_recording():
            self.at(self._step + 1)

    def state_dict(self) -> dict[str, Any]:
        """The averages by name, and the number of the next step."""
        averages = {name: average.clone() for name, average in self._averages.items()}
        return {"averages": averages, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        for name, average in self._averages.items():
            average.copy_(state["averages"][name])
        self.at(state["step"])

    @property
    def tensors(self) -> list[Tensor]:
        """The averages."""
        return list(self._averages.values())

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The averages in the tensors' place, and back."""
        held = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self.install()
        try:
            yield
        finally:
            self._copy(held)

    def install(self) -> None:
        """The averages in the tensors' place, for good."""
        self._copy(self._averages)

    def _copy(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(values[name])


def check_decay(decay: float | None) -> None:
    """Raises ValueError unless the decay is None, or at least 0 and below 1."""
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"expected a decay from 0 to below 1 (average=0.999), got {decay!r}")
