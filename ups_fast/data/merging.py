"""A table of labels and what people said since: their new labels go into a copy of it, and it keeps its own."""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from ups_fast.data.annotations import Annotation
from ups_fast.data.cells import csv_line, read_cell, write_cell
from ups_fast.data.folder import listing
from ups_fast.data.row_files import row_file
from ups_fast.data.table import NAMES, Tree, has_several, in_form, read_cells, read_labels, read_table
from ups_fast.files import home
from ups_fast.words import did_you_mean, said

# Of a cloud's storage: Label Studio takes these as they are, and unquotes all others.
_AS_THEY_ARE = re.compile(r"(s3|gs|azure-blob|azure_spi)://")
_UPLOAD = re.compile(r"/data/upload/[0-9]+/[0-9a-f]{8}-([^/?#]+)$")

DISAGREE, DIFFERS = "annotations disagree", "differs from the table"
SKIPPED, NO_CLASS, SEVERAL = "skipped", "no class", "several classes"
UNKNOWN_CLASS, UNKNOWN_PATH, AMBIGUOUS = "unknown class", "unknown path", "several files of this name"


@dataclass(frozen=True)
class Table:
    """A table of labels, cell by cell as it is written."""

    header: list[str]
    rows: list[list[str]]
    names: list[str]  # of each row: its path, or such as features.npy[17]; "" of a blank line
    label: int  # its column
    folder: str  # its paths are relative to the folder of this name
    of_files: bool  # and not of rows

    def given(self, row: list[str]) -> str:
        """The class of a row, or ""."""
        return read_cell(row[self.label].strip()).strip()

    def write(self) -> bytes:
        lines = [csv_line(self.header), *map(csv_line, self.rows)]
        return "".join(lines).encode("utf-8", "surrogateescape")


class Finding(NamedTuple):
    """Something that a person said and that is not in the merged table."""

    path: str
    table: str  # the class that the table has, or ""
    annotation: str
    what: str  # one of the words above
    remark: str = ""


@dataclass(frozen=True)
class Merged:
    table: Table
    new: int  # images that have a label now
    same: int  # images that had it already
    findings: list[Finding]


def open_table(place: Path) -> Table:
    """The table of labels that `data.root` may name: a CSV file, or a folder of images, which becomes one.

    A CSV file with an .npy or .parquet file of its name beside it has the labels of that file's rows. Raises ValueError
    or FileNotFoundError with one sentence, as a run on it would.
    """
    place = home(place)
    if not place.exists():
        raise FileNotFoundError(f"there is no table or folder {str(place)!r}")
    if place.is_dir():
        found = listing(place)
        if not found.rows:
            raise ValueError(found.problems[0])
        paths = sorted(found.rows)
        rows = [[write_cell(path), *_cells(*found.rows[path])] for path in paths]
        return Table(["path", "label", "split"], rows, paths, 1, place.resolve().name, True)
    beside = [place.with_suffix(kind) for kind in (".npy", ".parquet") if place.with_suffix(kind).is_file()]
    if beside:
        n = row_file(str(beside[0])).n
        read_labels(place, n, beside[0].name)
        header, rows = read_cells(place, ("label",))
    else:
        if has_several(place):
            raise ValueError(
                f"{str(place)!r} has a column labels, for several classes, and annotations are merged into a table of "
                "one label for each row: it must have a column label"
            )
        read_table(place, [], [])
        header, rows = read_cells(place, ("path", "label"))
    known = [name.strip().lower() for name in header]
    label, tree, i = known.index("label"), Tree(place.parent), 0
    names = [""] * len(rows)
    for place_of_row, row in enumerate(rows):
        if (not row and len(header) > 1) or not (beside or any(map(str.strip, row))):
            continue  # as those do who read it
        row += [""] * (len(header) - len(row))
        if not beside:
            names[place_of_row] = tree.find(row[known.index("path")])
        elif i < n:  # behind that are only blank lines
            names[place_of_row] = f"{beside[0].name}[{i}]"
            i += 1
    return Table(header, rows, names, label, place.resolve().parent.name, not beside)


def _cells(part: str, name: str) -> tuple[str, str]:
    return write_cell(name), part if part in NAMES else ""


def default_prefix(folder: str) -> str:
    """The URL of a folder's images where Label Studio serves the folder above it."""
    return f"/data/local-files/?d={quote(os.fsencode(folder))}/"


