"""A recorded step is the eager step: losses, gradients and updates, given the same noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from programs import SCHOOLS_SIGMA, SCHOOLS_Y, eight_schools
from pyro.distributions import constraints
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from pyro_vi import NonFiniteError, fit, fitting, warmup
from pyro_vi.capture import Graph
from pyro_vi.compiled import Recorded, record
from pyro_vi.denoisers import MLPDenoiser, UNet
from pyro_vi.diffusion import Diffusion
from pyro_vi.elbo import told
from pyro_vi.engine import Engine
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder, ForwardOrder, ForwardProcess, ReverseOrder
from pyro_vi.models import DDPM, VAE, DDPMChain
from pyro_vi.optimizers import OneOptimizer
from pyro_vi.schedules import Cosine, Learned
from pyro_vi.svi import SVI, eager_steps

Programs = tuple[Callable[..., Any], Callable[..., Any], ELBO, tuple[Any, ...]]
SCHOOLS = (SCHOOLS_Y.double(), SCHOOLS_SIGMA.double())
IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double().round()


@pytest.fixture(autouse=True)
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(before)


def auto(kind: Callable[..., Any], loss: ELBO | None = None) -> Programs:
    return eight_schools, kind(eight_schools), loss or Trace_ELBO(), SCHOOLS


def guide_list() -> Programs:
    guide = AutoGuideList(eight_schools)
    guide.append(AutoDiagonalNormal(poutine.block(eight_schools, expose=["mu", "tau"])))
    guide.append(AutoNormal(poutine.block(eight_schools, hide=["mu", "tau"])))
    return eight_schools, guide, Trace_ELBO(), SCHOOLS


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


def ddpm(net: nn.Module, learned: bool, loss: ELBO) -> Programs:
    diffusion = Diffusion((1, 4, 4), Learned(20).double() if learned else Cosine(20), draws=2)
    return DDPM(diffusion, net.double()).double(), ForwardProcess(diffusion), loss, (IMAGES,)


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
        ddpm, UNet((1, 4, 4), 20, channels=(8,), attention=()), False, TraceMeanField_ELBO()
    ),
    "DDPM, learned schedule": partial(
        ddpm, MLPDenoiser((1, 4, 4), 20), True, TraceMeanField_ELBO()
    ),
    "DDPM, sampled KLs": partial(ddpm, MLPDenoiser((1, 4, 4), 20), False, Trace_ELBO()),
    "DDPM chain": partial(chain, ReverseOrder, TraceMeanField_ELBO()),
    "DDPM chain, forward order": partial(chain, ForwardOrder, Trace_ELBO()),
}


def adam() -> OneOptimizer:
    return OneOptimizer(partial(torch.optim.Adam, lr=0.01))


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

    recorded = record(svi, parameters, args, {})
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


# ------------------------------------------------------------------------------------ SVI and fit


@pytest.fixture
def recorded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records, and leaves Inductor out, which takes seconds a program."""
    monkeypatch.setattr(Graph, "compile", lambda self, batch: None)


