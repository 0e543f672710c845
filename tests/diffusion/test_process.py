"""The forward process against the rules of probability; coordinates; steps that are spread."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_vi.diffusion import (
    Affine,
    Coordinates,
    CosineSchedule,
    Diffusion,
    GivenSchedule,
    LearnedSchedule,
    LinearSchedule,
    Schedule,
    StratifiedSteps,
    Whitened,
)

torch.set_num_threads(1)

SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "given": lambda steps: GivenSchedule(
        torch.linspace(1, 0, steps + 2, dtype=torch.float64)[1:-1]
    ),
    "learned": lambda steps: LearnedSchedule(steps).double(),
}
every_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
Make = Callable[[int], Schedule]


def process(make: Make, steps: int, dim: int = 3) -> Diffusion:
    """A forward process without gradients."""
    return Diffusion((dim,), make(steps).requires_grad_(False))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def positive_definite(dim: int) -> Tensor:
    root = normal(dim, dim)
    return root @ root.T / dim + 0.1 * torch.eye(dim, dtype=torch.float64)


# The distributions


@every_schedule
@pytest.mark.parametrize("steps", [2, 3, 20, 1_000])
def test_the_posterior_of_a_step_is_bayes_rule(make: Make, steps: int) -> None:
    """log q(y_t | y_s) + log q(y_s | y_0) - log q(y_s | y_t, y_0) is log q(y_t | y_0) at any y_s.

    The terms are quadratic: points all around the posterior, a few of its deviations away.
    """
    diffusion = process(make, steps)
    for t in {2, (steps + 2) // 2, steps}:
        now, then = torch.tensor(t), torch.tensor(t - 1)
        y_0 = normal(3)
        y_t = diffusion.noised(y_0, now).sample()
        posterior = diffusion.before(y_t, y_0, now)
        y_s = posterior.mean + 3 * posterior.stddev * normal(30, 3)
        prior, likelihood = diffusion.noised(y_0, then), diffusion.next(y_s, now)
        found = likelihood.log_prob(y_t) + prior.log_prob(y_s) - posterior.log_prob(y_s)
        expected = diffusion.noised(y_0, now).log_prob(y_t).expand(30)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 20, 4_000])
def test_a_step_forward_leads_from_one_marginal_to_the_next(make: Make, steps: int) -> None:
    """The moments of y_t = a y_s + noise, and at t = 1 of y_0 itself, are those of noised()."""
    diffusion = process(make, steps)
    t, y_0 = torch.arange(1, steps + 1), normal(3)
    signal, noise = diffusion.schedule.levels(t)
    before = torch.cat([torch.ones(1).double(), signal[:-1]])
    mean, variance = before[:, None] * y_0, torch.cat([torch.zeros(1).double(), noise[:-1] ** 2])
    step = diffusion.next(mean, t)
    slope = diffusion.next(torch.ones(steps, 3).double(), t).mean[:, 0]
    expected = diffusion.noised(y_0, t)
    torch.testing.assert_close(step.mean, expected.mean, rtol=1e-10, atol=1e-13)
    total = slope**2 * variance + step.stddev[:, 0] ** 2
    torch.testing.assert_close(total, expected.stddev[:, 0] ** 2, rtol=1e-10, atol=0)


@every_schedule
@pytest.mark.parametrize("steps", [2, 20, 4_000])
def test_a_step_back_leads_from_one_marginal_to_the_one_before(make: Make, steps: int) -> None:
    diffusion = process(make, steps)
    t, y_0 = torch.arange(2, steps + 1), normal(3)
    now, then = diffusion.noised(y_0, t), diffusion.noised(y_0, t - 1)
    step = diffusion.before(now.mean, y_0, t)
    on_t = diffusion.transition(t, torch.float64).on_t[:, 0]
    torch.testing.assert_close(step.mean, then.mean, rtol=1e-10, atol=1e-13)
    total = (on_t * now.stddev[:, 0]) ** 2 + step.stddev[:, 0] ** 2
    torch.testing.assert_close(total, then.stddev[:, 0] ** 2, rtol=1e-10, atol=0)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_a_transition_has_the_numbers_of_ddpm(make: Make, steps: int) -> None:
    """Ho et al.'s own expressions in alpha, abar and beta."""
    diffusion = process(make, steps)
    t = torch.arange(1, steps + 1)
    step = diffusion.transition(t, torch.float64)
    levels = diffusion.schedule.levels(t)
    abar = levels[0] ** 2
    before = torch.cat([torch.ones(1).double(), abar[:-1]])
    alpha = abar / before
    small = (1 - alpha) * (1 - before) / (1 - abar)
    small[0] = 1 - alpha[0]
    expected = {
        "signal": levels[0],
        "noise": levels[1],
        "on_t": alpha.sqrt() * (1 - before) / (1 - abar),
        "on_0": before.sqrt() * (1 - alpha) / (1 - abar),
        "small": small,
        "large": 1 - alpha,
    }
    for name, number in expected.items():
        found = getattr(step, name)
        assert found.shape == (steps, 1)
        torch.testing.assert_close(found[:, 0], number, rtol=1e-9, atol=1e-12, msg=name)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_first_transition_leads_to_the_data(make: Make, steps: int) -> None:
    """Its mean is y_0; the variance that stands in for zero is beta_1."""
    diffusion = process(make, steps)
    step = diffusion.transition(torch.tensor(1), torch.float64)
    assert (step.on_t.item(), step.on_0.item()) == (0, 1)
    torch.testing.assert_close(step.large, step.noise**2, rtol=1e-14, atol=0)
    torch.testing.assert_close(step.small, step.large, rtol=1e-14, atol=0)
    y_t, y_0 = normal(5, 3), normal(5, 3)
    assert torch.equal(diffusion.before(y_t, y_0, torch.tensor(1)).mean, y_0)
    assert diffusion.before(y_t, y_0, torch.tensor(1)).stddev.isfinite().all()
    first, noised = diffusion.next(y_0, torch.tensor(1)), diffusion.noised(y_0, torch.tensor(1))
    torch.testing.assert_close(first.log_prob(y_t), noised.log_prob(y_t), rtol=1e-12, atol=1e-12)


