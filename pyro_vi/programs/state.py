"""Any Pyro callable as a function of its own state, without global state.

A Pyro program keeps what it learns in two places: the modules that it reaches (a `PyroModule`, the
`nn.Module`s behind `pyro.module`, the model behind an autoguide) and the global parameter store
(`pyro.param`). `State` is a private copy of both. While it is installed, the programs run on that
copy, and outside they are as they were: modules are swapped attribute dictionary by attribute
dictionary, the store through its scope. Nothing is deep-copied, so autoguides, closures and tied
weights keep their identity, and what a guide builds lazily on its first call stays in the copy too.

A `Program` is a callable bound to a state. It calls like the original, on its own parameters.
"""

from __future__ import annotations

__all__ = [
    "Bound",
    "Program",
    "State",
    "own_memory",
    "reachable",
]

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import copy, deepcopy
from functools import partial, wraps
from typing import Any

import pyro
import torch
from pyro.distributions import MaskedDistribution
from pyro.nn.module import _Context
from pyro.poutine import unwrap
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_vi.process_state import process_lock
from pyro_vi.programs.reachability import may_ask_modules, reach
from pyro_vi.programs.sites import ObservedAsFloats


class State:
    """A private copy of all that some programs keep: modules, buffers, and a parameter store.

    Args:
        programs: the programs by name, such as `{"model": model, "guide": guide}`.
        device: where the copy lives; by default where the originals live.

    Raises:
        ValueError: a lazy layer that has not seen a batch yet.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(1, 1)
        >>> state = State({"model": layer})
        >>> with state.installed():
        ...     _ = torch.nn.init.constant_(layer.weight, 7.0)
        >>> layer.weight.item() == 7.0
        False
        >>> state.tensors()["model.weight"].item()
        7.0
    """

    def __init__(
        self, programs: Mapping[str, Callable[..., Any]], *, device: torch.device | None = None
    ) -> None:
        self.device = device
        with process_lock:  # another thread may have a state installed
            self._take_copies(programs)

    def _take_copies(self, programs: Mapping[str, Callable[..., Any]]) -> None:
        device = self.device
        self._roots: dict[str, nn.Module] = {}
        for name, program in programs.items():
            self._roots.update(
                reach(program, name, seen=_all_modules(self._roots.values()), closed=Program)
            )
        self._modules = list(_all_modules(self._roots.values()).values())
        for root, module in self._roots.items():
            for name, parameter in module.named_parameters(prefix=root):
                if is_lazy(parameter):
                    raise ValueError(
                        f"parameter {name!r} has no shape yet: call lazy layers once on a batch"
                        " before they are fitted"
                    )
        copied = _Copy(_copies(self._modules, device))
        self._held = [copied.attributes(module) for module in self._modules]
        self._store: dict[str, dict[str, Any]] = {"params": {}, "constraints": {}}
        self._frozen = {n: p for n, p in programs.items() if isinstance(p, Program)}
        self._open = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Runs the programs on this state; what they change stays in it. Other threads wait."""
        with process_lock:
            if self._open:
                yield
                return
            with self._swapped():
                yield

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self._open = True
        before = [module.__dict__ for module in self._modules]
        try:
            self._install(self._held)
            with (
                pyro.settings.context(module_local_params=True),
                pyro.get_param_store().scope(self._store),
                _default_device(self.device),
                _OwnInitialValues(),
                ObservedAsFloats(),
            ):
                try:
                    yield
                finally:  # scope() keeps nothing of a run that ends in an error
                    self._store.update(pyro.get_param_store().get_state())
        finally:
            self._held = [module.__dict__ for module in self._modules]
            self._install(before)
            self._open = False

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Runs the programs on this state, and forgets the attributes that they set meanwhile."""
        with self.installed():
            copied = _Copy({})
            before = [copied.attributes(module) for module in self._modules]
            try:
                yield
            finally:
                self._install(before)

    def _install(self, held: Iterable[dict[str, Any]]) -> None:
        for module, attributes in zip(self._modules, held, strict=True):
            object.__setattr__(module, "__dict__", attributes)

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter (unconstrained) and buffer by name, modules first, each tensor once."""
        found: list[tuple[str, Tensor]] = []
        with self.installed():
            for root, module in self._roots.items():
                found.extend(module.named_parameters(prefix=root))
                found.extend(module.named_buffers(prefix=root))
            for name, tensor in pyro.get_param_store().named_parameters():
                found.append((f"param.{name}", tensor))
        names: dict[int, str] = {}
        for name, tensor in found:
            names.setdefault(id(tensor), name)
        return {name: tensor for name, tensor in found if names[id(tensor)] == name}

    def modules(self) -> list[tuple[str, nn.Module]]:
        """Every module with its name."""
        return [
            named for name, root in self._roots.items() for named in root.named_modules(prefix=name)
        ]

    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors by name."""
        return {name: tensor for name, tensor in self.tensors().items() if tensor.requires_grad}

    def check_registered(self) -> None:
        """Raises ValueError if `pyro.module` registered a module that no program leads to.

        Such a module could neither be isolated nor saved.
        """
        with self.installed():
            held = {id(p) for module in self._roots.values() for p in module.parameters()}
            for name, tensor in pyro.get_param_store().named_parameters():
                if "$$$" in name and id(tensor) not in held:
                    raise ValueError(
                        f"parameter {name.replace('$$$', '.')!r} belongs to a module that cannot be"
                        " reached from the model or the guide: make the module an attribute, a"
                        " closure variable or an argument (functools.partial) of the program"
                    )

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of every tensor by name, those of a frozen model's modules included."""
        tensors = self.tensors()
        for name, program in self._frozen.items():
            for inner, tensor in program.state.snapshot().items():
                root, dot, rest = inner.partition(".")
                if root == program.name:
                    tensors[f"{name}{dot}{rest}"] = tensor
                elif root == "param":  # a function's: the store does not say whose
                    tensors[f"{name}.{inner}"] = tensor
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the values of `tensors` in; a frozen program stays as it is.

        Raises:
            ValueError: the names or the shapes are not this state's.
        """
        own = self.tensors()
        if missing := sorted(own.keys() - tensors.keys()):
            raise ValueError(f"the programs have parameters that the state lacks: {missing}")
        if unknown := sorted(tensors.keys() - self.snapshot().keys()):
            raise ValueError(f"the state has parameters that the programs lack: {unknown}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(
                    f"parameter {name!r}: expected shape {tuple(tensor.shape)},"
                    f" got {tuple(tensors[name].shape)}"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def twin(self, program: Any) -> Any:
        """A module that holds this state for good, for a module among the programs."""
        twins: dict[int, nn.Module] = {}
        with self.installed():
            if not isinstance(program, nn.Module):
                return program
            for module in program.modules():
                twins[id(module)] = object.__new__(type(module))
            for module in program.modules():
                attributes = dict(vars(module))
                attributes["_modules"] = {
                    name: None if child is None else twins[id(child)]
                    for name, child in module._modules.items()
                }
                object.__setattr__(twins[id(module)], "__dict__", attributes)
        return twins[id(program)]

    def freeze(self) -> None:
        """Turns gradients off and every module to `eval()`."""
        with self.installed():
            for module in self._roots.values():
                module.eval()
        for tensor in self.tensors().values():
            tensor.requires_grad_(False)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Every module in `eval()`, and back to its own mode afterwards."""
        with self.installed():
            modules = [m for root in self._roots.values() for m in root.modules()]
            modes = [m.training for m in modules]
            try:
                for module in modules:
                    module.training = False
                yield
            finally:
                for module, mode in zip(modules, modes, strict=True):
                    module.training = mode


