"""Weights of the steps of a diffusion in its bound.

Pictures look better when the steps of little noise, which the bound spends most on, weigh less:

    weighted = StepWeight(Simple(diffusion))
    fit(weighted(model), StepWeight(Simple(diffusion))(guide), ...)

What `fit` then reports, on held-out data too, is the weighted objective.
`pyro_vi.posterior.step_bound` of a program under it is still the bound.
"""

from __future__ import annotations

__all__ = ["Simple", "StepWeight", "Truncated"]

from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vi.diffusion.process import Diffusion


class StepWeight(Messenger):
    """Multiplies the terms of a time-sub-sampled bound by a weight of their step.

    The sites are those of `pyro_vi.models.DDPM` and `pyro_vi.guides.ForwardProcess`: "x_s" and
    "x_0", after "t". The prior's term keeps its weight of one.

    Args:
        weight: steps from 1 to T, any shape, to weights of that shape, at least 0.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def program():
        ...     pyro.sample("t", dist.Delta(torch.tensor(3)))
        ...     pyro.sample("x_s", dist.Normal(0.0, 1.0))
        >>> weighted = StepWeight(lambda t: 1.0 / t)(program)
        >>> float(pyro.poutine.trace(weighted).get_trace().nodes["x_s"]["scale"])
        0.3333333432674408
    """

    def __init__(self, weight: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if not callable(weight):
            raise TypeError(f"expected weights as a function of the steps, got {weight!r}")
        self._weight = weight
        self._t: Tensor | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in ("x_s", "x_0"):
            if self._t is None:
                raise ValueError(
                    f"expected a time-sub-sampled program, such as DDPM: site {msg['name']!r} comes"
                    " before any site 't'"
                )
            weight = torch.as_tensor(self._weight(self._t))
            if not bool((weight >= 0).all()):
                raise ValueError(f"expected weights of at least 0, got {float(weight.min()):g}")
            msg["scale"] = msg["scale"] * weight
            msg["weighted"] = weight
            if not msg["is_observed"]:
                msg["infer"] = {**msg["infer"], "weighted": weight}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == "x_s":
            theirs = msg["infer"].get("weighted")  # replay brings the guide's
            if theirs is None:
                raise ValueError(
                    "the model's steps are weighted and the guide's are not: StepWeight both"
                )
            if theirs is not msg["weighted"] and not torch.allclose(theirs, msg["weighted"]):
                raise ValueError("model and guide weigh the same steps differently")
        if msg["name"] == "t":
            self._t = msg["value"]
            theirs = msg["infer"].get("diffusion")
            if isinstance(self._weight, Simple) and theirs is not None:
                self._weight.check(theirs)

    def __exit__(self, *exception: Any) -> None:
        self._t = None
        super().__exit__(*exception)


class Simple:
    r"""DDPM's simple loss: every step's squared error of the noise alike.

    .. math:: w_t = \frac{1}{T} \frac{\mathrm{SNR}_t}{\mathrm{SNR}_{t-1} - \mathrm{SNR}_t}

    Under `SmallVariance` the terms of t > 1 are then an average over steps of
    :math:`\frac12 |\epsilon - \hat\epsilon|^2`. The reconstruction, at t = 1, where the ratio is
    0, has the weight of t = 2; one if there is one step alone.

    Args:
        diffusion: The forward process of model and guide.

    Raises:
        ValueError: Its schedule is trained: weighted, the bound's terms are no objective for it.

    References:
        Denoising Diffusion Probabilistic Models (arXiv:2006.11239), section 3.4

    Example:
        >>> from pyro_vi.diffusion import CosineSchedule
        >>> Simple(Diffusion((2,), CosineSchedule(4)))(torch.tensor([1, 2, 3, 4]))
        tensor([0.0535, 0.0535, 0.0522, 0.0002])
    """

    def __init__(self, diffusion: Diffusion) -> None:
        if not isinstance(diffusion, Diffusion):
            raise TypeError(f"expected the program's Diffusion, got {diffusion!r}")
        if any(parameter.requires_grad for parameter in diffusion.schedule.parameters()):
            raise ValueError(
                "weighted, the bound's terms are no objective for a schedule: take a fixed one, or"
                " freeze it (schedule.requires_grad_(False))"
            )
        self._diffusion = diffusion

    def check(self, signature: Tensor) -> None:
        """Raises ValueError unless a program's forward process is the weights' own."""
        mine = self._diffusion.signature()
        if mine.shape != signature.shape or not torch.allclose(mine, signature, atol=1e-5):
            raise ValueError("the weights are of another forward process than the program")

    def __call__(self, t: Tensor) -> Tensor:
        """Weights of steps from 1 to T, of the shape of t."""
        if self._diffusion.steps == 1:
            return torch.ones(t.shape, device=t.device)
        return self._weight(t.clamp(min=2))

    def _weight(self, t: Tensor) -> Tensor:
        schedule = self._diffusion.schedule
        with torch.no_grad():
            rise = schedule.gamma(t).double() - schedule.gamma(t - 1).double()
            return (1 / (self._diffusion.steps * torch.expm1(rise))).to(torch.get_default_dtype())


class Truncated(Simple):
    r"""The simple loss, with the squared error of x_0 where that weighs more: max(SNR, 1).

    .. math:: w_t = \frac{1}{T} \frac{\max(\mathrm{SNR}_t, 1)}{\mathrm{SNR}_{t-1} - \mathrm{SNR}_t}

    References:
        Progressive Distillation for Fast Sampling of Diffusion Models (arXiv:2202.00512)
    """

    def _weight(self, t: Tensor) -> Tensor:
        simple = super()._weight(t)
        with torch.no_grad():
            noise = self._diffusion.schedule.gamma(t).exp().clamp(min=1.0)
        return simple * noise.to(simple.dtype)
