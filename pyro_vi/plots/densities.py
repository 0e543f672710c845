"""Densities from draws, for the eye: kernel estimates of one scalar and of two."""

from __future__ import annotations

__all__ = ["CELLS", "Density", "curve", "kernel_density", "level"]

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Density = tuple[Array, Array, Array]  # x, y and an unnormalised density there; (G, G) each

CELLS = 80  # of a grid, along each axis
_CROWD = 0.05  # of the draws, within a kernel's width of an end


def curve(draws: Array, at: Array) -> Array:
    """A Gaussian kernel estimate of one scalar, mirrored at an end where draws crowd.

    So a scalar with a bound, such as a scale, keeps its mass on the right side of it: draws crowd
    at an end if more than 5% of them are within a kernel's width of it. The width is Silverman's,
    from the quartiles where tails are heavy.

    Args:
        draws: of the scalar, not all equal, (S,).
        at: where the density is wanted, (G,).

    Returns:
        The density, (G,), in one over the unit of the draws.

    References:
        Silverman, "Density estimation for statistics and data analysis", 1986: equation 3.31.

    Example:
        >>> draws = np.random.default_rng(0).exponential(size=4_000)
        >>> curve(draws, np.array([-1.0, 0.01, 1.0])).round(1)
        array([0. , 0.9, 0.4])
    """
    quartiles = np.percentile(draws, (25, 75))
    spread = min(scale for scale in (draws.std(), np.ptp(quartiles) / 1.34) if scale > 0)
    width = 0.9 * spread * len(draws) ** -0.2
    density = _kernels(at, draws, width)
    for end, inside in ((draws.min(), at >= draws.min()), (draws.max(), at <= draws.max())):
        if np.mean(np.abs(draws - end) < width) > _CROWD:
            density = np.where(inside, density + _kernels(2 * end - at, draws, width), 0)
    return density


def _kernels(at: Array, draws: Array, width: float) -> Array:
    kernels = np.exp(-0.5 * ((at[:, None] - draws) / width) ** 2)
    return np.asarray(kernels.mean(axis=1)) / (width * math.sqrt(2 * math.pi))


def kernel_density(draws: Array) -> Density:
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
    axes = [np.linspace(w.min() - 3 * width, w.max() + 3 * width, CELLS) for w in white]
    kernels = [
        np.exp(-0.5 * ((axis[:, None] - w) / width) ** 2)
        for axis, w in zip(axes, white, strict=True)
    ]
    u, v = np.meshgrid(*axes, indexing="ij")
    x, y = np.tensordot(scale, np.stack([u, v]), axes=1) + centre[:, None, None]
    return x, y, kernels[0] @ kernels[1].T


def level(density: Array, mass: float) -> float:
    """The level above which a density on an even grid has this share of its mass."""
    falling = np.sort(density, axis=None)[::-1]
    share = np.cumsum(falling) / falling.sum()
    return float(falling[np.searchsorted(share, mass)])
