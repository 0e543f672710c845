"""Diagnostics of a posterior, against Gaussians whose every answer is known and against ArviZ.

For the weights the posterior is N(0, P^-1), with evidence 1, and the guide N(0, Q^-1), for
precisions P and Q.
"""

from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import chi2 as chi2_distribution

from pyro_vi.diagnostics import (
    Estimate,
    active_units,
    elbo,
    importance_ess,
    khat_threshold,
    kl_to_posterior,
    log_evidence,
    mean_estimate,
    paired_difference,
    pareto_khat,
    psis,
    rhat,
)

Array = npt.NDArray[np.float64]
WEIGHT_FUNCTIONS = (pareto_khat, log_evidence, elbo, kl_to_posterior, importance_ess)


needs_arviz_0 = pytest.mark.skipif(
    version("arviz").startswith("1."), reason="psislw and rhat have other signatures there"
)


def draw_log_weights(
    posterior: npt.ArrayLike, guide: npt.ArrayLike, shape: tuple[int, ...], seed: int = 0
) -> Array:
    """log p(z) - log q(z) for draws of the given shape from N(0, guide^-1)."""
    p, q = np.atleast_2d(posterior), np.atleast_2d(guide)
    noise = np.random.default_rng(seed).normal(size=(*shape, len(q)))
    z = noise @ np.linalg.inv(np.linalg.cholesky(q))
    volume = 0.5 * (np.linalg.slogdet(p)[1] - np.linalg.slogdet(q)[1])
    return np.asarray(volume - 0.5 * np.einsum("...i,ij,...j", z, p - q, z))


def correlated(rho: float) -> tuple[Array, Array]:
    """Precisions of a 2-D Gaussian of correlation rho and of its best mean-field guide."""
    p = np.linalg.inv(np.array([[1, rho], [rho, 1]]))
    return p, np.diag(np.diag(p))


def chi2(p: npt.ArrayLike, q: npt.ArrayLike) -> float:
    """E_q[w^2] - 1, finite where 2P - Q is positive definite."""
    p, q = np.atleast_2d(p), np.atleast_2d(q)
    return float(
        np.linalg.det(p) / np.sqrt(np.linalg.det(q) * np.linalg.det(2 * p - q)) - 1,
    )


# Pareto k-hat


@pytest.mark.parametrize(
    ("rho", "at_1e5"), [(0.3, 0.28), (0.5, 0.46), (0.7, 0.64), (0.9, 0.82), (0.97, 0.88)]
)
def test_khat_of_a_mean_field_guide_is_the_correlation(rho: float, at_1e5: float) -> None:
    # 1e5 draws give a little less than k = rho on average; one set of draws differs by 0.06.
    khat = pareto_khat(draw_log_weights(*correlated(rho), shape=(100_000, 24)))
    assert abs(khat.mean() - at_1e5) < 0.06
    assert np.abs(khat - at_1e5).max() < 4 * 0.06


@pytest.mark.parametrize(
    ("guide", "usable"),
    [(1.05, True), (0.25, True), (10.0, False)],
    ids=["good", "too wide", "overconfident"],
)
def test_khat_tells_good_and_wide_from_overconfident(guide: float, usable: bool) -> None:
    log_weights = draw_log_weights(np.eye(4), guide * np.eye(4), shape=(2_000, 200))
    assert np.mean((pareto_khat(log_weights) < khat_threshold(2_000)) == usable) > 0.95


@pytest.mark.parametrize("k", [-1.0, -0.3, 0.0, 0.4, 0.7, 1.5])
def test_khat_of_exact_pareto_weights(k: float) -> None:
    # Every tail of a generalized Pareto distribution is one, with the same k.
    exponential = np.random.default_rng(0).exponential(size=(10_000, 200))
    khat = pareto_khat(np.log(np.expm1(k * exponential) / k if k else exponential))
    tail = 300
    with_prior = (tail * k + 10 * 0.5) / (tail + 10)
    regular = k > -0.5  # then maximum likelihood has a standard error of (1 + k) / sqrt(tail)
    bias = (2 if regular else 10) / tail
    assert abs(khat.mean() - with_prior) < 4 * khat.std() / np.sqrt(200) + bias
    if regular:
        assert khat.std() == pytest.approx((1 + k) / np.sqrt(tail), rel=0.25)


