"""Weights of the steps: the simple loss is the squared error of the noise, and weights scale."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from test_ddpm import trio
from torch import Tensor

from pyro_vi import fit
from pyro_vi.diffusion import Diffusion
from pyro_vi.elbo import told
from pyro_vi.guides import ForwardProcess
from pyro_vi.schedules import Cosine, Learned, Linear
from pyro_vi.sites import At
from pyro_vi.stepwise import step_bound
from pyro_vi.weighting import Simple, StepWeight, Truncated

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("chosen", [2, 3, 5, 8])
@pytest.mark.parametrize(("kind", "floor"), [(Simple, 0.0), (Truncated, 1.0)])
def test_the_gradient_is_that_of_the_squared_error(kind: type, floor: float, chosen: int) -> None:
    """1/2 max(SNR, floor) / SNR |eps - eps_hat|^2, averaged over the draws of a data point."""
    model, x = trio(draws=2)
    diffusion = model.diffusion
    t = torch.full((2, len(x)), chosen)
    eps = torch.randn(2, len(x), 3)
    q = diffusion.noised(diffusion.encode(x), t)
    y_t = q.mean + eps * q.stddev
    weight = model.net.weight

    loss = told(TraceMeanField_ELBO())
    at = At({"t": t, "x_t": y_t})
    weighted = StepWeight(kind(diffusion))
    weight.grad = None
    loss.loss_and_grads(
        weighted(model), at(StepWeight(kind(diffusion))(ForwardProcess(diffusion))), x
    )
    found = weight.grad.clone()

    weight.grad = None
    signal, noise = diffusion.schedule.levels(torch.tensor(chosen))
    out = model.net(y_t.reshape(-1, 3), t.reshape(-1)).reshape(y_t.shape)
    snr = float((signal / noise) ** 2)
    share = max(snr, floor) / snr
    (0.5 * share * (eps - out).square().sum(-1).mean(0).sum()).backward()
    torch.testing.assert_close(found, weight.grad, atol=1e-9, rtol=1e-9)


def test_weights_of_one_change_nothing() -> None:
    model, x = trio()
    guide = ForwardProcess(model.diffusion)
    found = []
    for wrap in (lambda program: program, StepWeight(lambda t: torch.ones(t.shape))):
        torch.manual_seed(0)
        model.net.weight.grad = None
        loss = told(TraceMeanField_ELBO()).loss_and_grads(wrap(model), wrap(guide), x)
        found.append((loss, model.net.weight.grad.clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("schedule", [Linear, Cosine])
@pytest.mark.parametrize("steps", [1, 2, 100])
@pytest.mark.parametrize("kind", [Simple, Truncated])
def test_weights_are_positive_at_every_step(schedule: type, steps: int, kind: type) -> None:
    weights = kind(Diffusion((2,), schedule(steps)))(torch.arange(1, steps + 1))
    assert weights.shape == (steps,) and bool((weights > 0).all())
    assert steps == 1 or weights[0] == weights[1]


def test_a_weighted_fit_is_a_fit_and_its_bound_the_bound() -> None:
    model, x = trio()
    diffusion = model.diffusion
    guide = ForwardProcess(diffusion)
    weight = StepWeight(Simple(diffusion))
    fitted = fit(
        weight(model),
        StepWeight(Simple(diffusion))(guide),
        x,
        loss=TraceMeanField_ELBO(),
        optim=partial(torch.optim.SGD, lr=0.0),
        steps=2,
        progress=False,
    )
    assert fitted.model.sample(4).shape == (4, 3)
    bound = step_bound(fitted.model, fitted.guide, x).elbo
    assert float(bound.value) == pytest.approx(float(step_bound(model, guide, x).elbo.value))
    prior = float(step_bound(model, guide, x).prior.mean())
    assert float(fitted.losses[0]) - prior < -float(bound.value) - prior - 1


def test_weights_on_one_side_alone_are_refused() -> None:
    model, x = trio()
    guide = ForwardProcess(model.diffusion)
    weight = partial(StepWeight, Simple(model.diffusion))
    for loss in (TraceMeanField_ELBO(), Trace_ELBO()):
        with pytest.raises(ValueError, match="the model's steps are weighted and the guide's are"):
            told(loss).loss(weight()(model), guide, x)
        with pytest.raises(ValueError, match="the guide's steps are weighted and the model's are"):
            told(loss).loss(model, weight()(guide), x)


def test_weights_of_other_processes_and_learned_schedules_are_refused() -> None:
    model, x = trio()
    other = StepWeight(Simple(Diffusion((3,), Cosine(1_000))))
    with pytest.raises(ValueError, match="the weights are of another forward process"):
        other(ForwardProcess(model.diffusion))(x)
    learned = Diffusion((3,), Learned(8))
    with pytest.raises(ValueError, match="no objective for a schedule"):
        Simple(learned)
    learned.schedule.requires_grad_(False)
    assert bool((Truncated(learned)(torch.arange(1, 9)) > 0).all())


def test_weights_below_zero_and_programs_without_steps_are_refused() -> None:
    model, x = trio()
    with pytest.raises(ValueError, match="expected weights of at least 0, got -1"):
        StepWeight(lambda t: -torch.ones(t.shape))(model)(x)

    def stranger(x: Tensor) -> None:
        pyro.sample("x_0", dist.Normal(x, 1.0).to_event(2), obs=x)

    with pytest.raises(ValueError, match="'x_0' comes before any site 't'"):
        StepWeight(Simple(model.diffusion))(stranger)(x)


def test_weights_that_differ_are_refused() -> None:
    model, x = trio()
    diffusion = model.diffusion
    for one, other in ((Simple, Truncated), (Truncated, Simple)):
        programs = (
            StepWeight(one(diffusion))(model),
            StepWeight(other(diffusion))(ForwardProcess(diffusion)),
        )
        for loss in (Trace_ELBO(), TraceMeanField_ELBO()):
            with pytest.raises(ValueError, match="weigh the same steps differently"):
                for _ in range(20):  # at a step of little noise alone they weigh alike
                    told(loss).loss(*programs, x)


def test_what_are_no_weights_are_refused() -> None:
    with pytest.raises(TypeError, match="weights as a function of the steps, got 'simple'"):
        StepWeight("simple")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected the program's Diffusion, got Cosine\(\)"):
        Simple(Cosine(5))  # type: ignore[arg-type]
