"""What a sample site is: data or latent, a point mass or not, and which of its axes is which plate.

Pyro counts a plate's dimension from the right of the batch shape, and leaves axes of length one
where a site stands in no plate. `Layout` gives every value the same order instead: plates from the
left, the plate over data points first, then what is one draw's shape.
"""

from __future__ import annotations

__all__ = [
    "At",
    "Layout",
    "Unobserved",
    "draws_terms",
    "is_delta",
    "is_deterministic",
    "is_discrete",
    "is_noise",
    "is_partial",
]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
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


def is_discrete(fn: Any) -> bool:
    """Whether a distribution is over discrete values; one that does not say is not."""
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return False


def is_noise(site: Site) -> bool:
    """Whether a site of a trace draws anything."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not is_delta(site["fn"])
    )


def draws_terms(site: Site) -> bool:
    """Whether a site says which of a program's terms are drawn, as a diffusion's step does."""
    return bool(site["infer"].get("subsampled"))


def is_partial(site: Site) -> bool:
    """Whether a site's density is scaled, or it says which of a program's terms are drawn."""
    return draws_terms(site) or not bool((torch.as_tensor(site["scale"]) == 1).all())


class At(Messenger):
    """Runs a program with some of its latent sites at given values, as if they had been drawn."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and not msg["is_observed"] and msg["name"] in self._values:
            msg["value"], msg["done"] = self._values[msg["name"]], True


class Unobserved(Messenger):
    """Draws the observed sites of a program, as `poutine.uncondition` does, and no others.

    That one draws `pyro.deterministic` sites too, from point masses that the plates expanded: in a
    plate their values would get its axes twice, and so would all that is computed from them.

    Example:
        >>> import pyro, pyro.poutine as poutine
        >>> def model():
        ...     with pyro.plate("data", 3):
        ...         mean = pyro.deterministic("mean", torch.zeros(3))
        ...         return pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.ones(3))
        >>> Unobserved()(model)().shape, poutine.uncondition(model)().shape
        (torch.Size([3]), torch.Size([3, 3]))
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not is_deterministic(msg):
            msg["infer"].update(was_observed=True, obs=msg["value"])
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


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
            found = _event_dim(site, frames)
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


def _event_dim(site: Site, frames: list[Any]) -> int | None:
    """Event dimensions of a deterministic value, which seldom says.

    Those declared; else all but the plates' axes, if these come first; else the fewest that leave
    the plates' sizes. None if no number does, nor leaves what broadcasts to them.
    """
    value, declared = site["value"], site["fn"].event_dim
    first = max(0, value.dim() - max((-frame.dim for frame in frames), default=0))
    for event in (declared, first, *range(value.dim() + 1)):
        if _fills(value.shape[: value.dim() - event], frames):
            return event
    said = declared < value.dim()  # Pyro says all of them where none are declared
    for event in (declared, first) if said else (first,):
        if _fills(value.shape[: value.dim() - event], frames, or_broadcasts=True):
            return event
    return None


def _fills(batch: tuple[int, ...], frames: list[Any], *, or_broadcasts: bool = False) -> bool:
    """Whether a batch shape has the sizes of the plates."""
    sizes = [(batch[f.dim] if len(batch) >= -f.dim else 1, int(f.size), f.dim) for f in frames]
    if or_broadcasts:
        return all(size in (1, plate) for size, plate, _ in sizes)
    return all(size == plate and len(batch) >= -dim for size, plate, dim in sizes)
