"""The VAE of y given x: its bound and predictions against closed forms, every family, errors."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pytest
import torch
from example_programs import LinearPair
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vi import Fit, compare, fit
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import PairEncoder
from pyro_vi.models import DiscretizedLogistic, Gaussian, PixelGaussian, PredictiveVAE
from pyro_vi.networks import ConvDecoder, ConvEncoder

Make = Callable[[int, int], nn.Module]

FAMILIES: dict[str, Make] = {
    "mean-field": MeanField,
    "full covariance": FullCovariance,
    "low-rank": LowRank,
    "flow": lambda dim, context_dim: Flow(dim, context_dim, hidden=(8,), transforms=1),
}
ELBOS = pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
STILL = partial(torch.optim.SGD, lr=0.0)


def programs(
    prior: Make = MeanField, posterior: Make = FullCovariance
) -> tuple[PredictiveVAE, PairEncoder, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    model = PredictiveVAE((1, 2, 4), (5,), prior(3, 8), likelihood=PixelGaussian()).double()
    guide = PairEncoder((1, 2, 4), (5,), posterior(3, 8)).double()
    return model, guide, torch.rand(7, 1, 2, 4).double(), torch.randn(7, 5).double()


def test_sites() -> None:
    model, guide, x, y = programs()
    drawn = poutine.trace(guide).get_trace(x, y)
    trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x, y)
    trace.compute_log_prob()
    z, observed = trace.nodes["z"], trace.nodes["y"]
    assert set(drawn.stochastic_nodes) - {"data"} == {"z"}
    assert z["value"].shape == (7, 3) and z["value"].dtype == x.dtype
    assert observed["value"] is y and observed["is_observed"]
    assert z["log_prob"].shape == observed["log_prob"].shape == (7,)
    for site in (z, observed, drawn.nodes["z"]):
        assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
    torch.testing.assert_close(model.prior(x).log_prob(z["value"]), z["log_prob"])
    expected = model.decode(z["value"], x).log_prob(y)
    torch.testing.assert_close(expected, observed["log_prob"])
    drawn.compute_log_prob()
    expected = guide.encode(x, y).log_prob(z["value"])
    torch.testing.assert_close(expected, drawn.nodes["z"]["log_prob"])


def test_the_exact_guide_has_no_gap_and_no_variance() -> None:
    pair = LinearPair()
    exact = -float(pair.predictive(pair.x).log_prob(pair.y).sum())
    for seed in range(3):
        torch.manual_seed(seed)
        loss = Trace_ELBO().loss(pair.model, pair.guide, pair.x, pair.y)
        assert loss == pytest.approx(exact, abs=1e-9)
    # A KL in closed form does not go with the draw of z, and leaves its noise.
    many = TraceMeanField_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=2)
    losses = [many.loss(pair.model, pair.guide, pair.x, pair.y) for _ in range(20)]
    assert abs(np.mean(losses) - exact) < 4.5 * np.std(losses, ddof=1) / 20**0.5 < 0.5


def test_posterior_and_evidence_are_the_exact_ones() -> None:
    pair = LinearPair()
    fitted = fit(pair.model, pair.guide, (pair.x, pair.y), steps=0, progress=False)
    assert fitted.local and fitted.rows == (0, 1)
    other = LinearPair()
    x, y = other.x.flip(0)[:4] * 0.5, other.y[:4]  # data that the fit has not seen
    exact = pair.predictive(x).log_prob(y).numpy()
    posterior = fitted.posterior((x, y), 50)
    for estimate in (posterior.elbo(), posterior.evidence()):
        np.testing.assert_allclose(estimate.value, exact, atol=1e-9)
        assert (estimate.se < 1e-9).all()
    np.testing.assert_allclose(fitted.log_predictive_density((x, y), 10).value, exact, atol=1e-9)


@ELBOS
@pytest.mark.parametrize("prior", FAMILIES)
@pytest.mark.parametrize("posterior", FAMILIES)
def test_every_family_is_trained(elbo: type[Trace_ELBO], prior: str, posterior: str) -> None:
    model, guide, x, y = programs(FAMILIES[prior], FAMILIES[posterior])
    elbo().differentiable_loss(model, guide, x, y).backward()
    for name, parameter in [*model.named_parameters(), *guide.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("prior", ["mean-field", "full covariance", "low-rank"])
def test_both_elbos_have_one_mean(prior: str) -> None:
    model, guide, x, y = programs(FAMILIES[prior], LowRank)
    with torch.no_grad():  # apart, so that the KL is not a small one
        guide.family.head.bias[:3] += 1.0
    found = []
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        many = elbo(num_particles=500, vectorize_particles=True, max_plate_nesting=2)
        fitted = [many.loss(model, guide, x, y) for _ in range(8)]
        found.append((np.mean(fitted), np.std(fitted, ddof=1) / 8**0.5))
    (one, one_se), (other, other_se) = found
    assert abs(one - other) < 4.5 * np.hypot(one_se, other_se)
    assert np.hypot(one_se, other_se) < 0.5


def test_minibatches_are_scaled_without_bias() -> None:
    """Under the exact guide each has no noise but its own rows: an epoch averages to the whole."""
    pair = LinearPair()
    expected = -float(pair.predictive(pair.x).log_prob(pair.y).mean())
    options = {"optim": STILL, "progress": False}
    fitted = fit(pair.model, pair.guide, (pair.x, pair.y), batch_size=2, steps=3, **options)
    assert float(fitted.losses.mean()) == pytest.approx(expected, abs=1e-9)
    assert float(fitted.losses.std()) > 0.1
    whole = fit(pair.model, pair.guide, (pair.x, pair.y), steps=1, **options)
    assert float(whole.losses[0]) == pytest.approx(expected, abs=1e-9)


def test_predictions_have_the_exact_moments() -> None:
    pair = LinearPair()
    fitted = fit(pair.model, pair.guide, (pair.x, pair.y), steps=0, progress=False)
    exact, num = pair.predictive(pair.x), 20_000
    draws = fitted.model.predict(pair.x, num)
    assert draws.shape == (num, 6, 4)
    error = (exact.variance / num).sqrt()
    assert ((draws.mean(0) - exact.mean).abs() < 4.5 * error).all()
    centred = draws - exact.mean
    covariance = torch.einsum("sni,snj->nij", centred, centred) / num
    assert (covariance - exact.covariance_matrix).abs().max() < 0.3
    means = fitted.model.predict(pair.x, num, expected=True)
    assert ((means.mean(0) - exact.mean).abs() < 4.5 * error).all()
    torch.testing.assert_close(
        means.var(0).mean(0), exact.variance[0] - pair.s**2, rtol=0.05, atol=0.02
    )


def test_predictive_density_of_an_inexact_guide() -> None:
    pair = LinearPair()
    with torch.no_grad():
        pair.guide.family.head.bias[:2] += 0.2
        pair.guide.family.head.bias[2:4] += 0.3
    fitted = fit(pair.model, pair.guide, (pair.x, pair.y), steps=0, progress=False)
    exact = pair.predictive(pair.x).log_prob(pair.y).numpy()
    found = fitted.log_predictive_density((pair.x, pair.y), 4_000)
    assert (found.se > 1e-4).all() and (found.se < 0.05).all()
    assert (np.abs(found.value - exact) < 5 * found.se).all()
    bound = fitted.posterior((pair.x, pair.y), 4_000).elbo()
    assert (bound.value < exact - 0.01).all()


@pytest.mark.parametrize("prior", ["low-rank", "flow"])
def test_fits_and_predicts(prior: str, tmp_path: Path) -> None:
    model, guide, x, y = programs(FAMILIES[prior])
    loss = TraceMeanField_ELBO()
    fitted = fit(
        *(model, guide, (x, y)),
        **{"loss": loss, "steps": 60, "batch_size": 4, "heldout": (x, y), "progress": False},
        optim=partial(torch.optim.Adam, lr=0.01),
    )
    assert fitted.losses[-10:].mean() < fitted.losses[:10].mean()
    posterior = fitted.posterior((x[:3], y[:3]), 30)
    assert posterior.khat().shape == (3,) and posterior.draws["z"].shape == (30, 3, 3)
    assert fitted.generate(4)["y"].shape == (4, 5)
    assert fitted.reconstruct((x, y))["y"].shape == (7, 5)
    fitted.save(tmp_path / "fit.pt")
    fresh, other, _, _ = programs(FAMILIES[prior])
    loaded = Fit.load(tmp_path / "fit.pt", fresh, other)
    torch.manual_seed(0)
    one = fitted.model.predict(x, 5)
    torch.manual_seed(0)
    assert torch.equal(one, loaded.model.predict(x, 5))


def test_families_are_compared() -> None:
    pair = LinearPair()
    splits = SimpleNamespace(train=(pair.x, pair.y), test=(pair.x[:4], pair.y[:4]))
    guides = {
        "exact": pair.guide,
        "mean-field": PairEncoder((3,), (4,), MeanField(2, 8)).double(),
    }
    frozen = fit(pair.model, pair.guide, splits.train, steps=0, progress=False).model
    result = compare(frozen, guides, splits, steps=3, num_samples=30, optim=STILL, progress=False)
    expected = float(pair.predictive(pair.x[:4]).log_prob(pair.y[:4]).mean())
    assert result.rows[0].elbo == pytest.approx(expected, abs=1e-9)
    assert result.best.family == "exact" and result.rows[1].gap > 0


def test_export_holds_the_predictions() -> None:
    pair = LinearPair()
    fitted = fit(pair.model, pair.guide, (pair.x, pair.y), steps=0, progress=False)
    posterior = fitted.posterior((pair.x, pair.y), 20)
    new = fitted.model.predict(pair.x[:2], 30)
    labels = {"data": list("abcdef"), "y_dim_0": list("pqrs")}
    idata = posterior.to_arviz(predictions={"y": new}, coords=labels, local=True)
    group = idata["predictions"] if hasattr(idata, "children") else idata.predictions
    assert group["y"].dims == ("chain", "draw", "data", "y_dim_0")
    np.testing.assert_array_equal(group["y"].values[0], new.numpy())
    assert list(group["data"].values) == [0, 1] and list(group["y_dim_0"].values) == list("pqrs")
    tree = posterior.to_datatree(predictions={"y": new})
    assert tree["predictions"]["y"].shape == (1, 30, 2, 4)
    assert "predictions" not in posterior.to_datatree().children
    with pytest.raises(ValueError, match=r"of observed sites, and \['z'\] are none"):
        posterior.to_datatree(predictions={"z": new})


def test_predictions_that_are_none_are_not_exported() -> None:
    pair = LinearPair()
    fitted = fit(pair.model, pair.guide, (pair.x, pair.y), steps=0, progress=False)
    posterior = fitted.posterior((pair.x, pair.y), 5)
    new = fitted.model.predict(pair.x[:2], 30)
    tree = posterior.to_datatree(predictions={"y": new.numpy()})
    np.testing.assert_array_equal(tree["predictions"]["y"].values[0], new.numpy())
    for wrong, got in ((new[0], r"\(2, 4\)"), (new[..., 0], r"\(30, 2\)"), (new[0, 0, 0], r"\(\)")):
        words = rf"predictions of 'y': expected shape \(draws, data, 4\), got {got}"
        with pytest.raises(ValueError, match=words):
            posterior.to_datatree(predictions={"y": wrong})
    with pytest.raises(ValueError, match=r"shape \(draws, data, 4\), got \(30, 2, 3\)"):
        posterior.to_datatree(predictions={"y": new[..., :3]})
    with pytest.raises(ValueError, match="predictions of 'y': expected draws without NaN"):
        posterior.to_datatree(predictions={"y": new * np.nan})
    with pytest.raises(TypeError, match=r"a mapping .* such as \{'y': draws\}, got Tensor"):
        posterior.to_datatree(predictions=new)
    for wrong in ("y", 1.0, [1.0]):
        with pytest.raises(TypeError, match="expected a tensor or an array of draws, got"):
            posterior.to_datatree(predictions={"y": wrong})


def test_many_particles_at_once_and_images() -> None:
    model = PredictiveVAE(
        *((1, 4, 8), (1, 4, 8), LowRank(3, 16)),
        **{"likelihood": DiscretizedLogistic(17), "network": ConvEncoder, "decoder": ConvDecoder},
    )
    guide = PairEncoder((1, 4, 8), (1, 4, 8), MeanField(3, 16))
    images = torch.randint(17, (5, 1, 8, 8)) / 16
    x, y = images[:, :, :4], images[:, :, 4:]
    many = TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
    assert many.loss(model, guide, x, y) > 0
    halves = model.predict(x, 6)
    assert halves.shape == (6, 5, 1, 4, 8) and halves.dtype == x.dtype
    assert ((halves * 16 - (halves * 16).round()).abs() < 1e-4).all()


def test_data_that_do_not_fit_are_refused() -> None:
    model, guide, x, y = programs()
    for program in (model, guide):
        with pytest.raises(ValueError, match=r"one number of data points, got \{'x': 7, 'y': 6\}"):
            program(x, y[:6])
        with pytest.raises(ValueError, match=r"expected x of shape \(N, \*\(1, 2, 4\)\), got \(7,"):
            program(x[:, 0], y)
        with pytest.raises(ValueError, match=r"expected y of shape \(N, \*\(5,\)\), got \(7, 4\)"):
            program(x, y[:, :4])
        with pytest.raises(TypeError, match=r"y of the program's dtype, torch.float64, got"):
            program(x, y.float())
        with pytest.raises(TypeError, match=r"x of a floating point dtype, got torch\.int64"):
            program(x.long(), y)
    with pytest.raises(ValueError, match="expected x of shape"):
        model.predict(x[0])
    with pytest.raises(ValueError, match="num_samples to be at least 1, got 0"):
        model.predict(x, 0)
    with pytest.raises(ValueError, match="level of noise from 0 to 0, got 3"):
        model.predict(x, t=3)


def test_arguments_of_the_wrong_kind_are_refused() -> None:
    model, guide, x, y = programs()
    options = {"steps": 1, "progress": False}
    words = r"expected tensors as the program's arguments \(x, y\), but x is "
    with pytest.raises(TypeError, match=f"{words}list"):
        fit(model, guide, (x.tolist(), y.tolist()), **options)
    with pytest.raises(TypeError, match=f"{words}ndarray"):
        guide.encode(x.numpy(), y.numpy())
    with pytest.raises(
        TypeError, match=r"the guide takes \(x: .*, y: .*\), and the data give 1 by"
    ):
        fit(model, guide, x, **options)
    with pytest.raises(TypeError, match=r"the guide takes .* and the data give 3 by position"):
        fit(model, guide, (x, y, y), **options)
    fitted = fit(model, guide, (x, y), **options)
    with pytest.raises(TypeError, match=r"the guide takes .*a tuple such as \(x, y\) for several"):
        fitted.posterior(x)


def test_impossible_arguments_are_refused() -> None:
    family = MeanField(3, 8)
    with pytest.raises(TypeError, match="expected the likelihood to be a module"):
        PredictiveVAE((2,), (2,), family, likelihood=Gaussian)  # type: ignore[arg-type]
    for program in (PredictiveVAE, PairEncoder):
        with pytest.raises(TypeError, match="expected the family to be a module with"):
            program((2,), (2,), nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"expected noise to be an InputNoise.*got 0\.1"):
            program((2,), (2,), family, noise=0.1)
    narrow = PredictiveVAE((2,), (2,), family, decoder=lambda dim, shape: nn.Linear(dim, 2))
    with pytest.raises(ValueError, match=r"decoder's output of \(5, 1, 2\), got \(5, 2\)"):
        narrow(torch.zeros(5, 2), torch.zeros(5, 2))


def test_registers_its_parameters_under_names_of_its_own() -> None:
    model, guide, x, y = programs()
    with pyro.get_param_store().scope() as store:
        Trace_ELBO().loss(model, guide, x, y)
    names = {name.split("$$$")[0].split(".")[0] for name in store["params"]}
    assert names >= {"decoder", "network", "family"}
