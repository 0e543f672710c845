"""Diagnostics of a variational posterior: from its importance weights, and from its draws alone.

For every data point x, S draws z_s ~ q(z | x) give the log weights

    log w_s = log p(x, z_s) - log q(z_s | x)        [nats],

stored as arrays of shape (S, N): draws first, data points second; an array of shape (S,) is one
data point, and its answers are scalars. Nothing else is needed to ask how good the guide is:

- the evidence log p(x) = log E_q[w], the ELBO = E_q[log w], and their difference KL(q || p(z | x));
- the tail of the weights: Pareto k-hat says which moments of w exist, and so which of the estimates
  here (and any other average over the draws) can be believed;
- the effective sample size: how many of the S draws count;
- the Pareto-smoothed weights: the same posterior averages with less noise in them.

The standard errors are those of the S draws at each data point. They need weights with a variance
(k below 1/2); above `khat_threshold` neither they nor the estimates can be trusted.

Without the weights, draws of several restarts still show by their R-hat whether these agree.

Everything here is NumPy in float64, with SciPy's ranks; torch tensors on the CPU are taken as they
are.
"""

__all__ = [
    "RHAT_THRESHOLD",
    "Estimate",
    "active_units",
    "elbo",
    "finite",
    "importance_ess",
    "khat_threshold",
    "kl_to_posterior",
    "log_evidence",
    "mean_estimate",
    "paired_difference",
    "pareto_khat",
    "psis",
    "rhat",
]

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RHAT_THRESHOLD = 1.05  # across restarts; independent draws of one answer are far below

Array = npt.NDArray[np.float64]

_MIN_TAIL = 5  # fewer points do not support a fit of two parameters
_MIN_DRAWS = 21  # the fewest draws whose tail, ceil(S / 5), has five of them
_LOG_TINY = math.log(np.finfo(np.float64).tiny)  # weights this far below the largest are zero
_CHUNK = 2**18  # numbers in the largest intermediate array: about 2 MB, a cache's worth


@dataclass(frozen=True, eq=False)
class Estimate:
    """A Monte Carlo estimate and its standard error.

    Attributes:
        value: the estimate, shape (N,) or a scalar.
        se: one standard error of `value`: the same shape, the same unit.

    Example:
        >>> Estimate(value=np.array([-1.5]), se=np.array([0.1])).value
        array([-1.5])
    """

    value: Array  # (N,) or ()
    se: Array  # (N,) or ()


def pareto_khat(log_weights: npt.ArrayLike) -> Array:
    r"""Pareto k-hat of the importance weights: how heavy their right tail is, per data point.

    The largest M = ceil(min(S / 5, 3 sqrt(S))) weights, less the largest weight below them, are
    fitted by a generalized Pareto distribution,

        p(u | sigma, k) = (1 + k u / sigma)^(-1/k - 1) / sigma,    E[w^m] finite  <=>  k < 1/m,

    with the empirical Bayes estimate of Zhang and Stephens, drawn towards 1/2 by a weak prior worth
    ten points: k-hat = (M k + 10 * 0.5) / (M + 10). Below `khat_threshold(S)` the draws can be
    reweighted to the exact posterior; above it the guide misses too much of the posterior for that.

    Three cases have no fit, and never give NaN:

    - the log weights are constant up to rounding (an exact guide), or more than M draws share the
      largest weight: there is no tail, and k-hat is `-inf`, below every threshold;
    - fewer than five weights stand above the rest (ties, or all others are below 2e-308 of the
      largest): the tail cannot be judged, and k-hat is `inf`;
    - the fit overflows, because the tail spans all of float64: `inf`.

    Args:
        log_weights: log p(x, z_s) - log q(z_s | x) in nats, shape (S, N) or (S,), S >= 21. `-inf`
            is a weight of zero. A constant added to them changes nothing.

    Returns:
        k-hat, dimensionless, shape (N,); a scalar if `log_weights` has shape (S,).

    Raises:
        TypeError: `log_weights` is not an array of real numbers.
        ValueError: not one or two axes, fewer than 21 draws (a tail of fewer than five), NaN or
            +inf, or a data point all of whose weights are zero.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling",
        arXiv:1507.02646.
        Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto
        distribution", Technometrics 51(3), 2009.
        Yao, Vehtari, Simpson, Gelman, "Yes, but did it work?: evaluating variational inference",
        arXiv:1802.02538.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(1000, 2))
        >>> log_p = -0.5 * (z / [1.1, 2.0]) ** 2    # the guide is a little, and far, too narrow
        >>> pareto_khat(log_p + 0.5 * z**2) < khat_threshold(1000)
        array([ True, False])
    """
    log_w = _log_weights(log_weights, min_draws=_MIN_DRAWS)
    columns = log_w.reshape(len(log_w), -1)
    tail = _tail_size(len(log_w))
    khat = np.empty(columns.shape[1])
    for chunk in _chunks(columns.shape[1], max(len(log_w), tail * _num_candidates(tail))):
        khat[chunk] = _fit_tails(columns[:, chunk].T, tail).k
    return khat.reshape(log_w.shape[1:])[()]


