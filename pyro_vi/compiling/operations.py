"""The C forms of torch's operations.

`FORMS` has a function for each operation's name, which adds its statements to an `Emitter`. An
operation without one is run by torch. An operation in place, such as `add_`, has the form of the
other: its result is a place that it also reads.
"""

from __future__ import annotations

__all__ = ["FORMS", "emit"]

import math
import re
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vi.compiling.emit import ADD, Access, Emitter, Unemittable, access, ctype
from pyro_vi.compiling.tape import UNSET, Op, Record, Ref

Form = Callable[[Emitter, Op, Ref], None]
FORMS: dict[str, Form] = {}
_aten = torch.ops.aten


class _Unknown(Exception):
    """A form that does not know these arguments; torch runs the operation."""


def emit(record: Record, outer: Sequence[int] = ()) -> Emitter:
    """The statements of a clean record.

    Args:
        outer: see `Emitter`.

    Raises:
        Unemittable: memory of a kind that C code does not handle here.
    """
    emitter = Emitter(record, outer)
    for storage in record.storages:
        if storage.device.type != "cpu":
            raise Unemittable(f"a tensor on {storage.device}")
    for op in record.ops:
        for ref in (*op.reads(), *op.outs):
            if ref.dtype is not record.storages[ref.storage].dtype:
                raise Unemittable("memory of two dtypes")
        if op.is_view or op.func in UNSET:
            continue
        if op.is_random:
            if op.outs[0].storage not in outer:
                emitter.call(op)
            continue
        if op.outs and not any(ref.numel for ref in op.outs):
            continue
        try:
            FORMS[_name(op)](emitter, op, op.outs[0])
        except (KeyError, _Unknown):
            emitter.call(op)
    return emitter


def _form(*names: str) -> Callable[[Form], Form]:
    """Registers the form of some operations."""

    def add(form: Form) -> Form:
        FORMS.update(dict.fromkeys(names, form))
        return form

    return add


def _name(op: Op) -> str:
    """An operation's name, without what marks one in place."""
    return op.name if op.name.startswith("__") else op.name.removesuffix("_")


def _argument(op: Op, name: str) -> Any:
    """An argument by its name, or its default."""
    for i, one in enumerate(op.func._schema.arguments):
        if one.name == name:
            if i < len(op.args):
                return op.args[i]
            return op.kwargs.get(name, one.default_value if one.has_default_value() else None)
    return None


def _view(ref: Ref, change: Callable[[Tensor], Tensor]) -> Ref:
    """A view of a tensor."""
    view = change(torch.empty_strided(ref.shape, ref.stride, device="meta"))
    offset = ref.offset + int(view.storage_offset())
    return Ref(ref.storage, offset, tuple(view.shape), view.stride(), ref.dtype)


# Operations on each element.
#
# {0}, {1}... are the operands, {alpha} is an argument by its name, and {f} is the suffix of C
# functions and numbers of single precision. They are computed in the result's dtype.

