"""A table of a comparison as plain data, and as text."""

from __future__ import annotations

__all__ = ["Column", "format_table", "short"]

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_vi.comparison.labels import shown


@dataclass(frozen=True)
class Column:
    """One quantity of all rows.

    Attributes:
        name: the field of `Row`.
        label: its name for readers, with its unit.
        meaning: an explanation, one sentence.
        cells: its values as text, one for each row; empty where a row has none.
        indent: whether it belongs to the quantity before it.
    """

    name: str
    label: str
    meaning: str
    cells: tuple[str, ...]
    indent: bool = False


def format_table(families: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """The lines of the printed table, which has a line for each quantity.

    Args:
        families: names of the rows.
        columns: each with one cell for each family.

    Example:
        >>> elbo = Column("elbo", "ELBO (nats)", "the bound", ("-1.20", "-1.15"))
        >>> for line in format_table(["a", "b"], [elbo]):
        ...     print(line)
                         a      b
        ELBO (nats)  -1.20  -1.15
    """
    lines = [["", *map(shown, families)]]
    lines += [["  " * column.indent + column.label, *column.cells] for column in columns]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = []
    for label, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([label.ljust(widths[0]), *padded]).rstrip())
    return text


def short(error: float) -> str:
    """A standard error with two decimals, or with one digit where it would read 0.00.

    Example:
        >>> short(0.123), short(0.0012)
        ('0.12', '0.001')
    """
    return f"{error:.2f}" if error >= 0.01 or error == 0 else f"{error:.1g}"
