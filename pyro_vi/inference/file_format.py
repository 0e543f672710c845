"""What a saved fit holds: a table of its entries, and the check that a file has them.

A valid archive may still not be a fit. `read_fit` checks every entry against the table, so that
callers can rely on names and types.
"""

from __future__ import annotations

__all__ = [
    "COUNT",
    "ENTRIES",
    "POSITIVE",
    "TEXT",
    "Each",
    "Kind",
    "Maybe",
    "check_entries",
    "read_fit",
]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import Tensor

from pyro_vi import files


@dataclass(frozen=True)
class Kind:
    """What one value must be.

    Attributes:
        words: the same in words, as they follow "expected".
        fits: whether a value is valid.
    """

    words: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Each:
    """A dict of any names, every value of one kind."""

    value: Spec


@dataclass(frozen=True)
class Maybe:
    """An entry that may be missing."""

    value: Spec


Spec = Kind | Each | Maybe | Mapping[str, Any]  # names to specs


def check_entries(
    value: object, spec: Spec, path: str | PathLike[str], places: tuple[str, ...] = ()
) -> None:
    """Raises ValueError that names the file and its first invalid entry.

    A mapping of names to kinds asks for those entries; others are ignored.

    Args:
        value: what the file has there.
        spec: what it must be.
        path: the file.
        places: the names that lead to the value.

    Example:
        >>> check_entries({"sizes": {"data": "ten"}}, {"sizes": Each(COUNT)}, "fit.pt")
        Traceback (most recent call last):
        ValueError: fit.pt is damaged: 'sizes', 'data': expected a whole number of at least 0, ...
    """
    if isinstance(spec, Maybe):
        return check_entries(value, spec.value, path, places)
    if isinstance(spec, Kind):
        if not spec.fits(value):
            raise _damage(path, places, spec.words, _described(value))
        return
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise _damage(path, places, _words(spec), _described(value))
    entries = dict.fromkeys(value, spec.value) if isinstance(spec, Each) else spec
    for name, inner in entries.items():
        if name in value:
            check_entries(value[name], inner, path, (*places, name))
        elif not isinstance(inner, Maybe):
            raise _damage(path, (*places, name), _words(inner), "no such entry")


def read_fit(path: str | PathLike[str]) -> dict[str, Any]:
    """The content of a saved fit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, no fit, or of another version.
    """
    content = files.load(path)
    check_entries(content, ENTRIES, path)
    steps = len(content["losses"])
    for name in ("reconstruction", "kl", "weights"):
        if len(content[name]) != steps:
            raise _damage(path, (name,), f"{steps} steps, as in 'losses'", f"{len(content[name])}")
    return content


def _damage(
    path: str | PathLike[str], places: tuple[str, ...], expected: str, got: str
) -> ValueError:
    where = ", ".join(map(repr, places)) or "its content"
    return ValueError(f"{path} is damaged: {where}: expected {expected}, got {got}")


def _words(spec: Spec) -> str:
    return spec.words if isinstance(spec, Kind) else "a dict by name"


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    text = repr(value)
    plain = isinstance(value, (str, bool, int, float, type(None))) and len(text) <= 40
    return text if plain else f"a {type(value).__name__}"


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_data(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(name, str) for name in value)
    return isinstance(value, (Tensor, tuple))


def _curve(of: str, *sizes: int) -> Kind:
    """Floats of shape (any number, *sizes)."""
    return Kind(
        f"a tensor of floats of shape ({', '.join(map(str, (of, *sizes)))})",
        lambda value: (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dim() == 1 + len(sizes)
            and value.shape[1:] == sizes
        ),
    )


COUNT = Kind("a whole number of at least 0", _is_count)
POSITIVE = Kind("a whole number of at least 1", lambda value: _is_count(value, 1))
TEXT = Kind("a string", lambda value: isinstance(value, str))
_FLAG = Kind("True or False", lambda value: isinstance(value, bool))
_NUMBER = Kind(
    "a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
)
_TENSOR = Kind("a tensor", lambda value: isinstance(value, Tensor))

ENTRIES: dict[str, Spec] = {
    "tensors": Each(_TENSOR),
    "recipe": Kind("a dict", lambda value: isinstance(value, dict)),
    "densities": {"draws": Each(_TENSOR), "log_probs": Each(Each(_NUMBER))},
    "noises": Maybe(
        Each(
            {
                "noise": TEXT,
                "gamma": Kind(
                    "a tensor or None", lambda value: value is None or isinstance(value, Tensor)
                ),
            }
        )
    ),
    "interrupted": Maybe(_FLAG),
    "compiled": Maybe(TEXT),
    "losses": _curve("steps"),
    "reconstruction": _curve("steps"),
    "kl": _curve("steps"),
    "weights": _curve("steps", 2),
    "heldout": _curve("evaluations", 2),
    "seconds": _NUMBER,
    "parameters": COUNT,
    "plate": TEXT,
    "plates": Each(COUNT),
    "amortized": _FLAG,
    "local": _FLAG,
    "rows": Kind(
        "a tuple of positions and names of arguments",
        lambda value: (
            isinstance(value, tuple)
            and all(isinstance(key, str) or _is_count(key) for key in value)
        ),
    ),
    "model_is_trained": _FLAG,
    "fingerprint": Kind("a whole number or None", lambda value: value is None or _is_count(value)),
    "template": Kind("a tensor, a tuple of arguments or a dict of them by name", _is_data),
}
