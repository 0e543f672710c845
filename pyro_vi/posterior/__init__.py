"""Draws from a fitted guide with their densities, what they say, and their export to ArviZ."""

from pyro_vi.posterior.arviz import as_arviz, load, save
from pyro_vi.posterior.posterior import Posterior
from pyro_vi.posterior.scoring import Scorer, check_scores
from pyro_vi.posterior.stepwise import StepBound, step_bound
from pyro_vi.posterior.vectorize import NOISE, vectorize_over_draws
from pyro_vi.posterior.weighted_draws import Loo

__all__ = [
    "NOISE",
    "Loo",
    "Posterior",
    "Scorer",
    "StepBound",
    "as_arviz",
    "check_scores",
    "load",
    "save",
    "step_bound",
    "vectorize_over_draws",
]