def image_url(path: str, prefix: str) -> str:
    """The URL of an image.

    >>> image_url("cats/a b.jpg", "https://host/")
    'https://host/cats/a%20b.jpg'
    """
    path = path.lstrip("/")
    return prefix + (path if _AS_THEY_ARE.match(prefix) and is_text(path) else quote(os.fsencode(path)))


def is_text(path: str) -> bool:
    """Whether a file's name can be written in UTF-8: it may be any bytes."""
    return path.encode(errors="replace").decode() == path


class Places:
    """Finds the file that a task is about."""

    def __init__(self, paths: Sequence[str], prefix: str) -> None:
        self.prefix = prefix
        self.paths = {in_form(path): path for path in paths}
        self.uploads: defaultdict[str, list[str]] = defaultdict(
            list
        )  # by the name that an upload gives a file
        for path in self.paths.values():
            self.uploads[_uploaded(posixpath.basename(path))].append(path)

    def find(self, task: Annotation) -> list[str]:
        """The path: none where it is unknown, and several where a file was uploaded of whose name there are others."""
        tries = [task.path]
        if task.image.startswith(self.prefix):
            rest = task.image[len(self.prefix) :]
            tries += [rest, _unquoted(rest)]
        for path in tries:
            for each in (path, f"/{path}"):
                if path and (known := self.paths.get(in_form(each))):
                    return [known]
        upload = _UPLOAD.search(task.image)
        return self.uploads.get(_uploaded(_unquoted(upload[1])), []) if upload else []


def _unquoted(text: str) -> str:
    return os.fsdecode(unquote_to_bytes(text.encode("utf-8", "surrogateescape")))


def _uploaded(name: str) -> str:
    """A file's name after its upload: blanks are underscores, and signs are gone."""
    return "".join(c for c in in_form(name).strip().replace(" ", "_") if c.isalnum() or c in "-_.")


def merge(table: Table, annotations: Sequence[Annotation], prefix: str) -> Merged:
    """The table with the labels that people gave to images without one. A label that the table has stays.

    What people said about an image counts together, in whichever task. They must agree on one class that the table
    knows; a table without labels takes every class.
    """
    had: dict[str, str] = {}
    for name, row in zip(table.names, table.rows, strict=True):
        if name:
            had[name] = had.get(name) or table.given(row)
    spelling = {in_form(name): name for name in had.values() if name}
    places = Places(list(had), prefix)
    findings: list[Finding] = []
    by_path: dict[str, list[Annotation]] = {}
    for each in annotations:
        found = places.find(each)
        if len(found) == 1:
            by_path.setdefault(found[0], []).append(each)
        else:
            what = AMBIGUOUS if found else UNKNOWN_PATH
            findings.append(Finding(each.task, "", " + ".join(each.classes), what))
    meant = cache(lambda name: did_you_mean(name, spelling.values(), said))
    new: dict[str, str] = {}
    same = 0
    for path, some in by_path.items():
        for each in some:
            if each.skipped or not each.classes:
                what = SKIPPED if each.skipped else NO_CLASS
                findings.append(Finding(path, had[path], "", what, f" by {each.by}" if each.by else ""))
        votes = dict.fromkeys(
            tuple(spelling.get(in_form(name), name) for name in sorted(each.classes))
            for each in some
            if not each.skipped and each.classes
        )
        if not votes:
            continue
        name = next(iter(votes))[0]
        if what := _objection(list(votes), had[path], spelling):
            near = meant(name) if what == UNKNOWN_CLASS else ""
            votes_said = " or ".join(" + ".join(vote) for vote in votes)
            findings.append(Finding(path, had[path], votes_said, what, near))
        elif had[path]:
            same += 1
        else:
            new[path] = name
    rows = [
        [write_cell(new[name]) if name in new and c == table.label else cell for c, cell in enumerate(row)]
        for name, row in zip(table.names, table.rows, strict=True)
    ]
    merged = Table(table.header, rows, table.names, table.label, table.folder, table.of_files)
    return Merged(merged, len(new), same, findings)


def _objection(votes: list[tuple[str, ...]], had: str, spelling: dict[str, str]) -> str:
    """Why these votes give an image no label; "" if they do, or it has that one."""
    if len(votes) > 1:
        return DISAGREE
    if len(votes[0]) > 1:
        return SEVERAL
    name = votes[0][0]
    if "\0" in name or (spelling and in_form(name) not in spelling):
        return UNKNOWN_CLASS
    return DIFFERS if had and had != name else ""
