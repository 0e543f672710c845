"""What the tests of compiled steps share: double precision, and no compiler but the system's."""

from __future__ import annotations

import math

import pytest

from pyro_vi.compiling import backends

pytest.register_assert_rewrite("steps")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, double: None) -> None:
    """Every record is small enough for C, so that no test waits for TorchInductor."""
    monkeypatch.setattr(backends, "LARGE", math.inf)
