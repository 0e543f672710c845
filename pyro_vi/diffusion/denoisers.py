r"""Networks that clean up a noisy data point given how far the noise has come.

A denoiser is an :class:`torch.nn.Module` with one method,

    forward(x, t)    x: (N, *shape),  t: (N,) integers from 1 to steps    ->    (N, *shape)

and what its result stands for (the noise, the clean data, a velocity) is the caller's business.
Two of them live here,

    MLPDenoiser    linear layers         vectors and small images
    UNet           convolutions          images (C, H, W) of any height and width

and :class:`TimeEmbedding` is how both of them read `t`. Two more are another network's:

    FromDiffusers  a `UNet2DModel` of diffusers, whose steps count from 0
    Autocast       a denoiser that computes in bfloat16

None of ours keeps statistics of a batch: a data point's result never depends on its neighbours.
None branches on the values of a tensor, so that ``torch.func.vmap`` and ``torch.compile`` take them
as they are; hence `t` is checked for its shape and not for its range.
"""

__all__ = ["Autocast", "FromDiffusers", "MLPDenoiser", "TimeEmbedding", "UNet"]

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vi.checks import check_sizes

TIME_SPAN = 1000  # t / steps is stretched to this range, the one that the frequencies were made for
LOWEST_FREQUENCY = 1e-4  # frequencies fall from 1 towards this one
GROUP_WIDTH = 4  # a normalized group has at least this many channels ...
MOST_GROUPS = 32  # ... and there are at most this many groups


class TimeEmbedding(nn.Module):
    r"""Sines and cosines of the time at geometric frequencies, through a small network.

    .. math:: \sin(\omega_j \tau), \cos(\omega_j \tau), \quad
        \tau = 1000 \, t / \text{steps}, \quad \omega_j = 10^{-4 j / (\text{dim} / 2)}

    so that the embedding depends on t / steps alone, however finely time is cut. Angles are
    computed in float32 or better, whatever the precision of the parameters.

    Args:
        dim: The width of the embedding, an even number.
        steps: The largest time.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is below one, or dim is odd.

    References:
        Attention Is All You Need (arXiv:1706.03762);
        Denoising Diffusion Probabilistic Models (arXiv:2006.11239)

    Example:
        >>> embedding = TimeEmbedding(64, steps=1000)
        >>> embedding(torch.tensor([1, 500, 1000])).shape
        torch.Size([3, 64])
    """

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        check_sizes(dim=dim, steps=steps)
        if dim % 2:
            raise ValueError(f"expected an even width of the time embedding, got {dim}")
        self.dim = dim
        self.steps = steps
        self.expand = nn.Linear(dim, dim)
        self.mix = nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        """The embeddings of times: (...) to (..., dim)."""
        weights = self.expand.weight.dtype
        dtype = torch.promote_types(weights, torch.float32)
        half = self.dim // 2
        powers = torch.arange(half, dtype=dtype, device=t.device) / half
        # The quotient is rounded once: that of 2 t and 2 steps is the same to the last bit.
        angles = TIME_SPAN * (t.to(dtype) / self.steps).unsqueeze(-1) * LOWEST_FREQUENCY**powers
        features = torch.cat([angles.sin(), angles.cos()], -1)
        out: Tensor = self.mix(F.silu(self.expand(features.to(weights))))
        return out


class MLPDenoiser(nn.Module):
    r"""A multilayer perceptron over flattened data points, told the time in every hidden layer.

    .. math:: h' = \text{SiLU}(A h + B \, \text{embedding}(t)) \; (+ h \text{ if as wide})

    Args:
        shape: The shape of one data point.
        steps: The largest time.
        hidden: The widths of the hidden layers, one or more.
        time_dim: The width of the time embedding, an even number.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is below one, time_dim is odd, or there are no sizes or hidden layers.

    References:
        Denoising Diffusion Probabilistic Models (arXiv:2006.11239);
        Deep Residual Learning for Image Recognition (arXiv:1512.03385)

    Example:
        >>> denoiser = MLPDenoiser((2,), steps=1000)
        >>> denoiser(torch.randn(100, 2), torch.randint(1, 1001, (100,))).shape
        torch.Size([100, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        steps: int,
        *,
        hidden: Sequence[int] = (256, 256),
        time_dim: int = 64,
    ) -> None:
        super().__init__()
        check_sizes(steps=steps, time_dim=time_dim)
        self.shape = _sizes("shape", shape)
        self.steps = steps
        hidden = _sizes("hidden", hidden)
        self.time = TimeEmbedding(time_dim, steps)
        self.hidden = nn.ModuleList(
            _TimedLinear(before, after, time_dim)
            for before, after in pairwise((prod(self.shape), *hidden))
        )
        self.last = nn.Linear(hidden[-1], prod(self.shape))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The results for noisy data points.

        Args:
            x: Shape (N, *shape).
            t: Their times, shape (N,).

        Returns:
            Shape (N, *shape).

        Raises:
            ValueError: x or t has another shape.
        """
        _check_inputs(x, t, self.shape)
        embedding = self.time(t)
        h = x.flatten(1)
        for layer in self.hidden:
            h = layer(h, embedding)
        out: Tensor = self.last(h).unflatten(1, self.shape)
        return out


