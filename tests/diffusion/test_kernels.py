"""Reverse kernels: three predictions of one function, and families around the mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_vi.diffusion import (
    Clean,
    CosineSchedule,
    Diffusion,
    LargeVariance,
    LearnedVariance,
    Noise,
    SmallVariance,
    Transition,
    Velocity,
)
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.inference import with_terms

torch.set_num_threads(1)

STEPS, DIM, CONTEXT = 12, 3, 4
GAUSSIANS: dict[str, Callable[[int, int], nn.Module]] = {
    "mean-field": MeanField,
    "low-rank": LowRank,
    "full covariance": FullCovariance,
}
FAMILIES = {**GAUSSIANS, "flow": partial(Flow, hidden=(16,))}
every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
every_gaussian = pytest.mark.parametrize("make", GAUSSIANS.values(), ids=GAUSSIANS)
Make = Callable[[int, int], nn.Module]
# t, y_t: at one step, at a step for each data point, at several of each
SHAPES = [((), (5,)), ((5,), (5,)), ((2, 5), (2, 5))]
every_shape = pytest.mark.parametrize(("t_shape", "shape"), SHAPES, ids=str)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def transition(t: Tensor, dtype: torch.dtype = torch.float64) -> Transition:
    return Diffusion((DIM,), CosineSchedule(STEPS)).transition(t, dtype)


def trained(make: Make, *, network: bool = False, dim: int = DIM) -> LearnedVariance:
    """A kernel in float64 away from its start."""
    reads = nn.Linear(dim, CONTEXT) if network else None
    kernel = LearnedVariance(make(dim, CONTEXT), STEPS, network=reads).double()
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return kernel


def family_of(kernel: LearnedVariance, y_t: Tensor, t: Tensor) -> dist.TorchDistribution:
    """What the kernel's family makes of the context."""
    context = kernel.embedding(t)
    if kernel.network is not None:
        context = context + kernel.network(y_t)
    found: dist.TorchDistribution = kernel.family(context)
    return found


def covariance(fn: dist.TorchDistribution) -> Tensor:
    if isinstance(fn, dist.Independent):
        return torch.diag_embed(fn.variance)
    return fn.covariance_matrix


# Predictions


