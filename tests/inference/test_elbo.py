"""Pyro's bounds, told apart, and right where Pyro's own are silently wrong."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import SCHOOLS_SIGMA, SCHOOLS_Y, eight_schools
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor

from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.guides import Encoder
from pyro_vi.inference import with_terms
from pyro_vi.programs import FixedSites


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO, RenyiELBO])
def test_the_bound_and_its_gradient_are_pyros(kind: type) -> None:
    loc = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    pyro.get_param_store().setdefault("loc", loc)
    x = torch.linspace(-1, 2, 5, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc") * x, 0.6))

    found = []
    for loss in (kind(num_particles=3), with_terms(kind(num_particles=3))):
        torch.manual_seed(1)
        value = loss.loss_and_grads(model, guide, x)
        found.append((value, pyro.param("loc").grad.clone()))
        pyro.param("loc").grad = None
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-12)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-12)


def local_pair(z_scale: float = 0.6) -> tuple[object, object, Tensor]:
    x = torch.linspace(-1, 2, 5, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, z_scale))

    return model, guide, x


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("vectorize", [False, True])
def test_reconstruction_and_kl_are_apart(particles: int, vectorize: bool) -> None:
    model, guide, x = local_pair()
    loss = with_terms(
        TraceMeanField_ELBO(
            num_particles=particles, vectorize_particles=vectorize, max_plate_nesting=1
        )
    )
    value = loss.loss(model, guide, x)
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.8 * x, 0.6), torch.distributions.Normal(torch.zeros(()), 1.0)
    ).sum()
    assert loss.kl() == pytest.approx(float(exact), abs=1e-10)
    assert loss.reconstruction() - loss.kl() == pytest.approx(-float(value), abs=1e-10)


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_kl_beside_a_large_reconstruction_is_not_lost(kind: type) -> None:
    """In float32 a loss of 1e9 is told to 64 nats."""
    x = torch.linspace(1e4, 4e4, 3)
    q, p = dist.Normal(torch.tensor(0.8), 0.3), dist.Normal(torch.tensor(0.0), 1.0)
    drawn = torch.tensor([0.5, 1.0, 1.2])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", p), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    loss = with_terms(kind())
    loss.loss(model, FixedSites({"z": drawn})(guide), x)
    kl = torch.distributions.kl_divergence(q, p) * 3
    sampled = (q.log_prob(drawn) - p.log_prob(drawn)).sum()
    exact = float(kl if kind is TraceMeanField_ELBO else sampled)
    assert loss.reconstruction() < -1e9 and loss.kl() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_kl_of_several_sites_and_particles_is_pyros(particles: int, hidden: bool) -> None:
    """Closed forms, sampled terms and auxiliary sites add up to what the bound has."""
    x = torch.linspace(-1, 2, 5, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, not hidden])

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.LogNormal(x.new_tensor(0.0), 2.0))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(mean * torch.ones_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("extra", dist.Normal(x.new_tensor(0.0), 1.0), infer={"is_auxiliary": True})
        pyro.sample("mean", dist.Gamma(x.new_tensor(2.0), 1.0))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.8 * x, 0.6))

    for kind in (Trace_ELBO, TraceMeanField_ELBO):
        values = []
        for loss in (kind(num_particles=particles), with_terms(kind(num_particles=particles))):
            torch.manual_seed(3)
            values.append(float(loss.loss(model, guide, x)))
        assert values[0] == values[1]
        assert loss.kl() == pytest.approx(values[1] + loss.reconstruction(), abs=1e-10)


def test_the_importance_weighted_kl_is_the_sampled_one() -> None:
    model, guide, x = local_pair()
    weighted, plain = (
        with_terms(RenyiELBO(num_particles=50)),
        with_terms(Trace_ELBO(num_particles=50)),
    )
    torch.manual_seed(2)
    a = weighted.loss(model, guide, x)
    torch.manual_seed(2)
    b = plain.loss(model, guide, x)
    assert a < b  # a tighter bound
    assert weighted.reconstruction() == pytest.approx(plain.reconstruction(), abs=1e-10)
    assert weighted.kl() == pytest.approx(plain.kl(), abs=1e-10)


@pytest.mark.parametrize(
    "family",
    [MeanField(3, 4), FullCovariance(3, 4), LowRank(3, 4, rank=2)],
    ids=lambda family: type(family).__name__,
)
@pytest.mark.parametrize("prior", ["independent", "joint", "low-rank"])
def test_gaussian_families_have_an_analytic_kl(family: torch.nn.Module, prior: str) -> None:
    """No sampling noise in the KL, whatever form the normal prior is written in."""
    family = family.double()
    torch.nn.init.normal_(family.head.weight, std=0.5)
    guide = Encoder((4,), family, network=lambda shape, width: torch.nn.Identity())
    x = torch.randn(6, 4, dtype=torch.float64)
    zeros, ones = x.new_zeros(6, 3), x.new_ones(6, 3)
    p = {
        "independent": dist.Normal(zeros, 2.0).to_event(1),
        "joint": dist.MultivariateNormal(zeros, scale_tril=2 * torch.eye(3).double()),
        "low-rank": dist.LowRankMultivariateNormal(zeros, ones[..., None] * 1e-3, 4 * ones),
    }[prior]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", p)

    loss = with_terms(TraceMeanField_ELBO())
    values = torch.tensor(
        [float(loss.loss(model, guide, x)) for _ in range(10)], dtype=torch.float64
    )
    assert float(values.std()) < 1e-10
    with torch.no_grad():  # and it is the KL
        exact = torch.distributions.kl_divergence(dense(guide.encode(x)), dense(p)).sum()
    assert float(values[0]) == pytest.approx(float(exact), rel=1e-10)


def dense(fn: Any) -> torch.distributions.Distribution:
    """A normal by its covariance matrix."""
    variance = fn.variance.diag_embed()
    covariance = getattr(fn, "covariance_matrix", variance)
    return torch.distributions.MultivariateNormal(fn.mean, covariance)


@pytest.mark.parametrize("kind", [AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal])
def test_constrained_latents_under_an_autoguide(kind: type) -> None:
    """TraceMeanField_ELBO gives Trace_ELBO's bound; Pyro's own is 1.6 nats off for the first."""
    y, sigma = SCHOOLS_Y.double(), SCHOOLS_SIGMA.double()
    guide = kind(eight_schools, init_scale=0.4)
    guide(y, sigma)
    values = {}
    for name, loss in (("mean-field", TraceMeanField_ELBO()), ("trace", Trace_ELBO())):
        bound = with_terms(loss)
        torch.manual_seed(0)
        with torch.no_grad():
            values[name] = torch.tensor(
                [float(bound.loss(eight_schools, guide, y, sigma)) for _ in range(200)]
            )
    # The same draws and no KL in closed form: equal draw by draw, not only on average.
    assert torch.allclose(values["mean-field"], values["trace"], atol=1e-8)


def test_a_point_mass_is_scored_at_its_point() -> None:
    y, sigma = SCHOOLS_Y.double(), SCHOOLS_SIGMA.double()
    guide = AutoDelta(eight_schools)
    guide(y, sigma)
    losses = [
        float(with_terms(kind()).loss(eight_schools, guide, y, sigma))
        for kind in (TraceMeanField_ELBO, Trace_ELBO)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


def test_another_order_of_sites_is_an_error_of_the_mean_field_bound_alone() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def guide() -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(b, 1.0))

    with pytest.raises(ValueError, match=r"\['a', 'b'\].*\['b', 'a'\].*use Trace_ELBO"):
        with_terms(TraceMeanField_ELBO()).loss(model, guide)
    with_terms(Trace_ELBO()).loss(model, guide)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_a_mask_or_scale_on_one_side_is_heard(scale: float) -> None:
    """Pyro's mean-field KL reads the guide's mask and scale alone; Trace_ELBO is the reference."""
    model, guide, x = local_pair()
    mask = torch.tensor([True, False, True, False, True])
    altered = pyro.poutine.scale(pyro.poutine.mask(model, mask=mask), scale=scale)
    means, errors = [], []
    for kind in (TraceMeanField_ELBO, Trace_ELBO):
        loss = with_terms(kind(num_particles=2000, vectorize_particles=True, max_plate_nesting=1))
        values = torch.tensor([float(loss.loss(altered, guide, x)) for _ in range(20)])
        means.append(float(values.mean()))
        errors.append(float(values.std()) / 20**0.5)
    assert abs(means[0] - means[1]) < 5 * sum(errors)


def test_a_factor_in_the_guide_belongs_to_the_kl() -> None:
    model, guide, x = local_pair()

    def with_factor(x: Tensor) -> None:
        guide(x)
        pyro.factor("extra", x.new_tensor(1.0), has_rsample=True)

    found = []
    for program in (guide, with_factor):
        loss = with_terms(Trace_ELBO())
        torch.manual_seed(0)
        loss.loss(model, program, x)
        found.append((loss.reconstruction(), loss.kl()))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-10)
    assert found[1][1] == pytest.approx(found[0][1] + 1, abs=1e-10)


def test_an_order_that_no_closed_form_relies_on_is_fine() -> None:
    """AutoStructured samples in an order of its own, as point masses with a density."""
    y, sigma = SCHOOLS_Y, SCHOOLS_SIGMA  # its networks are of the default dtype
    guide = AutoStructured(eight_schools, conditionals="normal", dependencies="linear")
    guide(y, sigma)
    values = []
    for kind in (TraceMeanField_ELBO, Trace_ELBO):
        torch.manual_seed(0)
        values.append(float(with_terms(kind()).loss(eight_schools, guide, y, sigma)))
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_scaled_sites_are_refused_by_the_importance_weighted_bound() -> None:
    model, guide, x = local_pair()
    with pytest.raises(ValueError, match=r"'z' is scaled by 0\.5"):
        with_terms(RenyiELBO()).loss(pyro.poutine.scale(model, scale=0.5), guide, x)
    with_terms(RenyiELBO()).loss(pyro.poutine.mask(model, mask=torch.ones(5) > 0), guide, x)


def test_orders_that_bound_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="alpha = -1 < 0 is no lower bound"):
        with_terms(RenyiELBO(alpha=-1))
    assert with_terms(RenyiELBO(alpha=0.5)).alpha == 0.5


def test_other_bounds_pass_as_they_are() -> None:
    loss: ELBO = TraceGraph_ELBO()
    assert with_terms(loss) is loss


def test_the_first_site_that_is_not_finite_is_named() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.factor("penalty", z * float("inf"))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))

    loss = with_terms(Trace_ELBO())
    with pytest.warns(UserWarning, match="Encountered"):
        loss.loss(model, guide, torch.tensor(1.0))
    assert "site 'penalty' of the model" in loss.first_nonfinite()
