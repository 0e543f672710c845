"""Fits: what they generate is known where the model is, and a file gives the same fit again."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import SCHOOLS_SIGMA, SCHOOLS_Y, eight_schools, normal_mean, normal_mean_guide
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vi import files, fit
from pyro_vi.data import binarize
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.inference import Fit
from pyro_vi.models import VAE, LinearGaussian
from pyro_vi.posterior import scoring

torch.set_num_threads(1)

SHAPE = (1, 4, 4)
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "mean-field": lambda: MeanField(3, 16),
    "full covariance": lambda: FullCovariance(3, 16),
    "low-rank": lambda: LowRank(3, 16),
    "flow": lambda: Flow(3, 16, hidden=(16,)),
}
quick = partial(fit, steps=4, progress=False, optim=partial(torch.optim.Adam, lr=0.02))


class Exact(PyroModule):
    """The exact posterior of a linear-Gaussian model, with parameters."""

    def __init__(self, model: LinearGaussian) -> None:
        super().__init__()
        covariance = torch.linalg.inv(model.precision)
        self.gain = nn.Parameter(covariance @ model.weight.T / model.scale**2)
        self.bias = nn.Parameter(-self.gain.detach() @ model.bias)
        self.tril = PyroParam(torch.linalg.cholesky(covariance), constraints.lower_cholesky)

    def forward(self, x: Tensor) -> None:
        loc = x @ self.gain.T + self.bias
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.tril))


@pytest.fixture(scope="module")
def oracle(device: torch.device) -> tuple[Fit, LinearGaussian, Tensor]:
    """A linear-Gaussian model, fitted by its exact guide (in steps of size zero), and data."""
    torch.manual_seed(1)
    weight = torch.randn(3, 2, dtype=torch.float64)
    model = LinearGaussian(weight, torch.randn(3, dtype=torch.float64), 0.6).to(device)
    x = torch.randn(5, 3, dtype=torch.float64).to(device)
    still = partial(torch.optim.SGD, lr=0.0)
    fitted = fit(model, Exact(model).to(device), x, optim=still, steps=1, progress=False)
    return fitted, model, x


def assert_moments(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Independent draws, (S, d), of a normal: mean and covariance within five standard errors."""
    count = len(draws)
    variance = covariance.diagonal()
    error = (draws.mean(0) - mean).abs() / (variance / count).sqrt()
    assert error.max() < 5
    spread = (torch.outer(variance, variance) + covariance**2) / count
    assert ((torch.cov(draws.T) - covariance).abs() / spread.sqrt()).max() < 5


# Known answers


def test_generated_data_have_the_marginal_distribution(
    oracle: tuple[Fit, LinearGaussian, Tensor],
) -> None:
    fitted, model, _ = oracle
    drawn = fitted.generate(20_000, seed=3)
    assert {name: value.shape for name, value in drawn.items()} == {
        "z": (20_000, 2),
        "x": (20_000, 3),
    }
    assert drawn["x"].dtype == torch.float64 and drawn["x"].device == model.weight.device
    eye2, eye3 = torch.eye(2).to(model.weight), torch.eye(3).to(model.weight)
    weight, noise = model.weight, model.scale**2 * eye3
    joint = torch.cat(
        [torch.cat([eye2, weight.T], 1), torch.cat([weight, weight @ weight.T + noise], 1)]
    )
    mean = torch.cat([torch.zeros(2).to(weight), model.bias])
    assert_moments(torch.cat([drawn["z"], drawn["x"]], 1), mean, joint)
    assert_moments(drawn["x"] - drawn["z"] @ weight.T, model.bias, noise)


def test_expected_data_are_the_means_of_the_same_latents(
    oracle: tuple[Fit, LinearGaussian, Tensor],
) -> None:
    fitted, model, _ = oracle
    drawn = fitted.generate(7, expected=True, seed=3)
    assert torch.equal(drawn["z"], fitted.generate(7, seed=3)["z"])
    torch.testing.assert_close(drawn["x"], drawn["z"] @ model.weight.T + model.bias)


def test_reconstructions_are_means_given_a_draw_of_the_posterior(
    oracle: tuple[Fit, LinearGaussian, Tensor],
) -> None:
    fitted, model, x = oracle
    means = fitted.reconstruct(x[:1].expand(20_000, -1), seed=2)["x"]
    posterior = model.posterior(x[:1])
    weight = model.weight
    exact = weight @ posterior.covariance_matrix[0] @ weight.T
    directions = torch.linalg.qr(weight)[0]  # W z spans two of three dimensions
    assert_moments(
        means @ directions,
        (posterior.mean[0] @ weight.T + model.bias) @ directions,
        directions.T @ exact @ directions,
    )
    across = torch.linalg.svd(weight.T)[2][2]
    torch.testing.assert_close(means @ across, (model.bias @ across).expand(20_000))
    assert set(fitted.reconstruct(x)) == {"x"} and fitted.reconstruct(x)["x"].shape == (5, 3)


