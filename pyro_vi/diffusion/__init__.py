"""Diffusions: the forward process, its schedules, reverse kernels, denoisers and step weights."""

from pyro_vi.diffusion.denoisers import Autocast, FromDiffusers, MLPDenoiser, TimeEmbedding, UNet
from pyro_vi.diffusion.kernels import (
    Clean,
    LargeVariance,
    LearnedVariance,
    Noise,
    SmallVariance,
    Velocity,
)
from pyro_vi.diffusion.process import (
    Affine,
    Coordinates,
    Diffusion,
    StratifiedSteps,
    Transition,
    Whitened,
)
from pyro_vi.diffusion.schedules import (
    CosineSchedule,
    GivenSchedule,
    LearnedSchedule,
    LinearSchedule,
    Schedule,
)
from pyro_vi.diffusion.weights import Simple, StepWeight, Truncated

__all__ = [
    "Affine",
    "Autocast",
    "Clean",
    "Coordinates",
    "CosineSchedule",
    "Diffusion",
    "FromDiffusers",
    "GivenSchedule",
    "LargeVariance",
    "LearnedSchedule",
    "LearnedVariance",
    "LinearSchedule",
    "MLPDenoiser",
    "Noise",
    "Schedule",
    "Simple",
    "SmallVariance",
    "StepWeight",
    "StratifiedSteps",
    "TimeEmbedding",
    "Transition",
    "Truncated",
    "UNet",
    "Velocity",
    "Whitened",
]