TAILS = {
    "nearly exact": lambda rng, shape: 1e-3 * rng.normal(size=shape),
    "light": lambda rng, shape: -rng.exponential(size=shape),
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heavy": lambda rng, shape: 2 * rng.exponential(size=shape),
    "far off": lambda rng, shape: 300 * rng.normal(size=shape),
    "ties": lambda rng, shape: rng.normal(size=shape).round(1),
    "zero weights": lambda rng, shape: np.where(rng.random(shape) < 0.9, -np.inf, 1.0).cumsum(0),
    "some zero": lambda rng, shape: np.log(np.maximum(rng.normal(size=shape), 0)),
}


@pytest.mark.parametrize("num_draws", [21, 100, 225, 226, 1_000, 5_000])
@pytest.mark.parametrize("tail", TAILS)
@needs_arviz_0
def test_khat_and_smoothed_weights_agree_with_arviz(tail: str, num_draws: int) -> None:
    import arviz

    with np.errstate(divide="ignore"):
        log_weights = TAILS[tail](np.random.default_rng(num_draws), (num_draws, 40)) - 100
    log_weights[0] = np.maximum(log_weights[0], -100)  # one weight at least is above zero
    with np.errstate(all="ignore"):
        smoothed, khat = arviz.psislw(log_weights.T.copy())
    np.testing.assert_allclose(pareto_khat(log_weights), khat, rtol=0, atol=1e-10)
    got, expected = psis(log_weights), smoothed.T
    if tail == "ties":  # which of the tied draws has which rank is not ArviZ's to say
        got, expected = np.sort(got, axis=0), np.sort(expected, axis=0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


def test_khat_does_not_depend_on_scale_order_or_company() -> None:
    log_weights = draw_log_weights(*correlated(0.8), shape=(500, 300))
    rng = np.random.default_rng(1)
    khat = pareto_khat(log_weights)
    shifted = log_weights + 1_000 * rng.normal(size=300)
    np.testing.assert_allclose(pareto_khat(shifted), khat, rtol=0, atol=1e-9)
    np.testing.assert_allclose(pareto_khat(rng.permutation(log_weights)), khat, rtol=0, atol=1e-12)
    alone = [pareto_khat(column) for column in log_weights.T]
    np.testing.assert_allclose(alone, khat, rtol=0, atol=1e-12)


def test_khat_of_an_exact_guide_is_minus_infinity() -> None:
    rng = np.random.default_rng(0)
    constant = np.full((100, 3), -123.4)
    rounded = constant + 1e-13 * rng.normal(size=constant.shape)
    for log_weights in (constant, rounded, constant * 1e6):
        assert np.all(pareto_khat(log_weights) == -np.inf)
    # Constant where it is not zero: the largest weight is shared, and nothing is heavier.
    support = np.where(rng.random(1_000) < 0.5, -np.inf, 2.0)
    assert pareto_khat(support) == -np.inf


def test_khat_of_a_tail_that_cannot_be_fitted_is_infinity() -> None:
    rng = np.random.default_rng(0)
    one_draw_has_it_all = rng.normal(size=1_000)
    one_draw_has_it_all[7] = 800
    one_above_zero = np.full(1_000, -np.inf)
    one_above_zero[7] = 0
    four_above_a_tie = np.zeros(1_000)
    four_above_a_tie[:4] = [1, 2, 3, 4]
    spans_all_of_float64 = np.linspace(0, 1e-6, 1_000)
    spans_all_of_float64[7] = 708
    columns = [one_draw_has_it_all, one_above_zero, four_above_a_tie, spans_all_of_float64]
    assert np.all(pareto_khat(np.stack(columns, axis=1)) == np.inf)


def test_khat_is_never_nan() -> None:
    rng = np.random.default_rng(0)
    for num_draws in (21, 50, 1_200):  # 1,200 draws: a tail of 104, for which a candidate b is 0
        levels = np.floor(
            rng.exponential(size=(num_draws, 200)) * rng.choice([0.1, 1, 9, 700], 200)
        )
        assert not np.isnan(pareto_khat(levels)).any()
    two_values = np.zeros(1_200)
    two_values[:104] = 1.0
    assert np.isfinite(pareto_khat(two_values))


def test_khat_threshold() -> None:
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(1_000) == pytest.approx(2 / 3)
    assert khat_threshold(2_154) < 0.7 == khat_threshold(2_155) == khat_threshold(10**6)
    with pytest.raises(ValueError, match="at least 21, got 20"):
        khat_threshold(20)
    with pytest.raises(TypeError):
        khat_threshold(1e3)  # type: ignore[arg-type]


# Pareto-smoothed weights


def normalised(log_weights: Array) -> Array:
    """The raw weights, normalised."""
    return np.asarray(log_weights - np.logaddexp.reduce(log_weights, axis=0))


@pytest.mark.parametrize("k", [0.5, 0.6])
def test_smoothed_weights_average_better_than_raw_ones(k: float) -> None:
    # p is Exp(1) and q is Exp(1 / (1 - k)): the weights are exactly Pareto, and E_p[z] = 1.
    z = (1 - k) * np.random.default_rng(0).exponential(size=(1_000, 1_000))
    log_weights = k / (1 - k) * z
    error = {
        name: np.sqrt(np.mean(((np.exp(lw) * z).sum(axis=0) - 1) ** 2))
        for name, lw in (("raw", normalised(log_weights)), ("smoothed", psis(log_weights)))
    }
    assert error["smoothed"] < 0.8 * error["raw"]


@pytest.mark.parametrize("num_draws", [21, 1_000])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3.0, 300.0])
def test_smoothing_touches_the_tail_alone(scale: float, num_draws: int) -> None:
    raw = scale * np.random.default_rng(0).normal(size=(num_draws, 50))
    copy = raw.copy()
    lw = psis(raw)
    np.testing.assert_array_equal(raw, copy)
    np.testing.assert_allclose(np.exp(lw).sum(axis=0), 1, rtol=1e-12)
    order = np.argsort(raw, axis=0)
    raw, lw = np.take_along_axis(raw, order, axis=0), np.take_along_axis(lw, order, axis=0)
    assert np.all(np.diff(lw, axis=0) >= 0)  # ranks are kept
    body = num_draws - int(np.ceil(min(num_draws / 5, 3 * np.sqrt(num_draws))))
    shift = (lw - raw)[body - 1]  # by the normalisation
    np.testing.assert_allclose((lw - raw)[:body], np.tile(shift, (body, 1)), rtol=0, atol=1e-9)
    assert np.all(np.abs((lw - raw)[body:] - shift).max(axis=0) > 1e-6)
    assert np.all(lw[-1] - shift <= raw[-1] + 1e-9)  # truncated at the largest raw weight


