"""The guides of diffusion: their sites, plates and densities, and that they are the model's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_vi import fit
from pyro_vi.diffusion import (
    Affine,
    Coordinates,
    CosineSchedule,
    Diffusion,
    LearnedSchedule,
    LinearSchedule,
    Schedule,
    StratifiedSteps,
    Whitened,
)
from pyro_vi.guides import ForwardOrder, ForwardProcess, ReverseOrder
from pyro_vi.inference import with_terms
from pyro_vi.models import DDPM, DDPMChain, Gaussian
from pyro_vi.programs import FixedSites

torch.set_num_threads(1)

GUIDES: dict[str, Callable[[Diffusion], nn.Module]] = {
    "some steps": ForwardProcess,
    "reverse order": ReverseOrder,
    "forward order": ForwardOrder,
}
CHAINS = [ReverseOrder, ForwardOrder]
every_guide = pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
both_orders = pytest.mark.parametrize("order", CHAINS)
N = 6


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, *shape, dtype=dtype)


def process(
    schedule: Schedule | None = None,
    *,
    draws: int = 2,
    coordinates: Coordinates | None = None,
    shape: tuple[int, ...] = (2,),
) -> Diffusion:
    schedule = CosineSchedule(8) if schedule is None else schedule
    return Diffusion(shape, schedule, draws=draws, coordinates=coordinates)


class Still(nn.Module):
    """A denoiser of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, y_t: Tensor, t: Tensor) -> Tensor:
        return self.size * y_t


def model_of(diffusion: Diffusion) -> DDPM:
    return DDPM(diffusion, Still(), likelihood=Gaussian(0.5))


def latents(trace: Any) -> list[str]:
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and name not in ("data", "steps")
    ]


def plates(site: Any) -> dict[str, tuple[int, int]]:
    return {frame.name: (frame.dim, frame.size) for frame in site["cond_indep_stack"]}


# Some steps of each data point


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)], ids=str)
@pytest.mark.parametrize(("steps", "draws"), [(1, 1), (5, 1), (5, 3), (5, 5)])
def test_some_steps_are_a_plate_inside_the_data(
    steps: int, draws: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    diffusion = process(CosineSchedule(steps), draws=draws, shape=shape)
    x_0 = data(*shape, dtype=dtype).to(device)
    trace = poutine.trace(ForwardProcess(diffusion)).get_trace(x_0)
    trace.compute_log_prob()
    last, dim = f"x_{steps}", math.prod(shape)
    # in the model's order; with one step, "x_1" is the last state and "x_t" another draw of it
    assert latents(trace) == [last, "t", "x_t", "x_s"]
    sizes = {last: (N, dim), "t": (draws, N), "x_t": (draws, N, dim), "x_s": (draws, N, dim)}
    for name, size in sizes.items():
        site = trace.nodes[name]
        assert site["value"].shape == size, name
        assert site["value"].device == x_0.device
        assert site["value"].dtype == (torch.int64 if name == "t" else dtype)
        inner = {} if name == last else {"steps": (-2, draws)}
        assert plates(site) == {"data": (-1, N), **inner}, name
        assert site["log_prob"].shape == ((N,) if name == last else (draws, N))
        scale = torch.as_tensor(site["scale"], dtype=torch.float64)
        expected = 1 if name == last else steps / draws  # so few steps are drawn alike
        torch.testing.assert_close(scale, torch.full_like(scale, expected), rtol=1e-6, atol=0)
        assert not site["is_observed"]


def test_some_steps_are_drawn_from_the_forward_process() -> None:
    diffusion = process(LinearSchedule(5), draws=3, coordinates=Affine(0.3, 2.0))
    x_0 = data(2)
    trace = poutine.trace(ForwardProcess(diffusion)).get_trace(x_0)
    trace.compute_log_prob()
    sites = trace.nodes
    y_0, t, y_t, y_s = (x_0 - 0.3) / 2, *(sites[name]["value"] for name in ("t", "x_t", "x_s"))
    last = torch.tensor(5)
    densities = {
        "x_5": diffusion.noised(y_0, last).log_prob(sites["x_5"]["value"]),
        "x_t": diffusion.noised(y_0, t).log_prob(y_t),
        "x_s": diffusion.before(y_t, y_0, t).log_prob(y_s),
    }
    densities["x_s"] = torch.where(t > 1, densities["x_s"], 0.0)
    for name, expected in densities.items():
        found = sites[name]["log_prob"] / sites[name]["scale"]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)
    assert isinstance(sites["t"]["fn"], StratifiedSteps)
    assert sites["t"]["fn"].batch_shape == (3, N)
    counts = torch.bincount(t.flatten() - 1, minlength=5)
    assert set(counts.tolist()) <= {3, 4}  # 18 draws over 5 steps


