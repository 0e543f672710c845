"""Diffusion against closed forms for Gaussian data, and the programs against one another.

For data N(mu, v) and the optimal denoiser every term of the bound is known. Each is quadratic in
the data point and in the noise, so that points and noises with the right first two moments give
the expectation exactly, without a random number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_vi import Fit, fit
from pyro_vi.diffusion import (
    Affine,
    Clean,
    CosineSchedule,
    Diffusion,
    LargeVariance,
    LearnedSchedule,
    LearnedVariance,
    LinearSchedule,
    MLPDenoiser,
    Noise,
    Schedule,
    SmallVariance,
    Transition,
    Velocity,
)
from pyro_vi.families import FullCovariance
from pyro_vi.flows import Flow
from pyro_vi.guides import ForwardOrder, ForwardProcess, ReverseOrder
from pyro_vi.inference import with_terms
from pyro_vi.models import (
    DDPM,
    Bernoulli,
    DDPMChain,
    DiscretizedLogistic,
    Gaussian,
    LearnedDiscretizedLogistic,
    LearnedGaussian,
)
from pyro_vi.posterior import Scorer, step_bound
from pyro_vi.programs import FixedSites

torch.set_num_threads(1)

Program = Callable[..., Any]
MEAN, VARIANCE = 0.7, 2.5


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Exact(nn.Module):
    """What the optimal denoiser gives for data N(mean, covariance), under a prediction."""

    def __init__(
        self, diffusion: Diffusion, mean: Tensor, covariance: Tensor, prediction: nn.Module
    ) -> None:
        super().__init__()
        self.diffusion, self.mean, self.covariance = diffusion, mean, covariance
        self.prediction = prediction

    def forward(self, y_t: Tensor, t: Tensor) -> Tensor:
        signal, noise = (level[..., None] for level in self.diffusion.schedule.levels(t))
        total = signal[..., None] ** 2 * self.covariance + noise[..., None] ** 2 * torch.eye(
            len(self.mean)
        )
        solved = torch.linalg.solve(total, (y_t - signal * self.mean)[..., None])[..., 0]
        clean = self.mean + signal * solved @ self.covariance
        if isinstance(self.prediction, Clean):
            return clean
        eps = (y_t - signal * clean) / noise
        return eps if isinstance(self.prediction, Noise) else signal * eps - noise * clean


class ExactCovariance(nn.Module):
    """The exact reverse kernel's covariance for such data: U diag(s_t^2) U'."""

    def __init__(self, schedule: Any, covariance: Tensor) -> None:
        super().__init__()
        self.schedule, self.covariance = schedule, covariance

    def forward(self, mean: Tensor, y_t: Tensor, t: Tensor, step: Transition) -> Any:
        values, vectors = torch.linalg.eigh(self.covariance)
        s = levels(self.schedule, values)["s"][t - 1]
        root = vectors * s.clamp(min=1e-300).sqrt().unsqueeze(-2) @ vectors.T
        tril = torch.linalg.cholesky(root @ root)
        return dist.MultivariateNormal(mean, scale_tril=tril)


def levels(schedule: Any, v: Tensor) -> dict[str, Tensor]:
    """abar_t, and by step (rows) and direction (columns) v_t and s_t^2 = beta_t v_{t-1} / v_t."""
    abar = torch.sigmoid(-schedule.gamma(torch.arange(1, schedule.steps + 1))).double()
    before = torch.cat([torch.ones(1).double(), abar[:-1]])
    beta = 1 - abar / before
    now, then = (a[:, None] * v + 1 - a[:, None] for a in (abar, before))
    small = beta * (1 - before) / (1 - abar)
    if schedule.steps > 1:
        small[0] = small[1]
    return {"abar": abar, "beta": beta, "small": small, "v": now, "s": beta[:, None] * then / now}


def exact_terms(schedule: Any, mu: Tensor, v: Tensor, variances: Tensor | None) -> Tensor:
    """[L_T, L_0, L_1, ..., L_{T-1}]: the terms of -ELBO, summed over directions.

    `variances` are those of the reverse kernel for t = 2, ..., T; None for the optimal ones. The
    decoder, at t = 1, has the optimal variance.
    """
    found = levels(schedule, v)
    prior = 0.5 * (found["v"][-1] + found["abar"][-1] * mu**2 - 1 - (1 - found["abar"][-1]).log())
    decoder = 0.5 * (2 * math.pi * math.e * found["s"][0]).log()
    before = torch.cat([torch.ones(1).double(), found["abar"][:-1]])
    tilde = (found["beta"] * (1 - before) / (1 - found["abar"]))[1:, None]
    s = found["s"][1:]
    sigma = s if variances is None else variances[1:, None]
    terms = 0.5 * ((s / tilde).log() + (sigma / s).log() + s / sigma - 1)
    return torch.cat([torch.stack([prior.sum(), decoder.sum()]), terms.sum(1)])


def points(covariance: Tensor, mean: Tensor) -> Tensor:
    """2 D points with this mean and covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    directions = (vectors * (len(mean) * values).sqrt()).T
    return mean + torch.cat([directions, -directions])


