"""fit(): batches + SVI + progress -> Fit.

    1/N ELBO(theta, phi) = 1/N E_q[ log p(x, z) - log q(z | x) ]

is maximised with Pyro's SVI over the parameters of model and guide, in nats per data point. The
programs that come in stay as they are: training happens on a private copy of their state
(`pyro_vi.programs`), to which the fitted programs are bound.
"""

from __future__ import annotations

__all__ = ["NonFiniteError", "fit"]

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pyro.poutine as poutine
import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from pyro_vi.checks import check_count, check_seed, checked_device
from pyro_vi.inference.averaging import Average, check_decay
from pyro_vi.inference.elbo import with_terms
from pyro_vi.inference.fitted import Fit
from pyro_vi.inference.interrupts import interruptible
from pyro_vi.inference.laplace import check_mode, gaussian_at_mode
from pyro_vi.inference.nonfinite import (
    LastGood,
    NonFiniteError,
    describe_constraint_error,
    is_support_error,
)
from pyro_vi.inference.per_data_point import PerDataPoint
from pyro_vi.inference.restarts import best_of, disagreement, perturb
from pyro_vi.inference.svi import SVI, is_recordable
from pyro_vi.inference.trainer import Scaling, SVITrainer, Terms
from pyro_vi.optimizers import OneOptimizer
from pyro_vi.process_state import seeded
from pyro_vi.programs import (
    Arguments,
    Batches,
    Data,
    PlateSizes,
    Program,
    RowIndependence,
    State,
    Structure,
    check_observes,
    own_memory,
    reachable,
)
from pyro_vi.weighting import ScheduleError, TermWeights

log = logging.getLogger(__name__)

