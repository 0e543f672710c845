r"""Reverse kernels of diffusion: what a network's output says about the step before.

A prediction turns the output for y_t into an estimate of y_0, and all of them are one function
written in three ways,

    Noise      y_0 = (y_t - noise_t out) / signal_t
    Clean      y_0 = out
    Velocity   y_0 = signal_t y_t - noise_t out

The kernel's mean is that of q(y_s | y_t, y_0) at this estimate. Its covariance is a family:

    SmallVariance   v_t I: right where the data are known
    LargeVariance   beta_t I: right where the data are N(0, I)
    LearnedVariance any family of `pyro_vi.families` or `pyro_vi.flows`, in units of beta_t^(1/2)
"""

__all__ = ["Clean", "LargeVariance", "LearnedVariance", "Noise", "SmallVariance", "Velocity"]

from typing import cast

from pyro.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    TorchDistribution,
    TransformedDistribution,
    transforms,
)
from torch import Tensor, nn

from pyro_vi.diffusion.denoisers import TimeEmbedding
from pyro_vi.diffusion.process import Transition
from pyro_vi.families import FullCovariance, LowRank, MeanField


class Noise(nn.Module):
    """The output is the noise in y_t: DDPM's own choice."""

    def forward(self, out: Tensor, y_t: Tensor, step: Transition) -> Tensor:
        """The estimate of y_0, of the shape of y_t."""
        return (y_t - step.noise * out) / step.signal


class Clean(nn.Module):
    """The output is y_0 itself: stable where little signal is left."""

    def forward(self, out: Tensor, y_t: Tensor, step: Transition) -> Tensor:
        """The estimate of y_0, of the shape of y_t."""
        return out


class Velocity(nn.Module):
    """The output is signal_t noise - noise_t y_0: stable at both ends.

    References:
        Progressive Distillation for Fast Sampling of Diffusion Models (arXiv:2202.00512)
    """

    def forward(self, out: Tensor, y_t: Tensor, step: Transition) -> Tensor:
        """The estimate of y_0, of the shape of y_t."""
        return step.signal * y_t - step.noise * out


class SmallVariance(nn.Module):
    """v_t I, the variance of q(y_s | y_t, y_0): exact as the data shrink to one point.

    There is none at t = 1, where the likelihood of x_0 takes the kernel's place.
    """

    def forward(self, mean: Tensor, y_t: Tensor, t: Tensor, step: Transition) -> TorchDistribution:
        """p(y_s | y_t), of event_shape (dim,)."""
        return Normal(mean, step.small.sqrt()).to_event(1)


class LargeVariance(nn.Module):
    """beta_t I, the variance of q(y_t | y_s): exact for data from N(0, I)."""

    def forward(self, mean: Tensor, y_t: Tensor, t: Tensor, step: Transition) -> TorchDistribution:
        """p(y_s | y_t), of event_shape (dim,)."""
        return Normal(mean, step.large.sqrt()).to_event(1)


class LearnedVariance(nn.Module):
    r"""A family around the mean, in units of the step's largest standard deviation.

    .. math:: y_s = m(y_t, t) + \beta_t^{1/2} u, \quad u \sim \mathrm{family}(\mathrm{context})

    A normal family is centred: its own mean is left out, since the network's estimate has one.

    The context is an embedding of t, with what a network of its own sees in y_t, if there is one.

    Args:
        family: A family over R^dim, dim being that of the diffusion (:mod:`pyro_vi.families`,
            :mod:`pyro_vi.flows`).
        steps: The number of steps T.
        network: From y_t, (..., dim), to features, (..., context_dim), that are added to the
            embedding; None for a covariance that depends on t alone.

    References:
        Improved Denoising Diffusion Probabilistic Models (arXiv:2102.09672), for the diagonal

    Example:
        >>> from pyro_vi.families import FullCovariance
        >>> LearnedVariance(FullCovariance(2, context_dim=16), steps=8)  # doctest: +ELLIPSIS
        LearnedVariance(...)
    """

    def __init__(self, family: nn.Module, steps: int, *, network: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(family, nn.Module) or not hasattr(family, "context_dim"):
            raise TypeError(
                "expected the family to be a module with a context_dim, such as"
                f" FullCovariance(8, context_dim=32), got {family!r}"
            )
        self.family = family
        self.centred = isinstance(family, (MeanField, LowRank, FullCovariance))
        self.embedding = TimeEmbedding(cast(int, family.context_dim), steps)
        self.network = network

    def forward(self, mean: Tensor, y_t: Tensor, t: Tensor, step: Transition) -> TorchDistribution:
        """p(y_s | y_t), of event_shape (dim,)."""
        if self.family.dim != mean.shape[-1]:
            raise ValueError(
                f"expected a family over {mean.shape[-1]} dimensions, got one over"
                f" {self.family.dim}"
            )
        context = self.embedding(t)
        if self.network is not None:
            context = context + self.network(y_t)
        return _affine(self.family(context), mean, step.large.sqrt())


def _affine(fn: TorchDistribution, loc: Tensor, scale: Tensor) -> TorchDistribution:
    """The distribution of loc + scale u for u ~ fn, a normal's mean left out; scale is (..., 1)."""
    if isinstance(fn, Independent) and isinstance(fn.base_dist, Normal):
        base = fn.base_dist
        return Normal(loc, scale * base.scale).to_event(1)
    if isinstance(fn, LowRankMultivariateNormal):
        factor, diagonal = scale.unsqueeze(-1) * fn.cov_factor, scale.square() * fn.cov_diag
        return LowRankMultivariateNormal(loc, factor, diagonal)
    if isinstance(fn, MultivariateNormal):
        tril = scale.unsqueeze(-1) * fn.scale_tril
        return MultivariateNormal(loc, scale_tril=tril)
    return TransformedDistribution(
        fn, [transforms.AffineTransform(loc, scale.expand_as(loc), event_dim=1)]
    )
