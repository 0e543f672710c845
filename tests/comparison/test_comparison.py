"""compare(): rows with known answers, verdicts that the numbers support."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import (
    SCHOOLS_SIGMA,
    SCHOOLS_Y,
    STRANGE_NAMES,
    normal_mean,
    normal_mean_guide,
    renamed,
)
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import Comparison, Fit, Posterior, compare, fit, judge, report
from pyro_vi.comparison import PerPoint, Row
from pyro_vi.comparison.verdict import warnings, words
from pyro_vi.data import binarize
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE, LinearGaussian


@dataclass(frozen=True)
class Data:
    train: Tensor
    test: Tensor


def linear_gaussian() -> tuple[LinearGaussian, Data]:
    weight = torch.tensor([[1.0, 0.9], [0.9, 1.0], [0.9, 0.8], [0.5, 0.6]]).double()
    model = LinearGaussian(weight, torch.zeros(4).double(), 0.6)
    z, noise = torch.randn(712, 2).double(), 0.6 * torch.randn(712, 4).double()
    x = z @ weight.T + noise
    return model, Data(x[:512], x[512:])


def encoder(family: nn.Module) -> Encoder:
    return Encoder((4,), family.double(), network=lambda shape, width: nn.Identity())


@pytest.fixture(scope="module")
def known() -> tuple[LinearGaussian, Data, Comparison]:
    torch.manual_seed(0)
    model, data = linear_gaussian()
    guides = {
        "mean-field": encoder(MeanField(2, 4)),
        "full covariance": encoder(FullCovariance(2, 4)),
    }
    result = compare(
        model,
        guides,
        data,
        loss=TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        optim=partial(torch.optim.Adam, lr=0.02),
        schedule=partial(CosineAnnealingLR, T_max=1000),
        steps=1000,
        batch_size=128,
        progress=False,
    )
    return model, data, result


def test_rows_hold_the_exact_answers(known: tuple[LinearGaussian, Data, Comparison]) -> None:
    model, data, result = known
    evidence = float(model.log_evidence(data.test).mean())
    gap = float(model.mean_field_gap())
    mean_field, full = result.rows
    assert result.shared  # the model has no parameters: one evidence
    assert full.evidence == pytest.approx(evidence, abs=0.01)
    assert full.gap < 0.01
    assert mean_field.gap == pytest.approx(gap, rel=0.03)
    assert mean_field.elbo == pytest.approx(evidence - gap, abs=0.03 * gap + 4 * mean_field.elbo_se)
    assert full.elbo_difference == pytest.approx(gap, rel=0.03)
    assert math.isnan(full.evidence_difference) and math.isnan(full.elbo_bits)
    assert mean_field.elbo_difference == 0
    for row in result.rows:
        assert row.reconstruction - row.kl == pytest.approx(row.elbo, abs=1e-9)
        assert (row.active_units, row.latent_units) == (2, 2)
        assert row.parameters == result.fits[row.family].parameters
    # k is the posterior's correlation, 0.88; its estimate from 1,000 draws sits about 0.1 lower
    assert mean_field.khat_median == pytest.approx(0.78, abs=0.1)
    assert full.khat_bad < 0.05 and mean_field.khat_bad > 0.5
    assert full.ess > 900 and mean_field.ess < 300
    assert result.best is full
    assert result.verdict.startswith("full covariance has the highest test ELBO")
    assert "Trust full covariance" in result.verdict
    assert "minus mean-field's" in str(result) and "gap: best evidence - ELBO" in str(result)


def test_the_csv_holds_every_digit(
    known: tuple[LinearGaussian, Data, Comparison], tmp_path: Path
) -> None:
    result = known[2]
    result.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [line["family"] for line in read] == ["mean-field", "full covariance"]
    for line, row in zip(read, result.rows, strict=True):
        assert float(line["elbo"]) == row.elbo
        assert float(line["gap_se"]) == row.gap_se
        assert int(line["parameters"]) == row.parameters
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


FORMULAS = ("=1+1", "+1", "-1", "@sum", "\ttabs\r\nand\rmore", " =1", "\r=1", "\n+1")


@pytest.mark.parametrize("name", dict.fromkeys([*STRANGE_NAMES, *FORMULAS]), ids=ascii)
def test_a_name_is_one_cell_and_no_formula(
    name: str, known: tuple[LinearGaussian, Data, Comparison], tmp_path: Path
) -> None:
    result = renamed(known[2], name)
    result.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    cell = read[0]["family"]
    text = re.sub(r"\r\n?", "\n", name).replace("\ud83d", r"\ud83d")
    assert cell == (f"'{text}" if name in FORMULAS else text)
    assert read[1]["family"] == "full covariance" and len(read) == 2
    for line, row in zip(read, result.rows, strict=True):
        assert float(line["elbo"]) == row.elbo  # a negative number is a number


def test_a_trained_model_is_copied_and_a_fitted_one_is_frozen() -> None:
    images = Data(torch.rand(64, 1, 4, 4).round(), torch.rand(30, 1, 4, 4).round())
    model = VAE((1, 4, 4), 2)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    guides = {str(i): Encoder((1, 4, 4), MeanField(2, 8)) for i in range(2)}
    guides["1"].load_state_dict(guides["0"].state_dict())
    options = {"steps": 5, "batch_size": 16, "num_samples": 50, "progress": False}
    own = compare(model, guides, images, **options)
    assert not own.shared
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    # two equal guides: the same initial weights, batches and noise, and so the same fit
    assert torch.equal(own.fits["0"].losses, own.fits["1"].losses)
    assert own.rows[1].elbo_difference == 0 and own.rows[1].evidence_difference == 0
    row = own.rows[0]
    assert row.evidence_bits == pytest.approx(-row.evidence / (16 * math.log(2)), rel=1e-12)
    assert row.elbo_bits == pytest.approx(-row.elbo / (16 * math.log(2)), rel=1e-12)
    frozen = compare(own.fits["0"].model, guides, images, **options)
    assert frozen.shared
    assert {row.parameters for row in frozen.rows} == {
        sum(p.numel() for p in guides["0"].parameters())
    }


def test_a_function_with_parameters_is_no_shared_model() -> None:
    def model(x: Tensor) -> None:
        shift = pyro.param("shift", torch.zeros(4).double())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            mean = shift + z.repeat(1, 2)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    _, data = linear_gaussian()
    guides = {"a": encoder(MeanField(2, 4)), "b": encoder(FullCovariance(2, 4))}
    result = compare(model, guides, data, steps=3, num_samples=30, progress=False)
    assert not result.shared
    assert "shift" not in pyro.get_param_store()


def test_families_see_the_same_batches_whatever_they_draw() -> None:
    model, data = linear_gaussian()
    seen: list[list[Tensor]] = []
    for family in (MeanField(2, 4), FullCovariance(2, 4)):
        seen.append([])

        def transform(batch: Tensor, into: list[Tensor] = seen[-1]) -> Tensor:
            into.append(batch)
            return batch

        fit(
            model,
            encoder(family),
            data.train,
            steps=6,
            batch_size=100,
            transform=transform,
            progress=False,
        )
    batches = [[x for x in own if len(x) == 100][-6:] for own in seen]
    assert len(batches[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_transform_reaches_the_test_data_once() -> None:
    images = Data(torch.full((40, 1, 4, 4), 0.5), torch.full((20, 1, 4, 4), 0.5))
    result = compare(
        VAE((1, 4, 4), 2),
        {"one": Encoder((1, 4, 4), MeanField(2, 8))},
        images,
        transform=binarize,
        steps=2,
        batch_size=10,
        num_samples=30,
        progress=False,
    )
    assert bool(((result.data == 0) | (result.data == 1)).all())
    assert "minus" not in str(result)  # one family: nothing to subtract


# -------------------------------------------------------------------------------- joint posteriors


X = torch.linspace(-1.0, 3.0, 9).double()
PRECISION = 0.25 + len(X)  # of the posterior of `means`, under a prior N(0, 2^2) and noise of 1


def means(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
    pyro.deterministic("double", 2 * mean)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def at_posterior(times: float) -> Callable[[Tensor], None]:
    """A guide at the posterior's mean, with so many times its standard deviation."""

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", X.sum() / PRECISION)
        pyro.sample("mean", dist.Normal(loc, times * PRECISION**-0.5))

    return guide


