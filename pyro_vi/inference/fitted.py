"""A fit: a model and a guide bound to their trained parameters.

    generate     x ~ p(x | z), z ~ p(z)
    reconstruct  E[x' | z],    z ~ q(z | x)
    predict      x' ~ p(x' | z), z ~ q(z | x)
    interpolate  E[x' | z_t],  z_t on the line from E_q[z | a] to E_q[z | b]

All of it runs on the fit's own parameters: neither the global store nor another fit plays a part.
"""

from __future__ import annotations

__all__ = ["Fit"]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_vi import files
from pyro_vi.augmentation import noises
from pyro_vi.checks import check_count, checked_device
from pyro_vi.diagnostics import Estimate
from pyro_vi.inference.file_format import read_fit
from pyro_vi.posterior import Posterior, Scorer
from pyro_vi.process_state import seeded
from pyro_vi.programs import (
    Arguments,
    Batches,
    Data,
    FixedSites,
    Layout,
    PlateSizes,
    Program,
    State,
    Structure,
    Uncondition,
    as_arguments,
    base_noise,
    is_deterministic,
    is_drawn,
    is_partial,
    is_subsampled_term,
    own_memory,
    reachable,
    to_device,
)

Draws = dict[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """What `fit` returns.

    Attributes:
        model: the model bound to its trained parameters, frozen and in `eval()`.
        guide: the guide, likewise.
        losses: what was minimised, nats per data point: the negative bound where the step's weights
            are one, and else a weighted objective, which in general bounds nothing; shape (steps,).
        reconstruction: expected log-likelihood, unweighted, nats per data point; (steps,). NaN if
            the ELBO does not keep its terms, such as TraceEnum_ELBO.
        kl: KL from the latents' prior, likewise, at a weight of 0 too; (steps,).
        weights: the step's weights on reconstruction and KL; (steps, 2).
        heldout: (step, bound in nats per data point) of every held-out evaluation; (k, 2).
        seconds: spent in gradient steps.
        parameters: trained values in all.
        plate: the name of the plate over data points.
        plates: the size of every vectorized plate that a sample site stands in, by name; that of
            the plate over data points is the number of all training points.
        amortized: whether the programs take each data point by itself, given the shared latents
            (`pyro_vi.programs`): then other data get latents and predictions too.
        local: whether they do, and every site stands inside the plate over data points: then each
            data point has a posterior of its own.
        rows: the arguments that have a row for each data point, by position or keyword.
        model_is_trained: whether the model had parameters to train.
        fingerprint: a checksum of the training data where the posterior is theirs alone; None where
            it is not, or where a transform stood between data and programs.
        template: a few rows of the training data (all of them, if they were not split): the shape
            of an argument.
        restarts: all fits of `fit(..., restarts=R)`, this one among them, in the order of their
            seeds; empty without restarts, and in a loaded fit.
        interrupted: whether Ctrl-C stopped training before all steps were taken.
        compiled: which steps were compiled and by what, or why none was, in words.
    """

    model: Program
    guide: Program
    losses: Tensor
    reconstruction: Tensor
    kl: Tensor
    weights: Tensor
    heldout: Tensor
    seconds: float
    parameters: int
    plate: str
    plates: dict[str, int]
    amortized: bool
    local: bool
    rows: tuple[int | str, ...]
    model_is_trained: bool
    fingerprint: int | None
    template: Data
    restarts: tuple[Fit, ...] = ()
    interrupted: bool = False
    compiled: str = ""

    def __repr__(self) -> str:
        return (
            f"Fit({len(self.losses)} steps{', interrupted' * self.interrupted},"
            f" {self.seconds:.1f} s, {self.parameters:,} parameters,"
            f" last loss {float(self.losses[-1]) if len(self.losses) else float('nan'):.3f} nats)"
        )

    @property
    def bounds(self) -> Tensor:
        """The bound at every step, nats per data point; (steps,).

        With weights, reconstruction minus KL without them; NaN if the ELBO does not keep its terms.
        """
        if bool((self.weights == 1).all()):
            return -self.losses
        return self.reconstruction - self.kl

    def posterior(self, data: Data, num_samples: int = 1_000, *, seed: int = 0) -> Posterior:
        """Draws from the guide, with log p, log q and the log-likelihood.

        Where every latent belongs to a single data point, the data are any, and each data point
        has a posterior. With a latent that the data points share, or an autoguide, there is one
        posterior, of the data that the guide was fitted to.

        Args:
            data: as `fit` takes them, N data points; transformed, if `fit` had a transform (then
                other data than those of the fit are not told from them).
            num_samples: draws (S), for each data point or of all together; at least 1.
            seed: of the draws.

        Returns:
            `pyro_vi.posterior.Posterior`. After `fit(..., restarts=R)` with joint weights it holds
            the posteriors of all restarts too.

        Raises:
            ValueError: fewer than one draw; other data than the guide was fitted to, where there
                is one posterior of those; a batch that the programs refuse.
        """
        self._check_fitted_to(data)
        posterior = self._programs(data).posterior(num_samples, seed=seed, local=self.local)
        self._check_plates(posterior.plates)
        training = {"loss": self.losses, "reconstruction": self.reconstruction, "kl": self.kl}
        posterior = replace(posterior, training=training)
        if not posterior.is_joint or not self.restarts:
            return posterior
        restarts = (
            posterior
            if fit.guide.state is self.guide.state
            else fit.posterior(data, num_samples, seed=seed + i)
            for i, fit in enumerate(self.restarts)
        )
        return replace(posterior, restarts=tuple(restarts))

    def posterior_given_globals(
        self, data: Data, num_samples: int = 1_000, *, seed: int = 0
    ) -> Posterior:
        """The posterior of each data point's own latents, given one draw of the shared ones.

        Its k-hats, one for each data point, judge the guide's local part alone: what the guide
        makes of the shared latents plays no part. The joint k-hat of `posterior` judges all.

        Args:
            data: as `fit` takes them, N data points.
            num_samples: draws for each data point (S), at least 1.
            seed: of the draws, and of the one draw of the shared latents.

        Raises:
            ValueError: fewer than one draw; no latents of single data points, or a guide that
                draws them jointly.
        """
        if not self.amortized:
            self._check_fitted_to(data)
        return self._programs(data).given_globals(num_samples, seed=seed)

    def log_predictive_density(
        self, data: Data, num_samples: int = 1_000, *, seed: int = 0
    ) -> Estimate:
        """log p(x_n | training data) of each data point that the guide has not seen.

            log 1/S sum_s p(x_n, z_ns | theta_s) / q(z_ns | x_n, theta_s),
            theta_s ~ q(theta),    z_ns ~ q(z_n | x_n, theta_s),

        where theta are the latents that data points share, and z those of single ones, if any.

        Args:
            data: as `fit` takes them, N data points.
            num_samples: draws (S), at least 2.
            seed: of the draws.

        Returns:
            The estimate in nats and its Monte Carlo standard error, (N,) each.

        Raises:
            ValueError: fewer than two draws; a guide that has latents for its training data alone,
                or whose shared latents read the data.
        """
        if not self.amortized:
            raise ValueError(
                "the guide's latents belong to the data it was fitted to: it keeps a parameter for"
                " each data point, or its shared latents read the data; it has none for other data"
            )
        return self._programs(data).log_predictive_density(num_samples, seed=seed)

    def _programs(self, data: Data) -> Scorer:
        return Scorer(self.model, self.guide, data, self.plate, self.rows)

    def _check_fitted_to(self, data: Data) -> None:
        """Raises ValueError if there is one posterior, and it is not that of these data."""
        if self.fingerprint is not None and Batches(data).fingerprint() != self.fingerprint:
            raise ValueError(
                "expected the data that the guide was fitted to, in their dtype: it has latents"
                " that data points share, or no amortized ones, and so one posterior, theirs;"
                " log_predictive_density and predict are for other data"
            )

    def _check_plates(self, plates: Mapping[str, int]) -> None:
        """Raises ValueError unless the plates have the sizes that the guide was fitted to."""
        for name, size in plates.items():
            if self.local and name == self.plate:
                continue
            if (fitted := self.plates.get(name, size)) != size:
                raise ValueError(
                    f"plate {name!r} has {size} elements, and had {fitted} in the fit: the guide's"
                    " parameters belong to those"
                )

    def generate(self, num: int, *, expected: bool = False, seed: int = 0) -> Draws:
        """Data points from the model's prior, with their latents.

        The model is called with the first row of the training data, repeated: covariates are that
        row's, observed values are drawn. A model that draws some of its steps alone has no such
        run: a diffusion's chain is sampled instead, all its steps (`DDPM.sample`).

        Args:
            num: how many.
            expected: observed sites' means given the latents, instead of draws.
            seed: of the draws.

        Returns:
            Values by site, each of shape (num, ...); of a diffusion "x_0" alone.

        Raises:
            ValueError: num < 1; latents outside the plate over data points; a model that draws some
                of its sites alone, and is no diffusion.
        """
        check_count("data point to generate", num)
        args, kwargs = self._template_rows(num)
        with seeded(seed), torch.no_grad():
            model = Uncondition()(self._sized(num)(self.model))
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        sample = getattr(self.model, "sample", None)
        if callable(sample) and any(map(is_subsampled_term, _samples(trace))):
            with seeded(seed):
                return {"x_0": sample(num, expected=expected)}
        _check_local(trace, self.plate)
        ordered = {
            name: Layout.of(trace.nodes[name], plate=self.plate).ordered(value)
            for name, value in {**_latent(trace), **_deterministic(trace)}.items()
        }
        return {**ordered, **self._observed(trace, expected)}

    def reconstruct(self, data: Data, *, seed: int = 0) -> Draws:
        """Means of the observed sites, given one draw of each data point's latents.

        Args:
            data: as `fit` takes them, N data points.
            seed: of the draw.

        Returns:
            Means by observed site, each of shape (N, ...).
        """
        return self._given(
            self._encode(data, 1, seed), as_arguments(data), expected=True, seed=seed
        )

    def predict(self, data: Data, num_samples: int = 100, *, seed: int = 0) -> Draws:
        """Posterior predictive draws for each data point.

        Args:
            data: as `fit` takes them, N data points. What the model observes may be left out where
                its arguments are optional: `predict((x_new,))` for a `model(x, y=None)`. Where the
                guide does not read it, other values of its shape and support will do too.
            num_samples: draws for each (S).
            seed: of the draws.

        Returns:
            Draws by observed site, each of shape (S, N, ...).

        Raises:
            ValueError: fewer than one draw; other data than the training data, if the guide has
                separate latents for each training row; a guide that needs what is left out.
        """
        check_count("predictive draw", num_samples)
        source = self._programs(data)
        others = self.fingerprint not in (None, Batches(data).fingerprint())
        if not self.amortized and others:
            raise ValueError(
                "expected the data that the guide was fitted to: it has latents for its training"
                " rows only, so that predict needs all of them. The observed sites are drawn again."
                " To predict for other rows, fit a guide that reads the latents of a row from it"
                " (pyro_vi.guides.Encoder), or use a model whose latents are shared by all rows"
            )
        parts, complete = Batches(data).parts, Batches(self.template).parts
        if any(parts.get(key) is None and part is not None for key, part in complete.items()):
            missing = source.unobserved_sites(self._programs(self.template))
            if missing:
                return source.predict(num_samples, missing, seed=seed)
        posterior = source.posterior(num_samples, seed=seed, local=self.local)
        return posterior.predictive(seed=seed + 1)

    def decode(
        self, latents: Mapping[str, Tensor], *, expected: bool = True, seed: int = 0
    ) -> Draws:
        """Observed sites, given values of the latents.

        Args:
            latents: values by latent site, each of shape (N, ...).
            expected: means, rather than draws.
            seed: of the draws.

        Returns:
            Values by observed site, each of shape (N, ...).

        Raises:
            ValueError: no latents, too few, unknown ones, or of different lengths.
        """
        lengths = {name: len(value) for name, value in latents.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"expected values of the latents, all of one length, got {lengths}")
        num = next(iter(lengths.values()))
        return self._given(latents, self._template_rows(num), expected=expected, seed=seed)

    def interpolate(self, start: Data, end: Data, num: int = 8, *, seed: int = 0) -> Draws:
        """Means of the observed sites along the line between two data points' mean latents.

        Args:
            start, end: one data point each (a first axis of length 1).
            num: points on the line, both ends included; at least 2.
            seed: of the draws that the means are taken over.

        Returns:
            Means by observed site, each of shape (num, ...).

        Raises:
            ValueError: num < 2; an end that is not one data point.
        """
        check_count("points to interpolate", num, least=2)
        for name, data in (("start", start), ("end", end)):
            if (total := Batches(data, rows=self.rows).count()) != 1:
                raise ValueError(f"expected one data point as {name}, got {total}")
        ends = [self._encode(data, 256, seed) for data in (start, end)]
        line = {}
        for name, first in ends[0].items():
            w = torch.linspace(0, 1, num, dtype=first.dtype, device=first.device)
            w = w.reshape(-1, *[1] * (first.dim() - 1))
            line[name] = (1 - w) * first + w * ends[1][name]
        return self.decode(line, expected=True, seed=seed)

    def _sized(self, num: int) -> PlateSizes:
        """Sets unsized plates to their size in the fit, and the one over data points to `num`."""
        return PlateSizes({**self.plates, self.plate: num})

    def _template_rows(self, num: int) -> Arguments:
        """The first row of the training data, repeated."""
        batches = Batches(self.template, rows=self.rows)
        batches.count()  # refuses what has no rows
        return batches.rows(torch.zeros(num, dtype=torch.long, device=batches.device))

    def _encode(self, data: Data, num_samples: int, seed: int) -> Draws:
        """Mean over `num_samples` draws of each data point's latents."""
        draws = self.posterior(data, num_samples, seed=seed).draws
        for name, value in draws.items():
            if num_samples > 1 and not value.is_floating_point():
                raise ValueError(f"latent site {name!r} is discrete: draws of it have no mean")
        return {n: v[0] if num_samples == 1 else v.mean(0) for n, v in draws.items()}

    def _given(
        self, latents: Mapping[str, Tensor], rows: Arguments, *, expected: bool, seed: int
    ) -> Draws:
        args, kwargs = rows
        here = next(part.device for part in (*args, *kwargs.values()) if isinstance(part, Tensor))
        latents = to_device(latents, here)  # posterior draws are on the CPU
        num = next((len(value) for value in latents.values() if value.dim()), 1)
        drawn = Uncondition()(self._sized(num)(self.model))
        with seeded(seed), torch.no_grad():
            trace = poutine.trace(drawn).get_trace(*args, **kwargs)
            _check_local(trace, self.plate)
            if (names := _latent(trace).keys()) != latents.keys():
                raise ValueError(
                    f"expected values of the latent sites {sorted(names)}, got {sorted(latents)}"
                )
            values = {
                name: Layout.of(trace.nodes[name], plate=self.plate).raw(value)
                for name, value in latents.items()
            }
        with seeded(seed), torch.no_grad():
            trace = poutine.trace(poutine.condition(drawn, data=values)).get_trace(*args, **kwargs)
        return self._observed(trace, expected)

    def _observed(self, trace: Trace, expected: bool) -> Draws:
        """Values or means of the sites that the model observes (`Uncondition` marks them)."""
        found = {}
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and _is_data(site):
                with self.model.state.installed():  # a mean may be a network's
                    value = site["fn"].mean if expected else site["value"]
                if expected and bool(value.isnan().any()):
                    raise ValueError(f"site {name!r} has no mean: ask for draws (expected=False)")
                found[name] = Layout.of(site, plate=self.plate).ordered(value)
        return found

    def save(self, path: str | PathLike[str], *, recipe: Mapping[str, Any] | None = None) -> None:
        """Writes the fit to one file, atomically, without its restarts.

        Args:
            path: the file; it is replaced if it exists.
            recipe: plain values that tell how to build the programs again; the command line
                stores its options there.

        Raises:
            FileNotFoundError: there is no such folder.
            TypeError: the recipe or the template holds more than tensors and plain values.
        """
        content = {
            "tensors": self.model.state.snapshot(),
            "recipe": dict(recipe or {}),
            "densities": self._densities(self._drawn()),
            "noises": _noises(self.model.state),
            "interrupted": self.interrupted,
            "compiled": self.compiled,
            **{name: getattr(self, name) for name in _PLAIN},
        }
        files.save(path, content)

    def _drawn(self) -> Draws:
        """The guide's draws for the template."""
        args, kwargs = as_arguments(self.template)
        with seeded(0), torch.no_grad():
            trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        return {site["name"]: base_noise(site).cpu() for site in _samples(trace) if is_drawn(site)}

    def _densities(self, drawn: Draws) -> dict[str, Any]:
        """Draws, and what guide and model make of them; the latter empty if that is not settled."""
        args, kwargs = as_arguments(self.template)
        here = Batches(self.template).device
        runs = []
        for _ in range(2):
            with (
                FixedSites(to_device(drawn, here)),
                torch.no_grad(),
                pyro.validation_enabled(False),
            ):
                guide = poutine.trace(self.guide).get_trace(*args, **kwargs)
                model = poutine.trace(poutine.replay(self.model, trace=guide))
                runs.append(
                    {
                        "guide": _log_probs(guide),
                        "model": _log_probs(model.get_trace(*args, **kwargs)),
                    }
                )
        return {"draws": drawn, "log_probs": runs[0] if runs[0] == runs[1] else {}}

    def _check_densities(self, saved: Mapping[str, Any]) -> None:
        """Raises ValueError unless the programs make of a saved fit's draws what that fit did."""
        found = self._densities(saved["draws"])["log_probs"]
        for whose, expected in saved["log_probs"].items():
            for name, value in expected.items():
                got = found.get(whose, {}).get(name, math.nan)
                if not math.isclose(got, value, rel_tol=1e-3, abs_tol=1e-3) and value == value:
                    raise ValueError(
                        f"site {name!r} of the {whose} has log probability {got:g} there, and had"
                        f" {value:g} in the fit, with the same parameters (another likelihood,"
                        " schedule or the like)"
                    )

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *,
        device: str | torch.device | None = None,
    ) -> Fit:
        """Reads a fit from a file, for the programs that it was made with.

        Args:
            path: the file that `save` wrote.
            model, guide: the programs, as they were before the fit; they stay as they are. For a
                fit of `AutoLaplaceApproximation`, the guide is `AutoMultivariateNormal(model)`.
            device: where the fit will live; the CPU by default.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, damaged, no fit, of another version, or of other
                programs.
        """
        content = read_fit(path)
        where = checked_device(device) or torch.device("cpu")
        state = State({"model": model, "guide": guide}, device=where)
        try:
            template = to_device(content["template"], where)
            args, kwargs = as_arguments(template)
            with seeded(0, where), state.installed(), torch.no_grad(), reachable():
                Structure.of(model, guide, args, kwargs, plate=content["plate"])
                own_memory(state.tensors().values())
            state.restore(content["tensors"])
            _check_frozen(state, content["tensors"])
            if "noises" in content:  # not in older files
                _check_noises(_noises(state), content["noises"])
            state.freeze()
            loaded = cls(
                model=Program(model, state, "model"),
                guide=Program(guide, state, "guide"),
                interrupted=content.get("interrupted", False),  # not in older files
                compiled=content.get("compiled", ""),
                **{**{name: content[name] for name in _PLAIN}, "template": template},
            )
            loaded._check_densities(content["densities"])
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # user programs may raise anything here
            reason = str(error).partition("\n")[0]  # without the shapes that Pyro adds
            if not isinstance(error, (ValueError, TypeError, RuntimeError)):
                reason = f"{type(error).__name__}: {reason}"
            raise ValueError(f"{path} was made for other programs: {reason}") from error
        return loaded


