"""The small programs of the benchmarks in Pyro."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor


def coin(x: Tensor) -> None:
    """Beta-Bernoulli, with `coin_guide`."""
    f = pyro.sample("f", dist.Beta(10.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(f), obs=x)


def coin_guide(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(15.0), constraint=constraints.positive)
    b = pyro.param("b", torch.tensor(15.0), constraint=constraints.positive)
    pyro.sample("f", dist.Beta(a, b))


def schools(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, not centred."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def regression(x: Tensor, y: Tensor, subsample: int | None = 100) -> None:
    """Logistic regression; `subsample` rows of a step, or all that it is given."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    if subsample is None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)
        return
    with pyro.plate("data", len(x), subsample_size=subsample) as index:
        pyro.sample("y", dist.Bernoulli(logits=x[index] @ w), obs=y[index])


def many_sites(sites: int, x: Tensor) -> None:
    total = sum(pyro.sample(f"z{i}", dist.Normal(0.0, 1.0)) for i in range(sites))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(total, 1.0), obs=x)


def linear(dim: int, x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)
