"""Whether programs take each data point by itself, seen without their word for it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from pyro_vi import compare, fit
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE
from pyro_vi.programs import RowIndependence, Structure

torch.set_num_threads(1)

N = 7
X = torch.randn(N, generator=torch.Generator().manual_seed(0))


def rows(model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> tuple[bool, bool]:
    structure = Structure.of(model, guide, args, {})
    found = RowIndependence.of(structure, model, guide, (args, {}))
    return found.amortized, found.local


def local(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_row(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def constant_mean(x: Tensor) -> None:
    pyro.sample("mean", dist.Normal(0.3, 0.5))
    by_row(x)


def by_place(x: Tensor) -> None:
    loc = torch.linspace(-1, 1, N)
    with pyro.plate("data", len(x)) as index:
        pyro.sample("z", dist.Normal(loc[index], 0.7))


def parameter_for_each_row(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.linspace(-1, 1, N), 0.7))


def normalised(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x - x.mean()) / x.std(), 0.7))


def in_order(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.cumsum(0), 0.7))


def by_extreme(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / x.max(), 0.7))


def by_size(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, x.abs().max()))


def by_last(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x - x[-1], 0.7))


def of_that_many(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / len(x), 0.7))


def point(at: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(at(x)))

    return guide


def auxiliary(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(x / 2 + noise, 0.7))


def with_parameter(guide: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def run(x: Tensor) -> None:
        guide(x + 0 * pyro.param("unused", torch.tensor(0.0)))

    return run


@pytest.mark.parametrize(
    ("guide", "amortized"),
    [
        (by_row, True),
        (auxiliary, True),
        (point(lambda x: x / 2), True),
        (by_place, False),
        (parameter_for_each_row, False),
        (normalised, False),
        (in_order, False),
        (by_extreme, False),
        (by_size, False),
        (by_last, False),
        (of_that_many, False),
        (point(lambda x: torch.linspace(-1, 1, N)[: len(x)]), False),
    ],
)
@pytest.mark.parametrize("order", [X, X.sort().values, X.flip(0)])
def test_guides_of_single_data_points(
    guide: Callable[[Tensor], None], amortized: bool, order: Tensor
) -> None:
    assert rows(local, guide, order) == (amortized, amortized)


def test_rounding_of_means_far_from_zero_is_no_dependence() -> None:
    """Their last digits, in units of a small standard deviation."""
    net = nn.Sequential(nn.Linear(784, 256), nn.SiLU(), nn.Linear(256, 256), nn.Linear(256, 8))
    with torch.no_grad():
        net[-1].weight.mul_(40)
        net[-1].bias.add_(30)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.full((8,), 30.0), 1.0).to_event(1))
            pyro.sample(
                "x", dist.Normal(z.sum(-1, True), 1.0).expand([len(x), 784]).to_event(1), obs=x
            )

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.01).to_event(1))

    for num in (2, 3, 20):
        assert rows(model, guide, torch.rand(num, 784)) == (True, True)


def test_small_differences_of_large_densities_are_dependence() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z[:, None] + 2e-4 * x.mean()
            pyro.sample("x", dist.Normal(loc, 0.03).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(1), 0.1))

    x = torch.arange(16)[:, None] / 16 + torch.rand(16, 3072)
    assert rows(model, guide, x) == (False, False)


def test_what_the_programs_draw_beside_their_sites_is_no_dependence() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.dropout(x, 0.5, True), 0.7))

    assert rows(local, guide, X) == (True, True)


def test_rows_in_the_order_that_a_recurrent_network_needs() -> None:
    lengths = torch.tensor([5, 4, 4, 3, 2, 1, 1])
    gru = nn.GRU(1, 4, batch_first=True).double()

    def guide(x: Tensor, lengths: Tensor) -> None:
        packed = nn.utils.rnn.pack_padded_sequence(x[..., None], lengths, batch_first=True)
        _, last = gru(packed)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(last[0, :, 0], 0.7))

    def model(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).expand(x.shape).to_event(1), obs=x)

    assert rows(model, guide, torch.randn(7, 5).double(), lengths) == (True, True)


def test_a_plate_of_another_name_is_asked_for() -> None:
    """Nothing says that its latents belong to data points: their prior would be left out."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + loc, 0.7))

    def blind(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7))

    fitted = fit(model, guide, X, steps=1, progress=False)
    assert not fitted.amortized
    with pytest.raises(ValueError, match="it has none for other data"):
        fitted.log_predictive_density(X + 1, 10)
    with pytest.raises(ValueError, match=r"stands inside plate 'rows'.*name it \(plate=\.\.\.\)"):
        fit(model, blind, X, steps=1, progress=False).log_predictive_density(X + 1, 10)
    named = fit(model, guide, X, plate="rows", steps=1, progress=False)
    assert (named.amortized, named.local) == (True, True)
    with pytest.raises(ValueError, match=r"there is no plate 'row' in the programs, which have"):
        fit(model, guide, X, plate="row", steps=1, progress=False)


