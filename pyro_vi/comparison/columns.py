"""The quantities that a comparison shows, in the order in which they are read."""

from __future__ import annotations

__all__ = ["columns"]

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyro_vi.comparison.labels import shown
from pyro_vi.comparison.result import Comparison
from pyro_vi.comparison.rows import Row
from pyro_vi.comparison.table import Column, short
from pyro_vi.diagnostics import khat_threshold

Text = Callable[[Comparison], str]


@dataclass(frozen=True)
class Quantity:
    """How one field of `Row` is shown.

    Attributes:
        name: the field of `Row`.
        label, meaning: as of a `Column`; a function of the comparison where they depend on it.
        show: the value of a row as text; empty where there is none.
        applies: whether the quantity means something in a comparison.
        difference: whether it is a difference to the first family that has the quantity.
    """

    name: str
    label: str | Text
    meaning: str | Text
    show: Callable[[Row], str]
    applies: Callable[[Comparison], bool] = lambda result: True
    difference: bool = False

    def column(self, result: Comparison) -> Column:
        """The quantity in all rows of a comparison."""
        label, meaning = _text(self.label, result), _text(self.meaning, result)
        cells = [self.show(row) for row in result.all_rows]
        if self.difference:
            of = self.name.removesuffix("_difference")
            first = next((i for i, row in enumerate(result.rows) if not _is_missing(row, of)), None)
            label = f"minus {shown(result.rows[first].family)}'s" if first is not None else ""
            cells = ["" if i == first else cell for i, cell in enumerate(cells)]
        return Column(self.name, label, meaning, tuple(cells), indent=self.difference)


def columns(result: Comparison) -> tuple[Column, ...]:
    """The columns of a comparison that some row has a value for."""
    found = [one.column(result) for one in QUANTITIES if one.applies(result)]
    return tuple(column for column in found if any(column.cells))


def _text(text: str | Text, result: Comparison) -> str:
    return text if isinstance(text, str) else text(result)


def _value(name: str, form: str) -> Callable[[Row], str]:
    """Shows a field in a format."""

    return lambda row: "" if _is_missing(row, name) else format(getattr(row, name), form)


def _estimate(name: str, form: str = ".2f") -> Callable[[Row], str]:
    """Shows a field with its standard error."""
    value = _value(name, form)

    def show(row: Row) -> str:
        text, error = value(row), getattr(row, f"{name}_se")
        return f"{text} ± {short(error)}" if text and not math.isnan(error) else text

    return show


def _is_missing(row: Row, name: str) -> bool:
    value: Any = getattr(row, name)
    return value is None or math.isnan(value)


def _data(result: Comparison) -> str:
    return "test data" if result.on_test else "data"


def _bound(result: Comparison) -> float:
    return float(khat_threshold(result.num_samples))


def _status(row: Row) -> str:
    return row.status.partition(":")[0].partition(" after ")[0]


def _active_units(row: Row) -> str:
    return "" if row.active_units is None else f"{row.active_units} of {row.latent_units}"


def _milliseconds(row: Row) -> str:
    seconds = row.seconds_per_step
    return "" if _is_missing(row, "seconds_per_step") else f"{1e3 * seconds:.1f}"


