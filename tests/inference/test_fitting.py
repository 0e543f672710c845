"""fit(): reaches the known optimum, leaves its inputs alone, refuses what it cannot do right."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import (
    SCHOOLS_SIGMA,
    SCHOOLS_Y,
    eight_schools,
    global_and_local,
    global_and_local_guide,
    normal_mean,
    normal_mean_guide,
)
from pyro.infer import JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR

from pyro_vi import NonFiniteError, fit, warmup
from pyro_vi.data import binarize
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE, LinearGaussian

fit = partial(fit, progress=False)


def identity(shape: tuple[int, ...], width: int) -> nn.Module:
    """The context is the data: the best encoder of a linear-Gaussian model is linear."""
    return nn.Identity()


def linear_gaussian() -> LinearGaussian:
    weight = torch.tensor([[1.0, 0.4], [0.3, 1.0], [0.8, -0.2], [0.1, 0.9]]).double()
    return LinearGaussian(weight, torch.tensor([0.5, -0.2, 0.0, 0.1]).double(), 0.6)


def draws_of(model: LinearGaussian, num: int) -> Tensor:
    z = torch.randn(num, 2).double()
    noise = torch.randn(num, 4).double() * 0.6
    return z @ model.weight.T + model.bias + noise


# ------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        (MeanField(2, 4), 1500),
        (FullCovariance(2, 4), 1500),
        (LowRank(2, 4, rank=1), 1500),
        (Flow(2, 4), 1500),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_gap_on_a_linear_gaussian_model_is_the_closed_form(
    family: nn.Module, steps: int
) -> None:
    model = linear_gaussian()
    train, test = draws_of(model, 512), draws_of(model, 200)
    fitted = fit(
        model,
        Encoder((4,), family.double(), network=identity),
        train,
        loss=TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        optim=partial(torch.optim.Adam, lr=0.02),
        schedule=partial(CosineAnnealingLR, T_max=steps),
        steps=steps,
        batch_size=128,
    )
    posterior = fitted.posterior(test, 1000)
    gap = float(model.log_evidence(test).mean()) - float(posterior.elbo().value.mean())
    known = {MeanField: model.mean_field_gap()}.get(type(family), 0.0)
    tolerance = {MeanField: 0.02 * float(known), Flow: 0.02}.get(type(family), 0.01)
    assert abs(gap - float(known)) < tolerance
    # The estimate that needs no exact evidence agrees.
    estimated = float(posterior.kl_to_posterior().value.mean())
    assert abs(estimated - gap) < 0.02


def test_low_rank_reaches_a_posterior_that_is_diagonal_plus_rank_two() -> None:
    """Built backwards: P^-1 = D + FF' in five dimensions, where mean-field keeps a gap."""
    d = torch.tensor([0.2, 0.25, 0.15, 0.3, 0.2]).double()
    f = torch.tensor([[0.5, 0.1], [-0.4, 0.3], [0.3, 0.4], [0.2, -0.5], [-0.3, 0.2]]).double()
    precision = torch.linalg.inv(d.diag() + f @ f.T)
    scale = 0.5
    weight = torch.linalg.cholesky((precision - torch.eye(5)) * scale**2).T  # W'W = s^2 (P - I)
    model = LinearGaussian(weight, torch.zeros(5).double(), scale)
    covariance = model.posterior(torch.zeros(1, 5).double()).covariance_matrix[0]
    assert torch.allclose(covariance, d.diag() + f @ f.T)
    z, noise = torch.randn(712, 5).double(), scale * torch.randn(712, 5).double()
    x = z @ weight.T + noise
    gaps = {}
    for rank, family in ((0, MeanField(5, 5)), (2, LowRank(5, 5, rank=2))):
        fitted = fit(
            model,
            Encoder((5,), family.double(), network=identity),
            x[:512],
            loss=TraceMeanField_ELBO(
                num_particles=4, vectorize_particles=True, max_plate_nesting=1
            ),
            optim=partial(torch.optim.Adam, lr=0.02),
            schedule=partial(CosineAnnealingLR, T_max=2000),
            steps=2000,
            batch_size=128,
        )
        elbo = fitted.posterior(x[512:], 1000).elbo().value
        gaps[rank] = float(model.log_evidence(x[512:]).mean() - elbo.mean())
    assert gaps[0] == pytest.approx(float(model.mean_field_gap()), rel=0.03)
    assert abs(gaps[2]) < 0.01 < gaps[0]


