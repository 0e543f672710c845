"""A prior on weights: weight decay under AutoDelta, Bayesian regression with its closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuide,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_vi import Fit, compare, fit
from pyro_vi.families import MeanField
from pyro_vi.guides import Encoder, Joint
from pyro_vi.inference import PerDataPoint, with_terms
from pyro_vi.models import VAE
from pyro_vi.networks import MLPDecoder, MLPEncoder
from pyro_vi.posterior import vectorize_over_draws
from pyro_vi.programs import FixedSites
from pyro_vi.weight_prior import WeightPrior

torch.set_num_threads(1)

SCALE = 0.7
IMAGES = torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(0)).double().round()


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def vae() -> tuple[VAE, Encoder]:
    model = VAE((1, 3, 3), 2, decoder=partial(MLPDecoder, hidden=(5,)))
    return model, Encoder((1, 3, 3), MeanField(2, 6), network=partial(MLPEncoder, hidden=(5,)))


def bayesian(kind: Callable[..., AutoGuide] = AutoNormal) -> tuple[WeightPrior, Joint, AutoGuide]:
    """A VAE with a prior on its decoder, and guides of the weights and of z."""
    model, encoder = vae()
    prior = WeightPrior(model, model.decoder, SCALE)
    weights = kind(prior.weights, init_loc_fn=prior.init_loc_fn)
    return prior, Joint(weights, encoder), weights


def gradients(loss: ELBO, model: Any, guide: Any, tensors: list[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        tensor.grad = None
    torch.manual_seed(1)
    with_terms(loss).loss_and_grads(model, guide, IMAGES)
    return [tensor.grad for tensor in tensors]


# ------------------------------------------------------------------------------------ the program


def test_parameters_are_sites_under_the_prior() -> None:
    model, _ = vae()
    before = dict(model.decoder.named_parameters())
    prior = WeightPrior(model, model.decoder, SCALE)
    names = [f"decoder.{name}" for name in before]
    assert prior.sites == names == [f"decoder.layers.{i}.{k}" for i in "02" for k in WEIGHTS]
    trace = poutine.trace(prior).get_trace(IMAGES)
    assert list(trace.stochastic_nodes) == [*names, "data", "z"]
    for name in names:
        site = trace.nodes[name]
        own = before[name.removeprefix("decoder.")]
        assert site["fn"].event_shape == own.shape and not site["cond_indep_stack"]
        expected = dist.Normal(0.0, SCALE).log_prob(site["value"]).sum()
        torch.testing.assert_close(site["fn"].log_prob(site["value"]), expected)
    values = {name: trace.nodes[name]["value"] for name in names}
    logits = torch.func.functional_call(
        model.decoder,
        {name.removeprefix("decoder."): value for name, value in values.items()},
        trace.nodes["z"]["value"],
    )
    found = trace.nodes["x"]["fn"].log_prob(IMAGES)
    torch.testing.assert_close(found, model.likelihood(logits, event_dim=3).log_prob(IMAGES))
    after = dict(model.decoder.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in after)


WEIGHTS = ("weight", "bias")


def test_handlers_give_and_take_the_weights() -> None:
    model, _ = vae()
    prior = WeightPrior(model, model.decoder, SCALE)
    trace = poutine.trace(prior).get_trace(IMAGES)
    again = poutine.trace(poutine.replay(prior, trace=trace)).get_trace(IMAGES)
    assert trace.log_prob_sum() == again.log_prob_sum()
    given = {name: trace.nodes[name]["value"] for name in (*prior.sites, "z")}
    fixed = poutine.trace(poutine.condition(prior, data=given)).get_trace(IMAGES)
    assert fixed.nodes["decoder.layers.0.bias"]["is_observed"]
    assert trace.log_prob_sum() == fixed.log_prob_sum()


def test_with_the_modules_own_weights_the_model_is_the_plain_one() -> None:
    model, _ = vae()
    prior = WeightPrior(model, model.decoder, SCALE)
    own = {f"decoder.{name}": p.detach() for name, p in model.decoder.named_parameters()}
    torch.manual_seed(0)
    plain = poutine.trace(model).get_trace(IMAGES)
    torch.manual_seed(0)
    trace = poutine.trace(FixedSites(own)(prior)).get_trace(IMAGES)
    plain.compute_log_prob(), trace.compute_log_prob()
    assert torch.equal(plain.nodes["x"]["log_prob"], trace.nodes["x"]["log_prob"])


def fails(x: Tensor) -> None:
    raise ArithmeticError


def test_the_weights_are_put_back_after_an_error() -> None:
    model, _ = vae()
    held = [vars(module) for module in model.modules()]
    before = [(dict(own), list(own["_parameters"].items())) for own in held]
    prior = WeightPrior(model, model.decoder, SCALE)
    with pytest.raises(ValueError, match="expected data of shape"):
        prior(torch.zeros(2, 1, 4, 4))
    model.likelihood.forward = fails
    with pytest.raises(TypeError):
        prior(IMAGES)
    del model.likelihood.forward
    for own, (attributes, parameters) in zip(held, before, strict=True):
        assert own.keys() == attributes.keys() and own["_parameters"] is attributes["_parameters"]
        assert list(own["_parameters"].items()) == parameters


class Regressor(PyroModule):
    """A PyroModule whose layers are PyroModules, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](2, 1)
        self.slope = PyroParam(torch.tensor(1.5))
        self.lift = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.slope * self.layer(x).squeeze(-1) + self.lift
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(len(x)))