def psis(log_weights: npt.ArrayLike) -> Array:
    r"""Pareto-smoothed importance weights, normalised over the draws, per data point.

    A few extreme weights carry most of the noise of an average over the draws. The largest M (the
    tail that `pareto_khat` fits) are replaced, rank by rank, by the quantiles of the fitted
    generalized Pareto distribution, and truncated at the largest raw weight:

        w_(z) = min(u + F^-1((z - 1/2) / M), max_s w_s),    F^-1(p) = sigma ((1 - p)^-k - 1) / k,

    for z = 1, ..., M in rising order, u being the largest weight below the tail. With `lw` the
    answer, `(np.exp(lw) * f(z)).sum(axis=0)` estimates E[f(z) | x] of the posterior. Where k-hat is
    between 1/2 and `khat_threshold` its error is smaller than with the raw weights: somewhat more
    bias, far less variance. Above the threshold neither can be trusted.

    Weights tied with u are not in the tail, and M counts those above it. Where `pareto_khat` has no
    fit, and answers `-inf` or `inf`, the raw weights are normalised as they are. Draws of equal
    weight in the tail get the quantiles of their ranks in the order of the draws.

    Args:
        log_weights: log p(x, z_s) - log q(z_s | x) in nats, shape (S, N) or (S,), S >= 21. `-inf`
            is a weight of zero. A constant added to them changes nothing.

    Returns:
        The logarithms of weights that sum to 1 over the draws, in the shape of `log_weights`.

    Raises:
        TypeError: `log_weights` is not an array of real numbers.
        ValueError: as `pareto_khat`.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling",
        arXiv:1507.02646.

    Example:
        >>> z = np.random.default_rng(0).exponential(size=1000) / 2  # q has rate 2, p has rate 1
        >>> weights = np.exp(psis(z))
        >>> round(float(weights.sum()), 9), round(float(weights @ z), 1)  # E_p[z] = 1
        (1.0, 1.0)
    """
    log_w = _log_weights(log_weights, min_draws=_MIN_DRAWS)
    columns = log_w.reshape(len(log_w), -1)
    tail = _tail_size(len(log_w))
    smoothed = np.empty_like(columns)
    for chunk in _chunks(columns.shape[1], max(len(log_w), tail * _num_candidates(tail))):
        smoothed[:, chunk] = _smooth_tails(columns[:, chunk].T, tail).T
    return smoothed.reshape(log_w.shape)