def test_a_global_latent_from_minibatches_reaches_the_conjugate_posterior() -> None:
    x = torch.randn(60).double() + 1.5
    precision = 1 / 4 + 60
    fitted = fit(
        normal_mean,
        normal_mean_guide,
        x,
        loss=TraceMeanField_ELBO(),
        optim=partial(torch.optim.Adam, lr=0.02),
        schedule=partial(CosineAnnealingLR, T_max=1500),
        steps=1500,
        batch_size=20,
    )
    found = fitted.guide.state.tensors()
    assert float(found["param.loc"]) == pytest.approx(float(x.sum() / precision), abs=0.02)
    assert float(found["param.scale"].exp()) == pytest.approx(precision**-0.5, rel=0.05)


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO])
def test_eight_schools_under_either_bound(kind: type) -> None:
    """The non-centred posterior's best mean-field has a median tau near 2.3; Pyro's own
    TraceMeanField_ELBO ends at 0.05, since it drops the Jacobian of tau."""
    fitted = fit(
        eight_schools,
        AutoDiagonalNormal(eight_schools),
        {"y": SCHOOLS_Y.double(), "sigma": SCHOOLS_SIGMA.double()},
        loss=kind(num_particles=10, vectorize_particles=True, max_plate_nesting=1),
        optim=partial(torch.optim.Adam, lr=0.05),
        schedule=partial(CosineAnnealingLR, T_max=600),
        steps=600,
    )
    tau = fitted.guide.state.tensors()["guide.loc"][1].exp()
    assert 1.9 < float(tau) < 3.2
    assert float(fitted.losses[-200:].mean() * 8) == pytest.approx(31.2, abs=0.6)


def test_losses_are_negative_bounds_in_nats_per_data_point() -> None:
    x = torch.randn(8).double()
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(8).double(), torch.eye(8).double() + 4
    ).log_prob(x)
    precision = 1 / 4 + 8

    def exact(x: Tensor) -> None:
        pyro.param("unused", x.new_tensor(0.0))
        zero = 0 * pyro.param("unused")
        pyro.sample("mean", dist.Normal(x.sum() / precision + zero, precision**-0.5))

    for batch_size in (None, 8):
        fitted = fit(normal_mean, exact, x, steps=5, batch_size=batch_size)
        assert torch.allclose(fitted.losses, -evidence / 8, rtol=0, atol=1e-10)
        assert torch.allclose(fitted.reconstruction - fitted.kl, -fitted.losses, atol=1e-10)


def test_the_importance_weighted_bound_is_the_mean_over_data_points() -> None:
    model = linear_gaussian()
    x = draws_of(model, 256)
    guide = Encoder((4,), MeanField(2, 4).double(), network=identity)
    losses = {}
    for particles in (2, 50):
        fitted = fit(
            model,
            guide,
            x,
            loss=RenyiELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1),
            optim=partial(torch.optim.SGD, lr=0.0),
            steps=30,
            batch_size=64,
        )
        posterior = fitted.posterior(x, 2000)
        losses[particles] = -float(fitted.losses.mean())
    evidence = float(model.log_evidence(x).mean())
    elbo = float(posterior.elbo().value.mean())
    assert elbo < losses[2] < losses[50] < evidence
    # joint over a batch of 64, 50 particles would be about as poor as the ELBO
    assert evidence - losses[50] < 0.3 * (evidence - elbo)


