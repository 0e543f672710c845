"""The engine of fit(): SVI in nats per data point that refuses to step on a NaN.

Trace_ELBO and TraceMeanField_ELBO are sums over sites, which `PerDataPoint` and `TermWeights` scale
site by site. An importance-weighted bound is not: scaled sites inside its logarithm would bound
nothing, so that its mean over data points is taken outside.
"""

from __future__ import annotations

__all__ = ["Engine", "Scaling", "Terms"]

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import ELBO, RenyiELBO
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi.compiled import Recorded
from pyro_vi.recorder import Recorder
from pyro_vi.scaling import PerDataPoint, Structure
from pyro_vi.sites import PlateSizes
from pyro_vi.svi import SVI
from pyro_vi.weighting import TermWeights


class Scaling:
    """The programs in nats per data point, and the factor that a bound of its own kind needs."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        loss: ELBO,
        structure: Structure,
        weights: TermWeights,
    ) -> None:
        self.weights, self.outside = weights, 1.0
        if structure.unsized:
            sizes = PlateSizes(structure.unsized)
            model, guide = sizes(model), sizes(guide)
        self.model, self.guide = model, guide
        if isinstance(loss, RenyiELBO):
            # Scaled sites inside the logsumexp would be no bound: the mean is taken outside it.
            if not weights.plain:
                raise ValueError(
                    "an importance-weighted bound (RenyiELBO) has no KL to weight, and no"
                    " reconstruction: use Trace_ELBO, or kl_weight=1 and reconstruction_weight=1"
                )
            if structure.batch < structure.total and not structure.is_local:
                raise ValueError(
                    "an importance-weighted bound (RenyiELBO) of a minibatch needs every site"
                    f" inside plate {structure.plate!r}: with a site outside it bounds nothing;"
                    " use Trace_ELBO, or all data at once (batch_size=None)"
                )
            self.outside = 1 / structure.batch
            return
        # The weights are outermost, so that a site's scale without them is known.
        scaled = PerDataPoint(structure.plate, total=structure.total)
        self.model, self.guide = weights.model(scaled(model)), weights.guide(scaled(guide))


class _LastSite(Messenger):
    """Remembers the last sample site, so that an error between two sites can be placed."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "the start"

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.name = f"site {msg['name']!r}"


class Terms(NamedTuple):
    """What a step found, in nats per data point.

    Reconstruction and KL are as they are without their weights, which come last.
    """

    loss: float
    reconstruction: float
    kl: float
    weights: tuple[float, float]


@dataclass(frozen=True)
class _Unread:
    """A compiled step whose results nobody waited for, and what it takes to take it again."""

    recorded: Recorded
    status: Tensor
    weights: tuple[float, float]
    batch: tuple[tuple[Any, ...], dict[str, Any]]
    rewind: Callable[[], None]


class Engine(SVI):
    """SVI that refuses to step on a loss or a gradient that is not finite.

    `take` takes a step, and `read` says what the steps since the last call found.

    Args:
        scaling: the programs.
        optim, loss: as of an SVI.
        compile_after: eager steps before a compiled one; None for none.
        announce: called before a step is compiled.
        late: whether a compiled step does not wait for its results, so that a GPU never stands
            still. One that is not finite updates nothing then, and no step after it does, until it
            is read and taken again eagerly.

    Attributes:
        is_late: as given.
        taken: how many steps were good; when an error is raised, the number of the bad one.
    """

    def __init__(
        self,
        scaling: Scaling,
        optim: PyroOptim,
        loss: ELBO,
        *,
        compile_after: int | None = None,
        announce: Callable[[], object] | None = None,
        late: bool = False,
    ) -> None:
        super().__init__(scaling.model, scaling.guide, optim, loss, compile=False)
        self._outside, self._weights, self.is_late = scaling.outside, scaling.weights, late
        self._last = _LastSite()
        self._found: list[Terms] = []
        self._unread: list[_Unread] = []
        self.taken = 0
        if compile_after is not None:
            self._recorder = Recorder(
                self,
                after=compile_after,
                scale=self._outside,
                guard=True,
                announce=announce,
            )

    @property
    def last_site(self) -> str:
        """The site that the last eager step reached."""
        return self._last.name

    def take(self, *args: Any, **kwargs: Any) -> None:
        """Takes a step on a batch.

        Raises:
            FloatingPointError: a loss or a gradient that is not finite, of this step or of one that
                was not read.
        """
        found = self._recorder.find(args, kwargs) if self._recorder is not None else None
        if found is None:
            self._settle()
            self._take_eagerly(*args, **kwargs)
            return
        recorded, batch = found
        weights = self._weigh(self.taken + len(self._unread))
        rewind = recorded.rewinder()
        self._unread.append(_Unread(recorded, recorded(batch), weights, (args, kwargs), rewind))
        if self._waits_for(recorded):
            self._settle()
        else:
            recorded.finish()

    def read(self) -> list[Terms]:
        """What the steps since the last call found, in their order; raises as `take` does."""
        self._settle()
        found, self._found = self._found, []
        return found

    def _waits_for(self, recorded: Recorded) -> bool:
        return not (self.is_late and recorded.may_be_late)

    def _settle(self) -> None:
        """Reads the compiled steps; from one that updated nothing on, they are taken again."""
        while unread := self._unread:
            self._unread = []
            rows = torch.stack([step.status for step in unread]).tolist()
            for i, (step, row) in enumerate(zip(unread, rows, strict=True)):
                loss, reconstruction, kl, finite, sound = row
                if not (finite and sound):
                    if not sound and self._recorder is not None:
                        self._recorder.was_unsound()
                    self._take_again(unread[i:])
                    break
                if self._waits_for(step.recorded):
                    step.recorded.finish()
                self.compiled_steps += 1
                self._add(loss, reconstruction, kl, step.weights)

    def _take_again(self, steps: Sequence[_Unread]) -> None:
        """The first eagerly, which names the site if it is bad."""
        first, *others = steps
        first.rewind()
        args, kwargs = first.batch
        self._take_eagerly(*args, **kwargs)
        for step in others:
            args, kwargs = step.batch
            self.take(*args, **kwargs)

    def _weigh(self, step: int) -> tuple[float, float]:
        """Begins a step: sets the weights of reconstruction and KL, and says what they are."""
        self._last.name = "the start"
        self._weights.at(step)
        return self._weights.reconstruction, self._weights.kl

    def _add(
        self, loss: float, reconstruction: float, kl: float, weights: tuple[float, float]
    ) -> None:
        self.taken += 1
        outside = self._outside
        found = Terms(loss * outside, reconstruction * outside, kl * outside, weights)
        self._found.append(found)

    def _take_eagerly(self, *args: Any, **kwargs: Any) -> None:
        weights = self._weigh(self.taken)
        if self._recorder is not None:
            self._recorder.before(args, kwargs)
        with self._last, self._recorder.seen() if self._recorder is not None else nullcontext():
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
        if self._recorder is not None:
            self._recorder.evaluated(loss, parameters)
        self._update(parameters)
        if self._recorder is not None:
            self._recorder.after(args, kwargs, parameters)
        if self.told is None:
            self._add(loss, math.nan, math.nan, weights)
        else:
            reconstruction, kl = map(float, self.told.terms(loss))
            self._add(loss, reconstruction, kl, weights)


def _first_bad(parameters: Iterable[Tensor]) -> str:
    store = pyro.get_param_store()
    for parameter in parameters:
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            name = store.param_name(parameter) or "a parameter"
            return f"the gradient of {name.replace('$$$', '.')!r} is not finite"
    return "the norm of the gradient is not finite"
