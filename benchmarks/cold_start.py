"""Seconds from the start of a process to a posterior that has been judged.

    python benchmarks/cold_start.py [--rounds 3] [--only schools]

The contenders, each in a process of its own:

    ours    pyro_vi.fit, 2,000 steps of Adam, then 1,000 draws, their ELBO and k-hat
    SVI     NumPyro's SVI.run, the same; log weights by Trace_ELBO, k-hat in NumPy
    NUTS    NumPyro's NUTS, 1,000 + 1,000 draws of one chain, then its table of n_eff and r-hat

Imports and compilation count. "Cold" is with empty caches of compiled code, "warm" with those that
a cold run has filled; JAX keeps everything that it compiles there, though it would not by default.
One thread each. Wall time ends when the numbers are there, processor time is of the process and its
children until then. The rounds are interleaved, and medians printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
from benchmark_data import LABELS, ROWS, SIGMA, TOSSES, Y

CONTENDERS = ("ours", "SVI", "NUTS")
DATA = {
    "beta-Bernoulli": (TOSSES,),
    "eight schools, diagonal": (Y, SIGMA),
    "eight schools, multivariate": (Y, SIGMA),
    "logistic regression": (ROWS, LABELS),
}
STEPS, DRAWS = 2_000, 1_000


def ours(name: str) -> dict[str, Any]:
    """Logistic regression has its minibatches from `fit`."""
    import pyro_programs as programs
    import torch
    from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal

    import pyro_vi

    torch.set_num_threads(1)
    data = tuple(map(torch.from_numpy, DATA[name]))
    options: dict[str, Any] = {}
    model: Callable[..., Any] = programs.schools
    if name == "logistic regression":
        model = partial(programs.regression, subsample=None)
        options["batch_size"] = 100
    guide = (AutoMultivariateNormal if "multivariate" in name else AutoDiagonalNormal)(model)
    if name == "beta-Bernoulli":
        model, guide = programs.coin, programs.coin_guide
    adam = partial(torch.optim.Adam, lr=0.01)
    fitted = pyro_vi.fit(model, guide, data, optim=adam, steps=STEPS, progress=False, **options)
    posterior = fitted.posterior(data, DRAWS)
    return {"elbo": float(posterior.elbo().value), "k-hat": float(posterior.khat())}


def numpyros(name: str) -> tuple[Any, Any, list[Any]]:
    """The programs and the data; the model takes all rows with `subsample=None`."""
    import jax.numpy as jnp
    import numpyro_programs as programs
    from numpyro.infer import autoguide

    data = [jnp.asarray(part) for part in DATA[name]]
    if name == "beta-Bernoulli":
        return programs.coin, programs.coin_guide, data
    model = programs.regression if name == "logistic regression" else programs.schools
    kind = "AutoMultivariateNormal" if "multivariate" in name else "AutoDiagonalNormal"
    return model, getattr(autoguide, kind)(model), data


def svi(name: str) -> dict[str, Any]:
    model, guide, data = numpyros(name)
    import jax
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO

    adam, loss, key = numpyro.optim.Adam(0.01), Trace_ELBO(), jax.random.PRNGKey(0)
    fitted = SVI(model, guide, adam, loss).run(key, STEPS, *data, progress_bar=False)
    whole = partial(model, subsample=None) if name == "logistic regression" else model

    def log_weight(key: Any) -> Any:
        return -loss.loss(key, fitted.params, whole, guide, *data)

    keys = jax.random.split(jax.random.PRNGKey(1), DRAWS)
    log_weights = np.asarray(jax.jit(jax.vmap(log_weight))(keys), np.float64)
    return {"elbo": float(log_weights.mean()), "k-hat": khat(log_weights)}


def nuts(name: str) -> dict[str, Any]:
    model, _, data = numpyros(name)
    import jax
    from numpyro.diagnostics import summary
    from numpyro.infer import MCMC, NUTS

    if name == "logistic regression":
        model = partial(model, subsample=None)
    chain = MCMC(NUTS(model), num_warmup=DRAWS, num_samples=DRAWS, progress_bar=False)
    chain.run(jax.random.PRNGKey(0), *data)
    table = summary(chain.get_samples(group_by_chain=True))
    ends = {"n_eff": np.min, "r_hat": np.max}
    return {of: float(end([end(site[of]) for site in table.values()])) for of, end in ends.items()}


def khat(log_weights: np.ndarray) -> float:
    """The shape of the Pareto distribution of the largest weights (Zhang and Stephens 2009)."""
    ordered = np.sort(np.exp(log_weights - log_weights.max()))
    tail = int(np.ceil(min(0.2 * len(ordered), 3 * len(ordered) ** 0.5)))
    x = ordered[-tail:] - ordered[-tail - 1]
    many = 30 + int(tail**0.5)
    quarter = x[int(tail / 4 + 0.5) - 1]
    b = (1 - (many / (np.arange(many) + 0.5)) ** 0.5) / (3 * quarter) + 1 / x[-1]
    k = np.log1p(-b[:, None] * x).mean(1)
    likelihood = tail * (np.log(-b / k) - k - 1)
    weights = 1 / np.exp(likelihood - likelihood[:, None]).sum(1)
    shape = np.log1p(-(b @ weights) / weights.sum() * x).mean()
    return float((tail * shape + 5) / (tail + 10))


def timed(contender: str, name: str, caches: str) -> tuple[float, float, dict[str, Any]]:
    """Wall and processor seconds, and what was found."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    folders = {
        "XDG_CACHE_HOME": f"{caches}/xdg",
        "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
        "JAX_COMPILATION_CACHE_DIR": f"{caches}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
    }
    started = perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, "--one", contender, "--program", name],
        env=os.environ | threads | folders,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    wall = perf_counter() - started
    _, errors = process.communicate()
    if process.returncode or not line:
        raise RuntimeError(f"{contender}, {name}: {errors}")
    found = json.loads(line)
    return wall, found.pop("processor"), found


