"""The trainer of fit(): SVI in nats per data point that refuses to step on a NaN.

Trace_ELBO and TraceMeanField_ELBO are sums over sites, which `PerDataPoint` and `TermWeights` scale
site by site. An importance-weighted bound is not: scaled sites inside its logarithm would bound
nothing, so that its mean over data points is taken outside.
"""

from __future__ import annotations

__all__ = ["SVITrainer", "Scaling"]

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, RenyiELBO
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils import _pytree as tree

from pyro_vi.compiling import Compiled, Compiler
from pyro_vi.inference.averaging import Average
from pyro_vi.inference.nonfinite import LastGood
from pyro_vi.inference.per_data_point import PerDataPoint
from pyro_vi.inference.svi import SVI
from pyro_vi.inference.training_state import Terms
from pyro_vi.programs import Arguments, PlateSizes, Shuffled, Structure
from pyro_vi.weighting import TermWeights

BLOCK = 50  # compiled steps of a call, after which losses are looked at


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


class SVITrainer(SVI):
    """SVI that refuses to step on a loss or a gradient that is not finite.

    `take` takes one or several steps, and `read` says what the steps since the last call found.

    Args:
        scaling: the programs.
        optim, loss: as of an SVI.
        source: gives the batches.
        compiles: whether steps are compiled.
        waits: whether also by a compiler that takes many seconds.
        tensors: every parameter and buffer of the programs.
        average: an average of the parameters, which every step updates.
        good: keeps the parameters of the last finite loss.
        announce: called before seconds of compilation.

    Attributes:
        taken: how many steps were good; when an error is raised, the number of the bad one.
    """

    def __init__(
        self,
        scaling: Scaling,
        optim: PyroOptim,
        loss: ELBO,
        source: Shuffled,
        *,
        good: LastGood,
        tensors: Sequence[Tensor],
        compiles: bool = False,
        waits: bool = True,
        average: Average | None = None,
        announce: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(scaling.model, scaling.guide, optim, loss, compile=False)
        self._scale, self._weights = scaling.outside, scaling.weights
        self._source, self._average, self._good = source, average, good
        self._tensors = list(tensors)
        self._has_fixed_batch = source.is_fixed
        self._last = _LastSite()
        self._terms = Terms()
        self._waiting: deque[Any] = deque()  # batches that were begun with and not used
        self.taken = 0
        self.batch: Arguments = ((), {})
        if compiles and self.elbo_terms is not None:
            self._compiler = Compiler(
                self, is_owner=True, waits=waits, steps=BLOCK, announce=announce
            )

    @property
    def last_site(self) -> str:
        """The site that the last eager step reached."""
        return self._last.name

    def read(self) -> Terms:
        """The terms of the steps since the last call, in order."""
        terms, self._terms = self._terms, Terms()
        return terms

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, the optimizer and its schedule, batches that wait, the last good values."""
        return {
            "taken": self.taken,
            "optimizer": deepcopy(self.optim.get_state()),
            "waiting": list(self._waiting),
            "good": self._good.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was called."""
        self.taken = state["taken"]
        self.optim.set_state(deepcopy(state["optimizer"]))
        self._waiting = deque(state["waiting"])
        self._good.load_state_dict(state["good"])

    def take(self, limit: int) -> int:
        """Takes at least one step, at most `limit`; returns how many.

        Raises:
            FloatingPointError: a loss or a gradient that is not finite.
        """
        compiler, taken = self._compiler, self.taken
        states = compiler.states() if compiler is not None else []
        first = self._next()
        args, kwargs = self._make(first)
        found = compiler.find(args, kwargs) if compiler is not None else None
        if found is None:
            self._take_eagerly(args, kwargs)
        else:
            self._take_block(found[0], states, first, limit)
        return self.taken - taken

    def _next(self) -> Any:
        return self._waiting.popleft() if self._waiting else self._source.next_rows()

    def _make(self, rows: Any) -> Arguments:
        self.batch = self._source.make(rows)
        return self.batch

    def _take_block(
        self, compiled: Compiled, states: Sequence[Tensor], first: Any, limit: int
    ) -> None:
        """Takes compiled steps. One that cannot stand is taken again, eagerly.

        Before that the random generators go back to where they were: the steps before it are drawn
        again or, if draws depend on the parameters, taken again from the beginning.

        Args:
            states: of the generators before the first batch was made.
            first: the rows of the first batch.
            limit: the most steps.
        """
        function, begun = compiled.function, [first]
        restore = None if function.draws_ahead else compiled.restorer(states)
        schedule = self._schedule_state()
        rows, weights = self._run(compiled, begun, min(limit, function.steps))
        good = next((i for i, row in enumerate(rows) if not (row[3] and row[4])), len(rows))
        if good < len(rows):
            if restore is not None:
                restore()
            compiled.rewind(states)
            self._load_schedule(schedule)
            if good:
                self._make(first)
                self._run(compiled, begun[:good], good, draws_alone=restore is None)
        compiled.finish(good)
        self.compiled_steps += good
        self._add(rows[:good], weights[:good])
        self.taken += good
        if good < len(rows):
            self._waiting.extendleft(reversed(begun[good + 1 :]))
            if not rows[good][4]:
                assert self._compiler is not None
                self._compiler.was_unsound()
            self._take_eagerly(*self._make(begun[good]))

    def _run(
        self, compiled: Compiled, begun: list[Any], steps: int, *, draws_alone: bool = False
    ) -> tuple[list[list[float]], list[tuple[float, float]]]:
        """Runs compiled steps, of which the first batch was made.

        Args:
            begun: the rows of the first batches; those of the others are appended.
            draws_alone: whether to draw the random numbers of these steps, and not to take them.

        Returns:
            The rows of `Compiled.status`, and the weights. A step that failed has zeros.
        """
        function, weights = compiled.function, [self._weigh(self.taken)]
        compiled.set_numbers(steps)
        compiled.status[:steps] = 0.0
        try:
            if self._is_still and function.can_draw_all:
                begun += begun[-1:] * (steps - len(begun))
                weights *= steps
                function.draw_all(steps)
            else:
                for i in range(steps):
                    if i and not self._begin_step(i, begun, weights):
                        break
                    self._fill(compiled, i)
                    function.step(i)
                    compiled.advance_schedule()
            function.finish(0 if draws_alone else len(begun))
        except Exception:  # of an operation; the eager step says which
            pass
        return compiled.status[: len(begun)].tolist(), weights

    def _begin_step(self, step: int, begun: list[Any], weights: list[tuple[float, float]]) -> bool:
        """Begins another step of a block; False if that fails, which the next block will meet."""
        rows = begun[step] if step < len(begun) else self._next()
        try:
            self._make(rows)
            weights.append(self._weigh(self.taken + step))
        except Exception:  # of a transform or a schedule
            self._waiting.appendleft(rows)
            return False
        if step == len(begun):
            begun.append(rows)
        return True

    @property
    def _is_still(self) -> bool:
        """Whether nothing but the noise and the optimizer's numbers differs between steps."""
        return self._has_fixed_batch and not self._scheduled() and self._scheduler is None

    def _fill(self, compiled: Compiled, step: int) -> None:
        """Gives a compiled step its batch and its numbers."""
        leaves = [] if self._has_fixed_batch else tree.tree_leaves(self.batch)
        compiled.fill(step, [one for one in leaves if isinstance(one, Tensor)])
        if self._scheduler is not None:
            compiled.set_rates(step)

    def _weigh(self, step: int) -> tuple[float, float]:
        """Begins a step: sets the weights of reconstruction and KL, and says what they are."""
        self._last.name = "the start"
        self._weights.at(step)
        if self._average is not None:
            self._average.at(step)
        return self._weights.reconstruction, self._weights.kl

    def _add(self, rows: Sequence[Sequence[float]], weights: Sequence[tuple[float, float]]) -> None:
        """Keeps the losses, reconstructions and KLs of some steps, the first three of each row."""
        terms, scale = self._terms, self._scale
        for values, i in ((terms.losses, 0), (terms.reconstruction, 1), (terms.kl, 2)):
            values += [row[i] * scale for row in rows]
        terms.weights += weights

    def _take_eagerly(self, args: Any, kwargs: Any) -> None:
        weights = self._weigh(self.taken)
        self._good.mark()
        if self._compiler is not None:
            loss = self._compiler.take(args, kwargs)
        else:
            loss, parameters = self._evaluated(args, kwargs)
            self._update(parameters)
        self._good.accept()
        known = (math.nan, math.nan) if self.elbo_terms is None else self.elbo_terms.terms(loss)
        self._add([[float(loss), float(known[0]), float(known[1])]], [weights])
        self.taken += 1

    def _evaluate(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        with self._last:
            return super()._evaluate(*args, **kwargs)

    def _evaluated(self, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
        loss, parameters = super()._evaluated(args, kwargs)
        self._check(loss, parameters)
        if self._scale != 1.0:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], self._scale)
        return loss, parameters

    def _check(self, loss: float, parameters: Sequence[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise TypeError(
                "nothing to train: no parameter that the model or the guide registers has a"
                " gradient. A fitted program is frozen; a plain function registers parameters with"
                " pyro.param, and modules with pyro.module"
            )
        if not math.isfinite(loss):
            named = self.elbo_terms.first_nonfinite() if self.elbo_terms is not None else None
            raise FloatingPointError(f"the loss is {loss}; {named or 'every site is finite'}")
        if not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
            raise FloatingPointError(f"the loss is {loss:g}, but {_first_bad(parameters)}")

    def _update(self, parameters: Sequence[Tensor]) -> None:
        super()._update(parameters)
        self._after_update()

    def _after_update(self) -> None:
        if self._average is not None:
            self._average.update()

    @property
    def _varying(self) -> Sequence[Tensor]:
        averages = self._average.tensors if self._average is not None else []
        return [*self._tensors, *averages, *self._scheduled()]

    def _scheduled(self) -> Sequence[Tensor]:
        weight = [self._average.weight] if self._average is not None else []
        return [*self._weights.tensors, *weight]

    def _copies(self) -> Sequence[tuple[Tensor, Tensor]]:
        return self._good.pairs()


def _first_bad(parameters: Iterable[Tensor]) -> str:
    store = pyro.get_param_store()
    for parameter in parameters:
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            name = store.param_name(parameter) or "a parameter"
            return f"the gradient of {name.replace('$$$', '.')!r} is not finite"
    return "the norm of the gradient is not finite"
