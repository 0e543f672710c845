"""The C forms of torch's operations.

`FORMS` has a function for each operation's name, which adds its statements to an `Emitter`. An
operation without one is run by torch; so is one whose form raises `NotImplementedError`, because it
does not know the arguments. An operation in place, such as `add_`, has the form of the other.
"""

from __future__ import annotations

__all__ = ["FORMS", "emit"]

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vi.compiling.emit import Access, Emitter, Unemittable, access, ctype
from pyro_vi.compiling.tape import UNSET, Op, Record, Ref

Form = Callable[[Emitter, Op, Ref], None]
FORMS: dict[str, Form] = {}


def emit(record: Record, first: Sequence[int] = ()) -> Emitter:
    """The statements of a clean record; random numbers that lie in `first` are not drawn.

    It raises `Unemittable` for memory of a kind that C code does not handle here.
    """
    emitter = Emitter(record, first)
    for storage in record.storages:
        if storage.device.type != "cpu":
            raise Unemittable(f"a tensor on {storage.device}")
    for op in record.ops:
        if any(r.dtype is not record.storages[r.storage].dtype for r in (*op.reads(), *op.outs)):
            raise Unemittable("memory of two dtypes")
        is_drawn = op.is_random and op.outs[0].storage in first
        is_empty = bool(op.outs) and not any(ref.numel for ref in op.outs)
        if op.is_view or op.func in UNSET or is_drawn or is_empty:
            continue
        form = None if op.is_random else FORMS.get(_name(op))
        try:
            if form is None:
                raise NotImplementedError
            form(emitter, op, op.outs[0])
        except NotImplementedError:
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
    return op.name.removesuffix("_")


def _argument(op: Op, name: str) -> Any:
    """An argument by its name, or its default."""
    for i, one in enumerate(op.func._schema.arguments):
        if one.name == name:
            given = op.args[i : i + 1] or (op.kwargs.get(name, one.default_value),)
            return given[0]
    return None


def _view(ref: Ref, function: Callable[..., Tensor], *args: Any) -> Ref:
    """What a function that makes a view of a tensor gives."""
    view = function(torch.empty_strided(ref.shape, ref.stride, device="meta"), *args)
    start = ref.offset + int(view.storage_offset())
    return Ref(ref.storage, start, tuple(view.shape), view.stride(), ref.dtype)


# Operations on each element: {0}, {1}... are the operands, {alpha} is an argument by its name, and
# {f} is the suffix of C functions and numbers of single precision.

