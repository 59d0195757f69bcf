"""A CSV file of labels, of images that it lists or of rows beside it, as people and spreadsheets write it."""

from __future__ import annotations

import csv
import io
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ups_fast.data.cells import read_cell
from ups_fast.data.label_sets import read_names
from ups_fast.words import are, many

PARTS = LABELED, UNLABELED, TEST, VAL = "labeled", "unlabeled", "test", "val"

NAMES = {TEST: "test", VAL: "validation"}  # what images of these parts are called

Row = tuple[str, str]  # a part, and a class or ""
Rows = dict[str, Row]  # by path

_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_DELIMITERS = ",;\t|"


def has_several(file: Path) -> bool:
    """Whether a table has a column labels, for any number of classes, in place of label.

    Raises ValueError with one sentence where it has both, or is no table.
    """
    with _csv_file(repr(str(file))):
        table, _ = _reader(_text(file), ("path", "labels"))
        names = set(_header(next(table, [])))
    if {"label", "labels"} <= names:
        raise ValueError(
            f"{str(file)!r} must have a column label, or labels for several classes, and has both"
        )
    return {"path", "labels"} <= names


def read_table(file: Path, notes: list[str], problems: list[str], *, several: bool = False) -> Rows:
    """The images that a table lists, by their paths relative to its folder.

    It has a line of column names with path, label (empty: unlabeled) and perhaps split (train, val, test or empty).
    Other columns are ignored. Fields are separated by commas, or as spreadsheets in Europe do by semicolons or tabs;
    the text is UTF-8, or UTF-16 with its byte order mark. Cells may be written by `cells.write_cell`. Paths may have
    any Unicode form, backslashes, or blanks around them: what is there decides.

    several  a column labels is in place of label, as `label_sets` describes it

    Raises ValueError with one sentence that names the line. `problems` gets one where no file is there.
    """
    where = repr(str(file))
    rows: Rows = {}
    repeated = 0
    tree = Tree(file.parent)
    with _csv_file(where):
        table, names, skipped = _opened(file, ("path", "labels" if several else "label"))
        for row in table:
            if not any(map(str.strip, row)):
                continue  # a line of delimiters alone is what is left of a spreadsheet
            line = table.line_num + skipped
            place = f"line {line} of {where}"
            path, known = _row(_cells(names, row, place), tree, place)
            _must_be_text(known[1] if os.path.lexists(file.parent / path) else known[1] + path, line)
            repeated += path in rows
            if rows.setdefault(path, known) != known:
                raise ValueError(f"{place} contradicts an earlier one on {path!r}")
    if rows and not tree.found:
        first = os.path.join(file.parent, next(iter(rows)))
        problems.append(
            f"none of the {many(len(rows), 'file')} that {where} lists is there, the first looked for is {first!r}"
            + tree.other_case
        )
    elif tree.other_case:
        notes.append(
            f"{many(tree.missing, 'file')} that {where} lists {are(tree.missing)} not there{tree.other_case}"
        )
    if repeated:
        notes.append(f"{many(repeated, 'row')} of {where} repeated others and were left out")
    return rows


def read_labels(file: Path, n: int, of: str) -> list[Row]:
    """Part and class of each of the `n` rows that another file (`of`) holds, line by line in their order.

    The table has the columns label (empty: unlabeled) and perhaps split, and is written as `read_table` describes.
    Raises ValueError with one sentence.
    """
    where = repr(str(file))
    rows: list[Row] = []
    blank = 0  # lines at the end
    with _csv_file(where):
        table, names, skipped = _opened(file, ("label",))
        for row in table:
            if not row and len(names) > 1:
                continue
            line = table.line_num + skipped
            place = f"line {line} of {where}"
            rows.append(_part(_cells(names, row, place), place, "row"))
            _must_be_text(rows[-1][1], line)
            blank = 0 if row else blank + 1
    rows = rows[: max(n, len(rows) - blank)]
    if len(rows) != n:
        raise ValueError(f"{where} must have a line for each of the {n:,} rows of {of!r}, got {len(rows):,}")
    return rows


