"""Draws from a fitted guide, with log p(x, z), log q(z | x) and log p(x | z).

The importance weights p(x, z) / q(z | x) of these draws carry every diagnostic: the ELBO is the
mean of their logarithm, the evidence the logarithm of their mean, and the tail of their
distribution (k-hat) says how far the guide may be trusted.

Where every site of model and guide stands inside the plate over data points, log p(x, z) is a sum
over data points of independent terms, and each data point has weights of its own: log_p and log_q
are (S, N). With a latent outside the plate (a global one), or an autoguide, whose parameters belong
to the data it was fitted to, there is one posterior of all data together: the weights are joint,
(S,), and so are bounds and k-hat.
"""

from __future__ import annotations

__all__ = ["Draws", "Loo", "Predictor", "WeightedDraws"]

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_vi import diagnostics
from pyro_vi.checks import check_count, check_seed
from pyro_vi.diagnostics import Estimate

Array = npt.NDArray[np.float64]
Draws = dict[str, Tensor]


@dataclass(frozen=True, repr=False)
class Loo:
    """Leave-one-out predictive density of each observation, from one fit to all of them.

    Print it for a summary in ArviZ's layout. ArviZ divides by N where `se` divides by N - 1.

    Attributes:
        elpd: sum of the log predictive densities of N observations, nats.
        se: its standard error over observations; NaN for one.
        p_loo: the effective number of parameters, sum_n log p(y_n | all) - elpd, nats.
        pointwise: log p(y_n | all others), nats; (N,), NaN where observations are masked.
        khat: Pareto k-hat of each observation's weights; likewise.
        num_draws: posterior draws (S).
    """

    elpd: float
    se: float
    p_loo: float
    pointwise: Array
    khat: Array
    num_draws: int

    def __repr__(self) -> str:
        khat = self.khat[~np.isnan(self.khat)]
        bound = float(diagnostics.khat_threshold(self.num_draws))
        good, bad = khat <= bound, (khat > bound) & (khat <= 1)
        counts = [int(some.sum()) for some in (good, bad, khat > 1)]
        wide = max(4, len(str(max(counts))))
        kinds = (
            f"(-Inf, {bound:.2f}]   (good)    ",
            f"   ({bound:.2f}, 1]   (bad)     ",
            "   (1, Inf)   (very bad)",
        )
        warned = "There has been a warning during the calculation. Please check the results."
        return "\n".join(
            [
                f"Computed from {self.num_draws} posterior samples and {khat.size} observations"
                " log-likelihood matrix.",
                "",
                "         Estimate       SE",
                f"elpd_loo {self.elpd:8.2f}  {self.se:7.2f}",
                f"p_loo    {self.p_loo:8.2f}        -",
                *(["", warned] if counts[0] < khat.size else []),
                "------",
                "",
                "Pareto k diagnostic values:",
                f"                         {'Count':>{wide}} {'Pct.':>6}",
                *(
                    f"{kind} {count:{wide}d} {100 * count / max(1, khat.size):6.1f}%"
                    for kind, count in zip(kinds, counts, strict=True)
                ),
            ]
        )


class Predictor(Protocol):
    """What draws predictions from a model and its guide; `pyro_vi.posterior.Scorer`."""

    def predictive(self, draws: Draws, *, seed: int = 0) -> Draws: ...

    def prior(self, num_samples: int, *, seed: int = 0) -> tuple[Draws, Draws]: ...

    def given_data(self) -> tuple[Draws, Draws]: ...

    def completed(self, samples: Mapping[str, Tensor]) -> Draws: ...


