"""What a data point is, and what it weighs in a bound, as an effect handler.

With batch size B of N data points, the sites inside plate "data" weigh 1/B and all others 1/N, in
model and guide alike, so that one minibatch estimates

    1/N ELBO = 1/N ( E_q[log p(theta) - log q(theta)]
                     + sum_n E_q[log p(x_n, z_n | theta) - log q(z_n)] )

in nats per data point. A plate that sub-samples by itself scales its sites by N/B already; then
every site weighs 1/N.
"""

from __future__ import annotations

__all__ = ["Structure", "check_observes", "is_autoguide"]

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from pyro_vi.programs.sites import (
    NO_SIZE,
    SubsampleCheck,
    drop_observed_sites,
    is_deterministic,
    is_discrete,
    original_value,
    sized,
    without_inverse,
)
from pyro_vi.programs.state import Program


@dataclass(frozen=True)
class Structure:
    """What one run of a guide and a model against it shows.

    Attributes:
        model_trace: the model's trace, its latent sites at the guide's values.
        guide_trace: the guide's trace.
        plate: the name of the plate over data points.
        batch: rows of the batch in the plate (B); 1 if there is no such plate.
        total: data points in all (N); 1 if there is no such plate.
        unsized: sizes, in this batch, of plates that were declared without one, such as
            `pyro.plate("data")`, by name; the traces already have them.
        shared: observed sites that the guide has too, because it runs the model; the guide's trace
            is without them.
    """

    model_trace: Trace
    guide_trace: Trace
    plate: str
    batch: int
    total: int
    unsized: Mapping[str, int] = field(default_factory=dict)
    shared: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        plate: str = "data",
        batch_size: int | None = None,
        total: int | None = None,
    ) -> Structure:
        """Runs the guide, then the model against it, and checks that they belong together.

        Args:
            model: the generative program.
            guide: the variational program.
            args, kwargs: one batch.
            plate: the name of the plate over data points.
            batch_size: rows of the batch, or None for data that were not split.
            total: rows of the data, or None for data that were not split.

        Raises:
            TypeError: a program that does not take these arguments.
            ValueError: latent sites do not match in name or shape; a guide that observes what the
                model does not, or that reads parameters which have a prior in the model
                (`pyro_vi.weight_prior`); a site of the model whose density cannot be evaluated at
                the guide's draw; a minibatch whose observed sites stand outside the plate; a latent
                inside the plate on one side only; an autoguide with latents of single data points
                and a minibatch, or a plate without a size.
        """
        try:
            with _context_of_guide(model):
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            indices = SubsampleCheck()
            with _Match(trace=guide_trace):
                model_trace = poutine.trace(indices(model)).get_trace(*args, **kwargs)
        except RuntimeError as error:
            _check_sizes_for_autoguide(guide, args, kwargs, error)
            raise
        except (ValueError, TypeError) as error:
            _check_sizes_for_autoguide(guide, args, kwargs, error)
            if isinstance(error, TypeError):
                for name, program in (("guide", guide), ("model", model)):
                    _check_call(name, program, args, kwargs, error)
            words, shapes, _ = str(error).partition("\nTrace Shapes")
            if not shapes:
                raise
            raise type(error)(words) from error  # Pyro's table of shapes is in the cause
        latent, proposed = set(_latents(model_trace)), set(_latents(guide_trace, auxiliary=False))
        if strangers := sorted(proposed - latent):
            cure = "mark auxiliary guide sites with infer={'is_auxiliary': True}"
            if any("noise" in guide_trace.nodes[name]["infer"] for name in strangers):
                cure = "the guide's noise is in it alone: give the model the same noise="
            raise ValueError(
                f"the guide samples {strangers}, which the model does not; the model's latent sites"
                f" are {sorted(latent)} ({cure})"
            )
        _check_observed(model_trace)
        if not _observed(model_trace) and (theirs := _observed(guide_trace)):
            raise ValueError(
                f"the model observes nothing and the guide observes {theirs}: are they swapped?"
            )
        if problem := indices.problem():
            raise ValueError(problem)
        shared = drop_observed_sites(model_trace, guide_trace)
        _check_masks(model_trace, guide_trace)
        _check_densities(model_trace)
        unsized = _give_sizes(model_trace, guide_trace)
        frames = [f for f in _frames(model_trace, guide_trace) if f.name == plate]
        sizes = {(int(f.size), int(f.full_size or f.size)) for f in frames}
        if len(sizes) > 1:
            raise ValueError(
                f"plate {plate!r} has several sizes in one run: {sorted(s for s, _ in sizes)}"
            )
        rows, full = sizes.pop() if sizes else (1, 1)
        if batch_size is not None and total is not None and frames and rows == full:
            if rows != batch_size:
                raise ValueError(
                    f"plate {plate!r} holds {rows} data points in a batch of {batch_size} rows"
                )
            full = total
        found = cls(model_trace, guide_trace, plate, rows, full, unsized, tuple(shared))
        if batch_size is not None and total is not None and batch_size < total:
            found.check_amortized(guide)
            found._check_minibatch()
        elif rows < full:
            found._check_minibatch()
        return found

    def _check_minibatch(self) -> None:
        outside = [name for name in _observed(self.model_trace) if not self.inside_model(name)]
        if outside:
            raise ValueError(
                f"minibatches need every observed site inside plate {self.plate!r}, but"
                f" {outside} stand outside it; put them inside, name another plate (plate=...),"
                " or fit all data at once (batch_size=None)"
            )
        for name in self.latents:
            if self.inside_model(name) != self.inside_guide(name):
                raise ValueError(
                    f"latent site {name!r} stands inside plate {self.plate!r} in the"
                    f" {'model' if self.inside_model(name) else 'guide'} alone; with minibatches"
                    " it must stand inside on both sides, or outside on both"
                )

    def latents_with_own_parameters(self, guide: Callable[..., Any]) -> list[str]:
        """The latents of single data points for which an autoguide keeps separate parameters."""
        shared = self.plate in getattr(_innermost(guide), "amortized_plates", ())
        if shared or not is_autoguide(guide):
            return []
        return [name for name in self.latents if self.inside_model(name)]

    def check_amortized(self, guide: Callable[..., Any]) -> None:
        """Raises ValueError if the guide has parameters of its own for single data points."""
        if local := self.latents_with_own_parameters(guide):
            raise ValueError(
                f"an autoguide has one set of parameters for the latents {local} of its batch,"
                " so that other data would be scored with these: use an amortized guide"
                " (pyro_vi.guides.Encoder), or fit all data at once (batch_size=None)"
            )

    @property
    def latents(self) -> list[str]:
        """The model's latent sites that the guide samples, in the model's order."""
        return [name for name in _latents(self.model_trace) if name in self.guide_trace]

    @property
    def marginalized(self) -> list[str]:
        """The model's latent sites that the guide leaves to enumeration."""
        return [name for name in _latents(self.model_trace) if name not in self.guide_trace]

    @property
    def proposed(self) -> list[str]:
        """Every site of the guide that counts in log q, auxiliary ones and factors included."""
        return _latents(self.guide_trace) + _observed(self.guide_trace)  # the latter are factors

    @property
    def observed(self) -> list[str]:
        """The model's observed sites, in the order in which it meets them."""
        return _observed(self.model_trace)

    @property
    def is_local(self) -> bool:
        """Whether every site of the model and the guide stands inside the plate."""
        return all(
            _inside(site, self.plate)
            for trace in (self.model_trace, self.guide_trace)
            for site in trace.nodes.values()
            if site["type"] == "sample"
            and not site_is_subsample(site)
            and not is_deterministic(site)
        )

    @property
    def deterministic(self) -> list[str]:
        """The model's `pyro.deterministic` sites, in the order in which it meets them."""
        return [
            name
            for name, site in self.model_trace.nodes.items()
            if site["type"] == "sample" and is_deterministic(site)
        ]

    @property
    def trains_model(self) -> bool:
        """Whether the model uses a parameter with a gradient."""
        return bool(_parameters(self.model_trace))

    @property
    def parameters(self) -> list[Tensor]:
        """The unconstrained parameters with a gradient that the programs use, each once."""
        found = _parameters(self.model_trace) + _parameters(self.guide_trace)
        return list({id(parameter): parameter for parameter in found}.values())

    @property
    def plates(self) -> dict[str, int]:
        """The sizes of the vectorized plates that sites stand in, by name."""
        frames = _frames(self.model_trace, self.guide_trace)
        return {frame.name: int(frame.size) for frame in frames if frame.vectorized}

    @property
    def plate_names(self) -> set[str]:
        """The names of all plates that sites stand in, loops over a plate included."""
        return {frame.name for frame in _frames(self.model_trace, self.guide_trace)}

    @property
    def nesting(self) -> int:
        """Dimensions that the vectorized plates take up: Pyro's `max_plate_nesting`."""
        frames = _frames(self.model_trace, self.guide_trace)
        return max((-frame.dim for frame in frames if frame.vectorized), default=0)

    def inside_model(self, name: str) -> bool:
        """Whether a site of the model stands inside the plate over data points."""
        return _inside(self.model_trace.nodes[name], self.plate)

    def inside_guide(self, name: str) -> bool:
        """Whether a site of the guide does."""
        return _inside(self.guide_trace.nodes[name], self.plate)

    def check_support(self, batch: Mapping[Any, Any], data: Mapping[Any, Tensor]) -> None:
        """Holds the whole of the data against the support of the site that observes them.

        A site is matched to its data by identity: its value is a tensor of the batch.

        Raises:
            ValueError: some values lie outside the support, such as grey levels under Bernoulli.
        """
        for site_name in self.observed:
            site = self.model_trace.nodes[site_name]
            for name, rows in batch.items():
                if original_value(site) is not rows:
                    continue
                support = _support(site["fn"])
                values = data[name]
                if support is not None and not bool(support.check(values).all()):
                    raise ValueError(
                        f"observed site {site_name!r}: expected values in the support of"
                        f" {_named(site['fn'])}, {support}, got values from"
                        f" {float(values.min()):g} to {float(values.max()):g}"
                        f"{_hint(values)}"
                    )


