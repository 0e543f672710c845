"""Figures of joint posteriors hold what the draws are: the densities of known Gaussians."""

import io
import math
from dataclasses import replace
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
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from pyro_vi import compare, plots
from pyro_vi.comparison import Comparison, figure_label
from pyro_vi.plots.densities import curve

X = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
COVARIANCE = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 4.0]])


def correlated(x: Tensor) -> None:
    b = pyro.sample("b", dist.MultivariateNormal(torch.zeros(3), COVARIANCE))
    pyro.deterministic("shifted", b[2] + 10)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0 * b[0], 1.0), obs=x)


def its_posterior(x: Tensor) -> None:
    still = 0 * pyro.param("unused", torch.zeros(()))
    pyro.sample("b", dist.MultivariateNormal(torch.zeros(3) + still, COVARIANCE))


def far(x: Tensor) -> None:
    still = 0 * pyro.param("unused", torch.zeros(()))
    loc = torch.tensor([0.0, 0.0, 6.0]) + still
    pyro.sample("b", dist.Normal(loc, torch.tensor([1.0, 1.0, 2.0])).to_event(1))


@pytest.fixture(scope="module")
def joint() -> Comparison:
    draws = dist.MultivariateNormal(torch.zeros(3), COVARIANCE)
    with pyro.poutine.seed(rng_seed=3):
        reference = draws.sample((4_000,))
    return compare(
        correlated,
        {"exact": its_posterior, "far": far, "point": AutoDelta(correlated)},
        X,
        reference={"b": reference},
        num_samples=4_000,
        steps=1,
        progress=False,
    )


def area_and_centre(contour: QuadContourSet, level: int) -> tuple[float, npt.NDArray[np.float64]]:
    """Of the polygons at a level, holes taken out."""
    total, moment = 0.0, np.zeros(2)
    for polygon in contour.get_paths()[level].to_polygons():
        x, y = np.asarray(polygon).T
        cross = x[:-1] * y[1:] - x[1:] * y[:-1]
        total += cross.sum() / 2
        moment += [((p[:-1] + p[1:]) * cross).sum() / 6 for p in (x, y)]
    return abs(total), moment / total


def drawn(figure: Figure) -> Figure:
    """The figure, after it was rendered: layouts and labels can fail late."""
    figure.savefig(io.BytesIO(), format="png")
    return figure


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_marginals_are_the_densities(joint: Comparison) -> None:
    figure = drawn(plots.marginals(joint))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "b[2]" and titles[3] == "shifted", "the furthest first, the unknown last"
    assert sorted(titles[1:3]) == ["b[0]", "b[1]"]
    axes = figure.axes[0]
    exact, other, point = axes.lines
    for line, mean in ((exact, 0.0), (other, 6.0)):
        at, density = (np.asarray(values) for values in line.get_data())
        expected = np.exp(-((at - mean) ** 2) / 8) / math.sqrt(8 * math.pi)
        np.testing.assert_allclose(density, expected, atol=0.02)
    value = float(joint.posteriors["point"].draws["b"][0, 2])
    assert list(np.asarray(point.get_xdata())) == pytest.approx([value, value])
    assert len(axes.collections) == 1 and not figure.axes[3].collections, "the reference, if known"
    assert legend(figure) == ["exact", "far", "point", "reference"]
    assert figure.get_suptitle() == ""