def test_smoothed_weights_do_not_depend_on_scale_order_or_company() -> None:
    log_weights = draw_log_weights(*correlated(0.8), shape=(500, 300))
    rng = np.random.default_rng(1)
    lw = psis(log_weights)
    shifted = log_weights + 1_000 * rng.normal(size=300)
    np.testing.assert_allclose(psis(shifted), lw, rtol=0, atol=1e-9)
    order = rng.permutation(500)
    np.testing.assert_allclose(psis(log_weights[order]), lw[order], rtol=0, atol=1e-12)
    alone = np.stack([psis(column) for column in log_weights.T], axis=1)
    np.testing.assert_allclose(alone, lw, rtol=0, atol=1e-12)


def test_smoothing_an_exponential_tail() -> None:
    # A shape whose k-hat is 0 to rounding, found by bisection: the quantiles are -sigma log(1 - p).
    noise = np.random.default_rng(0).exponential(size=1_000)

    def log_weights(k: float) -> Array:
        return np.asarray(np.log1p(np.expm1(k * noise) / k))

    low, high = -0.4, 0.401
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if pareto_khat(log_weights(middle)) < 0 else (low, middle)
    assert abs(pareto_khat(log_weights(low))) < 1e-14
    w = np.sort(np.exp(psis(log_weights(low))))
    tail = 95
    quantile = -np.log1p(-(np.arange(tail) + 0.5) / tail)
    slope = np.diff(w[-tail:]) / np.diff(quantile)
    np.testing.assert_allclose(slope[:-5], slope[0], rtol=1e-9)  # the last may be truncated
    assert w[-tail] - w[-tail - 1] == pytest.approx(slope[0] * quantile[0], rel=1e-9)
    for near in (low - 1e-9, low + 1e-9):
        np.testing.assert_allclose(np.sort(np.exp(psis(log_weights(near)))), w, rtol=1e-6)


