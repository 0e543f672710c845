"""C functions: compiled by the system's compiler, kept on disk, and called on tensors.

A compiled function is kept in `~/.cache/pyro_vi` (or below `XDG_CACHE_HOME`), under a hash of its
source, the compiler's version, the options and the processor. A folder that cannot be written is
replaced by a temporary one, with a warning.
"""

from __future__ import annotations

__all__ = ["CannotCompile", "Function"]

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vi.compiling.clean import merge_draws
from pyro_vi.compiling.emit import Unemittable
from pyro_vi.compiling.operations import emit
from pyro_vi.compiling.tape import UNSET, Op, Record, Ref, refs_in

_OPTIONS = (
    "-O2 -march=native -fno-math-errno -fno-trapping-math -fopenmp-simd -shared -fPIC"
).split()
_CALL = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_long)


class CannotCompile(Exception):
    """A function that the system's compiler does not compile; the message says why."""


class Function:
    """A record as a C function that repeats it.

    Before each repetition call `step`, after the values that differ in it were given with `give`;
    and `finish` after the last one.

    Args:
        record: a clean record.
        steps: the most repetitions of a call.
        per_step: storages that have other values in each repetition.
        largest: the most multiplications and additions of a repetition.

    Attributes:
        buffers: a tensor (steps, ...) for each storage in `per_step`, to be filled before a call.
        cost: about how many multiplications and additions a repetition takes.

    Raises:
        Unemittable: the record has memory of a kind that C code does not handle.
        CannotCompile: the compiler failed.
    """

    by = "the C compiler"

    def __init__(
        self,
        record: Record,
        *,
        steps: int = 1,
        per_step: Sequence[int] = (),
        largest: float = math.inf,
    ) -> None:
        self.record, self.steps = merge_draws(record), steps
        record = self.record
        self._draws, self._are_ahead = _draws(record)
        drawn = [op.outs[0].storage for op in self._draws] if self._are_ahead else []
        self._per_step = [*per_step, *drawn]
        self._source = emit(record, self._per_step).source()
        self.cost = self._source.cost
        if self.cost > largest:
            raise Unemittable(f"a step of about {self.cost:,} multiplications and additions")
        self._run = _compiled(self._source.text)
        self.buffers = {
            index: torch.zeros(
                steps, record.storages[index].size, dtype=record.storages[index].dtype
            )
            for index in self._per_step
        }
        self._batch: dict[int, Tensor] = {}  # what was given by address
        tensors = [self._flat(index) for index in self._source.outer]
        strides = [self._stride(index) for index in self._source.outer]
        size = max(1, len(tensors))
        self._addresses = (ctypes.c_void_p * size)(*[t.data_ptr() for t in tensors])
        self._strides = (ctypes.c_long * size)(*strides)
        self._tensors = tensors
        self._order = {storage: i for i, storage in enumerate(self._source.outer)}
        self._work = torch.zeros(self._source.work + 64, dtype=torch.uint8)
        start = -self._work.data_ptr() % 64
        self._scratch = self._work[start:]
        self._error: BaseException | None = None
        self._first = 0
        self._call = _CALL(self._torch_runs)
        self._fills = [
            [self._filler(op, step) for op in self._draws]
            for step in range(steps if self._are_ahead else 0)
        ]

    def view(self, index: int) -> Any:
        """The values of a storage in each repetition, as an array (steps, elements)."""
        return self.buffers[index].numpy()

    def give(self, index: int, step: int, value: Tensor) -> None:
        """Gives a repetition the values of a storage."""
        if self.steps == 1 and value.is_contiguous():
            self._addresses[self._order[index]] = value.data_ptr()
            self._batch[index] = value
        else:
            self.buffers[index][step].view(value.shape).copy_(value)

    def step(self, step: int) -> None:
        """Draws the random numbers of a repetition, or runs it where they depend on the run."""
        if self._are_ahead:
            for fill in self._fills[step]:
                fill()
        else:
            self._run_from(step, 1)

    def finish(self, count: int) -> None:
        """Runs the first repetitions, as far as `step` did not."""
        if self._are_ahead:
            self._run_from(0, count)

    def _run_from(self, first: int, count: int) -> None:
        addresses = self._addresses
        if first:
            moved = [a + first * s for a, s in zip(addresses, self._strides, strict=True)]
            addresses = (ctypes.c_void_p * len(moved))(*moved)
        self._first = first
        self._run(addresses, self._strides, self._scratch.data_ptr(), count, self._call)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def output(self, ref: Ref, step: int = 0) -> Tensor:
        """What lies in a place of the record."""
        return self._tensor(ref, step)

    def _flat(self, index: int) -> Tensor:
        if index in self._batch:
            return self._batch[index].view(-1)
        if index in self.buffers:
            return self.buffers[index]
        tensor = self.record.storages[index].tensor
        assert tensor is not None
        return tensor

    def _stride(self, index: int) -> int:
        buffer = self.buffers.get(index)
        return 0 if buffer is None else buffer.stride(0) * buffer.element_size()

    def _tensor(self, ref: Ref, step: int) -> Tensor:
        place = self._source.places.get(ref.storage)
        if place is not None:
            size = self.record.storages[ref.storage].size * _width(ref.dtype)
            flat = self._scratch[place : place + size].view(ref.dtype)
        elif ref.storage in self.buffers and ref.storage not in self._batch:
            flat = self.buffers[ref.storage][step]
        else:
            flat = self._flat(ref.storage)
        return flat.as_strided(ref.shape, ref.stride, flat.storage_offset() + ref.offset)

    def _torch_runs(self, index: int, step: int) -> int:
        """Runs an operation that has no form in C."""
        op, step = self._source.calls[index], self._first + step
        try:
            with torch.no_grad():
                args = self._filled(op.args, step)
                kwargs = {name: self._filled(value, step) for name, value in op.kwargs.items()}
                found = op.func(*args, **kwargs)
                results = found if isinstance(found, (tuple, list)) else [found]
                tensors = [one for one in results if isinstance(one, Tensor)]
                for ref, result in zip(op.outs, tensors, strict=True):
                    place = self._tensor(ref, step)
                    if result.data_ptr() != place.data_ptr():
                        place.copy_(result)
        except BaseException as error:
            self._error = error
            return 1
        return 0

    def _filled(self, value: Any, step: int) -> Any:
        if isinstance(value, Ref):
            return self._tensor(value, step)
        if isinstance(value, (list, tuple)):
            return [self._filled(one, step) for one in value]
        return value

    def _filler(self, op: Op, step: int) -> Callable[[], Any]:
        """What draws an operation's random numbers into their place."""
        out = self._tensor(op.outs[0], step)
        kwargs = {name: value for name, value in op.kwargs.items() if value is not None}
        if op.func._schema.is_mutable:
            args = [out, *self._filled(op.args[1:], step)]
            if op.func is torch.ops.aten.normal_.default and not (args[1:] or kwargs):
                return out.normal_
            return lambda: op.func(*args, **kwargs)
        args = self._filled(op.args, step)
        if op.func is torch.ops.aten.randperm.default:
            return lambda: torch.randperm(*args, out=out)
        return lambda: out.copy_(op.func(*args, **op.kwargs))


