"""Functions as C: log densities of classical programs with their gradients, and what is refused."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from pyro_vi.compiling.build import CALL, CannotCompile
from pyro_vi.compiling.functions import compile_function

Program = Callable[[], None]
PROGRAMS: dict[str, Callable[[], Program]] = {}


def program(make: Callable[[], Program]) -> Callable[[], Program]:
    """A function that makes data, and a program that has them in its closure."""
    PROGRAMS[make.__name__] = make
    return make


def normal(loc: float = 0.0, scale: float = 1.0, *shape: int) -> Any:
    return dist.Normal(loc, scale).expand(shape).to_event(len(shape))


def table(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Covariates, coefficients, and their products."""
    x, w = torch.randn(rows, columns), torch.randn(columns)
    return x, w, x @ w


@program
def eight_schools() -> Program:
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model() -> None:
        mu = pyro.sample("mu", normal(0, 5))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(0, 1))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    return model


@program
def eight_schools_centred() -> Program:
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model() -> None:
        mu = pyro.sample("mu", normal(0, 5))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return model


@program
def linear_regression() -> Program:
    x, _, mean = table(40, 3)
    y = mean + torch.randn(40)

    def model() -> None:
        w, b = pyro.sample("w", normal(0, 1, 3)), pyro.sample("b", normal(0, 2))
        sigma = pyro.sample("sigma", dist.Exponential(1.0))
        with pyro.plate("data", 40):
            pyro.sample("y", dist.Normal(x @ w + b, sigma), obs=y)

    return model


@program
def logistic_regression() -> Program:
    x, _, mean = table(60, 5)
    y = torch.bernoulli(mean.sigmoid())

    def model() -> None:
        w = pyro.sample("w", normal(0, 2, 5))
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    return model


@program
def probit_regression() -> Program:
    x, _, mean = table(30, 2)
    y = (mean > 0).to(x.dtype)

    def model() -> None:
        w = pyro.sample("w", normal(0, 1, 2))
        p = dist.Normal(0, 1).cdf(x @ w)
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Bernoulli(p.clamp(1e-6, 1 - 1e-6)), obs=y)

    return model


@program
def poisson_regression() -> Program:
    x, _, mean = table(40, 3)
    y = torch.poisson(mean.exp().clamp(max=50))

    def model() -> None:
        w = pyro.sample("w", normal(0, 1, 3))
        with pyro.plate("data", 40):
            pyro.sample("y", dist.Poisson((x @ w).exp()), obs=y)

    return model


@program
def negative_binomial_regression() -> Program:
    x, _, mean = table(40, 2)
    y = torch.poisson(mean.exp().clamp(max=50))

    def model() -> None:
        w = pyro.sample("w", normal(0, 1, 2))
        r = pyro.sample("r", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 40):
            pyro.sample("y", dist.NegativeBinomial(r, logits=x @ w - r.log()), obs=y)

    return model


@program
def gamma_poisson() -> Program:
    y = torch.poisson(torch.rand(20) * 9)

    def model() -> None:
        a, b = pyro.sample("a", dist.Gamma(2.0, 1.0)), pyro.sample("b", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.GammaPoisson(a, b), obs=y)

    return model


@program
def binomial_regression() -> Program:
    x, _, mean = table(25, 2)
    n = torch.randint(1, 20, (25,)).to(x.dtype)
    y = torch.binomial(n, mean.sigmoid())

    def model() -> None:
        w = pyro.sample("w", normal(0, 1, 2))
        with pyro.plate("data", 25):
            pyro.sample("y", dist.Binomial(n, logits=x @ w), obs=y)

    return model


@program
def beta_binomial() -> Program:
    n = torch.randint(5, 30, (20,)).double()
    y = torch.binomial(n, torch.rand(20).double()).to(torch.get_default_dtype())
    n = n.to(y.dtype)

    def model() -> None:
        mean = pyro.sample("mean", dist.Beta(2.0, 2.0))
        count = pyro.sample("count", dist.LogNormal(2.0, 1.0))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.BetaBinomial(mean * count, (1 - mean) * count, n), obs=y)

    return model