def terms(model: DDPM, guide: Program, x: Tensor, chosen: int) -> tuple[float, float]:
    """(L_T, L_{t-1}) at a chosen t, exactly: by the loss at points that have the right moments."""
    diffusion, dim = model.diffusion, x.shape[1]
    noise = points(torch.eye(dim), torch.zeros(dim))
    x_0 = x.repeat_interleave(len(noise), 0)
    eps = noise.repeat(len(x), 1)
    t = torch.full((1, len(x_0)), chosen)
    q = diffusion.noised(diffusion.encode(x_0), t)
    y_t = q.mean + eps * q.stddev
    loss = with_terms(TraceMeanField_ELBO())
    total = loss.loss(model, FixedSites({"t": t, "x_t": y_t})(guide), x_0) / len(x_0)
    name = f"x_{diffusion.steps}"
    last = torch.tensor(diffusion.steps)
    kl = torch.distributions.kl_divergence(
        diffusion.noised(diffusion.encode(x_0), last), diffusion.prior(x_0).expand([len(x_0)])
    )
    assert name in poutine.trace(guide).get_trace(x_0).nodes
    prior = float(kl.mean())
    return prior, (total - prior) * share(chosen, diffusion.steps)


def share(t: int, steps: int) -> float:
    """The probability that the program draws a step."""
    first = max(1 / steps, 1 / 8)
    return first if t == 1 else (1 - first) / (steps - 1)


KERNELS = {"exact": None, "small": "small", "large": "beta"}