def test_predictions_have_the_posterior_predictive_distribution(
    oracle: tuple[Fit, LinearGaussian, Tensor],
) -> None:
    fitted, model, x = oracle
    draws = fitted.predict(x, 8_000, seed=5)["x"]
    assert draws.shape == (8_000, 5, 3)
    posterior = model.posterior(x)
    mean = posterior.mean @ model.weight.T + model.bias
    inner = model.weight @ posterior.covariance_matrix @ model.weight.T
    covariance = inner + model.scale**2 * torch.eye(3).to(inner)
    for n in range(5):
        assert_moments(draws[:, n], mean[n], covariance[n])
    # Two data points share no noise.
    pair = torch.cat([draws[:, 0], draws[:, 1]], 1)
    assert_moments(
        pair, torch.cat([mean[0], mean[1]]), torch.block_diag(covariance[0], covariance[1])
    )


def test_predictions_draw_latents_and_data_independently(device: torch.device) -> None:
    """With as many observed values as latents, one stream of noise could serve for both."""
    weight = torch.tensor([[1.5, 0.5], [-0.3, 1.0]], dtype=torch.float64)
    model = LinearGaussian(weight, torch.zeros(2).double(), 1.0).to(device)
    x = torch.randn(1, 2, dtype=torch.float64).to(device)
    still = partial(torch.optim.SGD, lr=0.0)
    fitted = fit(model, Exact(model).to(device), x, optim=still, steps=1, progress=False)
    posterior = model.posterior(x)
    inner = model.weight @ posterior.covariance_matrix[0] @ model.weight.T
    draws = fitted.predict(x, 10_000)["x"][:, 0]
    assert_moments(draws, posterior.mean[0] @ model.weight.T, inner + torch.eye(2).to(inner))


def test_decoded_latents_are_means_or_draws(oracle: tuple[Fit, LinearGaussian, Tensor]) -> None:
    fitted, model, _ = oracle
    z = torch.randn(6, 2).to(model.weight)
    exact = z @ model.weight.T + model.bias
    assert list(fitted.decode({"z": z})) == ["x"]
    torch.testing.assert_close(fitted.decode({"z": z})["x"], exact)
    many = fitted.decode({"z": z[:1].expand(20_000, -1)}, expected=False, seed=4)["x"]
    assert_moments(many, exact[0], model.scale**2 * torch.eye(3).to(exact))


def test_interpolation_is_a_line_between_posterior_means(
    oracle: tuple[Fit, LinearGaussian, Tensor],
) -> None:
    fitted, model, x = oracle
    line = fitted.interpolate(x[:1], x[1:2], num=7, seed=1)["x"]
    assert line.shape == (7, 3)
    torch.testing.assert_close(
        line.diff(n=2, dim=0), torch.zeros(5, 3).to(line), atol=1e-13, rtol=0
    )
    posterior = model.posterior(x[:2])
    exact = posterior.mean @ model.weight.T + model.bias
    inner = model.weight @ posterior.covariance_matrix[0] @ model.weight.T
    error = (line[[0, -1]] - exact).abs() / (inner.diagonal() / 256).sqrt()
    assert error.max() < 5
    torch.testing.assert_close(fitted.interpolate(x[:1], x[1:2], num=2, seed=1)["x"], line[[0, -1]])
    same = fitted.interpolate(x[:1], x[:1], num=3)["x"]
    torch.testing.assert_close(same[0], same[2])


def test_the_posterior_is_exact(oracle: tuple[Fit, LinearGaussian, Tensor]) -> None:
    fitted, model, x = oracle
    posterior = fitted.posterior(x, 30)
    exact = model.log_evidence(x).cpu()
    torch.testing.assert_close(
        posterior.log_p - posterior.log_q, exact.expand(30, 5), atol=1e-10, rtol=0
    )


Call = Callable[[Fit, Tensor], Any]
CALLS: dict[str, Call] = {
    "generate": lambda f, x: f.generate(4, seed=9)["x"],
    "reconstruct": lambda f, x: f.reconstruct(x, seed=9)["x"],
    "predict": lambda f, x: f.predict(x, 3, seed=9)["x"],
    "decode": lambda f, x: f.decode(f.posterior(x, 1).draws and {"z": f.generate(2)["z"]})["x"],
    "interpolate": lambda f, x: f.interpolate(x[:1], x[1:2], 3, seed=9)["x"],
    "draws": lambda f, x: f.posterior(x, 5, seed=9).draws["z"],
    "log p": lambda f, x: f.posterior(x, 5, seed=9).log_p,
    "log q": lambda f, x: f.posterior(x, 5, seed=9).log_q,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_seed_is_all_the_randomness_and_nothing_outside_moves(
    name: str, oracle: tuple[Fit, LinearGaussian, Tensor]
) -> None:
    fitted, _, x = oracle
    pyro.param("gain", torch.ones(2))
    pyro.param("z", torch.full((2,), 7.0))
    store = pyro.get_param_store()
    outside = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = CALLS[name](fitted, x)
    assert torch.equal(torch.get_rng_state(), outside[0])
    assert random.getstate() == outside[1]
    assert np.random.get_state()[1].tolist() == outside[2]
    assert list(store.keys()) == ["gain", "z"] and store["z"].tolist() == [7, 7]
    torch.manual_seed(99)
    assert torch.equal(CALLS[name](fitted, x), first)
    assert not first.requires_grad


def test_other_seeds_give_other_draws(oracle: tuple[Fit, LinearGaussian, Tensor]) -> None:
    fitted, _, x = oracle
    assert not torch.equal(fitted.generate(3, seed=0)["x"], fitted.generate(3, seed=1)["x"])
    assert not torch.equal(fitted.predict(x, 3, seed=0)["x"], fitted.predict(x, 3, seed=1)["x"])
    assert not torch.equal(fitted.reconstruct(x, seed=0)["x"], fitted.reconstruct(x, seed=1)["x"])


def test_a_second_fit_leaves_the_first_alone() -> None:
    x = torch.rand(12, *SHAPE).round()
    model, guide = VAE(SHAPE, 3), Encoder(SHAPE, MeanField(3, 16))
    first = quick(model, guide, x, seed=0)
    before = [call(first, x) for call in CALLS.values()]
    quick(model, guide, x, steps=20, seed=1)
    quick(VAE(SHAPE, 3), Encoder(SHAPE, MeanField(3, 16)), x, seed=2)
    quick(first.model, guide, x, seed=3)
    after = [call(first, x) for call in CALLS.values()]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


def local_model(x: Tensor) -> None:
    """A factor model: a plain function with parameters, one of them constrained."""
    weight = pyro.param("weight", lambda: torch.randn(3, 2))
    scale = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T, scale).to_event(1), obs=x)


