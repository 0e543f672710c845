"""Posteriors of single data points in pictures, against one another and against the truth.

    posteriors    of single images: two latent units, every family, and the exact posterior
    latent_space  of all data points: where their means lie, and whose draws are not the posterior's
    khats         of all data points: how far the draws may be trusted

`pyro_vi.plots` has them all, with the other figures; what they share is in `panels`.
"""

from __future__ import annotations

__all__ = ["khats", "latent_space", "posteriors"]

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch
from matplotlib.ticker import PercentFormatter
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi.comparison import Comparison, figure_label
from pyro_vi.diagnostics import khat_threshold
from pyro_vi.inference import Fit
from pyro_vi.plots.densities import CELLS, Density, kernel_density, level
from pyro_vi.plots.style import (
    BLOCKS,
    GREYS,
    MASS_TITLE,
    MASSES,
    WIDTH,
    array,
    bare_axes,
    check_images,
    colours,
    contours,
    draw_images,
    family_lines,
    legend,
    limit,
    to_fit,
)
from pyro_vi.process_state import seeded
from pyro_vi.programs import as_arguments, log_prob_rows

Array = npt.NDArray[np.float64]

_FAR = 1e6  # beyond every axis
_PASSES = 10  # at most, until a grid holds a density


def posteriors(
    result: Comparison, images: Tensor, *, num_samples: int = 4_000, seed: int = 0
) -> Figure:
    """What each family makes of the same image: its posterior over two latent units, overlaid.

    Contours hold 50% and 90% of the mass of a Gaussian kernel estimate from draws of q(z | x); the
    estimate keeps the draws' mean and covariance. For each image the two units are those with the
    largest absolute correlation under any family: there a mean-field family, whose units are
    independent, can miss the most. If the model has exactly two latent units, its exact posterior
    p(z | x), from log p(x, z) on a grid, stands in grey behind.

    The families must share one model. Where each has trained its own copy, unit 3 of one is not
    unit 3 of another (latents are learned up to rotations and the like), and to draw them over one
    another would mean nothing. So fit a model once and compare guides for it:

        fitted = fit(model, guide, data.train)
        result = compare(fitted.model, {"mean-field": ..., "full covariance": ...}, data)

    Args:
        result: what `compare` returned, for a frozen model or one without parameters.
        images: as the model observes them, such as `result.data[:4]`; shape (n, C, H, W) with
            C = 1 or 3, values in [0, 1]; each has a panel, four panels to a row.
        num_samples: draws for each image and family, at least 21.
        seed: of the draws.

    Returns:
        A figure with two panels per image: the image, and its posteriors below. Latents have the
        unit of their prior's standard deviation.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: another shape; too few draws; fewer than two latent units; fits that do not
            take one tensor; or families that do not share a model.

    References:
        West, "Approximating posterior distributions by mixtures", Journal of the Royal Statistical
        Society B 55(2), 1993: the kernel estimate.
    """
    check_images(images)
    if num_samples < 21:
        raise ValueError(f"expected at least 21 draws for a contour, got {num_samples}")
    fits = {name: fit for name, fit in result.fits.items() if name in result.posteriors}
    if not fits:
        raise ValueError("expected families with posteriors, and a diffusion has a bound alone")
    draws = {
        family: fit.posterior(to_fit(fit, images), num_samples, seed=seed).draws
        for family, fit in fits.items()
    }
    first, fit = next(iter(fits.items()))
    _check_shared(result, images, {name: value[:50] for name, value in draws[first].items()})
    units = _unit_names(draws[first])
    if len(units) < 2:
        raise ValueError(f"expected at least two latent units to draw, got {units}")
    flat = {family: _flat(values) for family, values in draws.items()}

    count = len(images)
    across = min(BLOCKS, count)
    down = math.ceil(count / across)
    size = min(4.0, WIDTH / across)
    figure = Figure(figsize=(across * size, down * (size * 1.35) + 0.7), layout="constrained")
    panels = figure.subplots(
        2 * down, across, squeeze=False, gridspec_kw={"height_ratios": [1, 3] * down}
    )
    for index in range(across * down):
        row, column = divmod(index, across)
        picture, axes = panels[2 * row, column], bare_axes(panels[2 * row + 1, column], ticks=5)
        if index >= count:
            picture.remove()
            axes.remove()
            continue
        draw_images(picture, images[index : index + 1], columns=1)
        i, j = _most_correlated([z[:, index] for z in flat.values()])
        pairs = [z[:, index][:, [i, j]] for z in flat.values()]
        ranges = [np.percentile(pair, (0.5, 99.5), axis=0) for pair in pairs]
        if len(units) == 2:
            exact = _exact(fit, images[index], draws[first], np.concatenate(pairs), seed)
            ranges.append(_fill(axes, exact))
        for family, pair in zip(flat, pairs, strict=True):
            contours(axes, kernel_density(pair), colours(result)[family])
        limit(axes, np.concatenate(ranges))
        wide = int(9 * size)
        axes.set(xlabel=figure_label(units[i], wide=wide), ylabel=figure_label(units[j], wide=wide))
    handles: list[Any] = family_lines(result)
    if len(units) == 2:
        handles.append(Patch(facecolor=GREYS[1], label="exact posterior"))
    legend(figure, handles, title=MASS_TITLE)
    return figure


