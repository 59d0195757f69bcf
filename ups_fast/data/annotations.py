"""What people said in Label Studio: its JSON export, the full one or JSON-MIN, as classes for paths or URLs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ups_fast.files import read_bytes
from ups_fast.words import line_of, many, said, shown

CONTROL = "label"  # the name of <Choices> in the labeling configuration
MOST_NAMED = 5  # other controls in a sentence


@dataclass(frozen=True)
class Annotation:
    """What one person said of one task."""

    task: str  # what the task is called in sentences
    path: str  # as `tasks` wrote it, or ""
    image: str  # URL, or ""
    classes: tuple[str, ...]  # none, one, or several
    skipped: bool
    by: str  # who: an address or a number, or ""


@dataclass(frozen=True)
class Export:
    annotations: list[Annotation]
    without: int  # tasks that nobody has annotated


def read_annotations(file: Path, control: str = CONTROL) -> Export:
    """The annotations of an export, in its order.

    control  the name of the <Choices> that says the class

    Raises FileNotFoundError, or ValueError with one sentence: the file is no export, nobody has annotated anything, or
    no annotation has the control.
    """
    where = repr(str(file))
    if not file.exists():
        raise FileNotFoundError(f"there is no file {where}")
    content = read_bytes(file)
    try:
        tasks = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be an export of Label Studio in JSON: {line_of(error)}") from error
    if not isinstance(tasks, list):
        raise ValueError(f"{where} must be an export of Label Studio, a list of tasks, got {_kind(tasks)}")
    found: list[Annotation] = []
    without = 0
    others: dict[str, None] = {}
    for i, task in enumerate(tasks):
        place = f"task {i + 1} of {where}"
        some = list(_annotations(_dict(task, place), place, control, others))
        without += not some
        found += some
    if not found:
        raise ValueError(f"{where} has {many(len(tasks), 'task')} and no annotation: label some, then export")
    if others and not any(each.classes for each in found):
        names = ", ".join(said(name) for name in list(others)[:MOST_NAMED])
        raise ValueError(f"no annotation of {where} has the control {control!r}, but {names}: see --control")
    return Export(found, without)


def _annotations(task: dict, place: str, control: str, others: dict[str, None]) -> Iterator[Annotation]:
    if not isinstance(
        task.get("data"), dict
    ):  # JSON-MIN: a record for each annotation, with the task's data in it
        if control in task or task.get("annotation_id") is not None:
            yield _annotation(task, task, _choices(task.get(control, []), place), place, False, "annotator")
            names = [name for name, value in task.items() if isinstance(value, dict) and "choices" in value]
            others.update(dict.fromkeys(names))
        return
    given = task.get("annotations") or []
    for annotation in _list(given, f"annotations of {place}"):
        about = _dict(annotation, f"an annotation of {place}")
        classes: list[str] = []
        for region in _list(about.get("result") or [], f"the result of {place}"):
            if isinstance(region, dict) and region.get("type") == "choices":
                if region.get("from_name") == control:
                    classes += _choices(region.get("value"), place)
                else:
                    others[shown(region.get("from_name"))] = None
        skipped = about.get("was_cancelled") is True
        yield _annotation(
            {**task["data"], "id": task.get("id")}, about, classes, place, skipped, "completed_by"
        )


def _annotation(
    data: Mapping[str, Any], about: Mapping[str, Any], classes: list[str], place: str, skipped: bool, who: str
) -> Annotation:
    path, image = (_text(data.get(key), place, "surrogateescape") for key in ("path", "image"))
    by = about.get(who)
    by = by.get("email") or by.get("id") if isinstance(by, dict) else by
    classes = [_text(name, place).strip() for name in classes]
    task = path or image or f"task {shown(data.get('id'))}"
    return Annotation(
        task, path, image, tuple(dict.fromkeys(filter(None, classes))), skipped, shown(by or "")
    )


def _choices(value: Any, place: str) -> list[str]:
    """The classes of a choice, in any of the forms in which the two exports write it."""
    todo, found = [value], []
    while todo:
        each = todo.pop()
        if isinstance(each, dict):
            each = each.get("choices")
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, list):
            todo += reversed(each)
        else:
            raise ValueError(f"{place} must have a list of choices, got {_kind(each)}")
    return found


def _text(value: Any, place: str, errors: str = "strict") -> str:
    """The value if it is text, or "". A file's name may be bytes that are no text; nothing else may."""
    if not isinstance(value, str):
        return ""
    try:
        value.encode("utf-8", errors)
    except UnicodeEncodeError:
        raise ValueError(f"{place} must be text in UTF-8, got {said(value)}") from None
    return value


def _dict(value: Any, what: str) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, got {_kind(value)}")
    return value


def _list(value: Any, what: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else said(value)
