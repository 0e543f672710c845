"""Schedules: their published formulas, computed again by NumPy, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_vi.diffusion import (
    CosineSchedule,
    GivenSchedule,
    LearnedSchedule,
    LinearSchedule,
    Schedule,
)

torch.set_num_threads(1)


def given(steps: int) -> GivenSchedule:
    return GivenSchedule(torch.linspace(0.999, 0.001, steps + 1, dtype=torch.float64)[1:])


SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "given": given,
    "learned": lambda steps: LearnedSchedule(steps).double(),
}
every_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
Make = Callable[[int], Schedule]


def every_step(schedule: Schedule) -> Tensor:
    return torch.arange(1, schedule.steps + 1)


def signal_levels(schedule: Schedule) -> Tensor:
    """abar_t for all t."""
    with torch.no_grad():
        return schedule.levels(every_step(schedule))[0].square()


def betas(schedule: Schedule) -> Tensor:
    before = torch.cat([torch.ones(1).double(), signal_levels(schedule)[:-1]])
    return 1 - signal_levels(schedule) / before


def moved(schedule: LearnedSchedule, size: float) -> LearnedSchedule:
    """The schedule with noise of this size added to all of its parameters."""
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return schedule


# What all of them are


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 3, 4_000])
def test_levels_are_those_of_a_forward_process(make: Make, steps: int) -> None:
    """Their squares sum to one, the signal falls inside (0, 1), and gamma is -log SNR."""
    schedule = make(steps)
    schedule.check()
    t = every_step(schedule)
    with torch.no_grad():
        (signal, noise), gamma = schedule.levels(t), schedule.gamma(t)
    assert schedule.steps == steps and signal.dtype == noise.dtype == torch.float64
    torch.testing.assert_close(signal**2 + noise**2, torch.ones(steps).double(), rtol=0, atol=1e-15)
    assert ((signal > 0) & (signal < 1)).all() and (signal.diff() < 0).all()
    torch.testing.assert_close(2 * (noise / signal).log(), gamma, rtol=1e-12, atol=1e-12)
    assert (gamma.diff() > 0).all()


@every_schedule
@pytest.mark.parametrize("shape", [(), (1,), (0,), (5,), (3, 2), (2, 1, 4)], ids=str)
def test_steps_have_any_shape(make: Make, shape: tuple[int, ...]) -> None:
    schedule = make(7)
    t = torch.randint(1, 8, shape)
    signal, noise = schedule.levels(t)
    assert schedule.gamma(t).shape == signal.shape == noise.shape == shape
    assert torch.equal(schedule.gamma(t), schedule.gamma(every_step(schedule))[t - 1])


@every_schedule
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_steps_have_an_integer_dtype(make: Make, dtype: torch.dtype) -> None:
    schedule = make(200)
    t = every_step(schedule)
    assert torch.equal(schedule.gamma(t.to(dtype)), schedule.gamma(t))


@pytest.mark.parametrize("make", [LinearSchedule, CosineSchedule, LearnedSchedule])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16], ids=str)
def test_steps_have_a_small_integer_dtype(make: Make, dtype: torch.dtype) -> None:
    schedule = make(127)
    t = every_step(schedule)
    assert torch.equal(schedule.gamma(t.to(dtype)), schedule.gamma(t))


@pytest.mark.parametrize("make", [LinearSchedule, CosineSchedule, given])
def test_numbers_of_the_fixed_ones_stay_in_double_precision(make: Make) -> None:
    """Whatever a module around them is cast to: late steps of many differ in the last digits."""
    t = torch.arange(1, 4_001)
    expected = make(4_000).gamma(t)
    cast = torch.nn.Sequential(make(4_000)).half()[0]
    assert isinstance(cast, Schedule) and not list(cast.parameters())
    assert cast.gamma(t).dtype == torch.float64 and torch.equal(cast.gamma(t), expected)


@every_schedule
@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(make: Make, steps: int) -> None:
    schedule = {SCHEDULES["given"]: LinearSchedule}.get(make, make)
    with pytest.raises(ValueError, match=f"expected steps to be at least 1, got {steps}"):
        schedule(steps)


@pytest.mark.parametrize("make", [Schedule, LinearSchedule, CosineSchedule, LearnedSchedule])
@pytest.mark.parametrize("steps", [2.0, True, "3", None])
def test_steps_that_are_no_whole_number_are_refused(make: Make, steps: object) -> None:
    with pytest.raises(TypeError, match="expected steps to be an int, got"):
        make(steps)  # type: ignore[arg-type]


def test_the_base_has_no_curve() -> None:
    with pytest.raises(NotImplementedError):
        Schedule(3).gamma(torch.tensor(1))


# Linear


def test_linear_has_the_rates_of_ddpm() -> None:
    r"""Of 1,000 steps, and as near as the two can be.

    -log(1 - beta_t) is the rate at the middle of a step, (t - 1/2) / T, where DDPM's own is linear
    in (t - 1) / (T - 1): half a step apart, 1e-5, at both ends. And beta is 1 - e^-r, not r.
    """
    ddpm = np.linspace(1e-4, 0.02, 1_000)
    found = betas(LinearSchedule(1_000)).numpy()
    rate = -np.log1p(-found)
    assert np.abs(rate - ddpm).max() < 1.001e-5 and np.abs(found - ddpm).max() < 2.1e-4
    assert (np.abs(found - ddpm) < 1.001e-5 + rate**2 / 2).all()
    assert found[0] == pytest.approx(1.1e-4, rel=1e-3)
    assert found[-1] == pytest.approx(0.0198, rel=1e-3)
    # what follows for the levels: within 7 % of the signal where it is all but gone
    levels = np.cumprod(1 - ddpm)
    np.testing.assert_allclose(signal_levels(LinearSchedule(1_000)), levels, rtol=0.08)
    np.testing.assert_allclose(signal_levels(LinearSchedule(1_000)), levels, atol=1e-3)


@pytest.mark.parametrize(("first", "last"), [(0.1, 20.0), (5.0, 5.0), (8.0, 0.5)])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_linear_is_its_integral(first: float, last: float, steps: int) -> None:
    """log abar is minus the integral of the rate, which may rise, stay or fall."""
    found = signal_levels(LinearSchedule(steps, first=first, last=last)).log()
    u = np.linspace(0, 1, 2 * steps + 1)
    rate = first + (last - first) * u  # trapezoids are exact for a line
    integral = np.cumsum((rate[1:] + rate[:-1]) / 2 * np.diff(u))[1::2]
    np.testing.assert_allclose(found, -integral, rtol=1e-12)


@pytest.mark.parametrize(
    ("first", "last"), [(0.0, 20.0), (-1.0, 1.0), (0.1, 0.0), (math.nan, 1.0), (0.1, math.nan)]
)
def test_rates_that_are_not_above_zero_are_refused(first: float, last: float) -> None:
    with pytest.raises(ValueError, match="expected noise rates above 0, got"):
        LinearSchedule(10, first=first, last=last)


# CosineSchedule


def cosine_levels(steps: int, offset: float) -> np.ndarray:
    """abar_t as Nichol and Dhariwal have it: by betas, clipped at 0.999."""
    u = np.arange(steps + 1) / steps
    f = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))


@pytest.mark.parametrize("offset", [1e-4, 0.008, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 4, 1_000, 4_000])
def test_cosine_is_that_of_its_paper(steps: int, offset: float) -> None:
    found = signal_levels(CosineSchedule(steps, offset=offset))
    np.testing.assert_allclose(found, cosine_levels(steps, offset), rtol=1e-11)
    assert betas(CosineSchedule(steps, offset=offset))[-1] == pytest.approx(0.999, rel=1e-12)
    assert (betas(CosineSchedule(steps, offset=offset))[:-1] < 0.999).all()


@pytest.mark.parametrize("offset", [0.0, -0.1, math.nan])
def test_offsets_that_are_not_above_zero_are_refused(offset: float) -> None:
    with pytest.raises(ValueError, match="expected an offset above 0, got"):
        CosineSchedule(10, offset=offset)


@pytest.mark.parametrize("make", [LinearSchedule, CosineSchedule])
@pytest.mark.parametrize("finer", [2, 3, 10])
def test_finer_cuts_keep_the_curve(make: Make, finer: int) -> None:
    """Up to the last step, where the cosine's level cannot be zero."""
    t = torch.arange(1, 100)
    coarse, fine = make(100).gamma(t), make(100 * finer).gamma(finer * t)
    torch.testing.assert_close(fine, coarse, rtol=1e-13, atol=1e-13)


