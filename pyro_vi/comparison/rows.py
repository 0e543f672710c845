"""The rows of a comparison: what is computed for each family, and what stands behind it.

Where a program has a posterior, a row is made of its draws; where it draws some of its steps alone,
as a diffusion does, of its bound step by step, and then there is neither evidence nor k-hat.
"""

from __future__ import annotations

__all__ = ["PerPoint", "Row", "elbos", "largest_errors", "make_rows", "with_one_evidence"]

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pyro_vi import diagnostics
from pyro_vi.comparison.marginals import MarginalErrors
from pyro_vi.diagnostics import Estimate, khat_threshold
from pyro_vi.inference import Fit
from pyro_vi.posterior import Posterior, StepBound

Array = npt.NDArray[np.float64]
_NAN = math.nan


@dataclass(frozen=True)
class Row:
    """One family, or program. NaN, or None, is what means nothing for the programs at hand.

    Bounds are in nats: per data point, mean over the data, where each has a posterior of its own;
    of all data together where the posterior is joint. `_se` are Monte Carlo standard errors.
    Differences are to the first family that has the quantity; paired over the data points where
    there are bounds of single ones, so that their `_se` says whether other data points would rank
    the families alike.
    """

    family: str
    elbo: float = _NAN
    elbo_se: float = _NAN
    elbo_difference: float = _NAN
    elbo_difference_se: float = _NAN
    evidence: float = _NAN  # importance-weighted, a lower bound on log p(x) in expectation
    evidence_se: float = _NAN
    evidence_difference: float = _NAN  # NaN if all families share one model, and so one evidence
    evidence_difference_se: float = _NAN
    gap: float = _NAN  # evidence - ELBO, an estimate of KL(q || posterior); one model: one evidence
    gap_se: float = _NAN
    reconstruction: float = _NAN
    kl: float = _NAN
    elbo_bits: float = _NAN  # -ELBO in bits per observed value (bits per dimension); discrete data
    evidence_bits: float = _NAN  # -evidence in the same unit
    khat_median: float = _NAN  # the k-hat itself, where the posterior is joint
    khat_bad: float = _NAN  # share of data points whose k-hat exceeds `khat_threshold(S)`
    ess: float = _NAN  # of the number of draws; median over data points
    predictive: float = _NAN  # log predictive density of a test data point; shared latents
    predictive_se: float = _NAN  # over test data points
    predictive_difference: float = _NAN
    predictive_difference_se: float = _NAN
    mean_error: float = _NAN  # the largest of all marginals, in the reference's standard deviations
    sd_error: float = _NAN  # sd / reference sd - 1, the largest in size
    wasserstein: float = _NAN  # the largest W1 distance of a marginal, in reference sd
    rhat: float = _NAN  # the largest over marginals, across restarts
    active_units: int | None = None
    latent_units: int | None = None
    parameters: int | None = None
    seconds_per_step: float = _NAN
    status: str = ""  # empty, "interrupted after <n> steps", "not fitted: <why>", "failed: <why>"


@dataclass(frozen=True)
class PerPoint:
    """What stands behind a row, for each data point, (N,); or for all together, (1,)."""

    elbo: Array
    evidence: Array
    khat: Array
    ess: Array

    @classmethod
    def of(cls, posterior: Posterior) -> PerPoint:
        """The diagnostics of a posterior that has a density."""
        return cls(
            elbo=np.atleast_1d(posterior.elbo().value),
            evidence=np.atleast_1d(posterior.evidence().value),
            khat=np.atleast_1d(posterior.khat()),
            ess=np.atleast_1d(posterior.ess()),
        )


def elbos(
    families: Iterable[str], points: Mapping[str, PerPoint], step_bounds: Mapping[str, StepBound]
) -> dict[str, Array]:
    """The bound of each data point, (N,), or of all together, (1,), of families that have one."""
    return {
        name: points[name].elbo if name in points else step_bounds[name].pointwise_elbo
        for name in families
        if name in points or name in step_bounds
    }


def make_rows(
    fits: Mapping[str, Fit],
    posteriors: Mapping[str, Posterior],
    step_bounds: Mapping[str, StepBound],
    points: Mapping[str, PerPoint],
    predictive: Mapping[str, Array],
    marginals: Mapping[str, Mapping[str, MarginalErrors]],
) -> list[Row]:
    """A row for each fit.

    Args:
        fits: the fits by family, in the order of the rows.
        posteriors, step_bounds: of each family the one or the other.
        points: the diagnostics of the posteriors that have a density.
        predictive: log predictive densities of test data, (N,), of families that have them.
        marginals: errors against a reference by site, of families that are held against one.
    """
    bounds = elbos(fits, points, step_bounds)
    rows = []
    for name, fitted in fits.items():
        values: dict[str, Any] = {
            "parameters": fitted.parameters,
            "seconds_per_step": fitted.seconds / max(1, len(fitted.losses)),
        }
        if fitted.interrupted:
            values["status"] = f"interrupted after {len(fitted.losses):,} steps"
        if name in points:
            values |= _of_draws(posteriors[name], points[name], next(iter(points.values())))
        if name in step_bounds:
            values |= _of_steps(step_bounds[name])
        if name in bounds:
            values |= _difference("elbo", bounds[name], next(iter(bounds.values())))
        if name in predictive:
            own, first = predictive[name], next(iter(predictive.values()))
            values |= _pair("predictive", _over_points(own))
            values |= _pair("predictive_difference", _over_points(own - first))
        if name in marginals:
            values |= largest_errors(marginals[name])
        if name in posteriors and posteriors[name].restarts and not posteriors[name].point:
            values["rhat"] = max(float(np.max(one)) for one in posteriors[name].rhat().values())
        rows.append(Row(name, **values))
    return rows