# ------------------------------------------------------------------------------ what stays as is


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_nothing_that_comes_in_changes() -> None:
    images = torch.rand(32, 1, 4, 4).round()
    model, guide = VAE((1, 4, 4), 2), Encoder((1, 4, 4), MeanField(2, 8))
    optim = pyro.optim.Adam({"lr": 0.1})
    before = snapshot(model), snapshot(guide), images.clone(), torch.random.get_rng_state()
    pyro.param("mine", torch.tensor(1.0))
    fit(model, guide, images, optim=optim, steps=5, batch_size=8)
    for module, held in ((model, before[0]), (guide, before[1])):
        assert all(torch.equal(value, held[name]) for name, value in module.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in module.parameters())
        assert module.training
    assert torch.equal(images, before[2])
    assert torch.equal(torch.random.get_rng_state(), before[3])
    assert set(pyro.get_param_store()) == {"mine"}
    assert optim.optim_objs == {}
    auto = AutoNormal(normal_mean)
    fit(normal_mean, auto, torch.ones(3), steps=3)
    assert auto.prototype_trace is None


def test_a_fit_does_not_change_when_another_of_its_class_is_fitted() -> None:
    x = torch.randn(20)
    for guide in (AutoDiagonalNormal(normal_mean), normal_mean_guide):
        first = fit(normal_mean, guide, x, steps=20)
        held = first.guide.state.snapshot()
        second = fit(normal_mean, guide, x + 10, steps=300, optim=partial(torch.optim.Adam, lr=0.1))
        assert all(torch.equal(t, held[n]) for n, t in first.guide.state.tensors().items())
        loc = next(name for name in held if name.endswith("loc"))
        assert float(second.guide.state.tensors()[loc].mean()) > float(held[loc].mean()) + 5


