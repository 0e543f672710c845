"""compare(): {name: guide} -> one row per variational family, and a verdict.

Two questions, by what is passed as the model:

- a model: every family trains its own copy of it, from the same initial weights on the same
  batches. What differs is the model-and-guide pair: a poor family bends the model to itself.
- a fitted model (`Fit.model`), or one without parameters: the guides alone are trained. What
  differs is inference: the evidence is one number, and the gap to it belongs to the family alone.

And two kinds of posterior. Where every latent belongs to one data point, the rows are means over
test data, which each guide can take. With latents that data points share, or autoguides, there is
one posterior, of the training data: bounds and k-hat are of all of them together, and test data
are judged by their log predictive density.
"""

from __future__ import annotations

__all__ = ["Comparison", "PerPoint", "Row", "Split", "compare"]

import csv
import io
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_vi import checkpoint, diagnostics, tables, verdict
from pyro_vi.batches import Batches, Data, moved
from pyro_vi.diagnostics import Estimate, khat_threshold
from pyro_vi.fitted import Fit
from pyro_vi.fitting import fit
from pyro_vi.marginals import MarginalErrors, marginal_errors, noise_floor
from pyro_vi.posterior import Posterior
from pyro_vi.program import checked_device, seeded

_MIN_DRAWS = 21  # fewer have no tail to fit a k-hat to

Array = npt.NDArray[np.float64]
_NAN = math.nan


class Split(Protocol):
    """Data in two parts, such as `pyro_vi.data.ImageData`."""

    @property
    def train(self) -> Any: ...

    @property
    def test(self) -> Any: ...


