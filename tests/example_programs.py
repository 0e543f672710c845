"""Small Pyro programs that several tests share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vi import Comparison
from pyro_vi.augmentation import InputNoise
from pyro_vi.comparison import summarize
from pyro_vi.families import SCALE_FLOOR, FullCovariance
from pyro_vi.guides import PairEncoder
from pyro_vi.models import Gaussian, PredictiveVAE

SCHOOLS_Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCHOOLS_SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, non-centred (Rubin, 1981)."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("data", len(y)):
        eta = pyro.sample("eta", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def normal_mean(x: Tensor) -> None:
    """A global mean under a normal prior: log evidence and posterior are known."""
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def normal_mean_guide(x: Tensor) -> None:
    """Its guide, a plain function of `pyro.param`."""
    loc = pyro.param("loc", x.new_tensor(0.3))
    scale = pyro.param("scale", x.new_tensor(0.5), constraint=constraints.positive)
    pyro.sample("mean", dist.Normal(loc, scale))


def global_and_local(x: Tensor) -> None:
    """A global mean, and one latent for each data point."""
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def global_and_local_guide(x: Tensor) -> None:
    """Its guide, amortized in z."""
    loc = pyro.param("loc", x.new_tensor(0.2))
    pyro.sample("mean", dist.Normal(loc, 0.3))
    weight = pyro.param("weight", x.new_tensor(0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(weight * x, 0.4))


def eight_schools_centred(y: Tensor, sigma: Tensor) -> None:
    """Eight schools, centred; twice the effects as a deterministic site."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.deterministic("twice", 2 * theta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def gamma_poisson(x: Tensor) -> None:
    """Counts of a rate under a Gamma(2, 1) prior: posterior and evidence are known."""
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).double(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


def gamma_poisson_guide(x: Tensor) -> None:
    """Its exact guide, Gamma(2 + S, 1 + n)."""
    pyro.sample("rate", dist.Gamma(2.0 + x.sum(), 1.0 + len(x)))


def beta_bernoulli(x: Tensor) -> None:
    """Coins of a bias under a Beta(2, 1) prior."""
    bias = pyro.sample("bias", dist.Beta(torch.tensor(2.0).double(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(bias), obs=x)


def beta_bernoulli_guide(x: Tensor) -> None:
    """Its exact guide."""
    pyro.sample("bias", dist.Beta(2.0 + x.sum(), 1.0 + len(x) - x.sum()))


class LinearPair:
    """A linear-Gaussian model of y given x with its exact guide: every answer is known.

    z | x ~ N(A x + a, L L'),    y | x, z ~ N(W z + C x + c, s^2 I),    all of them float64.
    """

    def __init__(
        self, noise: InputNoise | None = None, target_noise: InputNoise | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(3)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.s = 0.7
        self.a_x, self.a = drawn(2, 3), drawn(2)
        self.tril = torch.tensor([[0.8, 0.0], [0.5, 1.2]], dtype=torch.float64)
        self.w, self.c_x, self.c = drawn(4, 2), drawn(4, 3), drawn(4)
        self.x = drawn(6, 3)
        self.y = self.predictive(self.x).mean + drawn(6, 4)

        noises = {"noise": noise, "target_noise": target_noise}
        self.model = PredictiveVAE(
            *((3,), (4,), _linear(self.a_x, self.a, self.tril)),
            likelihood=Gaussian(self.s),
            network=lambda shape, width: nn.Identity(),
            decoder=lambda dim, shape: nn.Sequential(nn.Linear(dim, 4), nn.Unflatten(-1, shape)),
            **noises,
        ).double()
        with torch.no_grad():
            self.model.decoder[0].weight.copy_(torch.cat([self.w, self.c_x], 1))
            self.model.decoder[0].bias.copy_(self.c)
        prior = torch.cholesky_inverse(self.tril)  # a precision
        covariance = (prior + self.w.T @ self.w / self.s**2).inverse()
        on_y = covariance @ self.w.T / self.s**2
        on_x = covariance @ prior @ self.a_x - on_y @ self.c_x
        bias = covariance @ prior @ self.a - on_y @ self.c
        tril = torch.linalg.cholesky(covariance)
        self.guide = PairEncoder(
            *((3,), (4,), _linear(torch.cat([on_x, on_y], 1), bias, tril)),
            network=lambda shape, width: nn.Identity(),
            **noises,
        ).double()

    @property
    def slope(self) -> Tensor:
        """B of E[y | x] = B x + b."""
        return self.w @ self.a_x + self.c_x

    def predictive(self, x: Tensor) -> dist.MultivariateNormal:
        """The exact p(y | x)."""
        mean = x @ self.slope.T + self.w @ self.a + self.c
        covariance = self.w @ self.tril @ self.tril.T @ self.w.T + self.s**2 * torch.eye(4).double()
        return dist.MultivariateNormal(mean, covariance)


def _linear(weight: Tensor, bias: Tensor, tril: Tensor) -> FullCovariance:
    """The family whose mean is linear in the context and whose covariance is one for all."""
    family = FullCovariance(*weight.shape).double()
    shift = math.log(math.expm1(1 - SCALE_FLOOR))
    raw = torch.log(torch.expm1(tril.diagonal() - SCALE_FLOOR)) - shift  # undoes `positive`
    with torch.no_grad():
        family.head.weight.zero_()
        family.head.weight[: len(bias)] = weight
        family.head.bias.copy_(torch.cat([bias, raw, tril[1, :1]]))
    return family


# Names that stand for more than themselves in a figure, a table, a page or a spreadsheet, and how
# a figure's label has them: \$ is its sign for a dollar that begins no formula.
STRANGE_NAMES = {
    "$5 and \\frac{1$": r"\$5 and \frac{1\$",
    "one $": r"one \$",
    "_hidden": " _hidden",
    "=1+1": "=1+1",
    "+1": "+1",
    "-1": "-1",
    "@sum": "@sum",
    "<b>&\"'</b>": "<b>&\"'</b>",
    "{}_%^~#\\": "{}_%^~#\\",
    "two\nlines": "two lines",
    "\ttabs\r\nand\rmore": "tabs and more",
    "half \ud83d": "half \ufffd",
    "": "(no name)",
    "long " * 60: "long long long long long long… long long",
}


def renamed(result: Comparison, *names: str) -> Comparison:
    """A comparison whose first families have other names."""
    new = dict(zip((row.family for row in result.rows), names, strict=False))

    def named(values: dict[str, Any]) -> dict[str, Any]:
        return {new.get(family, family): value for family, value in values.items()}

    changed = replace(
        result,
        rows=tuple(replace(row, family=new.get(row.family, row.family)) for row in result.rows),
        fits=named(result.fits),
        posteriors=named(result.posteriors),
        step_bounds=named(result.step_bounds),
        points=named(result.points),
        marginals=named(result.marginals),
    )
    return summarize(changed)