_MAX = "({0} != {0} || {0} > {1} ? {0} : {1})"
_MIN = "({0} != {0} || {0} < {1} ? {0} : {1})"
_LOW, _HIGH = _MAX.replace("{1}", "{min}"), _MIN.replace("{1}", "{max}")
_CDF = "0.5{f} * (1 + erf{f}(X * 0.7071067811865476{f}))"
_LOG1P_EXP = "log1p{f}(exp{f}(-fabs{f}(X)))"
# fmt: off
# These are computed in the dtype of the result.
_ELEMENTWISE = {
    **{name: f"{name}{{f}}({{0}})" for name in (
        "exp exp2 expm1 log log2 log10 log1p sqrt tanh sin cos tan asin acos atan sinh cosh asinh"
        " acosh atanh erf erfc floor ceil trunc").split()},
    **{name: f"{name}{{f}}({{0}}, {{1}})" for name in "atan2 hypot fmax fmin copysign".split()},
    "clone": "{0}", "lift_fresh": "{0}", "neg": "-{0}", "abs": "({0} > 0 ? {0} : 0 - {0})",
    "reciprocal": "1 / {0}", "rsqrt": "1 / sqrt{f}({0})", "frac": "{0} - trunc{f}({0})",
    "round": "rint{f}({0})", "sgn": "({0} > 0) - ({0} < 0)", "sign": "({0} > 0) - ({0} < 0)",
    "lgamma": "lgamma({0})", "digamma": "digamma({0})", "polygamma": "trigamma({1})",
    "add": "{0} + {alpha} * {1}", "sub": "{0} - {alpha} * {1}", "rsub": "{1} - {alpha} * {0}",
    "mul": "{0} * {1}", "div": "{0} / {1}", "div.trunc": "trunc{f}({0} / {1})",
    "div.floor": "floor_of({0}, {1})", "floor_divide": "floor_of({0}, {1})",
    "remainder": "remainder_of({0}, {1})", "fmod": "fmod{f}({0}, {1})",
    "addcmul": "{0} + {value} * {1} * {2}", "addcdiv": "{0} + {value} * {1} / {2}",
    "lerp": "({2} < 0.5{f} ? {0} + {2} * ({1} - {0}) : {1} - ({1} - {0}) * (1 - {2}))",
    "maximum": _MAX, "minimum": _MIN, "max.other": _MAX, "min.other": _MIN,
    "clamp": _HIGH.replace("{0}", _LOW), "clamp_min": _LOW, "clamp_max": _HIGH,
    "pow": "pow{f}({0}, {1})", "pow.1": "{0}", "pow.2": "{0} * {0}", "pow.3": "{0} * {0} * {0}",
    "pow.-1": "1 / {0}", "pow.-2": "1 / ({0} * {0})", "pow.0.5": "sqrt{f}({0})",
    "pow.-0.5": "1 / sqrt{f}({0})", "where": "({0} ? {1} : {2})",
    "masked_fill": "({1} ? {2} : {0})",
    "xlogy": "({1} != {1} ? {1} : {0} == 0 ? 0 : {0} * log{f}({1}))",
    "logaddexp": "({0} == {1} ? {0} + M_LN2 : "
        + f"{_MAX} + {_LOG1P_EXP})".replace("X", "{0} - {1}"), "logit": "log{f}({0} / (1 - {0}))",
    "logit_backward": "({1} < 0 || {1} > 1 ? NAN : {0} / ({1} * (1 - {1})))",
    "bitwise_and": "{0} & {1}", "bitwise_or": "{0} | {1}", "bitwise_xor": "{0} ^ {1}",
    "bitwise_not": "~{0}", "zero": "0", "zeros_like": "0", "new_zeros": "0", "ones_like": "1",
    "new_ones": "1", "full_like": "{fill_value}", "new_full": "{fill_value}", "fill": "{value}",
    # Activations and losses of networks. Of a gradient, {0} is what comes from the result.
    "sigmoid": "1 / (1 + exp{f}(-{0}))", "sigmoid_backward": "{0} * (1 - {1}) * {1}",
    "tanh_backward": "{0} * (1 - {1} * {1})", "relu": "({0} < 0 ? 0 : {0})",
    "threshold": "({0} <= {1} ? {2} : {0})", "threshold_backward": "({1} <= {2} ? 0 : {0})",
    "hardtanh": "({0} < {min_val} ? {min_val} : {0} > {max_val} ? {max_val} : {0})",
    "leaky_relu": "({0} > 0 ? {0} : {0} * {negative_slope})",
    "leaky_relu_backward": "({1} > 0 ? {0} : {0} * {negative_slope})",
    "silu": "{0} / (1 + exp{f}(-{0}))",
    "silu_backward": "{0} * (1 + {1} - {1} / (1 + exp{f}(-{1}))) / (1 + exp{f}(-{1}))",
    "gelu": "{0} * " + _CDF.replace("X", "{0}"),
    "gelu_backward": "{0} * (" + _CDF.replace("X", "{1}")
        + " + {1} * exp{f}({1} * {1} / -2) * 0.3989422804014327{f})",
    "softplus": "({0} * {beta} > {threshold} ? {0} : log1p{f}(exp{f}({0} * {beta})) / {beta})",
    "softplus_backward": "({1} * {beta} > {threshold} ? {0} : {0} / (1 + exp{f}(-{1} * {beta})))",
    "log_sigmoid_forward": "({0} < 0 ? {0} : 0) - " + _LOG1P_EXP.replace("X", "{0}"),
    "log_sigmoid_backward": "{0} / (1 + exp{f}({1}))",
    "binary_cross_entropy_with_logits": "(1 - {1}) * {0} + ({0} < 0 ? -{0} : 0) + "
        + _LOG1P_EXP.replace("X", "{0}"),
}
# These are computed in the dtype to which torch promotes the operands.
_COMPARING = {
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "isnan": "{0} != {0}", "logical_not": "!{0}",
    "logical_and": "{0} && {1}", "logical_or": "{0} || {1}", "logical_xor": "!{0} != !{1}",
    "isinf": "fabs({0}) == INFINITY", "signbit": "signbit({0})", "_to_copy": "{0}", "copy": "{1}",
}
# These are for integers, with another one as a number; torch raises an error for a division by 0.
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
        raise NotImplementedError
    if name == "clamp" and None in (_argument(op, "min"), _argument(op, "max")):
        name = "clamp_max" if _argument(op, "min") is None else "clamp_min"
    variant = _argument(op, "rounding_mode") or op.func._overloadname
    if name == "pow" and not isinstance(op.args[1], Ref):
        variant = f"{op.args[1]:g}"
    name = f"{name}.{variant}" if f"{name}.{variant}" in _ELEMENTWISE else name
    text = _COMPARING.get(name) or _ELEMENTWISE[name]
    if name in (*_INTEGERS, "pow") and not out.dtype.is_floating_point:
        if name == "pow" or not isinstance(op.args[1], int) or op.args[1] == 0:
            raise NotImplementedError
        text = _INTEGERS[name]
    text = "!{0}" if name == "bitwise_not" and out.dtype is torch.bool else text
    names = [one for one in dict.fromkeys(re.findall(r"{(\w+)}", text)) if one != "f"]
    operands = [op.args[int(one)] if one.isdigit() else _argument(op, one) for one in names]
    for i, (one, value) in enumerate(zip(names, operands, strict=True)):
        if value == 1 and not one.isdigit():  # a factor that need not be there
            text = text.replace(f"{{{one}}} * ", "")
        text = text.replace(f"{{{one}}}", f"{{_{i}}}")  # its number among the operands
    text, operands = ("{0}", [int(text)]) if text in ("0", "1") else (text, operands)
    compute = _promoted(operands) if name in _COMPARING else None
    e.assign(out, text.replace("{_", "{"), *operands, compute=compute)


