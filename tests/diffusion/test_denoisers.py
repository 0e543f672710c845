"""Denoisers keep shapes, tell times apart, treat every data point alone, and can be trained."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_vi import Fit, fit
from pyro_vi.diffusion import (
    Autocast,
    CosineSchedule,
    Diffusion,
    FromDiffusers,
    GivenSchedule,
    MLPDenoiser,
    TimeEmbedding,
    UNet,
)
from pyro_vi.guides import ForwardProcess
from pyro_vi.models import DDPM

torch.set_num_threads(1)

Shape = tuple[int, ...]
Make = Callable[[Shape], nn.Module]
STEPS = 100
IMAGES: list[Shape] = [(1, 8, 8), (3, 28, 28), (1, 7, 5), (2, 1, 1), (1, 2, 9)]
VECTORS: list[Shape] = [(1,), (3,), (2, 3)]


def perceptron(shape: Shape) -> nn.Module:
    return MLPDenoiser(shape, STEPS, hidden=(16, 16, 8), time_dim=8)


def unet(shape: Shape) -> nn.Module:
    return UNet(shape, STEPS, channels=(8, 12), time_dim=8)


makers = pytest.mark.parametrize("make", [perceptron, unet])
cases = pytest.mark.parametrize(
    ("make", "shape"),
    [(perceptron, shape) for shape in VECTORS + IMAGES] + [(unet, shape) for shape in IMAGES],
)
dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)


def noisy(n: int, shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *shape, dtype=dtype), torch.randint(1, STEPS + 1, (n,))


def stirred(net: nn.Module) -> nn.Module:
    """The network with other parameters everywhere, so that no layer of it gives zeros."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@cases
@pytest.mark.parametrize("n", [0, 1, 3])
def test_result_has_the_shape_of_the_data(
    make: Make, shape: Shape, n: int, device: torch.device
) -> None:
    x, t = noisy(n, shape)
    assert make(shape).to(device)(x.to(device), t.to(device)).shape == (n, *shape)


@pytest.mark.parametrize("shape", IMAGES[:3], ids=str)
def test_default_sizes(shape: Shape) -> None:
    x, t = noisy(2, shape)
    for net in (UNet(shape, STEPS), MLPDenoiser(shape, STEPS)):
        assert net(x, t).shape == x.shape


@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": (8,), "attention": ()},
        {"channels": (8, 12, 20), "attention": (0, 2), "blocks": 2},
        {"channels": (3, 5, 7), "attention": (), "heads": 1},
        {"channels": (8, 8), "attention": [1], "heads": 8, "dropout": 0.5},
    ],
    ids=str,
)
def test_sizes_of_a_unet(sizes: dict) -> None:
    x, t = noisy(2, (1, 7, 5))
    net = stirred(UNet((1, 7, 5), STEPS, **sizes))
    assert net(x, t).shape == x.shape
    torch.testing.assert_close(net.eval()(x, t), net(x, t))


def test_dropout_acts_in_training_alone() -> None:
    x, t = noisy(2, (1, 8, 8))
    net = stirred(UNet((1, 8, 8), STEPS, channels=(8,), attention=(), dropout=0.5))
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))


@cases
@dtypes
def test_every_row_stands_alone(
    make: Make, shape: Shape, dtype: torch.dtype, tolerance: float
) -> None:
    x, t = noisy(3, shape, dtype)
    net = stirred(make(shape).to(dtype))
    together = net(x, t)
    assert together.dtype == dtype
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


@cases
def test_result_depends_on_the_time(make: Make, shape: Shape) -> None:
    x, _ = noisy(1, shape)
    net = stirred(make(shape))
    early, late = net(x, torch.tensor([1])), net(x, torch.tensor([STEPS]))
    assert (early - late).abs().max() > 1e-4


