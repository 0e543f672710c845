"""compare(): {name: guide} -> one row per variational family, and a verdict.

Two questions, by what is passed as the model:

- a model: every family trains its own copy of it, from the same initial weights on the same
  batches. What differs is the model-and-guide pair: a poor family bends the model to itself.
- a fitted model (`Fit.model`): it is frozen, and the guides alone are trained. What differs is
  inference: the evidence is one number, and the gap to it belongs to the family alone.
"""

from __future__ import annotations

__all__ = ["Comparison", "Row", "Split", "compare"]

import csv
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyro.poutine as poutine
import torch

from pyro_vi import checkpoint, diagnostics
from pyro_vi.batches import Batches, Data, arguments, moved
from pyro_vi.diagnostics import Estimate
from pyro_vi.fitted import Fit
from pyro_vi.fitting import fit
from pyro_vi.posterior import Posterior
from pyro_vi.program import State, checked_device, seeded

_MIN_DRAWS = 21  # fewer have no tail to fit a k-hat to
_TRUSTED = 0.1  # share of data points whose k-hat may exceed its bound


class Split(Protocol):
    """Data in two parts, such as `pyro_vi.data.ImageData`."""

    @property
    def train(self) -> Any: ...

    @property
    def test(self) -> Any: ...


@dataclass(frozen=True)
class Row:
    """One family, on test data. Bounds in nats per data point, `_se` Monte Carlo standard errors.

    Differences are to the first family, paired over the data points: their `_se` says whether
    other data points would rank the families alike.
    """

    family: str
    elbo: float
    elbo_se: float
    elbo_difference: float
    elbo_difference_se: float
    evidence: float  # importance-weighted, a lower bound on log p(x) in expectation
    evidence_se: float
    evidence_difference: float  # NaN if all families share one model, and so one evidence
    evidence_difference_se: float
    gap: float  # evidence - ELBO, an estimate of KL(q || posterior); one model: its best estimate
    gap_se: float
    reconstruction: float
    kl: float
    bits_per_dim: float  # -evidence in bits per observed value; NaN unless the data are discrete
    khat_median: float
    khat_bad: float  # share of data points whose k-hat exceeds the bound for that many draws
    ess: float  # median over data points, of the number of draws
    active_units: int
    latent_units: int
    parameters: int
    seconds_per_step: float