def run(optim: PyroOptim, compile: bool, steps: int = 6) -> tuple[SVI, list[float], Any]:
    """Losses, and the optimizer's state after them."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, loss, args = beta_bernoulli()
    svi = SVI(model, guide, optim, loss, compile=compile)
    losses = [svi.step(*args) for _ in range(steps)]
    return svi, losses, optim.get_state()


OPTIMIZERS: dict[str, Callable[[], PyroOptim]] = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05, "betas": (0.8, 0.99)}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.05, "weight_decay": 0.1}),
    "AMSGrad": lambda: pyro.optim.Adam({"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    "SGD": lambda: pyro.optim.SGD({"lr": 1e-3}),
    "SGD with momentum": lambda: pyro.optim.SGD(
        {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    ),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam(
        {"lr": 0.05, "lrd": 0.9, "clip_norm": 0.5, "weight_decay": 0.1}
    ),
    "clipped by tensor": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.3}),
    "clipped by value": lambda: pyro.optim.SGD({"lr": 0.01}, {"clip_value": 0.3}),
    "arguments by parameter": lambda: pyro.optim.Adam(
        lambda name: {"lr": 0.1 if name == "a" else 0.01}
    ),
    "one for all": lambda: OneOptimizer(
        partial(torch.optim.AdamW, lr=0.05),
        schedule=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.8),
        clip_norm=0.7,
    ),
    "outside the graph": lambda: pyro.optim.RMSprop({"lr": 0.01}),
}


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_the_optimizer(name: str) -> None:
    _, expected, theirs = run(OPTIMIZERS[name](), False)
    svi, found, mine = run(OPTIMIZERS[name](), True)
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(svi._recorder.recorded) == 1
    (numbers, spec), (others, other) = tree_flatten(mine), tree_flatten(theirs)
    assert spec == other
    for one, another in zip(numbers, others, strict=True):
        if one is not None and another is not None:
            one, another = (torch.as_tensor(value).double() for value in (one, another))
            torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-9)


def test_a_compiled_step_is_the_eager_one() -> None:
    """By Inductor, the optimizer in it."""
    _, expected, _ = run(pyro.optim.Adam({"lr": 0.05}), False)
    svi, found, _ = run(pyro.optim.Adam({"lr": 0.05}), True)
    assert found == pytest.approx(expected, rel=1e-9)
    assert isinstance(found[-1], float)
    (recorded,) = svi._recorder.recorded
    assert recorded._graph._run is not recorded._graph.module


@pytest.mark.usefixtures("recorded_alone")
def test_batches_of_another_shape_stay_eager() -> None:
    torch.manual_seed(0)
    svi = SVI(coin, coin_guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), compile=True)
    x = torch.tensor([1.0, 0.0, 1.0, 1.0])
    losses = [svi.step(x) for _ in range(4)]
    assert len(svi._recorder.recorded) == 1
    assert all(isinstance(svi.step(x[:3]), float) for _ in range(3))
    assert len(svi._recorder.recorded) == 1 and losses[0] != losses[-1]
    svi.step(x.float())  # of another dtype
    svi.step(torch.stack([x, x], -1)[:, 0])  # of other strides
    assert len(svi._recorder.recorded) == 1


@pytest.mark.usefixtures("recorded_alone")
def test_parameters_that_are_others_are_seen() -> None:
    svi, _, _ = run(pyro.optim.Adam({"lr": 0.05}), True)
    x = torch.tensor([1.0] * 6 + [0.0] * 4)
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match="parameter 'a' is another one"):
        loss = svi.step(x)  # eager, with new parameters
    assert svi._recorder.recorded == [] and isinstance(loss, float)
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    for _ in range(20):  # ten times as many as before
        svi.step(x)
    assert len(svi._recorder.recorded) == 1
    assert all(not torch.equal(v, before[n]) for n, v in pyro.get_param_store().items())


CHANGES: dict[str, Callable[[SVI, nn.Module], object]] = {
    "mode": lambda svi, encoder: encoder.eval(),
    "frozen": lambda svi, encoder: encoder.requires_grad_(False),
    "moved": lambda svi, encoder: encoder.float().double(),
    "optimizer": lambda svi, encoder: setattr(svi, "optim", adam()),
    "model": lambda svi, encoder: setattr(svi, "model", poutine.scale(svi.model, scale=2.0)),
}


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")  # says Pyro
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps_is_seen(change: str) -> None:
    torch.manual_seed(0)
    model, guide, loss, args = by_pyro_module()
    encoder = guide.__closure__[0].cell_contents  # type: ignore[attr-defined]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.0}), loss, compile=True)
    for _ in range(4):
        svi.step(*args)
    assert svi._recorder.recorded
    CHANGES[change](svi, encoder)
    with pytest.warns(UserWarning, match="steps are eager for a while, 20 of a kind: "):
        svi.step(*args)
    assert not svi._recorder.recorded


TEMPERATURE = 1.0
LIST, ARRAY, NAMESPACE = [1.0], np.ones(1), SimpleNamespace(beta=1.0)


class Config:
    beta = 1.0


class Annealed:
    """A model that reads a number from one of the places where people keep them."""

    def __init__(self, where: str) -> None:
        self.where, self.beta, self.options = where, 1.0, {"beta": 1.0}
        beta = 1.0

        def read() -> float:
            return beta

        def bind(value: float) -> None:
            nonlocal beta
            beta = value

        self.read, self.bind = read, bind

    def set(self, value: float) -> None:
        global TEMPERATURE
        self.bind(value)
        TEMPERATURE = self.beta = self.options["beta"] = LIST[0] = Config.beta = value
        ARRAY[0] = NAMESPACE.beta = value
        self.pair = (value, 0.0)

    def __call__(self, x: Tensor) -> None:
        if self.where == "closure":
            scale = self.read()
        elif self.where == "global":
            scale = TEMPERATURE
        elif self.where == "dictionary":
            scale = self.options["beta"]
        elif self.where == "list":
            scale = LIST[0]
        elif self.where == "class":
            scale = Config.beta
        elif self.where == "tuple":
            scale = self.pair[0]
        elif self.where == "array":
            scale = float(ARRAY[0])
        elif self.where == "namespace":
            scale = NAMESPACE.beta
        else:
            scale = self.beta
        with poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize(
    "where",
    [
        *("closure", "global", "dictionary", "attribute", "list", "class", "tuple", "array"),
        "namespace",
    ],
)
def test_numbers_that_change_are_seen(where: str) -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))

    model, losses = Annealed(where), {}
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model.set(1.0)
        svi = SVI(model, guide, adam(), Trace_ELBO(), compile=compile)
        x = torch.ones(3)
        losses[compile] = [svi.step(x) for _ in range(4)]
        assert compile is False or svi._recorder.recorded
        model.set(0.3)
        expected = pytest.warns(
            UserWarning, match="steps are eager for a while, 20 of a kind: .* another value"
        )
        with expected if compile else nullcontext():
            losses[compile] += [svi.step(x) for _ in range(2)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-10)


@pytest.mark.usefixtures("recorded_alone")
def test_recording_leaves_generators_and_buffers() -> None:
    torch.manual_seed(0)
    model, guide, loss, args = by_pyro_module()
    decoder = model.__closure__[0].cell_contents  # type: ignore[attr-defined]
    svi = SVI(model, guide, adam(), loss)
    _, parameters = svi._evaluate(*args)
    svi._update(parameters)
    buffers = [b.clone() for b in decoder.buffers()]
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    recorded = record(svi, parameters, args, {})
    assert torch.equal(before, torch.get_rng_state())
    assert (numbers == np.random.get_state()[1]).all()
    assert all(torch.equal(b, old) for b, old in zip(decoder.buffers(), buffers, strict=True))
    recorded(list(args))
    assert not torch.equal(next(decoder.buffers()), buffers[0])  # batch norm's, by the graph


class Remembering(nn.Module):
    """A decoder that keeps something from run to run, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.seen = how, 0, torch.zeros(())
        self.register_buffer("mean", torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        if self.how == "buffer":
            self.mean = 0.9 * self.mean + 0.1 * z.detach()
            return z + self.mean + self.shift
        if self.how == "attribute":
            self.seen = self.seen + 1.0
            return z + self.seen + self.shift
        if self.how == "number":
            self.calls += 1
            return z + self.calls + self.shift
        self.seen = z.detach()  # which is never read
        return z + self.shift


def remembering(how: str) -> tuple[SVI, Tensor]:
    pyro.clear_param_store()
    net = Remembering(how)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(net(z), 1.0).expand(x.shape).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))

    torch.manual_seed(0)
    return SVI(model, guide, adam(), Trace_ELBO(), compile=True), torch.ones(3)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize("how", ["buffer", "cache"])
