r"""A Gaussian prior on the weights of a module, which makes them latent variables of the model.

.. math:: p(W) p(x, z \mid W), \qquad W_j \sim N(0, s^2)

Under `AutoDelta` over W, minus the ELBO is that of the model with its weights W, and

.. math:: \lambda |W|^2 + \mathrm{const}, \qquad \lambda = \frac{1}{2 s^2};

under `AutoNormal`, `AutoMultivariateNormal` and their like, W has a posterior. The prior stands
outside the plate over data points, and counts once a data set.
"""

from __future__ import annotations

__all__ = ["WeightPrior"]

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import init_to_median
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from pyro_vi.programs import Bound, Program, modules_of, reach


class WeightPrior:
    """A model in which every parameter of a module is a sample site, drawn from N(0, scale^2).

    It is called like the model. A site is named by where the model keeps the module and where the
    module keeps the parameter, as in "decoder.0.weight"; a tied parameter is one site. In a run the
    drawn values stand in the parameters' place, wherever the model keeps these; afterwards, and
    after an error, all is as it was. Priors of other modules go around it:
    ``WeightPrior(WeightPrior(model, model.encoder, 1.0), model.decoder, 0.1)``.

    A model reads a parameter as an attribute of its module. What it keeps elsewhere, in a tuple, a
    dictionary or a closure variable, is the parameter still, without the prior: the first run
    raises an error if the model computes with it. In a run a module has no parameters:
    `parameters()` and `named_parameters()` are without those of the prior, so that a penalty over
    them is without these too (the prior is one), and a dtype is to be read elsewhere.

    A guide of the weights alone is an autoguide of `weights`; `pyro_vi.guides.Joint` puts it beside
    a guide of the other latents.

    Args:
        model: a Pyro program that leads to the module: by an attribute, a closure variable, an
            argument (functools.partial) or a global.
        module: whose parameters, the frozen ones too, have the prior.
        scale: the standard deviation of the prior, s.

    Attributes:
        model, scale: as given; they stay what they are, since a recorded step would not see others.
        sites: the names of the sites, those of a prior inside it too.

    Raises:
        TypeError: what is no module, and no number as scale.
        ValueError: the model does not lead to the module; a module without parameters, or with lazy
            or constrained ones; a scale that is not positive and finite. When it runs: a module
            that has a prior already, a value of another shape than the parameter, or a model that
            reads a parameter otherwise than as an attribute of its module.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_vi.families import MeanField
        >>> from pyro_vi.guides import Encoder, Joint
        >>> from pyro_vi.models import VAE
        >>> vae = VAE((1, 4, 4), latent_dim=2)
        >>> model = WeightPrior(vae, vae.decoder, scale=0.5)
        >>> weights = AutoNormal(model.weights, init_loc_fn=model.init_loc_fn)
        >>> guide = Joint(weights, Encoder((1, 4, 4), MeanField(2, 8)))
        >>> trace = poutine.trace(guide).get_trace(torch.zeros(3, 1, 4, 4))
        >>> {name: tuple(trace.nodes[name]["value"].shape) for name in (model.sites[0], "z")}
        {'decoder.layers.0.weight': (256, 2), 'z': (3, 2)}
    """

    def __init__(self, model: Callable[..., Any], module: nn.Module, scale: float) -> None:
        if not callable(model):
            raise TypeError(f"expected a Pyro program as model, got {model!r}")
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a torch module to put a prior on, got {module!r}")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"expected a number as the prior's scale, got {scale!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"expected a positive scale of the prior, got {scale}")
        places = _places(model, module)
        inner = model.sites if isinstance(model, WeightPrior) else []
        called = poutine.unwrap(model)
        self.model, self.scale = model, scale
        self.sites: list[str] = [*places, *inner]
        self.__signature__ = inspect.signature(getattr(called, "forward", called))
        self._places, self._own = places, _originals(places)
        self._is_checked = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        installed = partial(_in_place, self._places, self._draw())
        # Once: it costs a microsecond for each operation of torch.
        checks = not self._is_checked
        watched = (
            _Unread(self.originals(), "the model", _ELSEWHERE, _FORMS) if checks else nullcontext()
        )
        with installed(), Bound(installed), watched:
            result = self.model(*args, **kwargs)
        if checks:
            self._is_checked = True
        return result

    def originals(self) -> list[tuple[str, Tensor]]:
        """The parameters themselves with their sites: the first ones, and those of now.

        In a fit these are others, and what the model keeps elsewhere may be either.
        """
        return self._own + _originals(self._places)

    @contextmanager
    def context_of_guide(self) -> Iterator[None]:
        """A guide runs in it, and may not compute with parameters that have priors.

        It would train the parameter, and the model reads the site. What is detached trains nothing:
        an autoguide may begin there.

        Raises:
            ValueError: the guide reads such a parameter.
        """
        tensors: list[tuple[str, Tensor]] = []
        model: Callable[..., Any] = self
        while isinstance(model := poutine.unwrap(model), WeightPrior):
            tensors += model.originals()
            model = model.model
        cure = (
            "the guide would train the parameter, and the model reads the site; give the guide a"
            " module of its own"
        )
        with _Unread(tensors, "the guide", cure, _FORMS | {"detach", "data"}):
            yield

    def weights(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The prior alone, a program of the same arguments, which it does not read.

        An autoguide of it is one of the weights, and needs no `poutine.block`.

        Returns:
            The drawn values by site.
        """
        values = self._draw()
        if isinstance(self.model, WeightPrior):
            values |= self.model.weights()
        return values

    def init_loc_fn(self, site: Mapping[str, Any]) -> Tensor:
        """For an autoguide to begin from: the parameters' own values, and medians elsewhere."""
        if site["name"] in self._places:
            return _parameter(site["name"], self._places[site["name"]][0]).detach().clone()
        if isinstance(self.model, WeightPrior):
            return self.model.init_loc_fn(site)
        return init_to_median(site)

    def _draw(self) -> dict[str, Tensor]:
        values = {}
        for name, (place, *_) in self._places.items():
            parameter = _parameter(name, place)
            zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            prior = dist.Normal(zero, self.scale).expand(parameter.shape)
            value = values[name] = pyro.sample(name, prior.to_event(parameter.dim()))
            if value.shape != parameter.shape:
                raise ValueError(
                    f"site {name!r}: expected one value of shape {tuple(parameter.shape)}, got"
                    f" {tuple(value.shape)}: a module has its weights once in a run, so that it"
                    " cannot run inside a plate, nor under vectorize_particles=True"
                )
        return values


class _Place(NamedTuple):
    """Where a module keeps a parameter, and the attribute that its code reads."""

    owner: nn.Module
    key: str
    attribute: str


def _originals(places: Mapping[str, list[_Place]]) -> list[tuple[str, Tensor]]:
    return [(site, _parameter(site, place)) for site, (place, *_) in places.items()]


_ELSEWHERE = (
    "a run has the site's value in its place as an attribute of its module alone; read it there,"
    " and keep it in no tuple, dictionary or closure variable"
)
_FORMS = frozenset(  # what a tensor is asked for beside its values
    "device dim dtype is_complex is_contiguous is_cuda is_floating_point is_leaf layout ndim"
    " nelement ndimension numel requires_grad shape size".split()
)


class _Unread(TorchFunctionMode):
    """Raises ValueError where a program computes with one of some tensors.

    Args:
        tensors: them with their sites.
        program: which program it is, in words.
        cure: what to do, in words.
        allowed: what it may do with them, by the names of methods and attributes.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        program: str,
        cure: str,
        allowed: frozenset[str],
    ) -> None:
        super().__init__()
        self._sites = {id(tensor): (site, tensor) for site, tensor in tensors}
        self._program, self._cure, self._allowed = program, cure, allowed

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for given in (*args, *kwargs.values()):
            for value in given if isinstance(given, (list, tuple)) else (given,):
                if id(value) in self._sites and _asked(func) not in self._allowed:
                    raise ValueError(
                        f"{self._program} reads the parameter behind site"
                        f" {self._sites[id(value)][0]!r}, which has a prior: {self._cure}"
                    )
        return func(*args, **kwargs)


def _asked(func: Any) -> str:
    """The name of a method, or of the attribute that a getter reads."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name


def _places(model: Callable[..., Any], module: nn.Module) -> dict[str, list[_Place]]:
    """Every place that a model keeps a module's parameters in, by site."""
    prefix = _path(model, module)
    sites: dict[int, str] = {}
    found: dict[str, list[_Place]] = {}
    for name, parameter in module.named_parameters():
        name = f"{prefix}.{name}".strip(".")
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} has no shape yet: call lazy layers once on a batch before"
                " they get a prior"
            )
        sites[id(parameter)] = name
    if not sites:
        raise ValueError(
            f"expected a module with parameters to put a prior on, got {type(module).__name__}"
            " without any"
        )
    for owner in modules_of(model):
        for key, held in owner._parameters.items():
            if id(held) in sites:
                name, attribute = sites[id(held)], _attribute(owner, key)
                if attribute != key:
                    name = name.removesuffix(key) + attribute
                found.setdefault(name, []).append(_Place(owner, key, attribute))
    return found


