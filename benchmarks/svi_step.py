"""What a step of SVI costs: Pyro's, ours eager, ours compiled.

    python benchmarks/svi_step.py [--rounds 9]

Each program has one batch, float32, one thread. The rounds are interleaved, each a block of steps,
and medians compared. The first compiled step (recording and compiling) is timed too; a second run
finds Inductor's cache on disk, and `TORCHINDUCTOR_CACHE_DIR` says where that is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI as PyrosSVI
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from torch import Tensor

from pyro_vi import SVI
from pyro_vi.families import FullCovariance, MeanField
from pyro_vi.flows import Flow
from pyro_vi.guides import Encoder
from pyro_vi.models import VAE

Programs = tuple[Callable[..., Any], Callable[..., Any], Any, tuple[Any, ...]]
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def coin(x: Tensor) -> None:
    f = pyro.sample("f", dist.Beta(10.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(f), obs=x)


def coin_guide(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(15.0), constraint=constraints.positive)
    b = pyro.param("b", torch.tensor(15.0), constraint=constraints.positive)
    pyro.sample("f", dist.Beta(a, b))


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=100) as index:
        pyro.sample("y", dist.Bernoulli(logits=x[index] @ w), obs=y[index])


def vae(family: Callable[[int, int], Any]) -> Programs:
    images = torch.rand(128, 1, 28, 28).round()
    guide = Encoder((1, 28, 28), family(20, 128))
    return VAE((1, 28, 28), 20), guide, TraceMeanField_ELBO(), (images,)


PROGRAMS: dict[str, Callable[[], Programs]] = {
    "beta-Bernoulli": lambda: (coin, coin_guide, Trace_ELBO(), (torch.ones(10),)),
    "eight schools, AutoDiagonalNormal": lambda: (
        *(schools, AutoDiagonalNormal(schools), Trace_ELBO(), (Y, SIGMA)),
    ),
    "eight schools, AutoMultivariateNormal": lambda: (
        *(schools, AutoMultivariateNormal(schools), Trace_ELBO(), (Y, SIGMA)),
    ),
    "logistic regression, 100 of 10,000 x 50": lambda: (
        *(regression, AutoDiagonalNormal(regression), Trace_ELBO()),
        (torch.randn(10_000, 50), torch.ones(10_000)),
    ),
    "VAE, mean-field": partial(vae, MeanField),
    "VAE, full covariance": partial(vae, FullCovariance),
    "VAE, flow": partial(vae, Flow),
}


def main() -> None:
    """Runs the benchmark; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'microseconds a step':40}{'Pyro':>9}{'eager':>9}{'compiled':>9}{'ratio':>7}  first (s)"
    )
    for name, make in PROGRAMS.items():
        pyro.clear_param_store()  # by name the three share their parameters, which changes no time
        steps: dict[str, Callable[[], object]] = {}
        for kind in ("Pyro", "eager", "compiled"):
            torch.manual_seed(0)
            model, guide, loss, args = make()
            adam = pyro.optim.Adam({"lr": 1e-3})
            if kind == "Pyro":
                svi = PyrosSVI(model, guide, adam, loss)
            else:
                svi = SVI(model, guide, adam, loss, compile=kind == "compiled")
            steps[kind] = partial(svi.step, *args)
            steps[kind]()
            started = time.perf_counter()
            steps[kind]()
            first = time.perf_counter() - started
        found: dict[str, list[float]] = {kind: [] for kind in steps}
        for _ in range(options.rounds):
            for kind, step in steps.items():
                block = 10 if "VAE" in name else 200 if kind == "compiled" else 20
                started = time.perf_counter()
                for _ in range(block):
                    step()
                found[kind].append(1e6 * (time.perf_counter() - started) / block)
        pyros, eager, compiled = (statistics.median(values) for values in found.values())
        print(
            f"{name:40}{pyros:9.0f}{eager:9.0f}{compiled:9.1f}{pyros / compiled:7.1f}{first:9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
