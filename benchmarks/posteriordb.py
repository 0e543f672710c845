r"""Nine posteriors of posteriordb: four guide families against reference draws.

    python benchmarks/posteriordb.py --data FOLDER [--out FILE]

posteriordb (github.com/stan-dev/posteriordb) holds Stan models, data, and draws from their
posteriors that can be relied on. Here nine of its models are Pyro programs. Each is fitted by four
of Pyro's autoguides and scored twice: by its own importance weights, and against the reference.

FOLDER holds one JSON file a case, `<posterior's name>.json` (a case without a file is left out):

    {"data": {...},     the posterior's data, as in posteriordb
     "summary": {"beta[1]": {"mean": ..., "sd": ..., "q05": ..., "q50": ..., "q95": ...}, ...}}

where `summary` describes the reference draws of each parameter; its mean and sd are read.

**Scales.** Flat priors count as zero in the log density, and a prior that is cut off (the order of
the mixture's means) is not renormalized, so evidences are those of Stan's programs up to constants.
Guides are Gaussian, or a flow of a Gaussian, on the unconstrained scale, which is Stan's: the
logarithm of what is positive, the logit of a probability, and the first mean and the logarithm of
the difference for ordered means. What a mean-field guide attains depends on it.

**Fits.** Parameters differ in scale by a factor of 1e5, and regressions without centring are nearly
collinear. So each fit starts at the Laplace approximation at the posterior's mode, cut down to
the family: `at_mode` gives an autoguide the coordinates of a fixed affine map that leaves the
family as it is (a diagonal one for mean-field and low-rank guides). A posterior without a mode
(eight schools, centred) is fitted in its own coordinates. SVI then does the rest.

**Score.** `compare`, from 10,000 draws. KL is the evidence less the family's ELBO; the evidence of
a case is the most precise estimate of a family whose k-hat is trusted, or the highest of all where
none is, since each is low in expectation: then KL is a bound (>=). The evidence of eight schools is
exact, by quadrature. Seconds are those of the fit. Against the reference: the largest difference of
a mean in reference standard deviations, and the smallest and largest ratio of a guide's standard
deviation to the reference's, over all parameters.

**Verdict.** The library trusts a guide's draws if k-hat is at most `khat_threshold`. The draws are
in truth right if every mean is within 0.2 reference standard deviations and every ratio of
standard deviations in [0.8, 1.25]. The verdict is right if the two agree.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    init_to_feasible,
)
from pyro.ops.hessian import hessian
from torch import Tensor
from torch.nn import functional as F

from pyro_vi import Comparison, Posterior, compare
from pyro_vi.diagnostics import khat_threshold

Data = dict[str, Tensor]

# Programs: observed sites stand in plate "data", and what the reference calls otherwise than the
# latent site is a deterministic site. They also run with a dimension of particles in front.


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    """Treatment effects of eight schools, drawn around a common mean (Rubin, 1981)."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    """The same posterior, with the effects in units of their spread."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("data", len(y)):
        eta = pyro.sample("eta", dist.Normal(y.new_tensor(0.0), 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidscore_interaction(y: Tensor, design: Tensor) -> None:
    """Children's test scores on the mother's school, her IQ and their product."""
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    beta = pyro.sample("beta", _flat(y, design.shape[-1]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(_linear(design, beta), sigma), obs=y)


def kidscore_interaction_c(y: Tensor, design: Tensor) -> None:
    """The same with covariates centred before the product, and a flat prior on sigma."""
    beta = pyro.sample("beta", _flat(y, design.shape[-1]))
    sigma = pyro.sample("sigma", _flat_positive(y))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(_linear(design, beta), sigma), obs=y)


def autoregression(y: Tensor, lagged: Tensor) -> None:
    """A series on its own K last values, the latest first."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_tensor(0.0), 10.0))
    prior = dist.Normal(y.new_tensor(0.0), 10.0).expand([lagged.shape[-1]]).to_event(1)
    beta = pyro.sample("beta", prior)
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(alpha + _linear(lagged, beta), sigma), obs=y)


def nes(y: Tensor, design: Tensor) -> None:
    """Party identification on ideology, race, age, education, gender and income."""
    beta = pyro.sample("beta", _flat(y, design.shape[-1]))
    sigma = pyro.sample("sigma", _flat_positive(y))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(_linear(design, beta), sigma), obs=y)


def diamonds(y: Tensor, centred: Tensor) -> None:
    """Log prices of diamonds on 24 nearly collinear covariates, less their means."""
    prior = dist.Normal(y.new_tensor(0.0), 1.0).expand([centred.shape[-1]]).to_event(1)
    b = pyro.sample("b", prior)
    intercept = pyro.sample("Intercept", dist.StudentT(y.new_tensor(3.0), 8.0, 10.0))
    sigma = pyro.sample("sigma", HalfStudentT(y.new_tensor(3.0), 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(intercept + _linear(centred, b), sigma), obs=y)


def low_dim_gauss_mix(y: Tensor) -> None:
    """A mixture of two normals, its components summed out and its means in order."""
    ordered = dist.transforms.OrderedTransform()
    start = dist.Normal(y.new_zeros(2), 1.0).to_event(1)
    mu = pyro.sample("mu", dist.TransformedDistribution(start, [ordered]).mask(False))
    pyro.factor("mu_prior", dist.Normal(y.new_tensor(0.0), 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(2.0)).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), 5.0))
    component = dist.Categorical(probs=torch.stack([theta, 1 - theta], dim=-1))
    with pyro.plate("data", len(y)):
        mixture = dist.MixtureSameFamily(component, dist.Normal(mu, sigma))
        pyro.sample("y", mixture, obs=y)


def gp_pois_regr(k: Tensor, x: Tensor) -> None:
    """Counts whose log rate is a Gaussian process, in units of its Cholesky factor."""
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))
    f_tilde = pyro.sample("f_tilde", dist.Normal(x.new_zeros(len(x)), 1.0).to_event(1))
    scaled = (x[:, None] - x) / rho[..., None, None]
    covariance = alpha[..., None, None].square() * torch.exp(-0.5 * scaled.square())
    covariance = covariance + 1e-10 * torch.eye(len(x)).to(x)
    factor = torch.linalg.cholesky(covariance)
    f = (factor @ f_tilde[..., None]).squeeze(-1)
    f = pyro.deterministic("f", f, event_dim=1)
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Poisson(_over_data(f).exp()), obs=k)


class HalfStudentT(dist.FoldedDistribution):
    """The absolute value of a Student t around zero.

    Args:
        df: degrees of freedom.
        scale: the scale.
    """

    def __init__(self, df: Tensor, scale: float) -> None:
        super().__init__(dist.StudentT(df, 0.0, scale))


def _flat(like: Tensor, size: int) -> Any:
    """A flat prior on R^size. Its log density is zero; the normal is there to draw a start."""
    return dist.Normal(like.new_zeros(size), 1.0).to_event(1).mask(False)


def _flat_positive(like: Tensor) -> Any:
    """A flat prior on positive numbers."""
    return dist.LogNormal(like.new_tensor(0.0), 1.0).mask(False)


def _linear(design: Tensor, coefficients: Tensor) -> Tensor:
    """design @ coefficients over the data, for each particle."""
    return _over_data(F.linear(coefficients, design))


def _over_data(values: Tensor) -> Tensor:
    """Moves an event's axis to plate "data": particles lie to the left of the plate's own axis."""
    return values if values.dim() == 1 else values.squeeze(-2)


# Data: what posteriordb stores -> arguments of a program, in double precision


def _columns(raw: Mapping[str, Any], *names: str) -> list[Tensor]:
    return [torch.as_tensor(raw[name], dtype=torch.float64) for name in names]


def schools_data(raw: Mapping[str, Any]) -> Data:
    """Effects and their standard errors."""
    y, sigma = _columns(raw, "y", "sigma")
    return {"y": y, "sigma": sigma}


def kidscore_data(raw: Mapping[str, Any], *, centred: bool) -> Data:
    """Scores, and the columns 1, school, IQ and product."""
    y, school, iq = _columns(raw, "kid_score", "mom_hs", "mom_iq")
    if centred:
        school, iq = school - school.mean(), iq - iq.mean()
    design = torch.stack([torch.ones_like(y), school, iq, school * iq], dim=-1)
    return {"y": y, "design": design}


def autoregression_data(raw: Mapping[str, Any]) -> Data:
    """The series from K on, and the K values before each."""
    (y,) = _columns(raw, "y")
    lags = int(raw["K"])
    lagged = torch.stack([y[lags - k : len(y) - k] for k in range(1, lags + 1)], dim=-1)
    return {"y": y[lags:], "lagged": lagged}


def nes_data(raw: Mapping[str, Any]) -> Data:
    """Party identification and nine columns, three of them for ages."""
    y, ideology, race, age = _columns(raw, "partyid7", "real_ideo", "race_adj", "age_discrete")
    ages = [(age == group).to(y) for group in (2, 3, 4)]
    rest = _columns(raw, "educ1", "gender", "income")
    design = torch.stack([torch.ones_like(y), ideology, race, *ages, *rest], dim=-1)
    return {"y": y, "design": design}


def diamonds_data(raw: Mapping[str, Any]) -> Data:
    """Log prices, and the covariates but the first (ones) less their means."""
    y, design = _columns(raw, "Y", "X")
    return {"y": y, "centred": design[:, 1:] - design[:, 1:].mean(0)}


def mixture_data(raw: Mapping[str, Any]) -> Data:
    """The draws of the mixture."""
    return dict(zip(["y"], _columns(raw, "y"), strict=True))


def gp_data(raw: Mapping[str, Any]) -> Data:
    """Counts and where they were made."""
    return dict(zip(["k", "x"], _columns(raw, "k", "x"), strict=True))


@dataclass(frozen=True)
class Case:
    """A posterior of posteriordb.

    Attributes:
        file: its file's name.
        model: its program.
        prepare: data as stored -> the program's arguments.
        steps: of SVI.
        evidence: data -> the exact log evidence, where a quadrature gives it.
    """

    file: str
    model: Callable[..., None]
    prepare: Callable[[Mapping[str, Any]], Data]
    steps: int = 2_000
    evidence: Callable[[Data], float] | None = None


def schools_evidence(data: Data) -> float:
    """log p(y) of eight schools: mu and theta integrate out, and tau by the midpoint rule.

    With u uniform, tau = 5 tan(pi u / 2) has the half-Cauchy prior, and y given tau is normal.
    """
    y, sigma = data["y"].double(), data["sigma"].double()
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    tau = 5 * (math.pi / 2 * u).tan()
    covariance = 25 + torch.diag_embed(sigma**2 + tau[:, None] ** 2)
    density = dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
    return float(density.logsumexp(0)) - math.log(len(u))


CASES = {
    "eight_schools centred": Case(
        "eight_schools-eight_schools_centered",
        eight_schools_centered,
        schools_data,
        evidence=schools_evidence,
    ),
    "eight_schools non-centred": Case(
        "eight_schools-eight_schools_noncentered",
        eight_schools_noncentered,
        schools_data,
        evidence=schools_evidence,
    ),
    "kidscore_interaction": Case(
        "kidiq-kidscore_interaction", kidscore_interaction, partial(kidscore_data, centred=False)
    ),
    "kidscore_interaction_c": Case(
        "kidiq_with_mom_work-kidscore_interaction_c",
        kidscore_interaction_c,
        partial(kidscore_data, centred=True),
    ),
    "arK": Case("arK-arK", autoregression, autoregression_data),
    "nes1980": Case("nes1980-nes", nes, nes_data),
    "diamonds": Case("diamonds-diamonds", diamonds, diamonds_data),
    "low_dim_gauss_mix": Case(
        "low_dim_gauss_mix-low_dim_gauss_mix", low_dim_gauss_mix, mixture_data
    ),
    "gp_pois_regr": Case("gp_pois_regr-gp_pois_regr", gp_pois_regr, gp_data, steps=5_000),
}

# Guides: Pyro's autoguides in the coordinates of an affine map


class AtMode(AutoContinuous):
    """An autoguide whose own coordinates are those of a fixed affine map of the latents.

    Attributes:
        centre: where its zero lies, on the unconstrained scale, shape (d,).
        spread: the lower triangular matrix of the map, shape (d, d).
    """

    centre: Tensor
    spread: Tensor

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """The family's distribution, mapped."""
        affine = dist.transforms.LowerCholeskyAffine(self.centre, self.spread, cache_size=1)
        return dist.TransformedDistribution(super().get_posterior(*args, **kwargs), [affine])

    def _loc_scale(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("medians and quantiles are not mapped: use draws")


class MeanField(AtMode, AutoDiagonalNormal):
    """AutoDiagonalNormal."""


class FullCovariance(AtMode, AutoMultivariateNormal):
    """AutoMultivariateNormal."""


class LowRank(AtMode, AutoLowRankMultivariateNormal):
    """AutoLowRankMultivariateNormal, of Pyro's default rank: about the square root of d."""


class Flow(AtMode, AutoIAFNormal):
    """AutoIAFNormal, of one affine autoregressive layer."""


FAMILIES: dict[str, type[AtMode]] = {
    "mean-field": MeanField,
    "full covariance": FullCovariance,
    "low-rank": LowRank,
    "IAF": Flow,
}


@dataclass(frozen=True)
class Laplace:
    """The quadratic approximation of a log density at its mode.

    Attributes:
        mode: on the unconstrained scale, shape (d,).
        precision: the negative Hessian there, shape (d, d).
    """

    mode: Tensor
    precision: Tensor


def laplace(model: Callable[..., None], data: Data, *, steps: int = 100) -> Laplace | None:
    """Newton's method with the Hessian made positive; None if it finds no mode."""
    point = AutoLaplaceApproximation(model, init_loc_fn=init_to_feasible)
    point._setup_prototype(**data)
    loc, elbo = point.loc, Trace_ELBO()

    def energy(at: Tensor) -> Tensor:
        loc.data.copy_(at)
        return elbo.differentiable_loss(model, point, **data)

    loss = energy(loc.detach().clone())
    for _ in range(steps):
        at = loc.detach().clone()
        (gradient,) = torch.autograd.grad(loss, loc, retain_graph=True)
        precision = hessian(loss, loc)
        values, vectors = torch.linalg.eigh((precision + precision.mT) / 2)
        positive = values.abs().clamp(min=1e-8 * float(values.abs().max()))
        step = vectors @ ((vectors.mT @ gradient) / positive)
        decrement = float(gradient @ step)
        size, least = 1.0, float(loss.detach())
        while size > 1e-10:
            loss = energy(at - size * step)
            if float(loss.detach()) < least - 1e-4 * size * decrement:
                break
            size /= 2
        if decrement < 1e-10 or size <= 1e-10:
            found = decrement < 1e-6 and bool((values > 0).all())
            return Laplace(at, precision) if found else None
    return None


def at_mode(
    family: type[AtMode], model: Callable[..., None], data: Data, start: Laplace | None
) -> AtMode:
    """A guide that starts at a Laplace approximation, cut down to the family.

    The map's matrix is the Cholesky factor of the approximation's covariance for full covariances
    and flows. For mean-field and low-rank guides, which it would change, it is diagonal: the
    standard deviations. There the guide starts at the best of its family for a normal target, or
    close to it: with the precision P scaled to a unit diagonal, and its eigenvalues l_i in rising
    order, at the covariance 1 (mean-field) or c I + sum_{i <= r} (1 / l_i - c) u_i u_i'
    (low-rank), c the inverse mean of the other eigenvalues.

    Args:
        family: one of `FAMILIES`.
        model: the program.
        data: its arguments.
        start: the approximation; None starts near zero, in the latents' own coordinates.
    """
    guide = family(model) if issubclass(family, Flow) else family(model, init_scale=1.0)
    guide._setup_prototype(**data)
    zero = guide._init_loc()
    covariance = torch.eye(len(zero)) if start is None else torch.linalg.inv(start.precision)
    whitened = isinstance(guide, (FullCovariance, Flow))
    spread = torch.linalg.cholesky(covariance) if whitened else covariance.diagonal().sqrt().diag()
    guide.register_buffer("centre", zero if start is None else start.mode)
    guide.register_buffer("spread", spread)
    if not isinstance(guide, Flow):
        guide.loc.data.zero_()
    if start is not None and not whitened:
        conditional = start.precision.diagonal().rsqrt()
        scale = conditional / spread.diagonal()
        if isinstance(guide, LowRank):
            rank = guide.rank
            values, vectors = torch.linalg.eigh(
                conditional[:, None] * start.precision * conditional
            )
            rest = 1 / values[rank:].mean()
            excess = (1 / values[:rank] / rest - 1).clamp(min=1e-4)
            guide.cov_factor.data.copy_(vectors[:, :rank] * excess.sqrt())
            scale = scale * rest.sqrt()
        guide.scale = scale
    return guide


def compared(
    case: Case,
    data: Data,
    start: Laplace | None,
    families: Sequence[str],
    *,
    steps: int,
    num_samples: int,
) -> Comparison:
    """The families by SVI, with one setting for all: Adam, its rate falling to zero."""
    pyro.set_rng_seed(0)
    return compare(
        case.model,
        {name: at_mode(FAMILIES[name], case.model, data, start) for name in families},
        data,
        num_samples=num_samples,
        loss=Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1),
        optim=partial(torch.optim.Adam, lr=0.05),
        schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        steps=steps,
        progress=False,
    )


@dataclass(frozen=True)
class Errors:
    """A posterior's marginals against the reference.

    Attributes:
        mean: the largest difference of means, in reference standard deviations.
        sd_least, sd_most: the extreme ratios of standard deviations, guide's to reference's.
    """

    mean: float
    sd_least: float
    sd_most: float

    @property
    def small(self) -> bool:
        """Whether the draws are in truth right."""
        return self.mean < 0.2 and self.sd_least >= 0.8 and self.sd_most <= 1.25


def errors_of(posterior: Posterior, summary: Mapping[str, Mapping[str, float]]) -> Errors:
    """Errors over all parameters of a reference: mean and sd by name, "mu" or "theta[1]"."""
    values = posterior.sites
    draws = {name: parameter(values, name) for name in summary}
    ratios = [float(draws[name].std()) / held["sd"] for name, held in summary.items()]
    means = [
        abs(float(draws[name].mean()) - held["mean"]) / held["sd"] for name, held in summary.items()
    ]
    return Errors(max(means), min(ratios), max(ratios))


def parameter(values: Mapping[str, Tensor], name: str) -> Tensor:
    """The draws of a parameter by Stan's name for it, such as "theta[1]", shape (S,)."""
    match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", name)
    if match is None or match[1] not in values:
        raise ValueError(f"the program has no site for parameter {name!r}: {sorted(values)}")
    site = values[match[1]]
    return site.reshape(len(site), -1)[:, int(match[2] or 1) - 1]


HEADER = (
    "case",
    "family",
    "KL (nats)",
    "k-hat",
    "mean error (sd)",
    "sd ratio",
    "trusted",
    "verdict right?",
    "seconds",
)


def rows(
    case: str,
    result: Comparison,
    summary: Mapping[str, Mapping[str, float]],
    evidence: float | None = None,
) -> list[tuple[str, ...]]:
    """The table's rows of a case; with its exact evidence, if that is known."""
    trusted = khat_threshold(result.num_samples)
    known = evidence is not None or min(row.khat_median for row in result.rows) <= trusted
    bound = "" if known else ">= "
    found: list[tuple[str, ...]] = []
    for row in result.rows:
        kl, error = (
            (row.gap, row.gap_se) if evidence is None else (evidence - row.elbo, row.elbo_se)
        )
        errors = errors_of(result.posteriors[row.family], summary)
        right = (row.khat_median <= trusted) == errors.small
        found.append(
            (
                case,
                row.family,
                f"{bound}{kl:.3f} ± {error:.3f}",
                f"{row.khat_median:.2f}",
                f"{errors.mean:.2f}",
                f"{errors.sd_least:.3f} to {errors.sd_most:.3f}",
                "yes" if row.khat_median <= trusted else "no",
                "yes" if right else "no",
                f"{result.fits[row.family].seconds:.0f}",
            )
        )
    return found


def table(body: Sequence[Sequence[str]]) -> str:
    """A Markdown table under `HEADER`."""
    rule = [":--", ":--", *["--:"] * (len(HEADER) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (HEADER, rule, *body)) + "\n"


@contextmanager
def double_precision() -> Iterator[None]:
    """New tensors in float64, which lazily built guides need."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of JSON files")
    parser.add_argument("--out", type=Path, help="where the table is written, too")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--steps", type=int, help="of SVI (default: 2,000; gp_pois_regr 5,000)")
    parser.add_argument("--draws", type=int, default=10_000, help="to score (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    body: list[tuple[str, ...]] = []
    for name in options.case:
        file = options.data / f"{CASES[name].file}.json"
        if not file.exists():
            print(f"{name}: no {file}", flush=True)
            continue
        stored = json.loads(file.read_text(encoding="utf-8"))
        case = CASES[name]
        data = case.prepare(stored["data"])
        with double_precision():
            start = laplace(case.model, data)
            print(f"\n{name} ({'a' if start else 'no'} mode)", flush=True)
            result = compared(
                case,
                data,
                start,
                options.family,
                steps=options.steps or case.steps,
                num_samples=options.draws,
            )
        print(result, flush=True)
        exact = case.evidence(data) if case.evidence else None
        if exact is not None:
            print(f"exact evidence: {exact:.3f} nats", flush=True)
        body.extend(rows(name, result, stored["summary"], exact))
    if not body:
        raise SystemExit(f"none of the cases' files are in {options.data}")
    print(f"\n{table(body)}\n{time.perf_counter() - started:.0f} s in all")
    if options.out is not None:
        options.out.write_text(table(body), encoding="utf-8")


if __name__ == "__main__":
    main()
