"""Finds what a step leaves behind in Python for the next one.

A compiled step repeats the operations on tensors, and none of the Python around them: a counter, an
appended list, a hidden state that is bound anew would stay as they were when it was recorded. So
`fit` compares what the programs hold after two eager steps, once.
"""

from __future__ import annotations

__all__ = ["difference", "held_values"]

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vi.programs import CONTAINERS, held_by, is_library


def held_values(*programs: Callable[..., Any]) -> dict[str, Any]:
    """What programs hold in attributes, closures and containers, by a readable path.

    Numbers, strings and arrays are there by value, tensors by identity and version, containers by
    their size. Parameters and buffers of modules are left out: a compiled step changes those.

    Example:
        >>> def model(seen=[]):
        ...     seen.append(len(seen))
        >>> before = held_values(model)
        >>> model()
        >>> difference(before, held_values(model))
        "'default' of model"
    """
    found: dict[str, Any] = {}
    trained = {
        id(tensor)
        for program in programs
        if isinstance(program, nn.Module)
        for tensor in (*program.parameters(), *program.buffers())
    }
    visited: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque()
    for program in programs:
        waiting.append((_name(program), program))
    while waiting:
        path, value = waiting.popleft()
        if isinstance(value, Tensor):
            if id(value) not in trained and not isinstance(value, nn.Parameter):
                found[path] = (id(value), value._version)
            continue
        if isinstance(value, np.ndarray):
            found[path] = value.tobytes()
            continue
        if value is None or isinstance(value, _PLAIN):
            found[path] = (type(value), value)
            continue
        if id(value) in visited or isinstance(value, type):
            continue
        visited.add(id(value))
        if isinstance(value, CONTAINERS):
            found[path] = len(value)
        elif is_library(type(value).__module__) and not isinstance(value, (nn.Module, partial)):
            if type(value).__module__.partition(".")[0] not in ("builtins", "functools"):
                continue
        elif isinstance(value, Messenger) and type(value).__module__.startswith("pyro_vi."):
            continue  # what these keep is set before each step
        caches = _caches(value)
        for name, held in held_by(value):
            if id(held) not in caches:
                waiting.append((f"{name!r} of {path}" if name else path, held))
    return found


def _name(program: Any) -> str:
    """What a program is called, behind handlers."""
    while isinstance(program, partial):
        last = program.args[-1] if program.args else None
        program = last if callable(last) else program.func
    return str(getattr(program, "__name__", type(program).__name__))


def _caches(value: Any) -> set[int]:
    """What Pyro's transforms keep of their last call, by identity."""
    return {
        id(held)
        for module in (value.modules() if isinstance(value, nn.Module) else ())
        if is_library(type(module).__module__)
        for name, held in vars(module).items()
        if name.startswith("_cache") and held is not None
    }


_PLAIN = (bool, int, float, complex, str, bytes, np.generic, torch.Size, torch.dtype)


def difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The path of one thing that is another after a step; None if nothing is."""
    for path, value in after.items():
        if path not in before or repr(before[path]) != repr(value):
            return path
    return next((path for path in before if path not in after), None)
