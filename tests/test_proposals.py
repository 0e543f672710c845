"""What counts in log q: guides that run the model, flows without an inverse, replaced indices."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import normal_mean, normal_mean_guide
from pyro import poutine
from pyro.distributions.transforms import block_autoregressive, iterated, planar
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
)
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_vi import SVI, Fit, Posterior, compare, fit
from pyro_vi.programs import without_inverse

pytestmark = pytest.mark.usefixtures("double")

X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
EVIDENCE = -1.5 * math.log(2 * math.pi) - math.log(2.0) - 2.5  # of one_mean: N(X; 0, I + 1 1')
Y = torch.tensor(1.3, dtype=torch.float64)
SUM_EVIDENCE = -0.5 * math.log(2 * math.pi * 2.25) - 1.3**2 / 4.5  # of sum_of_two: -1.700


def one_mean(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


class ExactMessenger(AutoNormalMessenger):
    """The exact posterior N(1.5, 1/4), as a guide that runs the model."""

    def get_posterior(self, name: str, prior: Any) -> Any:
        loc = pyro.param("loc", torch.tensor(1.5))
        return dist.Normal(loc, 0.5)


def exact_by_hand(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(1.5)), 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


GUIDES: dict[str, Callable[[], Any]] = {
    "messenger": lambda: ExactMessenger(one_mean),
    "by hand": lambda: exact_by_hand,
}


@pytest.mark.parametrize("name", GUIDES)
def test_observed_sites_of_a_guide_are_no_part_of_log_q(name: str) -> None:
    """The guide is exact, so that every log weight is the log evidence."""
    for loss in (Trace_ELBO(), RenyiELBO(num_particles=2)):
        fitted = fit(one_mean, GUIDES[name](), X, loss=loss, steps=1, progress=False)
        assert 3 * float(fitted.bounds[0]) == pytest.approx(EVIDENCE, abs=1e-6)
    # An exact KL beside a sampled reconstruction, whose sd in one draw is 2.6.
    loss = TraceMeanField_ELBO(num_particles=2_000, vectorize_particles=True)
    fitted = fit(one_mean, GUIDES[name](), X, loss=loss, steps=1, progress=False)
    assert 3 * float(fitted.bounds[0]) == pytest.approx(EVIDENCE, abs=5 * 2.6 / 2_000**0.5)
    fitted = fit(one_mean, GUIDES[name](), X, steps=0, progress=False)
    posterior = fitted.posterior(X, 50)
    assert posterior.log_weights == pytest.approx(EVIDENCE, abs=1e-6)
    assert float(posterior.elbo().value) == pytest.approx(EVIDENCE, abs=1e-6)


@pytest.mark.parametrize("name", GUIDES)
def test_svi_leaves_them_out_too(name: str) -> None:
    svi = SVI(one_mean, GUIDES[name](), pyro.optim.Adam({"lr": 1e-12}), Trace_ELBO())
    if name == "by hand":  # where Pyro warns that it counts them
        warnings.filterwarnings("ignore", message="Found non-auxiliary vars in guide")
    assert [svi.step(X) for _ in range(4)] == pytest.approx([-EVIDENCE] * 4, abs=1e-6)


def test_a_comparison_ranks_a_guide_that_runs_the_model_as_others() -> None:
    guides = {"messenger": ExactMessenger(one_mean), "worse": AutoNormal(one_mean)}
    slow = partial(torch.optim.Adam, lr=1e-12)
    result = compare(one_mean, guides, X, optim=slow, steps=2, num_samples=200, progress=False)
    best, worse = result.rows
    assert best.elbo == pytest.approx(EVIDENCE, abs=1e-6) and worse.elbo < best.elbo
    assert best.kl > 0


def test_what_the_guide_observes_alone_is_an_error() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
        pyro.sample("label", dist.Normal(0.0, 1.0), obs=torch.tensor(5.0))

    with pytest.raises(ValueError, match="the guide observes 'label', which the model does not"):
        fit(one_mean, guide, X, steps=1)
    svi = SVI(one_mean, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(ValueError, match="the guide observes 'label'"), pytest.warns(UserWarning):
        svi.step(X)  # Pyro warns of it first
    with pytest.raises(ValueError, match="'mean' of the model is observed in the guide"):
        fit(normal_mean, poutine.condition(normal_mean_guide, {"mean": torch.tensor(0.0)}), X)


def test_a_factor_of_the_guide_counts_in_log_q() -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(1.5)), 0.5))
        pyro.factor("shift", torch.tensor(0.25), has_rsample=True)

    posterior = fit(one_mean, guide, X, steps=0, progress=False).posterior(X, 20)
    assert posterior.log_weights == pytest.approx(EVIDENCE - 0.25, abs=1e-6)


def local_means(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_scalar_prior_in_a_plate_has_parameters_of_its_own_memory(tmp_path: Path) -> None:
    """Exact: N(x / 2, 1/2), of which the evidence is that of N(0, 2)."""
    guide = AutoNormalMessenger(local_means)
    adam = partial(torch.optim.Adam, lr=0.05)
    fitted = fit(local_means, guide, X, steps=300, optim=adam, progress=False)
    assert fitted.guide.median(X)["z"].tolist() == pytest.approx((X / 2).tolist(), abs=0.2)
    evidence = fitted.posterior(X, 2_000).evidence()
    expected = float(torch.distributions.Normal(0.0, 2**0.5).log_prob(X).sum())
    assert abs(evidence.value - expected) < 5 * evidence.se
    fitted.save(tmp_path / "fit.pt")
    loaded = Fit.load(tmp_path / "fit.pt", local_means, AutoNormalMessenger(local_means))
    assert torch.equal(loaded.posterior(X, 5).log_q, fitted.posterior(X, 5).log_q)
    with pytest.raises(ValueError, match="an autoguide has one set of parameters"):
        fit(local_means, AutoNormalMessenger(local_means), X, batch_size=2, steps=2)


def test_an_expanded_parameter_of_a_module_trains() -> None:
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = PyroParam(torch.zeros(()).expand(3))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc, 0.5**0.5))

    guide = Guide()
    fitted = fit(local_means, guide, X, steps=5, progress=False)
    assert len(fitted.losses) == 5 and guide.loc.tolist() == [0.0] * 3


def sum_of_two(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=y)


class Planar(PyroModule):
    """A planar flow at the model's own site."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = planar(2)

    def forward(self, y: Tensor) -> None:
        pyro.module("flow", self.flow)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