def read_cells(file: Path, wanted: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """The line of column names, and all lines behind it, with their cells as they are written.

    Raises ValueError with one sentence where a column of `wanted` is missing, or the file is no table.
    """
    with _csv_file(repr(str(file))):
        _opened(file, wanted)
        table, _ = _reader(_text(file), wanted)
        return next(table), list(table)


@contextmanager
def _csv_file(where: str) -> Iterator[None]:
    try:
        yield
    except (csv.Error, UnicodeError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{where} must be a CSV file in UTF-8: {why}") from error


def _opened(file: Path, wanted: tuple[str, ...]) -> tuple[Any, list[str], int]:
    """The lines of a table behind its column names, these names, and how many lines come before them."""
    text = _text(file)
    table, skipped = _reader(text, wanted)
    names = _header(next(table, []))
    _must_be_text("".join(names), 1 + skipped)
    if not set(wanted) <= set(names) or any(name and names.count(name) > 1 for name in names):
        raise ValueError(
            f"{str(file)!r} must begin with a line of column names, each once, {' and '.join(wanted)} among them, "
            f"got {text.partition(chr(10))[0].strip()[:200]!r}"
        )
    return table, names, skipped


def _cells(names: list[str], row: list[str], line: str) -> dict[str, str]:
    if any(row[len(names) :]):
        raise ValueError(f"{line} has {len(row)} fields, but there are {len(names)} columns")
    return dict(zip(names, row, strict=False))


def _text(file: Path) -> str:
    raw = file.read_bytes()
    if raw.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
        raise UnicodeError('it looks like a workbook; save it as "CSV UTF-8" in the spreadsheet')
    encoding = next((encoding for mark, encoding in _MARKS.items() if raw.startswith(mark)), "utf-8")
    text = raw.decode(encoding, "strict" if encoding == "utf-16" else "surrogateescape")
    if "\0" in text:
        raise UnicodeError('it holds zero bytes, as UTF-16 without its mark does; save it as "CSV UTF-8"')
    return text


def _must_be_text(cell: str, line: int) -> None:
    """A file's name may be any bytes, as `write_pseudo_labels` writes them; all else is text."""
    if odd := "".join(c for c in cell if "\udc80" <= c <= "\udcff"):
        raise UnicodeError(
            f"line {line} has the bytes {os.fsencode(odd)!r}, which are no text in UTF-8; save it as "
            '"CSV UTF-8", as spreadsheets call it'
        )


def _reader(text: str, wanted: tuple[str, ...]) -> tuple[Any, int]:
    """The table's fields, separated by what makes its first line name the columns; and how many lines come before."""
    first, _, rest = text.partition("\n")
    skip = first.strip().lower() in [f"sep={delimiter}" for delimiter in _DELIMITERS]  # Excel's own note

    def split(delimiter: str, *, strict: bool = True) -> Any:
        return csv.reader(io.StringIO(rest if skip else text, newline=""), delimiter=delimiter, strict=strict)

    for delimiter in _DELIMITERS:
        if set(wanted) <= set(_header(next(split(delimiter, strict=False), []))):
            return split(delimiter), int(skip)
    return split(","), int(skip)


def _header(fields: list[str]) -> list[str]:
    return [name.strip().lower() for name in fields]


def _row(row: Mapping[str, str], tree: Tree, line: str) -> tuple[str, Row]:
    """The path of a row, relative to the table, with its part and class."""
    path = row.get("path", "")
    if not path.strip() or "\0" in path:
        raise ValueError(f"{line} must have a path, got {path!r}")
    return tree.find(path), _part(row, line, "image")


def _part(row: Mapping[str, str], line: str, noun: str) -> Row:
    label = read_cell(row.get("label", "").strip()).strip()
    if "labels" in row:
        label = read_names(row["labels"], line)
    split = row.get("split", "").strip().lower()
    if split not in ("", "train", VAL, TEST):
        raise ValueError(f"{line} must have the split train, val, test or nothing, got {split!r}")
    if split in NAMES and not label:
        raise ValueError(f"{line} is a {NAMES[split]} {noun} and must have a label, got none")
    return split if split in NAMES else LABELED if label else UNLABELED, label


class Tree:
    """The files below a folder, by paths that may be written in another way than their names."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.found = self.missing = 0
        self.other_case = ""  # "the path, but there is a name" of the first that is missed by case alone
        self.names: dict[str, dict[str, str]] = {}  # by folder: names by their NFC form

    def find(self, cell: str) -> str:
        """The path of the file that a cell means; of one that is not there, the path as written."""
        text = read_cell(cell)
        tries = [text, cell, text.replace("\\", "/"), text.strip(), text.strip().replace("\\", "/")]
        for path in dict.fromkeys(tries):
            if path and os.path.lexists(self.base / path):
                self.found += 1
                return posixpath.normpath(path)
        for path in dict.fromkeys(tries):
            if path and (real := self.in_any_form(path)):
                self.found += 1
                return posixpath.normpath(real)
        self.missing += 1
        path = text.replace("\\", "/")
        if not self.other_case and (real := self.in_any_form(path, fold=True)):
            self.other_case = f": {path!r} differs from {real!r} in upper and lower case"
        return posixpath.normpath(path)

    def in_any_form(self, path: str, *, fold: bool = False) -> str:
        """The path with each part replaced by the name that is there in another Unicode form (or case); or ""."""
        real = "/" if path.startswith("/") else ""
        for part in filter(None, path.split("/")):
            folder = os.path.join(self.base, real)
            if not os.path.lexists(os.path.join(folder, part)):
                name = self._listed(folder, fold).get(in_form(part, fold))
                if name is None:
                    return ""
                part = name
            real = os.path.join(real, part)
        return real

    def _listed(self, folder: str, fold: bool) -> dict[str, str]:
        key = f"{fold}{folder}"
        if key not in self.names:
            try:
                self.names[key] = {
                    in_form(name, fold): name for name in sorted(os.listdir(folder), reverse=True)
                }
            except (OSError, ValueError):
                self.names[key] = {}
        return self.names[key]


def in_form(name: str, fold: bool = False) -> str:
    """A name in the one Unicode form in which equal ones are equal; `fold`: in upper and lower case too."""
    text = unicodedata.normalize("NFC", name)
    return unicodedata.normalize("NFC", text.casefold()) if fold else text