def test_the_step_before_the_first_is_masked() -> None:
    """There is no y_s at t = 1: its density, whatever it is, does not count."""
    guide = ForwardProcess(process(draws=2))
    t = torch.tensor([[1, 2, 1, 8, 3, 1], [4, 1, 1, 5, 1, 2]])
    trace = poutine.trace(FixedSites({"t": t})(guide)).get_trace(data(2))
    trace.compute_log_prob()
    site = trace.nodes["x_s"]
    assert torch.equal(site["mask"], t > 1)
    assert ((site["log_prob"] == 0) == (t == 1)).all()
    for name in ("t", "x_t", "x_8"):
        assert trace.nodes[name]["mask"] is None and (trace.nodes[name]["log_prob"] != 0).all()


def test_some_steps_have_the_models_sites_plates_masks_and_scales() -> None:
    """So that the drawn steps cancel in the bound, and closed-form KLs take the rest."""
    diffusion = process(draws=3)
    x_0 = data(2)
    guide = poutine.trace(ForwardProcess(diffusion)).get_trace(x_0)
    model = poutine.trace(poutine.replay(model_of(diffusion), guide)).get_trace(x_0)
    for trace in (guide, model):
        trace.compute_log_prob()
    assert latents(model) == [*latents(guide), "x_0"]
    for name in latents(guide):
        one, other = guide.nodes[name], model.nodes[name]
        assert torch.equal(one["value"], other["value"])
        assert plates(one) == plates(other)
        scales = [torch.as_tensor(site["scale"]) for site in (one, other)]
        assert torch.equal(*scales) and scales[0].shape == (() if name != "x_s" else (3, N))
        if name == "x_s":
            assert torch.equal(one["mask"], other["mask"])
        else:
            assert one["mask"] is other["mask"] is None
    for name in ("t", "x_t"):
        torch.testing.assert_close(guide.nodes[name]["log_prob"], model.nodes[name]["log_prob"])


# The whole chain


@both_orders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_chains_have_a_site_for_every_step(
    order: Callable[[Diffusion], nn.Module], steps: int, dtype: torch.dtype, device: torch.device
) -> None:
    diffusion = process(CosineSchedule(steps), draws=1, shape=(1, 2, 2))
    x_0 = data(1, 2, 2, dtype=dtype).to(device)
    trace = poutine.trace(order(diffusion)).get_trace(x_0)
    trace.compute_log_prob()
    expected = [f"x_{step}" for step in range(1, steps + 1)]
    assert latents(trace) == (expected if order is ForwardOrder else expected[::-1])
    for name in expected:
        site = trace.nodes[name]
        assert site["value"].shape == (N, 4) and site["log_prob"].shape == (N,)
        assert (site["value"].dtype, site["value"].device) == (dtype, x_0.device)
        assert plates(site) == {"data": (-1, N)}
        assert site["scale"] == 1 and site["mask"] is None


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize(
    "schedule",
    [LinearSchedule, CosineSchedule, lambda steps: LearnedSchedule(steps).double()],
    ids=["l", "c", "learned"],
)
def test_both_orders_are_one_density(schedule: Callable[[int], Schedule], steps: int) -> None:
    """Of every trajectory, whichever of them drew it."""
    diffusion = process(schedule(steps), draws=1, coordinates=Affine(0.3, 2.0))
    x_0 = data(2)
    for order, other in (CHAINS, CHAINS[::-1]):
        drawn = poutine.trace(order(diffusion)).get_trace(x_0)
        values = {name: drawn.nodes[name]["value"] for name in latents(drawn)}
        scored = poutine.trace(FixedSites(values)(other(diffusion))).get_trace(x_0)
        sums = []
        for trace in (drawn, scored):
            trace.compute_log_prob()
            sums.append(sum(trace.nodes[name]["log_prob"] for name in values))
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-8, atol=1e-8)


