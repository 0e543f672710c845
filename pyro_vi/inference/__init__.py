"""Fits: ELBOs, SVI, the training loop, restarts, Laplace's approximation, and saved fits."""

from pyro_vi.inference.averaging import Average
from pyro_vi.inference.elbo import with_terms
from pyro_vi.inference.file_format import (
    COUNT,
    POSITIVE,
    TEXT,
    Kind,
    Maybe,
    check_entries,
    read_fit,
)
from pyro_vi.inference.fitted import Fit
from pyro_vi.inference.fitting import fit
from pyro_vi.inference.interrupts import Interruption, interruptible
from pyro_vi.inference.nonfinite import NonFiniteError
from pyro_vi.inference.per_data_point import PerDataPoint
from pyro_vi.inference.restarts import perturb
from pyro_vi.inference.svi import SVI
from pyro_vi.inference.trainer import BLOCK, SVITrainer

__all__ = [
    "BLOCK",
    "COUNT",
    "POSITIVE",
    "SVI",
    "TEXT",
    "Average",
    "Fit",
    "Interruption",
    "Kind",
    "Maybe",
    "NonFiniteError",
    "PerDataPoint",
    "SVITrainer",
    "check_entries",
    "fit",
    "interruptible",
    "perturb",
    "read_fit",
    "with_terms",
]