def local_guide(x: Tensor) -> None:
    gain = pyro.param("gain", lambda: 0.1 * torch.randn(2, 3))
    spread = pyro.param("spread", torch.ones(2), constraint=constraints.interval(0.01, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ gain.T, spread).to_event(1))


def test_a_second_fit_of_the_same_functions_leaves_the_first_alone() -> None:
    x = torch.randn(10, 3)
    first = quick(local_model, local_guide, x, seed=0)
    before = [call(first, x) for call in CALLS.values()]
    quick(local_model, local_guide, x + 3, steps=20, seed=1)
    after = [call(first, x) for call in CALLS.values()]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    assert not list(pyro.get_param_store().keys())


# Files


def assert_same_fit(fitted: Fit, loaded: Fit, x: Tensor) -> None:
    """Every number of the one is a number of the other, bit for bit."""
    for name in ("losses", "reconstruction", "kl", "heldout"):
        torch.testing.assert_close(
            getattr(loaded, name), getattr(fitted, name), atol=0, rtol=0, equal_nan=True
        )
    for name in ("seconds", "parameters", "plate"):
        assert getattr(loaded, name) == getattr(fitted, name)
    for name, call in CALLS.items():
        assert torch.equal(call(fitted, x), call(loaded, x)), name
    own, other = fitted.guide.state.snapshot(), loaded.guide.state.snapshot()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)
    assert not loaded.guide.state.parameters()  # frozen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vae_is_the_same_from_its_file(family: str, tmp_path: Path, device: torch.device) -> None:
    x = torch.rand(20, *SHAPE, device=device)
    model, guide = VAE(SHAPE, 3).to(device), Encoder(SHAPE, FAMILIES[family]()).to(device)
    fitted = quick(
        model, guide, x, batch_size=8, transform=binarize, heldout=x[:9].round(), heldout_every=2
    )
    fitted.save(tmp_path / "fit.pt", recipe={"family": family})
    assert files.load(tmp_path / "fit.pt")["recipe"] == {"family": family}
    assert list(tmp_path.iterdir()) == [tmp_path / "fit.pt"]
    fresh = VAE(SHAPE, 3), Encoder(SHAPE, FAMILIES[family]())
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in fresh]
    state = torch.get_rng_state()
    loaded = Fit.load(tmp_path / "fit.pt", *fresh, device=device)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_fit(fitted, loaded, x.round())
    for module, old in zip(fresh, before, strict=True):
        assert all(torch.equal(v, old[k]) for k, v in module.state_dict().items())
        assert module.training and all(p.requires_grad for p in module.parameters())
        assert next(module.parameters()).device.type == "cpu"


def test_functions_with_parameters_are_the_same_from_their_file(tmp_path: Path) -> None:
    x = torch.randn(10, 3)
    fitted = quick(local_model, local_guide, x, batch_size=5)
    fitted.save(tmp_path / "fit.pt")
    pyro.param("weight", torch.zeros(3, 2))  # the user's own
    loaded = Fit.load(tmp_path / "fit.pt", local_model, local_guide)
    assert_same_fit(fitted, loaded, x)
    assert list(pyro.get_param_store().keys()) == ["weight"]
    assert pyro.param("weight").abs().sum() == 0


def test_tensors_that_parameters_start_from_stay_as_they_are(tmp_path: Path) -> None:
    start = torch.zeros(2, 3)

    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", start)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ gain.T, 1.0).to_event(1))

    x = torch.randn(10, 3)
    fitted = quick(local_model, guide, x)
    fitted.save(tmp_path / "fit.pt")
    loaded = Fit.load(tmp_path / "fit.pt", local_model, guide)
    assert loaded.guide.state.tensors()["param.gain"].abs().min() > 0
    assert torch.equal(start, torch.zeros(2, 3))
    assert_same_fit(fitted, loaded, x)


def module_programs() -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """Plain functions that register modules; batch norm has buffers beside its parameters."""
    decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    encoder = nn.Linear(3, 4)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, raw = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide


def test_functions_with_modules_are_the_same_from_their_file(tmp_path: Path) -> None:
    x = torch.randn(10, 3)
    fitted = quick(*module_programs(), x, batch_size=5)
    fitted.save(tmp_path / "fit.pt")
    assert_same_fit(fitted, Fit.load(tmp_path / "fit.pt", *module_programs()), x)


def test_keyword_data_are_the_same_from_their_file(tmp_path: Path) -> None:
    def model(x: Tensor, side: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(weight * side, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, side: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * (x + side), 0.7))

    data = {"side": torch.full((8,), 40.0), "x": torch.randn(8) + 40}
    fitted = quick(model, guide, data, batch_size=4)
    fitted.save(tmp_path / "fit.pt")
    loaded = Fit.load(tmp_path / "fit.pt", model, guide)
    first, second = fitted.predict(data, 3), loaded.predict(data, 3)
    assert first["x"].shape == (3, 8) and torch.equal(first["x"], second["x"])
    drawn = loaded.generate(2_000)["x"]
    weight = float(loaded.model.state.tensors()["param.weight"])
    assert abs(float(drawn.mean()) - 40 * weight) < 5 * (2 / 2_000) ** 0.5  # the side information


@pytest.mark.parametrize("kind", [AutoDiagonalNormal, AutoMultivariateNormal])
def test_autoguides_are_the_same_from_their_file(tmp_path: Path, kind: Any) -> None:
    data = (SCHOOLS_Y, SCHOOLS_SIGMA)
    fitted = quick(eight_schools, kind(eight_schools), data, steps=10)
    fitted.save(tmp_path / "fit.pt")
    fresh = kind(eight_schools)
    loaded = Fit.load(tmp_path / "fit.pt", eight_schools, fresh)
    own, other = fitted.guide.state.snapshot(), loaded.guide.state.snapshot()
    assert own.keys() == other.keys() and len(own) >= 2
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert torch.equal(loaded.losses, fitted.losses)
    assert not list(fresh.parameters())  # the guide that came in is still as it was
    torch.manual_seed(3)
    first = fitted.guide(*data)
    torch.manual_seed(3)
    second = loaded.guide(*data)
    assert all(torch.equal(first[name], second[name]) for name in ("mu", "tau", "eta"))


def test_global_parameters_are_the_same_from_their_file(tmp_path: Path) -> None:
    fitted = quick(normal_mean, normal_mean_guide, torch.randn(10), steps=20)
    fitted.save(tmp_path / "fit.pt")
    loaded = Fit.load(tmp_path / "fit.pt", normal_mean, normal_mean_guide)
    own, other = fitted.guide.state.snapshot(), loaded.guide.state.snapshot()
    assert list(own) == list(other) == ["param.loc", "param.scale"]
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_frozen_model_is_loaded_fitted_or_raw(tmp_path: Path) -> None:
    x = torch.rand(12, *SHAPE).round()
    model, guide = VAE(SHAPE, 3), Encoder(SHAPE, MeanField(3, 16))
    joint = quick(model, guide, x)
    alone = quick(joint.model, Encoder(SHAPE, FullCovariance(3, 16)), x)
    alone.save(tmp_path / "fit.pt")
    with_fitted = Fit.load(tmp_path / "fit.pt", joint.model, Encoder(SHAPE, FullCovariance(3, 16)))
    assert_same_fit(alone, with_fitted, x)
    raw = Fit.load(tmp_path / "fit.pt", VAE(SHAPE, 3), Encoder(SHAPE, FullCovariance(3, 16)))
    assert_same_fit(alone, raw, x)
    # And a fit to the model of such a fit.
    again = quick(alone.model, Encoder(SHAPE, MeanField(3, 16)), x)
    again.save(tmp_path / "again.pt")
    raw = Fit.load(tmp_path / "again.pt", VAE(SHAPE, 3), Encoder(SHAPE, MeanField(3, 16)))
    assert_same_fit(again, raw, x)
    assert torch.equal(raw.generate(3)["x"], joint.generate(3)["x"])


def test_a_frozen_model_of_other_weights_is_refused(tmp_path: Path) -> None:
    x = torch.rand(12, *SHAPE).round()
    joint, other = (
        quick(VAE(SHAPE, 3), Encoder(SHAPE, MeanField(3, 16)), x, seed=s) for s in (0, 1)
    )
    quick(joint.model, Encoder(SHAPE, MeanField(3, 16)), x).save(tmp_path / "fit.pt")
    with pytest.raises(ValueError, match=r"other programs: the frozen model has other values of"):
        Fit.load(tmp_path / "fit.pt", other.model, Encoder(SHAPE, MeanField(3, 16)))


def test_a_frozen_function_is_loaded_fitted(tmp_path: Path) -> None:
    x = torch.randn(10, 3)
    joint = quick(local_model, local_guide, x)
    alone = quick(joint.model, local_guide, x)
    alone.save(tmp_path / "fit.pt")
    assert_same_fit(alone, Fit.load(tmp_path / "fit.pt", joint.model, local_guide), x)