def test_weights_without_a_fit_are_normalised_as_they_are() -> None:
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(psis(np.full((100, 3), -123.4)), -np.log(100), rtol=1e-14)
    one_draw_has_it_all = rng.normal(size=1_000)
    one_draw_has_it_all[7] = 800
    one_above_zero = np.full(1_000, -np.inf)
    one_above_zero[7] = 0
    four_above_a_tie = np.zeros(1_000)
    four_above_a_tie[:4] = [1, 2, 3, 4]
    support = np.where(rng.random(1_000) < 0.5, -np.inf, 2.0)
    fitted = rng.normal(size=1_000)
    columns = [one_draw_has_it_all, one_above_zero, four_above_a_tie, support, fitted]
    log_weights = np.stack(columns, axis=1)
    unfitted = ~np.isfinite(pareto_khat(log_weights))
    assert unfitted.tolist() == [True] * 4 + [False]
    lw, raw = psis(log_weights), normalised(log_weights)
    np.testing.assert_allclose(lw[:, unfitted], raw[:, unfitted], rtol=1e-14)
    assert not np.allclose(lw[:, 4], raw[:, 4])


def test_tied_weights_take_their_ranks_in_order() -> None:
    log_weights = np.repeat(np.random.default_rng(0).normal(size=50), 2)
    first, second = psis(log_weights).reshape(50, 2).T
    assert np.all(first <= second) and np.any(first < second)


def test_smoothed_weights_are_never_nan() -> None:
    rng = np.random.default_rng(0)
    for num_draws in (21, 50, 1_200):
        levels = np.floor(
            rng.exponential(size=(num_draws, 200)) * rng.choice([0.1, 1, 9, 700], 200)
        )
        np.testing.assert_allclose(np.exp(psis(levels)).sum(axis=0), 1, rtol=1e-9)
    spans_all_of_float64 = 708 * np.linspace(0, 1, 1_000) ** 9
    assert not np.isnan(psis(spans_all_of_float64)).any()


# R-hat of several chains


def autoregressive(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    x = rng.normal(size=shape)
    for t in range(1, shape[1]):
        x[:, t] += 0.8 * x[:, t - 1]
    return x


CHAINS = {
    "independent": lambda rng, shape: rng.normal(size=shape),
    "autoregressive": autoregressive,
    "apart": lambda rng, shape: (
        rng.normal(size=shape) + rng.normal(size=(shape[0], *shape[2:]))[:, None]
    ),
    "Cauchy": lambda rng, shape: rng.standard_cauchy(size=shape),
    "ties": lambda rng, shape: rng.poisson(1.0, size=shape),
}


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (2, 101, 1), (4, 250, 7), (3, 60, 2, 3)])
@pytest.mark.parametrize("kind", CHAINS)
@needs_arviz_0
def test_rhat_agrees_with_arviz(kind: str, shape: tuple[int, ...]) -> None:
    import arviz

    draws = CHAINS[kind](np.random.default_rng(0), shape)
    expected = arviz.rhat(arviz.convert_to_dataset({"x": draws}))["x"].to_numpy()
    got = rhat(draws)
    assert np.shape(got) == shape[2:]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["independent", "Cauchy"])
