"""The quantities of a comparison: what each is called, how it is shown and what it says.

`columns` gives those that mean something for the comparison at hand; the printed table and the
report show the same ones.
"""

from __future__ import annotations

__all__ = ["Column", "columns", "lines"]

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyro_vi import diagnostics
from pyro_vi.labels import shown

if TYPE_CHECKING:
    from pyro_vi.comparison import Comparison
    from pyro_vi.rows import Row


@dataclass(frozen=True)
class Column:
    """One quantity of a `Row`.

    Attributes:
        name: the field of `Row`.
        label: what it is called, with its unit.
        meaning: what it says, in a sentence.
        show: its value in a row, as text; empty where it means nothing.
    """

    name: str
    label: str
    meaning: str
    show: Callable[[Row], str]


def columns(result: Comparison) -> list[Column]:
    """The quantities that some row has, in the order in which they are read."""
    rows = [*result.rows, *([result.noise] if result.noise else [])]
    return [column for column in _all(result) if any(column.show(row) for row in rows)]


def lines(result: Comparison) -> list[str]:
    """The table as lines of text: a column per family, a line per quantity."""
    rows = [*result.rows, *([result.noise] if result.noise else [])]
    cells = [["", *(shown(row.family) for row in rows)]]
    cells += [[c.label, *(c.show(row) for row in rows)] for c in columns(result)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def short(error: float) -> str:
    """A standard error with two decimals, or one digit where those would show 0.00."""
    return f"{error:.2f}" if error >= 0.01 or error == 0 else f"{error:.1g}"


def _all(result: Comparison) -> list[Column]:
    bound = diagnostics.khat_threshold(result.num_samples)
    on = "test " if result.on_test else ""
    data = "test data" if result.on_test else "data"
    per = "of all data together" if result.is_joint else f"per data point, mean over the {data}"
    gap = "gap: best evidence - ELBO" if result.shared else "gap: evidence - ELBO"

    def value(name: str, form: str) -> Callable[[Row], str]:
        return lambda row: "" if _missing(row, name) else format(getattr(row, name), form)

    def error(name: str, form: str = ".2f") -> Callable[[Row], str]:
        def show(row: Row) -> str:
            text = value(name, form)(row)
            se = getattr(row, f"{name}_se")
            return f"{text} ± {short(se)}" if text and not math.isnan(se) else text

        return show

    def first(name: str) -> str:
        """The family that differences are to: the first that has the quantity."""
        families = [row.family for row in result.rows if not _missing(row, name)]
        return families[0] if families else ""

    def minus(name: str) -> str:
        return f"  minus {shown(first(name))}'s"

    def difference(name: str, form: str = "+.2f") -> Callable[[Row], str]:
        return lambda row: "" if row.family == first(name) else error(name, form)(row)

    found = [
        Column(
            "status",
            "status",
            "not fitted, failed or interrupted; see the warnings",
            lambda row: row.status.partition(":")[0].partition(" after ")[0],
        ),
        Column(
            "elbo",
            f"{on}ELBO (nats)",
            f"the bound on log p(x), in nats {per}; higher is better. ± is the Monte Carlo error",
            error("elbo"),
        ),
        Column(
            "elbo_difference",
            minus("elbo"),
            "the difference in ELBO to the first family"
            + (
                ""
                if result.is_joint
                else "; ± is its error over data points: beyond two of it, other data would most"
                " likely agree"
            ),
            difference("elbo_difference"),
        ),
        Column(
            "evidence",
            "evidence (nats)",
            "the importance-weighted estimate of log p(x) from all draws; in expectation a lower"
            " bound",
            error("evidence"),
        ),
        Column(
            "evidence_difference",
            f"{minus('evidence')} ",
            "the difference in evidence to the first family",
            difference("evidence_difference"),
        ),
        Column(
            "gap",
            gap,
            "an estimate of KL(q || posterior): what this posterior loses"
            + ("; the best estimate of the evidence serves all families" if result.shared else ""),
            error("gap"),
        ),
        Column(
            "reconstruction",
            "reconstruction (nats)",
            "E_q[log p(x | z)], the observed sites' share of the ELBO",
            value("reconstruction", ".2f"),
        ),
        Column(
            "kl",
            "KL to the prior (nats)",
            "KL(q || prior), of a diffusion that of all its steps; the ELBO is reconstruction minus"
            " this",
            value("kl", ".2f"),
        ),
        Column(
            "elbo_bits",
            "ELBO (bits per dimension)",
            "-ELBO / (D ln 2) for D observed values in a data point; lower is better",
            value("elbo_bits", ".3f"),
        ),
        Column(
            "evidence_bits",
            "evidence (bits per dimension)",
            "-evidence / (D ln 2)",
            value("evidence_bits", ".3f"),
        ),
        Column(
            "khat_median",
            f"k-hat (trusted to {bound:.2f})" if result.is_joint else "k-hat, median",
            "the Pareto tail index of the importance weights: how much of the posterior q misses",
            value("khat_median", ".2f"),
        ),
        Column(
            "khat_bad",
            f"k-hat above {bound:.2f}",
            f"the share of the {data} whose draws are not the posterior's, nor can be reweighted"
            " to it",
            (lambda row: "") if result.is_joint else value("khat_bad", ".0%"),
        ),
        Column(
            "ess",
            f"ESS of {result.num_samples:,} draws",
            "how many of the draws count as draws from the exact posterior",
            value("ess", ".0f"),
        ),
        Column(
            "predictive",
            "log predictive (nats)",
            "the log predictive density of a test data point, given the training data; ± is its"
            " error over test data points",
            error("predictive", ".3f"),
        ),
        Column(
            "predictive_difference",
            f"{minus('predictive')}  ",
            "the difference in it to the first family, paired over test data points",
            difference("predictive_difference", "+.3f"),
        ),
        Column(
            "mean_error",
            "mean error (reference sd)",
            "the largest distance of a marginal's mean from the reference's",
            value("mean_error", "+.2f"),
        ),
        Column(
            "sd_error",
            "sd error",
            "a marginal's standard deviation over the reference's, less one; the largest in size:"
            " below zero q is too narrow",
            value("sd_error", "+.0%"),
        ),
        Column(
            "wasserstein",
            "Wasserstein-1 (reference sd)",
            "the largest distance of a marginal from the reference's; the column of the reference"
            " is what its own Monte Carlo noise gives",
            value("wasserstein", ".2f"),
        ),
        Column(
            "rhat",
            "R-hat across restarts",
            "the largest over marginals; near 1 where restarts agree, which says nothing of how"
            " good their answer is",
            value("rhat", ".3f"),
        ),
        Column(
            "active_units",
            "active units",
            "latent units that move with the data: Var_x(E_q[z]) > 0.01",
            lambda row: (
                "" if row.active_units is None else f"{row.active_units} of {row.latent_units}"
            ),
        ),
        Column("parameters", "parameters", "trained values", value("parameters", ",")),
        Column(
            "seconds_per_step",
            "ms per step",
            "mean time of a gradient step",
            lambda row: (
                "" if _missing(row, "seconds_per_step") else f"{1e3 * row.seconds_per_step:.1f}"
            ),
        ),
    ]
    if result.shared:
        found = [column for column in found if column.name != "evidence_difference"]
    return found


def _missing(row: Row, name: str) -> bool:
    value: Any = getattr(row, name)
    return value is None or math.isnan(value)
