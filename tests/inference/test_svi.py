"""The drop-in: the same seed gives the same parameters as pyro.infer.SVI."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyro
import pyro.infer
import pytest
import torch
from example_programs import (
    SCHOOLS_SIGMA,
    SCHOOLS_Y,
    eight_schools,
    normal_mean,
    normal_mean_guide,
)
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

from pyro_vi import SVI
from pyro_vi.families import MeanField
from pyro_vi.guides import Encoder, PairEncoder
from pyro_vi.models import VAE, PredictiveVAE
from pyro_vi.optimizers import OneOptimizer

Problem = tuple[Callable[..., object], Callable[..., object], tuple[Tensor, ...]]


def vae() -> Problem:
    images = torch.rand(16, 1, 4, 4).round().double()
    return VAE((1, 4, 4), 2).double(), Encoder((1, 4, 4), MeanField(2, 8)).double(), (images,)


def schools() -> Problem:
    data = SCHOOLS_Y.double(), SCHOOLS_SIGMA.double()
    return eight_schools, AutoDiagonalNormal(eight_schools), data


def function() -> Problem:
    return normal_mean, normal_mean_guide, (torch.randn(10).double(),)


@pytest.mark.parametrize("problem", [vae, schools, function])
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceGraph_ELBO])
def test_the_same_seed_gives_the_same_parameters(
    problem: Callable[[], Problem], loss: type
) -> None:
    found = []
    for kind in (pyro.infer.SVI, SVI):
        pyro.clear_param_store()
        torch.manual_seed(5)
        model, guide, data = problem()
        svi = kind(model, guide, pyro.optim.Adam({"lr": 0.02}), loss())
        losses = [svi.step(*data) for _ in range(100)]
        found.append((losses, dict(pyro.get_param_store().named_parameters())))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][1].keys() == found[1][1].keys() and len(found[0][1]) > 0
    for name, tensor in found[0][1].items():
        assert tensor.dtype == torch.float64
        assert torch.allclose(tensor, found[1][1][name], rtol=0, atol=1e-6)


def test_it_is_a_subclass_and_takes_what_pyro_takes() -> None:
    model, guide, data = function()
    optim = pyro.optim.ClippedAdam({"lr": 0.01})
    svi = SVI(model, guide, optim, Trace_ELBO().differentiable_loss)
    assert isinstance(svi, pyro.infer.SVI)
    assert torch.is_tensor(svi.loss(model, guide, *data))
    assert isinstance(svi.evaluate_loss(*data), float)
    for _ in range(200):
        svi.step(*data)
    posterior_mean = float(data[0].sum() / (1 / 4 + 10))
    assert float(pyro.param("loc").detach()) == pytest.approx(posterior_mean, abs=0.15)
    assert set(optim.get_state()) == {"loc", "scale"}
    with pytest.raises(ValueError, match="PyroOptim"):
        SVI(model, guide, torch.optim.Adam, Trace_ELBO())


def test_module_local_parameters_train_too() -> None:
    """Pyro's own SVI raises AttributeError here."""
    with pyro.settings.context(module_local_params=True):
        model, guide, data = vae()
        before = {name: p.detach().clone() for name, p in guide.named_parameters()}
        SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO()).step(*data)
        moved = [not torch.equal(before[name], p) for name, p in guide.named_parameters()]
    assert all(moved)
    assert len(pyro.get_param_store()) == 0


def test_one_torch_optimizer_equals_pyros_one_for_each_parameter() -> None:
    found = []
    for optim in (
        pyro.optim.Adam({"lr": 0.02}),
        OneOptimizer(partial(torch.optim.Adam, lr=0.02)),
    ):
        pyro.clear_param_store()
        torch.manual_seed(5)
        model, guide, data = vae()
        svi = SVI(model, guide, optim, Trace_ELBO())
        for _ in range(20):
            svi.step(*data)
        found.append([p.detach().clone() for p in guide.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_the_global_norm_is_clipped_and_the_schedule_steps() -> None:
    optim = OneOptimizer(
        partial(torch.optim.SGD, lr=1.0),
        schedule=partial(StepLR, step_size=1, gamma=0.5),
        clip_norm=1.0,
    )
    params = [torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)]
    for _ in range(2):
        for p, gradient in zip(params, (3.0, 4.0), strict=True):
            p.grad = torch.tensor([gradient])
        optim(params)
    # lr 1, then 1/2; the gradient (3, 4) has norm 5
    assert [p.item() for p in params] == pytest.approx([-0.9, -1.2], abs=1e-5)
    assert set(optim.get_state()) == {"optimizer", "scheduler"}


def test_parameters_that_appear_later_are_trained() -> None:
    optim = OneOptimizer(partial(torch.optim.SGD, lr=1.0))
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    a.grad = torch.ones(1)
    optim([a])
    a.grad, b.grad = torch.zeros(1), torch.ones(1)
    optim([a, b])
    assert (a.item(), b.item()) == (-1.0, -1.0)


def test_a_parameter_that_a_step_does_not_use_stays() -> None:
    optim = OneOptimizer(partial(torch.optim.Adam, lr=0.1))
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    a.grad = b.grad = torch.ones(1)
    optim([a, b])
    held = a.item()
    for _ in range(5):
        a.grad, b.grad = torch.zeros(1), torch.ones(1)
        optim([b])
    assert a.item() == held and b.item() == pytest.approx(-0.6, abs=1e-4)


def test_what_makes_no_optimizer_is_an_error() -> None:
    with pytest.raises(TypeError, match="it made 3"):
        OneOptimizer(lambda params: 3)([torch.zeros(1, requires_grad=True)])


def test_the_elbo_that_was_given_learns_how_deep_plates_are() -> None:
    """Or it would run the programs to guess at its own next evaluation, and draw."""
    found = []
    for kind in (pyro.infer.SVI, SVI):
        loss = Trace_ELBO(num_particles=2, vectorize_particles=True)
        kind(normal_mean, normal_mean_guide, pyro.optim.Adam({}), loss).step(
            torch.randn(10).double()
        )
        found.append(loss.max_plate_nesting)
    assert found == [2, 2]


def test_names_that_meet_in_the_store_are_warned_of() -> None:
    """Model and guide both have a `network`; in Pyro's store one of them is left out."""
    pair = PredictiveVAE((3,), (4,), MeanField(2, 8)), PairEncoder((3,), (4,), MeanField(2, 8))
    x, y = torch.randn(5, 3), torch.rand(5, 4).round()
    svi = SVI(*pair, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.warns(UserWarning, match=r"PredictiveVAE: .*\(and 5 others\) are not trained"):
        svi.step(x, y)
    before = {name: p.detach().clone() for name, p in pair[0].named_parameters()}
    svi.step(x, y)  # no second warning
    still = [name for name, p in pair[0].named_parameters() if torch.equal(p, before[name])]
    assert len(still) == 6 and len(before) > 6


def test_what_is_frozen_is_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    """Though it has a gradient from before."""
    model, guide, (images,) = vae()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.requires_grad_(False)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(images)
    assert not [str(w.message) for w in recwarn if "are not trained" in str(w.message)]
