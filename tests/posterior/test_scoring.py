"""Programs and data: predictive and prior draws, predictive densities, posteriors given globals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from example_programs import global_and_local, normal_mean
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vi import fit
from pyro_vi.families import MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE, LinearGaussian
from pyro_vi.posterior import Scorer, vectorize

torch.set_num_threads(1)

X = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4]).double()
NEW = torch.tensor([-2.0, 0.0, 0.5, 3.0]).double()


def normal_guide(x: Tensor) -> None:
    """The posterior of `normal_mean` given X, whatever the data are."""
    precision = 0.25 + len(X)
    pyro.sample("mean", dist.Normal(X.sum() / precision, precision**-0.5))


def hierarchical_guide(x: Tensor) -> None:
    """The posterior of `global_and_local` given X, with z's exact conditional for any data."""
    precision = 1 + len(X) / 1.25
    mean = pyro.sample("mean", dist.Normal(X.sum() / 1.25 / precision, precision**-0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((mean + 4 * x) / 5, 0.2**0.5))


def assert_moments(draws: Tensor, mean: Tensor | float, variance: float) -> None:
    """Means and variances over the first axis, within 5 standard errors of normal draws."""
    num = len(draws)
    assert ((draws.mean(0) - mean).abs() < 5 * math.sqrt(variance / num)).all()
    assert ((draws.var(0) - variance).abs() < 5 * variance * math.sqrt(2 / num)).all()


# Predictive and prior draws


def test_predictive_draws_of_a_conjugate_model() -> None:
    source = Scorer(normal_mean, normal_guide, X)
    precision = 0.25 + len(X)
    draws = source.posterior(20_000).predictive(seed=1)["x"]
    assert draws.shape == (20_000, 5)
    assert_moments(draws, X.sum() / precision, 1 + 1 / precision)
    # one data point's share of the noise is its own: what is common is the mean
    common = torch.cov(draws.T)[0, 1]
    assert float(common) == pytest.approx(1 / precision, abs=5 * math.sqrt(2 / 20_000))


def test_predictive_draws_belong_to_their_latents() -> None:
    source = Scorer(normal_mean, normal_guide, X)
    means = torch.arange(50).double() * 1_000
    draws = source.predictive({"mean": means}, seed=1)["x"]
    assert ((draws - means[:, None]).abs() < 6).all()


def test_prior_draws_of_a_conjugate_model() -> None:
    latents, observed = Scorer(normal_mean, normal_guide, X).prior(20_000)
    assert_moments(latents["mean"], 0.0, 4.0)
    assert_moments(observed["x"], 0.0, 5.0)
    correlation = torch.corrcoef(torch.stack([latents["mean"], observed["x"][:, 0]]))[0, 1]
    assert float(correlation) == pytest.approx(math.sqrt(4 / 5), abs=0.01)


def test_the_seed_is_all_the_randomness_of_predictions() -> None:
    source = Scorer(normal_mean, normal_guide, X)
    posterior = source.posterior(10)
    state = torch.get_rng_state()
    for first, again, other in (
        [posterior.predictive(seed=seed) for seed in (1, 1, 2)],
        [posterior.prior(7, seed=seed)[1] for seed in (1, 1, 2)],
    ):
        assert torch.equal(first["x"], again["x"]) and not torch.equal(first["x"], other["x"])
    assert torch.equal(torch.get_rng_state(), state)


def layout(dims: tuple[int, int], flip: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1/2): "data" over the rows, "inner" over the columns."""

    def model(x: Tensor) -> None:
        data, inner = pyro.plate("data", len(x), dim=dims[0]), pyro.plate("inner", 3, dim=dims[1])
        with data, inner:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            twice = pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(twice / 2, 0.5), obs=x.T if flip else x)

    def guide(x: Tensor) -> None:
        data, inner = pyro.plate("data", len(x), dim=dims[0]), pyro.plate("inner", 3, dim=dims[1])
        with data, inner:
            pyro.sample("z", dist.Normal(0.8 * (x.T if flip else x), 0.2**0.5))

    return model, guide


@pytest.mark.parametrize(
    ("dims", "flip"), [((-2, -1), False), ((-1, -2), True)], ids=["plate right", "plate left"]
)
def test_plates_right_and_left_of_the_data_points(dims: tuple[int, int], flip: bool) -> None:
    model, guide = layout(dims, flip)
    x = 10 * torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    posterior = Scorer(model, guide, x).posterior(2_000)
    assert posterior.plates == {"data": 4, "inner": 3}
    assert posterior.draws["z"].shape == (2_000, 4, 3)
    draws = posterior.predictive(seed=1)["x"]
    assert draws.shape == (2_000, 4, 3)
    assert_moments(draws - posterior.draws["z"], 0.0, 0.25)
    assert_moments(draws - 0.8 * x, 0.0, 0.45)
    latents, observed = posterior.prior(30)
    assert latents["z"].shape == latents["twice"].shape == observed["x"].shape == (30, 4, 3)
    torch.testing.assert_close(latents["twice"], 2 * latents["z"])
    data, constants = posterior.data()
    assert torch.equal(data["x"], x) and (not constants or torch.equal(constants["x"], x))


def flat_model(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def test_flat_priors_have_no_draws() -> None:
    guide = AutoNormal(flat_model, init_loc_fn=init_to_value(values={"mean": torch.zeros(())}))
    posterior = fit(flat_model, guide, X.float(), steps=2, progress=False).posterior(X.float(), 30)
    with pytest.raises(ValueError, match=r"the prior cannot be drawn from: ImproperUniform[^\n]*$"):
        posterior.prior()
    assert posterior.predictive()["x"].shape == (30, 5)


class DensityAlone(dist.TorchDistribution):
    """A likelihood of one's own, with neither a sampler nor a support."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, mean: Tensor) -> None:
        super().__init__(mean.shape, torch.Size(), validate_args=False)
        self.mean_ = mean

    def expand(self, batch_shape: Any, _instance: Any = None) -> DensityAlone:
        return DensityAlone(self.mean_.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(self.mean_, 1.0).log_prob(value)


def test_a_likelihood_that_is_a_density_alone_is_scored_but_not_drawn() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", DensityAlone(mean), obs=x)

    posterior = Scorer(model, normal_guide, X).posterior(30)
    known = Scorer(normal_mean, normal_guide, X).posterior(30)
    torch.testing.assert_close(posterior.log_p, known.log_p)
    assert not posterior.discrete
    with pytest.raises(ValueError, match="the data cannot be drawn: a distribution has no sampler"):
        posterior.predictive()


def test_without_latents_there_is_nothing_to_predict_from() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    posterior = Scorer(model, lambda x: None, X).posterior(3)
    with pytest.raises(ValueError, match="expected draws of latents to predict from"):
        posterior.predictive()


# What was given


def test_data_by_site_and_what_else_the_programs_were_given() -> None:
    def model(x: Tensor, y: Tensor, scale: Tensor, times: int = 2) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("prior", -(w**2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x * times, scale), obs=y)

    def guide(*args: Any, **kwargs: Any) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    x, y, scale = torch.randn(3), torch.randn(3), torch.tensor(2.0)
    for data in ((x, y, scale), (x, y, scale, 3), {"y": y, "scale": scale, "x": x}):
        observed, constants = Scorer(model, guide, data).given_data()
        assert set(observed) == {"y"} and torch.equal(observed["y"], y)
        assert set(constants) == {"x", "scale"} and torch.equal(constants["x"], x)
    fixed = partial(model, x)
    observed, constants = Scorer(fixed, guide, (y, scale)).given_data()
    assert set(observed) == {"y"} and set(constants) == {"scale"}


# Densities of other data


def test_the_predictive_density_of_a_conjugate_model() -> None:
    precision = 0.25 + len(X)
    spread = math.sqrt(1 + 1 / precision)
    exact = dist.Normal(X.sum() / precision, spread).log_prob(NEW).numpy()
    found = Scorer(normal_mean, normal_guide, NEW).log_predictive_density(20_000)
    assert found.value.shape == found.se.shape == (4,)
    assert (found.se < 0.05).all() and (np.abs(found.value - exact) < 5 * found.se).all()


def test_the_predictive_density_with_latents_of_single_data_points() -> None:
    """z is marginalised by its exact conditional: x | mean ~ N(mean, 1 + 1/4)."""
    precision = 1 + len(X) / 1.25
    mean, spread = X.sum() / 1.25 / precision, math.sqrt(1.25 + 1 / precision)
    exact = dist.Normal(mean, spread).log_prob(NEW).numpy()
    found = Scorer(global_and_local, hierarchical_guide, NEW).log_predictive_density(20_000)
    assert (found.se < 0.05).all() and (np.abs(found.value - exact) < 5 * found.se).all()


def test_predictive_densities_need_two_draws_and_an_amortized_guide() -> None:
    source = Scorer(normal_mean, normal_guide, NEW)
    for num in (0, 1, True, 2.0):
        with pytest.raises(ValueError, match=f"at least 2 posterior draws, got {num!r}"):
            source.log_predictive_density(num)
    guide = AutoNormal(global_and_local)
    guide(X.float())
    with pytest.raises(ValueError, match=r"one set of parameters for the latents \['z'\]"):
        Scorer(global_and_local, guide, X.float()).log_predictive_density(10)
    shared = AutoDiagonalNormal(normal_mean)
    fitted = fit(normal_mean, shared, X.float(), steps=2, progress=False)
    assert fitted.log_predictive_density(NEW.float(), 50).value.shape == (4,)


# Given the latents that data points share


def test_exact_local_posteriors_have_constant_weights_given_the_globals() -> None:
    posterior = Scorer(global_and_local, hierarchical_guide, NEW).given_globals(100)
    mean = posterior.draws["mean"]
    assert posterior.log_weights.shape == (100, 4) and len(mean.unique()) == 1
    exact = dist.Normal(mean[0], 1.25**0.5).log_prob(NEW)
    np.testing.assert_allclose(posterior.log_weights, exact.expand(100, 4), atol=1e-10)
    assert (posterior.khat() == -math.inf).all() and not posterior.point
    assert len(posterior.draws["z"].unique()) == 400
    other = Scorer(global_and_local, hierarchical_guide, NEW).given_globals(100, seed=1)
    assert other.draws["mean"][0] != mean[0]


@pytest.mark.parametrize("kind", [AutoNormal, AutoDelta])
def test_autoguides_that_draw_site_by_site_are_judged_given_globals(kind: Any) -> None:
    fitted = fit(global_and_local, kind(global_and_local), X.float(), steps=2, progress=False)
    posterior = fitted.posterior_given_globals(X.float(), 50)
    assert posterior.log_p.shape == (50, 5)
    assert posterior.point == (("z",) if kind is AutoDelta else ())
    if kind is AutoNormal:
        assert posterior.khat().shape == (5,)


def test_joint_guides_and_models_without_local_latents_are_refused() -> None:
    for kind in (AutoDiagonalNormal, AutoMultivariateNormal):
        fitted = fit(global_and_local, kind(global_and_local), X.float(), steps=2, progress=False)
        with pytest.raises(ValueError, match=r"draws \['z'\] of all data points jointly, from"):
            fitted.posterior_given_globals(X.float(), 50)
    with pytest.raises(ValueError, match=r"expected latents of single data points.*\['mean'\]"):
        Scorer(normal_mean, normal_guide, X).given_globals(50)


# Discrete latents


def mixture(x: Tensor) -> None:
    means = pyro.sample("means", dist.Normal(x.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(logits=x.new_zeros(2)))
        pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)


def means_guide(x: Tensor) -> None:
    loc = pyro.param("loc", x.new_tensor([-1.0, 1.0]))
    pyro.sample("means", dist.Normal(loc, 0.5).to_event(1))


def test_discrete_latents_that_nothing_samples_are_named_with_what_to_do() -> None:
    x = X.float()
    with pytest.raises(ValueError, match=r"discrete sample site 'k'.*enumerat"):
        fit(mixture, AutoNormal(mixture), x, steps=2, progress=False)
    ways = r"latent site 'k'.*missing from the guide.*discrete: sample it.*enumerate.*sum it out"
    for guide in (AutoNormal(poutine.block(mixture, hide=["k"])), means_guide):
        with pytest.raises(ValueError, match=ways):
            fit(mixture, guide, x, steps=2, progress=False)

    def counts(x: Tensor) -> None:
        pyro.sample("count", dist.Poisson(x.new_tensor(2.0)))
        means_guide(x)

    with pytest.raises(ValueError, match="discrete: sample it in the guide, or sum it out"):
        fit(counts, means_guide, x, steps=2, progress=False)

    def continuous(x: Tensor) -> None:
        mixture(x)
        pyro.sample("scale", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'scale' of the model is missing.*; if it is data"):
        fit(continuous, discrete_guide, x, steps=2, progress=False)


def discrete_guide(x: Tensor) -> None:
    means_guide(x)
    logits = pyro.param("logits", x.new_zeros(len(x), 2))
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(logits=logits))


def test_enumerated_latents_are_fitted_and_their_posterior_says_what_it_needs() -> None:
    x = X.float()
    fitted = fit(
        config_enumerate(mixture),
        means_guide,
        x,
        steps=2,
        loss=TraceEnum_ELBO(max_plate_nesting=1),
        progress=False,
    )
    needs = r"does not sample \['k'\], which its loss enumerated.*sampled by the guide, or summed"
    with pytest.raises(ValueError, match=needs):
        fitted.posterior(x, 30)


def test_discrete_latents_of_the_guide_are_scored() -> None:
    posterior = Scorer(mixture, discrete_guide, X).posterior(200)
    k, means = posterior.draws["k"], posterior.draws["means"]
    assert k.shape == (200, 5) and k.dtype == torch.int64 and set(k.unique().tolist()) == {0, 1}
    likelihood = dist.Normal(means.gather(1, k), 1.0).log_prob(X)
    torch.testing.assert_close(posterior.log_likelihood["x"], likelihood, atol=1e-10, rtol=0)
    prior = dist.Normal(means.new_zeros(()), 3.0).log_prob(means).sum(1)
    log_p = likelihood.sum(1) + prior - 5 * math.log(2)
    torch.testing.assert_close(posterior.log_p, log_p, atol=1e-6, rtol=0)  # float32 logits


# Fitted programs


def test_a_fitted_flow_is_scored_by_its_own_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks them again when a density is computed, after the guide has run."""
    model = LinearGaussian(torch.ones(3, 2).double(), torch.zeros(3).double(), 1.0)
    x = torch.randn(20, 3).double()
    guide = Encoder((3,), Flow(2, 3).double(), network=lambda shape, width: nn.Identity())
    fitted = fit(model, guide, x, optim=partial(torch.optim.Adam, lr=0.05), steps=30)
    monkeypatch.setattr(vectorize, "_one_by_one", lambda *args: pytest.fail("not vectorised"))
    posterior = fitted.posterior(x, 40)
    z = posterior.draws["z"]
    with fitted.guide.state.installed():
        expected = guide.family(x).log_prob(z)
    torch.testing.assert_close(posterior.log_q, expected, atol=1e-8, rtol=0)
    untrained = guide.family(x).log_prob(z)
    assert (posterior.log_q - untrained).abs().max() > 0.1
    again = fitted.posterior_given_globals(x, 40)
    with fitted.guide.state.installed():
        expected = guide.family(x).log_prob(again.draws["z"])
    torch.testing.assert_close(again.log_q, expected, atol=1e-8, rtol=0)


def test_a_guide_that_an_earlier_fit_trained_too_is_scored_by_its_last_fit() -> None:
    """The frozen model brings along the state of its own fit, in which the guide is another."""
    model = VAE((1, 4, 4), 2)
    x = torch.rand(20, 1, 4, 4).round()
    for family in (MeanField(2, 8), Flow(2, 8)):
        guide = Encoder((1, 4, 4), family)
        adam = partial(torch.optim.Adam, lr=0.02)
        first = fit(model, guide, x, optim=adam, steps=20)
        last = fit(first.model, guide, x, optim=adam, steps=5)
        posterior = last.posterior(x, 30)
        z = posterior.draws["z"]
        with last.guide.state.installed():
            expected = guide.encode(x).log_prob(z).double()
        torch.testing.assert_close(posterior.log_q, expected, atol=1e-3, rtol=0)
        with first.guide.state.installed():
            other = guide.encode(x).log_prob(z).double()
        assert (posterior.log_q - other).abs().max() > 0.05
        with first.model.state.installed():
            likelihood = model.decode(z.flatten(0, 1)).log_prob(x.repeat(30, 1, 1, 1))
        torch.testing.assert_close(
            posterior.log_likelihood["x"].flatten(), likelihood.double(), atol=1e-3, rtol=1e-4
        )


NET = nn.Linear(1, 1)


class Shift(torch.distributions.transforms.Transform):
    """x + net(0), by a name of the script and no attribute."""

    domain = codomain = constraints.real
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return x + NET(x.new_zeros(1)).squeeze()

    def _inverse(self, y: Tensor) -> Tensor:
        return y - NET(y.new_zeros(1)).squeeze()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x)


def test_a_transform_that_names_its_network_is_scored_by_the_fits_own() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", NET)
        pyro.sample("mean", dist.TransformedDistribution(dist.Normal(0.0, 0.4), [Shift()]))

    x = 3 + torch.randn(6)
    fitted = fit(model, guide, x, optim=partial(torch.optim.Adam, lr=0.05), steps=300)
    posterior = fitted.posterior(x, 2_000)
    covariance = torch.eye(6) + 1
    exact = float(dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(x))
    assert float(posterior.evidence().value) == pytest.approx(exact, abs=0.05)


@pytest.mark.parametrize("particles", [1, 2])
def test_a_guide_is_trained_against_the_flow_prior_of_a_frozen_model(particles: int) -> None:
    """The flow asks its networks in the loss, after the frozen model has run."""
    prior = Flow(2, 1)

    def model(x: Tensor) -> None:
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x.new_zeros(len(x), 1)))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x = 4 + torch.randn(40, 2)
    guide = Encoder((2,), MeanField(2, 8))
    first = fit(model, guide, x, optim=partial(torch.optim.Adam, lr=0.05), steps=100)
    loss = Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    still = partial(torch.optim.SGD, lr=0.0)
    last = fit(first.model, guide, x, loss=loss, optim=still, steps=400)
    posterior = last.posterior(x, 400)
    z = posterior.draws["z"]
    context = torch.zeros(400, 40, 1)
    with first.model.state.installed():
        trained = prior(context).log_prob(z).detach()
    assert (trained - prior(context).log_prob(z).detach()).abs().mean() > 0.5
    likelihood = dist.Normal(z, 0.5).to_event(1).log_prob(x)
    torch.testing.assert_close(
        posterior.log_p, (trained + likelihood).double(), rtol=1e-4, atol=1e-3
    )
    expected = (trained + likelihood - posterior.log_q).mean()
    spread = float(last.losses.std()) / math.sqrt(len(last.losses))
    assert -float(last.losses.mean()) == pytest.approx(float(expected), abs=6 * spread)


def test_a_guide_of_parameters_is_scored_beside_a_frozen_model_of_parameters() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, scale), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("mean", dist.Normal(loc, 0.2))

    x = 5 + torch.randn(30)
    adam = partial(torch.optim.Adam, lr=0.05)
    first = fit(model, guide, x, optim=adam, steps=20)
    last = fit(first.model, guide, x, optim=adam, steps=300)
    posterior = last.posterior(x, 500)
    loc = float(last.guide.state.tensors()["param.loc"])
    assert abs(loc - float(x.mean())) < 1
    assert float(posterior.draws["mean"].mean()) == pytest.approx(loc, abs=0.05)
    elbo = posterior.elbo()
    settled = -30 * float(last.losses[-50:].mean())
    assert float(elbo.value) == pytest.approx(settled, abs=0.5)
    assert float(last.predict(x, 200)["x"].mean()) == pytest.approx(loc, abs=0.3)


def test_predictive_densities_need_rows_on_both_sides() -> None:
    def joint_guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match="latent site 'z', which belongs to single data points"):
        Scorer(global_and_local, joint_guide, X).log_predictive_density(5)

    def observed_outside(x: Tensor) -> None:
        normal_mean(x)
        pyro.sample("total", dist.Normal(0.0, 1.0), obs=x.sum())

    with pytest.raises(ValueError, match=r"but \['total'\] stand outside it"):
        Scorer(observed_outside, normal_guide, X).log_predictive_density(5)
