"""Records as graphs of torch: for TorchInductor, CUDA graphs and TorchScript.

They take what has no small form in C: networks, convolutions, and everything on a GPU.
"""

from __future__ import annotations

__all__ = ["Graph", "GraphError", "inductor", "module_of", "torchscript"]

import re
import warnings
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from pyro_vi.compiling.tape import Op, Record, Ref

_aten = torch.ops.aten


class GraphError(Exception):
    """A graph that torch's compilers do not compile; the message says why."""


class Graph:
    """A record as a compiled graph, one call for each repetition.

    It has the methods of `pyro_vi.compiling.native.Function`.

    Args:
        record: a clean record.
        compiler: (graph, example inputs) -> function; `inductor` or `torchscript`.
        steps: how many repetitions have places of their own for what differs.
        per_step: storages that have other values in each repetition.

    Attributes:
        by: what compiled it, in words.

    Raises:
        GraphError: the compiler failed.
    """

    draws_ahead = can_draw_all = False

    def __init__(
        self,
        record: Record,
        compiler: Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]],
        *,
        steps: int,
        per_step: Sequence[int],
    ) -> None:
        self.record, self.steps = record, steps
        self.by = "TorchInductor" if compiler is inductor else "TorchScript"
        module, self._outer = module_of(record)
        self._rows: dict[int, Tensor] = {}
        self._staged: dict[int, Tensor] = {}  # on a GPU, where numbers wait for their step
        for index in per_step:
            storage = record.storages[index]
            width = -(-storage.size // 8) * 8  # rows are aligned
            rows = torch.zeros(steps, width, dtype=storage.dtype, device=storage.device)
            self._rows[index] = rows[:, : storage.size]
        inputs = self._inputs(0)
        held = [tensor.clone() for tensor in inputs]  # of which a compiler may take steps
        try:
            with warnings.catch_warnings():  # of torch about itself
                warnings.simplefilter("ignore", DeprecationWarning)
                warnings.simplefilter("ignore", FutureWarning)
                self._run = compiler(module, held)
            if all(tensor.is_cuda for tensor in inputs):
                self._run = _Launched(self._run, inputs, held)
                self.by = "TorchInductor, as a CUDA graph"
        except Exception as error:
            text = str(error).strip().partition("\n")[0]
            raise GraphError(f"{self.by}: {type(error).__name__}: {text}") from error

    def view(self, index: int) -> Any:
        """The values of a storage in each repetition, as an array (steps, elements)."""
        rows = self._rows[index]
        if not rows.is_cuda:
            return rows.numpy()
        if rows.dtype is torch.float64 and index not in self._staged:
            self._staged[index] = torch.zeros(rows.shape, dtype=rows.dtype)
        return _Staged(rows, self._staged[index].numpy())

    def give(self, index: int, step: int, value: Tensor) -> None:
        """Gives a repetition the values of a storage."""
        self._rows[index][step].view(value.shape).copy_(value)

    def step(self, step: int) -> None:
        """Runs a repetition."""
        for index, staged in self._staged.items():
            self._rows[index][step].copy_(staged[step], non_blocking=True)
        self._run(*self._inputs(step))

    def finish(self, count: int) -> None:
        """Nothing: `step` ran them."""

    def _inputs(self, step: int) -> list[Tensor]:
        found = []
        for index in self._outer:
            if index in self._rows:
                found.append(self._rows[index][step])
            else:
                tensor = self.record.storages[index].tensor
                assert tensor is not None
                found.append(tensor)
        return found


class _Staged:
    """Numbers of steps on a GPU: written on the host, read from the device."""

    def __init__(self, rows: Tensor, staged: Any) -> None:
        self._rows, self._staged = rows, staged

    def __setitem__(self, place: Any, value: Any) -> None:
        self._staged[place] = value

    def __getitem__(self, place: Any) -> Tensor:
        return self._rows[place]


def module_of(record: Record) -> tuple[fx.GraphModule, list[int]]:
    """A record as a graph of flat tensors, and the storages that are its inputs.

    It changes its inputs in place.
    """
    graph = fx.Graph()
    used = {ref.storage for op in record.ops for ref in (*op.reads(), *op.writes())}
    outer = [i for i in sorted(used) if not record.storages[i].is_inner]
    bases: dict[int, fx.Node] = {}  # of each storage: a node, whose memory it is
    nodes: dict[Ref, fx.Node] = {}
    flat: set[int] = set()  # whose base is contiguous, and all of the storage

    def found_base(ref: Ref, made: fx.Node) -> None:
        nodes.setdefault(ref, made)
        if ref.storage not in bases:
            bases[ref.storage] = made
            if _is_whole(record, ref):
                flat.add(ref.storage)

    for i in outer:
        storage = record.storages[i]
        found_base(Ref(i, 0, (storage.size,), (1,), storage.dtype), graph.placeholder(f"m{i}"))

    def node(ref: Ref) -> fx.Node:
        if (found := nodes.get(ref)) is not None:
            return found
        storage = record.storages[ref.storage]
        if ref.storage not in bases:
            options: Any = {"dtype": storage.dtype, "device": storage.device}
            empty = graph.call_function(_aten.empty.memory_format, ([storage.size],), options)
            found_base(Ref(ref.storage, 0, (storage.size,), (1,), storage.dtype), empty)
        base = bases[ref.storage]
        if ref.storage in flat and _is_whole(record, ref):
            made = graph.call_function(_aten.view.default, (base, list(ref.shape)))
        else:
            made = graph.call_function(
                _aten.as_strided.default, (base, list(ref.shape), list(ref.stride), ref.offset)
            )
        nodes[ref] = made
        return made

    def filled(value: Any) -> Any:
        if isinstance(value, Ref):
            return node(value)
        return [filled(one) for one in value] if isinstance(value, (list, tuple)) else value

    for op in record.ops:
        first = op.args[0] if op.args and isinstance(op.args[0], Ref) else None
        if op.is_view and first is not None and first.storage not in bases:
            continue
        if op.func is _aten.copy_.default and first is not None and first.storage not in bases:
            if first.numel == record.storages[first.storage].size:  # the first values of memory
                made = graph.call_function(_aten.clone.default, (filled(op.args[1]),))
                found_base(first, made)
                continue
        args = tuple(filled(one) for one in op.args)
        kwargs = {name: filled(value) for name, value in op.kwargs.items()}
        made = graph.call_function(_for_inductor(op), args, kwargs)
        returned = op.func._schema.returns
        many = len(returned) > 1 or isinstance(returned[0].type, torch.ListType)
        for i, ref in enumerate(op.outs):
            place = op.positions[i] if op.positions else i
            one = graph.call_function(getitem, (made, place)) if many else made
            found_base(ref, one)
    graph.output(())
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph), outer


