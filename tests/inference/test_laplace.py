"""AutoLaplaceApproximation: the fit's guide is the Gaussian at the mode, exact where it can be."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vi import fit
from pyro_vi.inference import Fit

SIGMA = 0.7
to_the_mode = partial(
    fit,
    optim=partial(torch.optim.SGD, lr=0.1, momentum=0.9),  # at a mode, 0.9^(1/2) a step
    steps=400,
    progress=False,
)


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, SIGMA), obs=y)


def posterior(x: Tensor, y: Tensor, sigma: float = SIGMA) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the weights: N(P^-1 X'y / s^2, P^-1), P = X'X / s^2 + I."""
    covariance = torch.linalg.inv(x.T @ x / sigma**2 + torch.eye(3))
    return covariance @ x.T @ y / sigma**2, covariance


def gaussian(fitted: Fit) -> tuple[Tensor, Tensor]:
    found = fitted.guide.get_posterior()
    return found.mean, found.covariance_matrix


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(40, 3).double() @ torch.tensor(
        [[1.0, 0.5, 0.0], [0.0, 1.0, 0.8], [0.0, 0.0, 0.5]], dtype=torch.float64
    )
    return x, x @ torch.tensor([1.0, -2.0, 0.5]).double() + SIGMA * torch.randn(40).double()


def test_of_a_linear_regression_it_is_the_posterior(data: tuple[Tensor, Tensor]) -> None:
    fitted = to_the_mode(regression, AutoLaplaceApproximation(regression), data)
    assert isinstance(fitted.guide.function, AutoMultivariateNormal)
    assert fitted.parameters == 3 and len(fitted.losses) == 400
    for found, known in zip(gaussian(fitted), posterior(*data), strict=True):
        assert torch.allclose(found, known, rtol=0, atol=1e-6)
    torch.manual_seed(0)
    draws = torch.stack([fitted.guide(*data)["w"] for _ in range(2000)])
    mean, covariance = posterior(*data)
    assert bool(((draws.mean(0) - mean).abs() < 5 * (covariance.diagonal() / 2000).sqrt()).all())


def test_the_hessian_is_that_of_all_data_transformed_once(data: tuple[Tensor, Tensor]) -> None:
    """The covariance of a linear regression is the same wherever training ends."""
    calls = []

    def doubled(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        calls.append(len(batch[0]))
        return 2 * batch[0], 2 * batch[1]

    guide = AutoLaplaceApproximation(regression)
    fitted = to_the_mode(regression, guide, data, batch_size=8, steps=3, transform=doubled)
    assert torch.allclose(gaussian(fitted)[1], posterior(2 * data[0], data[1])[1], atol=1e-10)
    assert calls.count(40) == 1


def test_on_the_unconstrained_scale_of_a_constrained_latent() -> None:
    """A Gamma posterior (a, b) has its mode in log-space at log a/b, and there H = a."""
    x = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]).double()

    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    fitted = to_the_mode(model, AutoLaplaceApproximation(model), x)
    a, b = 2 + x.sum(), torch.tensor(1.0 + 5).double()
    mean, covariance = gaussian(fitted)
    assert torch.allclose(mean, (a / b).log(), atol=1e-6)
    assert torch.allclose(covariance, 1 / a, atol=1e-6)


