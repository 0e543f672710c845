"""judge(): bounds of different models on the same thing, side by side."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import SCHOOLS_SIGMA, SCHOOLS_Y, eight_schools
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor, nn

from pyro_vi import Comparison, Fit, compare, fit, judge
from pyro_vi.diffusion import (
    Affine,
    CosineSchedule,
    Diffusion,
    LinearSchedule,
    MLPDenoiser,
    Schedule,
)
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.guides import Encoder, ForwardProcess
from pyro_vi.models import (
    DDPM,
    VAE,
    Bernoulli,
    DiscretizedLogistic,
    Gaussian,
    LearnedDiscretizedLogistic,
    LinearGaussian,
)
from pyro_vi.posterior import step_bound

SHAPE = (1, 4, 4)
GREYS = torch.randint(0, 4, (60, *SHAPE), generator=torch.Generator().manual_seed(0)) / 3
IMAGES = SimpleNamespace(train=GREYS[:40], test=GREYS[40:])


def ddpm(schedule: Schedule | None = None, likelihood: nn.Module | None = None) -> DDPM:
    schedule = CosineSchedule(4) if schedule is None else schedule
    diffusion = Diffusion(SHAPE, schedule, coordinates=Affine(0.5, 0.5))
    likelihood = LearnedDiscretizedLogistic(4) if likelihood is None else likelihood
    return DDPM(diffusion, MLPDenoiser(SHAPE, schedule.steps), likelihood=likelihood)


def few(model: Any, guide: Any, data: Any = IMAGES.train, **options: Any) -> Fit:
    options = {"loss": TraceMeanField_ELBO(), "steps": 3, "progress": False, **options}
    return fit(model, guide, data, **options)


def diffused(**options: Any) -> Fit:
    model = ddpm(**options)
    return few(model, ForwardProcess(model.diffusion))


@pytest.fixture(scope="module")
def fits() -> dict[str, Fit]:
    torch.manual_seed(0)
    vae = VAE(SHAPE, 2, likelihood=DiscretizedLogistic(4))
    return {
        "cosine": diffused(),
        "mean-field": few(vae, Encoder(SHAPE, MeanField(2, 8))),
        "linear": diffused(schedule=LinearSchedule(3)),
        "full": few(vae, Encoder(SHAPE, FullCovariance(2, 8))),
    }


@pytest.fixture(scope="module")
def result(fits: dict[str, Fit]) -> Comparison:
    return judge(fits, IMAGES, num_samples=50, seed=3)


def test_a_diffusions_row_is_its_bound_over_all_steps(
    fits: dict[str, Fit], result: Comparison
) -> None:
    assert list(result.step_bounds) == ["cosine", "linear"]
    assert list(result.posteriors) == list(result.points) == ["mean-field", "full"]
    assert [row.family for row in result.rows] == list(fits)
    for row in result.rows:
        assert row.reconstruction - row.kl == pytest.approx(row.elbo, abs=1e-9)
        assert row.elbo_bits == pytest.approx(-row.elbo / (16 * math.log(2)), rel=1e-12)
        assert math.isnan(row.evidence) == (row.family in result.step_bounds)
        assert math.isnan(row.khat_median) == (row.family in result.step_bounds)
    for name in result.step_bounds:
        alone = step_bound(fits[name].model, fits[name].guide, IMAGES.test, seed=3)
        row = next(row for row in result.rows if row.family == name)
        assert row.elbo == float(alone.elbo.value) and row.elbo_se == float(alone.elbo.se)
        assert row.parameters == fits[name].parameters


def test_differences_are_paired_and_to_the_first_that_has_the_quantity(result: Comparison) -> None:
    elbos = result.elbos
    assert {name: len(values) for name, values in elbos.items()} == dict.fromkeys(elbos, 20)
    first = elbos["cosine"]
    for row in result.rows:
        difference = elbos[row.family] - first
        assert row.elbo_difference == pytest.approx(difference.mean(), abs=1e-9)
        assert row.elbo_difference_se == pytest.approx(difference.std(ddof=1) / np.sqrt(20))
    mean_field, full = (result.rows[i] for i in (1, 3))
    assert mean_field.evidence_difference == 0.0
    assert full.evidence_difference == pytest.approx(full.evidence - mean_field.evidence)


def test_the_table_has_blanks_where_a_diffusion_has_nothing(
    result: Comparison, tmp_path: Path
) -> None:
    table = str(result).splitlines()
    lines = {line[:34].strip(): line for line in table}
    assert table[0].split() == ["cosine", "mean-field", "linear", "full"]
    assert len(lines["ELBO (bits per dimension)"][34:].split()) == 4
    assert len(lines["evidence (bits per dimension)"][34:].split()) == 2
    assert "minus cosine's" in str(result) and "minus mean-field's" in str(result)
    result.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        read = {line["family"]: line for line in csv.DictReader(file)}
    assert read["cosine"]["evidence_bits"] == "" and read["cosine"]["khat_bad"] == ""
    assert float(read["linear"]["elbo_bits"]) == result.rows[2].elbo_bits


def test_the_verdict_says_that_a_diffusion_has_a_bound_alone(fits: dict[str, Fit]) -> None:
    both = judge({name: fits[name] for name in ("linear", "cosine")}, IMAGES)
    assert both.best.family in both.verdict.split(".")[0]
    assert f"A bound is all that {both.best.family} has" in both.verdict
    assert "Of those" not in both.verdict and "k-hat is" not in both.verdict
    assert not both.warnings and not both.is_joint
    alone = judge({"cosine": fits["cosine"]}, IMAGES)
    assert alone.verdict.startswith(f"cosine: test ELBO {alone.rows[0].elbo:.2f} nats.")


def test_compare_takes_a_model_for_each_guide() -> None:
    torch.manual_seed(1)
    vae, diffusion = VAE(SHAPE, 2, likelihood=DiscretizedLogistic(4)), ddpm()
    models = {"vae": vae, "ddpm": diffusion}
    guides = {
        "vae": Encoder(SHAPE, MeanField(2, 8)),
        "ddpm": ForwardProcess(diffusion.diffusion),
    }
    options: dict[str, Any] = {"steps": 3, "batch_size": 20, "progress": False, "seed": 2}
    result = compare(models, guides, IMAGES, num_samples=30, **options)
    fits = {n: fit(models[n], guides[n], IMAGES.train, **options) for n in models}
    assert result.rows[0].elbo == judge(fits, IMAGES, num_samples=30, seed=2).rows[0].elbo
    assert list(result.step_bounds) == ["ddpm"] and not result.shared
    with pytest.raises(ValueError, match=r"a model for each guide, \['ddpm', 'vae'\], got models"):
        compare({"vae": vae}, guides, IMAGES)


def test_fits_of_one_frozen_model_share_its_evidence() -> None:
    x = torch.randn(40, 3)
    model = LinearGaussian(torch.ones(3, 2), torch.zeros(3), 1.0)
    other = LinearGaussian(torch.ones(3, 2), torch.zeros(3), 2.0)
    guides = {f.__name__: Encoder((3,), f(2, 8)) for f in (MeanField, FullCovariance)}
    fits = {name: few(model, guide, x) for name, guide in guides.items()}
    assert judge(fits, x, num_samples=50).shared
    apart = {"one": fits["MeanField"], "two": few(other, guides["MeanField"], x)}
    assert not judge(apart, x, num_samples=50).shared  # neither trains, but they are two models


# ---------------------------------------------------------------------------------- generation


def test_a_fitted_diffusion_generates_by_its_chain(fits: dict[str, Fit]) -> None:
    drawn = fits["cosine"].generate(5, expected=True, seed=1)
    assert list(drawn) == ["x_0"] and drawn["x_0"].shape == (5, *SHAPE)
    torch.manual_seed(1)
    assert torch.equal(drawn["x_0"], fits["cosine"].model.sample(5))
    before = torch.get_rng_state()
    greys = 3 * fits["cosine"].generate(5)["x_0"]
    assert torch.allclose(greys, greys.round(), atol=1e-6) and greys.std() > 0
    assert torch.equal(before, torch.get_rng_state())


def test_a_program_of_ones_own_without_a_chain_to_sample_says_so() -> None:
    model = ddpm()

    def mine(x: Tensor) -> None:
        model(x)

    fitted = few(mine, ForwardProcess(model.diffusion))
    assert judge({"mine": fitted}, IMAGES).step_bounds["mine"].discrete
    with pytest.raises(ValueError, match="unless its model has a method `sample`"):
        fitted.generate(3)


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("likelihood", "words"),
    [
        (DiscretizedLogistic(7), "32 numbers of 7 levels"),
        (Gaussian(0.3), "32 with a density"),
    ],
)
def test_bounds_on_different_things_are_refused(
    fits: dict[str, Fit], likelihood: nn.Module, words: str
) -> None:
    # levels 0, 1/3, 2/3, 1 are four of seven: the finer grid takes the data, and its bound is other
    vae = few(VAE(SHAPE, 2, likelihood=likelihood), Encoder(SHAPE, MeanField(2, 8)))
    message = f"of the same rows 'cosine' observes 32 numbers of 4 levels, 'vae' {words}"
    with pytest.raises(ValueError, match=message):
        judge({"cosine": fits["cosine"], "vae": vae}, IMAGES)


def test_bernoulli_and_two_levels_are_the_same_thing() -> None:
    binary = SimpleNamespace(train=GREYS[:40].round(), test=GREYS[40:].round())
    vae = few(VAE(SHAPE, 2, likelihood=Bernoulli()), Encoder(SHAPE, MeanField(2, 8)), binary.train)
    model = ddpm(likelihood=LearnedDiscretizedLogistic(2))
    other = few(model, ForwardProcess(model.diffusion), binary.train)
    rows = judge({"vae": vae, "ddpm": other}, binary, num_samples=30).rows
    assert all(row.elbo_bits > 0 for row in rows)


def normal(scale: float, *, shown: bool = False, mask: bool = False, units: float = 1.0) -> Any:
    """A program of single values with a latent each, and a guide for it."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if shown:
                pyro.deterministic("twice", 2 * z)
            with pyro.poutine.mask(mask=(x > 0) if mask else torch.ones_like(x).bool()):
                pyro.sample("x", dist.Normal(units * z, units * scale), obs=units * x)

    def guide(x: Tensor) -> None:
        spread = pyro.param("spread", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, spread))

    return model, guide


