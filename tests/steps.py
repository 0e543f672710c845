"""Programs and steps that the tests of recorded steps share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from programs import SCHOOLS_SIGMA, SCHOOLS_Y
from pyro.distributions import constraints
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_vi.guides import Encoder
from pyro_vi.models import VAE
from pyro_vi.optimizers import OneOptimizer
from pyro_vi.svi import SVI

Programs = tuple[Callable[..., Any], Callable[..., Any], ELBO, tuple[Any, ...]]
SCHOOLS = (SCHOOLS_Y.double(), SCHOOLS_SIGMA.double())
IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double().round()


def coin(x: Tensor) -> None:
    f = pyro.sample("f", dist.Beta(10.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(f), obs=x)


def coin_guide(x: Tensor) -> None:
    a, b = (
        pyro.param(name, lambda: torch.tensor(15.0), constraint=constraints.positive)
        for name in "ab"
    )
    pyro.sample("f", dist.Beta(a, b))


def beta_bernoulli() -> Programs:
    return coin, coin_guide, Trace_ELBO(), (torch.tensor([1.0] * 6 + [0.0] * 4),)


def vae(family: Callable[[int, int], nn.Module], loss: ELBO) -> Programs:
    model, guide = VAE((1, 4, 4), 3), Encoder((1, 4, 4), family(3, 8))
    return model.double(), guide.double(), loss, (IMAGES,)


def by_pyro_module() -> Programs:
    """Plain functions, with dropout and batch normalisation."""
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 16))
    encoder = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 4))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x.flatten(1))

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x.flatten(1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, guide, Trace_ELBO(), (IMAGES,)


def adam() -> OneOptimizer:
    return OneOptimizer(partial(torch.optim.Adam, lr=0.01))


def run(optim: PyroOptim, compile: bool, steps: int = 6) -> tuple[SVI, list[float], Any]:
    """Losses, and the optimizer's state after them."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, loss, args = beta_bernoulli()
    svi = SVI(model, guide, optim, loss, compile=compile)
    losses = [svi.step(*args) for _ in range(steps)]
    return svi, losses, optim.get_state()