def latent_space(result: Comparison) -> Figure:
    """Where the data lie in the latent space of each family: a dot per data point, at E_q[z].

    The two axes are the directions along which the means spread most (principal components), found
    once for all families where they share one model, and for each family by itself where they do
    not; two latent units are shown as they are. A hollow dot is a data point whose k-hat is above
    the bound (`diagnostics.khat_threshold`): its draws are not the posterior's. Circles are one
    and two standard deviations of the prior, where that is a standard normal.

    Args:
        result: what `compare` returned, with a posterior of each data point.

    Returns:
        A figure with one panel per family, all to one scale; latents in their own unit.

    Raises:
        ValueError: one posterior of all data together; or fewer than two latent units.
    """
    if result.is_joint:
        raise ValueError("expected a posterior of each data point, got one of all data together")
    means = {name: _flat(one.draws).mean(axis=0) for name, one in result.posteriors.items()}
    if not means:
        raise ValueError("expected families with posteriors, and a diffusion has a bound alone")
    names = _unit_names(next(iter(result.posteriors.values())).draws)
    if len(names) < 2:
        raise ValueError(f"expected at least two latent units to draw, got {names}")
    pooled = np.concatenate(list(means.values()))
    flat = {name: own @ _principal(pooled if result.shared else own) for name, own in means.items()}
    shown = np.concatenate(list(flat.values()))
    centre, reach = (shown.min(axis=0) + shown.max(axis=0)) / 2, np.ptp(shown, axis=0).max() / 2
    labels = [f"{nth} principal component" for nth in ("1st", "2nd")]
    if len(names) == 2:
        labels = [figure_label(name, wide=28) for name in names]
    standard = all(
        _is_standard_normal(result.fits[name], one.draws) for name, one in result.posteriors.items()
    )
    bound = khat_threshold(result.num_samples)

    across = min(BLOCKS, len(means))
    down = math.ceil(len(means) / across)
    size = min(4.0, WIDTH / across)
    figure = Figure(figsize=(across * size, down * (size + 0.4) + 0.4), layout="constrained")
    for number, family in enumerate(flat):
        colour = colours(result)[family]
        axes = bare_axes(figure.add_subplot(down, across, number + 1), ticks=5)
        khat = (
            result.points[family].khat if family in result.points else np.zeros(len(flat[family]))
        )
        for dots, face in ((khat <= bound, colour), (khat > bound, "none")):
            x, y = flat[family][dots].T
            axes.scatter(x, y, s=14, facecolors=face, edgecolors=colour, linewidths=0.8)
        if standard:
            for radius in (1, 2):
                axes.add_patch(Circle((0, 0), radius, fill=False, color="0.6", ls="--", zorder=0))
        title = figure_label(family, wide=int(9 * size))
        axes.set_title(f"{title}\n{np.mean(khat > bound):.0%} above the bound", fontsize=11)
        axes.set(xlabel=labels[0], ylabel="" if number % across else labels[1])
        axes.set_box_aspect(1)
        limit(axes, centre + reach * np.array([[-1.0, -1.0], [1.0, 1.0]]))
    dot: dict[str, Any] = {"color": "0.3", "marker": "o", "ls": "", "markersize": 5}
    handles = [
        Line2D([], [], **dot, label=f"k-hat up to {bound:.2f}"),
        Line2D([], [], **dot, fillstyle="none", label=f"k-hat above {bound:.2f}"),
    ]
    if standard:
        handles.append(Line2D([], [], color="0.6", ls="--", label="prior: 1 and 2 sd"))
    legend(figure, handles)
    return figure