@pytest.mark.parametrize(("num_chains", "num_draws"), [(2, 200), (4, 1_000)])
def test_rhat_of_independent_draws_is_one(kind: str, num_chains: int, num_draws: int) -> None:
    # Means of n scores have variance 1 / n: with m half-chains, (B / n) / W is 1 / n times a
    # chi-squared variable of m - 1 degrees of freedom over m - 1.
    value = rhat(CHAINS[kind](np.random.default_rng(0), (num_chains, num_draws, 200)))
    n, free = num_draws // 2, 2 * num_chains - 1
    highest = chi2_distribution.ppf(1 - 1e-6, free) / free
    assert np.sqrt(1 - 1 / n) < value.min() < 1 < value.max() < np.sqrt(1 + (highest - 1) / n)


def test_rhat_of_chains_that_are_apart() -> None:
    # Half the chains at +d, half at -d: the variance of their means is d^2 m / (m - 1).
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4, 20_000, 3))
    for d in (0.05, 0.1):
        value = rhat(draws + d * np.array([1, 1, -1, -1])[:, None, None])
        expected = np.sqrt(1 + d**2 * 8 / 7)  # nearly: the scores are those of the mixture
        assert np.abs(value - expected).max() < 4 * (8 / 7) * d / np.sqrt(80_000) + d**4


def test_rhat_detects_location_scale_and_drift() -> None:
    rng = np.random.default_rng(0)
    same = rng.normal(size=(4, 1_000))
    location, scale = same.copy(), same.copy()
    location[0] += 0.5
    scale[0] *= 2
    drift = same + np.linspace(-1, 1, 1_000)
    assert rhat(same) < 1.005
    for draws in (location, scale, drift):
        assert rhat(draws) > 1.01
        # Two draws are as far from their common median, up to rounding: their ranks may swap.
        assert rhat(1e6 - 1e3 * draws) == pytest.approx(rhat(draws), rel=1e-4)
        assert rhat(draws[::-1]) == pytest.approx(rhat(draws), rel=1e-12)


def test_rhat_of_constant_chains() -> None:
    shape = (3, 10)
    assert rhat(np.full(shape, 0.1)) == 1
    assert rhat(np.broadcast_to([[0.1], [0.1], [0.3]], shape)) == np.inf
    # One chain that moves is enough for a finite answer.
    moves = np.full(shape, 0.1)
    moves[0] = np.random.default_rng(0).normal(size=10)
    assert 1 < rhat(moves) < np.inf
    # +-1 in equal numbers are at the same distance from their median: R-hat is that of the draws.
    assert rhat(np.resize([1.0, -1.0], (2, 8))) == pytest.approx(np.sqrt(3 / 4))
    both = np.stack([np.full(shape, 2.0), moves], axis=2)
    np.testing.assert_allclose(rhat(both), [1, rhat(moves)], rtol=1e-12)


# Evidence, ELBO, gap, effective sample size


def test_an_exact_guide_gives_exact_answers() -> None:
    log_weights = np.full((50, 3), -2.5)
    for estimate, value in (
        (log_evidence(log_weights), -2.5),
        (elbo(log_weights), -2.5),
        (kl_to_posterior(log_weights), 0.0),
    ):
        assert np.all(estimate.value == value) and np.all(estimate.se == 0)
    assert np.all(importance_ess(log_weights) == 50)


