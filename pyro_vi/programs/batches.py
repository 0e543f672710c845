"""Data as the arguments of a program: whole, or in shuffled minibatches along the first axis.

A tensor becomes `model(tensor)`, a tuple `model(*tuple)`, a dict `model(**dict)`. NumPy arrays and
pandas' frames and Series become tensors: floats of torch's default dtype, integers of int64.
"""

from __future__ import annotations

__all__ = ["Arguments", "Batches", "Data", "Shuffled", "as_tensors", "parts_of", "select_rows"]

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_vi.process_state import seeded

Data = Tensor | npt.NDArray[Any] | tuple[Any, ...] | Mapping[str, Any]  # or pandas' frames, Series
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Key = int | str  # of an argument: its position, or its keyword


class Batches:
    """Batches of some data, as arguments of a program.

    Args:
        data: a tensor, a tuple of arguments or a dict of keyword arguments, each as `as_tensors`
            takes it.
        batch_size: rows of a batch, or None to pass the data as they are, unsplit.
        transform: what to do to each batch, for example dynamic binarization; gets and gives what
            the data are: a tensor, a tuple or a dict.
        device: where the batches go; by default they stay where the data are.
        rows: which parts have a row for each data point, by position or keyword; all by default.

    Raises:
        TypeError: data of another kind; with a batch size, parts that are not tensors.
        ValueError: NaN or infinite values in the data; with a batch size, parts of different
            lengths, or fewer rows than one batch.

    Example:
        >>> import torch
        >>> batches = Batches((torch.arange(4.0), torch.ones(4, 2)), batch_size=2)
        >>> (x, y), _ = next(batches.shuffled())
        >>> x.shape, y.shape
        (torch.Size([2]), torch.Size([2, 2]))
    """

    def __init__(
        self,
        data: Data,
        *,
        batch_size: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        device: torch.device | None = None,
        rows: Collection[Key] | None = None,
    ) -> None:
        data = as_tensors(data)
        if not isinstance(data, (Tensor, tuple, Mapping)):
            raise TypeError(
                "expected data as a tensor or an array, a tuple of arguments or a dict of keyword"
                f" arguments, got {type(data).__name__}"
            )
        self._kind = data
        self._rows = rows
        self.parts: dict[Key, Any] = {
            key: part.to(device) if isinstance(part, Tensor) and device is not None else part
            for key, part in _parts(data).items()
        }
        self.transform = transform
        for key, part in self.parts.items():
            if isinstance(part, Tensor) and part.dim() > 0 and len(part) == 0:
                raise ValueError(f"expected at least one data point, but {_label(key)} has none")
            if isinstance(part, Tensor) and part.is_floating_point() and bool(part.isnan().any()):
                raise ValueError(
                    f"expected data without NaN, got {int(part.isnan().sum())} NaN among the"
                    f" {part.numel()} values of {_label(key)}; for missing values, put any number"
                    " in their place, and poutine.mask around the site that observes them"
                )
            if isinstance(part, Tensor) and part.is_floating_point() and bool(part.isinf().any()):
                raise ValueError(
                    f"expected finite data, got {int(part.isinf().sum())} infinite values among the"
                    f" {part.numel()} of {_label(key)}; bind a bound that is infinite on"
                    " purpose to the program (functools.partial)"
                )
        self.batch_size = int(batch_size) if isinstance(batch_size, Integral) else batch_size
        self.total: int | None = None
        if batch_size is not None:
            if isinstance(batch_size, bool) or not isinstance(batch_size, Integral):
                raise TypeError(f"expected a whole number as batch size, got {batch_size!r}")
            self.total = self.count()
            if not 1 <= batch_size <= self.total:
                raise ValueError(
                    f"expected a batch size from 1 to the number of data points, {self.total},"
                    f" got {batch_size}"
                )

    @property
    def length(self) -> int | None:
        """Data points along the first axis of the parts, or None if they cannot be split so."""
        try:
            return self.count()
        except (TypeError, ValueError):
            return None

    @property
    def device(self) -> torch.device | None:
        """Where the data are, or None if no part is a tensor."""
        return next((part.device for part in self.tensors().values()), None)

    def fingerprint(self) -> int:
        """A checksum of the data, untransformed: other data have another one.

        Of tensors, numbers and strings, in dicts, lists and tuples too; not of other objects.
        """
        return _checksum(self.parts, 0)

    def whole(self) -> Arguments:
        """The arguments made of all data."""
        return self._arguments(self.parts)

    def first(self) -> Arguments:
        """The arguments made of the first batch, in the order of the data."""
        if self.batch_size is None:
            return self.whole()
        return self.rows(torch.arange(self.batch_size, device=self.device))

    def count(self) -> int:
        """Data points along the first axis of the parts that have rows.

        Raises:
            TypeError: one of them is no tensor with a first axis.
            ValueError: they have different lengths, or there are none.
        """
        lengths = {}
        for key, part in self.parts.items():
            if self._rows is not None and key not in self._rows:
                continue
            if not isinstance(part, Tensor) or part.dim() == 0:
                raise TypeError(
                    "to take data apart they must be tensors with data points along the first axis,"
                    f" but {_label(key)} is"
                    f" {'a scalar' if isinstance(part, Tensor) else repr(part)}; bind it to the"
                    " program (functools.partial), or fit all data at once (batch_size=None)"
                )
            lengths[key] = len(part)
        if not lengths:
            raise ValueError("expected data to take apart, but there are no arguments")
        if len(set(lengths.values())) != 1:
            raise ValueError(f"expected parts of one length, got {lengths}")
        return next(iter(lengths.values()))

    def shuffled(self, seed: int = 0) -> Shuffled:
        """Batches without end: each epoch in a new random order, its last partial batch left out.

        Every batch is a uniform draw of `batch_size` rows, and all have one shape. The order comes
        from a generator of its own: whatever the programs draw, one seed gives the same batches.
        """
        return Shuffled(self, seed)

    def rows(self, index: Tensor) -> Arguments:
        """The arguments made of some rows."""
        keys = self.parts if self._rows is None else self._rows
        return self._arguments(_selected(self.parts, keys, index))

    def head(self, size: int) -> Data:
        """A copy of the first rows, or of all data where they are not split: transformed, as data.

        A view would keep all data alive, and `torch.save` would write all of them.
        """
        rows = slice(size if self.total is not None else None)
        data = self._data(
            {
                key: part[rows].clone() if isinstance(part, Tensor) and part.dim() else part
                for key, part in self.parts.items()
            }
        )
        if self.transform is None:
            return data
        with seeded(0, self.device):  # what the transform draws is not seen outside
            return self.transform(data)

    def tensors(self) -> dict[Any, Tensor]:
        """The parts that are tensors, untransformed."""
        return {key: part for key, part in self.parts.items() if isinstance(part, Tensor)}

    def _arguments(self, parts: Mapping[Any, Any]) -> Arguments:
        data = self._data(parts)
        return as_arguments(self.transform(data) if self.transform else data)

    def _data(self, parts: Mapping[Any, Any]) -> Data:
        if isinstance(self._kind, Tensor):
            return parts[0]
        return tuple(parts.values()) if isinstance(self._kind, tuple) else dict(parts)


