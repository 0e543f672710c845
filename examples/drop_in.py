"""A script of plain Pyro, and the same script with one import changed.

`train` below is as in Pyro's tutorials: a model, an autoguide, `pyro.optim.Adam`, and a loop that
calls `svi.step`. It is run three times, and all that differs is where `SVI` was imported from, and
in the third run one argument:

    from pyro.infer import SVI        every step runs the programs' Python
    from pyro_vi import SVI           so does every step here
    SVI(..., compile=True)            after four eager steps they are compiled

A compiled step does what the eager one does, with the same draws from torch's generator. What
looks at the loop from outside sees no difference: a loss is a float, the parameters are in Pyro's
store, `optim.get_state()` is true. Only rounding differs, and grows where training is chaotic.
Recording and compiling take about half a second here.

The script prints the time of each run, of its last steps, and the bound at its end, which is the
same but for the noise of 1,000 draws. The figure shows the losses against the clock.

    python examples/drop_in.py
"""

import argparse
import time
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import SVI as PyrosSVI
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from pyro_vi import SVI

parser = argparse.ArgumentParser(description="Pyro's SVI, and ours in its place.")
parser.add_argument("--steps", type=int, default=20_000, help="gradient steps")
parser.add_argument("--out", type=Path, default=Path("runs/drop_in.png"), help="the figure")
options = parser.parse_args()

torch.set_num_threads(1)

# Eight schools (Rubin 1981): estimated effects of a coaching programme, and their standard errors.
effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def train(SVI) -> tuple[list[float], list[float], float]:
    """Losses, seconds since the start, and the bound after the last step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoMultivariateNormal(schools)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.005}), Trace_ELBO())
    losses, seconds = [], []
    started = time.perf_counter()
    for _ in range(options.steps):
        losses.append(svi.step(effects, errors))
        seconds.append(time.perf_counter() - started)
    many = Trace_ELBO(num_particles=1_000, vectorize_particles=True, max_plate_nesting=1)
    return losses, seconds, -many.loss(schools, guide, effects, errors)


runs = {
    "from pyro.infer import SVI": PyrosSVI,
    "from pyro_vi import SVI": SVI,
    "SVI(..., compile=True)": partial(SVI, compile=True),
}
axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
width = max(1, options.steps // 100)
for name, svi in runs.items():
    losses, seconds, bound = train(svi)
    last = (seconds[-1] - seconds[-options.steps // 4]) / (options.steps // 4)
    print(
        f"{name:28}{options.steps:,} steps in {seconds[-1]:5.1f} s, the last ones"
        f" {1e3 * last:6.3f} ms each; ELBO {bound:.2f}"
    )
    smooth = torch.tensor(losses).unfold(0, width, width).mean(-1)
    axes.plot(seconds[width - 1 :: width], smooth, label=name)
axes.set(xlabel="seconds", ylabel=f"loss in nats, mean of {width} steps")
axes.set_ylim(top=sorted(losses)[len(losses) // 2] + 5)
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=120)
print(f"The losses against the clock are in {options.out}")