@both_orders
def test_each_state_of_a_chain_has_its_marginal(order: Callable[[Diffusion], nn.Module]) -> None:
    """Mean and variance of 20,000 draws of each of five steps, within five standard errors."""
    num = 20_000
    diffusion = process(LinearSchedule(5), draws=1, shape=(1,))
    x_0 = torch.full((num, 1), 1.5, dtype=torch.float64)
    trace = poutine.trace(order(diffusion)).get_trace(x_0)
    signal, noise = diffusion.schedule.levels(torch.arange(1, 6))
    for step in range(1, 6):
        value, sd = trace.nodes[f"x_{step}"]["value"], noise[step - 1].item()
        error = value.mean().item() - 1.5 * signal[step - 1].item()
        assert abs(error) < 5 * sd / math.sqrt(num)
        assert abs(value.var().item() / sd**2 - 1) < 5 * math.sqrt(2 / num)


# What is refused


@every_guide
@pytest.mark.parametrize("size", [(), (N,), (N, 3), (N, 2, 1), (N, 1, 2)], ids=str)
def test_data_of_another_shape_are_refused(
    make: Callable[[Diffusion], nn.Module], size: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"expected data of shape \(N, 2\), got"):
        make(process())(torch.zeros(size))


@every_guide
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_data_of_whole_numbers_are_refused(
    make: Callable[[Diffusion], nn.Module], dtype: torch.dtype
) -> None:
    with pytest.raises(TypeError, match=f"expected data of a floating point dtype, got {dtype}"):
        make(process())(torch.zeros(N, 2, dtype=dtype))


def white(scale: float = 1.0) -> Whitened:
    covariance = scale * torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    return Whitened(torch.tensor([0.3, -1.0], dtype=torch.float64), covariance)


SCHEDULES: dict[str, Callable[[], Diffusion]] = {
    "schedule": lambda: process(LinearSchedule(8)),
    "offset": lambda: process(CosineSchedule(8, offset=0.05)),
    "learned": lambda: process(LearnedSchedule(8).double()),
    "loc": lambda: process(coordinates=Affine(0.1, 1.0)),
    "scale": lambda: process(coordinates=Affine(0.0, 1.5)),
    "whitened": lambda: process(coordinates=white()),
}
OTHERS: dict[str, Callable[[], Diffusion]] = {
    "more steps": lambda: process(CosineSchedule(9)),
    "fewer steps": lambda: process(CosineSchedule(4)),
    "more draws": lambda: process(draws=3),
    "fewer draws": lambda: process(draws=1),
    **SCHEDULES,
}
REFUSED = "the guide has another forward process than the model"


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_forward_process_than_the_models_is_refused(
    other: Callable[[], Diffusion], loss: Callable[[], Any]
) -> None:
    """On either side."""
    mine, theirs = process(), other()
    for diffusion, another in ((mine, theirs), (theirs, mine)):
        with pytest.raises(ValueError, match=REFUSED):
            with_terms(loss()).loss(model_of(diffusion), ForwardProcess(another), data(2))


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_fit_refuses_another_forward_process(other: Callable[[], Diffusion]) -> None:
    """Of other steps by the names of the sites, before anything is trained."""
    message = f"{REFUSED}|latent site 'x_8' of the model is missing from the guide"
    with pytest.raises(ValueError, match=message):
        fit(model_of(process()), ForwardProcess(other()), data(2), steps=1, progress=False)