@pytest.mark.parametrize("rho", [0.1, 0.2, 0.4])
def test_bounds_of_a_mean_field_guide(rho: float) -> None:
    log_weights = draw_log_weights(*correlated(rho), shape=(1_000, 200))
    gap = -0.5 * np.log(1 - rho**2)
    for estimate, truth in (
        (log_evidence(log_weights), 0.0),
        (elbo(log_weights), -gap),
        (kl_to_posterior(log_weights), gap),
    ):
        mean = mean_estimate(estimate)
        bias = chi2(*correlated(rho)) / (2 * 1_000)
        assert abs(mean.value - truth) < 4 * mean.se + 2 * bias


def test_bias_of_the_importance_weighted_bound() -> None:
    value = log_evidence(draw_log_weights(*correlated(0.2), shape=(20, 200_000))).value
    bias = chi2(*correlated(0.2)) / (2 * 20)
    error = value.std() / np.sqrt(value.size)
    assert bias > 10 * error
    assert abs(-value.mean() - bias) < 4 * error


@pytest.mark.parametrize("guide", [correlated(0.1), correlated(0.2), (1.0, 0.25)])
def test_effective_sample_size(guide: tuple[npt.ArrayLike, npt.ArrayLike]) -> None:
    efficiency = importance_ess(draw_log_weights(*guide, shape=(10_000, 200))) / 10_000
    error = efficiency.std() / np.sqrt(efficiency.size)
    assert abs(efficiency.mean() - 1 / (1 + chi2(*guide))) < 4 * error + 1 / 10_000


@pytest.mark.parametrize("function", [log_evidence, elbo, kl_to_posterior])
@pytest.mark.parametrize("guide", [1.2, 0.5], ids=["overconfident", "too wide"])
def test_standard_errors_are_calibrated(function, guide: float) -> None:  # type: ignore[no-untyped-def]
    estimate = function(draw_log_weights(1.0, guide, shape=(400, 5_000)))
    spread = estimate.value.std()
    rms = np.sqrt(np.mean(estimate.se**2))
    # A standard deviation from 5,000 near-normal values is good to 1%; weights are less normal.
    assert rms == pytest.approx(spread, rel=0.05)


def test_gap_counts_on_paired_draws() -> None:
    log_weights = draw_log_weights(1.0, 0.9, shape=(400, 100))
    gap = kl_to_posterior(log_weights)
    evidence, bound = log_evidence(log_weights), elbo(log_weights)
    np.testing.assert_allclose(gap.value, evidence.value - bound.value, atol=1e-12)
    assert np.all(gap.value >= 0)
    assert np.all(gap.se < 0.5 * np.hypot(evidence.se, bound.se))


def test_a_constant_moves_bounds_and_nothing_else() -> None:
    log_weights = draw_log_weights(1.0, 0.5, shape=(100, 3))
    for shift in (-5_000.0, 5_000.0):
        for function in (log_evidence, elbo):
            moved, still = function(log_weights + shift), function(log_weights)
            np.testing.assert_allclose(moved.value, still.value + shift, rtol=1e-12)
            np.testing.assert_allclose(moved.se, still.se, rtol=1e-9)
        moved, still = kl_to_posterior(log_weights + shift), kl_to_posterior(log_weights)
        np.testing.assert_allclose(moved.value, still.value, atol=1e-11)
        np.testing.assert_allclose(moved.se, still.se, rtol=1e-9)
        np.testing.assert_allclose(
            importance_ess(log_weights + shift), importance_ess(log_weights), rtol=1e-9
        )


def test_zero_weights() -> None:
    log_weights = np.array([0.0, -np.inf, 0.0, -np.inf])
    evidence = log_evidence(log_weights)
    assert evidence.value == pytest.approx(np.log(0.5))
    assert evidence.se == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 0.5 / 2)
    bound, gap = elbo(log_weights), kl_to_posterior(log_weights)
    assert (bound.value, bound.se) == (-np.inf, np.inf)
    assert (gap.value, gap.se) == (np.inf, np.inf)
    assert importance_ess(log_weights) == 2