def check_observes(structure: Structure, prior_only: bool) -> None:
    """Raises ValueError if the model observes nothing, or something though `prior_only` is True."""
    if prior_only and structure.observed:
        raise ValueError(
            f"prior_only=True is for a model that observes nothing, and this one observes"
            f" {structure.observed}: remove prior_only"
        )
    if not prior_only and not structure.observed:
        raise ValueError(
            f"the model observes nothing: none of its sites has obs=, and {structure.latents} are"
            " latent. If data are missing, give them, such as (x, y) for a model(x, y=None);"
            " prior_only=True fits the prior on purpose"
        )


def _context_of_guide(model: Callable[..., Any]) -> AbstractContextManager[None]:
    """The context that a model asks its guide to run in: its method `context_of_guide`, if any."""
    context: Callable[[], AbstractContextManager[None]] = getattr(
        poutine.unwrap(model), "context_of_guide", nullcontext
    )
    return context()


def _support(fn: Any) -> constraints.Constraint | None:
    """The support that all values of a site share, or None if there is none to check."""
    inner = fn
    while True:
        if not getattr(inner, "_validate_args", False):
            return None
        if not hasattr(inner, "base_dist"):
            break
        inner = inner.base_dist
    try:
        support = fn.support
    except NotImplementedError:
        return None
    bounds: list[Any] = [support]
    while bounds:  # bounds that are tensors differ from row to row
        held = bounds.pop()
        if isinstance(held, Tensor) and held.numel() > 1:
            return None
        if isinstance(held, constraints.Constraint):
            bounds.extend(vars(held).values())
    return support


