"""The equations of docs/from_equations_to_sites.md, each against its closed form.

On a linear-Gaussian model log p(x) and p(z | x) are known. log p(x, z) and log q are quadratic in z
there, so that their means under a normal q are means over 2k points: the mean of q, plus and minus
sqrt(k) times each column of a root of its covariance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_programs import LinearPair
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.nn import PyroModule
from test_ddpm import trio
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vi import fit
from pyro_vi.diffusion import Simple
from pyro_vi.families import FullCovariance, LowRank, MeanField
from pyro_vi.guides import Encoder
from pyro_vi.inference import with_terms
from pyro_vi.models import VAE, Gaussian, LinearGaussian
from pyro_vi.programs import FixedSites
from pyro_vi.weight_prior import WeightPrior
from pyro_vi.weighting import TermWeights

torch.set_num_threads(1)

Make = Callable[[LinearGaussian, Tensor], dist.MultivariateNormal]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def example() -> tuple[LinearGaussian, Tensor]:
    weight = torch.tensor([[1.5, 1.0], [0.5, 1.2], [-0.3, 0.8]])
    return LinearGaussian(weight, torch.randn(3), 0.8), 2 * torch.randn(5, 3)


def exact(model: LinearGaussian, x: Tensor) -> dist.MultivariateNormal:
    return model.posterior(x)


def mean_field(model: LinearGaussian, x: Tensor) -> dist.MultivariateNormal:
    """The best one."""
    covariance = (1 / model.precision.diagonal()).diag()
    return dist.MultivariateNormal(model.posterior(x).mean, covariance)


def elsewhere(model: LinearGaussian, x: Tensor) -> dist.MultivariateNormal:
    """At a wrong place, too wide and tilted the wrong way."""
    covariance = torch.tensor([[2.0, -0.9], [-0.9, 0.7]])
    return dist.MultivariateNormal(model.posterior(x).mean + torch.tensor([0.7, -0.2]), covariance)


every_guide = pytest.mark.parametrize("make", [exact, mean_field, elsewhere])


def points(q: dist.MultivariateNormal) -> Tensor:
    """2k points, (2k, N, k), over which quadratic functions of z have their means under q."""
    root = math.sqrt(q.event_shape[0]) * q.scale_tril.mT
    return (q.mean.unsqueeze(-2) + torch.cat([root, -root], -2)).movedim(-2, 0)


class Bound:
    """A guide of a linear-Gaussian model, and what is known of the two."""

    def __init__(self, make: Make) -> None:
        self.model, self.x = example()
        self.make = make
        self.q = make(self.model, self.x)
        self.z = points(self.q)
        self.evidence = self.model.log_evidence(self.x)
        self.gap = kl_divergence(self.q, self.model.posterior(self.x))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.make(self.model, x))

    def log_joint(self, z: Tensor) -> Tensor:
        """log p(x, z), by the program's own sites."""
        trace = poutine.trace(poutine.condition(self.model, {"z": z})).get_trace(self.x)
        trace.compute_log_prob()
        joint: Tensor = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
        return joint

    @property
    def energy(self) -> Tensor:
        """E_q[-log p(x, z)]."""
        return -torch.stack([self.log_joint(z) for z in self.z]).mean(0)

    def loss(self, kind: type[Trace_ELBO]) -> tuple[float, float]:
        """A loss of Pyro's and the KL in it, without Monte Carlo error."""
        num = len(self.z)
        loss = with_terms(kind())
        value = float(
            loss.loss(
                self.model,
                FixedSites({"z": self.z.flatten(0, 1)})(self.guide),
                self.x.repeat(num, 1),
            )
        )
        return value / num, loss.kl() / num


# The bound


