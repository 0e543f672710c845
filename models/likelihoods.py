r"""Likelihoods p(x | raw): what a decoder's numbers say about one data point.

A likelihood is an :class:`torch.nn.Module` with

    outputs           how many numbers the decoder gives for every number of the data
    forward(raw)      the distribution of data points, where raw is (batch..., outputs, *shape)

Which one is right follows from the data:

    Bernoulli              0 or 1
    ContinuousBernoulli    the interval [0, 1]
    Gaussian               real numbers, one known scale
    LearnedGaussian        real numbers, one scale for all, learned
    PixelGaussian          real numbers, a scale for every number
    DiscretizedLogistic    the grey levels 0, 1 / (levels - 1), ..., 1, with a probability each
    LearnedDiscretizedLogistic  the same, one scale for all, learned

Densities of real numbers and probabilities of grey levels are not comparable: only the last two
give bits per dimension. Values outside a likelihood's support are refused, as long as the
distributions' validation is on, as it is by default.
"""

__all__ = [
    "Bernoulli",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticDistribution",
    "Gaussian",
    "LearnedDiscretizedLogistic",
    "LearnedGaussian",
    "PixelGaussian",
]

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn
from torch.distributions.utils import broadcast_all

from pyro_vi.families import positive


class Bernoulli(nn.Module):
    r"""Binary data.

    .. math:: p(x \mid l) = \prod_i \sigma(l_i)^{x_i} \, \sigma(-l_i)^{1 - x_i}, \; x_i \in \{0, 1\}

    Example:
        >>> likelihood = Bernoulli()
        >>> likelihood(torch.zeros(10, 1, 1, 8, 8)).log_prob(torch.ones(1, 8, 8))[0]
        tensor(-44.3614)
    """

    outputs = 1

    def forward(self, raw: Tensor, event_dim: int = 3) -> TorchDistribution:
        """The distribution of data points given their logits.

        Args:
            raw: The logits, shape (batch..., 1, *shape).
            event_dim: The number of dimensions of one data point: three for images.

        Returns:
            A distribution of batch_shape (batch...) and event_shape `shape`.

        Raises:
            ValueError: `raw` has another number of outputs.
        """
        (logits,) = _split(raw, self.outputs, event_dim)
        return dist.Bernoulli(logits=logits).to_event(event_dim)


class ContinuousBernoulli(nn.Module):
    r"""Data in the interval [0, 1]: the Bernoulli's formula, made a density by a constant.

    .. math:: p(x \mid l) = \prod_i C(l_i) \, \sigma(l_i)^{x_i} \, \sigma(-l_i)^{1 - x_i}

    References:
        The continuous Bernoulli: fixing a pervasive error in variational autoencoders
        (arXiv:1907.06845)

    Example:
        >>> likelihood = ContinuousBernoulli()
        >>> likelihood(torch.zeros(10, 1, 1, 8, 8)).log_prob(torch.rand(1, 8, 8)).shape
        torch.Size([10])
    """

    outputs = 1

    def forward(self, raw: Tensor, event_dim: int = 3) -> TorchDistribution:
        """The distribution of data points given their logits.

        Args:
            raw: The logits, shape (batch..., 1, *shape).
            event_dim: The number of dimensions of one data point: three for images.

        Returns:
            A distribution of batch_shape (batch...) and event_shape `shape`.

        Raises:
            ValueError: `raw` has another number of outputs.
        """
        (logits,) = _split(raw, self.outputs, event_dim)
        return dist.ContinuousBernoulli(logits=logits).to_event(event_dim)