def by_pyro_module() -> tuple[Callable[..., Any], nn.Module]:
    model = Regressor()
    return model, model


def by_statement() -> tuple[Callable[..., Any], nn.Module]:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0), obs=torch.zeros(len(x)))

    return model, net


def recurrent() -> tuple[Callable[..., Any], nn.Module]:
    """Its kernel gets a list that the layer keeps of its weights."""
    net = nn.LSTM(2, 3, batch_first=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = net(x.unsqueeze(1).expand(-1, 2, -1))[0].sum((1, 2))
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(len(x)))

    return model, net


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def tied() -> tuple[Callable[..., Any], nn.Module]:
    """The prior is on the first layer, whose weight the second has too."""
    net = Tied()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).sum(-1), 1.0), obs=torch.zeros(len(x)))

    return model, net.first


HOLDERS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "PyroModule": (by_pyro_module, ["lift", "slope", "layer.weight", "layer.bias"]),
    "pyro.module": (by_statement, [f"net.{i}.{k}" for i in "02" for k in WEIGHTS]),
    "recurrent": (
        recurrent,
        [f"net.{k}_{i}h_l0" for k in WEIGHTS for i in "ih"],
    ),
    "tied": (tied, ["net.first.weight", "net.first.bias"]),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_modules_of_every_kind(name: str) -> None:
    """The density is that of the module with these weights; nothing of them is registered."""
    make, sites = HOLDERS[name]
    model, module = make()
    prior = WeightPrior(model, module, SCALE)
    assert sorted(prior.sites) == sorted(sites)
    x = torch.randn(4, 2)
    values = {site: torch.randn_like(v, requires_grad=True) for site, v in prior.weights().items()}
    trace = poutine.trace(FixedSites(values)(prior)).get_trace(x)
    trace.compute_log_prob()
    found = torch.autograd.grad(trace.nodes["y"]["log_prob_sum"], list(values.values()))
    assert all(bool(gradient.abs().sum() > 0) for gradient in found)
    assert not [site for site in trace.nodes.values() if site["type"] == "param"]
    assert not pyro.get_param_store().keys()
    held = dict(module.named_parameters())
    with torch.no_grad():
        for site, value in values.items():
            key = site.removeprefix("net.").removeprefix("first.")
            (held.get(key) if key in held else held[f"{key}_unconstrained"]).copy_(value)
    pyro.clear_param_store()
    plain = poutine.trace(model).get_trace(x)
    plain.compute_log_prob()
    torch.testing.assert_close(
        plain.nodes["y"]["log_prob"].detach(), trace.nodes["y"]["log_prob"].detach()
    )