# Given


@pytest.mark.parametrize("wrap", [list, tuple, np.array, torch.DoubleTensor], ids=str)
def test_given_levels_come_back(wrap: Callable[[list[float]], list[float]]) -> None:
    levels = [1 - 1e-9, 0.9, 0.5, 0.5 - 1e-12, 1e-4, 1e-30]
    schedule = GivenSchedule(wrap(levels))
    assert schedule.steps == 6
    np.testing.assert_allclose(signal_levels(schedule), levels, rtol=1e-13)


@pytest.mark.parametrize("make", [LinearSchedule, CosineSchedule])
def test_a_schedule_given_by_the_levels_of_another_is_that_one(make: Make) -> None:
    """Up to what 1 - abar has lost: a few units in the last place over 1 - abar."""
    other = make(1_000)
    t = every_step(other)
    torch.testing.assert_close(
        GivenSchedule(signal_levels(other)).gamma(t), other.gamma(t), rtol=1e-10, atol=1e-10
    )


def test_given_levels_are_copied() -> None:
    levels = torch.tensor([0.9, 0.5], dtype=torch.float64, requires_grad=True)
    schedule = GivenSchedule(levels)
    with torch.no_grad():
        levels.zero_()
    assert not list(schedule.parameters())
    np.testing.assert_allclose(signal_levels(schedule), [0.9, 0.5], rtol=1e-14)


