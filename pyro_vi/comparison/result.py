"""What a comparison found, as plain data."""

from __future__ import annotations

__all__ = ["Comparison"]

import csv
import io
import math
import textwrap
from dataclasses import dataclass, field, fields
from os import PathLike

import numpy as np
import numpy.typing as npt

from pyro_vi import files
from pyro_vi.comparison.labels import csv_text
from pyro_vi.comparison.marginals import MarginalErrors
from pyro_vi.comparison.rows import PerPoint, Row, elbos
from pyro_vi.comparison.table import Column, format_table
from pyro_vi.inference import Fit
from pyro_vi.posterior import Posterior, StepBound
from pyro_vi.programs import Data

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` returns; print it for the table.

    Attributes:
        rows: one per family, in the order given.
        fits: the fits by family.
        posteriors: the draws that the rows are made of, by family.
        step_bounds: the bounds of programs that draw some of their steps alone, such as diffusions,
            which have no posterior: theirs are in its place.
        points: the diagnostics of each data point by family; families without a density lack.
        data: the data that the posteriors are about, transformed.
        on_test: whether they are the test data.
        num_samples: posterior draws.
        shared: whether the model was frozen, so that there is one evidence for all families.
        reference: reference draws by site, (R, ...) each; empty without a reference.
        marginals: errors of every marginal against the reference, by family and site.
        noise: a row of what the reference's own Monte Carlo noise gives, or None.
        failures: the error of each family that failed, by family; also in its row's `status`.
        verdict: which family to trust, and how far, in plain words.
        warnings: what the numbers warn of, such as collapsed posteriors.
        columns: the table, a column for each quantity.
    """

    rows: tuple[Row, ...]
    fits: dict[str, Fit]
    posteriors: dict[str, Posterior]
    step_bounds: dict[str, StepBound]
    points: dict[str, PerPoint]
    data: Data
    on_test: bool
    num_samples: int
    shared: bool
    reference: dict[str, Array]
    marginals: dict[str, dict[str, MarginalErrors]]
    noise: Row | None = None
    failures: dict[str, Exception] = field(default_factory=dict)
    verdict: str = ""
    warnings: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()

    def __repr__(self) -> str:
        return f"Comparison of {', '.join(row.family for row in self.rows)}"

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """The rows, and that of the reference's noise last."""
        return (*self.rows, *([self.noise] if self.noise else []))

    @property
    def is_joint(self) -> bool:
        """Whether bounds and k-hat are of all data together."""
        return any(posterior.is_joint for posterior in self.posteriors.values())

    @property
    def elbos(self) -> dict[str, Array]:
        """The bound of each data point, (N,), or of all together, (1,), by family."""
        return elbos((row.family for row in self.rows), self.points, self.step_bounds)

    @property
    def best(self) -> Row:
        """The row with the highest ELBO.

        Raises:
            ValueError: no family has a bound.
        """
        bounded = [row for row in self.rows if not math.isnan(row.elbo)]
        if not bounded:
            raise ValueError("no family here has a bound: all hold their latents at a point")
        return max(bounded, key=lambda row: row.elbo)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Writes the rows to a file, every digit, one line per family; NaN is an empty cell.

        With a reference the last line is what its Monte Carlo noise gives. A name that a
        spreadsheet would take for a formula has a `'` before it.
        """
        names = [field.name for field in fields(Row)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(names)
        for row in self.all_rows:
            cells = [getattr(row, name) for name in names]
            cells = ["" if cell is None or cell != cell else cell for cell in cells]
            writer.writerow([csv_text(cell) if isinstance(cell, str) else cell for cell in cells])
        files.write(path, text.getvalue().encode(errors="backslashreplace"))

    def __str__(self) -> str:
        lines = format_table([row.family for row in self.all_rows], self.columns)
        words = [self.verdict, *(f"Warning: {warning}." for warning in self.warnings)]
        lines += ["", *(textwrap.fill(one, 100, break_on_hyphens=False) for one in words)]
        return "\n".join(lines)
