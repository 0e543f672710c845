"""Writes a record as a C function.

The function repeats the record `count` times on memory that it is given by address:

    long run(char **in, const long *stride, char *work, long count, long (*call)(long, long));

`in` has the address of each outer storage. After every repetition it moves by `stride` bytes, so
that a batch or a draw can have one place for each repetition; most strides are 0. `work` is scratch
memory for what the operations make. `call(i, k)` runs operation i of repetition k by torch, for
operations that have no form in C; if it returns a nonzero number, `run` ends. It returns how many
repetitions were completed.

Operations become statements, and statements become loops. A statement joins a loop over the same
shape that is there already where all that it reads has been computed by then, so that values pass
from one statement to the next in registers.
"""

from __future__ import annotations

__all__ = ["Access", "Emitter", "Source", "Unemittable"]

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from pyro_vi.compiling.tape import Op, Record, Ref

CTYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bool: "unsigned char",
    torch.uint8: "unsigned char",
    torch.int32: "int",
    torch.int64: "long",
}
_PART = 150  # statements of a C function: compilers take more than linear time for longer ones


class Unemittable(Exception):
    """A record that has no form in C."""


class Access(NamedTuple):
    """An address as a function of a loop's indices.

    Attributes:
        stride: a step for each index.
        gathered: steps by values that lie in memory: where an index lies, the step for it, and the
            bound of the index.
    """

    storage: int
    offset: int
    stride: tuple[int, ...]
    dtype: torch.dtype
    gathered: tuple[tuple[Access, int, int], ...] = ()


@dataclass
class _Statement:
    """An assignment in a loop.

    Attributes:
        text: an expression with {0}, {1}... for the operands.
        combine: how a reduction joins a value, {1}, to what it has, {0}; None for an assignment.
        start: what a reduction begins with; None to begin with what lies there.
        compute: the C type that operands are cast to.
    """

    out: Access
    text: str
    operands: tuple[Access, ...]
    compute: str
    combine: str | None = None
    start: str | None = None


@dataclass
class _Group:
    """Statements in one loop nest, or lines of code of their own."""

    shape: tuple[int, ...] | None
    statements: list[_Statement] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    touched: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return max(1, len(self.statements) + len(self.lines))


class Source(NamedTuple):
    """A C function, and what it has to be given.

    Attributes:
        text: the source.
        outer: the storages whose addresses `in` has, in their order.
        work: the size of the scratch memory in bytes.
        places: where inner storages lie in it, for operations that torch runs.
        calls: the operations that torch runs.
        cost: about how many multiplications and additions a repetition takes.
    """

    text: str
    outer: list[int]
    work: int
    places: dict[int, int]
    calls: list[Op]
    cost: int


