"""fit(): the training of a model and a guide on data.

    1/N ELBO(theta, phi) = 1/N E_q[ log p(x, z) - log q(z | x) ]

is maximised with Pyro's SVI over the parameters of model and guide, in nats per data point. The
programs that come in stay as they are: training happens on a private copy of their state
(`pyro_vi.programs.State`), to which the fitted programs are bound.

A fit has three parts: `_set_up` makes what training needs, `_train` is the loop, and `_result`
makes the `Fit`.
"""

from __future__ import annotations

__all__ = ["NonFiniteError", "fit"]

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyro.poutine as poutine
import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vi.inference.averaging import Average
from pyro_vi.inference.callbacks import Callback, HeldoutBound, Patience, ProgressBar
from pyro_vi.inference.elbo import with_terms
from pyro_vi.inference.fitted import Fit
from pyro_vi.inference.heldout import Heldout
from pyro_vi.inference.interrupts import Interruption, interruptible
from pyro_vi.inference.laplace import check_mode, gaussian_at_mode
from pyro_vi.inference.nonfinite import (
    LastGood,
    NonFiniteError,
    describe_constraint_error,
    is_support_error,
)
from pyro_vi.inference.options import FitOptions
from pyro_vi.inference.restarts import best_of, disagreement, perturb
from pyro_vi.inference.svi import is_recordable
from pyro_vi.inference.trainer import Scaling, SVITrainer
from pyro_vi.inference.training_state import TrainingState
from pyro_vi.process_state import seeded
from pyro_vi.programs import (
    Batches,
    Data,
    Program,
    RowIndependence,
    State,
    Structure,
    check_observes,
    own_memory,
    reachable,
)
from pyro_vi.weighting import ScheduleError, TermWeights


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
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(f"expected a callable as {name}, got {program!r}")
    options = FitOptions(
        loss=Trace_ELBO() if loss is None else loss,
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
        restarts=restarts,
        prior_only=prior_only,
        device=device,
        compile=compile,
        progress=progress,
    )
    fits: list[Fit] = []
    failed: dict[str, NonFiniteError] = {}
    with interruptible() as interruption:
        for restart in range(restarts):
            if interruption.requested and fits:
                break
            name = f"restart {restart + 1} of {restarts}"
            try:
                fits.append(_fit_once(model, guide, data, options, restart))
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


