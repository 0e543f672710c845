"""Posteriors of all data together: exact weights, evidence, gaps, corrections, leave-one-out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import (
    gamma_poisson,
    gamma_poisson_guide,
    global_and_local,
    global_and_local_guide,
    normal_mean,
    normal_mean_guide,
)
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor

from pyro_vi import diagnostics, fit
from pyro_vi.models import LinearGaussian
from pyro_vi.posterior import Loo, Posterior, Scorer

torch.set_num_threads(1)

COUNTS = torch.tensor([1.0, 0.0, 2.0]).double()
Guide = Callable[[Tensor], Any]


def data(num: int = 8) -> Tensor:
    return 0.5 + torch.randn(num, dtype=torch.float64)


def conjugate(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the mean's posterior, for x ~ N(mean, 1) and mean ~ N(0, 4)."""
    variance = 1 / (x.new_tensor(0.25) + len(x))
    return x.sum() * variance, variance


def conjugate_guide(seen: Tensor) -> Guide:
    mean, variance = conjugate(seen)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(mean, variance.sqrt()))

    return guide


def log_marginal(x: Tensor) -> Tensor:
    covariance = torch.eye(len(x)).double() + 4
    return dist.MultivariateNormal(x.new_zeros(len(x)), covariance).log_prob(x)


def target(num: int) -> Callable[[Tensor], Any]:
    """A standard normal in `num` dimensions, whatever the data."""

    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x.new_zeros(num), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return model


def proposal(num: int, loc: float, scale: float) -> Guide:
    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x.new_full((num,), loc), scale).to_event(1))

    return guide


def of(model: Any, guide: Any, x: Any, num: int = 1_000, seed: int = 0) -> Posterior:
    return Scorer(model, guide, x).posterior(num, seed=seed)


# Known answers


def test_an_exact_guide_weighs_every_draw_by_the_evidence() -> None:
    x = data()
    posterior = of(normal_mean, conjugate_guide(x), x, 200)
    assert posterior.is_joint and posterior.log_weights.shape == (200,)
    np.testing.assert_allclose(posterior.log_weights, float(log_marginal(x)), atol=1e-10)
    assert posterior.log_weights.std() < 1e-10
    assert posterior.khat() == -math.inf
    assert posterior.evidence().value == pytest.approx(float(log_marginal(x)), abs=1e-10)
    assert posterior.kl_to_posterior().value == pytest.approx(0, abs=1e-10)
    assert posterior.ess() == pytest.approx(200)
    assert np.shape(posterior.elbo().value) == np.shape(posterior.khat()) == ()
    assert not posterior.has_local_latents and posterior.active_units() == {}


def test_counts_of_a_gamma_rate() -> None:
    a, b, n, total = 2.0, 1.0, len(COUNTS), float(COUNTS.sum())
    evidence = (
        a * math.log(b)
        - (a + total) * math.log(b + n)
        + math.lgamma(a + total)
        - math.lgamma(a)
        - sum(math.lgamma(1 + count) for count in COUNTS.tolist())
    )
    posterior = of(gamma_poisson, gamma_poisson_guide, COUNTS, 200)
    np.testing.assert_allclose(posterior.log_weights, evidence, atol=1e-10)
    assert posterior.discrete and posterior.num_observed == 3


def test_the_gap_of_a_lognormal_guide_on_a_gamma_posterior() -> None:
    """min KL = ln G(a) - [a ln a - a + 1/2 ln(2 pi / a)], at variance 1 / a of the logarithm."""
    a, b = 2 + float(COUNTS.sum()), 1 + len(COUNTS)

    def guide(x: Tensor) -> None:
        loc = x.new_tensor(math.log(a / b) - 0.5 / a)
        pyro.sample("rate", dist.LogNormal(loc, a**-0.5))

    gap = math.lgamma(a) - (a * math.log(a) - a + 0.5 * math.log(2 * math.pi / a))
    assert a == 5 and gap == pytest.approx(0.016645, abs=1e-6)
    kl = of(gamma_poisson, guide, COUNTS, 40_000).kl_to_posterior()
    assert kl.se < gap / 10
    assert abs(kl.value - gap) < 4 * kl.se


# Bayesian linear regression with a known noise scale