class Emitter:
    """Collects the statements of a record; `pyro_vi.compiling.operations` adds them.

    Args:
        record: a clean record.
        outer: storages that lie outside of the scratch memory besides the record's outer ones.
    """

    def __init__(self, record: Record, outer: Iterable[int] = ()) -> None:
        self.record = record
        self.calls: list[Op] = []
        self.cost = 0
        self.helpers: set[str] = set()
        self.read = {ref.storage for op in record.ops if not op.is_view for ref in op.reads()}
        self.read |= {ref.storage for ref in record.outputs}
        self._outer = set(outer) | {
            i for i, storage in enumerate(record.storages) if not storage.is_inner
        }
        self._groups: list[_Group] = []
        self._by_shape: dict[tuple[int, ...], list[int]] = {}
        self._writers: dict[int, dict[Any, int]] = {}
        self._readers: dict[int, dict[Any, int]] = {}
        self._last_call = -1

    # What operations are made of.

    def assign(
        self, out: Ref, text: str, *operands: Any, compute: torch.dtype | None = None
    ) -> None:
        """out[i] = text for every index i; operands are broadcast, and numbers are written out.

        Args:
            compute: the dtype that operands are cast to; that of `out` by default.
        """
        kind = ctype(out.dtype if compute is None else compute)
        self._add(
            out.shape,
            _Statement(self.access(out, out.shape), *self._filled(text, operands, out.shape, kind)),
        )

    def reduce(
        self,
        out: Ref,
        source: Any,
        dims: Sequence[int],
        combine: str | None,
        start: str | None,
        *,
        shape: Sequence[int] = (),
        text: str = "{0}",
        compute: torch.dtype | None = None,
    ) -> None:
        """Joins the elements of a source along some dimensions.

        Args:
            source: operands of `text`.
            dims: of the source's shape.
            combine: how a value {1} joins what there is, {0}.
            start: what there is at first; None for what lies in `out`.
            shape: of the source, that it is broadcast to.
        """
        operands = (source,) if isinstance(source, Ref) else source
        kept = [d for d in range(len(shape)) if d not in dims]
        squeezed = [s for n, s in zip(out.shape, out.stride, strict=True) if n != 1]
        left = iter(squeezed)
        strides = [0] * len(shape)
        for d in kept:
            strides[d] = next(left) if shape[d] != 1 else 0
        access = Access(out.storage, out.offset, tuple(strides), out.dtype)
        kind = ctype(out.dtype if compute is None else compute)
        if 0 in shape:
            self.assign(out, start or "0")
            return
        text, found, kind = self._filled(text, operands, shape, kind)
        if start is not None and all(shape[d] == 1 for d in dims):
            combine = start = None
        self._add(shape, _Statement(access, text, found, kind, combine, start))

    def scatter(self, out: Access, value: Any, shape: Sequence[int], *, adds: bool) -> None:
        """Writes a value into gathered places, or adds it to what is there."""
        found = self._filled("{0}", (value,), shape, ctype(out.dtype))
        self._add(shape, _Statement(out, *found, "{0} + {1}" if adds else None))

    def code(
        self, lines: Sequence[str], reads: Iterable[Ref], writes: Iterable[Ref], cost: int
    ) -> None:
        """Lines of C, in which `m3` is the address of storage 3; see `at`."""
        self.cost += cost
        reads, writes = list(reads), list(writes)
        group = _Group(None, [], list(lines), tuple(r.storage for r in (*reads, *writes)))
        self._groups.append(group)
        place = len(self._groups) - 1
        for ref in reads:
            self._readers.setdefault(ref.storage, {})[None] = place
        for ref in writes:
            self._writers.setdefault(ref.storage, {})[None] = place

    def call(self, op: Op) -> None:
        """Lets torch run an operation."""
        line = f"if (call({len(self.calls)}, step)) return 1;"
        self.calls.append(op)
        numel = sum(ref.numel for ref in (*op.reads(), *op.outs))
        self.code([line], op.reads(), op.writes(), numel)

    def access(self, ref: Ref, shape: Sequence[int]) -> Access:
        """A tensor, broadcast to a shape."""
        lead = len(shape) - len(ref.shape)
        stride = [0] * lead
        for size, step in zip(ref.shape, ref.stride, strict=True):
            stride.append(0 if size == 1 else step)
        return Access(ref.storage, ref.offset, tuple(stride), ref.dtype)

    def at(self, ref: Ref, *index: str) -> str:
        """An element of a tensor, as an expression."""
        terms = [
            f"{i} * {step}" for i, step in zip(index, ref.stride, strict=True) if step and i != "0"
        ]
        return f"m{ref.storage}[{' + '.join([str(ref.offset), *terms])}]"

    def _filled(
        self, text: str, operands: Sequence[Any], shape: Sequence[int], kind: str
    ) -> tuple[str, tuple[Access, ...], str]:
        """A text whose numbers are written out, and its operands in memory."""
        names, found = [], []
        for one in operands:
            if isinstance(one, Ref):
                one = self.access(one, shape)
            if isinstance(one, Access):
                names.append(f"{{{len(found)}}}")
                found.append(one)
            else:
                names.append(number(one, kind))
        suffix = "f" if kind == "float" else ""
        return text.format(*names, f=suffix), tuple(found), kind

    # Which loop a statement joins.

    def _add(self, shape: Sequence[int], statement: _Statement) -> None:
        if 0 in shape:
            return
        self.cost += math.prod(shape)
        shape, statement = _collapsed(tuple(shape), statement)
        first = 0
        uses = _reads(statement)
        for one in uses:
            for key, place in self._writers.get(one.storage, {}).items():
                is_same = key == _key(shape, one) and not one.gathered
                first = max(first, place if is_same else place + 1)
        out = statement.out
        is_plain = statement.combine is None and not out.gathered
        for held in (self._writers, self._readers):
            for key, place in held.get(out.storage, {}).items():
                is_same = is_plain and key == _key(shape, out)
                first = max(first, place if is_same else place + 1)
        place = self._join(shape, first)
        self._groups[place].statements.append(statement)
        for one in uses:
            readers = self._readers.setdefault(one.storage, {})
            key = None if one.gathered else _key(shape, one)
            readers[key] = max(readers.get(key, 0), place)
        writers = self._writers.setdefault(out.storage, {})
        key = _key(shape, out) if is_plain else None
        writers[key] = max(writers.get(key, 0), place)

    def _join(self, shape: tuple[int, ...], first: int) -> int:
        """The first group of a shape that does not come before `first`."""
        places = self._by_shape.setdefault(shape, [])
        for place in reversed(places):
            if place < first:
                break
            if len(self._groups[place].statements) < _PART:
                return place
        self._groups.append(_Group(shape))
        places.append(len(self._groups) - 1)
        return len(self._groups) - 1

    # The text.

    def source(self) -> Source:
        """The function."""
        in_memory = self._stored()
        used = sorted({s for g in self._groups for s in _touched(g) if s in in_memory})
        outer = [s for s in used if s in self._outer]
        places, work = {}, 0
        for s in used:
            if s not in self._outer:
                storage = self.record.storages[s]
                places[s] = work
                work += -(-storage.size * _width(storage.dtype) // 64) * 64 + 64
        parts: list[list[str]] = []
        pointers: list[set[int]] = []
        count = _PART
        for group in self._groups:
            if count + group.length > _PART:
                parts.append([])
                pointers.append(set())
                count = 0
            count += group.length
            parts[-1] += group.lines if group.shape is None else _nest(group, in_memory)
            pointers[-1] |= {s for s in _touched(group) if s in in_memory}
        text = ["#include <math.h>", *(_HELPERS[name] for name in sorted(self.helpers)), ""]
        number_of = {s: i for i, s in enumerate(outer)}
        head = "(char **in, char *work, long step, long (*call)(long, long))"
        for i, (lines, needed) in enumerate(zip(parts, pointers, strict=True)):
            text.append(f"static __attribute__((noinline)) long part{i}{head} {{")
            for s in sorted(needed):
                kind = ctype(self.record.storages[s].dtype)
                where = f"in[{number_of[s]}]" if s in number_of else f"(work + {places[s]})"
                text.append(f"  {kind} *restrict m{s} = ({kind} *){where};")
            text += [f"  {line}" for line in lines]
            text += ["  return 0;", "}"]
        text += [
            "long run(char **start, const long *stride, char *work, long count,"
            " long (*call)(long, long)) {",
            f"  char *in[{max(1, len(outer))}];",
            "  for (long step = 0; step < count; step++) {",
            f"    for (long i = 0; i < {len(outer)}; i++) in[i] = start[i] + step * stride[i];",
            *(f"    if (part{i}(in, work, step, call)) return step;" for i in range(len(parts))),
            "  }",
            "  return count;",
            "}",
        ]
        return Source("\n".join(text) + "\n", outer, max(work, 64), places, self.calls, self.cost)

    def _stored(self) -> set[int]:
        """The storages that lie in memory: outer ones, and those that several loops use."""
        stored, where = set(self._outer), dict[int, int]()
        outputs = {ref.storage for ref in self.record.outputs}
        for i, group in enumerate(self._groups):
            local: set[Any] = set()
            if group.shape is None:
                stored |= set(group.touched)
                continue
            for statement in group.statements:
                for access in _reads(statement):
                    if _key(group.shape, access) not in local or access.gathered:
                        stored.add(access.storage)
                    if where.setdefault(access.storage, i) != i:
                        stored.add(access.storage)
                out = statement.out
                if where.setdefault(out.storage, i) != i or out.gathered or statement.combine:
                    stored.add(out.storage)
                local.add(_key(group.shape, out))
        return stored | outputs


def _touched(group: _Group) -> set[int]:
    if group.shape is None:
        return set(group.touched)
    found = set()
    for statement in group.statements:
        found |= {statement.out.storage, *(one.storage for one in _reads(statement))}
    return found


def _reads(statement: _Statement) -> list[Access]:
    """All that a statement loads, the indices of gathered places too."""
    every = [*statement.operands, *(g[0] for g in statement.out.gathered)]
    return every + [g[0] for one in statement.operands for g in one.gathered]


def _key(shape: tuple[int, ...], access: Access) -> Any:
    """Under which a value is known in a loop over a shape."""
    return (shape, access.storage, access.offset, access.stride, access.dtype)


def _collapsed(shape: tuple[int, ...], statement: _Statement) -> tuple[tuple[int, ...], _Statement]:
    """The same statement in as few loops as possible."""
    every = [statement.out, *statement.operands]
    every += [g[0] for one in every for g in one.gathered]
    dims = [d for d in range(len(shape)) if shape[d] != 1]
    sizes: list[int] = []
    firsts: list[int] = []  # of joined dimensions: the one that moves in the smallest steps
    for d in dims:
        if sizes and all(one.stride[firsts[-1]] == one.stride[d] * shape[d] for one in every):
            sizes[-1] *= shape[d]
            firsts[-1] = d
        else:
            sizes.append(shape[d])
            firsts.append(d)

    def only(one: Access) -> Access:
        gathered = tuple((only(index), step, size) for index, step, size in one.gathered)
        return one._replace(stride=tuple(one.stride[d] for d in firsts), gathered=gathered)

    out = only(statement.out)
    return tuple(sizes), _Statement(
        out, statement.text, tuple(map(only, statement.operands)), statement.compute,
        statement.combine, statement.start,
    )  # fmt: skip


def _nest(group: _Group, stored: set[int]) -> list[str]:
    """A group as nested loops."""
    shape = group.shape
    assert shape is not None
    depth = len(shape)
    before: list[list[str]] = [[] for _ in range(depth + 1)]  # before the loop over each index
    after: list[list[str]] = [[] for _ in range(depth + 1)]
    ahead: list[str] = []
    body: list[str] = []
    known: dict[Any, str] = {}
    sums: list[str] = []  # over the last index
    is_simple = depth > 0  # so that the compiler may reorder the last loop

    def address(one: Access) -> str:
        terms = [str(one.offset)] if one.offset else []
        for d, step in enumerate(one.stride):
            if step:
                terms.append(f"i{d} * {step}" if step != 1 else f"i{d}")
        for index, step, size in one.gathered:
            terms.append(f"within({load(index)}, {size}) * {step}")
        return f"m{one.storage}[{' + '.join(terms) or '0'}]"

    def load(one: Access) -> str:
        name = None if one.gathered else known.get(_key(shape, one))
        return address(one) if name is None else name

    for n, statement in enumerate(group.statements):
        out = statement.out
        kind = ctype(out.dtype)
        values = [f"({statement.compute})({load(one)})" for one in statement.operands]
        value = statement.text.format(*values)
        if out.dtype is torch.bool:
            value = f"({value}) != 0"
        if statement.combine is None and not out.gathered:
            body.append(f"const {kind} v{n} = {value};")
            known[_key(shape, out)] = f"v{n}"
            if out.storage in stored:
                body.append(f"{address(out)} = v{n};")
            continue
        if statement.combine is None:
            is_simple = False
            body.append(f"{address(out)} = {value};")
            continue
        level = max((d + 1 for d, step in enumerate(out.stride) if step), default=0)
        if out.gathered or level == depth or not all(out.stride[:level]):
            is_simple = False
            if statement.start is not None:
                loops = (d for d, step in enumerate(out.stride) if step)
                head = "".join(f"{_for(d, shape[d])} " for d in loops)
                ahead.append(f"{head}{address(out)} = {statement.start};")
            joined = statement.combine.format(address(out), f"({kind})({value})")
            body.append(f"{address(out)} = {joined};")
            continue
        wide = "double" if kind == "float" else kind  # sums of single precision too
        begin = statement.start if statement.start is not None else address(out)
        before[level].append(f"{wide} r{n} = {begin};")
        body.append(f"r{n} = {statement.combine.format(f'r{n}', f'({wide})({value})')};")
        after[level].append(f"{address(out)} = r{n};")
        is_simple = is_simple and statement.combine == "{0} + {1}" and level == depth - 1
        sums.append(f"r{n}")
    lines = ["{", *ahead]
    for d, size in enumerate(shape):
        lines += before[d]
        if d == depth - 1 and is_simple and sums:
            lines.append(f"#pragma omp simd reduction(+ : {', '.join(sums)})")
        lines.append(f"{_for(d, size)} {{")
    lines += [*before[depth], *body, *after[depth]]
    for d in reversed(range(depth)):
        lines += ["}", *after[d]]
    return [*lines, "}"]


def _for(d: int, size: int) -> str:
    return f"for (long i{d} = 0; i{d} < {size}; i{d}++)"


def ctype(dtype: torch.dtype) -> str:
    """The C type of a dtype.

    Raises:
        Unemittable: there is none here.
    """
    if dtype not in CTYPES:
        raise Unemittable(f"a tensor of {dtype}")
    return CTYPES[dtype]


def number(value: Any, kind: str) -> str:
    """A Python number as a C literal."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if kind in ("float", "double"):
        value = float(value)
        if math.isnan(value):
            return "NAN"
        if math.isinf(value):
            return "INFINITY" if value > 0 else "(-INFINITY)"
        text = value.hex() + ("f" if kind == "float" else "")
    else:
        text = f"{int(value)}L"
    return f"({text})"


def _width(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


_HELPERS = {
    "within": (
        "static inline long within(long i, long n) {\n"
        "  i = i < 0 ? i + n : i;\n  return i < 0 ? 0 : i >= n ? n - 1 : i;\n}"
    ),
    "digamma": """static double digamma(double x) {
  double found = 0;
  if (x == 0) return copysign(INFINITY, -x);
  if (x < 0) {
    double whole;
    if (modf(x, &whole) == 0) return NAN;
    found = -M_PI / tan(M_PI * (x - whole));
    x = 1 - x;
  }
  for (; x < 10; x += 1) found -= 1 / x;
  double z = 1 / (x * x);
  return found + log(x) - 0.5 / x
    - z * (1.0 / 12 - z * (1.0 / 120 - z * (1.0 / 252 - z * (1.0 / 240 - z * (1.0 / 132
    - z * (691.0 / 32760 - z / 12))))));
}""",
    "trigamma": """static double trigamma(double x) {
  double sign = 1, found = 0;
  if (x < 0.5) {
    double s = sin(M_PI * x);
    found = -M_PI * M_PI / (s * s);
    sign = -1;
    x = 1 - x;
  }
  for (int i = 0; i < 6; i++, x += 1) found += 1 / (x * x);
  double z = 1 / (x * x);
  return sign * (found + (1 + 1 / (2 * x) + z * (1.0 / 6 - z * (1.0 / 30 - z / 42))) / x);
}""",
}