@every_schedule
@pytest.mark.parametrize(("t", "s"), [(2, 1), (9, 4), (20, 1), (20, 19)])
def test_a_stride_over_steps_is_one_step_of_a_coarser_process(make: Make, t: int, s: int) -> None:
    """Of the two levels that it leads between, by the formulas of one step."""
    diffusion = process(make, 20)
    now, then = torch.tensor(t), torch.tensor(s)
    found = diffusion.transition(now, torch.float64, s=then)
    levels = diffusion.schedule.levels(torch.tensor([s, t]))[0].square()
    coarse = Diffusion((3,), GivenSchedule(levels)).transition(torch.tensor(2), torch.float64)
    for name, number, expected in zip(found._fields, found, coarse, strict=True):
        torch.testing.assert_close(number, expected, rtol=1e-9, atol=1e-12, msg=name)


@every_schedule
def test_a_stride_to_the_data_leads_to_the_data(make: Make) -> None:
    diffusion = process(make, 20)
    t = torch.arange(1, 21)
    step = diffusion.transition(t, torch.float64, s=torch.zeros_like(t))
    assert (step.on_t == 0).all() and (step.on_0 == 1).all()
    torch.testing.assert_close(step.large, step.noise**2, rtol=1e-14, atol=0)
    default, given = (diffusion.transition(t, torch.float64, s=s) for s in (None, t - 1))
    assert all(torch.equal(one, other) for one, other in zip(default, given, strict=True))