def rhat(draws: npt.ArrayLike) -> Array:
    r"""Rank-normalised split R-hat: whether several chains have the same distribution.

    Every chain is cut in two (an odd draw in the middle is left out), which makes m = 2 C chains of
    n = S // 2 draws, and all the draws of a scalar are replaced by normal scores of their ranks r
    among them, z = Phi^-1((r - 3/8) / (m n + 1/4)). With B / n the variance of the chains' means
    and W the mean of their variances,

        R-hat = sqrt((n - 1) / n + (B / n) / W),

    and the answer is the larger of two: that of the draws (a difference in location) and that of
    their distances from the common median (a difference in scale). Ranks always have moments: heavy
    tails do no harm. Chains that agree are near 1; 1.01 is the usual bound for MCMC.

    For draws of several restarts of a variational fit, one restart per chain, it says whether the
    restarts agree. It says nothing about the quality of the family: restarts of one that is too
    simple can agree on the same wrong posterior.

    Draws that are one constant in all chains agree: 1. Chains that are constant, at different
    values, have nothing in common: `inf`.

    Args:
        draws: C chains of S draws of one or more scalars, shape (C, S, ...), C >= 2, S >= 4.

    Returns:
        R-hat, dimensionless, of every scalar, shape (...); a scalar if `draws` has shape (C, S).

    Raises:
        TypeError: `draws` is not an array of real numbers.
        ValueError: fewer than 2 chains or 4 draws, or a value that is not finite.

    References:
        Vehtari, Gelman, Simpson, Carpenter, Bürkner, "Rank-normalization, folding, and
        localization: an improved R-hat for assessing convergence of MCMC", arXiv:1903.08008.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(4, 500, 3))
        >>> draws[0, :, 1] += 1    # one chain is elsewhere
        >>> draws[0, :, 2] *= 3    # one chain is wider
        >>> rhat(draws) > 1.01
        array([False,  True,  True])
    """
    values = finite("draws", draws)
    if values.ndim < 2 or values.shape[0] < 2 or values.shape[1] < 4:
        raise ValueError(
            "draws: expected shape (C, S, ...) with at least 2 chains and 4 draws, got "
            f"{values.shape}"
        )
    half = values.shape[1] // 2
    chains = np.concatenate([values[:, :half], values[:, -half:]])
    chains = chains.reshape(*chains.shape[:2], math.prod(values.shape[2:]))
    largest = np.empty(chains.shape[2])
    for chunk in _chunks(len(largest), chains.shape[0] * half):
        part = chains[:, :, chunk]
        folded = np.abs(part - np.median(part, axis=(0, 1)))
        largest[chunk] = np.fmax(_rank_rhat(part), _rank_rhat(folded))  # NaN: all are equal
    return np.where(np.isnan(largest), 1.0, largest).reshape(values.shape[2:])[()]


def khat_threshold(num_draws: int) -> float:
    """The k-hat below which importance weighting with S draws works: min(1 - 1 / log10(S), 0.7).

    With fewer draws less can be asked of them; from S = 2155 on the bound is 0.7.

    Args:
        num_draws: S, at least 21 (as `pareto_khat` needs).

    Returns:
        The threshold, dimensionless.

    Raises:
        TypeError: `num_draws` is not a whole number.
        ValueError: `num_draws` is below 21.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling",
        arXiv:1507.02646, section 3.2.4.

    Example:
        >>> round(khat_threshold(1000), 3)
        0.667
    """
    num_draws = operator.index(num_draws)
    if num_draws < _MIN_DRAWS:
        raise ValueError(f"num_draws: expected at least {_MIN_DRAWS}, got {num_draws}")
    return min(1 - 1 / math.log10(num_draws), 0.7)


def log_evidence(log_weights: npt.ArrayLike) -> Estimate:
    """Importance-weighted estimate of the log evidence, per data point.

        log p(x) ~ L_S = log (1/S sum_s w_s),    se = sd(w) / (mean(w) sqrt(S))    (delta method).

    In expectation L_S is a lower bound that rises with S: it sits about se^2 / 2 below log p(x).

    Args:
        log_weights: log p(x, z_s) - log q(z_s | x) in nats, shape (S, N) or (S,), S >= 2.

    Returns:
        The estimate and its standard error in nats per data point, shape (N,) or scalars.

    Raises:
        TypeError: `log_weights` is not an array of real numbers.
        ValueError: not one or two axes, fewer than 2 draws, NaN or +inf, or a data point all of
            whose weights are zero.

    References:
        Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", arXiv:1509.00519.

    Example:
        >>> log_evidence(np.log([[1.0], [3.0]])).value    # log 2
        array([0.69314718])
    """
    log_w = _log_weights(log_weights)
    top = log_w.max(axis=0)
    excess = _log_mean_exp(log_w - top)
    return Estimate(top + excess, _standard_error(np.exp(log_w - top - excess)))


