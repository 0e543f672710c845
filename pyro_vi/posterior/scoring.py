"""Programs and data -> draws of their latents, with the log probability of every site.

One run of the guide draws the latents; the model, run against them, gives log p.
`vectorize_over_draws` does S such runs at once. Terms are kept apart by where their site stands:
inside the plate over data points, where they are rows, (B,), or outside it, where they are scalars.

Where all of it is inside, data points are independent given the programs' parameters, and some of
them are taken at a time, so that memory is bounded.
"""

from __future__ import annotations

__all__ = ["Scorer", "check_scores"]

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor
from torch.distributions import biject_to

from pyro_vi import diagnostics
from pyro_vi.checks import check_count
from pyro_vi.diagnostics import Estimate
from pyro_vi.posterior.posterior import Posterior
from pyro_vi.posterior.vectorize import NOISE, vectorize_over_draws
from pyro_vi.posterior.weighted_draws import Draws
from pyro_vi.process_state import seeded
from pyro_vi.programs import (
    Arguments,
    Batches,
    Data,
    FixedSites,
    Key,
    Layout,
    PlateSizes,
    Program,
    RowIndependence,
    State,
    Structure,
    Uncondition,
    base_noise,
    is_delta,
    is_deterministic,
    is_discrete,
    is_drawn,
    is_observation,
    is_partial,
    is_subsampled_term,
    log_prob_rows,
    original_value,
    reachable,
)

_VALUES = 2**22  # numbers that all sites hold, over the draws evaluated at once
_WIDTH = 128  # numbers that a data point is taken to need at least, in hidden layers


