"""Diffusions in pictures: how images come about, and where the bound is spent.

    strips      what does the chain do?         states from noise to data
    bits        where is the bound spent?       each step's term against time
    schedules   how fast does the signal go?    log SNR against time

`pyro_vi.plots` has them all, with the other figures; what they share is in `panels`.
"""

from __future__ import annotations

__all__ = ["bits", "schedules", "strips"]

import math

import numpy as np
import torch
from matplotlib.figure import Figure

from pyro_vi.checks import check_count
from pyro_vi.comparison import Comparison, figure_label
from pyro_vi.plots.style import WIDTH, array, bare_axes, check_images, colours, draw_images, legend
from pyro_vi.process_state import seeded


def strips(result: Comparison, *, num: int = 6, frames: int = 9, seed: int = 0) -> Figure:
    """Images as they come about: a row for each, from noise at the left to its mean at the right.

    Args:
        result: what `compare` or `judge` returned.
        num: images of each diffusion, at least 1; the same noise starts those of all.
        frames: states of each image, evenly spaced over the chain, at least 2; all of them where
            the chain has fewer.
        seed: of the noise.

    Returns:
        A figure with one panel per diffusion.

    Raises:
        ValueError: no diffusion; fewer images or frames; something other than images of shape
            (C, H, W) with C = 1 or 3.
    """
    check_count("image", num)
    found = {}
    for family in _families(result, "trajectory"):
        with seeded(seed):
            states = result.fits[family].model.trajectory(num, frames)
        found[family] = check_images(
            states.transpose(0, 1).flatten(0, 1), what=f"states of {family!r}"
        )
    height, width = next(iter(found.values())).shape[2:]
    size = min(0.8, WIDTH / (frames * min(2, len(found))))
    across = max(1, min(len(found), int(WIDTH / (frames * size))))
    down = math.ceil(len(found) / across)
    figure = Figure(
        figsize=(across * frames * size, down * (num * size * height / width + 0.3)),
        layout="constrained",
    )
    for number, (family, images) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(down, across, number)
        draw_images(axes, images, columns=len(images) // num)
        axes.set_title(figure_label(family, wide=int(8 * frames * size)), fontsize=12)
    return figure


def bits(result: Comparison) -> Figure:
    """Where each diffusion's bound is spent: the terms of the steps t > 1 against t / T, on a log
    scale.

    The legend has all three parts, whose sum is -ELBO: the reconstruction, which is the term of
    t = 1, all other steps, and the prior's term. Terms are in bits per dimension where the data are
    discrete, and else in nats per dimension; a term is as large as its step is long, so that only
    diffusions of as many steps can be held against one another curve by curve.

    Args:
        result: what `compare` or `judge` returned.

    Returns:
        A figure with one panel.

    Raises:
        ValueError: no diffusion, or none of more than one step.
    """
    figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
    axes = bare_axes(figure.add_subplot())
    unit = "bits" if all(bound.discrete for bound in result.step_bounds.values()) else "nats"
    _families(result)
    for family, bound in result.step_bounds.items():
        scale = bound.dims * (math.log(2) if unit == "bits" else 1.0)
        by_step, total = bound.by_step, len(bound.steps)
        parts = (-bound.reconstruction.value, by_step.value[1:].sum(), bound.prior.mean())
        first, rest, last = (float(part) / scale for part in parts)
        if total > 1:
            axes.plot(
                np.arange(2, total + 1) / total,
                by_step.value[1:] / scale,
                color=colours(result)[family],
                linewidth=2,
                marker="o" if total < 20 else "",
                label=f"{figure_label(family)}: reconstruction {first:.3f} + steps {rest:.3f}"
                f" + prior {last:.3f} = {first + rest + last:.3f}",
            )
    if not axes.lines:
        raise ValueError("expected a diffusion of more than one step")
    axes.set(xlim=(0, 1.01), xlabel="t / T", ylabel=f"the step's term ({unit} per dimension)")
    axes.set_yscale("log")
    legend(figure, axes.get_legend_handles_labels()[0], columns=1)
    return figure


def schedules(result: Comparison) -> Figure:
    """The log signal-to-noise ratio of each diffusion against t / T: equal at 0.

    Args:
        result: what `compare` or `judge` returned, with models that have a `diffusion`.

    Returns:
        A figure with one panel; log SNR in nats.

    Raises:
        ValueError: no diffusion.
    """
    figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
    axes = bare_axes(figure.add_subplot())
    for family in _families(result, "diffusion"):
        schedule = result.fits[family].model.diffusion.schedule
        device = next((parameter.device for parameter in schedule.parameters()), None)
        t = torch.arange(1, schedule.steps + 1, device=device)
        with torch.no_grad():
            axes.plot(
                array(t) / schedule.steps,
                -array(schedule.gamma(t)),
                color=colours(result)[family],
                linewidth=2,
                marker="o" if schedule.steps < 20 else "",
                label=figure_label(family),
            )
    axes.axhline(0.0, color="0.6", linestyle="--", linewidth=1, zorder=0)
    axes.set(xlim=(0, 1.01), xlabel="t / T", ylabel="log SNR")
    legend(figure, axes.get_legend_handles_labels()[0])
    return figure


def _families(result: Comparison, attribute: str | None = None) -> list[str]:
    """The diffusions; those whose model has an attribute."""
    names = [
        name
        for name in result.step_bounds
        if attribute is None or hasattr(result.fits[name].model, attribute)
    ]
    if not names:
        raise ValueError(f"expected a diffusion, got {', '.join(result.fits)}")
    return names
