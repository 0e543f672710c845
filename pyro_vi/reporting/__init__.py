"""Comparisons as one HTML page."""

from pyro_vi.reporting.page import report

__all__ = ["report"]