@dataclass(frozen=True)
class Row:
    """One family. NaN, or None, is what means nothing for the programs at hand.

    Bounds are in nats: per data point, mean over the data, where each has a posterior of its own;
    of all data together where the posterior is joint. `_se` are Monte Carlo standard errors.
    Differences are to the first family; paired over the data points where there are bounds of
    single ones, so that their `_se` says whether other data points would rank the families alike.
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
    bits_per_dim: float = _NAN  # -evidence in bits per observed value; for discrete data
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


@dataclass(frozen=True)
class PerPoint:
    """What stands behind a row, for each data point, (N,); or for all together, (1,)."""

    elbo: Array
    evidence: Array
    khat: Array
    ess: Array


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` returns; print it for the table.

    Attributes:
        rows: one per family, in the order given.
        fits: the fits by family.
        posteriors: the draws that the rows are made of, by family.
        points: the diagnostics of each data point by family; families without a density lack.
        data: the data that the posteriors are about, transformed.
        on_test: whether they are the test data.
        num_samples: posterior draws.
        shared: whether the model was frozen, so that there is one evidence for all families.
        reference: reference draws by site, (R, ...) each; empty without a reference.
        marginals: errors of every marginal against the reference, by family and site.
        noise: a row of what the reference's own Monte Carlo noise gives, or None.
    """

    rows: tuple[Row, ...]
    fits: dict[str, Fit]
    posteriors: dict[str, Posterior]
    points: dict[str, PerPoint]
    data: Data
    on_test: bool
    num_samples: int
    shared: bool
    reference: dict[str, Array]
    marginals: dict[str, dict[str, MarginalErrors]]
    noise: Row | None = None

    def __repr__(self) -> str:
        return f"Comparison of {', '.join(row.family for row in self.rows)}"

    @property
    def is_joint(self) -> bool:
        """Whether bounds and k-hat are of all data together."""
        return any(posterior.is_joint for posterior in self.posteriors.values())

    @property
    def best(self) -> Row:
        """The row with the highest ELBO.

        Raises:
            ValueError: no family has a bound.
        """
        bounded = [row for row in self.rows if not math.isnan(row.elbo)]
        if not bounded:
            raise ValueError("no family here has a bound: all hold their latents at a point")
        return max(bounded, key=lambda row: row.elbo)

    @property
    def verdict(self) -> str:
        """Which family to trust, and how far, in plain words."""
        return verdict.words(self)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the numbers warn of: collapsed posteriors, restarts that disagree."""
        return verdict.warnings(self)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Writes the rows to a file, every digit, one line per family; NaN is an empty cell.

        With a reference the last line is what its Monte Carlo noise gives.
        """
        names = [field.name for field in fields(Row)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for row in (*self.rows, *([self.noise] if self.noise else [])):
            cells = [getattr(row, name) for name in names]
            writer.writerow(["" if cell is None or cell != cell else cell for cell in cells])
        checkpoint.write(path, text.getvalue().encode())

    def __str__(self) -> str:
        words = [self.verdict, *(f"Warning: {warning}." for warning in self.warnings)]
        return "\n".join([*tables.lines(self), "", *(textwrap.fill(one, 100) for one in words)])


def compare(
    model: Callable[..., Any],
    guides: Mapping[str, Callable[..., Any]],
    data: Split | Data,
    *,
    num_samples: int = 1_000,
    reference: Any = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Fits each guide and judges it.

    Args:
        model: a Pyro program, of which each guide gets its own copy to train; or a fitted model
            (`Fit.model`), which stays as it is.
        guides: guides by name, autoguides among them; differences are to the first.
        data: has `train` and `test`, each as `fit` takes data; or data as `fit` takes them, which
            are then judged too.
        num_samples: posterior draws, for each data point or of all together; at least 21.
        reference: draws to hold the marginals against: a `pyro.infer.MCMC` that has run on this
            model, or arrays by latent or deterministic site, (R, *plates, *shape) each.
        seed: of the fits and of the draws.
        progress: whether to show progress bars.
        **options: as `fit` takes them: loss, optim, steps, batch_size, transform, restarts, ...; a
            transform is applied to the judged data too, once.

    Raises:
        ValueError: no guides, too few draws, a reference of other sites, or what `fit` refuses.

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
    if not guides:
        raise ValueError("expected at least one guide to compare, got none")
    if strangers := [name for name in guides if not isinstance(name, str)]:
        raise TypeError(f"expected guides by name, strings, got {strangers}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"expected a whole number of posterior draws, got {num_samples!r}")
    if num_samples < _MIN_DRAWS:
        raise ValueError(
            f"expected at least {_MIN_DRAWS} posterior draws for a k-hat, got {num_samples}"
        )
    samples = _samples(reference)
    train, test = _parts(data)
    transform = options.get("transform")
    device = checked_device(options.get("device"))
    with seeded(seed):
        judged = {
            name: moved(transform(part) if transform else part, device)
            for name, part in (("train", train), ("test", test))
            if part is not None
        }
    fits: dict[str, Fit] = {}
    for name, guide in guides.items():
        fits[name] = fit(
            model, guide, train, seed=seed, progress=name if progress else False, **options
        )
    joint = not all(fitted.local for fitted in fits.values())
    on_test = not joint and "test" in judged
    scored = judged["test" if on_test else "train"]
    posteriors = {}
    for name, fitted in fits.items():
        posterior = fitted.posterior(scored, num_samples, seed=seed)
        posteriors[name] = posterior.joint() if joint else posterior
    drawn = _reference(
        samples, next(iter(posteriors.values())), raw=hasattr(reference, "get_samples")
    )
    points = {name: _points(p) for name, p in posteriors.items() if not p.point}
    marginals = {name: _marginals(p, drawn) for name, p in posteriors.items() if drawn}
    predictive = {
        name: fitted.log_predictive_density(judged["test"], num_samples, seed=seed).value
        for name, fitted in fits.items()
        if joint and "test" in judged and fitted.amortized
    }
    rows = [
        _row(name, fits[name], posteriors[name], points, predictive, marginals.get(name, {}))
        for name in guides
    ]
    shared = not any(fitted.model_is_trained for fitted in fits.values())
    if shared:
        rows = _with_one_evidence(rows, trusted=khat_threshold(num_samples) if joint else None)
    noise = {name: noise_floor(values) for name, values in _common(drawn, posteriors).items()}
    return Comparison(
        rows=tuple(rows),
        fits=fits,
        posteriors=posteriors,
        points=points,
        data=scored,
        on_test=on_test,
        num_samples=num_samples,
        shared=shared,
        reference=drawn,
        marginals=marginals,
        noise=Row("reference", **_largest(noise)) if noise else None,
    )


def _parts(data: Any) -> tuple[Any, Any]:
    """Training data, and test data or None."""
    if hasattr(data, "train") and hasattr(data, "test"):
        return data.train, data.test
    if hasattr(data, "train") or hasattr(data, "test"):
        raise TypeError("expected data with train and test, got one of them alone")
    Batches(data)  # raises TypeError for what are no data
    return data, None


def _samples(reference: Any) -> dict[str, Tensor]:
    """Reference draws by site."""
    if reference is None:
        return {}
    samples = reference
    if hasattr(reference, "get_samples"):
        try:
            samples = reference.get_samples()
        except AttributeError:  # Pyro's own, of a chain that has not run
            samples = None
    if not isinstance(samples, Mapping) or not samples:
        got = "no draws" if isinstance(reference, Mapping) else type(reference).__name__
        raise TypeError(
            "expected as reference a pyro.infer.MCMC that has run, or arrays of draws by site, got"
            f" {got}"
        )
    return {name: torch.as_tensor(values).detach() for name, values in samples.items()}


def _reference(samples: dict[str, Tensor], posterior: Posterior, *, raw: bool) -> dict[str, Array]:
    """Reference draws as arrays; with deterministic sites where they are Pyro's (`raw`)."""
    if raw and posterior.programs is not None:
        samples = posterior.programs.completed(samples)
    return {name: values.double().cpu().numpy() for name, values in samples.items()}


def _common(drawn: Mapping[str, Array], posteriors: Mapping[str, Posterior]) -> dict[str, Array]:
    """The reference's draws of sites that the posteriors have too."""
    names = {name for posterior in posteriors.values() for name in posterior.sites}
    common = {name: values for name, values in drawn.items() if name in names}
    if drawn and not common:
        raise ValueError(
            f"expected reference draws of {sorted(names)}, or some of them, got {sorted(drawn)}"
        )
    return common


def _marginals(posterior: Posterior, drawn: Mapping[str, Array]) -> dict[str, MarginalErrors]:
    found = {}
    for name, values in _common(drawn, {"": posterior}).items():
        own = posterior.sites[name].double().numpy()
        if own.shape[1:] != values.shape[1:]:
            raise ValueError(
                f"site {name!r}: expected reference draws of shape (R, {_sizes(own)}), got"
                f" {values.shape}"
            )
        found[name] = marginal_errors(own, values)
    return found


def _sizes(draws: Array) -> str:
    return ", ".join(str(size) for size in draws.shape[1:])


def _largest(errors: Mapping[str, MarginalErrors]) -> dict[str, Any]:
    """The largest errors in size over all marginals, with their signs."""
    largest: dict[str, Any] = {}
    for row, name in (("mean_error", "mean"), ("sd_error", "sd"), ("wasserstein", "wasserstein")):
        values = np.concatenate([np.ravel(getattr(error, name)) for error in errors.values()])
        largest[row] = float(values[np.abs(values).argmax()])
    return largest


def _points(posterior: Posterior) -> PerPoint:
    return PerPoint(
        elbo=np.atleast_1d(posterior.elbo().value),
        evidence=np.atleast_1d(posterior.evidence().value),
        khat=np.atleast_1d(posterior.khat()),
        ess=np.atleast_1d(posterior.ess()),
    )


def _with_one_evidence(rows: list[Row], *, trusted: float | None) -> list[Row]:
    """The gaps to one evidence: a model that is not trained has one, and every row estimates it.

    Each family's own estimate is a lower bound in expectation, the looser the worse the family: a
    gap to it would flatter the worst. So the highest counts. But a joint estimate is one number,
    which may be high by chance: of those whose k-hat can be trusted the most precise counts.

    Args:
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


def _row(
    name: str,
    fitted: Fit,
    posterior: Posterior,
    points: Mapping[str, PerPoint],
    predictive: Mapping[str, Array],
    marginals: Mapping[str, MarginalErrors],
) -> Row:
    values: dict[str, Any] = {
        "parameters": fitted.parameters,
        "seconds_per_step": fitted.seconds / len(fitted.losses),
    }
    if name in points:
        values |= _bounds(name, posterior, points)
    if name in predictive:
        own, first = predictive[name], next(iter(predictive.values()))
        values |= _pair("predictive", _over_points(own))
        values |= _pair("predictive_difference", _over_points(own - first))
    if marginals:
        values |= _largest(marginals)
    if posterior.restarts and not posterior.point:
        values["rhat"] = max(float(np.max(one)) for one in posterior.rhat().values())
    return Row(name, **values)


def _bounds(name: str, posterior: Posterior, points: Mapping[str, PerPoint]) -> dict[str, Any]:
    own, first = points[name], next(iter(points.values()))
    evidence = diagnostics.mean_estimate(posterior.evidence())
    elbo = diagnostics.mean_estimate(posterior.elbo())
    if posterior.is_joint:  # observed sites outside the plate too
        reconstruction = sum(
            float(value.sum()) / posterior.num_draws for value in posterior.log_likelihood.values()
        )
    else:
        reconstruction = float(posterior.pointwise_log_likelihood().mean())
    bound = khat_threshold(posterior.num_draws)
    found: dict[str, Any] = {
        **_pair("elbo", elbo),
        **_pair("evidence", evidence),
        **_pair("gap", diagnostics.mean_estimate(posterior.kl_to_posterior())),
        "reconstruction": reconstruction,
        "kl": reconstruction - float(elbo.value),
        "khat_median": float(np.median(own.khat)),
        "khat_bad": float(np.mean(own.khat > bound)),
        "ess": float(np.median(own.ess)),
    }
    if own.elbo.size > 1:
        found |= _pair("elbo_difference", diagnostics.paired_difference(own.elbo, first.elbo))
        found |= _pair(
            "evidence_difference", diagnostics.paired_difference(own.evidence, first.evidence)
        )
        active = posterior.active_units().values()
        found["active_units"] = int(sum(units.sum() for units in active))
        found["latent_units"] = int(sum(units.size for units in active))
    else:
        found["elbo_difference"] = float(own.elbo[0] - first.elbo[0])
        found["evidence_difference"] = float(own.evidence[0] - first.evidence[0])
    if posterior.discrete and not posterior.is_joint:
        bits = -float(evidence.value) / (posterior.num_observed * math.log(2))
        found["bits_per_dim"] = bits
    return found


def _over_points(values: Array) -> Estimate:
    """Mean over data points, with the error that other data points would give it; NaN left out."""
    values = values[~np.isnan(values)]
    if values.size < 2:
        return Estimate(values.mean(), np.asarray(_NAN))
    return Estimate(values.mean(), values.std(ddof=1) / math.sqrt(values.size))


def _pair(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: float(estimate.value), f"{name}_se": float(estimate.se)}