class Keeps(nn.Module):
    """A layer that reads its weight from elsewhere."""

    def __init__(self, keep: Callable[[Tensor], Any], read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 2))
        self.kept, self.read = keep(self.weight), read

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.read(self.kept)) * self.weight.sum()


ELSEWHERE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda w: (w,), lambda kept: kept[0]),
    "dictionary": (lambda w: {"w": w}, lambda kept: kept["w"]),
    "nested": (lambda w: [{"w": w}], lambda kept: kept[0]["w"]),
    "closure variable": (lambda w: lambda: w, lambda kept: kept()),
    "in a list of tensors": (lambda w: (w,), lambda kept: torch.cat([kept[0]])),
    "transposed": (lambda w: (w,), lambda kept: kept[0].T.mT),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_weight_that_is_read_elsewhere_is_refused(name: str) -> None:
    """It would be the parameter, without the prior, and the likelihood would not have the site."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0), obs=torch.zeros(len(x)))

    net, x = Keeps(*ELSEWHERE[name]), torch.randn(4, 2)
    prior = WeightPrior(model, net, SCALE)
    words = "the model reads the parameter behind site 'net.weight', .*as an attribute of its mod"
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            prior(x)
    with pytest.raises(ValueError, match=words):
        fit(prior, AutoNormal(prior.weights), x, steps=1, progress=False)


def test_forms_of_a_parameter_may_be_read() -> None:
    net, x = nn.Linear(2, 1), torch.randn(4, 2)
    weight = net.weight

    def model(x: Tensor) -> None:
        scale = torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), scale), obs=torch.zeros(len(x)))

    WeightPrior(model, net, SCALE)(x)


def test_a_guide_that_shares_the_weights_is_refused() -> None:
    model, encoder = vae()
    prior = WeightPrior(model, model.decoder.layers[2], SCALE)
    weights = AutoNormal(prior.weights, init_loc_fn=prior.init_loc_fn)
    shared = model.decoder.layers[2]

    class Sharing(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.shared = encoder, shared

        def forward(self, x: Tensor) -> None:
            q = self.encoder.encode(x + self.shared.bias.reshape(1, 3, 3))
            with pyro.plate("data", len(x)):
                pyro.sample("z", q)

    options = {"steps": 1, "progress": False}
    words = "the guide reads the parameter behind site 'decoder.layers.2.bias'.* module of its own"
    for program in (
        prior,
        poutine.scale(prior, scale=0.5),
        WeightPrior(prior, model.decoder.layers[0], 1.0),
    ):
        with pytest.raises(ValueError, match=words):
            fit(program, Joint(weights, Sharing()), IMAGES, **options)

    def beside(x: Tensor) -> None:
        """Leads to the weights, and begins from them, but does not train them."""
        pyro.param("start", model.decoder.layers[2].bias.detach())
        encoder(x)

    assert fit(prior, Joint(weights, beside), IMAGES, **options).losses.isfinite().all()


def test_many_draws_at_once() -> None:
    """vmap gives every draw its weights, and the same as one by one."""
    model, module = by_statement()
    prior, x = WeightPrior(model, module, SCALE), torch.randn(4, 2)
    runs = []

    def run(fixed: dict[str, Tensor]) -> dict[str, Tensor]:
        runs.append(None)
        with FixedSites(fixed):
            trace = poutine.trace(prior).get_trace(x)
        trace.compute_log_prob()
        drawn = {f"noise {name}": trace.nodes[name]["value"] for name in prior.sites}
        return {**drawn, "mean": trace.nodes["y"]["fn"].mean}

    found = vectorize_over_draws(run, 7)
    assert len(runs) == 3  # all at once, and the first and the last by themselves
    assert found["mean"].shape == (7, 4) and not torch.equal(found["mean"][0], found["mean"][1])
    assert found["noise net.0.weight"].shape == (7, 3, 2)


def test_densities_asked_for_after_the_run_have_the_weights_of_the_run() -> None:
    class Conditional(dist.TorchDistribution):
        """A distribution that asks a module whenever its density is computed."""

        arg_constraints: ClassVar[dict[str, Any]] = {}
        support = constraints.real

        def __init__(self, net: nn.Module, x: Tensor) -> None:
            self.net, self.x = net, x
            super().__init__((len(x),), validate_args=False)

        def expand(self, shape: Any, _instance: Any = None) -> Any:
            return self

        def log_prob(self, value: Tensor) -> Tensor:
            return dist.Normal(self.net(self.x).squeeze(-1), 1.0).log_prob(value)

    net, x = nn.Linear(2, 1), torch.randn(4, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", Conditional(net, x), obs=torch.zeros(len(x)))

    trace = poutine.trace(WeightPrior(model, net, SCALE)).get_trace(x)
    trace.compute_log_prob()
    value = trace.nodes["net.weight"]["value"], trace.nodes["net.bias"]["value"]
    mean = nn.functional.linear(x, *value).squeeze(-1)
    expected = dist.Normal(mean, 1.0).log_prob(torch.zeros(4))
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], expected)


def test_priors_of_several_modules() -> None:
    model, net = by_statement()
    prior = WeightPrior(WeightPrior(model, net[0], 2.0), net[2], 0.1)
    assert prior.sites == ["net.2.weight", "net.2.bias", "net.0.weight", "net.0.bias"]
    guide = AutoDelta(prior.weights, init_loc_fn=prior.init_loc_fn)
    x = torch.randn(4, 2)
    guide(x)
    for name in prior.sites:
        torch.testing.assert_close(guide.median()[name], net.get_parameter(name[4:]).detach())
    trace = poutine.trace(prior).get_trace(x)
    scales = {name: float(trace.nodes[name]["fn"].base_dist.stddev.max()) for name in prior.sites}
    assert scales["net.2.bias"] == 0.1 and scales["net.0.weight"] == 2.0


def test_what_cannot_have_a_prior() -> None:
    model, encoder = vae()
    prior = partial(WeightPrior, model)
    for module in (encoder, nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"does not hold this {type(module).__name__}"):
            prior(module, 1.0)
    with pytest.raises(ValueError, match="got SiLU without any"):
        prior(model.decoder.layers[1], 1.0)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"positive scale of the prior, got {scale}"):
            prior(model.decoder, scale)
    with pytest.raises(TypeError, match="a number as the prior's scale, got 'a'"):
        prior(model.decoder, "a")
    with pytest.raises(TypeError, match=r"expected a torch module .* got 'decoder'"):
        prior("decoder", 1.0)
    with pytest.raises(TypeError, match="expected a Pyro program as model, got 3"):
        WeightPrior(3, model.decoder, 1.0)  # type: ignore[arg-type]
    twice = WeightPrior(prior(model.decoder, 1.0), model.decoder.layers[0], 1.0)
    with pytest.raises(ValueError, match="another prior already"):
        twice(IMAGES)
    model.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)
    with pytest.raises(ValueError, match=r"'scale' of VAE is constrained to .*: a Gaussian prior"):
        prior(model, 1.0)
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        WeightPrior(lazy, lazy, 1.0)
    fitted = fit(*vae(), IMAGES, steps=1, progress=False)
    with pytest.raises(ValueError, match="a fitted program keeps its modules to itself"):
        WeightPrior(fitted.model, model.decoder, 1.0)
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    prior, guide, _ = bayesian()
    with pytest.raises(ValueError, match=r"expected one value of shape .*vectorize_particles"):
        loss.loss(prior, guide, IMAGES)


# ------------------------------------------------------------------------------ MAP: weight decay


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_under_a_point_mass_the_gradient_is_that_of_weight_decay(loss: ELBO) -> None:
    """-ELBO + |W|^2 / (2 s^2), whose gradient is that of -ELBO, and W / s^2."""
    model, encoder = vae()
    decoder = dict(model.decoder.named_parameters())
    others = list(encoder.parameters())
    expected = gradients(loss, model, encoder, [*decoder.values(), *others])
    decay = [parameter.detach() / SCALE**2 for parameter in decoder.values()]

    prior = WeightPrior(model, model.decoder, SCALE)
    guide = AutoDelta(prior.weights, init_loc_fn=prior.init_loc_fn)
    guide(IMAGES)
    own = dict(guide.named_parameters())
    points = [own[f"decoder.{name}_unconstrained"] for name in decoder]
    found = gradients(loss, prior, Joint(guide, encoder), [*points, *others])
    for gradient, plain, more in zip(found, expected, decay, strict=False):
        torch.testing.assert_close(gradient, plain + more, rtol=0, atol=1e-10)
    for gradient, plain in zip(found[len(decay) :], expected[len(decay) :], strict=True):
        torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [AutoDelta, AutoNormal])
def test_the_prior_counts_once_a_data_set(kind: type) -> None:
    """Over all minibatches of an epoch, the loss is that of all data."""
    model, guide, weights = bayesian(kind)
    weights(IMAGES)
    z = torch.randn(len(IMAGES), 2)
    noise = {}
    for name in model.sites if kind is AutoNormal else ():
        noise[f"{name}_unconstrained"] = torch.randn_like(weights.median()[name])
    scaled = PerDataPoint("data", total=len(IMAGES))
    loss = with_terms(Trace_ELBO())

    def value(rows: Tensor) -> float:
        with FixedSites({"z": z[rows], **noise}):
            return float(loss.loss(scaled(model), scaled(guide), IMAGES[rows]))

    every = torch.arange(len(IMAGES))
    parts = [value(rows) for rows in every.split(2)]
    assert sum(parts) / len(parts) == pytest.approx(value(every), abs=1e-12)
    assert parts[0] != pytest.approx(parts[1])


def test_a_blocked_model_serves_an_autoguide_too() -> None:
    model, encoder = vae()
    prior = WeightPrior(model, model.decoder, SCALE)
    shown = poutine.block(prior, expose=prior.sites)
    weights = AutoLowRankMultivariateNormal(shown, rank=2, init_loc_fn=prior.init_loc_fn)
    fitted = fit(prior, Joint(weights, encoder), IMAGES, steps=3, batch_size=2, progress=False)
    assert fitted.losses.isfinite().all()


# ---------------------------------------------------------------------------------- fit and files


def test_a_fit_of_a_bayesian_decoder(tmp_path: Path) -> None:
    model, guide, weights = bayesian()
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    fitted = fit(model, guide, IMAGES, steps=5, batch_size=3, progress=False)
    after = dict(model.model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert weights.prototype_trace is None and not fitted.model_is_trained
    decoder = sum(p.numel() for p in model.model.decoder.parameters())
    encoder = sum(p.numel() for p in guide.guides[1].parameters())
    assert fitted.parameters == 2 * decoder + encoder  # locations and scales; not the weights

    posterior = fitted.posterior(IMAGES, num_samples=4)
    assert posterior.log_p.shape == (4,) and set(posterior.draws) == {*model.sites, "z"}
    assert posterior.draws["decoder.layers.0.weight"].shape == (4, 5, 2)
    fitted.save(tmp_path / "fit.pt")
    fresh, guide, _ = bayesian()
    loaded = Fit.load(tmp_path / "fit.pt", fresh, guide)
    again = loaded.posterior(IMAGES, num_samples=4)
    assert torch.equal(again.log_p, posterior.log_p)


# --------------------------------------------------------------------- Bayesian linear regression


class Regression:
    """y ~ N(X w, sigma^2), w ~ N(0, s^2), and what is known of it."""

    sigma, scale = 0.5, 1.3

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(12, 3, generator=generator)
        self.x[:, 1] += 0.8 * self.x[:, 0]  # collinear, so that mean-field has a gap
        self.y = self.x @ torch.tensor([1.0, -0.5, 0.3])
        self.y = self.y + self.sigma * torch.randn(12, generator=generator)
        self.data = self.x, self.y
        self.net = nn.Linear(3, 1, bias=False)
        self.model = WeightPrior(self.likelihood, self.net, self.scale)
        self.precision = self.x.T @ self.x / self.sigma**2 + torch.eye(3) / self.scale**2
        self.mean = torch.linalg.solve(self.precision, self.x.T @ self.y / self.sigma**2)
        marginal = self.sigma**2 * torch.eye(12) + self.scale**2 * self.x @ self.x.T
        evidence = MultivariateNormal(torch.zeros(12), marginal).log_prob(self.y)
        self.evidence = float(evidence)
        self.gap = 0.5 * float(self.precision.diag().log().sum() - self.precision.logdet())

    def likelihood(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(self.net(x).squeeze(-1), self.sigma), obs=y)

    def bound(self, guide: Callable[..., Any], noise: dict[str, Tensor]) -> Tensor:
        """log p - log q at a value of the guide's noise."""
        with FixedSites(noise):
            guide_trace = poutine.trace(guide).get_trace(*self.data)
        replayed = poutine.replay(self.model, trace=guide_trace)
        trace = poutine.trace(replayed).get_trace(*self.data)
        return trace.log_prob_sum() - guide_trace.log_prob_sum()