_MAX = "({0} != {0} || {0} > {1} ? {0} : {1})"
_MIN = "({0} != {0} || {0} < {1} ? {0} : {1})"
# fmt: off
_ELEMENTWISE = {
    **{name: f"{name}{{f}}({{0}})" for name in (
        "exp exp2 expm1 log log2 log10 log1p sqrt tanh sin cos tan asin acos atan sinh cosh asinh"
        " acosh atanh erf erfc floor ceil trunc").split()},
    **{name: f"{name}{{f}}({{0}}, {{1}})" for name in "atan2 hypot fmax fmin copysign".split()},
    "clone": "{0}", "lift_fresh": "{0}", "neg": "-{0}", "abs": "({0} > 0 ? {0} : 0 - {0})",
    "reciprocal": "1 / {0}", "rsqrt": "1 / sqrt{f}({0})",
    "frac": "{0} - trunc{f}({0})", "round": "rint{f}({0})", "sgn": "({0} > 0) - ({0} < 0)",
    "sign": "({0} > 0) - ({0} < 0)", "lgamma": "lgamma({0})", "digamma": "digamma({0})",
    "polygamma": "trigamma({1})", "add": "{0} + {alpha} * {1}", "sub": "{0} - {alpha} * {1}",
    "rsub": "{1} - {alpha} * {0}", "mul": "{0} * {1}", "div": "{0} / {1}",
    "div.trunc": "trunc{f}({0} / {1})", "div.floor": "floor_of({0}, {1})",
    "floor_divide": "floor_of({0}, {1})", "remainder": "remainder_of({0}, {1})",
    "fmod": "fmod{f}({0}, {1})", "addcmul": "{0} + {value} * {1} * {2}",
    "addcdiv": "{0} + {value} * {1} / {2}", "maximum": _MAX, "minimum": _MIN,
    "lerp": "({2} < 0.5{f} ? {0} + {2} * ({1} - {0}) : {1} - ({1} - {0}) * (1 - {2}))",
    "where": "({0} ? {1} : {2})", "masked_fill": "({1} ? {2} : {0})",
    "xlogy": "({1} != {1} ? {1} : {0} == 0 ? 0 : {0} * log{f}({1}))",
    "logaddexp": f"({{0}} == {{1}} ? {{0}} + M_LN2 :"
        f" {_MAX} + log1p{{f}}(exp{{f}}(-fabs{{f}}({{0}} - {{1}}))))",
    "logit": "log{f}({0} / (1 - {0}))",
    "logit_backward": "({1} < 0 || {1} > 1 ? NAN : {0} / ({1} * (1 - {1})))",
    "bitwise_and": "{0} & {1}", "bitwise_or": "{0} | {1}", "bitwise_xor": "{0} ^ {1}",
    "bitwise_not": "~{0}",
    # Activations and losses of networks. Of a gradient, {0} is what comes from the result.
    "sigmoid": "1 / (1 + exp{f}(-{0}))", "sigmoid_backward": "{0} * (1 - {1}) * {1}",
    "tanh_backward": "{0} * (1 - {1} * {1})", "relu": "({0} < 0 ? 0 : {0})",
    "threshold": "({0} <= {1} ? {2} : {0})", "threshold_backward": "({1} <= {2} ? 0 : {0})",
    "hardtanh": "({0} < {min_val} ? {min_val} : {0} > {max_val} ? {max_val} : {0})",
    "hardtanh_backward": "({1} > {min_val} && {1} < {max_val} ? {0} : 0)",
    "leaky_relu": "({0} > 0 ? {0} : {0} * {negative_slope})",
    "leaky_relu_backward": "({1} > 0 ? {0} : {0} * {negative_slope})",
    "elu": "({0} > 0 ? {0} * {scale} : expm1{f}({0} * {input_scale}) * {alpha} * {scale})",
    "elu_backward": "({5} > 0 ? {0} * {scale} : {0} * {input_scale} * {scale} *"
        " ({is_result} ? {5} / {scale} + {alpha} : {alpha} * exp{f}({5} * {input_scale})))",
    "silu": "{0} / (1 + exp{f}(-{0}))",
    "silu_backward": "{0} * (1 + {1} - {1} / (1 + exp{f}(-{1}))) / (1 + exp{f}(-{1}))",
    "gelu": "{0} * 0.5{f} * (1 + erf{f}({0} * 0.7071067811865476{f}))",
    "gelu_backward": "{0} * (0.5{f} * (1 + erf{f}({1} * 0.7071067811865476{f}))"
        " + {1} * exp{f}({1} * {1} / -2) * 0.3989422804014327{f})",
    "softplus": "({0} * {beta} > {threshold} ? {0} : log1p{f}(exp{f}({0} * {beta})) / {beta})",
    "softplus_backward": "({1} * {beta} > {threshold} ? {0} : {0} / (1 + exp{f}(-{1} * {beta})))",
    "log_sigmoid_forward": "({0} < 0 ? {0} : 0) - log1p{f}(exp{f}(-fabs{f}({0})))",
    "log_sigmoid_backward": "{0} / (1 + exp{f}({1}))",
    "binary_cross_entropy_with_logits":
        "(1 - {1}) * {0} + ({0} < 0 ? -{0} : 0) + log1p{f}(exp{f}(-fabs{f}({0})))",
}
# These are computed in the dtype to which torch promotes the operands.
_COMPARING = {
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "isnan": "{0} != {0}",
    "isinf": "{0} == INFINITY || {0} == -INFINITY", "signbit": "signbit({0})",
    "logical_and": "{0} && {1}", "logical_or": "{0} || {1}", "logical_xor": "!{0} != !{1}",
    "logical_not": "!{0}", "_to_copy": "{0}", "copy": "{1}",
}
# These are for integers.
_INTEGERS = {
    "div.trunc": "{0} / {1}", "fmod": "{0} % {1}", "remainder": "({0} % {1} + {1}) % {1}",
    **dict.fromkeys(("div.floor", "floor_divide"),
        "{0} / {1} - ({0} % {1} != 0 && ({0} < 0) != ({1} < 0))"),
}
# Values that arguments must have.
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "round": {"decimals": (None, 0)}, "polygamma": {"n": (1,)}, "logit": {"eps": (None,)},
    "logit_backward": {"eps": (None,)}, "gelu": {"approximate": ("none",)},
    "gelu_backward": {"approximate": ("none",)}, "binary_cross_entropy_with_logits":
        {"weight": (None,), "pos_weight": (None,), "reduction": (0,)},
}
# fmt: on


