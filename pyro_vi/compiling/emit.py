"""Writes a record as a C function.

The function repeats the record `count` times on memory that it is given by address:

    long run(char **in, const long *stride, char *work, long count, long (*call)(long, long));

`in` has the address of each outer storage. After every repetition it moves by `stride` bytes, often
by 0, so that a batch or a draw can have one place for each repetition. `work` is scratch memory for
what the operations make. `call(i, k)` runs operation i of repetition k by torch, for operations
without a form in C; if it returns a nonzero number, `run` ends. `run` returns how many repetitions
it completed. It has no memory of its own.

Operations become statements, and statements become loops. What is alike along a dimension is
computed once. The dimension along which a statement walks through memory in the smallest steps is
its last loop. A statement joins a loop over the same shape that is there already, if all that it
reads has been computed by then; so values pass from one to the next in registers, and what a loop
alone uses needs no memory. Loops whose iterations may run side by side are marked, so that the
compiler makes vector instructions of them; other statements are in loops of their own.
"""

from __future__ import annotations

__all__ = ["Access", "Emitter", "Source", "Unemittable", "access", "ctype"]

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyro_vi.compiling.tape import Op, Record, Ref

_CTYPES = {torch.float32: "float", torch.float64: "double", torch.int32: "int", torch.int64: "long"}
_CTYPES |= {torch.bool: "unsigned char", torch.uint8: "unsigned char"}
# How a value {1} joins those before it, {0}, and what there is at first.
_KINDS = {
    "sum": ("{0} + {1}", "0"), "prod": ("{0} * {1}", "1"), "any": ("{0} || {1}", "0"),
    "all": ("{0} && {1}", "1"), "max": ("({1} != {1} || {1} > {0} ? {1} : {0})", "-INFINITY"),
    "min": ("({1} != {1} || {1} < {0} ? {1} : {0})", "INFINITY"),
}  # fmt: skip
_PART = 150  # statements of a C function: compilers take more than linear time for longer ones
_LONG = 50_000  # multiplications and additions for which the compiler may take longer
_SHORT = 15  # iterations that are not worth vector instructions
_LINE = 8  # steps after which memory is another line of the cache
_SCALAR = ("gamma(", "fmod", "_of(")  # what has no vector instructions


class Unemittable(Exception):
    """A record that has no form in C."""


class Access(NamedTuple):
    """An address as a function of a loop's indices."""

    storage: int
    offset: int
    stride: tuple[int, ...]  # a step for each index
    dtype: torch.dtype
    # Steps by values in memory: where an index lies, the step for it, and the bound of the index.
    gathered: tuple[tuple[Access, int, int], ...] = ()

    @property
    def level(self) -> int:
        """The number of loops up to the last one in which the address moves."""
        return max((d + 1 for d, step in enumerate(self.stride) if step), default=0)


class _Statement(NamedTuple):
    """An assignment in a loop over a shape."""

    shape: tuple[int, ...]
    out: Access
    text: str  # an expression with {0}, {1}... for the operands
    operands: tuple[Access, ...]
    compute: str  # the C type that operands are cast to
    kind: str | None  # of a reduction
    adds: bool  # whether a reduction begins with what lies in `out`

    @property
    def uses(self) -> list[tuple[bool, int, Any]]:
        """Whether it writes, a storage, and the place there, if each iteration has its own."""
        indices = [i for one in (self.out, *self.operands) for i, _, _ in one.gathered]
        reads = [(one, False) for one in (*self.operands, *indices)]
        found = list[tuple[bool, int, Any]]()
        for one, writes in (*reads, (self.out, True)):
            is_shared = one.gathered or (writes and self.kind is not None)
            found.append((writes, one.storage, None if is_shared else (self.shape, one)))
        return found

    @property
    def is_serial(self) -> bool:
        """Whether the compiler cannot vectorise it."""
        is_ordered = self.kind not in (None, "sum") or bool(self.out.gathered)
        return is_ordered or any(name in self.text for name in _SCALAR)


@dataclass
class _Group:
    """Statements in one loop nest over a shape, or lines of C; and the storages that they use."""

    shape: tuple[int, ...] = ()
    statements: list[_Statement] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    storages: set[int] = field(default_factory=set)