@every_guide
def test_the_evidence_is_the_bound_and_the_gap(make: Make) -> None:
    """log p(x) = ELBO + KL(q || p(z | x)), with an ELBO that is Pyro's loss with another sign."""
    this = Bound(make)
    bound = -this.energy + this.q.entropy()
    close(bound + this.gap, this.evidence)
    for kind in (Trace_ELBO, TraceMeanField_ELBO):
        assert this.loss(kind)[0] == pytest.approx(-float(bound.sum()), abs=1e-10)
    assert (this.gap > 0.05).all() or make is exact


@every_guide
def test_the_evidence_is_the_weight_and_the_gap_at_every_draw(make: Make) -> None:
    """log p(x) = log w + log q(z) - log p(z | x), whose mean under q is the line above."""
    this = Bound(make)
    for z in this.q.sample((20,)):
        log_q = this.q.log_prob(z)
        log_w = this.log_joint(z) - log_q
        close(log_w + log_q - this.model.posterior(this.x).log_prob(z), this.evidence)


@every_guide
def test_the_free_energy_is_minus_the_bound(make: Make) -> None:
    """Energy minus entropy, and minus the evidence plus the gap; the entropy is -E_q[log q]."""
    this = Bound(make)
    entropy = -torch.stack([this.q.log_prob(z) for z in this.z]).mean(0)
    close(entropy, this.q.entropy())
    free_energy = this.energy - entropy
    close(free_energy, this.gap - this.evidence)
    assert this.loss(Trace_ELBO)[0] == pytest.approx(float(free_energy.sum()), abs=1e-10)


@every_guide
def test_the_kl_of_the_loss_is_to_the_prior(make: Make) -> None:
    """And what is missing from the evidence is the one to the posterior, another number."""
    this = Bound(make)
    prior = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    to_prior = float(kl_divergence(this.q, prior).sum())
    for kind in (Trace_ELBO, TraceMeanField_ELBO):
        loss, kl = this.loss(kind)
        assert kl == pytest.approx(to_prior, abs=1e-10)
        missing = float(this.evidence.sum()) + loss
        assert missing == pytest.approx(float(this.gap.sum()), abs=1e-10)
        assert abs(missing - kl) > 1


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("particles", [1, 2, 8])
def test_renyi_of_order_zero_is_the_log_of_the_mean_weight(particles: int, vectorize: bool) -> None:
    """log 1/K sum_k w_k, by the same draws."""
    this = Bound(elsewhere)
    loss = RenyiELBO(num_particles=particles, vectorize_particles=vectorize, max_plate_nesting=1)
    torch.manual_seed(3)
    bound = -loss.loss(this.model, this.guide, this.x)
    torch.manual_seed(3)
    draws = [this.q.sample() for _ in range(particles)]
    if vectorize:
        torch.manual_seed(3)
        draws = list(this.q.sample((particles,)))
    log_w = torch.stack([this.log_joint(z) - this.q.log_prob(z) for z in draws])
    expected = (log_w.logsumexp(0) - math.log(particles)).sum()
    assert bound == pytest.approx(float(expected), abs=1e-10)


def test_a_plate_scales_what_it_sub_samples() -> None:
    """Over every two of four data points N/B times the sum averages to the whole."""
    x, z = torch.randn(4), torch.randn(4)

    def model(index: Tensor) -> None:
        with pyro.plate("data", 4, subsample=index):
            local = pyro.sample("z", dist.Normal(torch.zeros(len(index)), 1.0))
            pyro.sample("x", dist.Normal(local, 0.5), obs=x[index])

    def log_joint(index: Tensor) -> Tensor:
        conditioned = poutine.condition(model, {"z": z[index]})
        return poutine.trace(conditioned).get_trace(index).log_prob_sum()

    parts = [log_joint(torch.tensor(pair)) for pair in combinations(range(4), 2)]
    close(torch.stack(parts).mean(), log_joint(torch.arange(4)))


# The VAE


def vae(scale: float) -> tuple[VAE, Encoder, Tensor]:
    torch.manual_seed(1)
    model = VAE((6,), 2, likelihood=Gaussian(scale))
    return model, Encoder((6,), MeanField(2, context_dim=8)), torch.randn(9, 6)


