"""Every family, one table: a density, its draws, its gradients, its state, its start."""

import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_vi.families import FullCovariance, LowRank, MeanField, positive
from pyro_vi.flows import Flow

torch.set_num_threads(1)

FAMILIES: dict[str, Callable[[int, int], nn.Module]] = {
    "mean-field": MeanField,
    "full covariance": FullCovariance,
    "low-rank": lambda dim, context_dim: LowRank(dim, context_dim, rank=min(2, dim)),
    "flow": lambda dim, context_dim: Flow(dim, context_dim, hidden=(32,)),
}
every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
CONTEXT_DIM = 4


def trained(make: Callable[[int, int], nn.Module], dim: int, device: torch.device) -> nn.Module:
    """A family in float64 away from its start, as it would be after training."""
    family = make(dim, CONTEXT_DIM).double()
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return family.to(device)


def contexts(*batch: int, device: torch.device | None = None) -> Tensor:
    return torch.randn(*batch, CONTEXT_DIM, dtype=torch.float64).to(device)


@every_family
@pytest.mark.parametrize("dim", [1, 2])
def test_density_integrates_to_one(
    make: Callable[[int, int], nn.Module], dim: int, device: torch.device
) -> None:
    q = trained(make, dim, device)(contexts(device=device))
    points = torch.linspace(-25, 25, 20_001 if dim == 1 else 301, dtype=torch.float64)
    grid = torch.cartesian_prod(*[points] * dim).reshape(-1, dim).to(device)
    cell = (points[1] - points[0]).item() ** dim
    assert q.log_prob(grid).exp().sum().item() * cell == pytest.approx(1, abs=1e-5)


@every_family
@pytest.mark.parametrize("dim", [1, 3])
def test_draws_follow_the_density(
    make: Callable[[int, int], nn.Module], dim: int, device: torch.device
) -> None:
    """Stein's identities of the density, E[d log q] = 0 and E[z d log q'] = -I, hold for draws."""
    q = trained(make, dim, device)(contexts(device=device))
    z = q.rsample((50_000,)).detach().requires_grad_()
    (score,) = torch.autograd.grad(q.log_prob(z).sum(), z)
    z = z.detach()
    identities = {
        "score": (score, torch.zeros(dim)),
        "product": (z.unsqueeze(-1) * score.unsqueeze(-2), -torch.eye(dim)),
    }
    for name, (terms, expected) in identities.items():
        error = (terms.mean(0) - expected.to(terms)).abs()
        assert (error < 5 * terms.std(0) / math.sqrt(len(z))).all(), name


@every_family
def test_every_parameter_gets_a_gradient(
    make: Callable[[int, int], nn.Module], device: torch.device
) -> None:
    """At the very start: no parameter begins on a saddle."""
    family = make(3, CONTEXT_DIM).double().to(device)
    q = family(contexts(20, device=device))
    z = q.rsample()
    (q.log_prob(z) + (z - 1).square().sum(-1) + z.prod(-1)).sum().backward()
    for name, parameter in family.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@every_family
def test_saved_and_loaded_is_the_same(
    make: Callable[[int, int], nn.Module], device: torch.device
) -> None:
    family = trained(make, 3, device)
    file = io.BytesIO()
    torch.save(family.state_dict(), file)
    file.seek(0)
    other = make(3, CONTEXT_DIM).double().to(device)
    other.load_state_dict(torch.load(file, weights_only=True))
    context, z = contexts(5, device=device), torch.randn(5, 3, dtype=torch.float64).to(device)
    assert torch.equal(family(context).log_prob(z), other(context).log_prob(z))


@every_family
def test_starts_near_the_standard_normal(
    make: Callable[[int, int], nn.Module], device: torch.device
) -> None:
    """KL(q || N(0, I)) of less than 0.05 nats a dimension for contexts of unit size."""
    dim, context_dim = 8, 64
    q = make(dim, context_dim).to(device)(torch.randn(100, context_dim).to(device))
    prior = torch.distributions.Normal(0, 1)
    with torch.no_grad():
        z = q.rsample((500,))
        kl = (q.log_prob(z) - prior.log_prob(z).sum(-1)).mean() / dim
    assert abs(kl) < 0.05