@dataclass(frozen=True)
class PerPoint:
    """What stands behind a row, for each test data point; (N,) each."""

    elbo: npt.NDArray[np.float64]
    evidence: npt.NDArray[np.float64]
    khat: npt.NDArray[np.float64]
    ess: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns; print it for the table.

    Attributes:
        rows: one per family, in the order given.
        fits: the fits by family.
        points: the diagnostics of each test data point by family.
        test: the test data that the rows are about, transformed.
        num_samples: posterior draws for each data point.
        shared: whether the model was frozen, so that there is one evidence for all families.
    """

    rows: tuple[Row, ...]
    fits: dict[str, Fit]
    points: dict[str, PerPoint]
    test: Data
    num_samples: int
    shared: bool

    @property
    def best(self) -> Row:
        """The row with the highest test ELBO."""
        return max(self.rows, key=lambda row: row.elbo)

    @property
    def verdict(self) -> str:
        """Which family to trust, and how far, in plain words."""
        return _verdict(self)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the numbers warn of: collapsed posteriors."""
        return tuple(
            f"{row.family}: {row.active_units} of {row.latent_units} latent units are active;"
            " the others equal the prior (posterior collapse)"
            for row in self.rows
            if row.active_units < row.latent_units / 2
        )

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Writes the rows to a file, every digit, one line per family; NaN is an empty cell."""
        names = [field.name for field in fields(Row)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            cells = [getattr(row, name) for name in names]
            writer.writerow(["" if cell != cell else cell for cell in cells])
        checkpoint.write(path, text.getvalue().encode())

    def __str__(self) -> str:
        lines = [*_table(self), "", self.verdict]
        return "\n".join([*lines, *(f"Warning: {warning}." for warning in self.warnings)])


def compare(
    model: Callable[..., Any],
    guides: Mapping[str, Callable[..., Any]],
    data: Split,
    *,
    num_samples: int = 1_000,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Fits each guide and judges it on test data.

    Args:
        model: a Pyro program with local latents, of which each guide gets its own copy to train;
            or a fitted model (`Fit.model`), which stays as it is.
        guides: guides by name; differences are to the first.
        data: has `train` and `test`, each as `fit` takes data.
        num_samples: posterior draws for each test data point, at least 21.
        seed: of the fits and of the draws.
        progress: whether to show progress bars.
        **options: as `fit` takes them: loss, optim, steps, batch_size, transform, ...; a transform
            is applied to the test data too, once.

    Raises:
        ValueError: no guides, too few draws, or what `fit` refuses.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from pyro_vi.families import FullCovariance, MeanField
        >>> from pyro_vi.guides import Encoder
        >>> from pyro_vi.models import LinearGaussian
        >>> model = LinearGaussian(torch.ones(3, 2), torch.zeros(3), 1.0)
        >>> data = SimpleNamespace(train=torch.randn(64, 3), test=torch.randn(16, 3))
        >>> guides = {
        ...     "mean-field": Encoder((3,), MeanField(2, context_dim=8)),
        ...     "full covariance": Encoder((3,), FullCovariance(2, context_dim=8)),
        ... }
        >>> result = compare(model, guides, data, num_samples=50, steps=5, progress=False)
        >>> [row.family for row in result.rows]
        ['mean-field', 'full covariance']
    """
    if not isinstance(guides, Mapping):
        raise TypeError(f"expected guides by name, a dict, got {type(guides).__name__}")
    if not (hasattr(data, "train") and hasattr(data, "test")):
        raise TypeError(
            "expected data with attributes train and test, such as pyro_vi.data.ImageData, got"
            f" {type(data).__name__}"
        )
    if not guides:
        raise ValueError("expected at least one guide to compare, got none")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"expected a whole number of posterior draws, got {num_samples!r}")
    if num_samples < _MIN_DRAWS:
        raise ValueError(
            f"expected at least {_MIN_DRAWS} posterior draws for a k-hat, got {num_samples}"
        )
    transform = options.get("transform")
    with seeded(seed):
        test = transform(data.test) if transform else data.test
    device = checked_device(options.get("device"))
    scored = moved(test, device)
    shared = not _is_trained(model, scored, device)
    fits: dict[str, Fit] = {}
    points: dict[str, PerPoint] = {}
    rows: list[Row] = []
    for name, guide in guides.items():
        fitted = fit(
            model, guide, data.train, seed=seed, progress=name if progress else False, **options
        )
        posterior = fitted.posterior(scored, num_samples, seed=seed)
        fits[name] = fitted
        points[name] = PerPoint(
            elbo=posterior.elbo().value,
            evidence=posterior.evidence().value,
            khat=posterior.khat(),
            ess=posterior.ess(),
        )
        first = points[next(iter(guides))]
        rows.append(_row(name, fitted, posterior, points[name], first))
    if shared:
        rows = _with_one_evidence(rows)
    return Comparison(tuple(rows), fits, points, test, num_samples, shared)


def _is_trained(model: Callable[..., Any], test: Data, device: torch.device | None) -> bool:
    """Whether a run of the model uses parameters with gradients."""
    state = State({"model": model}, device=device)
    args, kwargs = arguments(Batches(test, batch_size=1).head(2))
    with seeded(0, device), state.installed():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    return any(
        site["value"].requires_grad for site in trace.nodes.values() if site["type"] == "param"
    )


def _with_one_evidence(rows: list[Row]) -> list[Row]:
    """The gaps to one evidence: a frozen model has one, and the highest estimate is the closest.

    Each family's own estimate is a lower bound in expectation, the looser the worse the family: a
    gap to it would flatter the worst.
    """
    best = max(rows, key=lambda row: row.evidence)
    return [
        replace(
            row,
            evidence_difference=math.nan,
            evidence_difference_se=math.nan,
            gap=best.evidence - row.elbo,
            gap_se=row.gap_se if row is best else math.hypot(best.evidence_se, row.elbo_se),
        )
        for row in rows
    ]


def _row(name: str, fitted: Fit, posterior: Posterior, own: PerPoint, first: PerPoint) -> Row:
    evidence = diagnostics.mean_estimate(posterior.evidence())
    elbo = diagnostics.mean_estimate(posterior.elbo())
    reconstruction = float(posterior.log_likelihood.mean())
    active = posterior.active_units().values()
    bits = -float(evidence.value) / (posterior.num_observed * math.log(2))
    bound = diagnostics.khat_threshold(len(posterior.log_p))
    return Row(
        family=name,
        **_pair("elbo", elbo),
        **_pair("elbo_difference", diagnostics.paired_difference(own.elbo, first.elbo)),
        **_pair("evidence", evidence),
        **_pair("evidence_difference", diagnostics.paired_difference(own.evidence, first.evidence)),
        **_pair("gap", diagnostics.mean_estimate(posterior.kl_to_posterior())),
        reconstruction=reconstruction,
        kl=reconstruction - float(elbo.value),
        bits_per_dim=bits if posterior.discrete else math.nan,
        khat_median=float(np.median(own.khat)),
        khat_bad=float(np.mean(own.khat > bound)),
        ess=float(np.median(own.ess)),
        active_units=int(sum(units.sum() for units in active)),
        latent_units=int(sum(units.size for units in active)),
        parameters=fitted.parameters,
        seconds_per_step=fitted.seconds / len(fitted.losses),
    )


