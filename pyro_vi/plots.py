"""A comparison in pictures: figures that draw what the fits hold and what they generate.

    losses           did training settle?          the bound against steps
    reconstructions  what does the latent keep?    E[x' | z], z ~ q(z | x)
    samples          what has the model learned?   E[x | z],  z ~ p(z)
    posteriors       what does a family miss?      q(z_i, z_j | x) of every family, and p(z | x)
    khats            may its draws be trusted?     the distribution of k-hat over data points

Every function returns a new `matplotlib.figure.Figure` (`figure.savefig("name.png")` writes it).
pyplot plays no part: nothing is shown or kept open, and no display is needed. A family has one
colour throughout, from the palette of Okabe and Ito, which survives the common colour blindnesses.

Example:
    >>> from types import SimpleNamespace
    >>> from pyro_vi import compare
    >>> from pyro_vi.families import FullCovariance, MeanField
    >>> from pyro_vi.guides import Encoder
    >>> from pyro_vi.models import VAE
    >>> x = torch.rand(40, 1, 4, 4).round()
    >>> result = compare(
    ...     VAE((1, 4, 4), latent_dim=2),
    ...     {f.__name__: Encoder((1, 4, 4), f(2, 8)) for f in (MeanField, FullCovariance)},
    ...     SimpleNamespace(train=x[:30], test=x[30:]),
    ...     num_samples=50,
    ...     steps=5,
    ...     progress=False,
    ... )
    >>> losses(result).axes[0].get_xlabel()
    'step'
    >>> [row.get_ylabel() for row in reconstructions(result, result.data).axes]
    ['original', 'MeanField', 'FullCovariance']
"""

from __future__ import annotations

__all__ = ["grid", "khats", "losses", "posteriors", "reconstructions", "samples"]

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro.poutine as poutine
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.lib.stride_tricks import sliding_window_view
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi.batches import arguments
from pyro_vi.comparison import Comparison
from pyro_vi.diagnostics import khat_threshold
from pyro_vi.fitted import Fit
from pyro_vi.program import seeded
from pyro_vi.scaling import log_prob_rows

Array = npt.NDArray[np.float64]
Density = tuple[Array, Array, Array]  # x, y and an unnormalised density there; (G, G) each

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_WIDTH = 12.0  # inches; 1,200 pixels at the usual 100 dpi
_MASSES = (0.9, 0.5)  # of a density, inside its contours
_GREYS = ("0.9", "0.75")  # of the exact posterior, for the same masses
_FAR = 1e6  # beyond every axis
_POINTS = 1_000  # of a smoothed curve
_CELLS = 80  # of a grid, along each axis
_PASSES = 10  # at most, until a grid holds a density
_BLOCKS = 4  # panels side by side


