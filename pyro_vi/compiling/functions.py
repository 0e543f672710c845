"""Functions of tensors as C functions, for callers that have no Python in their loop.

`compile_function` makes a C function of a Python function, such as a log density with its gradient.
A caller in C, such as a sampler, gets its address. The C function is

    long run(char **in, const long *stride, char *work, long count, long (*call)(long, long));

- `in` holds addresses: of the inputs, of the outputs, of `holds` (a byte), and of memory that is
  only read. Tensors are contiguous there, and do not overlap.
- `stride` holds a zero for each address; `count` is 1, and `call` is NULL.
- `work` is scratch memory; its address is a multiple of 64.

It returns 1. It has no memory of its own and needs no lock: threads may run it at the same time, if
each has inputs, outputs, `holds` and `work` of its own. `CompiledFunction.fork` makes them.
"""

from __future__ import annotations

__all__ = ["CompiledFunction", "compile_function"]

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_vi.compiling.build import CALL, CannotCompile, build
from pyro_vi.compiling.clean import clean, conditions_hold
from pyro_vi.compiling.emit import Unemittable
from pyro_vi.compiling.operations import emit
from pyro_vi.compiling.tape import HELD, Ref, Storage, Tape, Unrecordable


def compile_function(
    function: Callable[..., Tensor | Sequence[Tensor]], *examples: Tensor
) -> CompiledFunction:
    """Compiles a function of tensors.

    The function runs once. What it does with its arguments becomes C code. All else is fixed: the
    values of Python, the other tensors that it reads, and the shapes and dtypes of its arguments.

    Args:
        function: of tensors on the CPU; it returns one or several, and may compute gradients.
        examples: its arguments in that run.

    Raises:
        CannotCompile: the function asks for the value of a tensor (`if`, `item`), draws random
            numbers, changes its arguments, or has an operation without a form in C; or the system
            has no C compiler. The message says which.

    Example:
        >>> def log_density(z):
        ...     with torch.enable_grad():
        ...         z = z.detach().requires_grad_()
        ...         value = -z.square().sum() / 2
        ...         return value, *torch.autograd.grad(value, z)
        >>> compiled = compile_function(log_density, torch.zeros(2))
        >>> compiled(torch.tensor([1.0, 2.0]))
        (tensor(-2.5000), tensor([-1., -2.]))
    """
    inputs = [one.detach().clone(memory_format=torch.contiguous_format) for one in examples]
    tape = Tape(inputs, fixed=HELD)
    with tape.recording():
        found = function(*(one.detach() for one in inputs))
    results = [found] if isinstance(found, Tensor) else list(found)
    try:
        record = tape.finish(results)
        sound = conditions_hold(record, fixed=HELD)
        for op in record.ops:
            if op.is_random:
                raise Unrecordable(f"the function draws random numbers ({op.func})")
            if any(ref.storage in record.inputs for ref in op.writes()):
                raise Unrecordable(f"the function changes its argument ({op.func})")
        outputs = [torch.empty(ref.shape, dtype=ref.dtype) for ref in record.outputs]
        outputs.append(torch.ones((), dtype=torch.bool))
        first = list(record.inputs)
        for tensor, ref in zip(outputs, [*record.outputs, sound], strict=True):
            first.append(len(record.storages))
            flat, shape = tensor.view(-1), tuple(tensor.shape)
            record.storages.append(Storage(flat.numel(), flat.dtype, flat.device, flat))
            if ref is not None:
                record.write(Ref(first[-1], 0, shape, tensor.stride(), tensor.dtype), ref)
        record = clean(replace(record, outputs=[]))
        source = emit(record, first).source()
        if source.calls:
            names = ", ".join(sorted({str(op.func) for op in source.calls}))
            raise Unemittable(f"operations that have no form in C: {names}")
        run = build(source.text)
    except (Unrecordable, Unemittable) as error:
        raise CannotCompile(str(error)) from error
    held = [record.storages[index].tensor for index in source.outer[len(first) :]]
    rest = [one.clone() for one in held if one is not None]
    how = (len(inputs), run, rest, source.work, isinstance(found, Tensor))
    return CompiledFunction([*inputs, *outputs], *how)


class CompiledFunction:
    """A function of tensors as a C function, and memory for a call of it; see `compile_function`.

    Attributes:
        inputs, outputs: tensors that the C function reads, and those that it writes.
        holds: whether what the function checks, such as that values are within a support, is as it
            was in the first run; the C function writes it. If not, the outputs are meaningless.
        address, addresses, strides, work: of the C function; its `in`, `stride` and `work`.
    """

    def __init__(
        self, own: Sequence[Tensor], inputs: int, run: Any, rest: Sequence[Tensor], size: int,
        is_one: bool,
    ) -> None:  # fmt: skip
        self._own, self._made = own, (inputs, run, rest, size, is_one)
        self.inputs, self.outputs, self.holds = tuple(own[:inputs]), tuple(own[inputs:-1]), own[-1]
        self.address = int(ctypes.cast(run, ctypes.c_void_p).value or 0)
        memory = [one.data_ptr() for one in (*own, *rest)]
        self.addresses = (ctypes.c_void_p * len(memory))(*memory)
        self.strides = (ctypes.c_long * len(memory))()
        aligned = torch.zeros(size + 64, dtype=torch.uint8)
        self.work = aligned[-aligned.data_ptr() % 64 :][:size]
        self._run, self._is_one = run, is_one

    def fork(self) -> CompiledFunction:
        """The same C function with inputs, outputs, `holds` and `work` of its own."""
        return CompiledFunction([one.clone() for one in self._own], *self._made)

    def __call__(self, *tensors: Tensor) -> Any:
        """The function's result for some tensors.

        Raises:
            ValueError: the arguments have other shapes than the examples, or `holds` is false.
        """
        if [one.shape for one in tensors] != [one.shape for one in self.inputs]:
            raise ValueError("the arguments have other shapes than those of the first run")
        for place, one in zip(self.inputs, tensors, strict=True):
            place.copy_(one.detach())
        self._run(self.addresses, self.strides, self.work.data_ptr(), 1, CALL())
        if not self.holds:
            raise ValueError("a value is outside of what the function checks")
        found = tuple(one.clone() for one in self.outputs)
        return found[0] if self._is_one else found
