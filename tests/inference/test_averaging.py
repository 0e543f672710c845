"""The moving average of parameters: its formula, and what a fit does with it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vi import fit
from pyro_vi.inference import Average

torch.set_num_threads(1)


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc + x / 2, 0.5**0.5))


OPTIONS: dict[str, Any] = {"optim": partial(torch.optim.SGD, lr=0.05), "progress": False}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_is_its_formula(decay: float) -> None:
    values = torch.randn(30).double()
    held = values[0].clone()
    average, expected = Average({"w": held}, decay=decay), float(values[0])
    for step, value in enumerate(values[1:]):
        held.copy_(value)
        average.update()
        now = min(decay, (1 + step) / (10 + step))
        expected = now * expected + (1 - now) * float(value)
    with average.installed():
        assert float(held) == pytest.approx(expected, abs=1e-12)
    assert held == values[-1]
    average.install()
    assert float(held) == pytest.approx(expected, abs=1e-12)


def test_a_fit_ends_with_the_average_of_its_own_steps() -> None:
    x = torch.randn(20)
    ends = [
        float(fit(model, guide, x, steps=steps, **OPTIONS).guide.state.tensors()["param.loc"])
        for steps in range(1, 7)
    ]
    expected = 3.0
    for step, value in enumerate(ends):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    averaged = fit(model, guide, x, steps=6, average=0.9, **OPTIONS)
    assert float(averaged.guide.state.tensors()["param.loc"]) == pytest.approx(expected, abs=1e-5)
    plain = fit(model, guide, x, steps=6, **OPTIONS)
    assert torch.equal(averaged.losses, plain.losses)  # training itself does not change


def test_heldout_bounds_are_of_the_average() -> None:
    x = torch.randn(50)
    heldout = {"heldout": x, "heldout_every": 3}
    plain = fit(model, guide, x, steps=6, **heldout, **OPTIONS)
    averaged = fit(model, guide, x, steps=6, average=0.99, **heldout, **OPTIONS)
    assert averaged.heldout[-1, 1] < plain.heldout[-1, 1] - 0.1  # it lags behind
    loc = averaged.guide.state.tensors()["param.loc"]
    bound = dist.Normal(0.0, 2**0.5).log_prob(x).mean() - loc.square()
    assert float(averaged.heldout[-1, 1]) == pytest.approx(float(bound), abs=1.0)


def test_the_best_average_is_kept() -> None:
    x = torch.randn(50)

    def climbing(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0 if k < 20 else -1.0)

    fitted = fit(
        model,
        guide,
        x,
        steps=40,
        average=0.5,
        heldout=x,
        heldout_every=1,
        patience=5,
        schedule=climbing,
        **OPTIONS,
    )
    best = fitted.heldout[:, 1].max()
    loc = float(fitted.guide.state.tensors()["param.loc"])
    bounds = fitted.heldout[:, 1]
    assert len(bounds) < 40 and bounds[-1] < best
    assert abs(loc) < 3 and math.isfinite(loc)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_impossible_decays(decay: float) -> None:
    with pytest.raises(ValueError, match=f"expected a decay from 0 to below 1.*got {decay}"):
        fit(model, guide, torch.randn(5), average=decay, **OPTIONS)
