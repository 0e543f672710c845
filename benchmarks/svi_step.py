"""What a step of SVI costs: Pyro's, ours in every form, and what one would use instead.

    python benchmarks/svi_step.py                 the tables of programs
    python benchmarks/svi_step.py --first         the first compiled step, empty and filled cache
    python benchmarks/svi_step.py --growth        by the number of sites
    python benchmarks/svi_step.py --bounds        where 2,000 steps lead, eager and compiled

Each program has one batch, float32, one thread (NumPyro's too), Adam. Rounds are interleaved, each
a block of steps of some 50 ms, and medians compared. The columns:

    Pyro        pyro.infer.SVI.step
    eager       pyro_vi.SVI.step
    drop-in     pyro_vi.SVI(..., compile=True).step
    fit         a step inside of pyro_vi.fit, over 10,000 compiled steps (200 of a VAE): the time
                between two moments of one fit at which its loop asks for the next steps
    steady      the same, of the blocks without an audit: what `fit` comes to in long runs
    update      NumPyro's jitted update, a call a step; nobody reads the losses
    scan        NumPyro's lax.scan of its update, 1,000 steps a call, as SVI.run does it
    hand        a VAE's loss by hand in plain PyTorch
    hand, c.    the same with torch.compile and the fused Adam
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpyro_programs as theirs  # first, since it sets XLA's threads
import pyro
import pyro.distributions as dist
import pyro_programs as programs
import torch
from benchmark_data import LABELS, ROWS, SIGMA, TOSSES, Y
from numpyro.infer import autoguide as their_guides
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer import SVI as PyrosSVI
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoGuide,
    AutoMultivariateNormal,
    AutoNormal,
)
from side_by_side import Contender, InFit, Own, Plain, microseconds
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from pyro_vi import SVI
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE
from pyro_vi.networks import MLPDecoder, MLPEncoder

Programs = tuple[Callable[..., Any], Callable[..., Any], ELBO, tuple[Tensor, ...]]

IMAGES = torch.rand(128, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()


def auto(guide: type[AutoGuide], model: Callable[..., Any], *data: Any) -> Programs:
    return model, guide(model), Trace_ELBO(), tuple(map(torch.from_numpy, data))


def coin() -> Programs:
    return programs.coin, programs.coin_guide, Trace_ELBO(), (torch.from_numpy(TOSSES),)


def vae(family: Callable[[int, int], nn.Module], loss: ELBO) -> Programs:
    """784-400-20-400-784."""
    model = VAE((1, 28, 28), 20, decoder=partial(MLPDecoder, hidden=(400,)))
    guide = Encoder((1, 28, 28), family(20, 400), network=partial(MLPEncoder, hidden=()))
    return model, guide, loss, (IMAGES,)


def their_auto(guide: Any, model: Callable[..., Any], *data: Any) -> tuple[Any, ...]:
    return model, guide(model), *data


# ------------------------------------------------------------------------------------ by hand


class ByHand(nn.Module):
    """The loss of a VAE; `parts` maps features to a draw and an estimate of the KL."""

    def __init__(self, outputs: int, parts: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.SiLU(), nn.Linear(400, outputs))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.SiLU(), nn.Linear(400, 784))
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        z, kl = self.parts(self.encoder(x))
        logits = self.decoder(z)
        return binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl.sum()


def mean_field(h: Tensor) -> tuple[Tensor, Tensor]:
    loc, scale = h[:, :20], softplus(h[:, 20:])
    kl = 0.5 * (loc.square() + scale.square() - 1) - scale.log()
    return loc + scale * torch.randn_like(loc), kl


TRIL = torch.tril_indices(20, 20, -1)


def full_covariance(h: Tensor) -> tuple[Tensor, Tensor]:
    loc, scale = h[:, :20], softplus(h[:, 20:40])
    tril = torch.diag_embed(scale)
    tril[:, TRIL[0], TRIL[1]] = h[:, 40:]
    kl = 0.5 * (tril.square().sum(-1) + loc.square() - 1) - scale.log()
    return loc + (tril @ torch.randn_like(loc)[..., None])[..., 0], kl


class FlowParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow(20, 400)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        q = self.flow(h)
        z = q.rsample()
        return z, q.log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)


def by_hand(
    outputs: int, parts: Callable[[Tensor], tuple[Tensor, Tensor]], *, compile: bool
) -> Plain:
    loss = ByHand(outputs, parts)
    adam = torch.optim.Adam(loss.parameters(), lr=1e-3, fused=compile)
    evaluate = torch.compile(loss) if compile else loss
    x = IMAGES.flatten(1)

    def step() -> float:
        value = evaluate(x)
        adam.zero_grad()
        value.backward()
        adam.step()
        return float(value.detach())

    return Plain(step)


# ------------------------------------------------------------------------------------- tables

SMALL: dict[str, tuple[Callable[[], Programs], Callable[[], tuple[Any, ...]]]] = {
    "beta-Bernoulli": (coin, lambda: (theirs.coin, theirs.coin_guide, TOSSES)),
    "eight schools, diagonal": (
        partial(auto, AutoDiagonalNormal, programs.schools, Y, SIGMA),
        partial(their_auto, their_guides.AutoDiagonalNormal, theirs.schools, Y, SIGMA),
    ),
    "eight schools, multivariate": (
        partial(auto, AutoMultivariateNormal, programs.schools, Y, SIGMA),
        partial(their_auto, their_guides.AutoMultivariateNormal, theirs.schools, Y, SIGMA),
    ),
    "logistic regression": (
        partial(auto, AutoDiagonalNormal, programs.regression, ROWS, LABELS),
        partial(their_auto, their_guides.AutoDiagonalNormal, theirs.regression, ROWS, LABELS),
    ),
}
VAES: dict[str, tuple[Callable[[], Programs], int, Callable[[], Any]]] = {
    "VAE, mean-field": (partial(vae, MeanField, TraceMeanField_ELBO()), 40, lambda: mean_field),
    "VAE, full covariance": (
        partial(vae, FullCovariance, TraceMeanField_ELBO()), 230, lambda: full_covariance,
    ),
    "VAE, flow": (partial(vae, Flow, Trace_ELBO()), 400, FlowParts),
}  # fmt: skip
PROGRAMS = {name: make for name, (make, *_) in (*SMALL.items(), *VAES.items())}


def step_of(make: Callable[[], Programs], kind: str) -> Own:
    """The step of an SVI of a kind."""
    torch.manual_seed(0)
    model, guide, loss, args = make()
    optim = pyro.optim.Adam({"lr": 1e-3})
    if kind == "Pyro":
        return Own(PyrosSVI(model, guide, optim, loss), *args)
    return Own(SVI(model, guide, optim, loss, compile=kind == "drop-in"), *args)


def in_fit(make: Callable[[], Programs], least: int) -> InFit:
    torch.manual_seed(0)
    model, guide, loss, args = make()
    adam = partial(torch.optim.Adam, lr=1e-3)
    return InFit(model, guide, args, loss=loss, optim=adam, least=least)


def measured(
    make: Callable[[], Programs], peers: Mapping[str, Contender], rounds: int, least: int
) -> dict[str, float]:
    """Microseconds a step, by column."""
    fit = in_fit(make, least)
    own = {kind: step_of(make, kind) for kind in ("Pyro", "eager", "drop-in")}
    found = microseconds({**own, "fit": fit, **peers}, rounds)
    if not own["drop-in"].svi.compiled_steps:
        raise RuntimeError(f"no compiled steps: {own['drop-in'].svi.explain()}")
    return found | {"steady": 1e6 * statistics.median(fit.steady)}


def show(title: str, rows: Mapping[str, Callable[[], dict[str, float]]], shown: str) -> None:
    """Prints a table of columns and of ratios, which are separated by commas."""
    columns = {one: max(9, len(one) + 2) for one in map(str.strip, shown.split(","))}
    print(f"{title:28}" + "".join(f"{column:>{width}}" for column, width in columns.items()))
    for name, measure in rows.items():
        found = measure()
        print(f"{name:28}", end="")
        for column, width in columns.items():
            above, _, below = column.partition("/")
            value = found[above] / found[below] if below else found[above]
            print(f"{value:{width}.2f}" if below else f"{value:{width}.1f}", end="")
        print(flush=True)


def tables(rounds: int, only: str) -> None:
    """Every program against Pyro and its peers."""

    def small(name: str) -> dict[str, float]:
        make, peer = SMALL[name]
        peers = {"update": theirs.Steps(*peer()), "scan": theirs.Steps(*peer(), scan=1_000)}
        return measured(make, peers, rounds, least=10_000)

    def large(name: str) -> dict[str, float]:
        make, outputs, parts = VAES[name]
        peers = {
            "hand": by_hand(outputs, parts(), compile=False),
            "hand c.": by_hand(outputs, parts(), compile=True),
        }
        return measured(make, peers, max(3, rounds // 3), least=200)

    kinds = "Pyro, eager, drop-in, fit, steady"
    ratios = "Pyro/drop-in, drop-in/update, fit/scan, steady/scan"
    if rows := {name: partial(small, name) for name in SMALL if only in name}:
        show("microseconds a step", rows, f"{kinds}, update, scan, {ratios}")
    ratios = "Pyro/drop-in, drop-in/hand, drop-in/hand c., fit/hand c."
    if rows := {name: partial(large, name) for name in VAES if only in name}:
        show("microseconds a step", rows, f"{kinds}, hand, hand c., {ratios}")


def first(name: str) -> tuple[float, float]:
    """Seconds of all until the first compiled step, and without the eager steps before them."""
    step, started = step_of(PROGRAMS[name], "drop-in"), time.perf_counter()
    with step.store():
        step()
        step()
        begun = time.perf_counter()
        for _ in range(3):
            step()
    if not step.svi.compiled_steps:
        raise RuntimeError(f"no compiled steps: {step.svi.explain()}")
    return time.perf_counter() - started, time.perf_counter() - begun


def firsts(only: str) -> None:
    """Every program in a process of its own."""
    print(
        "seconds until the first compiled step, and of them those of recording, compiling, proving"
    )
    print(f"{'':28}{'empty cache':>12}{'':12}{'filled':>12}")
    for name in (name for name in PROGRAMS if only in name):
        with tempfile.TemporaryDirectory() as folder:
            caches = {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            command = [sys.executable, __file__, "--first-of", name]
            found = ""
            for _ in range(2):
                found += subprocess.run(
                    command, env=os.environ | caches, capture_output=True, text=True, check=True
                ).stdout.rstrip("\n")
        print(f"{name:28}{found}", flush=True)


def growth(rounds: int, memory: int) -> None:
    """By the number of sites, each in a process of its own, on an empty cache."""
    for sites in (16, 64, 256):
        command = [sys.executable, __file__, "--growth-of", str(sites), "--rounds", str(rounds)]
        with tempfile.TemporaryDirectory() as folder:
            for way in (["--memory", str(memory)], ["--memory", "0"]):
                done = subprocess.run([*command, *way], env=os.environ | {"XDG_CACHE_HOME": folder})
                if done.returncode == 0:
                    break
                print(f"{sites} sites took more than {memory} GB; without NumPyro:", flush=True)


def growth_of(sites: int, rounds: int, memory: int) -> None:
    """A row of `growth`; with a limit of memory, or without NumPyro."""
    x = torch.zeros(10).numpy()
    model, peer = partial(programs.many_sites, sites), partial(theirs.many_sites, sites)

    def row() -> dict[str, float]:
        fit = in_fit(partial(auto, AutoNormal, model, x), least=10_000)
        contenders: dict[str, Any] = {"fit": fit}
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory << 30, memory << 30))
            guide = their_guides.AutoNormal(peer)
            contenders["scan"] = theirs.Steps(peer, guide, x, scan=1_000)
        found = microseconds(contenders, rounds)
        firsts = {f"{name}'s first (s)": one.first for name, one in contenders.items()}
        return found | firsts | {"steady": 1e6 * statistics.median(fit.steady)}

    columns = "fit's first (s), fit, steady"
    if memory:
        columns += ", scan's first (s), scan, fit/scan, steady/scan"
    show("microseconds a step", {f"{sites} sites, AutoNormal": row}, columns)


def bounds(only: str) -> None:
    """The bound after 2,000 steps; eager and compiled steps draw the same noise here."""
    print(f"{'ELBO after 2,000 steps':28}{'eager':>20}{'drop-in':>20}")
    for name, make in PROGRAMS.items():
        if only not in name:
            continue
        print(f"{name:28}", end="")
        for kind in ("eager", "drop-in"):
            step = step_of(make, kind)
            with step.store():
                for _ in range(2_000):
                    step()
                torch.manual_seed(1)
                losses = [step.svi.evaluate_loss(*step.args) for _ in range(500)]
            draws = -torch.tensor(losses)
            found = f"{draws.mean():.3f} ± {draws.std() / len(draws) ** 0.5:.3f}"
            print(f"{found:>20}", end="", flush=True)
        print()


def main() -> None:
    """Runs the benchmark; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="programs whose names have this in them")
    parser.add_argument("--memory", type=int, default=12, help="GB that --growth may have")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--first", action="store_true")
    which.add_argument("--first-of", choices=PROGRAMS)
    which.add_argument("--growth", action="store_true")
    which.add_argument("--growth-of", type=int, metavar="SITES")
    which.add_argument("--bounds", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.first:
        firsts(options.only)
    elif options.first_of:
        print("{:12.2f}{:12.2f}".format(*first(options.first_of)))
    elif options.growth:
        growth(max(3, options.rounds // 3), options.memory)
    elif options.growth_of:
        growth_of(options.growth_of, options.rounds, options.memory)
    elif options.bounds:
        bounds(options.only)
    else:
        tables(options.rounds, options.only)


if __name__ == "__main__":
    main()
