"""Which compiler a record gets: the system's C compiler, TorchInductor, or TorchScript."""

from __future__ import annotations

__all__ = ["compile_step"]

from collections.abc import Callable, Sequence
from typing import Any

from pyro_vi.compiling.emit import Unemittable
from pyro_vi.compiling.native import CannotCompile, Function
from pyro_vi.compiling.tape import Record

_LARGE = 2_000_000  # multiplications and additions of a step; above, Inductor's code is faster


def compile_step(
    record: Record,
    per_step: Sequence[int],
    steps: int,
    *,
    is_slow: bool,
    announce: Callable[[], object] | None,
) -> tuple[Any, str]:
    """Compiles a record; None and the reason if it is not compiled."""
    try:
        return Function(record, steps=steps, per_step=per_step), ""
    except (Unemittable, CannotCompile) as error:
        return None, str(error)
