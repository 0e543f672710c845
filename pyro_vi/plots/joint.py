"""Posteriors of all data together in pictures: every family, and reference draws behind.

    marginals  every scalar by itself
    pairs      the scalars that depend on one another most

`pyro_vi.plots` has them both, with the other figures; what they share is in `panels`.
"""

from __future__ import annotations

__all__ = ["marginals", "pairs"]

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from pyro_vi.comparison import Comparison, figure_label, scalar_name
from pyro_vi.plots.densities import curve, kernel_density
from pyro_vi.plots.style import (
    BLOCKS,
    GREYS,
    MASS_TITLE,
    WIDTH,
    bare_axes,
    colours,
    contours,
    family_lines,
    legend,
)

Array = npt.NDArray[np.float64]
Scalar = tuple[str, tuple[int, ...]]  # a site, and the place in it

_POINTS = 300  # of a density of one scalar
_MARGINALS = 12  # panels at most
_PAIRED = 4  # scalars in a pair plot, at most
_CANDIDATES = 200  # among which these are looked for
_BESIDE = 28  # characters in a line of the legend beside the panels
_TALLEST = 3  # a density may be so many times as tall as the median one, before it is cut


def marginals(result: Comparison) -> Figure:
    """The posterior of every scalar by itself, under each family: kernel estimates, overlaid.

    Scalars are those of the latent and deterministic sites, twelve at most: with a reference, those
    with the largest Wasserstein distance from it under some family; without one, in order, those
    that the data points share first. A family that holds its latents at a point (AutoDelta) is a
    vertical line there. Panels span the 0.5th to the 99.5th percentile of all draws, and densities
    more than three times as tall as the median one run out of them.

    Args:
        result: what `compare` returned, with one posterior of all data together.

    Returns:
        A figure with one panel per scalar, each in its own unit.

    Raises:
        ValueError: a posterior of each data point.
    """
    families, reference = _together(result)
    every = _scalars(result)
    chosen = _furthest(result, every)[:_MARGINALS]
    across = min(BLOCKS, len(chosen))
    down = math.ceil(len(chosen) / across)
    width = min(4.5, WIDTH / across)
    figure = Figure(figsize=(across * width, down * 2.3 + 0.8), layout="constrained")
    for number, scalar in enumerate(chosen, start=1):
        axes = figure.add_subplot(down, across, number)
        own = [_values(sites, scalar) for sites in families]
        known = _values(reference, scalar) if scalar[0] in reference else None
        _densities(axes, own, known, [*colours(result).values()])
        axes.set_title(_label(scalar, width), fontsize=11)
    which = "the furthest from the reference first" if result.marginals else "in order"
    left = len(every) - len(chosen)
    if left:
        what = f"{len(chosen)} of {len(every)} marginals, {which}; {left:,} are left out"
        figure.suptitle(what, fontsize=12)
    legend(figure, _handles(result))
    return figure


def pairs(result: Comparison) -> Figure:
    """How scalars depend on one another: contours of every pair, marginals on the diagonal.

    Shown are the two scalars with the largest rank correlation under any family or the reference,
    and up to two more that correlate most with those. Contours hold 50% and 90% of the mass of a
    Gaussian kernel estimate; the reference is filled grey. A family that holds its latents at a
    point is a cross there. Panels span the 0.5th to the 99.5th percentile of all draws, and
    draws further away than that span do not shape the contours. Of many scalars the first 200 are
    looked at, those that the data points share first.

    Args:
        result: what `compare` returned, with one posterior of all data together.

    Returns:
        A figure with n (n + 1) / 2 panels for n scalars, row by row; each scalar in its own unit.

    Raises:
        ValueError: a posterior of each data point; or fewer than two scalars.
    """
    families, reference = _together(result)
    candidates = _scalars(result)[:_CANDIDATES]
    if len(candidates) < 2:
        names = [scalar_name(*scalar) for scalar in candidates]
        raise ValueError(f"expected at least two scalars to draw in pairs, got {names}")
    chosen = _most_dependent(candidates, [*families, reference])
    count = len(chosen)
    size = min(3.2, 11 / count)
    figure = Figure(figsize=(count * size, count * size), layout="constrained")
    grid = figure.add_gridspec(count, count)
    spans: list[tuple[float, float]] = []
    for row, scalar in enumerate(chosen):
        for column, other in enumerate(chosen[:row]):
            axes = bare_axes(figure.add_subplot(grid[row, column]), ticks=4)
            if other[0] in reference and scalar[0] in reference:
                _both(axes, _pair(reference, other, scalar))
            for sites, colour in zip(families, colours(result).values(), strict=True):
                _both(axes, _pair(sites, other, scalar), colour)
        axes = figure.add_subplot(grid[row, row])
        own = [_values(sites, scalar) for sites in families]
        known = _values(reference, scalar) if scalar[0] in reference else None
        spans.append(_densities(axes, own, known, [*colours(result).values()]))
    panels = iter(figure.axes)
    for row, scalar in enumerate(chosen):
        for column in range(row + 1):
            axes = next(panels)
            axes.set_xlim(spans[column])
            if column < row:
                axes.set_ylim(spans[row])
            if column == 0 and row:
                axes.set_ylabel(_label(scalar, size))
            if row == count - 1:
                axes.set_xlabel(_label(chosen[column], size))
            axes.tick_params(labelbottom=row == count - 1, labelleft=column == 0)
    figure.align_labels()
    handles = _handles(result, wide=_BESIDE)
    figure.legend(handles=handles, title=MASS_TITLE, loc="upper right", frameon=False)
    return figure


