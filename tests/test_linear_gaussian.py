"""The oracle against itself: its closed forms, Pyro's bounds and torch's own densities agree."""

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal, Normal
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_vi.models import LinearGaussian

torch.set_num_threads(1)


def example(d: int, k: int, device: torch.device) -> tuple[LinearGaussian, Tensor]:
    weight, bias = torch.randn(d, k, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    x = torch.randn(7, k, dtype=torch.float64) @ weight.T + bias
    x = x + 0.5 * torch.randn(7, d, dtype=torch.float64)
    return LinearGaussian(weight, bias, 0.5).to(device), x.to(device)


sizes = pytest.mark.parametrize(("d", "k"), [(5, 2), (2, 5), (3, 3), (1, 1)])


@sizes
def test_evidence_is_the_marginal_density(d: int, k: int, device: torch.device) -> None:
    model, x = example(d, k, device)
    eye = torch.eye(d, dtype=x.dtype, device=device)
    covariance = model.weight @ model.weight.T + model.scale**2 * eye
    expected = torch.distributions.MultivariateNormal(model.bias, covariance).log_prob(x)
    torch.testing.assert_close(model.log_evidence(x), expected, rtol=1e-10, atol=1e-10)


@sizes
def test_posterior_times_evidence_is_the_joint(d: int, k: int, device: torch.device) -> None:
    model, x = example(d, k, device)
    z = torch.randn(7, k, dtype=x.dtype).to(device)
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
    trace.compute_log_prob()
    joint = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
    expected = model.posterior(x).log_prob(z) + model.log_evidence(x)
    torch.testing.assert_close(joint, expected, rtol=1e-9, atol=1e-9)


@sizes
def test_exact_guide_gives_the_evidence_with_every_draw(
    d: int, k: int, device: torch.device
) -> None:
    model, x = example(d, k, device)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    elbo = Trace_ELBO()
    bounds = torch.tensor([-elbo.loss(model, guide, x) for _ in range(20)], dtype=torch.float64)
    evidence = model.log_evidence(x).sum().item()
    assert bounds.std() < 1e-10
    assert bounds.mean().item() == pytest.approx(evidence, abs=1e-9)


@sizes
def test_best_mean_field_guide_stays_below_by_the_gap(d: int, k: int, device: torch.device) -> None:
    """E_q[log p(x, z)] is exact with two draws, mean +- sd, a dimension: it is quadratic in z."""
    model, x = example(d, k, device)
    loc, sd = model.posterior(x).mean, model.precision.diagonal().rsqrt()
    q = Normal(loc, sd).to_event(1)
    offsets = math.sqrt(k) * torch.cat([torch.diag(sd), -torch.diag(sd)])
    points = (loc + offsets.unsqueeze(1)).flatten(0, 1)
    data = x.repeat(2 * k, 1)
    trace = poutine.trace(poutine.condition(model, {"z": points})).get_trace(data)
    trace.compute_log_prob()
    joint = (trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]).reshape(2 * k, -1)
    gap = model.log_evidence(x) - (joint.mean(0) + q.entropy())
    expected = model.mean_field_gap().expand_as(gap)
    torch.testing.assert_close(gap, expected, rtol=1e-9, atol=1e-9)
    assert (gap > 1e-3).all() or k == 1

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    elbo = TraceMeanField_ELBO()
    losses = torch.tensor([elbo.loss(model, guide, x) for _ in range(300)])
    error = losses.mean() + (model.log_evidence(x).sum() - gap.sum()).cpu()
    assert abs(error) < 5 * losses.std() / math.sqrt(300)


def test_gap_of_a_known_correlation() -> None:
    """A posterior in two dimensions with correlation rho: -1/2 log(1 - rho^2)."""
    for rho in (0.3, 0.8, 0.97):
        precision = 100 * torch.tensor([[1, -rho], [-rho, 1]], dtype=torch.float64)
        weight = torch.linalg.cholesky(precision - torch.eye(2)).T
        model = LinearGaussian(weight, torch.zeros(2, dtype=torch.float64), 1.0)
        gap = model.mean_field_gap().item()
        assert gap == pytest.approx(-0.5 * math.log(1 - rho**2), abs=1e-12)
    assert gap > 0.5108


def test_draws_and_state(device: torch.device) -> None:
    model, x = example(5, 2, device)
    assert (model.shape, model.latent_dim) == ((5,), 2)
    assert isinstance(model.posterior(x), MultivariateNormal)
    assert list(model.parameters()) == []
    other = LinearGaussian(torch.zeros(5, 2).double(), torch.zeros(5).double(), 1.0).to(device)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_evidence(x), model.log_evidence(x))
    assert model.float().log_evidence(x.float()).dtype == torch.float32


def test_impossible_arguments_are_refused() -> None:
    weight, bias = torch.ones(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"weight of shape \(d, k\), got \(3,\)"):
        LinearGaussian(bias, bias, 1.0)
    with pytest.raises(ValueError, match=r"bias of shape \(3,\), got \(2,\)"):
        LinearGaussian(weight, torch.zeros(2), 1.0)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive, finite scale"):
            LinearGaussian(weight, bias, scale)
    model = LinearGaussian(weight, bias, 1.0)
    for call in (model, model.log_evidence, model.posterior):
        for shape in [(3,), (5, 2), (2, 5, 3)]:
            with pytest.raises(ValueError, match=r"data of shape \(N, 3\), got"):
                call(torch.zeros(shape))