class Regression:
    """y ~ N(X w, s^2), w ~ N(0, 1): precision P = X'X / s^2 + 1, mean P^-1 X'y / s^2."""

    def __init__(self) -> None:
        z = torch.randn(20, 1, dtype=torch.float64)
        self.x = z + 0.7 * torch.randn(20, 3, dtype=torch.float64)  # correlated: P is not diagonal
        self.y = self.x.sum(1) + torch.randn(20, dtype=torch.float64)
        self.precision = self.x.T @ self.x + torch.eye(3).double()
        self.mean = torch.linalg.solve(self.precision, self.x.T @ self.y)
        self.covariance = torch.linalg.inv(self.precision)
        marginal = self.x @ self.x.T + torch.eye(20).double()
        zero = torch.zeros(20).double()
        self.evidence = float(dist.MultivariateNormal(zero, marginal).log_prob(self.y))

    def model(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    def full(self, x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.MultivariateNormal(self.mean, precision_matrix=self.precision))

    def mean_field(self, x: Tensor, y: Tensor) -> None:
        scale = self.precision.diagonal().rsqrt()
        pyro.sample("w", dist.Normal(self.mean, scale).to_event(1))

    def posterior(self, guide: Any, num: int) -> Posterior:
        return of(self.model, guide, (self.x, self.y), num)


def test_the_full_covariance_guide_of_a_regression_is_exact() -> None:
    oracle = Regression()
    posterior = oracle.posterior(oracle.full, 300)
    np.testing.assert_allclose(posterior.log_weights, oracle.evidence, atol=1e-10)
    np.testing.assert_allclose(posterior.elbo().value, oracle.evidence, atol=1e-10)


def test_the_mean_field_gap_of_a_regression_and_its_correction() -> None:
    oracle = Regression()
    posterior = oracle.posterior(oracle.mean_field, 20_000)
    p = oracle.precision
    gap = 0.5 * float(p.diagonal().log().sum() - torch.logdet(p))
    kl, elbo = posterior.kl_to_posterior(), posterior.elbo()
    assert gap > 10 * elbo.se and abs(kl.value - gap) < 5 * kl.se
    assert abs(elbo.value - (oracle.evidence - gap)) < 5 * elbo.se
    assert posterior.khat() < 0.7
    # the marginal variances of q are 1 / P_jj, too small; the weights put them right
    draws, resampled = posterior.draws["w"], posterior.resampled(seed=1)["w"]
    weights = torch.from_numpy(posterior.weights())
    centred = draws - weights @ draws
    weighted = (weights[:, None] * centred).T @ centred
    for corrected in (weighted, torch.cov(resampled.T)):
        before = torch.linalg.norm(torch.cov(draws.T) - oracle.covariance)
        after = torch.linalg.norm(corrected - oracle.covariance)
        assert after < before / 3


def test_a_local_posterior_taken_together_is_the_sum_over_data_points() -> None:
    model = LinearGaussian(torch.randn(4, 2).double(), torch.zeros(4).double(), 0.8)
    x = torch.randn(5, 4, dtype=torch.float64)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(model.posterior(x).mean, 0.6).to_event(1))

    local = of(model, guide, x, 400)
    joint = local.joint()
    assert local.log_p.shape == (400, 5) and joint.log_p.shape == (400,)
    assert joint.is_joint and not local.is_joint and joint.joint() is joint
    np.testing.assert_allclose(joint.log_weights, local.log_weights.sum(1), atol=1e-10)
    assert joint.elbo().value == pytest.approx(local.elbo().value.sum())
    assert joint.draws is local.draws and joint.has_local_latents


# Weights and resampling


def test_weights_estimate_the_exact_posteriors_mean() -> None:
    """N(0, 1) from N(0.5, 1): resampling takes the draws' mean back to 0."""
    x = data(3)
    posterior = of(target(1), proposal(1, 0.5, 1.0), x, 4_000)
    weights, z = posterior.weights(), posterior.draws["z"][:, 0]
    assert weights.shape == (4_000,) and weights.sum() == pytest.approx(1)
    assert (weights > 0).all()
    se = math.sqrt(float(weights**2 @ z.numpy() ** 2))
    assert abs(float(weights @ z.numpy())) < 4 * se
    resampled = posterior.resampled(seed=3)["z"]
    assert abs(float(resampled.mean())) < 4 * (se + 4_000**-0.5) < abs(float(z.mean()))


