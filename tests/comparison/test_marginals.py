"""Errors of marginals, against Gaussians whose every distance is known."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pyro_vi.comparison import MarginalErrors, marginal_errors, noise_floor, scalar_name

Array = npt.NDArray[np.float64]


def normal(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def fields(errors: MarginalErrors) -> list[Array]:
    return [errors.mean, errors.sd, errors.wasserstein]


# Closed forms


@pytest.mark.parametrize(("num_draws", "num_reference"), [(4_000, 4_000), (1_000, 9_000)])
def test_shifted_normal(num_draws: int, num_reference: int) -> None:
    shift, sd = np.array([-3.0, -1.0, 1.0, 5.0]), np.array([0.1, 1.0, 2.0, 100.0])
    reference = 7 + sd * normal((num_reference, 4), seed=1)
    errors = marginal_errors(7 + sd * (normal((num_draws, 4)) + shift), reference)
    se_sd = np.sqrt(1 / (2 * num_draws) + 1 / (2 * num_reference))
    # The mean of either sample, and the sd that they are divided by.
    se = np.sqrt(1 / num_draws + 1 / num_reference + shift**2 / (2 * num_reference))
    assert np.all(np.abs(errors.mean - shift) < 4 * se)
    assert np.all(np.abs(errors.sd) < 4 * se_sd)
    assert np.all(np.abs(errors.wasserstein - np.abs(shift)) < 4 * se)
    assert np.all(errors.wasserstein >= np.abs(errors.mean) - 1e-12)


@pytest.mark.parametrize("ratio", [0.2, 0.7, 1.5])
def test_normal_of_another_width(ratio: float) -> None:
    num = 20_000
    errors = marginal_errors(3 + ratio * normal((num, 3)), 3 + normal((num, 3), seed=1))
    se = np.sqrt((1 + ratio**2) / num)
    distance = abs(ratio - 1) * np.sqrt(2 / np.pi)  # |F_q^-1 - F_ref^-1| = |ratio - 1| |z|
    assert np.all(np.abs(errors.mean) < 4 * se)
    assert np.all(np.abs(errors.sd - (ratio - 1)) < 4 * ratio / np.sqrt(num))
    assert np.all(np.abs(errors.wasserstein - distance) < 4 * se)


def test_distance_sees_what_mean_and_sd_miss() -> None:
    num = 20_000
    signs = np.sign(normal((num,)))  # +-1 in place of N(0, 1): the same mean and sd
    errors = marginal_errors(signs, normal((num,), seed=1))
    z = (np.arange(2 * num) + 0.5) / num - 1  # the integral of |1 - |z|| over N(0, 1), by quantiles
    quantiles = torch.special.ndtri(torch.from_numpy((z + 1) / 2)).numpy()
    expected = np.mean(np.abs(1 - np.abs(quantiles)))
    assert abs(errors.mean) < 0.04 and abs(errors.sd) < 0.02
    assert abs(errors.wasserstein - expected) < 4 * np.sqrt(2 / num)


# Identities


@pytest.mark.parametrize(("num_draws", "num_reference"), [(6, 6), (2, 3), (10, 4), (12, 18)])
def test_distance_of_samples_is_that_of_their_quantile_functions(
    num_draws: int, num_reference: int
) -> None:
    draws, reference = normal((num_draws, 5)).round(1), normal((num_reference, 5), seed=1)
    common = np.lcm(num_draws, num_reference)  # every draw that often: the same distributions
    steps = np.sort(np.repeat(draws, common // num_draws, axis=0), axis=0) - np.sort(
        np.repeat(reference, common // num_reference, axis=0), axis=0
    )
    expected = np.abs(steps).mean(axis=0) / reference.std(axis=0, ddof=1)
    got = marginal_errors(draws, reference).wasserstein
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_errors_against_itself_are_zero() -> None:
    reference = normal((100, 3))
    shuffled = np.random.default_rng(1).permutation(reference)
    for error in fields(marginal_errors(shuffled, reference)):
        np.testing.assert_allclose(error, 0, atol=1e-14)


def test_units_do_not_matter_and_signs_do() -> None:
    draws, reference = 0.5 * normal((50, 3)) + 1, normal((70, 3), seed=1)
    unit = np.array([1e-6, 3.0, 1e6])
    errors, scaled = (
        marginal_errors(draws, reference),
        marginal_errors(unit * draws, unit * reference),
    )
    for a, b in zip(fields(errors), fields(scaled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    mirrored = marginal_errors(-draws, -reference)
    np.testing.assert_allclose(mirrored.mean, -errors.mean, rtol=1e-12)
    np.testing.assert_allclose(mirrored.wasserstein, errors.wasserstein, rtol=1e-12)
    assert np.all(errors.mean > 0.5) and np.all(errors.sd < -0.3)


def test_a_constant_guide_is_measured() -> None:
    errors = marginal_errors(np.zeros(2), np.array([-1.0, 0.0, 1.0]))
    np.testing.assert_allclose([float(x) for x in fields(errors)], [0, -1, 2 / 3], atol=1e-15)


# The noise floor


def test_noise_floor_of_a_slow_chain_shows_that_it_is_slow() -> None:
    """An autoregressive chain: neighbours correlate by 0.98, and halves of one piece do not."""
    noise = normal((1_000, 50))
    chain = np.zeros_like(noise)
    for i in range(1, len(chain)):
        chain[i] = 0.98 * chain[i - 1] + (1 - 0.98**2) ** 0.5 * noise[i]
    assert np.abs(noise_floor(chain).mean).mean() > 0.2


def test_noise_floor_is_the_first_half_against_the_second() -> None:
    reference = normal((101, 2, 3))
    floor, expected = noise_floor(reference), marginal_errors(reference[:50], reference[50:])
    for a, b in zip(fields(floor), fields(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_noise_floor_has_the_size_of_the_noise() -> None:
    num, num_scalars = 400, 1_500
    floor = noise_floor(5 + 3 * normal((num, num_scalars)))
    # Two halves of num / 2 draws each; a standard deviation of 1,500 values is good to 2%.
    assert floor.mean.std() == pytest.approx(np.sqrt(4 / num), rel=0.08)
    assert floor.sd.std() == pytest.approx(np.sqrt(2 / num), rel=0.08)
    assert abs(floor.mean.mean()) < 4 * np.sqrt(4 / num / num_scalars)
    # Draws from the posterior itself, as many as the reference has, stay below the floor.
    exact = marginal_errors(normal((num, 300)), normal((num, 300), seed=1))
    assert np.sqrt(0.5) * floor.wasserstein.mean() == pytest.approx(
        exact.wasserstein.mean(), rel=0.08
    )


# Shapes, types and errors


@pytest.mark.parametrize("trailing", [(), (4,), (2, 3), (0,)])
def test_shapes_and_types(trailing: tuple[int, ...]) -> None:
    draws, reference = normal((20, *trailing)), normal((30, *trailing), seed=1)
    copies = draws.copy(), reference.copy()
    for errors in (marginal_errors(draws, reference), noise_floor(reference)):
        for error in fields(errors):
            assert np.shape(error) == trailing and error.dtype == np.float64
    np.testing.assert_array_equal(draws, copies[0])
    np.testing.assert_array_equal(reference, copies[1])


def test_every_scalar_is_its_own() -> None:
    draws, reference = normal((20, 2, 3)), normal((30, 2, 3), seed=1)
    errors = marginal_errors(draws, reference)
    for index in np.ndindex(2, 3):
        alone = marginal_errors(draws[:, *index], reference[:, *index])
        for one, all_of_them in zip(fields(alone), fields(errors), strict=True):
            assert one == pytest.approx(all_of_them[index], rel=1e-12)


def test_tensors_are_taken_in_float64() -> None:
    draws, reference = normal((20, 2)).astype(np.float32), normal((30, 2), seed=1)
    got = marginal_errors(torch.from_numpy(draws), torch.from_numpy(reference))
    expected = marginal_errors(draws.astype(np.float64), reference)
    for a, b in zip(fields(got), fields(expected), strict=True):
        assert a.dtype == np.float64
        np.testing.assert_array_equal(a, b)


def test_names_of_scalars() -> None:
    names = [scalar_name("z", index) for index in ((), *np.ndindex(2), (0, 12))]
    assert names == ["z", "z[0]", "z[1]", "z[0, 12]"]


def with_constant(index: tuple[int, ...]) -> Array:
    values = normal((10, 2, 3))
    values[:, *index] = 0.1
    return values


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: marginal_errors(normal((5, 2)), normal((5, 3))),
            ValueError,
            r"draws, reference: expected the same shape .*got \(5, 2\) and \(5, 3\)",
        ),
        (
            lambda: marginal_errors(normal((5,)), normal((5, 1))),
            ValueError,
            r"same shape after the first axis, got \(5,\) and \(5, 1\)",
        ),
        (
            lambda: marginal_errors(normal((1, 2)), normal((5, 2))),
            ValueError,
            r"draws: expected at least 2 draws .*got shape \(1, 2\)",
        ),
        (
            lambda: marginal_errors(normal((5, 2)), normal((1, 2))),
            ValueError,
            r"reference: expected at least 2 draws .*got shape \(1, 2\)",
        ),
        (
            lambda: marginal_errors(1.0, normal((5,))),
            ValueError,
            r"draws: expected at least 2 draws on the first axis, got shape \(\)",
        ),
        (
            lambda: marginal_errors([1.0, np.nan], [0.0, 1.0]),
            ValueError,
            "draws: expected finite numbers, got 1 of 2",
        ),
        (
            lambda: marginal_errors([0.0, 1.0], [1.0, -np.inf]),
            ValueError,
            "reference: expected finite numbers, got 1 of 2",
        ),
        (
            lambda: marginal_errors(["a", "b"], [0.0, 1.0]),
            TypeError,
            "draws: expected an array of real numbers",
        ),
        (
            lambda: marginal_errors(normal((10, 2, 3)), with_constant((1, 2))),
            ValueError,
            r"reference: .*standard deviation of zero at index \(1, 2\) .*\(1 of 6 scalars\)",
        ),
        (
            lambda: marginal_errors([0.0, 1.0], [0.1, 0.1]),
            ValueError,
            r"reference: .*standard deviation of zero .*\(1 of 1 scalars\)",
        ),
        (
            lambda: noise_floor(normal((3, 2))),
            ValueError,
            r"reference: expected at least 4 draws .*got shape \(3, 2\)",
        ),
        (
            lambda: noise_floor([0.0, 1.0, 2.0, 2.0]),
            ValueError,
            "reference: .*standard deviation of zero",
        ),
        (lambda: noise_floor([0.0, np.inf] * 4), ValueError, "reference: expected finite numbers"),
        (lambda: noise_floor("draws"), TypeError, "reference: expected an array of real numbers"),
    ],
)
def test_bad_draws(
    call: Callable[[], MarginalErrors], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
