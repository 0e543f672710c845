"""Small Pyro programs that several tests share."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

SCHOOLS_Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCHOOLS_SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, non-centred (Rubin, 1981)."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("data", len(y)):
        eta = pyro.sample("eta", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def normal_mean(x: Tensor) -> None:
    """A global mean under a normal prior: log evidence and posterior are known."""
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def normal_mean_guide(x: Tensor) -> None:
    """Its guide, a plain function of `pyro.param`."""
    loc = pyro.param("loc", x.new_tensor(0.3))
    scale = pyro.param("scale", x.new_tensor(0.5), constraint=constraints.positive)
    pyro.sample("mean", dist.Normal(loc, scale))


def global_and_local(x: Tensor) -> None:
    """A global mean, and one latent for each data point."""
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def global_and_local_guide(x: Tensor) -> None:
    """Its guide, amortized in z."""
    loc = pyro.param("loc", x.new_tensor(0.2))
    pyro.sample("mean", dist.Normal(loc, 0.3))
    weight = pyro.param("weight", x.new_tensor(0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * x, 0.4))


def eight_schools_centred(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, centred; twice the effects as a deterministic site."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.deterministic("twice", 2 * theta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def gamma_poisson(x: Tensor) -> None:
    """Counts of a rate under a Gamma(2, 1) prior: posterior and evidence are known."""
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).double(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def gamma_poisson_guide(x: Tensor) -> None:
    """Its exact guide, Gamma(2 + S, 1 + n)."""
    pyro.sample("rate", dist.Gamma(2.0 + x.sum(), 1.0 + len(x)))


def beta_bernoulli(x: Tensor) -> None:
    """Coins of a bias under a Beta(2, 1) prior."""
    bias = pyro.sample("bias", dist.Beta(torch.tensor(2.0).double(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(bias), obs=x)


def beta_bernoulli_guide(x: Tensor) -> None:
    """Its exact guide."""
    pyro.sample("bias", dist.Beta(2.0 + x.sum(), 1.0 + len(x) - x.sum()))