@program
def student_t_regression() -> Program:
    x, _, mean = table(40, 2)
    y = mean + torch.randn(40) / torch.rand(40)

    def model() -> None:
        w = pyro.sample("w", normal(0, 1, 2))
        df = pyro.sample("df", dist.Gamma(2.0, 0.1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("data", 40):
            pyro.sample("y", dist.StudentT(df, x @ w, sigma), obs=y)

    return model


@program
def beta_regression() -> Program:
    x, _, mean = table(30, 2)
    y = (mean + torch.randn(30)).sigmoid()

    def model() -> None:
        w = pyro.sample("w", normal(0, 1, 2))
        phi = pyro.sample("phi", dist.Gamma(2.0, 0.2))
        p = (x @ w).sigmoid()
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Beta(p * phi, (1 - p) * phi), obs=y)

    return model


@program
def radon() -> Program:
    county = torch.randint(12, (80,))
    floor = torch.randint(2, (80,)).to(torch.get_default_dtype())
    y = torch.randn(12)[county] - floor + torch.randn(80)

    def model() -> None:
        mu, slope = pyro.sample("mu", normal(0, 10)), pyro.sample("slope", normal(0, 10))
        tau, sigma = (pyro.sample(name, dist.HalfCauchy(2.0)) for name in ("tau", "sigma"))
        with pyro.plate("counties", 12):
            a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("homes", 80):
            pyro.sample("y", dist.Normal(a[county] + slope * floor, sigma), obs=y)

    return model


@program
def varying_slopes() -> Program:
    group, x = torch.randint(8, (60,)), torch.randn(60)
    y = torch.randn(60)

    def model() -> None:
        mu = pyro.sample("mu", normal(0, 5, 2))
        tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([2]).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(2, torch.tensor(2.0)))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("groups", 8):
            z = pyro.sample("z", normal(0, 1, 2))
        theta = mu + z @ (tau[:, None] * corr).mT
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Normal(theta[group, 0] + theta[group, 1] * x, sigma), obs=y)

    return model


@program
def varying_slopes_centred() -> Program:
    group, x = torch.randint(6, (50,)), torch.randn(50, 3)
    y = torch.bernoulli(torch.full((50,), 0.4))

    def model() -> None:
        mu = pyro.sample("mu", normal(0, 5, 3))
        tau = pyro.sample("tau", dist.HalfNormal(1.0).expand([3]).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(1.5)))
        with pyro.plate("groups", 6):
            theta = pyro.sample(
                "theta", dist.MultivariateNormal(mu, scale_tril=tau[:, None] * corr)
            )
        with pyro.plate("data", 50):
            pyro.sample("y", dist.Bernoulli(logits=(theta[group] * x).sum(-1)), obs=y)

    return model


@program
def horseshoe() -> Program:
    x, _, mean = table(40, 8)
    y = mean + torch.randn(40)

    def model() -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        local = pyro.sample("local", dist.HalfCauchy(torch.ones(8)).to_event(1))
        slab = pyro.sample("slab", dist.InverseGamma(2.0, 8.0))
        scale = slab.sqrt() * local / (slab + tau**2 * local**2).sqrt()
        w = pyro.sample("w", normal(0, 1, 8)) * tau * scale
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", 40):
            pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)

    return model


@program
def mixture() -> Program:
    y = torch.cat([torch.randn(20) - 3, torch.randn(20) + 2])

    def model() -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        loc = pyro.sample("loc", normal(0, 5, 3))
        scale = pyro.sample("scale", dist.HalfNormal(2.0).expand([3]).to_event(1))
        each = dist.Normal(loc, scale).log_prob(y[:, None]) + p.log()
        pyro.factor("y", each.logsumexp(-1).sum())

    return model


