"""The VAE: its sites, its bound against the formula, its errors."""

import math
from collections.abc import Callable

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_vi.families import MeanField
from pyro_vi.guides import Encoder
from pyro_vi.models import (
    VAE,
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    LearnedGaussian,
    PixelGaussian,
)
from pyro_vi.networks import ConvDecoder, MLPDecoder

torch.set_num_threads(1)

LIKELIHOODS = [
    Bernoulli,
    ContinuousBernoulli,
    lambda: Gaussian(0.5),
    LearnedGaussian,
    PixelGaussian,
    lambda: DiscretizedLogistic(256),
]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("decoder", [MLPDecoder, ConvDecoder])
def test_sites(
    likelihood: Callable[[], nn.Module],
    decoder: Callable[[int, tuple[int, ...]], nn.Module],
    device: torch.device,
) -> None:
    model = VAE((1, 8, 8), 3, likelihood=likelihood(), decoder=decoder).double().to(device)
    x = torch.randint(2, (5, 1, 8, 8), device=device).double()
    trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    z, observed = trace.nodes["z"], trace.nodes["x"]
    assert z["value"].shape == (5, 3) and z["value"].dtype == x.dtype
    assert z["value"].device == x.device and not z["is_observed"]
    assert observed["value"] is x and observed["is_observed"]
    assert z["log_prob"].shape == observed["log_prob"].shape == (5,)
    assert [frame.name for frame in z["cond_indep_stack"]] == ["data"]
    assert [frame.name for frame in observed["cond_indep_stack"]] == ["data"]
    expected = torch.distributions.Normal(0, 1).log_prob(z["value"]).sum(-1)
    torch.testing.assert_close(z["log_prob"], expected)


def test_vectors_and_leading_dimensions() -> None:
    model = VAE((6,), 2, likelihood=PixelGaussian())
    assert model.decode(torch.randn(4, 3, 2)).batch_shape == (4, 3)
    assert model.decode(torch.randn(2)).event_shape == (6,)
    with pyro.plate("draws", 4, dim=-2):
        trace = poutine.trace(model).get_trace(torch.randn(3, 6))
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (4, 3)


def test_generates() -> None:
    model = VAE((1, 8, 8), 3, likelihood=DiscretizedLogistic(256))
    images = model.decode(torch.randn(10, 3)).sample()
    assert images.shape == (10, 1, 8, 8)
    assert ((images * 255 - (images * 255).round()).abs() < 1e-4).all()


def closed_form_kl(loc: Tensor, scale: Tensor) -> Tensor:
    return 0.5 * (loc**2 + scale**2 - 1 - 2 * scale.log()).sum()


@pytest.mark.parametrize("scale", [0.1, math.sqrt(0.5), 2.0])
def test_fixed_scale_is_the_mean_squared_error(scale: float) -> None:
    """-ELBO = |x - decoder(z)|^2 / (2 s^2) + KL + N D (log s + 1/2 log 2 pi), noise alike."""
    model = VAE((1, 8, 8), 3, likelihood=Gaussian(scale)).double()
    guide = Encoder((1, 8, 8), MeanField(3, context_dim=16)).double()
    x = torch.rand(10, 1, 8, 8, dtype=torch.float64)

    q = guide.encode(x).base_dist
    torch.manual_seed(1)
    z = q.loc + q.scale * torch.randn_like(q.loc)
    square = F.mse_loss(model.decoder(z).squeeze(1), x, reduction="sum")
    constant = x.numel() * (math.log(scale) + 0.5 * math.log(2 * math.pi))
    by_hand = square / (2 * scale**2) + closed_form_kl(q.loc, q.scale) + constant

    torch.manual_seed(1)
    loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12, abs=1e-10)

    parameters = [*model.decoder.parameters(), *guide.network.parameters()]
    ours = torch.autograd.grad(loss, parameters)
    theirs = torch.autograd.grad(by_hand, parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    torch.manual_seed(1)
    sampled = Trace_ELBO().differentiable_loss(model, guide, x)
    log_ratio = q.log_prob(z).sum() - torch.distributions.Normal(0, 1).log_prob(z).sum()
    expected = square / (2 * scale**2) + log_ratio + constant
    assert sampled.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-10)


def test_bernoulli_bound_is_the_cross_entropy() -> None:
    model, x = VAE((1, 8, 8), 3).double(), torch.randint(2, (10, 1, 8, 8)).double()
    guide = Encoder((1, 8, 8), MeanField(3, context_dim=16)).double()
    q = guide.encode(x).base_dist
    torch.manual_seed(1)
    z = q.loc + q.scale * torch.randn_like(q.loc)
    logits = model.decoder(z).squeeze(1)
    entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    torch.manual_seed(1)
    loss = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    expected = entropy + closed_form_kl(q.loc, q.scale)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_registers_its_parameters_under_names_of_its_own() -> None:
    model = VAE((1, 8, 8), 3, likelihood=LearnedGaussian())
    guide = Encoder((1, 8, 8), MeanField(3, context_dim=16))
    with pyro.get_param_store().scope() as store:
        Trace_ELBO().loss(model, guide, torch.rand(10, 1, 8, 8))
    assert len(store["params"]) == len([*model.parameters(), *guide.parameters()])
    heads = {name.split("$$$")[0].split(".")[0] for name in store["params"]}
    assert heads == {"decoder", "likelihood", "network", "family"}


@pytest.mark.parametrize("shape", [(10, 8, 8), (10, 1, 8, 7), (1, 8, 8), ()], ids=str)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected data of shape \(N, \*\(1, 8, 8\)\), got"):
        VAE((1, 8, 8), 3)(torch.zeros(shape))


def test_other_values_are_refused() -> None:
    with pytest.raises(TypeError, match=r"floating point dtype, got torch\.uint8"):
        VAE((1, 8, 8), 3)(torch.zeros(10, 1, 8, 8, dtype=torch.uint8))
    trace = poutine.trace(VAE((1, 8, 8), 3)).get_trace(torch.full((10, 1, 8, 8), 0.5))
    with pytest.raises(ValueError, match=r"'x'[\s\S]*within the support"):
        trace.compute_log_prob()


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="latent_dim to be at least 1, got 0"):
        VAE((1, 8, 8), 0)
    with pytest.raises(TypeError, match="expected the likelihood to be a module"):
        VAE((1, 8, 8), 3, likelihood=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="expected the likelihood to be a module"):
        VAE((1, 8, 8), 3, likelihood=Gaussian)  # type: ignore[arg-type]
    narrow = VAE((1, 8, 8), 3, decoder=lambda latent_dim, shape: MLPDecoder(latent_dim, (1, 8, 8)))
    with pytest.raises(ValueError, match=r"decoder from \(5, 3\) to \(5, 1, 1, 8, 8\), got"):
        narrow.decode(torch.zeros(5, 3))