class Chain:
    """What compare asks of a `pyro.infer.MCMC` that has run."""

    def __init__(self, **samples: Tensor) -> None:
        self._samples = samples

    def get_samples(self) -> dict[str, Tensor]:
        return self._samples


@pytest.fixture(scope="module")
def joint() -> Comparison:
    exact = X.sum() / PRECISION + PRECISION**-0.5 * torch.randn(20_000).double()
    return compare(
        means,
        {"point": AutoDelta(means), "wide": at_posterior(1.5), "exact": at_posterior(1.0)},
        Data(X, torch.tensor([-2.0, 0.0, 1.0, 4.0]).double()),
        num_samples=4_000,
        reference=Chain(mean=exact),
        optim=partial(torch.optim.SGD, lr=0.0),  # the guides stay where they begin
        steps=2,
        progress=False,
    )


def test_joint_rows_hold_the_exact_answers(joint: Comparison) -> None:
    point, wide, exact = joint.rows
    covariance = torch.eye(len(X)).double() + 4.0
    evidence = float(dist.MultivariateNormal(torch.zeros(len(X)).double(), covariance).log_prob(X))
    assert joint.is_joint and joint.shared and not joint.on_test
    assert exact.evidence == pytest.approx(evidence, abs=1e-10)
    assert exact.elbo == pytest.approx(evidence, abs=1e-10)
    assert exact.khat_median == -math.inf and exact.ess == pytest.approx(4_000)
    gap = 0.5 * (1.5**2 - 1) - math.log(1.5)  # KL of two normals of one mean
    assert wide.gap == pytest.approx(gap, abs=4 * wide.gap_se) and wide.gap_se < 0.05
    assert exact.elbo_difference == pytest.approx(evidence - wide.elbo)
    assert math.isnan(point.elbo) and math.isnan(point.khat_median)
    assert joint.best is exact and "exact" in joint.verdict
    assert exact.active_units is None and math.isnan(exact.evidence_bits)


