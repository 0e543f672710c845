"""Checks of arguments: sizes, counts, seeds, devices and shapes."""

from __future__ import annotations

__all__ = [
    "check_context",
    "check_count",
    "check_data",
    "check_family",
    "check_seed",
    "check_sizes",
    "checked_device",
]

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn


def check_sizes(**sizes: int) -> None:
    """Raises an error that names the first size that is not a whole number of one or more."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"expected {name} to be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"expected {name} to be at least 1, got {size}")


def check_family(family: object, *sizes: str) -> None:
    """Raises TypeError unless a family is a module with these sizes."""
    if not isinstance(family, nn.Module) or not all(hasattr(family, size) for size in sizes):
        raise TypeError(
            f"expected the family to be a module with a {' and a '.join(sizes)}, such as"
            f" MeanField(8, context_dim=128), got {family!r}"
        )


def check_data(dtype: torch.dtype | None = None, **data: tuple[Tensor, tuple[int, ...]]) -> None:
    """Raises an error unless all data, by name with the shape of a point, are (N, *shape).

    Args:
        dtype: What all of them must have; None for any floating point dtype.
        data: Tensors, each with the shape of one data point.

    Raises:
        TypeError: Data that are no tensor, or of another dtype.
        ValueError: Data of another shape, or of different numbers of data points.
    """
    for name, (value, shape) in data.items():
        if not isinstance(value, Tensor):
            wanted = ", ".join(data)
            raise TypeError(
                f"expected tensors as the program's arguments ({wanted}), but {name} is"
                f" {'missing' if value is None else type(value).__name__}"
            )
        if value.dim() == 0 or tuple(value.shape[1:]) != shape:
            raise ValueError(f"expected {name} of shape (N, *{shape}), got {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"expected {name} of a floating point dtype, got {value.dtype}")
        if dtype is not None and value.dtype != dtype:
            raise TypeError(
                f"expected {name} of the program's dtype, {dtype}, got {value.dtype}: convert the"
                " data (.float()) or the programs (.double())"
            )
    lengths = {name: len(value) for name, (value, _) in data.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected one number of data points, got {lengths}")


def check_context(context: Tensor, context_dim: int) -> None:
    """Raises ValueError unless the context's last dimension is `context_dim`."""
    if context.dim() == 0 or context.shape[-1] != context_dim:
        raise ValueError(
            f"expected a context of shape (..., {context_dim}), got {tuple(context.shape)}"
        )


def checked_device(device: str | torch.device | None) -> torch.device | None:
    """The device as torch's object; raises ValueError where torch has none of its kind."""
    if device is None:
        return None
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: expected cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r} was asked for, but torch sees no CUDA here"
            " (torch.cuda.is_available() is False)"
        )
    return found


def check_count(what: str, count: Any, *, least: int = 1) -> None:
    """Raises ValueError unless `count` is a whole number, at least `least`."""
    whole = isinstance(count, Integral) and not isinstance(count, bool)
    if not whole or count < least:
        raise ValueError(
            f"expected at least {'one' if least == 1 else least} {what}, got {count!r}"
            f"{'' if whole else ', which is not an integer'}"
        )


def check_seed(seed: object) -> None:
    """Raises TypeError or ValueError unless the seed is an integer from 0 to 2^63 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"expected an integer seed, got {seed!r}")
    if not 0 <= int(seed) < 2**63:
        raise ValueError(f"expected a seed from 0 to 2^63 - 1, got {seed}")
