r"""Small networks from data to features, and from latent variables to data.

Two directions, each in two kinds,

    encoder   (..., *shape) -> (..., features)        MLPEncoder, ConvEncoder
    decoder   (..., latent_dim) -> (..., *shape)      MLPDecoder, ConvDecoder

with any number of leading dimensions, so that many draws a data point need no reshaping. An encoder
ends in a nonlinearity (what follows is a linear head), a decoder in a linear layer (what follows is
a likelihood). None keeps statistics of a batch: a data point's result never depends on its
neighbours.
"""

__all__ = ["ConvDecoder", "ConvEncoder", "MLPDecoder", "MLPEncoder", "mlp"]

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn

Activation = Callable[[], nn.Module]


def mlp(
    in_features: int,
    out_features: int,
    *,
    hidden: Sequence[int] = (256, 256),
    activation: Activation = nn.SiLU,
) -> nn.Sequential:
    """A multilayer perceptron: linear layers with a nonlinearity between them, none after the last.

    Args:
        in_features: The width of the input.
        out_features: The width of the output.
        hidden: The widths between them; empty for a single linear layer.
        activation: Makes the nonlinearity.

    Returns:
        A module that maps (..., in_features) to (..., out_features).

    Example:
        >>> mlp(2, 3, hidden=[16])
        Sequential(
          (0): Linear(in_features=2, out_features=16, bias=True)
          (1): SiLU()
          (2): Linear(in_features=16, out_features=3, bias=True)
        )
    """
    layers: list[nn.Module] = []
    for before, after in pairwise((in_features, *hidden, out_features)):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


class MLPEncoder(nn.Module):
    """A multilayer perceptron over flattened data points.

    Args:
        shape: The shape of one data point.
        features: The width of the output, which is the last hidden layer.
        hidden: The widths of the layers before it.
        activation: Makes the nonlinearity.

    Raises:
        ValueError: The shape is empty or holds a size below one.

    Example:
        >>> encoder = MLPEncoder((1, 8, 8), 128)
        >>> encoder(torch.rand(100, 1, 8, 8)).shape
        torch.Size([100, 128])
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: int,
        *,
        hidden: Sequence[int] = (256,),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.shape = _checked(shape)
        self.layers = mlp(prod(shape), features, hidden=hidden, activation=activation)
        self.layers.append(activation())

    def forward(self, x: Tensor) -> Tensor:
        """The features of data points: (..., *shape) to (..., features)."""
        batch = _batch_shape(x, self.shape)
        return self.layers(x.reshape(*batch, prod(self.shape)))


class MLPDecoder(nn.Module):
    """A multilayer perceptron whose output is folded into a shape.

    Args:
        latent_dim: The width of the input.
        shape_out: The shape of one output.
        hidden: The widths of the hidden layers.
        activation: Makes the nonlinearity.

    Raises:
        ValueError: The shape is empty or holds a size below one.

    Example:
        >>> decoder = MLPDecoder(4, (2, 1, 8, 8))
        >>> decoder(torch.randn(100, 4)).shape
        torch.Size([100, 2, 1, 8, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        shape_out: Sequence[int],
        *,
        hidden: Sequence[int] = (256, 256),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.shape_out = _checked(shape_out)
        self.layers = mlp(latent_dim, prod(shape_out), hidden=hidden, activation=activation)

    def forward(self, z: Tensor) -> Tensor:
        """The outputs for latent variables: (..., latent_dim) to (..., *shape_out)."""
        return self.layers(z).unflatten(-1, self.shape_out)


class ConvEncoder(nn.Module):
    """Convolutions that halve an image once a layer, and one linear layer.

    Args:
        shape: The shape of one image, (C, H, W); any height and width.
        features: The width of the output.
        channels: The number of channels after each convolution.
        activation: Makes the nonlinearity.

    Raises:
        ValueError: The shape is not that of an image.

    Example:
        >>> encoder = ConvEncoder((1, 28, 28), 128)
        >>> encoder(torch.rand(10, 1, 28, 28)).shape
        torch.Size([10, 128])
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: int,
        *,
        channels: Sequence[int] = (32, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.shape = _checked(shape)
        if len(self.shape) != 3:
            raise ValueError(f"expected the shape (C, H, W) of an image, got {self.shape}")
        inputs, height, width = self.shape
        layers: list[nn.Module] = []
        for before, after in pairwise((inputs, *channels)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), activation()]
            height, width = _half(height), _half(width)
        self.layers = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear((inputs, *channels)[-1] * height * width, features),
            activation(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The features of images: (..., C, H, W) to (..., features)."""
        batch = _batch_shape(x, self.shape)
        features = self.layers(x.reshape(prod(batch), *self.shape))
        return features.reshape(*batch, features.shape[-1])


class ConvDecoder(nn.Module):
    """One linear layer, and transposed convolutions that double an image once a layer.

    Args:
        latent_dim: The width of the input.
        shape_out: The shape of one output, (..., H, W), with one dimension or more before the
            height; together they are the channels of the last layer.
        channels: The number of channels before each transposed convolution.
        activation: Makes the nonlinearity.

    Raises:
        ValueError: The shape is not that of an image.

    Example:
        >>> decoder = ConvDecoder(4, (2, 1, 28, 28))
        >>> decoder(torch.randn(10, 4)).shape
        torch.Size([10, 2, 1, 28, 28])
    """

    def __init__(
        self,
        latent_dim: int,
        shape_out: Sequence[int],
        *,
        channels: Sequence[int] = (64, 32),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__()
        self.shape_out = _checked(shape_out)
        if len(self.shape_out) < 3 or not channels:
            raise ValueError(
                f"expected a shape (..., H, W) and some channels, got {self.shape_out}, {channels}"
            )
        *leading, height, width = self.shape_out
        sizes = [(height, width)]  # from the last layer's image back to the first's
        for _ in channels:
            height, width = _half(height), _half(width)
            sizes.append((height, width))
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, channels[0] * height * width),
            nn.Unflatten(-1, (channels[0], height, width)),
        ]
        planes = pairwise((*channels, prod(leading)))
        for (before, after), (height, width) in zip(planes, sizes[-2::-1], strict=True):
            # Without padding the size becomes 2 n - 1: what an odd size came from.
            padding = (1 - height % 2, 1 - width % 2)
            layers += [
                activation(),
                nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=padding),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """The outputs for latent variables: (..., latent_dim) to (..., *shape_out)."""
        batch = z.shape[:-1]
        return self.layers(z.reshape(prod(batch), z.shape[-1])).reshape(*batch, *self.shape_out)


def _half(size: int) -> int:
    """The size after a convolution of stride two: half, rounded up."""
    return (size + 1) // 2


def _checked(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple; ValueError if it is empty or holds a size below one."""
    shape = tuple(shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"expected a shape of sizes of at least 1, got {shape}")
    return shape


def _batch_shape(x: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions before a data point's own; ValueError if `x` does not end in `shape`."""
    split = x.dim() - len(shape)
    if split < 0 or tuple(x.shape[split:]) != shape:
        raise ValueError(f"expected an input of shape (..., *{shape}), got {tuple(x.shape)}")
    return tuple(x.shape[:split])
