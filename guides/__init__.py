"""Variational programs: the guides of the models."""

__all__ = ["Encoder", "ForwardOrder", "ForwardProcess", "Joint", "PairEncoder", "ReverseOrder"]

from pyro_vi.guides.encoder import Encoder
from pyro_vi.guides.forward_process import ForwardOrder, ForwardProcess, ReverseOrder
from pyro_vi.guides.joint import Joint
from pyro_vi.guides.pair_encoder import PairEncoder