@both_orders
@pytest.mark.parametrize("other", SCHEDULES.values(), ids=SCHEDULES)
def test_another_forward_process_than_the_chains_is_refused(
    other: Callable[[], Diffusion], order: Callable[[Diffusion], nn.Module]
) -> None:
    model = DDPMChain(model_of(process()))
    with pytest.raises(ValueError, match=REFUSED):
        with_terms(Trace_ELBO()).loss(model, order(other()), data(2))


@pytest.mark.parametrize(("one", "other"), [(white(), white(2.0)), (white(), Affine())])
def test_other_coordinates_than_whitened_ones_are_refused(
    one: Coordinates, other: Coordinates
) -> None:
    mine, theirs = (process(coordinates=each) for each in (one, other))
    with pytest.raises(ValueError, match=REFUSED):
        with_terms(Trace_ELBO()).loss(model_of(mine), ForwardProcess(theirs), data(2))


@pytest.mark.parametrize(
    "make",
    [
        process,
        lambda: process(LearnedSchedule(8).double()),
        lambda: process(LinearSchedule(3), draws=3, coordinates=Affine(0.1, 2.0)),
        lambda: process(coordinates=white()),
    ],
    ids=["fixed", "learned", "affine", "whitened"],
)
def test_the_same_numbers_are_the_same_process(make: Callable[[], Diffusion]) -> None:
    """Though they are of two objects: each pair gives the bound of one object alone."""
    mine, theirs = make(), make()
    x_0 = data(2)
    losses = []
    for guide in (ForwardProcess(mine), ForwardProcess(theirs)):
        torch.manual_seed(1)
        losses.append(with_terms(TraceMeanField_ELBO()).loss(model_of(mine), guide, x_0))
    assert losses[0] == losses[1] and math.isfinite(losses[0])
    for order in CHAINS:
        found = with_terms(Trace_ELBO()).loss(DDPMChain(model_of(mine)), order(theirs), x_0)
        assert math.isfinite(found)


# A schedule that is learned


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_bound_has_a_gradient_in_a_learned_schedule(steps: int) -> None:
    """Through model and guide, which share it; finite at t = 1 and under masks."""
    schedule = LearnedSchedule(steps).double()
    diffusion = process(schedule, draws=1)
    programs = [
        (model_of(diffusion), ForwardProcess(diffusion), TraceMeanField_ELBO()),
        (model_of(diffusion), ForwardProcess(diffusion), Trace_ELBO()),
        (DDPMChain(model_of(diffusion)), ReverseOrder(diffusion), TraceMeanField_ELBO()),
        (DDPMChain(model_of(diffusion)), ForwardOrder(diffusion), Trace_ELBO()),
    ]
    for model, guide, loss in programs:
        schedule.zero_grad()
        with_terms(loss).loss_and_grads(model, guide, data(2))
        for name, parameter in schedule.named_parameters():
            inner = name not in ("first", "raw_range")
            assert (steps == 1 and inner) or parameter.grad is not None, name
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
                assert (steps <= 2 and inner) or (parameter.grad != 0).any(), name


def test_a_learned_schedule_is_learned() -> None:
    """By fit, in one state of model and guide: the bound gets better, and theirs stays the same."""
    diffusion = process(LearnedSchedule(8, first=-2.0, last=0.0).double(), draws=8)
    model = model_of(diffusion)
    guide = ForwardProcess(diffusion)
    x_0 = data(2).repeat(10, 1)
    fitted = fit(model, guide, x_0, loss=TraceMeanField_ELBO(), steps=30, progress=False)
    assert fitted.losses[-10:].mean() < fitted.losses[:10].mean()
    assert diffusion.schedule.first.item() == -2  # the user's own stays as it was
    state = poutine.trace(fitted.guide).get_trace(x_0)
    moved = state.nodes["t"]["infer"]["diffusion"]
    assert not torch.allclose(moved, diffusion.signature())


@pytest.mark.parametrize("guide", [ForwardProcess, ReverseOrder, ForwardOrder])
def test_guides_need_a_diffusion(guide: Any) -> None:
    with pytest.raises(TypeError, match="expected the model's Diffusion, got"):
        guide(CosineSchedule(4))