def test_joint_posteriors_judge_test_data_by_their_predictive_density(joint: Comparison) -> None:
    exact = joint.rows[2]
    predictive = dist.Normal(X.sum() / PRECISION, (1 + 1 / PRECISION) ** 0.5)
    expected = predictive.log_prob(torch.tensor([-2.0, 0.0, 1.0, 4.0]).double())
    assert exact.predictive == pytest.approx(float(expected.mean()), abs=0.02)
    assert exact.predictive_se == pytest.approx(float(expected.std()) / 2, rel=0.02)
    assert "log predictive (nats)" in str(joint) and "active units" not in str(joint)


def test_marginals_are_held_against_the_reference(joint: Comparison) -> None:
    point, wide, exact = joint.rows
    assert joint.noise is not None and joint.noise.wasserstein < 0.05
    assert abs(exact.mean_error) < 0.1 and abs(exact.sd_error) < 0.06
    assert wide.sd_error == pytest.approx(0.5, abs=0.06)
    assert point.sd_error == pytest.approx(-1.0)
    # Pyro's chains hold latents alone: what follows from them is computed
    torch.testing.assert_close(
        torch.from_numpy(joint.reference["double"]), 2 * torch.from_numpy(joint.reference["mean"])
    )
    assert joint.marginals["wide"].keys() == {"mean", "double"}