def _pair(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: float(estimate.value), f"{name}_se": float(estimate.se)}


def _table(result: Comparison) -> list[str]:
    """The table as lines: a column per family, a line per quantity."""
    bound = diagnostics.khat_threshold(result.num_samples)
    first = result.rows[0].family

    def error(name: str) -> Callable[[Row], str]:
        return lambda row: f"{getattr(row, name):.2f} ± {_short(getattr(row, name + '_se'))}"

    def difference(name: str) -> Callable[[Row], str]:
        return lambda row: (
            ""
            if row.family == first
            else f"{getattr(row, name):+.2f} ± {_short(getattr(row, name + '_se'))}"
        )

    lines: list[tuple[str, Callable[[Row], str]]] = [
        ("test ELBO (nats)", error("elbo")),
        (f"  minus {first}'s", difference("elbo_difference")),
        ("evidence (nats)", error("evidence")),
        (f"  minus {first}'s ", difference("evidence_difference")),
        ("gap: best evidence - ELBO" if result.shared else "gap: evidence - ELBO", error("gap")),
        ("reconstruction (nats)", lambda row: f"{row.reconstruction:.2f}"),
        ("KL to the prior (nats)", lambda row: f"{row.kl:.2f}"),
        ("bits per dimension", lambda row: f"{row.bits_per_dim:.3f}"),
        ("k-hat, median", lambda row: f"{row.khat_median:.2f}"),
        (f"k-hat above {bound:.2f}", lambda row: f"{row.khat_bad:.0%}"),
        (f"ESS of {result.num_samples:,} draws", lambda row: f"{row.ess:.0f}"),
        ("active units", lambda row: f"{row.active_units} of {row.latent_units}"),
        ("parameters", lambda row: f"{row.parameters:,}"),
        ("ms per step", lambda row: f"{1e3 * row.seconds_per_step:.1f}"),
    ]
    if any(math.isnan(row.bits_per_dim) for row in result.rows):
        lines = [line for line in lines if line[0] != "bits per dimension"]
    if result.shared:
        lines = [line for line in lines if line[0] != f"  minus {first}'s "]
    if len(result.rows) == 1:
        lines = [line for line in lines if "minus" not in line[0]]
    cells = [["", *(row.family for row in result.rows)]]
    cells += [[name, *(show(row) for row in result.rows)] for name, show in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def _short(error: float) -> str:
    """A standard error with two decimals, or one digit where those would show 0.00."""
    return f"{error:.2f}" if error >= 0.01 or error == 0 else f"{error:.1g}"


def _verdict(result: Comparison) -> str:
    ranked = sorted(result.rows, key=lambda row: -row.elbo)
    best = ranked[0]
    bound = diagnostics.khat_threshold(result.num_samples)
    words = f"{best.family}: test ELBO {best.elbo:.2f} nats"
    if len(ranked) > 1:
        second = ranked[1]
        lead = diagnostics.paired_difference(
            result.points[best.family].elbo, result.points[second.family].elbo
        )
        by = f"{float(lead.value):.2f} ± {_short(float(lead.se))} nats"
        words = (
            f"{best.family} has the highest test ELBO, {by} above {second.family}"
            if lead.value > 2 * lead.se
            else f"{best.family} and {second.family} share the highest test ELBO ({by} apart)"
        )
    if best.khat_bad <= _TRUSTED:
        return (
            f"{words}. Trust {best.family}: its k-hat is at most {bound:.2f} for"
            f" {1 - best.khat_bad:.0%} of the test data."
        )
    safest = min(result.rows, key=lambda row: row.khat_bad)
    advice = (
        ""
        if len(ranked) == 1 or safest.khat_bad == 1
        else (
            f" The draws of {safest.family} can be taken as they are (k-hat at most {bound:.2f} for"
            f" {1 - safest.khat_bad:.0%}), at {best.elbo - safest.elbo:.2f} nats less."
            if safest.khat_bad <= _TRUSTED
            else f" No family here is the posterior for all data; {safest.family} comes closest"
            f" ({1 - safest.khat_bad:.0%})."
        )
    )
    return (
        f"{words}. Bounds can be compared, but the draws of {best.family} are not the posterior's:"
        f" k-hat is above {bound:.2f} for {best.khat_bad:.0%} of the test data.{advice}"
    )