@pytest.mark.parametrize(
    "guide", [normal_mean_guide, AutoDiagonalNormal(normal_mean), AutoNormal(normal_mean)]
)
def test_the_same_seed_gives_the_same_run(guide: Callable[..., Any]) -> None:
    x = torch.randn(30)
    runs = [fit(normal_mean, guide, x, steps=10, batch_size=5, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert not torch.equal(runs[0].losses, runs[2].losses)


def test_a_module_behind_pyro_module_is_trained_in_the_fit_alone() -> None:
    net = nn.Linear(1, 1)
    before = snapshot(net)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(net(z[:, None])[:, 0], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("weight", torch.tensor(0.1)) * x, 0.5))

    fitted = fit(
        model,
        guide,
        torch.randn(20) + 2,
        steps=30,
        batch_size=10,
        optim=partial(torch.optim.Adam, lr=0.1),
    )
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    trained = fitted.model.state.tensors()
    assert float(trained["model.net.bias"]) > float(before["bias"]) + 0.5


class Named(PyroModule):
    """Half of a pair whose modules may have one name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(1, 1))


class NamedModel(Named):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            mean = getattr(self, self.name)(z)
            pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)


class NamedGuide(Named):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = getattr(self, self.name)(x)
            pyro.sample("z", dist.Normal(mean, 0.3).to_event(1))


def test_a_guide_whose_names_are_the_models_is_trained_all_the_same() -> None:
    x = 2 * torch.randn(50, 1) + 1
    losses = []
    for name in ("encoder", "net"):
        torch.manual_seed(1)
        model, guide = NamedModel("net"), NamedGuide(name)
        fitted = fit(model, guide, x, steps=50, optim=partial(torch.optim.Adam, lr=0.05))
        losses.append(fitted.losses)
        alone = fit(fitted.model, NamedGuide("net"), x, steps=2)
        assert alone.parameters == 2
    assert torch.equal(*losses)


def test_a_fitted_model_is_frozen_and_its_guide_is_trained() -> None:
    images = torch.rand(64, 1, 4, 4).round()
    model = VAE((1, 4, 4), 2)
    first = fit(model, Encoder((1, 4, 4), MeanField(2, 8)), images, steps=5, batch_size=16)
    held = first.model.state.snapshot()
    guide = Encoder((1, 4, 4), FullCovariance(2, 8))
    second = fit(first.model, guide, images, steps=5, batch_size=16)
    assert all(torch.equal(t, held[n]) for n, t in first.model.state.tensors().items())
    assert second.parameters == sum(p.numel() for p in guide.parameters())
    assert torch.equal(
        second.generate(4, expected=True)["x"], first.generate(4, expected=True)["x"]
    )
    with pytest.raises(TypeError, match="nothing to train"):
        fit(first.model, first.guide, images, steps=5, batch_size=16)


# ----------------------------------------------------------------------------------- the options


def test_schedules_clipping_and_pyro_optimizers() -> None:
    x = torch.randn(20) + 3
    still = fit(
        normal_mean,
        normal_mean_guide,
        x,
        steps=10,
        optim=partial(torch.optim.SGD, lr=0.1),
        schedule=partial(StepLR, step_size=1, gamma=0.0),
    )
    once = fit(normal_mean, normal_mean_guide, x, steps=1, optim=partial(torch.optim.SGD, lr=0.1))
    for name, tensor in once.guide.state.tensors().items():  # the schedule falls to 0 after a step
        assert torch.equal(still.guide.state.tensors()[name], tensor)
    clipped = fit(
        normal_mean,
        normal_mean_guide,
        x,
        steps=1,
        optim=partial(torch.optim.SGD, lr=1.0),
        clip_norm=1e-3,
    )
    start = {"param.loc": 0.3, "param.scale": math.log(0.5)}
    moved = [float(t) - start[n] for n, t in clipped.guide.state.tensors().items()]
    assert math.hypot(*moved) == pytest.approx(1e-3, rel=1e-3)
    decayed = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.0}
    )
    scheduled = fit(normal_mean, normal_mean_guide, x, steps=10, optim=decayed)
    for name, tensor in once.guide.state.tensors().items():
        assert torch.allclose(scheduled.guide.state.tensors()[name], tensor)
    for option in ({"clip_norm": 1.0}, {"schedule": partial(StepLR, step_size=1)}):
        with pytest.raises(ValueError, match="work on a torch optimizer"):
            fit(normal_mean, normal_mean_guide, x, optim=pyro.optim.Adam({"lr": 0.1}), **option)


def test_a_pyro_optimizer_is_told_the_parameters_names() -> None:
    names = []

    def per_parameter(name: str) -> dict[str, float]:
        names.append(name)
        return {"lr": 0.0 if "family" in name else 0.1}

    guide = Encoder((1, 4, 4), MeanField(2, 8))
    images = torch.rand(16, 1, 4, 4).round()
    fitted = fit(VAE((1, 4, 4), 2), guide, images, optim=pyro.optim.Adam(per_parameter), steps=2)
    assert len(names) == len(fitted.model.state.tensors())
    held = fitted.guide.state.tensors()
    assert torch.equal(held["guide.family.head.weight"], guide.family.head.weight)
    name = next(name for name in dict(guide.named_parameters()) if name.startswith("network"))
    assert not torch.equal(held[f"guide.{name}"], guide.get_parameter(name))


def test_the_kl_is_reported_unweighted() -> None:
    x = torch.randn(20)
    still = partial(torch.optim.SGD, lr=0.0)
    options = {"loss": TraceMeanField_ELBO(), "optim": still, "steps": 4}
    plain = fit(normal_mean, normal_mean_guide, x, **options)
    warm = fit(normal_mean, normal_mean_guide, x, kl_weight=warmup(4), **options)
    assert torch.allclose(plain.kl, warm.kl, atol=1e-5)
    weight = torch.tensor([0.25, 0.5, 0.75, 1.0]).double()
    assert torch.allclose(warm.losses, weight * plain.kl - warm.reconstruction, atol=1e-5)


def test_dynamic_binarization_is_drawn_anew_for_each_batch() -> None:
    seen = []

    def transform(batch: Tensor) -> Tensor:
        seen.append(binarize(batch))
        return seen[-1]

    images = torch.full((8, 1, 4, 4), 0.5)
    guide = Encoder((1, 4, 4), MeanField(2, 8))
    fit(VAE((1, 4, 4), 2), guide, images, transform=transform, steps=3)
    assert all(bool(((batch == 0) | (batch == 1)).all()) for batch in seen)
    assert not torch.equal(seen[-1], seen[-2])


def test_heldout_bounds_of_a_plate_that_is_told_the_size_of_the_data() -> None:
    """Pyro's own idiom of minibatches: its plate scales the batch to all data by itself."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", 100, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def exact(x: Tensor) -> None:
        zero = 0 * pyro.param("unused", torch.tensor(0.0))
        with pyro.plate("data", 100, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2 + zero, 0.5**0.5))

    x = torch.randn(100)
    fitted = fit(model, exact, x, heldout=x[:30], steps=1, batch_size=20)
    known = dist.Normal(0.0, 2**0.5).log_prob(x[:30]).mean()
    # the plate weighs the chunks of 20 and 10 rows alike, as it does in training
    assert float(fitted.heldout[0, 1]) == pytest.approx(float(known), abs=1e-4)


