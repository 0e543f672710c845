"""Which posterior of a linear regression? Six guides on real data, and the exact answer.

442 patients: ten measurements each, and how far their diabetes went in the year after (Efron and
others, 2004; scikit-learn has the data). The model is the plainest there is,

    y ~ N(w'x, sigma),    w ~ N(0, 1),    sigma ~ HalfNormal(1),

all columns scaled to mean 0 and standard deviation 1 on the training data. Given sigma the
posterior of w is a normal, and sigma is a single number, so that a sum over a fine grid of it gives
the exact log evidence and exact draws: the reference for every guide.

Some of the measurements say nearly the same: total and LDL cholesterol have a correlation of 0.9.
Their two weights are hardly known apart, and well known together. What to look at in the table:
the gap to the evidence, k-hat, the sd error (the worst of all weights and sigma) and the log
predictive density of patients that no guide has seen, with the difference to the first guide.
Mean-field, which has no correlations, loses almost four nats, and its sd of the cholesterol weights
is a seventh of what it should be: k-hat tells without the exact answer. The three guides with a
full covariance lose about a tenth of one. Yet all predict alike, mean-field and even a single
point: with 342 patients and 11 weights it is not predictions that a narrow posterior spoils, but
what one says about the weights.

It prints the table and its verdict, the sd of two weights under each guide, and how many of the
unseen patients are inside their 90% intervals. The figure shows the two weights, and the intervals.

    python examples/regression_families.py
"""

import argparse
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)
from sklearn.datasets import load_diabetes
from torch import Tensor
from torch.distributions import constraints
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import compare

DRAWS = 4_000  # from each guide, and of the exact posterior
TEST = 100  # patients that no guide sees

parser = argparse.ArgumentParser(description="Six guides of a Bayesian linear regression.")
parser.add_argument("--steps", type=int, default=1_000, help="gradient steps for each fit")
parser.add_argument(
    "--out", type=Path, default=Path("runs/regression_families.png"), help="the figure"
)
options = parser.parse_args()

# Matrices this small are done before a second thread has woken up.
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)  # of the split and of the exact draws; `compare` takes its own seed

loaded = load_diabetes(scaled=False)
names = ["intercept", *loaded.feature_names]
order = torch.randperm(len(loaded.target))
x, y = torch.from_numpy(loaded.data)[order], torch.from_numpy(loaded.target)[order]
x = (x - x[TEST:].mean(0)) / x[TEST:].std(0)
y = (y - y[TEST:].mean()) / y[TEST:].std()
x = torch.cat([torch.ones(len(x), 1), x], dim=1)
patients = SimpleNamespace(train=(x[TEST:], y[TEST:]), test=(x[:TEST], y[:TEST]))


def model(x: Tensor, y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * weights).sum(-1), sigma), obs=y)


def by_hand(x: Tensor, y: Tensor) -> None:
    """A normal with any covariance for the weights, and sigma apart from them."""
    size = x.shape[1]
    loc = pyro.param("weights_loc", torch.zeros(size))
    tril = pyro.param("weights_tril", 0.1 * torch.eye(size), constraint=constraints.lower_cholesky)
    pyro.sample("weights", dist.MultivariateNormal(loc, scale_tril=tril))
    log_sigma = pyro.param("log_sigma_loc", torch.tensor(0.0))
    spread = pyro.param("log_sigma_scale", torch.tensor(0.1), constraint=constraints.positive)
    pyro.sample("sigma", dist.LogNormal(log_sigma, spread))


def exact(x: Tensor, y: Tensor, num: int) -> tuple[float, dict[str, Tensor]]:
    """The log evidence, and draws of the posterior.

    log p(y | sigma) is that of N(0, X X' + sigma^2 I), and w given sigma and y is normal.
    """
    step = 1e-3
    grid = torch.arange(0.3, 1.5, step)
    marginal = dist.LowRankMultivariateNormal(torch.zeros(len(y)), x, (grid**2)[:, None] + 0 * y)
    joint = dist.HalfNormal(1.0).log_prob(grid) + marginal.log_prob(y)
    sigma = grid[torch.multinomial(joint.softmax(0), num, replacement=True)]
    precision = torch.eye(x.shape[1]) + x.T @ x / sigma[:, None, None] ** 2
    mean = torch.linalg.solve(precision, (y @ x) / sigma[:, None] ** 2)
    weights = dist.MultivariateNormal(mean, precision_matrix=precision).sample()
    return float(joint.logsumexp(0)) + math.log(step), {"weights": weights, "sigma": sigma}


evidence, reference = exact(*patients.train, DRAWS)