class Gaussian(nn.Module):
    r"""Real data around the decoder's output, with one known scale.

    .. math:: -\log p(x \mid m) = |x - m|^2 / (2 s^2) + D \log s + D/2 \log 2 \pi

    With it, minus a bound is the squared error, weighed by 1 / (2 s^2), plus the KL divergence and
    a constant: the scale is the weight of the one against the other. Weight one is s^2 = 1/2.

    Args:
        scale: The standard deviation s.

    Raises:
        ValueError: The scale is not positive and finite.

    Example:
        >>> likelihood = Gaussian(0.1)
        >>> likelihood(torch.zeros(10, 1, 1, 8, 8)).mean.shape
        torch.Size([10, 1, 8, 8])
    """

    outputs = 1

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = _checked_scale(scale)

    def forward(self, raw: Tensor, event_dim: int = 3) -> TorchDistribution:
        """The distribution of data points given their means.

        Args:
            raw: The means, shape (batch..., 1, *shape).
            event_dim: The number of dimensions of one data point: three for images.

        Returns:
            A distribution of batch_shape (batch...) and event_shape `shape`.

        Raises:
            ValueError: `raw` has another number of outputs.
        """
        (loc,) = _split(raw, self.outputs, event_dim)
        return dist.Normal(loc, self.scale).to_event(event_dim)


class LearnedGaussian(nn.Module):
    r"""Real data around the decoder's output, with one scale for all that is learned.

    The best scale is the root of the mean squared error, so that the error and the KL divergence
    find their own balance.

    Args:
        scale: The standard deviation to start from.

    Raises:
        ValueError: The scale is not positive and finite.

    References:
        Simple and Effective VAE Training with Calibrated Decoders (arXiv:2006.13202)

    Example:
        >>> likelihood = LearnedGaussian()
        >>> likelihood.log_scale
        Parameter containing:
        tensor(0., requires_grad=True)
    """

    outputs = 1

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(_checked_scale(scale))))

    def forward(self, raw: Tensor, event_dim: int = 3) -> TorchDistribution:
        """The distribution of data points given their means.

        Args:
            raw: The means, shape (batch..., 1, *shape).
            event_dim: The number of dimensions of one data point: three for images.

        Returns:
            A distribution of batch_shape (batch...) and event_shape `shape`.

        Raises:
            ValueError: `raw` has another number of outputs.
        """
        (loc,) = _split(raw, self.outputs, event_dim)
        return dist.Normal(loc, self.log_scale.exp()).to_event(event_dim)


class PixelGaussian(nn.Module):
    r"""Real data around the decoder's output, with a scale for every number.

    .. math:: p(x \mid m, s) = \prod_i N(x_i \mid m_i, s_i^2)

    The scale is a softplus plus a floor of 1e-5. A number that never varies in the data (the dark
    rim of an image) drives its scale to that floor and the density up: add noise to such data, or
    take :class:`DiscretizedLogistic`.

    Example:
        >>> likelihood = PixelGaussian()
        >>> likelihood(torch.zeros(10, 2, 1, 8, 8)).stddev.shape
        torch.Size([10, 1, 8, 8])
    """

    outputs = 2

    def forward(self, raw: Tensor, event_dim: int = 3) -> TorchDistribution:
        """The distribution of data points given their means and unconstrained scales.

        Args:
            raw: Means and scales, shape (batch..., 2, *shape).
            event_dim: The number of dimensions of one data point: three for images.

        Returns:
            A distribution of batch_shape (batch...) and event_shape `shape`.

        Raises:
            ValueError: `raw` has another number of outputs.
        """
        loc, raw_scale = _split(raw, self.outputs, event_dim)
        return dist.Normal(loc, positive(raw_scale)).to_event(event_dim)


class DiscretizedLogistic(nn.Module):
    r"""Grey levels 0, 1 / (levels - 1), ..., 1: each has the probability of its bin in a logistic.

    The location is 1/2 + raw_0. The scale is softplus(raw_1 - 2) plus a twentieth of a bin, with
    which already all but 1e-4 of the probability can be in one bin.

    Args:
        levels: The number of grey levels: 256 for 8 bits.

    Raises:
        ValueError: There are fewer than two levels.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (arXiv:1606.04934);
        PixelCNN++ (arXiv:1701.05517)

    Example:
        >>> likelihood = DiscretizedLogistic(256)
        >>> p = likelihood(torch.zeros(10, 2, 1, 8, 8))
        >>> image = torch.randint(256, (1, 8, 8)) / 255
        >>> p.log_prob(image).shape
        torch.Size([10])
    """

    outputs = 2

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = _checked_levels(levels)

    def forward(self, raw: Tensor, event_dim: int = 3) -> TorchDistribution:
        """The distribution of data points given their locations and unconstrained scales.

        Args:
            raw: Locations and scales, shape (batch..., 2, *shape).
            event_dim: The number of dimensions of one data point: three for images.

        Returns:
            A distribution of batch_shape (batch...) and event_shape `shape`.

        Raises:
            ValueError: `raw` has another number of outputs.
        """
        raw_loc, raw_scale = _split(raw, self.outputs, event_dim)
        scale = F.softplus(raw_scale - 2) + 0.05 / (self.levels - 1)
        p = DiscretizedLogisticDistribution(0.5 + raw_loc, scale, self.levels)
        return p.to_event(event_dim)


