"""Draws all at once: what the runs one by one give, or one by one where they would not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from example_programs import (
    SCHOOLS_SIGMA,
    SCHOOLS_Y,
    beta_bernoulli,
    beta_bernoulli_guide,
    eight_schools,
    eight_schools_centred,
    gamma_poisson,
    gamma_poisson_guide,
    global_and_local,
    global_and_local_guide,
    normal_mean,
    normal_mean_guide,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuide,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vi.checks import check_count
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE
from pyro_vi.posterior import NOISE, Scorer, scoring, vectorize, vectorize_over_draws

torch.set_num_threads(1)

SCHOOLS = (SCHOOLS_Y.double(), SCHOOLS_SIGMA.double())
WEIGHT = torch.tensor([[1.0, -0.5], [0.3, 2.0], [0.0, 1.0]]).double()
Values = dict[str, Tensor]
Spied = list[tuple[Values, Values]]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Autoguides make their parameters in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


# Programs


def matrix_model(x: Tensor) -> None:
    """`W @ z`: an axis over draws to the left of z would be the matrix product's."""
    z = pyro.sample("z", dist.Normal(zeros(2), 1.0).to_event(1))
    mean = WEIGHT @ z
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def index_model(x: Tensor) -> None:
    """`z[0] + z[1]`: an axis over draws to the left of z would be indexed."""
    z = pyro.sample("z", dist.Normal(zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z[0] + z[1], 1.0), obs=x)


def index_guide(x: Tensor) -> None:
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]]).double()
    pyro.sample("z", dist.MultivariateNormal(zeros(2), covariance))


def nested_model(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(zeros() + 2, 2.0))
    with pyro.plate("group", x.shape[0], dim=-2):
        mean = pyro.sample("mean", dist.Normal(zeros(), scale))
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.deterministic("sum", z + mean)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def constrained_model(x: Tensor) -> None:
    """A simplex, a positive number, an interval, an order and a Cholesky factor."""
    ordered = dist.TransformedDistribution(
        dist.Normal(zeros(3), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    )
    weights = pyro.sample("weights", dist.Dirichlet(zeros(3) + 1))
    scale = pyro.sample("scale", dist.LogNormal(zeros(), 1.0))
    slope = pyro.sample("slope", dist.Uniform(zeros() - 1, 2.0))
    means = pyro.sample("means", ordered)
    tril = pyro.sample("tril", dist.LKJCholesky(2, zeros() + 1))
    mean = (weights * means).sum() + slope * tril[1, 0]
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, scale), obs=x)


def masked_model(x: Tensor, seen: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(zeros(), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        with poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def missing_model(x: Tensor, seen: Tensor) -> None:
    """Values that are not seen are latents."""
    mean = pyro.sample("mean", dist.Normal(zeros(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x, obs_mask=seen)


def missing_guide(x: Tensor, seen: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.mean(), 0.5))
    with pyro.plate("data", len(x)), poutine.mask(mask=~seen):
        pyro.sample("x_unobserved", dist.Normal(mean, 1.0))


def factor_model(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(zeros(), 1.0))
    pyro.factor("quartic", -0.5 * mean**4)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def mixture_model(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(zeros(2) + 1))
    means = pyro.sample("means", dist.Normal(zeros(2), 1.0).to_event(1))
    component = dist.Normal(means, 1.0)
    with pyro.plate("data", len(x)):
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), component)
        pyro.sample("x", mixture, obs=x)


def chain_model(x: Tensor) -> None:
    """A random walk, site by site, without a plate."""
    z = pyro.sample("z_0", dist.Normal(zeros(), 1.0))
    for step in range(len(x)):
        z = pyro.sample(f"z_{step + 1}", dist.Normal(z, 1.0))
        pyro.sample(f"x_{step}", dist.Normal(z, 0.5), obs=x[step])


def branch_model(x: Tensor) -> None:
    """A branch that depends on a latent."""
    z = pyro.sample("z", dist.Normal(zeros(), 1.0))
    mean = z if z > 0 else -3 * z
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def normal_z_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(zeros() + 0.1, 1.0))


X = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4]).double()
ROWS = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3)
COUNTS, COINS = torch.tensor([1.0, 4.0, 2.0]).double(), torch.tensor([1.0, 0.0, 1.0]).double()

AUTOGUIDES: dict[str, type[AutoGuide]] = {
    kind.__name__: kind
    for kind in (
        AutoNormal,
        AutoDiagonalNormal,
        AutoMultivariateNormal,
        AutoLowRankMultivariateNormal,
        AutoIAFNormal,
        AutoStructured,
        AutoDelta,
    )
}
VECTORISED: dict[str, tuple[Callable[..., Any], Callable[..., Any], Any]] = {
    **{f"eight schools, {name}": (eight_schools, k, SCHOOLS) for name, k in AUTOGUIDES.items()},
    **{
        f"eight schools centred, {name}": (eight_schools_centred, k, SCHOOLS)
        for name, k in AUTOGUIDES.items()
    },
    "pyro.param": (normal_mean, normal_mean_guide, X),
    "global and local": (global_and_local, global_and_local_guide, X),
    "W @ z": (matrix_model, AutoNormal, ROWS),
    "z[0] + z[1]": (index_model, index_guide, X),
    "nested plates": (nested_model, AutoMultivariateNormal, ROWS),
    "constrained, AutoNormal": (constrained_model, AutoNormal, X),
    "constrained, AutoMultivariateNormal": (constrained_model, AutoMultivariateNormal, X),
    "Poisson": (gamma_poisson, gamma_poisson_guide, COUNTS),
    "Bernoulli": (beta_bernoulli, AutoNormal, COINS),
    "masked": (masked_model, AutoNormal, (X, X > 0)),
    "missing": (missing_model, missing_guide, (X, X > 0)),
    "factor": (factor_model, AutoNormal, X),
    "mixture": (mixture_model, AutoDiagonalNormal, X),
    "chain": (chain_model, AutoMultivariateNormal, X),
}


def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    """Pairs of what a run over draws gives at once and, at the same noise, one by one."""
    pairs: Spied = []

    def both(
        run: Callable[[Values], Values],
        num: int,
        *,
        given: Values | None = None,
        at_once: int | None = None,
    ) -> Values:
        found = vectorize._vectorised(run, num, dict(given or {}), at_once)
        noise = {key.removeprefix(NOISE): v for key, v in found.items() if key.startswith(NOISE)}
        pairs.append((found, vectorize._one_by_one(run, num, noise)))
        assert vectorize._repeats(run, found, dict(given or {}), num, at_once or num)
        return found

    monkeypatch.setattr(scoring, "vectorize_over_draws", both)
    return pairs


def programs_of(model: Any, guide: Any, data: Any) -> Scorer:
    """With autoguides built, and moved off their initial values."""
    if isinstance(guide, type) and issubclass(guide, AutoGuide):
        guide = guide(model)
        guide(*data) if isinstance(data, tuple) else guide(data)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Scorer(model, guide, data)


def assert_same(pairs: Spied, kinds: set[str]) -> None:
    for at_once, one_by_one in pairs:
        assert at_once.keys() == one_by_one.keys()
        assert kinds <= {key.partition(" ")[0] for key in at_once}
        for key, value in at_once.items():
            torch.testing.assert_close(value, one_by_one[key], atol=1e-10, rtol=1e-10)
            assert value.dtype == torch.float64


@pytest.mark.parametrize("name", VECTORISED)
def test_draws_at_once_are_those_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = spied(monkeypatch)
    posterior = programs_of(*VECTORISED[name]).posterior(5)
    assert len(pairs) == 1
    assert_same(pairs, {"p", "q", "likelihood", "latent"})
    assert not pairs[0][0]["p outside"].isnan().any() and posterior.is_joint
    if not posterior.point:
        assert len(posterior.log_q.unique()) == 5  # no two draws share their noise