@_form(*(name for name in {**_ELEMENTWISE, **_COMPARING} if "." not in name))
def _elementwise(e: Emitter, op: Op, out: Ref) -> None:
    name = _name(op)
    if any(_argument(op, key) not in values for key, values in _ONLY.get(name, {}).items()):
        raise _Unknown
    if (rounding := _argument(op, "rounding_mode")) is not None:
        name = f"{name}.{rounding}"
    text = _COMPARING.get(name) or _ELEMENTWISE[name]
    if name in _INTEGERS and not out.dtype.is_floating_point:
        if not isinstance(op.args[1], int) or op.args[1] == 0:  # torch raises an error for 0
            raise _Unknown
        text = _INTEGERS[name]
    if name == "bitwise_not" and out.dtype is torch.bool:
        text = "!{0}"
    fields = [one for one in dict.fromkeys(re.findall(r"{(\w+)}", text)) if one != "f"]
    operands = [op.args[int(one)] if one.isdigit() else _argument(op, one) for one in fields]
    for i, (one, value) in enumerate(zip(fields, operands, strict=True)):
        text = text.replace(f"{{{one}}} * ", "") if value == 1 and not one.isdigit() else text
        text = text.replace(f"{{{one}}}", f"{{_{i}}}")
    e.assign(
        out, text.replace("{_", "{"), *operands,
        compute=_promoted(*operands) if name in _COMPARING else None,
    )  # fmt: skip


def _promoted(*operands: Any) -> torch.dtype:
    """The dtype in which torch compares operands."""

    def like(one: Any) -> Any:
        if not isinstance(one, Ref):
            return one
        return torch.empty([1] * min(1, len(one.shape)), dtype=one.dtype, device="meta")

    return torch.result_type(like(operands[0]), like(operands[-1]))


@_form("zero", "zeros_like", "new_zeros", "ones_like", "new_ones")
@_form("fill", "full_like", "new_full")
def _fill(e: Emitter, op: Op, out: Ref) -> None:
    value = next(
        (one for one in (_argument(op, "value"), _argument(op, "fill_value")) if one is not None),
        int("ones" in op.name),
    )
    e.assign(out, "{0}", value)


@_form("pow")
def _pow(e: Emitter, op: Op, out: Ref) -> None:
    texts: dict[Any, str] = {1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}"}
    if out.dtype.is_floating_point:
        texts |= {-1: "1 / {0}", -2: "1 / ({0} * {0})", 0.5: "sqrt{f}({0})"}
        texts |= {-0.5: "1 / sqrt{f}({0})"}
    elif op.args[1] not in texts:
        raise _Unknown
    e.assign(out, texts.get(op.args[1], "pow{f}({0}, {1})"), *op.args[:2])


@_form("clamp", "clamp_min", "clamp_max")
def _clamp(e: Emitter, op: Op, out: Ref) -> None:
    text, operands = "{0}", [op.args[0]]
    for name, limited in (("min", _MAX), ("max", _MIN)):
        if (bound := _argument(op, name)) is not None:
            text = limited.format(text, f"{{{len(operands)}}}")
            operands.append(bound)
    e.assign(out, text, *operands)


# Reductions.

_JOINED = {
    "sum": (ADD, "0"), "prod": ("{0} * {1}", "1"), "any": ("{0} || {1}", "0"),
    "all": ("{0} && {1}", "1"), "max": ("({1} != {1} || {1} > {0} ? {1} : {0})", "-INFINITY"),
    "min": ("({1} != {1} || {1} < {0} ? {1} : {0})", "INFINITY"),
}  # fmt: skip
_ABS = "fabs({0})"


def _join(
    e: Emitter, kind: str, out: Ref, text: str, *operands: Any, dims: Sequence[int],
    shape: Sequence[int], compute: torch.dtype | None = None,
) -> None:  # fmt: skip
    """A reduction of a kind of an expression over a shape."""
    combine, start = _JOINED[kind]
    if kind in ("max", "min") and not out.dtype.is_floating_point:
        limits = (0, 1) if out.dtype is torch.bool else torch.iinfo(out.dtype)
        low, high = limits if isinstance(limits, tuple) else (limits.min + 1, limits.max)
        start = f"({low if kind == 'max' else high}L)"
    e.reduce(
        out, text, *operands, dims=dims, shape=shape, combine=combine, start=start, compute=compute
    )