class UNet(nn.Module):
    r"""Convolutions that halve an image and double it again, told the time in every block.

    ::

        x  ->  level 0  ------------------------->  level 0  ->  result
                  |  half the size    twice the size  |
               level 1  ------------------------->  level 1
                  |                                   |
                  `--->  last level, attention  ----->'

    A level is residual blocks: group normalization, SiLU and 3x3 convolutions, where the time
    scales and shifts each channel. On the way up it also reads what the same level gave on the way
    down. The last level is passed once, with one more block and attention. Odd sizes are halved
    upwards, and cut to what they came from on the way back.

    The last convolution starts at zero, and with it the result: whatever the random layers before
    it, training starts from a loss of the size of its target, and from small steps.

    Args:
        shape: The shape of one image, (C, H, W); any height and width.
        steps: The largest time.
        channels: The number of channels at each level, each half the size of the one before.
        blocks: The number of residual blocks a level, on either way.
        attention: The levels, as indices into channels, whose blocks end in self-attention over
            the image's pixels.
        heads: The number of attention heads; it divides the channels of those levels and of the
            last, where the middle has attention too.
        dropout: The share of each block's channel values that is dropped in training.
        time_dim: The width of the time embedding, an even number.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A size is below one, the shape is not that of an image, attention names a level
            that is not there, heads does not divide a width, dropout is not in [0, 1), or
            time_dim is odd.

    References:
        U-Net: Convolutional Networks for Biomedical Image Segmentation (arXiv:1505.04597);
        Denoising Diffusion Probabilistic Models (arXiv:2006.11239);
        Diffusion Models Beat GANs on Image Synthesis (arXiv:2105.05233);
        Group Normalization (arXiv:1803.08494)

    Example:
        >>> denoiser = UNet((1, 28, 28), steps=1000)
        >>> denoiser(torch.randn(10, 1, 28, 28), torch.randint(1, 1001, (10,))).shape
        torch.Size([10, 1, 28, 28])
    """

    def __init__(
        self,
        shape: Sequence[int],
        steps: int,
        *,
        channels: Sequence[int] = (16, 32, 48),
        blocks: int = 1,
        attention: Sequence[int] = (1,),
        heads: int = 4,
        dropout: float = 0.0,
        time_dim: int = 64,
    ) -> None:
        super().__init__()
        self.shape = _sizes("shape", shape)
        if len(self.shape) != 3:
            raise ValueError(f"expected the shape (C, H, W) of an image, got {self.shape}")
        channels = _sizes("channels", channels)
        check_sizes(steps=steps, blocks=blocks, heads=heads, time_dim=time_dim)
        if not set(attention) <= set(range(len(channels))):
            raise ValueError(
                f"expected attention at levels from 0 to {len(channels) - 1}, got {attention}"
            )
        widths = {channels[level] for level in attention} | {channels[-1]}
        if any(width % heads for width in widths):
            raise ValueError(f"expected {heads} heads to divide the channels {sorted(widths)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"expected dropout in [0, 1), got {dropout}")
        self.steps = steps

        def block(inputs: int, outputs: int, attend: bool) -> _Block:
            return _Block(inputs, outputs, time_dim, heads if attend else 0, dropout)

        def level(index: int, inputs: int) -> _Timed:
            width, attend = channels[index], index in attention
            return _Timed(block(inputs if i == 0 else width, width, attend) for i in range(blocks))

        deeper = list(enumerate(pairwise(channels)))
        self.time = TimeEmbedding(time_dim, steps)
        self.first = nn.Conv2d(self.shape[0], channels[0], 3, padding=1)
        self.down = nn.ModuleList(level(i, above) for i, (above, _) in deeper)
        self.shrink = nn.ModuleList(
            nn.Conv2d(above, below, 3, stride=2, padding=1) for _, (above, below) in deeper
        )
        self.lowest = level(len(channels) - 1, channels[-1])
        self.middle = block(channels[-1], channels[-1], True)
        self.grow = nn.ModuleList(
            nn.Conv2d(below, above, 1) for _, (above, below) in reversed(deeper)
        )
        self.up = nn.ModuleList(level(i, 2 * above) for i, (above, _) in reversed(deeper))
        self.last = nn.Sequential(
            _norm(channels[0]),
            nn.SiLU(),
            _zero(nn.Conv2d(channels[0], self.shape[0], 3, padding=1)),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The results for noisy images.

        Args:
            x: Shape (N, C, H, W).
            t: Their times, shape (N,).

        Returns:
            Shape (N, C, H, W).

        Raises:
            ValueError: x or t has another shape.
        """
        _check_inputs(x, t, self.shape)
        embedding = self.time(t)
        h = self.first(x)
        seen = []
        for level, shrink in zip(self.down, self.shrink, strict=True):
            h = level(h, embedding)
            seen.append(h)
            h = shrink(h)
        h = self.middle(self.lowest(h, embedding), embedding)
        for grow, level in zip(self.grow, self.up, strict=True):
            skip = seen.pop()
            h = F.interpolate(grow(h), size=skip.shape[-2:])  # nearest: a doubled image, cut
            h = level(torch.cat([h, skip], 1), embedding)
        out: Tensor = self.last(h)
        return out


class FromDiffusers(nn.Module):
    """A `UNet2DModel` of Hugging Face diffusers, as a denoiser.

    Our steps run from 1 to T and theirs from 0 to T - 1, so that ours is given as t - 1: pretrained
    weights see the noise that they were trained on, if the diffusion has their schedule, which is
    ``GivenSchedule(scheduler.alphas_cumprod)``, and images in their units. Their time embedding is
    one of t, not of t / T: it has no number of steps to be held against the diffusion's.

    diffusers comes with ``pip install 'pyro_vi[diffusers]'``; nothing here imports it.

    Args:
        unet: The network, called as ``unet(x, t).sample``: without classes, and with the positional
            time embedding that is its default (a Fourier one takes the logarithm of the step).

    Raises:
        TypeError: It is no network.
        ValueError: Its configuration has other channels out than in, as with learned variances.

    References:
        diffusers: State-of-the-art diffusion models (https://github.com/huggingface/diffusers)

    Example:
        >>> from diffusers import UNet2DModel
        >>> unet = UNet2DModel(
        ...     in_channels=1,
        ...     out_channels=1,
        ...     block_out_channels=(32, 64),
        ...     down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        ...     up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ... )
        >>> denoiser = FromDiffusers(unet)  # or one of UNet2DModel.from_pretrained
        >>> denoiser(torch.randn(10, 1, 28, 28), torch.randint(1, 1001, (10,))).shape
        torch.Size([10, 1, 28, 28])
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        _check_module(unet)
        config = getattr(unet, "config", None)
        inputs, outputs = (getattr(config, f"{way}_channels", None) for way in ("in", "out"))
        if None not in (inputs, outputs) and inputs != outputs:
            raise ValueError(
                f"expected a network with as many channels out as in, got {inputs} in and {outputs}"
                " out; learned variances are a kernel's (pyro_vi.diffusion)"
            )
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The results for noisy images.

        Args:
            x: Shape (N, C, H, W).
            t: Their times, shape (N,), from 1.

        Returns:
            Shape (N, C, H, W).
        """
        out: Tensor = self.unet(x, t - 1).sample
        return out


class Autocast(nn.Module):
    """A denoiser that computes in bfloat16, under ``torch.autocast``, and is cast back.

    The network is what a diffusion costs, and a GPU's matrix units are made for bfloat16.
    Parameters and gradients keep their precision, and so does all that follows the network: the
    result has x's dtype, and every density is one of full precision. torch leaves float64 as it is.
    (In float16 gradients would need a loss scaler, which a bound of Pyro's does not have.)

    Args:
        net: The denoiser.

    Raises:
        TypeError: The denoiser is no network.

    References:
        Mixed Precision Training (arXiv:1710.03740);
        A Study of BFLOAT16 for Deep Learning Training (arXiv:1905.12322)

    Example:
        >>> denoiser = Autocast(UNet((1, 28, 28), steps=1000))
        >>> denoiser(torch.randn(10, 1, 28, 28), torch.randint(1, 1001, (10,))).dtype
        torch.float32
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        _check_module(net)
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The denoiser's results.

        Args:
            x: What the denoiser takes.
            t: Their times.

        Returns:
            Its result, of x's dtype.
        """
        with torch.autocast(x.device.type, torch.bfloat16):
            out: Tensor = self.net(x, t)
        return out.to(x.dtype)


class _TimedLinear(nn.Module):
    """A linear layer told the time: (N, inputs), (N, time_dim) to (N, outputs)."""

    def __init__(self, inputs: int, outputs: int, time_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.shift = nn.Linear(time_dim, outputs)
        self.residual = inputs == outputs

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        out = F.silu(self.linear(h) + self.shift(embedding))
        return h + out if self.residual else out


class _Timed(nn.ModuleList):
    """Blocks in a row, each told the time."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for block in self:
            h = block(h, embedding)
        return h


class _Block(nn.Module):
    """A residual block told the time, and attention if it has heads: (N, inputs, H, W) to
    (N, outputs, H, W)."""

    def __init__(
        self, inputs: int, outputs: int, time_dim: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.before = nn.Sequential(
            _norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.norm = _norm(outputs)
        self.modulation = nn.Linear(time_dim, 2 * outputs)
        self.after = nn.Sequential(
            nn.SiLU(),
            nn.Dropout(dropout) if dropout else nn.Identity(),  # vmap refuses a dropout of zero too
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.attention = _Attention(outputs, heads) if heads else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[..., None, None].chunk(2, 1)
        update = self.after(self.norm(self.before(h)) * (1 + scale) + shift)
        out: Tensor = self.attention(self.skip(h) + update)
        return out


class _Attention(nn.Module):
    """Residual self-attention over the pixels of an image: (N, width, H, W) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _norm(width)
        self.inputs = nn.Conv2d(width, 3 * width, 1)
        self.output = nn.Conv2d(width, width, 1)

    def forward(self, h: Tensor) -> Tensor:
        # Heads join the data points, (N heads, pixels, size): given an axis of heads, torch takes a
        # fused kernel on the CPU, which has no rule for vmap and falls back to a loop.
        query, key, value = (
            part.unflatten(1, (self.heads, -1)).flatten(3).flatten(0, 1).mT
            for part in self.inputs(self.norm(h)).chunk(3, 1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = h + self.output(mixed.mT.reshape(h.shape))
        return out


def _norm(width: int) -> nn.GroupNorm:
    """Group normalization: the most groups, up to 32, that divide the width into 4 or more."""
    groups = [g for g in range(1, MOST_GROUPS + 1) if width % g == 0 and width // g >= GROUP_WIDTH]
    return nn.GroupNorm(max(groups, default=1), width)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, with parameters of zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _check_module(net: nn.Module) -> None:
    """TypeError unless it is a module: of anything else the parameters would not be found."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"expected a network, an nn.Module, got {net!r}")


def _sizes(name: str, sizes: Iterable[int]) -> tuple[int, ...]:
    """The sizes as a tuple; an error if there are none, or one is not a whole number above zero."""
    sizes = tuple(sizes)
    if not sizes:
        raise ValueError(f"expected {name} to hold at least one size, got none")
    check_sizes(**{f"{name}[{i}]": size for i, size in enumerate(sizes)})
    return sizes


def _check_inputs(x: Tensor, t: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError unless x is (N, *shape) and t is (N,)."""
    if tuple(x.shape[1:]) != shape or x.dim() == 0:
        expected = ", ".join(map(str, ("N", *shape)))
        raise ValueError(f"expected x of shape ({expected}), got {tuple(x.shape)}")
    if t.shape != x.shape[:1]:
        raise ValueError(f"expected t of shape ({x.shape[0]},), got {tuple(t.shape)}")