_FEW = 300  # steps that pay for half a second of compilation
_MANY = 5_000  # and for many seconds


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Data,
    *,
    loss: ELBO | None = None,
    optim: PyroOptim | Callable[[Iterable[Tensor]], Optimizer] | None = None,
    steps: int = 1_000,
    batch_size: int | None = None,
    transform: Callable[[Any], Any] | None = None,
    kl_weight: float | Callable[[int], float] = 1.0,
    reconstruction_weight: float | Callable[[int], float] = 1.0,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    average: float | None = None,
    heldout: Data | None = None,
    heldout_every: int = 100,
    patience: int | None = None,
    plate: str = "data",
    seed: int = 0,
    restarts: int = 1,
    prior_only: bool = False,
    device: str | torch.device | None = None,
    compile: bool | Literal["auto"] = "auto",
    progress: bool | str = True,
) -> Fit:
    """Fits a guide, and the model's parameters, to data by stochastic variational inference.

    Args:
        model: a Pyro program: a PyroModule, or a function with `pyro.param` or `pyro.module`. A
            fitted model (`Fit.model`) is frozen: then the guide alone is trained.
        guide: a callable of the same arguments that samples the model's latent sites; autoguides
            too. `AutoLaplaceApproximation` is trained to the mode, and the fit's guide is then the
            Gaussian there (`pyro_vi.inference`), an `AutoMultivariateNormal`.
        data: a tensor (`model(data)`), a tuple (`model(*data)`) or a dict (`model(**data)`).
        loss: one of Pyro's ELBOs, not a Jit one; `Trace_ELBO()` by default.
        optim: a Pyro optimizer, or a callable that makes a torch optimizer from parameters;
            `partial(torch.optim.Adam, lr=1e-3)` by default. Gradients are in nats per data point,
            so that options with a scale, such as a weight decay or a norm to clip at, are too: N
            times smaller than for Pyro's sum over N data points. A Pyro scheduler is stepped after
            every step.
        steps: gradient steps; 0 binds the programs as they are, such as a chain of a fitted
            diffusion, so that they have a posterior.
        batch_size: rows of a minibatch along the first axis (B); sites inside the plate then weigh
            1/B and all others 1/N. None passes the data as they are.
        transform: applied to each batch, such as `pyro_vi.data.binarize`.
        kl_weight, reconstruction_weight: weights on the bound's two terms, at least 0: numbers, or
            functions of the step such as `pyro_vi.weighting.warmup(1_000)` and `cyclical(1_000)`.
            What they weigh is said at `pyro_vi.weighting.TermWeights`.
        schedule: torch optimizer -> learning-rate scheduler, stepped after every step.
        clip_norm: the largest global norm of the gradient.
        average: the decay of an exponential moving average of the parameters, such as 0.999, which
            is what the held-out bounds are of and the fit ends with (`pyro_vi.inference`), unless
            it breaks off; None for the parameters themselves.
        heldout: data for the bound on held-out data while training, every `heldout_every` steps
            and at the end, with `eval()` modules and weights of 1. Latents must be local.
        heldout_every: steps between evaluations.
        patience: stop after this many evaluations without a better held-out bound, and keep the
            best parameters. Needs `heldout`.
        plate: the name of the plate over data points; without one, "a data point" in losses and
            bounds is all that a call of the model observes.
        seed: of torch's generators, inside this call alone.
        restarts: fits from that many initial values, at least 1; the best is returned, and all are
            its `restarts`. The first is the fit without restarts; the one after r others has seed
            `seed + r`, and perturbed initial values (`pyro_vi.inference.perturb`). The best has the
            highest held-out bound of what is kept or, without `heldout`, the highest mean bound
            over the last tenth of its steps. A restart that raises NonFiniteError is skipped
            with a warning. Restarts that disagree, by the rule in `pyro_vi.inference`, are
            warned of.
        prior_only: allows a model that observes nothing, whose posterior is its prior. Otherwise
            such a model raises an error, because usually its data were not passed.
        device: where to compute; by default where the data are.
        compile: whether steps are compiled (`pyro_vi.compiling`): False, True, or "auto". Both
            begin after four eager steps. "auto" compiles small steps, which takes half a second,
            if there are 300 or more; and steps that need TorchInductor, which takes seconds to
            minutes, if there are 5,000 or more. A step that cannot be compiled stays eager; it is
            warned of with True, and with "auto" from 5,000 steps on. `Fit.compiled` says why.
        progress: whether to show a progress bar with the current bound; a string labels it.

    Ctrl-C stops training after the current step, and the fit so far is returned. A second Ctrl-C
    raises KeyboardInterrupt at once. Fits in several threads wait for one another; what `fit` calls
    (a transform, say) must not wait for another thread that uses a fit.

    Returns:
        The fit: programs bound to their trained parameters, losses (in nats per data point, the
        negative bounds unless they are weighted), reconstruction and KL apart and unweighted, time.

    Raises:
        NonFiniteError: a loss or gradient that is not finite, or a parameter or a value that left
            its constraint; names the step and the site, and carries the fit with the parameters of
            the last step whose loss was finite. With restarts, only if all fail: the error of
            the first.
        ValueError, TypeError: arguments or programs that do not fit together; see the message.
            A schedule that gives no weight is named with its step.

    Warns:
        UserWarning: training was interrupted; restarts disagree or were skipped; gradients of
            minibatches are biased.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoDiagonalNormal
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> x = 3 + torch.randn(50)
        >>> fitted = fit(model, AutoDiagonalNormal(model), x, steps=20, progress=False)
        >>> fitted.losses.shape
        torch.Size([20])
    """
    check_count("restart", restarts)
    once = partial(
        _fit_once,
        model,
        guide,
        data,
        loss=loss,
        optim=optim,
        steps=steps,
        batch_size=batch_size,
        transform=transform,
        kl_weight=kl_weight,
        reconstruction_weight=reconstruction_weight,
        schedule=schedule,
        clip_norm=clip_norm,
        average=average,
        heldout=heldout,
        heldout_every=heldout_every,
        patience=patience,
        plate=plate,
        seed=seed,
        prior_only=prior_only,
        device=device,
        compile=compile,
    )
    fits: list[Fit] = []
    failed: dict[str, NonFiniteError] = {}
    with interruptible() as interruption:
        for restart in range(restarts):
            if interruption.requested and fits:
                break
            name = f"restart {restart + 1} of {restarts}"
            label = f"{progress}, {name}" if isinstance(progress, str) and progress else name
            try:
                fits.append(
                    once(restart=restart, progress=progress and label if restarts > 1 else progress)
                )
            except NonFiniteError as error:
                failed[name] = error
    if not fits:
        raise next(iter(failed.values()))
    completed = [fit for fit in fits if not fit.interrupted]
    if len(completed) + len(failed) < restarts:
        in_restart = f" of restart {len(fits) + len(failed)} of {restarts}" if restarts > 1 else ""
        returned = "the fit so far" if not completed else f"the best of {len(completed)} completed"
        warnings.warn(
            f"interrupted after {len(fits[-1].losses):,} of {steps:,} steps{in_restart}:"
            f" {returned} is returned",
            stacklevel=2,
        )
    if restarts == 1:
        return fits[0]
    for name, reason in failed.items():
        warnings.warn(f"{name} is skipped: {reason}", stacklevel=2)
    if message := disagreement(completed or fits):
        warnings.warn(message, stacklevel=2)
    return best_of(completed or fits, stopped_early=patience is not None)


