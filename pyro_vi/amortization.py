"""Whether programs take each data point by itself.

A plate over data points declares that the sites inside it are independent, given those outside.
Programs can break that in silence: by a parameter for each row of the data, by the row's place in
its batch, by a normalisation over the batch, or by shared latents whose guide reads the data. Such
programs are right for all of their training data together, and for nothing else: not for some rows
at a time, nor for other data. So rows are run again in other company.
"""

from __future__ import annotations

__all__ = ["Rows"]

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi.batches import Arguments
from pyro_vi.program import seeded
from pyro_vi.scaling import Structure, is_autoguide, log_prob_rows
from pyro_vi.sites import At, Layout, is_deterministic, is_noise


@dataclass(frozen=True)
class Rows:
    """What programs make of the rows of a batch.

    Given the same draws, a row must have the same log probability at every site inside the plate
    wherever it stands, and whatever stands around it; and so must the sites of the guide that
    stand outside, on which the rows have no say. Where the guide holds a latent at a point, that
    is the point itself.

    Attributes:
        amortized: whether this is so: then the guide has latents for other data too. An autoguide
            has none for other data points.
        local: whether it is, some rows can be taken without the others, and all sites stand inside
            the plate: then each data point has a posterior of its own.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def by_row(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.7))
        >>> def by_place(x):
        ...     with pyro.plate("data", len(x)) as index:
        ...         pyro.sample("z", dist.Normal(torch.tensor([1.0, 2.0, 3.0])[index], 0.7))
        >>> batch = (torch.randn(3),), {}
        >>> for guide in by_row, by_place:
        ...     Rows.of(Structure.of(model, guide, *batch), model, guide, batch)
        Rows(amortized=True, local=True)
        Rows(amortized=False, local=False)
    """

    amortized: bool
    local: bool

    @classmethod
    def of(
        cls,
        structure: Structure,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        arguments: Arguments,
    ) -> Rows:
        """Runs the programs on the later half of a batch's rows, in place of all and by itself.

        Args:
            structure: what a run on these arguments showed.
            model, guide: the programs, in `eval()`: batch normalisation mixes rows in training.
            arguments: of one batch. Of one row, or of tensors without a row for each element of
                the plate, there is nothing to tell, and the plate is believed.
        """
        inside = structure.is_local and structure.plate in structure.plates
        if is_autoguide(guide) and any(map(structure.inside_model, structure.latents)):
            return cls(amortized=False, local=False)
        rows = structure.batch
        late = torch.arange(rows // 2, rows)
        if rows < 2 or structure.plate not in structure.plates or not _has_rows(arguments, rows):
            return cls(amortized=True, local=inside)
        run = _Run(model, guide, arguments, structure.plate, rows)
        exactly = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with seeded(0, _device(arguments)), torch.no_grad(), exactly:
            try:
                whole = run.rows(torch.arange(rows))
            except ValueError:  # such as NaN, where a fit broke off
                return cls(amortized=True, local=inside)
            twice = late.repeat(3)[:rows]  # in the place of others, among its like
            moved, alone = run.agrees(whole, twice), run.agrees(whole, late)
        amortized = moved is True and alone is not False
        return cls(amortized=amortized, local=amortized and inside and alone is True)


@dataclass(frozen=True)
class _Run:
    """Runs of two programs on some rows of a batch."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    arguments: Arguments
    plate: str
    total: int

    def rows(self, index: Tensor) -> Structure:
        args, kwargs = self.arguments
        some = tuple(self._taken(part, index) for part in args)
        named = {name: self._taken(part, index) for name, part in kwargs.items()}
        found = Structure.of(self.model, self.guide, some, named, plate=self.plate)
        found.guide_trace.compute_log_prob()
        found.model_trace.compute_log_prob()
        return found

    def agrees(self, whole: Structure, index: Tensor) -> bool | None:
        """Whether rows give what they gave among the whole; None if they cannot be run."""
        noise = {
            name: self._drawn(site, index)
            for name, site in {**whole.model_trace.nodes, **whole.guide_trace.nodes}.items()
            if is_noise(site)
        }
        try:
            with At(noise):
                found = dict(self._terms(self.rows(index)))
        except Exception:  # whatever else the programs need the other rows for
            return None
        expected = dict(self._terms(whole))
        return expected.keys() == found.keys() and all(
            _close(value[index.to(value.device)] if value.dim() else value, found[name])
            for name, value in expected.items()
        )

    def _taken(self, part: Any, index: Tensor) -> Any:
        return part[index.to(part.device)] if _is_split(part, self.total) else part

    def _drawn(self, site: Any, index: Tensor) -> Tensor:
        """Some rows of a site's value."""
        value: Tensor = site["value"]
        for frame in site["cond_indep_stack"]:
            if frame.name == self.plate and frame.vectorized:
                axis = frame.dim - site["fn"].event_dim
                if value.dim() >= -axis and value.shape[axis] == frame.size:
                    return value.index_select(axis, index.to(value.device))
        return value

    def _terms(self, structure: Structure) -> Iterator[tuple[str, Tensor]]:
        """What must be repeated: (rows, ...) inside the plate, scalars outside."""
        for side, trace in (("p", structure.model_trace), ("q", structure.guide_trace)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or site_is_subsample(site) or is_deterministic(site):
                    continue
                inside = any(frame.name == self.plate for frame in site["cond_indep_stack"])
                if side == "q" and not is_noise(site) and not site["is_observed"]:
                    value = Layout.of(site, plate=self.plate).ordered(site["value"])
                    yield f"point {name}", value if inside else value.sum()
                elif inside or side == "q":
                    # A plate that scales a batch to all data scales half of it otherwise.
                    density = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
                    site = {**site, "log_prob": density}
                    rows = log_prob_rows(site, self.plate) if inside else density.sum()
                    yield f"{side} {name}", rows.to(density.dtype)  # which says how it is rounded


def _device(arguments: Arguments) -> torch.device | None:
    args, kwargs = arguments
    parts = (*args, *kwargs.values())
    return next((part.device for part in parts if isinstance(part, Tensor)), None)


def _has_rows(arguments: Arguments, rows: int) -> bool:
    args, kwargs = arguments
    return any(_is_split(part, rows) for part in (*args, *kwargs.values()))


def _is_split(part: Any, rows: int) -> bool:
    return isinstance(part, Tensor) and part.dim() > 0 and len(part) == rows


def _close(value: Tensor, other: Tensor) -> bool:
    """Whether two agree but for rounding, in sums as large as the largest."""
    if not value.is_floating_point() or value.shape != other.shape:
        return torch.equal(value, other)
    finite = value[value.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    tolerance = torch.finfo(value.dtype).eps ** 0.5 * (1 + largest)
    return torch.allclose(value, other, rtol=0, atol=tolerance, equal_nan=True)