# Any guide of Pyro's, or one's own. The first is what the differences in the table are to.
result = compare(
    model,
    {
        "mean-field": AutoDiagonalNormal(model),
        "low-rank": AutoLowRankMultivariateNormal(model, rank=3),
        "full covariance": AutoMultivariateNormal(model),
        "by hand": by_hand,
        "Laplace": AutoLaplaceApproximation(model),
        "point": AutoDelta(model),
    },
    patients,
    num_samples=DRAWS,
    reference=reference,
    loss=Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1),
    optim=partial(torch.optim.Adam, lr=0.1),
    schedule=partial(CosineAnnealingLR, T_max=options.steps),
    steps=options.steps,
    progress=False,
)
print(f"exact log evidence of {len(patients.train[1])} patients: {evidence:.2f} nats\n")
print(f"{result}\n", flush=True)

# What a person reads off the posterior: which measurements matter, and how sure that is.
train = patients.train[0]
s1, s2 = names.index("s1"), names.index("s2")
correlation = torch.corrcoef(train[:, [s1, s2]].T)[0, 1]
print(
    f"Total cholesterol (s1) and LDL (s2) have a correlation of {correlation:.2f}. What each"
    " posterior says of their weights:\n"
)
print(f"{'':17}{'s1':>15}{'s2':>15}{'s1 + s2':>15}")
drawn = {name: posterior.draws["weights"] for name, posterior in result.posteriors.items()}
for name, weights in {**drawn, "exact": reference["weights"]}.items():
    first, second = weights[:, s1], weights[:, s2]
    cells = [f"{v.mean():.2f} ± {v.std():.2f}" for v in (first, second, first + second)]
    print(f"{name:17}" + "".join(f"{cell:>15}" for cell in cells))

# Predictions are draws of y for patients that were not in the fit: the spread of the weights and
# the noise sigma are both in them. `y` itself plays no part: it is drawn anew.
print(f"\nOf {TEST} unseen patients, inside their 90% intervals:")
intervals = {}
for name, fitted in result.fits.items():
    draws = fitted.predict(patients.test, 2_000)["y"]
    low, high = draws.quantile(torch.tensor([0.05, 0.95]), dim=0)
    inside = (low <= patients.test[1]) & (patients.test[1] <= high)
    intervals[name] = low, high
    print(f"  {name:15}{inside.sum():5}, mean width {(high - low).mean():.2f}")

# The picture: the two weights under three posteriors, and the intervals of the full covariance.
figure = Figure(figsize=(11, 4.6), layout="constrained")
left, right = figure.subplots(1, 2)


def ellipse(draws: np.ndarray, mass: float) -> np.ndarray:
    """The contour that holds `mass` of the normal with the draws' mean and covariance, (2, 200)."""
    angle = np.linspace(0, 2 * math.pi, 200)
    circle = math.sqrt(-2 * math.log(1 - mass)) * np.stack([np.cos(angle), np.sin(angle)])
    return draws.mean(0)[:, None] + np.linalg.cholesky(np.cov(draws.T)) @ circle


shown = {
    "exact draws": (reference["weights"], "0.6"),
    "mean-field": (drawn["mean-field"], "#0072B2"),
    "full covariance": (drawn["full covariance"], "#D55E00"),
}
for label, (weights, colour) in shown.items():
    pair = weights[:, [s1, s2]].numpy()
    if label == "exact draws":
        left.scatter(*pair[:1_000].T, s=5, color=colour, linewidths=0, label=label)
        continue
    for mass in (0.5, 0.9):
        left.plot(*ellipse(pair, mass), color=colour, label=label if mass == 0.5 else None)
left.set(
    xlabel="weight of total cholesterol, s1",
    ylabel="weight of LDL, s2",
    title="two weights: 50% and 90% of the mass",
)
left.legend(frameon=False)

low, high = intervals["full covariance"]
middle = (low + high) / 2
rank = middle.argsort()
inside = (low <= patients.test[1]) & (patients.test[1] <= high)
right.vlines(range(TEST), low[rank], high[rank], color="0.8", linewidth=2.5, zorder=0)
for where, colour, label in ((inside, "0.2", "inside"), (~inside, "#D55E00", "outside")):
    chosen = where[rank].nonzero()[:, 0]
    right.scatter(chosen, patients.test[1][rank][chosen], s=10, color=colour, label=label)
right.set(
    xlabel="unseen patients, by their prediction",
    ylabel="progression, in standard deviations",
    title="90% intervals, full covariance",
)
right.legend(frameon=False, loc="upper left")
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=120)
print(f"\nThe two weights, and the intervals, are in {options.out}")
