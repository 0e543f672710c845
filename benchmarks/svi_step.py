"""What a step of SVI costs: Pyro's, ours eager, ours compiled, and what one would use instead.

    python benchmarks/svi_step.py                 the table of programs
    python benchmarks/svi_step.py --first         the first compiled step, empty and filled cache
    python benchmarks/svi_step.py --growth        by the number of sites, and of latent dimensions
    python benchmarks/svi_step.py --bounds        where 2,000 steps lead, eager and compiled

Each program has one batch, float32, one thread (NumPyro's too), Adam. Rounds are interleaved, each
a block of steps of some 50 ms, and medians compared. The peer of a small program is NumPyro's
jitted update (extra `bench`), whose losses nobody reads; of a VAE the same loss by hand in plain
PyTorch, eager, and with `torch.compile` and the fused Adam.
"""

from __future__ import annotations

import argparse
import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import torch
from numpyro.infer import SVI as NumPyrosSVI
from numpyro.infer import Trace_ELBO as NumPyrosELBO
from numpyro.infer import autoguide as nauto
from pyro.distributions import constraints
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer import SVI as PyrosSVI
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from side_by_side import Own, microseconds
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from pyro_vi import SVI
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE
from pyro_vi.networks import MLPDecoder, MLPEncoder

Step = Callable[[], object]
Programs = tuple[Callable[..., Any], Callable[..., Any], ELBO, tuple[Any, ...]]

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
TOSSES = torch.tensor([1.0] * 6 + [0.0] * 4)
ROWS = torch.randn(10_000, 50, generator=torch.Generator().manual_seed(0))
LABELS = (ROWS[:, 0] > 0).float()
IMAGES = torch.rand(128, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()


# ------------------------------------------------------------------------------------ in Pyro


def coin(x: Tensor) -> None:
    f = pyro.sample("f", dist.Beta(10.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(f), obs=x)


def coin_guide(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(15.0), constraint=constraints.positive)
    b = pyro.param("b", torch.tensor(15.0), constraint=constraints.positive)
    pyro.sample("f", dist.Beta(a, b))


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=100) as index:
        pyro.sample("y", dist.Bernoulli(logits=x[index] @ w), obs=y[index])


def many_sites(sites: int, x: Tensor) -> None:
    total = sum(pyro.sample(f"z{i}", dist.Normal(0.0, 1.0)) for i in range(sites))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(total, 1.0), obs=x)


def linear(dim: int, x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)


def auto(
    guide: Callable[..., Any], model: Callable[..., Any], *args: Any, **options: Any
) -> Programs:
    return model, guide(model, **options), Trace_ELBO(), args


def vae(family: Callable[[int, int], nn.Module], loss: ELBO) -> Programs:
    """784-400-20-400-784."""
    model = VAE((1, 28, 28), 20, decoder=partial(MLPDecoder, hidden=(400,)))
    guide = Encoder((1, 28, 28), family(20, 400), network=partial(MLPEncoder, hidden=()))
    return model, guide, loss, (IMAGES,)


# --------------------------------------------------------------------------------- in NumPyro


