"""Fits side by side: rows of numbers, the table, and the verdict."""

from pyro_vi.comparison.judging import check_draws, compare, fit_each, judge, judge_each
from pyro_vi.comparison.labels import figure_label, shown
from pyro_vi.comparison.marginals import MarginalErrors, marginal_errors, noise_floor, scalar_name
from pyro_vi.comparison.result import Comparison
from pyro_vi.comparison.rows import PerPoint, Row
from pyro_vi.comparison.table import format_table, short
from pyro_vi.comparison.verdict import summarize

__all__ = [
    "Comparison",
    "MarginalErrors",
    "PerPoint",
    "Row",
    "check_draws",
    "compare",
    "figure_label",
    "fit_each",
    "format_table",
    "judge",
    "judge_each",
    "marginal_errors",
    "noise_floor",
    "scalar_name",
    "short",
    "shown",
    "summarize",
]
