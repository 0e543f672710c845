"""Names that users gave, as a text, a figure or a table can show them.

Families, sites and plates may have any name. In a figure a `$` would begin a formula, and a name
that begins with `_` would vanish from a legend; in a spreadsheet a name that begins with `=` would
be a formula; a line break would break a table.
"""

from __future__ import annotations

__all__ = ["csv_text", "figure_label", "shown"]

import textwrap

_LONG, _LONG_IN_FIGURE = 80, 40  # characters
_FORMULAS = tuple("=+-@")  # how spreadsheets know a formula, after white space too


def shown(name: str, most: int = _LONG) -> str:
    """A name in one line of text, its middle left out where it has more characters than `most`.

    Example:
        >>> shown("two\\nlines"), shown("mean-field of 3 layers", most=12), shown("")
        ('two lines', 'mean-fie…ers', '(no name)')
    """
    printable = (c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in name)
    line = " ".join("".join(printable).split()) or "(no name)"
    if len(line) > most:
        end = most // 4
        line = f"{line[: most - end - 1]}…{line[-end:]}"
    return line


def figure_label(name: str, *, wide: int | None = None) -> str:
    """A name as a text of matplotlib, in which nothing is a formula and nothing is left out.

    Args:
        name: of a family, a site and the like.
        wide: characters in a line, after which it breaks; by default it never does.

    Example:
        >>> figure_label("$5 a day"), figure_label("_hidden")
        ('\\\\$5 a day', ' _hidden')
    """
    line = shown(name, _LONG_IN_FIGURE)
    if wide is not None:
        line = textwrap.fill(line, wide, break_on_hyphens=False)
    line = line.replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def csv_text(name: str) -> str:
    """A name as a cell of a CSV file, which no spreadsheet takes for a formula.

    Line breaks are all "\\\\n": Python's csv quotes no other ones.

    Example:
        >>> csv_text("=1+1"), csv_text("flow")
        ("'=1+1", 'flow')
    """
    risky = name.lstrip().startswith(_FORMULAS) or name.startswith(("\t", "\r", "\n"))
    text = f"'{name}" if risky else name
    return text.replace("\r\n", "\n").replace("\r", "\n")
