"""What does a weight on the KL buy? The rate-distortion picture of a VAE, on handwritten digits.

The ELBO has two terms. The distortion says how badly an image is told from its z, the rate how many
nats of z an image takes:

    D = -E_q[log p(x | z)],    R = KL(q(z | x) || p(z)),    ELBO = -(R + D).

A beta-VAE minimizes D + beta R, and that choice is a choice of loss: a small beta pays any rate for
a better reconstruction, a large one gives up reconstruction until z says nothing of x and the
posterior is the prior. The plain ELBO, beta = 1, is one point on the curve between them
(Fixing a Broken ELBO, arXiv:1711.00464).

This script trains a VAE for each beta, and then asks all of them for the plain terms on test
images, without the weight that they were trained with. The guide is mean-field: its units are
independent, so that they share out what z says of x, and those that a larger beta switches off can
be counted. A family with correlations may turn the latent space as it likes, so that each unit says
a little.

What to look at: the curve, and the line R + D = constant through beta = 1, on which the ELBO is the
same; above it the ELBO is lower. The best that a beta can do is the point of the curve whose slope
is -beta, and at beta = 1 that is the line's: it should touch the curve there. Then the images:
reconstructions fade with beta, and the samples say whether the z of images are also the prior's.

With the default settings the line does touch. The rate falls from 21 nats an image at beta = 0.1 to
none at beta = 10, where no unit is active and all images are one and the same; the ELBO is highest
at beta = 1, with 0.5 a quarter of a nat below it and 2 three and a half.

It prints a table by beta, mean over seeds with its standard error. It writes the figure, and beside
it a report of the first seed's models, with the figure on its page; its latent spaces show the z of
images outgrow the prior at small betas, and shrink to a point at 10.

    python examples/loss_design.py
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import Comparison, data, fit, judge, report
from pyro_vi.families import MeanField
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE, DiscretizedLogistic
from pyro_vi.weighting import check_weight

LATENT, CONTEXT = 6, 64  # dimensions of z, and of what the family reads
DRAWS = 200  # from the guide for each test image, behind every number of the table
SHOWN = 5  # images in a row of the figure

parser = argparse.ArgumentParser(description="Rate and distortion of a VAE, by its KL weight.")
parser.add_argument("--steps", type=int, default=800, help="gradient steps of each fit")
parser.add_argument("--seeds", type=int, default=3, help="initial weights and batches")
parser.add_argument(
    "--betas",
    type=float,
    nargs="+",
    default=[0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0],
    help="weights on the KL; 1, the ELBO itself, is one of them",
)
parser.add_argument("--out", type=Path, default=Path("runs/loss_design.png"), help="the figure")
options = parser.parse_args()
# Before training, which takes minutes.
for name in ("steps", "seeds"):
    if getattr(options, name) < 1:
        parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
try:
    betas = sorted({check_weight(beta) for beta in options.betas})
except ValueError as error:
    parser.error(f"--betas: {error}")
if len({f"{beta:g}" for beta in betas}) < len(betas):
    parser.error(f"--betas: expected weights that differ in six digits, got {betas}")
if 1.0 not in betas:
    parser.error(f"--betas: expected 1, the ELBO itself, among the weights, got {betas}")
if options.out.suffix[1:].lower() not in FigureCanvasBase.filetypes or options.out.is_dir():
    parser.error(f"--out: expected the name of an image file, such as x.png, got {options.out}")

torch.set_num_threads(1)
digits = data.digits()


def train(seed: int) -> Comparison:
    """A fit for each beta, from the same initial weights on the same batches."""
    torch.manual_seed(seed)  # of the initial weights; `fit` takes its own seed
    model = VAE(digits.shape, LATENT, likelihood=DiscretizedLogistic(digits.levels))
    guide = Encoder(digits.shape, MeanField(LATENT, CONTEXT))
    fits = {
        f"beta {beta:g}": fit(
            *(model, guide, digits.train),
            loss=TraceMeanField_ELBO(),
            optim=partial(torch.optim.Adam, lr=3e-3),
            schedule=partial(CosineAnnealingLR, T_max=options.steps),
            steps=options.steps,
            batch_size=128,
            kl_weight=beta,
            compile=False,
            seed=seed,
            progress=False,
        )
        for beta in betas
    }
    # No weights here: a row has the bound's own terms, of test images.
    return judge(fits, digits, num_samples=DRAWS, seed=seed)


results = [train(seed) for seed in range(options.seeds)]


def over_seeds(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of a column by beta; one seed has no standard error."""
    values = np.array([[getattr(row, name) for row in result.rows] for result in results])
    if len(values) == 1:
        return values[0], np.full(len(betas), math.nan)
    return values.mean(0), values.std(0, ddof=1) / math.sqrt(len(values))