def _dims(op: Op) -> list[int]:
    """The dimensions of a reduction."""
    rank, given = len(op.args[0].shape), _argument(op, "dim")
    given = (given,) if isinstance(given, int) else given
    return sorted({d % rank for d in given}) if given and rank else list(range(rank))


def _kept(e: Emitter, like: Ref, shape: Sequence[int], dims: Sequence[int]) -> Ref:
    """Memory for a reduction over a shape, with the dimensions that are reduced."""
    return e.scratch([1 if d in dims else n for d, n in enumerate(shape)], like.dtype)


def _fitted(ref: Ref, out: Ref, dims: Sequence[int]) -> Ref:
    """A reduction without the reduced dimensions, if the result does not have them."""
    has = len(out.shape) == len(ref.shape)
    return ref if has else _view(ref, lambda t: t.squeeze(tuple(dims)))


@_form("sum", "nansum", "mean", "prod", "any", "all", "_is_all_true", "amax", "amin")
def _reduction(e: Emitter, op: Op, out: Ref) -> None:
    source, dims = op.args[0], _dims(op)
    kind = {"mean": "sum", "nansum": "sum", "_is_all_true": "all"}.get(op.name, op.name)
    kind, compute, text, operands = (
        kind.removeprefix("a") if "am" in kind else kind,
        None,
        "{0}",
        [],
    )
    if op.name == "mean":
        text, operands = "{0} * {1}", [1 / max(1, math.prod(source.shape[d] for d in dims))]
    elif op.name == "nansum":
        text = "({0} == {0} ? {0} : 0)"
    elif kind in ("any", "all"):
        text, compute = "({0} != 0)", source.dtype
    _join(e, kind, out, text, source, *operands, dims=dims, shape=source.shape, compute=compute)


@_form("max", "min", "argmax", "argmin")
def _best(e: Emitter, op: Op, out: Ref) -> None:
    """The largest or smallest element, and the first place of it along a dimension."""
    source, overload = op.args[0], op.func._overloadname
    kind = op.name.removeprefix("arg")
    if overload == "other":
        e.assign(out, _MAX if kind == "max" else _MIN, *op.args[:2])
        return
    dim = _argument(op, "dim")
    if kind == op.name and dim is None:
        _join(e, kind, out, "{0}", source, dims=_dims(op), shape=source.shape)
        return
    if not source.shape or (dim is None and len(source.shape) > 1):
        raise _Unknown
    dim = (dim or 0) % len(source.shape)
    moved = _view(source, lambda t: t.movedim(dim, -1))
    shape, size, type_ = moved.shape[:-1], moved.shape[-1], ctype(source.dtype)
    index = _indices(shape)
    outs = [
        _view(one, lambda t: t.squeeze(dim)) if len(one.shape) > len(shape) else one
        for one in op.outs
    ]
    lines = [
        f"{type_} best = {e.at(moved, *index, '0')}; long place = 0;",
        f"for (long k = 1; k < {size}; k++) {{ const {type_} x = {e.at(moved, *index, 'k')};",
        f"if (x {'>' if kind == 'max' else '<'} best || (x != x && best == best))"
        " { best = x; place = k; } }",
        f"{e.at(outs[-1], *index)} = place;",
        *(f"{e.at(one, *index)} = best;" for one in outs[:-1]),
    ]
    _code(e, shape, lines, [source], op.outs, size)


@_form("linalg_vector_norm")
def _norm(e: Emitter, op: Op, out: Ref) -> None:
    source, order, total = op.args[0], _argument(op, "ord"), e.scratch(out.shape, out.dtype)
    kinds = {1: ("sum", _ABS), 2: ("sum", "{0} * {0}"), math.inf: ("max", _ABS)}
    if order not in kinds or _argument(op, "dtype") is not None:
        raise _Unknown
    _join(e, kinds[order][0], total, kinds[order][1], source, dims=_dims(op), shape=source.shape)
    e.assign(out, "sqrt{f}({0})" if order == 2 else "{0}", total)


@_form("var", "std", "var_mean", "std_mean")
def _variance(e: Emitter, op: Op, out: Ref) -> None:
    source, dims = op.args[0], _dims(op)
    if op.func._overloadname != "correction":
        raise _Unknown
    correction = _argument(op, "correction")
    count = math.prod(source.shape[d] for d in dims)
    rest = count - (1 if correction is None else correction)
    mean, total = _kept(e, out, source.shape, dims), e.scratch(out.shape, out.dtype)
    keys: Any = {"dims": dims, "shape": source.shape}
    _join(e, "sum", mean, "{0} * {1}", source, 1 / count if count else math.nan, **keys)
    factor = 1 / rest if rest > 0 else math.nan
    _join(e, "sum", total, "({0} - {1}) * ({0} - {1}) * {2}", source, mean, factor, **keys)
    e.assign(out, "sqrt{f}({0})" if op.name.startswith("std") else "{0}", total)
    if len(op.outs) > 1:
        e.assign(op.outs[1], "{0}", _fitted(mean, op.outs[1], dims))


