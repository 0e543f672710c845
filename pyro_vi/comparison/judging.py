"""compare(): {name: guide} -> one row per variational family, and a verdict; judge(): {name: fit}.

Two questions, by what is passed as the model:

- a model: every family trains its own copy of it, from the same initial weights on the same
  batches. What differs is the model-and-guide pair: a poor family bends the model to itself.
- a fitted model (`Fit.model`), or one without parameters: the guides alone are trained. What
  differs is inference: the evidence is one number, and the gap to it belongs to the family alone.

Models may differ too, a VAE's and a diffusion's, as long as they observe the same thing: then the
bounds stand side by side, in nats and in bits per dimension.

And two kinds of posterior. Where every latent belongs to one data point, the rows are means over
test data, which each guide can take. With latents that data points share, or autoguides, there is
one posterior, of the training data: bounds and k-hat are of all of them together, and test data
are judged by their log predictive density. A program that draws some of its steps alone, as a
diffusion does, has no posterior here, but a bound: that of all its steps (`pyro_vi.posterior`).
"""

from __future__ import annotations

__all__ = ["Split", "check_draws", "compare", "fit_each", "judge", "judge_each"]

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pyro_vi.checks import check_seed, checked_device
from pyro_vi.comparison.marginals import MarginalErrors, marginal_errors, noise_floor
from pyro_vi.comparison.observed import Observed, check_one_variable
from pyro_vi.comparison.result import Comparison
from pyro_vi.comparison.rows import PerPoint, Row, largest_errors, make_rows, with_one_evidence
from pyro_vi.comparison.verdict import summarize
from pyro_vi.diagnostics import khat_threshold
from pyro_vi.inference import Fit, NonFiniteError, fit, interruptible
from pyro_vi.posterior import Posterior, StepBound, check_scores, step_bound
from pyro_vi.process_state import seeded
from pyro_vi.programs import Batches, Data, as_arguments, as_tensors, to_device

log = logging.getLogger(__name__)

_MIN_DRAWS = 21  # fewer have no tail to fit a k-hat to

Array = npt.NDArray[np.float64]


class Split(Protocol):
    """Data in two parts, such as `pyro_vi.data.ImageData`."""

    @property
    def train(self) -> Any: ...

    @property
    def test(self) -> Any: ...


