"""Files of fits: written whole or not at all, read without running code from them."""

from __future__ import annotations

__all__ = ["load", "replacing", "save", "write"]

import io
import os
import pickle
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FORMAT, _VERSION = "pyro_vi fit", 5


def save(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes `content` to one file, atomically: a reader sees the old file or the new one.

    Args:
        path: the file; it is replaced if it exists.
        content: tensors, numbers, strings, and dicts, lists and tuples of them.

    Raises:
        FileNotFoundError: its folder does not exist.
        TypeError: it holds something else, which `load` would refuse; nothing is written.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "version": _VERSION, "content": dict(content)}, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(
            "a saved fit holds tensors, numbers, strings, and dicts, lists and tuples of them, but"
            f" this one has {_stranger(error)}"
        ) from error
    write(path, buffer.getbuffer())


def write(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Writes bytes to a file, atomically.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder.
    """
    with replacing(path) as fresh, fresh.open("wb") as file:
        file.write(content)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh file beside `path` that takes its place when all is written, and vanishes otherwise.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder.
        ValueError: it is a device or the like.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file that could be replaced, but a device or the like")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save` wrote, to the CPU, with `weights_only`: nothing in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged, no fit, or of another version.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a saved fit in it")
    if not path.is_file():
        raise FileNotFoundError(f"there is no saved fit at {path}")
    _check_intact(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no saved fit: it holds {_stranger(error)} beside tensors and plain values"
            " (nothing in it was run)"
        ) from error
    except Exception as error:  # damaged files raise many types of errors
        raise ValueError(f"{path} is damaged or no saved fit") from error
    if not isinstance(held, dict) or held.get("format") != _FORMAT:
        raise ValueError(f"{path} is no saved fit of pyro_vi")
    version, content = held.get("version"), held.get("content")
    if not isinstance(version, int) or version != _VERSION:
        raise ValueError(
            f"{path} is a saved fit of version {version}; this release reads version {_VERSION}"
        )
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} is damaged: expected a dict as its content, got {type(content).__name__}"
        )
    return content


def _check_intact(path: Path) -> None:
    """Holds every byte against the archive's checksums, which torch does not look at."""
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:
            raise ValueError(f"{path} is truncated or no saved fit") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged!r} in it does not match its checksum")


def _stranger(error: Exception) -> str:
    """The kind of object that torch refused, without torch's advice to load it all the same."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found[1] if found else "an unknown kind of object"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
