"""Writes a record as a C function.

The function repeats the record `count` times on memory that it is given by address:

    long run(char **in, const long *stride, char *work, long count, long (*call)(long, long));

`in` has the address of each outer storage. After every repetition it moves by `stride` bytes, so
that a batch or a draw can have one place for each repetition; most strides are 0. `work` is scratch
memory for what the operations make. `call(i, k)` runs operation i of repetition k by torch, for
operations that have no form in C; if it returns a nonzero number, `run` ends. `run` returns how
many repetitions it completed. It has no memory of its own.

Operations become statements, and statements become loops:

- A statement puts the dimensions that it walks through in the smallest steps last, and joins
  neighbouring dimensions where it can.
- It joins a loop over the same shape that is there already, if all that it reads has been computed
  by then. So values pass from one statement to the next in registers, and a storage that only one
  loop uses needs no memory.
- Loops whose iterations may run side by side are marked, so that the compiler makes vector
  instructions of them. Statements that it cannot vectorise are in loops of their own.
"""

from __future__ import annotations

__all__ = ["ADD", "Access", "Emitter", "Source", "Unemittable", "ctype"]

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi.compiling.tape import Op, Record, Ref, Storage

CTYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bool: "unsigned char",
    torch.uint8: "unsigned char",
    torch.int32: "int",
    torch.int64: "long",
}
ADD = "{0} + {1}"
_PART = 150  # statements of a C function: compilers take more than linear time for longer ones
_LONG = 50_000  # multiplications and additions for which the compiler may take longer
_SHORT = 15  # iterations that are not worth vector instructions
_LINE = 8  # steps after which memory is another line of the cache
_SCALAR = ("gamma(", "fmod", "_of(")  # what has no vector instructions


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

    @property
    def level(self) -> int:
        """In how many loops the address moves, or an outer one does."""
        return max((d + 1 for d, step in enumerate(self.stride) if step), default=0)


@dataclass(frozen=True)
class _Statement:
    """An assignment in a loop.

    Attributes:
        text: an expression with {0}, {1}... for the operands.
        compute: the C type that operands are cast to.
        combine: how a value, {1}, joins what is there, {0}; None for an assignment.
        start: what is there at first; None for what lies in `out`.
        total: the C type in which values are joined.
    """

    out: Access
    text: str
    operands: tuple[Access, ...]
    compute: str
    combine: str | None
    start: str | None
    total: str

    @property
    def reads(self) -> list[Access]:
        """All that it loads, indices too."""
        return [*self.operands, *(g[0] for one in (self.out, *self.operands) for g in one.gathered)]

    @property
    def is_plain(self) -> bool:
        """Whether it puts a value into a place of its own in each iteration."""
        return self.combine is None and not self.out.gathered

    @property
    def is_serial(self) -> bool:
        """Whether the compiler cannot vectorise it."""
        is_ordered = self.combine not in (None, ADD) or bool(self.out.gathered)
        return is_ordered or any(name in self.text for name in _SCALAR)

    @property
    def is_in_memory(self) -> bool:
        """Whether values that are joined take turns, so that no register holds the total."""
        return self.combine is not None and 0 in self.out.stride[: self.out.level]