def compare(
    model: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    guides: Mapping[str, Callable[..., Any]],
    data: Split | Data,
    *,
    num_samples: int = 1_000,
    reference: Any = None,
    prior_only: bool = False,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Comparison:
    """Fits each guide and judges it.

    A guide that fails, for whatever reason, does not end the comparison: its row says what failed,
    and `Comparison.failures` has the error. Ctrl-C stops the current fit. The fits made so far are
    judged, and a second Ctrl-C raises KeyboardInterrupt at once.

    Args:
        model: a Pyro program, of which each guide gets its own copy to train; or a fitted model
            (`Fit.model`), which stays as it is; or one for each guide, by the guides' names.
        guides: guides by name, autoguides among them; differences are to the first.
        data: has `train` and `test`, each as `fit` takes data; or data as `fit` takes them, which
            are then judged too.
        num_samples: posterior draws, for each data point or of all together; at least 21.
        reference: draws to hold the marginals against: a `pyro.infer.MCMC` that has run on this
            model, or arrays by latent or deterministic site, (R, *plates, *shape) each.
        prior_only: as `fit` takes it.
        seed: of the fits and of the draws.
        progress: whether to show progress bars.
        **options: as `fit` takes them: loss, optim, steps, batch_size, transform, restarts, ...; a
            transform is applied to the judged data too, once. They are the same for all: fits that
            need options of their own are made by `fit`, and compared by `judge`.

    Raises:
        ValueError: no guides, too few draws, models that do not observe the same thing, a reference
            of other sites; where that is seen after training, the error's attribute `fits` has the
            fits. If all guides fail, the error of the first, such as what `fit` refuses,
            or a loss that enumerates latents.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from pyro_vi.families import FullCovariance, MeanField
        >>> from pyro_vi.guides import Encoder
        >>> from pyro_vi.models import LinearGaussian
        >>> model = LinearGaussian(torch.ones(3, 2), torch.zeros(3), 1.0)
        >>> data = SimpleNamespace(train=torch.randn(64, 3), test=torch.randn(16, 3))
        >>> guides = {
        ...     "mean-field": Encoder((3,), MeanField(2, context_dim=8)),
        ...     "full covariance": Encoder((3,), FullCovariance(2, context_dim=8)),
        ... }
        >>> result = compare(model, guides, data, num_samples=50, steps=5, progress=False)
        >>> [row.family for row in result.rows]
        ['mean-field', 'full covariance']
    """
    _check_names("guides", guides)
    models = model if isinstance(model, Mapping) else dict.fromkeys(guides, model)
    if models.keys() != guides.keys():
        raise ValueError(
            f"expected a model for each guide, {sorted(guides)}, got models {sorted(models)}"
        )
    check_draws(num_samples)
    _samples(reference)
    train, _ = _parts(data)
    where = checked_device(options.get("device"))
    with seeded(seed, where):  # what a transform draws is not seen outside
        first = Batches(
            train,
            batch_size=options.get("batch_size"),
            transform=options.get("transform"),
            device=where,
        ).first()
    if isinstance(model, Mapping):
        check_one_variable(
            {name: Observed.from_run(models[name], guides[name], first) for name in guides}
        )

    def fitted(name: str) -> Fit:
        plate = options.get("plate", "data")
        check_scores(models[name], guides[name], first, plate=plate, device=where)
        label = name if progress else False
        return fit(
            models[name],
            guides[name],
            train,
            prior_only=prior_only,
            seed=seed,
            progress=label,
            **options,
        )

    with interruptible():
        fits, failures = fit_each({name: partial(fitted, name) for name in guides})
        return judge_each(
            guides,
            fits,
            failures,
            data,
            num_samples=num_samples,
            reference=reference,
            transform=options.get("transform"),
            prior_only=prior_only,
            seed=seed,
            progress=progress,
        )


class NotFittedError(RuntimeError):
    """Why a family has no fit that was not begun."""


def fit_each(
    makers: Mapping[str, Callable[[], Fit]],
) -> tuple[dict[str, Fit], dict[str, Exception]]:
    """Makes fits one after the other, until Ctrl-C is pressed.

    Args:
        makers: functions that return a fit, by family.

    Returns:
        The fits, and the errors of those that failed or were not begun.

    Raises:
        Exception: all of them failed; the error of the first.
    """
    fits: dict[str, Fit] = {}
    failures: dict[str, Exception] = {}
    with interruptible() as interruption:
        for name, make in makers.items():
            if interruption.requested and fits:
                failures[name] = NotFittedError("training was interrupted before")
                continue
            try:
                made = make()
            except Exception as error:
                failures[name] = _logged(name, error)
            else:
                if made.interrupted and not len(made.losses) and fits:
                    failures[name] = NotFittedError("training was interrupted before")
                else:
                    fits[name] = made
    if not fits:
        raise next(iter(failures.values()))
    return fits, failures


def judge_each(
    families: Iterable[str],
    fits: Mapping[str, Fit],
    failures: Mapping[str, Exception],
    data: Split | Data,
    **options: Any,
) -> Comparison:
    """Judges fits. A fit that cannot be judged becomes a failure; the others are kept.

    Args:
        families: the names of all families, in the order of the rows.
        fits: the fits of some of them.
        failures: the errors of the others, which get rows too.
        data, **options: as `judge` takes them.

    Raises:
        Exception: no fit can be judged, or they can be judged only separately. Its attribute `fits`
            has the fits.
    """
    failures = dict(failures)
    try:
        result = judge(fits, data, **options)
    except Exception as reason:
        sound: dict[str, Fit] = {}
        for name, one in fits.items():
            try:
                judge({name: one}, data, **options)
            except Exception as error:
                failures[name] = _logged(name, error)
            else:
                sound[name] = one
        if not sound or len(sound) == len(fits):
            vars(reason)["fits"] = dict(fits)
            reason.add_note("the fits are not lost: they are the attribute `fits` of this error")
            raise reason
        result = judge(sound, data, **options)
    if not failures:
        return result
    rows = {row.family: row for row in result.rows}
    rows |= {name: Row(name, status=_status(error)) for name, error in failures.items()}
    result = replace(result, rows=tuple(rows[name] for name in families), failures=failures)
    return summarize(result)


def _logged(name: str, error: Exception) -> Exception:
    """Logs why a family failed, and returns the error without tracebacks, which hold all locals."""
    expected = isinstance(error, (ValueError, ArithmeticError))
    log.warning("%s failed: %s", name, error, exc_info=None if expected else error)
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def _status(error: Exception) -> str:
    reason = str(error).partition("\n")[0]  # without Pyro's table of shapes
    if isinstance(error, NotFittedError):
        return f"not fitted: {reason}"
    # Messages of ValueError and NonFiniteError are sentences; others may be a key alone.
    says_all = isinstance(error, (ValueError, NonFiniteError)) and reason
    return f"failed: {reason}" if says_all else f"failed: {type(error).__name__}: {reason}"


def judge(
    fits: Mapping[str, Fit],
    data: Split | Data,
    *,
    num_samples: int = 1_000,
    reference: Any = None,
    transform: Callable[[Any], Any] | None = None,
    prior_only: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Compares fits that are there already: what `compare` does after training.

    Args:
        fits: fits by name; differences are to the first. Those of one frozen model, or of one
            without parameters, share its evidence. Of several models each has to observe the same
            thing: as many numbers in a data point, of the same levels if they are discrete.
        data: as `compare` takes them.
        num_samples: posterior draws, for each data point or of all together; at least 21.
        reference: as `compare` takes it.
        transform: applied to the data before, once.
        prior_only: as `fit` takes it.
        seed: of the transform and of the draws.
        progress: whether to show a progress bar over the steps of a diffusion.

    Raises:
        TypeError: something else than fits by name.
        ValueError: no fits, too few draws, models that observe nothing of these data or not the
            same thing, a diffusion beside a posterior of all data together, or a reference of other
            sites.

    Example:
        >>> import torch
        >>> from pyro_vi.diffusion import MLPDenoiser
        >>> from pyro_vi.diffusion import Diffusion
        >>> from pyro_vi.families import MeanField
        >>> from pyro_vi.guides import Encoder, ForwardProcess
        >>> from pyro_vi.models import DDPM, LinearGaussian
        >>> from pyro_vi.diffusion import CosineSchedule
        >>> x = torch.randn(40, 2)
        >>> diffusion = Diffusion((2,), CosineSchedule(10))
        >>> ddpm = DDPM(diffusion, MLPDenoiser((2,), 10))
        >>> linear = LinearGaussian(torch.ones(2, 2), torch.zeros(2), 1.0)
        >>> few = {"steps": 5, "progress": False}
        >>> fits = {
        ...     "linear": fit(linear, Encoder((2,), MeanField(2, context_dim=8)), x, **few),
        ...     "diffusion": fit(ddpm, ForwardProcess(diffusion), x, **few),
        ... }
        >>> result = judge(fits, x, num_samples=50)
        >>> list(result.posteriors), list(result.step_bounds)
        (['linear'], ['diffusion'])
    """
    _check_names("fits", fits)
    if strangers := [name for name, one in fits.items() if not isinstance(one, Fit)]:
        raise TypeError(f"expected fits, as `fit` returns them, got others as {strangers}")
    check_draws(num_samples)
    check_seed(seed)
    samples = _samples(reference)
    train, test = _parts(data)
    with seeded(seed):
        judged = {
            name: transform(part) if transform else part
            for name, part in (("train", train), ("test", test))
            if part is not None
        }
    observed = {name: _observed(name, one, judged["train"]) for name, one in fits.items()}
    _check_observe(observed, prior_only)
    by_step = [name for name, one in observed.items() if one.by_step]
    joint = _have_joint_bounds(fits, by_step)
    on_test = not joint and "test" in judged
    scored = judged["test" if on_test else "train"]
    check_one_variable(observed)
    posteriors: dict[str, Posterior] = {}
    step_bounds: dict[str, StepBound] = {}
    for name, one in fits.items():
        here = to_device(scored, _device(one))
        if name in by_step:
            step_bounds[name] = step_bound(
                one.model, one.guide, _tensor(here), seed=seed, progress=name if progress else False
            )
            continue
        posterior = one.posterior(here, num_samples, seed=seed)
        posteriors[name] = posterior.joint() if joint else posterior
    drawn = _reference(samples, posteriors, raw=hasattr(reference, "get_samples"))
    points = {name: PerPoint.of(p) for name, p in posteriors.items() if not p.point}
    marginals = {name: _marginals(p, drawn) for name, p in posteriors.items() if drawn}
    predictive = {
        name: one.log_predictive_density(
            to_device(judged["test"], _device(one)), num_samples, seed=seed
        ).value
        for name, one in fits.items()
        if joint and "test" in judged and one.amortized
    }
    rows = make_rows(fits, posteriors, step_bounds, points, predictive, marginals)
    shared = _one_model(list(fits.values()))
    if shared:
        rows = with_one_evidence(rows, trusted=khat_threshold(num_samples) if joint else None)
    noise = {name: noise_floor(values) for name, values in _common(drawn, posteriors).items()}
    result = Comparison(
        rows=tuple(rows),
        fits=dict(fits),
        posteriors=posteriors,
        step_bounds=step_bounds,
        points=points,
        data=to_device(scored, _device(next(iter(fits.values())))),
        on_test=on_test,
        num_samples=num_samples,
        shared=shared,
        reference=drawn,
        marginals=marginals,
        noise=Row("reference", **largest_errors(noise)) if noise else None,
    )
    return summarize(result)


def _check_observe(observed: Mapping[str, Observed], prior_only: bool) -> None:
    """Raises ValueError if a program observes nothing, unless a fit of a prior is wanted."""
    without = [name for name, one in observed.items() if not one.observes]
    if without and not prior_only:
        raise ValueError(
            f"{without} observe nothing in these data: give the data that they were fitted to, such"
            " as (x, y) for a model(x, y=None); use prior_only=True to judge fits of a prior"
        )


def _have_joint_bounds(fits: Mapping[str, Fit], by_step: Sequence[str]) -> bool:
    """Whether bounds are of all data together.

    Args:
        by_step: the names of programs that draw some of their steps alone.

    Raises:
        ValueError: some of these have bounds of single data points, and others do not.
    """
    joint = not all(one.local for name, one in fits.items() if name not in by_step)
    if apart := [name for name in by_step if not fits[name].local]:
        raise ValueError(
            f"{apart} draw some of their steps alone, and their rows do not stand alone (a"
            " normalisation over the batch, or latents that data points share): they have no bound"
            " for each data point"
        )
    if joint and by_step:
        raise ValueError(
            f"{by_step} have a bound for each data point, and others here one of all data together"
            " (latents that data points share, or an autoguide): these do not compare"
        )
    return joint


def _check_names(what: str, named: object) -> None:
    if not isinstance(named, Mapping):
        raise TypeError(f"expected {what} by name, a dict, got {type(named).__name__}")
    if not named:
        raise ValueError(f"expected at least one {what[:-1]} to compare, got none")
    if strangers := [name for name in named if not isinstance(name, str)]:
        raise TypeError(f"expected {what} by name, strings, got {strangers}")


def check_draws(num_samples: object) -> None:
    """Raises TypeError or ValueError unless so many draws have a k-hat."""
    if isinstance(num_samples, bool) or not isinstance(num_samples, Integral):
        raise TypeError(f"expected a whole number of posterior draws, got {num_samples!r}")
    if num_samples < _MIN_DRAWS:
        raise ValueError(
            f"expected at least {_MIN_DRAWS} posterior draws for a k-hat, got {num_samples}"
        )


def _device(fitted: Fit) -> torch.device | None:
    return Batches(fitted.template).device


def _observed(name: str, fitted: Fit, data: Any) -> Observed:
    """A run on a few rows; on all data, where rows do not stand alone."""
    try:
        if fitted.local:
            batches = Batches(data, rows=fitted.rows)
            few = torch.arange(min(2, batches.count()), device=batches.device)
            batch = batches.rows(few)
        else:
            batch = Batches(data).whole()
        here: Any = to_device(batch, _device(fitted))
        return Observed.from_run(fitted.model, fitted.guide, here)
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]  # without the shapes that Pyro adds
        raise type(error)(f"{name!r} does not take these data: {reason}") from error


def _one_model(fits: Sequence[Fit]) -> bool:
    """Whether all fits have the very same model, and none trained it."""
    first, *others = fits
    if any(one.model_is_trained for one in fits):
        return False
    if any(one.model.function != first.model.function for one in others):
        return False
    held = [_of_model(one) for one in fits]
    return all(
        own.keys() == held[0].keys()
        and all(torch.equal(tensor, held[0][name]) for name, tensor in own.items())
        for own in held
    )


def _of_model(fitted: Fit) -> dict[str, Tensor]:
    tensors = fitted.model.state.snapshot()
    return {name: t for name, t in tensors.items() if name.split(".")[0] == "model"}


def _tensor(data: Data) -> Any:
    """The one tensor that programs of one argument take; other data as they are."""
    args, kwargs = as_arguments(data)
    values = (*args, *kwargs.values())
    return values[0] if len(values) == 1 else data


def _parts(data: Any) -> tuple[Any, Any]:
    """Training data, and test data or None."""
    if hasattr(data, "train") and hasattr(data, "test"):
        return as_tensors(data.train), as_tensors(data.test)
    if hasattr(data, "train") or hasattr(data, "test"):
        raise TypeError("expected data with train and test, got one of them alone")
    Batches(data)  # raises TypeError for what are no data
    return as_tensors(data), None


def _samples(reference: Any) -> dict[str, Tensor]:
    """Reference draws by site."""
    if reference is None:
        return {}
    samples = reference
    if hasattr(reference, "get_samples"):
        try:
            samples = reference.get_samples()
        except AttributeError:  # Pyro's own, of a chain that has not run
            samples = None
    if not isinstance(samples, Mapping) or not samples:
        got = "no draws" if isinstance(reference, Mapping) else type(reference).__name__
        raise TypeError(
            "expected as reference a pyro.infer.MCMC that has run, or arrays of draws by site, got"
            f" {got}"
        )
    return {name: torch.as_tensor(values).detach() for name, values in samples.items()}


def _reference(
    samples: dict[str, Tensor], posteriors: Mapping[str, Posterior], *, raw: bool
) -> dict[str, Array]:
    """Reference draws as arrays; with deterministic sites where they are Pyro's (`raw`)."""
    programs = next((posterior.programs for posterior in posteriors.values()), None)
    if raw and programs is not None:
        samples = programs.completed(samples)
    return {name: values.double().cpu().numpy() for name, values in samples.items()}


def _common(drawn: Mapping[str, Array], posteriors: Mapping[str, Posterior]) -> dict[str, Array]:
    """The reference's draws of sites that the posteriors have too."""
    names = {name for posterior in posteriors.values() for name in posterior.sites}
    common = {name: values for name, values in drawn.items() if name in names}
    if drawn and not common:
        raise ValueError(
            f"expected reference draws of {sorted(names)}, or some of them, got {sorted(drawn)}"
        )
    return common


def _marginals(posterior: Posterior, drawn: Mapping[str, Array]) -> dict[str, MarginalErrors]:
    found = {}
    for name, values in _common(drawn, {"": posterior}).items():
        own = posterior.sites[name].double().numpy()
        if own.shape[1:] != values.shape[1:]:
            raise ValueError(
                f"site {name!r}: expected reference draws of shape (R, {_sizes(own)}), got"
                f" {values.shape}"
            )
        found[name] = marginal_errors(own, values)
    return found


def _sizes(draws: Array) -> str:
    return ", ".join(str(size) for size in draws.shape[1:])
