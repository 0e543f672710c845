"""State that belongs to the whole process: the lock around it, and seeds.

Pyro's handlers and parameter store, torch's generators, and the modules of a program are shared by
all threads. Code that changes them holds `process_lock`, and other threads wait for it.
"""

from __future__ import annotations

__all__ = ["process_lock", "seeded"]

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyro_vi.checks import check_seed

process_lock = threading.RLock()


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seeds torch's generators inside, and leaves them outside as they were. Other threads wait."""
    check_seed(seed)
    on_cuda = torch.cuda.is_initialized() or (device is not None and device.type == "cuda")
    devices = list(range(torch.cuda.device_count())) if on_cuda else []
    with process_lock, torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(seed))
        yield
