"""The bound of diffusion, told apart by step, against closed forms and against the ELBO itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from test_ddpm import Exact, exact_terms, levels, trio
from torch import Tensor

from pyro_vi.diffusion import Affine, CosineSchedule, Diffusion, MLPDenoiser, Noise, UNet
from pyro_vi.families import MeanField
from pyro_vi.guides import Encoder, ForwardProcess
from pyro_vi.inference import with_terms
from pyro_vi.models import DDPM, VAE, Gaussian, LearnedDiscretizedLogistic
from pyro_vi.posterior import step_bound

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_every_term_has_its_closed_form_within_its_error(steps: int) -> None:
    mean, variance = torch.tensor([0.7]), torch.tensor([2.5])
    diffusion = Diffusion((1,), CosineSchedule(steps))
    found = levels(diffusion.schedule, variance)
    model = DDPM(
        diffusion,
        Exact(diffusion, mean, variance[:, None], Noise()),
        likelihood=Gaussian(float(found["s"][0].sqrt())),
    )
    x = mean + torch.tensor([-1.0, 1.0])[:, None].repeat(2_000, 1) * variance.sqrt()
    bound = step_bound(model, ForwardProcess(diffusion), x, draws=4)
    expected = exact_terms(diffusion.schedule, mean, variance, found["small"])
    assert bound.prior.mean() == pytest.approx(float(expected[0]), abs=1e-10)
    by_step = bound.by_step
    assert (abs(by_step.value - expected[1:].numpy()) < 4.5 * by_step.se + 1e-12).all()
    elbo = bound.elbo
    assert abs(float(elbo.value) + float(expected.sum())) < 4 * float(elbo.se)
    assert float(bound.reconstruction.value) == pytest.approx(-float(by_step.value[0]))


@pytest.mark.parametrize("draws", [1, 3])
def test_the_sum_of_the_terms_is_the_bound(draws: int) -> None:
    model, x = trio(draws)
    guide = ForwardProcess(model.diffusion)
    x = x.repeat(50, 1)
    bound = step_bound(model, guide, x, draws=4, batch_size=250)
    loss = with_terms(TraceMeanField_ELBO())
    with torch.no_grad():
        losses = [loss.loss(model, guide, x) / 600 for _ in range(60)]
    error = math.hypot(float(bound.elbo.se), np.std(losses) / math.sqrt(60))
    assert abs(float(bound.elbo.value) + np.mean(losses)) < 4 * error
    assert bound.steps.shape == bound.variance.shape == (8, 600) and bound.prior.shape == (600,)


def test_errors_are_those_of_the_draws() -> None:
    model, x = trio()
    guide = ForwardProcess(model.diffusion)
    found = [step_bound(model, guide, x, seed=seed).elbo for seed in range(40)]
    spread = np.std([float(one.value) for one in found], ddof=1)
    claimed = math.sqrt(np.mean([float(one.se) ** 2 for one in found]))
    assert claimed == pytest.approx(spread, rel=0.45)  # of 40 runs: 11% of the spread itself
    again = step_bound(model, guide, x, seed=3).elbo
    assert float(again.value) == float(found[3].value)
    assert math.isnan(float(step_bound(model, guide, x, draws=1).elbo.se))


def test_bits_are_of_discrete_data() -> None:
    """A uniform prediction of 17 levels costs log2(17) bits, and a chain in which all is known."""
    model, x = trio()
    with pytest.raises(ValueError, match="bits per dimension are of discrete data"):
        step_bound(model, ForwardProcess(model.diffusion), x).bits_per_dim  # noqa: B018
    diffusion = Diffusion((2,), CosineSchedule(1), coordinates=Affine(0.5, 0.5))

    def nothing(y: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(y)

    class Wide(torch.nn.Module):
        outputs = 1

        def forward(self, raw: Tensor, event_dim: int) -> dist.TorchDistribution:
            inner = LearnedDiscretizedLogistic(17, scale=1e6)
            return inner(0.5 + 0 * raw, event_dim)

    class Net(torch.nn.Module):
        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            return nothing(y, t)

    model = DDPM(diffusion, Net(), likelihood=Wide())
    x = torch.randint(1, 16, (500, 2)) / 16
    found = step_bound(model, ForwardProcess(diffusion), x)
    prior = found.prior.mean() / (2 * math.log(2))
    # Between the two open bins at the ends every level is as likely as nothing: a scale of 1e6
    # levels gives each 1 / (4e6 16), and the bits say so.
    width = math.log2(4 * 1e6 * 16)
    assert float(found.bits_per_dim.value) == pytest.approx(width + prior, rel=1e-3)


def test_programs_without_steps_are_refused() -> None:
    model, guide = VAE((3,), 2, likelihood=Gaussian(1.0)), Encoder((3,), MeanField(2, 4))
    with pytest.raises(ValueError, match="expected a time-sub-sampled program, such as DDPM"):
        step_bound(model, guide, torch.randn(4, 3))
    model, x = trio()
    with pytest.raises(ValueError, match="at least one draw, got 0"):
        step_bound(model, ForwardProcess(model.diffusion), x, draws=0)


def test_raw_programs_are_evaluated_and_left_in_training() -> None:
    """Dropout would make another model of it."""
    diffusion = Diffusion((1, 8, 8), CosineSchedule(2))
    model = DDPM(diffusion, UNet((1, 8, 8), 2, channels=(8,), attention=(), dropout=0.9))
    torch.nn.init.normal_(list(model.net.parameters())[-2])
    x = torch.randn(4, 1, 8, 8)
    found = step_bound(model, ForwardProcess(diffusion), x).elbo.value
    assert model.net.training
    model.eval()
    assert step_bound(model, ForwardProcess(diffusion), x).elbo.value == found


def test_nothing_outside_moves() -> None:
    model, x = trio()
    state = torch.get_rng_state()
    step_bound(model, ForwardProcess(model.diffusion), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert pyro.get_param_store().keys() <= {"net$$$weight"}


@pytest.mark.parametrize("handler", [poutine.mask, poutine.scale], ids=["mask", "scale"])
def test_programs_under_handlers_of_ones_own_have_no_such_bound(handler: Any) -> None:
    diffusion = Diffusion((2,), CosineSchedule(3))
    model = DDPM(diffusion, MLPDenoiser((2,), 3, hidden=(8,)))
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    by = {"mask": x[:, 0] > 0} if handler is poutine.mask else {"scale": 0.5}
    with pytest.raises(ValueError, match="without a mask or a scale around them"):
        step_bound(handler(model, **by), handler(ForwardProcess(diffusion), **by), x)


def test_no_data_points_have_no_bound() -> None:
    diffusion = Diffusion((2,), CosineSchedule(3))
    model = DDPM(diffusion, MLPDenoiser((2,), 3, hidden=(8,)))
    with pytest.raises(ValueError, match="at least one data point, got 0"):
        step_bound(model, ForwardProcess(diffusion), torch.zeros(0, 2))
    with pytest.raises(TypeError, match="data points as one tensor, got tuple"):
        step_bound(model, ForwardProcess(diffusion), (torch.zeros(1, 2),))  # type: ignore[arg-type]
