"""What a sample site is: data or latent, a point mass or not, and which of its axes is which plate.

Pyro counts a plate's dimension from the right of the batch shape, and leaves axes of length one
where a site stands in no plate. `Layout` gives every value the same order instead: plates from the
left, the plate over data points first, then what is one draw's shape.
"""

from __future__ import annotations

__all__ = [
    "NO_SIZE",
    "FixedSites",
    "Layout",
    "ObservedAsFloats",
    "PlateSizes",
    "SubsampleCheck",
    "Uncondition",
    "base_noise",
    "drop_observed_sites",
    "is_delta",
    "is_deterministic",
    "is_discrete",
    "is_drawn",
    "is_factor",
    "is_observation",
    "is_partial",
    "is_subsampled_term",
    "original_value",
    "sized",
    "without_inverse",
]

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.radial import ConditionedRadial
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions.transforms import (
    CatTransform,
    ComposeTransform,
    IndependentTransform,
    StackTransform,
    Transform,
    _InverseTransform,
)

Site = Mapping[str, Any]


def is_deterministic(site: Site) -> bool:
    """Whether a site is a `pyro.deterministic` statement: a name for a value, and no density."""
    return bool(site["infer"].get("_deterministic"))


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point mass, under masks and declared event dimensions too."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def is_discrete(fn: Any) -> bool:
    """Whether a distribution is over discrete values; one that does not say is not."""
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return False


