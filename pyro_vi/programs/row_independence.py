"""Whether each data point has a posterior of its own.

A plate over data points declares that the sites inside it are independent, given those outside.
A program can violate this without an error: by a parameter for each row of the data, by reading the
position of a row in its batch, by a normalisation over the batch, or by shared latents whose guide
reads the data. Such a program is valid for all of its training data together, but neither for some
of the rows nor for other data. So rows are run again in other batches, and must have the same log
probabilities.
"""

from __future__ import annotations

__all__ = ["RowIndependence"]

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi.process_state import seeded
from pyro_vi.programs.batches import Arguments, Key, parts_of, select_rows
from pyro_vi.programs.sites import FixedSites, Layout, base_noise, is_deterministic, is_drawn
from pyro_vi.programs.structure import Structure, log_prob_rows

_TF32 = 2.0**-11  # what products of float32 may be rounded to on a GPU
_ROUNDING = 64  # times the rounding of one operation: results that differ by less are the same


@dataclass(frozen=True)
class RowIndependence:
    """Whether the rows of a batch are independent of one another in some programs.

    Given the same draws, a row must have the same log probability at every site inside the plate,
    whatever its position and the other rows. The sites of the guide outside of the plate must have
    the same log probability for all rows. If the guide holds a latent at a point, its value must be
    the same instead.

    Attributes:
        amortized: whether the rows are independent. Then the guide has latents for other data too.
            An autoguide has none for other data points.
        local: whether, in addition, some rows can be run without the others, and all sites are
            inside the plate. Then each data point has a posterior of its own.
        rows: the arguments that have a row for each data point, by position or keyword.

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
        ...     RowIndependence.of(Structure.of(model, guide, *batch), model, guide, batch)
        RowIndependence(amortized=True, local=True, rows=(0,))
        RowIndependence(amortized=False, local=False, rows=(0,))
    """

    amortized: bool
    local: bool
    rows: tuple[Key, ...]

    @classmethod
    def of(
        cls,
        structure: Structure,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        arguments: Arguments,
    ) -> RowIndependence:
        """Runs the programs on each half of a batch's rows, by itself and in place of all.

        Args:
            structure: what a run on these arguments showed.
            model, guide: the programs, in `eval()`: batch normalisation mixes rows in training.
            arguments: of one batch. Of one row, or where the programs do not repeat themselves
                given their draws, there is nothing to tell, and the plate is believed.
        """
        parts = parts_of(arguments)
        plated = structure.plate in structure.plates
        total = structure.batch if plated else _most_rows(parts)
        rows = tuple(key for key, part in parts.items() if _length(part) == total)
        inside = structure.is_local and plated and bool(rows)
        if structure.latents_with_own_parameters(guide):
            return cls(amortized=False, local=False, rows=rows)
        believed = cls(amortized=True, local=inside, rows=rows)
        if total < 2 or not rows:
            return believed
        run = _Run(model, guide, arguments, structure.plate, rows)
        device = next((p.device for p in parts.values() if isinstance(p, Tensor)), None)
        with seeded(0, device), torch.no_grad():
            try:
                terms = _Terms.of(run, torch.arange(total))
            except ValueError:  # such as NaN, where a fit broke off
                return believed
            if terms is None:
                return believed
            halves = torch.arange(total).split((total + 1) // 2)
            moved = [terms.repeated(half.repeat_interleave(2)[:total]) for half in halves]
            alone = [terms.repeated(half) for half in halves]
        amortized = False not in moved + alone
        local = amortized and inside and all(alone)  # None: they cannot be run without the others
        return cls(amortized=amortized, local=local, rows=rows)


def _length(part: Any) -> int:
    return len(part) if isinstance(part, Tensor) and part.dim() > 0 else 0


def _most_rows(parts: Mapping[Key, Any]) -> int:
    return max(map(_length, parts.values()), default=0)


@dataclass(frozen=True)
class _Run:
    """Runs of two programs on some rows of a batch."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    arguments: Arguments
    plate: str
    rows: tuple[Key, ...]

    def __call__(self, index: Tensor) -> Structure:
        args, kwargs = select_rows(self.arguments, self.rows, index)
        found = Structure.of(self.model, self.guide, args, kwargs, plate=self.plate)
        found.guide_trace.compute_log_prob()
        found.model_trace.compute_log_prob()
        return found

    def select(self, site: Any, value: Tensor, index: Tensor) -> Tensor:
        """Some rows of a site's value, or of what it was drawn from."""
        for frame in site["cond_indep_stack"]:
            if frame.name == self.plate and frame.vectorized:
                axis = frame.dim - site["fn"].event_dim
                if value.dim() >= -axis and value.shape[axis] == frame.size:
                    return value.index_select(axis, index.to(value.device))
        return value

    def terms(self, structure: Structure) -> Iterator[tuple[str, Tensor]]:
        """What must be repeated: (rows, ...) inside the plate, scalars outside."""
        for side, trace in (("p", structure.model_trace), ("q", structure.guide_trace)):
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or site_is_subsample(site) or is_deterministic(site):
                    continue
                stack = site["cond_indep_stack"]
                inside = any(f.name == self.plate and f.vectorized for f in stack)
                if side == "q" and not is_drawn(site) and not site["is_observed"]:
                    value = Layout.of(site, plate=self.plate).ordered(site["value"])
                    yield f"point {name}", value if inside else value.sum()
                elif inside or side == "q":
                    # A plate that scales a batch to all data scales half of it otherwise.
                    density = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
                    site = {**site, "log_prob": density}
                    rows = log_prob_rows(site, self.plate) if inside else density.sum()
                    yield f"{side} {name}", rows.to(density.dtype)  # says how it is rounded


@dataclass(frozen=True)
class _Terms:
    """The terms of all rows together, the draws, and the rounding errors of the terms."""

    run: _Run
    sites: dict[str, Any]  # the random ones
    noise: dict[str, Tensor]
    is_plated: bool
    values: dict[str, Tensor]
    changes: dict[str, float]

    @classmethod
    def of(cls, run: _Run, every: Tensor) -> _Terms | None:
        """None if the programs draw what is no sample site, and so do not repeat themselves."""
        whole = run(every)
        nodes = {**whole.model_trace.nodes, **whole.guide_trace.nodes}
        sites = {name: site for name, site in nodes.items() if is_drawn(site)}
        noise = {name: base_noise(site) for name, site in sites.items()}
        is_plated = run.plate in whole.plates
        found = cls(run, sites, noise, is_plated, dict(run.terms(whole)), {})
        again = found._at(every)
        if again is None or not found._agree(found.values, again):
            return None
        # A term may differ in another batch by as much as the last digits of the draws change it.
        nudged = found._at(every, nudge=True) or {}
        changes = {
            name: float(change.max())
            for name, value in found.values.items()
            if name in nudged and (change := (nudged[name] - value).abs().nan_to_num(0.0)).numel()
        }
        return replace(found, changes=changes)

    def repeated(self, index: Tensor) -> bool | None:
        """Whether some rows give what they gave among the whole; None if they cannot be run."""
        found = self._at(index)
        if found is None:
            return None
        expected = {
            name: value[index.to(value.device)] if value.dim() else value
            for name, value in self.values.items()
        }
        return self._agree(expected, found)

    def _at(self, index: Tensor, *, nudge: bool = False) -> dict[str, Tensor] | None:
        """The terms of some rows at the draws of the whole."""
        noise = {}
        for name, site in self.sites.items():
            value = self.run.select(site, self.noise[name], index)
            shrink = nudge and value.is_floating_point()
            noise[name] = value * (1 - 4 * _eps(value)) if shrink else value
        try:
            with FixedSites(noise):
                found = self.run(index)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever else the programs need the other rows for
            return None
        if self.is_plated and found.batch != len(index):  # the plate is over another axis
            return None
        return dict(self.run.terms(found))

    def _agree(self, expected: dict[str, Tensor], found: dict[str, Tensor]) -> bool:
        return expected.keys() == found.keys() and all(
            _close(value, found[name], _ROUNDING * self.changes.get(name, 0.0))
            for name, value in expected.items()
        )


def _eps(value: Tensor) -> float:
    eps = torch.finfo(value.dtype).eps
    return max(eps, _TF32) if value.is_cuda and value.dtype == torch.float32 else eps


def _close(value: Tensor, other: Tensor, change: float) -> bool:
    if not value.is_floating_point() or value.shape != other.shape:
        return torch.equal(value, other)
    rounding = _ROUNDING * _eps(value)
    return torch.allclose(other, value, rtol=rounding, atol=rounding + change, equal_nan=True)