class Regression(PyroModule):
    """With a learnt noise scale in a module, and a mean in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.tensor(0.3).double())
        self.mean = nn.Linear(3, 1).double()
        self.norm = nn.BatchNorm1d(3, affine=False).double()

    def forward(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            loc = self.norm(x) @ w + self.mean(x).squeeze(-1)
            pyro.sample("y", dist.Normal(loc, self.log_sigma.exp()), obs=y)


def learnt(x: Tensor, y: Tensor) -> None:
    """The same noise scale, as a `pyro.param`."""
    sigma = pyro.param("sigma", x.new_tensor(2.0), constraint=constraints.positive)
    w = pyro.sample("w", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


def test_what_the_model_learnt_is_kept(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    fitted = to_the_mode(learnt, AutoLaplaceApproximation(learnt), data)
    log_sigma = fitted.model.state.tensors()["param.sigma"]
    mean, covariance = posterior(*data, sigma=float(log_sigma.exp()))
    residual = (data[1] - data[0] @ mean).square().mean().sqrt()
    assert torch.allclose(log_sigma.exp(), residual, atol=1e-6)  # joint mode of w and sigma
    for found, known in zip(gaussian(fitted), (mean, covariance), strict=True):
        assert torch.allclose(found, known, atol=1e-6)
    module = Regression()
    other = to_the_mode(module, AutoLaplaceApproximation(module), data, steps=50)
    held = other.model.state.tensors()
    assert float(held["model.log_sigma"]) != pytest.approx(0.3, abs=0.05)
    assert int(held["model.norm.num_batches_tracked"]) > 50
    assert not any(tensor.requires_grad for tensor in held.values())
    path = tmp_path / "fit.pt"
    for model, kept in ((learnt, fitted), (module, other)):
        kept.save(path)
        loaded = Fit.load(path, model, AutoMultivariateNormal(model))
        for now, then in zip(gaussian(loaded), gaussian(kept), strict=True):
            assert torch.allclose(now, then, atol=1e-12)
        frozen = to_the_mode(kept.model, AutoLaplaceApproximation(kept.model), data, steps=2)
        assert frozen.parameters == 3


@pytest.mark.filterwarnings("ignore:the restarts disagree")
def test_nothing_that_comes_in_changes(data: tuple[Tensor, Tensor]) -> None:
    model = Regression()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    guides = AutoLaplaceApproximation(model), AutoLaplaceApproximation(learnt)
    pyro.param("sigma", torch.tensor(9.0))
    random = torch.random.get_rng_state()
    for program, guide in zip((model, learnt), guides, strict=True):
        to_the_mode(program, guide, data, steps=5, restarts=2)
        assert guide.prototype_trace is None and not list(guide.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert pyro.param("sigma").item() == 9 and set(pyro.get_param_store()) == {"sigma"}
    assert torch.equal(torch.random.get_rng_state(), random)


# ------------------------------------------------------------------------------- what goes wrong


def test_a_point_that_is_no_maximum_is_an_error() -> None:
    def squared(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m**2, 1.0), obs=x)

    x = torch.full((5,), 4.0)
    saddle = init_to_value(values={"m": torch.tensor(0.0)})
    with pytest.raises(ValueError, match=r"Hessian .* is not positive definite"):
        to_the_mode(squared, AutoLaplaceApproximation(squared, init_loc_fn=saddle), x, steps=5)
    slope = init_to_value(values={"m": torch.tensor(0.5)})
    fitted = to_the_mode(squared, AutoLaplaceApproximation(squared, init_loc_fn=slope), x)
    assert float(gaussian(fitted)[0].abs()) == pytest.approx(3.9**0.5)  # 10 m (4 - m^2) = m


def test_programs_whose_joint_is_not_seen_are_refused_before_training() -> None:
    def subsampling(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[index])

    def mixture(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mean[k.long()], 1.0), obs=x)

    x, options = torch.randn(6), {"steps": 10**9}
    seen: Any = AutoLaplaceApproximation(subsampling)
    with pytest.raises(ValueError, match=r"site 'x' sees 2 of 6 in plate 'data'"):
        to_the_mode(subsampling, seen, x, **options)
    seen = AutoLaplaceApproximation(pyro.poutine.block(mixture, hide=["k"]))
    with pytest.raises(ValueError, match=r"but \['k'\] are left to enumeration"):
        to_the_mode(mixture, seen, x, loss=TraceEnum_ELBO(max_plate_nesting=1), **options)


@pytest.mark.parametrize("name", ["kl_weight", "reconstruction_weight"])
@pytest.mark.parametrize("weight", [0.5, lambda step: 0.5])
def test_weighted_terms_are_refused(data: tuple[Tensor, Tensor], name: str, weight: Any) -> None:
    """The mode of one joint and the curvature of another are no approximation of either."""
    model = Regression()
    with pytest.raises(ValueError, match=r"expected kl_weight=1 and reconstruction_weight=1, got"):
        to_the_mode(model, AutoLaplaceApproximation(model), data, steps=10**9, **{name: weight})