def _fit_once(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Data,
    *,
    loss: ELBO | None,
    optim: PyroOptim | Callable[[Iterable[Tensor]], Optimizer] | None,
    steps: int,
    batch_size: int | None,
    transform: Callable[[Any], Any] | None,
    kl_weight: float | Callable[[int], float],
    reconstruction_weight: float | Callable[[int], float],
    schedule: Callable[[Optimizer], LRScheduler] | None,
    clip_norm: float | None,
    average: float | None,
    heldout: Data | None,
    heldout_every: int,
    patience: int | None,
    plate: str,
    seed: int,
    restart: int,
    prior_only: bool,
    device: str | torch.device | None,
    compile: bool | Literal["auto"],
    progress: bool | str,
) -> Fit:
    """The fit after `restart` others; held-out bounds have the same noise in all of them."""
    loss = Trace_ELBO() if loss is None else copy(loss)  # some remember the programs' plates
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(f"expected a callable as {name}, got {program!r}")
    check_decay(average)
    _check_arguments(loss, steps, heldout, heldout_every, patience, clip_norm, seed)
    if compile is not True and compile is not False and compile != "auto":
        raise ValueError(f"expected compile to be True, False or 'auto', got {compile!r}")
    compiles = compile is True and is_recordable(with_terms(loss))
    compiles = compiles or (compile == "auto" and steps >= _FEW)
    where = checked_device(device)
    batches = Batches(data, batch_size=batch_size, transform=transform, device=where)
    optimizer = _optimizer(optim, schedule, clip_norm)
    weights = TermWeights(
        reconstruction=reconstruction_weight, kl=kl_weight, device=batches.device or where
    )
    state = State({"model": model, "guide": guide}, device=where)
    with (
        interruptible() as interruption,
        seeded(seed + restart, where),
        state.installed(),
        warnings.catch_warnings(),
    ):
        # Pyro warns of NaN and goes on; here a NaN is an error, raised below.
        warnings.filterwarnings("ignore", message="Encountered")
        # Pyro also warns of observed sites in the guide; they are left out of log q here.
        warnings.filterwarnings("ignore", message="Found non-auxiliary vars in guide")
        structure = _inspect(model, guide, batches, loss, state, plate, prior_only)
        check_mode(guide, structure, weights)
        if loss.vectorize_particles and math.isinf(loss.max_plate_nesting):
            # Pyro would run the programs to guess it; the particles take a dimension too.
            loss.max_plate_nesting = structure.nesting + (loss.num_particles > 1)
        if restart:
            perturb(state, model, guide)
        evaluate = _Heldout(model, guide, loss, heldout, batches, structure, state, seed)
        scaling = Scaling(model, guide, loss, structure, weights)
        bar = tqdm(
            total=steps,
            desc=progress if isinstance(progress, str) else None,
            disable=not progress,
            unit="step",
        )
        mean = Average(state.parameters(), decay=average) if average is not None else None
        history = _History()
        good = LastGood(state.tensors().values())
        engine = SVITrainer(
            scaling,
            optimizer,
            loss,
            batches.shuffled(seed + restart),
            good=good,
            tensors=list(state.tensors().values()),
            compiles=compiles,
            waits=compile is True or steps >= _MANY,
            average=mean,
            announce=lambda: bar.set_postfix_str("compiling the step"),
        )
        result = partial(_result, model, guide, state, history, structure, batches, engine)
        guard = partial(_guarded, model, guide, plate, engine, good, history, result)
        best, waited = math.inf, 0
        kept: dict[str, Tensor] | None = None
        with bar:
            while engine.taken < steps and not interruption.requested:
                step = engine.taken
                limit = steps - step
                if evaluate.wanted:
                    limit = min(limit, heldout_every - step % heldout_every)
                started = time.perf_counter()
                with guard():
                    taken = engine.take(limit)
                    history.add(engine.read())
                history.seconds += time.perf_counter() - started
                bar.update(taken)
                bar.set_postfix_str(f"bound {history.recent:.2f} nats", refresh=False)
                step = engine.taken
                if evaluate.wanted and (step % heldout_every == 0 or step == steps):
                    averaged = mean.installed() if mean is not None else nullcontext()
                    with guard("in the held-out bound"), averaged:
                        bound = evaluate()
                        history.heldout.append((step, bound))
                        if -bound < best:
                            best, waited = -bound, 0
                            kept = state.snapshot() if patience is not None else None
                        else:
                            waited += 1
                    if patience is not None and waited >= patience:
                        log.info("stopped at step %d: no better held-out bound", step)
                        break
        if kept is not None:
            state.restore(kept)
        elif mean is not None:
            mean.install()
        if history.losses:
            engine.batch = args, kwargs = batches.first()
            with guard("with the last parameters"), torch.no_grad():
                last = Structure.of(model, guide, args, kwargs, plate=plate)
                last.guide_trace.compute_log_prob()
                last.model_trace.compute_log_prob()
        cut_short = interruption.requested and len(history.losses) < steps
        fitted = replace(result(), interrupted=cut_short)
        if isinstance(guide, AutoLaplaceApproximation):
            args, kwargs = Batches(data, transform=transform, device=where).whole()
            try:
                fitted = gaussian_at_mode(fitted, *args, **kwargs)
            except ValueError:
                if not fitted.interrupted:
                    raise  # else the mode was not reached: the fit keeps the point
    return fitted


