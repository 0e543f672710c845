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
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_vi import SVI
from pyro_vi.denoisers import UNet
from pyro_vi.diffusion import Affine, Diffusion
from pyro_vi.guides import ForwardProcess
from pyro_vi.models import DDPM, Gaussian
from pyro_vi.optimizers import OneOptimizer
from pyro_vi.schedules import Cosine

Step = Callable[[Tensor], object]


def by_hand(net: nn.Module, steps: int) -> Step:
    """DDPM's own loss: the squared error of the noise, over steps drawn at random."""
    levels = Cosine(steps).levels(torch.arange(1, steps + 1))
    signal, noise = (level.float() for level in levels)
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step(x: Tensor) -> float:
        t = torch.randint(steps, (len(x),))
        eps = torch.randn_like(x)
        a, b = (level[t].reshape(-1, 1, 1, 1) for level in (signal, noise))
        loss = (net(a * (2 * x - 1) + b * eps, t + 1) - eps).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        return float(loss.detach())

    return step


def as_program(net: nn.Module, steps: int, shape: Sequence[int], *, compile: bool = False) -> Step:
    """The same network in Pyro's bound."""
    diffusion = Diffusion(shape, Cosine(steps), coordinates=Affine(0.5, 0.5))
    model = DDPM(diffusion, net, likelihood=Gaussian(0.1))
    adam = OneOptimizer(partial(torch.optim.Adam, lr=1e-3))
    loss = TraceMeanField_ELBO()
    return SVI(model, ForwardProcess(diffusion), adam, loss, compile=compile).step


def medians(steps: dict[str, Step], x: Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds by name, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(4):  # the fourth is compiled, if one is
            step(x)
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step(x)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1_000 * statistics.median(found) for name, found in seconds.items()}


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
        pyro.clear_param_store()
        nets = [UNet(shape, 1_000, channels=channels) for _ in range(3)]
        size = sum(p.numel() for p in nets[0].parameters())
        steps = {"hand": by_hand(nets[0], 1_000), "program": as_program(nets[1], 1_000, shape)}
        if options.compile:
            steps["compiled"] = as_program(nets[2], 1_000, shape, compile=True)
        found = medians(steps, x, options.rounds)
        print(
            f"U-Net of {size:,} parameters, {len(x)} images {shape}: by hand {found['hand']:.1f}"
            f" ms, as a program {found['program']:.1f} ms, ratio"
            f" {found['program'] / found['hand']:.3f}",
            flush=True,
        )
        if options.compile:
            ratio = found["compiled"] / found["hand"]
            print(f"  compiled {found['compiled']:.1f} ms, ratio {ratio:.3f}", flush=True)
    pyro.clear_param_store()
    x = torch.rand(options.batch, 1, 8, 8)
    programs = {}
    for steps in (10, 100, 1_000, 4_000):
        # By name in Pyro's store they share their parameters, which changes no time.
        net = UNet((1, 8, 8), steps, channels=(16, 32))
        programs[f"T = {steps:,}"] = as_program(net, steps, (1, 8, 8))
    for name, milliseconds in medians(programs, x, options.rounds).items():
        print(f"{name}: {milliseconds:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
