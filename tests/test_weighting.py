"""Weights of a bound's terms, and of a diffusion's steps: weights scale, and one is no weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from example_programs import (
    global_and_local,
    global_and_local_guide,
    normal_mean,
    normal_mean_guide,
)
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from test_ddpm import trio
from torch import Tensor

from pyro_vi import SVI, fit
from pyro_vi.diffusion import (
    CosineSchedule,
    Diffusion,
    LearnedSchedule,
    LinearSchedule,
    Simple,
    StepWeight,
    Truncated,
)
from pyro_vi.families import MeanField
from pyro_vi.guides import Encoder, ForwardProcess
from pyro_vi.inference import with_terms
from pyro_vi.models import VAE
from pyro_vi.networks import MLPDecoder, MLPEncoder
from pyro_vi.posterior import step_bound
from pyro_vi.programs import FixedSites
from pyro_vi.weighting import ScheduleError, TermWeights, check_weight, cyclical, warmup

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

    loss = with_terms(TraceMeanField_ELBO())
    at = FixedSites({"t": t, "x_t": y_t})
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
        loss = with_terms(TraceMeanField_ELBO()).loss_and_grads(wrap(model), wrap(guide), x)
        found.append((loss, model.net.weight.grad.clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("schedule", [LinearSchedule, CosineSchedule])
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
            with_terms(loss).loss(weight()(model), guide, x)
        with pytest.raises(ValueError, match="the guide's steps are weighted and the model's are"):
            with_terms(loss).loss(model, weight()(guide), x)


def test_weights_of_other_processes_and_learned_schedules_are_refused() -> None:
    model, x = trio()
    other = StepWeight(Simple(Diffusion((3,), CosineSchedule(1_000))))
    with pytest.raises(ValueError, match="the weights are of another forward process"):
        other(ForwardProcess(model.diffusion))(x)
    learned = Diffusion((3,), LearnedSchedule(8))
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
                    with_terms(loss).loss(*programs, x)


def test_what_are_no_weights_are_refused() -> None:
    with pytest.raises(TypeError, match="weights as a function of the steps, got 'simple'"):
        StepWeight("simple")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"expected the program's Diffusion, got CosineSchedule\(\)"
    ):
        Simple(CosineSchedule(5))  # type: ignore[arg-type]


# ------------------------------------------------------------------------ reconstruction and KL

IMAGES = torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double().round()


def vae(family: type = MeanField) -> tuple[VAE, Encoder]:
    model = VAE((1, 3, 3), 2, decoder=partial(MLPDecoder, hidden=(5,)))
    return model, Encoder((1, 3, 3), family(2, 6), network=partial(MLPEncoder, hidden=(5,)))


def one(step: int) -> float:
    return 1.0


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO()])
@pytest.mark.parametrize("weights", [TermWeights(), TermWeights(reconstruction=one, kl=one)])
def test_weights_of_one_are_the_plain_bound(loss: ELBO, weights: TermWeights) -> None:
    model, guide = vae()
    found = []
    for programs in ((model, guide), (weights.model(model), weights.guide(guide))):
        torch.manual_seed(0)
        parameters = [*model.parameters(), *guide.parameters()]
        for parameter in parameters:
            parameter.grad = None
        value = with_terms(loss).loss_and_grads(*programs, IMAGES)
        found.append((value, [parameter.grad for parameter in parameters]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_fit_with_weights_of_one_is_the_plain_fit() -> None:
    options = {"loss": TraceMeanField_ELBO(), "steps": 4, "batch_size": 3, "progress": False}
    plain = fit(*vae(), IMAGES, **options)
    torch.manual_seed(0)
    model, guide = vae()
    plain = fit(model, guide, IMAGES, **options)
    weighted = fit(model, guide, IMAGES, kl_weight=one, reconstruction_weight=one, **options)
    for part in ("losses", "reconstruction", "kl"):
        assert torch.equal(getattr(plain, part), getattr(weighted, part))
    tensors = weighted.model.state.tensors()
    assert all(torch.equal(t, tensors[name]) for name, t in plain.model.state.tensors().items())


@pytest.mark.parametrize("kind", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_weighted_bound_is_the_weighted_sum_of_its_terms(kind: type) -> None:
    x = torch.randn(5)
    weights = TermWeights(reconstruction=3.0, kl=0.25)
    loss = with_terms(kind())
    values = []
    for model, guide in (
        (normal_mean, normal_mean_guide),
        (weights.model(normal_mean), weights.guide(normal_mean_guide)),
    ):
        torch.manual_seed(0)
        loss.reset()
        value = float(loss.loss(model, guide, x))
        values.append((value, loss.reconstruction(), loss.kl()))
    (plain, *terms), (weighted, *same) = values
    assert same == pytest.approx(terms, rel=1e-12)  # they are told without the weights
    reconstruction, kl = terms
    assert plain == pytest.approx(kl - reconstruction, rel=1e-12)
    assert weighted == pytest.approx(0.25 * kl - 3 * reconstruction, rel=1e-12)


def test_the_weights_reach_observed_sites_latents_and_every_guide_site() -> None:
    x = torch.randn(5)

    def model(x: Tensor) -> None:
        normal_mean(x)
        pyro.deterministic("twice", 2 * x)

    guide = AutoNormal(model)
    guide(x)
    weights = TermWeights(reconstruction=2.0, kl=0.25)
    sites = poutine.trace(weights.model(model)).get_trace(x).nodes
    assert [sites[name]["scale"] for name in ("x", "mean", "twice")] == [2.0, 0.25, 1.0]
    sites = poutine.trace(weights.guide(guide)).get_trace(x).nodes
    scales = [site["scale"] for site in sites.values() if site["type"] == "sample"]
    assert scales == [0.25, 0.25]  # the auxiliary site and the latent

    def factor(x: Tensor) -> None:
        normal_mean_guide(x)
        pyro.factor("bonus", x.sum(), has_rsample=True)

    sites = poutine.trace(weights.guide(factor)).get_trace(x).nodes
    assert sites["bonus"]["scale"] == 0.25
    sites = poutine.trace(weights.model(factor)).get_trace(x).nodes
    assert sites["bonus"]["scale"] == 2.0  # a factor of the model is observed


def test_schedules() -> None:
    assert [warmup(4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    half = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [cyclical(10)(step) for step in range(30)] == pytest.approx(half * 3)
    whole = [0.0, 0.25, 0.5, 0.75]
    assert [cyclical(4, ratio=1.0)(step) for step in range(8)] == whole * 2
    assert [cyclical(1)(step) for step in range(3)] == [0.0] * 3
    with pytest.raises(ValueError, match="at least one step of warm-up, got 0"):
        warmup(0)
    with pytest.raises(ValueError, match="at least one step in a period, got 0"):
        cyclical(0)
    for steps in (2.5, 1e3, math.nan, math.inf, True, "4", None):
        with pytest.raises(TypeError, match="whole number, at least one step of warm-up, got"):
            warmup(steps)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="whole number, at least one step in a period, got"):
            cyclical(steps)  # type: ignore[arg-type]
    assert warmup(np.int64(4))(0) == 0.25 and cyclical(np.int64(4))(1) == 0.5
    for ratio in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"ratio above 0 and at most 1, got {ratio}"):
            cyclical(10, ratio=ratio)
    for ratio in ("1", None, True, 1j):
        with pytest.raises(TypeError, match="expected a number as ratio, got"):
            cyclical(10, ratio=ratio)  # type: ignore[arg-type]


def test_a_schedule_is_followed_by_hand() -> None:
    weights = TermWeights(reconstruction=lambda step: 1.0 + step, kl=cyclical(4))
    assert (weights.reconstruction, weights.kl, weights.plain) == (1.0, 0.0, False)
    weights.at(5)
    assert (weights.reconstruction, weights.kl) == (6.0, 0.5)
    sites = poutine.trace(weights.model(normal_mean)).get_trace(torch.ones(3)).nodes
    assert (sites["x"]["scale"], sites["mean"]["scale"]) == (6.0, 0.5)


NO_WEIGHTS = [
    *(-0.1, float("nan"), float("inf"), "a", None, True, 1j, np.float32("nan"), np.bool_(True)),
    *(torch.ones(2), torch.tensor(True), torch.tensor(1j), torch.tensor(-1)),
]


@pytest.mark.parametrize("bad", NO_WEIGHTS)
def test_weights_that_are_no_weights(bad: Any) -> None:
    with pytest.raises(ValueError, match="expected a finite KL weight of at least 0, got"):
        check_weight(bad)
    with pytest.raises(ValueError, match="finite reconstruction weight of at least 0, got"):
        TermWeights(reconstruction=bad)
    weights = TermWeights(kl=lambda step: bad if step else 1.0)
    with pytest.raises(ValueError, match="KL weight of at least 0, got"):
        weights.at(1)
    options = {"steps": 3, "progress": False}
    with pytest.raises(ValueError, match="reconstruction weight of at least 0, got"):
        fit(normal_mean, normal_mean_guide, torch.ones(3), reconstruction_weight=bad, **options)


@pytest.mark.parametrize(
    "weight", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2), torch.tensor([2.0])], ids=repr
)
def test_numbers_of_every_kind_are_weights(weight: Any) -> None:
    assert check_weight(weight) == 2.0 and type(check_weight(weight)) is float
    fitted = fit(
        *(normal_mean, normal_mean_guide, torch.ones(3)),
        kl_weight=weight,
        steps=1,
        progress=False,
    )
    assert fitted.weights.tolist() == [[1.0, 2.0]]


def test_a_weight_is_not_trained() -> None:
    for trained in (torch.nn.Parameter(torch.tensor(1.0)), torch.ones(1, requires_grad=True) * 2):
        with pytest.raises(ValueError, match="a KL weight is not trained: expected a number"):
            check_weight(trained)


@pytest.mark.parametrize("bad", [None, -1])
@pytest.mark.parametrize("name", ["KL", "reconstruction"])
def test_a_schedule_that_gives_no_weight_is_at_fault_itself(bad: Any, name: str) -> None:
    message = rf"^the schedule's weight at step 3: expected a finite {name} weight .* got {bad}$"
    schedule = {f"{name.lower()}_weight": lambda step: 1.0 if step < 3 else bad}
    with pytest.raises(ScheduleError, match=message) as info:
        fit(normal_mean, normal_mean_guide, torch.ones(3), steps=9, progress=False, **schedule)
    assert not getattr(info.value, "__notes__", [])  # no site of the step before


def test_an_error_before_the_first_site_is_placed_there() -> None:
    def broken(step: int) -> float:
        if step == 2:
            raise ValueError("no more weights")
        return 1.0

    with pytest.raises(ValueError, match="no more weights") as info:
        fit(*(normal_mean, normal_mean_guide, torch.ones(3)), kl_weight=broken, progress=False)
    assert info.value.__notes__ == ["at step 2, before the first site"]


# ----------------------------------------------------------------------- both sides, and one alone


def around(kind: str, weights: TermWeights) -> tuple[Any, Any]:
    """Programs with a global latent and one in the plate."""
    model, guide = global_and_local, global_and_local_guide
    return {
        "both": lambda: (weights.model(model), weights.guide(guide)),
        "model": lambda: (weights.model(model), guide),
        "guide": lambda: (model, weights.guide(guide)),
        "swapped": lambda: (weights.guide(model), weights.model(guide)),
        "two": lambda: (weights.model(model), TermWeights(kl=0.1).guide(guide)),
    }[kind]()


SIDES = {
    "model": "the model's KL is weighted and the guide's is not",
    "guide": "the guide's KL is weighted and the model's is not",
    "swapped": "the model has the guide's handler of TermWeights",
    "two": "weighted by one TermWeights in the model and by another in the guide",
}


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO()])
@pytest.mark.parametrize("kl", [0.1, warmup(3)])
def test_a_kl_weighted_on_one_side_is_refused(kind: str, loss: ELBO, kl: Any) -> None:
    x = torch.ones(4)
    message = rf"latent site 'mean'.*{SIDES[kind]}"
    programs = around(kind, TermWeights(kl=kl))
    with pytest.raises(ValueError, match=message):
        SVI(*programs, pyro.optim.Adam({}), loss).step(x)
    with pytest.raises(ValueError, match=message):
        SVI(*programs, pyro.optim.Adam({}), loss).evaluate_loss(x)
    for weight in (1.0, 2.0):  # of the fit's own
        with pytest.raises(ValueError, match=message):
            fit(*programs, x, loss=loss, steps=1, kl_weight=weight, progress=False)


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_both_sides_and_sides_by_themselves_are_fine(loss: ELBO) -> None:
    x = torch.ones(4)
    weights = TermWeights(kl=0.1)
    model, guide = around("both", weights)
    fit(model, guide, x, loss=loss, steps=2, kl_weight=warmup(3), progress=False)
    poutine.trace(model).get_trace(x)  # the prior, without a guide
    poutine.trace(guide).get_trace(x)
    point = AutoDelta(global_and_local)
    value = with_terms(loss).loss(model, weights.guide(point), x)
    assert value != with_terms(loss).loss(global_and_local, point, x)
    alone = TermWeights(reconstruction=2.0)  # the KL is as it was: the guide needs no handler
    with_terms(loss).loss(alone.model(global_and_local), global_and_local_guide, x)


def test_weights_of_sites_that_are_not_there() -> None:
    x = torch.ones(3)

    def prior(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    def likelihood(x: Tensor) -> None:
        pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)

    message = r"weight 2 on the reconstruction expected observed sites of the model.*\['mean'\]"
    with pytest.raises(ValueError, match=message):
        TermWeights(reconstruction=2.0).model(prior)(x)
    message = r"weight 0\.25 on the KL expected latent sites of the model.*\['x'\]"
    with pytest.raises(ValueError, match=message):
        TermWeights(kl=warmup(4)).model(likelihood)(x)
    message = r"weight 0\.25 on the KL expected sample sites of the guide.*\[\]"
    with pytest.raises(ValueError, match=message):
        fit(likelihood, lambda x: None, x, kl_weight=warmup(4), steps=2, progress=False)
    with pytest.raises(ValueError, match=r"expected sample sites of the guide.*\[\]"):
        TermWeights(kl=0.0).guide(lambda x: None)(x)
    with pytest.raises(ZeroDivisionError):  # a run that breaks off has said enough
        TermWeights(kl=0.0).guide(lambda x: 1 / 0)(x)


@pytest.mark.parametrize("name", ["kl_weight", "reconstruction_weight"])
@pytest.mark.parametrize("weight", [0.5, warmup(3)])
def test_an_importance_weighted_bound_takes_no_weights(name: str, weight: Any) -> None:
    options = {"loss": RenyiELBO(num_particles=2), "steps": 2, "progress": False, name: weight}
    with pytest.raises(ValueError, match="has no KL to weight, and no reconstruction"):
        fit(normal_mean, normal_mean_guide, torch.ones(3), **options)
    weights = TermWeights(**{name.removesuffix("_weight"): weight})
    loss = with_terms(RenyiELBO(num_particles=2))
    with pytest.raises(ValueError, match="importance-weighted bound of scaled sites"):
        loss.loss(weights.model(normal_mean), weights.guide(normal_mean_guide), torch.ones(3))


def test_fits_report_terms_and_heldout_bounds_without_the_weights() -> None:
    model, guide = vae()
    options = {
        "loss": TraceMeanField_ELBO(),
        "optim": partial(torch.optim.SGD, lr=0.0),
        "steps": 4,
        "heldout": IMAGES[:2],
        "heldout_every": 2,
        "progress": False,
    }
    plain = fit(model, guide, IMAGES, **options)
    weighted = fit(
        *(model, guide, IMAGES), kl_weight=cyclical(4), reconstruction_weight=warmup(4), **options
    )
    rise, cycle = torch.tensor([0.25, 0.5, 0.75, 1.0]), torch.tensor([0.0, 0.5, 1.0, 1.0])
    torch.testing.assert_close(weighted.reconstruction, plain.reconstruction)
    torch.testing.assert_close(weighted.kl, plain.kl)  # at a weight of 0 too
    assert torch.equal(weighted.weights, torch.stack([rise, cycle], 1))
    torch.testing.assert_close(weighted.bounds, -plain.losses)
    assert torch.equal(plain.bounds, -plain.losses)
    expected = cycle * plain.kl - rise * plain.reconstruction
    torch.testing.assert_close(weighted.losses, expected)
    assert torch.equal(weighted.heldout, plain.heldout)
    without = fit(model, guide, IMAGES, kl_weight=0.0, reconstruction_weight=0.0, **options)
    assert bool((without.losses == 0).all())
    torch.testing.assert_close(without.bounds, plain.bounds)


def test_weights_live_where_the_programs_do(device: torch.device) -> None:
    model, guide = vae()
    fitted = fit(
        *(model, guide, IMAGES), kl_weight=warmup(3), steps=5, device=device, progress=False
    )
    assert bool(fitted.losses.isfinite().all())
    weights = TermWeights(kl=warmup(3), device=device)
    assert weights._kl.tensor.device.type == device.type
