"""Which compiler a record gets.

Small steps on a CPU become C, which the system's compiler compiles in half a second. Steps whose
products of matrices are large, and steps on a GPU, go to TorchInductor, which takes seconds to
minutes. Where the system has no compiler, TorchScript takes a record without one.
"""

from __future__ import annotations

__all__ = ["compile_step"]

import logging
import warnings
from collections.abc import Callable, Sequence

from pyro_vi.compiling.build import CannotCompile
from pyro_vi.compiling.emit import Unemittable
from pyro_vi.compiling.graph import Graph, GraphError, inductor, torchscript
from pyro_vi.compiling.native import Function
from pyro_vi.compiling.tape import Record, Unrecordable

_log = logging.getLogger(__name__)

LARGE = 1_000_000  # multiplications and additions of a step; above, Inductor is faster


def compile_step(
    record: Record,
    per_step: Sequence[int],
    steps: int,
    *,
    waits: bool,
    announce: Callable[[], object] | None,
) -> Function | Graph:
    """Compiles a record.

    Args:
        record, per_step, steps: see `Function`, for which the outputs of the record are conditions.
        waits: whether a compiler may be used that takes seconds to minutes.
        announce: called before that.

    Raises:
        Unrecordable: no compiler takes it.
    """
    try:
        return Function(record, steps=steps, per_step=per_step, largest=LARGE, stops=True)
    except CannotCompile as error:
        warnings.warn(f"a step is compiled by TorchScript, which is slower: {error}", stacklevel=8)
        compiler = torchscript
    except Unemittable as error:
        if not waits:
            raise Unrecordable(f"{error}; fewer than 5,000 do not pay for TorchInductor") from error
        _log.info("compiling a step by TorchInductor, which takes seconds")
        if announce is not None:
            announce()
        compiler = inductor
    try:
        return Graph(record, compiler, steps=steps, per_step=per_step)
    except GraphError as error:
        raise Unrecordable(str(error)) from error
