"""Batches: every kind of data, every row once an epoch, and one seed, one order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import Tensor

from pyro_vi import compare, fit
from pyro_vi.programs import Batches, as_arguments, to_device

torch.set_num_threads(1)


def take(batches: Batches, count: int, seed: int = 0) -> list[Tensor]:
    """The first argument of some batches."""
    stream = batches.shuffled(seed)
    return [next(stream)[0][0] for _ in range(count)]


def test_a_tensor_is_one_argument() -> None:
    args, kwargs = next(Batches(torch.arange(4.0), batch_size=4).shuffled())
    assert kwargs == {} and len(args) == 1
    assert sorted(args[0].tolist()) == [0, 1, 2, 3]


def test_a_tuple_is_arguments_with_their_rows_together() -> None:
    x = torch.arange(6)
    (a, b), kwargs = next(Batches((x, 10 * x.double()), batch_size=3).shuffled())
    assert kwargs == {}
    assert torch.equal(b, 10 * a.double())
    assert (a.dtype, b.dtype) == (torch.int64, torch.float64)


def test_a_dict_is_keyword_arguments_with_their_rows_together() -> None:
    x = torch.arange(6)
    data = {"x": x, "y": x.reshape(6, 1, 1) + 1}
    args, kwargs = next(Batches(data, batch_size=3).shuffled())
    assert args == () and list(kwargs) == ["x", "y"]
    assert torch.equal(kwargs["y"][:, 0, 0], kwargs["x"] + 1)


def test_without_a_batch_size_the_data_pass_as_they_are() -> None:
    x, scalar = torch.arange(3), torch.tensor(2.0)
    stream = Batches((x, scalar, None, "name", [1, 2])).shuffled(3)
    for args, kwargs in (next(stream), next(stream)):
        assert args[0] is x and args[1] is scalar
        assert args[2:] == (None, "name", [1, 2]) and kwargs == {}
    batches = Batches({"x": x, "n": 3})
    args, kwargs = next(batches.shuffled())
    assert kwargs["x"] is x and kwargs["n"] == 3 and args == ()
    assert batches.total is None
    head = batches.head(1)
    assert isinstance(head, dict) and torch.equal(head["x"], x) and head["n"] == 3
    assert list(batches.tensors()) == ["x"]


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (10, 4), (7, 7), (5, 3), (4, 1)])
def test_an_epoch_holds_every_row_at_most_once(rows: int, size: int) -> None:
    """Whole batches alone: what is left over at the end of an epoch is left out."""
    whole = rows // size
    for epoch in range(3):
        batches = take(Batches(torch.arange(rows), batch_size=size), (epoch + 1) * whole)
        seen = torch.cat(batches[epoch * whole :]).tolist()
        assert len(seen) == len(set(seen)) == whole * size
        assert all(len(batch) == size for batch in batches)


def test_the_rows_left_out_change_from_epoch_to_epoch() -> None:
    """Each of 5 rows is left out of an epoch of one batch of 4 with probability 1/5."""
    epochs = 2_000
    batches = take(Batches(torch.arange(5), batch_size=4), epochs)
    counts = torch.bincount(torch.cat(batches), minlength=5).double()
    error = 5 * (epochs * 0.8 * 0.2) ** 0.5
    assert (counts - 0.8 * epochs).abs().max() < error


def test_epochs_are_shuffled_anew() -> None:
    first, second = take(Batches(torch.arange(100), batch_size=100), 2)
    assert not torch.equal(first, torch.arange(100))
    assert not torch.equal(first, second)


def test_one_seed_gives_one_order_whatever_the_programs_draw() -> None:
    batches = Batches(torch.arange(50), batch_size=20)
    first = take(batches, 6, seed=3)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    stream = batches.shuffled(3)
    for expected in first:
        assert torch.equal(next(stream)[0][0], expected)
    assert torch.equal(torch.get_rng_state(), state)
    again = batches.shuffled(3)
    for expected in first:
        torch.randn(5)
        assert torch.equal(next(again)[0][0], expected)
    assert not torch.equal(take(batches, 1, seed=4)[0], first[0])


def test_rows_are_those_of_the_index() -> None:
    x = torch.arange(5.0)
    (a, b), _ = Batches((x, -x), batch_size=1).rows(torch.tensor([3, 3, 0]))
    assert a.tolist() == [3, 3, 0] and b.tolist() == [-3, -3, 0]


@pytest.mark.parametrize("size", [None, 2])
def test_a_transform_gets_and_gives_what_the_data_are(size: int | None) -> None:
    x = torch.arange(4.0)
    seen: list[Any] = []

    def spy(change: Any) -> Any:
        def transform(data: Any) -> Any:
            seen.append(data)
            return change(data)

        return transform

    args, _ = next(Batches(x, batch_size=size, transform=spy(lambda t: t + 100)).shuffled())
    assert isinstance(seen[-1], Tensor) and torch.equal(args[0], seen[-1] + 100)

    swap = Batches((x, -x), batch_size=size, transform=spy(lambda pair: (pair[1], pair[0])))
    args, _ = next(swap.shuffled())
    assert isinstance(seen[-1], tuple) and (args[0] <= 0).all() and (args[1] >= 0).all()

    named = Batches({"x": x}, batch_size=size, transform=spy(lambda d: {"y": 2 * d["x"]}))
    args, kwargs = next(named.shuffled())
    assert isinstance(seen[-1], dict) and args == ()
    assert list(kwargs) == ["y"] and torch.equal(kwargs["y"], 2 * seen[-1]["x"])


def test_a_transform_works_on_the_batch_and_leaves_the_data() -> None:
    x = torch.arange(6.0)
    batches = Batches(x, batch_size=2, transform=lambda batch: batch.mul_(0))
    assert sum(float(batch.sum()) for batch in take(batches, 3)) == 0
    assert torch.equal(x, torch.arange(6.0))
    assert torch.equal(batches.tensors()[0], x)


def test_the_head_is_what_the_programs_see() -> None:
    """The first rows, transformed, without a draw from the generator that the caller sees."""
    x = torch.full((5, 1, 4, 4), 0.5)
    batches = Batches(x, batch_size=2, transform=lambda batch: torch.bernoulli(batch).flatten(1))
    state = torch.get_rng_state()
    head = batches.head(2)
    assert isinstance(head, Tensor)
    assert head.shape == (2, 16) and set(head.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(torch.get_rng_state(), state)
    assert (x == 0.5).all()


@pytest.mark.parametrize("size", [None, 2])
def test_the_head_is_a_copy(size: int | None) -> None:
    x = torch.arange(1_000.0)
    for data in (x, x[:100]):
        head = Batches((data, data + 1, "name"), batch_size=None).head(3)
        assert isinstance(head, tuple) and head[2] == "name"
        assert torch.equal(head[0], data) and head[0].untyped_storage().nbytes() == 4 * len(data)
        head = Batches({"x": data}, batch_size=size, transform=lambda d: {"x": d["x"].mul_(0)})
        head = head.head(3)
        assert isinstance(head, dict) and head["x"].abs().sum() == 0
        assert len(head["x"]) == (len(data) if size is None else 3)
        head = Batches((data, data + 1), batch_size=2).head(3)
        assert isinstance(head, tuple)
        assert torch.equal(head[0], data[:3]) and torch.equal(head[1], data[:3] + 1)
        assert head[0].untyped_storage().nbytes() == 12
    assert torch.equal(x, torch.arange(1_000.0))


def test_nan_is_refused_and_counted() -> None:
    x = torch.ones(2, 3)
    x[0, 1] = x[1, 1] = torch.nan
    with pytest.raises(
        ValueError, match=r"without NaN, got 2 NaN among the 6 values of argument 0"
    ):
        Batches(x)
    with pytest.raises(ValueError, match="argument 'y'"):
        Batches({"x": torch.ones(2), "y": x}, batch_size=1)
    with pytest.raises(ValueError, match="argument 1"):
        Batches((torch.ones(2), x), batch_size=1)
    with pytest.raises(ValueError, match="1 infinite values among the 2 of argument 'y'"):
        Batches({"y": torch.tensor([torch.inf, 1.0])})


@pytest.mark.parametrize("wrong", [[torch.ones(3)], 3.0, None, "digits"], ids=repr)
def test_other_kinds_are_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"):
        Batches(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "name"), [(torch.tensor(1.0), "a scalar"), (2.5, r"2\.5"), (None, "None")], ids=repr
)
def test_minibatches_of_what_has_no_rows_are_refused(part: object, name: str) -> None:
    with pytest.raises(TypeError, match=rf"argument 1 is {name}; bind it to the program"):
        Batches((torch.ones(4), part), batch_size=2)
    with pytest.raises(TypeError, match=f"argument 'b' is {name}"):
        Batches({"a": torch.ones(4), "b": part}, batch_size=2)


def test_parts_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one length, got \{'x': 4, 'y': 3\}"):
        Batches({"x": torch.ones(4), "y": torch.ones(3)}, batch_size=2)


@pytest.mark.parametrize("size", [0, -1, 5])
def test_impossible_batch_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to the number of data points, 4, got {size}"):
        Batches(torch.ones(4), batch_size=size)


@pytest.mark.parametrize("nothing", [(), {}], ids=repr)
def test_minibatches_of_nothing_are_refused(nothing: Any) -> None:
    with pytest.raises(ValueError, match="no arguments"):
        Batches(nothing, batch_size=1)


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one data point"):
        Batches(torch.ones(0, 3), batch_size=1)


def test_batches_go_to_the_device_and_the_data_stay(device: torch.device) -> None:
    x = torch.arange(6.0)
    for size in (None, 2):
        args, _ = next(Batches((x, "name"), device=device).shuffled())
        assert args[0].device.type == device.type and args[1] == "name"
        batches = Batches({"x": x}, batch_size=size, device=device)
        _, kwargs = next(batches.shuffled())
        assert kwargs["x"].device.type == device.type
        head = batches.head(1)
        assert isinstance(head, dict) and head["x"].device.type == device.type
    assert x.device.type == "cpu"


def test_batches_stay_where_the_data_are(device: torch.device) -> None:
    x = torch.arange(6.0, device=device)
    cpu, there = take(Batches(x.cpu(), batch_size=6), 1)[0], take(Batches(x, batch_size=6), 1)[0]
    assert there.device == x.device
    assert torch.equal(there.cpu(), cpu)  # the order does not depend on the device


def test_moved_keeps_the_kind(device: torch.device) -> None:
    x = torch.ones(2)
    assert to_device(x, None) is x
    assert to_device(x, device).device.type == device.type
    pair = to_device((x, 3), device)
    assert isinstance(pair, tuple) and pair[0].device.type == device.type and pair[1] == 3
    named = to_device({"x": x, "n": None}, device)
    assert named["x"].device.type == device.type and named["n"] is None


def test_arguments_of_each_kind() -> None:
    x = torch.ones(2)
    assert as_arguments(x) == ((x,), {})
    assert as_arguments((x, 1)) == ((x, 1), {})
    assert as_arguments({"x": x}) == ((), {"x": x})


def test_arrays_and_frames_become_tensors() -> None:
    """Floats of torch's default dtype, whatever they were; integers of int64; booleans stay."""
    x, y = np.arange(6.0).reshape(3, 2), np.array([0, 1, 1], dtype="uint8")
    frame = pd.DataFrame({"a": [0.0, 2.0, 4.0], "b": [1.0, 3.0, 5.0]})
    for data in (x, x.astype("float16"), x[::-1][::-1], np.asfortranarray(x), frame):
        (given,), _ = Batches(data).whole()
        assert given.dtype == torch.float32 and given.is_contiguous()
        assert torch.equal(given, torch.arange(6.0).reshape(3, 2))
    for labels in (y, y.astype(">i4"), pd.Series(y), pd.Series(y, dtype="Int64"), y.astype(int)):
        (first, given), _ = Batches((x, labels), batch_size=3).first()
        assert given.dtype == torch.int64 and given.tolist() == [0, 1, 1] and len(first) == 3
    _, kwargs = Batches({"mask": y == 1, "other": pd.Series([True, False])}).whole()
    assert all(part.dtype == torch.bool for part in kwargs.values())
    _, kwargs = Batches({"mixed": pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5]})}).whole()
    assert kwargs["mixed"].tolist() == [[1.0, 0.5], [2.0, 1.5]]
    x[0] = 7.0  # a copy was taken
    assert float(Batches(frame).whole()[0][0][0, 0]) == 0.0


