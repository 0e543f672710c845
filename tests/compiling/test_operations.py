"""Every operation that has a form in C, against torch.

Each case is a function of some tensors. The cases of a table are recorded together, with their
gradients where there are any, and become one C function, so that its loops are shared by cases too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vi.compiling.clean import clean
from pyro_vi.compiling.native import Function
from pyro_vi.compiling.operations import FORMS
from pyro_vi.compiling.tape import HELD, Record, Tape

Case = Callable[[Any], Any]

# fmt: off
UNARY: dict[str, Case] = {
    "neg": lambda v: -v.x, "exp": lambda v: v.x.exp(), "exp2": lambda v: v.x.exp2(),
    "expm1": lambda v: v.x.expm1(), "log": lambda v: v.p.log(), "log2": lambda v: v.p.log2(),
    "log10": lambda v: v.p.log10(), "log1p": lambda v: v.p.log1p(), "sqrt": lambda v: v.p.sqrt(),
    "rsqrt": lambda v: v.p.rsqrt(), "abs": lambda v: v.x.abs(), "square": lambda v: v.x.square(),
    "reciprocal": lambda v: v.x.reciprocal(), "sigmoid": lambda v: v.x.sigmoid(),
    "tanh": lambda v: v.x.tanh(), "sin": lambda v: v.x.sin(), "cos": lambda v: v.x.cos(),
    "tan": lambda v: v.x.tan(), "asin": lambda v: v.u.asin(), "acos": lambda v: v.u.acos(),
    "atan": lambda v: v.x.atan(), "sinh": lambda v: v.x.sinh(), "cosh": lambda v: v.x.cosh(),
    "atanh": lambda v: v.u.atanh(), "asinh": lambda v: v.x.asinh(),
    "acosh": lambda v: (1 + v.p).acosh(), "erf": lambda v: v.x.erf(), "erfc": lambda v: v.x.erfc(),
    "lgamma": lambda v: v.p.lgamma(), "lgamma below 0": lambda v: (v.u * 0.4 - 1.5).lgamma(),
    "digamma": lambda v: v.p.digamma(), "digamma below 0": lambda v: (v.u * 0.4 - 1.5).digamma(),
    "trigamma": lambda v: torch.polygamma(1, v.p).detach(),
    "trigamma below 0": lambda v: torch.polygamma(1, v.u * 0.4 - 1.5).detach(),
    "floor": lambda v: v.x.floor(), "ceil": lambda v: v.x.ceil(), "trunc": lambda v: v.x.trunc(),
    "round": lambda v: (2 * v.x).round(), "frac": lambda v: v.x.frac(),
    "sign": lambda v: v.x.sign(), "sgn": lambda v: v.x.sgn(), "relu": lambda v: v.x.relu(),
    "silu": lambda v: F.silu(v.x), "gelu": lambda v: F.gelu(v.x),
    "leaky_relu": lambda v: F.leaky_relu(v.x, 0.2), "softplus": lambda v: F.softplus(v.x),
    "softplus, scaled": lambda v: F.softplus(v.x, 3.0, 2.0),
    "softplus, far": lambda v: F.softplus(50 * v.x), "logit": lambda v: (v.u / 3 + 0.5).logit(),
    "logsigmoid": lambda v: F.logsigmoid(v.x), "logsigmoid, far": lambda v: F.logsigmoid(300 * v.x),
    "hardtanh": lambda v: F.hardtanh(v.x), "elu": lambda v: F.elu(v.x, 0.7),
    "threshold": lambda v: F.threshold(v.x, 0.1, 20.0), "softmax": lambda v: v.x.softmax(0),
    "log_softmax": lambda v: v.t.log_softmax(1), "pow 0": lambda v: v.x**0,
    "pow 1": lambda v: v.x**1, "pow 2": lambda v: v.x**2, "pow 3": lambda v: v.x**3,
    "pow 4": lambda v: v.x**4, "pow -1": lambda v: v.x**-1, "pow -2": lambda v: v.x**-2,
    "pow .5": lambda v: v.p**0.5, "pow -.5": lambda v: v.p**-0.5, "pow 1.7": lambda v: v.p**1.7,
    "number ** x": lambda v: 2.5**v.x,
}
BINARY: dict[str, Case] = {
    "add": torch.add, "sub": torch.sub, "rsub": torch.rsub, "mul": torch.mul, "div": torch.div,
    "maximum": torch.maximum, "minimum": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin,
    "atan2": torch.atan2, "hypot": torch.hypot, "logaddexp": torch.logaddexp,
    "copysign": torch.copysign, "xlogy": lambda x, y: torch.xlogy(x, y.abs() + 0.1),
    "pow": lambda x, y: (x.abs() + 0.1) ** y, "fmod": torch.fmod, "remainder": torch.remainder,
    "floor_divide": lambda x, y: torch.floor_divide(x.detach(), y.detach()),
    "add, alpha": lambda x, y: torch.add(x, y, alpha=-2.5),
    "sub, alpha": lambda x, y: torch.sub(x, y, alpha=3),
    "rsub, alpha": lambda x, y: torch.rsub(x, y, alpha=1.5),
    "div, floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "div, trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3), "lerp, far": lambda x, y: torch.lerp(x, y, 0.8),
    "lerp, tensor": lambda x, y: torch.lerp(x, y, x.sigmoid()),
    "addcmul": lambda x, y: torch.addcmul(x, y, y + 1, value=0.7),
    "addcdiv": lambda x, y: torch.addcdiv(x, y, y.abs() + 1, value=-0.7),
    "where": lambda x, y: torch.where(x > y, x, y * 2),
    "where, numbers": lambda x, y: torch.where(x > y, 1.5, x) + torch.where(x > 0, y, 0),
    "clamp": lambda x, y: torch.clamp(x, y - 0.4, y + 0.3),
    "clamp, one side": lambda x, y: torch.clamp(x, min=y) + torch.clamp(x, max=y),
    "bce": lambda x, y: F.binary_cross_entropy_with_logits(x + 0 * y, y.sigmoid() + 0 * x,
        reduction="none"), "eq": lambda x, y: torch.eq(x, y), "ne": torch.ne, "lt": torch.lt,
    "le": torch.le, "gt": torch.gt, "ge": torch.ge, "logical_and": torch.logical_and,
    "logical_or": lambda x, y: torch.logical_or(x > 0, y), "logical_xor": torch.logical_xor,
}
LAID_OUT = ("add, alpha", "mul", "where", "clamp", "le")
NUMBERS: dict[str, Case] = {
    "x + 2": lambda v: v.x + 2, "2 - x": lambda v: 2 - v.x, "x * .3": lambda v: v.x * 0.3,
    "x / 3": lambda v: v.x / 3, "3 / x": lambda v: 3 / v.x, "x % .7": lambda v: v.x % 0.7,
    "x % -.7": lambda v: v.x % -0.7, "x // .1": lambda v: v.x.detach() // 0.1,
    "fmod": lambda v: v.x.fmod(0.4), "clamp": lambda v: v.x.clamp(-0.5, 0.6),
    "clamp, crossed": lambda v: v.x.clamp(0.5, -0.5), "clamp_min": lambda v: v.x.clamp_min(0.1),
    "clamp_max": lambda v: v.x.clamp_max(0.1), "clamp above": lambda v: v.x.clamp(max=0.2),
    "masked_fill": lambda v: v.x.masked_fill(v.b, -7.0),
    "masked_fill, tensor": lambda v: v.x.masked_fill(v.b, v.s),
    "masked_fill, broadcast": lambda v: v.t.masked_fill(v.b[0], 2.0),
    "isnan": lambda v: torch.isnan(v.x), "isinf": lambda v: torch.isinf(1 / v.x.trunc()),
    "isfinite": lambda v: torch.isfinite(1 / v.x.trunc()), "signbit": lambda v: v.x.signbit(),
    "nan_to_num": lambda v: (v.x.trunc() / v.x.trunc()).nan_to_num(3.0, 4.0, 5.0),
    "0-d": lambda v: v.s.exp() * 2 + v.s / 3, "0-d and 1 by 1": lambda v: v.s + v.x[:1, :1],
}
NO_NUMBERS: dict[str, Case] = {
    "int add": lambda v: v.i + v.n, "int mul": lambda v: v.i * v.n, "int - 3": lambda v: 3 - v.i,
    "int / int": lambda v: v.i / v.n, "int * float": lambda v: v.i * 0.5,
    "int + tensor": lambda v: v.i + v.x, "int pow": lambda v: v.i**2, "int neg": lambda v: -v.i,
    "int abs": lambda v: v.i.abs(), "int sign": lambda v: v.i.sign(),
    "int exp": lambda v: v.i.exp(), "int clamp": lambda v: v.i.clamp(-1, 1),
    "int clamp, one side": lambda v: v.i.clamp(min=0),
    "int clamp, tensor": lambda v: v.i.clamp(max=v.n), "int maximum": lambda v: v.i.maximum(v.n),
    "int // 2": lambda v: v.i // 2, "int // -2": lambda v: v.i // -2, "int % 3": lambda v: v.i % 3,
    "int % -3": lambda v: v.i % -3, "int fmod": lambda v: v.i.fmod(3),
    "int relu": lambda v: v.i.relu(),
    "int trunc": lambda v: torch.div(v.i, 2, rounding_mode="trunc"),
    "int where": lambda v: torch.where(v.b, v.i, v.n),
    "int where, number": lambda v: torch.where(v.b, v.i, 0.5), "int eq": lambda v: v.i == v.n,
    "int == .5": lambda v: v.i == 0.5, "int < float": lambda v: v.i < v.x,
    "int sum": lambda v: v.i.sum(0), "int prod": lambda v: v.i.prod(),
    "int amax": lambda v: v.i.amax(1), "int min": lambda v: v.i.min(),
    "int cumsum": lambda v: v.i.cumsum(1), "int mean": lambda v: v.i.to(v.x.dtype).mean(),
    "int any": lambda v: v.i.any(1), "int bits": lambda v: (v.i & v.n) + (v.i | v.n) - (v.i ^ v.n),
    "int not": lambda v: ~v.i, "int to bool": lambda v: v.i.bool(),
    "int32": lambda v: v.i.int() * 2,
    "int round": lambda v: v.i.round() + v.i.floor() + v.i.ceil() + v.i.trunc(),
    "int masked": lambda v: v.i.masked_fill(v.b, 9), "int @ int": lambda v: v.i @ v.n.T,
    "float to int": lambda v: (3 * v.x).long(), "float to bool": lambda v: v.x.bool(),
    "float to uint8": lambda v: (3 * v.p).to(torch.uint8), "to double": lambda v: v.x.double(),
    "to float": lambda v: v.x.float() * 2, "bool to float": lambda v: v.b.to(v.x.dtype),
    "bool to int": lambda v: v.b.long(), "not": lambda v: ~v.b, "and": lambda v: v.b & v.d,
    "or": lambda v: v.b | v.d, "xor": lambda v: v.b ^ v.d, "bool eq": lambda v: v.b == v.d,
    "bool add": lambda v: v.b + v.d, "bool mul": lambda v: v.b * v.d,
    "bool sum": lambda v: v.b.sum(1), "bool * float": lambda v: v.b * v.x,
    "all": lambda v: v.b.all(), "checked": lambda v: torch._is_all_true(v.b | v.d | True),
    "any": lambda v: v.b.any(0), "all, keepdim": lambda v: v.b.all(1, keepdim=True),
    "all of floats": lambda v: v.x.all(), "bool amax": lambda v: v.b.amax(0),
    "bool min": lambda v: v.b.min(), "bool max": lambda v: v.b.max(),
    "logical_not": lambda v: v.x.logical_not(), "bool and int": lambda v: v.b & v.i,
    "and of numbers": lambda v: v.b & True, "bool where": lambda v: torch.where(v.b, v.d, v.x > 0),
}
REDUCED: dict[str, Case] = {
    "sum": torch.sum, "mean": torch.mean, "amax": torch.amax, "amin": torch.amin,
    "logsumexp": torch.logsumexp, "norm": torch.linalg.vector_norm,
    "norm 1": lambda x, **k: torch.linalg.vector_norm(x, 1, **k),
    "norm inf": lambda x, **k: torch.linalg.vector_norm(x, torch.inf, **k), "var": torch.var,
    "std": lambda x, **k: torch.std(x, correction=0, **k),
    "var_mean": lambda x, **k: sum(torch.var_mean(x, **k)), "nansum": torch.nansum,
    "std_mean": lambda x, **k: sum(torch.std_mean(x, correction=0, **k)),
}
FULLY = [REDUCED[name] for name in ("sum", "amax", "logsumexp")]
VARIANCES = [REDUCED[name] for name in ("var", "std", "var_mean")]
OVER_ONE: dict[str, Case] = {
    "prod": torch.prod, "max": lambda x, **k: torch.max(x, **k)[0],
    "min": lambda x, **k: torch.min(x, **k)[0], "argmax": torch.argmax, "argmin": torch.argmin,
    "max, index": lambda x, **k: torch.max(x, **k)[1],
}
ALONG: dict[str, Case] = {
    "cumsum": torch.cumsum, "cumprod": torch.cumprod, "softmax": torch.softmax,
    "log_softmax": torch.log_softmax, "logcumsumexp": torch.logcumsumexp,
}
LAYOUT: dict[str, Case] = {
    "cat": lambda v: torch.cat([v.x, v.y, v.x[:1]]), "cat, dim": lambda v: torch.cat([v.x, v.c], 1),
    "cat, negative": lambda v: torch.cat([v.x.T, v.y.T], -1),
    "cat, one": lambda v: torch.cat([v.r]),
    "cat, empty": lambda v: torch.cat([v.r[:0], v.r, v.e.flatten()]),
    "cat of dtypes": lambda v: torch.cat([v.x, v.i]), "stack": lambda v: torch.stack([v.x, v.y]),
    "stack, last": lambda v: torch.stack([v.x, v.y, v.x], -1),
    "stack, 0-d": lambda v: torch.stack([v.s, v.r[0]]),
    "stack, transposed": lambda v: torch.stack([v.x.T, v.y.T], 1),
    "repeat": lambda v: v.x.repeat(2, 3), "repeat, longer": lambda v: v.r.repeat(2, 1, 3),
    "repeat, 0-d": lambda v: v.s.repeat(3), "flip": lambda v: v.x.flip(0) * v.y,
    "flip, two": lambda v: v.t.flip(0, -1), "flip of flip": lambda v: v.x.T.flip(1).flip(0),
    "roll": lambda v: v.x.roll(1, 0), "pad": lambda v: F.pad(v.x, (1, 2, 0, 1), value=0.3),
    "pad, negative": lambda v: F.pad(v.t, (-1, 1, 2, -1)),
    "pad, transposed": lambda v: F.pad(v.x.T, (0, 1)), "tril": lambda v: v.t.tril(),
    "triu": lambda v: v.x.T.triu(1), "tril, below": lambda v: v.x.tril(-1),
    "triu, below": lambda v: v.t.transpose(0, 2).triu(-1),
    "diagonal": lambda v: v.t.diagonal(0, 1, 2) * 2,
    "diagonal, other": lambda v: v.t.diagonal(-1, 0, 1) * 2,
    "diag_embed": lambda v: v.x.diag_embed(1), "diag": lambda v: v.r.diag(),
    "expand": lambda v: v.r.expand(3, 4) * v.x, "row": lambda v: v.x[1],
    "column": lambda v: v.x[:, -1] * 2, "strides": lambda v: v.t[:, ::2, 1::2] + 1,
    "view": lambda v: v.x.view(2, 6).T * 2, "reshape": lambda v: v.x.T.reshape(6, 2),
    "clone": lambda v: v.x.T.clone(), "contiguous": lambda v: v.x.T.contiguous(),
    "permute": lambda v: v.t.permute(2, 0, 1) * v.x[:, :2].T[:, :3],
    "unbind": lambda v: sum(v.t.unbind(1)), "split": lambda v: v.x.split([1, 3], 1)[1].exp(),
    "chunk": lambda v: v.x.chunk(2, 1)[0] + v.x.chunk(2, 1)[1],
    "unfold": lambda v: v.r.unfold(0, 2, 1) * 2, "squeeze": lambda v: v.c.squeeze() * 2,
    "unsqueeze": lambda v: v.r[:, None] * v.r[None], "outer": lambda v: torch.outer(v.r, v.c[:, 0]),
    "zeros": lambda v: torch.zeros_like(v.x) + v.s, "ones": lambda v: v.x.new_ones(3) * v.s,
    "ones_like": lambda v: torch.ones_like(v.x) * v.s,
    "full_like": lambda v: torch.full_like(v.x, 2.5) * v.s,
    "select_scatter": lambda v: v.t.select_scatter(v.x, 0, 1),
    "slice_scatter": lambda v: v.x.slice_scatter(v.y[:2], 0, 1, 3),
    "diagonal_scatter": lambda v: v.x.diagonal_scatter(v.r[:3]),
    "full": lambda v: v.x.new_full((2,), 3.5) * v.s, "empty": lambda v: v.e.exp(),
    "sum of empty": lambda v: v.e.sum(0) + v.e.sum(), "prod of empty": lambda v: v.e.prod(0),
    "logsumexp of empty": lambda v: v.e.logsumexp(0).exp(), "mm of empty": lambda v: v.e.T @ v.e,
    "meshgrid": lambda v: torch.meshgrid(v.r, v.c[:, 0], indexing="ij")[1] * 2,
    "tensor": lambda v: v.s * v.x.new_tensor(2.0), "trace": lambda v: v.m.diagonal().sum(),
    "tile": lambda v: v.x.tile(2), "movedim": lambda v: v.t.movedim(0, -1).flatten(1) * 2,
    "repeat_interleave": lambda v: v.r.repeat_interleave(2),
    "arange": lambda v: torch.arange(4, dtype=v.x.dtype) * v.s,
    "eye": lambda v: torch.eye(4, dtype=v.x.dtype) * v.r, "diff": lambda v: v.x.diff(),
    "broadcast": lambda v: torch.broadcast_tensors(v.r, v.c)[0] * v.x,
    "linspace": lambda v: torch.linspace(0, 1, 4, dtype=v.x.dtype) + v.r,
    "swap": lambda v: v.t.mT @ v.x,
}
INDEXED: dict[str, Case] = {
    "rows": lambda v: v.x[v.k], "columns": lambda v: v.x[:, v.k], "pairs": lambda v: v.x[v.k, v.k],
    "last": lambda v: v.t[..., v.k], "two dims": lambda v: v.m[v.h],
    "two of three": lambda v: v.t[:, v.k, v.k + 1], "first two": lambda v: v.t[v.k % 2, v.k],
    "apart": lambda v: v.t[v.k % 2, :, v.k], "None": lambda v: v.x[None, v.k, None],
    "broadcast": lambda v: v.x[v.k[:, None], v.h[0]], "number": lambda v: v.t[1, v.k],
    "transposed": lambda v: v.x.T[v.k], "fixed mask": lambda v: v.x[MASK],
    "mask and rows": lambda v: v.t[:, MASK], "of a view": lambda v: v.t[:, 1:, ::2][0, v.k % 2],
    "an int row": lambda v: v.i[v.k], "int32": lambda v: v.x[v.k.int()],
    "empty": lambda v: v.x[v.k[:0]], "gather": lambda v: v.x.gather(1, v.h),
    "gather, rows": lambda v: v.x.gather(0, v.h % 3),
    "gather, fewer": lambda v: v.t.gather(2, v.h[None, :2, :3]),
    "gather, transposed": lambda v: v.x.T.gather(0, v.h.T),
    "gather, vector": lambda v: v.r.gather(0, v.h[0]),
    "take_along_dim": lambda v: v.x.take_along_dim(v.h, 1),
    "index_select": lambda v: v.x.index_select(0, v.k % 3),
    "index_select, dim": lambda v: v.t.index_select(-1, v.k % 3),
    "embedding": lambda v: F.embedding(v.h, v.m),
    "embedding, padded": lambda v: F.embedding(v.h, v.m, padding_idx=0),
    "scatter": lambda v: torch.zeros_like(v.x).scatter(1, v.one, v.c),
    "scatter, number": lambda v: v.x.scatter(1, v.one, 3.0),
    "scatter_add": lambda v: v.x.scatter_add(1, v.h, v.y),
    "scatter_add, fewer": lambda v: v.x.scatter_add(0, v.h[:2] % 3, v.y[:2]),
    "scatter_add_": lambda v: v.x.clone().scatter_add_(1, v.h, v.y),
    "index_add": lambda v: v.x.index_add(0, v.k % 3, v.z),
    "index_add, 0": lambda v: v.x.index_add(0, v.k % 3, v.z, alpha=0),
    "index_add, alpha": lambda v: v.x.index_add(1, v.k % 3, v.z.T[:3], alpha=2.0),
    "index_put": lambda v: v.x.index_put((v.one[:, 0] % 3,), v.s),
    "index_put, added": lambda v: v.x.index_put((v.k, v.k), v.z[:, 0], accumulate=True),
    "index_put_": lambda v: v.x.clone().index_put_((v.k,), v.z, accumulate=True),
    "index_copy": lambda v: v.x.index_copy(0, v.one[:1, 0] % 3, v.y[:1]),
    "index_fill": lambda v: v.x.index_fill(0, v.k[:2] % 3, 2.0),
    "x[k] = y": lambda v: put(v.x, v.one[:, 0] % 3, v.y[0]),
    "x[:, k] = number": lambda v: put(v.x, (slice(None), v.k), 4.0),
    "x[k] += y": lambda v: put(v.m, v.one[:1, 0], v.m[v.one[:1, 0]] + v.r),
    "x[mask] = y": lambda v: put(v.x, MASK, v.s), "x[any mask] = 1": lambda v: put(v.x, v.b, 1.0),
    "x[any mask of rows] = 2": lambda v: put(v.t, v.b[:2, :3], 2.0),
    "x[:, None, k]": lambda v: v.x[:, None, v.k] * 2,
    "count": lambda v: torch.zeros(4, dtype=v.x.dtype).index_add(0, v.k % 3, v.z[:, 0] * 0 + 1),
    "apart, put": lambda v: put(v.t, (v.one[:1, 0] % 2, slice(None), v.k[:1]), v.s),
    "bincount by ==": lambda v: (v.h[..., None] == torch.arange(4)).sum((0, 1)) * v.s,
}
IN_PLACE: dict[str, Case] = {
    "row += 1": lambda v: change(v.x, lambda x: x[0].add_(1)),
    "column = y": lambda v: change(v.x, lambda x: x[:, 1].copy_(v.y[:, 2])),
    "column = 0-d": lambda v: change(v.x, lambda x: x[:, 1].copy_(v.s)),
    "transposed *= y": lambda v: change(v.x, lambda x: x.T.mul_(v.y.T + 1)),
    "steps": lambda v: change(v.x, lambda x: x[::2, 1::2].sub_(v.y[::2, ::2])),
    "row = other row": lambda v: change(v.x, lambda x: x[0].copy_(x[2])),
    "read before and after": lambda v: change(v.x, lambda x: x[0].copy_(x.sum(0)), lambda x: x[:,
        0].copy_(x.sum(1)), lambda x: x.div_(x.sum())),
    "overlapping": lambda v: change(v.x, lambda x: x.view(-1)[2:9].mul_(0.7), lambda x:
        x.T[1].add_(x[:, 0]), lambda x: x.view(6, 2)[:, 1].add_(x.view(6, 2)[:, 0])),
    "fill": lambda v: change(v.x, lambda x: x[1].fill_(2.5), lambda x: x[:, 0].zero_()),
    "clamp": lambda v: change(v.x, lambda x: x.clamp_(-0.3, 0.4), lambda x: x[0].clamp_min_(0.1)),
    "masked": lambda v: change(v.x, lambda x: x.masked_fill_(v.b, 0.0), lambda x: x[1].abs_()),
    "several": lambda v: change(v.x, lambda x: x.neg_().add_(v.y, alpha=2).exp_()),
    "addcmul": lambda v: change(v.x, lambda x: x.addcmul_(v.y, v.y, value=0.5).addcdiv_(v.y, v.p)),
    "lerp": lambda v: change(v.x, lambda x: x.lerp_(v.y, 0.9)),
    "pow": lambda v: change(v.x, lambda x: x.pow_(2).rsqrt_()),
    "comparing": lambda v: change(v.x, lambda x: x.gt_(0)),
    "bool": lambda v: change(v.b, lambda b: b[0].logical_not_(), lambda b: b.logical_and_(v.d)),
    "int": lambda v: change(v.i, lambda i: i[0].add_(5), lambda i: i.mul_(2).clamp_(max=4)),
    "int to float": lambda v: change(v.x, lambda x: x[0].copy_(v.i[0]), lambda x:
        x[1].copy_(v.b[0])),
    "float to int": lambda v: change(v.i, lambda i: i[0].copy_(3 * v.x[0])),
    "cumsum": lambda v: change(v.x, lambda x: x.cumsum_(1)),
    "tril": lambda v: change(v.x, lambda x: x.tril_()),
    "loop": lambda v: change(v.r, *[lambda r, i=i: r[i].copy_(r[i - 1] * 0.5 + r[i]) for i in
        range(1, 4)]),
    "empty": lambda v: change(torch.empty_like(v.x), lambda x: x.copy_(v.y), lambda x:
        x[0].fill_(v.s)),
    "a list": lambda v: change(v.x.detach(), lambda x: torch._foreach_mul_([x, x[0]], 2.0)),
    "new": lambda v: change(v.x.new_zeros(2, 4), lambda x: x[0].add_(v.r), lambda x:
        x[1:].sub_(v.r)),
}
PRODUCTS: dict[str, Case] = {
    "mm": lambda v: v.x @ v.y.T, "mm, left transposed": lambda v: v.x.T @ v.y,
    "mm, both": lambda v: v.m.T @ v.m.T, "mm, strided": lambda v: v.t[:, 0, ::2] @ v.x[:2],
    "mm, narrow": lambda v: v.x @ v.z[:4, :1], "mm, one row": lambda v: v.x[:1] @ v.m,
    "mm, expanded": lambda v: v.c.expand(3, 4) @ v.m, "mv": lambda v: v.x @ v.r,
    "mv, transposed": lambda v: v.x.T @ v.c[:, 0], "mv, strided": lambda v: v.x @ v.m[:, 1],
    "dot": lambda v: v.r @ v.m[0], "dot, strided": lambda v: v.m[:, 1] @ v.m[:, 2],
    "bmm": lambda v: v.t @ v.t.mT, "bmm, broadcast": lambda v: v.t @ v.m,
    "bmm, left": lambda v: v.m @ v.t.mT, "bmm, transposed": lambda v: v.t.mT @ v.t,
    "batched mv": lambda v: v.t @ v.r, "vector by batch": lambda v: v.c[:, 0] @ v.t,
    "addmm": lambda v: torch.addmm(v.r, v.x, v.m),
    "addmm, scaled": lambda v: torch.addmm(v.x, v.x, v.m, beta=0.3, alpha=2),
    "addmm, no bias": lambda v: torch.addmm(v.x, v.x, v.m, beta=0),
    "addmv": lambda v: torch.addmv(v.c[:, 0], v.x, v.r, alpha=0.5),
    "addmv, scaled": lambda v: torch.addmv(v.c[:, 0], v.x, v.r, beta=2.0),
    "baddbmm": lambda v: torch.baddbmm(v.c, v.t, v.m.expand(2, 4, 4), beta=0.5),
    "linear": lambda v: F.linear(v.x, v.m, v.r),
    "einsum": lambda v: torch.einsum("bij,kj->bik", v.t, v.x),
    "einsum, three": lambda v: torch.einsum("ij,bjk,k->bi", v.x[:, :3], v.t, v.r),
    "matrix power": lambda v: v.m @ v.m @ v.m, "inner": lambda v: torch.inner(v.x, v.r),
    "vdot": lambda v: torch.vdot(v.r, v.m[2]), "kron": lambda v: torch.kron(v.x, v.c),
    "bilinear": lambda v: (v.x @ v.m * v.y).sum(-1), "wide": lambda v: v.x.T @ v.x,
    "ger": lambda v: torch.outer(v.r, v.r) @ v.r, "chain": lambda v: v.x @ v.m @ v.x.T,
    "addr": lambda v: torch.addr(v.m, v.r, v.m[0]),
    "addbmm": lambda v: v.m[:3] + (v.t @ v.m).sum(0),
}
SOLVED: dict[str, Case] = {
    "cholesky": lambda v: torch.linalg.cholesky(v.spd),
    "cholesky, batch": lambda v: torch.linalg.cholesky(v.spd * v.p[0, :2, None, None]),
    "cholesky, 1 by 1": lambda v: torch.linalg.cholesky(v.p[:1, :1]),
    "cholesky, transposed": lambda v: torch.linalg.cholesky(v.spd.T),
    "cholesky, upper": lambda v: torch.linalg.cholesky(v.spd, upper=True),
    "cholesky_ex": lambda v: torch.linalg.cholesky_ex(v.spd)[0],
    "cholesky_inverse": lambda v: torch.cholesky_inverse(v.low),
    "cholesky_solve": lambda v: torch.cholesky_solve(v.x.T, v.low),
    "cholesky_solve, upper": lambda v: torch.cholesky_solve(v.x.T, v.low.T, upper=True),
    "logdet": lambda v: torch.linalg.cholesky(v.spd).diagonal().log().sum(),
    **{ f"solve, {upper=}, {left=}, {unit=}": lambda v, upper=upper, left=left, unit=unit:
        torch.linalg.solve_triangular((v.low.T if upper else v.low) * (0.5 if unit else 1), v.x.T
        if left else v.x, upper=upper, left=left, unitriangular=unit) for upper in (False, True)
        for left in (False, True) for unit in (False, True) },
    "solve, batch": lambda v: torch.linalg.solve_triangular(v.lows, v.t.mT, upper=False),
    "solve, one matrix": lambda v: torch.linalg.solve_triangular(v.low, v.t.mT, upper=False),
    "solve, one side": lambda v: torch.linalg.solve_triangular(v.lows, v.x.T, upper=False),
    "solve, flipped": lambda v: torch.linalg.solve_triangular(v.low.flip(0, 1), v.x.T, upper=True),
    "solve, vector": lambda v: torch.linalg.solve_triangular(v.low, v.r[:, None], upper=False),
    "normal": lambda v: torch.distributions.MultivariateNormal(v.r, scale_tril=v.low,
        validate_args=False).log_prob(v.x),
    "normal, batch": lambda v: torch.distributions.MultivariateNormal(v.x[:2], scale_tril=v.lows,
        validate_args=False).log_prob(v.t.transpose(0, 1)),
}
# fmt: on
MASK = torch.tensor([[True, False, True, False]] * 2 + [[False, False, True, True]])


def put(x: Tensor, index: Any, value: Any) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def change(x: Tensor, *changes: Callable[[Tensor], Any]) -> Tensor:
    """A copy of a tensor after some operations in place."""
    x = x.clone()
    for one in changes:
        one(x)
    return x


def layouts(function: Case) -> dict[str, Case]:
    """A function of two tensors, on operands that lie in memory in various ways."""
    return {
        "": lambda v: function(v.x, v.y),
        "transposed": lambda v: function(v.x.T, v.y.T),
        "one transposed": lambda v: function(v.m.T, v.m + 1),
        "row": lambda v: function(v.x, v.r),
        "columns": lambda v: function(v.c, v.r),
        "0-d": lambda v: function(v.s, v.x),
        "strided": lambda v: function(v.x[:, ::2], v.t[0, :, 1::2]),
        "flipped": lambda v: function(v.x.flip(0), v.y.flip(1)),
        "expanded": lambda v: function(v.x[:1].expand(3, 4), v.y),
        "empty": lambda v: function(v.e, v.r),
    }


def few_layouts(function: Case) -> dict[str, Case]:
    every = layouts(function)
    return {name: every[name] for name in ("", "columns")}


def reductions(function: Case) -> dict[str, Case]:
    """A reduction over every choice of dimensions."""
    cases: dict[str, Case] = {}
    for dim in (0, 1, -1, (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        for keepdim in (False, True)[: 2 if function in FULLY else 1]:
            keys = {"dim": dim, "keepdim": keepdim}
            cases[f"{dim} {keepdim}"] = lambda v, keys=keys: function(v.t, **keys)
    cases["kept"] = lambda v: function(v.t, dim=(1,), keepdim=True)
    cases["transposed"] = lambda v: function(v.t.permute(2, 0, 1), dim=(0, 2))
    cases["expanded"] = lambda v: function(v.r.expand(3, 4), dim=1)
    cases["flipped"] = lambda v: function(v.x.flip(0), dim=0)
    cases["of one"] = lambda v: function(v.c, dim=1) if function not in VARIANCES else v.s
    return cases


def along(function: Case, **keys: Any) -> dict[str, Case]:
    """A function along each dimension."""
    cases: dict[str, Case] = {}
    for dim in (0, 1, -1):
        cases[f"{dim}"] = lambda v, dim=dim: function(v.t, dim=dim, **keys)
    cases["transposed"] = lambda v: function(v.t.transpose(0, 2), dim=1, **keys)
    cases["vector"] = lambda v: function(v.r, dim=0, **keys)
    return cases


def _named(prefix: str, cases: dict[str, Case]) -> dict[str, Case]:
    return {f"{prefix}: {name}" if name else prefix: case for name, case in cases.items()}


def _each(table: dict[str, Case], variants: Callable[..., dict[str, Case]], **keys: Any) -> Any:
    return {n: c for name, f in table.items() for n, c in _named(name, variants(f, **keys)).items()}


def _special(cases: dict[str, Case]) -> dict[str, Case]:
    """Cases of one tensor on infinities, NaN and zeros."""
    return {
        name: lambda v, case=case: case(SimpleNamespace(x=v.w, p=v.w, u=v.w, t=v.w[None, None]))
        for name, case in cases.items()
        if "number" not in name
    }


TABLES: dict[str, dict[str, Case]] = {
    "special": _special(
        {name: case for name, case in UNARY.items() if name not in ("elu", "hardtanh")}
    ),
    "special pairs": _each(BINARY, lambda f: {"": lambda v: f(v.w[:, None], v.w)}),
    "special reductions": {
        name: lambda v, f=f: f(v.w[:, None].expand(8, 8).where(v.w2, 0.5), dim=0)
        for name, f in (REDUCED | OVER_ONE | ALONG).items()
    },
    "unary": UNARY,
    "binary": {**_each(BINARY, few_layouts), **_each({n: BINARY[n] for n in LAID_OUT}, layouts)},
    "numbers": {**NUMBERS, **NO_NUMBERS},
    "reductions": _each(REDUCED, reductions),
    "along": {
        **_each(ALONG, along),
        **_each(OVER_ONE, along),
        **_named("kept", _each(OVER_ONE, along, keepdim=True)),
    },
    "layouts": LAYOUT,
    "indices": INDEXED,
    "in place": IN_PLACE,
    "products": PRODUCTS,
    "solved": SOLVED,
}


LARGE = ("binary", "reductions", "along", "solved")  # a third of which is enough in float32


def values(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The tensors that cases are functions of."""
    torch.manual_seed(seed)
    low = torch.randn(2, 4, 4, dtype=torch.float64).tril(-1) * 0.3
    low = low + torch.diag_embed(torch.rand(2, 4, dtype=torch.float64) + 0.7)
    found = {
        "x": torch.randn(3, 4), "y": torch.randn(3, 4), "p": torch.rand(3, 4) * 3 + 0.1,
        "u": torch.rand(3, 4) * 1.6 - 0.8, "r": torch.randn(4), "c": torch.randn(3, 1),
        "s": torch.randn(()), "t": torch.randn(2, 3, 4), "m": torch.randn(4, 4),
        "z": torch.randn(5, 4), "e": torch.randn(0, 4), "low": low[0], "lows": low,
        "spd": low[0] @ low[0].T,
    }  # fmt: skip
    found = {name: one.to(dtype) for name, one in found.items()}
    found["w"] = torch.tensor(
        [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.5, 2.0], dtype=dtype
    )
    found["w2"] = torch.arange(64).reshape(8, 8) * 7 % (3 + torch.arange(8)) == 0
    found |= {"b": torch.rand(3, 4) < 0.5, "d": torch.rand(3, 4) < 0.5}
    found |= {"i": torch.randint(-4, 5, (3, 4)), "n": torch.randint(1, 5, (3, 4))}
    found |= {"k": torch.randint(-3, 3, (5,)), "h": torch.randint(0, 4, (3, 4))}
    found["one"] = torch.stack([torch.randperm(4)[:3], torch.randint(0, 4, (3,))], 1)[:, :1].clone()
    return found