@makers
@pytest.mark.parametrize("shape", [(1, 7, 5), (1, 2, 1)], ids=str)  # the second ends in one pixel
@pytest.mark.parametrize("gradients", [True, False])
def test_vmap_equals_the_loop(make: Make, shape: Shape, gradients: bool) -> None:
    net = stirred(make(shape))
    x, t = noisy(6, shape)
    x, t = x.unflatten(0, (3, 2)), t.unflatten(0, (3, 2))
    with torch.set_grad_enabled(gradients):
        at_once = torch.func.vmap(net)(x, t)
        one_by_one = torch.stack([net(*pair) for pair in zip(x, t, strict=True)])
        torch.testing.assert_close(at_once, one_by_one, rtol=1e-4, atol=1e-5)
        shared = torch.func.vmap(net, in_dims=(0, None))(x, t[0])
        torch.testing.assert_close(shared[1], net(x[1], t[0]), rtol=1e-4, atol=1e-5)


@makers
def test_vmap_over_parameters_and_gradients(make: Make) -> None:
    nets = [stirred(make((1, 7, 5))) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(nets)
    x, t = noisy(2, (1, 7, 5))

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(nets[0], values, (x, t)).square().mean()

    at_once = torch.func.vmap(torch.func.grad(loss))(parameters)
    for i, net in enumerate(nets):
        one = torch.func.grad(loss)({k: v.detach() for k, v in net.named_parameters()})
        for name, gradient in one.items():
            torch.testing.assert_close(at_once[name][i], gradient, rtol=1e-3, atol=1e-5)


@makers
def test_compiles_as_one_graph(make: Make) -> None:
    net = stirred(make((1, 7, 5)))
    x, t = noisy(2, (1, 7, 5))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t), net(x, t))


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_unet_starts_at_zero(shape: Shape) -> None:
    x, t = noisy(3, shape)
    assert torch.equal(unet(shape)(x, t), torch.zeros_like(x))


