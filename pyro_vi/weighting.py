r"""Weights of a bound's terms, as effect handlers.

The bound itself weighs all of its terms by one. An objective that weighs some of them otherwise is
a weighted sum of the bound's own terms: a looser bound if the KL alone weighs more, and in general
none. So it is the same program and the same ELBO under a handler that scales sites, in model and
guide alike.

`TermWeights` weighs reconstruction and KL,

.. math:: w_r E_q[\log p(x \mid z)] - w_k KL(q(z) \| p(z)),

each by a number or by a schedule over steps: beta-VAE's weight (Higgins et al., 2017, beta-VAE:
Learning Basic Visual Concepts with a Constrained Variational Framework), `warmup`, `cyclical`.

The weights of the steps of a diffusion are in `pyro_vi.diffusion` (`StepWeight`).
"""

from __future__ import annotations

__all__ = [
    "ScheduleError",
    "TermWeights",
    "check_sides",
    "check_weight",
    "cyclical",
    "unweighted",
    "warmup",
]

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi.compiling import is_recording
from pyro_vi.programs import is_deterministic


class TermWeights:
    """Weights on the two terms of a bound, as a handler for the model and one for the guide.

    The reconstruction's weight multiplies the observed sites of the model. The KL's multiplies the
    latent sites of the model and every site of the guide: auxiliary sites and factors of the guide
    belong to the KL too. A `pyro.factor` of the model is an observed site, and has the
    reconstruction's weight. With weights of one the bound is Pyro's to the last bit. The handlers
    go around all others, `poutine.condition` included, so that they see what is observed.

    Both programs need theirs, from one `TermWeights`: a KL that is weighted on one side is none.
    `fit` and `SVI` raise ValueError then. A program may still run by itself.

    Args:
        reconstruction, kl: at least 0: a number, or a function of the step, from 0 on, such as
            `warmup(1_000)`.
        device: of the programs; on a GPU, where a recorded step reads the weight of a schedule.

    Attributes:
        model, guide: the handlers, for the one program and the other. A run that has none of the
            sites whose weight was asked for raises ValueError.
        plain: whether both weights are the number one.

    Raises:
        ValueError: a weight that is not a finite number of at least 0.
        ScheduleError: a schedule that gives such a one; a ValueError.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> weights = TermWeights(reconstruction=2.0, kl=warmup(4))
        >>> weighted = weights.model(model)  # and weights.guide(guide)
        >>> for step in 0, 1, 9:
        ...     weights.at(step)
        ...     trace = pyro.poutine.trace(weighted).get_trace(torch.tensor(0.0))
        ...     trace.nodes["x"]["scale"], trace.nodes["z"]["scale"]
        (2.0, 0.25)
        (2.0, 0.5)
        (2.0, 1.0)
    """

    def __init__(
        self,
        *,
        reconstruction: float | Callable[[int], float] = 1.0,
        kl: float | Callable[[int], float] = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        self._reconstruction = _Weight("reconstruction", reconstruction, device)
        self._kl = _Weight("KL", kl, device)
        self.plain = not (self._reconstruction.weighs or self._kl.weighs)
        self.model: Messenger = _Terms("model", self._reconstruction, self._kl)
        self.guide: Messenger = _Terms("guide", self._kl, self._kl)

    @property
    def tensors(self) -> list[Tensor]:
        """The weights that follow a schedule, as a recorded step reads them."""
        every = (self._reconstruction, self._kl)
        return [weight.tensor for weight in every if weight.is_scheduled]

    def at(self, step: int) -> None:
        """Sets the weights to those of a step, from 0 on."""
        self._reconstruction.at(step)
        self._kl.at(step)

    @property
    def reconstruction(self) -> float:
        """The reconstruction's weight as it is now."""
        return self._reconstruction.value

    @property
    def kl(self) -> float:
        """The KL's weight as it is now."""
        return self._kl.value


class _Weight:
    """A weight, and what it is at a step."""

    def __init__(
        self,
        name: str,
        given: float | Callable[[int], float],
        device: torch.device | str | None,
    ) -> None:
        self.name = name
        self._schedule = given if callable(given) else None
        self.value = self._scheduled(0) if callable(given) else check_weight(given, name)
        self.is_scheduled = self._schedule is not None
        self.weighs = self._schedule is not None or self.value != 1.0
        # A recorded step reads the tensor; a number would stay in it as it was.
        self.tensor = torch.tensor(self.value, dtype=torch.float64, device=device)

    def at(self, step: int) -> None:
        if self._schedule is not None:
            value = self._scheduled(step)
            if value != self.value:
                self.value = value
                self.tensor.fill_(value)

    def _scheduled(self, step: int) -> float:
        assert self._schedule is not None
        weight = self._schedule(step)
        try:
            return check_weight(weight, self.name)
        except ValueError as error:
            raise ScheduleError(f"the schedule's weight at step {step}: {error}") from None

    def factor(self) -> float | Tensor:
        return self.tensor if self.is_scheduled and is_recording() else self.value


class _Terms(Messenger):
    """Multiplies the observed sites of a program by one weight, and the latent ones by another."""

    def __init__(self, program: str, observed: _Weight, latent: _Weight) -> None:
        super().__init__()
        self._program, self._observed, self._latent = program, observed, latent
        self._seen: dict[str, _Weight] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or is_deterministic(msg):
            return
        weight = self._observed if msg["is_observed"] else self._latent
        self._seen[msg["name"]] = weight
        msg["unweighted"] = msg["scale"]
        if weight.weighs:
            msg["scale"] = msg["scale"] * weight.factor()
            if not msg["is_observed"]:
                msg["weighed_by"] = (*msg.get("weighed_by", ()), (self._program, self._latent))

    def __exit__(self, *exception: Any) -> None:
        seen, self._seen = self._seen, {}
        super().__exit__(*exception)
        if exception[0] is not None:
            return
        both = self._observed is self._latent
        for weight, kind in ((self._observed, "observed"), (self._latent, "latent")):
            if weight.weighs and not any(found is weight for found in seen.values()):
                raise ValueError(
                    f"the weight {weight.value:g} on the {weight.name} expected"
                    f" {'sample' if both else kind} sites of the {self._program}, but a run of it"
                    f" has none: its sites are {list(seen)}"
                )


class ScheduleError(ValueError):
    """A schedule gave no weight; the message names the step, and no site is at fault."""


def unweighted(site: Mapping[str, Any]) -> Any:
    """The scale of a site of a trace as it is without the outermost `TermWeights`."""
    return site.get("unweighted", site["scale"])


def check_sides(model_trace: Trace, guide_trace: Trace) -> None:
    """Raises ValueError unless `TermWeights` weigh a latent in the model as in the guide."""
    for name, mine in model_trace.nodes.items():
        if mine["type"] != "sample" or mine["is_observed"] or name not in guide_trace:
            continue
        sites = {"model": mine, "guide": guide_trace.nodes[name]}
        by: dict[str, set[_Weight]] = {}
        for whose, other in (("model", "guide"), ("guide", "model")):
            handlers = sites[whose].get("weighed_by", ())
            if any(program == other for program, _ in handlers):
                raise ValueError(
                    f"latent site {name!r}: the {whose} has the {other}'s handler of TermWeights:"
                    " expected weights.model(model) and weights.guide(guide)"
                )
            by[whose] = {weight for _, weight in handlers}
        for whose, other in (("model", "guide"), ("guide", "model")):
            if by[whose] > by[other]:
                raise ValueError(
                    f"latent site {name!r}: the {whose}'s KL is weighted and the {other}'s is not:"
                    " expected weights.model(model) and weights.guide(guide)"
                )
        if by["model"] != by["guide"]:
            raise ValueError(
                f"latent site {name!r} is weighted by one TermWeights in the model and by another"
                " in the guide: expected weights.model(model) and weights.guide(guide) of one"
            )


def warmup(steps: int) -> Callable[[int], float]:
    """A weight that rises linearly from 1/steps to 1 over the first `steps` steps.

    Raises:
        TypeError: steps that are not a whole number.
        ValueError: fewer than one step.

    Example:
        >>> weight = warmup(100)
        >>> weight(0), weight(49), weight(500)
        (0.01, 0.5, 1.0)
    """
    _check_steps("step of warm-up", steps)
    return lambda step: min(1.0, (step + 1) / steps)


def cyclical(period: int, *, ratio: float = 0.5) -> Callable[[int], float]:
    r"""A weight that rises linearly from 0 to 1 in every period, and stays at 1 for its rest.

    .. math:: w(t) = \min\left(1, \frac{t \bmod T}{R T}\right)

    Args:
        period: The steps of a period (T).
        ratio: The share of a period in which the weight rises (R).

    Raises:
        TypeError: A period that is not a whole number, or a ratio that is no number.
        ValueError: Fewer than one step, or a ratio that is not above 0 and at most 1.

    References:
        Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing (arXiv:1903.10145)

    Example:
        >>> weight = cyclical(8)
        >>> [weight(step) for step in range(10)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.0, 0.25]
    """
    _check_steps("step in a period", period)
    if not _is_number(ratio):
        raise TypeError(f"expected a number as ratio, got {ratio!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"expected a ratio above 0 and at most 1, got {ratio}")
    return lambda step: min(1.0, (step % period) / (ratio * period))


def check_weight(weight: object, name: str = "KL") -> float:
    """The weight as a float; raises ValueError unless it is a finite number of at least 0."""
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise ValueError(
            f"a {name} weight is not trained: expected a number, got a tensor that requires a"
            " gradient; give its value (weight.item())"
        )
    one = isinstance(weight, Tensor) and weight.numel() == 1
    if _is_number(weight.item() if one else weight):  # type: ignore[attr-defined]
        value = float(weight)  # type: ignore[arg-type]
        if 0 <= value < math.inf:
            return value
    raise ValueError(f"expected a finite {name} weight of at least 0, got {weight!r}")


def _is_number(value: object) -> bool:
    """Whether it is a real number, NumPy's included, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_steps(what: str, steps: object) -> None:
    if not isinstance(steps, Integral) or isinstance(steps, bool):
        raise TypeError(f"expected a whole number, at least one {what}, got {steps!r}")
    if steps < 1:
        raise ValueError(f"expected at least one {what}, got {steps}")
