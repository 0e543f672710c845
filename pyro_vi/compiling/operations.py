"""The C forms of torch's operations.

`FORMS` has a function for each operation's name, which adds its statements to an `Emitter`. An
operation without one is run by torch. An operation in place, such as `add_`, has the form of the
other, and its result goes into its first operand.
"""

from __future__ import annotations

__all__ = ["FORMS", "emit"]

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pyro_vi.compiling.emit import Access, Emitter, Unemittable, ctype, number
from pyro_vi.compiling.tape import UNSET, Op, Record, Ref

Form = Callable[[Emitter, Op, Ref], None]
FORMS: dict[str, Form] = {}


def emit(record: Record, outer: Sequence[int] = ()) -> Emitter:
    """The statements of a clean record.

    Args:
        outer: see `Emitter`.

    Raises:
        Unemittable: memory of a kind that C code does not handle here.
    """
    emitter = Emitter(record, outer)
    emitter.helpers.add("within")
    for storage in record.storages:
        if storage.device.type != "cpu":
            raise Unemittable(f"a tensor on {storage.device}")
    for op in record.ops:
        for ref in (*op.reads(), *op.outs):
            if ref.dtype is not record.storages[ref.storage].dtype:
                raise Unemittable("memory of two dtypes")
        if (
            op.is_view
            or op.func in UNSET
            or (op.outs and op.outs[0].storage in outer and op.is_random)
        ):
            continue
        name = op.name
        target = op.outs[0] if op.outs else None
        form = FORMS.get(name)
        if form is None and name.endswith("_") and name[:-1] in FORMS:
            form, target = FORMS[name[:-1]], op.args[0]
        if form is None or target is None or op.is_random:
            emitter.call(op)
            continue
        try:
            form(emitter, op, target)
        except _Unknown:
            emitter.call(op)
    return emitter


class _Unknown(Exception):
    """A form that does not know these arguments; torch runs the operation."""


_aten = torch.ops.aten


def _form(*names: str) -> Callable[[Form], Form]:
    def add(form: Form) -> Form:
        for name in names:
            FORMS[name] = form
        return form

    return add


def argument(op: Op, name: str) -> Any:
    """An argument by its name, or its default."""
    for i, one in enumerate(op.func._schema.arguments):
        if one.name == name:
            if i < len(op.args):
                return op.args[i]
            return op.kwargs.get(name, one.default_value if one.has_default_value() else None)
    return None


def _promoted(*operands: Any) -> torch.dtype:
    """The dtype in which torch compares operands."""
    found: Any = None
    for one in operands:
        if isinstance(one, Ref):
            one = torch.empty((1,) * min(1, len(one.shape)), dtype=one.dtype, device="meta")
        found = one if found is None else torch.empty(
            (1,) * max(getattr(found, "dim", int)() , getattr(one, "dim", int)()),
            dtype=torch.result_type(found, one), device="meta",
        )  # fmt: skip
    return found.dtype if isinstance(found, torch.Tensor) else torch.result_type(found, found)