class Shuffled:
    """Batches in random order; see `Batches.shuffled`.

    Attributes:
        is_fixed: whether every batch is the same, and nothing transforms it.
    """

    def __init__(self, batches: Batches, seed: int) -> None:
        self._batches = batches
        self._generator = torch.Generator().manual_seed(int(seed))
        self._whole: Arguments | None = None
        self._order: Tensor | None = None
        self._start = 0
        self.is_fixed = batches.total is None and batches.transform is None

    def __iter__(self) -> Iterator[Arguments]:
        return self

    def __next__(self) -> Arguments:
        return self.make(self.next_rows())

    def next_rows(self) -> Tensor | None:
        """The rows of the next batch; None for all data as they are."""
        total, size = self._batches.total, self._batches.batch_size
        if total is None or size is None:
            return None
        if self._order is None or self._start + size > total:
            order = torch.randperm(total, generator=self._generator)
            self._order, self._start = order.to(self._batches.device), 0
        self._start += size
        return self._order[self._start - size : self._start]

    def state_dict(self) -> dict[str, Any]:
        """The order of the present epoch, the position in it, and the generator."""
        order = None if self._order is None else self._order.clone()
        return {"order": order, "start": self._start, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was called, on the same data."""
        self._order, self._start = state["order"], state["start"]
        self._generator.set_state(state["generator"])

    def make(self, rows: Tensor | None) -> Arguments:
        """The arguments made of some rows, transformed."""
        if self.is_fixed:
            self._whole = self._whole or self._batches.whole()
            return self._whole
        return self._batches.whole() if rows is None else self._batches.rows(rows)


def as_tensors(data: Any) -> Any:
    """Data with tensors in the place of NumPy arrays and of pandas' frames and Series.

    Floats get torch's default dtype and integers int64; booleans stay booleans. Missing values
    in a frame become NaN. Anything else is returned unchanged.

    Raises:
        TypeError: an array or a frame that holds something other than numbers.

    Example:
        >>> import numpy as np
        >>> x, y = as_tensors((np.ones((3, 2)), np.arange(3, dtype="int32")))
        >>> x.dtype, y.dtype
        (torch.float32, torch.int64)
    """
    if isinstance(data, Mapping):
        return {name: _as_tensor(part, _label(name)) for name, part in data.items()}
    if isinstance(data, tuple):
        return tuple(_as_tensor(part, _label(i)) for i, part in enumerate(data))
    return _as_tensor(data, "the data")


def _as_tensor(part: Any, label: str) -> Any:
    dtypes = getattr(part, "dtypes", None)
    if hasattr(part, "isna") and dtypes is not None:  # pandas; a Series has one dtype
        named = list(dtypes.items()) if hasattr(dtypes, "items") else [(part.name, dtypes)]
        kinds = {getattr(dtype, "kind", "O") for _, dtype in named}
        others = [name for name, dtype in named if getattr(dtype, "kind", "O") not in "fiub"]
        if others:
            raise TypeError(
                f"expected numbers in {label}, but columns {others} are not numeric: encode them,"
                " for example with pandas.factorize(column)[0]"
            )
        dtype = "int64" if kinds <= {"i", "u"} else "bool" if kinds == {"b"} else "float64"
        part = part.to_numpy(dtype="float64" if bool(part.isna().to_numpy().any()) else dtype)
    if not isinstance(part, np.ndarray):
        return part
    wide = {"f": "float64", "i": "int64", "u": "int64", "b": "bool"}.get(part.dtype.kind)
    if wide is None:
        raise TypeError(f"expected an array of numbers as {label}, got one of dtype {part.dtype}")
    if part.dtype.kind == "u" and part.size and int(part.max()) > torch.iinfo(torch.int64).max:
        raise ValueError(f"expected integers below 2^63 in {label}, got {part.max()}")
    tensor = torch.from_numpy(part.astype(wide, order="C"))
    return tensor.to(torch.get_default_dtype()) if wide == "float64" else tensor


def as_arguments(data: Data) -> Arguments:
    """Data as (args, kwargs)."""
    data = as_tensors(data)
    if isinstance(data, Mapping):
        return (), dict(data)
    return (tuple(data) if isinstance(data, tuple) else (data,)), {}


def _checksum(part: Any, found: int) -> int:
    if isinstance(part, Tensor):
        held = part.detach().cpu().contiguous()
        held = held.float() if held.dtype == torch.bfloat16 else held
        found = zlib.crc32(repr(tuple(held.shape)).encode(), found)
        return zlib.crc32(held.numpy().tobytes(), found)
    if isinstance(part, Mapping):
        part = list(part.items())
    if isinstance(part, (list, tuple)):
        for one in part:
            found = _checksum(one, found)
        return found
    plain = isinstance(part, (str, bytes, bool, int, float, complex, type(None)))
    return zlib.crc32(repr(part).encode(), found) if plain else found


def parts_of(arguments: Arguments) -> dict[Key, Any]:
    """Arguments by position and keyword."""
    args, kwargs = arguments
    parts: dict[Key, Any] = dict(enumerate(args))
    parts.update(kwargs)
    return parts


def select_rows(arguments: Arguments, rows: Collection[Key], index: Tensor) -> Arguments:
    """Arguments with some rows of the parts that have rows, and the others as they are."""
    args, kwargs = arguments
    parts = _selected(parts_of(arguments), rows, index)
    return tuple(parts[i] for i in range(len(args))), {name: parts[name] for name in kwargs}


def _selected(parts: Mapping[Key, Any], rows: Collection[Key], index: Tensor) -> dict[Key, Any]:
    return {
        key: part[index.to(part.device)] if key in rows else part for key, part in parts.items()
    }


def to_device(data: Any, device: str | torch.device | None) -> Any:
    """Data with its tensors on `device`; None leaves them where they are."""
    if device is None:
        return data
    if isinstance(data, Tensor):
        return data.to(device)
    if isinstance(data, Mapping):
        return {name: to_device(part, device) for name, part in data.items()}
    return tuple(to_device(part, device) for part in data) if isinstance(data, tuple) else data


def _parts(data: Data) -> dict[Any, Any]:
    if isinstance(data, Mapping):
        return dict(data)
    return dict(enumerate(data if isinstance(data, tuple) else (data,)))


def _label(key: Any) -> str:
    return f"argument {key!r}" if isinstance(key, str) else f"argument {key}"
