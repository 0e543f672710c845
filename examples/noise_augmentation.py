"""Does noise on the inputs help a predictor that has few data? Half a digit, given the other half.

A conditional VAE predicts 4x8 pixels from 4x8 others,

    z ~ p(z | x),    y | x, z ~ p(y | x, z),    guide q(z | x, y),

from 100, 300 or 1,000 training images. While it trains, it may read a noisy x_t in place of the
upper half x, at a level t that is drawn anew for each image in each step; model and guide read the
same one. Three ways:

    none          x itself
    noisy         x_t = signal_t x + noise_t eps, t uniform on 0, ..., T_MAX
    added back    x_t + x: the same levels at about twice the ratio of signal to noise; the networks
                  halve it, or inputs twice as large would be a difference of their own

What is bounded in training with noise is log p(y | x_t), which is not the question. So all are
asked the same one afterwards, without noise: log p(y | x) of all 360 test images, importance
sampled with the guide's draws. A fifth of the training images is held out, and the parameters are
those of the best bound on them (without noise, too): otherwise the table would say which of the
three overfits fastest.

It prints the mean over seeds, in nats per image and with its standard error, and the difference to
"none", paired by seed: each seed draws its own training images and initial weights, for all three
alike. The figure shows the table, and predictions for five test digits.

    python examples/noise_augmentation.py
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import nn

from pyro_vi import Fit, data, fit
from pyro_vi.augmentation import InputNoise
from pyro_vi.diffusion import CosineSchedule
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.guides import PairEncoder
from pyro_vi.models import DiscretizedLogistic, PredictiveVAE
from pyro_vi.networks import MLPDecoder, MLPEncoder

LATENT, CONTEXT = 4, 32  # dimensions of z, and of what a family reads
T_MAX = 15  # of 100 levels: noise of at most 0.24, where pixels are from 0 to 1
DRAWS = 200  # from the guide, for the density of each test image
EVERY = 25  # steps between two looks at the held-out bound

parser = argparse.ArgumentParser(description="Noise on the inputs of a predictor, with few data.")
parser.add_argument("--steps", type=int, default=1_000, help="gradient steps of each fit, at most")
parser.add_argument("--seeds", type=int, default=5, help="training sets and initial weights")
parser.add_argument(
    "--sizes", type=int, nargs="+", default=[100, 300, 1_000], help="numbers of training images"
)
parser.add_argument(
    "--out", type=Path, default=Path("runs/noise_augmentation.png"), help="the figure"
)
options = parser.parse_args()

torch.set_num_threads(1)
digits = data.digits()
if options.steps < 1 or options.seeds < 1:
    parser.error("expected --steps and --seeds of at least 1")
if wrong := [size for size in options.sizes if not 10 <= size <= len(digits.train)]:
    parser.error(f"expected --sizes from 10 to the {len(digits.train)} images, got {wrong}")
HALF = (1, 4, 8)


def halves(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper halves, which are given, and the lower ones."""
    return images[:, :, :4].contiguous(), images[:, :, 4:].contiguous()


# Each fit gets noise of its own; it is one for the model and its guide.
ways = {
    "none": lambda: None,
    "noisy": lambda: InputNoise(CosineSchedule(100), T_MAX),
    "added back": lambda: InputNoise(CosineSchedule(100), T_MAX, add_back=True),
}