def _draws(record: Record) -> tuple[list[Op], bool]:
    """The random operations, and whether what they draw depends on nothing of the run.

    Then they can be drawn before it. Otherwise each is drawn in its turn.
    """
    found = [op for op in record.ops if op.is_random]
    written: set[int] = set()
    ahead = True
    for op in record.ops:
        if op.is_random:
            operands = op.args[1:] if op.func._schema.is_mutable else op.args
            reads = [*refs_in(operands), *refs_in(tuple(op.kwargs.values()))]
            is_whole = len(op.outs) == 1 and (
                op.outs[0].numel == record.storages[op.outs[0].storage].size
            )
            inner = [ref for ref in reads if record.storages[ref.storage].tensor is None]
            ahead = ahead and is_whole and not inner and op.outs[0].storage not in written
        if not op.is_view:
            written |= {ref.storage for ref in op.writes()} if op.func not in UNSET else set()
    return found, ahead


def _width(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


def _compiled(source: str) -> Any:
    """The function `run` of a source."""
    compiler = _compiler()
    name = hashlib.sha256("\0".join([source, *_OPTIONS, *compiler, _processor()]).encode())
    folder = _folder()
    path = folder / f"{name.hexdigest()[:32]}.so"
    if not path.exists():
        _build(compiler[0], source, path)
    try:
        library = ctypes.CDLL(str(path))
        run = library.run
    except (OSError, AttributeError):  # cut short, or of another machine
        _build(compiler[0], source, path)
        try:
            run = ctypes.CDLL(str(path)).run
        except (OSError, AttributeError) as error:
            raise CannotCompile(f"the compiled function cannot be loaded: {error}") from error
    run.restype = ctypes.c_long
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, _CALL]
    return run


def _build(compiler: str, source: str, path: Path) -> None:
    """Compiles a source into a file, which appears whole or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder) / "function.c", Path(folder) / "function.so"
        try:
            text.write_text(source)
            done = subprocess.run(
                [compiler, *_OPTIONS, "-o", str(library), str(text), "-lm"],
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
