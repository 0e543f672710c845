"""How good are the numbers? A model whose every answer is known, and what the library says of it.

Probabilistic PCA is a VAE with a linear decoder,

    z ~ N(0, I_k),    x | z ~ N(W z + b, s^2 I_d),

and its posterior is Gaussian with precision P = I + W'W / s^2, the same for every x, around a mean
that is linear in x. So an encoder that is one linear layer can be exact, and nothing but the family
stands between the ELBO and log p(x):

    mean-field        the best it can do is log p(x) - 1/2 [sum_j log P_jj - log |P|]
    full covariance   holds the exact posterior: its ELBO is log p(x)
    low-rank          in between: a diagonal and one direction of correlation

The script prints the exact log evidence of the test data, and a line for each family: its ELBO, the
gap to the exact evidence, what that gap should be, the evidence as importance sampling estimates it
from the draws (as one has to where nothing is known), and k-hat, which says whether to believe that
estimate. Mean-field's estimate is too low, and its k-hat, above 0.67 for most of the data, says so.
All numbers are in nats per data point. The figure shows the posterior of one data point.

    python examples/linear_gaussian.py
"""

import argparse
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import compare
from pyro_vi.diagnostics import khat_threshold
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.guides import Encoder
from pyro_vi.models import LinearGaussian

D, K = 8, 4  # dimensions of x and of z
DRAWS = 1_000  # from each posterior

parser = argparse.ArgumentParser(description="Posterior families where the exact answer is known.")
parser.add_argument("--steps", type=int, default=1_500, help="gradient steps for each fit")
parser.add_argument("--out", type=Path, default=Path("runs/linear_gaussian.png"), help="the figure")
options = parser.parse_args()

# Matrices this small are done before a second thread has woken up.
torch.set_num_threads(1)

# In float64 what is left of a gap is the fit's, not the arithmetic's.
torch.manual_seed(1)
f64 = torch.float64
model = LinearGaussian(torch.randn(D, K, dtype=f64), torch.randn(D, dtype=f64), scale=1.0)


def draw(num: int) -> torch.Tensor:
    """Data from the model itself, so that its evidence is the true density."""
    z = torch.randn(num, K, dtype=f64)
    return z @ model.weight.T + model.bias + model.scale * torch.randn(num, D, dtype=f64)


def linear(shape: tuple[int, ...], width: int) -> nn.Module:
    """No network: the family's own head is linear in x, which is all that the exact form needs."""
    return nn.Identity()


data = SimpleNamespace(train=draw(1_000), test=draw(200))  # whatever has `train` and `test` will do
families = {
    "mean-field": MeanField(K, context_dim=D),
    "full covariance": FullCovariance(K, context_dim=D),
    "low-rank": LowRank(K, context_dim=D, rank=1),
}
guides = {name: Encoder((D,), family, network=linear).double() for name, family in families.items()}

# The model has no parameters, so every family fits the same posterior. The learning rate falls to
# zero, because the noise of the last steps' gradients is a gap of its own.
result = compare(
    model,
    guides,
    data,
    loss=TraceMeanField_ELBO(),
    optim=partial(torch.optim.Adam, lr=0.05),
    schedule=partial(CosineAnnealingLR, T_max=options.steps),
    steps=options.steps,
    batch_size=250,
    num_samples=DRAWS,
    progress=False,
)

# The standard errors are Monte Carlo errors of these averages over the same 200 points, for which
# the exact evidence is averaged too: no sampling of data enters the comparison.
exact = float(model.log_evidence(data.test).mean())
expected = {
    "mean-field": f"{float(model.mean_field_gap()):.4f}",
    "full covariance": f"{0:.4f}",
    "low-rank": "between",  # no closed form
}
bound = khat_threshold(DRAWS)
print(f"exact log evidence of {len(data.test)} test points: {exact:.4f} nats\n")
print(
    f"{'':15}  {'ELBO':>19}  {'gap':>8}  {'exact gap':>9}  {'estimated evidence':>19}"
    f"  {'k-hat':>5}  {f'above {bound:.2f}':>10}"
)
for row in result.rows:
    print(
        f"{row.family:15}"
        f"  {f'{row.elbo:.4f} ± {row.elbo_se:.4f}':>19}"
        f"  {exact - row.elbo:>8.4f}"
        f"  {expected[row.family]:>9}"
        f"  {f'{row.evidence:.4f} ± {row.evidence_se:.4f}':>19}"
        f"  {row.khat_median:>5.2f}"
        f"  {row.khat_bad:>10.0%}"
    )

# The picture: one data point's posterior over the two latents that are most correlated in it.
x = data.test[:1]
posterior = model.posterior(x)
covariance = posterior.covariance_matrix[0].numpy()
scale = np.sqrt(covariance.diagonal())
correlation = np.abs(np.triu(covariance / np.outer(scale, scale), k=1))
pair = list(np.unravel_index(correlation.argmax(), correlation.shape))


def ellipse(mean: np.ndarray, covariance: np.ndarray, mass: float) -> np.ndarray:
    """The contour of a normal over two dimensions that holds `mass` of it, shape (2, 200)."""
    angle = np.linspace(0, 2 * math.pi, 200)
    circle = math.sqrt(-2 * math.log(1 - mass)) * np.stack([np.cos(angle), np.sin(angle)])
    return mean[:, None] + np.linalg.cholesky(covariance) @ circle


figure = Figure(figsize=(7, 5.5), layout="constrained")
axes = figure.add_subplot()
for mass, grey in ((0.9, "0.9"), (0.5, "0.75")):
    shape = ellipse(posterior.mean[0].numpy()[pair], covariance[np.ix_(pair, pair)], mass)
    axes.fill(*shape, color=grey, label="exact posterior" if mass == 0.5 else None)
for (name, fitted), colour in zip(
    result.fits.items(), ("#0072B2", "#D55E00", "#009E73"), strict=True
):
    z = fitted.posterior(x, 20_000).draws["z"][:, 0].numpy()[:, pair]
    for mass, label in ((0.9, None), (0.5, name)):
        axes.plot(*ellipse(z.mean(0), np.cov(z.T), mass), color=colour, label=label)
axes.set(
    xlabel=f"z[{pair[0]}]",
    ylabel=f"z[{pair[1]}]",
    title="one data point's posterior: 50% and 90% of the mass",
)
axes.set_aspect("equal", adjustable="datalim")
axes.legend(frameon=False)
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=120)
print(f"\nThe posterior of one data point is in {options.out}")
