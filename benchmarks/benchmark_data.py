"""The data of the benchmarks' programs, as arrays: no peer has to load another's library."""

from __future__ import annotations

import numpy as np

Y = np.array([28, 8, -3, 7, -1, 1, 18, 12], np.float32)
SIGMA = np.array([15, 10, 16, 11, 9, 11, 10, 18], np.float32)
TOSSES = np.array([1] * 6 + [0] * 4, np.float32)
ROWS = np.random.default_rng(0).standard_normal((10_000, 50), np.float32)
LABELS = (ROWS[:, 0] > 0).astype(np.float32)
