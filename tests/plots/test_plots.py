"""Figures hold what the fits hold: pixels, bounds, k-hats, and contours of known Gaussians.

The model under the posteriors is linear with Gaussian noise, x = A z + noise, so that its exact
posterior is N(m(x), Sigma), and every contour is an ellipse of known area and centre.
"""

import io
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import STRANGE_NAMES, renamed
from matplotlib import _pylab_helpers
from matplotlib.colors import to_hex
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vi import compare, plots
from pyro_vi.comparison import Comparison
from pyro_vi.diagnostics import khat_threshold
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.guides import Encoder
from pyro_vi.inference import Fit, fit
from pyro_vi.models import VAE

SHAPE = (1, 4, 4)
FAMILIES = {"mean-field": MeanField, "full covariance": FullCovariance}
X = torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(0)).round()
TEST = X[40:]
NOISE = 0.5
A = torch.randn(16, 3, generator=torch.Generator().manual_seed(1)) / 4


def compared(model: Callable[..., Any], latent_dim: int = 2, **options: Any) -> Comparison:
    guides = {name: Encoder(SHAPE, f(latent_dim, 8)) for name, f in FAMILIES.items()}
    data = SimpleNamespace(train=X[:40], test=TEST)
    return compare(model, guides, data, num_samples=40, progress=False, **options)


@pytest.fixture(scope="module")
def own() -> Comparison:
    """Each family trained its own copy of the model."""
    return compared(VAE(SHAPE, 2), steps=60, heldout=TEST, heldout_every=20)


@pytest.fixture(scope="module")
def frozen() -> Comparison:
    """The families share one model."""
    guide = Encoder(SHAPE, MeanField(2, 8))
    return compared(fit(VAE(SHAPE, 2), guide, X, steps=3, progress=False).model, steps=3)


def linear(x: Tensor, *, dim: int = 2) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).expand([len(x), dim]).to_event(1))
        mean = (z @ A[:, :dim].T).reshape(-1, *SHAPE)
        pyro.sample("x", dist.Normal(mean, NOISE).to_event(3), obs=x)


def exact(dim: int) -> tuple[Tensor, Tensor]:
    """Covariance of the posterior, and the matrix that makes its mean from x."""
    a = A[:, :dim].double()
    covariance = torch.linalg.inv(torch.eye(dim) + a.T @ a / NOISE**2)
    return covariance, covariance @ a.T / NOISE**2


def ground_truth(x: Tensor, *, dim: int = 2) -> None:
    """A guide that is the exact posterior; its one parameter does nothing."""
    covariance, weights = exact(dim)
    still = 0 * pyro.param("unused", torch.zeros(()))
    loc = (x.flatten(1).double() @ weights.T).to(x) + still
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.MultivariateNormal(loc, covariance.to(x)))


def linear_result(dim: int) -> Comparison:
    return compare(
        partial(linear, dim=dim),
        {"exact": partial(ground_truth, dim=dim), "wide": partial(wide, dim=dim)},
        SimpleNamespace(train=X[:40], test=TEST),
        num_samples=40,
        steps=1,
        progress=False,
    )


def wide(x: Tensor, *, dim: int = 2) -> None:
    """Independent units of scale 1/2 around the origin."""
    scale = 0.5 + 0 * pyro.param("unused", torch.zeros(()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.new_zeros(len(x), dim), scale).to_event(1))


def area_and_centre(contour: QuadContourSet, level: int) -> tuple[float, npt.NDArray[np.float64]]:
    """Of the polygons at a level, holes taken out."""
    total, moment = 0.0, np.zeros(2)
    for polygon in contour.get_paths()[level].to_polygons():
        x, y = np.asarray(polygon).T
        cross = x[:-1] * y[1:] - x[1:] * y[:-1]
        total += cross.sum() / 2
        moment += [((p[:-1] + p[1:]) * cross).sum() / 6 for p in (x, y)]
    return abs(total), moment / total


def pixels(figure: Figure, panel: int = 0) -> npt.NDArray[np.float64]:
    return np.asarray(figure.axes[panel].images[0].get_array())


def one_row(images: Tensor) -> npt.NDArray[np.float64]:
    """Grey images side by side, a column of white between two."""
    parts = [image[0].double().clamp(0, 1).numpy() for image in images]
    white = np.ones((parts[0].shape[0], 1))
    return np.hstack([piece for part in parts for piece in (part, white)][:-1])