FLOWS: dict[str, Callable[[], Any]] = {
    "iterated": lambda: AutoNormalizingFlow(sum_of_two, partial(iterated, 2, block_autoregressive)),
    "planar": Planar,
}


@pytest.mark.parametrize("name", FLOWS)
def test_flows_without_an_inverse_have_a_posterior(name: str, tmp_path: Path) -> None:
    fitted = fit(sum_of_two, FLOWS[name](), Y, steps=20, progress=False)
    posterior = fitted.posterior(Y, 2_000)
    assert posterior.log_q[:3].tolist() == pytest.approx(_log_q(fitted, posterior, 3), abs=1e-6)
    evidence = posterior.evidence()
    # Block autoregressive flows have bounded values: their draws miss the tails of the posterior.
    error = 5 * evidence.se
    assert -9 - error < evidence.value - SUM_EVIDENCE < error
    assert name == "iterated" or abs(evidence.value - SUM_EVIDENCE) < error
    assert len(np.unique(posterior.log_weights)) == 2_000
    drawn = fitted.predict(Y, 50)["y"]
    assert drawn.shape == (50,) and len(drawn.unique()) == 50
    fitted.save(tmp_path / "fit.pt")
    torch.manual_seed(1)  # other initial parameters
    loaded = Fit.load(tmp_path / "fit.pt", sum_of_two, FLOWS[name]())
    assert torch.equal(loaded.posterior(Y, 20).log_q, fitted.posterior(Y, 20).log_q)


def _log_q(fitted: Fit, posterior: Posterior, num: int) -> list[float]:
    """log N(u; 0, I) - log |det dz/du| of draws z, whose u is found by Newton's method."""
    guide = fitted.guide.function
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    densities = []
    with fitted.guide.state.installed():
        flow = guide.flow if isinstance(guide, Planar) else guide.transform
        for z in posterior.draws["z"][:num]:
            u = next(
                u for u in map(partial(_newton, flow, z), torch.randn(500, 2)) if u is not None
            )
            jacobian = torch.autograd.functional.jacobian(flow, u)
            densities.append(float(base.log_prob(u) - torch.linalg.slogdet(jacobian).logabsdet))
    return densities


def _newton(flow: Any, z: Tensor, u: Tensor) -> Tensor | None:
    """The u with flow(u) = z, or None if these steps do not lead to it."""
    for _ in range(30):
        step = torch.linalg.solve_ex(
            torch.autograd.functional.jacobian(flow, u), flow(u).detach() - z
        )
        u = u - step.result
        if bool(u.isfinite().all()) and torch.allclose(flow(u), z, atol=1e-10):
            return u
    return None


