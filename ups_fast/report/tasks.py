"""A run's labels as tasks for Label Studio: what is to be labeled, with what the network says of it."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ups_fast.checkpoint import CONFIG, METRICS, NEXT, read_config
from ups_fast.data.annotations import CONTROL
from ups_fast.data.cells import read_cell
from ups_fast.data.merging import default_prefix, image_url, is_text
from ups_fast.data.row_files import is_row_file
from ups_fast.data.table import read_cells
from ups_fast.files import RunFolderError, home, read_bytes
from ups_fast.words import line_of, said

SHOWN = "sample"  # the name of what the labeling configuration shows
LABELS = "pseudo_labels.csv"
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|/data/")
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def tasks_of(run: Path, classes: Sequence[str], prefix: str | None, most: int = 0) -> tuple[list[dict], str]:
    """The unlabeled samples of a run as tasks with predictions, and the labeling configuration that shows them.

    Those of next_to_label.csv come first, in its order, then the others by rising confidence.

    prefix  what stands before a path in the URL of an image; None: of the local files of Label Studio
    most    how many tasks at most; 0: all

    Raises FileNotFoundError or RunFolderError with one sentence where the run is not done, has no files, or is damaged,
    and ValueError where a class cannot stand in XML.
    """
    rows = _table(run / LABELS, ("label", "confidence", "name"))
    if rows and "path" not in rows[0]:
        raise ValueError(
            f"{run} has no files to show: tasks can be made of a run on a folder or table of images, or on a file of "
            "features with a table of labels"
        )
    first = {row["path"]: row for row in (_table(run / NEXT, ("path",)) if (run / NEXT).exists() else [])}
    rank = {path: i for i, path in enumerate(first)}
    rows.sort(key=lambda row: (rank.get(row["path"], len(rank)), _number(row["confidence"], -1.0)))
    rows = rows[:most] if most else rows
    root = home(_root(run)).resolve()
    prefix = default_prefix((root if root.is_dir() else root.parent).name) if prefix is None else prefix
    shown, what = _shown(root)
    rounds = read_bytes(run / METRICS).count(b"\n")
    version = f"{run.resolve().name}, round {max(0, rounds - 1)}"
    tasks = []
    for row in rows:
        data = {"path": row["path"]} if is_text(row["path"]) else {}
        if what == "image":
            cell = row["path"] if shown is None else shown.get(row["path"], "")
            data["image"] = cell if _URL.match(cell) or not cell else image_url(cell, prefix)
        elif what == "text":
            data["text"] = (shown or {}).get(row["path"], "")
        data |= _about(row, classes) | _about(first.get(row["path"], {}), classes)
        tasks.append({"data": data, "predictions": _predictions(row, version)})
    return tasks, config(classes, what)


def _root(run: Path) -> str:
    try:
        return str(read_config(run / CONFIG)["data"]["root"])
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{run / CONFIG} is damaged: it has no data.root") from error


def _table(path: Path, wanted: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table that a run wrote. Raises FileNotFoundError or RunFolderError."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: tasks need a run that has finished")
    try:
        text = read_bytes(path).decode("utf-8", "surrogateescape")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        if any(None in row or None in row.values() for row in rows) or (
            rows and not set(wanted) <= set(rows[0])
        ):
            raise ValueError("its columns do not fit")
    except RunFolderError:
        raise
    except (ValueError, csv.Error) as error:
        raise RunFolderError(f"{path} is damaged: {line_of(error)}") from error
    text_columns = ("name", "path", "reason")
    return [
        {key: read_cell(cell) if key in text_columns else cell for key, cell in row.items()} for row in rows
    ]


def _shown(root: Path) -> tuple[dict[str, str] | None, str]:
    """What a person is shown of each sample of a run, by path, and whether that is an image, a text or the path.

    Rows of features are shown by the column image or text of their table. Images are their own paths: None.
    """
    if not is_row_file(root):
        return None, "image"
    table = root.with_suffix(".csv")
    if table.is_file():
        header, rows = read_cells(table, ("label",))
        known = [name.strip().lower() for name in header]
        rows = [row for row in rows if row or len(header) == 1]
        for what in ("image", "text"):
            if what in known:
                c = known.index(what)
                cells = (read_cell(row[c].strip()) if c < len(row) else "" for row in rows)
                return {f"{root.name}[{i}]": cell for i, cell in enumerate(cells)}, what
    return None, "path"


def _about(row: Mapping[str, str], classes: Sequence[str]) -> dict[str, Any]:
    """The other columns of a table as values, numbers where they are numbers."""
    about: dict[str, Any] = {}
    for key, cell in row.items():
        if key == "negative":
            numbers = [int(c) for c in cell.split() if c.isdecimal()]
            about["negative"] = [classes[c] for c in numbers if c < len(classes)]
        elif key not in ("index", "label", "name", "path") and cell not in ("", "nan"):
            value = _number(cell, None)
            about[key] = cell if value is None else int(value) if cell.isdecimal() else value
    return about


def _predictions(row: Mapping[str, str], version: str) -> list[dict]:
    score = _number(row["confidence"], None)
    if row["label"] == "-1" or score is None:
        return []
    choice = {"id": CONTROL, "from_name": CONTROL, "to_name": SHOWN, "type": "choices"}
    result = [{**choice, "value": {"choices": [row["name"]]}}]
    return [{"model_version": version, "score": min(max(score, 0.0), 1.0), "result": result}]


def config(classes: Sequence[str], what: str) -> str:
    """The labeling configuration: one of the classes for each image, text or path.

    Raises ValueError where the name of a class has a character that XML lacks.
    """
    view = ElementTree.Element("View")
    kind = "Image" if what == "image" else "Text"
    ElementTree.SubElement(view, kind, name=SHOWN, value=f"${what}")
    about = {"name": CONTROL, "toName": SHOWN, "choice": "single", "showInline": "true"}
    choices = ElementTree.SubElement(view, "Choices", about)
    for name in classes:
        if _NO_XML.search(name):
            raise ValueError(
                f"class {said(name)} has a character that Label Studio's configuration cannot hold"
            )
        ElementTree.SubElement(choices, "Choice", value=name)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def write_tasks(tasks: Sequence[dict]) -> bytes:
    text = json.dumps(tasks, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    return text.encode(errors="replace")  # a cell, or the name of the run's folder, may be no text


def _number(text: str, otherwise: Any) -> Any:
    try:
        value = float(text)
    except ValueError:
        return otherwise
    return value if math.isfinite(value) else otherwise
