"""Figures of training, and of images that the fits make."""

from __future__ import annotations

__all__ = ["grid", "losses", "reconstructions", "samples", "training_bounds"]

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro.poutine as poutine
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from pyro_vi.comparison import Comparison, figure_label
from pyro_vi.inference import Fit
from pyro_vi.plots.style import (
    BLOCKS,
    WIDTH,
    array,
    bare_axes,
    check_images,
    colours,
    draw_images,
    legend,
    to_fit,
)
from pyro_vi.process_state import seeded
from pyro_vi.programs import Uncondition, as_arguments

Array = npt.NDArray[np.float64]

_POINTS = 1_000  # of a smoothed curve


def losses(result: Comparison) -> Figure:
    """The bound against steps: higher is better.

    A strong line is the running median over 1/20 of the steps, of a diffusion the running mean (it
    draws some terms of its bound alone, some rare ones large), and the raw values stand faint
    behind it; markers are bounds on held-out data, where the fits have some. The y-axis shows the
    second half of training (its 5th to 95th percentile and a margin), so that the first steps, and
    single bad ones, run out of it.

    Args:
        result: what `compare` returned. Bounds are shown at weights of one, whatever weights the
            fits had (`Fit.bounds`); where a weighted ELBO's terms are not told apart, the weighted
            objective. Guides that hold the latents at a point while they train (AutoDelta, and
            AutoLaplaceApproximation before its Gaussian is made) have no bound: theirs is the log
            joint there. A fit of no steps has no curve.

    Returns:
        A figure with one panel; bounds in nats per data point.

    Raises:
        ValueError: no fit has a step.
    """
    fits = {family: fit for family, fit in result.fits.items() if len(fit.losses)}
    if not fits:
        raise ValueError("expected fits with gradient steps, and all of these have none")
    bounds = {family: training_bounds(fit) for family, fit in fits.items()}
    figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
    axes = bare_axes(figure.add_subplot())
    longest = max(len(fit.losses) for fit in fits.values())
    window = max(1, longest // 20) | 1
    shown: list[float] = []
    for family, fit in fits.items():
        colour = colours(result)[family]
        known = bounds[family]
        bound = array(-fit.losses if known is None else known)
        steps = np.arange(1, len(bound) + 1)
        axes.plot(steps, bound, color=colour, alpha=0.15, linewidth=0.6, zorder=1)
        middle = np.mean if family in result.step_bounds else np.median
        curve = _running(middle, bound, window)
        axes.plot(*curve, color=colour, linewidth=2, label=figure_label(family))
        shown += np.percentile(bound[len(bound) // 2 :], (5, 95)).tolist()
        heldout = array(fit.heldout)
        axes.plot(*heldout.T, "o", color=colour, markeredgecolor="white", zorder=4)
        shown += heldout[heldout[:, 0] > len(bound) / 2, 1].tolist()
    low, high = min(shown), max(shown)
    if low < high:
        axes.set_ylim(low - 0.25 * (high - low), high + 0.25 * (high - low))
    axes.set_xlim(0, 1.01 * longest)
    kinds = ["median"] * (len(result.posteriors) > 0) + ["mean"] * (len(result.step_bounds) > 0)
    smoothed = f"\nrunning {' or '.join(kinds)} over {window} steps" if window > 1 else ""
    weighted = [bound is None for bound in bounds.values()]
    shown_is = " or ".join(["bound"] * (not all(weighted)) + ["weighted objective"] * any(weighted))
    axes.set(xlabel="step", ylabel=f"{shown_is} (nats per data point){smoothed}")
    handles: list[Any] = list(axes.get_legend_handles_labels()[0])
    if any(len(fit.heldout) for fit in fits.values()):
        handles.append(Line2D([], [], color="0.4", marker="o", ls="", label="on held-out data"))
    legend(figure, handles)
    return figure


def training_bounds(fit: Fit) -> Tensor | None:
    """The bound at every step of a fit; None if its losses are weighted and their terms unknown."""
    return fit.bounds if bool(fit.bounds.isfinite().all()) else None


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
        ValueError: another shape; fits that do not take one tensor, or observe several sites; or
            no family with a posterior.
    """
    if not result.posteriors:
        raise ValueError("expected families with posteriors, and a diffusion has a bound alone")
    rows = [("original", check_images(images))]
    for family in result.posteriors:
        fit = result.fits[family]
        found = fit.reconstruct(to_fit(fit, images), seed=seed)
        rows.append((figure_label(family, wide=20), found[_image_site(family, fit)]))
    num, _, height, width = images.shape
    size = min(1.2, (WIDTH - 2) / num)
    figure = Figure(
        figsize=(2 + num * size, 0.2 + len(rows) * size * height / width), layout="constrained"
    )
    for number, (name, row) in enumerate(rows, start=1):
        axes = figure.add_subplot(len(rows), 1, number, anchor="W")
        draw_images(axes, row, columns=num)
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
        blocks[family] = check_images(drawn, what=f"samples of {family!r}").cpu()
    first = next(iter(blocks.values()))
    if len(blocks) > 1 and all(torch.equal(block, first) for block in blocks.values()):
        blocks = {"the model that all families share": first}
    columns = math.ceil(math.sqrt(num))
    across = min(BLOCKS, len(blocks))
    down = math.ceil(len(blocks) / across)
    size = min(4.5, WIDTH / across)
    tall = math.ceil(num / columns) * first.shape[2] / (columns * first.shape[3])
    figure = Figure(
        figsize=(across * size, down * (size * tall + 0.3)),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.05),
    )
    for number, (name, block) in enumerate(blocks.items(), start=1):
        axes = figure.add_subplot(down, across, number)
        draw_images(axes, block, columns=columns)
        axes.set_title(figure_label(name, wide=int(8 * size)), fontsize=12)
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
    check_images(images)
    if columns < 1:
        raise ValueError(f"expected at least one column, got {columns}")
    columns = min(columns, len(images))
    size = min(1.2, WIDTH / columns)
    height = math.ceil(len(images) / columns) * size * images.shape[2] / images.shape[3]
    figure = Figure(figsize=(columns * size, height))
    draw_images(figure.add_axes((0, 0, 1, 1)), images, columns=columns)
    return figure


# What is drawn


def _image_site(family: str, fit: Fit) -> str:
    """The name of the one site that the model observes."""
    args, kwargs = as_arguments(fit.template)
    with seeded(0), torch.no_grad():
        trace = poutine.trace(Uncondition()(fit.model)).get_trace(*args, **kwargs)
    names = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["infer"].get("was_observed")
    ]
    if len(names) != 1:
        raise ValueError(f"{family!r}: expected a model with one observed site, got {names}")
    return names[0]


def _running(middle: Callable[..., Array], values: Array, window: int) -> tuple[Array, Array]:
    """Steps, counted from 1, and the middle of the window around each; thinned where it is long."""
    window = min(window, len(values))
    windows = sliding_window_view(values, window)
    keep = slice(None, None, math.ceil(len(windows) / _POINTS))
    centres: Array = np.arange(len(windows), dtype=np.float64) + (window + 1) / 2
    return centres[keep], middle(windows[keep], axis=1)