def test_full_covariance_reaches_the_conjugate_evidence_and_posterior() -> None:
    """At the exact posterior the bound is the evidence at every draw, and has no gradient."""
    exact = Regression()
    guide = AutoMultivariateNormal(exact.model)
    guide(*exact.data)
    root = torch.linalg.cholesky(torch.linalg.inv(exact.precision))
    guide.loc.data.copy_(exact.mean)
    guide.scale = root.diag()
    guide.scale_tril = root / root.diag()[:, None]
    for _ in range(3):
        assert -Trace_ELBO().loss(exact.model, guide, *exact.data) == pytest.approx(
            exact.evidence, abs=1e-10
        )
    fitted = fit(exact.model, guide, exact.data, steps=0, progress=False)
    posterior = fitted.posterior(exact.data, num_samples=5_000)
    evidence = posterior.log_p - posterior.log_q
    torch.testing.assert_close(evidence, torch.full((5_000,), exact.evidence), rtol=0, atol=1e-9)
    draws = posterior.draws["net.weight"].reshape(-1, 3)
    torch.testing.assert_close(draws.mean(0), exact.mean, rtol=0, atol=0.01)
    torch.testing.assert_close(draws.T.cov() @ exact.precision, torch.eye(3), rtol=0, atol=0.1)


def test_mean_field_has_the_variances_and_the_gap_that_are_known() -> None:
    """The expectation of a quadratic is its mean over the points +-sqrt(d) e_j."""
    exact = Regression()
    guide = AutoNormal(exact.model)
    guide(*exact.data)
    name = exact.model.sites[0]
    guide.locs.net.weight = exact.mean[None]
    guide.scales.net.weight = exact.precision.diag().rsqrt()[None]
    points = math.sqrt(3) * torch.cat([torch.eye(3), -torch.eye(3)])
    bounds = []
    for point in points:
        loc, scale = guide._get_loc_and_scale(name)
        bounds.append(exact.bound(guide, {f"{name}_unconstrained": loc + scale * point[None]}))
    bound = torch.stack(bounds).mean()
    assert float(bound.detach()) == pytest.approx(exact.evidence - exact.gap, abs=1e-10)
    assert exact.gap > 0.1
    for gradient in torch.autograd.grad(bound, list(guide.parameters())):
        torch.testing.assert_close(gradient, torch.zeros(1, 3), rtol=0, atol=1e-9)


