"""Scales that turn a bound of all data into one per data point."""

from __future__ import annotations

__all__ = ["PerDataPoint"]

from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample


class PerDataPoint(Messenger):
    """Scales sites so that a bound is in nats per data point: 1/B inside the plate, 1/N outside.

    Args:
        plate: the name of the plate over data points.
        total: data points in all (N); B is the plate's own size.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> x = torch.zeros(4)
        >>> per_point = PerDataPoint("data", total=100)(model)
        >>> scaled = poutine.trace(per_point).get_trace(x).log_prob_sum()
        >>> whole = poutine.trace(model).get_trace(x).log_prob_sum()
        >>> bool(torch.isclose(scaled * 4, whole))
        True
    """

    def __init__(self, plate: str, *, total: int) -> None:
        super().__init__()
        self.plate, self.total = plate, total

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate:
                itself = frame.full_size is not None and frame.full_size != frame.size
                msg["scale"] = msg["scale"] / (frame.full_size if itself else frame.size)
                return
        msg["scale"] = msg["scale"] / self.total
