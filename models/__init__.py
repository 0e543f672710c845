"""Generative programs, and the likelihoods that they are made with."""

__all__ = [
    "DDPM",
    "VAE",
    "Bernoulli",
    "ContinuousBernoulli",
    "DDPMChain",
    "DiscretizedLogistic",
    "DiscretizedLogisticDistribution",
    "Gaussian",
    "LearnedDiscretizedLogistic",
    "LearnedGaussian",
    "LinearGaussian",
    "PixelGaussian",
    "PredictiveVAE",
]

from pyro_vi.models.ddpm import DDPM, DDPMChain
from pyro_vi.models.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticDistribution,
    Gaussian,
    LearnedDiscretizedLogistic,
    LearnedGaussian,
    PixelGaussian,
)
from pyro_vi.models.linear_gaussian import LinearGaussian
from pyro_vi.models.predictive_vae import PredictiveVAE
from pyro_vi.models.vae import VAE
