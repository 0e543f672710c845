"""Noise on a program's input: its sites, the bounds that it gives, and where it is not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from example_programs import LinearPair
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_vi import Fit, compare, fit
from pyro_vi.augmentation import InputNoise, UniformSteps
from pyro_vi.diffusion import CosineSchedule, GivenSchedule, LearnedSchedule, LinearSchedule
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.guides import Encoder, PairEncoder
from pyro_vi.inference import with_terms
from pyro_vi.models import (
    VAE,
    DiscretizedLogistic,
    Gaussian,
    LearnedGaussian,
    LinearGaussian,
    PixelGaussian,
    PredictiveVAE,
)

STILL = partial(torch.optim.SGD, lr=0.0)
MANY = 400  # particles in one evaluation


def drawn(program: Callable[..., Any], *data: Tensor) -> Trace:
    return poutine.trace(program).get_trace(*data)


def many(elbo: type[Trace_ELBO]) -> ELBO:
    return with_terms(elbo(num_particles=MANY, vectorize_particles=True, max_plate_nesting=2))


def mean_and_error(loss: ELBO, model: Any, guide: Any, *data: Tensor) -> tuple[float, float]:
    """The bound, and its Monte Carlo error."""
    bounds = [-loss.loss(model, guide, *data) for _ in range(20)]
    return float(np.mean(bounds)), float(np.std(bounds, ddof=1) / 20**0.5)


def given(noise: InputNoise, x: Tensor, **values: Tensor) -> Tensor:
    """The input at given values of the sites."""

    def program() -> Tensor:
        with pyro.plate("data", len(x)):
            return noise(x)

    return poutine.condition(program, data=values)()


# -------------------------------------------------------------------------------------- the input


@pytest.mark.parametrize(
    "schedule", [CosineSchedule(50), LinearSchedule(50), LearnedSchedule(50)], ids=lambda s: str(s)
)
@pytest.mark.parametrize("add_back", [False, True])
def test_input_is_the_formula(schedule: Any, add_back: bool) -> None:
    noise = InputNoise(schedule, 30, add_back=add_back)
    x, eps = torch.randn(4, 2, 3).double(), torch.randn(4, 2, 3).double()
    t = torch.tensor([0, 1, 17, 30])
    found = given(noise, x, t=t, eps=eps)
    level = torch.sigmoid(-schedule.gamma(t[1:])).double().reshape(-1, 1, 1)  # abar
    expected = level.sqrt() * x[1:] + (1 - level).sqrt() * eps[1:]
    back = x if add_back else torch.zeros_like(x)
    torch.testing.assert_close(found[1:], expected + back[1:], rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0], x[0] + back[0])  # no noise, to the last digit
    assert torch.equal(noise.eval().clean(x), x + back)


def test_levels_are_uniform_and_belong_to_data_points() -> None:
    trace = drawn(
        Encoder((3,), MeanField(2, 8), noise=InputNoise(CosineSchedule(9), 4)),
        torch.randn(50_000, 3),
    )
    t = trace.nodes["t"]["value"]
    assert t.shape == (50_000,) and t.dtype == torch.int64
    assert (t.bincount(minlength=5) / 50_000 - 0.2).abs().max() < 0.01
    assert [frame.name for frame in trace.nodes["t"]["cond_indep_stack"]] == ["data"]
    assert trace.nodes["eps"]["value"].shape == (50_000, 3)


def test_distribution_of_the_levels() -> None:
    steps = UniformSteps(4).expand([3, 2])
    assert steps.sample((5,)).shape == (5, 3, 2) and steps.has_rsample
    torch.testing.assert_close(steps.log_prob(torch.zeros(3, 2)), torch.full((3, 2), 0.2).log())
    with pytest.raises(ValueError, match="within the support"):
        UniformSteps(4, validate_args=True).log_prob(torch.tensor(5))


def test_sites_are_alike_and_count_nothing() -> None:
    pair = LinearPair(InputNoise(CosineSchedule(20), 8), InputNoise(CosineSchedule(20), 5))
    guide = drawn(pair.guide, pair.x, pair.y)
    model = drawn(poutine.replay(pair.model, trace=guide), pair.x, pair.y)
    for trace in (guide, model):
        trace.compute_log_prob()
    names = ["t", "eps", "t_y", "eps_y"]
    assert [name for name in guide.stochastic_nodes if name != "data"] == [*names, "z"]
    assert [name for name in model.stochastic_nodes if name != "data"] == [*names, "z"]
    for name in names:
        q, p = guide.nodes[name], model.nodes[name]
        assert torch.equal(q["value"], p["value"])
        assert torch.equal(q["fn"].log_prob(q["value"]), p["fn"].log_prob(p["value"]))
        assert float(q["log_prob_sum"]) == float(p["log_prob_sum"]) == 0.0


# ----------------------------------------------------------------------------------- no noise


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_nothing_changes_without_levels(elbo: type[Trace_ELBO]) -> None:
    """To the last bit: nothing is drawn."""
    noise = InputNoise(CosineSchedule(20), 0)
    one, other = LinearPair(), LinearPair(noise, InputNoise(CosineSchedule(20), 0))
    losses = []
    for pair in (one, other):
        torch.manual_seed(5)
        losses.append([elbo().loss(pair.model, pair.guide, pair.x, pair.y) for _ in range(3)])
        losses[-1].append(float(torch.rand(())))
    assert losses[0] == losses[1] and noise(one.x) is one.x
    assert InputNoise(CosineSchedule(20), 0, add_back=True)(one.x) is one.x
    x, family = torch.rand(6, 1, 4, 4).round(), MeanField(2, 8)
    model, plain = VAE((1, 4, 4), 2), Encoder((1, 4, 4), family)
    noisy = Encoder((1, 4, 4), family, noise=noise)
    noisy.network = plain.network
    found = []
    for guide in (plain, noisy):
        torch.manual_seed(5)
        found.append(elbo().loss(model, guide, x))
    assert found[0] == found[1]


@pytest.mark.parametrize("add_back", [False, True])
def test_there_is_none_after_training(add_back: bool) -> None:
    pair = LinearPair(InputNoise(CosineSchedule(20), 10, add_back=add_back))
    fitted = fit(pair.model, pair.guide, (pair.x, pair.y), steps=2, optim=STILL, progress=False)
    at = pair.x * (1 + add_back)
    exact = pair.predictive(at).log_prob(pair.y).numpy()
    posterior = fitted.posterior((pair.x, pair.y), 25)
    assert list(posterior.draws) == ["z"]
    np.testing.assert_allclose(posterior.elbo().value, exact, atol=1e-9)
    assert (posterior.elbo().se < 1e-9).all()
    found = fitted.log_predictive_density((pair.x, pair.y), 10)
    np.testing.assert_allclose(found.value, exact, atol=1e-9)
    draws = fitted.model.predict(pair.x, 5_000, expected=True)
    torch.testing.assert_close(draws.mean(0), pair.predictive(at).mean, atol=0.2, rtol=0)
    q = fitted.guide.encode(pair.x, pair.y)
    torch.testing.assert_close(q.mean, LinearPair().guide.encode(at, pair.y).mean)
    assert list(fitted.generate(3)) == ["z", "y"]
    # ... unless it is asked for
    schedule = CosineSchedule(20)
    signal, sd = schedule.levels(torch.tensor(10))
    noisy = fitted.model.predict(pair.x, 20_000, expected=True, t=10)
    mean = pair.predictive((signal + add_back) * pair.x).mean
    torch.testing.assert_close(noisy.mean(0), mean, atol=0.15, rtol=0)
    spread = pair.w @ pair.tril
    expected = spread @ spread.T + sd**2 * pair.slope @ pair.slope.T
    torch.testing.assert_close(noisy.var(0).mean(0), expected.diagonal(), rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------------- the two bounds


@pytest.mark.parametrize("add_back", [False, True])
def test_predictor_bounds_the_density_given_the_noisy_input(add_back: bool) -> None:
    """The exact guide leaves no gap at any draw of the noise; their average in closed form."""
    schedule, last = CosineSchedule(20), 8
    noise = InputNoise(schedule, last, add_back=add_back)
    pair = LinearPair(noise)
    for _ in range(3):
        guide = drawn(pair.guide, pair.x, pair.y)
        x_t = noise.noisy(pair.x, guide.nodes["t"]["value"], guide.nodes["eps"]["value"])
        model = drawn(poutine.replay(pair.model, trace=guide), pair.x, pair.y)
        bound = model.log_prob_sum() - guide.log_prob_sum()
        expected = pair.predictive(x_t).log_prob(pair.y).sum()
        torch.testing.assert_close(bound, expected, rtol=1e-10, atol=1e-10)

    # E log N(y; B (g x + n eps) + b, S) = log N(y; B g x + b, S) - n^2 tr(S^-1 B B') / 2
    exact = 0.0
    trace = (pair.predictive(pair.x).precision_matrix[0] @ pair.slope @ pair.slope.T).trace()
    for t in range(last + 1):
        signal, sd = (float(a) for a in schedule.levels(torch.tensor(t))) if t else (1.0, 0.0)
        log_p = pair.predictive((signal + add_back) * pair.x).log_prob(pair.y)
        exact += float((log_p - sd**2 * trace / 2).sum()) / (last + 1)
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        bound, error = mean_and_error(many(elbo), pair.model, pair.guide, pair.x, pair.y)
        assert abs(bound - exact) < 4.5 * error < 3
    assert abs(exact - float(pair.predictive(pair.x).log_prob(pair.y).sum())) > 1


def test_noisy_targets_bound_the_density_of_the_noisy_target() -> None:
    noise = InputNoise(CosineSchedule(20), 8)
    pair = LinearPair(target_noise=noise)
    guide = drawn(pair.guide, pair.x, pair.y)
    y_t = noise.noisy(pair.y, guide.nodes["t_y"]["value"], guide.nodes["eps_y"]["value"])
    model = drawn(poutine.replay(pair.model, trace=guide), pair.x, pair.y)
    assert torch.equal(model.nodes["y"]["value"], y_t)
    expected = pair.predictive(pair.x).log_prob(y_t).sum()
    torch.testing.assert_close(model.log_prob_sum() - guide.log_prob_sum(), expected)


@pytest.mark.parametrize("add_back", [False, True])
def test_noisy_encoder_bounds_the_evidence(add_back: bool) -> None:
    """log p(x) minus the mean KL from q(z | x_t) to the posterior, which is known."""
    torch.manual_seed(4)
    model = LinearGaussian(torch.randn(3, 2).double(), torch.randn(3).double(), scale=0.8)
    schedule, last = CosineSchedule(20), 8
    noise = InputNoise(schedule, last, add_back=add_back)
    guide = Encoder(
        (3,), FullCovariance(2, 3), network=lambda *_: nn.Identity(), noise=noise
    ).double()
    x = model.weight.new_zeros(5, 3).normal_()
    exact, gain = model.posterior(x), model.posterior(torch.eye(3).double() + model.bias).mean.T
    head = guide.family.head
    tril = torch.linalg.cholesky(exact.covariance_matrix[0])
    with torch.no_grad():
        head.weight.zero_()
        head.weight[:2] = gain / (1 + add_back)  # of the input at t = 0 it is the exact guide
        raw = torch.log(torch.expm1(tril.diagonal() - 1e-5)) - np.log(np.expm1(1 - 1e-5))
        head.bias.copy_(torch.cat([-gain @ model.bias, raw, tril[1, :1]]))
    evidence = float(model.log_evidence(x).sum())
    clean = Trace_ELBO().loss(model, guide.eval(), x)
    assert clean == pytest.approx(-evidence, abs=1e-9)
    guide.train()
    expected = evidence
    for t in range(1, last + 1):
        signal, sd = schedule.levels(torch.tensor(t))
        share = (signal + add_back) / (1 + add_back) - 1
        moved = (share * x) @ gain.T
        square = (moved @ model.precision * moved).sum() + len(x) * (
            sd / (1 + add_back)
        ).square() * (gain.T @ model.precision @ gain).trace()
        expected -= float(square) / 2 / (last + 1)
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        bound, error = mean_and_error(many(elbo), model, guide, x)
        assert abs(bound - expected) < 4.5 * error < 1
        assert bound + 4.5 * error < evidence


def test_noisy_guides_stand_beside_clean_ones() -> None:
    """A guide alone may have noise, under a model that is trained or frozen."""
    torch.manual_seed(0)
    model = LinearGaussian(torch.randn(3, 2), torch.randn(3), scale=0.8)
    x = torch.randn(40, 3)
    guides = {
        "clean": Encoder((3,), MeanField(2, 8)),
        "noisy": Encoder((3,), MeanField(2, 8), noise=InputNoise(CosineSchedule(20), 8)),
    }
    splits = SimpleNamespace(train=x, test=x[:10])
    options: dict[str, Any] = {"steps": 5, "batch_size": 20, "num_samples": 30, "progress": False}
    result = compare(model, guides, splits, loss=TraceMeanField_ELBO(), **options)
    evidence = float(model.log_evidence(x[:10]).mean())
    assert all(row.elbo < evidence + 0.01 for row in result.rows)
    frozen = fit(VAE((3,), 2, likelihood=Gaussian(1.0)), guides["clean"], x, steps=1).model
    assert fit(frozen, guides["noisy"], x, steps=3, heldout=x, progress=False).losses.shape == (3,)


def test_predictors_with_noise_are_compared() -> None:
    noise = InputNoise(CosineSchedule(20), 8)
    likelihood = Gaussian(0.5)
    model = PredictiveVAE((3,), (4,), MeanField(2, 8), likelihood=likelihood, noise=noise).double()
    guide = PairEncoder((3,), (4,), FullCovariance(2, 8), noise=noise).double()
    x, y = torch.randn(6, 3).double(), torch.randn(6, 4).double()
    other = PairEncoder((3,), (4,), MeanField(2, 8), noise=noise).double()
    splits = SimpleNamespace(train=(x, y), test=(x[:4], y[:4]))
    options: dict[str, Any] = {"steps": 3, "batch_size": 3, "num_samples": 30, "progress": False}
    result = compare(model, {"full": guide, "mean-field": other}, splits, **options)
    assert all(list(one.draws) == ["z"] for one in result.posteriors.values())


# --------------------------------------------------------------------------------- fits and graphs


def test_minibatches_are_scaled_without_bias() -> None:
    pair = LinearPair(InputNoise(CosineSchedule(20), 4))
    options = {"optim": STILL, "progress": False, "steps": 150}
    found = []
    for size in (2, None):
        fitted = fit(pair.model, pair.guide, (pair.x, pair.y), batch_size=size, **options)
        found.append((float(fitted.losses.mean()), float(fitted.losses.std()) / 150**0.5))
    (one, one_se), (other, other_se) = found
    assert abs(one - other) < 4.5 * np.hypot(one_se, other_se) < 2


# -------------------------------------------------------------------------------------- errors


def test_impossible_arguments_are_refused() -> None:
    for t_max in (-1, 21):
        with pytest.raises(ValueError, match=rf"t_max from 0 to the schedule's 20, got {t_max}"):
            InputNoise(CosineSchedule(20), t_max)
    for wrong in (True, 3.0, None):
        with pytest.raises(TypeError, match="expected t_max to be an int"):
            InputNoise(CosineSchedule(20), wrong)  # type: ignore[arg-type]
    for wrong in (1, None, "yes"):
        with pytest.raises(TypeError, match="add_back to be True or False"):
            InputNoise(CosineSchedule(20), 3, add_back=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a Schedule"):
        InputNoise(20, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected noise to be an InputNoise"):
        Encoder((3,), MeanField(2, 8), noise=CosineSchedule(20))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_noise without add_back"):
        LinearPair(target_noise=InputNoise(CosineSchedule(20), 3, add_back=True))
    make = partial(PredictiveVAE, (3,), (4,), MeanField(2, 8))
    for likelihood in (None, DiscretizedLogistic(17)):
        with pytest.raises(ValueError, match="target_noise makes any real numbers of y, and"):
            make(likelihood=likelihood, target_noise=InputNoise(CosineSchedule(20), 3))
        make(likelihood=likelihood, target_noise=InputNoise(CosineSchedule(20), 0))
    for likelihood in (Gaussian(0.1), LearnedGaussian(), PixelGaussian()):
        make(likelihood=likelihood, target_noise=InputNoise(CosineSchedule(20), 3))


def test_noise_on_one_side_alone() -> None:
    """In the guide alone it is another thing: under a model that reads x it must say so."""
    clean, noisy = LinearPair(), LinearPair(InputNoise(CosineSchedule(20), 3))
    options = {"steps": 1, "progress": False}
    words = r"the guide samples .*'eps', 't'.*which the model does.*give the model the same noise="
    with pytest.raises(ValueError, match=words):
        fit(clean.model, noisy.guide, (clean.x, clean.y), **options)
    words = "latent site 't' of the model is missing from the guide.*give the guide the same noise="
    with pytest.raises(ValueError, match=words):
        fit(noisy.model, clean.guide, (clean.x, clean.y), **options)


OTHERS = {
    "more levels": InputNoise(CosineSchedule(100), 60),
    "fewer levels": InputNoise(CosineSchedule(100), 5),
    "another schedule": InputNoise(LinearSchedule(100), 20),
    "another offset": InputNoise(CosineSchedule(100, offset=0.1), 20),
    "added back": InputNoise(CosineSchedule(100), 20, add_back=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_and_its_guide_have_one_noise(name: str) -> None:
    """The guide draws the levels, and would decide what the model is trained for."""
    noise = InputNoise(CosineSchedule(100), 20)
    model, guide = LinearPair(noise).model, LinearPair(OTHERS[name]).guide
    x, y = LinearPair().x, LinearPair().y
    found = r"has InputNoise\(CosineSchedule\(100\), t_max=20\) and the guide InputNoise\("
    for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
        with pytest.raises(ValueError, match=found):
            loss.loss(model, guide, x, y)
    with pytest.raises(ValueError, match=r"site 't': the model has .*give both the same noise"):
        fit(model, guide, (x, y), steps=1, progress=False)
    with pytest.raises(ValueError, match="site 't_y': the model has"):
        model, guide = LinearPair(noise, noise).model, LinearPair(noise).guide
        guide.target_noise = OTHERS[name]
        Trace_ELBO().loss(model, guide, x, y)


def test_equal_noises_are_one() -> None:
    """Levels that are used are the same: not the objects, nor the schedules' ends."""
    for other in (
        InputNoise(CosineSchedule(20), 8),
        InputNoise(GivenSchedule(levels(CosineSchedule(20))[:9]), 8),
    ):
        model, guide = LinearPair(InputNoise(CosineSchedule(20), 8)).model, LinearPair(other).guide
        pair = LinearPair()
        fit(model, guide, (pair.x, pair.y), steps=1, progress=False)