@contextmanager
def _guarded(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    plate: str,
    engine: SVITrainer,
    good: LastGood,
    history: _History,
    result: Callable[[], Fit],
    where: str | None = None,
) -> Iterator[None]:
    """Turns what breaks training off into a NonFiniteError with the last good parameters.

    Args:
        where: what the programs ran for, in words; by default a step, and the last site it reached.

    Raises:
        NonFiniteError: a loss or gradient is not finite, or something left its constraint.
        Exception: the error as it was, with the step in a note, if it is of another kind, or the
            observed values of the batch are at fault.
    """
    try:
        yield
    except ScheduleError:
        raise  # it says at which step, and no site is at fault
    except (FloatingPointError, ValueError, RuntimeError) as error:
        if where is None:
            started = engine.last_site != "the start"
            where = f"after {engine.last_site}" if started else "before the first site"
        good.restore()
        history.add(engine.read())
        batch = engine.batch
        if isinstance(error, FloatingPointError):
            message: str | None = f"step {engine.taken}: {error}"
        elif is_support_error(error) and _data_outside_support(model, guide, batch, plate):
            message = None
        else:
            reason = describe_constraint_error(error, where)
            message = None if reason is None else f"step {engine.taken}, {reason}"
        if message is None:
            error.add_note(f"at step {engine.taken}, {where}")
            raise
        raise NonFiniteError(message, step=engine.taken, fit=result()) from error


def _data_outside_support(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Arguments,
    plate: str,
) -> bool:
    """Whether observed values of a batch are outside of their support."""
    args, kwargs = batch
    try:
        with torch.no_grad():
            structure = Structure.of(model, guide, args, kwargs, plate=plate)
            for name in structure.observed:
                site = structure.model_trace.nodes[name]
                site["fn"].log_prob(site["value"])
    except ValueError as error:
        return is_support_error(error)
    return False