def test_a_local_flow_without_an_inverse_is_known_to_be_amortized() -> None:
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.flow = planar(2)

        def forward(self, y: Tensor) -> None:
            with pyro.plate("data", len(y)):
                base = dist.Normal(torch.zeros(len(y), 2), 1.0).to_event(1)
                pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y), 2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=y)

    fitted = fit(model, Guide(), torch.full((6,), 1.3), batch_size=3, steps=5, progress=False)
    assert fitted.local and fitted.amortized
    evidence = fitted.posterior(torch.full((4,), 1.3), 2_000).evidence()
    assert evidence.value.shape == (4,)
    assert (np.abs(evidence.value - SUM_EVIDENCE) < 5 * evidence.se).all()


def test_a_model_needs_a_density_at_the_guides_draws() -> None:
    flow = planar(2)

    def model(y: Tensor) -> None:
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        z = pyro.sample("z", dist.TransformedDistribution(base, [flow]))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=y)

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"site 'z' of the model: .* Planar has no inverse"):
        fit(model, guide, Y, steps=3, progress=False)


def test_indices_that_a_guide_draws_anew() -> None:
    y = torch.randn(40)

    def model(y: Tensor, index: Tensor) -> None:
        with pyro.plate("data", len(y), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(3 * z, 0.1), obs=y[index])

    def step(guide: Any) -> None:
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), compile=False)
        svi.step(y, torch.arange(10))

    with pytest.warns(UserWarning, match=r"plate 'data': .* parameters for \['z'\]"):
        step(AutoNormal(model))
    with pytest.raises(ValueError, match=r"plate 'data': .* parameters for \['z'\]"):
        fit(model, AutoNormal(model), (y, torch.arange(10)), steps=1)
    pyro.clear_param_store()
    # What the warning says to do: warnings are errors here.
    step(AutoNormal(model, create_plates=lambda y, i: pyro.plate("data", len(y), subsample=i)))
    step(_by_hand)


def _by_hand(y: Tensor, index: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(len(y)))
    with pyro.plate("data", len(y), subsample=index):
        pyro.sample("z", dist.Normal(loc[index], 0.1))


def test_distributions_made_of_inverses_have_a_density() -> None:
    """A Gumbel is made of `ExpTransform().inv`, which has an inverse."""

    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Gumbel(0.0, 1.0))
        inverse = dist.transforms.AffineTransform(0.0, 2.0).inv
        pyro.sample("s", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [inverse]))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Gumbel(m, 1.0), obs=x)

    guides = {"a": AutoNormal(model), "b": AutoMultivariateNormal(model)}
    result = compare(model, guides, X, steps=3, num_samples=30, progress=False)
    assert not result.failures and all(math.isfinite(row.elbo) for row in result.rows)


def test_a_look_for_an_inverse_changes_nothing() -> None:
    norm = dist.transforms.BatchNorm(2)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    before = [buffer.clone() for buffer in norm.buffers()]
    assert without_inverse(dist.TransformedDistribution(base, [norm])) is None
    assert all(map(torch.equal, before, norm.buffers()))
    stack = [torch.distributions.StackTransform([planar(2), planar(2)])]
    assert without_inverse(torch.distributions.TransformedDistribution(base, stack)) == "Planar"
    stack = [torch.distributions.StackTransform([dist.transforms.ExpTransform()] * 2)]
    assert without_inverse(torch.distributions.TransformedDistribution(base, stack)) is None


def test_other_elbos_take_no_guide_that_observes() -> None:
    with pytest.raises(ValueError, match=r"TraceGraph_ELBO counts them in log q"):
        fit(one_mean, exact_by_hand, X, loss=TraceGraph_ELBO(), steps=1, progress=False)
    fitted = fit(
        one_mean, ExactMessenger(one_mean), X, loss=TraceGraph_ELBO(), steps=1, progress=False
    )
    assert -3 * float(fitted.losses[0]) == pytest.approx(EVIDENCE, abs=1e-6)


def test_a_guide_that_runs_the_model_predicts_with_values_alone() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    fitted = fit(model, AutoNormalMessenger(model), (X, X), steps=3, progress=False)
    before = set(fitted.guide.state.tensors())
    with pytest.raises(ValueError, match=r"the guide runs the model, and needs values of \['y'\]"):
        fitted.predict((X[:2],), 10)
    drawn = fitted.predict((X[:2], torch.zeros(2)), 2_000)["y"]
    assert set(fitted.guide.state.tensors()) == before
    assert drawn.std(0).tolist() == pytest.approx([1.0, 1.0], abs=0.15)