def _path(model: Callable[..., Any], module: nn.Module) -> str:
    """Where a model keeps a module."""
    while isinstance(model, WeightPrior):
        model = model.model
    roots = reach(model, "", seen={}, closed=Program)
    for path, root in roots.items():
        for name, held in root.named_modules():
            if held is module:
                return f"{path}.{name}".strip(".")
    raise ValueError(
        f"the model does not hold this {type(module).__name__}, nor lead to it: expected a module"
        " that is an attribute, a closure variable, a global or an argument (functools.partial) of"
        f" the program, which leads to {[type(root).__name__ for root in roots.values()]}; a fitted"
        " program keeps its modules to itself"
    )


def _attribute(owner: nn.Module, key: str) -> str:
    """The attribute by which a module reads a parameter; a PyroParam has two names."""
    name = key.removesuffix("_unconstrained")
    if name == key or not isinstance(owner, PyroModule) or name not in owner._pyro_params:
        return key
    constraint = owner._pyro_params[name][0]
    while hasattr(constraint, "base_constraint"):
        constraint = constraint.base_constraint
    if constraint is not constraints.real:
        raise ValueError(
            f"parameter {name!r} of {type(owner).__name__} is constrained to {constraint}: a"
            " Gaussian prior needs unconstrained parameters; make it a PyroSample with a prior on"
            " its support"
        )
    return name