def test_a_csv_has_the_reference_last(joint: Comparison, tmp_path: Path) -> None:
    joint.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [line["family"] for line in read] == ["point", "wide", "exact", "reference"]
    assert read[0]["elbo"] == "" and read[3]["elbo"] == "" and float(read[3]["wasserstein"]) > 0


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ({"other": torch.zeros(5)}, ValueError, r"reference draws of \['double', 'mean'\]"),
        ({"mean": torch.randn(5, 2)}, ValueError, "site 'mean': expected reference draws of shape"),
        ({}, TypeError, "a pyro.infer.MCMC that has run, or arrays of draws by site, got no draws"),
        (3, TypeError, "got int"),
    ],
)
def test_references_of_other_programs_are_refused(
    reference: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compare(means, {"a": at_posterior(1.0)}, X, reference=reference, steps=1, progress=False)


AUTOGUIDES = (
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoDelta,
    AutoStructured,
)


def test_every_autoguide_of_pyros_stands_beside_a_hand_written_one() -> None:
    def schools(y: Tensor, sigma: Tensor) -> None:  # scaled, so that 100 steps reach a mode
        mu = pyro.sample("mu", dist.Normal(0.0, 0.5))
        tau = pyro.sample("tau", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("data", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    def by_hand(y: Tensor, sigma: Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.4))
        pyro.sample("tau", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("eta", dist.Normal(0.0, 1.0))

    data = (SCHOOLS_Y / 10, SCHOOLS_SIGMA / 10)
    guides = {kind.__name__: kind(schools) for kind in AUTOGUIDES}
    result = compare(
        schools,
        {"by hand": by_hand, **guides},
        data,
        optim=partial(torch.optim.Adam, lr=0.03),
        steps=100,
        num_samples=500,
        progress=False,
    )
    assert [row.family for row in result.rows] == ["by hand", *guides]
    safest = min(result.rows, key=lambda row: row.khat_median)  # NaN is never below
    evidence = safest.evidence
    assert sum(row.khat_median < 0.5 for row in result.rows) >= 3
    for row in result.rows:
        if row.family == "AutoDelta":
            assert math.isnan(row.elbo)
            continue
        # one evidence for all: no bound is above it, and who is trusted estimates it
        assert row.elbo < evidence + 4 * safest.evidence_se
        if row.khat_median < 0.5:
            error = math.hypot(row.evidence_se, safest.evidence_se)
            assert abs(row.evidence - evidence) < 5 * error
    assert "AutoStructured" in str(result)


def test_reconstruction_counts_what_is_observed_outside_the_plate() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
        pyro.sample("y", dist.Normal(mean, 0.1), obs=y)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("loc", x.new_tensor(0.5)), 0.1))

    data = (X, torch.tensor(1.0).double())
    result = compare(model, {"a": guide}, data, steps=1, num_samples=4_000, progress=False)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.5, 0.1), torch.distributions.Normal(0.0, 2.0)
    )
    assert result.rows[0].kl == pytest.approx(float(kl), abs=0.1)


@pytest.mark.filterwarnings("ignore:the restarts disagree")
def test_restarts_that_disagree_show_in_r_hat() -> None:
    guides = {"a": AutoNormal(means)}
    result = compare(means, guides, X, steps=3, restarts=2, num_samples=200, progress=False)
    assert result.rows[0].rhat > 1.05
    assert any("R-hat across restarts" in warning for warning in result.warnings)
    assert "R-hat across restarts" in str(result)


# ------------------------------------------------------------------------------------- the verdict


ROW = Row(
    family="a",
    elbo=-10.0,
    elbo_se=0.01,
    elbo_difference=0.0,
    elbo_difference_se=0.0,
    evidence=-9.9,
    evidence_se=0.01,
    evidence_difference=0.0,
    evidence_difference_se=0.0,
    gap=0.1,
    gap_se=0.01,
    reconstruction=-8.0,
    kl=2.0,
    elbo_bits=1.0,
    evidence_bits=0.99,
    khat_median=0.3,
    khat_bad=0.0,
    ess=500.0,
    active_units=2,
    latent_units=2,
    parameters=10,
    seconds_per_step=0.01,
)


def bare(rows: tuple[Row, ...], points: dict[str, PerPoint]) -> Comparison:
    """A comparison of these rows and nothing behind them."""
    return Comparison(
        rows=rows,
        fits={},
        posteriors={},
        step_bounds={},
        points=points,
        data=torch.zeros(400),
        on_test=True,
        num_samples=1000,
        shared=False,
        reference={},
        marginals={},
    )


def verdict(*rows: Row, spread: float = 0.1) -> str:
    noise = np.random.default_rng(0).normal(size=(len(rows), 400))
    points = {
        row.family: PerPoint(
            elbo=row.elbo + spread * (n - n.mean()),
            evidence=np.zeros(400),
            khat=np.zeros(400),
            ess=np.ones(400),
        )
        for row, n in zip(rows, noise, strict=True)
    }
    return words(bare(rows, points))