def _promoted(operands: Sequence[Any]) -> torch.dtype:
    """The dtype in which torch compares operands."""
    like = {
        one: torch.empty([1] * min(1, len(one.shape)), dtype=one.dtype, device="meta")
        for one in operands if isinstance(one, Ref)
    }  # fmt: skip
    return torch.result_type(*(like.get(one, one) for one in (operands[0], operands[-1])))


# Reductions: their kind, and what they join, where {1} is one over the number of elements.
_REDUCED = {
    "sum": ("sum", "{0}"), "mean": ("sum", "{0} * {1}"), "prod": ("prod", "{0}"),
    "nansum": ("sum", "({0} == {0} ? {0} : 0)"), "any": ("any", "({0} != 0)"),
    "all": ("all", "({0} != 0)"), "_is_all_true": ("all", "{0}"), "max": ("max", "{0}"),
    "min": ("min", "{0}"), "amax": ("max", "{0}"), "amin": ("min", "{0}"),
    "linalg_vector_norm.1": ("sum", "fabs({0})"), "linalg_vector_norm.2": ("sum", "{0} * {0}"),
    "linalg_vector_norm.inf": ("max", "fabs({0})"),
}  # fmt: skip


def _dims(op: Op) -> list[int]:
    """The dimensions of a reduction."""
    rank, given = len(op.args[0].shape), _argument(op, "dim")
    given = (given,) if isinstance(given, int) else given
    return sorted({d % rank for d in given}) if given and rank else list(range(rank))


@_form(*(name for name in _REDUCED if "." not in name), "linalg_vector_norm")
def _reduction(e: Emitter, op: Op, out: Ref) -> None:
    order = _argument(op, "ord")
    kind, text = _REDUCED.get(op.name if order is None else f"{op.name}.{order:g}", ("", ""))
    if op.func._overloadname == "other":  # of two tensors
        _elementwise(e, op, out)
    elif len(op.outs) > 1:
        _best(e, op, out)
    elif not kind or (kind in ("max", "min") and not out.dtype.is_floating_point):
        raise NotImplementedError
    else:
        source, dims = op.args[0], _dims(op)
        part = 1 / max(1, math.prod(source.shape[d] for d in dims))
        keys: Any = {"compute": source.dtype} if kind in ("any", "all") else {}
        e.reduce(out, text, source, part, dims=dims, shape=source.shape, kind=kind, **keys)
        if order == 2:
            e.assign(out, "sqrt{f}({0})", out)


