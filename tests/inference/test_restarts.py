"""Restarts: other initial values each, the best is returned, and a disagreement is warned of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import normal_mean, normal_mean_guide
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim.lr_scheduler import LambdaLR

from pyro_vi import NonFiniteError, fit
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.inference import Fit, perturb
from pyro_vi.models import VAE
from pyro_vi.programs import State

fit = partial(fit, progress=False)
adam = partial(torch.optim.Adam, lr=0.05)
still = partial(torch.optim.SGD, lr=0.0)
untrained = pytest.mark.filterwarnings("ignore:the restarts disagree")
IMAGES = (1, 4, 4)


def squared(x: Tensor) -> None:
    """Two modes, near 2 and -2; the second has some eight nats less under the prior."""
    m = pyro.sample("m", dist.Normal(x.new_tensor(1.0), 0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m**2, 1.0), obs=x)


def squared_guide(x: Tensor) -> None:
    """Starts in the valley of the worse mode."""
    loc = pyro.param("loc", x.new_tensor(-0.5))
    pyro.sample("m", dist.Normal(loc, 0.1))


def locs(fitted: Fit) -> list[float]:
    return [float(f.guide.state.tensors()["param.loc"]) for f in fitted.restarts]


def mean_bound(fitted: Fit) -> float:
    return -float(fitted.losses[-(len(fitted.losses) // 10) :].mean())


# ------------------------------------------------------------------------------ what is returned


def test_of_two_modes_the_better_is_returned_and_the_worse_is_warned_of() -> None:
    x = torch.full((5,), 4.0)
    options: dict[str, Any] = {"optim": adam, "steps": 150, "seed": 6}
    with pytest.warns(UserWarning, match="the restarts disagree: their bounds are") as caught:
        fitted = fit(squared, squared_guide, x, restarts=4, **options)
    assert [warning.filename for warning in caught] == [__file__]
    assert len(fitted.restarts) == 4
    found = locs(fitted)
    assert found[0] < -1.5 and max(found) > 1.5  # the first ends in the worse mode
    bounds = [mean_bound(f) for f in fitted.restarts]
    best = bounds.index(max(bounds))
    assert found[best] > 1.5
    assert torch.equal(fitted.losses, fitted.restarts[best].losses)
    assert fitted.guide is fitted.restarts[best].guide
    named = re.findall(r"(-?\d+\.\d+) ±", str(caught[0].message))
    assert [float(value) for value in named] == pytest.approx(bounds, abs=1e-4)
    alone = fit(squared, squared_guide, x, **options)
    assert torch.equal(alone.losses, fitted.restarts[0].losses)
    assert alone.restarts == ()


def test_one_mode_is_reached_from_everywhere_without_a_warning() -> None:
    """Steps of 1/t average the noise, so that the end's Monte Carlo error is s / sqrt(T)."""
    x = torch.randn(60).double() + 1.5
    precision = 1 / 4 + 60
    s, steps = precision**-0.5, 200

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("loc", x.new_tensor(0.3)), s))

    fitted = fit(
        normal_mean,
        guide,
        x,
        restarts=4,
        steps=steps,
        optim=partial(torch.optim.SGD, lr=60 / precision),
        schedule=partial(LambdaLR, lr_lambda=lambda step: 1 / (step + 1)),
    )
    errors = [loc - float(x.sum() / precision) for loc in locs(fitted)]
    assert len(set(errors)) == 4
    assert max(map(abs, errors)) < 5 * s / math.sqrt(steps)


@untrained
def test_the_first_restart_is_the_fit_without_restarts() -> None:
    images = torch.rand(32, *IMAGES).round()
    vae, encoder = VAE(IMAGES, 2), Encoder(IMAGES, MeanField(2, 8))
    options: dict[str, Any] = {"steps": 3, "batch_size": 8, "optim": adam}
    cases: list[tuple[Any, Any, Tensor, dict[str, Any]]] = [
        (vae, encoder, images, {"heldout": images, **options}),
        (normal_mean, AutoNormal(normal_mean), torch.zeros(12), options),
        (normal_mean, normal_mean_guide, torch.zeros(12), options),
    ]
    for model, guide, data, given in cases:
        alone = fit(model, guide, data, seed=5, **given)
        fits = fit(model, guide, data, seed=5, restarts=2, **given).restarts
        assert torch.equal(fits[0].losses, alone.losses)
        assert torch.equal(fits[0].heldout, alone.heldout)
        held = alone.model.state.tensors()
        assert all(torch.equal(t, held[n]) for n, t in fits[0].model.state.tensors().items())
        assert not torch.equal(fits[1].losses, alone.losses)


