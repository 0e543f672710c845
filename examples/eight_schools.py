"""One posterior, written down in two ways: why the guides of eight schools fail, and the cure.

Eight schools tried a coaching programme; each has an estimated effect y and its standard error
sigma (Rubin 1981). How much do the schools differ? tau, the spread of their true effects theta, is
hardly known from eight numbers, and with it the posterior is a funnel: where tau is small all theta
are pressed together, where it is large they are free. The same model can be written twice,

    centred        theta ~ N(mu, tau)
    non-centred    eta ~ N(0, 1),    theta = mu + tau eta

and the posterior of mu, tau and theta is the same. But a guide approximates the latents that were
written down: the funnel of log tau and theta in the first program, and in the second one log tau
and eta, which hardly depend on one another.

For each program the script fits four of Pyro's autoguides, and holds them against NUTS. What to
look at in the two tables: the ELBO (the evidence is one number for all, in both tables), k-hat
(above its bound the draws are not the posterior's) and the sd error, the worst over mu, log tau and
the eight theta. Centred, all three Gaussians are far too narrow in log tau, and k-hat tells so
without NUTS; the flow, which can bend, comes closest. Non-centred, k-hat is good for all, and even
the mean-field guide will do, with importance weights for what is left.

Then it shows what else one does with such a posterior: it corrects the draws by their importance
weights, leaves each school out in turn, fits from four initial values, and takes the draws to
ArviZ. The figures show the funnel, and what a Gaussian makes of it in either program.

    python examples/eight_schools.py
"""

import argparse
from functools import partial
from pathlib import Path

import arviz as az
import matplotlib
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import compare, fit
from pyro_vi.diagnostics import khat_threshold

SCHOOLS = list("ABCDEFGH")
DRAWS = 4_000  # from each guide

parser = argparse.ArgumentParser(description="Eight schools, centred and non-centred.")
parser.add_argument("--steps", type=int, default=800, help="gradient steps for each fit")
parser.add_argument("--nuts", type=int, default=500, help="draws of NUTS")
parser.add_argument("--out", type=Path, default=Path("runs/eight_schools.png"), help="the figure")
options = parser.parse_args()

matplotlib.use("Agg")  # pictures go to files