# Scalars of a joint posterior


def _together(result: Comparison) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Draws by site of every family, and those of the reference, (S, ...) each."""
    if not result.is_joint:
        raise ValueError("expected one posterior of all data together, got one of each data point")
    return [posterior.sites for posterior in result.posteriors.values()], result.reference


def _scalars(result: Comparison) -> list[Scalar]:
    """Every scalar of the latent and deterministic sites: shared ones, then single data points'."""
    first = next(iter(result.posteriors.values()))
    sites = first.sites
    local = {name: first.plate in first.dims[name] for name in sites}
    return [
        (name, index)
        for name in sorted(sites, key=lambda name: local[name])
        for index in np.ndindex(*sites[name].shape[1:])
    ]


def _label(scalar: Scalar, inches: float) -> str:
    """A scalar's name, in lines that are no longer than a panel."""
    return figure_label(scalar_name(*scalar), wide=int(9 * inches))


def _values(sites: Mapping[str, Any], scalar: Scalar) -> Array:
    """The draws of one scalar, (S,)."""
    site, index = scalar
    return np.asarray(sites[site][:, *index], np.float64)


def _pair(sites: Mapping[str, Any], one: Scalar, other: Scalar) -> Array:
    """The draws of two scalars, (S, 2)."""
    return np.stack([_values(sites, one), _values(sites, other)], axis=1)


def _furthest(result: Comparison, scalars: list[Scalar]) -> list[Scalar]:
    """Those furthest from the reference first, if there is one; points count if all are such."""
    spread = [errors for name, errors in result.marginals.items() if name in result.points]

    def distance(scalar: Scalar) -> float:
        site, index = scalar
        found = [
            np.asarray(errors[site].wasserstein)[index]
            for errors in spread or result.marginals.values()
            if site in errors
        ]
        return float(max(found, default=-math.inf))

    return sorted(scalars, key=lambda scalar: -distance(scalar))


def _most_dependent(scalars: list[Scalar], sources: Iterable[Mapping[str, Any]]) -> list[Scalar]:
    """The pair of the largest rank correlation, and those that correlate most with the chosen."""
    largest = np.zeros((len(scalars), len(scalars)))
    for sites in sources:
        known = [i for i, (site, _) in enumerate(scalars) if site in sites]
        ranks = [_values(sites, scalars[i]).argsort().argsort() for i in known]
        still = [np.ptp(_values(sites, scalars[i])) == 0 for i in known]
        if len(known) < 2:
            continue
        correlation = np.abs(np.nan_to_num(np.corrcoef(ranks)))
        correlation[still], correlation[:, still] = 0, 0
        largest[np.ix_(known, known)] = np.maximum(largest[np.ix_(known, known)], correlation)
    np.fill_diagonal(largest, -1)
    chosen = [int(i) for i in np.unravel_index(int(largest.argmax()), largest.shape)]
    while len(chosen) < min(_PAIRED, len(scalars)):
        rest = [i for i in range(len(scalars)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(largest[i, chosen].max())))
    return [scalars[i] for i in sorted(chosen)]


# Their densities


def _span(draws: Iterable[Array]) -> tuple[float, float]:
    """From the 0.5th to the 99.5th percentile, the widest of all."""
    ends = np.array([np.percentile(values, (0.5, 99.5)) for values in draws])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _densities(
    axes: Axes, draws: Sequence[Array], reference: Array | None, palette: Sequence[str]
) -> tuple[float, float]:
    """Draws one scalar under every family, and the reference behind; returns what is shown."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    known = [] if reference is None else [reference]
    low, high = _span([*known, *draws])
    margin = 0.03 * (high - low)
    at = np.linspace(low - margin, high + margin, _POINTS)
    peaks = []
    for values in known:
        density = curve(values, at)
        axes.fill_between(at, density, color=GREYS[0], edgecolor="0.6", linewidth=1, zorder=1)
        peaks.append(density.max())
    for values, colour in zip(draws, palette, strict=True):
        if np.ptp(values) == 0:
            axes.axvline(values[0], color=colour, linewidth=1.8)
            continue
        density = curve(values, at)
        axes.plot(at, density, color=colour, linewidth=1.8)
        peaks.append(density.max())
    tallest = min(max(peaks), _TALLEST * float(np.median(peaks))) if peaks else 1.0
    axes.set(xlim=(at[0], at[-1]), ylim=(0, 1.08 * tallest))
    return float(at[0]), float(at[-1])


def _both(axes: Axes, draws: Array, colour: str | None = None) -> None:
    """The masses of two scalars: lines in a family's colour, or filled grey for the reference."""
    if (np.ptp(draws, axis=0) == 0).all():
        axes.plot(*draws[0], "x", color=colour, markersize=9, markeredgewidth=2)
        return
    low, high = np.percentile(draws, (0.5, 99.5), axis=0)
    near = ((draws >= 2 * low - high) & (draws <= 2 * high - low)).all(axis=1)
    contours(axes, kernel_density(draws[near]), colour)


def _handles(result: Comparison, *, wide: int | None = None) -> list[Any]:
    handles: list[Any] = family_lines(result, wide=wide)
    if result.reference:
        handles.append(Patch(facecolor=GREYS[1], label="reference"))
    return handles
