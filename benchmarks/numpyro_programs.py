"""The same programs in NumPyro, and its step of SVI. Importing this sets XLA to one thread."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

from collections.abc import Callable
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO


def coin(x: Any) -> None:
    f = numpyro.sample("f", dist.Beta(10.0, 10.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Bernoulli(f), obs=x)


def coin_guide(x: Any) -> None:
    a = numpyro.param("a", 15.0, constraint=constraints.positive)
    b = numpyro.param("b", 15.0, constraint=constraints.positive)
    numpyro.sample("f", dist.Beta(a, b))


def schools(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("data", len(y)):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def regression(x: Any, y: Any, subsample: int | None = 100) -> None:
    w = numpyro.sample("w", dist.Normal(jnp.zeros(x.shape[1]), 1.0).to_event(1))
    if subsample is None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)
        return
    with numpyro.plate("data", len(x), subsample_size=subsample) as index:
        numpyro.sample("y", dist.Bernoulli(logits=x[index] @ w), obs=y[index])


def many_sites(sites: int, x: Any) -> None:
    total = sum(numpyro.sample(f"z{i}", dist.Normal(0.0, 1.0)) for i in range(sites))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(total, 1.0), obs=x)


def linear(dim: int, x: Any) -> None:
    z = numpyro.sample("z", dist.Normal(jnp.zeros(dim), 1.0).to_event(1))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)


class Steps:
    """Steps of SVI: its jitted update, or `lax.scan` of its update, as `SVI.run` has it.

    Args:
        model, guide, args: the programs and their data.
        scan: how many steps a call scans; 0 for one jitted update a call. Nobody reads the losses.

    Attributes:
        first: seconds of the first call, which compiles, more than of the second.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Any, *args: np.ndarray, scan: int = 0
    ) -> None:
        data = [jnp.asarray(arg) for arg in args]
        svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
        self._state, self._data = svi.init(jax.random.PRNGKey(0), *data), data

        def scanned(state: Any, *data: Any) -> Any:
            return jax.lax.scan(lambda s, _: svi.update(s, *data), state, None, length=scan)

        self._step, self._size = jax.jit(scanned if scan else svi.update), scan or 1
        self.first = self._size * (self.per_step(1) - self.per_step(1))

    def per_step(self, count: int) -> float:
        """The seconds of a step, over `count` steps or as many as whole calls have."""
        calls = -(-count // self._size)
        started = perf_counter()
        for _ in range(calls):
            self._state, losses = self._step(self._state, *self._data)
        losses.block_until_ready()
        return (perf_counter() - started) / (calls * self._size)
