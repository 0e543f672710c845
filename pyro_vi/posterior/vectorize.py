"""A program over many draws at once.

`torch.func.vmap` runs a program once for S draws: every operation gets a leading axis behind the
program's back. What the draws share, such as an encoder's network, is computed once. An outer plate
would do the same only for programs that broadcast with care, and is silently wrong where one says
`z[0] + z[1]`; vmap works draw by draw whatever the program does, or fails. Where it fails
(data-dependent branches, NumPy, a sampler without a rule for it), and where a few draws run one by
one do not repeat what it gave, all draws are run one by one.
"""

from __future__ import annotations

__all__ = ["NOISE", "vectorize_over_draws"]

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

log = logging.getLogger(__name__)

Values = dict[str, Tensor]

NOISE = "noise "  # what keys of drawn values start with


def vectorize_over_draws(
    run: Callable[[Values], Values],
    num: int,
    *,
    given: Mapping[str, Tensor] | None = None,
    at_once: int | None = None,
) -> Values:
    """Runs a program S times, vectorised where that gives what the runs one by one give.

    Args:
        run: takes values by name that are fixed in this run, and returns tensors by key. Keys that
            start with `NOISE` are all the values that it drew; given them it must repeat itself.
        num: draws (S), at least 1.
        given: values that differ from draw to draw; (S, ...) each.
        at_once: draws that are held in memory at once; all by default.

    Returns:
        Tensors by key, each (S, ...).

    Raises:
        ValueError: the runs do not all return the same keys.

    Example:
        >>> import pyro.distributions as dist
        >>> def run(fixed):
        ...     z = fixed.get("z", dist.Normal(0.0, 1.0).sample((2,)))
        ...     return {"noise z": z, "sum": z[0] + z[1]}
        >>> found = vectorize_over_draws(run, 5)
        >>> found["noise z"].shape, bool((found["noise z"].sum(1) == found["sum"]).all())
        (torch.Size([5, 2]), True)
    """
    given = dict(given or {})
    try:
        found = _vectorised(run, num, given, at_once)
    except Exception as error:  # whatever it is, the runs one by one meet it too or do not need it
        log.info("draws are run one by one: %s", error)
    else:
        if _repeats(run, found, given, num, at_once or num):
            return found
        log.info("draws are run one by one: vectorised, they come out otherwise")
    return _one_by_one(run, num, given)


def _vectorised(
    run: Callable[[Values], Values], num: int, given: Values, at_once: int | None
) -> Values:
    def one(token: Tensor, values: Values) -> Values:
        with _EmptyPerDraw(token), _DirichletPerDraw():
            return run(values)

    device = next((value.device for value in given.values()), None)
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        # ... and of Binomial's sampler, which gives the right values.
        warnings.filterwarnings("ignore", message="An output with one or more elements was resized")
        vectorised = torch.func.vmap(one, randomness="different", chunk_size=at_once)
        return vectorised(torch.arange(num, device=device), given)


def _one_by_one(run: Callable[[Values], Values], num: int, given: Values) -> Values:
    runs = []
    for index in range(num):
        runs.append(run({name: values[index] for name, values in given.items()}))
        if runs[-1].keys() != runs[0].keys():
            odd = sorted(runs[-1].keys() ^ runs[0].keys())
            raise ValueError(f"expected the same sites in every draw, but some lack {odd}")
    return {key: torch.stack([found[key] for found in runs]) for key in runs[0]}


def _repeats(
    run: Callable[[Values], Values], found: Values, given: Values, num: int, at_once: int
) -> bool:
    """Whether the first and the last draw give the same when they are run by themselves."""
    drawn = {key: key.removeprefix(NOISE) for key in found if key.startswith(NOISE)}
    for key, name in drawn.items():
        values = found[key]
        known = num == 1 or not values.numel() or name in given
        for part in () if known else values.split(at_once):
            if len(part) > 1 and bool((part == part[:1]).all()):
                return False  # one draw of NumPy's or Python's, for all that were made at once
    for index in sorted({0, num - 1}):
        fixed = {name: values[index] for name, values in given.items()}
        again = run(fixed | {name: found[key][index] for key, name in drawn.items()})
        if again.keys() != found.keys():
            return False
        for key, value in again.items():
            if not _close(value, found[key][index]):
                return False
    return True


def _close(value: Tensor, other: Tensor) -> bool:
    if value.shape != other.shape or value.dtype != other.dtype:
        return False
    if not value.is_floating_point():
        return torch.equal(value, other)
    # Sums of many terms are rounded in another order, in the dtype that the program computes in.
    tolerance = torch.finfo(torch.float32).eps ** 0.5
    return torch.allclose(value, other, rtol=tolerance, atol=tolerance, equal_nan=True)


class _EmptyPerDraw(TorchFunctionMode):
    """Gives uninitialised tensors an axis over draws, so that samplers can fill them in place.

    torch's distributions fill `torch.empty(shape)` with noise, which vmap refuses for a tensor that
    all draws share.
    """

    def __init__(self, token: Tensor) -> None:
        super().__init__()
        self._token = token

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _EMPTY and isinstance(made, Tensor):
            return made + (self._token * 0).to(made)
        return made


class _DirichletPerDraw(Messenger):
    """Draws the values of Dirichlet and beta sites.

    torch draws them in a function with a gradient of its own, which vmap refuses. Nothing here asks
    for gradients.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not msg["done"] and not msg["args"] and not msg["kwargs"]:
            msg["value"] = _dirichlet(msg["fn"])


def _dirichlet(fn: Any) -> Tensor | None:
    """A draw of a Dirichlet or a beta distribution; None for another one."""
    while isinstance(fn, (torch.distributions.Independent, MaskedDistribution)):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.Beta):
        return torch._sample_dirichlet(fn._dirichlet.concentration).select(-1, 0)
    if isinstance(fn, torch.distributions.Dirichlet):
        return torch._sample_dirichlet(fn.concentration)
    return None


_EMPTY = (torch.empty, torch.empty_like, torch.Tensor.new_empty, torch.Tensor.new)