def test_resampled_draws_are_draws_and_the_seed_is_all_the_randomness() -> None:
    x = data(6)
    posterior = of(global_and_local, partial(wide_guide, seen=x), x, 500)
    state = torch.get_rng_state()
    first = posterior.resampled(300, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert first["mean"].shape == (300,) and first["z"].shape == (300, 6)
    again, other = posterior.resampled(300, seed=5), posterior.resampled(300, seed=6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mean"], other["mean"])
    assert posterior.resampled()["mean"].shape == (500,)
    # a global draw keeps its local ones
    index = {float(mean): i for i, mean in enumerate(posterior.draws["mean"])}
    for mean, z in zip(first["mean"], first["z"], strict=True):
        assert torch.equal(z, posterior.draws["z"][index[float(mean)]])


def wide_guide(x: Tensor, seen: Tensor) -> None:
    """A little wider than the exact one of `global_and_local`."""
    precision = 1 + len(seen) / 1.25
    loc = seen.sum() / 1.25 / precision
    mean = pyro.sample("mean", dist.Normal(loc, 1.1 * precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((mean + 4 * x) / 5, 0.2**0.5))


def test_local_posteriors_are_resampled_data_point_by_data_point() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.deterministic("sum", z.sum(-1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = torch.stack([x / 2 + 0.3, torch.zeros_like(x)], -1)
            pyro.sample("z", dist.Normal(loc, 0.8).to_event(1))

    x = data(4)
    posterior = of(model, guide, x, 3_000)
    found = posterior.resampled(2_000, seed=1)
    assert found["z"].shape == (2_000, 4, 2) and posterior.weights().shape == (3_000, 4)
    torch.testing.assert_close(found["sum"], found["z"].sum(-1))
    before = (posterior.draws["z"][..., 0].mean(0) - x / 2).abs()
    after = (found["z"][..., 0].mean(0) - x / 2).abs()
    assert (before > 0.25).all() and (after < 5 * (0.5 / 500) ** 0.5).all()
    for n in range(4):  # no draws of other data points
        assert set(found["z"][:, n, 0].tolist()) <= set(posterior.draws["z"][:, n, 0].tolist())


def test_weights_without_a_mean_are_refused_and_unreliable_ones_warned_of() -> None:
    x = data(3)
    narrow = of(target(20), proposal(20, 0.0, 0.3), x, 500)
    assert narrow.khat() >= 1
    for call in (narrow.weights, narrow.resampled):
        with pytest.raises(ValueError, match=r"expected a k-hat below 1, got \d.*cannot correct"):
            call()
    between = of(target(1), proposal(1, 0.0, 0.42), x, 20_000)  # k = 1 - 0.42^2
    assert diagnostics.khat_threshold(20_000) < between.khat() < 1
    with pytest.warns(UserWarning, match=r"k-hat is 0\.\d\d, above 0\.\d\d: importance-corrected"):
        weights = between.weights()
    assert weights.sum() == pytest.approx(1)


def test_refusals_count_the_data_points() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        scale = torch.where(x < 0, 0.3, 1.0).double()[:, None]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(20), scale).to_event(1))

    with pytest.raises(ValueError, match=r"for 2 of 5 data points.*whose k-hat is lower"):
        of(model, guide, torch.tensor([-1.0, -0.5, 0.5, 1.0, 1.5]).double(), 500).weights()


@pytest.mark.parametrize("num", [0, -1, True, 2.0])
def test_impossible_numbers_of_resampled_draws(num: Any) -> None:
    x = data(3)
    with pytest.raises(ValueError, match=f"at least one posterior draw, got {num!r}"):
        of(target(1), proposal(1, 0.0, 1.0), x, 100).resampled(num)


# Leave-one-out


def test_leave_one_out_is_exact_where_it_is_known() -> None:
    """v_s = 1 / p(y_n | z_s) under an exact guide; the error is that of the mean of these."""
    x = data(12)
    posterior = of(normal_mean, conjugate_guide(x), x, 20_000)
    loo = posterior.loo()
    exact = []
    for n in range(12):
        others = torch.cat([x[:n], x[n + 1 :]])
        mean, variance = conjugate(others)
        exact.append(float(dist.Normal(mean, (1 + variance).sqrt()).log_prob(x[n])))
    v = posterior.pointwise_log_likelihood().neg().exp()
    se = (v.std(0) / v.mean(0)).numpy() / math.sqrt(20_000)
    assert (np.abs(loo.pointwise - exact) < 5 * se).all()
    assert loo.elpd == pytest.approx(loo.pointwise.sum())
    assert loo.se == pytest.approx(math.sqrt(12) * loo.pointwise.std(ddof=1))
    assert loo.khat.shape == (12,) and (loo.khat < 0.7).all()
    mean, variance = conjugate(x)
    inside = dist.Normal(mean, (1 + variance).sqrt()).log_prob(x)
    p = posterior.pointwise_log_likelihood().exp()
    error = math.hypot(*se, *(p.std(0) / p.mean(0)).numpy() / math.sqrt(20_000))
    assert loo.p_loo == pytest.approx(float(inside.sum()) - sum(exact), abs=5 * error)
    assert loo.num_draws == 20_000


def test_leave_one_out_corrects_for_the_guide() -> None:
    """A guide that is shifted and wide gives the same answer, by its weights."""
    x = data(12)
    mean, variance = conjugate(x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(mean + 0.2, 1.5 * variance.sqrt()))

    exact = of(normal_mean, conjugate_guide(x), x, 20_000).loo()
    found = of(normal_mean, guide, x, 20_000).loo()
    assert found.elpd == pytest.approx(exact.elpd, abs=0.05)
    assert found.p_loo == pytest.approx(exact.p_loo, abs=0.05)
    plain = of(normal_mean, guide, x, 20_000).pointwise_log_likelihood().neg()
    wrong = -float((torch.logsumexp(plain, 0) - math.log(20_000)).sum())
    assert abs(wrong - exact.elpd) > 0.15


@pytest.mark.filterwarnings("ignore:k-hat is above")
def test_leave_one_out_without_a_plate_takes_out_elements() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        pyro.sample("x", dist.Normal(mean, 1.0).expand([len(x)]).to_event(1), obs=x)

    x = data(5)
    guide = conjugate_guide(x)
    np.testing.assert_allclose(
        of(model, guide, x, 100).loo().pointwise,
        of(normal_mean, guide, x, 100).loo().pointwise,
        atol=1e-10,
    )


def test_leave_one_out_warns_of_what_it_cannot_know() -> None:
    """Leaving out the one observation leaves the prior, which is far wider than the guide."""
    x = data(1)
    with pytest.warns(UserWarning, match="k-hat is above 0.50 for 1 of 1 observations"):
        of(normal_mean, conjugate_guide(x), x, 100).loo()


def test_leave_one_out_is_printed_as_a_summary() -> None:
    khat = np.array([-np.inf, 0.3, np.nan, 0.65, 0.7, 0.9, 1.0, 1.1])
    loo = Loo(-123.456, 7.891, 2.5, np.full(8, np.nan), khat, num_draws=500)
    text = """\
Computed from 500 posterior samples and 7 observations log-likelihood matrix.

         Estimate       SE
elpd_loo  -123.46     7.89
p_loo        2.50        -

There has been a warning during the calculation. Please check the results.
------

Pareto k diagnostic values:
                         Count   Pct.
(-Inf, 0.63]   (good)        2   28.6%
   (0.63, 1]   (bad)         4   57.1%
   (1, Inf)   (very bad)    1   14.3%"""
    assert repr(loo) == str(loo) == text


@pytest.mark.filterwarnings("ignore:k-hat is above")
def test_one_observation_has_no_standard_error() -> None:
    x = data(1)
    assert math.isnan(of(normal_mean, conjugate_guide(x), x, 100).loo().se)


@pytest.mark.parametrize("by_hand", [False, True])
def test_masked_observations_do_not_count(by_hand: bool) -> None:
    x = data(6)
    known = torch.tensor([True, True, False, True, False, True])

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        fn = dist.Normal(mean, 1.0)
        with pyro.plate("data", len(x)):
            if by_hand:
                pyro.sample("x", fn.expand([len(x)]).mask(known), obs=x)
            else:
                with poutine.mask(mask=known):
                    pyro.sample("x", fn, obs=x)

    guide = conjugate_guide(x[known])
    posterior = of(model, guide, x, 2_000)
    loo, expected = posterior.loo(), of(normal_mean, guide, x[known], 2_000).loo()
    assert posterior.num_observed == 4
    assert (loo.elpd, loo.se) == pytest.approx((expected.elpd, expected.se), abs=1e-9)
    np.testing.assert_allclose(loo.pointwise[known.numpy()], expected.pointwise, atol=1e-9)
    assert np.isnan(loo.pointwise[~known.numpy()]).all() and np.isnan(loo.khat[2])


def test_masked_values_of_single_data_points_do_not_count() -> None:
    known = torch.tensor([[True, True, False], [True, False, False]]).repeat(100, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            with pyro.plate("value", 3), poutine.mask(mask=known[: len(x)].T):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_tensor(0.0), 0.7))

    posterior = Scorer(model, guide, torch.randn(200, 3).double()).posterior(1_000, local=True)
    assert posterior.log_p.shape == (1_000, 200)
    assert posterior.num_observed == 1.5
    assert torch.equal(posterior.counts["x"], known.double())


@pytest.mark.filterwarnings("ignore:k-hat is above")
def test_values_that_are_masked_within_a_data_point() -> None:
    """The usual idiom, and data points of which nothing is known."""
    known = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        with pyro.plate("data", len(x)):
            fn = dist.Normal(mean, 1.0).expand(x.shape)
            pyro.sample("x", fn.mask(known).to_event(1), obs=x)

    x = torch.randn(3, 3).double()
    posterior = of(model, conjugate_guide(x[known]), x, 500)
    assert posterior.num_observed == 3
    assert posterior.counts["x"].tolist() == [2, 0, 1]
    assert np.isnan(posterior.loo().pointwise).tolist() == [False, True, False]


def test_a_factor_outside_the_plates_observes_nothing() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        pyro.factor("penalty", -mean.square())
        pyro.sample("x", dist.Normal(mean, 1.0).expand([len(x)]).to_event(1), obs=x)

    x = data(5)
    posterior = of(model, conjugate_guide(x), x, 500)
    assert posterior.log_likelihood.keys() == {"x"}
    assert posterior.loo().pointwise.shape == (5,)
    plain = of(normal_mean, conjugate_guide(x), x, 500)
    penalty = -posterior.draws["mean"].square()
    torch.testing.assert_close(posterior.log_p, plain.log_p + penalty, atol=1e-9, rtol=0)


@pytest.mark.filterwarnings("ignore:k-hat is above")
def test_factors_are_the_observations_where_there_are_no_others() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        with pyro.plate("data", len(x)):
            pyro.factor("x", dist.Normal(mean, 1.0).log_prob(x))

    x = data(5)
    found, plain = (of(one, conjugate_guide(x), x, 500).loo() for one in (model, normal_mean))
    np.testing.assert_allclose(found.pointwise, plain.pointwise, atol=1e-9)


def test_observations_that_are_impossible_under_some_draws_are_named() -> None:
    def model(x: Tensor) -> None:
        top = pyro.sample("top", dist.Uniform(x.new_tensor(0.0), 9.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(0.0, top, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("top", dist.Uniform(x.new_tensor(1.0), 9.0))

    x = torch.tensor([0.5, 1.5, 2.0]).double()
    with pytest.raises(ValueError, match="2 of 3 observations are impossible under some draws"):
        of(model, guide, x, 100).loo()


def test_leave_one_out_without_observations() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))

    with pytest.raises(ValueError, match="needs observations, but the model has none"):
        of(model, conjugate_guide(data()), data(), 100).loo()


@pytest.mark.parametrize("way", ["obs_mask", "mask"])
def test_latents_that_count_on_one_side_alone_are_refused(way: str) -> None:
    known = torch.tensor([True, True, False, True, False, True])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if way == "obs_mask":
                pyro.sample("x", dist.Normal(x.new_tensor(0.0), 1.0), obs=x, obs_mask=known)
            else:
                with poutine.mask(mask=known):
                    z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="masked otherwise in the model than in the guide"):
        fit(model, AutoNormal(model), data(6).float(), steps=1, progress=False)


def test_a_column_is_no_row() -> None:
    """It would broadcast to a square, and every density be a sum over all pairs."""
    x = data(6)
    for other in (x[:, None], x[None, :, None]):
        with pytest.raises(ValueError, match="invalid log_prob shape"):
            of(normal_mean, conjugate_guide(x), other, 20)


def test_leave_one_out_needs_latents_that_are_shared() -> None:
    model = LinearGaussian(torch.ones(4, 2), torch.zeros(4), 1.0)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    with pytest.raises(ValueError, match="needs a latent that the data points share"):
        of(model, guide, torch.randn(3, 4), 50).loo()


# Point estimates and restarts


def test_a_point_has_no_density() -> None:
    x = data().float()
    guide = AutoDelta(global_and_local)
    guide(x)
    for num in (1, 50):
        posterior = of(global_and_local, guide, x, num)
        assert posterior.point == ("mean", "z")
        assert (posterior.draws["mean"] == posterior.draws["mean"][0]).all()
    for call in (posterior.elbo, posterior.evidence, posterior.khat, posterior.ess, posterior.loo):
        with pytest.raises(ValueError, match=r"holds \['mean', 'z'\] at a point, or makes"):
            call()
    assert posterior.predictive()["x"].shape == (50, 8)
    assert posterior.log_likelihood["x"].shape == (50, 8)


def test_latents_that_follow_from_others_have_no_density() -> None:
    """Two numbers made of one: q lives on a curve."""

    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(x.new_tensor(0.0), 1.0))
        b = pyro.sample("b", dist.LogNormal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a, b), obs=x)

    kinds = {"a": "normal", "b": "delta"}
    x = data().float()
    guide = AutoStructured(model, conditionals=kinds, dependencies={"b": {"a": "linear"}})
    guide(x)
    guide.deps.b.a.weight.data.fill_(0.5)
    posterior = of(model, guide, x, 50)
    assert len(posterior.draws["b"].unique()) == 50
    assert posterior.point == ("a", "b")
    with pytest.raises(ValueError, match="or makes them of fewer numbers than they have"):
        posterior.elbo()
    for kind in ("normal", "mvn"):
        both = dict.fromkeys("ab", kind)
        whole = AutoStructured(model, conditionals=both, dependencies={"b": {"a": "linear"}})
        whole(x)
        assert of(model, whole, x, 50).point == ()