class _History:
    """What is kept of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.reconstruction: list[float] = []
        self.kl: list[float] = []
        self.weights: list[tuple[float, float]] = []
        self.heldout: list[tuple[int, float]] = []
        self.seconds = 0.0
        self.recent = math.nan  # the bound, smoothed over about twenty steps

    def add(self, steps: Sequence[Terms]) -> None:
        for step in steps:
            smoothed = 0.95 * self.recent - 0.05 * step.loss
            self.recent = -step.loss if math.isnan(self.recent) else smoothed
        self.losses += [step.loss for step in steps]
        self.reconstruction += [step.reconstruction for step in steps]
        self.kl += [step.kl for step in steps]
        self.weights += [step.weights for step in steps]


class _Heldout:
    """The bound on held-out data, in nats per data point, with the same noise every time."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        loss: ELBO,
        data: Data | None,
        training: Batches,
        structure: Structure,
        state: State,
        seed: int,
    ) -> None:
        self.wanted = data is not None
        if data is None:
            return
        if not structure.is_local:
            raise ValueError(
                "the bound on held-out data needs every site inside plate"
                f" {structure.plate!r}: with a global latent, q(theta | training data) bounds"
                " nothing on other data"
            )
        device = training.device
        whole = Batches(data, device=device)
        rows = len(next(iter(whole.tensors().values()), ()))
        size = None if training.batch_size is None else max(1, min(training.batch_size, rows))
        self._batches = Batches(data, batch_size=size, transform=training.transform, device=device)
        structure.check_amortized(guide)
        self._sizes = PlateSizes(structure.unsized)
        if structure.unsized:
            model, guide = self._sizes(model), self._sizes(guide)
        self._summed = isinstance(loss, RenyiELBO)  # the others are scaled to one data point
        if not self._summed:
            weights = PerDataPoint(structure.plate, total=1)  # every site is inside
            model, guide = weights(model), weights(guide)
        self._svi = SVI(model, guide, PyroOptim(torch.optim.SGD, {}), loss)
        self._plate, self._state, self._seed = structure.plate, state, seed

    def __call__(self) -> float:
        total, rows = 0.0, 0
        with seeded(self._seed), self._state.evaluating():
            for (args, kwargs), size in self._chunks():
                if self._plate in self._sizes.sizes:
                    self._sizes.sizes[self._plate] = size
                value = self._svi.evaluate_loss(*args, **kwargs)
                total -= value if self._summed else value * size
                rows += size
        return total / rows

    def _chunks(self) -> Iterable[tuple[tuple[tuple[Any, ...], dict[str, Any]], int]]:
        if self._batches.total is None or self._batches.batch_size is None:
            yield self._batches.whole(), self._rows()
            return
        every = torch.arange(self._batches.total, device=self._batches.device)
        for index in every.split(self._batches.batch_size):
            yield self._batches.rows(index), len(index)

    def _rows(self) -> int:
        return len(next(iter(self._batches.tensors().values())))


def _inspect(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batches: Batches,
    loss: ELBO,
    state: State,
    plate: str,
    prior_only: bool,
) -> Structure:
    """One run of the programs on the first rows: builds what is lazy, and checks the rest."""
    args, kwargs = batches.first()
    try:
        with torch.no_grad(), reachable():
            structure = Structure.of(
                model,
                guide,
                args,
                kwargs,
                plate=plate,
                batch_size=batches.batch_size,
                total=batches.total,
            )
    except NotImplementedError as error:
        reason = str(error).partition("\n")[0] or "a distribution has no sampler"
        raise ValueError(
            f"{reason}; an autoguide of a model with a flat prior needs values to begin from:"
            " init_loc_fn=pyro.infer.autoguide.init_to_value(values={...})"
        ) from error
    if structure.marginalized and with_terms(loss) is not loss:
        raise ValueError(
            f"the guide leaves {structure.marginalized} to enumeration, which"
            f" {type(loss).__name__} does not do: use TraceEnum_ELBO, or sample them in the guide"
        )
    runs_model = isinstance(poutine.unwrap(guide), Messenger)  # of which every ELBO knows
    if structure.shared and with_terms(loss) is loss and not runs_model:
        raise ValueError(
            f"the guide observes {list(structure.shared)} as the model does, and"
            f" {type(loss).__name__} counts them in log q: take them out of the guide, or use"
            " Trace_ELBO"
        )
    if batches.transform is None:
        batch: dict[Any, Any] = {**kwargs}
        batch.update(enumerate(args))
        structure.check_support(batch, batches.tensors())
    check_observes(structure, prior_only)
    own_memory(state.tensors().values())
    state.check_registered()
    names = structure.plate_names
    if plate != "data" and plate not in names:
        raise ValueError(f"there is no plate {plate!r} in the programs, which have {sorted(names)}")
    return structure