class Program:
    """A Pyro callable bound to a state: calls like the original, on its own parameters.

    The original's methods are there too: `fitted.guide.encode(x)`, an autoguide's `median()`; and
    so are its submodules, with the state's tensors. The
    densities of its sites belong to the state as well: a flow asks its networks whenever a density
    is computed, and that may be after the call, or inside another state.

    Args:
        function: the model or guide.
        state: what it runs on.
        name: the program's name in that state.
    """

    def __init__(self, function: Callable[..., Any], state: State, name: str) -> None:
        self.function, self.state, self.name = function, state, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.state.installed(), Bound(self.state.installed):
            return self.function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "function" not in self.__dict__:
            raise AttributeError(name)
        function = unwrap(self.function)  # behind effect handlers
        method = getattr(type(function), name, None)
        if not callable(method):
            if isinstance(part := getattr(self.state.twin(function), name, None), nn.Module):
                return part
            raise AttributeError(f"a fitted {type(function).__name__} has no method {name!r}")
        # On a twin, since a distribution may ask its module again after the call.
        return Program(partial(method, self.state.twin(function)), self.state, self.name)

    def __repr__(self) -> str:
        kind = getattr(self.function, "__name__", type(self.function).__name__)
        return f"Program({kind}, {sum(t.numel() for t in self.state.tensors().values())} values)"