def test_a_file_holds_no_training_data(tmp_path: Path) -> None:
    x = torch.rand(5_000, *SHAPE).round()
    fitted = quick(VAE(SHAPE, 3), Encoder(SHAPE, MeanField(3, 16)), x, batch_size=10)
    fitted.save(tmp_path / "fit.pt")
    assert isinstance(fitted.template, Tensor) and fitted.template.shape == (2, *SHAPE)
    assert (tmp_path / "fit.pt").stat().st_size < 4 * (fitted.parameters + 5_000 * 16 / 4)


def test_the_example_argument_is_transformed(tmp_path: Path) -> None:
    """A transform may change the shape: the programs only ever see what it gives."""
    x = torch.rand(20, 1, 8, 8)

    def transform(batch: Tensor) -> Tensor:
        return binarize(batch[..., :4, :4])

    model, guide = VAE(SHAPE, 3), Encoder(SHAPE, MeanField(3, 16))
    fitted = quick(model, guide, x, batch_size=5, transform=transform)
    assert fitted.generate(6)["x"].shape == (6, *SHAPE)
    fitted.save(tmp_path / "fit.pt")
    assert_same_fit(fitted, Fit.load(tmp_path / "fit.pt", model, guide), transform(x))


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "latent dimensions": (
        lambda: VAE(SHAPE, 4),
        lambda: Encoder(SHAPE, MeanField(4, 16)),
        r"parameter 'model\.decoder\.\S+': expected shape \(\d+, 4\), got \(\d+, 3\)",
    ),
    "family": (
        lambda: VAE(SHAPE, 3),
        lambda: Encoder(SHAPE, FullCovariance(3, 16)),
        r"parameters that the state lacks: \['guide\.family\.below'\]",
    ),
    "flow": (
        lambda: VAE(SHAPE, 3),
        lambda: Encoder(SHAPE, Flow(3, 16, hidden=(16,))),
        r"parameters that the state lacks: \['guide\.family\.",
    ),
    "model": (
        lambda: local_model,
        lambda: Encoder(SHAPE, MeanField(3, 16)),
        "was made for other programs",
    ),
    "plain functions": (lambda: local_model, lambda: local_guide, "was made for other programs"),
    "image": (
        lambda: VAE((1, 5, 5), 3),
        lambda: Encoder((1, 5, 5), MeanField(3, 16)),
        r"expected data of shape \(N, \*\(1, 5, 5\)\), got \(2, 1, 4, 4\)",
    ),
    "arguments": (
        lambda: eight_schools,
        lambda: normal_mean_guide,
        r"missing 1 required positional argument: 'sigma'",
    ),
    "sites": (
        lambda: VAE(SHAPE, 3),
        lambda: normal_mean_guide,
        r"latent site 'z' of the model is missing from the guide, which samples \['mean'\]",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_for_other_programs_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    x = torch.rand(12, *SHAPE).round()
    quick(VAE(SHAPE, 3), Encoder(SHAPE, MeanField(3, 16)), x, batch_size=6).save(path)
    model, guide, message = OTHERS[name]
    with pytest.raises(ValueError, match=r"fit\.pt was made for other programs.*") as caught:
        Fit.load(path, model(), guide())
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)
    assert not list(pyro.get_param_store().keys())


def test_parameters_that_the_programs_lack_are_named(tmp_path: Path) -> None:
    x = torch.randn(10, 3)
    quick(local_model, local_guide, x).save(tmp_path / "fit.pt")

    def fixed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, True).expand(-1, 3), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"the programs lack: \['param\.noise', 'param\.weight'\]"):
        Fit.load(tmp_path / "fit.pt", fixed, local_guide)