def is_drawn(site: Site) -> bool:
    """Whether a site of a trace draws anything."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not is_delta(site["fn"])
    )


def is_factor(site: Site) -> bool:
    """Whether a site is a `pyro.factor` statement: a log density, and no value."""
    return isinstance(site["fn"], dist.Unit)


def is_observation(site: Site) -> bool:
    """Whether a site of a trace observes a value, or adds a factor."""
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not is_deterministic(site)
    )


def drop_observed_sites(model_trace: Trace, guide_trace: Trace) -> list[str]:
    """Removes the observed sites that the model has too from a guide's trace; returns their names.

    A guide that runs the model (Pyro's `GuideMessenger`s do) meets its observed sites too. Their
    log probability is the likelihood, not part of log q. What stays is what the guide samples,
    and its own `pyro.factor` statements.

    Raises:
        ValueError: the guide observes what the model does not.
    """
    removed = []
    for name, site in list(guide_trace.nodes.items()):
        if not is_observation(site):
            continue
        if name in model_trace.nodes and is_observation(model_trace.nodes[name]):
            guide_trace.remove_node(name)
            removed.append(name)
        elif not is_factor(site):
            raise ValueError(
                f"the guide observes {name!r}, which the model does not: log q is the density of"
                " what the guide samples, and an observation would be subtracted from the bound."
                " Observe it in the model, or remove obs="
            )
    return removed


def is_subsampled_term(site: Site) -> bool:
    """Whether a site says which of a program's terms are drawn, as a diffusion's step does."""
    return bool(site["infer"].get("subsampled"))


def is_partial(site: Site) -> bool:
    """Whether a site's density is scaled, or it says which of a program's terms are drawn."""
    return is_subsampled_term(site) or not bool((torch.as_tensor(site["scale"]) == 1).all())


def base_noise(site: Site) -> Tensor:
    """The tensor from which `FixedSites` reproduces the draw at a site of a trace.

    It is the value, or the base draw for a flow without an inverse (planar, radial, block
    autoregressive, ...). Such a flow can evaluate its density only at its last draw; its transforms
    cache the base draw. `FixedSites` applies the flow to it, and the density is there again.
    """
    value, fn = site["value"], site["fn"]
    if without_inverse(fn):
        with getattr(fn, "installed", nullcontext)():  # where its modules remember the draw
            for transform in reversed(_flow(fn).transforms):
                value = transform.inv(value)
    return value


def without_inverse(fn: Any) -> str | None:
    """The name of the first transform of a flow that has no inverse; None if all have one.

    Args:
        fn: a distribution; for one that is no flow the answer is None.
    """
    for transform in _transforms(_flow(fn)):
        kind = type(transform)
        if isinstance(transform, _WITHOUT_INVERSE) or kind._inverse is Transform._inverse:
            return kind.__name__
    return None


# Pyro's transforms whose `_inverse` raises KeyError unless it is of their last draw.
_WITHOUT_INVERSE = (
    transforms.BlockAutoregressive,
    transforms.Polynomial,
    transforms.Sylvester,
    ConditionedPlanar,
    ConditionedRadial,
)


def _flow(fn: Any) -> Any:
    """The transformed distribution under masks and declared event dimensions; None if none is."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn if isinstance(fn, torch.distributions.TransformedDistribution) else None


def _transforms(flow: Any) -> Iterator[Transform]:
    """The transforms of a flow, with composed ones taken apart."""
    pending = list(flow.transforms) if flow is not None else []
    while pending:
        transform = pending.pop()
        if isinstance(transform, ComposeTransform):
            pending.extend(transform.parts)
        elif isinstance(transform, (CatTransform, StackTransform)):
            pending.extend(transform.transforms)
        elif isinstance(transform, IndependentTransform):
            pending.append(transform.base_transform)
        elif not isinstance(transform, _InverseTransform):  # whose inverse is what it inverts
            yield transform


class FixedSites(Messenger):
    """Runs a program with some of its latent sites at given values, as if they had been drawn.

    Args:
        values: what each site was drawn from (`base_noise`).
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and not msg["is_observed"] and msg["name"] in self._values:
            value = self._values[msg["name"]]
            if without_inverse(msg["fn"]):
                for transform in _flow(msg["fn"]).transforms:
                    value = transform(value)
            msg["value"], msg["done"] = value, True


class ObservedAsFloats(Messenger):
    """Converts integer and boolean observations of a Bernoulli to floats, which alone it accepts.

    Files mostly hold labels as integers. torch's other discrete distributions accept integers.
    """

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not msg["is_observed"] or not isinstance(value, Tensor) or value.is_floating_point():
            return
        fn = msg["fn"]
        while inner := getattr(fn, "base_dist", getattr(fn, "component_distribution", None)):
            fn = inner
        if isinstance(fn, _FLOAT_ONLY):
            msg["infer"]["given"] = value
            msg["value"] = value.to(fn.mean.dtype)


_FLOAT_ONLY = (torch.distributions.Bernoulli, torch.distributions.ContinuousBernoulli)


def original_value(site: Site) -> Any:
    """An observed site's value before its conversion to floats."""
    return site["infer"].get("given", site["value"])


class SubsampleCheck(Messenger):
    """Finds plates whose sub-sample indices differ between model and guide.

    It wraps the model inside the replay of the guide's trace. The replay overwrites the model's
    indices with the guide's: `pyro.plate("data", 40, subsample=idx)` is then another sub-sample
    than the rows that the model takes by `idx`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._given: dict[str, Any] = {}
        self._replaced: dict[str, list[str]] = {}  # names of latent sites by plate

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self._given[msg["name"]] = msg["value"]

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            value = msg["value"]
            given = self._given.pop(msg["name"], value)
            if given is not value and not torch.equal(*map(torch.as_tensor, (given, value))):
                self._replaced[msg["name"]] = []
        elif not msg["is_observed"]:
            for frame in msg["cond_indep_stack"]:
                sites = self._replaced.get(frame.name)
                if sites is not None and msg["name"] not in sites:
                    sites.append(msg["name"])

    def problem(self) -> str | None:
        """What is wrong, and what to do; None if nothing is."""
        for plate, sites in self._replaced.items():
            if sites:
                return (
                    f"plate {plate!r}: the model gives the indices of its sub-sample, and the guide"
                    f" draws others, so that its parameters for {sites} do not match the rows"
                    " that the model observes. Give the guide the same indices (an autoguide by"
                    f" create_plates=lambda ...: pyro.plate({plate!r}, size, subsample=indices)),"
                    " or let the plate draw them (subsample_size=) and observe"
                    " pyro.subsample(y, event_dim=0)"
                )
        return None


class PlateSizes(Messenger):
    """Sets the size of plates that were declared without one, such as `pyro.plate("data")`.

    Pyro records such a plate with the size -1 and does not expand its sites. This handler sets the
    size and expands them, as a plate with a size does.

    Args:
        sizes: sizes by name of the plate; other plates are left alone.

    Example:
        >>> import pyro, pyro.poutine as poutine
        >>> def model():
        ...     with pyro.plate("data"):
        ...         return pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> model().shape, PlateSizes({"data": 3})(model)().shape
        (torch.Size([]), torch.Size([3]))
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = dict(sizes)

    def _pyro_sample(self, msg: Any) -> None:
        stack = sized(msg["cond_indep_stack"], self.sizes)
        if stack is not msg["cond_indep_stack"]:
            msg["cond_indep_stack"] = stack
            BroadcastMessenger._pyro_sample(msg)


def sized(stack: tuple[Any, ...], sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """A stack of plates with its missing sizes filled in; the same object if none is missing."""
    if not any(frame.size == NO_SIZE and frame.name in sizes for frame in stack):
        return stack
    return tuple(
        frame._replace(size=sizes[frame.name], full_size=sizes[frame.name])
        if frame.size == NO_SIZE and frame.name in sizes
        else frame
        for frame in stack
    )


NO_SIZE = -1  # of a plate without a size, in Pyro's stack


class Uncondition(Messenger):
    """Draws the observed sites of a program, as `poutine.uncondition` does, and no others.

    That one draws `pyro.deterministic` sites too, from point masses that the plates expanded: in a
    plate their values would get its axes twice, and so would all that is computed from them.

    Example:
        >>> import pyro, pyro.poutine as poutine
        >>> def model():
        ...     with pyro.plate("data", 3):
        ...         mean = pyro.deterministic("mean", torch.zeros(3))
        ...         return pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.ones(3))
        >>> Uncondition()(model)().shape, poutine.uncondition(model)().shape
        (torch.Size([3]), torch.Size([3, 3]))
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not is_deterministic(msg):
            msg["infer"].update(was_observed=True, obs=msg["value"])
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


@dataclass(frozen=True)
class Layout:
    """Which axes of a site's value are which plates.

    Attributes:
        plates: names of the plates, the plate over data points first, then from the left.
        axes: where Pyro has the axis of each plate, and then of each batch dimension that no plate
            declares; counted from the left of a batch shape of `width` dimensions.
        width: batch dimensions that Pyro has.
        shape: the sizes along `axes`.
        event_dim: dimensions of one draw, to the right of the batch shape.

    Example:
        >>> import pyro, pyro.poutine as poutine
        >>> def model():
        ...     with pyro.plate("data", 3, dim=-1), pyro.plate("rater", 2, dim=-2):
        ...         pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        >>> site = poutine.trace(model).get_trace().nodes["z"]
        >>> layout = Layout.of(site, plate="data")
        >>> layout.plates, layout.ordered(site["value"]).shape
        (('data', 'rater'), torch.Size([3, 2, 4]))
        >>> bool((layout.raw(layout.ordered(site["value"])) == site["value"]).all())
        True
    """

    plates: tuple[str, ...]
    axes: tuple[int, ...]
    width: int
    shape: tuple[int, ...]
    event_dim: int

    @classmethod
    def of(cls, site: Site, *, plate: str = "data", density: bool = False) -> Layout:
        """The layout of a site's value, or with `density` of its log probability."""
        frames = sorted(
            (frame for frame in site["cond_indep_stack"] if frame.vectorized),
            key=lambda frame: (frame.name != plate, frame.dim),
        )
        value = site["log_prob"] if density else site["value"]
        event = 0 if density else site["fn"].event_dim
        if not density and is_deterministic(site):
            found = _event_dim(site, frames)
            frames, event = ([], value.dim()) if found is None else (frames, found)
        batch = tuple(value.shape[: value.dim() - event])
        width = max([len(batch), *(-frame.dim for frame in frames)])
        batch = (1,) * (width - len(batch)) + batch
        axes = [width + frame.dim for frame in frames]
        sizes = [int(frame.size) for frame in frames]
        loose = [i for i in range(width) if i not in axes and batch[i] != 1]
        return cls(
            plates=tuple(frame.name for frame in frames),
            axes=(*axes, *loose),
            width=width,
            shape=(*sizes, *(batch[i] for i in loose)),
            event_dim=event,
        )

    def ordered(self, value: Tensor) -> Tensor:
        """A value, or log probability, as Pyro has it, in this order."""
        event = value.shape[value.dim() - self.event_dim :]
        missing = self.width - (value.dim() - self.event_dim)
        value = value.reshape((1,) * missing + value.shape)
        rest = [i for i in range(self.width) if i not in self.axes]
        value = value.permute((*self.axes, *rest, *range(self.width, value.dim())))
        value = value.reshape((*value.shape[: len(self.axes)], *event))
        return value.expand((*self.shape, *event))

    def raw(self, value: Tensor) -> Tensor:
        """A value in this order as Pyro has it."""
        order = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        value = value.permute((*order, *range(len(self.axes), value.dim())))
        batch = [1] * self.width
        for position, index in enumerate(order):
            batch[self.axes[index]] = value.shape[position]
        return value.reshape((*batch, *value.shape[len(self.axes) :]))


def _event_dim(site: Site, frames: list[Any]) -> int | None:
    """Event dimensions of a deterministic value, which seldom says.

    Those declared; else all but the plates' axes, if these come first; else the fewest that leave
    the plates' sizes. None if no number does, nor leaves what broadcasts to them.
    """
    value, declared = site["value"], site["fn"].event_dim
    first = max(0, value.dim() - max((-frame.dim for frame in frames), default=0))
    for event in (declared, first, *range(value.dim() + 1)):
        if _fills(value.shape[: value.dim() - event], frames):
            return event
    said = declared < value.dim()  # Pyro says all of them where none are declared
    for event in (declared, first) if said else (first,):
        if _fills(value.shape[: value.dim() - event], frames, or_broadcasts=True):
            return event
    return None


def _fills(batch: tuple[int, ...], frames: list[Any], *, or_broadcasts: bool = False) -> bool:
    """Whether a batch shape has the sizes of the plates."""
    sizes = [(batch[f.dim] if len(batch) >= -f.dim else 1, int(f.size), f.dim) for f in frames]
    if or_broadcasts:
        return all(size in (1, plate) for size, plate, _ in sizes)
    return all(size == plate and len(batch) >= -dim for size, plate, dim in sizes)