def drawn(figure: Figure) -> Figure:
    """The figure, after it was rendered: layouts and labels can fail late."""
    figure.savefig(io.BytesIO(), format="png")
    return figure


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# losses


def test_losses_are_the_bounds_of_the_fits(own: Comparison) -> None:
    figure = drawn(plots.losses(own))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel() == "bound (nats per data point)\nrunning median over 3 steps"
    assert legend(figure) == [*FAMILIES, "on held-out data"]
    for index, fitted in enumerate(own.fits.values()):
        raw, median, heldout = axes.lines[3 * index : 3 * index + 3]
        bound = -fitted.losses.double().numpy()
        np.testing.assert_array_equal(raw.get_ydata(), bound)
        np.testing.assert_array_equal(raw.get_xdata(), np.arange(1, 61))
        windows = [np.median(bound[i - 1 : i + 2]) for i in range(1, 59)]
        np.testing.assert_allclose(np.asarray(median.get_ydata()), windows)
        np.testing.assert_array_equal(median.get_xdata(), np.arange(2, 60))
        np.testing.assert_array_equal(heldout.get_xydata(), fitted.heldout)
        assert to_hex(raw.get_color()) == to_hex(median.get_color()) == to_hex(heldout.get_color())


def test_losses_show_the_end_of_training(own: Comparison) -> None:
    end = 5 + torch.rand(50, generator=torch.Generator().manual_seed(0))
    end[20] = 1e6  # one bad step
    losses = torch.cat([torch.linspace(1_000, 6, 50), end])
    fits = {name: replace(fitted, losses=losses) for name, fitted in own.fits.items()}
    fits = {name: replace(fitted, heldout=torch.zeros(0, 2)) for name, fitted in fits.items()}
    low, high = drawn(plots.losses(replace(own, fits=fits))).axes[0].get_ylim()
    assert -8 < low < -5.9 and -5.1 < high < -3


def test_losses_of_weighted_fits_are_the_bounds_too(own: Comparison) -> None:
    """What was minimised is no bound, and not comparable between two weights."""

    def weighted(**parts: torch.Tensor) -> Comparison:
        fits = {
            name: replace(
                fitted, weights=torch.full((60, 2), 0.5), losses=fitted.losses / 2, **parts
            )
            for name, fitted in own.fits.items()
        }
        return replace(own, fits=fits)

    figure = drawn(plots.losses(weighted()))
    for index, fitted in enumerate(own.fits.values()):
        raw = figure.axes[0].lines[3 * index]
        np.testing.assert_allclose(raw.get_ydata(), -fitted.losses, rtol=1e-5)
    assert figure.axes[0].get_ylabel().startswith("bound (nats per data point)")

    unknown = torch.full((60,), math.nan)
    figure = drawn(plots.losses(weighted(kl=unknown, reconstruction=unknown)))
    for index, fitted in enumerate(own.fits.values()):
        raw = figure.axes[0].lines[3 * index]
        np.testing.assert_array_equal(raw.get_ydata(), -fitted.losses / 2)
    assert figure.axes[0].get_ylabel().startswith("weighted objective (nats per data point)")


def without_steps(fitted: Fit) -> Fit:
    none = torch.zeros(0, dtype=torch.float64)
    parts = {"losses": none, "reconstruction": none, "kl": none}
    return replace(fitted, weights=none.reshape(0, 2), heldout=none.reshape(0, 2), **parts)


def test_a_fit_of_no_steps_has_no_curve(own: Comparison) -> None:
    first, *others = own.fits
    fits = {**own.fits, first: without_steps(own.fits[first])}
    assert legend(drawn(plots.losses(replace(own, fits=fits)))) == [*others, "on held-out data"]
    fits = {name: without_steps(fitted) for name, fitted in own.fits.items()}
    with pytest.raises(ValueError, match="expected fits with gradient steps, and all of these"):
        plots.losses(replace(own, fits=fits))


def test_losses_without_held_out_data(frozen: Comparison) -> None:
    assert legend(drawn(plots.losses(frozen))) == [*FAMILIES]


# Images


