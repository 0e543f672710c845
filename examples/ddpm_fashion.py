"""A diffusion model of Fashion-MNIST at 8 bits: bits per dimension, and pictures.

The forward process has 500 steps and a learned schedule; the reverse chain's U-Net works at full
resolution. What is trained is the bound on log P(image) over all 256 grey levels of its 784 pixels,
so that the figure can be held against any other likelihood model's: Glow's is 2.95 bits
(arXiv:1807.03039's architecture; the figure is from arXiv:1912.02762's comparisons).

The curve on held-out training images is printed, then the bound on test images, term by term. The
parameters are an average over the last steps. The fit, a sheet of samples and a strip from noise to
images are left in the output folder.

On a CPU the defaults take about two hours on one thread. With CUDA the network is larger, its
convolutions run in bfloat16, and there are more steps.

    python examples/ddpm_fashion.py
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from pyro.infer import TraceMeanField_ELBO
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import data, fit, plots
from pyro_vi.denoisers import UNet
from pyro_vi.diffusion import Affine, Diffusion
from pyro_vi.guides import ForwardProcess
from pyro_vi.kernels import Velocity
from pyro_vi.models import DDPM, LearnedDiscretizedLogistic
from pyro_vi.schedules import Learned
from pyro_vi.stepwise import step_bound

CHAIN = 500  # steps of the chain

cuda = torch.cuda.is_available()
parser = argparse.ArgumentParser(description="Diffusion on Fashion-MNIST, in bits per dimension.")
add = parser.add_argument
add("--steps", type=int, default=60_000 if cuda else 7_500, help="gradient steps")
add("--batch-size", type=int, default=128 if cuda else 64, help="images in a step")
add("--test-images", type=int, default=1_000, help="images that the bound is of")
add("--out", type=Path, default=Path("runs/ddpm_fashion"), help="output folder")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

torch.set_num_threads(1)
torch.manual_seed(0)
fashion = data.fashion_mnist()
train, held = fashion.train[:-256], fashion.train[-256:]
channels, blocks = ((64, 128, 256), 2) if cuda else ((16, 32, 64), 1)
diffusion = Diffusion(
    fashion.shape,
    Learned(CHAIN, first=-8.5, last=5.0),
    coordinates=Affine(0.5, 0.5),  # grey levels from 0 to 1, as -1 to 1
)
model = DDPM(
    diffusion,
    UNet(fashion.shape, CHAIN, channels=channels, blocks=blocks, attention=(2,)),
    prediction=Velocity(),
    likelihood=LearnedDiscretizedLogistic(fashion.levels),
)
fitted = fit(
    model,
    ForwardProcess(diffusion),
    train,
    loss=TraceMeanField_ELBO(),
    optim=partial(torch.optim.AdamW, lr=2e-3 if not cuda else 5e-4),
    schedule=partial(CosineAnnealingLR, T_max=options.steps),
    clip_norm=1.0,
    average=0.999,
    heldout=held,
    heldout_every=max(1, options.steps // 15),
    batch_size=options.batch_size,
    steps=options.steps,
    device="cuda" if cuda else "cpu",
)
fitted.save(options.out / "fit.pt")
unit = 784 * torch.log(torch.tensor(2.0)).item()
print(f"{fitted.parameters:,} parameters, {len(fitted.losses):,} steps, {fitted.seconds:.0f} s")
print("held-out bits per dimension by step:")
for step, value in fitted.heldout.tolist():
    print(f"  {step:7,.0f}  {-value / unit:.3f}")

torch.manual_seed(1)
plots.grid(fitted.model.sample(64)).savefig(options.out / "samples.png", dpi=120)
strip = fitted.model.trajectory(6, 9)  # (frames, images, ...): a row for each image
rows = strip.transpose(0, 1).flatten(0, 1)
plots.grid(rows, columns=9).savefig(options.out / "strip.png", dpi=120)

test = fashion.test[: options.test_images].to("cuda" if cuda else "cpu")
bound = step_bound(fitted.model, fitted.guide, test, draws=1, progress=True)
print(f"{len(test):,} test images: {bound.bits_per_dim.value:.3f} bits per dimension")
print(bound)