def table(rounds: int, only: str) -> None:
    columns = "".join(f"{f'{one} {of}':>10}" for of in ("wall", "cpu") for one in CONTENDERS)
    print(f"{'seconds':35}{columns}{'ours/SVI':>10}{'ours/NUTS':>10}   (wall)", flush=True)
    for name in (name for name in DATA if only in name):
        taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
        found: dict[str, dict[str, Any]] = {}
        for _ in range(rounds):
            folders = {one: tempfile.TemporaryDirectory() for one in CONTENDERS}
            for state in ("cold", "warm"):
                for one in CONTENDERS:
                    wall, processor, found[one] = timed(one, name, folders[one].name)
                    taken.setdefault((state, one), []).append((wall, processor))
            for folder in folders.values():
                folder.cleanup()
        for state in ("cold", "warm"):
            both = [
                [statistics.median(one[i] for one in taken[state, of]) for of in CONTENDERS]
                for i in (0, 1)
            ]
            print(f"{f'{name}, {state}':35}", end="")
            print("".join(f"{value:10.2f}" for value in (*both[0], *both[1])), end="")
            print(f"{both[0][0] / both[0][1]:10.2f}{both[0][0] / both[0][2]:10.2f}", flush=True)
        for one, numbers in found.items():
            print(
                f"    {one}: " + ", ".join(f"{k} {v:.2f}" for k, v in numbers.items()), flush=True
            )


def main() -> None:
    """Runs the benchmark; see the module's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="programs whose names have this in them")
    parser.add_argument("--one", choices=CONTENDERS, help="run this in this process")
    parser.add_argument("--program", choices=DATA)
    options = parser.parse_args()
    if options.one is None:
        table(options.rounds, options.only)
        return
    run = {"ours": ours, "SVI": svi, "NUTS": nuts}[options.one]
    found = run(options.program)
    print(json.dumps(found | {"processor": sum(os.times()[:4])}), flush=True)


if __name__ == "__main__":
    main()