# Files that are intact and hold something else


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the file of a small fit holds."""
    path = tmp_path_factory.mktemp("content") / "fit.pt"
    quick(normal_mean, normal_mean_guide, torch.randn(10)).save(path)
    return files.load(path)


STRANGERS: tuple[Any, ...] = (
    None,
    -1,
    2.5,
    True,
    "text",
    [1, "a"],
    {"a": 1},
    {"a": {"b": None}},
    {1: torch.zeros(())},
    ("a", None),
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(7, 3),
    torch.ones(4, dtype=torch.int64),
    torch.ones(4, 2, dtype=torch.bool),
)


def places(value: Any, *names: Any) -> Iterator[tuple[Any, ...]]:
    """The names that lead to each value in dicts and tuples."""
    if names:
        yield names
    if isinstance(value, dict):
        for name in value:
            yield from places(value[name], *names, name)
    elif isinstance(value, tuple):
        for index in range(len(value)):
            yield from places(value[index], *names, index)


def changed(value: Any, names: tuple[Any, ...], put: Callable[[dict[Any, Any], Any], Any]) -> Any:
    """A copy of dicts and tuples where `put` has changed the innermost of them at its name."""
    name, *rest = names
    entries = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    if rest:
        entries[name] = changed(value[name], tuple(rest), put)
    else:
        put(entries, name)
    return entries if isinstance(value, dict) else tuple(entries.values())


@pytest.mark.parametrize(
    "entry",
    [
        "tensors",
        "recipe",
        "densities",
        "noises",
        "losses",
        "reconstruction",
        "kl",
        "weights",
        "heldout",
        "seconds",
        "parameters",
        "plate",
        "plates",
        "amortized",
        "local",
        "rows",
        "model_is_trained",
        "fingerprint",
        "template",
    ],
)
def test_a_file_of_other_content_is_loaded_or_refused(
    entry: str, content: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "fit.pt"
    changes = [lambda entries, name: entries.pop(name)]
    changes += [
        partial(lambda new, entries, name: entries.update({name: new}), s) for s in STRANGERS
    ]
    refused = 0
    for names in places(content[entry], entry):
        for put in changes:
            files.save(path, changed(content, names, put))
            try:
                loaded = Fit.load(path, normal_mean, normal_mean_guide)
            except ValueError as error:
                message = str(error)
                assert re.search(r"fit\.pt (is damaged|was made for other programs): ", message)
                assert "\n" not in message
                refused += 1
            else:
                assert repr(loaded).startswith("Fit(4 steps") and len(loaded.bounds) == 4
    assert refused >= 5


def removed(entries: dict[Any, Any], name: Any) -> None:
    del entries[name]


@pytest.mark.parametrize(
    ("names", "new", "message"),
    [
        (("losses",), removed, r"'losses': expected a tensor of floats of shape \(steps\), got no"),
        (("kl",), None, r"'kl': expected a tensor of floats of shape \(steps\), got None$"),
        (("kl",), torch.zeros(5), r"'kl': expected 4 steps, as in 'losses', got 5$"),
        (
            ("weights",),
            torch.ones(4, 3),
            r"'weights': expected .* \(steps, 2\), got a tensor of torch.float32 .* \(4, 3\)$",
        ),
        (
            ("tensors", "param.loc"),
            [1.0],
            r"'tensors', 'param.loc': expected a tensor, got a list$",
        ),
        (("plates", "data"), "10", r"'plates', 'data': expected a whole number of at least 0, got"),
        (("amortized",), 1, r"'amortized': expected True or False, got 1$"),
        (("densities",), (), r"'densities': expected a dict by name, got a tuple$"),
        (("densities", "draws"), removed, r"'densities', 'draws': expected a dict by name, got no"),
        (("noises",), {"n": {"noise": 3, "gamma": None}}, r"'noises', 'n', 'noise': .* got 3$"),
        (("template",), [1], r"'template': expected a tensor, a tuple of .* got a list$"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_damaged_is_named(
    names: tuple[str, ...], new: Any, message: str, content: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "fit.pt"
    put = removed if new is removed else lambda entries, name: entries.update({name: new})
    files.save(path, changed(content, names, put))
    with pytest.raises(ValueError, match=rf"fit\.pt is damaged: {message}"):
        Fit.load(path, normal_mean, normal_mean_guide)


def test_entries_that_older_files_lack_and_newer_ones_have(
    content: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "fit.pt"
    older = {name: value for name, value in content.items() if name != "noises"}
    for entries in (older, {**content, "newer": [1]}):
        files.save(path, entries)
        loaded = Fit.load(path, normal_mean, normal_mean_guide)
        assert torch.equal(loaded.losses, content["losses"])


def test_errors_of_programs_on_another_template_are_refusals(tmp_path: Path) -> None:
    def model(x: Tensor, scales: dict[str, float]) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, scales["prior"]))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor, scales: dict[str, float]) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("mean", dist.Normal(loc, scales["prior"]))

    path = tmp_path / "fit.pt"
    quick(model, guide, (torch.randn(5), {"prior": 1.0})).save(path)
    content = files.load(path)
    files.save(path, {**content, "template": (torch.randn(5), {})})
    with pytest.raises(ValueError, match=r"made for other programs: KeyError: 'prior'$"):
        Fit.load(path, model, guide)


# Wrong arguments


@pytest.mark.parametrize("num", [0, -1, True, 1.5, "3", None])
def test_impossible_numbers_are_refused(
    num: Any, oracle: tuple[Fit, LinearGaussian, Tensor]
) -> None:
    fitted, _, x = oracle
    with pytest.raises(ValueError, match="at least one data point to generate, got"):
        fitted.generate(num)
    with pytest.raises(ValueError, match="at least one predictive draw, got"):
        fitted.predict(x, num)
    with pytest.raises(ValueError, match="at least one posterior draw, got"):
        fitted.posterior(x, num)
    with pytest.raises(ValueError, match="at least 2 points to interpolate, got"):
        fitted.interpolate(x[:1], x[1:2], num)


def test_one_point_is_no_line(oracle: tuple[Fit, LinearGaussian, Tensor]) -> None:
    fitted, _, x = oracle
    with pytest.raises(ValueError, match="at least 2 points to interpolate, got 1"):
        fitted.interpolate(x[:1], x[1:2], 1)


def test_ends_of_several_points_are_refused(oracle: tuple[Fit, LinearGaussian, Tensor]) -> None:
    fitted, _, x = oracle
    with pytest.raises(ValueError, match="one data point as start, got 3"):
        fitted.interpolate(x[:3], x[:1], 3)
    with pytest.raises(ValueError, match="one data point as end, got 2"):
        fitted.interpolate(x[:1], x[:2], 3)


def test_latents_that_are_none_are_refused(oracle: tuple[Fit, LinearGaussian, Tensor]) -> None:
    fitted, _, x = oracle
    z = torch.zeros(4, 2).to(x)
    with pytest.raises(ValueError, match=r"the latent sites \['z'\], got \['zeta'\]"):
        fitted.decode({"zeta": z})
    with pytest.raises(ValueError, match=r"the latent sites \['z'\], got \['w', 'z'\]"):
        fitted.decode({"z": z, "w": z})
    with pytest.raises(ValueError, match=r"all of one length, got \{'z': 4, 'w': 3\}"):
        fitted.decode({"z": z, "w": z[:3]})
    with pytest.raises(ValueError, match=r"values of the latents, all of one length, got \{\}"):
        fitted.decode({})


def test_what_needs_latents_of_single_data_points_refuses_global_ones() -> None:
    x = torch.randn(10)
    fitted = quick(normal_mean, normal_mean_guide, x)
    for call in (lambda: fitted.generate(3), lambda: fitted.reconstruct(x)):
        with pytest.raises(ValueError, match="inside plate 'data', but 'mean' stands outside it"):
            call()


def test_a_joint_posterior_is_that_of_the_training_data() -> None:
    x = torch.randn(10)
    fitted = quick(normal_mean, normal_mean_guide, x)
    assert fitted.posterior(x, 3).log_p.shape == (3,)
    for other in (torch.randn(10), x[:5], x.double()):
        with pytest.raises(ValueError, match="expected the data that the guide was fitted to"):
            fitted.posterior(other, 3)
        assert fitted.log_predictive_density(other, 5).value.shape == (len(other),)
        assert fitted.predict(other, 5)["x"].shape == (5, len(other))


def test_arguments_without_rows_are_passed_as_they_are() -> None:
    def model(x: Tensor, scale: float) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x: Tensor, scale: float) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * x, 1.0))

    fitted = quick(model, guide, (torch.randn(5), 0.5))
    assert fitted.rows == (0,)
    assert fitted.generate(3)["x"].shape == (3,)
    assert fitted.posterior((torch.randn(40), 0.5), 30).log_p.shape == (30, 40)

    def three(scale: float) -> None:
        model(torch.zeros(3), scale)

    def thrice(scale: float) -> None:
        guide(torch.zeros(3), scale)

    with pytest.raises(ValueError, match="expected data to take apart, but there are no"):
        quick(three, thrice, (0.5,)).generate(3)


@pytest.mark.parametrize("size", [4, 3])
def test_reconstructions_and_data_have_the_order_of_axes_of_posteriors(size: int) -> None:
    """Plates: data points from the right, parts to their left; Pyro's order is the other one."""
    weights = torch.arange(1.0, size + 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("part", size, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * weights[:, None], 0.01), obs=x.T)

    def guide(x: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x), dim=-1), pyro.plate("part", size, dim=-2):
            pyro.sample("z", dist.Normal(x.T / weights[:, None] + shift, 0.001))

    x = torch.randn(4, size)
    fitted = fit(model, guide, x, optim=partial(torch.optim.SGD, lr=0.0), steps=1)
    torch.testing.assert_close(fitted.reconstruct(x)["x"], x, atol=0.02 * size, rtol=0)
    assert fitted.generate(7)["z"].shape == fitted.generate(7)["x"].shape == (7, size)
    middle = fitted.interpolate(x[:1], x[1:2], 3)["x"][1]
    torch.testing.assert_close(middle, (x[0] + x[1]) / 2, atol=0.02, rtol=0)