@pytest.mark.parametrize("steps", [1, 2, 8, 100, 1_000])
@pytest.mark.parametrize("schedule", [LinearSchedule, CosineSchedule])
@pytest.mark.parametrize("variance", KERNELS)
def test_every_term_has_its_closed_form(schedule: Any, steps: int, variance: str) -> None:
    mean, covariance = torch.tensor([MEAN]), torch.tensor([[VARIANCE]])
    diffusion = Diffusion((1,), schedule(steps))
    found = levels(diffusion.schedule, torch.tensor([VARIANCE]))
    kernel = {
        "exact": ExactCovariance(diffusion.schedule, covariance),
        "small": SmallVariance(),
        "large": LargeVariance(),
    }[variance]
    sigma = None if KERNELS[variance] is None else found[KERNELS[variance]]
    model = DDPM(
        diffusion,
        Exact(diffusion, mean, covariance, Noise()),
        kernel=kernel,
        likelihood=Gaussian(float(found["s"][0].sqrt())),
    )
    expected = exact_terms(diffusion.schedule, mean, torch.tensor([VARIANCE]), sigma)
    x = points(covariance, mean)
    for t in sorted({1, min(2, steps), (steps + 1) // 2, steps}):
        prior, term = terms(model, ForwardProcess(diffusion), x, t)
        assert prior == pytest.approx(float(expected[0]), abs=1e-8)
        assert term == pytest.approx(float(expected[t]), abs=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 8, 100])
def test_every_term_of_correlated_data(steps: int) -> None:
    """Eight dimensions; the full-covariance kernel closes what an isotropic one leaves."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    covariance = root @ root.T / 8 + 0.05 * torch.eye(8)
    mean = torch.linspace(-1, 1, 8)
    values, vectors = torch.linalg.eigh(covariance)
    diffusion = Diffusion((8,), CosineSchedule(steps))
    found = levels(diffusion.schedule, values)
    exact = exact_terms(diffusion.schedule, vectors.T @ mean, values, None)
    isotropic = exact_terms(diffusion.schedule, vectors.T @ mean, values, found["small"])

    class Decoder(nn.Module):
        outputs = 1

        def forward(self, raw: Tensor, event_dim: int) -> Any:
            tril = torch.linalg.cholesky(vectors * found["s"][0] @ vectors.T)
            return dist.MultivariateNormal(raw.squeeze(-2), scale_tril=tril)

    net = Exact(diffusion, mean, covariance, Noise())
    for kernel, expected in (
        (ExactCovariance(diffusion.schedule, covariance), exact),
        (SmallVariance(), isotropic),
    ):
        model = DDPM(diffusion, net, kernel=kernel, likelihood=Decoder())
        for t in sorted({1, min(2, steps), (steps + 1) // 2, steps}):
            prior, term = terms(model, ForwardProcess(diffusion), points(covariance, mean), t)
            assert prior == pytest.approx(float(expected[0]), abs=1e-8)
            assert term == pytest.approx(float(expected[t]), abs=1e-8)
    # log p(x) of the model's own marginal: the exact kernels leave the prior's mismatch alone
    last = exact[0] - 0.5 * float((2 * math.pi * math.e * values).log().sum())
    entropy = 0.5 * float((2 * math.pi * math.e * values).log().sum())
    v_T, abar = found["v"][-1], found["abar"][-1]
    mismatch = 0.5 * (v_T + abar * (vectors.T @ mean) ** 2 - 1 - v_T.log()).sum()
    assert float(exact.sum()) == pytest.approx(entropy + float(mismatch), abs=1e-8)
    assert torch.isfinite(last) and (steps == 1 or float(isotropic.sum() - exact.sum()) > 0.05)


@pytest.mark.parametrize("prediction", [Noise, Clean, Velocity])
@pytest.mark.parametrize("schedule", [LinearSchedule, CosineSchedule, LearnedSchedule])
def test_predictions_are_one_function_in_three_ways(prediction: Any, schedule: Any) -> None:
    diffusion = Diffusion((2,), schedule(20).double())
    mean, covariance = torch.tensor([0.3, -1.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    ways = [
        DDPM(diffusion, Exact(diffusion, mean, covariance, way), prediction=way)
        for way in (prediction(), Clean())
    ]
    y = torch.randn(6, 2)
    for t in (1, 2, 11, 20):
        one, other = (way.before(y, torch.tensor(t)) for way in ways)
        torch.testing.assert_close(one.mean, other.mean, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(one.stddev, other.stddev)


# The programs against one another


def trio(draws: int = 2) -> tuple[DDPM, Tensor]:
    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            weight = 0.3 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
            self.weight = nn.Parameter(weight)

        def forward(self, y_t: Tensor, t: Tensor) -> Tensor:
            return y_t @ self.weight + 0.05 * t[:, None]

    generator = torch.Generator().manual_seed(4)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    diffusion = Diffusion((3,), CosineSchedule(8), draws=draws)
    return DDPM(diffusion, Linears(), likelihood=Gaussian(0.7)), x


def gradients(loss: Any, model: Any, guide: Any, x: Tensor, num: int) -> Tensor:
    """Losses and gradients of `num` runs over 50 copies of the data, (num, 1 + 9)."""
    ddpm = model.ddpm if isinstance(model, DDPMChain) else model
    copies = x.repeat(50, 1)
    found = []
    for _ in range(num):
        ddpm.net.weight.grad = None
        value = with_terms(loss).loss_and_grads(model, guide, copies)
        found.append(torch.cat([torch.tensor([value]), ddpm.net.weight.grad.flatten()]))
    return torch.stack(found) / len(copies)


def assert_same_mean(first: Tensor, second: Tensor, width: float = 4.5) -> None:
    """Means over runs, within standard errors; ten numbers at once."""
    error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    assert ((first.mean(0) - second.mean(0)).abs() < width * error).all()


def test_three_programs_have_one_bound_and_one_gradient() -> None:
    torch.manual_seed(0)
    model, x = trio()
    diffusion = model.diffusion
    chain = gradients(TraceMeanField_ELBO(), DDPMChain(model), ReverseOrder(diffusion), x, 40)
    for loss in (TraceMeanField_ELBO(), Trace_ELBO()):
        assert_same_mean(gradients(loss, model, ForwardProcess(diffusion), x, 80), chain)
    for order in (ReverseOrder, ForwardOrder):
        found = gradients(Trace_ELBO(), DDPMChain(model), order(diffusion), x, 40)
        assert_same_mean(found, chain)


@pytest.mark.parametrize("batch_size", [None, 60])
@pytest.mark.parametrize("draws", [1, 3])
def test_fits_are_scaled_to_a_data_point(batch_size: int | None, draws: int) -> None:
    model, x = trio(draws)
    diffusion = model.diffusion
    x = x.repeat(20, 1)
    still = partial(torch.optim.SGD, lr=0.0)
    options = {"loss": TraceMeanField_ELBO(), "optim": still, "progress": False}
    chain = fit(DDPMChain(model), ReverseOrder(diffusion), x, steps=30, **options)
    found = fit(model, ForwardProcess(diffusion), x, steps=80, batch_size=batch_size, **options)
    assert_same_mean(found.losses[:, None], chain.losses[:, None], width=4)
    assert_same_mean(found.reconstruction[:, None], chain.reconstruction[:, None], width=4)
    assert found.local and found.amortized


def test_the_forward_order_under_closed_form_kls_is_an_error() -> None:
    model, x = trio()
    with pytest.raises(ValueError, match="use Trace_ELBO, which needs no order"):
        fit(DDPMChain(model), ForwardOrder(model.diffusion), x, loss=TraceMeanField_ELBO(), steps=1)


def test_the_bound_of_the_chain_is_a_posterior_like_any() -> None:
    """k-hat and evidence of trajectories, and their export."""
    mean, covariance = torch.tensor([MEAN]), torch.tensor([[VARIANCE]])
    diffusion = Diffusion((1,), CosineSchedule(4))
    found = levels(diffusion.schedule, torch.tensor([VARIANCE]))
    model = DDPM(
        diffusion,
        Exact(diffusion, mean, covariance, Noise()),
        kernel=ExactCovariance(diffusion.schedule, covariance),
        likelihood=Gaussian(float(found["s"][0].sqrt())),
    )
    chain = DDPMChain(model)
    x = MEAN + VARIANCE**0.5 * torch.randn(50, 1)
    posterior = Scorer(chain, ReverseOrder(diffusion), x).posterior(2_000)
    assert posterior.draws.keys() == {"x_4", "x_3", "x_2", "x_1"}
    assert posterior.log_p.shape == (2_000, 50)
    marginal = dist.Normal(MEAN, VARIANCE**0.5).log_prob(x[:, 0])
    evidence = posterior.evidence()
    assert (abs(evidence.value - marginal.numpy()) < 5 * evidence.se + 0.01).all()
    assert posterior.to_datatree(local=True)["posterior"]["x_1"].shape == (1, 2_000, 50, 1)


# Training


@pytest.mark.parametrize("steps", [4, 50])
def test_a_linear_denoiser_reaches_the_optimal_bound(steps: int) -> None:
    """Within 0.01 nats a dimension of the closed form, in two correlated dimensions."""

    class PerStep(nn.Module):
        """y_t -> A_t y_t + b_t."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(steps, 2, 2))
            self.bias = nn.Parameter(torch.zeros(steps, 2))

        def forward(self, y_t: Tensor, t: Tensor) -> Tensor:
            return (y_t.unsqueeze(-2) @ self.weight[t - 1]).squeeze(-2) + self.bias[t - 1]

    covariance, mean = torch.tensor([[1.0, 0.8], [0.8, 1.0]]), torch.tensor([0.5, -0.5])
    x = points(covariance, mean).repeat(32, 1)
    diffusion = Diffusion((2,), CosineSchedule(steps), draws=min(steps, 8))
    values, vectors = torch.linalg.eigh(covariance)
    found = levels(diffusion.schedule, values)
    best = exact_terms(diffusion.schedule, vectors.T @ mean, values, found["small"])
    # the isotropic decoder's best variance is the mean of the two
    s_1 = found["s"][0]
    best[1] = 0.5 * 2 * math.log(2 * math.pi * math.e * float(s_1.mean()))
    fitted = fit(
        DDPM(diffusion, PerStep()),
        ForwardProcess(diffusion),
        x,
        loss=TraceMeanField_ELBO(),
        optim=partial(torch.optim.Adam, lr=0.05),
        schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=600),
        steps=600,
        progress=False,
    )
    guide = ForwardProcess(diffusion)
    found = [terms(fitted.model, guide, points(covariance, mean), t) for t in range(1, steps + 1)]
    reached = found[0][0] + sum(term for _, term in found)
    assert -1e-6 < reached - float(best.sum()) < 0.02