def test_an_autoguide_of_single_data_points_is_no_guide_to_others() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide, x = AutoNormal(model), torch.randn(10)
    with pytest.raises(ValueError, match="other data would be scored with these"):
        fit(model, guide, x, heldout=torch.randn(10), steps=1)
    fitted = fit(model, guide, x, steps=1)
    with pytest.raises(ValueError, match="expected the data that the guide was fitted to"):
        fitted.posterior(torch.randn(10), 30)


def test_heldout_bounds_and_early_stopping() -> None:
    model = linear_gaussian()
    train, test = draws_of(model, 128), draws_of(model, 100)
    guide = Encoder((4,), FullCovariance(2, 4).double(), network=identity)
    options = {
        "loss": TraceMeanField_ELBO(),
        "batch_size": 64,
        "heldout": test,
        "heldout_every": 10,
        "optim": partial(torch.optim.Adam, lr=0.02),
    }
    whole = fit(model, guide, train, steps=305, **options)
    assert whole.heldout[:, 0].tolist() == [*range(10, 301, 10), 305]
    elbo = whole.posterior(test, 2000).elbo()
    noise = 5 * float(elbo.se.mean()) * math.sqrt(2000 / 100)  # one draw a point, 100 points
    assert float(whole.heldout[-1, 1]) == pytest.approx(float(elbo.value.mean()), abs=noise)
    alone = fit(model, guide, train, steps=305, **{**options, "heldout": None})
    assert torch.equal(alone.losses, whole.losses)  # looking does not change the run
    # a learning rate that runs away after 150 steps: the best parameters are kept
    stopped = fit(
        model,
        guide,
        train,
        steps=2000,
        patience=3,
        schedule=partial(LambdaLR, lr_lambda=lambda step: 1.0 if step < 150 else 50.0),
        **options,
    )
    assert len(stopped.losses) < 2000
    best = stopped.heldout[:, 1].argmax()
    assert len(stopped.heldout) == best + 4
    kept = float(stopped.posterior(test, 2000).elbo().value.mean())
    assert kept == pytest.approx(float(stopped.heldout[best, 1]), abs=3 * noise)
    with pytest.raises(ValueError, match="with a global latent"):
        fit(normal_mean, normal_mean_guide, torch.randn(4), heldout=torch.randn(4))


# ------------------------------------------------------------------------------------- not finite