def found(
    model: VAE, guide: Encoder, x: Tensor, weights: TermWeights | None = None
) -> tuple[float, list[Tensor]]:
    """Pyro's loss and its gradient."""
    weights = TermWeights() if weights is None else weights
    torch.manual_seed(2)
    value = TraceMeanField_ELBO().differentiable_loss(weights.model(model), weights.guide(guide), x)
    return value.item(), gradient(value, model, guide)


def gradient(value: Tensor, model: VAE, guide: Encoder) -> list[Tensor]:
    return list(torch.autograd.grad(value, [*model.parameters(), *guide.parameters()]))


@pytest.mark.parametrize(
    ("reduction", "variance"), [("sum", 0.5), ("mean", 3.0)], ids=["sum", "mean of six"]
)
def test_squared_error_plus_kl_assumes_a_variance(reduction: str, variance: float) -> None:
    """Of 1/2 where the squares of a data point are summed, of D/2 where they are averaged."""
    model, guide, x = vae(math.sqrt(variance))
    q = guide.encode(x)
    torch.manual_seed(2)
    error = (x - model.decode(q.rsample()).mean).square()
    error = error.sum() if reduction == "sum" else error.mean(-1).sum()
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    by_hand = error + kl_divergence(q, prior).sum()
    value, slopes = found(model, guide, x)
    constant = 0.5 * x.numel() * math.log(2 * math.pi * variance)
    assert value == pytest.approx(by_hand.item() + constant, abs=1e-10)
    hand = gradient(by_hand, model, guide)
    for one, other in zip(slopes, hand, strict=True):
        close(one, other)
    unit = found(*vae(1.0))[1]
    assert any((one - other).abs().max() > 0.1 for one, other in zip(unit, hand, strict=True))


@pytest.mark.parametrize("beta", [0.25, 4.0])
def test_a_kl_weight_is_a_variance(beta: float) -> None:
    """Under N(x | m, s^2), weight beta has beta times the gradient of weight 1 and s^2 beta."""
    weighted = found(*vae(0.6), TermWeights(kl=beta))[1]
    plain = found(*vae(0.6 * math.sqrt(beta)))[1]
    for one, other in zip(weighted, plain, strict=True):
        close(one, beta * other)


@pytest.mark.parametrize("family", [MeanField, FullCovariance, LowRank])
def test_mean_field_means_independent_latents(family: type[nn.Module]) -> None:
    """Every normal has means and variances; the mean-field one alone is the product of them."""
    q = family(3, 4)
    nn.init.normal_(q.head.weight)
    posterior = q(torch.randn(4))
    z = posterior.sample((50,))
    marginals = dist.Normal(posterior.mean, posterior.variance.sqrt()).log_prob(z).sum(-1)
    difference = (posterior.log_prob(z) - marginals).abs()
    assert difference.max() < 1e-10 if family is MeanField else difference.max() > 0.1


# Diffusion


@pytest.mark.parametrize("t", range(2, 9))
def test_a_step_of_diffusion_is_a_squared_error(t: int) -> None:
    """Of x_0, and of the noise, with small variances; the simple loss has the weight one of it."""
    model, x = trio()
    diffusion = model.diffusion
    now, before = torch.tensor(t), torch.tensor(t - 1)
    y_0, eps = diffusion.encode(x), torch.randn(x.shape)
    (signal, noise), (signal_s, noise_s) = (diffusion.schedule.levels(s) for s in (now, before))
    y_t = signal * y_0 + noise * eps
    estimate = model.denoise(y_t, now)
    kl = kl_divergence(diffusion.before(y_t, y_0, now), model.before(y_t, now))

    drop = (signal_s / noise_s) ** 2 - (signal / noise) ** 2
    close(kl, 0.5 * drop * (y_0 - estimate).square().sum(-1))

    alpha = (signal / signal_s) ** 2
    beta = 1 - alpha
    small = beta * noise_s**2 / noise**2
    error = (eps - model.net(y_t, now.expand(len(x)))).square().sum(-1)
    close(kl, beta**2 / (2 * small * alpha * noise**2) * error)

    weight = Simple(diffusion)(now)
    torch.testing.assert_close(weight * kl, 0.5 * error / 8, rtol=1e-9, atol=1e-9)