def _result(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    state: State,
    history: _History,
    structure: Structure,
    batches: Batches,
    engine: SVITrainer,
) -> Fit:
    trained = sum(tensor.numel() for tensor in structure.parameters)
    trains_model = structure.trains_model  # asked before gradients are turned off
    state.freeze()
    with state.undone():  # a guide may keep what it made for some rows
        rows = RowIndependence.of(structure, model, guide, batches.first())
    split = batches.batch_size is not None and batches.batch_size != batches.total
    if not rows.amortized and (split or history.heldout):
        warnings.warn(
            "the programs give some data points other densities by themselves than among the rest"
            " of their batch (a parameter for each row, a normalisation over the batch, or shared"
            " latents whose guide reads the data): minibatches and held-out bounds are biased",
            stacklevel=4,
        )
    return Fit(
        model=Program(model, state, "model"),
        guide=Program(guide, state, "guide"),
        losses=torch.tensor(history.losses, dtype=torch.float64),
        reconstruction=torch.tensor(history.reconstruction, dtype=torch.float64),
        kl=torch.tensor(history.kl, dtype=torch.float64),
        weights=torch.tensor(history.weights, dtype=torch.float64).reshape(-1, 2),
        heldout=torch.tensor(history.heldout, dtype=torch.float64).reshape(-1, 2),
        seconds=history.seconds,
        parameters=trained,
        model_is_trained=trains_model,
        amortized=rows.amortized,
        plate=structure.plate,
        plates={
            name: structure.total if name == structure.plate else size
            for name, size in structure.plates.items()
        },
        local=rows.local,
        rows=rows.rows,
        fingerprint=None if rows.local or batches.transform else batches.fingerprint(),
        template=batches.head(2),
        compiled=engine.explain(),
    )


def _check_arguments(
    loss: object,
    steps: int,
    heldout: Data | None,
    heldout_every: int,
    patience: int | None,
    clip_norm: float | None,
    seed: int,
) -> None:
    if not isinstance(loss, ELBO):
        raise TypeError(f"expected one of Pyro's ELBOs as loss, such as Trace_ELBO(), got {loss!r}")
    if type(loss).__name__.startswith("Jit"):
        raise TypeError(
            f"{type(loss).__name__} keeps the programs and scales of its first step: use"
            f" {type(loss).__name__.removeprefix('Jit')}"
        )
    if steps != 0:
        check_count("step", steps)
    if heldout_every < 1:
        raise ValueError(f"expected heldout_every of at least 1, got {heldout_every}")
    if patience is not None and (heldout is None or patience < 1):
        raise ValueError(
            f"early stopping needs held-out data and a patience of at least 1, got {patience}"
            f"{' without heldout' if heldout is None else ''}"
        )
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"expected a positive clip_norm, got {clip_norm}")
    check_seed(seed)


def _optimizer(
    optim: PyroOptim | Callable[[Iterable[Tensor]], Optimizer] | None,
    schedule: Callable[[Optimizer], LRScheduler] | None,
    clip_norm: float | None,
) -> PyroOptim:
    if isinstance(optim, PyroOptim):
        if schedule is not None or clip_norm is not None:
            raise ValueError(
                "schedule and clip_norm work on a torch optimizer: give"
                " optim=partial(torch.optim.Adam, lr=...), or a Pyro optimizer that schedules"
                " (pyro.optim.ExponentialLR) and clips (clip_args) by itself"
            )
        if "Plateau" in getattr(optim, "pt_scheduler_constructor", int).__name__:
            raise TypeError(
                "expected a schedule of the step alone; ReduceLROnPlateau needs a metric"
            )
        fresh = copy(optim)  # its state belongs to other parameters
        fresh.optim_objs, fresh.grad_clip = {}, {}
        fresh._state_waiting_to_be_consumed = dict(optim._state_waiting_to_be_consumed)
        return _Scheduled(fresh) if isinstance(fresh, PyroLRScheduler) else fresh
    if getattr(optim, "__module__", "").startswith("pyro.optim"):
        raise TypeError(
            "expected a Pyro optimizer made with its arguments, such as pyro.optim.Adam({'lr':"
            f" 1e-3}}), got {optim!r}"
        )
    if optim is not None and not callable(optim):
        raise TypeError(
            "expected a Pyro optimizer, or a callable that makes a torch optimizer from"
            f" parameters, got {type(optim).__name__}: a torch optimizer is bound to its"
            " parameters, so give functools.partial(torch.optim.Adam, lr=1e-3) instead"
        )
    return OneOptimizer(
        optim or partial(torch.optim.Adam, lr=1e-3), schedule=schedule, clip_norm=clip_norm
    )


class _Scheduled(PyroOptim):
    """A Pyro scheduler that is stepped after every update, as `schedule` is."""

    def __init__(self, scheduler: PyroLRScheduler) -> None:
        super().__init__(scheduler.pt_optim_constructor, {})
        self._scheduler = scheduler

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        self._scheduler(params, *args, **kwargs)
        self._scheduler.step()