def levels(schedule: Any) -> list[float]:
    return torch.sigmoid(-schedule.gamma(torch.arange(1, schedule.steps + 1))).tolist()


@pytest.mark.parametrize("name", OTHERS)
def test_a_fit_is_not_loaded_with_another_noise(name: str, tmp_path: Path) -> None:
    def guide(noise: InputNoise | None) -> Encoder:
        torch.manual_seed(0)
        return Encoder((3,), MeanField(2, 8), noise=noise)

    model = LinearGaussian(torch.randn(3, 2), torch.randn(3), scale=0.8)
    noise = InputNoise(CosineSchedule(100), 20)
    fitted = fit(model, guide(noise), torch.randn(9, 3), steps=1, progress=False)
    fitted.save(tmp_path / "fit.pt")
    assert Fit.load(tmp_path / "fit.pt", model, guide(noise)).losses.shape == (1,)
    with pytest.raises(ValueError, match=r"other programs: 'guide.noise' is InputNoise.* and was"):
        Fit.load(tmp_path / "fit.pt", model, guide(OTHERS[name]))
    with pytest.raises(ValueError, match=r"'guide.noise' is None there, and was InputNoise"):
        Fit.load(tmp_path / "fit.pt", model, guide(None))


def test_levels_of_predictions_are_strict() -> None:
    pair = LinearPair(InputNoise(CosineSchedule(20), 10))
    for wrong in (5.5, True, None):
        with pytest.raises(TypeError, match="expected a level of noise as an int"):
            pair.model.predict(pair.x, t=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="level of noise from 0 to 10, got 11"):
        pair.model.predict(pair.x, t=11)
    none = LinearPair(InputNoise(CosineSchedule(20), 0))
    with pytest.raises(ValueError, match="level of noise from 0 to 0, got 5"):
        none.model.predict(none.x, t=5)


def test_data_that_have_no_noise_are_refused() -> None:
    noise = InputNoise(CosineSchedule(20), 10)
    for wrong, got in ((torch.arange(3), r"torch\.int64"), ([0.1], "list")):
        with pytest.raises(TypeError, match=f"tensor of a floating point dtype, got {got}"):
            noise(wrong)