def test_arguments_are_rows_by_what_they_were_in_the_fit() -> None:
    """Not by their length in data that come later."""

    def model(x: Tensor, y: Tensor, knots: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z + knots.sum() * x, 1.0), obs=y)

    def guide(x: Tensor, y: Tensor, knots: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((y - knots.sum() * x) / 2 + shift, 0.5**0.5))

    still = partial(torch.optim.SGD, lr=0.0)
    knots = torch.randn(20)
    data = (torch.randn(50), torch.randn(50), knots)
    fitted = fit(model, guide, data, optim=still, steps=1, progress=False)
    assert fitted.local and fitted.rows == (0, 1)
    for num in (19, 20, 21):
        x, y = torch.randn(num), torch.randn(num)
        evidence = fitted.posterior((x, y, knots), 4_000).evidence().value
        expected = dist.Normal(knots.sum() * x, 2**0.5).log_prob(y)
        torch.testing.assert_close(torch.from_numpy(evidence).float(), expected, atol=1e-4, rtol=0)


def test_deterministic_sites_of_all_rows_are_no_part_of_a_local_posterior() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.deterministic("twice", 2 * z)
        pyro.deterministic("total", z.sum())

    fitted = fit(model, with_parameter(by_row), torch.randn(50), steps=1, progress=False)
    posterior = fitted.posterior(torch.randn(50), 1_000)
    assert {name: value.shape for name, value in posterior.deterministic.items()} == {
        "twice": (1_000, 50)
    }


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [MeanField, FullCovariance, LowRank, Flow])
def test_rounding_is_no_dependence(family: Any, dtype: torch.dtype, dim: int) -> None:
    model = VAE((dim, 6, 6), 3).to(dtype)
    guide = Encoder((dim, 6, 6), family(3, 16)).to(dtype)
    x = torch.rand(33, dim, 6, 6, dtype=dtype).round()
    assert rows(model, guide, x) == (True, True)


def test_batch_normalisation_mixes_rows_in_training_alone() -> None:
    norm = nn.BatchNorm1d(1)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(norm(x[:, None]).squeeze(1), 0.7))

    assert rows(local, guide, X) == (False, False)
    norm.eval()
    assert rows(local, guide, X) == (True, True)


def test_a_likelihood_that_is_normalised_over_the_batch() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=x)

    assert rows(model, by_row, X) == (False, False)


def test_shared_latents_are_no_say_of_the_rows() -> None:
    def from_data(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.mean(), 0.5))
        by_row(x)

    assert rows(shared, constant_mean, X) == (True, False)
    assert rows(shared, from_data, X) == (False, False)


def test_autoguides_have_latents_for_their_own_data_points_alone() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    for kind in (AutoNormal, AutoDelta, AutoMultivariateNormal):
        pyro.clear_param_store()
        assert rows(model, kind(model), X) == (True, False)
        pyro.clear_param_store()
        assert rows(shared, kind(shared), X) == (False, False)
        pyro.clear_param_store()
        assert rows(local, kind(local), X) == (False, False)


def test_what_cannot_be_taken_apart_has_one_posterior() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    assert rows(model, guide, X) == (True, False)
    fitted = fit(model, with_parameter(guide), X, steps=2, progress=False)
    assert fitted.posterior(X, 50).log_p.shape == (50,)
    assert fitted.predict(X + 1, 5)["x"].shape == (5, N)