@pytest.mark.parametrize("levels", [[], torch.tensor(0.5), [[0.5, 0.4]]], ids=str)
def test_levels_that_are_no_list_are_refused(levels: list[float]) -> None:
    with pytest.raises(ValueError, match=r"expected T signal levels, got shape"):
        GivenSchedule(levels)


@pytest.mark.parametrize(
    ("levels", "step"),
    [
        ([1.0, 0.5], 1),
        ([0.5, 0.0], 2),
        ([1.5, 0.5], 1),
        ([0.9, 0.5, -0.1], 3),
        ([0.5, math.nan], 2),
        ([math.inf], 1),
    ],
    ids=str,
)
def test_levels_outside_zero_and_one_are_refused(levels: list[float], step: int) -> None:
    message = rf"expected signal levels abar inside \(0, 1\), got .* at step {step}$"
    with pytest.raises(ValueError, match=message):
        GivenSchedule(levels)


@pytest.mark.parametrize(
    ("levels", "where"),
    [
        ([0.5, 0.6], "from step 1 to 2 abar goes from 0.5 to 0.6"),
        ([0.9, 0.5, 0.5], "from step 2 to 3 abar goes from 0.5 to 0.5"),
    ],
    ids=str,
)
def test_levels_that_do_not_fall_are_refused(levels: list[float], where: str) -> None:
    with pytest.raises(ValueError, match=f"falls from step to step, but {where}"):
        GivenSchedule(levels)


# A user's own