def evaluate(case: Case, tensors: dict[str, Tensor]) -> list[Tensor]:
    """What a case gives, and the gradient of a linear function of it."""
    leaves = {
        name: one.detach().requires_grad_() if one.is_floating_point() else one
        for name, one in tensors.items()
    }
    with torch.enable_grad():
        found = case(SimpleNamespace(**leaves))
        if not found.requires_grad:
            return [found]
        weight = torch.linspace(0.5, 1.5, max(found.numel(), 1), dtype=found.dtype)
        weight = weight[: found.numel()].view(found.shape)
        inputs = [one for one in leaves.values() if one.requires_grad]
        gradients = torch.autograd.grad((found * weight).sum(), inputs, allow_unused=True)
    return [found.detach(), *(one for one in gradients if one is not None)]


@cache
def recorded(
    table: str, dtype: torch.dtype
) -> tuple[dict[str, Case], Record, dict[str, Tensor], list[str]]:
    """The cases of a table, their record, its inputs, and the name of the case of each output."""
    tensors, cases = values(dtype, 0), TABLES[table]
    if table in LARGE and dtype is torch.float32:
        cases = dict(list(cases.items())[::3])
    tape = Tape(tensors.values(), fixed=HELD)
    results, names = [], []
    with tape.recording():
        for name, case in cases.items():
            found = evaluate(case, tensors)
            results += found
            names += [f"{name}, gradient {i}" if i else name for i in range(len(found))]
    return cases, clean(tape.finish(results)), tensors, names


