"""Which functions of a user's ran, and on which objects.

What a step depends on is what its code reads, and its code is what runs in it: a model's helpers in
other files, methods that a library calls by protocol (`log_prob`, `backward`, hooks), properties.
No reading of programs finds all of them. So they are seen while they run, in eager steps.
"""

from __future__ import annotations

__all__ = ["Calls"]

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch

from pyro_vi.reach import content, is_namespace

_ARGS, _KWARGS = 0x04, 0x08  # flags of code that takes *args, **kwargs


class Calls:
    """Sees the calls of a user's functions in runs of the same programs."""

    def __init__(self) -> None:
        self._codes: dict[int, tuple[CodeType, dict[str, Any]]] = {}  # and globals; by identity
        self._libraries: dict[int, CodeType] = {}  # no user's
        self._contents: dict[int, list[list[Any]]] = {}  # of the closures that were called, by code
        self._runs: list[dict[int, Any]] = []  # what functions were given, by identity

    @contextmanager
    def seen(self) -> Iterator[Calls]:
        """Within it is a run."""
        self._runs.append({})
        before, known = sys.gettrace(), self._libraries

        def see(frame: FrameType, event: Any, arg: Any) -> Any:
            if id(frame.f_code) not in known:
                self._see(frame)
            return None if before is None else before(frame, event, arg)

        collects = gc.isenabled()
        gc.disable()  # it calls functions that are not the run's
        sys.settrace(see)
        try:
            with torch.autograd.set_multithreading_enabled(False):  # backward passes are seen too
                yield self
        finally:
            sys.settrace(before)
            if collects:
                gc.enable()

    def _see(self, frame: FrameType) -> None:
        code = frame.f_code
        if id(code) not in self._codes and not is_namespace(frame.f_globals.get("__name__")):
            self._libraries[id(code)] = code
            return
        self._codes[id(code)] = code, frame.f_globals
        local = frame.f_locals
        count = code.co_argcount + code.co_kwonlyargcount
        count += bool(code.co_flags & _ARGS) + bool(code.co_flags & _KWARGS)
        given = [local.get(name) for name in code.co_varnames[:count]]
        self._runs[-1] |= {id(one): one for one in given}
        if code.co_freevars:
            free = [local.get(name) for name in code.co_freevars]
            known = self._contents.setdefault(id(code), [])
            if not any(_same(free, other) for other in known):
                known.append(free)

    @property
    def codes(self) -> list[tuple[CodeType, dict[str, Any]]]:
        """The code that ran, and the globals that it sees."""
        return list(self._codes.values())

    def objects(self) -> list[Any]:
        """What functions were given in the last two runs: the others were made in one."""
        before, last = ({}, {}, *self._runs)[-2:]
        return [one for key, one in last.items() if key in before]

    def functions(self) -> list[FunctionType]:
        """The functions that ran, as far as they outlive a run."""
        referrers = gc.get_referrers(*(code for code, _ in self.codes))
        found = [one for one in referrers if isinstance(one, FunctionType)]
        return [one for one in found if id(one.__code__) in self._codes and self._ran(one)]

    def _ran(self, function: FunctionType) -> bool:
        held = [content(cell) for cell in function.__closure__ or ()]
        known = self._contents.get(id(function.__code__), [])
        return not held or any(_same(held, other) for other in known)


def _same(some: list[Any], others: list[Any]) -> bool:
    return all(one is other for one, other in zip(some, others, strict=True))
