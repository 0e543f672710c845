"""Which functions of a user's ran, and on which objects.

What a step depends on is what its code reads, and its code is what runs in it: a model's helpers in
other files, methods that a library calls by protocol (`log_prob`, `backward`, hooks), properties.
No reading of programs finds all of them. So they are seen while they run.
"""

from __future__ import annotations

__all__ = ["Calls"]

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType
from typing import Any

from pyro_vi.reach import content, is_namespace

_ARGS, _KWARGS = 0x04, 0x08  # flags of code that takes *args, **kwargs


class Calls:
    """Sees the calls of a user's functions in runs of the same programs."""

    def __init__(self) -> None:
        self._codes: dict[int, CodeType] = {}  # by identity, as the next
        self._libraries: dict[int, CodeType] = {}  # no user's
        self._contents: dict[int, list[list[Any]]] = {}  # of the closures that were called, by code
        self._runs: list[dict[int, Any]] = []  # what functions were given, by identity

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Within it is a run."""
        self._runs.append({})
        before, known = sys.gettrace(), self._libraries

        def see(frame: FrameType, event: Any, arg: Any) -> Any:  # a million times
            if id(frame.f_code) not in known:
                self._see(frame)
            return None if before is None else before(frame, event, arg)

        collects = gc.isenabled()
        gc.disable()  # it calls functions that are not the run's
        sys.settrace(see)
        try:
            yield
        finally:
            sys.settrace(before)
            if collects:
                gc.enable()

    def _see(self, frame: FrameType) -> None:
        code = frame.f_code
        if id(code) not in self._codes and not is_namespace(frame.f_globals.get("__name__")):
            self._libraries[id(code)] = code
            return
        self._codes[id(code)] = code
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
    def codes(self) -> list[CodeType]:
        """The code that ran."""
        return list(self._codes.values())

    def objects(self) -> list[Any]:
        """What functions were given in every run: the others were made in one."""
        first, *others = self._runs
        return [one for key, one in first.items() if all(key in other for other in others)]

    def functions(self) -> list[FunctionType]:
        """The functions that ran, as far as they outlive a run."""
        found = [one for one in gc.get_referrers(*self.codes) if isinstance(one, FunctionType)]
        ran = set(map(id, self.codes))
        return [one for one in found if id(one.__code__) in ran and self._ran(one)]

    def _ran(self, function: FunctionType) -> bool:
        held = [content(cell) for cell in function.__closure__ or ()]
        known = self._contents.get(id(function.__code__), [])
        return not held or any(_same(held, other) for other in known)


def _same(some: list[Any], others: list[Any]) -> bool:
    return all(one is other for one, other in zip(some, others, strict=True))