def run(function: Function) -> None:
    function.step(0)
    function.finish(1)


DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6}
# What torch runs in these tables.
TORCH_RUNS = {
    *("addr", "cholesky_inverse", "cholesky_solve", "elu", "elu_backward"),
    *("embedding_dense_backward", "hardtanh_backward", "nan_to_num", "roll", "unfold_backward"),
    *("var", "std", "var_mean", "std_mean", "_foreach_mul_"),
}
TORCH_RUNS_INTEGERS = {"amax", "max", "min"}  # and those with indices


def is_alike(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    same = (found == expected) | ((found != found) & (expected != expected))
    if expected.is_floating_point():
        same |= (found - expected).abs() <= tolerance * (1 + expected.abs())
    return bool(same.all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", TABLES)
def test_forms_give_what_torch_gives(table: str, dtype: torch.dtype) -> None:
    cases, record, tensors, names = recorded(table, dtype)
    function = Function(record)
    calls = {op.name for op in function._source.calls}
    assert calls <= TORCH_RUNS | TORCH_RUNS_INTEGERS
    if table in ("unary", "reductions", "products"):
        assert not calls & TORCH_RUNS_INTEGERS
    wrong = {}
    for seed in (0, 1, 2):
        for name, one in values(dtype, seed).items():
            tensors[name].copy_(one)
        run(function)
        expected = [one for case in cases.values() for one in evaluate(case, tensors)]
        for name, ref, one in zip(names, record.outputs, expected, strict=True):
            found = function.output(ref)
            if not is_alike(found, one, DTYPES[dtype]):
                wrong[name] = (found.tolist(), one.tolist())
    assert not wrong


def test_every_form_has_a_case() -> None:
    names = {op.name for table in TABLES for op in recorded(table, torch.float64)[1].ops}
    missing = FORMS.keys() - names - {name.removesuffix("_") for name in names}
    assert not missing


def test_draws_are_those_of_torch() -> None:
    x = torch.randn(3, 4)

    def draw() -> list[Tensor]:
        part = torch.randn(3)
        return [
            part,
            torch.randn(3, 4) * x,
            torch.rand(20),
            torch.rand_like(x),
            torch.bernoulli(x.sigmoid()),
            torch.randint(5, (4,)),
            torch.randperm(6),
            torch.empty(3, 4).normal_(1.0, 2.0)[1:] + part[:1],
            torch.normal(x, x.exp()),
            torch.empty(2).exponential_(),
            x.clone().uniform_() + 1,
        ]

    tape = Tape([x])
    with tape.recording():
        outputs = draw()
    function = Function(clean(tape.finish(outputs)))
    for seed in (1, 2):
        torch.manual_seed(seed)
        run(function)
        after = torch.get_rng_state()
        found = [function.output(ref) for ref in function.record.outputs]
        torch.manual_seed(seed)
        for one, expected in zip(found, draw(), strict=True):
            torch.testing.assert_close(one, expected, rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), after)
