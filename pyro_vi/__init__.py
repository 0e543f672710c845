"""Fit, compare and judge variational posteriors of Pyro programs.

    data -> model + guide -> fit -> posterior -> diagnostics -> comparison

Families are in `pyro_vi.families` and `pyro_vi.flows`, programs in `pyro_vi.models` and
`pyro_vi.guides`, data sets in `pyro_vi.data`.
"""

from pyro_vi._version import __version__
from pyro_vi.comparison import Comparison, Row, compare, judge
from pyro_vi.inference import SVI, Fit, NonFiniteError, fit
from pyro_vi.posterior import Posterior
from pyro_vi.reporting import report
from pyro_vi.weighting import warmup

__all__ = [
    "SVI",
    "Comparison",
    "Fit",
    "NonFiniteError",
    "Posterior",
    "Row",
    "__version__",
    "compare",
    "fit",
    "judge",
    "report",
    "warmup",
]