def exploding(at: float) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        pyro.factor("penalty", torch.where(mean.detach() > at, x.new_tensor(math.inf), 0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    return model


def drifting(x: Tensor) -> None:
    loc = pyro.param("loc", x.new_tensor(0.0))
    pyro.sample("mean", dist.Normal(loc, 1e-3))


def test_a_loss_that_is_not_finite_names_step_and_site_and_keeps_the_parameters() -> None:
    x = torch.full((10,), 5.0)
    with pytest.raises(NonFiniteError, match=r"step \d+: the loss is -inf; site 'penalty'") as info:
        fit(exploding(1.0), drifting, x, optim=partial(torch.optim.SGD, lr=0.05), steps=100)
    error = info.value
    assert error.step > 0 and len(error.fit.losses) == error.step
    loc = float(error.fit.guide.state.tensors()["param.loc"])
    assert 0.9 < loc < 1.3  # the last finite parameters, right where the model explodes
    assert bool(error.fit.losses.isfinite().all())


def test_a_gradient_that_is_not_finite_is_not_stepped_on() -> None:
    def guide(x: Tensor) -> None:
        root = pyro.param("root", x.new_tensor(0.0)).sqrt()  # infinite slope at 0
        pyro.sample("mean", dist.Normal(root, 1.0))

    with pytest.raises(NonFiniteError, match="the gradient of 'root' is not finite") as info:
        fit(normal_mean, guide, torch.ones(4), steps=5)
    assert float(info.value.fit.guide.state.tensors()["param.root"]) == 0.0


def test_a_distribution_of_nan_is_placed_after_the_last_site() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        with pyro.plate("data", len(x)):
            broken = torch.where(mean.detach() > 1, x.new_tensor(math.nan), mean)
            pyro.sample("x", dist.Normal(broken, 1.0), obs=x)

    with pytest.raises(NonFiniteError, match=r"step \d+, after site 'mean'"):
        fit(model, drifting, torch.full((10,), 5.0), optim=partial(torch.optim.SGD, lr=0.05))


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, "at least one step, got -1"),
        ({"steps": 2.5}, ValueError, r"at least one step, got 2\.5"),
        ({"batch_size": 0}, ValueError, "batch size from 1 to the number of data points, 10"),
        ({"batch_size": 11}, ValueError, "batch size from 1 to the number of data points, 10"),
        ({"loss": "elbo"}, TypeError, "one of Pyro's ELBOs"),
        ({"optim": 3}, TypeError, "got int"),
        ({"kl_weight": -1.0}, ValueError, "KL weight of at least 0"),
        ({"clip_norm": 0.0}, ValueError, "positive clip_norm"),
        ({"patience": 3}, ValueError, "without heldout"),
        ({"heldout_every": 0}, ValueError, "heldout_every of at least 1"),
        ({"seed": 1.5}, TypeError, "integer seed"),
        ({"seed": -1}, ValueError, r"seed from 0 to 2\^63 - 1, got -1"),
        ({"batch_size": 2.5}, TypeError, "whole number as batch size"),
        ({"kl_weight": "a"}, ValueError, "KL weight of at least 0, got 'a'"),
        ({"optim": pyro.optim.ClippedAdam}, TypeError, "a Pyro optimizer made with its arguments"),
        ({"optim": partial(torch.optim.LBFGS, lr=1)}, TypeError, "without a closure, got LBFGS"),
        ({"optim": partial(torch.optim.Adam, lr=-1)}, ValueError, "Invalid learning rate"),
        ({"device": "bogus"}, ValueError, "unknown device 'bogus'"),
        ({"loss": RenyiELBO(), "kl_weight": 0.5}, ValueError, "has no KL to weight"),
        ({"loss": RenyiELBO(), "batch_size": 5}, ValueError, "needs every site inside plate"),
        ({"loss": RenyiELBO(alpha=-1)}, ValueError, "no lower bound"),
        ({"loss": JitTrace_ELBO()}, TypeError, "keeps the programs .* use Trace_ELBO"),
        (
            {"schedule": partial(ReduceLROnPlateau, patience=2)},
            TypeError,
            "ReduceLROnPlateau needs a metric",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(global_and_local, global_and_local_guide, torch.randn(10), **{"steps": 2, **options})


def test_supports_that_differ_from_row_to_row_are_left_to_the_batches() -> None:
    trials = torch.arange(1.0, 13.0)

    def model(n: Tensor, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Binomial(n, logits=z), obs=x)

    def guide(n: Tensor, x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x)), 1.0))

    fitted = fit(model, guide, (trials, trials), steps=5, batch_size=4)
    assert len(fitted.losses) == 5
    with pytest.raises(ValueError, match="support"):
        fit(model, guide, (trials, trials + 1), steps=5, batch_size=4)


