"""The engine of fit(): SVI in nats per data point that refuses to step on a NaN.

Trace_ELBO and TraceMeanField_ELBO are sums over sites, which `PerDataPoint` and `KLWeight` scale
site by site. An importance-weighted bound is not: scaled sites inside its logarithm would bound
nothing, so that its mean over data points is taken outside.
"""

from __future__ import annotations

__all__ = ["Engine", "Scaling"]

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer import ELBO, RenyiELBO
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi.scaling import KLWeight, PerDataPoint, Structure
from pyro_vi.svi import SVI

if TYPE_CHECKING:
    from pyro_vi.compiled import Recorded


class Scaling:
    """The programs in nats per data point, and the factor that a bound of its own kind needs."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        loss: ELBO,
        structure: Structure,
        kl_weight: float | Callable[[int], float] = 1.0,
    ) -> None:
        self._kl, self.outside = (KLWeight(), KLWeight(guide=True)), 1.0
        self.model, self.guide = model, guide
        if isinstance(loss, RenyiELBO):
            # Scaled sites inside the logsumexp would be no bound: the mean is taken outside it.
            if callable(kl_weight) or kl_weight != 1.0:
                raise ValueError(
                    "an importance-weighted bound (RenyiELBO) has no KL to weight: use"
                    " Trace_ELBO with kl_weight, or kl_weight=1"
                )
            if structure.batch < structure.total and not structure.is_local:
                raise ValueError(
                    "an importance-weighted bound (RenyiELBO) of a minibatch needs every site"
                    f" inside plate {structure.plate!r}: with a site outside it bounds nothing;"
                    " use Trace_ELBO, or all data at once (batch_size=None)"
                )
            self.outside = 1 / structure.batch
            return
        weights = PerDataPoint(structure.plate, total=structure.total)
        self.model, self.guide = weights(self._kl[0](model)), weights(self._kl[1](guide))

    def weigh_kl(self, weight: float) -> None:
        """Sets the KL weight of the next step."""
        for handler in self._kl:
            handler.weight = weight


class _LastSite(Messenger):
    """Remembers the last sample site, so that an error between two sites can be placed."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "the start"

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.name = f"site {msg['name']!r}"


class Engine(SVI):
    """SVI that refuses to step on a loss or a gradient that is not finite."""

    def __init__(
        self,
        scaling: Scaling,
        optim: PyroOptim,
        loss: ELBO,
        *,
        compile_after: int | None = None,
        announce: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(scaling.model, scaling.guide, optim, loss, compile=False)
        self._outside = scaling.outside
        self._last = _LastSite()
        self._recorded: Recorded | None = None
        if compile_after is not None and self.told is not None:
            from pyro_vi.compiled import Recorder  # torch's tracing takes a while to import

            self._recorder = Recorder(
                self,
                after=compile_after,
                scale=self._outside,
                guard=True,
                own=True,
                announce=announce,
            )

    @property
    def last_site(self) -> str:
        """The site that the last step reached."""
        return self._last.name

    def step(self, *args: Any, **kwargs: Any) -> float:
        self._recorded = None
        if self._recorder is not None and (found := self._recorder.find(args, kwargs)) is not None:
            drawn = torch.get_rng_state()
            self._recorded, batch = found
            loss = self._recorded(batch).item()
            if self._recorded.finite and self._recorded.sound:
                return loss * self._outside
            torch.set_rng_state(drawn)  # and the step again, eagerly, to name the site
            self._recorded = None
        with self._last:
            loss, parameters = self._evaluate(*args, **kwargs)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise TypeError(
                "nothing to train: no parameter that the model or the guide registers has a"
                " gradient. A fitted program is frozen; a plain function registers parameters with"
                " pyro.param, and modules with pyro.module"
            )
        if not math.isfinite(loss):
            named = self.told.first_nonfinite() if self.told is not None else None
            raise FloatingPointError(f"the loss is {loss}; {named or 'every site is finite'}")
        if not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
            raise FloatingPointError(f"the loss is {loss:g}, but {_first_bad(parameters)}")
        if self._outside != 1.0:
            torch._foreach_mul_(gradients, self._outside)
        self._update(parameters)
        if self._recorder is not None:
            self._recorder.after_eager(parameters, args, kwargs)
        return loss * self._outside

    def terms(self, loss: float) -> tuple[float, float]:
        """Reconstruction and KL of the last step, in nats per data point."""
        if self.told is None:
            return math.nan, math.nan
        if (recorded := self._recorded) is not None:
            found = recorded.reconstruction, recorded.kl
            return float(found[0]) * self._outside, float(found[1]) * self._outside
        kl = self.told.kl(loss / self._outside)
        return self.told.reconstruction() * self._outside, kl * self._outside


def _first_bad(parameters: Iterable[Tensor]) -> str:
    store = pyro.get_param_store()
    for parameter in parameters:
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            name = store.param_name(parameter) or "a parameter"
            return f"the gradient of {name.replace('$$$', '.')!r} is not finite"
    return "the norm of the gradient is not finite"
