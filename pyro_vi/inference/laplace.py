"""The Gaussian at the mode, for a fit of Pyro's `AutoLaplaceApproximation`.

    q(u) = N(u*, H^-1),    u* = argmax log p(x, u),    H = -d^2 log p(x, u*) / du^2

with all latents u on their unconstrained scale, and log p(x, u) of the whole data, unscaled. Pyro's
guide is trained as a point at the mode; the fit's guide is the Gaussian.
"""

from __future__ import annotations

__all__ = ["check_mode", "gaussian_at_mode"]

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal

from pyro_vi.inference.fitted import Fit
from pyro_vi.programs import Program, State, Structure
from pyro_vi.weighting import TermWeights


def check_mode(guide: Callable[..., Any], structure: Structure, weights: TermWeights) -> None:
    """Raises ValueError if the guide is Laplace's and no call has the joint that it is trained on.

    Args:
        guide: the variational program.
        structure: what one run shows.
        weights: those of the fit.
    """
    if not isinstance(guide, AutoLaplaceApproximation):
        return
    if not weights.plain:
        raise ValueError(
            "Laplace's approximation has the mode and the curvature of one log joint, and weighted"
            " terms have another: expected kl_weight=1 and reconstruction_weight=1, got"
            f" {weights.kl:g} and {weights.reconstruction:g} at the first step"
        )
    if structure.marginalized:
        raise ValueError(
            "Laplace's approximation needs the log joint of continuous latents, but"
            f" {structure.marginalized} are left to enumeration"
        )
    for name, site in structure.model_trace.nodes.items():
        for frame in site.get("cond_indep_stack", ()):
            if frame.full_size not in (None, frame.size):
                raise ValueError(
                    "Laplace's approximation needs the log joint of all data, but site"
                    f" {name!r} sees {frame.size} of {frame.full_size} in plate {frame.name!r}:"
                    " leave out subsample_size, and give fit a batch_size"
                )


def gaussian_at_mode(fitted: Fit, *args: Any, **kwargs: Any) -> Fit:
    """The fit with the Gaussian at the mode as its guide, an `AutoMultivariateNormal`.

    Args:
        fitted: a fit of an `AutoLaplaceApproximation`; its state is not to be used afterwards.
        *args, **kwargs: the arguments of the programs, with all data.

    Raises:
        ValueError: the Hessian is not positive definite.
    """
    model, state = fitted.model.function, fitted.model.state
    point: Any = fitted.guide.function
    with state.installed():
        point.loc.requires_grad_(True)
        try:
            found = point.laplace_approximation(*args, **kwargs)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                "the Hessian of -log p(x, z) is not positive definite where training ended: the"
                " mode was not reached, or is no maximum; take more steps, or another guide"
            ) from error
        gaussian = AutoMultivariateNormal(point.model)
        held = State({"model": model, "guide": gaussian}, device=state.device)
    with held.installed(), torch.no_grad():
        Structure.of(model, gaussian, args, kwargs, plate=fitted.plate)
        tril = found.scale[:, None] * found.scale_tril
        gaussian.loc.copy_(found.loc)
        gaussian.scale = tril.diagonal()
        gaussian.scale_tril = tril / tril.diagonal()[:, None]
    learnt = {n: t for n, t in state.snapshot().items() if n.startswith("param.")}
    held.restore({**held.snapshot(), **learnt})
    held.freeze()
    return replace(
        fitted, model=Program(model, held, "model"), guide=Program(gaussian, held, "guide")
    )
