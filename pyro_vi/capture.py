"""A step of SVI as a graph: what Pyro's handlers did, without the handlers.

A Pyro program is Python that calls torch. Most of a small step is the Python: messages, plates,
traces. So the whole step (guide, model, ELBO, gradients, optimizer) is run once on fake tensors,
which have shapes and no values, and every operation that reaches torch's dispatcher is recorded.
The record is a graph of tensors alone; Inductor compiles it, and a step is one call of it.

What the graph is a function of, by reference, so that it sees whatever changes them in place: the
parameters, the buffers, the optimizer's state and learning rates, the batch, and every other tensor
that the programs read. What it cannot follow is refused while tracing (`Uncapturable`), and the
step stays eager:

- a branch, an index or a number that depends on a tensor's values (fake tensors have none);
- random numbers of Python or NumPy (their state moved while tracing);
- Python that changes from run to run, such as a counter (two traces differ).

What no trace can see is a tensor or a number of Python that the programs read, and that is *bound*
to another one later.
"""

from __future__ import annotations

__all__ = ["Graph", "Losses", "Uncapturable", "capture"]

import random
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import pyro
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

# Where Pyro reads a loss as a number, and where it asks whether one is a NaN, to warn of it.
_ITEMS = {"pyro.infer.util"} | {
    f"pyro.infer.{kind}_elbo"
    for kind in ("trace", "trace_mean_field", "traceenum", "tracegraph", "renyi")
}
_WARNINGS = {"torch_isnan", "torch_isinf", "warn_if_nan", "warn_if_inf"}


class Uncapturable(Exception):
    """A step that cannot be recorded; the message names the reason and the line."""


class Graph:
    """A recorded function of tensors.

    Args:
        module: the record; it takes the inputs and then `constants`.
        constants: tensors that the function read and was not given, by reference.
    """

    def __init__(self, module: fx.GraphModule, constants: Sequence[Tensor]) -> None:
        self.module, self.constants = module, tuple(constants)
        self._inputs = [tensor.detach() for tensor in constants]
        self._run: Callable[..., Any] = module

    def compile(self, inputs: Sequence[Tensor]) -> None:
        """Hands the record to Inductor.

        Raises:
            Uncapturable: it was not compiled.
        """
        try:
            with warnings.catch_warnings():  # of torch about itself
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
                import torch._inductor

                self._run = torch._inductor.compile(
                    self.module, [*inputs, *self._inputs], options={"fallback_random": True}
                )
        except Exception as error:
            raise Uncapturable(f"Inductor: {_first_line(error)}") from error

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        return self._run(*inputs, *self._inputs)


def capture(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Graph:
    """Records a function of tensors, twice, and compares.

    Args:
        function: takes tensors and returns a tuple of them; it may change its arguments in place.
        inputs: tensors of the shapes that it will be called with.

    Raises:
        Uncapturable: it depends on more than tensors, or on their values.
    """
    before = _randomness()
    first, second = _record(function, inputs), _record(function, inputs)
    if _randomness() != before:
        raise Uncapturable("random numbers of Python or NumPy, which a graph would repeat")
    if str(first.graph) != str(second.graph):
        raise Uncapturable("two runs of the programs on equal shapes did different things")
    # What is the same object in both is a tensor from outside; literals are made anew.
    outside = {id(value) for value in _constants(first)} & {id(v) for v in _constants(second)}
    return _lifted(second, outside)


def _record(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(tensor.detach()) for tensor in inputs]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_cuda(inputs)))
        stack.enter_context(mock.patch("torch.compiler.is_compiling", return_value=True))
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(mode)
        try:
            return make_fx(function)(*fakes)
        except Exception as error:
            raise Uncapturable(f"{_first_line(error)}{_line(error)}") from error


class Losses(TorchFunctionMode):
    """Lets Pyro read a loss as a number: the number stays a tensor, and no warning hangs on it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.item, torch.Tensor.__bool__):
            caller = sys._getframe(1)
            name = caller.f_globals.get("__name__", "")
            if func is torch.Tensor.item and name in _ITEMS:
                return args[0].detach()
            if name == "pyro.util" and caller.f_code.co_name in _WARNINGS:
                return False
        return func(*args, **(kwargs or {}))


def _constants(module: fx.GraphModule) -> list[Tensor]:
    names = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
    return [value for name in names if isinstance(value := getattr(module, name), Tensor)]


def _lifted(module: fx.GraphModule, outside: set[int]) -> Graph:
    """The same record with the tensors from outside as inputs, and single numbers as operations."""
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    constants: list[Tensor] = []
    nodes: dict[int, fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if id(value) in outside and id(value) not in nodes:
            with graph.inserting_after(last):
                last = nodes[id(value)] = graph.placeholder(f"constant_{len(constants)}")
            constants.append(value)
        elif id(value) not in outside and value.numel() == 1:
            with graph.inserting_before(node):
                nodes[id(value)] = graph.call_function(
                    torch.ops.aten.full.default,
                    (list(value.shape), value.item()),
                    {"dtype": value.dtype, "device": value.device},
                )
        if id(value) in nodes:
            node.replace_all_uses_with(nodes[id(value)])
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return Graph(module, constants)


def _randomness() -> Any:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tolist(), rest


def _cuda(inputs: Sequence[Tensor]) -> list[int]:
    return sorted({tensor.device.index or 0 for tensor in inputs if tensor.is_cuda})


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line(error: BaseException) -> str:
    """Where in a user's code it came about: the last line that is not a library's."""
    libraries = tuple(f"{name}." for name in ("torch", "pyro", "pyro_vi", "zuko"))
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = frame.f_globals.get("__name__", "")
        if not f"{name}.".startswith(libraries):
            return f" ({frame.f_code.co_filename}:{number})"
    return ""