def elbo(log_weights: npt.ArrayLike) -> Estimate:
    """The evidence lower bound, per data point: 1/S sum_s log w_s, with se = sd(log w) / sqrt(S).

    Args:
        log_weights: log p(x, z_s) - log q(z_s | x) in nats, shape (S, N) or (S,), S >= 2.

    Returns:
        The estimate and its standard error in nats per data point, shape (N,) or scalars. One draw
        of weight zero makes the bound `-inf`, and its standard error `inf`.

    Raises:
        TypeError: `log_weights` is not an array of real numbers.
        ValueError: as `log_evidence`.

    Example:
        >>> elbo([[1.0], [3.0]]).value
        array([2.])
    """
    log_w = _log_weights(log_weights)
    top = log_w.max(axis=0)
    return Estimate(top + (log_w - top).mean(axis=0), _standard_error(log_w - top))


def kl_to_posterior(log_weights: npt.ArrayLike) -> Estimate:
    """How far the guide is from the exact posterior, per data point: evidence minus ELBO.

        KL(q(z | x) || p(z | x)) = log p(x) - ELBO ~ log mean(w) - mean(log w),
        se = sd(w / mean(w) - log w) / sqrt(S).

    Both terms come from the same draws, and the standard error counts on it: where they move
    together it is smaller than that of either. Like the evidence the estimate sits low, and far too
    low where k-hat is high.

    Args:
        log_weights: log p(x, z_s) - log q(z_s | x) in nats, shape (S, N) or (S,), S >= 2.

    Returns:
        The estimate and its standard error in nats per data point, shape (N,) or scalars; both
        `inf` if a draw has weight zero.

    Raises:
        TypeError: `log_weights` is not an array of real numbers.
        ValueError: as `log_evidence`.

    Example:
        >>> kl_to_posterior(np.full((100, 2), -3.5)).value  # constant weights: an exact guide
        array([0., 0.])
    """
    log_w = _log_weights(log_weights)
    shifted = log_w - log_w.max(axis=0)
    excess = _log_mean_exp(shifted)
    return Estimate(
        excess - shifted.mean(axis=0), _standard_error(np.exp(shifted - excess) - shifted)
    )


def importance_ess(log_weights: npt.ArrayLike) -> Array:
    """Effective sample size of the weighted draws, per data point: (sum w)^2 / sum w^2.

    It lies between 1 (one draw has all the weight) and S (an exact guide), and ESS / S estimates
    1 / (1 + chi2(p(z | x) || q)). It knows only the draws it has seen: read k-hat first.

    Args:
        log_weights: log p(x, z_s) - log q(z_s | x) in nats, shape (S, N) or (S,).

    Returns:
        A number of draws, shape (N,); a scalar if `log_weights` has shape (S,).

    Raises:
        TypeError: `log_weights` is not an array of real numbers.
        ValueError: not one or two axes, no draws, NaN or +inf, or a data point all of whose weights
            are zero.

    References:
        Kong, "A note on importance sampling using standardized weights", University of Chicago,
        technical report 348, 1992.

    Example:
        >>> importance_ess(np.log([[1.0, 1.0], [1.0, 3.0]]))
        array([2. , 1.6])
    """
    log_w = _log_weights(log_weights, min_draws=1)
    w = np.exp(log_w - log_w.max(axis=0))
    return (w.sum(axis=0) ** 2 / (w**2).sum(axis=0))[()]


def mean_estimate(estimate: Estimate) -> Estimate:
    """The mean over data points: value mean(value), standard error sqrt(sum se^2) / N.

    The error is that of the draws alone, independent from one data point to the next; how much the
    data points differ among themselves is another question (`paired_difference`).

    Args:
        estimate: one value and standard error per data point, shape (N,); a scalar is its own mean.

    Returns:
        Two scalars, in the unit of `estimate`.

    Raises:
        ValueError: no data points, or `value` and `se` differ in shape.

    Example:
        >>> mean = mean_estimate(Estimate(np.array([1.0, 2.0]), np.array([0.3, 0.4])))
        >>> float(mean.value), float(mean.se)
        (1.5, 0.25)
    """
    value, se = np.atleast_1d(estimate.value), np.atleast_1d(estimate.se)
    if value.shape != se.shape or value.size == 0:
        raise ValueError(
            "estimate: expected one value and one standard error per data point, at least one, "
            f"got shapes {value.shape} and {se.shape}"
        )
    return Estimate(value.mean(), np.sqrt((se**2).sum()) / value.size)