@program
def mixture_of_normals_and_categories() -> Program:
    y = torch.randn(30, 2)

    def model() -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.full((4,), 2.0)))
        loc = pyro.sample("loc", normal(0, 3, 4, 2))
        parts = dist.Normal(loc, 1.0).to_event(1)
        with pyro.plate("data", 30):
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(p), parts), obs=y)

    return model


@program
def autoregression() -> Program:
    y = torch.randn(50).cumsum(0) / 5

    def model() -> None:
        a, b = pyro.sample("a", normal(0, 1)), pyro.sample("b", dist.Uniform(-1.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", 49):
            pyro.sample("y", dist.Normal(a + b * y[:-1], sigma), obs=y[1:])

    return model


@program
def local_level() -> Program:
    y = torch.randn(30).cumsum(0) + torch.randn(30)

    def model() -> None:
        scale, sigma = (pyro.sample(name, dist.HalfNormal(1.0)) for name in ("scale", "sigma"))
        steps = pyro.sample("steps", normal(0, 1, 30))
        level = (steps * scale).cumsum(-1)
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Normal(level, sigma), obs=y)

    return model


@program
def volatility() -> Program:
    y = torch.randn(25) / 3

    def model() -> None:
        phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
        sigma, mu = pyro.sample("sigma", dist.HalfCauchy(1.0)), pyro.sample("mu", normal(0, 3))
        z = pyro.sample("z", normal(0, 1, 25))
        h = [mu + sigma * z[0] / (1 - phi**2).sqrt()]
        for t in range(1, 25):
            h.append(mu + phi * (h[-1] - mu) + sigma * z[t])
        with pyro.plate("data", 25):
            pyro.sample("y", dist.Normal(0, (torch.stack(h) / 2).exp()), obs=y)

    return model


@program
def gaussian_process() -> Program:
    x, y = torch.linspace(-2, 2, 20), torch.randn(20)

    def model() -> None:
        length, scale, noise = (
            pyro.sample(name, dist.LogNormal(0.0, 1.0)) for name in ("length", "scale", "noise")
        )
        squares = (x[:, None] - x).square()
        k = scale**2 * (-0.5 * squares / length**2).exp() + noise * torch.eye(20)
        tril = torch.linalg.cholesky(k)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(20), scale_tril=tril), obs=y)

    return model


@program
def latent_gaussian_process() -> Program:
    x = torch.linspace(-2, 2, 15)
    y = torch.poisson(torch.full((15,), 3.0))

    def model() -> None:
        length, scale = (pyro.sample(name, dist.Gamma(4.0, 4.0)) for name in ("length", "scale"))
        k = scale**2 * (-((x[:, None] - x) / length).abs()).exp() + 1e-6 * torch.eye(15)
        f = torch.linalg.cholesky(k) @ pyro.sample("z", normal(0, 1, 15))
        with pyro.plate("data", 15):
            pyro.sample("y", dist.Poisson(f.exp()), obs=y)

    return model