@_form("argmax", "argmin")
def _best(e: Emitter, op: Op, out: Ref) -> None:
    """The largest or smallest element along a dimension, and its first place, the last result."""
    source, dim, rank = op.args[0], _argument(op, "dim"), len(op.args[0].shape)
    if dim is None or not rank:
        raise NotImplementedError
    outs = [_view(o, Tensor.squeeze, dim) if len(o.shape) == rank else o for o in op.outs]
    moved, better = _view(source, Tensor.movedim, dim, -1), ">" if "max" in op.name else "<"
    lines = [f"const long k = FIRST({moved.shape[-1]}, {e.at(moved, 'k')}, {better});"]
    lines += [f"{e.at(outs[-1])} = k;", *(f"{e.at(o)} = {e.at(moved, 'k')};" for o in outs[:-1])]
    e.code(lines, [source], outs, moved.shape[:-1], cost=moved.shape[-1])


@_form("logsumexp", "_softmax", "_log_softmax")
def _exponentials(e: Emitter, op: Op, out: Ref) -> None:
    source, dims = op.args[0], _dims(op)
    kept = [1 if d in dims else n for d, n in enumerate(source.shape)]
    top, shift, total = (e.scratch(kept, out.dtype) for _ in range(3))
    less, each = (e.scratch(source.shape, out.dtype) for _ in range(2))
    e.reduce(top, "{0}", source, dims=dims, shape=source.shape, kind="max")
    e.assign(shift, "(isfinite({0}) ? {0} : 0)" if op.name == "logsumexp" else "{0}", top)
    e.assign(less, "{0} - {1}", source, shift)
    e.assign(each, "exp{f}({0})", less)  # in one flat loop
    e.reduce(total, "{0}", each, dims=dims, shape=source.shape)
    if op.name == "_softmax":
        e.assign(out, "{0} / {1}", each, total)
    elif op.name == "_log_softmax":
        e.assign(out, "{0} - log{f}({1})", less, total)
    else:
        total, shift = (_view(one, Tensor.view, out.shape) for one in (total, shift))
        e.assign(out, "log{f}({0}) + {1}", total, shift)


@_form("_softmax_backward_data", "_log_softmax_backward_data")
def _softmax_backward(e: Emitter, op: Op, out: Ref) -> None:
    gradient, result = op.args[:2]
    dims, is_log = _dims(op), op.name.startswith("_log")
    total = e.scratch([1 if d in dims else n for d, n in enumerate(out.shape)], out.dtype)
    summed = "{0}" if is_log else "{0} * {1}"
    e.reduce(total, summed, gradient, result, dims=dims, shape=out.shape)
    final = "{0} - exp{f}({1}) * {2}" if is_log else "{1} * ({0} - {2})"
    e.assign(out, final, gradient, result, total)


@_form("cumsum", "cumprod", "logcumsumexp")
def _cumulative(e: Emitter, op: Op, out: Ref) -> None:
    start, text = {
        "cumsum": ("0", "total + x"), "cumprod": ("1", "total * x"),
        "logcumsumexp": ("-INFINITY", _ELEMENTWISE["logaddexp"].format("total", "x", f="")),
    }[_name(op)]  # fmt: skip
    change = (Tensor.movedim, _argument(op, "dim"), -1) if out.shape else (Tensor.unsqueeze, 0)
    source, to = (_view(one, *change) for one in (op.args[0], out))
    total = "double" if out.dtype.is_floating_point else "long"
    lines = [
        f"{total} total = {start}; for (long k = 0; k < {to.shape[-1]}; k++) {{",
        f"const {total} x = {e.at(source, 'k')}; {e.at(to, 'k')} = total = {text}; }}",
    ]
    e.code(lines, [source], [out], to.shape[:-1], cost=to.shape[-1])


@_form("cat", "stack")
def _cat(e: Emitter, op: Op, out: Ref) -> None:
    dim, start = _argument(op, "dim"), 0
    for i, one in enumerate(op.args[0]):
        if op.name == "stack":
            e.assign(_view(out, Tensor.select, dim, i), "{0}", one)
        elif one.shape != (0,):
            e.assign(_view(out, Tensor.narrow, dim, start, one.shape[dim]), "{0}", one)
            start += one.shape[dim]