def test_constrained_values_have_fewer_numbers_than_elements() -> None:
    def model(x: Tensor) -> None:
        probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(probs), obs=x)

    x = torch.tensor([0, 1, 1, 2])
    for kind in (AutoNormal, AutoMultivariateNormal):
        guide = kind(model)
        guide(x)
        assert of(model, guide, x, 50).point == ()


def test_r_hat_compares_restarts() -> None:
    x = data().float()
    once = fit(normal_mean, normal_mean_guide, x, steps=3, progress=False).posterior(x, 100)
    with pytest.raises(ValueError, match=r"R-hat compares restarts: fit\(..., restarts=4\)"):
        once.rhat()
    options: dict[str, Any] = {"optim": partial(torch.optim.Adam, lr=0.1), "progress": False}
    twice = fit(normal_mean, normal_mean_guide, x, steps=150, restarts=2, **options)
    posterior = twice.posterior(x, 1_000)
    assert len(posterior.restarts) == 2 and posterior.restarts[0].restarts == ()
    assert set(posterior.rhat()) == {"mean"} and posterior.rhat()["mean"] < 1.05


@pytest.mark.filterwarnings("ignore:the restarts disagree")
def test_r_hat_sees_restarts_that_ended_apart() -> None:
    x = data().float()

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", x.new_tensor(0.0))
        pyro.sample("mean", dist.Normal(loc, 0.1))

    apart = fit(normal_mean, guide, x, steps=1, restarts=3, progress=False)
    assert apart.posterior(x, 200).rhat()["mean"] > 1.5


# Whose data


def test_other_data_and_plates_of_other_sizes_are_refused() -> None:
    x = data().float()
    joint = fit(normal_mean, normal_mean_guide, x, steps=2, progress=False)
    for other in (x + 1, x[:4]):
        with pytest.raises(ValueError, match="expected the data that the guide was fitted to"):
            joint.posterior(other, 30)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("item", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        weight = pyro.param("weight", x.new_tensor(0.5))
        with pyro.plate("data", len(x), dim=-2), pyro.plate("item", x.shape[1], dim=-1):
            pyro.sample("z", dist.Normal(weight * x, 1.0))

    local = fit(model, guide, torch.randn(6, 3), steps=2, progress=False)
    assert local.posterior(torch.randn(4, 3), 30).log_p.shape == (30, 4)
    with pytest.raises(ValueError, match=r"plate 'item' has 2 elements, and had 3 in the fit"):
        local.posterior(torch.randn(4, 2), 30)


def test_a_posterior_says_what_it_is() -> None:
    x = data()
    said = repr(of(global_and_local, global_and_local_guide, x, 1_000))
    assert said == "Posterior(1,000 draws of mean, z; joint weights)"
