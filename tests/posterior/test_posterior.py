"""Posterior draws: exact where the guide is, in every layout of plates, whatever the chunks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

from pyro_vi.models import LinearGaussian
from pyro_vi.posterior import Posterior, Scorer, scoring

torch.set_num_threads(1)


def draw_posterior(
    model: Any, guide: Any, data: Any, *, num_samples: int, plate: str = "data", seed: int = 0
) -> Posterior:
    return Scorer(model, guide, data, plate).posterior(num_samples, seed=seed)


def oracle(device: torch.device, d: int = 4, k: int = 2) -> tuple[LinearGaussian, Tensor]:
    weight = 0.4 * torch.randn(d, k, dtype=torch.float64)
    x = torch.randn(6, d, dtype=torch.float64)
    return LinearGaussian(weight, 0.3 * x[0], 0.8).to(device), x.to(device)


def exact_guide(model: LinearGaussian) -> Any:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", model.posterior(x))

    return guide


def mean_field_guide(model: LinearGaussian) -> Any:
    """The best one: the exact mean, and the variances 1 / P_jj."""

    def guide(x: Tensor) -> None:
        q = dist.Normal(model.posterior(x).mean, model.precision.diagonal().rsqrt())
        with pyro.plate("data", len(x)):
            pyro.sample("z", q.to_event(1))

    return guide


def at_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Holds so many rows (data points x draws) in memory at once."""
    monkeypatch.setattr(scoring, "_WIDTH", 2**10)  # more than the sites of these programs hold
    monkeypatch.setattr(scoring, "_VALUES", rows * 2**10)


def assert_within(error: Any, se: Any) -> None:
    assert (np.abs(np.asarray(error)) < 5 * np.asarray(se)).all()


# Known answers


def test_an_exact_guide_weighs_every_draw_by_the_evidence(device: torch.device) -> None:
    model, x = oracle(device)
    posterior = draw_posterior(model, exact_guide(model), x, num_samples=200)
    evidence = model.log_evidence(x).cpu()
    weights = posterior.log_p - posterior.log_q
    torch.testing.assert_close(weights, evidence.expand(200, 6), atol=1e-10, rtol=0)
    assert weights.std(0).max() < 1e-10
    np.testing.assert_allclose(posterior.elbo().value, evidence, atol=1e-10)
    np.testing.assert_allclose(posterior.evidence().value, evidence, atol=1e-10)
    np.testing.assert_allclose(posterior.kl_to_posterior().value, 0, atol=1e-10)
    assert (posterior.khat() == -math.inf).all()  # the weights have no tail
    np.testing.assert_allclose(posterior.ess(), 200)


def test_draws_are_the_posteriors(device: torch.device) -> None:
    model, x = oracle(device)
    draws = draw_posterior(model, exact_guide(model), x, num_samples=10_000).draws["z"]
    exact = model.posterior(x)
    mean, covariance = exact.mean.cpu(), exact.covariance_matrix.cpu()
    for n in range(len(x)):
        variance = covariance[n].diagonal()
        assert_within(draws[:, n].mean(0) - mean[n], (variance / 10_000).sqrt())
        spread = (torch.outer(variance, variance) + covariance[n] ** 2) / 10_000
        assert_within(torch.cov(draws[:, n].T) - covariance[n], spread.sqrt())


def test_the_gap_of_the_best_mean_field_guide(device: torch.device) -> None:
    model, x = oracle(device)
    posterior = draw_posterior(model, mean_field_guide(model), x, num_samples=20_000)
    gap, evidence = model.mean_field_gap().item(), model.log_evidence(x).cpu().numpy()
    kl, elbo, iw = posterior.kl_to_posterior(), posterior.elbo(), posterior.evidence()
    assert gap > 10 * kl.se.max()  # there is something to see
    assert_within(kl.value - gap, kl.se)
    assert_within(elbo.value - (evidence - gap), elbo.se)
    assert_within(iw.value - evidence, iw.se)
    assert (posterior.khat() < 0.5).all()