# Weights


class Line(PyroModule):
    """y ~ N(W x + b, 1/4)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](3, 1)

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def nothing(x: Tensor, y: Tensor) -> None:
    """The guide of a model without latents."""


def line() -> tuple[Line, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return Line(), (torch.randn(12, 3), torch.randn(12))


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_a_prior_on_weights_is_a_penalty_and_a_constant(scale: float) -> None:
    """-log p(W) = |W|^2 / (2 s^2) + d/2 log(2 pi s^2)."""
    model, data = line()
    plain = Trace_ELBO().loss(model, nothing, *data)
    square = sum(p.detach().square().sum() for p in model.net.parameters())
    prior = WeightPrior(model, model.net, scale)
    guide = AutoDelta(prior.weights, init_loc_fn=prior.init_loc_fn)
    penalty = square / (2 * scale**2) + 4 / 2 * math.log(2 * math.pi * scale**2)
    found = Trace_ELBO().loss(prior, guide, *data)
    assert found - plain == pytest.approx(float(penalty), abs=1e-10)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_prior_on_weights_is_weight_decay_over_the_data(batch_size: int | None) -> None:
    """A loss in nats per data point has |W|^2 / (2 N s^2), and SGD's weight_decay is 1/(N s^2)."""
    scale, options = 0.4, {"steps": 25, "batch_size": batch_size, "progress": False}
    model, data = line()
    decay = partial(torch.optim.SGD, lr=0.05, weight_decay=1 / (12 * scale**2))
    decayed = fit(model, nothing, data, optim=decay, **options)
    prior = WeightPrior(model, model.net, scale)
    guide = AutoDelta(prior.weights, init_loc_fn=prior.init_loc_fn)
    point = fit(prior, guide, data, optim=partial(torch.optim.SGD, lr=0.05), **options)
    weights = point.guide.median()
    for name, value in decayed.model.state.tensors().items():
        key = name.removeprefix("model.")
        close(weights[key], value)
        assert (value - model.get_parameter(key)).abs().max() > 0.01


# Prediction


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_the_evidence_of_a_predictor_is_the_bound_and_the_gap(shift: float) -> None:
    """log p(y | x) = ELBO + KL(q(z | x, y) || p(z | x, y)), and at every draw of z."""
    pair, moved = LinearPair(), LinearPair()
    with torch.no_grad():
        moved.guide.family.head.bias[:2] += shift
        moved.guide.family.head.bias[-1] += shift
    posterior, q = (one.guide.encode(pair.x, pair.y) for one in (pair, moved))
    prior = pair.model.prior(pair.x)
    evidence = pair.predictive(pair.x).log_prob(pair.y)

    def reconstruction(z: Tensor) -> Tensor:
        log_p: Tensor = pair.model.decode(z, pair.x).log_prob(pair.y)
        return log_p

    bound = reconstruction(points(q)).mean(0) - kl_divergence(q, prior)
    gap = kl_divergence(q, posterior)
    close(bound + gap, evidence, 1e-9)
    assert (gap > 0.1).all() == bool(shift)
    for z in q.sample((20,)):
        log_w = reconstruction(z) + prior.log_prob(z) - q.log_prob(z)
        close(log_w + q.log_prob(z) - posterior.log_prob(z), evidence, 1e-9)
        loss = Trace_ELBO().loss(pair.model, FixedSites({"z": z})(moved.guide), pair.x, pair.y)
        assert -loss == pytest.approx(float(log_w.detach().sum()), abs=1e-9)