def _parameter(site: str, place: _Place) -> Tensor:
    parameter = place.owner._parameters.get(place.key)
    if parameter is None:
        raise ValueError(
            f"site {site!r}: {type(place.owner).__name__} holds no parameter {place.key!r} any"
            " more; it has another prior already, or was changed after it got this one"
        )
    return parameter


@contextmanager
def _in_place(
    places: Mapping[str, Iterable[_Place]], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Runs modules with other tensors in the place of their parameters.

    These are no parameters of theirs meanwhile, so that neither `pyro.module` nor a PyroModule
    registers them.
    """
    owned: dict[nn.Module, dict[str, tuple[str, Tensor]]] = {}
    for site, several in places.items():
        for place in several:
            owned.setdefault(place.owner, {})[place.key] = (place.attribute, values[site])
    with ExitStack() as stack:
        for owner, new in owned.items():
            stack.enter_context(_replaced(vars(owner), new))
        yield


@contextmanager
def _replaced(held: dict[str, Any], new: Mapping[str, tuple[str, Tensor]]) -> Iterator[None]:
    """A module's attributes, with tensors by parameter and attribute; lists of parameters too."""
    parameters = held["_parameters"]
    attributes = dict(new.values())
    memo = {}
    for key, (attribute, tensor) in new.items():
        memo[id(held.get(attribute, parameters.get(key)))] = tensor
    lists = {  # what a recurrent layer hands to its kernel
        name: [memo.get(id(item), item) for item in value]
        for name, value in held.items()
        if type(value) is list and any(id(item) in memo for item in value)
    }
    before = {name: held[name] for name in (*attributes, *lists) if name in held}
    others = {key: value for key, value in parameters.items() if key not in new}
    try:
        held.update(attributes, **lists)
        held["_parameters"] = type(parameters)(others)
        yield
    finally:
        for name in attributes:
            held.pop(name, None)
        held.update(before)
        parameters.update(held["_parameters"])  # what the run has made
        held["_parameters"] = parameters