@program
def dirichlet_multinomial() -> Program:
    y = torch.randint(0, 9, (12, 4)).to(torch.get_default_dtype())

    def model() -> None:
        a = pyro.sample("a", dist.Gamma(2.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("data", 12):
            pyro.sample("y", dist.DirichletMultinomial(a, y.sum(-1)), obs=y)

    return model


@program
def multinomial() -> Program:
    y = torch.randint(0, 9, (12, 4)).to(torch.get_default_dtype())

    def model() -> None:
        a = pyro.sample("a", dist.Gamma(2.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("rows", 12):
            p = pyro.sample("p", dist.Dirichlet(a))
            pyro.sample("y", dist.Multinomial(total_count=36, probs=p, validate_args=False), obs=y)

    return model


@program
def ordered_categories() -> Program:
    x, _, mean = table(40, 2)
    y = ((mean > -0.5).long() + (mean > 0.5)).to(torch.get_default_dtype())

    def model() -> None:
        w = pyro.sample("w", normal(0, 1, 2))
        ordered = dist.transforms.OrderedTransform()
        base = dist.Normal(torch.zeros(2), 2.0).to_event(1)
        cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [ordered]))
        with pyro.plate("data", 40):
            pyro.sample("y", dist.OrderedLogistic(x @ w, cuts), obs=y)

    return model


@program
def softmax_regression() -> Program:
    x, _, _ = table(40, 3)
    y = torch.randint(4, (40,))

    def model() -> None:
        w, b = pyro.sample("w", normal(0, 1, 3, 4)), pyro.sample("b", normal(0, 1, 4))
        with pyro.plate("data", 40):
            pyro.sample("y", dist.Categorical(logits=x @ w + b), obs=y)

    return model


@program
def survival() -> Program:
    x, _, mean = table(40, 2)
    y, censored = mean.exp() * torch.rand(40) + 0.01, torch.rand(40) < 0.3

    def model() -> None:
        w = pyro.sample("w", normal(0, 1, 2))
        k = pyro.sample("k", dist.Gamma(2.0, 1.0))
        scale = (x @ w).exp()
        log_survival = -((y / scale) ** k)
        log_density = dist.Weibull(scale, k).log_prob(y)
        pyro.factor("y", torch.where(censored, log_survival, log_density).sum())

    return model


@program
def masked_gamma_and_lognormal() -> Program:
    y, mask = torch.rand(30) * 5 + 0.1, torch.rand(30) < 0.7

    def model() -> None:
        a, b = (pyro.sample(name, dist.Gamma(2.0, 1.0)) for name in "ab")
        mu, sigma = pyro.sample("mu", normal()), pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Gamma(a, b).mask(mask), obs=y)
            pyro.sample("z", dist.LogNormal(mu, sigma).mask(~mask), obs=y)

    return model


@program
def matrix_factorisation() -> Program:
    user, item, y = torch.randint(9, (60,)), torch.randint(7, (60,)), torch.randn(60)

    def model() -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        u, v = pyro.sample("u", normal(0, 1, 9, 3)), pyro.sample("v", normal(0, 1, 7, 3))
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Normal((u @ v.T)[user, item], sigma), obs=y)

    return model


@program
def item_response() -> Program:
    person, item = torch.randint(10, (80,)), torch.randint(6, (80,))
    y = torch.bernoulli(torch.full((80,), 0.6))

    def model() -> None:
        with pyro.plate("persons", 10):
            ability = pyro.sample("ability", dist.Normal(0, 1))
        with pyro.plate("items", 6):
            hard = pyro.sample("hard", dist.Normal(0, 2))
            sharp = pyro.sample("sharp", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 80):
            logits = sharp[item] * (ability[person] - hard[item])
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    return model


@program
def laplace_and_other_tails() -> Program:
    x, _, mean = table(30, 2)
    y = mean + torch.randn(30)

    def model() -> None:
        w = pyro.sample("w", dist.Laplace(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Cauchy(0.0, 1.0))
        g = pyro.sample("g", dist.Gumbel(0.0, 1.0))
        k = pyro.sample("k", dist.Logistic(0.0, 1.0))
        c = pyro.sample("c", dist.Chi2(3.0)) + pyro.sample("p", dist.Pareto(1.0, 3.0))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0)) + c
        with pyro.plate("data", 30):
            pyro.sample("y", dist.Laplace(x @ w + b + g * k, scale), obs=y)

    return model


@program
def multivariate_normal() -> Program:
    y = torch.randn(20, 3)

    def model() -> None:
        loc = pyro.sample("loc", normal(0, 2, 3))
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0).expand([3]).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(3, torch.tensor(1.0)))
        tril = tau.sqrt()[:, None] * corr
        with pyro.plate("data", 20):
            pyro.sample("y", dist.MultivariateNormal(loc, covariance_matrix=tril @ tril.mT), obs=y)

    return model