@dataclass
class _Group:
    """Statements in one loop nest over a shape, or lines of C and the storages that they touch."""

    shape: tuple[int, ...] = ()
    statements: list[_Statement] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    by_lines: set[int] = field(default_factory=set)

    @property
    def touched(self) -> set[int]:
        """The storages that it reads and writes."""
        every = (one for s in self.statements for one in (s.out, *s.reads))
        return self.by_lines | {one.storage for one in every}


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
        outer: storages that are the first ones in `in`, whether they are the record's outer ones
            or not.
    """

    def __init__(self, record: Record, outer: Iterable[int] = ()) -> None:
        self.record = record
        self.calls: list[Op] = []
        self.cost = 0
        self._first = list(outer)
        self._outer = {i for i, one in enumerate(record.storages) if not one.is_inner}
        self._outer.update(self._first)
        self._groups: list[_Group] = []
        self._by_shape: dict[Any, list[int]] = {}
        # The last group that writes or reads a storage, by the key of the access.
        self._writers: dict[int, dict[Any, int]] = {}
        self._readers: dict[int, dict[Any, int]] = {}
        # What lies in a storage as long as it is not written again: a number, or fewer elements.
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
        found = self._inputs(operands, shape)
        self._same.pop(out.storage, None)
        if isinstance(out, Ref) and not adds and 0 not in shape:
            if text == "{0}" and not isinstance(found[0], Access):
                value = torch.tensor(found[0], dtype=out.dtype).item()
                found, self._same[out.storage] = (value,), (out, value)
            elif text != "{0}" and (moving := _moving(shape, found)) != [n > 1 for n in shape]:
                part = self.scratch(
                    [n if m else 1 for n, m in zip(shape, moving, strict=True)], out.dtype
                )
                self._state(access(part, shape), text, found, part.shape, compute or out.dtype)
                same = part._replace(shape=shape, stride=access(part, shape).stride)
                self._same[out.storage] = (out, same)
                text, found, compute = "{0}", (access(same, shape),), None
        kind = compute or out.dtype
        self._state(access(out, shape), text, found, shape, kind, ADD if adds else None)

    def reduce(
        self, out: Ref, text: str, *operands: Any, shape: Sequence[int], dims: Sequence[int],
        combine: str = ADD, start: str | None = "0", compute: torch.dtype | None = None,
        total: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Joins the elements of an expression over a shape along some of its dimensions.

        Args:
            out: has these dimensions with size 1, or does not have them.
            combine: how an element {1} joins those before it, {0}.
            start: what is there at first; None for what lies in `out`.
            total: the dtype in which they are joined; double for single precision by default.
        """
        if 0 in shape:
            self.assign(out, start or "{0}", *([] if start else [out]))
            return
        steps = iter([s for n, s in zip(out.shape, out.stride, strict=True) if n != 1])
        stride = [0 if d in dims or n == 1 else next(steps) for d, n in enumerate(shape)]
        place = Access(out.storage, out.offset, tuple(stride), out.dtype)
        found = self._inputs(operands, shape)
        self._same.pop(out.storage, None)
        same = [d for d in dims if shape[d] > 1 and not _moving(shape, found)[d]]
        if combine == ADD and same:
            found = (*found, math.prod(shape[d] for d in same))
            text = f"{{{len(found) - 1}}} * ({text})"
            shape = [1 if d in same else n for d, n in enumerate(shape)]
        is_one = start is not None and all(shape[d] == 1 for d in dims)
        if total is None:
            total = torch.float64 if out.dtype is torch.float32 else out.dtype
        if is_one:
            self._state(place, text, found, shape, compute or out.dtype, total=total)
        else:
            self._state(place, text, found, shape, compute or out.dtype, combine, start, total)

    def _inputs(self, operands: Sequence[Any], shape: Sequence[int]) -> tuple[Any, ...]:
        """Operands as accesses and numbers."""
        found = []
        for one in operands:
            if isinstance(one, Ref) and self._same.get(one.storage, (None,))[0] == one:
                one = self._same[one.storage][1]
            found.append(access(one, shape) if isinstance(one, (Ref, Access)) else one)
        return tuple(found)

    def _state(
        self, out: Access, text: str, found: Sequence[Any], shape: Sequence[int],
        compute: torch.dtype, combine: str | None = None, start: str | None = None,
        total: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Adds a statement."""
        if 0 in shape:
            return
        kind, total = ctype(compute), total or out.dtype
        self.cost += math.prod(shape)
        names, loaded = list[str](), list[Access]()
        for one in found:
            if isinstance(one, Access):
                names.append(f"{{{len(loaded)}}}")
                loaded.append(one)
            else:
                names.append(number(one, kind))
        text = text.format(*names, f="f" if kind == "float" else "")
        s = _Statement(out, text, tuple(loaded), kind, combine, start, ctype(total))
        shape, s = _arranged(shape, s)
        if not s.is_in_memory or total is out.dtype:
            self._add(shape, s)
            return
        # Totals in memory have the precision of those in registers.
        moving = [d for d, step in enumerate(s.out.stride) if step]
        sums = self.scratch([shape[d] for d in moving], total)
        steps = iter(sums.stride)
        stride = tuple(next(steps) if step else 0 for step in s.out.stride)
        place = s.out._replace(stride=tuple(s.out.stride[d] for d in moving))
        total_at = Access(sums.storage, 0, stride, total)
        self._add(shape, replace(s, out=total_at, start=start or "0"))
        found = (access(sums, sums.shape), place)
        self._state(place, "{0}" if start else ADD, found, sums.shape, total)

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> Ref:
        """Memory for a result in between."""
        return self.record.allocate(shape, dtype, torch.device("cpu"))

    def constant(self, tensor: Tensor) -> Ref:
        """A contiguous tensor that does not change."""
        self.record.storages.append(
            Storage(tensor.numel(), tensor.dtype, tensor.device, tensor.view(-1))
        )
        self._outer.add(len(self.record.storages) - 1)
        shape, stride = tuple(tensor.shape), tensor.stride()
        return Ref(len(self.record.storages) - 1, 0, shape, stride, tensor.dtype)

    def code(
        self, lines: Sequence[str], reads: Iterable[Ref], writes: Iterable[Ref], cost: int
    ) -> None:
        """Lines of C, in which `m3` is the address of storage 3; see `at`."""
        self.cost += cost
        group = _Group(lines=list(lines))
        for uses, refs in ((self._readers, reads), (self._writers, writes)):
            for ref in refs:
                uses.setdefault(ref.storage, {})[None] = len(self._groups)
                group.by_lines.add(ref.storage)
                self._same.pop(ref.storage, None)
        self._groups.append(group)

    def call(self, op: Op) -> None:
        """Lets torch run an operation."""
        line = f"if (call({len(self.calls)}, step)) return 1;"
        self.calls.append(op)
        numel = sum(ref.numel for ref in (*op.reads(), *op.outs))
        self.code([line], op.reads(), op.writes(), numel)

    def at(self, ref: Ref, *index: str) -> str:
        """An element of a tensor, as an expression."""
        steps = zip(index, ref.stride, strict=True)
        terms = [str(ref.offset), *(f"{i} * {step}" for i, step in steps if step and i != "0")]
        return f"m{ref.storage}[{' + '.join(terms)}]"

    # Which loop a statement joins.

    def _add(self, shape: tuple[int, ...], statement: _Statement) -> None:
        out, reads = statement.out, [(one, _key(shape, one)) for one in statement.reads]
        written = _key(shape, out) if statement.is_plain else None
        first = max(_after(self._writers, one, key) for one, key in [*reads, (out, written)])
        first = max(first, _after(self._readers, out, written))
        place = self._group(shape, statement.is_serial and math.prod(shape) > _SHORT, first)
        self._groups[place].statements.append(statement)
        for uses, one, key in [(self._readers, *read) for read in reads] + [
            (self._writers, out, written)
        ]:
            held = uses.setdefault(one.storage, {})
            held[key] = max(held.get(key, 0), place)

    def _group(self, shape: tuple[int, ...], is_serial: bool, first: int) -> int:
        """The last group for such a statement, if it does not come before `first`; or a new one."""
        places = self._by_shape.setdefault((shape, is_serial), [])
        if not places or places[-1] < first or len(self._groups[places[-1]].statements) >= _PART:
            self._groups.append(_Group(shape))
            places.append(len(self._groups) - 1)
        return places[-1]

    # The text.

    def source(self) -> Source:
        """The function."""
        self._drop_unread()
        stored = self._stored()
        used = {s for group in self._groups for s in group.touched if s in stored}
        used |= {ref.storage for ref in self.record.outputs}
        places, work = dict[int, int](), 0
        for s in sorted(used - self._outer):
            storage = self.record.storages[s]
            places[s] = work
            work += -(-storage.size * storage.dtype.itemsize // 64) * 64 + 64
        outer = [*self._first, *sorted((used & self._outer).difference(self._first))]
        where = {s: f"in[{i}]" for i, s in enumerate(outer)}
        where |= {s: f"(work + {place})" for s, place in places.items()}
        parts: list[tuple[list[str], set[int]]] = []
        count = _PART
        for group in self._groups:
            length = max(1, len(group.statements) + len(group.lines))
            if count + length > _PART:
                parts.append(([], set()))
                count = 0
            count += length
            lines, touched = parts[-1]
            lines += group.lines or _nest(group, stored)
            touched |= group.touched & used
        text = list[str]()
        for i, (lines, touched) in enumerate(parts):
            text.append(f"static __attribute__((noinline)) long part{i}({_ARGUMENTS}) {{")
            for s in sorted(touched):
                kind = ctype(self.record.storages[s].dtype)
                text.append(f"  {kind} *restrict m{s} = ({kind} *){where[s]};")
            text += [*(f"  {line}" for line in lines), "  return 0;", "}"]
        text += [
            "long run(char **start, const long *stride, char *work, long count,",
            "         long (*call)(long, long)) {",
            f"  char *in[{max(1, len(outer))}];",
            "  for (long step = 0; step < count; step++) {",
            f"    for (long i = 0; i < {len(outer)}; i++) in[i] = start[i] + step * stride[i];",
            *(f"    if (part{i}(in, work, step, call)) return step;" for i in range(len(parts))),
            "  }",
            "  return count;",
            "}",
        ]
        body = "\n".join(text) + "\n"
        helpers = [code for name, code in _HELPERS.items() if f"{name}(" in body]
        pragma = ['#pragma GCC optimize ("O3")'] if self.cost > _LONG else []
        body = "\n".join([_HEAD, *pragma, *helpers, body])
        return Source(body, outer, max(work, 64), places, self.calls, self.cost)

    def _drop_unread(self) -> None:
        """Drops statements whose result nothing reads."""
        live = self._outer | {ref.storage for ref in self.record.outputs}
        for group in reversed(self._groups):
            kept = list[_Statement]()
            for s in reversed(group.statements):
                if s.out.storage in live:
                    kept.append(s)
                    live |= {one.storage for one in s.reads}
            group.statements = kept[::-1]
            live |= group.by_lines
        self._groups = [one for one in self._groups if one.statements or one.lines]

    def _stored(self) -> set[int]:
        """The storages that lie in memory: all but those whose values stay within one loop."""
        stored = self._outer | {ref.storage for ref in self.record.outputs}
        for group in self._groups:
            stored |= group.by_lines
            local = set[Any]()
            for statement in group.statements:
                keys = ((one.storage, _key(group.shape, one)) for one in statement.reads)
                stored |= {storage for storage, key in keys if key not in local}
                if statement.is_plain:
                    local.add(_key(group.shape, statement.out))
                else:
                    stored.add(statement.out.storage)
        return stored


def access(one: Ref | Access, shape: Sequence[int]) -> Access:
    """A tensor, broadcast to a shape."""
    if isinstance(one, Access):
        return one
    lead = [0] * (len(shape) - len(one.shape))
    steps = [0 if n == 1 else s for n, s in zip(one.shape, one.stride, strict=True)]
    return Access(one.storage, one.offset, (*lead, *steps), one.dtype)


def _moving(shape: Sequence[int], found: Sequence[Any]) -> list[bool]:
    """Which dimensions operands move along."""
    every = [one for one in found if isinstance(one, Access)]
    every += [index for one in every for index, _, _ in one.gathered]
    return [n > 1 and any(one.stride[d] for one in every) for d, n in enumerate(shape)]


def _key(shape: tuple[int, ...], one: Access) -> Any:
    """Under which a value is known in a loop over a shape; None for a gathered one."""
    return None if one.gathered else (shape, one.storage, one.offset, one.stride, one.dtype)


def _after(uses: dict[int, dict[Any, int]], one: Access, key: Any) -> int:
    """The first group after all uses of a storage; uses under the same key may be in one group."""
    return max(
        (
            place if key == other and key is not None else place + 1
            for other, place in uses.get(one.storage, {}).items()
        ),
        default=0,
    )


def _arranged(shape: Sequence[int], s: _Statement) -> tuple[tuple[int, ...], _Statement]:
    """The same statement in as few loops as possible, with the smallest steps in the last one."""
    every = [s.out, s.out, *s.operands]
    every += [index for one in every for index, _, _ in one.gathered]
    dims = [d for d in range(len(shape)) if shape[d] != 1]
    if not s.out.gathered:
        dims.sort(key=lambda d: -sum(min(abs(one.stride[d]), _LINE) for one in every))
    sizes, inner = list[int](), list[int]()  # of joined dimensions: the one with the smallest steps
    for d in dims:
        if sizes and all(one.stride[inner[-1]] == one.stride[d] * shape[d] for one in every):
            sizes[-1] *= shape[d]
            inner[-1] = d
        else:
            sizes.append(shape[d])
            inner.append(d)

    def moved(one: Access) -> Access:
        gathered = tuple((moved(index), step, size) for index, step, size in one.gathered)
        return one._replace(stride=tuple(one.stride[d] for d in inner), gathered=gathered)

    operands = tuple(map(moved, s.operands))
    return tuple(sizes), _Statement(
        moved(s.out), s.text, operands, s.compute, s.combine, s.start, s.total
    )


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
        key, level = _key(shape, one), one.level
        if key not in known and key is not None and level < depth:  # once, before the loop
            known[key] = f"c{len(known)}"
            before[level].append(f"const {ctype(one.dtype)} {known[key]} = {address(one)};")
        value = known.get(key) or address(one)
        return value if ctype(one.dtype) == kind else f"({kind}){value}"

    for n, s in enumerate(group.statements):
        place, kind = address(s.out), ctype(s.out.dtype)
        value = s.text.format(*(load(one, s.compute) for one in s.operands))
        if s.out.dtype is torch.bool:
            value = f"({value}) != 0"
        if s.combine is None:
            body.append(f"const {kind} v{n} = {value};")
            if s.out.gathered or s.out.storage in stored:
                body.append(f"{place} = v{n};")
            if not s.out.gathered:
                known[_key(shape, s.out)] = f"v{n}"
        elif s.out.gathered:
            body.append(f"{place} = {s.combine.format(place, f'({kind})({value})')};")
        else:
            start = s.start or place
            if s.is_in_memory and s.start is not None:
                loops = [_for(d, shape[d]) for d, step in enumerate(s.out.stride) if step]
                ahead.append(f"{' '.join(loops)} {place} = {start};")
                start = place
            before[s.out.level].append(f"{s.total} r{n} = {start};")
            body.append(f"r{n} = {s.combine.format(f'r{n}', f'({s.total})({value})')};")
            after[s.out.level].append(f"{place} = r{n};")
            sums += [f"r{n}"] if s.out.level < depth else []
    lines = ["{", *ahead]
    for d, size in enumerate(shape):
        lines += before[d]
        is_last = d == depth - 1 and size > _SHORT
        if is_last and not any(s.is_serial for s in group.statements):
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
    """The C type of a dtype.

    Raises:
        Unemittable: there is none here.
    """
    if dtype not in CTYPES:
        raise Unemittable(f"a tensor of {dtype}")
    return CTYPES[dtype]


def number(value: Any, kind: str) -> str:
    """A Python number as a C literal."""
    if kind not in ("float", "double"):
        return f"({int(value)}L)"
    value = float(value)
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "(-INFINITY)"
    text = repr(value) if value.is_integer() and abs(value) < 1e15 else value.hex()
    return f"({text}{'f' if kind == 'float' else ''})"


_ARGUMENTS = "char **in, char *work, long step, long (*call)(long, long)"
_HEAD = """#define __FAST_MATH__ 1 /* then glibc declares vector forms of exp and others */
#include <math.h>
#undef __FAST_MATH__
"""
_HELPERS = {
    "within": """static inline long within(long i, long n) {
  i = i < 0 ? i + n : i;
  return i < 0 ? 0 : i >= n ? n - 1 : i;
}""",
    "digamma": """static double digamma(double x) {
  if (x == 0) return copysign(INFINITY, -x);
  if (x > 1e20) return log(x);
  if (x < 0) {
    double whole, rest = modf(x, &whole);
    return rest == 0 ? NAN : digamma(1 - x) - M_PI / tan(M_PI * rest);
  }
  /* The sum of 1 / (x + i) for i < 10, of which two make one fraction, and the series at x + 10. */
  double t = x * (x + 9), y = x + 10, z = 1 / (y * y), sum = (2 * t + 8) / (t * (t + 8))
    + (2 * t + 32) / ((t + 14) * (t + 18)) + 1 / (t + 20);
  return log(y) - 0.5 / y - (2 * x + 9) * sum
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
    "remainder_of": """static double remainder_of(double x, double y) {
  double found = fmod(x, y);
  return found != 0 && (y < 0) != (found < 0) ? found + y : found;
}""",
    "floor_of": """static double floor_of(double x, double y) {
  if (y == 0) return x / y;
  double rest = fmod(x, y), found = (x - rest) / y, whole = floor(found);
  if (rest != 0 && (y < 0) != (rest < 0)) found -= 1, whole = floor(found);
  return found == 0 ? 0 : found - whole > 0.5 ? whole + 1 : whole;
}""",
}
