"""A diffusion model of Fashion-MNIST at 8 bits: bits per dimension, and pictures.

What is trained is the bound on log P(image), all 256 grey levels of 784 pixels, so that the figure
can be held against that of any other likelihood model on the same images. The forward process has
500 steps and a learned schedule, and the U-Net of the reverse chain works at full resolution. The
parameters are an average over the last steps.

It prints the bound on held-out training images as it went, then that on test images, and for some
of them what it is made of: the prior's term, the steps, and the reconstruction. The figure shows
images as they come out of noise; the fit is saved beside it.

On a CPU the defaults take more than an hour on one thread, and the curve is not at its end. With
CUDA the network is larger, computes in bfloat16, and takes more steps.

    python examples/ddpm_fashion.py
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from pyro.infer import TraceMeanField_ELBO
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import data, fit, plots
from pyro_vi.diffusion import Affine, Autocast, Diffusion, LearnedSchedule, UNet, Velocity
from pyro_vi.guides import ForwardProcess
from pyro_vi.models import DDPM, LearnedDiscretizedLogistic
from pyro_vi.posterior import step_bound

cuda = torch.cuda.is_available()
parser = argparse.ArgumentParser(description="Diffusion on Fashion-MNIST, in bits per dimension.")
add = parser.add_argument
add("--data", default="/usr/share/datasets/fashion-mnist", help="folder of the IDX files")
add("--chain", type=int, default=500, help="steps of the chain")
add("--steps", type=int, default=60_000 if cuda else 7_500, help="gradient steps")
add("--batch-size", type=int, default=128 if cuda else 64, help="images in a step")
add("--test-images", type=int, default=10_000, help="images that the bound is of")
add("--out", type=Path, default=Path("runs/ddpm_fashion.png"), help="the figure")
add("--quiet", action="store_true", help="no progress bars")
options = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)
device = torch.device("cuda" if cuda else "cpu")
fashion = data.fashion_mnist(options.data)
unit = math.prod(fashion.shape) * math.log(2)  # nats in a bit per dimension
train, held = fashion.train[:-256], fashion.train[-256:]

diffusion = Diffusion(
    fashion.shape,
    LearnedSchedule(options.chain, first=-8.5),  # the first step's noise is about a grey level wide
    coordinates=Affine(0.5, 0.5),  # grey levels from 0 to 1, as -1 to 1
)
channels, blocks = ((64, 128, 256), 2) if cuda else ((16, 32, 64), 1)
net = UNet(fashion.shape, options.chain, channels=channels, blocks=blocks, attention=(2,))
model = DDPM(
    diffusion,
    Autocast(net) if cuda else net,
    prediction=Velocity(),
    likelihood=LearnedDiscretizedLogistic(fashion.levels),
)
fitted = fit(
    model,
    ForwardProcess(diffusion),
    train,
    loss=TraceMeanField_ELBO(),
    optim=partial(torch.optim.AdamW, lr=5e-4 if cuda else 2e-3),
    schedule=partial(CosineAnnealingLR, T_max=options.steps),
    clip_norm=1.0,
    average=0.999,
    heldout=held,
    heldout_every=max(1, options.steps // 15),
    batch_size=options.batch_size,
    steps=options.steps,
    device=device,
    progress=not options.quiet,
)
options.out.parent.mkdir(parents=True, exist_ok=True)
fitted.save(options.out.with_suffix(".pt"))
print(f"{fitted.parameters:,} parameters, {options.steps:,} steps in {fitted.seconds:,.0f} s\n")
print("held-out bits per dimension after a number of steps")
for step, bound in fitted.heldout.tolist():
    print(f"{step:10,.0f}{-bound / unit:8.3f}")

# The bound of all test images by some of the steps of each: Pyro's own estimate of minus the ELBO.
# The error is that of the images and of the steps drawn.
test = fashion.test[: options.test_images].to(device)
loss = TraceMeanField_ELBO(num_particles=4)
bounds = torch.tensor(
    [-loss.loss(fitted.model, fitted.guide, part) / len(part) for part in test.chunk(40)]
)
bits, error = -bounds.mean() / unit, bounds.std() / unit / math.sqrt(len(bounds))
print(f"\n{len(test):,} test images: {bits:.3f} ± {error:.3f} bits per dimension")

# What it is made of: every step of some images.
parts = step_bound(fitted.model, fitted.guide, test[:100], draws=1, progress=not options.quiet)
print(f"of {min(len(test), 100)} of them: {parts}")

torch.manual_seed(1)
frames = fitted.model.trajectory(8, 9)
plots.grid(frames.transpose(0, 1).flatten(0, 1), columns=9).savefig(options.out, dpi=120)
print(f"\nEight images, from noise on, are in {options.out}")