@_form("repeat")
def _repeat(e: Emitter, op: Op, out: Ref) -> None:
    source, lead = op.args[0], len(out.shape) - len(op.args[0].shape)
    for d, n in reversed([*enumerate((*[1] * lead, *source.shape))]):
        out = _view(out, Tensor.unflatten, d, (-1, n))
        source = _view(source, Tensor.unsqueeze, d - lead) if d >= lead else source
    e.assign(out, "{0}", source)


@_form("flip")
def _flip(e: Emitter, op: Op, out: Ref) -> None:
    source = op.args[0]
    dims = [d % len(source.shape) for d in op.args[1]]
    offset = source.offset + sum((source.shape[d] - 1) * source.stride[d] for d in dims)
    stride = tuple(-s if d in dims else s for d, s in enumerate(source.stride))
    e.assign(out, "{0}", source._replace(stride=stride, offset=offset))


@_form("slice_backward", "select_backward", "diagonal_backward", "diag_embed")
@_form("slice_scatter", "select_scatter", "diagonal_scatter")
def _put_part(e: Emitter, op: Op, out: Ref) -> None:
    """Zeros, or a copy of a tensor, with a part that comes from another tensor."""
    is_scatter, name = op.name.endswith("_scatter"), op.name.rpartition("_")[0]
    if op.name == "diag_embed":
        part = _view(out, torch.diagonal, *map(partial(_argument, op), ("offset", "dim1", "dim2")))
    else:
        part = _view(out, partial(getattr(torch.ops.aten, name), **op.kwargs), *op.args[2:])
    e.assign(out, "{0}", op.args[0] if is_scatter else 0)
    e.assign(part, "{0}", op.args[is_scatter])


