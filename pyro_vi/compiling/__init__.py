"""Steps of an SVI as compiled functions.

The contract:

    A compiled step reads tensors anew: parameters, buffers, the batch, and every tensor that the
    programs hold. Python values are constants of the record, and what Python does besides computing
    happens while it is recorded.

How a step becomes a function:

    tape.py        records the operations of one real run
    recording.py   records a step of an SVI, as a transaction
    clean.py       the transaction; removes what nothing needs
    operations.py  the C form of each operation
    emit.py        groups operations into loops, writes them as C (with special.h, matrices.h)
    build.py       compiles C, and keeps it on disk
    native.py      a record as a C function that takes many steps in one call
    graph.py       a record as a graph, for TorchInductor, CUDA graphs and TorchScript
    backends.py    which compiler a record gets
    update.py      the formulas of the optimizers
    stepper.py     what a compiled step needs of an SVI
    compiled.py    a compiled step: takes steps, and predicts one to be compared
    guards.py      what is compared before each compiled step, outside of `fit`
    leftovers.py   what a step leaves behind in Python, compared once in `fit`
    steps.py       which steps are recorded, proven, compiled and audited
    functions.py   any function of tensors as a C function
"""

from pyro_vi.compiling.compiled import Compiled
from pyro_vi.compiling.functions import CompiledFunction, compile_function
from pyro_vi.compiling.steps import Compiler
from pyro_vi.compiling.tape import is_recording
from pyro_vi.compiling.update import Update, has_formula, make_state

__all__ = [
    "Compiled",
    "CompiledFunction",
    "Compiler",
    "Update",
    "compile_function",
    "has_formula",
    "is_recording",
    "make_state",
]