def test_the_verdict_names_a_winner_only_beyond_its_error() -> None:
    better = replace(ROW, family="b", elbo=-9.0)
    assert verdict(ROW, better).startswith(
        "b has the highest test ELBO, 1.00 ± 0.007 nats above a."
    )
    assert "b and a share the highest test ELBO" in verdict(ROW, better, spread=20.0)


def test_the_verdict_does_not_trust_posteriors_that_are_the_prior() -> None:
    """Their k-hats are the best there are: the posterior of a model that ignores z is its prior."""
    collapsed = replace(ROW, khat_bad=0.0, active_units=0, latent_units=6)
    other = replace(collapsed, family="b", elbo=ROW.elbo + 5)
    words = verdict(collapsed, other)
    assert "No latent unit of any family is active" in words and "Trust" not in words
    assert "Trust" in verdict(collapsed, replace(other, active_units=1))


def test_the_verdict_does_not_trust_a_bad_k_hat() -> None:
    bad = replace(ROW, family="b", elbo=-9.0, khat_bad=0.6)
    words = verdict(ROW, bad)
    assert "the draws of b are not the posterior's: k-hat is above 0.67 for 60%" in words
    assert "The draws of a can be taken as they are (k-hat at most 0.67 for 100%)" in words
    worse = replace(ROW, khat_bad=0.3)
    assert "No family here is the posterior for all data; a comes closest (70%)" in verdict(
        worse, bad
    )
    assert "Trust b" in verdict(ROW, replace(bad, khat_bad=0.1))


def test_a_collapsed_posterior_is_warned_of() -> None:
    rows = (replace(ROW, active_units=1, latent_units=4), replace(ROW, family="b"))
    (warning,) = warnings(bare(rows, {}))
    assert "a: 1 of 4 latent units are active" in warning and "collapse" in warning


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("guides", "draws", "error", "message"),
    [
        ({}, 50, ValueError, "at least one guide"),
        ({"a": lambda x: None}, 0, ValueError, "at least 21 posterior draws for a k-hat, got 0"),
        ({"a": lambda x: None}, 20, ValueError, "at least 21 posterior draws for a k-hat, got 20"),
        ({"a": lambda x: None}, 2.5, TypeError, "whole number of posterior draws"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(
    guides: dict[str, object], draws: int, error: type[Exception], message: str
) -> None:
    model, data = linear_gaussian()
    with pytest.raises(error, match=message):
        compare(model, guides, data, num_samples=draws, steps=1_000_000)


def test_a_guide_that_fails_is_a_row_that_says_so(tmp_path: Path) -> None:
    def fails(x: Tensor) -> None:
        raise ZeroDivisionError("by x")

    x = torch.randn(10)
    guides = {"fails": fails, "good": normal_mean_guide, "other": lambda x: None}
    options: dict[str, Any] = {"steps": 5, "num_samples": 30, "progress": False}
    result = compare(normal_mean, guides, x, **options)
    alone = compare(normal_mean, {"good": normal_mean_guide}, x, **options)
    assert [row.family for row in result.rows] == ["fails", "good", "other"]
    assert result.rows[1].elbo == alone.rows[0].elbo and result.rows[1].status == ""
    assert result.rows[0].status == "failed: ZeroDivisionError: by x" and list(result.fits) == [
        "good"
    ]
    assert isinstance(result.failures["fails"], ZeroDivisionError)
    assert "failed: latent site 'mean' of the model is missing" in result.rows[2].status
    assert "Warning: fails failed: ZeroDivisionError: by x." in str(result)
    result.to_csv(tmp_path / "rows.csv")
    assert "failed: ZeroDivisionError: by x" in (tmp_path / "rows.csv").read_text()
    report(result, tmp_path / "report.html")
    assert "failed: ZeroDivisionError: by x" in (tmp_path / "report.html").read_text()
    with pytest.raises(ZeroDivisionError, match="by x"):
        compare(normal_mean, {"fails": fails, "too": fails}, x, **options)


def test_a_posterior_that_fails_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def posterior(fitted: Fit, *args: Any, **kwargs: Any) -> Posterior:
        if fitted.guide.function is bad:
            raise OverflowError("too far")
        return original(fitted, *args, **kwargs)

    def bad(x: Tensor) -> None:
        normal_mean_guide(x)

    original = Fit.posterior
    monkeypatch.setattr(Fit, "posterior", posterior)
    guides = {"good": normal_mean_guide, "bad": bad}
    result = compare(normal_mean, guides, torch.randn(5), steps=2, num_samples=30, progress=False)
    assert (
        list(result.posteriors) == ["good"]
        and result.rows[1].status == "failed: OverflowError: too far"
    )


def test_what_has_no_density_is_refused_before_training() -> None:
    runs = []

    def mixture(x: Tensor) -> None:
        runs.append(1)
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2 * k, 1.0), obs=x)

    def scaled(x: Tensor) -> None:
        runs.append(1)
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[index])

    x = torch.randn(10)
    guide = AutoNormal(poutine.block(mixture, hide=["k"]))
    with pytest.raises(ValueError, match=r"the guide does not sample \['k'\]"):
        compare(mixture, {"a": guide}, x, loss=TraceEnum_ELBO(max_plate_nesting=1), progress=False)
    with pytest.raises(ValueError, match="site 'x' is scaled by the program"):
        compare(scaled, {"a": normal_mean_guide}, x, progress=False)
    assert len(runs) < 15  # of 1,000 steps