def cells(name: str, sign: int = 1, places: int = 2) -> list[str]:
    """A column of the table."""
    return [
        f"{sign * mean:.{places}f}" + ("" if math.isnan(error) else f" ± {error:.{places}f}")
        for mean, error in zip(*over_seeds(name), strict=True)
    ]


seeds = "1 seed" if options.seeds == 1 else f"{options.seeds} seeds"
print(
    f"{len(digits.test)} test images, nats per image; mean over {seeds}"
    f"{'' if options.seeds == 1 else ', ± its standard error'}\n"
)
columns = {
    "rate": cells("kl"),
    "distortion": cells("reconstruction", sign=-1),
    "ELBO": cells("elbo"),
    f"active units of {LATENT}": cells("active_units", places=1),
}
print(f"{'beta':>5}" + "".join(f"  {name:>17}" for name in columns))
for beta, *line in zip(betas, *columns.values(), strict=True):
    print(f"{beta:>5g}" + "".join(f"  {text:>17}" for text in line))

# The figure: the curve, and what the models of the first seed make of images.
figure = Figure(figsize=(12, 5.2), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
axes = left.add_subplot()
(rate, rate_error), (reconstruction, error) = over_seeds("kl"), over_seeds("reconstruction")
distortion = -reconstruction
axes.errorbar(
    rate,
    distortion,
    xerr=np.nan_to_num(rate_error),
    yerr=np.nan_to_num(error),
    color="#0072B2",
    marker="o",
    capsize=3,
    label="models by the beta they were trained with",
)
own = betas.index(1.0)
point = (float(rate[own]), float(distortion[own]))
label = f"R + D = {sum(point):.1f} nats: the same ELBO"
axes.axline(point, slope=-1, color="#D55E00", linestyle="--", label=label)
axes.plot(
    *(*point, "D"), color="#D55E00", markersize=9, zorder=9, label="beta = 1: the ELBO's own point"
)
for beta, x, y in zip(betas, rate, distortion, strict=True):
    axes.annotate(f"{beta:g}", (x, y), xytext=(6, 6), textcoords="offset points")
axes.set(xlabel="rate R, nats per test image", ylabel="distortion D, nats per test image")
axes.margins(0.1)  # for the labels at the ends
# Above the axes: within them it would cover an error bar in one run or another.
left.legend(frameon=False, loc="outside upper center", reverse=True)


def strip(axes: Axes, images: torch.Tensor) -> None:
    """Images side by side."""
    row = torch.cat([*torch.nn.functional.pad(images[:, 0], (1, 1))], 1)
    axes.imshow(row.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


fits = results[0].fits
grid = right.subplots(1 + len(betas), 2)
given = digits.test[:SHOWN]
strip(grid[0, 0], given)
strip(grid[0, 1], torch.zeros_like(given))  # nothing is given there
grid[0, 0].set_ylabel("given", rotation=0, ha="right", va="center")
grid[0, 0].set_title("test digits, reconstructed")
grid[0, 1].set_title("samples from the prior")
for (first, second), beta, fitted in zip(grid[1:], betas, fits.values(), strict=True):
    strip(first, fitted.reconstruct(given)["x"])
    strip(second, fitted.generate(SHOWN, expected=True)["x"])
    first.set_ylabel(f"beta {beta:g}", rotation=0, ha="right", va="center")

options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=120)
page = options.out.with_suffix(".html")
report({"The first seed": results[0]}, page, figures={"Rate and distortion": figure})
print(f"\nThe first seed's models, compared, with the curve of all seeds: {page}")
print(f"The curve, and images by beta, are in {options.out}")
