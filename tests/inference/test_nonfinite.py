"""Parameters and values that leave their constraint end a fit with a NonFiniteError."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import normal_mean, normal_mean_guide
from torch import Tensor
from torch.distributions import constraints

from pyro_vi import NonFiniteError, compare, fit

X = torch.tensor([1.0, 2.0, 3.0])
CURE = "The usual cause is a step that is too large: lower the learning rate"


def guide_of(distribution: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    """A guide of the mean whose parameter falls from 1 by the learning rate in each step."""

    def guide(x: Tensor) -> None:
        pyro.sample("mean", distribution(pyro.param("p", torch.tensor(1.0))))

    return guide


def falling(parameters: Any) -> torch.optim.Optimizer:
    """A step of -0.3, whatever the gradient."""

    class Falling(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(0.3)

    return Falling(parameters, lr=1.0)


def support_of(x: Tensor) -> None:
    pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Uniform(0.0, 3.5 * pyro.param("p", torch.tensor(1.0))), obs=x)


def matrix_of(p: Tensor) -> Any:
    matrix = torch.diag(torch.stack([p, p]))
    normal = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) * 0 + matrix, validate_args=False)
    return dist.Normal(normal.rsample().sum(), 1.0)


CASES = {
    "a scale": (
        normal_mean,
        guide_of(lambda p: dist.Normal(0.0, p)),
        4,
        "parameter scale of Normal",
    ),
    "a rate": (
        normal_mean,
        guide_of(lambda p: dist.Gamma(1.0, p)),
        4,
        r"parameter rate of Gamma, of shape \(\), left its constraint GreaterThan",
    ),
    "a support": (
        support_of,
        normal_mean_guide,
        1,
        r"site 'x': a value .* left the support of Unif",
    ),
    "a matrix": (normal_mean, guide_of(matrix_of), 4, "not positive-definite"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_leaves_its_constraint(name: str) -> None:
    """It is named, with the step, and the fit has the parameters of the last finite loss."""
    model, guide, step, words = CASES[name]
    with pytest.raises(NonFiniteError, match=words) as caught:
        fit(model, guide, X, optim=falling, steps=50, progress=False)
    error = caught.value
    assert error.step == step and str(error).startswith(f"step {step}, ") and CURE in str(error)
    assert len(error.fit.losses) == step and bool(error.fit.losses.isfinite().all())
    p = error.fit.guide.state.tensors()["param.p"]
    assert float(p) == pytest.approx(1.0 - 0.3 * (step - 1), abs=1e-6)  # of the last good step
    assert bool(error.fit.posterior(X, 30).log_p.isfinite().all())


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), pyro.param("p", torch.tensor(1.0))))


@pytest.mark.parametrize(("steps", "heldout"), [(9, 4), (4, None)])
def test_what_the_last_update_breaks(steps: int, heldout: int | None) -> None:
    """p is 1, 0.7, 0.4, 0.1 in four good steps, and -0.2 after them."""
    options: dict[str, Any] = {"optim": falling, "steps": steps, "progress": False}
    if heldout:
        options |= {"heldout": X, "heldout_every": heldout}
    where = "in the held-out bound" if heldout else "with the last parameters"
    with pytest.raises(NonFiniteError, match=f"^step 4, {where}: parameter scale") as caught:
        fit(local, local_guide, X, **options)
    assert len(caught.value.fit.losses) == 4
    assert float(caught.value.fit.guide.state.tensors()["param.p"]) == pytest.approx(0.1, abs=1e-6)


def test_a_scale_that_underflows() -> None:
    """The usual divergence: a learning rate of a thousand."""
    for seed in range(3):
        with pytest.raises(NonFiniteError) as caught:
            fit(
                normal_mean,
                normal_mean_guide,
                X,
                optim=partial(torch.optim.Adam, lr=1e3),
                steps=100,
                seed=seed,
                progress=False,
            )
        assert bool(caught.value.fit.posterior(X, 30).log_q.isfinite().all())


def test_a_loss_that_is_a_nan_keeps_the_last_good_parameters_too() -> None:
    def root(p: Tensor) -> Any:
        return dist.Normal((p - 0.5).sqrt(), 1.0)

    with pytest.raises(NonFiniteError, match=r"^step 2, .* values are nan") as caught:
        fit(normal_mean, guide_of(root), X, optim=falling, steps=9, progress=False)
    assert float(caught.value.fit.guide.state.tensors()["param.p"]) == pytest.approx(0.7)


def test_restarts_and_families_that_end_so_are_left_out() -> None:
    def scale(p: Tensor) -> Any:
        scale = pyro.param("scale", torch.tensor(0.0)).exp() - 0.8
        return dist.Normal(p, scale)

    guides = {"falls": guide_of(lambda p: dist.Normal(0.0, p)), "stays": normal_mean_guide}
    options: dict[str, Any] = {"optim": falling, "steps": 30, "num_samples": 30}
    result = compare(normal_mean, guides, X, progress=False, **options)
    failed = result.failures["falls"]
    assert isinstance(failed, NonFiniteError) and list(result.fits) == ["stays"]
    assert result.rows[0].status.startswith("failed: step ") and math.isnan(result.rows[0].elbo)
    with pytest.warns(
        UserWarning, match=r"restart \d of 4 is skipped: step 0, before the first site"
    ):
        fitted = fit(
            normal_mean,
            guide_of(scale),
            X,
            optim=partial(torch.optim.SGD, lr=0.01),
            steps=30,
            restarts=4,
            progress=False,
        )
    assert 1 <= len(fitted.restarts) < 4


def test_data_outside_of_their_support_are_no_divergence() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x: Tensor) -> None:
        rate = pyro.param("rate_", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(2.0, rate))

    def damage(x: Tensor) -> Tensor:
        counts.append(1)
        return x - 10 * (len(counts) > 5)

    counts: list[int] = []
    with pytest.raises(ValueError, match="within the support") as caught:
        fit(model, guide, X, transform=damage, steps=30, progress=False)
    assert "at step" in caught.value.__notes__[0]


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_data_are_refused_by_name(value: float) -> None:
    x = torch.tensor([1.0, value, 2.0])
    with pytest.raises(ValueError, match="1 infinite values among the 3 of argument 0"):
        fit(normal_mean, normal_mean_guide, x, steps=1)
    with pytest.raises(ValueError, match="1 infinite values among the 3 of argument 'x'"):
        fit(normal_mean, normal_mean_guide, {"x": x}, steps=1)
