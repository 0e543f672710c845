"""Variational programs: the guides of the models."""

__all__ = ["Encoder"]

from pyro_vi.guides.encoder import Encoder
