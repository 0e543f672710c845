"""The benchmark on posteriordb: its programs against SciPy, and a run from a folder to a table."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from scipy import stats
from torch.distributions import biject_to

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "posteriordb.py"
RNG = np.random.default_rng(0)
N = 12


def load() -> ModuleType:
    """The benchmark, which is no package, by its path."""
    spec = importlib.util.spec_from_file_location("posteriordb_benchmark", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = load()

RAW: dict[str, dict[str, Any]] = {
    "eight_schools": {"y": RNG.integers(-5, 30, 8), "sigma": RNG.integers(9, 19, 8)},
    "kidscore": {
        "kid_score": RNG.integers(20, 140, N),
        "mom_hs": np.arange(N) % 2,
        "mom_iq": RNG.uniform(70, 140, N),
    },
    "arK": {"K": 3, "T": N, "y": RNG.normal(size=N)},
    "nes": {
        "partyid7": RNG.integers(1, 8, N),
        "real_ideo": RNG.integers(1, 8, N),
        "race_adj": RNG.choice([1.0, 1.5, 2.0], N),
        "age_discrete": np.arange(N) % 4 + 1,
        "educ1": RNG.integers(1, 5, N),
        "gender": RNG.integers(1, 3, N),
        "income": RNG.integers(1, 6, N),
    },
    "diamonds": {
        "Y": RNG.normal(8.0, 1.0, N),
        "X": np.column_stack([np.ones(N), RNG.normal(size=(N, 24))]),
    },
    "low_dim_gauss_mix": {"y": RNG.choice([-2.7, 2.9], N) + RNG.normal(size=N)},
    "gp_pois_regr": {"x": np.arange(-5, 6), "k": RNG.integers(3, 80, 11)},
}
RAW = {  # as it comes from JSON
    name: {key: value if np.isscalar(value) else value.tolist() for key, value in raw.items()}
    for name, raw in RAW.items()
}

Values = Mapping[str, Any]


def schools(raw: Values, at: Values, *, centred: bool) -> float:
    theta = at["theta"] if centred else at["mu"] + at["tau"] * at["eta"]
    local = stats.norm(at["mu"], at["tau"]).logpdf(theta) if centred else normal(at["eta"])
    return float(
        stats.norm(0, 5).logpdf(at["mu"])
        + stats.halfcauchy(scale=5).logpdf(at["tau"])
        + local.sum()
        + stats.norm(theta, raw["sigma"]).logpdf(raw["y"]).sum()
    )


def kidscore(raw: Values, at: Values, *, centred: bool) -> float:
    school, iq = np.array(raw["mom_hs"], float), np.array(raw["mom_iq"])
    if centred:
        school, iq = school - school.mean(), iq - iq.mean()
    b1, b2, b3, b4 = at["beta"]
    mean = b1 + b2 * school + b3 * iq + b4 * school * iq
    prior = 0.0 if centred else stats.halfcauchy(scale=2.5).logpdf(at["sigma"])
    return float(prior + stats.norm(mean, at["sigma"]).logpdf(raw["kid_score"]).sum())


def autoregression(raw: Values, at: Values) -> float:
    y, total = raw["y"], stats.halfcauchy(scale=2.5).logpdf(at["sigma"])
    total += stats.norm(0, 10).logpdf([at["alpha"], *at["beta"]]).sum()
    for t in range(raw["K"], len(y)):
        mean = at["alpha"] + sum(at["beta"][k - 1] * y[t - k] for k in range(1, raw["K"] + 1))
        total += stats.norm(mean, at["sigma"]).logpdf(y[t])
    return float(total)


def nes(raw: Values, at: Values) -> float:
    total = 0.0
    for row in range(N):
        one = {name: column[row] for name, column in raw.items()}
        mean = at["beta"][0] + at["beta"][1] * one["real_ideo"] + at["beta"][2] * one["race_adj"]
        if one["age_discrete"] > 1:
            mean += at["beta"][one["age_discrete"] + 1]
        mean += at["beta"][6:] @ [one["educ1"], one["gender"], one["income"]]
        total += stats.norm(mean, at["sigma"]).logpdf(one["partyid7"])
    return float(total)


def diamonds(raw: Values, at: Values) -> float:
    design = np.array(raw["X"])[:, 1:]
    mean = at["Intercept"] + (design - design.mean(0)) @ at["b"]
    return float(
        normal(at["b"]).sum()
        + stats.t(3, 8, 10).logpdf(at["Intercept"])
        + np.log(2)
        + stats.t(3, 0, 10).logpdf(at["sigma"])
        + stats.norm(mean, at["sigma"]).logpdf(raw["Y"]).sum()
    )


def mixture(raw: Values, at: Values) -> float:
    one, two = (stats.norm(m, s).pdf(raw["y"]) for m, s in zip(at["mu"], at["sigma"], strict=True))
    return float(
        stats.norm(0, 2).logpdf(at["mu"]).sum()
        + stats.halfnorm(scale=2).logpdf(at["sigma"]).sum()
        + stats.beta(5, 5).logpdf(at["theta"])
        + np.log(at["theta"] * one + (1 - at["theta"]) * two).sum()
    )


def process(raw: Values, at: Values) -> float:
    x = np.array(raw["x"], float)
    kernel = at["alpha"] ** 2 * np.exp(-((x[:, None] - x) ** 2) / (2 * at["rho"] ** 2))
    f = np.linalg.cholesky(kernel + 1e-10 * np.eye(len(x))) @ at["f_tilde"]
    return float(
        stats.gamma(25, scale=1 / 4).logpdf(at["rho"])
        + stats.halfnorm(scale=2).logpdf(at["alpha"])
        + normal(at["f_tilde"]).sum()
        + stats.poisson(np.exp(f)).logpmf(raw["k"]).sum()
    )


def normal(values: Any) -> Any:
    return stats.norm.logpdf(values)


def some(size: int) -> Any:
    return RNG.normal(scale=0.5, size=size)


# case -> its data, a point, and the log density there by hand
DENSITIES: dict[str, tuple[str, Values, Callable[[Values, Values], float]]] = {
    "eight_schools centred": (
        "eight_schools",
        {"mu": 4.0, "tau": 3.0, "theta": 5 + 3 * some(8)},
        lambda raw, at: schools(raw, at, centred=True),
    ),
    "eight_schools non-centred": (
        "eight_schools",
        {"mu": 4.0, "tau": 3.0, "eta": some(8)},
        lambda raw, at: schools(raw, at, centred=False),
    ),
    "kidscore_interaction": (
        "kidscore",
        {"sigma": 18.0, "beta": np.array([-11.0, 51.0, 0.9, -0.5])},
        lambda raw, at: kidscore(raw, at, centred=False),
    ),
    "kidscore_interaction_c": (
        "kidscore",
        {"sigma": 18.0, "beta": np.array([87.0, 2.9, 0.6, -0.5])},
        lambda raw, at: kidscore(raw, at, centred=True),
    ),
    "arK": ("arK", {"alpha": 0.1, "beta": some(3), "sigma": 0.7}, autoregression),
    "nes1980": ("nes", {"beta": some(9), "sigma": 1.8}, nes),
    "diamonds": ("diamonds", {"b": some(24), "Intercept": 7.8, "sigma": 0.6}, diamonds),
    "low_dim_gauss_mix": (
        "low_dim_gauss_mix",
        {"mu": np.array([-2.5, 2.7]), "sigma": np.array([1.1, 0.9]), "theta": 0.6},
        mixture,
    ),
    # a short length scale: a nearly singular covariance would amplify rounding
    "gp_pois_regr": ("gp_pois_regr", {"rho": 1.2, "alpha": 2.0, "f_tilde": some(11)}, process),
}


@pytest.fixture
def double() -> Iterator[None]:
    with bench.double_precision():
        yield


def test_every_case_is_tested() -> None:
    assert DENSITIES.keys() == bench.CASES.keys()


@pytest.mark.parametrize("name", DENSITIES)
def test_log_density_equals_scipy(name: str) -> None:
    case = bench.CASES[name]
    raw, at, by_hand = DENSITIES[name]
    data = case.prepare(RAW[raw])
    values = {site: torch.as_tensor(value, dtype=torch.float64) for site, value in at.items()}
    trace = poutine.trace(poutine.condition(case.model, data=values)).get_trace(**data)
    assert float(trace.log_prob_sum()) == pytest.approx(by_hand(RAW[raw], at), abs=1e-8, rel=1e-12)
    assert all(site in trace for site in at)


@pytest.mark.parametrize("name", DENSITIES)
def test_every_program_runs_with_an_autoguide(name: str, double: None) -> None:
    case = bench.CASES[name]
    data = case.prepare(RAW[DENSITIES[name][0]])
    guide = AutoDiagonalNormal(case.model)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert all(np.isfinite(svi.step(**data)) for _ in range(2))


def test_latents_are_unconstrained_as_stan_does() -> None:
    name = "low_dim_gauss_mix"
    case = bench.CASES[name]
    trace = poutine.trace(case.model).get_trace(**case.prepare(RAW[name]))
    raw = torch.tensor([0.3, -1.2])
    ordered = biject_to(trace.nodes["mu"]["fn"].support)(raw)
    assert torch.allclose(ordered, torch.stack([raw[0], raw[0] + raw[1].exp()]))
    positive = biject_to(trace.nodes["sigma"]["fn"].support)(raw)
    assert torch.allclose(positive, raw.exp())


def test_laplace_is_exact_for_a_normal_posterior(double: None) -> None:
    precision = torch.tensor([[2.0, 0.9], [0.9, 1.0]])
    centre = torch.tensor([3.0, -1.0])

    def model() -> None:
        z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1).mask(False))
        target = pyro.distributions.MultivariateNormal(centre, precision_matrix=precision)
        pyro.factor("density", target.log_prob(z))

    found = bench.laplace(model, {})
    assert torch.allclose(found.mode, centre)
    assert torch.allclose(found.precision, precision)
    guide = bench.at_mode(bench.FullCovariance, model, {}, found)
    posterior = guide.get_posterior()
    z = torch.tensor([2.5, 0.5])
    target = torch.distributions.MultivariateNormal(centre, precision_matrix=precision)
    # the guide starts with a scale of init_scale = 1 in the map's coordinates: the target itself
    assert torch.allclose(posterior.log_prob(z), target.log_prob(z))
    narrow = bench.at_mode(bench.MeanField, model, {}, found).get_posterior()
    sds = narrow.sample((4_000,)).std(0)
    assert torch.allclose(sds, precision.diagonal().rsqrt(), rtol=0.1)
    low = bench.at_mode(bench.LowRank, model, {}, found).get_posterior().sample((20_000,))
    assert torch.allclose(low.T.cov(), torch.linalg.inv(precision), atol=0.1)


def test_a_posterior_without_a_mode() -> None:
    case = bench.CASES["eight_schools centred"]
    with bench.double_precision():
        data = case.prepare(RAW["eight_schools"])
        assert bench.laplace(case.model, data, steps=20) is None


def test_parameters_by_stans_names() -> None:
    values = {"beta": np.arange(6.0).reshape(2, 3), "mu": np.array([7.0, 8.0])}
    assert bench.parameter(values, "beta[3]").tolist() == [2.0, 5.0]
    assert bench.parameter(values, "mu").tolist() == [7.0, 8.0]
    with pytest.raises(ValueError, match="no site for parameter 'tau'"):
        bench.parameter(values, "tau")


def test_from_a_folder_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"beta[{k}]" for k in range(1, 5)] + ["sigma"]
    stored = {
        "data": RAW["kidscore"],
        "summary": {name: {"mean": 0.5, "sd": 2.0} for name in names},
    }
    file = tmp_path / f"{bench.CASES['kidscore_interaction_c'].file}.json"
    file.write_text(json.dumps(stored))
    out = tmp_path / "table.md"
    cases = ["kidscore_interaction", "kidscore_interaction_c"]
    bench.main(
        [
            *("--data", str(tmp_path), "--out", str(out), "--case", *cases),
            *("--steps", "3", "--draws", "100"),
        ]
    )
    printed = capsys.readouterr().out
    assert "kidscore_interaction: no " in printed  # its file is missing
    lines = out.read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == list(bench.FAMILIES)
    assert out.read_text() in printed
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(SystemExit, match="none of the cases"):
        bench.main(["--data", str(tmp_path / "nowhere")])


def test_the_evidence_of_eight_schools_is_exact() -> None:
    """Against plain Monte Carlo over the prior of mu and tau, with theta integrated out."""
    y, sigma = [28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18]
    data = bench.schools_data({"y": y, "sigma": sigma})
    num = 1_000_000
    mu = 5 * torch.randn(num, 1).double()
    tau = dist.HalfCauchy(torch.tensor(5.0).double()).sample((num, 1))
    scale = (data["sigma"].double() ** 2 + tau**2).sqrt()
    weights = dist.Normal(mu, scale).log_prob(data["y"].double()).sum(1).exp()
    se = float(weights.std() / weights.mean()) / math.sqrt(num)
    assert se < 0.005
    expected = math.log(float(weights.mean()))
    assert bench.schools_evidence(data) == pytest.approx(expected, abs=5 * se)