@program
def low_rank_normal() -> Program:
    y = torch.randn(10, 4)

    def model() -> None:
        factor = pyro.sample("factor", normal(0, 1, 4, 2))
        diagonal = pyro.sample("diagonal", dist.LogNormal(0.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("data", 10):
            loc = torch.zeros(4)
            pyro.sample("y", dist.LowRankMultivariateNormal(loc, factor, diagonal), obs=y)

    return model


@program
def zero_inflated_poisson() -> Program:
    y = torch.poisson(torch.full((40,), 2.0)) * (torch.rand(40) < 0.6)

    def model() -> None:
        rate, gate = pyro.sample("rate", dist.Gamma(2.0, 1.0)), pyro.sample("gate", dist.Beta(1, 1))
        with pyro.plate("data", 40):
            pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)

    return model


@program
def changepoint() -> Program:
    """A discrete parameter is summed over."""
    y = torch.cat([torch.poisson(torch.full((10,), 3.0)), torch.poisson(torch.full((10,), 1.0))])
    later = torch.ones(20, 20, dtype=torch.bool).tril()

    def model() -> None:
        early, late = (pyro.sample(name, dist.Exponential(1.0)) for name in ("early", "late"))
        each = dist.Poisson(torch.where(later, late, early)).log_prob(y[:, None])
        pyro.factor("y", each.sum(0).logsumexp(0))

    return model


@program
def hidden_markov() -> Program:
    """The forward algorithm."""
    y = torch.randn(15)

    def model() -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3, 3)).to_event(1)).log()
        loc = pyro.sample("loc", normal(0, 2, 3))
        each = dist.Normal(loc, 1.0).log_prob(y[:, None])
        total = each[0]
        for t in range(1, 15):
            total = (total[:, None] + p).logsumexp(0) + each[t]
        pyro.factor("y", total.logsumexp(0))

    return model


@program
def von_mises_and_sky() -> Program:
    y = torch.rand(20) * 6 - 3

    def model() -> None:
        loc = pyro.sample("loc", dist.VonMises(0.0, 1.0))
        k = pyro.sample("k", dist.HalfNormal(2.0))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.VonMises(loc, k), obs=y)

    return model


@program
def neural_network() -> Program:
    x, y = torch.randn(20, 2), torch.randn(20)

    def model() -> None:
        a, b = pyro.sample("a", normal(0, 1, 2, 5)), pyro.sample("b", normal(0, 1, 5))
        c = pyro.sample("c", normal(0, 1, 5))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(torch.tanh(x @ a + b) @ c, 0.5), obs=y)

    return model


def density(model: Program) -> tuple[Callable[[Tensor], Any], int]:
    """The log density on the unconstrained scale with its gradient, and the dimension."""
    with pyro.validation_enabled(False):
        start, potential, _, _ = initialize_model(model)
    sizes = [one.numel() for one in start.values()]

    def function(u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), pyro.validation_enabled(False):
            u = u.detach().requires_grad_()
            parts = zip(start.items(), u.split(sizes), strict=True)
            value = -potential({name: part.view(one.shape) for (name, one), part in parts})
            return value.detach(), torch.autograd.grad(value, u)[0]

    return function, sum(sizes)


@pytest.mark.parametrize("name", PROGRAMS)
def test_densities_and_gradients_are_those_of_autograd(name: str) -> None:
    torch.manual_seed(0)
    function, size = density(PROGRAMS[name]())
    compiled = compile_function(function, 0.1 * torch.randn(size))
    for scale in (0.0, 0.1, 0.5, 1.0, 2.0):
        u = scale * torch.randn(size)
        for found, expected in zip(compiled(u), function(u), strict=True):
            bound = 1e-10 * expected.abs().max().clamp(min=1)
            assert found.isfinite().all() and ((found - expected).abs() <= bound).all()