def test_discrete_latents_are_reconstructed_from_one_draw_and_have_no_line() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(4.0 * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(4.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=torch.stack([0 * x, slope * x - 8], -1)))

    x = torch.tensor([-1.0, 5.0])
    fitted = fit(model, guide, x, optim=partial(torch.optim.SGD, lr=0.0), steps=1)
    assert fitted.reconstruct(x)["x"].tolist() == [0.0, 4.0]
    with pytest.raises(ValueError, match="'z' is discrete: draws of it have no mean"):
        fitted.interpolate(x[:1], x[1:])


def test_a_fit_says_what_it_is() -> None:
    x = torch.rand(12, *SHAPE).round()
    fitted = quick(VAE(SHAPE, 3), Encoder(SHAPE, MeanField(3, 16)), x)
    text = repr(fitted)
    assert text.startswith("Fit(4 steps, ") and f"{fitted.parameters:,} parameters" in text
    assert text.endswith(f"last loss {float(fitted.losses[-1]):.3f} nats)")


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.deterministic("line", w * x)
        pyro.sample("y", dist.Normal(w * x, 0.5), obs=y)


def regression_guide(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(2.0)), 0.1))


@pytest.mark.parametrize("form", [tuple, dict])
def test_what_is_observed_may_be_left_out_of_a_prediction(form: type) -> None:
    """y = w x + e with w ~ N(2, 0.1^2) and e ~ N(0, 0.5^2), at rows that nobody has seen."""

    def data(x: Tensor, *y: Tensor) -> Any:
        return (x, *y) if form is tuple else dict(zip(("x", "y"), (x, *y), strict=False))

    x = torch.randn(12)
    fitted = fit(regression, regression_guide, data(x, 2 * x), steps=0, progress=False)
    new = torch.tensor([-3.0, 0.0, 1.0, 5.0])
    drawn = fitted.predict(data(new), 4_000)
    assert list(drawn) == ["y"] and drawn["y"].shape == (4_000, 4)
    sd = (0.01 * new**2 + 0.25).sqrt()
    assert bool(((drawn["y"].mean(0) - 2 * new).abs() < 5 * sd / 4_000**0.5).all())
    assert torch.allclose(drawn["y"].std(0), sd, rtol=0.06)
    named = {"x": new, "y": None} if form is dict else (new, None)
    assert torch.equal(fitted.predict(named, 4_000)["y"], drawn["y"])
    again = fitted.predict(data(new), 4_000)["y"]
    other = fitted.predict(data(new), 4_000, seed=1)["y"]
    assert torch.equal(again, drawn["y"]) and not torch.equal(other, again)


