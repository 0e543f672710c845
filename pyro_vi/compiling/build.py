"""Compiles C by the system's compiler, and keeps the result on disk.

A compiled function is kept in `~/.cache/pyro_vi` (or below `XDG_CACHE_HOME`), under a hash of its
source, the compiler's version, the options and the processor. A folder that cannot be written is
replaced by a temporary one, with a warning.
"""

from __future__ import annotations

__all__ = ["CALL", "CannotCompile", "build"]

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

OPTIONS = (
    "-O2 -march=native -fno-math-errno -fno-trapping-math -fopenmp-simd -shared -fPIC"
).split()
CALL = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_long)


class CannotCompile(Exception):
    """A function that the system's compiler does not compile; the message says why."""


def build(source: str) -> Any:
    """The function `run` of a source."""
    compiler = _compiler()
    name = hashlib.sha256("\0".join([source, *OPTIONS, *compiler, _processor()]).encode())
    folder = _folder()
    path = folder / f"{name.hexdigest()[:32]}.so"
    if not path.exists():
        _compile(compiler[0], source, path)
    try:
        library = ctypes.CDLL(str(path))
        run = library.run
    except (OSError, AttributeError):  # cut short, or of another machine
        _compile(compiler[0], source, path)
        try:
            run = ctypes.CDLL(str(path)).run
        except (OSError, AttributeError) as error:
            raise CannotCompile(f"the compiled function cannot be loaded: {error}") from error
    run.restype = ctypes.c_long
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, CALL]
    return run


def _compile(compiler: str, source: str, path: Path) -> None:
    """Compiles a source into a file, which appears whole or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder) / "function.c", Path(folder) / "function.so"
        try:
            text.write_text(source)
            done = subprocess.run(
                [compiler, *OPTIONS, "-o", str(library), str(text), "-lm"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        except OSError as error:
            raise CannotCompile(f"{compiler}: {error}") from error
        if done.returncode != 0:
            said = next(
                (one for one in done.stderr.splitlines() if "error" in one), done.stderr[:200]
            )
            raise CannotCompile(f"{compiler} failed: {said.strip()}")
        try:
            handle, name = tempfile.mkstemp(dir=path.parent)
            os.close(handle)
            shutil.copyfile(library, name)
            os.replace(name, path)
        except OSError as error:
            raise CannotCompile(f"a compiled function cannot be written: {error}") from error


@cache
def _compiler() -> tuple[str, str]:
    """The system's compiler and its version."""
    named = os.environ.get("CC", "cc").split()[0]
    found = shutil.which(named)
    if found is None:
        raise CannotCompile(f"there is no C compiler {named!r} on the path")
    try:
        done = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotCompile(f"{found} --version: {error}") from error
    return found, done.stdout


@cache
def _processor() -> str:
    """What distinguishes this processor: code for one may not run on another."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = {line for line in file if line.startswith(("flags", "Features", "model name"))}
    except OSError:
        lines = {platform.processor()}
    return platform.machine() + "".join(sorted(lines))


_temporary: list[Any] = []


@cache
def _folder() -> Path:
    """Where compiled functions are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(base) / "pyro_vi"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"0" * 4096)
        return path
    except OSError as error:
        warnings.warn(f"compiled functions are not kept: {error}", stacklevel=2)
        _temporary.append(tempfile.TemporaryDirectory())
        return Path(_temporary[-1].name)
