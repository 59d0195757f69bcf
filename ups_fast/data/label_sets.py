"""Labels [n, C] of samples with any number of classes: 1, 0, or -1 where it is not known; checked before a run.

In a table they are names of classes, separated by ";": those that are named are 1, those behind a "?" unknown, and all
others 0. ";" alone is none of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ups_fast.data.cells import read_cell
from ups_fast.words import are, many

_NAMED = 5  # classes in a sentence


def marks(array: np.ndarray, key: str) -> Tensor:  # [n, C] -> int8 [n, C]
    """The array as a run has it. Raises ValueError, naming the array, where it holds anything but 1, 0 and -1."""
    if array.dtype.kind not in "biu" or array.ndim != 2 or not array.shape[1]:
        got = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{key} must be integer labels [N], or several as 1, 0 and -1 [N, C], got {got}")
    wrong = (array != 1) & (array != 0) & ~((array == -1) if array.dtype.kind == "i" else np.zeros(1, bool))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{key} must hold 1, 0 and, where it is not known, -1, got {array[row, column]} in row {row:,}, column "
            f"{column:,}"
        )
    return torch.from_numpy(array.astype(np.int8))


def check_marks(labels: Tensor, key: str) -> None:  # int8 [n, C]
    """Raises ValueError where a labeled sample has no known label."""
    none = (labels < 0).all(1)
    if none.any():
        first = int(none.nonzero()[0])
        raise ValueError(
            f"{key} must hold a known label for each sample, got {many(int(none.sum()), 'row')} of -1 alone, the first "
            f"is row {first:,}: put such samples among the unlabeled ones"
        )


def notes_on_classes(labels: Tensor, classes: list[str], key: str) -> list[str]:  # int8 [n, C], those labeled
    """Sentences on classes of which nothing can be learned. Raises ValueError where that is all of them."""
    ones, zeros = (labels == 1).sum(0), (labels == 0).sum(0)
    if not ones.any():
        raise ValueError(f"{key} must hold a 1 of at least one class, got none in {many(len(labels), 'row')}")
    notes = []
    for count, what, so in (
        (ones, "a positive label", "a network learns only what is not of them"),
        (zeros, "a negative label", "a network may then call everything that"),
    ):
        if lacking := [name for name, n in zip(classes, count.tolist(), strict=True) if not n]:
            some = ", ".join(map(repr, lacking[:_NAMED]))
            more = f" and {len(lacking) - _NAMED:,} more" * (len(lacking) > _NAMED)
            have = "has" if len(lacking) == 1 else "have"
            noun = "class" if len(lacking) == 1 else "classes"
            notes.append(f"{noun} {some}{more} {have} no labeled sample with {what}: {so}")
    unknown = int((labels < 0).sum())
    if unknown:
        notes.append(f"{unknown:,} of {labels.numel():,} labels {are(unknown)} unknown and not learned from")
    return notes


def read_names(cell: str, line: str) -> str:
    """The names of a cell in the one way in which equal labels are equal text; "" where it is empty.

    Raises ValueError, naming the line, where a class is there and unknown at once, or a question mark has no class.

    >>> read_names(" dog; cat;dog;", "line 2")
    'cat;dog'
    """
    names = {read_cell(name.strip()).strip() for name in cell.split(";")} - {""}
    if "?" in names:
        raise ValueError(f"{line} has a question mark without the name of a class")
    if odd := sorted(name for name in names if f"?{name}" in names):
        raise ValueError(
            f"{line} contradicts itself on {odd[0]!r}, which it names with and without a question mark"
        )
    return ";".join(sorted(names)) or ";" * bool(cell.strip())


def names_of(text: str, *, unknown: bool = False) -> list[str]:
    """The classes that a text of `read_names` names, or those that it calls unknown."""
    each = [name for name in text.split(";") if name]
    return [name[1:] for name in each if name[0] == "?"] if unknown else [n for n in each if n[0] != "?"]


def marks_of(text: str, number: Mapping[str, int]) -> np.ndarray:  # int8 [C]
    """What the text says of each class, by its number. All is unknown where it is empty."""
    found = np.full(len(number), 0 if text else -1, np.int8)
    for value, unknown in ((-1, True), (1, False)):
        found[[number[name] for name in names_of(text, unknown=unknown)]] = value
    return found