def test_the_parts_are_densities_at_the_draws(device: torch.device) -> None:
    model, x = oracle(device)
    posterior = draw_posterior(model, mean_field_guide(model), x, num_samples=7)
    z = posterior.draws["z"].to(x)
    mean = z @ model.weight.T + model.bias
    likelihood = dist.Normal(mean, model.scale).log_prob(x).sum(-1).cpu()
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1).cpu()
    sd = model.precision.diagonal().rsqrt()
    q = dist.Normal(model.posterior(x).mean, sd).log_prob(z).sum(-1).cpu()
    close = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(posterior.pointwise_log_likelihood(), likelihood, **close)
    torch.testing.assert_close(posterior.log_p, likelihood + prior, **close)
    torch.testing.assert_close(posterior.log_q, q, **close)
    np.testing.assert_allclose(posterior.log_weights, likelihood + prior - q, atol=1e-12)


def test_shapes_devices_and_precision(device: torch.device) -> None:
    model, x = oracle(device)
    for number in (x.double(), x.float()):
        own = model.to(number.dtype)
        posterior = draw_posterior(own, exact_guide(own), number, num_samples=3)
        for value in (posterior.log_p, posterior.log_q, posterior.log_likelihood["x"]):
            assert value.shape == (3, 6) and value.dtype == torch.float64
            assert value.device.type == "cpu"
        assert posterior.draws["z"].shape == (3, 6, 2)
        assert posterior.draws["z"].dtype == number.dtype
        assert posterior.draws["z"].device.type == "cpu"
        assert posterior.log_weights.dtype == np.float64


def test_units_that_the_data_do_not_move_are_inactive() -> None:
    model = LinearGaussian(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.zeros(2), 0.5)
    x = 2 * torch.randn(30, 2)
    posterior = draw_posterior(model, exact_guide(model), x, num_samples=2_000)
    assert posterior.active_units()["z"].tolist() == [True, False]


def test_the_seed_is_all_the_randomness() -> None:
    model, x = oracle(torch.device("cpu"))
    guide = exact_guide(model)
    state = torch.get_rng_state()
    first = draw_posterior(model, guide, x, num_samples=5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    again = draw_posterior(model, guide, x, num_samples=5, seed=3)
    other = draw_posterior(model, guide, x, num_samples=5, seed=4)
    assert torch.equal(first.draws["z"], again.draws["z"])
    assert torch.equal(first.log_p, again.log_p)
    assert not torch.equal(first.draws["z"], other.draws["z"])
    # No two draws and no two data points share their noise.
    mean = model.posterior(x).mean
    assert (first.draws["z"] - mean).flatten(0, 1).unique(dim=0).shape == (30, 2)


# Layouts


def scale_model(x: Tensor) -> None:
    """A latent matrix for each data point, and data of two axes."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2, 3), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(2), obs=x)


def scale_guide(x: Tensor) -> None:
    """Exact: precision 1 + 4, mean 4/5 x."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5).to_event(2))


def right_model(x: Tensor) -> None:
    """A plate to the right of "data": rows of x are data points, columns are in the plate."""
    data, inner = pyro.plate("data", len(x), dim=-2), pyro.plate("inner", x.shape[1], dim=-1)
    with data, inner:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def right_guide(x: Tensor) -> None:
    data, inner = pyro.plate("data", len(x), dim=-2), pyro.plate("inner", x.shape[1], dim=-1)
    with data, inner:
        pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))


def left_model(x: Tensor) -> None:
    """A plate to the left of "data"."""
    data, inner = pyro.plate("data", len(x), dim=-1), pyro.plate("inner", x.shape[1], dim=-2)
    with data, inner:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x.T)


def left_guide(x: Tensor) -> None:
    data, inner = pyro.plate("data", len(x), dim=-1), pyro.plate("inner", x.shape[1], dim=-2)
    with data, inner:
        pyro.sample("z", dist.Normal(0.8 * x.T, 0.2**0.5))


def many_model(x: Tensor) -> None:
    """Sites one by one in a sequential plate inside "data"."""
    with pyro.plate("data", len(x)):
        for i in pyro.plate("inner", x.shape[1]):
            z = pyro.sample(f"z_{i}", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 0.5), obs=x[:, i])


def many_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        for i in pyro.plate("inner", x.shape[1]):
            pyro.sample(f"z_{i}", dist.Normal(0.8 * x[:, i], 0.2**0.5))