def ncoin(x: Any) -> None:
    f = numpyro.sample("f", ndist.Beta(10.0, 10.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", ndist.Bernoulli(f), obs=x)


def ncoin_guide(x: Any) -> None:
    a = numpyro.param("a", 15.0, constraint=ndist.constraints.positive)
    b = numpyro.param("b", 15.0, constraint=ndist.constraints.positive)
    numpyro.sample("f", ndist.Beta(a, b))


def nschools(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", ndist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", ndist.HalfCauchy(5.0))
    with numpyro.plate("data", len(y)):
        eta = numpyro.sample("eta", ndist.Normal(0.0, 1.0))
        numpyro.sample("y", ndist.Normal(mu + tau * eta, sigma), obs=y)


def nregression(x: Any, y: Any) -> None:
    w = numpyro.sample("w", ndist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    with numpyro.plate("data", len(x), subsample_size=100) as index:
        numpyro.sample("y", ndist.Bernoulli(logits=x[index] @ w), obs=y[index])


def nmany_sites(sites: int, x: Any) -> None:
    total = sum(numpyro.sample(f"z{i}", ndist.Normal(0.0, 1.0)) for i in range(sites))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", ndist.Normal(total, 1.0), obs=x)


def nlinear(dim: int, x: Any) -> None:
    z = numpyro.sample("z", ndist.Normal(jnp.zeros(dim), 1.0).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", ndist.Normal(z.sum(), 1.0), obs=x)


def jitted(model: Any, guide: Any, *args: Tensor) -> Step:
    """NumPyro's update, jitted, as its documentation has it."""
    data = [jnp.asarray(arg.numpy()) for arg in args]
    svi = NumPyrosSVI(model, guide, numpyro.optim.Adam(1e-3), NumPyrosELBO())
    state = svi.init(jax.random.PRNGKey(0), *data)
    update = jax.jit(svi.update)

    def step() -> None:
        nonlocal state
        state, loss = update(state, *data)
        step.wait = loss.block_until_ready  # type: ignore[attr-defined]

    return step


def njitted(auto: Any, model: Any, *args: Tensor, **options: Any) -> Step:
    return jitted(model, auto(model, **options), *args)


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
) -> Step:
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

    return step


# ------------------------------------------------------------------------------------ programs

PROGRAMS: dict[str, Callable[[], Programs]] = {
    "beta-Bernoulli": lambda: (coin, coin_guide, Trace_ELBO(), (TOSSES,)),
    "eight schools, diagonal": partial(auto, AutoDiagonalNormal, schools, Y, SIGMA),
    "eight schools, multivariate": partial(auto, AutoMultivariateNormal, schools, Y, SIGMA),
    "logistic regression": partial(auto, AutoDiagonalNormal, regression, ROWS, LABELS),
    "VAE, mean-field": partial(vae, MeanField, TraceMeanField_ELBO()),
    "VAE, full covariance": partial(vae, FullCovariance, TraceMeanField_ELBO()),
    "VAE, flow": partial(vae, Flow, Trace_ELBO()),
}
PEERS: dict[str, Callable[[], dict[str, Step]]] = {
    "beta-Bernoulli": lambda: {"peer": jitted(ncoin, ncoin_guide, TOSSES)},
    "eight schools, diagonal": lambda: {
        "peer": njitted(nauto.AutoDiagonalNormal, nschools, Y, SIGMA)
    },
    "eight schools, multivariate": lambda: {
        "peer": njitted(nauto.AutoMultivariateNormal, nschools, Y, SIGMA)
    },
    "logistic regression": lambda: {
        "peer": njitted(nauto.AutoDiagonalNormal, nregression, ROWS, LABELS)
    },
    "VAE, mean-field": lambda: hands(40, lambda: mean_field),
    "VAE, full covariance": lambda: hands(230, lambda: full_covariance),
    "VAE, flow": lambda: hands(400, FlowParts),
}


def hands(outputs: int, parts: Callable[[], Any]) -> dict[str, Step]:
    return {
        "by hand": by_hand(outputs, parts(), compile=False),
        "peer": by_hand(outputs, parts(), compile=True),
    }


def ours(make: Callable[[], Programs], kind: str) -> Own:
    """The step of an SVI of a kind."""
    torch.manual_seed(0)
    model, guide, loss, args = make()
    optim = pyro.optim.Adam({"lr": 1e-3})
    if kind == "Pyro":
        return Own(PyrosSVI(model, guide, optim, loss), *args)
    return Own(SVI(model, guide, optim, loss, compile=kind == "compiled"), *args)


KINDS = ("Pyro", "eager", "compiled")


def table(rounds: int) -> None:
    """Every program against Pyro and its peers."""
    columns = (*KINDS, "by hand", "peer")
    print(f"{'microseconds a step':28}" + "".join(f"{column:>10}" for column in columns), end="")
    print(f"{'Pyro/ours':>11}{'ours/peer':>11}{'ours/hand':>11}")
    for name, make in PROGRAMS.items():
        found = microseconds({k: ours(make, k) for k in KINDS} | PEERS[name](), rounds)
        ratios = (
            found["Pyro"] / found["compiled"],
            found["compiled"] / found["peer"],
            found["compiled"] / found["by hand"] if "by hand" in found else None,
        )
        print(f"{name:28}", end="")
        print("".join(f"{found[c]:10.0f}" if c in found else 10 * " " for c in columns), end="")
        print("".join(f"{r:11.2f}" if r is not None else "" for r in ratios), flush=True)


def first(compiled: Own) -> float:
    """Seconds until the first compiled step: of the steps that are recorded and proven."""
    compiled()
    started = time.perf_counter()
    compiled()
    compiled()
    return time.perf_counter() - started


def firsts() -> None:
    """Recording and compiling every program, each in a process of its own."""
    print(f"{'record, compile (seconds)':28}{'empty cache':>12}{'filled':>12}")
    for name in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            found = [
                subprocess.run(
                    [sys.executable, __file__, "--first-of", name],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout.strip()
                for _ in range(2)
            ]
        print(f"{name:28}{found[0]:>12}{found[1]:>12}", flush=True)


def growth(rounds: int) -> None:
    """By the number of sites, and of latent dimensions."""
    x = torch.zeros(10)
    rows: list[tuple[str, Callable[[], Programs], Callable[[], Step]]] = []
    for sites in (4, 16, 64, 256):
        model, peer = partial(many_sites, sites), partial(nmany_sites, sites)
        rows.append(
            (
                f"{sites} sites, AutoNormal",
                partial(auto, AutoNormal, model, x),
                partial(njitted, nauto.AutoNormal, peer, x),
            )
        )
    for dim in (2, 8, 32, 128, 512):
        model, peer = partial(linear, dim), partial(nlinear, dim)
        rank = {"rank": min(dim, 8)}
        rows.append(
            (
                f"dimension {dim}, multivariate",
                partial(auto, AutoMultivariateNormal, model, x),
                partial(njitted, nauto.AutoMultivariateNormal, peer, x),
            )
        )
        rows.append(
            (
                f"dimension {dim}, rank {rank['rank']}",
                partial(auto, AutoLowRankMultivariateNormal, model, x, **rank),
                partial(njitted, nauto.AutoLowRankMultivariateNormal, peer, x, **rank),
            )
        )
    print(f"{'microseconds a step':28}{'Pyro':>10}{'compiled':>10}{'NumPyro':>10}{'first (s)':>11}")
    for name, make, peer_of in rows:
        compiled = ours(make, "compiled")
        with compiled.store():
            seconds = first(compiled)
        steps = {"Pyro": ours(make, "Pyro"), "compiled": compiled, "NumPyro": peer_of()}
        found = microseconds(steps, rounds)
        print(f"{name:28}" + "".join(f"{found[k]:10.0f}" for k in steps), end="")
        print(f"{seconds:11.1f}", flush=True)


def bounds() -> None:
    """The bound after 2,000 steps; eager and compiled steps draw the same noise here."""
    print(f"{'ELBO after 2,000 steps':28}{'eager':>20}{'compiled':>20}")
    for name, make in PROGRAMS.items():
        found = []
        for kind in ("eager", "compiled"):
            step = ours(make, kind)
            with step.store():
                for _ in range(2_000):
                    step()
                torch.manual_seed(1)
                losses = [step.svi.evaluate_loss(*step.args) for _ in range(500)]
            draws = -torch.tensor(losses)
            found.append(f"{draws.mean():.3f} ± {draws.std() / len(draws) ** 0.5:.3f}")
        print(f"{name:28}{found[0]:>20}{found[1]:>20}", flush=True)


def main() -> None:
    """Runs the benchmark; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--first", action="store_true")
    which.add_argument("--first-of", choices=PROGRAMS)
    which.add_argument("--growth", action="store_true")
    which.add_argument("--bounds", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.first:
        firsts()
    elif options.first_of:
        print(f"{first(ours(PROGRAMS[options.first_of], 'compiled')):.1f}")
    elif options.growth:
        growth(options.rounds)
    elif options.bounds:
        bounds()
    else:
        table(options.rounds)


if __name__ == "__main__":
    main()