@pytest.mark.parametrize(
    ("make", "shape"), [(perceptron, (3,)), (unet, (1, 7, 5)), (unet, (2, 8, 8))]
)
def test_gradients_reach_every_parameter(make: Make, shape: Shape) -> None:
    net = make(shape)
    x, t = noisy(4, shape)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):  # the first step leaves the zeros of the last layer
        optimizer.zero_grad()
        (net(x, t) - torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("make", [MLPDenoiser, UNet])
def test_fits_a_small_batch(make: Callable[..., nn.Module]) -> None:
    net = make((1, 7, 6), STEPS)
    x, t = noisy(8, (1, 7, 6))
    target = torch.randn_like(x)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(x, t) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_copies_and_state_dicts_give_the_same() -> None:
    x, t = noisy(2, (1, 7, 5))
    net = stirred(unet((1, 7, 5)))
    loaded = unet((1, 7, 5))
    loaded.load_state_dict(net.state_dict())
    for other in (loaded, copy.deepcopy(net)):
        assert torch.equal(other(x, t), net(x, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_embedding_tells_every_step_from_the_next(dtype: torch.dtype) -> None:
    embedding = TimeEmbedding(64, 4000).to(dtype)
    every = embedding(torch.arange(1, 4001))
    assert every.dtype == dtype and every.shape == (4000, 64)
    steps = (every[1:] - every[:-1]).norm(dim=1)
    assert steps.min() > 1e-2  # of a norm near one
    assert steps.max() < 10 * steps.min()  # none is lost in rounding


def test_embedding_in_float32_is_that_in_float64() -> None:
    embedding = TimeEmbedding(64, 4000)
    t = torch.arange(1, 4001)
    exact = copy.deepcopy(embedding).double()(t)
    torch.testing.assert_close(embedding(t).double(), exact, rtol=0, atol=1e-4)


def test_embedding_depends_on_the_share_of_time_alone() -> None:
    coarse, fine = TimeEmbedding(16, 300), TimeEmbedding(16, 2100)
    fine.load_state_dict(coarse.state_dict())
    t = torch.arange(1, 301)
    assert torch.equal(coarse(t), fine(7 * t))


def test_embedding_takes_any_leading_dimensions() -> None:
    embedding = TimeEmbedding(8, STEPS)
    t = torch.randint(1, STEPS + 1, (2, 3))
    torch.testing.assert_close(embedding(t), torch.stack([embedding(row) for row in t]))
    assert embedding(torch.tensor(1)).shape == (8,)


@makers
@pytest.mark.parametrize("shape", [(), (2,), (2, 35), (2, 1, 5, 7), (1, 7, 5), (2, 2, 1, 7, 5)])
def test_other_shapes_of_the_data_are_errors(make: Make, shape: Shape) -> None:
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 1, 7, 5\)"):
        make((1, 7, 5))(torch.zeros(shape), torch.ones(2, dtype=torch.long))


@makers
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)], ids=str)
def test_other_shapes_of_the_time_are_errors(make: Make, shape: Shape) -> None:
    with pytest.raises(ValueError, match=r"expected t of shape \(2,\)"):
        make((1, 7, 5))(torch.zeros(2, 1, 7, 5), torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("make", "shape", "sizes", "message"),
    [
        (MLPDenoiser, (), {}, "shape"),
        (MLPDenoiser, (0,), {}, r"shape\[0\]"),
        (MLPDenoiser, (2,), {"hidden": ()}, "hidden"),
        (MLPDenoiser, (2,), {"hidden": (4, 0)}, r"hidden\[1\]"),
        (MLPDenoiser, (2,), {"time_dim": 7}, "even"),
        (MLPDenoiser, (2,), {"steps": 0}, "steps"),
        (UNet, (8, 8), {}, r"\(C, H, W\)"),
        (UNet, (1, 8, 0), {}, r"shape\[2\]"),
        (UNet, (1, 8, 8), {"channels": ()}, "channels"),
        (UNet, (1, 8, 8), {"channels": (8, -1)}, r"channels\[1\]"),
        (UNet, (1, 8, 8), {"channels": (8,), "attention": (1,)}, "levels from 0 to 0"),
        (UNet, (1, 8, 8), {"attention": (-1,)}, "levels from 0 to 2"),
        (UNet, (1, 8, 8), {"heads": 5}, "5 heads to divide"),
        (UNet, (1, 8, 8), {"heads": 0}, "heads"),
        (UNet, (1, 8, 8), {"blocks": 0}, "blocks"),
        (UNet, (1, 8, 8), {"dropout": 1.0}, "dropout"),
        (UNet, (1, 8, 8), {"dropout": -0.1}, "dropout"),
        (UNet, (1, 8, 8), {"time_dim": 7}, "even"),
        (UNet, (1, 8, 8), {"steps": 0}, "steps"),
    ],
)
def test_sizes_that_cannot_be_are_errors(
    make: Callable[..., nn.Module], shape: Shape, sizes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(shape, **{"steps": STEPS, **sizes})


@pytest.mark.parametrize("sizes", [{"steps": 1.5}, {"time_dim": 8.0}, {"steps": True}], ids=str)
@pytest.mark.parametrize("make", [MLPDenoiser, UNet])
def test_sizes_that_are_no_whole_numbers_are_errors(
    make: Callable[..., nn.Module], sizes: dict
) -> None:
    with pytest.raises(TypeError, match=next(iter(sizes))):
        make((1, 8, 8), **{"steps": STEPS, **sizes})


def fitted(net: nn.Module, x: Tensor, steps: int) -> Fit:
    diffusion = Diffusion(tuple(x.shape[1:]), CosineSchedule(STEPS))
    guide, loss = ForwardProcess(diffusion), TraceMeanField_ELBO()
    return fit(DDPM(diffusion, net), guide, x, loss=loss, steps=steps, progress=False)


# ------------------------------------------------------------------------------- diffusers


class Told(nn.Module):
    """Stands for diffusers' network: keeps the step that it is told."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.step = torch.tensor(0)

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        self.step = t
        return SimpleNamespace(sample=2 * x)


def theirs(**sizes: Any) -> nn.Module:
    """A small network of diffusers."""
    return pytest.importorskip("diffusers").UNet2DModel(
        **{"in_channels": 1, "out_channels": 1, **sizes},
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.mark.parametrize("config", [{}, {"in_channels": 1}, {"in_channels": 1, "out_channels": 1}])
def test_diffusers_is_told_the_step_less_one(config: dict) -> None:
    net = Told(**config)
    x, t = noisy(3, (1, 8, 8))
    assert torch.equal(FromDiffusers(net)(x, t), 2 * x)
    assert torch.equal(net.step, t - 1)


def test_step_of_diffusers_less_one_has_the_same_noise() -> None:
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(num_train_timesteps=STEPS)
    diffusion = Diffusion((1, 8, 8), GivenSchedule(scheduler.alphas_cumprod))
    x, t = torch.randn(STEPS, 1, 8, 8), torch.arange(1, STEPS + 1)
    eps = torch.randn_like(x)
    q = diffusion.noised(diffusion.encode(x), t)
    ours = q.mean + q.stddev * eps.flatten(1)
    torch.testing.assert_close(ours, scheduler.add_noise(x, eps, t - 1).flatten(1))


def test_network_of_diffusers_is_fitted_and_sampled() -> None:
    net = theirs()
    x, t = noisy(4, (1, 8, 8))
    before = FromDiffusers(net)(x, t)
    assert torch.equal(before, net(x, t - 1).sample)
    result = fitted(FromDiffusers(net), x, steps=3)
    assert result.model.sample(2).shape == (2, 1, 8, 8)
    assert torch.equal(FromDiffusers(net)(x, t), before)  # the fit has weights of its own
    assert not torch.equal(result.model.net(x, t), before)


def test_network_of_diffusers_with_variances_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 1 in and 2 out"):
        FromDiffusers(theirs(out_channels=2))


# ------------------------------------------------------------------------------- bfloat16


@makers
@dtypes
def test_autocast_keeps_the_dtype_of_its_input(
    make: Make, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    net = stirred(make((1, 7, 5))).to(device, dtype)
    x, t = (a.to(device) for a in noisy(3, (1, 7, 5), dtype))
    result = Autocast(net)(x, t)
    assert result.dtype == dtype
    full = dtype == torch.float64  # autocast leaves doubles alone
    tolerance = tolerance if full else 10 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(result, net(x, t), rtol=tolerance, atol=tolerance)
    assert torch.equal(result, net(x, t)) == full


@makers
def test_autocast_computes_in_bfloat16_and_keeps_float32_parameters(make: Make) -> None:
    net = Autocast(stirred(make((1, 7, 5))))
    layers = [part for part in net.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    computed: list[torch.dtype] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, out: computed.append(out.dtype))
    net(*noisy(3, (1, 7, 5))).square().sum().backward()
    assert computed == [torch.bfloat16] * len(layers)
    for name, parameter in net.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().max() > 0, name


@makers
def test_autocast_bounds_as_the_network_does(make: Make) -> None:
    net = stirred(make((1, 8, 8)))
    x, _ = noisy(16, (1, 8, 8))
    plain, low = (fitted(part, x, steps=2) for part in (net, Autocast(net)))
    # Seeds and weights are the same. A rounding to bfloat16 moves a number by up to 2^-8 of itself,
    # and a loss by less, since it averages over data points and pixels: by up to 0.15% here.
    torch.testing.assert_close(low.losses, plain.losses, rtol=2**-8, atol=0)
    assert not torch.equal(low.losses, plain.losses)
    assert low.model.sample(2, steps=2).dtype == torch.float32


@makers
def test_autocast_shows_the_steps_that_its_network_was_made_for(make: Make) -> None:
    with pytest.raises(ValueError, match=f"network of 7 steps.*got one of {STEPS}"):
        DDPM(Diffusion((1, 8, 8), CosineSchedule(7)), Autocast(make((1, 8, 8))))


def test_autocast_takes_diffusers() -> None:
    x, t = noisy(2, (1, 8, 8))
    net = FromDiffusers(theirs())
    result = Autocast(net)(x, t)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, net(x, t), rtol=0.1, atol=0.1)


@makers
def test_autocast_under_vmap_and_compiled(make: Make) -> None:
    net = Autocast(stirred(make((1, 7, 5))))
    x, t = noisy(6, (1, 7, 5))
    at_once = torch.func.vmap(net)(x.unflatten(0, (3, 2)), t.unflatten(0, (3, 2)))
    torch.testing.assert_close(at_once.flatten(0, 1), net(x, t), rtol=0.1, atol=0.1)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t), net(x, t))


@pytest.mark.parametrize("wrap", [Autocast, FromDiffusers])
def test_what_is_no_module_is_an_error(wrap: Callable[..., nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"expected a network, an nn\.Module, got <function"):
        wrap(lambda x, t: x)
