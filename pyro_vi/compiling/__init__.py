"""Steps of an SVI as compiled functions.

The contract:

    A compiled step reads tensors anew: parameters, buffers, the batch, and every tensor that the
    programs hold. Python values are constants of the record, and what Python does besides computing
    happens while it is recorded.

How a step becomes a function:

    tape.py        records the operations of one real step
    clean.py       makes the record a transaction, and removes what nothing needs
    emit.py        groups the operations into loops, and writes them as C
    operations.py  the C form of each operation
    native.py      compiles C, keeps it on disk, and runs many steps in one call
    graph.py       the record as a graph, for TorchInductor, CUDA graphs and TorchScript
    backends.py    which compiler a record gets
    update.py      the formulas of the optimizers
    guards.py      what is compared before each compiled step, outside of `fit`
    leftovers.py   what a step leaves behind in Python, compared once in `fit`
    steps.py       records, proves, takes and audits steps
"""