@dataclass(frozen=True, repr=False)
class WeightedDraws:
    """Draws from a guide, S of them, on the CPU.

    In every value the plates' axes come first, the plate over data points before all others; a
    value outside the plates has its own shape alone.

    Attributes:
        draws: values by latent site; each (S, *plates, *shape).
        deterministic: values by `pyro.deterministic` site; likewise.
        log_p: log p(x, z) in nats, float64; (S, N), or (S,) where the weights are joint.
        log_q: log q(z | x) in nats, float64; likewise.
        log_likelihood: log p(x | z) in nats by observed site, float64; (S, *plates). A site in no
            plate is told apart by element where its dimensions were declared by `to_event`. What
            is masked has a log-likelihood of 0.
        counts: how many observed values each element of the log-likelihood stands for, by observed
            site that is masked; each (*plates), 0 where all are masked.
        plates: sizes of the plates by name.
        dims: by latent, deterministic and observed site, the plates of its first axes.
        plate: the name of the plate over data points.
        num_observed: observed values in all data if the weights are joint; else in a data point,
            their mean where some are masked.
        discrete: whether all observed values are discrete.
        point: latent sites that the guide holds at a value (AutoDelta), or that follow from fewer
            numbers than they have: there is no density and no bound.
        restarts: one posterior for each restart of a fit with several, this one among them.
        training: loss, reconstruction and kl by step of the fit, (steps,) each.
        programs: the model, the guide and the data, to draw predictions from.
    """

    draws: Draws
    deterministic: Draws
    log_p: Tensor
    log_q: Tensor
    log_likelihood: Draws
    counts: Draws
    plates: dict[str, int]
    dims: dict[str, tuple[str, ...]]
    plate: str
    num_observed: float
    discrete: bool
    point: tuple[str, ...]
    restarts: tuple[WeightedDraws, ...] = ()
    training: Draws = field(default_factory=dict)
    programs: Predictor | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        about = "joint weights" if self.is_joint else f"{self.log_p.shape[1]:,} data points"
        return (
            f"{type(self).__name__}({self.num_draws:,} draws of {', '.join(self.draws)}; {about})"
        )

    @property
    def num_draws(self) -> int:
        """S."""
        return len(self.log_p)

    @property
    def sites(self) -> Draws:
        """Values by latent and deterministic site; each (S, *plates, *shape)."""
        return {**self.draws, **self.deterministic}

    @property
    def is_joint(self) -> bool:
        """Whether the weights are of all data together, (S,), not of single data points, (S, N)."""
        return self.log_p.dim() == 1

    @property
    def has_local_latents(self) -> bool:
        """Whether some latents belong to single data points."""
        return any(self.plate in self.dims[name] for name in self.draws)

    @property
    def log_weights(self) -> Array:
        """log p - log q, float64; (S, N) or (S,).

        Raises:
            ValueError: the guide holds latents at a point, where q has no density.
        """
        if self.point:
            raise ValueError(
                f"the guide holds {list(self.point)} at a point, or makes them of fewer numbers"
                " than they have: q has no density there, so that there are no bound, evidence or"
                " k-hat"
            )
        return (self.log_p - self.log_q).numpy()

    def joint(self) -> Self:
        """The same draws, with the weights of all data together."""
        if self.is_joint:
            return self
        return replace(self, log_p=self.log_p.sum(1), log_q=self.log_q.sum(1))

    def elbo(self) -> Estimate:
        """The ELBO with its Monte Carlo standard error; (N,) each, or scalars for all data."""
        return diagnostics.elbo(self.log_weights)

    def evidence(self) -> Estimate:
        """The importance-weighted evidence with its Monte Carlo standard error; likewise."""
        return diagnostics.log_evidence(self.log_weights)

    def kl_to_posterior(self) -> Estimate:
        """Evidence minus ELBO, an estimate of KL(q(z | x) || p(z | x)); likewise."""
        return diagnostics.kl_to_posterior(self.log_weights)

    def khat(self) -> Array:
        """The Pareto k-hat of the weights; (N,), or one number for all data."""
        return diagnostics.pareto_khat(self.log_weights)

    def ess(self) -> Array:
        """The importance effective sample size, from 1 to S; (N,) or one number."""
        return diagnostics.importance_ess(self.log_weights)

    def active_units(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Whether Var_x(E_q[z]) > 0.01, by latent site of single data points, and unit."""
        active = {}
        for name, values in self.draws.items():
            if self.dims[name][:1] == (self.plate,):
                draws = values.double().reshape(*values.shape[:2], -1).numpy()
                active[name] = diagnostics.active_units(draws)
        return active

    def pointwise_log_likelihood(self) -> Tensor:
        """log p(x_n | z) in nats of each data point, float64; (S, N).

        Sites inside the plate over data points are summed for each of its N data points. Without
        such a plate every observed element counts as one.
        """
        inside = [
            value.reshape(*value.shape[:2], -1).sum(-1)
            for name, value in self.log_likelihood.items()
            if self.dims[name][:1] == (self.plate,)
        ]
        if inside:
            return torch.stack(inside).sum(0)
        flat = [value.reshape(self.num_draws, -1) for value in self.log_likelihood.values()]
        return torch.cat(flat, dim=1) if flat else torch.zeros_like(self.log_p)

    def weights(self) -> Array:
        """Pareto-smoothed importance weights, which sum to 1 over the draws; (S, N) or (S,).

        sum_s weights_s f(z_s) estimates E[f(z)] under the exact posterior.

        Raises:
            ValueError: a k-hat of 1 or more: the weights have no mean.

        Warns:
            UserWarning: a k-hat above `diagnostics.khat_threshold(S)`: estimates are unreliable.

        References:
            Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling",
            arXiv:1507.02646.
        """
        khat = np.atleast_1d(self.khat())
        bound = diagnostics.khat_threshold(self.num_draws)
        of = "" if self.is_joint else f" for {int((khat >= 1).sum())} of {khat.size} data points"
        if (khat >= 1).any():
            raise ValueError(
                f"expected a k-hat below 1, got {khat.max():.2f}{of}: the importance weights have"
                " no mean, and cannot correct these draws"
                f"{'' if self.is_joint else '; choose the data points whose k-hat is lower'}"
            )
        if (khat > bound).any():
            of = "" if self.is_joint else f" for {int((khat > bound).sum())} of {khat.size} points"
            warnings.warn(
                f"k-hat is {khat.max():.2f}, above {bound:.2f}{of}: importance-corrected draws are"
                " unreliable there",
                stacklevel=2,
            )
        return np.exp(diagnostics.psis(self.log_weights))

    def resampled(self, num_samples: int | None = None, *, seed: int = 0) -> Draws:
        """Draws corrected towards the exact posterior: resampled with the smoothed weights.

        Sampling-importance-resampling: few draws may come many times. Where the weights are of
        single data points, each of them is resampled by itself, and latents outside the plate over
        data points cannot be.

        Args:
            num_samples: how many; S by default.
            seed: of the resampling.

        Returns:
            Values by latent and deterministic site; shapes as `draws`.

        Raises:
            ValueError: fewer than one draw; a k-hat of 1 or more.
        """
        num = self.num_draws if num_samples is None else num_samples
        check_count("posterior draw", num)
        check_seed(seed)
        weights = torch.from_numpy(self.weights())
        generator = torch.Generator().manual_seed(int(seed))
        index = torch.multinomial(weights.t(), num, replacement=True, generator=generator).t()
        found = {}
        for name, value in self.sites.items():
            if self.is_joint:
                found[name] = value[index]
            elif self.dims[name][:1] == (self.plate,):
                found[name] = value[index, torch.arange(index.shape[1])]
        return found

    def loo(self) -> Loo:
        """Leave-one-out cross-validation without refitting, corrected for the guide.

            log p(y_n | y_-n) ~ log ( sum_s v_s p(y_n | z_s) / sum_s v_s ),
            v_s = p(y, z_s) / q(z_s) / p(y_n | z_s),      Pareto-smoothed.

        The effective number of parameters is the loss in log density from leaving observations out,

            p_loo = sum_n log p(y_n | y) - sum_n log p(y_n | y_-n),
            log p(y_n | y) ~ log ( sum_s w_s p(y_n | z_s) / sum_s w_s ),
            w_s = p(y, z_s) / q(z_s),                     Pareto-smoothed.

        Latents of single data points are taken as they were drawn, with their own observations:
        to leave one out takes more than weights can give, and its k-hat will say so.

        Returns:
            `Loo`; its k-hats say for which observations to believe it.

        Raises:
            ValueError: weights of single data points, whose posteriors leave nothing out; an
                observation that is impossible under some draws; a model without observations.

        Warns:
            UserWarning: a k-hat above `diagnostics.khat_threshold(S)`.

        References:
            Magnusson, Andersen, Jonasson, Vehtari, "Bayesian leave-one-out cross-validation for
            large data", arXiv:1904.10679 (for v_s).
            Vehtari, Gelman, Gabry, "Practical Bayesian model evaluation using leave-one-out
            cross-validation and WAIC", arXiv:1507.04544 (for p_loo).
        """
        if not self.is_joint:
            raise ValueError(
                "leave-one-out needs a latent that the data points share: here each has its own"
                " posterior, and nothing is left out of the others'"
            )
        if not self.log_likelihood:
            raise ValueError("leave-one-out needs observations, but the model has none")
        counted = self.observed_points().numpy()
        likelihood = self.pointwise_log_likelihood().numpy()[:, counted]
        if excluded := int(np.isneginf(likelihood).any(0).sum()):
            raise ValueError(
                f"{excluded} of {counted.sum()} observations are impossible under some draws (a"
                " log-likelihood of -inf): what these draws would weigh without them is not known"
            )
        log_v = self.log_weights[:, None] - likelihood
        smoothed = diagnostics.psis(log_v)
        elpd = np.asarray(np.logaddexp.reduce(smoothed + likelihood, axis=0))
        found, bound = diagnostics.pareto_khat(log_v), diagnostics.khat_threshold(self.num_draws)
        if (bad := int((found > bound).sum())) > 0:
            warnings.warn(
                f"k-hat is above {bound:.2f} for {bad} of {found.size} observations: leave-one-out"
                " densities are unreliable there",
                stacklevel=2,
            )
        weights = diagnostics.psis(self.log_weights)[:, None]
        lppd = np.logaddexp.reduce(weights + likelihood, axis=0)
        spread = elpd.std(ddof=1) if elpd.size > 1 else math.nan
        pointwise, khat = np.full((2, counted.size), math.nan)
        pointwise[counted], khat[counted] = elpd, found
        return Loo(
            elpd=float(elpd.sum()),
            se=float(math.sqrt(elpd.size) * spread),
            p_loo=float(lppd.sum() - elpd.sum()),
            pointwise=pointwise,
            khat=khat,
            num_draws=self.num_draws,
        )

    def observed_points(self) -> Tensor:
        """Which columns of the pointwise log-likelihood are not masked as a whole; (N,), bool."""
        counts = {
            name: self.counts.get(name, torch.ones(value.shape[1:])) > 0
            for name, value in self.log_likelihood.items()
        }
        inside = [
            some.reshape(len(some), -1).any(1)
            for name, some in counts.items()
            if self.dims[name][:1] == (self.plate,)
        ]
        if inside:
            return torch.stack(inside).any(0)
        return torch.cat([some.flatten() for some in counts.values()])

    def rhat(self) -> dict[str, Array]:
        """R-hat across restarts, by latent and deterministic site; each of the site's shape.

        The draws of one fit are independent, so that this says whether the restarts agree, and
        nothing about how good their common answer is.

        Raises:
            ValueError: a fit without restarts.
        """
        if len(self.restarts) < 2:
            raise ValueError("R-hat compares restarts: fit(..., restarts=4)")
        chains = [one.sites for one in self.restarts]
        return {
            name: diagnostics.rhat(np.stack([chain[name].double().numpy() for chain in chains]))
            for name in chains[0]
        }

    def predictive(self, *, seed: int = 0) -> Draws:
        """One draw of every observed site for each posterior draw; (S, *plates, *shape) each.

        Raises:
            ValueError: no latents; a likelihood that cannot be drawn from.
        """
        assert self.programs is not None
        return self.programs.predictive(self.draws, seed=seed)

    def prior(self, num_samples: int | None = None, *, seed: int = 0) -> tuple[Draws, Draws]:
        """Draws from the model's prior: latent and deterministic sites, and observed ones.

        Raises:
            ValueError: fewer than one draw; a prior that cannot be drawn from (a flat one).
        """
        num = self.num_draws if num_samples is None else num_samples
        check_count("posterior draw", num)
        assert self.programs is not None
        return self.programs.prior(num, seed=seed)

    def data(self) -> tuple[Draws, Draws]:
        """The data by observed site, and the programs' other tensors by name."""
        assert self.programs is not None
        return self.programs.given_data()
