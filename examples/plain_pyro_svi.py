"""The library's models and guides are plain Pyro programs: here Pyro's own SVI trains them.

Nothing of the library's engine is used. `VAE` is a callable with the sites "z" and "x", `Encoder`
one with the site "z", and whatever takes a model and a guide takes them: below, `pyro.infer.SVI`
with `pyro.optim.Adam` in a loop written by hand, and `pyro.infer.Predictive` to draw from both. So
a project that has its own training loop can take the parts that it lacks, and leave the rest.

The script prints, for every epoch, the bound on the training and on the test images in nats per
image (higher is better; the training bound is an average over the epoch, in which the programs
still improved), and draws test images, their reconstructions, and images that the model made up.

    python examples/plain_pyro_svi.py
"""

import argparse
import math
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from torch.utils.data import DataLoader

from pyro_vi import data
from pyro_vi.families import MeanField
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE, DiscretizedLogistic

parser = argparse.ArgumentParser(description="Train a VAE with Pyro's own SVI.")
parser.add_argument("--steps", type=int, default=1_200, help="gradient steps, in whole epochs")
parser.add_argument("--out", type=Path, default=Path("runs/plain_pyro_svi.png"), help="the figure")
options = parser.parse_args()

# Networks this small are done before a second thread has woken up.
torch.set_num_threads(1)

digits = data.digits()

pyro.set_rng_seed(0)
model = VAE(digits.shape, latent_dim=6, likelihood=DiscretizedLogistic(digits.levels))
guide = Encoder(digits.shape, MeanField(6, context_dim=64))

# From here on it is Pyro as in its tutorials.
svi = SVI(model, guide, pyro.optim.Adam({"lr": 2e-3}), loss=TraceMeanField_ELBO())
loader = DataLoader(digits.train, batch_size=128, shuffle=True)
epochs = math.ceil(options.steps / len(loader))

for epoch in range(1, epochs + 1):
    # The plate "data" is as long as the batch, so a loss is a sum over the batch's images; over
    # an epoch every image is in one batch.
    total = sum(svi.step(x) for x in loader)
    if epoch % 10 == 0 or epoch in (1, epochs):
        train = -total / len(digits.train)
        test = -svi.evaluate_loss(digits.test) / len(digits.test)
        print(f"epoch {epoch:3}: bound {train:7.2f} on training, {test:7.2f} on test images")

# Reconstructions: z from the guide, then the mean of the likelihood given z. `Predictive` runs any
# program; what it draws has the number of draws in front.
originals = digits.test[:10]
with torch.no_grad():
    z = Predictive(guide, num_samples=1)(originals)["z"][0]
    reconstructions = model.decode(z).mean

# New images: the model as it is would return the "x" that it is given; unconditioned it draws one,
# and of the argument the shape alone counts.
invent = Predictive(pyro.poutine.uncondition(model), num_samples=1)
drawn = invent(torch.zeros_like(originals))
with torch.no_grad():
    means = model.decode(drawn["z"][0]).mean

rows = {
    "test images": originals,
    "reconstructions": reconstructions,
    "new: draws of x": drawn["x"][0],
    "new: means of x": means,
}
figure = Figure(figsize=(10, 4.2), layout="constrained")
for axes, (name, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
    strip = torch.nn.functional.pad(images[:, 0], (0, 1), value=1.0)  # a white line between two
    axes.imshow(torch.cat(list(strip), dim=1).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")
    axes.spines[:].set_visible(False)
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=120)
print(f"Test images, their reconstructions and new images are in {options.out}")
