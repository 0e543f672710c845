r"""The bound of a diffusion program, by step.

    -ELBO = KL(q(y_T | x_0) || p(y_T))                            the prior's term
            + sum_{t > 1} E KL(q(y_{t-1} | y_t, x_0) || p(y_{t-1} | y_t))
            - E log p(x_0 | y_1)                                  the reconstruction

The time-sub-sampled program draws some of these terms; here it is run at every step in turn, by
giving its site "t" a value. Each term is Pyro's own: that of a site of the two traces.

In bits per dimension a bound on log P of discrete data is -ELBO / (D ln 2): P is the probability of
the grey levels themselves, so that no constant of a dequantisation enters.
"""

from __future__ import annotations

__all__ = ["StepBound", "step_bound"]

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro.poutine as poutine
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vi.checks import check_count, check_seed
from pyro_vi.diagnostics import Estimate
from pyro_vi.divergences import kl_rows
from pyro_vi.process_state import seeded
from pyro_vi.programs import FixedSites, State, as_tensors, is_discrete

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class StepBound:
    """The terms of -ELBO, in nats, for each of N data points.

    Attributes:
        prior: KL(q(y_T | x_0) || p(y_T)); (N,).
        steps: the terms of t = 1, ..., T, means over the draws of y_t; (T, N). That of t = 1 is
            minus the reconstruction.
        variance: their variances over those draws, of the means; (T, N), NaN for one draw.
        dims: observed values in a data point (D).
        discrete: whether these are discrete.

    Example:
        >>> bound = StepBound(np.ones(2), np.ones((3, 2)), np.zeros((3, 2)), 4, True)
        >>> float(bound.elbo.value), float(bound.reconstruction.value)
        (-4.0, -1.0)
    """

    prior: Array
    steps: Array
    variance: Array
    dims: int
    discrete: bool

    def __repr__(self) -> str:
        error = "" if np.isnan(self.elbo.se) else f" ± {self.elbo.se:.3f}"
        return (
            f"StepBound(ELBO {self.elbo.value:.3f}{error} nats: prior"
            f" {self.prior.mean():.3f}, {len(self.steps) - 1} steps"
            f" {self.steps[1:].sum(0).mean():.3f}, reconstruction {-self.steps[0].mean():.3f})"
        )

    @property
    def pointwise_elbo(self) -> Array:
        """The bound of each data point, (N,)."""
        return -(self.prior + self.steps.sum(0))

    @property
    def elbo(self) -> Estimate:
        """The mean over data points, with the Monte Carlo error of the draws."""
        return Estimate(self.pointwise_elbo.mean(), self._error(self.variance.sum(0)))

    @property
    def by_step(self) -> Estimate:
        """The mean over data points of each step's term; (T,) each."""
        return Estimate(self.steps.mean(1), self._error(self.variance))

    @property
    def reconstruction(self) -> Estimate:
        """E log p(x_0 | y_1), the mean over data points."""
        return Estimate(-self.steps[0].mean(), self._error(self.variance[0]))

    @property
    def bits_per_dim(self) -> Estimate:
        """-ELBO / (D ln 2).

        Raises:
            ValueError: the data are not discrete: a density has no bits.
        """
        if not self.discrete:
            raise ValueError("bits per dimension are of discrete data, and these have a density")
        unit = self.dims * math.log(2)
        return Estimate(-self.elbo.value / unit, self.elbo.se / unit)

    def _error(self, variance: Array) -> Array:
        """The standard error of a mean over the last axis, of values with these variances."""
        return np.sqrt(variance.sum(-1)) / variance.shape[-1]