def test_reconstructions_are_the_fits(own: Comparison) -> None:
    images = TEST[:3]
    figure = drawn(plots.reconstructions(own, images))
    assert [axes.get_ylabel() for axes in figure.axes] == ["original", *FAMILIES]
    np.testing.assert_array_equal(pixels(figure), one_row(images))
    for row, fitted in enumerate(own.fits.values(), start=1):
        np.testing.assert_array_equal(pixels(figure, row), one_row(fitted.reconstruct(images)["x"]))
        assert figure.axes[row].images[0].get_clim() == (0, 1)


def test_reconstructions_take_other_dtypes(own: Comparison) -> None:
    figure = plots.reconstructions(own, TEST[:2].double())
    np.testing.assert_array_equal(pixels(figure), one_row(TEST[:2]))


def test_samples_are_the_fits(own: Comparison) -> None:
    figure = drawn(plots.samples(own, num=3, seed=2))
    assert [axes.get_title() for axes in figure.axes] == [*FAMILIES]
    for panel, fitted in enumerate(own.fits.values()):
        x = fitted.generate(3, expected=True, seed=2)["x"]
        sheet = pixels(figure, panel)  # two by two, the last place white
        np.testing.assert_array_equal(sheet[:4], one_row(x[:2]))
        np.testing.assert_array_equal(sheet[5:, :4], one_row(x[2:]))
        assert (sheet[4:, 4:] == 1).all()


def test_samples_of_a_shared_model_are_drawn_once(frozen: Comparison) -> None:
    (axes,) = plots.samples(frozen, num=4).axes
    assert axes.get_title() == "the model that all families share"


def test_grid_in_grey_and_in_colour() -> None:
    grey, colour = torch.rand(5, 1, 3, 2), torch.rand(2, 3, 4, 4) * 2 - 0.5
    sheet = pixels(drawn(plots.grid(grey, columns=3)))
    assert sheet.shape == (3 + 1 + 3, 2 + 1 + 2 + 1 + 2)
    np.testing.assert_array_equal(sheet[4:, 3:5], grey[4, 0].double())
    assert (sheet[:, 6:][4:] == 1).all()
    sheet = pixels(drawn(plots.grid(colour)))
    assert sheet.shape == (4, 4 + 1 + 4, 3)
    np.testing.assert_array_equal(sheet[:, 5:], colour[1].permute(1, 2, 0).double().clamp(0, 1))


# k-hat


def test_khats_are_the_shares_of_the_data(own: Comparison) -> None:
    figure = drawn(plots.khats(own))
    (axes,) = figure.axes
    assert axes.get_xlabel() == "k-hat"
    *lines, threshold = axes.lines
    bound = khat_threshold(40)
    np.testing.assert_array_equal(threshold.get_xdata(), [bound, bound])
    for line, row, points in zip(lines, own.rows, own.points.values(), strict=True):
        assert line.get_label() == f"{row.family}: {row.khat_bad:.0%} above the bound"
        x, share = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        for at in (0.2, bound, 0.9, 1.3):
            assert share[np.searchsorted(x, at, side="right") - 1] == np.mean(points.khat <= at)


def test_khats_may_be_infinite(own: Comparison) -> None:
    points = SimpleNamespace(khat=np.array([np.inf, -np.inf, 0.5, np.inf]))
    result: Any = SimpleNamespace(
        points={"family": points},
        num_samples=40,
        fits={"family": own.fits["mean-field"]},
        on_test=False,
    )
    (axes,) = drawn(plots.khats(result)).axes
    assert axes.get_ylabel() == "share of data up to this k-hat"
    low, high = axes.get_xlim()
    x, share = (np.asarray(values) for values in axes.lines[0].get_data())
    assert -0.5 <= low < high <= 1.5 and np.isfinite(x).all()
    assert share[np.searchsorted(x, low) - 1] == 0.25
    assert share[np.searchsorted(x, high) - 1] == 0.5


# Posteriors