def test_a_caller_in_c_needs_addresses_alone() -> None:
    """As a sampler calls it: by pointers, on memory of its own for each thread."""
    data = torch.randn(50)
    compiled = compile_function(lambda x, y: ((x * data).sum(0) + y, x.exp()), X, torch.ones(()))
    run = ctypes.CFUNCTYPE(
        ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, CALL
    )(compiled.address)
    forks = [compiled.fork() for _ in range(4)]

    def work(i: int) -> None:
        own = forks[i]
        for k in range(200):
            own.inputs[0].fill_(i + k / 1000)
            own.inputs[1].fill_(i)
            assert run(own.addresses, own.strides, own.work.data_ptr(), 1, CALL()) == 1
            wrong[i] += abs(float(own.outputs[0] - (i + k / 1000) * data.sum() - i)) > 1e-9

    wrong = [0] * 4
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 4
    first = [*compiled.inputs, *compiled.outputs, compiled.holds]
    assert list(compiled.addresses)[: len(first)] == [one.data_ptr() for one in first]
    assert compiled.work.data_ptr() % 64 == 0 and not any(compiled.strides)


X = torch.linspace(-1, 1, 50, dtype=torch.float64)


def test_results_have_the_shapes_and_dtypes_of_the_function() -> None:
    held = torch.arange(6.0, dtype=torch.float32).view(2, 3)

    def function(x: Tensor, y: Tensor, unused: Tensor) -> list[Tensor]:
        return [x.T, (x > 0).sum(1), y[:0], held.T * 2, x.float() @ held.T, y, x.new_zeros(2)]

    arguments = (torch.randn(3, 3).T, torch.randn(2), torch.randn(4))
    compiled = compile_function(function, *arguments)
    for again in (arguments, [one + 1 for one in arguments]):
        for found, expected in zip(compiled(*again), function(*again), strict=True):
            assert found.dtype is expected.dtype
            torch.testing.assert_close(found, expected)
    before = compiled(*arguments)
    held.zero_()
    assert all(map(torch.equal, before, compiled(*arguments)))
    with pytest.raises(ValueError, match="shapes"):
        compiled(*arguments[:2])
    with pytest.raises(ValueError, match="shapes"):
        compiled(torch.randn(2, 3), *arguments[1:])


def test_a_function_of_nothing_and_one_that_returns_its_argument() -> None:
    assert compile_function(lambda: torch.tensor(2.5))() == 2.5
    assert torch.equal(compile_function(lambda x: x, X)(X + 1), X + 1)


def test_what_a_function_checks() -> None:
    def function(x: Tensor) -> Tensor:
        return dist.Normal(0.0, x, validate_args=True).log_prob(torch.tensor(0.3))

    compiled = compile_function(function, torch.tensor(2.0))
    assert compiled(torch.tensor(3.0)) == pytest.approx(float(function(torch.tensor(3.0))))
    with pytest.raises(ValueError, match="outside"):
        compiled(torch.tensor(-1.0))
    rows = compile_function(lambda i: X[i], torch.tensor([1, -2]))
    assert torch.equal(rows(torch.tensor([3, 4])), X[3:5])
    with pytest.raises(ValueError, match="outside"):
        rows(torch.tensor([3, 50]))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * 2 if x.sum() > 0 else x, "asked for its value.*test_functions"),
        (lambda x: x * x[0].item(), "asked for its value"),
        (lambda x: x[x > 0], "mask|values of a tensor"),
        (lambda x: x + torch.randn(50), "draws random numbers.*normal|randn"),
        (lambda x: x.add_(1), "changes its argument.*add_"),
        (lambda x: x.sort()[0], "no form in C: aten.sort"),
        (lambda x: torch.fft.rfft(x).abs(), "complex|fft"),
        (lambda x: x.half(), "float16"),
    ],
)
def test_what_is_refused_is_named(function: Any, message: str) -> None:
    with pytest.raises(CannotCompile, match=message):
        compile_function(function, X.clone())
