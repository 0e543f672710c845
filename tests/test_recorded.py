"""A recorded step is the eager step: losses, gradients and updates, given the same noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from programs import eight_schools
from pyro.distributions import constraints
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from steps import (
    IMAGES,
    SCHOOLS,
    Programs,
    beta_bernoulli,
    by_pyro_module,
    vae,
)
from torch import Tensor, nn

from pyro_vi.calls import Calls
from pyro_vi.compiled import record
from pyro_vi.denoisers import MLPDenoiser, UNet
from pyro_vi.diffusion import Diffusion
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import ForwardOrder, ForwardProcess, ReverseOrder
from pyro_vi.models import DDPM, DDPMChain
from pyro_vi.optimizers import OneOptimizer
from pyro_vi.schedules import Cosine, Learned
from pyro_vi.svi import SVI

pytestmark = pytest.mark.usefixtures("double")


def auto(kind: Callable[..., Any], loss: ELBO | None = None) -> Programs:
    return eight_schools, kind(eight_schools), loss or Trace_ELBO(), SCHOOLS


def guide_list() -> Programs:
    guide = AutoGuideList(eight_schools)
    guide.append(AutoDiagonalNormal(poutine.block(eight_schools, expose=["mu", "tau"])))
    guide.append(AutoNormal(poutine.block(eight_schools, hide=["mu", "tau"])))
    return eight_schools, guide, Trace_ELBO(), SCHOOLS


def mixture(x: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Poisson(rate))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def mixture_guide(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
    rates = pyro.param("rates", torch.ones(len(x)), constraint=constraints.positive)
    pyro.sample("rate", dist.Gamma(a, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Poisson(rates))


def score_function() -> Programs:
    """Draws that cannot be reparametrised."""
    return mixture, mixture_guide, Trace_ELBO(), (torch.arange(4.0),)


def particles(loss: ELBO) -> Programs:
    return eight_schools, AutoNormal(eight_schools), loss, SCHOOLS


class Regression:
    """Logistic regression, sub-sampled."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(40, 3, generator=generator)
        self.y = (torch.rand(40, generator=generator) < 0.5).double()

    def __call__(self) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 40, subsample_size=7) as index:
            logits = self.x[index] @ w
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=self.y[index])


def subsampled() -> Programs:
    model = Regression()
    return model, AutoDiagonalNormal(model), Trace_ELBO(), ()


def one_by_one() -> Programs:
    """A plate in a loop, and a distribution that validates its values."""
    prior = dist.Normal(0.0, 1.0, validate_args=True).expand([3]).to_event(1)

    def model(x: Tensor) -> None:
        w = pyro.sample("w", prior)
        for i in pyro.plate("rows", len(x)):
            pyro.sample(f"x{i}", dist.Normal(w[i], 1.0), obs=x[i])

    return model, AutoNormal(model), Trace_ELBO(), (torch.tensor([0.5, -1.0, 2.0]),)


def handled() -> Programs:
    """Scale, mask, condition, block and a factor."""

    def inner(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        pyro.factor("bonus", -0.1 * loc.square())
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0.2):
            pyro.sample("x", dist.Normal(loc, spread), obs=x)

    model = poutine.scale(poutine.condition(inner, {"spread": torch.tensor(0.7)}), scale=0.3)
    shown = poutine.block(model, hide=["spread"])
    return model, AutoNormal(shown), Trace_ELBO(), (torch.linspace(-1, 2, 9),)


def ddpm(net: Callable[[], nn.Module], learned: bool, loss: ELBO) -> Programs:
    diffusion = Diffusion((1, 4, 4), Learned(20).double() if learned else Cosine(20), draws=2)
    return DDPM(diffusion, net().double()).double(), ForwardProcess(diffusion), loss, (IMAGES,)


def chain(order: Callable[[Diffusion], nn.Module], loss: ELBO) -> Programs:
    diffusion = Diffusion((1, 4, 4), Cosine(3))
    model = DDPM(diffusion, MLPDenoiser((1, 4, 4), 3, hidden=(8,))).double()
    return DDPMChain(model), order(diffusion), loss, (IMAGES,)


