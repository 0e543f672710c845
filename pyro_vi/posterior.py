"""Draws from a fitted guide, with log p(x, z), log q(z | x) and log p(x | z) per data point.

The importance weights p(x, z) / q(z | x) of these draws carry every diagnostic: the ELBO is the
mean of their logarithm, the evidence the logarithm of their mean, and the tail of their
distribution (k-hat) says how far the guide may be trusted.
"""

from __future__ import annotations

__all__ = ["Posterior", "draw_posterior"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro.poutine as poutine
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi import diagnostics
from pyro_vi.batches import Batches, Data
from pyro_vi.diagnostics import Estimate
from pyro_vi.program import seeded
from pyro_vi.scaling import Structure, is_autoguide, log_prob_rows

_ROWS = 2**14  # rows (data points x draws) that are evaluated at once


@dataclass(frozen=True)
class Posterior:
    """Draws from a guide for N data points, S each, on the CPU.

    Attributes:
        draws: values by latent site; each (S, N, ...).
        log_p: log p(x, z) in nats, float64; (S, N).
        log_q: log q(z | x) in nats, float64; (S, N).
        log_likelihood: log p(x | z) in nats, float64; (S, N).
        num_observed: observed values in a data point.
        discrete: whether the observed values are discrete.
    """

    draws: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    log_likelihood: Tensor
    num_observed: int
    discrete: bool

    @property
    def log_weights(self) -> npt.NDArray[np.float64]:
        """log p - log q, float64; (S, N)."""
        return (self.log_p - self.log_q).numpy()

    def elbo(self) -> Estimate:
        """The ELBO of each data point with its Monte Carlo standard error; (N,) each."""
        return diagnostics.elbo(self.log_weights)

    def evidence(self) -> Estimate:
        """The importance-weighted evidence with its Monte Carlo standard error; (N,) each."""
        return diagnostics.log_evidence(self.log_weights)

    def kl_to_posterior(self) -> Estimate:
        """Evidence minus ELBO, an estimate of KL(q(z | x) || p(z | x)); (N,) each."""
        return diagnostics.kl_to_posterior(self.log_weights)

    def khat(self) -> npt.NDArray[np.float64]:
        """The Pareto k-hat of each data point's weights; (N,)."""
        return diagnostics.pareto_khat(self.log_weights)

    def ess(self) -> npt.NDArray[np.float64]:
        """The importance effective sample size of each data point, from 1 to S; (N,)."""
        return diagnostics.importance_ess(self.log_weights)

    def active_units(self) -> dict[str, npt.NDArray[np.bool_]]:
        """Whether Var_x(E_q[z]) > 0.01, by latent site and unit."""
        active = {}
        for name, values in self.draws.items():
            draws = values.double().flatten(2).numpy() if values.dim() > 2 else values[..., None]
            active[name] = diagnostics.active_units(np.asarray(draws, dtype=np.float64))
        return active


def draw_posterior(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Data,
    *,
    num_samples: int,
    plate: str = "data",
    seed: int = 0,
) -> Posterior:
    """Draws from the guide for each data point and scores the draws.

    Each data point is repeated once a draw, inside the plate over data points, so that any program
    with local latents is evaluated as it is; a few thousand rows at a time bound the memory.

    Args:
        model, guide: programs with every site inside the plate.
        data: N data points, as `fit` takes them.
        num_samples: draws for each data point (S), at least 1.
        plate: the name of the plate over data points.
        seed: of the draws.

    Raises:
        ValueError: fewer than one draw; a site outside the plate; a site scaled by the program.

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
        >>> posterior = draw_posterior(model, exact, torch.randn(5), num_samples=100)
        >>> posterior.log_p.shape, posterior.draws["z"].shape
        (torch.Size([100, 5]), torch.Size([100, 5]))
        >>> bool((posterior.kl_to_posterior().value < 1e-5).all())
        True
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"expected at least one posterior draw, got {num_samples!r}")
    if is_autoguide(guide):
        raise ValueError(
            "an autoguide has one posterior, of the data it was fitted to; a posterior for each"
            " data point needs an amortized guide (pyro_vi.guides.Encoder)"
        )
    batches = Batches(data, batch_size=1)
    total = batches.total
    assert total is not None
    points = max(1, _ROWS // num_samples)
    passes = -(-num_samples // _ROWS)  # more than one if a single data point has too many draws
    first: Structure | None = None
    chunks: list[dict[str, Tensor]] = []
    device = next(iter(batches.parts.values())).device
    with seeded(seed, device), torch.no_grad():
        for index in torch.arange(total, device=device).split(points):
            parts = []
            for share in torch.arange(num_samples).tensor_split(passes):
                args, kwargs = batches.rows(index.repeat(len(share)))
                structure = Structure.of(model, guide, args, kwargs, plate=plate)
                if first is None:
                    first = structure
                    _check_local(structure)
                parts.append(_scored(structure, len(share)))
            chunks.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    assert first is not None
    whole = {key: torch.cat([chunk[key] for chunk in chunks], dim=1) for key in chunks[0]}
    sites = [first.model_trace.nodes[name] for name in first.observed]
    return Posterior(
        log_p=whole.pop("log p"),
        log_q=whole.pop("log q"),
        log_likelihood=whole.pop("log likelihood"),
        draws={name: whole[f"site {name}"] for name in first.latents},
        num_observed=sum(site["value"].numel() for site in sites) // first.batch,
        discrete=bool(sites) and all(site["fn"].support.is_discrete for site in sites),
    )


def _scored(structure: Structure, draws: int) -> dict[str, Tensor]:
    """Draws and their log probabilities from one run, each (draws, points, ...)."""
    structure.model_trace.compute_log_prob()
    structure.guide_trace.compute_log_prob()

    def total(trace: poutine.Trace, names: list[str]) -> Tensor:
        rows = [log_prob_rows(trace.nodes[name], structure.plate).double() for name in names]
        summed = torch.stack(rows).sum(0) if rows else torch.zeros(structure.batch).double()
        return summed.reshape(draws, -1).cpu()

    likelihood = total(structure.model_trace, structure.observed)
    found = {
        "log likelihood": likelihood,
        "log p": likelihood + total(structure.model_trace, structure.latents),
        "log q": total(structure.guide_trace, structure.proposed),
    }
    for name in structure.latents:
        site = structure.guide_trace.nodes[name]
        frame = next(f for f in site["cond_indep_stack"] if f.name == structure.plate)
        value = site["value"].movedim(frame.dim - len(site["fn"].event_shape), 0)
        found[f"site {name}"] = value.reshape(draws, -1, *value.shape[1:]).cpu()
    return found


def _check_local(structure: Structure) -> None:
    if structure.marginalized:
        raise ValueError(
            f"the guide does not sample {structure.marginalized}: log p(x, z) of draws would need"
            " these latents marginalized"
        )
    for trace in (structure.model_trace, structure.guide_trace):
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            inside = [f for f in site["cond_indep_stack"] if f.name == structure.plate]
            if any(not frame.vectorized for frame in inside):
                raise ValueError(
                    f"a posterior per data point needs a vectorized plate {structure.plate!r}, and"
                    f" {name!r} stands in a loop over it"
                )
            if not inside:
                raise ValueError(
                    f"a posterior per data point needs every site inside plate"
                    f" {structure.plate!r}, but {name!r} stands outside it"
                )
            if not bool((torch.as_tensor(site["scale"]) == 1).all()):
                raise ValueError(
                    f"site {name!r} is scaled by the program: scaled densities are no posterior"
                )
