"""Likelihoods: each sums or integrates to one, has the mean of its draws, and knows its values."""

import math
from collections.abc import Callable
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vi.models import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticDistribution,
    Gaussian,
    LearnedDiscretizedLogistic,
    LearnedGaussian,
    PixelGaussian,
)
from pyro_vi.models.likelihoods import UnitGrid

torch.set_num_threads(1)

LIKELIHOODS: dict[str, Callable[[], nn.Module]] = {
    "Bernoulli": Bernoulli,
    "continuous Bernoulli": ContinuousBernoulli,
    "Gaussian": lambda: Gaussian(0.3),
    "learned Gaussian": lambda: LearnedGaussian(0.3),
    "pixel Gaussian": PixelGaussian,
    "discretized logistic, 2 levels": lambda: DiscretizedLogistic(2),
    "discretized logistic, 256 levels": lambda: DiscretizedLogistic(256),
    "learned discretized logistic, 2 levels": lambda: LearnedDiscretizedLogistic(2),
    "learned discretized logistic, 256 levels": lambda: LearnedDiscretizedLogistic(256),
    "learned discretized logistic, wide": lambda: LearnedDiscretizedLogistic(256, 0.3),
}
every_likelihood = pytest.mark.parametrize("make", LIKELIHOODS.values(), ids=LIKELIHOODS)
Make = Callable[[], nn.Module]


def raws(likelihood: nn.Module, *shape: int, batch: tuple[int, ...] = ()) -> Tensor:
    return 2 * torch.randn(*batch, int(likelihood.outputs), *shape, dtype=torch.float64)  # type: ignore[arg-type]


def grid(levels: int) -> Tensor:
    return torch.arange(levels, dtype=torch.float64) / (levels - 1)


@every_likelihood
@pytest.mark.parametrize("shape", [(1, 4, 5), (6,)], ids=str)
@pytest.mark.parametrize("batch", [(3,), (2, 3), (2, 1, 3)], ids=str)
def test_shapes(
    make: Make, shape: tuple[int, ...], batch: tuple[int, ...], device: torch.device
) -> None:
    likelihood = make().double().to(device)
    raw = raws(likelihood, *shape, batch=batch).to(device)
    p = likelihood(raw, event_dim=len(shape))
    assert (p.batch_shape, p.event_shape, p.mean.shape) == (batch, shape, (*batch, *shape))
    x = p.sample((7,))
    assert (x.shape, x.dtype, x.device) == ((7, *batch, *shape), raw.dtype, raw.device)
    assert p.log_prob(x).shape == (7, *batch)
    assert p.support.check(x).all() and p.support.event_dim == len(shape)
    wide = p.expand((4, *batch))
    torch.testing.assert_close(wide.log_prob(x[:4]), p.log_prob(x[:4]))
    assert wide.sample().shape == wide.mean.shape == (4, *batch, *shape)


@every_likelihood
def test_probability_is_one(make: Make) -> None:
    likelihood = make().double()
    p = likelihood(raws(likelihood, 1, batch=(50,)), event_dim=1)
    if p.support.is_discrete:
        x = grid(getattr(likelihood, "levels", 2))
        total = p.log_prob(x[:, None, None]).exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    else:
        ends = (0, 1) if isinstance(likelihood, ContinuousBernoulli) else (-60, 60)
        x = torch.linspace(*ends, 20_001, dtype=torch.float64)
        total = torch.trapezoid(p.log_prob(x[:, None, None]).exp(), x, dim=0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@every_likelihood
def test_mean_is_the_mean_of_draws(make: Make, device: torch.device) -> None:
    likelihood = make().double().to(device)
    p = likelihood(raws(likelihood, 20, batch=(5,)).to(device), event_dim=1)
    x = p.sample((20_000,))
    error = (x.mean(0) - p.mean).abs()
    assert (error <= 5 * x.std(0) / math.sqrt(len(x)) + 1e-3).all()


@every_likelihood
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [-1e3, -30.0, 30.0, 1e3])
def test_gradients_are_finite_at_extreme_outputs(
    make: Make, dtype: torch.dtype, size: float
) -> None:
    likelihood = make().to(dtype)
    raw = torch.full((3, int(likelihood.outputs), 4), size, dtype=dtype, requires_grad=True)  # type: ignore[arg-type]
    x = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype)
    log_prob = likelihood(raw, event_dim=1).log_prob(x)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert raw.grad is not None and raw.grad.isfinite().all()
    for parameter in likelihood.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


