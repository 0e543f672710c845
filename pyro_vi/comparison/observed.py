"""What a model observes, and whether two models observe the same thing.

Only then do their bounds compare. Seen by a run on a few rows, the model under its guide.
"""

from __future__ import annotations

__all__ = ["Observed", "check_one_variable"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vi.process_state import seeded
from pyro_vi.programs import (
    Arguments,
    Program,
    State,
    is_deterministic,
    is_discrete,
    is_subsampled_term,
)


@dataclass(frozen=True)
class Observed:
    """What a run of a model under its guide shows.

    Attributes:
        model: the program; of a fitted one what was fitted.
        by_step: whether it draws some of its steps alone.
        observes: whether it observes anything; a `pyro.factor` counts.
        density: every number observed with a density, sorted.
        discrete: the rank of every discrete one among them, sorted: units do not matter there.
        levels: how many values the observed sites may take; None of densities.
    """

    model: Callable[..., Any]
    by_step: bool
    observes: bool
    density: Tensor
    discrete: Tensor
    levels: frozenset[Any]

    @classmethod
    def from_run(
        cls, model: Callable[..., Any], guide: Callable[..., Any], batch: Arguments
    ) -> Observed:
        """Runs the programs on a batch, and leaves them as they were."""
        args, kwargs = batch
        state = State({"model": model, "guide": guide})
        with seeded(0), torch.no_grad(), state.installed(), pyro.validation_enabled(False):
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
        sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
        by_step = any(map(is_subsampled_term, sites))
        observed = [site for site in sites if site["is_observed"] and not is_deterministic(site)]
        numbers: dict[bool, list[Tensor]] = {False: [], True: []}
        for site in observed:
            numbers[is_discrete(site["fn"])].append(_numbers(site, masked=not by_step))
        density, discrete = (
            torch.cat([torch.zeros(0, dtype=torch.float64), *numbers[kind]]).sort().values
            for kind in (False, True)
        )
        return cls(
            model=model.function if isinstance(model, Program) else model,
            by_step=by_step,
            observes=bool(observed),
            density=density,
            discrete=discrete.unique(return_inverse=True)[1],
            levels=frozenset(_levels(site["fn"]) for site in observed if site["value"].numel()),
        )

    def __str__(self) -> str:
        kinds = [f"of {levels} levels" for levels in self.levels - {None}]
        found = [f"{len(self.discrete)} numbers {' and '.join(sorted(kinds))}"] * bool(kinds)
        found += [f"{len(self.density)} with a density"] * bool(len(self.density))
        return " and ".join(found) or "nothing"


def check_one_variable(looks: Mapping[str, Observed]) -> None:
    """Raises ValueError if models, by name, have bounds on different things."""
    (first, expected), *others = looks.items()
    for name, found in others:
        if found.model == expected.model:
            continue
        if str(found) != str(expected):
            raise ValueError(
                f"bounds on different things do not compare: of the same rows {first!r} observes"
                f" {expected}, {name!r} {found}"
            )
        alike = torch.allclose(found.density, expected.density, rtol=1e-5, atol=1e-6)
        if not alike or not torch.equal(found.discrete, expected.discrete):
            raise ValueError(
                f"bounds on different things do not compare: {first!r} and {name!r} observe other"
                " numbers of the same rows (other units of a density, say)"
            )


def _numbers(site: Any, *, masked: bool) -> Tensor:
    """The numbers that a site observes; those that are masked left out, but of a step's mask."""
    value, fn, mask = site["value"], site["fn"], site["mask"]
    if masked and isinstance(mask, (bool, Tensor)):
        rows = torch.as_tensor(mask, device=value.device)
        rows = rows.reshape(rows.shape + (1,) * fn.event_dim)
        value, rows = torch.broadcast_tensors(value, rows)
        value = value[rows]
    return value.reshape(-1).double().cpu()


def _levels(fn: Any) -> Any:
    """The number of values that a discrete distribution takes, or what it says of its support."""
    if not is_discrete(fn):
        return None
    support = fn.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is constraints.boolean:
        return 2
    if isinstance(support, constraints.integer_interval):
        sizes = torch.as_tensor(support.upper_bound - support.lower_bound + 1).unique()
        return int(sizes[0]) if len(sizes) == 1 else str(type(support).__name__)
    return getattr(support, "levels", None) or str(support)