def test_contours_are_ellipses_of_the_known_area() -> None:
    result, images = linear_result(2), X[40:42]
    figure = drawn(plots.posteriors(result, images))
    covariance, weights = exact(2)
    volume = math.sqrt(float(covariance.det()))
    for index, axes in enumerate(figure.axes[2:]):
        mean = weights @ images[index].flatten().double()
        sd = covariance.diagonal().sqrt().numpy()
        true, own, other = (c for c in axes.collections if isinstance(c, QuadContourSet))
        for level, mass in enumerate((0.9, 0.5)):  # (x - m)' P (x - m) <= -2 log(1 - mass)
            ellipse = -2 * math.pi * math.log(1 - mass)
            area, centre = area_and_centre(own, level)
            assert area == pytest.approx(ellipse * volume, rel=0.08)
            np.testing.assert_allclose((centre - mean.numpy()) / sd, 0, atol=0.12)
            area, centre = area_and_centre(other, level)
            assert area == pytest.approx(ellipse * 0.25, rel=0.08)
            np.testing.assert_allclose(centre / 0.5, 0, atol=0.12)
        inner, centre = area_and_centre(true, 1)
        ring, _ = area_and_centre(true, 0)
        assert inner == pytest.approx(2 * math.pi * math.log(2) * volume, rel=0.025)
        assert inner + ring == pytest.approx(2 * math.pi * math.log(10) * volume, rel=0.025)
        np.testing.assert_allclose((centre - mean.numpy()) / sd, 0, atol=0.01)
        np.testing.assert_array_equal(pixels(figure, index), images[index, 0].double())
    assert legend(figure) == ["exact", "wide", "exact posterior"]


def test_the_exact_posterior_is_found_where_no_guide_looks() -> None:
    figure = plots.posteriors(
        compare(
            partial(linear, dim=2),
            {"wide": wide},
            SimpleNamespace(train=X[:40], test=TEST),
            num_samples=40,
            steps=1,
            progress=False,
        ),
        3 * X[40:41],
    )
    _, weights = exact(2)
    mean = weights @ (3 * X[40]).flatten().double()
    assert float(mean.norm()) > 1.5, "the guide, of scale 1/2 around 0, would find it"
    _, centre = area_and_centre(figure.axes[1].collections[0], 1)  # type: ignore[arg-type]
    np.testing.assert_allclose(centre, mean, atol=0.01)


def test_three_units_show_the_most_correlated_pair() -> None:
    figure = drawn(plots.posteriors(linear_result(3), X[40:41]))
    covariance, _ = exact(3)
    sd = covariance.diagonal().sqrt()
    correlation = (covariance / sd / sd[:, None]).abs().triu(diagonal=1)
    i, j = divmod(int(correlation.argmax()), 3)
    panel = figure.axes[1]
    assert (panel.get_xlabel(), panel.get_ylabel()) == (f"z[{i}]", f"z[{j}]")
    assert legend(figure) == ["exact", "wide"], "no exact posterior but for two units"
    assert len(panel.collections) == 2


def test_a_frozen_model_is_shared_and_a_trained_one_is_not(
    frozen: Comparison, own: Comparison
) -> None:
    figure = drawn(plots.posteriors(frozen, TEST[:5], num_samples=50))
    assert len(figure.axes) == 2 * 5
    with pytest.raises(ValueError, match=r"'full covariance' and 'mean-field' each trained a copy"):
        plots.posteriors(own, TEST[:2], num_samples=50)


def test_a_family_alone_needs_to_share_nothing() -> None:
    result = compare(
        VAE(SHAPE, 3),
        {"alone": Encoder(SHAPE, MeanField(3, 8))},
        SimpleNamespace(train=X[:40], test=TEST),
        num_samples=40,
        steps=1,
        progress=False,
    )
    assert legend(drawn(plots.posteriors(result, X[:1], num_samples=50))) == ["alone"]


# The latent space


def test_dots_are_the_means_along_the_principal_directions() -> None:
    result = linear_result(3)
    figure = drawn(plots.latent_space(result))
    means = np.stack(
        [one.draws["z"].double().mean(0).numpy() for one in result.posteriors.values()]
    )
    pooled = means.reshape(-1, 3)
    _, vectors = np.linalg.eigh(np.cov(pooled, rowvar=False))
    directions = vectors[:, [2, 1]]
    bound = khat_threshold(40)
    for axes, own, points in zip(figure.axes, means, result.points.values(), strict=True):
        full, hollow = (np.asarray(dots.get_offsets()) for dots in axes.collections)
        assert (len(full), len(hollow)) == (
            (points.khat <= bound).sum(),
            (points.khat > bound).sum(),
        )
        expected = np.abs((own @ directions)[points.khat <= bound])  # up to the signs
        np.testing.assert_allclose(np.abs(full), expected, atol=1e-6)
        assert axes.get_title().endswith(f"\n{np.mean(points.khat > bound):.0%} above the bound")
        assert [patch.radius for patch in axes.patches] == [1, 2]  # type: ignore[attr-defined]
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert legend(figure)[2:] == ["prior: 1 and 2 sd"]