def _for_inductor(op: Op) -> Any:
    """The same operation on truth values in a form that TorchInductor makes fast loops of."""
    is_truth = bool(op.outs) and op.outs[0].dtype is torch.bool
    if is_truth and op.func in _OF_TRUTH and op.args[0].numel > 1:
        return _OF_TRUTH[op.func]
    return op.func


_OF_TRUTH = {
    _aten._is_all_true.default: _aten.all.default,
    _aten.bitwise_and.Tensor: _aten.logical_and.default,
    _aten.bitwise_or.Tensor: _aten.logical_or.default,
}


def _is_whole(record: Record, ref: Ref) -> bool:
    """Whether a place is contiguous, and all of its storage."""
    expected = 1
    for size, step in zip(reversed(ref.shape), reversed(ref.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return ref.offset == 0 and expected == record.storages[ref.storage].size


def torchscript(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A graph as TorchScript."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        traced: Callable[..., Any] = torch.jit.trace(
            _returning(module), tuple(inputs), check_trace=False
        )
    return traced


def _returning(module: fx.GraphModule) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:  # traces need a result
        module(*inputs)
        return inputs[0]

    return run


def inductor(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A graph as TorchInductor's code, called as directly as may be.

    Around it AOTAutograd puts what a graph without gradients has no need of, and of a small step
    that is a fifth.
    """
    from torch._functorch import config as functorch
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    inner: list[tuple[fx.GraphModule, Any]] = []

    def keep(graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        code = compile_fx_inner(graph, *args, **kwargs)
        inner.append((graph, code))
        return code

    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)  # Inductor's cache asks for it
    fakes = [mode.from_tensor(tensor) for tensor in inputs]
    options: dict[str, Any] = dict(_OPTIONS)
    if any(_INDEXES.search(str(node.target)) for node in module.graph.nodes):
        options["cpp.threads"] = 1  # out of bounds, a thread of OpenMP would end the process
    with torch.no_grad(), functorch.patch(enable_autograd_cache=False):
        whole: Any = compile_fx(module, fakes, inner_compile=keep, config_patches=options)
    if len(inner) != 1:
        return whole
    graph, code = inner[0]
    places = sum(node.op == "placeholder" for node in graph.graph.nodes)
    if places != len(inputs) or _outputs(graph) != _outputs(module):
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
    """A compiled function as a CUDA graph: inputs are copied to one place, and back.

    Args:
        run: the function; it may change its arguments in place.
        inputs: its arguments at the first repetition; those that are others in a call are copied.
        examples: copies of them, for the calls before the graph is made.
    """

    def __init__(
        self, run: Callable[..., Any], inputs: Sequence[Tensor], examples: list[Tensor]
    ) -> None:
        self._inputs = list(inputs)
        self._addresses = [tensor.data_ptr() for tensor in inputs]
        before = [tensor.clone() for tensor in inputs]
        devices = sorted({tensor.device.index or 0 for tensor in inputs})
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.random.fork_rng(devices=devices):
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries allocate and choose in their first calls
                    run(*examples)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                run(*self._inputs)
        for tensor, value in zip(inputs, before, strict=True):
            tensor.copy_(value)

    def __call__(self, *inputs: Tensor) -> None:
        moved = [
            (own, given)
            for own, given, address in zip(self._inputs, inputs, self._addresses, strict=True)
            if given.data_ptr() != address
        ]
        for own, given in moved:
            own.copy_(given)
        self._graph.replay()
        for own, given in moved:
            given.copy_(own)