def test_buffers_that_are_bound_anew_are_followed(how: str) -> None:
    svi, x = remembering(how)
    found = [svi.step(x) for _ in range(6)]
    assert svi._recorder.recorded
    svi, x = remembering(how)
    svi._recorder = None
    assert found == pytest.approx([svi.step(x) for _ in range(6)], rel=1e-10)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize(("how", "name"), [("attribute", "seen"), ("number", "calls")])
def test_what_a_module_remembers_besides_is_refused(how: str, name: str) -> None:
    svi, x = remembering(how)
    with pytest.warns(UserWarning, match=f"Remembering sets its '{name}' in a run"):
        for _ in range(3):
            svi.step(x)
    assert not svi._recorder.recorded


class Odd:
    """Programs of one latent, whose model does something that no graph can follow."""

    calls = 0

    def __init__(self, does: str) -> None:
        self.does = does

    def __call__(self, x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        shift = 0.0
        if self.does == "item":
            shift = z.item()  # here
        elif self.does == "branch" and z > 0:  # here
            shift = 1.0
        elif self.does == "numpy":
            shift = float(np.random.rand())
        elif self.does == "random":
            shift = random.random()
        elif self.does == "counter":
            self.calls += 1
            shift = float(self.calls)
        elif self.does == "nonzero":
            x = x[x > 0]  # here
        pyro.sample("x", dist.Normal(z + shift, 1.0).expand(x.shape).to_event(1), obs=x)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("item", r"test_compiled\.py:\d+\)"),
        ("branch", r"test_compiled\.py:\d+\)"),
        ("nonzero", r"test_compiled\.py:\d+\)"),
        ("numpy", "random numbers of Python or NumPy"),
        ("random", "random numbers of Python or NumPy"),
        ("counter", "Odd sets its 'calls' in a run, and the next may read it"),
    ],
)
def test_what_no_graph_follows_stays_eager_and_is_said_once(does: str, reason: str) -> None:
    model = Odd(does)
    x = torch.tensor([0.3, -0.2, 1.5])

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), compile=True)
    svi.step(x)
    with pytest.warns(UserWarning, match=f"steps stay eager: .*{reason}") as caught:
        for _ in range(4):
            svi.step(x)
    assert len([w for w in caught if "stay eager" in str(w.message)]) == 1
    assert not svi._recorder.recorded