@pytest.mark.parametrize("t_shape", [(), (5,), (2, 5)], ids=str)
@pytest.mark.parametrize("t", [1, 2, STEPS // 2, STEPS])
def test_predictions_of_one_function_agree(t: int, t_shape: tuple[int, ...]) -> None:
    """Of y_t = signal y_0 + noise e: the outputs e, y_0 and signal e - noise y_0 are one y_0."""
    step = transition(torch.full(t_shape, t))
    y_0, noise = normal(2, 5, DIM), normal(2, 5, DIM)
    y_t = step.signal * y_0 + step.noise * noise
    outputs = {
        Noise(): noise,
        Clean(): y_0,
        Velocity(): step.signal * noise - step.noise * y_0,
    }
    for prediction, out in outputs.items():
        assert not list(prediction.parameters())
        estimate = prediction(out, y_t, step)
        assert estimate.shape == y_t.shape
        torch.testing.assert_close(estimate, y_0, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prediction", [Noise, Clean, Velocity])
def test_predictions_keep_single_precision_where_they_are_stable(
    prediction: type[nn.Module],
) -> None:
    """A wrong output of size d is a wrong y_0 of d noise / signal, d and d noise."""
    step = transition(torch.arange(1, STEPS + 1), torch.float32)
    y_t, out, wrong = (torch.randn(STEPS, DIM) for _ in range(3))
    moved = prediction()(out + wrong, y_t, step) - prediction()(out, y_t, step)
    size = {Noise: -step.noise / step.signal, Clean: torch.ones(1, 1), Velocity: -step.noise}
    expected = size[prediction] * wrong
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)


# Fixed variances


@every_shape
@pytest.mark.parametrize(("kernel", "name"), [(SmallVariance, "small"), (LargeVariance, "large")])
def test_fixed_variances_are_those_of_the_step(
    kernel: type[nn.Module], name: str, t_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    t = torch.randint(1, STEPS + 1, t_shape)
    step, mean = transition(t), normal(*shape, DIM)
    p = kernel()(mean, normal(*shape, DIM), t, step)
    assert (p.batch_shape, p.event_shape) == (shape, (DIM,))
    assert torch.equal(p.mean, mean) and not list(kernel().parameters())
    torch.testing.assert_close(p.variance, getattr(step, name).expand(p.mean.shape))


def test_the_small_variance_is_right_where_the_data_are_known() -> None:
    """And the large one where they are N(0, I): with the mean at the best estimate, exactly."""
    diffusion = Diffusion((DIM,), CosineSchedule(STEPS))
    t = torch.tensor(5)
    step, y_t, y_0 = transition(t), normal(8, DIM), normal(8, DIM)
    posterior = diffusion.before(y_t, y_0, t)
    known = SmallVariance()(step.on_t * y_t + step.on_0 * y_0, y_t, t, step)
    y_s = normal(8, DIM)
    torch.testing.assert_close(known.log_prob(y_s), posterior.log_prob(y_s))
    # standard normal data: p(y_s) q(y_t | y_s) / p(y_t), and E[y_0 | y_t] = signal y_t
    standard = LargeVariance()(step.on_t * y_t + step.on_0 * step.signal * y_t, y_t, t, step)
    prior = diffusion.prior(y_t)
    expected = diffusion.next(y_s, t).log_prob(y_t) + prior.log_prob(y_s) - prior.log_prob(y_t)
    torch.testing.assert_close(standard.log_prob(y_s), expected, rtol=1e-9, atol=1e-9)


# Families


@every_family
@every_shape
@pytest.mark.parametrize("network", [False, True], ids=["time", "network"])
def test_learned_kernels_are_an_affine_map_of_their_family(
    make: Make, network: bool, t_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Density, by change of variables, and draws: y_s = m + beta^(1/2) u for the same u.

    A normal's u is centred: its own mean is no part of the kernel.
    """
    kernel = trained(make, network=network)
    t = torch.randint(1, STEPS + 1, t_shape)
    step, mean, y_t = transition(t), normal(*shape, DIM), normal(*shape, DIM)
    p, family = kernel(mean, y_t, t, step), family_of(kernel, y_t, t)
    assert (p.batch_shape, p.event_shape) == (shape, (DIM,))
    scale = step.large.sqrt()
    y_s = mean + scale * normal(7, *shape, DIM)
    shift = family.mean if kernel.centred else torch.zeros(DIM).double()
    expected = family.log_prob((y_s - mean) / scale + shift) - DIM * scale.log().squeeze(-1)
    torch.testing.assert_close(p.log_prob(y_s), expected, rtol=1e-9, atol=1e-9)
    torch.manual_seed(1)
    u = family.expand(shape).rsample((4,))
    torch.manual_seed(1)
    drawn = p.rsample((4,))
    assert drawn.requires_grad
    torch.testing.assert_close(drawn, mean + scale * (u - shift), rtol=1e-9, atol=1e-12)


@every_gaussian
@every_shape
def test_learned_kernels_of_normals_are_normals(
    make: Make, t_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Of their family's type, for which KLs are known; centred, and the covariance is mapped."""
    kernel = trained(make, network=True)
    t = torch.randint(1, STEPS + 1, t_shape)
    step, mean, y_t = transition(t), normal(*shape, DIM), normal(*shape, DIM)
    p, family = kernel(mean, y_t, t, step), family_of(kernel, y_t, t)
    assert type(p) is type(family)
    torch.testing.assert_close(p.mean, mean)
    expected = step.large.unsqueeze(-1) * covariance(family)
    torch.testing.assert_close(covariance(p), expected.expand(*shape, DIM, DIM))
    wide = p.expand((6, *shape))
    torch.testing.assert_close(wide.log_prob(mean)[2], p.log_prob(mean))


def test_a_flow_has_a_density_that_integrates_to_one() -> None:
    kernel = trained(FAMILIES["flow"], dim=1)
    t = torch.tensor(3)
    step = transition(t)
    p = kernel(torch.tensor([0.4]).double(), normal(1), t, step)
    y = torch.linspace(-30, 30, 20_001, dtype=torch.float64)[:, None]
    assert torch.trapezoid(p.log_prob(y).exp(), y[:, 0]).item() == pytest.approx(1, abs=1e-6)


@every_family
def test_learned_kernels_start_near_the_large_variance(make: Make) -> None:
    """Each family starts near N(0, I), and the low-rank one with a factor of 0.1 an entry."""
    kernel = LearnedVariance(make(DIM, CONTEXT), STEPS).double()
    t = torch.tensor(5)
    step, mean = transition(t), normal(DIM)
    draws = kernel(mean, mean, t, step).sample((4_000,))
    variance = step.large.item()
    assert ((draws.mean(0) - mean).abs() < 0.25 * math.sqrt(variance)).all()
    assert ((draws.var(0) / variance - 1).abs() < 0.25).all()


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_learned_kernels_keep_device_and_dtype(
    make: Make, dtype: torch.dtype, device: torch.device
) -> None:
    kernel = trained(make, network=True).to(device, dtype)
    t = torch.arange(1, STEPS + 1, device=device)
    mean = torch.randn(STEPS, DIM, device=device, dtype=dtype)
    p = kernel(mean, mean, t, transition(t, dtype))
    y = p.sample()
    assert (y.dtype, y.device) == (dtype, mean.device)
    assert p.log_prob(y).isfinite().all() and p.log_prob(y).dtype == dtype


@every_family
@pytest.mark.parametrize("path", ["density", "draws"])
def test_a_gradient_reaches_every_parameter(make: Make, path: str) -> None:
    """Those of the embedding, the network and the family; the mean, the input; at the start."""
    kernel = LearnedVariance(make(DIM, CONTEXT), STEPS, network=nn.Linear(DIM, CONTEXT)).double()
    t = torch.arange(1, STEPS + 1)
    mean, y_t = (normal(STEPS, DIM).requires_grad_() for _ in range(2))
    p = kernel(mean, y_t, t, transition(t))
    y_s = p.rsample()
    if path == "density":
        p.log_prob(normal(STEPS, DIM)).sum().backward()
    else:
        ((y_s - 1).square().sum(-1) + y_s.prod(-1)).sum().backward()
    named = [*kernel.named_parameters(), ("mean", mean), ("y_t", y_t)]
    for name, parameter in named:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_without_a_network_the_covariance_depends_on_time_alone() -> None:
    t = torch.tensor([3, 9])
    step, mean = transition(t), normal(2, DIM)
    one, other = normal(2, DIM), normal(2, DIM)
    alone, reads = trained(FullCovariance), trained(FullCovariance, network=True)
    torch.testing.assert_close(
        alone(mean, one, t, step).scale_tril, alone(mean, other, t, step).scale_tril
    )
    units = alone(mean, one, t, step).scale_tril / step.large.sqrt().unsqueeze(-1)
    assert (units[0] - units[1]).abs().max() > 0.01
    moved = reads(mean, one, t, step).scale_tril - reads(mean, other, t, step).scale_tril
    assert moved.abs().max() > 0.01


# Under the bound


def programs(
    p: dist.TorchDistribution, q: dist.TorchDistribution
) -> tuple[Callable[[], None], ...]:
    """A model and a guide of one latent each, in plate "data"."""

    def program(fn: dist.TorchDistribution) -> None:
        with pyro.plate("data", 5):
            pyro.sample("x_s", fn)

    return partial(program, p), partial(program, q)


def kl_of_normals(q: dist.TorchDistribution, p: dist.TorchDistribution) -> Tensor:
    """KL(q || p) by its textbook formula, with full matrices."""
    a, b = covariance(q), covariance(p)
    away = (p.mean - q.mean)[..., None]
    trace = torch.linalg.solve(b, a).diagonal(dim1=-2, dim2=-1).sum(-1)
    squared = (away.mT @ torch.linalg.solve(b, away))[..., 0, 0]
    return 0.5 * (trace + squared - DIM + torch.logdet(b) - torch.logdet(a))


@pytest.mark.parametrize("name", ["small", "large", *GAUSSIANS])
def test_the_kl_of_a_normal_kernel_is_closed_form(name: str) -> None:
    fixed = {"small": SmallVariance(), "large": LargeVariance()}
    kernel = fixed[name] if name in fixed else trained(GAUSSIANS[name], network=True)
    diffusion = Diffusion((DIM,), CosineSchedule(STEPS))
    t = torch.tensor([2, 3, 6, 9, STEPS])
    y_t, y_0, mean = (normal(5, DIM) for _ in range(3))
    q, p = diffusion.before(y_t, y_0, t), kernel(mean, y_t, t, transition(t))
    loss = with_terms(TraceMeanField_ELBO())
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loss.reset()
        losses.append(loss.loss(*programs(p, q)))
    assert losses[0] == losses[1] == pytest.approx(kl_of_normals(q, p).sum().item(), rel=1e-9)
    assert loss.reconstruction() == 0 and loss.kl() == losses[0]


def test_the_kl_of_a_flow_is_taken_at_the_draw() -> None:
    diffusion = Diffusion((DIM,), CosineSchedule(STEPS))
    t = torch.tensor([2, 3, 6, 9, STEPS])
    y_t, y_0, mean = (normal(5, DIM) for _ in range(3))
    q = diffusion.before(y_t, y_0, t)
    p = trained(FAMILIES["flow"], network=True)(mean, y_t, t, transition(t))
    torch.manual_seed(1)
    y_s = q.rsample()
    expected = (q.log_prob(y_s) - p.log_prob(y_s)).sum()
    torch.manual_seed(1)
    found = with_terms(TraceMeanField_ELBO()).loss(*programs(p, q))
    assert found == pytest.approx(expected.item(), rel=1e-9)


@every_gaussian
def test_the_gradient_of_the_kl_reaches_the_kernel(make: Make) -> None:
    kernel = trained(make, network=True)
    diffusion = Diffusion((DIM,), CosineSchedule(STEPS))
    t = torch.tensor([2, 3, 6, 9, STEPS])
    y_t, y_0, mean = (normal(5, DIM) for _ in range(3))
    q = diffusion.before(y_t, y_0, t)
    expected = torch.autograd.grad(
        kl_of_normals(q, kernel(mean, y_t, t, transition(t))).sum(), tuple(kernel.parameters())
    )
    p = kernel(mean, y_t, t, transition(t))
    with_terms(TraceMeanField_ELBO()).differentiable_loss(*programs(p, q)).backward()
    for parameter, gradient in zip(kernel.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10)


# Errors


@pytest.mark.parametrize("family", [nn.Linear(2, 2), lambda context: context, None, MeanField])
def test_what_is_no_family_is_refused(family: nn.Module) -> None:
    with pytest.raises(TypeError, match="expected the family to be a module with a context_dim"):
        LearnedVariance(family, STEPS)


def test_a_context_that_times_cannot_be_embedded_in_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an even width of the time embedding, got 5"):
        LearnedVariance(MeanField(DIM, 5), STEPS)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (2.0, TypeError)])
def test_impossible_steps_are_refused(steps: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected steps to be"):
        LearnedVariance(MeanField(DIM, CONTEXT), steps)
