"""Transforms records: guards what a step changes, and takes out what nothing needs.

`commit` makes a record a transaction: its operations work on copies of the outer memory that they
change, and the copies are written back only if a condition holds at the end. `clean` removes
copies, repeated operations and operations whose results are not read, in one pass forward and one
backward.
"""

from __future__ import annotations

__all__ = ["clean", "commit", "conditions_hold", "merge_draws"]

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pyro_vi.compiling.tape import CONSTANT, UNSET, Op, Record, Ref

_aten = torch.ops.aten


def conditions_hold(record: Record, *, fixed: int = CONSTANT) -> Ref | None:
    """Adds operations that decide whether the record stands for a run: a truth value.

    The conditions are the record's own, and that every index lies within its bounds.

    Args:
        fixed: the level up to which values never change, so that torch has checked these indices.

    Returns:
        Where the truth value lies; None if there are no conditions.
    """
    conditions = list(record.conditions)
    conditions += [(ref, True) for ref in _indices_within_bounds(record, fixed)]
    found: Ref | None = None
    for ref, answer in conditions:
        one = ref if answer else record.emit(_aten.logical_not.default, ref)
        if one.shape:
            one = record.emit(_aten.all.default, one)
        found = one if found is None else record.emit(_aten.logical_and.default, found, one)
    return found


def commit(record: Record, keep: Ref | None, copies: Mapping[int, int]) -> None:
    """Lets a record change outer memory at its end alone, and only if `keep` is true.

    Args:
        keep: a truth value that the record computes; None is true.
        copies: of outer storages, by the storages that hold their values from before the last run
            that changed them. They are updated under the same condition.
    """
    written = {
        ref.storage
        for op in record.ops
        for ref in op.writes()
        if not record.storages[ref.storage].is_inner
    }
    own: dict[int, tuple[int, int]] = {}
    ops, record.ops = record.ops, []
    for index in sorted(written):
        outer = _whole(record, index)
        inner = record.allocate(outer.shape, outer.dtype, record.storages[index].device)
        own[index] = (inner.storage, 0)
        record.write(inner, outer)
    record.ops += [_moved(op, own) for op in ops]
    record.outputs = [_move(ref, own) for ref in record.outputs]
    pairs = [(place, index) for index, place in copies.items()]
    pairs += [(index, inner) for index, (inner, _) in own.items()]
    for target, source in pairs:
        place, value = _whole(record, target), _whole(record, source)
        if keep is not None:
            value = record.emit(
                _aten.where.self,
                _move(keep, own),
                value,
                place,
                shape=place.shape,
                dtype=place.dtype,
            )
        record.write(place, value)


def clean(record: Record) -> Record:
    """The same record without copies, repetitions and what nothing reads.

    Every random operation stays, because it moves the generator.
    """
    changed = _changed_storages(record)
    versions: dict[int, int] = {}
    moved: dict[int, tuple[int, int]] = {}
    known: dict[Any, tuple[Ref, ...]] = {}
    ops: list[Op] = []
    for op in record.ops:
        op = _moved(op, moved)
        writes = list(op.writes())
        is_pure = not (op.is_random or op.func._schema.is_mutable) and not any(
            ref.storage in changed for ref in writes
        )
        if op.is_view or not is_pure or op.func in UNSET:
            for ref in writes:
                versions[ref.storage] = versions.get(ref.storage, 0) + 1
            ops.append(op)
            continue
        if (source := _copied(op)) is not None and source.storage not in changed:
            (out,) = op.outs
            moved[out.storage] = (source.storage, source.offset - out.offset)
            continue
        key = (
            op.func,
            _exact(op.args),
            _exact(tuple(sorted(op.kwargs.items()))),
            tuple((ref.shape, ref.stride, ref.dtype) for ref in op.outs),
            tuple(versions.get(ref.storage, 0) for ref in op.reads()),
        )
        if (same := known.get(key)) is not None:
            for out, old in zip(op.outs, same, strict=True):
                moved[out.storage] = (old.storage, old.offset - out.offset)
            continue
        known[key] = op.outs
        ops.append(op)
    outputs = [_move(ref, moved) for ref in record.outputs]
    ops = _needed(record, ops, outputs)
    used = {ref.storage for op in ops for ref in (*op.reads(), *op.outs)}
    used |= {ref.storage for ref in outputs}
    storages = [
        storage
        if i in used
        else replace(storage, tensor=None, origin=None)  # nobody else may need it
        for i, storage in enumerate(record.storages)
    ]
    return replace(record, storages=storages, ops=ops, outputs=outputs, conditions=[])


def merge_draws(record: Record) -> Record:
    """The same record with fewer calls of the generator.

    torch draws fewer than 16 standard normals one after the other. So several such draws that
    follow one another are parts of one.
    """
    ops: list[Op] = []
    moved: dict[int, tuple[int, int]] = {}
    parts: list[tuple[int, Ref]] = []  # successive small draws, with their places in `ops`

    def close() -> None:
        if parts:
            first, size = parts[0][1], sum(ref.numel for _, ref in parts)
            whole = record.allocate((size,), first.dtype, record.storages[first.storage].device)
            start = 0
            for place, ref in parts:
                moved[ref.storage] = (whole.storage, start)
                ops[place] = Op(_aten.alias.default, (whole,), {}, (whole,), is_view=True)
                start += ref.numel
            ops[parts[0][0]] = Op(
                _aten.normal_.default, (whole,), {}, (whole,), is_random=True, is_merged=True
            )
        parts.clear()

    for op in record.ops:
        if op.is_random:
            is_small = _is_small_draw(record, op)
            if not is_small or (parts and parts[0][1].dtype is not op.outs[0].dtype):
                close()
            if is_small:
                parts.append((len(ops), op.outs[0]))
        ops.append(op)
    close()
    outputs = [_move(ref, moved) for ref in record.outputs]
    return replace(record, ops=[_moved(op, moved) for op in ops], outputs=outputs)