@every_family
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)], ids=str)
def test_shapes(
    make: Callable[[int, int], nn.Module], dim: int, batch: tuple[int, ...], device: torch.device
) -> None:
    family = make(dim, CONTEXT_DIM).double().to(device)
    assert (family.dim, family.context_dim) == (dim, CONTEXT_DIM)
    q = family(contexts(*batch, device=device))
    assert (q.batch_shape, q.event_shape, q.has_rsample) == (batch, (dim,), True)
    assert q.support.event_dim == 1
    z = q.sample((7,))
    assert (z.shape, z.dtype, z.requires_grad) == ((7, *batch, dim), torch.float64, False)
    assert q().requires_grad
    assert q.log_prob(z).shape == (7, *batch)
    wide = q.expand((4, *batch))
    assert wide.batch_shape == (4, *batch) and wide.event_shape == (dim,)
    assert wide().shape == (4, *batch, dim)
    if batch:
        torch.testing.assert_close(wide.log_prob(z[:4]), q.log_prob(z[:4]))


@every_family
@pytest.mark.parametrize("size", [-1e3, 1e3])
def test_extreme_contexts_stay_finite(
    make: Callable[[int, int], nn.Module], size: float, device: torch.device
) -> None:
    family = make(3, CONTEXT_DIM).to(device)
    q = family(torch.full((5, CONTEXT_DIM), size, device=device))
    z = q.rsample()
    q.log_prob(z).sum().backward()
    assert z.isfinite().all() and q.log_prob(z).isfinite().all()
    assert all(p.grad.isfinite().all() for p in family.parameters() if p.grad is not None)


@every_family
def test_context_of_another_size_is_refused(make: Callable[[int, int], nn.Module]) -> None:
    family = make(3, CONTEXT_DIM)
    for context in (torch.zeros(5, CONTEXT_DIM + 1), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"context of shape \(\.\.\., 4\), got"):
            family(context)


@every_family
def test_impossible_sizes_are_refused(make: Callable[[int, int], nn.Module]) -> None:
    with pytest.raises(ValueError, match="dim to be at least 1, got 0"):
        make(0, CONTEXT_DIM)
    with pytest.raises(ValueError, match="context_dim to be at least 1, got 0"):
        make(3, 0)
    with pytest.raises(TypeError, match=r"dim to be an int, got 2\.0"):
        make(2.0, CONTEXT_DIM)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 4])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        LowRank(3, CONTEXT_DIM, rank=rank)


def test_gaussians_have_the_covariance_they_say(device: torch.device) -> None:
    full = trained(FullCovariance, 3, device)(contexts(5, device=device))
    torch.testing.assert_close(full.scale_tril @ full.scale_tril.mT, full.covariance_matrix)
    assert torch.equal(full.scale_tril, full.scale_tril.tril())
    assert (full.scale_tril[:, *torch.tril_indices(3, 3)] != 0).all()
    low = trained(LowRank, 3, device)(contexts(5, device=device))
    expected = low.cov_diag.diag_embed() + low.cov_factor @ low.cov_factor.mT
    torch.testing.assert_close(low.covariance_matrix, expected)
    assert low.cov_factor.shape == (5, 3, 2)


def test_low_rank_factor_does_not_start_at_zero() -> None:
    """There its gradient would vanish; a context of zero leaves the head's bias alone."""
    assert LowRank(3, CONTEXT_DIM)(torch.zeros(CONTEXT_DIM)).cov_factor.abs().min() > 0


def test_low_rank_survives_a_scale_at_its_floor() -> None:
    """In float32, with strong correlations beside it."""
    family = LowRank(3, CONTEXT_DIM)
    with torch.no_grad():
        family.head.bias[3:6] = torch.tensor([-1e3, 0.0, 1e3])
        family.head.bias[6:] = torch.tensor([5.0, 3.0, -4.0, 2.0, 1.0, 6.0])
    q = family(torch.zeros(CONTEXT_DIM))
    z = q.rsample((100,))
    q.log_prob(z.detach()).sum().backward()
    assert q.log_prob(z).isfinite().all() and family.head.bias.grad.isfinite().all()


def test_positive() -> None:
    raw = torch.linspace(-200, 200, 401, dtype=torch.float64, requires_grad=True)
    scale = positive(raw)
    assert scale.min() >= 1e-5 and (scale.diff() >= 0).all()
    assert positive(torch.zeros((), dtype=torch.float64)).item() == pytest.approx(1, abs=1e-12)
    scale.log().sum().backward()
    assert raw.grad is not None and raw.grad.isfinite().all()