def joint_draws(posterior: Posterior) -> Tensor:
    draws = posterior.draws
    if "z" in draws:
        return draws["z"]
    return torch.stack([draws[f"z_{i}"] for i in range(len(draws))], -1)


@pytest.mark.parametrize("rows", [2**14, 5])
@pytest.mark.parametrize(
    ("model", "guide", "shape"),
    [
        (scale_model, scale_guide, (2, 3)),
        (right_model, right_guide, (3,)),
        (left_model, left_guide, (3,)),
        (many_model, many_guide, (3,)),
    ],
    ids=["events", "plate right", "plate left", "sequential"],
)
def test_layouts_of_plates_and_events(
    model: Any, guide: Any, shape: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent z_i ~ N(0, 1), x_i ~ N(z_i, 1/2) in any layout; the guide is exact."""
    at_once(monkeypatch, rows)
    x = torch.randn(4, *shape, dtype=torch.float64)
    posterior = draw_posterior(model, guide, x, num_samples=6)
    z = joint_draws(posterior)
    assert z.shape == (6, 4, *shape)
    evidence = dist.Normal(torch.zeros(()).double(), 1.25**0.5).log_prob(x).flatten(1).sum(-1)
    likelihood = dist.Normal(z, 0.5).log_prob(x).flatten(2).sum(-1)
    q = dist.Normal(0.8 * x, 0.2**0.5).log_prob(z).flatten(2).sum(-1)
    close = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(posterior.pointwise_log_likelihood(), likelihood, **close)
    torch.testing.assert_close(posterior.log_q, q, **close)
    torch.testing.assert_close(posterior.log_p - posterior.log_q, evidence.expand(6, 4), **close)
    assert posterior.num_observed == math.prod(shape)


def test_a_latent_that_a_plate_inside_shares() -> None:
    """z outside, and x inside, of a plate within "data": K observations of each z."""

    def model(x: Tensor) -> None:
        data, inner = pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3, dim=-1)
        with data:
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with inner:
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            loc = 4 * x.sum(-1, keepdim=True) / 13
            pyro.sample("z", dist.Normal(loc, 13**-0.5))

    x = torch.randn(4, 3, dtype=torch.float64)
    posterior = draw_posterior(model, guide, x, num_samples=5)
    covariance = torch.ones(3, 3).double() + 0.25 * torch.eye(3)
    evidence = dist.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x)
    torch.testing.assert_close(
        posterior.log_p - posterior.log_q, evidence.expand(5, 4), atol=1e-10, rtol=0
    )
    assert posterior.draws["z"].shape == (5, 4)
    assert posterior.num_observed == 3


def test_auxiliary_sites_of_the_guide_count_in_log_q() -> None:
    """z = 2 u + 1 of an auxiliary u: its log-determinant is in the density of the Delta."""
    model, x = oracle(torch.device("cpu"), k=1)

    def guide(x: Tensor) -> None:
        exact = model.posterior(x)
        loc, sd = exact.mean, exact.stddev
        with pyro.plate("data", len(x)):
            u = pyro.sample(
                "u", dist.Normal((loc - 1) / 2, sd / 2).to_event(1), infer={"is_auxiliary": True}
            )
            density = x.new_full((len(x),), -math.log(2))
            pyro.sample("z", dist.Delta(2 * u + 1, log_density=density, event_dim=1))

    posterior = draw_posterior(model, guide, x, num_samples=9)
    assert list(posterior.draws) == ["z"]
    torch.testing.assert_close(
        posterior.log_p - posterior.log_q, model.log_evidence(x).expand(9, 6), atol=1e-10, rtol=0
    )


def chain_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        first = pyro.sample("first", dist.Normal(x.new_zeros(()), 1.0))
        second = pyro.sample("second", dist.Normal(first, 1.0))
        pyro.sample("x", dist.Normal(second, 1.0), obs=x)


def chain_guide(x: Tensor) -> None:
    """Exact, and in the other order: second | x ~ N(2/3 x, 2/3), first | second ~ N(./2, 1/2)."""
    with pyro.plate("data", len(x)):
        second = pyro.sample("second", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
        pyro.sample("first", dist.Normal(second / 2, 0.5**0.5))


@pytest.mark.parametrize("rows", [2**14, 5])
def test_latents_that_depend_on_each_other(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, rows)
    x = 3 * torch.randn(4, dtype=torch.float64)
    posterior = draw_posterior(chain_model, chain_guide, x, num_samples=7)
    evidence = dist.Normal(torch.zeros(()).double(), 3**0.5).log_prob(x)
    torch.testing.assert_close(
        posterior.log_p - posterior.log_q, evidence.expand(7, 4), atol=1e-10, rtol=0
    )
    first, second = posterior.draws["first"], posterior.draws["second"]
    torch.testing.assert_close(
        posterior.pointwise_log_likelihood(),
        dist.Normal(second, 1.0).log_prob(x),
        atol=1e-10,
        rtol=0,
    )
    joint = dist.Normal(0.0, 1.0).log_prob(first) + dist.Normal(first, 1.0).log_prob(second)
    torch.testing.assert_close(
        posterior.log_p - posterior.pointwise_log_likelihood(), joint, atol=1e-10, rtol=0
    )


def test_arguments_of_each_kind_stay_together() -> None:
    """Data points of a tuple or a dict are repeated and split alike."""

    def model(x: Tensor, scale: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x: Tensor, scale: Tensor) -> None:
        with pyro.plate("data", len(x)):
            precision = 1 + scale**-2
            pyro.sample("z", dist.Normal(x / scale**2 / precision, precision**-0.5))

    x, scale = torch.randn(2, 5, dtype=torch.float64).unbind()
    scale = scale.exp()
    evidence = dist.Normal(0.0, (1 + scale**2).sqrt()).log_prob(x)
    for data in ((x, scale), {"scale": scale, "x": x}):
        posterior = draw_posterior(model, guide, data, num_samples=4)
        torch.testing.assert_close(
            posterior.log_p - posterior.log_q, evidence.expand(4, 5), atol=1e-10, rtol=0
        )


def test_masked_values_do_not_count() -> None:
    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = torch.where(seen, x / 2, torch.zeros_like(x))
            scale = torch.where(seen, torch.full_like(x, 0.5**0.5), torch.ones_like(x))
            pyro.sample("z", dist.Normal(loc, scale))

    x = torch.randn(4, dtype=torch.float64)
    seen = torch.tensor([True, False, True, False])
    posterior = draw_posterior(model, guide, (x, seen), num_samples=3)
    evidence = dist.Normal(torch.zeros(()).double(), 2**0.5).log_prob(x) * seen
    torch.testing.assert_close(
        posterior.log_p - posterior.log_q, evidence.expand(3, 4), atol=1e-10, rtol=0
    )
    assert (posterior.pointwise_log_likelihood()[:, ~seen] == 0).all()


def test_another_name_of_the_plate() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("patients", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("patients", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(3, dtype=torch.float64)
    posterior = draw_posterior(model, guide, x, num_samples=3, plate="patients")
    np.testing.assert_allclose(posterior.kl_to_posterior().value, 0, atol=1e-10)
    assert draw_posterior(model, guide, x, num_samples=3).is_joint  # no plate "data"


def test_what_the_data_are() -> None:
    def program(*likelihoods: Any) -> Any:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))
                for i, likelihood in enumerate(likelihoods):
                    pyro.sample(f"x_{i}", likelihood.to_event(1), obs=x)

        return model

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.ones(4, 3)
    coin, normal = dist.Bernoulli(torch.full((3,), 0.5)), dist.Normal(torch.ones(3), 1.0)
    for likelihoods, observed, discrete in (
        ((coin,), 3, True),
        ((normal,), 3, False),
        ((coin, coin), 6, True),
        ((coin, normal), 6, False),
        ((), 0, False),
    ):
        posterior = draw_posterior(program(*likelihoods), guide, x, num_samples=2)
        assert (posterior.num_observed, posterior.discrete) == (observed, discrete)
        expected = sum(3 * float(d.log_prob(torch.ones(3))[0]) for d in likelihoods)
        found = posterior.pointwise_log_likelihood()
        torch.testing.assert_close(found, torch.full((2, 4), expected).double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(posterior.log_p - posterior.log_q, found, atol=1e-6, rtol=0)


# Chunks


@pytest.mark.parametrize("rows", [1, 7, 12, 13, 60])
@pytest.mark.parametrize("num_samples", [1, 6, 50])
def test_chunks_keep_draws_and_data_points_in_their_places(
    rows: int, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evidence names the data point, and log q the draw: nothing may be exchanged."""
    at_once(monkeypatch, rows)
    model, x = oracle(torch.device("cpu"))
    posterior = draw_posterior(model, exact_guide(model), x, num_samples=num_samples)
    assert posterior.draws["z"].shape == (num_samples, 6, 2)
    evidence = model.log_evidence(x).expand(num_samples, 6)
    torch.testing.assert_close(posterior.log_p - posterior.log_q, evidence, atol=1e-10, rtol=0)
    again = model.posterior(x).log_prob(posterior.draws["z"])
    torch.testing.assert_close(posterior.log_q, again, atol=1e-10, rtol=0)
    assert posterior.draws["z"].flatten(0, 1).unique(dim=0).shape == (6 * num_samples, 2)


def test_a_guide_without_noise_gives_the_same_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = oracle(torch.device("cpu"))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x[:, :2], event_dim=1))

    whole = draw_posterior(model, guide, x, num_samples=10)
    for rows in (1, 3, 17, 59):
        at_once(monkeypatch, rows)
        parts = draw_posterior(model, guide, x, num_samples=10)
        assert torch.equal(parts.draws["z"], whole.draws["z"])
        torch.testing.assert_close(parts.log_p, whole.log_p, atol=1e-12, rtol=0)
        assert (parts.num_observed, parts.discrete) == (whole.num_observed, whole.discrete)


