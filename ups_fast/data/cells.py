"""Cells of CSV tables: text that a spreadsheet would run as a formula is written so that it does not.

Excel, LibreOffice and others calculate a cell that begins with one of = + - @ (or their wide forms), also behind
blanks and quotes, or with a tab or a line break. Such text gets a leading apostrophe, their own mark of text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_RUNS = re.compile(r"""[\s"']*[=+\-@\uff1d\uff0b\uff0d\uff20]|["']*[\t\r\n]""")
_QUOTED = re.compile('[",\r\n]')


def write_cell(text: str) -> str:
    """The text, with a leading apostrophe where a spreadsheet would run it."""
    return f"'{text}" if _RUNS.match(text) else text


def read_cell(cell: str) -> str:
    """The text that `write_cell` was given; any other leading apostrophe stays."""
    return cell[1:] if cell[:1] == "'" and _RUNS.match(cell[1:]) else cell


def csv_line(cells: Iterable[str]) -> str:
    """A line of a table. A carriage return is quoted, too: `csv` leaves it bare, and readers end the row there."""
    return ",".join('"' + c.replace('"', '""') + '"' if _QUOTED.search(c) else c for c in cells) + "\n"
