"""A diffusion model and a VAE of the same digits, in the same units: bits per dimension.

Both are Pyro programs under Pyro's own ELBO. The VAE's latent is one vector, drawn by an encoder;
the diffusion's are a hundred noisy versions of the image, drawn by the forward process, and its
model is the chain that leads back. The bound on log P(image) of each, over the 64 pixels of 17 grey
levels, is a number of bits that would store a pixel: the same question to both.

The U-Net has 85,000 parameters, and the noise schedule is learned with it: on so few grey levels
the fixed ones spend most of their steps on noise that is finer than a level. The VAE may train for
as long as the diffusion did, on the same threads; it overfits before that, and stops at its best
bound on a tenth of the training images, which it does not see. Its evidence by importance sampling,
from 1,000 draws, is a tighter bound than its ELBO, for the diffusion's to beat.

It prints both in one table, and the diffusion's bound by what it is made of: the prior's term, the
steps, and the reconstruction. The figure shows digits as they come out of noise.

    python examples/ddpm_digits.py
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import data, fit, judge
from pyro_vi.diffusion import Affine, Diffusion, LearnedSchedule, UNet, Velocity
from pyro_vi.families import FullCovariance
from pyro_vi.guides import Encoder, ForwardProcess
from pyro_vi.models import DDPM, VAE, DiscretizedLogistic, LearnedDiscretizedLogistic

STEPS = 100  # of the chain

parser = argparse.ArgumentParser(description="Diffusion and VAE in bits per dimension.")
parser.add_argument("--steps", type=int, default=1_000, help="gradient steps of the diffusion")
parser.add_argument("--out", type=Path, default=Path("runs/ddpm_digits.png"), help="the figure")
options = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)
digits = data.digits()

# The diffusion: what model and guide share is the forward process.
diffusion = Diffusion(
    digits.shape,
    LearnedSchedule(STEPS, first=-3.0, last=5.0),
    coordinates=Affine(0.5, 0.5),  # grey levels from 0 to 1, as -1 to 1
)
model = DDPM(
    diffusion,
    UNet(digits.shape, STEPS, channels=(16, 32)),
    prediction=Velocity(),
    likelihood=LearnedDiscretizedLogistic(digits.levels),
)
started = time.perf_counter()
fitted = fit(
    model,
    ForwardProcess(diffusion),
    digits.train,
    loss=TraceMeanField_ELBO(),
    optim=partial(torch.optim.AdamW, lr=2e-3),
    schedule=partial(CosineAnnealingLR, T_max=options.steps),
    clip_norm=1.0,
    batch_size=128,
    steps=options.steps,
    progress=False,
)
seconds = time.perf_counter() - started

# The VAE, for as long at most: a few steps tell how many that are.
vae = VAE(digits.shape, latent_dim=6, likelihood=DiscretizedLogistic(digits.levels))
encoder = Encoder(digits.shape, FullCovariance(6, context_dim=128))
settings = {"loss": TraceMeanField_ELBO(), "batch_size": 128, "progress": False}
trial = fit(vae, encoder, digits.train, steps=50, **settings)
steps = max(1, round(seconds / (trial.seconds / 50)))
seen, held = digits.train[:-144], digits.train[-144:]
other = fit(vae, encoder, seen, heldout=held, patience=10, steps=steps, **settings)

# Both observe the same 64 pixels of 17 levels, and so stand in one table.
result = judge({"diffusion": fitted, "VAE": other}, digits)
print(f"{len(digits.test)} test digits; trained for {seconds:.0f} s and {other.seconds:.0f} s\n")
print(f"{result}\n\n{result.step_bounds['diffusion']}")

# The picture: eight digits as they come about.
torch.manual_seed(1)
strip = fitted.model.trajectory(8, 9)
figure = Figure(figsize=(7, 6.4), layout="constrained")
for row in range(8):
    for column, frame in enumerate(strip[:, row, 0]):
        axes = figure.add_subplot(8, 9, row * 9 + column + 1)
        axes.imshow(frame.numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        if row == 0 and column in (0, 8):
            axes.set_title("noise" if column == 0 else "digit", fontsize=10)
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=120)
print(f"\nEight digits, from noise on, are in {options.out}")