def test_estimates_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = oracle(torch.device("cpu"))
    guide = mean_field_guide(model)
    whole = draw_posterior(model, guide, x, num_samples=3_000, seed=0)
    at_once(monkeypatch, 1_001)
    parts = draw_posterior(model, guide, x, num_samples=3_000, seed=1)
    for estimate in (Posterior.elbo, Posterior.evidence, Posterior.kl_to_posterior):
        a, b = estimate(whole), estimate(parts)
        assert_within(a.value - b.value, np.hypot(a.se, b.se))
        assert not np.array_equal(a.value, b.value)


# Wrong arguments


@pytest.mark.parametrize("side", ["model", "guide"])
def test_scaled_sites_are_refused(side: str) -> None:
    model, x = oracle(torch.device("cpu"))
    programs = {"model": model, "guide": exact_guide(model)}
    programs[side] = poutine.scale(programs[side], scale=0.5)
    with pytest.raises(ValueError, match="is scaled by the program: scaled densities are no post"):
        draw_posterior(**programs, data=x, num_samples=3)


def test_plates_that_subsample_themselves_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("z", dist.Normal(x[index], 1.0))

    with pytest.raises(ValueError, match="scaled by the program"):
        draw_posterior(model, guide, torch.randn(4), num_samples=3)


@pytest.mark.parametrize("count", [0, -1, True, False, 1.5, 2.0, "3", None])
def test_impossible_numbers_of_draws_are_refused(count: Any) -> None:
    model, x = oracle(torch.device("cpu"))
    with pytest.raises(ValueError, match=f"at least one posterior draw, got {count!r}"):
        draw_posterior(model, exact_guide(model), x, num_samples=count)


def test_data_that_the_programs_refuse_are_refused() -> None:
    model, x = oracle(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"expected data of shape \(N, 4\), got \(1, 5\)"):
        draw_posterior(model, exact_guide(model), torch.ones(1, 5).double(), num_samples=3)
    with pytest.raises(ValueError, match="at least one data point"):
        draw_posterior(model, exact_guide(model), x[:0], num_samples=3)
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match="got 1 NaN"):
        draw_posterior(model, exact_guide(model), x, num_samples=3)
    with pytest.raises(TypeError, match="got list"):
        draw_posterior(model, exact_guide(model), [1.0], num_samples=3)  # type: ignore[arg-type]


def test_guides_of_other_models_are_refused() -> None:
    model, x = oracle(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"'z' of the model is missing from the guide"):
        draw_posterior(model, lambda x: None, x, num_samples=3)