PROGRAMS: dict[str, Callable[[], Programs]] = {
    "AutoNormal": partial(auto, AutoNormal),
    "AutoNormal, mean-field ELBO": partial(auto, AutoNormal, TraceMeanField_ELBO()),
    "AutoDiagonalNormal": partial(auto, AutoDiagonalNormal),
    "AutoMultivariateNormal": partial(auto, AutoMultivariateNormal),
    "AutoLowRankMultivariateNormal": partial(auto, AutoLowRankMultivariateNormal),
    "AutoIAFNormal": partial(auto, AutoIAFNormal),
    "AutoDelta": partial(auto, AutoDelta),
    "AutoGuideList": guide_list,
    "beta-Bernoulli": beta_bernoulli,
    "score function": score_function,
    "three particles": partial(particles, Trace_ELBO(num_particles=3)),
    "vectorized particles": partial(
        particles, Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    ),
    "Renyi": partial(particles, RenyiELBO(num_particles=3)),
    "Renyi, vectorized": partial(
        particles, RenyiELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    ),
    "sub-sampling plate": subsampled,
    "scale, mask, condition, block, factor": handled,
    "sequential plate, validation": one_by_one,
    "VAE, mean-field": partial(vae, MeanField, TraceMeanField_ELBO()),
    "VAE, full covariance": partial(vae, FullCovariance, TraceMeanField_ELBO()),
    "VAE, low-rank": partial(vae, LowRank, TraceMeanField_ELBO()),
    "VAE, flow": partial(vae, Flow, Trace_ELBO()),
    "pyro.module, dropout, batch norm": by_pyro_module,
    "DDPM": partial(
        ddpm,
        partial(UNet, (1, 4, 4), 20, channels=(8,), attention=()),
        False,
        TraceMeanField_ELBO(),
    ),
    "DDPM, learned schedule": partial(
        ddpm, partial(MLPDenoiser, (1, 4, 4), 20), True, TraceMeanField_ELBO()
    ),
    "DDPM, sampled KLs": partial(ddpm, partial(MLPDenoiser, (1, 4, 4), 20), False, Trace_ELBO()),
    "DDPM chain": partial(chain, ReverseOrder, TraceMeanField_ELBO()),
    "DDPM chain, forward order": partial(chain, ForwardOrder, Trace_ELBO()),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_recorded_step_is_the_eager_one(name: str) -> None:
    """Three steps each from one state, with the same noise: losses, and parameters by SGD.

    Adam would divide gradients that are nearly zero by their own size, rounding errors and all.
    """
    torch.manual_seed(0)
    model, guide, loss, args = PROGRAMS[name]()
    sgd = OneOptimizer(partial(torch.optim.SGD, lr=1e-4, momentum=0.9))
    svi = SVI(model, guide, sgd, loss)
    with pyro.validation_enabled(True):  # as it is in Pyro, unless turned off
        _, parameters = svi._evaluate(*args)
    svi._update(parameters)
    start = [p.detach().clone() for p in parameters]
    state = {k: dict(v) for k, v in svi.optim.torch_optimizer.state.items()}
    kept = {p: {k: v.clone() for k, v in s.items()} for p, s in state.items()}

    def restored() -> None:
        with torch.no_grad():
            for p, value in zip(parameters, start, strict=True):
                p.copy_(value)
            for p, s in kept.items():
                for k, v in s.items():
                    svi.optim.torch_optimizer.state[p][k].copy_(v)

    recorded = record(svi, Calls(), parameters, args, {})
    assert recorded.may_be_late  # the optimizer is in the graph

    def replay() -> float:
        loss = float(recorded(list(args))[0])
        recorded.finish()
        return loss

    runs = []
    for step in (lambda: svi.step(*args), replay):
        restored()
        torch.manual_seed(1)
        losses = [step() for _ in range(3)]
        runs.append((losses, [p.detach().clone() for p in parameters]))
    (eager, moved), (graph, other) = runs
    assert graph == pytest.approx(eager, rel=1e-10)
    assert eager[0] != eager[1]
    moves = torch.cat([(p - r).flatten() for p, r in zip(moved, start, strict=True)])
    others = torch.cat([(p - r).flatten() for p, r in zip(other, start, strict=True)])
    assert float(moves.abs().max()) > 0
    assert float((others - moves).abs().max()) <= 1e-10 * float(moves.abs().max())


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_compiled_step_stays_one(name: str, recorded_alone: None) -> None:
    """Whatever programs keep and bind anew, and whoever else runs them."""
    torch.manual_seed(0)
    model, guide, loss, args = PROGRAMS[name]()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), loss, compile=True)
    for _ in range(8):
        svi.step(*args)
        svi.evaluate_loss(*args)
        guide(*args)
    assert svi.compiled_steps == 5
