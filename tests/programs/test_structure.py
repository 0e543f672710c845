"""What a data point is: weights that make minibatches estimate the full bound, or an error."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import (
    global_and_local,
    global_and_local_guide,
    normal_mean,
    normal_mean_guide,
)
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_vi.inference import PerDataPoint, with_terms
from pyro_vi.programs import Structure


def bound(kind: type, x: Tensor, total: int, draws: int) -> Tensor:
    """Estimates of the bound, each the mean of 200 particles."""
    weights = PerDataPoint("data", total=total)
    loss = with_terms(kind(num_particles=200, vectorize_particles=True, max_plate_nesting=1))
    pair = weights(global_and_local), weights(global_and_local_guide)
    with torch.no_grad():
        return torch.tensor([-float(loss.loss(*pair, x)) for _ in range(draws)]).double()


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO])
def test_minibatches_estimate_the_full_bound(kind: type) -> None:
    """With a global latent: averaged over all batches, the bound is that of the full data."""
    x = torch.randn(12).double() + 1
    full = bound(kind, x, 12, 50)
    parts = torch.stack([bound(kind, batch, 12, 50) for batch in x.split(3)]).mean(0)
    error = (full.var() / 50 + parts.var() / 50).sqrt()
    assert abs(float(full.mean() - parts.mean())) < 4 * float(error)
    # and the error is small enough to see a site outside the plate weighed 1/B (by 0.4 nats)
    assert float(error) < 0.02


def test_full_data_is_the_elbo_over_n() -> None:
    x = torch.randn(6).double()
    values = []
    weights = PerDataPoint("data", total=6)
    for scale in (lambda program: program, weights):
        torch.manual_seed(4)
        pair = scale(global_and_local), scale(global_and_local_guide)
        values.append(float(Trace_ELBO().loss(*pair, x)))
    assert values[1] == pytest.approx(values[0] / 6, abs=1e-12)


def test_a_plate_that_subsamples_itself_is_left_alone() -> None:
    x = torch.randn(10).double()

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", len(x), subsample_size=4) as index:
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[index])

    found = Structure.of(model, normal_mean_guide, (x,), {})
    assert (found.batch, found.total) == (4, 10)
    scaled = PerDataPoint("data", total=10)(model)
    trace = pyro.poutine.trace(scaled).get_trace(x)
    assert float(trace.nodes["x"]["scale"]) == pytest.approx(1 / 4)
    assert float(trace.nodes["mean"]["scale"]) == pytest.approx(1 / 10)


def test_an_autoguide_of_a_plate_that_subsamples_itself_keeps_parameters_for_all() -> None:
    x = torch.randn(10).double()

    def plates(x: Tensor) -> pyro.plate:
        return pyro.plate("data", len(x), subsample_size=4)

    def model(x: Tensor) -> None:
        with plates(x) as index:
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    found = Structure.of(model, AutoNormal(model, create_plates=plates), (x,), {})
    assert (found.batch, found.total) == (4, 10)


def structure(model: object, guide: object, batch_size: int | None = 3) -> Structure:
    x = torch.randn(3).double()
    total = None if batch_size is None else 12
    return Structure.of(model, guide, (x,), {}, batch_size=batch_size, total=total)


def test_what_a_run_shows() -> None:
    found = structure(global_and_local, global_and_local_guide)
    assert (found.batch, found.total, found.is_local) == (3, 12, False)
    assert (found.latents, found.observed) == (["mean", "z"], ["x"])
    whole = structure(global_and_local, global_and_local_guide, batch_size=None)
    assert (whole.batch, whole.total) == (3, 3)


def no_plate(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(mean, 1.0).expand([len(x)]).to_event(1), obs=x)


def extra_factor(x: Tensor) -> None:
    normal_mean(x)
    pyro.factor("penalty", x.new_tensor(0.0))


def local_in_guide_alone(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("mean", dist.Normal(x, 1.0))


def misses(x: Tensor) -> None:
    pyro.sample("other", dist.Normal(x.new_tensor(0.0), 1.0), infer={"is_auxiliary": True})


def has_more(x: Tensor) -> None:
    normal_mean_guide(x)
    pyro.sample("other", dist.Normal(x.new_tensor(0.0), 1.0))


def is_a_vector(x: Tensor) -> None:
    pyro.sample("mean", dist.Normal(x.new_zeros(2), 1.0).to_event(1))


def takes_a_vector(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean.sum(), 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (no_plate, normal_mean_guide, r"\['x'\] stand outside it"),
        (extra_factor, normal_mean_guide, r"\['penalty'\] stand outside it"),
        (normal_mean, local_in_guide_alone, "'mean' stands inside plate 'data' in the guide alone"),
        (global_and_local, AutoNormal(global_and_local), r"latents \['z'\] of its batch"),
        (normal_mean, misses, "'mean' of the model is missing from the guide"),
        (normal_mean, has_more, r"the guide samples \['other'\], which the model does not"),
        (takes_a_vector, is_a_vector, r"expects values of shape \(4,\), the guide gives \(2,\)"),
    ],
)
def test_programs_that_do_not_fit_together(model: object, guide: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        structure(model, guide)


@pytest.mark.parametrize("model", [no_plate, extra_factor])
def test_the_same_programs_are_right_on_all_data_at_once(model: object) -> None:
    assert structure(model, normal_mean_guide, batch_size=None).latents == ["mean"]
    guide = AutoNormal(global_and_local)
    assert structure(global_and_local, guide, batch_size=None).batch == 3


def test_a_batch_that_the_plate_does_not_hold() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 1):
            normal = dist.Normal(x.new_zeros(3), 1.0).to_event(1)
            pyro.sample("x", normal, obs=x)

    with pytest.raises(ValueError, match="'data' holds 1 data points in a batch of 3 rows"):
        structure(model, lambda x: None)
