"""`pyro.plate("data")` without a size gives what a plate with its size gives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger
from torch import Tensor
from torch.distributions import constraints

from pyro_vi import Fit, compare, fit

pytestmark = pytest.mark.usefixtures("double")

Plate = Callable[[Tensor], Any]
SIZED: Plate = lambda x: pyro.plate("data", len(x))  # noqa: E731
UNSIZED: Plate = lambda x: pyro.plate("data")  # noqa: E731


def local(plate: Plate) -> tuple[Any, Any]:
    """Latents of single data points; their prior is a scalar, and has its shape from the plate."""

    def model(x: Tensor) -> None:
        mean = pyro.param("mean", torch.tensor(0.0))
        with plate(x):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(0.2))
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        with plate(x):
            pyro.sample("z", dist.Normal(weight * x, scale))

    return model, guide


def shared(plate: Plate) -> tuple[Any, Any]:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with plate(x):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    return model, AutoNormal(model)


@pytest.mark.parametrize("make", [local, shared])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_fit_is_the_same(make: Any, batch_size: int | None) -> None:
    x = 1.5 + torch.randn(13)
    options: dict[str, Any] = {"steps": 20, "batch_size": batch_size, "progress": False}
    if make is local:
        options["heldout"] = x[:5]  # chunks of other sizes: 4 and 1
        options["heldout_every"] = 10
    sized, unsized = (fit(*make(plate), x, **options) for plate in (SIZED, UNSIZED))
    assert torch.equal(unsized.losses, sized.losses)
    assert torch.equal(unsized.heldout, sized.heldout)
    assert unsized.plates == sized.plates == {"data": 13}
    assert (unsized.local, unsized.amortized) == (sized.local, sized.amortized)
    first, second = (one.posterior(x, 7) for one in (sized, unsized))
    assert torch.equal(first.log_p, second.log_p) and torch.equal(first.log_q, second.log_q)
    assert first.plates == second.plates and first.dims == second.dims
    for a, b in zip(first.prior(5), second.prior(5), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(first.predictive()["x"], second.predictive()["x"])
    trees = [one.to_datatree(local=True) for one in (first, second)]
    assert trees[0].drop_nodes("fit").identical(trees[1].drop_nodes("fit"))
    assert torch.equal(sized.predict(x, 5)["x"], unsized.predict(x, 5)["x"])
    if make is local:
        for call in (lambda one: one.generate(6), lambda one: one.decode({"z": x[:3]})):
            a, b = (call(one) for one in (sized, unsized))
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_fit_without_a_size_is_right() -> None:
    """m ~ N(0, 10^2), x ~ N(m, 1): the posterior mean is near the mean of x."""
    x = 1.5 + torch.randn(40)
    adam = partial(torch.optim.Adam, lr=0.05)
    fitted = fit(*shared(UNSIZED), x, optim=adam, steps=400, batch_size=10, progress=False)
    assert float(fitted.guide.median(x)["m"]) == pytest.approx(float(x.mean()), abs=0.2)
    assert float(fitted.losses[-100:].mean()) < float(fitted.losses[:10].mean())


def test_other_bounds_and_comparisons_take_it(tmp_path: Any) -> None:
    x = torch.randn(8)
    for loss in (Trace_ELBO(num_particles=2, vectorize_particles=True), RenyiELBO(num_particles=2)):
        first, second = (
            fit(*local(plate), x, loss=loss, steps=3, batch_size=4, progress=False)
            for plate in (SIZED, UNSIZED)
        )
        assert torch.equal(first.losses, second.losses)
    second.save(tmp_path / "fit.pt")
    loaded = Fit.load(tmp_path / "fit.pt", *local(UNSIZED))
    assert torch.equal(loaded.posterior(x, 5).log_q, second.posterior(x, 5).log_q)
    model, guide = local(UNSIZED)
    result = compare(model, {"a": guide, "b": guide}, x, steps=2, num_samples=30, progress=False)
    assert result.rows[0].elbo == result.rows[1].elbo and not result.is_joint


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal, AutoNormalMessenger])
def test_what_needs_the_size_says_so(auto: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'z' stands in plate 'data', which has no size"):
        fit(model, auto(model), torch.randn(3), steps=2, progress=False)


def test_one_value_for_a_plate_without_a_size_is_an_error() -> None:
    """With a size there would be one z for each element."""

    def model(x: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    with pytest.raises(ValueError, match=r"site 'z' has one value for all 3 elements of plate"):
        fit(model, guide, torch.randn(3), steps=2, progress=False)
