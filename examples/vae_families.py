"""Which variational family should a VAE have? Four of them, on real handwritten digits.

A VAE learns a decoder p(x | z) and an encoder q(z | x), and the encoder's family limits both: a
mean-field q, the textbook's choice, has no correlation between latents, whatever the image.
This script asks what that costs, in two ways:

1. Every family trains its own copy of the model. The table says which pair of model and guide is
   best. But a model bends to its guide: one trained with a mean-field q learns to have posteriors
   that are nearly independent, and so a part of the loss is hidden in the decoder.
2. The best model of the four is frozen, and the guides alone are trained again. Now the evidence
   log p(x) is one number for all, and the gap between it and the ELBO, KL(q || p(z | x)), belongs
   to inference. Not all of it is the family's: one network, trained for a minute, has to serve all
   images (the amortization gap, arXiv:1801.03558), and that part no family closes. The families'
   estimates of the evidence still differ: each is a lower bound in expectation, the further below
   the truth the higher k-hat is, so that the highest is the nearest.

With the default steps mean-field is about as good as full covariance in the first table, and almost
three nats below it in the second.

It prints the two tables, each with a verdict, and draws the posteriors of four digits under every
family, one over the other. What to look at in a table: ELBO (higher is better), gap (0 is the exact
posterior) and k-hat (a share near 0% above its bound: the draws can be trusted). All numbers are in
nats per image.

    python examples/vae_families.py
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from pyro.infer import TraceMeanField_ELBO
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import compare, data, plots, warmup
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE, DiscretizedLogistic

LATENT = 6  # dimensions of z
CONTEXT = 64  # width of the encoder network's output, from which a family makes its density

parser = argparse.ArgumentParser(description="Compare four posterior families of a VAE on digits.")
parser.add_argument("--steps", type=int, default=800, help="gradient steps for each fit")
parser.add_argument("--out", type=Path, default=Path("runs/vae_families.png"), help="the figure")
options = parser.parse_args()

# Networks this small are done before a second thread has woken up.
torch.set_num_threads(1)

# The pixels are counts of ink, 0 to 16. A likelihood that gives each of these 17 levels a
# probability (not a density) makes the bounds of all models comparable, and bits per dimension
# mean something.
digits = data.digits()

torch.manual_seed(0)  # of the initial weights; `compare` takes its own seed
model = VAE(digits.shape, LATENT, likelihood=DiscretizedLogistic(digits.levels))
guides = {
    "mean-field": Encoder(digits.shape, MeanField(LATENT, CONTEXT)),
    "full covariance": Encoder(digits.shape, FullCovariance(LATENT, CONTEXT)),
    "low-rank": Encoder(digits.shape, LowRank(LATENT, CONTEXT, rank=2)),
    "flow": Encoder(digits.shape, Flow(LATENT, CONTEXT)),
}

# The bound is Pyro's. TraceMeanField_ELBO takes the KL to the prior in closed form where there is
# one, which for the three Gaussian families there is; the flow's is estimated from its draws.
compare_on_digits = partial(
    compare,
    guides=guides,
    data=digits,
    loss=TraceMeanField_ELBO(),
    optim=partial(torch.optim.Adam, lr=3e-3),
    schedule=partial(CosineAnnealingLR, T_max=options.steps),
    steps=options.steps,
    batch_size=128,
    num_samples=300,  # draws for each test image, behind every number of the table
    progress=False,
)

print("1. Every family with its own copy of the model\n", flush=True)
# A new decoder ignores z, and the KL would then press every posterior onto the prior before the
# decoder finds a use for it (posterior collapse). So the KL's weight grows from 0 to 1 in the first
# half of the steps; the table, as always, is about the whole bound.
joint = compare_on_digits(model, kl_weight=warmup(max(1, options.steps // 2)))
print(joint)

# `joint.fits` holds the trained pairs. A trained model is frozen, and that is how `compare` knows
# that the guides alone are in question this time. A trained decoder needs no warm-up.
best = joint.best.family
print(f"\n2. Inference alone: the model that was trained with {best}, frozen\n", flush=True)
frozen = compare_on_digits(joint.fits[best].model)
print(frozen)

# Only now can posteriors be drawn over one another: in copies that were trained apart, unit 3 of
# one is not unit 3 of the next.
options.out.parent.mkdir(parents=True, exist_ok=True)
plots.posteriors(frozen, digits.test[:4]).savefig(options.out, dpi=120)
print(f"\nThe posteriors of four digits under every family are in {options.out}")