GREY, NEGATIVE, EIGHT_BIT, BINARY = [0.0, 0.3], [0.0, -1.0], [0.0, 200.0], [0.0, 1.0]


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (Bernoulli, GREY),
        (Bernoulli, NEGATIVE),
        (Bernoulli, EIGHT_BIT),
        (ContinuousBernoulli, NEGATIVE),
        (ContinuousBernoulli, EIGHT_BIT),
        (lambda: DiscretizedLogistic(256), GREY),
        (lambda: DiscretizedLogistic(256), NEGATIVE),
        (lambda: DiscretizedLogistic(256), [-1 / 255, 0.0]),
        (lambda: DiscretizedLogistic(256), [256 / 255, 0.0]),
        (lambda: DiscretizedLogistic(256), EIGHT_BIT),
        (lambda: DiscretizedLogistic(2), GREY),
        (lambda: LearnedDiscretizedLogistic(256), GREY),
        (lambda: LearnedDiscretizedLogistic(256), EIGHT_BIT),
        (lambda: LearnedDiscretizedLogistic(2), GREY),
        (lambda: Gaussian(1.0), [0.0, math.nan]),
        (lambda: DiscretizedLogistic(256), [0.0, math.nan]),
    ],
)
def test_values_outside_the_support_are_refused(make: Make, values: list[float]) -> None:
    likelihood = make()
    p = likelihood(torch.zeros(3, int(likelihood.outputs), 2), event_dim=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.tensor(values))
    p.log_prob(torch.tensor(BINARY))


def test_eight_bit_integers_are_refused() -> None:
    """They would wrap around: 2 * 255 is 254 in eight bits, which looks like a grey level."""
    image = torch.arange(256, dtype=torch.uint8)
    on_grid = UnitGrid(256).check(image)
    assert on_grid.tolist() == [True, True] + [False] * 254
    p = DiscretizedLogisticDistribution(torch.tensor(0.5), torch.tensor(0.1), 256)
    with pytest.raises(ValueError, match=r"UnitGrid\(levels=256\)"):
        p.log_prob(image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("levels", [2, 17, 256, 65_536])
def test_grid(levels: int, dtype: torch.dtype) -> None:
    support = UnitGrid(levels)
    levels_of_a_file = torch.arange(levels).to(dtype)
    assert support.check(levels_of_a_file / (levels - 1)).all()
    assert support.check(levels_of_a_file * (1 / (levels - 1))).all()
    assert support.check((levels_of_a_file / (levels - 1)).float().double()).all()
    assert not support.check((levels_of_a_file + 0.3) / (levels - 1)).any()
    assert not support.check(torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)).any()
    assert support.is_discrete and support.event_dim == 0


def test_discretized_logistic_is_a_difference_of_sigmoids() -> None:
    loc = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    scale = torch.tensor([0.02, 0.1, 1.0], dtype=torch.float64)
    p = DiscretizedLogisticDistribution(loc, scale, 11)
    x = grid(11)[:, None]
    upper = ((x + 0.05 - loc) / scale).sigmoid()
    lower = ((x - 0.05 - loc) / scale).sigmoid()
    upper[-1], lower[0] = 1, 0
    torch.testing.assert_close(p.log_prob(x).exp(), upper - lower, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(p.mean, (x * (upper - lower)).sum(0))


def test_discretized_logistic_keeps_its_digits_in_the_tails() -> None:
    """In float32, where the difference of sigmoids is zero, against float64."""
    loc, scale, x = torch.tensor(0.9), torch.tensor(0.01), torch.tensor(51 / 255)
    single = DiscretizedLogisticDistribution(loc, scale, 256).log_prob(x)
    double = DiscretizedLogisticDistribution(loc.double(), scale.double(), 256).log_prob(x.double())
    assert single.item() == pytest.approx(double.item(), rel=1e-5)
    assert double < -60
    sure = DiscretizedLogisticDistribution(x, torch.tensor(1e-4), 256).log_prob(x)
    assert sure.item() == pytest.approx(0, abs=1e-6)


def test_discretized_logistic_draws_have_its_probabilities(device: torch.device) -> None:
    p = DiscretizedLogisticDistribution(
        torch.tensor(0.3, device=device), torch.tensor(0.2, device=device), 8
    )
    n = 100_000
    level = (p.sample((n,)) * 7).round().long().cpu()
    counts = torch.bincount(level, minlength=8) / n
    expected = p.log_prob(torch.arange(8, device=device) / 7).exp().cpu()
    assert ((counts - expected).abs() < 5 * (expected / n).sqrt()).all()


def test_discretized_logistic_in_pyro() -> None:
    p = DiscretizedLogisticDistribution(torch.zeros(5, 3), torch.ones(5, 3), 4)
    assert not p.has_rsample
    x = p.sample()

    def model() -> None:
        with pyro.plate("data", 5):
            pyro.sample("x", p.to_event(1), obs=x)

    trace = poutine.trace(model).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), p.log_prob(x).sum())


