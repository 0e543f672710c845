"""What the figures share: a colour for every family, calm axes, contours, a legend, images."""

from __future__ import annotations

__all__ = [
    "BLOCKS",
    "GREYS",
    "MASSES",
    "MASS_TITLE",
    "WIDTH",
    "array",
    "bare_axes",
    "check_images",
    "colours",
    "contours",
    "draw_images",
    "family_lines",
    "legend",
    "limit",
    "to_fit",
]

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pyro_vi.comparison import Comparison, figure_label
from pyro_vi.inference import Fit
from pyro_vi.plots.densities import Density, level

Array = npt.NDArray[np.float64]

WIDTH = 12.0  # inches; 1,200 pixels at the usual 100 dpi
BLOCKS = 4  # panels side by side
MASSES = (0.9, 0.5)  # of a density, inside its contours
MASS_TITLE = "contours: 50% and 90% of the mass"
GREYS = ("0.9", "0.75")  # of the exact posterior or the reference, for the same masses
_HANDLE, _CHARACTER = 0.6, 0.08  # inches of a legend's entry, beside its label and for a letter
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def colours(result: Comparison) -> dict[str, str]:
    """One colour per family, by its place in the comparison."""
    return {name: _PALETTE[index % len(_PALETTE)] for index, name in enumerate(result.fits)}


def family_lines(result: Comparison, *, wide: int | None = None) -> list[Line2D]:
    """A line in its colour for every family with a posterior, for a legend.

    Labels break after `wide` characters.
    """
    return [
        Line2D([], [], color=colour, linewidth=2.2, label=figure_label(family, wide=wide))
        for family, colour in colours(result).items()
        if family in result.posteriors
    ]


def bare_axes(axes: Axes, *, ticks: int = 8) -> Axes:
    """Axes without a frame, with at most so many ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    return axes


def legend(
    figure: Figure, handles: list[Any], title: str | None = None, *, columns: int = 5
) -> None:
    """A legend below a figure, with at most so many columns, and no wider than the figure."""
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    fitting = int(figure.get_figwidth() / (_HANDLE + _CHARACTER * longest))
    columns = max(1, min(len(handles), columns, fitting))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, title=title
    )


def limit(axes: Axes, points: Array) -> None:
    """Shows all `points`, (k, 2), with a margin."""
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.maximum(0.1 * (high - low), 1e-6)
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])


def contours(axes: Axes, density: Density, colour: str | None = None) -> None:
    """The masses of a density: lines in a family's colour, or filled grey behind without one."""
    x, y, values = density
    levels = [level(values, mass) for mass in MASSES]
    if colour is None:
        axes.contourf(x, y, values, levels=[*levels, values.max()], colors=GREYS, zorder=0)
    else:
        axes.contour(x, y, values, levels=levels, colors=[colour], linewidths=(1.2, 2.2))


def draw_images(axes: Axes, images: Tensor, *, columns: int) -> None:
    """Draws images (n, C, H, W), from black at 0 to white at 1, in rows on white."""
    pixels = np.moveaxis(array(images).clip(0, 1), 1, -1)
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


def array(values: Tensor) -> Array:
    """Values as float64 on the CPU."""
    return values.detach().cpu().double().numpy()


def check_images(images: Tensor, what: str = "images") -> Tensor:
    """The images, if they are such.

    Raises:
        TypeError: no floating-point tensor.
        ValueError: another shape than (n, C, H, W) with C = 1 or 3, or none at all.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"{what}: expected a floating-point tensor, got {_described(images)}")
    if images.dim() != 4 or 0 in images.shape or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{what}: expected at least one image and shape (n, C, H, W) with C = 1 or 3,"
            f" got {tuple(images.shape)}"
        )
    return images


def to_fit(fit: Fit, images: Tensor) -> Tensor:
    """Images where the fit lives, in its dtype."""
    if not isinstance(fit.template, Tensor):
        raise ValueError(
            "expected fits to one tensor of images, but these programs take"
            f" {len(fit.template)} arguments"
        )
    return images.to(fit.template)


def _described(value: object) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