def active_units(draws: npt.ArrayLike, *, threshold: float = 0.01) -> npt.NDArray[np.bool_]:
    """Which latent dimensions the guide uses: those whose posterior mean moves with the data.

        unit i is active  <=>  Var_x(E_q[z_i | x]) > threshold.

    A dimension that has collapsed to the prior has the same posterior mean for every x. The
    threshold is meant for a standard normal prior. Means of S draws vary by Var_q / S more than
    the expectations do, which is subtracted: otherwise few draws would make every unit active.

    Args:
        draws: draws of z for every data point, shape (S, N, d), S >= 2, N >= 2.
        threshold: a variance, in squared units of z.

    Returns:
        True where active, shape (d,); its sum is the number of active units.

    Raises:
        TypeError: `draws` is not an array of real numbers.
        ValueError: not three axes, fewer than 2 draws or data points, or a value not finite.

    References:
        Burda, Grosse, Salakhutdinov, "Importance weighted autoencoders", arXiv:1509.00519,
        section 5.2.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(100, 50, 2))  # draws from the prior
        >>> z[:, :, 0] += np.linspace(-1, 1, 50)
        >>> active_units(z)
        array([ True, False])
    """
    values = finite("draws", draws)
    if values.ndim != 3 or min(values.shape[:2]) < 2:
        raise ValueError(
            "draws: expected shape (S, N, d) with at least 2 draws and 2 data points, got"
            f" {values.shape}"
        )
    noise = values.var(axis=0, ddof=1).mean(axis=0) / len(values)
    return values.mean(axis=0).var(axis=0) - noise > threshold


def paired_difference(a: npt.ArrayLike, b: npt.ArrayLike) -> Estimate:
    """Mean difference of two guides (or models) on the same data points.

        value = mean(a - b),    se = sd(a - b) / sqrt(N).

    Most of the spread of a bound over data points is shared by both (a hard image is hard for every
    guide) and cancels here: the error is far smaller than that of two separate means.

    Args:
        a: one number per data point, such as an ELBO in nats, shape (N,), N >= 2.
        b: the same for the other, on the same data points in the same order, shape (N,).

    Returns:
        Mean difference and standard error, two scalars in the unit of `a`.

    Raises:
        TypeError: `a` or `b` is not an array of real numbers.
        ValueError: shapes other than (N,), N >= 2, for both, or a value that is not finite.

    Example:
        >>> float(paired_difference([1.0, 5.0, 9.0], [0.0, 3.0, 6.0]).value)
        2.0
    """
    first, second = finite("a", a), finite("b", b)
    if first.ndim != 1 or first.shape != second.shape or first.size < 2:
        raise ValueError(
            "a, b: expected the same shape (N,) with N >= 2 data points, "
            f"got {first.shape} and {second.shape}"
        )
    difference = first - second
    return Estimate(difference.mean(), _standard_error(difference))


def _numbers(name: str, values: npt.ArrayLike) -> Array:
    """`values` as a float64 array, or a TypeError that names the argument."""
    try:
        array = np.asarray(values)
    except (
        TypeError,
        RuntimeError,
        ValueError,
    ) as error:  # a CUDA tensor, one that wants a gradient
        raise TypeError(f"{name}: expected an array of real numbers: {error}") from error
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected an array of real numbers, got dtype {array.dtype}")
    return array.astype(np.float64, copy=False)


def finite(name: str, values: npt.ArrayLike) -> Array:
    """`values` as a float64 array without NaN or infinity."""
    array = _numbers(name, values)
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise ValueError(f"{name}: expected finite numbers, got {bad} of {array.size} that are not")
    return array


def _log_weights(values: npt.ArrayLike, *, min_draws: int = 2) -> Array:
    """Log weights as a float64 array (S, N) or (S,), checked."""
    log_w = _numbers("log_weights", values)
    if log_w.ndim not in (1, 2):
        raise ValueError(
            "log_weights: expected shape (S, N), draws by data points, or (S,), "
            f"got {log_w.ndim} axes: {log_w.shape}"
        )
    if log_w.shape[0] < min_draws:
        raise ValueError(
            f"log_weights: expected at least {min_draws} draws on the first axis, "
            f"got shape {log_w.shape}"
        )
    bad = int(np.isnan(log_w).sum()), int(np.isposinf(log_w).sum())
    if any(bad):
        raise ValueError(
            f"log_weights: expected finite numbers or -inf, got {bad[0]} NaN and {bad[1]} +inf "
            f"among {log_w.size}"
        )
    empty = int(np.isneginf(log_w.max(axis=0)).sum())
    if empty:
        raise ValueError(
            "log_weights: expected a weight above zero for every data point, "
            f"got {empty} data point(s) with -inf for all draws"
        )
    return log_w