@pytest.mark.parametrize("name", ["nested plates", "masked", "factor", "chain", "missing"])
def test_predictive_draws_at_once_are_those_one_by_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = programs_of(*VECTORISED[name])
    latents = source.posterior(5).draws
    pairs = spied(monkeypatch)
    source.predictive(latents)
    assert_same(pairs, {"observed"})
    source.prior(5)
    assert len(pairs) == 2
    assert_same(pairs, {"observed", "latent"})


@pytest.mark.parametrize(
    "family",
    [
        MeanField(2, 8),
        FullCovariance(2, 8),
        LowRank(3, 8),
        Flow(2, 8, hidden=(8,)),
    ],
    ids=lambda family: type(family).__name__,
)
def test_vaes_at_once_are_those_one_by_one(
    family: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = VAE((1, 4, 4), 3 if isinstance(family, LowRank) else 2).double()
    x = torch.rand(6, 1, 4, 4).round().double()
    pairs = spied(monkeypatch)
    posterior = Scorer(model, Encoder((1, 4, 4), family).double(), x).posterior(5)
    assert_same(pairs, {"p", "q", "likelihood", "latent"})
    assert posterior.log_p.shape == (5, 6) and len(posterior.log_q.unique()) == 30


# What cannot be run at once, or would come out otherwise


def test_a_branch_on_a_latent_is_run_draw_by_draw(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="pyro_vi.posterior.vectorize"):
        posterior = Scorer(branch_model, normal_z_guide, X).posterior(40)
    assert "one by one" in caplog.text and "data-dependent" in caplog.text
    z = posterior.draws["z"]
    assert (z > 0).any() and (z < 0).any() and len(z.unique()) == 40
    mean = torch.where(z > 0, z, -3 * z)
    likelihood = dist.Normal(mean[:, None], 1.0).log_prob(X)
    close = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(posterior.log_likelihood["x"], likelihood, **close)
    prior = dist.Normal(zeros(), 1.0).log_prob(z)
    torch.testing.assert_close(posterior.log_p, likelihood.sum(1) + prior, **close)
    torch.testing.assert_close(
        posterior.log_q, dist.Normal(zeros() + 0.1, 1.0).log_prob(z), **close
    )


@pytest.mark.parametrize("event_dim", [0, 1])
def test_beta_and_dirichlet_sites_are_drawn_at_once(
    event_dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    def model(x: Tensor) -> None:
        bias = pyro.sample("bias", dist.Beta(2 + zeros(2), 1.0).to_event(1))
        rates = pyro.sample("rates", dist.Dirichlet(1 + zeros(3)).mask(event_dim == 1))
        pyro.factor("x", bias.log().sum() + rates.log()[0])

    def guide(x: Tensor) -> None:
        pyro.sample("bias", dist.Beta(3 + zeros(2), 1.0).to_event(1))
        pyro.sample("rates", dist.Dirichlet(1 + zeros(3)).mask(event_dim == 1))

    with caplog.at_level(logging.DEBUG, logger="pyro_vi.posterior.vectorize"):
        posterior = Scorer(model, guide, COINS).posterior(2_000)
    assert "one by one" not in caplog.text
    bias, rates = posterior.draws["bias"], posterior.draws["rates"]
    assert bias.shape == (2_000, 2) and rates.shape == (2_000, 3)
    torch.testing.assert_close(rates.sum(-1), torch.ones(2_000).double())
    torch.testing.assert_close(bias.mean(0), torch.tensor([0.75, 0.75]).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(rates.mean(0), torch.full((3,), 1 / 3).double(), atol=0.03, rtol=0)
    assert len(bias.unique()) == 4_000
    expected = 2 * math.log(2 / 3) + rates.log()[:, 0]
    torch.testing.assert_close(posterior.log_p - posterior.log_q, expected)


def test_a_beta_guide_that_is_exact_has_constant_weights() -> None:
    posterior = Scorer(beta_bernoulli, beta_bernoulli_guide, COINS).posterior(200)
    # the guide is exact: B(2 + 2, 1 + 1) / B(2, 1)
    evidence = math.lgamma(4) + math.lgamma(2) - math.lgamma(6) - math.lgamma(2) + math.lgamma(3)
    np.testing.assert_allclose(posterior.log_weights, evidence, atol=1e-10)
    assert len(posterior.draws["bias"].unique()) == 200


def test_a_sampler_that_torch_cannot_vectorise_is_run_draw_by_draw(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def model(x: Tensor) -> None:
        pyro.sample("angle", dist.VonMises(zeros(), 2.0))

    with caplog.at_level(logging.DEBUG, logger="pyro_vi.posterior.vectorize"):
        posterior = Scorer(model, model, COINS).posterior(50)
    assert "one by one" in caplog.text
    assert len(posterior.draws["angle"].unique()) == 50


class OneOfNumPys(dist.TorchDistribution):
    """A standard normal whose sampler is NumPy's: at once there is one draw of it for all."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real

    def __init__(self) -> None:
        super().__init__(torch.Size(), torch.Size(), validate_args=False)
        self.generator = np.random.default_rng(0)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneOfNumPys:
        return self

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.tensor(self.generator.standard_normal())

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(zeros(), 1.0).log_prob(value)


def test_noise_that_is_not_torchs_is_drawn_for_each_draw() -> None:
    numpys = OneOfNumPys()

    def sampler(x: Tensor) -> None:
        pyro.sample("mean", numpys)

    def delta(x: Tensor) -> None:
        value = numpys.sample()
        pyro.sample("mean", dist.Delta(value, log_density=numpys.log_prob(value)))

    for guide in (sampler, delta):
        posterior = Scorer(normal_mean, guide, X).posterior(30)
        mean = posterior.draws["mean"]
        assert len(mean.unique()) == 30
        torch.testing.assert_close(posterior.log_q, numpys.log_prob(mean), atol=1e-12, rtol=0)
        likelihood = dist.Normal(mean, 1.0).log_prob(X[:, None]).sum(0)
        prior = dist.Normal(zeros(), 2.0).log_prob(mean)
        torch.testing.assert_close(posterior.log_p, likelihood + prior, atol=1e-10, rtol=0)


def test_a_program_that_counts_its_runs_is_run_draw_by_draw() -> None:
    runs = 0

    def guide(x: Tensor) -> None:
        nonlocal runs
        runs += 1
        pyro.sample("mean", dist.Normal(zeros() + runs, 1e-3))

    posterior = Scorer(normal_mean, guide, X).posterior(20)
    mean = posterior.draws["mean"]
    first = int(mean[0].round())
    torch.testing.assert_close(
        mean, torch.arange(first, first + 20).double(), atol=0.01, rtol=0
    )  # each run has its own location
    assert posterior.log_q.max() < 10  # and was scored at it: log density at most 6


def test_draws_that_happen_to_be_alike_stay_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Three coins, or a site that draws nothing: neither is noise of somebody else's."""
    latents = {"bias": torch.full((50,), 0.6).double()}
    with caplog.at_level(logging.DEBUG, logger="pyro_vi.posterior.vectorize"):
        for seed in range(10):
            Scorer(beta_bernoulli, beta_bernoulli_guide, COINS).predictive(latents, seed=seed)
        Scorer(factor_model, lambda x: pyro.sample("mean", dist.Normal(0.0, 1.0)), X).prior(50)
    assert "one by one" not in caplog.text


def test_runs_of_different_sites_are_refused() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(zeros(), 1.0))
        if z > 0:
            pyro.deterministic("above", z)
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"the same sites in every draw, but some lack .*above"):
        Scorer(model, normal_z_guide, X).posterior(50)


def test_errors_are_the_programs_own() -> None:
    def run(fixed: Values) -> Values:
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        vectorize_over_draws(run, 3)


# Samplers

SAMPLERS: dict[str, tuple[dist.TorchDistribution, float, float]] = {
    "Normal": (dist.Normal(zeros() + 1, 2.0), 1, 4),
    "Uniform": (dist.Uniform(zeros(), 2.0), 1, 1 / 3),
    "Gamma": (dist.Gamma(zeros() + 3, 2.0), 1.5, 0.75),
    "Exponential": (dist.Exponential(zeros() + 2), 0.5, 0.25),
    "LogNormal": (dist.LogNormal(zeros(), 0.5), math.exp(0.125), 0.3646959),
    "Laplace": (dist.Laplace(zeros(), 1.0), 0, 2),
    "Gumbel": (dist.Gumbel(zeros(), 1.0), 0.57721566, math.pi**2 / 6),
    "StudentT": (dist.StudentT(zeros() + 10, 0.0, 1.0), 0, 1.25),
    "Poisson": (dist.Poisson(zeros() + 4), 4, 4),
    "Bernoulli": (dist.Bernoulli(zeros() + 0.3), 0.3, 0.21),
    "Binomial": (dist.Binomial(5, zeros() + 0.3), 1.5, 1.05),
    "Categorical": (dist.Categorical(zeros(3) + 1), 1, 2 / 3),
    "Beta": (dist.Beta(zeros() + 2, 2.0), 0.5, 0.05),
    "NegativeBinomial": (dist.NegativeBinomial(zeros() + 4, 0.5), 4, 8),
    "HalfNormal": (dist.HalfNormal(zeros() + 1), (2 / math.pi) ** 0.5, 1 - 2 / math.pi),
    "Weibull": (dist.Weibull(zeros() + 1, 2.0), 0.88622693, 1 - math.pi / 4),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_independently_and_from_their_distribution(name: str) -> None:
    """Three values a draw; the vectorised sampler, or the loop where there is none."""
    d, mean, variance = SAMPLERS[name]
    num = 2_000

    def run(fixed: Values) -> Values:
        if "z" in fixed:
            return {"noise z": fixed["z"]}
        return {"noise z": d.expand((3,)).sample()}

    torch.manual_seed(1)
    z = vectorize_over_draws(run, num)["noise z"].double()
    assert z.shape == (num, 3)
    se = math.sqrt(variance / num)
    assert (z.mean(0) - mean).abs().max() < 5 * se
    fourth = (z - mean).pow(4).mean(0)
    assert ((z.var(0) - variance).abs() < 6 * ((fourth - variance**2) / num).sqrt() + 1e-3).all()
    correlation = torch.corrcoef(torch.cat([z[1:], z[:-1]], 1).T) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(num)  # of values, and of draws in a row
    if not d.support.is_discrete:
        assert len(z.unique()) == 3 * num


# The function itself


def test_given_values_belong_to_their_draws() -> None:
    given = {"a": torch.arange(6.0), "b": torch.arange(12.0).reshape(6, 2)}
    for at_once in (None, 1, 4, 6, 100):
        found = vectorize_over_draws(
            lambda v: {"c": v["a"] * v["b"]}, 6, given=given, at_once=at_once
        )
        assert torch.equal(found["c"], given["a"][:, None] * given["b"])


def test_draws_in_parts_are_independent() -> None:
    for at_once in (1, 3, None):
        found = vectorize_over_draws(
            lambda v: {"noise z": v.get("z", dist.Normal(zeros(), 1.0).sample())},
            10,
            at_once=at_once,
        )
        assert len(found["noise z"].unique()) == 10


@pytest.mark.parametrize("num", [0, -3, True, 1.0, "2", None])
def test_impossible_counts(num: Any) -> None:
    with pytest.raises(ValueError, match=f"at least one posterior draw, got {num!r}"):
        check_count("posterior draw", num)
    with pytest.raises(ValueError, match="at least 2 posterior draws, got 1"):
        check_count("posterior draws", 1, least=2)
    check_count("posterior draw", 1)