# ------------------------------------------------------------------- what a record could not see


def simple_guide(x: Tensor, *_: Any, **__: Any) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))


def observe(z: Tensor, x: Tensor) -> None:
    pyro.sample("x", dist.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)


X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
Run = tuple[Callable[..., Any], Callable[..., Any], Callable[[Any, int], Any]]


def stepping(svi: Any, i: int) -> Any:
    return svi.step(X)


def laplace() -> Run:
    """Parameters of a PyroModule that are plain nn.Parameters."""

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = PyroModule[nn.Linear](3, 1)

        def forward(self, x: Tensor) -> None:
            pyro.sample("z", dist.Normal(self.net(x)[0], 0.5))

    def model(x: Tensor) -> None:
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    return model, Guide(), stepping


def module_as_argument() -> Run:
    net = nn.Linear(1, 1)

    def model(x: Tensor, net: nn.Module) -> None:
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(net(z.reshape(1))[0], x)

    return model, simple_guide, lambda svi, i: svi.step(X, net)


def literal() -> Run:
    """A tensor that is made of a number that changes."""

    class Model:
        n = 0

        def __call__(self, x: Tensor) -> None:
            self.n += 1
            scale = torch.tensor(self.n / 10.0)
            observe(scale * pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    return Model(), simple_guide, stepping


def iterator() -> Run:
    batches = iter(torch.arange(60.0, dtype=torch.float64).reshape(20, 3) / 60)

    def model() -> None:
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), next(batches))

    def guide() -> None:
        simple_guide(X)

    return model, guide, lambda svi, i: svi.step()


def item_of_a_closure() -> Run:
    beta = torch.tensor(1.0)

    def model(x: Tensor) -> None:
        observe(pyro.sample("z", dist.Normal(0.0, 0.5 + beta.item())), x)

    def step(svi: Any, i: int) -> Any:
        beta.fill_(1.0 / (1 + i))
        return svi.step(X)

    return model, simple_guide, step


def average_in_a_closure() -> Run:
    mean = torch.tensor(0.0)

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean.mul_(0.5).add_(z.detach())
        observe(z + mean, x)

    return model, simple_guide, stepping


def reseeded() -> Run:
    def model(x: Tensor) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            w = torch.randn(3)
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)) * w, x)

    return model, simple_guide, stepping


def generator_of_its_own() -> Run:
    generator = torch.Generator().manual_seed(0)

    def model(x: Tensor) -> None:
        w = torch.randn(3, generator=generator)
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)) * w, x)

    return model, simple_guide, stepping


def plain(x: Tensor) -> None:
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)


def handler_around() -> Run:
    def step(svi: Any, i: int) -> Any:
        with poutine.scale(scale=1.0 + i % 3):
            return svi.step(X)

    return plain, simple_guide, step


def handler_around_later() -> Run:
    def step(svi: Any, i: int) -> Any:
        with poutine.scale(scale=3.0) if i > 5 else nullcontext():
            return svi.step(X)

    return plain, simple_guide, step


def float_argument() -> Run:
    def model(x: Tensor, beta: float) -> None:
        with poutine.scale(scale=beta):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z, x)

    return model, simple_guide, lambda svi, i: svi.step(X, 0.1 * (i + 1))


def object_argument() -> Run:
    class Batch:
        x = X

    batch = Batch()

    def model(batch: Batch) -> None:
        plain(batch.x)

    def step(svi: Any, i: int) -> Any:
        batch.x = X + i
        return svi.step(batch)

    return model, simple_guide, step


def exchanged_part() -> Run:
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.0))

    def model(x: Tensor) -> None:
        pyro.module("net", net, update_module_params=True)
        observe(net(pyro.sample("z", dist.Normal(0.0, 1.0)).reshape(1))[0], x)

    def step(svi: Any, i: int) -> Any:
        if i == 6:
            net[1].p = 0.5
        return svi.step(X)

    return model, simple_guide, step