def _log_mean_exp(shifted: Array) -> Array:
    """log(mean(exp(.))) over draws, of log weights whose largest is 0."""
    return np.log(np.exp(shifted).mean(axis=0))


def _standard_error(influence: Array) -> Array:
    """sd / sqrt(S) over the first axis; inf where a draw is infinite."""
    with np.errstate(invalid="ignore"):
        se = influence.std(axis=0, ddof=1) / math.sqrt(influence.shape[0])
    return np.where(np.isnan(se), np.inf, se)[()]


def _num_candidates(tail: int) -> int:
    """Zhang and Stephens: how many values of b = -k / sigma the posterior mean is taken over."""
    return 30 + math.isqrt(tail)


def _tail_size(num_draws: int) -> int:
    """How many of the largest weights are fitted: M = ceil(min(S / 5, 3 sqrt(S)))."""
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def _chunks(num: int, width: int) -> Iterator[slice]:
    """Slices over `num` items, each with `width` numbers, of at most `_CHUNK` numbers (or one)."""
    step = max(1, _CHUNK // max(1, width))
    return (slice(start, start + step) for start in range(0, num, step))


class _Tails(NamedTuple):
    """The fitted tail of each of n rows of log weights."""

    k: Array  # (n,): k-hat; -inf or inf where there is no fit
    scale: Array  # (n,): sigma in units of the cutoff; NaN where there is no fit
    cutoff: Array  # (n,): log of the weight that the tail begins above, less the largest
    size: npt.NDArray[np.intp]  # (n,): how many weights stand above it


def _fit_tails(log_w: Array, tail: int) -> _Tails:
    """The tail of each row of (n, S) log weights, fitted to its `tail` largest."""
    top = log_w.max(axis=1, keepdims=True)
    # The largest weight below the tail, then the tail, in rising order: (n, tail + 1).
    upper = np.sort(np.partition(log_w, log_w.shape[1] - tail - 1, axis=1)[:, -tail - 1 :]) - top
    cutoff = np.maximum(upper[:, :1], _LOG_TINY)
    above = np.maximum(upper[:, 1:] - cutoff, 0)  # 0: tied with the cutoff, or vanishing
    size = (above > 0).sum(axis=1)
    spread = top[:, 0] - log_w.min(axis=1)
    flat = (size == 0) | (spread <= 1e-12 * np.maximum(1, abs(top[:, 0])))
    khat = np.where(flat, -np.inf, np.inf)
    scale = np.full(len(log_w), np.nan)
    fit = ~flat & (size >= _MIN_TAIL)
    if fit.any():
        # Excess over the cutoff in units of the cutoff, since k does not depend on the scale.
        khat[fit], scale[fit] = _fit_pareto(np.expm1(above[fit]), size[fit])
    return _Tails(khat, scale, cutoff[:, 0], size)


def _fit_pareto(excess: Array, size: npt.NDArray[np.intp]) -> tuple[Array, Array]:
    """Zhang and Stephens' k and sigma of each row, whose last `size` numbers are above 0 and rise.

    With b = -k / sigma the likelihood is maximal over k at k(b) = mean(log(1 - b u)), which leaves
    one parameter: its profile likelihood, on a grid of candidates that follows the first quartile
    and the maximum, gives the posterior mean of b, and k at that b. The prior that then draws k
    towards 1/2 leaves sigma as it is.
    """
    rows, tail = excess.shape
    n = size[:, None]
    m = 30 + np.floor(np.sqrt(n))
    j = np.arange(1, _num_candidates(tail) + 1)
    quartile = excess[np.arange(rows), tail - size + (size / 4 + 0.5).astype(np.intp) - 1]
    with np.errstate(all="ignore"):  # a row that overflows ends as inf, below
        b = (1 - np.sqrt(m / (j - 0.5))) / (3 * quartile[:, None]) + 1 / excess[:, -1:]
        b[j > m] = 0  # a shorter tail has fewer candidates
        terms = b[:, :, None] * -excess[:, None, :]  # (rows, candidates, tail): most of the work
        k = np.log1p(terms, out=terms).sum(axis=2) / n
        # As b -> 0 the distribution becomes exponential, and -b / k one over the mean excess.
        mean = excess.sum(axis=1, keepdims=True) / n
        inverse_scale = np.where(b == 0, 1 / mean, -b / k)
        profile = np.where(j > m, -np.inf, n * (np.log(inverse_scale) - k - 1))
        weight = np.exp(profile - profile.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        weight[weight < 10 * np.finfo(np.float64).eps] = 0
        b_mean = (b * weight).sum(axis=1, keepdims=True) / weight.sum(axis=1, keepdims=True)
        k_mean = np.log1p(-b_mean * excess).sum(axis=1) / size
        scale = np.where(b_mean == 0, mean, -k_mean[:, None] / b_mean)[:, 0]
        khat = (size * k_mean + 10 * 0.5) / (size + 10)
    return np.where(np.isnan(khat), np.inf, khat), scale


def _smooth_tails(log_w: Array, tail: int) -> Array:
    """The Pareto-smoothed and normalised log weights of each row of (n, S) log weights."""
    fit = _fit_tails(log_w, tail)
    smoothed = log_w - log_w.max(axis=1, keepdims=True)
    rows = np.flatnonzero(np.isfinite(fit.k) & np.isfinite(fit.scale) & (fit.scale > 0))
    if rows.size:
        k, scale, cutoff = (values[rows, None] for values in (fit.k, fit.scale, fit.cutoff))
        size = fit.size[rows, None]
        raw = smoothed[rows]
        # Where the largest are, in rising order; those above the cutoff are the last `size`.
        where = np.sort(np.argpartition(raw, raw.shape[1] - tail, axis=1)[:, -tail:])
        order = np.argsort(np.take_along_axis(raw, where, axis=1), axis=1, kind="stable")
        where = np.take_along_axis(where, order, axis=1)
        z = np.arange(1, tail + 1) - (tail - size)
        log_quantile = np.log(scale) + _log_pareto_quantile(np.maximum(z - 0.5, 0.5) / size, k)
        value = np.minimum(cutoff + np.logaddexp(0, log_quantile), 0)
        value = np.where(z > 0, value, np.take_along_axis(raw, where, axis=1))
        np.put_along_axis(raw, where, value, axis=1)
        smoothed[rows] = raw
    smoothed -= smoothed.max(axis=1, keepdims=True)
    return smoothed - np.log(np.exp(smoothed).sum(axis=1, keepdims=True))


def _log_pareto_quantile(p: Array, k: Array) -> Array:
    """log(((1 - p)^-k - 1) / k) for 0 < p < 1, finite however large k is, and smooth at k = 0."""
    e = -np.log1p(-p)  # the quantile of the exponential distribution, which is that of k = 0
    size = np.maximum(np.abs(k), np.finfo(np.float64).eps)  # below eps: the limit, to rounding
    return np.maximum(k * e, 0) + np.log(-np.expm1(-size * e) / size)


def _rank_rhat(chains: Array) -> Array:
    """R-hat of the normal scores of (m, n, K) draws, per scalar.

    NaN if all the draws are equal, inf if only those within each chain are.
    """
    from scipy.special import ndtri  # type: ignore[import-untyped]
    from scipy.stats import rankdata  # type: ignore[import-untyped]  # a second, once

    m, n, num = chains.shape
    rank = rankdata(chains.reshape(m * n, num), axis=0).reshape(chains.shape)
    score = ndtri((rank - 3 / 8) / (m * n + 1 / 4))
    within = score.var(axis=1, ddof=1).mean(axis=0)
    between = score.mean(axis=1).var(axis=0, ddof=1)
    # Compared, not computed: the variance of equal numbers need not round to zero.
    still = (np.ptp(rank, axis=1) == 0).all(axis=0)
    equal = np.ptp(rank, axis=(0, 1)) == 0
    ratio = np.divide(between, within, out=np.where(equal, np.nan, np.inf), where=~still)
    return np.asarray(np.sqrt((n - 1) / n + ratio))