def test_arrays_of_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match=r"argument 1, but columns \['b'\] are not numeric"):
        Batches((torch.ones(2), pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})))
    with pytest.raises(TypeError, match=r"argument 'y', but columns \['c'\] are not numeric"):
        Batches({"y": pd.Series(["x", "y"], dtype="category", name="c")})
    with pytest.raises(TypeError, match="array of numbers as the data, got one of dtype <U1"):
        Batches(np.array(["x"]))
    with pytest.raises(ValueError, match="1 NaN among the 2 values of argument 0"):
        Batches(pd.Series([1, None], dtype="Int64"))


@pytest.mark.parametrize("kind", ["int32", "bool", "float64", "torch"])
def test_labels_become_what_the_likelihood_wants(kind: str) -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    x = torch.randn(20, 2)
    labels = (x[:, 0] > 0).long()
    y = labels if kind == "torch" else labels.numpy().astype(kind)
    options: Any = {"steps": 5, "progress": False}
    fitted = fit(model, AutoNormal(model), (x.numpy(), y), **options)
    expected = fit(model, AutoNormal(model), (x, labels.float()), **options)
    assert torch.equal(fitted.losses, expected.losses)
    posterior = fitted.posterior((x.numpy(), y), 7)
    assert torch.equal(posterior.log_p, expected.posterior((x, labels.float()), 7).log_p)
    observed, constants = posterior.data()
    assert list(observed) == ["y"] and list(constants) == ["x"]
    guides = {"a": AutoNormal(model), "b": AutoDiagonalNormal(model)}
    result = compare(model, guides, {"x": x.numpy(), "y": y}, num_samples=30, **options)
    assert not result.failures


def test_class_labels_stay_integers() -> None:
    def model(y: torch.Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)

    y = np.array([0, 1, 2, 2], dtype="int16")
    fitted = fit(model, AutoNormal(model), y, steps=3, progress=False)
    assert fitted.posterior(y, 5).data()[0]["y"].dtype == torch.int64
