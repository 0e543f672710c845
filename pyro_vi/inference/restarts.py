"""Fits from several initial values: how these are moved, which fit is best, whether they agree.

The bound of a fit is the mean over the last tenth of its steps (two at least), in nats per data
point. Two bounds b and b', each with the standard error s of that mean, disagree if

    b - b' > 4 sqrt(s^2 + s'^2)    and    N (b - b') > 0.1 nats,

where N is the number of data points: a difference is neither noise nor too small to matter. An
optimum that is alone is reached from everywhere, so that fits that disagree have ended in different
local optima, or before their end.
"""

from __future__ import annotations

__all__ = ["best_of", "disagreement", "perturb"]

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_vi.inference.fitted import Fit
from pyro_vi.programs import Program, State, reach

_ERRORS, _NATS = 4.0, 0.1


def perturb(state: State, model: Callable[..., Any], guide: Callable[..., Any]) -> None:
    """Moves every trainable tensor of a state to another initial value, in place.

        w <- w + rms(w) e    the weights of layers
        w <- w + e           all others, on their unconstrained scale;    e ~ N(0, 1)

    A layer is a module that can reset its parameters (`nn.Linear`, convolutions, a flow's masked
    layers). Its root mean square keeps the size of its initial values; a tensor of one value
    throughout (zeros, a normalisation's gains) stays as it is. The others are an autoguide's, those
    of `pyro.param` and bare `nn.Parameter`s. A tied tensor is moved once, a frozen program's is
    not. The noise is torch's: seed it.

    Args:
        state: what is moved, after a run of the programs, which makes what is lazy.
        model, guide: the programs of the state.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.zeros_(layer.bias)
        >>> state = State({"model": layer})
        >>> perturb(state, layer, lambda: None)
        >>> state.tensors()["model.bias"].tolist()
        [0.0, 0.0]
        >>> bool((state.tensors()["model.weight"] == layer.weight).any())
        False
    """
    with state.installed(), torch.no_grad():
        layers = {
            id(tensor)
            for program in (model, guide)
            for root in reach(program, "", seen={}, closed=Program).values()
            for module in root.modules()
            if hasattr(module, "reset_parameters") or hasattr(module, "_reset_parameters")
            for tensor in module.parameters(recurse=False)
        }
        for tensor in state.parameters().values():
            size = tensor.square().mean().sqrt() if id(tensor) in layers else 1.0
            if id(tensor) in layers and bool((tensor == tensor.flatten()[0]).all()):
                continue  # the gains of a normalisation, or zeros: a designed start
            tensor.add_(size * torch.randn_like(tensor))


def best_of(fits: Sequence[Fit], *, stopped_early: bool = False) -> Fit:
    """The fit with the highest bound, with all fits as its `restarts`.

    Args:
        fits: one or more, all with a bound on the same held-out data, or all without.
        stopped_early: whether each kept the parameters of its best held-out bound, not the last.
    """
    bounds = torch.stack([_kept_bound(fit, stopped_early) for fit in fits])
    return replace(fits[int(bounds.argmax())], restarts=tuple(fits))


def disagreement(fits: Sequence[Fit]) -> str | None:
    """What to warn of where the worst fit's bound disagrees with the best's, else None."""
    bounds, errors = zip(*map(_training_bound, fits), strict=True)
    best = max(range(len(fits)), key=bounds.__getitem__)
    worst = min(range(len(fits)), key=bounds.__getitem__)
    gap = bounds[best] - bounds[worst]
    total = fits[best].plates.get(fits[best].plate, 1)
    if not (gap > _ERRORS * math.hypot(errors[best], errors[worst]) and gap * total > _NATS):
        return None
    found = ", ".join(
        f"{bound:.4f} ± {error:.4f}" for bound, error in zip(bounds, errors, strict=True)
    )
    return (
        f"the restarts disagree: their bounds are {found} nats per data point. They ended in"
        " different optima, or before their end: take more steps, a smaller learning rate at the"
        " end, or more restarts"
    )


def _training_bound(fit: Fit) -> tuple[float, float]:
    """Mean bound over the last tenth of the steps, and its standard error: NaN for one step.

    Both are NaN for a fit without steps.
    """
    if not len(fit.losses):
        return math.nan, math.nan
    tail = fit.losses[-max(2, len(fit.losses) // 10) :]
    return -float(tail.mean()), float((tail.var(correction=0) / (len(tail) - 1)).sqrt())


def _kept_bound(fit: Fit, stopped_early: bool) -> Tensor:
    if not len(fit.heldout):
        return torch.tensor(_training_bound(fit)[0], dtype=torch.float64)
    bounds = fit.heldout[:, 1].nan_to_num(nan=-math.inf)
    return bounds.max() if stopped_early else bounds[-1]