def test_families_of_weights_side_by_side() -> None:
    exact = Regression()
    guides = {
        "mean-field": AutoNormal(exact.model, init_loc_fn=exact.model.init_loc_fn),
        "full covariance": AutoMultivariateNormal(exact.model),
    }
    result = compare(
        *(exact.model, guides, exact.data),
        steps=500,
        optim=partial(torch.optim.Adam, lr=0.05),
        schedule=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.99),
        progress=False,
    )
    assert result.shared
    bounds = {name: float(p.elbo().value) for name, p in result.posteriors.items()}
    assert bounds["full covariance"] == pytest.approx(exact.evidence, abs=0.05)
    gap = bounds["full covariance"] - bounds["mean-field"]
    assert gap == pytest.approx(exact.gap, abs=0.1)
    draws = result.posteriors["mean-field"].draws["net.weight"]
    ratio = draws.reshape(-1, 3).var(0) * exact.precision.diag()
    torch.testing.assert_close(ratio, torch.ones(3), rtol=0, atol=0.3)


def test_what_is_no_guide_is_refused() -> None:
    encoder = vae()[1]
    with pytest.raises(TypeError, match="expected callables as guides, got None"):
        Joint(encoder, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected guides, .* got none"):
        Joint()
    with pytest.raises(ValueError, match="site 'z' is in two of the guides"):
        Joint(encoder, encoder)(IMAGES)


def two_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


class Shift(PyroModule):
    """A guide of one latent, in a plate of its own making."""

    def __init__(self, name: str, plate: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.name, self.plate = name, plate
        self.loc = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        with self.plate(x) as rows:
            pyro.sample(self.name, dist.Normal(self.loc + 0.1 * x[rows], 0.9))
            return rows


def whole(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x))


def two_rows(x: Tensor) -> pyro.plate:
    return pyro.plate("data", len(x), subsample_size=2)


class InOnePlate(PyroModule):
    """Both guides' sites in one plate."""

    def __init__(self, *guides: Shift) -> None:
        super().__init__()
        self.one, self.other = guides

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for guide in (self.one, self.other):
                pyro.sample(guide.name, dist.Normal(guide.loc + 0.1 * x, 0.9))


def test_guides_share_a_plate() -> None:
    """As one guide that has both sites in one plate, eager and recorded, in minibatches too."""
    one, other, x = Shift("a", whole), Shift("b", whole), torch.randn(6)
    single = InOnePlate(one, other)
    for batch_size in (None, 2):
        found = [
            fit(two_latents, g, x, steps=8, batch_size=batch_size, compile=c, progress=False).losses
            for g, c in ((single, False), (Joint(one, other), False), (Joint(one, other), True))
        ]
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-9)


