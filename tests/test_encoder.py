"""The encoder: any family behind one site, exact where the exact answer is within its reach."""

import math
from collections.abc import Callable

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE, LinearGaussian
from pyro_vi.networks import ConvEncoder, MLPEncoder

torch.set_num_threads(1)

FAMILIES: dict[str, Callable[[int, int], nn.Module]] = {
    "mean-field": MeanField,
    "full covariance": FullCovariance,
    "low-rank": LowRank,
    "flow": lambda dim, context_dim: Flow(dim, context_dim, hidden=(16,)),
}
every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
Make = Callable[[int, int], nn.Module]
Network = Callable[[tuple[int, ...], int], nn.Module]


@every_family
@pytest.mark.parametrize("network", [MLPEncoder, ConvEncoder])
def test_site(make: Make, network: Network, device: torch.device) -> None:
    guide = Encoder((1, 8, 8), make(3, 16), network=network).to(device)
    x = torch.rand(5, 1, 8, 8, device=device)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    site = trace.nodes["z"]
    assert site["value"].shape == (5, 3) and site["log_prob"].shape == (5,)
    assert site["value"].device == x.device
    assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
    q = guide.encode(x)
    assert (q.batch_shape, q.event_shape) == ((5,), (3,))
    torch.testing.assert_close(q.log_prob(site["value"].clone()), site["log_prob"])


@every_family
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_every_parameter_is_trained(make: Make, elbo: type[Trace_ELBO]) -> None:
    model, guide = VAE((1, 8, 8), 3), Encoder((1, 8, 8), make(3, 16))
    x = torch.rand(10, 1, 8, 8).round()
    elbo(num_particles=2).differentiable_loss(model, guide, x).backward()
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_family
def test_bound_of_many_particles_at_once(make: Make) -> None:
    model, guide = VAE((1, 8, 8), 3), Encoder((1, 8, 8), make(3, 16))
    x = torch.rand(10, 1, 8, 8).round()
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    one = torch.tensor([Trace_ELBO().loss(model, guide, x) for _ in range(50)])
    assert abs(elbo.loss(model, guide, x) - one.mean()) < 5 * one.std() * (2 / 50) ** 0.5


def test_linear_network_and_full_covariance_reach_the_evidence(device: torch.device) -> None:
    """The posterior of the linear-Gaussian model is linear in x: the guide can be exact."""
    weight = torch.randn(5, 2, dtype=torch.float64)
    model = LinearGaussian(weight, torch.randn(5, dtype=torch.float64), 0.5)
    x = torch.randn(20, 2, dtype=torch.float64) @ weight.T + 0.5 * torch.randn(20, 5).double()
    family = FullCovariance(2, context_dim=2)
    guide = Encoder((5,), family, network=lambda shape, width: nn.Linear(shape[0], width)).double()
    tril = torch.linalg.cholesky(torch.linalg.inv(model.precision))
    with torch.no_grad():
        gain = torch.linalg.solve(model.precision, model.weight.T / model.scale**2)
        guide.network.weight.copy_(gain)
        guide.network.bias.copy_(-gain @ model.bias)
        family.head.weight.zero_()
        family.head.weight[:2].copy_(torch.eye(2))
        family.head.bias.zero_()
        # The inverse of positive(): softplus(raw + log(expm1(1 - 1e-5))) + 1e-5.
        raw = torch.expm1(tril.diagonal() - 1e-5).log() - math.log(math.expm1(1 - 1e-5))
        family.head.bias[2:4] = raw
        family.head.bias[4] = tril[1, 0]
    model, guide, x = model.to(device), guide.to(device), x.to(device)
    elbo = Trace_ELBO()
    bounds = torch.tensor([-elbo.loss(model, guide, x) for _ in range(20)], dtype=torch.float64)
    assert bounds.std() < 1e-10
    assert bounds.mean().item() == pytest.approx(model.log_evidence(x).sum().item(), abs=1e-9)


@pytest.mark.parametrize("shape", [(10, 8, 8), (10, 1, 8, 7), (1, 8, 8), ()], ids=str)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    guide = Encoder((1, 8, 8), MeanField(3, 16))
    with pytest.raises(ValueError, match=r"expected data of shape \(N, \*\(1, 8, 8\)\), got"):
        guide(torch.zeros(shape))


def test_families_that_are_none_are_refused() -> None:
    for wrong in (MeanField, nn.Linear(1, 1), None):
        with pytest.raises(TypeError, match="module with a context_dim"):
            Encoder((1, 8, 8), wrong)  # type: ignore[arg-type]