@dataclass(frozen=True)
class Scorer:
    """A model, a guide and data.

    Args:
        model, guide: the programs.
        data: N data points, as `fit` takes them.
        plate: the name of the plate over data points.
        rows: the arguments that have a row for each data point, by position or keyword; None to
            see which they are when it matters.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def exact(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> posterior = Scorer(model, exact, torch.randn(5)).posterior(100)
        >>> posterior.log_p.shape, posterior.draws["z"].shape
        (torch.Size([100, 5]), torch.Size([100, 5]))
        >>> bool((posterior.kl_to_posterior().value < 1e-5).all())
        True
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    data: Data
    plate: str = "data"
    rows: tuple[Key, ...] | None = None

    @cached_property
    def _batches(self) -> Batches:
        return Batches(self.data, rows=self.rows)

    def posterior(self, num_samples: int, *, seed: int = 0, local: bool | None = None) -> Posterior:
        """Draws from the guide and scores the draws.

        Args:
            num_samples: draws (S), for each data point or of all together; at least 1.
            seed: of the draws.
            local: whether each data point has a posterior of its own, where that is known; else
                the programs are run to see (`pyro_vi.programs`).

        Raises:
            ValueError: fewer than one draw; a latent that the guide leaves to enumeration; a site
                scaled by the program.
        """
        check_count("posterior draw", num_samples)
        batches = self._batches
        with seeded(seed, batches.device), torch.no_grad():
            whole = batches.whole()
            if local is None:
                seen = RowIndependence.of(self._structure(whole), self.model, self.guide, whole)
                source = replace(self, rows=seen.rows)
                return source.posterior(num_samples, seed=seed, local=seen.local)
            if local and batches.length is not None:
                return self._by_rows(batches, batches.length, num_samples)
            structure = self._checked(whole)
            found = self._scores(whole, num_samples, size=_size(structure))
            return self._posterior(structure, found, local=local)

    def given_globals(self, num_samples: int, *, seed: int = 0) -> Posterior:
        """The posterior of single data points' latents, given one draw of all other latents.

        Raises:
            ValueError: no latents inside the plate, or a guide that draws them jointly.
        """
        check_count("posterior draw", num_samples)
        batches = self._batches
        with seeded(seed, batches.device), torch.no_grad():
            whole = batches.whole()
            structure = self._checked(whole)
            trace = structure.guide_trace
            inside = [name for name in structure.latents if structure.inside_model(name)]
            if not inside:
                raise ValueError(
                    f"expected latents of single data points, inside plate {self.plate!r}, but"
                    f" {structure.latents} stand outside it"
                )
            noise = [name for name in structure.proposed if is_drawn(trace.nodes[name])]
            shared = [name for name in noise if not structure.inside_guide(name)]
            if noise and shared == noise:
                raise ValueError(
                    f"the guide draws {inside} of all data points jointly, from {noise}: there is"
                    " no posterior of one of them given the others"
                )
            values = {name: base_noise(trace.nodes[name]) for name in shared}
            given = {name: v.expand(num_samples, *v.shape) for name, v in values.items()}
            found = self._scores(whole, num_samples, size=_size(structure), given=given)
            return self._posterior(structure, found, local=True)

    def log_predictive_density(self, num_samples: int, *, seed: int = 0) -> Estimate:
        """log p(x_n | training data) of data that the guide has not seen, in nats; (N,) each.

        It is NaN for data points that are masked as a whole.

        Raises:
            ValueError: fewer than two draws; an autoguide with latents of single data points.
        """
        check_count("posterior draws", num_samples, least=2)
        batches = self._batches
        with seeded(seed, batches.device), torch.no_grad():
            whole = batches.whole()
            structure = self._checked(whole)
            structure.check_amortized(self.guide)
            self._check_rows(structure)
            found = self._scores(whole, num_samples, size=_size(structure))
        posterior = self._posterior(structure, found, local=False)
        if "p inside" in found:
            log_w = found["p inside"] - found.get("q inside", torch.zeros(()))
        else:
            log_w = posterior.pointwise_log_likelihood()
        estimate = diagnostics.log_evidence(log_w.numpy())
        hidden = ~posterior.observed_points().numpy()
        parts = (np.where(hidden, math.nan, part) for part in (estimate.value, estimate.se))
        return Estimate(*parts)

    def _check_rows(self, structure: Structure) -> None:
        """Raises ValueError unless data points have densities of their own, or all are outside."""
        observed = {name: structure.inside_model(name) for name in structure.observed}
        if any(observed.values()) and not all(observed.values()):
            outside = [name for name, inside in observed.items() if not inside]
            raise ValueError(
                f"a log predictive density of single data points needs every observed site inside"
                f" plate {self.plate!r}, but {outside} stand outside it"
            )
        if self.plate not in structure.plates:
            for name in structure.latents:
                if stack := structure.model_trace.nodes[name]["cond_indep_stack"]:
                    raise ValueError(
                        f"there is no vectorized plate {self.plate!r} over data points, and latent"
                        f" site {name!r} stands inside plate {stack[0].name!r}: if that one is over"
                        " data points, name it (plate=...)"
                    )
        for name in structure.latents:
            if structure.inside_model(name) and not (
                any(observed.values()) and structure.inside_guide(name)
            ):
                raise ValueError(
                    f"a log predictive density needs latent site {name!r}, which belongs to single"
                    f" data points in the model, inside plate {self.plate!r} in the guide too, and"
                    " the observed sites with it"
                )

    def predictive(self, draws: Mapping[str, Tensor], *, seed: int = 0) -> Draws:
        """One draw of every observed site for each draw of the latents.

        Raises:
            ValueError: no latents; a likelihood that cannot be drawn from.
        """
        if not draws:
            raise ValueError("expected draws of latents to predict from, but there are none")
        try:
            found = self._simulated(len(next(iter(draws.values()))), draws, seed)
        except NotImplementedError as error:
            raise ValueError(f"the data cannot be drawn: {_reason(error)}") from error
        return _named(found, "observed ")

    def unobserved_sites(self, complete: Scorer) -> list[str]:
        """The sites that a run on complete data observes, and a run on these data does not.

        Raises:
            ValueError: the guide does not run on these data.
        """
        batches = complete._batches
        with seeded(0, batches.device), torch.no_grad():
            structure = complete._structure(batches.whole())
            if structure.shared:
                raise ValueError(
                    f"the guide runs the model, and needs values of {list(structure.shared)} for"
                    " that: give some of their shape and support, they are drawn anew"
                )
            trace = self._guide_and_model_traces()[1]
        missing = [name for name in structure.observed if name in trace]
        return [name for name in missing if not is_observation(trace.nodes[name])]

    def predict(self, num_samples: int, missing: Collection[str], *, seed: int = 0) -> Draws:
        """One draw of every observed site for each draw from the guide.

        Args:
            num_samples: draws (S).
            missing: sites that the model observes in the data of the fit, and not in these.
            seed: of the draws.
        """
        sizes = {} if (rows := self._batches.length) is None else {self.plate: rows}

        def run(fixed: Draws) -> Draws:
            with FixedSites(fixed):
                drawn, trace = self._guide_and_model_traces(
                    Uncondition()(PlateSizes(sizes)(self.model))
                )
            values: Draws = {}
            for name, site in {**drawn.nodes, **trace.nodes}.items():
                if is_drawn(site):
                    values[f"{NOISE}{name}"] = base_noise(site)
                if name in missing or (site["type"] == "sample" and "obs" in site["infer"]):
                    layout = Layout.of(site, plate=self.plate)
                    values[f"observed {name}"] = layout.ordered(site["value"])
            return values

        with seeded(seed, self._batches.device), torch.no_grad():
            at_once = max(1, _VALUES // max(_WIDTH, rows or 1))
            return _named(
                _kept(vectorize_over_draws(run, num_samples, at_once=at_once)), "observed "
            )

    def _guide_and_model_traces(
        self, model: Callable[..., Any] | None = None
    ) -> tuple[Trace, Trace]:
        """Traces of the guide, and of the model replayed against it, which may draw more sites."""
        args, kwargs = self._batches.whole()
        try:
            with reachable():
                drawn = poutine.trace(self.guide).get_trace(*args, **kwargs)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"the guide does not run on these data ({_reason(error)}): it needs arguments that"
                " are missing. Pass them; of a PredictiveVAE, fitted.model.predict(x) draws y for"
                " new x"
            ) from error
        replayed = poutine.replay(self.model if model is None else model, trace=drawn)
        return drawn, poutine.trace(replayed).get_trace(*args, **kwargs)

    def completed(self, samples: Mapping[str, Tensor]) -> Draws:
        """Draws of the model's latents made elsewhere, with what follows from them.

        Args:
            samples: values by site as Pyro has them, (R, ...) each, such as
                `pyro.infer.MCMC.get_samples` gives.

        Returns:
            Latent and deterministic sites in the order of axes of `Posterior`; the samples as they
            are, if some of the model's latents are not among them.
        """
        batches = self._batches
        with seeded(0, batches.device), torch.no_grad():
            structure = self._structure(batches.whole())
        if not samples.keys() >= set(structure.latents):
            sites = structure.model_trace.nodes
            return {
                name: torch.func.vmap(Layout.of(sites[name], plate=self.plate).ordered)(value)
                if name in structure.latents
                else value
                for name, value in samples.items()
            }
        given = {name: samples[name].to(batches.device) for name in structure.latents}
        found = self._runs(len(next(iter(samples.values()))), given, structure, seed=0)
        return {**_named(found, "latent "), **_named(found, "deterministic ")}

    def prior(self, num_samples: int, *, seed: int = 0) -> tuple[Draws, Draws]:
        """Draws from the prior: latent and deterministic sites, and observed ones.

        Raises:
            ValueError: a prior that cannot be drawn from, such as a flat one.
        """
        try:
            found = self._simulated(num_samples, {}, seed)
        except NotImplementedError as error:
            raise ValueError(f"the prior cannot be drawn from: {_reason(error)}") from error
        latents = {**_named(found, "latent "), **_named(found, "deterministic ")}
        return latents, _named(found, "observed ")

    def given_data(self) -> tuple[Draws, Draws]:
        """The data by observed site, and the other tensors among the arguments by name."""
        batches = self._batches
        args, kwargs = batches.whole()
        with seeded(0, batches.device), torch.no_grad():
            structure = self._structure((args, kwargs))
        sites = {name: structure.model_trace.nodes[name] for name in structure.observed}
        seen = {id(original_value(site)) for site in sites.values()}
        named = {**dict(zip(_parameters(self.model, len(args)), args, strict=True)), **kwargs}
        return (
            {
                name: Layout.of(site, plate=self.plate).ordered(site["value"]).cpu()
                for name, site in sites.items()
                if site["value"].numel()  # a pyro.factor observes nothing
            },
            {
                name: value.cpu()
                for name, value in named.items()
                if isinstance(value, Tensor) and id(value) not in seen
            },
        )

    def _checked(self, arguments: Arguments) -> Structure:
        """One run, with Pyro's own check of shapes: a column would broadcast in silence."""
        structure = self._structure(arguments)
        if is_validation_enabled():
            for trace in (structure.guide_trace, structure.model_trace):
                trace.compute_log_prob()
                for site in trace.nodes.values():
                    if site["type"] == "sample" and not site_is_subsample(site):
                        if not is_deterministic(site):  # which has no density
                            check_site_shape(site, math.inf)
        return structure

    def _structure(self, arguments: Arguments) -> Structure:
        args, kwargs = arguments
        with reachable():
            found = Structure.of(self.model, self.guide, args, kwargs, plate=self.plate)
        _check_scored(found)
        return found

    def _by_rows(self, batches: Batches, total: int, num: int) -> Posterior:
        """The posterior of each data point by itself, some of them at a time."""
        index = torch.arange(total, device=batches.device)
        first = self._checked(batches.rows(index[:2]))
        size = max(_WIDTH, _size(first) // first.batch)
        points = min(total, max(1, _VALUES // (num * size)))
        chunks = [
            self._scores(batches.rows(part), num, size=size * points)
            for part in index.split(points)
        ]
        if odd := sorted({key for chunk in chunks for key in chunk.keys() ^ chunks[0].keys()}):
            sites = sorted({key.partition(" ")[2] for key in odd} - {"inside", "outside"})
            raise ValueError(
                f"expected the same sites in all rows, but some rows lack {sites}: give posterior"
                " rows of one kind, such as sequences of one length"
            )
        split = {name for name, plates in self._plates(first).items() if self.plate in plates}
        whole = {}
        for key in chunks[0]:
            # What stands outside, a deterministic site, is of the rows that were run together.
            name = key.partition(" ")[2]
            if name in split or name == "inside":
                whole[key] = torch.cat([chunk[key] for chunk in chunks], dim=1)
        return self._posterior(first, whole, local=True)

    def _scores(
        self, arguments: Arguments, num: int, *, size: int, given: Draws | None = None
    ) -> Draws:
        """Draws and their log probabilities by key, (S, ...) each, on the CPU.

        Args:
            size: numbers that one run holds.
            given: values of the guide's sites that are not drawn; (S, ...) each.
        """

        def run(fixed: Draws) -> Draws:
            with FixedSites(fixed):
                structure = self._structure(arguments)
            return self._terms(structure)

        return _kept(vectorize_over_draws(run, num, given=given, at_once=max(1, _VALUES // size)))

    def _terms(self, structure: Structure) -> Draws:
        """Values and log probabilities of one run."""
        model, guide = structure.model_trace, structure.guide_trace
        guide.compute_log_prob()
        model.compute_log_prob()
        found: Draws = {}
        for name in _observations(structure):
            found[f"likelihood {name}"] = self._elements(model.nodes[name]).double()
            if (count := _count(model.nodes[name])) is not None:
                layout = Layout.of(model.nodes[name], plate=self.plate, density=True)
                found[f"count {name}"] = layout.ordered(count).double()
        for name in structure.proposed:
            if is_drawn(guide.nodes[name]):
                found[f"{NOISE}{name}"] = base_noise(guide.nodes[name])
        found |= self._values(structure, "latent", structure.latents)
        found |= self._values(structure, "deterministic", structure.deterministic)
        scored = structure.latents + structure.observed
        for side, trace, names in (("p", model, scored), ("q", guide, structure.proposed)):
            for name in names:
                site = trace.nodes[name]
                inside = self.plate in Layout.of(site, plate=self.plate).plates
                key = f"{side} {'inside' if inside else 'outside'}"
                term = (
                    log_prob_rows(site, self.plate) if inside else site["log_prob"].double().sum()
                )
                found[key] = found.get(key, 0) + term
        return found

    def _values(self, structure: Structure, kind: str, names: list[str]) -> Draws:
        sites = {name: structure.model_trace.nodes[name] for name in names}
        return {
            f"{kind} {name}": Layout.of(site, plate=self.plate).ordered(site["value"])
            for name, site in sites.items()
        }

    def _elements(self, site: Any) -> Tensor:
        """The log likelihood of each observation at a site, plates in order."""
        fn = site["fn"]
        alone = not site["cond_indep_stack"] and _count(site) is None
        if alone and isinstance(fn, torch.distributions.Independent):
            return fn.base_dist.log_prob(site["value"])
        return Layout.of(site, plate=self.plate, density=True).ordered(site["log_prob"])

    def _plates(self, structure: Structure) -> dict[str, tuple[str, ...]]:
        """The plates of every site's first axes."""
        names = structure.latents + structure.deterministic + structure.observed
        sites = structure.model_trace.nodes
        return {name: Layout.of(sites[name], plate=self.plate).plates for name in names}

    def _posterior(self, structure: Structure, found: Draws, *, local: bool) -> Posterior:
        latents, dims = _named(found, "latent "), self._plates(structure)
        num = len(next(iter(found.values())))
        sites = {name: structure.model_trace.nodes[name] for name in structure.observed}
        counts = {name: count.amax(0) for name, count in _named(found, "count ").items()}
        inside = {side: found.get(f"{side} inside") for side in "pq"}
        rows = next((value.shape[1] for value in inside.values() if value is not None), 1)
        log = {
            side: torch.zeros(num, rows).double() if value is None else value
            for side, value in inside.items()
        }
        if not local:
            log = {
                side: value.sum(1) + found.get(f"{side} outside", torch.zeros(num).double())
                for side, value in log.items()
            }
        return Posterior(
            draws=latents,
            deterministic=_named(found, "deterministic "),
            log_p=log["p"],
            log_q=log["q"],
            log_likelihood=_named(found, "likelihood "),
            counts=counts,
            plates={**structure.plates, **({self.plate: rows} if inside["p"] is not None else {})},
            dims=dims,
            plate=self.plate,
            num_observed=sum(
                float(counts[name].sum()) / (rows if local else 1)
                if name in counts
                else site["value"].numel() / (structure.batch if local else 1)
                for name, site in sites.items()
            ),
            discrete=bool(sites) and all(is_discrete(site["fn"]) for site in sites.values()),
            point=_points(
                structure,
                {  # shared ones are given where weights are of single data points
                    name: value
                    for name, value in latents.items()
                    if not local or self.plate in dims[name]
                },
            ),
            programs=self,
        )

    def _simulated(self, num: int, draws: Mapping[str, Tensor], seed: int) -> Draws:
        """Runs of the model with observed sites drawn, and latent ones where none are given."""
        batches = self._batches
        with seeded(seed, batches.device), torch.no_grad():
            structure = self._structure(batches.whole())
        given = {}
        for name, value in draws.items():
            layout = Layout.of(structure.model_trace.nodes[name], plate=self.plate)
            given[name] = torch.func.vmap(layout.raw)(value).to(batches.device)
        return self._runs(num, given, structure, seed)

    def _runs(self, num: int, given: Draws, structure: Structure, seed: int) -> Draws:
        """Runs of the model with some sites at given values, as Pyro has them, (S, ...) each."""
        size, sizes = _size(structure), structure.unsized
        batches = self._batches
        args, kwargs = batches.whole()

        def run(fixed: Draws) -> Draws:
            with FixedSites(fixed):
                model = Uncondition()(PlateSizes(sizes)(self.model))
                trace = poutine.trace(model).get_trace(*args, **kwargs)
            found: Draws = {"log p": trace.log_prob_sum()}
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or site_is_subsample(site):
                    continue
                kind = "observed" if site["infer"].get("was_observed") else "latent"
                if is_deterministic(site):
                    kind = "deterministic"
                else:
                    found[f"{NOISE}{name}"] = site["value"]
                if site["value"].numel():
                    value = Layout.of(site, plate=self.plate).ordered(site["value"])
                    found[f"{kind} {name}"] = value
            return found

        with seeded(seed, batches.device), torch.no_grad():
            return _kept(
                vectorize_over_draws(run, num, given=given, at_once=max(1, _VALUES // size))
            )


def _points(structure: Structure, draws: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The latents for which the guide has no density.

    They have one value in all draws, or they follow from fewer numbers than they have themselves.
    """
    guide = structure.guide_trace.nodes
    noise = [name for name, site in guide.items() if is_drawn(site)]
    follow = [name for name in draws if is_delta(guide[name]["fn"])]
    held = [
        name
        for name in follow
        if bool((draws[name] == draws[name][:1]).all()) and (len(draws[name]) > 1 or not noise)
    ]
    follow = [name for name in follow if name not in held]
    drawn = sum(guide[name]["value"].numel() for name in noise if name not in structure.latents)
    if drawn < sum(_freedom(structure.model_trace.nodes[name]) for name in follow):
        held += follow
    return tuple(name for name in draws if name in held)


def _freedom(site: Any) -> int:
    """The numbers that a value has once its constraints are lifted; 0 if that is not known."""
    try:
        return int(biject_to(site["fn"].support).inverse_shape(site["value"].shape).numel())
    except NotImplementedError:
        return 0


def _observations(structure: Structure) -> list[str]:
    """The sites that observe something: not a `pyro.factor` outside all plates, if others do."""
    sites = structure.model_trace.nodes
    found = [
        name
        for name in structure.observed
        if sites[name]["value"].numel() or sites[name]["cond_indep_stack"]
    ]
    return found or structure.observed


def _count(site: Any) -> Tensor | None:
    """How many values each element of a site's log probability stands for; None if no mask is."""
    mask, shape = _mask(site["fn"]), site["log_prob"].shape
    if mask is None and site["mask"] is None:
        return None
    if mask is None:
        mask = torch.ones((), dtype=torch.int64, device=site["log_prob"].device)
        mask = mask * site["fn"].event_shape.numel()
    if site["mask"] is not None:
        mask = mask * torch.as_tensor(site["mask"], device=mask.device)
    return mask.expand(shape)


def _mask(fn: Any) -> Tensor | None:
    """The values that a distribution's own masks leave, counted by element of its batch shape."""
    if isinstance(fn, dist.MaskedDistribution):
        inner = _mask(fn.base_dist)
        own = torch.as_tensor(fn._mask).long()
        return own * (fn.event_shape.numel() if inner is None else inner)
    if isinstance(fn, torch.distributions.Independent):
        inner = _mask(fn.base_dist)
        if inner is None:
            return None
        events = fn.reinterpreted_batch_ndims
        inner = inner.expand(fn.base_dist.batch_shape)
        return inner.flatten(-events).sum(-1) if events else inner
    return None


def _named(found: Draws, kind: str) -> Draws:
    return {key.removeprefix(kind): value for key, value in found.items() if key.startswith(kind)}


def _kept(found: Draws) -> Draws:
    return {key: value.cpu() for key, value in found.items() if not key.startswith(NOISE)}


def _size(structure: Structure) -> int:
    """Numbers that the sites of a run hold, or that its data points are taken to need."""
    traces = (structure.model_trace, structure.guide_trace)
    sites = [s for trace in traces for s in trace.nodes.values() if s["type"] == "sample"]
    held = sum(site["value"].numel() for site in sites)
    return max(held, _WIDTH)


def _reason(error: Exception) -> str:
    """What an error says, without the shapes that Pyro adds."""
    return str(error).partition("\n")[0] or "a distribution has no sampler"


def _parameters(program: Callable[..., Any], num: int) -> list[str]:
    """The names of a program's first positional parameters."""
    while isinstance(program, Program):
        program = program.function
    program = getattr(poutine.unwrap(program), "forward", program)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(program).parameters.values() if p.kind in kinds]
    return [names[i] if i < len(names) else f"argument {i}" for i in range(num)]


def check_scores(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Arguments,
    *,
    plate: str,
    device: torch.device | None = None,
) -> None:
    """Raises ValueError, before training, if the guide's draws will have no density.

    Programs that sample a subset of their steps have a bound by step instead (`StepBound`).

    Args:
        model, guide: the programs, which stay as they are.
        batch: arguments of one call.
        plate: the name of the plate over data points.
        device: where the batch is; by default where the programs are.
    """
    args, kwargs = batch
    state = State({"model": model, "guide": guide}, device=device)
    with seeded(0, device), torch.no_grad(), state.installed(), reachable():
        structure = Structure.of(model, guide, args, kwargs, plate=plate)
    sites = structure.model_trace.nodes.values()
    if not any(site["type"] == "sample" and is_subsampled_term(site) for site in sites):
        _check_scored(structure)


def _check_scored(structure: Structure) -> None:
    if structure.marginalized:
        raise ValueError(
            f"the guide does not sample {structure.marginalized}, which its loss enumerated: log"
            " p(x, z) of draws needs them sampled by the guide, or summed out in the model (such as"
            " dist.MixtureSameFamily)"
        )
    for trace in (structure.model_trace, structure.guide_trace):
        _check_unscaled(trace)


def _check_unscaled(trace: Trace) -> None:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site):
            if is_partial(site):
                raise ValueError(
                    f"site {name!r} is scaled by the program: scaled densities are no posterior."
                    " A plate with a subsample_size scales (give fit a batch_size instead; DDPM"
                    " draws some of its steps, DDPMChain all), so does poutine.scale, and an"
                    " autoguide where a plate has another size than in the fit"
                )