# Tensors this small are done before a second thread has woken up. In float64 the flow's networks
# have the type of the data.
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def shared() -> tuple[Tensor, Tensor]:
    """What the schools have in common: the mean of their effects, and the spread."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    pyro.deterministic("log_tau", tau.log())
    return mu, tau


def centred(y: Tensor, sigma: Tensor) -> None:
    mu, tau = shared()
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def noncentred(y: Tensor, sigma: Tensor) -> None:
    mu, tau = shared()
    with pyro.plate("data", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


# The reference: NUTS samples the posterior itself, from the non-centred program. As arrays by site
# it serves both programs; it keeps latents alone, and what follows from them is computed here.
pyro.set_rng_seed(0)
nuts = MCMC(
    NUTS(noncentred),
    num_samples=options.nuts,
    warmup_steps=options.nuts // 2,
    disable_progbar=True,
)
nuts.run(y, sigma)
latents = nuts.get_samples()
reference = {
    "mu": latents["mu"],
    "log_tau": latents["tau"].log(),
    "theta": latents["mu"][:, None] + latents["tau"][:, None] * latents["eta"],
}

# Posteriors this small deserve fits that have converged: several draws for each gradient, and a
# learning rate that falls to zero.
settings = {
    "loss": Trace_ELBO(num_particles=12, vectorize_particles=True, max_plate_nesting=1),
    "optim": partial(torch.optim.Adam, lr=0.05),
    "schedule": partial(CosineAnnealingLR, T_max=options.steps),
    "steps": options.steps,
    "progress": False,
}
results = {}
for number, (name, model) in enumerate({"centred": centred, "non-centred": noncentred}.items(), 1):
    results[name] = compare(
        model,
        {
            "mean-field": AutoDiagonalNormal(model),
            "full covariance": AutoMultivariateNormal(model),
            "low-rank": AutoLowRankMultivariateNormal(model, rank=2),
            "flow": AutoIAFNormal(model),
        },
        (y, sigma),
        num_samples=DRAWS,
        reference=reference,
        **settings,
    )
    print(f"{number}. The {name} program\n\n{results[name]}\n", flush=True)

# In plain words. The evidence is that of the row to be trusted most: a bad k-hat may come with an
# estimate that is too low, or much too high where one draw has nearly all of the weight.
bound = khat_threshold(DRAWS)
evidence = min(results["non-centred"].rows, key=lambda row: row.khat_median).evidence
print("What is seen\n")
for name, result in results.items():
    gaussians = [row for row in result.rows if row.family != "flow"]
    bad = sum(row.khat_median > bound for row in gaussians)
    narrow = min(1 + float(result.marginals[row.family]["log_tau"].sd) for row in gaussians)
    lost = sorted(evidence - row.elbo for row in gaussians)
    print(
        f"{name}: the three Gaussians lose {lost[0]:.2f} to {lost[-1]:.2f} nats, and k-hat is above"
        f" {bound:.2f} for {bad} of them.\nThe narrowest gives log tau {narrow:.0%} of the sd that"
        " it has under NUTS.\n"
    )
print(
    "The posterior is the same in both. No Gaussian is a funnel, whatever its covariance: it fits\n"
    "the wide part, and never goes down to small tau. Where theta is computed from eta, the guide\n"
    "has no funnel to follow, and its theta has one all the same.\n"
)

# k-hat below its bound says more than that the guide is close: its weights can take it to the
# posterior. The columns: the guide's draws, the same after resampling, and NUTS.
posterior = results["non-centred"].posteriors["mean-field"]
corrected = posterior.resampled()
print("The mean-field guide of the non-centred program, corrected: mean ± sd\n")
print(f"{'':10}{'guide':>16}{'corrected':>16}{'NUTS':>16}")
for site, label in (("mu", "mu"), ("log_tau", "log tau"), ("theta", "theta, A")):
    cells = []
    for draws in (posterior.sites, corrected, reference):
        values = draws[site].reshape(len(draws[site]), -1)[:, 0]  # of theta, school A's
        cells.append(f"{values.mean():.2f} ± {values.std():.2f}")
    print(f"{label:10}" + "".join(f"{cell:>16}" for cell in cells))

loo = posterior.loo()
print(
    f"\nEach school left out in turn: {loo.elpd:.1f} ± {loo.se:.1f} nats in all, with a k-hat of at"
    f" most {loo.khat.max():.2f} (school {SCHOOLS[loo.khat.argmax()]})\n"
)

# Is it the family, or was it a bad start? Fits from several initial values answer that, and their
# draws are the chains of an R-hat.
restarted = fit(
    noncentred, AutoMultivariateNormal(noncentred), (y, sigma), restarts=4, **settings
).posterior((y, sigma), DRAWS)
worst = max(float(values.max()) for values in restarted.rhat().values())
print(f"Full covariance from four initial values: the largest R-hat is {worst:.3f}\n")

# ArviZ takes the draws, with names for their axes: those of the plate are schools here. There are
# four chains, one for each restart.
axes = {site: ["school"] for site in ("theta", "eta", "y", "sigma")}
exported = restarted.to_arviz(dims=axes, coords={"school": SCHOOLS})
print(az.summary(exported, var_names=["mu", "tau", "theta"], kind="stats"), "\n")

# A pair as ArviZ draws it, from all four chains. Before 1.0 it returns matplotlib's axes.
pair = az.plot_pair(exported, var_names=["theta", "log_tau"], coords={"school": ["A"]})
options.out.parent.mkdir(parents=True, exist_ok=True)
path = options.out.with_stem(f"{options.out.stem}_pair")
(pair if hasattr(pair, "savefig") else pair.figure).savefig(path)
print(f"ArviZ's pair plot of the non-centred program is in {path}")

# The picture: school A's effect and log tau, as NUTS has them, under a Gaussian of each program.
figure = Figure(figsize=(10, 4.2), layout="constrained")
panels = figure.subplots(1, 2, sharex=True, sharey=True)
for axis, (name, result) in zip(panels, results.items(), strict=True):
    gaussian = result.posteriors["full covariance"]
    own = gaussian.sites
    for draws, colour, label in (
        (reference, "0.55", "NUTS"),
        (own, "#D55E00", "full covariance"),
    ):
        axis.scatter(
            draws["theta"][: options.nuts, 0],
            draws["log_tau"][: options.nuts],
            s=8,
            color=colour,
            alpha=0.6,
            linewidths=0,
            label=label,
        )
    axis.set(title=f"{name} program", xlabel="effect of school A, theta", ylabel="log tau")
    axis.label_outer()
panels[0].legend(frameon=False)
figure.savefig(options.out, dpi=120)
print(f"The funnel, and what a Gaussian makes of it, is in {options.out}")