@_form("constant_pad_nd")
def _pad(e: Emitter, op: Op, out: Ref) -> None:
    source, pad, part = *op.args[:2], out
    for i in range(len(pad) // 2):
        d, low, high = len(out.shape) - 1 - i, pad[2 * i], pad[2 * i + 1]
        size = source.shape[d] + min(low, 0) + min(high, 0)
        source = _view(source, Tensor.narrow, d, max(-low, 0), size)
        part = _view(part, Tensor.narrow, d, max(low, 0), size)
    e.assign(out, "{0}", _argument(op, "value"))
    e.assign(part, "{0}", source)


@_form("tril", "triu")
def _triangle(e: Emitter, op: Op, out: Ref) -> None:
    sign, d, source = "<=" if _name(op) == "tril" else ">=", len(out.shape), op.args[0]
    inside = f"i{d - 1} {sign} i{d - 2} + {_argument(op, 'diagonal')}"
    e.code([f"{e.at(out)} = {inside} ? {e.at(source)} : 0;"], [source], [out], out.shape)


def _at(op: Op, target: Ref) -> tuple[Access, tuple[int, ...]]:
    """A tensor at the indices of an operation, and the shape of what they select."""
    target = target if target.shape else target._replace(shape=(1,), stride=(1,))
    name, rank = _name(op), len(target.shape)
    own = [*zip(target.shape, target.stride, strict=True)]
    if name in ("gather", "scatter", "scatter_add"):
        dim, index, behind = op.args[1] % rank, op.args[2], 0
        used = {dim: index}
        dims = [(n, 0 if d == dim else own[d][1]) for d, n in enumerate(index.shape)]
    else:
        given = op.args[1] if name in ("index", "index_put") else [op.args[1]]
        if name in ("index_select", "index_add", "index_copy", "index_fill"):
            given = [*[None] * (op.args[1] % rank), op.args[2]]
        used = {d: index for d, index in enumerate(given) if index is not None}
        middle = np.broadcast_shapes(*(one.shape for one in used.values()))  # torch's needs SymPy
        lead = min(used) if max(used) - min(used) < len(used) else 0  # those apart come first
        rest = [one for d, one in enumerate(own) if d not in used]
        dims, behind = [*rest[:lead], *((n, 0) for n in middle), *rest[lead:]], len(rest) - lead
    if any(one.dtype not in (torch.int32, torch.int64) for one in used.values()):
        raise NotImplementedError
    shape, stride = tuple(n for n, _ in dims), tuple(step for _, step in dims)
    gathered = []
    for d, one in used.items():
        sizes, steps = (*one.shape, *[1] * behind), (*one.stride, *[0] * behind)
        index = access(one._replace(shape=sizes, stride=steps), shape)
        gathered.append((index, target.stride[d], target.shape[d]))
    place = access(target._replace(shape=shape, stride=stride), shape)
    return place._replace(gathered=tuple(gathered)), shape


@_form("index", "index_select", "embedding", "gather")
def _index(e: Emitter, op: Op, out: Ref) -> None:
    e.assign(out, "{0}", _at(op, op.args[0])[0])


@_form("index_put", "index_add", "index_copy", "index_fill", "scatter", "scatter_add")
def _index_put(e: Emitter, op: Op, out: Ref) -> None:
    if op.func._overloadname in ("reduce", "value_reduce"):
        raise NotImplementedError
    place, shape = _at(op, out)
    values = op.args[2 if _name(op) == "index_put" else 3]
    if isinstance(values, Ref) and "scatter" in op.name:
        values = values._replace(shape=shape)  # a part of them
    if out.storage != op.args[0].storage:
        e.assign(out, "{0}", op.args[0])
    adds, alpha = "_add" in op.name or bool(_argument(op, "accumulate")), _argument(op, "alpha")
    text, factor = ("{0}", 1) if alpha is None else ("{1} * {0}", alpha)
    e.assign(place, text, values, factor, shape=shape, adds=adds)


@_form("mm", "bmm", "mv", "dot", "vdot", "addmm", "addmv", "baddbmm")
def _product(e: Emitter, op: Op, out: Ref) -> None:
    """The sum of one[..., i, k] * other[..., k, j] along k, or a multiple of it and a bias."""
    one, other = op.args[-2:]
    text, scale = "{0} * {1}", []
    if "add" in op.name:
        one, other = op.args[1:3]
        text, scale = "{2} * {0} * {1}", [_argument(op, "alpha")]
        e.assign(out, "{0} * {1}" if (beta := _argument(op, "beta")) else "{1}", op.args[0], beta)
    if len(other.shape) == 1:
        other, out = (_view(ref, Tensor.unsqueeze, -1) for ref in (other, out))
    if len(one.shape) == 1:
        one, out = (_view(ref, Tensor.unsqueeze, 0) for ref in (one, out))
    shape, dim = (*one.shape, other.shape[-1]), len(one.shape) - 1
    one, other = _view(one, Tensor.unsqueeze, -1), _view(other, Tensor.unsqueeze, -3)
    e.reduce(out, text, one, other, *scale, shape=shape, dims=[dim], adds=bool(scale), wide=False)


def _transposed(*refs: Ref) -> list[Ref]:
    return [_view(ref, Tensor.transpose, -1, -2) for ref in refs]


def _matrix(e: Emitter, ref: Ref) -> str:
    """A matrix as arguments of the functions in `matrices.h`."""
    return f"&{e.at(ref, '0', '0')}, {ref.stride[-2]}, {ref.stride[-1]}"


@_form("linalg_cholesky_ex")
def _cholesky(e: Emitter, op: Op, out: Ref) -> None:
    source, info, n = op.args[0], op.outs[1], out.shape[-1]
    if _argument(op, "upper"):
        source, out = _transposed(source, out)
    call = f"cholesky_{ctype(out.dtype)}({_matrix(e, out)}, {_matrix(e, source)}, {n})"
    e.code([f"{e.at(info)} = {call};"], [source], [out, info], info.shape, cost=n**3 // 3)


@_form("linalg_solve_triangular")
def _solve(e: Emitter, op: Op, out: Ref) -> None:
    matrix, right = (_view(one, Tensor.expand, *out.shape[:-2], -1, -1) for one in op.args[:2])
    upper, unit = _argument(op, "upper"), _argument(op, "unitriangular")
    if not _argument(op, "left"):  # X A = B is A' X' = B'
        (matrix, right, out), upper = _transposed(matrix, right, out), not upper
    n, m = out.shape[-2:]
    found = e.scratch(out.shape, out.dtype) if m > 1 else out  # whose rows are contiguous
    matrices = ", ".join(_matrix(e, one) for one in (found, matrix, right))
    line = f"solve_{ctype(out.dtype)}({matrices}, {n}, {m}, {upper:d}, {unit:d});"
    e.code([line], [matrix, right], [found], out.shape[:-2], cost=n * n * m)
    if found is not out:
        e.assign(out, "{0}", found)
