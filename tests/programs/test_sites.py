"""Where Pyro has the axis of which plate, and the order that every value is given instead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from torch import Tensor

from pyro_vi.posterior import Scorer, scoring
from pyro_vi.programs import Layout, is_delta, is_deterministic, is_discrete

torch.set_num_threads(1)


def site_of(sample: Callable[[], Any], **plates: tuple[int, int]) -> Any:
    """The site "z" of a sample statement inside plates, given as name=(size, dim)."""

    def model() -> None:
        with ExitStack() as stack:
            for name, (size, dim) in plates.items():
                stack.enter_context(pyro.plate(name, size, dim=dim))
            sample()

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    return trace.nodes["z"]


def normal(*shape: int, event: int = 0) -> Callable[[], Any]:
    return lambda: pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0).to_event(event))


def known(value: Tensor, event_dim: int | None = None) -> Callable[[], Any]:
    return lambda: pyro.deterministic("z", value, event_dim=event_dim)


@pytest.mark.parametrize(
    ("sample", "plates", "names", "shape"),
    [
        (normal(), {}, (), ()),
        (normal(4, event=1), {}, (), (4,)),
        (normal(2, 4), {}, (), (2, 4)),
        (normal(), {"data": (3, -1)}, ("data",), (3,)),
        (normal(), {"data": (3, -2)}, ("data",), (3,)),
        (normal(4, event=1), {"data": (3, -1)}, ("data",), (3, 4)),
        (normal(), {"data": (3, -1), "rater": (2, -2)}, ("data", "rater"), (3, 2)),
        (normal(), {"data": (3, -2), "rater": (2, -1)}, ("data", "rater"), (3, 2)),
        (normal(4, event=1), {"data": (3, -1), "a": (2, -3)}, ("data", "a"), (3, 2, 4)),
        (normal(), {"b": (2, -3), "data": (3, -2), "a": (5, -1)}, ("data", "b", "a"), (3, 2, 5)),
        (normal(), {"a": (3, -1), "b": (2, -2)}, ("b", "a"), (2, 3)),
        (normal(2, 1), {"data": (3, -1)}, ("data",), (3, 2)),  # an axis that no plate declares
    ],
)
def test_plates_come_first_and_data_points_before_them(
    sample: Callable[[], Any],
    plates: dict[str, tuple[int, int]],
    names: tuple[str, ...],
    shape: tuple[int, ...],
) -> None:
    site = site_of(sample, **plates)
    layout = Layout.of(site)
    value = layout.ordered(site["value"])
    assert layout.plates == names and value.shape == shape
    assert torch.equal(layout.raw(value), site["value"].expand(layout.raw(value).shape))
    density = Layout.of(site, density=True)
    assert density.plates == names
    assert density.ordered(site["log_prob"]).shape == shape[: len(shape) - site["fn"].event_dim]
    # each element keeps its density
    expected = dist.Normal(0.0, 1.0).log_prob(value)
    if site["fn"].event_dim:
        expected = expected.sum(-1)
    torch.testing.assert_close(density.ordered(site["log_prob"]), expected)


ROWS = torch.arange(9.0).reshape(3, 3)


@pytest.mark.parametrize(
    ("sample", "plates", "names", "expected"),
    [
        (known(ROWS), {"data": (3, -1)}, ("data",), ROWS),  # not its transpose
        (known(ROWS, 1), {"data": (3, -1)}, ("data",), ROWS),
        (known(ROWS, 0), {"data": (3, -1)}, ("data",), ROWS.T),  # said so
        (known(ROWS[:, :2]), {"data": (3, -1)}, ("data",), ROWS[:, :2]),
        (known(ROWS[:2]), {"data": (3, -1)}, ("data",), ROWS[:2].T),  # an axis to the left
        (known(ROWS), {"data": (3, -1), "a": (3, -2)}, ("data", "a"), ROWS.T),
        (known(ROWS), {"data": (3, -2), "a": (3, -1)}, ("data", "a"), ROWS),
        (known(ROWS[:, :1]), {"data": (3, -2), "a": (2, -1)}, ("data", "a"), ROWS[:, [0, 0]]),
        (known(ROWS[0]), {"data": (3, -1), "a": (2, -2)}, ("data", "a"), ROWS[[0, 0]].T),
        (known(torch.tensor(2.0)), {"data": (3, -1)}, ("data",), torch.full((3,), 2.0)),
        (known(ROWS[0, :2]), {"data": (3, -1)}, (), ROWS[0, :2]),  # no axis of data points
        (known(ROWS[:1]), {}, (), ROWS[:1]),
        (known(torch.tensor(2.0)), {}, (), torch.tensor(2.0)),
    ],
)
def test_axes_of_deterministic_values(
    sample: Callable[[], Any],
    plates: dict[str, tuple[int, int]],
    names: tuple[str, ...],
    expected: Tensor,
) -> None:
    site = site_of(sample, **plates)
    layout = Layout.of(site)
    assert layout.plates == names
    assert torch.equal(layout.ordered(site["value"]), expected)
    assert is_deterministic(site)


def test_deterministic_values_of_data_points_stay_theirs_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks of as many data points as the value has elements are no transposes."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.deterministic("double", 2 * z)
            pyro.deterministic("one", x.new_ones(()))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    for total in (2, 3, 7):
        for points in (1, 2, 3, 4):
            monkeypatch.setattr(scoring, "_WIDTH", 2**10)
            monkeypatch.setattr(scoring, "_VALUES", 6 * points * 2**10)
            x = torch.randn(total, 3, dtype=torch.float64)
            posterior = Scorer(model, guide, x).posterior(6)
            assert torch.equal(posterior.deterministic["double"], 2 * posterior.draws["z"])
            assert posterior.deterministic["one"].shape == (6, total)


def test_point_masses_under_masks_and_event_dimensions() -> None:
    point = dist.Delta(torch.zeros(2, 3))
    for fn in (point, point.to_event(1), point.mask(False), point.to_event(2).mask(True)):
        assert is_delta(fn)
    for other in (dist.Normal(0.0, 1.0), dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(True)):
        assert not is_delta(other)


class Unsaid(dist.TorchDistribution):
    """A distribution that does not say its support."""


def test_what_is_discrete() -> None:
    for fn in (
        dist.Poisson(1.0),
        dist.Bernoulli(torch.full((2,), 0.5)).to_event(1),
        dist.Categorical(torch.ones(3)).mask(torch.tensor(True)),
    ):
        assert is_discrete(fn)
    for other in (dist.Normal(0.0, 1.0), dist.Unit(torch.zeros(())), Unsaid(validate_args=False)):
        assert not is_discrete(other)