class Bound(Messenger):
    """Binds distributions that ask modules to what is installed in these while a program runs.

    They are asked after the run too, whenever a density is computed.

    Args:
        installed: makes the context in which they are to ask.
    """

    def __init__(self, installed: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self._installed = installed

    def _pyro_sample(self, msg: Any) -> None:
        if may_ask_modules(msg["fn"]):
            msg["fn"] = _bound(msg["fn"], self._installed)


def _bound(fn: Any, installed: Callable[[], AbstractContextManager[None]]) -> Any:
    """A distribution whose draws and densities run in a context, of the same type as it was."""

    def within(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            with installed():
                return method(*args, **kwargs)

        return run

    fn = copy(fn)
    fn.installed = lambda: installed()  # a bound method would be copied with its state
    expand = fn.expand
    fn.expand = lambda *args, **kwargs: _bound(expand(*args, **kwargs), installed)
    for name in ("sample", "rsample", "log_prob", "score_parts"):
        if hasattr(fn, name):
            setattr(fn, name, within(getattr(fn, name)))
    if isinstance(fn, (torch.distributions.Independent, MaskedDistribution)):
        fn.base_dist = _bound(fn.base_dist, installed)  # its elements' densities are asked for too
    return fn


class _StoreContext(_Context):
    """A PyroModule's context whose `pyro.param` statements reach the installed store.

    Pyro's own gives each module a store of its own and then refuses such statements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.param_state: dict[str, dict[str, Any]] = {"params": {}, "constraints": {}}

    def __enter__(self) -> None:
        self.active += 1
        self.used = True

    def __exit__(self, *exception: object) -> None:
        self.active -= 1
        if not self.active:
            self.cache.clear()


class _OwnInitialValues(Messenger):
    """Keeps `pyro.param("loc", tensor)` from training the caller's tensor in place."""

    def _pyro_param(self, msg: Any) -> None:
        store = pyro.get_param_store()
        if msg["fn"] != store.get_param or "$$$" in msg["name"] or msg["name"] in store:
            return  # a module's own parameter, or one that exists
        name, *rest = msg["args"]
        if rest and rest[0] is not None:
            msg["args"] = (name, partial(_cloned, rest[0]), *rest[1:])


def _cloned(value: Tensor | Callable[[], Tensor]) -> Tensor:
    return (value if isinstance(value, Tensor) else value()).detach().clone()


def own_memory(parameters: Iterable[Tensor]) -> None:
    """Gives expanded parameters contiguous memory of their own.

    An expanded initial value, such as an autoguide's in a plate, makes such a parameter. Optimizers
    cannot update it in place.
    """
    for parameter in parameters:
        if parameter.layout is torch.strided and any(
            stride == 0 and size > 1
            for stride, size in zip(parameter.stride(), parameter.shape, strict=True)
        ):
            parameter.data = parameter.detach().contiguous()


def _copies(modules: Iterable[nn.Module], device: torch.device | None) -> dict[int, Any]:
    """Copies of the modules' parameters and buffers, by the originals' identities."""
    copies: dict[int, Any] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in copies:
                own = deepcopy(parameter)
                own_memory([own])
                own.grad = None
                for hook in (parameter._backward_hooks or {}).values():
                    own.register_hook(hook)
                if device is not None:
                    own.data = own.data.to(device)
                copies[id(parameter)] = own
        for buffer in module._buffers.values():
            if buffer is not None and id(buffer) not in copies:
                held = buffer.detach().clone()
                copies[id(buffer)] = held if device is None else held.to(device)
    return copies


class _Copy:
    """Copies modules' attributes with tensors replaced, containers one level deep.

    Args:
        memo: what stands for a tensor, by its identity; so ties survive.
    """

    def __init__(self, memo: Mapping[int, Any]) -> None:
        self._memo = dict(memo)

    def attributes(self, holder: Any) -> dict[str, Any]:
        return {name: self._value(value) for name, value in holder.__dict__.items()}

    def _value(self, value: Any) -> Any:
        if id(value) in self._memo:
            return self._memo[id(value)]
        if type(value) is _Context or type(value) is _StoreContext:
            return self._memo.setdefault(id(value), _StoreContext())
        if type(value) in (dict, OrderedDict):
            return type(value)((k, self._memo.get(id(v), v)) for k, v in value.items())
        if type(value) in (list, set):
            return type(value)(self._memo.get(id(v), v) for v in value)
        return value


def _all_modules(roots: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """Every module below the roots, once, by identity."""
    return {id(module): module for root in roots for module in root.modules()}


def modules_of(*programs: Callable[..., Any]) -> list[nn.Module]:
    """Every module that some programs reach; those of frozen programs are closed."""
    found: dict[int, nn.Module] = {}
    for program in programs:
        found |= _all_modules(reach(program, "", seen=found, closed=Program).values())
    return list(found.values())


@contextmanager
def _default_device(device: torch.device | None) -> Iterator[None]:
    """New tensors on `device`; entered for accelerators alone, since it slows every operation."""
    if device is None or device.type == "cpu":
        yield
    else:
        with device:
            yield


@contextmanager
def reachable() -> Iterator[None]:
    """Says in words what Pyro runs into where a PyroModule is no part of the installed state."""
    try:
        yield
    except AttributeError as error:
        if "has no attribute 'unconstrained'" in str(error):
            raise ValueError(
                "the guide has a parameter for each row of a plate that draws a sub-sample, and"
                " Pyro cannot select its rows here: let fit split the data (batch_size=) with a"
                " guide that reads the latents of a row from it, or use pyro_vi.SVI"
            ) from error
        if "param_state" not in str(error):
            raise
        raise ValueError(
            "a PyroModule cannot be reached from the model or the guide: make it an attribute, a"
            " closure variable, a global or an argument (functools.partial) of the program"
        ) from error