@pytest.mark.parametrize("make", [LinearSchedule, CosineSchedule])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fine_steps_lose_one_rounding_to_single_precision(make: Make, dtype: torch.dtype) -> None:
    """1 - beta loses all digits of beta in float32 at T = 4,000; the numbers here lose none."""
    diffusion = process(make, 4_000)
    t = torch.arange(1, 4_001)
    single, double = (diffusion.transition(t, dt) for dt in (dtype, torch.float64))
    half = torch.finfo(dtype).eps / 2
    for name, found, expected in zip(single._fields, single, double, strict=True):
        assert found.dtype == dtype and (expected > 0).sum() >= 3_999
        normal_range = expected >= torch.finfo(dtype).tiny
        error = ((found.double() - expected).abs() / expected)[normal_range]
        assert error.max() <= half, name


def test_fine_steps_of_a_learned_schedule_in_single_precision() -> None:
    r"""Where gamma itself is float32, a rise has the rounding of its two ends.

    An end is off by a few units in the last place of the range 14, and a rise is 14 / 4,000: a few
    times 4,000 eps = 5e-4 of it. All coefficients but the two of beta keep float32's digits.
    """
    t = torch.arange(1, 4_001)
    rounded, exact = (
        Diffusion((1,), LearnedSchedule(4_000).requires_grad_(False).to(dtype)).transition(t, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for name in ("small", "large", "on_0"):
        error = getattr(rounded, name) / getattr(exact, name) - 1
        assert error.abs().max() < 0.005, name
    for name in ("signal", "noise", "on_t"):
        found, expected = getattr(rounded, name).double(), getattr(exact, name)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, msg=name)
    consistent = rounded.on_t * rounded.signal + rounded.on_0
    before = torch.cat([torch.ones(1, 1), rounded.signal[:-1]])
    torch.testing.assert_close(consistent, before, rtol=1e-6, atol=1e-7)


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("t_shape", "shape"), [((), (5,)), ((5,), (5,)), ((4, 5), (4, 5))])
def test_distributions_broadcast_steps_with_points(
    make: Make,
    dtype: torch.dtype,
    t_shape: tuple[int, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    diffusion = process(make, 9).to(device)
    t = torch.randint(2, 10, t_shape, device=device)
    y_0, y_t = (normal(*size, 3).to(device, dtype) for size in ((5,), shape))
    single = {
        "noised": (diffusion.noised(y_0, t), lambda i, j: diffusion.noised(y_0[j], i)),
        "next": (diffusion.next(y_t, t), lambda i, j: diffusion.next(y_t[..., j, :], i)),
        "before": (
            diffusion.before(y_t, y_0, t),
            lambda i, j: diffusion.before(y_t[..., j, :], y_0[j], i),
        ),
    }
    for name, (q, one) in single.items():
        assert (q.batch_shape, q.event_shape) == (shape, (3,)), name
        draws = q.rsample()
        assert (draws.dtype, draws.device) == (dtype, y_0.device)
        last = one(t.expand(shape)[..., 4], 4)
        torch.testing.assert_close(last.mean, q.mean[..., 4, :])
        torch.testing.assert_close(last.stddev, q.stddev[..., 4, :])
    prior = diffusion.prior(y_0)
    assert (prior.batch_shape, prior.event_shape) == ((), (3,))
    assert prior.sample().dtype == dtype and prior.sample().device == y_0.device
    torch.testing.assert_close(
        prior.log_prob(y_0), -0.5 * (y_0**2).sum(-1) - 1.5 * math.log(2 * math.pi)
    )


@pytest.mark.parametrize("steps", [2, 3, 6])
@pytest.mark.parametrize("name", ["signal", "noise", "on_t", "on_0", "small", "large"])
def test_a_gradient_reaches_a_learned_schedule_through_every_number(name: str, steps: int) -> None:
    """At t = 1 too, where half of what is selected from does not exist."""
    schedule = LearnedSchedule(steps).double()
    step = Diffusion((2,), schedule).transition(torch.arange(1, steps + 1), torch.float64)
    getattr(step, name).log1p().sum().backward()
    for parameter in (schedule.first, schedule.raw_range):
        assert parameter.grad is not None and parameter.grad.isfinite() and parameter.grad != 0
    for parameter in (schedule.raw_size, schedule.raw_slope, schedule.offset):
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_a_gradient_reaches_the_one_level_of_one_step() -> None:
    schedule = LearnedSchedule(1).double()
    step = Diffusion((2,), schedule).transition(torch.tensor([1]), torch.float64)
    (step.large + step.small).sum().backward()
    assert schedule.first.grad is not None and schedule.first.grad > 0


# Data in coordinates


@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("num", [0, 1, 5])
def test_data_are_flattened_and_come_back(shape: tuple[int, ...], num: int) -> None:
    dim = math.prod(shape)
    for coordinates in (None, Affine(0.5, 2.0), Whitened(normal(dim), positive_definite(dim))):
        diffusion = Diffusion(shape, CosineSchedule(4), coordinates=coordinates)
        assert (diffusion.shape, diffusion.dim, diffusion.steps) == (shape, dim, 4)
        x = normal(num, *shape)
        y = diffusion.encode(x)
        assert y.shape == (num, dim)
        torch.testing.assert_close(diffusion.decode(y), x)
        assert diffusion.decode(normal(3, num, dim)).shape == (3, num, *shape)
        if coordinates is None:
            assert torch.equal(y, x.reshape(num, dim))


@pytest.mark.parametrize("size", [(), (2, 3), (5, 6), (5, 3, 2), (5, 1, 2, 3)], ids=str)
def test_data_of_another_shape_are_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected data of shape \(N, 2, 3\), got"):
        Diffusion((2, 3), CosineSchedule(4)).encode(torch.zeros(size))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_data_of_whole_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"expected data of a floating point dtype, got {dtype}"):
        Diffusion((2,), CosineSchedule(4)).encode(torch.zeros(5, 2, dtype=dtype))


def test_affine_coordinates_are_one_map_for_every_number() -> None:
    x = normal(5, 3)
    assert torch.equal(Affine().encode(x), x) and torch.equal(Affine().decode(x), x)
    coordinates = Affine(0.5, 0.25)
    torch.testing.assert_close(coordinates.encode(x), (x - 0.5) / 0.25)
    torch.testing.assert_close(coordinates.decode(coordinates.encode(x)), x)
    assert coordinates.encode(x.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("loc", "scale"),
    [
        (0.0, 0.0),
        (0.0, -1.0),
        (0.0, math.inf),
        (0.0, math.nan),
        (math.nan, 1.0),
        (-math.inf, 1.0),
    ],
)
def test_impossible_affine_coordinates_are_refused(loc: float, scale: float) -> None:
    with pytest.raises(ValueError, match="expected a finite loc and a positive scale, got"):
        Affine(loc, scale)


def test_the_base_of_coordinates_has_no_map() -> None:
    for method in (Coordinates().encode, Coordinates().decode):
        with pytest.raises(NotImplementedError):
            method(torch.zeros(2))


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_whitened_coordinates_make_the_noise_isotropic(dim: int) -> None:
    """Points with the moments of N(0, I), exactly, decode to points with those that were given."""
    mean, covariance = normal(dim), positive_definite(dim)
    coordinates = Whitened(mean, covariance)
    corners = math.sqrt(dim) * torch.eye(dim, dtype=torch.float64)
    decoded = coordinates.decode(torch.cat([corners, -corners]))
    torch.testing.assert_close(decoded.mean(0), mean)
    torch.testing.assert_close(torch.cov(decoded.T, correction=0).reshape(dim, dim), covariance)
    x = normal(4, 5, dim)
    torch.testing.assert_close(coordinates.decode(coordinates.encode(x)), x)
    torch.testing.assert_close(coordinates.encode(coordinates.decode(x)), x)
    squared = torch.linalg.solve(covariance, (x - mean)[..., None])[..., 0]
    distance = coordinates.encode(x).square().sum(-1)
    torch.testing.assert_close(distance, ((x - mean) * squared).sum(-1))


def test_whitened_noise_has_the_covariance_in_the_data() -> None:
    """A noised point, decoded, is N(a x_0 + (1 - a) mean, noise^2 covariance)."""
    mean, covariance = normal(3), positive_definite(3)
    diffusion = Diffusion((3,), LinearSchedule(10), coordinates=Whitened(mean, covariance))
    x_0, t = normal(1, 3), torch.tensor(4)
    signal, noise = diffusion.schedule.levels(t)
    q = diffusion.noised(diffusion.encode(x_0), t)
    y = normal(20, 3)
    expected = MultivariateNormal(mean + signal * (x_0 - mean), noise**2 * covariance)
    volume = 0.5 * torch.linalg.slogdet(covariance).logabsdet
    torch.testing.assert_close(
        q.log_prob(y), expected.log_prob(diffusion.decode(y)) + volume, rtol=1e-9, atol=1e-9
    )


def test_the_root_of_a_covariance_is_symmetric() -> None:
    """So that each number stays where it was, most of all; an ill-conditioned one comes back."""
    values = torch.logspace(-6, 0, 5, dtype=torch.float64)
    vectors = torch.linalg.qr(normal(5, 5)).Q
    coordinates = Whitened(torch.zeros(5, dtype=torch.float64), vectors * values @ vectors.T)
    for matrix, power in ((coordinates.root, 0.5), (coordinates.inverse, -0.5)):
        torch.testing.assert_close(matrix, vectors * values**power @ vectors.T)
        assert torch.linalg.eigvalsh(matrix).min() > 0
    x = normal(10, 5)
    torch.testing.assert_close(coordinates.decode(coordinates.encode(x)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_whitened_coordinates_of_data(ridge: float, dtype: torch.dtype) -> None:
    """Their own mean and covariance, and the ridge for a number that never changes."""
    data = (normal(50, 2, 3) @ positive_definite(3) + 2).to(dtype)
    data[:, 1, 2] = 0.25
    coordinates = Whitened.of(data, ridge=ridge)
    assert {buffer.dtype for buffer in coordinates.buffers()} == {dtype}
    flat = data.reshape(50, 6).double()
    covariance = torch.cov(flat.T)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    root, mean = coordinates.root.double(), coordinates.mean.double()
    torch.testing.assert_close(root @ root, covariance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean, flat.mean(0), rtol=1e-5, atol=1e-6)
    encoded = coordinates.encode(data.reshape(50, 6)).double()
    torch.testing.assert_close(
        encoded.mean(0), torch.zeros(6, dtype=torch.float64), atol=1e-4, rtol=0
    )
    values = torch.linalg.eigvalsh(torch.cov(encoded.T))
    assert (values < 1 + 1e-4).all() and (values > -1e-9).all()


def test_whitened_data_are_white() -> None:
    data = normal(200, 4) @ positive_definite(4)
    encoded = Whitened.of(data, ridge=0.0).encode(data)
    torch.testing.assert_close(torch.cov(encoded.T), torch.eye(4, dtype=torch.float64))
    one = normal(50, 1)
    assert Whitened.of(one, ridge=0.0).root.item() == pytest.approx(one.std().item())


@pytest.mark.parametrize(
    ("mean", "covariance"),
    [
        (torch.zeros(2), torch.eye(3)),
        (torch.zeros(2), torch.ones(2)),
        (torch.zeros(2, 1), torch.eye(2)),
        (torch.tensor(0.0), torch.eye(1)),
    ],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
def test_a_covariance_of_another_size_is_refused(mean: Tensor, covariance: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a mean of shape \(dim,\) and a covariance"):
        Whitened(mean, covariance)


@pytest.mark.parametrize(
    ("covariance", "got"),
    [
        ([[1.0, 0.0], [0.0, -2.0]], "a least eigenvalue of -2"),
        ([[1.0, 0.0], [0.0, 0.0]], "a least eigenvalue of 0"),
        ([[1.0, 0.5], [0.0, 1.0]], "another"),
        ([[1.0, math.nan], [math.nan, 1.0]], "another"),
    ],
    ids=str,
)
def test_impossible_covariances_are_refused(covariance: list[list[float]], got: str) -> None:
    message = f"expected a symmetric, positive definite covariance, got {got}"
    with pytest.raises(ValueError, match=message):
        Whitened(torch.zeros(2), torch.tensor(covariance))


@pytest.mark.parametrize("data", [torch.zeros(1, 2), torch.ones(5, 2)], ids=["one", "alike"])
def test_data_that_do_not_differ_have_no_coordinates(data: Tensor) -> None:
    with pytest.raises(ValueError, match=f"expected data points that differ, got {len(data)}"):
        Whitened.of(data)


def test_whitened_buffers_move_and_stay_in_a_state() -> None:
    diffusion = Diffusion(
        (2,), CosineSchedule(4), coordinates=Whitened(normal(2), positive_definite(2))
    ).float()
    assert diffusion.encode(torch.zeros(3, 2)).dtype == torch.float32
    names = {f"coordinates.{name}" for name in ("mean", "root", "inverse")}
    assert names == set(diffusion.state_dict()) and not list(diffusion.parameters())


# Impossible processes


@pytest.mark.parametrize(
    ("shape", "draws", "error", "message"),
    [
        ((), 1, ValueError, "expected the shape of a data point, got an empty one"),
        ((2, 0), 1, ValueError, r"expected shape\[1\] to be at least 1, got 0"),
        ((2.0,), 1, TypeError, r"expected shape\[0\] to be an int, got 2.0"),
        ((2,), 0, ValueError, "expected draws to be at least 1, got 0"),
        ((2,), 1.0, TypeError, "expected draws to be an int, got 1.0"),
        ((2,), 4, ValueError, "expected to draw at most the 3 steps, got 4"),
    ],
)
def test_impossible_sizes_are_refused(
    shape: tuple[int, ...], draws: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Diffusion(shape, CosineSchedule(3), draws=draws)


@pytest.mark.parametrize("schedule", [100, CosineSchedule, None])
def test_what_is_no_schedule_is_refused(schedule: Schedule) -> None:
    with pytest.raises(TypeError, match=r"expected a Schedule, such as CosineSchedule\(100\), got"):
        Diffusion((2,), schedule)


def test_a_schedule_that_does_not_fall_is_refused() -> None:
    class Still(Schedule):
        def gamma(self, t: Tensor) -> Tensor:
            return torch.zeros(t.shape)

    with pytest.raises(ValueError, match="expected a signal-to-noise ratio that falls"):
        Diffusion((2,), Still(2))
    with pytest.raises(ValueError, match=r"expected signal levels abar inside \(0, 1\)"):
        Diffusion((2,), LearnedSchedule(2, first=-100.0))


# Two processes that are one


def levels_of(schedule: Schedule) -> GivenSchedule:
    return GivenSchedule(schedule.levels(torch.arange(1, schedule.steps + 1))[0].detach().square())


def white(scale: float = 1.0, shift: float = 0.0) -> Whitened:
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    return Whitened(torch.tensor([0.3, -1.0]) + shift, scale * covariance)


def same(one: Diffusion, other: Diffusion) -> bool:
    """As a model holds its guide's process against its own."""
    mine, theirs = one.signature(), other.signature()
    assert mine.dtype == theirs.dtype == torch.float64
    assert not mine.requires_grad and mine.isfinite().all()
    return mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_processes_of_the_same_numbers_have_one_signature() -> None:
    one = Diffusion((2,), CosineSchedule(5))
    assert same(one, one) and same(one, Diffusion([2], CosineSchedule(5)))
    for schedule in (
        LinearSchedule(5),
        CosineSchedule(5),
    ):  # a learned one is told by its parameters
        assert same(Diffusion((2,), schedule), Diffusion((2,), levels_of(schedule)))
    assert same(Diffusion((2,), LearnedSchedule(5)), Diffusion((2,), LearnedSchedule(5).double()))
    mine, theirs = (Diffusion((2,), CosineSchedule(5), coordinates=white()) for _ in range(2))
    assert same(mine, theirs) and same(mine, theirs.double())
    mine, theirs = (
        Diffusion((2,), CosineSchedule(5), coordinates=Affine(1.0, 2.0)) for _ in range(2)
    )
    assert same(mine, theirs)
    by_numbers = Whitened(torch.ones(2), 4 * torch.eye(2))  # the same map
    assert same(mine, Diffusion((2,), CosineSchedule(5), coordinates=by_numbers))


OTHERS: dict[str, Diffusion] = {
    "shape": Diffusion((1, 2), CosineSchedule(5), draws=2),
    "dimension": Diffusion((3,), CosineSchedule(5), draws=2),
    "steps": Diffusion((2,), CosineSchedule(6), draws=2),
    "draws": Diffusion((2,), CosineSchedule(5), draws=3),
    "schedule": Diffusion((2,), LinearSchedule(5), draws=2),
    "offset": Diffusion((2,), CosineSchedule(5, offset=0.01), draws=2),
    "loc": Diffusion((2,), CosineSchedule(5), draws=2, coordinates=Affine(0.1, 1.0)),
    "scale": Diffusion((2,), CosineSchedule(5), draws=2, coordinates=Affine(0.0, 1.1)),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_processes_of_other_numbers_have_another_signature(other: Diffusion) -> None:
    one = Diffusion((2,), CosineSchedule(5), draws=2)
    assert not same(one, other)


@pytest.mark.parametrize("other", [white(1.1), white(shift=0.01)], ids=["covariance", "mean"])
def test_processes_of_another_whitening_have_another_signature(other: Whitened) -> None:
    one, two = (Diffusion((2,), CosineSchedule(5), coordinates=each) for each in (white(), other))
    assert not same(one, two) and not same(one, Diffusion((2,), CosineSchedule(5)))


def test_a_learned_schedule_that_moved_is_another() -> None:
    mine, theirs = (Diffusion((2,), LearnedSchedule(5)) for _ in range(2))
    assert same(mine, theirs)
    with torch.no_grad():
        mine.schedule.first.add_(0.01)
    assert not same(mine, theirs)


# Steps that are spread

BATCHES = [(), (5,), (3, 4)]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("sample_shape", [(), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 1_000])
def test_steps_are_whole_numbers_of_the_right_shape(
    steps: int, sample_shape: tuple[int, ...], batch: tuple[int, ...], device: torch.device
) -> None:
    p = StratifiedSteps(steps, device=device).expand(batch)
    t = p.sample(torch.Size(sample_shape))
    assert t.shape == (*sample_shape, *batch) and t.dtype == torch.int64
    assert t.device.type == device.type and p.support.check(t).all()
    assert (p.batch_shape, p.event_shape, p.has_rsample) == (batch, (), True)
    assert p.support.is_discrete and p.support.event_dim == 0
    log_prob = p.log_prob(t)
    assert log_prob.shape == t.shape and log_prob.device == t.device
    torch.testing.assert_close(log_prob, shares(steps)[t - 1].log().to(log_prob))
    weight = p.weight(t, torch.float64)
    torch.testing.assert_close(weight, 1 / (steps * shares(steps)[t - 1]).to(weight))


def shares(steps: int) -> Tensor:
    """q(t): an eighth of the draws for the first step, where there are more than eight."""
    first = max(1 / steps, 0.125)
    rest = [(1 - first) / (steps - 1)] * (steps - 1) if steps > 1 else []
    return torch.tensor([first, *rest], dtype=torch.float64)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_each_step_has_its_share_by_itself(batch: tuple[int, ...], steps: int) -> None:
    """A chi-square for every element, at a level of 1e-6 for all of them together.

    Laurent and Massart: P(X > k + 2 sqrt(k x) + 2 x) < e^-x for X with k degrees of freedom.
    """
    num, elements = 20_000, math.prod(batch)
    t = StratifiedSteps(steps).expand(batch).sample((num,)).reshape(num, elements)
    counts = torch.stack([(t == step).sum(0) for step in range(1, steps + 1)]).double()
    expected = num * shares(steps).unsqueeze(-1)
    chi_square = ((counts - expected) ** 2 / expected).sum(0)
    k, x = steps - 1, math.log(elements / 1e-6)
    assert (chi_square < k + 2 * math.sqrt(k * x) + 2 * x).all()


@pytest.mark.parametrize("batch", [(5,), (3, 4), (1_000,)], ids=str)
@pytest.mark.parametrize("steps", [1, 3, 12, 100])
def test_steps_that_are_drawn_together_are_spread(steps: int, batch: tuple[int, ...]) -> None:
    """n points 1/n apart on a circle: an arc of q holds n q of them, rounded down or up."""
    num = math.prod(batch)
    t = StratifiedSteps(steps).expand(batch).sample((50,)).reshape(50, num)
    counts = torch.stack([(t == step).sum(1) for step in range(1, steps + 1)])
    expected = num * shares(steps).unsqueeze(-1)
    assert (counts >= (expected - 1e-9).floor()).all() and (
        counts <= (expected + 1e-9).ceil()
    ).all()
    starts = t[:, 0].unique()  # one start for each sample, not one for all
    assert len(starts) > 1 or steps == 1


@pytest.mark.parametrize(
    ("name", "gain"), [("the step", 8.0), ("the first ones", 3.0), ("a wave", 8.0)]
)
def test_an_average_over_spread_steps_is_unbiased_and_varies_less(name: str, gain: float) -> None:
    """Than one over sixteen independent, uniform steps, whose variance is known."""
    steps, n, num = 20, 16, 4_000
    every = torch.arange(1, steps + 1)
    values = {
        "the step": every.double(),
        "the first ones": (every <= 4).double(),
        "a wave": (2 * math.pi * every / steps).sin().double(),
    }[name]
    p = StratifiedSteps(steps).expand([n])
    t = p.sample((num,))
    averages = (p.weight(t, torch.float64) * values[t - 1]).mean(1)
    independent = values.var(correction=0) / n
    assert averages.var() < independent / gain
    error = (independent / num).sqrt()  # above the standard error, by the line before
    assert (averages.mean() - values.mean()).abs() < 5 * error


def test_expanding_twice_is_expanding_once() -> None:
    once = StratifiedSteps(12, validate_args=False).expand([3, 4])
    twice = StratifiedSteps(12, validate_args=False).expand([4]).expand([3, 4])
    assert twice.batch_shape == once.batch_shape and twice.steps == 12
    assert (twice.sample() == 1).sum() in (1, 2)  # an eighth of twelve
    twice.log_prob(torch.zeros(3, 4))  # not validated: expand keeps that
    with pytest.raises(ValueError, match="within the support"):
        StratifiedSteps(12, validate_args=True).expand([4]).log_prob(torch.zeros(4))


@pytest.mark.parametrize("value", [0, 8, -1, 1.5, math.nan, math.inf])
def test_steps_outside_the_support_are_refused(value: float) -> None:
    p = StratifiedSteps(7).expand([2])
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.tensor([1, value]))
    assert p.log_prob(torch.tensor([1, 7])).shape == (2,)


def test_steps_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="not broadcastable"):
        StratifiedSteps(7).expand([3]).log_prob(torch.tensor([1, 2]))


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (1.0, TypeError)])
def test_impossible_numbers_of_steps_are_refused(steps: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected steps to be"):
        StratifiedSteps(steps)


def test_a_plate_spreads_the_steps_in_it() -> None:
    def program() -> None:
        with pyro.plate("data", 5), pyro.plate("steps", 4):
            pyro.sample("t", StratifiedSteps(20))

    trace = poutine.trace(program).get_trace()
    assert trace.nodes["t"]["value"].shape == (4, 5)
    t = trace.nodes["t"]["value"].flatten()
    assert (t == 1).sum() in (2, 3) and t.bincount()[2:].max() <= 1
    assert trace.log_prob_sum().item() == pytest.approx(
        float(shares(20)[t - 1].log().sum()), rel=1e-6
    )
