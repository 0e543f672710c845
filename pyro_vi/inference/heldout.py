"""The bound on held-out data."""

from __future__ import annotations

__all__ = ["Heldout"]

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.infer import ELBO, RenyiELBO
from pyro.optim import PyroOptim

from pyro_vi.inference.per_data_point import PerDataPoint
from pyro_vi.inference.svi import SVI
from pyro_vi.process_state import seeded
from pyro_vi.programs import Batches, Data, PlateSizes, State, Structure


class Heldout:
    """The bound on held-out data, in nats per data point, with the same noise every time.

    Args:
        model, guide, loss: the programs, and the ELBO.
        data: the held-out data.
        training: the training data; held-out batches have their size and transform.
        structure: what one run of the programs shows.
        state: the programs' state.
        seed: of the noise.

    Raises:
        ValueError: a site stands outside of the plate over data points.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        loss: ELBO,
        data: Data,
        training: Batches,
        structure: Structure,
        state: State,
        seed: int,
    ) -> None:
        if not structure.is_local:
            raise ValueError(
                "the bound on held-out data needs every site inside plate"
                f" {structure.plate!r}: with a global latent, q(theta | training data) bounds"
                " nothing on other data"
            )
        device = training.device
        whole = Batches(data, device=device)
        rows = len(next(iter(whole.tensors().values()), ()))
        size = None if training.batch_size is None else max(1, min(training.batch_size, rows))
        self._batches = Batches(data, batch_size=size, transform=training.transform, device=device)
        structure.check_amortized(guide)
        self._sizes = PlateSizes(structure.unsized)
        if structure.unsized:
            model, guide = self._sizes(model), self._sizes(guide)
        self._summed = isinstance(loss, RenyiELBO)  # the others are scaled to one data point
        if not self._summed:
            weights = PerDataPoint(structure.plate, total=1)  # every site is inside
            model, guide = weights(model), weights(guide)
        self._svi = SVI(model, guide, PyroOptim(torch.optim.SGD, {}), loss)
        self._plate, self._state, self._seed = structure.plate, state, seed

    def __call__(self) -> float:
        total, rows = 0.0, 0
        with seeded(self._seed), self._state.evaluating():
            for (args, kwargs), size in self._chunks():
                if self._plate in self._sizes.sizes:
                    self._sizes.sizes[self._plate] = size
                value = self._svi.evaluate_loss(*args, **kwargs)
                total -= value if self._summed else value * size
                rows += size
        return total / rows

    def _chunks(self) -> Iterable[tuple[tuple[tuple[Any, ...], dict[str, Any]], int]]:
        if self._batches.total is None or self._batches.batch_size is None:
            yield self._batches.whole(), self._rows()
            return
        every = torch.arange(self._batches.total, device=self._batches.device)
        for index in every.split(self._batches.batch_size):
            yield self._batches.rows(index), len(index)

    def _rows(self) -> int:
        return len(next(iter(self._batches.tensors().values())))
