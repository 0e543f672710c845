"""What programs keep, as it was before a run that is to leave nothing there.

A step is recorded from a run on tensors without values. One that is left in a list or a global, for
a user's next line to read, would be an error there; and what a run leaves from step to step, a
compiled step would not.
"""

from __future__ import annotations

__all__ = ["Kept"]

from itertools import chain
from typing import Any

import numpy as np

from pyro_vi.holdings import Holdings
from pyro_vi.watch import is_same


class Kept:
    """What was in places and containers before a run, of which a record would leave nothing there.

    Args:
        holdings: of the programs.
    """

    def __init__(self, holdings: Holdings) -> None:
        self._places = [(place, place.get(place.key)) for place in holdings.places]
        held = [(name, one) for name, one, _ in holdings.containers]
        held += [("", one) for one in holdings.caches]
        self._containers = [(name, one, _content(one)) for name, one in held]
        arrays = [one for one in holdings.arrays if isinstance(one[1], np.ndarray)]
        self._arrays = [(name, one, one.copy()) for name, one in arrays]

    def restore(self) -> str | None:
        """Puts everything back; the name of one that was another, if it is no cache."""
        found = []
        for name, container, before in self._containers:
            now = _content(container)
            if len(now) != len(before) or not all(map(is_same, chain(*now), chain(*before))):
                found.append(name)
                _refill(container, before)
        for place, value in self._places:
            if not is_same(place.get(place.key), value):
                found.append(place.name)
                place.put(value)
        for name, array, copy in self._arrays:
            if array.tobytes() != copy.tobytes():
                found.append(name)
                array[...] = copy
        return next(filter(None, found), None)


def _content(container: Any) -> list[tuple[Any, ...]]:
    """Keys and values, or items."""
    if isinstance(container, dict):
        return list(dict.items(container))
    return [(one,) for one in container]


def _refill(container: Any, before: list[tuple[Any, ...]]) -> None:
    container.clear()
    if isinstance(container, dict):
        for key, value in before:
            container[key] = value
    else:
        put = container.add if isinstance(container, set) else container.append
        for (one,) in before:
            put(one)
