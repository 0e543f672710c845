"""What a training step of DDPM costs as a Pyro program, against one written by hand.

    python benchmarks/ddpm_step.py [--rounds 15] [--batch 128] [--compile]

By hand: noise, the same U-Net forward, mean squared error, backward, Adam, in plain PyTorch. As a
program: `pyro_vi.SVI` of `DDPM` and `ForwardProcess` under `TraceMeanField_ELBO`, with the same
network, batch and torch optimizer, one for all parameters, as `fit` has it. Both are eager; with
`--compile` the program's step is compiled too, which takes minutes. The rounds are interleaved, and
medians compared. The second table is the program's eager step by the number T of the chain's steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from side_by_side import Contender, Own, Plain, microseconds
from torch import Tensor, nn

from pyro_vi import SVI
from pyro_vi.diffusion import Affine, CosineSchedule, Diffusion, UNet
from pyro_vi.guides import ForwardProcess
from pyro_vi.models import DDPM, Gaussian
from pyro_vi.optimizers import OneOptimizer


def by_hand(net: nn.Module, steps: int, x: Tensor) -> Plain:
    """DDPM's own loss: the squared error of the noise, over steps drawn at random."""
    levels = CosineSchedule(steps).levels(torch.arange(1, steps + 1))
    signal, noise = (level.float() for level in levels)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step() -> float:
        t = torch.randint(steps, (len(x),))
        eps = torch.randn_like(x)
        a, b = (level[t].reshape(-1, 1, 1, 1) for level in (signal, noise))
        loss = (net(a * (2 * x - 1) + b * eps, t + 1) - eps).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        return float(loss.detach())

    return Plain(step)


def as_program(net: nn.Module, steps: int, x: Tensor, *, compile: bool = False) -> Own:
    """The same network in Pyro's bound."""
    diffusion = Diffusion(x.shape[1:], CosineSchedule(steps), coordinates=Affine(0.5, 0.5))
    model = DDPM(diffusion, net, likelihood=Gaussian(0.1))
    adam = OneOptimizer(partial(torch.optim.Adam, lr=1e-3))
    loss = TraceMeanField_ELBO()
    return Own(SVI(model, ForwardProcess(diffusion), adam, loss, compile=compile), x)


def medians(steps: Mapping[str, Contender], rounds: int) -> dict[str, float]:
    """Milliseconds by name, interleaved."""
    return {name: found / 1_000 for name, found in microseconds(steps, rounds).items()}


def main() -> None:
    """Runs the benchmark; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for shape, channels in (((1, 8, 8), (16, 32)), ((1, 28, 28), (32, 64))):
        torch.manual_seed(0)
        x = torch.rand(options.batch if shape[1] == 8 else options.batch // 4, *shape)
        nets = [UNet(shape, 1_000, channels=channels) for _ in range(3)]
        size = sum(p.numel() for p in nets[0].parameters())
        steps: dict[str, Any] = {
            "hand": by_hand(nets[0], 1_000, x),
            "program": as_program(nets[1], 1_000, x),
        }
        if options.compile:
            steps["compiled"] = as_program(nets[2], 1_000, x, compile=True)
        found = medians(steps, options.rounds)
        print(
            f"U-Net of {size:,} parameters, {len(x)} images {shape}: by hand {found['hand']:.1f}"
            f" ms, as a program {found['program']:.1f} ms, ratio"
            f" {found['program'] / found['hand']:.3f}",
            flush=True,
        )
        if options.compile:
            ratio = found["compiled"] / found["hand"]
            print(f"  compiled {found['compiled']:.1f} ms, ratio {ratio:.3f}", flush=True)
            print(f"  {steps['compiled'].svi.explain()}", flush=True)
    x = torch.rand(options.batch, 1, 8, 8)
    chains = {
        f"T = {count:,}": as_program(UNet((1, 8, 8), count, channels=(16, 32)), count, x)
        for count in (10, 100, 1_000, 4_000)
    }
    for name, time in medians(chains, options.rounds).items():
        print(f"{name}: {time:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
