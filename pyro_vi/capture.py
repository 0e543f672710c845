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
- the value of a tensor from outside, or a change of one in place;
- Python that changes from run to run, such as a counter (two traces differ).

What no trace can see is a tensor or a number of Python that the programs read, and that is *bound*
to another one later: `pyro_vi.watch` looks at those.
"""

from __future__ import annotations

__all__ = ["Graph", "PyrosQuestions", "Uncapturable", "capture", "first_line"]

import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from operator import getitem
from typing import Any
from unittest import mock

import numpy as np
import pyro
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import increment_version
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

# Where Pyro reads a loss as a number, and where it asks whether one is a NaN, to warn of it.
_ITEMS = {"pyro.infer.util"} | {
    f"pyro.infer.{kind}_elbo"
    for kind in ("trace", "trace_mean_field", "traceenum", "tracegraph", "renyi")
}
# What asks a tensor for its value, what changes it in place besides methods that end in "_", and
# what sets no more than a flag.
_VALUES = {"item", "tolist", "numpy", "__array__", "is_nonzero"} | {
    f"__{kind}__" for kind in ("bool", "float", "int", "index", "complex")
}
_CHANGES = {"__setitem__"} | {
    f"__i{kind}__" for kind in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")
}
_FLAGS = {"requires_grad_"}
_PLATES = {"pyro.poutine.indep_messenger", "pyro.poutine.subsample_messenger"}
_QUESTIONS = {torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.unbind, torch.arange}
_WARNINGS = {"torch_isnan", "torch_isinf", "warn_if_nan", "warn_if_inf"}


class Uncapturable(Exception):
    """A step that cannot be recorded; the message names the reason and the line."""


class Graph:
    """A recorded function of a batch of tensors.

    Args:
        module: the record; it takes `held`, the batch, and then `constants`.
        held: tensors that the function was given besides the batch, by reference.
        constants: tensors that it read and was not given, by reference.
    """

    def __init__(
        self, module: fx.GraphModule, held: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> None:
        self.module, self.constants = module, tuple(constants)
        self._held = [tensor.detach() for tensor in held]  # the same memory
        self._constants = [tensor.detach() for tensor in constants]
        self._run: Callable[..., Any] = module

    def compile(self, batch: Sequence[Tensor]) -> None:
        """Hands the record to Inductor; on a GPU what it makes becomes a CUDA graph.

        Raises:
            Uncapturable: it was not compiled.
        """
        inputs: list[Any] = [*self._held, *(t.detach() for t in batch), *self._constants]
        try:
            with warnings.catch_warnings():  # of torch about itself
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
                self._run = _compiled(self.module, inputs)
        except Exception as error:
            raise Uncapturable(f"Inductor: {first_line(error)}") from error
        if inputs and all(tensor.is_cuda for tensor in inputs):
            self._run = _Launched(self._run, inputs, len(self._held), len(batch))

    def interpret(
        self, held: Sequence[Tensor], batch: Sequence[Tensor], *, as_compiled: bool = False
    ) -> Any:
        """Runs the record on other tensors: as it is, or as it was compiled.

        None if it is not compiled, or a CUDA graph, which runs on its own tensors alone.
        """
        if as_compiled and (self._run is self.module or isinstance(self._run, _Launched)):
            return None
        run = self._run if as_compiled else self.module
        return run(*held, *batch, *self._constants)

    def __call__(self, batch: Sequence[Tensor]) -> Any:
        found = self._run(*self._held, *batch, *self._constants)
        if self._run is not self.module:  # which says itself what it has changed
            increment_version(self._held)
        return found


def _compiled(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """What Inductor makes of a record, called as directly as may be.

    Around it AOTAutograd puts what a record has no need of, since nothing in it has a gradient, and
    of a small step that is a fifth; and it counts versions, which `Graph` does.
    """
    from torch._functorch import config as functorch
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    inner: list[tuple[fx.GraphModule, Any]] = []

    def keep(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        code = compile_fx_inner(graph, *args, **kwargs)
        inner.append((graph, code))
        return code

    outputs = _outputs(module)
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)  # Inductor's cache asks for it
    fakes = [mode.from_tensor(tensor) for tensor in inputs]
    options: dict[str, Any] = dict(_OPTIONS)
    if any(_INDEXES.search(str(node.target)) for node in module.graph.nodes):
        options["cpp.threads"] = 1  # out of bounds, a thread of OpenMP would end the process
    with functorch.patch(enable_autograd_cache=False):  # what it finds has the wrapper
        whole: Any = compile_fx(module, fakes, inner_compile=keep, config_patches=options)
    if len(inner) != 1:
        return whole
    graph, code = inner[0]
    places = sum(node.op == "placeholder" for node in graph.graph.nodes)
    if places != len(inputs) or _outputs(graph) != outputs:
        return whole
    run = code.current_callable
    return lambda *inputs: run(list(inputs))


def _outputs(module: fx.GraphModule) -> int:
    return len(next(iter(reversed(module.graph.nodes))).args[0])


# Draws as an eager step's, and in their order. What the layouts are is known before a step.
_OPTIONS = {
    "fallback_random": True,
    "reorder_for_peak_memory": False,
    "size_asserts": False,
    "alignment_asserts": False,
}
_INDEXES = re.compile("index|gather|scatter|embedding|take|put|nll_loss|unpool")


class _Launched:
    """A compiled function as a CUDA graph, which is launched as one.

    Args:
        run: the function; it may change its first arguments in place.
        inputs: its arguments.
        held: how many of them it may change.
        batch: how many come then that differ from call to call, and are copied.
    """

    def __init__(
        self, run: Callable[..., Any], inputs: Sequence[Tensor], held: int, batch: int
    ) -> None:
        self._places = range(held, held + batch)
        self._inputs = list(inputs)
        for place in self._places:
            self._inputs[place] = inputs[place].clone()
        before = [tensor.clone() for tensor in inputs[:held]]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng(devices=_cuda(inputs)):
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries allocate and choose in their first calls
                    run(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._found = run(*self._inputs)
        for tensor, value in zip(inputs, before, strict=False):
            tensor.copy_(value)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for place in self._places:
            self._inputs[place].copy_(inputs[place])
        self._graph.replay()
        return [tensor.clone() for tensor in self._found]


def capture(function: Callable[..., Any], held: Sequence[Tensor], batch: Sequence[Tensor]) -> Graph:
    """Records a function of tensors, twice, and compares.

    Args:
        function: takes `held` and a batch, and returns a tuple of tensors; it may change its
            arguments in place.
        held: tensors that every call is given.
        batch: tensors of the shapes that it will be called with.

    Raises:
        Uncapturable: it depends on more than tensors, or on their values.
    """
    inputs = [*held, *batch]
    before, python, numpys = _randomness(), random.getstate(), np.random.get_state()
    try:
        first, second = _record(function, inputs), _record(function, inputs)
        if str(first.graph) != str(second.graph):  # torch's caches were empty in the first
            first, second = second, _record(function, inputs)
        if _randomness() != before:
            raise Uncapturable(
                "random numbers of Python or NumPy, which a graph would repeat: draw torch's"
            )
    finally:
        random.setstate(python)
        np.random.set_state(numpys)
    if str(first.graph) != str(second.graph):
        raise Uncapturable("two runs of the programs on equal shapes did different things")
    # What is the same object in both is a tensor from outside; literals are made anew.
    pairs = list(zip(_constants(first), _constants(second), strict=True))
    if not all(one is other or _equal(one, other) for one, other in pairs):
        raise Uncapturable("two runs of the programs made other tensors of numbers")
    lifted, constants = _lifted(second, {id(one) for one, other in pairs if one is other})
    if any(tensor.requires_grad for tensor in constants):
        raise Uncapturable(
            "gradients of a tensor that no pyro.param or pyro.module statement of the step shows:"
            " add one, or requires_grad_(False)"
        )
    _check_changes(lifted, len(held))
    return Graph(lifted, held, constants)


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
        except Uncapturable as error:
            raise Uncapturable(f"{error}{_line(error)}") from error
        except Exception as error:
            raise Uncapturable(f"{first_line(error)}{_line(error)}") from error


class PyrosQuestions(TorchFunctionMode):
    """Answers what Pyro itself asks of a tensor, as it does in every step.

    A loss that it reads as a number stays a tensor, and no warning hangs on it; a value is in its
    distribution's support; and the indices of a whole plate are known without their values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._indices: list[Tensor] = []  # of whole plates

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if args and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            kind = getattr(func, "__name__", "")
            if kind in _VALUES:
                raise Uncapturable("the value of a tensor from outside of the programs")
            if kind in _CHANGES or (kind[-1:] == "_" and kind[-2:] != "__" and kind not in _FLAGS):
                raise Uncapturable("a tensor from outside of the programs is changed in place")
        if func not in _QUESTIONS:
            return func(*args, **(kwargs or {}))
        caller = sys._getframe(1)
        name = caller.f_globals.get("__name__", "")
        if func is torch.Tensor.item and name in _ITEMS:
            return args[0].detach()
        if func is torch.Tensor.__bool__:
            if name == "pyro.util" and caller.f_code.co_name in _WARNINGS:
                return False
            if name == "torch.distributions.distribution":  # validate_args of an older object
                return True
        found = func(*args, **(kwargs or {}))
        if func is torch.arange and name in _PLATES:
            self._indices.append(found)
        if func is torch.Tensor.unbind and any(args[0] is known for known in self._indices):
            return range(len(args[0]))  # what a loop asks for
        return found