def test_marginals_that_are_left_out_are_counted() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("many", dist.Normal(torch.zeros(3, 5), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    result = compare(
        model,
        {"q": AutoNormal(model), "again": AutoNormal(model)},
        X,
        num_samples=40,
        steps=1,
        progress=False,
    )
    figure = drawn(plots.marginals(result))
    assert [axes.get_title() for axes in figure.axes][:6] == [
        *(f"many[0, {i}]" for i in range(5)),
        "many[1, 0]",
    ]
    assert len(figure.axes) == 12
    assert figure.get_suptitle() == "12 of 15 marginals, in order; 3 are left out"
    assert len(drawn(plots.pairs(result)).axes) == 10


def test_pairs_are_ellipses_of_the_known_area(joint: Comparison) -> None:
    figure = drawn(plots.pairs(joint))
    assert len(figure.axes) == 10
    assert [axes.get_xlabel() for axes in figure.axes[6:]] == ["b[0]", "b[1]", "b[2]", "shifted"]
    axes = figure.axes[1]
    assert axes.get_ylabel() == "b[1]" and axes.get_xlim() == figure.axes[0].get_xlim()
    known, own, other = (c for c in axes.collections if isinstance(c, QuadContourSet))
    for contour, volume in ((own, 0.6), (other, 1.0)):
        for level, mass in enumerate((0.9, 0.5)):
            area, centre = area_and_centre(contour, level)
            assert area == pytest.approx(-2 * math.pi * math.log(1 - mass) * volume, rel=0.1)
            np.testing.assert_allclose(centre, 0, atol=0.12)
    inner, _ = area_and_centre(known, 1)
    assert inner == pytest.approx(2 * math.pi * math.log(2) * 0.6, rel=0.1)
    assert len(axes.lines) == 1, "a cross for the family that holds both at a point"


def test_heavy_tails_do_not_wreck_densities() -> None:
    generator = np.random.default_rng(0)
    draws = generator.normal(size=(4_000, 2))
    draws[:10] *= 1e6
    result: Any = SimpleNamespace(
        is_joint=True,
        reference={},
        marginals={},
        points={},
        fits={"q": None},
        posteriors={
            "q": SimpleNamespace(
                plate="data",
                dims={"b": ()},
                sites={"b": torch.from_numpy(draws)},
            )
        },
    )
    for axes in drawn(plots.marginals(result)).axes:
        assert -4 < axes.get_xlim()[0] < axes.get_xlim()[1] < 4
        assert np.max(np.asarray(axes.lines[0].get_ydata())) == pytest.approx(0.4, abs=0.03)
    contour = drawn(plots.pairs(result)).axes[1].collections[0]
    assert isinstance(contour, QuadContourSet)
    area, _ = area_and_centre(contour, 0)
    assert area == pytest.approx(2 * math.pi * math.log(10), rel=0.1)


def test_a_density_stays_within_its_bound() -> None:
    draws = np.random.default_rng(0).exponential(size=4_000)
    at = np.linspace(-1, 8, 901)
    density = curve(draws, at)
    assert (density[at < 0] == 0).all()
    assert density[np.searchsorted(at, 0.02)] == pytest.approx(1, abs=0.15)  # half without mirrors
    assert density.sum() * 0.01 == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", STRANGE_NAMES, ids=lambda name: ascii(name[:20]))
def test_names_are_text(name: str, joint: Comparison) -> None:
    result = renamed(joint, name)
    sites = {"b": name, "shifted": f"{name}s"}
    result = replace(
        result,
        posteriors={
            family: replace(
                posterior,
                draws={sites[site]: values for site, values in posterior.draws.items()},
                deterministic={sites[s]: values for s, values in posterior.deterministic.items()},
                dims={sites.get(site, site): plates for site, plates in posterior.dims.items()},
            )
            for family, posterior in result.posteriors.items()
        },
        reference={},
        marginals={},
    )
    marginals, pairs = drawn(plots.marginals(result)), drawn(plots.pairs(result))
    for figure in (marginals, pairs):
        assert legend(figure)[0].replace("\n", " ") == STRANGE_NAMES[name]
        assert legend(figure)[1] == "far"
    titles = [panel.get_title().replace("\n", " ") for panel in marginals.axes]
    expected = [f"{name}[0]", f"{name}[1]", f"{name}[2]", f"{name}s"]
    assert titles == [figure_label(scalar) for scalar in expected]
    if 1 < len(name) < 40:
        assert titles[0].startswith(STRANGE_NAMES[name].rstrip())


def test_figures_of_the_other_kind_of_posterior_are_refused(joint: Comparison) -> None:
    def local(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.ones(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    each = compare(local, {"q": guide}, X, num_samples=40, steps=1, progress=False)
    for draw in (plots.marginals, plots.pairs):
        with pytest.raises(ValueError, match="one posterior of all data together, got one of each"):
            draw(each)
    with pytest.raises(ValueError, match="a posterior of each data point, got one of all data"):
        plots.latent_space(joint)


def test_one_scalar_has_a_marginal_and_no_pair() -> None:
    def one(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    alone = compare(one, {"q": AutoNormal(one)}, X, num_samples=40, steps=1, progress=False)
    assert len(drawn(plots.marginals(alone)).axes) == 1
    with pytest.raises(ValueError, match=r"at least two scalars to draw in pairs, got \['mean'\]"):
        plots.pairs(alone)


def test_pyplot_holds_no_figure(joint: Comparison) -> None:
    for figure in (plots.marginals(joint), plots.pairs(joint)):
        assert isinstance(figure, Figure)
    assert _pylab_helpers.Gcf.get_all_fig_managers() == []
