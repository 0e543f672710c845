"""What a sample site is: data or latent, a point mass or not, and which of its axes is which plate.

Pyro counts a plate's dimension from the right of the batch shape, and leaves axes of length one
where a site stands in no plate. `Layout` gives every value the same order instead: plates from the
left, the plate over data points first, then what is one draw's shape.
"""

from __future__ import annotations

__all__ = ["Layout", "is_delta", "is_deterministic"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

Site = Mapping[str, Any]


def is_deterministic(site: Site) -> bool:
    """Whether a site is a `pyro.deterministic` statement: a name for a value, and no density."""
    return bool(site["infer"].get("_deterministic"))


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point mass, under masks and declared event dimensions too."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


@dataclass(frozen=True)
class Layout:
    """Which axes of a site's value are which plates.

    Attributes:
        plates: names of the plates, the plate over data points first, then from the left.
        axes: where Pyro has the axis of each plate, and then of each batch dimension that no plate
            declares; counted from the left of a batch shape of `width` dimensions.
        width: batch dimensions that Pyro has.
        shape: the sizes along `axes`.
        event_dim: dimensions of one draw, to the right of the batch shape.

    Example:
        >>> import pyro, pyro.poutine as poutine
        >>> def model():
        ...     with pyro.plate("data", 3, dim=-1), pyro.plate("rater", 2, dim=-2):
        ...         pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        >>> site = poutine.trace(model).get_trace().nodes["z"]
        >>> layout = Layout.of(site, plate="data")
        >>> layout.plates, layout.ordered(site["value"]).shape
        (('data', 'rater'), torch.Size([3, 2, 4]))
        >>> bool((layout.raw(layout.ordered(site["value"])) == site["value"]).all())
        True
    """

    plates: tuple[str, ...]
    axes: tuple[int, ...]
    width: int
    shape: tuple[int, ...]
    event_dim: int

    @classmethod
    def of(cls, site: Site, *, plate: str = "data", density: bool = False) -> Layout:
        """The layout of a site's value, or with `density` of its log probability."""
        frames = sorted(
            (frame for frame in site["cond_indep_stack"] if frame.vectorized),
            key=lambda frame: (frame.name != plate, frame.dim),
        )
        value = site["log_prob"] if density else site["value"]
        event = 0 if density else site["fn"].event_dim
        if not density and is_deterministic(site):
            found = _event_dim(value, frames)
            frames, event = ([], value.dim()) if found is None else (frames, found)
        batch = tuple(value.shape[: value.dim() - event])
        width = max([len(batch), *(-frame.dim for frame in frames)])
        batch = (1,) * (width - len(batch)) + batch
        axes = [width + frame.dim for frame in frames]
        sizes = [int(frame.size) for frame in frames]
        loose = [i for i in range(width) if i not in axes and batch[i] != 1]
        return cls(
            plates=tuple(frame.name for frame in frames),
            axes=(*axes, *loose),
            width=width,
            shape=(*sizes, *(batch[i] for i in loose)),
            event_dim=event,
        )

    def ordered(self, value: Tensor) -> Tensor:
        """A value, or log probability, as Pyro has it, in this order."""
        event = value.shape[value.dim() - self.event_dim :]
        missing = self.width - (value.dim() - self.event_dim)
        value = value.reshape((1,) * missing + value.shape)
        rest = [i for i in range(self.width) if i not in self.axes]
        value = value.permute((*self.axes, *rest, *range(self.width, value.dim())))
        value = value.reshape((*value.shape[: len(self.axes)], *event))
        return value.expand((*self.shape, *event))

    def raw(self, value: Tensor) -> Tensor:
        """A value in this order as Pyro has it."""
        order = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        value = value.permute((*order, *range(len(self.axes), value.dim())))
        batch = [1] * self.width
        for position, index in enumerate(order):
            batch[self.axes[index]] = value.shape[position]
        return value.reshape((*batch, *value.shape[len(self.axes) :]))


def _event_dim(value: Tensor, frames: list[Any]) -> int | None:
    """Event dimensions of a deterministic value, which seldom says: the fewest that fit its plates.

    None if no number of them leaves the plates' sizes.
    """
    for event in range(value.dim() + 1):
        batch = value.shape[: value.dim() - event]
        if all(len(batch) >= -f.dim and batch[f.dim] == f.size for f in frames):
            return event
    return None