def _constants(module: fx.GraphModule) -> list[Tensor]:
    """What the record reads and was not given, in its order.

    Raises:
        Uncapturable: something else than tensors, such as a generator.
    """
    names = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
    found = [getattr(module, name) for name in names]
    if strange := [type(value).__name__ for value in found if not isinstance(value, Tensor)]:
        raise Uncapturable(f"a {strange[0]} of the programs' own")
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _lifted(module: fx.GraphModule, outside: set[int]) -> tuple[fx.GraphModule, list[Tensor]]:
    """A record that keeps no tensors: inputs instead, and operations where they were literals.

    Args:
        module: the record.
        outside: those that are not made anew in every run, by identity.

    Returns:
        The record, and the tensors in the order of its new inputs.
    """
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    constants: list[Tensor] = []
    nodes: dict[int, fx.Node] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if id(value) not in nodes and (id(value) in outside or value.numel() != 1):
            with graph.inserting_after(last):
                last = nodes[id(value)] = graph.placeholder(f"constant_{len(constants)}")
            constants.append(value)
        elif id(value) not in nodes:
            with graph.inserting_before(node):
                nodes[id(value)] = graph.call_function(
                    torch.ops.aten.full.default,
                    (list(value.shape), value.item()),
                    {"dtype": value.dtype, "device": value.device},
                )
        node.replace_all_uses_with(nodes[id(value)])
        graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph), constants