def _hint(values: Tensor) -> str:
    some = values.flatten()[:100_000].unique()
    return f" ({some.numel()} different ones, such as {[round(v, 4) for v in some[:4].tolist()]})"


def _named(distribution: Any) -> str:
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return type(distribution).__name__


def _latents(trace: Trace, *, auxiliary: bool = True) -> list[str]:
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and (auxiliary or not site["infer"].get("is_auxiliary"))
    ]


def _parameters(trace: Trace) -> list[Tensor]:
    values = [site["value"] for site in trace.nodes.values() if site["type"] == "param"]
    found = [v.unconstrained() if hasattr(v, "unconstrained") else v for v in values]
    return [parameter for parameter in found if parameter.requires_grad]


def _observed(trace: Trace) -> list[str]:
    return [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not is_deterministic(site)
    ]


def _check_densities(trace: Trace) -> None:
    """Raises ValueError if the density of a site can be evaluated only at its own draws."""
    for name in _latents(trace) + _observed(trace):
        site = trace.nodes[name]
        if isinstance(site["value"], Tensor) and (transform := without_inverse(site["fn"])):
            raise ValueError(
                f"site {name!r} of the model: its density is needed at the guide's draw, but"
                f" {transform} has no inverse. Use a transform that has one (such as"
                " affine_autoregressive or affine_coupling), or its inverse (transform.inv)"
            )


