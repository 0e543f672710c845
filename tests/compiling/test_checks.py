"""Compiled steps check what eager ones do of distributions' parameters and values, and no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints, transforms
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from steps import both
from torch import Tensor

from pyro_vi import SVI

Program = Callable[[], Any]


def positive(name: str, *shape: int) -> Tensor:
    return pyro.param(name, 0.5 + torch.rand(shape), constraint=constraints.positive)


def real(name: str, *shape: int) -> Tensor:
    return pyro.param(name, torch.rand(shape))


def unit(name: str, *shape: int) -> Tensor:
    return pyro.param(name, 0.2 + 0.6 * torch.rand(shape), constraint=constraints.unit_interval)


def simplex(name: str, *shape: int) -> Tensor:
    return pyro.param(name, torch.rand(shape).softmax(-1), constraint=constraints.simplex)


def tril(name: str, dim: int) -> Tensor:
    return pyro.param(name, torch.eye(dim), constraint=constraints.lower_cholesky)


def covariance() -> Tensor:
    factor = real("w", 3, 3)
    return factor @ factor.mT + torch.eye(3)


THREE = torch.tensor([0.3, 1.2, 2.1], dtype=torch.float64)
# An observed distribution of each kind, and a value.
OBSERVED: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "Normal": (lambda: dist.Normal(real("a", 3), positive("b", 3)).to_event(1), THREE),
    "Laplace": (lambda: dist.Laplace(real("a"), positive("b", 3)).to_event(1), THREE),
    "StudentT": (
        lambda: dist.StudentT(positive("n"), real("a"), positive("b")).expand((3,)).to_event(1),
        THREE,
    ),
    "HalfNormal": (lambda: dist.HalfNormal(positive("b")).expand((3,)).to_event(1), THREE),
    "HalfCauchy, at its border": (lambda: dist.HalfCauchy(positive("b")), torch.tensor(0.0)),
    "Exponential, at its border": (lambda: dist.Exponential(positive("b")), torch.tensor(0.0)),
    "Gamma": (lambda: dist.Gamma(positive("a", 3), positive("b", 3)).to_event(1), THREE),
    "InverseGamma": (
        lambda: dist.InverseGamma(positive("a", 3), positive("b", 3)).to_event(1),
        THREE,
    ),
    "LogNormal": (lambda: dist.LogNormal(real("a", 3), positive("b")).to_event(1), THREE),
    "Weibull": (lambda: dist.Weibull(positive("a", 3), positive("b")).to_event(1), THREE),
    "Pareto": (lambda: dist.Pareto(0.1 * unit("a"), positive("b")), torch.tensor(2.0)),
    "Beta": (lambda: dist.Beta(positive("a"), positive("b")), torch.tensor(0.4)),
    "Kumaraswamy": (lambda: dist.Kumaraswamy(positive("a"), positive("b")), torch.tensor(0.4)),
    "Dirichlet": (lambda: dist.Dirichlet(positive("a", 3)), THREE / THREE.sum()),
    "Uniform, at its border": (
        lambda: dist.Uniform(-positive("a", 2) * 0, positive("b", 2) + 3.0).to_event(1),
        torch.tensor([0.0, 2.9]),
    ),
    "Bernoulli": (lambda: dist.Bernoulli(unit("p", 3)).to_event(1), THREE.round().clamp(max=1)),
    "Bernoulli, its logits": (
        lambda: dist.Bernoulli(logits=real("p", 3)).to_event(1),
        THREE.round().clamp(max=1),
    ),
    "Categorical": (lambda: dist.Categorical(simplex("p", 4)), torch.tensor(2)),
    "OneHotCategorical": (
        lambda: dist.OneHotCategorical(simplex("p", 3)),
        torch.tensor([0.0, 1.0, 0.0]),
    ),
    "Binomial": (lambda: dist.Binomial(5, unit("p")), torch.tensor(5.0)),
    "Multinomial": (lambda: dist.Multinomial(6, simplex("p", 3)), torch.tensor([1.0, 2.0, 3.0])),
    "Geometric": (lambda: dist.Geometric(unit("p")), torch.tensor(0.0)),
    "Poisson": (lambda: dist.Poisson(positive("r", 3)).to_event(1), THREE.round()),
    "NegativeBinomial": (
        lambda: dist.NegativeBinomial(positive("n"), unit("p")),
        torch.tensor(2.0),
    ),
    "ZeroInflatedPoisson": (
        lambda: dist.ZeroInflatedPoisson(positive("r"), gate=unit("g")),
        torch.tensor(0.0),
    ),
    "VonMises": (lambda: dist.VonMises(real("a"), positive("b")), torch.tensor(0.4)),
    "VonMises3D": (lambda: dist.VonMises3D(real("a", 3)), torch.tensor([0.0, 0.6, 0.8])),
    "MultivariateNormal": (
        lambda: dist.MultivariateNormal(real("a", 3), scale_tril=tril("t", 3)),
        THREE,
    ),
    "MultivariateNormal, its covariance": (
        lambda: dist.MultivariateNormal(torch.zeros(3), covariance()),
        THREE,
    ),
    "LowRankMultivariateNormal": (
        lambda: dist.LowRankMultivariateNormal(real("a", 3), real("w", 3, 1), positive("d", 3)),
        THREE,
    ),
    "LKJCholesky": (lambda: dist.LKJCholesky(3, positive("a")), torch.eye(3)),
    "MixtureSameFamily": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(simplex("p", 2)), dist.Gamma(positive("a", 2), positive("b", 2))
        ),
        torch.tensor(1.5),
    ),
    "masked": (
        lambda: (
            dist.Gamma(positive("a", 3), 1.0).mask(torch.tensor([True, False, True])).to_event(1)
        ),
        THREE,
    ),
    "masked as a whole": (lambda: dist.Gamma(positive("a"), 1.0).mask(False), torch.tensor(1.0)),
    "transformed": (
        lambda: dist.TransformedDistribution(
            dist.Normal(real("a"), positive("b")),
            [transforms.SigmoidTransform(), transforms.AffineTransform(1.0, 2.0)],
        ),
        torch.tensor(1.5),
    ),
    "not validated": (
        lambda: dist.Normal(real("a"), real("b") + 0 * positive("c"), validate_args=False),
        torch.tensor(1.5),
    ),
    "Delta": (lambda: dist.Delta(THREE, log_density=real("a")).to_event(1), THREE),
    "Unit": (lambda: dist.Unit(real("a")), torch.zeros(0)),
}


def no_latent() -> None:
    """A guide of nothing."""


ONES = torch.ones(3)


def same(model: Program, guide: Program, **options: Any) -> SVI:
    """Takes both kinds of steps, from random parameters."""
    torch.manual_seed(0)
    adam = lambda: pyro.optim.Adam({"lr": 0.05})  # noqa: E731
    return both(lambda: model, lambda i: (), guide=guide, optim=adam, **options)


@pytest.mark.parametrize("name", OBSERVED)
def test_what_is_valid_passes(name: str) -> None:
    make, value = OBSERVED[name]
    value = value.double() if value.is_floating_point() else value
    same(lambda: pyro.sample("x", make(), obs=value), no_latent)


def test_what_is_coarser_is_compared_as_such() -> None:
    """Single precision among double."""
    probabilities = torch.tensor([0.2, 0.7, 0.9], dtype=torch.float32)

    def model() -> None:
        shift = pyro.param("p", lambda: torch.tensor(0.1)).float()
        pyro.sample("x", dist.Bernoulli(logits=probabilities + shift).to_event(1), obs=ONES)

    same(model, no_latent, rel=1e-6)


def scaled(scale: Tensor) -> Any:
    return dist.Normal(torch.zeros(3), scale).to_event(1)


# Latents of a guide and a model, with the same support.
LATENTS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "Gamma": (
        lambda: dist.Gamma(positive("a", 3), positive("b", 3)).to_event(1),
        lambda: dist.Exponential(1.0).expand((3,)).to_event(1),
    ),
    "LogNormal": (
        lambda: dist.LogNormal(real("a", 3), positive("b", 3)).to_event(1),
        lambda: dist.HalfCauchy(torch.ones(3)).to_event(1),
    ),
    "Dirichlet": (
        lambda: dist.Dirichlet(positive("a", 3)),
        lambda: dist.Dirichlet(torch.ones(3)),
    ),
    "Beta": (
        lambda: dist.Beta(positive("a"), positive("b")),
        lambda: dist.Uniform(0.0, 1.0),
    ),
    "MultivariateNormal": (
        lambda: dist.MultivariateNormal(real("a", 3), scale_tril=tril("t", 3)),
        lambda: scaled(torch.ones(3)),
    ),
    "a point at the border": (
        lambda: dist.Delta(torch.tensor(0.0)),
        lambda: dist.HalfNormal(positive("b")),
    ),
}


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("name", LATENTS)
def test_what_is_drawn_passes(name: str, loss: type) -> None:
    posterior, prior = LATENTS[name]
    same(
        lambda: pyro.sample("z", prior()),
        lambda: pyro.sample("z", posterior()),
        loss=loss,
        eager=SVI,
    )


def falls(name: str, value: float) -> Tensor:
    """A parameter without a constraint."""
    return pyro.param(name, torch.tensor(value))


def observed(make: Callable[[], Any], value: float | Tensor) -> tuple[Program, Program]:
    return lambda: pyro.sample("x", make(), obs=torch.as_tensor(value).double()), no_latent


# Programs that leave what is valid after some steps.
INVALID: dict[str, tuple[Program, Program]] = {
    "a probability, expanded and independent": observed(
        lambda: dist.Bernoulli(1 - falls("q", 0.4)).expand((3,)).to_event(1), ONES.double()
    ),
    "a scale": observed(lambda: dist.Normal(0.0, falls("s", 0.4)), 0.0),
    "a scale under a mask": observed(
        lambda: (
            dist.Normal(torch.zeros(2), falls("s", 0.4))
            .mask(torch.tensor([True, False]))
            .to_event(1)
        ),
        torch.zeros(2),
    ),
    "a scale under a transform": observed(
        lambda: dist.TransformedDistribution(
            dist.Normal(0.0, falls("s", 0.4)), [transforms.ExpTransform()]
        ),
        1.0,
    ),
    "a simplex": observed(
        lambda: dist.Categorical(torch.stack([falls("q", 0.4), torch.tensor(0.6)])), torch.tensor(1)
    ),
    "a component's scale": observed(
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), falls("s", 0.4).expand(2))
        ),
        0.0,
    ),
    "a Cholesky factor": observed(
        lambda: dist.MultivariateNormal(
            torch.zeros(2), scale_tril=torch.diag_embed(falls("s", 0.4).expand(2))
        ),
        torch.zeros(2),
    ),
    "a probability of zero": observed(
        lambda: dist.Geometric(falls("q", 0.4).clamp(min=0.0)), torch.tensor(50.0)
    ),
    "an observation outside": observed(lambda: dist.Uniform(0.0, falls("h", 1.4)), 1.0),
    "a latent outside": (
        lambda: pyro.sample("z", dist.HalfNormal(1.0)),
        lambda: pyro.sample("z", dist.Normal(falls("a", 3.0), 0.7)),
    ),
    "a guide's scale": (
        lambda: pyro.sample("z", dist.Normal(0.0, 0.01)),
        lambda: pyro.sample("z", dist.Normal(0.0, falls("s", 0.4))),
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_not_valid_is_the_eager_error(name: str) -> None:
    """At the same step, and with the same parameters left."""
    svi = same(*INVALID[name], steps=60, fails="ValueError: ", compiled=None)
    assert svi.compiled_steps > 0


@pytest.mark.parametrize("how", ["of its own", "of all"])
def test_validation_that_is_off_stays_off(how: str) -> None:
    off = False if how == "of its own" else None
    with pyro.validation_enabled(how == "of its own"):
        same(
            lambda: pyro.sample("z", dist.Exponential(1.0, validate_args=off)),
            lambda: pyro.sample("z", dist.Normal(falls("a", 0.0), 1.0)),
        )


def test_a_distribution_made_before_is_checked_as_then() -> None:
    """Its parameters when it was made, and its values always."""
    concentration = torch.tensor(0.5)
    prior = dist.Gamma(concentration, 1.0)
    concentration.fill_(-0.5)
    same(
        lambda: pyro.sample("z", prior),
        lambda: pyro.sample("z", dist.LogNormal(real("a"), positive("b"))),
    )


def test_validation_that_is_turned_on_later_checks() -> None:
    model, guide = INVALID["a latent outside"]
    with pyro.validation_enabled(False):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), compile=True)
        for _ in range(40):
            svi.step()
        assert svi.compiled_steps == 36
    with pyro.validation_enabled(True), pytest.raises(ValueError, match="within the support"):
        for _ in range(60):
            svi.step()


def test_a_nan_is_the_eager_steps() -> None:
    """What it would move is left as it was."""
    model, guide = observed(lambda: dist.Normal(falls("a", 0.4).sqrt(), 1.0), -1.0)
    svi = same(model, guide, steps=60, compiled=None, fails="ValueError: Expected parameter loc")
    assert svi.compiled_steps > 0