def _check_changes(module: fx.GraphModule, held: int) -> None:
    """Raises Uncapturable if the record changes an input in place that is not held."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    kept, views = set(inputs[held:]), {node: node for node in inputs}  # of what each is a view
    for node in module.graph.nodes:
        for source, is_write in _aliases(node):
            if source in views:
                if is_write and views[source] in kept:
                    raise Uncapturable("an argument of the step, or a tensor, is changed in place")
                views[node] = views[source]


def _aliases(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """What a node's result may share memory with, and whether it writes there."""
    if node.target is getitem:  # of several views
        yield node.all_input_nodes[0], False
    schema = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema is not None else ()):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None:
            for source in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(source, fx.Node):
                    yield source, argument.alias_info.is_write


def _randomness() -> Any:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tolist(), rest


def _cuda(inputs: Sequence[Tensor]) -> list[int]:
    return sorted({tensor.device.index or 0 for tensor in inputs if tensor.is_cuda})


def first_line(error: BaseException) -> str:
    """What kind of error it is, and how its message begins."""
    if type(error).__name__.startswith("DataDependent"):
        return "a tensor was asked for its value (item, float, a branch, a shape)"
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line(error: BaseException) -> str:
    """Where in a user's code it came about: the last line that is not a library's.

    If there is none, the library's function that asked.
    """
    place = ""
    libraries = tuple(f"{name}." for name in ("torch", "pyro", "pyro_vi", "zuko"))
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        name, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        if not name or file.startswith("<frozen"):  # of a graph; of imports
            continue
        if not f"{name}.".startswith(libraries):
            return f" ({file}:{number})"
        if not place and name.startswith(("pyro.", "torch.distributions")):
            place = f" (in {name}.{frame.f_code.co_qualname})"
    return place