def test_a_prediction_that_cannot_be_says_what_to_do() -> None:
    def local(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + x, 1.0), obs=y)

    x = torch.randn(5)
    fitted = fit(local, AutoNormal(local), (x, x), steps=2, progress=False)
    for data in ((torch.randn(5),), (torch.randn(3), torch.randn(3))):
        with pytest.raises(
            ValueError, match=r"fit a guide that reads the latents of a row from it"
        ):
            fitted.predict(data, 5)
    assert fitted.predict((x, x), 5)["y"].shape == (5, 5)

    def reads_y(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            assert y is None or len(y) == len(x)
            pyro.sample("z", dist.Normal(pyro.param("w", torch.tensor(0.1)) * y, 1.0))

    fitted = fit(local, reads_y, (x, x), steps=2, progress=False)
    with pytest.raises(ValueError, match=r"guide does not run on these data .* needs arguments"):
        fitted.predict((x,), 5)
    with pytest.raises(ValueError, match=r"'y' of the model .* pass the argument that the model"):
        fit(regression, regression_guide, (x, x), steps=0).log_predictive_density((x,), 5)


def test_a_masked_flow_of_a_fitted_guide_has_the_fits_density() -> None:
    """Under Pyro's ELBO, which asks a masked distribution for its base's score."""
    flow = dist.transforms.affine_autoregressive(2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
                drawn = dist.TransformedDistribution(base, [self.flow]).mask(torch.ones(len(x)) > 0)
                pyro.sample("z", drawn)

    x = torch.randn(6) + 3
    adam = partial(torch.optim.Adam, lr=0.05)
    fitted = fit(model, Guide(), x, optim=adam, steps=60, progress=False)
    posterior = fitted.posterior(x, 2_000).joint()
    loss = Trace_ELBO(num_particles=2_000, vectorize_particles=True, max_plate_nesting=1)
    bound = -loss.loss(fitted.model, fitted.guide, x)
    estimate = posterior.elbo()
    assert abs(bound - estimate.value) < 7 * estimate.se


def test_a_guide_that_keeps_plates_is_usable_after_its_fit() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Guide(EasyGuide):
        def guide(self, x: Tensor) -> None:
            with self.plate("data", len(x)):
                pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(len(x))), 0.7))

    x = torch.randn(8)
    fitted = fit(model, Guide(model), x, steps=3, progress=False)
    assert fitted.posterior(x, 5).draws["z"].shape == (5, 8)
    assert fitted.predict(x, 5)["x"].shape == (5, 8)


@pytest.mark.parametrize("size", [True, False])
def test_deterministic_sites_in_a_plate(size: bool) -> None:
    """Pyro's own way to give predictions a name: `y` is deterministic where it is not observed."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)) if size else pyro.plate("data"):
            line = pyro.deterministic("line", w * x)
            if y is None:
                pyro.deterministic("y", line)
            else:
                pyro.sample("y", dist.Normal(line, 0.5), obs=y)

    x = torch.randn(6)
    fitted = fit(model, regression_guide, (x, 2 * x), steps=1, progress=False)
    posterior = fitted.posterior((x, 2 * x), 7)
    assert torch.equal(posterior.deterministic["line"], posterior.draws["w"][:, None] * x)
    drawn = fitted.predict((x[:3],), 500)["y"]
    assert drawn.shape == (500, 3)
    assert torch.allclose(drawn.mean(0), 2 * x[:3], atol=0.1)


def test_sites_that_hang_on_the_rows_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences up to the longest of their batch, of which each row alone has other sites."""

    def model(x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for i in range(int(length.max())):
                z = pyro.sample(f"z_{i}", dist.Normal(torch.zeros(len(x)), 1.0))
                seen = poutine.mask(mask=length > i)
                with seen:
                    pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[:, i])

    def guide(x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for i in range(int(length.max())):
                w = pyro.param("w", torch.tensor(0.5))
                pyro.sample(f"z_{i}", dist.Normal(w * x[:, i], 0.7))

    x, length = torch.randn(4, 3), torch.tensor([3, 3, 3, 3])
    fitted = fit(model, guide, (x, length), steps=1, progress=False)
    programs = fitted._programs((x, torch.tensor([1, 3, 3, 3])))
    whole, some = (fitted._programs((x, row)) for row in (length, torch.tensor([2, 2, 2, 2])))
    assert list(whole.posterior(3, local=True).draws) == ["z_0", "z_1", "z_2"]
    assert list(some.posterior(3, local=True).draws) == ["z_0", "z_1"]
    monkeypatch.setattr(scoring, "_VALUES", 1)
    with pytest.raises(ValueError, match=r"some rows lack \['x_1'"):
        programs.posterior(3, local=True)  # one row at a time
