"""Networks keep their shapes for any leading dimensions, and treat every data point alone."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from pyro_vi.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, mlp

torch.set_num_threads(1)

IMAGES = [(1, 8, 8), (1, 28, 28), (3, 5, 7), (2, 4, 4)]
BATCHES = [(), (3,), (2, 3), (0,), (2, 1, 3)]
images = pytest.mark.parametrize("shape", IMAGES, ids=str)
batches = pytest.mark.parametrize("batch", BATCHES, ids=str)
encoders = pytest.mark.parametrize("make", [MLPEncoder, ConvEncoder])
decoders = pytest.mark.parametrize("make", [MLPDecoder, ConvDecoder])
Make = Callable[..., nn.Module]


@encoders
@images
@batches
def test_encoder_shapes(
    make: Make, shape: tuple[int, ...], batch: tuple[int, ...], device: torch.device
) -> None:
    encoder = make(shape, 16).to(device)
    assert encoder(torch.rand(*batch, *shape, device=device)).shape == (*batch, 16)


@decoders
@images
@batches
@pytest.mark.parametrize("outputs", [1, 2])
def test_decoder_shapes(
    make: Make, shape: tuple[int, ...], batch: tuple[int, ...], outputs: int, device: torch.device
) -> None:
    decoder = make(4, (outputs, *shape)).to(device)
    z = torch.randn(*batch, 4, device=device)
    assert decoder(z).shape == (*batch, outputs, *shape)


@encoders
@images
def test_encoder_treats_every_image_alone(make: Make, shape: tuple[int, ...]) -> None:
    encoder = make(shape, 16).double()
    x = torch.rand(2, 3, *shape, dtype=torch.float64)
    one_by_one = torch.stack([torch.stack([encoder(image) for image in row]) for row in x])
    torch.testing.assert_close(encoder(x), one_by_one)


@decoders
@images
def test_decoder_treats_every_latent_alone(make: Make, shape: tuple[int, ...]) -> None:
    decoder = make(4, (2, *shape)).double()
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    one_by_one = torch.stack([torch.stack([decoder(latent) for latent in row]) for row in z])
    torch.testing.assert_close(decoder(z), one_by_one)


@images
def test_every_parameter_gets_a_gradient_from_every_corner(shape: tuple[int, ...]) -> None:
    """The convolutions reach the whole image, its last row and column too."""
    for encoder in (MLPEncoder(shape, 16), ConvEncoder(shape, 16)):
        x = torch.rand(5, *shape, requires_grad=True)
        encoder(x).square().sum().backward()
        assert x.grad is not None and (x.grad[0] != 0).all()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    for decoder in (MLPDecoder(4, (2, *shape)), ConvDecoder(4, (2, *shape))):
        z = torch.randn(5, 4)
        decoder(z).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())
        spread = decoder(torch.randn(50, 4)).std(0)
        assert (spread > 0).all()


def test_vectors() -> None:
    assert MLPEncoder((5,), 16)(torch.randn(2, 3, 5)).shape == (2, 3, 16)
    assert MLPDecoder(4, (1, 5))(torch.randn(2, 3, 4)).shape == (2, 3, 1, 5)


def test_mlp_is_what_it_is_called() -> None:
    network = mlp(2, 3, hidden=(7, 5), activation=nn.Tanh)
    kinds = [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert [type(layer) for layer in network] == kinds
    weights = [tuple(p.shape) for p in network.parameters() if p.dim() == 2]
    assert weights == [(7, 2), (5, 7), (3, 5)]
    assert [type(layer) for layer in mlp(2, 3, hidden=())] == [nn.Linear]


def test_widths_and_nonlinearities_are_the_callers() -> None:
    encoder = MLPEncoder((2, 3), 4, hidden=(7,), activation=nn.Tanh)
    assert [tuple(p.shape) for p in encoder.parameters()] == [(7, 6), (7,), (4, 7), (4,)]
    assert encoder(torch.randn(100, 2, 3)).abs().max() <= 1
    decoder = ConvDecoder(4, (1, 1, 9, 9), channels=(8, 6, 4))
    assert decoder(torch.randn(4)).shape == (1, 1, 9, 9)
    assert ConvEncoder((1, 9, 9), 5, channels=(4, 6, 8))(torch.rand(1, 9, 9)).shape == (5,)


@encoders
def test_other_inputs_are_refused(make: Make) -> None:
    encoder = make((1, 8, 8), 16)
    for wrong in [(3, 1, 8, 7), (3, 8, 8, 1), (8, 8)]:
        with pytest.raises(ValueError, match=r"shape \(\.\.\., \*\(1, 8, 8\)\), got"):
            encoder(torch.rand(*wrong))


def test_impossible_shapes_are_refused() -> None:
    for shape in [(), (1, 0, 8)]:
        with pytest.raises(ValueError, match="sizes of at least 1"):
            MLPEncoder(shape, 16)
        with pytest.raises(ValueError, match="sizes of at least 1"):
            MLPDecoder(4, shape)
    for shape in [(5,), (8, 8), (1, 1, 8, 8)]:
        with pytest.raises(ValueError, match="C, H, W"):
            ConvEncoder(shape, 16)
    for shape in [(5,), (1, 5)]:
        with pytest.raises(ValueError, match="H, W"):
            ConvDecoder(4, shape)
