"""Pictures of diffusions hold what the fits hold."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from example_programs import STRANGE_NAMES, renamed
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from pyro_vi import Comparison, Fit, fit, judge, plots
from pyro_vi.diffusion import (
    Affine,
    CosineSchedule,
    Diffusion,
    LearnedSchedule,
    MLPDenoiser,
    Schedule,
)
from pyro_vi.families import MeanField
from pyro_vi.guides import Encoder, ForwardProcess
from pyro_vi.models import DDPM, VAE, DiscretizedLogistic, LearnedDiscretizedLogistic

SHAPE = (1, 4, 4)
GREYS = torch.randint(0, 4, (30, *SHAPE), generator=torch.Generator().manual_seed(0)) / 3


def diffused(schedule: Schedule, shape: tuple[int, ...] = SHAPE, x: Tensor = GREYS) -> Fit:
    diffusion = Diffusion(shape, schedule, coordinates=Affine(0.5, 0.5))
    model = DDPM(
        diffusion,
        MLPDenoiser(shape, schedule.steps),
        likelihood=LearnedDiscretizedLogistic(4),
    )
    loss = TraceMeanField_ELBO()
    return fit(model, ForwardProcess(diffusion), x, loss=loss, steps=3, progress=False)


@pytest.fixture(scope="module")
def result() -> Comparison:
    torch.manual_seed(0)
    vae = VAE(SHAPE, 2, likelihood=DiscretizedLogistic(4))
    guide = Encoder(SHAPE, MeanField(2, 8))
    fits = {
        "vae": fit(vae, guide, GREYS, steps=3, progress=False),
        "learned": diffused(LearnedSchedule(5, first=-3.0)),
        "cosine": diffused(CosineSchedule(8)),
    }
    return judge(fits, SimpleNamespace(train=GREYS, test=GREYS[:9]), num_samples=30)


def test_strips_run_from_noise_to_the_mean_image(result: Comparison) -> None:
    figure = plots.strips(result, num=2, frames=3, seed=4)
    assert [axes.get_title() for axes in figure.axes] == ["learned", "cosine"]
    torch.manual_seed(4)
    states = result.fits["cosine"].model.trajectory(2, 3)
    sheet = figure.axes[1].images[0].get_array()
    assert sheet.shape == (2 * 4 + 1, 3 * 4 + 2)
    for row in range(2):
        for column in range(3):
            tile = sheet[5 * row : 5 * row + 4, 5 * column : 5 * column + 4]
            expected = states[column, row, 0].clamp(0, 1).double().numpy()
            np.testing.assert_allclose(tile, expected, atol=1e-6)


def test_bits_are_the_terms_of_the_bound(result: Comparison) -> None:
    (axes,) = plots.bits(result).axes
    assert axes.get_ylabel() == "the step's term (bits per dimension)"
    for line, (name, bound) in zip(axes.lines, result.step_bounds.items(), strict=True):
        total = len(bound.steps)
        np.testing.assert_allclose(line.get_xdata(), np.arange(2, total + 1) / total)
        terms = bound.by_step.value[1:] / (16 * math.log(2))
        np.testing.assert_allclose(line.get_ydata(), terms, rtol=1e-12)
        row = next(row for row in result.rows if row.family == name)
        assert str(line.get_label()).startswith(f"{name}: reconstruction ")
        assert str(line.get_label()).endswith(f" = {row.elbo_bits:.3f}")


def test_schedules_are_those_that_were_learned(result: Comparison) -> None:
    (axes,) = plots.schedules(result).axes
    learned, cosine = axes.lines[:2]
    np.testing.assert_allclose(
        cosine.get_ydata(), -CosineSchedule(8).gamma(torch.arange(1, 9)).numpy()
    )
    fitted = result.fits["learned"].model.diffusion.schedule.gamma(torch.arange(1, 6))
    np.testing.assert_allclose(learned.get_ydata(), -fitted.detach().numpy())
    start = LearnedSchedule(5, first=-3.0).gamma(torch.arange(1, 6)).detach().numpy()
    assert np.abs(start + np.asarray(learned.get_ydata())).max() > 1e-4
    assert learned.get_label() == "learned"


def test_a_family_keeps_its_colour_throughout(result: Comparison) -> None:
    losses = {line.get_label(): line.get_color() for line in plots.losses(result).axes[0].lines}
    for figure in (plots.bits(result), plots.schedules(result)):
        for line in figure.axes[0].lines:
            name = str(line.get_label()).partition(":")[0]
            assert name.startswith("_") or line.get_color() == losses[name]
    (curve,) = (
        line for line in plots.khats(result).axes[0].lines if "vae" in str(line.get_label())
    )
    assert curve.get_color() == losses["vae"]


@pytest.mark.parametrize("name", STRANGE_NAMES, ids=lambda name: ascii(name[:20]))
def test_names_are_text(name: str, result: Comparison) -> None:
    strange = renamed(result, "vae", name)
    label = STRANGE_NAMES[name]
    strips, bits, schedules = (f(strange) for f in (plots.strips, plots.bits, plots.schedules))
    for figure in (strips, bits, schedules):
        figure.savefig(io.BytesIO(), format="png")
    assert [axes.get_title() for axes in strips.axes] == [label, "cosine"]
    first, second = (text.get_text() for text in bits.legends[0].get_texts())
    assert first.startswith(f"{label}: ") and second.startswith("cosine: ")
    assert [t.get_text() for t in schedules.legends[0].get_texts()] == [label, "cosine"]


def test_other_pictures_take_the_programs_that_they_mean_something_for(result: Comparison) -> None:
    titles = [axes.get_title() for axes in plots.samples(result, num=4).axes]
    assert titles == ["vae", "learned", "cosine"]
    rows = [axes.get_ylabel() for axes in plots.reconstructions(result, result.data[:2]).axes]
    assert rows == ["original", "vae"]
    assert len(plots.latent_space(result).axes) == 1


def test_pictures_that_mean_nothing_are_refused(result: Comparison) -> None:
    of_vae = judge({"vae": result.fits["vae"]}, GREYS, num_samples=30)
    for draw in (plots.strips, plots.bits, plots.schedules):
        with pytest.raises(ValueError, match="expected a diffusion, got vae"):
            draw(of_vae)
    of_diffusion = judge({"cosine": result.fits["cosine"]}, GREYS)
    for draw in (plots.latent_space, lambda r: plots.reconstructions(r, GREYS[:2])):
        with pytest.raises(ValueError, match="expected families with posteriors"):
            draw(of_diffusion)
    with pytest.raises(ValueError, match="at least one image"):
        plots.strips(result, num=0)
    with pytest.raises(ValueError, match="at least 2 frames"):
        plots.strips(result, frames=1)
    points = diffused(CosineSchedule(3), shape=(2,), x=GREYS.flatten(1)[:, :2])
    with pytest.raises(ValueError, match=r"states of 'points': expected at least one image"):
        plots.strips(judge({"points": points}, GREYS.flatten(1)[:, :2]))
    short = plots.strips(judge({"short": diffused(CosineSchedule(2))}, GREYS), num=1)
    assert short.axes[0].images[0].get_array().shape == (4, 3 * 4 + 2)  # all states that it has
    single = judge({"single": diffused(CosineSchedule(1))}, GREYS)
    with pytest.raises(ValueError, match="more than one step"):
        plots.bits(single)