# Sampling


def gaussian(steps: int = 50) -> DDPM:
    """The exact chain of one-dimensional Gaussian data."""
    mean, covariance = torch.tensor([MEAN]), torch.tensor([[VARIANCE]])
    diffusion = Diffusion((1,), CosineSchedule(steps))
    found = levels(diffusion.schedule, torch.tensor([VARIANCE]))
    return DDPM(
        diffusion,
        Exact(diffusion, mean, covariance, Noise()),
        kernel=ExactCovariance(diffusion.schedule, covariance),
        likelihood=Gaussian(float(found["s"][0].sqrt())),
    )


def assert_moments(x: Tensor, mean: float, variance: float) -> None:
    num = x.numel()
    assert float(x.mean()) == pytest.approx(mean, abs=4.5 * math.sqrt(variance / num))
    assert float(x.var()) == pytest.approx(variance, abs=4.5 * variance * math.sqrt(2 / num))


def propagated(model: DDPM, steps: int, eta: float) -> float:
    """The variance that DDIM's steps give, by their own linear recursion from that of y_T."""
    schedule, v = model.diffusion.schedule, VARIANCE
    times = torch.linspace(1, schedule.steps, steps).round().long().flip(0)
    total = 1.0
    for t, s in pairwise(times):
        (a, b), (a_s, b_s) = ([float(x) for x in schedule.levels(i)] for i in (t, s))
        slope = a * v / (a**2 * v + b**2)  # of the estimate of y_0 in y_t
        fresh = eta**2 * b_s**2 * (1 - (a * b_s / (a_s * b)) ** 2)
        gain = a_s * slope + math.sqrt(b_s**2 - fresh) * (1 - a * slope) / b
        total = gain**2 * total + fresh
    a, b = (float(x) for x in schedule.levels(times[-1]))
    slope = a * v / (a**2 * v + b**2)
    return slope**2 * total + v * b**2 / (a**2 * v + b**2)