def hook_on_a_parameter() -> Run:
    def step(svi: Any, i: int) -> Any:
        if i == 5:
            pyro.get_param_store()._params["loc"].register_hook(lambda g: 0.1 * g)
        return svi.step(X)

    return plain, simple_guide, step


def one_cycle() -> Run:
    def step(svi: Any, i: int) -> Any:
        for one in svi.optim.optim_objs.values():
            one.param_groups[0]["betas"] = (0.95 - 0.04 * i, 0.999)
        return svi.step(X)

    return plain, simple_guide, step


def loaded_state() -> Run:
    def step(svi: Any, i: int) -> Any:
        if i == 6:
            for one in svi.optim.optim_objs.values():
                state = one.state_dict()
                state["state"][0]["exp_avg"] = torch.tensor(5.0)
                one.load_state_dict(state)
        return svi.step(X)

    return plain, simple_guide, step


def unused_now_and_then() -> Run:
    """What a step does not use has a gradient of zero, and momentum moves it."""

    def guide(x: Tensor, flag: bool) -> None:
        loc = pyro.param("loc", torch.tensor(0.1))
        other = pyro.param("other", torch.tensor(0.3))
        pyro.sample("z", dist.Normal(loc + other if flag else loc + other.detach(), 0.5))

    def model(x: Tensor, flag: bool) -> None:
        plain(x)

    return model, guide, lambda svi, i: svi.step(X, i < 3)


def particles_changed() -> Run:
    def step(svi: Any, i: int) -> Any:
        if i == 6:
            LOSSES[-1].num_particles = 3
        return svi.step(X)

    return plain, simple_guide, step


def negative_zero() -> Run:
    def model(x: Tensor, a: float) -> None:
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)) + math.copysign(1.0, a), x)

    return model, simple_guide, lambda svi, i: svi.step(X, -0.0 if i % 5 == 4 else 0.0)


def outer_mask() -> Run:
    """Masks of model and guide that are one in some steps alone."""

    def model(x: Tensor, mask: Tensor, other: Tensor) -> None:
        with poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z, x)

    def guide(x: Tensor, mask: Tensor, other: Tensor) -> None:
        with poutine.mask(mask=other):
            simple_guide(x)

    yes, no = torch.tensor(True), torch.tensor(False)
    return model, guide, lambda svi, i: svi.step(X, yes, no if i == 6 else yes)


SEEN: dict[str, Callable[[], Run]] = {
    one.__name__: one
    for one in (
        *(laplace, module_as_argument, literal, iterator, item_of_a_closure, average_in_a_closure),
        *(reseeded, generator_of_its_own, handler_around, handler_around_later, float_argument),
        *(object_argument, exchanged_part, hook_on_a_parameter, one_cycle, loaded_state),
        *(unused_now_and_then, particles_changed, negative_zero, outer_mask),
    )
}
LOSSES: list[Any] = []


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.filterwarnings("ignore:steps (stay|are) eager")
@pytest.mark.parametrize("name", SEEN)
def test_nothing_goes_unseen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps with and without records are the same: replayed where that is right alone."""
    monkeypatch.setattr("pyro_vi.recorder._OTHER", 1)
    runs, replays, replay = [], [], Recorded.__call__

    def counted(self: Recorded, batch: Any) -> Tensor:
        replays.append(None)
        return replay(self, batch)

    monkeypatch.setattr(Recorded, "__call__", counted)
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide, step = SEEN[name]()
        LOSSES.append(TraceMeanField_ELBO() if name == "outer_mask" else Trace_ELBO())
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), LOSSES[-1], compile=compile)
        replays.clear()
        losses = [step(svi, i) for i in range(12)]
        params = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
        runs.append((losses, params))
    (eager, expected), (found, params) = runs
    if name == "iterator":  # from which recording takes too, so that the runs differ
        assert not svi._recorder.recorded
        return
    if name in ("laplace", "module_as_argument", "particles_changed", "outer_mask"):
        assert replays  # and not for want of a record
    assert found == pytest.approx(eager, rel=1e-8)
    for key, value in expected.items():
        torch.testing.assert_close(params[key], value, rtol=1e-6, atol=1e-9)


FITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm-up": {"kl_weight": warmup(6)},
    "schedule and clipping": {
        "schedule": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.8),
        "clip_norm": 0.5,
    },
    "average and held-out": {"average": 0.9, "heldout": IMAGES[:2], "heldout_every": 3},
    "importance-weighted": {
        "loss": RenyiELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    },
}


@pytest.fixture
def read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps are read as on a GPU, many at once."""
    monkeypatch.setattr(
        fitting, "Engine", lambda *args, **options: Engine(*args, **{**options, "late": True})
    )


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize(
    ("name", "late"),
    [*((name, False) for name in FITS), ("warm-up", True), ("schedule and clipping", True)],
)
def test_a_fit_is_the_same_compiled(name: str, late: bool, request: pytest.FixtureRequest) -> None:
    model, guide, loss, _ = vae(FullCovariance, TraceMeanField_ELBO())
    options = {"loss": loss, "steps": 8, "batch_size": 3, "progress": False, **FITS[name]}
    eager = fit(model, guide, IMAGES, **options)
    if late:
        request.getfixturevalue("read_late")
    compiled = fit(model, guide, IMAGES, compile=True, **options)
    for part in ("losses", "reconstruction", "kl", "heldout"):
        torch.testing.assert_close(
            getattr(compiled, part), getattr(eager, part), rtol=1e-6, atol=1e-8
        )