def test_where_there_is_nothing_to_tell_the_plate_is_believed() -> None:
    def of_columns(x: Tensor) -> None:
        local(x[0])

    def by_column(x: Tensor) -> None:
        by_row(x[0])

    assert rows(local, by_row, X[:1]) == (True, True)
    assert rows(of_columns, by_column, torch.randn(3, N)) == (True, False)
    assert rows(of_columns, by_column, torch.randn(N, N)) == (False, False)


def test_what_a_plate_scales_and_masks_leave_out() -> None:
    def scaled(program: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def run(x: Tensor) -> None:
            with poutine.scale(scale=100 / len(x)), poutine.mask(mask=x > 0):
                program(x)

        return run

    assert rows(scaled(local), scaled(by_row), X) == (True, True)
    assert rows(scaled(local), scaled(by_place), X) == (False, False)


def test_nothing_outside_moves() -> None:
    before = torch.get_rng_state()
    structure = Structure.of(local, by_row, (X,), {})
    torch.set_rng_state(before)
    RowIndependence.of(structure, local, by_row, ((X,), {}))
    assert torch.equal(torch.get_rng_state(), before)


# What follows from it


def learned_rows(x: Tensor) -> None:
    """Right for its training data, whatever stands at their places later."""
    loc = pyro.param("loc", torch.zeros(N))
    with pyro.plate("data", len(x)) as index:
        pyro.sample("z", dist.Normal(loc[index], 0.5**0.5))


def test_a_parameter_for_each_row_gives_one_posterior_of_the_training_data() -> None:
    x = 4 * X
    adam = partial(torch.optim.Adam, lr=0.01)
    fitted = fit(local, learned_rows, x, optim=adam, steps=800, progress=False)
    assert (fitted.amortized, fitted.local) == (False, False)
    posterior = fitted.posterior(x, 1_000)
    assert posterior.is_joint
    evidence = float(dist.Normal(0.0, 2**0.5).log_prob(x).sum())
    assert float(posterior.elbo().value) == pytest.approx(evidence, abs=0.1)
    for refused in (fitted.posterior, fitted.predict, fitted.posterior_given_globals):
        with pytest.raises(ValueError, match="expected the data that the guide was fitted to"):
            refused(x.flip(0), 30)
    with pytest.raises(ValueError, match="it has none for other data"):
        fitted.log_predictive_density(x.flip(0), 30)
    assert fitted.posterior_given_globals(x, 30).log_p.shape == (30, N)


def test_shared_latents_that_read_the_data_predict_no_others() -> None:
    def reads(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.3))
        pyro.sample("mean", dist.Normal(x.mean(), scale.exp()))
        by_row(x)

    fitted = fit(shared, reads, X, steps=3, progress=False)
    assert (fitted.amortized, fitted.local) == (False, False)
    with pytest.raises(ValueError, match="its shared latents read the data"):
        fitted.log_predictive_density(X + 5, 30)
    with pytest.raises(ValueError, match="expected the data that the guide was fitted to"):
        fitted.predict(X + 5, 30)


def test_comparisons_leave_out_what_would_leak() -> None:
    def honest(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.4))
        by_row(x)

    def leaks(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(x.mean() + pyro.param("loc", torch.tensor(0.0)), 0.4))
        by_row(x)

    data = SimpleNamespace(train=X, test=X + 1)
    guides = {"honest": honest, "leaks": leaks}
    first, second = compare(shared, guides, data, num_samples=50, steps=2, progress=False).rows
    assert math.isfinite(first.predictive) and math.isnan(second.predictive)


def test_minibatches_of_programs_that_mix_rows_are_warned_of() -> None:
    shift = nn.Parameter(torch.zeros(()))

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x: Tensor) -> None:
            pyro.module("guide", self)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x - x.mean() + self.shift, 0.7))

    with pytest.warns(UserWarning, match="minibatches and held-out bounds are biased"):
        fit(local, Guide(), X, batch_size=3, steps=2, progress=False)
    with pytest.warns(UserWarning, match="minibatches and held-out bounds are biased"):
        fit(local, Guide(), X, heldout=X, steps=2, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(local, Guide(), X, steps=2, progress=False)
        fit(local, Guide(), X, batch_size=N, steps=2, progress=False)