def test_guides_share_the_rows_that_are_drawn() -> None:
    drawn: list[Tensor] = []
    guides = [Shift(name, two_rows) for name in "abc"]
    for guide in guides:
        guide.register_forward_hook(lambda module, inputs, rows: drawn.append(rows))
    trace = poutine.trace(Joint(*guides)).get_trace(torch.randn(50))
    assert all(torch.equal(rows, trace.nodes["data"]["value"]) for rows in drawn) and drawn
    assert all(trace.nodes[name]["scale"] == 25 for name in "abc")
    words = "plate 'data' is in two of the guides, of 2 of 50 elements and of 50 of 50 elements"
    with pytest.raises(ValueError, match=words):
        Joint(guides[0], Shift("b", whole))(torch.randn(50))

    def rows(*indices: int) -> Callable[[Tensor], pyro.plate]:
        return lambda x: pyro.plate("data", len(x), subsample=torch.tensor(indices))

    assert poutine.trace(Joint(Shift("a", rows(3, 1)), Shift("b", rows(3, 1)))).get_trace(
        torch.randn(50)
    )
    with pytest.raises(ValueError, match="of 2 of 50 elements, not the same ones"):
        Joint(Shift("a", rows(3, 1)), Shift("b", rows(3, 2)))(torch.randn(50))