class Halved(nn.Module):
    """Half of the upper half, the first 32 numbers of what a network reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = torch.ones(x[0].numel())
        share[: math.prod(HALF)] = 0.5
        return x * share.reshape(x.shape[1:])


def network(way: str, shape: tuple[int, ...], width: int) -> nn.Module:
    """What reads x, or x and y."""
    reader = MLPEncoder(shape, width, hidden=(128,))
    return nn.Sequential(Halved(), reader) if way == "added back" else reader


def train(way: str, size: int, seed: int) -> Fit:
    """One fit to `size` images, a fifth of them to stop by."""
    chosen = torch.randperm(len(digits.train), generator=torch.Generator().manual_seed(seed))
    images = digits.train[chosen[:size]]
    held = max(1, size // 5)
    torch.manual_seed(seed)  # of the initial weights; `fit` takes its own seed
    noise = ways[way]()
    model = PredictiveVAE(
        *(HALF, HALF, MeanField(LATENT, CONTEXT)),
        likelihood=DiscretizedLogistic(digits.levels),
        network=partial(network, way),
        decoder=partial(MLPDecoder, hidden=(128,)),
        noise=noise,
    )
    guide = PairEncoder(
        *(HALF, HALF, FullCovariance(LATENT, CONTEXT)),
        network=partial(network, way),
        noise=noise,
    )
    return fit(
        *(model, guide, halves(images[held:])),
        loss=TraceMeanField_ELBO(),
        optim=partial(torch.optim.Adam, lr=3e-3),
        steps=options.steps,
        batch_size=min(64, size - held),
        heldout=halves(images[:held]),
        heldout_every=EVERY,
        patience=max(1, options.steps // EVERY),  # never stops early: it keeps the best
        compile=False,
        seed=seed,
        progress=False,
    )


test = halves(digits.test)
found = {way: np.zeros((len(options.sizes), options.seeds)) for way in ways}
fits: dict[str, Fit] = {}  # of the first seed, with the fewest images
for row, size in enumerate(options.sizes):
    for seed in range(options.seeds):
        for way in ways:
            fitted = train(way, size, seed)
            density = fitted.log_predictive_density(test, DRAWS, seed=0)
            found[way][row, seed] = density.value.mean()
            if row == seed == 0:
                fits[way] = fitted


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Over seeds; one seed has no standard error."""
    count = len(values)
    error = values.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan
    return float(values.mean()), float(error)


def cell(values: np.ndarray, sign: str = "") -> str:
    """Mean and standard error."""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.2f}" if math.isnan(error) else f"{mean:{sign}.2f} ± {error:.2f}"


seeds = "1 seed" if options.seeds == 1 else f"{options.seeds} seeds"
print(
    f"log p(lower half | upper half) of {len(digits.test)} test images, nats per image; mean over"
    f" {seeds}{'' if options.seeds == 1 else ', ± its standard error'}\n"
)
columns = [*ways, "noisy - none", "added back - none"]
print(f"{'images':>6}" + "".join(f"  {name:>17}" for name in columns))
for row, size in enumerate(options.sizes):
    line = [cell(found[way][row]) for way in ways]
    line += [cell(found[way][row] - found["none"][row], "+") for way in ("noisy", "added back")]
    print(f"{size:>6}" + "".join(f"  {text:>17}" for text in line))

# The figure: the table, and what the fits to the fewest images predict.
figure = Figure(figsize=(9, 7), layout="constrained")
figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06)  # inches at the edges
top, bottom = figure.subfigures(2, 1, height_ratios=(1.1, 1))
axes = top.add_subplot()
for shift, (way, colour) in enumerate(zip(ways, ("#0072B2", "#D55E00", "#009E73"), strict=True)):
    means, errors = zip(*(mean_and_error(values) for values in found[way]), strict=True)
    place = [size * 1.04 ** (shift - 1) for size in options.sizes]
    axes.errorbar(
        *(place, means), yerr=np.nan_to_num(errors), color=colour, marker="o", capsize=3, label=way
    )
axes.set_xscale("log")
axes.set_xticks(options.sizes, labels=[f"{size:,}" for size in options.sizes], minor=False)
axes.minorticks_off()
axes.set(xlabel="training images", ylabel="log p(lower | upper)\nnats per test image")
# Above the axes: within them it would cover an error bar in one run or another.
top.legend(
    frameon=False, title="noise on the upper half", loc="outside upper center", ncols=len(ways)
)

torch.manual_seed(0)
shown, drawn = 5, 4
upper = test[0][:shown]
grid = bottom.subplots(shown, 1 + 3 * drawn)
for line, image in enumerate(digits.test[:shown]):
    grid[line, 0].imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
for block, (way, fitted) in enumerate(fits.items()):
    lower = fitted.model.predict(upper, drawn)
    for line in range(shown):
        for i in range(drawn):
            picture = torch.cat([upper[line, 0], lower[i, line, 0]])
            grid[line, 1 + block * drawn + i].imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1)
    grid[0, 1 + block * drawn].set_title(way, fontsize=9, loc="left")
grid[0, 0].set_title("digit", fontsize=9, loc="left")
for axes in grid.flat:
    axes.set_xticks([])
    axes.set_yticks([])
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=120)
print(f"\nThe table as a figure, with draws of lower halves, is in {options.out}")