# One statement for each element: {0}, {1}... are the operands, {f} is the suffix of a function of
# single precision. These are computed in the dtype of the result.
_PLAIN = {
    "neg": "-{0}", "exp": "exp{f}({0})", "exp2": "exp2{f}({0})", "expm1": "expm1{f}({0})",
    "log": "log{f}({0})", "log2": "log2{f}({0})", "log10": "log10{f}({0})",
    "log1p": "log1p{f}({0})", "sqrt": "sqrt{f}({0})", "rsqrt": "1 / sqrt{f}({0})",
    "abs": "({0} < 0 ? -{0} : {0})", "reciprocal": "1 / {0}", "square": "{0} * {0}",
    "sigmoid": "1 / (1 + exp{f}(-{0}))", "tanh": "tanh{f}({0})", "sin": "sin{f}({0})",
    "cos": "cos{f}({0})", "tan": "tan{f}({0})", "asin": "asin{f}({0})", "acos": "acos{f}({0})",
    "atan": "atan{f}({0})", "sinh": "sinh{f}({0})", "cosh": "cosh{f}({0})",
    "atanh": "atanh{f}({0})", "asinh": "asinh{f}({0})", "acosh": "acosh{f}({0})",
    "atan2": "atan2{f}({0}, {1})", "hypot": "hypot{f}({0}, {1})", "erf": "erf{f}({0})",
    "erfc": "erfc{f}({0})", "lgamma": "lgamma({0})", "floor": "floor{f}({0})",
    "ceil": "ceil{f}({0})", "trunc": "trunc{f}({0})", "mul": "{0} * {1}",
    "maximum": "({0} != {0} || {0} > {1} ? {0} : {1})",
    "minimum": "({0} != {0} || {0} < {1} ? {0} : {1})",
    "fmax": "fmax{f}({0}, {1})", "fmin": "fmin{f}({0}, {1})",
    "relu": "({0} < 0 ? 0 : {0})", "relu_backward": "({1} > 0 ? {0} : 0)",
    "sgn": "(({0} > 0) - ({0} < 0))", "sign": "(({0} > 0) - ({0} < 0))",
    "silu": "{0} / (1 + exp{f}(-{0}))",
    "sigmoid_backward": "{0} * (1 - {1}) * {1}", "tanh_backward": "{0} * (1 - {1} * {1})",
    "threshold_backward": "({1} <= {2} ? 0 : {0})",
    "xlogy": "({1} != {1} ? {1} : {0} == 0 ? 0 : {0} * log{f}({1}))",
    "logaddexp": "({0} == {1} ? {0} + (1 == 1) * 0x1.62e42fefa39efp-1 : "
    "fmax{f}({0}, {1}) + log1p{f}(exp{f}(-fabs{f}({0} - {1}))))",
    "copysign": "copysign{f}({0}, {1})",
    "clone": "{0}", "contiguous": "{0}", "lift_fresh": "{0}", "expand_copy": "{0}",
    "view_copy": "{0}", "_reshape_copy": "{0}", "detach_copy": "{0}",
    "lift_fresh_copy": "{0}",
}  # fmt: skip
# These are computed in the dtype that torch promotes the operands to, and give another one.
_COMPARING = {
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "isnan": "{0} != {0}",
    "isinf": "({0} == INFINITY || {0} == -INFINITY)", "isfinite": "isfinite({0})",
    "logical_and": "({0} && {1})", "logical_or": "({0} || {1})", "logical_not": "!{0}",
    "logical_xor": "(!{0} != !{1})", "_to_copy": "{0}", "signbit": "signbit({0})",
}  # fmt: skip


def _add_plain(name: str, text: str, *, compares: bool) -> None:
    places = 1 + max(i for i in range(3) if f"{{{i}}}" in text)

    @_form(name)
    def form(e: Emitter, op: Op, out: Ref) -> None:
        operands = op.args[:places]
        e.assign(out, text, *operands, compute=_promoted(*operands) if compares else None)


for _name, _text in _PLAIN.items():
    _add_plain(_name, _text, compares=False)
for _name, _text in _COMPARING.items():
    _add_plain(_name, _text, compares=True)


@_form("add", "sub", "rsub")
def _add(e: Emitter, op: Op, out: Ref) -> None:
    alpha = argument(op, "alpha")
    first, second = op.args[:2]
    if op.name == "rsub":
        first, second = second, first
    sign = "+" if op.name.startswith("add") else "-"
    if alpha in (None, 1):
        e.assign(out, f"{{0}} {sign} {{1}}", first, second)
    elif op.name == "rsub":
        e.assign(out, "{0} - {2} * {1}", first, second, alpha)
    else:
        e.assign(out, f"{{0}} {sign} {{2}} * {{1}}", first, second, alpha)


@_form("div")
def _div(e: Emitter, op: Op, out: Ref) -> None:
    rounding = argument(op, "rounding_mode")
    if rounding is None:
        e.assign(out, "{0} / {1}", *op.args[:2])
    elif out.dtype.is_floating_point:
        e.assign(out, f"{rounding}{{f}}({{0}} / {{1}})", *op.args[:2])
    else:
        raise _Unknown


@_form("remainder", "fmod")
def _remainder(e: Emitter, op: Op, out: Ref) -> None:
    if not out.dtype.is_floating_point:
        raise _Unknown
    text = (
        "fmod{f}({0}, {1})" if op.name.startswith("fmod") else "({0} - floor{f}({0} / {1}) * {1})"
    )
    e.assign(out, text, *op.args[:2])


@_form("round")
def _round(e: Emitter, op: Op, out: Ref) -> None:
    if argument(op, "decimals"):
        raise _Unknown
    e.assign(out, "rint{f}({0})", op.args[0])


