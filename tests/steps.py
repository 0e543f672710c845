"""Programs and steps that the tests of compiled steps share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from example_programs import SCHOOLS_SIGMA, SCHOOLS_Y
from pyro.distributions import constraints
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_vi.guides import Encoder
from pyro_vi.inference import SVI
from pyro_vi.models import VAE
from pyro_vi.networks import MLPDecoder, MLPEncoder

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


small_encoder = partial(MLPEncoder, hidden=())
small_decoder = partial(MLPDecoder, hidden=(6,))


def vae(family: Callable[[int, int], nn.Module], loss: ELBO) -> Programs:
    model = VAE((1, 4, 4), 3, decoder=small_decoder)
    guide = Encoder((1, 4, 4), family(3, 8), network=small_encoder)
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


X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def draw() -> Tensor:
    return pyro.sample("z", dist.Normal(0.0, 1.0))


def observe(z: Any, x: Tensor) -> None:
    pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)


def plain(x: Tensor) -> None:
    """A latent and its observations; `plain_guide` is for every model that draws so."""
    observe(draw(), x)


def plain_guide(x: Tensor, *args: Any, **kwargs: Any) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))


def plain_adam() -> PyroOptim:
    return pyro.optim.Adam({"lr": 0.02})


def both(
    make: Callable[[], Callable[..., Any]] = lambda: plain,
    batches: Callable[[int], tuple[Any, ...]] = lambda i: (X,),
    *,
    guide: Callable[..., Any] = plain_guide,
    optim: Callable[[], PyroOptim] = plain_adam,
    loss: Callable[[], ELBO] = Trace_ELBO,
    eager: type[pyro.infer.SVI] = pyro.infer.SVI,
    around: Callable[[int], AbstractContextManager[Any]] = lambda i: nullcontext(),
    between: Callable[[int, Any], Any] = lambda i, svi: None,
    steps: int = 10,
    compiled: int | None = 6,
    fails: str = "",
    rel: float = 1e-9,
) -> SVI:
    """Takes the same steps by Pyro's SVI and by a compiled one, which must come to the same.

    Args:
        make: the model, made anew for each.
        batches: the arguments of each step.
        around: what each step is taken in.
        between: what is done before each step.
        compiled: how many steps are compiled.
        fails: how the error begins that both end with.
        rel: the error of losses and parameters.
    """
    found = []
    for kind, options in ((eager, {}), (SVI, {"compile": True})):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = kind(make(), guide, optim(), loss(), **options)
        losses, error = list[float](), ""
        try:
            for i in range(steps):
                between(i, svi)
                with around(i):
                    losses.append(svi.step(*batches(i)))
        except (ValueError, RuntimeError, IndexError) as caught:
            error = f"{type(caught).__name__}: {caught}"
        values = {name: p.detach().clone() for name, p in pyro.get_param_store().items()}
        found.append((losses, values, error, torch.get_rng_state()))
    (expected, values, error, drawn), (losses, mine, other, generator) = found
    assert bool(error) == bool(fails) and error.startswith(fails), error
    assert other.partition("(")[0] == error.partition("(")[0]  # numbers follow
    assert losses == pytest.approx(expected, rel=rel)
    assert fails or torch.equal(generator, drawn)
    for name, value in values.items():
        torch.testing.assert_close(mine[name], value, rtol=rel, atol=rel / 1000)
    assert compiled is None or svi.compiled_steps == compiled, svi.explain()
    return svi