class Own(Schedule):
    """A user's own, from the gammas alone."""

    def __init__(self, gammas: list[float], dtype: torch.dtype = torch.float64) -> None:
        super().__init__(len(gammas))
        self.gammas = torch.tensor(gammas, dtype=dtype)

    def gamma(self, t: Tensor) -> Tensor:
        return self.gammas[t - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gammas", [[0.0], [-30.0, 0.0, 80.0], [-1e-3, 1e-3]], ids=str)
def test_a_rising_curve_passes(gammas: list[float], dtype: torch.dtype) -> None:
    Own(gammas, dtype).check()


@pytest.mark.parametrize(
    ("gammas", "message"),
    [
        ([0.0, 0.0], "falls from step to step, but from step 1 to 2 abar goes from 0.5 to 0.5"),
        ([-1.0, 0.0, -0.5], "falls from step to step, but from step 2 to 3 abar goes from 0.5 to"),
        ([-math.inf, 0.0], r"inside \(0, 1\), got 1 at step 1"),
        ([-50.0, 0.0], r"inside \(0, 1\), got 1 at step 1"),
        ([0.0, math.inf], r"inside \(0, 1\), got 0 at step 2"),
        ([0.0, 800.0], r"inside \(0, 1\), got 0 at step 2"),
        ([0.0, math.nan, 1.0], r"inside \(0, 1\), got nan at step 2"),
    ],
    ids=str,
)
def test_curves_that_are_no_schedule_are_refused(gammas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Own(gammas).check()


# Learned


def learned_curve(schedule: LearnedSchedule) -> np.ndarray:
    """Its formula, in NumPy."""
    first, spread, size, slope, offset = (
        getattr(schedule, name).detach().double().numpy()
        for name in ("first", "raw_range", "raw_size", "raw_slope", "offset")
    )

    def softplus(x: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, x)

    def rising(u: np.ndarray) -> np.ndarray:
        sigmoid = 1 / (1 + np.exp(-(softplus(slope) * u[..., None] + offset)))
        return u + (softplus(size) * sigmoid).sum(-1)

    u = np.linspace(0, 1, schedule.steps)
    low, high = rising(np.zeros(())), rising(np.ones(()))
    return first + softplus(spread) * (rising(u) - low) / (high - low)


@pytest.mark.parametrize("size", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("hidden", [1, 64])
def test_learned_has_its_formula(hidden: int, size: float) -> None:
    schedule = moved(LearnedSchedule(50, hidden=hidden).double(), size)
    found = schedule.gamma(every_step(schedule)).detach()
    np.testing.assert_allclose(found, learned_curve(schedule), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [2, 100, 4_000])
@pytest.mark.parametrize("size", [0.3, 1.0, 5.0])
def test_learned_rises_for_any_parameters(size: float, steps: int, dtype: torch.dtype) -> None:
    t = torch.arange(1, steps + 1)
    for _ in range(10):
        schedule = moved(LearnedSchedule(steps, first=-6.0, last=6.0).to(dtype), size)
        gamma = schedule.gamma(t).detach()
        assert gamma.dtype == dtype and gamma.isfinite().all()
        assert (gamma.diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["first", "raw_range", "raw_size", "raw_slope", "offset"])
@pytest.mark.parametrize("value", [-1e4, -100.0, 100.0, 1e4])
def test_learned_never_falls_at_extreme_parameters(
    name: str, value: float, dtype: torch.dtype
) -> None:
    """Neighbours may round to one number; they do not change places, and nothing overflows."""
    schedule = LearnedSchedule(1_000).to(dtype)
    with torch.no_grad():
        getattr(schedule, name).fill_(value)
    gamma = schedule.gamma(every_step(schedule))
    assert gamma.isfinite().all() and (gamma.diff() >= 0).all()
    gamma.sum().backward()
    for parameter in schedule.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("first", "last"), [(-9.0, 5.0), (-1.0, 30.0), (0.0, 0.01)])
def test_learned_starts_near_a_straight_line(first: float, last: float, dtype: torch.dtype) -> None:
    """At its ends exactly, and between within a hundredth of the range."""
    schedule = LearnedSchedule(100, first=first, last=last).to(dtype)
    found = schedule.gamma(every_step(schedule)).detach().double()
    line = torch.linspace(first, last, 100, dtype=torch.float64)
    ends = torch.tensor([0, -1])
    torch.testing.assert_close(found[ends], line[ends], rtol=1e-6, atol=1e-6)
    assert (found - line).abs().max() < 0.01 * (last - first)


@pytest.mark.parametrize("weights", ["one", "random"])
def test_a_gradient_reaches_every_parameter_of_learned(weights: str) -> None:
    schedule = moved(LearnedSchedule(20).double(), 0.0 if weights == "one" else 0.5)
    signal, noise = schedule.levels(every_step(schedule))
    (signal * torch.randn(20).double() + noise.log()).sum().backward()
    for name, parameter in schedule.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).all(), name


def test_the_gradients_of_learned_are_right() -> None:
    schedule = moved(LearnedSchedule(5, hidden=3).double(), 0.5)
    t, names = every_step(schedule), [name for name, _ in schedule.named_parameters()]

    def gamma(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        found: Tensor = torch.func.functional_call(schedule, parameters, t)
        return found

    schedule.forward = schedule.gamma  # type: ignore[method-assign]
    assert torch.autograd.gradcheck(gamma, tuple(schedule.parameters()))


def test_one_learned_step_is_at_the_last_level() -> None:
    schedule = LearnedSchedule(1, first=-3.0, last=2.0).double()
    assert schedule.gamma(torch.tensor([1])).tolist() == pytest.approx([2.0], abs=1e-6)
    schedule.gamma(torch.tensor(1)).backward()
    assert schedule.first.grad == 1 and schedule.raw_range.grad is not None
    assert schedule.raw_range.grad > 0


@pytest.mark.parametrize(
    ("first", "last"), [(1.0, 1.0), (2.0, -2.0), (math.nan, 1.0), (0.0, math.nan)]
)
def test_ends_that_do_not_rise_are_refused(first: float, last: float) -> None:
    with pytest.raises(ValueError, match=r"expected gamma to rise, got .* at first and"):
        LearnedSchedule(10, first=first, last=last)


@pytest.mark.parametrize(("hidden", "error"), [(0, ValueError), (2.0, TypeError)])
def test_impossible_widths_are_refused(hidden: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="expected hidden to be"):
        LearnedSchedule(10, hidden=hidden)
