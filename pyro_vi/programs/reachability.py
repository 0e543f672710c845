"""What a Pyro program can reach, wherever it keeps it.

A program is a module, or a function, a method, a partial (Pyro's handlers are partials) or an
object that leads to modules: by its attributes, closure, arguments, containers, or what its code
names in its own file and in others. All of these are followed; library code is not.
"""

from __future__ import annotations

__all__ = [
    "CONTAINERS",
    "held_by",
    "is_library",
    "may_ask_modules",
    "reach",
]

import dis
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution, Transform

_DEPTH = 12  # how far to look for modules behind a program
_LIBRARIES = set(
    "_pytest _thread arviz builtins collections contextlib functools logging matplotlib numpy"
    " pandas pyro pytest scipy sklearn threading torch tqdm typing_extensions weakref xarray"
    " zuko".split()
)  # their objects and functions lead to no module of a user's
CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_STANDARD = sysconfig.get_path("stdlib")
_MODULE_INTERNALS = set(vars(nn.Module()))


def reach(
    program: Any, name: str, *, seen: Mapping[int, nn.Module], closed: type
) -> dict[str, nn.Module]:
    """The root modules that a program can reach and `seen` lacks, by a readable path.

    Args:
        program: the callable.
        name: what its path begins with.
        seen: modules that are known already, by identity.
        closed: a type whose instances are not looked into.
    """
    found: dict[str, nn.Module] = {}
    known = set(seen)
    visited: set[int] = set()

    def visit(value: Any, path: str, depth: int = 0) -> None:
        if (
            id(value) in visited
            or depth > _DEPTH
            or isinstance(value, (closed, Tensor, ModuleType, type))
        ):
            return
        visited.add(id(value))
        if isinstance(value, nn.Module) and id(value) not in known:
            while path in found:
                path += "'"
            found[path] = value
            known.update(id(module) for module in value.modules())
        for inner, held in held_by(value):
            visit(held, f"{path}.{inner}" if inner else path, depth + 1)

    visit(program, name)
    # A root found early may sit inside one found later: name each tree once, by its topmost root.
    below = {id(m) for root in found.values() for m in root.modules() if m is not root}
    return {path: module for path, module in found.items() if id(module) not in below}


def may_ask_modules(value: Any) -> bool:
    """Whether a distribution may ask modules when it is sampled, or its density computed.

    So it may if it holds one, or if it, or a transform in it, is of a class of neither torch nor
    Pyro, since a method can name any.

    Example:
        >>> import torch
        >>> normal = torch.distributions.Normal(0.0, 1.0)
        >>> flow = torch.distributions.TransformedDistribution(normal, [])
        >>> may_ask_modules(flow)
        False
        >>> flow.transforms.append(nn.Linear(1, 1))
        >>> may_ask_modules(flow)
        True
    """
    visited: set[int] = set()
    found = [value]
    while found:
        value = found.pop()
        if isinstance(value, nn.Module):
            return True
        if id(value) in visited or isinstance(value, (Tensor, ModuleType, type)):
            continue
        visited.add(id(value))
        if isinstance(value, (Distribution, Transform)) and _is_own(type(value)):
            return True
        if isinstance(value, MethodType):
            found += [value.__self__, value.__func__]
        elif isinstance(value, FunctionType):
            found += map(_content, value.__closure__ or ())
        elif isinstance(value, partial):
            found += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, dict):
            found += value.values()
        elif isinstance(value, (list, tuple, set)):
            found += value
        elif hasattr(value, "__dict__"):
            found += vars(value).values()
    return False


def _is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("torch", "pyro")


def held_by(value: Any) -> Iterator[tuple[str, Any]]:
    """What `value` holds that may be or lead to a module, with the name of each."""
    if isinstance(value, nn.Module):
        for module in value.modules():  # beside submodules: the model that an autoguide holds
            for name, held in vars(module).items():
                if name not in _MODULE_INTERNALS:
                    yield name, held
            yield "", getattr(type(module), "forward", None)
    elif isinstance(value, MethodType):
        yield "", value.__self__
        yield "", value.__func__
    elif isinstance(value, FunctionType):
        if is_library(value.__module__):
            return
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield name, _content(cell)
        for _, space, names in _namespaces(value):
            for name in names:
                yield name, space.get(name)
        for held in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            yield "default", held
    elif isinstance(value, partial):
        yield "", value.func
        for held in value.args:
            yield "", held
        yield from value.keywords.items()
    elif isinstance(value, dict):
        for key, held in dict.items(value):
            yield str(key), held
    elif isinstance(value, CONTAINERS):
        for index, held in enumerate(value):
            yield str(index), held
    if type(getattr(value, "__dict__", None)) is dict and not is_library(type(value).__module__):
        if not isinstance(value, (nn.Module, MethodType, FunctionType, partial)):
            yield from list(vars(value).items())
            yield "", vars(type(value)).get("__call__")


def _namespaces(function: FunctionType) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Where a function finds what it names outside of itself: its file, and others that it imports.

    Returns:
        Each with what it is called there ("" for its own file), and the names that are looked up.
    """
    code, space = function.__code__, function.__globals__
    named = {name for one in _codes(code) for name in one.co_names}
    found = {id(space): ("", space, sorted(_loaded(code)))}
    waiting = [(name, space.get(name)) for name in _loaded(code)]
    waiting += [(name, sys.modules.get(name)) for name in _loaded(code, "IMPORT_NAME")]
    while waiting:
        path, module = waiting.pop()
        if isinstance(module, ModuleType) and _is_users(module.__name__):
            space = vars(module)
            if id(space) not in found:
                found[id(space)] = (path, space, sorted(named & space.keys()))
                waiting += [(f"{path}.{name}", space[name]) for name in found[id(space)][2]]
    return list(found.values())


def _loaded(code: CodeType, *kinds: str) -> set[str]:
    """The globals that a function loads or sets, or what it imports, and those inside it."""
    return {
        instruction.argval
        for one in _codes(code)
        for instruction in dis.get_instructions(one)
        if instruction.opname in (kinds or ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL"))
    }


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _content(cell: CellType) -> Any:
    """What a closure's cell holds; None if it is not filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_users(module: str | None) -> bool:
    """Whether a module is a user's, in which functions may name anything."""
    top = (module or "").partition(".")[0]
    return not (top.startswith("namedtuple_") or _is_standard(top) or is_library(top, "pyro_vi"))


@cache
def _is_standard(top: str) -> bool:
    """Whether it is of the standard library, and no file of a user's of the same name."""
    file = getattr(sys.modules.get(top), "__file__", None)
    return top in sys.stdlib_module_names and (file is None or file.startswith(_STANDARD))


def is_library(module: str | None, *others: str) -> bool:
    """Whether a module belongs to a library whose objects lead to no module of a user's."""
    return (module or "").partition(".")[0] in _LIBRARIES.union(others)