@_form("pow")
def _pow(e: Emitter, op: Op, out: Ref) -> None:
    base, power = op.args[:2]
    texts = {1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", -1: "1 / {0}", -2: "1 / ({0} * {0})"}
    texts |= {0.5: "sqrt{f}({0})", -0.5: "1 / sqrt{f}({0})"} if out.dtype.is_floating_point else {}
    if isinstance(power, (int, float)) and power in texts and out.dtype.is_floating_point:
        e.assign(out, texts[power], base)
    elif out.dtype.is_floating_point:
        e.assign(out, "pow{f}({0}, {1})", base, power)
    elif power == 2:
        e.assign(out, texts[2], base)
    else:
        raise _Unknown


@_form("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "__and__", "__or__")
def _bitwise(e: Emitter, op: Op, out: Ref) -> None:
    signs = {"and": "&", "or": "|", "xor": "^"}
    name = op.name.strip("_").removeprefix("bitwise_")
    if name == "not":
        e.assign(out, "!{0}" if out.dtype is torch.bool else "~{0}", op.args[0])
    else:
        e.assign(out, f"({{0}} {signs[name]} {{1}})", *op.args[:2])


@_form("digamma")
def _digamma(e: Emitter, op: Op, out: Ref) -> None:
    e.helpers.add("digamma")
    e.assign(out, "digamma({0})", op.args[0])


@_form("polygamma")
def _polygamma(e: Emitter, op: Op, out: Ref) -> None:
    order, x = op.args[:2]
    if order != 1:
        raise _Unknown
    e.helpers.add("trigamma")
    e.assign(out, "trigamma({0})", x)


@_form("lerp")
def _lerp(e: Emitter, op: Op, out: Ref) -> None:
    e.assign(
        out, "({2} < 0.5 ? {0} + {2} * ({1} - {0}) : {1} - ({1} - {0}) * (1 - {2}))", *op.args[:3]
    )


@_form("addcmul", "addcdiv")
def _addcmul(e: Emitter, op: Op, out: Ref) -> None:
    sign = "*" if op.name.startswith("addcmul") else "/"
    e.assign(out, f"{{0}} + {{3}} * {{1}} {sign} {{2}}", *op.args[:3], argument(op, "value"))


@_form("where")
def _where(e: Emitter, op: Op, out: Ref) -> None:
    if len(op.args) < 3:
        raise _Unknown
    e.assign(out, "({0} ? {1} : {2})", *op.args[:3])


@_form("masked_fill")
def _masked_fill(e: Emitter, op: Op, out: Ref) -> None:
    e.assign(out, "({1} ? {2} : {0})", *op.args[:3])


@_form("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(e: Emitter, op: Op, out: Ref) -> None:
    name = op.name.rstrip("_")
    low = op.args[1] if name in ("clamp_min",) else argument(op, "min")
    high = op.args[1] if name == "clamp_max" else argument(op, "max")
    if name == "hardtanh":
        low, high = argument(op, "min_val"), argument(op, "max_val")
    low = -math.inf if low is None else low
    high = math.inf if high is None else high
    e.assign(out, "({0} < {1} ? {1} : {0} > {2} ? {2} : {0})", op.args[0], low, high)


@_form("copy")
def _copy(e: Emitter, op: Op, out: Ref) -> None:
    e.assign(out, "{0}", op.args[1], compute=op.args[1].dtype)


@_form("fill", "zero", "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros",
       "new_ones", "new_full", "scalar_tensor")  # fmt: skip
def _fill(e: Emitter, op: Op, out: Ref) -> None:
    kind = op.name.rstrip("_").removeprefix("new_").removesuffix("_like")
    value: Any = {"zero": 0, "zeros": 0, "ones": 1}.get(kind)
    if value is None:
        value = (
            op.args[0]
            if kind == "scalar_tensor"
            else op.args[2]
            if op.name == "new_full"
            else op.args[1]
        )
    e.assign(out, "{0}", value)


@_form("arange")
def _arange(e: Emitter, op: Op, out: Ref) -> None:
    raise _Unknown


# Activations and losses of networks.


@_form("softplus", "softplus_backward")
def _softplus(e: Emitter, op: Op, out: Ref) -> None:
    beta, threshold = argument(op, "beta"), argument(op, "threshold")
    if op.name == "softplus":
        text = "({0} * {1} > {2} ? {0} : log1p{f}(exp{f}({0} * {1})) / {1})"
        e.assign(out, text, op.args[0], beta, threshold)
    else:
        text = "({1} * {2} > {3} ? {0} : {0} / (1 + exp{f}(-{1} * {2})))"
        e.assign(out, text, *op.args[:2], beta, threshold)


@_form("log_sigmoid_forward")
def _log_sigmoid(e: Emitter, op: Op, out: Ref) -> None:
    e.assign(out, "(({0} < 0 ? {0} : 0) - log1p{f}(exp{f}(-fabs{f}({0}))))", op.args[0])


@_form("log_sigmoid_backward")
def _log_sigmoid_backward(e: Emitter, op: Op, out: Ref) -> None:
    e.assign(out, "{0} / (1 + exp{f}({1}))", *op.args[:2])


@_form("silu_backward")
def _silu_backward(e: Emitter, op: Op, out: Ref) -> None:
    s = "(1 / (1 + exp{f}(-{1})))"
    e.assign(out, f"{{0}} * {s} * (1 + {{1}} * (1 - {s}))", *op.args[:2])


@_form("gelu", "gelu_backward")
def _gelu(e: Emitter, op: Op, out: Ref) -> None:
    if argument(op, "approximate") != "none":
        raise _Unknown
    root, density = 1 / math.sqrt(2), 1 / math.sqrt(2 * math.pi)
    if op.name == "gelu":
        e.assign(out, "{0} * 0.5 * (1 + erf{f}({0} * {1}))", op.args[0], root)
    else:
        text = "{0} * (0.5 * (1 + erf{f}({1} * {2})) + {1} * {3} * exp{f}({1} * {1} / -2))"
        e.assign(out, text, *op.args[:2], root, density)


@_form("leaky_relu", "leaky_relu_backward", "elu")
def _leaky(e: Emitter, op: Op, out: Ref) -> None:
    if op.name == "leaky_relu":
        e.assign(out, "({0} > 0 ? {0} : {0} * {1})", op.args[0], argument(op, "negative_slope"))
    elif op.name == "leaky_relu_backward":
        e.assign(out, "({1} > 0 ? {0} : {0} * {2})", *op.args[:2], argument(op, "negative_slope"))
    else:
        raise _Unknown


@_form("binary_cross_entropy_with_logits")
def _bce(e: Emitter, op: Op, out: Ref) -> None:
    if argument(op, "weight") is not None or argument(op, "pos_weight") is not None:
        raise _Unknown
    if argument(op, "reduction") != 0:
        raise _Unknown
    text = "((1 - {1}) * {0} + ({0} < 0 ? -{0} : 0) + log1p{f}(exp{f}(-fabs{f}({0}))))"
    e.assign(out, text, *op.args[:2])


# Reductions.


def _dims(op: Op, name: str = "dim") -> list[int]:
    rank = len(op.args[0].shape)
    given = argument(op, name)
    if given is None or (isinstance(given, tuple) and not given):
        return list(range(rank))
    given = [given] if isinstance(given, int) else given
    return [d % max(rank, 1) for d in given] if rank else []


@_form("sum", "mean", "prod", "any", "all", "amax", "amin", "max", "min", "nansum")
def _reduction(e: Emitter, op: Op, out: Ref) -> None:
    source = op.args[0]
    takes_dim = len(op.outs) == 2 and op.outs[1].storage not in e.read  # indices of no use
    if op.name in ("max", "min") and (len(op.args) > 1 or len(op.outs) > 1) and not takes_dim:
        if not (len(op.args) == 2 and isinstance(op.args[1], Ref)):
            raise _Unknown
        FORMS["maximum" if op.name == "max" else "minimum"](e, op, out)
        return
    dims = _dims(op)
    compute = out.dtype
    start, combine, text = {
        "sum": ("0", "{0} + {1}", "{0}"),
        "mean": ("0", "{0} + {1}", "{0} / {1}"),
        "prod": ("1", "{0} * {1}", "{0}"),
        "any": ("0", "({0} || {1})", "({0} != 0)"),
        "all": ("1", "({0} && {1})", "({0} != 0)"),
        "amax": ("-INFINITY", "({1} != {1} || {1} > {0} ? {1} : {0})", "{0}"),
        "amin": ("INFINITY", "({1} != {1} || {1} < {0} ? {1} : {0})", "{0}"),
    }.get({"max": "amax", "min": "amin"}.get(op.name, op.name), ("", "", ""))
    if not combine:
        raise _Unknown
    if op.name in ("any", "all"):
        compute = source.dtype
    if "INFINITY" in start and not out.dtype.is_floating_point:
        if out.dtype is not torch.bool:
            raise _Unknown
        start = "0" if op.name in ("amax", "max") else "1"
    operands: tuple[Any, ...] = (source,)
    if op.name == "mean":
        operands = (source, math.prod(source.shape[d] for d in dims))
    e.reduce(out, operands, dims, combine, start, shape=source.shape, text=text, compute=compute)


@_form("_is_all_true")
def _is_all_true(e: Emitter, op: Op, out: Ref) -> None:
    source = op.args[0]
    dims = range(len(source.shape))
    e.reduce(out, source, dims, "({0} && {1})", "1", shape=source.shape, compute=source.dtype)


@_form("linalg_vector_norm")
def _norm(e: Emitter, op: Op, out: Ref) -> None:
    if argument(op, "ord") != 2 or argument(op, "dtype") is not None:
        raise _Unknown
    source = op.args[0]
    squares = e.record.allocate(out.shape, out.dtype, torch.device("cpu"))
    e.reduce(squares, source, _dims(op), "{0} + {1}", "0", shape=source.shape, text="{0} * {0}")
    e.assign(out, "sqrt{f}({0})", squares)


def _scratch(e: Emitter, like: Ref, shape: Sequence[int]) -> Ref:
    return e.record.allocate(shape, like.dtype, torch.device("cpu"))


def _kept(shape: Sequence[int], dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if d in dims else n for d, n in enumerate(shape))


@_form("logsumexp")
def _logsumexp(e: Emitter, op: Op, out: Ref) -> None:
    source, dims = op.args[0], _dims(op)
    top = _scratch(e, out, _kept(source.shape, dims))
    total = _scratch(e, out, top.shape)
    largest = "({1} != {1} || {1} > {0} ? {1} : {0})"
    e.reduce(top, source, dims, largest, "-INFINITY", shape=source.shape)
    text = "exp{f}({0} - (isfinite({1}) ? {1} : 0))"
    e.reduce(total, (source, top), dims, "{0} + {1}", "0", shape=source.shape, text=text)
    flat = [one._replace(shape=out.shape, stride=out.stride) for one in (total, top)]
    if top.numel != out.numel:
        raise _Unknown
    e.assign(out, "(log{f}({0}) + (isfinite({1}) ? {1} : 0))", *flat)


@_form("_softmax", "_log_softmax")
def _softmax(e: Emitter, op: Op, out: Ref) -> None:
    source, dim = op.args[0], op.args[1] % max(len(out.shape), 1)
    top = _scratch(e, out, _kept(source.shape, [dim]))
    total = _scratch(e, out, top.shape)
    largest = "({1} != {1} || {1} > {0} ? {1} : {0})"
    e.reduce(top, source, [dim], largest, "-INFINITY", shape=source.shape)
    e.reduce(
        total, (source, top), [dim], "{0} + {1}", "0", shape=source.shape, text="exp{f}({0} - {1})"
    )
    text = "exp{f}({0} - {1}) / {2}" if op.name == "_softmax" else "({0} - {1} - log{f}({2}))"
    e.assign(out, text, source, top, total)


@_form("_softmax_backward_data", "_log_softmax_backward_data")
def _softmax_backward(e: Emitter, op: Op, out: Ref) -> None:
    gradient, result = op.args[:2]
    dim = op.args[2] % max(len(out.shape), 1)
    total = _scratch(e, out, _kept(out.shape, [dim]))
    is_log = op.name.startswith("_log")
    text = "{0}" if is_log else "{0} * {1}"
    e.reduce(total, (gradient, result), [dim], "{0} + {1}", "0", shape=out.shape, text=text)
    final = "({0} - exp{f}({1}) * {2})" if is_log else "{1} * ({0} - {2})"
    e.assign(out, final, gradient, result, total)


@_form("cumsum", "cumprod")
def _cumulative(e: Emitter, op: Op, out: Ref) -> None:
    source = op.args[0]
    if not source.shape:
        e.assign(out, "{0}", source)
        return
    dim = op.args[1] % len(source.shape)
    sign, start = ("+", 0) if op.name == "cumsum" else ("*", 1)
    index = [f"i{d}" for d in range(len(out.shape))]
    lines = [
        f"for (long i{d} = 0; i{d} < {n}; i{d}++)" for d, n in enumerate(out.shape) if d != dim
    ]
    kind = ctype(out.dtype)
    lines += [
        f"{{ {kind} total = {start}; for (long i{dim} = 0; i{dim} < {out.shape[dim]}; i{dim}++) {{",
        f"  total = total {sign} ({kind}){e.at(source, *index)};",
        f"  {e.at(out, *index)} = total; }} }}",
    ]
    e.code(lines, [source], [out], out.numel)


# Parts of tensors.


def _part(ref: Ref, shape: Sequence[int], stride: Sequence[int], offset: int) -> Ref:
    return Ref(ref.storage, ref.offset + offset, tuple(shape), tuple(stride), ref.dtype)


@_form("cat")
def _cat(e: Emitter, op: Op, out: Ref) -> None:
    dim = (op.args[1] if len(op.args) > 1 else 0) % max(len(out.shape), 1)
    start = 0
    for one in op.args[0]:
        if one.shape == (0,):
            continue
        e.assign(_part(out, one.shape, out.stride, start * out.stride[dim]), "{0}", one)
        start += one.shape[dim]


@_form("stack")
def _stack(e: Emitter, op: Op, out: Ref) -> None:
    dim = (op.args[1] if len(op.args) > 1 else 0) % len(out.shape)
    stride = out.stride[:dim] + out.stride[dim + 1 :]
    for i, one in enumerate(op.args[0]):
        e.assign(_part(out, one.shape, stride, i * out.stride[dim]), "{0}", one)


@_form("repeat")
def _repeat(e: Emitter, op: Op, out: Ref) -> None:
    source = op.args[0]
    lead = len(out.shape) - len(source.shape)
    shape: list[int] = []
    to: list[int] = []
    origin: list[int] = []
    for d, (n, step) in enumerate(zip(out.shape, out.stride, strict=True)):
        own = source.shape[d - lead] if d >= lead else 1
        shape += [n // max(own, 1), own]
        to += [step * own, step]
        origin += [0, source.stride[d - lead] if d >= lead else 0]
    e.assign(_part(out, shape, to, 0), "{0}", _part(source, shape, origin, 0))


@_form("flip")
def _flip(e: Emitter, op: Op, out: Ref) -> None:
    source = op.args[0]
    stride, offset = list(source.stride), 0
    for d in op.args[1]:
        offset += (source.shape[d] - 1) * stride[d]
        stride[d] = -stride[d]
    e.assign(out, "{0}", _part(source, source.shape, stride, offset))


@_form("slice_backward", "select_backward", "diagonal_backward")
def _part_backward(e: Emitter, op: Op, out: Ref) -> None:
    gradient = op.args[0]
    e.assign(out, "0")
    stride = list(out.stride)
    if op.name == "slice_backward":
        start, step = argument(op, "start"), argument(op, "step")
        dim = argument(op, "dim") % len(out.shape)
        start = min(max(start + out.shape[dim] if start < 0 else start, 0), out.shape[dim])
        offset = start * stride[dim]
        stride[dim] *= step
    elif op.name == "select_backward":
        dim = op.args[2] % len(out.shape)
        offset = (op.args[3] % out.shape[dim]) * stride.pop(dim)
    else:
        shift, one, other = (argument(op, name) for name in ("offset", "dim1", "dim2"))
        one, other = one % len(stride), other % len(stride)
        offset = shift * stride[other] if shift >= 0 else -shift * stride[one]
        rest = [s for d, s in enumerate(stride) if d not in (one, other)]
        stride = [*rest, stride[one] + stride[other]]
    e.assign(_part(out, gradient.shape, stride, offset), "{0}", gradient)


@_form("constant_pad_nd")
def _pad(e: Emitter, op: Op, out: Ref) -> None:
    source, pad = op.args[:2]
    e.assign(out, "{0}", argument(op, "value"))
    rank, offset, origin, shape = len(out.shape), 0, 0, list(source.shape)
    for i in range(len(pad) // 2):
        d, low, high = rank - 1 - i, pad[2 * i], pad[2 * i + 1]
        offset += max(low, 0) * out.stride[d]
        origin += max(-low, 0) * source.stride[d]
        shape[d] += min(low, 0) + min(high, 0)
    if min(shape, default=1) > 0:
        e.assign(
            _part(out, shape, out.stride, offset),
            "{0}",
            _part(source, shape, source.stride, origin),
        )


@_form("tril", "triu")
def _triangle(e: Emitter, op: Op, out: Ref) -> None:
    source, shift = op.args[0], argument(op, "diagonal")
    rows, columns = out.shape[-2:]
    lead = len(out.shape) - 2
    index = [f"i{d}" for d in range(lead)]
    loops = "".join(f"for (long i{d} = 0; i{d} < {out.shape[d]}; i{d}++) " for d in range(lead))
    sign = "<=" if op.name == "tril" else ">="
    line = (
        f"{loops}for (long r = 0; r < {rows}; r++) for (long c = 0; c < {columns}; c++)"
        f" {e.at(out, *index, 'r', 'c')} = c {sign} r + {shift} ? {e.at(source, *index, 'r', 'c')}"
        " : 0;"
    )
    e.code([line], [source], [out], out.numel)


# Indices.


def _gathered(e: Emitter, target: Ref, indices: Sequence[Any], shape: Sequence[int]) -> Access:
    """A tensor at some indices, as it is read or written in a loop over a shape."""
    used = [i for i, one in enumerate(indices) if one is not None]
    if used != list(range(used[0], used[-1] + 1)):
        raise _Unknown
    if any(indices[i].dtype not in (torch.int64, torch.int32) for i in used):
        raise _Unknown
    rank = max(len(indices[i].shape) for i in used)
    lead, tail = used[0], len(target.shape) - used[-1] - 1
    stride = [*target.stride[:lead], *([0] * rank), *target.stride[used[-1] + 1 :]]
    stride = [0 if n == 1 else s for n, s in zip(shape, stride, strict=True)]
    steps = []
    for i in used:
        access = e.access(indices[i], shape[lead : lead + rank])
        access = access._replace(stride=((0,) * lead + access.stride + (0,) * tail))
        steps.append((access, target.stride[i], target.shape[i]))
    return Access(target.storage, target.offset, tuple(stride), target.dtype, tuple(steps))


@_form("index", "_unsafe_index")
def _index(e: Emitter, op: Op, out: Ref) -> None:
    target, indices = op.args[:2]
    e.assign(out, "{0}", _gathered(e, target, indices, out.shape), compute=out.dtype)


@_form("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(e: Emitter, op: Op, out: Ref) -> None:
    target, indices, values = op.args[:3]
    if out is not target and out.storage != target.storage:
        e.assign(out, "{0}", target)
    used = [i for i, one in enumerate(indices) if one is not None]
    between = np.broadcast_shapes(*[indices[i].shape for i in used])
    shape = (*out.shape[: used[0]], *between, *out.shape[used[-1] + 1 :])
    access = _gathered(e, out, indices, shape)
    e.scatter(access, values, shape, adds=bool(argument(op, "accumulate")))


def _along(e: Emitter, target: Ref, dim: int, index: Ref) -> Access:
    """A tensor at indices along one dimension, as `gather` reads it."""
    if not target.shape:
        raise _Unknown
    dim %= len(target.shape)
    stride = [0 if d == dim else s for d, s in enumerate(target.stride)]
    stride = [0 if n == 1 else s for n, s in zip(index.shape, stride, strict=True)]
    step = (e.access(index, index.shape), target.stride[dim], target.shape[dim])
    return Access(target.storage, target.offset, tuple(stride), target.dtype, (step,))


@_form("gather")
def _gather(e: Emitter, op: Op, out: Ref) -> None:
    target, dim, index = op.args[:3]
    e.assign(out, "{0}", _along(e, target, dim, index))


@_form("scatter_add", "scatter")
def _scatter_add(e: Emitter, op: Op, out: Ref) -> None:
    target, dim, index, values = op.args[:4]
    if len(op.args) > 4 or op.kwargs:
        raise _Unknown
    if out.storage != target.storage:
        e.assign(out, "{0}", target)
    if isinstance(values, Ref):
        values = values._replace(shape=index.shape)
    access = _along(e, out, dim, index)
    e.scatter(access, values, index.shape, adds=op.name.startswith("scatter_add"))


@_form("index_select", "embedding")
def _index_select(e: Emitter, op: Op, out: Ref) -> None:
    if op.name == "embedding":
        target, index, dim = op.args[0], op.args[1], 0
    else:
        target, dim, index = op.args[:3]
    if not target.shape or (op.name == "index_select" and len(index.shape) != 1):
        raise _Unknown
    indices: list[Any] = [None] * (dim % len(target.shape)) + [index]
    e.assign(out, "{0}", _gathered(e, target, indices, out.shape))


# Products of matrices.


def _product(e: Emitter, out: Ref, one: Ref, other: Ref, start: str = "0", scale: Any = 1) -> None:
    """out[..., i, j] = start + scale sum_k one[..., i, k] other[..., k, j]."""
    lead = len(out.shape) - 2
    rows, columns = out.shape[-2:]
    inner = one.shape[-1]
    index = [f"i{d}" for d in range(lead)]
    loops = "".join(f"for (long i{d} = 0; i{d} < {out.shape[d]}; i{d}++) " for d in range(lead))
    kind = ctype(out.dtype)
    factor = "" if scale == 1 else f"{number(scale, kind)} * "
    place = e.at(out, *index, "r", "c")
    left, right = e.at(one, *index, "r", "k"), e.at(other, *index, "k", "c")
    if other.stride[-1] == 1 and columns >= 4:  # rows of the right matrix, as they lie
        lines = [
            f"{loops}for (long r = 0; r < {rows}; r++) {{",
            f"  for (long c = 0; c < {columns}; c++) {place} = {start};",
            f"  for (long k = 0; k < {inner}; k++) {{ const {kind} w = {factor}{left};",
            f"    for (long c = 0; c < {columns}; c++) {place} += w * {right}; }}",
            "}",
        ]
    elif one.stride[-1] != 1 and one.stride[-2] == 1 and columns == 1:  # columns of the left one
        lines = [
            f"{loops}for (long c = 0; c < {columns}; c++) {{",
            f"  for (long r = 0; r < {rows}; r++) {place} = {start};",
            f"  for (long k = 0; k < {inner}; k++) {{ const {kind} w = {factor}{right};",
            f"    for (long r = 0; r < {rows}; r++) {place} += w * {left}; }}",
            "}",
        ]
    else:
        lines = [
            f"{loops}for (long r = 0; r < {rows}; r++) for (long c = 0; c < {columns}; c++) {{",
            f"  {kind} total = 0;",
            "  #pragma omp simd reduction(+ : total)",
            f"  for (long k = 0; k < {inner}; k++) total += {left} * {right};",
            f"  {place} = {start} + {factor}total;",
            "}",
        ]
    e.code(lines, [one, other, out], [out], out.numel * max(inner, 1))


def _column(ref: Ref) -> Ref:
    return ref._replace(shape=(*ref.shape, 1), stride=(*ref.stride, 0))


def _row(ref: Ref) -> Ref:
    return ref._replace(shape=(1, *ref.shape), stride=(0, *ref.stride))


@_form("mm", "bmm", "mv", "dot", "vdot")
def _matrix_product(e: Emitter, op: Op, out: Ref) -> None:
    one, other = op.args[:2]
    if op.name == "mv":
        other, out = _column(other), _column(out)
    elif op.name in ("dot", "vdot"):
        one, other, out = _row(one), _column(other), _column(_row(out))
    _product(e, out, one, other)


@_form("addmm", "addmv", "baddbmm")
def _added_product(e: Emitter, op: Op, out: Ref) -> None:
    bias, one, other = op.args[:3]
    beta, alpha = argument(op, "beta"), argument(op, "alpha")
    e.assign(out, "{0}" if beta == 1 else "{0} * {1}", bias, *([] if beta == 1 else [beta]))
    if op.name == "addmv":
        other, out = _column(other), _column(out)
    lead = [f"i{d}" for d in range(len(out.shape) - 2)]
    _product(e, out, one, other, e.at(out, *lead, "r", "c"), alpha)


@_form("linalg_solve_triangular")
def _solve_triangular(e: Emitter, op: Op, out: Ref) -> None:
    matrix, right = op.args[:2]
    upper, left = argument(op, "upper"), argument(op, "left")
    if not left:  # X A = B is A' X' = B'
        matrix, right, out = (
            ref._replace(
                shape=(*ref.shape[:-2], ref.shape[-1], ref.shape[-2]),
                stride=(*ref.stride[:-2], ref.stride[-1], ref.stride[-2]),
            )
            for ref in (matrix, right, out)
        )
        upper = not upper
    size, columns = out.shape[-2:]
    lead = len(out.shape) - 2
    index = [f"i{d}" for d in range(lead)]
    if len({len(matrix.shape), len(right.shape), len(out.shape)}) > 1:
        raise _Unknown
    held = [
        ["0" if n == 1 else i for n, i in zip(m.shape, index, strict=False)]
        for m in (matrix, right)
    ]
    loops = "".join(f"for (long i{d} = 0; i{d} < {out.shape[d]}; i{d}++) " for d in range(lead))
    rows = (
        f"for (long r = {size - 1}; r >= 0; r--)" if upper else f"for (long r = 0; r < {size}; r++)"
    )
    others = f"for (long k = r + 1; k < {size}; k++)" if upper else "for (long k = 0; k < r; k++)"
    last = "" if argument(op, "unitriangular") else f" / {e.at(matrix, *held[0], 'r', 'r')}"
    kind = ctype(out.dtype)
    lines = [
        f"{loops}for (long c = 0; c < {columns}; c++) {rows} {{",
        f"  {kind} total = {e.at(right, *held[1], 'r', 'c')};",
        f"  {others} total -= {e.at(matrix, *held[0], 'r', 'k')} * {e.at(out, *index, 'k', 'c')};",
        f"  {e.at(out, *index, 'r', 'c')} = total{last};",
        "}",
    ]
    e.code(lines, [matrix, right], [out], out.numel * size)


@_form("linalg_cholesky_ex")
def _cholesky(e: Emitter, op: Op, out: Ref) -> None:
    if argument(op, "upper") or argument(op, "check_errors"):
        raise _Unknown
    source, info = op.args[0], op.outs[1]
    size = out.shape[-1]
    lead = len(out.shape) - 2
    index = [f"i{d}" for d in range(lead)]
    loops = "".join(f"for (long i{d} = 0; i{d} < {out.shape[d]}; i{d}++) " for d in range(lead))

    def place(r: str, c: str) -> str:
        return e.at(out, *index, r, c)

    kind = ctype(out.dtype)
    lines = [
        f"{loops}{{ {e.at(info, *index)} = 0;",
        f"  for (long r = 0; r < {size}; r++) for (long c = 0; c < {size}; c++) {{",
        f"    if (c > r) {{ {place('r', 'c')} = 0; continue; }}",
        f"    {kind} total = {e.at(source, *index, 'r', 'c')};",
        f"    for (long k = 0; k < c; k++) total -= {place('r', 'k')} * {place('c', 'k')};",
        f"    if (r == c && !(total > 0) && !{e.at(info, *index)}) {e.at(info, *index)} = r + 1;",
        f"    {place('r', 'c')} = r == c ? sqrt(total) : total / {place('c', 'c')};",
        "  } }",
    ]
    e.code(lines, [source], [out, info], out.numel * size)