def _is_small_draw(record: Record, op: Op) -> bool:
    """Whether an operation fills memory of its own with fewer than 16 standard normals."""
    ref = op.outs[0]
    storage = record.storages[ref.storage]
    return (
        op.func is _aten.normal_.default
        and op.args[1:] in ((), (0.0,), (0.0, 1.0))
        and not any(value is not None for value in op.kwargs.values())
        and storage.is_inner
        and ref.numel == storage.size < 16
    )


def _needed(record: Record, ops: list[Op], outputs: list[Ref]) -> list[Op]:
    """The operations that outputs, outer memory or the generator depend on."""
    live = {ref.storage for ref in outputs}
    live |= {i for i, storage in enumerate(record.storages) if not storage.is_inner}
    kept: list[Op] = []
    for op in reversed(ops):
        places = op.outs if op.is_view else tuple(op.writes())
        if op.is_random or any(ref.storage in live for ref in places):
            kept.append(op)
            if not op.is_view:
                live |= {ref.storage for ref in op.reads()}
    return kept[::-1]


def _changed_storages(record: Record) -> set[int]:
    """Storages that are written after they were made, and outer ones that are written."""
    made: set[int] = set()
    changed: set[int] = set()
    for op in record.ops:
        if op.is_view:
            continue
        for ref in op.writes():
            is_outer = not record.storages[ref.storage].is_inner
            if is_outer or ref.storage in made or op.func._schema.is_mutable:
                changed.add(ref.storage)
        made |= {ref.storage for ref in op.outs}
    return changed


def _copied(op: Op) -> Ref | None:
    """What an operation copies as it is: dtype, device and layout."""
    if op.func not in _COPIES or len(op.outs) != 1 or not isinstance(op.args[0], Ref):
        return None
    source, out = op.args[0], op.outs[0]
    if op.kwargs.get("device") is not None and op.func is _aten._to_copy.default:
        return None
    same = (source.shape, source.dtype) == (out.shape, out.dtype)
    strides = zip(source.shape, source.stride, out.stride, strict=False)
    return source if same and all(a == b for n, a, b in strides if n > 1) else None


_COPIES = {
    _aten.clone.default,
    _aten.lift_fresh.default,
    _aten.lift_fresh_copy.default,
    _aten._to_copy.default,
}


def _exact(value: Any) -> Any:
    """A key for arguments, in which 1, 1.0 and True are three."""
    if isinstance(value, Ref):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_exact, value))
    return (type(value), value)


def _moved(op: Op, moved: Mapping[int, tuple[int, int]]) -> Op:
    """An operation on other storages."""
    if not any(ref.storage in moved for ref in (*op.reads(), *op.outs)):
        return op
    return replace(
        op,
        args=_move(op.args, moved),
        kwargs={name: _move(value, moved) for name, value in op.kwargs.items()},
        outs=_move(op.outs, moved),
    )


def _move(value: Any, moved: Mapping[int, tuple[int, int]]) -> Any:
    if isinstance(value, Ref):
        if value.storage not in moved:
            return value
        storage, shift = moved[value.storage]
        return value._replace(storage=storage, offset=value.offset + shift)
    if isinstance(value, (list, tuple)):
        return tuple(_move(one, moved) for one in value)
    return value


def _whole(record: Record, index: int) -> Ref:
    storage = record.storages[index]
    return Ref(index, 0, (storage.size,), (1,), storage.dtype)


def _indices_within_bounds(record: Record, fixed: int) -> list[Ref]:
    """Adds operations that say of every index whether it lies within its bounds."""
    found: dict[tuple[Ref, int], None] = {}
    for op in record.ops:
        for index, size in _indexed(op):
            if record.storages[index.storage].level > fixed:
                found[index, size] = None
    return [
        record.emit(
            _aten.logical_and.default,
            record.emit(_aten.ge.Scalar, index, -size, shape=index.shape),
            record.emit(_aten.lt.Scalar, index, size, shape=index.shape),
            shape=index.shape,
        )
        for index, size in found
    ]


def _indexed(op: Op) -> list[tuple[Ref, int]]:
    """The indices among an operation's operands, and the sizes of what they index."""
    name = op.name.removesuffix("_")
    if name in ("index", "index_put", "_index_put_impl", "_unsafe_index"):
        shape = op.args[0].shape
        return [(one, shape[i]) for i, one in enumerate(op.args[1]) if isinstance(one, Ref)]
    if name in _ALONG:
        target, dim, index = op.args[:3]
        return [(index, target.shape[dim])] if target.shape else []
    if name == "embedding":
        return [(op.args[1], op.args[0].shape[0])]
    return list[tuple[Ref, int]]()


# Operations whose arguments begin with a tensor, a dimension, and indices along it.
_ALONG = "gather scatter scatter_add index_select index_add index_copy index_fill".split()