# Over data points


def test_mean_estimate_error_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    se = rng.uniform(0.1, 2.0, size=50)
    means = [mean_estimate(Estimate(se * rng.normal(size=50), se)) for _ in range(4_000)]
    spread = np.std([mean.value for mean in means])
    assert means[0].se == pytest.approx(spread, rel=0.05)
    scalar = mean_estimate(log_evidence(np.arange(5.0)))
    assert scalar.value == log_evidence(np.arange(5.0)).value
    assert scalar.se == pytest.approx(log_evidence(np.arange(5.0)).se)


def test_paired_difference_error_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(4_000):
        hardness = 10 * rng.normal(size=40)  # shared by both, far larger than their difference
        a, b = hardness + 0.3 + 0.1 * rng.normal(size=40), hardness + 0.1 * rng.normal(size=40)
        differences.append(paired_difference(a, b))
    values = np.array([difference.value for difference in differences])
    errors = np.array([difference.se for difference in differences])
    assert abs(values.mean() - 0.3) < 4 * values.std() / np.sqrt(4_000)
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(), rel=0.05)


def test_active_units() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1_000, 1))
    # ppca-like posterior means a_i x of variance a_i^2; the last is collapsed onto a constant.
    means = x * [1.0, 0.2, 0.05, 0.0] + [0.0, 0.0, 0.0, 3.0]
    sharp = np.stack([means, means])
    assert active_units(sharp).tolist() == [True, True, False, False]
    assert active_units(sharp, threshold=0.5).tolist() == [True, False, False, False]
    assert active_units(sharp, threshold=1e-4).tolist() == [True, True, True, False]
    for num in (2, 21, 100):  # the noise of the means is 1/num, far above the threshold
        draws = means + generator.normal(size=(num, 1_000, 4))
        assert active_units(draws, threshold=0.1 if num == 2 else 0.02).tolist() == [
            True,
            num > 2,
            False,
            False,
        ]


# Shapes, types and errors


def arrays(answer: Array | Estimate) -> list[Array]:
    return [answer.value, answer.se] if isinstance(answer, Estimate) else [answer]


def test_shapes_and_types() -> None:
    log_weights = draw_log_weights(1.0, 0.8, shape=(30, 4))
    copy = log_weights.copy()
    for function in WEIGHT_FUNCTIONS:
        answers = zip(
            arrays(function(log_weights)), arrays(function(log_weights[:, 2])), strict=True
        )
        for array, scalar in answers:
            assert array.shape == (4,) and array.dtype == np.float64
            assert np.shape(scalar) == () and scalar == pytest.approx(array[2], rel=1e-12)
        assert all(array.shape == (0,) for array in arrays(function(log_weights[:, :0])))
    lw = psis(log_weights)
    assert lw.shape == (30, 4) and lw.dtype == np.float64
    np.testing.assert_allclose(psis(log_weights[:, 2]), lw[:, 2], rtol=1e-12)
    assert psis(log_weights[:, :0]).shape == (30, 0)
    draws = log_weights.reshape(2, 15, 4)
    value = rhat(draws)
    assert value.shape == (4,) and value.dtype == np.float64
    assert np.shape(rhat(draws[:, :, 2])) == () and rhat(draws[:, :, 2]) == value[2]
    assert rhat(draws[:, :, :0]).shape == (0,)
    np.testing.assert_array_equal(log_weights, copy)


def test_tensors_are_taken_in_float64() -> None:
    log_weights = draw_log_weights(1.0, 0.8, shape=(1_000, 4)).astype(np.float32)
    tensor = torch.from_numpy(log_weights)
    for function in (pareto_khat, importance_ess, psis):
        got = function(tensor)
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, function(log_weights.astype(np.float64)))
    with pytest.raises(TypeError, match=r"log_weights: .*requires grad"):
        elbo(tensor.clone().requires_grad_())