class LearnedDiscretizedLogistic(nn.Module):
    r"""Grey levels around the decoder's output, with one scale for all that is learned.

    To `DiscretizedLogistic` what `LearnedGaussian` is to `PixelGaussian`. The scale is that of the
    logistic, plus a twentieth of a bin.

    Args:
        levels: The number of grey levels: 256 for 8 bits.
        scale: The scale to start from; a bin by default.

    Raises:
        ValueError: There are fewer than two levels, or the scale is not positive and finite.

    Example:
        >>> likelihood = LearnedDiscretizedLogistic(256)
        >>> p = likelihood(torch.full((10, 1, 1, 8, 8), 0.5))
        >>> p.log_prob(torch.randint(256, (1, 8, 8)) / 255).shape
        torch.Size([10])
    """

    outputs = 1

    def __init__(self, levels: int, scale: float | None = None) -> None:
        super().__init__()
        self.levels = _checked_levels(levels)
        start = _checked_scale(1 / (levels - 1) if scale is None else scale)
        self.log_scale = nn.Parameter(torch.tensor(math.log(start)))

    def forward(self, raw: Tensor, event_dim: int = 3) -> TorchDistribution:
        """The distribution of data points given their locations.

        Args:
            raw: The locations, shape (batch..., 1, *shape).
            event_dim: The number of dimensions of one data point: three for images.

        Returns:
            A distribution of batch_shape (batch...) and event_shape `shape`.

        Raises:
            ValueError: `raw` has another number of outputs.
        """
        (loc,) = _split(raw, self.outputs, event_dim)
        scale = self.log_scale.exp() + 0.05 / (self.levels - 1)
        return DiscretizedLogisticDistribution(loc, scale, self.levels).to_event(event_dim)