def test_bad_data() -> None:
    with pytest.raises(ValueError, match="1 NaN among the 3 values"):
        fit(normal_mean, normal_mean_guide, torch.tensor([1.0, math.nan, 2.0]))
    with pytest.raises(ValueError, match="at least one data point, but argument 0 has none"):
        fit(normal_mean, normal_mean_guide, torch.ones(0))
    with pytest.raises(TypeError, match="expected a callable as guide, got None"):
        fit(normal_mean, None, torch.ones(3))
    with pytest.raises(TypeError, match=r"dtype, torch\.float32, got torch\.float64") as info:
        fit(VAE((1, 4, 4), 2), Encoder((1, 4, 4), MeanField(2, 8)), torch.ones(3, 1, 4, 4).double())
    assert "Trace Shapes" not in str(info.value)  # Pyro's table is in the cause
    with pytest.raises(TypeError, match="got list"):
        fit(normal_mean, normal_mean_guide, [1.0, 2.0])
    vae, guide = VAE((1, 4, 4), 2), Encoder((1, 4, 4), MeanField(2, 8))
    with pytest.raises(ValueError, match=r"shape \(N, \*?\(?1, 4, 4\)?"):
        fit(vae, guide, torch.zeros(8, 1, 5, 5), batch_size=4)
    grey = torch.zeros(8, 1, 4, 4)
    grey[7] = 0.5  # not in the first batch: the whole of the data is held against the support
    with pytest.raises(ValueError, match="observed site 'x': expected values in the support of"):
        fit(vae, guide, grey, batch_size=4)
    with pytest.raises(ValueError, match=r"expects values of shape \(2,\), the guide gives \(3,\)"):
        fit(vae, Encoder((1, 4, 4), MeanField(3, 8)), torch.zeros(8, 1, 4, 4), batch_size=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="torch sees no CUDA"):
        fit(normal_mean, normal_mean_guide, torch.randn(3), device="cuda")


def test_on_a_device(device: torch.device) -> None:
    images = torch.rand(16, 1, 4, 4).round()
    guide = Encoder((1, 4, 4), FullCovariance(2, 8))
    fitted = fit(VAE((1, 4, 4), 2), guide, images, steps=3, batch_size=8, device=device)
    assert {t.device.type for t in fitted.model.state.tensors().values()} == {device.type}
    assert {p.device.type for p in guide.parameters()} == {"cpu"}
    assert fitted.generate(3)["x"].device.type == device.type


@pytest.mark.parametrize("steps", [1.5, -1, True, None])
def test_impossible_steps(steps: Any) -> None:
    words = f"at least one step, got {steps!r}" + (
        "" if steps == -1 else ", which is not an integer"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        fit(normal_mean, normal_mean_guide, torch.ones(3), steps=steps)


def test_counts_may_be_numpys_integers() -> None:
    x = torch.randn(8)
    options: dict[str, Any] = {"progress": False, "restarts": np.int64(1)}
    fitted = fit(
        normal_mean,
        normal_mean_guide,
        x,
        steps=np.int64(4),
        batch_size=np.int32(4),
        seed=np.int64(3),
        **options,
    )
    expected = fit(normal_mean, normal_mean_guide, x, steps=4, batch_size=4, seed=3, progress=False)
    assert torch.equal(fitted.losses, expected.losses)
    posterior = fitted.posterior(x, np.int64(30), seed=np.int64(1))
    assert posterior.num_draws == 30 and len(fitted.predict(x, np.int64(5))["x"]) == 5
    assert len(posterior.resampled(np.int64(7), seed=np.int64(2))["mean"]) == 7


def test_parameters_of_a_sub_sample_are_refused_in_words() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    with pytest.raises(ValueError, match="a parameter for each row of a plate that draws"):
        fit(model, AutoNormalMessenger(model), torch.randn(6), steps=2, progress=False)