def _exponentials(e: Emitter, source: Ref, top: Ref, total: Ref, dims: Sequence[int]) -> Ref:
    """exp(source - top), in one flat loop; their sum goes to `total`."""
    less, found = (e.scratch(source.shape, total.dtype) for _ in range(2))
    e.assign(less, "{0} - {1}", source, top)
    e.assign(found, "exp{f}({0})", less)
    _join(e, "sum", total, "{0}", found, dims=dims, shape=source.shape)
    return found


@_form("logsumexp")
def _logsumexp(e: Emitter, op: Op, out: Ref) -> None:
    source, dims = op.args[0], _dims(op)
    top, shift, total = (_kept(e, out, source.shape, dims) for _ in range(3))
    _join(e, "max", top, "{0}", source, dims=dims, shape=source.shape)
    e.assign(shift, "(isfinite({0}) ? {0} : 0)", top)
    _exponentials(e, source, shift, total, dims)
    e.assign(out, "log{f}({0}) + {1}", _fitted(total, out, dims), _fitted(shift, out, dims))


@_form("_softmax", "_log_softmax")
def _softmax(e: Emitter, op: Op, out: Ref) -> None:
    source, dims = op.args[0], _dims(op)
    top, total = (_kept(e, out, out.shape, dims) for _ in range(2))
    _join(e, "max", top, "{0}", source, dims=dims, shape=out.shape)
    found = _exponentials(e, source, top, total, dims)
    if op.name == "_softmax":
        e.assign(out, "{0} / {1}", found, total)
    else:
        e.assign(out, "{0} - {1} - log{f}({2})", source, top, total)


@_form("_softmax_backward_data", "_log_softmax_backward_data")
def _softmax_backward(e: Emitter, op: Op, out: Ref) -> None:
    gradient, result = op.args[:2]
    total, is_log = _kept(e, out, out.shape, _dims(op)), op.name.startswith("_log")
    text = "{0}" if is_log else "{0} * {1}"
    keys: Any = {"dims": _dims(op), "shape": out.shape}
    _join(e, "sum", total, text, gradient, result, **keys)
    final = "{0} - exp{f}({1}) * {2}" if is_log else "{1} * ({0} - {2})"
    e.assign(out, final, gradient, result, total)


def _indices(shape: Sequence[int]) -> list[str]:
    return [f"i{d}" for d in range(len(shape))]


def _code(
    e: Emitter, shape: Sequence[int], lines: Sequence[str], reads: Sequence[Ref],
    writes: Sequence[Ref], cost: int,
) -> None:  # fmt: skip
    """Lines of C in loops over a shape, with indices `_indices`."""
    loops = [f"for (long i{d} = 0; i{d} < {n}; i{d}++)" for d, n in enumerate(shape)]
    e.code(
        [*loops, "{", *(f"  {line}" for line in lines), "}"], reads, writes, math.prod(shape) * cost
    )


@_form("cumsum", "cumprod", "logcumsumexp")
def _cumulative(e: Emitter, op: Op, out: Ref) -> None:
    if not out.shape:
        e.assign(out, "{0}", op.args[0])
        return
    start, text = {
        "cumsum": ("0", "total + x"), "cumprod": ("1", "total * x"),
        "logcumsumexp": ("-INFINITY", _ELEMENTWISE["logaddexp"].format("total", "x", f="")),
    }[_name(op)]  # fmt: skip
    source, to = (
        _view(one, lambda t: t.movedim(_argument(op, "dim"), -1)) for one in (op.args[0], out)
    )
    index, total = _indices(to.shape), "double" if out.dtype.is_floating_point else "long"
    lines = [
        f"{total} total = {start};",
        f"for (long {index[-1]} = 0; {index[-1]} < {to.shape[-1]}; {index[-1]}++) {{",
        f"  const {total} x = {e.at(source, *index)}; {e.at(to, *index)} = total = {text}; }}",
    ]
    _code(e, to.shape[:-1], lines, [source], [out], to.shape[-1])


# Parts of tensors.


@_form("cat", "stack")
def _cat(e: Emitter, op: Op, out: Ref) -> None:
    dim, start = _argument(op, "dim"), 0
    for i, one in enumerate(op.args[0]):
        if op.name == "stack":
            e.assign(_view(out, methodcaller("select", dim, i)), "{0}", one)
        elif one.shape != (0,):
            size = one.shape[dim]
            e.assign(_view(out, methodcaller("narrow", dim, start, size)), "{0}", one)
            start += size