@untrained
@pytest.mark.parametrize("patience", [None, 1])
def test_held_out_bounds_decide_where_there_are_some(patience: int | None) -> None:
    images = torch.rand(16, *IMAGES).round()
    fitted = fit(
        VAE(IMAGES, 2),
        Encoder(IMAGES, MeanField(2, 8)),
        images,
        heldout=1 - images,
        heldout_every=2,
        patience=patience,
        optim=partial(torch.optim.SGD, lr=0.3),
        steps=6,
        restarts=4,
    )
    ends = [float(f.heldout[:, 1].max() if patience else f.heldout[-1, 1]) for f in fitted.restarts]
    assert torch.equal(fitted.losses, fitted.restarts[ends.index(max(ends))].losses)
    assert len(set(ends)) == 4


@untrained
def test_the_same_seed_gives_the_same_restarts_and_they_are_not_saved(tmp_path: Path) -> None:
    x = torch.randn(12)
    runs = [
        fit(normal_mean, normal_mean_guide, x, steps=5, optim=still, restarts=3, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert locs(runs[0]) == locs(runs[1])
    assert locs(runs[0])[1] != locs(runs[0])[2]
    assert locs(runs[0])[2] == locs(runs[2])[1]  # restart r has seed + r
    runs[0].save(tmp_path / "fit.pt")
    loaded = Fit.load(tmp_path / "fit.pt", normal_mean, normal_mean_guide)
    assert loaded.restarts == ()
    assert torch.equal(loaded.losses, runs[0].losses)


@untrained
def test_progress_bars_are_labelled(capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (True, "mean", False):
        fit(normal_mean, normal_mean_guide, torch.ones(4), steps=2, restarts=2, progress=progress)
        shown = capsys.readouterr().err
        if progress is False:
            assert shown == ""
        else:
            prefix = "mean, " if progress == "mean" else ""
            assert f"\r{prefix}restart 2 of 2: " in shown


# --------------------------------------------------------------------------- the initial values


@untrained
@pytest.mark.parametrize("family", [MeanField, FullCovariance, Flow])
def test_initial_values_of_networks_differ(family: Callable[..., nn.Module]) -> None:
    vae, encoder = VAE(IMAGES, 2), Encoder(IMAGES, family(2, 8))
    images = torch.rand(8, *IMAGES).round()
    fits = fit(vae, encoder, images, optim=still, steps=1, restarts=3).restarts
    held = [f.model.state.tensors() for f in fits]
    for name, first in held[0].items():
        kept = not first.is_floating_point() or bool((first == 0).all())
        for other in held[1:]:
            assert torch.equal(other[name], first) == kept
            ratio = float(other[name].norm() / first.norm()) if not kept else 1.0
            assert 0 < ratio < 5 or first.numel() < 10  # the layers' size is kept
        assert torch.equal(held[1][name], held[2][name]) == kept


@untrained
@pytest.mark.parametrize(
    "guide", [normal_mean_guide, AutoNormal(normal_mean), AutoMultivariateNormal(normal_mean)]
)
def test_initial_values_of_guides_differ(guide: Callable[..., Any]) -> None:
    fits = fit(normal_mean, guide, torch.ones(8), optim=still, steps=1, restarts=3).restarts
    held = [f.guide.state.tensors() for f in fits]
    assert held[0]
    for name, first in held[0].items():
        assert all((other[name] != first).any() for other in held[1:])
        assert not torch.equal(held[1][name], held[2][name])


def test_what_is_moved_and_how_far() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.free = nn.Linear(50, 50), nn.Linear(50, 50), nn.Linear(9, 9)
            self.two.weight = self.one.weight  # tied
            nn.init.zeros_(self.one.bias)
            self.bare = nn.Parameter(torch.zeros(2000))
            self.free.weight.requires_grad_(False)
            self.norm = nn.BatchNorm1d(3)

    def guide() -> None:
        pyro.param("scale", torch.ones(2000), constraint=constraints.positive)

    model = Model()
    state = State({"model": model, "guide": guide})
    with state.installed():
        guide()
    before = state.snapshot()
    torch.manual_seed(3)
    perturb(state, model, guide)
    after = state.snapshot()
    moved = {name: after[name] - value for name, value in before.items()}
    weight = before["model.one.weight"]
    assert list(after) == list(before)
    rms = moved["model.one.weight"].square().mean().sqrt() / weight.square().mean().sqrt()
    assert float(rms) == pytest.approx(1, abs=5 / math.sqrt(2 * 2500))
    for name in ("model.bare", "param.scale"):
        assert float(moved[name].std()) == pytest.approx(1, abs=5 / math.sqrt(2 * 2000))
    unmoved = {"model.one.bias", "model.free.weight", "model.norm.bias", "model.norm.weight"}
    unmoved |= {name for name in before if "running" in name or "num_batches" in name}
    assert {name for name, by in moved.items() if not by.any()} == unmoved


@untrained
def test_a_frozen_model_is_not_moved() -> None:
    images = torch.rand(16, *IMAGES).round()
    first = fit(VAE(IMAGES, 2), Encoder(IMAGES, MeanField(2, 8)), images, steps=1)
    held = first.model.state.snapshot()
    guide = Encoder(IMAGES, MeanField(2, 8))
    second = fit(first.model, guide, images, steps=1, restarts=2)
    assert all(torch.equal(t, held[n]) for n, t in first.model.state.tensors().items())
    assert second.restarts[1].parameters == sum(p.numel() for p in guide.parameters())


@untrained
def test_nothing_that_comes_in_changes() -> None:
    images = torch.rand(16, *IMAGES).round()
    vae, encoder, auto = VAE(IMAGES, 2), Encoder(IMAGES, MeanField(2, 8)), AutoNormal(normal_mean)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (vae, encoder)]
    pyro.param("loc", torch.tensor(7.0))
    random = torch.random.get_rng_state()
    fit(vae, encoder, images, steps=2, batch_size=4, restarts=3)
    fit(normal_mean, auto, torch.ones(3), steps=2, restarts=3)
    fit(normal_mean, normal_mean_guide, torch.ones(3), steps=2, restarts=3)
    for module, held in zip((vae, encoder), before, strict=True):
        assert all(torch.equal(t, held[n]) for n, t in module.state_dict().items())
        assert module.training
    assert auto.prototype_trace is None
    assert set(pyro.get_param_store()) == {"loc"} and pyro.param("loc").item() == 7
    assert torch.equal(torch.random.get_rng_state(), random)


# ------------------------------------------------------------------------------- what goes wrong


def exploding(at: float) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        pyro.factor("penalty", torch.where(mean.detach() > at, x.new_tensor(math.inf), 0.0))

    return model


def narrow(x: Tensor) -> None:
    pyro.sample("mean", dist.Normal(pyro.param("loc", x.new_tensor(0.0)), 1e-3))


def test_a_restart_that_is_not_finite_is_left_out_with_a_warning() -> None:
    x = torch.zeros(1)
    with pytest.warns(UserWarning) as caught:
        fitted = fit(exploding(0.5), narrow, x, optim=still, steps=5, restarts=4, seed=6)
    assert [str(w.message).partition(" the loss")[0] for w in caught] == [
        "restart 2 of 4 is skipped: step 0:",
        "restart 4 of 4 is skipped: step 0:",
    ]
    assert {warning.filename for warning in caught} == {__file__}
    first, third = locs(fitted)
    assert first == 0 and third < -1


def test_the_first_error_is_raised_where_every_restart_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="step 0: the loss is") as info:
        fit(exploding(-10.0), narrow, torch.zeros(1), steps=5, restarts=3)
    assert float(info.value.fit.guide.state.tensors()["param.loc"]) == 0  # the first's start


@pytest.mark.parametrize("restarts", [0, -1, True, 1.5, "2"])
def test_bad_numbers_of_restarts(restarts: object) -> None:
    with pytest.raises(ValueError, match=f"at least one restart, got {restarts!r}"):
        fit(normal_mean, normal_mean_guide, torch.ones(3), restarts=restarts)


def test_one_step_has_no_standard_error_and_no_warning() -> None:
    loss = Trace_ELBO()
    fitted = fit(normal_mean, normal_mean_guide, torch.ones(3), loss=loss, steps=1, restarts=3)
    assert len(fitted.restarts) == 3


# ------------------------------------------------------------------------------ plates and local


def test_plates_and_whether_latents_are_local(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("group", 3), pyro.plate("member", 2):
            pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0))
        for _ in pyro.plate("in turn", 2):
            pass
        with pyro.plate("empty", 7):
            pass
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0), obs=x)

    def local(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def amortized(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.5)) * x, 1.0))

    x = torch.randn(9)
    fitted = fit(model, AutoNormal(model), x, steps=1, batch_size=4)
    assert fitted.plates == {"group": 3, "member": 2, "data": 9} and not fitted.local
    fitted.save(tmp_path / "fit.pt")
    loaded = Fit.load(tmp_path / "fit.pt", model, AutoNormal(model))
    assert loaded.plates == fitted.plates and loaded.local is False
    assert fit(local, amortized, x, steps=1).local
    assert not fit(local, AutoNormal(local), x, steps=1).local
    assert fit(local, amortized, x, steps=1).plates == {"data": 9}