@pytest.mark.usefixtures("recorded_alone")
def test_late_steps_after_a_bad_one_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that the graph finds bad and the eager step does not: as if nothing had been."""
    model, guide, loss, _ = vae(FullCovariance, TraceMeanField_ELBO())
    options = {"loss": loss, "steps": 12, "batch_size": 3, "progress": False}
    eager = fit(model, guide, IMAGES, **options)
    run, calls = Recorded.__call__, []

    def once_bad(self: Recorded, batch: Any) -> Tensor:
        calls.append(None)
        if len(calls) == 4:
            self._step.alive.fill_(False)
        status = run(self, batch)
        if len(calls) == 4:
            status[3] = 0.0
        return status

    monkeypatch.setattr(Recorded, "__call__", once_bad)
    monkeypatch.setattr(
        fitting, "Engine", lambda *args, **options: Engine(*args, **{**options, "late": True})
    )
    compiled = fit(model, guide, IMAGES, compile=True, **options)
    assert len(calls) == 9 + 5  # five after the bad one, twice
    torch.testing.assert_close(compiled.losses, eager.losses, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("recorded_alone")
@pytest.mark.parametrize("late", [False, True])
def test_a_bad_step_names_its_site_and_keeps_the_last_finite_parameters(
    late: bool, request: pytest.FixtureRequest
) -> None:
    """Three steps to the cliff: the scale is the exponential of a parameter that runs away."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(5.0))
        pyro.sample("z", dist.Normal(0.0, 1.0 + 0 * (a - 2.0).sqrt()))

    optim = partial(torch.optim.SGD, lr=1.0)

    def slide(x: Tensor) -> None:
        guide(x)
        pyro.factor("slope", pyro.param("a"), has_rsample=True)

    errors = []
    for compile in (False, True):
        if compile and late:
            request.getfixturevalue("read_late")
        with pytest.raises(NonFiniteError) as caught:
            fit(
                model, slide, torch.zeros(4), optim=optim, steps=50, compile=compile, progress=False
            )
        errors.append(caught.value)
    assert errors[0].step == errors[1].step > 3
    assert str(errors[0]) == str(errors[1])
    for error in errors:
        assert all(t.isfinite().all() for t in error.fit.model.state.tensors().values())


def test_wrong_ways_to_compile_are_refused() -> None:
    with pytest.raises(ValueError, match="expected compile to be True, False or 'auto', got 'yes'"):
        SVI(coin, coin_guide, pyro.optim.Adam({}), Trace_ELBO(), compile="yes")  # type: ignore[arg-type]


def test_a_step_is_compiled_by_counts_alone() -> None:
    loss = told(Trace_ELBO())
    assert [eager_steps("auto", loss, steps) for steps in (4_999, 5_000)] == [None, 2]
    assert eager_steps("auto", loss) == 5_000
    assert (eager_steps(True, loss), eager_steps(False, loss)) == (2, None)


def test_other_losses_stay_eager() -> None:
    enumerated = TraceEnum_ELBO()
    with pytest.warns(UserWarning, match="steps stay eager: those of TraceEnum_ELBO are not rec"):
        svi = SVI(coin, coin_guide, pyro.optim.Adam({}), enumerated, compile=True)
    assert svi._recorder is None
    assert SVI(coin, coin_guide, pyro.optim.Adam({}), enumerated)._recorder is None