def step_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Tensor,
    *,
    draws: int = 2,
    batch_size: int = 1_000,
    seed: int = 0,
    progress: bool | str = False,
) -> StepBound:
    """Every term of a time-sub-sampled program's bound, all steps in full.

    Where T is large, some steps are cheaper: `TraceMeanField_ELBO(num_particles=k).loss(model,
    guide, data)` is Pyro's own estimate of -ELBO of all data together.

    Args:
        model, guide: programs with the sites of `pyro_vi.models.DDPM` and
            `pyro_vi.guides.ForwardProcess`; fitted ones, or as they are. The weights of
            `pyro_vi.weighting` play no part.
        data: N data points, (N, *shape).
        draws: of y_t for each data point and step; 2 or more for Monte Carlo errors.
        batch_size: data points at a time.
        seed: of the draws.
        progress: whether to show a progress bar; a string labels it.

    Raises:
        TypeError: data that are no tensor.
        ValueError: programs without such sites, or under a mask or scale of your own; fewer than
            one draw; no data points.
    """
    data = as_tensors(data)
    if not isinstance(data, Tensor):
        raise TypeError(f"expected data points as one tensor, got {type(data).__name__}")
    check_count("data point", len(data))
    check_count("draw", draws)
    check_count("data point in a batch", batch_size)
    check_seed(seed)
    state = State({"model": model, "guide": guide})
    with seeded(seed, data.device), torch.no_grad(), state.evaluating():
        trace = _traces(model, guide, data[:1], None)[1]
        total = _steps(trace)
        drawn = trace.nodes["t"]["value"].shape[0]
        prior, terms, variances = [], [], []
        chunks = data.split(batch_size)
        label = progress if isinstance(progress, str) else None
        with tqdm(total=len(chunks) * total, desc=label, disable=not progress, unit="step") as bar:
            for rows in chunks:
                found = []
                for step in range(1, total + 1):
                    t = torch.full((drawn, len(rows)), step, device=data.device)
                    runs = [_traces(model, guide, rows, t) for _ in range(math.ceil(draws / drawn))]
                    _check_plain(runs[-1][1], step, total)
                    found.append(torch.cat([_term(*run, step) for run in runs])[:draws])
                    bar.update()
                name = f"x_{total}"
                prior.append(_kl(*runs[-1], name).double())
                every = torch.stack(found).double()
                terms.append(every.mean(1))
                variances.append((every.var(1) if draws > 1 else every[:, 0] * math.nan) / draws)
        site = trace.nodes["x_0"]
    return StepBound(
        prior=torch.cat(prior).cpu().numpy(),
        steps=torch.cat(terms, 1).cpu().numpy(),
        variance=torch.cat(variances, 1).cpu().numpy(),
        dims=data[0].numel(),
        discrete=is_discrete(site["fn"]),
    )


def _traces(
    model: Callable[..., Any], guide: Callable[..., Any], rows: Tensor, t: Tensor | None
) -> tuple[Trace, Trace]:
    with FixedSites({} if t is None else {"t": t}):
        guide_trace = poutine.trace(guide).get_trace(rows)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(rows)
    return guide_trace, model_trace


def _steps(trace: Trace) -> int:
    frames = [
        frame
        for name in ("t", "x_s", "x_0")
        if name in trace
        for frame in trace.nodes[name]["cond_indep_stack"]
        if frame.name == "steps"
    ]
    if len(frames) != 3:
        raise ValueError(
            "expected a time-sub-sampled program, such as DDPM with its ForwardProcess: sites 't',"
            f" 'x_s' and 'x_0' inside a plate 'steps', got {sorted(trace.stochastic_nodes)}"
        )
    return int(frames[0].full_size)


def _check_plain(trace: Trace, step: int, total: int) -> None:
    """Raises ValueError if a handler around the program leaves out or scales data points."""
    last, active = trace.nodes[f"x_{total}"], trace.nodes["x_s" if step > 1 else "x_0"]
    masks = [torch.as_tensor(True if s["mask"] is None else s["mask"]) for s in (last, active)]
    scaled = bool((torch.as_tensor(last["scale"]) != 1).any())
    if scaled or not all(bool(mask.all()) for mask in masks):
        raise ValueError(
            "expected programs without a mask or a scale around them: the bound of each data point"
            " is that of the data point as a whole. Leave out data points instead of masking them"
        )


def _term(guide_trace: Trace, model_trace: Trace, step: int) -> Tensor:
    """(k, N): the term of a step, for every draw and data point."""
    if step > 1:
        return _kl(guide_trace, model_trace, "x_s")
    site = model_trace.nodes["x_0"]
    found: Tensor = -site["fn"].log_prob(site["value"])
    return found


def _kl(guide_trace: Trace, model_trace: Trace, name: str) -> Tensor:
    q, p = guide_trace.nodes[name], model_trace.nodes[name]
    return kl_rows(q["fn"], p["fn"], q["value"])
