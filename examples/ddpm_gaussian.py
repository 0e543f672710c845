"""Diffusion where the exact answer is known: how much does a reverse kernel's covariance matter?

Data from a normal with correlated dimensions have an exact reverse chain: every kernel
p(y_{t-1} | y_t) is a normal whose mean is linear in y_t and whose covariance is full. So a linear
denoiser can be exact, and what is left between the ELBO and log p(x) is the kernel's family, and
the prior's mismatch. With few steps that is much, with many it goes to nothing:

    small variance    v_t I: the variance that the step would have if the data were known
    large variance    beta_t I: the one that it would have if the data were N(0, I)
    full covariance   learned, with every correlation, through the families of the encoders

For each number of steps T the script prints what the bound of each kernel loses against the exact
log density, in nats per data point, and what the closed forms say: by the formulas for the fixed
variances, and the prior's mismatch alone for the full covariance, which holds the exact kernel. The
figure shows the losses by step.

    python examples/ddpm_gaussian.py
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_vi import fit
from pyro_vi.diffusion import (
    Clean,
    CosineSchedule,
    Diffusion,
    LargeVariance,
    LearnedVariance,
    SmallVariance,
)
from pyro_vi.families import FullCovariance
from pyro_vi.guides import ForwardProcess
from pyro_vi.models import DDPM, LearnedGaussian
from pyro_vi.posterior import step_bound

DIM = 3

parser = argparse.ArgumentParser(description="Reverse kernels where the exact answer is known.")
parser.add_argument("--steps", type=int, default=600, help="gradient steps for each fit")
parser.add_argument("--out", type=Path, default=Path("runs/ddpm_gaussian.png"), help="the figure")
options = parser.parse_args()

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

# Data with exactly this covariance: 2 D points at the ends of its axes, many times over. All terms
# of the bound are quadratic, so that they take it for a sample of the normal itself.
covariance = torch.tensor([[1.0, 0.9, 0.5], [0.9, 1.0, 0.3], [0.5, 0.3, 0.6]])
variances, axes = torch.linalg.eigh(covariance)
ends = axes * (DIM * variances).sqrt()
x = torch.cat([ends.T, -ends.T]).repeat(40, 1)
entropy = 0.5 * float((2 * math.pi * math.e * variances).log().sum())  # -E log p(x)


class PerStep(nn.Module):
    """y_t -> A_t y_t: all that an exact denoiser of a centred normal needs."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(steps, DIM, DIM))

    def forward(self, y_t: Tensor, t: Tensor) -> Tensor:
        return (y_t.unsqueeze(-2) @ self.weight[t - 1]).squeeze(-2)


def exact_loss(schedule: CosineSchedule, kernel: str) -> float:
    """E log p(x) - ELBO by the closed forms, per direction of the covariance and step."""
    abar = torch.sigmoid(-schedule.gamma(torch.arange(1, schedule.steps + 1)))
    before = torch.cat([torch.ones(1), abar[:-1]])
    beta = 1 - abar / before
    now, then = (a[:, None] * variances + 1 - a[:, None] for a in (abar, before))
    s = beta[:, None] * then / now  # variances of the exact kernel
    sigma = {
        "small variance": beta * (1 - before) / (1 - abar),
        "large variance": beta,
        "full covariance": None,
    }[kernel]
    prior = 0.5 * (now[-1] - 1 - now[-1].log()).sum()
    decoder = 0.5 * (DIM * s[0].mean().log() - s[0].log().sum())  # one variance for all
    if sigma is None:
        return float(prior + decoder)
    ratio = s[1:] / sigma[1:, None]
    return float(prior + decoder + 0.5 * (ratio - 1 - ratio.log()).sum())


kernels = {
    "small variance": lambda steps: SmallVariance(),
    "large variance": lambda steps: LargeVariance(),
    "full covariance": lambda steps: LearnedVariance(FullCovariance(DIM, context_dim=32), steps),
}
print(f"E log p(x) = {-entropy:.3f} nats; what the ELBO of each kernel loses, and should lose:\n")
print(f"{'steps':>5}" + "".join(f"{name:>24}" for name in kernels))
curves = {}
for steps in (2, 4, 16):
    cells = []
    for name, make in kernels.items():
        diffusion = Diffusion((DIM,), CosineSchedule(steps), draws=min(steps, 4))
        # The estimate of y_0 itself, whose weights stay small where little signal is left.
        model = DDPM(
            diffusion,
            PerStep(steps),
            prediction=Clean(),
            kernel=make(steps),
            likelihood=LearnedGaussian(0.3),
        )
        fitted = fit(
            model,
            ForwardProcess(diffusion),
            x,
            loss=TraceMeanField_ELBO(),
            optim=partial(torch.optim.Adam, lr=0.03),
            schedule=partial(CosineAnnealingLR, T_max=options.steps),
            steps=options.steps,
            progress=False,
        )
        bound = step_bound(fitted.model, fitted.guide, x.repeat(8, 1), draws=8)
        loss = -entropy - float(bound.elbo.value)
        cells.append(
            f"{loss:.3f} ± {bound.elbo.se:.3f} ({exact_loss(diffusion.schedule, name):.3f})"
        )
        curves[name, steps] = bound.by_step.value[1:]
    print(f"{steps:>5}" + "".join(f"{cell:>24}" for cell in cells), flush=True)

figure = Figure(figsize=(6.5, 4), layout="constrained")
plot = figure.add_subplot()
for name, colour in zip(kernels, ("#0072B2", "#D55E00", "#009E73"), strict=True):
    terms = curves[name, 16]
    plot.plot(range(2, 2 + len(terms)), terms, color=colour, label=name)
plot.set(xlabel="step t of 16", ylabel="term of the bound (nats)", ylim=(0, None))
plot.legend(frameon=False)
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=120)
print(f"\nThe terms of sixteen steps are in {options.out}")