@_form("repeat")
def _repeat(e: Emitter, op: Op, out: Ref) -> None:
    source = op.args[0]
    shape = (1,) * (len(out.shape) - len(source.shape)) + source.shape

    def split(t: Tensor) -> Tensor:
        for d in reversed(range(len(shape))):
            t = t.unflatten(d, (-1, shape[d]))
        return t

    def spread(t: Tensor) -> Tensor:
        for d in reversed(range(len(source.shape))):
            t = t.unsqueeze(d)
        return t

    e.assign(_view(out, split), "{0}", _view(source, spread))


@_form("flip")
def _flip(e: Emitter, op: Op, out: Ref) -> None:
    source = op.args[0]
    stride, offset = list(source.stride), source.offset
    for d in op.args[1]:
        offset += (source.shape[d] - 1) * stride[d]
        stride[d] = -stride[d]
    e.assign(out, "{0}", source._replace(stride=tuple(stride), offset=offset))


@_form("slice_backward", "select_backward", "diagonal_backward", "diag_embed")
@_form("slice_scatter", "select_scatter", "diagonal_scatter")
def _put_part(e: Emitter, op: Op, out: Ref) -> None:
    """Zeros, or a copy of a tensor, with a part that comes from another tensor."""
    is_scatter = op.name.endswith("_scatter")
    e.assign(out, "{0}", op.args[0] if is_scatter else 0)
    if op.name == "diag_embed":
        keys = {name: _argument(op, name) for name in ("offset", "dim1", "dim2")}
        part = _view(out, lambda t: t.diagonal(**keys))
    else:
        function = getattr(_aten, op.name.rpartition("_")[0])
        part = _view(out, lambda t: function(t, *op.args[2:], **op.kwargs))
    e.assign(part, "{0}", op.args[1 if is_scatter else 0])