def khats(result: Comparison) -> Figure:
    """How far each family's draws can be trusted: the share of the data below each k-hat.

    Left of the bound (`diagnostics.khat_threshold`) the draws can be reweighted to the exact
    posterior. The legend gives the share of the data that lies right of it. The axis ends at 1.5
    (above 1 the weights have no mean at all): a curve that leaves below 100% has the rest beyond,
    and one that enters above 0% has k-hats of `-inf`, from constant weights.

    Args:
        result: what `compare` returned.

    Returns:
        A figure with one panel: shares of the data against k-hat, a dimensionless number.
    """
    figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
    axes = bare_axes(figure.add_subplot())
    bound = khat_threshold(result.num_samples)
    low, high = 0.0, 1.0
    for family, points in result.points.items():
        khat = np.sort(points.khat)
        finite = khat[np.isfinite(khat)]
        low, high = finite.min(initial=low), finite.max(initial=high)
        share = np.arange(len(khat) + 2) / len(khat)
        share[-1] = 1.0
        axes.plot(
            np.concatenate([[-_FAR], khat.clip(-_FAR, _FAR), [_FAR]]),
            share,
            drawstyle="steps-post",
            color=colours(result)[family],
            linewidth=2,
            label=f"{figure_label(family)}: {float(np.mean(khat > bound)):.0%} above the bound",
        )
    axes.axvline(bound, color="0.3", linestyle="--", linewidth=1)
    axes.text(
        bound,
        1.01,
        f"bound {bound:.2f}",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        color="0.3",
    )
    axes.set(
        xlim=(max(low - 0.05, -0.5), min(high + 0.05, 1.5)),
        ylim=(0, 1.01),
        xlabel="k-hat",
        ylabel=f"share of {'test data' if result.on_test else 'data'} up to this k-hat",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    # Each label says a sentence: more of them side by side would run out of the picture.
    legend(figure, axes.get_legend_handles_labels()[0], columns=3)
    return figure


# Latent units of one data point


def _unit_names(draws: Mapping[str, Tensor]) -> list[str]:
    """The latent units of all sites, in the order of `_flat`."""
    names: list[str] = []
    for site, values in draws.items():
        units = values[0, 0].numel()
        names += [site] if units == 1 else [f"{site}[{unit}]" for unit in range(units)]
    return names


def _flat(draws: Mapping[str, Tensor]) -> Array:
    """Draws by site as one array (S, n, D) of D units."""
    return array(torch.cat([v.double().reshape(*v.shape[:2], -1) for v in draws.values()], dim=-1))


def _most_correlated(draws: Iterable[Array]) -> tuple[int, int]:
    """The pair of units with the largest absolute correlation in any of the arrays (S, D)."""
    with np.errstate(all="ignore"):  # a unit that never moves correlates with none
        correlations = [np.abs(np.nan_to_num(np.corrcoef(z, rowvar=False))) for z in draws]
    largest = np.triu(np.max(correlations, axis=0), k=1)
    i, j = np.unravel_index(int(largest.argmax()), largest.shape)
    return (int(i), int(j)) if i < j else (0, 1)  # nothing correlates: any pair will do


def _log_joint(fit: Fit, images: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
    """log p(x, z) in nats, a row of `images` and `latents` each; (rows,)."""
    values = {name: value.to(fit.template) for name, value in latents.items()}  # type: ignore[arg-type]
    with torch.no_grad():
        program = poutine.condition(fit.model, data=values)
        trace = poutine.trace(program).get_trace(to_fit(fit, images))
        trace.compute_log_prob()
        rows = [
            log_prob_rows(site, fit.plate)
            for site in trace.nodes.values()
            if site["type"] == "sample" and not site_is_subsample(site)
        ]
    return torch.stack(rows).sum(0).cpu()


def _check_shared(result: Comparison, images: Tensor, draws: Mapping[str, Tensor]) -> None:
    """One model gives the same log p(x, z) at the same x and z, whoever holds it."""
    rows = images.repeat(len(next(iter(draws.values()))), 1, 1, 1)
    latents = {name: values.flatten(0, 1) for name, values in draws.items()}
    (first, one), *others = result.fits.items()
    if not others:
        return
    expected = _log_joint(one, rows, latents)
    for family, fit in others:
        if not torch.allclose(_log_joint(fit, rows, latents), expected, rtol=1e-5, atol=1e-4):
            raise ValueError(
                f"expected families that share one model, but {family!r} and {first!r} each"
                " trained a copy, whose latent units are not the same units; fit the model once"
                " and compare guides for it: compare(fitted.model, {...}, data)"
            )


# The exact posterior of one data point


def _exact(
    fit: Fit, image: Tensor, draws: Mapping[str, Tensor], guesses: Array, seed: int
) -> Density:
    """p(z | x) of a model with two latent units, on a grid that closes in on its mass.

    The first grid spans all of the guides' draws and the prior's, so that no guide hides a mode.
    From then on a side that cuts mass off moves out, and one that stands too far off moves in.
    """
    prior = fit.generate(1_000, seed=seed)
    wide = torch.cat([prior[name].cpu().double().reshape(1_000, -1) for name in draws], dim=-1)
    points = np.concatenate([guesses, wide.numpy()])
    low, high = points.min(axis=0), points.max(axis=0)
    sizes = [values[0, 0].numel() for values in draws.values()]
    for _ in range(_PASSES):
        x, y = np.meshgrid(*np.linspace(low, high, CELLS).T, indexing="ij")
        z = torch.from_numpy(np.stack([x, y], axis=-1).reshape(-1, 2))
        latents = {
            name: part.reshape(-1, *values.shape[2:])
            for (name, values), part in zip(draws.items(), z.split(sizes, dim=-1), strict=True)
        }
        log_p = _log_joint(fit, image.expand(len(z), *image.shape), latents)
        density = (log_p - log_p.max()).exp().numpy().reshape(CELLS, CELLS)
        rows, columns = np.nonzero(density > 1e-5)
        first = np.array([rows.min(), columns.min()])
        last = np.array([rows.max(), columns.max()])
        cut = (first == 0) | (last == CELLS - 1)
        if not cut.any() and (last - first > CELLS / 2).all():
            break
        cell = (high - low) / (CELLS - 1)
        high = low + cell * (last + np.where(last == CELLS - 1, CELLS / 2, 1))
        low = low + cell * (first - np.where(first == 0, CELLS / 2, 1))
    return x, y, density


def _fill(axes: Axes, exact: Density) -> Array:
    """Fills the masses of a density; returns the corners of the largest, (2, 2)."""
    contours(axes, exact)
    x, y, density = exact
    inside = density >= level(density, max(MASSES))
    return np.array([[f(x[inside]), f(y[inside])] for f in (np.min, np.max)])


# The latent space


def _principal(points: Array) -> Array:
    """The two directions along which points (n, D) spread most, (D, 2); two units stay theirs."""
    if points.shape[1] == 2:
        return np.eye(2)
    _, _, directions = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    two: Array = directions[:2].T
    return two * np.sign(two[np.abs(two).argmax(axis=0), [0, 1]])  # the same sign every time


def _is_standard_normal(fit: Fit, sites: Iterable[str]) -> bool:
    """Whether the prior of these latent sites is independent standard normals."""
    args, kwargs = as_arguments(fit.template)
    with seeded(0), torch.no_grad():
        trace = poutine.trace(fit.model).get_trace(*args, **kwargs)
    for site in sites:
        prior = trace.nodes[site]["fn"]
        while isinstance(prior, dist.Independent):
            prior = prior.base_dist
        if not isinstance(prior, dist.Normal):
            return False
        if not ((prior.mean == 0).all() and (prior.stddev == 1).all()):
            return False
    return True