class Source(NamedTuple):
    """A C function, and what it has to be given."""

    text: str
    outer: list[int]  # the storages whose addresses `in` has, in their order
    work: int  # the size of the scratch memory in bytes
    places: dict[int, int]  # where inner storages lie in it, for operations that torch runs
    calls: list[Op]  # the operations that torch runs
    cost: int  # about how many multiplications and additions a repetition takes


class Emitter:
    """Collects the statements of a clean record; `pyro_vi.compiling.operations` adds them.

    Args:
        first: storages that come first in `in`, whether they are the record's outer ones or not.
    """

    def __init__(self, record: Record, first: Iterable[int] = ()) -> None:
        self.record = record
        self.calls: list[Op] = []
        self.cost = 0
        self._first = list(first)
        outer = (i for i, storage in enumerate(record.storages) if not storage.is_inner)
        self._outer = {*self._first, *outer}
        self._groups: list[_Group] = []
        self._by_shape: dict[Any, list[int]] = {}
        # Of each storage: the last group that uses it, by whether that writes, and the place's key.
        self._uses: dict[int, dict[tuple[bool, Any], int]] = {}
        # What lies in a storage until it is written again: a number, or fewer elements.
        self._same: dict[int, tuple[Ref, Any]] = {}

    # What operations are made of.

    def assign(
        self, out: Ref | Access, text: str, *operands: Any, shape: Sequence[int] | None = None,
        compute: torch.dtype | None = None, adds: bool = False,
    ) -> None:  # fmt: skip
        """out[i] = text for every index i; operands are broadcast, and numbers are written out.

        Args:
            shape: that the index runs over; that of `out` by default.
            compute: the dtype that operands are cast to; that of `out` by default.
            adds: whether the value is added to what is there.
        """
        shape = tuple(out.shape if isinstance(out, Ref) and shape is None else shape or ())
        found = self._inputs(out, operands, shape)
        if isinstance(out, Ref) and not adds and 0 not in shape:
            sizes = [n if _moves(d, found) else 1 for d, n in enumerate(shape)]
            if text == "{0}" and not isinstance(found[0], Access):
                found = [torch.tensor(found[0], dtype=out.dtype).item()]
                self._same[out.storage] = (out, found[0])
            elif text != "{0}" and sizes != list(shape):
                part = self.scratch(sizes, out.dtype)
                self._state(part.shape, access(part, shape), text, found, compute)
                part = part._replace(shape=shape, stride=access(part, shape).stride)
                self._same[out.storage] = (out, part)
                text, found, compute = "{0}", [access(part, shape)], None
        place = access(out, shape) if isinstance(out, Ref) else out
        self._state(shape, place, text, found, compute, "sum" if adds else None, adds)

    def reduce(
        self, out: Ref, text: str, *operands: Any, shape: Sequence[int], dims: Sequence[int],
        kind: str = "sum", compute: torch.dtype | None = None, adds: bool = False,
        wide: bool = True,
    ) -> None:  # fmt: skip
        """Joins the elements of an expression over a shape along some of its dimensions.

        Args:
            out: has these dimensions with size 1, or does not have them.
            kind: of `_KINDS`.
            adds: whether they join what lies in `out`.
            wide: whether sums of single precision are added up in double precision.
        """
        if wide and kind == "sum" and out.dtype is torch.float32:
            total = self.scratch(out.shape, torch.float64)
            self.reduce(total, text, *operands, shape=shape, dims=dims, compute=torch.float32)
            self.assign(out, "{0}", total)
            return
        found = self._inputs(out, operands, shape)
        alike = [d for d in dims if shape[d] > 1 and not _moves(d, found)]
        if kind == "sum" and alike:
            text = f"{{{len(found)}}} * ({text})"
            found.append(math.prod(shape[d] for d in alike))
            shape = [1 if d in alike else n for d, n in enumerate(shape)]
        steps = iter([s for n, s in zip(out.shape, out.stride, strict=True) if n != 1])
        stride = tuple(0 if d in dims or n == 1 else next(steps) for d, n in enumerate(shape))
        place = Access(out.storage, out.offset, stride, out.dtype)
        if 0 in shape and not adds:
            self.assign(out, _KINDS[kind][1])
        else:
            is_one = not adds and all(shape[d] == 1 for d in dims)
            self._state(shape, place, text, found, compute, None if is_one else kind, adds)

    def code(
        self, lines: Sequence[str], reads: Iterable[Ref], writes: Iterable[Ref],
        shape: Sequence[int] = (), *, cost: int = 1,
    ) -> None:  # fmt: skip
        """Lines of C in loops over a shape, in which `at` gives elements of tensors."""
        self.cost += math.prod(shape) * cost
        group = _Group(lines=[*(_for(d, n) for d, n in enumerate(shape)), "{", *lines, "}"])
        for is_write, refs in ((False, reads), (True, writes)):
            for ref in refs:
                self._uses.setdefault(ref.storage, {})[is_write, None] = len(self._groups)
                group.storages.add(ref.storage)
                self._same.pop(ref.storage, None)
        self._groups.append(group)

    def at(self, ref: Ref, *last: str) -> str:
        """An element of a tensor, at the indices of the loops of `code` and some last ones."""
        index = [*(f"i{d}" for d in range(len(ref.shape) - len(last))), *last]
        terms = [f"{i} * {step}" for i, step in zip(index, ref.stride, strict=True) if step]
        return f"m{ref.storage}[{' + '.join([str(ref.offset), *terms])}]"

    def call(self, op: Op) -> None:
        """Lets torch run an operation."""
        line = f"if (call({len(self.calls)}, step)) return 1;"
        self.calls.append(op)
        self.code([line], op.reads(), op.writes(), cost=sum(ref.numel for ref in op.outs))

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> Ref:
        """Memory for a result in between."""
        return self.record.allocate(shape, dtype, torch.device("cpu"))

    # Which loop a statement joins.

    def _inputs(
        self, out: Ref | Access, operands: Iterable[Any], shape: Sequence[int]
    ) -> list[Any]:
        """Operands as accesses and numbers, before `out` is written."""
        found = []
        for one in operands:
            if isinstance(one, Ref) and (same := self._same.get(one.storage)) and same[0] == one:
                one = same[1]
            found.append(access(one, shape) if isinstance(one, Ref) else one)
        self._same.pop(out.storage, None)
        return found

    def _state(
        self, shape: Sequence[int], out: Access, text: str, found: Sequence[Any],
        compute: torch.dtype | None, kind: str | None = None, adds: bool = False,
    ) -> None:  # fmt: skip
        """Adds a statement to a group."""
        if 0 in shape:
            return
        self.cost += math.prod(shape)
        type_, names, loaded = ctype(compute or out.dtype), list[str](), list[Access]()
        for one in found:
            names.append(f"{{{len(loaded)}}}" if isinstance(one, Access) else number(one, type_))
            loaded += [one] if isinstance(one, Access) else []
        text = text.format(*names, f="f" if type_ == "float" else "")
        s = _arranged(_Statement(tuple(shape), out, text, tuple(loaded), type_, kind, adds))
        first = 0
        for writes, storage, key in s.uses:
            for (wrote, other), place in self._uses.get(storage, {}).items():
                if writes or wrote:  # they may be in one group if they have the same place
                    first = max(first, place + (key is None or key != other))
        kind_of_loop = (s.shape, s.is_serial and math.prod(shape) > _SHORT)
        groups = self._by_shape.setdefault(kind_of_loop, [])
        if not groups or groups[-1] < first or len(self._groups[groups[-1]].statements) >= _PART:
            groups.append(len(self._groups))
            self._groups.append(_Group(s.shape))
        self._groups[groups[-1]].statements.append(s)
        for writes, storage, key in s.uses:
            held = self._uses.setdefault(storage, {})
            held[writes, key] = max(held.get((writes, key), 0), groups[-1])

    # The text.

    def source(self) -> Source:
        """The function."""
        stored = self._stored()
        used = {ref.storage for ref in self.record.outputs}
        used |= stored.intersection(s for group in self._groups for s in group.storages)
        outer = [*self._first, *sorted((used & self._outer).difference(self._first))]
        where = {s: f"in[{i}]" for i, s in enumerate(outer)}
        places, work = dict[int, int](), 64
        for s in sorted(used - self._outer):
            storage = self.record.storages[s]
            places[s], where[s] = work - 64, f"(work + {work - 64})"
            work += -(-storage.size * storage.dtype.itemsize // 64) * 64 + 64
        parts, length = dict[int, list[_Group]](), 0
        for group in self._groups:
            parts.setdefault(length // _PART, []).append(group)
            length += len(group.statements) + len(group.lines)
        text, names = list[str](), [f"part{i}" for i in range(len(parts))]
        for name, part in zip(names, parts.values(), strict=True):
            text.append(f"static __attribute__((noinline)) long {name}(PART_ARGUMENTS) {{")
            for s in sorted(used.intersection(s for group in part for s in group.storages)):
                kind = ctype(self.record.storages[s].dtype)
                text.append(f"  {kind} *restrict m{s} = ({kind} *){where[s]};")
            text += [line for group in part for line in group.lines or _nest(group, stored)]
            text += ["  return 0;", "}"]
        text.append(f"RUN({', '.join([str(len(outer)), *names])})\n")
        body = "\n".join(text)
        pragma = ['#pragma GCC optimize ("O3")'] if self.cost > _LONG else []
        matrices = [_MATRICES.replace("REAL", k) for k in ("float", "double") if f"_{k}(" in body]
        body = "\n".join([*pragma, _SPECIAL, *matrices, body])
        return Source(body, outer, work, places, self.calls, self.cost)

    def _stored(self) -> set[int]:
        """The storages that need memory; statements whose results nothing reads are dropped."""
        stored = self._outer | {ref.storage for ref in self.record.outputs}
        live = set(stored)
        for group in reversed(self._groups):
            for s in group.statements[::-1]:
                if s.out.storage in live:
                    group.storages.update(storage for _, storage, _ in s.uses)
                    live |= group.storages
                else:
                    group.statements.remove(s)
            live |= group.storages
        self._groups = [one for one in self._groups if one.statements or one.lines]
        for group in self._groups:
            stored |= group.storages if group.lines else set()
            local = set[Any]()
            for writes, storage, key in (use for s in group.statements for use in s.uses):
                if writes and key is not None:
                    local.add(key)
                elif key not in local:
                    stored.add(storage)
        return stored


def access(one: Ref, shape: Sequence[int]) -> Access:
    """A tensor, broadcast to a shape."""
    lead = [0] * (len(shape) - len(one.shape))
    steps = [0 if n == 1 else s for n, s in zip(one.shape, one.stride, strict=True)]
    return Access(one.storage, one.offset, (*lead, *steps), one.dtype)


def _moves(d: int, found: Sequence[Any]) -> bool:
    """Whether operands move along a dimension."""
    every = [one for one in found if isinstance(one, Access)]
    return any(one.stride[d] or _moves(d, [i for i, _, _ in one.gathered]) for one in every)


def _arranged(s: _Statement) -> _Statement:
    """The same statement in as few loops as possible, with the smallest steps in the last one."""
    every = [s.out, s.out, *s.operands]  # memory that is written counts twice
    every += [index for one in every for index, _, _ in one.gathered]
    dims = [d for d, n in enumerate(s.shape) if n != 1]
    if not s.out.gathered:
        dims.sort(key=lambda d: -sum(min(abs(one.stride[d]), _LINE) for one in every))
    sizes, inner = list[int](), list[int]()  # of joined dimensions: the one with the smallest steps
    for d in dims:
        if sizes and all(one.stride[inner[-1]] == one.stride[d] * s.shape[d] for one in every):
            sizes[-1] *= s.shape[d]
            inner[-1] = d
        else:
            sizes.append(s.shape[d])
            inner.append(d)

    def moved(one: Access) -> Access:
        gathered = tuple((moved(index), step, size) for index, step, size in one.gathered)
        return one._replace(stride=tuple(one.stride[d] for d in inner), gathered=gathered)

    operands = tuple(map(moved, s.operands))
    return s._replace(shape=tuple(sizes), out=moved(s.out), operands=operands)


def _nest(group: _Group, stored: set[int]) -> list[str]:
    """A group as nested loops."""
    shape, depth = group.shape, len(group.shape)
    ahead, body, sums = list[str](), list[str](), list[str]()
    before: list[list[str]] = [[] for _ in range(depth + 1)]  # the loop over each index
    after: list[list[str]] = [[] for _ in range(depth + 1)]
    known: dict[Any, str] = {}

    def address(one: Access) -> str:
        terms = [str(one.offset)] if one.offset or not any(one.stride) else []
        terms += [f"i{d}" + f" * {n}" * (n != 1) for d, n in enumerate(one.stride) if n]
        terms += [f"within({load(i, 'long')}, {size}) * {step}" for i, step, size in one.gathered]
        return f"m{one.storage}[{' + '.join(terms)}]"

    def load(one: Access, kind: str) -> str:
        key = (shape, one)
        if key not in known and not one.gathered and one.level < depth:  # once, before the loop
            known[key] = f"c{len(known)}"
            before[one.level].append(f"const {ctype(one.dtype)} {known[key]} = {address(one)};")
        value = known.get(key) or address(one)
        return value if ctype(one.dtype) == kind else f"({kind}){value}"

    for n, s in enumerate(group.statements):
        place, kind, level = address(s.out), ctype(s.out.dtype), s.out.level
        value = s.text.format(*(load(one, s.compute) for one in s.operands))
        if s.out.dtype is torch.bool:
            value = f"({value}) != 0"
        combine, first = _KINDS[s.kind or "sum"]
        if s.kind is None:
            body.append(f"const {kind} v{n} = {value};")
            body += [f"{place} = v{n};"] if s.out.gathered or s.out.storage in stored else []
            known[shape, s.out] = f"v{n}"
        elif s.out.gathered:
            body.append(f"{place} = {combine.format(place, f'({kind})({value})')};")
        else:  # in a register; but in memory as well, where several totals take turns
            first = place if s.adds else first
            if not s.adds and 0 in s.out.stride[:level]:
                loops = [_for(d, shape[d]) for d, step in enumerate(s.out.stride) if step]
                ahead.append(f"{' '.join(loops)} {place} = {first};")
                first = place
            before[level].append(f"{kind} r{n} = {first};")
            body.append(f"r{n} = {combine.format(f'r{n}', f'({kind})({value})')};")
            after[level].append(f"{place} = r{n};")
            sums += [f"r{n}"] if level < depth else []
    lines = ["{", *ahead]
    for d, size in enumerate(shape):
        lines += before[d]
        if d == depth - 1 and size > _SHORT and not any(s.is_serial for s in group.statements):
            clause = f" reduction(+ : {', '.join(sums)})" if sums else ""
            lines.append(f"#pragma omp simd{clause}")
        lines.append(f"{_for(d, size)} {{")
    lines += [*before[depth], *body, *after[depth]]
    for d in reversed(range(depth)):
        lines += ["}", *after[d]]
    return [*lines, "}"]


def _for(d: int, size: int) -> str:
    return f"for (long i{d} = 0; i{d} < {size}; i{d}++)"


def ctype(dtype: torch.dtype) -> str:
    """The C type of a dtype; raises `Unemittable` if there is none here."""
    if dtype not in _CTYPES:
        raise Unemittable(f"a tensor of {dtype}")
    return _CTYPES[dtype]


def number(value: Any, kind: str) -> str:
    """A Python number as a C literal."""
    if kind not in ("float", "double"):
        return f"({int(value)}L)"
    if not math.isfinite(value):
        return "NAN" if math.isnan(value) else f"({'-' * (value < 0)}INFINITY)"
    value = float(value)
    text = repr(value) if value.is_integer() and abs(value) < 1e15 else value.hex()
    return f"({text}{'f' if kind == 'float' else ''})"


_HEADERS = Path(__file__).parent
_SPECIAL, _MATRICES = (_HEADERS / "special.h").read_text(), (_HEADERS / "matrices.h").read_text()
