"""Marginals of a variational posterior against reference draws, such as those of NUTS.

Importance weights judge a guide as a whole. Where the posterior is small enough to be sampled,
draws of it say more: how far off is each scalar, and in what? For the draws of one scalar from the
guide, q, and from the posterior, ref:

    mean:         (mean_q - mean_ref) / sd_ref              shifted, up or down
    sd:           sd_q / sd_ref - 1                         too narrow (below 0) or too wide
    wasserstein:  W1(q, ref) / sd_ref                       whatever else differs in shape

All are dimensionless, in units of the posterior's own spread, and so can be compared across scalars
of different units. They are estimates: `noise_floor` says how large they are among the reference
draws themselves.

Everything here is NumPy in float64; torch tensors on the CPU are taken as they are.
"""

from __future__ import annotations

__all__ = ["MarginalErrors", "marginal_errors", "noise_floor", "scalar_name"]

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyro_vi.diagnostics import finite

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MarginalErrors:
    """How far the marginals of some draws are from those of reference draws, scalar by scalar.

    Attributes:
        mean: the shift of the mean, in standard deviations of the reference, shape (...).
        sd: the standard deviation over that of the reference, less 1, shape (...).
        wasserstein: the 1-Wasserstein distance, in standard deviations of the reference, shape
            (...).

    Example:
        >>> MarginalErrors(np.array([0.1]), np.array([-0.3]), np.array([0.25])).sd
        array([-0.3])
    """

    mean: Array  # (...)
    sd: Array  # (...)
    wasserstein: Array  # (...)


def marginal_errors(draws: npt.ArrayLike, reference: npt.ArrayLike) -> MarginalErrors:
    r"""Errors of the marginals of `draws`, taking those of `reference` for the truth.

    With mean and sd over the draws (sd with S - 1 and R - 1), and the 1-Wasserstein distance of the
    two empirical distributions, which have the quantile functions F_q^-1 and F_ref^-1,

        mean = (mean_q - mean_ref) / sd_ref,    sd = sd_q / sd_ref - 1,
        wasserstein = int_0^1 |F_q^-1(p) - F_ref^-1(p)| dp / sd_ref.

    The distance is at least |mean|, and that of two finite samples is above zero even if both
    come from the same distribution (`noise_floor`). Joint errors, such as a missed correlation, do
    not show in the marginals.

    Args:
        draws: draws from the guide, shape (S, ...), S >= 2; the trailing axes are the scalars.
        reference: draws from the posterior, shape (R, ...), R >= 2, with the same trailing axes
            and in the same units. S and R may differ.

    Returns:
        Three errors for every scalar, dimensionless, each of shape (...); scalars if `draws` has
        shape (S,).

    Raises:
        TypeError: `draws` or `reference` is not an array of real numbers.
        ValueError: fewer than 2 draws, trailing shapes that differ, a value that is not finite, or
            a scalar that is constant in `reference`.

    Example:
        >>> reference = np.array([[-1.0, 0.0], [0.0, 2.0], [1.0, 4.0]])  # sd 1 and 2
        >>> errors = marginal_errors([[-0.5, 1.0], [0.5, 2.0], [1.5, 3.0]], reference)
        >>> errors.mean, errors.sd
        (array([0.5, 0. ]), array([ 0. , -0.5]))
        >>> errors.wasserstein
        array([0.5       , 0.33333333])
    """
    q, ref = _draws("draws", draws), _draws("reference", reference)
    if q.shape[1:] != ref.shape[1:]:
        raise ValueError(
            "draws, reference: expected the same shape after the first axis, "
            f"got {q.shape} and {ref.shape}"
        )
    sd_ref = ref.std(axis=0, ddof=1)
    constant = (np.ptp(ref, axis=0) == 0) | (sd_ref == 0)
    if constant.any():
        index = tuple(int(i) for i in np.argwhere(constant)[0])
        raise ValueError(
            "reference: expected draws that vary, got a standard deviation of zero at index "
            f"{index} of the trailing axes ({constant.sum()} of {constant.size} scalars)"
        )
    return MarginalErrors(
        mean=(q.mean(axis=0) - ref.mean(axis=0)) / sd_ref,
        sd=q.std(axis=0, ddof=1) / sd_ref - 1,
        wasserstein=_wasserstein(q, ref) / sd_ref,
    )


def noise_floor(reference: npt.ArrayLike) -> MarginalErrors:
    """The errors that Monte Carlo noise alone gives: half of the reference draws against the rest.

    The first half of the draws is taken for those of a guide, and the second half for the
    reference. The truth is zero. A guide whose errors are of this size cannot be told from the
    posterior by these draws. The halves are of one piece each, so that a chain that mixes slowly
    shows it: neighbours that resemble each other fall into the same half. Stack several chains one
    after the other, not draw by draw.

    Nothing is rescaled. For independent draws the shift of the mean has a standard deviation of
    sqrt(4 / R) here, but sqrt(1 / S + 1 / R) between S draws of a guide and all R: with S >= R / 3
    the floor is on the high side.

    Args:
        reference: draws from the posterior, shape (R, ...), R >= 4, in the order they were drawn.

    Returns:
        Three errors for every scalar, as `marginal_errors` gives them, each of shape (...).

    Raises:
        TypeError: `reference` is not an array of real numbers.
        ValueError: fewer than 4 draws, a value that is not finite, or a scalar that is constant
            over the second half.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(10_000, 2))
        >>> noise_floor(draws).wasserstein < 0.1
        array([ True,  True])
    """
    values = _draws("reference", reference, minimum=4)
    half = len(values) // 2
    return marginal_errors(values[:half], values[half:])


def scalar_name(site: str, index: tuple[int, ...]) -> str:
    """The name of one scalar of a site, whose value is that scalar if `index` is empty.

    Example:
        >>> scalar_name("weight", (0, 2)), scalar_name("scale", ())
        ('weight[0, 2]', 'scale')
    """
    return f"{site}[{', '.join(map(str, index))}]" if index else site


def _draws(name: str, values: npt.ArrayLike, *, minimum: int = 2) -> Array:
    """Draws as a finite float64 array, at least `minimum` of them on the first axis."""
    array = finite(name, values)
    if array.ndim == 0 or len(array) < minimum:
        raise ValueError(
            f"{name}: expected at least {minimum} draws on the first axis, got shape {array.shape}"
        )
    return array


def _wasserstein(q: Array, ref: Array) -> Array:
    """W1 of the empirical distributions of (S, ...) and (R, ...) draws, per scalar."""
    from scipy.stats import wasserstein_distance  # type: ignore[import-untyped]  # a second, once

    distance = np.empty(q.shape[1:])
    for index in np.ndindex(distance.shape):
        distance[index] = wasserstein_distance(q[:, *index], ref[:, *index])
    return distance[()]