STATUS = Quantity(
    "status",
    "status",
    "not fitted, failed or interrupted; see the warnings",
    _status,
)
ELBO = Quantity(
    "elbo",
    lambda result: "test ELBO (nats)" if result.on_test else "ELBO (nats)",
    lambda result: (
        "the bound on log p(x), in nats "
        + (
            "of all data together"
            if result.is_joint
            else f"per data point, mean over the {_data(result)}"
        )
        + "; higher is better. ± is the Monte Carlo error"
    ),
    _estimate("elbo"),
)
ELBO_DIFFERENCE = Quantity(
    "elbo_difference",
    "",
    lambda result: (
        "the difference in ELBO to the first family"
        if result.is_joint
        else "the difference in ELBO to the first family; ± is its error over data points: beyond"
        " two of it, other data would most likely agree"
    ),
    _estimate("elbo_difference", "+.2f"),
    difference=True,
)
EVIDENCE = Quantity(
    "evidence",
    "evidence (nats)",
    "the importance-weighted estimate of log p(x) from all draws; in expectation a lower bound",
    _estimate("evidence"),
)
EVIDENCE_DIFFERENCE = Quantity(
    "evidence_difference",
    "",
    "the difference in evidence to the first family",
    _estimate("evidence_difference", "+.2f"),
    applies=lambda result: not result.shared,
    difference=True,
)
GAP = Quantity(
    "gap",
    lambda result: "gap: best evidence - ELBO" if result.shared else "gap: evidence - ELBO",
    lambda result: (
        "an estimate of KL(q || posterior): what this posterior loses"
        + ("; the best estimate of the evidence serves all families" if result.shared else "")
    ),
    _estimate("gap"),
)
RECONSTRUCTION = Quantity(
    "reconstruction",
    "reconstruction (nats)",
    "E_q[log p(x | z)], the observed sites' share of the ELBO",
    _value("reconstruction", ".2f"),
)
KL = Quantity(
    "kl",
    "KL to the prior (nats)",
    "KL(q || prior), of a diffusion that of all its steps; the ELBO is reconstruction minus this",
    _value("kl", ".2f"),
)
ELBO_BITS = Quantity(
    "elbo_bits",
    "ELBO (bits per dimension)",
    "-ELBO / (D ln 2) for D observed values in a data point; lower is better",
    _value("elbo_bits", ".3f"),
)
EVIDENCE_BITS = Quantity(
    "evidence_bits",
    "evidence (bits per dimension)",
    "-evidence / (D ln 2)",
    _value("evidence_bits", ".3f"),
)
KHAT = Quantity(
    "khat_median",
    lambda result: (
        f"k-hat (trusted to {_bound(result):.2f})" if result.is_joint else "k-hat, median"
    ),
    "the Pareto tail index of the importance weights: how much of the posterior q misses",
    _value("khat_median", ".2f"),
)
KHAT_BAD = Quantity(
    "khat_bad",
    lambda result: f"k-hat above {_bound(result):.2f}",
    lambda result: (
        f"the share of the {_data(result)} whose draws are not the posterior's, nor can be"
        " reweighted to it"
    ),
    _value("khat_bad", ".0%"),
    applies=lambda result: not result.is_joint,
)
ESS = Quantity(
    "ess",
    lambda result: f"ESS of {result.num_samples:,} draws",
    "how many of the draws count as draws from the exact posterior",
    _value("ess", ".0f"),
)
PREDICTIVE = Quantity(
    "predictive",
    "log predictive (nats)",
    "the log predictive density of a test data point, given the training data; ± is its error over"
    " test data points",
    _estimate("predictive", ".3f"),
)
PREDICTIVE_DIFFERENCE = Quantity(
    "predictive_difference",
    "",
    "the difference in it to the first family, paired over test data points",
    _estimate("predictive_difference", "+.3f"),
    difference=True,
)
MEAN_ERROR = Quantity(
    "mean_error",
    "mean error (reference sd)",
    "the largest distance of a marginal's mean from the reference's",
    _value("mean_error", "+.2f"),
)
SD_ERROR = Quantity(
    "sd_error",
    "sd error",
    "a marginal's standard deviation over the reference's, less one; the largest in size: below"
    " zero q is too narrow",
    _value("sd_error", "+.0%"),
)
WASSERSTEIN = Quantity(
    "wasserstein",
    "Wasserstein-1 (reference sd)",
    "the largest distance of a marginal from the reference's; the column of the reference is what"
    " its own Monte Carlo noise gives",
    _value("wasserstein", ".2f"),
)
RHAT = Quantity(
    "rhat",
    "R-hat across restarts",
    "the largest over marginals; near 1 where restarts agree, which says nothing of how good their"
    " answer is",
    _value("rhat", ".3f"),
)
ACTIVE_UNITS = Quantity(
    "active_units",
    "active units",
    "latent units that move with the data: Var_x(E_q[z]) > 0.01",
    _active_units,
)
PARAMETERS = Quantity("parameters", "parameters", "trained values", _value("parameters", ","))
SECONDS_PER_STEP = Quantity(
    "seconds_per_step", "ms per step", "mean time of a gradient step", _milliseconds
)

QUANTITIES = (
    STATUS,
    ELBO,
    ELBO_DIFFERENCE,
    EVIDENCE,
    EVIDENCE_DIFFERENCE,
    GAP,
    RECONSTRUCTION,
    KL,
    ELBO_BITS,
    EVIDENCE_BITS,
    KHAT,
    KHAT_BAD,
    ESS,
    PREDICTIVE,
    PREDICTIVE_DIFFERENCE,
    MEAN_ERROR,
    SD_ERROR,
    WASSERSTEIN,
    RHAT,
    ACTIVE_UNITS,
    PARAMETERS,
    SECONDS_PER_STEP,
)