def test_a_model_that_observes_nothing_is_refused() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    x = torch.randn(6)
    words = r"the model observes nothing: .* \['w', 'y'\] are latent.*prior_only=True"
    options: dict[str, Any] = {"steps": 3, "progress": False}
    with pytest.raises(ValueError, match=words):
        fit(model, AutoNormal(model), (x,), **options)
    with pytest.raises(ValueError, match=words):
        compare(model, {"a": AutoNormal(model), "b": AutoDelta(model)}, (x,), **options)
    fitted = fit(model, AutoNormal(model), (x, x), **options)
    with pytest.raises(ValueError, match=r"\['a'\] observe nothing in these data"):
        judge({"a": fitted}, (x,))
    with pytest.raises(ValueError, match=r"and this one observes \['y'\]"):
        fit(model, AutoNormal(model), (x, x), prior_only=True, **options)


def test_a_prior_is_fitted_on_purpose() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(1.0, 2.0))

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 2.0))

    fitted = fit(model, guide, (), steps=0, prior_only=True, progress=False)
    assert fitted.posterior((), 20).log_weights == pytest.approx(0.0, abs=1e-6)
    result = judge({"a": fitted}, (), num_samples=30, prior_only=True)
    assert result.rows[0].elbo == pytest.approx(0.0, abs=1e-6)
    factor = lambda: pyro.factor("f", pyro.sample("z", dist.Normal(0.0, 1.0)))  # noqa: E731
    assert len(fit(factor, guide, (), steps=1, progress=False).losses) == 1  # it has a likelihood


def test_a_transform_is_applied_before_the_check() -> None:
    """The model takes floats, and the data are bytes."""

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        weight = torch.ones(3, 1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=(x @ weight)[:, 0])

    x = torch.randint(0, 255, (8, 3), dtype=torch.uint8)
    options: dict[str, Any] = {"steps": 2, "num_samples": 30, "progress": False, "batch_size": 4}
    guides = {"a": AutoNormal(model), "b": AutoNormal(model)}
    result = compare(model, guides, x, transform=lambda x: x.float() / 255, **options)
    assert not result.failures


def test_fits_that_cannot_be_judged_are_in_the_error() -> None:
    guides = {"a": normal_mean_guide, "b": normal_mean_guide}
    reference = {"other": torch.randn(50)}
    with pytest.raises(ValueError, match=r"expected reference draws of \['mean'\]") as caught:
        compare(normal_mean, guides, torch.randn(5), reference=reference, steps=2, progress=False)
    fits = vars(caught.value)["fits"]
    assert list(fits) == ["a", "b"] and all(isinstance(one, Fit) for one in fits.values())