@_form("constant_pad_nd")
def _pad(e: Emitter, op: Op, out: Ref) -> None:
    source, pad, part = *op.args[:2], out
    for i in range(len(pad) // 2):
        d, low, high = len(out.shape) - 1 - i, pad[2 * i], pad[2 * i + 1]
        size = source.shape[d] + min(low, 0) + min(high, 0)
        own, other = (d, max(-low, 0), size), (d, max(low, 0), size)
        source = _view(source, methodcaller("narrow", *own))
        part = _view(part, methodcaller("narrow", *other))
    e.assign(out, "{0}", _argument(op, "value"))
    e.assign(part, "{0}", source)


@_form("tril", "triu")
def _triangle(e: Emitter, op: Op, out: Ref) -> None:
    mask = torch.ones(out.shape[-2:], dtype=torch.bool)
    mask = getattr(mask, _name(op))(_argument(op, "diagonal"))
    e.assign(out, "({1} ? {0} : 0)", op.args[0], e.constant(mask))


# Indices.


def _at(target: Ref, indices: Sequence[Ref | None]) -> tuple[Access, tuple[int, ...]]:
    """A tensor at some indices, and the shape of what they select."""
    used = [i for i, one in enumerate(indices) if one is not None]
    given = [one for one in indices if one is not None]
    if any(one.dtype not in (torch.int64, torch.int32) for one in given):
        raise _Unknown
    shape = np.broadcast_shapes(*(one.shape for one in given))  # torch's imports SymPy
    lead = used[0] if used[-1] - used[0] < len(used) else 0  # indices that are apart go first
    sizes = [n for d, n in enumerate(target.shape) if d not in used]
    steps = [target.stride[d] for d in range(len(target.shape)) if d not in used]
    steps = [s if n > 1 else 0 for n, s in zip(sizes, steps, strict=True)]
    whole = (*sizes[:lead], *shape, *sizes[lead:])
    stride = (*steps[:lead], *[0] * len(shape), *steps[lead:])
    gathered = []
    for i, one in zip(used, given, strict=True):
        own = access(one, shape).stride
        own = (*[0] * lead, *own, *[0] * len(sizes[lead:]))
        place = Access(one.storage, one.offset, own, one.dtype)
        gathered.append((place, target.stride[i], target.shape[i]))
    return Access(target.storage, target.offset, stride, target.dtype, tuple(gathered)), whole


def _along(target: Ref, dim: int, index: Ref) -> Access:
    """A tensor at indices along one dimension, as `gather` reads it."""
    if not target.shape:
        raise _Unknown
    dim %= len(target.shape)
    sizes = zip(index.shape, target.stride, strict=True)
    stride = tuple(0 if d == dim or n == 1 else s for d, (n, s) in enumerate(sizes))
    gathered = (access(index, index.shape), target.stride[dim], target.shape[dim])
    return Access(target.storage, target.offset, stride, target.dtype, (gathered,))


def _in_dim(op: Op) -> list[Ref | None]:
    """The indices of an operation that indexes one dimension."""
    dim, index = op.args[1:3]
    if not op.args[0].shape:
        raise _Unknown
    return [*[None] * (dim % len(op.args[0].shape)), index]


@_form("index", "index_select", "embedding", "gather")
def _index(e: Emitter, op: Op, out: Ref) -> None:
    target = op.args[0]
    if op.name == "gather":
        e.assign(out, "{0}", _along(target, *op.args[1:3]))
        return
    if op.name == "index_select":
        indices = _in_dim(op)
    else:
        indices = [op.args[1]] if op.name == "embedding" else op.args[1]
    e.assign(out, "{0}", _at(target, indices)[0])


@_form("index_put", "index_add", "index_copy", "index_fill")
@_form("scatter", "scatter_add")
def _index_put(e: Emitter, op: Op, out: Ref) -> None:
    name = _name(op)
    if "scatter" in name:
        if op.func._overloadname not in ("default", "src", "value"):
            raise _Unknown
        index, values = op.args[2:4]
        place, shape = _along(out, op.args[1], index), index.shape
        if isinstance(values, Ref):
            values = values._replace(shape=shape)
    elif name == "index_put":
        place, shape = _at(out, op.args[1])
        values = op.args[2]
    else:
        place, shape = _at(out, _in_dim(op))
        values = op.args[3]
    if out.storage != op.args[0].storage:
        e.assign(out, "{0}", op.args[0])
    adds = name.endswith("_add") or _argument(op, "accumulate")
    factor = _argument(op, "alpha") if name == "index_add" else 1
    e.assign(
        place,
        "{1} * {0}" if factor != 1 else "{0}",
        values,
        factor,
        shape=shape,
        adds=bool(adds),
    )


@_form("embedding_dense_backward")
def _embedding_backward(e: Emitter, op: Op, out: Ref) -> None:
    gradient, index = op.args[:2]
    if _argument(op, "scale_grad_by_freq"):
        raise _Unknown
    e.assign(out, "{0}", 0)
    place, shape = _at(out, [index])
    column = index._replace(shape=(*index.shape, 1), stride=(*index.stride, 0))
    text = "({1} == {2} ? 0 : {0})"
    e.assign(place, text, gradient, column, _argument(op, "padding_idx"), shape=shape, adds=True)


# Matrices.


def _product(
    e: Emitter, out: Ref, one: Ref, other: Ref, *scale: Any, start: str | None = "0"
) -> None:
    """Adds up one[..., i, k] * other[..., k, j] along k, or a multiple of it."""
    shape = (*one.shape, other.shape[-1])
    one, other = _view(one, lambda t: t.unsqueeze(-1)), _view(other, lambda t: t.unsqueeze(-3))
    text = "{2} * {0} * {1}" if scale else "{0} * {1}"
    dims = [len(shape) - 2]
    e.reduce(out, text, one, other, *scale, shape=shape, dims=dims, start=start, total=out.dtype)


def _column(ref: Ref) -> Ref:
    return _view(ref, lambda t: t.unsqueeze(-1))


@_form("mm", "bmm", "mv", "dot", "vdot")
def _matrix_product(e: Emitter, op: Op, out: Ref) -> None:
    one, other = op.args[:2]
    if op.name in ("mv", "dot", "vdot"):
        other, out = _column(other), _column(out)
    if op.name in ("dot", "vdot"):
        one, out = _view(one, lambda t: t.unsqueeze(0)), _column(out)
    _product(e, out, one, other)


@_form("addmm", "addmv", "baddbmm")
def _added_product(e: Emitter, op: Op, out: Ref) -> None:
    bias, one, other = op.args[:3]
    beta, alpha = _argument(op, "beta"), _argument(op, "alpha")
    e.assign(out, "{0} * {1}" if beta else "{1}", bias, beta)
    if _name(op) == "addmv":
        other, out = _column(other), _column(out)
    _product(e, out, one, other, alpha, start=None)


def _transposed(ref: Ref) -> Ref:
    return _view(ref, lambda t: t.mT)


def _solve(
    e: Emitter, out: Ref, matrix: Ref, right: Ref, *, upper: bool, unit: bool = False
) -> None:
    """The solution of a triangular system; the last loop walks along what is contiguous."""
    batch, size, columns = out.shape[:-2], *out.shape[-2:]
    index, kind = _indices(batch), ctype(out.dtype)
    matrix, right = (_view(one, lambda t: t.expand(*batch, -1, -1)) for one in (matrix, right))
    lower, rest = "for (long k = 0; k < r; k++)", f"for (long k = r + 1; k < {size}; k++)"
    solved, unsolved = (rest, lower) if upper else (lower, rest)
    rows = f"long r = {size - 1}; r >= 0; r--" if upper else f"long r = 0; r < {size}; r++"
    each = f"for (long c = 0; c < {columns}; c++)"
    x, y = (e.at(out, *index, one, "c") for one in "rk")
    b, last = e.at(right, *index, "r", "c"), e.at(matrix, *index, "r", "r")
    last = "1" if unit else last
    if columns > 4 and out.stride[-1] != 1:
        between = e.scratch(out.shape, out.dtype)
        _solve(e, between, matrix, right, upper=upper, unit=unit)
        e.assign(out, "{0}", between)
        return
    if columns > 1 and out.stride[-1] == 1:
        lines = [
            f"for ({rows}) {{ {each} {x} = {b};",
            f"{solved} {{ const {kind} w = {e.at(matrix, *index, 'r', 'k')};",
            "#pragma omp simd",
            f"{each} {x} -= w * {y}; }}",
            f"{each} {x} /= {last}; }}",
        ]
    elif matrix.stride[-2] == 1:
        lines = [
            f"{each} {{ for (long r = 0; r < {size}; r++) {x} = {b};",
            f"for ({rows}) {{ const {kind} w = {x} /= {last};",
            "#pragma omp simd",
            f"{unsolved} {y} -= {e.at(matrix, *index, 'k', 'r')} * w; }} }}",
        ]
    else:
        lines = [
            f"{each} for ({rows}) {{ {kind} total = 0;",
            "#pragma omp simd reduction(+ : total)",
            f"{solved} total += {e.at(matrix, *index, 'r', 'k')} * {y};",
            f"{x} = ({b} - total) / {last}; }}",
        ]
    _code(e, batch, lines, [matrix, right], [out], size * size * columns)


@_form("linalg_solve_triangular")
def _solve_triangular(e: Emitter, op: Op, out: Ref) -> None:
    matrix, right = op.args[:2]
    upper, unit = _argument(op, "upper"), _argument(op, "unitriangular")
    if not _argument(op, "left"):  # X A = B is A' X' = B'
        matrix, right, out = map(_transposed, (matrix, right, out))
        upper = not upper
    _solve(e, out, matrix, right, upper=upper, unit=unit)


@_form("cholesky_solve", "cholesky_inverse")
def _cholesky_solve(e: Emitter, op: Op, out: Ref) -> None:
    if op.name == "cholesky_solve":
        right, factor = op.args[:2]
    else:
        factor = op.args[0]
        right = e.constant(torch.eye(out.shape[-1], dtype=out.dtype))
    lower = _transposed(factor) if _argument(op, "upper") else factor
    between = e.scratch(out.shape, out.dtype)
    _solve(e, between, lower, right, upper=False)
    _solve(e, out, _transposed(lower), between, upper=True)


@_form("linalg_cholesky_ex")
def _cholesky(e: Emitter, op: Op, out: Ref) -> None:
    source, info = op.args[0], op.outs[1]
    if _argument(op, "upper"):
        source, out = _transposed(source), _transposed(out)
    size, index, kind = out.shape[-1], _indices(info.shape), ctype(out.dtype)

    def at(ref: Ref, *place: str) -> str:
        return e.at(ref, *index, *place)

    lines = [
        f"{at(info)} = 0;",
        f"for (long c = 0; c < {size}; c++) {{",
        f"for (long r = 0; r < {size}; r++)",
        f"  {at(out, 'r', 'c')} = r < c ? 0 : {at(source, 'r', 'c')};",
        f"for (long k = 0; k < c; k++) {{ const {kind} w = {at(out, 'c', 'k')};",
        "#pragma omp simd",
        f"for (long r = c; r < {size}; r++) {at(out, 'r', 'c')} -= w * {at(out, 'r', 'k')}; }}",
        f"if (!({at(out, 'c', 'c')} > 0) && !{at(info)}) {at(info)} = c + 1;",
        f"const {kind} pivot = {at(out, 'c', 'c')} = sqrt({at(out, 'c', 'c')});",
        f"for (long r = c + 1; r < {size}; r++) {at(out, 'r', 'c')} /= pivot; }}",
    ]
    _code(e, info.shape, lines, [source], [out, info], size**3 // 3)