def _give_sizes(model_trace: Trace, guide_trace: Trace) -> dict[str, int]:
    """Fills in the sizes of unsized plates from the axes of their sites, and returns the sizes.

    Raises:
        ValueError: a latent site without such an axis, which all elements of the plate would share.
    """
    sizes: dict[str, int] = {}
    sites = [
        (name, site)
        for trace in (guide_trace, model_trace)
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not is_deterministic(site)
        and not site_is_subsample(site)
        and any(frame.size == NO_SIZE for frame in site["cond_indep_stack"])
    ]
    for _, site in sites:
        for frame in site["cond_indep_stack"]:
            if frame.size == NO_SIZE and frame.vectorized:
                sizes[frame.name] = max(sizes.get(frame.name, 1), _length_of_axis(site, frame.dim))
    if not sizes:
        return sizes
    for name, site in sites:
        for frame in site["cond_indep_stack"]:
            if frame.name in sizes and _length_of_axis(site, frame.dim) != sizes[frame.name]:
                raise ValueError(
                    f"site {name!r} has one value for all {sizes[frame.name]} elements of plate"
                    f" {frame.name!r}, which was declared without a size: give the plate its size,"
                    f" such as pyro.plate({frame.name!r}, len(x)), or move the site out of it"
                )
    for trace in (guide_trace, model_trace):
        for site in trace.nodes.values():
            if "cond_indep_stack" in site:
                site["cond_indep_stack"] = sized(site["cond_indep_stack"], sizes)
    return sizes


def _length_of_axis(site: Mapping[str, Any], dim: int) -> int:
    """The length of an axis of a site's log probability, counted from the right."""
    value, fn = site["value"], site["fn"]
    batch = value.shape[: value.dim() - fn.event_dim]
    shape = torch.broadcast_shapes(batch, fn.batch_shape)
    return shape[dim] if len(shape) >= -dim else 1


def _check_sizes_for_autoguide(
    guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], reason: Exception
) -> None:
    """Raises ValueError if an autoguide failed because of a plate without a size."""
    if not is_autoguide(guide):
        return
    model: Any = getattr(_innermost(guide), "model", None)
    try:
        trace = poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
    except Exception:  # the model fails by itself, and the reason says why
        return
    for name in _latents(trace):
        for frame in trace.nodes[name]["cond_indep_stack"]:
            if frame.size == NO_SIZE:
                raise ValueError(
                    f"latent site {name!r} stands in plate {frame.name!r}, which has no size: an"
                    f" autoguide needs it, such as pyro.plate({frame.name!r}, len(x))"
                ) from reason


def _check_observed(trace: Trace) -> None:
    for name in _observed(trace):
        value = trace.nodes[name]["value"]
        if not isinstance(value, Tensor):
            raise ValueError(
                f"observed site {name!r}: expected a tensor, got {type(value).__name__}"
                f" {value!r:.60}"
            )


def _check_masks(model_trace: Trace, guide_trace: Trace) -> None:
    """Raises ValueError where a part of a latent counts in the model or in the guide alone.

    What is masked as a whole has a flat prior.
    """
    for name in _latents(model_trace):
        if name in guide_trace:
            masks = [trace.nodes[name]["mask"] for trace in (model_trace, guide_trace)]
            mine, theirs = (torch.as_tensor(True if mask is None else mask) for mask in masks)
            if bool(mine.any()) and not bool((mine == theirs.to(mine.device)).all()):
                raise ValueError(
                    f"latent site {name!r} is masked otherwise in the model than in the guide: what"
                    " counts on one side alone has no bound. Mask it alike in both; for missing"
                    " observations, put poutine.mask around the observed site instead of obs_mask"
                )