@dataclass(frozen=True)
class _Training:
    """What a training loop needs, and does not change.

    Attributes:
        model, guide, options: as they were given.
        batches: the data.
        programs: the private state of model and guide, which is installed.
        structure: what one run of the programs showed.
        state: what the loop changes.
        last_good: the parameters of the last step with a finite loss.
        callbacks: called between blocks of steps, in order.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    options: FitOptions
    batches: Batches
    structure: Structure
    state: TrainingState
    last_good: LastGood
    callbacks: Sequence[Callback]


def _fit_once(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Data,
    options: FitOptions,
    restart: int,
) -> Fit:
    """The fit after `restart` others; held-out bounds have the same noise in all of them."""
    device = options.torch_device
    batches = Batches(
        data, batch_size=options.batch_size, transform=options.transform, device=device
    )
    optimizer = options.make_optimizer()
    weights = TermWeights(
        reconstruction=options.reconstruction_weight,
        kl=options.kl_weight,
        device=batches.device or device,
    )
    programs = State({"model": model, "guide": guide}, device=device)
    with (
        interruptible() as interruption,
        seeded(options.seed + restart, device),
        programs.installed(),
        ProgressBar(options.steps, _label(options, restart)) as bar,
        warnings.catch_warnings(),
    ):
        # Pyro warns of NaN and goes on; here a NaN is an error.
        warnings.filterwarnings("ignore", message="Encountered")
        # Pyro also warns of observed sites in the guide; they are left out of log q here.
        warnings.filterwarnings("ignore", message="Found non-auxiliary vars in guide")
        training = _set_up(
            model, guide, batches, options, programs, optimizer, weights, bar, restart
        )
        _train(training, interruption)
        interrupted = interruption.requested and training.state.step < options.steps
        fitted = replace(_result(training), interrupted=interrupted)
        if isinstance(guide, AutoLaplaceApproximation):
            args, kwargs = Batches(data, transform=options.transform, device=device).whole()
            try:
                fitted = gaussian_at_mode(fitted, *args, **kwargs)
            except ValueError:
                if not interrupted:
                    raise  # else the mode was not reached: the fit keeps the point
    return fitted


def _label(options: FitOptions, restart: int) -> bool | str:
    """The label of a progress bar, which numbers restarts; False for no bar."""
    shown = options.progress
    if options.restarts == 1 or not shown:
        return shown
    name = f"restart {restart + 1} of {options.restarts}"
    return f"{shown}, {name}" if isinstance(shown, str) else name


def _set_up(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batches: Batches,
    options: FitOptions,
    programs: State,
    optimizer: PyroOptim,
    weights: TermWeights,
    bar: ProgressBar,
    restart: int,
) -> _Training:
    """Runs the programs once, and makes all that training needs."""
    loss = copy(options.loss)  # some remember the programs' plates
    structure = _inspect(model, guide, batches, loss, programs, options.plate, options.prior_only)
    check_mode(guide, structure, weights)
    if loss.vectorize_particles and math.isinf(loss.max_plate_nesting):
        # Pyro would run the programs to guess it; the particles take a dimension too.
        loss.max_plate_nesting = structure.nesting + (loss.num_particles > 1)
    if restart:
        perturb(programs, model, guide)
    callbacks: list[Callback] = [bar]
    if options.heldout is not None:
        bound = Heldout(
            model, guide, loss, options.heldout, batches, structure, programs, options.seed
        )
        callbacks.append(HeldoutBound(bound, every=options.heldout_every))
    if options.patience is not None:
        callbacks.append(Patience(options.patience, every=options.heldout_every))
    scaling = Scaling(model, guide, loss, structure, weights)
    average = None
    if options.average is not None:
        average = Average(programs.parameters(), decay=options.average)
    last_good = LastGood(programs.tensors().values())
    source = batches.shuffled(options.seed + restart)
    trainer = SVITrainer(
        scaling,
        optimizer,
        loss,
        source,
        good=last_good,
        tensors=list(programs.tensors().values()),
        compiles=options.compiles
        and (options.compile == "auto" or is_recordable(with_terms(loss))),
        waits=options.waits_for_compiler,
        average=average,
        announce=bar.announce_compilation,
    )
    state = TrainingState(programs, trainer, source, average)
    bar.start()
    return _Training(model, guide, options, batches, structure, state, last_good, callbacks)


def _train(training: _Training, interruption: Interruption) -> None:
    """Takes all steps, and installs the parameters that the fit ends with."""
    state, steps = training.state, training.options.steps
    while state.step < steps and not state.stopped and not interruption.requested:
        limits = [one.steps_left(state.step) for one in training.callbacks]
        started = time.perf_counter()
        with _guarded(training):
            state.trainer.take(min([steps - state.step, *(n for n in limits if n is not None)]))
            state.history.add(state.trainer.read())
        state.history.seconds += time.perf_counter() - started
        for callback in training.callbacks:
            if callback.is_due(state.step, steps):
                with _guarded(training, callback.purpose):
                    callback(state)
    state.keep_result()
    if state.step:
        _check_result(training)


def _check_result(training: _Training) -> None:
    """Raises NonFiniteError if the programs cannot run with the parameters that were found."""
    args, kwargs = training.state.trainer.batch = training.batches.first()
    with _guarded(training, "with the last parameters"), torch.no_grad():
        last = Structure.of(
            training.model, training.guide, args, kwargs, plate=training.options.plate
        )
        last.guide_trace.compute_log_prob()
        last.model_trace.compute_log_prob()


@contextmanager
def _guarded(training: _Training, where: str | None = None) -> Iterator[None]:
    """Turns an error that ends training into a NonFiniteError with the last good parameters.

    Args:
        where: what the programs run for, in words; by default a step, and the last site it reached.

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
        trainer = training.state.trainer
        if where is None:
            started = trainer.last_site != "the start"
            where = f"after {trainer.last_site}" if started else "before the first site"
        training.last_good.restore()
        training.state.history.add(trainer.read())
        if isinstance(error, FloatingPointError):
            message: str | None = f"step {trainer.taken}: {error}"
        elif is_support_error(error) and _data_outside_support(training):
            message = None
        else:
            reason = describe_constraint_error(error, where)
            message = None if reason is None else f"step {trainer.taken}, {reason}"
        if message is None:
            error.add_note(f"at step {trainer.taken}, {where}")
            raise
        raise NonFiniteError(message, step=trainer.taken, fit=_result(training)) from error


def _data_outside_support(training: _Training) -> bool:
    """Whether observed values of the last batch are outside of their support."""
    args, kwargs = training.state.trainer.batch
    try:
        with torch.no_grad():
            structure = Structure.of(
                training.model, training.guide, args, kwargs, plate=training.options.plate
            )
            for name in structure.observed:
                site = structure.model_trace.nodes[name]
                site["fn"].log_prob(site["value"])
    except ValueError as error:
        return is_support_error(error)
    return False


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


def _result(training: _Training) -> Fit:
    """The fit with the present parameters."""
    model, guide, structure = training.model, training.guide, training.structure
    state, history = training.state.programs, training.state.history
    batches = training.batches
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
        compiled=training.state.trainer.explain(),
    )