class DiscretizedLogisticDistribution(TorchDistribution):
    r"""A logistic rounded to the grid 0, 1 / (levels - 1), ..., 1, with open bins at both ends.

    With a bin's edges `a < b`, in units of the scale around the location,

    .. math:: P(x) = \sigma(b) - \sigma(a) = \sigma(b) \, \sigma(-a) \, (1 - e^{-(b - a)}),

    and `a = -inf` in the first bin, `b = inf` in the last: the probabilities sum to one. The
    product on the right loses no digits in the tails, where the difference would be 1 - 1.

    Args:
        loc: The location, any shape.
        scale: The scale of the logistic, broadcastable with the location.
        levels: The number of grid points, at least two.
        validate_args: Whether to check arguments and values; None for torch's default.

    Raises:
        ValueError: There are fewer than two levels, or (with validation) the scale is not positive.

    Example:
        >>> p = DiscretizedLogisticDistribution(torch.tensor(0.3), torch.tensor(0.2), levels=4)
        >>> p.log_prob(torch.arange(4) / 3).exp().sum()
        tensor(1.)
        >>> p.support
        UnitGrid(levels=4)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        levels: int,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.levels = _checked_levels(levels)
        self.loc, self.scale = broadcast_all(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The grid: see :class:`UnitGrid`."""
        return UnitGrid(self.levels)

    @property
    def mean(self) -> Tensor:
        """The exact mean, shape batch_shape: the sum of P(x >= x_k) / (levels - 1) over k >= 1."""
        steps = self.levels - 1
        edges = (torch.arange(steps, device=self.loc.device, dtype=self.loc.dtype) + 0.5) / steps
        loc, scale = self.loc.unsqueeze(-1), self.scale.unsqueeze(-1)
        # In pieces: all levels of many images at once would not fit into memory.
        tails = [((loc - e) / scale).sigmoid().sum(-1) for e in edges.split(16)]
        return torch.stack(tails).sum(0) / steps

    def log_prob(self, value: Tensor) -> Tensor:
        """The log probability in nats, shape sample_shape + batch_shape."""
        if self._validate_args:
            self._validate_sample(value)
        steps = self.levels - 1
        level = (value * float(steps)).round()
        a = ((level - 0.5) / steps - self.loc) / self.scale
        b = ((level + 0.5) / steps - self.loc) / self.scale
        above = torch.where(level == 0, 0.0, F.logsigmoid(-a))
        below = torch.where(level == steps, 0.0, F.logsigmoid(b))
        width = torch.log(-torch.expm1(-1 / (steps * self.scale)))
        inner = torch.where((level == 0) | (level == steps), 0.0, width)
        return above + below + inner

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws of shape sample_shape + batch_shape, on the grid; not differentiable."""
        steps = self.levels - 1
        with torch.no_grad():
            shape = self._extended_shape(Size(sample_shape))
            uniform = torch.rand(shape, device=self.loc.device, dtype=self.loc.dtype)
            logistic = self.loc + self.scale * uniform.logit()
            return (logistic.clamp(0, 1) * steps).round() / steps

    def expand(
        self, batch_shape: Sequence[int], _instance: TorchDistribution | None = None
    ) -> "DiscretizedLogisticDistribution":
        """The same distribution over a larger batch."""
        new = self._get_checked_instance(DiscretizedLogisticDistribution, _instance)
        batch_shape = Size(batch_shape)
        new.levels = self.levels
        new.loc = self.loc.expand(batch_shape)
        new.scale = self.scale.expand(batch_shape)
        super(DiscretizedLogisticDistribution, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


class UnitGrid(constraints.Constraint):
    """The numbers 0, 1 / (levels - 1), ..., 1, up to their rounding, to float32 at best.

    Args:
        levels: The number of grid points, at least two.

    Example:
        >>> UnitGrid(256).check(torch.tensor([0.0, 3 / 255, 0.5, -1 / 255, 3.0]))
        tensor([ True,  True, False, False, False])
    """

    is_discrete = True
    event_dim = 0

    def __init__(self, levels: int) -> None:
        self.levels = _checked_levels(levels)

    def check(self, value: Tensor) -> Tensor:
        """Whether each number is on the grid."""
        steps = self.levels - 1
        level = value * float(steps)  # a float, where eight-bit integers would wrap around
        nearest = level.round()
        # float64 data may have been float32 before.
        eps = max(torch.finfo(level.dtype).eps, torch.finfo(torch.float32).eps)
        tolerance = min(4 * eps * steps, 0.25)
        on_grid = (level - nearest).abs() <= tolerance
        return on_grid & (nearest >= 0) & (nearest <= steps)

    def __repr__(self) -> str:
        return f"UnitGrid(levels={self.levels})"


def _split(raw: Tensor, outputs: int, event_dim: int) -> tuple[Tensor, ...]:
    """The `outputs` parts of `raw`, each (batch..., *shape)."""
    if raw.dim() <= event_dim or raw.shape[-1 - event_dim] != outputs:
        raise ValueError(
            f"expected decoder outputs of shape (batch..., {outputs}, *shape) with {event_dim} "
            f"dimensions in shape, got {tuple(raw.shape)}"
        )
    return raw.unbind(-1 - event_dim)


def _checked_scale(scale: float) -> float:
    """The scale; ValueError unless it is positive and finite."""
    if not 0 < scale < math.inf:
        raise ValueError(f"expected a positive, finite scale, got {scale}")
    return float(scale)


def _checked_levels(levels: int) -> int:
    """The number of levels; ValueError below two."""
    if levels < 2:
        raise ValueError(f"expected at least 2 levels, got {levels}")
    return levels