_PLAIN = (
    "losses",
    "reconstruction",
    "kl",
    "weights",
    "heldout",
    "seconds",
    "parameters",
    "plate",
    "plates",
    "amortized",
    "local",
    "rows",
    "model_is_trained",
    "fingerprint",
    "template",
)


def _log_probs(trace: Trace) -> dict[str, float]:
    trace.compute_log_prob()
    return {
        name: float(site["log_prob_sum"])
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def _check_frozen(state: State, saved: Mapping[str, Tensor]) -> None:
    """A frozen model is not restored: it must hold what the file does."""
    own = state.tensors()
    for name, tensor in state.snapshot().items():
        if name in own:
            continue
        if name not in saved or not torch.equal(tensor.cpu(), saved[name]):
            raise ValueError(f"the frozen model has other values of {name!r}")


def _noises(state: State) -> dict[str, dict[str, Any]]:
    """What tells a state's noises from others: a fitted program, which draws none, does not."""
    with state.installed():
        return noises(state.modules())


def _check_noises(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Noise has no parameters to be restored: the programs must have what the file has."""
    for name in sorted(own.keys() | saved.keys()):
        mine, theirs = (held.get(name, {"noise": None, "gamma": None}) for held in (own, saved))
        gamma, saved_gamma = mine["gamma"], theirs["gamma"]
        differ = mine["noise"] != theirs["noise"]
        if not differ and gamma is not None and saved_gamma is not None:
            differ = not torch.allclose(gamma, saved_gamma, rtol=1e-5, atol=1e-5)
        if differ:
            raise ValueError(
                f"{name!r} is {mine['noise']} there, and was {theirs['noise']} in the fit"
                f"{'' if mine['noise'] != theirs['noise'] else ', of another schedule'}"
            )


def _samples(trace: Trace) -> list[Any]:
    return [site for site in trace.nodes.values() if site["type"] == "sample"]


def _latent(trace: Trace) -> Draws:
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not _is_data(site)
        and not is_deterministic(site)
    }


def _deterministic(trace: Trace) -> Draws:
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and is_deterministic(site)
    }


def _is_data(site: Mapping[str, Any]) -> bool:
    return bool(site["infer"].get("was_observed"))


def _check_local(trace: Trace, plate: str) -> None:
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site) or is_deterministic(site):
            continue
        if not any(frame.name == plate for frame in site["cond_indep_stack"]):
            raise ValueError(
                f"data points are generated one by one, from sites inside plate {plate!r}, but"
                f" {name!r} stands outside it"
            )
        if is_partial(site):
            raise ValueError(
                f"site {name!r} is scaled by the program, which so draws some of its sites alone:"
                " it generates no data points, unless its model has a method `sample`, as DDPM's"
            )