X = torch.linspace(-1, 2, 12)


def test_what_is_said_beside_the_data_is_no_observation() -> None:
    fits = {
        "plain": few(*normal(1.0), X, loss=None),
        "shown": few(*normal(0.5, shown=True), X, loss=None),
    }
    assert not judge(fits, X, num_samples=30).shared

    def one_by_one(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        for i, value in enumerate(x):
            pyro.sample(f"x_{i}", dist.Normal(mean, 1.0), obs=value)

    def at_once(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    joint = {m.__name__: few(m, AutoNormal(m), X, loss=None) for m in (one_by_one, at_once)}
    assert judge(joint, X, num_samples=30).is_joint


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"mask": True}, "'plain' observes 2 with a density, 'other' 1 with a density"),
        ({"units": 10.0}, "'plain' and 'other' observe other numbers of the same rows"),
    ],
)
def test_other_observations_are_refused(other: dict[str, Any], message: str) -> None:
    x = torch.tensor([1.5, -0.5, 0.5, 0.7] * 5)
    fits = {
        "plain": few(*normal(1.0), x, loss=None),
        "other": few(*normal(1.0, **other), x, loss=None),
    }
    with pytest.raises(ValueError, match=message):
        judge(fits, x, num_samples=30)


def test_grey_levels_may_be_counted_from_nought(fits: dict[str, Fit]) -> None:
    """The same four levels as whole numbers: probabilities have no units."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = z.sum(-1)[:, None, None, None].expand(-1, *SHAPE)
            pyro.sample("x", dist.Binomial(3, logits=logits).to_event(3), obs=(3 * x).round())

    own = few(model, Encoder(SHAPE, MeanField(2, 8)))
    rows = judge({"own": own, "cosine": fits["cosine"]}, IMAGES, num_samples=30).rows
    assert rows[0].elbo_bits == pytest.approx(-rows[0].elbo / (16 * math.log(2)))


def test_a_flat_prior_is_judged() -> None:
    def flat(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    start = init_to_value(values={"mean": torch.tensor(0.0)})
    guide = AutoNormal(flat, init_loc_fn=start)
    assert math.isfinite(
        compare(flat, {"q": guide}, X, num_samples=30, steps=3, progress=False).rows[0].elbo
    )


def test_rows_of_a_diffusion_that_hang_together_are_refused() -> None:
    model = ddpm()
    mixing = model.net

    class Mixed(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return mixing(x - x.mean(0), t)

    mixed = DDPM(model.diffusion, Mixed(), likelihood=LearnedDiscretizedLogistic(4))
    with pytest.raises(
        ValueError, match=r"\['mixed'\] draw some of their steps.*rows do not stand"
    ):
        judge({"mixed": few(mixed, ForwardProcess(model.diffusion))}, IMAGES)


def test_models_are_held_against_each_other_before_any_training() -> None:
    diffusion = ddpm()
    models = {"vae": VAE(SHAPE, 2, likelihood=Gaussian(0.3)), "ddpm": diffusion}
    guides = {"vae": Encoder(SHAPE, MeanField(2, 8)), "ddpm": ForwardProcess(diffusion.diffusion)}
    with pytest.raises(ValueError, match="bounds on different things"):
        compare(models, guides, IMAGES, steps=10**9)


@pytest.mark.parametrize("data", [(GREYS,), {"x_0": GREYS}], ids=["tuple", "dict"])
def test_one_argument_comes_in_any_form(data: Any) -> None:
    model = ddpm()
    fitted = few(model, ForwardProcess(model.diffusion), data)
    assert judge({"ddpm": fitted}, data).rows[0].elbo_bits > 0


def test_a_model_that_changed_between_fits_is_another() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(1.0))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, self.scale))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model, (_, guide) = Scaled(), normal(1.0)
    fits = {"before": few(model, guide, X, loss=None), "again": few(model, guide, X, loss=None)}
    assert judge(fits, X, num_samples=30).shared
    model.scale.fill_(3.0)
    fits["after"] = few(model, guide, X, loss=None)
    assert not judge(fits, X, num_samples=30).shared


def test_one_data_point_is_judged(fits: dict[str, Fit]) -> None:
    both = {name: fits[name] for name in ("cosine", "full")}
    rows = judge(both, IMAGES.test[:1], num_samples=30).rows
    assert rows[1].elbo_difference == pytest.approx(rows[1].elbo - rows[0].elbo, abs=1e-9)


def test_batches_of_other_sizes_observe_the_same_thing(fits: dict[str, Fit]) -> None:
    split = few(
        VAE(SHAPE, 2, likelihood=DiscretizedLogistic(4)),
        Encoder(SHAPE, MeanField(2, 8)),
        batch_size=8,
    )
    rows = judge({"cosine": fits["cosine"], "split": split}, IMAGES, num_samples=30).rows
    assert [row.family for row in rows] == ["cosine", "split"]
    assert all(math.isfinite(row.elbo) for row in rows)


def test_a_diffusion_beside_one_posterior_of_all_data_is_refused(fits: dict[str, Fit]) -> None:
    def level(x_0: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x_0)):
            pyro.sample("x", dist.Normal(mean, 1.0).expand(SHAPE).to_event(3), obs=x_0)

    one = few(level, AutoNormal(level), loss=None)
    with pytest.raises(ValueError, match=r"\['cosine'\] have a bound for each data point"):
        judge({"level": one, "cosine": fits["cosine"]}, IMAGES)
    schools = few(eight_schools, AutoNormal(eight_schools), (SCHOOLS_Y, SCHOOLS_SIGMA), loss=None)
    with pytest.raises(TypeError, match="'schools' does not take these data: "):
        judge({"schools": schools, "cosine": fits["cosine"]}, IMAGES)


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({}, ValueError, "at least one fit"),
        ([], TypeError, "fits by name, a dict, got list"),
        ({"a": 3}, TypeError, r"got others as \['a'\]"),
        ({1: 3}, TypeError, "by name, strings"),
    ],
)
def test_only_fits_are_judged(named: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        judge(named, IMAGES)


def test_too_few_draws_are_refused(fits: dict[str, Fit]) -> None:
    with pytest.raises(ValueError, match="at least 21 posterior draws"):
        judge(fits, IMAGES, num_samples=20)


def test_several_observed_sites_are_told_apart() -> None:
    """Two sites of one value each are not one site of two."""

    def one(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = z.unsqueeze(-1).expand(-1, 2)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def two(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("b", dist.Poisson(z.exp()), obs=x[:, 1].abs().round())

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0] / 2, scale.abs()))

    x = torch.randn(30, 2)
    fits = {m.__name__: few(m, guide, x, loss=None) for m in (one, two)}
    message = r"'one' observes 4 with a density, 'two' 2 numbers of .+ levels and 2 with a density"
    with pytest.raises(ValueError, match=message):
        judge(fits, x, num_samples=30)