def test_learned_scale_is_learned() -> None:
    """The best scale is the root of the mean squared error."""
    likelihood = LearnedGaussian(2.0).double()
    x = torch.randn(1000, 1, dtype=torch.float64) * 0.3
    optimizer = torch.optim.LBFGS(likelihood.parameters(), line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -likelihood(torch.zeros(1000, 1, 1, dtype=x.dtype), event_dim=1).log_prob(x).mean()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(loss)
    best = x.square().mean().sqrt()
    torch.testing.assert_close(likelihood.log_scale.detach().exp(), best, rtol=1e-5, atol=0)


def test_the_learned_scale_of_grey_levels_is_learned() -> None:
    """The best one is that of the draws, the twentieth of a bin included.

    Within five standard errors: a draw has the information (3 + pi^2) / 9 on the log of its scale.
    """
    num, true = 10_000, 0.05
    x = DiscretizedLogisticDistribution(
        torch.tensor(0.5, dtype=torch.float64), torch.tensor(true).double(), 256
    ).sample((num, 1))
    likelihood = LearnedDiscretizedLogistic(256).double()
    raw = torch.full((num, 1, 1), 0.5, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(likelihood.parameters(), line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -likelihood(raw, event_dim=1).log_prob(x).mean()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(loss)
    found = likelihood.log_scale.exp().item() + 0.05 / 255
    error = 1 / math.sqrt(num * (3 + math.pi**2) / 9)
    assert abs(math.log(found / true)) < 5 * error


@pytest.mark.parametrize("levels", [2, 256])
def test_a_learned_scale_of_grey_levels_starts_at_a_bin(levels: int) -> None:
    """The location is the output as it is, in the units of the data."""
    raw = torch.tensor([0.0, 0.25, 0.9]).reshape(1, 1, 3)
    default, wide = LearnedDiscretizedLogistic(levels), LearnedDiscretizedLogistic(levels, 0.3)
    for likelihood, scale in ((default, 1 / (levels - 1)), (wide, 0.3)):
        p = likelihood(raw, event_dim=1).base_dist
        assert torch.equal(p.loc, raw[0])
        torch.testing.assert_close(p.scale, torch.full((1, 3), scale + 0.05 / (levels - 1)))
        assert [name for name, _ in likelihood.named_parameters()] == ["log_scale"]
        assert likelihood.log_scale.item() == pytest.approx(math.log(scale), abs=1e-6)


def test_a_learned_scale_of_grey_levels_has_a_floor() -> None:
    """At which all but 1e-4 of the probability is in one bin, and the density has no pole."""
    likelihood = LearnedDiscretizedLogistic(256)
    with torch.no_grad():
        likelihood.log_scale.fill_(-1e3)
    x = torch.tensor([51 / 255])
    log_prob = likelihood(x.reshape(1, 1, 1), event_dim=1).log_prob(x)
    assert -1e-3 < log_prob.item() < -1e-5
    log_prob.sum().backward()
    assert likelihood.log_scale.grad is not None and likelihood.log_scale.grad.isfinite()


def test_starts() -> None:
    """Raw outputs of zero mean a scale that was asked for, or a sensible one."""
    raw = torch.zeros(1, 2, 1)
    assert LearnedGaussian(0.3)(raw[:, :1], event_dim=1).stddev.item() == pytest.approx(0.3)
    assert PixelGaussian()(raw, event_dim=1).stddev.item() == pytest.approx(1)
    start = DiscretizedLogistic(256)(raw, event_dim=1)
    assert start.mean.item() == pytest.approx(0.5)
    assert 0.1 < start.base_dist.scale.item() < 0.2


@every_likelihood
def test_outputs_of_another_number_are_refused(make: Make) -> None:
    likelihood = make()
    with pytest.raises(ValueError, match=r"expected decoder outputs of shape \(batch"):
        likelihood(torch.zeros(10, 3, 1, 8, 8))
    with pytest.raises(ValueError, match=r"expected decoder outputs of shape \(batch"):
        likelihood(torch.zeros(8, 8))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    "make", [Gaussian, LearnedGaussian, partial(LearnedDiscretizedLogistic, 256)]
)
def test_impossible_scales_are_refused(make: Callable[[float], nn.Module], scale: float) -> None:
    with pytest.raises(ValueError, match="positive, finite scale"):
        make(scale)


@pytest.mark.parametrize("make", [DiscretizedLogistic, LearnedDiscretizedLogistic])
@pytest.mark.parametrize("levels", [1, 0, -3])
def test_impossible_levels_are_refused(make: Callable[[int], nn.Module], levels: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 levels, got {levels}"):
        make(levels)