def losses(result: Comparison) -> Figure:
    """The bound against steps: training losses with the sign turned, so that higher is better.

    A strong line is the running median over 1/20 of the steps, and the raw values stand faint
    behind it; markers are bounds on held-out data, where the fits have some. The y-axis shows the
    second half of training (its 5th to 95th percentile and a margin), so that the first steps, and
    single bad ones, run out of it.

    Args:
        result: what `compare` returned. Training bounds are at the step's KL weight, held-out
            bounds at weight 1: while a warm-up lasts the two don't compare.

    Returns:
        A figure with one panel; bounds in nats per data point.
    """
    figure = Figure(figsize=(_WIDTH, 5.5), layout="constrained")
    axes = _plain(figure.add_subplot())
    longest = max(len(fit.losses) for fit in result.fits.values())
    window = max(1, longest // 20) | 1
    shown: list[float] = []
    for (family, fit), colour in zip(result.fits.items(), _colours(result), strict=True):
        bound = -_array(fit.losses)
        steps = np.arange(1, len(bound) + 1)
        axes.plot(steps, bound, color=colour, alpha=0.15, linewidth=0.6, zorder=1)
        axes.plot(*_running_median(bound, window), color=colour, linewidth=2, label=family)
        shown += np.percentile(bound[len(bound) // 2 :], (5, 95)).tolist()
        heldout = _array(fit.heldout)
        axes.plot(*heldout.T, "o", color=colour, markeredgecolor="white", zorder=4)
        shown += heldout[heldout[:, 0] > len(bound) / 2, 1].tolist()
    low, high = min(shown), max(shown)
    if low < high:
        axes.set_ylim(low - 0.25 * (high - low), high + 0.25 * (high - low))
    axes.set_xlim(0, 1.01 * longest)
    smoothed = f"\nrunning median over {window} steps" if window > 1 else ""
    axes.set(xlabel="step", ylabel=f"bound (nats per data point){smoothed}")
    handles: list[Any] = list(axes.get_legend_handles_labels()[0])
    if any(len(fit.heldout) for fit in result.fits.values()):
        handles.append(Line2D([], [], color="0.4", marker="o", ls="", label="on held-out data"))
    _legend(figure, handles)
    return figure


def reconstructions(result: Comparison, images: Tensor, *, seed: int = 0) -> Figure:
    """Images, and below them what each family's latents keep of them.

        E[x' | z],    one z ~ q(z | x) for every image.

    Args:
        result: what `compare` returned.
        images: as the models observe them (binarized, if they were trained on binary images),
            such as `result.data[:10]`; shape (n, C, H, W) with C = 1 or 3, values in [0, 1].
        seed: of the draws of z.

    Returns:
        A figure with one panel a row: the originals, then a row per family.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: another shape; or fits that do not take one tensor, or observe several sites.
    """
    rows = {"original": _checked(images)}
    for family, fit in result.fits.items():
        found = fit.reconstruct(_moved(fit, images), seed=seed)
        rows[family] = found[_image_site(family, fit)]
    num, _, height, width = images.shape
    size = min(1.2, (_WIDTH - 2) / num)
    figure = Figure(
        figsize=(2 + num * size, 0.2 + len(rows) * size * height / width), layout="constrained"
    )
    for number, (name, row) in enumerate(rows.items(), start=1):
        axes = figure.add_subplot(len(rows), 1, number, anchor="W")
        _show(axes, row, columns=num)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
    return figure


def samples(result: Comparison, *, num: int = 36, seed: int = 0) -> Figure:
    """Images from the models: E[x | z] for z drawn from the prior, the same z for all.

    Args:
        result: what `compare` returned.
        num: images in a block, at least 1.
        seed: of the draws of z.

    Returns:
        A figure with one panel per family. Where the families share one model (a frozen one), its
        images are drawn once.

    Raises:
        ValueError: num < 1; models that observe several sites, or something other than images of
            shape (C, H, W) with C = 1 or 3.
    """
    blocks = {}
    for family, fit in result.fits.items():
        drawn = fit.generate(num, expected=True, seed=seed)[_image_site(family, fit)]
        blocks[family] = _checked(drawn, what=f"samples of {family!r}").cpu()
    first = next(iter(blocks.values()))
    if len(blocks) > 1 and all(torch.equal(block, first) for block in blocks.values()):
        blocks = {"the model that all families share": first}
    columns = math.ceil(math.sqrt(num))
    across = min(_BLOCKS, len(blocks))
    down = math.ceil(len(blocks) / across)
    size = min(4.5, _WIDTH / across)
    tall = math.ceil(num / columns) * first.shape[2] / (columns * first.shape[3])
    figure = Figure(
        figsize=(across * size, down * (size * tall + 0.3)),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.05),
    )
    for number, (name, block) in enumerate(blocks.items(), start=1):
        axes = figure.add_subplot(down, across, number)
        _show(axes, block, columns=columns)
        axes.set_title(name, fontsize=12)
    return figure


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
    _checked(images)
    if num_samples < 21:
        raise ValueError(f"expected at least 21 draws for a contour, got {num_samples}")
    draws = {
        family: fit.posterior(_moved(fit, images), num_samples, seed=seed).draws
        for family, fit in result.fits.items()
    }
    first, fit = next(iter(result.fits.items()))
    _check_shared(result, images, {name: value[:50] for name, value in draws[first].items()})
    units = _unit_names(draws[first])
    if len(units) < 2:
        raise ValueError(f"expected at least two latent units to draw, got {units}")
    flat = {family: _flat(values) for family, values in draws.items()}

    count = len(images)
    across = min(_BLOCKS, count)
    down = math.ceil(count / across)
    size = min(4.0, _WIDTH / across)
    figure = Figure(figsize=(across * size, down * (size * 1.35) + 0.7), layout="constrained")
    panels = figure.subplots(
        2 * down, across, squeeze=False, gridspec_kw={"height_ratios": [1, 3] * down}
    )
    for index in range(across * down):
        row, column = divmod(index, across)
        picture, axes = panels[2 * row, column], _plain(panels[2 * row + 1, column], ticks=5)
        if index >= count:
            picture.remove()
            axes.remove()
            continue
        _show(picture, images[index : index + 1], columns=1)
        i, j = _most_correlated([z[:, index] for z in flat.values()])
        pairs = [z[:, index][:, [i, j]] for z in flat.values()]
        ranges = [np.percentile(pair, (0.5, 99.5), axis=0) for pair in pairs]
        if len(units) == 2:
            exact = _exact(fit, images[index], draws[first], np.concatenate(pairs), seed)
            ranges.append(_fill(axes, exact))
        for pair, colour in zip(pairs, _colours(result), strict=True):
            x, y, density = _kernel_density(pair)
            levels = [_level(density, mass) for mass in _MASSES]
            axes.contour(x, y, density, levels=levels, colors=[colour], linewidths=(1.2, 2.2))
        _limit(axes, np.concatenate(ranges))
        axes.set(xlabel=units[i], ylabel=units[j])
    handles: list[Any] = [
        Line2D([], [], color=colour, linewidth=2.2, label=family)
        for family, colour in zip(result.fits, _colours(result), strict=True)
    ]
    if len(units) == 2:
        handles.append(Patch(facecolor=_GREYS[1], label="exact posterior"))
    _legend(figure, handles, title="contours: 50% and 90% of the mass")
    return figure


def khats(result: Comparison) -> Figure:
    """How far each family's draws can be trusted: the share of test data below each k-hat.

    Left of the bound (`diagnostics.khat_threshold`) the draws can be reweighted to the exact
    posterior. The legend gives the share of the data that lies right of it. The axis ends at 1.5
    (above 1 the weights have no mean at all): a curve that leaves below 100% has the rest beyond,
    and one that enters above 0% has k-hats of `-inf`, from constant weights.

    Args:
        result: what `compare` returned.

    Returns:
        A figure with one panel: shares of the test data against k-hat, a dimensionless number.
    """
    figure = Figure(figsize=(_WIDTH, 5.5), layout="constrained")
    axes = _plain(figure.add_subplot())
    bound = khat_threshold(result.num_samples)
    low, high = 0.0, 1.0
    for (family, points), colour in zip(result.points.items(), _colours(result), strict=True):
        khat = np.sort(points.khat)
        finite = khat[np.isfinite(khat)]
        low, high = finite.min(initial=low), finite.max(initial=high)
        share = np.arange(len(khat) + 2) / len(khat)
        share[-1] = 1.0
        axes.plot(
            np.concatenate([[-_FAR], khat.clip(-_FAR, _FAR), [_FAR]]),
            share,
            drawstyle="steps-post",
            color=colour,
            linewidth=2,
            label=f"{family}: {float(np.mean(khat > bound)):.0%} above the bound",
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
        ylabel="share of test data up to this k-hat",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def grid(images: Tensor, columns: int = 8) -> Figure:
    """Images in rows, and nothing else.

    Args:
        images: shape (n, C, H, W) with C = 1 or 3, values in [0, 1].
        columns: images in a row, at least 1.

    Returns:
        A figure with one panel that fills it.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: another shape, or no columns.

    Example:
        >>> figure = grid(torch.rand(6, 1, 8, 8), columns=3)
        >>> figure.axes[0].images[0].get_array().shape  # a pixel of white between two images
        (17, 26)
    """
    _checked(images)
    if columns < 1:
        raise ValueError(f"expected at least one column, got {columns}")
    columns = min(columns, len(images))
    size = min(1.2, _WIDTH / columns)
    height = math.ceil(len(images) / columns) * size * images.shape[2] / images.shape[3]
    figure = Figure(figsize=(columns * size, height))
    _show(figure.add_axes((0, 0, 1, 1)), images, columns=columns)
    return figure


# Axes


def _colours(result: Comparison) -> list[str]:
    """One colour per family, by its place in the comparison."""
    return [_PALETTE[index % len(_PALETTE)] for index in range(len(result.fits))]


def _plain(axes: Axes, *, ticks: int = 8) -> Axes:
    """Axes without a frame, with at most so many ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    return axes


def _legend(figure: Figure, handles: list[Any], title: str | None = None) -> None:
    columns = min(len(handles), 5)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, title=title
    )


def _limit(axes: Axes, points: Array) -> None:
    """Shows all `points`, (k, 2), with a margin."""
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.maximum(0.1 * (high - low), 1e-6)
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])


def _show(axes: Axes, images: Tensor, *, columns: int) -> None:
    """Draws images (n, C, H, W), from black at 0 to white at 1, in rows on white."""
    pixels = np.moveaxis(_array(images).clip(0, 1), 1, -1)
    num, height, width, channels = pixels.shape
    gap = max(1, width // 14)
    rows = math.ceil(num / columns)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, channels))
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        top, left = row * (height + gap), column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    axes.imshow(sheet if channels == 3 else sheet[..., 0], cmap="gray", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


# What is drawn


def _array(values: Tensor) -> Array:
    return values.detach().cpu().double().numpy()


def _checked(images: Tensor, what: str = "images") -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"{what}: expected a floating-point tensor, got {_described(images)}")
    if images.dim() != 4 or 0 in images.shape or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{what}: expected at least one image and shape (n, C, H, W) with C = 1 or 3,"
            f" got {tuple(images.shape)}"
        )
    return images


def _described(value: object) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _moved(fit: Fit, images: Tensor) -> Tensor:
    """Images where the fit lives, in its dtype."""
    if not isinstance(fit.template, Tensor):
        raise ValueError(
            "expected fits to one tensor of images, but these programs take"
            f" {len(fit.template)} arguments"
        )
    return images.to(fit.template)


def _image_site(family: str, fit: Fit) -> str:
    """The name of the one site that the model observes."""
    args, kwargs = arguments(fit.template)
    with seeded(0), torch.no_grad():
        trace = poutine.trace(poutine.uncondition(fit.model)).get_trace(*args, **kwargs)
    names = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["infer"].get("was_observed")
    ]
    if len(names) != 1:
        raise ValueError(f"{family!r}: expected a model with one observed site, got {names}")
    return names[0]


def _running_median(values: Array, window: int) -> tuple[Array, Array]:
    """Steps, counted from 1, and the median of the window around each; thinned where it is long."""
    window = min(window, len(values))
    windows = sliding_window_view(values, window)
    keep = slice(None, None, math.ceil(len(windows) / _POINTS))
    centres: Array = np.arange(len(windows), dtype=np.float64) + (window + 1) / 2
    return centres[keep], np.median(windows[keep], axis=1)


# Latent units


def _unit_names(draws: Mapping[str, Tensor]) -> list[str]:
    """The latent units of all sites, in the order of `_flat`."""
    names: list[str] = []
    for site, values in draws.items():
        units = values[0, 0].numel()
        names += [site] if units == 1 else [f"{site}[{unit}]" for unit in range(units)]
    return names


def _flat(draws: Mapping[str, Tensor]) -> Array:
    """Draws by site as one array (S, n, D) of D units."""
    return _array(torch.cat([v.double().reshape(*v.shape[:2], -1) for v in draws.values()], dim=-1))


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
        trace = poutine.trace(program).get_trace(_moved(fit, images))
        trace.compute_log_prob()
        rows = [
            log_prob_rows(site, fit.plate).double()
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


# Densities over two units


def _kernel_density(draws: Array) -> Density:
    """A Gaussian kernel estimate from draws (S, 2), with their mean and covariance.

    In coordinates that make the draws white the kernel is a product, and the density on a grid one
    product of matrices; mapped back, the grid leans as the draws do. Kernels of width h alone would
    widen it by a factor sqrt(1 + h^2), by which West's estimate shrinks draws and kernels.
    """
    centre = draws.mean(axis=0)
    covariance = np.cov(draws, rowvar=False)
    scale = np.linalg.cholesky(covariance + np.eye(2) * (1e-9 * covariance.trace() + 1e-30))
    bandwidth = 1.25 * len(draws) ** (-1 / 6)  # a little more than Scott's rule, for calm contours
    shrink = 1 / math.sqrt(1 + bandwidth**2)
    white = shrink * np.linalg.solve(scale, (draws - centre).T)  # (2, S)
    width = shrink * bandwidth
    axes = [np.linspace(w.min() - 3 * width, w.max() + 3 * width, _CELLS) for w in white]
    kernels = [
        np.exp(-0.5 * ((axis[:, None] - w) / width) ** 2)
        for axis, w in zip(axes, white, strict=True)
    ]
    u, v = np.meshgrid(*axes, indexing="ij")
    x, y = np.tensordot(scale, np.stack([u, v]), axes=1) + centre[:, None, None]
    return x, y, kernels[0] @ kernels[1].T


def _level(density: Array, mass: float) -> float:
    """The level above which a density on an even grid has this share of its mass."""
    falling = np.sort(density, axis=None)[::-1]
    share = np.cumsum(falling) / falling.sum()
    return float(falling[np.searchsorted(share, mass)])


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
        x, y = np.meshgrid(*np.linspace(low, high, _CELLS).T, indexing="ij")
        z = torch.from_numpy(np.stack([x, y], axis=-1).reshape(-1, 2))
        latents = {
            name: part.reshape(-1, *values.shape[2:])
            for (name, values), part in zip(draws.items(), z.split(sizes, dim=-1), strict=True)
        }
        log_p = _log_joint(fit, image.expand(len(z), *image.shape), latents)
        density = (log_p - log_p.max()).exp().numpy().reshape(_CELLS, _CELLS)
        rows, columns = np.nonzero(density > 1e-5)
        first = np.array([rows.min(), columns.min()])
        last = np.array([rows.max(), columns.max()])
        cut = (first == 0) | (last == _CELLS - 1)
        if not cut.any() and (last - first > _CELLS / 2).all():
            break
        cell = (high - low) / (_CELLS - 1)
        high = low + cell * (last + np.where(last == _CELLS - 1, _CELLS / 2, 1))
        low = low + cell * (first - np.where(first == 0, _CELLS / 2, 1))
    return x, y, density


def _fill(axes: Axes, exact: Density) -> Array:
    """Fills the masses of a density; returns the corners of the largest, (2, 2)."""
    x, y, density = exact
    levels = [_level(density, mass) for mass in _MASSES]
    axes.contourf(x, y, density, levels=[*levels, density.max()], colors=_GREYS, zorder=0)
    inside = density >= levels[0]
    return np.array([[f(x[inside]), f(y[inside])] for f in (np.min, np.max)])
