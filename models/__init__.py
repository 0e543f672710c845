"""Generative programs, and the likelihoods that they are made with."""

__all__ = [
    "VAE",
    "Bernoulli",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticDistribution",
    "Gaussian",
    "LearnedGaussian",
    "LinearGaussian",
    "PixelGaussian",
]

from pyro_vi.models.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticDistribution,
    Gaussian,
    LearnedGaussian,
    PixelGaussian,
)
from pyro_vi.models.linear_gaussian import LinearGaussian
from pyro_vi.models.vae import VAE