def with_one_evidence(rows: list[Row], *, trusted: float | None) -> list[Row]:
    """The gaps to one evidence: a model that is not trained has one, and every row estimates it.

    Each family's own estimate is a lower bound in expectation, the looser the worse the family: a
    gap to it would flatter the worst. So the highest counts. But a joint estimate is one number,
    which may be high by chance: of those whose k-hat can be trusted the most precise counts.

    Args:
        rows: as `make_rows` makes them.
        trusted: the k-hat to which a joint estimate is trusted; None for means over data points.
    """
    estimates = [row for row in rows if not math.isnan(row.evidence)]
    if not estimates:
        return rows
    best = max(estimates, key=lambda row: row.evidence)
    if trusted is not None and (safe := [r for r in estimates if r.khat_median <= trusted]):
        best = min(safe, key=lambda row: row.evidence_se)
    return [
        replace(
            row,
            evidence_difference=_NAN,
            evidence_difference_se=_NAN,
            gap=best.evidence - row.elbo,
            gap_se=row.gap_se if row is best else math.hypot(best.evidence_se, row.elbo_se),
        )
        for row in rows
    ]


def largest_errors(errors: Mapping[str, MarginalErrors]) -> dict[str, Any]:
    """The fields of a row for the largest errors in size over all marginals, with their signs."""
    largest: dict[str, Any] = {}
    for row, name in (("mean_error", "mean"), ("sd_error", "sd"), ("wasserstein", "wasserstein")):
        values = np.concatenate([np.ravel(getattr(error, name)) for error in errors.values()])
        largest[row] = float(values[np.abs(values).argmax()])
    return largest


def _of_draws(posterior: Posterior, own: PerPoint, first: PerPoint) -> dict[str, Any]:
    """What a posterior's draws say."""
    evidence = diagnostics.mean_estimate(posterior.evidence())
    elbo = diagnostics.mean_estimate(posterior.elbo())
    if posterior.is_joint:  # observed sites outside the plate too
        reconstruction = sum(
            float(value.sum()) / posterior.num_draws for value in posterior.log_likelihood.values()
        )
    else:
        reconstruction = float(posterior.pointwise_log_likelihood().mean())
    found: dict[str, Any] = {
        **_pair("elbo", elbo),
        **_pair("evidence", evidence),
        **_difference("evidence", own.evidence, first.evidence),
        **_pair("gap", diagnostics.mean_estimate(posterior.kl_to_posterior())),
        "reconstruction": reconstruction,
        "kl": reconstruction - float(elbo.value),
        "khat_median": float(np.median(own.khat)),
        "khat_bad": float(np.mean(own.khat > khat_threshold(posterior.num_draws))),
        "ess": float(np.median(own.ess)),
    }
    if own.elbo.size > 1:
        active = posterior.active_units().values()
        found["active_units"] = int(sum(units.sum() for units in active))
        found["latent_units"] = int(sum(units.size for units in active))
    if posterior.discrete and not posterior.is_joint:
        unit = posterior.num_observed * math.log(2)
        found["elbo_bits"] = -float(elbo.value) / unit
        found["evidence_bits"] = -float(evidence.value) / unit
    return found


def _of_steps(bound: StepBound) -> dict[str, Any]:
    """What a bound says that is known step by step."""
    found: dict[str, Any] = {
        **_pair("elbo", bound.elbo),
        "reconstruction": float(bound.reconstruction.value),
        "kl": float(bound.reconstruction.value - bound.elbo.value),
    }
    if bound.discrete:
        found["elbo_bits"] = float(bound.bits_per_dim.value)
    return found


def _difference(name: str, own: Array, first: Array) -> dict[str, float]:
    """A difference to the first family, paired over data points where there are several."""
    if own.size > 1:
        return _pair(f"{name}_difference", diagnostics.paired_difference(own, first))
    return {f"{name}_difference": float(own[0] - first[0])}


def _over_points(values: Array) -> Estimate:
    """Mean over data points, with the error that other data points would give it; NaN left out."""
    values = values[~np.isnan(values)]
    if values.size < 2:
        return Estimate(values.mean(), np.asarray(_NAN))
    return Estimate(values.mean(), values.std(ddof=1) / math.sqrt(values.size))


def _pair(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: float(estimate.value), f"{name}_se": float(estimate.se)}