def test_the_sampler_draws_what_the_chain_program_draws() -> None:
    torch.manual_seed(0)
    model = gaussian(10)
    fast = model.sample(20_000, expected=False)
    chain = Predictive(poutine.uncondition(DDPMChain(model)), num_samples=1)
    slow = chain(torch.zeros(20_000, 1))["x_0"]
    for x in (fast, slow):
        assert_moments(x, MEAN, VARIANCE)  # p(y_T) misses q(y_T) by 1e-4 of its variance


@pytest.mark.parametrize(("steps", "eta"), [(50, 0.0), (50, 1.0), (10, 0.0), (10, 0.5), (5, None)])
def test_strided_samplers_have_the_variance_of_their_recursion(
    steps: int, eta: float | None
) -> None:
    torch.manual_seed(1)
    model = gaussian()
    x = model.sample(20_000, steps=steps, eta=eta, expected=False)
    expected = propagated(model, steps, 1.0 if eta is None else eta)
    assert float(x.var()) == pytest.approx(expected, rel=4.5 * math.sqrt(2 / 20_000))


def test_without_fresh_noise_the_sampler_is_a_map_of_the_first_draw() -> None:
    model = gaussian()
    torch.manual_seed(2)
    first = model.sample(5, eta=0.0)
    torch.manual_seed(2)
    again = model.sample(5, eta=0.0, progress=True)
    assert torch.equal(first, again) and first.shape == (5, 1)