@pytest.mark.parametrize("function", [*WEIGHT_FUNCTIONS, psis])
def test_bad_log_weights(function) -> None:  # type: ignore[no-untyped-def]
    good = np.zeros((30, 4))
    for value, message in ((np.nan, "2 NaN and 0 .inf among 120"), (np.inf, "0 NaN and 2 .inf")):
        bad = good.copy()
        bad[[3, 4], 1] = value
        with pytest.raises(ValueError, match=f"log_weights: .*{message}"):
            function(bad)
    bad = good.copy()
    bad[:, 2] = -np.inf
    with pytest.raises(ValueError, match=r"got 1 data point\(s\) with -inf"):
        function(bad)
    with pytest.raises(ValueError, match="got 3 axes"):
        function(np.zeros((30, 4, 2)))
    with pytest.raises(ValueError, match="got 0 axes"):
        function(np.float64(0))
    with pytest.raises(ValueError, match=r"at least .* draws .*\(0, 4\)"):
        function(good[:0])
    for wrong in (good > 0, good.astype(complex), good.astype(str), [[1.0], [1.0, 2.0]], None):
        with pytest.raises(TypeError, match="log_weights: expected an array of real numbers"):
            function(wrong)


def test_too_few_draws() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"at least 21 draws .*got shape \(20, 3\)"):
        pareto_khat(rng.normal(size=(20, 3)))
    with pytest.raises(ValueError, match=r"at least 21 draws .*got shape \(20, 3\)"):
        psis(rng.normal(size=(20, 3)))
    assert pareto_khat(rng.normal(size=(21, 3))).shape == (3,)
    for function in (log_evidence, elbo, kl_to_posterior):
        with pytest.raises(ValueError, match="at least 2 draws"):
            function(np.zeros((1, 3)))
    assert importance_ess(np.zeros((1, 3))).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("draws", "error", "message"),
    [
        (np.zeros(10), ValueError, r"expected shape \(C, S, ...\) .*got \(10,\)"),
        (np.zeros((1, 10)), ValueError, r"at least 2 chains and 4 draws, got \(1, 10\)"),
        (np.zeros((2, 3)), ValueError, r"at least 2 chains and 4 draws, got \(2, 3\)"),
        (np.full((2, 4), np.nan), ValueError, "draws: expected finite numbers, got 8 of 8"),
        (np.full((2, 4, 3), "x"), TypeError, "draws: expected an array of real numbers"),
    ],
)
def test_bad_chains(draws: Array, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rhat(draws)


def test_bad_arrays_over_data_points() -> None:
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        mean_estimate(Estimate(np.zeros(2), np.zeros(3)))
    with pytest.raises(ValueError, match="at least one"):
        mean_estimate(Estimate(np.zeros(0), np.zeros(0)))
    for draws in (np.zeros(3), np.zeros((2, 3)), np.zeros((1, 2, 2)), np.zeros((2, 1, 2))):
        with pytest.raises(ValueError, match=r"draws: expected shape \(S, N, d\)"):
            active_units(draws)
    with pytest.raises(ValueError, match="draws: expected finite numbers, got 1 of 4"):
        active_units([[[1.0], [np.nan]], [[0.0], [0.0]]])
    for a, b in ((np.zeros(3), np.zeros(2)), (np.zeros((3, 1)), np.zeros((3, 1))), ([1.0], [1.0])):
        with pytest.raises(ValueError, match="a, b: expected the same shape"):
            paired_difference(a, b)
    with pytest.raises(ValueError, match="b: expected finite numbers, got 1 of 2"):
        paired_difference([0.0, 0.0], [0.0, -np.inf])
    with pytest.raises(TypeError, match="a: expected an array of real numbers"):
        paired_difference(["x", "y"], [0.0, 0.0])