def _frames(*traces: Trace) -> list[Any]:
    """Every plate around every sample site."""
    return [
        frame
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
    ]


def _inside(site: Mapping[str, Any], plate: str) -> bool:
    return any(frame.name == plate for frame in site["cond_indep_stack"])


def _check_call(
    name: str,
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    reason: TypeError,
) -> None:
    """Raises TypeError if a program, which ended in one, does not take these arguments."""
    called = _innermost(program)
    try:
        takes = inspect.signature(getattr(called, "forward", called))
    except ValueError:  # it does not say
        return
    try:
        takes.bind(*args, **kwargs)
    except TypeError:
        given = [f"{len(args)} by position"] if args else []
        given += [f"{key}=" for key in kwargs]
        raise TypeError(
            f"the {name} takes {takes.replace(return_annotation=inspect.Signature.empty)}, and the"
            f" data give {', '.join(given) or 'nothing'} ({reason}): give a tensor for one"
            " argument, a tuple such as (x, y) for several, or a dict by name"
        ) from reason


def _innermost(program: Callable[..., Any]) -> Callable[..., Any]:
    """A program without handlers and fits around it."""
    while isinstance(program := poutine.unwrap(program), Program):
        program = program.function
    return program


def is_autoguide(guide: Callable[..., Any]) -> bool:
    """Whether a guide, fitted or wrapped in handlers, is one of Pyro's autoguides."""
    return isinstance(_innermost(guide), (AutoGuide, AutoMessenger))


class _Match(ReplayMessenger):
    """Replays a guide's trace, with errors where a site of the model does not match."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            assert self.trace is not None
            name = msg["name"]
            if name not in self.trace:
                if msg["infer"].get("enumerate") == "parallel":
                    return None
                raise ValueError(
                    f"latent site {name!r} of the model is missing from the guide, which samples"
                    f" {_latents(self.trace)}{_unsampled(msg)}"
                )
            expected = msg["fn"].event_shape
            if self.trace.nodes[name]["is_observed"]:
                raise ValueError(
                    f"latent site {name!r} of the model is observed in the guide: the guide must"
                    " sample it; to fix it, give it obs= in the model (or poutine.condition)"
                )
            value = self.trace.nodes[name]["value"]
            got = value.shape[value.dim() - len(expected) :]
            if value.dim() < len(expected) or got != expected:
                raise ValueError(
                    f"latent site {name!r}: the model expects values of shape"
                    f" {tuple(expected)}, the guide gives {tuple(got)}"
                )
        super()._pyro_sample(msg)


def _unsampled(site: Mapping[str, Any]) -> str:
    """What to do about a latent site that a guide, such as an autoguide, cannot sample."""
    fn = site["fn"]
    if "noise" in site["infer"]:
        return "; the model's noise is in it alone: give the guide the same noise="
    if not is_discrete(fn):
        return "; if it is data, pass the argument that the model observes at this site"
    ways = "; it is discrete: sample it in the guide"
    if not getattr(fn, "has_enumerate_support", False):
        return f"{ways}, or sum it out in the model"
    return (
        f"{ways}, enumerate it (pyro.infer.config_enumerate(model), loss=TraceEnum_ELBO(...)), or"
        " sum it out in the model (such as dist.MixtureSameFamily)"
    )


def log_prob_rows(site: Mapping[str, Any], plate: str) -> Tensor:
    """A site's log probability per data point, float64, all other dimensions summed; (B,)."""
    frame = next(frame for frame in site["cond_indep_stack"] if frame.name == plate)
    log_prob = site["log_prob"]
    rows = torch.as_tensor(log_prob).expand(
        torch.broadcast_shapes(log_prob.shape, (frame.size,) + (1,) * (-frame.dim - 1))
    )
    return rows.movedim(frame.dim, 0).reshape(frame.size, -1).sum(-1, dtype=torch.float64)