def test_two_units_are_shown_as_they_are(frozen: Comparison, own: Comparison) -> None:
    for result in (frozen, own):
        figure = drawn(plots.latent_space(result))
        assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("z[0]", "z[1]")
        for axes, posterior in zip(figure.axes, result.posteriors.values(), strict=True):
            dots = np.concatenate([np.asarray(d.get_offsets()) for d in axes.collections])
            means = posterior.draws["z"].double().mean(0).numpy()
            order, expected = np.lexsort(dots.T), np.lexsort(means.T)
            np.testing.assert_allclose(dots[order], means[expected], atol=1e-6)


def test_a_prior_that_is_not_standard_normal_has_no_circles() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.ones(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, None] + torch.zeros(2), scale).to_event(1))

    x = torch.randn(9, generator=torch.Generator().manual_seed(0))
    result = compare(model, {"q": guide}, x, num_samples=40, steps=1, progress=False)
    figure = drawn(plots.latent_space(result))
    assert not figure.axes[0].patches and len(legend(figure)) == 2


# All of them


def test_a_family_has_one_colour(frozen: Comparison) -> None:
    bounds, panel = plots.losses(frozen), plots.posteriors(frozen, X[:1], num_samples=50)
    colours = [
        [to_hex(handle.get_color()) for handle in figure.legends[0].get_lines()[:2]]
        for figure in (bounds, plots.khats(frozen), panel)
    ]
    assert colours[0] == colours[1] == colours[2] and len(set(colours[0])) == 2


@pytest.mark.parametrize("name", STRANGE_NAMES, ids=lambda name: ascii(name[:20]))
def test_names_are_text_in_legends(name: str, own: Comparison) -> None:
    result = renamed(own, name)
    label = STRANGE_NAMES[name]
    assert legend(drawn(plots.losses(result)))[:2] == [label, "full covariance"]
    first, second = legend(drawn(plots.khats(result)))
    assert first.startswith(f"{label}: ") and second.startswith("full covariance: ")


def test_names_are_text_in_titles(own: Comparison, frozen: Comparison) -> None:
    names = list(STRANGE_NAMES)
    for pair in itertools.pairwise(names):
        expected = [STRANGE_NAMES[name] for name in pair]
        result = renamed(own, *pair)
        rows = drawn(plots.reconstructions(result, result.data[:2])).axes
        assert [row.get_ylabel().replace("\n", " ") for row in rows] == ["original", *expected]
        for figure in (plots.samples(result, num=2), plots.latent_space(result)):
            titles = [panel.get_title().replace("\n", " ") for panel in drawn(figure).axes]
            assert all(t.startswith(e) for t, e in zip(titles, expected, strict=True))
    result = renamed(frozen, *names[:2])
    figure = drawn(plots.posteriors(result, result.data[:1], num_samples=30))
    assert legend(figure)[:2] == [STRANGE_NAMES[name] for name in names[:2]]


def test_a_family_named_like_the_originals_has_a_row_of_its_own(own: Comparison) -> None:
    figure = plots.reconstructions(renamed(own, "original"), own.data[:2])
    labels = [row.get_ylabel() for row in figure.axes]
    assert labels == ["original", "original", "full covariance"]
    assert not np.array_equal(pixels(figure, 0), pixels(figure, 1))


def test_names_of_latent_sites_are_text_on_axes() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            zeros = torch.zeros(len(x))
            z = pyro.sample("$\\frac{$", dist.Normal(zeros, 1.0)) + pyro.sample(
                "_z", dist.Normal(zeros, 1.0)
            )
            pyro.sample(
                "x",
                dist.Normal(z[:, None, None, None], 1.0).expand([len(x), *SHAPE]).to_event(3),
                obs=x,
            )

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("$\\frac{$", dist.Normal(loc.expand(len(x)), 1.0))
            pyro.sample("_z", dist.Normal(loc.expand(len(x)), 1.0))

    result = compare(model, {"q": guide}, X, num_samples=30, steps=1, progress=False)
    for figure in (plots.latent_space(result), plots.posteriors(result, X[:1], num_samples=30)):
        panel = drawn(figure).axes[-1]
        assert {panel.get_xlabel(), panel.get_ylabel()} == {r"\$\frac{\$", " _z"}


