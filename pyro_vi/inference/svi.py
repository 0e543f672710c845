"""A drop-in for Pyro's SVI.

`SVI` is a subclass of `pyro.infer.SVI` with the same arguments. It trains in place and writes the
parameter store. It evaluates Pyro's ELBOs with the corrections in `elbo.py`, and works under
`module_local_params` too. An eager step evaluates (`_evaluate`), then updates (`_update`);
`pyro_vi.compiling` records both.
"""

from __future__ import annotations

__all__ = ["SVI", "is_recordable"]

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import pyro
from pyro.infer import ELBO
from pyro.infer.util import torch_item, zero_grads
from pyro.nn import PyroModule
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_nan
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pyro_vi.compiling import Compiler
from pyro_vi.inference.elbo import ElboTerms, with_terms
from pyro_vi.process_state import process_lock
from pyro_vi.programs import SubsampleCheck, own_memory


class SVI(pyro.infer.SVI):
    """Stochastic variational inference, as `pyro.infer.SVI`.

    Where Pyro's loss is not a bound, this class returns the corrected loss or raises an error; the
    header of `pyro_vi/inference/elbo.py` lists these cases.

    Args:
        model: the model, a callable with Pyro statements.
        guide: the guide, a callable of the same arguments.
        optim: a Pyro optimizer.
        loss: one of Pyro's ELBOs, or a loss function of (model, guide, *args, **kwargs).
        loss_and_grads: for a loss function, what computes its gradients too.
        compile: whether steps are compiled (`pyro_vi.compiling`), after four eager ones. A step
            that cannot be compiled stays eager, with a warning that says why. The contract:

                A compiled step reads tensors anew: parameters, buffers, the batch, and every
                tensor that the programs hold. Python values are constants of the record, and what
                Python does besides computing happens while it is recorded.

            A change of modules, the parameter store, the loss or the optimizer drops the compiled
            step, with a warning; after a change of anything else call `recompile`.

    Attributes:
        compiled_steps: how many steps so far were compiled ones.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.7))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        >>> _ = [svi.step(torch.tensor(2.0)) for _ in range(100)]
        >>> abs(pyro.param("loc").item() - 1.0) < 0.5
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: ELBO | Callable[..., Any],
        loss_and_grads: Callable[..., Any] | None = None,
        *,
        compile: bool = False,
        **kwargs: Any,
    ) -> None:
        if not callable(loss) or isinstance(loss, type):
            raise TypeError(
                "expected one of Pyro's ELBOs as loss, such as Trace_ELBO(), or a function of"
                f" (model, guide, *args, **kwargs), got {loss!r}"
            )
        evaluated = with_terms(loss) if isinstance(loss, ELBO) else loss
        # A Jit ELBO keeps what it was given first, and must be given the model itself.
        self._is_elbo = isinstance(loss, ELBO) and not type(loss).__name__.startswith("Jit")
        self.elbo_terms: ElboTerms | None = evaluated if isinstance(evaluated, ElboTerms) else None
        super().__init__(model, guide, optim, evaluated, loss_and_grads, **kwargs)
        self.compiled_steps = 0
        self._has_stepped = False
        self._parameters: list[Tensor] = []
        self._compiler: Compiler | None = None
        if not isinstance(compile, bool):
            raise ValueError(f"expected compile to be True or False, got {compile!r}")
        if compile and is_recordable(evaluated):
            self._compiler = Compiler(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose steps are recorded anew."""
        self.__dict__.update(state)
        if self._compiler is not None and self._compiler.svi is not self:
            self._compiler = copy(self._compiler)
            self._compiler.svi = self

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One gradient step; returns the loss. Steps in several threads wait for one another."""
        with process_lock:
            return self._step(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        compiler = self._compiler
        if compiler is None:
            loss, parameters = self._evaluated(args, kwargs)
            self._update(parameters)
        else:
            if (found := compiler.find(args, kwargs)) is not None:
                compiled, batch = found
                states = compiled.states()
                try:
                    loss, *_, sound = compiled.run(batch)
                except Exception:  # of an operation; an eager step says which
                    sound = False
                if sound:
                    compiled.advance_schedule()
                    compiled.finish()
                    self.compiled_steps += 1
                    return warn_if_nan(loss, "loss") if loss != loss else loss
                compiled.rewind(states)
                compiler.was_unsound()
            loss = compiler.take(args, kwargs)
        if isinstance(loss, tuple):
            return type(loss)(map(torch_item, loss))
        return torch_item(loss)

    def explain(self) -> str:
        """Whether steps are compiled, since when, by what; or why not."""
        if self._compiler is None:
            return "steps are eager: compile=False, or a loss that is not recorded"
        return self._compiler.explain()

    def recompile(self) -> None:
        """Drops the compiled steps, after a change that they do not see; records anew."""
        if self._compiler is not None:
            self._compiler.forget()

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss without a step; as `pyro.infer.SVI`."""
        with process_lock:
            if self.elbo_terms is not None:
                self.elbo_terms.reset()
            return super().evaluate_loss(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        """The loss, and the unconstrained parameters that the programs used, with gradients."""
        if self.elbo_terms is not None:
            self.elbo_terms.reset()
        indices = None if self._has_stepped or not self._is_elbo else SubsampleCheck()
        model = self.model if indices is None else indices(self.model)
        with _Parameters() as seen:
            loss = self.loss_and_grads(model, self.guide, *args, **kwargs)
        used = seen.live()
        names = pyro.get_param_store()._param_to_name  # optimizers ask for names
        for parameter, name in used.items():
            names.setdefault(parameter, name)
        if not self._has_stepped:
            self._has_stepped = True
            own_memory(used)
            for program in (self.model, self.guide):
                _warn_of_shared_names(program, used)
            if indices is not None and (problem := indices.problem()):
                warnings.warn(problem, stacklevel=4)
        return loss, list(used)

    def _evaluated(self, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
        """`_evaluate` of an eager step; remembers the parameters."""
        loss, self._parameters = self._evaluate(*args, **kwargs)
        return loss, self._parameters

    def _update(self, parameters: Sequence[Tensor]) -> None:
        self.optim(parameters)
        zero_grads(parameters)

    # What a recorded step has besides evaluation and update; `pyro_vi.inference` has more.

    _scale = 1.0  # of the gradients
    _has_fixed_batch = False  # whether all steps have the same batch

    @property
    def _varying(self) -> Sequence[Tensor]:
        """Tensors that change between steps, besides parameters, buffers and the batch."""
        return ()

    def _check(self, loss: float, parameters: Sequence[Tensor]) -> None:
        """Raises an error instead of the update."""

    def _after_update(self) -> None:
        """What tensors do after the update."""

    @property
    def _scheduler(self) -> LRScheduler | None:
        return getattr(self.optim, "scheduler", None)

    def _advance_schedule(self) -> None:
        if (scheduler := self._scheduler) is not None:
            scheduler.step()

    def _schedule_state(self) -> Any:
        if (scheduler := self._scheduler) is None:
            return None
        rates = [group["lr"] for group in scheduler.optimizer.param_groups]
        return dict(scheduler.state_dict()), rates

    def _load_schedule(self, state: Any) -> None:
        if (scheduler := self._scheduler) is not None:
            scheduler.load_state_dict(state[0])
            for group, rate in zip(scheduler.optimizer.param_groups, state[1], strict=True):
                group["lr"] = rate

    def _copies(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Tensors, and where their values from before the last step are kept."""
        return ()

    def _scheduled(self) -> Sequence[Tensor]:
        """Numbers that are set before each step."""
        return ()


def is_recordable(loss: object) -> bool:
    """Whether the steps of a loss can be compiled; warns if not."""
    if not isinstance(loss, ElboTerms):
        name = getattr(loss, "__name__", type(loss).__name__)
        warnings.warn(f"steps stay eager: those of {name} are not recorded", stacklevel=3)
    return isinstance(loss, ElboTerms)


def _warn_of_shared_names(program: object, used: Mapping[Tensor, str]) -> None:
    """Warns of a PyroModule's parameters that have gradients, and that nothing trains."""
    if not isinstance(program, PyroModule):
        return
    stored = pyro.get_param_store()._params
    names = {name.replace("$$$", "."): p for name, p in stored.items()}
    trained = [(name, p) for name, p in program.named_parameters() if p.requires_grad]
    met = [(n, p) for n, p in trained if p.grad is not None and names.get(n, p) is not p]
    if lost := [name for name, p in met if p not in used]:
        warnings.warn(
            f"{type(program).__name__}: {lost[0]!r} (and {len(lost) - 1} others) are not trained,"
            " because Pyro's store has other parameters of these names, such as the other"
            " program's. Keep them apart with pyro.settings.set(module_local_params=True) before"
            " the modules are made, as pyro_vi.fit does",
            stacklevel=5,
        )


class _Parameters(Messenger):
    """Collects the unconstrained parameters that a run uses, in order, each once.

    By identity: under `module_local_params` a model's and a guide's parameter may share a name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[Tensor, str] = {}

    def live(self) -> dict[Tensor, str]:
        """Those, without what a module has replaced by another in its first run."""
        last = {name: parameter for parameter, name in self.names.items()}
        return {
            parameter: name
            for parameter, name in self.names.items()
            if last[name] is parameter or parameter.grad is not None
        }

    def _pyro_post_param(self, msg: Any) -> None:
        # A module's own parameter (module_local_params) is its own unconstrained value.
        value = msg["value"]
        parameter = value.unconstrained() if hasattr(value, "unconstrained") else value
        if parameter.requires_grad:
            self.names.setdefault(parameter, msg["name"])