@pytest.mark.parametrize("steps", [None, 8, 13])
@pytest.mark.parametrize("frames", [2, 5, 9])
def test_trajectories_end_with_the_sample(steps: int | None, frames: int) -> None:
    model = gaussian(20)
    torch.manual_seed(3)
    sample = model.sample(4, steps=steps)
    torch.manual_seed(3)
    shown = model.trajectory(4, frames, steps=steps)
    assert shown.shape == (frames, 4, 1)
    assert torch.equal(shown[-1], sample)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "expected num to be at least 1"),
        ({"num": 3, "steps": 0}, "expected steps to be at least 1"),
        ({"num": 3, "steps": 21}, "expected at most 20 steps, got 21"),
        ({"num": 3, "eta": 1.5}, "expected an eta from 0 to 1, got 1.5"),
    ],
)
def test_impossible_samples(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian(20).sample(**options)
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        gaussian(20).trajectory(3, 1)
    assert gaussian(20).trajectory(3, 9, steps=3).shape == (4, 3, 1)  # all that there are
    for steps in (1, 2):
        assert gaussian(20).sample(3, steps=steps).shape == (3, 1)


def test_a_fitted_model_samples_and_its_program_reconstructs_nothing() -> None:
    model, x = trio()
    fitted = fit(model, ForwardProcess(model.diffusion), x, steps=2, progress=False)
    assert fitted.model.sample(5).shape == fitted.generate(5)["x_0"].shape == (5, 3)
    with pytest.raises(ValueError, match="scaled by the program"):
        fitted.reconstruct(x)


@pytest.mark.parametrize("draws", [2, 4])
def test_some_of_the_steps_are_no_posterior(draws: int) -> None:
    """With as many draws as steps nothing is scaled, and the steps are drawn still."""
    diffusion = Diffusion((3,), CosineSchedule(4), draws=draws)
    model, x = trio()
    model = DDPM(diffusion, model.net, likelihood=Gaussian(0.7))
    guide = ForwardProcess(diffusion)
    fitted = fit(model, guide, x, steps=1, progress=False)
    for call in (
        partial(fitted.posterior, x),
        partial(fitted.log_predictive_density, x),
        partial(fitted.predict, x),
        partial(fitted.reconstruct, x),
    ):
        with pytest.raises(ValueError, match="scaled by the program"):
            call()
    with pytest.raises(ValueError, match=r"bound of some|of scaled sites bounds nothing"):
        fit(model, guide, x, loss=RenyiELBO(), steps=1, progress=False)


def test_a_fitted_model_has_a_posterior_over_trajectories() -> None:
    model, x = trio()
    trained = fit(model, ForwardProcess(model.diffusion), x, steps=2, progress=False).model
    chain, guide = DDPMChain(trained), ReverseOrder(trained.diffusion)
    bound = fit(chain, guide, x, steps=0, progress=False)
    assert bound.losses.shape == (0,) and bound.parameters == 0 and "nan" in repr(bound)
    posterior = bound.posterior(x, 200)
    assert list(posterior.draws) == [f"x_{t}" for t in range(model.diffusion.steps, 0, -1)]
    exact = step_bound(trained, ForwardProcess(trained.diffusion), x, draws=200)
    found, error = posterior.elbo(), math.hypot(exact.elbo.se, float(posterior.elbo().se.mean()))
    assert float(found.value.mean()) == pytest.approx(float(exact.elbo.value), abs=5 * error)


def test_kernels_off_centre_take_all_steps() -> None:
    diffusion = Diffusion((2,), CosineSchedule(4))
    model = DDPM(diffusion, nn.Identity(), kernel=LearnedVariance(Flow(2, 8), 4))
    model.net = Zero()
    assert model.sample(3).shape == (3, 2)
    for options in ({"steps": 2}, {"eta": 0.0}):
        with pytest.raises(ValueError, match="that of a flow is not: sample all steps"):
            model.sample(3, **options)
    centred = DDPM(diffusion, Zero(), kernel=LearnedVariance(FullCovariance(2, 8), 4))
    assert centred.sample(3, steps=2).shape == (3, 2)


class Zero(nn.Module):
    def forward(self, y_t: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(y_t)


# Bad input


@pytest.mark.parametrize("shape", [(3,), (12, 2), (12, 3, 1)])
def test_networks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    class Net(nn.Module):
        def forward(self, y_t: Tensor, t: Tensor) -> Tensor:
            return torch.zeros(shape)

    diffusion = Diffusion((3,), CosineSchedule(4))
    with pytest.raises(ValueError, match=r"output has its input's shape, \(12, 3\), got"):
        DDPM(diffusion, Net())(torch.randn(12, 3))


def test_programs_of_other_kinds_are_refused() -> None:
    diffusion = Diffusion((3,), CosineSchedule(4))
    with pytest.raises(TypeError, match="expected a Diffusion, got"):
        DDPM(CosineSchedule(4), nn.Identity())  # type: ignore[arg-type]
    for likelihood in (DiscretizedLogistic(16), Bernoulli()):
        with pytest.raises(TypeError, match="expected a likelihood with one output, the mean"):
            DDPM(diffusion, nn.Identity(), likelihood=likelihood)
    with pytest.raises(ValueError, match=r"expected a network of 4 steps.*got one of 1000"):
        DDPM(diffusion, MLPDenoiser((3,), 1_000))
    with pytest.raises(ValueError, match=r"expected a kernel of 4 steps.*got one of 5"):
        DDPM(diffusion, nn.Identity(), kernel=LearnedVariance(FullCovariance(3, 8), 5))


def test_data_outside_the_grid_of_the_decoder_are_refused() -> None:
    diffusion = Diffusion((3,), CosineSchedule(4), coordinates=Affine(0.5, 0.5))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, y_t: Tensor, t: Tensor) -> Tensor:
            return self.scale * y_t

    model = DDPM(diffusion, Net(), likelihood=LearnedDiscretizedLogistic(256))
    for x in (2 * torch.rand(12, 3), -torch.ones(12, 3)):
        with pytest.raises(ValueError, match=r"x_0.*expected values in the support"):
            fit(model, ForwardProcess(diffusion), x, steps=1, progress=False)


def test_a_fitted_model_with_a_learned_schedule_needs_its_own_guide() -> None:
    """The raw guide has the untrained schedule: a bound of two processes is none."""
    model, x = trio()
    diffusion = Diffusion((3,), LearnedSchedule(8).double())
    learned = DDPM(diffusion, model.net, likelihood=Gaussian(0.7))
    guide = ForwardProcess(diffusion)
    adam = partial(torch.optim.Adam, lr=0.1)
    fitted = fit(learned, guide, x, optim=adam, steps=5, progress=False)
    with_terms(TraceMeanField_ELBO()).loss(fitted.model, fitted.guide, x)
    with pytest.raises(ValueError, match="another forward process than the model"):
        with_terms(TraceMeanField_ELBO()).loss(fitted.model, guide, x)


class Buffered(Schedule):
    """Signal levels in a buffer, which may be replaced."""

    def __init__(self, levels: list[float]) -> None:
        super().__init__(len(levels))
        self.register_buffer("levels_", torch.tensor(levels))

    def gamma(self, t: Tensor) -> Tensor:
        level = self.levels_[t.long() - 1]
        return (1 - level).log() - level.log()


def test_a_schedule_that_changes_is_not_remembered(tmp_path: Path) -> None:
    def programs(levels: list[float]) -> tuple[DDPM, ForwardProcess]:
        diffusion = Diffusion((3,), Buffered(levels))
        return DDPM(diffusion, Exact3(), likelihood=Gaussian(0.7)), ForwardProcess(diffusion)

    class Exact3(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            return self.weight * y

    x = torch.randn(6, 3)
    model, guide = programs([0.9, 0.5, 0.1])
    fitted = fit(model, guide, x, steps=1, progress=False)
    fitted.save(tmp_path / "fit.pt")
    loaded = Fit.load(tmp_path / "fit.pt", *programs([0.99, 0.6, 0.3]))
    bounds = [step_bound(one.model, one.guide, x).elbo.value for one in (fitted, loaded)]
    assert bounds[0] == bounds[1]
    diffusion = Diffusion((3,), CosineSchedule(3))
    t = torch.tensor([1, 2, 3])
    before = diffusion.transition(t, torch.float64).signal
    diffusion.schedule = LinearSchedule(3)
    after = diffusion.transition(t, torch.float64).signal.squeeze(-1)
    torch.testing.assert_close(after, diffusion.schedule.levels(t)[0])
    assert not torch.equal(before.squeeze(-1), after)
    assert diffusion.transition(torch.tensor(0), torch.float64).signal.isnan()  # there is no step 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"net": None}, "expected a network that is a module"),
        ({"net": lambda x, t: x}, "expected a network that is a module"),
        ({"prediction": "noise"}, "expected a prediction that is a module, such as Velocity"),
        ({"prediction": Noise}, "expected a prediction that is a module"),
        ({"kernel": SmallVariance}, "expected a kernel that is a module"),
        ({"kernel": FullCovariance(3, 8)}, "expected a kernel, such as LearnedVariance"),
        ({"likelihood": LearnedGaussian}, "expected a likelihood with one output"),
    ],
)
def test_parts_of_another_kind_are_refused(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DDPM(
            Diffusion((3,), CosineSchedule(4)),
            **{"net": MLPDenoiser((3,), 4, hidden=(8,)), **parts},
        )


def test_data_of_another_dtype_are_refused() -> None:
    model = DDPM(Diffusion((3,), CosineSchedule(4)), MLPDenoiser((3,), 4, hidden=(8,)).float())
    message = r"the network's dtype, torch.float32, got torch.float64: convert the data \(.float"
    with pytest.raises(TypeError, match=message):
        fit(model, ForwardProcess(model.diffusion), torch.zeros(5, 3), steps=1, progress=False)


def test_swapped_programs_are_told() -> None:
    model, x = trio()
    with pytest.raises(ValueError, match=r"the guide observes \['x_0'\]: are they swapped\?"):
        fit(ForwardProcess(model.diffusion), model, x, steps=1, progress=False)


@pytest.mark.parametrize(
    "other",
    [
        {"diffusion": Diffusion((3,), LinearSchedule(4))},
        {"diffusion": Diffusion((3,), CosineSchedule(4), coordinates=Affine(1.0, 3.0))},
        {"prediction": Velocity()},
        {"kernel": LargeVariance()},
        {"likelihood": Gaussian(1.7)},
    ],
    ids=lambda parts: next(iter(parts)),
)
def test_a_file_is_not_read_for_other_programs(other: dict[str, Any], tmp_path: Path) -> None:
    """Of the same parameters, so that only what they make of them tells."""

    def programs(**parts: Any) -> tuple[DDPM, ForwardProcess]:
        parts = {
            "diffusion": Diffusion((3,), CosineSchedule(4)),
            "likelihood": Gaussian(0.7),
            **parts,
        }
        diffusion = parts.pop("diffusion")
        net = MLPDenoiser((3,), 4, hidden=(8,))
        return DDPM(diffusion, net, **parts), ForwardProcess(diffusion)

    x = torch.randn(6, 3)
    fit(*programs(), x, steps=1, progress=False).save(tmp_path / "fit.pt")
    assert Fit.load(tmp_path / "fit.pt", *programs()).generate(2)["x_0"].shape == (2, 3)
    with pytest.raises(ValueError, match=r"was made for other programs: site .* has log"):
        Fit.load(tmp_path / "fit.pt", *programs(**other))