def test_a_legend_is_no_wider_than_its_figure(own: Comparison) -> None:
    long = ("a" * 200, "b" * 200)
    figure = drawn(plots.losses(renamed(own, *long)))
    assert figure.legends[0].get_window_extent().width < figure.bbox.width
    result = compared(own.fits["mean-field"].model, steps=1)
    narrow = drawn(plots.posteriors(result, own.data[:1], num_samples=30))
    assert len(legend(narrow)) == 3  # beside one another they are wider than 4 inches
    assert narrow.legends[0].get_window_extent().width < narrow.bbox.width


def test_pyplot_holds_no_figure(frozen: Comparison) -> None:
    for figure in (
        plots.losses(frozen),
        plots.khats(frozen),
        plots.samples(frozen, num=1),
        plots.reconstructions(frozen, X[:1]),
        plots.posteriors(frozen, X[:1], num_samples=50),
        plots.latent_space(frozen),
        plots.grid(X),
    ):
        assert isinstance(figure, Figure)
    assert _pylab_helpers.Gcf.get_all_fig_managers() == []


def test_fits_may_live_on_an_accelerator(device: torch.device) -> None:
    guide = Encoder(SHAPE, MeanField(2, 8))
    shared = fit(VAE(SHAPE, 2), guide, X, steps=2, device=device, progress=False).model
    assert {t.device.type for t in shared.state.tensors().values()} == {device.type}
    result = compared(shared, steps=2, device=device)
    for images in (TEST[:2], TEST[:2].to(device)):
        drawn(plots.reconstructions(result, images))
        drawn(plots.posteriors(result, images, num_samples=50))
    for draw in (plots.losses, plots.khats, plots.samples, plots.latent_space):
        drawn(draw(result))
    drawn(plots.grid(TEST.to(device)))


def test_random_state_is_left_alone(frozen: Comparison) -> None:
    before = torch.random.get_rng_state()
    plots.posteriors(frozen, X[:1], num_samples=50)
    plots.samples(frozen, num=1)
    plots.latent_space(frozen)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("draw", [plots.reconstructions, plots.posteriors])
@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (X[0], ValueError, r"shape \(n, C, H, W\) with C = 1 or 3, got \(1, 4, 4\)"),
        (X[:0], ValueError, "at least one image"),
        (X.repeat(1, 2, 1, 1), ValueError, r"got \(60, 2, 4, 4\)"),
        (X.long(), TypeError, "got torch.int64"),
        (X.numpy(), TypeError, "got ndarray"),
    ],
)
def test_images_are_checked(
    draw: Callable[..., Figure],
    images: Any,
    error: type[Exception],
    message: str,
    frozen: Comparison,
) -> None:
    with pytest.raises(error, match=message):
        draw(frozen, images)
    with pytest.raises(error, match=message):
        plots.grid(images)


def test_numbers_are_checked(frozen: Comparison) -> None:
    with pytest.raises(ValueError, match="at least one column, got 0"):
        plots.grid(X, columns=0)
    with pytest.raises(ValueError, match="at least one data point to generate, got 0"):
        plots.samples(frozen, num=0)
    with pytest.raises(ValueError, match="at least 21 draws for a contour, got 20"):
        plots.posteriors(frozen, X[:1], num_samples=20)


def test_models_that_draw_no_pictures_are_refused() -> None:
    def two_sites(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x)
            pyro.sample("y", dist.Normal(z[:, 0], 1.0), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = pyro.param("loc", torch.zeros(1)).expand(len(x), 1)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    data = SimpleNamespace(train=(X[:9, 0, 0, 0],) * 2, test=(X[:9, 0, 0, 0],) * 2)
    result = compare(two_sites, {"q": guide}, data, num_samples=40, steps=1, progress=False)
    with pytest.raises(ValueError, match=r"'q': expected a model with one observed site, got \['x"):
        plots.samples(result)
    with pytest.raises(ValueError, match="one tensor of images, but these programs take 2"):
        plots.reconstructions(result, X)
    one = compare(
        VAE(SHAPE, 1),
        {"q": Encoder(SHAPE, MeanField(1, 8))},
        SimpleNamespace(train=X, test=X),
        num_samples=40,
        steps=1,
        progress=False,
    )
    with pytest.raises(ValueError, match=r"at least two latent units to draw, got \['z'\]"):
        plots.posteriors(one, X[:1])
    with pytest.raises(ValueError, match=r"at least two latent units to draw, got \['z'\]"):
        plots.latent_space(one)
